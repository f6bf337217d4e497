"""Networks, their state, and runs: refused arguments, and the meaning of a run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn.backend import HostInputs, get_backend
from eventrnn.cells import Cell, Surrogate
from eventrnn.events import Events
from eventrnn.network import Layer, Network, Readout
from eventrnn.simulation import Simulator, simulate
from eventrnn.state import FireCounts, State
from eventrnn.testing import event_trains, inputs, networks
from eventrnn.weights import CSR, BlockCSR, Dense, convert
from support import tolerance


def zeros(*shape) -> np.ndarray:
    return np.zeros(shape, np.float32)


def layer(inputs: int = 2, units: int = 3, **changes) -> Layer:
    rows = 3 * units
    fields = {
        "w_in": Dense(np.ones((inputs, rows), np.float32)),
        "w_rec": Dense(np.ones((units, rows), np.float32)),
        "bias_in": zeros(rows),
        "bias_rec": zeros(rows),
        "threshold": zeros(units),
    }
    return Layer(**(fields | changes))


def small(seed: int = 0, **options) -> Network:
    return Network.random([4, 3], **({"inputs": 2, "readout": 5, "rng": np.random.default_rng(seed)} | options))


def lively(**options) -> Network:
    """A small network whose weights are large enough for events."""
    network = small(threshold=0.05, **options)
    return network.with_matrices({name: Dense(4 * w.to_dense()) for name, w in network.matrices().items()})


# --- building -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"w_rec": Dense(zeros(3, 8))}, ValueError, r"w_rec: got shape \(3, 8\), need \(3, 9\) for 3 thresholds"),
        ({"w_in": Dense(zeros(2, 8))}, ValueError, r"w_in: got shape \(2, 8\), need \(inputs, 9\) for 3 units"),
        ({"bias_in": zeros(8)}, ValueError, "bias_in: got length 8, need 9"),
        ({"bias_rec": np.zeros(9)}, TypeError, r"bias_rec: got float64 \(9,\), need a float32 array with 1 dimension"),
        ({"bias_rec": zeros(9, 1)}, TypeError, r"bias_rec: got float32 \(9, 1\)"),
        ({"bias_rec": [0.0] * 9}, TypeError, "bias_rec: got list, need a float32 array"),
        ({"threshold": np.array([0, np.nan, 0], np.float32)}, ValueError, r"threshold: got nan at position \(1,\)"),
        ({"threshold": np.array([0, 0, -0.5], np.float32)}, ValueError, "threshold: got -0.5 at unit 2; need >= 0"),
        ({"bias_in": np.full(9, np.inf, np.float32)}, ValueError, r"bias_in: got inf at position \(0,\)"),
    ],
)
def test_layer_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        layer(**changes)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"layers": ()}, ValueError, "layers: got none, need at least one"),
        ({"layers": (layer(), layer())}, ValueError, "layer 1: takes 2 inputs, but layer 0 has 3 units"),
        ({"embedding": zeros(7, 3)}, ValueError, r"embedding: got shape \(7, 3\), need \(symbols, 2\) for layer 0"),
        ({"embedding": np.zeros((7, 2))}, TypeError, r"embedding: got float64 \(7, 2\), need a float32 array with 2"),
        ({"embedding": np.full((7, 2), np.nan, np.float32)}, ValueError, r"embedding: got nan at position \(0, 0\)"),
        (
            {"readout": Readout(Dense(zeros(4, 5)), zeros(5))},
            ValueError,
            "readout: takes 4 units, the last layer has 3",
        ),
        ({"readout": Readout(Dense(zeros(3, 5)), zeros(5), tied=True)}, ValueError, "readout: tied, but its weights"),
    ],
)
def test_network_refuses(fields, error, message):
    with pytest.raises(error, match=message):
        Network(**({"layers": (layer(),)} | fields))


def test_readout_refuses():
    with pytest.raises(ValueError, match="readout bias: got length 4, need 5"):
        Readout(Dense(zeros(3, 5)), zeros(4))


def test_tied_readout_must_be_the_embedding():
    table = np.arange(21, dtype=np.float32).reshape(7, 3)
    tied = Readout(Dense(np.ascontiguousarray(table.T)), zeros(7), tied=True)
    assert Network((layer(inputs=3),), table, tied).readout is tied
    with pytest.raises(ValueError, match="tied, but its weights are not the transposed embedding"):
        Network((layer(inputs=3),), table + 1, tied)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_must_be_finite(bad):
    weights = np.ones((3, 9), np.float32)
    weights[1, 2] = bad
    with pytest.raises(ValueError, match=rf"layers\.0\.w_rec: got {bad} at position"):
        Network((layer(w_rec=Dense(weights)),))


def test_a_weight_index_outside_the_matrix_is_refused():
    # Kernels do not check indices and would write outside their arrays.
    csr = convert(np.ones((3, 9), np.float32), "csr")
    assert isinstance(csr, CSR)
    stray = replace(csr, indices=np.where(np.arange(27) == 26, 1 << 20, csr.indices).astype(np.int32))
    block = convert(np.ones((3, 9), np.float32), "block", block=(3, 3))
    assert isinstance(block, BlockCSR)
    for weights in (stray, replace(block, indices=np.array([0, 1, 1 << 20], np.int32))):
        with pytest.raises(ValueError, match="indices: outside"):
            Network((layer(w_rec=weights),))


def test_cell_and_surrogate_refuse():
    with pytest.raises(ValueError, match="cell: got 'rnn', need one of egru, gru, lstm"):
        Cell(name="rnn")
    with pytest.raises(ValueError, match="variant: got 'other', need one of evnn, paper"):
        Cell(variant="other")
    with pytest.raises(ValueError, match="surrogate kind: got 'step', need one of triangle"):
        Surrogate(kind="step")
    for name in ("dampening", "support"):
        for value in (0.0, -1.0, np.nan, np.inf):
            with pytest.raises(ValueError, match=f"surrogate {name}: got {value}, need a positive number"):
                Surrogate(**{name: value})


# --- matrices -----------------------------------------------------------------------------------------------


@given(networks())
def test_matrices_round_trip(network):
    names = list(network.matrices())
    assert names[:2] == ["layers.0.w_in", "layers.0.w_rec"]
    assert ("readout" in names) == (network.readout is not None)
    assert len(names) == 2 * len(network.layers) + (network.readout is not None)
    doubled = network.with_matrices({"layers.0.w_rec": Dense(2 * network.layers[0].w_rec.to_dense())})
    for name, weights in doubled.matrices().items():
        factor = 2 if name == "layers.0.w_rec" else 1
        assert np.array_equal(weights.to_dense(), factor * network.matrices()[name].to_dense())
    dense = network.dense()
    assert all(isinstance(weights, Dense) for weights in dense.matrices().values())
    assert all(
        np.array_equal(w.to_dense(), dense.matrices()[name].to_dense()) for name, w in network.matrices().items()
    )


def test_unknown_matrices_are_refused():
    with pytest.raises(ValueError, match=r"matrices: no layers\.7\.w_in; have layers\.0\.w_in, "):
        small().with_matrices({"layers.7.w_in": Dense(zeros(2, 3))})


# --- random networks ----------------------------------------------------------------------------------------


def test_random_network_is_drawn_as_documented():
    rng = np.random.default_rng(1)
    network = Network.random([200], symbols=200, embedding=100, readout=7, threshold=0.3, rng=rng)
    embedding, (only,) = network.embedding, network.layers
    assert embedding is not None
    assert embedding.shape == (200, 100)
    assert -0.1 <= embedding.min() < embedding.max() <= 0.1
    assert abs(embedding.mean()) <= tolerance.sample_mean(embedding.size)
    for weights in (only.w_in.to_dense(), only.w_rec.to_dense()):
        # Xavier: variance 2 / (fan in + fan out); the scaled squares have mean 1 and deviation sqrt(2).
        scaled = weights.astype(np.float64) ** 2 * sum(weights.shape) / 2
        assert abs(scaled.mean() - 1) <= tolerance.sample_mean(scaled.size, deviation=np.sqrt(2))
    assert not only.bias_in.any()
    assert not only.bias_rec.any()
    assert 0 <= only.threshold.min() < only.threshold.max() <= 1
    assert abs(only.threshold.mean() - 0.3) <= tolerance.sample_mean(200)
    assert not Network.random([5], inputs=1, threshold=0, rng=rng).layers[0].threshold.any()


def test_random_networks_follow_their_seed():
    a, b, c = (small(seed) for seed in (1, 1, 2))
    pairs = zip(a.matrices().values(), b.matrices().values(), strict=True)
    assert all(np.array_equal(x.to_dense(), y.to_dense()) for x, y in pairs)
    assert not np.array_equal(a.layers[0].w_in.to_dense(), c.layers[0].w_in.to_dense())


def test_random_tied_network():
    rng = np.random.default_rng(1)
    network = Network.random([6, 4], symbols=9, embedding=4, tied=True, rng=rng)
    assert network.readout is not None
    assert network.readout.tied
    for options in ({"inputs": 4}, {"symbols": 9, "embedding": 5}, {"symbols": 9, "embedding": 4, "readout": 8}):
        with pytest.raises(ValueError, match="tied: needs symbols, an embedding as wide as the last layer"):
            Network.random([6, 4], tied=True, rng=rng, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": [4, 0]}, "units of layer 1: got 0, need a whole number >= 1"),
        ({"units": []}, r"units: got \[\], need at least one layer"),
        ({"units": [2.5]}, r"units of layer 0: got 2\.5, need a whole number >= 1"),
        ({"inputs": -1}, "inputs: got -1, need a whole number >= 1"),
        ({"readout": 0}, "readout: got 0, need a whole number >= 1"),
        ({"inputs": None}, "give either inputs, or symbols together with embedding"),
        ({"symbols": 3, "embedding": 2}, "give either inputs, or symbols together with embedding"),
        ({"inputs": None, "symbols": 3}, "give either inputs, or symbols together with embedding"),
        ({"threshold": 1.0}, r"threshold: got 1\.0, need a mean in \[0, 1\)"),
        ({"threshold": -0.1}, r"threshold: got -0\.1, need a mean in \[0, 1\)"),
    ],
)
def test_random_network_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Network.random(**({"units": [4], "inputs": 2, "rng": np.random.default_rng(0)} | options))


# --- inputs and state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fed", "message"),
    [
        (np.zeros((3, 1)), r"inputs: got float64 \(3, 1\), need numbers \(steps, batch, 2\)"),
        (np.zeros((3, 1, 4)), r"inputs: got float64 \(3, 1, 4\), need numbers \(steps, batch, 2\)"),
        (np.zeros((3, 1, 2), complex), "inputs: got complex128"),
        (np.array([[["a", "b"]]]), "inputs: got <U1"),
        (np.array([[[0, 1.0]], [[0, np.nan]]]), r"inputs: got nan at position \(1, 0, 1\)"),
        (np.array([[[0, 1e300]]]), r"inputs as float32: got inf at position \(0, 0, 1\)"),
        (Events.from_dense(np.zeros((3, 1, 4))), "inputs: got events of 4 units, need 2"),
        (np.zeros((3, 2, 2)), "inputs: got a batch of 2, but the simulator was made for 1"),
    ],
)
def test_inputs_refused(fed, message):
    with pytest.raises(ValueError, match=message):
        Simulator(small()).run(fed)


def test_events_are_checked_before_they_reach_a_kernel():
    stray = Events(np.array([0, 1]), np.array([99], np.int32), np.ones(1, np.float32), (1, 1, 2))
    with pytest.raises(ValueError, match=r"indices: outside 0\.\.1"):
        simulate(small(), stray)


@pytest.mark.parametrize(
    ("fed", "message"),
    [
        (
            np.zeros((3, 1, 2), int),
            r"inputs: got int64 \(3, 1, 2\), need whole numbers \(steps, batch\), the symbols",
        ),
        (np.zeros((3, 1)), r"inputs: got float64 \(3, 1\), need whole numbers"),
        (np.array([[0], [6]]), r"inputs: got symbol 6 at \(1, 0\); need 0\.\.5"),
        (np.array([[0, -1]]), r"inputs: got symbol -1 at \(0, 1\); need 0\.\.5"),
        (Events.from_dense(np.zeros((3, 1, 4))), r"got Events, but the network reads symbols; give whole numbers"),
    ],
)
def test_symbols_refused(fed, message):
    with pytest.raises(ValueError, match=message):
        simulate(small(inputs=None, symbols=6, embedding=2), fed)


@given(networks(), st.data())
def test_prepared_inputs_are_the_input(network, data):
    fed = data.draw(inputs(network, st.integers(1, 6), st.integers(1, 3)))
    engine = get_backend("cpu").engine(network)
    prepared = engine.prepare(fed)
    if network.embedding is not None:
        dense = network.embedding[fed]
    else:
        dense = fed.to_dense() if isinstance(fed, Events) else fed
    assert np.array_equal(prepared.to_events().to_dense(), dense)
    counts = prepared.fire_counts()
    assert np.array_equal(counts.total, np.count_nonzero(dense, axis=(0, 1)))
    assert np.array_equal(counts.binary, np.count_nonzero(np.abs(dense) == 1, axis=(0, 1)))
    later = prepared.chunk(1, prepared.steps)
    assert np.array_equal(later.to_events().to_dense(), dense[1:])
    for name in ("reference", "blas"):
        assert np.array_equal(get_backend(name).engine(network).prepare(fed).to_dense(), dense)


def test_fire_counts_add():
    a, b = FireCounts(np.array([1, 2]), np.array([0, 5])), FireCounts(np.array([3, 0]), np.array([1, 1]))
    assert (a + b).graded.tolist() == [4, 2]
    assert (a + b).total.tolist() == [5, 8]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (State((zeros(1, 4),), (zeros(1, 4),)), "state: got 1 layers, the network has 2"),
        (State((zeros(2, 4), zeros(2, 3)), (zeros(2, 4), zeros(2, 3))), r"cells of layer 0: got float32 \(2, 4\)"),
        (State((zeros(1, 4), zeros(1, 3)), (zeros(1, 4), zeros(1, 4))), r"outputs of layer 1: .* need float \(1, 3\)"),
        (State((zeros(1, 4), np.zeros((1, 3), int)), (zeros(1, 4), zeros(1, 3))), "cells of layer 1: got int64"),
        (State((zeros(1, 4) + np.nan, zeros(1, 3)), (zeros(1, 4), zeros(1, 3))), "cells of layer 0: got nan at"),
        (State((np.full((1, 4), 1e300), zeros(1, 3)), (zeros(1, 4), zeros(1, 3))), "cells of layer 0.*: got "),
    ],
)
def test_state_refused(state, message):
    with pytest.raises(ValueError, match=message):
        simulate(small(), zeros(1, 1, 2), state=state)


# --- running ------------------------------------------------------------------------------------------------


def test_simulator_refuses():
    network = small()
    for options, message in [
        ({"batch": 0}, "batch: got 0, need a whole number >= 1"),
        ({"threads": 0}, "threads: got 0, need a whole number >= 1"),
        ({"threads": 1.5}, r"threads: got 1\.5, need a whole number >= 1"),
        ({"carry": "nothing"}, "carry: got 'nothing', need one of state, events"),
        ({"carry": "events"}, "window: got None with carry='events'"),
        ({"window": 5}, "window: got 5 with carry='state'"),
        ({"carry": "events", "window": 0}, "window: got 0, need a whole number >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Simulator(network, **options)
    with pytest.raises(ValueError, match=r"record: got \['spikes'\], need any of events, states"):
        Simulator(network).run(zeros(1, 1, 2), record="spikes")
    with pytest.raises(ValueError, match="step: carry='events' zeroes the cells at every call"):
        Simulator(network, carry="events", window=3).step(zeros(1, 2))


def test_state_is_kept_and_reset():
    x = np.random.default_rng(3).standard_normal((6, 2, 2)).astype(np.float32)
    simulator = Simulator(lively(), batch=2)
    first = simulator.run(x)
    second = simulator.run(x)
    assert not np.array_equal(first.output, second.output)
    simulator.reset()
    assert np.array_equal(simulator.run(x).output, first.output)
    assert np.array_equal(simulate(simulator.network, x, state=first.state).output, second.output)


@pytest.mark.parametrize("backend", ["reference", "cpu", "blas"])
@pytest.mark.parametrize("options", [{}, {"carry": "events", "window": 3}])
def test_a_run_that_fails_leaves_the_state_as_it_was(backend, options, monkeypatch):
    monkeypatch.setattr("eventrnn.simulation.RECORD_BYTES", 500)
    network, x = lively(), np.random.default_rng(0).standard_normal((8, 3, 2)).astype(np.float32)
    simulator = Simulator(network, batch=3, backend=backend, **options)
    simulator.run(x)
    before, run, parts = simulator.state, simulator.engine.run, []

    def interrupted(*arguments, **keywords):
        parts.append(run(*arguments, **keywords))
        if len(parts) == 2:
            raise KeyboardInterrupt
        return parts[-1]

    monkeypatch.setattr(simulator.engine, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        simulator.run(x, record="events")
    for name in ("cells", "outputs"):
        assert all(map(np.array_equal, getattr(simulator.state, name), getattr(before, name)))


@pytest.mark.parametrize("symbols", [False, True])
def test_a_step_that_is_interrupted_leaves_the_state_as_it_was(symbols, monkeypatch):
    network = lively(inputs=None, symbols=4, embedding=2) if symbols else lively()
    x = np.array([[1, 2, 3], [3, 0, 1]]) if symbols else np.ones((2, 3, 2), np.float32)
    simulator = Simulator(network, batch=3)
    for each in x:
        simulator.step(each)
    stepper, before = simulator._stepper, simulator._stepper.state()
    kernel = stepper.kernel

    def interrupted(*arguments):
        kernel(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(stepper, "kernel", interrupted)
    # An invalid input, then a valid one: in both cases the interrupted kernel has already run.
    for fed in (np.full_like(x[0], 9 if symbols else np.nan), x[0]):
        with pytest.raises(KeyboardInterrupt):
            simulator.step(fed)
        for name in ("cells", "outputs"):
            assert all(map(np.array_equal, getattr(stepper.state(), name), getattr(before, name)))


def test_a_given_state_is_copied():
    network = small()
    state = State.zeros(network, 1)
    simulator = Simulator(network, state=state)
    state.cells[0][...] = 5
    assert not simulator.state.cells[0].any()
    assert state.copy().cells[0] is not state.cells[0]
    assert state.batch == 1


@given(event_trains(2, st.integers(1, 8), st.integers(1, 3)))
def test_simulation_reports_activity_and_counts(events):
    network = lively()
    result = simulate(network, events, record={"events", "states"})
    steps, batch, _ = events.shape
    assert (result.steps, result.batch) == (steps, batch)
    assert result.output.shape == (steps, batch, 5)
    assert result.output.dtype == np.float32
    assert result.inputs is not None
    assert np.array_equal(result.inputs.to_dense(), events.to_dense())
    assert np.array_equal(result.input_fired.total, np.count_nonzero(events.to_dense(), axis=(0, 1)))
    for k, units in enumerate((4, 3)):
        sent = result.events[k].to_dense()
        result.events[k].check()
        assert sent.shape == result.states[k].shape == (steps, batch, units)
        assert np.array_equal(result.fired[k].total, np.count_nonzero(sent, axis=(0, 1)))
        assert result.activity[k] == np.count_nonzero(sent) / sent.size
        # An output exceeds the threshold, and the cell keeps the output minus the threshold.
        threshold = network.layers[k].threshold
        assert (sent[sent != 0] > np.broadcast_to(threshold, sent.shape)[sent != 0]).all()
        assert np.array_equal(result.states[k][sent != 0], (sent - threshold)[sent != 0])
        assert np.array_equal(result.state.outputs[k], sent[-1])
        assert np.array_equal(result.state.cells[k], result.states[k][-1])
    unrecorded = simulate(network, events)
    assert unrecorded.inputs is None
    assert unrecorded.events == unrecorded.states == ()
    assert unrecorded.activity == result.activity


def test_without_a_readout_the_output_is_the_last_layers_events():
    x = np.random.default_rng(3).standard_normal((9, 2, 2)).astype(np.float32)
    result = simulate(lively(readout=None), x, record="events")
    assert result.output.shape == (9, 2, 3)
    assert np.array_equal(result.output, result.events[-1].to_dense())
    assert result.output.any()


def test_a_window_starts_anew_at_every_run():
    x = np.random.default_rng(3).standard_normal((6, 1, 2)).astype(np.float32)
    network = lively()
    simulator = Simulator(network, carry="events", window=4)
    parts = [simulator.run(x[:3]), simulator.run(x[3:])]
    by_three = simulate(network, x, carry="events", window=3)
    assert np.array_equal(np.concatenate([p.output for p in parts]), by_three.output)
    assert not np.array_equal(by_three.output, simulate(network, x).output)


def test_integer_and_bool_inputs_are_numbers():
    x = np.random.default_rng(3).integers(0, 2, (6, 2, 2))
    expected = simulate(lively(), x.astype(np.float32)).output
    assert expected.any()
    for dtype in (np.int8, np.uint16, np.float16, bool):
        assert np.array_equal(simulate(lively(), x.astype(dtype)).output, expected)


# --- read-outs that overflow --------------------------------------------------------------------------------


def overflowing(at: float) -> Network:
    """A network whose read-out overflows where the outputs of its units sum to more than `at`."""
    network = lively()
    weights = np.full(network.readout.weights.shape, float(np.finfo(np.float32).max) / at, np.float32)
    return replace(network, readout=Readout(Dense(weights), zeros(5)))


@pytest.mark.parametrize(("backend", "threads"), [("cpu", 1), ("cpu", 2), ("reference", 1), ("blas", 1)])
@pytest.mark.filterwarnings("ignore:overflow")
def test_a_readout_that_overflows_is_refused_and_the_state_stays(backend, threads):
    network = overflowing(2.0)
    start = State((zeros(1, 4), zeros(1, 3) + 50), (zeros(1, 4), zeros(1, 3) + 50))
    simulator = Simulator(network, backend=backend, threads=threads, state=start)
    for call in (lambda: simulator.run(zeros(2, 1, 2)), lambda: simulator.step(zeros(1, 2))):
        with pytest.raises(FloatingPointError, match="output: got inf at step 0, sample 0, output 0; check the scale"):
            call()
        assert all(np.array_equal(a, b) for a, b in zip(simulator.state.cells, start.cells, strict=True))
    simulator.reset()
    assert np.isfinite(simulator.run(zeros(2, 1, 2)).output).all()


@pytest.mark.parametrize("variant", ["evnn", "paper"])
@given(inputs=st.lists(st.floats(-30, 30, width=32), min_size=8, max_size=8), start=st.floats(0, 9, width=32))
def test_outputs_stay_within_the_bound_for_which_a_readout_is_not_watched(variant, inputs, start):
    network = replace(lively(cell=Cell(variant=variant)), readout=None)
    state = State((zeros(1, 4) - np.float32(start), zeros(1, 3) + np.float32(start)), (zeros(1, 4), zeros(1, 3) + 1))
    run = simulate(network, np.array(inputs, np.float32).reshape(4, 1, 2), state=state, backend="reference")
    assert np.abs(run.output).max() <= 2 * max(1, start)
    readout = Readout(Dense(np.full((3, 5), 1e38, np.float32)), zeros(5))
    assert 3 * 1e38 * readout.safe_magnitude() <= float(np.finfo(np.float32).max)


@pytest.mark.parametrize("dense", [False, True])
def test_few_symbols_convert_the_rows_of_the_embedding_that_they_use(dense):
    """Short runs convert few rows, until together they have converted as many as there are; the input is the same."""
    network = Network.random([4], symbols=50, embedding=3, rng=np.random.default_rng(0))
    inputs, whole = HostInputs(network, dense=dense), HostInputs(network, dense=dense, whole=True)
    converted = []
    for seed in range(20):
        symbols = np.random.default_rng(seed).integers(0, 50, (2, 3))
        few, every = inputs.prepare(symbols), whole.prepare(symbols)
        converted.append(few.event_table.shape[0])
        assert every.event_table.shape[0] == 50 and np.array_equal(every.values, symbols)
        assert np.array_equal(few.to_dense(), every.to_dense())
    assert converted[0] <= 6 and converted[-1] == 50 and sorted(converted, key=lambda rows: rows == 50) == converted
