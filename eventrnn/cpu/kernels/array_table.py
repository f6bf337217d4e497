"""MOVED."""

from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.extending import intrinsic

from eventrnn.cpu.kernels.jit import allocating, compiled
from eventrnn.cpu.kernels.simd import LANES, bits, load


@intrinsic
def _pointer(typingctx, address):
    """An address as a pointer."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@allocating
def float32_at(table, k):
    """Array k of a table."""
    return carray(_pointer(table[k, 0]), (table[k, 1],), np.float32)


@allocating
def int32_at(table, k):
    """Array k of a table."""
    return carray(_pointer(table[k, 0]), (table[k, 1],), np.int32)


@allocating
def int64_at(table, k):
    """Array k of a table."""
    return carray(_pointer(table[k, 0]), (table[k, 1],), np.int64)


@compiled
def first_not_finite(array, count):
    """Position of the first of `count` float32 that is NaN or infinite; -1 for none."""
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
