"""Vector instructions for the CPU kernels: the one file that writes LLVM IR for vectors, prefetch and atomics.

Vectors are `<16 x float>`: one AVX-512 register, or what LLVM makes of it elsewhere (two AVX, four NEON). Lanes
are postsynaptic outputs, never terms of one sum, so the width changes no bit.
"""

from __future__ import annotations

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
FLOAT, I64 = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
# As many accumulators as stay in registers beside the weights: 16 of 32 on AVX-512, 4 (8 AVX registers) elsewhere.
TILE = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 4
PREFETCH_ROWS = 4
SPINS_BEFORE_YIELD = 2000
_IS_X86 = llvm.get_process_triple().startswith(("x86_64", "i686"))
_YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"


def _address(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [builder.sext(index, I64) if index.type != I64 else index])


def _load(builder, pointer):
    return builder.load(builder.bitcast(pointer, VECTOR.as_pointer()), align=4)


def _store(builder, vector, pointer):
    builder.store(vector, builder.bitcast(pointer, VECTOR.as_pointer()), align=4)


def _splat(builder, scalar):
    single = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), scalar, ir.IntType(32)(0))
    lanes = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(VECTOR, ir.Undefined), lanes)


def _fma(builder, a, b, c):
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32"), [a, b, c])


def _lane(builder, pointer, k):
    return builder.gep(pointer, [I64(k * LANES)])


def _add_scaled(vectors: int):
    @intrinsic
    def add_scaled(typingctx, drive, at, weights, start, value):
        """drive[at + k] = fma(weights[start + k], value, drive[at + k]) for k below 16 * vectors."""

        def generate(context, builder, signature, args):
            target = _address(context, builder, signature.args[0], args[0], args[1])
            source = _address(context, builder, signature.args[2], args[2], args[3])
            scale = _splat(builder, args[4])
            # All loads before the first store: the two arrays never overlap, which LLVM cannot know.
            weight = [_load(builder, _lane(builder, source, k)) for k in range(vectors)]
            before = [_load(builder, _lane(builder, target, k)) for k in range(vectors)]
            for k in range(vectors):
                _store(builder, _fma(builder, weight[k], scale, before[k]), _lane(builder, target, k))
            return context.get_dummy_value()

        return types.void(drive, at, weights, start, value), generate

    return add_scaled


add_scaled_16, add_scaled_32, add_scaled_64 = _add_scaled(1), _add_scaled(2), _add_scaled(4)


def _add_rows(vectors: int):
    @intrinsic
    def add_rows(typingctx, drive, at, weights, start, pitch, ids, values, first, count):
        """drive[at + i] += sum over events e of weights[start + ids[e] * pitch + i] * values[e], i below 16 * vectors.

        Events `first` to `first + count`, in order, one FMA each; the sums stay in registers throughout.
        """

        def generate(context, builder, signature, args):
            kinds = signature.args
            target = _address(context, builder, kinds[0], args[0], args[1])
            rows = _address(context, builder, kinds[2], args[2], args[3])
            pitch = args[4]
            id_at = _address(context, builder, kinds[5], args[5], args[7])
            value_at = _address(context, builder, kinds[6], args[6], args[7])
            count = args[8]
            last = builder.sub(count, I64(1))

            def row(event):
                unit = builder.sext(builder.load(builder.gep(id_at, [event])), I64)
                return builder.gep(rows, [builder.mul(unit, pitch)])

            before = [_load(builder, _lane(builder, target, k)) for k in range(vectors)]
            entry, loop = builder.block, builder.append_basic_block("events")
            done = builder.append_basic_block("events.done")
            builder.cbranch(builder.icmp_signed(">", count, I64(0)), loop, done)

            builder.position_at_end(loop)
            event = builder.phi(I64)
            event.add_incoming(I64(0), entry)
            sums = [builder.phi(VECTOR) for _ in range(vectors)]
            for phi, start in zip(sums, before, strict=True):
                phi.add_incoming(start, entry)
            ahead = builder.add(event, I64(PREFETCH_ROWS))
            ahead = builder.select(builder.icmp_signed("<", ahead, count), ahead, last)
            upcoming = row(ahead)
            for k in range(vectors):
                _prefetch(builder, _lane(builder, upcoming, k))
            source = row(event)
            scale = _splat(builder, builder.load(builder.gep(value_at, [event])))
            after = [_fma(builder, _load(builder, _lane(builder, source, k)), scale, sums[k]) for k in range(vectors)]
            following = builder.add(event, I64(1))
            event.add_incoming(following, loop)
            for phi, total in zip(sums, after, strict=True):
                phi.add_incoming(total, loop)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, done)

            builder.position_at_end(done)
            for k in range(vectors):
                total = builder.phi(VECTOR)
                total.add_incoming(before[k], entry)
                total.add_incoming(after[k], loop)
                before[k] = total
            for k in range(vectors):
                _store(builder, before[k], _lane(builder, target, k))
            return context.get_dummy_value()

        return types.void(drive, at, weights, start, pitch, ids, values, first, count), generate

    return add_rows


add_rows_tile, add_rows_8, add_rows_4, add_rows_2, add_rows_1 = (_add_rows(n) for n in (TILE, 8, 4, 2, 1))


def _prefetch(builder, pointer):
    byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    i32 = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.type, i32, i32, i32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte.type], kind)
    builder.call(prefetch, [byte, i32(0), i32(3), i32(1)])


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of array[index]; the index may lie past the end."""

    def generate(context, builder, signature, args):
        _prefetch(builder, _address(context, builder, signature.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, index), generate


@intrinsic
def atomic_add(typingctx, array, amount):
    def generate(context, builder, signature, args):
        pointer = _address(context, builder, signature.args[0], args[0], I64(0))
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(array, types.int64), generate


@intrinsic
def atomic_load(typingctx, array):
    def generate(context, builder, signature, args):
        return builder.load_atomic(_address(context, builder, signature.args[0], args[0], I64(0)), "acquire", 8)

    return types.int64(array), generate


@intrinsic
def pause(typingctx):
    def generate(context, builder, signature, args):
        if _IS_X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_core(typingctx):
    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, _YIELD), [])
        return context.get_dummy_value()

    return types.void(), generate
