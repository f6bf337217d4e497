"""Training: gradients against the specification, masks, seeds, clipping, schedules, refusals."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn import Cell, Network, State, Surrogate, reference, simulate
from eventrnn.cells import SURROGATES
from eventrnn.pruning import GradualPruning
from eventrnn.training import Model, Noise, Regularisers, Settings, Trainer, evaluate, thresholds
from eventrnn.training.evaluation import evaluate_text
from eventrnn.training.kernels import cross_entropy
from eventrnn.training.losses import cross_entropy_bits
from support.magnitudes import backward_magnitudes
from support.tolerance import CORNER, U32, U64, cell_bound, gamma


@st.composite
def windows(draw):
    """A model of one layer, inputs, a state and an upstream gradient."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, inputs = draw(st.integers(1, 37)), draw(st.integers(1, 20))
    steps, batch = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rule = Surrogate(
        draw(st.sampled_from(sorted(SURROGATES))), draw(st.sampled_from([0.5, 1.0])), draw(st.sampled_from([0.5, 2.0]))
    )
    cell = Cell(variant=draw(st.sampled_from(["evnn", "paper"])), surrogate=rule)
    network = Network.random([n], inputs=inputs, rng=rng, threshold=0.1, cell=cell)
    layer = replace(network.layers[0], bias_in=rng.normal(0, 0.5, 3 * n).astype(np.float32))
    model = Model(replace(network, layers=(layer,)))
    x = rng.normal(size=(steps, batch, inputs)).astype(np.float32)
    y = (rng.random((batch, n)) * (rng.random((batch, n)) < 0.5)).astype(np.float32)
    state = State((rng.normal(0, 0.3, (batch, n)).astype(np.float32),), (y,))
    return model, x, state, rng.normal(size=(steps, batch, n)).astype(np.float32)


def _reference_tapes(model, tape, cell):
    """The float32 tape of a training window as the specification's, float64."""
    rule, tapes = cell.surrogate, []
    theta = model.parameters["layers.0.threshold"].astype(np.float64)
    for t in range(len(tape.v)):
        wide = {name: getattr(tape, name)[t].astype(np.float64) for name in ("u", "r", "g", "q", "v")}
        event = (tape.v[t] > model.parameters["layers.0.threshold"]).astype(np.float64)
        slope = reference.cells.surrogate_slope(rule.code, wide["v"] - theta, rule.dampening, rule.support)
        before, after = tape.c[t].astype(np.float64), tape.c[t + 1].astype(np.float64)
        y_before, y = tape.y[t].astype(np.float64), tape.y[t + 1].astype(np.float64)
        tapes.append(
            reference.Tape(
                wide["u"], wide["r"], wide["g"], wide["q"], before, y_before, wide["v"], event, slope, y, after
            )
        )
    return tapes


def _float64(model):
    names = ("w_in", "w_rec", "bias_in", "bias_rec", "threshold")
    return {name: model.parameters[f"layers.0.{name}"].astype(np.float64) for name in names}


@given(windows())
def test_model_gradients_equal_specification_within_bounds(case):
    model, x, state, d_y = case
    cell, parameters = model.cells[0], _float64(model)
    _, _, tape = model.forward(x, state)
    layer = tape.layers[0]
    # Parameters with no unit near a corner of the surrogate, where one rounding of v could change the slope by a jump.
    distance = np.abs(layer.v - model.parameters["layers.0.threshold"]) * cell.surrogate.support
    d_y = d_y * (np.abs(distance - 1) > CORNER)
    gradients = model.backward(tape, d_y)
    tapes = _reference_tapes(model, layer, cell)
    upstream, nothing = d_y.astype(np.float64), np.zeros(d_y.shape)
    expected = reference.backward(cell, parameters, x.astype(np.float64), tapes, upstream, nothing)
    sizes = backward_magnitudes(cell, parameters, x.astype(np.float64), tapes, upstream, nothing)
    steps, batch, n = d_y.shape
    # A path through all steps meets, in each, a product of 3N terms and 60 scalar roundings; the slope of the
    # surrogate is off by 16 more (its exponential and the distance); the sums over rows come last.
    roundings = steps * (3 * n + 80) + steps * batch + len(parameters["w_in"])
    for name, value in parameters.items():
        error = np.abs(gradients[f"layers.0.{name}"] - expected[name])
        jumps = _slope_error(cell, layer, model) * sizes[name].max()
        assert (error <= gamma(roundings, U32) * sizes[name].max() + jumps).all(), name
        assert value.shape == gradients[f"layers.0.{name}"].shape


def _slope_error(cell, layer, model) -> float:
    """Error of the slope, because v - threshold is rounded first: support * |v| * 2u for a slope of order one."""
    return float(8 * cell.surrogate.support * (np.abs(layer.v).max() + 1) * U32 * len(layer.v))


@given(windows())
def test_forward_steps_are_within_the_bound_of_float64(case):
    model, x, state, _ = case
    parameters = _float64(model)
    _, after, tape = model.forward(x, state)
    layer = tape.layers[0]
    for t in range(len(x)):
        c, y = layer.c[t].astype(np.float64), layer.y[t].astype(np.float64)
        exact = cell_bound(model.cells[0].variant, parameters, x[t].astype(np.float64), c, y)
        # BLAS adds in any order and the bias last: n + 1 roundings where the bound has n.
        assert (np.abs(layer.v[t] - exact.value) <= 2 * exact.error).all()
    assert np.array_equal(after.cells[0], layer.c[-1]) and np.array_equal(after.outputs[0], layer.y[-1])


def test_the_trained_network_is_the_simulated_one():
    """The forward pass of the training and the exact engine are two implementations of one model."""
    rng = np.random.default_rng(3)
    network = Network.random([24, 17], symbols=11, embedding=9, readout=11, rng=rng, threshold=0.05)
    symbols = rng.integers(0, 11, (20, 3))
    output, _, tape = Model(network).forward(symbols, State.zeros(network, 3))
    run = simulate(network, symbols, record="events")
    for k, layer in enumerate(tape.layers):
        assert np.array_equal(layer.y[1:] != 0, run.events[k].to_dense() != 0)
    assert np.abs(output - run.output).max() <= gamma(17 + 20 * 80, U32) * (np.abs(run.output).max() + 1)


def test_embedding_gradient_sums_over_equal_symbols_and_tied_readout():
    rng = np.random.default_rng(0)
    network = Network.random([6], symbols=5, embedding=6, tied=True, rng=rng, threshold=0.05)
    model = Model(network)
    symbols = rng.integers(0, 5, (4, 2))
    output, _, tape = model.forward(symbols, State.zeros(network, 2))
    d_output = rng.normal(size=output.shape).astype(np.float32)
    gradient = model.backward(tape, d_output)["embedding"].astype(np.float64)
    top = tape.top.reshape(8, 6).astype(np.float64)
    from_readout = d_output.reshape(8, 5).astype(np.float64).T @ top
    unused = sorted(set(range(5)) - set(symbols.ravel()))
    assert np.abs(gradient[unused] - from_readout[unused]).max(initial=0) <= gamma(16, U32) * 8 * np.abs(d_output).max()
    assert (np.abs(gradient - from_readout).max(axis=1)[np.unique(symbols)] > 0).any()


def _text(n: int = 4000) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 6, n) // 2 * 2 + np.arange(n) % 2


def _small(**changes) -> Settings:
    return Settings(**({"steps": 12, "batch": 4, "window": 8} | changes))


def _net(seed: int = 0, **changes) -> Network:
    options = {"symbols": 8, "embedding": 5, "readout": 8, "threshold": 0.1} | changes
    return Network.random([20, 16], rng=np.random.default_rng(seed), **options)


def test_seed_determines_the_run():
    runs = [
        Trainer(_net(), _text(), _small(regularisers=Regularisers(dropout_top=0.2), seed=seed)) for seed in (7, 7, 8)
    ]
    for trainer in runs:
        trainer.run()
    first, same, other = (trainer.model.parameters for trainer in runs)
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first["readout"], other["readout"])


def test_training_learns_and_evaluates_as_the_engine_reads():
    text = np.arange(4000) % 8
    trainer = Trainer(_net(), text, _small(steps=400, learning_rate=1e-2))
    reports = []
    network = trainer.run(reports.append)
    assert [r.step for r in reports] == list(range(1, 401))
    assert reports[-1].bits < 0.3 < 2.5 < reports[0].bits
    assert evaluate(network, text[:500]) < 0.5
    assert 0 < reports[-1].activity < 1


@pytest.mark.parametrize("chunk", [1, 77, 499, 500])
def test_bits_per_symbol_do_not_depend_on_the_chunks_of_the_run(chunk):
    network, text = _net(), np.random.default_rng(3).integers(0, 8, 500)
    done: list[int] = []
    bits, whole = evaluate(network, text, chunk=chunk, report=done.append), evaluate(network, text, chunk=4096)
    assert done == [*range(chunk, 499, chunk), 499]
    # The terms of the sum are the same bits; only the order of the float64 sum differs.
    assert abs(bits - whole) <= gamma(len(text) + 4, U64) * whole
    figures = evaluate_text(network, text)
    assert figures["bits_per_symbol"] == whole and figures["symbols"] == 500


@pytest.mark.parametrize("block", [(1, 1), (2, 8), (3, 5)])
def test_masks_stay_masks_through_the_optimiser(block):
    pruning = GradualPruning(0.7, block, 0, 6, every=2)
    trainer = Trainer(_net(), _text(), _small(), pruning=pruning)
    kept = []
    for _ in trainer:
        for name, mask in trainer.model.masks.items():
            assert not trainer.model.parameters[name][~mask].any(), name
        kept.append({name: mask.copy() for name, mask in trainer.model.masks.items()})
    for before, after in zip(kept[:-1], kept[1:], strict=True):
        assert all((after[name] <= before[name]).all() for name in after), "a pruned weight is not zero"
    for name, mask in kept[-1].items():
        rows, columns = (-(-size // b) for size, b in zip(mask.shape, block, strict=True))
        assert round(0.7 * rows * columns) == sum(
            not mask[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]].any()
            for r in range(rows)
            for c in range(columns)
        )
        assert trainer.model.parameters[name][mask].all()


def test_noise_masks_scale_as_documented():
    network = _net()
    model, rng = Model(network), np.random.default_rng(1)
    masks = [(rng.random((4, n)) < 0.5).astype(np.float32) * 2 for n in (20, 16)]
    noise = Noise(between=(masks[0],), top=masks[1])
    _, _, tape = model.forward(_text(40).reshape(10, 4), State.zeros(network, 4), noise)
    assert np.array_equal(tape.layers[1].x, tape.layers[0].y[1:] * masks[0])
    assert np.array_equal(tape.top, tape.layers[1].y[1:] * masks[1])


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_softmax_cross_entropy(size, rows, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (rows, size)).astype(np.float32)
    targets = rng.integers(0, size, rows)
    gradient = np.empty(rows * size, np.float32)
    total = cross_entropy.softmax_cross_entropy(
        rows, size, logits.ravel(), targets, 0.5, gradient, 0, 0.0, np.empty(0, np.int32), np.empty(0, np.float32)
    )
    wide = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    share = wide / wide.sum(axis=1, keepdims=True)
    # exp is off by 1 ulp and its argument, up to 30, by half of one more: relative 32 u; then two roundings.
    bound = gamma(36 + size, U32)
    assert abs(total + np.log(share[np.arange(rows), targets]).sum()) <= rows * bound * 2
    share[np.arange(rows), targets] -= 1
    assert np.abs(gradient.reshape(rows, size) - 0.5 * share).max() <= bound


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch": 0},
        {"window": -1},
        {"learning_rate": 0.0},
        {"clip": math.nan},
        {"epochs": -1},
        {"window_jitter": -1.0},
        {"thresholds": "free"},
        {"backward": "half"},
        {"seed": -1},
    ],
)
def test_settings_refuse(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        _small(**change)


def test_training_refuses_invalid_arguments():
    with pytest.raises(ValueError, match="too few"):
        Trainer(_net(), _text(30), _small())
    with pytest.raises(ValueError, match="embedding"):
        Trainer(Network.random([4], inputs=3, rng=np.random.default_rng(0)), _text(), _small())
    with pytest.raises(ValueError, match="larger than the matrix"):
        Trainer(_net(), _text(), _small(), pruning=GradualPruning(0.5, (1, 64), 0, 5))
    with pytest.raises(ValueError, match="at least 2"):
        evaluate(_net(), np.zeros(1, int))
    trainer = Trainer(_net(), _text(), _small())
    trainer.model.parameters["readout"][:] = np.inf
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match="step 1"):
        trainer.step()


def test_pruned_weights_stay_pruned_when_trained_again():
    from eventrnn.pruning import compress, prune

    pruned = prune(_net(), 0.8, block=(2, 4))
    kept = {name: weights.kept() for name, weights in pruned.matrices().items()}
    plain = Trainer(pruned, _text(), _small()).run()
    gradual = Trainer(pruned, _text(), _small(), pruning=GradualPruning(0.9, (2, 4), 0, 6, every=1))
    sparsities = [progress.sparsity for progress in gradual]
    assert sparsities == sorted(sparsities) and sparsities[0] > 0.75 and sparsities[-1] > 0.88
    for name, mask in kept.items():
        assert not plain.matrices()[name].to_dense()[~mask].any()
        assert not gradual.model.network().matrices()[name].to_dense()[~mask].any()
        assert compress(plain.matrices()[name].to_dense(), (2, 4)).nnz == mask.sum()


def test_symbols_that_no_network_can_predict_are_refused():
    text = _text()
    few = _net(readout=5)
    none = Network.random([6], symbols=8, embedding=5, rng=np.random.default_rng(0))
    for network, symbols, message in (
        (few, text, "read-out predicts 5"),
        (none, text, "read-out"),
        (_net(), text - 1, "position"),
        (_net(), text / 1.5, "whole numbers"),
        (_net(), text[None], "one row"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(network, symbols, _small())
        with pytest.raises(ValueError, match=message):
            evaluate(network, symbols)
    with pytest.raises(ValueError, match="targets"):
        cross_entropy_bits(np.zeros((3, 4), np.float32), np.array([0, 1, 4]))
    with pytest.raises(ValueError, match="pruning"):
        Trainer(_net(), text, _small(), pruning=GradualPruning(0.5, end=12))


def test_activity_cost_is_the_gradient_of_the_mean_output():
    """The cost in the loss adds cost / size to the gradient of every output, which is its definition."""
    rng = np.random.default_rng(4)
    network = Network.random([12], inputs=5, rng=rng, threshold=0.05)
    model, x = Model(network), rng.normal(size=(5, 2, 5)).astype(np.float32)
    output, _, tape = model.forward(x, State.zeros(network, 2))
    d_output = rng.normal(size=output.shape).astype(np.float32)
    cost = np.float32(3.0)
    direct = model.backward(tape, d_output + cost / np.float32(output.size) * (output > 0))
    by_option = model.backward(tape, d_output, activity_cost=3.0)
    assert all(np.array_equal(direct[name], by_option[name]) for name in direct)
    quiet = [Trainer(_net(), _text(), _small(steps=60, activity_cost=c)) for c in (0.0, 5.0)]
    loud, silent = ([p.activity for p in trainer][-1] for trainer in quiet)
    assert silent < loud / 2


def test_a_sigmoid_threshold_never_saturates_and_comes_back():
    network = Network.random([6], inputs=3, rng=np.random.default_rng(0), threshold=0.5)
    model = Model(network, thresholds="sigmoid")
    logits = model.parameters["layers.0.threshold"]
    for far in (1e4, -1e4):
        logits[:] = far
        model.apply_masks()
        threshold = model.network().layers[0].threshold
        assert (threshold > 0).all() and (threshold < 1).all()
        assert thresholds.gradient("sigmoid", threshold, np.ones(6, np.float32)).all(), "there is a way back"
        again = Model(model.network(), thresholds="sigmoid")
        assert np.abs(again.parameters["layers.0.threshold"]).max() <= np.abs(logits).max()
    # The float32 numbers next to 0 and 1 are valid thresholds.
    edges = np.array([np.finfo(np.float32).tiny, 1 - U32], np.float32)
    layer = replace(network.layers[0], threshold=np.resize(edges, 6))
    model = Model(replace(network, layers=(layer,)), thresholds="sigmoid")
    before = model.parameters["layers.0.threshold"].copy()
    model.apply_masks()
    assert np.array_equal(before, model.parameters["layers.0.threshold"]), "continued training keeps the thresholds"
