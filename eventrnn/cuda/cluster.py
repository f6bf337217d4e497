"""The kernel `layers` for clusters of blocks that write into each other's shared memory.

A stream group of a layer lives in one cluster. Every block keeps all outputs of the layer's last step; who has worked
out a tile writes its 32 outputs into all blocks, whose barriers count the bytes. There is no list of events: a warp
looks up the units that reach its strip, and walks those that sent. So it is for sparse weights.

A unit of work is a tile of one stream: three warps walk its recurrent strips, three more those of its input, one step
ahead; they meet at a barrier of their own. The warp of the candidate has the cells.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables as k
from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels import NOT_YET, PATIENCE, copy_in
from eventrnn.cuda.ptx import (
    arrived,
    barrier_init,
    barrier_init_done,
    cluster_arrive,
    cluster_rank,
    cluster_wait,
    egru_reset_gate,
    egru_value_of_gates,
    expect,
    global_float32,
    global_int32,
    global_int64,
    load_early,
    load_narrow,
    load_relaxed,
    load_shared,
    load_shared2,
    load_shared4,
    load_shared_float,
    load_shared_narrow,
    meet,
    of_rank,
    send4,
    shared_base,
    store_relaxed,
    store_shared2,
    store_shared_float,
)
from eventrnn.cuda.tables import CLUSTER_HELD, HIT_SIZE, LANES, LIST_PAD, LOOKED, MASKED, NARROW, RESIDENT
from eventrnn.cuda.walks import ALL, count_bits

TILE_BYTES = 4 * LANES


@device_function
def bits_of(x):
    """A float as an int32."""
    return libdevice.float_as_int(x)


@device_function
def wait(barrier, parity, patience):
    """Until the phase of that parity is over; False where it never was."""
    tries = int32(0)
    while arrived(barrier, parity) == 0:
        tries = int32(tries + 1)
        if tries >= patience:
            return False
    return True


def finder(fetch4):
    """The device function that holds the hits among the next 128 units that a strip has."""

    @device_function
    def hold(hits_at, held, value, words_at, at, below):
        hit = cuda.ballot_sync(ALL, value != 0)
        if value != 0:
            p = int32(held + count_bits(hit & below))
            store_shared2(int32(hits_at + HIT_SIZE * p), int32(words_at + 8 * at), bits_of(value))
        return int32(held + count_bits(hit))

    @device_function
    def find(row_at, o, words_at, at, hits_at, held, below, patience):
        a, b, c, d, came = fetch4(row_at, o[0], o[1], o[2], o[3], patience)
        held = hold(hits_at, held, a, words_at, at, below)
        held = hold(hits_at, held, b, words_at, int32(at + 32), below)
        held = hold(hits_at, held, c, words_at, int32(at + 64), below)
        held = hold(hits_at, held, d, words_at, int32(at + 96), below)
        return held, came

    return find


@device_function
def offset_at(units_at, at, count):
    """Where a unit of the table is in a row, -1 beyond its end."""
    offset = int32(-1)
    if at < count:
        offset = load_shared(int32(units_at + 4 * at))
    return offset


@device_function
def offsets4(units_at, at, count):
    """Of this lane's next four."""
    return (
        offset_at(units_at, at, count), offset_at(units_at, int32(at + 32), count),
        offset_at(units_at, int32(at + 64), count), offset_at(units_at, int32(at + 96), count),
    )  # fmt: skip


@device_function
def own_or_zero(row_at, offset):
    """What a unit sent, from this block's shared memory."""
    value = np.float32(0)
    if offset >= 0:
        value = load_shared_float(int32(row_at + offset))
    return value


@device_function
def fetch_shared(row_at, one, two, three, four, patience):
    """What four units sent; all there."""
    return (
        own_or_zero(row_at, one),
        own_or_zero(row_at, two),
        own_or_zero(row_at, three),
        own_or_zero(row_at, four),
        True,
    )


@device_function
def or_zero(word, offset):
    """An output as it was loaded, zero where there is no unit."""
    if offset < 0:
        word = int32(0)
    return libdevice.int_as_float(word)


@device_function
def fetch_record(row_at, one, two, three, four, patience):
    """The same from a record, looked for until it is there."""
    nobody = int32(0)
    at_one, at_two = row_at + max(one, nobody), row_at + max(two, nobody)
    at_three, at_four = row_at + max(three, nobody), row_at + max(four, nobody)
    tries = int32(0)
    while True:
        a, b, c, d = load_relaxed(at_one), load_relaxed(at_two), load_relaxed(at_three), load_relaxed(at_four)
        here = a != NOT_YET and b != NOT_YET and c != NOT_YET and d != NOT_YET
        tries = int32(tries + 1)
        if here or tries >= patience:
            break
    cuda.syncwarp(ALL)
    return or_zero(a, one), or_zero(b, two), or_zero(c, three), or_zero(d, four), here


def producter(way: int, fetch4):
    """The device function: acc + sum over a strip's units of weight * what they sent, ascending, one FMA a term."""
    find = finder(fetch4)
    masked, narrow, resident = (way & k.KINDS) == MASKED, way & NARROW, way & RESIDENT
    size = 2 if narrow else 4
    if resident:
        address = int32
        if narrow:

            @device_function
            def weight(at):
                return libdevice.int_as_float(load_shared_narrow(at) << int32(16))
        else:

            @device_function
            def weight(at):
                return load_shared_float(at)
    else:
        address = int64
        if narrow:

            @device_function
            def weight(at):
                return libdevice.int_as_float(load_narrow(at) << int32(16))
        else:

            @device_function
            def weight(at):
                return load_early(at)

    if masked:

        @device_function
        def placed(values_at, word, below):
            return weight(address(values_at + word[1] + size * count_bits(word[0] & below)))
    else:

        @device_function
        def placed(values_at, word, below):
            return weight(address(values_at + word[1]))

    @device_function
    def entries8(at):
        a, b = load_shared4(at), load_shared4(int32(at + 2 * HIT_SIZE))
        c, d = load_shared4(int32(at + 4 * HIT_SIZE)), load_shared4(int32(at + 6 * HIT_SIZE))
        return (a[0], a[2], b[0], b[2], c[0], c[2], d[0], d[2]), (a[1], a[3], b[1], b[3], c[1], c[3], d[1], d[3])

    @device_function
    def words8(at):
        return (
            load_shared2(at[0]), load_shared2(at[1]), load_shared2(at[2]), load_shared2(at[3]),
            load_shared2(at[4]), load_shared2(at[5]), load_shared2(at[6]), load_shared2(at[7]),
        )  # fmt: skip

    @device_function
    def weights8(values_at, words, below):
        return (
            placed(values_at, words[0], below), placed(values_at, words[1], below),
            placed(values_at, words[2], below), placed(values_at, words[3], below),
            placed(values_at, words[4], below), placed(values_at, words[5], below),
            placed(values_at, words[6], below), placed(values_at, words[7], below),
        )  # fmt: skip

    @device_function
    def term(acc, w, value, word, bit):
        if word[0] & bit:
            return cuda.fma(w, libdevice.int_as_float(value), acc)
        return acc

    @device_function
    def terms8(acc, w, values, words, bit):
        acc = term(acc, w[0], values[0], words[0], bit)
        acc = term(acc, w[1], values[1], words[1], bit)
        acc = term(acc, w[2], values[2], words[2], bit)
        acc = term(acc, w[3], values[3], words[3], bit)
        acc = term(acc, w[4], values[4], words[4], bit)
        acc = term(acc, w[5], values[5], words[5], bit)
        acc = term(acc, w[6], values[6], words[6], bit)
        return term(acc, w[7], values[7], words[7], bit)

    @device_function
    def product(
        acc, row_at, o, units_at, words_at, values_at, count, hits_at, nothing, lane, below, bit, patience
    ):  # fmt: skip
        held, at, came = int32(0), lane, True
        one, two, three, four = o
        while at - lane < count:
            held, here = find(
                row_at, (one, two, three, four), words_at, at, hits_at, held, below, patience
            )  # fmt: skip
            came = came and here
            at = int32(at + 32 * LOOKED)
            one, two, three, four = offsets4(units_at, at, count)
            if held > CLUSTER_HELD - 32 * LOOKED or at - lane >= count:
                if lane < LIST_PAD:
                    store_shared2(int32(hits_at + HIT_SIZE * (held + lane)), nothing, int32(0))
                cuda.syncwarp(ALL)
                h = int32(0)
                while h < held:
                    at_words, values = entries8(int32(hits_at + HIT_SIZE * h))
                    words = words8(at_words)
                    w = weights8(values_at, words, below)
                    if held - h > 8:
                        more_at, more_values = entries8(int32(hits_at + HIT_SIZE * (h + 8)))
                        more_words = words8(more_at)
                        more = weights8(values_at, more_words, below)
                        acc = terms8(terms8(acc, w, values, words, bit), more, more_values, more_words, bit)
                    else:
                        acc = terms8(acc, w, values, words, bit)
                    h = int32(h + 16)
                cuda.syncwarp(ALL)
                held = int32(0)
        return acc, came

    return product


def cluster_kernel(way_rec: int, way_in: int, blocks: int):
    """The kernel for clusters of so many blocks, for matrices that lie in those ways; and its signature."""
    product, product_in = producter(way_rec, fetch_shared), producter(way_in, fetch_record)
    size_rec, size_in = 2 if way_rec & NARROW else 4, 2 if way_in & NARROW else 4
    resident_rec, resident_in = bool(way_rec & RESIDENT), bool(way_in & RESIDENT)
    address_rec, address_in = int32 if resident_rec else int64, int32 if resident_in else int64

    @device_function
    def send(base, offset, barrier, lane, a, b, c, d, first):
        # Eight lanes a block, four blocks at a time.
        there = of_rank(base, int32(first + (lane >> 3)))
        send4(int32(there + offset), a, b, c, d, int32(there + barrier))

    @device_function
    def send_all(base, offset, barrier, lane, y):
        q = int32(4 * (lane & 7))
        offset = int32(offset + 4 * q)
        word = bits_of(y)
        a, b = cuda.shfl_sync(ALL, word, q), cuda.shfl_sync(ALL, word, int32(q + 1))
        c, d = cuda.shfl_sync(ALL, word, int32(q + 2)), cuda.shfl_sync(ALL, word, int32(q + 3))
        if blocks >= 4:
            send(base, offset, barrier, lane, a, b, c, d, int32(0))
        elif lane < 8 * blocks:
            send(base, offset, barrier, lane, a, b, c, d, int32(0))
        if blocks >= 8:
            send(base, offset, barrier, lane, a, b, c, d, int32(4))
        if blocks >= 16:
            send(base, offset, barrier, lane, a, b, c, d, int32(8))
            send(base, offset, barrier, lane, a, b, c, d, int32(12))

    def layers(table_at, blocks_at, faults_at, steps, batch):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        block = global_int64(blocks_at + int64(8 * k.BLOCK_FIELDS) * cuda.blockIdx.x)
        layer = global_int64(table_at + int64(8 * k.LAYER_FIELDS) * block[k.LAYER])
        shared = shared_base()
        base = int32(shared)
        n, inputs, width = int32(layer[k.UNITS]), int32(layer[k.INPUTS]), int32(LANES)
        tile, tiles = int32(block[k.TILE]), int32(block[k.TILES])
        first, samples, slots = block[k.SAMPLE], int32(block[k.SAMPLES]), int32(block[k.SLOTS])
        row_size = int32(block[k.ALL_TILES]) * int32(TILE_BYTES)
        record, x, states = layer[k.RECORD], layer[k.X], layer[k.STATES]
        row_bytes, x_row_bytes = 4 * layer[k.PITCH], 4 * layer[k.X_PITCH]
        at_y, at_barriers = int32(block[k.AT_Y]), int32(block[k.AT_BARRIERS])
        steps32 = int32(steps)

        # Weights and tables of the block's tiles.
        first_strip, last_strip = int64(tile) * 3, int64(tile + tiles) * 3
        starts, firsts = global_int64(layer[k.REC_STARTS]), global_int64(layer[k.REC_FIRSTS])
        copy_in(
            shared + block[k.AT_UNITS_REC], layer[k.REC_UNITS] + 4 * firsts[first_strip],
            4 * (firsts[last_strip] - firsts[first_strip]), thread, threads,
        )  # fmt: skip
        copy_in(
            shared + block[k.AT_TABLE_REC], layer[k.REC_TABLE] + 8 * firsts[first_strip],
            8 * (firsts[last_strip] - firsts[first_strip]), thread, threads,
        )  # fmt: skip
        if resident_rec:
            copy_in(
                shared + block[k.AT_VALUES_REC], layer[k.REC_VALUES] + size_rec * starts[first_strip],
                size_rec * (starts[last_strip] - starts[first_strip]), thread, threads,
            )  # fmt: skip
        if x != 0:
            starts_in, firsts_in = global_int64(layer[k.IN_STARTS]), global_int64(layer[k.IN_FIRSTS])
            copy_in(
                shared + block[k.AT_UNITS_IN], layer[k.IN_UNITS] + 4 * firsts_in[first_strip],
                4 * (firsts_in[last_strip] - firsts_in[first_strip]), thread, threads,
            )  # fmt: skip
            copy_in(
                shared + block[k.AT_TABLE_IN], layer[k.IN_TABLE] + 8 * firsts_in[first_strip],
                8 * (firsts_in[last_strip] - firsts_in[first_strip]), thread, threads,
            )  # fmt: skip
            if resident_in:
                copy_in(
                    shared + block[k.AT_VALUES_IN], layer[k.IN_VALUES] + size_in * starts_in[first_strip],
                    size_in * (starts_in[last_strip] - starts_in[first_strip]), thread, threads,
                )  # fmt: skip
        # The outputs that the run starts from.
        sample = int32(0)
        while sample < samples:
            word = thread
            while word < row_size >> 2:
                value = np.float32(0)
                if word < n:
                    value = global_float32(record + (first + sample) * row_bytes)[word]
                store_shared_float(int32(base + at_y + 2 * sample * row_size + 4 * word), value)
                word = int32(word + threads)
            sample = int32(sample + 1)
        if thread == 0:
            store_shared2(int32(base + int32(block[k.AT_NOTHING])), int32(0), int32(0))
            sample = int32(0)
            while sample < 2 * samples:
                barrier_init(int32(base + at_barriers + 8 * sample), int32(1))
                expect(int32(base + at_barriers + 8 * sample), row_size)
                sample = int32(sample + 1)
            barrier_init_done()
        cuda.syncthreads()
        cluster_arrive()
        cluster_wait()

        # Who this warp is.
        roles = int32(3)
        if x != 0:
            roles = int32(6)
        work = int32(warp // roles)
        role = int32(warp - work * roles)
        if work < tiles * slots:
            slot = int32(work // tiles)
            own = int32(work - slot * tiles)
            gate = role
            if role >= 3:
                gate = int32(role - 3)
            strip = int64(tile + own) * 3 + gate
            meeting, meeters = int32(work + 1), int32(32 * roles)
            below, bit = int32((int32(1) << lane) - 1), int32(int32(1) << lane)
            hits_at = int32(base + int32(block[k.AT_HITS]) + int32(k.CLUSTER_HIT_BYTES) * warp)
            gates_at = int32(base + int32(block[k.AT_SUMS_REC]) + int32(4 * TILE_BYTES) * work + 4 * lane)
            drives_at = int32(base + int32(block[k.AT_SUMS_IN]) + int32(6 * TILE_BYTES) * work + 4 * lane)
            nothing = int32(base + int32(block[k.AT_NOTHING]))
            unit = int32((tile + own) * width + lane)
            mine = unit < n
            patience = int32(PATIENCE)
            turn = int32(0)
            if role >= 3:
                # The input's drives, one step ahead of who needs them.
                count = int32(firsts_in[strip + 1] - firsts_in[strip])
                units_at = int32(
                    base + int32(block[k.AT_UNITS_IN]) + int32(4 * (firsts_in[strip] - firsts_in[first_strip]))
                )
                words_at = int32(
                    base + int32(block[k.AT_TABLE_IN]) + int32(8 * (firsts_in[strip] - firsts_in[first_strip]))
                )
                if resident_in:
                    values_in = address_in(
                        shared + block[k.AT_VALUES_IN] + size_in * (starts_in[strip] - starts_in[first_strip])
                    )
                else:
                    values_in = address_in(layer[k.IN_VALUES] + size_in * starts_in[strip])
                if (way_in & k.KINDS) != MASKED:
                    values_in = address_in(values_in + size_in * lane)
                begin = offsets4(units_at, lane, count)
                bias = global_float32(layer[k.BIAS_IN])[strip * LANES + lane]
                t = int64(0)
                while t < steps:
                    sample = slot
                    while sample < samples:
                        acc, came = product_in(
                            bias, x + (t * batch + first + sample) * x_row_bytes, begin, units_at, words_at, values_in, count,
                            hits_at, nothing, lane, below, bit, patience,
                        )  # fmt: skip
                        if not came:
                            global_int32(faults_at)[0] = 1
                            patience = int32(1)
                        store_shared_float(int32(drives_at + int32(TILE_BYTES) * (gate + 3 * (turn & 1))), acc)
                        meet(meeting, meeters)
                        turn = int32(turn + 1)
                        sample = int32(sample + slots)
                    t += 1
                meet(meeting, meeters)
            else:
                count = int32(firsts[strip + 1] - firsts[strip])
                units_at = int32(base + int32(block[k.AT_UNITS_REC]) + int32(4 * (firsts[strip] - firsts[first_strip])))
                words_at = int32(base + int32(block[k.AT_TABLE_REC]) + int32(8 * (firsts[strip] - firsts[first_strip])))
                if resident_rec:
                    values = address_rec(
                        shared + block[k.AT_VALUES_REC] + size_rec * (starts[strip] - starts[first_strip])
                    )
                else:
                    values = address_rec(layer[k.REC_VALUES] + size_rec * starts[strip])
                if (way_rec & k.KINDS) != MASKED:
                    values = address_rec(values + size_rec * lane)
                begin = offsets4(units_at, lane, count)
                bias = global_float32(layer[k.BIAS_REC])[strip * LANES + lane]
                threshold = global_float32(layer[k.THRESHOLD])[(tile + own) * LANES + lane]
                cells_at = int32(base + int32(block[k.AT_CELLS]) + int32(TILE_BYTES) * own + 4 * lane)
                carried = global_float32(layer[k.CELLS])
                sample = slot
                while sample < samples and gate == 2:
                    value = np.float32(0)
                    if mine:
                        value = carried[(first + sample) * n + unit]
                    store_shared_float(int32(cells_at + int32(TILE_BYTES) * (sample * tiles)), value)
                    sample = int32(sample + slots)
                # Lanes without a unit read the last one's drive.
                drive_at = layer[k.DRIVE] + 4 * (gate * int64(n) + min(unit, int32(n - 1)))
                ahead = np.float32(0)
                if x == 0:
                    ahead = load_early(drive_at + (first + slot) * (12 * int64(n)))
                else:
                    meet(meeting, meeters)
                t = int32(0)
                while t < steps32:
                    here, there = int32(t & 1), int32((t + 1) & 1)
                    sample = slot
                    while sample < samples:
                        if x == 0:
                            drive = ahead
                            later, next_sample = int64(t), int32(sample + slots)
                            if next_sample >= samples:
                                later, next_sample = int64(t + 1), slot
                            if later < steps:
                                ahead = load_early(drive_at + (later * batch + first + next_sample) * (12 * int64(n)))
                        else:
                            drive = load_shared_float(int32(drives_at + int32(TILE_BYTES) * (gate + 3 * (turn & 1))))
                        stream = int32(2 * sample)
                        if t > 0:
                            barrier = int32(base + at_barriers + 8 * (stream + here))
                            if not wait(barrier, int32(((t - 1) >> 1) & 1), patience):
                                global_int32(faults_at)[0] = 1
                                patience = int32(1)
                            cuda.syncwarp(ALL)
                            if role == 2 and own == 0 and lane == 0:
                                expect(barrier, row_size)
                        acc, came = product(
                            bias, int32(base + at_y + (stream + here) * row_size), begin, units_at, words_at, values, count,
                            hits_at, nothing, lane, below, bit, patience,
                        )  # fmt: skip
                        gates = int32(gates_at + int32(2 * TILE_BYTES) * (turn & 1))
                        if gate < 2:
                            store_shared_float(int32(gates + int32(TILE_BYTES) * gate), egru_reset_gate(drive, acc))
                        meet(meeting, meeters)
                        if gate == 2:
                            zero = np.float32(0)
                            cell = int32(cells_at + int32(TILE_BYTES) * (sample * tiles))
                            c = load_shared_float(cell)
                            v, _, _, _ = egru_value_of_gates(
                                load_shared_float(gates), load_shared_float(int32(gates + int32(TILE_BYTES))),
                                drive, zero, zero, acc, c,
                            )  # fmt: skip
                            y, c = zero, v
                            if mine and v > threshold:
                                y, c = v, v - threshold
                            if t + 1 < steps32:
                                send_all(
                                    base, int32(at_y + (stream + there) * row_size + int32(TILE_BYTES) * (tile + own)),
                                    int32(at_barriers + 8 * (stream + there)), lane, y,
                                )  # fmt: skip
                            store_shared_float(cell, c)
                            if mine:
                                row = int64(t) * batch + first + sample
                                store_relaxed(record + (row + batch) * row_bytes + int64(4) * unit, y)
                                if states != 0:
                                    global_float32(states)[row * n + unit] = c
                                if t + 1 == steps32:
                                    carried[(first + sample) * n + unit] = c
                        turn = int32(turn + 1)
                        sample = int32(sample + slots)
                    t = int32(t + 1)
        cuda.syncthreads()
        cluster_arrive()
        cluster_wait()

    return layers, types.void(*[types.int64] * 5)
