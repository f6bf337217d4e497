"""The records that enter and leave an engine: inputs, states, event counts and the trace of a run.

`Inputs` is what `Engine.prepare` makes of a caller's array; `Engine.run` takes it together with a `State` and returns
a `Trace`. Nothing here knows a network or an engine.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Protocol

import numpy as np

from eventrnn._checks import check_finite, in_parts, need_kind, plain_array
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

    def shared_gates(self) -> Mapping[str, tuple[int, int]]: ...


@dataclass(frozen=True)
class HeldGates:
    """What a state holds of a matrix of gated blocks whose choices some steps share (`GatedBlocks.gate_period`).

    Attributes
    ----------
    gates : (batch, blocks) float32, the gates of the last choice of each sample, 0 for blocks that were not chosen
    left  : (batch,) int64, the number of further steps that have these gates, below the period. A sample that has none
            left chooses in its next step, whatever its gates are; after zeros every sample does
    """

    gates: np.ndarray
    left: np.ndarray

    @classmethod
    def zeros(cls, batch: int, blocks: int) -> HeldGates:
        """The gates of samples that choose in their next step."""
        return cls(np.zeros((batch, blocks), np.float32), np.zeros(batch, np.int64))


@dataclass(frozen=True)
class State:
    """The state that a network carries between time steps.

    Attributes
    ----------
    cells   : per layer (batch, N) float32, the cell state c after the event; of an LSTM its c, of a GRU its h
    outputs : per layer (batch, N) float32, the last output y; of an LSTM and a GRU their h
    gates   : name of a matrix -> its `HeldGates`, of the matrices of gated blocks whose choices some steps share; empty
              for a network without such matrices

    The first two are tuples of NumPy arrays. After a run on a GPU the state stays there until one of them is read.
    """

    cells: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    gates: Mapping[str, HeldGates] = field(default_factory=dict)

    @classmethod
    def zeros(cls, network: _Stack, batch: int) -> State:
        """The zero state of a network for `batch` samples."""
        sizes = [layer.units for layer in network.layers]
        return cls(
            tuple(np.zeros((batch, n), np.float32) for n in sizes),
            tuple(np.zeros((batch, n), np.float32) for n in sizes),
            {name: HeldGates.zeros(batch, blocks) for name, (blocks, _) in network.shared_gates().items()},
        )

    def arrays(self) -> list[np.ndarray]:
        """All arrays, each with a first axis of samples; `with_arrays` takes them in this order."""
        return [*self.cells, *self.outputs, *(each for held in self.gates.values() for each in (held.gates, held.left))]

    def with_arrays(self, arrays: Sequence[np.ndarray]) -> State:
        """A state of other arrays, in the order of `arrays`."""
        n, rest = len(self.cells), arrays[2 * len(self.cells) :]
        gates = {name: HeldGates(*rest[2 * k : 2 * k + 2]) for k, name in enumerate(self.gates)}
        return State(tuple(arrays[:n]), tuple(arrays[n : 2 * n]), gates)

    def copy(self) -> State:
        """A state that shares no memory with this one."""
        gates = {name: HeldGates(held.gates.copy(), held.left.copy()) for name, held in self.gates.items()}
        return State(tuple([c.copy() for c in self.cells]), tuple([y.copy() for y in self.outputs]), gates)

    def snapshot(self) -> State:
        """A state that neither later runs nor edits of this one change."""
        return self.copy()

    def checked(self, network: _Stack, batch: int) -> State:
        """This state in float32, as the engines hold it and the counts read it, for `batch` samples of a network.

        It shares no memory with this one. Raises ValueError for arrays of other shapes or kinds, for numbers that are
        not finite in float32, and for held gates of other matrices or for more steps than the network has them;
        TypeError for gates that are no mapping.
        """
        units = [layer.units for layer in network.layers]
        if len(self.cells) != len(units) or len(self.outputs) != len(units):
            raise ValueError(f"state: got {len(self.cells)} layers, the network has {len(units)}")
        cells, outputs = (
            tuple(
                _checked(f"state {name} of layer {k}", getattr(self, name)[k], (batch, n)) for k, n in enumerate(units)
            )
            for name in STATE_PARTS
        )
        return State(cells, outputs, self._checked_gates(network.shared_gates(), batch))

    def _checked_gates(self, shared: Mapping[str, tuple[int, int]], batch: int) -> dict[str, HeldGates]:
        """The held gates, in the order of the matrices of the network. `shared` is `Network.shared_gates`."""
        self._need_gates_of(shared)
        checked = {}
        for name, (blocks, period) in shared.items():
            held, what = self.gates[name], f"state gates of {name}"
            if not isinstance(held, HeldGates):
                raise ValueError(f"{what}: got {type(held).__name__}, need HeldGates")
            left = held.left
            if not isinstance(left, np.ndarray) or left.shape != (batch,) or left.dtype.kind not in "iu":
                got = f"{left.dtype} {left.shape}" if isinstance(left, np.ndarray) else type(left).__name__
                raise ValueError(f"{what}, left: got {got}, need whole numbers ({batch},)")
            if left.size and not 0 <= left.min() <= left.max() < period:
                raise ValueError(f"{what}, left: got {left.min()} to {left.max()}, need 0 to {period - 1}")
            checked[name] = HeldGates(_checked(what, held.gates, (batch, blocks)), left.astype(np.int64))
        return checked

    def need_gates(self, shared: Mapping[str, tuple[int, int]], batch: int) -> None:
        """Raise ValueError unless the state holds the gates of these matrices, and no others, for `batch` samples.

        shared : `Network.shared_gates`
        """
        self._need_gates_of(shared)
        for name, (blocks, _) in shared.items():
            held, need = self.gates[name], ((batch, blocks), (batch,))
            if (got := (held.gates.shape, held.left.shape)) != need:
                raise ValueError(f"state gates of {name}: got arrays of shape {got}, need {need}")

    def _need_gates_of(self, shared: Collection[str]) -> None:
        need_kind("state gates", self.gates, Mapping, "a mapping of names of matrices to HeldGates")
        if set(self.gates) != set(shared):
            got, need = (", ".join(sorted(map(str, names))) or "none" for names in (self.gates, shared))
            raise ValueError(
                f"state gates: got those of {got}, need those of {need}; the gates of a matrix whose choices several "
                "steps share are a part of every state that a run or State.zeros(network, batch) gives"
            )

    @property
    def batch(self) -> int:
        """The number of samples."""
        return self.cells[0].shape[0]

    def need_shapes(
        self, units: Sequence[int], batch: int, shared: Mapping[str, tuple[int, int]] | None = None
    ) -> None:
        """Raise ValueError for arrays of other shapes than those of layers of so many units, for `batch` samples.

        shared : `Network.shared_gates`; None for none
        """
        wanted = [(batch, n) for n in units]
        for name in STATE_PARTS:
            if (got := [array.shape for array in getattr(self, name)]) != wanted:
                raise ValueError(f"state {name}: got arrays of shape {got}, need {wanted}")
        self.need_gates({} if shared is None else shared, batch)

    def need_finite(self) -> None:
        """Raise FloatingPointError where a cell state has overflowed."""
        need_finite_cells(self.cells)


def _checked(what: str, array: Any, shape: tuple[int, int]) -> np.ndarray:
    """A copy as float32. Raises ValueError for an array of another shape or kind, or not finite; `what` names it."""
    if isinstance(array, np.ma.MaskedArray):
        plain_array(what, array)
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype.kind != "f":
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{what}: got {got}, need float {shape}")
    with np.errstate(all="ignore"):
        converted = np.array(array, np.float32, order="C")
    check_finite(what, converted)
    return converted


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


# Share of non-zero numbers below which an array is counted event by event.
SPARSE = 0.1


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
        size = outputs.shape[2]
        for part in in_parts(outputs):
            sent = part != 0
            if np.count_nonzero(sent) < SPARSE * sent.size:
                positions = np.flatnonzero(sent)
                counts += cls.of_events(positions % size, part.ravel()[positions], size)
                continue
            unit = np.abs(part) == 1
            counts += cls((sent & ~unit).sum(axis=(0, 1)), unit.sum(axis=(0, 1)))
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
    paths       : by matrix, the kernel of its products, of every matrix; empty where a backend of a user names none
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
