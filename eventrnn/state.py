"""The records that enter and leave an engine: inputs, states, event counts and the trace of a run.

`Inputs` is what `Engine.prepare` makes of a caller's array; `Engine.run` takes it together with a `State` and returns
a `Trace`. Nothing here knows a network or an engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

import numpy as np

from eventrnn._checks import check_finite, in_parts, plain_array
from eventrnn.events import Events

#: Device types of DLPack whose memory belongs to a GPU: CUDA, and memory that CUDA manages.
DLPACK_CUDA = (2, 13)


#: the two parts of a `State`
STATE_PARTS = ("cells", "outputs")


def on_gpu(array: Any) -> bool:
    """Whether an array lies on a CUDA device, by `__dlpack_device__` or `__cuda_array_interface__`. Imports nothing."""
    if type(array) in (np.ndarray, Events):
        return False
    # DLPack comes first, because a tensor that requires a gradient refuses the other interface.
    where = getattr(array, "__dlpack_device__", None)
    if where is not None:
        try:
            return int(where()[0]) in DLPACK_CUDA
        except (TypeError, ValueError, RuntimeError, BufferError):
            # DLPack has no name for this device; torch's meta tensors are an example.
            pass
    return hasattr(array, "__cuda_array_interface__")


class _LayerSize(Protocol):
    """A layer, as far as `State.zeros` needs it."""

    @property
    def units(self) -> int: ...


class _Stack(Protocol):
    """A network, as far as `State.zeros` needs it."""

    @property
    def layers(self) -> Sequence[_LayerSize]: ...


@dataclass(frozen=True)
class State:
    """The state that a network carries between time steps.

    Attributes
    ----------
    cells   : per layer (batch, N) float32, the cell state c after the event; of an LSTM its c, of a GRU its h
    outputs : per layer (batch, N) float32, the last output y; of an LSTM and a GRU their h

    Both are tuples of NumPy arrays. After a run on a GPU the state stays there until one of them is read.
    """

    cells: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]

    @classmethod
    def zeros(cls, network: _Stack, batch: int) -> State:
        """The zero state of a network for `batch` samples."""
        sizes = [layer.units for layer in network.layers]
        return cls(
            tuple(np.zeros((batch, n), np.float32) for n in sizes),
            tuple(np.zeros((batch, n), np.float32) for n in sizes),
        )

    def copy(self) -> State:
        """A state that shares no memory with this one."""
        return State(tuple(c.copy() for c in self.cells), tuple(y.copy() for y in self.outputs))

    def snapshot(self) -> State:
        """A state that neither later runs nor edits of this one change."""
        return self.copy()

    def checked(self, network: _Stack, batch: int) -> State:
        """This state in float32, as the engines hold it and the counts read it, for `batch` samples of a network.

        It shares no memory with this one. Raises ValueError for arrays of other shapes or kinds, and for numbers that
        are not finite in float32.
        """
        units = [layer.units for layer in network.layers]
        if len(self.cells) != len(units) or len(self.outputs) != len(units):
            raise ValueError(f"state: got {len(self.cells)} layers, the network has {len(units)}")
        return State(*(tuple(self._checked(name, k, (batch, n)) for k, n in enumerate(units)) for name in STATE_PARTS))

    def _checked(self, name: str, k: int, shape: tuple[int, int]) -> np.ndarray:
        array = getattr(self, name)[k]
        if isinstance(array, np.ma.MaskedArray):
            plain_array(f"state {name} of layer {k}", array)
        if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind != "f":
            got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"state {name} of layer {k}: got {got}, need float {shape}")
        with np.errstate(all="ignore"):
            converted = np.array(array, np.float32, order="C")
        check_finite(f"state {name} of layer {k}", converted)
        return converted

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self.cells[0].shape[0]

    def need_shapes(self, units: Sequence[int], batch: int) -> None:
        """Raise ValueError for arrays of other shapes than those of layers of so many units, for `batch` samples."""
        wanted = [(batch, n) for n in units]
        for name in STATE_PARTS:
            if (got := [array.shape for array in getattr(self, name)]) != wanted:
                raise ValueError(f"state {name}: got arrays of shape {got}, need {wanted}")

    def need_finite(self) -> None:
        """Raise FloatingPointError where a cell state has overflowed."""
        need_finite_cells(self.cells)


class InputKind(Enum):
    """How `Inputs` holds its numbers."""

    DENSE = "dense"  # an array (steps, batch, size)
    EVENTS = "events"  # an event list of the whole input
    SYMBOLS = "symbols"  # integers that select rows of an embedding


class ArrayLibrary(Protocol):
    """The library of a caller's arrays on a GPU. Outputs and records of a run are arrays of the same library."""

    def wrap(self, array: Any) -> Any:
        """An array of the engine as one of the caller's library, in the same memory."""
        ...

    def concatenate(self, arrays: Sequence[Any]) -> Any:
        """The caller's arrays one after the other along the first axis."""
        ...

    def take(self, array: Any, positions: np.ndarray, *, axis: int) -> Any:
        """An array of the engine with only these positions along an axis, as a new contiguous array."""
        ...

    def zeros(self, shape: tuple[int, ...]) -> Any:
        """An array of the caller's library of float32 zeros."""
        ...

    def index(self, positions: np.ndarray) -> Any:
        """Positions (n,) int64 of the host as an index of the caller's arrays."""
        ...

    def bincount(self, values: Any, size: int) -> np.ndarray:
        """How often each of the integers 0 to `size - 1` occurs in an array on the GPU; (size,) on the host."""
        ...


@dataclass(frozen=True)
class Inputs:
    """The input of a run, or of some of its time steps, in the layout that an engine asked for.

    Row `t * batch + b` is the input of sample b in step t.

    Attributes
    ----------
    kind        : which of the fields below hold the numbers
    steps, batch, size : the number of time steps, of samples and of input units
    values      : DENSE: (steps, batch, size) float32; SYMBOLS: (steps, batch) int64; EVENTS: None. C-contiguous
    table       : EVENTS: the events of the whole input; SYMBOLS: the events of embedding rows, with shape
                  (symbols, 1, size); DENSE: None
    first_step  : the step of the caller's input at which this part of it begins
    checked     : False where the engine still has to find numbers that are not finite and symbols that do not exist
    array_library : the library of the caller's arrays where `values` lie on a GPU, else None
    given       : the caller's numbers before they were converted to `values`, on the same GPU; None on the host
    lengths     : (batch,) int64, the step of the caller's input at which each sample ends; None where all samples have
                  all steps. What follows the end of a sample is padding, which `ragged.run` leaves out
    samples     : (batch,) int64, the caller's samples that these are, as `part` chose them; None for all samples
    """

    kind: InputKind
    steps: int
    batch: int
    size: int
    values: Any = None
    table: Events | None = None
    first_step: int = 0
    checked: bool = True
    array_library: ArrayLibrary | None = None
    given: Any = None
    lengths: np.ndarray | None = None
    samples: np.ndarray | None = None

    @property
    def rows(self) -> np.ndarray:
        """The row of `table` that each row of the input reads, (steps * batch,) int64. Not for DENSE."""
        if self.kind is InputKind.SYMBOLS:
            return self.values.ravel()
        if self.samples is None:
            first = self.first_step * self.batch
            return np.arange(first, first + self.steps * self.batch)
        first_rows = np.arange(self.first_step, self.first_step + self.steps) * self.event_table.shape[1]
        return (first_rows[:, None] + self.samples).ravel()

    @property
    def event_table(self) -> Events:
        """`table`, of an input that has one. Raises TypeError for DENSE."""
        if self.table is None:
            raise TypeError(f"inputs: {self.kind.value} inputs have no event table")
        return self.table

    def chunk(self, start: int, stop: int) -> Inputs:
        """Steps `start` to `stop - 1`, in the same memory."""
        values, given = (None if each is None else each[start:stop] for each in (self.values, self.given))
        return replace(self, steps=stop - start, values=values, given=given, first_step=self.first_step + start)

    def part(self, start: int, stop: int, samples: np.ndarray) -> Inputs:
        """Steps `start` to `stop - 1` of some samples. Numbers and symbols are copied; an event table is shared."""
        chunk = self.chunk(start, stop)
        take = np.take if self.array_library is None else self.array_library.take
        values = None if chunk.values is None else take(chunk.values, samples, axis=1)
        given = values
        if self.given is not self.values:
            given = None if chunk.given is None else take(chunk.given, samples, axis=1)
        return replace(chunk, batch=len(samples), values=values, given=given, lengths=None, samples=samples)

    def require_lengths(self) -> np.ndarray:
        """`lengths`, of an input that has them. Raises TypeError where all samples have all steps."""
        if self.lengths is None:
            raise TypeError("inputs: all samples have all steps")
        return self.lengths

    def present(self) -> np.ndarray:
        """Which steps of which samples are not padding, (steps, batch) boolean."""
        ends = self.first_step + self.steps if self.lengths is None else self.lengths
        step = np.arange(self.first_step, self.first_step + self.steps)[:, None]
        return np.broadcast_to(step < ends, (self.steps, self.batch))

    def to_events(self) -> Events:
        """A host input as events of shape (steps, batch, size). O(numbers) for DENSE, else O(events)."""
        if self.kind is InputKind.DENSE:
            return Events.from_dense(self.values)
        table = self.event_table
        if self.kind is InputKind.EVENTS and self.samples is None:
            first, last = self.first_step * self.batch, (self.first_step + self.steps) * self.batch
            indptr = table.indptr[first : last + 1]
            entries = slice(indptr[0], indptr[-1])
            shape = self.steps, self.batch, self.size
            return Events(indptr - indptr[0], table.indices[entries].copy(), table.values[entries].copy(), shape)
        entries, lengths = _entries_of(table, self.rows)
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        events = Events(indptr, table.indices[entries], table.values[entries], (self.steps, self.batch, self.size))
        return events if self.lengths is None else events.until(self.lengths - self.first_step)

    def to_event_table(self) -> Inputs:
        """A host input as one that has a table of events. O(numbers) for DENSE, else the input itself."""
        if self.kind is not InputKind.DENSE:
            return self
        events = Events.from_dense(self.values)
        # The table holds these steps and samples only, and has no events in the padding.
        whole = {"first_step": 0, "lengths": None, "samples": None}
        return replace(self, kind=InputKind.EVENTS, values=None, table=events, **whole)

    def to_dense(self) -> np.ndarray:
        """A host input as an array (steps, batch, size) float32. DENSE inputs are returned as they are."""
        return self.values if self.kind is InputKind.DENSE else self.to_events().to_dense()

    def record(self) -> Any:
        """The input for `Simulation.inputs`: events, or a copy of the caller's array where that lies on a GPU."""
        if self.array_library is not None:
            # The caller may reuse the memory of the inputs.
            return self.array_library.wrap(self.given.copy())
        return self.to_events()

    def row_uses(self) -> np.ndarray:
        """How often each row of `table` is read, (rows of the table,) int64. Not for DENSE."""
        size = len(self.event_table.indptr) - 1
        rows = self.rows
        if self.lengths is not None:
            present = np.flatnonzero(self.present())
            rows = rows[present] if self.array_library is None else self.array_library.take(rows, present, axis=0)
        if self.array_library is not None:
            return self.array_library.bincount(rows, size)
        return np.bincount(rows, minlength=size)

    def fire_counts(self) -> FireCounts:
        """How often each input unit was not zero. O(numbers) for DENSE, else O(rows of the table + events read)."""
        if self.kind is InputKind.DENSE:
            return FireCounts.of(self.values)
        table = self.event_table
        if self.kind is InputKind.EVENTS and self.samples is None:
            first, last = (table.indptr[t * self.batch] for t in (self.first_step, self.first_step + self.steps))
            return FireCounts.of_events(table.indices[first:last], table.values[first:last], self.size)
        # A short run reads few rows of a large embedding.
        row_uses = self.row_uses()
        read = np.flatnonzero(row_uses)
        entries, lengths = _entries_of(table, read)
        units, uses = table.indices[entries], np.repeat(row_uses[read], lengths)
        unit = np.abs(table.values[entries]) == 1
        # The weights of `bincount` are float64, which has every whole number up to 2^53.
        total = np.bincount(units, uses, self.size).astype(np.int64)
        binary = np.bincount(units[unit], uses[unit], self.size).astype(np.int64)
        return FireCounts(total - binary, binary)


def _entries_of(table: Events, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions of the events of some rows of a table, one row after the other, and the events per row."""
    lengths = np.diff(table.indptr)[rows]
    ends = np.cumsum(lengths)
    # Within a row, positions go up by 1 from its first one.
    return np.arange(lengths.sum()) + np.repeat(table.indptr[rows] - ends + lengths, lengths), lengths


@dataclass(frozen=True)
class FireCounts:
    """The number of events that each unit sent during a run, by kind of value.

    Attributes
    ----------
    graded : (size,) int64, events whose value is neither -1 nor 1
    binary : (size,) int64, events whose value is -1 or 1
    """

    graded: np.ndarray
    binary: np.ndarray

    @classmethod
    def zeros(cls, size: int) -> FireCounts:
        """The counts of `size` units that sent nothing."""
        return cls(np.zeros(size, np.int64), np.zeros(size, np.int64))

    @classmethod
    def of(cls, outputs: np.ndarray) -> FireCounts:
        """The counts of an array (steps, batch, size) of outputs, zero where a unit sent nothing."""
        counts = cls.zeros(outputs.shape[2])
        for part in in_parts(outputs):
            unit = np.abs(part) == 1
            counts += cls(((part != 0) & ~unit).sum(axis=(0, 1)), unit.sum(axis=(0, 1)))
        return counts

    @classmethod
    def of_events(cls, indices: np.ndarray, values: np.ndarray, size: int) -> FireCounts:
        """The counts of events, the units `indices` and the `values` beside them."""
        counts = cls.zeros(size)
        for units, sent in zip(in_parts(indices), in_parts(values), strict=True):
            binary = np.abs(sent) == 1
            counts += cls(*(np.bincount(units[chosen], minlength=size) for chosen in (~binary, binary)))
        return counts

    @property
    def total(self) -> np.ndarray:
        """Events of both kinds, (size,) int64."""
        return self.graded + self.binary

    def __add__(self, other: FireCounts) -> FireCounts:
        return FireCounts(self.graded + other.graded, self.binary + other.binary)


@dataclass(frozen=True)
class Trace:
    """The result of `Engine.run`.

    Attributes
    ----------
    output      : (steps, batch, V) read-out, or the last layer's outputs (steps, batch, N) without a read-out
    state       : the state after the last step
    fired       : per layer, the number of events of each unit
    events      : per layer (steps, batch, N) outputs, where `record_events` was set
    states      : per layer (steps, batch, N) cells after the event, where `record_states` was set
    paths       : by matrix, the kernel of its products, where the engine had a choice
    input_fired : how often each input unit was not zero; None where `Inputs.fire_counts` has to count
    """

    output: np.ndarray
    state: State
    fired: tuple[FireCounts, ...]
    events: tuple[np.ndarray, ...] = ()
    states: tuple[np.ndarray, ...] = field(default=())
    paths: Mapping[str, str] = field(default_factory=dict)
    input_fired: FireCounts | None = None


def need_finite_cells(cells: tuple[np.ndarray, ...]) -> None:
    """Raise FloatingPointError where a cell state has overflowed; `cells` holds per layer (batch, N)."""
    for k, layer in enumerate(cells):
        if not np.isfinite(layer).all():
            unit = int(np.argmin(np.isfinite(layer).all(axis=0)))
            raise FloatingPointError(
                f"layer {k}: the cell state of unit {unit} is not finite after this run ({layer[:, unit]}); check the "
                "scale of the weights"
            )


#: Why an input of a matrix of gated blocks has no finite gates. Kernels report the place in this list, counted from 1.
GATE_FAULTS = (
    "a logit is not finite; check the scale of gate, gate_bias and inputs",
    "the logits of the chosen blocks cancel, and their mean is zero or nearly so; raise gate_bias, or use "
    "gate_rule='softmax'",
    "the largest gate times the largest input is beyond float32; check the scale of the inputs, and with the rule "
    "'linear' raise gate_bias, or use gate_rule='softmax'",
)


def gates_not_finite(name: str, fault: int | None = None) -> FloatingPointError:
    """The error where an input of a matrix of gated blocks has no finite gates (`weights/gated.py`).

    fault : the cause, counted from 1 in `GATE_FAULTS`; None where it is not known
    """
    cause = "; or ".join(GATE_FAULTS) if fault is None else GATE_FAULTS[fault - 1]
    return FloatingPointError(f"{name}: the gates of its blocks are not finite for some input: {cause}")
