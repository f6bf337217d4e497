"""Thresholds in training: which numbers they may be, how a parameter stands for one, and how they begin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eventrnn import cells

F32 = np.float32

#: how a threshold is learned; see `Model`
RULES = ("positive", "clamped", "sigmoid", "fixed")

# Second parameter of the Beta distribution that thresholds are drawn from (EvNN 0.2).
BETA = 3.0

# Logits stay within +-16: beyond 16.7 the float32 threshold is exactly 1, which has no gradient to come back by.
LARGEST_LOGIT = F32(16)


def check_rule(rule: str) -> None:
    """Refuse what is no rule."""
    if rule not in RULES:
        raise ValueError(f"thresholds: got {rule!r}, need one of {', '.join(RULES)}")


def to_parameter(rule: str, threshold: np.ndarray) -> np.ndarray:
    """The parameter of a threshold (N,): itself, or its logit, kept within 16: a threshold nearer to 0 or 1 than
    1.2e-7 is moved there.

    Raises ValueError for one that the rule excludes.
    """
    if rule == "sigmoid":
        outside = (threshold <= 0) | (threshold >= 1)
        if outside.any():
            i = int(np.argmax(outside))
            raise ValueError(f"thresholds: got {threshold[i]} at unit {i}; sigmoid needs one between 0 and 1")
        wide = threshold.astype(np.float64)
        return np.log(wide / (1 - wide)).astype(F32).clip(-LARGEST_LOGIT, LARGEST_LOGIT)
    if rule == "clamped" and (threshold > 1).any():
        i = int(np.argmax(threshold > 1))
        raise ValueError(f"thresholds: got {threshold[i]} at unit {i}; clamped needs one in [0, 1]")
    return threshold.copy()


def from_parameter(rule: str, parameter: np.ndarray) -> np.ndarray:
    """The threshold that a parameter stands for, a copy."""
    return cells.sigmoid_float32(parameter) if rule == "sigmoid" else parameter.copy()


def clamp(rule: str, parameter: np.ndarray) -> None:
    """Bring a parameter back to where the rule allows it, in place."""
    if rule == "clamped":
        np.clip(parameter, 0, 1, out=parameter)
    elif rule == "sigmoid":
        np.clip(parameter, -LARGEST_LOGIT, LARGEST_LOGIT, out=parameter)
    else:
        np.maximum(parameter, 0, out=parameter)


def gradient(rule: str, threshold: np.ndarray, d_threshold: np.ndarray) -> np.ndarray:
    """Of the parameter, from that of the threshold it stood for."""
    if rule == "fixed":
        return np.zeros_like(d_threshold)
    return d_threshold * threshold * (1 - threshold) if rule == "sigmoid" else d_threshold


def initial(start: float | Sequence[float], units: int, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """Thresholds to begin with, (units,): one number for all, a list, or drawn where `rng` is given.

    Drawn ones are Beta(3m / (1 - m), 3) with mean m = `start` in (0, 1), as of EvNN 0.2.
    """
    if rng is not None:
        mean = float(np.asarray(start))
        if not 0 < mean < 1:
            raise ValueError(f"threshold mean: got {mean}, need a number between 0 and 1")
        return rng.beta(BETA * mean / (1 - mean), BETA, units).astype(F32)
    given = np.asarray(start, F32)
    if given.shape not in ((), (units,)) or not (np.isfinite(given) & (given >= 0)).all():
        raise ValueError(f"thresholds: got {start!r}, need one number >= 0, or one for each of {units} units")
    return np.ascontiguousarray(np.broadcast_to(given, (units,)))
