"""Noise has the documented shapes, rates and sharing; penalties' gradients are their derivatives."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest

from eventrnn import Cell, Network, State, Surrogate
from eventrnn.training import Model, Noise, Regularisers, Settings, Trainer, check_gradients
from eventrnn.training.regularisers import RATES
from support.tolerance import (
    RATE_GRADIENT,
    RATE_GRADIENT_SUM,
    RATE_REACHED,
    U32,
    U64,
    central_difference,
    sample_mean,
    sharp,
)

STEPS, BATCH = 7, 5


def _model(**changes):
    options = {"symbols": 11, "embedding": 6, "readout": 11, "threshold": 0.1} | changes
    return Model(Network.random([8, 12], rng=np.random.default_rng(0), **options))


def test_no_noise_draws_nothing():
    assert not Regularisers().masks(_model())
    noise = Regularisers().draw(_model(), STEPS, BATCH, seed=1, step=0)
    assert all(getattr(noise, field.name) in (None, ()) for field in fields(Noise))


@pytest.mark.parametrize("sharing", ["time", "batch"])
def test_masks_have_the_documented_shapes_and_scales(sharing):
    model = _model()
    rates = dict.fromkeys(RATES, 0.5)
    noise = Regularisers(**rates, mask_sharing=sharing).draw(model, STEPS, BATCH, seed=1, step=0)
    locked = (BATCH,) if sharing == "time" else (STEPS, 1)
    assert noise.inputs.shape == (*locked, 6) and noise.top.shape == (*locked, 12)
    assert [mask.shape for mask in noise.between] == [(*locked, 8)]
    assert [mask.shape for mask in noise.recurrent] == [(8, 24), (12, 36)]
    assert [mask.shape for mask in noise.zoneout] == [(STEPS, BATCH, 8), (STEPS, BATCH, 12)]
    assert noise.words.shape == (11,)
    for mask in (noise.inputs, noise.top, *noise.between, *noise.recurrent, noise.words):
        assert mask.dtype == np.float32 and set(np.unique(mask)) <= {0.0, 2.0}
    symbols = np.random.default_rng(0).integers(0, 11, (STEPS, BATCH))
    output, _, tape = model.forward(symbols, State.zeros(model.template, BATCH), noise)
    assert np.array_equal(tape.top, tape.layers[1].y[1:] * noise.top)
    assert all(np.isfinite(g).all() for g in model.backward(tape, np.ones_like(output)).values())


def test_rates_equal_the_requested_rates():
    noise = Regularisers(dropconnect=0.7, zoneout=0.2).draw(_model(), 200, 50, seed=3, step=7)
    dropped = np.concatenate([mask.ravel() == 0 for mask in noise.recurrent])
    assert abs(dropped.mean() - 0.7) <= sample_mean(len(dropped))
    held = np.concatenate([mask.ravel() for mask in noise.zoneout])
    assert abs(held.mean() - 0.2) <= sample_mean(len(held))
    assert abs(noise.recurrent[0].mean() - 1) <= sample_mean(noise.recurrent[0].size, 0.5 / 0.3)


def test_masks_depend_on_seed_step_and_place_only():
    rates, model = Regularisers(**dict.fromkeys(RATES, 0.5)), _model()
    drawn = [_bits(rates.draw(model, STEPS, BATCH, seed=seed, step=step)) for seed, step in ((0, 0), (0, 1), (1, 0))]
    each = [mask for masks in drawn for mask in masks]
    assert len(set(each)) == len(each)
    assert _bits(rates.draw(model, STEPS, BATCH, seed=1, step=0)) == drawn[-1]


def _bits(noise) -> list[bytes]:
    """The bytes of all masks of a window."""
    found = [getattr(noise, field.name) for field in fields(noise)]
    return [mask.tobytes() for each in found for mask in (each if isinstance(each, tuple) else (each,))]


def _tape(model, kind):
    """A float64 tape with the arrays that penalties read. The outputs of the top layer have dropout."""
    rng = np.random.default_rng(2)
    layers = []
    for k, n in enumerate((8, 12)):
        v = rng.normal(0, 0.3, (STEPS, BATCH, n))
        threshold = model.parameters[f"layers.{k}.threshold"].astype(np.float64)
        y = np.concatenate([np.zeros((1, BATCH, n)), np.where(v > threshold, v, 0)])
        layers.append(SimpleNamespace(v=v, y=y, threshold=threshold))
    top = (rng.random((BATCH, 12)) < 0.5) * 2.0
    return SimpleNamespace(layers=layers, noise=SimpleNamespace(top=top))


@pytest.mark.parametrize("name", ["activation", "temporal_activation"])
def test_penalties_of_outputs_have_their_derivative(name):
    model = _model()
    tape, rule = _tape(model, name), Regularisers(**{name: 2.0})
    penalty = rule.penalise(model, tape)
    way = np.random.default_rng(5).normal(size=tape.layers[1].v.shape)
    kept = tape.layers[1].y.copy()

    def loss(h):
        tape.layers[1].y[1:] = kept[1:] + h * way
        return rule.penalise(model, tape).loss

    slope = central_difference(loss, penalty.loss + 1, roundings=way.size)
    assert sharp(slope, penalty.loss + 1)
    # The factor of the gradient is a float32 number.
    assert (
        abs(np.vdot(penalty.d_events[1], way) - slope.value)
        <= slope.bound + U32 * np.abs(penalty.d_events[1] * way).sum()
    )
    assert penalty.d_events[0] is None and penalty.d_cells == [None, None] and not penalty.d_thresholds


def test_the_state_term_has_its_derivative_in_cells_and_thresholds():
    model, rule = _model(), Regularisers(state=3.0, state_margin=0.125)
    tape = _tape(model, "state")
    penalty = rule.penalise(model, tape)
    rng = np.random.default_rng(6)
    for k, layer in enumerate(tape.layers):
        v, threshold = layer.v.copy(), layer.threshold.copy()
        way, turn = rng.normal(size=v.shape), rng.normal(size=threshold.shape)

        def loss(h, layer=layer, v=v, threshold=threshold, way=way, turn=turn):
            layer.v, layer.threshold = v + h * way, threshold + h * turn
            return rule.penalise(model, tape).loss

        slope = central_difference(loss, penalty.loss + 1, roundings=way.size)
        layer.v, layer.threshold = v, threshold
        found = np.vdot(penalty.d_cells[k], way) + np.vdot(penalty.d_thresholds[k], turn)
        size = np.abs(penalty.d_cells[k] * way).sum() + np.abs(penalty.d_thresholds[k] * turn).sum()
        assert sharp(slope, penalty.loss + 1)
        # The factor and the margin are float32 numbers.
        assert abs(found - slope.value) <= slope.bound + 4 * U32 * size


def test_the_rate_term_pulls_every_unit_towards_the_target_through_the_surrogate():
    model = _model(cell=Cell(surrogate=Surrogate("boxcar", 0.5, 1.0)))
    tape = _tape(model, "rate")
    penalty = Regularisers(activity_rate=4.0, activity_target=0.25).penalise(model, tape)
    expected = 0.0
    for k, layer in enumerate(tape.layers):
        over = (layer.v > layer.threshold).mean(axis=(0, 1)) - 0.25
        expected += 4.0 * np.mean(over**2)
        inside = np.abs(layer.v - layer.threshold) < 1
        exact = 4.0 * 2 * over / layer.v.size * 0.5 * inside
        assert np.abs(penalty.d_cells[k] - exact).max() <= RATE_GRADIENT * np.abs(exact).max()
        assert (np.sign(penalty.d_cells[k]) == np.sign(over) * inside).all()
        assert np.abs(penalty.d_thresholds[k] + exact.sum(axis=(0, 1))).max() <= RATE_GRADIENT_SUM
    assert abs(penalty.loss - expected) <= 64 * U64 * max(1, expected)


def test_a_target_brings_activity_there_and_learned_thresholds_take_part():
    text = np.random.default_rng(5).integers(0, 8, 3000)
    activity = {}
    for target in RATE_REACHED:
        network = Network.random([24], symbols=8, embedding=6, readout=8, threshold=0.1, rng=np.random.default_rng(0))
        rule = Regularisers(activity_rate=50.0, activity_target=target)
        trainer = Trainer(network, text, Settings(steps=120, batch=8, window=8, learning_rate=1e-2, regularisers=rule))
        activity[target] = np.mean([p.activity for p in trainer][-20:])
        assert abs(activity[target] - target) < RATE_REACHED[target]


def test_refusals_name_the_argument():
    for change in ({"zoneout": 1.0}, {"activation": -1.0}, {"mask_sharing": "units"}, {"activity_target": 2.0}):
        with pytest.raises(ValueError, match=next(iter(change))):
            Regularisers(**change)
    numbers = Network.random([4], inputs=3, readout=2, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="dropout_words"):
        Regularisers(dropout_words=0.1).check(Model(numbers))
    with pytest.raises(ValueError, match="dropout_between"):
        Regularisers(dropout_between=0.1).check(Model(numbers))
    assert check_gradients(numbers).ok
