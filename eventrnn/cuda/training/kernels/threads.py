"""What all training kernels share: the elements of a thread, operands of products, sums over a block.

Kernels take int64 arguments only. Arguments named `*_at` are byte addresses in global memory, `*_bits` are the bits of
a float32. A kernel whose docstring says "a thread owns every n-th element" gives the same bits for any number of blocks
and threads. A kernel whose blocks own rows adds up in an order that depends on the number of threads, which its caller
fixes.

Operands are the inputs of cuBLAS products, stored in the type `precision`: "bfloat16", or float32 for "tf32" and
"float32".
"""

from __future__ import annotations

import numpy as np
from numba import float64, int32, int64, types

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.ptx import MEMORY, NOTHING, global_float32, instruction, store_float

#: bytes per operand of each precision
BYTES = {"bfloat16": 2, "tf32": 4, "float32": 4}

#: most threads per block of a kernel that sums over a block
MOST_THREADS = 1024

_store_bfloat16 = instruction(
    "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }",
    f"l,f,{MEMORY}",
    NOTHING,
    types.int64,
    types.float32,
)

_load_bfloat16 = instruction(
    "{ .reg .b16 h; .reg .b16 z; ld.global.b16 h, [$1]; mov.b16 z, 0; mov.b32 $0, {z, h}; }",
    f"=f,l,{MEMORY}",
    types.float32,
    types.int64,
)


@device_function
def _load_float32(address):
    return global_float32(address)[0]


#: precision -> store(address, float32), rounded to the nearest operand, ties to even
STORES = {"bfloat16": _store_bfloat16, "tf32": store_float, "float32": store_float}

#: precision -> load(address), a float32
LOADS = {"bfloat16": _load_bfloat16, "tf32": _load_float32, "float32": _load_float32}


@device_function
def first_element():
    """The first element of this thread, where a thread owns every n-th element."""
    return int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x


@device_function
def stride():
    """The distance of the elements of a thread: the number of all threads."""
    return int64(cuda.gridDim.x) * cuda.blockDim.x


@device_function
def float_of(bits):
    """The float32 with the given bits."""
    return libdevice.int_as_float(int32(bits))


@device_function
def sum_of_block(value, scratch):
    """The sum of a float64 over the threads of the block, a power of two; `scratch` is shared, MOST_THREADS float64."""
    thread = int64(cuda.threadIdx.x)
    scratch[thread] = value
    cuda.syncthreads()
    half = int64(cuda.blockDim.x) // 2
    while half > 0:
        if thread < half:
            scratch[thread] += scratch[thread + half]
        cuda.syncthreads()
        half //= 2
    total = scratch[0]
    cuda.syncthreads()
    return total


@device_function
def largest_of_block(value, scratch):
    """The largest float64 over the threads of the block; `scratch` as in `sum_of_block`."""
    thread = int64(cuda.threadIdx.x)
    scratch[thread] = value
    cuda.syncthreads()
    half = int64(cuda.blockDim.x) // 2
    while half > 0:
        if thread < half:
            scratch[thread] = max(scratch[thread], scratch[thread + half])
        cuda.syncthreads()
        half //= 2
    largest = scratch[0]
    cuda.syncthreads()
    return largest


def narrow_kernel(precision: str):
    """The kernel that rounds `count` float32 at `source_at` to operands at `out_at`, and its signature.

    A thread owns every n-th element.
    """
    store, size = STORES[precision], BYTES[precision]

    def narrow(source_at, count, out_at):
        source, i, step = global_float32(source_at), first_element(), stride()
        while i < count:
            store(out_at + size * i, source[i])
            i += step

    return narrow, types.void(*[types.int64] * 3)


ZERO64, ZERO32, ONE32 = float64(0), np.float32(0), np.float32(1)
