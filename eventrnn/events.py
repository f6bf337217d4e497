"""Event lists: which units sent a value, and which value, per time step and sample; encoders of signals as events.

Networks and backends build on this file; it imports neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

from eventrnn._checks import (
    check_finite,
    float32_array,
    in_parts,
    need_flag,
    need_kind,
    need_number,
    number_array,
    plain_array,
)


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
        # Comparing types is fast, and a single step makes a record.
        if type(self.shape) is not tuple or len(self.shape) != 3:
            raise ValueError(f"events shape: got {self.shape!r}, need a tuple (steps, batch, size)")
        for n in self.shape:
            if (type(n) is not int and not isinstance(n, np.integer)) or n < 0:
                raise ValueError(f"events shape: got {self.shape}, need sizes >= 0")
        for name, array in (("indptr", self.indptr), ("indices", self.indices), ("values", self.values)):
            if type(array) is not np.ndarray:
                need_kind(f"events {name}", array, np.ndarray, "a NumPy array; Events.from_dense makes them of numbers")
                plain_array(f"events {name}", array)
        steps, batch, size = self.shape
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

        Raises ValueError for another number of dimensions, and for what is not finite numbers. Cost: O(size of the
        array).
        """
        dense = number_array("dense events", dense, "(steps, batch, size)", ndim=3)
        if dense.dtype == np.float32:
            events = cls._from_parts(dense)
        else:
            with np.errstate(over="ignore"):
                events = cls._from_parts(dense)
        if not np.isfinite(events.values).all():
            float32_array("dense events", dense, "(steps, batch, size)")
        return events

    @classmethod
    def _from_parts(cls, dense: np.ndarray) -> Events:
        parts = in_parts(dense)
        first_part = next(parts)
        if len(first_part) == len(dense):
            return cls._from_part(first_part)
        # A part takes several times its own memory. Counting first, only one part does.
        steps, batch, size = dense.shape
        total = sum(int(np.count_nonzero(part.astype(np.float32, copy=False) != 0)) for part in in_parts(dense))
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
        # For an array of two axes `np.nonzero` takes many times as long.
        rows, columns = np.divmod(np.flatnonzero(flat != 0), size)
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

    def until(self, lengths: np.ndarray) -> Events:
        """The events of each sample before its end. O(events).

        lengths : (batch,) whole numbers; sample b keeps the events of its first `lengths[b]` steps
        """
        steps, batch, _ = self.shape
        kept_rows = (np.arange(steps)[:, None] < lengths).ravel()
        counts = np.diff(self.indptr)
        kept = np.repeat(kept_rows, counts)
        indptr = np.concatenate([[0], np.cumsum(np.where(kept_rows, counts, 0))]).astype(np.int64)
        return Events(indptr, self.indices[kept], self.values[kept], (steps, batch, self.shape[2]))

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
        """The events of several parts, one after the other in time.

        Raises ValueError where batch or size differ, and for no part.
        """
        if not parts:
            raise ValueError("events: got no parts to join, need at least one")
        for part in parts:
            need_kind("events", part, Events, "parts that are Events")
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


def encode_threshold(signal: np.ndarray, threshold: float) -> Events:
    """Send the value of a signal wherever its magnitude exceeds a threshold.

    Parameters
    ----------
    signal    : (steps, batch, size) real numbers, finite in float32, to which they are converted
    threshold : number >= 0, in the unit of the signal

    Raises ValueError for a signal or a threshold that is not like this.
    """
    signal, threshold = _encodable(signal, threshold)
    return Events.from_dense(np.where(np.abs(signal) > threshold, signal, np.float32(0)))


@overload
def encode_delta(
    signal: np.ndarray, threshold: float, *, sent: np.ndarray | None = None, return_sent: Literal[False] = False
) -> Events: ...


@overload
def encode_delta(
    signal: np.ndarray, threshold: float, *, sent: np.ndarray | None = None, return_sent: Literal[True]
) -> tuple[Events, np.ndarray]: ...


def encode_delta(
    signal: np.ndarray, threshold: float, *, sent: np.ndarray | None = None, return_sent: bool = False
) -> Events | tuple[Events, np.ndarray]:
    """Send the change of a signal since the last event, once it exceeds a threshold (delta modulation).

    The sum of the values that were sent stays within `threshold` of the signal, up to rounding. Source: Neil et al.
    2017, delta networks, eq. 3-4.

    Parameters
    ----------
    signal      : (steps, batch, size) real numbers, finite in float32, to which they are converted
    threshold   : number >= 0, in the unit of the signal
    sent        : (batch, size) sums of the values sent before this signal; None for zeros, the start of a signal
    return_sent : return the events and these sums after the signal, (batch, size) float32

    A signal that arrives in chunks gives the events of the whole signal, bit for bit, where each chunk goes on from the
    sums of the one before:

    >>> signal = np.array([0.0, 0.2, 0.5, 0.6, 0.9]).reshape(5, 1, 1)
    >>> sent, values = None, []
    >>> for chunk in (signal[:2], signal[2:]):
    ...     events, sent = encode_delta(chunk, 0.3, sent=sent, return_sent=True)
    ...     values += events.values.tolist()
    >>> values == encode_delta(signal, 0.3).values.tolist()
    True

    Raises ValueError for arguments that are not like this, and where a change exceeds the range of float32.
    """
    signal, threshold = _encodable(signal, threshold)
    need_flag("return_sent", return_sent)
    shape = signal.shape[1:]
    total = np.zeros(shape, np.float32)
    if sent is not None:
        total += float32_array("sent", _of_shape(sent, shape), f"{shape}")
    deltas = np.zeros_like(signal)
    with np.errstate(over="ignore"):
        for t in range(len(signal)):
            change = signal[t] - total
            deltas[t] = np.where(np.abs(change) > threshold, change, np.float32(0))
            total += deltas[t]
    check_finite("change of the signal", deltas)
    events = Events.from_dense(deltas)
    return (events, total) if return_sent else events


def _of_shape(sent: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The sums as a plain array. Raises ValueError for another shape, which NumPy might broadcast."""
    array = plain_array("sent", sent)
    if array.shape != shape:
        raise ValueError(f"sent: got shape {array.shape}, need {shape}, the batch and size of the signal")
    return array


def _encodable(signal: np.ndarray, threshold: float) -> tuple[np.ndarray, float]:
    """The signal as float32 and the threshold, after the checks of both encoders."""
    signal = float32_array("signal", signal, "(steps, batch, size)", ndim=3)
    return signal, need_number("threshold", threshold, at_least=0)
