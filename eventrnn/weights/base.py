"""The base class of the weight formats, and checks of index arrays that several formats share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields, replace
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp

from eventrnn._checks import check_finite, float32_array, need_kind, need_whole, plain_array
from eventrnn.weights import storage as codec


class Weights(ABC):
    """A matrix (n_pre, n_post) that is stored by presynaptic unit.

    A format implements the abstract methods. Everything else follows from them and from the fields of the record.

    Attributes
    ----------
    values : the stored weights: float32, uint16 (the bits of a bfloat16) or int8
    scales : (n_pre,) float32 > 0 for int8, one per presynaptic unit; None for other storages
    shape  : (n_pre, n_post)
    """

    name: ClassVar[str]
    values: np.ndarray
    scales: np.ndarray | None = None
    shape: tuple[int, int]

    @abstractmethod
    def check(self, full: bool = False) -> None:
        """Check the record; with `full` also every index and every value. Raises ValueError."""

    @abstractmethod
    def check_index(self) -> None:
        """Check again what an edit in place can have broken of the index since the full check. Raises ValueError.
        O(stored)."""

    @abstractmethod
    def to_dense(self) -> np.ndarray:
        """The matrix as a new (n_pre, n_post) float32 array, decoded."""

    @abstractmethod
    def fan_out(self) -> np.ndarray:
        """The number of weights of each presynaptic unit that are not zero after decoding, (n_pre,) int64."""

    @abstractmethod
    def stored_out(self) -> np.ndarray:
        """The number of stored entries of each presynaptic unit, zeros and padding columns included, (n_pre,) int64."""

    def executed_out(self) -> np.ndarray:
        """The multiplications that count as executed when unit j sends an event, (n_pre,) int64: all stored entries.

        Counting uses this number only. Bytes, scales and kernels follow `stored_out`.
        """
        return self.stored_out()

    @abstractmethod
    def row_bytes(self) -> np.ndarray:
        """Bytes of values, indices and scale that are read when unit j sends an event, (n_pre,) int64."""

    def __repr__(self) -> str:
        detail = "".join(f" {word}" for word in (self._detail(), self.storage) if word not in ("", "float32"))
        return f"{type(self).__name__}({self.shape[0]}x{self.shape[1]}{detail}, {self.nnz} weights)"

    def _detail(self) -> str:
        """The options of the format, for `repr`."""
        return ""

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Presynaptic unit and output of every stored entry, (stored,) int32 each, by unit, then output."""
        unit, output = np.divmod(np.arange(self.shape[0] * self.shape[1]), max(1, self.shape[1]))
        return unit.astype(np.int32), output.astype(np.int32)

    def kept(self) -> np.ndarray:
        """The mask of stored entries, (n_pre, n_post) boolean."""
        return np.ones(self.shape, bool)

    @property
    def nnz(self) -> int:
        """The number of weights that are not zero after decoding. O(stored)."""
        return int(self.fan_out().sum())

    @property
    def stored(self) -> int:
        """The number of stored entries, zeros in blocks and groups and padding columns included."""
        return int(self.stored_out().sum())

    @property
    def nbytes(self) -> int:
        """Bytes of values, scales and index arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the record by field name, as a model file stores them."""
        return {name: value for name, value in self._fields().items() if isinstance(value, np.ndarray)}

    def options(self) -> dict[str, Any]:
        """The other fields of the record by name, as a model file stores them."""
        return {
            name: value
            for name, value in self._fields().items()
            if value is not None and not isinstance(value, np.ndarray)
        }

    def _fields(self) -> dict[str, Any]:
        # `__dict__` of a record may also hold cached properties.
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    # --- storage ---

    @property
    def storage(self) -> str:
        """The storage of the values, one of `STORAGES`."""
        return codec.storage_of(self.values)

    def floats(self) -> np.ndarray:
        """The weights as float32 in the shape of `values`: decoded, or `values` itself for float32. O(stored)."""
        if self.values.dtype == np.uint16:
            return codec.from_bfloat16(self.values)
        if self.scales is not None:
            return codec.from_int8(self.values, self._spread(self.scales))
        return self.values

    def stored_as(self, storage: str, bits: int = codec.MOST_BITS) -> Weights:
        """The same stored entries in another storage; the record itself if it has that storage already. O(stored).

        bits : of the codes of int8, 2 to 8. Codes of fewer than 8 take a byte each too, but a compressed file of them
               is smaller. int8 weights are rounded again to fewer bits.

        bfloat16 rounds to nearest, ties to even. int8 rounds to the nearest code; the scale of a presynaptic unit is
        its max|w| / 127, or 1 if all its weights are zero. In place of 127, codes of 7 bits have 63, of 6 bits 31, and
        so on. A weight that rounds to zero stays stored. Raises ValueError for an unknown storage, for bits that it
        does not have, for NaN or infinity, and for a weight that bfloat16 rounds to infinity.
        """
        codec.check_storage(storage)
        codec.check_bits(storage, bits)
        return self if storage == self.storage and bits == codec.MOST_BITS else self._encoded(storage, bits=bits)

    def _encoded(self, storage: str, scales: np.ndarray | None = None, bits: int = codec.MOST_BITS) -> Weights:
        """`stored_as`. For int8, `scales` are used instead of new ones if they are given."""
        floats = self.floats()
        check_finite("weight", floats)
        if storage == "bfloat16":
            return self._with_values(codec.to_bfloat16(floats), None)
        if storage == "float32":
            return self._with_values(floats, None)
        scales = codec.int8_scales(self._largest(floats), bits) if scales is None else scales.copy()
        return self._with_values(codec.to_int8(floats, self._spread(scales), bits), scales)

    def _with_values(self, values: np.ndarray, scales: np.ndarray | None) -> Weights:
        return replace(self, values=values, scales=scales)  # type: ignore[type-var]

    def _spread(self, per_unit: np.ndarray) -> np.ndarray:
        """Repeat one number per presynaptic unit (n_pre,) over the unit's values; broadcasts with `values`."""
        return np.repeat(per_unit, self.stored_out())

    def _largest(self, floats: np.ndarray) -> np.ndarray:
        """The largest magnitude of each presynaptic unit, (n_pre,) float32; 0 for a unit without stored entries."""
        most = np.zeros(self.shape[0], np.float32)
        np.maximum.at(most, self._spread(np.arange(self.shape[0])), np.abs(floats))
        return most

    def _row_bytes(self, index_bytes: np.ndarray | int) -> np.ndarray:
        """`row_bytes`, given the bytes of indices per unit. The scale of a unit without stored entries is not read."""
        stored = self.stored_out()
        scale = 0 if self.scales is None else 4 * (stored > 0)
        return self.values.itemsize * stored + index_bytes + scale

    def check_finite(self, name: str) -> None:
        """Raise ValueError for a weight that is NaN or infinite, with its position. Decodes only where there is one."""
        if codec.may_be_infinite(self.values, self.scales):
            check_finite(name, self.floats())

    def _check_values(self) -> None:
        """Check every value and every scale. Raises ValueError."""
        codec.check_scales(self.values, self.scales, self.shape[0], full=True)
        self.check_finite("weight")

    def _not_zero(self) -> np.ndarray:
        """Which weights are not zero, boolean in the shape of `values`."""
        return codec.not_zero(self.values)


def per_unit(flags: np.ndarray, indptr: np.ndarray) -> np.ndarray:
    """The number of flags that are set between the pointers of each unit, (len(indptr) - 1,) int64."""
    counts, some = np.zeros(len(indptr) - 1, np.int64), indptr[1:] > indptr[:-1]
    counts[some] = np.add.reduceat(flags, indptr[:-1][some], dtype=np.int64) if some.any() else 0
    return counts


def row_pointers(rows: np.ndarray, n_rows: int) -> np.ndarray:
    """The position at which the entries of each row begin in a list sorted by row, and the end, (n_rows + 1,) int64."""
    indptr = np.zeros(n_rows + 1, np.int64)
    np.cumsum(np.bincount(rows, minlength=n_rows), out=indptr[1:])
    return indptr


def shape_of(matrix) -> tuple[int, int]:
    """The shape of a scipy matrix as Python integers."""
    return int(matrix.shape[0]), int(matrix.shape[1])


def need_sparse(matrix: Any) -> None:
    """Raise TypeError for what is not a matrix of scipy.sparse with two dimensions."""
    if not sp.issparse(matrix) or len(matrix.shape) != 2:
        raise TypeError(f"matrix: got a {type(matrix).__name__}, need a scipy.sparse matrix (n_pre, n_post)")


def finite_matrix(dense: np.ndarray) -> np.ndarray:
    """Convert to a (n_pre, n_post) float32 array. Raises ValueError for other dimensions, NaN and infinity."""
    return float32_array("weights", dense, "(n_pre, n_post)", ndim=2)


def need_plain(name: str, array: np.ndarray) -> None:
    """Raise TypeError for what is not a NumPy array, and ValueError for a masked one."""
    need_kind(
        name, array, np.ndarray, "a NumPy array; from_dense, of gated blocks from_weights, makes the record of a matrix"
    )
    plain_array(name, array)


def need_shape(shape: tuple[int, int]) -> None:
    """Raise ValueError unless a shape is two whole numbers >= 0."""
    if not isinstance(shape, tuple) or len(shape) != 2:
        raise ValueError(f"weight shape: got {shape!r}, need a tuple (n_pre, n_post)")
    for n in shape:
        need_whole(f"weight shape {shape}: a size", n, at_least=0)


def need_values(values: np.ndarray, scales: np.ndarray | None, ndim: int, n_pre: int) -> None:
    """Check dtype and dimensions of values and scales. Raises TypeError."""
    need_plain("weight values", values)
    if scales is not None:
        need_plain("weight scales", scales)
    storage = codec.storage_of(values)
    if values.ndim != ndim:
        raise TypeError(f"weight values: got {values.dtype} with {values.ndim} dimensions, need {storage} with {ndim}")
    codec.check_scales(values, scales, n_pre, full=False)


def need_index(indptr: np.ndarray, indices: np.ndarray, n_rows: int, n_stored: int) -> None:
    """Check dtypes, shapes and ends of an index. Raises TypeError or ValueError."""
    need_plain("weight indptr", indptr)
    need_plain("weight indices", indices)
    if indptr.dtype != np.int64 or indices.dtype != np.int32:
        raise TypeError(f"weight index: got indptr {indptr.dtype}, indices {indices.dtype}; need int64 and int32")
    if indptr.shape != (n_rows + 1,):
        raise ValueError(f"weight indptr: got shape {indptr.shape}, need ({n_rows + 1},)")
    if indptr[0] != 0 or indptr[-1] != n_stored or indices.shape != (n_stored,):
        raise ValueError(
            f"weight indptr: runs from {indptr[0]} to {indptr[-1]} over {len(indices)} indices and {n_stored} stored "
            "entries; need 0 to the number of stored entries"
        )


def check_indices(indptr: np.ndarray, indices: np.ndarray, limit: int) -> None:
    """Check order and range of every index; need 0 <= index < limit. Raises ValueError."""
    if (np.diff(indptr) < 0).any():
        raise ValueError("weight indptr: decreases; need a non-decreasing array")
    if len(indices) and not (0 <= indices.min() and indices.max() < limit):
        raise ValueError(f"weight indices: outside 0..{limit - 1}; got {indices.min()} to {indices.max()}")
    rising = np.diff(indices) > 0
    # The first index of a unit may be below the last of the unit before.
    rising[indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < len(indices))] - 1] = True
    if not rising.all():
        raise ValueError("weight indices: not strictly ascending within a presynaptic unit; sort them")
