"""Input products on tensor cores for `tensor_core_cluster.py`.

Not exact: inputs, weights and products are rounded to `precision`, sums are float32. A group is what one cluster
receives in one step: the inputs of at most SAMPLES samples. Group number t * clusters + c has the samples of cluster c
in step t. Arguments named `*_at` are byte addresses.

Block : some neighbouring groups at a time, whose inputs it lays out as columns in shared memory.
Warp  : neighbouring tiles of the columns of the weights.

============ ======== ==========================================================================================
array        memory   shape, dtype, contents
============ ======== ==========================================================================================
begins       global   (tiles + 1,) int64, where the steps of each tile begin
values       global   (steps + 4, 32, 4) int32, weights as fragments (`tensor_core_ptx.py`)
rows         global   (steps + 4, TILE) uint16, the inputs of each step
drive        global   (groups, TILE * tiles, pairs) int32, pairs of rounded products
x            shared   (groups of the block, inputs + 1, SAMPLES) rounded; the last row, and samples that the cluster
                      does not have, are zero
============ ======== ==========================================================================================
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, int64, types, uint16

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.cluster import in_all_lanes
from eventrnn.cuda.kernels.ptx import (
    global_float32,
    global_int32,
    global_int64,
    load_readonly2,
    load_readonly_uint16,
    max_relaxed,
    shared_base,
    shared_int32,
    shared_int64,
    shared_uint16,
)
from eventrnn.cuda.kernels.tensor_core_cells import FLOAT16_MAX
from eventrnn.cuda.kernels.tensor_core_pieces import ROW_BYTES, STEP_BYTES, TILE, UNITS_BYTES, ZERO
from eventrnn.cuda.kernels.tensor_core_ptx import MULTIPLY, PACK, load_readonly_words, load_two_columns
from eventrnn.cuda.tables import STATUS_LARGE

#: groups that a block may have at a time. The more it has, the less often the weights are read
GROUPS = (8, 4, 2, 1)

#: threads that read the event list of one row. A row has few events, and many rows are read at the same time
ROW_LANES = 8


def make_fill_from_lists(precision: str, own_groups: int):
    """The device function fill(...) -> large: lay out the events of a block's groups in x.

    begins_at, counts_at, lists_at : an event list set (`batched_products.py`)
    row_of_at : (rows,) int64, the list of each row, or address 0 for the list of the same number
    row_0     : the row of the list set that is the first one of group 0
    first     : the first group of the block
    width     : samples per cluster
    large     : whether this thread found a value beyond the float16 range
    """
    pack, limit = PACK[precision], np.float32(FLOAT16_MAX if precision == "float16" else np.inf)

    @device_function
    def fill(
        begins_at, counts_at, lists_at, row_of_at, row_0, first, groups, batch, width, clusters, inputs, thread, threads
    ):
        x, large = shared_base(), False
        zero, words = int64(thread), shared_int64(x)
        while zero < own_groups * (ROW_BYTES // 8) * (inputs + 1):
            words[zero] = int64(0)
            zero += threads
        cuda.syncthreads()
        lanes = min(int64(threads), int64(ROW_LANES))
        own, lane = int64(thread) // lanes, int64(thread) % lanes
        while own < own_groups * width:
            group = first + own // width
            sample = group % clusters * width + own % width
            if group < groups and sample < batch:
                row = row_0 + group // clusters * batch + sample
                if row_of_at != 0:
                    row = global_int64(row_of_at)[row]
                column = x + ROW_BYTES * (inputs + 1) * (own // width) + 2 * (own % width)
                count, at = int64(global_int32(counts_at)[row]), lane
                event = lists_at + 8 * (global_int64(begins_at)[row] + lane)
                # The next event is loaded before this one is stored. Entries follow the last list.
                unit, word = load_readonly2(event)
                while at < count:
                    event += 8 * lanes
                    at += lanes
                    next_unit, next_word = load_readonly2(event)
                    value = libdevice.int_as_float(word)
                    large = large or abs(value) > limit
                    shared_uint16(column + ROW_BYTES * int64(unit))[0] = uint16(pack(value, ZERO))
                    unit, word = next_unit, next_word
            own += threads // lanes
        return large

    return fill


def make_fill_from_rows(precision: str, own_groups: int):
    """The device function fill(...) -> large: lay out dense rows in x, as that of `make_fill_from_lists` does.

    dense_at : (steps * batch, pitch) float32, of whose columns the first `inputs` are read
    """
    pack, limit = PACK[precision], np.float32(FLOAT16_MAX if precision == "float16" else np.inf)

    @device_function
    def fill(dense_at, pitch, _, __, row_0, first, groups, batch, width, clusters, inputs, thread, threads):
        x, large, own = shared_base(), False, int64(0)
        while own < own_groups:
            group = first + own
            sample = group % clusters * width
            dense = dense_at + 4 * pitch * (row_0 + group // clusters * batch + sample)
            at = int64(thread)
            while at <= inputs:
                words, pair = shared_int32(x + ROW_BYTES * (own * (inputs + 1) + at)), int64(0)
                while pair < ROW_BYTES // 4:
                    a = b = ZERO
                    if group < groups and at < inputs and 2 * pair < width:
                        if sample + 2 * pair < batch:
                            a = global_float32(dense + 8 * pair * pitch)[at]
                        if sample + 2 * pair + 1 < batch:
                            b = global_float32(dense + 4 * (2 * pair + 1) * pitch)[at]
                    large = large or abs(a) > limit or abs(b) > limit
                    words[pair] = pack(a, b)
                    pair += 1
                at += threads
            own += 1
        return large

    return fill


def make_products(precision: str, own_groups: int, group: int = 0):
    """The device function add(...): two steps of a tile, multiplied with the inputs of each group from `group` on.

    sums     : (4 * own_groups,) float32, fragments of the sums of all groups
    x_at     : shared address of the inputs of the group, for this lane; size : bytes of a group
    a0 to e3 : fragments of the weights of both steps
    """
    multiply = MULTIPLY[precision]
    rest = make_products(precision, own_groups, group + 1) if group + 1 < own_groups else None
    k0, k1, k2, k3 = range(4 * group, 4 * group + 4)

    @device_function
    def last(sums, x_at, size, a0, a1, a2, a3, e0, e1, e2, e3):
        b0, b1, b2, b3 = load_two_columns(x_at)
        s0, s1, s2, s3 = multiply(a0, a1, a2, a3, b0, b1, sums[k0], sums[k1], sums[k2], sums[k3])
        sums[k0], sums[k1], sums[k2], sums[k3] = multiply(e0, e1, e2, e3, b2, b3, s0, s1, s2, s3)

    @device_function
    def add(sums, x_at, size, a0, a1, a2, a3, e0, e1, e2, e3):
        last(sums, x_at, size, a0, a1, a2, a3, e0, e1, e2, e3)
        rest(sums, int32(x_at + size), size, a0, a1, a2, a3, e0, e1, e2, e3)

    return add if rest else last


def drives_kernel(precision: str, own_groups: int, dense: bool):
    """The kernel of the input products, and its signature.

    own_groups : groups of a block at a time, one of GROUPS
    dense      : the inputs are dense rows (`make_fill_from_rows`), not event lists (`make_fill_from_lists`)

    source     : the first four arguments of the function that lays out the inputs; row_0 as there
    groups     : number of groups; batch, inputs, tiles : see the shapes of the arrays
    pairs      : pairs of samples of a group that are written
    """
    pack = PACK[precision]
    fill = (make_fill_from_rows if dense else make_fill_from_lists)(precision, own_groups)
    add, numbers = make_products(precision, own_groups), 4 * own_groups

    def drives(
        source_0,
        source_1,
        source_2,
        source_3,
        row_0,
        groups,
        batch,
        clusters,
        inputs,
        begins_at,
        values_at,
        rows_at,
        tiles,
        pairs,
        drive_at,
        status_at,
    ):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), in_all_lanes(thread >> int32(5)), threads >> int32(5)
        size, x_at, begins = int32(ROW_BYTES * (inputs + 1)), int32(shared_base()), global_int64(begins_at)
        row_size, pair = 4 * pairs, int64(lane & int32(3))
        own_drive = drive_at + row_size * int64(lane >> int32(2)) + 4 * pair
        sums = cuda.local.array(numbers, float32)
        first, large = int64(own_groups) * int64(cuda.blockIdx.x), False
        while first < groups:
            source = source_0, source_1, source_2, source_3
            found = fill(*source, row_0, first, groups, batch, 2 * pairs, clusters, inputs, thread, threads)
            large = large or found
            cuda.syncthreads()
            tile, last_tile = tiles * int64(warp) // warps, tiles * int64(warp + 1) // warps
            values = values_at + STEP_BYTES * begins[tile] + 16 * int64(lane)
            rows = rows_at + UNITS_BYTES * begins[tile] + 2 * int64(lane)
            # What two steps read is loaded while the four before them are multiplied, also beyond the end of a tile,
            # where the next one begins. Four steps follow the last tile.
            next_row = load_readonly_uint16(rows)
            f0, f1, f2, f3 = load_readonly_words(values)
            g0, g1, g2, g3 = load_readonly_words(values + STEP_BYTES)
            later_row = load_readonly_uint16(rows + 2 * UNITS_BYTES)
            h0, h1, h2, h3 = load_readonly_words(values + 2 * STEP_BYTES)
            i0, i1, i2, i3 = load_readonly_words(values + 3 * STEP_BYTES)
            end, to = begins[tile], own_drive + row_size * TILE * (tiles * first + tile)
            while tile < last_tile:
                for k in range(numbers):
                    sums[k] = ZERO
                step, end = end, begins[tile + 1]
                left = int32(end - step)
                while left > 0:
                    # A tile has an even number of steps.
                    row = int32(x_at + int32(ROW_BYTES) * next_row)
                    a0, a1, a2, a3 = f0, f1, f2, f3
                    e0, e1, e2, e3 = g0, g1, g2, g3
                    next_row = later_row
                    f0, f1, f2, f3 = h0, h1, h2, h3
                    g0, g1, g2, g3 = i0, i1, i2, i3
                    left, values, rows = int32(left - 2), values + 2 * STEP_BYTES, rows + 2 * UNITS_BYTES
                    later_row = load_readonly_uint16(rows + 2 * UNITS_BYTES)
                    h0, h1, h2, h3 = load_readonly_words(values + 2 * STEP_BYTES)
                    i0, i1, i2, i3 = load_readonly_words(values + 3 * STEP_BYTES)
                    add(sums, row, size, a0, a1, a2, a3, e0, e1, e2, e3)
                there = to
                for k in range(own_groups):
                    if pair < pairs and first + k < groups:
                        global_int32(there)[0] = pack(sums[4 * k], sums[4 * k + 1])
                        global_int32(there + 8 * row_size)[0] = pack(sums[4 * k + 2], sums[4 * k + 3])
                    there += row_size * TILE * tiles
                tile, to = tile + 1, to + row_size * TILE
            # No warp lays out the next inputs while another one reads these.
            cuda.syncthreads()
            first += int64(own_groups) * int64(cuda.gridDim.x)
        if large:
            max_relaxed(status_at + 8 * STATUS_LARGE, int64(1))

    return drives, types.void(*[types.int64] * 16)
