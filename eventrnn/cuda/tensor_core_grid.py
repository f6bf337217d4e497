"""The time loop of a dense layer with few streams on all tensor cores (`kernels/tensor_core_grid.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.kernels.tensor_core_grid import (
    MAX_SAMPLES,
    OWN_UNITS,
    sums_pitch,
    tensor_grid_kernel,
    units_of_steps,
)
from eventrnn.cuda.kernels.tensor_core_pieces import TILE
from eventrnn.cuda.tables import LANES
from eventrnn.cuda.tensor_core_tiles import REGISTERS, fragments_of

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.cuda.plan import Chip
    from eventrnn.cuda.run_buffers import RunBuffers

# Warps per block that a plan may choose.
WARPS = (4, 8, 12, 16)

# Registers that a thread can have, and those that it needs without weights and outputs.
MAX_REGISTERS, OWN_REGISTERS = 255, 66


@dataclass(frozen=True)
class GridPlan:
    """How all blocks run a layer. tiles: per block; steps: per warp; warps: per block."""

    tiles: int
    steps: int
    warps: int
    blocks: int

    def shared(self, batch: int) -> int:
        """Bytes of shared memory per block."""
        return 2 * batch * TILE * self.tiles * 4 * sums_pitch(self.warps)

    @property
    def log_pitch(self) -> int:
        """Words of a row of the log: pairs of the units that the warps read, and of those that the blocks own."""
        words = max(TILE * self.steps * self.warps, OWN_UNITS[self.tiles] * self.blocks) // 2
        return -(-words // 4) * 4


def grid_plan(units: int, batch: int, chip: Chip) -> GridPlan | None:
    """The plan with the fewest tiles per block, then the fewest steps; None where registers do not hold the weights."""
    for tiles, own in OWN_UNITS.items():
        blocks = -(-units // own)
        if blocks > chip.multiprocessors or batch > MAX_SAMPLES:
            continue
        found = []
        for warps in WARPS:
            steps = -(-units // (TILE * warps))
            # Registers are given to a thread in eights. A step has four words per tile and two of outputs.
            room = min(MAX_REGISTERS, REGISTERS // (LANES * warps) // 8 * 8) - OWN_REGISTERS
            plan = GridPlan(tiles, steps, warps, blocks)
            if (4 * tiles + 2) * steps <= room and plan.shared(batch) <= chip.shared_bytes:
                found.append(plan)
        return min(found, key=lambda each: (each.steps * each.warps, each.steps), default=None)
    return None


def grid_fragments(words: np.ndarray, plan: GridPlan) -> np.ndarray:
    """The weights as the kernel holds them, (blocks, warps * steps, tiles, LANES, 4) int32.

    words : (units, 3 * units) uint16, rounded
    """
    units, own = len(words), OWN_UNITS[plan.tiles]
    # A last row and a last column of zeros serve what there is not.
    padded = np.zeros((units + 1, 3 * units + 1), np.uint16)
    padded[:units, :-1] = words
    rows = np.minimum(units_of_steps(plan.steps, plan.warps), units)
    unit = own * np.arange(plan.blocks)[:, None, None] + np.arange(own)
    gates = np.where(unit < units, unit + units * np.arange(3)[:, None], 3 * units)
    columns = np.full((plan.blocks, TILE * plan.tiles), 3 * units)
    columns[:, : 3 * own] = gates.reshape(plan.blocks, -1)
    return fragments_of(padded, rows[:, None], columns.reshape(plan.blocks, 1, plan.tiles, TILE))


class GridLoop:
    """The recurrent weights of a layer in the registers of the device.

    vectors : see `TensorLayer`
    """

    def __init__(self, device: Device, precision: str, words: np.ndarray, vectors: Any, plan: GridPlan):
        self.device, self.precision, self.vectors, self.plan, self.units = device, precision, vectors, plan, len(words)
        self.fragments = device.put(grid_fragments(words, plan))

    def enqueue(
        self, buffers: RunBuffers, k: int, drive, y, sent: tuple[int, int], after: int, steps: int, counts: int, status
    ) -> None:
        """Put some steps of layer k on the stream.

        drive : (steps * batch, 3 * padded) rounded input products
        y     : (batch, padded) rounded outputs, updated in place
        sent  : address and pitch of the (steps, batch, pitch) float32 outputs; after : address of the cells after each
                step, or 0; counts : address of the event counts, or 0
        """
        plan, batch = self.plan, buffers.batch
        log = buffers.scratch(("log", k), (buffers.steps + 1, batch, plan.log_pitch), np.int32)
        log.data.memset_async(0xFF, 4 * (steps + 1) * batch * plan.log_pitch)
        options = self.precision, plan.tiles, plan.steps, plan.warps
        threads = LANES * plan.warps
        kernel = self.device.kernel(("tensor_grid", *options), partial(tensor_grid_kernel, *options), threads)
        arrays = self.fragments, self.vectors, drive, y, buffers.cells[k], log
        sizes = plan.log_pitch, self.units, self.vectors.shape[1], sent[1], batch, steps
        arguments = *(each.data.ptr for each in arrays), sent[0], after, *sizes, counts, status.data.ptr
        self.device.launch(kernel, plan.blocks, threads, *arguments, shared=plan.shared(batch), cooperative=True)
