"""The small text, the settings and the updates of the tests that train on a GPU."""

from __future__ import annotations

import numpy as np

from eventrnn.training import Batch, Settings

SYMBOLS = 9


def symbol_text() -> np.ndarray:
    """(150,) int64 symbols."""
    return np.random.default_rng(6).integers(0, SYMBOLS, 150)


def cuda_settings(**changes) -> Settings:
    """Settings of a short training on a GPU, with these changes."""
    options = {"steps": 20, "batch": 3, "window": 4, "backend": "cuda", "precision": "float32", "learning_rate": 0.01}
    return Settings(**(options | changes))


def updated(engine, batch: Batch, step: int, rate: float = 0.01):
    """One update: its figures, and the gradients."""
    found: dict[str, np.ndarray] = {}

    def after_step(parameters, gradients) -> None:
        found.update({name: array.copy() for name, array in gradients.items()})

    def commit(change):
        return change()

    result = engine.update(batch, start="state", step=step, rate=rate, after_step=after_step, commit=commit)
    return result, found
