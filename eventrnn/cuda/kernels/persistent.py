"""The general plan: one persistent kernel for all layers and steps, any number of tiles and samples per block.

The kernel needs no grid barrier. Every output has its own word in an event log of the whole run, which is filled with
UNWRITTEN before the launch. A warp that needs a word polls it until it is written. No word is written twice, so no
buffer is recycled, and a layer follows the layer below as fast as its events arrive. All blocks must be resident at
the same time (cooperative launch).

Block  : owns `tiles` neighbouring tiles of up to 32 units of one layer, for `samples` samples (one row of the block
         table, `tables.LAYER` and following). It works out one step of all of them, then the next step.
Warp   : collects events of every `warps`-th (sample, segment of 128 units); computes every `warps`-th strip, that is
         (sample, tile, gate); updates every `warps`-th (sample, tile). These loops never divide: `next_item` carries
         from the inner counter to the outer one.
Thread : one of 32 outputs of a strip, one unit of a tile, four neighbouring units of a segment.

Each step equals `reference.step`: the drives equal `reference.propagate`, terms in ascending presynaptic order with
one FMA per term; cells and events follow the rules of `cells.py`, compiled for the GPU in `ptx.py`.

============= ======== =========================================================================================
array         memory   shape, dtype, contents
============= ======== =========================================================================================
event log     global   (steps + 1, batch, pitch) float32; row 0 is the state before the run, row t + 1 the output of
                       step t
gated         global   the same for r * y, where the reset gate comes first; row t belongs to step t
drive         global   (steps * batch, gates * units) float32, input drives of the first layer, complete before the
                       launch
cells         global   (batch, units) float32, state of the cells: read at the start, written at the end
states        global   (steps, batch, units) float32 cells after each step, or address 0
weights       shared   values and table of the block's strips (`packing.Strips`); in global memory (L2) if they do not
                       fit
bases         shared   (2, gates * tiles) int32, byte offset of each strip's values: recurrent, input
entries       shared   (samples, capacity) int64 event lists (`strip_product.py`); counts (samples,) int32
staged        shared   (samples * segments, 128) float32, outputs on their way from the event log to the lists
segment       shared   (samples * segments,) int32, number of events per segment
counts
hits          shared   per warp, scratch of `strip_product.py`
sums_in       shared   (2, samples, tiles, gates, 32) float32, input drives of this step and of the next one
sums_rec      shared   (samples, tiles, gates, 32) float32, recurrent drives
c, y          shared   (samples, tiles, 32) float32, cells and outputs
theta, bias   shared   (tiles, 32) and (2, tiles, gates, 32) float32, thresholds and biases of both drives
============= ======== =========================================================================================

Barriers: block barriers around the two phases of `collect_events` and after every phase that other warps read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import int32, int64, types

from eventrnn.cells import EQUATIONS
from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.cell_updates import UPDATES
from eventrnn.cuda.kernels.ptx import (
    copy_async,
    egru_reset_gate,
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

# The word of an event log that has not been written yet: a NaN that no GPU arithmetic produces (the GPU's own NaN is
# 0x7FFFFFFF) and that inputs may not contain.
UNWRITTEN = np.int32(-1)

# Polls of one word before the kernel sets the fault flag and stops instead of hanging; they take a few seconds.
MAX_POLLS = np.int32(1 << 23)


class Lane(NamedTuple):
    """Place of a thread in its block, int32 each."""

    #: lane of its warp, 0 to 31
    lane: Any
    #: warp of its block
    warp: Any
    #: warps of its block
    warps: Any


class EventLists(NamedTuple):
    """Addresses of the event lists of a block in shared memory; shapes are in the module docstring."""

    #: int64, address of `entries`
    entries_at: Any
    #: int64, address of `counts`
    counts_at: Any
    #: int64, address of `staged`
    staged_at: Any
    #: int64, address of the segment counts
    segment_counts_at: Any
    #: int32, entries that one sample's list has room for
    capacity: Any


class BlockWeights(NamedTuple):
    """The strips of one matrix that a block owns."""

    #: int32, layout code (`tables.layout_code`)
    layout: Any
    #: int64, address of the values, in shared or global memory
    values_at: Any
    #: int64, address of the table, in shared or global memory
    table_at: Any
    #: int64, address of `bases` in shared memory
    bases_at: Any
    #: int64, address of the biases in shared memory
    bias_at: Any
    #: int32, presynaptic units
    n_pre: Any
    #: int32, units per tile
    width: Any


@device_function
def next_item(outer, inner, size):
    """Carry from the inner counter to the outer one: (outer, inner) with 0 <= inner < size.

    A warp that adds a fixed stride to `inner` visits its share of (outer, inner) pairs without a division.
    """
    while inner >= size:
        inner = int32(inner - size)
        outer = int32(outer + 1)
    return outer, inner


@device_function
def poll_event_log(address, left):
    """Poll four neighbouring words of an event log until the first `left` of them are written.

    Returns the four values, zero from `left` on, and whether all were written within MAX_POLLS polls.
    """
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
def append_four(entries, p, at, a, b, c, d):
    """Write the non-zero of four neighbouring outputs, of units `at` to `at + 3`, as events from entries[p] on."""
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


@device_function
def count_four(a, b, c, d):
    """How many of four outputs are events."""
    return int32(int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0))


@device_function
def collect_events(row_at, pitch_bytes, n, samples, segments, lists, me):
    """Compact `samples` rows of an event log into lists of events in shared memory, in ascending order of units.

    row_at, pitch_bytes : address of the first row, bytes from one row to the next
    n, segments         : units of a row, segments of 128 units that they fill
    lists               : `EventLists`
    me                  : `Lane`

    Returns whether a word was not written in time. All threads of the block must call it; the lists are complete when
    it returns.
    """
    lane, warp, warps = me
    capacity = lists.capacity
    entries, counts = shared_int64(lists.entries_at), shared_int32(lists.counts_at)
    segment_counts, staged = shared_int32(lists.segment_counts_at), shared_float32(lists.staged_at)
    # First phase: wait for the outputs, keep them, count the events of each segment.
    missing, sample, segment, item = int32(0), int32(0), warp, warp
    while True:
        sample, segment = next_item(sample, segment, segments)
        if sample >= samples:
            break
        at = int32(segment * SEGMENT + 4 * lane)
        a = b = c = d = np.float32(0)
        if at < n:
            a, b, c, d, complete = poll_event_log(row_at + sample * pitch_bytes + int64(4) * at, int32(n - at))
            if not complete:
                missing = int32(1)
        own = int32(item * SEGMENT + lane)
        staged[own], staged[own + 32], staged[own + 64], staged[own + 96] = a, b, c, d
        total = sum_of_warp(count_four(a, b, c, d))
        if lane == 0:
            segment_counts[item] = total
        segment = int32(segment + warps)
        item = int32(item + warps)
    if cuda.syncthreads_or(missing):
        return True
    # Second phase: each lane writes its events behind those of earlier segments and of lower lanes.
    lanes_below = int32((int32(1) << lane) - 1)
    sample, segment, item = int32(0), warp, warp
    while True:
        sample, segment = next_item(sample, segment, segments)
        if sample >= samples:
            break
        before, s = int32(0), lane
        while s < segment:
            before = int32(before + segment_counts[item - segment + s])
            s = int32(s + LANES)
        before = sum_of_warp(before)
        own = int32(item * SEGMENT + lane)
        a, b, c, d = staged[own], staged[own + 32], staged[own + 64], staged[own + 96]
        n_events = count_four(a, b, c, d)
        p = int32(
            sample * capacity
            + before
            + popcount(cuda.ballot_sync(FULL_WARP, (n_events & 1) != 0) & lanes_below)
            + 2 * popcount(cuda.ballot_sync(FULL_WARP, (n_events & 2) != 0) & lanes_below)
            + 4 * popcount(cuda.ballot_sync(FULL_WARP, (n_events & 4) != 0) & lanes_below)
        )
        append_four(entries, p, int32(segment * SEGMENT + 4 * lane), a, b, c, d)
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
    """Copy `size` bytes, a multiple of 4, from global to shared memory; all threads of the block take part."""
    target, source = shared_int32(target_at), global_int32(source_at)
    word = thread
    while word < size >> 2:
        target[word] = source[word]
        word = int32(word + threads)


@device_function
def load_weights(
    layout,
    values_at,
    table_at,
    starts_at,
    first_tile,
    tiles,
    gates,
    n_pre,
    own_values,
    own_table,
    bases_at,
    thread,
    threads,
):
    """Copy the weights of the block's tiles to shared memory if their layout is RESIDENT.

    values_at, table_at, starts_at : addresses of the arrays of `packing.Strips` in global memory
    own_values, own_table          : addresses for them in shared memory
    bases_at                       : receives the byte offset of each strip's values from the first

    Returns the addresses of the block's values and table, wherever they are.
    """
    starts, bases = global_int64(starts_at), shared_int32(bases_at)
    first, last = first_tile * gates, (first_tile + tiles) * gates
    size = int64(4)
    if layout & tables.NARROW:
        size = int64(2)
    begin = starts[first]
    strip = thread
    while strip < last - first:
        bases[strip] = int32((starts[first + strip] - begin) * size)
        strip = int32(strip + threads)
    values_at += begin * size
    table_at += first * n_pre * 8
    if layout & tables.RESIDENT:
        copy_to_shared(own_values, values_at, (starts[last] - begin + LANES) * size, thread, threads)
        values_at = own_values
        if layout & tables.KINDS:
            copy_to_shared(own_table, table_at, (last - first) * n_pre * 8, thread, threads)
            table_at = own_table
    return values_at, table_at


def layers_kernel(kind: tuple[str, str], layouts: tuple[int, ...]):
    """The kernel of the general plan and its signature.

    kind    : name and variant of the cell of all layers of the launch
    layouts : layout codes of their matrices
    """
    strip_product = dispatch(layouts)
    equations = EQUATIONS[kind[0]][kind[1]]
    n_gates, reset_first, update = len(equations.gates), equations.reset_first, UPDATES[kind]
    # Gates whose recurrent drive uses the outputs of the step before. Where the reset gate comes first, the candidate
    # uses r * y instead.
    gates_from_outputs = n_gates - 1 if reset_first else n_gates

    @device_function
    def add_products(weights, sums_at, lists, first_gate, gates, tiles, samples, hits_at, me):
        """Drives of gates `first_gate` to `first_gate + gates - 1` of the block's tiles, from the current lists.

        weights : `BlockWeights`; lists : `EventLists`; sums_at : address of (samples, tiles, n_gates, 32)
        """
        lane, warp, warps = me
        bias, sums = shared_float32(weights.bias_at), shared_float32(sums_at)
        bases, counts = shared_int32(weights.bases_at), shared_int32(lists.counts_at)
        sample, tile, gate = int32(0), int32(0), warp
        while True:
            tile, gate = next_item(tile, gate, gates)
            sample, tile = next_item(sample, tile, tiles)
            if sample >= samples:
                break
            strip = int32(tile * n_gates + gate + first_gate)
            acc = strip_product(
                weights.layout,
                bias[strip * LANES + lane],
                weights.values_at + bases[strip],
                weights.table_at + int64(8) * (strip * weights.n_pre),
                weights.width,
                lane,
                lists.entries_at + int64(8) * (sample * lists.capacity),
                counts[sample],
                hits_at,
            )
            sums[(sample * tiles * n_gates + strip) * LANES + lane] = acc
            gate = int32(gate + warps)

    def layers(table_at, blocks_at, faults_at, steps, batch):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        me = Lane(lane, warp, warps)
        block = global_int64(blocks_at + int64(8 * tables.BLOCK_FIELDS) * cuda.blockIdx.x)
        layer = global_int64(table_at + int64(8 * tables.LAYER_FIELDS) * block[tables.LAYER])
        shared = shared_base()
        n, inputs, width = int32(layer[tables.UNITS]), int32(layer[tables.INPUTS]), int32(layer[tables.WIDTH])
        first_tile, tiles = block[tables.TILE], int32(block[tables.TILES])
        first_sample, samples = block[tables.SAMPLE], int32(block[tables.SAMPLES])
        event_log, gated, input_log = layer[tables.EVENT_LOG], layer[tables.GATED], layer[tables.INPUT_LOG]
        drive, states = layer[tables.DRIVE], layer[tables.STATES]
        row_bytes, input_row_bytes = 4 * layer[tables.PITCH], 4 * layer[tables.INPUT_PITCH]
        segments, input_segments = int32((n + SEGMENT - 1) >> 7), int32((inputs + SEGMENT - 1) >> 7)
        lists = EventLists(
            shared + block[tables.AT_LIST],
            shared + block[tables.AT_COUNTS],
            shared + block[tables.AT_STAGED],
            shared + block[tables.AT_SEGMENT_COUNTS],
            int32(block[tables.CAPACITY]),
        )
        hits_at = shared + block[tables.AT_HITS] + int64(tables.HIT_BUFFER_BYTES) * warp
        sums_in_at, sums_rec_at = shared + block[tables.AT_SUMS_IN], shared + block[tables.AT_SUMS_REC]
        sums_in, sums_rec = shared_float32(sums_in_at), shared_float32(sums_rec_at)
        sums_size = int32(samples * tiles * (n_gates * LANES))
        c, y = shared_float32(shared + block[tables.AT_CELLS]), shared_float32(shared + block[tables.AT_Y])
        theta_at, bias_in_at = shared + block[tables.AT_THRESHOLD], shared + block[tables.AT_BIAS]
        bias_rec_at = bias_in_at + int64(4 * n_gates * LANES) * tiles
        theta = shared_float32(theta_at)
        bases_rec_at = shared + block[tables.AT_BASES]
        bases_in_at = bases_rec_at + int64(4 * n_gates) * tiles

        strip_bytes = 4 * n_gates * LANES
        bias_bytes = int64(tiles) * strip_bytes
        copy_to_shared(bias_in_at, layer[tables.BIAS_IN] + first_tile * strip_bytes, bias_bytes, thread, threads)
        copy_to_shared(bias_rec_at, layer[tables.BIAS_REC] + first_tile * strip_bytes, bias_bytes, thread, threads)
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
            n_gates,
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
                n_gates,
                inputs,
                shared + block[tables.AT_VALUES_IN],
                shared + block[tables.AT_TABLE_IN],
                bases_in_at,
                thread,
                threads,
            )
        w_rec = BlockWeights(layout_rec, rec_values, rec_table, bases_rec_at, bias_rec_at, n, width)
        w_in = BlockWeights(layout_in, in_values, in_table, bases_in_at, bias_in_at, inputs, width)
        carried = global_float32(layer[tables.CELLS])
        sample, tile, item = int32(0), warp, warp
        while True:
            sample, tile = next_item(sample, tile, tiles)
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
                # The recurrent drives of this step.
                if collect_events(event_log + row * row_bytes, row_bytes, n, samples, segments, lists, me):
                    global_int32(faults_at)[0] = 1
                    return
                add_products(w_rec, sums_rec_at, lists, 0, gates_from_outputs, tiles, samples, hits_at, me)
                wait_for_copies()
                cuda.syncthreads()
                flip = int32((t & 1) * sums_size)
                if reset_first:
                    sample, tile, item = int32(0), warp, warp
                    while True:
                        sample, tile = next_item(sample, tile, tiles)
                        if sample >= samples:
                            break
                        unit = int32((first_tile + tile) * width + lane)
                        if lane < width and unit < n:
                            s = int32(item * (n_gates * LANES) + lane)
                            before, value = y[item * LANES + lane], np.float32(0)
                            if before != 0:
                                value = egru_reset_gate(sums_in[flip + s + LANES], sums_rec[s + LANES]) * before
                            store_relaxed(gated + (row + sample) * row_bytes + int64(4) * unit, value)
                        tile, item = int32(tile + warps), int32(item + warps)
                    if collect_events(gated + row * row_bytes, row_bytes, n, samples, segments, lists, me):
                        global_int32(faults_at)[0] = 1
                        return
                    add_products(w_rec, sums_rec_at, lists, 2, 1, tiles, samples, hits_at, me)
                    cuda.syncthreads()

                # Cells and events of this step.
                sample, tile, item = int32(0), warp, warp
                while True:
                    sample, tile = next_item(sample, tile, tiles)
                    if sample >= samples:
                        break
                    unit = int32((first_tile + tile) * width + lane)
                    if lane < width and unit < n:
                        s, p = int32(item * (n_gates * LANES) + lane), int32(item * LANES + lane)
                        value, after = update(
                            sums_in, flip + s, sums_rec, s, LANES, c[p], y[p], theta, tile * LANES + lane
                        )
                        store_relaxed(event_log + (row + batch + sample) * row_bytes + int64(4) * unit, value)
                        c[p], y[p] = after, value
                        if states != 0:
                            global_float32(states)[(row + sample) * n + unit] = after
                    tile, item = int32(tile + warps), int32(item + warps)

            # The input drives of the next step are computed while the outputs of the other blocks arrive.
            t += 1
            if t < steps:
                flip = int32((t & 1) * sums_size)
                row = t * batch + first_sample
                if input_log != 0:
                    if collect_events(
                        input_log + row * input_row_bytes, input_row_bytes, inputs, samples, input_segments, lists, me
                    ):
                        global_int32(faults_at)[0] = 1
                        return
                    add_products(w_in, sums_in_at + int64(4) * flip, lists, 0, n_gates, tiles, samples, hits_at, me)
                else:
                    sample, tile, gate, item = int32(0), int32(0), warp, warp
                    while True:
                        tile, gate = next_item(tile, gate, n_gates)
                        sample, tile = next_item(sample, tile, tiles)
                        if sample >= samples:
                            break
                        unit = int32((first_tile + tile) * width + lane)
                        if lane < width and unit < n:
                            copy_async(
                                sums_in_at + int64(4) * (flip + item * LANES + lane),
                                drive + int64(4) * ((row + sample) * (n_gates * n) + gate * n + unit),
                            )
                        gate, item = int32(gate + warps), int32(item + warps)

        sample, tile, item = int32(0), warp, warp
        while True:
            sample, tile = next_item(sample, tile, tiles)
            if sample >= samples:
                break
            unit = int32((first_tile + tile) * width + lane)
            if lane < width and unit < n:
                carried[(first_sample + sample) * n + unit] = c[item * LANES + lane]
            tile, item = int32(tile + warps), int32(item + warps)

    return layers, types.void(*[types.int64] * 5)
