"""MOVED."""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import LANES, load, store

# --- loss and optimiser ----------------------------------------------------------------------------------------


@compiled
def softmax_cross_entropy(rows, size, logits, targets, scale, d_logits_out):
    """Sum of -ln softmax(logits)[target] over rows, in float64; `d_logits_out` gets its gradient times `scale`."""
    total = 0.0
    whole = size // LANES * LANES
    for row in range(rows):
        at = row * size
        largest = logits[at]
        for i in range(1, size):
            largest = max(largest, logits[at + i])
        for i in range(0, whole, LANES):
            store(d_logits_out, at + i, cells.exp_float32(load(logits, at + i) - largest))
        for i in range(whole, size):
            d_logits_out[at + i] = cells.exp_float32(logits[at + i] - largest)
        norm = 0.0
        for i in range(size):
            norm += d_logits_out[at + i]
        target = targets[row]
        total += np.log(norm) - (logits[at + target] - largest)
        factor = np.float32(scale / norm)
        for i in range(size):
            d_logits_out[at + i] *= factor
        d_logits_out[at + target] -= scale
    return total
