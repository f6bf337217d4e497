"""Micro-kernels of single weights: the innermost loops over weights that have an index or a bit of a mask each.

A call runs within one thread, which owns the elements of `drive` or `panel` that the call writes. All other arrays are
shared and only read. All arrays are flat, and no index is checked:

    drive    float32, a drive row; the call starts at element `at`
    panel    float32, dense weights of some units
    index    a pool of int32 with two uint16 per element: positions, or masks of sixteen columns, from element `i0` on
    weights  float32; uint16, the upper halves of float32 (bfloat16); or int8. Starts at element `start`
    scales   float32, one per presynaptic unit, from element `s0` on; read for int8 weights only
    ahead    number of the first weight and index of a unit that is added later; they are prefetched

A drive takes one FMA per term, as the loop over j in `reference.propagate` does. A unit has no index twice, so that
several drives can be loaded before the first of them is stored. LLVM does not do that by itself, because it cannot know
that.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn import cells
from eventrnn.cpu.kernels.emit import INTS, IOTA, decode, emit_prefetch, for_each, load_weights, splat_int
from eventrnn.cpu.kernels.jit import inlined
from eventrnn.cpu.kernels.simd import (
    AVX512,
    FLOAT,
    I1,
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    address,
    call,
    decoded,
    fma_vector,
    load_vector,
    lowest_bit,
    splat,
    store_vector,
)
from eventrnn.cpu.tables import ROW_TILE

# Weights that are added side by side where there are no gathers and scatters: those of a register of 128 bits, whose
# single lanes can be loaded and stored.
GROUP = 4


def _index_at(context, builder, kind, index, i0, first):
    """Pointer to the uint16 number `first` of an index that begins at element `i0` of a pool of int32."""
    short = builder.bitcast(address(context, builder, kind, index, i0), I16.as_pointer())
    return builder.gep(short, [first])


def _group(builder, index_at, weight_at, k, count, scale):
    """`count` indices (a list of int64) and weights (a vector of float32) from number k on."""
    # One load for all indices: the loop takes as long as its loads and stores.
    word = ir.IntType(16 * count)
    packed = builder.load(builder.bitcast(builder.gep(index_at, [k]), word.as_pointer()), align=2)
    indices = [builder.trunc(builder.lshr(packed, word(16 * i)), I16) for i in range(count)]
    weights = load_weights(builder, builder.gep(weight_at, [k]), count, scale)
    return [builder.zext(index, I64) for index in indices], weights


def _in_groups(builder, count, turn, group):
    """Emit turn(k) for each whole vector of `count` weights, then group(k, GROUP), then group(k, 1) for the rest."""
    vectors, groups = builder.and_(count, I64(-LANES)), builder.and_(count, I64(-GROUP))
    for_each(builder, vectors, turn, step=LANES)
    for_each(builder, groups, lambda k: group(k, GROUP), vectors, GROUP)
    for_each(builder, count, lambda k: group(k, 1), groups)


@intrinsic
def add_scattered_portable(typingctx, drive, at, index, i0, first, count, ahead, value, scale, weights, start):
    """`add_scattered_avx512` for other processors: a few weights at a time."""

    def generate(context, builder, signature, args):
        kinds = signature.args
        out = address(context, builder, kinds[0], args[0], args[1])
        pool = context, builder, kinds[2], args[2], args[3]
        index_at, index_ahead = _index_at(*pool, args[4]), _index_at(*pool, args[6])
        weight = address(context, builder, kinds[9], args[9], args[10])
        weight_at, weight_ahead = builder.gep(weight, [args[4]]), builder.gep(weight, [args[6]])

        def group(k, count):
            targets, terms = _group(builder, index_at, weight_at, k, count, splat(builder, args[8], count))
            drives = [builder.gep(out, [target]) for target in targets]
            before = ir.Constant(terms.type, ir.Undefined)
            for i, each in enumerate(drives):
                before = builder.insert_element(before, builder.load(each), I32(i))
            after = fma_vector(builder, terms, splat(builder, args[7], count), before)
            for i, each in enumerate(drives):
                builder.store(builder.extract_element(after, I32(i)), each)

        def turn(k):
            emit_prefetch(builder, builder.gep(weight_ahead, [k]))
            emit_prefetch(builder, builder.gep(index_ahead, [k]))
            for i in range(0, LANES, GROUP):
                group(builder.add(k, I64(i)), GROUP)

        _in_groups(builder, args[5], turn, group)
        return context.get_dummy_value()

    return types.void(drive, at, index, i0, first, count, ahead, value, scale, weights, start), generate


@intrinsic
def add_scattered_avx512(typingctx, drive, at, index, i0, first, count, ahead, value, scale, weights, start):
    """drive[at + index[k]] += weights[start + k] * value for `count` numbers k from `first` on, one FMA per term.

    Sixteen elements are gathered, added to and scattered at a time.
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        byte = builder.bitcast(address(context, builder, kinds[0], args[0], args[1]), ir.IntType(8).as_pointer())
        pool = context, builder, kinds[2], args[2], args[3]
        index_at, index_ahead = _index_at(*pool, args[4]), _index_at(*pool, args[6])
        weights_at = address(context, builder, kinds[9], args[9], args[10])
        weight_at, weight_ahead = builder.gep(weights_at, [args[4]]), builder.gep(weights_at, [args[6]])
        value, scale = splat(builder, args[7]), splat(builder, args[8])
        narrow, nothing = ir.VectorType(I16, LANES), ir.Constant(VECTOR, [0.0] * LANES)

        def some(k, inside):
            raw = builder.load(builder.bitcast(builder.gep(index_at, [k]), narrow.as_pointer()), align=2)
            target, size = builder.zext(raw, INTS), I32(4)
            before = call(builder, "llvm.x86.avx512.mask.gather.dps.512", VECTOR, [nothing, byte, target, inside, size])
            weight = load_weights(builder, builder.gep(weight_at, [k]), LANES, scale)
            after = fma_vector(builder, weight, value, before)
            call(builder, "llvm.x86.avx512.mask.scatter.dps.512", ir.VoidType(), [byte, inside, target, after, size])

        def turn(k):
            emit_prefetch(builder, builder.gep(weight_ahead, [k]))
            emit_prefetch(builder, builder.gep(index_ahead, [k]))
            some(k, everything)

        whole, rest = builder.and_(args[5], I64(-LANES)), builder.and_(args[5], I64(LANES - 1))
        everything = ir.Constant(ir.VectorType(I1, LANES), [1] * LANES)
        for_each(builder, whole, turn, step=LANES)
        with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
            inside = builder.icmp_signed("<", IOTA, splat_int(builder, builder.trunc(rest, I32)))
            some(whole, inside)
        return context.get_dummy_value()

    return types.void(drive, at, index, i0, first, count, ahead, value, scale, weights, start), generate


@intrinsic
def expand(typingctx, panel, index, i0, first, count, scales, s0, weights, start):
    """panel[index[k]] = weights[start + k] for `count` numbers k from `first` on, decoded.

    The panel has rows of `ROW_TILE` columns. Unit u of the panel has row u and the scale s0 + u.
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        out = address(context, builder, kinds[0], args[0], I64(0))
        index_at = _index_at(context, builder, kinds[1], args[1], args[2], args[3])
        scale_at = address(context, builder, kinds[5], args[5], args[6])
        weight_at = builder.gep(address(context, builder, kinds[7], args[7], args[8]), [args[3]])

        def group(k, count):
            # The scales differ, so that the codes are decoded first.
            one = ir.Constant(ir.VectorType(FLOAT, count), [1.0] * count)
            targets, terms = _group(builder, index_at, weight_at, k, count, one)
            for i, target in enumerate(targets):
                term = builder.extract_element(terms, I32(i))
                if kinds[7].dtype == types.int8:
                    unit = builder.udiv(target, I64(ROW_TILE))
                    term = builder.fmul(term, builder.load(builder.gep(scale_at, [unit])))
                builder.store(term, builder.gep(out, [target]))

        def turn(k):
            for i in range(0, LANES, GROUP):
                group(builder.add(k, I64(i)), GROUP)

        _in_groups(builder, args[4], turn, group)
        return context.get_dummy_value()

    return types.void(panel, index, i0, first, count, scales, s0, weights, start), generate


@intrinsic
def add_masked_avx512(typingctx, drive, at, index, i0, first, vectors, value, scale, weights, start):
    """drive[at + i] += the next weight from `start` on * value, for every set bit i of `vectors` 16-bit masks.

    The masks are uint16, from number `first` on in a pool of int32 that begins at element `i0`. One FMA per term; where
    a bit is not set, the term is a zero.
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        out = address(context, builder, kinds[0], args[0], args[1])
        mask_at = _index_at(context, builder, kinds[2], args[2], args[3], args[4])
        weight_at = address(context, builder, kinds[8], args[8], I64(0))
        value, scale = splat(builder, args[6]), splat(builder, args[7])
        packed = ir.VectorType(weight_at.type.pointee, LANES)
        is_float = packed.element == FLOAT
        nothing = ir.Constant(packed, [0.0 if is_float else 0] * LANES)
        name = f"llvm.masked.expandload.v{LANES}{'f32' if is_float else packed.element}"

        entry = builder.block
        loop, done = builder.append_basic_block("masks"), builder.append_basic_block("masks.done")
        builder.cbranch(builder.icmp_signed(">", args[5], I64(0)), loop, done)
        builder.position_at_end(loop)
        k, at = builder.phi(I64), builder.phi(I64)
        k.add_incoming(I64(0), entry)
        at.add_incoming(args[9], entry)
        mask = builder.load(builder.gep(mask_at, [k]))
        kept = builder.bitcast(mask, ir.VectorType(I1, LANES))
        weight = decode(builder, call(builder, name, packed, [builder.gep(weight_at, [at]), kept, nothing]), scale)
        row = builder.gep(out, [builder.mul(k, I64(LANES))])
        store_vector(builder, fma_vector(builder, weight, value, load_vector(builder, row)), row)
        following = builder.add(k, I64(1))
        k.add_incoming(following, loop)
        at.add_incoming(builder.add(at, builder.zext(call(builder, "llvm.ctpop.i16", I16, [mask]), I64)), loop)
        builder.cbranch(builder.icmp_signed("<", following, args[5]), loop, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(drive, at, index, i0, first, vectors, value, scale, weights, start), generate


@inlined
def add_masked_portable(drives, at, index, i0, first, vectors, value, scale, weights, start):
    """`add_masked_avx512` for other processors: one set bit at a time."""
    masks = index.view(np.uint16)
    for k in range(vectors):
        mask = np.int64(masks[2 * i0 + first + k])
        while mask != 0:
            target = at + k * LANES + lowest_bit(mask)
            drives[target] = cells.fma(decoded(weights, start, scale), value, drives[target])
            start += 1
            mask &= mask - 1


add_scattered = add_scattered_avx512 if AVX512 else add_scattered_portable

add_masked = add_masked_avx512 if AVX512 else add_masked_portable
