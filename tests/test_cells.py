"""Float32 arithmetic and the equations of one unit. All backends share them, so no comparison of backends tests them.

Gradients are tested in `test_gradients.py`.
"""

from __future__ import annotations

import math
import sys
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from eventrnn import cells, reference
from eventrnn.cells import Cell
from eventrnn.cpu.kernels import jit, simd
from eventrnn.testing import networks, states
from support import tolerance
from support.conformance import bits
from support.worked_steps import (
    LN2,
    LN3,
    always_firing,
    check_equality_and_leak,
    check_paper_step,
    check_plain_gru,
    check_released_step,
    close,
    random_parameters,
)

F32 = np.float32
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


# --- the FMA ------------------------------------------------------------------------------------------------


def exact_fma(a, b, c) -> np.float32:
    """a * b + c, rounded once to float32 with ties to even, in integer arithmetic."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return F32(0)
    size = abs(exact)
    # 2^exponent <= size < 2^(exponent + 1); the spacing there is 2^(exponent - 23), and 2^-149 below the normal range.
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    spacing = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(size / spacing) * spacing
    value = math.inf if rounded >= Fraction(2) ** 128 else float(rounded)
    return F32(math.copysign(value, exact))


@given(floats, floats, floats)
@example(F32(2**-149), F32(2**-149), F32(2**-149))
@example(F32(2**-149), F32(0.5), F32(0))
@example(F32(3e38), F32(2), F32(-3e38))
@example(F32(3e38), F32(3e38), F32(0))
def test_emulated_fma_rounds_once(a, b, c):
    with np.errstate(over="ignore", under="ignore"):
        assert cells.fma(F32(a), F32(b), F32(c)) == exact_fma(a, b, c)


@given(
    floats.filter(lambda c: 2**-80 < abs(c) < 2**100), st.integers(-4, 4), st.integers(-4, 4), st.sampled_from([-1, 1])
)
# An odd float32 plus half an ulp less 2^-70. Rounding to float64 first makes it a tie.
@example(F32(1 + 2**-23), 1, -1, 1)
def test_emulated_fma_near_a_tie_rounds_once(c, j, k, sign):
    half = 0.5 * float(np.spacing(F32(abs(c))))
    a, b = F32(sign * half * (1 + j * 2**-23)), F32(1 + k * 2**-23)
    assert cells.fma(a, b, F32(c)) == exact_fma(a, b, c)


@given(floats.filter(lambda a: 2**-60 < abs(a) < 2**60), st.integers(0, 2**23 - 1), st.integers(-3, 3))
def test_emulated_fma_with_cancellation_rounds_once(a, mantissa, off):
    b = F32(1 + mantissa * 2**-23)
    c = -F32(a) * b
    c = F32(c + off * np.spacing(np.abs(c)))
    assert cells.fma(F32(a), b, c) == exact_fma(a, b, c)


def test_fma_of_python_numbers_uses_python_arithmetic():
    assert cells.fma(0.1, 0.2, 0.3) == 0.1 * 0.2 + 0.3
    assert cells.fma(Fraction(1, 3), 3, Fraction(1, 7)) == Fraction(8, 7)


# --- compiled against NumPy ---------------------------------------------------------------------------------


@jit.compiled
def run_scalars(a, b, c, out):
    for i in range(len(a)):
        out[0, i] = cells.fma(a[i], b[i], c[i])
        out[1, i] = cells.exp_float32(a[i])
        out[2, i] = cells.sigmoid_float32(a[i])
        out[3, i] = cells.tanh_float32(a[i])


@jit.compiled
def run_lanes(a, b, c, out):
    for i in range(0, len(a), simd.LANES):
        x = simd.load(a, i)
        simd.store(out[0], i, cells.fma(x, simd.load(b, i), simd.load(c, i)))
        simd.store(out[1], i, cells.exp_float32(x))
        simd.store(out[2], i, cells.sigmoid_float32(x))
        simd.store(out[3], i, cells.tanh_float32(x))


def every_kind_of_float(n: int) -> np.ndarray:
    """n float32 of any bits but NaN, many of them in the range of drives; n is a multiple of the lanes."""
    rng = np.random.default_rng(1)
    any_bits = rng.integers(0, 2**32, 4 * n, dtype=np.uint32).view(F32)
    special = np.array([0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 0.625, -0.625, 9.5, 87, 88, -87, -88, 3.4e38], F32)
    gates = np.concatenate([special, rng.normal(0, 4, n // 2).astype(F32)])
    return np.concatenate([gates, any_bits[~np.isnan(any_bits)]])[:n]


@pytest.mark.parametrize("kernel", [run_scalars, run_lanes])
def test_compiled_functions_have_the_bits_of_numpy(kernel):
    n = 1 << 16
    a = every_kind_of_float(n)
    b, c = np.roll(a, 1), np.roll(a, 7)
    out = np.empty((4, n), F32)
    kernel(a, b, c, out)
    with np.errstate(all="ignore"):
        finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
        assert np.array_equal(bits(out[0])[finite], bits(cells.fma(a, b, c))[finite])
        for k, function in enumerate((cells.exp_float32, cells.sigmoid_float32, cells.tanh_float32), start=1):
            assert np.array_equal(bits(out[k]), bits(function(a))), function.__name__


# --- exp, sigmoid, tanh -------------------------------------------------------------------------------------

FUNCTIONS = {
    # name: (ours, exact, float64 of the C library, where the result is in the normal range and not clamped)
    "exp": (cells.exp_float32, mpmath.exp, np.exp, (-87.0, 88.0)),
    "sigmoid": (cells.sigmoid_float32, lambda x: 1 / (1 + mpmath.exp(-x)), lambda x: 1 / (1 + np.exp(-x)), (-87, 3e38)),
    "tanh": (cells.tanh_float32, mpmath.tanh, np.tanh, (-3e38, 3e38)),
}


def ulp(value: float) -> float:
    """Spacing of float32 at a value."""
    return float(np.spacing(F32(abs(value))))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_within_stated_ulps_of_mpmath(name):
    ours, exact, _, (low, high) = FUNCTIONS[name]
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(0, 3, 2000), rng.uniform(-90, 90, 1000), 10.0 ** rng.uniform(-30, 2, 1000)])
    x = np.concatenate([x, [low, high, 0.625, np.nextafter(F32(0.625), F32(0)), 9.5, 9.02, 1e-30]]).astype(F32)
    x = x[(low <= x) & (x <= high)]
    with mpmath.workdps(40), np.errstate(all="ignore"):
        for argument, result in zip(x.tolist(), ours(x).tolist(), strict=True):
            truth = exact(mpmath.mpf(argument))
            if abs(truth) >= sys.float_info.min and abs(truth) >= np.finfo(F32).tiny:
                assert abs(result - truth) <= cells.ULP[name] * ulp(float(truth)), argument


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_within_stated_ulps_of_libm(name):
    ours, _, libm, (low, high) = FUNCTIONS[name]
    # The stride is prime, so that all exponents and varied mantissas occur.
    x = np.arange(0, 2**32, 4093, dtype=np.int64).astype(np.uint32).view(F32)
    x = x[(low <= x) & (x <= high)]
    with np.errstate(all="ignore"):
        result, truth = ours(x).astype(np.float64), libm(x.astype(np.float64))
    normal = np.abs(truth) >= np.finfo(F32).tiny
    error = np.abs(result - truth)[normal] / np.spacing(np.abs(truth[normal]).astype(F32))
    assert normal.sum() > 100_000
    assert error.max() <= cells.ULP[name] + tolerance.LIBM_ULP


def test_functions_saturate_and_keep_zero():
    extreme = np.array([-np.inf, -3e38, 3e38, np.inf], F32)
    with np.errstate(all="ignore"):
        assert cells.tanh_float32(extreme).tolist() == [-1, -1, 1, 1]
        assert cells.sigmoid_float32(extreme)[2:].tolist() == [1, 1]
        assert (cells.sigmoid_float32(extreme)[:2] < np.finfo(F32).tiny).all()
        assert np.isfinite(cells.exp_float32(extreme)).all()
    zeros = np.array([0.0, -0.0], F32)
    assert cells.tanh_float32(zeros).tolist() == [0, 0]
    assert cells.sigmoid_float32(F32(0)) == 0.5
    assert cells.exp_float32(F32(0)) == 1


@given(floats)
def test_tanh_is_odd(x):
    with np.errstate(all="ignore"):
        assert cells.tanh_float32(F32(-x)) == -cells.tanh_float32(F32(x))


# --- one step by hand ---------------------------------------------------------------------------------------
#
# sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4, tanh(ln 2) = (4 - 1) / (4 + 1) = 3/5, tanh(ln 3) = (9 - 1) / (9 + 1) = 4/5.
# Two units, one input x = 1. Unit 0 sent 1/2 in the step before, unit 1 nothing. Columns: u0 u1  r0 r1  g0 g1.


def test_released_step_by_hand():
    check_released_step()


def test_released_step_backward_by_hand():
    parameters, tape = check_released_step()
    x = np.array([[[1.0]]])
    d_y, d_c = np.array([[[1.0, 1.0]]]), np.array([[[2.0, 1.0]]])
    got = reference.backward(Cell(), parameters, x, [tape], d_y, d_c)
    # slope = 0.7 (1 - |v - threshold|): 0.7 * 0.95 = 0.665 and 0.7 * 0.8 = 0.56
    # d_event = slope (v d_y - threshold d_c): 0.665 (0.55 - 1) = -0.29925;  0.56 (0.05 - 0.25) = -0.112
    # d_v = o d_y + d_event + d_c: 1 - 0.29925 + 2 = 2.70075;  0 - 0.112 + 1 = 0.888
    # d_threshold = -d_event - o d_c: 0.29925 - 2;  0.112
    assert close(got["threshold"], [-1.70075, 0.112])
    # d_c before = u d_v
    assert close(got["c"], [0.6751875, 0.666])
    # d_u = (c - g) d_v u (1 - u): -0.2 * 2.70075 * 3/16;  -1 * 0.888 * 3/16
    # d_g = (1 - u) d_v (1 - g^2): 3/4 * 2.70075 * 0.64;  1/4 * 0.888 * 0.36
    # d_r = d_g rec_g r (1 - r): 1.29636 * 4/3 ln 2 * 3/16;  0
    d_u, d_g, d_r = (-0.101278125, -0.1665), (1.29636, 0.07992), (1.29636 * LN2 / 4, 0.0)
    assert close(got["bias_in"], [*d_u, *d_r, *d_g])
    assert close(got["w_in"], [*d_u, *d_r, *d_g])
    # The recurrent g row sees its gradient through the reset gate, 3/4 of it; only unit 0 sent, 1/2.
    recurrent = [*d_u, *d_r, 0.97227, 0.05994]
    assert close(got["bias_rec"], recurrent)
    assert close(got["w_rec"], [*(0.5 * np.array(recurrent)), 0, 0, 0, 0, 0, 0])
    # d_x = -ln 3 d_u0 + ln 3 (d_r0 + d_r1)
    assert close(got["x"], [LN3 * (0.101278125 + 1.29636 * LN2 / 4)])
    # d_y before: unit 0 reaches only g0, by 8/3 ln 2; unit 1 everything, by 9
    assert close(got["y"], [8 / 3 * LN2 * 0.97227, 9 * sum(recurrent)])


def test_paper_step_by_hand():
    check_paper_step()


def test_paper_step_backward_by_hand():
    parameters, tape = check_paper_step()
    x = np.array([[[1.0]]])
    d_y, d_c = np.array([[[1.0, 1.0]]]), np.array([[[2.0, 1.0]]])
    got = reference.backward(Cell(variant="paper"), parameters, x, [tape], d_y, d_c)
    # slope: 0.7 * 0.99 = 0.693;  0.7 * 0.8 = 0.56.  d_event = slope v d_y: 0.03465;  0.028
    assert close(got["threshold"], [-0.03465, -0.028])
    # d_v = o d_y + d_event + d_c: 3.03465;  1.028.  d_c before = u d_v
    assert close(got["c"], [0.7586625, 0.771])
    # d_u = -0.2 * 3.03465 * 3/16;  -1 * 1.028 * 3/16.  d_g = 3/4 * 3.03465 * 0.64;  1/4 * 1.028 * 0.36
    d_u, d_g = (-0.113799375, -0.19275), (1.456632, 0.09252)
    # d_sent = d_g W_g: unit 0 8/3 ln 2 * 1.456632; unit 1 9 (1.456632 + 0.09252) = 13.942368
    # d_r = d_sent y r (1 - r): 8/3 ln 2 * 1.456632 * 1/2 * 3/16 = 0.364158 ln 2;  0
    d_r = (0.364158 * LN2, 0.0)
    assert close(got["bias_in"], [*d_u, *d_r, *d_g])
    assert close(got["bias_rec"], [*d_u, *d_r, *d_g])
    gates, candidate = np.array([*d_u, *d_r]) / 2, np.array(d_g) * 3 / 8
    assert close(got["w_rec"], [*gates, *candidate, 0, 0, 0, 0, 0, 0])
    # d_y before = -d_v + r d_sent + d_gates W_gates (unit 1: 9 (d_u0 + d_u1 + d_r0))
    unit_1 = -1.028 + 0.75 * 13.942368 + 9 * (-0.113799375 - 0.19275 + 0.364158 * LN2)
    assert close(got["y"], [-3.03465 + 0.75 * 8 / 3 * LN2 * 1.456632, unit_1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_step_at_threshold_sends_nothing_and_cells_decay(dtype):
    check_equality_and_leak(dtype)


# --- symmetries and limits of the specification -------------------------------------------------------------


def permuted(parameters: dict, order: np.ndarray) -> dict:
    n = len(order)
    rows = np.concatenate([order, order + n, order + 2 * n])
    renamed = {name: parameters[name][rows] for name in ("bias_in", "bias_rec")}
    w_rec = parameters["w_rec"][order][:, rows]
    return renamed | {"w_in": parameters["w_in"][:, rows], "w_rec": w_rec, "threshold": parameters["threshold"][order]}


@pytest.mark.parametrize("variant", cells.CELLS["egru"])
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9))
def test_permuting_units_permutes_the_run(variant, seed, n):
    rng = np.random.default_rng(seed)
    parameters = random_parameters(rng, 4, n, F32)
    # One source per target: a sum over units would change its order with the permutation.
    source = rng.integers(0, n, 3 * n)
    parameters["w_rec"] *= np.arange(n)[:, None] == source[None, :]
    order = rng.permutation(n)
    x, c = rng.standard_normal((8, 2, 4)).astype(F32), rng.standard_normal((2, n)).astype(F32)
    y = np.maximum(c, 0)
    cell = Cell(variant=variant)
    plain = reference.forward(cell, parameters, x, c, y)
    renamed = reference.forward(cell, permuted(parameters, order), x, c[:, order], y[:, order])
    for a, b in zip(plain, renamed, strict=True):
        assert np.array_equal(bits(a.y[:, order]), bits(b.y))
        assert np.array_equal(bits(a.c[:, order]), bits(b.c))


@given(networks(layers=1, cells=[Cell()], dyadic=True, embedding=False), st.integers(0, 2**32 - 1), st.data())
def test_permuting_units_of_a_dyadic_step(network, seed, data):
    # Sums of dyadic numbers are exact in any order, so that no weight has to be zero here.
    rng = np.random.default_rng(seed)
    layer = network.layers[0]
    parameters, order = reference.layer_parameters(layer), rng.permutation(layer.units)
    state = data.draw(states(network, 2))
    x, y = (np.round(rng.standard_normal((2, k)) * 16).astype(F32) / 16 for k in (layer.inputs, layer.units))
    plain = reference.step(layer.cell, parameters, x, state.cells[0], y)
    renamed = reference.step(layer.cell, permuted(parameters, order), x, state.cells[0][:, order], y[:, order])
    assert np.array_equal(bits(plain.y[:, order]), bits(renamed.y))
    assert np.array_equal(bits(plain.c[:, order]), bits(renamed.c))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("variant", cells.CELLS["egru"])
@given(seed=st.integers(0, 2**32 - 1), cut=st.integers(0, 6))
def test_reference_split_in_batch_and_time_is_equal(variant, dtype, seed, cut):
    rng = np.random.default_rng(seed)
    parameters, cell = random_parameters(rng, 3, 5, dtype), Cell(variant=variant)
    x, c = rng.standard_normal((6, 3, 3)).astype(dtype), rng.standard_normal((3, 5)).astype(dtype)
    y = np.maximum(c, 0)
    whole = reference.forward(cell, parameters, x, c, y)
    head = reference.forward(cell, parameters, x[:cut], c, y)
    last_c, last_y = (head[-1].c, head[-1].y) if head else (c, y)
    tail = reference.forward(cell, parameters, x[cut:], last_c, last_y)
    for a, b in zip(whole, head + tail, strict=True):
        assert np.array_equal(a.y, b.y)
        assert np.array_equal(a.c, b.c)
    for b in range(3):
        alone = reference.forward(cell, parameters, x[:, b : b + 1], c[b : b + 1], y[b : b + 1])
        assert np.array_equal([tape.y[b] for tape in whole], [tape.y[0] for tape in alone])


@pytest.mark.parametrize("seed", range(3))
def test_reference_without_thresholds_equals_plain_gru(seed):
    check_plain_gru(seed)


@pytest.mark.torch
def test_reference_without_thresholds_equals_torch_gru():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    rng = np.random.default_rng(4)
    n = 6
    parameters, x, h = always_firing(rng, 4, n), rng.uniform(-1, 1, (8, 3, 4)), rng.uniform(0, 1, (3, n))
    gru = torch.nn.GRU(4, n).double()
    # torch packs (r, z, n) with z the keep gate.
    order = np.concatenate([np.arange(n, 2 * n), np.arange(n), np.arange(2 * n, 3 * n)])
    names = {"weight_ih_l0": "w_in", "weight_hh_l0": "w_rec", "bias_ih_l0": "bias_in", "bias_hh_l0": "bias_rec"}
    with torch.no_grad():
        for theirs, ours in names.items():
            getattr(gru, theirs).copy_(torch.from_numpy(np.ascontiguousarray(parameters[ours][..., order].T)))
        expected, _ = gru(torch.from_numpy(x), torch.from_numpy(h[None]))
    tapes = reference.forward(Cell(), parameters, x, h, h)
    difference = np.array([tape.y for tape in tapes]) - expected.numpy()
    assert np.abs(difference).max() <= tolerance.torch_gru(n, len(x))
