"""The baseline `cudnn-persistent`: cuDNN's GRU and LSTM in every algorithm and precision. The fastest one counts.

PyTorch picks the standard algorithm for a GRU of most sizes. Which algorithm is the fastest depends on size and batch
by up to a factor of fifty, so all are tried: each is checked, timed a few times, and those near the fastest one are
then timed beside our engine. What cuDNN refuses is reported with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np

from eventrnn.bench.cudnn_library import (
    ALGORITHMS,
    CELLS,
    FORWARD_MODES,
    PRECISIONS,
    Cudnn,
    CudnnError,
    CudnnRnn,
    GateWeights,
    RnnShape,
)
from eventrnn.cells import Cell
from eventrnn.events import Events
from eventrnn.network import Layer, Network
from eventrnn.reference import forward, layer_parameters
from eventrnn.weights import Dense

# Inputs and units are padded with zeros to multiples of these numbers: of the first one for every algorithm, of the
# second one for those that are made for tiles of that size.
PADDED_TO, TILED_TO = 8, 64

# First runs of a variant, of which the fastest counts; and the ratio to the fastest variant up to which it is timed on.
FIRST_RUNS, KEPT_RATIO = 3, 1.5

# Steps, samples and seed of the check, and the weights that are not zero in each of its gate rows.
CHECKED_STEPS, CHECKED_SAMPLES, CHECK_SEED, CHECK_TERMS = 3, 2, 0, 8

# Sums of the magnitudes of a gate row of the check: of its input weights, of its recurrent weights, and of each bias.
IN_SIZE, REC_SIZE, BIAS_SIZE = 2.0, 1.0, 0.5

# Largest error of a sigmoid or a tanh: the tanh of the hardware is within 2^-10.987 (PTX ISA, `tanh.approx.f32`), and a
# sigmoid that is made of it within half of that.
ACTIVATION_ERROR = 2.0**-10

# Largest magnitude of the sum of both drives of a gate, and of either: what their own addition and product round.
DRIVE_SIZE = IN_SIZE + REC_SIZE + 2 * BIAS_SIZE

# Largest slopes of the gates (i, f, g, o) of an LSTM.
SLOPES = (0.25, 0.25, 1, 0.25)


@dataclass
class CudnnRuns:
    """What the baseline found.

    runs     : variant -> function that puts a run on the stream; those near the fastest one
    first    : variant -> seconds of its fastest first run
    left_out : variant -> why it cannot run
    version  : of cuDNN
    """

    version: str
    runs: dict[str, Callable[[], None]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def cudnn_runs(cudnn: Cudnn, network: Network, inputs: Events, report: Callable[[str], None]) -> CudnnRuns:
    """Try every variant on the weights of a network, made dense.

    The LSTM has the weights of the three gates, and those of the first one again in its fourth gate: another network of
    the same size, beside which a layer of the same units can be judged. Raises RuntimeError where a variant gives
    another answer than `reference.py`, and CudnnError where cuDNN refuses all of them.
    """
    found, x, device = CudnnRuns(cudnn.version), inputs.to_dense(), cudnn.device
    checks = {cell: check_of(cell, network, x.shape) for cell in CELLS}
    ways: dict[str, tuple[CudnnRnn, Callable[[], None]]] = {}
    for cell, algorithm, precision, padded_to in product(CELLS, ALGORITHMS, PRECISIONS, (PADDED_TO, TILED_TO)):
        shape = padded_shape(network, x.shape, padded_to)
        if padded_to == TILED_TO and (precision != "float16" or shape == padded_shape(network, x.shape, PADDED_TO)):
            continue
        name = f"cudnn-persistent {cell.upper()} {algorithm} {precision}"
        name += f" padded to {shape.hidden}" if shape.hidden != network.layers[0].units else ""
        report(f"trying {name}")
        try:
            rnn = CudnnRnn(cudnn, cell, algorithm, precision, shape)
        except (CudnnError, MemoryError) as error:
            found.left_out[name] = str(error)
            continue
        try:
            checks[cell].compare(name, rnn)
            rnn.load([_gate_weights(layer, cell) for layer in network.layers], x)
            limit = KEPT_RATIO * min(found.first.values(), default=np.inf)
            seconds, way, run = min(_first_runs(device, rnn, limit), key=lambda each: each[0])
        except (CudnnError, MemoryError) as error:
            found.left_out[name] = str(error)
            rnn.close()
            continue
        name += way
        found.first[name], ways[name] = seconds, (rnn, run)
        # The memory of slow variants is freed at once.
        limit = KEPT_RATIO * min(found.first.values())
        for slow in [each for each in ways if found.first[each] > limit]:
            ways.pop(slow)[0].close()
    if not ways:
        reasons = "; ".join(map(": ".join, found.left_out.items()))
        raise CudnnError(f"against: cuDNN {cudnn.version} ran no variant; {reasons}")
    found.runs = {name: run for name, (_, run) in ways.items()}
    return found


def padded_shape(network: Network, x_shape: tuple[int, ...], multiple: int) -> RnnShape:
    """The sizes of the network on inputs (steps, batch, I), with inputs and units padded to multiples."""
    inputs, hidden = (-(-n // multiple) * multiple for n in (network.layers[0].inputs, network.layers[0].units))
    return RnnShape(len(network.layers), inputs, hidden, x_shape[0], x_shape[1])


def _gate_weights(layer: Layer, cell: str) -> GateWeights:
    """The weights of a layer made dense; for an LSTM with the columns of the first gate once more at the end."""
    arrays = (layer.w_in.to_dense(), layer.w_rec.to_dense(), layer.bias_in, layer.bias_rec)
    if cell == "lstm":
        arrays = [np.concatenate([each, each[..., : layer.units]], axis=-1) for each in arrays]
    return GateWeights(*arrays)


def _first_runs(device: Any, rnn: CudnnRnn, limit: float) -> list[tuple[float, str, Callable[[], None]]]:
    """Seconds, words for the name, and the run, of each way to call the network: both modes, directly and as a graph.

    A graph spares the launches of the standard algorithm, which are many. Some ways may be refused, but not all. A
    network that takes twice the limit in one way is not tried in others.
    """
    from eventrnn.cuda.run_buffers import Replay

    found, refused = [], None
    for mode in FORWARD_MODES:

        def direct(mode: str = mode) -> None:
            rnn.forward(mode)

        replay = Replay(device.queue, direct)
        words = "" if mode == "inference" else ", training mode"
        for way, run in ((f"{words}, graph", replay), (words, direct)):
            try:
                # The first run loads kernels, and the second one of a graph captures it.
                run()
                run()
                seconds = device.seconds(run)
                if seconds <= limit:
                    seconds = min(seconds, *(device.seconds(run) for _ in range(FIRST_RUNS - 1)))
            except CudnnError as error:
                refused = error
                continue
            found.append((seconds, way, run))
            if seconds > 2 * limit:
                return found
    if not found:
        assert refused is not None
        raise refused
    return found


# --- the check ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A network whose outputs can be bounded tightly in float16, and its first steps by `reference.py` in float64.

    weights : per layer
    x       : (CHECKED_STEPS, batch, I) inputs
    samples : the samples that are compared
    tapes   : per layer and step, the gates and outputs of these samples
    bounds  : unit roundoff -> `bound`, once it has been computed
    """

    cell: str
    weights: list[GateWeights]
    x: np.ndarray
    samples: list[int]
    tapes: list[list[Any]]
    bounds: dict[float, np.ndarray] = field(default_factory=dict)

    @property
    def expected(self) -> np.ndarray:
        """The outputs of the last layer, (CHECKED_STEPS, samples, N) float64."""
        return np.array([tape.y for tape in self.tapes[-1]])

    def compare(self, name: str, rnn: CudnnRnn) -> None:
        """Run the network in cuDNN in both modes. Raises RuntimeError where an output is outside the bound."""
        rnn.load(self.weights, self.x)
        expected, bound = self.expected, self.bound(rnn.precision.unit)
        steps, _, units = expected.shape
        for mode in FORWARD_MODES:
            rnn.forward(mode)
            got = np.asarray(rnn.y[:steps, self.samples, :units].get(), np.float64)
            outside = ~(np.abs(got - expected) <= bound)  # an output that is not a number is outside, too
            if outside.any():
                t, sample, unit = (int(i) for i in np.argwhere(outside)[0])
                raise RuntimeError(
                    f"against {name}: output of unit {unit} at step {t}, sample {self.samples[sample]} is "
                    f"{got[t, sample, unit]:.5f}, but reference.py has {expected[t, sample, unit]:.5f} in float64, and "
                    f"rounding accounts for {bound[t, sample, unit]:.1e} at most"
                )

    def bound(self, unit: float) -> np.ndarray:
        """Largest errors of `expected` in arithmetic of that unit roundoff, (CHECKED_STEPS, samples, N).

        A drive of k terms is within gamma_k = k unit / (1 - k unit) times its sum of magnitudes (Higham 2002, section
        3.1), plus its weights times the errors of the values that it adds. The slopes of sigmoid and tanh are at most
        1/4 and 1. What a product of two inexact numbers adds is |a| e_b + |b| e_a + e_a e_b.
        """
        if unit in self.bounds:
            return self.bounds[unit]
        below: list[Any] = [0.0] * len(self.tapes[0])
        x = list(self.x[:, self.samples].astype(np.float64))
        for weights, tapes in zip(self.weights, self.tapes, strict=True):
            e, e_c, after = np.zeros_like(tapes[0].y), np.zeros_like(tapes[0].y), []
            for t, tape in enumerate(tapes):
                d_in = _drive_error(weights.w_in, weights.bias_in, x[t], below[t], unit)
                d_rec = _drive_error(weights.w_rec, weights.bias_rec, tape.y_before, e, unit)
                e, e_c = (_gru_error if self.cell == "gru" else _lstm_error)(tape, d_in, d_rec, e, e_c, unit)
                after.append(e)
            below, x = after, [tape.y for tape in tapes]
        self.bounds[unit] = np.array(below)
        return self.bounds[unit]


def _drive_error(w: np.ndarray, bias: np.ndarray, values: np.ndarray, error: Any, unit: float) -> np.ndarray:
    """Largest error of the drives (B, G N) of inexact values (B, J)."""
    terms, size = CHECK_TERMS + 1, np.abs(w).astype(np.float64)
    gamma = terms * unit / (1 - terms * unit)
    return (gamma * np.abs(values) + (1 + gamma) * error) @ size + gamma * np.abs(bias)


def _gru_error(tape: Any, d_in: np.ndarray, d_rec: np.ndarray, e: np.ndarray, e_c: np.ndarray, unit: float):
    """Largest error of the outputs h = u h + (1 - u) g after a step."""
    a, (in_u, in_r, in_g), (rec_u, rec_r, rec_g) = ACTIVATION_ERROR, *(np.split(d, 3, axis=1) for d in (d_in, d_rec))
    e_u, e_r = ((d + unit * DRIVE_SIZE) / 4 + a for d in (in_u + rec_u, in_r + rec_r))
    e_g = in_g + _product_error(tape.r, e_r, np.abs(tape.rec_g), rec_g) + 2 * unit * DRIVE_SIZE + a
    mean = tape.u * e + (1 - tape.u) * e_g + np.abs(tape.y_before - tape.g) * e_u + e_u * (e + e_g)
    return mean + 4 * unit, e_c


def _lstm_error(tape: Any, d_in: np.ndarray, d_rec: np.ndarray, e: np.ndarray, e_c: np.ndarray, unit: float):
    """Largest errors of the outputs h = o tanh(c) and of the cells c = f c + i g after a step."""
    drives = np.split(d_in + d_rec + unit * DRIVE_SIZE, 4, axis=1)
    e_i, e_f, e_g, e_o = (slope * d + ACTIVATION_ERROR for slope, d in zip(SLOPES, drives, strict=True))
    kept, added = np.abs(tape.c_before), np.abs(tape.g)
    e_c = _product_error(tape.f, e_f, kept, e_c) + _product_error(tape.i, e_i, added, e_g) + 3 * unit * (1 + kept)
    e_h = _product_error(tape.o, e_o, np.abs(np.tanh(tape.c)), e_c + ACTIVATION_ERROR)
    return e_h + 2 * unit, e_c


def _product_error(a: np.ndarray, e_a: np.ndarray, b: np.ndarray, e_b: np.ndarray) -> np.ndarray:
    """Largest error of a product of two inexact numbers, of magnitudes a and b."""
    return a * e_b + b * e_a + e_a * e_b


def check_of(cell: str, network: Network, x_shape: tuple[int, ...]) -> Check:
    """The check for networks of these sizes and inputs (steps, batch, I).

    Weights, biases and inputs are exact in float16. Each gate row has `CHECK_TERMS` weights that are not zero, at
    random places, so that every sum has few roundings, even one that is kept in float16.
    """
    rng, steps = np.random.default_rng(CHECK_SEED), min(CHECKED_STEPS, x_shape[0])
    kind, units = Cell(name=cell), network.layers[0].units
    rows = kind.gates * units

    def matrix(n_pre: int, size: float) -> np.ndarray:
        made = np.zeros((n_pre, rows), np.float32)
        for _ in range(CHECK_TERMS):
            # A place that is drawn twice keeps one weight, so that the sum of magnitudes stays below the size.
            made[rng.integers(n_pre, size=rows), np.arange(rows)] = rng.choice((-1, 1), rows) * size / CHECK_TERMS
        return made

    def bias() -> np.ndarray:
        return (rng.integers(-1, 2, rows) * BIAS_SIZE).astype(np.float32)

    weights = [
        GateWeights(matrix(layer.inputs, IN_SIZE), matrix(units, REC_SIZE), bias(), bias()) for layer in network.layers
    ]
    x = (rng.integers(-2, 3, (steps, x_shape[1], network.layers[0].inputs)) / 2).astype(np.float32)
    samples, tapes = sorted({0, x_shape[1] - 1})[:CHECKED_SAMPLES], []
    below, zeros = x[:, samples].astype(np.float64), np.zeros((len(samples), units))
    thresholds = np.zeros(units, np.float32)
    for each in weights:
        layer = Layer(Dense(each.w_in), Dense(each.w_rec), each.bias_in, each.bias_rec, thresholds, kind)
        tapes.append(forward(kind, layer_parameters(layer, np.float64), below, zeros, zeros))
        below = np.array([tape.y for tape in tapes[-1]])
    return Check(cell, weights, x, samples, tapes)
