"""Input products on tensor cores for `tensor_core_cluster.py`: inputs laid out as columns, and products of tiles.

Not exact: inputs, weights and products are rounded to `precision`, sums are float32. A group is what one cluster
receives in one step: the inputs of at most SAMPLES samples. Group number t * clusters + c has the samples of cluster c
in step t. Arguments named `*_at` are byte addresses.

scatter : a warp owns one row of the event lists, that is one sample in one step.
columns : a block owns a group, a thread every blockDim.x-th input.
drives  : a block owns GROUPS neighbouring groups, a warp every `warps`-th tile of columns.

============ ======== ==========================================================================================
array        memory   shape, dtype, contents
============ ======== ==========================================================================================
x            global   (groups, inputs + 1, SAMPLES) rounded; the last row of each group, and samples that no cluster
                      has, are zero; the number of groups is a multiple of GROUPS
begins       global   (tiles + 1,) int64, where the steps of each tile begin
values       global   (steps + 2, 32, 4) int32, weights as fragments (`tensor_core_ptx.py`)
rows         global   (steps + 2, TILE) uint16, the inputs of each step
drive        global   (groups, TILE * tiles, pairs) int32, pairs of rounded products
x of a block shared   (GROUPS, inputs + 1, SAMPLES) rounded
============ ======== ==========================================================================================
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.cluster import in_all_lanes
from eventrnn.cuda.kernels.ptx import (
    global_float32,
    global_int32,
    global_int64,
    load_readonly_uint16,
    max_relaxed,
    shared_base,
    wait_for_copies,
)
from eventrnn.cuda.kernels.tensor_core_cells import FLOAT16_MAX, make_store
from eventrnn.cuda.kernels.tensor_core_cluster import (
    ROW_BYTES,
    STEP_BYTES,
    TILE,
    UNITS_BYTES,
    ZERO,
    copy_words16,
)
from eventrnn.cuda.kernels.tensor_core_ptx import MULTIPLY, PACK, load_readonly_words, load_two_columns
from eventrnn.cuda.tables import LANES, STATUS_LARGE

#: groups of a block of `drives`
GROUPS = 4


def scatter_kernel(precision: str):
    """The kernel that writes event lists into x, which is zero before, and its signature.

    begins_at, counts_at, lists_at : an event list set (`batched_products.py`)
    row_of_at : (rows,) int64, the list of each row, or address 0 for the list of the same number
    row_0     : the row of the list set that is the first one here
    rows      : number of rows, steps * batch
    width     : samples per cluster
    """
    store = make_store(precision)

    def scatter(
        begins_at, counts_at, lists_at, row_of_at, row_0, rows, batch, width, clusters, inputs, x_at, status_at
    ):
        threads = int64(min(cuda.blockDim.x, LANES))
        thread, rank = int64(cuda.threadIdx.x) % threads, int64(cuda.threadIdx.x) // threads
        row = int64(cuda.blockIdx.x) * (cuda.blockDim.x // threads) + rank
        if row >= rows:
            return
        source = row_0 + row
        if row_of_at != 0:
            source = global_int64(row_of_at)[source]
        begin = lists_at + 8 * global_int64(begins_at)[source]
        count = int64(global_int32(counts_at)[source])
        sample = row % batch
        group = row // batch * clusters + sample // width
        to = x_at + ROW_BYTES * group * (inputs + 1) + 2 * (sample % width)
        at = thread
        while at < count:
            unit = int64(global_int32(begin + 8 * at)[0])
            store(to + ROW_BYTES * unit, global_float32(begin + 8 * at + 4)[0], status_at)
            at += threads

    return scatter, types.void(*[types.int64] * 12)


def columns_kernel(precision: str):
    """The kernel that rounds dense rows into x, and its signature.

    dense_at : (steps * batch, pitch) float32, of whose columns the first `inputs` are read
    width    : samples per cluster
    """
    pack, limit = PACK[precision], np.float32(FLOAT16_MAX if precision == "float16" else np.inf)

    def columns(dense_at, pitch, batch, width, clusters, inputs, x_at, status_at):
        group = int64(cuda.blockIdx.x)
        first = group % clusters * width
        dense = dense_at + 4 * (group // clusters * batch + first) * pitch
        at, large = int64(cuda.threadIdx.x), False
        while at < inputs:
            words = global_int32(x_at + ROW_BYTES * (group * (inputs + 1) + at))
            pair = int64(0)
            while 2 * pair < width:
                a = b = ZERO
                if first + 2 * pair < batch:
                    a = global_float32(dense + 8 * pair * pitch)[at]
                if first + 2 * pair + 1 < batch:
                    b = global_float32(dense + 4 * (2 * pair + 1) * pitch)[at]
                large = large or abs(a) > limit or abs(b) > limit
                words[pair] = pack(a, b)
                pair += 1
            at += cuda.blockDim.x
        if large:
            max_relaxed(status_at + 8 * STATUS_LARGE, int64(1))

    return columns, types.void(*[types.int64] * 8)


def drives_kernel(precision: str):
    """The kernel of the input products, and its signature.

    groups : number of groups whose products are written; inputs, tiles : see the shapes of the arrays
    pairs  : pairs of samples of a group that are written
    """
    multiply, pack = MULTIPLY[precision], PACK[precision]

    @device_function
    def store_fragment(to, below, is_there, c0, c1, c2, c3):
        """Store a fragment of a group. to, below : addresses of this lane's words in its upper and its lower half"""
        if is_there:
            global_int32(to)[0] = pack(c0, c1)
            global_int32(below)[0] = pack(c2, c3)

    def drives(x_at, begins_at, values_at, rows_at, inputs, tiles, groups, pairs, drive_at):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), in_all_lanes(thread >> int32(5)), threads >> int32(5)
        shared, first = shared_base(), int64(GROUPS) * cuda.blockIdx.x
        size = ROW_BYTES * (inputs + 1)
        copy_words16(shared, x_at + first * size, GROUPS * size, thread, threads)
        wait_for_copies()
        cuda.syncthreads()
        x0, begins, tile = int32(shared), global_int64(begins_at), int64(warp)
        x1 = int32(x0 + int32(size))
        x2 = int32(x1 + int32(size))
        x3 = int32(x2 + int32(size))
        while tile < tiles:
            step, end = begins[tile], begins[tile + 1]
            p0 = p1 = p2 = p3 = ZERO
            q0 = q1 = q2 = q3 = ZERO
            r0 = r1 = r2 = r3 = ZERO
            s0 = s1 = s2 = s3 = ZERO
            values, rows = (
                values_at + STEP_BYTES * step + 16 * int64(lane),
                rows_at + UNITS_BYTES * step + 2 * int64(lane),
            )
            # What two steps read is loaded while those before them are multiplied; two steps follow the last tile.
            next_row = load_readonly_uint16(rows)
            f0, f1, f2, f3 = load_readonly_words(values)
            g0, g1, g2, g3 = load_readonly_words(values + STEP_BYTES)
            while step < end:
                # A tile has an even number of steps.
                row = int32(int32(ROW_BYTES) * next_row)
                a0, a1, a2, a3 = f0, f1, f2, f3
                e0, e1, e2, e3 = g0, g1, g2, g3
                step, values, rows = step + 2, values + 2 * STEP_BYTES, rows + 2 * UNITS_BYTES
                next_row = load_readonly_uint16(rows)
                f0, f1, f2, f3 = load_readonly_words(values)
                g0, g1, g2, g3 = load_readonly_words(values + STEP_BYTES)
                b0, b1, b2, b3 = load_two_columns(int32(x0 + row))
                p0, p1, p2, p3 = multiply(a0, a1, a2, a3, b0, b1, p0, p1, p2, p3)
                p0, p1, p2, p3 = multiply(e0, e1, e2, e3, b2, b3, p0, p1, p2, p3)
                b0, b1, b2, b3 = load_two_columns(int32(x1 + row))
                q0, q1, q2, q3 = multiply(a0, a1, a2, a3, b0, b1, q0, q1, q2, q3)
                q0, q1, q2, q3 = multiply(e0, e1, e2, e3, b2, b3, q0, q1, q2, q3)
                b0, b1, b2, b3 = load_two_columns(int32(x2 + row))
                r0, r1, r2, r3 = multiply(a0, a1, a2, a3, b0, b1, r0, r1, r2, r3)
                r0, r1, r2, r3 = multiply(e0, e1, e2, e3, b2, b3, r0, r1, r2, r3)
                b0, b1, b2, b3 = load_two_columns(int32(x3 + row))
                s0, s1, s2, s3 = multiply(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3)
                s0, s1, s2, s3 = multiply(e0, e1, e2, e3, b2, b3, s0, s1, s2, s3)
            row_size = 4 * pairs
            size_of_group, lower, pair = row_size * TILE * tiles, 8 * row_size, int64(lane & int32(3))
            to = drive_at + first * size_of_group + row_size * (TILE * tile + (lane >> int32(2))) + 4 * pair
            has_pair = pair < pairs
            store_fragment(to, to + lower, has_pair and first < groups, p0, p1, p2, p3)
            to += size_of_group
            store_fragment(to, to + lower, has_pair and first + 1 < groups, q0, q1, q2, q3)
            to += size_of_group
            store_fragment(to, to + lower, has_pair and first + 2 < groups, r0, r1, r2, r3)
            to += size_of_group
            store_fragment(to, to + lower, has_pair and first + 3 < groups, s0, s1, s2, s3)
            tile += warps

    return drives, types.void(*[types.int64] * 9)
