"""Softmax cross-entropy in place: the logits become their own gradient. All arrays are in global memory.

A block owns one row. Sums are float64. The value is that of `training.losses.cross_entropy`.
"""

from __future__ import annotations

import numpy as np
from numba import float64, int64, types

from eventrnn.cuda.device import cuda
from eventrnn.cuda.kernels.ptx import exp_float32, global_float32, global_float64, global_int32, global_int64, libdevice
from eventrnn.cuda.training.kernels.threads import (
    BYTES,
    MOST_THREADS,
    STORES,
    ZERO32,
    float_of,
    largest_of_block,
    sum_of_block,
)

# As `LEAST_REST` of the kernels of the CPU.
LEAST_REST = 1e-9


def cross_entropy_kernel(precision: str):
    """The kernel, and its signature.

    logits_at        : (R, pitch) float32 products without their bias, `columns` of them per row. If `scale_bits` are
                       not 0, the row is overwritten with operands: the gradient times the scale, and zeros up to
                       `padded`
    bias_at          : (columns,) float32
    targets_at       : (R,) int64
    losses_at        : (R,) float64, -ln softmax(logits)[target], or the loss with soft targets
    kept             : soft targets per row, 0 for none
    weight_bits      : share of the soft targets in the loss
    symbols_at       : (R, kept) int32, the symbols of the soft targets, all different within a row
    probabilities_at : (R, kept) float32, their probabilities, overwritten with their gradients
    """
    store, size = STORES[precision], BYTES[precision]

    def cross_entropy(
        logits_at,
        pitch,
        bias_at,
        targets_at,
        columns,
        padded,
        scale_bits,
        losses_at,
        kept,
        weight_bits,
        symbols_at,
        probabilities_at,
    ):
        scratch = cuda.shared.array(MOST_THREADS, float64)
        row, thread, threads = int64(cuda.blockIdx.x), int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
        row_at = logits_at + 4 * row * pitch
        logits, bias = global_float32(row_at), global_float32(bias_at)
        # One pass: what a thread has added up is scaled down when it meets a larger logit.
        own_largest, norm = np.float32(-np.inf), float64(0)
        i = thread
        while i < columns:
            logit = logits[i] + bias[i]
            if logit > own_largest:
                norm *= float64(exp_float32(own_largest - logit))
                own_largest = logit
            norm += float64(exp_float32(logit - own_largest))
            i += threads
        largest32 = np.float32(largest_of_block(float64(own_largest), scratch))
        norm = sum_of_block(norm * float64(exp_float32(own_largest - largest32)), scratch)
        target = global_int64(targets_at)[row]
        weight, rest, others, expected = float64(float_of(weight_bits)), float64(0), float64(1), float64(0)
        symbols, probabilities = global_int32(symbols_at), global_float32(probabilities_at)
        if kept > 0:
            # Again, because the scaled sum above is a little off: `others` is the small difference of two sums.
            every, named, mass = float64(0), float64(0), float64(0)
            i = thread
            while i < columns:
                every += float64(exp_float32((logits[i] + bias[i]) - largest32))
                i += threads
            j = row * kept + thread
            while j < (row + 1) * kept:
                i, share = int64(symbols[j]), float64(probabilities[j])
                logit = logits[i] + bias[i]
                named += float64(exp_float32(logit - largest32))
                expected += share * (float64(logit) - float64(largest32))
                mass += share
                j += threads
            norm, named = sum_of_block(every, scratch), sum_of_block(named, scratch)
            mass, expected = sum_of_block(mass, scratch), sum_of_block(expected, scratch)
            rest = max(float64(0), float64(1) - mass)
            others = max(norm - named, float64(LEAST_REST) * norm)
            expected -= (mass + rest) * libdevice.log(norm)
        if thread == 0:
            own = float64((logits[target] + bias[target]) - largest32)
            if own == -np.inf:
                # The difference of two finite logits can be beyond float32.
                own = float64(logits[target] + bias[target]) - float64(largest32)
            loss = libdevice.log(norm) - own
            if kept > 0:
                loss = (float64(1) - weight) * loss - weight * (expected + rest * libdevice.log(others))
            global_float64(losses_at)[row] = loss
        if scale_bits == 0:
            return
        scale = float_of(scale_bits)
        factor = np.float32(float64(scale) / norm)
        factor_of_others, own_share = factor, scale
        if kept > 0:
            factor_of_others = np.float32(float64(scale) / norm * (float64(1) - weight * rest * norm / others))
            own_share = np.float32((float64(1) - weight) * float64(scale))
            soft_share = np.float32(weight * float64(scale))
            j = row * kept + thread
            while j < (row + 1) * kept:
                i = int64(symbols[j])
                value = exp_float32((logits[i] + bias[i]) - largest32) * factor - soft_share * probabilities[j]
                if i == target:
                    value -= own_share
                # Kept aside until the row is overwritten. The same thread reads it.
                probabilities[j] = value
                j += threads
        # The gradient of elements up to some i takes the place of elements up to i, or i / 2 with operands of two
        # bytes. Those have been read by then, because all threads move on together.
        first = int64(0)
        while first < padded:
            i = first + thread
            value = ZERO32
            if i < columns:
                value = exp_float32((logits[i] + bias[i]) - largest32) * factor_of_others
                if i == target:
                    value -= own_share
            cuda.syncthreads()
            if i < padded:
                store(row_at + size * i, value)
            first += threads
        cuda.syncthreads()
        j = row * kept + thread
        while j < (row + 1) * kept:
            store(row_at + size * int64(symbols[j]), probabilities[j])
            j += threads

    return cross_entropy, types.void(*[types.int64] * 12)
