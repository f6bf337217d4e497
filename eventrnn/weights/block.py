"""The format "block": blocks of weights in compressed sparse rows of blocks (BSR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import numpy as np
import scipy.sparse as sp

from eventrnn._checks import check_finite, float32_array, need_pair
from eventrnn.weights.base import (
    Weights,
    check_indices,
    finite_matrix,
    need_index,
    need_shape,
    need_sparse,
    need_values,
    per_unit,
    row_pointers,
    shape_of,
)

#: Columns of block segments whose products can be made in integers, and the most units of such a matrix.
INTEGER_COLUMNS, MOST_INTEGER_UNITS = 64, 1 << 16


@dataclass(frozen=True, eq=False, repr=False)
class BlockCSR(Weights):
    """Blocks of `block = (r, c)` entries, r presynaptic by c postsynaptic, on a grid that starts at entry [0, 0].

    A matrix whose size is not a multiple of the block is padded with zeros at its far edges. Padding columns are stored
    and counted as executed. The values of one presynaptic unit are contiguous: for unit `k * r + s`, in block row k
    with `n_k` blocks, they begin at `(indptr[k] * r + s * n_k) * c` and are `n_k * c` long.

    Attributes
    ----------
    indptr  : (ceil(n_pre / r) + 1,) int64, in blocks
    indices : (n_blocks,) int32, block column, strictly ascending within a block row
    values  : (n_blocks * r * c,)
    shape   : (n_pre, n_post), unpadded
    block   : (r, c)
    scales  : (n_pre,) float32 for int8, one per unit and not per block; else None

    Examples
    --------
    >>> dense = np.array([[0, 2, 0, 0], [1, 0, 0, 3]], np.float32)  # two units, four outputs
    >>> weights = BlockCSR.from_dense(dense, block=(1, 2))
    >>> weights.indptr.tolist(), weights.indices.tolist(), weights.values.tolist()
    ([0, 1, 3], [0, 0, 1], [0.0, 2.0, 1.0, 0.0, 0.0, 3.0])
    >>> weights.stored, weights.nnz  # zeros inside blocks are stored
    (6, 3)
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]
    block: tuple[int, int]
    scales: np.ndarray | None = None
    name: ClassVar[str] = "block"

    def __post_init__(self):
        need_shape(self.shape)
        check_block(self.block, self.shape)
        need_values(self.values, self.scales, 1, self.shape[0])
        r, c = self.block
        n_blocks, rest = divmod(len(self.values), r * c)
        if rest:
            raise ValueError(f"block values: got {len(self.values)} values, need a multiple of {r} x {c}")
        need_index(self.indptr, self.indices, -(-self.shape[0] // r), n_blocks)

    def check(self, full: bool = False) -> None:
        """With `full`, check order and range of block columns, finite values and zero padding. Raises ValueError.

        The sizes were checked when the record was made.
        """
        if full:
            self.check_index()
            self._check_values()
            if self._padding().any():
                raise ValueError(f"block values: non-zero padding beyond the shape {self.shape}")

    def check_index(self) -> None:
        r, c = self.block
        need_index(self.indptr, self.indices, -(-self.shape[0] // r), len(self.values) // (r * c))
        check_indices(self.indptr, self.indices, -(-self.shape[1] // self.block[1]))

    @classmethod
    def from_dense(cls, dense: np.ndarray, *, block: tuple[int, int]) -> BlockCSR:
        """Store every block that has a non-zero entry. O(size of the matrix).

        Raises ValueError for a block that does not fit the matrix, and for NaN or infinity.
        """
        dense = finite_matrix(dense)
        check_block(block, dense.shape)
        (n_pre, n_post), (r, c) = dense.shape, block
        rows, columns = -(-n_pre // r), -(-n_post // c)
        padded = np.zeros((rows * r, columns * c), np.float32)
        padded[:n_pre, :n_post] = dense
        blocks = padded.reshape(rows, r, columns, c)
        kept_rows, kept_columns = np.nonzero(blocks.any(axis=(1, 3)))
        indptr = row_pointers(kept_rows, rows)
        return cls(
            indptr, kept_columns.astype(np.int32), _unit_major(blocks, indptr, kept_columns), (n_pre, n_post), (r, c)
        )

    @classmethod
    def from_weights(cls, weights: Weights, *, block: tuple[int, int]) -> BlockCSR:
        """Keeps every block where another format has a non-zero weight, as float32. O(stored)."""
        check_block(block, weights.shape)
        (n_pre, n_post), (r, c) = weights.shape, block
        rows, columns = -(-n_pre // r), -(-n_post // c)
        (units, outputs), floats = weights.places(), weights.floats().ravel()
        check_finite("weight", floats)
        # The padding of another grid of blocks lies outside.
        exists = (units < n_pre) & (outputs < n_post)
        units, outputs, floats = units[exists], outputs[exists], floats[exists]
        number = (units // r).astype(np.int64) * columns + outputs // c
        kept = np.unique(number[floats != 0])
        indptr = row_pointers(kept // max(1, columns), rows)
        # A zero may lie in a block that is not kept.
        at = np.searchsorted(kept, number)
        inside = at < len(kept)
        inside[inside] = kept[at[inside]] == number[inside]
        at, units, outputs = at[inside], units[inside], outputs[inside]
        row = units // r
        first, blocks = indptr[row], np.diff(indptr)[row]
        segment = first * r + (units % r) * blocks + (at - first)
        values = np.zeros((len(kept) * r, c), np.float32)
        values[segment, outputs % c] = floats[inside]
        return cls(indptr, (kept % max(1, columns)).astype(np.int32), values.ravel(), (n_pre, n_post), (r, c))

    @classmethod
    def from_scipy(cls, matrix) -> BlockCSR:
        """Convert a scipy.sparse BSR matrix of shape (n_pre, n_post). Raises TypeError for another scipy format."""
        need_sparse(matrix)
        if matrix.format != "bsr":
            raise TypeError(f"block weights: got a scipy {matrix.format} matrix, need bsr; call .tobsr(blocksize)")
        matrix = sp.bsr_array(matrix, copy=True)
        matrix.sum_duplicates()
        indptr = matrix.indptr.astype(np.int64)
        data = float32_array("weights", matrix.data, "(blocks, r, c)")
        values = [data[a:b].transpose(1, 0, 2).ravel() for a, b in zip(indptr[:-1], indptr[1:], strict=True)]
        return cls(
            indptr,
            matrix.indices.astype(np.int32),
            np.concatenate([*values, np.zeros(0, np.float32)]),
            shape_of(matrix),
            (int(data.shape[1]), int(data.shape[2])),
        )

    def to_scipy(self) -> sp.bsr_array:
        """Convert to scipy BSR, as float32. Raises ValueError for a shape that is not a multiple of the block."""
        (n_pre, n_post), (r, c) = self.shape, self.block
        if n_pre % r or n_post % c:
            raise ValueError(
                f"to_scipy: shape {self.shape} is no multiple of block {self.block}, which scipy BSR needs; convert to "
                "csr first"
            )
        return sp.bsr_array((self.blocks(), self.indices.copy(), self.indptr.copy()), shape=self.shape)

    def blocks(self) -> np.ndarray:
        """The blocks as a new array (n_blocks, r, c) float32, decoded, in the order of `indices`."""
        (r, c), floats = self.block, self.floats()
        parts = [
            floats[a * r * c : b * r * c].reshape(r, b - a, c).transpose(1, 0, 2)
            for a, b in zip(self.indptr[:-1], self.indptr[1:], strict=True)
        ]
        return np.concatenate([*parts, np.zeros((0, r, c), np.float32)])

    def to_dense(self) -> np.ndarray:
        """The matrix as a new (n_pre, n_post) float32 array, decoded."""
        return self._spread_out(self.floats().reshape(-1, self.block[1]))

    def kept(self) -> np.ndarray:
        return self._spread_out(np.True_)

    def codes(self) -> np.ndarray:
        """The codes of int8 weights as a new (n_pre, n_post) array; zero where none is stored."""
        return self._spread_out(self.values.reshape(-1, self.block[1]))

    def integer_bits(self) -> int:
        """Bits without the sign of the integers that int8 weights are multiplied with, so that no sum exceeds 31 bits.

        At most 14, which instructions for 16 bits take. A code has 7, and an output adds as many products as it has
        codes that are not zero. O(size of the matrix).
        """
        most = int(np.count_nonzero(self.codes(), axis=0).max(initial=0))
        return min(14, 24 - most.bit_length())

    def _spread_out(self, segments: np.ndarray | np.bool_) -> np.ndarray:
        """A matrix (n_pre, n_post) that holds the segments, or one value for all of them, and else zeros."""
        (n_pre, n_post), (r, c) = self.shape, self.block
        padded = np.zeros(((len(self.indptr) - 1) * r, -(-n_post // c), c), segments.dtype)
        padded[self.segments()] = segments
        return np.ascontiguousarray(padded.reshape(len(padded), -1)[:n_pre, :n_post])

    def segments(self) -> tuple[np.ndarray, np.ndarray]:
        """Unit and block column of each c neighbouring values, (stored / c,) int32 each, in the order of `values`.

        Units of the last block row may lie beyond the matrix.
        """
        r, blocks = self.block[0], np.diff(self.indptr)
        per_unit = np.repeat(blocks, r)
        unit = np.repeat(np.arange(len(per_unit), dtype=np.int32), per_unit)
        # The block columns of a block row are those of each of its r units.
        offset = np.repeat(self.indptr[:-1], r) - (np.cumsum(per_unit) - per_unit)
        block = np.repeat(offset, per_unit)
        block += np.arange(len(block))
        return unit, self.indices[block]

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """See `Weights.places`; the padding too, whose units and outputs lie beyond the matrix."""
        (unit, column), c = self.segments(), self.block[1]
        outputs = (column * np.int32(c))[:, None] + np.arange(c, dtype=np.int32)
        return np.repeat(unit, c), outputs.ravel()

    def _padding(self) -> np.ndarray:
        """Which of the values beyond the edges of the matrix are not zero, boolean."""
        (n_pre, n_post), (r, c) = self.shape, self.block
        kept, blocks = self._not_zero(), np.diff(self.indptr)
        beyond = len(kept) - int(blocks[-1:].sum()) * (-n_pre % r) * c
        last = np.flatnonzero(self.indices == n_post // c) if n_post % c else np.zeros(0, np.int64)
        row = np.searchsorted(self.indptr, last, side="right") - 1
        # Where the values of the last block column begin, (blocks, r): those of unit s follow those of unit s - 1.
        first, within = self.indptr[row] * r, last - self.indptr[row]
        starts = (first + within)[:, None] + blocks[row][:, None] * np.arange(r)
        return np.concatenate([kept[beyond:], kept.reshape(-1, c)[starts.ravel(), n_post % c :].ravel()])

    def fan_out(self) -> np.ndarray:
        r, c = self.block
        begins = np.concatenate([[0], np.cumsum(np.repeat(np.diff(self.indptr) * c, r))])
        return per_unit(self._not_zero(), begins)[: self.shape[0]]

    def stored_out(self) -> np.ndarray:
        r, c = self.block
        return np.repeat(np.diff(self.indptr) * c, r)[: self.shape[0]]

    def row_bytes(self) -> np.ndarray:
        _, c = self.block
        return self._row_bytes(self.stored_out() // c * 4)

    def _detail(self) -> str:
        return f"{self.block[0]}x{self.block[1]}"

    def _spread(self, per_unit: np.ndarray) -> np.ndarray:
        r, c = self.block
        blocks = np.diff(self.indptr)
        # The units of the padding take the scale of the last unit; their weights are zero, so it has no effect.
        unit = np.minimum(np.arange(len(blocks) * r), max(self.shape[0] - 1, 0))
        return np.repeat(per_unit[unit], np.repeat(blocks * c, r))


def takes_integers(weights: Weights) -> TypeGuard[BlockCSR]:
    """Whether the products of a matrix can be made in integers (`reference_products.propagate_integers`).

    It has int8 weights in blocks of 64 columns, or a multiple of them. Integer sums of narrower blocks take longer than
    exact ones: their segments are listed output by output, and each has a part of a vector.
    """
    blocks = isinstance(weights, BlockCSR) and weights.storage == "int8" and weights.block[1] % INTEGER_COLUMNS == 0
    return blocks and weights.shape[0] <= MOST_INTEGER_UNITS


def check_block(block: tuple[int, int], shape: tuple[int, ...], name: str | None = None) -> None:
    """Raise ValueError for a block that is not two sizes >= 1, or larger than the matrix.

    name : name of the matrix in a network, for the message
    """
    rows, columns = need_pair("block", block, "two sizes >= 1 (presynaptic x postsynaptic)")
    if rows <= max(shape[0], 1) and columns <= max(shape[1], 1):
        return
    which, remedy = "the matrix", "choose a smaller one"
    if name is not None:
        which = f"the matrix {name},"
        remedy = f"choose a smaller one, or leave {name} as it is: exempt=('{name}',), --exempt {name}"
    raise ValueError(f"block: {rows}x{columns} is larger than {which} {shape[0]}x{shape[1]}; {remedy}")


def _unit_major(blocks: np.ndarray, indptr: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The stored blocks of a (rows, r, columns, c) array, flat, in the order of `BlockCSR.values`."""
    parts = [
        blocks[row][:, columns[a:b]].ravel() for row, (a, b) in enumerate(zip(indptr[:-1], indptr[1:], strict=True))
    ]
    return np.concatenate([*parts, np.zeros(0, np.float32)])
