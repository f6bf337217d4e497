"""MOVED."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.events import Events

if TYPE_CHECKING:
    from eventrnn.network import Network


#: DLPack's kinds of device whose memory is a GPU's: CUDA, and CUDA managed
DLPACK_CUDA = (2, 13)


def on_gpu(array: Any) -> bool:
    """Whether an array lies on a CUDA device: it has `__cuda_array_interface__`, or DLPack says so. Imports nothing."""
    if type(array) in (np.ndarray, Events):
        return False
    # Asked first, for a tensor that requires a gradient refuses the other interface.
    where = getattr(array, "__dlpack_device__", None)
    if where is not None:
        try:
            return int(where()[0]) in DLPACK_CUDA
        except (TypeError, ValueError, RuntimeError, BufferError):
            # It lies nowhere that DLPack knows, as torch's meta tensors do.
            pass
    return hasattr(array, "__cuda_array_interface__")


@dataclass(frozen=True)
class State:
    """What a network carries between steps: per layer the cells `c` and the last outputs `y`, (batch, N) float32.

    NumPy arrays. The state of a run on a GPU lies there until one of them is asked for.
    """

    cells: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]

    @classmethod
    def zeros(cls, network: Network, batch: int) -> State:
        sizes = [layer.units for layer in network.layers]
        return cls(
            tuple(np.zeros((batch, n), np.float32) for n in sizes),
            tuple(np.zeros((batch, n), np.float32) for n in sizes),
        )

    def copy(self) -> State:
        return State(tuple(c.copy() for c in self.cells), tuple(y.copy() for y in self.outputs))

    @property
    def batch(self) -> int:
        return self.cells[0].shape[0]

    def need_finite(self) -> None:
        """Refuse cells that overflowed. Raises FloatingPointError."""
        need_finite_cells(self.cells)


@dataclass(frozen=True)
class Feed:
    """The input of a run: time-major row `t * batch + b` reads row `row_of[t * batch + b]` of an event table.

    Dense input has one table row a step and sample; index input has one a symbol, its embedding.
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    row_of: np.ndarray
    steps: int
    batch: int
    size: int

    def part(self, start: int, stop: int) -> Feed:
        """Steps `start` to `stop`, sharing the table."""
        rows = self.row_of[start * self.batch : stop * self.batch]
        return Feed(self.indptr, self.indices, self.values, rows, stop - start, self.batch, self.size)

    def fire_counts(self) -> FireCounts:
        """How often each input was not zero. O(table + rows)."""
        per_entry = np.repeat(self.uses(), np.diff(self.indptr))
        counts = FireCounts.zeros(self.size)
        graded = np.abs(self.values) != 1
        np.add.at(counts.graded, self.indices[graded], per_entry[graded])
        np.add.at(counts.binary, self.indices[~graded], per_entry[~graded])
        return counts

    def uses(self) -> np.ndarray:
        """How often each row of the table is read."""
        return np.bincount(self.row_of, minlength=len(self.indptr) - 1)

    def keep(self, dense: Any) -> Any:
        """What a recorded run keeps of a layer's (steps, batch, N) outputs: of a long quiet run only the events."""
        return Events.from_dense(dense)

    def join(self, parts: Sequence[Any]) -> Any:
        """Parts of a record, or of an output, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return Events.concatenate(list(parts)) if isinstance(parts[0], Events) else np.concatenate(parts)

    def events(self) -> Any:
        """The input as events over all rows. O(events)."""
        lengths = np.diff(self.indptr)[self.row_of]
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
        entries = np.repeat(self.indptr[self.row_of], lengths) + within
        return Events(indptr, self.indices[entries], self.values[entries], (self.steps, self.batch, self.size))


@dataclass(frozen=True)
class FireCounts:
    """Events each unit sent over a run, apart by value: graded, or binary (-1 or 1). (size,) int64 each."""

    graded: np.ndarray
    binary: np.ndarray

    @classmethod
    def zeros(cls, size: int) -> FireCounts:
        return cls(np.zeros(size, np.int64), np.zeros(size, np.int64))

    @property
    def total(self) -> np.ndarray:
        return self.graded + self.binary

    def __add__(self, other: FireCounts) -> FireCounts:
        return FireCounts(self.graded + other.graded, self.binary + other.binary)


@dataclass(frozen=True)
class Trace:
    """What a run leaves behind.

    Attributes
    ----------
    output : (steps, batch, V) read-out, or the last layer's (steps, batch, N) events where there is no read-out
    state  : the state after the last step
    fired  : per layer, events sent
    events : per layer (steps, batch, N) outputs, where asked for
    states : per layer (steps, batch, N) cells after the event, where asked for
    paths  : by matrix, how its products went, where the engine had a choice
    input_fired : how often each input was not zero, where the engine counted them; else the feed does
    """

    output: np.ndarray
    state: State
    fired: tuple[FireCounts, ...]
    events: tuple[np.ndarray, ...] = ()
    states: tuple[np.ndarray, ...] = field(default=())
    paths: Mapping[str, str] = field(default_factory=dict)
    input_fired: FireCounts | None = None


def need_finite_cells(cells: tuple[np.ndarray, ...]) -> None:
    """Refuse cells that overflowed. Raises FloatingPointError."""
    for k, layer in enumerate(cells):
        if not np.isfinite(layer).all():
            unit = int(np.argmin(np.isfinite(layer).all(axis=0)))
            raise FloatingPointError(
                f"layer {k}: the cell of unit {unit} is {layer[:, unit]} after this run; weights are huge"
            )
