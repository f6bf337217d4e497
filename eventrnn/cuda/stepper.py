"""Single steps on the GPU: all the work of a step, captured once as a graph, with memory of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from eventrnn.backend import HostInputs, as_array
from eventrnn.cuda.fused_step import FusedStep, pinned
from eventrnn.cuda.inputs import DeviceState, check_status, copy_values, result_for
from eventrnn.cuda.run import CapturedRun, Run
from eventrnn.cuda.tables import STATUS_FIELDS, STATUS_INPUT
from eventrnn.state import Inputs, on_gpu


class StepLoop(CapturedRun):
    """A run of a single step, for every network; `fused_step.FusedStep` serves some networks faster.

    before      : the state before the step under way, or before the first one
    host_x      : (batch, I) float32 or (batch,) int64, pinned
    host_answer : the answer, pinned: `host_status`, the status words, and `host_output`, (batch, V or N)
    """

    def __init__(self, run: Run):
        super().__init__(run, counting=False)
        self.network, self.device, self.batch = run.network, run.device, run.batch
        self.before = run.device.empty(run.buffers.state.shape, np.float32)
        self.host_x = pinned(run.device, self.x.shape[1:], self.x.dtype)
        self.host_answer = pinned(run.device, self.answer.shape, self.answer.dtype)
        self.host_status, words = np.split(self.host_answer, [STATUS_FIELDS])
        self.host_output = words.view(np.float32)[: self.output.size].reshape(self.output.shape[1:])

    def _enqueue(self) -> None:
        state = self.run.buffers.state
        self.before.data.copy_from_device_async(state.data, state.nbytes)
        super()._enqueue()

    def start(self, flat: Any) -> None:
        """Take over a state, `DeviceState.flat`."""
        for target in (self.run.buffers.state, self.before):
            target.data.copy_from_device_async(flat.data, flat.nbytes)

    def step(self, prepared: Inputs | None) -> Any:
        """One step on `host_x`, or on inputs on the GPU, from whose output a copy there is returned."""
        self.replay.begun = False
        if prepared is None:
            self.x.data.copy_from_host_async(self.host_x.ctypes.data, self.x.nbytes)
        else:
            copy_values(self.device, prepared, self.x)
        self.replay()
        output, nbytes = None, self.answer.nbytes
        if prepared is not None:
            output, nbytes = self.output[0].copy(), self.status.nbytes
        self.answer.data.copy_to_host_async(self.host_answer.ctypes.data, nbytes)
        self.device.queue.synchronize()
        return output

    @property
    def faulty(self) -> bool:
        """Whether the last step reported a fault in `host_status`."""
        return bool(self.host_status.any())

    def undo(self) -> None:
        """Restore the state before the step that failed, or before the last one."""
        state, before = self.run.buffers.state, self.before
        # A step that never began left the state unchanged, and `before` still holds the one before the last step.
        target, source = (state, before) if self.replay.begun else (before, state)
        target.data.copy_from_device_async(source.data, source.nbytes)
        self.device.queue.synchronize()

    def flat(self) -> Any:
        """A copy of the present state, `DeviceState.flat`."""
        return self.run.buffers.state.copy()


class CudaStepper:
    """`backend.Stepper` on the GPU. The memory of a batch size belongs to the latest stepper of that size.

    loop       : the captured step
    flat       : the state to start from, on the device (`DeviceState.flat`)
    gpu_inputs : prepares the inputs of a single step that lie on the GPU; takes them and True
    """

    def __init__(self, loop: StepLoop | FusedStep, flat: Any, gpu_inputs: Callable[[Any, bool], Inputs]):
        self.loop, self.batch, self.gpu_inputs, self.steps = loop, loop.batch, gpu_inputs, 0
        self.device, self.network = loop.device, loop.network
        self.host_inputs = HostInputs(self.network.network, dense=True, whole=True)
        with self.device.on_stream():
            loop.start(flat)
            self.device.queue.synchronize()

    def __call__(self, inputs: Any) -> Any:
        """One step; see `backend.Stepper`. Inputs on the GPU give an output on the GPU."""
        loop = self.loop
        prepared = self._on_gpu(inputs) if on_gpu(inputs) else None
        if prepared is None:
            self._take(inputs)
        try:
            with self.device.on_stream():
                output = loop.step(prepared)
            if loop.faulty:
                self._refuse(inputs, prepared)
            result = loop.host_output.copy() if prepared is None else result_for(self.device, prepared, output)
        except BaseException:
            self._undo()
            raise
        self.steps += 1
        return result

    def _undo(self) -> None:
        with self.device.on_stream():
            self.loop.undo()

    def take_back(self) -> None:
        """See `backend.Stepper`."""
        self._undo()
        self.steps -= 1

    def state(self) -> DeviceState:
        """A copy of the state, on the GPU."""
        with self.device.on_stream():
            flat = self.loop.flat()
        network = self.network
        return DeviceState(self.device, flat, network.units, self.batch, network.network.shared_gates())

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
        status = self.loop.host_status
        if prepared is None and status[STATUS_INPUT]:
            self.host_inputs.prepare(as_array(inputs)[None])
        check_status(status, prepared, self.state(), self.network.names)
