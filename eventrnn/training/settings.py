"""How to train: everything that a run is a function of, but for the network and the data."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eventrnn.training.bptt.model import BACKWARDS
from eventrnn.training.optim import Optimiser, Schedule
from eventrnn.training.regularisers import Regularisers
from eventrnn.training.thresholds import check_rule


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes
    ----------
    steps         : parameter updates, unless `epochs` is given
    epochs        : passes over the data, in place of `steps`; 0 for none given
    batch         : streams or sequences side by side
    window        : time steps a window of a text; gradients stop at its edge, the state goes on
    window_jitter : deviation in steps of a window's random length, 0 for none. Then the length is drawn around
                    `window`, one time in 20 around half of it, never below 5 (Merity et al. 2017)
    learning_rate : before its schedule; a window shorter or longer than `window` learns in proportion
    weight_decay  : decoupled with adamw, otherwise L2
    clip          : bound on the joint gradient norm
    clip_layers   : bound on the joint norm of each layer's gradients, before `clip`; 0 for none
    activity_cost : weight of the mean output in the loss, which quietens units
    validate_every: updates between two validations; 0 for one an epoch and one at the end
    patience      : stop after that many validations without a new best; 0 for never
    seed          : the run is a function of it, bit for bit (on one machine and BLAS thread count)
    thresholds    : how they are learned: positive, clamped (to [0, 1]), sigmoid or fixed, see `Model`
    backward      : how the backward pass goes, see `Model`
    threads       : of the training kernels
    optimiser, schedule, regularisers : see there
    """

    steps: int = 1000
    epochs: int = 0
    batch: int = 32
    window: int = 64
    window_jitter: float = 0.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    clip_layers: float = 0.0
    activity_cost: float = 0.0
    validate_every: int = 0
    patience: int = 0
    seed: int = 0
    thresholds: str = "positive"
    backward: str = "auto"
    threads: int = 1
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: Schedule = field(default_factory=Schedule)
    regularisers: Regularisers = field(default_factory=Regularisers)

    def __post_init__(self):
        for name in ("steps", "batch", "window", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need a whole number >= 1")
        for name in ("epochs", "validate_every", "patience", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, need a whole number >= 0")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, need a positive number")
        for name in ("weight_decay", "activity_cost", "clip_layers", "window_jitter"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, need a number >= 0")
        check_rule(self.thresholds)
        if self.backward not in BACKWARDS:
            raise ValueError(f"backward: got {self.backward!r}, need one of {', '.join(BACKWARDS)}")

    def draw_window(self, rng: np.random.Generator) -> int:
        """Steps of the next window. The generator is not touched where nothing is random."""
        if not self.window_jitter:
            return self.window
        base = self.window if rng.random() < 0.95 else self.window / 2
        return max(5, int(rng.normal(base, self.window_jitter)))
