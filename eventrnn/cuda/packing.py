"""Weights packed for the CUDA kernels: strips of one gate of a few units, by presynaptic unit. Plain NumPy, no CUDA.

A tile is `width` (at most 32) neighbouring units. A strip is one gate of a tile and has number `tile * gates + gate`.
One warp multiplies one strip, one lane computes one output, events come in ascending order.

Strips have one of three layouts:

- DENSE  : rows of `width` weights, row j of presynaptic unit j.
- MASKED : for each presynaptic unit a mask of the outputs that it reaches and the position of those weights; weights
           are stored without gaps. Serves CSR, blocks of any shape and N:M; only stored weights count.
- RUNS   : MASKED, if all outputs that a unit reaches in a strip are neighbours, as in wide blocks. The position is
           then that of lane 0's weight, so that lanes need not count bits of the mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eventrnn.cuda.tables import DENSE, LANES, MASKED, RUNS, STRIPS_PER_GROUP
from eventrnn.weights import CSR, NM, BlockCSR, Dense, GatedBlocks, Weights

# The values of a strip begin at a multiple of this number: 16 bytes of bfloat16.
ALIGNED = 8


@dataclass(frozen=True)
class Strips:
    """One matrix in strips.

    Attributes
    ----------
    kind   : DENSE, MASKED or RUNS
    values : (stored,) float32, or uint16 bits of bfloat16; int8 is decoded to float32
    table  : (strips, n_pre, 2) int32, mask of outputs and position of the weights after the strip's start; empty for
             DENSE
    starts : (strips + 1,) int64, position of each strip's values
    shape  : (n_pre, gates, units)
    width  : units per tile
    """

    kind: int
    values: np.ndarray
    table: np.ndarray
    starts: np.ndarray
    shape: tuple[int, int, int]
    width: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return -(-self.shape[2] // self.width)

    def tile_bytes(self, tiles: int) -> tuple[int, int]:
        """Bytes of values and of table of any `tiles` neighbouring tiles, at most; both multiples of 16."""
        gates = self.shape[1]
        edges = self.starts[::gates]
        ends = edges[np.minimum(np.arange(self.tiles) + tiles, self.tiles)]
        most = int((ends - edges[:-1]).max(initial=0)) + LANES
        table = 8 * self.shape[0] * gates * tiles if self.kind != DENSE else 0
        return _round_up(most * self.values.itemsize, 16), _round_up(table, 16)


@dataclass(frozen=True)
class CompactStrips:
    """Strips that list only the presynaptic units that have weights in them; kernels gather the outputs of these units.

    Attributes
    ----------
    units  : (entries,) int32, by strip and ascending: 4 times the unit, its byte offset in a row of float32 outputs
    rows   : (entries + 1, 32) weights of that unit, zero where nothing is stored, in the type of `Strips.values`
    begins : (strips + 1,) int64, first entry of each strip
    """

    units: np.ndarray
    rows: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, strips: Strips) -> CompactStrips:
        """The same matrix as `strips`. O(stored weights)."""
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
        stored, rank = stored_mask(strips)
        stored, rank = stored[strip, unit], np.broadcast_to(rank, stored.shape)[strip, unit]
        at = strips.starts[strip][:, None] + strips.table[strip, unit, 1:] + rank
        rows[:-1, : strips.width][stored] = strips.values[at[stored]]
        return cls((4 * unit).astype(np.int32), rows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


@dataclass(frozen=True)
class GroupedStrips:
    """The entries of `CompactStrips` by groups of neighbouring strips, so that one look-up of a unit serves a group.

    Attributes
    ----------
    index  : (groups, n_pre) int32; bit k below bit STRIPS_PER_GROUP: whether the unit reaches strip k of the group; the
             higher bits: the first of the unit's rows, counted from the group's first row
    rows   : (entries + 1, 32) weights, by group, unit and strip
    begins : (groups + 1,) int64, first row of each group
    """

    index: np.ndarray
    rows: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, compact: CompactStrips, n_pre: int, strips_per_group: int) -> GroupedStrips:
        """The same matrix as `compact`, of `n_pre` presynaptic units. O(entries)."""
        count = len(compact.begins) - 1
        strip = np.repeat(np.arange(count), np.diff(compact.begins))
        group, unit = strip // strips_per_group, compact.units // 4
        order = np.lexsort((strip, unit, group))
        begins = np.append(compact.begins[:-1:strips_per_group], compact.begins[-1])
        index = np.zeros((len(begins) - 1, n_pre), np.int32)
        # The assignment goes backwards, so that the first of a unit's rows is written last.
        backwards = order[::-1]
        rank = (np.arange(len(order)) - begins[group[order]])[::-1]
        index[group[backwards], unit[backwards]] = rank << STRIPS_PER_GROUP
        np.add.at(index, (group, unit), np.left_shift(1, strip % strips_per_group))
        return cls(index, compact.rows[np.append(order, len(order))], begins)


def check_format(name: str, weights: Weights) -> None:
    """Raise TypeError for a format that neither `pack` nor `gated_matrix.py` can pack."""
    if not isinstance(weights, Dense | CSR | BlockCSR | NM | GatedBlocks):
        raise TypeError(
            f"{name}: the cuda backend cannot run format {type(weights).__name__}; convert to dense, csr, block or nm"
        )


def pack(weights: Weights, gates: int, width: int) -> Strips:
    """Pack a (n_pre, gates * units) matrix into strips. O(n_pre * gates * units) time and memory."""
    n_pre, n_post = weights.shape
    units = n_post // gates
    values = weights.to_dense()
    if weights.storage == "bfloat16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    if isinstance(weights, Dense):
        strips = in_strips(values, gates, width)
        flat, starts = _aligned(strips.ravel(), np.full(len(strips), n_pre * width))
        return Strips(DENSE, flat, np.zeros(0, np.int32), starts, (n_pre, gates, units), width)
    stored, strips = in_strips(weights.kept(), gates, width), in_strips(values, gates, width)
    n_stored = stored.sum(axis=2)
    begins = np.cumsum(n_stored, axis=1) - n_stored
    flat, starts = _aligned(strips[stored], n_stored.sum(axis=1))
    masks = np.zeros((*stored.shape[:2], LANES), bool)
    masks[:, :, :width] = stored
    words = np.packbits(masks, axis=2, bitorder="little").view(np.int32)
    first_lane, last_lane = stored.argmax(axis=2), width - 1 - stored[:, :, ::-1].argmax(axis=2)
    runs = bool((n_stored == last_lane - first_lane + 1)[n_stored > 0].all())
    if runs:
        begins = begins - first_lane
    table = np.concatenate([words, begins[:, :, None].astype(np.int32)], axis=2)
    return Strips(RUNS if runs else MASKED, flat, np.ascontiguousarray(table), starts, (n_pre, gates, units), width)


def stored_mask(strips: Strips) -> tuple[np.ndarray, np.ndarray]:
    """Which weights of MASKED or RUNS strips are stored, and their distance from the position in the table.

    Both have the axes (strip, presynaptic unit, output); the distance may have fewer, and is valid where one is stored.
    """
    words = np.ascontiguousarray(strips.table[:, :, :1]).view(np.uint8)
    stored = np.unpackbits(words, axis=2, bitorder="little")[:, :, : strips.width].astype(bool)
    return stored, np.arange(strips.width) if strips.kind == RUNS else np.cumsum(stored, axis=2) - 1


def per_strip(vector: np.ndarray, gates: int, width: int) -> np.ndarray:
    """A (gates * units,) vector as (strips, 32), zero in the lanes beyond the tile."""
    strips = in_strips(vector[None, :], gates, width)[:, 0]
    padded = np.zeros((len(strips), LANES), vector.dtype)
    padded[:, :width] = strips
    return padded


def _aligned(values: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of strips of the given lengths, each aligned to 16 bytes, and where each begins.

    Zeros before the first and after the last strip allow lanes to read beyond them.
    """
    padded = _round_up(lengths, ALIGNED)
    starts = LANES + np.concatenate([[0], np.cumsum(padded)]).astype(np.int64)
    flat = np.zeros(starts[-1] + LANES, values.dtype)
    flat[np.arange(len(values)) + np.repeat(starts[:-1] - (np.cumsum(lengths) - lengths), lengths)] = values
    return flat, starts


def in_strips(matrix: np.ndarray, gates: int, width: int) -> np.ndarray:
    """A (n_pre, gates * units) matrix as (strips, n_pre, width), zero beyond the last unit."""
    n_pre, n_post = matrix.shape
    units = n_post // gates
    tiles = -(-units // width)
    padded = np.zeros((n_pre, gates, tiles * width), matrix.dtype)
    padded[:, :, :units] = matrix.reshape(n_pre, gates, units)
    by_tile = padded.reshape(n_pre, gates, tiles, width).transpose(2, 1, 0, 3)
    return np.ascontiguousarray(by_tile).reshape(tiles * gates, n_pre, width)


def _round_up(size, multiple: int):
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple
