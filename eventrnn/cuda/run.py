"""One run on the GPU: its memory, the work that it puts on the stream, and the graph that repeats this work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.gated_layer import GatedPlan
from eventrnn.cuda.gated_matrix import GatedMatrix
from eventrnn.cuda.kernels.batched_products import count_events_kernel, count_threads, log_events_kernel
from eventrnn.cuda.kernels.input_checks import finite_kernel
from eventrnn.cuda.launch import launch_layers
from eventrnn.cuda.matrix import Matrix
from eventrnn.cuda.row_tiles import MIN_TILED_ROWS
from eventrnn.cuda.run_buffers import Replay, RunBuffers, copy_rows, pitch_of
from eventrnn.cuda.tables import LANES, STATUS_FIELDS
from eventrnn.weights import MatrixId

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.cuda.device_network import DeviceNetwork
    from eventrnn.events import Events


class EventLists:
    """Events of the host as lists on the device, for the kernels of the first layer. The latest ones are kept."""

    def __init__(self, device: Device):
        self.device = device
        self._latest: tuple[np.ndarray, tuple[Any, Any, Any]] | None = None

    def of(self, events: Events) -> tuple[Any, Any, Any]:
        """Per row where its list begins (int64) and its length (int32), and the entries (int64) of all lists."""
        if self._latest is None or self._latest[0] is not events.indices:
            counts = np.diff(events.indptr)
            begins = events.indptr[:-1] + tables.LIST_PAD * np.arange(len(counts))
            at = np.arange(len(events.indices)) + np.repeat(begins - events.indptr[:-1], counts)
            entries = np.zeros((len(events.indices) + tables.LIST_PAD * (len(counts) + 1), 2), np.int32)
            entries[at, 0], entries[at, 1] = events.indices, events.values.view(np.int32)
            arrays = (begins.astype(np.int64), counts.astype(np.int32), entries.view(np.int64).ravel())
            begins, counts, entries = map(self.device.put, arrays)
            self._latest = (events.indices, (begins, counts, entries))
        return self._latest[1]


class Run:
    """A run of `steps` steps and `batch` samples, kept so that the next run of that shape allocates nothing.

    symbol_events : the events of each symbol; None for a network that reads numbers
    tensor_layers : the layers that go through tensor cores
    captured      : the whole run as a graph, once `CapturedRun` has been made for it
    """

    def __init__(
        self,
        network: DeviceNetwork,
        lists: EventLists,
        symbol_events: Events | None,
        steps: int,
        batch: int,
        tensor_layers: tuple[int, ...],
    ):
        self.network, self.device, self.lists, self.symbol_events = network, network.device, lists, symbol_events
        self.steps, self.batch, self.tensor_layers = steps, batch, tensor_layers
        self.buffers = RunBuffers(network.device, network.network, network.units, steps, batch)
        self.captured: CapturedRun | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the run keeps."""
        return self.buffers.nbytes + (0 if self.captured is None else self.captured.nbytes)

    @property
    def untracked_layers(self) -> tuple[int, ...]:
        """Layers whose event log no kernel polls: tensor-core layers, except below a layer that goes by events."""
        last = len(self.network.units)
        return tuple(k for k in self.tensor_layers if k + 1 in (*self.tensor_layers, last))

    def begin(self) -> None:
        """Mark every event as not yet written, from the state in the buffers on."""
        self.buffers.begin(self.untracked_layers)

    def event_lists(self, x: Any, row_0: int, status: Any) -> tuple[Any, Any]:
        """The input's event lists, and the list that each row reads; None where each row reads its own.

        x      : (steps, batch, I) float32 or (steps, batch) int64 on the device; checked here
        row_0  : the row of the whole input at which x begins
        status : the status words that get the first bad number or symbol
        """
        if self.symbol_events is not None:
            known = self.symbol_events.shape[0]
            return self.lists.of(self.symbol_events), self.buffers.checked_rows(x, row_0, known, status)
        return self.buffers.event_lists(x, row_0, status), None

    def enqueue(self, table: Any, row_of: Any, status: Any, after: Any, counting: bool, out: Any = None) -> None:
        """Put all layers on the stream.

        table, row_of : the input's event lists, as `event_lists` gives them
        status        : the status words; with `counting`, the events of every layer are added to them
        after         : per layer (steps, batch, N) for the cells after each step, or None
        out           : (steps, batch, V or N) for the output, or None
        """
        network, device, buffers = self.network, self.device, self.buffers
        units, rows = network.units, self.steps * self.batch
        last = len(units) - 1
        # The last layer's outputs need no event log where they are the output themselves.
        direct = out is not None and network.readout is None and last in self.tensor_layers
        launches, plans = (
            network.launches(self.batch, self.tensor_layers),
            network.plans(self.batch, self.tensor_layers),
        )
        for layers, each in zip(launches, plans, strict=True):
            k = layers.start
            if each is not None:
                drive = self._drive(k, table, row_of, status) if network.drives_first(k, self.batch) else None
                loop = network.loop(k, self.batch)
                if loop is not None:
                    loop.enqueue(buffers, k, drive, after[k] if after else None, status)
                else:
                    assert not isinstance(each, GatedPlan)
                    launch_layers(network, layers, each, buffers, drive, status, after)
                continue
            layer, counts = network.tensors[k], status[network.counts_from(k) :].data.ptr if counting else 0
            assert layer is not None
            to: Any = out if direct and k == last else buffers.event_logs[k][1:]
            sent = to.data.ptr, to.shape[2]
            layer.enqueue(buffers, k, table, row_of, after[k] if after else None, sent, counts, status)
        cells = self.batch * sum(units)
        kernel = device.kernel(("finite",), finite_kernel, 256)
        device.launch(kernel, -(-cells // 256), 256, buffers.state.data.ptr, cells, status.data.ptr)
        buffers.end(out if direct else None)
        if out is not None and not direct:
            self.read_out(out, status)
        for k in range(len(units)) if counting else ():
            if k not in self.tensor_layers:
                counts = status[network.counts_from(k) :]
                self._count(buffers.event_logs[k][1:], pitch_of(units[k]), units[k], rows, counts)

    def _products(self, name: MatrixId, matrix: Any, table: Any, rows: int, row_of: Any, out: Any, status: Any) -> Any:
        """Put the products of a matrix with rows of events on the stream; see `Matrix.products`."""

        def scratch(part: str, shape: tuple[int, ...], dtype: type) -> Any:
            return self.buffers.scratch((name, part), shape, dtype)

        if isinstance(matrix, Matrix) and matrix.tiled and rows >= MIN_TILED_ROWS:
            matrix.tiles.products((*(each.data.ptr for each in table), 0), rows, out, scratch)
            return out
        own: dict[str, Any] = {"scratch": scratch} if isinstance(matrix, GatedMatrix) else {}
        if name in self.buffers.held:
            own |= {"batch": self.batch, "held": self.buffers.hold(name)}
        return matrix.products(self.device, table, rows, row_of, out=out, status=status, **own)

    def _drive(self, k: int, table: Any, row_of: Any, status: Any) -> Any:
        """Put the input drives of layer k for all steps on the stream: (steps * batch, gates * units) float32.

        table, row_of : the event lists of the input, which layer 0 reads
        """
        network, rows = self.network, self.steps * self.batch
        out = self.buffers.drive(k, network.gates[k] * network.units[k])
        if k:
            table, row_of = self._sent_lists(k - 1), None
        return self._products(MatrixId.of(k, "w_in"), network.w_in[k], table, rows, row_of, out, status)

    def _sent_lists(self, k: int) -> tuple[Any, Any, Any]:
        """Put the event lists of the outputs of layer k on the stream."""
        device, buffers, pitch = self.device, self.buffers, pitch_of(self.network.units[k])
        rows, event_log = self.steps * self.batch, self.buffers.event_logs[k][1:]
        # The lists of one layer have been read when those of another one are written.
        table = buffers.list_arrays("output", max(map(pitch_of, self.network.units)) + LANES)
        kernel, addresses = device.kernel(("log_events",), log_events_kernel, 256), [each.data.ptr for each in table]
        arguments = event_log.data.ptr, pitch, self.network.units[k], rows, *addresses, pitch + LANES
        device.launch(kernel, -(-rows // 8), 256, *arguments)
        return table

    def read_out(self, out: Any, status: Any) -> None:
        """Put the output (steps, batch, V or N) on the stream, from the event log of the last layer."""
        network, device, buffers = self.network, self.device, self.buffers
        units, rows = network.units[-1], self.steps * self.batch
        if network.readout is None:
            sent = buffers.sent(len(network.units) - 1)
            copy_rows(device, out, units, sent, pitch_of(units), units, rows)
            return
        table = self._sent_lists(len(network.units) - 1)
        self._products(MatrixId("readout"), network.readout, table, rows, None, out, status)

    def count_inputs(self, x: Any, status: Any) -> None:
        """Add the events of a dense input (steps, batch, I) to the status words."""
        if x is not None and x.ndim == 3:
            self._count(x, x.shape[2], x.shape[2], self.steps * self.batch, status[STATUS_FIELDS:])

    def _count(self, dense: Any, pitch: int, units: int, rows: int, counts: Any) -> None:
        kernel, blocks = self.device.kernel(("count_events",), count_events_kernel, 128), -(-units // 128)
        arguments = dense.data.ptr, pitch, units, rows, counts.data.ptr, counts[units:].data.ptr
        self.device.launch(kernel, (blocks, count_threads(rows)), 128, *arguments)


class CapturedRun:
    """A run that is captured as a graph, with the memory that goes in and out of it.

    x      : (steps, batch, I) float32 or (steps, batch) int64
    answer : the status words, then the output, in one array, so that the host can fetch both at once. With `counting`
             the status words hold the event counts too
    """

    def __init__(self, run: Run, counting: bool):
        network, device = run.network, run.device
        self.run, self.counting = run, counting
        shape = (run.steps, run.batch)
        if run.symbol_events is not None:
            self.x = device.empty(shape, np.int64)
        else:
            self.x = device.empty((*shape, network.network.layers[0].inputs), np.float32)
        size = run.steps * run.batch * network.output_size
        words = network.status_words if counting else STATUS_FIELDS
        self.answer = device.empty(words + -(-size // 2), np.int64)
        self.status = self.answer[:words]
        self.output = self.answer[words:].view(np.float32)[:size].reshape(*shape, network.output_size)
        self.replay = Replay(device.queue, self._enqueue)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory, without those of the run."""
        return self.x.nbytes + self.answer.nbytes

    def _enqueue(self) -> None:
        run = self.run
        self.status.data.memset_async(0, self.status.nbytes)
        run.begin()
        lists = run.event_lists(self.x, 0, self.status)
        run.enqueue(*lists, self.status, None, self.counting, self.output)
        if self.counting:
            run.count_inputs(self.x, self.status)
