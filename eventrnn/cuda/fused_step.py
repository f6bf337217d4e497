"""Single steps of networks of sparse EGRU layers: one kernel per layer, all in one graph, and an answer in host memory.

A step copies the input from pinned memory, runs the kernels, and waits until the last one has written the outputs and
the fault words to pinned memory. The state lies in two arrays that steps read and write in turn, so the state before a
step is still there after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.inputs import by_layer, copy_values
from eventrnn.cuda.kernels.single_step import FAULTY, STEP_SHARED_BYTES, STEP_WARPS, step_kernel
from eventrnn.cuda.matrix import Matrix
from eventrnn.cuda.run_buffers import Replay
from eventrnn.cuda.tables import LANES, STATUS_FIELDS

if TYPE_CHECKING:
    from eventrnn.cuda.device_network import DeviceNetwork
    from eventrnn.state import Inputs


# How often the host looks for the answer, for about 0.1 ms, before it waits in the driver, which occupies the processor
# less.
LOOKS = 2000

# Most samples of a step. Every sample reads all the weights that it needs by itself: with 64 samples of 1350 units a
# call takes as long as the graph of the kernels of a run, on an H200 (`experiments/gpu_steps.py`).
MAX_SAMPLES = 64


def fits(network: DeviceNetwork, batch: int) -> bool:
    """Whether single steps of this network have kernels of their own: numbers as inputs, EGRU cells of the released
    variant, sparse weights, no read-out, and at most `MAX_SAMPLES` samples."""
    if network.readout is not None or network.network.symbols is not None or batch > MAX_SAMPLES:
        return False
    cells = [layer.cell for layer in network.network.layers]
    matrices = [*network.w_in, *network.w_rec]
    return all(cell.thresholded and not cell.reset_first for cell in cells) and all(
        isinstance(matrix, Matrix) and matrix.sparse and matrix.width == LANES for matrix in matrices
    )


class FusedStep:
    """See `stepper.StepLoop`, whose interface it has.

    states    : two arrays as `DeviceState.flat`; `turn` is the number of the present one
    outputs   : of either state, the outputs (batch, N) of the last layer
    moved     : whether the present state is that after the last step
    arguments : per number of the state that a step reads, per layer, the arguments of its kernel
    """

    def __init__(self, network: DeviceNetwork, batch: int):
        device = network.device
        self.network, self.device, self.batch = network, device, batch
        units, inputs = network.units, network.network.layers[0].inputs
        self.x = device.empty((batch, inputs), np.float32)
        self.states = [device.empty((2, batch * sum(units)), np.float32) for _ in range(2)]
        self.outputs = [by_layer(state[1], units, batch)[-1] for state in self.states]
        # The status words, and the count of blocks that are complete.
        self.status = device.put(np.zeros(STATUS_FIELDS + 1, np.int64))
        self.host_x = pinned(device, self.x.shape, np.float32)
        self.host_output = pinned(device, (batch, units[-1]), np.float32)
        answer = pinned(device, (STATUS_FIELDS + 1,), np.int64)
        self.answer_at, self.host_status, self.complete = answer.ctypes.data, answer[:-1], answer.data[-1:]
        self.arguments = [self._arguments(turn) for turn in range(2)]
        self.turn, self.moved = 0, False
        self.replays = {
            (turn, on_host): Replay(device.queue, self._enqueuer(turn, on_host))
            for turn in range(2)
            for on_host in (True, False)
        }

    def _arguments(self, turn: int) -> list[list[int]]:
        network, units = self.network, self.network.units
        before, after = ([by_layer(row, units, self.batch) for row in self.states[k]] for k in (turn, 1 - turn))
        last, made = len(units) - 1, []
        for k, layer in enumerate(network.network.layers):
            w_in, w_rec = network.plain(network.w_in[k]), network.plain(network.w_rec[k])
            fields = {
                tables.STEP_UNITS: units[k],
                tables.STEP_INPUTS: layer.inputs,
                tables.STEP_X: (after[1][k - 1] if k else self.x).data.ptr,
                tables.STEP_Y_BEFORE: before[1][k].data.ptr,
                tables.STEP_C_BEFORE: before[0][k].data.ptr,
                tables.STEP_Y_AFTER: after[1][k].data.ptr,
                tables.STEP_C_AFTER: after[0][k].data.ptr,
                tables.STEP_THRESHOLD: network.thresholds[k].data.ptr,
                tables.STEP_IN_UNITS: w_in.units.data.ptr,
                tables.STEP_IN_ROWS: w_in.rows.data.ptr,
                tables.STEP_IN_BEGINS: w_in.begins.data.ptr,
                tables.STEP_IN_BIAS: w_in.compact_bias.data.ptr,
                tables.STEP_REC_UNITS: w_rec.units.data.ptr,
                tables.STEP_REC_ROWS: w_rec.rows.data.ptr,
                tables.STEP_REC_BEGINS: w_rec.begins.data.ptr,
                tables.STEP_REC_BIAS: w_rec.compact_bias.data.ptr,
                tables.STEP_STATUS: self.status.data.ptr,
                tables.STEP_CHECKED: int(k == 0),
                tables.STEP_OUTPUT: self.host_output.ctypes.data if k == last else 0,
                tables.STEP_ANSWER: self.answer_at if k == last else 0,
            }
            made.append([fields[field] for field in range(tables.STEP_FIELDS)])
        return made

    def _enqueuer(self, turn: int, on_host: bool):
        network, device = self.network, self.device

        def enqueue() -> None:
            if on_host:
                self._copy_input()
            for k, arguments in enumerate(self.arguments[turn]):
                layouts = [
                    tables.layout_code(tables.MASKED, network.plain(each[k]).narrow, False)
                    for each in (network.w_in, network.w_rec)
                ]
                threads, tiles = LANES * STEP_WARPS, -(-network.units[k] // LANES)
                kernel = device.kernel(
                    ("single_step", *layouts), lambda layouts=layouts: step_kernel(*layouts), threads
                )
                device.launch(kernel, (tiles, self.batch), threads, *arguments, shared=STEP_SHARED_BYTES)

        return enqueue

    def _copy_input(self) -> None:
        # CuPy's arrays refuse copies from the host during a capture, even from pinned memory.
        runtime, source = self.device.arrays.cuda.runtime, self.host_x.ctypes.data
        direction = runtime.memcpyHostToDevice
        runtime.memcpyAsync(self.x.data.ptr, source, self.x.nbytes, direction, self.device.queue.ptr)

    def start(self, flat: Any) -> None:
        """Take over a state, `DeviceState.flat`."""
        self.turn, self.moved = 0, False
        self.states[0].data.copy_from_device_async(flat.data, flat.nbytes)

    def step(self, prepared: Inputs | None) -> Any:
        """One step on `host_x`, or on inputs on the GPU, from whose output a copy there is returned."""
        self.moved, self.complete[0] = False, 0
        if prepared is not None:
            copy_values(self.device, prepared, self.x)
        self.replays[self.turn, prepared is None]()
        output, looks = None, LOOKS
        if prepared is not None:
            # The answer does not say when this copy is complete.
            output, looks = self.outputs[1 - self.turn].copy(), 0
        self._wait(looks)
        self.turn, self.moved = 1 - self.turn, True
        return output

    def _wait(self, looks: int = LOOKS) -> None:
        """Wait for the answer, or for all work on the stream if it does not come within so many looks."""
        complete = self.complete
        for _ in range(looks):
            if complete[0]:
                return
        # An error of the GPU is raised here.
        self.device.queue.synchronize()
        if not complete[0]:
            raise RuntimeError("cuda: a step ended without an answer")

    @property
    def faulty(self) -> bool:
        """Whether the last step reported a fault in `host_status`."""
        return self.complete[0] == FAULTY

    def undo(self) -> None:
        """Restore the state before the step that failed, or before the last one."""
        self.device.queue.synchronize()
        self.status.data.memset_async(0, self.status.nbytes)
        if self.moved:
            self.turn, self.moved = 1 - self.turn, False

    def flat(self) -> Any:
        """A copy of the present state, `DeviceState.flat`."""
        return self.states[self.turn].copy()


def pinned(device: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Pinned host memory, zeros at first."""
    count = int(np.prod(shape))
    memory = device.arrays.cuda.alloc_pinned_memory(max(1, count * np.dtype(dtype).itemsize))
    array = np.frombuffer(memory, dtype, count).reshape(shape)
    array[...] = 0
    return array
