"""Kernels for layers on tensor cores: round what cuBLAS multiplies, and update the cells of one step.

Not exact: operands have the rounded type `precision` ("float16", "bfloat16" or "tf32"), and sigmoid and tanh use the
GPU's approximate exponential and reciprocal, whose errors of a few ulp are smaller than those of the rounded operands.
The rules are those of `reference.step` with variant "evnn". All arrays are in global memory; arguments named `*_at` are
byte addresses. There are no barriers between threads but one warp barrier in `densify`.

densify    : a warp owns one row of the event lists.
round_rows : a block owns one row, a thread every blockDim.x-th column.
cells      : a thread owns two neighbouring units and every gridDim.y-th sample.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.ptx import (
    MEMORY,
    NOTHING,
    fma,
    global_float32,
    global_int32,
    global_int64,
    global_uint16,
    instruction,
    max_relaxed,
    store_float,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP
from eventrnn.cuda.tables import LANES, STATUS_LARGE, SUM_BITS

#: bytes per number of each precision
BYTES = {"float16": 2, "bfloat16": 2, "tf32": 4}

#: the largest finite float16
FLOAT16_MAX = 65504.0

#: log2(e)
LOG2_E = np.float32(1.4426950408889634)

ONE = np.float32(1)

TWO = np.float32(2)

#: parameter vectors per unit: biases of u, r, g, recurrent bias of g, threshold
VECTORS = 5

power_of_two_approx = instruction("ex2.approx.ftz.f32 $0, $1;", "=f,f", types.float32, types.float32)

reciprocal_approx = instruction("rcp.approx.ftz.f32 $0, $1;", "=f,f", types.float32, types.float32)

_STORES = {
    "float16": instruction(
        "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; st.global.b16 [$0], h; }",
        f"l,f,{MEMORY}",
        NOTHING,
        types.int64,
        types.float32,
    ),
    "bfloat16": instruction(
        "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }",
        f"l,f,{MEMORY}",
        NOTHING,
        types.int64,
        types.float32,
    ),
    "tf32": store_float,
}


PAIR = types.UniTuple(types.float32, 2)

load_pair = instruction("ld.global.v2.f32 {$0, $1}, [$2];", f"=f,=f,l,{MEMORY}", PAIR, types.int64)

store_pair = instruction(
    "st.global.v2.f32 [$0], {$1, $2};", f"l,f,f,{MEMORY}", NOTHING, types.int64, types.float32, types.float32
)

#: per precision: address -> two neighbouring numbers as float32
_LOADS = {
    "float16": instruction(
        "{ .reg .b16 a; .reg .b16 b; ld.global.v2.b16 {a, b}, [$2]; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
        f"=f,=f,l,{MEMORY}",
        PAIR,
        types.int64,
    ),
    "bfloat16": instruction(
        "{ .reg .b16 a; .reg .b16 b; .reg .b16 z; ld.global.v2.b16 {a, b}, [$2]; mov.b16 z, 0; "
        "mov.b32 $0, {z, a}; mov.b32 $1, {z, b}; }",
        f"=f,=f,l,{MEMORY}",
        PAIR,
        types.int64,
    ),
    "tf32": load_pair,
}

#: per precision: address, two float32, stored rounded as neighbours
_PAIR_STORES = {"tf32": store_pair} | {
    precision: instruction(text, f"l,f,f,{MEMORY}", NOTHING, types.int64, types.float32, types.float32)
    for precision, text in {
        "float16": "{ .reg .b32 w; cvt.rn.f16x2.f32 w, $2, $1; st.global.b32 [$0], w; }",
        "bfloat16": "{ .reg .b32 w; cvt.rn.bf16x2.f32 w, $2, $1; st.global.b32 [$0], w; }",
    }.items()
}


@device_function
def fast_sigmoid(x):
    """1 / (1 + exp(-x)) within a few ulp."""
    return reciprocal_approx(ONE + power_of_two_approx(-LOG2_E * x))


def make_store(precision: str):
    """The device function checked_store(address, value, status_at): store `value` rounded.

    A finite value beyond the float16 range sets STATUS_LARGE.
    """
    store, limit = _STORES[precision], np.float32(FLOAT16_MAX if precision == "float16" else np.inf)

    @device_function
    def checked_store(address, value, status_at):
        # NaN passes: `input_checks.py` detects values that are not finite.
        if value > limit or value < -limit:
            max_relaxed(status_at + 8 * STATUS_LARGE, int64(1))
        store(address, value)

    return checked_store


def densify_kernel(precision: str):
    """The kernel that writes event lists as dense rounded rows, and its signature.

    begins_at, counts_at, lists_at : an event list set (`batched_products.py`)
    row_of_at : (rows,) int64, the list of each row, or address 0 for the list of the same number
    out_at    : (rows, width), rounded
    """
    store, size = make_store(precision), BYTES[precision]

    def densify(begins_at, counts_at, lists_at, row_of_at, rows, width, out_at, status_at):
        threads = int64(min(cuda.blockDim.x, LANES))
        thread, rank = int64(cuda.threadIdx.x) % threads, int64(cuda.threadIdx.x) // threads
        row = source = int64(cuda.blockIdx.x) * (cuda.blockDim.x // threads) + rank
        if row >= rows:
            return
        if row_of_at != 0:
            source = global_int64(row_of_at)[row]
        begin = lists_at + 8 * global_int64(begins_at)[source]
        count = int64(global_int32(counts_at)[source])
        to = out_at + size * row * width
        at, words = thread, global_int64(to)
        while at < width * size // 8:
            words[at] = int64(0)
            at += threads
        cuda.syncwarp(FULL_WARP)
        at = thread
        while at < count:
            unit = int64(global_int32(begin + 8 * at)[0])
            store(to + size * unit, global_float32(begin + 8 * at + 4)[0], status_at)
            at += threads

    return densify, types.void(*[types.int64] * 8)


def round_rows_kernel(precision: str):
    """The kernel that rounds dense rows, and its signature.

    dense_at : (rows, pitch) float32; out_at : (rows, width) rounded, the first n columns copied, the others zero
    """
    store, size = make_store(precision), BYTES[precision]

    def round_rows(dense_at, pitch, n, width, out_at, status_at):
        row, at = int64(cuda.blockIdx.x), int64(cuda.threadIdx.x)
        dense, to = global_float32(dense_at + 4 * row * pitch), out_at + size * row * width
        while at < width:
            value = np.float32(0)
            if at < n:
                value = dense[at]
            store(to + size * at, value, status_at)
            at += cuda.blockDim.x

    return round_rows, types.void(*[types.int64] * 6)


@device_function
def cell_before_event(inside_u, inside_r, inside_g, rec_u, rec_r, rec_g, bias_u, bias_r, bias_g, bias_rec_g, carried):
    """Cell state before the event: `cells.egru_value`, with the approximate sigmoid and tanh."""
    u = fast_sigmoid((inside_u + rec_u) + bias_u)
    r = fast_sigmoid((inside_r + rec_r) + bias_r)
    g = fma(TWO, fast_sigmoid(TWO * fma(r, rec_g + bias_rec_g, inside_g + bias_g)), -ONE)
    return fma(u, carried, (ONE - u) * g)


@device_function
def load_neighbours(address, both, even):
    """Two neighbouring float32, or the first one twice unless `both`. `even`: the address is a multiple of 8."""
    # One place returns: `gated_blocks` says why.
    if even:
        pair = load_pair(address)
        a, b = pair[0], pair[1]
    else:
        numbers = global_float32(address)
        a = b = numbers[0]
        if both:
            b = numbers[1]
    return a, b


@device_function
def store_neighbours(address, a, b, both, even):
    """Store `a` and, if `both`, `b` as neighbouring float32. `even`: the address is a multiple of 8."""
    if even:
        store_pair(address, a, b)
    else:
        numbers = global_float32(address)
        numbers[0] = a
        if both:
            numbers[1] = b


def cells_kernel(precision: str):
    """The kernel that updates cells and events of one step from its two products, and its signature.

    drive_at, rec_at : (batch, 3 * padded) rounded, input and recurrent products, gates u, r, g one after the other
    vectors_at       : (VECTORS, padded) float32 parameters
    cells_at         : (batch, units) float32, updated in place
    y_at             : (batch, padded) rounded outputs, the operand of the next step's product
    sent_at          : (batch, pitch) float32 outputs
    after_at         : (batch, units) float32 cells after the step, or address 0
    sums_at          : (gridDim.y, sums_pitch) uint16, or address 0. Per pair of units four sums over the samples of a
                       thread (at most MAX_SUMMED), SUM_BITS bits each: events of both units, then events of value 1
    status_at        : the status vector; an event beyond the float16 range sets STATUS_LARGE
    """
    load, store, size = _LOADS[precision], _PAIR_STORES[precision], BYTES[precision]
    limit = np.float32(FLOAT16_MAX if precision == "float16" else np.inf)

    def cells(
        drive_at,
        rec_at,
        vectors_at,
        cells_at,
        y_at,
        sent_at,
        after_at,
        units,
        padded,
        pitch,
        batch,
        sums_at,
        sums_pitch,
        status_at,
    ):
        pair = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        unit = 2 * pair
        if unit >= units:
            return
        # The last unit of an odd number has no neighbour.
        both = unit + 1 < units
        even = ((cells_at | sent_at | after_at | (4 * units) | (4 * pitch)) & 7) == 0
        vectors, line = vectors_at + 4 * unit, 4 * padded
        bias_u0, bias_u1 = load_pair(vectors)
        bias_r0, bias_r1 = load_pair(vectors + line)
        bias_g0, bias_g1 = load_pair(vectors + 2 * line)
        bias_rec_g0, bias_rec_g1 = load_pair(vectors + 3 * line)
        threshold0, threshold1 = load_pair(vectors + 4 * line)
        sample, stride, large = int64(cuda.blockIdx.y), int64(cuda.gridDim.y), False
        at, gate = size * (sample * 3 * padded + unit), size * padded
        drive_at, rec_at = drive_at + at, rec_at + at
        cells_at += 4 * (sample * units + unit)
        after = after_at + 4 * (sample * units + unit)
        sent_at += 4 * (sample * pitch + unit)
        y_at += size * (sample * padded + unit)
        sums = int32(0)
        while sample < batch:
            in_u0, in_u1 = load(drive_at)
            rec_u0, rec_u1 = load(rec_at)
            in_r0, in_r1 = load(drive_at + gate)
            rec_r0, rec_r1 = load(rec_at + gate)
            in_g0, in_g1 = load(drive_at + 2 * gate)
            rec_g0, rec_g1 = load(rec_at + 2 * gate)
            c0, c1 = load_neighbours(cells_at, both, even)
            v0 = cell_before_event(
                in_u0, in_r0, in_g0, rec_u0, rec_r0, rec_g0, bias_u0, bias_r0, bias_g0, bias_rec_g0, c0
            )
            v1 = cell_before_event(
                in_u1, in_r1, in_g1, rec_u1, rec_r1, rec_g1, bias_u1, bias_r1, bias_g1, bias_rec_g1, c1
            )
            y0 = y1 = np.float32(0)
            if v0 > threshold0:
                y0 = v0
                v0 = v0 - threshold0
            if both and v1 > threshold1:
                y1 = v1
                v1 = v1 - threshold1
            large = large or abs(y0) > limit or abs(y1) > limit
            store_neighbours(cells_at, v0, v1, both, even)
            store_neighbours(sent_at, y0, y1, both, even)
            if after_at != 0:
                store_neighbours(after, v0, v1, both, even)
            store(y_at, y0, y1)
            if sums_at != 0:
                sent, binary = int32(y0 != 0) | int32(y1 != 0) << SUM_BITS, int32(y0 == 1) | int32(y1 == 1) << SUM_BITS
                sums = int32(sums + (sent | binary << 2 * SUM_BITS))
            sample += stride
            drive_at, rec_at = drive_at + 3 * stride * gate, rec_at + 3 * stride * gate
            cells_at, after = cells_at + 4 * stride * units, after + 4 * stride * units
            sent_at, y_at = sent_at + 4 * stride * pitch, y_at + stride * gate
        if sums_at != 0:
            global_uint16(sums_at)[int64(cuda.blockIdx.y) * sums_pitch + pair] = sums
        if large:
            max_relaxed(status_at + 8 * STATUS_LARGE, int64(1))

    return cells, types.void(*[types.int64] * 14)
