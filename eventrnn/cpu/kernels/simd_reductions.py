"""Vector instructions that only the training kernels use: sums over lanes, short dot products, gathers.

A call runs within one thread. Arrays are flat and belong to the caller: float32, and int32 for indices. No index is
checked. Sums over lanes have one order on every processor, so a gradient has the same bits everywhere; it differs in
rounding from `reference.backward`, which sums in NumPy's order.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn.cpu.kernels.simd import (
    AVX512,
    I1,
    I32,
    I64,
    LANES,
    VECTOR,
    address,
    call,
    fma_vector,
    lanes,
    load_vector,
    splat,
    store_vector,
)

_INTS = ir.VectorType(I32, LANES)


@intrinsic
def everywhere(typingctx, x):
    """A vector with the number in every lane."""

    def generate(context, builder, signature, args):
        return splat(builder, args[0])

    return lanes(types.float32), generate


@intrinsic
def sum_lanes(typingctx, vector):
    """Sum of the lanes. The upper half is added to the lower half until one lane is left."""

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
def store_past(typingctx, array, index, vector):
    """`store` to a whole cache line, past the caches (non-temporal): the line is not read first.

    array[index] must begin a cache line. Another thread sees the values once it has waited for this thread, because the
    atomic operation that ends the wait orders these stores as well.
    """

    def generate(context, builder, signature, args):
        pointer = address(context, builder, signature.args[0], args[0], args[1])
        stored = builder.store(args[2], builder.bitcast(pointer, VECTOR.as_pointer()), align=64)
        stored.set_metadata("nontemporal", builder.module.add_metadata([I32(1)]))
        return context.get_dummy_value()

    return types.void(array, index, vector), generate


def _sums_of_four(builder, vectors):
    """`sum_lanes` of four vectors at once; returns a vector of four sums."""

    def shuffled(a, b, lanes_of_both):
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes_of_both)), lanes_of_both))

    def halved(a, b, width):
        """Add the halves of each run of 2 * `width` lanes, over both vectors."""
        low = [k + i for k in range(0, 2 * LANES, 2 * width) for i in range(width)]
        return builder.fadd(shuffled(a, b, low), shuffled(a, b, [k + width for k in low]))

    def folded(a, width):
        """`halved` of one vector; every run then holds its sums twice."""
        return builder.fadd(a, shuffled(a, a, [k ^ width for k in range(LANES)]))

    a, b, c, d = vectors
    fours = halved(halved(a, b, LANES // 2), halved(c, d, LANES // 2), LANES // 4)
    ones = folded(folded(fours, 2), 1)
    return shuffled(ones, ones, [0, 4, 8, 12])


def _dots(context, builder, signature, values, samples):
    """The body of `quad_of_dots` for up to four samples; it always writes four sums."""
    kinds, weights, totals = signature.args, values[1 + samples : 9 + samples], []
    for k in range(samples):
        row = address(context, builder, kinds[0], values[0], values[1 + k])
        terms = [load_vector(builder, builder.gep(row, [I64(i * LANES)])) for i in range(8)]
        total = builder.fmul(weights[0], terms[0])
        for w, x in zip(weights[1:], terms[1:], strict=True):
            total = fma_vector(builder, w, x, total)
        totals.append(total)
    target = address(context, builder, kinds[-2], values[-2], values[-1])
    sums = _sums_of_four(builder, [*totals, *totals[-1:] * (4 - samples)])
    store_vector(builder, builder.fadd(load_vector(builder, target, 4), sums), target)
    return context.get_dummy_value()


@intrinsic
def quad_of_dots(typingctx, tile, t0, t1, t2, t3, w0, w1, w2, w3, w4, w5, w6, w7, sums, p):
    """sums[p + k] += dot product of 128 weights with tile[tk : tk + 128], for the four samples k.

    w0 to w7 hold the weights. Each lane takes its eight terms in order, one FMA per term; then `sum_lanes`.
    """

    def generate(context, builder, signature, values):
        return _dots(context, builder, signature, values, 4)

    return types.void(tile, t0, t1, t2, t3, w0, w1, w2, w3, w4, w5, w6, w7, sums, p), generate


@intrinsic
def pair_of_dots(typingctx, tile, t0, t1, w0, w1, w2, w3, w4, w5, w6, w7, sums, p):
    """`quad_of_dots` for two samples. The values of sums[p + 2] and sums[p + 3] are undefined afterwards."""

    def generate(context, builder, signature, values):
        return _dots(context, builder, signature, values, 2)

    return types.void(tile, t0, t1, w0, w1, w2, w3, w4, w5, w6, w7, sums, p), generate


@intrinsic
def _gather_avx512(typingctx, array, at, index, first):
    """A vector with array[at + index[first + k]] in lane k; `index` is int32."""

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
    """`_gather_avx512` for other processors: one element at a time."""

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
