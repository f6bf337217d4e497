"""Losses: each function returns the mean over its rows, and the gradient of that mean."""

from __future__ import annotations

import numpy as np

from eventrnn._checks import class_array, need_kind, number_array
from eventrnn.training.kernels import cross_entropy as kernels
from eventrnn.training.targets import SoftTargets

NO_SYMBOLS, NO_PROBABILITIES = np.empty(0, np.int32), np.empty(0, np.float32)


def cross_entropy(logits: np.ndarray, targets: np.ndarray, soft: SoftTargets | None = None) -> tuple[float, np.ndarray]:
    """Mean of -ln softmax(logits)[target], in nats per row, and its gradient.

    logits  : (..., V) float32
    targets : (...) integers in 0..V - 1
    soft    : a teacher's probabilities of the classes of every row, or None

    With soft targets of weight w (Hinton, Vinyals and Dean 2015, at temperature 1) the loss of a row is

        -(1 - w) ln p[target] - w (sum_i q[i] ln p[i] + (1 - sum_i q[i]) ln p[rest]),      p = softmax(logits)

    where i are the classes that have a probability q[i], and p[rest] is the sum of p over all others: they are one
    class together. So the loss is smallest where p[i] is the teacher's probability of every such class. The gradient is
    p - t. The target t is w q[i] at the classes i, and w (1 - sum_i q[i]) p / p[rest] at the others; 1 - w is added at
    the row's own target. A p[rest] below 1e-9 counts as 1e-9.

    Returns the mean, and the gradient of the logits, of their shape, float32. Raises ValueError for targets of another
    shape or out of range.
    """
    logits = number_array("logits", logits, "(..., V)", kinds="f")
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits: got shape {logits.shape}, need (..., V) for at least one class")
    size = logits.shape[-1]
    targets = class_array("targets", targets, logits.shape[:-1], size)
    kept, weight, symbols, probabilities = 0, 0.0, NO_SYMBOLS, NO_PROBABILITIES
    if soft is not None:
        need_kind("soft", soft, SoftTargets, "SoftTargets, or None")
        soft.check(size)
        if soft.symbols.shape[:-1] != targets.shape:
            raise ValueError(f"soft: got targets {soft.symbols.shape}, need {(*targets.shape, soft.top_k)}")
        kept, weight = soft.top_k, soft.weight
        symbols, probabilities = (np.ascontiguousarray(a).reshape(-1) for a in (soft.symbols, soft.probabilities))
    gradient = np.empty(logits.size, np.float32)
    flat = np.ascontiguousarray(logits, np.float32).reshape(-1)
    rows, hard = max(targets.size, 1), targets.reshape(-1)
    total = kernels.softmax_cross_entropy(
        targets.size, size, flat, hard, 1 / rows, gradient, kept, weight, symbols, probabilities
    )
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
