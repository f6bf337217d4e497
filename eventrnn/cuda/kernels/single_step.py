"""One step of one layer as one kernel: input and recurrent drives, cells, events; sparse weights, released variant.

For calls of a single step, where there is no time to copy weights to shared memory. Blocks do not wait for each other:
each reads the input and the outputs of the step before, and writes cells and outputs to other arrays. Each step equals
`reference.step` with variant "evnn", terms in ascending presynaptic order with one FMA per term.

Block  : the 32 units of one tile (x) of one sample (y).
Warp   : one strip of 32 columns that contains gate rows of the tile, of one matrix: two strips per gate at most,
         because a gate begins anywhere in a strip. Then the first warp updates the cells.
Thread : one column of a strip; one unit of the tile.

========== ======== ===========================================================================================
array      memory   shape, dtype, contents
========== ======== ===========================================================================================
x          global   (batch, inputs) float32
y, c       global   (batch, units) float32, outputs and cells before the step, and others after it
units      global   (entries,) int32, rows (entries + 1, 32), begins (strips + 1,) int64: `packing.CompactStrips`
bias       global   (strips, 32) float32
threshold  global   (tiles, 32) float32
status     global   int64 fault words (`tables.STATUS_FIELDS`); the caller clears them after a fault
answer     host     pinned: the status words where one is not zero, then a word that, once all outputs are written,
                    becomes ANSWERED, or FAULTY where the status words are
arrivals   global   int32 behind the status words, the blocks that are complete
output     host     pinned: (batch, units) float32
hits       shared   per warp, scratch of `gather_product.py`
drives     shared   (2, 3, 32) float32
========== ======== ===========================================================================================

Barrier: one block barrier between strips and cells. The first warp alone writes what the host reads.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.gather_product import make_hit_product, make_list_hits, row_bytes_of
from eventrnn.cuda.kernels.ptx import (
    count_arrival,
    egru_value,
    fence_gpu,
    fence_system,
    global_float32,
    global_int32,
    global_int64,
    load_readonly,
    load_relaxed_int64,
    load_shared_float,
    max_relaxed,
    shared_base,
    store_float,
    store_relaxed_int64,
    store_shared_float,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP
from eventrnn.cuda.tables import LANES, LAST, STATUS_CELLS, STATUS_FIELDS, STATUS_INPUT

# The last word of an answer.
ANSWERED, FAULTY = 1, 2

# Strips of a gate that a tile may touch, and the warps of a block: for two matrices of three gates.
STRIPS_PER_GATE = 2
STEP_WARPS = 2 * 3 * STRIPS_PER_GATE

# Units that a lane gathers together.
UNITS_PER_LANE = 5

# Bytes of shared memory of a block.
HITS_BYTES = tables.HIT_BYTES * (LANES * UNITS_PER_LANE + tables.LIST_PAD)
STEP_SHARED_BYTES = STEP_WARPS * HITS_BYTES + 4 * 2 * 3 * LANES


def make_global_product(layout: int):
    """The device function global_product: acc + sum over a strip's units of weight * value, one FMA per term.

    global_product(acc, row_at, units_at, rows_at, begin, end, hits_at, lane) -> acc

    begin, end : the entries of the strip in `units` and `rows`; everything but the hits is in global memory
    """
    hit_product, row_bytes = make_hit_product(layout), row_bytes_of(layout)
    list_hits = make_list_hits(layout, UNITS_PER_LANE)
    weight_bytes = row_bytes // LANES

    @device_function
    def output_or_zero(value, entry, end):
        if entry >= end:
            value = np.float32(0)
        return value

    @device_function
    def global_product(acc, row_at, units_at, rows_at, begin, end, hits_at, lane):
        lanes_below = int32((int32(1) << lane) - 1)
        values_at = rows_at + int64(row_bytes) * begin + weight_bytes * lane
        units, final = global_int32(units_at), end - 1
        first, count = int32(0), int32(end - begin)
        while first < count:
            at = int32(first + UNITS_PER_LANE * lane)
            entry = begin + at
            # Loads that no branch guards are under way together.
            j, k, m = units[min(entry, final)], units[min(entry + 1, final)], units[min(entry + 2, final)]
            n, o = units[min(entry + 3, final)], units[min(entry + 4, final)]
            v, w, x = load_readonly(row_at + j), load_readonly(row_at + k), load_readonly(row_at + m)
            y, z = load_readonly(row_at + n), load_readonly(row_at + o)
            v, w, x = (
                output_or_zero(v, entry, end),
                output_or_zero(w, entry + 1, end),
                output_or_zero(x, entry + 2, end),
            )
            y, z = output_or_zero(y, entry + 3, end), output_or_zero(z, entry + 4, end)
            none = np.float32(0)
            hits = list_hits((v, w, x, y, z, none, none), int32(row_bytes * at), hits_at, lanes_below)
            acc = hit_product(acc, values_at, hits_at, hits, lane)
            first = int32(first + LANES * UNITS_PER_LANE)
        return acc

    return global_product


def step_kernel(layout_in: int, layout_rec: int):
    """The kernel and its signature. Launch with (tiles, batch) blocks of 32 * STEP_WARPS threads.

    layout_in, layout_rec : layout codes of the matrices, of which only NARROW counts
    """
    product_in, product_rec = make_global_product(layout_in), make_global_product(layout_rec)

    def step(
        n,
        inputs,
        x_at,
        y_before_at,
        c_before_at,
        y_after_at,
        c_after_at,
        threshold_at,
        in_units_at,
        in_rows_at,
        in_begins_at,
        in_bias_at,
        rec_units_at,
        rec_rows_at,
        rec_begins_at,
        rec_bias_at,
        status_at,
        checked,
        output_at,
        answer_at,
    ):
        thread = int32(cuda.threadIdx.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        tile, sample = int64(cuda.blockIdx.x), int64(cuda.blockIdx.y)
        base, arrivals_at = int32(shared_base()), status_at + 8 * STATUS_FIELDS
        drives_at = int32(base + STEP_WARPS * HITS_BYTES)
        first_unit = LANES * tile
        last_unit = min(n, first_unit + LANES)
        # Loaded ahead, for the cells.
        unit, own_unit = first_unit + lane, min(first_unit + lane, n - 1)
        place = 4 * (sample * n + own_unit)
        threshold, carried = load_readonly(threshold_at + 4 * own_unit), load_readonly(c_before_at + place)
        recurrent = warp >= int32(3 * STRIPS_PER_GATE)
        job = warp
        if recurrent:
            job = int32(warp - 3 * STRIPS_PER_GATE)
        gate = int64(job >> int32(1))
        strip = ((gate * n + first_unit) >> 5) + (job & int32(1))
        if 32 * strip < gate * n + last_unit:
            column = 32 * strip + lane
            hits_at = int32(base + HITS_BYTES * warp)
            if recurrent:
                begins = global_int64(rec_begins_at)
                acc = product_rec(
                    global_float32(rec_bias_at)[column],
                    y_before_at + 4 * sample * n,
                    rec_units_at,
                    rec_rows_at,
                    begins[strip],
                    begins[strip + 1],
                    hits_at,
                    lane,
                )
            else:
                begins = global_int64(in_begins_at)
                acc = product_in(
                    global_float32(in_bias_at)[column],
                    x_at + 4 * sample * inputs,
                    in_units_at,
                    in_rows_at,
                    begins[strip],
                    begins[strip + 1],
                    hits_at,
                    lane,
                )
            own = column - (gate * n + first_unit)
            if own >= 0 and own < last_unit - first_unit:
                row = gate
                if recurrent:
                    row = gate + 3
                store_shared_float(int32(drives_at + 4 * (LANES * row + own)), acc)
        if checked != 0 and tile == 0:
            k, x = int64(thread), global_float32(x_at + 4 * sample * inputs)
            while k < inputs:
                # Infinity minus infinity is NaN as well.
                if x[k] - x[k] != 0:
                    max_relaxed(status_at + 8 * STATUS_INPUT, LAST - (sample * inputs + k))
                k += LANES * STEP_WARPS
        cuda.syncthreads()
        if warp == 0:
            at = int32(drives_at + 4 * lane)
            v, _, _, _ = egru_value(
                load_shared_float(at),
                load_shared_float(int32(at + 4 * LANES)),
                load_shared_float(int32(at + 8 * LANES)),
                load_shared_float(int32(at + 12 * LANES)),
                load_shared_float(int32(at + 16 * LANES)),
                load_shared_float(int32(at + 20 * LANES)),
                carried,
            )
            y, c = np.float32(0), v
            if v > threshold:
                y, c = v, v - threshold
            if unit < n:
                if output_at != 0:
                    store_float(output_at + place, y)
                store_float(y_after_at + place, y)
                store_float(c_after_at + place, c)
                if c - c != 0:
                    max_relaxed(status_at + 8 * STATUS_CELLS, int64(1))
            if answer_at != 0:
                cuda.syncwarp(FULL_WARP)
                arrived = int32(0)
                if lane == 0:
                    fence_system()
                    arrived = count_arrival(arrivals_at, int32(1))
                if cuda.shfl_sync(FULL_WARP, arrived, int32(0)) == int32(cuda.gridDim.x * cuda.gridDim.y) - 1:
                    # The last block answers for all, and makes the counter ready for the next step. The outputs of
                    # every block were in the host's memory before it arrived, by its own `fence_system`; what is left
                    # to order here are the status words, which lie on the GPU.
                    fence_gpu()
                    word = int64(0)
                    if lane < int32(STATUS_FIELDS):
                        word = load_relaxed_int64(status_at + 8 * lane)
                    faulty = cuda.ballot_sync(FULL_WARP, word != 0)
                    if faulty != 0:
                        if lane < int32(STATUS_FIELDS):
                            store_relaxed_int64(answer_at + 8 * lane, word)
                        fence_system()
                        cuda.syncwarp(FULL_WARP)
                    if lane == 0:
                        global_int32(arrivals_at)[0] = int32(0)
                        verdict = int64(ANSWERED)
                        if faulty != 0:
                            verdict = int64(FAULTY)
                        store_relaxed_int64(answer_at + 8 * STATUS_FIELDS, verdict)

    return step, types.void(*[types.int64] * tables.STEP_FIELDS)
