"""Memory of pruned networks and of long inputs, as multiples of their own bytes; peaks of what NumPy allocates."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from eventrnn.cpu.packing import PoolBuilder, Segment, pack
from eventrnn.events import Events
from eventrnn.io import load, save
from eventrnn.network import Layer, Network
from eventrnn.simulation import simulate
from eventrnn.state import FireCounts
from eventrnn.weights import CSR, STORAGES, BlockCSR, Dense, Weights, convert

UNITS, FAN_OUT = 1500, 32


def peak(call: Callable[[], object]) -> int:
    """Bytes that were allocated at once during a call, its result included."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def few_weights(block: int | None, storage: str) -> Weights:
    """A recurrent matrix that stores a hundredth of its entries or less."""
    rng, width = np.random.default_rng(0), block or 1
    columns = np.sort(rng.integers(0, 3 * UNITS // width, (UNITS, FAN_OUT // width)), axis=1)
    kept = np.concatenate([np.ones((UNITS, 1), bool), np.diff(columns, axis=1) > 0], axis=1)
    indptr = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int64)
    indices, shape = columns[kept].astype(np.int32), (UNITS, 3 * UNITS)
    values = rng.standard_normal(len(indices) * width).astype(np.float32)
    made = (
        CSR(indptr, indices, values, shape) if block is None else BlockCSR(indptr, indices, values, shape, (1, width))
    )
    return made.stored_as(storage)


def network(weights: Weights) -> Network:
    zeros, inputs = np.zeros(3 * UNITS, np.float32), Dense(np.ones((1, 3 * UNITS), np.float32))
    return Network((Layer(inputs, weights, zeros, zeros, np.ones(UNITS, np.float32)),))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("block", [None, 8, 4, 5])
def test_pruned_network_takes_a_small_multiple_of_its_weights(block, storage, tmp_path):
    weights = few_weights(block, storage)
    made, file = network(weights), tmp_path / "network.safetensors"

    def packed():
        builder = PoolBuilder.empty()
        pack(builder, weights, [Segment(0, 3 * UNITS, 0)])
        builder.freeze()

    # Other arrays of the network: an input matrix of one row, biases and thresholds, and what a call needs at all.
    others = 20 * 4 * 3 * UNITS
    dense = 4 * UNITS * 3 * UNITS
    for call in (lambda: network(weights), packed, lambda: save(made, file), lambda: load(file), weights.fan_out):
        taken = peak(call)
        assert taken <= 8 * weights.nbytes + others
        assert taken < dense / 10
    read = load(file).layers[0].w_rec
    assert all(np.array_equal(array, read.arrays()[name]) for name, array in weights.arrays().items())


@pytest.mark.parametrize("storage", ["float32", "int8"])
@pytest.mark.parametrize("block", [None, 8, 5])
def test_conversion_between_sparse_formats_makes_no_dense_matrix(block, storage):
    weights = few_weights(block, storage)
    for to, options in (("csr", {}), ("block", {"block": (1, 4)}), ("block", {"block": (2, 7)})):
        by_dense = convert(weights.to_dense(), to, **options)
        by_stored = convert(weights, to, storage="float32", **options)
        assert {name: array.tobytes() for name, array in by_dense.arrays().items()} == {
            name: array.tobytes() for name, array in by_stored.arrays().items()
        }
        assert peak(lambda to=to, options=options: convert(weights, to, **options)) < 4 * UNITS * 3 * UNITS


STEPS, INPUTS = 20_000, 64


def listener() -> Network:
    return Network.random([16], inputs=INPUTS, readout=2, rng=np.random.default_rng(1), threshold=0.3)


@pytest.fixture(scope="module")
def signal() -> np.ndarray:
    """(STEPS, 1, INPUTS) float32 without zeros."""
    return np.random.default_rng(2).standard_normal((STEPS, 1, INPUTS), dtype=np.float32)


@pytest.mark.parametrize("kind", ["float32", "float64", "fortran", "read-only", "events", "few events"])
def test_long_input_takes_at_most_twice_its_size(signal, kind):
    few = np.where(np.random.default_rng(3).random(signal.shape) < 0.02, signal, np.float32(0))
    given = {
        "float32": lambda: signal,
        "float64": lambda: signal.astype(np.float64),
        "fortran": lambda: np.asfortranarray(signal),
        "read-only": lambda: np.frombuffer(signal.tobytes(), np.float32).reshape(signal.shape),
        "events": lambda: Events.from_dense(signal),
        "few events": lambda: Events.from_dense(few),
    }[kind]()
    arrays = (given.indptr, given.indices, given.values) if isinstance(given, Events) else (given,)
    net, size, output = listener(), sum(array.nbytes for array in arrays), 4 * 2 * STEPS
    simulate(net, signal[:2])
    # A chunk of time with its events and drives, whatever the length of the input.
    chunk = 6 << 20
    assert peak(lambda: simulate(net, given)) <= 2 * size + output + chunk


def test_events_of_a_long_array_take_little_more_than_themselves(signal):
    events = Events.from_dense(signal)
    size = events.indptr.nbytes + events.indices.nbytes + events.values.nbytes
    assert peak(lambda: Events.from_dense(signal)) <= size + (8 << 20)
    assert np.array_equal(events.to_dense(), signal)


@pytest.mark.parametrize("part", [1, 100, 1 << 18])
def test_parts_of_an_array_give_what_the_whole_gives(part, monkeypatch):
    rng = np.random.default_rng(4)
    dense = (rng.standard_normal((9, 3, 7)) * (rng.random((9, 3, 7)) < 0.5)).astype(np.float32).round()
    flat = dense.reshape(-1, 7)
    rows, columns = np.nonzero(flat)
    monkeypatch.setattr("eventrnn._checks.PART", part)
    events = Events.from_dense(dense)
    assert np.array_equal(events.rows(), rows) and np.array_equal(events.indices, columns)
    assert np.array_equal(events.values, flat[rows, columns])
    one = (np.abs(dense) == 1).sum(axis=(0, 1))
    for counts in (FireCounts.of(dense), FireCounts.of_events(events.indices, events.values, 7)):
        assert np.array_equal(counts.binary, one)
        assert np.array_equal(counts.total, (dense != 0).sum(axis=(0, 1)))
    dense[5, 1, 3] = np.nan
    with pytest.raises(ValueError, match=r"inputs: got nan at position \(5, 1, 3\)"):
        simulate(Network.random([4], inputs=7, rng=rng), dense)
