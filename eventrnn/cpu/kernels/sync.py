"""Spin barrier and work counter for threads that run one kernel together.

A thread calls these on int64 arrays of one element that all threads share. The barrier counts arrivals; the work
counter hands out work in order of requests (dynamic scheduling). Neither changes a result.

A thread that fails, or that never starts, does not arrive at a barrier. `cpu/threads.py` then abandons the barrier: the
count of arrivals is negative from then on, and every thread that waits, or comes to wait, is told so and must return.
"""

from __future__ import annotations

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import I32, I64, address, call

# Turns of the waiting loop before a thread yields its core, some microseconds: longer than the usual wait while every
# thread has a core of its own. A thread that waits longer may be on the core that the awaited thread needs.
SPINS_BEFORE_YIELD = 300

# Count of arrivals of a barrier that was abandoned: negative, also after arrivals that follow.
ABANDONED = -(1 << 62)

_IS_X86 = llvm.get_process_triple().startswith(("x86_64", "i686"))

_YIELD = "SwitchToThread" if os.name == "nt" else "sched_yield"


@intrinsic
def atomic_add(typingctx, array, amount):
    """array[0] += amount as one atomic operation (acquire and release); returns the value before."""

    def generate(context, builder, signature, args):
        pointer = address(context, builder, signature.args[0], args[0], I64(0))
        return builder.atomic_rmw("add", pointer, args[1], "acq_rel")

    return types.int64(array, types.int64), generate


@intrinsic
def atomic_load(typingctx, array):
    """array[0]; what another thread wrote before it wrote this value is visible afterwards (acquire)."""

    def generate(context, builder, signature, args):
        return builder.load_atomic(address(context, builder, signature.args[0], args[0], I64(0)), "acquire", 8)

    return types.int64(array), generate


@intrinsic
def pause(typingctx):
    """Hint to the core that this is a waiting loop; nothing on processors other than x86."""

    def generate(context, builder, signature, args):
        if _IS_X86:
            call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_core(typingctx):
    """Let the operating system run another thread on this core."""

    def generate(context, builder, signature, args):
        call(builder, _YIELD, I32, [])
        return context.get_dummy_value()

    return types.void(), generate


@compiled
def barrier_wait(barrier, n_threads, target):
    """Arrive at the barrier and wait until all arrivals at it number `target`.

    barrier : (1,) int64, counts arrivals; zero at first
    target  : n_threads at the first barrier, then what the call before returned

    Returns the next target. One thread alone does not wait. A negative target means that the barrier was abandoned: the
    caller must return at once, because other threads may have stopped anywhere.
    """
    if n_threads > 1:
        spins = 0
        atomic_add(barrier, 1)
        arrived = atomic_load(barrier)
        while arrived < target:
            if arrived < 0:
                return arrived
            spins += 1
            pause()
            if spins > SPINS_BEFORE_YIELD:
                yield_core()
            arrived = atomic_load(barrier)
    return target + n_threads


@compiled
def next_index(work_counter):
    """The next number, from zero on; no two threads get the same. work_counter: (1,) int64, zero at first."""
    return atomic_add(work_counter, 1)


@compiled
def next_chunk(work_counter, size, most, least, n_threads):
    """Begin and length of the next chunk of `size` items that no thread has; length 0 when none is left.

    A chunk has up to `most` items. Towards the end chunks get smaller, down to `least`, so that threads finish together
    although one core is slower.
    """
    first, count = 0, 0
    for _ in range(next_index(work_counter) + 1):
        first += count
        fair = (size - first) // (n_threads + 1) if n_threads > 1 else most
        count = min(size - first, max(least, min(most, fair)))
    return first, count
