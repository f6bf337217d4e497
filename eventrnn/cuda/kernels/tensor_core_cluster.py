"""The recurrent part of a layer on tensor cores, with sparse weights in shared memory of one cluster of blocks.

Not exact: weights, input drives and outputs are rounded to `precision`, and sums are float32. tanh is the instruction
of the GPU, with a relative error of 2^-11, and sigmoid(x) is (1 + tanh(x / 2)) / 2. Every kept weight is multiplied,
whatever fired.

The columns of the recurrent weights, (units, 3 * units), are cut into tiles of TILE neighbouring ones. A tile has the
rows in which one of its columns has a weight, padded to whole steps of TILE rows. One product of fragments multiplies
the weights of a step with the outputs of its units in SAMPLES samples. Each lane gives the address of one unit's
outputs, so that the units may lie anywhere (`tensor_core_ptx.load_two_columns`).

Cluster : at most SAMPLES samples, all units.
Block   : the cells of some neighbouring units, and the tiles that contain a column of theirs. Two blocks may both
          compute a tile that both need.
Warp    : every `warps`-th tile of the block. The first steps of its first tile are held in registers, the weights of
          all others lie in shared memory.
Thread  : in the cell update, one unit in two samples.

============ ======== ==========================================================================================
array        memory   shape, dtype, contents
============ ======== ==========================================================================================
blocks       global   (blocks of a cluster, BLOCK_FIELDS) int64, see BLOCK_FIELDS
vectors      global   (VECTORS, padded) float32, parameters as in `tensor_core_cells.py`
drive        global   (steps * clusters, columns, pairs) int32, input products as pairs of rounded numbers, one per
                      sample; columns of gates u, r, g one after the other, padded to whole tiles
cells        global   (batch, units) float32, updated in place
outputs      global   (batch, outputs_pitch) float32, outputs before the first step
sent         global   (steps, batch, pitch) float32, outputs
after        global   (steps, batch, units) float32, cells after each step, or address 0
counts       global   (2, units) int64, to which graded events are added, then events of value 1; or address 0
held         global   (warps, held steps, 32, 4) int32, weights as fragments
held rows    global   (warps, held steps / 2, 32) int32, what each lane loads: byte offsets in a row of y
teams        global   (warps, 4) int32: of the team of each warp, the byte offset of its outputs in a row of y, their
                      bytes, its threads that have cells, 0 if none has, and the number of its barrier
barriers     shared   (2,) mbarriers, of even and of odd steps; at the same address in all blocks of the cluster
y            shared   (2, units + 1, SAMPLES) rounded outputs before even and odd steps; the last row is zero and
                      serves the padding of tiles
tiles        shared   (tiles, 4) int32: per tile where its sums are, the first of its steps that lie in shared memory,
                      and their number
values       shared   (steps of the block, 32, 4) int32, weights as fragments
rows         shared   (steps of the block + 1, TILE) uint16, the units of each step
sums         shared   (tiles, TILE, 2 * pairs) float32, recurrent products
============ ======== ==========================================================================================

A block writes its outputs into its own row of y. Teams of its warps copy them from there into those of the other
blocks, each as soon as it has updated its cells.

Barriers: an mbarrier phase before the outputs of the last step are read, which waits for all teams of the block and for
the bytes of the other blocks; one block barrier between products and cells; cluster barriers at the start and the end,
because no block may write into one that has not started or has ended. All outputs of a step arrive in a block only
after all blocks have read those of the step before it, so two rows are enough. That every block has units is a
condition of this. Teams arrive after they have read the sums, so that no warp overwrites sums that are still read.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.cluster import in_all_lanes, make_cycles, wait_for_phase
from eventrnn.cuda.kernels.persistent import MAX_POLLS
from eventrnn.cuda.kernels.ptx import (
    add_relaxed,
    barrier_arrive,
    barrier_expect_bytes,
    barrier_init,
    barrier_init_done,
    cluster_arrive,
    cluster_wait,
    copy_async16,
    fma,
    global_float32,
    global_int32,
    global_int64,
    load_shared4,
    load_shared_float2,
    load_shared_uint16,
    map_to_rank,
    max_relaxed,
    shared_base,
    shared_int32,
    wait_for_copies,
    warps_barrier,
)
from eventrnn.cuda.kernels.tensor_core_cells import FLOAT16_MAX, ONE
from eventrnn.cuda.kernels.tensor_core_ptx import (
    MULTIPLY,
    PACK,
    WIDEN,
    copy_to_block,
    fence_copies,
    load_one_column,
    load_readonly_word,
    load_readonly_words,
    load_two_columns,
    store_shared_float2,
    tanh_approx,
)

#: samples of a row of y: the columns of a fragment
SAMPLES = 8

#: columns of a tile, and rows of a step
TILE = 16

#: bytes of a row of y, of the weights of a step, and of the units of a step
ROW_BYTES, STEP_BYTES, UNITS_BYTES = 2 * SAMPLES, 4 * 4 * 32, 2 * TILE

(
    FIRST_UNIT,  # first unit whose cells the block owns
    OWN_UNITS,  # number of these units
    TILES,  # tiles of the block
    STEPS,  # those of their steps that lie in shared memory
    TEAMS,  # teams that have cells
    SHIFT_U,  # row of `sums` of the first unit, per gate
    SHIFT_R,
    SHIFT_G,
    HELD_OF,  # addresses in global memory: the block's part of `held`
    HELD_ROWS_OF,  # of `held rows`
    TEAMS_OF,  # of `teams`
    TILES_OF,  # of `tiles`
    VALUES_OF,  # of `values`
    UNITS_OF,  # of `rows`
    AT_Y,  # offsets in shared memory, the same for all blocks of a cluster
    AT_TILES,
    AT_VALUES,
    AT_UNITS,
    AT_SUMS,
    BLOCK_FIELDS,  # number of fields
) = range(20)

ZERO, HALF = np.float32(0), np.float32(0.5)


@device_function
def copy_words16(target_at, source_at, size, thread, threads):
    """Start copying `size` bytes, a multiple of 16, from global to shared memory; all threads of a block take part."""
    at = int64(16) * thread
    while at < size:
        copy_async16(target_at + at, source_at + at)
        at += int64(16) * threads


def make_hold(count: int, load, stride: int):
    """The device function hold(address): the words of `count` loads, which are `stride` bytes apart, as one tuple."""
    if count == 1:
        return load
    rest = make_hold(count - 1, load, stride)

    @device_function
    def hold(address):
        return load(address) + rest(address + int64(stride))

    return hold


@device_function
def load_row(address):
    """One word as a tuple."""
    return (load_readonly_word(address),)


def make_held_product(count: int, multiply):
    """The device function product(words, rows, y_at, sums): the product of a tile of 2 * count steps that is held.

    words, rows : what this lane holds of the weights and of the rows
    y_at        : shared address of the outputs
    s0 to t3    : two sums, to which the products are added, one of which gets the even steps
    """
    rest = make_held_product(count - 1, multiply) if count > 1 else None

    @device_function
    def product(words, rows, y_at, s0, s1, s2, s3, t0, t1, t2, t3):
        b0, b1, b2, b3 = load_two_columns(int32(y_at + rows[0]))
        s0, s1, s2, s3 = multiply(words[0], words[1], words[2], words[3], b0, b1, s0, s1, s2, s3)
        t0, t1, t2, t3 = multiply(words[4], words[5], words[6], words[7], b2, b3, t0, t1, t2, t3)
        return rest(words[8:], rows[1:], y_at, s0, s1, s2, s3, t0, t1, t2, t3)

    @device_function
    def last(words, rows, y_at, s0, s1, s2, s3, t0, t1, t2, t3):
        b0, b1, b2, b3 = load_two_columns(int32(y_at + rows[0]))
        s0, s1, s2, s3 = multiply(words[0], words[1], words[2], words[3], b0, b1, s0, s1, s2, s3)
        t0, t1, t2, t3 = multiply(words[4], words[5], words[6], words[7], b2, b3, t0, t1, t2, t3)
        return s0 + t0, s1 + t1, s2 + t2, s3 + t3

    return product if count > 1 else last


@device_function
def fast_sigmoid(x):
    """1 / (1 + exp(-x)) within an absolute error of 2^-12."""
    return fma(HALF, tanh_approx(HALF * x), HALF)


@device_function
def cell_before_event(inside_u, inside_r, inside_g, rec_u, rec_r, rec_g, bias_u, bias_r, bias_g, bias_rec_g, carried):
    """Cell state before the event: `cells.egru_value`, with the approximate sigmoid and tanh."""
    u = fast_sigmoid((inside_u + rec_u) + bias_u)
    r = fast_sigmoid((inside_r + rec_r) + bias_r)
    g = tanh_approx(fma(r, rec_g + bias_rec_g, inside_g + bias_g))
    return fma(u, carried, (ONE - u) * g)


def tensor_cluster_kernel(precision: str, blocks: int, pairs: int, held: int, senders: int, clocked: bool = False):
    """The kernel and its signature.

    precision : "float16" or "bfloat16"
    blocks    : blocks per cluster
    pairs     : pairs of samples per cluster, at most SAMPLES // 2
    held      : steps of a warp's first tile that are held in registers, an even number; 0 if none is
    senders   : warps of a team
    clocked   : measure the phases of a step (`tables.TURN_PHASES`), which costs time itself

    Arguments named `*_at` are byte addresses of the arrays above and of the status vector, in which an event beyond the
    float16 range sets STATUS_LARGE, and outputs that do not arrive set STATUS_FAULT. `*_step` are the bytes from one
    step to the next. clocks_at : (blocks, warps,
    `tables.TURN_PHASES`) int64, read if `clocked`
    """
    multiply, pack, widen = MULTIPLY[precision], PACK[precision], WIDEN[precision]
    limit = np.float32(FLOAT16_MAX if precision == "float16" else np.inf)
    sums_row = 8 * pairs
    hold_words = make_hold(max(1, held), load_readonly_words, STEP_BYTES)
    hold_rows = make_hold(max(1, held // 2), load_row, 4 * 32)
    held_product = make_held_product(max(1, held // 2), multiply)
    cycles = make_cycles(clocked)

    @device_function
    def multiply_tile(values_at, units_at, steps, y_at, s0, s1, s2, s3):
        """The product of steps of a tile with the outputs, plus the sums s0 to s3, as a fragment.

        values_at, units_at : shared addresses of the weights of the first step, and of its units, for this lane
        y_at                : shared address of the outputs
        """
        # Two sums, so that a product need not wait for the one before it.
        t0 = t1 = t2 = t3 = ZERO
        left = steps
        while left > 1:
            unit = load_shared_uint16(units_at)
            b0, b1, b2, b3 = load_two_columns(int32(y_at + int32(ROW_BYTES) * unit))
            a0, a1, a2, a3 = load_shared4(values_at)
            e0, e1, e2, e3 = load_shared4(int32(values_at + int32(STEP_BYTES)))
            s0, s1, s2, s3 = multiply(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3)
            t0, t1, t2, t3 = multiply(e0, e1, e2, e3, b2, b3, t0, t1, t2, t3)
            values_at = int32(values_at + int32(2 * STEP_BYTES))
            units_at = int32(units_at + int32(2 * UNITS_BYTES))
            left = int32(left - 2)
        if left > 0:
            # The addresses of the upper lanes are not used; one step follows the last one of a block.
            unit = load_shared_uint16(units_at)
            b0, b1 = load_one_column(int32(y_at + int32(ROW_BYTES) * unit))
            a0, a1, a2, a3 = load_shared4(values_at)
            s0, s1, s2, s3 = multiply(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3)
        return s0 + t0, s1 + t1, s2 + t2, s3 + t3

    def layer(
        blocks_at,
        vectors_at,
        drive_at,
        cells_at,
        outputs_at,
        outputs_pitch,
        sent_at,
        after_at,
        units,
        padded,
        columns,
        pitch,
        batch,
        steps,
        drive_step,
        sent_step,
        after_step,
        counts_at,
        status_at,
        clocks_at,
    ):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), in_all_lanes(thread >> int32(5)), threads >> int32(5)
        block = global_int64(blocks_at + 8 * BLOCK_FIELDS * (int64(cuda.blockIdx.x) % blocks))
        first = int64(2 * pairs) * (int64(cuda.blockIdx.x) // blocks)
        shared = shared_base()
        base = int32(shared)
        n, tiles = int32(units), in_all_lanes(block[TILES])
        y_at, y_size = int32(base + int32(block[AT_Y])), int32(ROW_BYTES) * int32(n + 1)
        tiles_at, sums_at = int32(base + int32(block[AT_TILES])), int32(base + int32(block[AT_SUMS]))
        all_values, all_units = int32(base + int32(block[AT_VALUES])), int32(base + int32(block[AT_UNITS]))
        copy_words16(shared + block[AT_VALUES], block[VALUES_OF], int64(STEP_BYTES) * block[STEPS], thread, threads)
        copy_words16(shared + block[AT_UNITS], block[UNITS_OF], int64(UNITS_BYTES) * block[STEPS], thread, threads)
        word, target, source = thread, shared_int32(shared + block[AT_TILES]), global_int32(block[TILES_OF])
        while word < 4 * tiles:
            target[word] = source[word]
            word = int32(word + threads)
        # The outputs of the state before the run.
        unit, outputs, large = int64(thread), global_float32(outputs_at), False
        while unit <= units:
            row = shared_int32(shared + block[AT_Y] + ROW_BYTES * unit)
            odd_row = shared_int32(shared + block[AT_Y] + ROW_BYTES * unit + y_size)
            for pair in range(SAMPLES // 2):
                a = b = ZERO
                sample = first + 2 * pair
                if unit < units and pair < pairs:
                    if sample < batch:
                        a = outputs[sample * outputs_pitch + unit]
                    if sample + 1 < batch:
                        b = outputs[(sample + 1) * outputs_pitch + unit]
                large = large or abs(a) > limit or abs(b) > limit
                row[pair] = pack(a, b)
                odd_row[pair] = int32(0)
            unit += threads
        # This warp's team, and whether this lane copies its outputs to the block of the lane's number.
        team_rows, team_bytes, team_threads, team = load_readonly_words(block[TEAMS_OF] + 16 * int64(warp))
        rank = int32(int64(cuda.blockIdx.x) % blocks)
        copies = lane < blocks - 1 and lane % max(1, team_threads >> 5) == warp % senders
        copied_to = int32(rank + 1 + lane)
        if copied_to >= blocks:
            copied_to = int32(copied_to - blocks)
        arrives = lane == 0 and warp % senders == 0
        # What the other blocks send in a step.
        step_bytes = int32(ROW_BYTES) * int32(n - int32(block[OWN_UNITS]))
        if thread == 0:
            barrier_init(base, int32(1 + block[TEAMS]))
            barrier_init(int32(base + 8), int32(1 + block[TEAMS]))
            barrier_expect_bytes(base, step_bytes)
            barrier_expect_bytes(int32(base + 8), step_bytes)
            barrier_init_done()

        # The cells of this thread. Those beyond the samples or the units are computed, but not stored.
        own, pair = int32(thread // pairs), int32(thread % pairs)
        mine = own < int32(block[OWN_UNITS])
        unit, sample = block[FIRST_UNIT] + own, first + 2 * pair
        has_first, has_second = mine and sample < batch, mine and sample + 1 < batch
        own_unit, sample_0, sample_1 = min(unit, units - 1), min(sample, batch - 1), min(sample + 1, batch - 1)
        vectors, line = global_float32(vectors_at + 4 * own_unit), padded
        bias_u, bias_r, bias_g, bias_rec_g = vectors[0], vectors[line], vectors[2 * line], vectors[3 * line]
        threshold = vectors[4 * line]
        cells = global_float32(cells_at)
        c0, c1 = cells[sample_0 * units + own_unit], cells[sample_1 * units + own_unit]
        own = min(own, int32(block[OWN_UNITS] - 1))
        sums_u = int32(sums_at + int32(sums_row) * int32(own + int32(block[SHIFT_U])) + 8 * pair)
        sums_r = int32(sums_at + int32(sums_row) * int32(own + int32(block[SHIFT_R])) + 8 * pair)
        sums_g = int32(sums_at + int32(sums_row) * int32(own + int32(block[SHIFT_G])) + 8 * pair)
        cluster = int64(cuda.blockIdx.x) // blocks
        gate = 4 * pairs * units
        drive = drive_at + 4 * (pairs * (columns * cluster + own_unit) + pair)
        next_u, next_r, next_g = (
            load_readonly_word(drive),
            load_readonly_word(drive + gate),
            load_readonly_word(drive + 2 * gate),
        )
        sent_0 = sent_at + 4 * (sample_0 * pitch + own_unit)
        after_0 = after_at + 4 * (sample_0 * units + own_unit)
        own_y = int32(block[AT_Y]) + int32(ROW_BYTES) * int32(own_unit) + 4 * pair
        team_at = int32(int32(block[AT_Y]) + team_rows)
        column, group = int32(lane & int32(3)), int32(lane >> int32(2))
        lane_sums = int32(sums_at + int32(sums_row) * group + 8 * column)
        words = hold_words(block[HELD_OF] + int64(warp) * (held * STEP_BYTES) + 16 * int64(lane))
        rows = hold_rows(block[HELD_ROWS_OF] + int64(warp) * (held // 2 * 4 * 32) + 4 * int64(lane))
        wait_for_copies()
        cuda.syncthreads()
        cluster_arrive()
        cluster_wait()
        events, ones = int32(0), int32(0)
        max_polls, steps32, t = int32(MAX_POLLS), int32(steps), int32(0)
        copied, waited, multiplied, met, updated = int64(0), int64(0), int64(0), int64(0), int64(0)
        while t < steps32:
            began = cycles()
            word_u, word_r, word_g = next_u, next_r, next_g
            if int32(t + 1) < steps32:
                drive += drive_step
            next_u = load_readonly_word(drive)
            next_r = load_readonly_word(drive + gate)
            next_g = load_readonly_word(drive + 2 * gate)
            odd = t & int32(1)
            loads_done = cycles()
            if t > 0:
                barrier = int32(base + 8 * odd)
                if not wait_for_phase(barrier, int32(((t - 1) >> 1) & 1), max_polls):
                    global_int32(status_at + 8 * tables.STATUS_FAULT)[0] = 1
                    max_polls = int32(1)
                if thread == 0:
                    barrier_expect_bytes(barrier, step_bytes)
            # All lanes take part in loads of fragments. In the step before, some lanes alone started copies.
            cuda.syncwarp(0xFFFFFFFF)
            row_at = int32(y_at + odd * y_size)
            waits_done = cycles()
            tile = warp
            while tile < tiles:
                slot, begin, length, _ = load_shared4(int32(tiles_at + 16 * tile))
                s0 = s1 = s2 = s3 = ZERO
                if held > 0 and tile < warps:
                    s0, s1, s2, s3 = held_product(words, rows, row_at, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO)
                left = in_all_lanes(length)
                if left > 0:
                    s0, s1, s2, s3 = multiply_tile(
                        int32(all_values + int32(STEP_BYTES) * begin + 16 * lane),
                        int32(all_units + int32(UNITS_BYTES) * begin + 2 * lane),
                        left,
                        row_at,
                        s0,
                        s1,
                        s2,
                        s3,
                    )
                if column < pairs:
                    at = int32(lane_sums + int32(TILE * sums_row) * slot)
                    store_shared_float2(at, s0, s1)
                    store_shared_float2(int32(at + 8 * sums_row), s2, s3)
                tile = int32(tile + warps)
            products_done = cycles()
            cuda.syncthreads()
            meeting_done = cycles()
            y0 = y1 = ZERO
            if mine:
                rec_u0, rec_u1 = load_shared_float2(sums_u)
                rec_r0, rec_r1 = load_shared_float2(sums_r)
                rec_g0, rec_g1 = load_shared_float2(sums_g)
                in_u, in_r, in_g = widen(word_u), widen(word_r), widen(word_g)
                v0 = cell_before_event(in_u, in_r, in_g, rec_u0, rec_r0, rec_g0, bias_u, bias_r, bias_g, bias_rec_g, c0)
                in_u, in_r, in_g = widen(word_u >> int32(16)), widen(word_r >> int32(16)), widen(word_g >> int32(16))
                v1 = cell_before_event(in_u, in_r, in_g, rec_u1, rec_r1, rec_g1, bias_u, bias_r, bias_g, bias_rec_g, c1)
                if has_first and v0 > threshold:
                    y0 = v0
                    v0 = v0 - threshold
                if has_second and v1 > threshold:
                    y1 = v1
                    v1 = v1 - threshold
                shared_int32(shared + own_y + int32(1 - odd) * y_size)[0] = pack(y0, y1)
                c0, c1 = v0, v1
                large = large or abs(y0) > limit or abs(y1) > limit
                events = int32(events + int32(y0 != 0) + int32(y1 != 0))
                ones = int32(ones + int32(y0 == 1) + int32(y1 == 1))
            if int32(t + 1) < steps32 and team_threads > 0:
                fence_copies()
                if senders > 1:
                    warps_barrier(team, team_threads)
                else:
                    cuda.syncwarp(0xFFFFFFFF)
                at, barrier = int32(team_at + int32(1 - odd) * y_size), int32(8 * int32(1 - odd))
                if copies:
                    there = map_to_rank(base, copied_to)
                    copy_to_block(int32(there + at), int32(base + at), team_bytes, int32(there + barrier))
                if arrives:
                    barrier_arrive(int32(base + barrier))
            if mine:
                if has_first:
                    global_float32(sent_0)[0] = y0
                    if after_at != 0:
                        global_float32(after_0)[0] = c0
                if has_second:
                    global_float32(sent_0 + 4 * pitch)[0] = y1
                    if after_at != 0:
                        global_float32(after_0 + 4 * units)[0] = c1
            sent_0 += sent_step
            after_0 += after_step
            if clocked:
                step_done = cycles()
                copied += loads_done - began
                waited += waits_done - loads_done
                multiplied += products_done - waits_done
                met += meeting_done - products_done
                updated += step_done - meeting_done
            t = int32(t + 1)
        if clocked and lane == 0:
            clocks = global_int64(clocks_at)
            at = len(tables.TURN_PHASES) * (int64(cuda.blockIdx.x) * warps + warp)
            clocks[at], clocks[at + 1], clocks[at + 2] = copied, waited, multiplied
            clocks[at + 3], clocks[at + 4] = met, updated
        if has_first:
            cells[sample_0 * units + own_unit] = c0
        if has_second:
            cells[sample_1 * units + own_unit] = c1
        if mine and counts_at != 0:
            add_relaxed(counts_at + 8 * unit, int64(events - ones))
            add_relaxed(counts_at + 8 * (units + unit), int64(ones))
        if large:
            max_relaxed(status_at + 8 * tables.STATUS_LARGE, int64(1))
        cuda.syncthreads()
        cluster_arrive()
        cluster_wait()

    return layer, types.void(*[types.int64] * 20)
