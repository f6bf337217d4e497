"""Kernels of the layers that go through tensor cores: rounding what they take, and the cells of a step.

Sigmoid and tanh come from the GPU's own powers of two and reciprocals, some units in the last place off float32's:
less than what rounding the products' factors has cost before.
"""

from __future__ import annotations

import numpy as np
from numba import int64, types

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.ptx import (
    MEMORY,
    NOTHING,
    _instruction,
    add_relaxed,
    fma,
    global_float32,
    global_int32,
    global_int64,
    max_relaxed,
    store_float,
)
from eventrnn.cuda.tables import REPORT_LARGE

#: of a number
BYTES = {"float16": 2, "bfloat16": 2, "tf32": 4}
#: that float16 holds
LARGEST = 65504.0
LOG2_E = np.float32(1.4426950408889634)
ONE, TWO = np.float32(1), np.float32(2)

_power = _instruction("ex2.approx.ftz.f32 $0, $1;", "=f,f", types.float32, types.float32)
_reciprocal = _instruction("rcp.approx.ftz.f32 $0, $1;", "=f,f", types.float32, types.float32)
_STORES = {
    "float16": _instruction(
        "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; st.global.b16 [$0], h; }",
        f"l,f,{MEMORY}", NOTHING, types.int64, types.float32,
    ),
    "bfloat16": _instruction(
        "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; st.global.b16 [$0], h; }",
        f"l,f,{MEMORY}", NOTHING, types.int64, types.float32,
    ),
    "tf32": store_float,
}  # fmt: skip


_LOADS = {
    "float16": _instruction(
        "{ .reg .b16 h; ld.global.b16 h, [$1]; cvt.f32.f16 $0, h; }", f"=f,l,{MEMORY}", types.float32, types.int64
    ),
    "bfloat16": _instruction(
        "{ .reg .b16 h; .reg .b16 z; mov.b16 z, 0; ld.global.b16 h, [$1]; mov.b32 $0, {z, h}; }",
        f"=f,l,{MEMORY}", types.float32, types.int64,
    ),
    "tf32": _instruction("ld.global.f32 $0, [$1];", f"=f,l,{MEMORY}", types.float32, types.int64),
}  # fmt: skip


@device_function
def quick_sigmoid(x):
    """1 / (1 + exp(-x)) within a few units in the last place."""
    return _reciprocal(ONE + _power(-LOG2_E * x))


def storer(precision: str):
    """store(address, value, report): rounded; too large for float16 is reported."""
    store, limit = _STORES[precision], np.float32(LARGEST if precision == "float16" else np.inf)

    @device_function
    def rounded(address, value, report_at):
        # What is not finite the run reports by itself.
        if value > limit or value < -limit:
            max_relaxed(report_at + 8 * REPORT_LARGE, int64(1))
        store(address, value)

    return rounded


def spread_kernel(precision: str):
    """Dense rounded rows from lists of events, a block a row; and its signature."""
    store, size = storer(precision), BYTES[precision]

    def spread(firsts_at, counts_at, lists_at, row_of_at, width, out_at, report_at):
        thread, threads = int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
        row = source = int64(cuda.blockIdx.x)
        if row_of_at != 0:
            source = global_int64(row_of_at)[row]
        to = out_at + size * row * width
        at, words = thread, global_int64(to)
        while at < width * size // 8:
            words[at] = int64(0)
            at += threads
        cuda.syncthreads()
        begin = lists_at + 8 * global_int64(firsts_at)[source]
        count = int64(global_int32(counts_at)[source])
        at = thread
        while at < count:
            unit = int64(global_int32(begin + 8 * at)[0])
            store(to + size * unit, global_float32(begin + 8 * at + 4)[0], report_at)
            at += threads

    return spread, types.void(*[types.int64] * 7)


def narrow_kernel(precision: str):
    """Rounded rows of `width`, zero from `n` on, from float32 rows `pitch` apart, a block a row; and its signature."""
    store, size = storer(precision), BYTES[precision]

    def narrow(dense_at, pitch, n, width, out_at, report_at):
        row, at = int64(cuda.blockIdx.x), int64(cuda.threadIdx.x)
        dense, to = global_float32(dense_at + 4 * row * pitch), out_at + size * row * width
        while at < width:
            value = np.float32(0)
            if at < n:
                value = dense[at]
            store(to + size * at, value, report_at)
            at += cuda.blockDim.x

    return narrow, types.void(*[types.int64] * 6)


def cells_kernel(precision: str):
    """Cells and events of one step from its two products, a thread a unit, some samples each; and its signature.

    drive, rec : (batch, 3 padded), rounded as well, gates apart
    record     : (batch, pitch); after : (batch, units), or address 0
    counts     : of graded, then of binary events, (units,) int64 each, added to; or address 0
    """
    store, load, size = storer(precision), _LOADS[precision], BYTES[precision]

    def cells(
        drive_at, rec_at, bias_in_at, bias_rec_at, threshold_at, cells_at, y_at, record_at, after_at,
        units, padded, pitch, batch, counts_at, report_at,
    ):  # fmt: skip
        unit = int64(cuda.blockIdx.x) * cuda.blockDim.x + cuda.threadIdx.x
        if unit >= units:
            return
        bias_in, bias_rec = global_float32(bias_in_at), global_float32(bias_rec_at)
        bias_u = bias_in[unit] + bias_rec[unit]
        bias_r = bias_in[units + unit] + bias_rec[units + unit]
        bias_g, bias_rec_g = bias_in[2 * units + unit], bias_rec[2 * units + unit]
        threshold = global_float32(threshold_at)[unit]
        carried, record, after = global_float32(cells_at), global_float32(record_at), global_float32(after_at)
        graded = binary = int64(0)
        sample = int64(cuda.blockIdx.y)
        while sample < batch:
            at, gate = size * (sample * 3 * padded + unit), size * padded
            drive_u, drive_r, drive_g = load(drive_at + at), load(drive_at + at + gate), load(drive_at + at + 2 * gate)
            rec_u, rec_r, rec_g = load(rec_at + at), load(rec_at + at + gate), load(rec_at + at + 2 * gate)
            u = quick_sigmoid((drive_u + rec_u) + bias_u)
            r = quick_sigmoid((drive_r + rec_r) + bias_r)
            inside = fma(r, rec_g + bias_rec_g, drive_g + bias_g)
            g = fma(TWO, quick_sigmoid(TWO * inside), -ONE)
            own = sample * units + unit
            v = fma(u, carried[own], (ONE - u) * g)
            value = np.float32(0)
            if v > threshold:
                value = v
                v = v - threshold
                if value == 1:
                    binary += 1
                elif value != 0:
                    graded += 1
            carried[own] = v
            record[sample * pitch + unit] = value
            if after_at != 0:
                after[own] = v
            store(y_at + size * (sample * padded + unit), value, report_at)
            sample += cuda.gridDim.y
        if counts_at != 0:
            if graded != 0:
                add_relaxed(counts_at + 8 * unit, graded)
            if binary != 0:
                add_relaxed(counts_at + 8 * (units + unit), binary)

    return cells, types.void(*[types.int64] * 15)
