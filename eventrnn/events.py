"""Event lists: which units sent a value, and which value, per time step and sample; encoders of signals as events.

Networks and backends build on this file; it imports neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# Numbers of a large array that are looked at together.
PART = 1 << 16


@dataclass(frozen=True)
class Events:
    """Graded events of `size` units over `steps` time steps and `batch` samples, as compressed sparse rows.

    Row `t * batch + b` has the events of sample b in step t: units `indices[indptr[row]:indptr[row + 1]]`, strictly
    ascending, and the `values` at the same positions.

    Attributes
    ----------
    indptr  : (steps * batch + 1,) int64, where each row begins, and the end
    indices : (n_events,) int32, unit of each event
    values  : (n_events,) float32, value of each event, not zero
    shape   : (steps, batch, size)

    Raises ValueError or TypeError for shapes and dtypes that do not fit together, in O(1). `check` reads every event.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int, int]

    def __post_init__(self):
        steps, batch, size = self.shape
        if min(self.shape) < 0:
            raise ValueError(f"events shape: got {self.shape}, need sizes >= 0")
        if self.indptr.shape != (steps * batch + 1,) or self.indptr.dtype != np.int64:
            raise ValueError(
                f"events indptr: got {self.indptr.dtype} {self.indptr.shape}, need int64 ({steps * batch + 1},)"
            )
        if self.indices.dtype != np.int32 or self.values.dtype != np.float32:
            raise TypeError(
                f"events: got indices {self.indices.dtype} and values {self.values.dtype}, need int32 and float32"
            )
        if not self.indices.shape == self.values.shape == (self.indptr[-1],) or self.indptr[0] != 0:
            raise ValueError(
                f"events: indptr runs from {self.indptr[0]} to {self.indptr[-1]}, but there are "
                f"{self.indices.shape} indices and {self.values.shape} values"
            )

    def check(self) -> None:
        """Check every event: rows in order, indices ascending and in range, values finite and not zero.

        Raises ValueError. Cost: O(events).
        """
        if (np.diff(self.indptr) < 0).any():
            raise ValueError("events indptr: decreases; need a non-decreasing array")
        if len(self.indices) and not (0 <= self.indices.min() and self.indices.max() < self.shape[2]):
            raise ValueError(f"events indices: outside 0..{self.shape[2] - 1}")
        rising = np.diff(self.indices) > 0
        rising[self.indptr[1:-1][(self.indptr[1:-1] > 0) & (self.indptr[1:-1] < len(self.indices))] - 1] = True
        if not rising.all():
            raise ValueError("events indices: not strictly ascending within a row")
        check_finite("events values", self.values)
        if (self.values == 0).any():
            raise ValueError("events values: contains zeros; store non-zero values only")

    @classmethod
    def from_dense(cls, dense: np.ndarray) -> Events:
        """The non-zero entries of a (steps, batch, size) array as events.

        Raises ValueError for another number of dimensions. Cost: O(size of the array).
        """
        dense = np.asarray(dense)
        if dense.ndim != 3:
            raise ValueError(f"dense events: got shape {dense.shape}, need (steps, batch, size)")
        if dense.size <= PART:
            return cls._from_part(dense)
        # A part takes several times its own memory. Counting first, only one part does.
        steps, batch, size = dense.shape
        total = sum(int(np.count_nonzero(part.astype(np.float32, copy=False))) for part in in_parts(dense))
        indptr = np.zeros(steps * batch + 1, np.int64)
        indices, values = np.empty(total, np.int32), np.empty(total, np.float32)
        row = first = 0
        for events in map(cls._from_part, in_parts(dense)):
            last = first + len(events)
            indptr[row + 1 : row + len(events.indptr)] = events.indptr[1:] + first
            indices[first:last], values[first:last] = events.indices, events.values
            row, first = row + len(events.indptr) - 1, last
        return cls(indptr, indices, values, (steps, batch, size))

    @classmethod
    def _from_part(cls, dense: np.ndarray) -> Events:
        """`from_dense` in one piece."""
        dense = dense.astype(np.float32, copy=False)
        steps, batch, size = dense.shape
        flat = dense.reshape(steps * batch, size)
        if len(flat) == 1:
            # A single step of one sample, where the time of each NumPy call matters.
            columns = flat[0].nonzero()[0]
            return cls(np.array([0, len(columns)]), columns.astype(np.int32), flat[0, columns], (steps, batch, size))
        rows, columns = np.nonzero(flat)
        indptr = np.zeros(steps * batch + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=steps * batch), out=indptr[1:])
        return cls(indptr, columns.astype(np.int32), flat[rows, columns], (steps, batch, size))

    def to_dense(self) -> np.ndarray:
        """The events as a (steps, batch, size) float32 array, zero elsewhere. Cost: O(size of the array)."""
        steps, batch, size = self.shape
        dense = np.zeros((steps * batch, size), np.float32)
        dense[self.rows(), self.indices] = self.values
        return dense.reshape(self.shape)

    def rows(self) -> np.ndarray:
        """The row `t * batch + b` of every event, (n_events,) int64."""
        return np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def activity(self) -> float:
        """Events per unit, step and sample."""
        cells = self.shape[0] * self.shape[1] * self.shape[2]
        return len(self) / cells if cells else 0.0

    @property
    def graded(self) -> np.ndarray:
        """(n_events,) boolean, True for a value that is neither -1 nor 1: a multiply-accumulate, not an accumulate."""
        return np.abs(self.values) != 1

    @classmethod
    def concatenate(cls, parts: list[Events]) -> Events:
        """The events of several parts, one after the other in time. Raises ValueError where batch or size differ."""
        _, batch, size = parts[0].shape
        if any(part.shape[1:] != (batch, size) for part in parts):
            raise ValueError(
                f"events: got parts of shapes {[part.shape for part in parts]}, need the same batch and size in all"
            )
        offsets = np.cumsum([0] + [len(part) for part in parts])
        indptr = np.concatenate([[0]] + [part.indptr[1:] + o for part, o in zip(parts, offsets, strict=False)])
        return cls(
            indptr.astype(np.int64),
            np.concatenate([part.indices for part in parts]),
            np.concatenate([part.values for part in parts]),
            (sum(part.shape[0] for part in parts), batch, size),
        )


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise ValueError for NaN and infinity, with the position of the first one. Cost: one pass over the array."""
    first = 0
    for part in in_parts(array):
        finite = np.isfinite(part)
        if not finite.all():
            position = tuple(int(k) for k in np.argwhere(~finite)[0])
            position = (first + position[0], *position[1:]) if position else ()
            raise ValueError(f"{name}: got {array[position]} at position {position}; need finite numbers")
        first += len(part) if part.ndim else 0


def in_parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in consecutive parts of its first axis, at least one, each of about `PART` numbers.

    What is computed from a part takes little memory, however long the array is.
    """
    if array.size <= PART or array.ndim == 0:
        yield array
        return
    length = max(1, PART * len(array) // array.size)
    for first in range(0, len(array), length):
        yield array[first : first + length]


def encode_threshold(signal: np.ndarray, threshold: float) -> Events:
    """Send the value of a signal wherever its magnitude exceeds a threshold.

    Parameters
    ----------
    signal    : (steps, batch, size), finite; it is converted to float32
    threshold : number >= 0, in the unit of the signal

    Raises ValueError for a signal of another shape or with NaN or infinity, and for a negative threshold.
    """
    signal = _encodable(signal, threshold)
    return Events.from_dense(np.where(np.abs(signal) > threshold, signal, np.float32(0)))


def encode_delta(signal: np.ndarray, threshold: float) -> Events:
    """Send the change of a signal since the last event, once it exceeds a threshold (delta modulation).

    The sum of the values that were sent stays within `threshold` of the signal, up to rounding. Parameters and errors:
    see `encode_threshold`. Source: Neil et al. 2017, delta networks, eq. 3-4.
    """
    signal = _encodable(signal, threshold)
    sent = np.zeros(signal.shape[1:], np.float32)
    deltas = np.zeros_like(signal)
    for t in range(len(signal)):
        change = signal[t] - sent
        deltas[t] = np.where(np.abs(change) > threshold, change, np.float32(0))
        sent += deltas[t]
    return Events.from_dense(deltas)


def _encodable(signal: np.ndarray, threshold: float) -> np.ndarray:
    """The signal as float32, after the checks of both encoders."""
    signal = np.asarray(signal, np.float32)
    if signal.ndim != 3:
        raise ValueError(f"signal: got shape {signal.shape}, need (steps, batch, size)")
    if not threshold >= 0:
        raise ValueError(f"threshold: got {threshold}, need a number >= 0")
    check_finite("signal", signal)
    return signal
