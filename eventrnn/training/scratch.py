"""What the products of training work in: a window's, out of memory that the next one gets again."""

from __future__ import annotations

import numpy as np

from eventrnn.plan import scratch_shapes
from eventrnn.simd import LANES
from eventrnn.training import dots, lists, products
from eventrnn.training.memory import Arena

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

    def events(self, m_rows: int, c_rows: int, *threads: int, tile: int = lists.TILE_ROWS) -> Lists:
        """For the events of `c_rows` sums, in tiles of the `m_rows` rows that are added."""
        take, tiles = self.take, -(-m_rows // tile)
        most = tiles * (c_rows * tile + LANES)
        return (
            take(*threads, tiles * c_rows, dtype=np.int32), take(*threads, tiles * (c_rows + 1), dtype=np.int64),
            take(*threads, most, dtype=np.int32), take(*threads, most),
        )  # fmt: skip

    def bins(self) -> np.ndarray:
        """To sort the lists of a tile by their lengths."""
        return self.take(self.threads, products.PIECE_ROWS + 2, dtype=np.int64)

    def row(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """For the events of one row of n numbers: which, and what."""
        return self.take(self.threads, n + LANES, dtype=np.int32), self.take(self.threads, n + LANES)

    def piece_tile(self, width: int) -> np.ndarray:
        """A tile of so many columns of the rows that are added to pieces."""
        return self.take(self.threads, products.PIECE_ROWS * width)

    def strip(self, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """A tile of the rows that are added, and a strip of so many sums."""
        return self.take(self.threads, lists.TILE_ROWS * products.STRIP), self.take(self.threads, rows * products.STRIP)

    def pairs(self, tiled: bool, n: int, rows: int, *ranges: int) -> tuple[np.ndarray, ...]:
        """What `sweeps` lists the pairs of `rows` rows and n units in; `tiled`, also their tiles and sums, and the
        units' weights in chunks, for ranges of so many columns. Threads need not be at the same rows."""
        take, parts, units, step = self.take, self.threads, n if tiled else 0, lists.tile_rows(rows)
        every = -(-rows // step) * units
        pairs, chunks = every * (step + lists.PAIRS), max(-(-columns // dots.CHUNK) for columns in ranges)
        return (
            take(len(ranges), chunks * units * dots.CHUNK),
            take(parts, n * (step if tiled else rows), dtype=np.int32), take(parts, n, dtype=np.int64), *self.row(n),
            take(parts, every, dtype=np.int64), take(parts, every, dtype=np.int64),
            take(parts, pairs, dtype=np.int32), take(parts, pairs), take(parts, step * dots.CHUNK),
        )  # fmt: skip
