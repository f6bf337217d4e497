"""Softmax cross-entropy and its gradient, with soft targets or without, in one call on one thread.

The caller owns all arrays, which are flat: logits and gradient (rows, size) float32; targets (rows,) int64; soft
targets: symbols (rows, kept) int32, all different within a row, and probabilities (rows, kept) float32. The value is
that of `losses.cross_entropy` before the mean, in natural units. The exponential is the float32 polynomial of
`cells.py`; sums are float64.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import LANES, load, store

# Least share of the softmax that the symbols without a probability of their own have together. Below it the difference
# of two sums has no digits left.
LEAST_REST = 1e-9


@compiled
def softmax_cross_entropy(
    rows, size, logits, targets, scale, d_logits_out, kept, weight, soft_symbols, soft_probabilities
):
    """Returns the sum of the losses of all rows, in float64. Its gradient times `scale` goes to `d_logits_out`.

    kept   : soft targets per row; 0 for none
    weight : share of the soft targets in the loss
    """
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
        factor = np.float32(scale / norm)
        if kept == 0:
            total += np.log(norm) - below
            for i in range(size):
                d_logits_out[at + i] *= factor
            d_logits_out[at + target] -= scale
            continue
        named, mass, expected = 0.0, 0.0, 0.0
        for j in range(row * kept, (row + 1) * kept):
            i, share = at + soft_symbols[j], np.float64(soft_probabilities[j])
            named += d_logits_out[i]
            mass += share
            expected += share * (np.float64(logits[i]) - np.float64(largest))
        rest = max(0.0, 1.0 - mass)
        others = max(norm - named, LEAST_REST * norm)
        soft = np.log(norm) * (mass + rest) - expected - rest * np.log(others)
        total += (1.0 - weight) * (np.log(norm) - below) + weight * soft
        factor_of_others = np.float32(scale / norm * (1.0 - weight * rest * norm / others))
        for i in range(size):
            d_logits_out[at + i] *= factor_of_others
        for j in range(row * kept, (row + 1) * kept):
            i = at + soft_symbols[j]
            value = cells.exp_float32(logits[i] - largest) * factor
            d_logits_out[i] = value - np.float32(weight * scale) * soft_probabilities[j]
        d_logits_out[at + target] -= (1.0 - weight) * scale
    return total
