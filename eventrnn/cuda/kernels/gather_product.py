"""Product of one strip of weights with the outputs of the few units that reach it, found by a gather.

These are device functions for sparse weights. One warp computes one strip of 32 outputs, one lane computes one output.
Instead of walking a list of events, a warp gathers the outputs of all units that have weights in its strip. In one
chunk every lane gathers `units_per_lane` neighbouring units of the strip's table. The units that sent an event are
appended to a list of hits in ascending order, and the warp multiplies their rows of weights: the result equals the
columns of the strip in `reference.propagate`, one FMA per term.

=========== ================= ====================================================================================
array       memory            contents
=========== ================= ====================================================================================
acc         register          float32, one output per lane
units       shared            (chunks * 32 * units_per_lane,) int32 byte offsets of units in a row of outputs
                              (`packing.CompactStrips.units`, padded by the caller)
values      shared or global  (units, 32) float32 or uint16 bits of bfloat16, one row of weights per unit
row         shared or global  (n_pre,) float32 outputs of one step: of this cluster, or a row of an event log
hits        shared, per warp  (hits + LIST_PAD, 2): int32 byte offset of the row of weights, float32 value
index       shared            (n_pre,) int32 of a group of strips (`packing.GroupedStrips.index`), for event lists
=========== ================= ====================================================================================

Barriers: warps synchronise only with themselves (`syncwarp`), before and after they read `hits`.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.persistent import UNWRITTEN
from eventrnn.cuda.kernels.ptx import (
    at_most_one,
    global_int32,
    load_readonly,
    load_readonly2,
    load_readonly_uint16,
    load_relaxed,
    load_shared,
    load_shared_float,
    store_shared2,
    store_shared_pair_if,
)
from eventrnn.cuda.kernels.strip_product import (
    FULL_WARP,
    add_words8,
    entries8,
    make_load8,
    make_shared_weight,
    popcount,
)
from eventrnn.cuda.tables import (
    EVENTS_PER_WARP,
    HIT_BYTES,
    LANES,
    MAX_UNITS_PER_LANE,
    NARROW,
    RESIDENT,
    STRIPS_PER_GROUP,
    TERMS_PER_GROUP,
)

assert MAX_UNITS_PER_LANE == 7, "a lane counts its events in three bits"

# The bits of an index word that mark which strips of the group a unit reaches (`packing.GroupedStrips`).
REACHES = (1 << STRIPS_PER_GROUP) - 1


def make_hit_offsets(most: int):
    """The device function hit_offsets(n_hits, lanes_below) for at most `most` hits per lane, and 7.

    It returns the exclusive prefix sum of `n_hits` over the lanes of the warp, and the sum over all lanes.
    """

    @device_function
    def hit_offsets(n_hits, lanes_below):
        # A ballot per bit serves all units of a lane: popc runs on four lanes per cycle only.
        ones = cuda.ballot_sync(FULL_WARP, (n_hits & 1) != 0)
        before, hits = popcount(ones & lanes_below), popcount(ones)
        if most > 1:
            twos = cuda.ballot_sync(FULL_WARP, (n_hits & 2) != 0)
            before, hits = int32(before + 2 * popcount(twos & lanes_below)), int32(hits + 2 * popcount(twos))
        if most > 3:
            fours = cuda.ballot_sync(FULL_WARP, (n_hits & 4) != 0)
            before, hits = int32(before + 4 * popcount(fours & lanes_below)), int32(hits + 4 * popcount(fours))
        return before, hits

    return hit_offsets


@device_function
def event_flag(value):
    """1 for an event, 0 for no event. A negative zero counts as an event; it adds nothing to the sum."""
    return at_most_one(libdevice.float_as_int(value))


@device_function
def append_hit(at, row, value, flag):
    """Store the hit (byte offset of its row of weights, value) at address `at` if `flag` is 1.

    Returns the address of the next hit.
    """
    store_shared_pair_if(at, row, value, flag)
    return int32(at + HIT_BYTES * flag)


def make_append_hits(most: int):
    """The device function append_hits(flags, rows, values, hits_at, lanes_below) -> the number of hits of the warp.

    flags, rows, values : seven each, of which the first `most` count: 1 for a hit and 0 otherwise, byte offset of its
                          row of weights, float32 value. The hits of a lane come before those of the next lane
    """
    hit_offsets = make_hit_offsets(most)

    @device_function
    def append_hits(flags, rows, values, hits_at, lanes_below):
        a, b, c, d, e, f, g = flags
        before, hits = hit_offsets(int32(a + b + c + d + e + f + g), lanes_below)
        p = append_hit(int32(hits_at + HIT_BYTES * before), rows[0], values[0], a)
        if most > 1:
            p = append_hit(p, rows[1], values[1], b)
        if most > 2:
            p = append_hit(p, rows[2], values[2], c)
        if most > 3:
            p = append_hit(p, rows[3], values[3], d)
        if most > 4:
            p = append_hit(p, rows[4], values[4], e)
        if most > 5:
            p = append_hit(p, rows[5], values[5], f)
        if most > 6:
            p = append_hit(p, rows[6], values[6], g)
        return hits

    return append_hits


def make_list_hits(layout: int, units_per_lane: int):
    """The device function list_hits(values, row, hits_at, lanes_below) -> the number of hits of the warp.

    values : the outputs of `units_per_lane` units with neighbouring rows of weights, and zeros: seven float32
    row    : byte offset of the first of these rows
    """
    append_hits, row_bytes = make_append_hits(units_per_lane), row_bytes_of(layout)

    @device_function
    def list_hits(values, row, hits_at, lanes_below):
        a, b, c, d = event_flag(values[0]), event_flag(values[1]), event_flag(values[2]), event_flag(values[3])
        e, f, g = event_flag(values[4]), event_flag(values[5]), event_flag(values[6])
        rows = (
            row,
            int32(row + row_bytes),
            int32(row + 2 * row_bytes),
            int32(row + 3 * row_bytes),
            int32(row + 4 * row_bytes),
            int32(row + 5 * row_bytes),
            int32(row + 6 * row_bytes),
        )
        return append_hits((a, b, c, d, e, f, g), rows, values, hits_at, lanes_below)

    return list_hits


def row_bytes_of(layout: int) -> int:
    """Bytes of a row of 32 weights."""
    return LANES * (2 if layout & NARROW else 4)


def make_hit_product(layout: int, reached: bool = False, deep: bool = False):
    """The device function hit_product: acc + sum over the list of hits, in order, of weight * value, one FMA per term.

    reached : every strip has weights, so that zero times the first row may be added instead of a branch
    deep    : up to 32 terms are loaded together, for kernels whose threads have registers for them

    hit_product(acc, values_at, hits_at, hits, lane) -> acc, with byte addresses and the number of hits. `values_at`
    includes the lane's offset in a row.
    """
    narrow, resident = layout & NARROW, layout & RESIDENT
    padding = 8 if resident else TERMS_PER_GROUP
    if resident:
        address, weight = int32, make_shared_weight(bool(narrow))
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
    def row_weight(values_at, row):
        return weight(address(values_at + row))

    row_weights, add8 = make_load8(row_weight), add_words8

    @device_function
    def add_next8(acc, values_at, at):
        rows, values = entries8(at)
        return add8(acc, row_weights(values_at, rows), values)

    @device_function
    def add16(acc, values_at, at):
        rows, values = entries8(at)
        more_rows, more_values = entries8(int32(at + 8 * HIT_BYTES))
        w, more = row_weights(values_at, rows), row_weights(values_at, more_rows)
        return add8(add8(acc, w, values), more, more_values)

    @device_function
    def add24(acc, values_at, at):
        rows, values = entries8(at)
        second_rows, second_values = entries8(int32(at + 8 * HIT_BYTES))
        third_rows, third_values = entries8(int32(at + 16 * HIT_BYTES))
        w, second, third = (
            row_weights(values_at, rows),
            row_weights(values_at, second_rows),
            row_weights(values_at, third_rows),
        )
        return add8(add8(add8(acc, w, values), second, second_values), third, third_values)

    @device_function
    def add32(acc, values_at, at):
        rows, values = entries8(at)
        second_rows, second_values = entries8(int32(at + 8 * HIT_BYTES))
        third_rows, third_values = entries8(int32(at + 16 * HIT_BYTES))
        fourth_rows, fourth_values = entries8(int32(at + 24 * HIT_BYTES))
        w, second, third, fourth = (
            row_weights(values_at, rows),
            row_weights(values_at, second_rows),
            row_weights(values_at, third_rows),
            row_weights(values_at, fourth_rows),
        )
        acc = add8(add8(acc, w, values), second, second_values)
        return add8(add8(acc, third, third_values), fourth, fourth_values)

    @device_function
    def hit_product(acc, values_at, hits_at, hits, lane):
        # The padding of the list adds zero times the first row.
        if lane < padding:
            store_shared2(int32(hits_at + HIT_BYTES * (hits + lane)), int32(0), int32(0))
        cuda.syncwarp(FULL_WARP)
        h = int32(0)
        if not resident:
            while h < hits:
                acc = add16(acc, values_at, int32(hits_at + HIT_BYTES * h))
                h = int32(h + TERMS_PER_GROUP)
        elif deep and hits > 16:
            # The loads of all groups are under way together.
            if hits > 24:
                acc = add32(acc, values_at, hits_at)
                h = int32(32)
                while h < hits:
                    acc = add_next8(acc, values_at, int32(hits_at + HIT_BYTES * h))
                    h = int32(h + 8)
            else:
                acc = add24(acc, values_at, hits_at)
        elif hits > 8:
            acc = add16(acc, values_at, hits_at)
            h = int32(16)
            while not deep and h < hits:
                acc = add_next8(acc, values_at, int32(hits_at + HIT_BYTES * h))
                h = int32(h + 8)
        elif reached or hits > 0:
            acc = add_next8(acc, values_at, hits_at)
        cuda.syncwarp(FULL_WARP)
        return acc

    return hit_product


def make_unrolled(load, units_per_lane: int, fill):
    """The device function unrolled(base, offsets, *rest): `load(base, offset, *rest)` of the first offsets.

    `units_per_lane` of seven offsets count.

    The other elements of the result are `fill`. It is written out, because a tuple stays in registers.
    """

    @device_function
    def unrolled(base, offsets, *rest):
        b = c = d = e = f = g = fill
        a = load(base, offsets[0], *rest)
        if units_per_lane > 1:
            b = load(base, offsets[1], *rest)
        if units_per_lane > 2:
            c = load(base, offsets[2], *rest)
        if units_per_lane > 3:
            d = load(base, offsets[3], *rest)
        if units_per_lane > 4:
            e = load(base, offsets[4], *rest)
        if units_per_lane > 5:
            f = load(base, offsets[5], *rest)
        if units_per_lane > 6:
            g = load(base, offsets[6], *rest)
        return a, b, c, d, e, f, g

    return unrolled


@device_function
def load_offset(at, offset):
    """An int32 of shared memory."""
    return load_shared(int32(at + offset))


@device_function
def load_output(row_at, offset):
    """A float32 of a row of outputs in shared memory."""
    return load_shared_float(int32(row_at + offset))


@device_function
def load_logged(row_at, offset):
    """The word of an event log at that offset; the first word of the row for a negative offset."""
    return load_relaxed(row_at + max(offset, int32(0)))


@device_function
def value_of(word, offset):
    """The float32 of a word of an event log; zero for a negative offset, which marks padding."""
    value = libdevice.int_as_float(word)
    if offset < 0:
        value = np.float32(0)
    return value


@device_function
def load_unit(units_at, unit, reached, beyond):
    """Entry `unit` of a strip's `reached` entries of `packing.CompactStrips.units` in global memory, or `beyond`."""
    offset = beyond
    if unit < reached:
        offset = global_int32(units_at)[unit]
    return offset


def make_load_units(units_per_lane: int):
    """The device function load_units(units_at, first, reached, beyond) -> seven byte offsets of units.

    Those of entries `first` to `first + units_per_lane - 1` of a strip's units in global memory; see `load_unit`.
    """
    load = make_unrolled(load_unit, units_per_lane, np.int32(0))

    @device_function
    def load_units(units_at, first, reached, beyond):
        second, third, fourth = int32(first + 1), int32(first + 2), int32(first + 3)
        rest = int32(first + 4), int32(first + 5), int32(first + 6)
        return load(units_at, (first, second, third, fourth, *rest), reached, beyond)

    return load_units


def make_gather(units_per_lane: int):
    """The device functions that gather up to `MAX_UNITS_PER_LANE` neighbouring units of a strip's table per lane.

    load_offsets(at)                               -> byte offsets of the units in a row of outputs, int32
    gather_shared(row_at, offsets, max_polls)      -> their outputs from shared memory, True
    gather_event_log(row_at, offsets, max_polls)   -> their outputs from a row of an event log, polled until all are
                                                      written, and whether that happened within `max_polls` polls;
                                                      zero for a negative offset
    """
    load_all_offsets = make_unrolled(load_offset, units_per_lane, np.int32(0))
    load_outputs = make_unrolled(load_output, units_per_lane, np.float32(0))
    load_log = make_unrolled(load_logged, units_per_lane, np.int32(0))

    @device_function
    def load_offsets(at):
        return load_all_offsets(at, (0, 4, 8, 12, 16, 20, 24))

    @device_function
    def gather_shared(row_at, offsets, max_polls):
        return load_outputs(row_at, offsets), True

    @device_function
    def gather_event_log(row_at, offsets, max_polls):
        polls = int32(0)
        while True:
            a, b, c, d, e, f, g = load_log(row_at, offsets)
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
    """The device functions first_offsets, of the units that a lane gathers in the first chunk of a strip, and
    gather_product: acc + sum over a strip's units of weight * output, one FMA per term.

    first_offsets(units_at, lane) -> seven byte offsets
    gather_product(acc, row_at, units_at, offsets, values_at, chunks, hits_at, lane, lanes_below, max_polls)
        -> acc, complete

    The caller keeps the first offsets of a strip from one step to the next, and gives them one by one: libNVVM does not
    finish where a tuple is assigned twice. The terms are in ascending presynaptic order. `chunks`: chunks of
    32 * units_per_lane units, to which the caller pads the table. `complete`: whether all outputs were written in time.
    `event_log`: the row of outputs is a row of an event log in global memory; otherwise it is in shared memory and
    complete.
    """
    hit_product, row_bytes = make_hit_product(layout), row_bytes_of(layout)
    list_hits = make_list_hits(layout, units_per_lane)
    load_offsets, gather_shared, gather_event_log = make_gather(units_per_lane)
    gather = gather_event_log if event_log else gather_shared

    @device_function
    def first_offsets(units_at, lane):
        return load_offsets(int32(units_at + 4 * units_per_lane * lane))

    @device_function
    def gather_product(
        acc, row_at, units_at, o0, o1, o2, o3, o4, o5, o6, values_at, chunks, hits_at, lane, lanes_below, max_polls
    ):
        complete, chunk, at = True, int32(0), int32(units_per_lane * lane)
        while chunk < chunks:
            v, chunk_complete = gather(row_at, (o0, o1, o2, o3, o4, o5, o6), max_polls)
            complete = complete and chunk_complete
            hits = list_hits(v, int32(row_bytes * at), hits_at, lanes_below)
            acc = hit_product(acc, values_at, hits_at, hits, lane)
            at = int32(at + LANES * units_per_lane)
            chunk = int32(chunk + 1)
            if chunk < chunks:
                o0, o1, o2, o3, o4, o5, o6 = load_offsets(int32(units_at + 4 * at))
        return acc, complete

    return first_offsets, gather_product


@device_function
def find_event(list_at, at, count, index_at, row_bytes):
    """Event `at` of a list: mask of the strips of the group that it reaches, byte offset of its first row, value."""
    # A list ends with zeros, so the load beyond its end is valid.
    unit, value = load_readonly2(list_at + int64(8) * min(at, count))
    word, reaches = load_shared(int32(index_at + 4 * unit)), int32(0)
    if at < count:
        reaches = int32(word & int32(REACHES))
    return reaches, int32((word >> int32(STRIPS_PER_GROUP)) * row_bytes), libdevice.int_as_float(value)


def make_list_product(layout: int):
    """The device functions for a group of strips and at most `EVENTS_PER_WARP` events of a list, five per lane.

    find_events(list_at, at, count, index_at) -> masks, rows, values, five each: see `find_event`
    list_product(acc, flags, rows, values, values_at, hits_at, lane, lanes_below) -> acc + sum of weight * value over
    the events whose flag is 1 (0 otherwise), in ascending order, one FMA per term
    """
    hit_product, row_bytes, append_hits = make_hit_product(layout), row_bytes_of(layout), make_append_hits(5)
    assert EVENTS_PER_WARP == 5 * LANES

    @device_function
    def find_events(list_at, at, count, index_at):
        a = find_event(list_at, at, count, index_at, row_bytes)
        b = find_event(list_at, int32(at + 1), count, index_at, row_bytes)
        c = find_event(list_at, int32(at + 2), count, index_at, row_bytes)
        d = find_event(list_at, int32(at + 3), count, index_at, row_bytes)
        e = find_event(list_at, int32(at + 4), count, index_at, row_bytes)
        return (a[0], b[0], c[0], d[0], e[0]), (a[1], b[1], c[1], d[1], e[1]), (a[2], b[2], c[2], d[2], e[2])

    @device_function
    def list_product(acc, flags, rows, values, values_at, hits_at, lane, lanes_below):
        none = int32(0)
        hits = append_hits((*flags, none, none), rows, values, hits_at, lanes_below)
        return hit_product(acc, values_at, hits_at, hits, lane)

    return find_events, list_product
