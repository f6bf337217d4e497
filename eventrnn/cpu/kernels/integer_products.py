"""Block segments of int8 weights times rounded events, in integers. Not exact; `reference_products` specifies it.

The values of a drive row are rounded to whole numbers with one step, so that the terms of a sum are integers. The sum
of integers is the same in every order, and the results have the same bits for every number of threads, on every
processor and for every split of a run: those of `reference_products.propagate_integers`.

The sums go strip by strip of 64 columns, in registers; `strip_events.py` lists the events of a strip. Where there are
instructions for them, four segments at a time are interleaved, so that an instruction adds four products of bytes to a
column. The segments of a unit lie together, in the order of strips, so that an event has an offset that moves on from
one to the next. A column tile has in `pools.pointers`, each on a cache line,

    positions               of its `PITCH` strips in a drive row
    units                   per unit where its segments begin, in words of 64 bits, and a word of bits per 64 strips
    bits, rounded, offsets  arrays by event: a word of bits, the rounded value, and where the next segment begins
    bytes                   the bits, sorted by strips
    counts, lists           the events of `LISTED_STRIPS` strips, per chunk of events

of which the kernel writes those from the bits on, and in `pools.values` the segments. A thread writes what belongs to
its own column tiles.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from eventrnn._integers import ceil_div, round_up
from eventrnn.cells import power_of_two
from eventrnn.cpu.kernels.emit import INTS, carry_each, for_each, lane, splat_int, store_ints
from eventrnn.cpu.kernels.jit import called_by_address
from eventrnn.cpu.kernels.row_products import values_at
from eventrnn.cpu.kernels.simd import (
    AVX512,
    I1,
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    address,
    call,
    first_lanes,
    fma_vector,
    load_vector,
    may_use,
    splat,
    store_vector,
)
from eventrnn.cpu.kernels.spmm import copy
from eventrnn.cpu.kernels.strip_events import (
    BLOCK_EVENTS,
    NOBODY,
    QUADS,
    list_events,
    look_up,
    look_up_offsets,
    transpose_bits,
)
from eventrnn.cpu.kernels.strips import BYTES, I8, WORDS
from eventrnn.cpu.tables import (
    CHUNK_EVENTS,
    CHUNK_PITCH,
    DENSE_FROM,
    HIGH,
    LIST_WORDS,
    LISTED_STRIPS,
    LOW,
    PITCH,
    POINTERS,
    SCALES,
    SEGMENT_WORDS,
    STRIPS_PER_WORD,
    WIDTH,
)

# The bits of an infinity. Products of the events and scales of a drive row may overflow; its drives are NaN then.
INFINITE = 0x7F800000

# Half of 512 bits, as words of 16 bits.
_HALF = ir.VectorType(I16, LANES)

# The bytes of an int32 that the digits of an event may become.
PLACES = 4 if QUADS else 1

_VNNI, _AVX512BW, _AVX2 = (may_use(feature) for feature in ("avx512vnni", "avx512bw", "avx2"))


def _gather(builder, pointer, numbers):
    """The float32 at sixteen numbers after a pointer."""
    if AVX512:
        values = ir.Constant(VECTOR, [0.0] * LANES), builder.bitcast(pointer, I8.as_pointer()), numbers
        everywhere = ir.Constant(ir.VectorType(I1, LANES), [True] * LANES)
        return call(builder, "llvm.x86.avx512.mask.gather.dps.512", VECTOR, [*values, everywhere, I32(4)])
    found = ir.Constant(VECTOR, ir.Undefined)
    for number in map(I32, range(LANES)):
        place = builder.gep(pointer, [builder.sext(builder.extract_element(numbers, number), I64)])
        found = builder.insert_element(found, builder.load(place), number)
    return found


@intrinsic
def scaled_events(typingctx, indices, values, begin, count, scales, s0, ids, products, at):
    """Copy the units of `count` events from `begin` on to ids[at:], and value * scale of each to products[at:].

    Returns the largest of the products, without its sign, as the bits of a float32. Up to fifteen elements more are
    written.

    indices, ids     : int32, units
    values, products : float32
    scales           : float32, one per unit, from element s0 on
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        index_at, value_at = (address(context, builder, kinds[k], args[k], args[2]) for k in (0, 1))
        scale_at = address(context, builder, kinds[4], args[4], args[5])
        id_at, product_at = (address(context, builder, kinds[k], args[k], args[8]) for k in (6, 7))
        most = cgutils.alloca_once_value(builder, ir.Constant(INTS, [0] * LANES))

        def body(k):
            inside = first_lanes(builder, builder.sub(args[3], k))
            loaded = []
            for pointer, kind, name in ((index_at, INTS, "i32"), (value_at, VECTOR, "f32")):
                source = builder.bitcast(builder.gep(pointer, [k]), kind.as_pointer())
                nothing = ir.Constant(kind, [0] * LANES)
                loaded.append(
                    call(builder, f"llvm.masked.load.v{LANES}{name}.p0", kind, [source, I32(4), inside, nothing])
                )
            units, sent = loaded
            product = builder.fmul(sent, _gather(builder, scale_at, units))
            store_ints(builder, units, builder.gep(id_at, [k]))
            store_vector(builder, product, builder.gep(product_at, [k]))
            size = builder.and_(builder.bitcast(product, INTS), ir.Constant(INTS, [0x7FFFFFFF] * LANES))
            before = builder.load(most)
            builder.store(builder.select(builder.icmp_signed(">", size, before), size, before), most)

        for_each(builder, args[3], body, step=LANES)
        largest = call(builder, f"llvm.vector.reduce.smax.v{LANES}i32", I32, [builder.load(most)])
        return builder.zext(largest, I64)

    return types.int64(indices, values, begin, count, scales, s0, ids, products, at), generate


def _digits(builder, whole):
    """Two digits A and B per number, int32 from -2^14 to 2^14, of eight bits without a sign: 129 A - 128 B.

    The instruction multiplies bytes with a sign, which are the weights, by bytes without one.
    """
    numbers = {n: ir.Constant(INTS, [n] * LANES) for n in (0, 7, 127, 128, 129)}
    a = builder.and_(whole, numbers[127])
    b = builder.sub(a, builder.ashr(whole, numbers[7]))
    below = builder.icmp_signed("<", b, numbers[0])
    a = builder.select(below, builder.add(a, numbers[128]), a)
    return a, builder.select(below, builder.add(b, numbers[129]), b)


@intrinsic
def round_events(typingctx, products, begin, count, inverse, pointers, rounded):
    """Round products * inverse of a chunk to whole numbers, a tie to even.

    products : float32, of which the chunk has `count` from element `begin` on, with fifteen elements to spare
    pointers : int64; from pointers[rounded] on it gets the numbers: with `QUADS` two digits, in the lower and the upper
               int32, as byte 0 of them, CHUNK_PITCH further on as byte 1, and so on; else the lower 16 bits
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        product_at = address(context, builder, kinds[0], args[0], args[1])
        target, factor = address(context, builder, kinds[4], args[4], args[5]), splat(builder, args[3])
        longs = ir.VectorType(I64, LANES)

        def round_vector(k):
            product = builder.fmul(load_vector(builder, builder.gep(product_at, [k])), factor)
            whole = builder.fptosi(call(builder, f"llvm.rint.v{LANES}f32", VECTOR, [product]), INTS)
            if QUADS:
                a, b = (builder.zext(each, longs) for each in _digits(builder, whole))
                words = builder.or_(a, builder.shl(b, ir.Constant(longs, [32] * LANES)))
            else:
                words = builder.zext(builder.and_(whole, ir.Constant(INTS, [0xFFFF] * LANES)), longs)
            for j in range(PLACES):
                moved = builder.shl(words, ir.Constant(longs, [8 * j] * LANES))
                place = builder.gep(target, [builder.add(k, I64(j * CHUNK_PITCH))])
                builder.store(moved, builder.bitcast(place, longs.as_pointer()), align=8)

        for_each(builder, args[2], round_vector, step=LANES)
        return context.get_dummy_value()

    return types.void(products, begin, count, inverse, pointers, rounded), generate


def _multiply_add(builder, total, weights, value):
    """total + weights * value, sixteen int32 each; weights and values have at most 16 bits, values as unsigned ones.

    The upper half of a value is zero, so that the pair of products that an instruction adds has one that is zero.
    """
    if AVX512 and _VNNI:
        return call(builder, "llvm.x86.avx512.vpdpwssd.512", INTS, [total, weights, value])
    if AVX512 and _AVX512BW:
        pairs = [builder.bitcast(each, WORDS) for each in (weights, value)]
        return builder.add(total, call(builder, "llvm.x86.avx512.pmaddw.d.512", INTS, pairs))
    if _AVX2:
        parts = []
        for first in (0, LANES // 2):
            some = ir.Constant(ir.VectorType(I32, LANES // 2), list(range(first, first + LANES // 2)))
            half = [builder.shuffle_vector(each, each, some) for each in (weights, value)]
            pairs = [builder.bitcast(each, _HALF) for each in half]
            parts.append(call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, LANES // 2), pairs))
        return builder.add(total, builder.shuffle_vector(*parts, ir.Constant(INTS, list(range(LANES)))))
    signed = builder.sext(builder.trunc(value, _HALF), INTS)
    return builder.add(total, builder.mul(weights, signed))


def _next_segments(builder, events, offsets, source):
    """The next segment of each of some events, a pointer to bytes; the offsets of the events move on by one segment."""
    places = [builder.gep(offsets, [event]) for event in events]
    before = [builder.load(place) for place in places]
    for offset, place in zip(before, places, strict=True):
        builder.store(builder.add(offset, I32(SEGMENT_WORDS)), place)
    segments = [builder.gep(source, [builder.zext(offset, I64)]) for offset in before]
    return [builder.bitcast(segment, I8.as_pointer()) for segment in segments]


def _number(builder, list_at, k):
    """The number of a listed event."""
    return builder.zext(builder.load(builder.gep(list_at, [k])), I64)


def _one_by_one(builder, list_at, count, offsets, rounded, source, totals):
    """Emit the sums of the `count` listed events of a chunk, added to four vectors of int32, those of the columns."""

    def add(k, sums):
        event = _number(builder, list_at, k)
        (segment,), after = _next_segments(builder, [event], offsets, source), []
        value = splat_int(builder, builder.trunc(builder.load(builder.gep(rounded, [event])), I32))
        for i, total in enumerate(sums):
            raw = builder.bitcast(builder.gep(segment, [I64(LANES * i)]), ir.VectorType(I8, LANES).as_pointer())
            weights = builder.sext(builder.load(raw, align=1), INTS)
            after.append(_multiply_add(builder, total, weights, value))
        return after

    return carry_each(builder, count, totals, add)


def _interleaved(builder, kind, a, b):
    """The elements of a and b in turn, in each quarter of 128 bits: of its lower halves, and of its upper ones."""
    a, b = builder.bitcast(a, kind), builder.bitcast(b, kind)
    n, per = kind.count, kind.count // 4
    for half in (0, per // 2):
        order = [j + side for q in range(0, n, per) for j in range(q + half, q + half + per // 2) for side in (0, n)]
        yield builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, n), order))


def _by_quads(builder, list_at, count, offsets, rounded, source, totals):
    """Emit the sums of the `count` listed events of a chunk, four at a time, added to eight vectors of int32.

    Four vectors are sums of the first digits, four of the second ones. The columns of the segments are in the order
    that interleaving undoes.
    """

    def add(k, sums):
        first = builder.shl(k, I64(2))
        events = [_number(builder, list_at, builder.add(first, I64(j))) for j in range(4)]
        segments = _next_segments(builder, events, offsets, source)
        digits = I64(0)
        for j, event in enumerate(events):
            place = builder.gep(rounded, [builder.add(event, I64(j * CHUNK_PITCH))])
            digits = builder.or_(digits, builder.load(place))
        parts = [splat_int(builder, builder.trunc(builder.lshr(digits, I64(bits)), I32)) for bits in (0, 32)]
        a, b, c, d = (builder.load(builder.bitcast(each, BYTES.as_pointer()), align=1) for each in segments)
        pairs = zip(_interleaved(builder, BYTES, a, b), _interleaved(builder, BYTES, c, d), strict=True)
        quads = [builder.bitcast(each, BYTES) for pair in pairs for each in _interleaved(builder, WORDS, *pair)]
        name = "llvm.x86.avx512.vpdpbusd.512"
        return [
            call(builder, name, INTS, [total, builder.bitcast(part, BYTES), quad])
            for part, some in zip(parts, (sums[:4], sums[4:]), strict=True)
            for quad, total in zip(quads, some, strict=True)
        ]

    # The weights of NOBODY, times zero, are those of the first segment.
    builder.store(I32(0), builder.gep(offsets, [I64(NOBODY)]))
    return carry_each(builder, builder.ashr(builder.add(count, I64(3)), I64(2)), totals, add)


@intrinsic
def add_strips(
    typingctx,
    drive,
    at,
    initial,
    begin,
    step,
    weights,
    start,
    pointers,
    by_event,
    positions,
    strips,
    counts,
    listed,
    chunks,
):
    """drive[at + p + i] = initial[begin + p + i] + step * S[i], i < 64, for strips at the positions p, one after the
    other, where S is the sum over the listed events of a rounded value times weight i of the next segment of the event.

    S is a sum of integers; its conversion to float32 and the FMA round once each.

    weights  : int8; the offsets count words of 8 bytes from element `start` on
    pointers : int64. From pointers[by_event[0]] on are the offsets by event, int32, and from pointers[by_event[1]] on
               the rounded values by event, see `round_events`; the positions of the `strips` strips at
               pointers[positions]; counts and lists, `chunks` per strip, are those of `strip_events.list_events`
    """

    def generate(context, builder, signature, args):
        kinds, nothing = signature.args, ir.Constant(INTS, [0] * LANES)
        target = address(context, builder, kinds[0], args[0], args[1])
        before = address(context, builder, kinds[2], args[2], args[3])
        source = builder.bitcast(address(context, builder, kinds[5], args[5], args[6]), I64.as_pointer())
        places = [builder.extract_value(args[8], k) for k in (0, 1)]
        offsets, rounded, position_at, count_at, list_at = (
            address(context, builder, kinds[7], args[7], place) for place in (*places, args[9], args[11], args[12])
        )
        offsets, unit_of_sum = builder.bitcast(offsets, I32.as_pointer()), splat(builder, args[4])

        def strip(i):
            first = builder.mul(i, args[13])

            def chunk(c, totals):
                number = builder.add(first, c)
                count = builder.load(builder.gep(count_at, [number]))
                numbers = builder.gep(list_at, [builder.mul(number, I64(LIST_WORDS))])
                numbers = builder.bitcast(numbers, I8.as_pointer())
                pitches = (offsets, CHUNK_PITCH), (rounded, PLACES * CHUNK_PITCH)
                by_chunk = [builder.gep(each, [builder.mul(c, I64(pitch))]) for each, pitch in pitches]
                if QUADS:
                    return _by_quads(builder, numbers, count, *by_chunk, source, totals)
                return _one_by_one(builder, numbers, count, *by_chunk, source, totals)

            totals = carry_each(builder, args[13], [nothing] * (8 if QUADS else 4), chunk)
            if QUADS:
                pairs, seven = zip(totals[:4], totals[4:], strict=True), ir.Constant(INTS, [7] * LANES)
                totals = [builder.add(a, builder.shl(builder.sub(a, b), seven)) for a, b in pairs]
            position = builder.load(builder.gep(position_at, [i]))
            for j, total in enumerate(totals):
                start, end = (lane(builder, builder.gep(each, [position]), j) for each in (before, target))
                sums = builder.sitofp(total, VECTOR)
                store_vector(builder, fma_vector(builder, sums, unit_of_sum, load_vector(builder, start)), end)

        for_each(builder, args[10], strip, unrolled=False)
        return context.get_dummy_value()

    matrix, listing = (weights, start, pointers, by_event), (positions, strips, counts, listed, chunks)
    return types.void(drive, at, initial, begin, step, *matrix, *listing), generate


@called_by_address
def product_in_integers(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
    """Column tiles of kind INTEGER_BLOCKS, one drive row after the other."""
    pools, lists, workspace = tables.pools, events.lists, tables.workspace
    weights, pointers = pools.values.view(np.int8), pools.pointers
    ids, products = workspace.panel_indices, workspace.panel_values
    for w in range(first_tile, last_tile):
        column_tile = tables.column_tiles[w]
        low, width, s0 = column_tile[LOW], column_tile[HIGH] - column_tile[LOW], column_tile[SCALES]
        strips, segments = column_tile[PITCH], values_at(column_tile, weights)
        words = ceil_div(strips, STRIPS_PER_WORD)
        positions = column_tile[POINTERS]
        units = positions + round_up(strips, 8)
        bits = units + round_up(n_pre * (1 + words), 8)
        # What a turn reads and what it writes lie half a page apart, because a load waits for a store in flight whose
        # address has the same lower 12 bits.
        size = CHUNK_PITCH * (ceil_div(n_pre, CHUNK_EVENTS) | 1)
        rounded, offsets = bits + size, bits + (1 + PLACES) * size
        strip_bytes, counts = offsets + size, offsets + 2 * size
        listed = counts + round_up(LISTED_STRIPS * ceil_div(n_pre, CHUNK_EVENTS), 8)
        for k in range(events.rows):
            at, first = k * tables.drive_pitch, events.first + k * events.per_row
            count, most = 0, 0
            for q in range(first, first + events.per_row):
                begin, sent = lists.begins[q], lists.counts[q]
                largest = scaled_events(
                    lists.indices, lists.values, begin, sent, pools.values, s0, ids, products, count
                )
                count, most = count + sent, max(most, largest)
            whole = count > 0 and column_tile[DENSE_FROM] != 0
            if not whole:
                copy(pools.biases, bias_begin + low, drives, at + low, width)
            if count == 0:
                continue
            if most >= INFINITE:
                for i in range(at + low, at + low + width):
                    drives[i] = np.float32(np.nan)
                continue
            exponent = max((most >> 23) - 126 - column_tile[WIDTH], -126)
            step, inverse = power_of_two(np.float32(exponent)), power_of_two(np.float32(-exponent))
            # Strips that are all columns of a tile start from its biases, and others from what lies there.
            initial, origin = (pools.biases, bias_begin) if whole else (drives, at)
            chunks, blocks = ceil_div(count, CHUNK_EVENTS), ceil_div(count, BLOCK_EVENTS)
            for c in range(chunks):
                begin, some = CHUNK_EVENTS * c, min(CHUNK_EVENTS, count - CHUNK_EVENTS * c)
                round_events(products, begin, some, inverse, pointers, rounded + PLACES * CHUNK_PITCH * c)
                look_up_offsets(ids, begin, some, pointers, units, 1 + words, offsets + CHUNK_PITCH // 2 * c)
            for word in range(words):
                for c in range(chunks):
                    begin, some = CHUNK_EVENTS * c, min(CHUNK_EVENTS, count - CHUNK_EVENTS * c)
                    look_up(ids, begin, some, pointers, units + 1 + word, 1 + words, bits + CHUNK_PITCH * c)
                transpose_bits(pointers, bits, blocks, strip_bytes)
                first_strip = word * STRIPS_PER_WORD
                last_strip = min(first_strip + STRIPS_PER_WORD, strips)
                for group in range(first_strip, last_strip, LISTED_STRIPS):
                    some, row = min(LISTED_STRIPS, last_strip - group), (group - first_strip) // LISTED_STRIPS
                    sorted_bytes = strip_bytes + BLOCK_EVENTS // 8 * blocks * row
                    list_events(pointers, sorted_bytes, blocks, chunks, some, counts, listed)
                    add_strips(
                        drives,
                        at,
                        initial,
                        origin,
                        step,
                        weights,
                        segments,
                        pointers,
                        (offsets, rounded),
                        positions + group,
                        some,
                        counts,
                        listed,
                        chunks,
                    )
