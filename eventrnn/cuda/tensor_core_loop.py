"""The time loop of a layer on tensor cores in clusters of blocks (`kernels/tensor_core_cluster.py`)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.kernels.tensor_core_cluster import ROW_BYTES, SAMPLES, TILE, tensor_cluster_kernel
from eventrnn.cuda.kernels.tensor_core_inputs import GROUPS, columns_kernel, drives_kernel, scatter_kernel
from eventrnn.cuda.run_buffers import pitch_of
from eventrnn.cuda.tables import LANES
from eventrnn.cuda.tensor_core_tiles import TilePlan, Tiles, block_table

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.cuda.run_buffers import RunBuffers

# Bytes of the input drives, and of the inputs as columns, of the steps that are computed together.
CHUNK_BYTES = 128 << 20

# Threads per block of the kernels for inputs and for their products.
ROW_THREADS, DRIVE_THREADS = 256, 512


def fits(inputs: int, shared_bytes: int) -> bool:
    """Whether the kernel of the input products has room for so many inputs."""
    return GROUPS * ROW_BYTES * (inputs + 1) <= shared_bytes


class InputTiles:
    """The input weights of a layer as tiles on the device. All loops of the layer read them.

    tiles   : tiles with an even number of steps each
    weights : addresses of `begins`, `values` and `rows` (`kernels/tensor_core_inputs.py`)
    """

    def __init__(self, device: Device, tiles: Tiles):
        self.inputs, self.count = tiles.n_pre, tiles.count
        # The kernel loads two steps ahead.
        values = np.pad(tiles.fragments, ((0, 2), (0, 0), (0, 0)))
        rows = np.pad(tiles.rows, ((0, 2), (0, 0))).astype(np.uint16)
        self._arrays = [device.put(each) for each in (tiles.begins, values, rows)]
        self.weights = tuple(each.data.ptr for each in self._arrays)


class TileLoop:
    """The recurrent weights of a layer as tiles on the device, and its steps. It serves any number of samples.

    vectors : see `TensorLayer`; padded : the number of its columns
    clocks  : (blocks, warps, `tables.TURN_PHASES`) int64 on the device, to which the kernel writes the cycles of its
              phases; None, except while `experiments/gpu_phases.py` measures
    """

    def __init__(self, device: Device, precision: str, w_in: InputTiles, w_rec: Tiles, vectors: Any, plan: TilePlan):
        self.device, self.precision, self.vectors, self.plan = device, precision, vectors, plan
        self.units, self.w_in = w_rec.units, w_in
        self.clocks: Any = None
        self._arrays: list[Any] = []
        self._blocks = self._put(block_table(w_rec, plan, self._put))

    def _put(self, array: np.ndarray) -> int:
        """The address of a copy of the array on the device."""
        self._arrays.append(self.device.put(array))
        return self._arrays[-1].data.ptr

    def enqueue(
        self, buffers: RunBuffers, k: int, table, row_of, after, sent: tuple[int, int], counts: int, status
    ) -> None:
        """Put all steps of layer k on the stream; see `TensorLayer.enqueue`."""
        steps, batch, (sent_at, pitch) = buffers.steps, buffers.batch, sent
        width, clusters = 2 * self.plan.pairs, self.plan.clusters(batch)
        inputs, columns = self.w_in.inputs, TILE * self.w_in.count
        per_step = ROW_BYTES * clusters * max(columns, inputs + 1)
        chunk = max(1, min(steps, CHUNK_BYTES // per_step))
        groups = -(-chunk * clusters // GROUPS) * GROUPS
        x = buffers.scratch(("columns", k), (groups, inputs + 1, SAMPLES), np.uint16)
        drive = buffers.scratch(("drives", k), (chunk * clusters, columns, width // 2), np.int32)
        for begin in range(0, steps, chunk):
            own = min(chunk, steps - begin)
            x.data.memset_async(0, x.nbytes)
            if k == 0:
                lists = *(each.data.ptr for each in table), 0 if row_of is None else row_of.data.ptr
                arguments = *lists, begin * batch, own * batch, batch, width, clusters, inputs
                blocks = -(-own * batch // (ROW_THREADS // LANES))
                self._launch("scatter", scatter_kernel, blocks, ROW_THREADS, *arguments, x.data.ptr, status.data.ptr)
            else:
                below = buffers.event_logs[k - 1][1 + begin :]
                arguments = below.data.ptr, pitch_of(inputs), batch, width, clusters, inputs
                pointers = x.data.ptr, status.data.ptr
                self._launch("columns", columns_kernel, own * clusters, ROW_THREADS, *arguments, *pointers)
            sizes = inputs, self.w_in.count, own * clusters, self.plan.pairs
            arguments = x.data.ptr, *self.w_in.weights, *sizes, drive.data.ptr
            shared = GROUPS * ROW_BYTES * (inputs + 1)
            blocks = -(-own * clusters // GROUPS)
            self._launch("drives", drives_kernel, blocks, DRIVE_THREADS, *arguments, shared=shared)
            row = 4 * batch * pitch
            outputs = buffers.outputs[k].data.ptr, self.units
            before = (sent_at + (begin - 1) * row, pitch) if begin else outputs
            addresses = self._blocks, self.vectors.data.ptr, drive.data.ptr, buffers.cells[k].data.ptr
            after_at = 0 if after is None else after[begin].data.ptr
            sizes = self.units, self.vectors.shape[1], columns, pitch, batch, own
            clocks = 0 if self.clocks is None else self.clocks.data.ptr
            arguments = *addresses, *before, sent_at + begin * row, after_at, *sizes, counts, status.data.ptr, clocks
            self._run_clusters(clusters, arguments)

    def _run_clusters(self, clusters: int, arguments: tuple[int, ...]) -> None:
        plan, device = self.plan, self.device
        options = self.precision, plan.blocks, plan.pairs, plan.held, self.clocks is not None
        make = partial(tensor_cluster_kernel, *options)
        kernel = device.kernel(("tensor_cluster", *options), make, plan.threads)
        device.launch(kernel, clusters * plan.blocks, plan.threads, *arguments, shared=plan.shared, cluster=plan.blocks)

    def _launch(self, name: str, make, blocks: int, threads: int, *arguments: int, shared: int = 0) -> None:
        kernel = self.device.kernel((f"{name} of tiles", self.precision), partial(make, self.precision), threads)
        self.device.launch(kernel, blocks, threads, *arguments, shared=shared)
