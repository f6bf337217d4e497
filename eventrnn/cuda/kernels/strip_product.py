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
from eventrnn.cuda.tables import (
    DENSE,
    DENSE_TERMS_PER_GROUP,
    KINDS,
    LANES,
    LIST_PAD,
    MAX_HITS,
    NARROW,
    RESIDENT,
    RUNS,
    TERMS_PER_GROUP,
)

FULL_WARP = np.uint32(0xFFFFFFFF)

ENTRIES_PER_LANE = 4


@device_function
def low_word(entry):
    """Lower half of an int64."""
    return int32(entry)


@device_function
def high_word(entry):
    """Upper half of an int64."""
    return int32(entry >> int64(32))


@device_function
def pack_words(lower, upper):
    """An int64 of two halves."""
    return (int64(upper) << int64(32)) | (int64(lower) & int64(0xFFFFFFFF))


@device_function
def pack_event(unit, value):
    """A list entry."""
    return pack_words(unit, libdevice.float_as_int(value))


@device_function
def popcount(word):
    """Set bits of an int32."""
    return int32(cuda.popc(np.uint32(word)))


@device_function
def load8(array, at):
    """Eight numbers from `at` on. Half a group, written out: a tuple stays in registers."""
    return (
        array[at],
        array[int32(at + 1)],
        array[int32(at + 2)],
        array[int32(at + 3)],
        array[int32(at + 4)],
        array[int32(at + 5)],
        array[int32(at + 6)],
        array[int32(at + 7)],
    )


def make_strip_product(layout: int):
    """The device function for matrices that lie that way."""
    narrow, resident, kind = layout & NARROW, layout & RESIDENT, layout & KINDS
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
        return weight(values, int32(low_word(entry) * width + lane))

    @device_function
    def row_weights(values, e, width, lane):
        return (
            row_weight(values, e[0], width, lane),
            row_weight(values, e[1], width, lane),
            row_weight(values, e[2], width, lane),
            row_weight(values, e[3], width, lane),
            row_weight(values, e[4], width, lane),
            row_weight(values, e[5], width, lane),
            row_weight(values, e[6], width, lane),
            row_weight(values, e[7], width, lane),
        )

    @device_function
    def add_entries(acc, w, e):
        acc = cuda.fma(w[0], libdevice.int_as_float(high_word(e[0])), acc)
        acc = cuda.fma(w[1], libdevice.int_as_float(high_word(e[1])), acc)
        acc = cuda.fma(w[2], libdevice.int_as_float(high_word(e[2])), acc)
        acc = cuda.fma(w[3], libdevice.int_as_float(high_word(e[3])), acc)
        acc = cuda.fma(w[4], libdevice.int_as_float(high_word(e[4])), acc)
        acc = cuda.fma(w[5], libdevice.int_as_float(high_word(e[5])), acc)
        acc = cuda.fma(w[6], libdevice.int_as_float(high_word(e[6])), acc)
        return cuda.fma(w[7], libdevice.int_as_float(high_word(e[7])), acc)

    @device_function
    def dense_strip_product(acc, values_at, table_at, width, lane, entries, count, hits_at):
        values = pointer(values_at)
        e = int32(0)
        while e < count:
            one, two = load8(entries, e), load8(entries, int32(e + 8))
            three, four = load8(entries, int32(e + 16)), load8(entries, int32(e + 24))
            w_one, w_two = row_weights(values, one, width, lane), row_weights(values, two, width, lane)
            w_three, w_four = row_weights(values, three, width, lane), row_weights(values, four, width, lane)
            acc = add_entries(add_entries(acc, w_one, one), w_two, two)
            acc = add_entries(add_entries(acc, w_three, three), w_four, four)
            e = int32(e + DENSE_TERMS_PER_GROUP)
        return acc

    if kind == RUNS:

        @device_function
        def place(word, lane, lanes_below):
            return int32(high_word(word) + lane)
    else:

        @device_function
        def place(word, lane, lanes_below):
            return int32(high_word(word) + popcount(low_word(word) & lanes_below))

    @device_function
    def hit_weight(values, word, lane, lanes_below):
        # A lane without a weight reads what lies there, and multiplies by zero.
        value = weight(values, place(word, lane, lanes_below))
        if (low_word(word) >> lane) & 1:
            return value
        return np.float32(0)

    @device_function
    def hit_weights(values, w, lane, lanes_below):
        return (
            hit_weight(values, w[0], lane, lanes_below),
            hit_weight(values, w[1], lane, lanes_below),
            hit_weight(values, w[2], lane, lanes_below),
            hit_weight(values, w[3], lane, lanes_below),
            hit_weight(values, w[4], lane, lanes_below),
            hit_weight(values, w[5], lane, lanes_below),
            hit_weight(values, w[6], lane, lanes_below),
            hit_weight(values, w[7], lane, lanes_below),
        )

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
    def load_table_word(table, entries, e, count):
        """The table's word for an entry of the list, and the entry; zeros beyond its end."""
        entry = word = int64(0)
        if e < count:
            entry = entries[e]
            word = table[low_word(entry)]
        return word, entry

    @device_function
    def append_hits(words, values_of_hits, hits, word, entry, lanes_below):
        """Append the warp's hits; returns how many are held."""
        hit = cuda.ballot_sync(FULL_WARP, low_word(word) != 0)
        if low_word(word) != 0:
            p = int32(hits + popcount(hit & lanes_below))
            words[p], values_of_hits[p] = word, libdevice.int_as_float(high_word(entry))
        return int32(hits + popcount(hit))

    @device_function
    def masked_strip_product(acc, values_at, table_at, width, lane, entries, count, hits_at):
        values, table = pointer(values_at), words_of(table_at)
        words, values_of_hits = shared_int64(hits_at), shared_float32(hits_at + int64(8 * (MAX_HITS + LIST_PAD)))
        lanes_below = int32((int32(1) << lane) - 1)
        hits, e = int32(0), lane
        while e - lane < count:
            word_a, entry_a = load_table_word(table, entries, e, count)
            word_b, entry_b = load_table_word(table, entries, int32(e + LANES), count)
            word_c, entry_c = load_table_word(table, entries, int32(e + 2 * LANES), count)
            word_d, entry_d = load_table_word(table, entries, int32(e + 3 * LANES), count)
            hits = append_hits(words, values_of_hits, hits, word_a, entry_a, lanes_below)
            hits = append_hits(words, values_of_hits, hits, word_b, entry_b, lanes_below)
            hits = append_hits(words, values_of_hits, hits, word_c, entry_c, lanes_below)
            hits = append_hits(words, values_of_hits, hits, word_d, entry_d, lanes_below)
            e = int32(e + ENTRIES_PER_LANE * LANES)
            if hits > MAX_HITS - ENTRIES_PER_LANE * LANES or e - lane >= count:
                if lane < LIST_PAD:
                    words[hits + lane], values_of_hits[hits + lane] = int64(0), np.float32(0)
                cuda.syncwarp(FULL_WARP)
                h = int32(0)
                while h < hits:
                    one = load8(words, h)
                    weights = hit_weights(values, one, lane, lanes_below)
                    if hits - h > 8:
                        two = load8(words, int32(h + 8))
                        more = hit_weights(values, two, lane, lanes_below)
                        acc = add_hits(acc, weights, load8(values_of_hits, h))
                        acc = add_hits(acc, more, load8(values_of_hits, int32(h + 8)))
                    else:
                        acc = add_hits(acc, weights, load8(values_of_hits, h))
                    h = int32(h + TERMS_PER_GROUP)
                cuda.syncwarp(FULL_WARP)
                hits = int32(0)
        return acc

    return dense_strip_product if kind == DENSE else masked_strip_product


def dispatch(layouts: tuple[int, ...]):
    """The device function for matrices that lie in any of those ways: its first argument says which."""
    strip_product = make_strip_product(layouts[0])
    if len(layouts) == 1:

        @device_function
        def one_layout(layout, acc, values_at, table_at, width, lane, entries, count, hits_at):
            return strip_product(acc, values_at, table_at, width, lane, entries, count, hits_at)

        return one_layout
    first, others = int(layouts[0]), dispatch(layouts[1:])

    @device_function
    def several_layouts(layout, acc, values_at, table_at, width, lane, entries, count, hits_at):
        if layout == first:
            return strip_product(acc, values_at, table_at, width, lane, entries, count, hits_at)
        return others(layout, acc, values_at, table_at, width, lane, entries, count, hits_at)

    return several_layouts
