"""What kernels need beyond Numba: typed addresses, relaxed loads and stores, and the primitives of `cells.py`.

Addresses are integers, so that one table in memory can hold everything a kernel works on.
"""

from __future__ import annotations

from types import FunctionType

import numpy as np
from llvmlite import ir
from numba import types

from eventrnn import cells
from eventrnn.cuda.device import cuda, device_function, intrinsic, libdevice

I8, I16, I32, I64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
GLOBAL, SHARED = 1, 3

# --- the rules of one unit ----------------------------------------------------------------------------------


@device_function
def fma(a, b, c):
    """`cells.fma`: one rounding."""
    return cuda.fma(a, b, c)


@device_function
def round_even(x):
    """`cells.round_even`."""
    return libdevice.rintf(x)


@device_function
def power_of_two(n):
    """`cells.power_of_two`."""
    return libdevice.int_as_float((np.int32(n) + np.int32(127)) << np.int32(23))


@device_function
def ldexp(x, n):
    """`cells.ldexp`: the result is normal, so its exponent can be added to."""
    return libdevice.int_as_float(libdevice.float_as_int(x) + (np.int32(n) << np.int32(23)))


@device_function
def select(condition, a, b):
    """`cells.select`."""
    return a if condition else b


# The functions of `cells.py` as they stand, over the primitives above. Copies, because Numba would otherwise take what
# the CPU engine has registered for the originals.
_names = dict(vars(cells), fma=fma, round_even=round_even, power_of_two=power_of_two, ldexp=ldexp, select=select)


def _rule(function):
    return device_function(FunctionType(function.__code__, _names, function.__name__))


_names["exp"] = _rule(cells.exp_float32)
_names["exp_float32"] = _names["exp"]
_names["sigmoid"] = _rule(cells.sigmoid_float32)
_names["tanh"] = _rule(cells.tanh_float32)
egru_value = _rule(cells.egru_value)
egru_reset_gate = _rule(cells.egru_reset_gate)
egru_paper_value = _rule(cells.egru_paper_value)


@device_function
def _as_it_is(x):
    return x


# The same rules for gates that other warps have worked out: given the gate and a zero for its two drives.
_given = dict(_names, sigmoid=_as_it_is)
egru_value_of_gates = device_function(FunctionType(cells.egru_value.__code__, _given, "egru_value_of_gates"))
egru_paper_value_of_gates = device_function(
    FunctionType(cells.egru_paper_value.__code__, _given, "egru_paper_value_of_gates")
)

# --- memory -------------------------------------------------------------------------------------------------


def _pointer(space: int, kind: types.Type, lowered: ir.Type):
    """An intrinsic: address -> array of that kind. Saying which memory it is in saves the chip finding out."""

    @intrinsic
    def pointer(typingctx, address):
        def generate(context, builder, signature, args):
            there = builder.inttoptr(args[0], ir.PointerType(lowered, space))
            return builder.addrspacecast(there, ir.PointerType(lowered))

        return types.CPointer(kind)(types.int64), generate

    return pointer


global_float32 = _pointer(GLOBAL, types.float32, FLOAT)
global_uint16 = _pointer(GLOBAL, types.uint16, I16)
global_int32 = _pointer(GLOBAL, types.int32, I32)
global_int64 = _pointer(GLOBAL, types.int64, I64)
shared_float32 = _pointer(SHARED, types.float32, FLOAT)
shared_uint16 = _pointer(SHARED, types.uint16, I16)
shared_int32 = _pointer(SHARED, types.int32, I32)
shared_int64 = _pointer(SHARED, types.int64, I64)


@intrinsic
def shared_base(typingctx):
    """Where the block's dynamic shared memory begins."""

    def generate(context, builder, signature, args):
        name = "eventrnn_shared"
        variable = builder.module.globals.get(name)
        if variable is None:
            variable = ir.GlobalVariable(builder.module, ir.ArrayType(I8, 0), name, addrspace=SHARED)
            variable.linkage, variable.align = "external", 16
        return builder.ptrtoint(variable, I64)

    return types.int64(), generate


@intrinsic
def load_relaxed4(typingctx, address):
    """Four consecutive words as other blocks left them, each whole in itself; the address is a multiple of 16."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.LiteralStructType([I32] * 4), [I64])
        text = "ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];"
        words = builder.call(ir.InlineAsm(kind, text, "=r,=r,=r,=r,l", side_effect=True), args)
        parts = [builder.extract_value(words, k) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(types.int32, 4)(types.int64), generate


@intrinsic
def store_relaxed(typingctx, address, value):
    """A float for other blocks to see; orders nothing else."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64, FLOAT])
        builder.call(ir.InlineAsm(kind, "st.relaxed.gpu.global.f32 [$0], $1;", "l,f", side_effect=True), args)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def sum_of_warp(typingctx, value):
    """The sum of an int32 over all 32 lanes."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(I32, [I32])
        text = "redux.sync.add.s32 $0, $1, 0xffffffff;"
        return builder.call(ir.InlineAsm(kind, text, "=r,r", side_effect=True), args)

    return types.int32(types.int32), generate


@intrinsic
def add_relaxed(typingctx, address, value):
    """Add to an int64 in global memory, whole among other threads' additions."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(ir.InlineAsm(kind, "red.relaxed.gpu.global.add.u64 [$0], $1;", "l,l", side_effect=True), args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def copy_later(typingctx, target, source):
    """Four bytes from global to shared memory, done when `copies_done` returns; nobody waits for them."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I32, I64])
        text = "cp.async.ca.shared.global [$0], [$1], 4;"
        builder.call(ir.InlineAsm(kind, text, "r,l", side_effect=True), [builder.trunc(args[0], I32), args[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def copies_done(typingctx):
    """Waits for this thread's `copy_later`."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(kind, "cp.async.wait_all;", "", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def load_early(typingctx, address):
    """A float from global memory that nobody writes meanwhile, asked for here and not where it is used."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(FLOAT, [I64])
        return builder.call(ir.InlineAsm(kind, "ld.global.nc.f32 $0, [$1];", "=f,l", side_effect=True), args)

    return types.float32(types.int64), generate
