"""Kernels for work without a recurrence: products of independent rows, event lists and event counts of an event log.

The rows of an input or of an event log do not depend on each other, so these kernels handle all steps of a run at once.
All arrays are in global memory unless stated otherwise; arguments named `*_at` are byte addresses.

products    : `reference.propagate` of many rows of event lists (`gather_product.py`): input drives of the first layer
              and read-out. A block owns one group of neighbouring strips and every `splits`-th set of rows, a warp
              one row at a time, a lane one output per strip. Barrier: one block barrier after the weights are loaded.
look_up     : the same of dense weights in the layout of the host, for rows of few events. A thread owns one column and
              every gridDim.y-th row. No barriers.
log_events  : event lists of rows of an event log. A warp owns a row, a lane every 32nd unit. No barriers.
count_events: `state.FireCounts` of a dense array of events. A thread owns one unit and every gridDim.y-th row.
count_pairs : the same from sums that `tensor_core_cells.cells_kernel` has written. A thread owns two units.

An event list set is three arrays: begins (rows,) int64, where each row's list begins in `lists`; counts (rows,) int32;
lists, int64 events (`strip_product.py`), each list followed by LIST_PAD zeros.
"""

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
from eventrnn.cuda.kernels.strip_product import FULL_WARP, low_word, pack_event, popcount, value_of_event
from eventrnn.cuda.tables import EVENTS_PER_WARP, GATHER_BUFFER_BYTES, LANES, LIST_PAD, NARROW, RESIDENT, SUM_BITS

# Threads that count the events of one unit, at most.
MAX_COUNT_THREADS = 512

# Mask of every second one of four sums of SUM_BITS bits, which leaves each of the two twice as many bits.
ALTERNATE_SUMS = 0x0F0F

# Mask of one sum of twice SUM_BITS bits.
WIDE_SUM = 0xFF


def products_kernel(layout: int):
    """The kernel out[row] = bias + sum over the row's events of weight * value, one FMA per term; and its signature.

    index_from   : (groups, n_pre) int32, `packing.GroupedStrips.index`; copied to shared memory
    rows_at      : (entries + 1, 32) float32 or uint16 weights, `packing.GroupedStrips.rows`; copied to shared memory if
                   the layout is RESIDENT
    starts_at    : (groups + 1,) int64, first row of weights of each group
    bias_at      : (strips, 32) float32
    begins_at, counts_at, lists_at : the event list set
    row_of_at    : (rows,) int64, the list of each row, or address 0 for the list of the same number
    splits       : blocks that share the rows of one group
    out_at       : (rows, columns) float32
    """
    find_events, list_product = make_list_product(layout)
    row_bytes, size = row_bytes_of(layout), 2 if layout & NARROW else 4
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
        begins_at,
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
        n_strips = int32(min(strips_per_group, strips - strip))
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
        begins, counts, row_of = global_int64(begins_at), global_int32(counts_at), global_int64(row_of_at)
        # Addresses of the first strip of the group. Those of the others follow, LANES columns apart.
        first = strip * LANES + lane
        bias_from, out_from, columns_left = bias_at + 4 * first, out_at + 4 * first, int32(columns - first)
        row = split * warps + warp
        while row < rows:
            source = row
            if row_of_at != 0:
                source = row_of[row]
            list_at, count, at = lists_at + 8 * begins[source], counts[source], int32(0)
            while True:
                (a, b, c, d, e), (f, g, h, i, j), values = find_events(list_at, int32(at + 5 * lane), count, index_at)
                strip_of_group, own_bias, own_out, left = (
                    int32(0),
                    bias_from,
                    out_from + 4 * row * columns,
                    columns_left,
                )
                while strip_of_group < n_strips:
                    flags = (a & int32(1), b & int32(1), c & int32(1), d & int32(1), e & int32(1))
                    acc = global_float32(own_bias)[0]
                    if at > 0 and left > 0:
                        # Continue the sum over earlier events of a long list.
                        acc = global_float32(own_out)[0]
                    acc = list_product(acc, flags, (f, g, h, i, j), values, values_at, hits_at, lane, lanes_below)
                    if left > 0:
                        global_float32(own_out)[0] = acc
                    # The rows of a unit are stored one after the other.
                    f, g = int32(f + row_bytes * flags[0]), int32(g + row_bytes * flags[1])
                    h, i = int32(h + row_bytes * flags[2]), int32(i + row_bytes * flags[3])
                    j = int32(j + row_bytes * flags[4])
                    a, b, c = int32(a >> int32(1)), int32(b >> int32(1)), int32(c >> int32(1))
                    d, e = int32(d >> int32(1)), int32(e >> int32(1))
                    own_bias, own_out = own_bias + 4 * LANES, own_out + 4 * LANES
                    strip_of_group, left = int32(strip_of_group + 1), int32(left - LANES)
                at = int32(at + EVENTS_PER_WARP)
                if at >= count:
                    break
            row += splits * warps

    return products, types.void(*[types.int64] * 15)


def look_up_kernel():
    """The kernel out[row] = bias + sum over the row's events of weight * value, one FMA per term; and its signature.

    weights_at : (n_pre, columns) float32
    bias_at    : (columns,) float32
    begins_at, counts_at, lists_at : the event list set
    row_of_at  : (rows,) int64, the list of each row, or address 0 for the list of the same number
    out_at     : (rows, columns) float32
    """

    def look_up(weights_at, bias_at, columns, begins_at, counts_at, lists_at, row_of_at, rows, out_at):
        column = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if column >= columns:
            return
        weights, out = global_float32(weights_at + 4 * column), global_float32(out_at + 4 * column)
        begins, counts, row_of = global_int64(begins_at), global_int32(counts_at), global_int64(row_of_at)
        bias = global_float32(bias_at)[column]
        row, stride = int64(cuda.blockIdx.y), int64(cuda.gridDim.y)
        while row < rows:
            source = row
            if row_of_at != 0:
                source = row_of[row]
            entries, count = global_int64(lists_at + 8 * begins[source]), counts[source]
            drive, event = bias, int32(0)
            while event < count:
                entry = entries[event]
                drive = cuda.fma(weights[int64(low_word(entry)) * columns], value_of_event(entry), drive)
                event = int32(event + 1)
            out[row * columns] = drive
            row += stride

    return look_up, types.void(*[types.int64] * 9)


def log_events_kernel():
    """The kernel that compacts rows of an event log into event lists, and its signature.

    log_at : (rows, pitch) float32, of which the first n of each row are units; list `row` begins at row * capacity
    """

    def log_events(log_at, pitch, n, rows, begins_at, counts_at, lists_at, capacity):
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
            global_int64(begins_at)[row] = row * capacity
            global_int32(counts_at)[row] = count

    return log_events, types.void(*[types.int64] * 8)


def count_threads(rows: int) -> int:
    """Threads that count the events of one unit: many, because one thread waits for every load of a row."""
    return max(1, min(MAX_COUNT_THREADS, -(-rows // 16)))


def count_events_kernel():
    """The kernel that counts graded and binary events per unit, and its signature.

    log_at : (rows, pitch) float32, of which the first n of each row are units
    graded_at, binary_at : (n,) int64, to which the counts are added; the order of adding integers changes nothing
    """

    def count_events(log_at, pitch, n, rows, graded_at, binary_at):
        unit = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if unit >= n:
            return
        event_log = global_float32(log_at)
        graded = binary = int64(0)
        row, stride = int64(cuda.blockIdx.y), int64(cuda.gridDim.y)
        while row < rows:
            # Four loads are under way at the same time.
            a = event_log[row * pitch + unit]
            b = c = d = np.float32(0)
            if row + stride < rows:
                b = event_log[(row + stride) * pitch + unit]
            if row + 2 * stride < rows:
                c = event_log[(row + 2 * stride) * pitch + unit]
            if row + 3 * stride < rows:
                d = event_log[(row + 3 * stride) * pitch + unit]
            # The value -1 is binary as well: units do not send it, but inputs may contain it.
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
    """The kernel that counts events of pairs of units from packed sums over samples, and its signature.

    sums_at : (rows, pitch) uint16, one per pair of units, as `tensor_core_cells.cells_kernel` describes them
    graded_at, binary_at : (2 * pairs,) int64, to which the counts are added
    """

    def count_pairs(sums_at, pairs, pitch, rows, graded_at, binary_at):
        pair = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if pair >= pairs:
            return
        sums = global_uint16(sums_at + 2 * pair)
        sent0 = sent1 = binary0 = binary1 = int64(0)
        row, stride = int64(cuda.blockIdx.y), int64(cuda.gridDim.y)
        while row < rows:
            # Four loads are under way at the same time.
            a = int32(sums[row * pitch])
            b = c = d = int32(0)
            if row + stride < rows:
                b = int32(sums[(row + stride) * pitch])
            if row + 2 * stride < rows:
                c = int32(sums[(row + 2 * stride) * pitch])
            if row + 3 * stride < rows:
                d = int32(sums[(row + 3 * stride) * pitch])
            # Sums of four rows fit in twice SUM_BITS bits.
            first = (a & ALTERNATE_SUMS) + (b & ALTERNATE_SUMS) + (c & ALTERNATE_SUMS) + (d & ALTERNATE_SUMS)
            a, b, c, d = a >> SUM_BITS, b >> SUM_BITS, c >> SUM_BITS, d >> SUM_BITS
            second = (a & ALTERNATE_SUMS) + (b & ALTERNATE_SUMS) + (c & ALTERNATE_SUMS) + (d & ALTERNATE_SUMS)
            sent0, binary0 = sent0 + (first & WIDE_SUM), binary0 + (first >> 2 * SUM_BITS)
            sent1, binary1 = sent1 + (second & WIDE_SUM), binary1 + (second >> 2 * SUM_BITS)
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
