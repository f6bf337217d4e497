"""Kernels whose threads do not communicate, run as plain Python: one thread per block, one block after the other.

The PTX instructions that they use are replaced by NumPy. Kernels whose warps vote, shuffle or wait for each other
cannot be run like this, nor in Numba's simulator, which lacks these instructions; `test_cuda.py` compares them on a
GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.cuda import PRECISIONS, tables
from support import tolerance
from support.fake_gpu import ROUNDING, rounded, widened
from support.python_kernels import in_python


@pytest.fixture
def kernels():
    """The kernel modules; they need numba-cuda."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    from eventrnn.cuda.kernels import batched_products, input_checks, tensor_core_cells

    return SimpleNamespace(
        input_checks=input_checks, batched_products=batched_products, tensor_core_cells=tensor_core_cells
    )


def at(array: np.ndarray) -> int:
    return array.ctypes.data


def words(shape, precision, rng) -> np.ndarray:
    return np.ascontiguousarray(rounded(rng.standard_normal(shape).astype(np.float32), precision))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("units", "counting"), [(13, True), (8, False), (1, True)])
def test_cells_kernel_equals_the_fake(kernels, precision, units, counting):
    rng, batch, padded, pitch = np.random.default_rng(units), 5, -(-units // 8) * 8, 32
    pairs, splits = -(-units // 2), 3
    drive, rec = (words((batch, 3, padded), precision, rng) for _ in range(2))
    vectors, c = rng.standard_normal((5, padded)).astype(np.float32), rng.standard_normal((batch, units))
    vectors[4], c = 0.1, c.astype(np.float32)
    # The first sample keeps its cells, which are 1, and all its units send a 1.
    drive[0, 0], c[0] = rounded(np.full(padded, 100, np.float32), precision), 1
    results = []
    for fake in (False, True):
        cells, y = c.copy(), np.zeros((batch, padded), drive.dtype)
        sent, after = np.full((batch, pitch), 7, np.float32), np.zeros((batch, units), np.float32)
        sums, status = np.zeros((splits, pairs + 1), np.uint16), np.zeros(tables.STATUS_FIELDS, np.int64)
        arrays, sizes = map(at, (drive, rec, vectors, cells, y, sent, after)), (units, padded, pitch, batch)
        arguments = (*arrays, *sizes, at(sums) if counting else 0, pairs + 1, at(status))
        if fake:
            ROUNDING["cells"](precision, (pairs, splits), *arguments)
        else:
            in_python(kernels.tensor_core_cells.cells_kernel(precision)[0], (pairs, splits))(*arguments)
        results.append((cells, widened(y, precision), sent, after, sums, status))
    ours, theirs = results
    # The fake follows `reference.py`, with NumPy's exponential.
    for got, expected in zip(ours[:4], theirs[:4], strict=True):
        assert np.array_equal(got != 0, expected != 0)
        assert np.abs(got.astype(np.float64) - expected).max() <= tolerance.two_roundings(precision)
    assert np.array_equal(ours[4], theirs[4]) and (ours[4][0, :pairs] & 0xF00).all() == counting
    assert np.array_equal(ours[2][:, units:], np.full((batch, pitch - units), 7)) and not ours[5].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_are_rounded_and_padded(kernels, precision):
    rng = np.random.default_rng(0)
    dense, status = rng.standard_normal((4, 9)).astype(np.float32), np.zeros(tables.STATUS_FIELDS, np.int64)
    out = np.full((4, 16), 3, rounded(dense, precision).dtype)
    in_python(kernels.tensor_core_cells.round_rows_kernel(precision)[0], (4, 1))(
        at(dense), 9, 7, 16, at(out), at(status)
    )
    assert np.array_equal(out[:, :7], rounded(dense[:, :7].copy(), precision)) and not out[:, 7:].any()
    begins, counts = np.array([2, 0]), np.array([2, 1], np.int32)
    entries = np.array([[5, 0], [0, 0], [1, 0], [15, 0]], np.int32)
    entries[:, 1] = np.array([1.5, 0, -2.25, 1e5], np.float32).view(np.int32)
    rows, out = np.array([1, 0, 0]), np.full((3, 16), 3, out.dtype)
    densify = in_python(kernels.tensor_core_cells.densify_kernel(precision)[0], (3, 1))
    densify(at(begins), at(counts), at(entries), at(rows), 3, 16, at(out), at(status))
    expected = np.zeros((3, 16), np.float32)
    expected[0, 5], expected[1:, 1], expected[1:, 15] = 1.5, -2.25, 1e5
    with np.errstate(over="ignore"):
        assert np.array_equal(out, rounded(expected, precision))
    assert bool(status[tables.STATUS_LARGE]) == (precision == "float16")


def test_checks_report_the_first_invalid_position(kernels):
    status, row_of = np.zeros(tables.STATUS_FIELDS, np.int64), np.zeros(5, np.int64)
    in_python(kernels.input_checks.symbols_kernel()[0], (5, 1))(
        at(np.array([3, 9, 0, -1, 8])), 5, 100, 9, at(row_of), at(status)
    )
    assert row_of.tolist() == [3, 0, 0, 0, 8] and tables.LAST - status[tables.STATUS_INPUT] == 101
    finite = in_python(kernels.input_checks.finite_kernel()[0], (3, 1))
    values = np.array([1, -3e38, 0], np.float32)
    finite(at(values), 3, at(status))
    assert not status[tables.STATUS_CELLS]
    values[2] = np.inf
    finite(at(values), 3, at(status))
    assert status[tables.STATUS_CELLS]


@pytest.mark.parametrize("rows", [0, 1, 7, 40])
def test_counts_distinguish_graded_from_binary_events(kernels, rows):
    rng = np.random.default_rng(rows)
    dense = rng.choice(np.array([0, 0, 1, -1, 0.5], np.float32), (rows, 8))
    counts = np.zeros((2, 6), np.int64)
    in_python(kernels.batched_products.count_events_kernel()[0], (6, 3))(
        at(dense), 8, 6, rows, at(counts[0]), at(counts[1])
    )
    assert np.array_equal(counts[1], (np.abs(dense[:, :6]) == 1).sum(axis=0))
    assert np.array_equal(counts.sum(axis=0), (dense[:, :6] != 0).sum(axis=0))
    # Sums up to the largest that four bits hold; a unit has at least as many events as events of value 1.
    sent = rng.integers(0, tables.MAX_SUMMED + 1, (rows, 8))
    binary, counts, sums = rng.integers(0, sent + 1), np.zeros((2, 8), np.int64), np.zeros((rows, 5), np.uint16)
    sums[:, :4] = sent[:, ::2] + (sent[:, 1::2] << 4) + (binary[:, ::2] << 8) + (binary[:, 1::2] << 12)
    in_python(kernels.batched_products.count_pairs_kernel()[0], (4, 3))(
        at(sums), 4, 5, rows, at(counts[0]), at(counts[1])
    )
    assert np.array_equal(counts[1], binary.sum(axis=0)) and np.array_equal(counts.sum(axis=0), sent.sum(axis=0))
