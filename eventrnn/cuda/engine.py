"""The CUDA engine: a network packed for the GPU, runs of whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.backend import HostInputs
from eventrnn.cuda import tables
from eventrnn.cuda.cluster_plan import CLUSTER_SIZES, ClusterShape, cluster_plan
from eventrnn.cuda.cublas import Cublas
from eventrnn.cuda.device import current_device
from eventrnn.cuda.inputs import (
    DeviceState,
    check_status,
    copy_values,
    dense_host_inputs,
    flattened,
    gpu_inputs,
    result_for,
)
from eventrnn.cuda.kernels.batched_products import count_events_kernel, count_threads, log_events_kernel
from eventrnn.cuda.kernels.input_checks import finite_kernel
from eventrnn.cuda.launch import launch_layers
from eventrnn.cuda.matrix import Matrix
from eventrnn.cuda.packing import check_format, per_strip
from eventrnn.cuda.plan import Chip, LayerShape, Plan, launches_of, parts_of, plan, tile_width
from eventrnn.cuda.run_buffers import Piece, Replay, copy_rows, pitch_of
from eventrnn.cuda.stepper import CudaStepper, Loop, StepLoop
from eventrnn.cuda.tables import LANES
from eventrnn.cuda.tensor_core_layer import FEWEST_STREAMS, TensorLayer, exact_because, measured_ways
from eventrnn.events import Events
from eventrnn.state import FireCounts, InputKind, Inputs, State, Trace, on_gpu
from eventrnn.weights import Dense

if TYPE_CHECKING:
    from eventrnn.network import Network


# What the record of a run may take at a time; longer runs go through in pieces.
RECORD_BYTES = 1 << 30


class CudaEngine:
    """A network packed for `run`; keeps its memory between calls, so one engine serves one run at a time.

    Engines of one process share the GPU's stream.
    """

    dense = False

    def __init__(self, network: Network, precision: str | None = None):
        for name, weights in network.matrices().items():
            check_format(name, weights)
        self.network, self.device = network, current_device()
        self.units = [layer.units for layer in network.layers]
        clusters = {size: self.device.clusters(size) for size in CLUSTER_SIZES}
        self.chip = Chip(self.device.multiprocessors, self.device.shared_bytes, clusters)
        self.output_size = self.units[-1] if network.readout is None else network.readout.weights.shape[1]
        #: for products on tensor cores, and by batch the layers that go so; None and nobody in exact runs
        self.precision = precision
        self.ways: dict[int, tuple[int, ...]] = {}
        with self.device.on_stream():
            self._pack()
        self.plans: dict[tuple, list[Plan | None]] = {}
        self.tables: dict[tuple, Any] = {}
        self.pieces: dict[tuple[int, int], Piece] = {}
        self.steps: dict[int, StepLoop] = {}
        self.host_inputs = HostInputs(network)

    @cached_property
    def exact_because(self) -> list[str | None]:
        """Why layers cannot go through tensor cores; None for those that can."""
        assert self.precision is not None
        return [exact_because(layer, self.precision) for layer in self.network.layers]

    @cached_property
    def tensors(self) -> list[TensorLayer | None]:
        """Layers as tensor cores take them; None for those that they cannot have."""
        precision, device = self.precision, self.device
        assert precision is not None
        able = [reason is None for reason in self.exact_because]
        with device.on_stream():
            cublas = Cublas(device) if any(able) else None
            made = zip(self.network.layers, able, strict=True)
            return [TensorLayer.of(device, cublas, each, precision) if cublas and can else None for each, can in made]

    def launches(self, ways: tuple[int, ...] = ()) -> list[range]:
        """Layers by launch, where those in `ways` go through tensor cores."""
        variants = [layer.cell.variant for layer in self.network.layers]
        return launches_of(variants, self.chip.multiprocessors, ways)

    def _pack(self) -> None:
        network, device = self.network, self.device
        self.w_in, self.w_rec, self.thresholds = [], [], []
        for number, layer in enumerate(network.layers):
            share = self.chip.multiprocessors // next(len(each) for each in self.launches() if number in each)
            inside = (layer.w_rec, layer.w_in) if number else (layer.w_rec,)
            width = tile_width(layer.units, share, any(isinstance(w, Dense) for w in inside))
            self.w_rec.append(Matrix.of(device, layer.w_rec, layer.bias_rec, 3, width))
            self.w_in.append(Matrix.of(device, layer.w_in, layer.bias_in, 3, width))
            self.thresholds.append(device.put(per_strip(layer.threshold, 1, width)))
        self.readout = None
        if network.readout is not None:
            self.readout = Matrix.of(device, network.readout.weights, network.readout.bias, 1, LANES)
        counted = 2 * (network.layers[0].inputs + sum(self.units))
        self.status = device.put(np.zeros(tables.STATUS_FIELDS + counted, np.int64))
        self.feed_arrays: tuple[np.ndarray, Any] | None = None

    def _plans(self, batch: int) -> list[Plan | None]:
        ways = self.ways.get(batch, ())
        key = (batch, ways)
        if key not in self.plans:
            self.plans[key] = [
                None if layers.start in ways else self._plan(layers, batch) for layers in self.launches(ways)
            ]
        return self.plans[key]

    def _plan(self, layers: range, batch: int) -> Plan:
        clustered = self._cluster_plan(layers, batch)
        if clustered is not None:
            return clustered
        shapes = [
            LayerShape(
                self.units[n],
                self.network.layers[n].inputs,
                self.w_in[n].strips if n else None,
                self.w_rec[n].strips,
            )
            for n in layers
        ]
        return plan(shapes, batch, self.chip)

    def _cluster_plan(self, layers: range, batch: int) -> Plan | None:
        matrices = [self.w_rec[n] for n in layers] + [self.w_in[n] for n in layers if n]
        paper = self.network.layers[layers.start].cell.variant == "paper"
        if paper or not any(self.chip.clusters.values()) or not all(each.sparse for each in matrices):
            return None
        shapes = [
            ClusterShape(self.units[n], self.w_in[n].columns if n else None, self.w_rec[n].columns) for n in layers
        ]
        return cluster_plan(shapes, batch, self.chip)

    def stepper(self, state: State) -> CudaStepper:
        """Single steps, each one launch of a graph; see `backend.Engine`."""
        return CudaStepper(self, state)

    def step_loop(self, batch: int) -> StepLoop:
        """For single steps of that many samples, kept."""
        if batch not in self.steps:
            self.steps[batch] = StepLoop(self, batch)
        return self.steps[batch]

    def prepare(self, inputs: Any) -> Inputs:
        """See `backend.Engine`. Arrays on the GPU stay there; the run checks float32 numbers on the GPU."""
        if on_gpu(inputs):
            return self.gpu_inputs(inputs)
        plain = type(inputs) is np.ndarray and inputs.dtype == np.float32 and self.network.embedding is None
        if plain and inputs.ndim == 3 and inputs.shape[2] == self.network.layers[0].inputs:
            return dense_host_inputs(inputs)
        return self.host_inputs.prepare(inputs)

    def gpu_inputs(self, inputs: Any, step: bool = False) -> Inputs:
        """Inputs that lie on the GPU, or those of a single `step`."""
        symbol_events = None if self.network.embedding is None else self.host_inputs.symbol_events
        return gpu_inputs(self.device, self.network, symbol_events, inputs, step)

    def run(self, feed: Inputs, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`. Runs whose record takes more than `RECORD_BYTES` go through in pieces.

        The state stays on the GPU. Raises MemoryError with the needed and the free bytes; all is then as it was.
        """
        if feed.batch < 1:
            raise ValueError("inputs: got a batch of 0, need at least one sample")
        with self.device.on_stream():
            try:
                return self._run(feed, state, record_events, record_states)
            except MemoryError:
                # Nothing is kept that somebody may need the room of.
                self.pieces.clear()
                self.steps.clear()
                raise

    def _run(self, feed: Inputs, state: State, record_events: bool, record_states: bool) -> Trace:
        now, longest = self.flat_state(state), self._longest(feed.batch, record_states)
        if self.precision and feed.batch not in self.ways and feed.steps:
            self.ways[feed.batch] = measured_ways(self, feed.chunk(0, min(feed.steps, longest)), now)
            # Their graphs go the way of before.
            self.pieces.clear()
            self.steps.clear()
        if not feed.checked and 0 < feed.steps <= longest and not (record_events or record_states):
            return self._whole_run(feed, now)
        return self._run_in_pieces(feed, now, longest, record_events, record_states)

    def _whole_run(self, feed: Inputs, now: Any) -> Trace:
        """A run without records that fits: from its second time on, one launch of a graph."""
        piece = self.piece(feed.steps, feed.batch)
        if "loop" not in piece.spare:
            piece.spare["loop"] = Loop(self, piece, counting=True)
        loop = piece.spare["loop"]
        copy_values(self.device, feed, loop.x)
        piece.start(now)
        loop.replay()
        left = DeviceState(self.device, piece.state.copy(), self.units, feed.batch)
        output = loop.output if feed.library is None else loop.output.copy()
        return self._trace(feed, left, output, loop.status.get(), [], [])

    def _run_in_pieces(self, feed: Inputs, now: Any, longest: int, record_events: bool, record_states: bool) -> Trace:
        device, batch, steps = self.device, feed.batch, feed.steps
        here = feed.library is not None
        arrays: Any = device.arrays if here else np
        wanted = range(len(self.units))
        output = arrays.empty((steps, batch, self.output_size), np.float32)
        events = [arrays.empty((steps, batch, self.units[n]), np.float32) for n in wanted] if record_events else []
        states = [arrays.empty((steps, batch, self.units[n]), np.float32) for n in wanted] if record_states else []
        status = self.status
        status.data.memset_async(0, status.nbytes)

        def take(found: Any, target: Any) -> None:
            if here:
                target[...] = found
            else:
                device.fetch(found, target)

        for begin in range(0, steps, longest):
            end = min(steps, begin + longest)
            piece, part = self.piece(end - begin, batch), feed.chunk(begin, end)
            piece.start(now)
            piece.begin(self.settled(batch))
            after = [device.empty((piece.steps, batch, n), np.float32) for n in self.units] if record_states else None
            x = self._input(part, piece)
            table = self._table(part) if x is None else self.table_of(x, begin * batch, piece, status)
            self.enqueue(piece, *table, status, after, counting=True)
            self.count_inputs(piece, x, status)
            for n in wanted:
                for whole, found in ((events, piece.sent(n)), (states, after[n] if after else None)):
                    if whole and found is not None:
                        take(found, whole[n][begin:end])
            made = device.empty((piece.steps, batch, self.output_size), np.float32)
            self.read_out(piece, made)
            take(made, output[begin:end])
            now = piece.state
        left = DeviceState(device, now.copy(), self.units, batch)
        return self._trace(feed, left, output, status.get(), events, states)

    def _trace(self, feed: Inputs, left: DeviceState, output, status: np.ndarray, events, states) -> Trace:
        """What a run leaves behind. Raises for what its report says is wrong."""
        check_status(status, feed, left)
        sizes = [self.network.layers[0].inputs, *self.units]
        counts = np.split(status[tables.STATUS_FIELDS :], np.cumsum(np.repeat(sizes, 2))[:-1])
        fired = tuple(FireCounts(a.copy(), b.copy()) for a, b in zip(counts[::2], counts[1::2], strict=True))

        output, *records = (result_for(self.device, feed, each) for each in (output, *events, *states))
        return Trace(
            output,
            left,
            fired[1:],
            tuple(records[: len(events)]),
            tuple(records[len(events) :]),
            self.paths(feed.batch),
            # The run counts the events of numbers that it checked.
            fired[0] if feed.kind is InputKind.DENSE else None,
        )

    def flat_state(self, state: State | Any) -> Any:
        """A state on the device, or one that is there already; not to be written to."""
        if isinstance(state, DeviceState):
            return state.flat
        return self.device.put(flattened(state)) if isinstance(state, State) else state

    def piece(self, steps: int, batch: int) -> Piece:
        """Memory for a run of that shape, kept for the next one."""
        key = (steps, batch)
        if key in self.pieces:
            self.pieces[key] = self.pieces.pop(key)
            return self.pieces[key]
        new = Piece(self.device, self.network, self.units, steps, batch)
        while self.pieces and new.nbytes + sum(each.nbytes for each in self.pieces.values()) > 2 * RECORD_BYTES:
            del self.pieces[next(iter(self.pieces))]
        self.pieces[key] = new
        return new

    def paths(self, batch: int) -> dict[str, str]:
        """By matrix, how its weights lie and where they are read from."""
        found: dict[str, str] = {}
        ways = self.ways.get(batch, ())
        for layers, each in zip(self.launches(ways), self._plans(batch), strict=True):
            if each is None:
                found |= dict.fromkeys(
                    (f"layers.{layers.start}.{w}" for w in ("w_rec", "w_in")), f"tensor {self.precision}"
                )
                continue
            for (n, feeds), laid in zip(parts_of(layers, each), each.layers, strict=True):
                if not feeds:
                    found[f"layers.{n}.w_rec"] = self.w_rec[n].described_way(laid.way_rec, each.cluster)
                if n == 0:
                    found["layers.0.w_in"] = self.w_in[0].described(self.w_in[0].room(self.device)[0])
                elif feeds or not each.cluster:
                    found[f"layers.{n}.w_in"] = self.w_in[n].described_way(laid.way_in, each.cluster)
        if self.precision and batch >= FEWEST_STREAMS:
            for n, reason in enumerate(self.exact_because):
                for name in (f"layers.{n}.w_rec", f"layers.{n}.w_in") if reason else ():
                    found[name] += f", exact: {reason}"
        if self.readout is not None:
            found["readout"] = self.readout.described(self.readout.room(self.device)[0])
        return found

    def on_device(self, feed: Inputs, state: State | Any, *, counting: bool = True) -> Callable[[], None]:
        """Puts a whole run from that state on the GPU's stream, without copies to or from the host, at each call.

        For timing: nothing comes back, and nothing need be counted. From the second call on, one launch of a graph.
        """
        longest = self._longest(feed.batch, False)
        parts = [feed.chunk(a, min(feed.steps, a + longest)) for a in range(0, feed.steps, longest)]
        with self.device.on_stream():
            flat = self.flat_state(state)
            pieces = [self.piece(part.steps, part.batch) for part in parts]
            event_tables = [self._table(part) if feed.checked else None for part in parts]
            inputs = [self._input(part, None) for part in parts]
            out = self.device.empty((min(feed.steps, longest), feed.batch, self.output_size), np.float32)

        def enqueue() -> None:
            now = flat
            for part, piece, table, x in zip(parts, pieces, event_tables, inputs, strict=True):
                piece.start(now)
                piece.begin(self.settled(part.batch))
                found = table or self.table_of(x, 0, piece, self.status)
                self.enqueue(piece, *found, self.status, None, counting, out[: part.steps])
                now = piece.state

        replay = Replay(self.device.queue, enqueue)

        def put() -> None:
            with self.device.on_stream():
                replay()

        return put

    def _longest(self, batch: int, record_states: bool) -> int:
        row = sum(
            pitch_of(n) * (1 + (layer.cell.variant == "paper"))
            for n, layer in zip(self.units, self.network.layers, strict=True)
        )
        # Drives of the first layer, and of all where feeders leave them.
        row += 3 * sum(self.units) + (sum(self.units) if record_states else 0)
        # What events of tensor-core layers are counted from: two bytes for two units and no more than one sample each.
        row += sum(-(-n // (2 * LANES)) * LANES // 2 for n in self.units) if self.precision else 0
        # Lists of the input's events, where they are found here.
        row += 2 * (self.network.layers[0].inputs + LANES)
        if self.readout is not None:
            row += 2 * (pitch_of(self.units[-1]) + LANES) + self.readout.weights.shape[1]
        return max(1, RECORD_BYTES // (4 * row * batch))

    def feed_table(self, events: Events) -> tuple[Any, Any, Any]:
        """The rows of events as lists on the device: where each begins, its length, and the entries. Kept."""
        if self.feed_arrays is None or self.feed_arrays[0] is not events.indices:
            counts = np.diff(events.indptr)
            firsts = events.indptr[:-1] + tables.LIST_PAD * np.arange(len(counts))
            at = np.arange(len(events.indices)) + np.repeat(firsts - events.indptr[:-1], counts)
            entries = np.zeros((len(events.indices) + tables.LIST_PAD * (len(counts) + 1), 2), np.int32)
            entries[at, 0], entries[at, 1] = events.indices, events.values.view(np.int32)
            arrays = (firsts.astype(np.int64), counts.astype(np.int32), entries.view(np.int64).ravel())
            arrays = tuple(map(self.device.put, arrays))
            self.feed_arrays = (events.indices, arrays)
        return self.feed_arrays[1]

    def _input(self, feed: Inputs, piece: Piece | None) -> Any:
        """The numbers or symbols of a feed on the device, in a piece's memory or their own; None of one of events."""
        if feed.checked or feed.library is not None:
            return None if feed.checked else feed.values
        shape = feed.values.shape
        x = piece.kept("x", shape, np.float32) if piece else self.device.empty(shape, np.float32)
        copy_values(self.device, feed, x)
        return x

    def _table(self, feed: Inputs) -> tuple[Any, Any]:
        """The event table of a feed on the device, and which row of it each row of the input reads."""
        return self.feed_table(feed.event_table), self.device.put(feed.rows)

    def table_of(self, x: Any, row_0: int, piece: Piece, status) -> tuple[Any, Any]:
        """The same of numbers or symbols on the device; None: each row reads its own."""
        if x.ndim == 2:
            events = self.host_inputs.symbol_events
            return self.feed_table(events), piece.checked_rows(x, row_0, events.shape[0], status)
        return piece.found(x, row_0, status), None

    def enqueue(self, piece: Piece, table, row_of, status, after, counting: bool, out: Any = None) -> None:
        """All layers of a piece; their cells after each step into `after`, where asked for, the output into `out`.

        With `counting` their events are added to the report.
        """
        device, batch, steps = self.device, piece.batch, piece.steps
        ways = self.ways.get(batch, ())
        drive, last = None, len(self.units) - 1
        # What the last layer sends need not be recorded first.
        direct = out is not None and self.readout is None and last in ways
        if 0 not in ways:
            drive = self.w_in[0].products(device, table, steps * batch, row_of, out=piece.drive(3 * self.units[0]))
        for layers, each in zip(self.launches(ways), self._plans(batch), strict=True):
            if each is None:
                n = layers.start
                layer, counts = self.tensors[n], status[self._counts_from(n) :].data.ptr if counting else 0
                assert layer is not None
                to: Any = out if direct and n == last else piece.event_logs[n][1:]
                sent = to.data.ptr, to.shape[2]
                layer.enqueue(piece, n, table, row_of, after[n] if after else None, sent, counts, status)
                continue
            launch_layers(self, layers, each, piece, drive, status, after)
        device.launch(
            device.kernel(("finite",), finite_kernel, 256), -(-piece.state[0].size // 256), 256,
            piece.state.data.ptr, piece.state[0].size, status.data.ptr,
        )  # fmt: skip
        piece.end(out if direct else None)
        if out is not None and not direct:
            self.read_out(piece, out)
        for n in range(len(self.units)) if counting else ():
            if n not in ways:
                at, units = self._counts_from(n), self.units[n]
                self._count(piece.event_logs[n][1:], pitch_of(units), units, steps * batch, status[at:])

    def settled(self, batch: int) -> tuple[int, ...]:
        """Layers whose record nobody reads while it is written: tensor cores', but below one that goes by events."""
        ways = self.ways.get(batch, ())
        return tuple(n for n in ways if n + 1 in (*ways, len(self.units)))

    def _counts_from(self, n: int) -> int:
        """Where in a report the counts of layer n begin."""
        return tables.STATUS_FIELDS + 2 * (self.network.layers[0].inputs + sum(self.units[:n]))

    def read_out(self, piece: Piece, out) -> None:
        """(steps, batch, V or N) of a piece's record."""
        n, rows = self.units[-1], piece.steps * piece.batch
        if self.readout is None:
            copy_rows(self.device, out, n, piece.sent(len(self.units) - 1), pitch_of(n), n, rows)
            return
        device, pitch = self.device, pitch_of(n)
        table, event_log = piece.lists("output", pitch + LANES), piece.event_logs[-1][1:]
        kernel = device.kernel(("log_events",), log_events_kernel, 256)
        device.launch(
            kernel, -(-rows // 8), 256, event_log.data.ptr, pitch, n, rows, *(each.data.ptr for each in table),
            pitch + LANES,
        )  # fmt: skip
        self.readout.products(device, table, rows, out=out)

    def count_inputs(self, piece: Piece, x: Any, status) -> None:
        """Events of a dense input, added to the report."""
        if x is not None and x.ndim == 3:
            self._count(x, x.shape[2], x.shape[2], piece.steps * piece.batch, status[tables.STATUS_FIELDS :])

    def _count(self, dense, pitch: int, units: int, rows: int, counts) -> None:
        kernel = self.device.kernel(("count_events",), count_events_kernel, 128)
        self.device.launch(
            kernel, (-(-units // 128), count_threads(rows)), 128,
            dense.data.ptr, pitch, units, rows, counts.data.ptr, counts[units:].data.ptr,
        )  # fmt: skip
