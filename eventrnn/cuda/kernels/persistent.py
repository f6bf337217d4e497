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
    copy_async,
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
    wait_for_copies,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP, dispatch, pack_event, popcount
from eventrnn.cuda.tables import LANES, LIST_PAD, SEGMENT

# A NaN that no arithmetic of the GPU makes (its own is 0x7FFFFFFF) and no input may be: "not sent yet".
UNWRITTEN = np.int32(-1)

# Looks for one word; then the run is given up rather than hang. Seconds.
MAX_POLLS = np.int32(1 << 23)


@device_function
def poll_event_log(address, left):
    """The first `left` of four words of a record once they are there, zeros after them; and whether they came."""
    polls = int32(0)
    while True:
        a, b, c, d = load_relaxed4(address)
        if left < 2:
            b = int32(0)
        if left < 3:
            c = int32(0)
        if left < 4:
            d = int32(0)
        complete = a != UNWRITTEN and b != UNWRITTEN and c != UNWRITTEN and d != UNWRITTEN
        polls = int32(polls + 1)
        if complete or polls >= MAX_POLLS:
            return (
                libdevice.int_as_float(a),
                libdevice.int_as_float(b),
                libdevice.int_as_float(c),
                libdevice.int_as_float(d),
                complete,
            )


@device_function
def collect_events(
    row_at, pitch_bytes, n, samples, segments, list_at, counts_at, staged_at, totals_at, capacity, lane, warp, warps
):
    """Lists of who sent what, from `samples` rows of a record from `row_at` on, ascending; in shared memory.

    Returns whether some word never came. Every thread of the block takes part; lists are complete afterwards.
    """
    entries, counts, segment_counts = shared_int64(list_at), shared_int32(counts_at), shared_int32(totals_at)
    staged = shared_float32(staged_at)
    missing, sample, segment, item = int32(0), int32(0), warp, warp
    while True:
        while segment >= segments:
            segment = int32(segment - segments)
            sample = int32(sample + 1)
        if sample >= samples:
            break
        at = int32(segment * SEGMENT + 4 * lane)
        a = b = c = d = np.float32(0)
        if at < n:
            a, b, c, d, complete = poll_event_log(row_at + sample * pitch_bytes + int64(4) * at, int32(n - at))
            if not complete:
                missing = int32(1)
        tile = int32(item * SEGMENT + lane)
        staged[tile], staged[tile + 32], staged[tile + 64], staged[tile + 96] = a, b, c, d
        n_events = int32(int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0))
        total = sum_of_warp(n_events)
        if lane == 0:
            segment_counts[item] = total
        segment = int32(segment + warps)
        item = int32(item + warps)
    if cuda.syncthreads_or(missing):
        return True
    lanes_below = int32((int32(1) << lane) - 1)
    sample, segment, item = int32(0), warp, warp
    while True:
        while segment >= segments:
            segment = int32(segment - segments)
            sample = int32(sample + 1)
        if sample >= samples:
            break
        before, s = int32(0), lane
        while s < segment:
            before = int32(before + segment_counts[item - segment + s])
            s = int32(s + LANES)
        before = sum_of_warp(before)
        tile = int32(item * SEGMENT + lane)
        a, b, c, d = staged[tile], staged[tile + 32], staged[tile + 64], staged[tile + 96]
        n_events = int32(int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0))
        p = int32(
            sample * capacity
            + before
            + popcount(cuda.ballot_sync(FULL_WARP, (n_events & 1) != 0) & lanes_below)
            + 2 * popcount(cuda.ballot_sync(FULL_WARP, (n_events & 2) != 0) & lanes_below)
            + 4 * popcount(cuda.ballot_sync(FULL_WARP, (n_events & 4) != 0) & lanes_below)
        )
        at = int32(segment * SEGMENT + 4 * lane)
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
        if segment == segments - 1:
            count = int32(before + segment_counts[item])
            if lane == 0:
                counts[sample] = count
            if lane < LIST_PAD:
                entries[sample * capacity + count + lane] = int64(0)
        segment = int32(segment + warps)
        item = int32(item + warps)
    cuda.syncthreads()
    return False


@device_function
def copy_to_shared(target_at, source_at, size, thread, threads):
    """So many bytes, a multiple of 4, from global to shared memory."""
    target, source = shared_int32(target_at), global_int32(source_at)
    word = thread
    while word < size >> 2:
        target[word] = source[word]
        word = int32(word + threads)


@device_function
def load_weights(
    layout, values_at, table_at, starts_at, first_tile, tiles, n_pre, own_values, own_table, bases_at, thread, threads
):
    """Where the weights of the block's tiles begin, those that stay in shared memory brought there: values, table.

    `bases`: bytes from there to each strip's values.
    """
    starts, bases = global_int64(starts_at), shared_int32(bases_at)
    first_sample, last = first_tile * 3, (first_tile + tiles) * 3
    size = int64(4)
    if layout & tables.NARROW:
        size = int64(2)
    begin = starts[first_sample]
    strip = thread
    while strip < last - first_sample:
        bases[strip] = int32((starts[first_sample + strip] - begin) * size)
        strip = int32(strip + threads)
    values_at += begin * size
    table_at += first_sample * n_pre * 8
    if layout & tables.RESIDENT:
        copy_to_shared(own_values, values_at, (starts[last] - begin + LANES) * size, thread, threads)
        values_at = own_values
        if layout & tables.KINDS:
            copy_to_shared(own_table, table_at, (last - first_sample) * n_pre * 8, thread, threads)
            table_at = own_table
    return values_at, table_at


def layers_kernel(variant: str, layouts: tuple[int, ...]):
    """The kernel of a variant for networks whose matrices lie in those ways; and its signature."""
    strip_product = dispatch(layouts)
    paper = variant == "paper"
    first_cut = 2 if paper else 3

    @device_function
    def add_products(
        layout,
        values_at,
        table_at,
        bases_at,
        tiles,
        first_gate,
        gates,
        samples,
        n_pre,
        width,
        bias_at,
        sums_at,
        list_at,
        counts_at,
        capacity,
        hits_at,
        lane,
        warp,
        warps,
    ):
        """The drives of some gates of the block's tiles, from the lists that were gathered last."""
        bias, sums = shared_float32(bias_at), shared_float32(sums_at)
        bases, counts = shared_int32(bases_at), shared_int32(counts_at)
        sample, tile, gate = int32(0), int32(0), warp
        while True:
            while gate >= gates:
                gate = int32(gate - gates)
                tile = int32(tile + 1)
            while tile >= tiles:
                tile = int32(tile - tiles)
                sample = int32(sample + 1)
            if sample >= samples:
                break
            strip = int32(tile * 3 + gate + first_gate)
            acc = strip_product(
                layout,
                bias[strip * LANES + lane],
                values_at + bases[strip],
                table_at + int64(8) * (strip * n_pre),
                width,
                lane,
                shared_int64(list_at + int64(8) * (sample * capacity)),
                counts[sample],
                hits_at,
            )
            sums[(sample * tiles * 3 + strip) * LANES + lane] = acc
            gate = int32(gate + warps)

    def layers(table_at, blocks_at, faults_at, steps, batch):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        block = global_int64(blocks_at + int64(8 * tables.BLOCK_FIELDS) * cuda.blockIdx.x)
        layer = global_int64(table_at + int64(8 * tables.LAYER_FIELDS) * block[tables.LAYER])
        shared = shared_base()
        n, inputs, width = int32(layer[tables.UNITS]), int32(layer[tables.INPUTS]), int32(layer[tables.WIDTH])
        first_tile, tiles, first_sample, samples = (
            block[tables.TILE],
            int32(block[tables.TILES]),
            block[tables.SAMPLE],
            int32(block[tables.SAMPLES]),
        )
        event_log, gated, drive, input_log, states = (
            layer[tables.EVENT_LOG],
            layer[tables.GATED],
            layer[tables.DRIVE],
            layer[tables.INPUT_LOG],
            layer[tables.STATES],
        )
        row_bytes, input_row_bytes = 4 * layer[tables.PITCH], 4 * layer[tables.INPUT_PITCH]
        segments, input_segments = int32((n + SEGMENT - 1) >> 7), int32((inputs + SEGMENT - 1) >> 7)
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

        copy_to_shared(
            bias_in_at, layer[tables.BIAS_IN] + first_tile * (12 * LANES), int64(tiles) * (12 * LANES), thread, threads
        )
        copy_to_shared(
            bias_rec_at,
            layer[tables.BIAS_REC] + first_tile * (12 * LANES),
            int64(tiles) * (12 * LANES),
            thread,
            threads,
        )
        copy_to_shared(
            theta_at, layer[tables.THRESHOLD] + first_tile * (4 * LANES), int64(tiles) * (4 * LANES), thread, threads
        )
        layout_in, layout_rec = int32(layer[tables.IN_LAYOUT]), int32(layer[tables.REC_LAYOUT])
        rec_values, rec_table = load_weights(
            layout_rec,
            layer[tables.REC_VALUES],
            layer[tables.REC_TABLE],
            layer[tables.REC_STARTS],
            first_tile,
            tiles,
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
                first_tile,
                tiles,
                inputs,
                shared + block[tables.AT_VALUES_IN],
                shared + block[tables.AT_TABLE_IN],
                bases_in_at,
                thread,
                threads,
            )
        carried = global_float32(layer[tables.CELLS])
        sample, tile, item = int32(0), warp, warp
        while True:
            while tile >= tiles:
                tile = int32(tile - tiles)
                sample = int32(sample + 1)
            if sample >= samples:
                break
            unit = int32((first_tile + tile) * width + lane)
            if lane < width and unit < n:
                c[item * LANES + lane] = carried[(first_sample + sample) * n + unit]
                y[item * LANES + lane] = global_float32(event_log + (first_sample + sample) * row_bytes)[unit]
            tile, item = int32(tile + warps), int32(item + warps)
        cuda.syncthreads()

        t = int64(-1)
        while t < steps:
            row = t * batch + first_sample
            if t >= 0:
                # The recurrent drive of this step.
                if collect_events(
                    event_log + row * row_bytes,
                    row_bytes,
                    n,
                    samples,
                    segments,
                    list_at,
                    counts_at,
                    staged_at,
                    totals_at,
                    capacity,
                    lane,
                    warp,
                    warps,
                ):
                    global_int32(faults_at)[0] = 1
                    return
                add_products(
                    layout_rec,
                    rec_values,
                    rec_table,
                    bases_rec_at,
                    tiles,
                    0,
                    first_cut,
                    samples,
                    n,
                    width,
                    bias_rec_at,
                    sums_rec_at,
                    list_at,
                    counts_at,
                    capacity,
                    hits_at,
                    lane,
                    warp,
                    warps,
                )
                wait_for_copies()
                cuda.syncthreads()
                flip = int32((t & 1) * sums_size)
                if paper:
                    sample, tile, item = int32(0), warp, warp
                    while True:
                        while tile >= tiles:
                            tile = int32(tile - tiles)
                            sample = int32(sample + 1)
                        if sample >= samples:
                            break
                        unit = int32((first_tile + tile) * width + lane)
                        if lane < width and unit < n:
                            s = int32(item * (3 * LANES) + lane)
                            before, value = y[item * LANES + lane], np.float32(0)
                            if before != 0:
                                value = egru_reset_gate(sums_in[flip + s + LANES], sums_rec[s + LANES]) * before
                            store_relaxed(gated + (row + sample) * row_bytes + int64(4) * unit, value)
                        tile, item = int32(tile + warps), int32(item + warps)
                    if collect_events(
                        gated + row * row_bytes,
                        row_bytes,
                        n,
                        samples,
                        segments,
                        list_at,
                        counts_at,
                        staged_at,
                        totals_at,
                        capacity,
                        lane,
                        warp,
                        warps,
                    ):
                        global_int32(faults_at)[0] = 1
                        return
                    add_products(
                        layout_rec,
                        rec_values,
                        rec_table,
                        bases_rec_at,
                        tiles,
                        2,
                        1,
                        samples,
                        n,
                        width,
                        bias_rec_at,
                        sums_rec_at,
                        list_at,
                        counts_at,
                        capacity,
                        hits_at,
                        lane,
                        warp,
                        warps,
                    )
                    cuda.syncthreads()

                # Cells and events.
                sample, tile, item = int32(0), warp, warp
                while True:
                    while tile >= tiles:
                        tile = int32(tile - tiles)
                        sample = int32(sample + 1)
                    if sample >= samples:
                        break
                    unit = int32((first_tile + tile) * width + lane)
                    if lane < width and unit < n:
                        s, p = int32(item * (3 * LANES) + lane), int32(item * LANES + lane)
                        if paper:
                            v, _, _ = egru_paper_value(
                                sums_in[flip + s],
                                sums_in[flip + s + 2 * LANES],
                                sums_rec[s],
                                sums_rec[s + 2 * LANES],
                                c[p],
                                y[p],
                            )
                        else:
                            v, _, _, _ = egru_value(
                                sums_in[flip + s],
                                sums_in[flip + s + LANES],
                                sums_in[flip + s + 2 * LANES],
                                sums_rec[s],
                                sums_rec[s + LANES],
                                sums_rec[s + 2 * LANES],
                                c[p],
                            )
                        threshold, value, after = theta[tile * LANES + lane], np.float32(0), v
                        if v > threshold:
                            value = v
                            if not paper:
                                after = v - threshold
                        store_relaxed(event_log + (row + batch + sample) * row_bytes + int64(4) * unit, value)
                        c[p], y[p] = after, value
                        if states != 0:
                            global_float32(states)[(row + sample) * n + unit] = after
                    tile, item = int32(tile + warps), int32(item + warps)

            # The input drive of the next step, while the others' events are on their way.
            t += 1
            if t < steps:
                flip = int32((t & 1) * sums_size)
                row = t * batch + first_sample
                if input_log != 0:
                    if collect_events(
                        input_log + row * input_row_bytes,
                        input_row_bytes,
                        inputs,
                        samples,
                        input_segments,
                        list_at,
                        counts_at,
                        staged_at,
                        totals_at,
                        capacity,
                        lane,
                        warp,
                        warps,
                    ):
                        global_int32(faults_at)[0] = 1
                        return
                    add_products(
                        layout_in,
                        in_values,
                        in_table,
                        bases_in_at,
                        tiles,
                        0,
                        3,
                        samples,
                        inputs,
                        width,
                        bias_in_at,
                        sums_in_at + int64(4) * flip,
                        list_at,
                        counts_at,
                        capacity,
                        hits_at,
                        lane,
                        warp,
                        warps,
                    )
                else:
                    sample, tile, gate, item = int32(0), int32(0), warp, warp
                    while True:
                        while gate >= 3:
                            gate = int32(gate - 3)
                            tile = int32(tile + 1)
                        while tile >= tiles:
                            tile = int32(tile - tiles)
                            sample = int32(sample + 1)
                        if sample >= samples:
                            break
                        unit = int32((first_tile + tile) * width + lane)
                        if lane < width and unit < n:
                            copy_async(
                                sums_in_at + int64(4) * (flip + item * LANES + lane),
                                drive + int64(4) * ((row + sample) * (3 * n) + gate * n + unit),
                            )
                        gate, item = int32(gate + warps), int32(item + warps)

        sample, tile, item = int32(0), warp, warp
        while True:
            while tile >= tiles:
                tile = int32(tile - tiles)
                sample = int32(sample + 1)
            if sample >= samples:
                break
            unit = int32((first_tile + tile) * width + lane)
            if lane < width and unit < n:
                carried[(first_sample + sample) * n + unit] = c[item * LANES + lane]
            tile, item = int32(tile + warps), int32(item + warps)

    return layers, types.void(*[types.int64] * 5)
