"""Gradient checks for authors of tasks, cells and surrogates.

Three comparisons, each with code that is independent of the code under test:

- the gradient of a task with finite differences of its loss;
- the backward rule of a cell with finite differences; of an event cell with those of the smoothed cell, in which the
  event is replaced by the integral of its surrogate derivative, so that the surrogate gradient is the exact gradient;
- the gradients of the training engine with those of the specification (`reference.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from eventrnn import reference, reference_products
from eventrnn._checks import need_kind, need_whole
from eventrnn.network import Network
from eventrnn.state import State
from eventrnn.training.bptt.model import Model, Tape
from eventrnn.training.bptt.tape import LayerTape
from eventrnn.training.tasks import Batch, Task
from eventrnn.weights import MatrixId

U32, U64 = 2.0**-24, 2.0**-53

UNSURE = " (too coarse to tell)"

# Allowed error of the engine, as a multiple of the float32 rounding error of the specification: the engine sums in
# another order.
MARGIN = 64


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes
    ----------
    what    : the arrays that were compared
    error   : largest absolute difference
    allowed : largest difference that rounding and truncation explain
    size    : largest derivative, or the norm along the direction of comparison
    """

    what: str
    error: float
    allowed: float
    size: float

    @property
    def ok(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.allowed

    @property
    def kind(self) -> str:
        """The comparison and its layer, without the name of the array."""
        return self.what.partition(":")[0]

    @property
    def sharp(self) -> bool:
        """Whether the bound is tight enough to detect a wrong derivative (below 1 % of the derivative)."""
        return self.allowed < self.size / 100


@dataclass(frozen=True)
class GradientCheck:
    """The result of all comparisons; its text form is a table with one line per comparison."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether every comparison is within its bound and tight enough to detect a wrong derivative."""
        return not self.coarse and all(row.ok for row in self.rows)

    @property
    def coarse(self) -> tuple[str, ...]:
        """The comparisons that could not detect a wrong derivative.

        A derivative of zero is listed only if no comparison of its kind is sharp.
        """
        kinds = {row.kind for row in self.rows if row.sharp}
        return tuple(row.what for row in self.rows if not row.sharp and (row.size > 0 or row.kind not in kinds))

    def __str__(self) -> str:
        width, coarse = max(len(row.what) for row in self.rows), self.coarse
        lines = [
            f"{row.what:{width}}  {'ok   ' if row.ok else 'WRONG'}  off by {row.error:.1e}, allowed {row.allowed:.1e}, "
            f"of {row.size:.1e}{UNSURE if row.what in coarse else ''}"
            for row in self.rows
        ]
        if coarse:
            lines.append(
                f"too coarse to tell: {len(coarse)} of {len(self.rows)} comparisons; use a smaller network or window, "
                "more directions, another seed, or, where derivatives are zero, inputs and thresholds that give events"
            )
        return "\n".join(lines)


def check_gradients(
    network: Network, task: Task | None = None, *, batch: int = 3, window: int = 6, directions: int = 6, seed: int = 0
) -> GradientCheck:
    """Check the gradients of a network's cells, of the training engine and, if a task is given, of its loss.

    Parameters
    ----------
    task       : a task to check, or None; without one the inputs are random
    batch      : number of samples
    window     : number of time steps
    directions : random directions per array along which derivatives are compared; the engine is compared element by
                 element
    seed       : seed of directions and inputs

    Raises ValueError for a task that does not fit the network. Cost: 4 runs of the specification per direction and
    array, so the network should be small.
    """
    for name, size in (("batch", batch), ("window", window), ("directions", directions)):
        need_whole(name, size, at_least=1)
    need_whole("seed", seed, at_least=0)
    if task is not None:
        need_kind("task", task, Task, "a Task, or None")
    rng = np.random.default_rng(seed)
    model = Model(network)
    if task is None:
        inputs = _inputs(network, batch, window, rng)
    else:
        task.check(network, batch, window)
        drawn = task.batch(0, 0, batch, window)
        inputs, batch = drawn.inputs, drawn.inputs.shape[1]
    output, _, tape = model.forward(inputs, State.zeros(network, batch))
    rows = [] if task is None else [_check_loss(task, drawn, output, directions, rng)]
    d_output = rng.normal(size=output.shape).astype(np.float32)
    d_cells = tuple(rng.normal(size=layer.v.shape).astype(np.float32) for layer in tape.layers)
    gradients = model.backward(tape, d_output, d_cells=d_cells, d_inputs=True)
    d_sent, further = _output_gradient(model, tape, d_output, gradients)
    rows += further
    for k in reversed(range(len(model.cells))):
        rows += _check_smoothed_cell(model, k, tape.layers[k], directions, rng)
        own, d_sent = _check_engine(model, k, tape.layers[k], d_sent, d_cells[k], gradients)
        rows += own
    return GradientCheck(tuple(rows))


def _inputs(network: Network, batch: int, window: int, rng: np.random.Generator) -> np.ndarray:
    if network.embedding is not None:
        return rng.integers(0, len(network.embedding), (window, batch))
    return rng.normal(size=(window, batch, network.layers[0].inputs)).astype(np.float32)


def _derivative(function: Callable[[float], float], step: float, noise: float) -> tuple[float, float]:
    """Derivative of a function at 0 by central differences, and a bound on its error.

    The bound is the difference between steps h and 2h, which is three times the truncation error of the finer one, plus
    the rounding noise of four function values.
    """
    once = (function(step) - function(-step)) / (2 * step)
    twice = (function(2 * step) - function(-2 * step)) / (4 * step)
    return once, abs(twice - once) + 3 * noise / step


def _check_loss(task: Task, drawn: Batch, output: np.ndarray, directions: int, rng: np.random.Generator) -> Row:
    # Losses are float32: a step of 2^-7 balances the truncation error, h^2, with the rounding error, u / h.
    value, d_output = task.loss(output.copy(), drawn)
    errors, bounds, sizes = [], [], []
    for _ in range(directions):
        direction = rng.normal(size=output.shape).astype(np.float32)
        found, bound = _derivative(
            lambda h, direction=direction: task.loss((output + np.float32(h) * direction).astype(np.float32), drawn)[0],
            2.0**-7,
            16 * U32 * (abs(value) + float(np.abs(d_output * output).sum()) + 1),
        )
        errors.append(abs(float(np.vdot(d_output.astype(np.float64), direction)) - found))
        bounds.append(bound)
        sizes.append(float(np.linalg.norm(d_output) * np.linalg.norm(direction)))
    worst = int(np.argmax(np.array(errors) - np.array(bounds)))
    return Row(f"{type(task).__name__}.loss", errors[worst], bounds[worst], sizes[worst])


def _check_smoothed_cell(model: Model, k: int, tape: LayerTape, directions: int, rng: np.random.Generator) -> list[Row]:
    cell = model.cells[k]
    case = _float64(model, k, tape) | {"x": tape.x.astype(np.float64)}
    case |= {"c": tape.c[0].astype(np.float64), "y": tape.y[0].astype(np.float64)}
    for name in case:
        if name.endswith("gate_bias"):
            # Equal biases are equal logits of a silent row: its choice changes with any input, and there is no
            # derivative. They are moved apart by far more than a difference moves them.
            case[name] = case[name] + rng.normal(0, 0.1, case[name].shape)
    d_y, d_c = rng.normal(size=tape.v.shape), rng.normal(size=tape.v.shape)

    def run(arrays: dict) -> list[reference.Tape | reference.LSTMTape]:
        parameters = _parameters(model, k, arrays)
        return reference.forward(cell, parameters, arrays["x"], arrays["c"], arrays["y"], smooth=True)

    def loss(arrays: dict) -> float:
        steps = zip(d_y, d_c, run(arrays), strict=True)
        return float(sum((w * t.y).sum() + (v * t.c).sum() for w, v, t in steps))

    gradients = reference.backward(cell, _parameters(model, k, case), case["x"], run(case), d_y, d_c)
    # Rounding noise of the loss: a sum over all entries of d_y and d_c, each after some hundred roundings per step.
    noise = 200 * len(d_y) * U64 * float(np.abs(d_y).sum() + np.abs(d_c).sum())
    rows = []
    for name in (*_names(model, k), "x"):
        worst = Row("", 0.0, 0.0, 0.0)
        for _ in range(directions):
            direction = rng.normal(size=case[name].shape)
            direction /= np.linalg.norm(direction)
            found, bound = _derivative(
                lambda h, n=name, w=direction: loss(case | {n: case[n] + h * w}), 2.0**-17, noise
            )
            error, size = (
                abs(float(np.vdot(gradients[name], direction)) - found),
                float(np.linalg.norm(gradients[name])),
            )
            # Report the worst of the wrong directions; if none is wrong, the direction with the tightest bound.
            wrong = error > bound
            worse = error - bound > worst.error - worst.allowed if wrong else worst.ok and bound < worst.allowed
            if worst.what == "" or (wrong and worst.ok) or worse:
                what = f"{cell.variant} cell, smoothed" if cell.thresholded else f"{cell.name} cell"
                worst = Row(f"layers.{k} {what}: {name}", error, bound, size)
        rows.append(worst)
    return rows


def _check_engine(
    model: Model, k: int, tape: LayerTape, d_y: np.ndarray, d_cell: np.ndarray, gradients: dict[str, np.ndarray]
) -> tuple[list[Row], np.ndarray]:
    """Comparisons of one layer's parameter gradients, and the gradient of its input by the specification."""
    expected, single = (_reference_gradients(model, k, tape, d_y, d_cell, kind) for kind in (np.float64, np.float32))
    names = _names(model, k)
    return _engine_rows(f"layers.{k}", names, expected, single, {n: gradients[f"layers.{k}.{n}"] for n in names}), (
        expected["x"]
    )


def _engine_rows(what: str, names: Iterable[str], expected: Mapping, single: Mapping, found: Mapping) -> list[Row]:
    """A comparison per array: what the engine found, and the specification in float64 and in float32."""
    sizes = {name: float(np.abs(expected[name]).max(initial=0.0)) for name in names}
    # A bound that always holds would grow with units and steps until it allows any error. The rounding error is
    # measured instead: the specification in float32 against float64, the largest over all arrays, since one array may
    # be exact by chance. An event that differs between the two makes the bound large and the comparison coarse.
    costs = [np.abs(single[name] - expected[name]).max(initial=0.0) / (sizes[name] or 1) for name in names]
    allowed = MARGIN * max(U32, *map(float, costs))
    rows = []
    for name, size in sizes.items():
        error = float(np.abs(found[name] - expected[name]).max(initial=0.0))
        rows.append(Row(f"{what} engine: {name}", error, allowed * max(size, U32), size))
    return rows


def _reference_gradients(
    model: Model, k: int, tape: LayerTape, d_y: np.ndarray, d_cell: np.ndarray, kind: type[np.floating]
) -> dict[str, np.ndarray]:
    """Gradients of one layer by the specification in the given precision. Pruned weights have gradient zero."""
    cell, x = model.cells[k], tape.x.astype(kind)
    arrays = {name: value.astype(kind) for name, value in _float64(model, k, tape).items()}
    parameters = _parameters(model, k, arrays)
    tapes = reference.forward(cell, parameters, x, tape.c[0].astype(kind), tape.y[0].astype(kind))
    nothing = np.zeros(tape.v.shape, kind)
    gradients = reference.backward(cell, parameters, x, tapes, d_y.astype(kind), nothing, d_cell.astype(kind))
    for name in ("w_in", "w_rec"):
        if (mask := model.masks.get(f"layers.{k}.{name}")) is not None:
            gradients[name] = gradients[name] * mask
    return gradients


def _output_gradient(
    model: Model, tape: Tape, d_output: np.ndarray, gradients: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, list[Row]]:
    """Gradient of the output of the last layer, (T, B, N) float64, and comparisons of a read-out of gated blocks."""
    if "readout.bias" not in model.parameters:
        return d_output.astype(np.float64), []
    if tape.readout is not None:
        arrays = {name: array for name, array in model.parameters.items() if MatrixId(name).of_readout}

        def specified(kind: type[np.floating]) -> tuple[np.ndarray, dict]:
            weights = _matrix(model, "readout", {name: array.astype(kind) for name, array in arrays.items()})
            top, bias = tape.top.astype(kind), model.parameters["readout.bias"].astype(kind)
            shared = reference_products.shares_gates(weights)
            gates = reference_products.propagate_steps(weights, top, bias)[1] if shared else []
            return reference_products.propagate_back_steps(weights, top, d_output.astype(kind), gates)

        (d_top, expected), (_, single) = specified(np.float64), specified(np.float32)
        if (mask := model.masks.get("readout")) is not None:
            expected[""], single[""] = expected[""] * mask, single[""] * mask
        found = {end: gradients[f"readout{end}"] for end in expected}
        rows = _engine_rows("readout", expected, expected, single, found)
        return d_top, rows
    return d_output.astype(np.float64) @ model.readout_weights().astype(np.float64).T, []


def _float64(model: Model, k: int, tape: LayerTape) -> dict[str, np.ndarray]:
    named = {name: model.parameters[f"layers.{k}.{name}"].astype(np.float64) for name in _names(model, k)}
    return named | {"threshold": tape.threshold.astype(np.float64)}


def _names(model: Model, k: int) -> list[str]:
    """The parameters of a layer, those of its gates included, by their names within it."""
    start = f"layers.{k}."
    return [name.removeprefix(start) for name in model.parameters if name.startswith(start)]


def _parameters(model: Model, k: int, arrays: Mapping[str, np.ndarray]) -> dict:
    """The parameters of a layer as the specification takes them, from arrays by the names of `_names`."""
    named = {f"layers.{k}.{name}": array for name, array in arrays.items()}
    matrices = {name: _matrix(model, f"layers.{k}.{name}", named) for name in ("w_in", "w_rec")}
    return matrices | {name: arrays[name] for name in ("bias_in", "bias_rec", "threshold")}


def _matrix(model: Model, name: str, arrays: Mapping[str, np.ndarray]) -> np.ndarray | reference_products.ChosenBlocks:
    """A matrix as the specification takes it, with gates if it has them."""
    template, weights = model.gated.get(name), arrays[name]
    if template is None:
        return weights
    gate, bias, out = arrays[f"{name}.gate"], arrays[f"{name}.gate_bias"], arrays.get(f"{name}.gate_out")
    rule = template.gate_rule, template.gate_period
    return reference_products.ChosenBlocks(name, weights, gate, bias, out, template.block, template.kept_blocks, *rule)
