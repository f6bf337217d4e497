"""Products of many rows of inputs with dense weights, in tiles of registers: every sum in the order of the contract.

spread_rows  : writes event lists as dense inputs, and the largest magnitude of every row. A block owns a row.
tile_product : out = start + sum over inputs of weight * (gate * input), in ascending inputs with one FMA per term
               (`reference.propagate`, and `reference.propagate_chosen` with gates). A block owns TILE_SIDE rows and as
               many columns, and a thread ROWS_OF_THREAD x 4 sums. Weights and scaled inputs of TILE_INPUTS inputs lie
               in shared memory, while those of the next ones are fetched to registers. A block that an input did not
               choose has the gate 0, so that its terms are zeros.

=========== ======== ===========================================================================================
array       memory   shape, dtype, contents
=========== ======== ===========================================================================================
inputs      global   (inputs, input pitch) float32, one column per row of inputs, silent ones as zeros
weights     global   (inputs, weight pitch) float32, or uint16 bits of bfloat16
gates       global   (batch + rows, blocks) float32: gates that the samples hold, then those of the rows that chose
left        global   (batch,) int32, the first steps with the gates that a sample holds
tiles       shared   (2, weights and inputs, TILE_INPUTS, TILE_SIDE) float32, in turn
=========== ======== ===========================================================================================

Inputs and weights have zeros up to a multiple of TILE_INPUTS inputs and of TILE_SIDE rows and columns.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.gated_choice import MAGNITUDE
from eventrnn.cuda.kernels.ptx import (
    global_float32,
    global_int32,
    global_int64,
    global_uint16,
    load_shared_float4,
    max_of_warp,
    shared_base,
    shared_float32,
)
from eventrnn.cuda.kernels.strip_product import high_word, low_word
from eventrnn.cuda.tables import TILE_INPUTS, TILE_SIDE

# Rows of a thread of a tile; it has four columns.
ROWS_OF_THREAD = 8

# Threads of a block of `tile_product`. Two of them fetch the inputs of a row, or the weights of a column.
TILE_THREADS = TILE_SIDE // ROWS_OF_THREAD * TILE_SIDE // 4

# Bytes of shared memory of `tile_product`, half of them and half of that.
TILE_BYTES = 2 * 2 * 4 * TILE_INPUTS * TILE_SIDE

assert TILE_THREADS == 2 * TILE_SIDE and TILE_INPUTS == 16, "a thread fetches eight weights and eight inputs"


@device_function
def slot_of(row, batch, period, left):
    """Where the gates of a row (step * batch + sample) lie.

    left : the first steps of the sample that have the gates that it holds
    """
    slot = batch + row
    if period > 1:
        step = row // batch
        slot = batch + row - ((step - left) % period) * batch
        if step < left:
            slot = row - step * batch
    return slot


def spread_rows_kernel():
    """The kernel that writes rows of event lists to `inputs`, which are zeros, and its signature.

    begins_at, counts_at, lists_at : the event list set (`batched_products.py`)
    row_of_at                      : (rows,) int64, the list of each row, or address 0 for the list of the same number
    first                          : the first row
    maxima_at                      : (rows, warps) int32, bits of the largest magnitude that a warp has seen
    """

    def spread_rows(begins_at, counts_at, lists_at, row_of_at, first, inputs_at, pitch, maxima_at):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        row = int64(cuda.blockIdx.x)
        source = first + row
        if row_of_at != 0:
            source = global_int64(row_of_at)[source]
        entries = global_int64(lists_at + 8 * global_int64(begins_at)[source])
        count, inputs = global_int32(counts_at)[source], global_float32(inputs_at + 4 * row)
        best, k = int32(0), thread
        while k < count:
            word = high_word(entries[k])
            inputs[int64(low_word(entries[k])) * pitch] = libdevice.int_as_float(word)
            best, k = int32(max(best, word & MAGNITUDE)), int32(k + threads)
        best = max_of_warp(best)
        if thread & int32(31) == 0:
            global_int32(maxima_at)[row * (threads >> int32(5)) + (thread >> int32(5))] = best

    return spread_rows, types.void(*[types.int64] * 8)


@device_function
def add4(a, b, c, d, weights, x):
    """Four sums after a term of each, of four columns and one row."""
    return (
        cuda.fma(weights[0], x, a),
        cuda.fma(weights[1], x, b),
        cuda.fma(weights[2], x, c),
        cuda.fma(weights[3], x, d),
    )


@device_function
def fetch8(numbers, at, step):
    """Every second one of TILE_INPUTS numbers of a column of a matrix with rows of step // 2 numbers."""
    return (
        numbers[at],
        numbers[at + step],
        numbers[at + 2 * step],
        numbers[at + 3 * step],
        numbers[at + 4 * step],
        numbers[at + 5 * step],
        numbers[at + 6 * step],
        numbers[at + 7 * step],
    )


@device_function
def keep8(tile, at, a, b, c, d, e, f, g, h):
    """Write the result of `fetch8` to a tile."""
    tile[at], tile[int32(at + 2 * TILE_SIDE)] = a, b
    tile[int32(at + 4 * TILE_SIDE)], tile[int32(at + 6 * TILE_SIDE)] = c, d
    tile[int32(at + 8 * TILE_SIDE)], tile[int32(at + 10 * TILE_SIDE)] = e, f
    tile[int32(at + 12 * TILE_SIDE)], tile[int32(at + 14 * TILE_SIDE)] = g, h


@device_function
def store4(out, at, columns, wanted, a, b, c, d):
    """Write the sums of a row, of which the first `columns` exist, unless the row does not."""
    if wanted and columns > 0:
        out[at] = a
    if wanted and columns > 1:
        out[at + 1] = b
    if wanted and columns > 2:
        out[at + 2] = c
    if wanted and columns > 3:
        out[at + 3] = d


def tile_product_kernel(narrow: bool):
    """The kernel of `tile_product`, and its signature. blockIdx.x is a tile of columns, and blockIdx.y a tile of rows
    of one part after the other.

    weights_at, weight_pitch, inputs_at, input_pitch : see the head
    gates_at     : see the head, for one part; 0 where all gates are 1. Then the following seven are not used
    blocks, grid_columns : blocks of the matrix, and block columns
    r, c         : rows and columns of a block, multiples of TILE_INPUTS and of TILE_SIDE
    left_at, batch, period : steps that share a choice
    n, part      : inputs, and those of a part, which has a sum of its own; a multiple of TILE_INPUTS
    bias_at      : (columns,) float32, from which the first part starts; the others start from 0
    out_at       : (parts, rows, columns) float32
    """

    if narrow:

        @device_function
        def weights8(at, index, step):
            a, b, c, d, e, f, g, h = fetch8(global_uint16(at), index, step)
            return widened(a), widened(b), widened(c), widened(d), widened(e), widened(f), widened(g), widened(h)

        @device_function
        def widened(half):
            return libdevice.int_as_float(int32(int32(half) << int32(16)))
    else:

        @device_function
        def weights8(at, index, step):
            return fetch8(global_float32(at), index, step)

    def tile_product(
        weights_at,
        weight_pitch,
        inputs_at,
        input_pitch,
        gates_at,
        blocks,
        grid_columns,
        r,
        c,
        left_at,
        batch,
        period,
        n,
        part,
        bias_at,
        rows,
        columns,
        out_at,
    ):
        thread, row_tiles = int32(cuda.threadIdx.x), (rows + TILE_SIDE - 1) // TILE_SIDE
        number = int64(cuda.blockIdx.y) // row_tiles
        first_row = (int64(cuda.blockIdx.y) - number * row_tiles) * TILE_SIDE
        first_column, first = int64(cuda.blockIdx.x) * TILE_SIDE, number * part
        turns, base = int32(min(part, n - first) + (TILE_INPUTS - 1)) // int32(TILE_INPUTS), shared_base()
        # What the thread fetches: every second input of a row, and of a column of weights.
        lane, half = thread & int32(TILE_SIDE - 1), thread >> int32(6)
        kept = int32(half * TILE_SIDE + lane)
        inputs, weight_step, input_step = global_float32(inputs_at), 2 * weight_pitch, 2 * input_pitch
        weight_place = (first + half) * weight_pitch + first_column + lane
        input_place = (first + half) * input_pitch + first_row + lane
        gates, gate_place, gate, next_gate = global_float32(gates_at), int64(0), np.float32(1), np.float32(1)
        # Turns until the next block row.
        turns_of_block = int32(r // TILE_INPUTS)
        until = turns_of_block
        if gates_at != 0:
            row, left = min(first_row + lane, rows - 1), int64(0)
            if period > 1:
                left = int64(global_int32(left_at)[row % batch])
            gate_place = slot_of(row, batch, period, left) * blocks + first_column // c
            gate = gates[gate_place]
        # What the thread adds: four columns from `column` on, and eight rows.
        column, own_row = int32(4 * (thread & int32(15))), int32(ROWS_OF_THREAD * (thread >> int32(4)))
        s0 = s1 = s2 = s3 = np.float32(0)
        own_columns = int32(min(columns - first_column - column, int64(4)))
        if number == 0:
            bias = global_float32(bias_at + 4 * (first_column + column))
            if own_columns > 0:
                s0 = bias[0]
            if own_columns > 1:
                s1 = bias[1]
            if own_columns > 2:
                s2 = bias[2]
            if own_columns > 3:
                s3 = bias[3]
        a0, a1, a2, a3 = s0, s1, s2, s3
        b0, b1, b2, b3 = s0, s1, s2, s3
        c0, c1, c2, c3 = s0, s1, s2, s3
        d0, d1, d2, d3 = s0, s1, s2, s3
        e0, e1, e2, e3 = s0, s1, s2, s3
        f0, f1, f2, f3 = s0, s1, s2, s3
        g0, g1, g2, g3 = s0, s1, s2, s3
        h0, h1, h2, h3 = s0, s1, s2, s3
        w0, w1, w2, w3, w4, w5, w6, w7 = weights8(weights_at, weight_place, weight_step)
        x0, x1, x2, x3, x4, x5, x6, x7 = fetch8(inputs, input_place, input_step)
        turn, tile_at = int32(0), base
        while turn < turns:
            keep8(shared_float32(tile_at), kept, w0, w1, w2, w3, w4, w5, w6, w7)
            keep8(
                *(shared_float32(tile_at + int64(4 * TILE_INPUTS * TILE_SIDE)), kept, gate * x0, gate * x1, gate * x2),
                *(gate * x3, gate * x4, gate * x5, gate * x6, gate * x7),
            )
            # The other threads have written their numbers, and read the tile before.
            cuda.syncthreads()
            turn, until = int32(turn + 1), int32(until - 1)
            if turn < turns:
                weight_place, input_place = weight_place + 8 * weight_step, input_place + 8 * input_step
                w0, w1, w2, w3, w4, w5, w6, w7 = weights8(weights_at, weight_place, weight_step)
                x0, x1, x2, x3, x4, x5, x6, x7 = fetch8(inputs, input_place, input_step)
                if gates_at != 0 and until == 0:
                    gate_place, until = gate_place + grid_columns, turns_of_block
                    next_gate = gates[gate_place]
                elif gates_at != 0:
                    next_gate = gate
            k, w_at = int32(0), tile_at + int64(4) * column
            x_at = tile_at + int64(4 * TILE_INPUTS * TILE_SIDE) + int64(4) * own_row
            while k < TILE_INPUTS:
                weights, p, q = load_shared_float4(w_at), load_shared_float4(x_at), load_shared_float4(x_at + int64(16))
                a0, a1, a2, a3 = add4(a0, a1, a2, a3, weights, p[0])
                b0, b1, b2, b3 = add4(b0, b1, b2, b3, weights, p[1])
                c0, c1, c2, c3 = add4(c0, c1, c2, c3, weights, p[2])
                d0, d1, d2, d3 = add4(d0, d1, d2, d3, weights, p[3])
                e0, e1, e2, e3 = add4(e0, e1, e2, e3, weights, q[0])
                f0, f1, f2, f3 = add4(f0, f1, f2, f3, weights, q[1])
                g0, g1, g2, g3 = add4(g0, g1, g2, g3, weights, q[2])
                h0, h1, h2, h3 = add4(h0, h1, h2, h3, weights, q[3])
                k, w_at, x_at = int32(k + 1), w_at + int64(4 * TILE_SIDE), x_at + int64(4 * TILE_SIDE)
            gate, tile_at = next_gate, base + ((tile_at - base) ^ int64(TILE_BYTES // 2))
        row, out = first_row + own_row, global_float32(out_at)
        at = (number * rows + row) * columns + first_column + column
        store4(out, at, own_columns, row < rows, a0, a1, a2, a3)
        store4(out, at + columns, own_columns, row + 1 < rows, b0, b1, b2, b3)
        store4(out, at + 2 * columns, own_columns, row + 2 < rows, c0, c1, c2, c3)
        store4(out, at + 3 * columns, own_columns, row + 3 < rows, d0, d1, d2, d3)
        store4(out, at + 4 * columns, own_columns, row + 4 < rows, e0, e1, e2, e3)
        store4(out, at + 5 * columns, own_columns, row + 5 < rows, f0, f1, f2, f3)
        store4(out, at + 6 * columns, own_columns, row + 6 < rows, g0, g1, g2, g3)
        store4(out, at + 7 * columns, own_columns, row + 7 < rows, h0, h1, h2, h3)

    return tile_product, types.void(*[types.int64] * 18)
