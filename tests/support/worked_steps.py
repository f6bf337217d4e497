"""Steps worked by hand, and a plain GRU: what the rules of one unit must give, independent of every backend."""

from __future__ import annotations

import math

import numpy as np

from eventrnn import reference
from eventrnn.cells import Cell
from support import tolerance

LN2, LN3 = math.log(2), math.log(3)


HAND = {
    "w_in": np.array([[-LN3, 0.0, LN3, LN3, 0.0, 0.0]]),
    "bias_in": np.array([0.0, 0.0, 0.0, 0.0, 0.0, LN3]),
    "bias_rec": np.array([0.0, LN3, 0.0, 0.0, 0.0, 0.0]),
}


def close(got, expected) -> bool:
    return bool(np.abs(np.asarray(got, np.float64).ravel() - np.asarray(expected)).max() <= tolerance.HAND_WORKED)


def check_released_step():
    # Recurrent drive of g: unit 0 sends 1/2 * w to both: 4/3 ln 2 and 0.
    w_rec = np.array([[0, 0, 0, 0, 8 / 3 * LN2, 0], [9.0, 9, 9, 9, 9, 9]])
    parameters = HAND | {"w_rec": w_rec, "threshold": np.array([0.5, 0.25])}
    c, y = np.array([[0.4, -0.2]]), np.array([[0.5, 0.0]])
    tape = reference.step(Cell(), parameters, np.array([[1.0]]), c, y)
    # u = sigmoid(-ln 3), sigmoid(ln 3);  r = sigmoid(ln 3) twice
    assert close(tape.u, [0.25, 0.75])
    assert close(tape.r, [0.75, 0.75])
    # g0 = tanh(0 + 3/4 * 4/3 ln 2) = 3/5;  g1 = tanh(ln 3 + 3/4 * 0) = 4/5
    assert close(tape.g, [0.6, 0.8])
    # v0 = 1/4 * 0.4 + 3/4 * 3/5 = 0.1 + 0.45;  v1 = 3/4 * -0.2 + 1/4 * 4/5 = -0.15 + 0.2
    assert close(tape.v, [0.55, 0.05])
    # 0.55 > 0.5 fires and keeps 0.05;  0.05 <= 0.25 does not
    assert tape.event.tolist() == [[1, 0]]
    assert close(tape.y, [0.55, 0])
    assert close(tape.c, [0.05, 0.05])
    return parameters, tape


def check_paper_step():
    # The reset gate goes before the matrix: unit 0 sends 3/4 * 1/2 = 3/8 to the candidates.
    w_rec = np.array([[0, 0, 0, 0, 8 / 3 * LN2, 0], [9.0, 9, 9, 9, 9, 9]])
    parameters = HAND | {"w_rec": w_rec, "threshold": np.array([0.04, 0.25])}
    c, y = np.array([[0.4, -0.2]]), np.array([[0.5, 0.0]])
    tape = reference.step(Cell(variant="paper"), parameters, np.array([[1.0]]), c, y)
    assert close(tape.r, [0.75, 0.75])
    # rec_g0 = 8/3 ln 2 * 3/8 = ln 2
    assert close(tape.rec_g, [LN2, 0])
    assert close(tape.g, [0.6, 0.8])
    # v0 = 0.55 - y0 = 0.05;  v1 = 0.05 - 0
    assert close(tape.v, [0.05, 0.05])
    # 0.05 > 0.04 fires, and the cell keeps it until the next step subtracts it
    assert tape.event.tolist() == [[1, 0]]
    assert close(tape.y, [0.05, 0])
    assert close(tape.c, [0.05, 0.05])
    return parameters, tape


def check_gru_step(variant) -> None:
    # Recurrent weight of g0: 8/3 ln 2 before or after the reset gate 3/4, times h0 = 1/2: ln 2 in either variant.
    w_rec = np.array([[0, 0, 0, 0, 8 / 3 * LN2, 0], [9.0, 9, 9, 9, 9, 9]])
    parameters = HAND | {"w_rec": w_rec, "threshold": np.zeros(2)}
    h = np.array([[0.5, 0.0]])
    tape = reference.step(Cell("gru", variant), parameters, np.array([[1.0]]), h, h)
    assert close(tape.u, [0.25, 0.75])
    assert close(tape.r, [0.75, 0.75])
    assert close(tape.g, [0.6, 0.8])
    # 1/4 * 1/2 + 3/4 * 3/5;  3/4 * 0 + 1/4 * 4/5
    assert close(tape.y, [0.575, 0.2])
    assert np.array_equal(tape.c, tape.y)


def check_lstm_step() -> None:
    # i = 3/4, f = 1/4, g = 3/5, o = 3/4, from the input and the output of the step before.
    parameters = {
        "w_in": np.array([[LN3, 0.0, LN2, 0.0]]),
        "w_rec": np.array([[0.0, -2 * LN3, 0.0, 0.0]]),
        "bias_in": np.array([0.0, 0.0, 0.0, LN3 / 2]),
        "bias_rec": np.array([0.0, 0.0, 0.0, LN3 / 2]),
        "threshold": np.zeros(1),
    }
    # c = 1/4 (4 ln 2 - 9/5) + 3/4 * 3/5 = ln 2, whose tanh is 3/5
    c, h = np.array([[4 * LN2 - 1.8]]), np.array([[0.5]])
    tape = reference.step(Cell("lstm"), parameters, np.array([[1.0]]), c, h)
    assert [close(getattr(tape, name), [value]) for name, value in zip("ifgo", (0.75, 0.25, 0.6, 0.75), strict=True)]
    assert close(tape.c, [LN2])
    assert close(tape.y, [0.45])


def random_parameters(rng, inputs: int, units: int, dtype=np.float64) -> dict:
    rows = 3 * units
    arrays = {
        "w_in": rng.standard_normal((inputs, rows)) / np.sqrt(inputs),
        "w_rec": rng.standard_normal((units, rows)) / np.sqrt(units),
        "bias_in": rng.standard_normal(rows) / 2,
        "bias_rec": rng.standard_normal(rows) / 2,
        "threshold": rng.uniform(0, 0.3, units),
    }
    return {name: array.astype(dtype) for name, array in arrays.items()}


def always_firing(rng, inputs: int, units: int) -> dict:
    """Parameters of a layer with zero thresholds whose candidates and cells stay positive, as in a plain GRU."""
    parameters = random_parameters(rng, inputs, units)
    parameters["w_rec"] = rng.uniform(-1, 1, (units, 3 * units)) / units
    parameters["bias_in"][2 * units :] = 3.0
    parameters["bias_rec"][2 * units :] = 0.1
    parameters["w_in"] = rng.uniform(-1, 1, (inputs, 3 * units)) / inputs
    return parameters | {"threshold": np.zeros(units)}


def plain_gru(parameters: dict, x, h) -> np.ndarray:
    """A gated recurrent unit with the reset gate after the matrix, as in cuDNN. It uses no code of the package."""
    w_in, w_rec, b_in, b_rec = (parameters[name] for name in ("w_in", "w_rec", "bias_in", "bias_rec"))
    hidden = []
    for x_t in x:
        a_u, a_r, a_g = np.split(x_t @ w_in + b_in, 3, axis=1)
        h_u, h_r, h_g = np.split(h @ w_rec + b_rec, 3, axis=1)
        keep, reset = 1 / (1 + np.exp(-a_u - h_u)), 1 / (1 + np.exp(-a_r - h_r))
        h = keep * h + (1 - keep) * np.tanh(a_g + reset * h_g)
        hidden.append(h)
    return np.array(hidden)


def check_equality_and_leak(dtype) -> None:
    """A cell at its threshold sends nothing, and a cell without drive halves at every step."""
    # All drives are zero: u = r = 1/2 and g = 0, so that v = c / 2 exactly, in either precision.
    n, ones = 3, np.ones((1, 3), dtype)
    parameters = {
        "w_in": np.zeros((1, 3 * n), dtype),
        "w_rec": np.zeros((n, 3 * n), dtype),
        "bias_in": np.zeros(3 * n, dtype),
        "bias_rec": np.zeros(3 * n, dtype),
        "threshold": np.array([0.5, np.nextafter(dtype(0.5), dtype(0)), 2.0], dtype),
    }
    tapes = reference.forward(Cell(), parameters, np.zeros((4, 1, 1), dtype), ones, 0 * ones)
    # v = 1/2 is not above 1/2. It is above the next smaller number, whose subtraction leaves the difference.
    assert tapes[0].event.tolist() == [[0, 1, 0]]
    assert tapes[0].c[0, 1] == dtype(0.5) - parameters["threshold"][1]
    assert [float(tape.c[0, 2]) for tape in tapes] == [0.5, 0.25, 0.125, 0.0625]
    assert all(tape.c.dtype == dtype for tape in tapes)


def check_plain_gru(seed) -> None:
    """Without thresholds, a layer whose cells stay positive is a GRU."""
    rng = np.random.default_rng(seed)
    parameters, x, h = always_firing(rng, 4, 6), rng.uniform(-1, 1, (8, 3, 4)), rng.uniform(0, 1, (3, 6))
    tapes = reference.forward(Cell(), parameters, x, h, h)
    assert all((tape.v > 0).all() for tape in tapes)
    difference = np.array([tape.y for tape in tapes]) - plain_gru(parameters, x, h)
    assert np.abs(difference).max() <= tolerance.torch_gru(6, len(x))
