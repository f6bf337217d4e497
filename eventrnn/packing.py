"""Weights laid out for the CPU kernels: every matrix of a network in three pools and one table of offsets.

One set of pools serves every format, storage, layer and thread, so that one kernel is compiled once. A *window* is a
range of a matrix's columns (gate rows); each thread owns some windows of every matrix and packs just those.

    kind           values                                       index                    pointers
    ROWS           rows of `WIDTH` columns, `PITCH` apart       -                        -
    ROW_TILES      the same, narrow and without a gap           -                        -
    SCATTER        single weights by unit                       16-bit columns           first weight of each unit
    MASKED         single weights by unit                       16-bit masks, `PITCH`    first weight of each unit
                                                                a unit
    BLOCKS         pieces of `WIDTH` columns by unit            columns, shared by the   a unit: first and last index,
                                                                units of a block row     first piece
    BLOCK_COLUMNS  pieces by column, units ascending within     units                    first piece of each column

ROW_TILES and BLOCK_COLUMNS are for products with many drives at once, which share what is read. With `EVERY_FROM` or
more active units a drive, ROW_TILES walk every unit instead of the active ones: zeros add nothing, and cost less than
looking for what is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from eventrnn.simd import AVX512, LANES
from eventrnn.weights import CSR, NM, BlockCSR, Dense, Weights

# Columns of the table: how a window is stored, and where.
KIND, STORAGE, LOW, HIGH, VALUES, INDEX, POINTERS, WIDTH, PITCH, SCALES, EVERY_FROM = range(11)
FIELDS = 11

#: kinds of traversal
ROWS, ROW_TILES, SCATTER, MASKED, BLOCKS, BLOCK_COLUMNS = range(6)

# Columns of a narrow window: 64 drives of them fit the L1 cache beside the weights that pass through.
ROW_TILE = 64
# From this share of active units on, every unit is walked (measured for 20 and for 80 drives of 1350 units).
EVERY_FROM_SHARE = 0.3
# Indices of single weights are 16-bit.
WIDEST_SCATTER = 1 << 16
# Blocks are cut into pieces of the widest of these that divides them.
PIECES = (64, 32, 16, 8, 4)
# A mask a vector costs less than an index a weight from this share of kept weights on (measured at 1350 units:
# 50 % 72 us against 138, 20 % 55 against 59, 10 % 52 against 30).
MASKED_FROM = 0.2

#: how a window's weights are stored
FLOAT32, BFLOAT16, INT8 = range(3)
ITEMSIZE = (4, 2, 1)
_CODES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}


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

    def add_values(self, values: np.ndarray) -> int:
        """Append weights of any storage, or scales; returns where they begin, a cache line."""
        raw = np.ascontiguousarray(values).view(np.uint8).ravel()
        padded = np.zeros(_up(len(raw), 4 * LANES), np.uint8)
        padded[: len(raw)] = raw
        return self._add(0, self.values, padded.view(np.float32))

    def add_index(self, index: np.ndarray) -> int:
        """Append an index: int32, or 16-bit integers two a place."""
        if index.dtype == np.uint16:
            index = np.concatenate([index, np.zeros(len(index) % 2, np.uint16)]).view(np.int32)
        return self._add(1, self.index, index.astype(np.int32, copy=False))

    def add_pointers(self, pointers: np.ndarray) -> int:
        """Append pointers."""
        return self._add(2, self.pointers, pointers.astype(np.int64, copy=False))

    def _add(self, kind: int, pool: list[np.ndarray], array: np.ndarray) -> int:
        at = self.sizes[kind]
        pool.append(array)
        self.sizes[kind] += len(array)
        return at

    def freeze(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """values (float32, on a cache line), index (int32), pointers (int64); vectors may read past the last."""
        values = aligned_zeros(self.sizes[0] + 4 * LANES, np.float32)
        np.concatenate([*self.values, np.zeros(0, np.float32)], out=values[: self.sizes[0]])
        return (
            values,
            np.concatenate([*self.index, np.zeros(4 * LANES, np.int32)]),
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


def pack(pools: Pools, weights: Weights, low: int, high: int, many: bool = False) -> list[list[int]]:
    """Add the columns `low` to `high` of a matrix to the pools; returns the table rows of its windows.

    `many` lays dense rows and wide blocks out for products with many drives at once.
    """
    if isinstance(weights, Dense):
        return _pack_rows(pools, weights, low, high, many)
    if not isinstance(weights, BlockCSR):
        entries = _Entries.of_single(weights)
        return _pack_single(pools, entries.only((entries.column >= low) & (entries.column < high)), weights, low, high)
    entries = _Entries.of_blocks(weights)
    # The last columns of the matrix keep the padding of their blocks (the drive has room for it).
    end = high if high < weights.shape[1] else _up(high, weights.block[1])
    inside = (entries.column < end) & (entries.column + entries.width > low)
    whole = inside & (entries.column >= low) & (entries.column + entries.width <= end)
    if entries.width == 1:
        return _pack_single(pools, entries.only(whole), weights, low, high)
    packed = (_pack_block_columns if many else _pack_blocks)(pools, entries.only(whole), weights, low, high)
    clipped = entries.only(inside & ~whole).single()
    clipped = clipped.only((clipped.column >= low) & (clipped.column < high))
    if len(clipped.unit):
        # No columns: these drives were started above.
        rows = _pack_single(pools, clipped, weights, low, high)
        packed += [[*row[:HIGH], row[LOW], *row[VALUES:]] for row in rows]
    return packed


def check_format(name: str, weights: Weights) -> None:
    """Refuse a format that `pack` does not know."""
    if not isinstance(weights, Dense | CSR | BlockCSR | NM):
        raise TypeError(
            f"{name}: the cpu backend cannot run format {type(weights).__name__}; convert to dense, csr, block or nm"
        )


def empty_window(low: int) -> list[int]:
    """A table row of no columns."""
    return [ROWS, FLOAT32, low, low, 0, 0, 0, 0, 0, 0, 0]


@dataclass
class _Entries:
    """Weights of a matrix in the order unit, column: pieces of `width` neighbouring columns each.

    unit, column : (n,) presynaptic unit and first column of each
    row          : (n,) what names its index: pieces of the units of one block row share theirs
    values       : (n, width) in the storage of the matrix
    """

    unit: np.ndarray
    column: np.ndarray
    values: np.ndarray
    rows: int

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def only(self, chosen: np.ndarray) -> _Entries:
        return (
            self if chosen.all() else _Entries(self.unit[chosen], self.column[chosen], self.values[chosen], self.rows)
        )

    def single(self) -> _Entries:
        """The same as entries of one column."""
        if self.width == 1:
            return self
        column = (self.column[:, None] + np.arange(self.width)).ravel()
        return _Entries(np.repeat(self.unit, self.width), column, self.values.reshape(-1, 1), 1)

    @classmethod
    def of_single(cls, weights: Weights) -> _Entries:
        unit, column = np.nonzero(weights.kept())
        return cls(unit, column, weights.values.reshape(-1, 1), 1)

    @classmethod
    def of_blocks(cls, weights: BlockCSR) -> _Entries:
        (r, c), per_row = weights.block, np.diff(weights.indptr)
        width = next((w for w in PIECES if c % w == 0), 1)
        unit = np.repeat(np.arange(len(per_row) * r), np.repeat(per_row, r))
        # Blocks of a block row repeat for each of its r units.
        first = np.repeat(np.repeat(weights.indptr[:-1], r), np.repeat(per_row, r))
        start = np.concatenate([[0], np.cumsum(np.repeat(per_row, r))[:-1]])
        within = np.arange(len(unit)) - np.repeat(start, np.repeat(per_row, r))
        column = weights.indices[first + within].astype(np.int64) * c
        pieces = c // width
        entries = cls(
            np.repeat(unit, pieces),
            (column[:, None] + np.arange(pieces) * width).ravel(),
            weights.values.reshape(-1, width),
            r if width > 1 else 1,
        )
        return entries.only(entries.unit < weights.shape[0])


def _storage(weights: Weights) -> int:
    return _CODES[weights.storage]


def _scales(pools: Pools, weights: Weights) -> int:
    return pools.add_values(weights.scales) if weights.scales is not None else 0


def _pack_rows(pools: Pools, weights: Dense, low: int, high: int, many: bool) -> list[list[int]]:
    storage, scales = _storage(weights), _scales(pools, weights)
    table, every_from = [], math.ceil(EVERY_FROM_SHARE * weights.shape[0])
    cuts = [*range(low, high, ROW_TILE), high] if many else [low, high]
    for a, b in zip(cuts[:-1], cuts[1:], strict=True):
        width = pitch = _up(b - a, LANES)
        if not many:
            # An odd number of cache lines a row: rows a power of two apart would share cache sets.
            lines = -(-pitch * weights.values.itemsize // 64)
            pitch = (lines + (lines % 2 == 0)) * 64 // weights.values.itemsize
        rows = np.zeros((weights.shape[0], pitch), weights.values.dtype)
        rows[:, : b - a] = weights.values[:, a:b]
        at = pools.add_values(rows)
        table.append([ROW_TILES if many else ROWS, storage, a, b, at, 0, 0, width, pitch, scales, every_from])
    return table or [empty_window(low)]


def _pack_single(pools: Pools, entries: _Entries, weights: Weights, low: int, high: int) -> list[list[int]]:
    """Single weights: by mask or by index, whichever is less work."""
    table = []
    cuts = [*range(low, high, WIDEST_SCATTER), high]
    # Blocks may have padding beyond the last column, where a mask has no bits.
    within = not isinstance(weights, BlockCSR)
    for a, b in zip(cuts[:-1], cuts[1:], strict=True):
        stop = b if b < high else int(entries.column.max(initial=0)) + 1
        part = entries.only((entries.column >= a) & (entries.column < stop))
        dense = AVX512 and within and len(part.unit) >= MASKED_FROM * weights.shape[0] * (b - a) > 0
        table += (_pack_masked if dense else _pack_scatter)(pools, part, weights, a, b)
    return table or [empty_window(low)]


def _pack_scatter(pools: Pools, entries: _Entries, weights: Weights, low: int, high: int) -> list[list[int]]:
    pointers = _pointers(entries.unit, weights.shape[0])
    index_at = pools.add_index((entries.column - low).astype(np.uint16))
    values_at, scales = pools.add_values(entries.values), _scales(pools, weights)
    return [[SCATTER, _storage(weights), low, high, values_at, index_at, pools.add_pointers(pointers), 1, 0, scales, 0]]


def _pack_masked(pools: Pools, entries: _Entries, weights: Weights, low: int, high: int) -> list[list[int]]:
    vectors = _up(high - low, LANES) // LANES
    kept = np.zeros((weights.shape[0], vectors * LANES), bool)
    kept[entries.unit, entries.column - low] = True
    masks = np.packbits(kept, axis=1, bitorder="little").view("<u2").astype(np.uint16)
    pointers = pools.add_pointers(_pointers(entries.unit, weights.shape[0]))
    values_at, scales = pools.add_values(entries.values), _scales(pools, weights)
    index_at = pools.add_index(masks.ravel())
    return [[MASKED, _storage(weights), low, high, values_at, index_at, pointers, 1, vectors, scales, 0]]


def _pack_blocks(pools: Pools, entries: _Entries, weights: BlockCSR, low: int, high: int) -> list[list[int]]:
    first = _pointers(entries.unit, weights.shape[0])
    # The units of a block row have the same columns: the first one's index serves all.
    leaders = entries.unit % entries.rows == 0
    index_first = np.concatenate([[0], np.cumsum(leaders)])[first]
    unit = np.arange(weights.shape[0])
    leader = unit - unit % entries.rows
    pointers = np.stack([index_first[leader], index_first[leader + 1], first[:-1]], axis=1).ravel()
    index_at = pools.add_index(entries.column[leaders].astype(np.int32))
    values_at, scales = pools.add_values(entries.values), _scales(pools, weights)
    at = pools.add_pointers(pointers)
    return [[BLOCKS, _storage(weights), low, high, values_at, index_at, at, entries.width, 0, scales, 0]]


def _pack_block_columns(pools: Pools, entries: _Entries, weights: BlockCSR, low: int, high: int) -> list[list[int]]:
    """Walked by column, the columns' share of many drives stays in the L1 cache."""
    width = entries.width
    order = np.lexsort((entries.unit, entries.column))
    first, last = -(-low // width), -(-max(high, low) // width)
    if high == weights.shape[1]:
        last = max(last, _up(high, weights.block[1]) // width)
    pointers = np.searchsorted(entries.column[order], np.arange(first, last + 1) * width)
    index_at = pools.add_index(entries.unit[order].astype(np.int32))
    values_at, scales = pools.add_values(entries.values[order]), _scales(pools, weights)
    at = pools.add_pointers(np.concatenate([[first, last], pointers]))
    return [[BLOCK_COLUMNS, _storage(weights), low, high, values_at, index_at, at, width, 0, scales, 0]]


def _pointers(rows: np.ndarray, n: int) -> np.ndarray:
    """Where each row begins among sorted `rows`; (n + 1,)."""
    return np.searchsorted(rows, np.arange(n + 1))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
