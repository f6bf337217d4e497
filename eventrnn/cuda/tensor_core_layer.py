"""Layers on tensor cores: products of rounded numbers, cells and events in float32.

Not exact: weights, inputs and events are rounded to `precision`. Where the kept weights fit into the shared memory of
one cluster of blocks, all steps are one kernel (`tensor_core_loop.py`). Otherwise products are dense. With few streams
the weights may fit into the registers of the GPU, and all steps are one kernel too (`tensor_core_grid.py`). The other
products, and the input products of both, are those of cuBLAS, which sums in float32, in an order of its own, and rounds
the sums to `precision`. A step is then one product and one kernel, which updates the cells and counts the events, and
the input drives of many steps are computed in one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.kernels.batched_products import count_pairs_kernel, count_threads
from eventrnn.cuda.kernels.tensor_core_cells import (
    BYTES,
    FLOAT16_MAX,
    VECTORS,
    cells_kernel,
    densify_kernel,
    round_rows_kernel,
)
from eventrnn.cuda.kernels.tensor_core_ptx import MULTIPLY
from eventrnn.cuda.run_buffers import Replay, pitch_of
from eventrnn.cuda.tables import LANES, MAX_SUMMED
from eventrnn.cuda.tensor_core_grid import GridLoop, GridPlan, grid_plan
from eventrnn.cuda.tensor_core_loop import InputTiles, TileLoop, fits
from eventrnn.cuda.tensor_core_tiles import TilePlan, Tiles, plan_tiles
from eventrnn.weights import GatedBlocks

if TYPE_CHECKING:
    from eventrnn.cuda.cublas import Cublas
    from eventrnn.cuda.device import Device
    from eventrnn.cuda.plan import Chip
    from eventrnn.cuda.run_buffers import RunBuffers
    from eventrnn.network import Layer


# Every dimension is padded to a multiple of this number, for tensor cores and for rows of whole 16 bytes.
PADDED_TO = 8

# Bytes of the input drives that are computed in one product. On an H100 a large product saves more time than small
# ones whose drives stay in the L2 cache.
DRIVE_BYTES = 256 << 20

# Streams from which tensor cores are tried. With fewer, layers go by events without a measurement, because events are
# then faster: with one stream and 1024 units 0.78 µs per step beside 1.32 µs of the loop of clusters on an H200.
MIN_STREAMS = 4

# Steps of a measured run, and the number of runs whose fastest counts.
MEASURED_STEPS, MEASURED_RUNS = 64, 3

# Threads per block of the kernel for cells, and of the kernels for rows.
CELL_THREADS, ROW_THREADS = 128, 256

# Graphs that are kept per run and layer.
MAX_REPLAYS = 4

# Blocks of the kernel for cells that are resident on one multiprocessor.
CELL_BLOCKS = 8


@dataclass
class TensorLayer:
    """One layer's weights on the GPU, rounded to `precision` and padded with zeros.

    Attributes
    ----------
    units, inputs : the sizes of the layer without padding; `sizes` has the padded ones
    w_in, w_rec   : (padded inputs, 3 * padded units) and (padded units, 3 * padded units) in the type of `precision`
    vectors       : (VECTORS, padded units) float32: biases of u and r, of both drives together; biases of the
                    candidate's input drive and of its recurrent drive; thresholds
    chip          : what plans of clusters must keep
    words         : the rounded input and recurrent weights on the host, without padding
    plans         : by batch, the plan of clusters; None where no plan fits
    loops         : by plan, the loop of clusters. Many batch sizes share a plan, and one copy of the weights
    grids         : by plan, the loop of the whole GPU
    """

    device: Device
    cublas: Cublas
    precision: str
    units: int
    inputs: int
    w_in: Any
    w_rec: Any
    vectors: Any
    chip: Chip
    words: tuple[np.ndarray, np.ndarray]
    plans: dict[int, TilePlan | None] = field(default_factory=dict)
    loops: dict[TilePlan, TileLoop] = field(default_factory=dict)
    grids: dict[GridPlan, GridLoop] = field(default_factory=dict)

    @classmethod
    def of(cls, device: Device, cublas: Cublas, layer: Layer, precision: str, chip: Chip) -> TensorLayer:
        """The weights of a layer for which `exact_because` is None."""
        dense = layer.w_in.to_dense(), layer.w_rec.to_dense()
        w_in, w_rec = (device.put(rounded(_padded(each), precision)) for each in dense)
        words = rounded(dense[0], precision), rounded(dense[1], precision)
        bias_in, bias_rec = (each.reshape(3, -1) for each in (layer.bias_in, layer.bias_rec))
        vectors = np.zeros((VECTORS, _round_up(layer.units)), np.float32)
        vectors[:2, : layer.units] = bias_in[:2] + bias_rec[:2]
        vectors[2:, : layer.units] = bias_in[2], bias_rec[2], np.broadcast_to(layer.threshold, layer.units)
        sizes = layer.units, layer.inputs
        return cls(device, cublas, precision, *sizes, w_in, w_rec, device.put(vectors), chip, words)

    @property
    def sizes(self) -> tuple[int, int]:
        """The padded numbers of units and of inputs."""
        return _round_up(self.units), _round_up(self.inputs)

    def loop(self, batch: int) -> TileLoop | None:
        """The loop of clusters for so many samples; None where every step is a product of cuBLAS."""
        if batch not in self.plans:
            self.plans[batch] = self._plan(batch) if self._has_tiles else None
        plan = self.plans[batch]
        if plan is None:
            return None
        if plan not in self.loops:
            weights = self._device_inputs, self.tiles, self.vectors
            self.loops[plan] = TileLoop(self.device, self.precision, *weights, plan)
        return self.loops[plan]

    def grid(self, batch: int) -> GridLoop | None:
        """The loop of the whole GPU for so many samples; None where clusters run it or weights do not fit."""
        able = self.precision in MULTIPLY and self.loop(batch) is None
        plan = grid_plan(self.units, batch, self.chip) if able else None
        if plan is None:
            return None
        if plan not in self.grids:
            self.grids[plan] = GridLoop(self.device, self.precision, self.words[1], self.vectors, plan)
        return self.grids[plan]

    @property
    def _has_tiles(self) -> bool:
        return self.precision in MULTIPLY and fits(self.inputs, self.chip.shared_bytes)

    @cached_property
    def tiles(self) -> Tiles:
        """The tiles of the recurrent weights."""
        return Tiles.of(self.words[1])

    @cached_property
    def input_tiles(self) -> Tiles:
        """The tiles of the input weights."""
        return Tiles.of(self.words[0], even=True)

    @cached_property
    def _device_inputs(self) -> InputTiles:
        return InputTiles(self.device, self.input_tiles)

    def _plan(self, batch: int) -> TilePlan | None:
        return plan_tiles(self.tiles, int(self.input_tiles.begins[-1]), batch, self.chip)

    def path(self, batch: int) -> str:
        """What computes the recurrent products."""
        loop, grid = self.loop(batch), self.grid(batch)
        where = (
            f" in clusters of {loop.plan.blocks} blocks" if loop else f" in {grid.plan.blocks} blocks" if grid else ""
        )
        return f"tensor {self.precision}{where}"

    def enqueue(
        self, buffers: RunBuffers, k: int, table, row_of, after, sent: tuple[int, int], counts: int, status
    ) -> None:
        """Put all steps of layer k on the stream.

        table, row_of : the event lists of the input, for layer 0 (`Run.event_lists`); other layers read the event log
                        of the layer below
        after         : (steps, batch, units) float32 for the cells after each step, or None
        sent          : address and pitch of the (steps, batch, pitch) float32 outputs. A captured graph must not keep
                        the array alive, so only its address is passed
        counts        : address of the event counts of the layer, 0 if events are not counted
        """
        loop = self.loop(buffers.batch)
        if loop is not None:
            loop.enqueue(buffers, k, table, row_of, after, sent, counts, status)
            return
        units, inputs = self.sizes
        steps, batch, kind = buffers.steps, buffers.batch, np.uint16 if BYTES[self.precision] == 2 else np.float32
        x = buffers.scratch(("x", k), (steps * batch, inputs), kind)
        y = buffers.scratch(("y", k), (batch, units), kind)
        if k == 0:
            lists = *(each.data.ptr for each in table), 0 if row_of is None else row_of.data.ptr
            blocks = -(-steps * batch // (ROW_THREADS // LANES))
            arguments = *lists, steps * batch, inputs, x.data.ptr, status.data.ptr
            self._launch("densify", densify_kernel, blocks, ROW_THREADS, *arguments)
        else:
            below = buffers.event_logs[k - 1][1:]
            self._round_rows(below, pitch_of(self.inputs), self.inputs, x, inputs, steps * batch, status)
        self._round_rows(buffers.outputs[k], self.units, self.units, y, units, batch, status)
        if after is not None or self.grid(batch) is not None:
            self._steps(buffers, k, x, y, after, sent, counts, status)
            return
        key = ("replay", k, sent, counts, status.data.ptr)
        if key not in buffers.tables:
            # Evict graphs of output buffers that are no longer in use.
            for old in [each for each in buffers.tables if each[:2] == key[:2]][: -MAX_REPLAYS + 1]:
                del buffers.tables[old]
            buffers.tables[key] = Replay(
                self.device.queue, lambda: self._steps(buffers, k, x, y, None, sent, counts, status)
            )
        buffers.tables[key]()

    def _steps(self, buffers: RunBuffers, k: int, x, y, after, sent: tuple[int, int], counts: int, status) -> None:
        """Put the time loop on the stream: per step one product and one kernel for the cells."""
        units, inputs = self.sizes
        steps, batch, (sent_at, pitch), grid = buffers.steps, buffers.batch, sent, self.grid(buffers.batch)
        chunk = max(1, min(steps, DRIVE_BYTES // (3 * BYTES[self.precision] * units * batch)))
        drive = buffers.scratch(("drive", k), (chunk * batch, 3 * units), x.dtype)
        rec = buffers.scratch(("rec", k), (batch, 3 * units), x.dtype)
        pairs = -(-self.units // 2)
        blocks = -(-pairs // CELL_THREADS)
        splits = -(-batch // _samples_per_thread(batch * blocks, CELL_BLOCKS * self.device.multiprocessors))
        # Rows of sums begin at whole memory sectors, so that no two warps write to the same sector.
        sums, sums_pitch = 0, -(-pairs // LANES) * LANES
        if counts:
            sums = buffers.scratch(("sums", k), (steps * splits, sums_pitch), np.uint16).data.ptr
        cells = self.vectors.data.ptr, buffers.cells[k].data.ptr, y.data.ptr
        sizes = self.units, units, pitch, batch
        for begin in range(0, steps, chunk):
            rows = min(chunk, steps - begin) * batch
            self.cublas.product(self.precision, x[begin * batch :], self.w_in, drive, rows, inputs, 3 * units)
            if grid is not None:
                outputs = sent_at + 4 * begin * batch * pitch, pitch
                after_at = 0 if after is None else after[begin].data.ptr
                grid.enqueue(buffers, k, drive, y, outputs, after_at, rows // batch, counts, status)
                continue
            for t in range(begin, begin + rows // batch):
                self.cublas.product(self.precision, y, self.w_rec, rec, batch, units, 3 * units)
                drives = drive[(t - begin) * batch :].data.ptr, rec.data.ptr
                outputs = sent_at + 4 * t * batch * pitch, 0 if after is None else after[t].data.ptr
                sums_at = sums and sums + 2 * t * splits * sums_pitch
                arguments = *drives, *cells, *outputs, *sizes, sums_at, sums_pitch, status.data.ptr
                self._launch("cells", cells_kernel, (blocks, splits), CELL_THREADS, *arguments)
        if counts and grid is None:
            kernel = self.device.kernel(("count_pairs",), count_pairs_kernel, CELL_THREADS)
            arguments = sums, pairs, sums_pitch, steps * splits, counts, counts + 8 * self.units
            self.device.launch(kernel, (blocks, count_threads(steps * splits)), CELL_THREADS, *arguments)

    def _round_rows(self, dense, pitch: int, columns: int, out, padded: int, rows: int, status) -> None:
        """Round the first `columns` of rows of `pitch` float32 into `out`, (rows, padded) with zeros at the end."""
        arguments = dense.data.ptr, pitch, columns, padded, out.data.ptr, status.data.ptr
        self._launch("round_rows", round_rows_kernel, rows, ROW_THREADS, *arguments)

    def _launch(self, name: str, make, blocks, threads: int, *arguments: int) -> None:
        if min(blocks if isinstance(blocks, tuple) else (blocks,)):
            kernel = self.device.kernel((name, self.precision), lambda: make(self.precision), threads)
            self.device.launch(kernel, blocks, threads, *arguments)


def exact_because(layer: Layer, precision: str) -> str | None:
    """The reason why a layer cannot go through tensor cores; None where it can."""
    if not layer.cell.thresholded:
        return f"tensor cores run EGRU cells only, not {layer.cell.name!r}"
    if any(isinstance(each, GatedBlocks) for each in (layer.w_in, layer.w_rec)):
        return "gated blocks have no equal matrix"
    if layer.cell.reset_first:
        return "the paper's candidate waits for a gate within its product"
    weights = (layer.w_in.floats(), layer.w_rec.floats())
    if precision == "float16" and any(np.abs(each).max(initial=0) > FLOAT16_MAX for each in weights):
        return "float16 cannot hold its weights"
    return None


def has_grid(layer: Layer, batch: int, chip: Chip) -> bool:
    """Whether the registers of the GPU have room for the recurrent weights of a layer, for so many samples."""
    return grid_plan(layer.units, batch, chip) is not None


def fastest_layers(able: Sequence[int], seconds: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """The layers that are faster through tensor cores.

    able    : the layers that can go through them
    seconds : times a run in which the given layers go through tensor cores and the others by events

    The search times all layers by events and all able ones through tensor cores. From the faster of the two it then
    changes one layer after the other where that is faster. Neighbouring layers in one launch hide each other's
    latency, so that the time of a layer alone would not tell.
    """
    if not able:
        return ()
    times = {layers: seconds(layers) for layers in ((), tuple(able))}
    best = min(times, key=lambda layers: times[layers])
    for k in able if len(able) > 1 else ():
        tried = tuple(sorted(set(best) ^ {k}))
        if tried not in times:
            times[tried] = seconds(tried)
        best = min(best, tried, key=lambda layers: times[layers])
    return best


def _samples_per_thread(items: int, blocks: int) -> int:
    """Samples per thread of the kernel for cells, so that resident blocks have equal work.

    items  : (sample, block of units) pairs
    blocks : blocks that the GPU can hold at the same time

    A thread can sum the events of MAX_SUMMED samples at most. If it had more, further blocks take them.
    """
    waves = -(-items // (blocks * MAX_SUMMED))
    return -(-items // (blocks * waves))


def _round_up(size: int) -> int:
    return -(-size // PADDED_TO) * PADDED_TO


def _padded(dense: np.ndarray) -> np.ndarray:
    """A (n_pre, 3 * units) matrix with its rows and the columns of each gate padded with zeros."""
    n_pre, units = dense.shape[0], dense.shape[1] // 3
    padded = np.zeros((_round_up(n_pre), 3, _round_up(units)), np.float32)
    padded[:n_pre, :, :units] = dense.reshape(n_pre, 3, units)
    return padded.reshape(len(padded), -1)


def rounded(matrix: np.ndarray, precision: str) -> np.ndarray:
    """A float32 matrix rounded to nearest, ties to even, as uint16; as it is for "tf32", where cuBLAS rounds."""
    if precision == "float16":
        return matrix.astype(np.float16).view(np.uint16)
    if precision == "bfloat16":
        words = matrix.view(np.uint32)
        return ((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16)
    return matrix
