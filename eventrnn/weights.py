"""Weight formats, stored by presynaptic unit: what leaves unit `j` lies together.

A format is a frozen record of named arrays over a matrix of shape `(n_pre, n_post)`; `n_post` counts gate rows
(3N for an EGRU layer). Entry `[j, i]` is the weight from `j` to `i`: the transpose of the W of the equations.
Knows nothing of backends: each backend has one traversal a format.

Each format offers `check(full)`, `to_dense`, `from_dense`, `fan_out`, `stored_out`, `nnz`, `stored`, `nbytes`.
`nnz` counts non-zero weights, `stored` what a kernel walks: zeros inside blocks and padding at the edges included.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import scipy.sparse as sp

from eventrnn.events import check_finite


class Weights(ABC):
    """What every format has in common, derived from `fan_out()` and `stored_out()`."""

    name: ClassVar[str]
    values: np.ndarray
    shape: tuple[int, int]

    @abstractmethod
    def check(self, full: bool = False) -> None:
        """Cheap checks of the record; `full` reads every index and value. Raises ValueError."""

    @abstractmethod
    def to_dense(self) -> np.ndarray:
        """A (n_pre, n_post) float32 array of its own."""

    @abstractmethod
    def fan_out(self) -> np.ndarray:
        """Non-zero weights leaving each presynaptic unit, (n_pre,) int64."""

    @abstractmethod
    def stored_out(self) -> np.ndarray:
        """Stored entries a kernel multiplies when unit j sends an event, (n_pre,) int64."""

    @abstractmethod
    def row_bytes(self) -> np.ndarray:
        """Bytes of values and indices read when unit j sends an event, (n_pre,) int64."""

    def __repr__(self) -> str:
        block = f" {self.block[0]}x{self.block[1]}" if isinstance(self, BlockCSR) else ""
        return f"{type(self).__name__}({self.shape[0]}x{self.shape[1]}{block}, {self.nnz} weights)"

    def kept(self) -> np.ndarray:
        """Which entries are stored, (n_pre, n_post) boolean: the mask that pruning left."""
        return np.ones(self.shape, bool)

    @property
    def nnz(self) -> int:
        return int(self.fan_out().sum())

    @property
    def stored(self) -> int:
        return int(self.stored_out().sum())

    @property
    def nbytes(self) -> int:
        """Bytes of values and index arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the record by field name, as saved in a model file."""
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Weights):
    """All entries.

    Attributes
    ----------
    values : (n_pre, n_post) float32, C-contiguous
    """

    values: np.ndarray
    name: ClassVar[str] = "dense"

    def __post_init__(self):
        _need_values(self.values, 2)
        if not self.values.flags.c_contiguous:
            raise ValueError("dense values: not C-contiguous; pass numpy.ascontiguousarray(values)")

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape  # type: ignore[return-value]

    def check(self, full: bool = False) -> None:
        """Shapes and types hold by construction; `full` reads every value."""
        if full:
            check_finite("weight", self.values)

    @classmethod
    def from_dense(cls, dense: np.ndarray) -> Dense:
        """The matrix as it is, copied."""
        return cls(np.array(_matrix(dense), order="C"))

    def to_dense(self) -> np.ndarray:
        """A (n_pre, n_post) float32 copy."""
        return self.values.copy()

    def fan_out(self) -> np.ndarray:
        return np.count_nonzero(self.values, axis=1).astype(np.int64)

    def stored_out(self) -> np.ndarray:
        return np.full(self.shape[0], self.shape[1], np.int64)

    def row_bytes(self) -> np.ndarray:
        return 4 * self.stored_out()


@dataclass(frozen=True, eq=False, repr=False)
class CSR(Weights):
    """Single entries, compressed by presynaptic unit.

    Attributes
    ----------
    indptr  : (n_pre + 1,) int64
    indices : (stored,) int32, strictly ascending within a unit
    values  : (stored,) float32
    shape   : (n_pre, n_post)
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]
    name: ClassVar[str] = "csr"

    def __post_init__(self):
        _need_values(self.values, 1)
        _need_index(self.indptr, self.indices, self.shape[0], len(self.values))

    def check(self, full: bool = False) -> None:
        """Cheap: ends of `indptr`. `full`: order and range of every index, finiteness of every value."""
        if full:
            _check_indices(self.indptr, self.indices, self.shape[1])
            check_finite("weight", self.values)

    @classmethod
    def from_dense(cls, dense: np.ndarray) -> CSR:
        """Keeps the non-zero entries. O(size of the matrix)."""
        dense = _matrix(dense)
        rows, columns = np.nonzero(dense)
        return cls(_row_pointers(rows, dense.shape[0]), columns.astype(np.int32), dense[rows, columns], dense.shape)

    @classmethod
    def from_scipy(cls, matrix) -> CSR:
        """From any scipy.sparse matrix of shape (n_pre, n_post); duplicates are summed, indices sorted."""
        matrix = sp.csr_array(matrix, copy=True)
        matrix.sum_duplicates()
        return cls(
            matrix.indptr.astype(np.int64),
            matrix.indices.astype(np.int32),
            matrix.data.astype(np.float32),
            _shape_of(matrix),
        )

    def to_scipy(self) -> sp.csr_array:
        return sp.csr_array((self.values.copy(), self.indices.copy(), self.indptr.copy()), shape=self.shape)

    def to_dense(self) -> np.ndarray:
        """A (n_pre, n_post) float32 array."""
        dense = np.zeros(self.shape, np.float32)
        dense[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = self.values
        return dense

    def fan_out(self) -> np.ndarray:
        total = np.concatenate([[0], np.cumsum(self.values != 0)])
        return total[self.indptr[1:]] - total[self.indptr[:-1]]

    def kept(self) -> np.ndarray:
        mask = np.zeros(self.shape, bool)
        mask[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = True
        return mask

    def stored_out(self) -> np.ndarray:
        return np.diff(self.indptr)

    def row_bytes(self) -> np.ndarray:
        return 8 * self.stored_out()


@dataclass(frozen=True, eq=False, repr=False)
class BlockCSR(Weights):
    """Blocks of `block = (r, c)`: r presynaptic by c postsynaptic, on a grid from entry [0, 0].

    A matrix that is no multiple of the block is padded with zeros at its far edges; padding is stored and
    counted as executed. Values are unit-major, so that what one unit sends is contiguous: unit `k * r + s` of
    block row `k` finds its values of the row's blocks at `(indptr[k] * r + s * n_k) * c`, `n_k` blocks of c.

    Attributes
    ----------
    indptr  : (ceil(n_pre / r) + 1,) int64, in blocks
    indices : (n_blocks,) int32, block column, strictly ascending within a block row
    values  : (n_blocks * r * c,) float32
    shape   : (n_pre, n_post), unpadded
    block   : (r, c)
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]
    block: tuple[int, int]
    name: ClassVar[str] = "block"

    def __post_init__(self):
        check_block(self.block, self.shape)
        _need_values(self.values, 1)
        r, c = self.block
        n_blocks, rest = divmod(len(self.values), r * c)
        if rest:
            raise ValueError(f"block values: got {len(self.values)} values, need a multiple of {r} x {c}")
        _need_index(self.indptr, self.indices, -(-self.shape[0] // r), n_blocks)

    def check(self, full: bool = False) -> None:
        """Cheap: sizes. `full`: order and range of block columns, finite values, zero padding."""
        if full:
            _check_indices(self.indptr, self.indices, -(-self.shape[1] // self.block[1]))
            check_finite("weight", self.values)
            padded = self._padded()
            if padded[self.shape[0] :].any() or padded[:, self.shape[1] :].any():
                raise ValueError(f"block values: non-zero padding beyond the shape {self.shape}")

    @classmethod
    def from_dense(cls, dense: np.ndarray, *, block: tuple[int, int]) -> BlockCSR:
        """Keeps every block that has a non-zero entry. O(size of the matrix)."""
        dense = _matrix(dense)
        check_block(block, dense.shape)
        (n_pre, n_post), (r, c) = dense.shape, block
        rows, columns = -(-n_pre // r), -(-n_post // c)
        padded = np.zeros((rows * r, columns * c), np.float32)
        padded[:n_pre, :n_post] = dense
        blocks = padded.reshape(rows, r, columns, c)
        kept_rows, kept_columns = np.nonzero(blocks.any(axis=(1, 3)))
        indptr = _row_pointers(kept_rows, rows)
        return cls(
            indptr, kept_columns.astype(np.int32), _unit_major(blocks, indptr, kept_columns), (n_pre, n_post), (r, c)
        )

    @classmethod
    def from_scipy(cls, matrix) -> BlockCSR:
        """From a scipy.sparse BSR matrix of shape (n_pre, n_post)."""
        if matrix.format != "bsr":
            raise TypeError(f"block weights: got a scipy {matrix.format} matrix, need bsr; call .tobsr(blocksize)")
        matrix = sp.bsr_array(matrix, copy=True)
        matrix.sum_duplicates()
        indptr = matrix.indptr.astype(np.int64)
        data = matrix.data.astype(np.float32)
        values = [data[a:b].transpose(1, 0, 2).ravel() for a, b in zip(indptr[:-1], indptr[1:], strict=True)]
        return cls(
            indptr,
            matrix.indices.astype(np.int32),
            np.concatenate([*values, np.zeros(0, np.float32)]),
            _shape_of(matrix),
            (int(data.shape[1]), int(data.shape[2])),
        )

    def to_scipy(self) -> sp.bsr_array:
        """scipy BSR; refuses a shape that is no multiple of the block, which BSR cannot hold."""
        (n_pre, n_post), (r, c) = self.shape, self.block
        if n_pre % r or n_post % c:
            raise ValueError(f"to_scipy: shape {self.shape} is no multiple of block {self.block}; scipy BSR needs one")
        return sp.bsr_array((self.blocks(), self.indices.copy(), self.indptr.copy()), shape=self.shape)

    def blocks(self) -> np.ndarray:
        """(n_blocks, r, c) copy of the blocks, in index order."""
        r, c = self.block
        parts = [
            self.values[a * r * c : b * r * c].reshape(r, b - a, c).transpose(1, 0, 2)
            for a, b in zip(self.indptr[:-1], self.indptr[1:], strict=True)
        ]
        return np.concatenate([*parts, np.zeros((0, r, c), np.float32)])

    def to_dense(self) -> np.ndarray:
        """A (n_pre, n_post) float32 array."""
        return np.ascontiguousarray(self._padded()[: self.shape[0], : self.shape[1]])

    def _padded(self) -> np.ndarray:
        r, c = self.block
        rows, columns = len(self.indptr) - 1, -(-self.shape[1] // c)
        padded = np.zeros((rows, columns, r, c), np.float32)
        padded[np.repeat(np.arange(rows), np.diff(self.indptr)), self.indices] = self.blocks()
        return padded.transpose(0, 2, 1, 3).reshape(rows * r, columns * c)

    def kept(self) -> np.ndarray:
        return replace(self, values=np.ones_like(self.values)).to_dense() != 0

    def fan_out(self) -> np.ndarray:
        r, c = self.block
        per_unit = np.zeros(((len(self.indptr) - 1), r), np.int64)
        filled = np.count_nonzero(self.blocks(), axis=2)
        np.add.at(per_unit, np.repeat(np.arange(len(per_unit)), np.diff(self.indptr)), filled)
        return per_unit.ravel()[: self.shape[0]]

    def stored_out(self) -> np.ndarray:
        r, c = self.block
        return np.repeat(np.diff(self.indptr) * c, r)[: self.shape[0]]

    def row_bytes(self) -> np.ndarray:
        r, c = self.block
        return np.repeat(np.diff(self.indptr) * (4 * c + 4), r)[: self.shape[0]]


#: format name -> record
FORMATS: dict[str, type[Weights]] = {"dense": Dense, "csr": CSR, "block": BlockCSR}


def convert(weights: Weights | np.ndarray, to: str, *, block: tuple[int, int] | None = None) -> Weights:
    """The same matrix in another format: `to` in `FORMATS`; `block` for "block" only. O(size of the matrix)."""
    if to not in FORMATS:
        raise ValueError(f"format: got {to!r}, need one of {', '.join(FORMATS)}")
    if (block is None) == (to == "block"):
        raise ValueError(f"block: got {block} for format {to!r}; the block format needs one, the others take none")
    dense = weights if isinstance(weights, np.ndarray) else weights.to_dense()
    makers: dict[str, Callable[[], Weights]] = {
        "dense": lambda: Dense.from_dense(dense),
        "csr": lambda: CSR.from_dense(dense),
        "block": lambda: BlockCSR.from_dense(dense, block=block or (1, 1)),
    }
    return makers[to]()


def check_block(block: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Refuse a block that is not positive or larger than the matrix."""
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"block: got {block}, need two sizes >= 1 (presynaptic x postsynaptic)")
    if block[0] > max(shape[0], 1) or block[1] > max(shape[1], 1):
        raise ValueError(
            f"block: {block[0]}x{block[1]} is larger than the matrix {shape[0]}x{shape[1]}; choose a smaller one"
        )


def _unit_major(blocks: np.ndarray, indptr: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Kept blocks of a (rows, r, columns, c) array, in the order of `BlockCSR.values`."""
    parts = [
        blocks[row][:, columns[a:b]].ravel() for row, (a, b) in enumerate(zip(indptr[:-1], indptr[1:], strict=True))
    ]
    return np.concatenate([*parts, np.zeros(0, np.float32)])


def _shape_of(matrix) -> tuple[int, int]:
    return int(matrix.shape[0]), int(matrix.shape[1])


def _row_pointers(rows: np.ndarray, n_rows: int) -> np.ndarray:
    indptr = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n_rows), out=indptr[1:])
    return indptr


def _matrix(dense: np.ndarray) -> np.ndarray:
    dense = np.asarray(dense, np.float32)
    if dense.ndim != 2:
        raise ValueError(f"weights: got shape {dense.shape}, need (n_pre, n_post)")
    check_finite("weight", dense)
    return dense


def _need_values(values: np.ndarray, ndim: int) -> None:
    if values.dtype != np.float32 or values.ndim != ndim:
        raise TypeError(f"weight values: got {values.dtype} with {values.ndim} dimensions, need float32 with {ndim}")


def _need_index(indptr: np.ndarray, indices: np.ndarray, n_rows: int, n_stored: int) -> None:
    if indptr.dtype != np.int64 or indices.dtype != np.int32:
        raise TypeError(f"weight index: got indptr {indptr.dtype}, indices {indices.dtype}; need int64 and int32")
    if indptr.shape != (n_rows + 1,):
        raise ValueError(f"weight indptr: got shape {indptr.shape}, need ({n_rows + 1},)")
    if indptr[0] != 0 or indptr[-1] != n_stored or indices.shape != (n_stored,):
        raise ValueError(
            f"weight indptr: runs from {indptr[0]} to {indptr[-1]} over {len(indices)} indices and {n_stored} stored; "
            "need 0 to the number stored"
        )


def _check_indices(indptr: np.ndarray, indices: np.ndarray, limit: int) -> None:
    if (np.diff(indptr) < 0).any():
        raise ValueError("weight indptr: decreases; need a non-decreasing array")
    if len(indices) and not (0 <= indices.min() and indices.max() < limit):
        raise ValueError(f"weight indices: outside 0..{limit - 1}")
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    if ((np.diff(rows) == 0) & (np.diff(indices) <= 0)).any():
        raise ValueError("weight indices: not strictly ascending within a presynaptic unit")
