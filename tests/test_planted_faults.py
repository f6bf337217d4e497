"""Faults planted in the library's own code, each of which the suite must catch.

A fault is an edit of the code (`support/planting.py`). If the code changes so that an edit no longer fits, a test here
fails. Each fault must be found twice: by `assert_equivalent`, which must name the first divergence, and by a check of
the suite.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eventrnn import cells, reference, reference_products
from eventrnn.cells import Cell
from eventrnn.cpu import packing
from eventrnn.events import Events
from eventrnn.network import Layer, Network
from eventrnn.simulation import Simulator, simulate
from eventrnn.testing import Divergence, assert_equivalent
from eventrnn.weights import BlockCSR, Dense, convert
from support import tolerance
from support.conformance import check_chunks, check_formats, check_threads_do_not_race
from support.gated import check_gated, gated
from support.kernel_faults import KERNEL_FAULTS
from support.layouts import FORCED, check_layout, forced
from support.planting import faulty_kernels, marked_faults, plant, suite_catches
from support.recorded_runs import FILES, check_outputs
from support.silence import check_silence
from support.worked_steps import (
    check_equality_and_leak,
    check_gru_step,
    check_lstm_step,
    check_paper_step,
    check_plain_gru,
    check_released_step,
)

UNITS, INPUTS, BATCH, STEPS = 10, 6, 3, 12
RECORD = ("events", "states")


def network(
    variant: str = "evnn", fmt: str = "dense", layers: int = 1, *, units: int = UNITS, share: float = 1.0, **options
) -> Network:
    """A network in which a share of the weights is non-zero. `options` are those of `convert`.

    By default every weight is non-zero, so that every event reaches every unit.
    """
    rng = np.random.default_rng(2)

    def matrix(n_pre):
        values = rng.uniform(0.3, 1, (n_pre, 3 * units)) * rng.choice([-1, 1], (n_pre, 3 * units))
        if share < 1:
            values *= rng.random(values.shape) < share
        return convert((2 * values / np.sqrt(n_pre)).astype(np.float32), fmt, **options)

    def layer(n_pre):
        biases = (rng.standard_normal((2, 3 * units)) / 4).astype(np.float32)
        biases[0, 2 * units :] += np.float32(0.5)
        threshold = rng.uniform(0.1, 0.3, units).astype(np.float32)
        return Layer(matrix(n_pre), matrix(units), *biases, threshold, Cell(variant=variant))

    return Network((layer(INPUTS), *(layer(units) for _ in range(layers - 1))))


def signal() -> np.ndarray:
    rng = np.random.default_rng(3)
    return (rng.standard_normal((STEPS, BATCH, INPUTS)) * (rng.random((STEPS, BATCH, INPUTS)) < 0.5)).astype(np.float32)


def divergence(a, b, *, x=None, net: Network | None = None, **options) -> Divergence:
    """The first difference of two backends, as `assert_equivalent` reports it."""
    net, x = net or network(), signal() if x is None else x
    with pytest.raises(Divergence) as caught:
        assert_equivalent(Simulator(net, batch=BATCH, backend=a, **options), Simulator(net, batch=BATCH, backend=b), x)
    return caught.value


def place(found: Divergence) -> tuple[int, int, int, int]:
    return found.step, found.layer, found.sample, found.unit


def first_event(net: Network, layer: int = 0) -> tuple[int, int, int]:
    """Step, sample and unit of the first event of a healthy run."""
    sent = simulate(net, signal(), record="events").events[layer].to_dense()
    step, sample, unit = np.argwhere(sent)[0]
    return int(step), int(sample), int(unit)


def test_cases_without_faults_are_equivalent():
    for net in (network(), network("paper"), network(fmt="block", block=(4, 7)), network(layers=2)):
        a, b = (Simulator(net, batch=BATCH, backend=name) for name in ("reference", "cpu"))
        assert assert_equivalent(a, b, signal()) == STEPS * BATCH * UNITS * len(net.layers)
        assert all(0 < activity < 1 for activity in simulate(net, signal()).activity)


# --- the last event of a step is dropped --------------------------------------------------------------------


class DroppingEngine:
    """An engine that loses the last event of one row of the input."""

    dense = False

    def __init__(self, engine, row: int):
        self.engine, self.row = engine, row

    def prepare(self, inputs):
        return self.engine.prepare(inputs)

    def run(self, inputs, state, **record):
        events = inputs.to_events()
        last = int(events.indptr[self.row + 1]) - 1
        indptr = events.indptr - (np.arange(len(events.indptr)) > self.row)
        rest = [np.delete(array, last) for array in (events.indices, events.values)]
        table = Events(indptr, *rest, events.shape)
        cut = replace(inputs, table=table, values=None if inputs.values is None else table.to_dense())
        return self.engine.run(cut, state, **record)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_dropped_input_event_is_caught(name):
    step, sample = 5, 1
    x = signal()
    assert np.count_nonzero(x[step, sample]) > 1
    healthy, faulty = Simulator(network(), batch=BATCH, backend="cpu"), Simulator(network(), batch=BATCH, backend=name)
    faulty.engine = DroppingEngine(faulty.engine, step * BATCH + sample)
    with pytest.raises(Divergence) as caught:
        assert_equivalent(healthy, faulty, x)
    # The same input without that event must have its first difference at the same place.
    without = x.copy()
    without[step, sample, np.flatnonzero(x[step, sample])[-1]] = 0
    runs = [simulate(network(), fed, record=RECORD) for fed in (x, without)]
    assert place(caught.value) == first_difference(*runs)
    assert place(caught.value)[:3] == (step, 0, sample)


def first_difference(a, b) -> tuple[int, int, int, int]:
    """The first difference of two runs by brute force, without the code under test."""
    for t in range(a.steps):
        for k in range(len(a.states)):
            x, y = a.events[k].to_dense()[t], b.events[k].to_dense()[t]
            for sample in range(a.batch):
                for unit in range(x.shape[1]):
                    if (
                        x[sample, unit] != y[sample, unit]
                        or a.states[k][t, sample, unit] != b.states[k][t, sample, unit]
                    ):
                        return t, k, sample, unit
    raise AssertionError("the runs are equal")


def test_dropped_last_event_in_the_specification(monkeypatch):
    term = "cells.fma(weights[j][None, :], values[:, j, None], drive)"
    dropping = {term: f"{term} if j < max(np.flatnonzero(values.any(axis=0)), default=-1) else drive"}
    plant(monkeypatch, reference_products, "propagate", dropping)
    found = divergence("cpu", "reference")
    # At least one unit sends an event in the first step.
    assert place(found)[:3] == (0, 0, int(np.argmax(signal()[0].any(axis=1))))
    suite_catches(check_formats, backend="cpu", cell=Cell(), formats=("csr",))


def test_dropped_last_event_in_the_kernel():
    with faulty_kernels("last event dropped") as faulty:
        # The layer itself is right in that step. The layer above receives too few events in the same step ...
        step, sample, _ = first_event(network(layers=2))
        found = divergence("reference", faulty, net=network(layers=2))
        assert (found.step, found.layer, found.sample) == (step, 1, sample)
        # ... or, without a layer above, the layer itself in the next step.
        step, sample, _ = first_event(network())
        found = divergence("reference", faulty)
        assert (found.step, found.layer, found.sample) == (step + 1, 0, sample)
        # The list of events is that of every format.
        suite_catches(check_formats, backend=faulty, cell=Cell(variant="paper"), formats=("csr",))


# --- a block's padding is read ------------------------------------------------------------------------------


def with_garbage_in_padding(matrix: BlockCSR) -> BlockCSR:
    """A copy of the matrix with non-zero padding, which a faulty file could hold. Kernels must never read it."""
    (r, c), (n_pre, n_post) = matrix.block, matrix.shape
    blocks = matrix.blocks()
    row = np.repeat(np.arange(len(matrix.indptr) - 1), np.diff(matrix.indptr))
    outside_rows = (row[:, None] * r + np.arange(r) >= n_pre)[:, :, None]
    outside_columns = (matrix.indices[:, None] * c + np.arange(c) >= n_post)[:, None, :]
    blocks[outside_rows | outside_columns] = 7
    parts = [blocks[a:b].transpose(1, 0, 2).ravel() for a, b in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)]
    garbage = replace(matrix, values=np.concatenate(parts))
    assert (garbage.values == 7).any()
    assert np.array_equal(garbage.to_dense(), matrix.to_dense())
    return garbage


@pytest.fixture(params=[(4, 7), (3, 16), (4, 1)], ids=str)
def padded(request) -> Network:
    """A network whose recurrent blocks have non-zero padding. It is set behind the check that refuses it."""
    net = network(fmt="block", block=request.param)
    net = net.with_matrices({"layers.0.w_in": Dense(net.layers[0].w_in.to_dense())})
    layer = net.layers[0]
    with pytest.raises(ValueError, match="non-zero padding"):
        with_garbage_in_padding(layer.w_rec).check(full=True)
    object.__setattr__(layer, "w_rec", with_garbage_in_padding(layer.w_rec))
    return net


def test_padding_is_never_read(padded):
    for threads in (1, 2, 3):
        a = Simulator(padded, batch=BATCH, backend="cpu", threads=threads)
        assert assert_equivalent(a, Simulator(padded, batch=BATCH, backend="reference"), signal()) > 0


def test_read_padding_rows_is_caught(monkeypatch, padded):
    # The last unit takes the next row, which is the first row of the padding.
    last = "(unit == weights.shape[0] - 1)"
    taken = f"np.minimum(np.arange(len(unit)) + {last} * {last}.sum(), len(weights.values) // width - 1)"
    reading = {"weights.values[: exist * c].reshape(-1, width)": f"weights.values.reshape(-1, width)[{taken}]"}
    plant(monkeypatch, packing._Entries, "of_blocks", reading)
    found = divergence("reference", "cpu", net=padded)
    # The difference shows one step after the first event of the last unit.
    sent = simulate(padded, signal(), backend="reference", record="events").events[0].to_dense()
    step, sample = np.argwhere(sent[:, :, UNITS - 1])[0]
    assert (found.step, found.layer, found.sample) == (step + 1, 0, sample)
    suite_catches(check_formats, backend="cpu", cell=Cell(), formats=("block",))


def test_read_padding_columns_is_caught(monkeypatch, padded):
    # The padded matrix is cut at the wrong end.
    reading = {"padded.reshape(ANY)[:n_pre, :n_post]": "padded.reshape(len(padded), -1)[-n_pre:, -n_post:]"}
    plant(monkeypatch, BlockCSR, "_spread_out", reading)
    found = divergence("cpu", "reference", net=padded)
    step, sample, _ = first_event(padded)
    assert place(found)[:3] == (step + 1, 0, sample)
    # A network with a tied read-out may raise ValueError, because its read-out no longer equals the embedding.
    suite_catches(check_formats, by=(AssertionError, ValueError), backend="cpu", cell=Cell(), formats=("block",))


# --- two gates are swapped ----------------------------------------------------------------------------------


def test_swapped_gates_in_the_specification(monkeypatch):
    plant(monkeypatch, reference, "step", {"(in_u, in_r, in_g)": "(in_r, in_u, in_g)"})
    assert place(divergence("reference", "cpu")) == (0, 0, 0, 0)
    suite_catches(check_released_step)
    suite_catches(check_paper_step)


def test_swapped_gates_in_a_weight_file():
    # The recurrent columns of u and r: the first difference is in the step after the first event.
    net = network()
    swapped = net.layers[0].w_rec.to_dense()[:, [*range(UNITS, 2 * UNITS), *range(UNITS), *range(2 * UNITS, 3 * UNITS)]]
    other = net.with_matrices({"layers.0.w_rec": Dense(np.ascontiguousarray(swapped))})
    step, sample, _ = first_event(net)
    with pytest.raises(Divergence) as caught:
        assert_equivalent(Simulator(net, batch=BATCH), Simulator(other, batch=BATCH), signal())
    assert place(caught.value)[:3] == (step + 1, 0, sample)


def test_swapped_gates_in_the_kernel():
    with faulty_kernels("gates swapped") as faulty:
        assert place(divergence("reference", faulty)) == (0, 0, 0, 0)
        assert place(divergence("reference", faulty, net=network(units=40))) == (0, 0, 0, 0)
        suite_catches(check_formats, backend=faulty, cell=Cell(), formats=("dense",))


def test_swapped_gates_of_an_lstm_in_the_kernel():
    # From the zero state, a unit's cell is the product of input gate and candidate: the first input shows the fault.
    first = 0, 0, int(np.argmax(signal()[0].any(axis=1))), 0
    with faulty_kernels("gates of an LSTM swapped") as faulty:
        for units in (UNITS, 40):
            net = Network.random([units], inputs=INPUTS, rng=np.random.default_rng(2), cell=Cell("lstm"))
            assert place(divergence("reference", faulty, net=net)) == first
        suite_catches(check_formats, backend=faulty, cell=Cell("lstm"), formats=("dense",))


def test_swapped_gates_of_a_gru_or_an_lstm_in_the_rules_that_all_backends_share(monkeypatch):
    plant(monkeypatch, cells, "gru_before_value", {"fma(u, h, (ONE - u) * g)": "fma(u, g, (ONE - u) * h)"})
    suite_catches(check_gru_step, variant="before")
    plant(monkeypatch, cells, "lstm_value", {"fma(f, c, i * g)": "fma(i, c, f * g)"})
    suite_catches(check_lstm_step)


def test_swapped_gates_in_the_rule_that_all_backends_share(monkeypatch):
    # All backends share this rule and agree. The steps worked by hand and the recorded runs detect the fault.
    plant(monkeypatch, cells, "egru_value_of_gates", {"fma(u, c, (ONE - u) * g)": "fma(r, c, (ONE - r) * g)"})
    suite_catches(check_plain_gru, seed=0)
    with np.load(FILES[0]) as recorded:
        suite_catches(check_outputs, recorded=dict(recorded))


# --- a reset is forgotten -----------------------------------------------------------------------------------


def check_forgotten_reset(found: Divergence, net: Network) -> None:
    """Demand that the cell of the first event, and no other before it, keeps its threshold."""
    step, sample, unit = first_event(net)
    assert found.what == "cell"
    assert place(found) == (step, 0, sample, unit)
    healthy = simulate(net, signal(), record=RECORD)
    threshold, sent = net.layers[0].threshold[unit], healthy.events[0].to_dense()[step, sample, unit]
    assert found.values == (sent - threshold, sent)
    # The margin of the healthy unit is the distance by which it passed its threshold.
    assert abs(found.margins[0] - float(sent - threshold)) <= tolerance.U32


def test_forgotten_reset_in_the_specification(monkeypatch):
    plant(monkeypatch, reference, "step", {"v - event * threshold if cell.variant == 'evnn' else v": "v"})
    check_forgotten_reset(divergence("cpu", "reference"), network())
    suite_catches(check_released_step)
    suite_catches(check_equality_and_leak, dtype=np.float64)
    suite_catches(check_formats, backend="cpu", cell=Cell(), formats=("csr",))


def test_forgotten_reset_in_the_kernel():
    with faulty_kernels("reset forgotten") as faulty:
        check_forgotten_reset(divergence("reference", faulty), network())
        suite_catches(check_formats, backend=faulty, cell=Cell(), formats=("block",))


def test_forgotten_reset_of_the_papers_variant(monkeypatch):
    plant(monkeypatch, cells, "egru_paper_value", {"fma(u, c, (ONE - u) * g) - y": "fma(u, c, (ONE - u) * g)"})
    net = network("paper")
    step, sample, unit = first_event(net)
    found = divergence("cpu", "reference", net=net)
    # The first difference is one step after the first event, in the unit that sent it.
    assert found.what in ("cell", "event")
    assert place(found) == (step + 1, 0, sample, unit)
    suite_catches(check_paper_step)


# --- a state is lost between calls --------------------------------------------------------------------------


def test_state_lost_between_calls_is_caught(monkeypatch):
    # This is what the released code does between windows by default.
    wiping = {"self._place(after)": "self._place(State(before.cells, after.outputs))"}
    plant(monkeypatch, Simulator, "_move", wiping)
    suite_catches(check_chunks, backend="cpu")


# --- a product goes wrong -----------------------------------------------------------------------------------

#: fault -> the forced layout on which it acts, and a network that shows it
TRAVERSALS = {
    "tail of scattered weights dropped": ("indices", network(fmt="csr")),
    "masks of the wrong unit": ("masks", network(fmt="csr", share=0.5)),
    "scale of another unit, rows": ("rows", network(storage="int8")),
    "scale of another unit, single weights": ("indices", network(fmt="csr", storage="int8")),
    "scale of another unit, masked weights": ("masks", network(fmt="csr", share=0.5, storage="int8")),
    "scale of another unit, blocks": ("blocks", network(fmt="block", block=(2, 4), storage="int8")),
    "scale of another unit, strips": ("strips", network(units=24, fmt="block", block=(1, 64), storage="int8")),
    "last event of a strip": ("strips", network(units=24, fmt="block", block=(1, 64))),
    "last event of blocks": ("blocks", network(fmt="block", block=(2, 4))),
    "scale of another unit, few blocks": ("few blocks", network(fmt="block", block=(2, 4), storage="int8")),
    "rest of a list dropped": ("few blocks", network(fmt="block", block=(2, 4))),
    "scale of another unit, panels": ("panels", network(storage="int8")),
    "scale of another unit, panels of single weights": ("single tiles", network(fmt="csr", storage="int8")),
    "rest of a panel dropped": ("single tiles", network(fmt="csr", share=0.5)),
    "last event of a panel": ("panels", network()),
    "last event of a panel of single weights": ("single tiles", network(fmt="csr")),
    "unit skipped": ("every unit", network()),
    "order of two units": ("panels", network()),
}
#: faults of blocks that every input chooses
GATES = ("a chosen block too few", "gate forgotten")
#: faults of steps in which nothing is sent
SILENCE = ("event of a silent step missed", "silence taken for its fixed point")
#: faults that need several threads
TEAMS = ("parts swapped", "units of the wrong part", "barrier missing")


def test_every_fault_of_the_kernels_is_marked_and_tested():
    updates = {"gates swapped", "gates of an LSTM swapped", "reset forgotten"}
    tested = {*TRAVERSALS, *TEAMS, *GATES, *SILENCE, "last event dropped", *updates}
    marked = {fault for faults in marked_faults().values() for fault in faults}
    assert tested == marked == set(KERNEL_FAULTS)


@pytest.mark.parametrize("fault", TRAVERSALS)
def test_faults_of_products_are_caught(fault):
    layout, net = TRAVERSALS[fault]
    with forced(FORCED[layout][0]):
        with faulty_kernels(None) as healthy:
            sims = [Simulator(net, batch=BATCH, backend=name) for name in ("reference", healthy)]
            assert assert_equivalent(*sims, signal()) > 0
        with faulty_kernels(fault) as faulty:
            found = divergence("reference", faulty, net=net)
    # The first difference is at the latest in the step after the first event.
    assert (found.what, found.layer) in (("event", 0), ("cell", 0))
    assert found.step <= first_event(net)[0] + 1
    with faulty_kernels(fault) as faulty:
        # A value behind the last weight may be NaN, which the simulator refuses.
        suite_catches(check_layout, by=(AssertionError, FloatingPointError), backend=faulty, layout=layout)


@pytest.mark.parametrize("cell", [Cell(), Cell("lstm")], ids=repr)
@pytest.mark.parametrize("fault", GATES)
def test_faults_of_gated_blocks_are_caught(fault, cell):
    drawn = Network.random([UNITS], inputs=INPUTS, rng=np.random.default_rng(2), cell=cell)
    net = drawn.with_matrices({name: gated(3 * w.to_dense(), rule="softmax") for name, w in drawn.matrices().items()})
    with faulty_kernels(None) as healthy:
        sims = [Simulator(net, batch=BATCH, backend=name) for name in ("reference", healthy)]
        assert assert_equivalent(*sims, signal()) > 0
    with faulty_kernels(fault) as faulty:
        found = divergence("reference", faulty, net=net)
        # The first inputs choose blocks and are scaled.
        assert (found.step, found.layer, found.sample) == (0, 0, int(np.argmax(signal()[0].any(axis=1))))
        suite_catches(check_gated, backend=faulty, cells=[cell], formats=("gated",))


@pytest.mark.parametrize("fault", SILENCE)
def test_faults_of_silence_are_caught(fault):
    quiet = np.zeros_like(signal())
    with faulty_kernels(None) as healthy:
        sims = [Simulator(network(), batch=BATCH, backend=name) for name in ("reference", healthy)]
        assert assert_equivalent(*sims, quiet) > 0
    with faulty_kernels(fault) as faulty:
        if fault == "event of a silent step missed":
            # Without an input, some units rise above their thresholds in the first step.
            found = divergence("reference", faulty, x=quiet)
            assert (found.step, found.layer, found.sample) == (0, 0, 0)
        # A step that is recorded is taken by itself, so that `assert_equivalent` sees no fault of longer silence.
        suite_catches(check_silence, backend=faulty)


@pytest.mark.parametrize("fault", TEAMS)
def test_faults_of_threads_are_caught(fault):
    net = network(units=40)
    with faulty_kernels(fault) as faulty:
        # A single thread is not affected.
        sims = [Simulator(net, batch=BATCH, backend=name) for name in ("reference", faulty)]
        assert assert_equivalent(*sims, signal()) > 0
        if fault != "barrier missing":
            found = divergence(faulty, "reference", net=net, threads=2)
            assert (found.step, found.layer) == (first_event(net)[0] + 1, 0)
            suite_catches(check_formats, backend=faulty, cell=Cell(), formats=("dense",))
        # A race does not show in every step, so that many thousand steps are run.
        suite_catches(check_threads_do_not_race, backend=faulty)


# --- weights are packed wrong -------------------------------------------------------------------------------

CUT = network(fmt="block", block=(3, 16), units=40)
SPARSE = network(fmt="csr", share=0.5)
PLACED = (packing._Entries, "placed")

#: fault -> the function that packs, the layout that it is for, a network that shows it, and the edit
PACKING = {
    # A block segment cut on its left begins a place too early.
    "cut column": (PLACED, "blocks", CUT, {"self.column[inside] + left": "self.column[inside] + left - (left > 0)"}),
    # It keeps what was cut off on its left.
    "cut start": (
        PLACED,
        "blocks",
        CUT,
        {"left[cut, None] + np.arange(self.width)": "0 * left[cut, None] + np.arange(self.width)"},
    ),
    # It keeps what was cut off on its right.
    "cut end": (PLACED, "blocks", CUT, {"source < right[cut, None]": "source < self.width"}),
    "mask off by one": (
        (packing, "_pack_masked"),
        "masks",
        SPARSE,
        {"kept[entries.unit, entries.column]": "kept[entries.unit, (entries.column + 1) % kept.shape[1]]"},
    ),
    "columns reversed": (
        (packing, "_pack_scatter"),
        "indices",
        SPARSE,
        {"entries.column": "entries.column[::-1]"},
    ),
    "positions reversed": (
        (packing, "_pack_single_tiles"),
        "single tiles",
        SPARSE,
        {"column[order]": "column[order][::-1]"},
    ),
    "rows reversed": ((packing, "_pack_rows"), "panels", network(), {"values[:, a:b]": "values[:, a:b][:, ::-1]"}),
}


@pytest.mark.parametrize("fault", PACKING)
def test_faults_of_packing_are_caught(monkeypatch, fault):
    function, layout, net, edits = PACKING[fault]
    plant(monkeypatch, *function, edits)
    with forced(FORCED[layout][0]):
        # Two threads divide the columns between them, so that blocks are cut.
        found = divergence("cpu", "reference", net=net, threads=2)
    assert found.layer == 0
    suite_catches(check_layout, backend="cpu", layout=layout)
