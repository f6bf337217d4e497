"""Tables of arrays: a kernel gets the addresses and lengths of many arrays as the rows of one int64 table.

Numba takes some 50 ns to unpack an array argument of a call; a kernel that takes a table unpacks a single array. The
table is (arrays, 2) int64: address and number of elements. `cpu/step_table.py` names the rows of the table of a single
step. The thread that calls the kernel owns the table and keeps the arrays alive. There is no counterpart in
`reference.py`.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np import arrayobj

from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import I64, LANES, bits, load

# These are intrinsics because a step makes some 40 arrays. As Python functions, each would be compiled for every shape;
# `reshape` would call a function of the C library of Numba at each step, which took about 20 ns per array.


def _array(context, builder, array_type, address, shape):
    """The array of a type and a shape (a list of int64) at an address; it owns no memory."""
    item_size = context.get_abi_sizeof(context.get_data_type(array_type.dtype))
    strides = [I64(item_size)]
    for size in reversed(shape[1:]):
        strides.insert(0, builder.mul(strides[0], size))
    array = arrayobj.make_array(array_type)(context, builder)
    arrayobj.populate_array(
        array,
        data=builder.inttoptr(address, array.data.type),
        shape=shape,
        strides=strides,
        itemsize=I64(item_size),
        meminfo=None,
    )
    return array._getvalue()


def _reader(dtype):
    """The intrinsic that makes arrays of a dtype from the rows of a table."""

    def at(typingctx, table, k, leading=()):
        shape_type = leading if isinstance(leading, types.BaseTuple) else types.Tuple(())
        array_type = types.Array(dtype, 1 + len(shape_type), "C")

        def generate(context, builder, signature, args):
            rows = arrayobj.make_array(signature.args[0])(context, builder, args[0]).data
            first = builder.shl(context.cast(builder, args[1], signature.args[1], types.int64), I64(1))
            address, size = (builder.load(builder.gep(rows, [builder.add(first, I64(n))])) for n in range(2))
            sizes = cgutils.unpack_tuple(builder, args[2], len(shape_type))
            shape = [context.cast(builder, x, t, types.int64) for x, t in zip(sizes, shape_type, strict=True)]
            for each in shape:
                size = builder.udiv(size, each)
            return _array(context, builder, array_type, address, [*shape, size])

        return array_type(table, k, shape_type), generate

    return intrinsic(at)


# (table, k, leading) -> the array of row k in its own memory. `leading` has the sizes of all axes but the last, which
# takes what is left; by default it is empty.
float32_at, int32_at, int64_at = _reader(types.float32), _reader(types.int32), _reader(types.int64)


@intrinsic
def float32_of(typingctx, address, size):
    """The float32 array of a size at an address."""
    array_type = types.Array(types.float32, 1, "C")

    def generate(context, builder, signature, args):
        place, length = (
            context.cast(builder, arg, kind, types.int64) for arg, kind in zip(args, signature.args, strict=True)
        )
        return _array(context, builder, array_type, place, [length])

    return array_type(address, size), generate


@intrinsic
def flat(typingctx, array):
    """A contiguous array as one of a single axis, in its own memory."""
    array_type = types.Array(array.dtype, 1, "C")

    def generate(context, builder, signature, args):
        given = arrayobj.make_array(signature.args[0])(context, builder, args[0])
        return _array(context, builder, array_type, builder.ptrtoint(given.data, I64), [given.nitems])

    return array_type(array), generate


@compiled
def first_not_finite(array, count):
    """Position of the first NaN or infinity among the first `count` elements of a float32 array; -1 without one."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        x = load(array, i)
        if bits(x - x != np.float32(0)) != 0:
            whole = i
            break
    for i in range(whole, count):
        if array[i] - array[i] != 0:
            return i
    return -1
