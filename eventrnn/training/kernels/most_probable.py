"""The most probable symbols of rows of scores.

A thread owns consecutive rows. Arrays are flat and the caller's: scores (rows, size) float32; scratch (threads, size)
float32; the results (rows, kept) int32 and float32. The bits do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import LANES, load, store


@compiled
def most_probable(thread, threads, rows, size, kept, scores, scratch, symbols_out, probabilities_out):
    """The `kept` symbols with the highest scores of each row, highest first, and their shares of the softmax.

    Of equal scores that of the lower symbol stands first. 1 <= kept <= size.
    """
    own, whole = thread * size, size // LANES * LANES
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        at, to = row * size, row * kept
        # The scores of the symbols so far stand in `probabilities_out`, in descending order.
        count = 0
        for i in range(size):
            score = scores[at + i]
            if count < kept:
                count += 1
            elif score <= probabilities_out[to + kept - 1]:
                continue
            j = to + count - 1
            while j > to and probabilities_out[j - 1] < score:
                probabilities_out[j], symbols_out[j] = probabilities_out[j - 1], symbols_out[j - 1]
                j -= 1
            probabilities_out[j], symbols_out[j] = score, i
        largest = probabilities_out[to]
        for i in range(0, whole, LANES):
            store(scratch, own + i, cells.exp_float32(load(scores, at + i) - largest))
        for i in range(whole, size):
            scratch[own + i] = cells.exp_float32(scores[at + i] - largest)
        norm = 0.0
        for i in range(size):
            norm += scratch[own + i]
        for j in range(to, to + kept):
            probabilities_out[j] = np.float32(np.float64(scratch[own + symbols_out[j]]) / norm)
