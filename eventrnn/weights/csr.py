"""The format "csr": single weights in compressed sparse rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import scipy.sparse as sp

from eventrnn._checks import check_finite, float32_array
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


@dataclass(frozen=True, eq=False, repr=False)
class CSR(Weights):
    """Single entries in compressed rows, one row per presynaptic unit.

    Attributes
    ----------
    indptr  : (n_pre + 1,) int64
    indices : (stored,) int32, strictly ascending within a unit
    values  : (stored,)
    shape   : (n_pre, n_post)
    scales  : (n_pre,) float32 for int8, else None

    Examples
    --------
    >>> dense = np.array([[0, 2, 0, 0], [1, 0, 0, 3]], np.float32)  # two units, four outputs
    >>> weights = CSR.from_dense(dense)
    >>> weights.indptr.tolist(), weights.indices.tolist(), weights.values.tolist()
    ([0, 1, 3], [1, 0, 3], [2.0, 1.0, 3.0])
    >>> weights.fan_out().tolist()
    [1, 2]
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]
    scales: np.ndarray | None = None
    name: ClassVar[str] = "csr"

    def __post_init__(self):
        need_shape(self.shape)
        need_values(self.values, self.scales, 1, self.shape[0])
        need_index(self.indptr, self.indices, self.shape[0], len(self.values))

    def check(self, full: bool = False) -> None:
        """With `full`, check order and range of every index, and that values are finite. Raises ValueError.

        The ends of `indptr` were checked when the record was made.
        """
        if full:
            self.check_index()
            self._check_values()

    def check_index(self) -> None:
        need_index(self.indptr, self.indices, self.shape[0], len(self.values))
        check_indices(self.indptr, self.indices, self.shape[1])

    @classmethod
    def from_dense(cls, dense: np.ndarray) -> CSR:
        """Store the non-zero entries. O(size of the matrix). Raises ValueError for NaN or infinity."""
        dense = finite_matrix(dense)
        rows, columns = np.nonzero(dense)
        return cls(row_pointers(rows, dense.shape[0]), columns.astype(np.int32), dense[rows, columns], dense.shape)

    @classmethod
    def from_weights(cls, weights: Weights) -> CSR:
        """Keeps the non-zero weights of another format, as float32. O(stored)."""
        (units, outputs), floats = weights.places(), weights.floats().ravel()
        check_finite("weight", floats)
        # The padding of blocks lies outside.
        kept = (floats != 0) & (units < weights.shape[0]) & (outputs < weights.shape[1])
        return cls(row_pointers(units[kept], weights.shape[0]), outputs[kept], floats[kept], weights.shape)

    @classmethod
    def from_scipy(cls, matrix) -> CSR:
        """Convert any scipy.sparse matrix of shape (n_pre, n_post). Duplicates are summed, and indices are sorted."""
        need_sparse(matrix)
        matrix = sp.csr_array(matrix, copy=True)
        matrix.sum_duplicates()
        return cls(
            matrix.indptr.astype(np.int64),
            matrix.indices.astype(np.int32),
            float32_array("weights", matrix.data, "(stored,)").copy(),
            shape_of(matrix),
        )

    def to_scipy(self) -> sp.csr_array:
        """Convert to scipy CSR, as float32."""
        return sp.csr_array((self.floats().copy(), self.indices.copy(), self.indptr.copy()), shape=self.shape)

    def to_dense(self) -> np.ndarray:
        """The matrix as a new (n_pre, n_post) float32 array, decoded."""
        dense = np.zeros(self.shape, np.float32)
        dense[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = self.floats()
        return dense

    def fan_out(self) -> np.ndarray:
        return per_unit(self._not_zero(), self.indptr)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        return np.repeat(np.arange(self.shape[0], dtype=np.int32), np.diff(self.indptr)), self.indices

    def kept(self) -> np.ndarray:
        mask = np.zeros(self.shape, bool)
        mask[np.repeat(np.arange(self.shape[0]), np.diff(self.indptr)), self.indices] = True
        return mask

    def stored_out(self) -> np.ndarray:
        return np.diff(self.indptr)

    def row_bytes(self) -> np.ndarray:
        return self._row_bytes(4 * self.stored_out())
