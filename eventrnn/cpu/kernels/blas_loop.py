"""Time loops of the BLAS engine: one layer, all steps, dense weights.

The calling thread owns the whole layer; BLAS may start threads of its own inside a product. All arrays belong to the
caller, except the products of one step, which are allocated at the start. A loop equals the steps of
`reference.forward` up to the order of the terms of a product, which BLAS chooses. Results are therefore not exact. The
cell updates are those of `cell_update.py`.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.cell_update import update, update_paper
from eventrnn.cpu.kernels.jit import allocating


@allocating
def steps(n, batch, length, drive_in, w_rec, bias_rec, threshold, c, y, ys_out, cs_out):
    """Compute `length` steps of the released variant.

    n              : units N
    drive_in       : (length * batch * 3N,) float32, input drives with their bias
    w_rec          : (N, 3N) float32
    bias_rec       : (3N,) float32
    threshold      : (N,) float32
    c, y           : (batch * N,) float32, cells and outputs, updated in place
    ys_out, cs_out : (length, batch * N) float32, outputs and cells of every step
    """
    rec = np.empty((batch, 3 * n), np.float32)
    before = y.reshape(batch, n)
    for t in range(length):
        np.dot(before, w_rec, rec)
        for b in range(batch):
            for i in range(3 * n):
                rec[b, i] += bias_rec[i]
        flat = rec.reshape(rec.size)
        for b in range(batch):
            update(n, drive_in, (t * batch + b) * 3 * n, flat, b * 3 * n, threshold, 0, c, y, b * n)
        ys_out[t] = y
        cs_out[t] = c


@allocating
def paper_steps(n, batch, length, drive_in, w_gates, w_candidate, bias_rec, threshold, c, y, ys_out, cs_out):
    """Compute `length` steps of the paper's variant.

    w_gates     : (N, 2N) float32, contiguous, the columns of the gates u and r
    w_candidate : (N, N) float32, contiguous, the columns of the candidate

    Other parameters: see `steps`.
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
            update_paper(n, drive_in, (t * batch + b) * 3 * n, flat, b * 3 * n, threshold, 0, c, y, b * n)
        ys_out[t] = y
        cs_out[t] = c
