"""The sparsity pattern of a weight matrix, and the matrix packed for the training kernels.

A `Pattern` is made from a mask and is used until the mask changes. Parameters stay dense arrays. In each window the
stored weights are copied from them to a `PackedMatrix`, in the layout of `cpu/packing.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eventrnn.cpu.kernels.products import product_address
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.memory import aligned_zeros
from eventrnn.cpu.packing import DENSE_ACTIVITY_THRESHOLD, empty_column_tile
from eventrnn.cpu.plan import SHARED_EVENTS
from eventrnn.cpu.tables import (
    BLOCKS,
    DENSE_FROM,
    FIELDS,
    FLOAT32,
    HIGH,
    INDEX,
    KERNEL,
    KIND,
    LOW,
    PITCH,
    POINTERS,
    ROW_TILE,
    ROW_TILES,
    ROWS,
    SCATTER,
    STORAGE,
    VALUES,
    WIDTH,
    WeightPools,
)
from eventrnn.cpu.threads import Team
from eventrnn.training.bptt.kernels import spmm
from eventrnn.training.bptt.kernels.records import ALL, SEGMENTS, SINGLE, PackedWeights

# A mask is stored in segments of the widest of these widths of which it consists.
SEGMENT_WIDTHS = (64, 32, 16)

# Above these shares of kept weights, products read all weights. These are rules of thumb and were not measured.
SEGMENTS_UP_TO, SINGLE_UP_TO = 0.5, 0.15

# The activity to which networks are usually trained, in events per unit and step. It selects the kind of column tile of
# dense weights: with SHARED_EVENTS or more events per unit and step over all samples, drives share the rows they read.
USUAL_ACTIVITY = 0.1


@dataclass
class Pattern:
    """The weights of a matrix (n_pre, columns) that products read, and the weights that are kept.

    Attributes
    ----------
    shape   : (n_pre, columns)
    cut     : first column of the candidate
    layout  : ALL, SEGMENTS (of `width` neighbouring columns each) or SINGLE
    width   : columns of a segment; 1 for SINGLE, 0 for ALL
    units, columns, valid : (stored,) int32 presynaptic unit, first column and number of columns of each stored entry,
              in the order unit, column; empty for ALL. No entry crosses `cut`
    kept    : (n_pre,) int64 kept weights per unit, which count as effective
    """

    shape: tuple[int, int]
    cut: int
    layout: int
    width: int
    units: np.ndarray
    columns: np.ndarray
    valid: np.ndarray
    kept: np.ndarray
    # Index arrays that follow from the fields above; they are computed at their first use.
    cached: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, mask: np.ndarray | None, shape: tuple[int, int], cut: int, always: bool = False) -> Pattern:
        """The pattern of a boolean mask; None keeps all weights.

        always : do not choose the layout ALL for a mask, however many weights it keeps
        """
        none = np.zeros(0, np.int32)
        if mask is None:
            return cls(shape, cut, ALL, 0, none, none, none, np.full(shape[0], shape[1], np.int64))
        kept = mask.sum(axis=1, dtype=np.int64)
        density = kept.sum() / max(1, mask.size)
        for width in SEGMENT_WIDTHS:
            grid = _segments(mask, width)
            if grid is not None:
                layout = SEGMENTS
                break
        else:
            width, grid, layout = 1, mask, SINGLE
        if not always and density > (SEGMENTS_UP_TO if layout == SEGMENTS else SINGLE_UP_TO):
            return cls(shape, cut, ALL, 0, none, none, none, kept)
        units, numbers = np.nonzero(grid)
        starts = numbers * width
        stops = np.minimum(starts + width, shape[1])
        crossing = (starts < cut) & (stops > cut)
        units = np.concatenate([units, units[crossing]])
        columns = np.concatenate([starts, np.full(crossing.sum(), cut)])
        ends = np.concatenate([np.where(crossing, cut, stops), stops[crossing]])
        order = np.lexsort((columns, units))
        units, columns, valid = (a[order].astype(np.int32) for a in (units, columns, ends - columns))
        return cls(shape, cut, layout, width, units, columns, valid, kept)

    @property
    def stored(self) -> int:
        """The number of weights that a product reads, the padding of segments included."""
        return self.shape[0] * self.shape[1] if self.layout == ALL else len(self.units) * self.width

    def executed_out(self) -> np.ndarray:
        """Multiplications of a product per event or open path of a unit, padding of segments included, (n_pre,) int64.

        The counts of the backward pass use it. Together the units have `stored`.
        """
        if self.layout == ALL:
            return np.full(self.shape[0], self.shape[1], np.int64)
        return np.bincount(self.units, minlength=self.shape[0]).astype(np.int64) * self.width

    def bounds(self, low: int, high: int) -> np.ndarray:
        """First and past-the-last entry of each unit among those whose columns lie in `low` to `high`, (2 * n_pre,)."""
        if ("bounds", low, high) not in self.cached:
            key = self.units.astype(np.int64) * (self.shape[1] + 1) + self.columns
            unit = np.arange(self.shape[0], dtype=np.int64) * (self.shape[1] + 1)
            both = np.stack([np.searchsorted(key, unit + low), np.searchsorted(key, unit + high)], axis=1).ravel()
            self.cached["bounds", low, high] = both
        return self.cached["bounds", low, high]

    def pick(self, team: Team, w: np.ndarray, out: np.ndarray) -> None:
        """Copy the stored weights of a matrix into `out` (stored,); the padding of segments is not written."""
        args = (w.reshape(-1), self.shape[1], self.units, self.columns, self.valid, self.width)
        team.run(spmm.pack_segments, *args, out)

    def spread(self, team: Team, values: np.ndarray, out: np.ndarray) -> None:
        """Copy stored values into a matrix; its other elements are not written."""
        args = (values, self.shape[1], self.units, self.columns, self.valid, self.width)
        team.run(spmm.unpack_segments, *args, out.reshape(-1))

    def compact(self, team: Team, values: np.ndarray) -> np.ndarray:
        """Stored values without padding, in the order unit, column, as `matrix[mask]`."""
        if self.width == 1:
            return values[: len(self.units)].copy()
        if "ends" not in self.cached:
            self.cached["ends"] = np.cumsum(self.valid, dtype=np.int64)
        ends = self.cached["ends"]
        out = np.empty(self.valid.sum(), np.float32)
        team.run(spmm.join_segments, values, self.valid, ends, self.width, out)
        return out

    def orders(self, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        """The entries within each range of columns, in the order column, unit."""
        if "by column" not in self.cached:
            self.cached["by column"] = np.lexsort((self.units, self.columns)).astype(np.int32)
        by_column = self.cached["by column"]
        columns = self.columns[by_column]
        return [by_column[(columns >= low) & (columns < high)] for low, high in ranges]


def _segments(mask: np.ndarray, width: int) -> np.ndarray | None:
    """The runs of `width` columns that are kept, (n_pre, segments) bool.

    None if a run is kept only in part, or if the matrix is narrower than a run.
    """
    n, columns = mask.shape
    if columns < width:
        return None
    whole = columns // width * width
    runs = mask[:, :whole].reshape(n, -1, width)
    some = np.asarray(runs.any(axis=2))
    if not np.array_equal(some, runs.all(axis=2)):
        return None
    rest = mask[:, whole:]
    if not rest.size:
        return some
    last = np.asarray(rest.any(axis=1))
    return np.column_stack([some, last]) if np.array_equal(last, rest.all(axis=1)) else None


@dataclass
class PackedMatrix:
    """A matrix packed for `propagate_all`: a table of column tiles per range of units, and the pools they point into.

    Attributes
    ----------
    tiles  : (ranges, tiles, FIELDS) int64; the first `n_gate_tiles` hold columns of the gates u and r, the others those
             of the candidate
    values, index, pointers : pools, see `cpu/packing.py`
    most   : largest number of stored segments of a unit, 0 for the layout ALL
    source : what `fill` needs to copy the weights. For ALL, one table of `spmm.pack_tiles` per range; otherwise the
             unit, the first column and the number of columns of each stored entry
    """

    pattern: Pattern
    tiles: np.ndarray
    n_gate_tiles: int
    values: np.ndarray
    index: np.ndarray
    pointers: np.ndarray
    most: int
    source: tuple = field(repr=False)

    def fill(self, team: Team, w: np.ndarray) -> None:
        """Copy the weights w into `values`, in one pass over the stored weights."""
        flat, (n, columns) = w.reshape(-1), self.pattern.shape
        if self.pattern.layout == ALL:
            for table in self.source:
                team.run(spmm.pack_tiles, flat, columns, table, n, self.values)
        else:
            team.run(spmm.pack_segments, flat, columns, *self.source, self.pattern.width, self.values)

    def record(self, bias: np.ndarray) -> PackedWeights:
        """The record that kernels take; `bias` (columns,) float32 is the bias of the drives."""
        return PackedWeights(self.tiles, self.n_gate_tiles, WeightPools(self.values, self.index, self.pointers, bias))


def pack_matrix(pattern: Pattern, unit_ranges: list[tuple[int, int]], rows: int) -> PackedMatrix:
    """Lay out a matrix (n_pre, 3N) for threads that own the units of `unit_ranges`, for products of `rows` drives.

    `PackedMatrix.fill` copies the weights afterwards.
    """
    n = pattern.shape[1] // 3
    if pattern.layout == ALL:
        return _pack_all(pattern, unit_ranges, n, rows)
    return (_pack_segments if pattern.layout == SEGMENTS else _pack_single)(pattern, unit_ranges, n)


def _tile(kind: int, low: int, high: int, **fields: int) -> list[int]:
    """A table row: a tile of float32 weights for columns `low` to `high`. Fields that are not named are zero."""
    row = [0] * FIELDS
    row[KIND], row[STORAGE], row[LOW], row[HIGH], row[KERNEL] = kind, FLOAT32, low, high, product_address(kind, FLOAT32)
    for name, value in fields.items():
        row[_FIELD[name]] = value
    return row


_FIELD = {
    "values": VALUES,
    "index": INDEX,
    "pointers": POINTERS,
    "width": WIDTH,
    "pitch": PITCH,
    "dense_from": DENSE_FROM,
}


def _tables(groups: list[list[list[list[int]]]]) -> tuple[np.ndarray, int]:
    """One table per range of units, and the number of the first tile of the candidate.

    `groups` has the tiles of each range, for the gates u and r, and for the candidate. Groups are padded with empty
    tiles to the same length in all ranges.
    """
    lengths = [max(map(len, group)) for group in groups]
    ranges = len(groups[0])
    rows = [
        group[k] + [empty_column_tile()] * (length - len(group[k]))
        for k in range(ranges)
        for group, length in zip(groups, lengths, strict=True)
    ]
    return np.array([row for table in rows for row in table], np.int64).reshape(ranges, -1, FIELDS), lengths[0]


def _pack_all(pattern: Pattern, unit_ranges: list[tuple[int, int]], n: int, rows: int) -> PackedMatrix:
    """Column tiles of dense rows, one gate's columns each."""
    kind = ROW_TILES if rows * USUAL_ACTIVITY >= SHARED_EVENTS else ROWS
    dense_from, at, sources = int(np.ceil(DENSE_ACTIVITY_THRESHOLD * pattern.shape[0])), 0, []
    groups: list[list[list[list[int]]]] = [[], []]
    for low, high in unit_ranges:
        source = []
        for group, gates in zip(groups, ((0, 1), (2,)), strict=True):
            table = []
            for gate in gates:
                step = ROW_TILE if kind == ROW_TILES else max(1, high - low)
                for a in range(gate * n + low, gate * n + high, step):
                    b = min(a + step, gate * n + high)
                    pitch = -(-(b - a) // LANES) * LANES
                    table.append(_tile(kind, a, b, values=at, width=pitch, pitch=pitch, dense_from=dense_from))
                    source.append([a, b - a, at, pitch])
                    at += pitch * pattern.shape[0]
            group.append(table)
        sources.append(np.array(source, np.int64).reshape(-1, 4))
    tiles, n_gate_tiles = _tables(groups)
    values = aligned_zeros(at + 4 * LANES, np.float32)
    nothing = np.zeros(1, np.int32), np.zeros(1, np.int64)
    return PackedMatrix(pattern, tiles, n_gate_tiles, values, *nothing, 0, tuple(sources))


def _pack_segments(pattern: Pattern, unit_ranges: list[tuple[int, int]], n: int) -> PackedMatrix:
    """Stored segments by unit. A segment that overlaps two ranges of units is in the tables of both."""
    unit_range, groups = np.arange(pattern.shape[0]), [[], []]
    starts, ends = pattern.columns.astype(np.int64), pattern.columns.astype(np.int64) + pattern.valid
    chosen, pointers, at, p_at, most = [], [], 0, 0, 1
    for low, high in unit_ranges:
        for group, (first, last) in zip(groups, ((0, 2 * n), (2 * n, 3 * n)), strict=True):
            mine = np.zeros(len(starts), bool)
            for gate in range(first // n, last // n):
                mine |= (starts < gate * n + high) & (ends > gate * n + low)
            mine &= (starts >= first) & (starts < last) & (low < high)
            entries = np.flatnonzero(mine)
            begin = np.searchsorted(pattern.units[entries], unit_range)
            end = np.searchsorted(pattern.units[entries], unit_range + 1)
            # Per unit: the first index, the index after the last one, and the first segment, here the first index.
            pointers.append(np.stack([begin, end, begin], axis=1).ravel())
            most = max(most, int((end - begin).max(initial=0)))
            width = pattern.width
            group.append([_tile(BLOCKS, first, last, values=at * width, index=at, pointers=p_at, width=width)])
            chosen.append(entries)
            at, p_at = at + len(entries), p_at + len(pointers[-1])
    tiles, n_gate_tiles = _tables(groups)
    source = _source(pattern, chosen)
    index = np.concatenate([source[1], np.zeros(4 * LANES, np.int32)])
    values = aligned_zeros(at * pattern.width + 4 * LANES, np.float32)
    return PackedMatrix(pattern, tiles, n_gate_tiles, values, index, np.concatenate(pointers), most, source)


def _pack_single(pattern: Pattern, unit_ranges: list[tuple[int, int]], n: int) -> PackedMatrix:
    """Single weights by unit, one gate's columns per tile, with 16-bit columns."""
    unit_bounds, groups = np.arange(pattern.shape[0] + 1), [[], []]
    chosen, pointers, columns, at, p_at, i_at = [], [], [], 0, 0, 0
    for low, high in unit_ranges:
        for group, gates in zip(groups, ((0, 1), (2,)), strict=True):
            table = []
            for gate in gates:
                first, last = gate * n + low, gate * n + high
                entries = np.flatnonzero((pattern.columns >= first) & (pattern.columns < last))
                pointers.append(np.searchsorted(pattern.units[entries], unit_bounds))
                short = np.zeros(len(entries) + len(entries) % 2, np.uint16)
                short[: len(entries)] = pattern.columns[entries] - first
                columns.append(short.view(np.int32))
                table.append(_tile(SCATTER, first, last, values=at, index=i_at, pointers=p_at, width=1))
                chosen.append(entries)
                at, p_at, i_at = at + len(entries), p_at + len(pointers[-1]), i_at + len(columns[-1])
            group.append(table)
    tiles, n_gate_tiles = _tables(groups)
    index = np.concatenate([*columns, np.zeros(4 * LANES, np.int32)])
    values = aligned_zeros(at + 4 * LANES, np.float32)
    source = _source(pattern, chosen)
    return PackedMatrix(pattern, tiles, n_gate_tiles, values, index, np.concatenate(pointers), 1, source)


def _source(pattern: Pattern, chosen: list[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Unit, first column and number of columns of the chosen entries."""
    entries = np.concatenate(chosen)
    return tuple(a[entries] for a in (pattern.units, pattern.columns, pattern.valid))
