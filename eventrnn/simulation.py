"""MOVED."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

import numpy as np

from eventrnn.backend import INEXACT, Backend, Stepper, as_array, get_backend, need_on_host
from eventrnn.events import Events, check_finite
from eventrnn.network import Network, _need_sizes
from eventrnn.state import Feed, FireCounts, State, Trace, on_gpu

RECORDABLE = ("events", "states")

CARRIES = ("state", "events")

# A recorded run goes through the engine in pieces whose dense record stays below this.
RECORD_BYTES = 1 << 26


@dataclass(frozen=True)
class Simulation:
    """A finished run.

    Attributes
    ----------
    output      : (steps, batch, V) read-out, or the last layer's (steps, batch, N) events; an array on the GPU, and so
                  the records, where the inputs were: a torch tensor for one, else CuPy's
    backend     : the name of the backend
    exact       : whether these are the bits of the exact tier
    dense       : whether the engine multiplied every weight, events or not
    initial     : the state that the run started from
    state       : to continue from
    input_fired : how often each input of layer 0 was not zero
    fired       : per layer, how many events each unit sent
    steps, batch
    inputs      : the input as `Events`, with record="events"; on a GPU a copy of the array
    events      : per layer `Events`, with record="events"; on a GPU per layer the (steps, batch, N) outputs
    states      : per layer (steps, batch, N) cells after the event, with record="states"
    paths       : by matrix, how its products went, where the backend had a choice ("auto" and "cuda" have)
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
    """A network that keeps its state: whole sequences, chunks, or one step at a time, all the same bits.

    Parameters
    ----------
    network : what to run
    batch   : samples side by side
    backend : a name in `BACKENDS` or a `Backend`; "auto" takes the fastest way of each product, as measured once on
              this machine
    exact   : False lets "auto" use BLAS, and "cuda", from 4 samples on, tensor cores with float16 weights and events:
              sums in another order, chosen where measured faster, and named in `Simulation.paths`. "cuda" measures at
              the first `run`, and a `step` before it is exact
    threads : split over postsynaptic units; never changes a bit
    carry   : "state" carries cells and outputs. "events" zeroes the cells at the start of every `run` and every
              `window` steps and carries only outputs, as the released EvNN code does between windows
    window  : steps, for carry="events"
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
        self.state = State.zeros(network, batch) if state is None else _checked_state(network, batch, state)

    @property
    def state(self) -> State:
        """What is carried to the next step. May be set, to a state of the right sizes.

        With "cuda" it stays on the GPU; its arrays are copied to the host where they are looked at.
        """
        if self._stepper is not None:
            self.state = self._stepper.state()
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state, self._stepper = state, None

    def reset(self) -> None:
        """Back to the zero state."""
        self.state = State.zeros(self.network, self.batch)

    def step(self, inputs: np.ndarray) -> np.ndarray:
        """One time step: (batch, I) numbers or (batch,) symbols in, (batch, V or N) out. State advances.

        Cost: the kernel, and one or two microseconds for float32 numbers or int64 symbols, contiguous. With "cuda",
        arrays on the GPU give arrays there, as of `run`; there a call takes 90 to 130 microseconds by the clock (H100,
        1 to 64 samples), of which the GPU works a few: in a `run` of 100 steps each takes 4 to 14, so give it chunks
        where latency allows.
        """
        if self._stepper is None:
            if self.carry != "state":
                raise ValueError("step: carry='events' zeroes the cells at every call; use run, or carry='state'")
            self._stepper = self.engine.stepper(self._state)
            if self._stepper is None:
                need_on_host(inputs)
                return self._advance(self.network.feed(as_array(inputs)[None]), False, False).output[0]
        return self._stepper(inputs)

    def run(self, inputs: np.ndarray | Events, *, record: Collection[str] = ()) -> Simulation:
        """All steps of `inputs` (see `Network.feed`) from the current state on. State advances; not where it raises.

        `record` holds any of "events", "states". Without a record the whole run is one compiled call; memory
        then grows with the output only.

        With "cuda", inputs may lie on its GPU: CuPy arrays, torch tensors, or whatever has `__cuda_array_interface__`
        or DLPack. Float32 numbers and int64 symbols that are contiguous are used where they are; other numbers are
        converted there, exactly as NumPy's would be. Output and records then stay there too.
        """
        record = {record} if isinstance(record, str) else set(record)
        if not record <= set(RECORDABLE):
            raise ValueError(f"record: got {sorted(record)}, need any of {', '.join(RECORDABLE)}")
        feed: Feed = getattr(self.engine, "feed", self.network.feed)(inputs)
        initial, traces, events = self.state, [], []
        try:
            for part, wipe in self._pieces(feed, bool(record) and not on_gpu(inputs)):
                if wipe:
                    self.state = State(State.zeros(self.network, self.batch).cells, self.state.outputs)
                trace = self._advance(part, "events" in record, "states" in record)
                # Dense records go as they come.
                events.append([feed.keep(dense) for dense in trace.events])
                traces.append(replace(trace, events=()))
            return self._joined(feed, traces, events, initial, record)
        except BaseException:
            self.state = initial
            raise

    def _pieces(self, feed: Feed, recording: bool) -> list[tuple[Feed, bool]]:
        """Parts of the feed in order, each with whether the cells are zeroed before it."""
        longest = max(feed.steps, 1)
        if recording:
            row_bytes = 8 * feed.batch * sum(layer.units for layer in self.network.layers)
            longest = max(1, min(longest, RECORD_BYTES // max(row_bytes, 1)))
        windows = set(range(0, feed.steps, self.window)) if self.window is not None else set()
        starts = sorted(windows | set(range(0, feed.steps, longest))) or [0]
        ends = [*starts[1:], feed.steps]
        return [(feed.part(a, b), a in windows) for a, b in zip(starts, ends, strict=True)]

    def _advance(self, feed: Feed, events: bool, states: bool) -> Trace:
        if feed.batch != self.batch:
            raise ValueError(f"inputs: got a batch of {feed.batch}, but the simulator was made for {self.batch}")
        trace = self.engine.run(feed, self.state, record_events=events, record_states=states)
        trace.state.need_finite()
        self.state = trace.state
        return trace

    def _joined(
        self, feed: Feed, traces: list[Trace], events: list[list[Events]], initial: State, record: set[str]
    ) -> Simulation:
        fired, counted = list(traces[0].fired), [trace.input_fired for trace in traces if trace.input_fired]
        for trace in traces[1:]:
            fired = [a + b for a, b in zip(fired, trace.fired, strict=True)]
        layers = range(len(self.network.layers))
        # Where a backend had a choice, what it chose decides.
        paths = {name for trace in traces for name in trace.paths.values()}
        exact = self.backend.exact or (bool(paths) and not any(name.startswith(INEXACT) for name in paths))
        return Simulation(
            feed.join([t.output for t in traces]),
            self.backend.name,
            exact,
            self.engine.dense,
            initial,
            traces[-1].state,
            reduce(add, counted) if counted else feed.fire_counts(),
            tuple(fired),
            feed.steps,
            feed.batch,
            feed.events() if "events" in record else None,
            tuple(feed.join([piece[k] for piece in events]) for k in layers) if "events" in record else (),
            tuple(feed.join([t.states[k] for t in traces]) for k in layers) if "states" in record else (),
            traces[-1].paths,
        )


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
    """Run a network over a sequence. Parameters as of `Simulator`, `Simulator.run` and `Network.feed`.

    >>> result = simulate(network, inputs, record="events")
    >>> result.output, result.activity, result.events[0]
    """
    if not isinstance(inputs, Events) and not on_gpu(inputs):
        inputs = as_array(inputs)
    shape = getattr(inputs, "shape", ())
    simulator = Simulator(
        network, batch=shape[1] if len(shape) > 1 else 1, backend=backend, exact=exact, threads=threads, state=state,
        carry=carry, window=window,
    )  # fmt: skip
    if not hasattr(inputs, "shape") and hasattr(simulator.engine, "feed"):
        raise TypeError(f"inputs: got a {type(inputs).__name__} without a shape; give a CuPy array or a torch tensor")
    return simulator.run(inputs, record=record)


def _checked_state(network: Network, batch: int, state: State) -> State:
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
    # In float32 from here on, as the engines hold it and the counts read it.
    as_float32 = (tuple(np.array(a, np.float32) for a in arrays) for arrays in (state.cells, state.outputs))
    return State(*as_float32)
