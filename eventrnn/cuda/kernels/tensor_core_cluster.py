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
Warp    : every `warps`-th tile of the block. The first steps of its first tiles are held in registers, the weights of
          all others lie in shared memory.
Thread  : in the cell update, one unit in two or four samples.

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
held         global   (warps, held tiles * held steps, 32, 4) int32, weights as fragments
held rows    global   (warps, held tiles * held steps / 2, 32) int32, what each lane loads: byte offsets in a row of y
teams        global   (warps, 4) int32: of the team of each warp, the byte offset of its outputs in `parts`, their
                      bytes, its threads that have cells, 0 if none has, and the number of its barrier
barriers     shared   (2,) mbarriers, of even and of odd steps; at the same address in all blocks of the cluster
y            shared   (units + 1, SAMPLES) rounded outputs before the step; the last row is zero and serves the padding
                      of tiles
parts        shared   (2, units, 2 * pairs) rounded outputs before even and odd steps, padded to whole 16 bytes, which
                      are laid out in y. With SAMPLES samples y is one of them, and has two parts itself
tiles        shared   (tiles, 4) int32: per tile where its sums are, the first of its steps that lie in shared memory,
                      and their number
values       shared   (steps of the block, 32, 4) int32, weights as fragments
rows         shared   (steps of the block + 1, TILE) uint16, the units of each step
sums         shared   (tiles, TILE, 2 * pairs) float32, recurrent products
============ ======== ==========================================================================================

A block writes its outputs into its own `parts`. Teams of its warps copy them from there into those of the other blocks,
each as soon as it has updated its cells.

Barriers: an mbarrier phase before the outputs of the last step are read, which waits for all teams of the block and for
the bytes of the other blocks; one block barrier between products and cells; cluster barriers at the start and the end,
because no block may write into one that has not started or has ended. All outputs of a step arrive in a block only
after all blocks have read those of the step before it, so two parts are enough. That every block has units is a
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
    global_float32,
    global_int32,
    global_int64,
    map_to_rank,
    max_relaxed,
    shared_base,
    shared_int32,
    wait_for_copies,
    warps_barrier,
)
from eventrnn.cuda.kernels.tensor_core_cells import FLOAT16_MAX
from eventrnn.cuda.kernels.tensor_core_pieces import (
    LAY_OUT,
    LOAD_DRIVE,
    LOAD_SUMS,
    ROW_BYTES,
    SAMPLES,
    STEP_BYTES,
    STORE_PAIRS,
    UNITS_BYTES,
    ZERO,
    cell_before_event,
    load_row,
    make_hold,
    make_tiles,
    store_outputs,
)
from eventrnn.cuda.kernels.tensor_core_ptx import (
    MULTIPLY,
    PACK,
    WIDEN,
    copy_to_block,
    fence_copies,
    load_readonly_words,
)

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
    RECEIVED,  # bytes that the other blocks send per step
    AT_Y,  # offsets in shared memory, the same for all blocks of a cluster
    AT_PARTS,
    AT_TILES,
    AT_VALUES,
    AT_UNITS,
    AT_SUMS,
    BLOCK_FIELDS,  # number of fields
) = range(22)


@device_function
def copy_words16(target_at, source_at, size, thread, threads):
    """Start copying `size` bytes, a multiple of 16, from global to shared memory; all threads of a block take part."""
    at = int64(16) * thread
    while at < size:
        copy_async16(target_at + at, source_at + at)
        at += int64(16) * threads


def tensor_cluster_kernel(
    precision: str,
    blocks: int,
    pairs: int,
    own_pairs: int,
    held: int,
    held_tiles: int,
    senders: int,
    clocked: bool = False,
):
    """The kernel and its signature.

    precision : "float16" or "bfloat16"
    blocks    : blocks per cluster
    pairs     : pairs of samples per cluster, at most SAMPLES // 2
    own_pairs : pairs of samples per thread in the cell update, 1 or 2
    held      : steps of a held tile that are held in registers, an even number; 0 if none is
    held_tiles : tiles of a warp that are held
    senders   : warps of a team
    clocked   : measure the phases of a step (`tables.TURN_PHASES`), which costs time itself

    Arguments named `*_at` are byte addresses of the arrays above and of the status vector, in which an event beyond the
    float16 range sets STATUS_LARGE, and outputs that do not arrive set STATUS_FAULT. `*_step` are the bytes from one
    step to the next. clocks_at : (blocks, warps, `tables.TURN_PHASES`) int64, written if `clocked`
    """
    multiply, pack, widen = MULTIPLY[precision], PACK[precision], WIDEN[precision]
    limit = np.float32(FLOAT16_MAX if precision == "float16" else np.inf)
    sums_row, per_unit, held_steps = 8 * pairs, pairs // own_pairs, held * held_tiles
    hold_words = make_hold(max(1, held_steps), load_readonly_words, STEP_BYTES)
    hold_rows = make_hold(max(1, held_steps // 2), load_row, 4 * 32)
    held_sums, other_sums = make_tiles(max(1, held_tiles), max(2, held), pairs, multiply)
    load_drive, load_sums, store_pairs = LOAD_DRIVE[own_pairs], LOAD_SUMS[own_pairs], STORE_PAIRS[own_pairs]
    cycles = make_cycles(clocked)
    # Whether parts are whole rows of y, which then need not be laid out.
    part_row, whole, lay_out = 4 * pairs, 2 * pairs == SAMPLES, LAY_OUT[pairs]

    @device_function
    def update(word_u, word_r, word_g, u0, u1, r0, r1, g0, g1, bias_u, bias_r, bias_g, bias_rec_g, c0, c1):
        in_u, in_r, in_g = widen(word_u), widen(word_r), widen(word_g)
        v0 = cell_before_event(in_u, in_r, in_g, u0, r0, g0, bias_u, bias_r, bias_g, bias_rec_g, c0)
        in_u, in_r, in_g = widen(word_u >> int32(16)), widen(word_r >> int32(16)), widen(word_g >> int32(16))
        return v0, cell_before_event(in_u, in_r, in_g, u1, r1, g1, bias_u, bias_r, bias_g, bias_rec_g, c1)

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
        y_at, parts_at = int32(base + int32(block[AT_Y])), int32(block[AT_PARTS])
        part_size = int32(ROW_BYTES) * int32(n + 1) if whole else int32((part_row * n + 15) // 16 * 16)
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
            odd_row = shared_int32(shared + block[AT_Y] + ROW_BYTES * unit + part_size)
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
                if whole:
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
        step_bytes = int32(block[RECEIVED])
        if thread == 0:
            barrier_init(base, int32(1 + block[TEAMS]))
            barrier_init(int32(base + 8), int32(1 + block[TEAMS]))
            barrier_expect_bytes(base, step_bytes)
            barrier_expect_bytes(int32(base + 8), step_bytes)
            barrier_init_done()

        # The cells of this thread: of one unit in 2 * own_pairs samples. Those beyond the samples or the units are
        # computed, but not stored.
        own, pair = int32(thread // per_unit), int32(own_pairs * (thread % per_unit))
        mine = own < int32(block[OWN_UNITS])
        unit, sample = block[FIRST_UNIT] + own, first + 2 * pair
        has_0, has_1, has_2, has_3 = (
            mine and sample < batch,
            mine and sample + 1 < batch,
            mine and own_pairs > 1 and sample + 2 < batch,
            mine and own_pairs > 1 and sample + 3 < batch,
        )
        own_unit = min(unit, units - 1)
        vectors, line = global_float32(vectors_at + 4 * own_unit), padded
        bias_u, bias_r, bias_g, bias_rec_g = vectors[0], vectors[line], vectors[2 * line], vectors[3 * line]
        threshold, cells = vectors[4 * line], global_float32(cells_at + 4 * (sample * units + own_unit))
        c0 = c1 = c2 = c3 = ZERO
        if has_0:
            c0 = cells[0]
        if has_1:
            c1 = cells[units]
        if has_2:
            c2 = cells[2 * units]
        if has_3:
            c3 = cells[3 * units]
        own = min(own, int32(block[OWN_UNITS] - 1))
        sums_u = int32(sums_at + int32(sums_row) * int32(own + int32(block[SHIFT_U])) + 8 * pair)
        sums_r = int32(sums_at + int32(sums_row) * int32(own + int32(block[SHIFT_R])) + 8 * pair)
        sums_g = int32(sums_at + int32(sums_row) * int32(own + int32(block[SHIFT_G])) + 8 * pair)
        cluster, gate = int64(cuda.blockIdx.x) // blocks, 4 * pairs * units
        drive = drive_at + 4 * (pairs * (columns * cluster + own_unit) + pair)
        next_u, next_v = load_drive(drive)
        next_r, next_s = load_drive(drive + gate)
        next_g, next_h = load_drive(drive + 2 * gate)
        sent = sent_at + 4 * (sample * pitch + own_unit)
        after = after_at + 4 * (sample * units + own_unit)
        own_part = int32(base + parts_at + int32(part_row) * int32(own_unit) + 4 * pair)
        team_at = int32(parts_at + team_rows)
        column, group = int32(lane & int32(3)), int32(lane >> int32(2))
        lane_sums = int32(sums_at + int32(sums_row) * group + 8 * column)
        lane_values, lane_units = int32(all_values + 16 * lane), int32(all_units + 2 * lane)
        words = hold_words(block[HELD_OF] + int64(warp) * (held_steps * STEP_BYTES) + 16 * int64(lane))
        rows = hold_rows(block[HELD_ROWS_OF] + int64(warp) * (held_steps // 2 * 4 * 32) + 4 * int64(lane))
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
            word_v, word_s, word_h = next_v, next_s, next_h
            if int32(t + 1) < steps32:
                drive += drive_step
            next_u, next_v = load_drive(drive)
            next_r, next_s = load_drive(drive + gate)
            next_g, next_h = load_drive(drive + 2 * gate)
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
            row_at = int32(y_at + odd * part_size) if whole else y_at
            if not whole and t > 0:
                part, laid = int32(base + parts_at + odd * part_size), thread
                while laid < n:
                    lay_out(int32(part + int32(part_row) * laid), int32(row_at + int32(ROW_BYTES) * laid))
                    laid = int32(laid + threads)
                cuda.syncthreads()
            waits_done = cycles()
            tables_at = tiles_at, lane_values, lane_units, row_at, lane_sums, column < pairs
            tile = warp
            if held_steps > 0:
                held_sums(words, rows, tile, tiles, warps, *tables_at)
                tile = int32(tile + held_tiles * warps)
            other_sums(tile, tiles, warps, *tables_at)
            products_done = cycles()
            cuda.syncthreads()
            meeting_done = cycles()
            y0 = y1 = y2 = y3 = ZERO
            if mine:
                u0, u1, u2, u3 = load_sums(sums_u)
                r0, r1, r2, r3 = load_sums(sums_r)
                g0, g1, g2, g3 = load_sums(sums_g)
                biases = bias_u, bias_r, bias_g, bias_rec_g
                c0, c1 = update(word_u, word_r, word_g, u0, u1, r0, r1, g0, g1, *biases, c0, c1)
                if own_pairs > 1:
                    c2, c3 = update(word_v, word_s, word_h, u2, u3, r2, r3, g2, g3, *biases, c2, c3)
                if has_0 and c0 > threshold:
                    y0, c0 = c0, c0 - threshold
                if has_1 and c1 > threshold:
                    y1, c1 = c1, c1 - threshold
                if has_2 and c2 > threshold:
                    y2, c2 = c2, c2 - threshold
                if has_3 and c3 > threshold:
                    y3, c3 = c3, c3 - threshold
                store_pairs(int32(own_part + int32(1 - odd) * part_size), pack(y0, y1), pack(y2, y3))
                large = large or max(abs(y0), abs(y1), abs(y2), abs(y3)) > limit
                events = int32(events + int32(y0 != 0) + int32(y1 != 0) + int32(y2 != 0) + int32(y3 != 0))
                ones = int32(ones + int32(y0 == 1) + int32(y1 == 1) + int32(y2 == 1) + int32(y3 == 1))
            if int32(t + 1) < steps32 and team_threads > 0:
                fence_copies()
                if senders > 1:
                    warps_barrier(team, team_threads)
                else:
                    cuda.syncwarp(0xFFFFFFFF)
                at, barrier = int32(team_at + int32(1 - odd) * part_size), int32(8 * int32(1 - odd))
                if copies:
                    there = map_to_rank(base, copied_to)
                    copy_to_block(int32(there + at), int32(base + at), team_bytes, int32(there + barrier))
                if arrives:
                    barrier_arrive(int32(base + barrier))
            store_outputs(has_0, sent, y0, after_at != 0, after, c0)
            store_outputs(has_1, sent + 4 * pitch, y1, after_at != 0, after + 4 * units, c1)
            store_outputs(has_2, sent + 8 * pitch, y2, after_at != 0, after + 8 * units, c2)
            store_outputs(has_3, sent + 12 * pitch, y3, after_at != 0, after + 12 * units, c3)
            sent += sent_step
            after += after_step
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
        if has_0:
            cells[0] = c0
        if has_1:
            cells[units] = c1
        if has_2:
            cells[2 * units] = c2
        if has_3:
            cells[3 * units] = c3
        if mine and counts_at != 0:
            add_relaxed(counts_at + 8 * unit, int64(events - ones))
            add_relaxed(counts_at + 8 * (units + unit), int64(ones))
        if large:
            max_relaxed(status_at + 8 * tables.STATUS_LARGE, int64(1))
        cuda.syncthreads()
        cluster_arrive()
        cluster_wait()

    return layer, types.void(*[types.int64] * 20)
