"""Weights laid out for the CPU kernels: every matrix of a network in three pools and one table of offsets.

One set of pools serves every format, storage, layer and thread, so that one kernel is compiled once. A *window* is some
of a matrix's columns (gate rows), side by side in a drive; each thread owns some windows of every matrix and packs just
those. Columns need not lie in a drive as they do in the matrix: a `Segment` says what lies where.

    kind           values                                       index                    pointers
    ROWS           rows of `WIDTH` columns, `PITCH` apart       -                        -
    ROW_TILES      the same, narrow and without a gap           -                        -
    BLAS           the same, all columns                        -                        -
    SCATTER        single weights by unit                       16-bit columns           first weight of each unit
    MASKED         single weights by unit                       16-bit masks, `PITCH`    first weight of each unit
                                                                a unit
    BLOCKS         pieces of `WIDTH` columns by unit            columns, shared by the   a unit: first and last index,
                                                                units of a block row     first piece
    MANY_BLOCKS    the same, of units with many and narrow pieces

ROW_TILES are for products with many drives at once, which share what is read. With `EVERY_FROM` or
more active units a drive, ROW_TILES walk every unit instead of the active ones: zeros add nothing, and cost less than
looking for what is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from eventrnn.cpu.kernels.simd import AVX512, LANES
from eventrnn.cpu.memory import _up, aligned_zeros
from eventrnn.cpu.tables import (
    BFLOAT16,
    BLAS,
    BLOCKS,
    FIELDS,
    FLOAT32,
    INT8,
    MANY_BLOCKS,
    MASKED,
    PIECES,
    ROW_TILE,
    ROW_TILES,
    ROWS,
    SCATTER,
)
from eventrnn.weights import CSR, NM, BlockCSR, Dense, Weights

# From this share of active units on, every unit is walked, until a crossover map says otherwise.
EVERY_FROM_SHARE = 0.5

# Indices of single weights are 16-bit.
WIDEST_SCATTER = 1 << 16

# Pieces of up to so many columns, so many a unit or more, are added unit by unit and not from a list (measured at 1350
# units and 90 %: 1x4 13.8 us against 18.0, 1x8 9.5 against 10.5; with ten a unit the list takes two thirds the time).
NARROW_PIECE, MANY_PIECES = 16, 32

# A mask a vector costs less than an index a weight from this share of kept weights on (measured at 1350 units:
# 50 % 72 us against 138, 20 % 55 against 59, 10 % 52 against 30).
MASKED_FROM = 0.2

# Floats after the last weight, which vectors may read.
PADDING = 4 * LANES

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
        values = aligned_zeros(self.sizes[0] + PADDING, np.float32)
        np.concatenate([*self.values, np.zeros(0, np.float32)], out=values[: self.sizes[0]])
        return (
            values,
            np.concatenate([*self.index, np.zeros(4 * LANES, np.int32)]),
            np.concatenate([*self.pointers, np.zeros(1, np.int64)]),
        )


@dataclass(frozen=True)
class Segment:
    """The columns `start` to `stop` of a matrix, in a drive from `position` on."""

    start: int
    stop: int
    position: int


def pack(
    pools: Pools, weights: Weights, segments: list[Segment], rows: int = ROWS, every_from: float = EVERY_FROM_SHARE
) -> list[list[int]]:
    """Add some columns of a matrix to the pools; returns the table rows of its windows.

    Segments lie side by side and ascend. `rows` is the kind of window for dense rows: ROWS, ROW_TILES or BLAS. A drive
    may be read and written, its value unchanged, up to a block past the last segment.
    """
    if isinstance(weights, Dense):
        return _pack_rows(pools, weights, segments, rows, every_from)
    if not isinstance(weights, BlockCSR):
        return _pack_single(pools, _Entries.of_single(weights).placed(segments), weights, segments)
    entries = _Entries.of_blocks(weights)
    if entries.width == 1:
        # Padding beyond the last column is stored, hence multiplied.
        last = segments[-1]
        padded = _up(last.stop, weights.block[1]) if last.stop == weights.shape[1] else last.stop
        segments_padded = [*segments[:-1], Segment(last.start, padded, last.position)]
        return _pack_single(pools, entries.placed(segments_padded), weights, segments)
    return _pack_blocks(pools, entries.placed(segments), weights, segments)


def check_format(name: str, weights: Weights) -> None:
    """Refuse a format that `pack` does not know."""
    if not isinstance(weights, Dense | CSR | BlockCSR | NM):
        raise TypeError(
            f"{name}: the cpu backend cannot run format {type(weights).__name__}; convert to dense, csr, block or nm"
        )


def empty_window() -> list[int]:
    """A table row of no columns."""
    return [ROWS, *[0] * (FIELDS - 1)]


@dataclass
class _Entries:
    """Weights of a matrix in the order unit, column: pieces of `width` neighbouring columns each.

    unit, column : (n,) presynaptic unit, and first column (once placed: position in a drive) of each
    values       : (n, width) in the storage of the matrix
    rows         : units of a block row, which have the same columns
    """

    unit: np.ndarray
    column: np.ndarray
    values: np.ndarray
    rows: int

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def placed(self, segments: list[Segment]) -> _Entries:
        """What lies in some segments, by position. A piece that leaves its segment is cut, and filled with zeros."""
        parts = []
        for segment in segments:
            left = np.maximum(segment.start - self.column, 0)
            right = np.minimum(segment.stop - self.column, self.width)
            inside = np.flatnonzero(left < right)
            left, right, values = left[inside], right[inside], self.values[inside]
            cut = (left > 0) | (right < self.width)
            if cut.any():
                source = left[cut, None] + np.arange(self.width)
                moved = np.take_along_axis(values[cut], np.minimum(source, self.width - 1), axis=1)
                values[cut] = np.where(source < right[cut, None], moved, values.dtype.type(0))
            position = self.column[inside] + left - segment.start + segment.position
            parts.append((inside, self.unit[inside], position, values))
        if len(parts) == 1:
            _, unit, position, values = parts[0]
            return _Entries(unit, position, values, self.rows)
        source, unit, position, values = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.lexsort((position, unit))
        return _Entries(unit[order], position[order], values[order], self.rows)

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
        unit = np.repeat(unit, pieces)
        column = (column[:, None] + np.arange(pieces) * width).ravel()
        # Not the units that pad the last block row.
        there = unit < weights.shape[0]
        values = weights.values.reshape(-1, width)[there]
        return cls(unit[there], column[there], values, r if width > 1 else 1)


def _storage(weights: Weights) -> int:
    return _CODES[weights.storage]


def _scales(pools: Pools, weights: Weights) -> int:
    return pools.add_values(weights.scales) if weights.scales is not None else 0


def _pack_rows(pools: Pools, weights: Dense, segments: list[Segment], kind: int, every_from: float) -> list[list[int]]:
    storage, scales = _storage(weights), _scales(pools, weights)
    values = weights.values
    if len(segments) > 1 or (segments[0].start, segments[0].stop) != (0, weights.shape[1]):
        values = np.concatenate([values[:, each.start : each.stop] for each in segments], axis=1)
    low, total = segments[0].position, values.shape[1]
    table, units = [], math.ceil(every_from * weights.shape[0])
    cuts = [*range(0, total, ROW_TILE), total] if kind == ROW_TILES else [0, total]
    for a, b in zip(cuts[:-1], cuts[1:], strict=True):
        width = pitch = b - a if kind == BLAS else _up(b - a, LANES)
        if kind == ROWS:
            # An odd number of cache lines a row: rows a power of two apart would share cache sets.
            lines = -(-pitch * values.itemsize // 64)
            pitch = (lines + (lines % 2 == 0)) * 64 // values.itemsize
        rows = np.zeros((weights.shape[0], pitch), values.dtype)
        rows[:, : b - a] = values[:, a:b]
        at = pools.add_values(rows)
        table.append([kind, storage, low + a, low + b, at, 0, 0, width, pitch, scales, units])
    return table or [empty_window()]


def _pack_single(pools: Pools, entries: _Entries, weights: Weights, segments: list[Segment]) -> list[list[int]]:
    """Single weights: by mask or by index, whichever is less work."""
    table, low, high = [], *_bounds(segments)
    # Padding beyond the last column has no bit in a mask, and counts where an index ends.
    top = max(high, int(entries.column.max(initial=0)) + 1)
    for a in range(low, top, WIDEST_SCATTER):
        b = min(a + WIDEST_SCATTER, top)
        inside = (entries.column >= a) & (entries.column < b)
        part = _Entries(entries.unit[inside], entries.column[inside] - a, entries.values[inside], 1)
        dense = AVX512 and b <= high and len(part.unit) >= MASKED_FROM * weights.shape[0] * (b - a)
        # The drive begins as its bias as far as there are outputs.
        b = min(b, max(a, high))
        table.append((_pack_masked if dense else _pack_scatter)(pools, part, weights, a, b))
    return table or [empty_window()]


def _pack_scatter(pools: Pools, entries: _Entries, weights: Weights, low: int, high: int) -> list[int]:
    index_at = pools.add_index(entries.column.astype(np.uint16))
    values_at, scales = pools.add_values(entries.values), _scales(pools, weights)
    at = pools.add_pointers(_pointers(entries.unit, weights.shape[0]))
    return [SCATTER, _storage(weights), low, high, values_at, index_at, at, 1, 0, scales, 0]


def _pack_masked(pools: Pools, entries: _Entries, weights: Weights, low: int, high: int) -> list[int]:
    vectors = _up(high - low, LANES) // LANES
    kept = np.zeros((weights.shape[0], vectors * LANES), bool)
    kept[entries.unit, entries.column] = True
    masks = np.packbits(kept, axis=1, bitorder="little").view("<u2").astype(np.uint16)
    at = pools.add_pointers(_pointers(entries.unit, weights.shape[0]))
    values_at, scales = pools.add_values(entries.values), _scales(pools, weights)
    return [
        *(MASKED, _storage(weights), low, high),
        *(values_at, pools.add_index(masks.ravel()), at, 1, vectors, scales, 0),
    ]


def _pack_blocks(pools: Pools, entries: _Entries, weights: BlockCSR, segments: list[Segment]) -> list[list[int]]:
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
    many = entries.width <= NARROW_PIECE and len(unit) * MANY_PIECES <= len(entries.unit)
    kind = MANY_BLOCKS if many else BLOCKS
    return [[kind, _storage(weights), *_bounds(segments), values_at, index_at, at, entries.width, 0, scales, 0]]


def _bounds(segments: list[Segment]) -> tuple[int, int]:
    """The positions that segments take up."""
    return segments[0].position, segments[-1].position + segments[-1].stop - segments[-1].start


def _pointers(rows: np.ndarray, n: int) -> np.ndarray:
    """Where each row begins among sorted `rows`; (n + 1,)."""
    return np.searchsorted(rows, np.arange(n + 1))
