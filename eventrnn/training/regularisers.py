"""Regularisers: random masks (dropout, zoneout) and penalties with their gradients.

A penalty is differentiated here with respect to outputs and cells; `Model.backward` propagates its gradient through
time. A regulariser with rate or strength 0 costs no work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eventrnn import cells
from eventrnn._checks import need_choice, need_number
from eventrnn.network import need_thresholds
from eventrnn.training.bptt.model import Model, Tape
from eventrnn.training.bptt.noise import Mask, Noise

F32 = np.float32

# Kinds of masks of a layer.
KINDS = 8

RATES = ("dropconnect", "dropout_input", "dropout_between", "dropout_top", "dropout_words", "zoneout")

STRENGTHS = ("activity_rate", "state", "activation", "temporal_activation", "gate_balance")

# Penalties on events and on the distance of cells from thresholds.
THRESHOLD_PENALTIES = ("activity_rate", "state")


@dataclass(frozen=True)
class Regularisers:
    """Rates of dropout and zoneout in [0, 1), and strengths of penalties; all are 0 by default.

    Kept entries are scaled by 1 / (1 - rate) in all kinds of dropout and in dropconnect.

    Attributes
    ----------
    dropconnect         : rate for recurrent weights; one mask per window (Merity et al. 2017)
    dropout_input       : rate for the inputs of the first layer; one mask per window, shared by its steps (locked
                          dropout; Gal and Ghahramani 2016)
    dropout_between     : rate for the outputs between two layers, with locked masks
    dropout_top         : rate for the inputs of the read-out, with locked masks
    dropout_words       : rate for whole rows of the embedding
    zoneout             : rate at which a unit keeps its cell state for a step (Krueger et al. 2017). It acts in
                          training only: the event equations have no expectation of it that the trained network could
                          use. A unit of an LSTM keeps its cell, and not its output
    mask_sharing        : "time" shares the locked masks between steps; "batch" draws one mask per step that is shared
                          by all samples, as in EvNN's language model
    activity_rate       : strength of the mean over units of (rate - activity_target)^2, where the rate is a unit's
                          events per step and the event has its surrogate derivative
    activity_target     : target of the rate, events per unit and step
    state               : strength of the mean of (v - threshold + state_margin)^2, which pulls cells towards a value
                          just below their threshold
    state_margin        : distance of that value from the threshold
    activation          : strength of the mean square of the last layer's output after dropout (AR)
    temporal_activation : strength of the mean square of that output's change between steps, before dropout (TAR)
    gate_balance        : strength of a load balance of gated blocks, added over their matrices:
                          blocks * sum over b of f[b] * p[b]. Of a window, f[b] is the share of all choices that fell on
                          block b, and p[b] the mean over steps and samples of softmax(logits)[b]; f counts as constant.
                          It is 1 where all blocks are used alike (Fedus, Zoph and Shazeer 2022, arXiv 2101.03961,
                          equations 4 to 6, for one choice per input)

    `activity_rate` and `state` need thresholds; a network with GRU or LSTM cells is refused.

    Raises ValueError for a value outside its range.
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
    gate_balance: float = 0.0

    def __post_init__(self):
        for name in RATES:
            need_number(f"regularisers {name}", getattr(self, name), at_least=0, below=1, what="rate")
        for name in (*STRENGTHS, "state_margin"):
            need_number(f"regularisers {name}", getattr(self, name), at_least=0)
        need_number("regularisers activity_target", self.activity_target, at_least=0, at_most=1, what="share")
        need_choice("regularisers mask_sharing", self.mask_sharing, ("time", "batch"))

    def check(self, model: Model) -> None:
        """Raise ValueError for a regulariser that does not apply to the network."""
        if self.dropout_words and "embedding" not in model.parameters:
            raise ValueError(f"regularisers dropout_words: got {self.dropout_words}, but the network has no embedding")
        if self.dropout_between and len(model.cells) == 1:
            raise ValueError(f"regularisers dropout_between: got {self.dropout_between}, but there is one layer only")
        if self.gate_balance and not model.gated:
            raise ValueError(
                f"regularisers gate_balance: got {self.gate_balance}, but no matrix of the network has gated blocks"
            )
        for name in THRESHOLD_PENALTIES:
            if strength := getattr(self, name):
                need_thresholds(model.template, f"regularisers {name}: got {strength}", "leave it out")

    def masks(self, model: Model) -> list[Mask]:
        """The masks that every window draws. A mask with rate 0 is not among them."""
        p, units = model.parameters, _units(model)
        locked = ("T", 1) if self.mask_sharing == "batch" else ("B",)
        found: list[Mask] = []

        def add(name: str, kind: int, layer: int, rate: float, *shape: int | str) -> None:
            if rate:
                found.append(Mask(name, layer, rate, KINDS * layer + kind, shape))

        add("inputs", 0, 0, self.dropout_input, *locked, len(p["layers.0.w_in"]))
        for k, n in enumerate(units[:-1]):
            add("between", 1, k, self.dropout_between, *locked, n)
        add("top", 2, 0, self.dropout_top, *locked, units[-1])
        for k, n in enumerate(units):
            add("recurrent", 3, k, self.dropconnect, n, model.cells[k].gates * n)
            add("zoneout", 4, k, self.zoneout, "T", "B", n)
        if "embedding" in p:
            add("words", 5, 0, self.dropout_words, len(p["embedding"]))
        return found

    def draw(self, model: Model, steps: int, batch: int, *, seed: int, step: int) -> Noise:
        """The masks of one window of a run, a function of the seed of the run and the number of the step."""
        fields: dict[str, dict[int, np.ndarray]] = {}
        for mask in self.masks(model):
            fields.setdefault(mask.name, {})[mask.layer] = mask.draw(seed, step, steps, batch)
        several = {"between", "recurrent", "zoneout"}
        masks: dict[str, Any] = {
            name: tuple(drawn[k] for k in sorted(drawn)) if name in several else drawn[0]
            for name, drawn in fields.items()
        }
        return Noise(**masks)

    def penalise(self, model: Model, tape: Tape) -> Penalty:
        """The penalties of a window and their gradients."""
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
        if self.gate_balance:
            self._balance(penalty, tape)
        return penalty

    def _balance(self, penalty: Penalty, tape: Tape) -> None:
        for name, product in tape.products.items():
            # Only rows that choose take part: others have neither logits nor a choice of their own.
            rows, blocks = product.choosing, product.logits.shape[1]
            logits = product.logits[rows]
            choices = product.chosen[rows].sum(axis=0, dtype=np.float64)
            used = choices / max(1.0, choices.sum())
            shares = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float64)
            shares /= shares.sum(axis=1, keepdims=True)
            factor, of_row = self.gate_balance * blocks / max(1, len(logits)), shares @ used
            penalty.loss += factor * float(of_row.sum())
            d_logits = np.zeros(product.logits.shape, F32)
            d_logits[rows] = factor * shares * (used - of_row[:, None])
            penalty.d_logits[name] = d_logits.reshape(*tape.top.shape[:2], blocks)

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
    """Sum of the penalties of a window, and their gradients per layer.

    Attributes
    ----------
    loss         : sum of the penalties
    d_events     : per layer, gradient with respect to the outputs y, (T, B, N) float32 or None
    d_cells      : per layer, gradient with respect to the cells v before the event, (T, B, N) float32 or None
    d_thresholds : layer -> gradient with respect to the thresholds, (N,) float32, of penalties on v - threshold
    d_logits     : matrix of gated blocks -> gradient with respect to its logits, (T, B, K) float32
    """

    loss: float
    d_events: list[np.ndarray | None]
    d_cells: list[np.ndarray | None]
    d_thresholds: dict[int, np.ndarray] = field(default_factory=dict)
    d_logits: dict[str, np.ndarray] = field(default_factory=dict)

    def events(self, k: int, d_y: np.ndarray) -> None:
        """Add to the gradient of the output of layer k."""
        before = self.d_events[k]
        self.d_events[k] = d_y if before is None else before + d_y

    def cells(self, k: int, d_distance: np.ndarray) -> None:
        """Add to the gradient of `v - threshold` of layer k."""
        before = self.d_cells[k]
        self.d_cells[k] = d_distance if before is None else before + d_distance
        self.d_thresholds[k] = self.d_thresholds.get(k, F32(0)) - d_distance.sum(axis=(0, 1))


def _units(model: Model) -> list[int]:
    return [len(model.parameters[f"layers.{k}.threshold"]) for k in range(len(model.cells))]


def _mean_square(x: np.ndarray) -> float:
    return float(np.mean(np.square(x, dtype=np.float64)))
