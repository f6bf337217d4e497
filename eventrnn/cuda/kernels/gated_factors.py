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

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.gated_strips import add8
from eventrnn.cuda.kernels.ptx import (
    copy_async16,
    global_float32,
    global_int64,
    load_readonly4,
    load_shared_float,
    shared_float32,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP
from eventrnn.cuda.tables import FACTOR_COLUMNS, LANES

assert FACTOR_COLUMNS == 16, (
    "a lane holds 16 weights of a logit, and two parts have as many columns as a warp has lanes"
)


@device_function
def sum_of_parts(at, parts):
    """The sum of the parts of a number in ascending order; they lie a row of a warp apart."""
    pitch, total, k = int64(4 * LANES), load_shared_float(int32(at)), int32(1)
    while k + 4 <= parts:
        at_k = int32(at + pitch * k)
        a, b = load_shared_float(at_k), load_shared_float(int32(at_k + pitch))
        c, d = load_shared_float(int32(at_k + 2 * pitch)), load_shared_float(int32(at_k + 3 * pitch))
        total, k = ((total + a) + b) + c + d, int32(k + 4)
    while k < parts:
        total, k = total + load_shared_float(int32(at + pitch * k)), int32(k + 1)
    return total


@device_function
def copy_factor(target_at, source_at, n_rows, thread, threads):
    """Start copying the first factor of `n_rows` rows to shared memory."""
    piece, pieces = int64(thread), int64(n_rows) * (4 * FACTOR_COLUMNS // 16)
    while piece < pieces:
        copy_async16(target_at + 16 * piece, source_at + 16 * piece)
        piece += threads


def make_add_parts(add_piece: Any):
    """The device function add_parts(inputs_at, factor_at, parts_at, part_rows, shift, n_rows, me); `add_piece` is that
    of `make_add_strip` for float32 weights.

    A pair of warps has received every `warps`-th SEGMENT of inputs from two neighbouring ones on, each of which has
    1 << shift parts. One of them adds these parts, so that all its lanes have a column. Divisions would take hundreds
    of cycles.
    """

    @device_function
    def add_parts(inputs_at, factor_at, parts_at, part_rows, shift, n_rows, me):
        lane, warp, warps = me
        column, number = int32(lane & int32(FACTOR_COLUMNS - 1)), int32(lane >> int32(4))
        while True:
            turn = int32(number >> shift)
            segment = int32(int32(warp + (turn & int32(1))) + warps * int32(turn >> int32(1)))
            part = int32(int32(segment << shift) + int32(number - int32(turn << shift)))
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
def place_of_logit(matrix, logit):
    """The bias of a logit, and the address of its weights in the second factor; those of the last one beyond it.

    matrix : the table of the matrix, (tables.GATED_FIELDS,) int64
    """
    column, width = int32(min(logit, int32(matrix[tables.ALL_BLOCKS] - 1))), int32(matrix[tables.LOGIT_WIDTH])
    strip = int32(column // width)
    begin = matrix[tables.LOGIT_VALUES] + int64(4) * global_int64(matrix[tables.LOGIT_OFFSETS])[strip]
    return global_float32(matrix[tables.LOGIT_BIAS])[column], begin + int64(16) * int32(column - strip * width)


@device_function
def load_out(at, width):
    """The FACTOR_COLUMNS weights of a logit, in global memory. The loads are issued here."""
    step = int64(16) * width
    a, b, c, d = (
        load_readonly4(at),
        load_readonly4(at + step),
        load_readonly4(at + 2 * step),
        load_readonly4(at + 3 * step),
    )
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
