"""The kernel of the cluster plan, run as plain Python: bits of the specification, and exchanges that do not end."""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.cuda import cluster_plan
from eventrnn.simulation import simulate
from support import emulated_gpu
from support.conformance import assert_same

STEPS = 4


def install(monkeypatch, clusters: int, blocks: int = 2):
    """An emulated GPU on which so many clusters of `blocks` blocks are resident."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    device = emulated_gpu.install(monkeypatch)
    monkeypatch.setattr(type(device), "clusters", lambda self, size: clusters if size == blocks else 0)
    return device


# The gates of 70 units begin within a strip.
@pytest.mark.parametrize(
    ("units", "layers", "batch", "clusters", "blocks", "dtype", "warps"),
    [
        (70, 1, 1, 1, 2, "float32", 24),
        (64, 2, 1, 3, 2, "bfloat16", 24),
        (64, 1, 2, 1, 2, "bfloat16", 24),
        (64, 1, 1, 1, 2, "bfloat16", 2),
        (70, 1, 1, 1, 3, "bfloat16", 24),
    ],
    ids=["one-stream", "two-layers", "two-streams-in-a-cluster", "two-strips-per-warp", "three-blocks"],
)
def test_emulated_clusters_have_the_bits_of_the_specification(
    monkeypatch, units, layers, batch, clusters, blocks, dtype, warps
):
    device, rng = install(monkeypatch, clusters, blocks), np.random.default_rng(units)
    monkeypatch.setattr(cluster_plan, "CLUSTER_WARPS", warps)
    network = random_network(
        units, layers, sparsity=0.7, format="block", block=(1, 32), variant="evnn", rng=rng, dtype=dtype
    )
    inputs = random_events(STEPS, batch, units, 0.3, rng)
    network = at_activity(network, inputs, 0.3)
    expected = simulate(network, inputs, backend="reference", record=("events", "states"))
    got = simulate(network, inputs, backend="cuda", record=("events", "states"))
    assert "cluster" in device.launched
    assert all(0.1 < activity < 0.6 for activity in expected.activity)
    assert_same(expected, got)


def test_a_cluster_whose_outputs_do_not_arrive_reports_a_fault(monkeypatch):
    from eventrnn.cuda.kernels import cluster_stream

    install(monkeypatch, 1)
    rng = np.random.default_rng(0)
    network = random_network(64, 1, sparsity=0.7, format="block", block=(1, 32), variant="evnn", rng=rng)
    monkeypatch.setattr(cluster_stream, "MAX_POLLS", np.int32(3))
    monkeypatch.setitem(emulated_gpu.CLUSTERS, "store_async", lambda *given: None)
    with pytest.raises(RuntimeError, match="events that never came"):
        simulate(network, np.ones((2, 1, 64), np.float32), backend="cuda")
