"""The training engine of one NVIDIA GPU: parameters, windows and updates stay there; see `backend.TrainingEngine`.

An update is one CUDA graph per size of window: noise, forward, loss, backward, clipping, update rule. The host sends
the batch and the numbers of the step, and reads one vector of figures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.backend import WindowResult
from eventrnn.cuda.cublas import WORKSPACE_BYTES
from eventrnn.cuda.device import current_device
from eventrnn.cuda.training.evaluation import Evaluator
from eventrnn.cuda.training.gated_sizes import GatedSizes
from eventrnn.cuda.training.kernels import updates
from eventrnn.cuda.training.kernels.sums import UNIT_COUNTS
from eventrnn.cuda.training.lanes import Lane
from eventrnn.cuda.training.layout import Layout
from eventrnn.cuda.training.memory import LayerSizes, Memory, Sizes, SoftSizes, nbytes
from eventrnn.cuda.training.mirror import Mirror
from eventrnn.cuda.training.parameters import DeviceParameters
from eventrnn.cuda.training.program import Program, gate_fault
from eventrnn.cuda.training.window import Alone, Lanes
from eventrnn.state import State
from eventrnn.weights import MatrixId
from eventrnn.weights.gated import kept_blocks

if TYPE_CHECKING:
    from eventrnn.cuda.training.window import Group
    from eventrnn.training.bptt.model import Model
    from eventrnn.training.optim import Rule
    from eventrnn.training.settings import Settings
    from eventrnn.training.tasks import Batch, Task

F32 = np.float32

# A window whose length is drawn is at most this many standard deviations longer than the mean, or memory grows.
LONGEST_WINDOW = 4

# Memory grows by this many steps.
GROWTH = 16

# Programs (graphs) that are kept, those used last. Windows of random length around 70 and 35 steps, with a deviation of
# 5, have about 90 lengths.
MOST_PROGRAMS = 128

# What small arrays take together, and the rounding of every array to 512 bytes: tables of the parameters and of the
# programs, results, norms.
SMALL_ARRAYS = 1 << 22

# States of the optimiser that several GPUs share, in the order in which they are copied.
SHARED_STATES = ("first", "second", "mean")

# Largest seed of the noise plus one.
SEEDS = 1 << 64


class CudaTrainingEngine:
    """Updates a model on the current GPU.

    Afterwards `model.parameters` and the arrays of the optimiser are `Mirror`s of what is on the GPU. `after_step` of
    `update` finds pruned weights zero already.

    share : rank of this GPU and number of GPUs that share every batch; each has an engine of its own, whose updates
            are those of the joined batch (`training.data_parallel`)

    Attributes
    ----------
    nbytes   : bytes of GPU memory that the arrays of the run need, those of its validations included
    exchange : with the other GPUs

    Raises BackendUnavailable without a usable GPU, ValueError for settings that the GPU does not have, and MemoryError,
    with the needed and the free bytes, before anything is allocated.
    """

    # CUDA knows the thread that made its context.
    apart = False

    def __init__(self, model: Model, task: Task, settings: Settings, optimiser: Rule, share: tuple[int, int] = (0, 1)):
        _check(settings, model)
        self.model, self.task, self.settings, self.optimiser = model, task, settings, optimiser
        self.device = current_device()
        self.precision = settings.precision or "bfloat16"
        self.sizes = _sizes(model, settings, self.precision)
        self.fused = task.is_cross_entropy_of_steps and bool(self.sizes.outputs)
        first = task.batch(0, 0, settings.batch, settings.window).part(*share)
        steps, batch = first.inputs.shape[:2]
        if self.fused and first.soft is not None:
            self.sizes = replace(self.sizes, soft=SoftSizes(first.soft.top_k, first.soft.weight))
        self.steps = steps + round(LONGEST_WINDOW * settings.window_jitter)
        self.rule, slots = _rule(optimiser)
        host = dict(model.parameters)
        # The mean, and the parameters that are put back after an evaluation of the mean.
        averaged = 2 if settings.optimiser.kind == "nt-asgd" else 0
        self.nbytes = (
            nbytes(self.sizes.outline(self.steps, batch, training=True))
            + self._evaluation_bytes()
            + DeviceParameters.nbytes(host, self.precision, len(slots) + averaged + 1, tuple(model.masks), model.gated)
            + WORKSPACE_BYTES * (len(self.sizes.layers) + 2)
            + self._exchange_bytes(host, share)
            + SMALL_ARRAYS
        )
        with self.device.on_stream():
            self.device.need(self.nbytes)
            count = len(self.sizes.layers)
            self.lanes = Lanes(
                Lane(self.device, self.precision, first=True),
                [Lane(self.device, self.precision, urgent=True) for _ in range(count)],
                Lane(self.device, self.precision),
            )
            self.parameters = DeviceParameters(
                self.device,
                host,
                count,
                self.precision,
                model.thresholds,
                model.threshold_bounds,
                self._sums(),
                model.gated,
            )
            self.exchange = self._new_exchange(share)
            self._mirrors: list[tuple[Mirror, Any]] = []
            # Parameters that are kept are fetched when they are read, which a run does less often than it validates.
            self._kept = self._mirror_of(
                {name: np.empty_like(array) for name, array in host.items()}, self.parameters.state("kept")
            )
            self._values = self._mirror(host, self.parameters.values)
            model.parameters = self._values
            for state, attribute in slots.items():
                mirror = self._mirror(getattr(optimiser, attribute), self.parameters.state(state))
                setattr(optimiser, attribute, mirror)
            self.constants = self.device.put(
                np.array([settings.regularisers.activity_target, settings.regularisers.activity_rate], np.float64)
            )
            self.device.send(np.array([settings.clip, settings.clip_layers], np.float64), self.parameters.limits)
            #: the masks that the GPU has; None where they may have changed in place
            self._masks: dict[str, np.ndarray] | None = {}
            self.programs: dict[tuple, Program] = {}
            self.rates = self._rates()
            self.memory = self._allocate(self.steps, batch)
            self.capacity = self.steps, batch
            self.batch = batch
        self.evaluator = Evaluator(self)

    def _evaluation_bytes(self) -> int:
        """Bytes of the windows of a validation."""
        found = self.task.evaluation_window(self.sizes.outputs)
        return 0 if found is None else nbytes(self.sizes.outline(*found, training=False))

    def _exchange_bytes(self, host: Mapping[str, np.ndarray], share: tuple[int, int]) -> int:
        if share[1] == 1:
            return 0
        from eventrnn.cuda.training.exchange import Exchange

        return WORKSPACE_BYTES + Exchange.nbytes(Layout(host), share[1], self._further())

    def _new_exchange(self, share: tuple[int, int]) -> Alone:
        if share[1] == 1:
            return Alone()
        from eventrnn.cuda.training.exchange import Exchange

        return Exchange(self.device, self.precision, *share, self.parameters.layout, self._further())

    def join(self, group: Group) -> None:
        """Exchange with these processes from now on.

        A first exchange connects them, which a graph could not capture.
        """
        gradients = self.parameters.gradients
        self.exchange.connect(group, gradients.data.ptr)
        self.exchange.add(self.lanes.main, gradients.data.ptr, gradients.size, "float32")
        self.device.queue.synchronize()

    def share_values(self) -> None:
        """Take the parameters and the state of the optimiser over from rank 0, or give them to the others."""
        there = self.parameters
        for array in (there.values, *(there.states[name] for name in SHARED_STATES if name in there.states)):
            self.exchange.share(self.lanes.main, array)
        there.narrow(self.lanes.main)

    def _further(self) -> int:
        """The most numbers that several GPUs add up besides the gradients: counts of the units, or sums of a window."""
        layers = self.sizes.layers
        return max(sum(UNIT_COUNTS * layer.padded for layer in layers), 3 * len(layers) + self._sums())

    # --- the protocol ---

    @property
    def memory_use(self) -> str:
        """See `backend.TrainingEngine`."""
        return f"{self.nbytes:,} bytes for the run, {self.device.free_bytes():,} more are free on {self.device.name}"

    @property
    def state(self) -> State:
        """State of the network after the last window."""
        return self.own_state()

    @state.setter
    def state(self, state: State) -> None:
        self.take_state(state)

    def own_state(self) -> State:
        """The state of the samples that this GPU has."""
        found: dict[str, list[np.ndarray]] = {"cells": [], "outputs": []}
        with self.device.on_stream():
            for name, arrays in found.items():
                for k, layer in enumerate(self.sizes.layers):
                    padded = np.empty((self.batch, layer.padded), F32)
                    self.device.fetch(self.memory[name, k][: self.batch], padded)
                    arrays.append(np.ascontiguousarray(padded[:, : layer.units]))
        return State(tuple(found["cells"]), tuple(found["outputs"]))

    def take_state(self, state: State) -> None:
        """Replace the state of the samples that this GPU has."""
        with self.device.on_stream():
            self._grow(1, state.batch)
            self.batch = state.batch
            for name, arrays in (("cells", state.cells), ("outputs", state.outputs)):
                for k, (layer, array) in enumerate(zip(self.sizes.layers, arrays, strict=True)):
                    padded = np.zeros((state.batch, layer.padded), F32)
                    padded[:, : layer.units] = array
                    self.device.send(padded, self.memory[name, k][: state.batch])

    def update(
        self,
        batch: Batch,
        *,
        start: str,
        step: int,
        rate: float,
        after_step: Callable[[Any, Any], None] | None,
        commit: Callable[[Callable[[], WindowResult]], WindowResult],
    ) -> WindowResult:
        """See `backend.TrainingEngine`."""
        loss = None
        with self.device.on_stream():
            program = self.prepare(batch, start, step, rate)
            if not self.fused:
                program.forward()
                if fault := gate_fault(self.device, self.memory, self.sizes, program.steps, program.batch):
                    return WindowResult(fault=str(fault))
                loss, d_output = self.task.loss(program.output(), batch)
                if not np.isfinite(loss):
                    return WindowResult(fault=f"the loss is {loss}")
                program.put_gradient(d_output)
        # The GPU changes parameters as soon as it has gradients.
        return commit(lambda: self._change(program, loss, after_step))

    def prepare(self, batch: Batch, start: str, step: int, rate: float) -> Program:
        """Send what the host may have changed, the batch, and the numbers of the step. Returns the update, which is yet
        to be launched."""
        steps, samples = batch.inputs.shape[:2]
        self._take_over()
        self._grow(steps, samples)
        program = self.program(steps, samples)
        targets, soft = (batch.targets, batch.soft) if self.fused else (None, None)
        program.put(batch.inputs, targets, soft)
        self._begin(start, samples)
        self._send_numbers(step, rate)
        return program

    def launch(self, program: Program, loss: float | None) -> WindowResult:
        """Change the parameters on the GPU. loss : of the window, if the host has computed it already"""
        if self.fused:
            program.whole()
        else:
            program.backward()
        return program.result(loss)

    def _change(
        self, program: Program, loss: float | None, after_step: Callable[[Any, Any], None] | None
    ) -> WindowResult:
        """What of an update changes parameters. loss : see `launch`"""
        with self.device.on_stream():
            result = self.launch(program, loss)
            if result.fault:
                return result
            self.optimiser.steps += 1
            self.optimiser.counted += bool(self.optimiser.mean)
            for mirror, _ in self._mirrors:
                mirror.changed_on_gpu()
            if after_step is not None:
                after_step(self.model.parameters, self._gradients())
        return result

    def __reduce__(self):
        raise TypeError(
            "trainer: its parameters are on the GPU and cannot be copied; make a new trainer, and restore the `arrays` "
            "and `numbers` of this one"
        )

    def masks_changed(self) -> None:
        """See `backend.TrainingEngine`."""
        self._masks = None
        with self.device.on_stream():
            self._take_over()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """See `backend.TrainingEngine`."""
        with ExitStack() as stack:
            for mirror, _ in self._mirrors:
                stack.enter_context(mirror.reading())
            yield

    @contextmanager
    def evaluating(self, parameters: Mapping[str, np.ndarray] | None = None) -> Iterator[Evaluator]:
        """See `backend.TrainingEngine`."""
        with self.device.on_stream():
            self._take_over()
        with self.evaluator.using(parameters):
            yield self.evaluator

    def kept(self) -> Mapping[str, np.ndarray]:
        """See `backend.TrainingEngine`. The copies stay on the GPU until they are read."""
        values, copy = self.parameters.values, self.parameters.state("kept")
        with self.device.on_stream():
            copy.data.copy_from_device_async(values.data, values.nbytes)
        self._kept.changed_on_gpu()
        return self._kept

    def keep_input_gradient(self) -> None:
        """Compute the gradient of the inputs too, as a layer within a larger model would, for benchmarks."""
        self.sizes = replace(self.sizes, d_inputs=True)
        with self.device.on_stream():
            self.memory = self._allocate(*self.capacity)

    # --- what is on the GPU ---

    def _mirror(self, arrays: Mapping[str, np.ndarray], twin: Any) -> Mirror:
        """A mirror that is sent to its twin, an array of the layout, before the next update."""
        mirror = self._mirror_of(arrays, twin)
        self._mirrors.append((mirror, twin))
        return mirror

    def _mirror_of(self, arrays: Mapping[str, np.ndarray], twin: Any) -> Mirror:
        def fetch(name: str, out: np.ndarray) -> None:
            with self.device.on_stream():
                self.parameters.fetch(name, twin, out)

        return Mirror(dict(arrays), fetch)

    def _gradients(self) -> Mirror:
        """The gradients of the last update, clipped."""
        scales = np.empty(len(self.parameters.layout), F32)
        self.device.fetch(self.parameters.scales, scales)
        number = {segment.name: k for k, segment in enumerate(self.parameters.layout)}

        def fetch(name: str, out: np.ndarray) -> None:
            with self.device.on_stream():
                self.parameters.fetch(name, self.parameters.gradients, out)
            out *= scales[number[name]]

        shapes = {segment.name: segment.shape for segment in self.parameters.layout}
        gradients = Mirror({name: np.empty(shape, F32) for name, shape in shapes.items()}, fetch)
        gradients.changed_on_gpu()
        return gradients

    def _take_over(self) -> bool:
        """Send what the host may have changed: masks, parameters, optimiser state. Returns whether anything was."""
        # What has been taken over is noted afterwards: an exception in between leaves the rest to the next call.
        masks, there = self.model.masks, self._masks
        changed = there is None or masks.keys() != there.keys() or any(masks[k] is not there[k] for k in masks)
        if changed:
            self.parameters.set_masks(masks)
        mean = self.optimiser.mean
        if mean and not isinstance(mean, Mirror):
            self.optimiser.mean = self._mirror(mean, self.parameters.state("mean"))
        sent = changed
        for mirror, twin in self._mirrors:
            sent |= mirror.send_touched(lambda name, array, twin=twin: self._send(name, array, twin))
        if changed and masks:
            self.parameters.prune(self.lanes.main)
            self._values.changed_on_gpu(masks)
        if changed:
            self._masks = dict(masks)
        return sent

    def _send(self, name: str, array: np.ndarray, twin: Any) -> None:
        """Send an array of the host to its twin; of parameters, pruned weights as zero and thresholds in bounds."""
        if twin is not self.parameters.values:
            self.parameters.send(name, array, twin)
            return
        masks, (low, high) = self.model.masks, self.model.threshold_bounds
        if name in masks:
            array *= masks[name]
        if name.endswith(".threshold"):
            np.clip(array, F32(low), F32(high), out=array)
        self.parameters.send(name, array, twin)
        self.parameters.narrow(self.lanes.main, name)

    def _allocate(self, steps: int, batch: int) -> Memory:
        memory = Memory(self.device, self.sizes.outline(steps, batch, training=True))
        drops = {
            f"layers.{mask.layer}.w_rec": (memory.at(("mask", mask.name, mask.layer)), float(mask.scale))
            for mask in self.sizes.masks
            if mask.name == "recurrent"
        }
        self.parameters.set_drops(drops)
        self._drop_programs()
        return memory

    def _drop_programs(self) -> None:
        while self.programs:
            self.programs.popitem()[1].drop()

    def _grow(self, steps: int, batch: int) -> None:
        """Make room for larger windows; the state is kept. Raises MemoryError; the engine is then as it was."""
        most_steps, most_batch = self.capacity
        if steps <= most_steps and batch <= most_batch:
            return
        steps = most_steps if steps <= most_steps else -(-steps // GROWTH) * GROWTH
        larger = steps, max(batch, most_batch)
        now, then = (nbytes(self.sizes.outline(*size, training=True)) for size in (self.capacity, larger))
        self.device.need(then - now)
        state = self.own_state()
        # The old memory is freed first, so that both need not fit.
        self._drop_programs()
        del self.memory
        try:
            self.memory = self._allocate(*larger)
            self.capacity = larger
        except BaseException:
            self.memory = self._allocate(*self.capacity)
            raise
        finally:
            self.take_state(state)

    def program(self, steps: int, batch: int) -> Program:
        """The update on windows of that size."""
        averaged = bool(self.optimiser.mean)
        key = (steps, batch, averaged)
        program = self.programs.pop(key, None)
        if program is None:
            if len(self.programs) == MOST_PROGRAMS:
                self.programs.pop(next(iter(self.programs))).drop()
            program = Program(self, steps, batch, averaged=averaged)
        # The program that was used last stands last.
        self.programs[key] = program
        return program

    def _begin(self, start: str, batch: int) -> None:
        """The initial state of the window."""
        fresh = start not in ("state", "events") or batch != self.batch
        self.batch = batch
        for k in range(len(self.sizes.layers)):
            if fresh or start == "events":
                self.lanes.main.clear(self.memory["cells", k])
            if fresh:
                self.lanes.main.clear(self.memory["outputs", k])

    def _send_numbers(self, step: int, rate: float) -> None:
        chosen, optimiser = self.settings.optimiser, self.optimiser
        steps = optimiser.steps + 1
        numbers = np.zeros(updates.NUMBERS, F32)
        numbers[[updates.BETA1, updates.BETA2, updates.EPSILON]] = chosen.beta1, chosen.beta2, chosen.epsilon
        numbers[updates.MOMENTUM] = chosen.momentum
        numbers[updates.CORRECTION1] = 1 / (1 - chosen.beta1**steps)
        numbers[updates.CORRECTION2] = 1 / (1 - chosen.beta2**steps)
        numbers[updates.SHARE] = 1 / (optimiser.counted + 1)
        rates = self.rates.copy()
        rates[:, 0] *= rate
        self.device.send(np.concatenate([numbers, rates.reshape(-1).astype(F32)]), self.parameters.numbers)
        self.device.send(np.array([step], np.int64), self.parameters.job)
        if self.parameters.kept_blocks is not None:
            gates, gated = self.settings.gates, self.model.gated.values()
            kept = [kept_blocks(gates.density(weights.density, step), weights.n_blocks) for weights in gated]
            self.device.send(np.array(kept, np.int64), self.parameters.kept_blocks[0])

    def _rates(self) -> np.ndarray:
        """(segments, 3) float64: factor of the learning rate, decoupled decay, and decay that joins the gradient."""
        chosen, rates = self.settings.optimiser, np.zeros((len(self.parameters.layout), 3))
        for line, segment in zip(rates, self.parameters.layout, strict=True):
            line[0] = chosen.rate_of(segment.name)
            line[1 if chosen.kind == "adamw" else 2] = self.settings.weight_decay * chosen.decays(segment.name)
        return rates

    @property
    def noise_seed(self) -> int:
        """The seed of the noise as a signed number of 64 bits."""
        return int(np.uint64(self.settings.seed % SEEDS).astype(np.int64))

    def _sums(self) -> int:
        return Program.number_of_sums(self.sizes)


def _check(settings: Settings, model: Model) -> None:
    """Raise ValueError for settings that the GPU does not have, of the run or of a model that was given."""
    for threads in (settings.threads, model.threads):
        if threads != 1:
            raise ValueError(f"threads: got {threads}, but the cuda backend brings its own; leave it out")
    if "sparse" in (settings.backward, model.backward_mode):
        raise ValueError("backward: got 'sparse', but the cuda backend multiplies every weight; use auto or dense")
    for name, (_, period) in model.template.shared_gates().items():
        raise ValueError(
            f"{name}: got gate_period={period}, but in training with the cuda backend every step chooses its blocks; "
            "use backend='cpu', or dataclasses.replace(weights, gate_period=1)"
        )


def _sizes(model: Model, settings: Settings, precision: str) -> Sizes:
    p, regularisers = model.parameters, settings.regularisers
    layers = [
        LayerSizes(len(p[f"layers.{k}.w_in"]), len(p[f"layers.{k}.threshold"]), cell)
        for k, cell in enumerate(model.cells)
    ]
    on_cells = bool(regularisers.activity_rate or regularisers.state)
    penalties = on_cells or bool(settings.activity_cost or regularisers.activation or regularisers.temporal_activation)
    return Sizes(
        layers,
        len(p["embedding"]) if "embedding" in p else 0,
        len(p["readout.bias"]) if "readout.bias" in p else 0,
        precision,
        regularisers.masks(model),
        penalties,
        on_cells,
        d_inputs="embedding" in p,
        gated=_gated(model),
        straight_through=settings.gates.straight_through,
        gate_balance=regularisers.gate_balance,
    )


def _gated(model: Model) -> dict[str, GatedSizes]:
    """Sizes of the matrices of gated blocks, in the order in which a window reads them."""
    found = {}
    for name, weights in model.gated.items():
        layer = MatrixId(name).layer
        found[name] = GatedSizes.of(name, weights, 1 if layer is None else model.cells[layer].gates)
    return found


def _rule(optimiser: Rule) -> tuple[str, dict[str, str]]:
    """The update rule, and which attribute of the optimiser holds which state."""
    if hasattr(optimiser, "second"):
        if getattr(optimiser, "first", None):
            return updates.ADAM, {"first": "first", "second": "second"}
        return updates.ADAM_WITHOUT_FIRST, {"second": "second"}
    if getattr(optimiser, "velocity", None):
        return updates.MOMENTUM_DESCENT, {"first": "velocity"}
    return updates.DESCEND, {}
