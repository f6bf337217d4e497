"""Layers through tensor cores, for many streams: dense products in half precision, cells and events in float32.

Not exact: weights, inputs and events are rounded to `precision` and summed by cuBLAS in float32, in its own order; the
sums are rounded again. A step is one product and one kernel for the cells, which also counts; the products of the input
are made for many steps together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from eventrnn.cuda.run_buffers import Replay, pitch_of
from eventrnn.cuda.tables import LANES, MAX_SUMMED

if TYPE_CHECKING:
    from eventrnn.cuda.cublas import Cublas
    from eventrnn.cuda.device import Device
    from eventrnn.cuda.run_buffers import RunBuffers
    from eventrnn.network import Layer


# Tensor cores, and rows of 16 bytes, want every dimension to be a multiple of this.
PADDED_TO = 8

# Input drives that are made together: on an H100 large products save more than drives gain that stay in the L2 cache.
DRIVE_BYTES = 256 << 20

# Fewer streams are faster by events, whatever the weights: not measured.
FEWEST_STREAMS = 4

# What is measured: so many steps, so often.
MEASURED_STEPS, MEASURED_RUNS = 16, 3

CELL_THREADS, ROW_THREADS = 128, 256

# Graphs of a piece and layer that are kept.
MOST_REPLAYS = 4

# Blocks of cells that find room on a multiprocessor.
CELL_BLOCKS = 8


@dataclass
class TensorLayer:
    """One layer's weights, rounded and padded, gates apart."""

    device: Device
    cublas: Cublas
    precision: str
    units: int
    inputs: int
    w_in: Any
    w_rec: Any
    vectors: Any

    @classmethod
    def of(cls, device: Device, cublas: Cublas, layer: Layer, precision: str) -> TensorLayer:
        """Of a layer that can go so (`exact_because`)."""
        w_in, w_rec = (_rounded(device, _padded(w.to_dense()), precision) for w in (layer.w_in, layer.w_rec))
        bias_in, bias_rec = (each.reshape(3, -1) for each in (layer.bias_in, layer.bias_rec))
        vectors = np.zeros((VECTORS, _up(layer.units)), np.float32)
        vectors[:2, : layer.units] = bias_in[:2] + bias_rec[:2]
        vectors[2:, : layer.units] = bias_in[2], bias_rec[2], np.broadcast_to(layer.threshold, layer.units)
        return cls(device, cublas, precision, layer.units, layer.inputs, w_in, w_rec, device.put(vectors))

    @property
    def sizes(self) -> tuple[int, int]:
        """Units and inputs, padded."""
        return _up(self.units), _up(self.inputs)

    def enqueue(
        self, buffers: RunBuffers, k: int, table, row_of, after, sent: tuple[int, int], counts: int, status
    ) -> None:
        """All steps of layer n of a piece, from an event table (layer 0) or from what the layer below sent.

        sent   : (steps, batch, pitch) of what is sent: its address and the pitch. No array, so that nobody keeps it
        counts : where events are counted, an address, 0 for nowhere
        """
        units, inputs = self.sizes
        steps, batch, kind = buffers.steps, buffers.batch, np.uint16 if BYTES[self.precision] == 2 else np.float32
        x = buffers.kept(("x", k), (steps * batch, inputs), kind)
        y = buffers.kept(("y", k), (batch, units), kind)
        if k == 0:
            self._launch(
                "densify", densify_kernel, -(-steps * batch // (ROW_THREADS // LANES)), ROW_THREADS,
                *(each.data.ptr for each in table), 0 if row_of is None else row_of.data.ptr, steps * batch, inputs,
                x.data.ptr, status.data.ptr,
            )  # fmt: skip
        else:
            below = buffers.event_logs[k - 1][1:]
            self._narrow(below, pitch_of(self.inputs), self.inputs, x, inputs, steps * batch, status)
        self._narrow(buffers.outputs[k], self.units, self.units, y, units, batch, status)
        if after is not None:
            self._steps(buffers, k, x, y, after, sent, counts, status)
            return
        key = ("replay", k, sent, counts, status.data.ptr)
        if key not in buffers.tables:
            # Evict graphs of output buffers that are no longer in use.
            for old in [each for each in buffers.tables if each[:2] == key[:2]][: -MOST_REPLAYS + 1]:
                del buffers.tables[old]
            buffers.tables[key] = Replay(
                self.device.queue, lambda: self._steps(buffers, k, x, y, None, sent, counts, status)
            )
        buffers.tables[key]()

    def _steps(self, buffers: RunBuffers, k: int, x, y, after, sent: tuple[int, int], counts: int, status) -> None:
        units, inputs = self.sizes
        steps, batch, (sent_at, pitch) = buffers.steps, buffers.batch, sent
        together = max(1, min(steps, DRIVE_BYTES // (3 * BYTES[self.precision] * units * batch)))
        drive = buffers.kept(("drive", k), (together * batch, 3 * units), x.dtype)
        rec = buffers.kept(("rec", k), (batch, 3 * units), x.dtype)
        pairs = -(-self.units // 2)
        blocks = -(-pairs // CELL_THREADS)
        parts = -(-batch // _samples(batch * blocks, CELL_BLOCKS * self.device.multiprocessors))
        # What a warp writes shares no sector of memory with another's.
        sums, sums_pitch = 0, -(-pairs // LANES) * LANES
        if counts:
            sums = buffers.kept(("sums", k), (steps * parts, sums_pitch), np.uint16).data.ptr
        for begin in range(0, steps, together):
            rows = min(together, steps - begin) * batch
            self.cublas.product(self.precision, x[begin * batch :], self.w_in, drive, rows, inputs, 3 * units)
            for t in range(begin, begin + rows // batch):
                self.cublas.product(self.precision, y, self.w_rec, rec, batch, units, 3 * units)
                self._launch(
                    "cells", cells_kernel, (blocks, parts), CELL_THREADS,
                    drive[(t - begin) * batch :].data.ptr, rec.data.ptr, self.vectors.data.ptr,
                    buffers.cells[k].data.ptr, y.data.ptr, sent_at + 4 * t * batch * pitch,
                    0 if after is None else after[t].data.ptr, self.units, units, pitch, batch,
                    sums and sums + 2 * t * parts * sums_pitch, sums_pitch, status.data.ptr,
                )  # fmt: skip
        if counts:
            kernel = self.device.kernel(("count_pairs",), count_pairs_kernel, CELL_THREADS)
            self.device.launch(
                kernel, (blocks, count_threads(steps * parts)), CELL_THREADS,
                sums, pairs, sums_pitch, steps * parts, counts, counts + 8 * self.units,
            )  # fmt: skip

    def _narrow(self, dense, pitch: int, n: int, out, width: int, rows: int, status) -> None:
        self._launch(
            "round_rows",
            round_rows_kernel,
            rows,
            ROW_THREADS,
            dense.data.ptr,
            pitch,
            n,
            width,
            out.data.ptr,
            status.data.ptr,
        )

    def _launch(self, name: str, make, blocks, threads: int, *arguments: int) -> None:
        if min(blocks if isinstance(blocks, tuple) else (blocks,)):
            kernel = self.device.kernel((name, self.precision), lambda: make(self.precision), threads)
            self.device.launch(kernel, blocks, threads, *arguments)


def exact_because(layer: Layer, precision: str) -> str | None:
    """Why a layer cannot go through tensor cores; None where it can."""
    if layer.cell.variant == "paper":
        return "the paper's candidate waits for a gate within its product"
    weights = (layer.w_in.floats(), layer.w_rec.floats())
    if precision == "float16" and any(np.abs(each).max(initial=0) > FLOAT16_MAX for each in weights):
        return "float16 cannot hold its weights"
    return None


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


def _samples(items: int, blocks: int) -> int:
    """Of one thread of the cells: what all blocks at once leave it, shared out evenly, in turns if it could not sum."""
    turns = -(-items // (blocks * MAX_SUMMED))
    return -(-items // (blocks * turns))


def _up(size: int) -> int:
    return -(-size // PADDED_TO) * PADDED_TO


def _padded(dense: np.ndarray) -> np.ndarray:
    """(n_pre, 3N), rows and each gate's columns padded with zeros."""
    n_pre, units = dense.shape[0], dense.shape[1] // 3
    padded = np.zeros((_up(n_pre), 3, _up(units)), np.float32)
    padded[:n_pre, :, :units] = dense.reshape(n_pre, 3, units)
    return padded.reshape(len(padded), -1)


def _rounded(device: Device, matrix: np.ndarray, precision: str) -> Any:
    """On the device, to the nearest that the precision has, ties to even; for tf32 the product rounds."""
    if precision == "float16":
        return device.put(matrix.astype(np.float16).view(np.uint16))
    if precision == "bfloat16":
        words = matrix.view(np.uint32)
        return device.put(((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16))
    return device.put(matrix)
