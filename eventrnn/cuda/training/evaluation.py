"""A model on the GPU for evaluation: the forward pass without noise, with the parameters of the run or with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.run_buffers import Replay
from eventrnn.cuda.training.memory import Memory, nbytes
from eventrnn.cuda.training.passes import Passes
from eventrnn.cuda.training.program import fetch_output, put_inputs
from eventrnn.state import State

if TYPE_CHECKING:
    from eventrnn.cuda.training.engine import CudaTrainingEngine

F32 = np.float32


@dataclass(frozen=True)
class EvaluationTape:
    """What a task may read of a window: the activity, events per unit, step and sample."""

    activity: float


class Evaluator:
    """`forward` and `score` of a model; see `training.Model`.

    parameters : those in use, by name
    template   : network of the shapes of the model
    """

    def __init__(self, engine: CudaTrainingEngine):
        self.engine, self.template = engine, engine.model.template
        self.parameters: Mapping[str, np.ndarray] = engine.model.parameters
        self.memory: Memory | None = None
        self.capacity = 0, 0
        self.windows: dict[tuple[int, int], tuple[Passes, Replay, Replay]] = {}

    @contextmanager
    def using(self, parameters: Mapping[str, np.ndarray] | None) -> Iterator[None]:
        """Within the context, use other parameters than those of the run; None uses those."""
        engine, there = self.engine, self.engine.parameters
        if parameters is None:
            self.parameters = engine.model.parameters
            yield
            return
        masks, (low, high) = engine.model.masks, engine.settings.threshold_bounds
        with engine.device.on_stream():
            before = there.values.copy()
            for name, array in parameters.items():
                masked = array * masks[name] if name in masks else array
                if name.endswith(".threshold"):
                    masked = np.clip(masked, F32(low), F32(high))
                there.send(name, masked, there.values)
            there.narrow(engine.lanes[0])
        self.parameters = parameters
        try:
            yield
        finally:
            with engine.device.on_stream():
                there.values.data.copy_from_device_async(before.data, before.nbytes)
                there.narrow(engine.lanes[0])
            self.parameters = engine.model.parameters

    def forward(self, inputs: np.ndarray, state: State, noise: Any = None) -> tuple[np.ndarray, State, EvaluationTape]:
        """See `training.Model.forward`; without noise. The tape holds the activity only."""
        if noise is not None:
            raise ValueError("noise: got some, but a model on the GPU evaluates without noise; leave it out")
        with self.engine.device.on_stream():
            passes, run, _ = self._window(inputs, state)
            run()
            output = fetch_output(self.engine.device, passes.memory, passes.sizes, passes.steps, passes.batch)
            return output, self._state(passes), EvaluationTape(self._activity(passes))

    def score(self, inputs: np.ndarray, targets: np.ndarray, state: State) -> tuple[float, State, float]:
        """See `training.Model.score`."""
        with self.engine.device.on_stream():
            passes, _, run = self._window(inputs, state)
            device, memory = self.engine.device, passes.memory
            flat = np.ascontiguousarray(targets, np.int64).reshape(-1)
            if flat.size != passes.rows or (flat.size and not 0 <= flat.min() <= flat.max() < passes.sizes.outputs):
                need = f"need {inputs.shape[:2]} classes below {passes.sizes.outputs}"
                raise ValueError(f"targets: got shape {targets.shape}, {need}")
            device.send(flat, memory["targets"][: passes.rows])
            run()
            losses = np.empty(passes.rows, np.float64)
            device.fetch(memory["losses"][: passes.rows], losses)
            return float(losses.sum()) / max(1, passes.rows), self._state(passes), self._activity(passes)

    def _window(self, inputs: np.ndarray, state: State) -> tuple[Passes, Replay, Replay]:
        """The passes and the graphs of windows of this size, with inputs and state sent."""
        engine, (steps, batch) = self.engine, inputs.shape[:2]
        if self.memory is None or steps > self.capacity[0] or batch > self.capacity[1]:
            self.windows.clear()
            self.memory = None
            self.capacity = max(steps, self.capacity[0]), max(batch, self.capacity[1])
            outline = engine.sizes.outline(*self.capacity, training=False)
            engine.device.need(nbytes(outline))
            self.memory = Memory(engine.device, outline)
        memory = self.memory
        if (steps, batch) not in self.windows:
            passes = Passes(engine.sizes, engine.lanes, memory, engine.parameters, steps, batch, training=False)

            def forward(passes: Passes = passes) -> None:
                passes.forward()
                passes.count_events()
                passes.write_output()
                passes.carry_on()

            def score(passes: Passes = passes) -> None:
                passes.forward()
                passes.count_events()
                passes.cross_entropy()
                passes.carry_on()

            queue = engine.device.queue
            self.windows[steps, batch] = passes, Replay(queue, forward), Replay(queue, score)
        put_inputs(engine.device, memory, engine.sizes, inputs)
        for name, arrays in (("cells", state.cells), ("outputs", state.outputs)):
            for k, (layer, array) in enumerate(zip(engine.sizes.layers, arrays, strict=True)):
                padded = np.zeros((batch, layer.padded), F32)
                padded[:, : layer.units] = array
                engine.device.send(padded, memory[name, k][:batch])
        return self.windows[steps, batch]

    def _state(self, passes: Passes) -> State:
        found: dict[str, list[np.ndarray]] = {"cells": [], "outputs": []}
        for name, arrays in found.items():
            for k, layer in enumerate(passes.sizes.layers):
                padded = np.empty((passes.batch, layer.padded), F32)
                self.engine.device.fetch(passes.memory[name, k][: passes.batch], padded)
                arrays.append(np.ascontiguousarray(padded[:, : layer.units]))
        return State(tuple(found["cells"]), tuple(found["outputs"]))

    def _activity(self, passes: Passes) -> float:
        counts = np.empty(passes.memory["counts"].shape, np.int64)
        self.engine.device.fetch(passes.memory["counts"], counts)
        entries = passes.rows * sum(layer.units for layer in passes.sizes.layers)
        return passes.events(counts) / max(1, entries)
