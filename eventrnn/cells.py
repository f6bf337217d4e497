"""Cells: the table of symbols, the equations of one unit, and the surrogate derivatives.

Everything here is plain Python over NumPy values, and works on scalars and on arrays, in float32 and in float64. A
backend compiles loops *around* these functions and never rewrites them: `cpu/kernels/jit.py` and `cuda/kernels/ptx.py`
register them for compilation.

These symbols are used inside formulas and kernels only. The public API uses words.

    here   meaning                                       EGRU paper (ICLR 2023)    EvNN code
    ----   -------------------------------------------   -----------------------   ---------
    B T    samples in a batch, time steps
    I N    inputs and units of a layer
    j i    presynaptic (source), postsynaptic (target)   j, i
    x      input of the layer                            x                         x
    u      keep gate                                     1 - u                     z
    r      reset gate                                    r                         r
    g      candidate                                     z                         g
    v      cell before the event                         c before the event        cur_h
    c      cell carried to the next step                 c                         h
    o      event, 1 or 0                                 Theta(c - theta)          o
    y      graded event, what is sent on                 y                         y
    theta  threshold, one per unit, >= 0                 theta                     thr

    Plain cells                                          here   PyTorch
    ----------------------------------------------       ----   -------
    GRU: keep, reset gate, candidate                     u r g  z r n
    LSTM: input, forget gate, candidate, output gate     i f g o
    LSTM: cell carried to the next step                  c      c
    output, carried to the next step too                 h      h

Gate rows are packed (u, r, g) in the EGRU and in the GRU, and (i, f, g, o) in the LSTM. PyTorch packs the rows of its
GRU (r, z, n) and those of its LSTM (i, f, g, o). `EQUATIONS` names the gates of every cell.

A drive is `bias + sum over j of weight * value`. Its terms are added in ascending order of j, with one float32 FMA per
term. The input drive and the recurrent drive are two sums.

The float32 functions `exp`, `sigmoid` and `tanh` are polynomials of this file. Those of the system's library differ
between platforms, and an error of one ulp (unit in the last place) can move an event to another step. `ULP` states the
largest errors; the tests compare them with mpmath.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import erf

from eventrnn._checks import need_choice, need_kind, need_number

F32 = np.float32

ZERO, HALF, ONE, TWO = F32(0.0), F32(0.5), F32(1.0), F32(2.0)

#: Bounds on the error, in ulp of the float32 result, for results in the normal range. For `exp` the bound holds for
#: arguments in [-87, 88], to which it clamps them.
ULP = {"exp": 1.0, "sigmoid": 2.5, "tanh": 1.5}

# --- primitives: one correctly rounded operation each -------------------------------------------------------


def fma(a: Any, b: Any, c: Any) -> Any:
    """`a * b + c`. In float32 the result is rounded once, as by the hardware instruction; otherwise as Python does."""
    if not _is_float32(c):
        return a * b + c
    # The product of two float32 numbers is exact in float64. The sum is rounded to odd in float64; rounding that to
    # float32 then gives the same as rounding the exact sum once (Boldo and Melquiond 2008).
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    addend = np.asarray(c, np.float64)
    total = product + addend
    tail = total - product
    error = (product - (total - tail)) + (addend - tail)
    bits = total.view(np.int64)
    inexact = (error != 0) & np.isfinite(total) & (bits & 1 == 0)
    step = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + step, bits).view(np.float64).astype(np.float32)[()]


def round_even(x: Any) -> Any:
    """The nearest integer as a float, ties to even."""
    return np.rint(x)


def power_of_two(n: Any) -> Any:
    """`2 ** n` as float32, for a whole float32 number `n` in [-126, 127]."""
    return ((np.asarray(n).astype(np.int32) + np.int32(127)) << np.int32(23)).view(np.float32)[()]


def ldexp(x: Any, n: Any) -> Any:
    """`x * 2 ** n` for `n` as in `power_of_two`. Exact if the result is in the normal range."""
    return x * power_of_two(n)


def reciprocal(x: Any) -> Any:
    """`1 / x` for `x` in [1, 2^125]."""
    return ONE / x


def select(condition: Any, a: Any, b: Any) -> Any:
    """`a` where the condition holds, and `b` elsewhere."""
    return np.where(condition, a, b)[()]


def _is_float32(x: Any) -> bool:
    return getattr(x, "dtype", None) == np.float32


# --- float32 functions, branch-free -------------------------------------------------------------------------

LOG2_E = F32(1.4426950216293335)

LN2_HIGH, LN2_LOW = F32(0.6931471824645996), F32(-1.9046542121259336e-09)

# exp(r) = 1 + r + r^2 * p(r) on |r| <= ln(2) / 2. Relative minimax fit; its error is 0.05 * 2^-24.
EXP_0, EXP_1, EXP_2, EXP_3, EXP_4 = (
    F32(0.4999999403953552),
    F32(0.1666651964187622),
    F32(0.041668396443128586),
    F32(0.008368796668946743),
    F32(0.001381443697027862),
)

# Beyond these arguments the result would leave the normal range. The gates are saturated long before.
EXP_LOWEST, EXP_HIGHEST = F32(-87.0), F32(88.0)

# tanh(x) = x + x^3 * p(x^2) on |x| <= 0.625. Relative minimax fit; its error is 0.07 * 2^-24.
TANH_0, TANH_1, TANH_2, TANH_3, TANH_4 = (
    F32(-0.3333328068256378),
    F32(0.13331441581249237),
    F32(-0.05373971536755562),
    F32(0.02063908614218235),
    F32(-0.005704986397176981),
)

TANH_SPLIT = F32(0.625)

# In float32 tanh is 1 from about 9.01 on. Clamping its argument here changes no result, and keeps exp(2x) finite.
TANH_SATURATED = F32(9.5)


def exp_float32(x: Any) -> Any:
    """Float32 `exp`; arguments are clamped to [-87, 88]."""
    x = select(x > EXP_HIGHEST, EXP_HIGHEST, x)
    return exp_in_range(select(x < EXP_LOWEST, EXP_LOWEST, x))


def exp_in_range(x: Any) -> Any:
    """Float32 `exp` for arguments in [-87, 88]."""
    n = round_even(x * LOG2_E)
    r = fma(-n, LN2_HIGH, x)
    r = fma(-n, LN2_LOW, r)
    p = fma(EXP_4, r, EXP_3)
    p = fma(p, r, EXP_2)
    p = fma(p, r, EXP_1)
    p = fma(p, r, EXP_0)
    p = fma(p, r * r, r)
    return ldexp(p + ONE, n)


def sigmoid_float32(x: Any) -> Any:
    """Float32 logistic function."""
    return ONE / (ONE + exp_float32(-x))


def tanh_float32(x: Any) -> Any:
    """Float32 hyperbolic tangent."""
    size = select(x < ZERO, -x, x)
    square = x * x
    p = fma(TANH_4, square, TANH_3)
    p = fma(p, square, TANH_2)
    p = fma(p, square, TANH_1)
    p = fma(p, square, TANH_0)
    small = fma(p * square, x, x)
    bounded = select(size > TANH_SATURATED, TANH_SATURATED, size)
    # Twice a number is exact, so the sum is rounded once.
    large = fma(-TWO, reciprocal(exp_in_range(TWO * bounded) + ONE), ONE)
    return select(size < TANH_SPLIT, small, select(x < ZERO, -large, large))


def exp(x: Any) -> Any:
    """Exponential in the precision of `x`."""
    return exp_float32(x) if _is_float32(x) else np.exp(x)


def absolute(x: Any) -> Any:
    """Magnitude."""
    return select(x < ZERO, -x, x)


def sigmoid(x: Any) -> Any:
    """Logistic function in the precision of `x`."""
    return sigmoid_float32(x) if _is_float32(x) else 1.0 / (1.0 + np.exp(-x))


def tanh(x: Any) -> Any:
    """Hyperbolic tangent in the precision of `x`."""
    return tanh_float32(x) if _is_float32(x) else np.tanh(x)


# --- EGRU: one unit, one step -------------------------------------------------------------------------------


def egru_value(in_u, in_r, in_g, rec_u, rec_r, rec_g, c):
    """The cell before the event in the released code's variant: the reset gate is applied after the matrix product.

    in_u, in_r, in_g    : input drives of the unit's gates
    rec_u, rec_r, rec_g : recurrent drives of the unit's gates
    c                   : cell of the step before

    Returns `(v, u, r, g)`. The caller compares `v` with the threshold, and subtracts the threshold in the same step.
    Source: Subramoney et al. 2023, eq. 1-2, as released in EvNN 0.2, where u is the keep gate (1 - u of the paper).
    """
    u = sigmoid(in_u + rec_u)
    r = sigmoid(in_r + rec_r)
    v, g = egru_value_of_gates(u, r, in_g, rec_g, c)
    return v, u, r, g


def egru_value_of_gates(u, r, in_g, rec_g, c):
    """The second half of `egru_value`: the cell before the event, and the candidate, from gates and drives."""
    # Where a zero term is skipped, a sum can be -0 although the dense sum is +0. Adding +0 makes both +0.
    g = tanh(fma(r, rec_g, in_g) + ZERO)
    return fma(u, c, (ONE - u) * g), g


def egru_decay(u, pull, c):
    """The cell before the event of a step with known gates: `egru_value` and, without its `- y`, `egru_paper_value`.

    pull : `(1 - u) * g`, rounded

    While a unit receives nothing its gates do not change, and neither does `pull`.
    """
    return fma(u, c, pull)


def egru_reset_gate(in_r, rec_r):
    """The reset gate from its two drives. The paper's variant needs it before the candidate's recurrent product."""
    return sigmoid(in_r + rec_r)


def egru_paper_value(in_u, in_g, rec_u, rec_g, c, y):
    """The cell before the event in the paper's variant: the reset gate is applied before the matrix product.

    in_u, in_g : input drives
    rec_u      : recurrent drive of the keep gate
    rec_g      : recurrent drive of the candidate, the product of its weights with `r * y`
    c, y       : cell and output of the step before; that output is subtracted in this step

    Returns `(v, u, g)`. Source: Subramoney et al. 2023, eq. 1-2.
    """
    u = sigmoid(in_u + rec_u)
    g = tanh((in_g + rec_g) + ZERO)
    return fma(u, c, (ONE - u) * g) - y, u, g


def egru_backward(u, r, g, rec_g, c_before, v, event, slope, threshold, d_y, d_c, d_cell):
    """Adjoint of one step of the released variant (`y = o v`, `c = v - o threshold`).

    u, r, g, rec_g, c_before, v : values of the step, as in `egru_value`; c_before is the cell of the step before
    event, slope                : o, and its (surrogate) derivative with respect to v
    d_y, d_c                    : gradients of the loss with respect to y and c
    d_cell                      : gradient of the terms of the loss that contain v itself

    Returns the gradients of the input drives of u, r and g, of the recurrent drive of g (those of u and r equal the
    gradients of the input drives), of the cell of the step before, and of the threshold. Cost: 26 operations per unit.
    If `event` is a smooth step with that slope, this is the exact derivative.
    """
    d_event = slope * (v * d_y - threshold * d_c)
    d_v = (event * d_y + d_event + d_c) + d_cell
    d_threshold = -d_event - event * d_c
    d_g = (ONE - u) * d_v * (ONE - g * g)
    d_u = (c_before - g) * d_v * u * (ONE - u)
    d_r = d_g * rec_g * r * (ONE - r)
    return d_u, d_r, d_g, d_g * r, u * d_v, d_threshold


def egru_paper_backward(u, g, c_before, v, event, slope, d_y, d_c, d_cell):
    """Adjoint of one step of the paper's variant (`y = o v`, `c = v`), without the reset gate.

    Returns the gradients of the drives of u and g, of the cell of the step before, of the output of the step before
    (through its subtraction only), and of the threshold. Parameters: see `egru_backward`.
    """
    d_event = slope * (v * d_y)
    d_v = (event * d_y + d_event + d_c) + d_cell
    d_g = (ONE - u) * d_v * (ONE - g * g)
    d_u = (c_before - g) * d_v * u * (ONE - u)
    return d_u, d_g, u * d_v, -d_v, -d_event


def egru_paper_reset_backward(r, y_before, d_sent):
    """Adjoint of `sent = r * y_before`: the gradients of the drive of r and of `y_before`."""
    return d_sent * y_before * r * (ONE - r), d_sent * r


# --- GRU and LSTM: one unit, one step -----------------------------------------------------------------------


def gru_value(in_u, in_r, in_g, rec_u, rec_r, rec_g, h):
    """The output of a GRU whose reset gate is applied after the matrix product, as in PyTorch and cuDNN.

    in_u, in_r, in_g    : input drives of the unit's gates
    rec_u, rec_r, rec_g : recurrent drives of the unit's gates
    h                   : output of the step before

    Returns `(h, u, r, g)`: the output and the gates. Source: Cho et al. 2014, arXiv 1406.1078v1, with the reset gate
    as in cuDNN; u is the gate that keeps the old output.
    """
    v, u, r, g = egru_value(in_u, in_r, in_g, rec_u, rec_r, rec_g, h)
    # A unit whose output is zero sends no event. It is +0, as the output of every silent unit.
    return v + ZERO, u, r, g


def gru_before_value(in_u, in_g, rec_u, rec_g, h):
    """The output of a GRU whose reset gate is applied before the matrix product.

    in_u, in_g : input drives
    rec_u      : recurrent drive of the keep gate
    rec_g      : recurrent drive of the candidate, the product of its weights with `r * h`
    h          : output of the step before

    Returns `(h, u, g)`. `egru_reset_gate` gives r. Source: Cho et al. 2014, arXiv 1406.1078v3.
    """
    u = sigmoid(in_u + rec_u)
    g = tanh((in_g + rec_g) + ZERO)
    return fma(u, h, (ONE - u) * g) + ZERO, u, g


def lstm_value(in_i, in_f, in_g, in_o, rec_i, rec_f, rec_g, rec_o, c):
    """Output and cell of an LSTM.

    in_i, in_f, in_g, in_o     : input drives of the unit's gates
    rec_i, rec_f, rec_g, rec_o : recurrent drives of the unit's gates
    c                          : cell of the step before

    Returns `(h, c, i, f, g, o)`: output, cell and gates. Source: Hochreiter and Schmidhuber 1997, with the forget gate
    of Gers et al. 2000 and without peepholes, as in PyTorch.
    """
    i = sigmoid(in_i + rec_i)
    f = sigmoid(in_f + rec_f)
    # Where a zero term is skipped, a sum can be -0 although the dense sum is +0. Adding +0 makes both +0.
    g = tanh((in_g + rec_g) + ZERO)
    o = sigmoid(in_o + rec_o)
    after = fma(f, c, i * g)
    return lstm_output(o, after), after, i, f, g, o


def lstm_output(o, c):
    """The output of an LSTM from its output gate and its cell."""
    return o * tanh(c) + ZERO


def gru_backward(u, r, g, rec_g, h_before, d_h):
    """Adjoint of `gru_value`.

    u, r, g, rec_g, h_before : values of the step, as in `gru_value`; h_before is the output of the step before
    d_h                      : gradient of the loss with respect to h

    Returns the gradients of the input drives of u, r and g, of the recurrent drive of g (those of u and r equal the
    gradients of the input drives), and of the output of the step before, its path through the drives left out.
    """
    d_g = (ONE - u) * d_h * (ONE - g * g)
    d_u = (h_before - g) * d_h * u * (ONE - u)
    d_r = d_g * rec_g * r * (ONE - r)
    return d_u, d_r, d_g, d_g * r, u * d_h


def gru_before_backward(u, g, h_before, d_h):
    """Adjoint of `gru_before_value`: the gradients of the drives of u and g, and of the output of the step before, its
    path through the drives left out. `egru_paper_reset_backward` has the reset gate. Parameters: see `gru_backward`."""
    d_g = (ONE - u) * d_h * (ONE - g * g)
    return (h_before - g) * d_h * u * (ONE - u), d_g, u * d_h


def lstm_backward(i, f, g, o, c_before, c, d_h, d_c):
    """Adjoint of `lstm_value`.

    i, f, g, o, c_before, c : gates of the step, and the cells before and after it
    d_h, d_c                : gradients of the loss with respect to the output, and to the cell after the step

    Returns the gradients of the drives of i, f, g and o, and of the cell of the step before.
    """
    t = tanh(c)
    d_c = d_c + d_h * o * (ONE - t * t)
    d_i, d_f = d_c * g * i * (ONE - i), d_c * c_before * f * (ONE - f)
    return d_i, d_f, d_c * i * (ONE - g * g), d_h * t * o * (ONE - o), d_c * f


# --- surrogate derivatives of the event ---------------------------------------------------------------------

TRIANGLE, FAST_SIGMOID, ARCTAN, GAUSSIAN, MULTI_GAUSSIAN, BOXCAR, STRAIGHT_THROUGH = range(7)

#: name -> the code that kernels use
SURROGATES = {
    "triangle": TRIANGLE,
    "fast_sigmoid": FAST_SIGMOID,
    "arctan": ARCTAN,
    "gaussian": GAUSSIAN,
    "multi_gaussian": MULTI_GAUSSIAN,
    "boxcar": BOXCAR,
    "straight_through": STRAIGHT_THROUGH,
}

# 1 + h, h / s and s with h = 0.15 and s = 6 (Yin, Corradi and Bohte 2021).
LOBE_CENTRE, LOBE_SIDE, LOBE_WIDTH = F32(1.15), F32(0.025), F32(6.0)


def surrogate_slope(kind, distance, dampening, support):
    """The derivative that the event is given in the backward pass, at `distance = v - threshold`.

    kind      : a value of `SURROGATES`
    dampening : height at the threshold; for `multi_gaussian` the height is 1.15 * dampening minus the side lobes
    support   : inverse of the width; `straight_through` has no width

    With h for `dampening` and z for `support * distance`:

    triangle         : h * max(0, 1 - |z|) (Subramoney et al. 2023, with h = 0.7 and support 1)
    fast_sigmoid     : h / (1 + |z|)^2 (Zenke and Ganguli 2018)
    arctan           : h / (1 + z^2) (Fang et al. 2021)
    gaussian         : h * exp(-z^2 / 2)
    multi_gaussian   : a Gaussian minus two wider side lobes (Yin et al. 2021)
    boxcar           : h where |z| < 1, else 0
    straight_through : h everywhere (Bengio et al. 2013)
    """
    z = support * distance
    if kind == TRIANGLE:
        height = ONE - absolute(z)
        return dampening * select(height > ZERO, height, ZERO)
    if kind == FAST_SIGMOID:
        return dampening / ((ONE + absolute(z)) * (ONE + absolute(z)))
    if kind == ARCTAN:
        return dampening / (ONE + z * z)
    if kind == GAUSSIAN:
        return dampening * exp(-HALF * z * z)
    if kind == MULTI_GAUSSIAN:
        left, right = (z + ONE) / LOBE_WIDTH, (z - ONE) / LOBE_WIDTH
        lobes = exp(-HALF * left * left) + exp(-HALF * right * right)
        return dampening * (LOBE_CENTRE * exp(-HALF * z * z) - LOBE_SIDE * lobes)
    if kind == BOXCAR:
        return dampening * select(absolute(z) < ONE, ONE, ZERO)
    return dampening * (z * ZERO + ONE)


def surrogate_step(kind, distance, dampening, support):
    """The smooth step whose derivative is `surrogate_slope`. In float64, for gradient checks only."""
    z = support * np.asarray(distance, np.float64)
    scale = dampening / support
    if kind == TRIANGLE:
        z = np.clip(z, -1, 1)
        return scale * (0.5 + z - 0.5 * z * np.abs(z))
    if kind == FAST_SIGMOID:
        return scale * z / (1 + np.abs(z))
    if kind == ARCTAN:
        return scale * np.arctan(z)
    if kind == GAUSSIAN:
        return scale * _gaussian_area(z)
    if kind == MULTI_GAUSSIAN:
        centre, side, width = float(LOBE_CENTRE), float(LOBE_SIDE), float(LOBE_WIDTH)
        lobes = _gaussian_area((z + 1) / width) + _gaussian_area((z - 1) / width)
        return scale * (centre * _gaussian_area(z) - side * width * lobes)
    if kind == BOXCAR:
        return scale * np.clip(z, -1, 1)
    return scale * z


def _gaussian_area(z):
    return np.sqrt(np.pi / 2) * erf(z / np.sqrt(2))


@dataclass(frozen=True)
class Surrogate:
    """The derivative that the event is given in training. The defaults are those of EvNN.

    Attributes
    ----------
    kind      : a name in `SURROGATES`
    dampening : its height (gamma of the paper), > 0
    support   : the inverse of its half width, > 0

    Raises ValueError for an unknown kind, and for a number that is not positive and finite.
    """

    kind: str = "triangle"
    dampening: float = 0.7
    support: float = 1.0

    def __post_init__(self):
        need_choice("surrogate kind", self.kind, SURROGATES)
        for name in ("dampening", "support"):
            object.__setattr__(self, name, need_number(f"surrogate {name}", getattr(self, name), above=0))

    @property
    def code(self) -> int:
        return SURROGATES[self.kind]


@dataclass(frozen=True)
class Equations:
    """What engines, counts and files know about the equations of a cell; a row of `EQUATIONS`.

    Attributes
    ----------
    gates           : names of the gate rows, in the order in which they are packed
    thresholded     : whether a unit sends its cell where that exceeds the unit's threshold. If not, a unit sends its
                      output at every step; an output of zero is no event
    reset_first     : whether the reset gate is applied before the recurrent product of the candidate, whose rows are
                      the last. That product then takes `r * y`, one multiplication per event, and waits for the gates
    multiplications : element-wise multiplications per unit and step, without that one
    single_state    : whether cells and outputs are the same numbers
    """

    gates: tuple[str, ...]
    thresholded: bool
    reset_first: bool
    multiplications: int
    single_state: bool = False


#: cell name -> variant -> its equations; the first variant of a cell is its default
EQUATIONS = {
    "egru": {
        "evnn": Equations(("u", "r", "g"), thresholded=True, reset_first=False, multiplications=3),
        "paper": Equations(("u", "r", "g"), thresholded=True, reset_first=True, multiplications=2),
    },
    "gru": {
        "after": Equations(("u", "r", "g"), thresholded=False, reset_first=False, multiplications=3, single_state=True),
        "before": Equations(("u", "r", "g"), thresholded=False, reset_first=True, multiplications=2, single_state=True),
    },
    "lstm": {
        "standard": Equations(("i", "f", "g", "o"), thresholded=False, reset_first=False, multiplications=3),
    },
}

#: cell name -> its variants
CELLS = {name: tuple(variants) for name, variants in EQUATIONS.items()}


@dataclass(frozen=True)
class Cell:
    """The equations of the units of a layer, and the derivative of their event in training.

    Attributes
    ----------
    name      : a key of `CELLS`: "egru", the event-based GRU; or "gru" or "lstm", whose units have no threshold and
                send their output at every step
    variant   : one of `CELLS[name]`; "" (the default) is the first one of the cell.
                egru: "evnn": the reset gate is applied after the matrix product, and the threshold is subtracted in the
                same step. This is the released code and, by all evidence, the source of every published number.
                "paper": the reset gate is applied before the matrix product, and the output is subtracted one step
                later.
                gru: "after": the reset gate is applied after the matrix product, as in PyTorch and cuDNN. "before": it
                is applied before.
                lstm: "standard": with a forget gate, without peepholes
    surrogate : derivative of the event. Cells without a threshold have none, and take the default only

    Raises ValueError for an unknown name or variant, and for a surrogate of a cell that has no threshold.
    """

    name: str = "egru"
    variant: str = ""
    surrogate: Surrogate = Surrogate()

    def __post_init__(self):
        need_choice("cell", self.name, CELLS)
        if isinstance(self.variant, str) and not self.variant:
            object.__setattr__(self, "variant", CELLS[self.name][0])
        need_choice("variant", self.variant, CELLS[self.name])
        need_kind("surrogate", self.surrogate, Surrogate, "a Surrogate")
        if not self.thresholded and self.surrogate != Surrogate():
            raise ValueError(
                f"surrogate: got {self.surrogate}, but units of a cell {self.name!r} have no threshold and so no "
                "surrogate derivative; leave it out"
            )

    @property
    def equations(self) -> Equations:
        """The row of `EQUATIONS`."""
        return EQUATIONS[self.name][self.variant]

    @property
    def gates(self) -> int:
        """Gate rows per unit."""
        return len(self.equations.gates)

    @property
    def thresholded(self) -> bool:
        """Whether units send only above a threshold; see `Equations`."""
        return self.equations.thresholded

    @property
    def reset_first(self) -> bool:
        """Whether the reset gate is applied before the recurrent product of the candidate; see `Equations`."""
        return self.equations.reset_first
