"""What the products of training work in: a window's, out of memory that the next one gets again."""

from __future__ import annotations

import math
import sys

import numpy as np
from numpy.typing import DTypeLike

from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.memory import aligned_zeros
from eventrnn.cpu.plan import scratch_shapes
from eventrnn.training.bptt.kernels import event_lists, sddmm, spmm

# Events by row or by unit, as `lists` has them: order, starts, ids, sent.
Lists = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Scratch:
    """Arrays of the shapes that the kernels ask for, a row for each of so many threads where they need their own."""

    def __init__(self, arena: Arena, threads: int):
        self.take, self.threads = arena.take, threads

    def engine(self, inputs: int, rows: int, most: int) -> tuple[np.ndarray, ...]:
        """Of `traverse.propagate_all`: `rows` drives, units that store up to `most` pieces."""
        return tuple(
            self.take(*shape, dtype=kind) for shape, kind in scratch_shapes(self.threads, inputs, rows, most, 0)
        )

    def shares(self) -> tuple[np.ndarray, np.ndarray]:
        """Of `balance`: how long threads waited, and where each thread's shares begin and end."""
        return np.zeros((2, self.threads), np.int64), np.zeros((self.threads, self.threads + 1), np.int64)

    def events(self, m_rows: int, c_rows: int, *threads: int, tile: int = event_lists.TILE_ROWS) -> Lists:
        """For the events of `c_rows` sums, in tiles of the `m_rows` rows that are added."""
        take, tiles = self.take, -(-m_rows // tile)
        most = tiles * (c_rows * tile + LANES)
        return (
            take(*threads, tiles * c_rows, dtype=np.int32), take(*threads, tiles * (c_rows + 1), dtype=np.int64),
            take(*threads, most, dtype=np.int32), take(*threads, most),
        )  # fmt: skip

    def bins(self) -> np.ndarray:
        """To sort the lists of a tile by their lengths."""
        return self.take(self.threads, spmm.PIECE_ROWS + 2, dtype=np.int64)

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """For the events of one row of n numbers: which, and what."""
        return self.take(self.threads, n + LANES, dtype=np.int32), self.take(self.threads, n + LANES)

    def piece_tile(self, width: int) -> np.ndarray:
        """A tile of so many columns of the rows that are added to pieces."""
        return self.take(self.threads, spmm.PIECE_ROWS * width)

    def strip(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """A tile of the rows that are added, and a strip of so many sums."""
        return self.take(self.threads, event_lists.TILE_ROWS * spmm.STRIP), self.take(self.threads, rows * spmm.STRIP)

    def pairs(self, tiled: bool, n: int, rows: int, *ranges: int) -> tuple[np.ndarray, ...]:
        """What `sweeps` lists the pairs of `rows` rows and n units in; `tiled`, also their tiles and sums, and the
        units' weights in chunks, for ranges of so many columns. Threads need not be at the same rows."""
        take, parts, units, step = self.take, self.threads, n if tiled else 0, event_lists.tile_rows(rows)
        every = -(-rows // step) * units
        pairs, chunks = every * (step + event_lists.PAIRS), max(-(-columns // sddmm.CHUNK) for columns in ranges)
        return (
            take(len(ranges), chunks * units * sddmm.CHUNK),
            take(parts, n * (step if tiled else rows), dtype=np.int32), take(parts, n, dtype=np.int64), *self.row(n),
            take(parts, every, dtype=np.int64), take(parts, every, dtype=np.int64),
            take(parts, pairs, dtype=np.int32), take(parts, pairs), take(parts, step * sddmm.CHUNK),
        )  # fmt: skip


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
