"""Time loops of the BLAS engine: one layer, all steps, dense weights.

The calling thread owns the whole layer; BLAS may start threads of its own inside a product. All arrays belong to the
caller, except the products of one step, which are allocated at the start. A loop equals the steps of
`reference.forward` up to the order of the terms of a product, which BLAS chooses. Results are therefore not exact. The
cell updates are those of `cell_update.py`; `loop_of` chooses the loop of a cell, which is compiled when it is needed.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.cell_update import update, update_gru, update_gru_before, update_lstm, update_paper
from eventrnn.cpu.kernels.jit import allocating


def _steps(update, gates):
    """The loop of a cell whose recurrent products are one."""

    @allocating
    def steps(n, batch, length, drive_in, w_rec, bias_rec, threshold, c, y, ys_out, cs_out):
        """Compute `length` steps.

        n              : units N; a unit has G gates
        drive_in       : (length * batch * G N,) float32, input drives with their bias
        w_rec          : (N, G N) float32
        bias_rec       : (G N,) float32
        threshold      : (N,) float32
        c, y           : (batch * N,) float32, cells and outputs, updated in place
        ys_out, cs_out : (length, batch * N) float32, outputs and cells of every step
        """
        columns = gates * n
        rec = np.empty((batch, columns), np.float32)
        before = y.reshape(batch, n)
        for t in range(length):
            np.dot(before, w_rec, rec)
            for b in range(batch):
                for i in range(columns):
                    rec[b, i] += bias_rec[i]
            flat = rec.reshape(rec.size)
            for b in range(batch):
                update(n, drive_in, (t * batch + b) * columns, flat, b * columns, threshold, 0, c, y, b * n)
            ys_out[t] = y
            cs_out[t] = c

    return steps


def _reset_first_steps(update):
    """The loop of a cell with gates (u, r, g) whose reset gate comes before the candidate's recurrent product."""

    @allocating
    def reset_first_steps(n, batch, length, drive_in, w_gates, w_candidate, bias_rec, threshold, c, y, ys_out, cs_out):
        """Compute `length` steps.

        w_gates     : (N, 2N) float32, contiguous, the columns of the gates u and r
        w_candidate : (N, N) float32, contiguous, the columns of the candidate

        Other parameters: see `_steps`.
        """
        gates, candidate = np.empty((batch, 2 * n), np.float32), np.empty((batch, n), np.float32)
        gated, before = np.empty((batch, n), np.float32), y.reshape(batch, n)
        rec = np.empty((batch, 3 * n), np.float32)
        for t in range(length):
            np.dot(before, w_gates, gates)
            for b in range(batch):
                at = (t * batch + b) * 3 * n
                for i in range(n):
                    reset = cells.egru_reset_gate(drive_in[at + n + i], gates[b, n + i] + bias_rec[n + i])
                    gated[b, i] = reset * before[b, i]
            np.dot(gated, w_candidate, candidate)
            for b in range(batch):
                for i in range(n):
                    rec[b, i] = gates[b, i] + bias_rec[i]
                    rec[b, 2 * n + i] = candidate[b, i] + bias_rec[2 * n + i]
            flat = rec.reshape(rec.size)
            for b in range(batch):
                update(n, drive_in, (t * batch + b) * 3 * n, flat, b * 3 * n, threshold, 0, c, y, b * n)
            ys_out[t] = y
            cs_out[t] = c

    return reset_first_steps


_LOOPS = {
    ("egru", "evnn"): lambda: _steps(update, 3),
    ("egru", "paper"): lambda: _reset_first_steps(update_paper),
    ("gru", "after"): lambda: _steps(update_gru, 3),
    ("gru", "before"): lambda: _reset_first_steps(update_gru_before),
    ("lstm", "standard"): lambda: _steps(update_lstm, 4),
}


@cache
def loop_of(name: str, variant: str) -> Any:
    """The loop of a cell: `steps`, or `reset_first_steps` where the reset gate comes before the recurrent product."""
    return _LOOPS[name, variant]()
