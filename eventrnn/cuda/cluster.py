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
from eventrnn.cuda.kernels import PATIENCE, copy_in
from eventrnn.cuda.lookup import fetch_record, fetch_shared, offsets4, producter
from eventrnn.cuda.ptx import (
    arrived,
    barrier_init,
    barrier_init_done,
    cluster_arrive,
    cluster_wait,
    copies_done,
    copy_later,
    egru_reset_gate,
    egru_value_of_gates,
    expect,
    global_float32,
    global_int32,
    global_int64,
    load_shared_float,
    meet,
    of_rank,
    send4,
    shared_base,
    store_relaxed,
    store_shared_float,
)
from eventrnn.cuda.tables import LANES, NARROW, RESIDENT
from eventrnn.cuda.walks import ALL

TILE_BYTES = 4 * LANES


@device_function
def wait(barrier, parity, patience):
    """Until the phase of that parity is over; False where it never was."""
    tries = int32(0)
    while arrived(barrier, parity) == 0:
        tries = int32(tries + 1)
        if tries >= patience:
            return False
    return True


def cluster_kernel(way_rec: int, way_in: int, blocks: int, groups: int):
    """The kernel for clusters of so many blocks, for matrices that lie in those ways; and its signature.

    `groups`: how many times 128 units a recurrent strip has, 0 where that is more than 4.
    """
    product, product_in = producter(way_rec, fetch_shared, groups), producter(way_in, fetch_record, 0)
    size_rec, size_in = 2 if way_rec & NARROW else 4, 2 if way_in & NARROW else 4
    row_rec, row_in = LANES * size_rec, LANES * size_in
    resident_rec, resident_in = bool(way_rec & RESIDENT), bool(way_in & RESIDENT)
    address_rec, address_in = int32 if resident_rec else int64, int32 if resident_in else int64

    @device_function
    def send_all(one, two, three, four, offset, barrier, lane, y):
        # Eight lanes a block, four blocks at a time.
        q = int32(4 * (lane & 7))
        offset = int32(offset + 4 * q)
        word = libdevice.float_as_int(y)
        a, b = cuda.shfl_sync(ALL, word, q), cuda.shfl_sync(ALL, word, int32(q + 1))
        c, d = cuda.shfl_sync(ALL, word, int32(q + 2)), cuda.shfl_sync(ALL, word, int32(q + 3))
        if blocks >= 4 or lane < 8 * blocks:
            send4(int32(one + offset), a, b, c, d, int32(one + barrier))
        if blocks >= 8:
            send4(int32(two + offset), a, b, c, d, int32(two + barrier))
        if blocks >= 16:
            send4(int32(three + offset), a, b, c, d, int32(three + barrier))
            send4(int32(four + offset), a, b, c, d, int32(four + barrier))

    def layers(table_at, blocks_at, faults_at, steps, batch):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp = thread & int32(31), thread >> int32(5)
        block = global_int64(blocks_at + int64(8 * k.BLOCK_FIELDS) * cuda.blockIdx.x)
        layer = global_int64(table_at + int64(8 * k.LAYER_FIELDS) * block[k.LAYER])
        shared = shared_base()
        base = int32(shared)
        n, width = int32(layer[k.UNITS]), int32(LANES)
        tile, tiles = int32(block[k.TILE]), int32(block[k.TILES])
        first, samples, slots = block[k.SAMPLE], int32(block[k.SAMPLES]), int32(block[k.SLOTS])
        # A row of outputs is followed by a zero, for who looks beyond the units.
        row_size = int32(block[k.ALL_TILES]) * int32(TILE_BYTES)
        y_size = int32(row_size + 16)
        record, x, states = layer[k.RECORD], layer[k.X], layer[k.STATES]
        row_bytes, x_row_bytes = 4 * layer[k.PITCH], 4 * layer[k.X_PITCH]
        at_y, at_barriers = int32(block[k.AT_Y]), int32(block[k.AT_BARRIERS])
        steps32 = int32(steps)

        # Weights and tables of the block's tiles.
        first_strip, last_strip = int64(tile) * 3, int64(tile + tiles) * 3
        firsts = global_int64(layer[k.REC_FIRSTS])
        from_rec, size = firsts[first_strip], firsts[last_strip] - firsts[first_strip]
        copy_in(shared + block[k.AT_UNITS_REC], layer[k.REC_UNITS] + 4 * from_rec, 4 * size, thread, threads)
        if resident_rec:
            copy_in(
                shared + block[k.AT_VALUES_REC], layer[k.REC_ROWS] + row_rec * from_rec, row_rec * size, thread, threads
            )  # fmt: skip
        if x != 0:
            firsts_in = global_int64(layer[k.IN_FIRSTS])
            from_in, size = firsts_in[first_strip], firsts_in[last_strip] - firsts_in[first_strip]
            copy_in(shared + block[k.AT_UNITS_IN], layer[k.IN_UNITS] + 4 * from_in, 4 * size, thread, threads)
            if resident_in:
                copy_in(
                    shared + block[k.AT_VALUES_IN], layer[k.IN_ROWS] + row_in * from_in, row_in * size, thread, threads
                )  # fmt: skip
        # The outputs that the run starts from.
        sample = int32(0)
        while sample < samples:
            word = thread
            while word < y_size >> 2:
                value = np.float32(0)
                if word < n:
                    value = global_float32(record + (first + sample) * row_bytes)[word]
                store_shared_float(int32(base + at_y + 2 * sample * y_size + 4 * word), value)
                store_shared_float(int32(base + at_y + (2 * sample + 1) * y_size + 4 * word), np.float32(0))
                word = int32(word + threads)
            sample = int32(sample + 1)
        if thread == 0:
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
            below = int32((int32(1) << lane) - 1)
            hits_at = int32(base + int32(block[k.AT_HITS]) + int32(k.CLUSTER_HIT_BYTES) * warp)
            gates_at = int32(base + int32(block[k.AT_SUMS_REC]) + int32(4 * TILE_BYTES) * work + 4 * lane)
            drives_at = int32(base + int32(block[k.AT_SUMS_IN]) + int32(6 * TILE_BYTES) * work + 4 * lane)
            unit = int32((tile + own) * width + lane)
            mine = unit < n
            patience = int32(PATIENCE)
            turn = int32(0)
            if role >= 3:
                # The input's drives, one step ahead of who needs them.
                begin = firsts_in[strip] - from_in
                count = int32(firsts_in[strip + 1] - firsts_in[strip])
                units_at = int32(base + int32(block[k.AT_UNITS_IN]) + int32(4 * begin))
                if resident_in:
                    values_in = address_in(shared + block[k.AT_VALUES_IN] + row_in * begin + size_in * lane)
                else:
                    values_in = address_in(layer[k.IN_ROWS] + row_in * (from_in + begin) + size_in * lane)
                bias = global_float32(layer[k.BIAS_IN])[strip * LANES + lane]
                t = int64(0)
                while t < steps:
                    sample = slot
                    while sample < samples:
                        acc, came = product_in(
                            bias, x + (t * batch + first + sample) * x_row_bytes, int32(0), units_at, values_in, count,
                            hits_at, lane, below, int32(0), patience,
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
                begin = firsts[strip] - from_rec
                count = int32(firsts[strip + 1] - firsts[strip])
                last = int32(count - 1)
                units_at = int32(base + int32(block[k.AT_UNITS_REC]) + int32(4 * begin))
                if resident_rec:
                    values = address_rec(shared + block[k.AT_VALUES_REC] + row_rec * begin + size_rec * lane)
                else:
                    values = address_rec(layer[k.REC_ROWS] + row_rec * (from_rec + begin) + size_rec * lane)
                o = (
                    offsets4(units_at, lane, last, row_size), offsets4(units_at, int32(lane + 128), last, row_size),
                    offsets4(units_at, int32(lane + 256), last, row_size),
                    offsets4(units_at, int32(lane + 384), last, row_size),
                )  # fmt: skip
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
                # The blocks that this lane writes to; where there are fewer, some of them again.
                there = int32(lane >> 3)
                one, two = of_rank(base, int32(there & (blocks - 1))), of_rank(base, int32((there + 4) & (blocks - 1)))
                three, four = (
                    of_rank(base, int32((there + 8) & (blocks - 1))),
                    of_rank(base, int32((there + 12) & (blocks - 1))),
                )
                # Lanes without a unit read the last one's drive.
                drive_at = layer[k.DRIVE] + 4 * (gate * int64(n) + min(unit, int32(n - 1)))
                if x == 0:
                    copy_later(int64(drives_at + int32(TILE_BYTES) * gate), drive_at + (first + slot) * (12 * int64(n)))
                else:
                    meet(meeting, meeters)
                t = int32(0)
                while t < steps32:
                    here, there = int32(t & 1), int32((t + 1) & 1)
                    sample = slot
                    while sample < samples:
                        if x == 0:
                            # This turn's drive was asked for a turn ago; the next is on its way until then.
                            copies_done()
                            later, next_sample = t, int32(sample + slots)
                            if next_sample >= samples:
                                later, next_sample = min(int32(t + 1), int32(steps32 - 1)), slot
                            copy_later(
                                int64(drives_at + int32(TILE_BYTES) * (gate + 3 * ((turn + 1) & 1))),
                                drive_at + (int64(later) * batch + first + next_sample) * (12 * int64(n)),
                            )
                        drive = load_shared_float(int32(drives_at + int32(TILE_BYTES) * (gate + 3 * (turn & 1))))
                        stream = int32(2 * sample)
                        cell = int32(cells_at + int32(TILE_BYTES) * (sample * tiles))
                        c = load_shared_float(cell)
                        if t > 0:
                            barrier = int32(base + at_barriers + 8 * (stream + here))
                            if not wait(barrier, int32(((t - 1) >> 1) & 1), patience):
                                global_int32(faults_at)[0] = 1
                                patience = int32(1)
                            cuda.syncwarp(ALL)
                            if role == 2 and own == 0 and lane == 0:
                                expect(barrier, row_size)
                        acc, came = product(
                            bias, int32(base + at_y + (stream + here) * y_size), o, units_at, values, count,
                            hits_at, lane, below, row_size, patience,
                        )  # fmt: skip
                        gates = int32(gates_at + int32(2 * TILE_BYTES) * (turn & 1))
                        if gate < 2:
                            store_shared_float(int32(gates + int32(TILE_BYTES) * gate), egru_reset_gate(drive, acc))
                        meet(meeting, meeters)
                        if gate == 2:
                            zero = np.float32(0)
                            v, _, _, _ = egru_value_of_gates(
                                load_shared_float(gates), load_shared_float(int32(gates + int32(TILE_BYTES))),
                                drive, zero, zero, acc, c,
                            )  # fmt: skip
                            y, c = zero, v
                            if mine and v > threshold:
                                y, c = v, v - threshold
                            if t + 1 < steps32:
                                send_all(
                                    one, two, three, four,
                                    int32(at_y + (stream + there) * y_size + int32(TILE_BYTES) * (tile + own)),
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
