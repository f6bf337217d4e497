"""What the products of training need of sixteen lanes beyond `simd.py`: sums over lanes, and gathers."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn import cells
from eventrnn.jit import compiled
from eventrnn.simd import AVX512, I1, I32, I64, LANES, VECTOR, address, call, lanes, load, splat

_INTS = ir.VectorType(I32, LANES)


@intrinsic
def everywhere(typingctx, x):
    """The number in every lane."""

    def generate(context, builder, signature, args):
        return splat(builder, args[0])

    return lanes(types.float32), generate


@intrinsic
def sum_lanes(typingctx, vector):
    """Sum of the lanes, halves added to halves: one order everywhere."""

    def generate(context, builder, signature, args):
        total, width = args[0], LANES
        while width > 1:
            width //= 2
            undefined = ir.Constant(total.type, ir.Undefined)
            low = ir.Constant(ir.VectorType(I32, width), list(range(width)))
            high = ir.Constant(ir.VectorType(I32, width), list(range(width, 2 * width)))
            total = builder.fadd(
                builder.shuffle_vector(total, undefined, low), builder.shuffle_vector(total, undefined, high)
            )
        return builder.extract_element(total, I32(0))

    return types.float32(vector), generate


@intrinsic
def _gather_avx512(typingctx, array, at, index, first):
    """array[at + index[first + k]] in lane k; index is int32."""

    def generate(context, builder, signature, args):
        kinds = signature.args
        source = builder.bitcast(address(context, builder, kinds[0], args[0], args[1]), ir.IntType(8).as_pointer())
        where = address(context, builder, kinds[2], args[2], args[3])
        where = builder.load(builder.bitcast(where, _INTS.as_pointer()), align=4)
        every, nothing = ir.Constant(ir.VectorType(I1, LANES), [1] * LANES), ir.Constant(VECTOR, [0.0] * LANES)
        return call(builder, "llvm.x86.avx512.mask.gather.dps.512", VECTOR, [nothing, source, where, every, I32(4)])

    return lanes(array, at, index, first), generate


@intrinsic
def _gather_portable(typingctx, array, at, index, first):
    """`_gather_avx512` for other processors."""

    def generate(context, builder, signature, args):
        kinds = signature.args
        source = address(context, builder, kinds[0], args[0], args[1])
        where = address(context, builder, kinds[2], args[2], args[3])
        result = ir.Constant(VECTOR, ir.Undefined)
        for k in range(LANES):
            at = builder.sext(builder.load(builder.gep(where, [I64(k)])), I64)
            result = builder.insert_element(result, builder.load(builder.gep(source, [at])), I32(k))
        return result

    return lanes(array, at, index, first), generate


gather = _gather_avx512 if AVX512 else _gather_portable


@compiled
def dot(a, at, b, b_at, count, last):
    """Sum of a[at + i] * b[b_at + i], i < count, each of 16 lanes in ascending order, then over lanes.

    `last` holds 1 in the lanes of the last, overlapping vector that the others left out; needs count >= 16.
    """
    first, second = everywhere(cells.ZERO), everywhere(cells.ZERO)
    whole = count // LANES
    for k in range(0, whole - 1, 2):
        i = k * LANES
        first = cells.fma(load(a, at + i), load(b, b_at + i), first)
        second = cells.fma(load(a, at + i + LANES), load(b, b_at + i + LANES), second)
    if whole % 2:
        i = (whole - 1) * LANES
        first = cells.fma(load(a, at + i), load(b, b_at + i), first)
    if count % LANES:
        i = count - LANES
        second = cells.fma(load(a, at + i) * load(last, 0), load(b, b_at + i), second)
    return sum_lanes(first + second)


@compiled
def dot_2(a, at, b, b0, b1, count, last):
    """`dot` of one a with two b, the same bits each."""
    p0, p1, q0, q1 = everywhere(cells.ZERO), everywhere(cells.ZERO), everywhere(cells.ZERO), everywhere(cells.ZERO)
    whole = count // LANES
    for k in range(0, whole - 1, 2):
        i = k * LANES
        w, x = load(a, at + i), load(a, at + i + LANES)
        p0 = cells.fma(w, load(b, b0 + i), p0)
        p1 = cells.fma(w, load(b, b1 + i), p1)
        q0 = cells.fma(x, load(b, b0 + i + LANES), q0)
        q1 = cells.fma(x, load(b, b1 + i + LANES), q1)
    if whole % 2:
        i = (whole - 1) * LANES
        w = load(a, at + i)
        p0 = cells.fma(w, load(b, b0 + i), p0)
        p1 = cells.fma(w, load(b, b1 + i), p1)
    if count % LANES:
        i = count - LANES
        w = load(a, at + i) * load(last, 0)
        q0 = cells.fma(w, load(b, b0 + i), q0)
        q1 = cells.fma(w, load(b, b1 + i), q1)
    return sum_lanes(p0 + q0), sum_lanes(p1 + q1)


@compiled
def dot_4(a, at, b, b0, b1, b2, b3, count, last):
    """`dot` of one a with four b, the same bits each; a is read once."""
    p0, p1, p2, p3 = everywhere(cells.ZERO), everywhere(cells.ZERO), everywhere(cells.ZERO), everywhere(cells.ZERO)
    q0, q1, q2, q3 = everywhere(cells.ZERO), everywhere(cells.ZERO), everywhere(cells.ZERO), everywhere(cells.ZERO)
    whole = count // LANES
    for k in range(0, whole - 1, 2):
        i = k * LANES
        w, x = load(a, at + i), load(a, at + i + LANES)
        p0 = cells.fma(w, load(b, b0 + i), p0)
        p1 = cells.fma(w, load(b, b1 + i), p1)
        p2 = cells.fma(w, load(b, b2 + i), p2)
        p3 = cells.fma(w, load(b, b3 + i), p3)
        q0 = cells.fma(x, load(b, b0 + i + LANES), q0)
        q1 = cells.fma(x, load(b, b1 + i + LANES), q1)
        q2 = cells.fma(x, load(b, b2 + i + LANES), q2)
        q3 = cells.fma(x, load(b, b3 + i + LANES), q3)
    if whole % 2:
        i = (whole - 1) * LANES
        w = load(a, at + i)
        p0 = cells.fma(w, load(b, b0 + i), p0)
        p1 = cells.fma(w, load(b, b1 + i), p1)
        p2 = cells.fma(w, load(b, b2 + i), p2)
        p3 = cells.fma(w, load(b, b3 + i), p3)
    if count % LANES:
        i = count - LANES
        w = load(a, at + i) * load(last, 0)
        q0 = cells.fma(w, load(b, b0 + i), q0)
        q1 = cells.fma(w, load(b, b1 + i), q1)
        q2 = cells.fma(w, load(b, b2 + i), q2)
        q3 = cells.fma(w, load(b, b3 + i), q3)
    return sum_lanes(p0 + q0), sum_lanes(p1 + q1), sum_lanes(p2 + q2), sum_lanes(p3 + q3)


@compiled
def dot_short(a, at, b, b_at, count):
    """`dot` of fewer than 16 terms, in ascending order."""
    total = cells.ZERO
    for i in range(count):
        total = cells.fma(a[at + i], b[b_at + i], total)
    return total
