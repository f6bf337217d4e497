"""One step of one layer as one kernel: input and recurrent drives, cells, events; sparse weights, released variant.

For calls of a single step, where there is no time to copy weights to shared memory. Blocks do not wait for each other:
each reads the input and the outputs of the step before, and writes cells and outputs to other arrays. Each step equals
`reference.step` with variant "evnn", terms in ascending presynaptic order with one FMA per term.

Block  : the 32 units of one tile (x) of one sample (y).
Warp   : one strip of 32 columns that contains gate rows of the tile, of one matrix: two strips per gate at most,
         because a gate begins anywhere in a strip. Then the first warp updates the cells, and the others of tile 0
         check the input.
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
answer     host     pinned: the status words, then a word that, once all outputs are written, becomes ANSWERED, or
                    FAULTY where a status word is not zero
output     host     pinned: (batch, units) float32
hits       shared   per warp, scratch of `gather_product.py`
drives     shared   (2, 3, 32) float32
========== ======== ===========================================================================================

Barriers: one block barrier between strips and cells, one before the block counts itself as complete.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.gather_product import append_hit, event_flag, hit_offsets, make_hit_product, row_bytes_of
from eventrnn.cuda.kernels.ptx import (
    count_arrival,
    egru_value,
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
    weight_bytes = row_bytes // LANES

    @device_function
    def value_of_entry(row_at, units_at, entry, end):
        value = np.float32(0)
        if entry < end:
            value = load_readonly(row_at + global_int32(units_at)[entry])
        return value

    @device_function
    def global_product(acc, row_at, units_at, rows_at, begin, end, hits_at, lane):
        lanes_below = int32((int32(1) << lane) - 1)
        values_at = rows_at + int64(row_bytes) * begin + weight_bytes * lane
        first, count = int32(0), int32(end - begin)
        while first < count:
            at = int32(first + UNITS_PER_LANE * lane)
            entry = begin + at
            v, w, x = (
                value_of_entry(row_at, units_at, entry, end),
                value_of_entry(row_at, units_at, entry + 1, end),
                value_of_entry(row_at, units_at, entry + 2, end),
            )
            y, z = (
                value_of_entry(row_at, units_at, entry + 3, end),
                value_of_entry(row_at, units_at, entry + 4, end),
            )
            a, b, c, d, e = event_flag(v), event_flag(w), event_flag(x), event_flag(y), event_flag(z)
            before, hits = hit_offsets(int32(a + b + c + d + e), lanes_below)
            row = int32(row_bytes * at)
            p = append_hit(int32(hits_at + tables.HIT_BYTES * before), row, v, a)
            p = append_hit(p, int32(row + row_bytes), w, b)
            p = append_hit(p, int32(row + 2 * row_bytes), x, c)
            p = append_hit(p, int32(row + 3 * row_bytes), y, d)
            p = append_hit(p, int32(row + 4 * row_bytes), z, e)
            acc = hit_product(acc, values_at, hits_at, hits, lane)
            first = int32(first + LANES * UNITS_PER_LANE)
        return acc

    return global_product


def step_kernel(layout_in: int, layout_rec: int):
    """The kernel and its signature. Launch with (tiles, batch) blocks of 32 * STEP_WARPS threads.

    layout_in, layout_rec : layout codes of the matrices, of which only NARROW counts
    """
    product_in, product_rec = make_global_product(layout_in), make_global_product(layout_rec)

    def step(table_at):
        thread = int32(cuda.threadIdx.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        tile, sample = int64(cuda.blockIdx.x), int64(cuda.blockIdx.y)
        layer = global_int64(table_at)
        n, inputs, status = layer[tables.STEP_UNITS], layer[tables.STEP_INPUTS], layer[tables.STEP_STATUS]
        base = int32(shared_base())
        drives_at = int32(base + STEP_WARPS * HITS_BYTES)
        first_unit = LANES * tile
        last_unit = min(n, first_unit + LANES)
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
                begins = global_int64(layer[tables.STEP_REC_BEGINS])
                acc = product_rec(
                    global_float32(layer[tables.STEP_REC_BIAS])[column],
                    layer[tables.STEP_Y_BEFORE] + 4 * sample * n,
                    layer[tables.STEP_REC_UNITS],
                    layer[tables.STEP_REC_ROWS],
                    begins[strip],
                    begins[strip + 1],
                    hits_at,
                    lane,
                )
            else:
                begins = global_int64(layer[tables.STEP_IN_BEGINS])
                acc = product_in(
                    global_float32(layer[tables.STEP_IN_BIAS])[column],
                    layer[tables.STEP_X] + 4 * sample * inputs,
                    layer[tables.STEP_IN_UNITS],
                    layer[tables.STEP_IN_ROWS],
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
        cuda.syncthreads()
        unit = first_unit + lane
        if warp == 0 and unit < n:
            at = int32(drives_at + 4 * lane)
            place = 4 * (sample * n + unit)
            v, _, _, _ = egru_value(
                load_shared_float(at),
                load_shared_float(int32(at + 4 * LANES)),
                load_shared_float(int32(at + 8 * LANES)),
                load_shared_float(int32(at + 12 * LANES)),
                load_shared_float(int32(at + 16 * LANES)),
                load_shared_float(int32(at + 20 * LANES)),
                load_readonly(layer[tables.STEP_C_BEFORE] + place),
            )
            threshold = global_float32(layer[tables.STEP_THRESHOLD])[unit]
            y, c = np.float32(0), v
            if v > threshold:
                y, c = v, v - threshold
            store_float(layer[tables.STEP_Y_AFTER] + place, y)
            store_float(layer[tables.STEP_C_AFTER] + place, c)
            if layer[tables.STEP_OUTPUT] != 0:
                store_float(layer[tables.STEP_OUTPUT] + place, y)
            # Infinity minus infinity is NaN as well.
            if c - c != 0:
                max_relaxed(status + 8 * STATUS_CELLS, int64(1))
        if layer[tables.STEP_CHECKED] != 0 and tile == 0 and warp > 0:
            k = int64(thread - LANES)
            x = global_float32(layer[tables.STEP_X] + 4 * sample * inputs)
            while k < inputs:
                if x[k] - x[k] != 0:
                    max_relaxed(status + 8 * STATUS_INPUT, LAST - (sample * inputs + k))
                k += LANES * (STEP_WARPS - 1)
        if layer[tables.STEP_ANSWER] != 0:
            cuda.syncthreads()
            if thread == 0:
                fence_system()
                blocks = int32(cuda.gridDim.x * cuda.gridDim.y)
                if count_arrival(layer[tables.STEP_ARRIVALS], int32(1)) == blocks - 1:
                    # The last block answers for all, and makes the counter ready for the next step.
                    fence_system()
                    global_int32(layer[tables.STEP_ARRIVALS])[0] = int32(0)
                    field, verdict = int64(0), int64(ANSWERED)
                    while field < STATUS_FIELDS:
                        word = load_relaxed_int64(status + 8 * field)
                        store_relaxed_int64(layer[tables.STEP_ANSWER] + 8 * field, word)
                        if word != 0:
                            verdict = int64(FAULTY)
                        field += 1
                    fence_system()
                    store_relaxed_int64(layer[tables.STEP_ANSWER] + 8 * STATUS_FIELDS, verdict)

    return step, types.void(types.int64)
