"""Optimisers, clipping and learning-rate schedules.

An optimiser changes parameters in place, `step(parameters, gradients, rate)`. What it remembers is `arrays()` and
`numbers()`, from which `restore` continues bit for bit. `Model.apply_masks` brings
thresholds back to where they may be.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eventrnn.training.kernels import optimiser_updates as updates
from eventrnn.weights import MatrixId

F32 = np.float32

KINDS = ("adamw", "adam", "sgd", "nt-asgd")

SCHEDULES = ("constant", "cosine", "step")

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Optimiser:
    """Which update rule, and how the groups of parameters differ.

    Attributes
    ----------
    kind            : "adamw" decays weights apart from the gradient, "adam", "sgd" and "nt-asgd" add L2 to it
    beta1, beta2    : of Adam; beta1 = 0 keeps no first moment in memory
    epsilon         : of Adam
    momentum        : of SGD
    patience        : n of NT-ASGD: averaging starts after the first validation that is worse than the best of those
                      more than n before it (Merity et al. 2017; the trigger as in their released code)
    threshold_rate  : times the learning rate, for thresholds; 0 keeps them as they are
    bias_rate       : likewise for biases
    decay_biases    : whether biases are decayed too; thresholds never are
    """

    kind: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.0
    patience: int = 5
    threshold_rate: float = 1.0
    bias_rate: float = 1.0
    decay_biases: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"optimiser kind: got {self.kind!r}, need one of {', '.join(KINDS)}")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimiser {name}: got {getattr(self, name)}, need a number in [0, 1)")
        if not 0 < self.epsilon < np.inf:
            raise ValueError(f"optimiser epsilon: got {self.epsilon}, need a positive number")
        for name in ("threshold_rate", "bias_rate"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"optimiser {name}: got {getattr(self, name)}, need a number >= 0")
        if self.patience < 1:
            raise ValueError(f"optimiser patience: got {self.patience}, need a whole number >= 1")
        if self.momentum and self.kind != "sgd":
            raise ValueError(f"optimiser momentum: got {self.momentum} with {self.kind}; it belongs to sgd")

    def build(self, parameters: Arrays, weight_decay: float) -> Rule:
        """The rule at its start."""
        rule = {"adamw": Adam, "adam": Adam, "sgd": Descent, "nt-asgd": AveragedDescent}[self.kind]
        return rule(self, parameters, weight_decay)

    def rate_of(self, name: str) -> float:
        """What the learning rate is multiplied by for the parameter of that name."""
        return self.threshold_rate if is_threshold(name) else self.bias_rate if is_bias(name) else 1.0

    def decays(self, name: str) -> bool:
        return not is_threshold(name) and (self.decay_biases or not is_bias(name))


def is_threshold(name: str) -> bool:
    """Whether a parameter of that name is a layer's thresholds."""
    return MatrixId(name).role == "threshold"


def is_bias(name: str) -> bool:
    """Whether a parameter of that name is a bias, of a layer or of the read-out."""
    return "bias" in MatrixId(name).role


class Rule(ABC):
    """What the three rules share: groups, decay, and the state as arrays and numbers."""

    def __init__(self, settings: Optimiser, parameters: Arrays, weight_decay: float):
        self.settings, self.weight_decay = settings, weight_decay
        self.steps = 0

    def step(self, parameters: Arrays, gradients: Arrays, rate: float) -> None:
        """Update the parameters in place. O(parameters)."""
        self.steps += 1
        for name, value in parameters.items():
            own = F32(rate * self.settings.rate_of(name))
            if own == 0:
                continue
            decay = F32(self.weight_decay if self.settings.decays(name) else 0.0)
            apart, joined = (decay, F32(0)) if self.settings.kind == "adamw" else (F32(0), decay)
            self._update(name, value.reshape(-1), gradients[name].reshape(-1), own, apart, joined)

    @abstractmethod
    def _update(self, name, value, gradient, rate, decay, l2) -> None:
        """Change one parameter, flat, in place."""

    def validated(self, loss: float, parameters: Arrays) -> bool:
        """Told after every validation; only NT-ASGD listens. Says whether averaging begins."""
        return False

    def averaged(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """The parameters to validate and to save: for most rules those of the last step."""
        return dict(parameters)

    def arrays(self) -> dict[str, np.ndarray]:
        """State by name, for a checkpoint."""
        return {}

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, plain enough for JSON."""
        return {"steps": self.steps}

    def restore(self, arrays: Arrays, numbers: Mapping[str, Any]) -> None:
        """Continue from what `arrays` and `numbers` gave."""
        self.steps = numbers["steps"]
        for name, own in self.arrays().items():
            own[...] = arrays[name]


class Adam(Rule):
    """Adam and AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019)."""

    def __init__(self, settings: Optimiser, parameters: Arrays, weight_decay: float):
        super().__init__(settings, parameters, weight_decay)
        moving = {name: value for name, value in parameters.items() if settings.rate_of(name)}
        self.second = {name: np.zeros_like(value) for name, value in moving.items()}
        self.first = {name: np.zeros_like(value) for name, value in moving.items()} if settings.beta1 else {}

    def _update(self, name, value, gradient, rate, decay, l2) -> None:
        s = self.settings
        correction1, correction2 = F32(1 / (1 - s.beta1**self.steps)), F32(1 / (1 - s.beta2**self.steps))
        second, beta2, epsilon = self.second[name].reshape(-1), F32(s.beta2), F32(s.epsilon)
        if not s.beta1:
            updates.adam_without_first(value, gradient, second, rate, beta2, correction2, epsilon, decay, l2)
            return
        first, beta1 = self.first[name].reshape(-1), F32(s.beta1)
        updates.adam(
            value, gradient, first, second, rate, beta1, beta2, correction1, correction2, epsilon, decay, l2
        )  # fmt: skip

    def arrays(self) -> dict[str, np.ndarray]:
        moments = {f"first.{name}": value for name, value in self.first.items()}
        return moments | {f"second.{name}": value for name, value in self.second.items()}


class Descent(Rule):
    """Stochastic gradient descent, with or without momentum."""

    def __init__(self, settings: Optimiser, parameters: Arrays, weight_decay: float):
        super().__init__(settings, parameters, weight_decay)
        moving = parameters if settings.momentum else {}
        self.velocity = {name: np.zeros_like(value) for name, value in moving.items() if settings.rate_of(name)}

    def _update(self, name, value, gradient, rate, decay, l2) -> None:
        if not self.velocity:
            updates.descend(value, gradient, rate, decay, l2)
            return
        velocity, momentum = self.velocity[name].reshape(-1), F32(self.settings.momentum)
        updates.descend_with_momentum(value, gradient, velocity, rate, momentum, decay, l2)

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"velocity.{name}": value for name, value in self.velocity.items()}


class AveragedDescent(Descent):
    """NT-ASGD (Merity et al. 2017, algorithm 1): SGD until validation stalls, from then on also the running mean of
    the parameters, which is what is validated and saved. The steps themselves stay those of SGD."""

    def __init__(self, settings: Optimiser, parameters: Arrays, weight_decay: float):
        super().__init__(settings, parameters, weight_decay)
        self.history: list[float] = []
        self.mean: dict[str, np.ndarray] = {}
        self.counted = 0

    def step(self, parameters: Arrays, gradients: Arrays, rate: float) -> None:
        super().step(parameters, gradients, rate)
        if self.mean:
            self.counted += 1
            for name, mean in self.mean.items():
                updates.average(mean.reshape(-1), parameters[name].reshape(-1), F32(1 / self.counted))

    def validated(self, loss: float, parameters: Arrays) -> bool:
        # As released: compared before the present loss joins the history, and strictly worse.
        n = self.settings.patience
        triggered = not self.mean and len(self.history) > n and loss > min(self.history[:-n])
        if triggered:
            self.mean = {name: value.copy() for name, value in parameters.items()}
        self.history.append(loss)
        return triggered

    def averaged(self, parameters: Arrays) -> dict[str, np.ndarray]:
        return dict(self.mean) if self.counted else dict(parameters)

    def arrays(self) -> dict[str, np.ndarray]:
        return {f"mean.{name}": value for name, value in self.mean.items()}

    def numbers(self) -> dict[str, Any]:
        return super().numbers() | {"history": list(self.history), "counted": self.counted}

    def restore(self, arrays: Arrays, numbers: Mapping[str, Any]) -> None:
        self.history, self.counted = list(numbers["history"]), numbers["counted"]
        self.mean = {name.removeprefix("mean."): np.array(a) for name, a in arrays.items() if name.startswith("mean.")}
        super().restore(arrays, numbers)


# --- clipping -----------------------------------------------------------------------------------------------


def norms(gradients: Arrays) -> dict[str, float]:
    """2-norm of every gradient."""
    return {name: float(np.sqrt(np.dot(g.reshape(-1), g.reshape(-1)))) for name, g in gradients.items()}


def clip_by_norm(gradients: Arrays, limit: float) -> float:
    """Scale all gradients in place so that their joint 2-norm is at most `limit`; returns the norm before."""
    norm = float(np.sqrt(sum(float(np.dot(g.ravel(), g.ravel())) for g in gradients.values())))
    if norm > limit:
        for gradient in gradients.values():
            gradient *= F32(limit / norm)
    return norm


def clip_by_layer(gradients: Arrays, limit: float) -> None:
    """Scale the gradients of each layer in place so that their joint 2-norm is at most `limit`, as EvNN does inside
    its operator; embedding and read-out are left alone."""
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, gradient in gradients.items():
        layer = MatrixId(name).layer
        if layer is not None:
            layers.setdefault(layer, {})[name] = gradient
    for each in layers.values():
        clip_by_norm(each, limit)


# --- schedules ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """What the learning rate is multiplied by, over the course of a run.

    Attributes
    ----------
    kind     : "constant"; "cosine": 1 for the first `constant` share of the run, then half a cosine down to `final`;
               "step": times `factor` after every `every` share of the run
    constant, final : of the cosine
    every, factor   : of the steps
    warmup   : updates over which the rate first rises linearly
    """

    kind: str = "cosine"
    constant: float = 0.3
    final: float = 0.02
    every: float = 0.25
    factor: float = 0.1
    warmup: int = 0

    def __post_init__(self):
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule kind: got {self.kind!r}, need one of {', '.join(SCHEDULES)}")
        for name in ("constant", "final", "factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"schedule {name}: got {getattr(self, name)}, need a share in [0, 1]")
        if not 0 < self.every <= 1:
            raise ValueError(f"schedule every: got {self.every}, need a share of the run in (0, 1]")
        if self.warmup < 0:
            raise ValueError(f"schedule warmup: got {self.warmup}, need a number of updates >= 0")

    def at(self, progress: float, step: int) -> float:
        """The factor when the share `progress` of the run and `step` updates are done."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        if self.kind == "constant":
            return rising
        if self.kind == "step":
            # A share such as 3 * 0.1 is a hair below 0.3.
            return rising * self.factor ** int(progress / self.every + 1e-9)
        if progress <= self.constant:
            return rising
        position = min(1.0, (progress - self.constant) / (1 - self.constant))
        return rising * (self.final + (1 - self.final) * 0.5 * (1 + float(np.cos(np.pi * position))))
