"""The kernel `layers` for blocks that own one tile of one sample: nothing to take turns in, so little code.

It is what a single stream waits for. A warp looks at one segment of units and keeps what it saw; three warps walk the
strips; the first keeps cells and outputs in its registers. Everything else is as in `kernels.py`.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables as k
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels import bring_in, copy_in, look
from eventrnn.cuda.ptx import (
    copies_done,
    copy_later,
    egru_paper_value,
    egru_reset_gate,
    egru_value,
    global_float32,
    global_int32,
    global_int64,
    shared_base,
    shared_float32,
    shared_int32,
    shared_int64,
    store_relaxed,
    sum_of_warp,
)
from eventrnn.cuda.tables import LANES, LIST_PAD, SEGMENT
from eventrnn.cuda.walks import ALL, chooser, count_bits, entry_of


@device_function
def gather_row(row_at, n, segments, list_at, totals_at, lane, warp):
    """The list of who sent what from one row of a record: how many, or -1 where some word never came."""
    entries, totals = shared_int64(list_at), shared_int32(totals_at)
    at = int32(warp * SEGMENT + 4 * lane)
    a = b = c = d = np.float32(0)
    lost = int32(0)
    if at < n:
        a, b, c, d, here = look(row_at + int64(4) * at, int32(n - at))
        if not here:
            lost = int32(1)
    found = int32(int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0))
    ones = cuda.ballot_sync(ALL, (found & 1) != 0)
    twos = cuda.ballot_sync(ALL, (found & 2) != 0)
    fours = cuda.ballot_sync(ALL, (found & 4) != 0)
    if lane == 0:
        totals[warp] = int32(count_bits(ones) + 2 * count_bits(twos) + 4 * count_bits(fours))
    if cuda.syncthreads_or(lost):
        return int32(-1)
    each = int32(0)
    if lane < segments:
        each = totals[lane]
    earlier = each
    if lane >= warp:
        earlier = int32(0)
    count, p = sum_of_warp(each), sum_of_warp(earlier)
    if found:
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
    cuda.syncthreads()
    return count


def single_kernel(variant: str, ways: tuple[int, ...]):
    """The kernel of a variant for networks whose matrices lie in those ways; and its signature."""
    walk = chooser(ways)
    paper = variant == "paper"
    cut = 2 if paper else 3

    def layers(table_at, blocks_at, faults_at, steps, batch):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        block = global_int64(blocks_at + int64(8 * k.BLOCK_FIELDS) * cuda.blockIdx.x)
        layer = global_int64(table_at + int64(8 * k.LAYER_FIELDS) * block[k.LAYER])
        shared = shared_base()
        n, inputs, width = int32(layer[k.UNITS]), int32(layer[k.INPUTS]), int32(layer[k.WIDTH])
        tile, sample = block[k.TILE], block[k.SAMPLE]
        x, states = layer[k.X], layer[k.STATES]
        segments, x_segments = int32((n + SEGMENT - 1) >> 7), int32((inputs + SEGMENT - 1) >> 7)
        list_at, totals_at = shared + block[k.AT_LIST], shared + block[k.AT_TOTALS]
        hits_at = shared + block[k.AT_HITS] + int64(k.HIT_BYTES) * warp
        sums_in_at, sums_rec_at = shared + block[k.AT_SUMS_IN], shared + block[k.AT_SUMS_REC]
        sums_in, sums_rec = shared_float32(sums_in_at), shared_float32(sums_rec_at)
        bases_rec_at = shared + block[k.AT_BASES]
        bases_in_at = bases_rec_at + int64(12)
        way_in, way_rec = int32(layer[k.IN_WAY]), int32(layer[k.REC_WAY])
        rec_values, rec_table = bring_in(
            way_rec, layer[k.REC_VALUES], layer[k.REC_TABLE], layer[k.REC_STARTS], tile, int64(1), n,
            shared + block[k.AT_VALUES_REC], shared + block[k.AT_TABLE_REC], bases_rec_at, thread, threads,
        )  # fmt: skip
        in_values = in_table = int64(0)
        if x != 0:
            in_values, in_table = bring_in(
                way_in, layer[k.IN_VALUES], layer[k.IN_TABLE], layer[k.IN_STARTS], tile, int64(1), inputs,
                shared + block[k.AT_VALUES_IN], shared + block[k.AT_TABLE_IN], bases_in_at, thread, threads,
            )  # fmt: skip
        cuda.syncthreads()

        # The strip that this warp walks, the unit that this lane keeps.
        unit = int32(tile * width + lane)
        mine = lane < width and unit < n
        walks = warp < 3
        bias_in = bias_rec = threshold = c = y = np.float32(0)
        carried = layer[k.CELLS] + 4 * (sample * n + unit)
        row_bytes, x_row_bytes = 4 * layer[k.PITCH] * batch, 4 * layer[k.X_PITCH] * batch
        record_at, gated_at = layer[k.RECORD] + sample * (4 * layer[k.PITCH]), layer[k.GATED]
        gated_at += sample * (4 * layer[k.PITCH])
        x_at = x + sample * (4 * layer[k.X_PITCH])
        drive_at = layer[k.DRIVE] + 4 * (sample * (3 * n) + warp * n + unit)
        drive_bytes, state_at, state_bytes = 12 * int64(n) * batch, states + 4 * (sample * n + unit), 4 * int64(n) * batch
        if walks:
            strip = (tile * 3 + warp) * LANES + lane
            bias_in = global_float32(layer[k.BIAS_IN])[strip]
            bias_rec = global_float32(layer[k.BIAS_REC])[strip]
            rec_values += shared_int32(bases_rec_at)[warp]
            rec_table += int64(8) * (warp * n)
            if x != 0:
                in_values += shared_int32(bases_in_at)[warp]
                in_table += int64(8) * (warp * inputs)
        if mine:
            threshold = global_float32(layer[k.THRESHOLD])[tile * LANES + lane]
            c, y = global_float32(carried)[0], global_float32(record_at)[unit]
        entries, s = shared_int64(list_at), int32(warp * LANES + lane)
        ahead = int32(0)

        t = int64(-1)
        while True:
            # The input drive of the next step, while the others' events are on their way.
            t += 1
            if t < steps:
                if x != 0:
                    count = gather_row(x_at, inputs, x_segments, list_at, totals_at, lane, warp)
                    if count < 0:
                        global_int32(faults_at)[0] = 1
                        return
                    x_at += x_row_bytes
                    if walks:
                        sums_in[ahead + s] = walk(
                            way_in, bias_in, in_values, in_table, width, lane, entries, count, hits_at
                        )
                elif walks and mine:
                    copy_later(sums_in_at + int64(4) * (ahead + s), drive_at)
                    drive_at += drive_bytes
            if t >= steps:
                break

            # The recurrent drive of this step.
            count = gather_row(record_at, n, segments, list_at, totals_at, lane, warp)
            if count < 0:
                global_int32(faults_at)[0] = 1
                return
            record_at += row_bytes
            if warp < cut:
                sums_rec[s] = walk(way_rec, bias_rec, rec_values, rec_table, width, lane, entries, count, hits_at)
            if walks:
                copies_done()
            cuda.syncthreads()
            if paper:
                if warp == 0 and mine:
                    value = np.float32(0)
                    if y != 0:
                        value = egru_reset_gate(sums_in[ahead + LANES + lane], sums_rec[LANES + lane]) * y
                    store_relaxed(gated_at + int64(4) * unit, value)
                count = gather_row(gated_at, n, segments, list_at, totals_at, lane, warp)
                if count < 0:
                    global_int32(faults_at)[0] = 1
                    return
                gated_at += row_bytes
                if warp == 2:
                    sums_rec[s] = walk(way_rec, bias_rec, rec_values, rec_table, width, lane, entries, count, hits_at)
                cuda.syncthreads()

            # Cells and events.
            if warp == 0 and mine:
                if paper:
                    v, _, _ = egru_paper_value(
                        sums_in[ahead + s], sums_in[ahead + s + 2 * LANES], sums_rec[s], sums_rec[s + 2 * LANES], c, y
                    )
                else:
                    v, _, _, _ = egru_value(
                        sums_in[ahead + s], sums_in[ahead + s + LANES], sums_in[ahead + s + 2 * LANES],
                        sums_rec[s], sums_rec[s + LANES], sums_rec[s + 2 * LANES], c,
                    )  # fmt: skip
                y, c = np.float32(0), v
                if v > threshold:
                    y = v
                    if not paper:
                        c = v - threshold
                store_relaxed(record_at + int64(4) * unit, y)
                if states != 0:
                    global_float32(state_at)[0] = c
                    state_at += state_bytes
            ahead = int32(3 * LANES - ahead)

        if warp == 0 and mine:
            global_float32(carried)[0] = c

    return layers, types.void(*[types.int64] * 5)
