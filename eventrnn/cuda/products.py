"""Kernels for what need not wait: products of independent rows, lists of a record's events, counts of them."""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda.device import cuda
from eventrnn.cuda.kernels import copy_in
from eventrnn.cuda.lookup import lister, row_bytes_of
from eventrnn.cuda.ptx import (
    add_relaxed,
    egru_value,
    global_float32,
    global_int32,
    global_int64,
    shared_base,
    shared_int32,
)
from eventrnn.cuda.tables import CLUSTER_HIT_BYTES, HIT_BYTES, KINDS, LANES, LIST_PAD, NARROW, RESIDENT
from eventrnn.cuda.walks import ALL, count_bits, entry_of, walker


def products_kernel(way: int, gates: int):
    """drive = bias + sum over a row's events of weight * value, for many rows of lists; and its signature.

    A block owns one strip for every `splits`-th lot of rows, a warp a row at a time.
    """
    walk = walker(way)

    def products(
        values_at, table_at, starts_at, bias_at, n_pre, units, width, firsts_at, counts_at, lists_at, row_of_at,
        rows, splits, out_at, table_bytes,
    ):  # fmt: skip
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        strip = cuda.blockIdx.x // splits
        tile, split = strip // gates, cuda.blockIdx.x - strip * splits
        gate = strip - tile * gates
        starts, shared = global_int64(starts_at), shared_base()
        size = int64(4)
        if way & NARROW:
            size = int64(2)
        values_at += starts[strip] * size
        table_at += strip * n_pre * 8
        hits_at = shared + int64(HIT_BYTES) * warp
        if way & RESIDENT:
            own = shared + int64(HIT_BYTES) * warps
            copy_in(own + table_bytes, values_at, (starts[strip + 1] - starts[strip] + LANES) * size, thread, threads)
            values_at = own + table_bytes
            if way & KINDS:
                copy_in(own, table_at, int64(8) * n_pre, thread, threads)
                table_at = own
            cuda.syncthreads()
        unit = int32(tile * width + lane)
        bias, out = global_float32(bias_at), global_float32(out_at)
        firsts, counts, row_of = global_int64(firsts_at), global_int32(counts_at), global_int64(row_of_at)
        row = split * warps + warp
        while row < rows:
            source = row
            if row_of_at != 0:
                source = row_of[row]
            acc = walk(
                bias[strip * LANES + lane], values_at, table_at, int32(width), lane,
                global_int64(lists_at + 8 * firsts[source]), counts[source], hits_at,
            )  # fmt: skip
            if lane < width and unit < units:
                out[row * (gates * units) + gate * units + unit] = acc
            row += splits * warps

    return products, types.void(*[types.int64] * 15)


def reached_products_kernel(way: int, gates: int):
    """The same for strips that few units reach (`packing.Reached`), which lie in shared memory or not."""
    product, row_bytes, size = lister(way), row_bytes_of(way), 2 if way & NARROW else 4
    resident = bool(way & RESIDENT)
    address = int32 if resident else int64

    def products(
        reached_at, rows_at, starts_at, bias_at, n_pre, units, width, firsts_at, counts_at, lists_at, row_of_at,
        rows, splits, out_at,
    ):  # fmt: skip
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        strip = cuda.blockIdx.x // splits
        tile, split = strip // gates, cuda.blockIdx.x - strip * splits
        gate = strip - tile * gates
        starts, shared = global_int64(starts_at), shared_base()
        begin, count = starts[strip], int32(starts[strip + 1] - starts[strip])
        reached, index_from = global_int32(reached_at + 4 * begin), shared + int64(CLUSTER_HIT_BYTES) * warps
        index, own = shared_int32(index_from), index_from + ((4 * n_pre + 15) & -16)
        unit = thread
        while unit < n_pre:
            index[unit] = int32(-1)
            unit = int32(unit + threads)
        cuda.syncthreads()
        at = thread
        while at < count:
            index[reached[at] >> 2] = int32(row_bytes * at)
            at = int32(at + threads)
        if resident:
            copy_in(own, rows_at + row_bytes * begin, int64(row_bytes) * count, thread, threads)
            values_at = address(own + size * lane)
        else:
            values_at = address(rows_at + row_bytes * begin + size * lane)
        cuda.syncthreads()
        hits_at, index_at = int32(shared + int64(CLUSTER_HIT_BYTES) * warp), int32(index_from)
        below = int32((int32(1) << lane) - 1)
        unit = int32(tile * width + lane)
        bias, out = global_float32(bias_at)[strip * LANES + lane], global_float32(out_at)
        firsts, counts, row_of = global_int64(firsts_at), global_int32(counts_at), global_int64(row_of_at)
        row = split * warps + warp
        while row < rows:
            source = row
            if row_of_at != 0:
                source = row_of[row]
            acc = product(
                bias, lists_at + 8 * firsts[source], counts[source], index_at, values_at, hits_at, lane, below
            )  # fmt: skip
            if lane < width and unit < units:
                out[row * (gates * units) + gate * units + unit] = acc
            row += splits * warps

    return products, types.void(*[types.int64] * 14)


def compact_kernel():
    """Lists of events from rows of a record, a warp a row; and its signature."""

    def compact(record_at, pitch, n, rows, firsts_at, counts_at, lists_at, capacity):
        thread = int32(cuda.threadIdx.x)
        lane = thread & int32(31)
        row = int64(cuda.blockIdx.x) * (cuda.blockDim.x >> 5) + (thread >> int32(5))
        if row >= rows:
            return
        below = int32((int32(1) << lane) - 1)
        record, entries = global_float32(record_at + 4 * row * pitch), global_int64(lists_at + 8 * row * capacity)
        count, at = int32(0), int32(0)
        while at < n:
            value = np.float32(0)
            if at + lane < n:
                value = record[at + lane]
            found = cuda.ballot_sync(ALL, value != 0)
            if value != 0:
                entries[count + count_bits(found & below)] = entry_of(at + lane, value)
            count = int32(count + count_bits(found))
            at = int32(at + LANES)
        if lane < LIST_PAD:
            entries[count + lane] = int64(0)
        if lane == 0:
            global_int64(firsts_at)[row] = row * capacity
            global_int32(counts_at)[row] = count

    return compact, types.void(*[types.int64] * 8)


def tally_kernel():
    """How often each unit of a record sent a graded or a binary value, added to two int64 vectors; its signature.

    A thread takes one unit and every `gridDim.y`-th row. Whole numbers: the order of adding changes nothing.
    """

    def tally(record_at, pitch, n, rows, graded_at, binary_at):
        unit = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if unit >= n:
            return
        record = global_float32(record_at)
        graded = binary = int64(0)
        row, stride = int64(cuda.blockIdx.y), int64(cuda.gridDim.y)
        while row < rows:
            # Four at a time, so that they are waited for together.
            a = record[row * pitch + unit]
            b = c = d = np.float32(0)
            if row + stride < rows:
                b = record[(row + stride) * pitch + unit]
            if row + 2 * stride < rows:
                c = record[(row + 2 * stride) * pitch + unit]
            if row + 3 * stride < rows:
                d = record[(row + 3 * stride) * pitch + unit]
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

    return tally, types.void(*[types.int64] * 6)


def cells_kernel():
    """Cells and events of one step whose drives lie ready, a thread a unit; its signature. For rivals of the engine.

    `sample_stride`, `row_stride`: floats from one sample and from one gate row to the next of the recurrent drive.
    """

    def cells(
        drive_at, rec_at, sample_stride, row_stride, bias_at, threshold_at, cells_at, sent_at, units, batch
    ):  # fmt: skip
        at = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if at >= units * batch:
            return
        sample = at // units
        unit = at - sample * units
        drive, bias = global_float32(drive_at + 12 * sample * units), global_float32(bias_at)
        rec, carried = global_float32(rec_at + 4 * sample * sample_stride), global_float32(cells_at)
        v, _, _, _ = egru_value(
            drive[unit], drive[units + unit], drive[2 * units + unit],
            rec[unit * row_stride] + bias[unit], rec[(units + unit) * row_stride] + bias[units + unit],
            rec[(2 * units + unit) * row_stride] + bias[2 * units + unit], carried[at],
        )  # fmt: skip
        threshold, value = global_float32(threshold_at)[unit], np.float32(0)
        if v > threshold:
            value = v
            v = v - threshold
        carried[at], global_float32(sent_at)[at] = v, value

    return cells, types.void(*[types.int64] * 10)
