"""Running a network over a sequence, whole or step by step. Start reading here.

The path of one time step is three files long: this one, then `cpu/kernels/time_loop.py` (or `reference.py`, or
`cuda/kernels/`), then `cells.py`. `simulate` runs one sequence; a `Simulator` keeps the state between calls.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from eventrnn.backend import INEXACT, Backend, Stepper, as_array, get_backend, need_on_host
from eventrnn.events import Events, check_finite
from eventrnn.network import Network, _need_sizes
from eventrnn.state import FireCounts, Inputs, State, Trace, on_gpu

RECORDABLE = ("events", "states")

CARRIES = ("state", "events")

# A recorded run goes through the engine in chunks of time whose dense records stay below this number of bytes.
RECORD_BYTES = 1 << 26


@dataclass(frozen=True)
class Simulation:
    """The result of a run.

    Where the inputs were arrays on a GPU, the output and the records are arrays there too: torch tensors for torch
    inputs, else CuPy arrays.

    Attributes
    ----------
    output      : (steps, batch, V) float32 read-out; without a read-out the last layer's outputs (steps, batch, N)
    backend     : the name of the backend
    exact       : whether the results have the bits of the exact tier
    dense       : whether the engine multiplied every weight at every step, whether or not a unit fired
    initial     : the state from which the run started
    state       : the state after the last step, from which the next run can continue
    input_fired : how often each input of layer 0 was not zero
    fired       : per layer, the number of events of each unit
    steps, batch : the number of time steps and of samples
    inputs      : with record="events", the input as `Events`; of inputs on a GPU a copy of the array
    events      : with record="events", per layer `Events`; of inputs on a GPU per layer (steps, batch, N) outputs
    states      : with record="states", per layer (steps, batch, N) float32 cells after the event
    paths       : by matrix, the kernel of its products, where the backend had a choice ("auto" and "cuda" have)
    """

    output: np.ndarray
    backend: str
    exact: bool
    dense: bool
    initial: State
    state: State
    input_fired: FireCounts
    fired: tuple[FireCounts, ...]
    steps: int
    batch: int
    inputs: Events | None = None
    events: tuple[Events, ...] = ()
    states: tuple[np.ndarray, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def activity(self) -> tuple[float, ...]:
        """Per layer, events per unit, step and sample."""
        cells = self.steps * self.batch
        return tuple(float(f.total.sum() / (cells * len(f.graded))) if cells else 0.0 for f in self.fired)


class Simulator:
    """A network with a state that is carried from call to call.

    A sequence gives the same bits as one `run`, as several runs of consecutive chunks, and as single `step` calls.

    Parameters
    ----------
    network : the network to run
    batch   : the number of samples that run side by side
    backend : a name in `BACKENDS` or a `Backend`; "auto" takes, for every matrix, the kernel that was measured once to
              be the fastest on this machine
    exact   : False lets "auto" use BLAS, and "cuda", from 4 samples on, tensor cores with float16 weights and events.
              Their sums are made in another order; they are used where they were measured to be faster, and
              `Simulation.paths` names them. "cuda" measures at the first `run`; a `step` before it is exact
    threads : threads of the engine; their number never changes a bit
    state   : the state to start from; None is the zero state
    carry   : "state" carries cells and outputs. "events" zeroes the cells at the start of every `run` and every
              `window` steps and carries only the outputs, as the released EvNN code does between windows
    window  : time steps between two such resets, for carry="events"

    Raises ValueError for options outside these, for a state of another shape and for one that is not finite, and
    BackendUnavailable where the backend cannot run on this machine.
    """

    def __init__(
        self,
        network: Network,
        *,
        batch: int = 1,
        backend: str | Backend = "cpu",
        exact: bool = True,
        threads: int = 1,
        state: State | None = None,
        carry: str = "state",
        window: int | None = None,
    ):
        self._stepper: Stepper | None = None
        _need_sizes(batch=batch, threads=threads, window=window)
        if carry not in CARRIES:
            raise ValueError(f"carry: got {carry!r}, need one of {', '.join(CARRIES)}")
        if (carry == "events") != (window is not None):
            raise ValueError(f"window: got {window} with carry={carry!r}; carry='events' needs it, 'state' takes none")
        self.network, self.batch, self.carry, self.window = network, batch, carry, window
        self.backend = get_backend(backend, exact)
        self.engine = self.backend.engine(network, threads=threads)
        self._safe_magnitude = np.inf if network.readout is None else network.readout.safe_magnitude()
        self._measured: State | None = None
        self._may_overflow = False
        self.state = State.zeros(network, batch) if state is None else _checked_state(network, batch, state)

    @property
    def state(self) -> State:
        """The state that the next step starts from. It may be set to a state of the right shapes.

        With "cuda" it stays on the GPU; its arrays are copied to the host when they are read.
        """
        if self._stepper is not None:
            self.state = self._stepper.state()
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state, self._stepper = state, None

    def reset(self) -> None:
        """Return to the zero state."""
        self.state = State.zeros(self.network, self.batch)

    def step(self, inputs: np.ndarray) -> np.ndarray:
        """One time step: (batch, I) numbers or (batch,) symbols in, (batch, V or N) out. The state advances.

        Cost: the kernel, and one or two microseconds for contiguous float32 numbers or int64 symbols. With "cuda",
        arrays on the GPU give arrays there, as in `run`. There a call takes 90 to 130 microseconds of wall-clock time
        (H100, 1 to 64 samples), of which the GPU works a few; within a `run` of 100 steps a step takes 4 to 14. Use
        chunks of several steps where latency allows.

        Raises as `run` does; the state then stays as it was.
        """
        if self._stepper is None:
            if self.carry != "state":
                raise ValueError("step: carry='events' zeroes the cells at every call; use run, or carry='state'")
            self._stepper = None if self._readout_may_overflow() else self.engine.stepper(self._state)
            if self._stepper is None:
                need_on_host(inputs)
                return self._advance(self.engine.prepare(as_array(inputs)[None]), False, False).output[0]
        return self._stepper(inputs)

    def run(self, inputs: np.ndarray | Events, *, record: Collection[str] = ()) -> Simulation:
        """All steps of `inputs` from the current state on. The state advances, unless the run raises.

        Parameters
        ----------
        inputs : (steps, batch, I) numbers or `Events`; for a network with an embedding, (steps, batch) integers
        record : any of "events" and "states". Without a record the whole run is one compiled call, and its memory
                 grows with the output only

        With "cuda", inputs may also lie on its GPU: CuPy arrays, torch tensors, or any array with
        `__cuda_array_interface__` or DLPack. Contiguous float32 numbers and int64 symbols are used where they are;
        other numbers are converted there, to the values that NumPy would give. The output and the records then stay on
        the GPU too.

        Raises ValueError for inputs of another shape, dtype or batch and for numbers that are not finite, TypeError for
        an array that the backend cannot read, and FloatingPointError where a cell state or an output overflows.
        """
        record = {record} if isinstance(record, str) else set(record)
        if not record <= set(RECORDABLE):
            raise ValueError(f"record: got {sorted(record)}, need any of {', '.join(RECORDABLE)}")
        prepared = self.engine.prepare(inputs)
        initial, traces, events = self.state, [], []
        try:
            for chunk, zero_cells in self._time_chunks(prepared, bool(record) and prepared.array_library is None):
                if zero_cells:
                    self.state = State(State.zeros(self.network, self.batch).cells, self.state.outputs)
                trace = self._advance(chunk, "events" in record, "states" in record)
                # A host keeps the events of a record only, so that a long quiet run needs little memory.
                on_host = prepared.array_library is None
                events.append([Events.from_dense(dense) if on_host else dense for dense in trace.events])
                traces.append(replace(trace, events=()))
            return self._simulation(prepared, traces, events, initial, record)
        except BaseException:
            self.state = initial
            raise

    def _time_chunks(self, inputs: Inputs, limited: bool) -> list[tuple[Inputs, bool]]:
        """Consecutive chunks of the inputs, and for each whether the cells are zeroed before it.

        limited : whether the dense records of a chunk must stay below RECORD_BYTES
        """
        longest = max(inputs.steps, 1)
        if limited:
            row_bytes = 8 * inputs.batch * sum(layer.units for layer in self.network.layers)
            longest = max(1, min(longest, RECORD_BYTES // max(row_bytes, 1)))
        windows = set(range(0, inputs.steps, self.window)) if self.window is not None else set()
        starts = sorted(windows | set(range(0, inputs.steps, longest))) or [0]
        ends = [*starts[1:], inputs.steps]
        return [(inputs.chunk(a, b), a in windows) for a, b in zip(starts, ends, strict=True)]

    def _advance(self, inputs: Inputs, record_events: bool, record_states: bool) -> Trace:
        if inputs.batch != self.batch:
            raise ValueError(f"inputs: got a batch of {inputs.batch}, but the simulator was made for {self.batch}")
        may_overflow = self._readout_may_overflow()
        trace = self.engine.run(inputs, self.state, record_events=record_events, record_states=record_states)
        trace.state.need_finite()
        if may_overflow:
            _need_finite_output(trace.output)
        # Outputs stay below the bound of the state that was measured.
        self.state = self._measured = trace.state
        return trace

    def _readout_may_overflow(self) -> bool:
        """Whether an output can be infinite from the present state on; only then are outputs looked at.

        A unit's output is at most twice the largest magnitude of the state, or 1: the candidate is below 1, a cell is a
        mean of itself and the candidate, and an event takes from it. A state is measured once, after it was set.
        """
        state = self.state
        if self.network.readout is not None and state is not self._measured:
            largest = [float(np.abs(array).max(initial=1)) for array in (*state.cells, *state.outputs)]
            self._may_overflow, self._measured = 2 * max(largest) > self._safe_magnitude, state
        return self._may_overflow

    def _simulation(
        self, inputs: Inputs, traces: list[Trace], events: list[list[Any]], initial: State, record: set[str]
    ) -> Simulation:
        """The result of a run from the traces of its chunks and, per chunk, the recorded events of each layer."""
        fired, counted = list(traces[0].fired), [trace.input_fired for trace in traces if trace.input_fired]
        for trace in traces[1:]:
            fired = [a + b for a, b in zip(fired, trace.fired, strict=True)]
        layers = range(len(self.network.layers))
        # Of a backend that has a choice, the chosen kernels decide.
        paths = {name for trace in traces for name in trace.paths.values()}
        exact = self.backend.exact or (bool(paths) and not any(name.startswith(INEXACT) for name in paths))
        record_events, record_states = "events" in record, "states" in record
        return Simulation(
            output=_concatenated(inputs, [t.output for t in traces]),
            backend=self.backend.name,
            exact=exact,
            dense=self.engine.dense,
            initial=initial,
            state=traces[-1].state,
            input_fired=reduce(add, counted) if counted else inputs.fire_counts(),
            fired=tuple(fired),
            steps=inputs.steps,
            batch=inputs.batch,
            inputs=inputs.record() if record_events else None,
            events=tuple(_concatenated(inputs, [e[k] for e in events]) for k in layers) if record_events else (),
            states=tuple(_concatenated(inputs, [t.states[k] for t in traces]) for k in layers) if record_states else (),
            paths=traces[-1].paths,
        )


def _need_finite_output(output: Any) -> None:
    """Raise FloatingPointError where a read-out, on the host or on a GPU, has overflowed."""
    if 0 in tuple(output.shape) or np.isfinite(float(abs(output).max())):
        return
    got = "a number that is not finite"
    if isinstance(output, np.ndarray):
        step, sample, unit = (int(k) for k in np.argwhere(~np.isfinite(output))[0])
        got = f"{output[step, sample, unit]} at step {step}, sample {sample}, output {unit}"
    raise FloatingPointError(f"output: got {got}; check the scale of the read-out's weights and of the state")


def _concatenated(inputs: Inputs, chunks: Sequence[Any]) -> Any:
    """The chunks of an output or of a record, one after the other in time."""
    if len(chunks) == 1:
        return chunks[0]
    if inputs.array_library is not None:
        return inputs.array_library.concatenate(chunks)
    return Events.concatenate(list(chunks)) if isinstance(chunks[0], Events) else np.concatenate(chunks)


def simulate(
    network: Network,
    inputs: np.ndarray | Events,
    *,
    state: State | None = None,
    backend: str | Backend = "cpu",
    exact: bool = True,
    threads: int = 1,
    record: Collection[str] = (),
    carry: str = "state",
    window: int | None = None,
) -> Simulation:
    """Run a network over a sequence.

    Parameters
    ----------
    network : the network to run
    inputs  : (steps, batch, I) numbers or `Events`; for a network with an embedding, (steps, batch) integers. With
              backend="cuda" also arrays on its GPU (CuPy, torch, DLPack); output and records then stay there
    state   : the state to start from; None is the zero state
    backend : a name in `BACKENDS` ("cpu", "auto", "cuda", "blas", "reference") or a `Backend`
    exact   : False lets "auto" use BLAS and "cuda" use tensor cores, where they were measured to be faster
    threads : threads of the engine; their number never changes a bit
    record  : any of "events" (every event of every layer, and the input) and "states" (every cell at every step)
    carry   : "state", or "events" to zero the cells every `window` steps as the released EvNN code does
    window  : time steps between two such resets, for carry="events"

    Returns a `Simulation`. `Simulator` explains `exact`, `carry` and `window`, and keeps the state between calls.

    Raises ValueError for options, inputs or a state of another shape or dtype and for numbers that are not finite,
    TypeError for an array that the backend cannot read, FloatingPointError where a cell or an output overflows, and
    BackendUnavailable where the backend cannot run on this machine.

    >>> result = simulate(network, inputs, record="events")
    >>> result.output, result.activity, result.events[0]
    """
    if not isinstance(inputs, Events) and not on_gpu(inputs):
        inputs = as_array(inputs)
    shape = getattr(inputs, "shape", ())
    simulator = Simulator(
        network,
        batch=shape[1] if len(shape) > 1 else 1,
        backend=backend,
        exact=exact,
        threads=threads,
        state=state,
        carry=carry,
        window=window,
    )
    if not hasattr(inputs, "shape"):
        if simulator.backend.name != "cuda":
            need_on_host(inputs)
        raise TypeError(f"inputs: got a {type(inputs).__name__} without a shape; give a CuPy array or a torch tensor")
    return simulator.run(inputs, record=record)


def _checked_state(network: Network, batch: int, state: State) -> State:
    """The state in float32, as the engines hold it and the counts read it. Raises ValueError for a bad state."""
    if len(state.cells) != len(network.layers) or len(state.outputs) != len(network.layers):
        raise ValueError(f"state: got {len(state.cells)} layers, the network has {len(network.layers)}")
    for k, layer in enumerate(network.layers):
        for name, array in (("cells", state.cells[k]), ("outputs", state.outputs[k])):
            if array.shape != (batch, layer.units) or array.dtype.kind != "f":
                raise ValueError(
                    f"state {name} of layer {k}: got {array.dtype} {array.shape}, need float ({batch}, {layer.units})"
                )
            with np.errstate(over="ignore"):
                check_finite(f"state {name} of layer {k}", array.astype(np.float32))
    as_float32 = (tuple(np.array(a, np.float32) for a in arrays) for arrays in (state.cells, state.outputs))
    return State(*as_float32)
