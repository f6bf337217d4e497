"""The floating-point mode of the calling thread, for a single step, which has no time for a call of the C library.

Mode: rounding, traps and flush-to-zero, in the register MXCSR of x86 and FPCR of 64-bit Arm. `_arithmetic.py` says why
it matters and sets it for everything but single steps. On other processors the mode is neither read nor written.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import I32, I64, call

_IS_X86 = llvm.get_process_triple().startswith("x86_64")

_IS_ARM = llvm.get_process_triple().startswith(("aarch64", "arm64"))

# Bits of the register that are the mode, and their values in the standard mode. MXCSR: rounding, masks of traps,
# flush-to-zero of results (15) and of operands (6). FPCR: rounding, traps, default NaN, flush-to-zero.
MODE_BITS, STANDARD = (0xFFC0, 0x1F80) if _IS_X86 else (0x07FF9F07, 0) if _IS_ARM else (0, 0)


@intrinsic
def read_mode(typingctx):
    """The control register of this thread, int64."""

    def generate(context, builder, signature, args):
        if _IS_X86:
            slot = cgutils.alloca_once(builder, I32)
            call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), [builder.bitcast(slot, ir.IntType(8).as_pointer())])
            return builder.zext(builder.load(slot), I64)
        return call(builder, "llvm.aarch64.get.fpcr", I64, []) if _IS_ARM else I64(0)

    return types.int64(), generate


@intrinsic
def write_mode(typingctx, mode):
    """Write the control register of this thread."""

    def generate(context, builder, signature, args):
        if _IS_X86:
            slot = cgutils.alloca_once(builder, I32)
            builder.store(builder.trunc(args[0], I32), slot)
            call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), [builder.bitcast(slot, ir.IntType(8).as_pointer())])
        elif _IS_ARM:
            call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), [args[0]])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@compiled
def enter_standard_mode():
    """Set the standard mode; returns what `leave_standard_mode` takes."""
    mode = read_mode()
    if mode & MODE_BITS != STANDARD:
        write_mode((mode & ~MODE_BITS) | STANDARD)
    return mode


@compiled
def leave_standard_mode(mode):
    """Set the mode from before `enter_standard_mode`."""
    if mode & MODE_BITS != STANDARD:
        write_mode(mode)
