"""The format "nm": N:M sparsity, the same number of weights in every group of consecutive entries; packed indices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from eventrnn._checks import need_choice
from eventrnn.weights.base import (
    Weights,
    finite_matrix,
    need_plain,
    need_shape,
    need_values,
    per_unit,
    row_pointers,
)
from eventrnn.weights.csr import CSR

AXES = ("post", "pre")

#: The largest group. An index within it takes five bits.
MOST = 32


@dataclass(frozen=True, eq=False, repr=False)
class NM(Weights):
    """n weights of each m: of m consecutive outputs of a unit ("post"), or of m consecutive units of an output ("pre").

    The groups lie on a grid that starts at entry [0, 0]. The last group along the axis may have g < m members and then
    stores min(n, g) weights. Every group stores exactly that many, zeros where it has fewer. `codes` holds the place of
    each stored weight within its group, ascending, as a stream of `bits` bits per weight, least significant bit first;
    unused bits of the last byte are zero. The stream visits the groups in the order (unit, group) for "post" and
    (group, output) for "pre".

    Attributes
    ----------
    codes  : (ceil(stored * bits / 8),) uint8, bits = max(1, ceil(log2 m))
    values : (stored,), by presynaptic unit, outputs ascending within a unit
    shape  : (n_pre, n_post)
    n, m   : 1 <= n <= m, 2 <= m <= 32
    axis   : "post" or "pre", the axis along which groups lie
    scales : (n_pre,) float32 for int8, else None

    Examples
    --------
    >>> dense = np.array([[0, 2, 0, 0], [1, 0, 0, 3]], np.float32)  # two units, four outputs
    >>> weights = NM.from_dense(dense, 1, 2, "post")
    >>> weights.values.tolist(), bin(weights.codes[0])  # places 1, 0, 0 and 1, one bit each
    ([2.0, 0.0, 1.0, 3.0], '0b1001')
    >>> weights.stored, weights.nnz
    (4, 3)
    """

    codes: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]
    n: int
    m: int
    axis: str
    scales: np.ndarray | None = None
    name: ClassVar[str] = "nm"

    def __post_init__(self):
        need_shape(self.shape)
        check_nm(self.n, self.m, self.axis)
        need_plain("nm codes", self.codes)
        need_values(self.values, self.scales, 1, self.shape[0])
        if self.codes.dtype != np.uint8 or self.codes.ndim != 1:
            raise TypeError(f"nm codes: got {self.codes.dtype} with {self.codes.ndim} dimensions, need uint8 with 1")
        # `indptr` is kept, and would not follow an edit: the codes, which are few bytes, are the record's own.
        if self.codes.flags.writeable or self.codes.base is not None:
            object.__setattr__(self, "codes", self.codes.copy())
            self.codes.flags.writeable = False
        lines = self.shape[0] if self.axis == "post" else self.shape[1]
        # In numbers, not arrays: a record from a file may say any shape.
        groups, rest = divmod(self._length(), self.m)
        stored = lines * (groups * self.n + min(self.n, rest))
        n_bytes = -(-stored * self.bits // 8)
        if len(self.values) != stored or len(self.codes) != n_bytes:
            raise ValueError(
                f"nm: got {len(self.values)} values and {len(self.codes)} bytes of codes for {self.n}:{self.m} along "
                f"{self.axis} of {self.shape[0]}x{self.shape[1]}, need {stored} and {n_bytes}"
            )

    @property
    def bits(self) -> int:
        """The number of bits of an index within its group."""
        return max(1, (self.m - 1).bit_length())

    @cached_property
    def indptr(self) -> np.ndarray:
        """The position at which the values of each unit begin, and the end, (n_pre + 1,) int64."""
        if self.axis == "post":
            return np.arange(self.shape[0] + 1) * int(self._kept_of_groups().sum())
        return row_pointers(self._places()[0], self.shape[0])

    def check(self, full: bool = False) -> None:
        """With `full`, check the indices of every group, zero padding bits and finite values. Raises ValueError.

        The sizes were checked when the record was made.
        """
        if full:
            self._check_codes()
            self._check_values()

    def check_index(self) -> None:
        """The codes cannot have been edited since their full check, which takes as long as packing them."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.codes.flags.writeable = False

    def _check_codes(self) -> None:
        group, line, code = self._stream()
        size = np.minimum(self.m, self._length() - group * self.m)
        if (code >= size).any():
            k = int(np.argmax(code >= size))
            raise ValueError(f"nm codes: index {code[k]} in {self._name(group[k], line[k])} of {size[k]} members")
        same = (group[1:] == group[:-1]) & (line[1:] == line[:-1])
        loose = same & (code[1:] <= code[:-1])
        if loose.any():
            k = int(np.argmax(loose))
            raise ValueError(f"nm codes: indices not strictly ascending in {self._name(group[k], line[k])}; sort them")
        if np.unpackbits(self.codes, bitorder="little")[len(self.values) * self.bits :].any():
            raise ValueError("nm codes: set bits after the last index; need zeros")

    @classmethod
    def from_dense(cls, dense: np.ndarray, n: int, m: int, axis: str = "post") -> NM:
        """Store the non-zero entries, and in a group with fewer than n of them also zeros at its lowest free places.

        Raises ValueError for a group with more than n non-zero entries, which the message names, for an n, m or axis
        out of range, and for NaN or infinity. O(size of the matrix).
        """
        dense = finite_matrix(dense)
        check_nm(n, m, axis)
        groups, inside = _grouped(dense != 0, m, axis), _grouped(np.ones(dense.shape, bool), m, axis)
        filled = groups.sum(axis=2)
        if (filled > n).any():
            line, group = (int(k) for k in np.argwhere(filled > n)[0])
            raise ValueError(
                f"nm: {_name_of(group, line, m, axis)} has {filled[line, group]} non-zero weights, {n}:{m} keeps {n}; "
                "prune the others first"
            )
        free = inside & ~groups
        fill = free & (np.cumsum(free, axis=2) <= (n - filled)[:, :, None])
        kept = _ungrouped(groups | fill, axis, dense.shape)
        return cls(_codes_of(kept, m, axis), dense[kept], dense.shape, n, m, axis)

    def to_dense(self) -> np.ndarray:
        """The matrix as a new (n_pre, n_post) float32 array, decoded."""
        dense = np.zeros(self.shape, np.float32)
        dense[self._places()] = self.floats()
        return dense

    def to_csr(self) -> CSR:
        """The same entries in CSR, stored zeros included, in the same storage. O(stored)."""
        scales = None if self.scales is None else self.scales.copy()
        outputs = self._places()[1].astype(np.int32)
        return CSR(self.indptr.copy(), outputs, self.values.copy(), self.shape, scales)

    def transposed(self) -> NM:
        """The transposed matrix, N:M along the other axis, stored zeros included. O(size of the matrix).

        Raises ValueError for int8, whose scales belong to presynaptic units.
        """
        if self.scales is not None:
            raise ValueError("nm transposed: int8 scales belong to presynaptic units; take stored_as('float32') first")
        kept, axis, (n_pre, n_post) = self.kept(), AXES[1 - AXES.index(self.axis)], self.shape
        table = np.zeros(self.shape, self.values.dtype)
        table[kept] = self.values
        return NM(_codes_of(kept.T, self.m, axis), table.T[kept.T], (n_post, n_pre), self.n, self.m, axis)

    def kept(self) -> np.ndarray:
        mask = np.zeros(self.shape, bool)
        mask[self._places()] = True
        return mask

    def fan_out(self) -> np.ndarray:
        return per_unit(self._not_zero(), self.indptr)

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        unit, output = self._places()
        return unit.astype(np.int32, copy=False), output.astype(np.int32, copy=False)

    def stored_out(self) -> np.ndarray:
        return np.diff(self.indptr)

    def row_bytes(self) -> np.ndarray:
        """See `Weights`. Codes are counted in whole bytes that hold a bit of a code which unit j needs.

        Along "post" these are the codes of the unit's own groups. Along "pre" they are the codes of its group for all
        outputs, which say for which outputs the unit is stored.
        """
        kept = self._kept_of_groups()
        if self.axis == "post":
            edges = np.arange(self.shape[0] + 1) * int(kept.sum()) * self.bits
            return self._row_bytes(_touched(edges))
        edges = np.concatenate([[0], np.cumsum(kept)]) * self.shape[1] * self.bits
        return self._row_bytes(np.repeat(_touched(edges), self.m)[: self.shape[0]])

    def _detail(self) -> str:
        return f"{self.n}:{self.m} {self.axis}"

    def _length(self) -> int:
        """The number of entries along the axis of the groups."""
        return self.shape[AXES[::-1].index(self.axis)]

    def _kept_of_groups(self) -> np.ndarray:
        """The number of weights that each group along the axis stores, (groups,) int64."""
        start = np.arange(0, self._length(), self.m)
        return np.minimum(self.n, np.minimum(self.m, self._length() - start))

    def _stream(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Group, line (unit or output) and index of every code, in the order of the stream, int64."""
        kept, bits = self._kept_of_groups(), self.bits
        flags = np.unpackbits(self.codes, count=len(self.values) * bits, bitorder="little").reshape(-1, bits)
        code = np.packbits(flags, axis=1, bitorder="little").astype(np.int64).ravel()
        group = np.repeat(np.arange(len(kept)), kept)
        if self.axis == "post":
            lines = self.shape[0]
            return np.tile(group, lines), np.repeat(np.arange(lines), len(group)), code
        lines = self.shape[1]
        # All groups store the same number, except perhaps the last one.
        whole, last = kept[:-1], kept[-1:]
        line = [np.tile(np.repeat(np.arange(lines), share[:1].sum()), len(share)) for share in (whole, last)]
        return np.repeat(np.arange(len(kept)), kept * lines), np.concatenate(line), code

    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """Presynaptic unit and output of every value, in the order of `values`, int64."""
        group, line, code = self._stream()
        place = group * self.m + code
        if self.axis == "post":
            return line, place
        order = np.argsort(place, kind="stable")
        return place[order], line[order]

    def _name(self, group: int, line: int) -> str:
        return _name_of(int(group), int(line), self.m, self.axis)


def check_nm(n: int, m: int, axis: str) -> None:
    """Raise ValueError unless 1 <= n <= m, 2 <= m <= 32, and the axis is "post" or "pre"."""
    whole = all(isinstance(k, int) and not isinstance(k, bool) for k in (n, m))
    if not (whole and 1 <= n <= m and 2 <= m <= MOST):
        raise ValueError(f"nm: got {n}:{m}, need n of each m with 1 <= n <= m and 2 <= m <= {MOST}")
    need_choice("nm axis", axis, AXES)


def _grouped(mask: np.ndarray, m: int, axis: str) -> np.ndarray:
    """A mask by lines along the axis as (lines, groups, m); False beyond the last member of a line."""
    lines = mask if axis == "post" else mask.T
    groups = -(-lines.shape[1] // m)
    padded = np.zeros((len(lines), groups * m), bool)
    padded[:, : lines.shape[1]] = lines
    return padded.reshape(len(lines), groups, m)


def _ungrouped(groups: np.ndarray, axis: str, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `_grouped`."""
    n_pre, n_post = shape
    lines = groups.reshape(len(groups), groups.shape[1] * groups.shape[2])
    return lines[:, :n_post] if axis == "post" else lines[:, :n_pre].T


def _codes_of(kept: np.ndarray, m: int, axis: str) -> np.ndarray:
    """The stream of codes of a mask that stores the right number of entries in each group."""
    groups = _grouped(kept, m, axis)
    code = np.nonzero(groups if axis == "post" else groups.transpose(1, 0, 2))[2]
    bits = np.unpackbits(code.astype(np.uint8)[:, None], axis=1, bitorder="little")
    return np.packbits(bits[:, : max(1, (m - 1).bit_length())], bitorder="little")


def _touched(edges: np.ndarray) -> np.ndarray:
    """The number of bytes over which the bits between neighbouring edges extend."""
    first, last = edges[:-1] // 8, (edges[1:] - 1) // 8
    return np.where(edges[1:] > edges[:-1], last - first + 1, 0)


def _name_of(group: int, line: int, m: int, axis: str) -> str:
    kind = "unit" if axis == "post" else "output"
    return f"group {group} ({'outputs' if axis == 'post' else 'units'} from {group * m}) of {kind} {line}"
