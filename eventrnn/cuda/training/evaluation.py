"""A model on the GPU for evaluation: the forward pass without noise, with the parameters of the run or with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn._checks import class_array
from eventrnn.cuda.run_buffers import Replay
from eventrnn.cuda.training.forward import ForwardWindow
from eventrnn.cuda.training.memory import Memory, nbytes
from eventrnn.cuda.training.program import fetch_output, gate_fault, put_inputs
from eventrnn.simulation import need_single_states
from eventrnn.state import State

if TYPE_CHECKING:
    from eventrnn.cuda.training.engine import CudaTrainingEngine

F32 = np.float32

# Sizes of windows whose graphs are kept, those used last.
MOST_WINDOWS = 32


@dataclass(frozen=True)
class EvaluationTape:
    """What a task may read of a window.

    activity       : events per unit, step and sample, over all layers
    layer_activity : the same of each layer, (layers,) float64
    events         : events of all layers per step and sample, (T, B) integers
    """

    activity: float
    layer_activity: np.ndarray
    events: np.ndarray


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
        self.windows: dict[tuple[int, int], tuple[ForwardWindow, Replay, Replay]] = {}

    @contextmanager
    def using(self, parameters: Mapping[str, np.ndarray] | None) -> Iterator[None]:
        """Within the context, use other parameters than those of the run; None uses those."""
        engine, there = self.engine, self.engine.parameters
        if parameters is None:
            self.parameters = engine.model.parameters
            yield
            return
        masks, (low, high) = engine.model.masks, engine.model.threshold_bounds
        with engine.device.on_stream():
            engine.device.need(there.values.nbytes)
            before = there.values.copy()
        try:
            with engine.device.on_stream():
                for name, array in parameters.items():
                    masked = array * masks[name] if name in masks else array
                    if name.endswith(".threshold"):
                        masked = np.clip(masked, F32(low), F32(high))
                    there.send(name, masked, there.values)
                there.narrow(engine.lanes.main)
            self.parameters = parameters
            yield
        finally:
            with engine.device.on_stream():
                there.values.data.copy_from_device_async(before.data, before.nbytes)
                there.narrow(engine.lanes.main)
            self.parameters = engine.model.parameters

    def forward(self, inputs: np.ndarray, state: State, noise: Any = None) -> tuple[np.ndarray, State, EvaluationTape]:
        """See `training.Model.forward`; without noise. The tape holds events only."""
        if noise is not None:
            raise ValueError("noise: got some, but a model on the GPU evaluates without noise; leave it out")
        with self.engine.device.on_stream():
            window, run, _ = self._window(inputs, state)
            run()
            self._check_gates(window)
            output = fetch_output(self.engine.device, window.memory, window.sizes, window.steps, window.batch)
            return output, self._state(window), EvaluationTape(*self._activities(window), self._events(window))

    def score(self, inputs: np.ndarray, targets: np.ndarray, state: State) -> tuple[float, State, np.ndarray]:
        """See `training.Model.score`."""
        with self.engine.device.on_stream():
            window, _, run = self._window(inputs, state)
            device, memory = self.engine.device, window.memory
            flat = class_array("targets", targets, (window.steps, window.batch), window.sizes.outputs).reshape(-1)
            device.send(flat, memory["targets"][: window.rows])
            run()
            self._check_gates(window)
            losses = np.empty(window.rows, np.float64)
            device.fetch(memory["losses"][: window.rows], losses)
            return float(losses.sum()) / max(1, window.rows), self._state(window), self._activities(window)[1]

    def _window(self, inputs: np.ndarray, state: State) -> tuple[ForwardWindow, Replay, Replay]:
        """The window and the graphs of windows of this size, with inputs and state sent."""
        engine, (steps, batch) = self.engine, inputs.shape[:2]
        state.need_shapes([layer.units for layer in engine.sizes.layers], batch)
        need_single_states(self.template, state)
        if self.memory is None or steps > self.capacity[0] or batch > self.capacity[1]:
            larger = max(steps, self.capacity[0]), max(batch, self.capacity[1])
            self.windows.clear()
            self.memory, self.capacity = None, (0, 0)
            outline = engine.sizes.outline(*larger, training=False)
            engine.device.need(nbytes(outline))
            self.memory, self.capacity = Memory(engine.device, outline), larger
        memory, found = self.memory, self.windows.pop((steps, batch), None)
        if found is None:
            if len(self.windows) == MOST_WINDOWS:
                del self.windows[next(iter(self.windows))]
            window = ForwardWindow(engine.sizes, engine.lanes, memory, engine.parameters, steps, batch, training=False)

            def forward(window: ForwardWindow = window) -> None:
                window.forward()
                window.count_events()
                window.write_output()
                window.carry_on()
                engine.lanes.join()

            def score(window: ForwardWindow = window) -> None:
                window.forward()
                window.count_events()
                window.cross_entropy()
                window.carry_on()
                engine.lanes.join()

            queue = engine.device.queue
            found = window, Replay(queue, forward), Replay(queue, score)
        # The window that was used last stands last.
        self.windows[steps, batch] = found
        put_inputs(engine.device, memory, engine.sizes, inputs)
        for name, arrays in (("cells", state.cells), ("outputs", state.outputs)):
            for k, (layer, array) in enumerate(zip(engine.sizes.layers, arrays, strict=True)):
                padded = np.zeros((batch, layer.padded), F32)
                padded[:, : layer.units] = array
                engine.device.send(padded, memory[name, k][:batch])
        return found

    def _check_gates(self, window: ForwardWindow) -> None:
        """Raise FloatingPointError where the gates of blocks are not finite."""
        if fault := gate_fault(self.engine.device, window.memory, window.sizes, window.steps, window.batch):
            raise fault

    def _state(self, window: ForwardWindow) -> State:
        found: dict[str, list[np.ndarray]] = {"cells": [], "outputs": []}
        for name, arrays in found.items():
            for k, layer in enumerate(window.sizes.layers):
                padded = np.empty((window.batch, layer.padded), F32)
                self.engine.device.fetch(window.memory[name, k][: window.batch], padded)
                arrays.append(np.ascontiguousarray(padded[:, : layer.units]))
        return State(tuple(found["cells"]), tuple(found["outputs"]))

    def _events(self, window: ForwardWindow) -> np.ndarray:
        """Events of all layers per step and sample."""
        total, device, memory = np.zeros((window.steps, window.batch), np.int64), self.engine.device, window.memory
        for k, layer in enumerate(window.sizes.layers):
            threshold, size = np.empty(layer.padded, F32), window.rows * layer.padded
            values, plane = np.empty((window.steps, window.batch, layer.padded), F32), layer.rule.output
            device.fetch(memory["threshold", k], threshold)
            device.fetch(memory["tape", k].reshape(-1)[plane * size : (plane + 1) * size], values.reshape(-1))
            total += np.count_nonzero((values > threshold) & (values != 0), axis=2)
        return total

    def _activities(self, window: ForwardWindow) -> tuple[float, np.ndarray]:
        """The activity over all layers, and of each layer."""
        counts = np.empty(window.memory["counts"].shape, np.int64)
        self.engine.device.fetch(window.memory["counts"], counts)
        events = np.array(window.events(counts))
        entries = np.array([window.rows * layer.units for layer in window.sizes.layers])
        return int(events.sum()) / max(1, int(entries.sum())), events / np.maximum(1, entries)
