"""Weight rows into drives, in vector registers; prefetch; and what threads need to meet.

The innermost loops of the CPU engine, written as LLVM IR because accumulators must stay in registers.
"""

from __future__ import annotations

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn.simd import I32, I64, LANES, VECTOR, address, call, fma_vector, load_vector, splat, store_vector

# As many accumulators as stay in registers beside the weights: 16 of 32 on AVX-512, 4 (8 AVX registers) elsewhere.
TILE = 16 if llvm.get_host_cpu_features().get("avx512f", False) else 4
PREFETCH_ROWS = 4
SPINS_BEFORE_YIELD = 2000
_IS_X86 = llvm.get_process_triple().startswith(("x86_64", "i686"))
_YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"


def _lane(builder, pointer, k):
    return builder.gep(pointer, [I64(k * LANES)])


def _add_blocks(vectors: int, width: int = LANES):
    size = vectors * width

    @intrinsic
    def add_blocks(typingctx, drive, at, columns, first, count, weights, start, value):
        """drive[at + columns[first + k] + i] += weights[start + k * size + i] * value for blocks k below count.

        i below size; one FMA each. Blocks of one unit never overlap.
        """

        def generate(context, builder, signature, args):
            kinds = signature.args
            target = address(context, builder, kinds[0], args[0], args[1])
            column_at = address(context, builder, kinds[2], args[2], args[3])
            source = address(context, builder, kinds[5], args[5], args[6])
            scale = splat(builder, args[7], width)

            def body(k):
                column = builder.sext(builder.load(builder.gep(column_at, [k])), I64)
                out = builder.gep(target, [column])
                block = builder.gep(source, [builder.mul(k, I64(size))])
                # All loads before the first store: the two arrays never overlap, which LLVM cannot know.
                weight = [load_vector(builder, _lane(builder, block, i), width) for i in range(vectors)]
                before = [load_vector(builder, _lane(builder, out, i), width) for i in range(vectors)]
                for i in range(vectors):
                    store_vector(builder, fma_vector(builder, weight[i], scale, before[i]), _lane(builder, out, i))

            _for_each(builder, args[4], body)
            return context.get_dummy_value()

        return types.void(drive, at, columns, first, count, weights, start, value), generate

    return add_blocks


add_blocks_4, add_blocks_8 = _add_blocks(1, 4), _add_blocks(1, 8)
add_blocks_16, add_blocks_32, add_blocks_64 = _add_blocks(1), _add_blocks(2), _add_blocks(4)


def _add_to_many(vectors: int, width: int = LANES):
    @intrinsic
    def add_to_many(typingctx, drive, at, weights, start, targets, values, first, count):
        """drive[at + targets[e] + i] += weights[start + i] * values[e] for e in first to first + count.

        i below vectors * width; the weights are read once and stay in registers.
        """

        def generate(context, builder, signature, args):
            kinds = signature.args
            out = address(context, builder, kinds[0], args[0], args[1])
            source = address(context, builder, kinds[2], args[2], args[3])
            target_at = address(context, builder, kinds[4], args[4], args[6])
            value_at = address(context, builder, kinds[5], args[5], args[6])
            weight = [load_vector(builder, _lane(builder, source, i), width) for i in range(vectors)]

            def body(e):
                offset = builder.sext(builder.load(builder.gep(target_at, [e])), I64)
                row = builder.gep(out, [offset])
                scale = splat(builder, builder.load(builder.gep(value_at, [e])), width)
                before = [load_vector(builder, _lane(builder, row, i), width) for i in range(vectors)]
                for i in range(vectors):
                    store_vector(builder, fma_vector(builder, weight[i], scale, before[i]), _lane(builder, row, i))

            _for_each(builder, args[7], body)
            return context.get_dummy_value()

        return types.void(drive, at, weights, start, targets, values, first, count), generate

    return add_to_many


add_to_many_4, add_to_many_8 = _add_to_many(1, 4), _add_to_many(1, 8)
add_to_many_16, add_to_many_32, add_to_many_64, add_to_many_128 = (_add_to_many(n) for n in (1, 2, 4, 8))


def _add_rows(vectors: int):
    @intrinsic
    def add_rows(typingctx, drive, at, weights, start, pitch, ids, values, first, count):
        """drive[at + i] += sum over events e of weights[start + ids[e] * pitch + i] * values[e], i below 16 * vectors.

        Events `first` to `first + count`, in order, one FMA each; the sums stay in registers throughout.
        """

        def generate(context, builder, signature, args):
            kinds = signature.args
            target = address(context, builder, kinds[0], args[0], args[1])
            rows = address(context, builder, kinds[2], args[2], args[3])
            pitch = args[4]
            id_at = address(context, builder, kinds[5], args[5], args[7])
            value_at = address(context, builder, kinds[6], args[6], args[7])
            count = args[8]
            last = builder.sub(count, I64(1))

            def row(event):
                unit = builder.sext(builder.load(builder.gep(id_at, [event])), I64)
                return builder.gep(rows, [builder.mul(unit, pitch)])

            before = [load_vector(builder, _lane(builder, target, k)) for k in range(vectors)]
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
            scale = splat(builder, builder.load(builder.gep(value_at, [event])))
            after = [
                fma_vector(builder, load_vector(builder, _lane(builder, source, k)), scale, sums[k])
                for k in range(vectors)
            ]
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
                store_vector(builder, before[k], _lane(builder, target, k))
            return context.get_dummy_value()

        return types.void(drive, at, weights, start, pitch, ids, values, first, count), generate

    return add_rows


add_rows_tile, add_rows_8, add_rows_4, add_rows_2, add_rows_1 = (_add_rows(n) for n in (TILE, 8, 4, 2, 1))


def _for_each(builder, count, body):
    """body(k) for k below count; the loop keeps nothing but k."""
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("loop.done")
    builder.cbranch(builder.icmp_signed(">", count, I64(0)), loop, done)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    k.add_incoming(I64(0), entry)
    body(k)
    following = builder.add(k, I64(1))
    k.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)


def _prefetch(builder, pointer):
    byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, I32(0), I32(3), I32(1)])


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of array[index]; the index may lie past the end."""

    def generate(context, builder, signature, args):
        _prefetch(builder, address(context, builder, signature.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, index), generate


@intrinsic
def atomic_add(typingctx, array, amount):
    """array[0] += amount, one indivisible step, ordered before and after."""

    def generate(context, builder, signature, args):
        pointer = address(context, builder, signature.args[0], args[0], I64(0))
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(array, types.int64), generate


@intrinsic
def atomic_load(typingctx, array):
    """array[0], and everything written before it was."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(address(context, builder, signature.args[0], args[0], I64(0)), "acquire", 8)

    return types.int64(array), generate


@intrinsic
def pause(typingctx):
    """Tell the core that this is a waiting loop, where it can be told."""

    def generate(context, builder, signature, args):
        if _IS_X86:
            call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_core(typingctx):
    """Let another thread have the core."""

    def generate(context, builder, signature, args):
        call(builder, _YIELD, I32, [])
        return context.get_dummy_value()

    return types.void(), generate
