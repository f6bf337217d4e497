"""A weight matrix as training's products want it: which weights are there, and where they lie.

A `Pattern` is made of a mask once, and lasts until the mask changes. Parameters stay dense arrays; what the products
read is copied from them each window, the stored weights only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.memory import aligned_zeros
from eventrnn.cpu.packing import EVERY_FROM_SHARE, empty_window
from eventrnn.cpu.plan import SHARED_EVENTS
from eventrnn.cpu.tables import BLOCKS, FIELDS, FLOAT32, ROW_TILE, ROW_TILES, ROWS, SCATTER
from eventrnn.cpu.threads import Team
from eventrnn.training.bptt.kernels import spmm
from eventrnn.training.bptt.kernels.time_loops import DENSE, PIECES, SINGLE

# Pieces are the widest of these that the mask is made of.
WIDTHS = (64, 32, 16)

# Above these shares of kept weights, all of them are worked on. Rules of thumb, not measured.
PIECES_UP_TO, SINGLE_UP_TO = 0.5, 0.15

# Drives of a step share rows from one event a unit on, at the activity that networks are trained to.
USUAL_ACTIVITY = 0.1


@dataclass
class Pattern:
    """Which weights of a matrix (n_pre, columns) products work on, and those that are kept.

    Attributes
    ----------
    form     : DENSE (all), PIECES (of `width` neighbouring columns each) or SINGLE
    units, columns, valid : (stored,) presynaptic unit, first column and number of columns of each piece; by unit, then
               column. No piece crosses `cut`, where the candidate's columns begin
    kept     : (n_pre,) kept weights a unit; what is counted as effective
    """

    shape: tuple[int, int]
    cut: int
    form: int
    width: int
    units: np.ndarray
    columns: np.ndarray
    valid: np.ndarray
    kept: np.ndarray
    # What follows from the above, made when first asked for.
    made: dict = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, mask: np.ndarray | None, shape: tuple[int, int], cut: int, always: bool = False) -> Pattern:
        """`mask` None keeps all. `always`: no dense form for a mask, however many weights it keeps."""
        none = np.zeros(0, np.int32)
        if mask is None:
            return cls(shape, cut, DENSE, 0, none, none, none, np.full(shape[0], shape[1], np.int64))
        kept = mask.sum(axis=1, dtype=np.int64)
        density = kept.sum() / max(1, mask.size)
        for width in WIDTHS:
            grid = _blocks(mask, width)
            if grid is not None:
                form = PIECES
                break
        else:
            width, grid, form = 1, mask, SINGLE
        if not always and density > (PIECES_UP_TO if form == PIECES else SINGLE_UP_TO):
            return cls(shape, cut, DENSE, 0, none, none, none, kept)
        units, blocks = np.nonzero(grid)
        starts = blocks * width
        stops = np.minimum(starts + width, shape[1])
        crossing = (starts < cut) & (stops > cut)
        units = np.concatenate([units, units[crossing]])
        columns = np.concatenate([starts, np.full(crossing.sum(), cut)])
        ends = np.concatenate([np.where(crossing, cut, stops), stops[crossing]])
        order = np.lexsort((columns, units))
        units, columns, valid = (a[order].astype(np.int32) for a in (units, columns, ends - columns))
        return cls(shape, cut, form, width, units, columns, valid, kept)

    @property
    def stored(self) -> int:
        """Weights that a product may touch, padding of pieces included."""
        return self.shape[0] * self.shape[1] if self.form == DENSE else len(self.units) * self.width

    def stored_out(self) -> np.ndarray:
        """The same of each presynaptic unit, (n_pre,) int64."""
        if self.form == DENSE:
            return np.full(self.shape[0], self.shape[1], np.int64)
        return np.bincount(self.units, minlength=self.shape[0]).astype(np.int64) * self.width

    def pointers(self, low: int, high: int) -> np.ndarray:
        """First and past-the-last entry of each unit whose columns lie in `low` to `high`, (2 * n_pre,)."""
        if ("pointers", low, high) not in self.made:
            key = self.units.astype(np.int64) * (self.shape[1] + 1) + self.columns
            unit = np.arange(self.shape[0], dtype=np.int64) * (self.shape[1] + 1)
            both = np.stack([np.searchsorted(key, unit + low), np.searchsorted(key, unit + high)], axis=1).ravel()
            self.made["pointers", low, high] = both
        return self.made["pointers", low, high]

    def pick(self, team: Team, w: np.ndarray, out: np.ndarray) -> None:
        """Stored weights of a matrix; padding stays as it is in `out`."""
        args = (w.reshape(-1), self.shape[1], self.units, self.columns, self.valid, self.width)
        team.run(spmm.pack_pieces, *args, out)

    def spread(self, team: Team, values: np.ndarray, out: np.ndarray) -> None:
        """Stored values into a matrix; the rest stays as it is."""
        args = (values, self.shape[1], self.units, self.columns, self.valid, self.width)
        team.run(spmm.unpack_pieces, *args, out.reshape(-1))

    def compact(self, team: Team, values: np.ndarray) -> np.ndarray:
        """Stored values without padding: by unit, then column, as `matrix[mask]`."""
        if self.width == 1:
            return values[: len(self.units)].copy()
        if "ends" not in self.made:
            self.made["ends"] = np.cumsum(self.valid, dtype=np.int64)
        ends = self.made["ends"]
        out = np.empty(self.valid.sum(), np.float32)
        team.run(spmm.join_pieces, values, self.valid, ends, self.width, out)
        return out

    def orders(self, ranges: list[tuple[int, int]]) -> list[np.ndarray]:
        """Entries in each range of columns by column, then unit."""
        if "by column" not in self.made:
            self.made["by column"] = np.lexsort((self.units, self.columns)).astype(np.int32)
        by_column = self.made["by column"]
        columns = self.columns[by_column]
        return [by_column[(columns >= low) & (columns < high)] for low, high in ranges]


def _blocks(mask: np.ndarray, width: int) -> np.ndarray | None:
    """(n_pre, blocks) which runs of `width` columns are kept; None if one is kept in part, or a run is too wide."""
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
class Windows:
    """Tables for `traverse.propagate_all`, one for each range of units asked for, and the pools that they point into.

    tables : (ranges, windows, FIELDS); the first `cut` are of the gates u and r, the others of the candidate
    """

    pattern: Pattern
    tables: np.ndarray
    cut: int
    values: np.ndarray
    index: np.ndarray
    pointers: np.ndarray
    most: int
    source: tuple = field(repr=False)

    def fill(self, team: Team, w: np.ndarray) -> None:
        """Copy the weights of now. One pass over what is stored."""
        flat, (n, columns) = w.reshape(-1), self.pattern.shape
        if self.pattern.form == DENSE:
            for table in self.source:
                team.run(spmm.pack_tiles, flat, columns, table, n, self.values)
        else:
            team.run(spmm.pack_pieces, flat, columns, *self.source, self.pattern.width, self.values)


def windows(pattern: Pattern, edges: list[tuple[int, int]], rows: int) -> Windows:
    """The windows of a matrix (n_pre, 3N) for threads that own units `edges[part]`, for products of `rows` drives."""
    n = pattern.shape[1] // 3
    build = _tile_windows if pattern.form == DENSE else _piece_windows if pattern.form == PIECES else _single_windows
    return build(pattern, edges, n, rows)


def _tile_windows(pattern: Pattern, edges, n: int, rows: int) -> Windows:
    kind = ROW_TILES if rows * USUAL_ACTIVITY >= SHARED_EVENTS else ROWS
    every, at, sources = int(np.ceil(EVERY_FROM_SHARE * pattern.shape[0])), 0, []
    groups: list[list[list[list[int]]]] = [[], []]
    for low, high in edges:
        source = []
        for group, gates in zip(groups, ((0, 1), (2,)), strict=True):
            table = []
            for gate in gates:
                step = ROW_TILE if kind == ROW_TILES else max(1, high - low)
                for a in range(gate * n + low, gate * n + high, step):
                    b = min(a + step, gate * n + high)
                    pitch = -(-(b - a) // LANES) * LANES
                    table.append([kind, FLOAT32, a, b, at, 0, 0, pitch, pitch, 0, every])
                    source.append([a, b - a, at, pitch])
                    at += pitch * pattern.shape[0]
            group.append(table)
        sources.append(np.array(source, np.int64).reshape(-1, 4))
    tables, cut = _join(groups)
    values = aligned_zeros(at + 4 * LANES, np.float32)
    return Windows(pattern, tables, cut, values, np.zeros(1, np.int32), np.zeros(1, np.int64), 0, tuple(sources))


def _join(groups) -> tuple[np.ndarray, int]:
    """Tables of all parts, of one length: each group is filled up with empty windows."""
    lengths = [max(map(len, group)) for group in groups]
    parts = len(groups[0])
    rows = [
        [row for group, length in zip(groups, lengths, strict=True) for row in _filled(group[part], length)]
        for part in range(parts)
    ]
    return np.array(rows, np.int64).reshape(parts, -1, FIELDS), lengths[0]


def _filled(table, length: int):
    return table + [empty_window()] * (length - len(table))


def _piece_windows(pattern: Pattern, edges, n: int, rows: int) -> Windows:
    unit_range, groups = np.arange(pattern.shape[0]), [[], []]
    chosen, tables, at, p_at, most = [], [], 0, 0, 1
    for low, high in edges:
        for group, (first, last) in zip(groups, ((0, 2 * n), (2 * n, 3 * n)), strict=True):
            starts, ends = pattern.columns.astype(np.int64), pattern.columns.astype(np.int64) + pattern.valid
            mine = np.zeros(len(starts), bool)
            for gate in range(first // n, last // n):
                mine |= (starts < gate * n + high) & (ends > gate * n + low)
            mine &= (starts >= first) & (starts < last) & (low < high)
            entries = np.flatnonzero(mine)
            begin = np.searchsorted(pattern.units[entries], unit_range)
            end = np.searchsorted(pattern.units[entries], unit_range + 1)
            tables.append(np.stack([begin, end, begin], axis=1).ravel())
            most = max(most, int((end - begin).max(initial=0)))
            row = [BLOCKS, FLOAT32, first, last, at * pattern.width, at, p_at, pattern.width, 0, 0, 0]
            group.append([row])
            chosen.append(entries)
            at, p_at = at + len(entries), p_at + len(tables[-1])
    joined, cut = _join(groups)
    entries = np.concatenate(chosen)
    source = tuple(a[entries] for a in (pattern.units, pattern.columns, pattern.valid))
    index = np.concatenate([source[1], np.zeros(4 * LANES, np.int32)])
    values = aligned_zeros(at * pattern.width + 4 * LANES, np.float32)
    return Windows(pattern, joined, cut, values, index, np.concatenate(tables), most, source)


def _single_windows(pattern: Pattern, edges, n: int, rows: int) -> Windows:
    unit_range, groups = np.arange(pattern.shape[0]), [[], []]
    chosen, tables, shorts, at, p_at, i_at = [], [], [], 0, 0, 0
    for low, high in edges:
        for group, gates in zip(groups, ((0, 1), (2,)), strict=True):
            table = []
            for gate in gates:
                first, last = gate * n + low, gate * n + high
                entries = np.flatnonzero((pattern.columns >= first) & (pattern.columns < last))
                tables.append(np.searchsorted(pattern.units[entries], np.append(unit_range, pattern.shape[0])))
                short = np.zeros(len(entries) + len(entries) % 2, np.uint16)
                short[: len(entries)] = pattern.columns[entries] - first
                shorts.append(short.view(np.int32))
                table.append([SCATTER, FLOAT32, first, last, at, i_at, p_at, 1, 0, 0, 0])
                chosen.append(entries)
                at, p_at, i_at = at + len(entries), p_at + len(tables[-1]), i_at + len(shorts[-1])
            group.append(table)
    joined, cut = _join(groups)
    entries = np.concatenate(chosen)
    source = tuple(a[entries] for a in (pattern.units, pattern.columns, pattern.valid))
    index = np.concatenate([*shorts, np.zeros(4 * LANES, np.int32)])
    values = aligned_zeros(at + 4 * LANES, np.float32)
    return Windows(pattern, joined, cut, values, index, np.concatenate(tables), 1, source)
