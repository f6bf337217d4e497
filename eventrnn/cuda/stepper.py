"""Single steps on the GPU: everything that a step launches, captured once as a graph, with memory of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.backend import HostInputs, as_array
from eventrnn.cuda.inputs import DeviceState, check_status, copy_values, result_for
from eventrnn.cuda.run_buffers import Piece, Replay
from eventrnn.cuda.tables import STATUS_FIELDS, STATUS_INPUT
from eventrnn.state import Inputs, State, on_gpu

if TYPE_CHECKING:
    from eventrnn.cuda.engine import CudaEngine


class Loop:
    """A run of one shape, captured as a graph, and the memory that goes in and out of it.

    x      : (steps, batch, I) float32 or (steps, batch) int64
    answer : the report, counts of events included where wanted, then the output: the host can get both at once
    """

    def __init__(self, engine: CudaEngine, piece: Piece, counting: bool):
        device, network = engine.device, engine.network
        self.engine, self.piece, self.counting = engine, piece, counting
        shape = (piece.steps, piece.batch)
        if network.embedding is not None:
            self.x = device.empty(shape, np.int64)
        else:
            self.x = device.empty((*shape, network.layers[0].inputs), np.float32)
        size, words = piece.steps * piece.batch * engine.output_size, len(engine.status) if counting else STATUS_FIELDS
        self.answer = device.empty(words + -(-size // 2), np.int64)
        self.status = self.answer[:words]
        self.output = self.answer[words:].view(np.float32)[:size].reshape(*shape, engine.output_size)
        self.replay = Replay(device.queue, self._enqueue)

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self.x.nbytes + self.answer.nbytes

    def _enqueue(self) -> None:
        engine, piece = self.engine, self.piece
        self.status.data.memset_async(0, self.status.nbytes)
        piece.begin(engine.settled(piece.batch))
        table = engine.table_of(self.x, 0, piece, self.status)
        engine.enqueue(piece, *table, self.status, None, self.counting, self.output)
        if self.counting:
            engine.count_inputs(piece, self.x, self.status)


class StepLoop(Loop):
    """A single step, with host memory that the GPU copies by itself; an engine keeps one for each batch.

    before : the state before the step under way, or before the first one
    """

    def __init__(self, engine: CudaEngine, batch: int):
        device = engine.device
        super().__init__(engine, Piece(device, engine.network, engine.units, 1, batch), counting=False)
        self.before = device.empty(self.piece.state.shape, np.float32)
        self.host_x, self.host_answer = _pinned(device, self.x[0]), _pinned(device, self.answer)
        words = self.host_answer[STATUS_FIELDS:].view(np.float32)
        self.host_output = words[: self.output.size].reshape(self.output.shape[1:])

    def _enqueue(self) -> None:
        self.before.data.copy_from_device_async(self.piece.state.data, self.piece.state.nbytes)
        super()._enqueue()


class CudaStepper:
    """`backend.Stepper` on the GPU. One at a time: the engine's memory for that batch is the latest stepper's."""

    def __init__(self, engine: CudaEngine, state: State):
        self.engine, self.batch = engine, state.batch
        self.host_inputs = HostInputs(engine.network, dense=True)
        with engine.device.on_stream():
            self.loop = engine.step_loop(state.batch)
            flat = engine.flat_state(state)
            for target in (self.loop.piece.state, self.loop.before):
                target.data.copy_from_device_async(flat.data, flat.nbytes)
            engine.device.queue.synchronize()

    def __call__(self, inputs: Any) -> Any:
        """One step; see `backend.Stepper`. An array on the GPU gives one there."""
        loop = self.loop
        feed = self._fed(inputs) if on_gpu(inputs) else None
        if feed is None:
            self._take(inputs)
        loop.replay.begun = False
        try:
            output = self._step(feed)
            if loop.host_answer[:STATUS_FIELDS].any():
                self._refuse(inputs, feed)
        except BaseException:
            self._undo()
            raise
        return loop.host_output.copy() if feed is None else result_for(self.engine.device, feed, output)

    def _step(self, feed: Inputs | None) -> Any:
        """The step, with what is to stay on the GPU; the rest is in the host memory."""
        loop, queue = self.loop, self.engine.device.queue
        with self.engine.device.on_stream():
            if feed is None:
                loop.x.data.copy_from_host_async(loop.host_x.ctypes.data, loop.x.nbytes)
            else:
                copy_values(self.engine.device, feed, loop.x)
            loop.replay()
            output, nbytes = None, loop.answer.nbytes
            if feed is not None:
                output, nbytes = loop.output[0].copy(), loop.status.nbytes
            loop.answer.data.copy_to_host_async(loop.host_answer.ctypes.data, nbytes)
            queue.synchronize()
        return output

    def _undo(self) -> None:
        """Back to the state before the step under way, as far as that came."""
        state, before = self.loop.piece.state, self.loop.before
        # What was not begun has left them as they were, and `before` a step behind.
        target, source = (state, before) if self.loop.replay.begun else (before, state)
        with self.engine.device.on_stream():
            target.data.copy_from_device_async(source.data, source.nbytes)
            self.engine.device.queue.synchronize()

    def state(self) -> DeviceState:
        """A copy of the state, on the GPU."""
        engine = self.engine
        with engine.device.on_stream():
            flat = self.loop.piece.state.copy()
        return DeviceState(engine.device, flat, engine.units, self.batch)

    def _take(self, inputs: Any) -> None:
        """Bring a NumPy array of any kind to where the GPU gets it from; single numbers are looked at there."""
        target = self.loop.host_x
        if type(inputs) is not np.ndarray or inputs.dtype != target.dtype or inputs.shape != target.shape:
            prepared = self.host_inputs.prepare(as_array(inputs)[None])
            self._need_batch(prepared.batch)
            inputs = prepared.values[0]
        np.copyto(target, inputs)

    def _fed(self, inputs: Any) -> Inputs:
        feed = self.engine.gpu_inputs(inputs, step=True)
        self._need_batch(feed.batch)
        return feed

    def _need_batch(self, batch: int) -> None:
        if batch != self.batch:
            raise ValueError(f"inputs: got a batch of {batch}, but the simulator was made for {self.batch}")

    def _refuse(self, inputs: Any, feed: Inputs | None) -> None:
        """Raise for what the step found."""
        status = self.loop.host_answer[:STATUS_FIELDS]
        if feed is None and status[STATUS_INPUT]:
            self.host_inputs.prepare(as_array(inputs)[None])
        check_status(status, feed, self.state())


def _pinned(device: Any, array: Any) -> np.ndarray:
    """Host memory of that array's shape which the GPU copies by itself."""
    memory = device.arrays.cuda.alloc_pinned_memory(max(1, array.nbytes))
    return np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
