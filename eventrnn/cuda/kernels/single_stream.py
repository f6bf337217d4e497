"""The kernel `layers` for blocks that own one tile of one sample: nothing to take turns in, so little code.

It is what a single stream waits for. A warp looks at one segment of units and keeps what it saw; three warps walk the
strips and work out their gates; the third keeps cells and outputs in its registers. Everything else is as in
`kernels.py`.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.persistent import load_weights, poll_event_log
from eventrnn.cuda.kernels.ptx import (
    egru_paper_value_of_gates,
    egru_reset_gate,
    egru_value_of_gates,
    global_float32,
    global_int32,
    global_int64,
    load_readonly,
    shared_base,
    shared_float32,
    shared_int32,
    shared_int64,
    store_relaxed,
    sum_of_warp,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP, dispatch, pack_event, popcount
from eventrnn.cuda.tables import LANES, LIST_PAD, SEGMENT


@device_function
def load_segment(row_at, n, lane, warp):
    """This lane's four units of a row, how many of them sent, and whether all words came."""
    at = int32(warp * SEGMENT + 4 * lane)
    a = b = c = d = np.float32(0)
    complete = True
    if at < n:
        a, b, c, d, complete = poll_event_log(row_at + int64(4) * at, int32(n - at))
    n_events = int32(int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0))
    return a, b, c, d, n_events, complete


@device_function
def warp_ballots(n_events, segment_counts, lane, warp):
    """Who of the warp found one, two, four; their sum goes to `totals`."""
    ones = cuda.ballot_sync(FULL_WARP, (n_events & 1) != 0)
    twos = cuda.ballot_sync(FULL_WARP, (n_events & 2) != 0)
    fours = cuda.ballot_sync(FULL_WARP, (n_events & 4) != 0)
    if lane == 0:
        segment_counts[warp] = int32(popcount(ones) + 2 * popcount(twos) + 4 * popcount(fours))
    return ones, twos, fours


@device_function
def append_events(entries, segment_counts, segments, a, b, c, d, n_events, ones, twos, fours, lane, warp):
    """Write what this lane saw where it belongs in the list; returns the length of the list."""
    each = int32(0)
    if lane < segments:
        each = segment_counts[lane]
    earlier = each
    if lane >= warp:
        earlier = int32(0)
    count, p = sum_of_warp(each), sum_of_warp(earlier)
    if n_events:
        at = int32(warp * SEGMENT + 4 * lane)
        lanes_below = int32((int32(1) << lane) - 1)
        p = int32(
            p + popcount(ones & lanes_below) + 2 * popcount(twos & lanes_below) + 4 * popcount(fours & lanes_below)
        )
        if a != 0:
            entries[p] = pack_event(at, a)
            p = int32(p + 1)
        if b != 0:
            entries[p] = pack_event(at + 1, b)
            p = int32(p + 1)
        if c != 0:
            entries[p] = pack_event(at + 2, c)
            p = int32(p + 1)
        if d != 0:
            entries[p] = pack_event(at + 3, d)
    if warp == 0 and lane < LIST_PAD:
        entries[count + lane] = int64(0)
    return count


@device_function
def collect_row(row_at, n, segments, entries, segment_counts, lane, warp):
    """The list of who sent what from one row of a record: its length, or -1 where some word never came."""
    a, b, c, d, n_events, complete = load_segment(row_at, n, lane, warp)
    ones, twos, fours = warp_ballots(n_events, segment_counts, lane, warp)
    if cuda.syncthreads_or(int32(not complete)):
        return int32(-1)
    count = append_events(entries, segment_counts, segments, a, b, c, d, n_events, ones, twos, fours, lane, warp)
    cuda.syncthreads()
    return count


@device_function
def collect_rows(
    row_at,
    n,
    segments,
    entries,
    segment_counts,
    input_at,
    inputs,
    input_segments,
    input_entries,
    input_counts,
    lane,
    warp,
):
    """`gather_row` of two rows at once. The second, of the layer below, is most likely there already."""
    e, f, g, h, n_inputs, input_complete = load_segment(input_at, inputs, lane, warp)
    a, b, c, d, n_events, complete = load_segment(row_at, n, lane, warp)
    ones, twos, fours = warp_ballots(n_events, segment_counts, lane, warp)
    input_ones, input_twos, input_fours = warp_ballots(n_inputs, input_counts, lane, warp)
    if cuda.syncthreads_or(int32(not (complete and input_complete))):
        return int32(-1), int32(-1)
    count = append_events(entries, segment_counts, segments, a, b, c, d, n_events, ones, twos, fours, lane, warp)
    input_count = append_events(
        input_entries,
        input_counts,
        input_segments,
        e,
        f,
        g,
        h,
        n_inputs,
        input_ones,
        input_twos,
        input_fours,
        lane,
        warp,
    )
    cuda.syncthreads()
    return count, input_count


def single_kernel(variant: str, layouts: tuple[int, ...]):
    """The kernel of a variant for networks whose matrices lie in those ways; and its signature."""
    strip_product = dispatch(layouts)
    paper = variant == "paper"
    cut = 2 if paper else 3

    def layers(table_at, blocks_at, faults_at, steps, batch):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        block = global_int64(blocks_at + int64(8 * tables.BLOCK_FIELDS) * cuda.blockIdx.x)
        layer = global_int64(table_at + int64(8 * tables.LAYER_FIELDS) * block[tables.LAYER])
        shared = shared_base()
        n, inputs, width = int32(layer[tables.UNITS]), int32(layer[tables.INPUTS]), int32(layer[tables.WIDTH])
        tile, sample = block[tables.TILE], block[tables.SAMPLE]
        input_log, states = layer[tables.INPUT_LOG], layer[tables.STATES]
        segments, input_segments = int32((n + SEGMENT - 1) >> 7), int32((inputs + SEGMENT - 1) >> 7)
        entries = shared_int64(shared + block[tables.AT_LIST])
        input_entries = shared_int64(shared + block[tables.AT_LIST] + 8 * block[tables.CAPACITY])
        segment_counts, input_counts = (
            shared_int32(shared + block[tables.AT_TOTALS]),
            shared_int32(shared + block[tables.AT_TOTALS] + 128),
        )
        hits_at = shared + block[tables.AT_HITS] + int64(tables.HIT_BUFFER_BYTES) * warp
        gates, drives = (
            shared_float32(shared + block[tables.AT_SUMS_REC]),
            shared_float32(shared + block[tables.AT_SUMS_IN]),
        )
        bases_rec_at = shared + block[tables.AT_BASES]
        bases_in_at = bases_rec_at + int64(12)
        layout_in, layout_rec = int32(layer[tables.IN_LAYOUT]), int32(layer[tables.REC_LAYOUT])
        rec_values, rec_table = load_weights(
            layout_rec,
            layer[tables.REC_VALUES],
            layer[tables.REC_TABLE],
            layer[tables.REC_STARTS],
            tile,
            int64(1),
            n,
            shared + block[tables.AT_VALUES_REC],
            shared + block[tables.AT_TABLE_REC],
            bases_rec_at,
            thread,
            threads,
        )
        in_values = in_table = int64(0)
        if input_log != 0:
            in_values, in_table = load_weights(
                layout_in,
                layer[tables.IN_VALUES],
                layer[tables.IN_TABLE],
                layer[tables.IN_STARTS],
                tile,
                int64(1),
                inputs,
                shared + block[tables.AT_VALUES_IN],
                shared + block[tables.AT_TABLE_IN],
                bases_in_at,
                thread,
                threads,
            )
        cuda.syncthreads()

        # The strip that this warp walks: three warps recurrent ones, three those of the input.
        unit = int32(tile * width + lane)
        mine = lane < width and unit < n
        gate = warp
        if warp >= 3:
            gate = int32(warp - 3)
        bias_in = bias_rec = threshold = c = y = np.float32(0)
        carried = layer[tables.CELLS] + 4 * (sample * n + unit)
        row_bytes, input_row_bytes = 4 * layer[tables.PITCH] * batch, 4 * layer[tables.INPUT_PITCH] * batch
        log_at, gated_at = layer[tables.EVENT_LOG] + sample * (4 * layer[tables.PITCH]), layer[tables.GATED]
        gated_at += sample * (4 * layer[tables.PITCH])
        input_at = input_log + sample * (4 * layer[tables.INPUT_PITCH])
        drive_at = layer[tables.DRIVE] + 4 * (sample * (3 * n) + gate * n + unit)
        drive_bytes, state_at, state_bytes = (
            12 * int64(n) * batch,
            states + 4 * (sample * n + unit),
            4 * int64(n) * batch,
        )
        if warp < 6:
            strip = (tile * 3 + gate) * LANES + lane
            bias_in = global_float32(layer[tables.BIAS_IN])[strip]
            bias_rec = global_float32(layer[tables.BIAS_REC])[strip]
            rec_values += shared_int32(bases_rec_at)[gate]
            rec_table += int64(8) * (gate * n)
            if input_log != 0:
                in_values += shared_int32(bases_in_at)[gate]
                in_table += int64(8) * (gate * inputs)
        if mine:
            threshold = global_float32(layer[tables.THRESHOLD])[tile * LANES + lane]
            c, y = global_float32(carried)[0], global_float32(log_at)[unit]
        drive = drive_rec = np.float32(0)
        ahead, spot = int32(0), int32(gate * LANES + lane)
        if input_log != 0:
            count = collect_row(input_at, inputs, input_segments, input_entries, input_counts, lane, warp)
            if count < 0:
                global_int32(faults_at)[0] = 1
                return
            if 3 <= warp < 6:
                drives[spot] = strip_product(
                    layout_in, bias_in, in_values, in_table, width, lane, input_entries, count, hits_at
                )

        t = int64(0)
        while t < steps:
            t += 1
            if input_log != 0 and t < steps:
                # With what this step waits for, the input of the next.
                input_at += input_row_bytes
                count, input_count = collect_rows(
                    log_at,
                    n,
                    segments,
                    entries,
                    segment_counts,
                    input_at,
                    inputs,
                    input_segments,
                    input_entries,
                    input_counts,
                    lane,
                    warp,
                )
                if 3 <= warp < 6 and count >= 0:
                    drives[3 * LANES - ahead + spot] = strip_product(
                        layout_in, bias_in, in_values, in_table, width, lane, input_entries, input_count, hits_at
                    )
            else:
                if input_log == 0 and warp < 3 and mine:
                    drive = load_readonly(drive_at)
                    drive_at += drive_bytes
                count = collect_row(log_at, n, segments, entries, segment_counts, lane, warp)
            if count < 0:
                global_int32(faults_at)[0] = 1
                return
            log_at += row_bytes
            if warp < cut:
                drive_rec = strip_product(
                    layout_rec, bias_rec, rec_values, rec_table, width, lane, entries, count, hits_at
                )
            if input_log != 0 and warp < 3:
                drive = drives[ahead + spot]
            # Each gate by its own warp; the candidate's does the rest.
            if warp < 2:
                gates[warp * LANES + lane] = egru_reset_gate(drive, drive_rec)
            cuda.syncthreads()
            if paper:
                if warp == 2 and mine:
                    value = np.float32(0)
                    if y != 0:
                        value = gates[LANES + lane] * y
                    store_relaxed(gated_at + int64(4) * unit, value)
                count = collect_row(gated_at, n, segments, entries, segment_counts, lane, warp)
                if count < 0:
                    global_int32(faults_at)[0] = 1
                    return
                gated_at += row_bytes
                if warp == 2:
                    drive_rec = strip_product(
                        layout_rec, bias_rec, rec_values, rec_table, width, lane, entries, count, hits_at
                    )

            # Cells and events.
            if warp == 2 and mine:
                zero = np.float32(0)
                if paper:
                    v, _, _ = egru_paper_value_of_gates(gates[lane], drive, zero, drive_rec, c, y)
                else:
                    v, _, _, _ = egru_value_of_gates(gates[lane], gates[LANES + lane], drive, zero, zero, drive_rec, c)
                y, c = zero, v
                if v > threshold:
                    y = v
                    if not paper:
                        c = v - threshold
                store_relaxed(log_at + int64(4) * unit, y)
                if states != 0:
                    global_float32(state_at)[0] = c
                    state_at += state_bytes
            ahead = int32(3 * LANES - ahead)

        if warp == 2 and mine:
            global_float32(carried)[0] = c

    return layers, types.void(*[types.int64] * 5)
