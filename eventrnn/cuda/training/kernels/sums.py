"""Sums over a window: gradients of biases and thresholds, counts of events, and penalties.

All arrays are in global memory. Sums of floats are added up in an order that does not depend on the launch, counts by
integer atomics, whose order does not matter.
"""

from __future__ import annotations

import numpy as np
from numba import float64, int64, types

from eventrnn.cuda.device import cuda
from eventrnn.cuda.kernels.ptx import add_relaxed, global_float32, global_float64, global_int64, surrogate_slope
from eventrnn.cuda.training.kernels.cell_steps import scale_of, sent
from eventrnn.cuda.training.kernels.threads import (
    BYTES,
    LOADS,
    MOST_THREADS,
    ZERO32,
    first_element,
    stride,
    sum_of_block,
)

#: rules of thresholds, of which the gradient of the parameter depends
PLAIN, FIXED, SIGMOID = range(3)

#: int64 counts per unit of a layer, in this order
(
    FIRED,  # events in all steps: values above the threshold that are not zero
    FIRED_LAST,  # events in the last step
    ACTIVE,  # pairs of step and sample that fired or have a surrogate derivative
    ACTIVE_LAST,  # those in the last step
    CARRIED,  # samples whose carried output is not zero
    UNIT_COUNTS,
) = range(6)

#: terms of the penalties of a layer: mean squares before their strengths, and the outputs' sum
ACTIVATION, CHANGE, STATE, SENT, PENALTY_TERMS = range(5)

#: blocks that share the penalties of a step. A piece of a window has about ten steps, and so few blocks leave most
#: multiprocessors idle
PENALTY_PARTS = 8


def column_sums_kernel(precision: str):
    """The kernel that adds up columns of operands by parts, and its signature. A thread owns a column of a part.

    operands_at : (parts * rows, pitch) operands; `columns` of them are added up
    partial_at  : (parts, columns) float32; part p is the sum of the rows p * rows to (p + 1) * rows - 1, up to `count`
    """
    load, size = LOADS[precision], BYTES[precision]

    def column_sums(operands_at, pitch, columns, rows, count, parts, partial_at):
        at, step, partial = first_element(), stride(), global_float32(partial_at)
        while at < parts * columns:
            part = at // columns
            column = at - part * columns
            total = ZERO32
            for row in range(part * rows, min((part + 1) * rows, count)):
                total += load(operands_at + size * (row * pitch + column))
            partial[at] = total
            at += step

    return column_sums, types.void(*[types.int64] * 7)


def finish_sums_kernel():
    """The kernel that adds up parts, and its signature. A thread owns a column.

    partial_at   : (parts, pitch) float32, of which the columns from `first` on are added up
    threshold_at : (columns,) float32 thresholds, for the rule SIGMOID
    out_at       : (columns,) float32
    """

    def finish_sums(partial_at, parts, pitch, first, columns, rule, threshold_at, out_at):
        partial, out = global_float32(partial_at), global_float32(out_at)
        column, step = first_element(), stride()
        while column < columns:
            total = ZERO32
            for part in range(parts):
                total += partial[part * pitch + first + column]
            if rule == FIXED:
                total = ZERO32
            elif rule == SIGMOID:
                threshold = global_float32(threshold_at)[column]
                total = total * threshold * (np.float32(1) - threshold)
            out[column] = total
            column += step

    return finish_sums, types.void(*[types.int64] * 8)


def count_units_kernel(kind: int, dampening: float, support: float):
    """The kernel of the counts of a layer, and its signature. A thread owns a unit in a step.

    v_at       : (T, B, padded) float32, what is sent above the threshold
    carried_at : (B, padded) float32
    counts_at  : (UNIT_COUNTS, padded) int64, added to
    """
    kind, dampening, support = int(kind), np.float32(dampening), np.float32(support)

    def count_units(v_at, threshold_at, carried_at, units, padded, batch, steps, counts_at):
        at, step, v, thresholds = first_element(), stride(), global_float32(v_at), global_float32(threshold_at)
        while at < units * steps:
            time = at // units
            unit = at - time * units
            threshold, fired, active, carried = thresholds[unit], int64(0), int64(0), int64(0)
            for sample in range(batch):
                value = v[(time * batch + sample) * padded + unit]
                slope = surrogate_slope(kind, value - threshold, dampening, support)
                if value > threshold and value != ZERO32:
                    fired += 1
                if value > threshold or slope != ZERO32:
                    active += 1
                if time == 0 and global_float32(carried_at)[sample * padded + unit] != ZERO32:
                    carried += 1
            to = counts_at + 8 * unit
            add_relaxed(to + 8 * FIRED * padded, fired)
            add_relaxed(to + 8 * ACTIVE * padded, active)
            if time == 0:
                add_relaxed(to + 8 * CARRIED * padded, carried)
            if time == steps - 1:
                add_relaxed(to + 8 * FIRED_LAST * padded, fired)
                add_relaxed(to + 8 * ACTIVE_LAST * padded, active)
            at += step

    return count_units, types.void(*[types.int64] * 8)


def count_inputs_kernel(precision: str):
    """The kernel of the counts of operands that are not zero, and its signature. A thread owns a column in a step.

    x_at : (T, B, padded) operands; counts_at : (padded,) int64, added to
    """
    load, size = LOADS[precision], BYTES[precision]

    def count_inputs(x_at, columns, padded, batch, steps, counts_at):
        at, step = first_element(), stride()
        while at < columns * steps:
            time = at // columns
            column = at - time * columns
            found = int64(0)
            for sample in range(batch):
                if load(x_at + size * ((time * batch + sample) * padded + column)) != ZERO32:
                    found += 1
            add_relaxed(counts_at + 8 * column, found)
            at += step

    return count_inputs, types.void(*[types.int64] * 6)


def operations_kernel():
    """The kernel of the totals of a layer, and its signature. One block.

    The definitions are those of `Progress.operations`: twice the events and once the active pairs of a unit, times its
    kept weights.

    counts_at, below_at, inputs_at : counts of this layer, of the layer below (or 0), and of its inputs. Without a layer
                 below, `pairs` rows have an input gradient
    carried_pairs : whether a unit has an active pair for each output that it carried into the window
    further_pairs : further active pairs per unit
    kept_in_at, kept_rec_at        : (inputs,) and (units,) int64, kept weights of a unit; 0 for a matrix whose
                 operations are counted elsewhere
    further_at : int64, the operations that are counted elsewhere
    results_at : three float64: events, active pairs, operations
    """

    def operations(
        counts_at,
        padded,
        units,
        carried_pairs,
        further_pairs,
        below_at,
        below_padded,
        inputs_at,
        inputs,
        pairs,
        kept_in_at,
        kept_rec_at,
        further_at,
        out_at,
    ):
        scratch = cuda.shared.array(MOST_THREADS, float64)
        counts, kept_in, kept_rec = global_int64(counts_at), global_int64(kept_in_at), global_int64(kept_rec_at)
        thread, threads = int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
        fired = active = total = int64(0)
        unit = thread
        while unit < units:
            carried = counts[CARRIED * padded + unit]
            fired += counts[FIRED * padded + unit]
            active += counts[ACTIVE * padded + unit]
            events = counts[FIRED * padded + unit] - counts[FIRED_LAST * padded + unit] + carried
            open_pairs = counts[ACTIVE * padded + unit] - counts[ACTIVE_LAST * padded + unit]
            open_pairs += further_pairs
            if carried_pairs:
                open_pairs += carried
            if kept_rec_at != 0:
                total += (2 * events + open_pairs) * kept_rec[unit]
            unit += threads
        unit = thread
        while unit < inputs:
            open_pairs = pairs
            if below_at != 0:
                open_pairs = global_int64(below_at)[ACTIVE * below_padded + unit]
            if kept_in_at != 0:
                total += (2 * global_int64(inputs_at)[unit] + open_pairs) * kept_in[unit]
            unit += threads
        # Whole numbers below 2^53 add up exactly in float64.
        sums = sum_of_block(float64(fired), scratch)
        open_sum = sum_of_block(float64(active), scratch)
        work = sum_of_block(float64(total), scratch)
        if thread == 0:
            out = global_float64(out_at)
            out[0], out[1], out[2] = sums, open_sum, work + float64(global_int64(further_at)[0])

    return operations, types.void(*[types.int64] * 14)


def rate_kernel():
    """The kernel of the activity rate's penalty per unit, and its signature. A thread owns a unit.

    fired_at    : (units,) int64, events in `rows` steps and samples
    target_bits, strength_bits : see `Regularisers`
    d_event_at  : (units,) float32, gradient of each event
    squares_at  : (units,) float64, (rate - target)^2
    """

    def rates(fired_at, rows, target_at, strength_at, units, d_event_at, squares_at):
        fired, d_event, squares = global_int64(fired_at), global_float32(d_event_at), global_float64(squares_at)
        target, strength = global_float64(target_at)[0], global_float64(strength_at)[0]
        unit, step = first_element(), stride()
        while unit < units:
            over = float64(fired[unit]) / float64(rows) - target
            d_event[unit] = np.float32(2 * strength / (float64(units) * float64(rows)) * over)
            squares[unit] = over * over
            unit += step

    return rates, types.void(*[types.int64] * 7)


def penalties_kernel(kind: int, dampening: float, support: float):
    """The kernel of the penalties of a layer: gradients, and sums by part of a step. PENALTY_PARTS blocks own a step,
    from `begin` on; each of their threads owns every n-th pair of sample and unit.

    v_at          : (T, B, padded) float32
    upstream_at   : (T, B, padded) float32, gradient of the outputs after dropout; becomes that of the outputs
    d_cell_at     : (T, B, padded) float32, becomes the gradient of v - threshold; or 0
    mask_at       : bytes of the dropout of the outputs, `mask_steps` and `mask_samples` apart; or 0
    d_event_at    : (units,) float32 of `rates`, or 0
    factors_at    : (PENALTY_TERMS + 1,) float32: factors of the gradients of ACTIVATION, CHANGE, STATE and SENT, then
                    the margin of STATE. A factor of 0 leaves its term out
    sums_at       : (T, PENALTY_PARTS, PENALTY_TERMS) float64
    """
    kind, dampening, support = int(kind), np.float32(dampening), np.float32(support)

    def penalties(
        v_at,
        threshold_at,
        upstream_at,
        d_cell_at,
        mask_at,
        mask_steps,
        mask_samples,
        scale_bits,
        d_event_at,
        factors_at,
        units,
        padded,
        batch,
        steps,
        begin,
        sums_at,
    ):
        scratch = cuda.shared.array(MOST_THREADS, float64)
        own = int64(cuda.blockIdx.x)
        time = begin + own // PENALTY_PARTS
        at = own % PENALTY_PARTS * int64(cuda.blockDim.x) + cuda.threadIdx.x
        threads = PENALTY_PARTS * int64(cuda.blockDim.x)
        v, thresholds, upstream = global_float32(v_at), global_float32(threshold_at), global_float32(upstream_at)
        factors = global_float32(factors_at)
        margin, plane = factors[PENALTY_TERMS], batch * padded
        squares = changes = states = outputs = float64(0)
        while at < units * batch:
            sample = at // units
            unit = at - sample * units
            i = (time * batch + sample) * padded + unit
            threshold, value = thresholds[unit], v[i]
            y = sent(value, threshold)
            scale = scale_of(mask_at + time * mask_steps if mask_at != 0 else 0, mask_samples, sample, unit, scale_bits)
            d_y = upstream[i] * scale
            if y > ZERO32:
                d_y += factors[SENT]
            outputs += float64(y)
            if factors[ACTIVATION] != ZERO32:
                dropped = y * scale
                squares += float64(dropped) * float64(dropped)
                d_y += factors[ACTIVATION] * dropped * scale
            if factors[CHANGE] != ZERO32:
                change = ZERO32
                if time > 0:
                    change = y - sent(v[i - plane], threshold)
                    changes += float64(change) * float64(change)
                if time < steps - 1:
                    change -= sent(v[i + plane], threshold) - y
                d_y += factors[CHANGE] * change
            upstream[i] = d_y
            if d_cell_at != 0:
                d_cell = ZERO32
                if d_event_at != 0:
                    slope = surrogate_slope(kind, value - threshold, dampening, support)
                    d_cell = global_float32(d_event_at)[unit] * slope
                if factors[STATE] != ZERO32:
                    over = value - (threshold - margin)
                    states += float64(over) * float64(over)
                    d_cell += factors[STATE] * over
                global_float32(d_cell_at)[i] = d_cell
            at += threads
        total = sum_of_block(squares, scratch)
        change_total = sum_of_block(changes, scratch)
        state_total = sum_of_block(states, scratch)
        sent_total = sum_of_block(outputs, scratch)
        if cuda.threadIdx.x == 0:
            sums = global_float64(sums_at)
            to = (begin * PENALTY_PARTS + own) * PENALTY_TERMS
            sums[to + ACTIVATION], sums[to + CHANGE] = total, change_total
            sums[to + STATE], sums[to + SENT] = state_total, sent_total

    return penalties, types.void(*[types.int64] * 16)
