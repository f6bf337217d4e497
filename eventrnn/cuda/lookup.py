"""One strip times what its units sent, by looking up each of them. For strips that few units reach.

A strip has a table of the units that reach it and a row of 32 weights for each. A warp looks up 32 units at a time,
puts down those that sent, in order, and walks them, a lane an output: acc + weight * value, one FMA a term.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels import NOT_YET
from eventrnn.cuda.ptx import (
    load_early,
    load_early2,
    load_narrow,
    load_relaxed,
    load_shared,
    load_shared4,
    load_shared_float,
    load_shared_narrow,
    store_shared2,
    store_shared_pair,
)
from eventrnn.cuda.tables import CLUSTER_HELD, HIT_SIZE, LANES, LIST_PAD, LOOKED, NARROW, RESIDENT
from eventrnn.cuda.walks import ALL, count_bits


@device_function
def offset_at(units_at, at, last, beyond):
    """Where a unit of the table is in a row; `beyond` where the table has ended."""
    offset = int32(beyond)
    if at <= last:
        offset = load_shared(int32(units_at + 4 * at))
    return offset


@device_function
def offsets4(units_at, at, last, beyond):
    """Of this lane's next four."""
    return (
        offset_at(units_at, at, last, beyond), offset_at(units_at, int32(at + 32), last, beyond),
        offset_at(units_at, int32(at + 64), last, beyond), offset_at(units_at, int32(at + 96), last, beyond),
    )  # fmt: skip


@device_function
def value_of(word, at, last):
    """An output, zero beyond the table's end."""
    value = libdevice.int_as_float(word)
    if at > last:
        value = np.float32(0)
    return value


@device_function
def values4(words, at, last):
    """Of four outputs as they were loaded."""
    return (
        value_of(words[0], at, last), value_of(words[1], int32(at + 32), last),
        value_of(words[2], int32(at + 64), last), value_of(words[3], int32(at + 96), last),
    )  # fmt: skip


@device_function
def sent(row_at, offset):
    """One output, from this block's memory."""
    return load_shared_float(int32(row_at + offset))


@device_function
def fetch_shared(row_at, o, at, last, patience):
    """What four units sent; all there, and a zero beyond the units."""
    return (sent(row_at, o[0]), sent(row_at, o[1]), sent(row_at, o[2]), sent(row_at, o[3])), True


@device_function
def fetch_record(row_at, o, at, last, patience):
    """The same from a record, looked for until it is there."""
    tries = int32(0)
    while True:
        a, b = load_relaxed(row_at + o[0]), load_relaxed(row_at + o[1])
        c, d = load_relaxed(row_at + o[2]), load_relaxed(row_at + o[3])
        here = a != NOT_YET and b != NOT_YET and c != NOT_YET and d != NOT_YET
        tries = int32(tries + 1)
        if here or tries >= patience:
            break
    cuda.syncwarp(ALL)
    return values4((a, b, c, d), at, last), here


@device_function
def sent4(values):
    """Which lanes' units sent, for each of four rounds, and how many before each round, and in all."""
    a, b = cuda.ballot_sync(ALL, values[0] != 0), cuda.ballot_sync(ALL, values[1] != 0)
    c, d = cuda.ballot_sync(ALL, values[2] != 0), cuda.ballot_sync(ALL, values[3] != 0)
    one = count_bits(a)
    two = int32(one + count_bits(b))
    three = int32(two + count_bits(c))
    return (a, b, c, d), (one, two, three), int32(three + count_bits(d))


@device_function
def hold(hits_at, held, value, hit, row, below):
    """A hit: where its weights are, and the value."""
    p = int32(held + count_bits(hit & below))
    store_shared_pair(int32(hits_at + HIT_SIZE * p), row, value)


@device_function
def hold4(hits_at, held, values, hits, before, row, step, below):
    """The hits of four rounds, after those that are held."""
    hold(hits_at, held, values[0], hits[0], row, below)
    hold(hits_at, int32(held + before[0]), values[1], hits[1], int32(row + step), below)
    hold(hits_at, int32(held + before[1]), values[2], hits[2], int32(row + 2 * step), below)
    hold(hits_at, int32(held + before[2]), values[3], hits[3], int32(row + 3 * step), below)


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
        a, b = load_shared4(at), load_shared4(int32(at + 2 * HIT_SIZE))
        c, d = load_shared4(int32(at + 4 * HIT_SIZE)), load_shared4(int32(at + 6 * HIT_SIZE))
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
            store_shared2(int32(hits_at + HIT_SIZE * (held + lane)), int32(0), int32(0))
        cuda.syncwarp(ALL)
        h = int32(0)
        while h < held:
            rows, values = entries8(int32(hits_at + HIT_SIZE * h))
            more_rows, more_values = entries8(int32(hits_at + HIT_SIZE * (h + 8)))
            w, more = weights8(values_at, rows), weights8(values_at, more_rows)
            acc = terms8(terms8(acc, w, values), more, more_values)
            h = int32(h + 16)
        cuda.syncwarp(ALL)
        return acc

    return walk


def producter(way: int, fetch4, groups: int):
    """The device function: acc + sum over a strip's units of weight * what they sent, ascending, one FMA a term.

    Up to `groups` (at most 4) times 128 units are looked up at once, if no more than `CLUSTER_HELD` of them sent.
    """
    walk, row_bytes = walker_of_rows(way), row_bytes_of(way)

    @device_function
    def in_turn(acc, row_at, o, units_at, values_at, count, hits_at, lane, below, beyond, patience):
        """128 units after the other."""
        held, at, came, last = int32(0), lane, True, int32(count - 1)
        while at - lane < count:
            values, here = fetch4(row_at, offsets4(units_at, at, last, beyond), at, last, patience)
            came = came and here
            hits, before, found = sent4(values)
            hold4(hits_at, held, values, hits, before, int32(row_bytes * at), int32(32 * row_bytes), below)
            held = int32(held + found)
            at = int32(at + 32 * LOOKED)
            if held > CLUSTER_HELD - 32 * LOOKED or at - lane >= count:
                acc = walk(acc, values_at, hits_at, held, lane)
                held = int32(0)
        return acc, came

    if groups == 0:
        return in_turn
    none = np.float32(0)

    @device_function
    def product(acc, row_at, o, units_at, values_at, count, hits_at, lane, below, beyond, patience):
        last = int32(count - 1)
        offsets_one, offsets_two, offsets_three, offsets_four = o
        at_two, at_three, at_four = int32(lane + 128), int32(lane + 256), int32(lane + 384)
        one, came = fetch4(row_at, offsets_one, lane, last, patience)
        two = three = four = (none, none, none, none)
        if groups > 1:
            two, here = fetch4(row_at, offsets_two, at_two, last, patience)
            came = came and here
        if groups > 2:
            three, here = fetch4(row_at, offsets_three, at_three, last, patience)
            came = came and here
        if groups > 3:
            four, here = fetch4(row_at, offsets_four, at_four, last, patience)
            came = came and here
        hits_one, before_one, found_one = sent4(one)
        hits_two, before_two, found_two = hits_one, before_one, int32(0)
        hits_three, before_three, found_three = hits_one, before_one, int32(0)
        hits_four, before_four, found_four = hits_one, before_one, int32(0)
        if groups > 1:
            hits_two, before_two, found_two = sent4(two)
        if groups > 2:
            hits_three, before_three, found_three = sent4(three)
        if groups > 3:
            hits_four, before_four, found_four = sent4(four)
        two_from, three_from = found_one, int32(found_one + found_two)
        four_from = int32(three_from + found_three)
        held = int32(four_from + found_four)
        if held > CLUSTER_HELD:
            return in_turn(acc, row_at, o, units_at, values_at, count, hits_at, lane, below, beyond, patience)
        step = int32(32 * row_bytes)
        hold4(hits_at, int32(0), one, hits_one, before_one, int32(row_bytes * lane), step, below)
        if groups > 1:
            hold4(hits_at, two_from, two, hits_two, before_two, int32(row_bytes * at_two), step, below)
        if groups > 2:
            hold4(hits_at, three_from, three, hits_three, before_three, int32(row_bytes * at_three), step, below)
        if groups > 3:
            hold4(hits_at, four_from, four, hits_four, before_four, int32(row_bytes * at_four), step, below)
        return walk(acc, values_at, hits_at, held, lane), came

    return product


@device_function
def listed(entry, index_at):
    """Where a listed unit's row is, and what it sent; zero if it does not reach the strip."""
    row, value = load_shared(int32(index_at + 4 * entry[0])), libdevice.int_as_float(entry[1])
    if row < 0:
        value = np.float32(0)
    return row, value


def lister(way: int):
    """The same sum over a list of events, ascending, as in `walks.py`, whose units an index of the strip places."""
    walk = walker_of_rows(way)

    @device_function
    def product(acc, list_at, count, index_at, values_at, hits_at, lane, below):
        held, at = int32(0), lane
        while at - lane < count:
            # Beyond its end a list has zeros.
            row_a, a = listed(load_early2(list_at + int64(8) * min(at, count)), index_at)
            row_b, b = listed(load_early2(list_at + int64(8) * min(int32(at + 32), count)), index_at)
            row_c, c = listed(load_early2(list_at + int64(8) * min(int32(at + 64), count)), index_at)
            row_d, d = listed(load_early2(list_at + int64(8) * min(int32(at + 96), count)), index_at)
            hits, before, found = sent4((a, b, c, d))
            hold(hits_at, held, a, hits[0], row_a, below)
            hold(hits_at, int32(held + before[0]), b, hits[1], row_b, below)
            hold(hits_at, int32(held + before[1]), c, hits[2], row_c, below)
            hold(hits_at, int32(held + before[2]), d, hits[3], row_d, below)
            held = int32(held + found)
            at = int32(at + 32 * LOOKED)
            if held > CLUSTER_HELD - 32 * LOOKED or at - lane >= count:
                acc = walk(acc, values_at, hits_at, held, lane)
                held = int32(0)
        return acc

    return product
