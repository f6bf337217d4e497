"""Learned thresholds: the rules that bound them, the parameter that represents a threshold, and initial values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eventrnn import cells
from eventrnn._checks import need_choice
from eventrnn.network import draw_thresholds

F32 = np.float32

#: Rules for learning thresholds: kept >= 0, kept in [0, 1], the sigmoid of a logit, or not learned. See `Model`.
RULES = ("positive", "clamped", "sigmoid", "fixed")

# Bound on the magnitude of a logit. Beyond 16.7 the float32 threshold is exactly 1 and its gradient is exactly 0, so
# that it could not change again.
LARGEST_LOGIT = F32(16)


def check_rule(rule: str) -> None:
    """Raise ValueError for a name that is not one of `RULES`."""
    need_choice("thresholds", rule, RULES)


def to_parameter(rule: str, threshold: np.ndarray) -> np.ndarray:
    """The parameter (N,) that represents thresholds (N,): a copy of them, or their logits for "sigmoid".

    Logits are clipped to +-16, which moves a threshold that is nearer to 0 or 1 than 1.2e-7. Raises ValueError for a
    threshold that the rule excludes.
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
    """The thresholds (N,) that a parameter (N,) represents, as a new array."""
    return cells.sigmoid_float32(parameter) if rule == "sigmoid" else parameter.copy()


def bounds(rule: str) -> tuple[float, float]:
    """The range that the rule allows for a parameter."""
    if rule == "sigmoid":
        return -float(LARGEST_LOGIT), float(LARGEST_LOGIT)
    return 0.0, 1.0 if rule == "clamped" else float("inf")


def clamp(rule: str, parameter: np.ndarray) -> None:
    """Clip a parameter in place to the range that the rule allows."""
    low, high = bounds(rule)
    np.clip(parameter, F32(low), F32(high), out=parameter)


def gradient(rule: str, threshold: np.ndarray, d_threshold: np.ndarray) -> np.ndarray:
    """Gradient of the parameter, from the threshold and its gradient (chain rule); all (N,)."""
    if rule == "fixed":
        return np.zeros_like(d_threshold)
    return d_threshold * threshold * (1 - threshold) if rule == "sigmoid" else d_threshold


def initial(start: float | Sequence[float], units: int, *, rng: np.random.Generator | None = None) -> np.ndarray:
    """Initial thresholds (units,) float32.

    start : one number for all units, or one number per unit; with `rng`, the mean of the distribution, in (0, 1)
    rng   : draw the thresholds, see `network.draw_thresholds`

    Raises ValueError for a mean outside (0, 1), and for numbers that are negative, not finite or of another count.
    """
    if rng is not None:
        mean = float(np.asarray(start))
        if not 0 < mean < 1:
            raise ValueError(f"threshold mean: got {mean}, need a number between 0 and 1")
        return draw_thresholds(mean, units, rng)
    given = np.asarray(start, F32)
    if given.shape not in ((), (units,)) or not (np.isfinite(given) & (given >= 0)).all():
        raise ValueError(f"thresholds: got {start!r}, need one number >= 0, or one for each of {units} units")
    return np.ascontiguousarray(np.broadcast_to(given, (units,)))
