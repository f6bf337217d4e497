"""The CUDA engine: runs of whole sequences on the GPU, and the memory that it keeps between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.backend import HostInputs
from eventrnn.cuda.device import current_device
from eventrnn.cuda.device_network import DeviceNetwork
from eventrnn.cuda.fused_step import FusedStep, fits
from eventrnn.cuda.inputs import (
    DeviceState,
    check_status,
    copy_values,
    dense_host_inputs,
    flattened,
    gpu_inputs,
    result_for,
)
from eventrnn.cuda.run import CapturedRun, EventLists, Run
from eventrnn.cuda.run_buffers import Replay, pitch_of
from eventrnn.cuda.stepper import CudaStepper, StepLoop
from eventrnn.cuda.tables import LANES, STATUS_FIELDS
from eventrnn.cuda.tensor_core_layer import MEASURED_RUNS, MEASURED_STEPS, fastest_layers
from eventrnn.state import FireCounts, InputKind, Inputs, State, Trace, on_gpu

if TYPE_CHECKING:
    from eventrnn.network import Network


# Bytes that the buffers of a run may take; a longer run goes through in chunks of time.
RECORD_BYTES = 1 << 30


class CudaEngine:
    """See `backend.Engine`. One engine serves one run at a time; engines of one process share the GPU's stream.

    Attributes
    ----------
    device        : the GPU
    packed        : the network on the GPU
    tensor_layers : by batch size, the layers that go through tensor cores; empty where every layer stays exact
    runs          : by (steps, batch, tensor layers), the runs whose memory is kept
    steps         : by batch size, the single steps that are kept
    """

    dense = False

    def __init__(self, network: Network, precision: str | None = None):
        self.network, self.device = network, current_device()
        self.packed = DeviceNetwork(network, self.device, precision)
        self.precision, self.units, self.output_size = precision, self.packed.units, self.packed.output_size
        self.host_inputs, self.lists = HostInputs(network, whole=True), EventLists(self.device)
        self.tensor_layers: dict[int, tuple[int, ...]] = {}
        self.runs: dict[tuple[int, int, tuple[int, ...]], Run] = {}
        self.steps: dict[int, StepLoop | FusedStep] = {}
        with self.device.on_stream():
            self.status = self.device.put(np.zeros(self.packed.status_words, np.int64))

    # --- inputs ---

    def prepare(self, inputs: Any) -> Inputs:
        """See `backend.Engine`. Arrays on the GPU stay there; the run checks float32 numbers on the GPU."""
        if on_gpu(inputs):
            return self.gpu_inputs(inputs)
        plain = type(inputs) is np.ndarray and inputs.dtype == np.float32 and self.network.symbols is None
        if plain and inputs.ndim == 3 and inputs.shape[2] == self.network.layers[0].inputs:
            return dense_host_inputs(inputs)
        return self.host_inputs.prepare(inputs).to_event_table()

    def gpu_inputs(self, inputs: Any, step: bool = False) -> Inputs:
        """Inputs that lie on the GPU; with `step`, those of a single step."""
        return gpu_inputs(self.device, self.network, self._symbol_events(), inputs, step)

    def _symbol_events(self):
        return None if self.network.symbols is None else self.host_inputs.symbol_events

    # --- single steps ---

    def stepper(self, state: State) -> CudaStepper:
        """Single steps, each one launch of a graph; see `backend.Engine`."""
        with self.device.on_stream():
            return CudaStepper(self._step_loop(state.batch), self.flat_state(state), self.gpu_inputs)

    def _step_loop(self, batch: int) -> StepLoop | FusedStep:
        if batch not in self.steps:
            fused = not self.tensor_layers.get(batch) and fits(self.packed, batch)
            self.steps[batch] = FusedStep(self.packed, batch) if fused else StepLoop(self._new_run(1, batch))
        return self.steps[batch]

    # --- runs ---

    def run(self, inputs: Inputs, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`. A run whose buffers would take more than `RECORD_BYTES` goes through in chunks of time.

        The state stays on the GPU. Raises MemoryError with the needed and the free bytes; the engine stays usable.
        """
        if inputs.batch < 1:
            raise ValueError("inputs: got a batch of 0, need at least one sample")
        with self.device.on_stream():
            try:
                return self._run(inputs, state, record_events, record_states)
            except MemoryError:
                # The next attempt may need the room that kept buffers take.
                self._forget_runs()
                raise

    def _run(self, inputs: Inputs, state: State, record_events: bool, record_states: bool) -> Trace:
        now, longest = self.flat_state(state), self._longest(inputs.batch, record_states)
        if self.precision and inputs.batch not in self.tensor_layers and inputs.steps:
            some = inputs.chunk(0, min(inputs.steps, longest, MEASURED_STEPS))
            self.tensor_layers[inputs.batch] = self._measured_layers(some, now)
            # Graphs that were captured before do not know this choice.
            self._forget_runs()
        fits = 0 < inputs.steps <= longest
        if not inputs.checked and fits and not (record_events or record_states):
            return self._captured_run(inputs, now)
        return self._chunked_run(inputs, now, longest, record_events, record_states)

    def _captured_run(self, inputs: Inputs, now: Any) -> Trace:
        """A run without records that fits into its buffers: from its second time on, one launch of a graph."""
        run = self._kept_run(inputs.steps, inputs.batch)
        if run.captured is None:
            run.captured = CapturedRun(run, counting=True)
        captured = run.captured
        copy_values(self.device, inputs, captured.x)
        run.buffers.start(now)
        captured.replay()
        left = self._state(run.buffers.state, inputs.batch)
        output = captured.output if inputs.array_library is None else captured.output.copy()
        return self._trace(inputs, left, output, captured.status.get(), [], [])

    def _chunked_run(self, inputs: Inputs, now: Any, longest: int, record_events: bool, record_states: bool) -> Trace:
        device, batch, steps = self.device, inputs.batch, inputs.steps
        on_device = inputs.array_library is not None
        arrays: Any = device.arrays if on_device else np
        layers = range(len(self.units))
        output = arrays.empty((steps, batch, self.output_size), np.float32)
        events = [arrays.empty((steps, batch, n), np.float32) for n in self.units] if record_events else []
        states = [arrays.empty((steps, batch, n), np.float32) for n in self.units] if record_states else []
        status = self.status
        status.data.memset_async(0, status.nbytes)

        def take(found: Any, target: Any) -> None:
            if on_device:
                target[...] = found
            else:
                device.fetch(found, target)

        for begin in range(0, steps, longest):
            end = min(steps, begin + longest)
            run, chunk = self._kept_run(end - begin, batch), inputs.chunk(begin, end)
            run.buffers.start(now)
            run.begin()
            after = [device.empty((run.steps, batch, n), np.float32) for n in self.units] if record_states else None
            x = self._values(chunk, run)
            lists = self._lists(chunk) if x is None else run.event_lists(x, begin * batch, status)
            run.enqueue(*lists, status, after, counting=True)
            run.count_inputs(x, status)
            for k in layers:
                for whole, found in ((events, run.buffers.sent(k)), (states, after[k] if after else None)):
                    if whole and found is not None:
                        take(found, whole[k][begin:end])
            made = device.empty((run.steps, batch, self.output_size), np.float32)
            run.read_out(made, status)
            take(made, output[begin:end])
            now = run.buffers.state
        left = self._state(now, batch)
        return self._trace(inputs, left, output, status.get(), events, states)

    def _trace(self, inputs: Inputs, left: DeviceState, output, status: np.ndarray, events, states) -> Trace:
        """The trace of a run. Raises for the faults in its status words."""
        check_status(status, inputs, left, self.packed.names)
        sizes = [self.packed.counted_inputs, *self.units]
        counts = np.split(status[STATUS_FIELDS:], np.cumsum(np.repeat(sizes, 2))[:-1])
        fired = tuple(FireCounts(a.copy(), b.copy()) for a, b in zip(counts[::2], counts[1::2], strict=True))
        output, *records = (result_for(self.device, inputs, each) for each in (output, *events, *states))
        return Trace(
            output,
            left,
            fired[1:],
            tuple(records[: len(events)]),
            tuple(records[len(events) :]),
            self.paths(inputs.batch),
            # The run counts the events of a dense input.
            fired[0] if inputs.kind is InputKind.DENSE else None,
        )

    def _measured_layers(self, inputs: Inputs, flat: Any) -> tuple[int, ...]:
        """The layers that are faster through tensor cores, by timing these inputs from this state on."""
        able = self.packed.tensor_able(inputs.batch)
        if not able:
            return ()

        def seconds(tensor_layers: tuple[int, ...]) -> float:
            self.tensor_layers[inputs.batch] = tensor_layers
            enqueue = self.on_device(inputs, flat)
            # The first call compiles, and the second captures the graph.
            enqueue()
            enqueue()
            return min(self.device.seconds(enqueue) for _ in range(MEASURED_RUNS))

        try:
            return fastest_layers(able, seconds)
        finally:
            self.tensor_layers.pop(inputs.batch, None)

    def on_device(self, inputs: Inputs, state: State | Any, *, counting: bool = True) -> Callable[[], None]:
        """A function that puts a whole run from this state on the stream at each call, for timing.

        Nothing is copied to or from the host. From the second call on, the run is one launch of a graph.
        """
        longest = self._longest(inputs.batch, False)
        chunks = [inputs.chunk(a, min(inputs.steps, a + longest)) for a in range(0, inputs.steps, longest)]
        with self.device.on_stream():
            flat = self.flat_state(state)
            runs = [self._kept_run(chunk.steps, chunk.batch) for chunk in chunks]
            lists = [self._lists(chunk) if chunk.checked else None for chunk in chunks]
            values = [self._values(chunk, None) for chunk in chunks]
            out = self.device.empty((min(inputs.steps, longest), inputs.batch, self.output_size), np.float32)

        def enqueue() -> None:
            now = flat
            for run, given, x in zip(runs, lists, values, strict=True):
                run.buffers.start(now)
                run.begin()
                found = given or run.event_lists(x, 0, self.status)
                run.enqueue(*found, self.status, None, counting, out[: run.steps])
                now = run.buffers.state

        replay = Replay(self.device.queue, enqueue)

        def put() -> None:
            with self.device.on_stream():
                replay()

        return put

    def paths(self, batch: int) -> dict[str, str]:
        """By matrix, the layout of its weights and the memory that they are read from, for this batch size."""
        return self.packed.paths(batch, self.tensor_layers.get(batch, ()))

    # --- memory ---

    def _state(self, flat: Any, batch: int) -> DeviceState:
        """A copy of a state on the GPU."""
        return DeviceState(self.device, flat.copy(), self.units, batch, self.network.shared_gates())

    def flat_state(self, state: State | Any) -> Any:
        """A state as one array on the device (`DeviceState.flat`), not to be written to; such an array as it is."""
        if isinstance(state, DeviceState):
            return state.flat
        if not isinstance(state, State):
            return state
        state.need_gates(self.network.shared_gates(), state.batch)
        return self.device.put(flattened(state))

    def _new_run(self, steps: int, batch: int) -> Run:
        layers = self.tensor_layers.get(batch, ())
        return Run(self.packed, self.lists, self._symbol_events(), steps, batch, layers)

    def _kept_run(self, steps: int, batch: int) -> Run:
        """The kept run of that shape, or a new one; the runs that were used longest ago make room for it."""
        key = (steps, batch, self.tensor_layers.get(batch, ()))
        if key in self.runs:
            self.runs[key] = self.runs.pop(key)
            return self.runs[key]
        new = self._new_run(steps, batch)
        while self.runs and new.nbytes + sum(each.nbytes for each in self.runs.values()) > 2 * RECORD_BYTES:
            del self.runs[next(iter(self.runs))]
        self.runs[key] = new
        return new

    def _forget_runs(self) -> None:
        self.runs.clear()
        self.steps.clear()

    def _values(self, inputs: Inputs, run: Run | None) -> Any:
        """Unchecked numbers or symbols on the device, in memory of the run or of their own; None for event lists."""
        if inputs.checked or inputs.array_library is not None:
            return None if inputs.checked else inputs.values
        shape = inputs.values.shape
        x = run.buffers.scratch("x", shape, np.float32) if run else self.device.empty(shape, np.float32)
        copy_values(self.device, inputs, x)
        return x

    def _lists(self, inputs: Inputs) -> tuple[Any, Any]:
        """The event lists of checked inputs on the device, and the list that each row of the input reads."""
        return self.lists.of(inputs.event_table), self.device.put(inputs.rows)

    def _longest(self, batch: int, record_states: bool) -> int:
        """The most time steps whose buffers stay below `RECORD_BYTES`."""
        layers = self.network.layers
        row = sum(pitch_of(n) * (1 + layer.cell.reset_first) for n, layer in zip(self.units, layers, strict=True))
        # Drives of the first layer, and of every layer with a cluster of its own for its input.
        row += sum(g * n for g, n in zip(self.packed.gates, self.units, strict=True))
        row += sum(self.units) if record_states else 0
        # The partial counts of tensor-core layers: two bytes per two units and, at most, per sample.
        row += sum(-(-n // (2 * LANES)) * LANES // 2 for n in self.units) if self.precision else 0
        # Their rounded inputs and, where the registers of the GPU hold a layer, its log, which has less than this.
        row += sum(pitch_of(each.inputs) + 2 * pitch_of(each.units) for each in layers) if self.precision else 0
        # Event lists of the input, where they are found on the GPU.
        row += 2 * (layers[0].inputs + LANES)
        if self.network.readout is not None:
            row += self.network.readout.weights.shape[1]
        # Event lists of a layer, for the read-out and for input drives that are computed before their layer.
        row += 2 * (max(map(pitch_of, self.units)) + LANES)
        # Logits of gated blocks.
        row += sum(pitch_of(each.w_rec.weights.n_blocks) for each in self.packed.gated if each is not None)
        return max(1, RECORD_BYTES // (4 * row * batch))
