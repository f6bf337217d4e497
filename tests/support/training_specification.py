"""Gradients of a whole update in float64, on the forward pass that an engine on a GPU has left, and error bounds."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from eventrnn import reference
from eventrnn.training import Noise, thresholds
from support.magnitudes import backward_magnitudes
from support.tolerance import ROUNDED, U32, Running, cell_bound, gamma, plain_bound, rounded_cell_bound

F64 = np.float64


@dataclass
class Pair:
    """An array in float64, and the sum of the magnitudes of what it adds up."""

    value: np.ndarray
    size: np.ndarray

    def times(self, factor) -> Pair:
        return Pair(self.value * factor, self.size * np.abs(factor))


def read(engine, name, shape) -> np.ndarray:
    """The first elements of an array of the engine's memory, in that shape."""
    array = engine.memory[name].reshape(-1)[: int(np.prod(shape))]
    out = np.empty(shape, array.dtype)
    engine.device.fetch(array, out.reshape(-1))
    return out


def tapes_of(engine, k: int, steps: int, batch: int, threshold: np.ndarray, state) -> SimpleNamespace:
    """The tape of layer k as the engine has it, and y and c (T + 1, B, N) that follow from it.

    gates : u, r, g and q, of an LSTM i, f, g and o, each (T, B, N); `v` is the cell before the event, of cells without
            thresholds the output
    """
    layer = engine.sizes.layers[k]
    planes = read(engine, ("tape", k), (layer.rule.planes, steps, batch, layer.padded))[..., : layer.units]
    cell, v = planes[4], planes[layer.rule.output]
    y, after = v, cell
    if layer.cell.thresholded:
        fired = v > threshold
        y = np.where(fired, v, np.float32(0))
        after = v if layer.reset_first else np.where(fired, v - threshold, v)
    y, c = (np.concatenate([first[k][None], each]) for first, each in ((state.outputs, y), (state.cells, after)))
    return SimpleNamespace(gates=planes[:4], cell=cell, v=v, y=y, c=c)


class Specification:
    """What an update must have computed.

    engine    : after one update
    before    : host parameters before the update
    inputs    : of the window
    d_output  : gradient of the output
    state     : before the window
    noise     : masks of the window
    """

    def __init__(self, engine, before: dict, inputs: np.ndarray, d_output: np.ndarray, state, noise: Noise):
        self.engine, self.sizes, self.noise = engine, engine.sizes, noise
        self.p = {name: array.astype(F64) for name, array in before.items()}
        self.inputs, self.d_output, self.state = inputs, d_output.astype(F64), state
        self.steps, self.batch = inputs.shape[:2]
        self.rule = engine.model.thresholds
        rules = [self.rule if layer.cell.thresholded else "fixed" for layer in self.sizes.layers]
        self.thresholds = [
            thresholds.from_parameter(rule, before[f"layers.{k}.threshold"]) for k, rule in enumerate(rules)
        ]
        self.tapes = [
            tapes_of(engine, k, self.steps, self.batch, threshold, state) for k, threshold in enumerate(self.thresholds)
        ]

    def layer(self, k: int) -> dict:
        """Parameters of a layer, with DropConnect."""
        p = {name: self.p[f"layers.{k}.{name}"] for name in ("w_in", "w_rec", "bias_in", "bias_rec")}
        return p | {"w_rec": p["w_rec"] * self.dropped(k), "threshold": self.thresholds[k].astype(F64)}

    def dropped(self, k: int):
        found = self.noise.of("recurrent", k)
        return 1.0 if found is None else found.astype(F64)

    def scale(self, k: int):
        """The dropout of the outputs of layer k."""
        found = self.noise.of("between", k) if k + 1 < len(self.sizes.layers) else self.noise.top
        return 1.0 if found is None else found.astype(F64)

    def x(self, k: int) -> np.ndarray:
        """The inputs of layer k."""
        if k:
            return self.tapes[k - 1].y[1:].astype(F64) * self.scale(k - 1)
        x = self.inputs.astype(F64)
        if "embedding" in self.p:
            x = self.p["embedding"][self.inputs]
            if self.noise.words is not None:
                x = x * self.noise.words[self.inputs][:, :, None]
        return x if self.noise.inputs is None else x * self.noise.inputs

    # --- forward ---

    def check_forward(self) -> None:
        """Every cell of every step is within its bound of a float64 step from the engine's own state."""
        precision = self.engine.precision
        for k, layer in enumerate(self.sizes.layers):
            thresholded = layer.cell.thresholded
            if precision != "float32" and thresholded and layer.reset_first:
                continue
            tape, p, x = self.tapes[k], self.layer(k), self.x(k)
            for t in range(self.steps):
                c, y = tape.c[t].astype(F64), tape.y[t].astype(F64)
                if not thresholded:
                    # Of a product of two rounded factors, the errors are those of one factor that has both.
                    e = ROUNDED.get(precision, 0.0)
                    twice = (Running(each, (2 * e + e * e) * np.abs(each)) for each in (x[t], y))
                    fed, sent = twice
                    bounds = dict(zip(("v", "cell"), plain_bound(layer.cell, p, fed, Running(c), sent), strict=True))
                elif precision == "float32":
                    bounds = {"v": cell_bound(layer.cell.variant, p, x[t], c, y)}
                else:
                    bounds = {"v": rounded_cell_bound(precision, p, x[t], c, y)}
                free = np.ones(tape.v[t].shape, bool)
                held = self.noise.of("zoneout", k)
                if held is not None:
                    free = ~held[t]
                    subtracted = layer.reset_first and thresholded
                    kept = tape.c[t] - (tape.y[t] if subtracted else np.float32(0))
                    assert np.array_equal(tape.cell[t][~free], kept[~free])
                for name, bound in bounds.items():
                    # The products of x with dropout, of w_rec with DropConnect and of the embedding are rounded before.
                    error = bound.error + 8 * U32 * np.abs(bound.value) + self._factors_rounded(p, x[t], y)
                    assert (np.abs(getattr(tape, name)[t] - bound.value) <= error)[free].all(), (k, t, name)

    def _factors_rounded(self, p: dict, x, y) -> float:
        """A change of every factor by 4 roundings, through the gates: each passes at most its own drive's error."""
        size = np.abs(x) @ np.abs(p["w_in"]) + np.abs(y) @ np.abs(p["w_rec"])
        return float(8 * gamma(8, U32) * size.max(initial=0.0))

    # --- backward ---

    def check_gradients(self, gradients: dict) -> None:
        """Every gradient is within its bound."""
        expected = self.gradients()
        assert expected.keys() == set(gradients)
        units = max(max(layer.units, layer.inputs) for layer in self.sizes.layers)
        # A path through all layers and steps meets, in each step, a product of GN terms and 120 scalar roundings; sums
        # over rows, over the columns of the read-out, and penalties come on top. Of narrow operands it meets the deltas
        # and the weights of each step, and three more factors.
        layers, columns = len(self.sizes.layers), self.d_output.shape[2]
        gates = max(layer.gates for layer in self.sizes.layers)
        roundings = layers * self.steps * (gates * units + 120) + self.steps * self.batch + columns + units + 64
        precision = self.engine.precision
        narrow = 0.0 if precision == "float32" else gamma(layers * (2 * self.steps + 4) + 4, ROUNDED[precision])
        for name, pair in expected.items():
            bound = (gamma(roundings, U32) + narrow) * pair.size.max(initial=0.0)
            assert np.abs(gradients[name] - pair.value).max(initial=0.0) <= bound, name

    def gradients(self) -> dict[str, Pair]:
        """Gradients of all parameters."""
        found: dict[str, Pair] = {}
        d_x = Pair(self.d_output, np.abs(self.d_output))
        tied = "readout" not in self.p
        if self.sizes.outputs:
            weights = self.p["embedding"].T if tied else self.p["readout"]
            last = len(self.sizes.layers) - 1
            top, flat = (self.tapes[last].y[1:] * self.scale(last)).reshape(-1, len(weights)), self._flat(d_x)
            d_weights = Pair(top.T @ flat.value, np.abs(top).T @ flat.size)
            found["readout.bias"] = Pair(flat.value.sum(axis=0), flat.size.sum(axis=0))
            found["embedding" if tied else "readout"] = Pair(d_weights.value.T, d_weights.size.T) if tied else d_weights
            shape = (self.steps, self.batch, len(weights))
            d_x = Pair((flat.value @ weights.T).reshape(shape), (flat.size @ np.abs(weights).T).reshape(shape))
        penalty = self._penalty()
        for k in reversed(range(len(self.sizes.layers))):
            d_x = self._layer_gradients(k, d_x, penalty, found)
        if "embedding" in self.p:
            inputs = 1.0 if self.noise.inputs is None else self.noise.inputs
            words = 1.0 if self.noise.words is None else self.noise.words[self.inputs][:, :, None]
            flat, table = self._flat(d_x.times(inputs).times(words)), np.zeros((2, *self.p["embedding"].shape))
            np.add.at(table[0], self.inputs.reshape(-1), flat.value)
            np.add.at(table[1], self.inputs.reshape(-1), flat.size)
            if tied and "embedding" in found:
                table += found["embedding"].value, found["embedding"].size
            found["embedding"] = Pair(table[0], table[1])
        masks = self.engine.model.masks
        return {name: pair.times(masks[name]) if name in masks else pair for name, pair in found.items()}

    def _flat(self, pair: Pair) -> Pair:
        rows = self.steps * self.batch
        return Pair(pair.value.reshape(rows, -1), pair.size.reshape(rows, -1))

    def _penalty(self):
        layers = [
            SimpleNamespace(v=tape.v.astype(F64), y=tape.y.astype(F64), threshold=threshold.astype(F64))
            for tape, threshold in zip(self.tapes, self.thresholds, strict=True)
        ]
        model, tape = self.engine.model, SimpleNamespace(layers=layers, noise=self.noise)
        return self.engine.settings.regularisers.penalise(model, tape)

    def _tape(self, k: int, t: int) -> reference.Tape | reference.LSTMTape:
        """A step of layer k for the specification."""
        layer, tape = self.sizes.layers[k], self.tapes[k]
        gates = list(tape.gates[:, t].astype(F64))
        states = [getattr(tape, name)[at].astype(F64) for name, at in (("c", t), ("y", t), ("y", t + 1), ("c", t + 1))]
        if layer.cell.name == "lstm":
            return reference.LSTMTape(*gates, *states)
        if layer.reset_first:
            gates[3] = np.zeros_like(gates[3])
        v = tape.v[t].astype(F64)
        event, slope = np.ones_like(v), np.zeros_like(v)
        if layer.cell.thresholded:
            rule, distance = layer.cell.surrogate, tape.v[t] - self.thresholds[k]
            numbers = np.float32(rule.dampening), np.float32(rule.support)
            slope = reference.cells.surrogate_slope(rule.code, distance, *numbers).astype(F64)
            event = (distance > 0).astype(F64)
        return reference.Tape(*gates, *states[:2], v, event, slope, *states[2:])

    def _layer_gradients(self, k: int, d_x: Pair, penalty, found: dict[str, Pair]) -> Pair:
        layer, tape, p = self.sizes.layers[k], self.tapes[k], self.layer(k)
        d_y = d_x.times(self.scale(k))
        cost = self.engine.settings.activity_cost / tape.v.size * (tape.y[1:] > 0)
        d_y = Pair(d_y.value + cost, d_y.size + cost)
        if (further := penalty.d_events[k]) is not None:
            d_y = Pair(d_y.value + further, d_y.size + 4 * np.abs(further))
        d_cell = np.zeros(tape.v.shape) if penalty.d_cells[k] is None else penalty.d_cells[k].astype(F64)
        tapes = [self._tape(k, t) for t in range(self.steps)]
        x, zero = self.x(k), np.zeros(tape.v.shape)
        expected = reference.backward(layer.cell, p, x, tapes, d_y.value, zero, d_cell)
        sizes = backward_magnitudes(layer.cell, p, x, tapes, d_y.size, zero, 4 * d_cell)
        pairs = {name: Pair(expected[name], sizes[name]) for name in ("w_in", "bias_in", "bias_rec", "x")}
        pairs["w_rec"] = Pair(expected["w_rec"], sizes["w_rec"]).times(self.dropped(k))
        moved = np.abs(d_cell).sum(axis=(0, 1))
        threshold = Pair(expected["threshold"] - d_cell.sum(axis=(0, 1)), sizes["threshold"] + 4 * moved)
        theta = self.thresholds[k].astype(F64)
        factor = {"fixed": 0.0, "sigmoid": theta * (1 - theta)}.get(self.rule, 1.0) if layer.cell.thresholded else 0.0
        pairs["threshold"] = threshold.times(factor)
        found |= {f"layers.{k}.{name}": pair for name, pair in pairs.items() if name != "x"}
        return pairs["x"]
