"""Optimisers, clipping and learning-rate schedules.

An optimiser changes parameters in place: `step(parameters, gradients, rate)`. Its state is `arrays()` and `numbers()`,
from which `restore` continues bit for bit. After each step `Model.apply_masks` enforces masks and the bounds of
thresholds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from eventrnn._checks import need_choice, need_flag, need_kind, need_number, need_whole, said
from eventrnn.training.kernels import optimiser_updates as updates
from eventrnn.weights import MatrixId

F32 = np.float32

KINDS = ("adamw", "adam", "sgd", "nt-asgd")

SCHEDULES = ("constant", "cosine", "step")

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Optimiser:
    """The update rule and its settings for the groups of parameters (weights, biases, thresholds, embedding, read-out).

    Attributes
    ----------
    kind            : "adamw" (decoupled weight decay), "adam", "sgd" or "nt-asgd" (L2 regularisation)
    beta1, beta2    : decay rates of Adam's moments; with beta1 = 0 no first moment is stored
    epsilon         : constant in the denominator of Adam
    momentum        : momentum of SGD
    patience        : n of NT-ASGD. Averaging starts after the first validation loss that is larger than the smallest
                      one more than n validations ago (Merity et al. 2017; the trigger is that of their code)
    threshold_rate  : factor on the learning rate of thresholds; 0 leaves them unchanged
    bias_rate       : factor on the learning rate of biases; 0 leaves them unchanged
    embedding_rate  : factor on the learning rate of the embedding, and so of a read-out that is tied to it; 0 leaves it
                      unchanged. Where a read-out of its own is fine-tuned, a rare symbol changes the embedding by steps
                      that are many times the learning rate with Adam, because its mean square has decayed meanwhile
    readout_rate    : factor on the learning rate of the weights of a read-out of its own, for which the same holds; 0
                      leaves them unchanged. Its bias has `bias_rate`
    decay_biases    : whether weight decay applies to biases; it never applies to thresholds

    Raises ValueError for a value outside its range, and for a momentum with another kind than "sgd".
    """

    kind: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.0
    patience: int = 5
    threshold_rate: float = 1.0
    bias_rate: float = 1.0
    embedding_rate: float = 1.0
    readout_rate: float = 1.0
    decay_biases: bool = False

    def __post_init__(self):
        need_choice("optimiser kind", self.kind, KINDS)
        for name in ("beta1", "beta2", "momentum"):
            need_number(f"optimiser {name}", getattr(self, name), at_least=0, below=1)
        need_number("optimiser epsilon", self.epsilon, above=0)
        for name in ("threshold_rate", "bias_rate", "embedding_rate", "readout_rate"):
            need_number(f"optimiser {name}", getattr(self, name), at_least=0)
        need_whole("optimiser patience", self.patience, at_least=1)
        need_flag("optimiser decay_biases", self.decay_biases)
        if self.momentum and self.kind != "sgd":
            raise ValueError(f"optimiser momentum: got {self.momentum} with {self.kind}; it belongs to sgd")

    def build(self, parameters: Arrays, weight_decay: float) -> Rule:
        """The update rule in its initial state."""
        rule = {"adamw": Adam, "adam": Adam, "sgd": Descent, "nt-asgd": AveragedDescent}[self.kind]
        return rule(self, parameters, weight_decay)

    def rate_of(self, name: str) -> float:
        """Factor on the learning rate of the parameter with that name."""
        if name == "embedding":
            return self.embedding_rate
        if MatrixId(name).of_readout and not is_bias(name):
            return self.readout_rate
        return self.threshold_rate if is_threshold(name) else self.bias_rate if is_bias(name) else 1.0

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to the parameter with that name."""
        return not is_threshold(name) and (self.decay_biases or not is_bias(name))


def is_threshold(name: str) -> bool:
    """Whether the parameter with that name holds the thresholds of a layer."""
    return MatrixId(name).role == "threshold"


def is_bias(name: str) -> bool:
    """Whether the parameter with that name is a bias of a layer or of the read-out."""
    return "bias" in MatrixId(name).role


class Rule(ABC):
    """Base class of the update rules: parameter groups, weight decay, and the state as arrays and numbers."""

    def __init__(self, settings: Optimiser, parameters: Arrays, weight_decay: float):
        self.settings, self.weight_decay = settings, weight_decay
        self.steps = self.counted = 0
        self.mean: MutableMapping[str, np.ndarray] = {}

    def step(self, parameters: Arrays, gradients: Arrays, rate: float) -> None:
        """Update all parameters in place with their gradients. Cost: O(number of parameters)."""
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
        """Update one parameter in place.

        value, gradient : flat float32 arrays of the parameter
        rate            : its learning rate
        decay           : decoupled weight decay
        l2              : factor of the parameter that is added to the gradient
        """

    def validated(self, loss: float, parameters: Arrays) -> bool:
        """Called after every validation with its loss. Returns whether averaging starts now (NT-ASGD only)."""
        return False

    def averaged(self, parameters: Arrays) -> dict[str, np.ndarray]:
        """The parameters to validate and to save: those of the last step, or their running mean (NT-ASGD)."""
        return dict(parameters)

    @property
    def averages(self) -> bool:
        """Whether `averaged` differs from the parameters of the last step."""
        return False

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the state by name, for a checkpoint."""
        return {}

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as values that JSON can hold."""
        return {"steps": self.steps}

    def restore(self, arrays: Arrays, numbers: Mapping[str, Any]) -> None:
        """Continue from the `arrays` and `numbers` of the same rule."""
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
        updates.adam(value, gradient, first, second, rate, beta1, beta2, correction1, correction2, epsilon, decay, l2)

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
    """Non-monotonically triggered averaged SGD (NT-ASGD; Merity et al. 2017, algorithm 1).

    The steps are those of SGD. Once the validation loss stops falling, the running mean of the parameters is kept as
    well; it is the mean that is validated and saved.
    """

    def __init__(self, settings: Optimiser, parameters: Arrays, weight_decay: float):
        super().__init__(settings, parameters, weight_decay)
        self.history: list[float] = []

    def step(self, parameters: Arrays, gradients: Arrays, rate: float) -> None:
        super().step(parameters, gradients, rate)
        if self.mean:
            self.counted += 1
            for name, mean in self.mean.items():
                updates.average(mean.reshape(-1), parameters[name].reshape(-1), F32(1 / self.counted))

    def validated(self, loss: float, parameters: Arrays) -> bool:
        # As in the code of Merity et al.: the present loss is not yet in the history, and must be strictly larger.
        n = self.settings.patience
        triggered = not self.mean and len(self.history) > n and loss > min(self.history[:-n])
        if triggered:
            self.mean = {name: value.copy() for name, value in parameters.items()}
        self.history.append(loss)
        return triggered

    @property
    def averages(self) -> bool:
        return self.counted > 0

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
    """The 2-norm of every gradient, by name."""
    return {name: float(np.sqrt(np.dot(g.reshape(-1), g.reshape(-1)))) for name, g in gradients.items()}


def _need_gradients(gradients: Arrays) -> None:
    """Raise TypeError for what cannot be scaled in place."""
    need_kind("gradients", gradients, Mapping, "a mapping of names to float32 arrays")
    for name, gradient in gradients.items():
        plain = isinstance(gradient, np.ndarray) and not isinstance(gradient, np.ma.MaskedArray)
        if not plain or gradient.dtype.kind != "f":
            raise TypeError(f"gradients: {name} is {said(gradient)} ({type(gradient).__name__}), need a float32 array")


def clip_by_norm(gradients: Arrays, limit: float) -> float:
    """Scale all gradients in place so that their joint 2-norm is at most `limit`. Returns the norm before.

    gradients : name -> float32 array
    limit     : positive number

    Raises ValueError for another limit. A norm that is not finite is returned, and the gradients are not changed.
    """
    need_number("limit", limit, above=0)
    _need_gradients(gradients)
    norm = float(np.sqrt(sum(float(np.dot(g.ravel(), g.ravel())) for g in gradients.values())))
    if limit < norm < np.inf:
        for gradient in gradients.values():
            gradient *= F32(limit / norm)
    return norm


def clip_by_layer(gradients: Arrays, limit: float) -> None:
    """Scale the gradients of each layer in place so that their joint 2-norm is at most `limit`.

    EvNN does so inside its operator. Gradients of the embedding and of the read-out are not changed. Arguments and
    errors: see `clip_by_norm`.
    """
    need_number("limit", limit, above=0)
    _need_gradients(gradients)
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
    """Factor on the learning rate over the course of a run.

    Attributes
    ----------
    kind     : "constant" (factor 1), "cosine" or "step"
    constant : share of the run with factor 1 before the cosine starts
    final    : factor at the end of the half cosine
    every    : share of the run between two steps
    factor   : factor of each step
    warmup   : number of updates at the start over which the factor rises linearly

    Raises ValueError for a value outside its range.
    """

    kind: str = "cosine"
    constant: float = 0.3
    final: float = 0.02
    every: float = 0.25
    factor: float = 0.1
    warmup: int = 0

    def __post_init__(self):
        need_choice("schedule kind", self.kind, SCHEDULES)
        for name in ("constant", "final", "factor"):
            need_number(f"schedule {name}", getattr(self, name), at_least=0, at_most=1, what="share")
        need_number("schedule every", self.every, above=0, at_most=1, what="share of the run")
        need_whole("schedule warmup", self.warmup, at_least=0)

    def at(self, progress: float, step: int) -> float:
        """The factor after `step` updates, when the share `progress` of the run is done."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        if self.kind == "constant":
            return rising
        if self.kind == "step":
            # Rounding: a share such as 3 * 0.1 can be slightly below 0.3.
            return rising * self.factor ** int(progress / self.every + 1e-9)
        if progress <= self.constant:
            return rising
        position = min(1.0, (progress - self.constant) / (1 - self.constant))
        return rising * (self.final + (1 - self.final) * 0.5 * (1 + float(np.cos(np.pi * position))))
