"""MOVED."""

from __future__ import annotations

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import I32, I64, address, call

# Some microseconds: longer than threads that all run wait for each other. Whoever waits longer may be in the way.
SPINS_BEFORE_YIELD = 300

_IS_X86 = llvm.get_process_triple().startswith(("x86_64", "i686"))

_YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"


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


@compiled
def meet(barrier, parts, target):
    """Come to the barrier and wait until `target` arrivals were made in all; returns for how many turns of a loop."""
    spins = 0
    if parts > 1:
        atomic_add(barrier, 1)
        while atomic_load(barrier) < target:
            spins += 1
            pause()
            if spins > SPINS_BEFORE_YIELD:
                yield_core()
    return spins


@compiled
def wait(barrier, parts, target):
    """`meet`; returns the next target."""
    meet(barrier, parts, target)
    return target + parts


@compiled
def take(queue):
    """The next number from 0 on; no two threads get the same."""
    return atomic_add(queue, 1)


@compiled
def take_piece(queue, size, most, least, parts):
    """The next piece of `size` that no thread has: its first and how many, none when all are given out.

    `most` at a time; towards the end fewer, down to `least`, so that threads end together though one core is slower.
    """
    first, count = 0, 0
    for _ in range(take(queue) + 1):
        first += count
        fair = (size - first) // (parts + 1) if parts > 1 else most
        count = min(size - first, max(least, min(most, fair)))
    return first, count
