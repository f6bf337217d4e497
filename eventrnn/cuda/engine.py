"""The CUDA engine: a network packed for the GPU, runs of whole sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.backend import Feed, FireCounts, State, Trace
from eventrnn.cuda import tables as k
from eventrnn.cuda.cluster import cluster_kernel
from eventrnn.cuda.cluster_plan import CLUSTER_SIZES, ClusterShape, cluster_plan
from eventrnn.cuda.device import current_device
from eventrnn.cuda.kernels import NOT_YET, layers_kernel
from eventrnn.cuda.matrix import Matrix
from eventrnn.cuda.packing import check_format, per_strip
from eventrnn.cuda.plan import Chip, LayerShape, Plan, blocks_from, plan, tile_width
from eventrnn.cuda.products import compact_kernel, tally_kernel
from eventrnn.cuda.single import single_kernel
from eventrnn.cuda.tables import LANES
from eventrnn.weights import Dense

if TYPE_CHECKING:
    from eventrnn.network import Network

# What the record of a run may take at a time; longer runs go through in pieces.
RECORD_BYTES = 1 << 28


class CudaEngine:
    """A network packed for `run`; keeps its memory between calls, so one engine serves one run at a time.

    Engines of one process share the GPU's stream.
    """

    dense = False

    def __init__(self, network: Network):
        for name, weights in network.matrices().items():
            check_format(name, weights)
        self.network, self.device = network, current_device()
        self.units = [layer.units for layer in network.layers]
        clusters = {size: self.device.clusters(size) for size in CLUSTER_SIZES}
        self.chip = Chip(self.device.multiprocessors, self.device.shared_bytes, clusters)
        self.launches = _launches(network, self.chip.multiprocessors)
        with self.device.on_stream():
            self._pack()
        self.plans: dict[int, list[Plan]] = {}
        self.tables: dict[tuple, Any] = {}

    def _pack(self) -> None:
        network, device = self.network, self.device
        self.w_in, self.w_rec, self.thresholds = [], [], []
        for number, layer in enumerate(network.layers):
            share = self.chip.multiprocessors // next(len(each) for each in self.launches if number in each)
            inside = (layer.w_rec, layer.w_in) if number else (layer.w_rec,)
            width = tile_width(layer.units, share, any(isinstance(w, Dense) for w in inside))
            self.w_rec.append(Matrix(device, layer.w_rec, layer.bias_rec, 3, width))
            self.w_in.append(Matrix(device, layer.w_in, layer.bias_in, 3, width))
            self.thresholds.append(device.put(per_strip(layer.threshold, 1, width)))
        self.readout = None
        if network.readout is not None:
            self.readout = Matrix(device, network.readout.weights, network.readout.bias, 1, LANES)
        self.faults = device.put(np.zeros(1, np.int32))
        self.feed_arrays: tuple[np.ndarray, Any] | None = None

    def _plans(self, batch: int) -> list[Plan]:
        if batch not in self.plans:
            found = []
            for layers in self.launches:
                clustered = self._cluster_plan(layers, batch)
                if clustered is None:
                    shapes = [
                        LayerShape(
                            self.units[n],
                            self.network.layers[n].inputs,
                            self.w_in[n].strips if n else None,
                            self.w_rec[n].strips,
                        )
                        for n in layers
                    ]
                    clustered = plan(shapes, batch, self.chip)
                found.append(clustered)
            self.plans[batch] = found
        return self.plans[batch]

    def _cluster_plan(self, layers: range, batch: int) -> Plan | None:
        matrices = [self.w_rec[n] for n in layers] + [self.w_in[n] for n in layers if n]
        paper = self.network.layers[layers.start].cell.variant == "paper"
        if paper or not any(self.chip.clusters.values()) or not all(each.sparse for each in matrices):
            return None
        shapes = [
            ClusterShape(self.units[n], self.w_in[n].columns if n else None, self.w_rec[n].columns) for n in layers
        ]
        return cluster_plan(shapes, batch, self.chip)

    def stepper(self, state: State) -> None:
        """Single steps are runs."""
        return

    def run(self, feed: Feed, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`. Runs whose record takes more than `RECORD_BYTES` go through in pieces."""
        if feed.batch < 1:
            raise ValueError("inputs: got a batch of 0, need at least one sample")
        with self.device.on_stream():
            return self._run(feed, state, record_events, record_states)

    def _run(self, feed: Feed, state: State, record_events: bool, record_states: bool) -> Trace:
        device, batch = self.device, feed.batch
        cells = [device.put(np.asarray(c, np.float32)) for c in state.cells]
        outputs = [device.put(np.asarray(y, np.float32)) for y in state.outputs]
        counts = [device.put(np.zeros((2, n), np.int64)) for n in self.units]
        size = self.units[-1] if self.readout is None else self.readout.weights.shape[1]
        output = np.empty((feed.steps, batch, size), np.float32)
        wanted = range(len(self.units))
        events = [np.empty((feed.steps, batch, self.units[n]), np.float32) for n in wanted] if record_events else []
        states = [np.empty((feed.steps, batch, self.units[n]), np.float32) for n in wanted] if record_states else []
        longest = self._longest(batch, record_states)
        table = self._feed_table(feed)
        for begin in range(0, feed.steps, longest):
            piece = feed.part(begin, min(feed.steps, begin + longest))
            end = begin + piece.steps
            records, after = self._piece(piece, table, cells, outputs, record_states)
            for n in wanted:
                sent = records[n][1:, :, : self.units[n]]
                outputs[n] = sent[-1].copy()
                self._tally(records[n], piece.steps * batch, n, counts[n])
                if record_events:
                    events[n][begin:end] = sent.get()
                if record_states:
                    states[n][begin:end] = after[n].get()
            output[begin:end] = self._read_out(records[-1], piece).get()
        self.device.stream.sync()
        if int(self.faults.get()[0]):
            self.faults.fill(0)
            raise RuntimeError(
                "cuda: a block waited for events that never came; another program may hold the GPU's multiprocessors"
            )
        totals = [each.get() for each in counts]
        return Trace(
            output,
            State(tuple(c.get() for c in cells), tuple(y.get() for y in outputs)),
            tuple(FireCounts(each[0], each[1]) for each in totals),
            tuple(events),
            tuple(states),
            self.paths(batch),
        )

    def paths(self, batch: int) -> dict[str, str]:
        """By matrix, how its weights lie and where they are read from."""
        found = {}
        for layers, each in zip(self.launches, self._plans(batch), strict=True):
            parts = _parts(layers) if each.cluster else [(n, False) for n in layers]
            for (n, feeds), laid in zip(parts, each.layers, strict=True):
                kind = "rows" if each.cluster else ("dense", "masked", "runs")[self.w_rec[n].strips.kind]
                if not feeds:
                    found[f"layers.{n}.w_rec"] = self.w_rec[n].described(bool(laid.way_rec & k.RESIDENT), kind)
                if n == 0:
                    found["layers.0.w_in"] = self.w_in[0].described(self.w_in[0].room[0])
                elif feeds or not each.cluster:
                    found[f"layers.{n}.w_in"] = self.w_in[n].described(bool(laid.way_in & k.RESIDENT), kind)
        if self.readout is not None:
            found["readout"] = self.readout.described(self.readout.room[0])
        return found

    def on_device(self, feed: Feed, state: State) -> Callable[[], None]:
        """Puts a whole run from that state on the GPU's stream, without copies to or from the host, at each call.

        For timing: nothing comes back. Raises ValueError for a run that does not go through in one piece.
        """
        longest = self._longest(feed.batch, False)
        if feed.steps > longest:
            raise ValueError(f"steps: got {feed.steps}, but only {longest} fit in a piece; time fewer")
        with self.device.on_stream():
            table = self._feed_table(feed)
            cells, outputs = ([self.device.put(a) for a in arrays] for arrays in (state.cells, state.outputs))
            counts = [self.device.put(np.zeros((2, n), np.int64)) for n in self.units]

        def enqueue() -> None:
            with self.device.on_stream():
                records, _ = self._piece(feed, table, [c.copy() for c in cells], outputs, False)
                for n, record in enumerate(records):
                    self._tally(record, feed.steps * feed.batch, n, counts[n])
                self._read_out(records[-1], feed)

        return enqueue

    def _longest(self, batch: int, record_states: bool) -> int:
        row = sum(
            _pitch(n) * (1 + (layer.cell.variant == "paper"))
            for n, layer in zip(self.units, self.network.layers, strict=True)
        )
        # Drives of the first layer, and of all where feeders leave them.
        row += 3 * sum(self.units) + (sum(self.units) if record_states else 0)
        if self.readout is not None:
            row += 2 * (_pitch(self.units[-1]) + LANES) + self.readout.weights.shape[1]
        return max(1, RECORD_BYTES // (4 * row * batch))

    def _feed_table(self, feed: Feed) -> tuple[Any, Any, Any]:
        """The event table on the device; an embedding's stays there."""
        if self.feed_arrays is None or self.feed_arrays[0] is not feed.indices:
            counts = np.diff(feed.indptr)
            firsts = feed.indptr[:-1] + k.LIST_PAD * np.arange(len(counts))
            at = np.arange(len(feed.indices)) + np.repeat(firsts - feed.indptr[:-1], counts)
            entries = np.zeros((len(feed.indices) + k.LIST_PAD * (len(counts) + 1), 2), np.int32)
            entries[at, 0], entries[at, 1] = feed.indices, feed.values.view(np.int32)
            arrays = (firsts.astype(np.int64), counts.astype(np.int32), entries.view(np.int64).ravel())
            arrays = tuple(map(self.device.put, arrays))
            self.feed_arrays = (feed.indices, arrays)
        return self.feed_arrays[1]

    def _piece(self, feed: Feed, table, cells, outputs, record_states: bool) -> tuple[list[Any], list[Any]]:
        """Some steps: the record of each layer, (steps + 1, batch, pitch), and its cells where asked for."""
        device, batch = self.device, feed.batch
        drive = self.w_in[0].products(table, feed.steps * batch, device.put(feed.row_of.astype(np.int64)))
        records, gated, after, kept = [], [], [], []
        for n, layer in enumerate(self.network.layers):
            units, shape = self.units[n], (feed.steps + 1, batch, _pitch(self.units[n]))
            record = device.empty(shape, np.float32)
            record.view(np.int32).fill(int(NOT_YET))
            record[0, :, :units] = outputs[n]
            records.append(record)
            if layer.cell.variant == "paper":
                gated.append(device.empty(shape, np.float32))
                gated[-1].view(np.int32).fill(int(NOT_YET))
            else:
                gated.append(None)
            after.append(device.empty((feed.steps, batch, units), np.float32) if record_states else None)
        for layers, each in zip(self.launches, self._plans(batch), strict=True):
            parts = _parts(layers) if each.cluster else [(n, False) for n in layers]
            rows, drives = np.zeros((len(parts), k.LAYER_FIELDS), np.int64), drive
            for row, (n, feeds) in enumerate(parts):
                w_in, w_rec, way = self.w_in[n], self.w_rec[n], each.layers[row]
                below = records[n - 1][1:] if n and (feeds or not each.cluster) else None
                if feeds:
                    drives = device.empty((feed.steps * batch, 3 * self.units[n]), np.float32)
                    drives.view(np.int32).fill(int(NOT_YET))
                    kept.append(drives)
                fields = {
                    k.UNITS: self.units[n], k.INPUTS: self.network.layers[n].inputs, k.WIDTH: w_rec.width,
                    k.PITCH: _pitch(self.units[n]),
                    k.X: 0 if below is None else below.data.ptr, k.X_PITCH: 0 if n == 0 else _pitch(self.units[n - 1]),
                    k.DRIVE: drives.data.ptr, k.RECORD: records[n].data.ptr,
                    k.GATED: 0 if gated[n] is None else gated[n].data.ptr,
                    k.CELLS: cells[n].data.ptr, k.STATES: 0 if after[n] is None else after[n].data.ptr,
                    k.THRESHOLD: self.thresholds[n].data.ptr,
                }  # fmt: skip
                if each.cluster:
                    matrix = w_in if feeds else w_rec
                    fields |= {
                        k.UNITS_OF: matrix.units.data.ptr, k.ROWS_OF: matrix.rows.data.ptr,
                        k.FIRSTS_OF: matrix.firsts.data.ptr, k.ROWS_BIAS: matrix.column_bias.data.ptr,
                    }  # fmt: skip
                else:
                    # The input of the first layer nobody reads.
                    inside = w_in if n else w_rec
                    fields |= {
                        k.BIAS_IN: inside.bias.data.ptr, k.BIAS_REC: w_rec.bias.data.ptr,
                        k.IN_WAY: way.way_in, k.IN_VALUES: inside.values.data.ptr,
                        k.IN_TABLE: inside.table.data.ptr, k.IN_STARTS: inside.starts.data.ptr,
                        k.REC_WAY: way.way_rec, k.REC_VALUES: w_rec.values.data.ptr,
                        k.REC_TABLE: w_rec.table.data.ptr, k.REC_STARTS: w_rec.starts.data.ptr,
                    }  # fmt: skip
                for field, value in fields.items():
                    rows[row, field] = value
            self._launch(each, device.put(rows), layers, feed.steps, batch)
        return records, after

    def _launch(self, each: Plan, rows, layers: range, steps: int, batch: int) -> None:
        device, threads = self.device, 32 * each.warps
        variant = self.network.layers[layers.start].cell.variant
        if each.cluster:
            # Of several layers, the last two parts are a feeder and the layer it feeds.
            arguments = (each.layers[-1].way_rec, each.layers[-2:][0].way_in, each.cluster, *each.rounds)
            kernel = device.kernel(("cluster", *arguments), lambda: cluster_kernel(*arguments), threads)
        else:
            make = single_kernel if each.single else layers_kernel
            kernel = device.kernel((make.__name__, variant, each.ways), lambda: make(variant, each.ways), threads)
        for first in range(0, batch, each.groups * each.samples):
            key = (layers.start, batch, first)
            if key not in self.tables:
                table = blocks_from(each, first, batch)
                self.tables[key] = device.put(table), len(table)
            blocks, count = self.tables[key]
            device.launch(
                kernel, count, threads, rows.data.ptr, blocks.data.ptr, self.faults.data.ptr, steps, batch,
                shared=each.shared, together=True, cluster=each.cluster,
            )  # fmt: skip

    def _read_out(self, record, feed: Feed):
        """(steps, batch, V or N) on the device."""
        steps, batch, n = feed.steps, feed.batch, self.units[-1]
        if self.readout is None:
            return self.device.arrays.ascontiguousarray(record[1:, :, :n])
        device, rows, pitch = self.device, steps * batch, _pitch(n)
        capacity = pitch + LANES
        table = (
            device.empty(rows, np.int64),
            device.empty(rows, np.int32),
            device.empty(rows * capacity, np.int64),
        )
        kernel = device.kernel(("compact",), compact_kernel, 256)
        device.launch(
            kernel, -(-rows // 8), 256, record[1:].data.ptr, pitch, n, rows, *(each.data.ptr for each in table),
            capacity,
        )  # fmt: skip
        return self.readout.products(table, rows).reshape(steps, batch, -1)

    def _tally(self, record, rows: int, n: int, counts) -> None:
        kernel = self.device.kernel(("tally",), tally_kernel, 128)
        # Many threads a column, for many rows.
        grid = (-(-self.units[n] // 128), max(1, min(256, rows // 64)))
        self.device.launch(
            kernel, grid, 128, record[1:].data.ptr, _pitch(self.units[n]), self.units[n], rows,
            counts[0].data.ptr, counts[1].data.ptr,
        )  # fmt: skip


def _pitch(units: int) -> int:
    """From one row of a record to the next: whole cache lines."""
    return -(-units // LANES) * LANES


def _launches(network: Network, most: int) -> list[range]:
    """Neighbouring layers that run in one launch: of one variant, and no more than there are multiprocessors.

    What is above follows in the next launch; the record holds everything that it needs.
    """
    launches: list[range] = []
    for n, layer in enumerate(network.layers):
        last = launches[-1] if launches else None
        if last is not None and len(last) < most and network.layers[last.start].cell.variant == layer.cell.variant:
            launches[-1] = range(last.start, n + 1)
        else:
            launches.append(range(n, n + 1))
    return launches


def _parts(layers: range) -> list[tuple[int, bool]]:
    """What a launch of clusters consists of, in the order of its plan: which layer, and whether its feeder."""
    return [(n, feeds) for n in layers for feeds in (True, False) if n or not feeds]
