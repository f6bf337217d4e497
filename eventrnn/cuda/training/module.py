"""Windows forward and backward on arrays that a caller keeps on the GPU: the engine of a module of another library.

Arrays are given by address and stay where they are. What the passes need in another layout (operands, padded rows, the
order of gates) is written by kernels; nothing goes through the host, and no call waits for the GPU. The work of a pass
is that of a run (`forward.py`, `backward.py`), as one CUDA graph per size of window.

The tape of a window lies in a workspace. It belongs to the window until the caller releases it, and then to the next
window.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eventrnn.cells import Cell
from eventrnn.cuda.run_buffers import Replay
from eventrnn.cuda.training.backward import TrainingWindow
from eventrnn.cuda.training.cell_rules import CELLS
from eventrnn.cuda.training.forward import ForwardWindow
from eventrnn.cuda.training.kernels import tensors
from eventrnn.cuda.training.lanes import Lane
from eventrnn.cuda.training.memory import LayerSizes, Memory, Sizes, nbytes
from eventrnn.cuda.training.tensor_parameters import ParameterTensors, TensorParameters
from eventrnn.cuda.training.window import Lanes

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.training.bptt.noise import Mask

F32 = np.float32

# Workspaces that wait for a window, and sizes of windows in each whose graphs are kept; those used last.
MOST_WAITING, MOST_SIZES = 4, 32

# How much larger than the larger one a workspace may be that serves the windows of two.
MOST_GROWTH = 2

# Lanes are shared by all modules, and autograd calls from a thread of its own.
_LOCK = threading.RLock()


class Rows(NamedTuple):
    """An array (T, B, n) float32 of the caller: address, and float32 from one step, sample and column to the next."""

    at: int
    step: int
    sample: int
    column: int


@dataclass(frozen=True)
class WindowTensors:
    """The arrays of a forward pass, by address. All but the inputs are contiguous.

    Attributes
    ----------
    steps, batch : T and B
    inputs       : (T, B, I)
    before       : outputs and cells before the window, each (layers, B, N) float32; None for zeros
    ends         : (B,) int64 numbers of steps, or 0 where all samples have T
    output       : (T, B, N) float32, written. At the last step of a sample, NaN for a unit that has, in any layer, a
                   cell that is not finite, so that a loss shows it
    after        : outputs and cells after the last step of each sample, each (layers, B, N) float32, written
    """

    steps: int
    batch: int
    inputs: Rows
    before: tuple[int, int] | None
    ends: int
    output: int
    after: tuple[int, int]


class Kind(NamedTuple):
    """What a window needs: a tape for the backward pass, dropout, and memory for the gradient of the inputs."""

    taped: bool
    noise: bool
    d_inputs: bool


class Workspace:
    """The memory of one window at a time.

    generation : of the parameters that its last window has read
    """

    def __init__(self, engine: ModuleEngine, kind: Kind, steps: int, batch: int):
        self.kind, self.capacity, self.generation = kind, (steps, batch), 0
        self.sizes = engine.sizes_of(kind)
        outline = self.sizes.outline(steps, batch, training=kind.taped or kind.noise)
        engine.device.need(nbytes(outline))
        self.memory = Memory(engine.device, outline)
        #: whether the state before the window is zero already
        self.at_rest = True
        self.last = 0, 0
        self._sizes: dict[tuple[int, int], tuple[ForwardWindow, Replay, Replay | None]] = {}

    def window(self, engine: ModuleEngine, steps: int, batch: int) -> tuple[ForwardWindow, Replay, Replay | None]:
        """The window of that size, its forward and its backward pass."""
        found = self._sizes.pop((steps, batch), None)
        if found is None:
            if len(self._sizes) == MOST_SIZES:
                del self._sizes[next(iter(self._sizes))]
            training, queue = self.kind.taped or self.kind.noise, engine.device.queue
            make = TrainingWindow if training else ForwardWindow
            window = make(self.sizes, engine.lanes, self.memory, engine.parameters, steps, batch, training=training)
            backward = Replay(queue, window.backward) if isinstance(window, TrainingWindow) else None
            found = window, Replay(queue, window.forward), backward
        # The window that was used last stands last.
        self._sizes[steps, batch] = found
        self.last = steps, batch
        return found


class Pool:
    """Workspaces, by the number of the tape that they hold, and those that wait for a window."""

    def __init__(self):
        self.held: dict[int, Workspace] = {}
        self.waiting: list[Workspace] = []
        self._released: deque[Workspace] = deque()
        self._numbers = itertools.count(1)

    def hold(self, workspace: Workspace) -> int:
        """Keep a workspace for a tape, whose number is returned."""
        number = next(self._numbers)
        self.held[number] = workspace
        return number

    def release(self, number: int) -> None:
        """The tape of that number is no longer needed. Python may call this in any thread, within any other call."""
        workspace = self.held.pop(number, None)
        if workspace is not None:
            self._released.append(workspace)

    def put_back(self, workspace: Workspace) -> None:
        """A workspace waits for the next window."""
        self._released.append(workspace)

    def take(self, kind: Kind, steps: int, batch: int) -> tuple[Workspace | None, int, int]:
        """A workspace that waits and fits; otherwise None, and the size that a new one should have.

        Those that would have fitted but for their size are dropped, and a new one replaces them. A workspace that is
        much smaller than its union with the new one, as of few long samples beside many short ones, stays."""
        while self._released:
            self.waiting.append(self._released.popleft())
        del self.waiting[:-MOST_WAITING]
        # The workspace that was used last stands last.
        for workspace in reversed(self.waiting):
            most_steps, most_batch = workspace.capacity
            if workspace.kind == kind and steps <= most_steps and batch <= most_batch:
                self.waiting.remove(workspace)
                return workspace, steps, batch
        for workspace in [each for each in self.waiting if each.kind == kind]:
            most_steps, most_batch = max(steps, workspace.capacity[0]), max(batch, workspace.capacity[1])
            if most_steps * most_batch <= MOST_GROWTH * max(
                steps * batch, workspace.capacity[0] * workspace.capacity[1]
            ):
                steps, batch = most_steps, most_batch
                self.waiting.remove(workspace)
        return None, steps, batch


class ModuleEngine:
    """Layers of one size whose parameters, inputs and outputs are arrays of a caller.

    Parameters
    ----------
    device     : where
    cells      : the cell of each layer
    inputs, units : inputs of the first layer, units of every layer
    precision  : type of the factors of products: "float32", "tf32" or "bfloat16"
    rule, bounds : rule of the thresholds, and the range that it allows (`training.thresholds`)
    masks      : random masks of windows with noise

    Attributes
    ----------
    pool       : the workspaces

    Raises MemoryError, with the needed and the free bytes.
    """

    def __init__(
        self,
        device: Device,
        cells: Sequence[Cell],
        inputs: int,
        units: int,
        precision: str,
        rule: str,
        bounds: tuple[float, float],
        masks: Sequence[Mask],
    ):
        self.device = device
        layers = [LayerSizes(units if k else inputs, units, cell) for k, cell in enumerate(cells)]
        self._sizes = Sizes(layers, 0, 0, precision, masks, penalties=False, cells=False, d_inputs=False, outside=True)
        with device.on_stream():
            self.lanes = _lanes(device, precision, len(layers))
            self.parameters = TensorParameters(device, _shapes(layers), precision, rule, bounds)
        self.pool = Pool()
        self.generation = 0

    def sizes_of(self, kind: Kind) -> Sizes:
        """The sizes of windows of a kind."""
        return replace(self._sizes, masks=self._sizes.masks if kind.noise else [], d_inputs=kind.d_inputs)

    @contextmanager
    def after(self, array: Any) -> Iterator[None]:
        """Within the context, `forward` and `backward` come after the work so far on the stream of the caller's array,
        whose later work comes after theirs."""
        with _LOCK, self.device.on_stream():
            self.device.follow(array)
            try:
                yield
            finally:
                # Also after an exception: the GPU may be reading the caller's arrays.
                self.device.precede(array)

    def forward(self, given: WindowTensors, parameters: ParameterTensors, kind: Kind, draw: int = 0) -> int:
        """Run a window. draw : number that selects the masks of dropout

        Returns the number of its tape, for `backward` and `pool.release`, or 0 without one. Raises MemoryError.
        """
        workspace, steps, batch = self.pool.take(kind, given.steps, given.batch)
        if workspace is None:
            workspace = self._made(kind, (steps, batch), (given.steps, given.batch))
        try:
            self._forward(workspace, given, parameters, draw)
        except BaseException:
            self.pool.put_back(workspace)
            raise
        if kind.taped:
            return self.pool.hold(workspace)
        self.pool.put_back(workspace)
        return 0

    def _made(self, kind: Kind, wanted: tuple[int, int], needed: tuple[int, int]) -> Workspace:
        try:
            return Workspace(self, kind, *wanted)
        except MemoryError:
            # What waits for other windows is worth less than this one.
            self.pool.waiting.clear()
            return Workspace(self, kind, *needed)

    def _forward(self, workspace: Workspace, given: WindowTensors, parameters: ParameterTensors, draw: int) -> None:
        lane, memory, layers = self.lanes.main, workspace.memory, self._sizes.layers
        self._take(workspace, parameters)
        if workspace.sizes.masks:
            self.device.send(np.array([draw], np.int64), self.parameters.job)
        first, last = layers[0], layers[-1]
        shape = given.steps, given.batch, first.inputs
        self._copy_rows(lane, given.inputs, shape, memory.at("x"), first.padded_inputs, self._sizes.precision)
        self._begin(lane, workspace, given)
        window, forward, _ = workspace.window(self, given.steps, given.batch)
        forward()
        window.write_output(given.output)
        for k, layer in enumerate(layers):
            apart = 4 * k * given.batch * last.units
            lane.each(
                ("last_state",),
                tensors.last_state_kernel,
                layer.units * given.batch,
                window.tape_at(k, 0, CELLS),
                window.sent_at(k),
                memory.at(("threshold", k)),
                layer.reset_first or not layer.cell.thresholded,
                given.ends,
                given.steps,
                layer.units,
                layer.padded,
                given.batch,
                given.after[1] + apart,
                given.after[0] + apart,
                given.output,
            )

    def _begin(self, lane: Lane, workspace: Workspace, given: WindowTensors) -> None:
        """The state before the window."""
        at_rest, workspace.at_rest = workspace.at_rest, False
        for k, layer in enumerate(self._sizes.layers):
            for number, name in enumerate(("outputs", "cells")):
                if given.before is not None:
                    source = Rows(given.before[number] + 4 * k * given.batch * layer.units, 0, layer.units, 1)
                    target = workspace.memory.at((name, k))
                    self._copy_rows(lane, source, (1, given.batch, layer.units), target, layer.padded, "float32")
                elif not at_rest:
                    lane.clear(workspace.memory[name, k])
        workspace.at_rest = given.before is None

    def backward(
        self,
        number: int,
        d_output: Rows,
        parameters: ParameterTensors,
        gradients: Mapping[str, int],
        d_inputs: int,
    ) -> None:
        """Gradients of a window from that of its output; its tape stays as it is.

        number     : of the tape
        d_output   : (T, B, N)
        parameters : those of the forward pass
        gradients  : addresses of contiguous float32 arrays, for some of the parameters, written
        d_inputs   : address of (T, B, I) float32, written; or 0

        Raises RuntimeError for a tape that was released.
        """
        workspace, lane = self.pool.held.get(number), self.lanes.main
        if workspace is None:
            raise RuntimeError("the tape of this window was released, and cannot be read")
        steps, batch = workspace.last
        if workspace.generation != self.generation:
            self._take(workspace, parameters)
        window, _, backward = workspace.window(self, steps, batch)
        assert backward is not None
        first, last = self._sizes.layers[0], self._sizes.layers[-1]
        upstream = workspace.memory.at(("upstream", len(self._sizes.layers) - 1))
        self._copy_rows(lane, d_output, (steps, batch, last.units), upstream, last.padded, "float32")
        backward()
        self.parameters.give(lane, parameters, gradients)
        if d_inputs:
            pitch = first.padded_inputs
            source = Rows(workspace.memory.at("d_x"), batch * pitch, pitch, 1)
            self._copy_rows(lane, source, (steps, batch, first.inputs), d_inputs, first.inputs, "float32")

    def _take(self, workspace: Workspace, parameters: ParameterTensors) -> None:
        self.generation += 1
        workspace.generation = self.generation
        self.parameters.take(self.lanes.main, parameters)

    def _copy_rows(
        self, lane: Lane, source: Rows, shape: tuple[int, int, int], to: int, pitch: int, precision: str
    ) -> None:
        steps, batch, columns = shape
        lane.each(
            ("rows", precision),
            lambda: tensors.rows_kernel(precision),
            steps * batch * columns,
            *source,
            columns,
            batch,
            steps * batch,
            to,
            pitch,
        )


@cache
def _lanes(device: Device, precision: str, layers: int) -> Lanes:
    """The lanes of all modules of so many layers: their windows run one after the other on the device's stream."""
    return Lanes(
        Lane(device, precision, first=True),
        [Lane(device, precision, urgent=True) for _ in range(layers)],
        Lane(device, precision),
    )


def _shapes(layers: Sequence[LayerSizes]) -> dict[str, np.ndarray]:
    """Arrays of the shapes of all parameters, without memory of their own."""
    found = {}
    for k, layer in enumerate(layers):
        columns = layer.gates * layer.units
        shapes = ((layer.inputs, columns), (layer.units, columns), (columns,), (columns,), (layer.units,))
        for name, shape in zip(("w_in", "w_rec", "bias_in", "bias_rec", "threshold"), shapes, strict=True):
            found[f"layers.{k}.{name}"] = np.broadcast_to(F32(0), shape)
    return found
