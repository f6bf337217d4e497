"""Operation counts of the backward pass of one window of training.

Each weight matrix takes part in two products (Subramoney et al. 2023, sparse back-propagation through time):

- the weight gradient: one row per event that arrived, because a silent unit contributes an exact zero;
- the gradient of the presynaptic outputs: one dot product per (unit, sample, step) that fired or whose surrogate
  derivative is not zero (an active pair), because any other gradient is multiplied by an exact zero.

The engine records its work as `BackwardWork`; `count_backward` turns it into `BackwardCounts`. The definitions are
those of the forward pass in `counts.py`: `dense` is the work of a dense engine, `effective` the products that can be
non-zero, `executed` the multiplications of the kernels. The element-wise work and the read-out are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from eventrnn._checks import need_kind


@dataclass
class BackwardWork:
    """What the backward pass of a window did with one matrix.

    Two products use the matrix: the weight gradient, to which each event at its input adds one row, and the gradient of
    its input, one dot product per presynaptic unit, step and sample. An active pair is a unit, at a step and sample,
    that fired or whose surrogate slope is not zero: elsewhere the gradient of the input is multiplied by zero.

    Arrays are (n_pre,) int64, by presynaptic unit; the others are single integers.

    Attributes
    ----------
    kept                : weights that are not pruned
    columns             : columns of the matrix
    rows                : steps times samples of the window
    input_gradient_rows : rows for which a dense engine computes the gradient of the input. Recurrent matrices need it
                          for all steps but the first, the first layer only where the gradient of its input is returned
    fired               : events at the input
    gradient_rows       : rows that were added to the weight gradient; through BLAS, all rows
    gradient_stored     : weights that such a row touches
    active_pairs        : steps and samples where the gradient of the input is needed
    dots                : dot products that were computed
    dots_stored         : weights that such a dot product touches
    event_products      : of gated blocks, the sum over events of the kept weights of their units in blocks with a gate;
                          None for other matrices, where all kept weights of the units count
    pair_products       : the same over active pairs
    selection           : of gated blocks, multiplications of the gates in the backward pass
    """

    kept: np.ndarray
    columns: int
    rows: int
    input_gradient_rows: int
    fired: np.ndarray
    gradient_rows: np.ndarray
    gradient_stored: np.ndarray
    active_pairs: np.ndarray
    dots: np.ndarray
    dots_stored: np.ndarray
    event_products: int | None = field(default=None, kw_only=True)
    pair_products: int | None = field(default=None, kw_only=True)
    selection: int = field(default=0, kw_only=True)

    @property
    def of_events(self) -> int:
        """Effective multiplications of all events: of the forward pass, and as many of the weight gradient."""
        return int(self.fired @ self.kept) if self.event_products is None else self.event_products

    @property
    def of_pairs(self) -> int:
        """Effective multiplications of all active pairs, of the gradient of the input."""
        return int(self.active_pairs @ self.kept) if self.pair_products is None else self.pair_products

    @classmethod
    def none(cls, kept: np.ndarray, columns: int, rows: int) -> BackwardWork:
        """A record of no work."""
        return cls(kept, columns, rows, 0, *(np.zeros(len(kept), np.int64) for _ in range(6)))


@dataclass(frozen=True)
class BackwardCounts:
    """Multiplications of the backward pass of a window with one matrix, or with several. Integers.

    Attributes
    ----------
    backward_dense     : of a dense engine: every row (step, sample) x every weight, in both products
    backward_effective : event x kept weight, and open output gradient x kept weight
    backward_executed  : multiplications of the kernels, with padding of blocks and zeros that BLAS multiplies
    backward_weight_bytes : bytes of weights read by the dot products
    backward_selection : of gated blocks, multiplications of their gates and of the inputs that they scale
    """

    backward_dense: int = 0
    backward_effective: int = 0
    backward_executed: int = 0
    backward_weight_bytes: int = 0
    backward_selection: int = 0

    def __add__(self, other: BackwardCounts) -> BackwardCounts:
        return BackwardCounts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def count_backward(work: Mapping[str, BackwardWork]) -> dict[str, BackwardCounts]:
    """Counts of the backward pass of a window by matrix, from `Tape.work`. The read-out is dense and not included."""
    need_kind("work", work, Mapping, "a mapping of names of matrices to BackwardWork, such as Tape.work")
    counts = {}
    for name, w in work.items():
        need_kind(f"work of {name}", w, BackwardWork, "a BackwardWork")
        dots = int(w.dots @ w.dots_stored)
        counts[name] = BackwardCounts(
            (w.rows + w.input_gradient_rows) * len(w.kept) * w.columns,
            w.of_events + w.of_pairs,
            int(w.gradient_rows @ w.gradient_stored) + dots,
            4 * dots,
            w.selection,
        )
    return counts
