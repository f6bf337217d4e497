"""MOVED."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.cell_update import update, update_paper
from eventrnn.cpu.kernels.jit import allocating

if TYPE_CHECKING:
    pass


@allocating
def steps(n, batch, length, drive_in, w_rec, bias_rec, threshold, c, y, ys_out, cs_out):
    """`length` steps of the released variant. drive_in flat (length, batch, 3N); c, y flat (batch, N), in place."""
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
    """`length` steps of the paper's variant; w_gates (N, 2N) and w_candidate (N, N) contiguous."""
    gates, candidate = np.empty((batch, 2 * n), np.float32), np.empty((batch, n), np.float32)
    sent, before = np.empty((batch, n), np.float32), y.reshape(batch, n)
    rec = np.empty((batch, 3 * n), np.float32)
    for t in range(length):
        np.dot(before, w_gates, gates)
        for b in range(batch):
            at = (t * batch + b) * 3 * n
            for i in range(n):
                reset = cells.egru_reset_gate(drive_in[at + n + i], gates[b, n + i] + bias_rec[n + i])
                sent[b, i] = reset * before[b, i]
        np.dot(sent, w_candidate, candidate)
        for b in range(batch):
            for i in range(n):
                rec[b, i] = gates[b, i] + bias_rec[i]
                rec[b, 2 * n + i] = candidate[b, i] + bias_rec[2 * n + i]
        flat = rec.reshape(rec.size)
        for b in range(batch):
            update_paper(n, drive_in, (t * batch + b) * 3 * n, flat, b * 3 * n, threshold, 0, c, y, b * n)
        ys_out[t] = y
        cs_out[t] = c
