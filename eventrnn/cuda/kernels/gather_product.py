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
    load_readonly,
    load_readonly2,
    load_readonly_uint16,
    load_relaxed,
    load_shared,
    load_shared4,
    load_shared_float,
    load_shared_uint16,
    store_shared2,
    store_shared_pair_if,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP, popcount
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
def hit_offsets(found, lanes_below):
    """Where a lane's hits begin among the warp's, and how many there are in all, from how many each lane found."""
    # Three ballots for all of a lane's units: counting bits is slow, four lanes a cycle.
    ones, twos = cuda.ballot_sync(FULL_WARP, (found & 1) != 0), cuda.ballot_sync(FULL_WARP, (found & 2) != 0)
    fours = cuda.ballot_sync(FULL_WARP, (found & 4) != 0)
    before = int32(popcount(ones & lanes_below) + 2 * popcount(twos & lanes_below) + 4 * popcount(fours & lanes_below))
    return before, int32(popcount(ones) + 2 * popcount(twos) + 4 * popcount(fours))


@device_function
def event_flag(value):
    """1 for a value that was sent, 0 for none. A zero that has a sign counts, and adds nothing."""
    return at_most_one(libdevice.float_as_int(value))


@device_function
def append_hit(at, row, value, event_flag):
    """A hit, if the flag is 1: where its weights are, and the value; returns where the next goes."""
    store_shared_pair_if(at, row, value, event_flag)
    return int32(at + HIT_BYTES * event_flag)


def row_bytes_of(layout: int) -> int:
    """Bytes of a row of weights."""
    return LANES * (2 if layout & NARROW else 4)


def make_hit_product(layout: int):
    """The device function: acc + sum over the hits that are held, in order, of weight * value, one FMA a term."""
    narrow, resident = layout & NARROW, layout & RESIDENT
    if resident:
        address = int32
        if narrow:

            @device_function
            def weight(at):
                return libdevice.int_as_float(load_shared_uint16(at) << int32(16))
        else:

            @device_function
            def weight(at):
                return load_shared_float(at)
    else:
        address = int64
        if narrow:

            @device_function
            def weight(at):
                return libdevice.int_as_float(load_readonly_uint16(at) << int32(16))
        else:

            @device_function
            def weight(at):
                return load_readonly(at)

    @device_function
    def entries8(at):
        a, b = load_shared4(at), load_shared4(int32(at + 2 * HIT_BYTES))
        c, d = load_shared4(int32(at + 4 * HIT_BYTES)), load_shared4(int32(at + 6 * HIT_BYTES))
        return (a[0], a[2], b[0], b[2], c[0], c[2], d[0], d[2]), (a[1], a[3], b[1], b[3], c[1], c[3], d[1], d[3])

    @device_function
    def weights8(values_at, rows):
        return (
            weight(address(values_at + rows[0])),
            weight(address(values_at + rows[1])),
            weight(address(values_at + rows[2])),
            weight(address(values_at + rows[3])),
            weight(address(values_at + rows[4])),
            weight(address(values_at + rows[5])),
            weight(address(values_at + rows[6])),
            weight(address(values_at + rows[7])),
        )

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
    def hit_product(acc, values_at, hits_at, hits, lane):
        # Beyond the list: a zero times the first row.
        if lane < LIST_PAD:
            store_shared2(int32(hits_at + HIT_BYTES * (hits + lane)), int32(0), int32(0))
        cuda.syncwarp(FULL_WARP)
        h = int32(0)
        while h < hits:
            rows, values = entries8(int32(hits_at + HIT_BYTES * h))
            more_rows, more_values = entries8(int32(hits_at + HIT_BYTES * (h + 8)))
            w, more = weights8(values_at, rows), weights8(values_at, more_rows)
            acc = terms8(terms8(acc, w, values), more, more_values)
            h = int32(h + 16)
        cuda.syncwarp(FULL_WARP)
        return acc

    return hit_product


def make_gather(units_per_lane: int):
    """The device functions that look up `rounds` (at most `MAX_UNITS_PER_LANE`) neighbouring units of a lane.

    `offsets`: where they are in a row of outputs.
    `fetch_shared`: what they sent, from this block's memory; all there.
    `fetch_record`: the same from a record, looked for until it is there; zero where an offset is negative.
    """
    none = np.float32(0)

    @device_function
    def load_offsets(at):
        b = c = d = e = f = g = int32(0)
        a = load_shared(at)
        if units_per_lane > 1:
            b = load_shared(int32(at + 4))
        if units_per_lane > 2:
            c = load_shared(int32(at + 8))
        if units_per_lane > 3:
            d = load_shared(int32(at + 12))
        if units_per_lane > 4:
            e = load_shared(int32(at + 16))
        if units_per_lane > 5:
            f = load_shared(int32(at + 20))
        if units_per_lane > 6:
            g = load_shared(int32(at + 24))
        return a, b, c, d, e, f, g

    @device_function
    def gather_shared(row_at, offsets, max_polls):
        b = c = d = e = f = g = none
        a = load_shared_float(int32(row_at + offsets[0]))
        if units_per_lane > 1:
            b = load_shared_float(int32(row_at + offsets[1]))
        if units_per_lane > 2:
            c = load_shared_float(int32(row_at + offsets[2]))
        if units_per_lane > 3:
            d = load_shared_float(int32(row_at + offsets[3]))
        if units_per_lane > 4:
            e = load_shared_float(int32(row_at + offsets[4]))
        if units_per_lane > 5:
            f = load_shared_float(int32(row_at + offsets[5]))
        if units_per_lane > 6:
            g = load_shared_float(int32(row_at + offsets[6]))
        return (a, b, c, d, e, f, g), True

    @device_function
    def value_of(word, offset):
        value = libdevice.int_as_float(word)
        if offset < 0:
            value = none
        return value

    @device_function
    def gather_event_log(row_at, offsets, max_polls):
        b = c = d = e = f = g = int32(0)
        polls = int32(0)
        while True:
            a = load_relaxed(row_at + max(offsets[0], int32(0)))
            if units_per_lane > 1:
                b = load_relaxed(row_at + max(offsets[1], int32(0)))
            if units_per_lane > 2:
                c = load_relaxed(row_at + max(offsets[2], int32(0)))
            if units_per_lane > 3:
                d = load_relaxed(row_at + max(offsets[3], int32(0)))
            if units_per_lane > 4:
                e = load_relaxed(row_at + max(offsets[4], int32(0)))
            if units_per_lane > 5:
                f = load_relaxed(row_at + max(offsets[5], int32(0)))
            if units_per_lane > 6:
                g = load_relaxed(row_at + max(offsets[6], int32(0)))
            complete = a != UNWRITTEN and b != UNWRITTEN and c != UNWRITTEN and d != UNWRITTEN
            complete = complete and e != UNWRITTEN and f != UNWRITTEN and g != UNWRITTEN
            polls = int32(polls + 1)
            if complete or polls >= max_polls:
                break
        cuda.syncwarp(FULL_WARP)
        return (
            value_of(a, offsets[0]),
            value_of(b, offsets[1]),
            value_of(c, offsets[2]),
            value_of(d, offsets[3]),
            value_of(e, offsets[4]),
            value_of(f, offsets[5]),
            value_of(g, offsets[6]),
        ), complete

    return load_offsets, gather_shared, gather_event_log


def make_gather_product(layout: int, units_per_lane: int, event_log: bool):
    """The device function: acc + sum over a strip's units of weight * what they sent, ascending, one FMA a term.

    In lots of 32 * rounds units, which the table is filled up to; says whether all of them came. `record`: the row is
    one of a record, else in shared memory.
    """
    hit_product, row_bytes = make_hit_product(layout), row_bytes_of(layout)
    load_offsets, gather_shared, gather_event_log = make_gather(units_per_lane)
    gather = gather_event_log if event_log else gather_shared

    @device_function
    def product(acc, row_at, units_at, values_at, chunks, hits_at, lane, lanes_below, max_polls):
        complete, chunk, at = True, int32(0), int32(units_per_lane * lane)
        while chunk < chunks:
            v, complete = gather(row_at, load_offsets(int32(units_at + 4 * at)), max_polls)
            complete = complete and complete
            a, b, c, d = event_flag(v[0]), event_flag(v[1]), event_flag(v[2]), event_flag(v[3])
            e, f, g = event_flag(v[4]), event_flag(v[5]), event_flag(v[6])
            before, hits = hit_offsets(int32(a + b + c + d + e + f + g), lanes_below)
            p, row = int32(hits_at + HIT_BYTES * before), int32(row_bytes * at)
            p = append_hit(p, row, v[0], a)
            if units_per_lane > 1:
                p = append_hit(p, int32(row + row_bytes), v[1], b)
            if units_per_lane > 2:
                p = append_hit(p, int32(row + 2 * row_bytes), v[2], c)
            if units_per_lane > 3:
                p = append_hit(p, int32(row + 3 * row_bytes), v[3], d)
            if units_per_lane > 4:
                p = append_hit(p, int32(row + 4 * row_bytes), v[4], e)
            if units_per_lane > 5:
                p = append_hit(p, int32(row + 5 * row_bytes), v[5], f)
            if units_per_lane > 6:
                p = append_hit(p, int32(row + 6 * row_bytes), v[6], g)
            acc = hit_product(acc, values_at, hits_at, hits, lane)
            at = int32(at + LANES * units_per_lane)
            chunk = int32(chunk + 1)
        return acc, complete

    return product


@device_function
def find_event(list_at, at, count, index_at, row_bytes):
    """An event of a list: which strips of a lot it reaches, a bit each, where its rows begin, and its value."""
    # Beyond its end a list has zeros.
    unit, value = load_readonly2(list_at + int64(8) * min(at, count))
    word, reaches = load_shared(int32(index_at + 4 * unit)), int32(0)
    if at < count:
        reaches = word & int32(REACHES)
    return reaches, int32((word >> int32(STRIPS_PER_GROUP)) * row_bytes), libdevice.int_as_float(value)


def make_list_product(layout: int):
    """The device functions for a lot of strips, and at most `EVENTS_PER_WARP` events of a list, five a lane.

    `listed5`: which strips each reaches, where its rows begin, and its value. `product`: acc + sum over those that
    reach a strip of weight * value, ascending, one FMA a term; `flags` is 1 for them and 0 for others.
    """
    hit_product, row_bytes = make_hit_product(layout), row_bytes_of(layout)
    assert EVENTS_PER_WARP == 5 * LANES

    @device_function
    def find_events(list_at, at, count, index_at):
        a, b = (
            find_event(list_at, at, count, index_at, row_bytes),
            find_event(list_at, int32(at + 1), count, index_at, row_bytes),
        )
        c = find_event(list_at, int32(at + 2), count, index_at, row_bytes)
        d = find_event(list_at, int32(at + 3), count, index_at, row_bytes)
        e = find_event(list_at, int32(at + 4), count, index_at, row_bytes)
        return (a[0], b[0], c[0], d[0], e[0]), (a[1], b[1], c[1], d[1], e[1]), (a[2], b[2], c[2], d[2], e[2])

    @device_function
    def product(acc, flags, rows, values, values_at, hits_at, lane, lanes_below):
        a, b, c, d, e = flags
        before, hits = hit_offsets(int32(a + b + c + d + e), lanes_below)
        p = append_hit(int32(hits_at + HIT_BYTES * before), rows[0], values[0], a)
        p = append_hit(p, rows[1], values[1], b)
        p = append_hit(p, rows[2], values[2], c)
        p = append_hit(p, rows[3], values[3], d)
        p = append_hit(p, rows[4], values[4], e)
        return hit_product(acc, values_at, hits_at, hits, lane)

    return find_events, product
