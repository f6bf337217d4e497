"""MOVED."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass
from dataclasses import fields


@dataclass
class BackwardWork:
    """What the backward pass of a window did with one matrix; by presynaptic unit, (n_pre,) int64, unless said.

    Attributes
    ----------
    kept            : weights that are not pruned
    columns         : of the matrix, a number
    rows            : samples and steps of the window, a number
    asked           : of them, those for which a dense engine would make the gradient of what was sent, a number
    fired           : events that arrived: each has a use for a row of the weight gradient
    gradient_rows   : rows that were added, zeros of BLAS included
    gradient_stored : weights that such a row touches
    open            : samples and steps whose gradient of what was sent has a use
    dots            : those that were made
    dots_stored     : weights that such a dot touches
    """

    kept: np.ndarray
    columns: int
    rows: int
    asked: int
    fired: np.ndarray
    gradient_rows: np.ndarray
    gradient_stored: np.ndarray
    open: np.ndarray
    dots: np.ndarray
    dots_stored: np.ndarray

    @classmethod
    def none(cls, kept: np.ndarray, columns: int, rows: int) -> BackwardWork:
        """Nothing done yet."""
        return cls(kept, columns, rows, 0, *(np.zeros(len(kept), np.int64) for _ in range(6)))


@dataclass(frozen=True)
class BackwardCounts:
    """Multiplications of a window's backward pass with one matrix (or a sum of them). Integers.

    Two products: the weight gradient, a row for every event that arrived, and the gradient of what was sent, a dot for
    every (unit, sample, step) that fired or has a slope. The element-wise work is not in it.

    Attributes
    ----------
    backward_dense     : of a dense engine: every sample and step x every weight, in both products
    backward_effective : with a use: event x kept weight, and open path x kept weight
    backward_executed  : made, padding of pieces and zeros of BLAS included
    backward_weight_bytes : of weights read by the dots
    """

    backward_dense: int = 0
    backward_effective: int = 0
    backward_executed: int = 0
    backward_weight_bytes: int = 0

    def __add__(self, other: BackwardCounts) -> BackwardCounts:
        return BackwardCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def count_backward(work: Mapping[str, BackwardWork]) -> dict[str, BackwardCounts]:
    """Operations of a window's backward pass by matrix, from `Tape.work`. The read-out is dense and not in it."""
    counts = {}
    for name, w in work.items():
        dots = int(w.dots @ w.dots_stored)
        counts[name] = BackwardCounts(
            (w.rows + w.asked) * len(w.kept) * w.columns,
            int((w.fired + w.open) @ w.kept),
            int(w.gradient_rows @ w.gradient_stored) + dots,
            4 * dots,
        )
    return counts
