"""The cluster plan: one layer of a stream lives in one thread-block cluster; for sparse weights, released variant.

Blocks of a cluster exchange outputs through distributed shared memory: a warp that has updated a tile writes its 32
outputs into the shared memory of every block of the cluster, and transaction barriers there count the arriving bytes.
There are no lists of events: a warp gathers the outputs of the units that reach its strip (`gather_product.py`).

Cluster : has one role for one layer and some samples. RECURRENT: recurrent drives, cells, events. INPUT (all
          layers but the first): the layer's input drives, which depend on the layer below only. An input cluster runs
          ahead and writes the drives to global memory, in words that are UNWRITTEN before the launch.
Block   : owns `tiles` neighbouring tiles of 32 units (one row of the block table). It computes the strips that contain
          gate rows of these units. Strips are 32 neighbouring columns of the (3 * units) gate rows, so that they
          coincide with blocks of weights, and two blocks may both compute a strip that both need.
Warp    : for one sample after the other, every `warps`-th strip of the block, then every `warps`-th tile. Where there
          is one sample and a warp per strip, the turns are those of `cluster_stream.py`.
Thread  : one column of a strip; one unit of a tile.

Each step equals `reference.step` with variant "evnn": the drives equal `reference.propagate`, terms in ascending
presynaptic order with one FMA per term.

============ ======== ==========================================================================================
array        memory   shape, dtype, contents
============ ======== ==========================================================================================
event log    global   (steps + 1, batch, pitch) float32, as in `persistent.py`; written for the layers above and the
                      host, read by input clusters
input drives global   (steps * batch, 3 * units) float32
cells        global   (batch, units) float32, read at the start and written at the end; states as in `persistent.py`
y            shared   (samples, 2, row + 4) float32, all outputs of the layer after even and odd steps; the 16 bytes
                      after a row are zero and serve the padding of the tables
barriers     shared   (samples, 2) mbarriers, one per row of y; at the same address in all blocks of the cluster
strips       shared   (8,) int32: number of strips, then per gate its first strip and the shift from a unit to its
                      column; then per strip 4 int32: address of its units and chunks (for the turns of
                      `cluster_stream.py` its first entry and the number of its units), row of its weights, first column
units        shared   (strips, capacity) int32, byte offsets of units in a row of y, padded to whole chunks; in
                      registers for the turns of `cluster_stream.py`
rows         shared   (entries, 32) float32 or uint16 weights; in global memory (L2) if they do not fit
bias         shared   (strips, 32) float32
drives       shared   (strips, 2, 32) float32, input drives of this turn and of the next one; in registers for the turns
                      of `cluster_stream.py`
gates        shared   (2, 2, strips + 1, 32) float32: gates u and r and the recurrent drive of the candidate, then the
                      input drive of the candidate; each for even and odd turns
c, threshold shared   (samples, tiles, 32) and (tiles, 32) float32
hits         shared   per warp, scratch of `gather_product.py`
============ ======== ==========================================================================================

Barriers: an mbarrier phase before the outputs of the last step are read, one block barrier between strips and tiles,
cluster barriers at the start and the end, because no block may write into one that has not started or has ended.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.cluster_stream import make_stream_turns
from eventrnn.cuda.kernels.gather_product import make_gather_product
from eventrnn.cuda.kernels.persistent import MAX_POLLS, UNWRITTEN, copy_to_shared
from eventrnn.cuda.kernels.ptx import (
    barrier_expect_bytes,
    barrier_init,
    barrier_init_done,
    barrier_try_wait,
    clock,
    cluster_arrive,
    cluster_wait,
    copy_async,
    egru_reset_gate,
    egru_value_of_gates,
    global_float32,
    global_int32,
    global_int64,
    load_relaxed,
    load_shared,
    load_shared4,
    load_shared_float,
    map_to_rank,
    shared_base,
    shared_int32,
    store_async,
    store_float,
    store_relaxed,
    store_shared2,
    store_shared_float,
    wait_for_copies,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP
from eventrnn.cuda.tables import LANES, NARROW, RESIDENT

# Bytes of one float32 per lane.
TILE_BYTES = 4 * LANES


@device_function
def wait_for_phase(barrier, parity, max_polls):
    """Wait until the barrier's phase of that parity is complete; False if it was not within `max_polls` polls."""
    polls = int32(0)
    while barrier_try_wait(barrier, parity) == 0:
        polls = int32(polls + 1)
        if polls >= max_polls:
            return False
    return True


@device_function
def in_all_lanes(value):
    """The int32 of the first lane: the compiler then knows that branches on it are the same for the whole warp."""
    return cuda.shfl_sync(FULL_WARP, int32(value), int32(0))


@device_function
def poll_drive(drive, address, max_polls):
    """An input drive, and whether it was written in time.

    drive   : its word as it was loaded ahead of time; if it was UNWRITTEN, the word at `address` is polled
    """
    word, polls = libdevice.float_as_int(drive), int32(0)
    while word == UNWRITTEN and polls < max_polls:
        word = load_relaxed(address)
        polls = int32(polls + 1)
    return libdevice.int_as_float(word), word != UNWRITTEN


def make_cycles(clocked: bool):
    """The device function cycles(): the cycle counter of the multiprocessor, or 0 unless `clocked`."""

    @device_function
    def cycles():
        now = int64(0)
        if clocked:
            now = clock()
        return now

    return cycles


def cluster_kernel(
    layout: int,
    layout_in: int,
    blocks: int,
    units_per_lane: int,
    units_per_lane_in: int,
    single: bool = False,
    clocked: bool = False,
):
    """The kernel of the cluster plan and its signature.

    layout, layout_in  : layout codes of recurrent and input matrices
    blocks             : blocks per cluster (`cluster_plan.CLUSTER_SIZES`)
    units_per_lane     : units that a lane gathers together in recurrent strips
    units_per_lane_in  : the same for input strips, 0 if the launch has no input clusters
    single             : recurrent clusters have one sample, and a warp at most one strip, of one chunk
                         (`plan.Plan.single_strips`): their turns are those of `cluster_stream.py`
    clocked            : measure the phases of a turn (`tables.TURN_PHASES`), which costs time itself
    """
    has_input_clusters, narrow = units_per_lane_in > 0, layout & NARROW
    row_bytes, resident, resident_in = LANES * (2 if narrow else 4), bool(layout & RESIDENT), bool(layout_in & RESIDENT)
    first_offsets, gather_product = make_gather_product(layout, units_per_lane, event_log=False)
    first_offsets_in, gather_product_in = make_gather_product(layout_in, max(1, units_per_lane_in), event_log=True)

    @device_function
    def broadcast_tile(base, offset, barrier, lane, y):
        """Write the tile's outputs `y`, one per lane, to all blocks of the cluster and count the bytes there.

        base : address of shared memory; offset, barrier : offsets in it
        """
        # The blocks one after the other, and all in the same order: other orders and four words per lane take longer.
        word, offset = libdevice.float_as_int(y), int32(offset + 4 * lane)
        for rank in range(blocks):
            block = map_to_rank(base, int32(rank))
            store_async(int32(block + offset), word, int32(block + barrier))

    cycles = make_cycles(clocked)
    functions = wait_for_phase, poll_drive, broadcast_tile, cycles
    stream_turns = make_stream_turns(layout, units_per_lane, has_input_clusters, functions)

    @device_function
    def load_strips(layer, block, n, first_unit, last_unit, shared, in_shared, listed, chunk, beyond, thread, threads):
        """Fill `strips`, `units`, `bias` and, if `in_shared`, `rows` of this block, one gate after the other.

        listed : whether `units` is filled; otherwise an entry of `strips` begins with the strip's first entry in
                 `packing.CompactStrips` and the number of its units
        chunk  : units of a chunk, to a multiple of which the units of a strip are padded
        beyond : byte offset of the padding: of the zero after a row of y, or -1 for a row of an event log
        """
        begins, strips = global_int64(layer[tables.BEGINS_OF]), shared_int32(shared + block[tables.AT_STRIPS])
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        capacity = int32(block[tables.CAPACITY])
        table, source = shared_int32(shared + block[tables.AT_UNITS]), global_int32(layer[tables.UNITS_OF])
        base, slot, at, gate = int32(shared + block[tables.AT_UNITS]), int32(0), int64(0), int32(0)
        while gate < 3:
            begin = int32((gate * n + first_unit) >> 5)
            count = int32(((gate * n + last_unit + 31) >> 5) - begin)
            if thread == 0:
                strips[1 + 2 * gate] = slot
                strips[2 + 2 * gate] = int32(32 * slot + gate * n + first_unit - 32 * begin)
            row = begins[begin]
            size = begins[begin + count] - row
            copy_to_shared(
                shared + block[tables.AT_BIAS] + int64(TILE_BYTES) * slot,
                layer[tables.ROWS_BIAS] + int64(TILE_BYTES) * begin,
                int64(TILE_BYTES) * count,
                thread,
                threads,
            )
            if in_shared:
                copy_to_shared(
                    shared + block[tables.AT_ROWS] + row_bytes * at,
                    layer[tables.ROWS_OF] + row_bytes * row,
                    row_bytes * size,
                    thread,
                    threads,
                )
            # One warp per strip, because these are many short and independent copies.
            strip = warp
            while strip < count:
                own = begins[begin + strip]
                reached = int32(begins[begin + strip + 1] - own)
                units = int32(capacity * (slot + strip))
                if lane == 0:
                    entry = int32(8 + 4 * (slot + strip))
                    strips[entry], strips[entry + 1] = int32(own), reached
                    if listed:
                        strips[entry], strips[entry + 1] = (
                            int32(base + 4 * units),
                            int32((reached + chunk - 1) // chunk),
                        )
                    strips[entry + 2] = int32(own)
                    if in_shared:
                        strips[entry + 2] = int32(at + own - row)
                    strips[entry + 3] = int32(32 * (begin + strip))
                unit = lane
                while listed and unit < capacity:
                    offset = int32(beyond)
                    if unit < reached:
                        offset = source[own + unit]
                    table[units + unit] = offset
                    unit = int32(unit + LANES)
                strip = int32(strip + warps)
            at += size
            slot = int32(slot + count)
            gate = int32(gate + 1)
        if thread == 0:
            strips[0] = slot

    def layers(table_at, blocks_at, faults_at, steps, batch):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        block = global_int64(blocks_at + int64(8 * tables.BLOCK_FIELDS) * cuda.blockIdx.x)
        layer = global_int64(table_at + int64(8 * tables.LAYER_FIELDS) * block[tables.LAYER])
        shared = shared_base()
        base, n = int32(shared), int32(layer[tables.UNITS])
        tile, tiles = int32(block[tables.TILE]), int32(block[tables.TILES])
        first, samples = block[tables.SAMPLE], int32(block[tables.SAMPLES])
        first_unit = int32(LANES * tile)
        last_unit = min(n, int32(first_unit + LANES * tiles))
        # The padding of the tables of units refers to the zero after a row of outputs.
        row_size = int32(block[tables.ALL_TILES]) * int32(TILE_BYTES)
        y_size = int32(row_size + 16)
        event_log, input_log, states = layer[tables.EVENT_LOG], layer[tables.INPUT_LOG], layer[tables.STATES]
        log_row_bytes, input_row_bytes, drive_bytes = (
            4 * layer[tables.PITCH],
            4 * layer[tables.INPUT_PITCH],
            12 * int64(n),
        )
        at_y, at_barriers = int32(block[tables.AT_Y]), int32(block[tables.AT_BARRIERS])
        strips_at = int32(base + int32(block[tables.AT_STRIPS]) + 32)
        bias_at = int32(base + int32(block[tables.AT_BIAS]) + 4 * lane)
        steps32, max_polls = int32(steps), int32(MAX_POLLS)
        samples, tiles = in_all_lanes(samples), in_all_lanes(tiles)
        in_shared, chunk, beyond, listed = resident, int32(LANES * units_per_lane), row_size, not single
        if has_input_clusters and input_log != 0:
            in_shared, chunk, beyond, listed = resident_in, int32(LANES * units_per_lane_in), int32(-1), True
        hits_at = int32(base + int32(block[tables.AT_HITS]) + tables.HIT_BYTES * (chunk + tables.LIST_PAD) * warp)
        load_strips(layer, block, n, first_unit, last_unit, shared, in_shared, listed, chunk, beyond, thread, threads)
        if input_log == 0:
            copy_to_shared(
                shared + block[tables.AT_THRESHOLD],
                layer[tables.THRESHOLD] + 4 * first_unit,
                int64(TILE_BYTES) * tiles,
                thread,
                threads,
            )
            # The outputs of the state before the run.
            sample = int32(0)
            while sample < samples:
                word = thread
                while word < y_size >> 2:
                    value = np.float32(0)
                    if word < n:
                        value = global_float32(event_log + (first + sample) * log_row_bytes)[word]
                    store_shared_float(int32(base + at_y + 2 * sample * y_size + 4 * word), value)
                    store_shared_float(int32(base + at_y + (2 * sample + 1) * y_size + 4 * word), np.float32(0))
                    word = int32(word + threads)
                sample = int32(sample + 1)
            if thread == 0:
                sample = int32(0)
                while sample < 2 * samples:
                    barrier_init(int32(base + at_barriers + 8 * sample), int32(1))
                    barrier_expect_bytes(int32(base + at_barriers + 8 * sample), row_size)
                    sample = int32(sample + 1)
                barrier_init_done()
        # The hits are not in use yet.
        store_shared2(int32(hits_at + tables.HIT_BYTES * lane), thread, int32(0))
        cuda.syncthreads()
        cluster_arrive()
        cluster_wait()

        # These values are loaded, so that the compiler does not recompute them in every turn.
        thread = load_shared(int32(hits_at + tables.HIT_BYTES * lane))
        lane, warp = thread & int32(31), in_all_lanes(thread >> int32(5))
        strips, _, _, strip_r = load_shared4(int32(strips_at - 32))
        shift_r, strip_g, shift_g, _ = load_shared4(int32(strips_at - 16))
        strips, strip_g = in_all_lanes(strips), in_all_lanes(strip_g)
        lanes_below = int32((int32(1) << lane) - 1)
        columns = int32(3 * n)
        size = int32(row_bytes // LANES)
        rows_from = layer[tables.ROWS_OF] + size * lane
        if in_shared:
            rows_from = shared + block[tables.AT_ROWS] + size * lane
        drive_from = layer[tables.DRIVE] + first * drive_bytes
        if has_input_clusters and input_log != 0:
            input_log += first * input_row_bytes
            t, sample, slot = int64(0), int32(0), warp
            while True:
                while slot >= strips:
                    slot = int32(slot - strips)
                    sample = int32(sample + 1)
                    if sample == samples:
                        sample = int32(0)
                        t += 1
                if t >= steps:
                    break
                units_at, chunks, row, column = load_shared4(int32(strips_at + 16 * slot))
                o0, o1, o2, o3, o4, o5, o6 = first_offsets_in(units_at, lane)
                acc, complete = gather_product_in(
                    load_shared_float(int32(bias_at + TILE_BYTES * slot)),
                    input_log + (t * batch + sample) * input_row_bytes,
                    units_at,
                    o0,
                    o1,
                    o2,
                    o3,
                    o4,
                    o5,
                    o6,
                    rows_from + int64(row_bytes) * row,
                    chunks,
                    hits_at,
                    lane,
                    lanes_below,
                    max_polls,
                )
                if not complete:
                    global_int32(faults_at)[0] = 1
                    max_polls = int32(1)
                # A strip may contain columns of other units or of the next gate; only own_tile columns are written.
                first_column = int32(first_unit + n * (int32(slot >= strip_r) + int32(slot >= strip_g)))
                column = int32(column + lane)
                if column >= first_column and column - first_column < last_unit - first_unit:
                    store_relaxed(drive_from + (t * batch + sample) * drive_bytes + int64(4) * column, acc)
                slot = int32(slot + warps)
        elif single:
            stream_turns(layer, block, base, rows_from, first, steps32, batch, faults_at, thread)
        else:
            gates_size = int32(TILE_BYTES * (strips + 1))
            gates_at = int32(base + int32(block[tables.AT_SUMS_REC]) + 4 * lane)
            drives_at = int32(base + int32(block[tables.AT_SUMS_IN]) + 4 * lane)
            cells_at = int32(base + int32(block[tables.AT_CELLS]) + 4 * lane)
            thresholds_at = int32(base + int32(block[tables.AT_THRESHOLD]) + 4 * lane)
            carried = global_float32(layer[tables.CELLS])
            # Where the rows of this turn begin in the event log and in the array of the cells after each step.
            sent_at, after_at = event_log + (batch + first) * log_row_bytes, states + first * (drive_bytes // 3)
            sample = int32(0)
            while sample < samples:
                own_tile = warp
                while own_tile < tiles:
                    unit, value = int32(first_unit + LANES * own_tile + lane), np.float32(0)
                    if unit < n:
                        value = carried[(first + sample) * n + unit]
                    store_shared_float(int32(cells_at + TILE_BYTES * (sample * tiles + own_tile)), value)
                    own_tile = int32(own_tile + warps)
                sample = int32(sample + 1)
            units_at, chunks, row, column = load_shared4(int32(strips_at + 16 * warp))
            if warp >= strips:
                units_at = int32(base + int32(block[tables.AT_UNITS]))
            o0, o1, o2, o3, o4, o5, o6 = first_offsets(units_at, lane)
            waited, copied, multiplied, met, updated = int64(0), int64(0), int64(0), int64(0), int64(0)
            # The drives of a turn (one step of one sample) are copied to shared memory one turn ahead.
            slot = warp
            while slot < strips:
                own_column = min(int32(load_shared4(int32(strips_at + 16 * slot))[3] + lane), int32(columns - 1))
                copy_async(int64(drives_at + 2 * TILE_BYTES * slot), drive_from + int64(4) * own_column)
                slot = int32(slot + warps)
            t, odd = int32(0), int32(0)
            while t < steps32:
                parity, next_parity = int32(t & 1), int32((t + 1) & 1)
                last_step = int32(t + 1) == steps32
                sample = int32(0)
                while sample < samples:
                    began = cycles()
                    wait_for_copies()
                    drives = drive_from + (int64(t) * batch + sample) * drive_bytes
                    next_t, next_sample = t, int32(sample + 1)
                    if next_sample == samples:
                        next_t, next_sample = min(int32(t + 1), int32(steps32 - 1)), int32(0)
                    next_drives = drive_from + (int64(next_t) * batch + next_sample) * drive_bytes
                    slot = warp
                    while slot < strips:
                        own_column = min(
                            int32(load_shared4(int32(strips_at + 16 * slot))[3] + lane), int32(columns - 1)
                        )
                        copy_async(
                            int64(drives_at + TILE_BYTES * (2 * slot + 1 - odd)), next_drives + int64(4) * own_column
                        )
                        slot = int32(slot + warps)
                    rows = int32(2 * sample)
                    copies_done = cycles()
                    if t > 0:
                        barrier = int32(base + at_barriers + 8 * (rows + parity))
                        if not wait_for_phase(barrier, int32(((t - 1) >> 1) & 1), max_polls):
                            global_int32(faults_at)[0] = 1
                            max_polls = int32(1)
                        cuda.syncwarp(FULL_WARP)
                        if thread == 0:
                            barrier_expect_bytes(barrier, row_size)
                    waits_done = cycles()
                    row_at = int32(base + at_y + (rows + parity) * y_size)
                    gates = int32(gates_at + odd * gates_size)
                    candidates = int32(gates + 2 * gates_size)
                    slot = warp
                    while slot < strips:
                        drive = load_shared_float(int32(drives_at + TILE_BYTES * (2 * slot + odd)))
                        if has_input_clusters:
                            drive, complete = poll_drive(
                                drive, drives + int64(4) * min(int32(column + lane), int32(columns - 1)), max_polls
                            )
                            if not complete:
                                global_int32(faults_at)[0] = 1
                                max_polls = int32(1)
                            cuda.syncwarp(FULL_WARP)
                        acc, _ = gather_product(
                            load_shared_float(int32(bias_at + TILE_BYTES * slot)),
                            row_at,
                            units_at,
                            o0,
                            o1,
                            o2,
                            o3,
                            o4,
                            o5,
                            o6,
                            rows_from + int64(row_bytes) * row,
                            chunks,
                            hits_at,
                            lane,
                            lanes_below,
                            max_polls,
                        )
                        if slot < strip_g:
                            store_shared_float(int32(gates + TILE_BYTES * slot), egru_reset_gate(drive, acc))
                        else:
                            store_shared_float(int32(gates + TILE_BYTES * slot), acc)
                            store_shared_float(int32(candidates + TILE_BYTES * slot), drive)
                        slot = int32(slot + warps)
                        if warps < strips:
                            following = slot
                            if slot >= strips:
                                following = warp
                            units_at, chunks, row, column = load_shared4(int32(strips_at + 16 * following))
                            o0, o1, o2, o3, o4, o5, o6 = first_offsets(units_at, lane)
                    products_done = cycles()
                    cuda.syncthreads()
                    meeting_done = cycles()
                    own_tile = warp
                    while own_tile < tiles:
                        unit = int32(first_unit + LANES * own_tile + lane)
                        cell = int32(cells_at + TILE_BYTES * (sample * tiles + own_tile))
                        at, zero = int32(gates + TILE_BYTES * own_tile), np.float32(0)
                        v, _, _, _ = egru_value_of_gates(
                            load_shared_float(at),
                            load_shared_float(int32(at + 4 * shift_r)),
                            load_shared_float(int32(candidates + TILE_BYTES * own_tile + 4 * shift_g)),
                            zero,
                            zero,
                            load_shared_float(int32(at + 4 * shift_g)),
                            load_shared_float(cell),
                        )
                        y, c, mine = zero, v, unit < n
                        if mine and v > load_shared_float(int32(thresholds_at + TILE_BYTES * own_tile)):
                            y, c = v, v - load_shared_float(int32(thresholds_at + TILE_BYTES * own_tile))
                        if not last_step:
                            tile_at = int32(at_y + (rows + next_parity) * y_size + TILE_BYTES * (tile + own_tile))
                            broadcast_tile(base, tile_at, int32(at_barriers + 8 * (rows + next_parity)), lane, y)
                        store_shared_float(cell, c)
                        if mine:
                            store_relaxed(sent_at + int64(4) * unit, y)
                            if states != 0:
                                store_float(after_at + int64(4) * unit, c)
                            if last_step:
                                carried[(first + sample) * n + unit] = c
                        own_tile = int32(own_tile + warps)
                    sent_at += log_row_bytes
                    after_at += drive_bytes // 3
                    if clocked:
                        turn_done = cycles()
                        copied += copies_done - began
                        waited += waits_done - copies_done
                        multiplied += products_done - waits_done
                        met += meeting_done - products_done
                        updated += turn_done - meeting_done
                    odd = int32(1 - odd)
                    sample = int32(sample + 1)
                sent_at += (batch - samples) * log_row_bytes
                after_at += (batch - samples) * (drive_bytes // 3)
                t = int32(t + 1)
            if clocked:
                clocks = global_int64(layer[tables.CLOCKS])
                at = len(tables.TURN_PHASES) * (int64(cuda.blockIdx.x) * warps + warp)
                if lane == 0:
                    clocks[at], clocks[at + 1], clocks[at + 2] = copied, waited, multiplied
                    clocks[at + 3], clocks[at + 4] = met, updated
        cuda.syncthreads()
        cluster_arrive()
        cluster_wait()

    return layers, types.void(*[types.int64] * 5)
