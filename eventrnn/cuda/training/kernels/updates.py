"""Gradients to updates: norms, clipping, update rules, masks and bounds, on the flat array of all parameters.

The parameters lie in segments of one float32 array (`layout.py`), gradients and optimiser state in arrays of the same
layout. A segment is cut into chunks of CHUNK elements, and a block owns a chunk; its order of summation depends on the
number of threads, which is fixed.

segments_at : (segments, SEGMENT_FIELDS) int64; chunks_at : (chunks, 3) int64: segment, begin and end in the flat array
rates_at    : (segments, 3) float32: learning rate of the step, decoupled decay, decay that joins the gradient
numbers_at  : float32 numbers of the step, see NUMBERS
"""

from __future__ import annotations

import numpy as np
from numba import float64, int64, types

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.ptx import global_float32, global_float64, global_int64, global_uint8, libdevice
from eventrnn.cuda.training.kernels.threads import BYTES, MOST_THREADS, STORES, ZERO32, float_of, sum_of_block

#: elements of a chunk
CHUNK = 4096

#: columns of the table of segments
(
    FIRST,  # first element of the segment in the flat array
    KEPT,  # address of bytes, 0 where a weight is pruned; or 0
    DROPPED,  # address of bytes, 0 where DropConnect left a weight out; or 0
    DROP_BITS,  # scale of DropConnect, as bits
    LAYER,  # layer for clipping by layer, or -1
    LOWEST_BITS,  # lower bound of the parameter, as bits
    HIGHEST_BITS,  # upper bound of the parameter, as bits
    SEGMENT_FIELDS,
) = range(8)

#: entries of `numbers_at`: constants of the optimiser, then what changes from step to step
BETA1, BETA2, EPSILON, MOMENTUM, CORRECTION1, CORRECTION2, SHARE, NUMBERS = range(8)

#: update rules
ADAM, ADAM_WITHOUT_FIRST, DESCEND, MOMENTUM_DESCENT = "adam", "adam_without_first", "descend", "momentum"

#: entries of `results_at`
FAILED, NORM, RESULTS = range(3)


def square_gradients_kernel():
    """The kernel of masks and norms, and its signature: gradients of pruned and of dropped weights become zero, those
    of kept weights are scaled as their weights were.

    squares_at : (chunks,) float64, sum of squares of each chunk
    """

    def square_gradients(gradients_at, chunks_at, segments_at, squares_at):
        scratch = cuda.shared.array(MOST_THREADS, float64)
        own, gradients = int64(cuda.blockIdx.x), global_float32(gradients_at)
        chunk = global_int64(chunks_at + 24 * own)
        segment = global_int64(segments_at + 8 * SEGMENT_FIELDS * chunk[0])
        first, kept, dropped, scale = segment[FIRST], segment[KEPT], segment[DROPPED], float_of(segment[DROP_BITS])
        i, end, total = chunk[1] + cuda.threadIdx.x, chunk[2], float64(0)
        while i < end:
            g = gradients[i]
            if dropped != 0:
                g = g * scale if global_uint8(dropped)[i - first] else ZERO32
            if kept != 0 and global_uint8(kept)[i - first] == 0:
                g = ZERO32
            if dropped != 0 or kept != 0:
                gradients[i] = g
            total += float64(g) * float64(g)
            i += cuda.blockDim.x
        total = sum_of_block(total, scratch)
        if cuda.threadIdx.x == 0:
            global_float64(squares_at)[own] = total

    return square_gradients, types.void(*[types.int64] * 4)


def sum_spans_kernel():
    """The kernel that adds up spans of float64, and its signature. A block owns a span.

    spans_at : (spans, 3) int64: address of the first number, numbers, and distance in numbers
    sums_at  : (spans,) float64
    """

    def sum_spans(spans_at, sums_at):
        scratch = cuda.shared.array(MOST_THREADS, float64)
        span = global_int64(spans_at + 24 * int64(cuda.blockIdx.x))
        numbers, count, distance = global_float64(span[0]), span[1], span[2]
        i, total = int64(cuda.threadIdx.x), float64(0)
        while i < count:
            total += numbers[i * distance]
            i += cuda.blockDim.x
        total = sum_of_block(total, scratch)
        if cuda.threadIdx.x == 0:
            global_float64(sums_at)[int64(cuda.blockIdx.x)] = total

    return sum_spans, types.void(*[types.int64] * 2)


def settle_kernel():
    """The kernel that decides on an update, and its signature. One thread.

    losses_at  : (losses,) float64, whose sums must be finite
    squares_at : (segments,) float64, squared norms of the gradients
    limits_at  : two float64: bound on the norm of all gradients, and of those of a layer, 0 for none
    scales_at  : (segments,) float32, factors of the gradients
    results_at : RESULTS float64: FAILED is 1 if a number is not finite, NORM that of all gradients, after clipping by
                 layer
    """

    def settle(losses_at, losses, squares_at, segments, segments_at, layers, limits_at, scales_at, results_at):
        squares, scales, limits = global_float64(squares_at), global_float32(scales_at), global_float64(limits_at)
        results, good = global_float64(results_at), True
        for k in range(losses):
            good = good and abs(global_float64(losses_at)[k]) < np.inf
        total = float64(0)
        for layer in range(-1, layers):
            own = float64(0)
            for k in range(segments):
                if global_int64(segments_at + 8 * SEGMENT_FIELDS * k)[LAYER] == layer:
                    own += squares[k]
            good = good and abs(own) < np.inf
            factor = np.float32(1)
            if layer >= 0 and limits[1] > 0 and libdevice.sqrt(own) > limits[1]:
                factor = np.float32(limits[1] / libdevice.sqrt(own))
            total += own * float64(factor) * float64(factor)
            for k in range(segments):
                if global_int64(segments_at + 8 * SEGMENT_FIELDS * k)[LAYER] == layer:
                    scales[k] = factor
        norm = libdevice.sqrt(total)
        if norm > limits[0]:
            for k in range(segments):
                scales[k] *= np.float32(limits[0] / norm)
        results[FAILED] = 0.0 if good else 1.0
        results[NORM] = norm

    return settle, types.void(*[types.int64] * 9)


def prune_kernel(precision: str):
    """The kernel that sets pruned weights to zero, and its signature.

    parameters_at : float32 of all segments
    operands_at   : the parameters as operands
    """
    store, size = STORES[precision], BYTES[precision]

    def prune(parameters_at, operands_at, chunks_at, segments_at):
        parameters = global_float32(parameters_at)
        chunk = global_int64(chunks_at + 24 * int64(cuda.blockIdx.x))
        segment = global_int64(segments_at + 8 * SEGMENT_FIELDS * chunk[0])
        start, kept = segment[FIRST], segment[KEPT]
        if kept == 0:
            return
        i, end = chunk[1] + cuda.threadIdx.x, chunk[2]
        while i < end:
            if global_uint8(kept)[i - start] == 0:
                parameters[i] = ZERO32
                store(operands_at + size * i, ZERO32)
            i += cuda.blockDim.x

    return prune, types.void(*[types.int64] * 4)


def update_kernel(rule: str, precision: str, averaged: bool):
    """The kernel of an update rule, and its signature; the rules are those of `training.kernels.optimiser_updates`.

    After the rule a pruned weight is zero, and a threshold is within its bounds. Nothing is changed if `results_at`
    says that the window has failed.

    first_at, second_at, mean_at : optimiser state in the layout of the parameters, or 0: running means of the gradient
                                   (of momentum: the velocity) and of its square; running mean of the parameters
    operands_at                  : the parameters as operands
    """
    store, size = STORES[precision], BYTES[precision]
    adam, with_first, with_velocity = rule in (ADAM, ADAM_WITHOUT_FIRST), rule == ADAM, rule == MOMENTUM_DESCENT
    reads_first = with_first or with_velocity

    @device_function
    def changed(w, g, first, second, rates, numbers):
        """Parameter, first and second state after the rule, from the clipped gradient."""
        rate, decay, joined, one = rates[0], rates[1], rates[2], np.float32(1)
        # One place returns: `eventrnn.cuda.kernels.gated_blocks` says why.
        if rate != ZERO32:
            if with_velocity:
                first = numbers[MOMENTUM] * first + g + joined * w
                g = first
            else:
                g += joined * w
            if adam:
                beta1, beta2 = numbers[BETA1], numbers[BETA2]
                second = beta2 * second + (one - beta2) * g * g
                moved = g
                if with_first:
                    first = beta1 * first + (one - beta1) * g
                    moved = first * numbers[CORRECTION1]
                g = moved / (libdevice.fsqrt_rn(second * numbers[CORRECTION2]) + numbers[EPSILON])
            w -= rate * (g + decay * w)
        return w, first, second

    def update(
        parameters_at,
        gradients_at,
        first_at,
        second_at,
        mean_at,
        operands_at,
        chunks_at,
        segments_at,
        scales_at,
        rates_at,
        numbers_at,
        results_at,
    ):
        if global_float64(results_at)[FAILED] != 0:
            return
        parameters, gradients = global_float32(parameters_at), global_float32(gradients_at)
        firsts, seconds, means = global_float32(first_at), global_float32(second_at), global_float32(mean_at)
        numbers = global_float32(numbers_at)
        chunk = global_int64(chunks_at + 24 * int64(cuda.blockIdx.x))
        segment = global_int64(segments_at + 8 * SEGMENT_FIELDS * chunk[0])
        start, kept = segment[FIRST], segment[KEPT]
        lowest, highest = float_of(segment[LOWEST_BITS]), float_of(segment[HIGHEST_BITS])
        scale, rates = global_float32(scales_at)[chunk[0]], global_float32(rates_at + 12 * chunk[0])
        i, end = chunk[1] + cuda.threadIdx.x, chunk[2]
        while i < end:
            # Two elements are loaded before the first of them is stored, so that more loads are on their way.
            both = i + cuda.blockDim.x < end
            j = i + cuda.blockDim.x if both else i
            w0, w1, g0, g1 = parameters[i], parameters[j], gradients[i], gradients[j]
            first0 = first1 = second0 = second1 = ZERO32
            if reads_first:
                first0, first1 = firsts[i], firsts[j]
            if adam:
                second0, second1 = seconds[i], seconds[j]
            w0, first0, second0 = changed(w0, g0 * scale, first0, second0, rates, numbers)
            w1, first1, second1 = changed(w1, g1 * scale, first1, second1, rates, numbers)
            if averaged:
                mean0, mean1 = means[i], means[j]
                means[i] = mean0 + numbers[SHARE] * (w0 - mean0)
                means[j] = mean1 + numbers[SHARE] * (w1 - mean1)
            if kept != 0:
                w0 = w0 if global_uint8(kept)[i - start] else ZERO32
                w1 = w1 if global_uint8(kept)[j - start] else ZERO32
            w0, w1 = min(max(w0, lowest), highest), min(max(w1, lowest), highest)
            # Without a second element, the first one is written twice.
            if reads_first:
                firsts[i], firsts[j] = first0, first1
            if adam:
                seconds[i], seconds[j] = second0, second1
            parameters[i], parameters[j] = w0, w1
            store(operands_at + size * i, w0)
            store(operands_at + size * j, w1)
            i += 2 * cuda.blockDim.x

    return update, types.void(*[types.int64] * 12)
