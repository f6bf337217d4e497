"""Inputs of the first layer as operands, and the gradient of the embedding. All arrays are in global memory.

Rows are the R = T * B pairs of step and sample. A mask of dropout is read at step * mask_steps + sample * mask_samples
+ column, so that samples or steps can share it.
"""

from __future__ import annotations

from numba import int64, types

from eventrnn.cuda.device import cuda
from eventrnn.cuda.kernels.ptx import global_float32, global_int64, global_uint8
from eventrnn.cuda.training.kernels.threads import BYTES, ONE32, STORES, ZERO32, first_element, float_of, stride


def input_kernel(precision: str):
    """The kernel that writes (R, padded) operands, and its signature. A thread owns every n-th pair of row and column.

    rows_at    : (R, pitch) float32 numbers, or, with symbols, the embedding (V, pitch)
    symbols_at : (R,) int64, or address 0
    words_at   : (V,) bytes of the dropout of words, or 0
    """
    store, size = STORES[precision], BYTES[precision]

    def inputs(
        rows_at,
        pitch,
        symbols_at,
        words_at,
        words_bits,
        mask_at,
        mask_steps,
        mask_samples,
        scale_bits,
        columns,
        batch,
        count,
        out_at,
        padded,
    ):
        at, step, numbers = first_element(), stride(), global_float32(rows_at)
        while at < count * columns:
            row = at // columns
            column = at - row * columns
            source = global_int64(symbols_at)[row] if symbols_at != 0 else row
            value = numbers[source * pitch + column]
            if words_at != 0:
                value *= float_of(words_bits) if global_uint8(words_at)[source] else ZERO32
            if mask_at != 0:
                time = row // batch
                place = time * mask_steps + (row - time * batch) * mask_samples + column
                value *= float_of(scale_bits) if global_uint8(mask_at)[place] else ZERO32
            store(out_at + size * (row * padded + column), value)
            at += step

    return inputs, types.void(*[types.int64] * 14)


def embedding_gradient_kernel():
    """The kernel that adds the gradients of the inputs to the rows of the embedding, and its signature.

    A block owns a symbol of the window, a thread every n-th column; rows are added up in ascending order. Arguments:
    see `input_kernel`.

    d_rows_at : (R, pitch) float32, gradients of the operands
    order_at  : (R,) int64, the rows in the order of their symbols; rows of one symbol ascend
    groups_at : (R + 1,) int64, where the rows of each symbol begin in that order; R for blocks without a symbol
    out_at    : (V, pitch) float32, added to
    """

    def embedding_gradient(
        d_rows_at,
        pitch,
        symbols_at,
        words_at,
        words_bits,
        mask_at,
        mask_steps,
        mask_samples,
        scale_bits,
        columns,
        batch,
        order_at,
        groups_at,
        out_at,
    ):
        groups, order, d_rows = global_int64(groups_at), global_int64(order_at), global_float32(d_rows_at)
        begin, end = groups[int64(cuda.blockIdx.x)], groups[int64(cuda.blockIdx.x) + 1]
        if begin == end:
            return
        symbol, word = global_int64(symbols_at)[order[begin]], ONE32
        if words_at != 0:
            word = float_of(words_bits) if global_uint8(words_at)[symbol] else ZERO32
        column, out = int64(cuda.threadIdx.x), global_float32(out_at)
        while column < columns:
            total = ZERO32
            for k in range(begin, end):
                row = order[k]
                value = d_rows[row * pitch + column]
                if mask_at != 0:
                    time = row // batch
                    place = time * mask_steps + (row - time * batch) * mask_samples + column
                    value *= float_of(scale_bits) if global_uint8(mask_at)[place] else ZERO32
                total += value * word
            out[symbol * pitch + column] += total
            column += cuda.blockDim.x

    return embedding_gradient, types.void(*[types.int64] * 14)


def outputs_kernel():
    """The kernel of a network's output as float32, and its signature. A thread owns every n-th element.

    With `logits`, the products (R, padded) at `source_at` plus the bias at `bias_at`; otherwise what the last layer
    sends (R, padded) where it exceeds the thresholds at `bias_at`, dropped out by the mask (see `input_kernel`).
    out_at : (R, columns)
    """

    def outputs(
        logits, source_at, padded, bias_at, mask_at, mask_steps, mask_samples, scale_bits, columns, batch, count, out_at
    ):
        source, bias, out = global_float32(source_at), global_float32(bias_at), global_float32(out_at)
        at, step = first_element(), stride()
        while at < count * columns:
            row = at // columns
            column = at - row * columns
            value = source[row * padded + column]
            if logits:
                value += bias[column]
            else:
                value = value if value > bias[column] else ZERO32
                if mask_at != 0:
                    time = row // batch
                    place = time * mask_steps + (row - time * batch) * mask_samples + column
                    value *= float_of(scale_bits) if global_uint8(mask_at)[place] else ZERO32
            out[at] = value
            at += step

    return outputs, types.void(*[types.int64] * 12)


def spread_kernel(precision: str):
    """The kernel that copies rows (R, columns) float32 into padded rows, and its signature.

    out_at : operands, `pitch` of them from one row to the next; the columns up to `padded` are zero. A thread owns
             every n-th element.
    """
    store, size = STORES[precision], BYTES[precision]

    def spread(source_at, columns, count, out_at, pitch, padded):
        source, at, step = global_float32(source_at), first_element(), stride()
        while at < count * padded:
            row = at // padded
            column = at - row * padded
            value = ZERO32
            if column < columns:
                value = source[row * columns + column]
            store(out_at + size * (row * pitch + column), value)
            at += step

    return spread, types.void(*[types.int64] * 6)
