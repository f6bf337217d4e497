"""Single steps of sparse networks on a GPU: their kernel, and what the host does around it, on fake and real GPUs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable, get_backend
from eventrnn.cuda import tables
from eventrnn.network import Network
from eventrnn.simulation import Simulator, simulate
from eventrnn.state import State, on_gpu
from eventrnn.weights import convert
from support.conformance import same_bits
from support.fake_gpu import Array, install
from support.ptx import check_ptx, compiler

BATCH, INPUTS, STEPS = 2, 37, 6


def sparse(units=(40, 33), storage="float32", inputs=INPUTS) -> tuple[Network, np.ndarray]:
    """A network of sparse EGRU layers without a read-out, and inputs (STEPS, BATCH, I)."""
    rng = np.random.default_rng(sum(units))
    network = Network.random(units, inputs=inputs, rng=rng, threshold=0.05)

    def pruned(weights):
        n, m = weights.shape
        kept = np.repeat(rng.random((n, -(-m // 16))) < 0.15, 16, axis=1)[:, :m]
        return convert((4 * weights.to_dense() * kept).astype(np.float32), "block", block=(1, 16), storage=storage)

    network = network.with_matrices({name: pruned(w) for name, w in network.matrices().items()})
    x = rng.standard_normal((STEPS, BATCH, inputs)) * (rng.random((STEPS, BATCH, inputs)) < 0.5)
    return network, x.astype(np.float32)


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    return install(monkeypatch)


def there(array) -> Array:
    return np.array(array).view(Array)


def on_host(output) -> np.ndarray:
    return output.get() if on_gpu(output) else output


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_steps_and_runs_in_turn_equal_one_run_on_the_cpu(gpu, storage):
    network, x = sparse(storage=storage)
    expected = simulate(network, x, record="events")
    assert 0 < np.mean(expected.activity) < 1
    simulator = Simulator(network, batch=BATCH, backend="cuda")
    for _ in range(2):
        got = [on_host(simulator.step(x[t] if t % 3 else there(x[t]))) for t in range(4)]
        got += [*simulator.run(x[4:5]).output, simulator.step(x[5])]
        assert same_bits(np.array(got), expected.output)
        assert all(map(same_bits, simulator.state.cells, expected.state.cells))
        assert all(map(same_bits, simulator.state.outputs, expected.state.outputs))
        simulator.reset()


def test_a_step_launches_one_kernel_per_layer_and_allocates_nothing(gpu):
    network, x = sparse()
    simulator = Simulator(network, batch=BATCH, backend="cuda")
    for _ in range(4):
        simulator.step(x[0])
    made = gpu.allocated
    gpu.launched.clear()
    simulator.step(x[0])
    assert gpu.launched == ["single_step"] * len(network.layers) and gpu.allocated == made


def test_networks_that_these_kernels_do_not_serve_go_another_way(gpu):
    network, x = sparse()
    dense = network.with_matrices({name: convert(w.to_dense(), "dense") for name, w in network.matrices().items()})
    for other in (dense, Network.random([9], inputs=INPUTS, readout=3, rng=np.random.default_rng(0))):
        gpu.launched.clear()
        got = Simulator(other, batch=BATCH, backend="cuda").step(x[0])
        assert "single_step" not in gpu.launched and same_bits(got, simulate(other, x[:1]).output[0])


def test_more_samples_than_a_launch_can_have_go_another_way(gpu):
    from eventrnn.cuda.fused_step import MAX_SAMPLES, fits

    packed = get_backend("cuda").engine(sparse()[0]).packed
    assert fits(packed, MAX_SAMPLES) and not fits(packed, MAX_SAMPLES + 1)


@pytest.mark.parametrize("before", [0, 1, 2, 3])
@pytest.mark.parametrize("where", ["launch", "answer"])
def test_an_interrupted_step_can_be_made_again(gpu, before, where, monkeypatch):
    from eventrnn.cuda.fused_step import FusedStep

    network, x = sparse()
    expected = simulate(network, x).output
    simulator = Simulator(network, batch=BATCH, backend="cuda")
    for t in range(before):
        simulator.step(x[t])
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(self, *arguments, **options):
            raise KeyboardInterrupt

        owner, name = (type(gpu), "launch") if where == "launch" and before < 2 else (FusedStep, "_wait")
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            simulator.step(x[before])
    for t in range(before, STEPS):
        assert same_bits(simulator.step(x[t]), expected[t])


def test_a_step_whose_answer_never_comes_is_an_error_and_changes_nothing(gpu, monkeypatch):
    from support import fake_gpu

    network, x = sparse()
    simulator = Simulator(network, batch=BATCH, backend="cuda")
    simulator.step(x[0])
    before = simulator.state
    with monkeypatch.context() as patch:
        patch.setitem(fake_gpu.ROUNDING, "single_step", lambda *arguments: None)
        with pytest.raises(RuntimeError, match="cuda: a step ended without an answer"):
            simulator.step(x[1])
    assert all(map(same_bits, simulator.state.cells, before.cells))
    assert same_bits(simulator.step(x[1]), simulate(network, x).output[1])


def test_inputs_and_cells_that_are_not_finite_are_refused_and_change_nothing(gpu):
    network, x = sparse()
    simulator = Simulator(network, batch=BATCH, backend="cuda")
    simulator.step(x[0])
    for fed in (x[1], there(x[1])):
        bad = fed.copy()
        bad[1, 5] = np.nan
        with pytest.raises(ValueError, match=r"inputs: got nan at position \(0, 1, 5\); need finite numbers"):
            simulator.step(bad)
    assert same_bits(simulator.step(x[1]), simulate(network, x).output[1])


def test_cells_that_overflow_are_named_and_change_nothing(gpu):
    network, x = sparse()
    layer, bias, threshold = network.layers[1], np.zeros(99, np.float32), np.zeros(33, np.float32)
    bias[4], threshold[4] = 1e9, 3e38
    changed = replace(layer, bias_in=bias, threshold=threshold)
    # An edit in place goes by the checks of a record: a threshold below zero makes the cell overflow.
    threshold[4] = -3e38
    network, state = replace(network, layers=(network.layers[0], changed)), State.zeros(network, BATCH)
    state.cells[1][1, 4] = 3e38
    simulator = Simulator(network, batch=BATCH, backend="cuda", state=state)
    with pytest.raises(FloatingPointError, match="layer 1: the cell state of unit 4 is"):
        simulator.step(x[0])
    assert all(map(same_bits, simulator.state.cells, state.cells))


# --- the kernel ---------------------------------------------------------------------------------------------


def test_the_kernel_compiles_without_contraction():
    compiled = compiler()
    from eventrnn.cuda.kernels.single_step import step_kernel

    check_ptx(compiled(step_kernel(tables.layout_code(tables.MASKED, True, False), tables.MASKED)))


@pytest.mark.parametrize(("units", "storage"), [(40, "float32"), (32, "bfloat16")])
def test_the_emulated_kernel_equals_the_specification(monkeypatch, units, storage):
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    from eventrnn.cuda.kernels.single_step import STEP_SHARED_BYTES, STEP_WARPS, step_kernel
    from support import emulated_gpu, fake_gpu

    device = install(monkeypatch)
    network, x = sparse((units,), storage)

    def kernel(layout_in, layout_rec, blocks, *arguments):
        function, _ = step_kernel(layout_in, layout_rec)
        emulated_gpu.emulated(function, blocks, 32 * STEP_WARPS, STEP_SHARED_BYTES)(*arguments)

    monkeypatch.setitem(fake_gpu.ROUNDING, "single_step", kernel)
    expected = simulate(network, x[:3], backend="reference")
    simulator = Simulator(network, batch=BATCH, backend="cuda")
    for t in range(3):
        assert same_bits(simulator.step(x[t]), expected.output[t])
    assert all(map(same_bits, simulator.state.cells, expected.state.cells))
    x[0, 1, 36] = np.inf
    with pytest.raises(ValueError, match=r"inputs: got inf at position \(0, 1, 36\)"):
        simulator.step(x[0])
    assert device.launched


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("units", [(64,), (1350, 100), (33, 65, 40)])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_steps_on_a_gpu_have_the_bits_of_a_run(units, storage, batch):
    network, x = sparse(units, storage)
    x = np.concatenate([x] * 20)[:, :1].repeat(batch, axis=1)
    x[:, -1] *= 0.5
    expected = simulate(network, x)
    simulator = Simulator(network, batch=batch, backend="cuda")
    got = np.array([simulator.step(each) for each in x])
    assert same_bits(got, expected.output)
    assert all(map(same_bits, simulator.state.cells, expected.state.cells))
    bad = x[0].copy()
    bad[-1, 7] = np.nan
    with pytest.raises(ValueError, match="inputs: got nan"):
        simulator.step(bad)
    assert all(map(same_bits, simulator.state.cells, expected.state.cells))
    assert same_bits(simulator.step(x[0]), simulate(network, x[:1], state=expected.state).output[0])
