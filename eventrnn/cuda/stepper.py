"""Single steps on the GPU: all the work of a step, captured once as a graph, with memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eventrnn.backend import HostInputs, as_array
from eventrnn.cuda.inputs import DeviceState, check_status, copy_values, result_for
from eventrnn.cuda.run import CapturedRun, Run
from eventrnn.cuda.tables import STATUS_FIELDS, STATUS_INPUT
from eventrnn.state import Inputs, on_gpu


class StepLoop(CapturedRun):
    """A run of a single step, with pinned host memory for its inputs and its answer.

    before      : the state before the step under way, or before the first one
    host_x      : (batch, I) float32 or (batch,) int64, pinned
    host_answer : the answer, pinned; `host_output` is its output as (batch, V or N)
    """

    def __init__(self, run: Run):
        super().__init__(run, counting=False)
        self.before = run.device.empty(run.buffers.state.shape, np.float32)
        self.host_x, self.host_answer = _pinned(run.device, self.x[0]), _pinned(run.device, self.answer)
        words = self.host_answer[STATUS_FIELDS:].view(np.float32)
        self.host_output = words[: self.output.size].reshape(self.output.shape[1:])

    def _enqueue(self) -> None:
        state = self.run.buffers.state
        self.before.data.copy_from_device_async(state.data, state.nbytes)
        super()._enqueue()


class CudaStepper:
    """`backend.Stepper` on the GPU. The memory of a batch size belongs to the latest stepper of that size.

    loop       : the captured step
    flat       : the state to start from, on the device (`DeviceState.flat`)
    gpu_inputs : prepares the inputs of a single step that lie on the GPU; takes them and True
    """

    def __init__(self, loop: StepLoop, flat: Any, gpu_inputs: Callable[[Any, bool], Inputs]):
        self.loop, self.batch, self.gpu_inputs, self.steps = loop, loop.run.batch, gpu_inputs, 0
        self.device, self.network = loop.run.device, loop.run.network
        self.host_inputs = HostInputs(self.network.network, dense=True, whole=True)
        with self.device.on_stream():
            for target in (loop.run.buffers.state, loop.before):
                target.data.copy_from_device_async(flat.data, flat.nbytes)
            self.device.queue.synchronize()

    def __call__(self, inputs: Any) -> Any:
        """One step; see `backend.Stepper`. Inputs on the GPU give an output on the GPU."""
        loop = self.loop
        prepared = self._on_gpu(inputs) if on_gpu(inputs) else None
        if prepared is None:
            self._take(inputs)
        loop.replay.begun = False
        try:
            output = self._step(prepared)
            if loop.host_answer[:STATUS_FIELDS].any():
                self._refuse(inputs, prepared)
            result = loop.host_output.copy() if prepared is None else result_for(self.device, prepared, output)
        except BaseException:
            self._undo()
            raise
        self.steps += 1
        return result

    def _step(self, prepared: Inputs | None) -> Any:
        """Put the step on the stream and wait. Returns the output on the GPU for inputs there, else None."""
        loop, queue = self.loop, self.device.queue
        with self.device.on_stream():
            if prepared is None:
                loop.x.data.copy_from_host_async(loop.host_x.ctypes.data, loop.x.nbytes)
            else:
                copy_values(self.device, prepared, loop.x)
            loop.replay()
            output, nbytes = None, loop.answer.nbytes
            if prepared is not None:
                output, nbytes = loop.output[0].copy(), loop.status.nbytes
            loop.answer.data.copy_to_host_async(loop.host_answer.ctypes.data, nbytes)
            queue.synchronize()
        return output

    def _undo(self) -> None:
        """Restore the state before the step that failed."""
        state, before = self.loop.run.buffers.state, self.loop.before
        # A step that never began left the state unchanged, and `before` still holds the one before the last step.
        target, source = (state, before) if self.loop.replay.begun else (before, state)
        with self.device.on_stream():
            target.data.copy_from_device_async(source.data, source.nbytes)
            self.device.queue.synchronize()

    def take_back(self) -> None:
        """See `backend.Stepper`."""
        self._undo()
        self.steps -= 1

    def state(self) -> DeviceState:
        """A copy of the state, on the GPU."""
        with self.device.on_stream():
            flat = self.loop.run.buffers.state.copy()
        return DeviceState(self.device, flat, self.network.units, self.batch)

    def _take(self, inputs: Any) -> None:
        """Copy host inputs to pinned memory; the GPU checks single numbers."""
        target = self.loop.host_x
        if type(inputs) is not np.ndarray or inputs.dtype != target.dtype or inputs.shape != target.shape:
            prepared = self.host_inputs.prepare(as_array(inputs)[None])
            self._need_batch(prepared.batch)
            inputs = prepared.values[0]
        np.copyto(target, inputs)

    def _on_gpu(self, inputs: Any) -> Inputs:
        prepared = self.gpu_inputs(inputs, True)
        self._need_batch(prepared.batch)
        return prepared

    def _need_batch(self, batch: int) -> None:
        if batch != self.batch:
            raise ValueError(f"inputs: got a batch of {batch}, but the simulator was made for {self.batch}")

    def _refuse(self, inputs: Any, prepared: Inputs | None) -> None:
        """Raise for the faults in the status words of the step."""
        status = self.loop.host_answer[:STATUS_FIELDS]
        if prepared is None and status[STATUS_INPUT]:
            self.host_inputs.prepare(as_array(inputs)[None])
        check_status(status, prepared, self.state(), self.network.names)


def _pinned(device: Any, array: Any) -> np.ndarray:
    """Pinned host memory of the shape and dtype of an array on the device."""
    memory = device.arrays.cuda.alloc_pinned_memory(max(1, array.nbytes))
    return np.frombuffer(memory, array.dtype, array.size).reshape(array.shape)
