"""Tables of arrays: a kernel gets the addresses and lengths of many arrays as the rows of one int64 table.

Numba takes some 50 ns to unpack an array argument of a call; a kernel that takes a table unpacks a single array. The
table is (arrays, 2) int64: address and number of elements. `cpu/step_table.py` names the rows of the table of a single
step. The thread that calls the kernel owns the table and keeps the arrays alive. There is no counterpart in
`reference.py`.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from eventrnn.cpu.kernels.jit import allocating, compiled
from eventrnn.cpu.kernels.simd import LANES, bits, load


@intrinsic
def _pointer(typingctx, address):
    """Convert an address to a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@allocating
def float32_at(table, k):
    """The flat float32 array of row k of a table, in its own memory."""
    return carray(_pointer(table[k, 0]), (table[k, 1],), np.float32)


@allocating
def int32_at(table, k):
    """The flat int32 array of row k of a table, in its own memory."""
    return carray(_pointer(table[k, 0]), (table[k, 1],), np.int32)


@allocating
def int64_at(table, k):
    """The flat int64 array of row k of a table, in its own memory."""
    return carray(_pointer(table[k, 0]), (table[k, 1],), np.int64)


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
