"""Single steps on the GPU: everything that a step launches, captured once as a graph, with memory of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.backend import State, on_gpu
from eventrnn.cuda.arrays import DeviceFeed, DeviceState, check_report
from eventrnn.cuda.piece import Piece, Replay
from eventrnn.cuda.tables import REPORT_FIELDS, REPORT_INPUT

if TYPE_CHECKING:
    from eventrnn.cuda.engine import CudaEngine


class StepMemory:
    """What the steps of so many samples work in; an engine keeps one for each batch.

    x      : (batch, I) float32 or (batch,) int64
    answer : the report, then the output, so that the host gets both at once
    before : the state before the step under way
    """

    def __init__(self, engine: CudaEngine, batch: int):
        device, network = engine.device, engine.network
        self.engine, self.piece = engine, Piece(device, network, engine.units, 1, batch)
        symbols = network.embedding is not None
        self.x = device.empty((batch,) if symbols else (batch, network.layers[0].inputs), np.int64 if symbols else "f4")
        self.before = device.empty(self.piece.state.shape, np.float32)
        size = batch * engine.output_size
        self.answer = device.empty(REPORT_FIELDS + -(-size // 2), np.int64)
        self.report = self.answer[:REPORT_FIELDS]
        self.output = self.answer[REPORT_FIELDS:].view(np.float32)[:size].reshape(1, batch, engine.output_size)
        self.host_x, self.host_answer = (_pinned(device, each) for each in (self.x, self.answer))
        self.host_output = self.host_answer[REPORT_FIELDS:].view(np.float32)[:size].reshape(batch, engine.output_size)
        self.replay = Replay(device.queue, self._enqueue)

    def _enqueue(self) -> None:
        engine, piece = self.engine, self.piece
        self.before.data.copy_from_device_async(piece.state.data, piece.state.nbytes)
        self.report.data.memset_async(0, self.report.nbytes)
        piece.begin(piece.state)
        if self.x.ndim == 1:
            table, row_of = engine.feed_table(engine.no_input), engine.row_of(self.x, 0, piece, self.report)
        else:
            table, row_of = engine.found(self.x, 0, piece, self.report), None
        engine.enqueue(piece, table, row_of, self.report, None)
        engine.read_out(piece, self.output)


class CudaStepper:
    """`backend.Stepper` on the GPU. One at a time: the engine's memory for that batch is the latest stepper's."""

    def __init__(self, engine: CudaEngine, state: State):
        self.engine, self.batch = engine, state.batch
        with engine.device.on_stream():
            self.memory = engine.step_memory(state.batch)
            flat = engine.flat_state(state)
            self.memory.piece.state.data.copy_from_device_async(flat.data, flat.nbytes)
            engine.device.queue.synchronize()

    def __call__(self, inputs: Any) -> Any:
        """One step; see `backend.Stepper`. An array on the GPU gives one there."""
        engine, memory = self.engine, self.memory
        feed = self._fed(inputs) if on_gpu(inputs) else None
        if feed is None:
            self._take(inputs)
        with engine.device.on_stream():
            if feed is None:
                memory.x.data.copy_from_host_async(memory.host_x.ctypes.data, memory.x.nbytes)
            else:
                memory.x.data.copy_from_device_async(feed.x.data, memory.x.nbytes)
            memory.replay()
            output, nbytes = None, memory.answer.nbytes
            if feed is not None:
                output, nbytes = memory.output[0].copy(), memory.report.nbytes
            memory.answer.data.copy_to_host_async(memory.host_answer.ctypes.data, nbytes)
            engine.device.queue.synchronize()
        if memory.host_answer[:REPORT_FIELDS].any():
            self._refuse(inputs, feed)
        return memory.host_output.copy() if feed is None else feed.give(output)

    def state(self) -> DeviceState:
        """A copy of the state, on the GPU."""
        engine = self.engine
        with engine.device.on_stream():
            flat = self.memory.piece.state.copy()
        return DeviceState(engine.device, flat, engine.units, self.batch)

    def _take(self, inputs: Any) -> None:
        """Bring a NumPy array of any kind to where the GPU gets it from; single numbers are looked at there."""
        target = self.memory.host_x
        if type(inputs) is not np.ndarray or inputs.dtype != target.dtype or inputs.shape != target.shape:
            fed = self.engine.network.feed(np.asarray(inputs)[None])
            self._need_batch(fed.batch)
            inputs = fed.row_of if target.ndim == 1 else fed.events().to_dense()[0]
        np.copyto(target, inputs)

    def _fed(self, inputs: Any) -> DeviceFeed:
        feed = self.engine.device_feed(inputs, step=True)
        self._need_batch(feed.batch)
        return feed

    def _need_batch(self, batch: int) -> None:
        if batch != self.batch:
            raise ValueError(f"inputs: got a batch of {batch}, but the simulator was made for {self.batch}")

    def _refuse(self, inputs: Any, feed: DeviceFeed | None) -> None:
        """Say what the step found; the state goes back to before."""
        engine, memory = self.engine, self.memory
        left, report = self.state(), memory.host_answer[:REPORT_FIELDS].copy()
        with engine.device.on_stream():
            memory.piece.state.data.copy_from_device_async(memory.before.data, memory.before.nbytes)
            engine.device.queue.synchronize()
        if feed is None and report[REPORT_INPUT]:
            engine.network.feed(np.asarray(inputs)[None])
        check_report(report, feed or engine.no_input, left)


def _pinned(device: Any, array: Any) -> np.ndarray:
    """Host memory of that array's shape which the GPU copies by itself."""
    memory = device.arrays.cuda.alloc_pinned_memory(max(1, array.nbytes))
    return np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
