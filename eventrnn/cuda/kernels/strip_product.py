"""Walking one strip of weights: acc + sum over events of weight * value, ascending, one FMA a term.

A list is an array of int64: the unit in the lower half, the bits of the value in the upper; `LIST_PAD` entries of zero
end it, which add nothing. A warp walks, a lane an output. The loads of a group of terms go out together, so that only
their FMAs wait for each other.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.ptx import (
    global_float32,
    global_int64,
    global_uint16,
    shared_float32,
    shared_int64,
    shared_uint16,
)
from eventrnn.cuda.tables import DENSE, DENSE_GROUP, GROUP, KINDS, LANES, LIST_PAD, MAX_HITS, NARROW, RESIDENT, RUNS

ALL = np.uint32(0xFFFFFFFF)

ROUNDS = 4


@device_function
def low(entry):
    """Lower half of an int64."""
    return int32(entry)


@device_function
def high(entry):
    """Upper half of an int64."""
    return int32(entry >> int64(32))


@device_function
def paired(lower, upper):
    """An int64 of two halves."""
    return (int64(upper) << int64(32)) | (int64(lower) & int64(0xFFFFFFFF))


@device_function
def entry_of(unit, value):
    """A list entry."""
    return paired(unit, libdevice.float_as_int(value))


@device_function
def count_bits(word):
    """Set bits of an int32."""
    return int32(cuda.popc(np.uint32(word)))


@device_function
def load8(array, at):
    """Eight numbers from `at` on. Half a group, written out: a tuple stays in registers."""
    return (
        array[at], array[int32(at + 1)], array[int32(at + 2)], array[int32(at + 3)],
        array[int32(at + 4)], array[int32(at + 5)], array[int32(at + 6)], array[int32(at + 7)],
    )  # fmt: skip


def walker(way: int):
    """The device function for matrices that lie that way."""
    narrow, resident, kind = way & NARROW, way & RESIDENT, way & KINDS
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
    def row_weight(values, entry, width, lane):
        return weight(values, int32(low(entry) * width + lane))

    @device_function
    def row_weights(values, e, width, lane):
        return (
            row_weight(values, e[0], width, lane), row_weight(values, e[1], width, lane),
            row_weight(values, e[2], width, lane), row_weight(values, e[3], width, lane),
            row_weight(values, e[4], width, lane), row_weight(values, e[5], width, lane),
            row_weight(values, e[6], width, lane), row_weight(values, e[7], width, lane),
        )  # fmt: skip

    @device_function
    def add_entries(acc, w, e):
        acc = cuda.fma(w[0], libdevice.int_as_float(high(e[0])), acc)
        acc = cuda.fma(w[1], libdevice.int_as_float(high(e[1])), acc)
        acc = cuda.fma(w[2], libdevice.int_as_float(high(e[2])), acc)
        acc = cuda.fma(w[3], libdevice.int_as_float(high(e[3])), acc)
        acc = cuda.fma(w[4], libdevice.int_as_float(high(e[4])), acc)
        acc = cuda.fma(w[5], libdevice.int_as_float(high(e[5])), acc)
        acc = cuda.fma(w[6], libdevice.int_as_float(high(e[6])), acc)
        return cuda.fma(w[7], libdevice.int_as_float(high(e[7])), acc)

    @device_function
    def dense(acc, values_at, table_at, width, lane, entries, count, hits_at):
        values = pointer(values_at)
        e = int32(0)
        while e < count:
            one, two = load8(entries, e), load8(entries, int32(e + 8))
            three, four = load8(entries, int32(e + 16)), load8(entries, int32(e + 24))
            w_one, w_two = row_weights(values, one, width, lane), row_weights(values, two, width, lane)
            w_three, w_four = row_weights(values, three, width, lane), row_weights(values, four, width, lane)
            acc = add_entries(add_entries(acc, w_one, one), w_two, two)
            acc = add_entries(add_entries(acc, w_three, three), w_four, four)
            e = int32(e + DENSE_GROUP)
        return acc

    if kind == RUNS:

        @device_function
        def place(word, lane, below):
            return int32(high(word) + lane)
    else:

        @device_function
        def place(word, lane, below):
            return int32(high(word) + count_bits(low(word) & below))

    @device_function
    def hit_weight(values, word, lane, below):
        # A lane without a weight reads what lies there, and multiplies by zero.
        value = weight(values, place(word, lane, below))
        if (low(word) >> lane) & 1:
            return value
        return np.float32(0)

    @device_function
    def hit_weights(values, w, lane, below):
        return (
            hit_weight(values, w[0], lane, below), hit_weight(values, w[1], lane, below),
            hit_weight(values, w[2], lane, below), hit_weight(values, w[3], lane, below),
            hit_weight(values, w[4], lane, below), hit_weight(values, w[5], lane, below),
            hit_weight(values, w[6], lane, below), hit_weight(values, w[7], lane, below),
        )  # fmt: skip

    @device_function
    def add_hits(acc, w, s):
        acc = cuda.fma(w[0], s[0], acc)
        acc = cuda.fma(w[1], s[1], acc)
        acc = cuda.fma(w[2], s[2], acc)
        acc = cuda.fma(w[3], s[3], acc)
        acc = cuda.fma(w[4], s[4], acc)
        acc = cuda.fma(w[5], s[5], acc)
        acc = cuda.fma(w[6], s[6], acc)
        return cuda.fma(w[7], s[7], acc)

    @device_function
    def word_at(table, entries, e, count):
        """The table's word for an entry of the list, and the entry; zeros beyond its end."""
        entry = word = int64(0)
        if e < count:
            entry = entries[e]
            word = table[low(entry)]
        return word, entry

    @device_function
    def hold(words, sizes, held, word, entry, below):
        """Append the warp's hits; returns how many are held."""
        hit = cuda.ballot_sync(ALL, low(word) != 0)
        if low(word) != 0:
            p = int32(held + count_bits(hit & below))
            words[p], sizes[p] = word, libdevice.int_as_float(high(entry))
        return int32(held + count_bits(hit))

    @device_function
    def masked(acc, values_at, table_at, width, lane, entries, count, hits_at):
        values, table = pointer(values_at), words_of(table_at)
        words, sizes = shared_int64(hits_at), shared_float32(hits_at + int64(8 * (MAX_HITS + LIST_PAD)))
        below = int32((int32(1) << lane) - 1)
        held, e = int32(0), lane
        while e - lane < count:
            word_a, entry_a = word_at(table, entries, e, count)
            word_b, entry_b = word_at(table, entries, int32(e + LANES), count)
            word_c, entry_c = word_at(table, entries, int32(e + 2 * LANES), count)
            word_d, entry_d = word_at(table, entries, int32(e + 3 * LANES), count)
            held = hold(words, sizes, held, word_a, entry_a, below)
            held = hold(words, sizes, held, word_b, entry_b, below)
            held = hold(words, sizes, held, word_c, entry_c, below)
            held = hold(words, sizes, held, word_d, entry_d, below)
            e = int32(e + ROUNDS * LANES)
            if held > MAX_HITS - ROUNDS * LANES or e - lane >= count:
                if lane < LIST_PAD:
                    words[held + lane], sizes[held + lane] = int64(0), np.float32(0)
                cuda.syncwarp(ALL)
                h = int32(0)
                while h < held:
                    one = load8(words, h)
                    weights = hit_weights(values, one, lane, below)
                    if held - h > 8:
                        two = load8(words, int32(h + 8))
                        more = hit_weights(values, two, lane, below)
                        acc = add_hits(acc, weights, load8(sizes, h))
                        acc = add_hits(acc, more, load8(sizes, int32(h + 8)))
                    else:
                        acc = add_hits(acc, weights, load8(sizes, h))
                    h = int32(h + GROUP)
                cuda.syncwarp(ALL)
                held = int32(0)
        return acc

    return dense if kind == DENSE else masked


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
