"""The device memory of a run, kept so that the next run of that shape allocates nothing; captured graphs."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.inputs import by_layer, held_gates
from eventrnn.cuda.kernels.input_checks import dense_events_kernel, symbols_kernel
from eventrnn.cuda.tables import LANES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eventrnn.cuda.device import Device
    from eventrnn.network import Network


# Every byte of a word that is not yet written (`kernels.persistent.UNWRITTEN`).
UNWRITTEN_BYTE = 0xFF


class RunBuffers:
    """The device memory of a run of `steps` steps and `batch` samples.

    Attributes
    ----------
    event_logs : per layer (steps + 1, batch, pitch) float32; row 0 holds the outputs before the run, row t + 1 those of
                 step t
    gated      : per layer the same for r * y, where the reset gate comes first; None for other cells
    state      : `DeviceState.flat`: cells and outputs, and gates that steps share; the kernels update cells and gates
    cells      : per layer (batch, units), views of `state`
    outputs    : per layer (batch, units), views of `state`
    held       : by matrix whose choices some steps share, its gates and further steps, views of `state`
    held_before : the same before the work that is under way
    tables     : the layer tables of launches, by launch (`tables.LAYER_FIELDS`); graphs of tensor-core layers
    scratch_arrays : by name, further arrays that launches of this run work in
    """

    def __init__(self, device: Device, network: Network, units: Sequence[int], steps: int, batch: int):
        self.device, self.units, self.steps, self.batch = device, units, steps, batch
        shapes = [(steps + 1, batch, pitch_of(n)) for n in units]
        self.event_logs = [device.empty(shape, np.float32) for shape in shapes]
        first = [layer.cell.reset_first for layer in network.layers]
        self.gated: list[Any] = [
            device.empty(shape, np.float32) if reset else None for shape, reset in zip(shapes, first, strict=True)
        ]
        shared = network.shared_gates()
        held = batch * sum(blocks for blocks, _ in shared.values())
        self.state = device.empty((2, batch * sum(units) + held), np.float32)
        self.cells, self.outputs = (by_layer(line, units, batch) for line in self.state)
        self.held = held_gates(self.state, units, shared, batch)
        self.held_before = {
            name: (device.empty(gates.shape, np.float32), device.empty(left.shape, np.int32))
            for name, (gates, left) in self.held.items()
        }
        self.tables: dict[tuple, Any] = {}
        self.scratch_arrays: dict[Any, Any] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = [*self.event_logs, *self.gated, self.state, *self.scratch_arrays.values()]
        return sum(each.nbytes for each in arrays if each is not None)

    def scratch(self, name: Any, shape: tuple[int, ...], dtype) -> Any:
        """The array of that name, kept for the next run; allocated at the first call."""
        if name not in self.scratch_arrays:
            self.scratch_arrays[name] = self.device.empty(shape, dtype)
        return self.scratch_arrays[name]

    def drive(self, k: int, width: int) -> Any:
        """The input drives of layer k, (steps * batch, width) float32."""
        return self.scratch(("input drives", k), (self.steps * self.batch, width), np.float32)

    def list_arrays(self, name: str, capacity: int) -> tuple[Any, Any, Any]:
        """Memory of an event list set with one list per row (`kernels/batched_products.py`): begins, counts, events."""
        rows = self.steps * self.batch
        begins = self.scratch((name, "begins"), (rows,), np.int64)
        counts = self.scratch((name, "counts"), (rows,), np.int32)
        return begins, counts, self.scratch((name, "events"), (rows * capacity,), np.int64)

    def event_lists(self, x: Any, row_0: int, status: Any) -> tuple[Any, Any, Any]:
        """The event lists of dense rows x (steps, batch, I); their first is row `row_0` of the whole input."""
        device, size, rows = self.device, x.shape[2], self.steps * self.batch
        table = self.list_arrays("input", size + LANES)
        # With few rows, more warps per row use more of the GPU.
        threads = 256 if rows > 2 * device.multiprocessors or size <= 256 else 1024
        kernel = device.kernel(("dense_events",), dense_events_kernel, threads)
        lists = (each.data.ptr for each in table)
        arguments = x.data.ptr, size, row_0, *lists, size + LANES, status.data.ptr
        device.launch(kernel, rows, threads, *arguments, shared=128)
        return table

    def checked_rows(self, symbols: Any, row_0: int, known: int, status: Any) -> Any:
        """The row of the embedding for each of the symbols (steps, batch) int64: (steps * batch,) int64.

        row_0 : the row of the whole input at which `symbols` begins
        known : the number of symbols that exist; the status words get the first one beyond
        """
        device, rows = self.device, self.steps * self.batch
        checked = self.scratch("rows", (rows,), np.int64)
        arguments = symbols.data.ptr, rows, row_0, known, checked.data.ptr, status.data.ptr
        device.launch(device.kernel(("symbols",), symbols_kernel, 128), -(-rows // 128), 128, *arguments)
        return checked

    def hold(self, name: str) -> tuple[int, int, int, int]:
        """Copy the gates that a matrix holds. Returns the addresses of the copies, and of what gets the new ones.

        Blocks of a kernel may read the gates before the run when others write those after it.
        """
        if name not in self.held:
            return 0, 0, 0, 0
        now, before = self.held[name], self.held_before[name]
        for target, source in zip(before, now, strict=True):
            target.data.copy_from_device_async(source.data, target.nbytes)
        gates, left, new_gates, new_left = (each.data.ptr for each in (*before, *now))
        return gates, left, new_gates, new_left

    def sent(self, k: int) -> Any:
        """The outputs of layer k, (steps, batch, units): a view of its event log."""
        return self.event_logs[k][1:, :, : self.units[k]]

    def start(self, flat: Any) -> None:
        """Copy the state before the run (`DeviceState.flat`)."""
        if flat is not self.state:
            self.state.data.copy_from_device_async(flat.data, self.state.nbytes)

    def begin(self, untracked_layers: Sequence[int] = ()) -> None:
        """Mark all words of the event logs as not yet written, but row 0, which gets the outputs of the state.

        The logs of `untracked_layers` are not marked, because no kernel polls them.
        """
        for k, units in enumerate(self.units):
            for each in (self.event_logs[k], self.gated[k]):
                if each is not None and k not in untracked_layers:
                    each.data.memset_async(UNWRITTEN_BYTE, each.nbytes)
            copy_rows(self.device, self.event_logs[k], pitch_of(units), self.outputs[k], units, units, self.batch)

    def end(self, last_outputs: Any = None) -> None:
        """Copy the outputs of the last step to the state.

        last_outputs : (steps, batch, units) outputs of the last layer where they are not in its event log
        """
        for k, units in enumerate(self.units):
            last = k + 1 == len(self.units)
            event_log = last_outputs if last and last_outputs is not None else self.event_logs[k][1:]
            final = event_log[self.steps - 1 :]
            copy_rows(self.device, self.outputs[k], units, final, event_log.shape[2], units, self.batch)


def pitch_of(units: int) -> int:
    """float32 from one row of an event log to the next: whole cache lines."""
    return -(-units // LANES) * LANES


def copy_rows(
    device: Device, target: Any, target_pitch: int, source: Any, source_pitch: int, width: int, rows: int
) -> None:
    """Copy `rows` rows of `width` float32 on the device, on CuPy's current stream. Pitches count float32."""
    if rows == 0:
        return
    cuda = device.arrays.cuda
    arrays = target.data.ptr, 4 * target_pitch, source.data.ptr, 4 * source_pitch
    direction, stream = cuda.runtime.memcpyDeviceToDevice, cuda.get_current_stream().ptr
    cuda.runtime.memcpy2DAsync(*arrays, 4 * width, rows, direction, stream)


class Replay:
    """The same work on a stream again and again: enqueued at the first call, captured at the second, then replayed.

    The work must use no memory that may be freed between calls. After an exception the next call enqueues again.

    begun : True once a call may have put work on the stream; callers set it to False before a call
    """

    def __init__(self, queue: Any, enqueue: Callable[[], None]):
        self.queue, self.enqueue = queue, enqueue
        self.runs, self.graph, self.begun = 0, None, False

    def __call__(self) -> None:
        """Put the work on the stream once."""
        try:
            self._put()
        except BaseException:
            self.runs, self.graph = 0, None
            raise

    def _put(self) -> None:
        self.runs += 1
        if self.runs == 1 or self.queue.is_capturing():
            self.begun = True
            self.enqueue()
            return
        if self.graph is None:
            self.graph = self._captured()
        self.begun = True
        self.graph.launch(self.queue)

    def _captured(self) -> Any:
        """The work as a graph. If it raises, the capture is ended and its graph dropped."""
        try:
            self.queue.begin_capture()
            self.enqueue()
        except BaseException:
            # An error at the end of the broken capture must not hide the reason.
            with suppress(Exception):
                self.queue.end_capture()
            raise
        return self.queue.end_capture()
