"""Arrays of which a kernel gets only the address and the length, as rows of an int64 table.

Numba unpacks every array argument of a call at some 50 ns; a kernel that takes a table instead unpacks one. The rows of
the table of a single step are named in `step_table.py`. The caller keeps the arrays alive.
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
    """The flat float32 array of row k of a table."""
    return carray(_pointer(table[k, 0]), (table[k, 1],), np.float32)


@allocating
def int32_at(table, k):
    """The flat int32 array of row k of a table."""
    return carray(_pointer(table[k, 0]), (table[k, 1],), np.int32)


@allocating
def int64_at(table, k):
    """The flat int64 array of row k of a table."""
    return carray(_pointer(table[k, 0]), (table[k, 1],), np.int64)


@compiled
def first_not_finite(array, count):
    """Position of the first NaN or infinity among the first `count` float32 of an array; -1 if there is none."""
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
