"""Memory of the training kernels: scratch arrays in the shapes that kernels need, from an arena that reuses them."""

from __future__ import annotations

import math
import sys

import numpy as np
from numpy.typing import DTypeLike

from eventrnn.cpu import tables
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.memory import aligned_zeros
from eventrnn.cpu.plan import workspace_shapes
from eventrnn.training.bptt.kernels import event_lists, sddmm, spmm
from eventrnn.training.bptt.kernels.records import (
    ActivePairs,
    CompressedEvents,
    ListScratch,
    StripScratch,
)


class WorkspaceBuilder:
    """Builds the scratch records of `kernels/records.py` for a number of threads, with memory of an arena."""

    def __init__(self, arena: Arena, threads: int):
        self.take, self.threads = arena.take, threads

    def product(self, inputs: int, rows: int, most: int) -> tables.Workspace:
        """Workspace of `propagate_all`, with a leading axis of threads.

        It serves `rows` drives and up to `most` stored segments per unit.
        """
        shapes = workspace_shapes(self.threads, inputs, rows, most, 0)
        return tables.Workspace(*(self.take(*shape, dtype=kind) for shape, kind in shapes))

    def step_events(self, n: int, batch: int) -> tables.EventLists:
        """Event lists of three steps, `batch` rows each, with a list per row and thread.

        Every list has space for one vector past its last event.
        """
        take, rows = self.take, 3 * batch
        size = rows * (n + LANES * self.threads) + LANES
        slots = rows * self.threads
        return tables.EventLists(
            take(size, dtype=np.int32), take(size), take(slots, dtype=np.int64), take(slots, dtype=np.int64)
        )

    def row_events(self, n: int, rows: int) -> tables.EventLists:
        """For each thread the event lists of `rows` rows of n elements."""
        take, threads, size = self.take, self.threads, rows * n + LANES
        return tables.EventLists(
            take(threads, size, dtype=np.int32),
            take(threads, size),
            take(threads, rows, dtype=np.int64),
            take(threads, rows, dtype=np.int64),
        )

    def event_lists(
        self, m_rows: int, c_rows: int, *threads: int, tile: int = event_lists.TILE_ROWS
    ) -> CompressedEvents:
        """Event lists of `c_rows` sums over `m_rows` rows, in tiles of `tile` of the rows that are added.

        threads : the number of threads, for a leading axis of threads; nothing for arrays without that axis
        """
        take, tiles = self.take, -(-m_rows // tile)
        most = tiles * (c_rows * tile + LANES)
        return CompressedEvents(
            take(*threads, tiles * c_rows, dtype=np.int32),
            take(*threads, tiles * (c_rows + 1), dtype=np.int64),
            take(*threads, most, dtype=np.int32),
            take(*threads, most),
        )

    def list_scratch(self, n: int) -> ListScratch:
        """Scratch to build event lists of n rows or units."""
        take, threads = self.take, self.threads
        return ListScratch(
            take(threads, n, dtype=np.int64),
            take(threads, spmm.SEGMENT_ROWS + 2, dtype=np.int64),
            take(threads, n + LANES, dtype=np.int32),
            take(threads, n + LANES),
        )

    def segment_tile(self, width: int) -> np.ndarray:
        """For each thread a tile of the deltas, as wide as a segment."""
        return self.take(self.threads, spmm.SEGMENT_ROWS * width)

    def strip(self, rows: int) -> StripScratch:
        """For each thread a tile of the rows that are added, and a strip of `rows` sums."""
        return StripScratch(
            self.take(self.threads, event_lists.TILE_ROWS * spmm.STRIP), self.take(self.threads, rows * spmm.STRIP)
        )

    def pairs(self, tiled: bool, n: int, rows: int) -> ActivePairs:
        """For each thread the lists of active pairs of `rows` rows and n units; with `tiled` also the lists by tile.

        Every thread has lists of its own, because threads may be at different rows.
        """
        take, threads, step = self.take, self.threads, event_lists.tile_rows(rows)
        lists = -(-rows // step) * n if tiled else 0
        size = lists * (step + event_lists.PAIRS)
        return ActivePairs(
            samples=take(threads, n * (step if tiled else rows), dtype=np.int32),
            counts=take(threads, n, dtype=np.int64),
            hit_units=take(threads, n + LANES, dtype=np.int32),
            hit_values=take(threads, n + LANES),
            tile_begins=take(threads, lists, dtype=np.int64),
            tile_counts=take(threads, lists, dtype=np.int64),
            tile_samples=take(threads, size, dtype=np.int32),
            sums=take(threads, size),
            delta_tile=take(threads, step * sddmm.CHUNK),
        )

    def chunks(self, n: int, columns: int) -> np.ndarray:
        """Space for the packed weights of n units and `columns` columns, as `sddmm_dense` reads them."""
        return self.take(-(-columns // sddmm.CHUNK) * n * sddmm.CHUNK)


# The largest number of buffers of one size and dtype that are kept. The tapes of two windows need fewer.
MOST_BUFFERS = 256


class Arena:
    """Hands out arrays, and hands out their memory again once no array or view refers to it.

    A training window allocates hundreds of megabytes; fresh pages would cost more than the kernels that fill them. The
    lifetime of a tape is not known here (a caller may keep several windows), so the arena cannot reset itself per
    window. Instead it counts the references to the object that owns the memory.

    This depends on CPython: `sys.getrefcount` is exact only where all references are counted at once, that is with the
    GIL. NumPy makes this owner the base of every view, also of a view of a view, so the count exceeds its idle value
    exactly as long as a view is alive. Kernels take no references of their own, and their callers hold the arrays until
    all threads are done. Without the GIL (free-threaded builds), or on another interpreter, no buffer is used again:
    every array is then new memory, which is slower and correct.
    """

    def __reduce__(self):
        # The number of references says which memory is idle, so a copy begins without any.
        return Arena, ()

    def __init__(self):
        self.buffers: dict[tuple, list[_Buffer]] = {}

    def take(self, *shape: int, dtype: DTypeLike = np.float32) -> np.ndarray:
        """An uninitialised array. It may contain anything, also values that are not finite."""
        size = math.prod(shape)
        if not _COUNTS_ARE_EXACT:
            return aligned_zeros(size, dtype).reshape(shape)
        kept = self.buffers.setdefault((size, np.dtype(dtype)), [])
        for buffer in kept:
            if buffer.references() == buffer.idle:
                return buffer.array.reshape(shape)
        if len(kept) == MOST_BUFFERS:
            # The arrays that refer to it keep the memory alive.
            del kept[0]
        kept.append(_Buffer(size, dtype))
        return kept[-1].array.reshape(shape)


# CPython with the GIL. `sys._is_gil_enabled` is new in Python 3.13; before it, there is always a GIL.
_COUNTS_ARE_EXACT = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()


class _Buffer:
    """Memory, and the object that owns it, which is the base of every view."""

    def __init__(self, size: int, dtype: DTypeLike):
        self.array = aligned_zeros(size, dtype)
        self.owner = self.array.base
        self.idle = self.references()

    def references(self) -> int:
        """The present number of references to the owner."""
        return sys.getrefcount(self.owner)
