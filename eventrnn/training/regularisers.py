"""Regularisers: the noise of a window, drawn from the run's generator, and penalties with their gradients.

A penalty is differentiated here; `Model.backward` carries its gradient through time. What is 0 costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eventrnn import cells
from eventrnn.training.bptt.model import Model, Tape
from eventrnn.training.bptt.noise import Noise

F32 = np.float32

RATES = ("dropconnect", "dropout_input", "dropout_between", "dropout_top", "dropout_words", "zoneout")

STRENGTHS = ("activity_rate", "state", "activation", "temporal_activation")


@dataclass(frozen=True)
class Regularisers:
    """Noise rates in [0, 1) and strengths of penalties, all 0 unless given.

    Attributes
    ----------
    dropconnect     : of recurrent weights; one mask a window, survivors scaled up (Merity et al. 2017)
    dropout_input   : of what the first layer reads; one mask a window, shared over time, survivors scaled up (locked
                      dropout; Gal and Ghahramani 2016). So are the next two
    dropout_between : between layers
    dropout_top     : before the read-out
    dropout_words   : of whole rows of the embedding, where they are looked up
    zoneout         : units that keep their cell state for a step (Krueger et al. 2017). Training only: the trained
                      network is run without it, not with its expectation, which the event equations cannot express
    mask_sharing    : "time", or "batch": the three dropouts draw a mask a step, the same for all samples, as EvNN's
                      language model does
    activity_rate   : times the mean over units of (rate - activity_target)^2, the rate being a unit's events a step;
                      the event has its surrogate derivative here too
    activity_target : events a unit and step to aim for
    state           : times the mean of (v - threshold + state_margin)^2: pulls cells to just under their threshold
    state_margin    : how far under
    activation      : AR, times the mean square of the last layer's output after dropout
    temporal_activation : TAR, times the mean square of that output's change from step to step, before dropout
    """

    dropconnect: float = 0.0
    dropout_input: float = 0.0
    dropout_between: float = 0.0
    dropout_top: float = 0.0
    dropout_words: float = 0.0
    zoneout: float = 0.0
    mask_sharing: str = "time"
    activity_rate: float = 0.0
    activity_target: float = 0.05
    state: float = 0.0
    state_margin: float = 0.05
    activation: float = 0.0
    temporal_activation: float = 0.0

    def __post_init__(self):
        for name in RATES:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"regularisers {name}: got {getattr(self, name)}, need a rate in [0, 1)")
        for name in (*STRENGTHS, "state_margin"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"regularisers {name}: got {getattr(self, name)}, need a number >= 0")
        if not 0 <= self.activity_target <= 1:
            raise ValueError(f"regularisers activity_target: got {self.activity_target}, need a share in [0, 1]")
        if self.mask_sharing not in ("time", "batch"):
            raise ValueError(f"regularisers mask_sharing: got {self.mask_sharing!r}, need time or batch")

    def check(self, model: Model) -> None:
        """Refuse what the network has no place for."""
        if self.dropout_words and "embedding" not in model.parameters:
            raise ValueError(f"regularisers dropout_words: got {self.dropout_words}, but the network has no embedding")
        if self.dropout_between and len(model.cells) == 1:
            raise ValueError(f"regularisers dropout_between: got {self.dropout_between}, but there is one layer only")

    def draw(self, model: Model, steps: int, batch: int, rng: np.random.Generator) -> Noise:
        """The noise of one window; the generator moves by what is drawn and no more."""
        p, units = model.parameters, _units(model)
        locked = (steps, 1) if self.mask_sharing == "batch" else (batch,)

        def scale(rate: float, *shape: int) -> np.ndarray | None:
            return (rng.random(shape, F32) >= F32(rate)) / F32(1 - rate) if rate else None

        return Noise(
            inputs=scale(self.dropout_input, *locked, len(p["layers.0.w_in"])),
            between=tuple(scale(self.dropout_between, *locked, n) for n in units[:-1]) if self.dropout_between else (),
            top=scale(self.dropout_top, *locked, units[-1]),
            recurrent=tuple(scale(self.dropconnect, n, 3 * n) for n in units) if self.dropconnect else (),
            zoneout=tuple(rng.random((steps, batch, n), F32) < F32(self.zoneout) for n in units)
            if self.zoneout
            else (),
            words=scale(self.dropout_words, len(p["embedding"])) if self.dropout_words else None,
        )

    def penalise(self, model: Model, tape: Tape) -> Penalty:
        """The penalties of a window."""
        penalty = Penalty(0.0, [None] * len(tape.layers), [None] * len(tape.layers))
        for k in range(len(tape.layers)):
            if self.activity_rate:
                self._rate(penalty, model, tape, k)
            if self.state:
                self._state(penalty, tape, k)
        if self.activation:
            y, scale = tape.layers[-1].y[1:], tape.noise.top
            dropped = y if scale is None else y * scale
            penalty.loss += self.activation * _mean_square(dropped)
            d_dropped = F32(2 * self.activation / y.size) * dropped
            penalty.events(len(tape.layers) - 1, d_dropped if scale is None else d_dropped * scale)
        if self.temporal_activation and len(tape.layers[-1].v) > 1:
            change = np.diff(tape.layers[-1].y[1:], axis=0)
            penalty.loss += self.temporal_activation * _mean_square(change)
            d_change = F32(2 * self.temporal_activation / change.size) * change
            d_y = np.zeros_like(tape.layers[-1].v)
            d_y[1:] += d_change
            d_y[:-1] -= d_change
            penalty.events(len(tape.layers) - 1, d_y)
        return penalty

    def _rate(self, penalty: Penalty, model: Model, tape: Tape, k: int) -> None:
        v, threshold = tape.layers[k].v, tape.layers[k].threshold
        steps, batch, units = v.shape
        over = (v > threshold).mean(axis=(0, 1), dtype=np.float64) - self.activity_target
        penalty.loss += self.activity_rate * float(np.mean(over**2))
        d_event = (2 * self.activity_rate / (units * steps * batch) * over).astype(F32)
        rule = model.cells[k].surrogate
        slope = cells.surrogate_slope(rule.code, v - threshold, F32(rule.dampening), F32(rule.support))
        penalty.cells(k, d_event * slope)

    def _state(self, penalty: Penalty, tape: Tape, k: int) -> None:
        v, threshold = tape.layers[k].v, tape.layers[k].threshold
        over = v - (threshold - F32(self.state_margin))
        penalty.loss += self.state * _mean_square(over)
        penalty.cells(k, F32(2 * self.state / v.size) * over)


@dataclass
class Penalty:
    """What penalties add to the loss, and their gradients by layer: of outputs y, of cells v before the event (each
    (T, B, N) or None), and of thresholds, where v enters as its distance to them."""

    loss: float
    d_events: list[np.ndarray | None]
    d_cells: list[np.ndarray | None]
    d_thresholds: dict[int, np.ndarray] = field(default_factory=dict)

    def events(self, k: int, d_y: np.ndarray) -> None:
        """Add a gradient of layer k's output."""
        before = self.d_events[k]
        self.d_events[k] = d_y if before is None else before + d_y

    def cells(self, k: int, d_distance: np.ndarray) -> None:
        """Add a gradient of layer k's `v - threshold`."""
        before = self.d_cells[k]
        self.d_cells[k] = d_distance if before is None else before + d_distance
        self.d_thresholds[k] = self.d_thresholds.get(k, F32(0)) - d_distance.sum(axis=(0, 1))


def _units(model: Model) -> list[int]:
    return [len(model.parameters[f"layers.{k}.threshold"]) for k in range(len(model.cells))]


def _mean_square(x: np.ndarray) -> float:
    return float(np.mean(np.square(x, dtype=np.float64)))
