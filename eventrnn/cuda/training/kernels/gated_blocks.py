"""Blocks that every input chooses, in training: what stands around their products.

`weights/gated.py` defines choice and gates, and the head of `training/bptt/gated_products.py` the gradients. Here the
inputs are not scaled: of a row x, block rows R and block columns C, with P[R] = x[R] @ W[R, :] from cuBLAS,

    y[C]     = sum over R of g[R, C] * P[R][C]
    dP[R][C] = g[R, C] * d_y[C]                   so that d_x[R] = dP[R] @ W[R, :].T and d_W[R, :] = x[R].T @ dP[R]
    d_g[R, C] = d_y[C] . P[R][C]

All arrays are in global memory. A row is a step and a sample; addresses are those of the first row of a launch.

logits, gates, slopes, d_gates : (rows, pitch) float32, one per block; `pitch` is the number of blocks, padded
chosen                         : (rows, pitch) bytes, 1 where the row chose the block
products, d_products           : (rows, block rows, gates * padded) float32 and operands. The output of the matrix with
                                 number p is unit p % units of gate p // units; that gate takes the place
                                 (p // units + shift) % gates
"""

from __future__ import annotations

import numpy as np
from numba import float32, float64, int64, types

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.gated_choice import LOWEST_KEY, key_of
from eventrnn.cuda.kernels.ptx import (
    add_relaxed,
    exp_float32,
    fma,
    global_float32,
    global_float64,
    global_int64,
    global_uint8,
    libdevice,
    surrogate_slope,
)
from eventrnn.cuda.training.kernels.threads import (
    BYTES,
    LOADS,
    MOST_THREADS,
    ONE32,
    STORES,
    ZERO32,
    first_element,
    float_of,
    largest_of_block,
    stride,
    sum_of_block,
)

# Three counts of at most MOST_BLOCKS are added up as one float64.
COUNT_BITS = 17
MOST_BLOCKS = (1 << COUNT_BITS) - 1

# The number of a key is found two bits at a time.
PASSES = 16

# Threads that add up a block.
GROUP = 16

# Causes of gates that are not finite, in the order of `state.GATE_FAULTS`.
BAD_LOGIT, CANCELLED, TOO_LARGE = 1, 2, 3


@device_function
def key_of_logit(logit):
    """The key of a float32, as an int64 so that differences of keys do not overflow."""
    return int64(key_of(libdevice.float_as_int(logit)))


@device_function
def lowest_chosen(logits, blocks, kept, scratch):
    """The largest key that at least `kept` of the block's logits reach; all threads of the block call it."""
    lowest, thread, threads = int64(LOWEST_KEY), int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
    for k in range(PASSES):
        step, counts, b = int64(1) << (30 - 2 * k), int64(0), thread
        while b < blocks:
            over = key_of_logit(logits[b]) - lowest
            if over >= step:
                counts += 1
            if over >= 2 * step:
                counts += int64(1) << COUNT_BITS
            if over >= 3 * step:
                counts += int64(1) << (2 * COUNT_BITS)
            b += threads
        # Whole numbers below 2^53 add up exactly.
        found = int64(sum_of_block(float64(counts), scratch))
        if (found >> (2 * COUNT_BITS)) >= kept:
            lowest += 3 * step
        elif ((found >> COUNT_BITS) & MOST_BLOCKS) >= kept:
            lowest += 2 * step
        elif (found & MOST_BLOCKS) >= kept:
            lowest += step
    return lowest


def choose_kernel(precision: str):
    """The kernel of the choice, and its signature. A block owns a row; its threads own neighbouring blocks.

    logits_at    : products, to which the bias is added
    bias_at      : (blocks,) float32
    x_at         : (rows, x_pitch) operands, `inputs` of them per row
    kept_at      : int64, how many blocks a row chooses
    slopes_at, chosen_at, penalties_at : written in training; address 0 otherwise
    faults_at    : (rows,) int64, why the gates of a row are not finite, or 0
    penalties_at : (rows,) float64, 0, or NaN where the gates are not finite
    """
    load, size = LOADS[precision], BYTES[precision]

    def choose(
        logits_at,
        bias_at,
        x_at,
        x_pitch,
        inputs,
        blocks,
        pitch,
        kept_at,
        softmax,
        straight_through,
        gates_at,
        slopes_at,
        chosen_at,
        faults_at,
        penalties_at,
    ):
        scratch = cuda.shared.array(MOST_THREADS, float64)
        row, thread, threads = int64(cuda.blockIdx.x), int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
        logits, gates = global_float32(logits_at + 4 * row * pitch), global_float32(gates_at + 4 * row * pitch)
        bias, kept, bad = global_float32(bias_at), global_int64(kept_at)[0], float64(0)
        b = thread
        while b < blocks:
            # -0 becomes +0, which is equal to it.
            logit = (logits[b] + bias[b]) + ZERO32
            logits[b] = logit
            if logit - logit != ZERO32:
                bad = float64(1)
            b += threads
        # This also lets every thread see all logits.
        bad = largest_of_block(bad, scratch)
        lowest = lowest_chosen(logits, blocks, kept, scratch)
        share = (blocks + threads - 1) // threads
        begin, end = min(thread * share, blocks), min((thread + 1) * share, blocks)
        larger = equal = int64(0)
        for b in range(begin, end):
            key = key_of_logit(logits[b])
            if key > lowest:
                larger += 1
            elif key == lowest:
                equal += 1
        room = kept - int64(sum_of_block(float64(larger), scratch))
        # Of equal logits, the first ones are chosen.
        scratch[thread] = float64(equal)
        cuda.syncthreads()
        for k in range(thread):
            room -= int64(scratch[k])
        cuda.syncthreads()
        pivot = float64(-np.inf) if softmax else float64(0)
        for b in range(begin, end):
            key, own = key_of_logit(logits[b]), ZERO32
            if key > lowest:
                own = ONE32
            elif key == lowest:
                if room > 0:
                    own = ONE32
                room -= 1
            gates[b] = own
            if chosen_at != 0:
                global_uint8(chosen_at + row * pitch)[b] = 1 if own != ZERO32 else 0
            if own != ZERO32:
                pivot = max(pivot, float64(logits[b]) if softmax else abs(float64(logits[b])))
        largest = np.float32(largest_of_block(pivot, scratch))
        total = float64(0)
        for b in range(begin, end):
            if gates[b] != ZERO32:
                ratio = ONE32
                if softmax:
                    ratio = exp_float32(logits[b] - largest)
                elif largest != ZERO32:
                    ratio = logits[b] / largest
                gates[b] = ratio
                total += float64(ratio)
        factor = np.float32(blocks) / np.float32(sum_of_block(total, scratch))
        most = float64(0)
        for b in range(begin, end):
            # A chosen block with a logit of 0 has the gate 0, too.
            own = gates[b] * factor
            slope = ZERO32
            if slopes_at != 0:
                if softmax:
                    slope = own
                    if straight_through and global_uint8(chosen_at + row * pitch)[b] == 0:
                        slope = factor * exp_float32(logits[b] - largest)
                elif largest != ZERO32 and (straight_through or global_uint8(chosen_at + row * pitch)[b] != 0):
                    slope = factor / largest
                global_float32(slopes_at + 4 * row * pitch)[b] = slope
            gates[b] = own
            most = max(most, abs(float64(own)))
        most, value = largest_of_block(most, scratch), float64(0)
        j = thread
        while j < inputs:
            value = max(value, abs(float64(load(x_at + size * (row * x_pitch + j)))))
            j += threads
        product = np.float32(most) * np.float32(largest_of_block(value, scratch))
        if thread == 0:
            fault = int64(0)
            if bad != 0:
                fault = int64(BAD_LOGIT)
            elif factor - factor != ZERO32:
                fault = int64(CANCELLED)
            elif product - product != ZERO32:
                fault = int64(TOO_LARGE)
            global_int64(faults_at)[row] = fault
            if penalties_at != 0:
                global_float64(penalties_at)[row] = float64(np.nan) if fault != 0 else float64(0)

    return choose, types.void(*[types.int64] * 15)


def combine_kernel():
    """The kernel of the drives from the products, and its signature. A thread owns every n-th pair of row and output.

    out_at : (rows, out_pitch) float32
    """

    def combine(
        products_at,
        gates_at,
        pitch,
        block_rows,
        block_columns,
        width,
        units,
        padded,
        gates,
        shift,
        rows,
        out_at,
        out_pitch,
    ):
        products, gate_values, out = global_float32(products_at), global_float32(gates_at), global_float32(out_at)
        outputs, columns, at, step = gates * units, gates * padded, first_element(), stride()
        while at < rows * outputs:
            row = at // outputs
            p = at - row * outputs
            gate = p // units
            column = (gate + shift) % gates * padded + p - gate * units
            block, product, total = row * pitch + p // width, row * block_rows * columns + column, ZERO32
            for k in range(block_rows):
                total = fma(gate_values[block + k * block_columns], products[product + k * columns], total)
            out[row * out_pitch + column] = total
            at += step

    return combine, types.void(*[types.int64] * 13)


def spread_kernel(precision: str):
    """The kernel of the gradients of products and of gates, and its signature.

    A block owns a block row of a row, and GROUP of its threads a block; they add up in a fixed order.

    deltas_at : (rows, deltas_pitch) operands, gradients of the drives, gates at their places
    """
    load, store, size = LOADS[precision], STORES[precision], BYTES[precision]

    def spread(
        deltas_at,
        deltas_pitch,
        products_at,
        gates_at,
        pitch,
        block_rows,
        block_columns,
        width,
        units,
        padded,
        gates,
        shift,
        d_products_at,
        d_gates_at,
    ):
        scratch = cuda.shared.array(MOST_THREADS, float32)
        own, thread, threads = int64(cuda.blockIdx.x), int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
        row = own // block_rows
        first_block = row * pitch + (own - row * block_rows) * block_columns
        deltas, to = deltas_at + size * row * deltas_pitch, d_products_at + size * own * gates * padded
        products = global_float32(products_at + 4 * own * gates * padded)
        group = min(int64(GROUP), threads)
        lane, first = thread % group, int64(0)
        while first < block_columns:
            column, total = first + thread // group, ZERO32
            if column < block_columns:
                gate_value = global_float32(gates_at)[first_block + column]
                p, end = column * width + lane, min((column + 1) * width, gates * units)
                gate = p // units
                unit = p - gate * units
                while p < end:
                    place = gate + shift
                    if place >= gates:
                        place -= gates
                    at = place * padded + unit
                    delta = load(deltas + size * at)
                    total = fma(delta, products[at], total)
                    store(to + size * at, gate_value * delta)
                    p += group
                    unit += group
                    while unit >= units:
                        unit -= units
                        gate += 1
            scratch[thread] = total
            cuda.syncthreads()
            half = group // 2
            while half > 0:
                if lane < half:
                    scratch[thread] += scratch[thread + half]
                cuda.syncthreads()
                half //= 2
            if lane == 0 and column < block_columns:
                global_float32(d_gates_at)[first_block + column] = scratch[thread]
            cuda.syncthreads()
            first += threads // group

    return spread, types.void(*[types.int64] * 14)


def logit_gradients_kernel(precision: str):
    """The kernel of the gradients of the logits, and its signature. A block owns a row.

    used_at      : (blocks,) float64, share of the window's choices that fell on each block, for the load balance; 0
                   for none. The balance of a row is then added to `penalties_at` (rows,) float64
    factor_bits  : factor of the gradient of the balance of a row
    d_logits_at  : (rows, pitch) operands
    """
    store, size = STORES[precision], BYTES[precision]

    def logit_gradients(
        d_gates_at,
        gates_at,
        slopes_at,
        logits_at,
        blocks,
        pitch,
        used_at,
        factor_bits,
        penalties_at,
        d_logits_at,
    ):
        scratch = cuda.shared.array(MOST_THREADS, float64)
        row, thread, threads = int64(cuda.blockIdx.x), int64(cuda.threadIdx.x), int64(cuda.blockDim.x)
        from_row = 4 * row * pitch
        d_gates, gates = global_float32(d_gates_at + from_row), global_float32(gates_at + from_row)
        slopes, logits = global_float32(slopes_at + from_row), global_float32(logits_at + from_row)
        through, b = float64(0), thread
        while b < blocks:
            through += float64(d_gates[b]) * float64(gates[b])
            b += threads
        mean = np.float32(sum_of_block(through, scratch) / float64(blocks))
        largest, norm, balance = float64(-np.inf), float64(1), float64(0)
        if used_at != 0:
            b = thread
            while b < blocks:
                largest = max(largest, float64(logits[b]))
                b += threads
            largest, norm, b = largest_of_block(largest, scratch), float64(0), thread
            while b < blocks:
                ratio = float64(exp_float32(logits[b] - np.float32(largest)))
                norm += ratio
                balance += ratio * global_float64(used_at)[b]
                b += threads
            norm = sum_of_block(norm, scratch)
            balance = sum_of_block(balance, scratch) / norm
            if thread == 0:
                global_float64(penalties_at)[row] += balance
        b = thread
        while b < blocks:
            d_logit = ZERO32
            # The gradient of a gate need not be finite where nothing passes to its logit.
            if slopes[b] != ZERO32:
                d_logit = (d_gates[b] - mean) * slopes[b]
            if used_at != 0:
                ratio = float64(exp_float32(logits[b] - np.float32(largest))) / norm
                d_logit += np.float32(float64(float_of(factor_bits)) * ratio * (global_float64(used_at)[b] - balance))
            store(d_logits_at + size * (row * pitch + b), d_logit)
            b += threads

    return logit_gradients, types.void(*[types.int64] * 10)


def count_choices_kernel():
    """The kernel of the share of all choices that fell on each block, and its signature. A thread owns every n-th
    block.

    chosen_at : (rows, pitch) bytes; kept_at : int64, choices per row; used_at : (blocks,) float64
    """

    def count_choices(chosen_at, rows, blocks, pitch, kept_at, used_at):
        chosen, used = global_uint8(chosen_at), global_float64(used_at)
        b, step, kept = first_element(), stride(), global_int64(kept_at)[0]
        while b < blocks:
            found = int64(0)
            for row in range(rows):
                found += chosen[row * pitch + b]
            used[b] = float64(found) / (float64(rows) * float64(kept))
            b += step

    return count_choices, types.void(*[types.int64] * 6)


def count_products_kernel(precision: str, kind: int, dampening: float, support: float):
    """The kernel of the effective operations, and its signature. A thread owns every n-th pair of row and input.

    The definitions are those of `Progress.operations`: twice the events and once the active pairs of an input, times
    its kept weights in blocks with a gate.

    x_at        : (rows, x_pitch) operands
    stored_at   : (inputs, block columns) int64, kept weights of each input in each block column
    height      : inputs per block row
    v_at        : (rows, x_pitch) float32, what the inputs sent above their thresholds, `shift` rows earlier; or 0 where
                  every input is an active pair. kind, dampening, support: its surrogate derivative
    pairs_from  : first row whose inputs have a gradient
    total_at    : int64, added to
    """
    load, size = LOADS[precision], BYTES[precision]
    kind, dampening, support = int(kind), np.float32(dampening), np.float32(support)

    def count_products(
        x_at,
        x_pitch,
        inputs,
        rows,
        gates_at,
        pitch,
        block_columns,
        height,
        stored_at,
        v_at,
        thresholds_at,
        shift,
        pairs_from,
        total_at,
    ):
        gates, stored = global_float32(gates_at), global_int64(stored_at)
        at, step, total = first_element(), stride(), int64(0)
        while at < rows * inputs:
            row = at // inputs
            j = at - row * inputs
            uses = int64(0)
            if load(x_at + size * (row * x_pitch + j)) != ZERO32:
                uses += 2
            if row >= pairs_from:
                pair = v_at == 0
                if v_at != 0:
                    distance = global_float32(v_at)[(row - shift) * x_pitch + j] - global_float32(thresholds_at)[j]
                    pair = distance > ZERO32 or surrogate_slope(kind, distance, dampening, support) != ZERO32
                if pair:
                    uses += 1
            if uses > 0:
                first = row * pitch + j // height * block_columns
                for column in range(block_columns):
                    if gates[first + column] != ZERO32:
                        total += uses * stored[j * block_columns + column]
            at += step
        add_relaxed(total_at, total)

    return count_products, types.void(*[types.int64] * 14)
