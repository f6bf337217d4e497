"""One layer through a window, forward and backward, and the selection between sparse products and BLAS.

The selection depends on the window alone (its activity, its active pairs and the masks) and not on earlier windows. A
resumed run therefore selects the same products. Recurrent drives always go over events: at high activity the kernel
visits every unit anyway, and the events of training are then those of the inference engine, bit for bit.

Equations: `reference.forward` and `reference.backward`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eventrnn.cells import Cell
from eventrnn.counting.backward import BackwardWork
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.threads import Team
from eventrnn.training.bptt import gated_layer
from eventrnn.training.bptt.gated_products import rows_of, values_of
from eventrnn.training.bptt.kernels import cell_update, event_lists, sddmm, spmm, time_loops
from eventrnn.training.bptt.kernels.records import (
    ACTIVE,
    ALL,
    EVERY,
    SEGMENTS,
    Deltas,
    SampledWeights,
    StoredEntries,
    SurrogateParameters,
    TapeArrays,
    Upstream,
    WindowShape,
)
from eventrnn.training.bptt.kernels.spmm import STRIP
from eventrnn.training.bptt.kernels.time_loops import STORED_ROWS, WINDOW_ROWS
from eventrnn.training.bptt.sparse_pattern import PackedMatrix, Pattern, pack_matrix
from eventrnn.training.bptt.tape import (
    EventTape,
    GradientMask,
    LayerGradients,
    LayerTape,
    MatrixInputs,
    surrogate_parameters,
)
from eventrnn.training.bptt.workspace import Arena, WorkspaceBuilder

F32 = np.float32

# Largest shares at which products go over events: for input drives and weight gradients the share of non-zero inputs,
# for the gradients of outputs the share of active pairs, each multiplied by the share of weights that are stored.
# Measured at 1350 units on one thread of an AVX-512 server, events and BLAS are equally fast at 0.63, 0.55 and 0.41 for
# 20 samples, and at 0.62, 0.61 and 0.38 for 80 samples.
DRIVES_UP_TO, EVENTS_UP_TO, PAIRS_UP_TO = 0.55, 0.5, 0.4

# The approximate number of rows that are sampled to estimate the share of active pairs.
SAMPLED_ROWS = 512

# The number of floats that kernels may read past the last row.
SPARE = 16 * LANES


@dataclass
class _Sweep:
    """The records of one backward pass, in the order in which kernels take them."""

    shape: WindowShape
    surrogate: SurrogateParameters
    tape: TapeArrays
    upstream: Upstream
    deltas: Deltas

    @property
    def rows(self) -> int:
        """Steps times samples."""
        return self.shape.steps * self.shape.batch


class LayerEngine:
    """Runs one layer. It keeps the sparse patterns until the masks change, and its memory from window to window.

    Parameters
    ----------
    cell          : variant and surrogate of the layer
    backward_mode : "auto", "dense" or "sparse", see `Model`
    team          : the threads that run the kernels
    arena         : memory for arrays, shared by the layers of a model
    """

    def __init__(self, cell: Cell, backward_mode: str, team: Team, arena: Arena):
        self.cell, self.backward_mode, self.team, self.arena = cell, backward_mode, team, arena
        self.workspace = WorkspaceBuilder(arena, team.threads)
        self.paper = cell.variant == "paper"
        self.masks: dict[str, np.ndarray | None] = {}
        self.patterns: dict[str, Pattern] = {}
        self.packed: dict[tuple, PackedMatrix] = {}

    def __reduce__(self):
        # Patterns and packed weights are made again from the masks.
        return type(self), (self.cell, self.backward_mode, self.team, self.arena)

    # --- patterns -----------------------------------------------------------------------------------------------

    def pattern(self, name: str, shape: tuple[int, int], mask: np.ndarray | None, *, gated: bool = False) -> Pattern:
        """The pattern of a mask. It is made again only when the mask has changed.

        name  : "w_in" or "w_rec"
        shape : (n_pre, 3N)
        mask  : (n_pre, 3N) bool; None where all weights are kept
        gated : whether the matrix has gated blocks, whose products all go through BLAS
        """
        before = self.masks.get(name)
        same = before is None if mask is None else before is not None and self._equal(mask, before)
        if name not in self.patterns or not same:
            self.masks[name] = None if mask is None else mask.copy()
            dense, sparse = gated or self.backward_mode == "dense", self.backward_mode == "sparse"
            pattern = Pattern.of(None if dense else mask, shape, 2 * shape[1] // 3, always=sparse)
            if mask is not None:
                pattern.kept[:] = mask.sum(axis=1)
            self.patterns[name] = pattern
            self.packed = {key: kept for key, kept in self.packed.items() if key[0] != name}
        return self.patterns[name]

    def _equal(self, mask: np.ndarray, other: np.ndarray) -> bool:
        """Whether two masks are equal; compares eight elements at a time."""
        if mask.shape != other.shape:
            return False
        mask, other = mask.reshape(-1), other.reshape(-1)
        whole, found = mask.size // 8 * 8, np.empty(self.team.threads, bool)
        self.team.run(spmm.find_difference, mask[:whole].view(np.int64), other[:whole].view(np.int64), found)
        return not found.any() and np.array_equal(mask[whole:], other[whole:])

    def _packed(self, name: str, unit_ranges: list[tuple[int, int]], rows: int, w: np.ndarray) -> PackedMatrix:
        """The matrix packed for products of `rows` drives, filled with the weights w."""
        key = (name, len(unit_ranges), rows)
        if key not in self.packed:
            # Keep one batch size only: packed weights take as much memory as the matrix.
            self.packed = {k: kept for k, kept in self.packed.items() if k[0] != name}
            self.packed[key] = pack_matrix(self.patterns[name], unit_ranges, rows)
        self.packed[key].fill(self.team, w)
        return self.packed[key]

    def _unit_ranges(self, n: int) -> list[tuple[int, int]]:
        """Equal shares of the units, one per thread."""
        threads = self.team.threads
        bounds = [event_lists.share(n, LANES, k, threads) for k in range(threads + 1)]
        return list(zip(bounds[:-1], bounds[1:], strict=True))

    # --- forward ------------------------------------------------------------------------------------------------

    def forward(
        self, p: dict, x: np.ndarray, c: np.ndarray, y: np.ndarray, zoneout_mask: np.ndarray | None
    ) -> LayerTape:
        """Run a window from a state. Equals `reference.forward`.

        p            : `w_in` (I, 3N), `w_rec` (N, 3N), `bias_in` and `bias_rec` (3N,), `threshold` (N,). A matrix of
                       gated blocks is a `GatedMatrix`
        x            : (T, B, I) inputs
        c, y         : (B, N) cells and outputs before the window
        zoneout_mask : (T, B, N) bool, True where a unit keeps its cell; None without zoneout
        """
        (steps, batch), n = x.shape[:2], len(p["threshold"])
        shape, pitch, take = WindowShape(self.paper, steps, batch, n), _pitch(n), self.arena.take
        u, r, g, q, v = (take(steps, batch, n) for _ in range(5))
        ys, cs = take(steps + 1, batch, n), take(steps + 1, batch, n)
        ys[0], cs[0] = y, c
        products = gated_layer.products(p, steps * batch, self.team, self.arena)
        state = (v, ys, cs, p["threshold"])
        tape = EventTape(x, values_of(p["w_rec"]), *state, engine=self, products=products, u=u, r=r, g=g, q=q)
        drive_in = take(steps * batch * pitch + SPARE)
        if "w_in" in products:
            flat = drive_in[: steps * batch * pitch].reshape(steps * batch, pitch)[:, : 3 * n]
            products["w_in"].drives(rows_of(x), 0, flat)
            flat += p["bias_in"]
        else:
            tape.share_in = self._input_drives(p, x, drive_in, pitch)
        held = np.zeros(0, bool) if zoneout_mask is None else np.ascontiguousarray(zoneout_mask).reshape(-1)
        if self.backward_mode == "dense" or "w_rec" in products:
            self._forward_by_blas(shape, p, drive_in, pitch, held, tape)
            return tape
        packed = self._packed("w_rec", self._unit_ranges(n), batch, p["w_rec"])
        self.team.run(
            time_loops.forward,
            shape,
            packed.record(p["bias_rec"]),
            p["threshold"],
            drive_in,
            pitch,
            held,
            take(self.team.threads, batch * pitch + SPARE),
            self.workspace.step_events(n, batch),
            self.workspace.product(n, batch, packed.most),
            tape.arrays(),
            barrier=True,
        )
        return tape

    def _input_drives(self, p: dict, x: np.ndarray, drive: np.ndarray, pitch: int) -> float:
        """Write the input drives of all rows; returns the share of x that is not zero."""
        w, rows, (n_pre, columns) = p["w_in"], x.shape[0] * x.shape[1], p["w_in"].shape
        pattern, flat, workspace = self.patterns["w_in"], np.ascontiguousarray(x).reshape(-1), self.workspace
        share = self._nonzero_share(flat)
        if not self._sparse(pattern, share, DRIVES_UP_TO):
            out = drive[: rows * pitch].reshape(rows, pitch)[:, :columns]
            self.team.multiply(flat.reshape(rows, n_pre), w, out)
            out += p["bias_in"]
        elif pattern.layout == ALL:
            some = min(spmm.STRIP_ROWS, rows)
            self.team.run(
                spmm.input_drives,
                flat,
                rows,
                w.reshape(-1),
                n_pre,
                columns,
                p["bias_in"],
                drive,
                pitch,
                workspace.event_lists(n_pre, some, self.team.threads),
                workspace.list_scratch(some),
                workspace.strip(some),
                counter=True,
            )
        else:
            packed = self._packed("w_in", [(0, columns // 3)], 1, w)
            events = workspace.row_events(n_pre, min(rows, spmm.LISTED_ROWS))
            scratch = workspace.product(1, 1, packed.most)
            weights = packed.record(p["bias_in"])
            self.team.run(spmm.stored_drives, flat, weights, n_pre, rows, drive, pitch, events, scratch, counter=True)
        return share

    def _nonzero_share(self, flat: np.ndarray) -> float:
        """Share of elements that are not zero."""
        counts = np.empty(self.team.threads, np.int64)
        self.team.run(cell_update.count_nonzero, flat, counts)
        return counts.sum() / max(1, flat.size)

    def _sparse(self, pattern: Pattern, share: float, limit: float) -> bool:
        """Whether a product goes over events (or active pairs), of which there are the share `share` of all entries."""
        if self.backward_mode != "auto":
            return self.backward_mode == "sparse"
        return share * pattern.stored <= limit * pattern.shape[0] * pattern.shape[1]

    def _forward_by_blas(
        self, shape: WindowShape, p: dict, drive_in: np.ndarray, pitch: int, held: np.ndarray, layer: EventTape
    ) -> None:
        """All steps, with the recurrent products through BLAS."""
        n, batch, w, bias = shape.units, shape.batch, layer.w_rec, p["bias_rec"]
        tape, product = layer.arrays(), layer.products.get("w_rec")
        w_gates, w_candidate = split_gates(self.cell, w)
        drive, size = np.empty((batch, 3 * n), F32), batch * n
        for t in range(shape.steps):
            y, at = tape.y[t * size : (t + 1) * size].reshape(batch, n), t * batch * pitch
            if self.paper:
                drive[:, : 2 * n] = self.team.multiply(y, w_gates) + bias[: 2 * n]
                cell_update.reset_gate_batch(shape, drive_in, at, pitch, drive.reshape(-1), tape, t * size)
                sent = tape.q[t * size : (t + 1) * size].reshape(batch, n)
                drive[:, 2 * n :] = self.team.multiply(sent, w_candidate) + bias[2 * n :]
            else:
                if product is None:
                    self.team.multiply(y, w, drive)
                else:
                    product.drives(y, t * batch, drive)
                drive += bias
            cell_update.update_batch(
                shape, drive_in, at, pitch, drive.reshape(-1), p["threshold"], held, tape, t * size
            )

    # --- backward -----------------------------------------------------------------------------------------------

    def backward(
        self,
        p: dict,
        tape: LayerTape,
        d_y: np.ndarray,
        d_cell: np.ndarray | None,
        input_mask: GradientMask | None,
        stored: bool,
    ) -> LayerGradients:
        """Gradients of the parameters and of the input. Equals `reference.backward` up to the rounding of sums.

        p          : `w_in` (I, 3N); other parameters are read from the tape
        d_y        : (T, B, N) contiguous float32, gradient with respect to the output
        d_cell     : (T, B, N) gradient with respect to the cell before the event, or None
        input_mask : where the gradient of the input is needed; None for nowhere
        stored     : return gradients of pruned matrices as their kept elements only, in the order of `matrix[mask]`
        """
        assert isinstance(tape, EventTape)
        steps, batch, n = tape.v.shape
        rows, pattern = steps * batch, self.patterns["w_rec"]
        tape.work = {}
        work = tape.work["w_rec"] = BackwardWork.none(pattern.kept, 3 * n, rows)
        work.input_gradient_rows = max(0, steps - 1 + self.paper) * batch
        sweep = self._sweep(tape, d_y, d_cell)
        surrogate, v = sweep.surrogate, sweep.tape.v
        share = 1.0 if "w_rec" in tape.products else self._active_share(surrogate, v, rows, n)
        over_pairs = "w_rec" not in tape.products and self._sparse(pattern, share, PAIRS_UP_TO)
        (self._sweep_over_pairs if over_pairs else self._sweep_by_blas)(tape, sweep)
        # Nothing within the window reads the output of the last step. In the paper's variant the reset gate of the
        # first step reads the output before the window.
        last, before = max(0, rows - batch), np.count_nonzero(tape.y[0], axis=0) if self.paper else 0
        work.active_pairs = work.dots.copy() if over_pairs else self._count_active(surrogate, v, 0, last, n) + before
        active = work.active_pairs - before + self._count_active(surrogate, v, last, rows, n)
        tape.support = float(active.sum()) / max(1, rows * n)
        x, y = np.ascontiguousarray(tape.x).reshape(-1), tape.y[:-1].reshape(-1)
        inputs = {
            "w_in": MatrixInputs((x,), tape.share_in),
            "w_rec": MatrixInputs((y, sweep.tape.q) if self.paper else (y,), self._nonzero_share(y)),
        }
        self._list_events({name: each for name, each in inputs.items() if name not in tape.products}, rows)
        deltas = sweep.deltas
        d_threshold, d_bias, pitch = deltas.d_threshold, deltas.d_bias, deltas.pitch
        drives = {"w_in": deltas.d_in, "w_rec": deltas.d_rec}
        gradients, d_x = gated_layer.gradients(
            tape,
            {name: drives[name][: rows * pitch].reshape(rows, pitch)[:, : 3 * n] for name in tape.products},
            input_mask,
            gated_layer.pairs_of_outputs(self.cell, tape),
            self.masks,
        )
        for name, delta in drives.items():
            if name in tape.products:
                gradients[name] = self._masked(name, gradients[name], stored)
            else:
                gradients[name] = self._gradient(name, inputs[name], rows, delta, pitch, tape, stored)
        gradients |= {
            "bias_in": d_bias[: 3 * n].copy(),
            "bias_rec": d_bias[: 3 * n].copy() if self.paper else np.concatenate([d_bias[: 2 * n], d_bias[3 * n :]]),
            "threshold": d_threshold,
        }
        if input_mask is not None and d_x is None:
            d_x = self._input_gradient(p["w_in"], deltas.d_in, pitch, tape, input_mask)
        return LayerGradients(gradients, d_x)

    def _sweep(self, tape: EventTape, d_y: np.ndarray, d_cell: np.ndarray | None) -> _Sweep:
        """The records that the backward kernels take; deltas are not written yet."""
        steps, batch, n = tape.v.shape
        rows, pitch, take = steps * batch, _pitch(n), self.arena.take
        d_in = take(rows * pitch + SPARE)
        d_rec = d_in if self.paper else take(rows * pitch + SPARE)
        for delta in (d_in, d_rec):
            # Segments may be padded with zero weights beyond the last column, where deltas must be finite.
            delta[: rows * pitch].reshape(rows, pitch)[:, 3 * n :] = 0
            delta[rows * pitch :] = 0
        no_cells = np.zeros(batch * n, F32)
        d_cells = no_cells if d_cell is None else np.ascontiguousarray(d_cell, F32).reshape(-1)
        return _Sweep(
            WindowShape(self.paper, steps, batch, n),
            surrogate_parameters(self.cell, tape.threshold),
            tape.arrays(),
            Upstream(d_y.reshape(-1), d_cells, np.zeros(batch * n, F32)),
            Deltas(d_in, d_rec, pitch, np.zeros(n, F32), np.zeros(4 * n, F32)),
        )

    def _count_active(
        self, surrogate: SurrogateParameters, v: np.ndarray, first: int, last: int, n: int, step: int = 1
    ) -> np.ndarray:
        """Count the rows in which each unit fired or has a slope, (N,) int64; of v every `step`-th row in a range."""
        counts = np.empty(n, F32)
        self.team.run(cell_update.count_active, surrogate, v, first, last, step, n, counts)
        return counts.astype(np.int64)

    def _active_share(self, surrogate: SurrogateParameters, v: np.ndarray, rows: int, n: int) -> float:
        """Estimated share of active pairs, from a sample of the rows of v."""
        # An odd step does not pick the same samples of each time step.
        step = rows // SAMPLED_ROWS | 1
        return float(self._count_active(surrogate, v, 0, rows, n, step).sum()) / max(1, -(-rows // step) * n)

    def _sweep_over_pairs(self, tape: LayerTape, sweep: _Sweep) -> None:
        """All steps back, with the recurrent products at active pairs only."""
        batch, n, take, workspace = sweep.shape.batch, sweep.shape.units, self.arena.take, self.workspace
        pattern, work = self.patterns["w_rec"], tape.work["w_rec"]
        gates = 2 * n if self.paper else 3 * n
        stored = np.zeros(0, F32) if pattern.layout == ALL else self._stored(pattern, tape.w_rec)
        self.team.run(
            time_loops.backward,
            sweep.shape,
            sweep.surrogate,
            tape.w_rec.reshape(-1),
            self._sampled(pattern, stored, 0, gates),
            self._sampled(pattern, stored, gates, 3 * n),
            sweep.tape,
            sweep.upstream,
            workspace.pairs(pattern.layout == ALL, n, batch),
            take(batch * n),
            take(2 * batch * n),
            sweep.deltas,
            work.dots,
            barrier=True,
        )
        work.dots_stored = pattern.executed_out()

    def _sampled(self, pattern: Pattern, stored: np.ndarray, low: int, high: int) -> SampledWeights:
        """The columns `low` to `high` of a matrix for sampled products.

        For the layout ALL, `values` of the result is space for packed chunks.
        """
        values = self.workspace.chunks(pattern.shape[0], high - low) if pattern.layout == ALL else stored
        bounds = pattern.bounds(low, high)
        return SampledWeights(pattern.layout, pattern.width, values, pattern.columns, bounds, low, high - low)

    def _stored(self, pattern: Pattern, w: np.ndarray) -> np.ndarray:
        """The stored weights of a matrix, segments padded with zeros."""
        values = self.arena.take(pattern.stored + SPARE)
        if pattern.layout == SEGMENTS:
            # Memory of the arena is not initialised, and the padding is multiplied.
            values[:] = 0
        pattern.pick(self.team, w, values)
        return values

    def _sweep_by_blas(self, tape: LayerTape, sweep: _Sweep) -> None:
        """All steps back, with the recurrent products through BLAS."""
        steps, batch, n = tape.v.shape
        shape, surrogate, arrays, deltas = sweep.shape, sweep.surrogate, sweep.tape, sweep.deltas
        w_gates, w_candidate = split_gates(self.cell, tape.w_rec)
        product = tape.products.get("w_rec")
        gates, size, d_before, pitch = w_gates.shape[1], batch * n, np.zeros(batch * n, F32), deltas.pitch
        d_y, d_cell_step = sweep.upstream.d_y.reshape(steps, batch, n), size if len(sweep.upstream.d_cell) > size else 0
        d_sum = d_y[-1] if steps else d_y
        for t in reversed(range(steps)):
            at, s = t * batch * pitch, t * size
            cell_update.adjoint_batch(
                shape,
                surrogate,
                arrays,
                s,
                d_sum.reshape(-1),
                sweep.upstream,
                t * d_cell_step,
                d_before,
                deltas,
                at,
            )
            rows = deltas.d_rec[at : at + batch * pitch].reshape(batch, pitch)
            if self.paper:
                d_sent = self.team.multiply(rows[:, 2 * n : 3 * n], w_candidate.T).reshape(-1)
                cell_update.reset_gate_adjoint_batch(shape, arrays, s, d_sent, deltas, at, d_before)
            if product is not None:
                d_sent = product.input_gradient(tape.y[t], rows[:, :gates], t * batch)
                d_sum = d_sent + d_y[t - 1] if t > 0 else d_sum
            elif t > 0:
                d_sum = self.team.multiply(rows[:, :gates], w_gates.T) + d_y[t - 1]
                if self.paper:
                    d_sum += d_before.reshape(batch, n)
        work = tape.work["w_rec"]
        work.dots, work.dots_stored = np.full(n, work.input_gradient_rows), np.full(n, 3 * n)

    def _list_events(self, inputs: dict[str, MatrixInputs], rows: int) -> None:
        """List the events by unit of every matrix whose weight gradient goes over events."""
        for name, source in inputs.items():
            pattern = self.patterns[name]
            if not self._sparse(pattern, source.share, EVENTS_UP_TO):
                continue
            segments, n = pattern.layout == SEGMENTS, pattern.shape[0]
            tile = spmm.SEGMENT_ROWS if segments else event_lists.TILE_ROWS
            scratch = self.workspace.list_scratch(n)
            for x in source.arrays:
                lists = self.workspace.event_lists(rows, n, tile=tile)
                self.team.run(event_lists.events_csc, x, rows, n, tile, not segments, lists, scratch, counter=True)
                source.lists.append(lists)

    def _gradient(
        self,
        name: str,
        inputs: MatrixInputs,
        rows: int,
        delta: np.ndarray,
        pitch: int,
        tape: LayerTape,
        stored: bool,
    ) -> np.ndarray:
        """Gradient of a weight matrix from its inputs and the deltas of its drives."""
        pattern, take, workspace = self.patterns[name], self.arena.take, self.workspace
        (n_pre, columns), cut = pattern.shape, pattern.cut
        ranges = [(0, columns)] if len(inputs.arrays) == 1 else [(0, cut), (cut, columns)]
        work = tape.work.setdefault(name, BackwardWork.none(pattern.kept, columns, rows))
        if not inputs.lists:
            x = inputs.arrays[0].reshape(rows, n_pre)
            work.fired = np.count_nonzero(x, axis=0)
            work.gradient_rows, work.gradient_stored = np.full(n_pre, rows, np.int64), np.full(n_pre, columns, np.int64)
            flat = delta[: rows * pitch].reshape(rows, pitch)
            gradient = take(n_pre, columns)
            for source, (low, high) in zip(inputs.arrays, ranges, strict=True):
                self.team.multiply(source.reshape(rows, n_pre).T, flat[:, low:high], gradient[:, low:high])
            return self._masked(name, gradient, stored)
        counts = np.diff(inputs.lists[0].indptr.reshape(-1, n_pre + 1), axis=1)
        if pattern.layout == SEGMENTS:
            work.fired = counts.sum(axis=0)
        else:
            work.fired = np.bincount(inputs.lists[0].order, counts.reshape(-1), n_pre).astype(np.int64)
        work.gradient_rows, work.gradient_stored = work.fired, pattern.executed_out()
        scratch = workspace.strip(n_pre)
        if pattern.layout == ALL:
            gradient = take(n_pre, columns)
            for lists, (low, high) in zip(inputs.lists, ranges, strict=True):
                arguments = lists, rows, n_pre, delta, pitch, gradient.reshape(-1), columns, low, high, scratch
                self.team.run(spmm.dense_gradient, *arguments, counter=True)
            return self._masked(name, gradient, stored)
        out = take(pattern.stored + LANES)
        for lists, (low, high), chosen in zip(inputs.lists, ranges, pattern.orders(ranges), strict=True):
            entries = StoredEntries(chosen, pattern.units, pattern.columns, pattern.width)
            if pattern.layout == SEGMENTS:
                tile = workspace.segment_tile(pattern.width)
                arguments = entries, lists, rows, n_pre, delta, pitch, tile, out
                self.team.run(spmm.segment_gradient, *arguments, counter=True)
            else:
                strips = np.searchsorted(pattern.columns[chosen], np.append(np.arange(low, high, STRIP), high))
                arguments = entries, strips, low, high, lists, rows, n_pre, delta, pitch, scratch, out
                self.team.run(spmm.single_gradient, *arguments, counter=True)
                work.gradient_stored = np.full(n_pre, columns, np.int64)
        if stored:
            return pattern.compact(self.team, out)
        gradient = take(n_pre, columns)
        gradient[:] = 0
        pattern.spread(self.team, out, gradient)
        return gradient

    def _masked(self, name: str, gradient: np.ndarray, stored: bool) -> np.ndarray:
        """A dense gradient in which the elements of pruned weights are left out (`stored`) or zero."""
        mask = self.masks[name]
        if mask is None:
            return gradient
        if stored:
            return gradient[mask]
        gradient *= mask
        return gradient

    def _input_gradient(
        self, w: np.ndarray, d_in: np.ndarray, pitch: int, tape: LayerTape, input_mask: GradientMask
    ) -> np.ndarray:
        """Gradient of the inputs (T, B, I), where the mask needs it."""
        steps, batch, _ = tape.v.shape
        pattern, rows, (n_pre, columns) = self.patterns["w_in"], steps * batch, w.shape
        work, surrogate, v = tape.work["w_in"], input_mask.surrogate, input_mask.v
        work.input_gradient_rows = rows
        share = 1.0 if v is None else self._active_share(surrogate, v, rows, n_pre)
        d_x = self.arena.take(steps, batch, n_pre)
        if not self._sparse(pattern, share, PAIRS_UP_TO):
            every = np.full(n_pre, rows, np.int64)
            work.active_pairs = every if v is None else self._count_active(surrogate, v, 0, rows, n_pre)
            work.dots, work.dots_stored = every, np.full(n_pre, columns, np.int64)
            flat = d_in[: rows * pitch].reshape(rows, pitch)[:, :columns]
            self.team.multiply(flat, w.T, d_x.reshape(rows, n_pre))
            input_mask.zero_elsewhere(d_x)
            return d_x
        tiled = pattern.layout == ALL
        weights = self._sampled(pattern, np.zeros(0, F32) if tiled else self._stored(pattern, w), 0, columns)
        if tiled:
            self.team.run(sddmm.pack_matrix_chunks, w.reshape(-1), n_pre, columns, weights.values)
        dots = np.zeros((self.team.threads, n_pre), np.int64)
        self.team.run(
            time_loops.gradient_of_inputs,
            weights,
            d_in,
            pitch,
            rows,
            n_pre,
            EVERY if v is None else ACTIVE,
            surrogate,
            np.zeros(0, F32) if v is None else v,
            self.workspace.pairs(tiled, n_pre, min(rows, WINDOW_ROWS if tiled else STORED_ROWS)),
            d_x.reshape(-1),
            dots,
            counter=True,
        )
        work.active_pairs = work.dots = dots.sum(axis=0)
        work.dots_stored = pattern.executed_out()
        return d_x


def _pitch(n: int) -> int:
    """The number of floats from one row of drives or deltas to the next, for n units."""
    return -(-3 * n // LANES) * LANES + 4 * LANES


def split_gates(cell: Cell, w_rec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns of the gates u and r, and those of the candidate, as contiguous arrays for BLAS.

    In the released variant, which multiplies all columns at once, both are the whole matrix.
    """
    n = len(w_rec)
    if cell.variant == "evnn":
        return w_rec, w_rec
    return np.ascontiguousarray(w_rec[:, : 2 * n]), np.ascontiguousarray(w_rec[:, 2 * n :])
