"""The kernel `layers`: all layers and steps in one launch.

Nobody waits at a grid barrier. What a unit sends at step t goes to its own word in a record of the whole run, which
starts out full of a value that no unit can send; who needs the word looks until it is there. So there is nothing to
take back, nothing to overwrite too early, and layers follow each other as fast as their data comes.

Warps take samples, tiles, gates in turn and never divide: counters of where they are move on by fixed strides.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.ptx import (
    copies_done,
    copy_later,
    egru_paper_value,
    egru_reset_gate,
    egru_value,
    global_float32,
    global_int32,
    global_int64,
    load_relaxed4,
    shared_base,
    shared_float32,
    shared_int32,
    shared_int64,
    store_relaxed,
    sum_of_warp,
)
from eventrnn.cuda.kernels.strip_product import ALL, chooser, count_bits, entry_of
from eventrnn.cuda.tables import LANES, LIST_PAD, SEGMENT

# A NaN that no arithmetic of the GPU makes (its own is 0x7FFFFFFF) and no input may be: "not sent yet".
UNWRITTEN = np.int32(-1)

# Looks for one word; then the run is given up rather than hang. Seconds.
MAX_POLLS = np.int32(1 << 23)


@device_function
def look(address, left):
    """The first `left` of four words of a record once they are there, zeros after them; and whether they came."""
    tries = int32(0)
    while True:
        a, b, c, d = load_relaxed4(address)
        if left < 2:
            b = int32(0)
        if left < 3:
            c = int32(0)
        if left < 4:
            d = int32(0)
        here = a != UNWRITTEN and b != UNWRITTEN and c != UNWRITTEN and d != UNWRITTEN
        tries = int32(tries + 1)
        if here or tries >= MAX_POLLS:
            return (
                libdevice.int_as_float(a), libdevice.int_as_float(b),
                libdevice.int_as_float(c), libdevice.int_as_float(d), here,
            )  # fmt: skip


@device_function
def gather(
    row_at, pitch_bytes, n, samples, segments, list_at, counts_at, staged_at, totals_at, capacity, lane, warp, warps
):
    """Lists of who sent what, from `samples` rows of a record from `row_at` on, ascending; in shared memory.

    Returns whether some word never came. Every thread of the block takes part; lists are complete afterwards.
    """
    entries, counts, totals = shared_int64(list_at), shared_int32(counts_at), shared_int32(totals_at)
    staged = shared_float32(staged_at)
    lost, sample, segment, item = int32(0), int32(0), warp, warp
    while True:
        while segment >= segments:
            segment = int32(segment - segments)
            sample = int32(sample + 1)
        if sample >= samples:
            break
        at = int32(segment * SEGMENT + 4 * lane)
        a = b = c = d = np.float32(0)
        if at < n:
            a, b, c, d, here = look(row_at + sample * pitch_bytes + int64(4) * at, int32(n - at))
            if not here:
                lost = int32(1)
        own = int32(item * SEGMENT + lane)
        staged[own], staged[own + 32], staged[own + 64], staged[own + 96] = a, b, c, d
        found = int32(int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0))
        total = sum_of_warp(found)
        if lane == 0:
            totals[item] = total
        segment = int32(segment + warps)
        item = int32(item + warps)
    if cuda.syncthreads_or(lost):
        return True
    below = int32((int32(1) << lane) - 1)
    sample, segment, item = int32(0), warp, warp
    while True:
        while segment >= segments:
            segment = int32(segment - segments)
            sample = int32(sample + 1)
        if sample >= samples:
            break
        before, s = int32(0), lane
        while s < segment:
            before = int32(before + totals[item - segment + s])
            s = int32(s + LANES)
        before = sum_of_warp(before)
        own = int32(item * SEGMENT + lane)
        a, b, c, d = staged[own], staged[own + 32], staged[own + 64], staged[own + 96]
        found = int32(int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0))
        p = int32(
            sample * capacity + before + count_bits(cuda.ballot_sync(ALL, (found & 1) != 0) & below)
            + 2 * count_bits(cuda.ballot_sync(ALL, (found & 2) != 0) & below)
            + 4 * count_bits(cuda.ballot_sync(ALL, (found & 4) != 0) & below)
        )  # fmt: skip
        at = int32(segment * SEGMENT + 4 * lane)
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
        if segment == segments - 1:
            count = int32(before + totals[item])
            if lane == 0:
                counts[sample] = count
            if lane < LIST_PAD:
                entries[sample * capacity + count + lane] = int64(0)
        segment = int32(segment + warps)
        item = int32(item + warps)
    cuda.syncthreads()
    return False


@device_function
def copy_in(target_at, source_at, size, thread, threads):
    """So many bytes, a multiple of 4, from global to shared memory."""
    target, source = shared_int32(target_at), global_int32(source_at)
    word = thread
    while word < size >> 2:
        target[word] = source[word]
        word = int32(word + threads)


@device_function
def bring_in(way, values_at, table_at, starts_at, tile, tiles, n_pre, own_values, own_table, bases_at, thread, threads):
    """Where the weights of the block's tiles begin, those that stay in shared memory brought there: values, table.

    `bases`: bytes from there to each strip's values.
    """
    starts, bases = global_int64(starts_at), shared_int32(bases_at)
    first, last = tile * 3, (tile + tiles) * 3
    size = int64(4)
    if way & tables.NARROW:
        size = int64(2)
    begin = starts[first]
    strip = thread
    while strip < last - first:
        bases[strip] = int32((starts[first + strip] - begin) * size)
        strip = int32(strip + threads)
    values_at += begin * size
    table_at += first * n_pre * 8
    if way & tables.RESIDENT:
        copy_in(own_values, values_at, (starts[last] - begin + LANES) * size, thread, threads)
        values_at = own_values
        if way & tables.KINDS:
            copy_in(own_table, table_at, (last - first) * n_pre * 8, thread, threads)
            table_at = own_table
    return values_at, table_at


def layers_kernel(variant: str, ways: tuple[int, ...]):
    """The kernel of a variant for networks whose matrices lie in those ways; and its signature."""
    walk = chooser(ways)
    paper = variant == "paper"
    first_cut = 2 if paper else 3

    @device_function
    def product(
        way, values_at, table_at, bases_at, tiles, first_gate, gates, samples, n_pre, width, bias_at, sums_at,
        list_at, counts_at, capacity, hits_at, lane, warp, warps,
    ):  # fmt: skip
        """The drives of some gates of the block's tiles, from the lists that were gathered last."""
        bias, sums = shared_float32(bias_at), shared_float32(sums_at)
        bases, counts = shared_int32(bases_at), shared_int32(counts_at)
        sample, own, gate = int32(0), int32(0), warp
        while True:
            while gate >= gates:
                gate = int32(gate - gates)
                own = int32(own + 1)
            while own >= tiles:
                own = int32(own - tiles)
                sample = int32(sample + 1)
            if sample >= samples:
                break
            strip = int32(own * 3 + gate + first_gate)
            acc = walk(
                way, bias[strip * LANES + lane], values_at + bases[strip], table_at + int64(8) * (strip * n_pre),
                width, lane, shared_int64(list_at + int64(8) * (sample * capacity)), counts[sample], hits_at,
            )  # fmt: skip
            sums[(sample * tiles * 3 + strip) * LANES + lane] = acc
            gate = int32(gate + warps)

    def layers(table_at, blocks_at, faults_at, steps, batch):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        block = global_int64(blocks_at + int64(8 * tables.BLOCK_FIELDS) * cuda.blockIdx.x)
        layer = global_int64(table_at + int64(8 * tables.LAYER_FIELDS) * block[tables.LAYER])
        shared = shared_base()
        n, inputs, width = int32(layer[tables.UNITS]), int32(layer[tables.INPUTS]), int32(layer[tables.WIDTH])
        tile, tiles, first, samples = (
            block[tables.TILE],
            int32(block[tables.TILES]),
            block[tables.SAMPLE],
            int32(block[tables.SAMPLES]),
        )
        record, gated, drive, x, states = (
            layer[tables.EVENT_LOG],
            layer[tables.GATED],
            layer[tables.DRIVE],
            layer[tables.X],
            layer[tables.STATES],
        )
        row_bytes, x_row_bytes = 4 * layer[tables.PITCH], 4 * layer[tables.X_PITCH]
        segments, x_segments = int32((n + SEGMENT - 1) >> 7), int32((inputs + SEGMENT - 1) >> 7)
        list_at, counts_at, staged_at = (
            shared + block[tables.AT_LIST],
            shared + block[tables.AT_COUNTS],
            shared + block[tables.AT_STAGED],
        )
        totals_at, capacity = shared + block[tables.AT_TOTALS], int32(block[tables.CAPACITY])
        hits_at = shared + block[tables.AT_HITS] + int64(tables.HIT_BUFFER_BYTES) * warp
        sums_in_at, sums_rec_at = shared + block[tables.AT_SUMS_IN], shared + block[tables.AT_SUMS_REC]
        sums_in, sums_rec = shared_float32(sums_in_at), shared_float32(sums_rec_at)
        sums_size = int32(samples * tiles * (3 * LANES))
        c, y = shared_float32(shared + block[tables.AT_CELLS]), shared_float32(shared + block[tables.AT_Y])
        theta_at, bias_in_at = shared + block[tables.AT_THRESHOLD], shared + block[tables.AT_BIAS]
        bias_rec_at = bias_in_at + int64(12 * LANES) * tiles
        theta = shared_float32(theta_at)
        bases_rec_at = shared + block[tables.AT_BASES]
        bases_in_at = bases_rec_at + int64(12) * tiles

        copy_in(bias_in_at, layer[tables.BIAS_IN] + tile * (12 * LANES), int64(tiles) * (12 * LANES), thread, threads)
        copy_in(bias_rec_at, layer[tables.BIAS_REC] + tile * (12 * LANES), int64(tiles) * (12 * LANES), thread, threads)
        copy_in(theta_at, layer[tables.THRESHOLD] + tile * (4 * LANES), int64(tiles) * (4 * LANES), thread, threads)
        way_in, way_rec = int32(layer[tables.IN_WAY]), int32(layer[tables.REC_WAY])
        rec_values, rec_table = bring_in(
            way_rec, layer[tables.REC_VALUES], layer[tables.REC_TABLE], layer[tables.REC_STARTS], tile, tiles, n,
            shared + block[tables.AT_VALUES_REC], shared + block[tables.AT_TABLE_REC], bases_rec_at, thread, threads,
        )  # fmt: skip
        in_values = in_table = int64(0)
        if x != 0:
            in_values, in_table = bring_in(
                way_in, layer[tables.IN_VALUES], layer[tables.IN_TABLE], layer[tables.IN_STARTS], tile, tiles, inputs,
                shared + block[tables.AT_VALUES_IN], shared + block[tables.AT_TABLE_IN], bases_in_at, thread, threads,
            )  # fmt: skip
        carried = global_float32(layer[tables.CELLS])
        sample, own, item = int32(0), warp, warp
        while True:
            while own >= tiles:
                own = int32(own - tiles)
                sample = int32(sample + 1)
            if sample >= samples:
                break
            unit = int32((tile + own) * width + lane)
            if lane < width and unit < n:
                c[item * LANES + lane] = carried[(first + sample) * n + unit]
                y[item * LANES + lane] = global_float32(record + (first + sample) * row_bytes)[unit]
            own, item = int32(own + warps), int32(item + warps)
        cuda.syncthreads()

        t = int64(-1)
        while t < steps:
            row = t * batch + first
            if t >= 0:
                # The recurrent drive of this step.
                if gather(
                    record + row * row_bytes, row_bytes, n, samples, segments,
                    list_at, counts_at, staged_at, totals_at, capacity, lane, warp, warps,
                ):  # fmt: skip
                    global_int32(faults_at)[0] = 1
                    return
                product(
                    way_rec, rec_values, rec_table, bases_rec_at, tiles, 0, first_cut, samples, n, width,
                    bias_rec_at, sums_rec_at, list_at, counts_at, capacity, hits_at, lane, warp, warps,
                )  # fmt: skip
                copies_done()
                cuda.syncthreads()
                flip = int32((t & 1) * sums_size)
                if paper:
                    sample, own, item = int32(0), warp, warp
                    while True:
                        while own >= tiles:
                            own = int32(own - tiles)
                            sample = int32(sample + 1)
                        if sample >= samples:
                            break
                        unit = int32((tile + own) * width + lane)
                        if lane < width and unit < n:
                            s = int32(item * (3 * LANES) + lane)
                            before, value = y[item * LANES + lane], np.float32(0)
                            if before != 0:
                                value = egru_reset_gate(sums_in[flip + s + LANES], sums_rec[s + LANES]) * before
                            store_relaxed(gated + (row + sample) * row_bytes + int64(4) * unit, value)
                        own, item = int32(own + warps), int32(item + warps)
                    if gather(
                        gated + row * row_bytes, row_bytes, n, samples, segments,
                        list_at, counts_at, staged_at, totals_at, capacity, lane, warp, warps,
                    ):  # fmt: skip
                        global_int32(faults_at)[0] = 1
                        return
                    product(
                        way_rec, rec_values, rec_table, bases_rec_at, tiles, 2, 1, samples, n, width,
                        bias_rec_at, sums_rec_at, list_at, counts_at, capacity, hits_at, lane, warp, warps,
                    )  # fmt: skip
                    cuda.syncthreads()

                # Cells and events.
                sample, own, item = int32(0), warp, warp
                while True:
                    while own >= tiles:
                        own = int32(own - tiles)
                        sample = int32(sample + 1)
                    if sample >= samples:
                        break
                    unit = int32((tile + own) * width + lane)
                    if lane < width and unit < n:
                        s, p = int32(item * (3 * LANES) + lane), int32(item * LANES + lane)
                        if paper:
                            v, _, _ = egru_paper_value(
                                sums_in[flip + s], sums_in[flip + s + 2 * LANES],
                                sums_rec[s], sums_rec[s + 2 * LANES], c[p], y[p],
                            )  # fmt: skip
                        else:
                            v, _, _, _ = egru_value(
                                sums_in[flip + s], sums_in[flip + s + LANES], sums_in[flip + s + 2 * LANES],
                                sums_rec[s], sums_rec[s + LANES], sums_rec[s + 2 * LANES], c[p],
                            )  # fmt: skip
                        threshold, value, after = theta[own * LANES + lane], np.float32(0), v
                        if v > threshold:
                            value = v
                            if not paper:
                                after = v - threshold
                        store_relaxed(record + (row + batch + sample) * row_bytes + int64(4) * unit, value)
                        c[p], y[p] = after, value
                        if states != 0:
                            global_float32(states)[(row + sample) * n + unit] = after
                    own, item = int32(own + warps), int32(item + warps)

            # The input drive of the next step, while the others' events are on their way.
            t += 1
            if t < steps:
                flip = int32((t & 1) * sums_size)
                row = t * batch + first
                if x != 0:
                    if gather(
                        x + row * x_row_bytes, x_row_bytes, inputs, samples, x_segments,
                        list_at, counts_at, staged_at, totals_at, capacity, lane, warp, warps,
                    ):  # fmt: skip
                        global_int32(faults_at)[0] = 1
                        return
                    product(
                        way_in, in_values, in_table, bases_in_at, tiles, 0, 3, samples, inputs, width,
                        bias_in_at, sums_in_at + int64(4) * flip, list_at, counts_at, capacity, hits_at,
                        lane, warp, warps,
                    )  # fmt: skip
                else:
                    sample, own, gate, item = int32(0), int32(0), warp, warp
                    while True:
                        while gate >= 3:
                            gate = int32(gate - 3)
                            own = int32(own + 1)
                        while own >= tiles:
                            own = int32(own - tiles)
                            sample = int32(sample + 1)
                        if sample >= samples:
                            break
                        unit = int32((tile + own) * width + lane)
                        if lane < width and unit < n:
                            copy_later(
                                sums_in_at + int64(4) * (flip + item * LANES + lane),
                                drive + int64(4) * ((row + sample) * (3 * n) + gate * n + unit),
                            )
                        gate, item = int32(gate + warps), int32(item + warps)

        sample, own, item = int32(0), warp, warp
        while True:
            while own >= tiles:
                own = int32(own - tiles)
                sample = int32(sample + 1)
            if sample >= samples:
                break
            unit = int32((tile + own) * width + lane)
            if lane < width and unit < n:
                carried[(first + sample) * n + unit] = c[item * LANES + lane]
            own, item = int32(own + warps), int32(item + warps)

    return layers, types.void(*[types.int64] * 5)
