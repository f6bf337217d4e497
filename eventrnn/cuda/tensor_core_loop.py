"""The time loop of a layer on tensor cores in clusters of blocks (`kernels/tensor_core_cluster.py`)."""

from __future__ import annotations

from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.kernels.tensor_core_cluster import tensor_cluster_kernel
from eventrnn.cuda.kernels.tensor_core_inputs import GROUPS, drives_kernel
from eventrnn.cuda.kernels.tensor_core_pieces import ROW_BYTES, TILE
from eventrnn.cuda.run_buffers import pitch_of
from eventrnn.cuda.tensor_core_tiles import TilePlan, Tiles, block_table, spare_multiprocessors

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.cuda.run_buffers import RunBuffers

# Bytes of a buffer of input drives, and threads per block of the kernel that computes them.
DRIVE_BYTES, DRIVE_THREADS = 384 << 20, 512

# Side by side with the time loop, the input drives of the first steps are computed alone. Each later chunk of steps has
# twice as many as the one before, because its drives take less time than these steps.
FIRST_STEPS = 96


def fits(inputs: int, shared_bytes: int) -> bool:
    """Whether the kernel of the input products has room for so many inputs."""
    return GROUPS[-1] * ROW_BYTES * (inputs + 1) <= shared_bytes


def chunks(steps: int, most: int, growing: bool) -> list[range]:
    """The steps whose input drives are computed together, at most `most`.

    growing : every chunk has about twice as many steps as the one before, and the first one at most FIRST_STEPS
    """
    first, count = steps, 1
    while growing and first > FIRST_STEPS:
        count += 1
        first = -(-steps // (2**count - 1))
    sizes = [first << k for k in range(count)]
    sizes = [size for size in sizes if size <= most]
    # What is left, in equal parts.
    left = max(0, steps - sum(sizes))
    sizes += [-(-left // -(-left // most))] * -(-left // most) if left else []
    ends = np.minimum(np.cumsum(sizes), steps).tolist()
    return [range(begin, end) for begin, end in pairwise([0, *ends]) if end > begin]


class InputTiles:
    """The input weights of a layer as tiles on the device. All loops of the layer read them.

    tiles   : tiles with an even number of steps each
    weights : addresses of `begins`, `values` and `rows` (`kernels/tensor_core_inputs.py`)
    """

    def __init__(self, device: Device, tiles: Tiles):
        self.inputs, self.count = tiles.n_pre, tiles.count
        # The kernel loads four steps ahead.
        values = np.pad(tiles.fragments, ((0, 4), (0, 0), (0, 0)))
        rows = np.pad(tiles.rows, ((0, 4), (0, 0))).astype(np.uint16)
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
        batch, device = buffers.batch, self.device
        pairs, clusters, columns = self.plan.pairs, self.plan.clusters(batch), TILE * self.w_in.count
        spare = spare_multiprocessors(self.plan, batch, device.multiprocessors)
        # The drives of a chunk are computed while the time loop reads those of the chunk before from another buffer.
        count = 2 if spare else 1
        found = chunks(buffers.steps, max(1, DRIVE_BYTES // (4 * pairs * clusters * columns)), spare > 0)
        shape = max(map(len, found)) * clusters, columns, pairs
        drives = [buffers.scratch(("drives", k, number), shape, np.int32) for number in range(min(count, len(found)))]
        if k == 0:
            source = *(each.data.ptr for each in table), 0 if row_of is None else row_of.data.ptr
        else:
            source = buffers.event_logs[k - 1][1:].data.ptr, pitch_of(self.w_in.inputs), 0, 0

        def enqueue_drives(number: int, **where: Any) -> None:
            sizes = batch * found[number].start, len(found[number]) * clusters, batch, clusters
            self._run_drives(k > 0, *source, *sizes, pairs, drives[number % count].data.ptr, status.data.ptr, **where)

        enqueue_drives(0)
        for number, chunk in enumerate(found):
            free = device.queue.record()
            drive = drives[number % count].data.ptr
            self._enqueue_steps(buffers, k, chunk, drive, after, sent, counts, status)
            if number + 1 == len(found):
                return
            if not spare:
                enqueue_drives(number + 1)
                continue
            # The time loop was launched before, so that its clusters find their multiprocessors free.
            stream, queue = self._side
            queue.wait_event(free)
            enqueue_drives(number + 1, most=spare, stream=stream)
            device.queue.wait_event(queue.record())

    @cached_property
    def _side(self) -> tuple[Any, Any]:
        """The stream of what is computed side by side with the time loop, and the same stream for CuPy."""
        return self.device.new_stream()

    def _run_drives(
        self,
        dense: bool,
        *arguments: int,
        most: int | None = None,
        stream: Any = None,
    ) -> None:
        """Launch the kernel of the input products, with at most `most` blocks.

        arguments : those of the kernel, without what belongs to the weights
        """
        inputs, device = self.w_in.inputs, self.device
        *source, row_0, groups, batch, clusters, pairs, drive, status = arguments
        groups_each = next(each for each in GROUPS if each * ROW_BYTES * (inputs + 1) <= device.shared_bytes)
        blocks = -(-groups // groups_each)
        kernel = device.kernel(
            ("drives of tiles", self.precision, groups_each, dense),
            partial(drives_kernel, self.precision, groups_each, dense),
            DRIVE_THREADS,
        )
        sizes = row_0, groups, batch, clusters, inputs
        arguments = *source, *sizes, *self.w_in.weights, self.w_in.count, pairs, drive, status
        device.launch(
            kernel,
            blocks if most is None else min(blocks, most),
            DRIVE_THREADS,
            *arguments,
            shared=groups_each * ROW_BYTES * (inputs + 1),
            stream=stream,
        )

    def _enqueue_steps(
        self, buffers: RunBuffers, k: int, chunk: range, drive: int, after, sent: tuple[int, int], counts: int, status
    ) -> None:
        """Put some steps of the time loop on the stream. drive : address of their input drives"""
        sent_at, pitch = sent
        batch, columns = buffers.batch, TILE * self.w_in.count
        row = 4 * batch * pitch
        outputs = buffers.outputs[k].data.ptr, self.units
        before = (sent_at + (chunk.start - 1) * row, pitch) if chunk.start else outputs
        addresses = self._blocks, self.vectors.data.ptr, drive, buffers.cells[k].data.ptr
        after_at = 0 if after is None else after[chunk.start].data.ptr
        clusters = self.plan.clusters(batch)
        bytes_per_step = 4 * self.plan.pairs * columns * clusters, row, 4 * batch * self.units
        sizes = self.units, self.vectors.shape[1], columns, pitch, batch, len(chunk), *bytes_per_step
        clocks = 0 if self.clocks is None else self.clocks.data.ptr
        arguments = *addresses, *before, sent_at + chunk.start * row, after_at, *sizes, counts, status.data.ptr, clocks
        self._run_clusters(clusters, arguments)

    def _run_clusters(self, clusters: int, arguments: tuple[int, ...]) -> None:
        plan, device = self.plan, self.device
        sizes = plan.blocks, plan.pairs, plan.own_pairs, plan.held, plan.held_tiles, plan.senders
        options = self.precision, *sizes, self.clocks is not None
        make = partial(tensor_cluster_kernel, *options)
        kernel = device.kernel(("tensor_cluster", *options), make, plan.threads)
        device.launch(kernel, clusters * plan.blocks, plan.threads, *arguments, shared=plan.shared, cluster=plan.blocks)
