"""Layers whose recurrent matrix has gated blocks: their plan, and their launch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.gated_matrix import MIN_WORKERS, GatedMatrix, Owned, RowStrips, need_shared
from eventrnn.cuda.kernels.gated_loop import gated_layer_kernel
from eventrnn.cuda.plan import MIN_TILE_WIDTH
from eventrnn.cuda.run_buffers import UNWRITTEN_BYTE, pitch_of
from eventrnn.cuda.tables import LANES, LAYER_STAGE_BYTES, MAX_SAMPLES, RESIDENT_STEPS
from eventrnn.weights import MatrixId

if TYPE_CHECKING:
    from eventrnn.cells import Cell
    from eventrnn.cuda.device import Device
    from eventrnn.cuda.run_buffers import RunBuffers
    from eventrnn.network import Layer


@dataclass(frozen=True)
class GatedPlan:
    """How a layer is placed on blocks, for one batch size.

    Attributes
    ----------
    tiles, samples : tiles of units and samples that a block owns
    spread, groups : blocks of a group of samples, and groups that run at the same time
    matrix, places : tables of the matrix and of shared memory, on the GPU
    shared         : bytes of shared memory of a block
    alone          : whether a block computes all logits by itself (`kernels/gated_factors.py`)
    in_pieces      : whether products go through `kernels/gated_pieces.py`
    """

    tiles: int
    samples: int
    spread: int
    groups: int
    matrix: Any
    places: Any
    shared: int
    alone: bool
    in_pieces: bool


class GatedLayer:
    """A layer whose recurrent matrix has gated blocks; its input drives are computed before it is launched.

    Attributes
    ----------
    w_rec  : the recurrent matrix
    stamps : None, or the array (steps, blocks, `tables.STAMPS`) int64 on the GPU that gets the clocks of the phases of
             later runs (`gated_loop.py`). Set it before the first run of a shape, for one launch of all samples
    """

    def __init__(self, device: Device, layer: Layer, w_rec: GatedMatrix):
        self.device, self.units, self.w_rec = device, layer.units, w_rec
        self.cell: Cell = layer.cell
        self.stamps: Any = None
        with device.on_stream():
            self.thresholds = device.put(np.asarray(layer.threshold, np.float32))
        self._plans: dict[tuple[int, bool], GatedPlan] = {}
        self._strips: dict[tuple[int, int, int], tuple[Any, tuple[int, int]]] = {}

    def plan(self, batch: int, steps: int = 1) -> GatedPlan:
        """The plan for a batch size: more groups of samples for more samples, and fewer blocks per group.

        In runs of RESIDENT_STEPS or more, blocks choose alone where they can. Raises ValueError where not even one
        sample fits into shared memory.
        """
        alone = steps >= RESIDENT_STEPS and self.w_rec.chooses_alone
        if (batch, alone) not in self._plans:
            self._plans[batch, alone] = self._planned(batch, alone)
        return self._plans[batch, alone]

    def _planned(self, batch: int, alone: bool) -> GatedPlan:
        device, weights, gates = self.device, self.w_rec.weights, self.w_rec.gates
        groups = min(batch, MAX_SAMPLES, device.multiprocessors)
        share = device.multiprocessors // groups
        width = int(np.clip(-(-self.units // share), MIN_TILE_WIDTH, LANES))
        # A strip of two block columns reads what either of them chose, which takes longer. Where it needs no further
        # tile per block, no strip has two.
        span, column = self.units, weights.block[1]
        all_tiles, aligned = -(-self.units // width), self.units // column * -(-column // width)
        if self.units % column == 0 and -(-aligned // share) == -(-all_tiles // share):
            span, all_tiles = column, aligned
        tiles = -(-all_tiles // share)
        spread = -(-all_tiles // tiles)
        logit_width = min(-(-weights.n_blocks // spread), LANES)
        if (width, span, logit_width) not in self._strips:
            strips = RowStrips.of_blocks(weights, gates, width, span)
            self._strips[width, span, logit_width] = self.w_rec.table(strips, logit_width, LAYER_STAGE_BYTES)
        matrix, (logits, inner) = self._strips[width, span, logit_width]
        owned = Owned(tiles, gates, width, span, -(-logits // spread), logit_width)
        offsets = tiles * gates * weights.grid[0] + owned.logits + inner
        groups = max(1, device.multiprocessors // spread)
        for samples in range(min(MAX_SAMPLES, -(-batch // groups)), 0, -1):
            items = max(tiles * gates, owned.logits, inner)
            places, shared = self.w_rec.places(samples, offsets, items, LAYER_STAGE_BYTES, owned, alone)
            # With few rings, fewer samples per block are faster.
            enough = places[tables.WORKERS] >= min(items, MIN_WORKERS) and shared <= device.shared_bytes
            if enough or samples == 1:
                break
        if alone and (samples > 1 or shared > device.shared_bytes):
            return self.plan(batch)
        need_shared(weights, shared, device.shared_bytes)
        with device.on_stream():
            groups = min(groups, -(-batch // samples))
            kernel = alone, bool(places[tables.IN_PIECES])
            return GatedPlan(tiles, samples, spread, groups, matrix, device.put(places), shared, *kernel)

    def enqueue(self, buffers: RunBuffers, k: int, drive: Any, after: Any, status: Any) -> None:
        """Put all steps of layer k on the stream.

        drive : (steps * batch, gates * units) float32, its input drives
        after : (steps, batch, units) float32 for the cells after each step, or None
        """
        device, steps, batch, plan = self.device, buffers.steps, buffers.batch, self.plan(buffers.batch, buffers.steps)
        logit_pitch, pitch = pitch_of(self.w_rec.weights.n_blocks), pitch_of(self.units)
        logits = buffers.scratch(("logits", k), (steps, batch, logit_pitch), np.float32)
        logits.data.memset_async(UNWRITTEN_BYTE, logits.nbytes)
        held = buffers.hold(MatrixId.of(k, "w_rec"))
        fields = {
            tables.ROW_UNITS: self.units,
            tables.ROW_PITCH: pitch,
            tables.ROW_LOG: buffers.event_logs[k].data.ptr,
            tables.ROW_DRIVE: drive.data.ptr,
            tables.ROW_CELLS: buffers.cells[k].data.ptr,
            tables.ROW_STATES: 0 if after is None else after.data.ptr,
            tables.ROW_THRESHOLDS: self.thresholds.data.ptr,
            tables.ROW_LOGITS: logits.data.ptr,
            tables.ROW_LOGIT_PITCH: logit_pitch,
            tables.ROW_HELD_BEFORE: held[0],
            tables.ROW_LEFT_BEFORE: held[1],
            tables.ROW_HELD: held[2],
            tables.ROW_LEFT: held[3],
            tables.ROW_STAMPS: 0 if self.stamps is None else self.stamps.data.ptr,
        }
        key, table = ("gated layer", k), np.array([fields[f] for f in range(tables.ROW_FIELDS)], np.int64)
        if after is not None:
            # The table holds the address of `after`, which the caller frees. Graphs keep using the other table.
            row = device.put(table)
        else:
            if key not in buffers.tables:
                buffers.tables[key] = device.put(table)
            row = buffers.tables[key]
        kind, narrow, threads = (self.cell.name, self.cell.variant), self.w_rec.narrow, LANES * self.w_rec.warps
        options = kind, narrow, self.stamps is not None, plan.alone, plan.in_pieces
        kernel = device.kernel(("gated_layer", *options), lambda: gated_layer_kernel(*options), threads)
        for first in range(0, batch, plan.groups * plan.samples):
            groups = min(plan.groups, -(-(batch - first) // plan.samples))
            arguments = plan.matrix.data.ptr, plan.places.data.ptr, row.data.ptr, status.data.ptr, steps, batch, first
            device.launch(
                kernel,
                groups * plan.spread,
                threads,
                *arguments,
                *(plan.spread, plan.tiles, plan.samples),
                shared=plan.shared,
                cooperative=True,
            )
