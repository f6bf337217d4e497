"""One strip times what its units sent, by looking up each of them. For strips that few units reach.

A strip has a table of the units that reach it and a row of 32 weights for each. A lane looks up a few neighbouring
units, all lanes together a lot of them; those that sent are put down, in order, and walked, a lane an output:
acc + weight * value, one FMA a term.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.persistent import UNWRITTEN
from eventrnn.cuda.kernels.ptx import (
    at_most_one,
    load_early,
    load_early2,
    load_narrow,
    load_relaxed,
    load_shared,
    load_shared4,
    load_shared_float,
    load_shared_narrow,
    store_shared2,
    store_shared_pair_if,
)
from eventrnn.cuda.kernels.strip_product import ALL, count_bits
from eventrnn.cuda.tables import (
    EVENTS_PER_WARP,
    HIT_BYTES,
    LANES,
    LIST_PAD,
    MAX_UNITS_PER_LANE,
    NARROW,
    RESIDENT,
    STRIPS_PER_GROUP,
)

assert MAX_UNITS_PER_LANE == 7, "lanes count what they found in three bits"

# The bits of an index that say which strips of a lot a unit reaches (`packing.GroupedStrips`).
REACHES = (1 << STRIPS_PER_GROUP) - 1


@device_function
def places(found, below):
    """Where a lane's hits begin among the warp's, and how many there are in all, from how many each lane found."""
    # Three ballots for all of a lane's units: counting bits is slow, four lanes a cycle.
    ones, twos = cuda.ballot_sync(ALL, (found & 1) != 0), cuda.ballot_sync(ALL, (found & 2) != 0)
    fours = cuda.ballot_sync(ALL, (found & 4) != 0)
    before = int32(count_bits(ones & below) + 2 * count_bits(twos & below) + 4 * count_bits(fours & below))
    return before, int32(count_bits(ones) + 2 * count_bits(twos) + 4 * count_bits(fours))


@device_function
def flag(value):
    """1 for a value that was sent, 0 for none. A zero that has a sign counts, and adds nothing."""
    return at_most_one(libdevice.float_as_int(value))


@device_function
def hold(at, row, value, flag):
    """A hit, if the flag is 1: where its weights are, and the value; returns where the next goes."""
    store_shared_pair_if(at, row, value, flag)
    return int32(at + HIT_BYTES * flag)


def row_bytes_of(way: int) -> int:
    """Bytes of a row of weights."""
    return LANES * (2 if way & NARROW else 4)


def walker_of_rows(way: int):
    """The device function: acc + sum over the hits that are held, in order, of weight * value, one FMA a term."""
    narrow, resident = way & NARROW, way & RESIDENT
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

    @device_function
    def entries8(at):
        a, b = load_shared4(at), load_shared4(int32(at + 2 * HIT_BYTES))
        c, d = load_shared4(int32(at + 4 * HIT_BYTES)), load_shared4(int32(at + 6 * HIT_BYTES))
        return (a[0], a[2], b[0], b[2], c[0], c[2], d[0], d[2]), (a[1], a[3], b[1], b[3], c[1], c[3], d[1], d[3])

    @device_function
    def weights8(values_at, rows):
        return (
            weight(address(values_at + rows[0])), weight(address(values_at + rows[1])),
            weight(address(values_at + rows[2])), weight(address(values_at + rows[3])),
            weight(address(values_at + rows[4])), weight(address(values_at + rows[5])),
            weight(address(values_at + rows[6])), weight(address(values_at + rows[7])),
        )  # fmt: skip

    @device_function
    def terms8(acc, w, values):
        acc = cuda.fma(w[0], libdevice.int_as_float(values[0]), acc)
        acc = cuda.fma(w[1], libdevice.int_as_float(values[1]), acc)
        acc = cuda.fma(w[2], libdevice.int_as_float(values[2]), acc)
        acc = cuda.fma(w[3], libdevice.int_as_float(values[3]), acc)
        acc = cuda.fma(w[4], libdevice.int_as_float(values[4]), acc)
        acc = cuda.fma(w[5], libdevice.int_as_float(values[5]), acc)
        acc = cuda.fma(w[6], libdevice.int_as_float(values[6]), acc)
        return cuda.fma(w[7], libdevice.int_as_float(values[7]), acc)

    @device_function
    def walk(acc, values_at, hits_at, held, lane):
        # Beyond the list: a zero times the first row.
        if lane < LIST_PAD:
            store_shared2(int32(hits_at + HIT_BYTES * (held + lane)), int32(0), int32(0))
        cuda.syncwarp(ALL)
        h = int32(0)
        while h < held:
            rows, values = entries8(int32(hits_at + HIT_BYTES * h))
            more_rows, more_values = entries8(int32(hits_at + HIT_BYTES * (h + 8)))
            w, more = weights8(values_at, rows), weights8(values_at, more_rows)
            acc = terms8(terms8(acc, w, values), more, more_values)
            h = int32(h + 16)
        cuda.syncwarp(ALL)
        return acc

    return walk


def looker(rounds: int):
    """The device functions that look up `rounds` (at most `MAX_UNITS_PER_LANE`) neighbouring units of a lane.

    `offsets`: where they are in a row of outputs.
    `fetch_shared`: what they sent, from this block's memory; all there.
    `fetch_record`: the same from a record, looked for until it is there; zero where an offset is negative.
    """
    none = np.float32(0)

    @device_function
    def offsets(at):
        b = c = d = e = f = g = int32(0)
        a = load_shared(at)
        if rounds > 1:
            b = load_shared(int32(at + 4))
        if rounds > 2:
            c = load_shared(int32(at + 8))
        if rounds > 3:
            d = load_shared(int32(at + 12))
        if rounds > 4:
            e = load_shared(int32(at + 16))
        if rounds > 5:
            f = load_shared(int32(at + 20))
        if rounds > 6:
            g = load_shared(int32(at + 24))
        return a, b, c, d, e, f, g

    @device_function
    def fetch_shared(row_at, o, max_polls):
        b = c = d = e = f = g = none
        a = load_shared_float(int32(row_at + o[0]))
        if rounds > 1:
            b = load_shared_float(int32(row_at + o[1]))
        if rounds > 2:
            c = load_shared_float(int32(row_at + o[2]))
        if rounds > 3:
            d = load_shared_float(int32(row_at + o[3]))
        if rounds > 4:
            e = load_shared_float(int32(row_at + o[4]))
        if rounds > 5:
            f = load_shared_float(int32(row_at + o[5]))
        if rounds > 6:
            g = load_shared_float(int32(row_at + o[6]))
        return (a, b, c, d, e, f, g), True

    @device_function
    def value_of(word, offset):
        value = libdevice.int_as_float(word)
        if offset < 0:
            value = none
        return value

    @device_function
    def fetch_record(row_at, o, max_polls):
        b = c = d = e = f = g = int32(0)
        tries = int32(0)
        while True:
            a = load_relaxed(row_at + max(o[0], int32(0)))
            if rounds > 1:
                b = load_relaxed(row_at + max(o[1], int32(0)))
            if rounds > 2:
                c = load_relaxed(row_at + max(o[2], int32(0)))
            if rounds > 3:
                d = load_relaxed(row_at + max(o[3], int32(0)))
            if rounds > 4:
                e = load_relaxed(row_at + max(o[4], int32(0)))
            if rounds > 5:
                f = load_relaxed(row_at + max(o[5], int32(0)))
            if rounds > 6:
                g = load_relaxed(row_at + max(o[6], int32(0)))
            here = a != UNWRITTEN and b != UNWRITTEN and c != UNWRITTEN and d != UNWRITTEN
            here = here and e != UNWRITTEN and f != UNWRITTEN and g != UNWRITTEN
            tries = int32(tries + 1)
            if here or tries >= max_polls:
                break
        cuda.syncwarp(ALL)
        return (
            value_of(a, o[0]), value_of(b, o[1]), value_of(c, o[2]), value_of(d, o[3]), value_of(e, o[4]),
            value_of(f, o[5]), value_of(g, o[6]),
        ), here  # fmt: skip

    return offsets, fetch_shared, fetch_record


def producter(way: int, rounds: int, record: bool):
    """The device function: acc + sum over a strip's units of weight * what they sent, ascending, one FMA a term.

    In lots of 32 * rounds units, which the table is filled up to; says whether all of them came. `record`: the row is
    one of a record, else in shared memory.
    """
    walk, row_bytes = walker_of_rows(way), row_bytes_of(way)
    offsets, fetch_shared, fetch_record = looker(rounds)
    fetch = fetch_record if record else fetch_shared

    @device_function
    def product(acc, row_at, units_at, values_at, lots, hits_at, lane, below, max_polls):
        came, lot, at = True, int32(0), int32(rounds * lane)
        while lot < lots:
            v, here = fetch(row_at, offsets(int32(units_at + 4 * at)), max_polls)
            came = came and here
            a, b, c, d = flag(v[0]), flag(v[1]), flag(v[2]), flag(v[3])
            e, f, g = flag(v[4]), flag(v[5]), flag(v[6])
            before, held = places(int32(a + b + c + d + e + f + g), below)
            p, row = int32(hits_at + HIT_BYTES * before), int32(row_bytes * at)
            p = hold(p, row, v[0], a)
            if rounds > 1:
                p = hold(p, int32(row + row_bytes), v[1], b)
            if rounds > 2:
                p = hold(p, int32(row + 2 * row_bytes), v[2], c)
            if rounds > 3:
                p = hold(p, int32(row + 3 * row_bytes), v[3], d)
            if rounds > 4:
                p = hold(p, int32(row + 4 * row_bytes), v[4], e)
            if rounds > 5:
                p = hold(p, int32(row + 5 * row_bytes), v[5], f)
            if rounds > 6:
                p = hold(p, int32(row + 6 * row_bytes), v[6], g)
            acc = walk(acc, values_at, hits_at, held, lane)
            at = int32(at + LANES * rounds)
            lot = int32(lot + 1)
        return acc, came

    return product


@device_function
def listed(list_at, at, count, index_at, row_bytes):
    """An event of a list: which strips of a lot it reaches, a bit each, where its rows begin, and its value."""
    # Beyond its end a list has zeros.
    unit, value = load_early2(list_at + int64(8) * min(at, count))
    word, reaches = load_shared(int32(index_at + 4 * unit)), int32(0)
    if at < count:
        reaches = word & int32(REACHES)
    return reaches, int32((word >> int32(STRIPS_PER_GROUP)) * row_bytes), libdevice.int_as_float(value)


def lister(way: int):
    """The device functions for a lot of strips, and at most `EVENTS_PER_WARP` events of a list, five a lane.

    `listed5`: which strips each reaches, where its rows begin, and its value. `product`: acc + sum over those that
    reach a strip of weight * value, ascending, one FMA a term; `flags` is 1 for them and 0 for others.
    """
    walk, row_bytes = walker_of_rows(way), row_bytes_of(way)
    assert EVENTS_PER_WARP == 5 * LANES

    @device_function
    def listed5(list_at, at, count, index_at):
        a, b = (
            listed(list_at, at, count, index_at, row_bytes),
            listed(list_at, int32(at + 1), count, index_at, row_bytes),
        )
        c = listed(list_at, int32(at + 2), count, index_at, row_bytes)
        d = listed(list_at, int32(at + 3), count, index_at, row_bytes)
        e = listed(list_at, int32(at + 4), count, index_at, row_bytes)
        return (a[0], b[0], c[0], d[0], e[0]), (a[1], b[1], c[1], d[1], e[1]), (a[2], b[2], c[2], d[2], e[2])

    @device_function
    def product(acc, flags, rows, values, values_at, hits_at, lane, below):
        a, b, c, d, e = flags
        before, held = places(int32(a + b + c + d + e), below)
        p = hold(int32(hits_at + HIT_BYTES * before), rows[0], values[0], a)
        p = hold(p, rows[1], values[1], b)
        p = hold(p, rows[2], values[2], c)
        p = hold(p, rows[3], values[3], d)
        p = hold(p, rows[4], values[4], e)
        return walk(acc, values_at, hits_at, held, lane)

    return listed5, product
