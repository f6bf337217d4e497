"""The conformance suite: every backend, format, split and thread count gives the bits of the specification.

Exact backends are compared with `==`. Comparisons with float64 use the bounds of `tolerance.py`. The equations of one
unit, which all backends share, are tested in `test_cells.py`.
"""

from __future__ import annotations

import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventrnn import reference
from eventrnn import simulation as simulation_module
from eventrnn.backend import BACKENDS, IN_FLOAT64
from eventrnn.cells import Cell
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.reference import ReferenceBackend
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.state import State
from eventrnn.testing import ALL_CELLS, EVENT_CELLS, assert_equivalent, inputs, networks, states
from eventrnn.weights import FORMATS, STORAGES, Weights
from support import tolerance
from support.conformance import (
    EXACT,
    assert_same,
    assert_same_state,
    carries,
    cases,
    check_chunks,
    check_formats,
    check_threads_do_not_race,
    each,
    fitting,
    in_format,
    large_network,
    part,
    records,
    same_bits,
    steps_of,
    unmodified,
)

#: Each format alone, and all mixed within a network.
FORMAT_SETS = [(name,) for name in FORMATS] + [tuple(FORMATS)]


def said(cell: Cell) -> str:
    return f"{cell.name}-{cell.variant}"


# --- against the specification ------------------------------------------------------------------------------


@pytest.mark.parametrize("formats", FORMAT_SETS, ids="+".join)
@pytest.mark.parametrize("cell", EVENT_CELLS, ids=said)
@pytest.mark.parametrize("backend", each(name for name in EXACT if name != "reference"))
@given(data=st.data(), threads=st.integers(1, 3), record=records, carry=carries())
def test_every_format_equals_the_dense_specification(backend, cell, formats, data, threads, record, carry):
    check_formats(backend, cell, formats, data, threads, record, carry)


@pytest.mark.parametrize("cell", [cell for cell in ALL_CELLS if not cell.thresholded], ids=said)
@given(data=st.data(), threads=st.integers(1, 3), record=records)
@settings(max_examples=15)
def test_cells_without_thresholds_equal_the_dense_specification(cell, data, threads, record):
    check_formats("cpu", cell, tuple(FORMATS), data, threads, record, {"carry": "state"})


@given(case=cases(cells=ALL_CELLS, max_batch=3), threads=st.integers(1, 3))
def test_assert_equivalent_mixed_formats_finds_no_difference(case, threads):
    compared = assert_equivalent(case.simulator("reference"), case.simulator("cpu", threads=threads), case.inputs)
    assert compared == steps_of(case.inputs) * case.batch * sum(layer.units for layer in case.network.layers)


@pytest.mark.parametrize("backend", each(EXACT))
@given(case=cases(max_steps=4))
def test_simulate_negative_initial_outputs_equals_specification(backend, case):
    # No run of an EGRU produces a negative output. A caller may pass one, and it is an event like any other.
    outputs = tuple(np.where(y > 0.5, -y, y) for y in case.state.outputs)
    signed = replace(case, state=State(case.state.cells, outputs))
    assert_same(
        signed.simulator("reference").run(case.inputs, record=RECORDABLE),
        signed.simulator(backend).run(case.inputs, record=RECORDABLE),
    )


@pytest.mark.parametrize("backend", each(EXACT))
@given(batch=st.integers(1, 3), data=st.data())
def test_simulate_zero_steps_keeps_the_state(backend, batch, data):
    network = data.draw(networks(cells=ALL_CELLS, max_units=8))
    state = data.draw(states(network, batch))
    nothing = part(data.draw(inputs(network, 1, batch)), slice(0))
    result = simulate(network, nothing, state=state, backend=backend, record=RECORDABLE)
    assert result.output.shape[:2] == (0, batch)
    assert_same_state(result.state, state)
    assert all(fired.total.sum() == 0 for fired in result.fired)


# --- between exact paths: larger networks, no specification to wait for -------------------------------------


@pytest.mark.parametrize("formats", FORMAT_SETS, ids="+".join)
@given(data=st.data(), threads=st.integers(1, 3), carry=carries())
def test_every_format_and_thread_count_equals_dense_on_one_thread(formats, data, threads, carry):
    case = data.draw(cases(cells=ALL_CELLS, formats=formats, max_units=80, max_inputs=60, max_steps=150))
    carry = fitting(carry, case.network)
    with unmodified(case):
        a = case.simulator(network=case.network.dense(), **carry).run(case.inputs, record=RECORDABLE)
        b = case.simulator(threads=threads, **carry).run(case.inputs, record=RECORDABLE)
    assert_same(a, b)


@pytest.mark.parametrize("backend", each(EXACT))
@given(data=st.data(), carry=carries())
def test_each_sample_alone_equals_the_batch(backend, data, carry):
    sizes = {"max_units": 60, "max_steps": 100} if backend in ("cpu", "cuda") else {"max_units": 10}
    case = data.draw(cases(cells=ALL_CELLS, **sizes))
    carry = fitting(carry, case.network)
    whole = case.simulator(backend, **carry).run(case.inputs, record=RECORDABLE)
    for b in range(case.batch):
        sample = slice(b, b + 1)
        state = State(*(tuple(x[sample] for x in arrays) for arrays in (case.state.cells, case.state.outputs)))
        alone = simulate(
            case.network, part(case.inputs, batch=sample), state=state, backend=backend, record=RECORDABLE, **carry
        )
        assert np.array_equal(whole.output[:, sample], alone.output)
        assert all(same_bits(x[:, sample], y) for x, y in zip(whole.states, alone.states, strict=True))
        pairs = zip(whole.events, alone.events, strict=True)
        assert all(same_bits(x.to_dense()[:, sample], y.to_dense()) for x, y in pairs)


@pytest.mark.parametrize("backend", each(EXACT))
@given(data=st.data(), threads=st.integers(1, 2))
def test_chunks_and_single_steps_equal_one_run(backend, data, threads):
    check_chunks(backend, data, threads)


@given(case=cases(cells=ALL_CELLS, max_units=40, max_steps=20, embedding=False))
def test_simulate_events_and_arrays_give_equal_results(case):
    dense = case.inputs.to_dense() if isinstance(case.inputs, Events) else case.inputs
    results = [
        case.simulator().run(fed, record=RECORDABLE)
        for fed in (dense, dense.astype(np.float64), Events.from_dense(dense))
    ]
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("backend", each(EXACT))
@given(data=st.data())
def test_symbols_equal_their_embeddings(backend, data):
    case = data.draw(cases(cells=ALL_CELLS, embedding=True))
    assert case.network.embedding is not None
    top = case.network.readout
    bare = replace(case.network, embedding=None, readout=None if top is None else replace(top, tied=False))
    assert_same(
        case.simulator(backend).run(case.inputs, record=RECORDABLE),
        case.simulator(backend, network=bare).run(case.network.embedding[case.inputs], record=RECORDABLE),
    )


@settings(max_examples=15)
@given(data=st.data(), record=records, carry=carries(), limit=st.sampled_from([1, 600, 20_000]))
def test_record_in_several_parts_equals_one_part(data, record, carry, limit):
    case = data.draw(cases(cells=ALL_CELLS, max_units=40, max_steps=60))
    carry = fitting(carry, case.network)
    whole = case.simulator(**carry).run(case.inputs, record=RECORDABLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation_module, "RECORD_BYTES", limit)
        assert_same(whole, case.simulator(**carry).run(case.inputs, record=record), record)


@given(case=cases(max_units=30, max_steps=30), window=st.integers(1, 6))
def test_carry_events_resets_cells_at_every_window(case, window):
    whole = case.simulator(carry="events", window=window).run(case.inputs)
    state, outputs = case.state, []
    for start in range(0, steps_of(case.inputs), window):
        state = State(State.zeros(case.network, case.batch).cells, state.outputs)
        piece = simulate(case.network, part(case.inputs, slice(start, start + window)), state=state)
        state = piece.state
        outputs.append(piece.output)
    assert np.array_equal(whole.output, np.concatenate(outputs))
    assert_same_state(whole.state, state)


# --- large: full register tiles, their tails, several chunks of time ----------------------------------------


LAYOUTS = [("dense", None), ("csr", None), ("block", (1, 64)), ("block", (16, 16)), ("block", (32, 32))]


@pytest.mark.parametrize("cell", [*EVENT_CELLS, Cell("lstm")], ids=said)
def test_large_network_against_the_specification(cell):
    network = large_network(cell, units=301, inputs=70, seed=6)
    x = np.random.default_rng(7).standard_normal((70, 1, 70)).astype(np.float32)
    expected = simulate(network, x, backend="reference", record=RECORDABLE)
    assert all(0.02 < activity < 0.98 for activity in expected.activity) == cell.thresholded
    for layout in LAYOUTS:
        assert_same(expected, simulate(in_format(network, *layout), x, threads=2, record=RECORDABLE))


@pytest.mark.parametrize("cell", EVENT_CELLS, ids=said)
def test_larger_network_in_every_format_and_split(cell):
    network = large_network(cell, units=700, inputs=333, seed=8)
    rng = np.random.default_rng(9)
    x = (rng.standard_normal((150, 3, 333)) * (rng.random((150, 3, 333)) < 0.3)).astype(np.float32)
    expected = simulate(network, x, record=RECORDABLE)
    for layout in LAYOUTS:
        for threads in (1, 3):
            assert_same(expected, simulate(in_format(network, *layout), x, threads=threads, record=RECORDABLE))
    split = Simulator(network, batch=3)
    parts = [split.run(x[:65]), split.run(x[65:])]
    assert np.array_equal(expected.output, np.concatenate([p.output for p in parts]))
    assert np.array_equal(expected.output[:, :1], simulate(network, x[:, :1]).output)


@pytest.mark.parametrize("storage", STORAGES[1:])
def test_large_narrow_network_in_every_format(storage):
    # Equal weights have equal scales in every format, so that one dense network is the reference of all.
    network = large_network(Cell(), units=301, inputs=70, seed=13)
    x = np.random.default_rng(14).standard_normal((40, 2, 70)).astype(np.float32)
    expected = simulate(in_format(network, "dense", storage=storage).dense(), x, record=RECORDABLE)
    for layout in LAYOUTS:
        assert_same(expected, simulate(in_format(network, *layout, storage=storage), x, record=RECORDABLE))
    groups = in_format(network, "nm", nm=(32, 32, "pre"), storage=storage)
    assert_same(expected, simulate(groups, x, threads=2, record=RECORDABLE))


def test_threads_two_or_three_equal_one():
    check_threads_do_not_race("cpu")


# --- streaming ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [*EVENT_CELLS, Cell("lstm")], ids=said)
def test_step_ten_thousand_times_equals_run_without_leaks(cell):
    rng, threshold = np.random.default_rng(10), 0.1 if cell.thresholded else 0
    network = Network.random([24, 17], inputs=9, readout=5, rng=rng, threshold=threshold, cell=cell)
    network = in_format(
        network.with_matrices({k: replace(w, values=3 * w.values) for k, w in network.matrices().items()}), "csr"
    )
    x = (rng.standard_normal((10_000, 1, 9)) * (rng.random((10_000, 1, 9)) < 0.5)).astype(np.float32)
    whole = simulate(network, x)
    assert all(0.02 < activity < 0.98 for activity in whole.activity) == cell.thresholded
    stream, output, held = Simulator(network), np.empty_like(whole.output), []
    tracemalloc.start()
    try:
        for t in range(len(x)):
            output[t] = stream.step(x[t])
            if t % 2_000 == 1_999:
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert np.array_equal(output, whole.output)
    assert_same_state(stream.state, whole.state)
    assert np.diff(held).min() <= tolerance.STREAM_BYTES


# --- against float64 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", each(BACKENDS))
@given(case=cases(readout=True, max_units=30, max_steps=6))
def test_one_drive_is_within_its_float64_bound(backend, case):
    assert case.network.readout is not None
    result = case.simulator(backend).run(case.inputs, record="events")
    sent = result.events[-1].to_dense().astype(np.float64)
    weights, bias = (a.astype(np.float64) for a in (case.network.readout.weights.to_dense(), case.network.readout.bias))
    rows = sent.reshape(-1, sent.shape[2])
    exact = (rows @ weights + bias).reshape(result.output.shape)
    bound = tolerance.drive_bound(weights, rows, bias).reshape(exact.shape)
    assert (np.abs(result.output - exact) <= bound).all()


@pytest.mark.parametrize("backend", each(name for name in BACKENDS if name != "reference"))
@pytest.mark.parametrize("cell", EVENT_CELLS, ids=said)
@given(data=st.data())
def test_events_outside_the_margin_are_those_of_float64(backend, cell, data):
    # Every step starts from the state of the float32 run, so that the bound is that of one step and stays small.
    case = data.draw(cases(cells=[cell], max_units=40, max_inputs=30, layers=st.integers(1, 2)))
    with unmodified(case):
        run = case.simulator(backend).run(case.inputs, record=RECORDABLE)
    assert run.inputs is not None
    sent = [events.to_dense() for events in (run.inputs, *run.events)]
    inside = total = 0
    for k, layer in enumerate(case.network.layers):
        alone = Network((layer,))
        parameters = reference.layer_parameters(layer, np.float64)
        c, y = case.state.cells[k], case.state.outputs[k]
        for t in range(run.steps):
            x = sent[k][t].astype(np.float64)
            double = Simulator(alone, batch=case.batch, backend=ReferenceBackend(np.float64), state=State((c,), (y,)))
            exact = double.run(sent[k][t][None], record="states")
            v = tolerance.cell_bound(cell.variant, parameters, x, c.astype(np.float64), y.astype(np.float64))
            near = np.abs(v.value - parameters["threshold"]) <= v.error
            c, y = run.states[k][t], sent[k + 1][t]
            assert np.array_equal((y != 0)[~near], (exact.output[0] != 0)[~near])
            # Subtracting the threshold rounds once more.
            error = v.error + tolerance.U32 * (np.abs(v.value) + v.error + parameters["threshold"])
            assert (np.abs(y - exact.output[0]) <= error)[~near].all()
            assert (np.abs(c - exact.states[0][0]) <= error)[~near].all()
            inside, total = inside + near.sum(), total + near.size
    # With few units, one unit near its threshold is allowed.
    assert inside <= max(1, tolerance.INSIDE_MARGIN * total)


@pytest.mark.parametrize("backend", ["auto", "blas", "cpu"])
@pytest.mark.parametrize("cell", [cell for cell in ALL_CELLS if not cell.thresholded], ids=said)
@given(data=st.data())
@settings(max_examples=10)
def test_outputs_without_thresholds_are_within_their_float64_bound(backend, cell, data):
    case = data.draw(cases(cells=[cell], max_units=40, max_inputs=30, layers=2, embedding=False, readout=False))
    run = case.simulator(backend).run(case.inputs, record=RECORDABLE)
    assert run.inputs is not None
    x = [tolerance.Running(each.astype(np.float64)) for each in run.inputs.to_dense()]
    for k, layer in enumerate(case.network.layers):
        c, y = (tolerance.Running(each[k].astype(np.float64)) for each in (case.state.cells, case.state.outputs))
        parameters, sent = reference.layer_parameters(layer, np.float64), run.events[k].to_dense()
        for t in range(run.steps):
            y, c = tolerance.plain_bound(cell, parameters, x[t], c, y)
            assert (np.abs(sent[t] - y.value) <= y.error).all()
            assert (np.abs(run.states[k][t] - c.value) <= c.error).all()
            x[t] = y


def test_few_units_fall_inside_the_margin():
    network = large_network(Cell(), units=120, inputs=40, seed=11)
    layer = network.layers[0]
    parameters = reference.layer_parameters(layer, np.float64)
    x = np.random.default_rng(12).standard_normal((40, 2, 40)).astype(np.float32)
    run = simulate(network, x, record=RECORDABLE)
    c, y = (np.concatenate([np.zeros((1, 2, 120)), a[:-1]]) for a in (run.states[0], run.events[0].to_dense()))
    inside = sharpness = 0.0
    for t in range(len(x)):
        v = tolerance.cell_bound("evnn", parameters, x[t].astype(np.float64), c[t], y[t])
        inside += (np.abs(v.value - layer.threshold) <= v.error).mean() / len(x)
        sharpness = max(sharpness, v.error.max())
    assert inside <= tolerance.INSIDE_MARGIN
    assert 0 < sharpness <= tolerance.SHARPEST_MARGIN


@given(network=networks(dyadic=True, readout=True, max_units=40), seed=st.integers(0, 2**32 - 1))
def test_dyadic_drives_are_exact_in_any_order(network, seed):
    readout = network.readout
    assert readout is not None
    weights = readout.weights.to_dense()
    values = np.round(np.random.default_rng(seed).standard_normal((3, len(weights))) * 16).astype(np.float32) / 16
    drive = reference.propagate(weights, values, readout.bias)
    assert np.array_equal(drive, values @ weights + readout.bias)
    order = np.random.default_rng(seed).permutation(len(weights))
    assert np.array_equal(drive, reference.propagate(weights[order], values[:, order], readout.bias))


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one_hot", [False, True])
def test_every_backend_names_the_kernel_of_every_matrix(one_hot):
    """And a run is exact where all of them are."""
    network = Network.random([8, 7], inputs=5, readout=4, rng=np.random.default_rng(0))
    network = replace(network, one_hot=one_hot)
    x = np.zeros((3, 2), int) if one_hot else np.ones((3, 2, 5), np.float32)
    in_float64 = ReferenceBackend(np.float64)
    for backend in ("reference", "cpu", "auto", "blas", in_float64):
        run = simulate(network, x, backend=backend)
        assert set(run.paths) == set(network.matrices()) and run.exact is (backend in EXACT)
    assert set(simulate(network, x, backend=in_float64).paths.values()) == {IN_FLOAT64}


def test_simulator_refuses_unknown_backend_and_threads_of_reference():
    network = Network.random([3], inputs=2, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="backend: got 'gpu9', need one of reference, cpu, "):
        Simulator(network, backend="gpu9")
    with pytest.raises(ValueError, match="threads: got 2, but the reference backend runs on 1"):
        Simulator(network, backend="reference", threads=2)


def test_cpu_backend_refuses_unknown_format():
    class Diagonal(Weights):
        name, shape, values = "diagonal", (2, 6), np.ones(2, np.float32)

        def check(self, full=False):
            return None

        to_dense = fan_out = stored_out = row_bytes = check_index = check

    network = Network.random([2], inputs=2, rng=np.random.default_rng(0))
    network = replace(network, layers=(replace(network.layers[0], w_rec=Diagonal()),))
    with pytest.raises(TypeError, match="cpu backend cannot run format Diagonal; convert to dense, csr, block or nm"):
        Simulator(network)
