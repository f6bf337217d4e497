"""The single-stream plan: the persistent kernel of `persistent.py` for blocks that own one tile of one sample.

A single stream is bound by latency, so this kernel has no loops over samples and tiles and keeps as much as possible
in registers. The exchange of events through an event log, the results and the barriers' purpose are those of
`persistent.py`; each step equals `reference.step`.

Block  : owns one tile of up to 32 units of one layer, for one sample.
Warp   : w loads the segment of units 128 * w to 128 * w + 127 of a row of the event log. Warps 0, 1, 2 compute the
         recurrent strips of the gates u, r, g, warps 3, 4, 5 the input strips of the same gates. Warps 0 and 1 evaluate
         their gates, warp 2 the candidate, the cells and the events. A plan has at least eight warps, and one per
         segment of the widest row.
Thread : four neighbouring units of a segment; one output of a strip; in warp 2, one unit, whose cell and output stay
         in registers.

============== ======== ========================================================================================
array          memory   shape, dtype, contents
============== ======== ========================================================================================
event log      global   (steps + 1, batch, pitch) float32; gated, drive, cells, states: see `persistent.py`
entries        shared   (capacity,) int64 events of the own layer (`strip_product.py`)
input_entries  shared   (capacity,) int64 events of the layer below
segment_counts shared   (32,) int32 events per segment of the own layer; input_counts: of the layer below
weights        shared   strips of the tile, in global memory (L2) if they do not fit; bases (2, 3) int32
gates          shared   (2, 32) float32, gates u and r
drives         shared   (2, 3, 32) float32, input drives of this step and of the next one
hits           shared   per warp, scratch of `strip_product.py`
c, y           register float32, one unit per lane of warp 2
============== ======== ========================================================================================

Barriers per step: one after the words have been polled and counted, one after the lists have been written, one after
the gates have been evaluated; two more for the list of r * y in the paper's variant.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.persistent import append_four, count_four, load_weights, poll_event_log
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
from eventrnn.cuda.kernels.strip_product import FULL_WARP, dispatch, popcount
from eventrnn.cuda.tables import LANES, LIST_PAD, SEGMENT


@device_function
def load_segment(row_at, n, lane, warp):
    """Poll this lane's four units of a row: their outputs, the number of events, whether all words were written."""
    at = int32(warp * SEGMENT + 4 * lane)
    a = b = c = d = np.float32(0)
    complete = True
    if at < n:
        a, b, c, d, complete = poll_event_log(row_at + int64(4) * at, int32(n - at))
    return a, b, c, d, count_four(a, b, c, d), complete


@device_function
def warp_ballots(n_events, segment_counts, lane, warp):
    """Votes of the warp on bits 0, 1 and 2 of each lane's number of events; their sum goes to `segment_counts`."""
    ones = cuda.ballot_sync(FULL_WARP, (n_events & 1) != 0)
    twos = cuda.ballot_sync(FULL_WARP, (n_events & 2) != 0)
    fours = cuda.ballot_sync(FULL_WARP, (n_events & 4) != 0)
    if lane == 0:
        segment_counts[warp] = int32(popcount(ones) + 2 * popcount(twos) + 4 * popcount(fours))
    return ones, twos, fours


@device_function
def append_events(entries, segment_counts, segments, outputs, n_events, votes, lane, warp):
    """Write this lane's events to their place in the list; returns the length of the list.

    outputs : the four outputs of `load_segment`
    votes   : the three votes of `warp_ballots`
    """
    a, b, c, d = outputs
    ones, twos, fours = votes
    each = int32(0)
    if lane < segments:
        each = segment_counts[lane]
    earlier = each
    if lane >= warp:
        earlier = int32(0)
    count, p = sum_of_warp(each), sum_of_warp(earlier)
    if n_events:
        lanes_below = int32((int32(1) << lane) - 1)
        p = int32(
            p + popcount(ones & lanes_below) + 2 * popcount(twos & lanes_below) + 4 * popcount(fours & lanes_below)
        )
        append_four(entries, p, int32(warp * SEGMENT + 4 * lane), a, b, c, d)
    if warp == 0 and lane < LIST_PAD:
        entries[count + lane] = int64(0)
    return count


@device_function
def collect_row(row_at, n, segments, entries, segment_counts, lane, warp):
    """Compact one row of an event log into a list of events.

    Returns the length of the list, or -1 if a word was not written in time. All threads of the block must call it.
    """
    a, b, c, d, n_events, complete = load_segment(row_at, n, lane, warp)
    votes = warp_ballots(n_events, segment_counts, lane, warp)
    if cuda.syncthreads_or(int32(not complete)):
        return int32(-1)
    count = append_events(entries, segment_counts, segments, (a, b, c, d), n_events, votes, lane, warp)
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
    """`collect_row` of two rows with one pair of barriers: the own layer's and the layer below's.

    The row of the layer below is loaded first, because it has most likely been written already.
    """
    e, f, g, h, n_inputs, input_complete = load_segment(input_at, inputs, lane, warp)
    a, b, c, d, n_events, complete = load_segment(row_at, n, lane, warp)
    votes = warp_ballots(n_events, segment_counts, lane, warp)
    input_votes = warp_ballots(n_inputs, input_counts, lane, warp)
    count, input_count = int32(-1), int32(-1)
    if not cuda.syncthreads_or(int32(not (complete and input_complete))):
        count = append_events(entries, segment_counts, segments, (a, b, c, d), n_events, votes, lane, warp)
        input_count = append_events(
            input_entries, input_counts, input_segments, (e, f, g, h), n_inputs, input_votes, lane, warp
        )
        cuda.syncthreads()
    # One place returns, because a tuple has two assignments otherwise; `gated_blocks` says why there must be one.
    return count, input_count


def single_kernel(kind: tuple[str, str], layouts: tuple[int, ...]):
    """The kernel of the single-stream plan and its signature.

    kind    : name and variant of the cell of all layers of the launch, which is an EGRU
    layouts : layout codes of their matrices
    """
    strip_product = dispatch(layouts, pipelined=True)
    paper = kind == ("egru", "paper")
    # Gates whose recurrent drive uses the outputs of the step before; the paper's candidate uses r * y instead.
    gates_from_outputs = 2 if paper else 3

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
        entries_at = shared + block[tables.AT_LIST]
        input_entries_at = entries_at + 8 * block[tables.CAPACITY]
        entries, input_entries = shared_int64(entries_at), shared_int64(input_entries_at)
        segment_counts, input_counts = (
            shared_int32(shared + block[tables.AT_SEGMENT_COUNTS]),
            shared_int32(shared + block[tables.AT_SEGMENT_COUNTS] + 128),
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
            3,
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
                3,
                inputs,
                shared + block[tables.AT_VALUES_IN],
                shared + block[tables.AT_TABLE_IN],
                bases_in_at,
                thread,
                threads,
            )
        cuda.syncthreads()

        # The strip of this warp: a recurrent one for warps 0 to 2, an input strip for warps 3 to 5.
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
                    layout_in, bias_in, in_values, in_table, width, lane, input_entries_at, count, hits_at
                )

        t = int64(0)
        while t < steps:
            t += 1
            if input_log != 0 and t < steps:
                # Poll the outputs that this step waits for together with the input of the next step.
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
                        layout_in, bias_in, in_values, in_table, width, lane, input_entries_at, input_count, hits_at
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
            if warp < gates_from_outputs:
                drive_rec = strip_product(
                    layout_rec, bias_rec, rec_values, rec_table, width, lane, entries_at, count, hits_at
                )
            if input_log != 0 and warp < 3:
                drive = drives[ahead + spot]
            # Warps 0 and 1 evaluate their gates; warp 2 keeps the drives of the candidate.
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
                        layout_rec, bias_rec, rec_values, rec_table, width, lane, entries_at, count, hits_at
                    )

            # Cells and events of this step.
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
