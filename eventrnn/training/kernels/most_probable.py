"""The most probable symbols of rows of scores.

A thread owns consecutive rows. Arrays are flat and the caller's: scores (rows, size) float32; scratch (threads, size)
float32; the results (rows, kept) int32 and float32. The bits do not depend on the number of threads.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled, internal
from eventrnn.cpu.kernels.simd import LANES, load, store


@internal
def insert(score, symbol, first, last, scores_out, symbols_out):
    """Insert a symbol into the descending scores from `first` to `last`, the last of which is lost."""
    j = last
    while j > first and scores_out[j - 1] < score:
        scores_out[j] = scores_out[j - 1]
        symbols_out[j] = symbols_out[j - 1]
        j -= 1
    scores_out[j] = score
    symbols_out[j] = symbol


@compiled
def most_probable(thread, threads, rows, size, kept, scores, scratch, symbols_out, probabilities_out):
    """The `kept` symbols with the highest scores of each row, highest first, and their shares of the softmax.

    Of equal scores that of the lower symbol stands first. 1 <= kept <= size.
    """
    own, whole = thread * size, size // LANES * LANES
    for row in range(rows * thread // threads, rows * (thread + 1) // threads):
        at, to = row * size, row * kept
        # The highest scores so far stand in `probabilities_out`, in descending order.
        for i in range(kept):
            insert(scores[at + i], i, to, to + i, probabilities_out, symbols_out)
        lowest = probabilities_out[to + kept - 1]
        for i in range(kept, size):
            score = scores[at + i]
            if score > lowest:
                insert(score, i, to, to + kept - 1, probabilities_out, symbols_out)
                lowest = probabilities_out[to + kept - 1]
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
