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
from eventrnn.cuda.kernels.persistent import bring_in, look
from eventrnn.cuda.kernels.ptx import (
    egru_paper_value_of_gates,
    egru_reset_gate,
    egru_value_of_gates,
    global_float32,
    global_int32,
    global_int64,
    load_early,
    shared_base,
    shared_float32,
    shared_int32,
    shared_int64,
    store_relaxed,
    sum_of_warp,
)
from eventrnn.cuda.kernels.strip_product import ALL, chooser, count_bits, entry_of
from eventrnn.cuda.tables import LANES, LIST_PAD, SEGMENT


@device_function
def see(row_at, n, lane, warp):
    """This lane's four units of a row, how many of them sent, and whether all words came."""
    at = int32(warp * SEGMENT + 4 * lane)
    a = b = c = d = np.float32(0)
    here = True
    if at < n:
        a, b, c, d, here = look(row_at + int64(4) * at, int32(n - at))
    found = int32(int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0))
    return a, b, c, d, found, here


@device_function
def ballots(found, totals, lane, warp):
    """Who of the warp found one, two, four; their sum goes to `totals`."""
    ones = cuda.ballot_sync(ALL, (found & 1) != 0)
    twos = cuda.ballot_sync(ALL, (found & 2) != 0)
    fours = cuda.ballot_sync(ALL, (found & 4) != 0)
    if lane == 0:
        totals[warp] = int32(count_bits(ones) + 2 * count_bits(twos) + 4 * count_bits(fours))
    return ones, twos, fours


@device_function
def enlist(entries, totals, segments, a, b, c, d, found, ones, twos, fours, lane, warp):
    """Write what this lane saw where it belongs in the list; returns the length of the list."""
    each = int32(0)
    if lane < segments:
        each = totals[lane]
    earlier = each
    if lane >= warp:
        earlier = int32(0)
    count, p = sum_of_warp(each), sum_of_warp(earlier)
    if found:
        at = int32(warp * SEGMENT + 4 * lane)
        below = int32((int32(1) << lane) - 1)
        p = int32(p + count_bits(ones & below) + 2 * count_bits(twos & below) + 4 * count_bits(fours & below))
        if a != 0:
            entries[p] = entry_of(at, a)
            p = int32(p + 1)
        if b != 0:
            entries[p] = entry_of(at + 1, b)
            p = int32(p + 1)
        if c != 0:
            entries[p] = entry_of(at + 2, c)
            p = int32(p + 1)
        if d != 0:
            entries[p] = entry_of(at + 3, d)
    if warp == 0 and lane < LIST_PAD:
        entries[count + lane] = int64(0)
    return count


@device_function
def gather_row(row_at, n, segments, entries, totals, lane, warp):
    """The list of who sent what from one row of a record: its length, or -1 where some word never came."""
    a, b, c, d, found, here = see(row_at, n, lane, warp)
    ones, twos, fours = ballots(found, totals, lane, warp)
    if cuda.syncthreads_or(int32(not here)):
        return int32(-1)
    count = enlist(entries, totals, segments, a, b, c, d, found, ones, twos, fours, lane, warp)
    cuda.syncthreads()
    return count


@device_function
def gather_rows(row_at, n, segments, entries, totals, x_at, inputs, x_segments, x_entries, x_totals, lane, warp):
    """`gather_row` of two rows at once. The second, of the layer below, is most likely there already."""
    e, f, g, h, x_found, x_here = see(x_at, inputs, lane, warp)
    a, b, c, d, found, here = see(row_at, n, lane, warp)
    ones, twos, fours = ballots(found, totals, lane, warp)
    x_ones, x_twos, x_fours = ballots(x_found, x_totals, lane, warp)
    if cuda.syncthreads_or(int32(not (here and x_here))):
        return int32(-1), int32(-1)
    count = enlist(entries, totals, segments, a, b, c, d, found, ones, twos, fours, lane, warp)
    x_count = enlist(x_entries, x_totals, x_segments, e, f, g, h, x_found, x_ones, x_twos, x_fours, lane, warp)
    cuda.syncthreads()
    return count, x_count


def single_kernel(variant: str, ways: tuple[int, ...]):
    """The kernel of a variant for networks whose matrices lie in those ways; and its signature."""
    walk = chooser(ways)
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
        x, states = layer[tables.X], layer[tables.STATES]
        segments, x_segments = int32((n + SEGMENT - 1) >> 7), int32((inputs + SEGMENT - 1) >> 7)
        entries = shared_int64(shared + block[tables.AT_LIST])
        x_entries = shared_int64(shared + block[tables.AT_LIST] + 8 * block[tables.CAPACITY])
        totals, x_totals = (
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
        way_in, way_rec = int32(layer[tables.IN_WAY]), int32(layer[tables.REC_WAY])
        rec_values, rec_table = bring_in(
            way_rec,
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
        if x != 0:
            in_values, in_table = bring_in(
                way_in,
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
        row_bytes, x_row_bytes = 4 * layer[tables.PITCH] * batch, 4 * layer[tables.X_PITCH] * batch
        record_at, gated_at = layer[tables.EVENT_LOG] + sample * (4 * layer[tables.PITCH]), layer[tables.GATED]
        gated_at += sample * (4 * layer[tables.PITCH])
        x_at = x + sample * (4 * layer[tables.X_PITCH])
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
            if x != 0:
                in_values += shared_int32(bases_in_at)[gate]
                in_table += int64(8) * (gate * inputs)
        if mine:
            threshold = global_float32(layer[tables.THRESHOLD])[tile * LANES + lane]
            c, y = global_float32(carried)[0], global_float32(record_at)[unit]
        drive = drive_rec = np.float32(0)
        ahead, spot = int32(0), int32(gate * LANES + lane)
        if x != 0:
            count = gather_row(x_at, inputs, x_segments, x_entries, x_totals, lane, warp)
            if count < 0:
                global_int32(faults_at)[0] = 1
                return
            if 3 <= warp < 6:
                drives[spot] = walk(way_in, bias_in, in_values, in_table, width, lane, x_entries, count, hits_at)

        t = int64(0)
        while t < steps:
            t += 1
            if x != 0 and t < steps:
                # With what this step waits for, the input of the next.
                x_at += x_row_bytes
                count, x_count = gather_rows(
                    record_at, n, segments, entries, totals, x_at, inputs, x_segments, x_entries, x_totals, lane, warp
                )
                if 3 <= warp < 6 and count >= 0:
                    drives[3 * LANES - ahead + spot] = walk(
                        way_in, bias_in, in_values, in_table, width, lane, x_entries, x_count, hits_at
                    )
            else:
                if x == 0 and warp < 3 and mine:
                    drive = load_early(drive_at)
                    drive_at += drive_bytes
                count = gather_row(record_at, n, segments, entries, totals, lane, warp)
            if count < 0:
                global_int32(faults_at)[0] = 1
                return
            record_at += row_bytes
            if warp < cut:
                drive_rec = walk(way_rec, bias_rec, rec_values, rec_table, width, lane, entries, count, hits_at)
            if x != 0 and warp < 3:
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
                count = gather_row(gated_at, n, segments, entries, totals, lane, warp)
                if count < 0:
                    global_int32(faults_at)[0] = 1
                    return
                gated_at += row_bytes
                if warp == 2:
                    drive_rec = walk(way_rec, bias_rec, rec_values, rec_table, width, lane, entries, count, hits_at)

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
                store_relaxed(record_at + int64(4) * unit, y)
                if states != 0:
                    global_float32(state_at)[0] = c
                    state_at += state_bytes
            ahead = int32(3 * LANES - ahead)

        if warp == 2 and mine:
            global_float32(carried)[0] = c

    return layers, types.void(*[types.int64] * 5)
