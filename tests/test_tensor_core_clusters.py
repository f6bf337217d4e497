"""Layers on tensor cores in clusters of blocks: tiles, plans, and the kernel as plain Python, within derived bounds."""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.cuda import tensor_core_loop, tensor_core_tiles
from eventrnn.cuda.plan import Chip
from support import emulated_gpu
from test_cuda_streams import check_bound


def install(monkeypatch, blocks: int):
    """An emulated GPU on which two clusters of `blocks` blocks are resident, and none of another size."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    device = emulated_gpu.install(monkeypatch)
    monkeypatch.setattr(tensor_core_loop, "DRIVE_THREADS", 64)
    monkeypatch.setattr(tensor_core_tiles, "TILE_WARPS", 3)
    monkeypatch.setattr(type(device), "clusters", lambda self, size: 2 if size == blocks else 0)
    return device


@pytest.mark.parametrize(
    ("precision", "units", "batch", "blocks", "format", "block"),
    [
        ("float16", 21, 1, 2, "block", (1, 8)),
        ("bfloat16", 32, 3, 1, "csr", None),
        ("float16", 40, 9, 3, "block", (4, 4)),
    ],
)
def test_emulated_clusters_are_within_the_bound(monkeypatch, precision, units, batch, blocks, format, block):
    device, rng = install(monkeypatch, blocks), np.random.default_rng(units)
    network = random_network(units, 1, sparsity=0.6, format=format, block=block, variant="evnn", rng=rng)
    inputs = random_events(8, batch, units, 0.3, rng)
    network = at_activity(network, inputs, 0.3)
    check_bound(precision, network, inputs.to_dense(), f" in clusters of {blocks} blocks")
    assert "tensor_cluster" in device.launched
