"""Dense layers of few streams on the tensor cores of all blocks: plans, weights, and the kernel as plain Python."""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.cuda import tensor_core_layer
from eventrnn.cuda.kernels.tensor_core_grid import units_of_steps
from eventrnn.cuda.plan import Chip
from eventrnn.cuda.tensor_core_grid import GridPlan, grid_fragments, grid_plan
from support import emulated_gpu
from support.tensor_cores import check_bound, check_goes_on, through_tensor_cores


def dense(units: int, batch: int, steps: int, activity: float = 0.1):
    """A layer and its inputs, (steps, batch, units)."""
    rng = np.random.default_rng(units)
    network = random_network(units, 1, sparsity=0.0, format="dense", block=None, variant="evnn", rng=rng)
    inputs = random_events(steps, batch, units, activity, rng)
    return at_activity(network, inputs, activity), inputs


def test_plans_hold_every_weight_once():
    chip = Chip(132, 227 << 10, {})
    for units in (20, 512, 1024, 1344, 1350, 1500):
        plan = grid_plan(units, 8, chip)
        assert plan.blocks <= chip.multiprocessors and plan.shared(8) <= chip.shared_bytes
        words = np.arange(1, 3 * units + 1, dtype=np.uint16)[None, :] + np.zeros((units, 1), np.uint16)
        held = grid_fragments(words, plan).view(np.uint16)
        # A weight is told by its column here; every column has one for each unit before.
        assert np.array_equal(np.bincount(held.ravel())[1:], np.full(3 * units, units))
        assert np.array_equal(
            np.sort(units_of_steps(plan.steps, plan.warps).ravel()), np.arange(16 * plan.steps * plan.warps)
        )


@pytest.mark.parametrize(
    ("precision", "units", "batch", "tiles", "steps", "blocks"),
    [("float16", 29, 1, 3, 1, 2), ("bfloat16", 10, 3, 2, 3, 1), ("float16", 4, 7, 1, 2, 1)],
)
def test_emulated_blocks_are_within_the_bound(monkeypatch, precision, units, batch, tiles, steps, blocks):
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    device = emulated_gpu.install(monkeypatch)
    plan = GridPlan(tiles, steps, 4, blocks)
    monkeypatch.setattr(tensor_core_layer, "grid_plan", lambda *arguments: plan)
    network, inputs = dense(units, batch, 12)
    check_bound(precision, network, inputs.to_dense(), grid=f" in {blocks} blocks")
    assert "tensor_grid" in device.launched


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize(("units", "batch"), [(1350, 1), (1501, 8), (900, 3), (1024, 2)])
def test_blocks_on_a_gpu_are_within_the_bound(precision, units, batch):
    network, inputs = dense(units, batch, 20)
    blocks = through_tensor_cores(network, batch).engine.packed.tensors[0].grid(batch).plan.blocks
    check_bound(precision, network, inputs.to_dense(), grid=f" in {blocks} blocks")


@pytest.mark.gpu
def test_blocks_on_a_gpu_go_on_where_a_state_stands(monkeypatch):
    network, inputs = dense(1100, 3, 40)
    # Seven steps per chunk.
    check_goes_on(
        network,
        inputs.to_dense(),
        lambda: monkeypatch.setattr(tensor_core_layer, "DRIVE_BYTES", 7 * 6 * 1104 * 3),
    )
