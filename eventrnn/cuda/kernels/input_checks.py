"""Kernels at the boundary of a run: compact dense inputs into event lists, check inputs, symbols and final cells.

They never stop a run. They write what they find to the status vector on the device (`tables.STATUS_INPUT` and
following), which the host reads once after the run. All arrays are in global memory unless stated otherwise; arguments
named `*_at` are byte addresses. The results equal `Events.from_dense` and `backend.HostInputs` on the host.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda.device import cuda
from eventrnn.cuda.kernels.ptx import (
    global_float32,
    global_int32,
    global_int64,
    max_relaxed,
    shared_base,
    shared_int32,
    sum_of_warp,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP, pack_event, popcount
from eventrnn.cuda.tables import LAST, LIST_PAD, STATUS_CELLS, STATUS_INPUT


def dense_events_kernel():
    """The kernel that compacts dense rows into event lists and checks that they are finite; and its signature.

    Block  : one row. Warp: a contiguous range of columns. Thread: every 32nd column of that range.
    Memory : `totals` (32,) int32 in shared memory, the number of events per warp
    Barrier: one block barrier, after which the warps know where their events begin

    x_at      : (rows, n) float32
    first_row : index of the first row in the whole input; STATUS_INPUT receives the smallest index of a value that is
                not finite, counted over the whole input
    begins_at, counts_at, lists_at, capacity : the event list set (`batched_products.py`), list `row` at row * capacity
    """

    def dense_events(x_at, n, first_row, begins_at, counts_at, lists_at, capacity, status_at):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        row = int64(cuda.blockIdx.x)
        lanes_below = int32((int32(1) << lane) - 1)
        x, entries = global_float32(x_at + 4 * row * n), global_int64(lists_at + 8 * row * capacity)
        totals = shared_int32(shared_base())
        width, rounds = int32(n), int32((n + threads - 1) // threads)
        count, bad, r = int32(0), int32(-1), int32(0)
        at = int32(int32(32) * warp * rounds + lane)
        first = at
        while r < rounds:
            value = np.float32(0)
            if at < width:
                value = x[at]
            # Infinity minus infinity is NaN as well.
            if bad < 0 and value - value != 0:
                bad = at
            count = int32(count + popcount(cuda.ballot_sync(FULL_WARP, value != 0)))
            at = int32(at + 32)
            r = int32(r + 1)
        if lane == 0:
            totals[warp] = count
        if bad >= 0:
            max_relaxed(status_at + 8 * STATUS_INPUT, LAST - ((first_row + row) * n + bad))
        cuda.syncthreads()
        before = int32(0)
        if lane < warp:
            before = totals[lane]
        own = sum_of_warp(before)
        at, r = first, int32(0)
        while r < rounds:
            value = np.float32(0)
            if at < width:
                value = x[at]
            sent = cuda.ballot_sync(FULL_WARP, value != 0)
            if value != 0:
                entries[own + popcount(sent & lanes_below)] = pack_event(at, value)
            own = int32(own + popcount(sent))
            at = int32(at + 32)
            r = int32(r + 1)
        if thread + 32 >= threads:
            if lane < LIST_PAD:
                entries[own + lane] = int64(0)
            if lane == 0:
                global_int64(begins_at)[row] = row * capacity
                global_int32(counts_at)[row] = own

    return dense_events, types.void(*[types.int64] * 8)


def symbols_kernel():
    """The kernel that range-checks symbols and turns them into rows of the event table; and its signature.

    One thread per symbol. symbols_at, row_of_at : (rows,) int64; a symbol outside 0 .. size - 1 becomes 0, and the
    smallest index of one, counted from `first_row`, goes to STATUS_INPUT.
    """

    def symbols(symbols_at, rows, first_row, size, row_of_at, status_at):
        row = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if row >= rows:
            return
        symbol = global_int64(symbols_at)[row]
        if symbol < 0 or symbol >= size:
            max_relaxed(status_at + 8 * STATUS_INPUT, LAST - (first_row + row))
            symbol = int64(0)
        global_int64(row_of_at)[row] = symbol

    return symbols, types.void(*[types.int64] * 6)


def finite_kernel():
    """The kernel that sets STATUS_CELLS if any of (count,) float32 is not finite, and its signature.

    One thread per value.
    """

    def finite(values_at, count, status_at):
        at = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if at >= count:
            return
        value = global_float32(values_at)[at]
        if value - value != 0:
            max_relaxed(status_at + 8 * STATUS_CELLS, int64(1))

    return finite, types.void(*[types.int64] * 3)
