"""The public strategies draw what they promise; the public comparison finds the first difference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from eventrnn.backend import get_backend
from eventrnn.cells import Cell
from eventrnn.events import Events
from eventrnn.network import Layer, Network, Readout
from eventrnn.simulation import Simulator, simulate
from eventrnn.state import State
from eventrnn.testing import (
    ALL_CELLS,
    Divergence,
    assert_equivalent,
    event_trains,
    inputs,
    masks,
    networks,
    states,
    weights,
)
from eventrnn.weights import CSR, FORMATS, NM, STORAGES, BlockCSR, Dense
from support import tolerance
from support.counting import count_multiplications

# The search for one example of a kind needs no shrinking and no example database.
LOOK = settings(max_examples=3000, database=None, phases=[Phase.generate], deadline=None)


def exists(strategy, condition) -> None:
    find(strategy, condition, settings=LOOK)


# --- strategies ---------------------------------------------------------------------------------------------


def test_drawn_networks_are_active():
    activities = []

    @settings(LOOK, max_examples=150)
    @given(st.data())
    def collect(data):
        network = data.draw(networks())
        fed = data.draw(inputs(network, st.integers(10, 30), 2))
        activities.append(np.mean(simulate(network, fed).activity))

    collect()
    low, high = tolerance.ACTIVITY_RANGE
    assert low < np.mean(activities) < high
    # Few networks are silent or saturated altogether.
    assert np.mean([0 < activity < 1 for activity in activities]) > 0.7


@given(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from(STORAGES),
    st.sampled_from(ALL_CELLS),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_networks_follow_their_options(name, storage, cell, n_layers, embedding, readout, data):
    options = {"embedding": embedding, "readout": readout, "layers": n_layers, "max_units": 7, "max_inputs": 5}
    network = data.draw(networks(formats=[name], storages=[storage], cells=[cell], **options))
    assert {(matrix.name, matrix.storage) for matrix in network.matrices().values()} == {(name, storage)}
    assert {layer.cell for layer in network.layers} == {cell}
    assert len(network.layers) == n_layers
    assert (network.embedding is not None, network.readout is not None) == (embedding, readout)
    assert all(1 <= layer.units <= 7 for layer in network.layers)
    assert network.layers[0].inputs <= (7 if network.readout and network.readout.tied else 5)
    assert all((layer.threshold >= 0).all() for layer in network.layers)


@given(networks(tied=True), networks(tied=False))
def test_tied_networks(tied, untied):
    assert tied.readout is not None
    assert tied.readout.tied
    assert untied.readout is None or not untied.readout.tied


def test_tied_networks_need_embedding_and_readout():
    for options in ({"embedding": False}, {"readout": False}):
        with pytest.raises(ValueError, match="networks: tied needs an embedding and a read-out"):
            find(networks(tied=True, **options), bool)


def test_every_kind_of_network_is_drawn():
    exists(networks(), lambda n: len({layer.cell.variant for layer in n.layers}) == 2)
    exists(networks(cells=ALL_CELLS), lambda n: len({layer.cell.name for layer in n.layers}) == 3)
    exists(networks(), lambda n: len({matrix.name for matrix in n.matrices().values()}) == 4)
    exists(networks(), lambda n: {matrix.storage for matrix in n.matrices().values()} == set(STORAGES))
    exists(networks(), lambda n: len(n.layers) == 3 and n.embedding is not None and n.readout is None)
    exists(networks(), lambda n: n.readout is not None and n.readout.tied and n.readout.weights.name == "block")
    exists(networks(tied=True), lambda n: n.readout.weights.storage == "int8" and n.embedding.shape[0] > 3)
    exists(networks(), lambda n: any((layer.threshold == 0).all() and layer.units > 5 for layer in n.layers))
    exists(networks(), lambda n: any(len(set(layer.threshold.tolist())) > 5 for layer in n.layers))
    exists(networks(), lambda n: any(np.ptp(layer.threshold) == 0 < layer.threshold.min() for layer in n.layers))


@pytest.mark.parametrize("block", [(1, 1), (1, 16), (1, 32), (1, 64), (16, 16), (3, 5), (3, 1), (7, 11)])
def test_every_kind_of_block_is_drawn(block):
    exists(weights((17, 70), formats=["block"]), lambda w: w.block == block and w.nnz > 0)


@pytest.mark.parametrize("axis", ["post", "pre"])
@pytest.mark.parametrize("n_m", [(2, 2), (1, 2), (2, 4), (1, 8), (3, 5), (4, 16), (2, 32)])
def test_every_kind_of_group_is_drawn(n_m, axis):
    exists(weights((17, 70), formats=["nm"]), lambda w: (w.n, w.m) == n_m and w.axis == axis and w.nnz > 0)


@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_matrix_is_drawn(name):
    drawn = weights((9, 20), formats=[name])
    for storage in STORAGES:
        exists(drawn, lambda w, storage=storage: w.storage == storage and w.nnz > 0)
    exists(drawn, lambda w: w.nnz == 0)
    exists(drawn, lambda w: w.nnz == 9 * 20)
    exists(drawn, lambda w: w.nnz > 60 and (w.fan_out() == 0).any())
    if name != "dense":
        # Zeros are stored beside weights.
        exists(drawn, lambda w: 0 < w.nnz < w.stored < 9 * 20)
    else:
        exists(drawn, lambda w: np.signbit(w.floats()[w.floats() == 0]).any())


def test_blocks_that_divide_nothing_are_drawn():
    def odd(w):
        return w.shape[0] % w.block[0] != 0 and w.shape[1] % w.block[1] != 0 and w.nnz > 0

    exists(weights((9, 22), formats=["block"]), odd)


def test_drawn_masks_range_from_full_to_empty():
    for condition in (np.all, lambda m: not m.any(), lambda m: (~m.any(axis=1)).any() and m.any()):
        exists(masks((8, 12), (2, 5)), condition)
    with pytest.raises(ValueError, match="block: 9x1 is larger than the matrix 8x12"):
        find(masks((8, 12), (9, 1)), np.any)


@given(event_trains(5, st.integers(0, 4), 2))
def test_event_trains_are_valid(events):
    events.check()
    assert events.shape[1:] == (2, 5)
    assert 0 <= events.shape[0] <= 4


def test_every_kind_of_event_train_is_drawn():
    drawn = event_trains(6, 5, 2)

    def a_silent_step_between(events):
        busy = np.diff(events.indptr) > 0
        return busy[0] and busy[-1] and not busy.all()

    for condition in (
        lambda e: len(e) == 0,
        lambda e: e.activity > 0.95,
        lambda e: set(e.values.tolist()) == {-1.0, 1.0},
        lambda e: e.graded.any() and not e.graded.all(),
        a_silent_step_between,
    ):
        exists(drawn, condition)


def test_every_kind_of_input_is_drawn():
    plain, indexed = (find(networks(embedding=e), lambda n: True, settings=LOOK) for e in (False, True))
    exists(inputs(plain, 3, 2), lambda fed: isinstance(fed, Events))
    exists(inputs(plain, 3, 2), lambda fed: isinstance(fed, np.ndarray) and fed.dtype == np.float32)
    exists(inputs(indexed, 3, 2), lambda fed: fed.dtype == np.uint8 and fed.shape == (3, 2))


@given(networks(cells=ALL_CELLS), st.integers(1, 4), st.data())
def test_drawn_states_can_occur_after_a_run(network, batch, data):
    state = data.draw(states(network, batch))
    assert state.batch == batch
    for layer, c, y in zip(network.layers, state.cells, state.outputs, strict=True):
        assert c.shape == y.shape == (batch, layer.units)
        assert c.dtype == y.dtype == np.float32
        assert not layer.cell.thresholded or (y >= 0).all()
        assert not layer.cell.equations.single_state or np.array_equal(c, y)


@given(networks(dyadic=True), event_trains(9, 3, 2, dyadic=True))
def test_dyadic_values_lie_on_their_grid(network, events):
    arrays = [matrix.floats() for matrix in network.matrices().values()] + [events.values]
    for layer in network.layers:
        arrays += [layer.bias_in, layer.bias_rec, layer.threshold]
    for array in arrays:
        assert np.array_equal(array * 16, np.round(array * 16))
        assert (np.abs(array) <= 5).all()


def test_int8_lies_on_no_dyadic_grid():
    exists(weights((3, 4), dyadic=True), lambda w: w.storage == "bfloat16")
    with pytest.raises(ValueError, match=r"storages: got \('int8',\) with dyadic=True"):
        find(weights((3, 4), storages=["int8"], dyadic=True), bool)


# --- the comparison -----------------------------------------------------------------------------------------


def quiet_network(threshold: float) -> Network:
    """Five units without recurrence: u = r = 1/2, g = tanh(2 x), hence v = c / 2 + tanh(2 x) / 2."""
    rows = 15
    w_in = np.zeros((5, rows), np.float32)
    w_in[range(5), range(10, 15)] = 2
    thresholds = np.full(5, 0.45, np.float32)
    thresholds[3] = threshold
    biases = np.zeros((2, rows), np.float32)
    return Network((Layer(Dense(w_in), Dense(np.zeros((5, rows), np.float32)), *biases, thresholds),))


def test_assert_equivalent_names_first_divergence_and_margin():
    # Unit 3 of sample 1 receives 1 in step 2: v = tanh(2) / 2 = 0.482 exceeds 0.4 and not 0.6.
    x = np.zeros((5, 3, 5), np.float32)
    x[2, 1, 3] = 1
    a, b = (Simulator(quiet_network(threshold), batch=3) for threshold in (0.4, 0.6))
    with pytest.raises(Divergence) as caught:
        assert_equivalent(a, b, x)
    found, v = caught.value, np.tanh(2) / 2
    assert (found.what, found.step, found.layer, found.sample, found.unit) == ("event", 2, 0, 1, 3)
    assert found.values[1] == 0
    assert abs(found.values[0] - v) <= tolerance.HALF_TANH
    assert abs(found.margins[0] - (v - 0.4)) <= tolerance.HALF_TANH
    assert abs(found.margins[1] - (0.6 - v)) <= tolerance.HALF_TANH
    text = str(found)
    assert text.startswith("events differ first at step 2, layer 0, sample 1, unit 3: 0.48201")
    assert "margin to threshold |v - threshold| 0.0820" in text


@given(networks(layers=2, max_units=12), st.data())
def test_finds_a_change_in_a_higher_layer(network, data):
    fed = data.draw(inputs(network, 8, 2))
    layer = network.layers[1]
    unit = data.draw(st.integers(0, layer.units - 1))
    threshold = layer.threshold.copy()
    threshold[unit] += np.float32(0.1)
    other = replace(network, layers=(network.layers[0], replace(layer, threshold=threshold)))
    a, b = (simulate(n, fed, record=("events", "states")) for n in (network, other))
    differs = (a.states[1] != b.states[1]) | (a.events[1].to_dense() != b.events[1].to_dense())
    simulators = Simulator(network, batch=2), Simulator(other, batch=2)
    if not differs.any():
        assert_equivalent(*simulators, fed)
        return
    with pytest.raises(Divergence) as caught:
        assert_equivalent(*simulators, fed)
    found = caught.value
    step, sample, _ = np.argwhere(differs)[0]
    # Before it spreads, only the changed unit differs.
    assert (found.step, found.layer, found.sample, found.unit) == (step, 1, sample, unit)
    for run, limit, margin in zip((a, b), (layer.threshold[unit], threshold[unit]), found.margins, strict=True):
        before = float(run.states[1][step, sample, unit])
        if layer.cell.variant == "evnn" and run.events[1].to_dense()[step, sample, unit] != 0:
            before += float(limit)
        assert margin == abs(before - float(limit))


def test_equal_runs_pass_and_report_how_much_was_compared():
    network = Network.random([6, 4], inputs=3, readout=2, rng=np.random.default_rng(0), threshold=0.05)
    x = np.random.default_rng(1).standard_normal((7, 2, 3))
    assert assert_equivalent(Simulator(network, batch=2), Simulator(network.dense(), batch=2), x) == 7 * 2 * 10
    assert assert_equivalent(Simulator(network, batch=2), Simulator(network, batch=2), x[:0]) == 0


class Tampering:
    """A backend that changes the results of a healthy one."""

    name, exact = "tampering", False

    def __init__(self, change):
        self.change = change

    def engine(self, network, *, threads=1):
        healthy, change = get_backend("cpu").engine(network, threads=threads), self.change

        class Engine:
            dense = False

            def prepare(self, inputs):
                return healthy.prepare(inputs)

            def run(self, inputs, state, **record):
                return change(healthy.run(inputs, state, **record))

        return Engine()


def changed(array, at, by=1):
    array = array.copy()
    array[at] += by
    return array


@pytest.mark.parametrize(
    ("change", "what", "place"),
    [
        (lambda t: replace(t, output=changed(t.output, (3, 1, 2))), "output", {"step": 3, "sample": 1, "unit": 2}),
        (lambda t: replace(t, output=t.output[..., :2]), "output shape", {}),
        (
            lambda t: replace(t, fired=(t.fired[0], replace(t.fired[1], graded=changed(t.fired[1].graded, 3)))),
            "fire count",
            {"layer": 1, "unit": 3},
        ),
        (
            lambda t: replace(t, state=State(t.state.cells, (t.state.outputs[0], changed(t.state.outputs[1], (1, 2))))),
            "final state",
            {"step": 5, "layer": 1, "sample": 1, "unit": 2},
        ),
        (
            lambda t: replace(t, states=(changed(t.states[0], (4, 0, 5)), changed(t.states[1], (2, 1, 1), np.nan))),
            "cell",
            {"step": 2, "layer": 1, "sample": 1, "unit": 1},
        ),
    ],
)
def test_everything_a_run_returns_is_compared(change, what, place):
    network = Network.random([6, 4], inputs=3, readout=3, rng=np.random.default_rng(0), threshold=0.05)
    x = np.random.default_rng(1).standard_normal((5, 2, 3))
    with pytest.raises(Divergence) as caught:
        assert_equivalent(Simulator(network, batch=2), Simulator(network, batch=2, backend=Tampering(change)), x)
    found = caught.value
    assert found.what == what
    got = {name: getattr(found, name) for name in ("step", "layer", "sample", "unit")}
    assert got == {"step": -1, "layer": -1, "sample": -1, "unit": -1} | place
    assert str(found).startswith(f"{what}s differ")


def test_assert_equivalent_refuses_incomparable_simulators():
    rng = np.random.default_rng(0)
    network, other = (Network.random([n], inputs=3, rng=rng) for n in (4, 5))
    x = np.zeros((1, 1, 3))
    with pytest.raises(ValueError, match=r"got layers of \[4\] and of \[5\] units"):
        assert_equivalent(Simulator(network), Simulator(other), x)
    with pytest.raises(ValueError, match="got batches of 1 and 2"):
        assert_equivalent(Simulator(network), Simulator(network, batch=2), x)
    moved = State(tuple(c + 1 for c in State.zeros(network, 1).cells), State.zeros(network, 1).outputs)
    with pytest.raises(ValueError, match="start with different cells of layer 0; make them with the same state"):
        assert_equivalent(Simulator(network), Simulator(network, state=moved), x)


def test_readout_of_another_size_is_reported():
    network = Network.random([4], inputs=3, readout=2, rng=np.random.default_rng(0))
    wider = replace(network, readout=Readout(Dense(np.zeros((4, 3), np.float32)), np.zeros(3, np.float32)))
    with pytest.raises(Divergence, match=r"output shapes differ: \(1, 1, 2\) and \(1, 1, 3\)"):
        assert_equivalent(Simulator(network), Simulator(wider), np.zeros((1, 1, 3)))


# --- counting numbers ---------------------------------------------------------------------------------------


@given(weights((6, 9)), event_trains(6, 1, 3))
def test_counting_numbers_count_every_product(matrix, events):
    dense, values = matrix.to_dense(), events.to_dense()[0]
    counted = count_multiplications(dense, values)
    assert counted == (3 * dense.size, int(((values != 0) @ (dense != 0).astype(int)).sum()))


def test_counting_numbers_by_hand():
    matrix = np.array([[1.0, 0], [2, 3]])
    # Both rows of values meet all four weights; 5 meets the one non-zero weight of unit 0, 7 the two of unit 1.
    assert count_multiplications(matrix, np.array([[5.0, 0], [0, 7]])) == (8, 3)
    assert count_multiplications(matrix, np.zeros((2, 2))) == (8, 0)


def test_formats_in_use_are_those_of_the_table():
    assert {Dense, CSR, BlockCSR, NM} == set(FORMATS.values())
    assert Cell().variant == "evnn"
