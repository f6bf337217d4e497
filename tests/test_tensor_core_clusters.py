"""Layers on tensor cores in clusters of blocks: tiles, plans, and the kernel as plain Python, within derived bounds."""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.cuda import tensor_core_loop, tensor_core_tiles
from support import emulated_gpu
from test_cuda_streams import check_bound, through_tensor_cores


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


def sparse(units: int, batch: int, steps: int, seed: int = 0, **how):
    """A layer and its inputs, (steps, batch, units)."""
    rng = np.random.default_rng(seed)
    how = {"sparsity": 0.8, "format": "block", "block": (1, 32)} | how
    network = random_network(units, 1, variant="evnn", rng=rng, **how)
    inputs = random_events(steps, batch, units, 0.2, rng)
    return at_activity(network, inputs, 0.2), inputs


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("units", "batch", "how"),
    [
        (300, 1, {}),
        (300, 3, {"format": "csr", "block": None}),
        (333, 21, {"block": (4, 8)}),
        (512, 64, {}),
        (270, 130, {"format": "dense", "block": None, "sparsity": 0.0}),
    ],
)
def test_clusters_on_a_gpu_are_within_the_bound(precision, units, batch, how):
    network, inputs = sparse(units, batch, 20, **how)
    simulator = through_tensor_cores(network, batch, precision)
    path = simulator.engine.paths(batch)["layers.0.w_rec"]
    assert " in clusters of " in path
    check_bound(precision, network, inputs.to_dense(), path.removeprefix(f"tensor {precision}"))


@pytest.mark.gpu
def test_clusters_on_a_gpu_go_on_where_a_state_stands(monkeypatch):
    network, inputs = sparse(300, 5, 40)
    whole = through_tensor_cores(network, 5).run(inputs, record=("events", "states"))
    # Several chunks of steps in one run, and several runs.
    monkeypatch.setattr(tensor_core_loop, "CHUNK_BYTES", 1 << 18)
    for lengths in ((40,), (1, 22, 17)):
        simulator, begin = through_tensor_cores(network, 5), 0
        for length in lengths:
            part = simulator.run(inputs.to_dense()[begin : begin + length], record=("events", "states"))
            assert np.array_equal(part.states[0], whole.states[0][begin : begin + length])
            assert np.array_equal(part.fired[0].total, (part.events[0].to_dense() != 0).sum(axis=(0, 1)))
            begin += length
        assert np.array_equal(simulator.state.cells[0], whole.state.cells[0])


@pytest.mark.gpu
def test_layers_of_clusters_on_a_gpu_read_the_layer_below():
    rng = np.random.default_rng(1)
    network = random_network(300, 2, sparsity=0.8, format="block", block=(1, 32), variant="evnn", rng=rng)
    inputs = random_events(20, 9, 300, 0.2, rng)
    network = at_activity(network, inputs, 0.2)
    path = through_tensor_cores(network, 9).engine.paths(9)["layers.1.w_rec"]
    check_bound("float16", network, inputs.to_dense(), path.removeprefix("tensor float16"))
