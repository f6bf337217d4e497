"""Vectors of sixteen float32 lanes as a Numba type, so that the rules of `cells.py` compile to vector code unchanged.

LLVM's own vectoriser gives up on loops over many arrays, because it cannot prove that they do not overlap. A `Lanes`
value is one AVX-512 register; on other processors it is what LLVM makes of `<16 x float>`: two AVX or four NEON
registers. A `LaneMask` holds sixteen booleans. Vectors and scalars may be mixed in an expression.

A thread owns the vectors that it loads and stores; nothing here is shared between threads. Arrays are flat float32 of
the caller, and no index is checked. Each lane does what the primitives of `cells.py` do to a scalar (`fma`, `select`,
`exp`), with the same roundings. Lanes are units or postsynaptic outputs and never terms of one sum, so the number of
lanes changes no bit of a result, and kernels equal the scalar loops of `reference.py`.
"""

from __future__ import annotations

import operator
import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.core.datamodel import PrimitiveModel, register_default
from numba.core.typing.templates import infer, infer_global, make_intrinsic_template
from numba.extending import intrinsic, overload

from eventrnn import cells

LANES = 16

FLOAT, I1, I16, I32, I64 = ir.FloatType(), ir.IntType(1), ir.IntType(16), ir.IntType(32), ir.IntType(64)


def may_use(feature: str) -> bool:
    """Whether kernels may use the instructions that LLVM calls by this name, such as "avx512f".

    With `EVENTRNN_VECTORS=portable` in the environment they use none, and the kernels for other processors are made.
    """
    if os.environ.get("EVENTRNN_VECTORS") == "portable":
        return False
    if config.CPU_NAME:
        return f"+{feature}" in (config.CPU_FEATURES or "")
    return bool(llvm.get_host_cpu_features().get(feature, False))


#: Whether kernels may use the 32 registers of 16 lanes of AVX-512, its gathers, scatters and masks. Chosen at import.
AVX512 = may_use("avx512f")

VECTOR = ir.VectorType(FLOAT, LANES)


class Lanes(types.Type):
    """Numba type of sixteen float32."""

    def __init__(self):
        super().__init__("float32x16")


class LaneMask(types.Type):
    """Numba type of sixteen booleans, one per lane."""

    def __init__(self):
        super().__init__("boolx16")


lanes, mask = Lanes(), LaneMask()


@register_default(Lanes)
class _LanesModel(PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, VECTOR)


@register_default(LaneMask)
class _MaskModel(PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(I1, LANES))


# --- emitting IR: shared with microkernels.py -----------------------------------------------------------------------


def address(context, builder, array_type, array, index):
    """Pointer to array[index]; the index is not checked."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index if index.type == I64 else builder.sext(index, I64)])


def load_vector(builder, pointer, width: int = LANES):
    """Load `width` float32 from a pointer, which need not be aligned."""
    return builder.load(builder.bitcast(pointer, ir.VectorType(FLOAT, width).as_pointer()), align=4)


def store_vector(builder, vector, pointer):
    """Store a vector of float32 at a pointer, which need not be aligned."""
    builder.store(vector, builder.bitcast(pointer, vector.type.as_pointer()), align=4)


def splat(builder, scalar, width: int = LANES):
    """A vector with the float in every lane."""
    undefined = ir.Constant(ir.VectorType(FLOAT, width), ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, width), [0] * width))


def call(builder, name, result, args):
    """Call an LLVM intrinsic or C function by its full name."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def fma_vector(builder, a, b, c):
    """a * b + c; each lane is rounded once."""
    return call(builder, f"llvm.fma.v{c.type.count}f32", c.type, [a, b, c])


# --- arithmetic on scalars and lanes ------------------------------------------------------------------------


def _is_number(*kinds) -> bool:
    return all(kind in (lanes, types.float32) for kind in kinds)


def _common(builder, kinds, args):
    """The arguments, all as vectors if any of them is one; their LLVM type; and the suffix of LLVM's intrinsics."""
    if lanes not in kinds:
        return list(args), FLOAT, "f32"
    widened = [arg if kind == lanes else splat(builder, arg) for kind, arg in zip(kinds, args, strict=True)]
    return widened, VECTOR, f"v{LANES}f32"


def _result(*kinds):
    return lanes if lanes in kinds else types.float32


def _instructions(function):
    """Give a function of `cells`, or an operator, its instructions. The definition is one of an intrinsic.

    An `overload` would put a function in between, which Numba compiles for every combination of types.
    """

    def register(definition):
        template = make_intrinsic_template(function, definition, function.__name__)
        infer(template)
        infer_global(function, types.Function(template))
        return definition

    return register


@_instructions(cells.fma)
def _(typingctx, a, b, c):
    def generate(context, builder, signature, args):
        values, kind, suffix = _common(builder, signature.args, args)
        return call(builder, f"llvm.fma.{suffix}", kind, values)

    if _is_number(a, b, c):
        return _result(a, b, c)(a, b, c), generate


@_instructions(cells.round_even)
def _(typingctx, x):
    def generate(context, builder, signature, args):
        values, kind, suffix = _common(builder, signature.args, args)
        return call(builder, f"llvm.rint.{suffix}", kind, values)

    if _is_number(x):
        return x(x), generate


def _exponent(builder, n):
    """2 ** n, float32 or a vector of them, from the bits of its exponent."""
    wide = n.type != FLOAT
    whole = ir.VectorType(I32, LANES) if wide else I32

    def constant(k):
        return ir.Constant(whole, [k] * LANES if wide else k)

    exponent = builder.add(builder.fptosi(n, whole), constant(127))
    return builder.bitcast(builder.shl(exponent, constant(23)), n.type)


@_instructions(cells.power_of_two)
def _(typingctx, n):
    def generate(context, builder, signature, args):
        return _exponent(builder, args[0])

    if _is_number(n):
        return n(n), generate


@_instructions(cells.ldexp)
def _(typingctx, x, n):
    def generate(context, builder, signature, args):
        if signature.args[0] == lanes and AVX512:
            everywhere, nearest = ir.Constant(I16, -1), I32(4)
            name = "llvm.x86.avx512.mask.scalef.ps.512"
            return call(builder, name, VECTOR, [*args, args[0], everywhere, nearest])
        return builder.fmul(args[0], _exponent(builder, args[1]))

    if x == n and _is_number(x):
        return x(x, n), generate


@_instructions(cells.select)
def _(typingctx, condition, a, b):
    def generate(context, builder, signature, args):
        values = args[1:]
        if signature.args[0] == mask:
            pairs = zip(signature.args[1:], values, strict=True)
            values = [value if kind == lanes else splat(builder, value) for kind, value in pairs]
        return builder.select(args[0], *values)

    if condition == mask and _is_number(a, b):
        return lanes(condition, a, b), generate
    if condition == types.boolean and a == b == types.float32:
        return types.float32(condition, a, b), generate


def _define_function(function, rule):
    @overload(function, jit_options={"no_cfunc_wrapper": True}, strict=False)
    def _(x):
        return rule


_define_function(cells.exp, cells.exp_float32)

_define_function(cells.sigmoid, cells.sigmoid_float32)

_define_function(cells.tanh, cells.tanh_float32)


def _define_binary(function, instruction: str):
    @_instructions(function)
    def _(typingctx, a, b):
        def generate(context, builder, signature, args):
            values, _, _ = _common(builder, signature.args, args)
            return getattr(builder, instruction)(*values)

        if lanes in (a, b) and _is_number(a, b):
            return lanes(a, b), generate


def _define_comparison(function, sign: str):
    @_instructions(function)
    def _(typingctx, a, b):
        def generate(context, builder, signature, args):
            values, _, _ = _common(builder, signature.args, args)
            # As for scalars: a NaN differs from everything, and is neither more nor less.
            return (builder.fcmp_unordered if sign == "!=" else builder.fcmp_ordered)(sign, *values)

        if lanes in (a, b) and _is_number(a, b):
            return mask(a, b), generate


for _function, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _define_binary(_function, _instruction)

for _function, _sign in ((operator.lt, "<"), (operator.gt, ">"), (operator.ne, "!=")):
    _define_comparison(_function, _sign)


@_instructions(operator.neg)
def _(typingctx, x):
    def generate(context, builder, signature, args):
        return builder.fneg(args[0])

    if x == lanes:
        return lanes(x), generate


# --- memory -------------------------------------------------------------------------------------------------


@intrinsic
def load(typingctx, array, index):
    """The sixteen float32 array[index : index + 16]. The index is not checked and need not be aligned."""

    def generate(context, builder, signature, args):
        return load_vector(builder, address(context, builder, signature.args[0], *args))

    return lanes(array, index), generate


@intrinsic
def store(typingctx, array, index, vector):
    """array[index : index + 16] = vector. The index is not checked and need not be aligned."""

    def generate(context, builder, signature, args):
        store_vector(builder, args[2], address(context, builder, signature.args[0], args[0], args[1]))
        return context.get_dummy_value()

    return types.void(array, index, vector), generate


@intrinsic
def load_some(typingctx, array, index, count):
    """The first `count` < 16 of the float32 from array[index] on, then zeros; what lies after them is not read."""

    def generate(context, builder, signature, args):
        pointer = address(context, builder, signature.args[0], *args[:2])
        nothing = ir.Constant(VECTOR, [0.0] * LANES)
        pointer = builder.bitcast(pointer, VECTOR.as_pointer())
        return call(
            builder,
            f"llvm.masked.load.v{LANES}f32.p0",
            VECTOR,
            [pointer, I32(4), first_lanes(builder, args[2]), nothing],
        )

    return lanes(array, index, count), generate


@intrinsic
def store_some(typingctx, array, index, count, vector):
    """array[index:index + count] = the first `count` < 16 of the vector; nothing after them is written."""

    def generate(context, builder, signature, args):
        pointer = address(context, builder, signature.args[0], *args[:2])
        pointer = builder.bitcast(pointer, VECTOR.as_pointer())
        values = [args[3], pointer, I32(4), first_lanes(builder, args[2])]
        call(builder, f"llvm.masked.store.v{LANES}f32.p0", ir.VoidType(), values)
        return context.get_dummy_value()

    return types.void(array, index, count, vector), generate


def first_lanes(builder, count):
    """The mask of the first `count` lanes."""
    whole = ir.VectorType(I32, LANES)
    undefined = ir.Constant(whole, ir.Undefined)
    most = builder.insert_element(undefined, builder.trunc(count, I32), I32(0))
    most = builder.shuffle_vector(most, undefined, ir.Constant(whole, [0] * LANES))
    return builder.icmp_signed("<", ir.Constant(whole, list(range(LANES))), most)


@intrinsic
def in_every_lane(typingctx, x):
    """A vector with the float32 in every lane."""

    def generate(context, builder, signature, args):
        return splat(builder, args[0])

    if x == types.float32:
        return lanes(x), generate


@intrinsic
def bits(typingctx, condition):
    """The mask as an integer: bit k is lane k."""

    def generate(context, builder, signature, args):
        return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), I64)

    if condition == mask:
        return types.int64(condition), generate


@intrinsic
def lowest_bit(typingctx, word):
    """Position of the lowest set bit of an integer that is not zero."""

    def generate(context, builder, signature, args):
        return call(builder, "llvm.cttz.i64", I64, [args[0], I1(True)])

    return types.int64(types.int64), generate


@intrinsic
def compress_avx512(typingctx, ids, sent, at, first, condition, vector):
    """Append the lanes where `condition` holds to an event list; returns how many there are (stream compaction).

    The values go to sent[at:] (float32), and `first` plus the number of the lane to ids[at:] (int32). Sixteen elements
    of each array are overwritten, however many lanes are appended.
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        whole = ir.VectorType(I32, LANES)
        undefined = ir.Constant(whole, ir.Undefined)
        start = builder.insert_element(undefined, builder.trunc(args[3], I32), I32(0))
        start = builder.shuffle_vector(start, undefined, ir.Constant(whole, [0] * LANES))
        numbers = builder.add(start, ir.Constant(whole, list(range(LANES))))
        for array, kind, lane_type, name in ((0, whole, numbers, "i32"), (1, VECTOR, args[5], "f32")):
            packed = call(
                builder, f"llvm.x86.avx512.mask.compress.v{LANES}{name}", kind, [lane_type, lane_type, args[4]]
            )
            pointer = address(context, builder, kinds[array], args[array], args[2])
            builder.store(packed, builder.bitcast(pointer, kind.as_pointer()), align=4)
        chosen = builder.bitcast(args[4], I16)
        return builder.zext(call(builder, "llvm.ctpop.i16", I16, [chosen]), I64)

    return types.int64(ids, sent, at, first, condition, vector), generate


@intrinsic
def decoded(typingctx, weights, index, scale):
    """weights[index] as float32, from float32, from uint16 (the upper half of a float32), or int8 times `scale`."""

    def generate(context, builder, signature, args):
        raw = builder.load(address(context, builder, signature.args[0], args[0], args[1]))
        if raw.type == FLOAT:
            return raw
        if raw.type == I16:
            return builder.bitcast(builder.shl(builder.zext(raw, I32), I32(16)), FLOAT)
        return builder.fmul(builder.sitofp(builder.sext(raw, I32), FLOAT), args[2])

    return types.float32(weights, index, scale), generate
