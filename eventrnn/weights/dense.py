"""The format "dense": every weight of a matrix is stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from eventrnn.weights.base import Weights, finite_matrix, need_plain, need_values


@dataclass(frozen=True, eq=False, repr=False)
class Dense(Weights):
    """Every entry of the matrix, zeros included.

    Attributes
    ----------
    values : (n_pre, n_post), C-contiguous
    scales : (n_pre,) float32 for int8, else None

    Examples
    --------
    >>> dense = np.array([[0, 2, 0, 0], [1, 0, 0, 3]], np.float32)  # two units, four outputs
    >>> weights = Dense.from_dense(dense)
    >>> weights.stored, weights.nnz
    (8, 3)
    """

    values: np.ndarray
    scales: np.ndarray | None = None
    name: ClassVar[str] = "dense"

    def __post_init__(self):
        need_plain("weight values", self.values)
        need_values(self.values, self.scales, 2, len(self.values) if self.values.ndim else 0)
        if not self.values.flags.c_contiguous:
            raise ValueError("dense values: not C-contiguous; pass numpy.ascontiguousarray(values)")

    @property
    def shape(self) -> tuple[int, int]:
        """(n_pre, n_post)."""
        return self.values.shape  # type: ignore[return-value]

    def check(self, full: bool = False) -> None:
        """With `full`, check that every value is finite. Raises ValueError.

        Shapes and dtypes were checked when the record was made.
        """
        if full:
            self._check_values()

    def check_index(self) -> None:
        """A dense matrix has no index."""

    @classmethod
    def from_dense(cls, dense: np.ndarray) -> Dense:
        """Store a copy of the matrix. Raises ValueError for NaN or infinity."""
        return cls(np.array(finite_matrix(dense), order="C"))

    def to_dense(self) -> np.ndarray:
        """The matrix as a new (n_pre, n_post) float32 array, decoded."""
        return self.values.copy() if self.storage == "float32" else self.floats()

    def fan_out(self) -> np.ndarray:
        return np.count_nonzero(self._not_zero(), axis=1).astype(np.int64)

    def stored_out(self) -> np.ndarray:
        return np.full(self.shape[0], self.shape[1], np.int64)

    def row_bytes(self) -> np.ndarray:
        return self._row_bytes(0)

    def _spread(self, per_unit: np.ndarray) -> np.ndarray:
        return per_unit[:, None]

    def _largest(self, floats: np.ndarray) -> np.ndarray:
        return np.abs(floats).max(axis=1, initial=0)
