"""Kernels for what need not wait: products of independent rows, lists of a record's events, counts of them."""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda.device import cuda
from eventrnn.cuda.kernels.gather_product import make_list_product, row_bytes_of
from eventrnn.cuda.kernels.persistent import copy_to_shared
from eventrnn.cuda.kernels.ptx import (
    add_relaxed,
    global_float32,
    global_int32,
    global_int64,
    global_uint16,
    shared_base,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP, pack_event, popcount
from eventrnn.cuda.tables import EVENTS_PER_WARP, GATHER_BUFFER_BYTES, LANES, LIST_PAD, NARROW, RESIDENT, SUM_BITS

MAX_COUNT_THREADS = 512

# Of four sums of `SUM_BITS` each every second one, in twice the room.
ALTERNATE, WIDE = 0x0F0F, 0xFF


def products_kernel(layout: int):
    """drive = bias + sum over a row's events of weight * value, for many rows of lists; and its signature.

    Weights as `packing.GroupedStrips`. A block owns a lot of neighbouring strips for every `splits`-th set of rows;
    a warp takes a row at a time, and looks up an event once for all the strips.
    """
    (find_events, product), row_bytes, size = (
        make_list_product(layout),
        row_bytes_of(layout),
        2 if layout & NARROW else 4,
    )
    resident = bool(layout & RESIDENT)

    def products(
        index_from,
        rows_at,
        starts_at,
        bias_at,
        n_pre,
        columns,
        strips,
        strips_per_group,
        firsts_at,
        counts_at,
        lists_at,
        row_of_at,
        rows,
        splits,
        out_at,
    ):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        group = cuda.blockIdx.x // splits
        split = cuda.blockIdx.x - group * splits
        strip = group * strips_per_group
        own = int32(min(strips_per_group, strips - strip))
        starts, shared = global_int64(starts_at), shared_base()
        own_index = shared + int64(GATHER_BUFFER_BYTES) * warps
        begin = starts[group]
        copy_to_shared(own_index, index_from + 4 * n_pre * group, 4 * n_pre, thread, threads)
        values_at = rows_at + row_bytes * begin + size * lane
        if resident:
            own_rows = own_index + ((4 * n_pre + 15) & -16)
            copy_to_shared(
                own_rows, rows_at + row_bytes * begin, row_bytes * (starts[group + 1] - begin), thread, threads
            )
            values_at = own_rows + size * lane
        cuda.syncthreads()
        hits_at, index_at = int32(shared + int64(GATHER_BUFFER_BYTES) * warp), int32(own_index)
        lanes_below = int32((int32(1) << lane) - 1)
        bias, out = global_float32(bias_at + 4 * (strip * LANES + lane)), global_float32(out_at)
        firsts, counts, row_of = global_int64(firsts_at), global_int32(counts_at), global_int64(row_of_at)
        row = split * warps + warp
        while row < rows:
            source = row
            if row_of_at != 0:
                source = row_of[row]
            list_at, count, at = lists_at + 8 * firsts[source], counts[source], int32(0)
            while True:
                (a, b, c, d, e), (f, g, h, i, j), values = find_events(list_at, int32(at + 5 * lane), count, index_at)
                each, column = int32(0), strip * LANES + lane
                while each < own:
                    flags = (a & int32(1), b & int32(1), c & int32(1), d & int32(1), e & int32(1))
                    acc = bias[each * LANES]
                    if at > 0 and column < columns:
                        # What the events before have added.
                        acc = out[row * columns + column]
                    acc = product(acc, flags, (f, g, h, i, j), values, values_at, hits_at, lane, lanes_below)
                    if column < columns:
                        out[row * columns + column] = acc
                    # A unit's rows lie one after the other.
                    f, g = int32(f + row_bytes * flags[0]), int32(g + row_bytes * flags[1])
                    h, i = int32(h + row_bytes * flags[2]), int32(i + row_bytes * flags[3])
                    j = int32(j + row_bytes * flags[4])
                    a, b, c, d, e = a >> int32(1), b >> int32(1), c >> int32(1), d >> int32(1), e >> int32(1)
                    each, column = int32(each + 1), column + LANES
                at = int32(at + EVENTS_PER_WARP)
                if at >= count:
                    break
            row += splits * warps

    return products, types.void(*[types.int64] * 15)


def log_events_kernel():
    """Lists of events from rows of a record, a warp a row; and its signature."""

    def log_events(log_at, pitch, n, rows, firsts_at, counts_at, lists_at, capacity):
        thread = int32(cuda.threadIdx.x)
        lane = thread & int32(31)
        row = int64(cuda.blockIdx.x) * (cuda.blockDim.x >> 5) + (thread >> int32(5))
        if row >= rows:
            return
        lanes_below = int32((int32(1) << lane) - 1)
        event_log, entries = global_float32(log_at + 4 * row * pitch), global_int64(lists_at + 8 * row * capacity)
        count, at = int32(0), int32(0)
        while at < n:
            value = np.float32(0)
            if at + lane < n:
                value = event_log[at + lane]
            sent = cuda.ballot_sync(FULL_WARP, value != 0)
            if value != 0:
                entries[count + popcount(sent & lanes_below)] = pack_event(at + lane, value)
            count = int32(count + popcount(sent))
            at = int32(at + LANES)
        if lane < LIST_PAD:
            entries[count + lane] = int64(0)
        if lane == 0:
            global_int64(firsts_at)[row] = row * capacity
            global_int32(counts_at)[row] = count

    return log_events, types.void(*[types.int64] * 8)


def count_threads(rows: int) -> int:
    """Threads that count the events of one unit: many, for a row waits for the one before."""
    return max(1, min(MAX_COUNT_THREADS, -(-rows // 16)))


def count_events_kernel():
    """How often each unit of a record sent a graded or a binary value, added to two int64 vectors; its signature.

    A thread takes one unit and every `gridDim.y`-th row. Whole numbers: the order of adding changes nothing.
    """

    def count_events(log_at, pitch, n, rows, graded_at, binary_at):
        unit = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if unit >= n:
            return
        event_log = global_float32(log_at)
        graded = binary = int64(0)
        row, stride = int64(cuda.blockIdx.y), int64(cuda.gridDim.y)
        while row < rows:
            # Four at a time, so that they are waited for together.
            a = event_log[row * pitch + unit]
            b = c = d = np.float32(0)
            if row + stride < rows:
                b = event_log[(row + stride) * pitch + unit]
            if row + 2 * stride < rows:
                c = event_log[(row + 2 * stride) * pitch + unit]
            if row + 3 * stride < rows:
                d = event_log[(row + 3 * stride) * pitch + unit]
            # No unit sends a negative value, but an input may have one.
            ones = (
                int64(a == 1 or a == -1)
                + int64(b == 1 or b == -1)
                + int64(c == 1 or c == -1)
                + int64(d == 1 or d == -1)
            )
            graded += int64(a != 0) + int64(b != 0) + int64(c != 0) + int64(d != 0) - ones
            binary += ones
            row += 4 * stride
        if graded != 0:
            add_relaxed(graded_at + 8 * unit, graded)
        if binary != 0:
            add_relaxed(binary_at + 8 * unit, binary)

    return count_events, types.void(*[types.int64] * 6)


def count_pairs_kernel():
    """The same from sums over some samples of two units each (`rounded.cells_kernel`); and its signature."""

    def count_pairs(sums_at, pairs, pitch, rows, graded_at, binary_at):
        pair = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if pair >= pairs:
            return
        sums = global_uint16(sums_at + 2 * pair)
        sent0 = sent1 = binary0 = binary1 = int64(0)
        row, stride = int64(cuda.blockIdx.y), int64(cuda.gridDim.y)
        while row < rows:
            # Four at a time, so that they are waited for together.
            a = int32(sums[row * pitch])
            b = c = d = int32(0)
            if row + stride < rows:
                b = int32(sums[(row + stride) * pitch])
            if row + 2 * stride < rows:
                c = int32(sums[(row + 2 * stride) * pitch])
            if row + 3 * stride < rows:
                d = int32(sums[(row + 3 * stride) * pitch])
            # With twice the room for each sum, four fit.
            first = (a & ALTERNATE) + (b & ALTERNATE) + (c & ALTERNATE) + (d & ALTERNATE)
            a, b, c, d = a >> SUM_BITS, b >> SUM_BITS, c >> SUM_BITS, d >> SUM_BITS
            second = (a & ALTERNATE) + (b & ALTERNATE) + (c & ALTERNATE) + (d & ALTERNATE)
            sent0, binary0 = sent0 + (first & WIDE), binary0 + (first >> 2 * SUM_BITS)
            sent1, binary1 = sent1 + (second & WIDE), binary1 + (second >> 2 * SUM_BITS)
            row += 4 * stride
        at = 16 * pair
        if sent0 != binary0:
            add_relaxed(graded_at + at, sent0 - binary0)
        if binary0 != 0:
            add_relaxed(binary_at + at, binary0)
        if sent1 != binary1:
            add_relaxed(graded_at + at + 8, sent1 - binary1)
        if binary1 != 0:
            add_relaxed(binary_at + at + 8, binary1)

    return count_pairs, types.void(*[types.int64] * 6)
