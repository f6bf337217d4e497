"""Walking one strip of weights: acc + sum over events of weight * value, ascending, one FMA a term.

A list is an array of int64: the unit in the lower half, the bits of the value in the upper. A warp walks, a lane an
output; loads of `GROUP` terms go out together, so that only their FMAs wait for each other.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.ptx import (
    global_float32,
    global_int64,
    global_uint16,
    shared_float32,
    shared_int64,
    shared_uint16,
)
from eventrnn.cuda.tables import DENSE, GROUP, HELD, LANES

ALL = np.uint32(0xFFFFFFFF)
ROUNDS = 4


@device_function
def low(entry):
    """Lower half of an int64."""
    return int32(entry & int64(0xFFFFFFFF))


@device_function
def high_float(entry):
    """The float in the upper half of an int64."""
    return libdevice.int_as_float(int32(entry >> int64(32)))


@device_function
def paired(unit, value):
    """A list entry."""
    return (int64(libdevice.float_as_int(value)) << int64(32)) | int64(unit)


def walker(way: int):
    """The device function for matrices that lie that way."""
    narrow, resident = way & 2, way & 4
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

    words_of = shared_int64 if resident else global_int64

    @device_function
    def dense(acc, values_at, table_at, width, lane, entries, count, hits_at):
        values = pointer(values_at)
        e = int32(0)
        while e < count - int32(GROUP - 1):
            for k in range(GROUP):
                entry = entries[e + k]
                acc = cuda.fma(weight(values, int32(low(entry) * width + lane)), high_float(entry), acc)
            e = int32(e + GROUP)
        if e < count:
            for k in range(GROUP):
                entry = entries[e + k]
                if e + k >= count:
                    entry = int64(0)
                acc = cuda.fma(weight(values, int32(low(entry) * width + lane)), high_float(entry), acc)
        return acc

    @device_function
    def masked(acc, values_at, table_at, width, lane, entries, count, hits_at):
        values, table = pointer(values_at), words_of(table_at)
        words, sizes = shared_int64(hits_at), shared_float32(hits_at + int64(8 * (HELD + GROUP)))
        below = int32((int32(1) << lane) - 1)
        held, e0 = int32(0), int32(0)
        while e0 < count:
            # Rounds of a warp's worth of events; a silent end costs as much as events.
            e1, e2, e3 = int32(e0 + LANES), int32(e0 + 2 * LANES), int32(e0 + 3 * LANES)
            a = b = c = d = int64(0)
            entry_a = entry_b = entry_c = entry_d = int64(0)
            if e0 + lane < count:
                entry_a = entries[e0 + lane]
                a = table[low(entry_a)]
            if e1 + lane < count:
                entry_b = entries[e1 + lane]
                b = table[low(entry_b)]
            if e2 + lane < count:
                entry_c = entries[e2 + lane]
                c = table[low(entry_c)]
            if e3 + lane < count:
                entry_d = entries[e3 + lane]
                d = table[low(entry_d)]
            hit = cuda.ballot_sync(ALL, low(a) != 0)
            if low(a) != 0:
                p = int32(held + cuda.popc(hit & below))
                words[p], sizes[p] = a, high_float(entry_a)
            held = int32(held + cuda.popc(hit))
            hit = cuda.ballot_sync(ALL, low(b) != 0)
            if low(b) != 0:
                p = int32(held + cuda.popc(hit & below))
                words[p], sizes[p] = b, high_float(entry_b)
            held = int32(held + cuda.popc(hit))
            hit = cuda.ballot_sync(ALL, low(c) != 0)
            if low(c) != 0:
                p = int32(held + cuda.popc(hit & below))
                words[p], sizes[p] = c, high_float(entry_c)
            held = int32(held + cuda.popc(hit))
            hit = cuda.ballot_sync(ALL, low(d) != 0)
            if low(d) != 0:
                p = int32(held + cuda.popc(hit & below))
                words[p], sizes[p] = d, high_float(entry_d)
            held = int32(held + cuda.popc(hit))
            e0 = int32(e0 + ROUNDS * LANES)
            if held > HELD - ROUNDS * LANES or e0 >= count:
                if lane < GROUP:
                    words[held + lane] = int64(0)
                    sizes[held + lane] = np.float32(0)
                cuda.syncwarp(ALL)
                h = int32(0)
                while h < held:
                    for k in range(GROUP):
                        word = words[h + k]
                        mask = low(word)
                        # A lane without a weight reads what lies there, and multiplies by zero.
                        value = weight(values, int32(int32(word >> int64(32)) + cuda.popc(mask & below)))
                        if ((mask >> lane) & 1) == 0:
                            value = np.float32(0)
                        acc = cuda.fma(value, sizes[h + k], acc)
                    h = int32(h + GROUP)
                cuda.syncwarp(ALL)
                held = int32(0)
        return acc

    return dense if way & 1 == DENSE else masked


def chooser(ways: tuple[int, ...]):
    """The device function for matrices that lie in any of those ways: its first argument says which."""
    walk = walker(ways[0])
    if len(ways) == 1:

        @device_function
        def only(way, acc, values_at, table_at, width, lane, entries, count, hits_at):
            return walk(acc, values_at, table_at, width, lane, entries, count, hits_at)

        return only
    first, others = int(ways[0]), chooser(ways[1:])

    @device_function
    def either(way, acc, values_at, table_at, width, lane, entries, count, hits_at):
        if way == first:
            return walk(acc, values_at, table_at, width, lane, entries, count, hits_at)
        return others(way, acc, values_at, table_at, width, lane, entries, count, hits_at)

    return either
