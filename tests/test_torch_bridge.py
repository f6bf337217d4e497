"""`eventrnn.torch.EGRU` has the call of `torch.nn.GRU`, and the outputs and gradients of this library's engines."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch")

from torch.nn.utils.prune import random_unstructured  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

from eventrnn.cells import Cell, Surrogate  # noqa: E402
from eventrnn.network import Network  # noqa: E402
from eventrnn.pruning import prune  # noqa: E402
from eventrnn.simulation import simulate  # noqa: E402
from eventrnn.state import State  # noqa: E402
from eventrnn.testing import ALL_CELLS  # noqa: E402
from eventrnn.torch import EGRU  # noqa: E402
from eventrnn.training import Model  # noqa: E402
from support import tolerance  # noqa: E402
from support.conformance import same_bits  # noqa: E402

pytestmark = pytest.mark.torch

STEPS, BATCH, INPUTS, UNITS = 7, 3, 4, 6


def module(layers: int = 2, **options) -> EGRU:
    """A module whose products are all over events: their bits do not depend on the batch, nor on the window."""
    torch.manual_seed(1)
    return EGRU(INPUTS, UNITS, layers, **{"threshold": 0.1, "backward": "sparse"} | options)


def numbers(*shape: int, seed: int = 0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


X = numbers(STEPS, BATCH, INPUTS)


# --- outputs and gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ALL_CELLS, ids=lambda cell: f"{cell.name}-{cell.variant}")
def test_outputs_states_and_gradients_are_those_of_the_engine(cell):
    drawn = Network.random([UNITS, UNITS], inputs=INPUTS, cell=cell, rng=np.random.default_rng(1))
    products = "sparse" if cell.thresholded else "auto"
    made = EGRU.from_network(drawn, backward=products)
    x = X.clone().requires_grad_()
    output, (outputs, cells) = made(x)
    weight = numbers(*output.shape, seed=2)
    (output * weight).sum().backward()

    model = Model(drawn, backward=products)
    expected, state, tape = model.forward(X.numpy(), State.zeros(drawn, BATCH))
    gradients = model.backward(tape, weight.numpy(), d_inputs=True)
    assert same_bits(output.detach().numpy(), expected)
    assert same_bits(outputs.numpy(), np.stack(state.outputs)) and same_bits(cells.numpy(), np.stack(state.cells))
    assert same_bits(x.grad.numpy(), gradients["inputs"])
    for name, parameter in made.named_parameters():
        own, k = name.rsplit("_l", 1)
        if parameter.requires_grad:
            assert same_bits(parameter.grad.numpy(), gradients[f"layers.{k}.{own}"]), name
    if cell.thresholded:
        assert same_bits(simulate(drawn, X.numpy()).output, expected)


def test_the_signature_begins_with_that_of_a_gru_of_pytorch():
    ours, theirs = (list(inspect.signature(each).parameters) for each in (EGRU, torch.nn.GRU.__init__))
    assert ours[:6] == ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"]
    assert theirs[1:] == ["args", "kwargs"] or set(ours[:6]) <= set(theirs)
    plain, event = torch.nn.GRU(INPUTS, UNITS, 2, True, True, 0.0), EGRU(INPUTS, UNITS, 2, True, True, 0.0)
    x = X.transpose(0, 1)
    assert event(x)[0].shape == plain(x)[0].shape
    assert event(x)[1][0].shape == plain(x)[1].shape
    assert event(x[0])[0].shape == plain(x[0])[0].shape and event(x[0])[1][0].shape == plain(x[0])[1].shape


def test_batch_first_and_single_samples_have_the_same_bits():
    made = module()
    output, (outputs, cells) = made(X)
    first = copy.deepcopy(made)
    first.batch_first = True
    assert torch.equal(first(X.transpose(0, 1))[0].transpose(0, 1), output)
    for b in range(BATCH):
        alone, (y, c) = made(X[:, b])
        assert torch.equal(alone, output[:, b]) and torch.equal(y, outputs[:, b]) and torch.equal(c, cells[:, b])
        again, _ = made(X[:, b], (y, c))
        assert again.shape == alone.shape


def test_two_windows_equal_one_and_the_state_has_no_gradient():
    made = module()
    whole, last = made(X)
    first, state = made(X[:4])
    second, after = made(X[4:], state)
    assert torch.equal(torch.cat([first, second]), whole)
    assert all(torch.equal(one, other) for one, other in zip(after, last, strict=True))
    assert not any(each.requires_grad for each in (*state, *after))


@pytest.mark.parametrize("sorted_already", [True, False])
def test_packed_sequences_and_lengths_equal_each_sample_alone(sorted_already):
    lengths = [7, 4, 1] if sorted_already else [4, 7, 1]
    made = module()
    packed = pack_padded_sequence(X, lengths, enforce_sorted=sorted_already)
    found, (y, c) = made(packed)
    padded, ends = pad_packed_sequence(found)
    assert ends.tolist() == lengths and torch.equal(found.batch_sizes, packed.batch_sizes)
    dirty = X.clone()
    for b, end in enumerate(lengths):
        dirty[end:, b] = torch.nan
    output, state = made(dirty, lengths=lengths)
    assert torch.equal(output, padded) and torch.equal(state[0], y) and torch.equal(state[1], c)
    for b, end in enumerate(lengths):
        alone, (own_y, own_c) = made(X[:end, b])
        assert torch.equal(alone, output[:end, b]) and not output[end:, b].any()
        assert torch.equal(own_y, y[:, b]) and torch.equal(own_c, c[:, b])
    output.square().sum().backward()
    grads = [parameter.grad.clone() for parameter in made.parameters()]
    made.zero_grad()
    pad_packed_sequence(made(packed)[0])[0].square().sum().backward()
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(grads, made.parameters(), strict=True))


def test_several_windows_can_wait_for_their_backward_pass():
    made = module()
    one, other = made(X)[0], made(2 * X)[0]
    one.sum().backward()
    first = made.w_rec_l0.grad.clone()
    made.zero_grad()
    other.sum().backward()
    made.zero_grad()
    made(X)[0].sum().backward()
    assert torch.equal(made.w_rec_l0.grad, first)


def test_a_step_of_the_optimiser_between_forward_and_backward_is_an_error():
    made = module()
    output = made(X)[0]
    with torch.no_grad():
        made.w_rec_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_change_in_place_of_input_or_output_before_the_backward_pass_is_an_error():
    made = module(threshold=0.01)
    x = X.clone()
    output = made(x)[0]
    assert output.any()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    output = made(X)[0]
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
    # Padded outputs are no memory of the engine, and neither are states.
    expected = torch.autograd.grad(2 * made(X, lengths=[7, 4, 1])[0].sum(), made.w_rec_l1)[0]
    output, state = made(X, lengths=[7, 4, 1])
    state[1].zero_()
    assert torch.equal(torch.autograd.grad(output.mul_(2).sum(), made.w_rec_l1)[0], expected)


def test_parts_of_the_parameters_can_be_frozen():
    made = module(threshold=0.01)
    made(X)[0].sum().backward()
    expected = {name: parameter.grad for name, parameter in made.named_parameters()}
    frozen = {"w_rec_l0", "threshold_l1", "bias_in_l0"}
    for name, parameter in made.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name not in frozen)
    made(X)[0].sum().backward()
    for name, parameter in made.named_parameters():
        assert parameter.grad is None if name in frozen else torch.equal(parameter.grad, expected[name]), name


def test_inference_mode_has_the_same_bits():
    made = module(threshold=0.01)
    with torch.inference_mode():
        x = X.clone()
        assert torch.equal(made(x)[0], made(X)[0])
    output = made(x)[0]
    output.sum().backward()
    assert made.w_in_l0.grad.any()


# --- double precision: the specification ---------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [*ALL_CELLS, Cell("egru", "evnn", Surrogate("arctan", 0.5, 2.0))], ids=repr)
@pytest.mark.parametrize("rule", ["positive", "sigmoid"])
def test_gradcheck_of_the_smoothed_module_in_double(cell, rule):
    if rule == "sigmoid" and not cell.thresholded:
        pytest.skip("a cell without thresholds has no rule for them")
    torch.manual_seed(0)
    options = {"cell": cell, "thresholds": rule, "threshold": 0.3 if cell.thresholded else None}
    made = EGRU(2, 3, 2, **options).double()
    made.smooth = True
    names = [name for name, parameter in made.named_parameters() if parameter.requires_grad]
    x = numbers(4, 2, 2).double().requires_grad_()
    assert len(names) == (10 if cell.thresholded else 8)

    def run(given, *values):
        return torch.func.functional_call(made, dict(zip(names, values, strict=True)), (given,))[0]

    assert torch.autograd.gradcheck(run, (x, *(getattr(made, name) for name in names)), fast_mode=True)


def test_in_double_the_module_is_the_engine_up_to_rounding_and_keeps_its_rules():
    network = prune(module(threshold=0.05).to_network(), 0.5)
    made = EGRU.from_network(network, backward="sparse")
    double = copy.deepcopy(made).double()
    wide, narrow = X.double().requires_grad_(), X.clone().requires_grad_()
    lengths = [7, 4, 1]
    (output, state), (found, _) = double(wide, lengths=lengths), made(narrow, lengths=lengths)
    assert output.dtype == state[0].dtype == torch.float64
    again, _ = double(wide.detach()[:1], state)
    assert again.shape == (1, BATCH, UNITS)
    single, exact = (each.detach().numpy() for each in (found, output))
    assert ((single != 0) == (exact != 0)).all()
    # The outputs of two layers over seven steps, of a float32 run of the same equations.
    assert np.abs(single - exact).max() <= tolerance.gradient_bound(single, np.zeros_like(exact))
    output.sum().backward()
    found.sum().backward()
    for (name, one), (_, other) in zip(double.named_parameters(), made.named_parameters(), strict=True):
        assert (one.grad == 0)[other.grad == 0].all(), name
        kept = getattr(made, f"kept_{name}", None)
        assert kept is None or not one.grad[~kept].any()
    with pytest.raises(ValueError, match=r"call .cpu\(\).float\(\)"):
        double.to_network()
    made.smooth = True
    with pytest.raises(ValueError, match="smooth: needs all parameters in float64, got torch.float32"):
        made(X)


# --- training -------------------------------------------------------------------------------------------------


def test_a_script_of_pytorch_trains():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"rnn": module(dropout=0.2), "top": torch.nn.Linear(UNITS, 1)})
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(25):
        optimiser.zero_grad()
        loss = (model["top"](model["rnn"](X)[0]) - X.sum(2, keepdim=True)).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert (model["rnn"].threshold_l0 >= -0.1).all()
    simulate(model["rnn"].to_network(), X.numpy(), backend="reference")


def test_dropout_acts_between_layers_in_training_only():
    made = module(dropout=0.5)
    torch.manual_seed(0)
    one = made(X)[0]
    assert not torch.equal(one, made(X)[0])
    torch.manual_seed(0)
    assert torch.equal(one, made(X)[0])
    made.eval()
    assert torch.equal(made(X)[0], made(X)[0])
    with pytest.warns(UserWarning, match="dropout: got 0.5, which acts between layers"):
        alone = module(layers=1, dropout=0.5)
    assert torch.equal(alone(X)[0], alone(X)[0])


def test_pruned_weights_stay_zero_through_an_optimiser():
    network = prune(module().to_network(), 0.5)
    made = EGRU.from_network(network)
    kept = {name: weights.kept() for name, weights in network.matrices().items()}
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        made(X)[0].square().sum().backward()
        optimiser.step()
    with torch.no_grad():
        made.w_rec_l0.add_(1)
    after = made.to_network()
    for name, weights in after.matrices().items():
        assert not weights.to_dense()[~kept[name]].any() and weights.nnz < kept[name].size
    again = EGRU(INPUTS, UNITS, 2)
    with pytest.raises(RuntimeError, match="kept_w_in_l0"):
        again.load_state_dict(made.state_dict())


def test_masks_of_pytorch_are_followed():
    made = module()
    random_unstructured(made, "w_rec_l0", amount=0.5)
    made(X)[0].sum().backward()
    assert not made.w_rec_l0_orig.grad[made.w_rec_l0_mask == 0].any()
    dense = made.to_network().layers[0].w_rec.to_dense()
    assert (dense == made.w_rec_l0.detach().numpy()).all() and (dense == 0).mean() > 0.4


@pytest.mark.parametrize("rule", ["positive", "clamped", "sigmoid", "fixed"])
def test_thresholds_keep_their_rule(rule):
    made = module(layers=1, thresholds=rule, threshold=0.3)
    with torch.no_grad():
        made.threshold_l0.sub_(1)
    made(X)
    threshold = made.to_network().layers[0].threshold
    assert (threshold >= 0).all()
    assert made.threshold_l0.requires_grad == (rule != "fixed")


def test_no_bias_has_no_parameters_of_biases():
    made = module(bias=False)
    assert not [name for name, _ in made.named_parameters() if "bias" in name]
    assert not [name for name in made.state_dict() if "bias" in name]
    assert not made.to_network().layers[0].bias_in.any()
    made(X)[0].sum().backward()


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_lightning_trains_saves_and_loads(tmp_path):
    lightning = pytest.importorskip("lightning", reason="needs Lightning")

    class Sums(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.rnn, self.top = module(dropout=0.1), torch.nn.Linear(UNITS, 1)

        def training_step(self, batch, index):
            x, y = batch
            loss = (self.top(self.rnn(x.transpose(0, 1))[0][-1]) - y).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=2e-2)

    def error(model) -> float:
        with torch.no_grad():
            return (model.top(model.eval().rnn(x.transpose(0, 1))[0][-1]) - x.sum(dim=(1, 2))[:, None]).square().mean()

    x = numbers(40, STEPS, INPUTS, seed=4)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(dim=(1, 2))[:, None]), batch_size=10)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=8, default_root_dir=tmp_path, **quiet)
    made = Sums()
    before = copy.deepcopy(made.rnn.state_dict())
    first = error(made)
    trainer.fit(made, data)
    assert error(made) < first
    assert not torch.equal(made.rnn.w_in_l0, before["w_in_l0"])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = Sums.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded.eval().rnn(X)[0], made.eval().rnn(X)[0])


# --- copies, types, compilation ---------------------------------------------------------------------------------


def test_copies_and_saved_states_have_the_same_bits_and_are_independent(tmp_path):
    made = module()
    expected = made(X)[0]
    torch.save(made.state_dict(), tmp_path / "a.pt")
    loaded = EGRU(INPUTS, UNITS, 2, backward="sparse")
    loaded.load_state_dict(torch.load(tmp_path / "a.pt"))
    for each in (
        copy.deepcopy(made),
        pickle.loads(pickle.dumps(made)),
        loaded,
        EGRU.from_network(made.to_network(), backward="sparse"),
    ):
        assert torch.equal(each(X)[0], expected)
        with torch.no_grad():
            each.w_in_l0.zero_()
    assert torch.equal(made(X)[0], expected)


def test_autocast_and_narrow_inputs_run_in_float32():
    made = module()
    for narrow in (X.bfloat16(), X.half(), X.double()):
        x = narrow.clone().requires_grad_()
        found = made(x)[0]
        assert found.dtype == torch.float32 and torch.equal(found, made(narrow.float())[0])
        found.sum().backward()
        assert x.grad.dtype == x.dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = made(X.bfloat16().requires_grad_())
        output.sum().backward()
    assert output.dtype == torch.float32
    assert torch.equal(output, made(X.bfloat16().float())[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compile_breaks_the_graph_and_keeps_the_bits():
    made = module()
    compiled = torch.compile(lambda x: made(2 * x)[0] + 1, backend="eager")
    assert torch.equal(compiled(X), made(2 * X)[0] + 1)


def test_the_surrogate_and_the_cell_survive_to_network():
    cell = Cell("egru", "paper", Surrogate("arctan", 0.5, 2.0))
    network = module(cell=cell).to_network()
    assert {layer.cell for layer in network.layers} == {cell}
    assert "cell=egru/paper" in repr(module(cell=cell))


# --- refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda made: made(X.numpy()), TypeError, "input: got ndarray, need a tensor"),
        (lambda made: made(X[:, :, :3]), ValueError, "input: got torch.float32 (7, 3, 3), need numbers (…, 4)"),
        (lambda made: made(X.long()), ValueError, "input: got torch.int64"),
        (lambda made: made(X[:0]), ValueError, "at least one step"),
        (lambda made: made(X.to("meta")), ValueError, "input: got a tensor on meta"),
        (lambda made: made(X, lengths=[1, 2]), ValueError, "lengths: got [1, 2]"),
        (lambda made: made(X, lengths=[0, 2, 3]), ValueError, "lengths: got [0, 2, 3]"),
        (lambda made: made(X, lengths=[2.5, 2.0, 3.0]), ValueError, "lengths: got [2.5, 2.0, 3.0], need a whole"),
        (lambda made: made(X, lengths=[True, True, True]), ValueError, "lengths: got [True, True, True]"),
        (lambda made: made(X, lengths=[None, 2, 3]), ValueError, "lengths: got [None, 2, 3]"),
        (lambda made: made(X.to_sparse()), ValueError, "input: got a sparse or a nested tensor"),
        (lambda made: made(X, (None, torch.zeros(2, 3, 6))), ValueError, "state: got (None, a tensor torch.float32"),
        (lambda made: made(X, (torch.zeros(2, 3, 6, device="meta"),) * 2), ValueError, "on the CPU, outputs and"),
        (lambda made: made(X, (torch.zeros(2, 3, 6, requires_grad=True),) * 2), ValueError, "give state.detach()"),
        (lambda made: made(X, (torch.full((2, 3, 6), torch.nan),) * 2), ValueError, "state, outputs: got nan at"),
        (lambda made: made(pack_padded_sequence(X, [7, 2, 1]), lengths=[7, 2, 1]), ValueError, "beside a packed"),
        (lambda made: made(X, torch.zeros(2, 3, 6)), ValueError, "need two tensors (2, 3, 6)"),
        (lambda made: made(X, (torch.zeros(2, 3, 5),) * 2), ValueError, "need two tensors (2, 3, 6)"),
        (lambda made: made.double().to_network(), ValueError, "w_in_l0: got torch.float64 on cpu"),
    ],
)
def test_wrong_calls_are_refused_by_name(call, error, words):
    with pytest.raises(error) as refused:
        call(module())
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_size": 0}, "input_size: got 0"),
        ({"hidden_size": 2.5}, "hidden_size: got 2.5"),
        ({"num_layers": True}, "num_layers: got True"),
        ({"bias": 1}, "bias: got 1"),
        ({"batch_first": 0}, "batch_first: got 0"),
        ({"dropout": 1.0}, "dropout: got 1.0"),
        ({"thresholds": "free"}, "thresholds: got 'free'"),
        ({"threads": 0}, "threads: got 0"),
        ({"cell": Cell("gru"), "threshold": 0.2}, "has no thresholds"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, words):
    with pytest.raises(ValueError) as refused:
        EGRU(**{"input_size": 2, "hidden_size": 3} | options)
    assert words in str(refused.value)


def test_from_network_layers_of_different_sizes_are_refused():
    network = Network.random([3, 4], inputs=2, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="layers of 3, 4 units"):
        EGRU.from_network(network)
    with_readout = Network.random([3], inputs=2, readout=5, rng=np.random.default_rng(0))
    assert EGRU.from_network(with_readout).to_network().readout is None
    assert replace(with_readout, readout=None).layers[0].units == EGRU.from_network(with_readout).hidden_size


def test_parameters_that_are_not_finite_are_named():
    made, x = EGRU(3, 5, 2, threshold=0.05), torch.randn(4, 2, 3)
    with torch.no_grad():
        made.bias_in_l1[2] = float("nan")
    with pytest.raises(ValueError, match=r"bias_in_l1: got nan at position \(2,\); need finite numbers"):
        made(x)


def test_states_that_are_no_numbers_are_refused_and_lazy_negations_are_numbers():
    made, x = EGRU(3, 5, threshold=0.05), torch.randn(4, 2, 3)
    output, (y, c) = made(x)
    for wrong in (c > 0, c.int(), c.to(torch.complex64), c.to_sparse()):
        with pytest.raises(ValueError, match="state: got .*, need two tensors .* of floating-point numbers on the CPU"):
            made(x, (y, wrong))
    lazy = torch.view_as_complex(torch.randn(4, 2, 3, 2)).conj().imag
    assert lazy.is_neg() and torch.equal(made(lazy)[0], made(lazy.resolve_neg())[0])
    assert torch.equal(made(x, (y, torch._neg_view(c)))[0], made(x, (y, -c))[0])
    with pytest.raises(ValueError, match=r"dropout: got 1.0, need a share in \[0, 1\)"):
        made.dropout = 1.0
