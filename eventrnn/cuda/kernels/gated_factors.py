"""Logits of a gate of two factors, all of which every block of threads computes by itself: device functions.

With few numbers between the two factors, it takes less time to compute all logits than to wait for those that other
blocks compute. The sums are those of `weights/gated.py`: the parts of a number are sums of their own, and a warp adds
those of the inputs that it has received itself, so that the block waits once.

=========== ======== ===========================================================================================
array       memory   shape, dtype, contents
=========== ======== ===========================================================================================
inputs      shared   (padded rows,) float32, one row of inputs
factor      shared   (padded rows / 4, FACTOR_COLUMNS, 4) float32, the first factor, with columns of zeros
parts       shared   (parts, 32) float32, parts of the numbers between the two factors
out         global   `gated_matrix.RowStrips` of the second factor, whose rows are padded to FACTOR_COLUMNS
=========== ======== ===========================================================================================
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.gated_strips import add8
from eventrnn.cuda.kernels.ptx import copy_async16, global_int64, load_readonly4, shared_float32
from eventrnn.cuda.kernels.strip_product import FULL_WARP
from eventrnn.cuda.tables import FACTOR_COLUMNS, LANES, SEGMENT

assert FACTOR_COLUMNS == 16, "a lane holds 16 weights of a logit, and two parts have as many columns as a warp has lanes"


@device_function
def copy_factor(target_at, source_at, n_rows, thread, threads):
    """Start copying the first factor of `n_rows` rows to shared memory."""
    piece, pieces = int64(thread), int64(n_rows) * (4 * FACTOR_COLUMNS // 16)
    while piece < pieces:
        copy_async16(target_at + 16 * piece, source_at + 16 * piece)
        piece += threads


def make_add_parts(add_piece: Any):
    """The device function add_parts(inputs_at, factor_at, parts_at, part_rows, n_rows, me); `add_piece` is that of
    `make_add_strip` for float32 weights.

    A warp adds the parts of every `warps`-th SEGMENT of inputs, of which part_rows is a divisor.
    """

    @device_function
    def add_parts(inputs_at, factor_at, parts_at, part_rows, n_rows, me):
        lane, warp, warps = me
        of_segment = int32(SEGMENT // part_rows)
        column, number = int32(lane & int32(FACTOR_COLUMNS - 1)), int32(lane // FACTOR_COLUMNS)
        while True:
            turn = int32(number // of_segment)
            part = int32(int32(warp + warps * turn) * of_segment + int32(number - turn * of_segment))
            first = int32(part * part_rows)
            if first >= n_rows:
                break
            acc = add_piece(
                *(np.float32(0), factor_at + int64(4 * FACTOR_COLUMNS) * first + int64(16) * column),
                *(inputs_at + int64(4) * first, int32(FACTOR_COLUMNS), int32(min(part_rows, n_rows - first))),
            )
            shared_float32(parts_at)[int32(part * LANES + column)] = acc
            number = int32(number + LANES // FACTOR_COLUMNS)

    return add_parts


@device_function
def out_of_logit(values_at, offsets_at, width, logit):
    """The address of the weights of a logit in strips of the second factor, of `width` columns each."""
    strip = int32(logit // width)
    return values_at + int64(4) * global_int64(offsets_at)[strip] + int64(16) * int32(logit - strip * width)


@device_function
def load_out(at, width):
    """The FACTOR_COLUMNS weights of a logit, in global memory. The loads are issued here."""
    step = int64(16) * width
    a, b, c, d = load_readonly4(at), load_readonly4(at + step), load_readonly4(at + 2 * step), load_readonly4(at + 3 * step)
    return (
        *(a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]),
        *(c[0], c[1], c[2], c[3], d[0], d[1], d[2], d[3]),
    )


@device_function
def eight_of_warp(value, first):
    """The numbers of eight neighbouring lanes."""
    return (
        cuda.shfl_sync(FULL_WARP, value, first),
        cuda.shfl_sync(FULL_WARP, value, int32(first + 1)),
        cuda.shfl_sync(FULL_WARP, value, int32(first + 2)),
        cuda.shfl_sync(FULL_WARP, value, int32(first + 3)),
        cuda.shfl_sync(FULL_WARP, value, int32(first + 4)),
        cuda.shfl_sync(FULL_WARP, value, int32(first + 5)),
        cuda.shfl_sync(FULL_WARP, value, int32(first + 6)),
        cuda.shfl_sync(FULL_WARP, value, int32(first + 7)),
    )


@device_function
def two_logits(value, one, other, start, other_start):
    """Two logits of each lane. value : the number between the two factors of the lane's column; one, other : weights"""
    low, high = eight_of_warp(value, int32(0)), eight_of_warp(value, int32(8))
    first, second = add8(start, one[:8], low), add8(other_start, other[:8], low)
    return add8(first, one[8:], high), add8(second, other[8:], high)
