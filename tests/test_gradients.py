"""Gradients of the specification: finite differences of the smoothed model, where they are exact derivatives."""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn import cells, reference
from eventrnn.cells import CELLS, SURROGATES, Cell, Surrogate
from support import tolerance

#: Positions at which a surrogate's slope has a corner or a jump, in units of its half width.
KINKS = {"triangle": (-1, 0, 1), "fast_sigmoid": (0,), "boxcar": (-1, 1)}
INPUTS, UNITS, BATCH, STEPS = 3, 4, 2, 4
# Roundings from one perturbed number to the loss: at most this many per step, and as many in the sum of the loss.
ROUNDINGS = STEPS * (2 * (INPUTS + UNITS) + 40) + 3 * STEPS * BATCH * UNITS


def far_from_kinks(kind: str, distance: np.ndarray, support: float, by: float) -> bool:
    z = distance * support
    return all((np.abs(z - kink) > by).all() for kink in KINKS.get(kind, ()))


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize(("dampening", "support"), [(0.7, 1.0), (3.6, 3.6), (1.0, 0.25)])
def test_slope_is_the_derivative_of_the_smooth_step(kind, dampening, support):
    code, dampening, support = SURROGATES[kind], np.float64(dampening), np.float64(support)
    distance = np.linspace(-3, 3, 1201) / support + 1e-3 * np.pi
    near = 4 * tolerance.DIFFERENCE_STEP * support
    distance = distance[[far_from_kinks(kind, d, support, near) for d in distance]]

    def step(h):
        return cells.surrogate_step(code, distance + h, dampening, support)

    size = dampening * (np.abs(distance).max() + 1 / support)
    slope = tolerance.central_difference(step, size, roundings=32)
    assert tolerance.sharp(slope, size)
    computed = cells.surrogate_slope(code, distance, dampening, support)
    assert (np.abs(computed - slope.value) <= slope.bound).all()
    assert len(distance) > 1000


def test_every_kind_has_a_slope_of_its_own():
    """An entry of `SURROGATES` without a case in `surrogate_slope` would silently be the last one."""
    distance = np.linspace(-1.5, 1.5, 7)
    slopes = {kind: tuple(cells.surrogate_slope(code, distance, 0.7, 1.3)) for kind, code in SURROGATES.items()}
    assert len(set(slopes.values())) == len(SURROGATES) == len(set(SURROGATES.values()))


@pytest.mark.parametrize("kind", SURROGATES)
def test_slope_of_float32_stays_float32(kind):
    slope = cells.surrogate_slope(
        SURROGATES[kind], np.linspace(-2, 2, 9, dtype=np.float32), np.float32(0.7), np.float32(1)
    )
    assert slope.dtype == np.float32


def test_heights_and_widths_are_as_documented():
    def slope(kind, distance):
        return cells.surrogate_slope(SURROGATES[kind], *map(np.float64, (distance, 0.7, 2.0)))

    lobes = slope("multi_gaussian", 0)
    assert {float(slope(kind, 0)) for kind in SURROGATES if kind != "multi_gaussian"} == {0.7}
    assert 0.7 < lobes < 1.15 * 0.7
    # 1 / support is the half width: the triangle and the box end there.
    for kind in ("triangle", "boxcar"):
        assert slope(kind, 0.5) == 0
        assert slope(kind, -0.4999) > 0
    # The values of the released code: 0.7 * max(0, 1 - |v - threshold|).
    assert Surrogate() == Surrogate("triangle", 0.7, 1.0)


def random_case(variant: str, kind: str) -> tuple[Cell, dict, np.ndarray, np.ndarray, np.ndarray]:
    """Parameters (with x, c and y among them) and loss weights, no unit near a kink of its slope."""
    cell = Cell(variant=variant, surrogate=Surrogate(kind, 0.7, 1.3))
    rng = np.random.default_rng(5)
    while True:
        rows = 3 * UNITS
        case = {
            "w_in": rng.standard_normal((INPUTS, rows)) / 2,
            "w_rec": rng.standard_normal((UNITS, rows)) / 2,
            "bias_in": rng.standard_normal(rows) / 2,
            "bias_rec": rng.standard_normal(rows) / 2,
            "threshold": rng.uniform(0.1, 0.5, UNITS),
            "x": rng.standard_normal((STEPS, BATCH, INPUTS)),
            "c": rng.standard_normal((BATCH, UNITS)) / 2,
            "y": rng.standard_normal((BATCH, UNITS)) / 2,
        }
        distances = np.array([tape.v - case["threshold"] for tape in run(cell, case)])
        if far_from_kinks(kind, distances, 1.3, 256 * tolerance.DIFFERENCE_STEP):
            return cell, case, *rng.standard_normal((3, STEPS, BATCH, UNITS))


def run(cell: Cell, case: dict) -> list[reference.Tape]:
    parameters = {name: case[name] for name in ("w_in", "w_rec", "bias_in", "bias_rec", "threshold")}
    return reference.forward(cell, parameters, case["x"], case["c"], case["y"], smooth=True)


@pytest.mark.parametrize("kind", SURROGATES)
@pytest.mark.parametrize("variant", CELLS["egru"])
def test_backward_is_the_derivative_of_the_smoothed_model(variant, kind):
    cell, case, d_y, d_c, d_cell = random_case(variant, kind)
    tapes = run(cell, case)
    parameters = {name: case[name] for name in ("w_in", "w_rec", "bias_in", "bias_rec", "threshold")}
    gradients = reference.backward(cell, parameters, case["x"], tapes, d_y, d_c, d_cell)
    assert set(gradients) == set(case)

    def total(tapes, magnitude=lambda x: x):
        """The loss: the sum of every y, c and v times a weight of its own."""
        weighed = zip(d_y, d_c, d_cell, tapes, strict=True)
        return sum(
            magnitude(a * t.y).sum() + magnitude(b * t.c).sum() + magnitude(e * t.v).sum() for a, b, e, t in weighed
        )

    size, checked = total(tapes, np.abs), 0
    for name, array in case.items():
        assert gradients[name].shape == array.shape
        for at in np.ndindex(array.shape):

            def loss(h, name=name, array=array, at=at):
                moved = array.copy()
                moved[at] += h
                return total(run(cell, case | {name: moved}))

            slope = tolerance.central_difference(loss, size, ROUNDINGS)
            assert tolerance.sharp(slope, size), (name, at)
            assert abs(gradients[name][at] - slope.value) <= slope.bound, (name, at)
            checked += 1
    assert checked == sum(array.size for array in case.values())


@pytest.mark.parametrize("variant", CELLS["egru"])
def test_hard_events_change_only_the_event_and_its_value(variant):
    # The surrogate gradient is the same code. A hard event changes only `event` on the tape and what follows from it.
    cell, case, d_y, d_c, d_cell = random_case(variant, "triangle")
    parameters = {name: case[name] for name in ("w_in", "w_rec", "bias_in", "bias_rec", "threshold")}
    tapes = reference.forward(cell, parameters, case["x"], case["c"], case["y"])
    assert all(np.isin(tape.event, (0, 1)).all() for tape in tapes)
    gradients = reference.backward(cell, parameters, case["x"], tapes, d_y, d_c, d_cell)
    assert all(np.isfinite(array).all() and array.any() for array in gradients.values())


def _without_reset(u, r, g, rec_g, c_before, v, event, slope, threshold, d_y, d_c, d_cell):
    return cells_backward(u, r, g, rec_g, c_before, v, event, slope, threshold * 0, d_y, d_c, d_cell)


def _wrong_gate_order(*args):
    d_u, d_r, *others = cells_backward(*args)
    return d_r, d_u, *others


def _without_cell_term(*args):
    return cells_backward(*args[:-1], args[-1] * 0)


cells_backward = cells.egru_backward


@pytest.mark.parametrize("fault", [_without_reset, _wrong_gate_order, _without_cell_term])
def test_faults_of_the_backward_step_are_caught(monkeypatch, fault):
    monkeypatch.setattr(cells, "egru_backward", fault)
    with pytest.raises(AssertionError):
        test_backward_is_the_derivative_of_the_smoothed_model("evnn", "arctan")
