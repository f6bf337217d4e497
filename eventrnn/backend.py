"""What a backend must answer, and the names by which backends are found. Imports none of them.

A backend turns a network into an `Engine` once; the engine runs whole sequences, state in and state out.
All backends of the exact tier give the same bits: events, states, outputs and fire counts.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eventrnn.events import Events

if TYPE_CHECKING:
    from eventrnn.network import Network


#: DLPack's kinds of device whose memory is a GPU's: CUDA, and CUDA managed
DLPACK_CUDA = (2, 13)
#: how ways begin, in `Trace.paths`, that sum in an order of their own
INEXACT = ("blas", "tensor")


class BackendUnavailable(RuntimeError):
    """The backend exists but cannot run here; the message says why and what to install."""


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


def need_on_host(inputs: Any) -> None:
    """Refuse an array on a GPU. Raises TypeError."""
    if on_gpu(inputs):
        kind = _kind(inputs)
        raise TypeError(
            f"inputs: got a {kind} on a GPU, which only backend='cuda' takes; copy it to the host: x.get() of CuPy, "
            "x.cpu().numpy() of torch"
        )


def as_array(inputs: Any) -> np.ndarray:
    """As NumPy has it. Raises TypeError for what it cannot read."""
    try:
        return np.asarray(inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"inputs: NumPy cannot read this {_kind(inputs)} ({error}); give a NumPy array") from None


def _kind(inputs: Any) -> str:
    return f"{type(inputs).__module__.partition('.')[0]}.{type(inputs).__name__}"


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


@dataclass
class BackwardWork:
    """What the backward pass of a window did with one matrix; by presynaptic unit, (n_pre,) int64, unless said.

    Attributes
    ----------
    kept            : weights that are not pruned
    columns         : of the matrix, a number
    rows            : samples and steps of the window, a number
    asked           : of them, those for which a dense engine would make the gradient of what was sent, a number
    fired           : events that arrived: each has a use for a row of the weight gradient
    gradient_rows   : rows that were added, zeros of BLAS included
    gradient_stored : weights that such a row touches
    open            : samples and steps whose gradient of what was sent has a use
    dots            : those that were made
    dots_stored     : weights that such a dot touches
    """

    kept: np.ndarray
    columns: int
    rows: int
    asked: int
    fired: np.ndarray
    gradient_rows: np.ndarray
    gradient_stored: np.ndarray
    open: np.ndarray
    dots: np.ndarray
    dots_stored: np.ndarray

    @classmethod
    def none(cls, kept: np.ndarray, columns: int, rows: int) -> BackwardWork:
        """Nothing done yet."""
        return cls(kept, columns, rows, 0, *(np.zeros(len(kept), np.int64) for _ in range(6)))


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


class Stepper(Protocol):
    """One time step after the other from a state on, with as little between calls and kernel as can be.

    Raises as `Network.feed` does for bad input, and FloatingPointError for a cell that is not finite; the state then
    stays what it was.
    """

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """(batch, I) numbers or (batch,) symbols in, (batch, V or N) out, an array of its own."""
        ...

    def state(self) -> State:
        """A copy of the state."""
        ...


def need_finite_cells(cells: tuple[np.ndarray, ...]) -> None:
    """Refuse cells that overflowed. Raises FloatingPointError."""
    for k, layer in enumerate(cells):
        if not np.isfinite(layer).all():
            unit = int(np.argmin(np.isfinite(layer).all(axis=0)))
            raise FloatingPointError(
                f"layer {k}: the cell of unit {unit} is {layer[:, unit]} after this run; weights are huge"
            )


class Engine(Protocol):
    """A network made ready to run. The inputs are never modified.

    `dense` says that it multiplies every weight, whatever fired: its operations are then counted so. (The reference
    does too, but stands for the event-driven run that it specifies.)

    An engine that takes inputs as they are, those on its GPU for one, has `feed(inputs) -> Feed` in the place of
    `Network.feed`; it then checks them in the run. Outputs and records of arrays on a GPU are such arrays too.
    """

    dense: bool

    def run(self, feed: Feed, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """All steps of the feed from `state` on. `feed.batch` must equal `state.batch`."""
        ...

    def stepper(self, state: State) -> Stepper | None:
        """For single steps, from that state on; None where they are runs of one step."""
        ...


class Backend(Protocol):
    """Makes engines. `exact` backends all give the same bits; the others are close, and say so."""

    name: str
    exact: bool

    def engine(self, network: Network, *, threads: int = 1) -> Engine:
        """Pack the weights for this backend. Cost: one pass over them."""
        ...


#: name -> where it lives; imported on first use
BACKENDS = {
    "reference": "eventrnn.reference:ReferenceBackend",
    "cpu": "eventrnn.cpu:CpuBackend",
    "auto": "eventrnn.crossover:AutoBackend",
    "blas": "eventrnn.blas:BlasBackend",
    "cuda": "eventrnn.cuda:CudaBackend",
}


def get_backend(backend: str | Backend, exact: bool = True) -> Backend:
    """The backend of that name, or the object itself.

    `exact=False` lets "auto" use BLAS, and "cuda" tensor cores.
    """
    if not isinstance(backend, str):
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, need one of {', '.join(BACKENDS)}")
    module, _, name = BACKENDS[backend].partition(":")
    kind = getattr(importlib.import_module(module), name)
    if backend in ("auto", "cuda"):
        return kind(exact=exact)
    if not exact and kind.exact:
        raise ValueError(
            f"exact: got False, but backend {backend!r} has exact paths only; use 'auto' or 'cuda', or leave it out"
        )
    return kind()
