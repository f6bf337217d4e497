"""The recurrent part of a layer on tensor cores, for few streams: dense weights in the registers of the whole GPU.

Not exact: weights, input drives and outputs are rounded to `precision`, and sums are float32. tanh and sigmoid are
those of `tensor_core_cluster.py`. Every weight is multiplied, whatever fired.

The weights stay in registers for all time steps. Blocks exchange outputs through a log in global memory, which is
filled with UNWRITTEN before the launch: a lane polls the words that it multiplies until all are written, so no grid
barrier is needed (`persistent.py`). All blocks must be resident at the same time (cooperative launch).

The units of a step of TILE rows are those of `units_of_steps`, an order in which a lane's part of the fragments of two
steps is 16 neighbouring bytes of the log.

Block  : `OWN_UNITS[tiles]` units, whose columns of gates u, r, g follow each other in `tiles` tiles of 16 columns.
Warp   : all tiles of the block for `steps` steps, that is 16 * steps of the inputs of the products.
Thread : polls the outputs of sample lane // 4; in the cell update, one unit in one sample.

============ ======== ==========================================================================================
array        memory   shape, dtype, contents
============ ======== ==========================================================================================
fragments    global   (blocks, warps, steps, tiles, 32, 4) int32, weights as fragments (`tensor_core_ptx.py`)
log          global   (time steps + 1, batch, log_pitch) int32, pairs of rounded outputs; row 0 is the state
                      before the run. Words that no unit has are zero
drive        global   (time steps * batch, 3 * padded) rounded input products
y            global   (batch, padded) rounded outputs: before the run at the start, of the last step at the end
sent         global   (time steps, batch, pitch) float32, outputs; pitch in float32
after        global   (time steps, batch, units) float32, cells after each step, or address 0
counts       global   (2, units) int64, to which graded events are added, then events of value 1; or 0
sums         shared   (2, batch, TILE * tiles, sums_pitch) float32, the products of each warp in even and in odd
                      time steps
words        register (4 * tiles * steps,) int32, weights
============ ======== ==========================================================================================

Barriers per time step: one between products and cells. A warp writes the sums of a time step while others still read
those of the one before, so there are two of them.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.cluster import in_all_lanes
from eventrnn.cuda.kernels.persistent import MAX_POLLS, UNWRITTEN
from eventrnn.cuda.kernels.ptx import (
    add_relaxed,
    global_float32,
    global_int32,
    load_readonly_uint16,
    load_relaxed4,
    load_shared_float4,
    max_relaxed,
    shared_base,
    store_shared_float,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP
from eventrnn.cuda.kernels.tensor_core_cells import FLOAT16_MAX
from eventrnn.cuda.kernels.tensor_core_pieces import STEP_BYTES, TILE, ZERO, cell_before_event, make_hold
from eventrnn.cuda.kernels.tensor_core_ptx import (
    MULTIPLY,
    PACK,
    WIDEN,
    load_readonly_words,
    load_relaxed2,
    store_relaxed_word,
)

#: by the number of tiles of a block, its units: an even number, so that a pair of outputs has one writer
OWN_UNITS = {1: 4, 2: 10, 3: 16}

#: samples at most: the columns of a fragment
MAX_SAMPLES = 8


def sums_pitch(warps: int) -> int:
    """Floats per column of `sums`, so that loads of neighbouring units do not meet in a bank. warps: multiple of 4"""
    return warps + 4 * (warps % 8 == 0)


def units_of_steps(steps: int, warps: int) -> np.ndarray:
    """(warps * steps, TILE) int64: the unit of each row of each step of each warp."""
    step, row = np.arange(steps)[:, None], np.arange(TILE)[None, :]
    lane, upper, half = row % 8 // 2, row // 8, row % 2
    # A lane has four neighbouring words of two steps, and two words of a last single one.
    paired = 16 * (step // 2) + 4 * lane + 2 * (step % 2) + upper
    single = 16 * (step // 2) + 2 * lane + upper
    word = np.where(step < steps // 2 * 2, paired, single)
    of_warp = TILE * steps * np.arange(warps)[:, None, None]
    return (of_warp + 2 * word + half).reshape(-1, TILE)


def make_load(steps: int):
    """The device function load(at, tail_at): the 2 * steps words of a lane as a tuple."""

    @device_function
    def tail(at, tail_at):
        return load_relaxed2(tail_at)

    @device_function
    def pair(at, tail_at):
        return load_relaxed4(at)

    if steps <= 2:
        return tail if steps == 1 else pair
    rest = make_load(steps - 2)

    @device_function
    def load(at, tail_at):
        return load_relaxed4(at) + rest(at + int64(64), tail_at)

    return load


def make_all_written(count: int):
    """The device function that tells whether none of so many words is UNWRITTEN."""
    rest = make_all_written(count - 1) if count > 1 else None

    @device_function
    def several(words):
        return (words[0] != UNWRITTEN) & rest(words[1:])

    @device_function
    def one(words):
        return words[0] != UNWRITTEN

    return several if count > 1 else one


def make_multiply_tiles(tiles: int, multiply):
    """The device function (words, b0, b1, sums): products of tiles with one step of outputs, added to sums."""
    rest = make_multiply_tiles(tiles - 1, multiply) if tiles > 1 else None

    @device_function
    def one(words, b0, b1, sums):
        return multiply(words[0], words[1], words[2], words[3], b0, b1, sums[0], sums[1], sums[2], sums[3])

    @device_function
    def several(words, b0, b1, sums):
        return one(words, b0, b1, sums) + rest(words[4:], b0, b1, sums[4:])

    return several if tiles > 1 else one


def make_product(steps: int, tiles: int, multiply):
    """The device function (words, outputs, sums): `make_multiply_tiles` of `steps` steps, whose sums it returns."""
    multiply_tiles = make_multiply_tiles(tiles, multiply)
    rest = make_product(steps - 1, tiles, multiply) if steps > 1 else None
    used = 4 * tiles

    @device_function
    def one(words, outputs, sums):
        return multiply_tiles(words, outputs[0], outputs[1], sums)

    @device_function
    def several(words, outputs, sums):
        return rest(words[used:], outputs[2:], multiply_tiles(words, outputs[0], outputs[1], sums))

    return several if steps > 1 else one


def make_store_sums(tiles: int, tile_bytes: int):
    """The device function (sums, at, sample_bytes, has_first, has_second): store a lane's sums of all tiles.

    at : shared address of the sum of column lane // 4 of the first tile, and of the lane's first sample
    """
    rest = make_store_sums(tiles - 1, tile_bytes) if tiles > 1 else None

    @device_function
    def one(sums, at, sample_bytes, has_first, has_second):
        below = int32(at + int32(tile_bytes // 2))
        if has_first:
            store_shared_float(at, sums[0])
            store_shared_float(below, sums[2])
        if has_second:
            store_shared_float(int32(at + sample_bytes), sums[1])
            store_shared_float(int32(below + sample_bytes), sums[3])

    @device_function
    def several(sums, at, sample_bytes, has_first, has_second):
        one(sums, at, sample_bytes, has_first, has_second)
        rest(sums[4:], int32(at + int32(tile_bytes)), sample_bytes, has_first, has_second)

    return several if tiles > 1 else one


def make_sum_of_fours(count: int):
    """The device function that adds 4 * count neighbouring float32 of shared memory."""
    rest = make_sum_of_fours(count - 1) if count > 1 else None

    @device_function
    def one(at):
        a, b, c, d = load_shared_float4(at)
        return (a + b) + (c + d)

    @device_function
    def several(at):
        return one(at) + rest(at + int64(16))

    return several if count > 1 else one


def tensor_grid_kernel(precision: str, tiles: int, steps: int, warps: int):
    """The kernel and its signature.

    precision : "float16" or "bfloat16"
    tiles     : tiles per block
    steps     : steps per warp
    warps     : warps per block, a multiple of 4

    Arguments: addresses of the fragments, of `vectors` (VECTORS, padded) float32 of `tensor_core_cells.py`, of the
    drives, of y, of the cells (batch, units) float32, which are updated in place, of the log, of `sent` and `after`;
    log_pitch, units, padded, pitch, batch, time steps; addresses of the counts and of the status vector, in which an
    event beyond the float16 range sets STATUS_LARGE, and outputs that do not arrive set STATUS_FAULT.
    """
    pack, widen = PACK[precision], WIDEN[precision]
    limit = np.float32(FLOAT16_MAX if precision == "float16" else np.inf)
    own, row_pitch = OWN_UNITS[tiles], 4 * sums_pitch(warps)
    column_bytes = TILE * tiles * row_pitch
    hold_words = make_hold(steps * tiles, load_readonly_words, STEP_BYTES)
    load, all_written = make_load(steps), make_all_written(2 * steps)
    product, store_sums = make_product(steps, tiles, MULTIPLY[precision]), make_store_sums(tiles, TILE * row_pitch)
    sum_of_warps = make_sum_of_fours(warps // 4)
    zeros = (ZERO,) * (4 * tiles)

    @device_function
    def poll(at, tail_at, max_polls):
        """The words of a lane once all are written, and 1; or 0 after so many polls."""
        polls = int32(0)
        while True:
            words = load(at, tail_at)
            complete = all_written(words)
            polls = int32(polls + 1)
            if complete or polls >= max_polls:
                return (*words, int32(complete))

    def layer(
        fragments_at,
        vectors_at,
        drive_at,
        y_at,
        cells_at,
        log_at,
        sent_at,
        after_at,
        log_pitch,
        units,
        padded,
        pitch,
        batch,
        time_steps,
        counts_at,
        status_at,
    ):
        thread, block = int32(cuda.threadIdx.x), int64(cuda.blockIdx.x)
        lane, warp = thread & int32(31), in_all_lanes(thread >> int32(5))
        group, column = int32(lane >> int32(2)), int32(lane & int32(3))
        words = hold_words(fragments_at + (block * warps + warp) * (steps * tiles * STEP_BYTES) + 16 * int64(lane))
        # Words that no unit has.
        first_free = int64(cuda.gridDim.x) * (own // 2)
        free = log_pitch - first_free
        item = block * (32 * warps) + thread
        while item < (time_steps + 1) * batch * free:
            store_relaxed_word(log_at + 4 * (item // free * log_pitch + first_free + item % free), int32(0))
            item += int64(cuda.gridDim.x) * (32 * warps)

        # The cell of this thread; those beyond the samples or the units are computed like the last ones and send zeros.
        has_cells = in_all_lanes(int32(int64(32) * warp < batch * own))
        own_unit, sample = int64(thread % own), int64(thread // own)
        unit = block * own + own_unit
        sends = sample < batch and (lane & int32(1)) == 0
        mine = sample < batch and unit < units
        sample, near_unit = min(sample, batch - 1), min(unit, units - 1)
        vectors = global_float32(vectors_at + 4 * near_unit)
        bias_u, bias_r, bias_g, bias_rec_g = vectors[0], vectors[padded], vectors[2 * padded], vectors[3 * padded]
        threshold = vectors[4 * padded]
        cell = global_float32(cells_at + 4 * (sample * units + near_unit))
        c = cell[0]
        drive = drive_at + 2 * (3 * padded * sample + near_unit)
        sent = sent_at + 4 * (sample * pitch + near_unit)
        after = after_at + 4 * (sample * units + near_unit)
        row_bytes = 4 * log_pitch * batch
        own_word = log_at + 4 * (log_pitch * sample) + 2 * unit
        state_word = y_at + 2 * (padded * sample + unit)
        if sends:
            word = int32(0)
            if unit < units:
                word = global_int32(state_word)[0]
            store_relaxed_word(own_word, word)

        # Lanes of samples that there are not poll those of the last one; nobody reads their products.
        polled = log_at + 4 * (log_pitch * min(int64(group), batch - 1) + 8 * steps * int64(warp))
        tail = polled + 64 * (steps // 2) + 8 * int64(column)
        polled += 16 * int64(column)
        shared = shared_base()
        sample_bytes = int32(column_bytes)
        sums_bytes = int32(column_bytes) * int32(batch)
        has_first, has_second = 2 * column < batch, 2 * column + 1 < batch
        lane_sums = int32(int32(shared) + sample_bytes * 2 * column + int32(row_pitch) * group + 4 * warp)
        cell_sums = shared + int64(column_bytes) * sample + row_pitch * own_unit
        max_polls, events, ones, large = int32(MAX_POLLS), int32(0), int32(0), False
        y, word = ZERO, int32(0)
        t = int32(0)
        while t < int32(time_steps):
            word_u = word_r = word_g = int32(0)
            if has_cells:
                word_u = load_readonly_uint16(drive)
                word_r = load_readonly_uint16(drive + 2 * padded)
                word_g = load_readonly_uint16(drive + 4 * padded)
            outputs = poll(polled, tail, max_polls)
            if not outputs[2 * steps]:
                global_int32(status_at + 8 * tables.STATUS_FAULT)[0] = 1
                max_polls = int32(1)
            cuda.syncwarp(FULL_WARP)
            odd = t & int32(1)
            sums = product(words, outputs, zeros)
            store_sums(sums, int32(lane_sums + odd * sums_bytes), sample_bytes, has_first, has_second)
            cuda.syncthreads()
            polled += row_bytes
            tail += row_bytes
            own_word += row_bytes
            if has_cells:
                at = cell_sums + int64(odd * sums_bytes)
                rec_u = sum_of_warps(at)
                rec_r = sum_of_warps(at + own * row_pitch)
                rec_g = sum_of_warps(at + 2 * own * row_pitch)
                in_u, in_r, in_g = widen(word_u), widen(word_r), widen(word_g)
                v = cell_before_event(in_u, in_r, in_g, rec_u, rec_r, rec_g, bias_u, bias_r, bias_g, bias_rec_g, c)
                y, c = ZERO, v
                if mine and v > threshold:
                    y, c = v, v - threshold
                word = pack(y, cuda.shfl_sync(FULL_WARP, y, lane | int32(1)))
                if sends:
                    store_relaxed_word(own_word, word)
                if mine:
                    global_float32(sent)[0] = y
                    if after_at != 0:
                        global_float32(after)[0] = c
                large = large or abs(y) > limit
                events = int32(events + int32(y != 0))
                ones = int32(ones + int32(y == 1))
            drive += 6 * padded * batch
            sent += 4 * batch * pitch
            after += 4 * batch * units
            t = int32(t + 1)
        if mine:
            cell[0] = c
            if counts_at != 0:
                add_relaxed(counts_at + 8 * unit, int64(events - ones))
                add_relaxed(counts_at + 8 * (units + unit), int64(ones))
        if sends and unit < units:
            global_int32(state_word)[0] = word
        if large:
            max_relaxed(status_at + 8 * tables.STATUS_LARGE, int64(1))

    return layer, types.void(*[types.int64] * 16)
