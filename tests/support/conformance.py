"""Cases and comparisons of the conformance suite, and its checks that the planted faults run as well.

A check is the body of a test. It raises `AssertionError` where a backend differs from the specification.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import event
from hypothesis import strategies as st

from eventrnn.backend import BACKENDS, get_backend
from eventrnn.cells import Cell
from eventrnn.events import Events
from eventrnn.network import Layer, Network, Readout
from eventrnn.simulation import RECORDABLE, Simulation, Simulator, simulate
from eventrnn.state import State
from eventrnn.testing import ALL_CELLS, inputs, networks, states
from eventrnn.weights import convert

EXACT = [name for name in BACKENDS if get_backend(name).exact]


def each(names) -> list:
    """Names of backends as parameters of a test. The CUDA backend carries the mark `gpu`."""
    return [pytest.param(name, marks=pytest.mark.gpu) if name == "cuda" else name for name in names]


@dataclass(frozen=True)
class Case:
    network: Network
    inputs: np.ndarray | Events
    state: State

    @property
    def batch(self) -> int:
        return self.state.batch

    def simulator(self, backend="cpu", *, network: Network | None = None, **options) -> Simulator:
        return Simulator(network or self.network, batch=self.batch, backend=backend, state=self.state, **options)


@st.composite
def cases(draw, *, max_batch=5, max_steps=8, **options) -> Case:
    """A network, its inputs and its initial state. `options` are those of `networks`."""
    network, batch = draw(networks(**options)), draw(st.integers(1, max_batch))
    return Case(network, draw(inputs(network, st.integers(1, max_steps), batch)), draw(states(network, batch)))


@st.composite
def carries(draw) -> dict:
    if draw(st.booleans()):
        return {"carry": "state"}
    return {"carry": "events", "window": draw(st.integers(1, 5))}


def fitting(carry: dict, network: Network) -> dict:
    """The drawn `carry`, or that of the state for a network with cells that have no events to carry alone."""
    return carry if all(layer.cell.thresholded for layer in network.layers) else {"carry": "state"}


records = st.sets(st.sampled_from(RECORDABLE))


def bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.int32 if array.dtype == np.float32 else array.dtype)


def same_bits(a, b) -> bool:
    return a.dtype == b.dtype and np.array_equal(bits(a), bits(b))


def same_events(a: Events, b: Events) -> bool:
    arrays = ((a.indptr, b.indptr), (a.indices, b.indices), (a.values, b.values))
    return a.shape == b.shape and all(same_bits(x, y) for x, y in arrays)


def assert_same(a: Simulation, b: Simulation, record=RECORDABLE) -> None:
    """Demand that two runs returned equal results. Events, cells and states must have equal bits."""
    if "events" in record:
        assert a.inputs is not None
        assert b.inputs is not None
        assert all(same_events(x, y) for x, y in zip((a.inputs, *a.events), (b.inputs, *b.events), strict=True))
    if "states" in record:
        assert all(same_bits(x, y) for x, y in zip(a.states, b.states, strict=True))
    assert a.output.dtype == b.output.dtype
    assert np.array_equal(a.output, b.output)
    for x, y in zip((a.input_fired, *a.fired), (b.input_fired, *b.fired), strict=True):
        assert np.array_equal(x.graded, y.graded)
        assert np.array_equal(x.binary, y.binary)
    assert_same_state(a.state, b.state)


def assert_same_state(a: State, b: State) -> None:
    for name in ("cells", "outputs"):
        assert all(same_bits(x, y) for x, y in zip(getattr(a, name), getattr(b, name), strict=True)), name
    assert a.gates.keys() == b.gates.keys()
    for name, held in a.gates.items():
        assert same_bits(held.left, b.gates[name].left), name
        assert same_bits(held.gates, b.gates[name].gates), name


@contextmanager
def unmodified(case: Case):
    """Demand that no array of a case changes within the context."""

    def arrays() -> list[np.ndarray]:
        network = case.network
        found = [array for matrix in network.matrices().values() for array in matrix.arrays().values()]
        for layer in network.layers:
            found += [layer.bias_in, layer.bias_rec, layer.threshold]
        found += [] if network.embedding is None else [network.embedding]
        found += [] if network.readout is None else [network.readout.bias]
        fed = case.inputs
        found += [fed.indptr, fed.indices, fed.values] if isinstance(fed, Events) else [fed]
        return [*found, *case.state.arrays()]

    before = copy.deepcopy(arrays())
    yield
    assert all(x.tobytes() == y.tobytes() for x, y in zip(before, arrays(), strict=True))


def steps_of(fed: np.ndarray | Events) -> int:
    return fed.shape[0]


def part(fed: np.ndarray | Events, steps: slice = slice(None), batch: slice = slice(None)) -> np.ndarray | Events:
    """Some steps and samples of an input, as an array or as events like the input."""
    if isinstance(fed, Events):
        return Events.from_dense(fed.to_dense()[steps, batch])
    return fed[steps, batch]


def large_network(cell: Cell, units: int, inputs: int, seed: int) -> Network:
    rng = np.random.default_rng(seed)

    def pruned(n_pre, n_post):
        kept = rng.random((-(-n_pre // 16), -(-n_post // 64))) < 0.4
        values = rng.standard_normal((n_pre, n_post)) * 2 / np.sqrt(n_pre)
        return convert((values * np.kron(kept, np.ones((16, 64)))[:n_pre, :n_post]).astype(np.float32), "dense")

    rows = cell.gates * units
    biases = (rng.standard_normal((2, rows)) / 4).astype(np.float32)
    bias_out = rng.standard_normal(131).astype(np.float32)
    threshold = rng.uniform(0.05, 0.5, units).astype(np.float32) * np.float32(cell.thresholded)
    layer = Layer(pruned(inputs, rows), pruned(units, rows), *biases, threshold, cell)
    return Network((layer,), None, Readout(pruned(units, 131), bias_out))


def in_format(network: Network, name: str, block: tuple[int, int] | None = None, **options) -> Network:
    matrices = network.matrices().items()
    return network.with_matrices({key: convert(w, name, block=block, **options) for key, w in matrices})


def check_formats(backend, cell, formats, data, threads, record, carry) -> None:
    """A network in the given formats has the bits of the same network, dense, on the reference backend."""
    case = data.draw(cases(formats=formats, cells=[cell]))
    carry = fitting(carry, case.network)
    specification = case.simulator("reference", network=case.network.dense(), **carry)
    tested = case.simulator(backend, threads=1 if backend == "cuda" else threads, **carry)
    # The comparison means something only if the two sides are two implementations.
    assert type(specification.engine) is not type(tested.engine)
    with unmodified(case):
        expected = specification.run(case.inputs, record=RECORDABLE)
        got = tested.run(case.inputs, record=record)
    event(f"active: {0 < np.mean(expected.activity) < 1}")
    assert_same(expected, got, record)
    assert bool(got.events) == ("events" in record)
    assert bool(got.states) == ("states" in record)


def check_chunks(backend, data, threads) -> None:
    """A run in several calls of any lengths, and one in single steps, have the bits of one run."""
    fast = backend in ("cpu", "cuda")
    size = {"max_units": 60, "max_steps": 150} if fast else {"max_units": 10}
    case = data.draw(cases(cells=ALL_CELLS, **size))
    threads = threads if backend == "cpu" else 1
    steps = steps_of(case.inputs)
    cuts = sorted(data.draw(st.lists(st.integers(0, steps), max_size=5)))
    whole = case.simulator(backend).run(case.inputs, record=RECORDABLE)

    chunked = case.simulator(backend, threads=threads)
    parts = [
        chunked.run(part(case.inputs, slice(a, b)), record=RECORDABLE)
        for a, b in zip([0, *cuts], [*cuts, steps], strict=True)
    ]
    assert np.array_equal(whole.output, np.concatenate([p.output for p in parts]))
    for k in range(len(case.network.layers)):
        assert same_events(whole.events[k], Events.concatenate([p.events[k] for p in parts]))
        assert same_bits(whole.states[k], np.concatenate([p.states[k] for p in parts]))
        assert np.array_equal(whole.fired[k].total, sum(p.fired[k].total for p in parts))
    assert_same_state(whole.state, chunked.state)

    stepped = case.simulator(backend, threads=threads)
    dense = case.inputs.to_dense() if isinstance(case.inputs, Events) else case.inputs
    for t in range(steps):
        assert np.array_equal(stepped.step(dense[t]), whole.output[t])
    assert_same_state(whole.state, stepped.state)


def check_threads_do_not_race(backend) -> None:
    """Two and three threads have the bits of one.

    Windows of gate rows start off the vector grid. Many steps are run, because a race shows only now and then.
    """
    for units, cell in ((20, Cell(variant="paper")), (23, Cell("gru", "before")), (44, Cell("lstm"))):
        case = large_network(cell, units, 40, seed=units)
        x = np.random.default_rng(units).standard_normal((600, 1, 40)).astype(np.float32)
        for network in (case, in_format(case, "block", (1, 16)), in_format(case, "csr")):
            expected = simulate(network, x, backend=backend).output
            for threads in (2, 3, 2, 3):
                assert np.array_equal(expected, simulate(network, x, backend=backend, threads=threads).output)
