"""MOVED."""

from __future__ import annotations

import itertools
import mmap
from contextlib import suppress

import numpy as np

LARGE_PAGE = 1 << 21


# Where large arrays begin, in bytes: so far behind where the last one did, over what the sets of an L2 cache span.
STAGGER, APART = 21 * 64, 128 << 10

_made = itertools.count()


def aligned_zeros(size: int, dtype) -> np.ndarray:
    """Zeros starting on a cache line; on large pages where there are many and the system has them.

    Rows picked at random from small pages would miss the address cache as often as the data cache. On large pages,
    arrays that all began at the same place of one and are read side by side would compete for the same sets of a cache
    (a window of training with 90 % of blocks pruned: 104 ms, 82 with places apart), so each begins elsewhere.
    """
    nbytes = size * np.dtype(dtype).itemsize
    if nbytes < LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        raw = np.zeros(nbytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        return raw[start : start + nbytes].view(dtype)
    # Private: memory that is shared, as `mmap` makes it by itself, gets no large pages.
    memory = mmap.mmap(-1, _up(nbytes + APART, LARGE_PAGE) + LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel may have been built without them.
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(memory, np.uint8)
    start = -raw.ctypes.data % LARGE_PAGE + next(_made) * STAGGER % APART
    return raw[start : start + nbytes].view(dtype)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
