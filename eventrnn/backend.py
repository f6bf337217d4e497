"""The protocols that a backend implements, the shared check of inputs, and the registry. Imports no backend.

A `Backend` turns a network into an `Engine` once; the engine runs whole sequences from a state to a state. All exact
backends return the same bits: events, states, outputs and fire counts.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from eventrnn._checks import WHOLE, float32_array, need_choice, need_flag, number_array, plain_array
from eventrnn.events import Events
from eventrnn.state import InputKind, Inputs, State, Trace, on_gpu
from eventrnn.weights import INTEGER_COLUMNS, MatrixId, takes_integers

if TYPE_CHECKING:
    from eventrnn.network import Network

#: Prefixes of kernel names in `Trace.paths`. Products of these kernels round their terms, or add them in another order
#: than the exact backends.
INEXACT = ("blas", "tensor", "integers", "float64")

#: In `Trace.paths`, the kernel of every matrix that `takes_integers` admits where a run need not be exact. It serves
#: any number of samples and steps, so that no bit depends on what a kernel is selected by.
INTEGERS = "integers"

#: In `Trace.paths`, the products of the reference backend that are not made in integers, in float32 and in float64.
SPECIFICATION, IN_FLOAT64 = "specification", "float64 specification"

#: Backends that run matrices only, no blocks that are chosen per input.
MATRICES_ONLY = ("blas",)


def merged_paths(parts: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """`Trace.paths` of a run from those of its parts, in the order of time.

    The kernel of a matrix is that of the last part, or, so that no run with an inexact part passes for exact, the last
    inexact one.
    """
    merged: dict[str, str] = {}
    for paths in parts:
        for name, kernel in paths.items():
            if kernel.startswith(INEXACT) or not merged.get(name, "").startswith(INEXACT):
                merged[name] = kernel
    return merged


def integer_matrices(network: Network) -> list[str]:
    """Names of the matrices that `exact=False` multiplies in integers on a CPU. Raises ValueError where there is none.

    A symbol is a single event of the first matrix, of which nothing need be rounded.
    """
    matrices = network.matrices()
    first = [MatrixId.of(0, "w_in")] if network.one_hot else []
    found = [name for name, weights in matrices.items() if takes_integers(weights) and name not in first]
    if not found:
        got = ", ".join(f"{name} {weights!r}" for name, weights in matrices.items())
        raise ValueError(
            f"exact: got False, but only int8 weights in blocks of {INTEGER_COLUMNS} columns, or a multiple of them, "
            f"are multiplied in integers, and the matrices are {got}; leave exact out, or store such blocks as int8"
        )
    return found


class BackendUnavailable(RuntimeError):
    """The backend exists but cannot run on this machine. The message gives the reason and the remedy."""


def need_on_host(inputs: Any) -> None:
    """Raise TypeError for an array on a GPU."""
    if on_gpu(inputs):
        kind = _kind(inputs)
        raise TypeError(
            f"inputs: got a {kind} on a GPU, which only backend='cuda' takes; copy it to the host: x.get() of CuPy, "
            "x.cpu().numpy() of torch"
        )


def as_array(inputs: Any) -> np.ndarray:
    """The inputs as a NumPy array. Raises TypeError where NumPy cannot read them, ValueError for a masked array."""
    return plain_array("inputs", inputs)


def _kind(inputs: Any) -> str:
    """Package and class of an array, for messages."""
    return f"{type(inputs).__module__.partition('.')[0]}.{type(inputs).__name__}"


class HostInputs:
    """The check and the layout of inputs for engines whose inputs lie on the host; one for each engine.

    dense : whether the engine computes with numbers as they are, in a contiguous array of its own where every zero is
            +0; otherwise it gets the caller's numbers, float32, to make events of
    whole : whether symbols always select from the events of the whole embedding (`symbol_events`). Otherwise a short
            input comes with the events of those rows only that it uses
    """

    def __init__(self, network: Network, *, dense: bool = False, whole: bool = False):
        self.network, self.size, self.dense, self.whole = network, network.layers[0].inputs, dense, whole
        self.gathered = 0

    @cached_property
    def symbol_events(self) -> Events:
        """The rows of the embedding as events of shape (symbols, 1, size). O(size of the embedding), once.

        Without an embedding symbol k is an event of value 1 from input k.
        """
        embedding = self.network.embedding
        if embedding is None:
            numbers = np.arange(self.size + 1)
            return Events(
                numbers, numbers[:-1].astype(np.int32), np.ones(self.size, np.float32), (self.size, 1, self.size)
            )
        return Events.from_dense(embedding[:, None, :])

    def prepare(self, inputs: Any) -> Inputs:
        """See `Engine.prepare`. Numbers: O(size of the input); symbols: O(steps * batch).

        Memory: beside the input, a copy of symbols, of numbers that are not float32 and, for `dense`, of all numbers;
        of events that are not contiguous or read-only.
        """
        need_on_host(inputs)
        if self.network.symbols is not None:
            return self._symbols(inputs, self.network.symbols)
        if not isinstance(inputs, Events):
            dense = _numbers(inputs, self.size, "steps, batch")
            if self.dense:
                # A dense engine must see +0 where an event list has nothing, so that -0 becomes +0.
                dense = np.ascontiguousarray(dense) + np.float32(0)
            return Inputs(InputKind.DENSE, *dense.shape, values=dense)
        if inputs.shape[2] != self.size:
            raise ValueError(f"inputs: got events of {inputs.shape[2]} units, need {self.size}")
        inputs.check()
        indptr, indices, values = map(_for_kernels, (inputs.indptr, inputs.indices, inputs.values))
        events = Events(indptr, indices, values, inputs.shape)
        return Inputs(InputKind.EVENTS, *events.shape, table=events)

    def _symbols(self, inputs: Any, known: int) -> Inputs:
        """Symbols (steps, batch) with the events of the embedding, after their checks."""
        array = _symbols(inputs, known, "steps, batch")
        steps, batch = map(int, array.shape)
        rows, table = self._used_rows(_for_kernels(array))
        return Inputs(InputKind.SYMBOLS, steps, batch, self.size, values=rows, table=table)

    def _used_rows(self, symbols: np.ndarray) -> tuple[np.ndarray, Events]:
        """Events of embedding rows, and which of them each symbol selects.

        A run over few symbols of a large embedding converts the rows that it uses. Once all runs together have
        converted as many rows as the embedding has, the whole embedding is converted and kept.
        """
        embedding = self.network.embedding
        if embedding is not None and not self.whole and self.gathered < len(embedding):
            used, rows = np.unique(symbols, return_inverse=True)
            self.gathered += len(used)
            if self.gathered < len(embedding):
                return rows.reshape(symbols.shape), Events.from_dense(embedding[used][:, None, :])
        return symbols, self.symbol_events


def step_array(network: Network, inputs: Any) -> np.ndarray:
    """The inputs of one step, (batch, I) float32 or (batch,) int64, after the checks of `HostInputs.prepare`."""
    need_on_host(inputs)
    if network.symbols is None:
        return _numbers(as_array(inputs), network.layers[0].inputs, "batch")
    return _symbols(as_array(inputs), network.symbols, "batch")


def _numbers(inputs: Any, size: int, axes: str) -> np.ndarray:
    """Numbers (axes, size) as float32, after their checks."""
    shape = f"({axes}, {size})"
    array = number_array("inputs", inputs, shape, ndim=shape.count(",") + 1)
    if array.shape[-1] != size:
        raise ValueError(f"inputs: got {array.dtype} {array.shape}, need numbers {shape}")
    return float32_array("inputs", array, shape)


def _symbols(inputs: Any, symbols: int, axes: str) -> np.ndarray:
    """Symbols (axes) as int64, after their checks."""
    shape = f"({axes})" if "," in axes else f"({axes},)"
    if isinstance(inputs, Events):
        raise ValueError(f"inputs: got Events, but the network reads symbols; give whole numbers {shape}")
    # Kernels read the copy that is checked: another thread may change the caller's symbols meanwhile.
    ndim = axes.count(",") + 1
    array = number_array("inputs", inputs, f"{shape}, the symbols", ndim=ndim, kinds=WHOLE).copy()
    if array.size and not (0 <= array.min() and array.max() < symbols):
        bad = np.argwhere((array < 0) | (array >= symbols))[0]
        raise ValueError(f"inputs: got symbol {array[tuple(bad)]} at {tuple(map(int, bad))}; need 0..{symbols - 1}")
    return array.astype(np.int64, copy=False)


def _for_kernels(array: np.ndarray) -> np.ndarray:
    """The array, or a copy where it is not contiguous, not aligned or read-only.

    Kernels take an address and a length. For a read-only array Numba would compile them once more.
    """
    return np.require(array, requirements=["C", "A", "W"])


class Stepper(Protocol):
    """Runs single time steps, starting from a state, with as little work as possible between a call and the kernel.

    Raises as `Engine.prepare` does for bad input, and FloatingPointError for a cell state that is not finite. The
    state then stays as it was, as it does after any other exception.

    steps : how many steps were made
    """

    steps: int

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Run one step. Takes (batch, I) numbers or (batch,) symbols; returns a new array (batch, V or N) float32."""
        ...

    def state(self) -> State:
        """A copy of the state."""
        ...

    def take_back(self) -> None:
        """Go back to before the last step, once."""
        ...


class Engine(Protocol):
    """A network made ready to run. An engine never modifies its inputs.

    dense : True where the engine multiplies every weight at every step, whether or not a unit fired; the operations
            of its runs are then counted as dense ones. (The reference also multiplies every weight, but it specifies
            the event-driven run and is counted as one.)
    """

    dense: bool

    def prepare(self, inputs: Any) -> Inputs:
        """Check inputs and bring them into the layout of this engine. Engines on the host use `HostInputs`.

        inputs : (steps, batch, I) numbers or `Events`; for a network that reads symbols, (steps, batch) integers.
                 An engine on a GPU also takes arrays that lie there; its outputs and records are then such arrays too.

        Raises ValueError for inputs of another shape or dtype and for numbers that are not finite, and TypeError for an
        array that this engine cannot read. An engine may leave the check of single numbers to the run
        (`Inputs.checked`).
        """
        ...

    def run(self, inputs: Inputs, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """Run all steps of prepared inputs, starting from `state`, which is not modified.

        `inputs.batch` must equal `state.batch`. `record_events` and `record_states` add `events` and `states` to the
        trace.
        """
        ...

    def stepper(self, state: State) -> Stepper | None:
        """A stepper that starts from this state; None where single steps are runs of one step."""
        ...


class Backend(Protocol):
    """A factory of engines.

    name  : its key in `BACKENDS`
    exact : True where all engines return the bits of the specification (`reference.py` in float32). The traces of other
            engines say in `Trace.paths` which products do not
    """

    name: str
    exact: bool

    def engine(self, network: Network, *, threads: int = 1) -> Engine:
        """Pack the weights for this backend. Cost: one pass over the weights."""
        ...


#: backend name -> module and class, imported at the first use
BACKENDS = {
    "reference": "eventrnn.reference:ReferenceBackend",
    "cpu": "eventrnn.cpu.engine:CpuBackend",
    "auto": "eventrnn.cpu.crossover:AutoBackend",
    "blas": "eventrnn.cpu.blas:BlasBackend",
    "cuda": "eventrnn.cuda:CudaBackend",
}


def get_backend(backend: str | Backend, exact: bool = True) -> Backend:
    """The backend of that name; an object that is a backend already is returned as it is.

    exact : False lets "cpu" and "reference" multiply int8 blocks in integers, "auto" do so and use BLAS, and "cuda" use
            tensor cores

    Raises ValueError for an unknown name.
    """
    need_flag("exact", exact)
    if not isinstance(backend, str):
        if not callable(getattr(backend, "engine", None)):
            raise TypeError(f"backend: got {backend!r}, need one of {', '.join(BACKENDS)}, or a Backend")
        return backend
    need_choice("backend", backend, BACKENDS)
    module, _, name = BACKENDS[backend].partition(":")
    kind = getattr(importlib.import_module(module), name)
    # BLAS is never exact.
    return kind() if backend == "blas" else kind(exact=exact)


# --- training ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WindowResult:
    """The figures of one update; see `training.Progress`.

    norms : 2-norm of the gradient of every parameter, by name, before clipping
    fault : why the update was not made, in words; empty if it was. The parameters are then unchanged
    """

    loss: float = 0.0
    penalty: float = 0.0
    activity: float = 0.0
    support: float = 0.0
    norm: float = 0.0
    operations: int = 0
    norms: Mapping[str, float] = field(default_factory=dict)
    fault: str = ""


class TrainingEngine(Protocol):
    """Does the updates of a run, on the parameters of a `training.Model` and the state of its optimiser.

    Where the engine keeps the parameters elsewhere, `model.parameters` and the arrays of the optimiser are mappings
    that bring an array up to date when it is read, and take it over for the next update.

    state      : state of the network after the last window
    apart      : whether `commit` may make the changes of an update on another thread
    memory_use : the memory of a device that the run takes, and what is left, in words; empty on the host
    """

    apart: bool

    @property
    def memory_use(self) -> str: ...

    @property
    def state(self) -> State: ...

    @state.setter
    def state(self, state: State) -> None: ...

    def update(
        self,
        batch: Any,
        *,
        start: str,
        step: int,
        rate: float,
        after_step: Callable[[Any, Any], None] | None,
        commit: Callable[[Callable[[], WindowResult]], WindowResult],
    ) -> WindowResult:
        """One update on a `training.Batch`: noise, forward, loss, backward, clipping, optimiser, masks.

        start      : initial state: "state" is the present one, "events" its outputs with cells at zero, "" is zero. It
                     is zero too if the number of samples has changed
        step       : number of the update, from 0; the noise depends on it and on the seed
        rate       : learning rate
        after_step : called with parameters and gradients between the optimiser and the masks, or None
        commit     : called once with a function that makes all lasting changes and returns the result, which `commit`
                     returns. Nothing lasting is changed outside it. It is not called where the engine found a fault
                     before
        """
        ...

    def masks_changed(self) -> None:
        """Take over the model's masks, which have changed."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """Within the context, arrays of the model and the optimiser are read, but not written to."""
        ...

    def evaluating(self, parameters: Mapping[str, np.ndarray] | None = None) -> AbstractContextManager[Any]:
        """Within the context, a model with the `parameters`, `forward` and `score` of `training.Model`.

        parameters : to use instead of those of the run
        """
        ...

    def kept(self) -> Mapping[str, np.ndarray]:
        """Copies of the parameters in use: those of the run or, within `evaluating`, those that it was given.

        They may be overwritten by the next call.
        """
        ...


#: backend name -> module and class of its training engine, imported at the first use
TRAINING_ENGINES = {
    "cpu": "eventrnn.training.engine:CpuTrainingEngine",
    "cuda": "eventrnn.cuda.training:CudaTrainingEngine",
}


def training_engine(backend: str) -> Callable[..., TrainingEngine]:
    """The class of the training engine of that name, which takes (model, task, settings, optimiser).

    Raises ValueError for a backend that does not train.
    """
    if backend not in TRAINING_ENGINES:
        raise ValueError(f"backend: got {backend!r}, need one of {', '.join(TRAINING_ENGINES)} for training")
    module, _, name = TRAINING_ENGINES[backend].partition(":")
    return getattr(importlib.import_module(module), name)
