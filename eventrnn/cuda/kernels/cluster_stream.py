"""The turns of a recurrent cluster of one sample whose warps have one strip each: the shortest way through a step.

A step of one stream is a chain of latencies: outputs travel, a warp gathers those that reach its strip, adds their
weights, evaluates a gate, and a warp per tile updates the cells. So nothing here is a loop or a branch that need not be
one, and what does not change stays in registers: units of the strip, bias, cells and thresholds. What a step needs from
global memory is loaded a step ahead, and the barrier of the step before made ready while the outputs of the step before
travel.

Arrays, barriers and arithmetic are those of `cluster.py`, which this is a part of. Every warp computes a strip; those
of a block with fewer strips than warps compute its last strip again, and write it where nothing is read.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.gather_product import (
    load_output,
    make_hit_product,
    make_list_hits,
    make_load_units,
    make_unrolled,
    row_bytes_of,
)
from eventrnn.cuda.kernels.persistent import MAX_POLLS
from eventrnn.cuda.kernels.ptx import (
    barrier_expect_bytes,
    egru_reset_gate,
    egru_value_of_gates,
    global_float32,
    global_int32,
    global_int64,
    load_relaxed,
    load_shared4,
    load_shared_float,
    store_float,
    store_relaxed,
    store_shared_float,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP
from eventrnn.cuda.tables import LANES

# Bytes of one float32 per lane.
TILE_BYTES = 4 * LANES


def make_stream_turns(layout: int, units_per_lane: int, has_input_clusters: bool, functions):
    """The device function stream_turns(layer, block, base, values_from, first, steps, batch, faults_at, thread).

    base        : address of shared memory
    values_from : where the block's rows of weights begin, plus the lane's offset in a row
    first       : the first sample
    thread      : the number of this thread, from where the compiler does not read it again in every turn
    functions   : the device functions wait_for_phase, poll_drive, broadcast_tile and cycles of `cluster.py`
    """
    wait_for_phase, poll_drive, broadcast_tile, cycles = functions
    row_bytes, hit_product = row_bytes_of(layout), make_hit_product(layout, reached=True, deep=True)
    load_units, list_hits = make_load_units(units_per_lane), make_list_hits(layout, units_per_lane)
    load_outputs = make_unrolled(load_output, units_per_lane, np.float32(0))

    @device_function
    def stream_turns(layer, block, base, values_from, first, steps, batch, faults_at, thread):
        # A warp's number is a shuffle's result, so that the compiler knows that it is the same in all lanes.
        lane, warp = thread & int32(31), cuda.shfl_sync(FULL_WARP, int32(thread >> int32(5)), int32(0))
        lanes_below = int32((int32(1) << lane) - 1)
        n, tiles, tile = int32(layer[tables.UNITS]), int32(block[tables.TILES]), int32(block[tables.TILE])
        row_size = int32(block[tables.ALL_TILES]) * int32(TILE_BYTES)
        max_polls = int32(MAX_POLLS)
        # The strip of this warp.
        strips_at = int32(base + int32(block[tables.AT_STRIPS]) + 32)
        strips, _, _, _ = load_shared4(int32(strips_at - 32))
        shift_r, strip_g, shift_g, _ = load_shared4(int32(strips_at - 16))
        slot = min(warp, int32(strips - 1))
        own, reached, row, column = load_shared4(int32(strips_at + 16 * slot))
        o0, o1, o2, o3, o4, o5, o6 = load_units(
            layer[tables.UNITS_OF] + int64(4) * own, int32(units_per_lane * lane), reached, row_size
        )
        values_at = values_from + int64(row_bytes) * row
        bias = load_shared_float(int32(base + int32(block[tables.AT_BIAS]) + 4 * lane + TILE_BYTES * slot))
        hits_at = int32(
            base + int32(block[tables.AT_HITS]) + tables.HIT_BYTES * (LANES * units_per_lane + tables.LIST_PAD) * warp
        )
        is_gate = slot < strip_g
        drive_bytes, log_row_bytes = 12 * int64(n), 4 * layer[tables.PITCH]
        drive_at = layer[tables.DRIVE] + first * drive_bytes + int64(4) * min(int32(column + lane), int32(3 * n - 1))
        drive_step = batch * drive_bytes
        # The tile of this warp; warps without one never fire and send nothing.
        unit = int32(LANES * (tile + warp) + lane)
        has_tile = warp < tiles
        mine = has_tile and unit < n
        own_unit = min(unit, int32(n - 1))
        carried = global_float32(layer[tables.CELLS])
        place = first * n + own_unit
        c, threshold = carried[place], np.float32(np.inf)
        if mine:
            threshold = load_shared_float(
                int32(base + int32(block[tables.AT_THRESHOLD]) + TILE_BYTES * warp + 4 * lane)
            )
        states = layer[tables.STATES]
        sent_at = layer[tables.EVENT_LOG] + (batch + first) * log_row_bytes + int64(4) * own_unit
        after_at = states + first * (drive_bytes // 3) + int64(4) * own_unit
        # What alternates between even and odd turns; the sums turn one into the other.
        y_size, y_at = int32(row_size + 16), int32(base + int32(block[tables.AT_Y]))
        row_at, rows_sum = y_at, int32(2 * y_at + y_size)
        barrier = int32(base + int32(block[tables.AT_BARRIERS]))
        barriers_sum = int32(2 * barrier + 8)
        gates_size = int32(TILE_BYTES * (strips + 1))
        gates = int32(base + int32(block[tables.AT_SUMS_REC]) + 4 * lane)
        gates_sum = int32(2 * gates + gates_size)
        own_gate, own_tile = int32(TILE_BYTES * min(warp, strips)), int32(TILE_BYTES * warp)
        tile_at = int32(TILE_BYTES * (tile + warp) - base)
        copied, waited, multiplied, met, updated = int64(0), int64(0), int64(0), int64(0), int64(0)
        # Drives that other blocks write during the launch cannot be loaded a step ahead.
        t, word, following = int32(0), int32(0), load_relaxed(drive_at)
        while t < steps:
            began = cycles()
            if has_input_clusters:
                word = load_relaxed(drive_at)
            else:
                word, following = following, load_relaxed(drive_at + drive_step * int64(int32(t + 1) < steps))
            if thread == 0 and t > 1:
                barrier_expect_bytes(int32(barriers_sum - barrier), row_size)
            copies_done = cycles()
            if t > 0 and not wait_for_phase(barrier, int32(((t - 1) >> 1) & 1), max_polls):
                global_int32(faults_at)[0] = 1
                max_polls = int32(1)
            waits_done = cycles()
            v = load_outputs(row_at, (o0, o1, o2, o3, o4, o5, o6))
            hits = list_hits(v, int32(row_bytes * units_per_lane * lane), hits_at, lanes_below)
            acc = hit_product(bias, values_at, hits_at, hits, lane)
            drive = libdevice.int_as_float(word)
            if has_input_clusters:
                drive, complete = poll_drive(drive, drive_at, max_polls)
                if not complete:
                    global_int32(faults_at)[0] = 1
                    max_polls = int32(1)
                cuda.syncwarp(FULL_WARP)
            gate = egru_reset_gate(drive, acc)
            if not is_gate:
                gate = acc
            store_shared_float(int32(gates + own_gate), gate)
            store_shared_float(int32(gates + own_gate + 2 * gates_size), drive)
            products_done = cycles()
            cuda.syncthreads()
            meeting_done = cycles()
            row_at, barrier = int32(rows_sum - row_at), int32(barriers_sum - barrier)
            if has_tile:
                u = load_shared_float(int32(gates + own_tile))
                r = load_shared_float(int32(gates + own_tile + 4 * shift_r))
                rec = load_shared_float(int32(gates + own_tile + 4 * shift_g))
                drive = load_shared_float(int32(gates + own_tile + 4 * shift_g + 2 * gates_size))
                zero = np.float32(0)
                value, _, _, _ = egru_value_of_gates(u, r, drive, zero, zero, rec, c)
                y, c = zero, value
                if value > threshold:
                    y, c = value, value - threshold
                # The last outputs are sent as well: without a branch, addresses are computed while `y` is.
                broadcast_tile(base, int32(row_at + tile_at), int32(barrier - base), lane, y)
                if mine:
                    store_relaxed(sent_at, y)
                    if states != 0:
                        store_float(after_at, c)
            gates = int32(gates_sum - gates)
            drive_at += drive_step
            sent_at += batch * log_row_bytes
            after_at += batch * (drive_bytes // 3)
            turn_done = cycles()
            copied += copies_done - began
            waited += waits_done - copies_done
            multiplied += products_done - waits_done
            met += meeting_done - products_done
            updated += turn_done - meeting_done
            t = int32(t + 1)
        # No block may end while outputs travel to it.
        if steps > 0 and not wait_for_phase(barrier, int32(((steps - 1) >> 1) & 1), max_polls):
            global_int32(faults_at)[0] = 1
        if mine:
            carried[place] = c
        clocks = layer[tables.CLOCKS]
        if clocks != 0 and lane == 0:
            counts = global_int64(clocks)
            at = len(tables.TURN_PHASES) * (int64(cuda.blockIdx.x) * (int32(cuda.blockDim.x) >> 5) + warp)
            counts[at], counts[at + 1], counts[at + 2] = copied, waited, multiplied
            counts[at + 3], counts[at + 4] = met, updated

    return stream_turns
