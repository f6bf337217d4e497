"""One layer through a window, forward and back: which products go over events and which through BLAS.

The choice is a function of the window alone (its activity, its support and the masks), never of what was before, so a
resumed run makes the same one. Recurrent drives always go over events: with many of them the kernel walks every unit
anyway, and the events of training are then those of the inference engine, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eventrnn.cells import Cell
from eventrnn.counting.backward import BackwardWork
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.threads import Team
from eventrnn.training.bptt.kernels import cell_update, event_lists, sddmm, spmm, time_loops
from eventrnn.training.bptt.kernels.spmm import STRIP
from eventrnn.training.bptt.kernels.time_loops import DENSE, PIECES, STORED_ROWS, WINDOW_ROWS
from eventrnn.training.bptt.sparse_pattern import Pattern, Windows, windows
from eventrnn.training.bptt.workspace import Arena, Lists, Scratch

F32 = np.float32

# Shares of events (and of open pairs), times the share of weights that are stored, up to which input drives, gradients
# of weights and of what was sent do not go through BLAS. Measured at 1350 units on one thread of an AVX-512 server: as
# fast at 0.63, 0.55 and 0.41 for 20 samples, at 0.62, 0.61 and 0.38 for 80.
DRIVES_UP_TO, EVENTS_UP_TO, PATHS_UP_TO = 0.55, 0.5, 0.4

# Rows, about, that are looked at to tell how many pairs are open.
SAMPLED_ROWS = 512

# Numbers that kernels may read past the last row, in whole vectors.
SPARE = 16 * LANES


@dataclass
class LayerTape:
    """One layer over a window, all the backward pass needs. (T, B, N) arrays; `y` and `c` have T + 1 steps, the
    first being the state before the window. `w_rec` are the weights that were used, DropConnect included; `share_in` of
    x is not zero; `support`, known after the backward pass, is the share of units that fired or were within their
    surrogate's support."""

    x: np.ndarray
    w_rec: np.ndarray
    u: np.ndarray
    r: np.ndarray
    g: np.ndarray
    q: np.ndarray
    v: np.ndarray
    y: np.ndarray
    c: np.ndarray
    threshold: np.ndarray
    share_in: float = float("nan")
    support: float = float("nan")
    work: dict[str, BackwardWork] = field(default_factory=dict)
    engine: LayerEngine | None = field(default=None, repr=False)


@dataclass
class Arrived:
    """What a matrix received over a window, flat (rows, n_pre) each: one array, or what the gates and, in the paper's
    variant, what the candidate did. `share` of it is not zero; `lists` are its events by unit, once listed."""

    arrays: tuple[np.ndarray, ...]
    share: float
    lists: list[Lists] = field(default_factory=list)


@dataclass
class Adjoint:
    """What a layer's backward pass gives: gradients by name (`w_in`, `w_rec`, …), and of its input (T, B, I)."""

    gradients: dict[str, np.ndarray]
    d_x: np.ndarray | None


@dataclass(frozen=True)
class Paths:
    """Where the gradient of what a layer received has a use: everywhere, or, given v of who sent it, where it fired or
    has a slope. Flat v (rows of units); `rule` is a surrogate's code, dampening and support; with `zeroed` it is zero
    elsewhere, where it may else be anything."""

    v: np.ndarray | None = None
    threshold: np.ndarray = field(default_factory=lambda: np.zeros(0, F32))
    rule: tuple = (0, F32(0), F32(1))
    zeroed: bool = False

    @classmethod
    def of_layer(cls, tape: LayerTape, cell: Cell) -> Paths:
        """Of the layer that sent it."""
        rule = cell.surrogate
        return cls(tape.v.reshape(-1), tape.threshold, (rule.code, F32(rule.dampening), F32(rule.support)))

    @classmethod
    def of_mask(cls, mask: np.ndarray, team: Team, arena: Arena) -> Paths:
        """Where a mask (T, B, I) is True."""
        v = arena.take(mask.size)
        team.run(cell_update.copy_all, np.ascontiguousarray(mask).reshape(-1), v)
        return cls(v, np.zeros(mask.shape[2], F32), zeroed=True)

    def zero_elsewhere(self, d_x: np.ndarray) -> None:
        """Of a gradient of everything, if that was asked for."""
        if self.zeroed and self.v is not None:
            d_x[self.v.reshape(d_x.shape) == 0] = 0


class LayerEngine:
    """Runs one layer. Keeps patterns while masks last, and memory between windows."""

    def __init__(self, cell: Cell, mode: str, team: Team, arena: Arena):
        self.cell, self.mode, self.team, self.arena = cell, mode, team, arena
        self.scratch = Scratch(arena, team.threads)
        self.paper = cell.variant == "paper"
        self.masks: dict[str, np.ndarray | None] = {}
        self.patterns: dict[str, Pattern] = {}
        self.windows: dict[tuple, Windows] = {}

    # --- patterns -----------------------------------------------------------------------------------------------

    def pattern(self, name: str, shape: tuple[int, int], mask: np.ndarray | None) -> Pattern:
        """Of the mask of now; made again only when it has changed."""
        before = self.masks.get(name)
        same = before is None if mask is None else before is not None and self._equal(mask, before)
        if name not in self.patterns or not same:
            self.masks[name] = None if mask is None else mask.copy()
            n = shape[1] // 3
            pattern = Pattern.of(None if self.mode == "dense" else mask, shape, 2 * n, always=self.mode == "sparse")
            if mask is not None:
                pattern.kept[:] = mask.sum(axis=1)
            self.patterns[name] = pattern
            self.windows = {key: kept for key, kept in self.windows.items() if key[0] != name}
        return self.patterns[name]

    def _equal(self, mask: np.ndarray, other: np.ndarray) -> bool:
        """Whether two masks are equal; eight entries are compared at a time."""
        if mask.shape != other.shape:
            return False
        mask, other = mask.reshape(-1), other.reshape(-1)
        whole, found = mask.size // 8 * 8, np.empty(self.team.threads, bool)
        self.team.run(spmm.find_difference, mask[:whole].view(np.int64), other[:whole].view(np.int64), found)
        return not found.any() and np.array_equal(mask[whole:], other[whole:])

    def _windows(self, name: str, edges: list[tuple[int, int]], rows: int, w: np.ndarray) -> Windows:
        key = (name, len(edges), rows)
        if key not in self.windows:
            # Another batch replaces the one before: its packed weights are as large as the matrix.
            self.windows = {k: kept for k, kept in self.windows.items() if k[0] != name}
            self.windows[key] = windows(self.patterns[name], edges, rows)
        self.windows[key].fill(self.team, w)
        return self.windows[key]

    def _edges(self, n: int) -> list[tuple[int, int]]:
        parts = self.team.threads
        return [
            (event_lists.share(n, LANES, k, parts), event_lists.share(n, LANES, k + 1, parts)) for k in range(parts)
        ]

    # --- forward ------------------------------------------------------------------------------------------------

    def forward(self, p: dict, x: np.ndarray, c: np.ndarray, y: np.ndarray, held: np.ndarray | None) -> LayerTape:
        """A window from a state. p: `w_in`, `w_rec`, `bias_in`, `bias_rec`, `threshold`; x (T, B, I)."""
        (steps, batch), n = x.shape[:2], len(p["threshold"])
        pitch = _pitch(n)
        take = self.arena.take
        u, r, g, q, v = (take(steps, batch, n) for _ in range(5))
        ys, cs = take(steps + 1, batch, n), take(steps + 1, batch, n)
        ys[0], cs[0] = y, c
        tape = LayerTape(x, p["w_rec"], u, r, g, q, v, ys, cs, p["threshold"], engine=self)
        drive_in = take(steps * batch * pitch + SPARE)
        tape.share_in = self._input_drives(p, x, drive_in, pitch)
        held_flat = np.zeros(0, bool) if held is None else np.ascontiguousarray(held).reshape(-1)
        outputs = tuple(a.reshape(-1) for a in (u, r, g, q, v, ys, cs))
        if self.mode == "dense":
            self._dense_steps(p, drive_in, pitch, held_flat, steps, batch, outputs)
            return tape
        parts = self.team.threads
        dense = self.patterns["w_rec"].form == DENSE
        table = self._windows("w_rec", [(0, n)] if dense else self._edges(n), batch, p["w_rec"])
        whole, fields = table.tables[0], table.tables.shape[2]
        own_windows = take(parts, len(whole), fields, dtype=np.int64) if dense else table.tables
        rows, wide = 3 * batch, n + LANES * parts
        self.team.run(
            time_loops.forward, self.paper, steps, batch, n,
            whole if dense else whole[:0], own_windows, table.cut, table.values, table.index, table.pointers,
            p["bias_rec"], p["threshold"], drive_in, pitch, held_flat, *self.scratch.shares(),
            take(parts, batch * pitch + SPARE), take(rows * wide + LANES, dtype=np.int32), take(rows * wide + LANES),
            take(rows * parts, dtype=np.int64), take(rows * parts, dtype=np.int64),
            *self.scratch.engine(n, batch, table.most), *outputs, counter=True,
        )  # fmt: skip
        return tape

    def _input_drives(self, p: dict, x: np.ndarray, drive: np.ndarray, pitch: int) -> float:
        """Writes them; returns the share of x that is not zero."""
        w, rows, (n_pre, columns) = p["w_in"], x.shape[0] * x.shape[1], p["w_in"].shape
        pattern, flat = self.patterns["w_in"], np.ascontiguousarray(x).reshape(-1)
        sent = self._share_sent(flat)
        if not self._sparse(pattern, sent, DRIVES_UP_TO):
            out = drive[: rows * pitch].reshape(rows, pitch)[:, :columns]
            self.team.multiply(flat.reshape(rows, n_pre), w, out)
            out += p["bias_in"]
            return sent
        take, parts = self.arena.take, self.team.threads
        if pattern.form == DENSE:
            strip = min(spmm.STRIP_ROWS, rows)
            self.team.run(
                spmm.input_drives, flat, rows, w.reshape(-1), n_pre, columns, p["bias_in"], drive, pitch,
                *self.scratch.events(n_pre, strip, parts), take(parts, strip, dtype=np.int64), self.scratch.bins(),
                *self.scratch.strip(strip), counter=True,
            )  # fmt: skip
            return sent
        table = self._windows("w_in", [(0, columns // 3)], 1, w)
        some = min(rows, spmm.LISTED_ROWS)
        most = some * n_pre + LANES
        self.team.run(
            spmm.stored_drives, flat, table.tables[0], table.values, table.index, table.pointers, n_pre, rows,
            p["bias_in"], drive, pitch, take(parts, most, dtype=np.int32), take(parts, most),
            take(parts, some, dtype=np.int64), take(parts, some, dtype=np.int64),
            *self.scratch.engine(1, 1, table.most), counter=True,
        )  # fmt: skip
        return sent

    def _share_sent(self, flat: np.ndarray) -> float:
        """Share of numbers that are not zero."""
        counts = np.empty(self.team.threads, np.int64)
        self.team.run(cell_update.count_sent, flat, counts)
        return counts.sum() / max(1, flat.size)

    def _sparse(self, pattern: Pattern, share: float, limit: float) -> bool:
        if self.mode != "auto":
            return self.mode == "sparse"
        return share * pattern.stored <= limit * pattern.shape[0] * pattern.shape[1]

    def _dense_steps(self, p: dict, drive_in, pitch: int, held, steps: int, batch: int, outputs) -> None:
        n, w, bias = len(p["threshold"]), p["w_rec"], p["bias_rec"]
        u, r, g, q, v, ys, cs = outputs
        w_gates, w_candidate = split_gates(self.cell, w)
        drive, rows, size = np.empty((batch, 3 * n), F32), batch, batch * n
        for t in range(steps):
            y, at = ys[t * size : (t + 1) * size].reshape(batch, n), t * batch * pitch
            if self.paper:
                drive[:, : 2 * n] = self.team.multiply(y, w_gates) + bias[: 2 * n]
                cell_update.reset_all(n, rows, drive_in, at, pitch, drive.reshape(-1), ys, t * size, r, q)
                sent = q[t * size : (t + 1) * size].reshape(batch, n)
                drive[:, 2 * n :] = self.team.multiply(sent, w_candidate) + bias[2 * n :]
            else:
                self.team.multiply(y, w, drive)
                drive += bias
            cell_update.update_all(
                n, rows, self.paper, drive_in, at, pitch, drive.reshape(-1), p["threshold"], held, t * size, *outputs
            )

    # --- backward -----------------------------------------------------------------------------------------------

    def backward(
        self,
        p: dict,
        tape: LayerTape,
        d_y: np.ndarray,
        d_cell: np.ndarray | None,
        wanted: Paths | None,
        stored: bool,
    ) -> Adjoint:
        """Gradients from d_y (T, B, N), contiguous float32, and d_cell of v.

        wanted : where the gradient of the input is, nowhere for None
        stored : gradients of pruned matrices as their kept entries only, in the order of `matrix[mask]`
        """
        steps, batch, n = tape.v.shape
        pitch, take, rows = _pitch(n), self.arena.take, steps * batch
        d_in = take(rows * pitch + SPARE)
        d_rec = d_in if self.paper else take(rows * pitch + SPARE)
        for delta in (d_in, d_rec):
            # Read with padding of pieces, whose weights are zero: must be a number.
            delta[: rows * pitch].reshape(rows, pitch)[:, 3 * n :] = 0
            delta[rows * pitch :] = 0
        d_threshold, d_bias = np.zeros(n, F32), np.zeros(4 * n, F32)
        d_cell_flat = np.zeros(batch * n, F32) if d_cell is None else np.ascontiguousarray(d_cell, F32).reshape(-1)
        rule = self.cell.surrogate
        head = (rule.code, F32(rule.dampening), F32(rule.support), tape.threshold)
        arrays = tuple(a.reshape(-1) for a in (tape.u, tape.r, tape.g, tape.q, tape.v, tape.y, tape.c))
        pattern = self.patterns["w_rec"]
        tape.work = {}
        work = tape.work["w_rec"] = BackwardWork.none(pattern.kept, 3 * n, rows)
        work.asked = max(0, steps - 1 + self.paper) * batch
        by_paths = self._sparse(pattern, self._open_share(head, arrays[4], rows, n), PATHS_UP_TO)
        d_c, flat_y = np.zeros(batch * n, F32), d_y.reshape(-1)
        sweep = self._sparse_back if by_paths else self._dense_back
        sweep(tape, head, arrays, d_cell_flat, flat_y, d_c, d_in, d_rec, pitch, d_threshold, d_bias)
        # What the last step sent has no use: nothing reads it within the window. What was sent before it, in the
        # paper's variant, has.
        earlier, before = max(0, rows - batch), np.count_nonzero(tape.y[0], axis=0) if self.paper else 0
        work.open = work.dots.copy() if by_paths else self._open(head, arrays[4], 0, earlier, n) + before
        last = self._open(head, arrays[4], earlier, rows, n)
        tape.support = float((work.open - before + last).sum()) / max(1, rows * n)
        gated = tape.q.reshape(-1) if self.paper else None
        x, y = np.ascontiguousarray(tape.x).reshape(-1), tape.y[:-1].reshape(-1)
        arrived = {
            "w_in": Arrived((x,), tape.share_in),
            "w_rec": Arrived((y,) if gated is None else (y, gated), self._share_sent(y)),
        }
        self._list(arrived, rows)
        gradients = {
            "w_in": self._gradient("w_in", arrived["w_in"], rows, d_in, pitch, tape, stored),
            "w_rec": self._gradient("w_rec", arrived["w_rec"], rows, d_rec, pitch, tape, stored),
            "bias_in": d_bias[: 3 * n].copy(),
            "bias_rec": d_bias[: 3 * n].copy() if self.paper else np.concatenate([d_bias[: 2 * n], d_bias[3 * n :]]),
            "threshold": d_threshold,
        }
        d_x = None
        if wanted is not None:
            d_x = self._input_gradient(p["w_in"], d_in, pitch, tape, wanted)
        return Adjoint(gradients, d_x)

    def _open(self, head: tuple, v: np.ndarray, first: int, last: int, n: int, step: int = 1) -> np.ndarray:
        """Of every `step`-th of the rows `first` to `last` of v, how often each unit fired or has a slope."""
        counts = np.empty(n, F32)
        self.team.run(cell_update.count_open, *head, v, first, last, step, n, counts)
        return counts.astype(np.int64)

    def _open_share(self, head: tuple, v: np.ndarray, rows: int, n: int) -> float:
        """Share of units that fired or have a slope, of rows of v that stand for all of them."""
        # Odd: not the same samples of each step.
        step = rows // SAMPLED_ROWS | 1
        return float(self._open(head, v, 0, rows, n, step).sum()) / max(1, -(-rows // step) * n)

    def _sparse_back(
        self, tape, head, arrays, d_cell, d_y, d_c, d_in, d_rec, pitch, d_threshold, d_bias
    ) -> None:  # fmt: skip
        steps, batch, n = tape.v.shape
        pattern, take = self.patterns["w_rec"], self.arena.take
        gates = 2 * n if self.paper else 3 * n
        weights, columns = self._stored(pattern, tape.w_rec)
        self.team.run(
            time_loops.backward, self.paper, steps, batch, n, *head,
            pattern.form, pattern.width, weights, columns, pattern.pointers(0, gates), pattern.pointers(2 * n, 3 * n),
            *arrays, d_cell, d_y, d_c, *self.scratch.shares(), take(batch * n),
            *self.scratch.pairs(pattern.form == DENSE, n, batch, gates, 3 * n - gates), take(2 * batch * n),
            d_in, d_rec, pitch, d_threshold, d_bias, tape.work["w_rec"].dots, counter=True,
        )  # fmt: skip
        tape.work["w_rec"].dots_stored = pattern.stored_out()

    def _stored(self, pattern: Pattern, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What dots read: all weights, or the stored ones, and their columns."""
        if pattern.form == DENSE:
            return w.reshape(-1), pattern.columns
        values = self.arena.take(pattern.stored + SPARE)
        if pattern.form == PIECES:
            # Padding must be zero; the memory may hold what was there.
            values[:] = 0
        pattern.pick(self.team, w, values)
        return values, pattern.columns

    def _dense_back(self, tape, head, arrays, d_cell, d_y, d_c, d_in, d_rec, pitch, d_threshold, d_bias) -> None:
        steps, batch, n = tape.v.shape
        u, r, g, q, v, y, c = arrays
        w_gates, w_candidate = split_gates(self.cell, tape.w_rec)
        gates, size, d_before = w_gates.shape[1], batch * n, np.zeros(batch * n, F32)
        d_y = d_y.reshape(steps, batch, n)
        d_sum = d_y[-1] if steps else d_y
        for t in reversed(range(steps)):
            at, s = t * batch * pitch, t * size
            cell_update.adjoint_all(
                n, batch, self.paper, *head, u, r, g, q, v, c, s, d_sum.reshape(-1),
                d_cell, s if len(d_cell) > size else 0, d_c, d_before, d_in, d_rec, at, pitch, d_threshold, d_bias,
            )  # fmt: skip
            rows = d_rec[at : at + batch * pitch].reshape(batch, pitch)
            if self.paper:
                d_sent = self.team.multiply(rows[:, 2 * n : 3 * n], w_candidate.T).reshape(-1)
                cell_update.reset_adjoint_all(n, batch, r, y, s, d_sent, d_in, at, pitch, d_before, d_bias)
            if t > 0:
                d_sum = self.team.multiply(rows[:, :gates], w_gates.T) + d_y[t - 1]
                if self.paper:
                    d_sum += d_before.reshape(batch, n)
        work = tape.work["w_rec"]
        work.dots, work.dots_stored = np.full(n, work.asked), np.full(n, 3 * n)

    def _list(self, arrived: dict[str, Arrived], rows: int) -> None:
        """Events by unit of what goes over events."""
        for name, source in arrived.items():
            pattern = self.patterns[name]
            if not self._sparse(pattern, source.share, EVENTS_UP_TO):
                continue
            pieces, n = pattern.form == PIECES, pattern.shape[0]
            tile = spmm.PIECE_ROWS if pieces else event_lists.TILE_ROWS
            counts = self.arena.take(self.team.threads, n, dtype=np.int64)
            further = self.scratch.bins(), *self.scratch.row(n)
            for x in source.arrays:
                found = self.scratch.events(rows, n, tile=tile)
                self.team.run(
                    event_lists.list_by_unit, x, rows, n, tile, not pieces, *found, counts, *further, counter=True
                )
                source.lists.append(found)

    def _gradient(self, name: str, arrived: Arrived, rows: int, delta, pitch: int, tape, stored: bool) -> np.ndarray:
        """Of a weight matrix from what arrived and the deltas."""
        pattern, take = self.patterns[name], self.arena.take
        (n_pre, columns), cut = pattern.shape, pattern.cut
        ranges = [(0, columns)] if len(arrived.arrays) == 1 else [(0, cut), (cut, columns)]
        work = tape.work.setdefault(name, BackwardWork.none(pattern.kept, columns, rows))
        if not arrived.lists:
            x = arrived.arrays[0].reshape(rows, n_pre)
            work.fired = np.count_nonzero(x, axis=0)
            work.gradient_rows, work.gradient_stored = np.full(n_pre, rows, np.int64), np.full(n_pre, columns, np.int64)
            flat = delta[: rows * pitch].reshape(rows, pitch)
            gradient = take(n_pre, columns)
            for source, (low, high) in zip(arrived.arrays, ranges, strict=True):
                self.team.multiply(source.reshape(rows, n_pre).T, flat[:, low:high], gradient[:, low:high])
            return self._masked(name, gradient, stored)
        order, starts = arrived.lists[0][:2]
        amounts = np.diff(starts.reshape(-1, n_pre + 1), axis=1)
        if pattern.form == PIECES:
            work.fired = amounts.sum(axis=0)
        else:
            work.fired = np.bincount(order, amounts.reshape(-1), n_pre).astype(np.int64)
        work.gradient_rows, work.gradient_stored = work.fired, pattern.stored_out()
        scratch = self.scratch.strip(n_pre)
        if pattern.form == DENSE:
            gradient = take(n_pre, columns)
            for each, (low, high) in zip(arrived.lists, ranges, strict=True):
                self.team.run(
                    spmm.dense_gradient, *each, rows, n_pre, delta, pitch, gradient.reshape(-1), columns, low, high,
                    *scratch, counter=True,
                )  # fmt: skip
            return self._masked(name, gradient, stored)
        out = take(pattern.stored + LANES)
        for each, (low, high), chosen in zip(arrived.lists, ranges, pattern.orders(ranges), strict=True):
            which = (chosen, pattern.units, pattern.columns)
            if pattern.form == PIECES:
                tile = self.scratch.piece_tile(pattern.width)
                self.team.run(
                    spmm.piece_gradient, *which, pattern.width, *each[1:], rows, n_pre, delta, pitch, tile, out,
                    counter=True,
                )  # fmt: skip
            else:
                strips = np.searchsorted(pattern.columns[chosen], np.append(np.arange(low, high, STRIP), high))
                self.team.run(
                    spmm.single_gradient, chosen, strips, low, high, *which[1:], *each, rows, n_pre, delta, pitch,
                    *scratch, out, counter=True,
                )  # fmt: skip
                work.gradient_stored = np.full(n_pre, columns, np.int64)
        if stored:
            return pattern.compact(self.team, out)
        gradient = take(n_pre, columns)
        gradient[:] = 0
        pattern.spread(self.team, out, gradient)
        return gradient

    def _masked(self, name: str, gradient: np.ndarray, stored: bool) -> np.ndarray:
        mask = self.masks[name]
        if mask is None:
            return gradient
        if stored:
            return gradient[mask]
        gradient *= mask
        return gradient

    def _input_gradient(self, w, d_in, pitch, tape, wanted: Paths) -> np.ndarray:
        steps, batch, _ = tape.v.shape
        pattern, rows, (n_pre, columns) = self.patterns["w_in"], steps * batch, w.shape
        work = tape.work["w_in"]
        head, share = (*wanted.rule, wanted.threshold), 1.0
        work.asked = rows
        if wanted.v is not None:
            share = self._open_share(head, wanted.v, rows, n_pre)
        if not self._sparse(pattern, share, PATHS_UP_TO):
            every = np.full(n_pre, rows, np.int64)
            work.open = every if wanted.v is None else self._open(head, wanted.v, 0, rows, n_pre)
            work.dots, work.dots_stored = every, np.full(n_pre, columns, np.int64)
            flat = d_in[: rows * pitch].reshape(rows, pitch)[:, :columns]
            out = self.arena.take(steps, batch, n_pre)
            self.team.multiply(flat, w.T, out.reshape(rows, n_pre))
            wanted.zero_elsewhere(out)
            return out
        weights, stored_columns = self._stored(pattern, w)
        d_x, made = self.arena.take(steps, batch, n_pre), np.zeros((self.team.threads, n_pre), np.int64)
        dense = pattern.form == DENSE
        scratch = self.scratch.pairs(dense, n_pre, min(rows, WINDOW_ROWS if dense else STORED_ROWS), columns)
        if dense:
            self.team.run(sddmm.pack_all_chunks, weights, n_pre, columns, scratch[0][0])
        self.team.run(
            time_loops.gradient_of_inputs, pattern.form, pattern.width, weights, stored_columns,
            pattern.pointers(0, columns), columns, d_in, pitch, rows, n_pre,
            event_lists.ALL if wanted.v is None else event_lists.OPEN, *head,
            np.zeros(0, F32) if wanted.v is None else wanted.v, *scratch, d_x.reshape(-1), made, counter=True,
        )  # fmt: skip
        work.open = work.dots = made.sum(axis=0)
        work.dots_stored = pattern.stored_out()
        return d_x


def _pitch(n: int) -> int:
    """From one row of drives or deltas to the next."""
    return -(-3 * n // LANES) * LANES + 4 * LANES


def split_gates(cell: Cell, w_rec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paper's variant: the (u, r) rows and the candidate rows, contiguous for BLAS."""
    n = len(w_rec)
    if cell.variant == "evnn":
        return w_rec, w_rec
    return np.ascontiguousarray(w_rec[:, : 2 * n]), np.ascontiguousarray(w_rec[:, 2 * n :])
