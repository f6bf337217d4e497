"""Softmax cross-entropy and its gradient, in one call on one thread.

The caller owns all arrays: logits and gradient (rows, size) float32, flat; targets (rows,) int64. The value is that of
`losses.cross_entropy` before the mean: the sum over rows of ln(sum_i exp(logit_i)) - logit_target, in natural units.
The exponential is the float32 polynomial of `cells.py`; sums are float64.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import LANES, load, store


@compiled
def softmax_cross_entropy(rows, size, logits, targets, scale, d_logits_out):
    """Returns the sum of -ln softmax(logits)[target] over rows, in float64. Its gradient times `scale` goes to
    `d_logits_out`."""
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
        below = np.float64(logits[at + target] - largest)
        if np.isinf(below):
            # The difference of two finite logits can be beyond float32.
            below = np.float64(logits[at + target]) - np.float64(largest)
        total += np.log(norm) - below
        factor = np.float32(scale / norm)
        for i in range(size):
            d_logits_out[at + i] *= factor
        d_logits_out[at + target] -= scale
    return total
