"""Large arrays of a window, used again by the next: fresh memory costs more than the work on it."""

from __future__ import annotations

import math
import sys

import numpy as np
from numpy.typing import DTypeLike

from eventrnn.packing import aligned_zeros

# Of one size: a stack's tapes, and those of a window before.
MOST_BUFFERS = 256


class Arena:
    """Hands out arrays, and the same memory again once nothing refers to an array or a view of it any more."""

    def __init__(self):
        self.buffers: dict[tuple, list[_Buffer]] = {}

    def take(self, *shape: int, dtype: DTypeLike = np.float32) -> np.ndarray:
        """An array of a shape, its content whatever was there."""
        size = math.prod(shape)
        kept = self.buffers.setdefault((size, np.dtype(dtype)), [])
        for buffer in kept:
            if buffer.references() == buffer.idle:
                return buffer.array.reshape(shape)
        if len(kept) == MOST_BUFFERS:
            # Whoever still has it keeps it alive.
            del kept[0]
        kept.append(_Buffer(size, dtype))
        return kept[-1].array.reshape(shape)


class _Buffer:
    """Memory and the array that owns it, which is the base of every view."""

    def __init__(self, size: int, dtype: DTypeLike):
        self.array = aligned_zeros(size, dtype)
        self.owner = self.array.base
        self.idle = self.references()

    def references(self) -> int:
        return sys.getrefcount(self.owner)
