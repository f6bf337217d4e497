"""What products of strips with gated blocks share: the records of a strip and of inputs, and which rows it needs.

The docstring of `gated_blocks.py` has the shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.ptx import load_shared_float4, shared_float32, shared_int32, shared_int64
from eventrnn.cuda.kernels.strip_product import FULL_WARP
from eventrnn.cuda.tables import LANES

# The bits of the second of two bfloat16.
UPPER_HALF = np.int32(-(1 << 16))


class StripRows(NamedTuple):
    """One strip and the blocks that its columns read."""

    #: int64, address of the values of all strips
    values_at: Any
    #: array of int64, offsets of the rows of the strip's block rows
    offsets: Any
    #: int32, columns of the strip
    width: Any
    #: int32, rows that are copied at a time
    stage_rows: Any
    #: int32, rows of all block rows, with padding
    n_rows: Any
    #: int32, block rows
    block_rows: Any
    #: int32, rows of a block, with padding
    rows_of_block: Any
    #: int32, block columns
    block_columns: Any
    #: int32, block columns of the first and of the last column of the strip, and of the lane's column
    first_column: Any
    last_column: Any
    block_column: Any
    #: boolean, whether the lane has a column
    mine: Any
    #: int32, the first block rows, which are resident, and their int64 address in shared memory
    resident: Any
    resident_at: Any


class OwnStrips(NamedTuple):
    """The strips of the recurrent matrix that a block of threads owns."""

    #: int64, address of the values of all strips
    values_at: Any
    #: int64, address of the offsets of the own strips in shared memory
    offsets_at: Any
    #: int32: columns of a strip, rows that are copied at a time, rows of all block rows, block rows, rows of a block,
    #: and block columns
    width: Any
    stage_rows: Any
    n_rows: Any
    block_rows: Any
    rows_of_block: Any
    block_columns: Any
    #: array of int32, block columns of the columns of all own strips, LANES each
    columns: Any
    #: int32, the first block rows, which are resident, their int64 address, and int64 bytes of a block row
    resident: Any
    resident_at: Any
    block_bytes: Any


class Received(NamedTuple):
    """Rows of inputs in shared memory, with what says which blocks they need; the docstring above has the shapes."""

    #: int32, number of rows
    samples: Any
    #: int64, addresses of `inputs`, `active` and `gates`
    inputs_at: Any
    active_at: Any
    gates_at: Any
    #: int32, numbers from one row to the next, of each
    input_pitch: Any
    active_pitch: Any
    gates_pitch: Any


@device_function
def strip_of_item(strips, item, count, lane):
    """A strip, of which `count` lanes have a column."""
    own = int32(item * LANES)
    return StripRows(
        strips.values_at,
        shared_int64(strips.offsets_at + int64(8) * (item * strips.block_rows)),
        strips.width,
        strips.stage_rows,
        strips.n_rows,
        strips.block_rows,
        strips.rows_of_block,
        strips.block_columns,
        strips.columns[own],
        strips.columns[int32(own + count - 1)],
        strips.columns[int32(own + lane)],
        lane < count,
        strips.resident,
        strips.resident_at + strips.block_bytes * int32(item * strips.resident),
    )


@device_function
def gate_of(strip, received, sample, row):
    """The gate of the lane's block in a block row."""
    gate = np.float32(0)
    if strip.mine:
        at = row * strip.block_columns + strip.block_column
        gate = shared_float32(received.gates_at)[int32(sample * received.gates_pitch + at)]
    return gate


@device_function
def needed_rows(strip, received, first, end, lane):
    """Of the 32 block rows from `first` on that lie before `end`, a mask of those that the warp has to multiply.

    Each lane looks at one.
    """
    row, needed = int32(first + lane), False
    active, gates = shared_int32(received.active_at), shared_float32(received.gates_at)
    if row < end and strip.offsets[row] >= 0:
        sample = int32(0)
        while sample < received.samples:
            if active[int32(sample * received.active_pitch + row)] != 0:
                at = int32(sample * received.gates_pitch + row * strip.block_columns)
                column = strip.first_column
                while column <= strip.last_column:
                    if gates[int32(at + column)] != 0:
                        needed = True
                    column = int32(column + 1)
            sample = int32(sample + 1)
    return int32(cuda.ballot_sync(FULL_WARP, needed))


@device_function
def next_row(strip, received, first, end, mask, lane):
    """The next block row to multiply, of those in `mask` from block row `first` on and of later ones before `end`.

    Returns it, or `end` if there is none, and the new `first` and `mask`.
    """
    while mask == 0 and first + LANES < end:
        first = int32(first + LANES)
        mask = needed_rows(strip, received, first, end, lane)
    row = int32(end)
    if mask != 0:
        row = int32(first + cuda.ffs(mask) - 1)
        mask = int32(mask & int32(mask - 1))
    return row, first, mask


@device_function
def rows_in(strip, row):
    """Rows of a block row, with padding; the last one may have fewer."""
    return int32(min(strip.rows_of_block, strip.n_rows - row * strip.rows_of_block))


@device_function
def load8(at, step):
    """Two times four neighbouring float32 of shared memory, from `at` and from `at + step` on, multiples of 16."""
    a, b = load_shared_float4(at), load_shared_float4(at + step)
    return a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]


@device_function
def lower_half(pair):
    """The first of two neighbouring bfloat16 that were loaded as a float32."""
    return libdevice.int_as_float(int32(libdevice.float_as_int(pair) << int32(16)))


@device_function
def upper_half(pair):
    """The second of two neighbouring bfloat16 that were loaded as a float32."""
    return libdevice.int_as_float(int32(libdevice.float_as_int(pair) & UPPER_HALF))


@device_function
def sum_of_sample(acc, sums, samples, sample, lane):
    """The result of `add_strip` for one row of inputs."""
    if samples > 1:
        acc = sums[int32(sample * LANES + lane)]
    return acc


@device_function
def add8(acc, weights, inputs):
    """The sum after eight terms."""
    acc = cuda.fma(weights[0], inputs[0], acc)
    acc = cuda.fma(weights[1], inputs[1], acc)
    acc = cuda.fma(weights[2], inputs[2], acc)
    acc = cuda.fma(weights[3], inputs[3], acc)
    acc = cuda.fma(weights[4], inputs[4], acc)
    acc = cuda.fma(weights[5], inputs[5], acc)
    acc = cuda.fma(weights[6], inputs[6], acc)
    return cuda.fma(weights[7], inputs[7], acc)


def make_weights8(narrow: bool):
    """The device function weights8(at, step) -> eight weights of a column, float32 or bfloat16, in shared memory.

    at, step : address of the first ones, and from one group of rows to the next (`gated_matrix.RowStrips`)
    """
    if not narrow:
        return load8

    @device_function
    def weights8(at, step):
        a, b, c, d = load_shared_float4(at)
        return (
            lower_half(a),
            upper_half(a),
            lower_half(b),
            upper_half(b),
            lower_half(c),
            upper_half(c),
            lower_half(d),
            upper_half(d),
        )

    return weights8
