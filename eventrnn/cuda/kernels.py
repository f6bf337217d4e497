"""The kernels: `layers` runs all layers and steps in one launch, `products` and `compact` serve what need not wait.

Nobody waits at a grid barrier. What a unit sends at step t goes to its own word in a record of the whole run, which
starts out full of a value that no unit can send; who needs the word looks until it is there. So there is nothing to
take back, nothing to overwrite too early, and layers follow each other as fast as their data comes.

Threads: a warp walks a strip (see `packing.py`), a lane an output; terms in ascending order, one FMA a term.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.packing import DENSE, LANES
from eventrnn.cuda.ptx import (
    add_relaxed,
    egru_paper_value,
    egru_reset_gate,
    egru_value,
    global_float32,
    global_int32,
    global_int64,
    global_uint16,
    load_relaxed4,
    shared_base,
    shared_float32,
    shared_int32,
    shared_uint16,
    store_relaxed,
    sum_of_warp,
)

ALL = np.uint32(0xFFFFFFFF)
# A NaN that no arithmetic of the GPU makes (its own is 0x7FFFFFFF) and no input may be: "not sent yet".
NOT_YET = np.int32(-1)
# Seconds of looking; then the run is given up rather than hang.
PATIENCE = np.int32(1 << 23)
SEGMENT = 128
# Held hits of a strip, and a group beyond.
HELD, GROUP = 64, 8
LIST_SPARE = 16

# Columns of the layer table, all int64; addresses unless said otherwise.
(
    UNITS, INPUTS, WIDTH, PITCH,  # numbers
    X, X_PITCH,  # values from below, or 0 where DRIVE holds the finished products
    DRIVE, RECORD, GATED, CELLS, STATES, THRESHOLD, BIAS_IN, BIAS_REC,
    IN_MODE, IN_VALUES, IN_TABLE, IN_STARTS,
    REC_MODE, REC_VALUES, REC_TABLE, REC_STARTS,
    LAYER_FIELDS,
) = range(23)  # fmt: skip
# Columns of the block table: what the block owns, then byte offsets in its shared memory.
(
    LAYER, TILE, TILES, SAMPLE, SAMPLES,
    AT_VALUES_IN, AT_TABLE_IN, AT_VALUES_REC, AT_TABLE_REC,
    AT_IDS, AT_SENT, AT_COUNTS, AT_STAGED, AT_TOTALS, AT_HITS,
    AT_SUMS_IN, AT_SUMS_REC, AT_CELLS, AT_Y, AT_THRESHOLD, AT_BIAS,
    CAPACITY,
    BLOCK_FIELDS,
) = range(23)  # fmt: skip

# How a matrix lies: its kind, whether its values are bfloat16, whether it is in shared memory.
MODES = 8


def mode(kind: int, narrow: bool, resident: bool) -> int:
    """The number of a way that a matrix lies."""
    return kind + 2 * narrow + 4 * resident


def _walker(way: int):
    """The device function that walks one strip that way: acc + sum over events of weight * value, ascending."""
    kind, narrow, resident = way & 1, way & 2, way & 4
    if narrow:
        pointer = shared_uint16 if resident else global_uint16

        @device_function
        def weight(values, at):
            return libdevice.int_as_float(int32(values[at]) << int32(16))
    else:
        pointer = shared_float32 if resident else global_float32

        @device_function
        def weight(values, at):
            return values[at]

    words_of = shared_int32 if resident else global_int32

    @device_function
    def dense(acc, values_at, table_at, width, lane, ids, sent, count, hits_at):
        values = pointer(values_at)
        e = int32(0)
        while e < count:
            for k in range(GROUP):
                acc = cuda.fma(weight(values, ids[e + k] * width + lane), sent[e + k], acc)
            e += int32(GROUP)
        return acc

    @device_function
    def masked(acc, values_at, table_at, width, lane, ids, sent, count, hits_at):
        values, table = pointer(values_at), words_of(table_at)
        masks, firsts = shared_int32(hits_at), shared_int32(hits_at + 4 * (HELD + GROUP))
        sizes = shared_float32(hits_at + 8 * (HELD + GROUP))
        below = (int32(1) << lane) - int32(1)
        held, e0 = int32(0), int32(0)
        while e0 < count:
            e = e0 + lane
            word = int32(0)
            if e < count:
                j = ids[e]
                word = table[j + j]
                if word != 0:
                    first, size = table[j + j + 1], sent[e]
            hit = cuda.ballot_sync(ALL, word != 0)
            if word != 0:
                p = held + cuda.popc(hit & below)
                masks[p], firsts[p], sizes[p] = word, first, size
            held += cuda.popc(hit)
            e0 += int32(LANES)
            if held > HELD - LANES or e0 >= count:
                if lane < GROUP:
                    masks[held + lane] = 0
                cuda.syncwarp(ALL)
                h = int32(0)
                while h < held:
                    for k in range(GROUP):
                        mask = masks[h + k]
                        if (mask >> lane) & int32(1):
                            at = firsts[h + k] + cuda.popc(mask & below)
                            acc = cuda.fma(weight(values, at), sizes[h + k], acc)
                    h += int32(GROUP)
                cuda.syncwarp(ALL)
                held = int32(0)
        return acc

    return dense if kind == DENSE else masked


def _choose(ways: tuple[int, ...]):
    """The device function that walks a strip whichever of those ways its matrix lies."""
    walk = _walker(ways[0])
    if len(ways) == 1:

        @device_function
        def only(way, acc, values_at, table_at, width, lane, ids, sent, count, hits_at):
            return walk(acc, values_at, table_at, width, lane, ids, sent, count, hits_at)

        return only
    first, others = int32(ways[0]), _choose(ways[1:])

    @device_function
    def either(way, acc, values_at, table_at, width, lane, ids, sent, count, hits_at):
        if way == first:
            return walk(acc, values_at, table_at, width, lane, ids, sent, count, hits_at)
        return others(way, acc, values_at, table_at, width, lane, ids, sent, count, hits_at)

    return either


@device_function
def look(address, at, n):
    """Four words of a record once those below n are there; and whether they came at all."""
    tries = int32(0)
    while True:
        a, b, c, d = load_relaxed4(address)
        here = a != NOT_YET and (b != NOT_YET or at + int32(1) >= n)
        here = here and (c != NOT_YET or at + int32(2) >= n) and (d != NOT_YET or at + int32(3) >= n)
        tries += int32(1)
        if here or tries >= PATIENCE:
            return (
                libdevice.int_as_float(a), libdevice.int_as_float(b),
                libdevice.int_as_float(c), libdevice.int_as_float(d), here,
            )  # fmt: skip


@device_function
def gather(record, row, pitch, n, samples, shared, block, thread, threads):
    """Lists of who sent what, from `samples` rows of a record: counts, ids, sent in shared memory, ascending.

    Returns whether some word never came. Every thread of the block takes part; lists are complete afterwards.
    """
    ids, sent = shared_int32(shared + block[AT_IDS]), shared_float32(shared + block[AT_SENT])
    counts, totals = shared_int32(shared + block[AT_COUNTS]), shared_int32(shared + block[AT_TOTALS])
    staged = shared_float32(shared + block[AT_STAGED])
    capacity = int32(block[CAPACITY])
    lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
    segments = (n + int32(SEGMENT - 1)) // int32(SEGMENT)
    lost = int32(0)
    item = warp
    while item < samples * segments:
        sample = item // segments
        at = (item - sample * segments) * int32(SEGMENT) + int32(4) * lane
        a = b = c = d = np.float32(0)
        if at < n:
            a, b, c, d, here = look(record + int64(4) * ((row + sample) * pitch + at), at, n)
            if not here:
                lost = int32(1)
            if at + int32(1) >= n:
                b = np.float32(0)
            if at + int32(2) >= n:
                c = np.float32(0)
            if at + int32(3) >= n:
                d = np.float32(0)
        own = item * int32(SEGMENT) + lane
        staged[own], staged[own + 32], staged[own + 64], staged[own + 96] = a, b, c, d
        found = int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0)
        total = sum_of_warp(found)
        if lane == 0:
            totals[item] = total
        item += warps
    if cuda.syncthreads_or(lost):
        return True
    item = warp
    below = (int32(1) << lane) - int32(1)
    while item < samples * segments:
        sample = item // segments
        segment = item - sample * segments
        before, s = int32(0), lane
        while s < segment:
            before += totals[item - segment + s]
            s += int32(LANES)
        before = sum_of_warp(before)
        own = item * int32(SEGMENT) + lane
        a, b, c, d = staged[own], staged[own + 32], staged[own + 64], staged[own + 96]
        found = int32(a != 0) + int32(b != 0) + int32(c != 0) + int32(d != 0)
        p = sample * capacity + before + cuda.popc(cuda.ballot_sync(ALL, (found & 1) != 0) & below)
        p += int32(2) * cuda.popc(cuda.ballot_sync(ALL, (found & 2) != 0) & below)
        p += int32(4) * cuda.popc(cuda.ballot_sync(ALL, (found & 4) != 0) & below)
        at = segment * int32(SEGMENT) + int32(4) * lane
        if a != 0:
            ids[p], sent[p] = at, a
            p += int32(1)
        if b != 0:
            ids[p], sent[p] = at + int32(1), b
            p += int32(1)
        if c != 0:
            ids[p], sent[p] = at + int32(2), c
            p += int32(1)
        if d != 0:
            ids[p], sent[p] = at + int32(3), d
        if segment == segments - 1:
            total = before + totals[item]
            if lane == 0:
                counts[sample] = total
            if lane < LIST_SPARE:
                ids[sample * capacity + total + lane], sent[sample * capacity + total + lane] = 0, np.float32(0)
        item += warps
    cuda.syncthreads()
    return False


@device_function
def copy_in(target_at, source_at, size, thread, threads):
    """So many bytes, a multiple of 4, from global to shared memory."""
    target, source = shared_int32(target_at), global_int32(source_at)
    k = thread
    while k < size // 4:
        target[k] = source[k]
        k += threads


def layers_kernel(variant: str, ways: tuple[int, ...]):
    """The kernel of a variant for networks whose matrices lie in those ways; and its signature."""
    walk = _choose(ways)
    paper = variant == "paper"
    cut = 2 if paper else 3

    @device_function
    def product(
        way, values_at, table_at, strip_values, strip_table, starts, tile, tiles, first_gate, last_gate,
        samples, n_pre, width, bias_at, sums_at, shared, block, thread, threads,
    ):  # fmt: skip
        """The drives of some gates of every tile of the block, from the lists that were gathered last."""
        bias, sums = shared_float32(bias_at), shared_float32(sums_at)
        counts, capacity = shared_int32(shared + block[AT_COUNTS]), block[CAPACITY]
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        hits_at = shared + block[AT_HITS] + int64(12 * (HELD + GROUP)) * warp
        gates = int32(last_gate - first_gate)
        item = warp
        while item < samples * tiles * gates:
            sample = item // (tiles * gates)
            rest = item - sample * tiles * gates
            own = rest // gates
            gate = rest - own * gates + int32(first_gate)
            strip = own * int32(3) + gate
            list_at = shared + int64(4) * sample * capacity
            base = starts[tile * 3 + strip] - starts[tile * 3]
            acc = walk(
                way, bias[strip * int32(LANES) + lane], values_at + base * strip_values,
                table_at + int64(8) * strip * n_pre, width, lane,
                shared_int32(list_at + block[AT_IDS]), shared_float32(list_at + block[AT_SENT]), counts[sample],
                hits_at,
            )  # fmt: skip
            sums[(sample * tiles * int32(3) + strip) * int32(LANES) + lane] = acc
            item += warps

    def layers(table_at, blocks_at, faults_at, steps, batch):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        block = global_int64(blocks_at + int64(8 * BLOCK_FIELDS) * cuda.blockIdx.x)
        layer = global_int64(table_at + int64(8 * LAYER_FIELDS) * block[LAYER])
        shared = shared_base()
        n, inputs, width, pitch = int32(layer[UNITS]), int32(layer[INPUTS]), int32(layer[WIDTH]), layer[PITCH]
        tile, tiles, first, samples = block[TILE], int32(block[TILES]), block[SAMPLE], int32(block[SAMPLES])
        record, gated, drive, x = layer[RECORD], layer[GATED], layer[DRIVE], layer[X]
        sums_in_at, sums_rec_at = shared + block[AT_SUMS_IN], shared + block[AT_SUMS_REC]
        sums_in, sums_rec = shared_float32(sums_in_at), shared_float32(sums_rec_at)
        sums_size = samples * tiles * int32(3 * LANES)
        c, y = shared_float32(shared + block[AT_CELLS]), shared_float32(shared + block[AT_Y])
        theta = shared_float32(shared + block[AT_THRESHOLD])
        bias_in_at = shared + block[AT_BIAS]
        bias_rec_at = bias_in_at + int64(4 * 3 * LANES) * tiles
        last_strip = (tile + tiles) * 3

        # What stays in shared memory.
        copy_in(bias_in_at, layer[BIAS_IN] + tile * (4 * 3 * LANES), tiles * (4 * 3 * LANES), thread, threads)
        copy_in(bias_rec_at, layer[BIAS_REC] + tile * (4 * 3 * LANES), tiles * (4 * 3 * LANES), thread, threads)
        copy_in(
            shared + block[AT_THRESHOLD], layer[THRESHOLD] + tile * (4 * LANES), tiles * (4 * LANES), thread, threads
        )
        way_in, way_rec = int32(layer[IN_MODE]), int32(layer[REC_MODE])
        in_starts, rec_starts = global_int64(layer[IN_STARTS]), global_int64(layer[REC_STARTS])
        in_bytes, rec_bytes = int64(4), int64(4)
        if way_in & 2:
            in_bytes = int64(2)
        if way_rec & 2:
            rec_bytes = int64(2)
        rec_values, rec_table = layer[REC_VALUES], layer[REC_TABLE]
        rec_first = rec_starts[tile * 3]
        rec_values += rec_first * rec_bytes
        rec_table += tile * 3 * n * 8
        if way_rec & 4:
            size = ((rec_starts[last_strip] - rec_first + LANES) * rec_bytes) // 4 * 4
            copy_in(shared + block[AT_VALUES_REC], rec_values, size, thread, threads)
            rec_values = shared + block[AT_VALUES_REC]
            if way_rec & 1:
                copy_in(shared + block[AT_TABLE_REC], rec_table, tiles * int64(24) * n, thread, threads)
                rec_table = shared + block[AT_TABLE_REC]
        in_values, in_table = layer[IN_VALUES], layer[IN_TABLE]
        if x != 0:
            in_first = in_starts[tile * 3]
            in_values += in_first * in_bytes
            in_table += tile * 3 * inputs * 8
            if way_in & 4:
                size = ((in_starts[last_strip] - in_first + LANES) * in_bytes) // 4 * 4
                copy_in(shared + block[AT_VALUES_IN], in_values, size, thread, threads)
                in_values = shared + block[AT_VALUES_IN]
                if way_in & 1:
                    copy_in(shared + block[AT_TABLE_IN], in_table, tiles * int64(24) * inputs, thread, threads)
                    in_table = shared + block[AT_TABLE_IN]
        carried = global_float32(layer[CELLS])
        item = warp
        while item < samples * tiles:
            sample = item // tiles
            own = item - sample * tiles
            unit = int32(tile + own) * width + lane
            if lane < width and unit < n:
                c[item * int32(LANES) + lane] = carried[(first + sample) * n + unit]
                y[item * int32(LANES) + lane] = global_float32(record)[(first + sample) * pitch + unit]
            item += warps
        cuda.syncthreads()

        for t in range(-1, steps):
            if t >= 0:
                # The recurrent drive of this step.
                if gather(record, t * batch + first, pitch, n, samples, shared, block, thread, threads):
                    global_int32(faults_at)[0] = 1
                    return
                product(
                    way_rec, rec_values, rec_table, rec_bytes, 0, rec_starts, tile, tiles, 0, cut, samples, n, width,
                    bias_rec_at, sums_rec_at, shared, block, thread, threads,
                )  # fmt: skip
                cuda.syncthreads()
                flip = int32(t & 1) * sums_size
                if paper:
                    item = warp
                    while item < samples * tiles:
                        sample = item // tiles
                        own = item - sample * tiles
                        unit = int32(tile + own) * width + lane
                        if lane < width and unit < n:
                            k = item * int32(3 * LANES) + lane
                            before = y[item * int32(LANES) + lane]
                            reset = egru_reset_gate(sums_in[flip + k + LANES], sums_rec[k + LANES])
                            value = np.float32(0)
                            if before != 0:
                                value = reset * before
                            store_relaxed(gated + 4 * ((t * batch + first + sample) * pitch + unit), value)
                        item += warps
                    if gather(gated, t * batch + first, pitch, n, samples, shared, block, thread, threads):
                        global_int32(faults_at)[0] = 1
                        return
                    product(
                        way_rec, rec_values, rec_table, rec_bytes, 0, rec_starts, tile, tiles, 2, 3, samples, n,
                        width, bias_rec_at, sums_rec_at, shared, block, thread, threads,
                    )  # fmt: skip
                    cuda.syncthreads()

                # Cells and events.
                item = warp
                while item < samples * tiles:
                    sample = item // tiles
                    own = item - sample * tiles
                    unit = int32(tile + own) * width + lane
                    if lane < width and unit < n:
                        k, p = item * int32(3 * LANES) + lane, item * int32(LANES) + lane
                        threshold = theta[own * int32(LANES) + lane]
                        if paper:
                            v, _, _ = egru_paper_value(
                                sums_in[flip + k], sums_in[flip + k + 2 * LANES],
                                sums_rec[k], sums_rec[k + 2 * LANES], c[p], y[p],
                            )  # fmt: skip
                        else:
                            v, _, _, _ = egru_value(
                                sums_in[flip + k], sums_in[flip + k + LANES], sums_in[flip + k + 2 * LANES],
                                sums_rec[k], sums_rec[k + LANES], sums_rec[k + 2 * LANES], c[p],
                            )  # fmt: skip
                        value, after = np.float32(0), v
                        if v > threshold:
                            value = v
                            if not paper:
                                after = v - threshold
                        store_relaxed(record + 4 * (((t + 1) * batch + first + sample) * pitch + unit), value)
                        c[p], y[p] = after, value
                        if layer[STATES] != 0:
                            global_float32(layer[STATES])[(t * batch + first + sample) * n + unit] = after
                    item += warps

            # The input drive of the next step, while the others' events are on their way.
            if t + 1 < steps:
                flip = int32((t + 1) & 1) * sums_size
                row = (t + 1) * batch + first
                if x != 0:
                    if gather(x, row, layer[X_PITCH], inputs, samples, shared, block, thread, threads):
                        global_int32(faults_at)[0] = 1
                        return
                    product(
                        way_in, in_values, in_table, in_bytes, 0, in_starts, tile, tiles, 0, 3, samples, inputs,
                        width, bias_in_at, sums_in_at + int64(4) * flip, shared, block, thread, threads,
                    )  # fmt: skip
                else:
                    drives = global_float32(drive)
                    item = warp
                    while item < samples * tiles * int32(3):
                        sample = item // (tiles * int32(3))
                        strip = item - sample * tiles * int32(3)
                        own = strip // int32(3)
                        unit = int32(tile + own) * width + lane
                        if lane < width and unit < n:
                            column = (strip - own * int32(3)) * n + unit
                            sums_in[flip + item * int32(LANES) + lane] = drives[(row + sample) * (3 * n) + column]
                        item += warps

        item = warp
        while item < samples * tiles:
            sample = item // tiles
            own = item - sample * tiles
            unit = int32(tile + own) * width + lane
            if lane < width and unit < n:
                carried[(first + sample) * n + unit] = c[item * int32(LANES) + lane]
            item += warps

    return layers, types.void(*[types.int64] * 5)


def products_kernel(way: int, gates: int):
    """Products that wait for nothing: drive = bias + sum over the row's events of weight * value; and its signature.

    A block owns one strip for every `splits`-th row, a warp a row at a time.
    """
    walk = _walker(way)

    def products(
        values_at, table_at, starts_at, bias_at, n_pre, units, width, indptr_at, counts_at, ids_at, sent_at, row_of_at,
        rows, splits, out_at, resident_table,
    ):  # fmt: skip
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        strip, split = cuda.blockIdx.x // splits, cuda.blockIdx.x % splits
        tile = strip // gates
        gate = strip - tile * gates
        starts, shared = global_int64(starts_at), shared_base()
        bytes_each = int64(4)
        if way & 2:
            bytes_each = int64(2)
        values_at += starts[strip] * bytes_each
        table_at += strip * n_pre * 8
        hits_at = shared + int64(12 * (HELD + GROUP)) * warp
        if way & 4:
            base = shared + int64(12 * (HELD + GROUP)) * warps
            size = ((starts[strip + 1] - starts[strip] + LANES) * bytes_each) // 4 * 4
            copy_in(base + resident_table, values_at, size, thread, threads)
            values_at = base + resident_table
            if way & 1:
                copy_in(base, table_at, int64(8) * n_pre, thread, threads)
                table_at = base
            cuda.syncthreads()
        unit = int32(tile) * int32(width) + lane
        bias, out = global_float32(bias_at), global_float32(out_at)
        row = split * warps + warp
        while row < rows:
            source = row
            if row_of_at != 0:
                source = global_int64(row_of_at)[row]
            begin = global_int64(indptr_at)[source]
            count = int32(global_int32(counts_at)[source])
            acc = walk(
                bias[strip * LANES + lane], values_at, table_at, int32(width), lane,
                global_int32(ids_at + 4 * begin), global_float32(sent_at + 4 * begin), count, hits_at,
            )  # fmt: skip
            if lane < width and unit < units:
                out[row * (gates * units) + gate * units + unit] = acc
            row += splits * warps

    return products, types.void(*[types.int64] * 16)


def compact_kernel():
    """Lists of events from rows of a record, a warp a row; and its signature."""

    def compact(record_at, pitch, n, rows, indptr_at, counts_at, ids_at, sent_at, capacity):
        thread = int32(cuda.threadIdx.x)
        lane = thread & int32(31)
        row = int64(cuda.blockIdx.x) * (cuda.blockDim.x // LANES) + (thread >> int32(5))
        if row >= rows:
            return
        below = (int32(1) << lane) - int32(1)
        record = global_float32(record_at + 4 * row * pitch)
        begin, end = row * capacity, row * capacity
        ids, sent = global_int32(ids_at), global_float32(sent_at)
        at = int64(0)
        while at < n:
            value = np.float32(0)
            if at + lane < n:
                value = record[at + lane]
            found = cuda.ballot_sync(ALL, value != 0)
            if value != 0:
                p = end + cuda.popc(found & below)
                ids[p], sent[p] = at + lane, value
            end += cuda.popc(found)
            at += LANES
        if lane < LIST_SPARE:
            ids[end + lane], sent[end + lane] = 0, np.float32(0)
        if lane == 0:
            global_int64(indptr_at)[row] = begin
            global_int32(counts_at)[row] = end - begin

    return compact, types.void(*[types.int64] * 9)


def tally_kernel():
    """How often each unit of a record sent a graded or a binary value, added to two int64 vectors; its signature.

    A thread takes one unit and every `gridDim.y`-th row. Whole numbers: the order of adding changes nothing.
    """

    def tally(record_at, pitch, n, rows, graded_at, binary_at):
        unit = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if unit >= n:
            return
        record = global_float32(record_at)
        graded = binary = int64(0)
        row = int64(cuda.blockIdx.y)
        while row < rows:
            value = record[row * pitch + unit]
            if value != 0:
                if value == 1:
                    binary += 1
                else:
                    graded += 1
            row += cuda.gridDim.y
        add_relaxed(graded_at + 8 * unit, graded)
        add_relaxed(binary_at + 8 * unit, binary)

    return tally, types.void(*[types.int64] * 6)
