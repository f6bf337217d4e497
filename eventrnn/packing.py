"""Weights laid out for the CPU kernels: every matrix of a network in three pools and one table of offsets.

One set of pools serves every format, layer and thread, so that one kernel is compiled once. A *window* is a
range of a matrix's columns (gate rows); each thread owns one window of every matrix and packs just that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eventrnn.simd import LANES
from eventrnn.weights import CSR, NM, BlockCSR, Dense, Weights

# Columns of the table: how a window is stored, and where.
KIND, LOW, HIGH, VALUES, INDEX, POINTERS, WIDTH, PITCH, FAR = range(9)
FIELDS = 9

#: kinds of traversal
ROWS, SCATTER, BLOCKS, RAGGED_BLOCKS, BLOCK_COLUMNS = range(5)

# A window up to this size stays in the L2 cache, where asking ahead for a row costs more than waiting for it.
NEAR_BYTES = 1 << 20


@dataclass
class Pools:
    """Growing lists of arrays; `freeze` joins them. Offsets count elements."""

    values: list[np.ndarray]
    index: list[np.ndarray]
    pointers: list[np.ndarray]
    sizes: list[int]

    @classmethod
    def empty(cls) -> Pools:
        """No arrays yet."""
        return cls([], [], [], [0, 0, 0])

    def add(self, values: np.ndarray, index: np.ndarray, pointers: np.ndarray) -> tuple[int, int, int]:
        """Append one window's arrays, values padded to whole vectors; returns where each begins."""
        at = tuple(self.sizes)
        padded = np.zeros(_up(len(values), LANES), np.float32)
        padded[: len(values)] = values
        for kind, (pool, array) in enumerate(
            ((self.values, padded), (self.index, index.astype(np.int32)), (self.pointers, pointers.astype(np.int64)))
        ):
            pool.append(array)
            self.sizes[kind] += len(array)
        return at  # type: ignore[return-value]

    def freeze(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """values (float32, on a cache line, one vector to spare), index (int32), pointers (int64)."""
        values = aligned_zeros(self.sizes[0] + LANES * 4, np.float32)
        np.concatenate([*self.values, np.zeros(0, np.float32)], out=values[: self.sizes[0]])
        return (
            values,
            np.concatenate([*self.index, np.zeros(1, np.int32)]),
            np.concatenate([*self.pointers, np.zeros(1, np.int64)]),
        )


def aligned_zeros(size: int, dtype) -> np.ndarray:
    """Zeros starting on a cache line."""
    itemsize = np.dtype(dtype).itemsize
    raw = np.zeros(size * itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * itemsize].view(dtype)


def window_edges(weights: Weights, start: int, stop: int, parts: int) -> list[int]:
    """Cut the columns `start` to `stop` into `parts` windows that split no block and, but for the last, are whole
    vectors: a vector across a cut would be read and written by two threads at once."""
    # Blocks stand on the grid of the matrix, vectors of a row on that of the window.
    grain, origin = (weights.block[1], 0) if isinstance(weights, BlockCSR) else (LANES, start)
    cuts = [start + (stop - start) * k / parts for k in range(1, parts)]
    aligned = [min(max(origin + round((cut - origin) / grain) * grain, start), stop) for cut in cuts]
    return [start, *aligned, stop]


def narrow(low: int, high: int, width: int) -> list[int]:
    """Cut a window of dense rows into some of `width` columns, a multiple of a vector."""
    return [low, *range(low + width, high, width), high]


def pack(pools: Pools, weights: Weights, low: int, high: int, by_column: bool = False) -> list[int]:
    """Add the columns `low` to `high` of a matrix to the pools; returns its table row.

    `by_column` lays blocks out for products with many drives at once.
    """
    weights = _widened(weights)
    if isinstance(weights, Dense):
        return _pack_rows(pools, weights, low, high)
    if isinstance(weights, CSR):
        return _pack_scatter(pools, weights, low, high)
    assert isinstance(weights, BlockCSR)
    whole = low % weights.block[1] == 0 and (high % weights.block[1] == 0 or high == weights.shape[1])
    return (
        _pack_block_columns(pools, weights, low, high)
        if by_column and whole
        else _pack_blocks(pools, weights, low, high)
    )


def _widened(weights: Weights) -> Weights:
    """What the kernels read: decoded float32 values, N:M as single weights. O(stored)."""
    plain = weights.to_csr() if isinstance(weights, NM) else weights
    return plain.stored_as("float32")


def check_format(name: str, weights: Weights) -> None:
    """Refuse a format that `pack` does not know."""
    if not isinstance(weights, Dense | CSR | BlockCSR | NM):
        raise TypeError(
            f"{name}: the cpu backend cannot run format {type(weights).__name__}; convert to dense, csr, block or nm"
        )


def _pack_rows(pools: Pools, weights: Dense, low: int, high: int) -> list[int]:
    # An odd number of cache lines a row: rows a power of two apart would share cache sets.
    pitch = _up(high - low, LANES)
    pitch += LANES * (pitch // LANES % 2 == 0)
    rows = np.zeros((weights.shape[0], pitch), np.float32)
    rows[:, : high - low] = weights.values[:, low:high]
    values, index, pointers = pools.add(rows.ravel(), np.zeros(0), np.zeros(0))
    return [ROWS, low, high, values, index, pointers, _up(high - low, LANES), pitch, 0]


def _pack_scatter(pools: Pools, weights: CSR, low: int, high: int) -> list[int]:
    inside = (weights.indices >= low) & (weights.indices < high)
    kept = np.concatenate([[0], np.cumsum(inside)])
    values, index, pointers = pools.add(weights.values[inside], weights.indices[inside], kept[weights.indptr])
    return [SCATTER, low, high, values, index, pointers, 1, 0, 0]


def _pack_blocks(pools: Pools, weights: BlockCSR, low: int, high: int) -> list[int]:
    """Blocks that a window cuts are clipped, so that no multiplication is done twice.

    The last column block of the matrix keeps its padding (the drive has room for it).
    """
    (r, c), n_post = weights.block, weights.shape[1]
    end = _up(n_post, c) if high == n_post else high
    left = np.maximum(weights.indices.astype(np.int64) * c, low)
    right = np.minimum((weights.indices.astype(np.int64) + 1) * c, end)
    inside = left < right
    kept = np.concatenate([[0], np.cumsum(inside)])
    columns, widths = left[inside], (right - left)[inside]
    offset = columns - weights.indices[inside].astype(np.int64) * c
    blocks = weights.blocks()[inside]
    indptr = kept[weights.indptr]
    ragged = bool((widths != c).any())
    pieces, starts = [], [0]
    for a, b in zip(indptr[:-1], indptr[1:], strict=True):
        for s in range(r):
            pieces += [blocks[k, s, offset[k] : offset[k] + widths[k]] for k in range(a, b)]
        starts.append(starts[-1] + r * int(widths[a:b].sum()))
    flat = np.concatenate([*pieces, np.zeros(0, np.float32)])
    # Unit j: pointers[3j] its first block, [3j + 1] one past its last, [3j + 2] its first value. By unit, not by
    # block row: the kernel would spend more time dividing by r than multiplying.
    row, s = np.divmod(np.arange(weights.shape[0]), r)
    lengths = np.diff(starts) // r
    pointers = np.stack([indptr[row], indptr[row + 1], np.array(starts)[row] + s * lengths[row]], axis=1).ravel()
    index = np.stack([columns, widths], axis=1).ravel() if ragged else columns
    values_at, index_at, pointers_at = pools.add(flat, index, pointers)
    return [
        RAGGED_BLOCKS if ragged else BLOCKS,
        low,
        high,
        values_at,
        index_at,
        pointers_at,
        c,
        0,
        int(4 * len(flat) > NEAR_BYTES),
    ]


def _pack_block_columns(pools: Pools, weights: BlockCSR, low: int, high: int) -> list[int]:
    """Blocks by postsynaptic block column, presynaptic units ascending within one.

    Walked that way, the columns' share of many drives stays in the L1 cache.
    """
    (r, c), rows = weights.block, np.diff(weights.indptr)
    unit = (np.repeat(np.arange(len(rows)), rows)[:, None] * r + np.arange(r)).ravel()
    column = np.repeat(weights.indices.astype(np.int64), r)
    inside = (unit < weights.shape[0]) & (column * c >= low) & (column * c < high)
    order = np.flatnonzero(inside)[np.lexsort((unit[inside], column[inside]))]
    first, last = low // c, -(-high // c)
    pointers = np.searchsorted(column[order], np.arange(first, last + 1))
    values = weights.blocks().reshape(-1, c)[order]
    values_at, index_at, pointers_at = pools.add(values.ravel(), unit[order], pointers)
    return [BLOCK_COLUMNS, low, high, values_at, index_at, pointers_at, c, 0, 0]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
