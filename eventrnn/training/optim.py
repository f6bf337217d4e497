"""AdamW, gradient clipping and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from eventrnn.training import kernels


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    Biases and thresholds are not decayed. Thresholds are kept at or above zero, where the model is defined.
    """

    def __init__(
        self,
        parameters: Mapping[str, np.ndarray],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.betas, self.epsilon, self.weight_decay = betas, epsilon, weight_decay
        self.first = {name: np.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: np.zeros_like(value) for name, value in parameters.items()}
        self.steps = 0

    def step(self, parameters: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray], rate: float) -> None:
        """Update the parameters in place. O(parameters)."""
        self.steps += 1
        beta1, beta2 = self.betas
        corrections = 1 / (1 - beta1**self.steps), 1 / (1 - beta2**self.steps)
        for name, value in parameters.items():
            decay = 0.0 if "bias" in name or name.endswith("threshold") else self.weight_decay
            numbers = (rate, beta1, beta2, *corrections, self.epsilon, decay)
            flat = (a.ravel() for a in (value, gradients[name], self.first[name], self.second[name]))
            kernels.adamw(*flat, *(np.float32(x) for x in numbers))
            if name.endswith("threshold"):
                np.maximum(value, 0, out=value)


def clip_by_norm(gradients: Mapping[str, np.ndarray], limit: float) -> float:
    """Scale all gradients in place so that their joint 2-norm is at most `limit`; returns the norm before."""
    norm = float(np.sqrt(sum(float(np.dot(g.ravel(), g.ravel())) for g in gradients.values())))
    if norm > limit:
        for gradient in gradients.values():
            gradient *= np.float32(limit / norm)
    return norm


def cosine_schedule(rate: float, steps: int, *, constant: float = 0.3, final: float = 0.02) -> Callable[[int], float]:
    """`rate` for the first `constant` share of the steps, then half a cosine down to `final` times `rate`."""

    def at(step: int) -> float:
        position = min(1.0, max(0.0, (step / max(steps, 1) - constant) / (1 - constant)))
        return rate * (final + (1 - final) * 0.5 * (1 + np.cos(np.pi * position)))

    return at
