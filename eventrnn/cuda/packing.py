"""Weights as the kernels walk them: strips of one gate of a few units, by presynaptic unit.

A tile is `width` (at most 32) neighbouring units, a strip one gate of a tile: strip `tile * gates + gate`. A warp walks
a strip, a lane an output, events in ascending order. Plain NumPy; knows no CUDA.

Dense   : a strip holds rows of `width` weights, row j of presynaptic unit j.
Masked  : a strip holds, for presynaptic unit j, a word that says which outputs it reaches and where those weights
          begin; weights lie without gaps. Serves CSR, blocks of any shape and N:M alike; only stored weights count.
Runs    : masked, where all the outputs that a unit reaches in a strip are neighbours, as in wide blocks. The second
          half of the word then says where lane 0's weight would be, and nobody has to count bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eventrnn.cuda.tables import DENSE, LANES, MASKED, RUNS, STRIPS_PER_GROUP
from eventrnn.weights import CSR, NM, BlockCSR, Dense, Weights

# Values that a strip begins at multiples of: 16 bytes of the narrowest.
ALIGNED = 8


@dataclass(frozen=True)
class Strips:
    """One matrix in strips.

    Attributes
    ----------
    kind   : DENSE, MASKED or RUNS
    values : (stored,) float32, or uint16 bits of bfloat16; int8 is decoded to float32
    table  : (strips, n_pre, 2) int32: mask of outputs, and where from the strip's start on; empty for DENSE
    starts : (strips + 1,) int64 where each strip's values begin
    shape  : (n_pre, gates, units)
    width  : units of a tile
    """

    kind: int
    values: np.ndarray
    table: np.ndarray
    starts: np.ndarray
    shape: tuple[int, int, int]
    width: int

    @property
    def tiles(self) -> int:
        return -(-self.shape[2] // self.width)

    def tile_bytes(self, tiles: int) -> tuple[int, int]:
        """Most bytes of values and of table that so many neighbouring tiles have, both multiples of 16."""
        gates = self.shape[1]
        edges = self.starts[::gates]
        ends = edges[np.minimum(np.arange(self.tiles) + tiles, self.tiles)]
        most = int((ends - edges[:-1]).max(initial=0)) + LANES
        table = 8 * self.shape[0] * gates * tiles if self.kind != DENSE else 0
        return _up(most * self.values.itemsize, 16), _up(table, 16)


@dataclass(frozen=True)
class CompactStrips:
    """Strips once more: for each only the units that reach it, what is looked up there at every step.

    Attributes
    ----------
    units  : (reached,) int32, by strip and ascending: 4 times the unit, its offset in a row of outputs
    rows   : (reached + 1, 32) values of that unit, zero where nothing is stored, in the type of the strips
    firsts : (strips + 1,) int64 where each strip's begin
    """

    units: np.ndarray
    rows: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, strips: Strips) -> CompactStrips:
        n_pre = strips.shape[0]
        if strips.kind == DENSE:
            count = len(strips.starts) - 1
            rows = np.zeros((count * n_pre + 1, LANES), strips.values.dtype)
            at = strips.starts[:-1, None] + np.arange(n_pre * strips.width)
            rows[:-1, : strips.width] = strips.values[at].reshape(-1, strips.width)
            return cls(np.tile(4 * np.arange(n_pre, dtype=np.int32), count), rows, n_pre * np.arange(count + 1))
        strip, unit = np.nonzero(strips.table[:, :, 0])
        counts = np.bincount(strip, minlength=len(strips.table))
        rows = np.zeros((len(unit) + 1, LANES), strips.values.dtype)
        kept, rank = _kept(strips)
        kept, rank = kept[strip, unit], np.broadcast_to(rank, kept.shape)[strip, unit]
        at = strips.starts[strip][:, None] + strips.table[strip, unit, 1:] + rank
        rows[:-1, : strips.width][kept] = strips.values[at[kept]]
        return cls((4 * unit).astype(np.int32), rows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


@dataclass(frozen=True)
class GroupedStrips:
    """The same weights by lots of neighbouring strips, for who looks a unit up once for all strips of a lot.

    Attributes
    ----------
    index  : (lots, n_pre) int32; from bit `STRIPS_PER_GROUP` on, which of the lot's rows is the unit's first; below,
             a bit for each of the lot's strips that it reaches
    rows   : (reached + 1, 32) values, by lot, unit and strip
    firsts : (lots + 1,) int64 where each lot's rows begin
    """

    index: np.ndarray
    rows: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, reached: CompactStrips, n_pre: int, together: int) -> GroupedStrips:
        count = len(reached.firsts) - 1
        strip = np.repeat(np.arange(count), np.diff(reached.firsts))
        lot, unit = strip // together, reached.units // 4
        order = np.lexsort((strip, unit, lot))
        firsts = np.append(reached.firsts[:-1:together], reached.firsts[-1])
        index = np.zeros((len(firsts) - 1, n_pre), np.int32)
        # Backwards, so that what stays is the first of a unit's rows.
        last_first = order[::-1]
        rank = (np.arange(len(order)) - firsts[lot[order]])[::-1]
        index[lot[last_first], unit[last_first]] = rank << STRIPS_PER_GROUP
        np.add.at(index, (lot, unit), np.left_shift(1, strip % together))
        return cls(index, reached.rows[np.append(order, len(order))], firsts)


def check_format(name: str, weights: Weights) -> None:
    """Refuse a format that `pack` does not know."""
    if not isinstance(weights, Dense | CSR | BlockCSR | NM):
        raise TypeError(
            f"{name}: the cuda backend cannot run format {type(weights).__name__}; convert to dense, csr, block or nm"
        )


def pack(weights: Weights, gates: int, width: int) -> Strips:
    """A (n_pre, gates * units) matrix in strips. O(size of the matrix)."""
    n_pre, n_post = weights.shape
    units = n_post // gates
    values = weights.to_dense()
    if weights.storage == "bfloat16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    if isinstance(weights, Dense):
        strips = _in_strips(values, gates, width)
        flat, starts = _aligned(strips.ravel(), np.full(len(strips), n_pre * width))
        return Strips(DENSE, flat, np.zeros(0, np.int32), starts, (n_pre, gates, units), width)
    kept, strips = _in_strips(weights.kept(), gates, width), _in_strips(values, gates, width)
    stored = kept.sum(axis=2)
    firsts = np.cumsum(stored, axis=1) - stored
    flat, starts = _aligned(strips[kept], stored.sum(axis=1))
    masks = np.zeros((*kept.shape[:2], LANES), bool)
    masks[:, :, :width] = kept
    words = np.packbits(masks, axis=2, bitorder="little").view(np.int32)
    first_lane, last_lane = kept.argmax(axis=2), width - 1 - kept[:, :, ::-1].argmax(axis=2)
    runs = bool((stored == last_lane - first_lane + 1)[stored > 0].all())
    if runs:
        firsts = firsts - first_lane
    table = np.concatenate([words, firsts[:, :, None].astype(np.int32)], axis=2)
    return Strips(RUNS if runs else MASKED, flat, np.ascontiguousarray(table), starts, (n_pre, gates, units), width)


def unpack(strips: Strips) -> np.ndarray:
    """The (n_pre, gates * units) matrix again, zero where nothing is stored, in the type of the values."""
    n_pre, gates, units = strips.shape
    dense = np.zeros((strips.tiles * gates, n_pre, strips.width), strips.values.dtype)
    if strips.kind == DENSE:
        rows = strips.starts[:-1, None] + np.arange(n_pre * strips.width)
        dense[:] = strips.values[rows].reshape(dense.shape)
    else:
        kept, rank = _kept(strips)
        at = strips.starts[:-1, None, None] + strips.table[:, :, 1:] + rank
        dense[kept] = strips.values[np.broadcast_to(at, kept.shape)[kept]]
    by_tile = dense.reshape(strips.tiles, gates, n_pre, strips.width).transpose(2, 1, 0, 3)
    return by_tile.reshape(n_pre, gates, strips.tiles * strips.width)[:, :, :units].reshape(n_pre, gates * units)


def _kept(strips: Strips) -> tuple[np.ndarray, np.ndarray]:
    """Of masked strips, by strip, unit and output, which are stored, and how far from where the table points."""
    words = np.ascontiguousarray(strips.table[:, :, :1]).view(np.uint8)
    kept = np.unpackbits(words, axis=2, bitorder="little")[:, :, : strips.width].astype(bool)
    return kept, np.arange(strips.width) if strips.kind == RUNS else np.cumsum(kept, axis=2) - 1


def per_strip(vector: np.ndarray, gates: int, width: int) -> np.ndarray:
    """A (gates * units,) vector as (strips, 32), zero in the lanes beyond."""
    strips = _in_strips(vector[None, :], gates, width)[:, 0]
    padded = np.zeros((len(strips), LANES), vector.dtype)
    padded[:, :width] = strips
    return padded


def _aligned(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of so many values, each from a whole 16 bytes on, and where; lanes may read a bit around them."""
    padded = _up(lengths, ALIGNED)
    starts = LANES + np.concatenate([[0], np.cumsum(padded)]).astype(np.int64)
    flat = np.zeros(starts[-1] + LANES, values.dtype)
    flat[np.arange(len(values)) + np.repeat(starts[:-1] - (np.cumsum(lengths) - lengths), lengths)] = values
    return flat, starts


def _in_strips(matrix: np.ndarray, gates: int, width: int) -> np.ndarray:
    """(n_pre, gates * units) as (strips, n_pre, width), zero beyond the last unit."""
    n_pre, n_post = matrix.shape
    units = n_post // gates
    tiles = -(-units // width)
    padded = np.zeros((n_pre, gates, tiles * width), matrix.dtype)
    padded[:, :, :units] = matrix.reshape(n_pre, gates, units)
    by_tile = padded.reshape(n_pre, gates, tiles, width).transpose(2, 1, 0, 3)
    return np.ascontiguousarray(by_tile).reshape(tiles * gates, n_pre, width)


def _up(size, multiple: int):
    return -(-size // multiple) * multiple
