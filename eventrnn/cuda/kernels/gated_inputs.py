"""The inputs of a step of a gated layer: device functions that wait for a row of an event log.

The docstring of `gated_blocks.py` has the shapes of `inputs`, `active` and `maxima`.
"""

from __future__ import annotations

from numba import int32, int64

from eventrnn.cuda.device import device_function
from eventrnn.cuda.kernels.gated_kernels import magnitude_bits
from eventrnn.cuda.kernels.persistent import poll_event_log
from eventrnn.cuda.kernels.ptx import max_of_warp
from eventrnn.cuda.tables import LANES


@device_function
def keep_input(inputs, active, row, left, at, r, padding, value):
    """Write one of neighbouring units to its padded place; `left` units follow in its block row.

    Returns the block row of the next unit and the units that are left in it.
    """
    inputs[int32(at + row * padding)] = value
    if value != 0:
        active[row] = int32(1)
    left = int32(left - 1)
    if left == 0:
        row, left = int32(row + 1), r
    return row, left


@device_function
def load_row(row_at, n, r, padding, inputs, active, maxima, me):
    """Wait for a row of an event log of n units, and write it to shared memory. Returns whether a word did not come.

    r, padding : rows of a block, and rows of zeros behind them in `inputs`
    """
    lane, warp, warps = me
    at, missing, best = int32(4 * (warp * LANES + lane)), int32(0), int32(0)
    while at < n:
        # Before the words are here.
        row = int32(at // r)
        left = int32(r - (at - row * r))
        a, b, c, d, complete = poll_event_log(row_at + int64(4) * at, int32(n - at))
        if not complete:
            missing = int32(1)
        largest = int32(max(magnitude_bits(a), magnitude_bits(b), magnitude_bits(c), magnitude_bits(d)))
        if left >= 4 and at + 4 <= n:
            to = int32(at + row * padding)
            inputs[to], inputs[int32(to + 1)], inputs[int32(to + 2)], inputs[int32(to + 3)] = a, b, c, d
            if largest != 0:
                active[row] = int32(1)
        else:
            row, left = keep_input(inputs, active, row, left, at, r, padding, a)
            if at + 1 < n:
                row, left = keep_input(inputs, active, row, left, int32(at + 1), r, padding, b)
            if at + 2 < n:
                row, left = keep_input(inputs, active, row, left, int32(at + 2), r, padding, c)
            if at + 3 < n:
                row, left = keep_input(inputs, active, row, left, int32(at + 3), r, padding, d)
        best = int32(max(best, largest))
        at = int32(at + 4 * LANES * warps)
    best = max_of_warp(best)
    if lane == 0:
        maxima[warp] = best
    return missing
