"""Losses: each function returns the mean over its rows, and the gradient of that mean."""

from __future__ import annotations

import numpy as np

from eventrnn._checks import class_array, number_array
from eventrnn.training.kernels import cross_entropy as kernels


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of -ln softmax(logits)[target], in nats per row, and its gradient.

    logits  : (..., V) float32
    targets : (...) integers in 0..V - 1

    Returns the mean, and the gradient of the logits, of their shape, float32. Raises ValueError for targets of another
    shape or out of range.
    """
    logits = number_array("logits", logits, "(..., V)", kinds="f")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits: got shape {logits.shape}, need (..., V) for at least one class")
    size = logits.shape[-1]
    targets = class_array("targets", targets, logits.shape[:-1], size)
    gradient = np.empty(logits.size, np.float32)
    flat = np.ascontiguousarray(logits, np.float32).reshape(-1)
    rows = max(targets.size, 1)
    total = kernels.softmax_cross_entropy(targets.size, size, flat, targets.reshape(-1), 1 / rows, gradient)
    return float(total) / rows, gradient.reshape(logits.shape)


def squared_error(output: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean over all elements of (output - target)^2, and its gradient.

    Raises ValueError for shapes that differ and for what is not real numbers.
    """
    output = number_array("output", output, "of any shape", kinds="f")
    targets = number_array("targets", targets, f"{output.shape}")
    if output.shape != targets.shape:
        raise ValueError(f"targets: got shape {targets.shape}, need {output.shape}")
    error = output - targets.astype(np.float32)
    size = max(error.size, 1)
    return float(np.sum(np.square(error, dtype=np.float64))) / size, np.float32(2 / size) * error


def cross_entropy_bits(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum over rows of -log2 softmax(logits)[target], in bits; logits (rows, V), targets (rows,) integers."""
    return cross_entropy(logits, targets)[0] * len(logits) / float(np.log(2))
