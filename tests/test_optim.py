"""Optimisers compared with their definitions, clipping, schedules, and the start of averaging in NT-ASGD."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn.training import Optimiser, Schedule, clip_by_layer, clip_by_norm
from eventrnn.training.optim import KINDS, norms
from support.tolerance import U32, gamma


def _case(seed=0):
    rng = np.random.default_rng(seed)
    names = {"w": 9, "readout.bias": 5, "layers.0.threshold": 4, "embedding": 3, "readout": 2}
    parameters = {name: rng.uniform(0.1, 1, n).astype(np.float32) for name, n in names.items()}
    return parameters, [{n: rng.normal(size=p.shape).astype(np.float32) for n, p in parameters.items()} for _ in "abcd"]


def _wide(parameters):
    return {name: value.astype(np.float64) for name, value in parameters.items()}


def _close(parameters, expected, roundings):
    for name, value in parameters.items():
        assert (np.abs(value - expected[name]) <= gamma(roundings, U32) * (1 + np.abs(expected[name]))).all(), name


@pytest.mark.parametrize("kind", ["adamw", "adam"])
@pytest.mark.parametrize("beta1", [0.0, 0.5])
def test_adam_follows_its_definition(kind, beta1):
    parameters, gradients = _case()
    rates = {"threshold_rate": 0.5, "bias_rate": 2.0, "embedding_rate": 0.25, "readout_rate": 0.125}
    settings = Optimiser(kind, beta1=beta1, beta2=0.75, epsilon=0.125, **rates)
    rule, wide = settings.build(parameters, 0.25), _wide(parameters)
    first, second = ({name: np.zeros(p.shape) for name, p in wide.items()} for _ in range(2))
    for t, gradient in enumerate(gradients, 1):
        rule.step(parameters, gradient, 0.25)
        for name, value in wide.items():
            decay = 0.25 if name in ("w", "embedding", "readout") else 0.0
            g = gradient[name] + (decay * value if kind == "adam" else 0)
            first[name] = beta1 * first[name] + (1 - beta1) * g
            second[name] = 0.75 * second[name] + 0.25 * g * g
            step = first[name] / (1 - beta1**t) / (np.sqrt(second[name] / (1 - 0.75**t)) + 0.125)
            factors = {"w": 1.0, "readout.bias": 2.0, "layers.0.threshold": 0.5, "embedding": 0.25, "readout": 0.125}
            rate = 0.25 * factors[name]
            wide[name] = value - rate * (step + (decay * value if kind == "adamw" else 0))
    # Four steps of some 16 roundings; Adam divides by at least 0.125, which multiplies them by 8.
    _close(parameters, wide, 4 * 16 * 8)
    assert len(rule.arrays()) == (5 if beta1 == 0 else 10), "no first moment is kept at beta1 = 0"


def test_biases_are_decayed_where_asked_and_thresholds_never():
    parameters, _ = _case()
    before = _wide(parameters)
    nothing = {name: np.zeros_like(p) for name, p in parameters.items()}
    Optimiser("adamw", decay_biases=True).build(parameters, 0.5).step(parameters, nothing, 0.5)
    for name, value in parameters.items():
        kept = 1.0 if name.endswith("threshold") else 0.75
        assert np.abs(value - kept * before[name]).max() <= gamma(4, U32)


def test_learning_rate_zero_freezes_without_memory():
    parameters, gradients = _case()
    before = parameters["layers.0.threshold"].copy()
    rule = Optimiser("adamw", threshold_rate=0.0).build(parameters, 0.1)
    rule.step(parameters, gradients[0], 0.1)
    assert np.array_equal(parameters["layers.0.threshold"], before)
    assert not [name for name in rule.arrays() if name.endswith("threshold")]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_descent_follows_its_definition(momentum):
    parameters, gradients = _case()
    rule, wide = Optimiser("sgd", momentum=momentum).build(parameters, 0.25), _wide(parameters)
    velocity = {name: np.zeros(p.shape) for name, p in wide.items()}
    for gradient in gradients:
        rule.step(parameters, gradient, 0.5)
        for name, value in wide.items():
            velocity[name] = (
                momentum * velocity[name]
                + gradient[name]
                + (0.25 * value if name in ("w", "embedding", "readout") else 0)
            )
            wide[name] = value - 0.5 * velocity[name]
    _close(parameters, wide, 4 * 8 * 4)


def test_nt_asgd_starts_averaging_when_validation_stops_improving():
    parameters, gradients = _case()
    rule = Optimiser("nt-asgd", patience=2).build(parameters, 0.0)
    # Neither a value worse than the one before nor fewer than three validations start the averaging.
    for loss in (3.0, 9.0, 2.0, 2.5, 1.5):
        assert rule.validated(loss, parameters) is False, loss
    assert rule.averaged(parameters)["w"] is parameters["w"]
    # The best of (3, 9, 2) is 2; equal is not worse.
    assert rule.validated(2.0, parameters) is False
    assert rule.validated(2.01, parameters) is True
    assert rule.validated(99.0, parameters) is False, "it begins once"
    steps = []
    for gradient in gradients:
        rule.step(parameters, gradient, 0.25)
        steps.append(_wide(parameters))
    mean = {name: np.mean([step[name] for step in steps], axis=0) for name in parameters}
    _close(rule.averaged(parameters), mean, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_state_restores_bit_for_bit(kind):
    def steps(rule, parameters, gradients):
        for k, gradient in enumerate(gradients):
            rule.step(parameters, gradient, 0.1)
            rule.validated(float(k), parameters)

    parameters, gradients = _case()
    settings = Optimiser(kind, momentum=0.5 if kind == "sgd" else 0.0, patience=1)
    rule = settings.build(parameters, 0.1)
    steps(rule, parameters, gradients)
    copy = {name: value.copy() for name, value in parameters.items()}
    again = settings.build(copy, 0.1)
    again.restore({name: array.copy() for name, array in rule.arrays().items()}, rule.numbers())
    for each, values in ((rule, parameters), (again, copy)):
        steps(each, values, gradients)
    for one, other in ((parameters, copy), (rule.averaged(parameters), again.averaged(copy))):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert rule.numbers() == again.numbers()


def test_clipping_bounds_the_global_norm():
    gradients = {"a": np.array([3.0], np.float32), "b": np.array([[4.0]], np.float32)}
    assert norms(gradients) == {"a": 3.0, "b": 4.0}
    assert clip_by_norm(gradients, 10.0) == 5.0 and gradients["a"][0] == 3.0
    assert clip_by_norm(gradients, 0.5) == 5.0
    assert np.hypot(gradients["a"][0], gradients["b"][0, 0]) <= 0.5 * (1 + gamma(4, U32))


def test_clipping_by_layer_takes_each_layer_for_itself():
    named = {"layers.0.w_in": 3.0, "layers.0.bias_in": 4.0, "layers.1.w_in": 0.5, "readout": 9.0}
    gradients = {name: np.array([value], np.float32) for name, value in named.items()}
    clip_by_layer(gradients, 1.0)
    bound = gamma(4, U32)
    assert (
        np.abs(gradients["layers.0.w_in"][0] - 0.6) <= bound and np.abs(gradients["layers.0.bias_in"][0] - 0.8) <= bound
    )
    assert gradients["layers.1.w_in"][0] == 0.5 and gradients["readout"][0] == 9.0


@given(st.floats(0, 0.9), st.floats(0, 1), st.integers(0, 20))
def test_cosine_schedule_starts_and_ends_as_configured(constant, final, warmup):
    schedule = Schedule("cosine", constant=constant, final=final, warmup=warmup)
    late = [schedule.at(k / 100, warmup + k) for k in range(101)]
    assert late[0] == 1 and all(a >= b for a, b in zip(late[:-1], late[1:], strict=True))
    assert all(rate == 1 for k, rate in enumerate(late) if k / 100 <= constant)
    assert abs(late[-1] - final) <= gamma(8, U32)


def test_steps_and_warm_up():
    steps = Schedule("step", every=0.25, factor=0.5)
    assert [steps.at(k / 8, 99) for k in range(8)] == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert Schedule("step", every=0.1, factor=0.5).at(3 * 0.1, 0) == 0.125
    warm = Schedule("constant", warmup=3)
    assert [warm.at(0.0, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (Optimiser, {"kind": "rmsprop"}),
        (Optimiser, {"beta1": 1.0}),
        (Optimiser, {"epsilon": 0.0}),
        (Optimiser, {"momentum": 0.5}),
        (Optimiser, {"threshold_rate": -1.0}),
        (Optimiser, {"patience": 0}),
        (Schedule, {"kind": "linear"}),
        (Schedule, {"final": 2.0}),
        (Schedule, {"every": 0.0}),
        (Schedule, {"warmup": -1}),
    ],
)
def test_refusals_name_the_argument(cls, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        cls(**change)
