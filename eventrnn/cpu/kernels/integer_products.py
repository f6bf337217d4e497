"""Block segments of int8 weights times rounded events, in integers. Not exact; `reference_products` specifies it.

The values of a drive row are rounded to whole numbers with one step, so that the terms of a sum are integers. The sum
of integers is the same in every order, and the results have the same bits for every number of threads, on every
processor and for every split of a run: those of `reference_products.propagate_integers`.

A *strip* is the columns of the segments that lie at one position of a drive row; their sums fill vector registers. The
segments of a strip lie together, in the order of units. A *group* is up to 64 of them, of units within one range of 512
units. Which of these units have an event is seen from one vector, the bits of the range: each byte of a second vector
selects the byte of a unit, and each byte of a third one the bit. A column tile has in `pools.pointers`

    strips  STRIP_FIELDS numbers each, and those of one strip more at the end
    groups  GROUP_FIELDS numbers each, after those of an empty group
    fired   512 bits per range of units, which the kernel sets
    lists   uint16, segments of units with an event, which the kernel writes: numbers within a strip

in `pools.values`, before the segments, 64 bytes and 64 bits per group, uint8, zero after its last segment; and in
`pools.index` the unit of every segment, uint16. A thread writes what belongs to its own column tiles.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from eventrnn.cells import power_of_two
from eventrnn.cpu.kernels.emit import INTS, emit_prefetch, for_each, lane, never_unrolled, splat_int, store_ints
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
from eventrnn.cpu.tables import (
    DENSE_FROM,
    GROUP_FIELDS,
    GROUP_SEGMENTS,
    HIGH,
    INDEX,
    LOW,
    PITCH,
    POINTERS,
    RANGE_UNITS,
    SCALES,
    STRIP_BASE,
    STRIP_FIELDS,
    STRIP_GROUP,
    STRIP_POSITION,
    WIDTH,
)

# The bits of an infinity. Products of the events and scales of a drive row may overflow; its drives are NaN then.
INFINITE = 0x7F800000

_I8 = ir.IntType(8)

# 512 bits as bytes and as words of 16 bits; half of the latter.
_BYTES, _WORDS, _HALF = ir.VectorType(_I8, 4 * LANES), ir.VectorType(I16, 2 * LANES), ir.VectorType(I16, LANES)

_VNNI, _AVX512BW, _AVX2 = (may_use(feature) for feature in ("avx512vnni", "avx512bw", "avx2"))

# Instructions that select bytes of a vector by bytes of another one, and that compress words. Without them the units of
# a strip are tested one by one, which takes longer than exact sums.
_SELECTS = AVX512 and _AVX512BW and may_use("avx512vbmi") and may_use("avx512vbmi2")


def _gather(builder, pointer, numbers):
    """The float32 at sixteen numbers after a pointer."""
    if AVX512:
        values = ir.Constant(VECTOR, [0.0] * LANES), builder.bitcast(pointer, _I8.as_pointer()), numbers
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


@intrinsic
def mark_events(typingctx, ids, products, count, inverse, rounded, pointers, fired):
    """Round products * inverse to whole numbers, a tie to even, and set the bits of their units.

    ids      : int32, units of `count` events
    products : float32, with fifteen elements to spare, which are overwritten
    rounded  : float32, of which rounded[unit] gets the bits of an int32 whose lower half is the rounded number, and
               whose upper half is zero
    pointers : int64, of which pointers[fired:] are the bits of the units, 64 each
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        id_at, product_at, rounded_at = (address(context, builder, kinds[k], args[k], I64(0)) for k in (0, 1, 4))
        whole_at, rounded_at = (builder.bitcast(each, I32.as_pointer()) for each in (product_at, rounded_at))
        bits = builder.bitcast(address(context, builder, kinds[5], args[5], args[6]), _I8.as_pointer())
        factor = splat(builder, args[3])

        def round_vector(k):
            product = builder.fmul(load_vector(builder, builder.gep(product_at, [k])), factor)
            whole = builder.fptosi(call(builder, f"llvm.rint.v{LANES}f32", VECTOR, [product]), INTS)
            store_ints(builder, builder.and_(whole, ir.Constant(INTS, [0xFFFF] * LANES)), builder.gep(whole_at, [k]))

        def mark(k):
            unit = builder.load(builder.gep(id_at, [k]))
            builder.store(builder.load(builder.gep(whole_at, [k])), builder.gep(rounded_at, [builder.sext(unit, I64)]))
            byte = builder.gep(bits, [builder.sext(builder.lshr(unit, I32(3)), I64)])
            bit = builder.shl(_I8(1), builder.trunc(builder.and_(unit, I32(7)), _I8))
            builder.store(builder.or_(builder.load(byte), bit), byte)

        for_each(builder, args[2], round_vector, step=LANES)
        for_each(builder, args[2], mark)
        return context.get_dummy_value()

    return types.void(ids, products, count, inverse, rounded, pointers, fired), generate


@intrinsic
def list_segments(typingctx, tests, start, pointers, groups, count, fired, lists):
    """Write the numbers of the segments whose units have an event to the lists, group by group.

    Each of the `count` groups from `groups` on, after an empty one, gets where its list ends. Up to 31 numbers more are
    written.

    tests    : int8, from element `start` on the bytes and bits of the groups
    pointers : int64; `fired` and `lists` say where the bits of units and the lists, uint16, are
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        bytes_at = address(context, builder, kinds[0], args[0], args[1])
        group_at, fired_at, list_at = (address(context, builder, kinds[2], args[2], args[k]) for k in (3, 5, 6))
        fired_at = builder.bitcast(fired_at, _I8.as_pointer())
        list_at = builder.bitcast(list_at, I16.as_pointer())
        end_at = cgutils.alloca_once_value(builder, I64(0))

        def group(g):
            record = builder.gep(group_at, [builder.mul(g, I64(GROUP_FIELDS))])
            first, row, size = (builder.load(builder.gep(record, [I64(k)])) for k in range(3))
            byte_at = builder.gep(bytes_at, [builder.mul(g, I64(2 * GROUP_SEGMENTS))])
            bit_at, bits = builder.gep(byte_at, [I64(GROUP_SEGMENTS)]), builder.gep(fired_at, [first])
            row = builder.trunc(row, I16)
            if _SELECTS:
                _list_by_selection(builder, byte_at, bit_at, bits, row, list_at, end_at)
            else:
                _list_one_by_one(builder, byte_at, bit_at, bits, row, size, list_at, end_at)
            builder.store(builder.load(end_at), builder.gep(record, [I64(3)]))

        for_each(builder, args[4], group, unrolled=False)
        return context.get_dummy_value()

    return types.void(tests, start, pointers, groups, count, fired, lists), generate


def _list_by_selection(builder, byte_at, bit_at, bits, row, list_at, end_at):
    """Append the numbers from `row` on, of the segments of a group whose units have an event, to a list."""
    byte, bit, fired = (
        builder.load(builder.bitcast(each, _BYTES.as_pointer()), align=1) for each in (byte_at, bit_at, bits)
    )
    selected = builder.and_(call(builder, "llvm.x86.avx512.permvar.qi.512", _BYTES, [fired, byte]), bit)
    mask = builder.icmp_unsigned("!=", selected, ir.Constant(_BYTES, [0] * GROUP_SEGMENTS))
    words = builder.bitcast(mask, I64)
    undefined = ir.Constant(_WORDS, ir.Undefined)
    numbers = builder.insert_element(undefined, row, I32(0))
    numbers = builder.shuffle_vector(numbers, undefined, ir.Constant(ir.VectorType(I32, 2 * LANES), [0] * 2 * LANES))
    for part in range(2):
        some = builder.trunc(builder.lshr(words, I64(32 * part)), I32)
        chosen = builder.bitcast(some, ir.VectorType(I1, 2 * LANES))
        these = builder.add(numbers, ir.Constant(_WORDS, list(range(32 * part, 32 * part + 32))))
        packed = call(builder, "llvm.x86.avx512.mask.compress.v32i16", _WORDS, [these, these, chosen])
        end = builder.load(end_at)
        builder.store(packed, builder.bitcast(builder.gep(list_at, [end]), _WORDS.as_pointer()), align=2)
        builder.store(builder.add(end, builder.zext(call(builder, "llvm.ctpop.i32", I32, [some]), I64)), end_at)


def _list_one_by_one(builder, byte_at, bit_at, bits, row, size, list_at, end_at):
    """`_list_by_selection` for other processors: without a branch, of the `size` segments of the group."""

    def segment(k):
        fired = builder.load(builder.gep(bits, [builder.zext(builder.load(builder.gep(byte_at, [k])), I64)]))
        sent = builder.icmp_unsigned("!=", builder.and_(fired, builder.load(builder.gep(bit_at, [k]))), _I8(0))
        end = builder.load(end_at)
        builder.store(builder.add(row, builder.trunc(k, I16)), builder.gep(list_at, [end]))
        builder.store(builder.add(end, builder.zext(sent, I64)), end_at)

    for_each(builder, size, segment)


def _multiply_add(builder, total, weights, value):
    """total + weights * value, sixteen int32 each; weights and values have at most 16 bits, values as unsigned ones.

    The upper half of a value is zero, so that the pair of products that an instruction adds has one that is zero.
    """
    if AVX512 and _VNNI:
        return call(builder, "llvm.x86.avx512.vpdpwssd.512", INTS, [total, weights, value])
    if AVX512 and _AVX512BW:
        pairs = [builder.bitcast(each, _WORDS) for each in (weights, value)]
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


@intrinsic
def add_strip(
    typingctx,
    drive,
    at,
    initial,
    begin,
    step,
    weights,
    start,
    index,
    units,
    rounded,
    pointers,
    lists,
    first,
    count,
    base,
    next_base,
):
    """drive[at + i] = initial[begin + i] + step * S[i], i < 64, where S is the sum over `count` listed segments of
    weights[start + row * 64 + i] * rounded value.

    S is a sum of integers; its conversion to float32 and the FMA round once each. `base` plus the number of a
    segment, from `first` on in the list, is its row. Each segment prefetches one of the next strip, whose rows begin at
    `next_base` and whose list follows.

    index   : int32, from element `units` on uint16, the unit of each row
    rounded : float32, by unit, see `mark_events`
    """

    def generate(context, builder, signature, args):
        kinds, vectors, nothing = signature.args, range(4), ir.Constant(INTS, [0] * LANES)
        target = address(context, builder, kinds[0], args[0], args[1])
        before = address(context, builder, kinds[2], args[2], args[3])
        source = address(context, builder, kinds[5], args[5], args[6])
        unit_at = builder.bitcast(address(context, builder, kinds[7], args[7], args[8]), I16.as_pointer())
        value_at = builder.bitcast(address(context, builder, kinds[9], args[9], I64(0)), I32.as_pointer())
        list_at = builder.bitcast(address(context, builder, kinds[10], args[10], args[11]), I16.as_pointer())
        list_at, count, (base, next_base) = builder.gep(list_at, [args[12]]), args[13], args[14:]

        def row_of(first_row, k):
            return builder.add(first_row, builder.zext(builder.load(builder.gep(list_at, [k])), I64))

        def weights_of(row):
            return builder.gep(source, [builder.mul(row, I64(4 * LANES))])

        entry, loop = builder.block, builder.append_basic_block("segments")
        done = builder.append_basic_block("segments.done")
        builder.cbranch(builder.icmp_signed(">", count, I64(0)), loop, done)
        builder.position_at_end(loop)
        k = builder.phi(I64)
        k.add_incoming(I64(0), entry)
        sums = [builder.phi(INTS) for _ in vectors]
        row = row_of(base, k)
        emit_prefetch(builder, weights_of(row_of(next_base, builder.add(k, count))))
        unit = builder.zext(builder.load(builder.gep(unit_at, [row])), I64)
        value, segment = splat_int(builder, builder.load(builder.gep(value_at, [unit]))), weights_of(row)
        following = builder.add(k, I64(1))
        k.add_incoming(following, loop)
        after = []
        for i, total in zip(vectors, sums, strict=True):
            total.add_incoming(nothing, entry)
            raw = builder.bitcast(lane(builder, segment, i), ir.VectorType(_I8, LANES).as_pointer())
            after.append(_multiply_add(builder, total, builder.sext(builder.load(raw, align=1), INTS), value))
            total.add_incoming(after[-1], loop)
        never_unrolled(builder, builder.cbranch(builder.icmp_signed("<", following, count), loop, done))
        builder.position_at_end(done)
        totals = [builder.phi(INTS) for _ in vectors]
        for total, made in zip(totals, after, strict=True):
            total.add_incoming(nothing, entry)
            total.add_incoming(made, loop)
        unit_of_sum = splat(builder, args[4])
        for i, total in zip(vectors, totals, strict=True):
            start = load_vector(builder, lane(builder, before, i))
            drives = fma_vector(builder, builder.sitofp(total, VECTOR), unit_of_sum, start)
            store_vector(builder, drives, lane(builder, target, i))
        return context.get_dummy_value()

    given = (
        drive,
        at,
        initial,
        begin,
        step,
        weights,
        start,
        index,
        units,
        rounded,
        pointers,
        lists,
        first,
        count,
        base,
        next_base,
    )
    return types.void(*given), generate


@called_by_address
def product_in_integers(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
    """Column tiles of kind INTEGER_BLOCKS, one drive row after the other."""
    pools, lists, workspace = tables.pools, events.lists, tables.workspace
    weights, pointers, rounded = pools.values.view(np.int8), pools.pointers, workspace.dense_inputs
    ids, products = workspace.panel_indices, workspace.panel_values
    words = (n_pre + RANGE_UNITS - 1) // RANGE_UNITS * (RANGE_UNITS // 64)
    for w in range(first_tile, last_tile):
        column_tile = tables.column_tiles[w]
        low, width, units, s0 = (
            column_tile[LOW],
            column_tile[HIGH] - column_tile[LOW],
            column_tile[INDEX],
            column_tile[SCALES],
        )
        tests, strips, n_strips = values_at(column_tile, weights), column_tile[POINTERS], column_tile[PITCH]
        groups = strips + STRIP_FIELDS * (n_strips + 1)
        n_groups = pointers[groups - STRIP_FIELDS + STRIP_GROUP]
        fired = groups + GROUP_FIELDS * (n_groups + 1)
        listed, rows = fired + words, tests + n_groups * (2 * GROUP_SEGMENTS)
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
            for i in range(words):
                pointers[fired + i] = 0
            mark_events(ids, products, count, inverse, rounded, pointers, fired)
            list_segments(weights, tests, pointers, groups + GROUP_FIELDS, n_groups, fired, listed)
            # Strips that are all columns of a tile start from its biases, and others from what lies there.
            initial, origin = (pools.biases, bias_begin) if whole else (drives, at)
            end = np.int64(0)
            for s in range(strips, groups - STRIP_FIELDS, STRIP_FIELDS):
                last, base, next_base = (
                    pointers[s + STRIP_FIELDS + STRIP_GROUP],
                    pointers[s + STRIP_BASE],
                    pointers[s + STRIP_FIELDS + STRIP_BASE],
                )
                begin, end = end, pointers[groups + GROUP_FIELDS * last + 3]
                add_strip(
                    drives,
                    at + pointers[s + STRIP_POSITION],
                    initial,
                    origin + pointers[s + STRIP_POSITION],
                    step,
                    weights,
                    rows,
                    pools.index,
                    units,
                    rounded,
                    pointers,
                    listed,
                    begin,
                    end - begin,
                    base,
                    next_base,
                )
