"""The update of one unit in one step, by cell: drives to output and cell, as in `reference.step`.

The rules are those of `cells.py`, compiled in `ptx.py`. Every function below takes the same arguments and works on the
registers of one thread:

drive_in, i   : array of float32 input drives; that of gate k, in the order of `cells.EQUATIONS`, lies at i + k * stride
drive_rec, s  : the same of the recurrent drives
c, y          : float32 cell and output of the step before
thresholds, p : array of float32 thresholds; that of the unit lies at p. Cells without thresholds do not read it

It returns the output and the cell after the step. Where the reset gate comes first, the candidate's recurrent drive is
that of `r * y`, and the drives of the reset gate are not read again.
"""

from __future__ import annotations

import numpy as np

from eventrnn.cuda.device import device_function
from eventrnn.cuda.kernels.ptx import (
    egru_paper_value,
    egru_value,
    gru_before_value,
    gru_value,
    lstm_value,
)


@device_function
def egru_update(drive_in, i, drive_rec, s, stride, c, y, thresholds, p):
    """EGRU, variant "evnn"."""
    v, _, _, _ = egru_value(
        drive_in[i],
        drive_in[i + stride],
        drive_in[i + 2 * stride],
        drive_rec[s],
        drive_rec[s + stride],
        drive_rec[s + 2 * stride],
        c,
    )
    threshold, value, after = thresholds[p], np.float32(0), v
    if v > threshold:
        value = v
        after = v - threshold
    return value, after


@device_function
def egru_paper_update(drive_in, i, drive_rec, s, stride, c, y, thresholds, p):
    """EGRU, variant "paper"."""
    v, _, _ = egru_paper_value(
        drive_in[i],
        drive_in[i + 2 * stride],
        drive_rec[s],
        drive_rec[s + 2 * stride],
        c,
        y,
    )
    value = np.float32(0)
    if v > thresholds[p]:
        value = v
    return value, v


@device_function
def gru_update(drive_in, i, drive_rec, s, stride, c, y, thresholds, p):
    """GRU, variant "after"."""
    h, _, _, _ = gru_value(
        drive_in[i],
        drive_in[i + stride],
        drive_in[i + 2 * stride],
        drive_rec[s],
        drive_rec[s + stride],
        drive_rec[s + 2 * stride],
        c,
    )
    return h, h


@device_function
def gru_before_update(drive_in, i, drive_rec, s, stride, c, y, thresholds, p):
    """GRU, variant "before"."""
    h, _, _ = gru_before_value(
        drive_in[i],
        drive_in[i + 2 * stride],
        drive_rec[s],
        drive_rec[s + 2 * stride],
        c,
    )
    return h, h


@device_function
def lstm_update(drive_in, i, drive_rec, s, stride, c, y, thresholds, p):
    """LSTM."""
    h, after, _, _, _, _ = lstm_value(
        drive_in[i],
        drive_in[i + stride],
        drive_in[i + 2 * stride],
        drive_in[i + 3 * stride],
        drive_rec[s],
        drive_rec[s + stride],
        drive_rec[s + 2 * stride],
        drive_rec[s + 3 * stride],
        c,
    )
    return h, after


#: name and variant of a cell -> its update
UPDATES = {
    ("egru", "evnn"): egru_update,
    ("egru", "paper"): egru_paper_update,
    ("gru", "after"): gru_update,
    ("gru", "before"): gru_before_update,
    ("lstm", "standard"): lstm_update,
}
