"""One layer of a cell without thresholds (GRU, LSTM) through a window, forward and backward.

Its units send their output at every step, so that every product goes through BLAS; `kernels/plain_cells.py` has the
element-wise part. Equations: `reference.forward` and `reference.backward`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from eventrnn.counting.backward import BackwardWork
from eventrnn.training.bptt import gated_layer
from eventrnn.training.bptt.gated_products import rows_of, values_of
from eventrnn.training.bptt.kernels import plain_cells
from eventrnn.training.bptt.kernels.records import PlainArrays, PlainDeltas, PlainDrives, PlainSize
from eventrnn.training.bptt.layer import LayerEngine
from eventrnn.training.bptt.tape import LayerGradients, LayerTape, MatrixInputs

F32 = np.float32

Kernel = Callable[..., Any]

NONE = np.zeros(0, F32)


@dataclass(frozen=True)
class Rule:
    """The kernels of a cell; those of a reset gate that comes before the product are apart."""

    forward: Kernel
    backward: Kernel
    reset_forward: Kernel | None = None
    reset_backward: Kernel | None = None


#: cell name -> variant -> its kernels
RULES = {
    "gru": {
        "after": Rule(plain_cells.gru, plain_cells.gru_adjoint),
        "before": Rule(
            plain_cells.gru_before,
            plain_cells.gru_before_adjoint,
            plain_cells.gru_reset,
            plain_cells.gru_reset_adjoint,
        ),
    },
    "lstm": {"standard": Rule(plain_cells.lstm, plain_cells.lstm_adjoint)},
}


@dataclass(kw_only=True)
class PlainTape(LayerTape):
    """The tape of a cell without thresholds, of G gates. In a GRU, `v`, `y` and `c` are the same numbers.

    Attributes
    ----------
    gates : (T, B, GN) gates in the order of the cell
    extra : (T, B, N) of a GRU the recurrent drive of the candidate, or r * h where the reset gate comes first; (0,) of
            an LSTM
    """

    gates: np.ndarray
    extra: np.ndarray

    def arrays(self) -> PlainArrays:
        """The arrays of the tape, flat, for kernels."""
        return PlainArrays(*(a.reshape(-1) for a in (self.gates, self.extra, self.y, self.c)))


class PlainLayerEngine(LayerEngine):
    """Runs one layer of a cell without thresholds. Parameters: see `LayerEngine`; all products are dense."""

    @property
    def rule(self) -> Rule:
        """The kernels of the cell."""
        return RULES[self.cell.name][self.cell.variant]

    def forward(self, p, x, c, y, zoneout_mask) -> PlainTape:
        """Run a window from a state. Parameters: see `LayerEngine.forward`; the threshold is not read."""
        (steps, batch), w_rec, take = x.shape[:2], values_of(p["w_rec"]), self.arena.take
        n, columns = w_rec.shape
        products, size = gated_layer.products(p, steps * batch, self.team, self.arena), PlainSize(batch, n)
        gates, ys = take(steps, batch, columns), take(steps + 1, batch, n)
        ys[0] = y
        single = self.cell.equations.single_state
        cs = ys if single else take(steps + 1, batch, n)
        cs[0] = c
        extra = take(steps, batch, n) if single else NONE
        state = (cs[1:], ys, cs, p["threshold"])
        tape = PlainTape(x, w_rec, *state, engine=self, products=products, gates=gates, extra=extra)
        into, rec = take(steps * batch, columns), take(batch, columns)
        if "w_in" in products:
            products["w_in"].drives(rows_of(x), 0, into)
        else:
            self.team.multiply(rows_of(x), p["w_in"], into)
        held = NONE if zoneout_mask is None else zoneout_mask.astype(F32).reshape(-1)
        drives = PlainDrives(into.reshape(-1), rec.reshape(-1), p["bias_in"], p["bias_rec"], held)
        (w_output, w_candidate), arrays = self._parts(w_rec), tape.arrays()
        cut, product = w_output.shape[1], products.get("w_rec")
        for t in range(steps):
            if product is not None:
                product.drives(ys[t], t * batch, rec)
            else:
                self.team.multiply(ys[t], w_output, rec[:, :cut])
            if self.rule.reset_forward is not None:
                self.rule.reset_forward(size, drives, arrays, t)
                self.team.multiply(extra[t], w_candidate, rec[:, cut:])
            self.rule.forward(size, drives, arrays, t)
        return tape

    def _parts(self, w_rec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The columns that take the output of the step before, and those that take r * h, contiguous for BLAS."""
        cut = len(w_rec) * (self.cell.gates - self.cell.reset_first)
        return np.ascontiguousarray(w_rec[:, :cut]), np.ascontiguousarray(w_rec[:, cut:])

    def backward(self, p, tape, d_y, d_cell, input_mask, stored) -> LayerGradients:
        """Gradients of the parameters and of the input. Parameters: see `LayerEngine.backward`."""
        assert isinstance(tape, PlainTape)
        (steps, batch, n), columns = tape.v.shape, tape.gates.shape[2]
        rows, take = steps * batch, self.arena.take
        d_in = take(rows, columns)
        # Only a reset gate after the product tells the two drives of a gate apart.
        apart = len(tape.extra) > 0 and not self.cell.reset_first
        d_rec = take(rows, columns) if apart else d_in
        self._sweep_back(tape, d_y, d_cell, d_in, d_rec)
        tape.support, y = 1.0, tape.y[:-1].reshape(-1)
        tape.work = {"w_rec": BackwardWork.none(self.patterns["w_rec"].kept, columns, rows)}
        work = tape.work["w_rec"]
        # Nothing within the window reads the output of the last step. Where the reset gate comes first, that of the
        # first step reads the output before the window.
        work.input_gradient_rows = max(0, steps - 1 + self.cell.reset_first) * batch
        work.active_pairs = work.dots = np.full(n, work.input_gradient_rows, np.int64)
        work.dots_stored = np.full(n, columns, np.int64)
        inputs = {
            "w_in": MatrixInputs((rows_of(tape.x).reshape(-1),), 1.0),
            "w_rec": MatrixInputs((y, tape.extra.reshape(-1)) if self.cell.reset_first else (y,), 1.0),
        }
        deltas = {"w_in": d_in, "w_rec": d_rec}
        gradients, d_x = gated_layer.gradients(
            tape,
            {name: deltas[name] for name in tape.products},
            input_mask,
            gated_layer.pairs_of_outputs(self.cell, tape),
            self.masks,
        )
        for name, delta in deltas.items():
            if name in tape.products:
                gradients[name] = self._masked(name, gradients[name], stored)
            else:
                flat = delta.reshape(-1)
                gradients[name] = self._gradient(name, inputs[name], rows, flat, columns, tape, stored)
        gradients |= {"bias_in": d_in.sum(axis=0), "bias_rec": d_rec.sum(axis=0), "threshold": np.zeros(n, F32)}
        if input_mask is not None and d_x is None:
            d_x = self._input_gradient(p["w_in"], d_in.reshape(-1), columns, tape, input_mask)
        return LayerGradients(gradients, d_x)

    def _sweep_back(
        self, tape: PlainTape, d_y: np.ndarray, d_cell: np.ndarray | None, d_in: np.ndarray, d_rec: np.ndarray
    ) -> None:
        """All steps back: write the gradients of the drives (T B, GN)."""
        steps, batch, n = tape.v.shape
        d_cells = NONE if d_cell is None else np.ascontiguousarray(d_cell, F32).reshape(-1)
        d_c, d_sum, d_sent = np.zeros(batch * n, F32), np.zeros((batch, n), F32), self.arena.take(batch, n)
        size, arrays = PlainSize(batch, n), tape.arrays()
        deltas = PlainDeltas(d_in.reshape(-1), d_rec.reshape(-1), d_sum.reshape(-1), d_cells, d_c)
        w_output, w_candidate = self._parts(tape.w_rec)
        cut, product = w_output.shape[1], tape.products.get("w_rec")
        for t in reversed(range(steps)):
            d_sum += d_y[t]
            self.rule.backward(size, arrays, deltas, t)
            own = slice(t * batch, (t + 1) * batch)
            if self.rule.reset_backward is not None:
                self.team.multiply(d_in[own, cut:], w_candidate.T, d_sent)
                self.rule.reset_backward(size, arrays, d_sent.reshape(-1), deltas, t)
            if product is not None:
                # A gate has a gradient through its inputs also where that of the inputs is not needed.
                d_sum[...] = product.input_gradient(tape.y[t], d_rec[own], t * batch)
            elif t > 0:
                self.team.multiply(d_rec[own, :cut], w_output.T, d_sum)
