"""Many streams on tensor cores: within a derived bound of float64, marked inexact, selected where faster."""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable, get_backend
from eventrnn.cells import Cell
from eventrnn.cuda import PRECISIONS, CudaBackend
from eventrnn.cuda.tensor_core_layer import TensorLayer
from eventrnn.network import Network
from eventrnn.simulation import Simulator, simulate
from support.fake_gpu import install
from support.tensor_cores import check_bound, through_tensor_cores


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    return install(monkeypatch)


def streams(units=(13, 9), variant="evnn", batch=6, steps=7) -> tuple[Network, np.ndarray]:
    rng = np.random.default_rng(2)
    network = Network.random(list(units), inputs=11, rng=rng, threshold=0.2, cell=Cell(variant=variant))
    x = rng.standard_normal((steps, batch, 11)) * (rng.random((steps, batch, 11)) < 0.3)
    return network, x.astype(np.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_steps_are_within_the_bound_of_float64(gpu, precision):
    check_bound(precision, *streams(steps=40))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [5, 64])
def test_steps_on_a_gpu_are_within_the_bound_of_float64(monkeypatch, precision, batch):
    # Every step is a product of cuBLAS.
    monkeypatch.setattr(TensorLayer, "loop", lambda self, batch: None)
    monkeypatch.setattr(TensorLayer, "grid", lambda self, batch: None)
    check_bound(precision, *streams(units=(45, 33), steps=30, batch=batch))


def check_counts(units: tuple[int, ...], batch: int) -> None:
    """Demand that the counts of the kernels equal those of the recorded events, also for units that send a 1."""
    network, x = streams(units=units, batch=batch, steps=5)
    for layer in network.layers:
        # u is 0 and g is 1 for these units, so that their cells are 1.
        layer.bias_in[:2], layer.bias_in[2 * layer.units :][:2] = -200, 200
    simulator = through_tensor_cores(network, batch)
    counted, recorded = simulator.run(x), simulator.run(x, record="events")
    simulator.reset()
    again = simulator.run(x, record="events")
    for k, fired in enumerate(counted.fired):
        for result, own in ((again, fired), (recorded, recorded.fired[k])):
            sent = result.events[k].to_dense()
            assert np.array_equal(own.binary, (sent == 1).sum(axis=(0, 1)))
            assert np.array_equal(own.total, (sent != 0).sum(axis=(0, 1)))
        assert (fired.binary[:2] == 5 * batch).all() and fired.graded.any()


@pytest.mark.parametrize("batch", [6, 120, 121])
def test_counts_equal_those_of_the_recorded_events(gpu, batch):
    # A thread has 1 sample, then 15, then 8, because it cannot sum 16.
    gpu.multiprocessors = 1
    check_counts((13, 9), batch)


@pytest.mark.gpu
@pytest.mark.parametrize(("units", "batch"), [((45, 33), 7), ((300, 9), 2200)])
def test_counts_on_a_gpu_equal_those_of_the_recorded_events(monkeypatch, units, batch):
    monkeypatch.setattr("eventrnn.cuda.tensor_core_layer.CELL_BLOCKS", 1)
    check_counts(units, batch)


@pytest.mark.parametrize("faster", ["layers", "gemm"])
def test_faster_measured_plan_is_used_and_reported(gpu, faster):
    network, x = streams()
    gpu.timed = lambda launched: 1.0 if faster in launched else 2.0
    result = simulate(network, x, backend="cuda", exact=False)
    expected = simulate(network, x, backend="reference")
    assert result.exact == (faster == "layers")
    assert all(name.startswith("tensor float16") == (faster == "gemm") for name in result.paths.values())
    if faster == "layers":
        assert np.array_equal(result.output, expected.output)


def test_each_layer_selects_its_own_plan(gpu):
    network, x = streams(units=(13, 9, 7))
    # The fake timing favours a plan with one layer on tensor cores: one product for the inputs, then one per step.
    gpu.timed = lambda launched: abs(launched.count("gemm") - len(x) - 1)
    result = simulate(network, x, backend="cuda", exact=False)
    on_tensor_cores = [result.paths[f"layers.{k}.w_rec"].startswith("tensor") for k in range(3)]
    assert sum(on_tensor_cores) == 1 and not result.exact
    simulator = Simulator(network, batch=6, backend=CudaBackend(exact=False))
    simulator.engine.tensor_layers[6] = (1,)
    mixed = simulator.run(x, record="events")
    exact = simulate(network, x, backend="reference", record="events")
    assert np.array_equal(mixed.events[0].to_dense(), exact.events[0].to_dense())
    again = Simulator(network, batch=6, backend=CudaBackend(exact=False))
    again.engine.tensor_layers[6] = (1,)
    parts = [again.run(x[:3]).output, again.run(x[3:6]).output, again.step(x[6])[None]]
    assert np.array_equal(np.concatenate(parts), mixed.output)


def test_few_streams_and_the_papers_variant_stay_exact(gpu):
    for network, x in (streams(batch=2), streams(variant="paper")):
        gpu.timed = lambda launched: 1.0 if "gemm" in launched else 2.0
        result = simulate(network, x, backend="cuda", exact=False)
        assert result.exact
        assert np.array_equal(result.output, simulate(network, x, backend="reference").output)


def test_values_beyond_float16_are_refused(gpu):
    network, x = streams()
    x[3, 2, 1] = 1e5
    with pytest.raises(FloatingPointError, match="too large for float16; use CudaBackend"):
        through_tensor_cores(network, 6).run(x)
    assert np.isfinite(through_tensor_cores(network, 6, "bfloat16").run(x).output).all()


def test_a_layer_with_weights_that_float16_cannot_hold_stays_exact(gpu):
    network, x = streams()
    gpu.timed = lambda launched: 1.0 if "gemm" in launched else 2.0
    network.layers[1].w_rec.values[0, 0] = 1e5
    for precision, inexact in (("float16", [True, False]), ("bfloat16", [True, True])):
        paths = simulate(network, x, backend=CudaBackend(exact=False, precision=precision)).paths
        assert [paths[f"layers.{k}.w_rec"] == f"tensor {precision}" for k in range(2)] == inexact
        reasons = [path.endswith("exact: float16 cannot hold its weights") for path in paths.values()]
        assert sum(reasons) == 2 * inexact.count(False)


def test_no_tensor_core_tables_without_a_layer_that_uses_them(gpu, monkeypatch):
    from eventrnn.cuda import device_network

    def none(device):
        raise BackendUnavailable("cuda: exact=False needs cuBLAS")

    monkeypatch.setattr(device_network, "Cublas", none)
    for network, x in (streams(batch=3), streams(variant="paper")):
        assert simulate(network, x, backend="cuda", exact=False).exact
    with pytest.raises(BackendUnavailable):
        simulate(*streams(batch=4), backend="cuda", exact=False)


def test_steps_use_the_plan_of_the_last_run(gpu):
    network, x = streams()
    gpu.timed = lambda launched: 1.0 if "gemm" in launched else 2.0
    simulator = Simulator(network, batch=6, backend="cuda", exact=False)
    expected = simulate(network, x, backend="reference")
    assert np.array_equal(simulator.step(x[0]), expected.output[0])
    assert "gemm" not in gpu.launched
    simulator.run(x[1:3])
    gpu.launched.clear()
    simulator.step(x[3])
    assert "gemm" in gpu.launched


def test_inexact_backend_must_be_named():
    backend = get_backend("cuda", exact=False)
    assert isinstance(backend, CudaBackend) and not backend.exact and backend.precision == "float16"
    assert get_backend("cuda").exact
