"""Packing of weights for the CPU kernels: all matrices of a network in three pools and a table of column tiles.

One set of pools serves every format, storage, layer and thread, so that each kernel is compiled once. A *column tile*
is some columns of a matrix (gate columns) that lie side by side in a drive row. Each thread owns some column tiles of
every matrix, and packs those only. Columns need not lie in a drive row as in the matrix; a `Segment` says where they
lie.

    kind           values                                       index                       pointers
    ROWS           rows of `WIDTH` columns, `PITCH` apart       -                           -
    ROW_TILES      as ROWS, narrow, `PITCH` equal to `WIDTH`    -                           -
    BLAS           as ROWS, all columns                         -                           -
    IN_PLACE       rows of the network's own array, which is    -                           the address of the array
                   not copied
    SCATTER        single weights by unit                       16-bit columns              per unit: first weight
    MASKED         single weights by unit                       16-bit masks, `PITCH`       per unit: first weight
                                                                words per unit
    SINGLE_TILES   single weights by panel of units, then unit  16-bit positions in a       per panel: first weight
                                                                dense panel
    BLOCKS         block segments of `WIDTH` columns, by unit   columns, shared by the      per unit: first and last
                                                                units of a block row        index, first segment
    FEW_BLOCKS     as BLOCKS, for few narrow segments per unit
    STRIPS         segments of 64 columns, by column and then by unit: `kernels/strips.py`
    INTEGER_BLOCKS segments of 64 columns, by unit and then by column: `kernels/integer_products.py`
    GATED          pieces of blocks, one after the other    -                           the header of `tables.py`,
                                                                                        then the pieces

ROW_TILES and SINGLE_TILES serve products of many drive rows at once, which share the weights that are read. If there
are `DENSE_FROM` or more active units per drive row, the kernel of ROW_TILES visits every unit instead of the active
ones. A zero changes no sum, and adding it then costs less than finding the active units. For the same reason the kernel
of SINGLE_TILES makes the weights of a panel dense, and adds whole vectors of them. Block segments that many drive rows
share are in tiles of `BLOCK_TILE_BYTES`, which the kernel takes one after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeGuard

import numpy as np

from eventrnn._integers import ceil_div, round_up
from eventrnn.cpu.kernels.simd import AVX512, LANES
from eventrnn.cpu.kernels.strip_events import QUADS
from eventrnn.cpu.memory import aligned_zeros
from eventrnn.cpu.tables import (
    BFLOAT16,
    BLAS,
    BLOCKS,
    CHUNK_EVENTS,
    CHUNK_PITCH,
    FEW_BLOCKS,
    FIELDS,
    FLOAT32,
    GATED,
    GATED_HEADER,
    GATED_PIECE,
    GROUP_FIELDS,
    GROUP_SEGMENTS,
    IN_PLACE,
    INT8,
    INTEGER_BLOCKS,
    LIST_WORDS,
    LISTED_STRIPS,
    MASKED,
    RANGE_UNITS,
    ROW_TILE,
    ROW_TILES,
    ROWS,
    SCATTER,
    SEGMENT_WIDTHS,
    SEGMENT_WORDS,
    SINGLE_TILES,
    SMALL_PANEL_BITS,
    STRIP_FIELDS,
    STRIP_GROUP,
    STRIPS,
    STRIPS_PER_WORD,
)
from eventrnn.weights import CSR, NM, BlockCSR, Dense, GatedBlocks, Weights

# Share of active units from which a tiled product visits every unit. A crossover map replaces this number.
DENSE_ACTIVITY_THRESHOLD = 0.5

# Columns of a strip, and units that 16 bits can number.
STRIP_COLUMNS, MOST_STRIP_UNITS = max(SEGMENT_WIDTHS), 1 << 16

# The number of columns that a 16-bit index of single weights can address.
WIDEST_SCATTER = 1 << 16

# Block segments of up to NARROW_SEGMENT columns are listed, and added from the list, if there are fewer than
# FEW_SEGMENTS per unit; others are added unit by unit. Measured at 512 units in 1x16 blocks, from the list and unit by
# unit: 5 segments per unit 0.80 us and 0.97 us, 10 of them 1.33 us and 1.23 us.
NARROW_SEGMENT, FEW_SEGMENTS = 16, 8

# Bytes of the block segments of a column tile from which events prefetch the weights of the next one: what may not stay
# in an L2 cache of 512 KB. Measured at 1350 units and 90 % pruned, with and without: 2.2 MB of 4x8 blocks 14.3 us
# against 15.8 us, and 0.55 MB of 1x32 blocks in int8 6.6 us against 8.0 us; 256 units, 79 KB of 1x64 blocks, 0.37 us
# against 0.33 us.
PREFETCHED_BYTES = 1 << 19

# Bytes of block-sparse weights in a column tile that many drive rows share: with the drives of these columns they stay
# in an L2 cache of 1 MB.
BLOCK_TILE_BYTES = 3 << 18

# Share of kept weights from which a mask per vector costs less than an index per weight. Measured at 1350 units: 72 us
# against 138 us at 50 %, 55 us against 59 us at 20 %, 52 us against 30 us at 10 %.
MASKED_FROM = 0.2

# Zeros after the last weight, because vector loads may read past it.
PADDING = 4 * LANES

_CODES = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}


@dataclass
class PoolBuilder:
    """Collects arrays for the pools of `WeightPools`; `freeze` concatenates them. Offsets count elements."""

    values: list[np.ndarray]
    index: list[np.ndarray]
    pointers: list[np.ndarray]
    sizes: list[int]
    once: dict[int, int] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> PoolBuilder:
        """A builder without arrays."""
        return cls([], [], [], [0, 0, 0])

    def add_values(self, values: np.ndarray) -> int:
        """Append weights of any storage, or scales; returns their offset, which is on a cache line."""
        raw = np.ascontiguousarray(values).view(np.uint8).ravel()
        padded = np.zeros(round_up(len(raw), 4 * LANES), np.uint8)
        padded[: len(raw)] = raw
        return self._add(0, self.values, padded.view(np.float32))

    def add_rows_once(self, array: np.ndarray) -> int:
        """Append rows (n, columns) of float32, padded to whole vectors, unless they are there; returns their offset.

        The caller keeps the array alive, by whose identity it is known.
        """
        if id(array) not in self.once:
            rows = np.zeros((len(array), round_up(array.shape[1], LANES)), np.float32)
            rows[:, : array.shape[1]] = array
            self.once[id(array)] = self.add_values(rows)
        return self.once[id(array)]

    def add_index(self, index: np.ndarray) -> int:
        """Append an index, int32 or uint16; two uint16 share an element. Returns its offset in int32."""
        if index.dtype == np.uint16:
            index = np.concatenate([index, np.zeros(len(index) % 2, np.uint16)]).view(np.int32)
        return self._add(1, self.index, index.astype(np.int32, copy=False))

    def add_pointers(self, pointers: np.ndarray) -> int:
        """Append pointers; returns their offset, which is on a cache line."""
        return self._add(2, self.pointers, _whole_lines(pointers))

    def _add(self, kind: int, pool: list[np.ndarray], array: np.ndarray) -> int:
        at = self.sizes[kind]
        pool.append(array)
        self.sizes[kind] += len(array)
        return at

    def freeze(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """values (float32, on a cache line), index (int32), and pointers (int64, likewise), padded for vector loads."""
        values = aligned_zeros(self.sizes[0] + PADDING, np.float32)
        np.concatenate([*self.values, np.zeros(0, np.float32)], out=values[: self.sizes[0]])
        pointers = aligned_zeros(self.sizes[2] + 1, np.int64)
        np.concatenate([*self.pointers, np.zeros(0, np.int64)], out=pointers[: self.sizes[2]])
        return values, np.concatenate([*self.index, np.zeros(4 * LANES, np.int32)]), pointers


@dataclass(frozen=True)
class Segment:
    """The columns `start` to `stop` of a matrix; they lie at `position` in a drive row."""

    start: int
    stop: int
    position: int


def pack(
    pools: PoolBuilder,
    weights: Weights,
    segments: list[Segment],
    dense_kind: int = ROWS,
    dense_activity_threshold: float = DENSE_ACTIVITY_THRESHOLD,
    held: tuple[int, int, int] = (1, 0, 0),
) -> list[list[int]]:
    """Add some columns of a matrix to the pools; returns the table rows of its column tiles, without `KERNEL`.

    Kernels may read a drive row, and write back the value they read, up to one block past the last segment.

    segments   : columns to pack, ascending, side by side in a drive row
    dense_kind : kind of column tile for dense weights: ROWS, ROW_TILES, BLAS or, for float32, IN_PLACE. With ROW_TILES
                 single weights get SINGLE_TILES, and block segments get several tiles of kind BLOCKS or FEW_BLOCKS.
                 INTEGER_BLOCKS for block segments that `takes_integers` admits; STRIPS for those that `takes_strips`
                 admits, if they fill the segments side by side
    dense_activity_threshold : activity from which ROW_TILES visit every unit
    held       : of gated blocks, the fields from PERIOD on (`HeldLayout.header`)
    """
    if isinstance(weights, Dense) and dense_kind == IN_PLACE:
        return [_in_place(weights, each) for each in segments]
    if isinstance(weights, Dense):
        return _pack_rows(pools, weights, segments, dense_kind, dense_activity_threshold)
    if isinstance(weights, GatedBlocks):
        return [_pack_gated(pools, weights, segments, held)]
    if is_single(weights) and dense_kind == ROW_TILES:
        entries = _Entries.of_blocks(weights) if isinstance(weights, BlockCSR) else _Entries.of_single(weights)
        return _pack_single_tiles(pools, entries.placed(segments), weights, segments)
    if not isinstance(weights, BlockCSR):
        return _pack_single(pools, _Entries.of_single(weights).placed(segments), weights, segments)
    entries = _Entries.of_blocks(weights)
    if entries.width == 1:
        # Padding beyond the last column is stored, and therefore multiplied.
        last = segments[-1]
        padded = round_up(last.stop, weights.block[1]) if last.stop == weights.shape[1] else last.stop
        segments_padded = [*segments[:-1], Segment(last.start, padded, last.position)]
        return _pack_single(pools, entries.placed(segments_padded), weights, segments)
    groups = _column_groups(weights, segments) if dense_kind == ROW_TILES else [segments]
    placed = [entries.placed(group) for group in groups]
    if dense_kind == INTEGER_BLOCKS:
        return [_pack_integers(pools, placed[0], weights, segments)]
    if dense_kind == STRIPS and _side_by_side(placed[0], segments):
        return [_pack_strips(pools, placed[0], weights, segments)]
    return [_pack_blocks(pools, each, weights, group) for each, group in zip(placed, groups, strict=True)]


def check_format(name: str, weights: Weights) -> None:
    """Raise TypeError for a format that `pack` does not support."""
    if not isinstance(weights, Dense | CSR | BlockCSR | NM | GatedBlocks):
        raise TypeError(
            f"{name}: the cpu backend cannot run format {type(weights).__name__}; convert to dense, csr, block or nm"
        )


def is_single(weights: Weights) -> bool:
    """Whether a matrix is packed as single weights: CSR, N:M, and blocks that no segment width divides."""
    return isinstance(weights, CSR | NM) or (isinstance(weights, BlockCSR) and _segment_width(weights) == 1)


def takes_strips(weights: Weights) -> TypeGuard[BlockCSR]:
    """Whether a matrix has segments that kernels of strips add, and few enough units to number them in 16 bits."""
    return (
        isinstance(weights, BlockCSR) and weights.block[1] % STRIP_COLUMNS == 0 and weights.shape[0] <= MOST_STRIP_UNITS
    )


def empty_column_tile() -> list[int]:
    """The table row of a column tile without columns."""
    return [ROWS, *[0] * (FIELDS - 1)]


@dataclass
class _Entries:
    """Weights of a matrix as `n` block segments of `width` neighbouring columns each, ordered by unit, then column.

    unit   : (n,) int32, presynaptic unit
    column : (n,) int32, first column; after `placed`, first position in a drive row
    values : (n, width) in the storage of the matrix
    rows   : units per block row, which share their columns
    """

    unit: np.ndarray
    column: np.ndarray
    values: np.ndarray
    rows: int

    @property
    def width(self) -> int:
        """Columns of an entry."""
        return self.values.shape[1]

    def placed(self, segments: list[Segment]) -> _Entries:
        """The entries within some segments, by position; zeros fill an entry that crosses the end of its segment."""
        if (
            len(segments) == 1
            and segments[0].start == 0
            and int(self.column.max(initial=0)) <= segments[0].stop - self.width
        ):
            return _Entries(self.unit, self.column + segments[0].position, self.values, self.rows)
        placed = []
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
            placed.append((inside, self.unit[inside], position, values))
        if len(placed) == 1:
            _, unit, position, values = placed[0]
            return _Entries(unit, position, values, self.rows)
        source, unit, position, values = (np.concatenate(each) for each in zip(*placed, strict=True))
        order = np.lexsort((position, unit))
        return _Entries(unit[order], position[order], values[order], self.rows)

    @classmethod
    def of_single(cls, weights: Weights) -> _Entries:
        """The stored weights of a CSR or NM matrix, one per entry."""
        return cls(*weights.places(), weights.values.reshape(-1, 1), 1)

    @classmethod
    def of_blocks(cls, weights: BlockCSR) -> _Entries:
        """The blocks of a matrix, cut into segments of the widest of `SEGMENT_WIDTHS` that divides their width."""
        r, c = weights.block
        width = _segment_width(weights)
        unit, column = weights.segments()
        # The last block row may be padded with units that do not exist; their values are the last.
        exist = int(np.searchsorted(unit, np.int32(weights.shape[0])))
        unit, column = np.repeat(unit[:exist], c // width), column[:exist] * np.int32(c)
        column = (column[:, None] + np.arange(0, c, width, dtype=np.int32)).ravel()
        return cls(unit, column, weights.values[: exist * c].reshape(-1, width), r if width > 1 else 1)


def _segment_width(weights: BlockCSR) -> int:
    """The widest of `SEGMENT_WIDTHS` that divides the width of the blocks, or 1."""
    return next((w for w in SEGMENT_WIDTHS if weights.block[1] % w == 0), 1)


def _storage(weights: Weights) -> int:
    """The code of a matrix's storage."""
    return _CODES[weights.storage]


def _scales(pools: PoolBuilder, weights: Weights) -> int:
    """Add the scales of a matrix to the pools; returns their offset, or 0 for a storage without scales."""
    return pools.add_values(weights.scales) if weights.scales is not None else 0


def _pack_rows(
    pools: PoolBuilder, weights: Dense, segments: list[Segment], kind: int, dense_activity_threshold: float
) -> list[list[int]]:
    """Dense weights, as column tiles of kind ROWS, ROW_TILES or BLAS."""
    storage, scales = _storage(weights), _scales(pools, weights)
    values = weights.values
    if len(segments) > 1 or (segments[0].start, segments[0].stop) != (0, weights.shape[1]):
        values = np.concatenate([values[:, each.start : each.stop] for each in segments], axis=1)
    low, total = segments[0].position, values.shape[1]
    table, dense_from = [], math.ceil(dense_activity_threshold * weights.shape[0])
    cuts = [*range(0, total, ROW_TILE), total] if kind == ROW_TILES else [0, total]
    for a, b in zip(cuts[:-1], cuts[1:], strict=True):
        width = pitch = b - a if kind == BLAS else round_up(b - a, LANES)
        if kind == ROWS:
            # An odd number of cache lines per row, because rows a power of two apart would share cache sets.
            lines = ceil_div(pitch * values.itemsize, 64)
            pitch = (lines + (lines % 2 == 0)) * 64 // values.itemsize
        rows = np.zeros((weights.shape[0], pitch), values.dtype)
        rows[:, : b - a] = values[:, a:b]
        at = pools.add_values(rows)
        table.append([kind, storage, low + a, low + b, at, 0, 0, width, pitch, scales, dense_from, 0])
    return table or [empty_column_tile()]


def _in_place(weights: Dense, segment: Segment) -> list[int]:
    """Columns of dense float32 weights that stay where they are. The caller keeps them alive, and unchanged."""
    width, address = segment.stop - segment.start, weights.values.ctypes.data
    low, whole = segment.position, width // LANES * LANES
    return [IN_PLACE, FLOAT32, low, low + width, segment.start, 0, address, whole, weights.shape[1], 0, 0, 0]


def _pack_single(pools: PoolBuilder, entries: _Entries, weights: Weights, segments: list[Segment]) -> list[list[int]]:
    """Single weights, as column tiles of kind MASKED or SCATTER, whichever costs less."""
    table, low, high = [], *_bounds(segments)
    # Padding beyond the last column has no bit in a mask; it may extend the range of an index.
    top = max(high, int(entries.column.max(initial=0)) + 1)
    for a in range(low, top, WIDEST_SCATTER):
        b = min(a + WIDEST_SCATTER, top)
        inside = slice(None)
        if (a, b) != (low, top):
            inside = (entries.column >= a) & (entries.column < b)
        share = _Entries(entries.unit[inside], entries.column[inside] - a, entries.values[inside], 1)
        dense = AVX512 and b <= high and len(share.unit) >= MASKED_FROM * weights.shape[0] * (b - a)
        # The kernel copies the bias to the positions `a` to `b`, so they must end where the outputs end.
        b = min(b, max(a, high))
        table.append((_pack_masked if dense else _pack_scatter)(pools, share, weights, a, b))
    return table or [empty_column_tile()]


def _pack_scatter(pools: PoolBuilder, entries: _Entries, weights: Weights, low: int, high: int) -> list[int]:
    """A column tile of single weights with one 16-bit column each."""
    index_at = pools.add_index(entries.column.astype(np.uint16))
    values_at, scales = pools.add_values(entries.values), _scales(pools, weights)
    at = pools.add_pointers(_pointers(entries.unit, weights.shape[0]))
    return [SCATTER, _storage(weights), low, high, values_at, index_at, at, 1, 0, scales, 0, 0]


def _pack_masked(pools: PoolBuilder, entries: _Entries, weights: Weights, low: int, high: int) -> list[int]:
    """A column tile of single weights with one mask per unit and vector of columns."""
    vectors = round_up(high - low, LANES) // LANES
    kept = np.zeros((weights.shape[0], vectors * LANES), bool)
    kept[entries.unit, entries.column] = True
    masks = np.packbits(kept, axis=1, bitorder="little").view("<u2").astype(np.uint16)
    at = pools.add_pointers(_pointers(entries.unit, weights.shape[0]))
    values_at, scales = pools.add_values(entries.values), _scales(pools, weights)
    return [
        *(MASKED, _storage(weights), low, high),
        *(values_at, pools.add_index(masks.ravel()), at, 1, vectors, scales, 0, 0),
    ]


def _pack_single_tiles(
    pools: PoolBuilder, entries: _Entries, weights: Weights, segments: list[Segment]
) -> list[list[int]]:
    """Single weights, as column tiles of kind SINGLE_TILES. Entries lie within the segments, without padding."""
    low, high = _bounds(segments)
    panels, tiles = ceil_div(weights.shape[0], 1 << SMALL_PANEL_BITS), ceil_div(high - low, ROW_TILE)
    tile, column = np.divmod(entries.column - low, ROW_TILE)
    # NumPy sorts short integers in linear time.
    order = np.argsort(tile.astype(np.uint16 if tiles < 1 << 16 else np.int64), kind="stable")
    unit = entries.unit[order]
    panel = tile[order].astype(np.int64) * panels + (unit >> SMALL_PANEL_BITS)
    position = (unit & ((1 << SMALL_PANEL_BITS) - 1)) * ROW_TILE + column[order]
    values_at, scales = pools.add_values(entries.values[order]), _scales(pools, weights)
    index_at, at = pools.add_index(position.astype(np.uint16)), pools.add_pointers(_pointers(panel, tiles * panels))
    return [
        [
            *(SINGLE_TILES, _storage(weights), a, b, values_at, index_at, at + k * panels),
            *(round_up(b - a, LANES), ROW_TILE, scales, 0, 0),
        ]
        for k, a in enumerate(range(low, high, ROW_TILE))
        for b in (min(a + ROW_TILE, high),)
    ] or [empty_column_tile()]


def _pack_blocks(pools: PoolBuilder, entries: _Entries, weights: BlockCSR, segments: list[Segment]) -> list[int]:
    """Block segments of some neighbouring columns, as a column tile of kind BLOCKS or FEW_BLOCKS."""
    first = _pointers(entries.unit, weights.shape[0])
    # The units of a block row share their columns, so the index of the first unit serves all.
    leaders = entries.unit % entries.rows == 0
    index_first = np.concatenate([[0], np.cumsum(leaders)])[first]
    unit = np.arange(weights.shape[0])
    leader = unit - unit % entries.rows
    pointers = np.stack([index_first[leader], index_first[leader + 1], first[:-1]], axis=1).ravel()
    index_at = pools.add_index(entries.column[leaders].astype(np.int32))
    values_at, scales = pools.add_values(entries.values), _scales(pools, weights)
    at = pools.add_pointers(pointers)
    far = int(entries.values.nbytes >= PREFETCHED_BYTES)
    few = entries.width <= NARROW_SEGMENT and len(entries.unit) < FEW_SEGMENTS * len(unit)
    kind = FEW_BLOCKS if few else BLOCKS
    return [kind, _storage(weights), *_bounds(segments), values_at, index_at, at, entries.width, far, scales, 0, 0]


def _side_by_side(entries: _Entries, segments: list[Segment]) -> bool:
    """Whether strips of the entries, without a gap or an overlap, are all columns of the segments."""
    return bool(((entries.column - segments[0].position) % entries.width == 0).all())


def _pack_integers(pools: PoolBuilder, entries: _Entries, weights: BlockCSR, segments: list[Segment]) -> list[int]:
    """Block segments of some neighbouring columns, as a column tile of kind INTEGER_BLOCKS."""
    n_pre, (low, high), whole = weights.shape[0], _bounds(segments), _side_by_side(entries, segments)
    positions = np.arange(low, high, entries.width) if whole else np.unique(entries.column)
    words, chunks = ceil_div(len(positions), STRIPS_PER_WORD), ceil_div(n_pre, CHUNK_EVENTS)
    kept = np.zeros((n_pre, words * STRIPS_PER_WORD), bool)
    kept[entries.unit, np.searchsorted(positions, entries.column)] = True
    bits = np.packbits(kept, axis=1, bitorder="little").view(np.int64)
    units = np.concatenate([SEGMENT_WORDS * _pointers(entries.unit, n_pre)[:-1, None], bits], axis=1)
    # Seven arrays by event, or six and bytes by strip; counts and lists.
    scratch = (chunks + 1) * (7 * CHUNK_PITCH + LISTED_STRIPS * (1 + LIST_WORDS))
    parts = positions, units.ravel(), np.zeros(scratch, np.int64)
    at = pools.add_pointers(np.concatenate([_whole_lines(each) for each in parts]))
    values = entries.values
    if QUADS:
        # Interleaving bytes within quarters of a vector exchanges these axes of the columns; so they lie exchanged.
        values = np.ascontiguousarray(values.reshape(-1, 4, 4, 4).transpose(0, 2, 1, 3))
    table = [INTEGER_BLOCKS, _storage(weights), low, high, pools.add_values(values), 0, at]
    return [*table, weights.integer_bits(), len(positions), _scales(pools, weights), int(whole), 0]


def _whole_lines(words: np.ndarray) -> np.ndarray:
    """Words of 64 bits, with zeros up to a whole number of cache lines."""
    return np.concatenate([words.astype(np.int64, copy=False), np.zeros(-len(words) % 8, np.int64)])


def _pack_strips(pools: PoolBuilder, entries: _Entries, weights: BlockCSR, segments: list[Segment]) -> list[int]:
    """Block segments of some neighbouring columns, as a column tile of kind STRIPS."""
    order = np.lexsort((entries.unit, entries.column))
    unit, column, values = entries.unit[order].astype(np.int64), entries.column[order], entries.values[order]
    low, high = _bounds(segments)
    whole = _side_by_side(entries, segments)
    positions = np.arange(low, high, entries.width) if whole else np.unique(column)
    base = np.searchsorted(column, positions)
    strip = np.searchsorted(positions, column)
    within = np.arange(len(unit)) - base[strip]
    # A group begins with a strip, with a range of units, and after 64 segments of a range.
    ranges = strip * ceil_div(weights.shape[0], RANGE_UNITS) + unit // RANGE_UNITS
    _, range_begin, number = np.unique(ranges, return_index=True, return_inverse=True)
    lane = (np.arange(len(unit)) - range_begin[number]) % GROUP_SEGMENTS
    heads = np.flatnonzero(lane == 0)
    group = np.cumsum(lane == 0) - 1
    tests = np.zeros((len(heads), 2, GROUP_SEGMENTS), np.uint8)
    tests[group, 0, lane], tests[group, 1, lane] = unit % RANGE_UNITS // 8, 1 << unit % 8
    strips = np.zeros((len(positions) + 1, STRIP_FIELDS), np.int64)
    strips[:-1, :] = np.stack([positions, np.searchsorted(strip[heads], np.arange(len(positions))), base], axis=1)
    strips[-1, STRIP_GROUP] = len(heads)
    groups = np.zeros((len(heads) + 1, GROUP_FIELDS), np.int64)
    groups[1:, 0] = unit[heads] // RANGE_UNITS * (RANGE_UNITS // 8)
    groups[1:, 1], groups[1:, 2] = within[heads], np.diff(np.append(heads, len(unit)))
    fired = ceil_div(weights.shape[0], RANGE_UNITS) * (RANGE_UNITS // 64)
    # Of the list of the strip after the last one, the kernel reads as many numbers as the last one has.
    space = fired + ceil_div(len(unit) + int(within.max(initial=0)) + 1 + GROUP_SEGMENTS, 4)
    at = pools.add_pointers(np.concatenate([strips.ravel(), groups.ravel(), np.zeros(space, np.int64)]))
    index_at = pools.add_index(unit.astype(np.uint16))
    values_at = pools.add_values(np.concatenate([tests.ravel(), values.view(np.uint8).ravel()]))
    scales = _scales(pools, weights)
    table = [STRIPS, _storage(weights), low, high, values_at, index_at, at]
    return [*table, entries.width, len(positions), scales, 0, 0]


def _column_groups(weights: BlockCSR, segments: list[Segment]) -> list[list[Segment]]:
    """Segments in groups of about as many columns, cut between blocks, whose weights are at most `BLOCK_TILE_BYTES`."""
    columns, grid = sum(each.stop - each.start for each in segments), weights.block[1]
    parts = ceil_div(columns * weights.values.nbytes // weights.shape[1], BLOCK_TILE_BYTES)
    most = round_up(ceil_div(columns, max(1, parts)), grid)
    groups: list[list[Segment]] = [[]]
    left = most
    for each in segments:
        start = each.start
        while start < each.stop:
            stop = min(each.stop, (start + left) // grid * grid)
            if stop > start:
                groups[-1].append(Segment(start, stop, each.position + start - each.start))
                start, left = stop, left - (stop - start)
            if start < each.stop:
                groups.append([])
                left = most
    return groups


def _pack_gated(
    pools: PoolBuilder, weights: GatedBlocks, segments: list[Segment], held: tuple[int, int, int]
) -> list[int]:
    """The stored blocks, cut into pieces at the ends of the segments, as one column tile of kind GATED.

    All threads share one copy of the gate.
    """
    (r, c), (rows, columns), blocks = weights.block, weights.grid, weights.blocks
    stored = blocks.values.reshape(-1, c)
    pieces, packed, first, size = [], [], [0], 0
    for row, (a, b) in enumerate(zip(blocks.indptr[:-1], blocks.indptr[1:], strict=True)):
        for q in range(int(a), int(b)):
            column = int(blocks.indices[q])
            # The rows of a block lie one block row of its block row apart.
            block = stored[int(a) * r + q - int(a) : int(b) * r : int(b - a)]
            for low, high, position in _pieces(column * c, c, segments):
                vectors = round_up(high - low, LANES) // LANES
                piece = np.zeros((r, vectors * LANES), stored.dtype)
                piece[:, : high - low] = block[:, low - column * c : high - column * c]
                pieces.append((row * columns + column, position, size, vectors))
                packed.append(piece.ravel())
                size += piece.size
        first.append(len(pieces))
    values_at = pools.add_values(np.concatenate([*packed, np.zeros(0, stored.dtype)]))
    pitch, out = round_up(weights.n_blocks, LANES), weights.gate_out
    header = (
        *(0, weights.n_blocks, weights.kept_blocks, int(weights.gate_rule == "softmax"), rows, r),
        *(pitch, pools.add_values(_padded_bias(weights.gate_bias, pitch))),
        *(pools.add_rows_once(weights.gate), round_up(weights.gate.shape[1], LANES)),
        *((0, 0) if out is None else (len(out), pools.add_rows_once(out))),
        *held,
    )
    assert len(header) == GATED_HEADER
    at = pools.add_pointers(np.array([*header, *first, *(number for piece in pieces for number in piece)]))
    return [GATED, _storage(weights), *_bounds(segments), values_at, 0, at, 0, 0, _scales(pools, weights), 0, 0]


def _pieces(start: int, width: int, segments: list[Segment]) -> list[tuple[int, int, int]]:
    """First and last column, and position in a drive row, of the pieces of a block's columns in some segments."""
    cut = [(max(start, each.start), min(start + width, each.stop), each) for each in segments]
    return [
        (low, min(low + GATED_PIECE, high), each.position + low - each.start)
        for begin, high, each in cut
        for low in range(begin, high, GATED_PIECE)
    ]


def _padded_bias(bias: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([bias, np.zeros(size - len(bias), np.float32)])


def _bounds(segments: list[Segment]) -> tuple[int, int]:
    """First position of some segments, and the position after their last."""
    return segments[0].position, segments[-1].position + segments[-1].stop - segments[-1].start


def _pointers(rows: np.ndarray, n: int) -> np.ndarray:
    """Offsets (n + 1,) at which each of n rows begins among the sorted `rows`."""
    return np.searchsorted(rows, np.arange(n + 1, dtype=rows.dtype))
