"""Networks of event layers, their state, and running them: start reading here.

`simulate(network, inputs)` runs a whole sequence; `Simulator` keeps state for streaming. The path of one time
step: here -> `cpu.py` (or `reference.py`) -> `cells.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import add

import numpy as np

from eventrnn.backend import (
    INEXACT,
    Backend,
    Feed,
    FireCounts,
    State,
    Stepper,
    Trace,
    as_array,
    get_backend,
    need_on_host,
    on_gpu,
)
from eventrnn.cells import Cell
from eventrnn.events import Events, check_finite
from eventrnn.layers import Layer, Readout, need_float32
from eventrnn.weights import Dense, Weights

RECORDABLE = ("events", "states")
CARRIES = ("state", "events")
# A recorded run goes through the engine in pieces whose dense record stays below this.
RECORD_BYTES = 1 << 26


@dataclass(frozen=True, eq=False, repr=False)
class Network:
    """A stack of layers, with an optional embedding below (index input) and read-out above.

    Attributes
    ----------
    layers    : from input to output
    embedding : (V, E) float32 or None; row k is the first layer's dense input for symbol k
    readout   : or None
    metadata  : strings that travel with the model file (a vocabulary, where it came from)
    """

    layers: tuple[Layer, ...]
    embedding: np.ndarray | None = None
    readout: Readout | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers:
            raise ValueError("layers: got none, need at least one")
        for k, (below, above) in enumerate(zip(self.layers[:-1], self.layers[1:], strict=True)):
            if above.inputs != below.units:
                raise ValueError(f"layer {k + 1}: takes {above.inputs} inputs, but layer {k} has {below.units} units")
        if self.embedding is not None:
            need_float32("embedding", self.embedding, 2)
            if self.embedding.shape[1] != self.layers[0].inputs:
                raise ValueError(
                    f"embedding: got shape {self.embedding.shape}, need (symbols, {self.layers[0].inputs}) for layer 0"
                )
        if self.readout is not None:
            if self.readout.weights.shape[0] != self.layers[-1].units:
                raise ValueError(
                    f"readout: takes {self.readout.weights.shape[0]} units, the last layer has {self.layers[-1].units}"
                )
            if self.readout.tied and (
                self.embedding is None or not np.array_equal(self.readout.weights.to_dense(), self.embedding.T)
            ):
                raise ValueError("readout: tied, but its weights are not the transposed embedding")
        for name, weights in self.matrices().items():
            # Kernels do not check an index. Values first: their message has the position.
            check_finite(name, weights.floats())
            weights.check(full=True)

    def __repr__(self) -> str:
        ends = "" if self.embedding is None else f", embedding {self.embedding.shape[0]}x{self.embedding.shape[1]}"
        ends += "" if self.readout is None else f", readout={self.readout.weights!r}"
        return f"Network({', '.join(map(repr, self.layers))}{ends})"

    def matrices(self) -> dict[str, Weights]:
        """Every weight matrix by name: `layers.0.w_in`, `layers.0.w_rec`, …, `readout`."""
        named: dict[str, Weights] = {}
        for k, layer in enumerate(self.layers):
            named[f"layers.{k}.w_in"] = layer.w_in
            named[f"layers.{k}.w_rec"] = layer.w_rec
        if self.readout is not None:
            named["readout"] = self.readout.weights
        return named

    def with_matrices(self, matrices: Mapping[str, Weights]) -> Network:
        """The same network with some matrices, named as in `matrices()`, replaced."""
        unknown = set(matrices) - set(self.matrices())
        if unknown:
            raise ValueError(f"matrices: no {', '.join(sorted(unknown))}; have {', '.join(self.matrices())}")
        layers = tuple(
            replace(
                layer,
                w_in=matrices.get(f"layers.{k}.w_in", layer.w_in),
                w_rec=matrices.get(f"layers.{k}.w_rec", layer.w_rec),
            )
            for k, layer in enumerate(self.layers)
        )
        readout = self.readout
        if readout is not None and "readout" in matrices:
            readout = replace(readout, weights=matrices["readout"])
        return replace(self, layers=layers, readout=readout)

    def dense(self) -> Network:
        """The dense twin: the same weights, every one of them stored."""
        return self.with_matrices({name: Dense(w.to_dense()) for name, w in self.matrices().items()})

    @classmethod
    def random(
        cls,
        units: Sequence[int],
        *,
        rng: np.random.Generator,
        inputs: int | None = None,
        symbols: int | None = None,
        embedding: int | None = None,
        readout: int | None = None,
        tied: bool = False,
        threshold: float = 0.3,
        cell: Cell | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Network:
        """A network to train: Xavier-normal weights, zero biases, embedding uniform in ±0.1 … as EvNN starts them.

        Give `inputs` (dense or event input) or `symbols` and `embedding` (index input). `threshold` is the mean
        of the Beta(3m / (1 - m), 3) distribution that thresholds are drawn from; 0 gives zeros. With `tied`, the
        read-out is the transposed embedding (`embedding` must equal the last layer's size).
        """
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng: got {type(rng).__name__}, need a numpy Generator: numpy.random.default_rng(seed)")
        if isinstance(units, int):
            raise TypeError(f"units: got {units}, need a list with the size of each layer: [{units}]")
        _need_sizes(units=units, inputs=inputs, symbols=symbols, embedding=embedding, readout=readout)
        if (inputs is None) == (symbols is None) or (symbols is None) != (embedding is None):
            raise ValueError("network: give either inputs, or symbols together with embedding")
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold: got {threshold}, need a mean in [0, 1)")
        cell = cell or Cell()
        table = None if symbols is None else rng.uniform(-0.1, 0.1, (symbols, embedding or 0)).astype(np.float32)
        fan_in = inputs if table is None else table.shape[1]
        layers = []
        for n in units:
            rows = cell.gates * n
            drawn = rng.beta(3 * threshold / (1 - threshold), 3, n) if threshold else np.zeros(n)
            layers.append(
                Layer(
                    Dense(_xavier(rng, fan_in or 0, rows)),
                    Dense(_xavier(rng, n, rows)),
                    np.zeros(rows, np.float32),
                    np.zeros(rows, np.float32),
                    drawn.astype(np.float32),
                    cell,
                )
            )
            fan_in = n
        out = None
        if tied:
            if table is None or readout not in (None, symbols) or table.shape[1] != units[-1]:
                raise ValueError(
                    "tied: needs symbols, an embedding as wide as the last layer and no other readout size"
                )
            out = Readout(Dense(np.ascontiguousarray(table.T)), np.zeros(len(table), np.float32), tied=True)
        elif readout is not None:
            out = Readout(Dense(_xavier(rng, units[-1], readout)), np.zeros(readout, np.float32))
        return cls(tuple(layers), table, out, dict(metadata or {}))

    def feed(self, inputs: np.ndarray | Events) -> Feed:
        """Check inputs and lay them out for an engine. Dense: O(size); index input: O(steps * batch).

        inputs : (steps, batch, I) float array or `Events`; with an embedding, (steps, batch) integers.

        Raises ValueError for inputs of another shape or kind, and TypeError for an array on a GPU or nowhere.
        """
        need_on_host(inputs)
        if self.embedding is not None:
            return self._index_feed(inputs)
        size = self.layers[0].inputs
        if not isinstance(inputs, Events):
            array = as_array(inputs)
            if array.ndim != 3 or array.shape[2] != size or array.dtype.kind not in "fiub":
                raise ValueError(f"inputs: got {array.dtype} {array.shape}, need numbers (steps, batch, {size})")
            check_finite("inputs", array)
            if array.dtype != np.float32:
                with np.errstate(over="ignore"):
                    array = array.astype(np.float32)
                check_finite("inputs as float32", array)
            inputs = Events.from_dense(array)
        elif inputs.shape[2] != size:
            raise ValueError(f"inputs: got events of {inputs.shape[2]} units, need {size}")
        else:
            inputs.check()
        steps, batch, _ = inputs.shape
        # Kernels walk memory, not strides.
        table = map(np.ascontiguousarray, (inputs.indptr, inputs.indices, inputs.values))
        return Feed(*table, np.arange(steps * batch), steps, batch, size)  # pyright: ignore[reportCallIssue]

    @cached_property
    def _symbol_events(self) -> Events:
        assert self.embedding is not None
        return Events.from_dense(self.embedding[:, None, :])

    def _index_feed(self, inputs) -> Feed:
        assert self.embedding is not None
        symbols, size = self.embedding.shape
        if isinstance(inputs, Events):
            raise ValueError("inputs: got Events, but the network has an embedding; give symbols (steps, batch)")
        array = as_array(inputs)
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise ValueError(f"inputs: got {array.dtype} {array.shape}, need integers (steps, batch) for the embedding")
        if array.size and not (0 <= array.min() and array.max() < symbols):
            bad = np.argwhere((array < 0) | (array >= symbols))[0]
            raise ValueError(f"inputs: got symbol {array[tuple(bad)]} at {tuple(map(int, bad))}; need 0..{symbols - 1}")
        table = self._symbol_events
        rows = np.ascontiguousarray(array, np.int64).ravel()
        steps, batch = map(int, array.shape)
        return Feed(table.indptr, table.indices, table.values, rows, steps, batch, size)


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


def _need_sizes(**sizes: int | Sequence[int] | None) -> None:
    for name, size in sizes.items():
        if size is None:
            continue
        each = list(size) if isinstance(size, Sequence | np.ndarray) else [size]
        if not each or any(not isinstance(n, int | np.integer) or n < 1 for n in each):
            raise ValueError(f"{name}: got {size}, need whole numbers >= 1")


def _xavier(rng: np.random.Generator, fan_in: int, fan_out: int) -> np.ndarray:
    return (rng.standard_normal((fan_in, fan_out)) * np.sqrt(2 / (fan_in + fan_out))).astype(np.float32)
