"""Device functions and PTX instructions that Numba lacks: typed addresses, memory ordering, clusters, cell rules.

Each is inlined into its caller and works on one thread's registers, unless it names a warp, a block or a cluster.
Addresses are integers: int64 for global memory and for the start of shared memory, int32 in the instructions that take
a shared address. One int64 table in memory can therefore hold everything that a kernel works on.

The cell rules are the functions of `cells.py` (the same that `reference.step` calls), compiled over the primitives
`fma`, `round_even`, `power_of_two`, `ldexp`, `reciprocal` and `select` defined here.
"""

from __future__ import annotations

from types import FunctionType

import numpy as np
from llvmlite import ir
from numba import types

from eventrnn import cells
from eventrnn.cuda.device import cuda, device_function, intrinsic, libdevice

# LLVM types.
I8, I16, I32, I64, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

DOUBLE = ir.DoubleType()

# Address space of global memory in LLVM's NVPTX target.
GLOBAL = 1

# Address space of shared memory.
SHARED = 3

# --- cell rules of one unit ----------------------------------------------------------------------------------


@device_function
def fma(a, b, c):
    """`cells.fma`: a * b + c with one rounding."""
    return cuda.fma(a, b, c)


# 1.5 * 2^23. The sum of this and of a float32 number below 2^22 in magnitude is that number rounded to the nearest
# integer, ties to even, in the low bits. The conversions of the hardware take several times as long as additions.
ROUNDER = np.float32(12582912.0)


@device_function
def round_even(x):
    """`cells.round_even`, for numbers below 2^22 in magnitude."""
    return (x + ROUNDER) - ROUNDER


@device_function
def power_of_two(n):
    """`cells.power_of_two`."""
    return libdevice.int_as_float((libdevice.float_as_int(n + ROUNDER) + np.int32(127)) << np.int32(23))


@device_function
def ldexp(x, n):
    """`cells.ldexp`."""
    return x * power_of_two(n)


@intrinsic
def approximate_reciprocal(typingctx, x):
    """1 / x, with an error of one ulp."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(FLOAT, [FLOAT])
        return builder.call(ir.InlineAsm(kind, "rcp.approx.ftz.f32 $0, $1;", "=f,f"), args)

    return types.float32(types.float32), generate


@device_function
def reciprocal(x):
    """`cells.reciprocal`: the steps of `rcp.rn`, without its test for results that are not normal numbers."""
    y = approximate_reciprocal(x)
    return cuda.fma(y, cuda.fma(-x, y, np.float32(1)), y)


@device_function
def select(condition, a, b):
    """`cells.select`."""
    return a if condition else b


# The functions of `cells.py`, unchanged, over the primitives above. They are copies, because Numba would otherwise use
# the implementations that the CPU engine has registered for the originals.
_names = dict(
    vars(cells),
    fma=fma,
    round_even=round_even,
    power_of_two=power_of_two,
    ldexp=ldexp,
    reciprocal=reciprocal,
    select=select,
)


def _rule(function):
    return device_function(FunctionType(function.__code__, _names, function.__name__))


_names["exp_in_range"] = _rule(cells.exp_in_range)

_names["exp"] = _exp = _rule(cells.exp_float32)

_names["exp_float32"] = _names["exp"]

# The largest number whose reciprocal `reciprocal` computes.
LARGEST_INVERTED = np.float32(2.0**125)


@device_function
def sigmoid(x):
    """`cells.sigmoid_float32`. The test whether the reciprocal is a normal number goes on beside it."""
    divisor = np.float32(1) + _exp(-x)
    y = reciprocal(divisor)
    if divisor > LARGEST_INVERTED:
        y = np.float32(1) / divisor
    return y


_names["sigmoid"] = sigmoid

_names["tanh"] = _rule(cells.tanh_float32)

_names["egru_value_of_gates"] = _rule(cells.egru_value_of_gates)

egru_value = _rule(cells.egru_value)

egru_reset_gate = _rule(cells.egru_reset_gate)

egru_paper_value = _rule(cells.egru_paper_value)

_names["egru_value"] = egru_value

gru_value = _rule(cells.gru_value)

gru_before_value = _rule(cells.gru_before_value)

_names["lstm_output"] = _rule(cells.lstm_output)

lstm_value = _rule(cells.lstm_value)

lstm_output = _names["lstm_output"]

_names["absolute"] = _rule(cells.absolute)

exp_float32 = _names["exp_float32"]

surrogate_slope = _rule(cells.surrogate_slope)

egru_backward = _rule(cells.egru_backward)

egru_paper_backward = _rule(cells.egru_paper_backward)

egru_paper_reset_backward = _rule(cells.egru_paper_reset_backward)

gru_backward = _rule(cells.gru_backward)

gru_before_backward = _rule(cells.gru_before_backward)

lstm_backward = _rule(cells.lstm_backward)


@device_function
def identity(x):
    """The value itself."""
    return x


# The same rules for gates that other warps have evaluated: the sigmoid is the identity, so the caller passes the gate
# as one drive and zero as the other.
_names_of_gates = dict(_names, sigmoid=identity)

egru_value_of_gates = device_function(FunctionType(cells.egru_value.__code__, _names_of_gates, "egru_value_of_gates"))

egru_paper_value_of_gates = device_function(
    FunctionType(cells.egru_paper_value.__code__, _names_of_gates, "egru_paper_value_of_gates")
)

# --- memory -------------------------------------------------------------------------------------------------


def _pointer(space: int, kind: types.Type, lowered: ir.Type):
    """An intrinsic: address -> array of that kind. The known address space avoids slower generic loads and stores."""

    @intrinsic
    def pointer(typingctx, address):
        def generate(context, builder, signature, args):
            there = builder.inttoptr(args[0], ir.PointerType(lowered, space))
            return builder.addrspacecast(there, ir.PointerType(lowered))

        return types.CPointer(kind)(types.int64), generate

    return pointer


global_float32 = _pointer(GLOBAL, types.float32, FLOAT)

global_float64 = _pointer(GLOBAL, types.float64, DOUBLE)

global_uint8 = _pointer(GLOBAL, types.uint8, I8)

global_uint16 = _pointer(GLOBAL, types.uint16, I16)

global_int32 = _pointer(GLOBAL, types.int32, I32)

global_int64 = _pointer(GLOBAL, types.int64, I64)

shared_float32 = _pointer(SHARED, types.float32, FLOAT)

shared_uint16 = _pointer(SHARED, types.uint16, I16)

shared_int32 = _pointer(SHARED, types.int32, I32)

shared_int64 = _pointer(SHARED, types.int64, I64)


@intrinsic
def shared_base(typingctx):
    """Address of the block's dynamic shared memory, int64."""

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
    """Four neighbouring words that other blocks may be writing; each is read whole. The address is a multiple of 16."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.LiteralStructType([I32] * 4), [I64])
        text = "ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$4];"
        words = builder.call(ir.InlineAsm(kind, text, "=r,=r,=r,=r,l", side_effect=True), args)
        parts = [builder.extract_value(words, k) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(types.int32, 4)(types.int64), generate


@intrinsic
def store_relaxed(typingctx, address, value):
    """Store a float32 visibly to other blocks; other memory operations are not ordered by it."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64, FLOAT])
        builder.call(ir.InlineAsm(kind, "st.relaxed.gpu.global.f32 [$0], $1;", "l,f", side_effect=True), args)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic
def sum_of_warp(typingctx, value):
    """The sum of an int32 over all 32 lanes of the warp."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(I32, [I32])
        text = "redux.sync.add.s32 $0, $1, 0xffffffff;"
        return builder.call(ir.InlineAsm(kind, text, "=r,r", side_effect=True), args)

    return types.int32(types.int32), generate


@intrinsic
def copy_async16(typingctx, target, source):
    """Start copying 16 bytes from global to shared memory; both addresses are multiples of 16. See `commit_copies`."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I32, I64])
        text = "cp.async.cg.shared.global [$0], [$1], 16;"
        builder.call(
            ir.InlineAsm(kind, text, "r,l,~{memory}", side_effect=True), [builder.trunc(args[0], I32), args[1]]
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def copy_async16_four(typingctx, target, source):
    """Start `copy_async16` of four pieces that lie 512 bytes apart, on both sides: those of the lanes of a warp."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I32, I64])
        text = " ".join(f"cp.async.cg.shared.global [$0+{512 * k}], [$1+{512 * k}], 16;" for k in range(4))
        builder.call(
            ir.InlineAsm(kind, text, "r,l,~{memory}", side_effect=True), [builder.trunc(args[0], I32), args[1]]
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def add_relaxed(typingctx, address, value):
    """Add atomically to an int64 in global memory."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I64, I64])
        builder.call(ir.InlineAsm(kind, "red.relaxed.gpu.global.add.u64 [$0], $1;", "l,l", side_effect=True), args)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def copy_async(typingctx, target, source):
    """Start copying four bytes from global to shared memory; complete after `wait_for_copies` of the same thread."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [I32, I64])
        text = "cp.async.ca.shared.global [$0], [$1], 4;"
        builder.call(
            ir.InlineAsm(kind, text, "r,l,~{memory}", side_effect=True), [builder.trunc(args[0], I32), args[1]]
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def wait_for_copies(typingctx):
    """Wait for all `copy_async` of this thread."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(ir.InlineAsm(kind, "cp.async.wait_all;", "~{memory}", side_effect=True), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def load_readonly(typingctx, address):
    """A float32 of global memory that is read-only during the kernel.

    The load is issued here; the compiler does not move it to where the value is used.
    """

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(FLOAT, [I64])
        return builder.call(ir.InlineAsm(kind, "ld.global.nc.f32 $0, [$1];", "=f,l", side_effect=True), args)

    return types.float32(types.int64), generate


# --- clusters and barriers --------------------------------------------------------------


def instruction(text: str, constraints: str, result, *arguments, pure: bool = False):
    """An intrinsic for one PTX instruction: its text, operand constraints, result type and argument types.

    Addresses of shared memory are int32, as the instructions take them. The compiler may move one that is `pure`.
    """
    lowered = {types.int32: I32, types.int64: I64, types.float32: FLOAT}
    signature = result(*arguments)
    parts = [each for each in (getattr(result, "types", None) or [result]) if each is not types.void]
    if len(parts) > 1:
        returned = ir.LiteralStructType([lowered[each] for each in parts])
    else:
        returned = lowered[parts[0]] if parts else ir.VoidType()

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(returned, [lowered[each] for each in arguments])
        value = builder.call(ir.InlineAsm(kind, text, constraints, side_effect=not pure), args)
        if len(parts) > 1:
            values = [builder.extract_value(value, k) for k in range(len(parts))]
            return context.make_tuple(builder, signature.return_type, values)
        return value if parts else context.get_dummy_value()

    makers = {
        0: lambda typingctx: (signature, generate),
        1: lambda typingctx, a: (signature, generate),
        2: lambda typingctx, a, b: (signature, generate),
        3: lambda typingctx, a, b, c: (signature, generate),
        4: lambda typingctx, a, b, c, d: (signature, generate),
        5: lambda typingctx, a, b, c, d, e: (signature, generate),
        10: lambda typingctx, a, b, c, d, e, f, g, h, i, j: (signature, generate),
    }
    return intrinsic(makers[len(arguments)])


# Result and argument types of the instructions below.
INT, NOTHING = types.int32, types.void

# Constraint of instructions that read or write memory, which the compiler must not move across other accesses.
MEMORY = "~{memory}"

#: arrive at the barrier of the cluster
cluster_arrive = instruction("barrier.cluster.arrive.aligned;", MEMORY, NOTHING)

#: wait at the barrier of the cluster
cluster_wait = instruction("barrier.cluster.wait.aligned;", MEMORY, NOTHING)

#: shared address, rank -> the same address in the block of that rank of the cluster
map_to_rank = instruction("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", INT, INT, INT, pure=True)

#: barrier, number of arrivals per phase
barrier_init = instruction("mbarrier.init.shared.b64 [$0], $1;", f"r,r,{MEMORY}", NOTHING, INT, INT)

#: makes initialised barriers visible to the cluster
barrier_init_done = instruction("fence.mbarrier_init.release.cluster;", MEMORY, NOTHING)

#: barrier, bytes: arrive at the barrier, whose current phase then waits for that many bytes
barrier_expect_bytes = instruction(
    "mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1;", f"r,r,{MEMORY}", NOTHING, INT, INT
)

#: barrier, parity -> 1 once the phase of that parity is complete; the hardware waits for a limited time
barrier_try_wait = instruction(
    "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [$1], $2; selp.b32 $0, 1, 0, p; }",
    f"=r,r,r,{MEMORY}",
    INT,
    INT,
    INT,
)

#: nanoseconds: the thread sleeps for about as long
sleep = instruction("nanosleep.u32 $0;", f"r,{MEMORY}", NOTHING, INT)

#: number from 1 to 15, threads: a barrier of some whole warps of a block
warps_barrier = instruction("bar.sync $0, $1;", f"r,r,{MEMORY}", NOTHING, INT, INT)

#: barrier: arrive at it
barrier_arrive = instruction(
    "{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [$0]; }", f"r,{MEMORY}", NOTHING, INT
)

#: barrier, parity -> 1 if the phase of that parity is complete
barrier_test = instruction(
    "{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [$1], $2; selp.b32 $0, 1, 0, p; }",
    f"=r,r,r,{MEMORY}",
    INT,
    INT,
    INT,
)

#: shared address, global address, bytes, barrier, which counts them: starts a copy; all are multiples of 16
copy_bulk = instruction(
    "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];",
    f"r,l,r,r,{MEMORY}",
    NOTHING,
    INT,
    types.int64,
    INT,
    INT,
)

#: shared address in a block of the cluster, a word, barrier of that block, which counts its 4 bytes
store_async = instruction(
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [$0], $1, [$2];",
    f"r,r,r,{MEMORY}",
    NOTHING,
    INT,
    INT,
    INT,
)


def _shared_load(lowered: ir.Type, kind: types.Type, count: int = 1, widened: bool = False):
    """An intrinsic: shared address -> one number or a tuple. The compiler may move it, unlike an `instruction`."""
    result = types.UniTuple(kind, count) if count > 1 else kind

    @intrinsic
    def load(typingctx, address):
        def generate(context, builder, signature, args):
            whole = ir.VectorType(lowered, count) if count > 1 else lowered
            there = builder.inttoptr(args[0], ir.PointerType(whole, SHARED))
            value = builder.load(there, align=count * (2 if lowered is I16 else 4))
            if count > 1:
                parts = [builder.extract_element(value, ir.Constant(I32, k)) for k in range(count)]
                return context.make_tuple(builder, signature.return_type, parts)
            return builder.zext(value, I32) if widened else value

        return result(types.int32), generate

    return load


#: shared address -> int32
load_shared = _shared_load(I32, types.int32)

#: shared address -> float32
load_shared_float = _shared_load(FLOAT, types.float32)

#: shared address, a multiple of 8 -> two float32
load_shared_float2 = _shared_load(FLOAT, types.float32, 2)

#: shared address -> uint16 as int32
load_shared_uint16 = _shared_load(I16, types.int32, widened=True)

#: shared address, a multiple of 16 -> four int32
load_shared4 = _shared_load(I32, types.int32, 4)


@intrinsic
def load_shared_float4(typingctx, address):
    """Four neighbouring float32 of shared memory, at an int64 address that is a multiple of 16."""

    def generate(context, builder, signature, args):
        there = builder.inttoptr(args[0], ir.PointerType(ir.VectorType(FLOAT, 4), SHARED))
        value = builder.load(there, align=16)
        parts = [builder.extract_element(value, ir.Constant(I32, k)) for k in range(4)]
        return context.make_tuple(builder, signature.return_type, parts)

    return types.UniTuple(types.float32, 4)(types.int64), generate


#: min(unsigned word, 1); written as PTX, because the compiler generates more instructions for it
at_most_one = instruction("min.u32 $0, $1, 1;", "=r,r", INT, INT)

#: shared address, word, float32, flag: stores the pair unless the flag is zero
store_shared_pair_if = instruction(
    "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.v2.b32 [$0], {$1, $2}; }",
    f"r,r,f,r,{MEMORY}",
    NOTHING,
    INT,
    INT,
    types.float32,
    INT,
)

#: shared address, a multiple of 8, and two words
store_shared2 = instruction("st.shared.v2.b32 [$0], {$1, $2};", f"r,r,r,{MEMORY}", NOTHING, INT, INT, INT)

#: shared address and a float32
store_shared_float = instruction("st.shared.f32 [$0], $1;", f"r,f,{MEMORY}", NOTHING, INT, types.float32)

#: shared address, a multiple of 16, and four float32
store_shared_float4 = instruction(
    "st.shared.v4.f32 [$0], {$1, $2, $3, $4};", f"r,f,f,f,f,{MEMORY}", NOTHING, INT, *[types.float32] * 4
)

#: uint16 of global memory that is read-only during the kernel, as int32
load_readonly_uint16 = instruction("ld.global.nc.u16 $0, [$1];", "=r,l", INT, types.int64)

#: the largest and the smallest of an int32 over all 32 lanes of the warp
max_of_warp = instruction("redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", INT, INT)
min_of_warp = instruction("redux.sync.min.s32 $0, $1, 0xffffffff;", "=r,r", INT, INT)

#: the copies that this thread has started since the last call become a group; it may be empty
commit_copies = instruction("cp.async.commit_group;", MEMORY, NOTHING)

#: wait until at most `OPEN_GROUPS` groups of copies of this thread are incomplete, the latest ones
OPEN_GROUPS = 3
wait_for_oldest_copies = instruction(f"cp.async.wait_group {OPEN_GROUPS};", MEMORY, NOTHING)

#: one word of global memory that other blocks may be writing
load_relaxed = instruction("ld.relaxed.gpu.global.b32 $0, [$1];", f"=r,l,{MEMORY}", INT, types.int64)

#: an int64 of global memory that other blocks may be writing, and the store to one that other blocks or the host read
load_relaxed_int64 = instruction("ld.relaxed.sys.global.b64 $0, [$1];", f"=l,l,{MEMORY}", types.int64, types.int64)
store_relaxed_int64 = instruction(
    "st.relaxed.sys.global.b64 [$0], $1;", f"l,l,{MEMORY}", NOTHING, types.int64, types.int64
)

#: shared address of an int32 and a number: adds it; and the same, which returns what was there before
add_shared = instruction("red.shared.add.s32 [$0], $1;", f"r,r,{MEMORY}", NOTHING, INT, INT)
take_shared = instruction("atom.shared.add.s32 $0, [$1], $2;", f"=r,r,r,{MEMORY}", INT, INT, INT)

#: address of an int32 and a number: adds it, and returns what was there before
count_arrival = instruction("atom.relaxed.gpu.global.add.s32 $0, [$1], $2;", f"=r,l,r,{MEMORY}", INT, types.int64, INT)

#: orders earlier memory operations before later ones, for all blocks and for the host; for all blocks only
fence_system = instruction("fence.acq_rel.sys;", MEMORY, NOTHING)
fence_gpu = instruction("fence.acq_rel.gpu;", MEMORY, NOTHING)

#: two neighbouring words of global memory that are read-only during the kernel
load_readonly2 = instruction(
    "ld.global.nc.v2.b32 {$0, $1}, [$2];", "=r,=r,l", types.UniTuple(types.int32, 2), types.int64
)

#: address, a multiple of 16: four neighbouring float32 of global memory that are read-only during the kernel
load_readonly4 = instruction(
    "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,l", types.UniTuple(types.float32, 4), types.int64
)

#: global address and a float32
store_float = instruction("st.global.f32 [$0], $1;", f"l,f,{MEMORY}", NOTHING, types.int64, types.float32)

#: the clock of the multiprocessor, in cycles
clock = instruction("mov.u64 $0, %clock64;", f"=l,{MEMORY}", types.int64)

#: address of an unsigned int64 and a number: atomic maximum
max_relaxed = instruction(
    "red.relaxed.gpu.global.max.u64 [$0], $1;", f"l,l,{MEMORY}", NOTHING, types.int64, types.int64
)
