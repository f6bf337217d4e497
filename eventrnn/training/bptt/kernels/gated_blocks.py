"""Blocks that every input chooses, in training: the element-wise work between the products through BLAS.

Letters: R rows (step and sample), J inputs of the matrix, K blocks in a grid of `grid_columns` columns, `units` inputs
per block row. Arrays are flat float32: x (R, J), logits, gates and slopes (R, K). A thread handles some of the rows.

The choice and the gates are those of the engine (`cpu/kernels/gated_products.py`), by the same functions.
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.cpu.kernels.gated_products import gates_of_row
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import LANES, load
from eventrnn.cpu.kernels.simd_reductions import everywhere, sum_lanes


@compiled
def gates_of_logits(
    thread, n_threads, rows, x, inputs, logits, blocks, kept, softmax, straight_through, chosen, gates, slopes, faults
):
    """Choose the `kept` largest of the logits of each row, and write gates and slopes.

    softmax          : whether the rule is "softmax"; otherwise it is "linear"
    straight_through : whether blocks that are not chosen have a slope too
    chosen           : (R, K) int32, 1 for a chosen block
    slopes           : (R, K), see `GatedProduct`
    faults           : (threads,) int64, the least cause of a thread's gates that are not finite, or 0
    """
    faults[thread] = 0
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        at = row * blocks
        for b in range(at, at + blocks):
            gates[b] = logits[b]
        fault = gates_of_row(gates, at, chosen, at, blocks, kept, softmax, x, row * inputs, inputs)
        if fault != 0 and (faults[thread] == 0 or fault < faults[thread]):
            faults[thread] = fault
        pivot, started = at, False
        for b in range(at, at + blocks):
            if chosen[b] != 0:
                larger = logits[b] > logits[pivot] if softmax else abs(logits[b]) > abs(logits[pivot])
                if larger or not started:
                    pivot, started = b, True
        largest = logits[pivot]
        # The gate of the pivot is blocks / s, because its ratio is 1.
        factor = gates[pivot]
        for b in range(at, at + blocks):
            slope = cells.ZERO
            if softmax:
                if chosen[b] != 0:
                    slope = gates[b]
                elif straight_through:
                    slope = factor * cells.exp(logits[b] - largest)
            elif (chosen[b] != 0 or straight_through) and largest != cells.ZERO:
                slope = factor / largest
            slopes[b] = slope


@compiled
def scale_inputs(thread, n_threads, rows, x, inputs, gates, blocks, grid_columns, first, last, units, scaled):
    """scaled (last - first, R, J) = the inputs, multiplied by the gates of their blocks in some columns of the grid."""
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        for column in range(first, last):
            block, to = row * blocks + column, ((column - first) * rows + row) * inputs
            for low in range(0, inputs, units):
                gate, at = gates[block], row * inputs
                for j in range(low, min(low + units, inputs)):
                    scaled[to + j] = gate * x[at + j]
                block += grid_columns


@compiled
def scale_back(
    thread, n_threads, rows, x, inputs, gates, slopes, blocks, grid_columns, first, last, units, d_scaled, d_x, d_gates
):
    """Go back through `scale_inputs`: add to d_x (R, J), and write d_gates (R, K) in some columns of the grid.

    d_scaled : (last - first, R, J) gradient with respect to `scaled`
    d_gates  : 0 where the slope is 0
    """
    for row in range(rows * thread // n_threads, rows * (thread + 1) // n_threads):
        at = row * inputs
        for column in range(first, last):
            block, to = row * blocks + column, ((column - first) * rows + row) * inputs
            for low in range(0, inputs, units):
                gate, high, total = gates[block], min(low + units, inputs), cells.ZERO
                if gate != cells.ZERO:
                    for j in range(low, high):
                        d_x[at + j] += gate * d_scaled[to + j]
                if slopes[block] != cells.ZERO:
                    whole, sums = low + (high - low) // LANES * LANES, everywhere(cells.ZERO)
                    for j in range(low, whole, LANES):
                        sums = cells.fma(load(d_scaled, to + j), load(x, at + j), sums)
                    total = sum_lanes(sums)
                    for j in range(whole, high):
                        total += d_scaled[to + j] * x[at + j]
                d_gates[block] = total
                block += grid_columns
