"""Block segments of int8 weights times rounded events, in integers. Not exact; `reference_products` specifies it.

The values of a drive row are rounded to whole numbers with one step, so that the terms of a sum are integers. The sum
of integers is the same in every order, and the results have the same bits for every number of threads, on every
processor and for every split of a run: those of `reference_products.propagate_integers`.

`strips.py` describes how the segments lie, and lists those of active units.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from eventrnn.cells import power_of_two
from eventrnn.cpu.kernels.emit import INTS, for_each, lane, splat_int, store_ints
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
from eventrnn.cpu.kernels.strips import (
    I8,
    WORDS,
    forget_events,
    list_segments,
    mark_unit,
    strip_at,
    strips_of,
    sum_listed,
)
from eventrnn.cpu.tables import (
    DENSE_FROM,
    HIGH,
    INDEX,
    LOW,
    PITCH,
    SCALES,
    STRIP_FIELDS,
    WIDTH,
)

# The bits of an infinity. Products of the events and scales of a drive row may overflow; its drives are NaN then.
INFINITE = 0x7F800000

# Half of 512 bits, as words of 16 bits.
_HALF = ir.VectorType(I16, LANES)

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
        bits = builder.bitcast(address(context, builder, kinds[5], args[5], args[6]), I8.as_pointer())
        factor = splat(builder, args[3])

        def round_vector(k):
            product = builder.fmul(load_vector(builder, builder.gep(product_at, [k])), factor)
            whole = builder.fptosi(call(builder, f"llvm.rint.v{LANES}f32", VECTOR, [product]), INTS)
            store_ints(builder, builder.and_(whole, ir.Constant(INTS, [0xFFFF] * LANES)), builder.gep(whole_at, [k]))

        def mark(k):
            unit = builder.load(builder.gep(id_at, [k]))
            builder.store(builder.load(builder.gep(whole_at, [k])), builder.gep(rounded_at, [builder.sext(unit, I64)]))
            mark_unit(builder, bits, unit)

        for_each(builder, args[2], round_vector, step=LANES)
        for_each(builder, args[2], mark)
        return context.get_dummy_value()

    return types.void(ids, products, count, inverse, rounded, pointers, fired), generate


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

        def add(unit, segment, totals):
            value = splat_int(builder, builder.load(builder.gep(value_at, [unit])))
            after = []
            for i, total in zip(vectors, totals, strict=True):
                raw = builder.bitcast(lane(builder, segment, i), ir.VectorType(I8, LANES).as_pointer())
                weights = builder.sext(builder.load(raw, align=1), INTS)
                after.append(_multiply_add(builder, total, weights, value))
            return after

        totals = sum_listed(builder, list_at, count, unit_at, source, base, [nothing] * 4, add, next_base)
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
    for w in range(first_tile, last_tile):
        column_tile = tables.column_tiles[w]
        low, width, units, s0 = (
            column_tile[LOW],
            column_tile[HIGH] - column_tile[LOW],
            column_tile[INDEX],
            column_tile[SCALES],
        )
        strips, groups, fired, listed, rows, n_groups = strips_of(column_tile, pointers, n_pre)
        tests = values_at(column_tile, weights)
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
            forget_events(pointers, fired, listed)
            mark_events(ids, products, count, inverse, rounded, pointers, fired)
            list_segments(weights, tests, pointers, groups, n_groups, fired, listed)
            # Strips that are all columns of a tile start from its biases, and others from what lies there.
            initial, origin = (pools.biases, bias_begin) if whole else (drives, at)
            end = np.int64(0)
            for s in range(strips, strips + STRIP_FIELDS * column_tile[PITCH], STRIP_FIELDS):
                begin, (position, base, next_base, end) = end, strip_at(pointers, s, groups)
                add_strip(
                    drives,
                    at + position,
                    initial,
                    origin + position,
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
