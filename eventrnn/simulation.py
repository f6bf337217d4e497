"""Running a network over a sequence, whole or step by step. Start reading here.

The path of one time step is three files long: this one, then `cpu/kernels/time_loop.py` (or `reference.py`, or
`cuda/kernels/`), then `cells.py`. `simulate` runs one sequence; a `Simulator` keeps the state between calls.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np

from eventrnn import ragged
from eventrnn._arithmetic import standard_arithmetic
from eventrnn._arrays import hold
from eventrnn._checks import need_choice, need_kind, need_names, need_whole
from eventrnn._exclusive import Use, exclusive
from eventrnn.backend import (
    INEXACT,
    MATRICES_ONLY,
    Backend,
    Stepper,
    as_array,
    get_backend,
    merged_paths,
    need_on_host,
    step_array,
)
from eventrnn.events import Events
from eventrnn.network import Network, need_thresholds
from eventrnn.state import FireCounts, Inputs, State, Trace, on_gpu
from eventrnn.weights.gated import need_matrices

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
    lengths     : (batch,) int64, the number of steps of each sample, where the run was given them; else None
    inputs      : with record="events", the input as `Events`; of inputs on a GPU a copy of the array
    events      : with record="events", per layer `Events`; of inputs on a GPU per layer (steps, batch, N) outputs
    states      : with record="states", per layer (steps, batch, N) float32 cells after the event
    paths       : by matrix, the kernel of its products, of every matrix of the network. Where the choice changed within
                  the run, the last one, or the last inexact one if there was any
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
    lengths: np.ndarray | None = None
    inputs: Events | None = None
    events: tuple[Events, ...] = ()
    states: tuple[np.ndarray, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)

    @property
    def sample_steps(self) -> int:
        """The number of steps of all samples together, without padding."""
        return self.steps * self.batch if self.lengths is None else int(self.lengths.sum())

    @property
    def activity(self) -> tuple[float, ...]:
        """Per layer, events per unit, step and sample."""
        cells = self.sample_steps
        return tuple(float(f.total.sum() / (cells * len(f.graded))) if cells else 0.0 for f in self.fired)


class Simulator:
    """A network with a state that is carried from call to call.

    A sequence gives the same bits as one `run`, as several runs of consecutive chunks, and as single `step` calls.

    An exception of any kind, also one that a signal handler raises, leaves the state of the last whole call. A call
    from a second Python thread waits for the first one; a call from a signal handler or a callback within a call is
    refused with a RuntimeError. `copy`, `deepcopy` and `pickle` give an independent simulator in the same state.

    As long as a simulator exists, the arrays of its network are read-only: NumPy refuses an edit in place, which the
    packed weights would not follow. For other weights, make another network and a simulator of it.

    Parameters
    ----------
    network : the network to run
    batch   : the number of samples that run side by side
    backend : a name in `BACKENDS` or a `Backend`; "auto" takes, for every matrix, the kernel that was measured once to
              be the fastest on this machine
    exact   : False lets "auto" use BLAS, and "cuda", from 4 samples on, tensor cores with float16 weights and events.
              Their sums are made in another order; they are used where they were measured to be faster, and
              `Simulation.paths` names them. "cuda" measures at the first `run`; a `step` before it is exact. "cpu",
              "auto" and "reference" multiply int8 weights in blocks of 64 columns, or a multiple, with rounded events,
              in integers (`docs/numerics.md`); "cpu" and "reference" refuse a network without such blocks
    threads : threads of the engine; their number never changes a bit
    state   : the state to start from; None is the zero state. In layers of GRU cells, cells equal outputs
    carry   : "state" carries cells and outputs. "events" zeroes the cells at the start of every `run` and every
              `window` steps and carries only the outputs, as the released EvNN code does between windows; for networks
              of EGRU cells only
    window  : time steps between two such resets, for carry="events"

    Raises ValueError for options outside these, for a state of another shape and for one that is not finite, TypeError
    for gated blocks with "blas", and BackendUnavailable where the backend cannot run on this machine.
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
        need_kind("network", network, Network, "a Network")
        for name, size in (("batch", batch), ("threads", threads), ("window", 1 if window is None else window)):
            need_whole(name, size, at_least=1)
        need_choice("carry", carry, CARRIES)
        if (carry == "events") != (window is not None):
            raise ValueError(f"window: got {window} with carry={carry!r}; carry='events' needs it, 'state' takes none")
        if carry == "events":
            need_thresholds(network, "carry: got 'events'", "use carry='state'")
        self._network, self._batch, self._threads = network, batch, threads
        self.carry, self.window = carry, window
        self.backend = get_backend(backend, exact)
        if self.backend.name in MATRICES_ONLY:
            need_matrices(network.matrices(), f"the {self.backend.name} backend")
        network.check_edits()
        # The engine first: it refuses formats that it does not know.
        self.engine = self.backend.engine(network, threads=threads)
        hold(self, network.arrays())
        self._safe_magnitude = np.inf if network.readout is None else network.readout.safe_magnitude()
        self._use = Use("simulator")
        # The present state: that of the stepper, where there is one, otherwise `_state`.
        self._stepper: Stepper | None = None
        self._state = State.zeros(network, batch) if state is None else _checked_state(network, batch, state)
        self._may_overflow = self._readout_may_overflow(self._state)

    @property
    def network(self) -> Network:
        """The network; the engine has packed its weights."""
        return self._network

    @property
    def batch(self) -> int:
        """The number of samples that run side by side."""
        return self._batch

    @property
    def state(self) -> State:
        """The state that the next step starts from, a copy. It may be set to what the constructor takes.

        With "cuda" it stays on the GPU; its arrays are copied to the host when they are read, and cannot be written to.
        """
        # What `exclusive` does, without the cost of its call.
        use = self._use
        with use.lock:
            if use.busy:
                use.refuse()
            use.busy = True
            try:
                return self._state.snapshot() if self._stepper is None else self._stepper.state()
            finally:
                use.busy = False

    @state.setter
    @exclusive
    def state(self, state: State) -> None:
        self._set(_checked_state(self.network, self.batch, state))

    @exclusive
    def reset(self) -> None:
        """Return to the zero state."""
        self._set(State.zeros(self.network, self.batch))

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        # Engines and steppers hold addresses, so a copy makes its own.
        return {
            "network": self.network,
            "batch": self.batch,
            "backend": self.backend,
            "threads": self._threads,
            "state": self._present().copy(),
            "carry": self.carry,
            "window": self.window,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        Simulator.__init__(self, **state)

    def step(self, inputs: np.ndarray) -> np.ndarray:
        """One time step: (batch, I) numbers or (batch,) symbols in, (batch, V or N) out. The state advances.

        Cost: the kernel, and one or two microseconds for contiguous float32 numbers or int64 symbols; some more for
        other numbers, and for reading `state` between two steps. With several threads a step of little work runs on
        one of them. With "cuda", arrays on the GPU give arrays there, as in `run`. There a call takes 90 to 130
        microseconds of wall-clock time (H100, 1 to 64 samples), of which the GPU works a few; within a `run` of 100
        steps a step takes 4 to 14. Use chunks of several steps where latency allows.

        Raises as `run` does; the state then stays as it was.
        """
        # What `exclusive` does, without the cost of its call.
        # No stepper has made -2 steps, so nothing is taken back before `steps` is read.
        use, stepper, steps, moved = self._use, None, -2, None
        try:
            with use.lock:
                if use.busy:
                    use.refuse()
                use.busy = True
                try:
                    stepper = self._stepper
                    if stepper is None:
                        stepper = self._new_stepper()
                        if stepper is None:
                            moved = []
                            return self._whole_step(inputs, moved)
                    steps = stepper.steps
                    return stepper(inputs)
                finally:
                    use.busy = False
        except BaseException:
            self._take_back(stepper, steps, moved)
            raise

    def run(
        self,
        inputs: np.ndarray | Events,
        *,
        lengths: np.ndarray | Sequence[int] | None = None,
        record: Collection[str] = (),
    ) -> Simulation:
        """All steps of `inputs` from the current state on. The state advances, unless the run raises.

        Parameters
        ----------
        inputs  : (steps, batch, I) numbers or `Events`; for a network that reads symbols, (steps, batch) integers
        lengths : (batch,) whole numbers 0..steps, the number of steps of each sample, where they differ. What follows
                  is padding, which may hold anything. The state of a sample stays as its last step left it; its output
                  and its recorded states are zero after it, and it has no events there. Padding is neither computed nor
                  counted: a sample gets the bits of a run of its own. Each distinct length costs one further compiled
                  call. `result.output[lengths - 1, np.arange(batch)]` is the output of the last steps
        record  : any of "events" and "states". Without a record the whole run is one compiled call, and its memory
                  grows with the output only

        With "cuda", inputs may also lie on its GPU: CuPy arrays, torch tensors, or any array with
        `__cuda_array_interface__` or DLPack. Contiguous float32 numbers and int64 symbols are used where they are;
        other numbers are converted there, to the values that NumPy would give. The output and the records then stay on
        the GPU too.

        Raises ValueError for inputs of another shape, dtype or batch and for numbers that are not finite, TypeError for
        an array that the backend cannot read, and FloatingPointError where a cell state or an output overflows.
        """
        names = _checked_record(record)
        moved: list[State] = []
        try:
            return self._run(inputs, lengths, names, moved)
        except BaseException:
            self._take_back(None, 0, moved)
            raise

    @exclusive
    @standard_arithmetic
    def _run(self, inputs: np.ndarray | Events, lengths: Any, record: set[str], moved: list[State]) -> Simulation:
        """`run`; see `_move` for `moved`."""
        prepared = self.engine.prepare(inputs) if lengths is None else ragged.prepare(self.engine, inputs, lengths)
        initial, traces, events = self._present(), [], []
        state = initial
        for chunk, zero_cells in self._time_chunks(prepared, bool(record) and prepared.array_library is None):
            if zero_cells:
                state = _without_cells(state, chunk)
            trace = self._trace(chunk, state, "events" in record, "states" in record)
            state = trace.state
            # A host keeps the events of a record only, so that a long quiet run needs little memory.
            on_host = prepared.array_library is None
            events.append([Events.from_dense(dense) if on_host else dense for dense in trace.events])
            traces.append(replace(trace, events=()))
        result = self._simulation(prepared, traces, events, initial, record)
        self._move(initial, state.snapshot(), moved)
        return result

    @standard_arithmetic
    def _whole_step(self, inputs: np.ndarray, moved: list[State]) -> np.ndarray:
        """A step that is a run of one step."""
        before = self._present()
        trace = self._trace(self.engine.prepare(step_array(self.network, inputs)[None]), before, False, False)
        self._move(before, trace.state, moved)
        return trace.output[0]

    @standard_arithmetic
    def _new_stepper(self) -> Stepper | None:
        """Make the stepper that starts from the present state; None where a step is a run of one step."""
        if self.carry != "state":
            raise ValueError("step: carry='events' zeroes the cells at every call; use run, or carry='state'")
        self._stepper = None if self._may_overflow else self.engine.stepper(self._state)
        return self._stepper

    def _present(self) -> State:
        """The present state; it must not be handed out."""
        return self._state if self._stepper is None else self._stepper.state()

    def _set(self, state: State) -> None:
        may_overflow = self._readout_may_overflow(state)
        self._state, self._stepper, self._may_overflow = state, None, may_overflow

    def _place(self, state: State) -> None:
        """Make a state the present one; it must not be handed out. No exception can come between the two."""
        self._state, self._stepper = state, None

    def _move(self, before: State, after: State, moved: list[State]) -> None:
        """Advance the state, as the last deed of a call. `moved` gets both states, should the call raise even so."""
        moved += (before, after)
        self._place(after)

    @exclusive
    def _take_back(self, stepper: Stepper | None, steps: int, moved: list[State] | None) -> None:
        """Go back to before a call that raised after the state had advanced: while it gave back the lock.

        stepper, steps : of a call of a stepper, and how many steps it had made before
        """
        if stepper is not None and stepper is self._stepper and stepper.steps == steps + 1:
            stepper.take_back()
        elif moved and self._state is moved[1]:
            self._place(moved[0])

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

    def _trace(self, inputs: Inputs, state: State, record_events: bool, record_states: bool) -> Trace:
        """A run of the engine. Raises ValueError for another batch, FloatingPointError where a cell overflows."""
        if inputs.batch != self.batch:
            raise ValueError(f"inputs: got a batch of {inputs.batch}, but the simulator was made for {self.batch}")
        run = self.engine.run if inputs.lengths is None else partial(ragged.run, self.engine)
        trace = run(inputs, state, record_events=record_events, record_states=record_states)
        trace.state.need_finite()
        if self._may_overflow:
            _need_finite_output(trace.output)
        return trace

    def _readout_may_overflow(self, state: State) -> bool:
        """Whether an output can be infinite from a state on that was set; only then are outputs looked at.

        A unit's output is at most twice the largest magnitude of the state, or 1: the candidate is below 1, a cell is a
        mean of itself and the candidate, and an event takes from it. The states that follow keep to the same bound. The
        output of an LSTM is at most 1, whatever its cell.
        """
        if self.network.readout is None:
            return False
        largest = [float(np.abs(array).max(initial=1)) for array in (*state.cells, *state.outputs)]
        # A weight that was made NaN by an edit in place has no safe magnitude.
        return not 2 * max(largest) <= self._safe_magnitude

    def _simulation(
        self, inputs: Inputs, traces: list[Trace], events: list[list[Any]], initial: State, record: set[str]
    ) -> Simulation:
        """The result of a run from the traces of its chunks and, per chunk, the recorded events of each layer."""
        fired, counted = list(traces[0].fired), [trace.input_fired for trace in traces if trace.input_fired]
        for trace in traces[1:]:
            fired = [a + b for a, b in zip(fired, trace.fired, strict=True)]
        layers = range(len(self.network.layers))
        # Of a backend that has a choice, the chosen kernels decide.
        paths = merged_paths(trace.paths for trace in traces)
        exact = self.backend.exact or (bool(paths) and not any(name.startswith(INEXACT) for name in paths.values()))
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
            lengths=inputs.lengths,
            inputs=inputs.record() if record_events else None,
            events=tuple(_concatenated(inputs, [e[k] for e in events]) for k in layers) if record_events else (),
            states=tuple(_concatenated(inputs, [t.states[k] for t in traces]) for k in layers) if record_states else (),
            paths=paths,
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
    lengths: np.ndarray | Sequence[int] | None = None,
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
    inputs  : (steps, batch, I) numbers or `Events`; for a network that reads symbols, (steps, batch) integers. With
              backend="cuda" also arrays on its GPU (CuPy, torch, DLPack); output and records then stay there
    lengths : (batch,) whole numbers, the number of steps of each sample, where they differ; see `Simulator.run`
    state   : the state to start from; None is the zero state
    backend : a name in `BACKENDS` ("cpu", "auto", "cuda", "blas", "reference") or a `Backend`
    exact   : False lets "auto" use BLAS and "cuda" use tensor cores, where they were measured to be faster, and a CPU
              multiply int8 blocks in integers
    threads : threads of the engine; their number never changes a bit
    record  : any of "events" (every event of every layer, and the input) and "states" (every cell at every step)
    carry   : "state", or "events" to zero the cells every `window` steps as the released EvNN code does
    window  : time steps between two such resets, for carry="events"

    Returns a `Simulation`. `Simulator` explains `exact`, `carry` and `window`, and keeps the state between calls.

    Raises ValueError for options, inputs or a state of another shape or dtype and for numbers that are not finite,
    TypeError for an array that the backend cannot read, FloatingPointError where a cell or an output overflows, and
    BackendUnavailable where the backend cannot run on this machine.

    >>> network = Network.random([8], inputs=3, readout=2, rng=np.random.default_rng(0), threshold=0.1)
    >>> result = simulate(network, np.ones((5, 1, 3)), record="events")
    >>> result.output.shape, result.events[0].shape
    ((5, 1, 2), (5, 1, 8))
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
    return simulator.run(inputs, lengths=lengths, record=record)


def _checked_record(record: Collection[str]) -> set[str]:
    names = {record} if isinstance(record, str) else set(need_names("record", record))
    if not names <= set(RECORDABLE):
        raise ValueError(f"record: got {sorted(names)}, need any of {', '.join(RECORDABLE)}")
    return names


def _without_cells(state: State, inputs: Inputs) -> State:
    """The state with cells of zero, except those of samples that ended before these inputs."""
    cells = tuple(np.zeros_like(c) for c in state.cells)
    if inputs.lengths is not None:
        ended = (inputs.lengths <= inputs.first_step)[:, None]
        cells = tuple(np.where(ended, c, np.float32(0)) for c in state.cells)
    return State(cells, state.outputs, state.gates)


@standard_arithmetic
def _checked_state(network: Network, batch: int, state: State) -> State:
    """The state as the engines hold it. Raises TypeError for what is no state, ValueError for one that does not fit."""
    if not isinstance(state, State):
        raise TypeError(f"state: got a {type(state).__name__}, need a State, as State.zeros or a run gives it")
    checked = state.checked(network, batch)
    need_single_states(network, checked)
    return checked


def need_single_states(network: Network, state: State) -> None:
    """Raise ValueError for a state whose cells and outputs differ in a layer of cells that have one state."""
    for k, (layer, cells, outputs) in enumerate(zip(network.layers, state.cells, state.outputs, strict=True)):
        if layer.cell.equations.single_state and not np.array_equal(cells, outputs):
            sample, unit = (int(i) for i in np.argwhere(cells != outputs)[0])
            raise ValueError(
                f"state of layer {k}: got cell {cells[sample, unit]} and output {outputs[sample, unit]} at sample "
                f"{sample}, unit {unit}, but in a cell {layer.cell.name!r} they are the same; give the outputs as cells"
            )
