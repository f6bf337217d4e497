"""The device memory of a run, kept so that the next run of that shape allocates nothing; captured graphs."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.inputs import by_layer
from eventrnn.cuda.kernels.input_checks import dense_events_kernel, symbols_kernel
from eventrnn.cuda.tables import LANES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from eventrnn.cuda.device import Device
    from eventrnn.network import Network


# Every byte of "not sent yet" (`kernels.UNWRITTEN`).
UNWRITTEN_BYTE = 0xFF


class RunBuffers:
    """The device memory of a run of `steps` steps and `batch` samples.

    Attributes
    ----------
    records : per layer (steps + 1, batch, pitch) float32, what was sent; row 0 what was carried into the first step
    gated   : per layer the same for the paper's reset gate, else None
    state   : (2, batch * units of all layers) float32, cells and outputs; cells change as the run goes on
    cells   : per layer (batch, units), in `state`
    tables  : what launches are told, by launch
    spare   : of other engines that work on these layers, by name
    """

    def __init__(self, device: Device, network: Network, units: Sequence[int], steps: int, batch: int):
        self.device, self.units, self.steps, self.batch = device, units, steps, batch
        shapes = [(steps + 1, batch, pitch_of(n)) for n in units]
        self.event_logs = [device.empty(shape, np.float32) for shape in shapes]
        papers = [layer.cell.variant == "paper" for layer in network.layers]
        self.gated: list[Any] = [
            device.empty(shape, np.float32) if paper else None for shape, paper in zip(shapes, papers, strict=True)
        ]
        self.state = device.empty((2, batch * sum(units)), np.float32)
        self.cells, self.outputs = (by_layer(line, units, batch) for line in self.state)
        self.tables: dict[tuple, Any] = {}
        self.spare: dict[Any, Any] = {}

    @property
    def nbytes(self) -> int:
        """Of everything that is kept."""
        found = [*self.event_logs, *(each for each in self.gated if each is not None), self.state]
        return sum(each.nbytes for each in found) + sum(each.nbytes for each in self.spare.values())

    def kept(self, name: Any, shape: tuple[int, ...], dtype) -> Any:
        """Memory by that name, made where it is new."""
        if name not in self.spare:
            self.spare[name] = self.device.empty(shape, dtype)
        return self.spare[name]

    def drive(self, width: int) -> Any:
        """Of the first layer's input: (rows, width)."""
        return self.kept("drive", (self.steps * self.batch, width), np.float32)

    def lists(self, name: str, capacity: int) -> tuple[Any, Any, Any]:
        """Lists of events, of every row: where each begins, how many it has, and they."""
        rows = self.steps * self.batch
        parts = (("firsts", rows, np.int64), ("counts", rows, np.int32), ("entries", rows * capacity, np.int64))
        first, count, entries = (self.kept((name, part), (size,), dtype) for part, size, dtype in parts)
        return first, count, entries

    def found(self, x: Any, row_0: int, status: Any) -> tuple[Any, Any, Any]:
        """Lists of the events of dense rows (steps, batch, I); the first is row `row_0` of the whole input."""
        device, size, rows = self.device, x.shape[2], self.steps * self.batch
        table = self.lists("input", size + LANES)
        # Few rows are each looked through by as many warps as there can be.
        threads = 256 if rows > 2 * device.multiprocessors or size <= 256 else 1024
        device.launch(
            device.kernel(("dense_events",), dense_events_kernel, threads), rows, threads,
            x.data.ptr, size, row_0, *(each.data.ptr for each in table), size + LANES, status.data.ptr, shared=128,
        )  # fmt: skip
        return table

    def checked_rows(self, symbols: Any, row_0: int, known: int, status: Any) -> Any:
        """(rows,) of the event table, from symbols (steps, batch) of which so many are known."""
        device, rows = self.device, self.steps * self.batch
        checked = self.kept("rows", (rows,), np.int64)
        device.launch(
            device.kernel(("symbols",), symbols_kernel, 128), -(-rows // 128), 128,
            symbols.data.ptr, rows, row_0, known, checked.data.ptr, status.data.ptr,
        )  # fmt: skip
        return checked

    def sent(self, n: int) -> Any:
        """What layer n sent, (steps, batch, units), as it lies."""
        return self.event_logs[n][1:, :, : self.units[n]]

    def start(self, flat: Any) -> None:
        """Take that state."""
        if flat is not self.state:
            self.state.data.copy_from_device_async(flat.data, self.state.nbytes)

    def begin(self, settled: Sequence[int] = ()) -> None:
        """From its state on, nothing is sent yet. Records of the layers `settled` are left as they are."""
        for n, units in enumerate(self.units):
            for each in (self.event_logs[n], self.gated[n]):
                if each is not None and n not in settled:
                    each.data.memset_async(UNWRITTEN_BYTE, each.nbytes)
            copy_rows(self.device, self.event_logs[n], pitch_of(units), self.outputs[n], units, units, self.batch)

    def end(self, sent: Any = None) -> None:
        """The last step's outputs are the state's; the last layer's are in `sent`, where that is given."""
        for n, units in enumerate(self.units):
            event_log = self.event_logs[n][1:] if sent is None or n + 1 < len(self.units) else sent
            copy_rows(
                self.device, self.outputs[n], units, event_log[self.steps - 1 :], event_log.shape[2], units, self.batch
            )


def pitch_of(units: int) -> int:
    """From one row of a record to the next: whole cache lines."""
    return -(-units // LANES) * LANES


def copy_rows(
    device: Device, target: Any, target_pitch: int, source: Any, source_pitch: int, width: int, rows: int
) -> None:
    """Rows of float32 from one array on the device to another, on CuPy's current stream; pitches in numbers."""
    if rows == 0:
        return
    cuda = device.arrays.cuda
    runtime = cuda.runtime
    runtime.memcpy2DAsync(
        target.data.ptr, 4 * target_pitch, source.data.ptr, 4 * source_pitch, 4 * width, rows,
        runtime.memcpyDeviceToDevice, cuda.get_current_stream().ptr,
    )  # fmt: skip


class Replay:
    """Work on a stream, always the same: done at its first run, captured as a graph at the second, replayed then.

    What it launches must read nothing but memory that stays. After an exception it starts over.

    begun : set where a call may have put work on the stream; who asks clears it before
    """

    def __init__(self, queue: Any, enqueue: Callable[[], None]):
        self.queue, self.enqueue = queue, enqueue
        self.runs, self.graph, self.begun = 0, None, False

    def __call__(self) -> None:
        """Put it on the stream once."""
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
        """The work as a graph. A capture that an exception cut short is ended, and what it has is dropped."""
        try:
            self.queue.begin_capture()
            self.enqueue()
        except BaseException:
            # What a broken capture says of itself must not hide why it broke.
            with suppress(Exception):
                self.queue.end_capture()
            raise
        return self.queue.end_capture()
