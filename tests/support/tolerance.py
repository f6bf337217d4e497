"""Every tolerance of the test suite, with its derivation. Exact comparisons need none: they use `==`.

Notation: u is the unit roundoff of the format. A sum of n fused multiply-adds, or of n products and n additions of
magnitudes that add up to S, is off by at most gamma(n) S, gamma(n) = n u / (1 - n u) (Higham 2002, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eventrnn import cells
from eventrnn.cells import Cell

U32, U64 = 2.0**-24, 2.0**-53
# Bounds the absolute error of a float32 result below the normal range: it exceeds half the spacing of subnormals.
TINY32 = 2.0**-126


def gamma(n: int, u: float) -> float:
    """Relative error of a chain of n roundings."""
    return n * u / (1 - n * u)


# --- fixed numbers ------------------------------------------------------------------------------------------

#: Recorded runs of the published code, float64. A gradient adds up at most 25 steps of sums over 48 inputs and a sum
#: over 100 rows: 1,300 roundings, gamma = 1.44e-13. Magnitudes in these sums add to below 7.
GOLDEN = 1e-12

#: A step worked by hand in float64: fewer than 64 roundings of numbers below 4, including the logarithms.
HAND_WORKED = 4 * gamma(64, U64)

#: Where millions of values are tested, the float64 functions of the C library stand for the exact ones. Their error is
#: below one ulp of float64, which is 2^-29 ulp of float32.
LIBM_ULP = 2.0**-29

#: Bytes by which memory may grow in 2,000 steps of a stream, in the best of four such intervals. Other parts of the
#: process allocate occasionally, but a leak shows in every interval: one object of 16 bytes per step would add 32,000.
STREAM_BYTES = 4_000

#: At most this share of units may lie so close to their threshold that rounding could move the event.
INSIDE_MARGIN = 0.01

#: The largest bound on v in the test's network, so that the bound can separate right from wrong. The magnitudes of the
#: 160 terms of a drive add up to about 20: gamma(160) 20 = 2e-4, of which a sigmoid passes a quarter. The limit is a
#: 1,000th of a typical threshold.
SHARPEST_MARGIN = 1e-4

#: float32 v = tanh(2) / 2: half of 1.5 ulp of tanh, and the rounding of the decimal thresholds, u / 2 each.
HALF_TANH = 4 * U32

#: Average activity of drawn networks. Some units fire and some do not.
ACTIVITY_RANGE = (0.1, 0.9)


#: A gradient of the rate term: a mean over samples in float64, rounded to float32 and multiplied by three factors.
RATE_GRADIENT = 4 * U32

#: The sum of about 100 such gradients, each below 1/16, over steps and samples, per threshold.
RATE_GRADIENT_SUM = gamma(1024, U32) / 16

#: Target activity -> largest distance from it after 120 updates of 24 units with a strong rate term. The distance
#: allows for half the activity of one unit and for the oscillation at a learning rate of 1e-2.
RATE_REACHED = {0.05: 0.05, 0.5: 0.15}

#: Distance from a corner of the surrogate that exceeds every rounding error of v: gamma of 200 terms is 1.2e-5.
CORNER = 1e-3

#: The greedy mask prunes at most this factor more magnitude than the optimal mask: Hubara et al. (2021). It is tight.
GREEDY_FACTOR = 2


def sample_mean(n: int, deviation: float = 0.5) -> float:
    """Five standard deviations of the mean of n draws. Numbers within [0, 1] have a deviation of at most 0.5."""
    return 5 * deviation / np.sqrt(n)


def int8_error(scales: np.ndarray) -> np.ndarray:
    """Largest difference between a weight and its decoded int8 code, for scales of any shape.

    The nearest code is within half a scale. Decoding rounds once, which adds u times at most 128 scales.
    """
    return scales.astype(np.float64) * (0.5 + 128 * U32)


def torch_gru(n: int, steps: int) -> float:
    """Bound on the difference of a float64 GRU of n units from PyTorch's, whose products sum in another order.

    The test draws recurrent weights whose magnitudes add up to at most 1 per gate row. Outputs stay within [-1, 1].
    Then one step, as a function of h, multiplies an error by at most 3: u <= 1 directly, |h - g| / 4 <= 1/2 through u,
    and r + |rec_g| / 4 <= 3/2 through the candidate, with rec_g within [-2, 2]. A step adds at most gamma(2n + 16) 8:
    sums of magnitude below 8 in at most 2n + 16 roundings. The result bounds the sum over all steps.
    """
    return 3.0**steps * gamma(2 * n + 16, U64) * 8


# --- float32 against float64 --------------------------------------------------------------------------------


def soft_target_error(classes: int, amplified: float) -> float:
    """Error of the loss of a row with soft targets, and of a gradient of its logits, in float32 from exact logits.

    classes   : number of logits, of magnitude below 30
    amplified : probability of the rest by the teacher, divided by that by the softmax

    An exponential is off by 1 ulp, and its argument by half of one: relative 32 u. It passes a quotient, a factor, a
    product and two differences of numbers of at most 1. The probability of the rest is a difference of float64 sums of
    such exponentials, of the softmax and of the symbols with probabilities: its relative error is that of a share,
    divided by its own size, and the loss and the gradient have it times the teacher's probability. Sums of the given
    float32 probabilities are float64. A logarithm of such a share is off by as much, and a loss has three of them.
    """
    return 4 * gamma(48, U32) * (1 + amplified) + gamma(classes, U64) * (1 + amplified)


def gate_error(kept: int) -> float:
    """Relative error of a gate in float64 from exact positive logits, computed by two routes.

    Each route has an exponential of at most one ulp (two roundings), a ratio or a mean, a sum of `kept` positive
    numbers, a quotient and a product.
    """
    return 2 * gamma(kept + 6, U64)


def single_gate_error(ratios: np.ndarray) -> float:
    """Relative error of float32 gates from float32 logits, from the ratios of the chosen blocks (`weights/gated.py`).

    A ratio has an exponential of at most 1 ulp, two roundings, or a quotient; the difference of two logits before the
    exponential is exact up to a rounding of at most 88 u of it. A sum of n ratios in any order, a quotient and a
    product follow. Where ratios of both signs cancel, the error of the sum grows by their magnitudes over the sum.
    """
    condition = float(np.abs(ratios).sum() / abs(ratios.sum()))
    return gamma(92 + len(ratios) + 4, U32) * (1 + condition)


def gated_drive_bound(kept: int, terms: np.ndarray) -> np.ndarray:
    """Error bound of drives of gated blocks from exact positive logits, with sums in any order.

    terms (rows, J, P) are the magnitudes of gate * input * weight. Each has the error of a gate, of at most kept + 6
    roundings (`gate_error`, one route), a rounding of gate * input, and those of a product and a sum of J terms. Twice
    u64 covers the float64 comparison.
    """
    return (gamma(kept + terms.shape[1] + 8, U32) + 2 * gamma(kept + terms.shape[1] + 8, U64)) * terms.sum(axis=1)


def drive_bound(weights: np.ndarray, values: np.ndarray, bias: np.ndarray, u: float = U32) -> np.ndarray:
    """Error bound of one drive in any order of summation: gamma_n (|b| + sum |w| |x|).

    weights (J, P), values (B, J), bias (P,) -> (B, P). n is the number of terms, plus one for a bias that is added at
    the end. Twice gamma of u64 covers the float64 sum of the comparison and the sum computed here.
    """
    size = np.abs(bias) + np.abs(values).astype(np.float64) @ np.abs(weights).astype(np.float64)
    n = len(weights) + 1
    return (gamma(n, u) + 2 * gamma(n, U64)) * size


def integer_bound(codes: np.ndarray, scales: np.ndarray, values: np.ndarray, bias: np.ndarray, bits: int) -> np.ndarray:
    """Bound on the difference of a drive in integers (`reference_products.propagate_integers`) from the exact tier's.

    A scaled value x = value * scale is rounded once, by u |x|, and then to half a step. The step is a power of two:
    with m the largest |x|, 2^bits steps exceed m and 2^bits / 2 steps do not, or the step is 2^-126. The sum is exact;
    its conversion and the FMA round once each. The exact tier decodes a weight with one rounding and then sums
    (`drive_bound`). TINY32 bounds what underflows in any of these.

    codes (J, P) int8, scales (J,), values (B, J), bias (P,) -> (B, P)
    """
    scaled, size = np.abs(values).astype(np.float64) * scales, np.abs(codes).astype(np.float64)
    step = np.maximum(scaled.max(axis=1, initial=0, keepdims=True) * (1 + U32) * 2.0 ** (1 - bits), TINY32)
    rounded = np.where(scaled > 0, step / 2, 0) @ size
    decoded = codes.astype(np.float64) * scales[:, None]
    terms = np.abs(bias) + scaled @ size + rounded
    return rounded + drive_bound(decoded, values, bias) + gamma(4, U32) * terms + TINY32 * (1 + size.sum(axis=0))


@dataclass(frozen=True)
class Running:
    """A value known in float64 and a bound on the error of its float32 twin (running error analysis, Higham 3.3).

    Every operation adds the roundoff of its float32 result, u (|value| + error). The roundoff of float64 is below
    u 2^-28, which a factor of 1 + 2^-20 covers.
    """

    value: np.ndarray
    error: np.ndarray | float = 0.0

    def rounded(self, by: float = U32) -> Running:
        return Running(self.value, (self.error + by * (np.abs(self.value) + self.error) + TINY32) * (1 + 2.0**-20))

    def exact_sum(self, other: Running) -> Running:
        return Running(self.value + other.value, self.error + other.error)

    def exact_product(self, other: Running) -> Running:
        error = np.abs(self.value) * other.error + np.abs(other.value) * self.error + self.error * other.error
        return Running(self.value * other.value, error)

    def __add__(self, other: Running) -> Running:
        return self.exact_sum(other).rounded()

    def __sub__(self, other: Running) -> Running:
        return self + Running(-other.value, other.error)

    def __mul__(self, other: Running) -> Running:
        return self.exact_product(other).rounded()

    def fma(self, other: Running, addend: Running) -> Running:
        return self.exact_product(other).exact_sum(addend).rounded()

    # An ulp is at most 2 u of the value. The slopes of sigmoid and tanh are at most 1/4 and 1.
    def sigmoid(self) -> Running:
        through = Running(1 / (1 + np.exp(-self.value)), self.error / 4)
        return through.rounded(2 * U32 * cells.ULP["sigmoid"])

    def tanh(self) -> Running:
        return Running(np.tanh(self.value), self.error).rounded(2 * U32 * cells.ULP["tanh"])


def _drive(weights, values: Running, bias) -> Running:
    total = bias + values.value @ weights
    inherited = values.error @ np.abs(weights) if np.ndim(values.error) else 0.0
    size = np.abs(values.value) + values.error
    return Running(total, drive_bound(weights, size, bias) + inherited)


def cell_bound(variant: str, parameters: dict, x: np.ndarray, c: np.ndarray, y: np.ndarray) -> Running:
    """v of one step in float64, with a bound on the error of a float32 step from the same state.

    x (B, I), c and y (B, N), and the parameters are float64.
    """
    n = len(parameters["threshold"])
    w_rec, bias_rec = parameters["w_rec"], parameters["bias_rec"]
    one = Running(np.ones_like(c))
    drive_in = _drive(parameters["w_in"], Running(x), parameters["bias_in"])
    gates = [Running(drive_in.value[:, k : k + n], drive_in.error[:, k : k + n]) for k in (0, n, 2 * n)]
    drive_rec = _drive(w_rec, Running(y), bias_rec)
    rec = [Running(drive_rec.value[:, k : k + n], drive_rec.error[:, k : k + n]) for k in (0, n, 2 * n)]
    u, r = (gates[0] + rec[0]).sigmoid(), (gates[1] + rec[1]).sigmoid()
    if variant == "evnn":
        g = r.fma(rec[2], gates[2]).tanh()
        return u.fma(Running(c), (one - u) * g)
    sent = r * Running(y)
    g = (gates[2] + _drive(w_rec[:, 2 * n :], sent, bias_rec[2 * n :])).tanh()
    return u.fma(Running(c), (one - u) * g) - Running(y)


def plain_bound(cell: Cell, parameters: dict, x: Running, c: Running, y: Running) -> tuple[Running, Running]:
    """Output and cell after a step of a GRU or an LSTM, from inputs and a state that have errors of their own.

    x (B, I), c and y (B, N), and the parameters are float64. A run of several layers and steps is bounded by calls in
    a row. Adding zero to an output rounds nothing.
    """
    n, gates = len(parameters["threshold"]), cell.gates
    w_rec, bias_rec = parameters["w_rec"], parameters["bias_rec"]

    def split(drive: Running, count: int) -> list[Running]:
        error = np.broadcast_to(drive.error, drive.value.shape)
        return [Running(drive.value[:, k * n : k * n + n], error[:, k * n : k * n + n]) for k in range(count)]

    into = split(_drive(parameters["w_in"], x, parameters["bias_in"]), gates)
    rec = split(_drive(w_rec, y, bias_rec), gates)
    if cell.name == "lstm":
        i, f, o = ((into[k] + rec[k]).sigmoid() for k in (0, 1, 3))
        after = f.fma(c, i * (into[2] + rec[2]).tanh())
        return o * after.tanh(), after
    u, r = ((into[k] + rec[k]).sigmoid() for k in (0, 1))
    if cell.reset_first:
        g = (into[2] + _drive(w_rec[:, 2 * n :], r * y, bias_rec[2 * n :])).tanh()
    else:
        g = r.fma(rec[2], into[2]).tanh()
    h = u.fma(c, (Running(np.ones_like(u.value)) - u) * g)
    return h, h


def engine_and_library(error: np.ndarray) -> np.ndarray:
    """Bound on the difference of an engine's GRU or LSTM and that of a library of machine learning, from the engine's
    error as `plain_bound` has it.

    The library is another float32 run of the same equations: its order of sums is covered by the bound, and its exp and
    tanh are taken to be within 4 ulp, as in `engine_and_trainer`.
    """
    return engine_and_trainer(error)


def engine_and_trainer(error: np.ndarray) -> np.ndarray:
    """Bound on the difference of an engine's plain cells and the trainer's, from the error as `plain_bound` has it.

    The trainer has the same functions of one unit. Its drives are sums in another order, to which the bias is added
    last; `drive_bound` holds for every order. Both sides are therefore within the bound.
    """
    return 2 * error


def gradient_bound(single: np.ndarray, exact: np.ndarray, u: float = U32) -> float:
    """Bound on the error of a gradient in precision u whose sums have another order than those of the specification.

    single, exact : gradients of the specification in float32 and in float64

    A bound that always holds would grow with units and steps until it allows any error. As in `check_gradients`, the
    rounding error of the specification is measured instead, and 64 times as much is allowed. To first order it is in
    proportion to u. One array may be exact by chance: at least one rounding of the largest element is assumed.
    """
    cost = float(np.abs(single - exact).max(initial=0.0))
    return 64 * max(cost, U32 * float(np.abs(exact).max(initial=0.0))) * (u / U32)


#: Relative error of a factor of a tensor-core product, which has 11, 8 or 11 significant bits. float16 and bfloat16 are
#: rounded, tf32 is truncated. Below 2^-14 float16 has no normal numbers, and its absolute error is TINY16 = 2^-24 / 2.
ROUNDED = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "tf32": 2.0**-10}
TINY16 = 2.0**-25

#: Absolute errors of the approximate sigmoid and tanh on a GPU. ex2.approx has a relative error of 2^-22. Its argument
#: is rounded twice, which adds |x| 2^-23. The sigmoid multiplies both by s (1 - s), which is below 1/4; |x| s (1 - s)
#: is below 0.23. The rounded sum and rcp.approx have errors of 2^-23 each; the bound takes three of them. tanh doubles
#: the error and rounds once more.
QUICK_SIGMOID = 2.0**-22 / 4 + 0.23 * 2.0**-23 + 3 * 2.0**-23
QUICK_TANH = 2 * QUICK_SIGMOID + 2.0**-24

#: largest error of tanh.approx.f32, whose relative error is 2^-11 at most (PTX ISA, "tanh")
INSTRUCTION_TANH = 2.0**-11


def two_roundings(precision: str) -> float:
    """Largest difference of two nearly equal results below 4 after each was rounded to the precision.

    Their own difference can change the rounding of both.
    """
    return 2 * 4 * ROUNDED[precision]


def rounded_cell_bound(
    precision: str, parameters: dict, x: np.ndarray, c: np.ndarray, y: np.ndarray, *, instruction: bool = False
) -> Running:
    """`cell_bound` of a step with tensor-core products, for the released variant.

    instruction : tanh is that of the GPU, and sigmoid(x) is (1 + tanh(x / 2)) / 2

    The factors of a drive are rounded. This adds 2 e + e^2 of their product, and TINY16 of each factor. The sum is
    rounded too. The bias is added last, with one more rounding. All of this is an error of the drive.
    """
    e = ROUNDED[precision]
    tiny = TINY16 if precision == "float16" else 0.0

    def drive(weights, values, bias) -> list[Running]:
        exact, size = bias + values @ weights, np.abs(values) @ np.abs(weights)
        moved = (2 * e + e * e) * size + tiny * (np.abs(values).sum(axis=1)[:, None] + np.abs(weights).sum(axis=0))
        error = moved + drive_bound(weights, np.abs(values) * (1 + e), bias) * (1 + e)
        # The rounding of the sum without the bias.
        error = error + (0 if precision == "tf32" else e) * (np.abs(values @ weights) + error) + tiny
        n = weights.shape[1] // 3
        return [Running(exact[:, k : k + n], error[:, k : k + n]) for k in (0, n, 2 * n)]

    inside = drive(parameters["w_in"], x, parameters["bias_in"])
    rec = drive(parameters["w_rec"], y, parameters["bias_rec"])
    of_sigmoid = INSTRUCTION_TANH / 2 + U32 if instruction else QUICK_SIGMOID
    of_tanh = INSTRUCTION_TANH if instruction else QUICK_TANH

    def gate(k: int) -> Running:
        total = inside[k] + rec[k]
        return Running(1 / (1 + np.exp(-total.value)), total.error / 4 + of_sigmoid)

    u, r = gate(0), gate(1)
    total = r.fma(rec[2], inside[2])
    g = Running(np.tanh(total.value), total.error + of_tanh)
    return u.fma(Running(c), (Running(np.ones_like(c)) - u) * g)


# --- finite differences -------------------------------------------------------------------------------------


#: Step of a central difference for numbers of order 1: about u64^(1/3), where truncation and roundoff are equal.
DIFFERENCE_STEP = 2.0**-17


@dataclass(frozen=True)
class Slope:
    """A derivative by central differences and a bound on its error."""

    value: np.ndarray
    bound: np.ndarray


def central_difference(function: Callable[[float], np.ndarray], size: float, roundings: int) -> Slope:
    """Derivative at 0 of a function evaluated in float64, three times differentiable within two steps of 0.

    With D(h) = (f(h) - f(-h)) / 2h, D(h) = f' + k h^2 + O(h^4), so that D(2h) - D(h) = 3 k h^2: the truncation error of
    D(h) is a third of the difference; the bound takes the whole difference, which also covers the next term.
    Roundoff: each evaluation has an error of gamma(roundings) `size`, where `size` is the sum of the magnitudes that f
    adds up. Two evaluations are divided by 2h, in D(h) and in the difference. A function with a kink within the two
    steps has a large difference and so a useless bound, which `sharp` detects.
    """
    h = DIFFERENCE_STEP
    once = (function(h) - function(-h)) / (2 * h)
    twice = (function(2 * h) - function(-2 * h)) / (4 * h)
    return Slope(once, np.abs(twice - once) + 3 * gamma(roundings, U64) * size / h)


def sharp(slope: Slope, size: float) -> bool:
    """Whether the bound is small enough to detect a wrong derivative: below a 10,000th of the function's size."""
    return bool(np.all(slope.bound < size / 10_000))
