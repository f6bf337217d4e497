"""`eventrnn.torch.EGRU` on tensors of a GPU: the bits of the engine that trains there, and the rules of PyTorch.

On a fake GPU everywhere, whose memory is that of the host, so that its tensors are those of the CPU; marked `gpu` on
one.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from eventrnn import Cell, Network  # noqa: E402
from eventrnn.backend import BackendUnavailable  # noqa: E402
from eventrnn.pruning import prune  # noqa: E402
from eventrnn.torch import EGRU  # noqa: E402
from eventrnn.training import Batch, Settings, Task, Trainer  # noqa: E402
from support import fake_training, tolerance  # noqa: E402
from support.conformance import same_bits  # noqa: E402
from support.cuda_runs import updated  # noqa: E402

pytestmark = pytest.mark.torch

STEPS, BATCH, INPUTS, UNITS = 3, 2, 3, 5

CELLS = [Cell(), Cell("egru", "paper"), Cell("gru", "before"), Cell("lstm")]


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def where(request, monkeypatch):
    """The device of PyTorch: that of the fake GPU, or of the real one."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    if request.param == "gpu":
        if not torch.cuda.is_available():
            pytest.skip("needs a PyTorch with CUDA")
        return "cuda"
    device = fake_training.install(monkeypatch)
    monkeypatch.setattr("eventrnn.torch.on_gpu", lambda tensor: True)
    monkeypatch.setattr("eventrnn.torch.gpu._device", lambda: device)
    return "cpu"


ON_A_REAL_GPU = pytest.mark.parametrize("where", [pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)


def numbers(where, *shape: int, seed: int = 0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).to(where)


def module(where, layers: int = 1, **options) -> EGRU:
    torch.manual_seed(1)
    return EGRU(INPUTS, UNITS, layers, **{"threshold": 0.05} | options).to(where)


def gradients(made: EGRU, output, weight) -> dict:
    """The gradients of the parameters, by their names; the module has none afterwards."""
    (output * weight).sum().backward()
    found = {name: None if each.grad is None else each.grad.clone() for name, each in made.named_parameters()}
    made.zero_grad()
    return found


def near(one, other) -> bool:
    """Whether tensors have the same events, and are equal up to the rounding of sums."""
    a, b = (each.detach().cpu().numpy() for each in (one, other))
    return ((a != 0) == (b != 0)).all() and np.abs(a - b).max() <= tolerance.gradient_bound(a, np.zeros_like(a))


class Window(Task):
    """One window, with the gradient of its output."""

    def __init__(self, inputs: np.ndarray, d_output: np.ndarray):
        self.inputs, self.d_output = inputs, d_output

    def check(self, network, batch, window):
        return None

    def length(self, batch):
        return 1

    def batch(self, at, epoch, batch, window):
        return Batch(self.inputs, self.inputs, taken=1)

    def loss(self, output, batch):
        self.output = output.copy()
        return float(np.vdot(output, self.d_output)), self.d_output


@pytest.mark.parametrize(
    ("cell", "precision", "rule", "pruned"),
    [
        (CELLS[0], "float32", "positive", True),
        (CELLS[0], "bfloat16", "sigmoid", False),
        (CELLS[1], "float32", "clamped", True),
        (CELLS[2], "float32", "fixed", False),
        (CELLS[3], "tf32", "positive", False),
    ],
    ids=lambda value: value.name if isinstance(value, Cell) else str(value),
)
def test_outputs_states_and_gradients_are_those_of_the_engine_that_trains(where, cell, precision, rule, pruned):
    rng, threshold = np.random.default_rng(1), 0.05 if cell.thresholded else None
    network = Network.random([UNITS, UNITS], inputs=INPUTS, cell=cell, threshold=threshold, rng=rng)
    network = prune(network, 0.5) if pruned else network
    made = EGRU.from_network(network, thresholds=rule).to(where)
    made.precision = precision
    x = numbers(where, STEPS, BATCH, INPUTS).requires_grad_()
    weight = numbers(where, STEPS, BATCH, UNITS, seed=2)
    output, state = made(x)
    found = gradients(made, output, weight)

    task = Window(x.detach().cpu().numpy(), weight.cpu().numpy())
    settings = Settings(
        steps=1, batch=BATCH, window=STEPS, backend="cuda", precision=precision, thresholds=rule, clip=1e9
    )
    engine = Trainer(network, task, settings).engine
    engine.keep_input_gradient()
    _, expected = updated(engine, task.batch(0, 0, BATCH, STEPS), step=0, rate=0.0)
    assert same_bits(output.detach().cpu().numpy(), task.output) and output.any()
    for ours, theirs in zip(state, (engine.state.outputs, engine.state.cells), strict=True):
        assert same_bits(ours.cpu().numpy(), np.stack(theirs))
    for name, gradient in found.items():
        own, k = name.rsplit("_l", 1)
        if gradient is None:
            assert own == "threshold"
        else:
            assert same_bits(gradient.cpu().numpy(), expected[f"layers.{k}.{own}"]), name
    d_inputs = np.empty((STEPS * BATCH, 8), np.float32)
    with engine.device.on_stream():
        engine.device.fetch(engine.memory["d_x"][: STEPS * BATCH], d_inputs)
    assert same_bits(x.grad.cpu().numpy(), d_inputs[:, :INPUTS].reshape(x.shape))


def test_outputs_and_gradients_are_those_of_the_specification_up_to_rounding(where, monkeypatch):
    made, weight = module(where, 2), numbers(where, STEPS, BATCH, UNITS, seed=2)
    x = numbers(where, STEPS, BATCH, INPUTS)
    found = made(x)[0]
    ours = gradients(made, found, weight)
    monkeypatch.setattr("eventrnn.torch.on_gpu", lambda tensor: tensor.device.type == "cuda")
    single = copy.deepcopy(made).cpu()
    exact = copy.deepcopy(single).double()
    theirs = gradients(single, single(x.cpu())[0], weight.cpu())
    output = exact(x.cpu().double())[0]
    truth = gradients(exact, output, weight.cpu().double())
    got, output = found.detach().cpu().numpy(), output.detach().numpy()
    assert ((got != 0) == (output != 0)).all()
    assert np.abs(got - output).max() <= tolerance.gradient_bound(got, np.zeros_like(output))
    for name in ours:
        cpu, wide = theirs[name].numpy().astype(np.float64), truth[name].numpy()
        assert np.abs(ours[name].cpu().numpy() - wide).max() <= tolerance.gradient_bound(cpu, wide), name


def test_forms_of_the_input_have_the_same_bits(where):
    made, x = module(where), numbers(where, STEPS, BATCH, INPUTS)
    output, state = made(x)
    assert output.device == x.device == state[0].device and output.dtype == torch.float32
    first = copy.deepcopy(made)
    first.batch_first = True
    assert torch.equal(first(x.transpose(0, 1))[0].transpose(0, 1), output)
    assert torch.equal(made(x.transpose(1, 2).contiguous().transpose(1, 2))[0], output)
    assert torch.equal(made(x.double())[0], output)
    alone, (y, c) = made(x[:, 1])
    assert alone.shape == (STEPS, UNITS) and y.shape == c.shape == (1, UNITS)
    part, between = made(x[:2])
    rest, after = made(x[2:], between)
    # Products of other sizes add up in other orders.
    assert near(torch.cat([part, rest]), output)
    assert all(near(one, other) for one, other in zip(after, state, strict=True))
    assert torch.equal(made(x)[0], output)
    with torch.inference_mode():
        assert torch.equal(made(x)[0], output)


def test_packed_sequences_and_lengths_equal_each_sample_alone(where):
    made, x, lengths = module(where, 2), numbers(where, STEPS, BATCH, INPUTS), [2, 3]
    output, state = made(x, lengths=lengths)
    found, (y, c) = made(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert torch.equal(pad_packed_sequence(found)[0], output)
    assert torch.equal(y, state[0]) and torch.equal(c, state[1])
    whole = made(x)[0]
    for b, end in enumerate(lengths):
        assert torch.equal(output[:end, b], whole[:end, b]) and not output[end:, b].any()
        own = made(x[:end])[1]
        assert near(own[0][:, b], y[:, b]) and near(own[1][:, b], c[:, b])


def test_every_window_has_a_tape_of_its_own_and_a_retained_graph_keeps_it(where):
    made, weight = module(where), numbers(where, STEPS, BATCH, UNITS, seed=2)
    inputs = [numbers(where, STEPS, BATCH, INPUTS, seed=k) for k in range(3)]
    expected = [gradients(made, made(x)[0], weight) for x in inputs]
    outputs = [made(x)[0] for x in inputs]
    (outputs[1] * weight).sum().backward(retain_graph=True)
    made.zero_grad()
    for k in (1, 2, 0):
        found = gradients(made, outputs[k], weight)
        assert all(torch.equal(found[name], expected[k][name]) for name in found), k
    with pytest.raises(RuntimeError, match="second time"):
        outputs[1].sum().backward()
    again = made(inputs[0])[0]
    (d_weights,) = torch.autograd.grad(again.square().sum(), made.w_rec_l0, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        d_weights.sum().backward()


def test_memory_goes_to_the_next_window_and_is_freed_with_the_module(where):
    made, x = module(where), numbers(where, STEPS, BATCH, INPUTS)
    output = made(x)[0]
    pool = made._engine[1].pool
    (number,) = pool.held
    first = weakref.ref(pool.held[number])
    output.sum().backward()
    # The output is alive, but its graph has done its work.
    assert not pool.held
    again = made(2 * x)[0]
    assert list(pool.held.values()) == [first()]
    with torch.no_grad():
        made(x)
        assert list(pool.held.values()) == [first()]
    del again
    assert not pool.held
    made(x[:2, :1])[0].sum().backward()
    assert first() is not None
    many = [made(x)[0] for _ in range(6)]
    assert len(pool.held) == 6
    del many
    made(x)
    assert len(pool.waiting) == 3
    del made, pool, output
    gc.collect()
    assert first() is None


def test_other_parameters_between_the_passes(where):
    made, weight = module(where), numbers(where, STEPS, BATCH, UNITS, seed=2)
    x = numbers(where, STEPS, BATCH, INPUTS)
    expected = gradients(made, made(x)[0], weight)
    other = {name: 2 * each.detach() for name, each in made.named_parameters()}
    output = made(x)[0]
    assert not torch.equal(torch.func.functional_call(made, other, (x,))[0], output)
    found = gradients(made, output, weight)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    output = made(x)[0]
    with torch.no_grad():
        made.w_rec_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_two_modules_checkpoints_and_frozen_parameters(where):
    torch.manual_seed(3)
    low, top = EGRU(INPUTS, UNITS, threshold=0.05).to(where), EGRU(UNITS, UNITS, threshold=0.05).to(where)
    x = numbers(where, STEPS, BATCH, INPUTS)

    def run(x):
        return top(low(x)[0])[0]

    top.w_in_l0.requires_grad_(False)
    run(x).sum().backward()
    expected = {name: each.grad for name, each in low.named_parameters()}
    assert top.w_in_l0.grad is None and top.w_rec_l0.grad is not None and expected["w_in_l0"].any()
    low.zero_grad()
    checkpoint(run, x, use_reentrant=False).sum().backward()
    assert all(torch.equal(each.grad, expected[name]) for name, each in low.named_parameters())
    assert not low._engine[1].pool.held and not top._engine[1].pool.held


def test_pruned_weights_and_thresholds_keep_their_rules_through_an_optimiser(where):
    network = prune(module("cpu").to_network(), 0.5)
    made, x = EGRU.from_network(network).to(where), numbers(where, STEPS, BATCH, INPUTS)
    optimiser = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        made(x)[0].square().sum().backward()
        optimiser.step()
    with torch.no_grad():
        made.w_rec_l0.add_(1)
        made.threshold_l0.sub_(5)
    made(x)
    assert (made.threshold_l0 == 0).all()
    for name, weights in made.to_network().matrices().items():
        kept = network.matrices()[name].kept()
        assert (weights.to_dense()[~kept] == 0).all() and weights.to_dense()[kept].all()
    assert not made.w_rec_l0[~made.kept_w_rec_l0].any()


def test_dropout_follows_the_seed_of_pytorch(where):
    made, x = module(where, 2, dropout=0.5), numbers(where, STEPS, BATCH, INPUTS).requires_grad_()
    torch.manual_seed(0)
    one, other = made(x)[0], made(x)[0]
    assert not torch.equal(one, other)
    weight = numbers(where, STEPS, BATCH, UNITS, seed=2)
    found = gradients(made, one, weight)
    torch.manual_seed(0)
    again = made(x)[0]
    assert torch.equal(one, again)
    repeated = gradients(made, again, weight)
    assert all(torch.equal(found[name], repeated[name]) for name in found)
    made.eval()
    assert torch.equal(made(x)[0], module(where, 2)(x)[0])
    # A mask that no output passes: the upper layer sees nothing, and the lower one has no gradient.
    made.dropout = 0.9999999
    made.train()
    assert not gradients(made, made(x)[0], weight)["w_in_l0"].any()


def test_copies_and_saved_states_have_the_same_bits_and_go_to_the_cpu_and_back(where):
    made, x = module(where), numbers(where, STEPS, BATCH, INPUTS)
    expected = made(x)[0]
    loaded = EGRU(INPUTS, UNITS).to(where)
    loaded.load_state_dict(made.state_dict())
    for each in (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        loaded,
        EGRU.from_network(made.to_network()).to(where),
        copy.deepcopy(made).cpu().to(where),
    ):
        assert torch.equal(each(x)[0], expected)
        with torch.no_grad():
            each.w_in_l0.zero_()
    assert torch.equal(made(x)[0], expected)


def test_autocast_runs_in_float32(where):
    made, kind = module(where), torch.device(where).type
    x = numbers(where, STEPS, BATCH, INPUTS).bfloat16().requires_grad_()
    expected = made(x.float())[0]
    with torch.autocast(kind, dtype=torch.bfloat16):
        output = made(x)[0]
        loss = output.square().sum()
    loss.backward()
    assert output.dtype == torch.float32 and torch.equal(output, expected)
    assert x.grad.dtype == torch.bfloat16 and x.grad.any()


def test_wrong_calls_are_refused_by_name(where, monkeypatch):
    x = numbers(where, STEPS, BATCH, INPUTS)
    for options, words in (
        ({"backward": "sparse"}, "backward: got 'sparse', but a GPU multiplies every weight"),
        ({"threads": 2}, "threads: got 2, but a GPU brings its own"),
    ):
        with pytest.raises(ValueError, match=words):
            module(where, **options)(x)
    with pytest.raises(ValueError, match="specification, which runs in double precision, runs on the CPU"):
        module(where).double()(x)
    with pytest.raises(ValueError, match=r"w_in_l0: got torch.float16 on .*, need contiguous float32"):
        module(where).half()(x)
    with pytest.raises(ValueError, match="state: got"):
        module(where)(x, torch.zeros(1, BATCH, UNITS))
    made = module(where)
    with pytest.raises(ValueError, match=r"w_rec_l0: got shape \(2, 15\), need \(5, 15\)"):
        torch.func.functional_call(made, {"w_rec_l0": torch.zeros(2, 3 * UNITS, device=where)}, (x,))
    for mask in (torch.ones(3 * UNITS, UNITS, dtype=torch.bool).T, torch.ones(UNITS, 3 * UNITS), torch.ones(1, 1) > 0):
        made.kept_w_rec_l0 = mask.to(where)
        with pytest.raises(ValueError, match="kept_w_rec_l0: got .*, need contiguous booleans"):
            made(x)
    monkeypatch.setattr("eventrnn.torch.gpu._is_capturing", lambda x: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        module(where)(x)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_numbers_that_are_not_finite_show_in_the_output(where, cell):
    made, x = module(where, 2, cell=cell, threshold=0.05 if cell.thresholded else None), numbers(where, 3, 2, INPUTS)
    expected = made(x)[0]
    x[1, 0, 1] = float("nan")
    output, (_, cells) = made(x, lengths=[2, 3])
    assert output[1, 0].isnan().all() and torch.equal(output[:, 1], expected[:, 1]) and not output[2, 0].any()
    assert cells[0, 0].isnan().all() and cells[:, 1].isfinite().all()


def test_a_window_that_does_not_fit_is_refused_and_the_next_one_runs(where):
    if where == "cuda":
        pytest.skip("needs a GPU with a limit")
    made, x = module(where), numbers(where, STEPS, BATCH, INPUTS)
    expected = made(x)[0]
    device = made._engine[1].device
    room, device.room = device.room, 1
    with pytest.raises(MemoryError, match="bytes are needed"):
        made(torch.cat([x, x]))
    device.room = room
    assert torch.equal(made(x)[0], expected)


def test_few_long_samples_beside_many_short_ones_need_no_memory_for_many_long_ones(where):
    made = module(where)
    with torch.no_grad():
        made(numbers(where, 2, 30, INPUTS))
        made(numbers(where, 40, 1, INPUTS))
        made(numbers(where, 2, 31, INPUTS))
        made(numbers(where, 1, 1, INPUTS))
    waiting = made._engine[1].pool.waiting
    assert [each.capacity for each in waiting] == [(40, 1)]
    assert [each.capacity for each in made._engine[1].pool._released] == [(2, 31)]


@ON_A_REAL_GPU
def test_tensors_of_two_devices_are_refused_by_name(where):
    x, here = numbers(where, STEPS, BATCH, INPUTS), module(where)
    with pytest.raises(ValueError, match=r"w_in_l0: got torch.float32 on cpu, need .* on cuda:0, as the input"):
        module("cpu")(x)
    with pytest.raises(ValueError, match=r"w_in_l0: got torch.float32 on cuda:0, need .* on the CPU; call .cpu\(\)"):
        here(x.cpu())
    with pytest.raises(ValueError, match="state: got .* on cpu.*, need two tensors .* on cuda:0, as the input"):
        here(x, (torch.zeros(1, BATCH, UNITS),) * 2)


@ON_A_REAL_GPU
def test_work_is_ordered_with_the_streams_of_pytorch(where):
    made, x = module(where), numbers(where, STEPS, BATCH, INPUTS)
    expected = gradients(made, made(x)[0], torch.ones(1, device=where))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(20):
            # The input is ready long after the host has called the module.
            torch.cuda._sleep(2_000_000)
            late = x.clone()
            output = made(late)[0]
            late.zero_()
            found = gradients(made, output.clone(), torch.ones(1, device=where))
            assert all(torch.equal(found[name], expected[name]) for name in found)


# --- what the CPU says ------------------------------------------------------------------------------------------


def test_a_precision_of_a_gpu_is_refused_on_the_cpu():
    made = EGRU(INPUTS, UNITS)
    made.precision = "bfloat16"
    with pytest.raises(ValueError, match="precision: got 'bfloat16', but the input is on the CPU"):
        made(numbers("cpu", STEPS, BATCH, INPUTS))
    with pytest.raises(ValueError, match="precision: got 'int8', need one of bfloat16, tf32, float32"):
        made.precision = "int8"


def test_a_gpu_without_an_engine_is_named(monkeypatch):
    def missing():
        raise BackendUnavailable("cuda: No module named 'cupy'; pip install 'eventrnn[cuda13]'")

    monkeypatch.setattr("eventrnn.torch.on_gpu", lambda tensor: True)
    monkeypatch.setattr("eventrnn.torch.gpu._device", missing)
    with pytest.raises(BackendUnavailable, match="No module named 'cupy'; pip install"):
        EGRU(INPUTS, UNITS)(numbers("cpu", STEPS, BATCH, INPUTS))


def test_a_forked_process_is_told_that_the_gpu_does_not_survive_it(monkeypatch):
    device = pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    opened = type("Opened", (), {"process": os.getpid()})()
    monkeypatch.setattr(device, "_opened", lambda: opened)
    assert device.current_device() is opened
    opened.process = -1
    with pytest.raises(BackendUnavailable, match="forked from one that had opened the GPU"):
        device.current_device()
