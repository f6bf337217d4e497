"""Product of one strip of weights with one list of events: acc + sum over the events of weight * value.

These are device functions. One warp computes one strip, one lane computes one output of the strip. The result equals
the columns of the strip in `reference.propagate`: terms are added in ascending presynaptic index, one FMA per term.
The loads of a group of terms are issued together, so that only the FMAs form a dependent chain.

=========== ================= ====================================================================================
array       memory            contents
=========== ================= ====================================================================================
acc         register          float32, one output per lane
entries     shared            (count + LIST_PAD,) int64 events: unit in the lower half, bits of the float32 value in
                              the upper half; the LIST_PAD entries at the end are zero and add nothing; the list
                              begins at a multiple of 16
values      shared or global  weights of the strip, float32 or uint16 bits of bfloat16 (`packing.Strips.values`)
table       shared or global  (n_pre,) int64 for MASKED and RUNS: mask of outputs in the lower half, position of the
                              weights in the upper half (`packing.Strips.table`)
hits        shared, per warp  (MAX_HITS + LIST_PAD,) int64 table words, then as many float32 values: the events that
                              have a weight in this strip
=========== ================= ====================================================================================

Barriers: warps synchronise only with themselves (`syncwarp`), before and after they read `hits`. The caller
synchronises the block after `entries` has been written.

Tuples: `gated_blocks` says why no variable that holds one is assigned in two places. What a loop keeps is in arrays of
eight, whose places are constants, so that they are registers.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, int64

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.ptx import (
    global_float32,
    global_int64,
    global_uint16,
    load_shared4,
    load_shared_float,
    load_shared_uint16,
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

# The mask of a full warp, for votes and warp barriers.
FULL_WARP = np.uint32(0xFFFFFFFF)

# List entries whose table words one lane loads before the hits are appended.
ENTRIES_PER_LANE = 4


@device_function
def low_word(entry):
    """Lower half of an int64, as int32."""
    return int32(entry)


@device_function
def high_word(entry):
    """Upper half of an int64, as int32."""
    return int32(entry >> int64(32))


@device_function
def pack_words(lower, upper):
    """An int64 made of two int32 halves."""
    return (int64(upper) << int64(32)) | (int64(lower) & int64(0xFFFFFFFF))


@device_function
def pack_event(unit, value):
    """The int64 list entry of an event: unit index and float32 value."""
    return pack_words(unit, libdevice.float_as_int(value))


@device_function
def popcount(word):
    """Number of set bits of an int32."""
    return int32(cuda.popc(np.uint32(word)))


def make_load8(load):
    """The device function load8(base, terms, *rest): `load(base, term, *rest)` of eight terms.

    It is written out, because a tuple stays in registers.
    """

    @device_function
    def load8(base, terms, *rest):
        return (
            load(base, terms[0], *rest),
            load(base, terms[1], *rest),
            load(base, terms[2], *rest),
            load(base, terms[3], *rest),
            load(base, terms[4], *rest),
            load(base, terms[5], *rest),
            load(base, terms[6], *rest),
            load(base, terms[7], *rest),
        )

    return load8


def make_add8(value_of):
    """The device function add8(acc, weights, terms): acc + sum of weight * value_of(term), eight FMAs in order."""

    @device_function
    def add8(acc, weights, terms):
        acc = cuda.fma(weights[0], value_of(terms[0]), acc)
        acc = cuda.fma(weights[1], value_of(terms[1]), acc)
        acc = cuda.fma(weights[2], value_of(terms[2]), acc)
        acc = cuda.fma(weights[3], value_of(terms[3]), acc)
        acc = cuda.fma(weights[4], value_of(terms[4]), acc)
        acc = cuda.fma(weights[5], value_of(terms[5]), acc)
        acc = cuda.fma(weights[6], value_of(terms[6]), acc)
        return cuda.fma(weights[7], value_of(terms[7]), acc)

    return add8


@device_function
def value_of_event(entry):
    """The float32 value of a list entry."""
    return libdevice.int_as_float(high_word(entry))


@device_function
def unchanged(value):
    """The value itself."""
    return value


@device_function
def load8(array, at):
    """Eight neighbouring elements of an array, from `at` on. They are written out: a tuple stays in registers."""
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


@device_function
def set8(array, terms):
    """Give the first eight elements of an array new values. They are written out, so that the array is registers."""
    array[0], array[1], array[2], array[3] = terms[0], terms[1], terms[2], terms[3]
    array[4], array[5], array[6], array[7] = terms[4], terms[5], terms[6], terms[7]


add_events8, add_values8, add_words8 = (make_add8(each) for each in (value_of_event, unchanged, libdevice.int_as_float))


@device_function
def entries8(at):
    """First and second words of eight neighbouring pairs in shared memory, from address `at` on, a multiple of 16."""
    a, b = load_shared4(at), load_shared4(int32(at + 16))
    c, d = load_shared4(int32(at + 32)), load_shared4(int32(at + 48))
    return (a[0], a[2], b[0], b[2], c[0], c[2], d[0], d[2]), (a[1], a[3], b[1], b[3], c[1], c[3], d[1], d[3])


def make_shared_weight(narrow: bool):
    """The device function weight: shared address of a weight -> float32."""
    if not narrow:
        return load_shared_float

    @device_function
    def weight(at):
        # The upper half of a float32 is a bfloat16.
        return libdevice.int_as_float(load_shared_uint16(at) << int32(16))

    return weight


def make_pipelined_product(narrow: bool):
    """`strip_product` for dense weights in shared memory, for a warp that waits for nothing but the sum itself.

    While the terms of one group are added, the weights of the next group and the entries of the one after it are
    loaded. That takes about 110 registers.
    """
    weight_at, size = make_shared_weight(narrow), 2 if narrow else 4

    @device_function
    def row_at(own_at, unit, row_bytes):
        return int32(own_at + unit * row_bytes)

    @device_function
    def weight_of(base, at):
        return weight_at(at)

    rows_at, weights_of = make_load8(row_at), make_load8(weight_of)

    @device_function
    def pipelined_strip_product(acc, values_at, table_at, width, lane, entries_at, count, hits_at):
        own_at, row_bytes, at, e = int32(values_at + size * lane), int32(size * width), int32(entries_at), int32(0)
        # The zeros after the list, which are read in place of entries beyond it.
        end = int32(at + 8 * ((count + 1) & -2))
        # Of the group that is added: weights and values of events. Of the next one: addresses of weights, and values.
        weights, more = cuda.local.array(8, float32), cuda.local.array(8, float32)
        rows, more_rows = cuda.local.array(8, int32), cuda.local.array(8, int32)
        values, more_values = cuda.local.array(8, int32), cuda.local.array(8, int32)
        next_values, more_next_values = cuda.local.array(8, int32), cuda.local.array(8, int32)
        (units, first), (more_units, more_first) = entries8(at), entries8(int32(at + 64))
        set8(weights, weights_of(0, rows_at(own_at, units, row_bytes)))
        set8(more, weights_of(0, rows_at(own_at, more_units, row_bytes)))
        set8(values, first)
        set8(more_values, more_first)
        next_units, second = entries8(int32(at + 128))
        more_next_units, more_second = entries8(int32(at + 192))
        set8(rows, rows_at(own_at, next_units, row_bytes))
        set8(more_rows, rows_at(own_at, more_next_units, row_bytes))
        set8(next_values, second)
        set8(more_next_values, more_second)
        while e < count:
            at = min(int32(at + 128), end)
            later = min(int32(at + 128), end)
            later_units, later_values = entries8(later)
            more_later_units, more_later_values = entries8(int32(later + 64))
            loaded, more_loaded = weights_of(0, load8(rows, 0)), weights_of(0, load8(more_rows, 0))
            acc = add_words8(acc, load8(weights, 0), load8(values, 0))
            acc = add_words8(acc, load8(more, 0), load8(more_values, 0))
            set8(rows, rows_at(own_at, later_units, row_bytes))
            set8(more_rows, rows_at(own_at, more_later_units, row_bytes))
            set8(weights, loaded)
            set8(more, more_loaded)
            set8(values, load8(next_values, 0))
            set8(more_values, load8(more_next_values, 0))
            set8(next_values, later_values)
            set8(more_next_values, more_later_values)
            e = int32(e + 16)
        return acc

    return pipelined_strip_product


def make_strip_product(layout: int, pipelined: bool = False):
    """The device function strip_product for matrices of one layout (`tables.layout_code`).

    strip_product(acc, values_at, table_at, width, lane, entries_at, count, hits_at) -> acc, with byte addresses
    `values_at`, `table_at`, `entries_at`, `hits_at`, `width` outputs per strip and `count` events. With `pipelined`,
    dense weights in shared memory are multiplied by `make_pipelined_product`.
    """
    narrow, resident, kind = layout & NARROW, layout & RESIDENT, layout & KINDS
    if pipelined and resident and kind == DENSE:
        return make_pipelined_product(bool(narrow))
    if narrow:
        pointer = shared_uint16 if resident else global_uint16

        @device_function
        def weight(values, at):
            # The upper half of a float32 is a bfloat16.
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

    row_weights = make_load8(row_weight)

    @device_function
    def dense_strip_product(acc, values_at, table_at, width, lane, entries_at, count, hits_at):
        values, entries = pointer(values_at), shared_int64(entries_at)
        e = int32(0)
        while e < count:
            one, two = load8(entries, e), load8(entries, int32(e + 8))
            three, four = load8(entries, int32(e + 16)), load8(entries, int32(e + 24))
            w_one, w_two = row_weights(values, one, width, lane), row_weights(values, two, width, lane)
            w_three, w_four = row_weights(values, three, width, lane), row_weights(values, four, width, lane)
            acc = add_events8(add_events8(acc, w_one, one), w_two, two)
            acc = add_events8(add_events8(acc, w_three, three), w_four, four)
            e = int32(e + DENSE_TERMS_PER_GROUP)
        return acc

    if kind == RUNS:

        @device_function
        def position(word, lane, lanes_below):
            return int32(high_word(word) + lane)
    else:

        @device_function
        def position(word, lane, lanes_below):
            return int32(high_word(word) + popcount(low_word(word) & lanes_below))

    @device_function
    def hit_weight(values, word, lane, lanes_below):
        # The load is unconditional: a lane without a weight reads a neighbour's and replaces it by zero.
        value = weight(values, position(word, lane, lanes_below))
        if (low_word(word) >> lane) & 1:
            return value
        return np.float32(0)

    hit_weights = make_load8(hit_weight)

    @device_function
    def load_table_word(table, entries, e, count):
        """The table word of list entry `e`, and the entry; zeros beyond the end of the list."""
        entry = word = int64(0)
        if e < count:
            entry = entries[e]
            word = table[low_word(entry)]
        return word, entry

    @device_function
    def append_hits(words, values_of_hits, hits, word, entry, lanes_below):
        """Append the entries of this warp that have weights in the strip, in order of lanes; returns the new count."""
        hit = cuda.ballot_sync(FULL_WARP, low_word(word) != 0)
        if low_word(word) != 0:
            p = int32(hits + popcount(hit & lanes_below))
            words[p], values_of_hits[p] = word, value_of_event(entry)
        return int32(hits + popcount(hit))

    @device_function
    def masked_strip_product(acc, values_at, table_at, width, lane, entries_at, count, hits_at):
        values, table, entries = pointer(values_at), words_of(table_at), shared_int64(entries_at)
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
                # The buffer may not hold another round, or the list has ended: multiply what it holds.
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
                        acc = add_values8(acc, weights, load8(values_of_hits, h))
                        acc = add_values8(acc, more, load8(values_of_hits, int32(h + 8)))
                    else:
                        acc = add_values8(acc, weights, load8(values_of_hits, h))
                    h = int32(h + TERMS_PER_GROUP)
                cuda.syncwarp(FULL_WARP)
                hits = int32(0)
        return acc

    return dense_strip_product if kind == DENSE else masked_strip_product


def dispatch(layouts: tuple[int, ...], pipelined: bool = False):
    """The device function strip_product for matrices of several layouts; its first argument is the layout code."""
    strip_product = make_strip_product(layouts[0], pipelined)
    if len(layouts) == 1:

        @device_function
        def one_layout(layout, acc, values_at, table_at, width, lane, entries_at, count, hits_at):
            return strip_product(acc, values_at, table_at, width, lane, entries_at, count, hits_at)

        return one_layout
    first, others = int(layouts[0]), dispatch(layouts[1:], pipelined)

    @device_function
    def several_layouts(layout, acc, values_at, table_at, width, lane, entries_at, count, hits_at):
        if layout == first:
            return strip_product(acc, values_at, table_at, width, lane, entries_at, count, hits_at)
        return others(layout, acc, values_at, table_at, width, lane, entries_at, count, hits_at)

    return several_layouts
