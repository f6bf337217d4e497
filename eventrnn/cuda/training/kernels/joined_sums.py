"""Sums over the devices of a run, which the GPU that owns a part of an array adds up in the order of ranks."""

from __future__ import annotations

from numba import types

from eventrnn.cuda.kernels.ptx import global_float32, global_float64, global_int64
from eventrnn.cuda.training.kernels.threads import first_element, stride

#: kind of numbers -> array at an address
ARRAYS = {"float32": global_float32, "float64": global_float64, "int64": global_int64}


def add_parts_kernel(kind: str):
    """The kernel that adds up one part of an array over all ranks, and its signature. A thread owns every n-th element.

    own_at   : (count,), the part of this rank; replaced by the sum
    parts_at : (ranks - 1, apart), those of the other ranks in their order, of which the first `count` count
    """
    array = ARRAYS[kind]

    def add_parts(own_at, parts_at, apart, count, rank, ranks):
        own, parts = array(own_at), array(parts_at)
        i, step = first_element(), stride()
        while i < count:
            total = own[i] if rank == 0 else parts[i]
            k = 1
            while k < ranks:
                # The parts of the ranks after the own one stand one place earlier.
                place = k if k < rank else k - 1
                total += own[i] if k == rank else parts[place * apart + i]
                k += 1
            own[i] = total
            i += step

    return add_parts, types.void(*[types.int64] * 6)
