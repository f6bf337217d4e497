"""A scalar that counts: runs the specification's own loops and counts what they multiply."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import tolerance

from eventrnn import reference


@dataclass
class Tally:
    """Multiplications seen: all of them, and those of two non-zero numbers."""

    dense: int = 0
    effective: int = 0


@dataclass(frozen=True)
class Counted:
    """A number that adds and multiplies, and counts products in its tally."""

    value: float
    tally: Tally = field(compare=False)

    def __mul__(self, other: Counted) -> Counted:
        self.tally.dense += 1
        self.tally.effective += self.value != 0 and other.value != 0
        return Counted(self.value * other.value, self.tally)

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.value + other.value, self.tally)


def counted(array: np.ndarray, tally: Tally) -> np.ndarray:
    """The array as an object array of counting numbers."""
    return np.frompyfunc(lambda value: Counted(float(value), tally), 1, 1)(array)


def count_multiplications(weights: np.ndarray, values: np.ndarray) -> tuple[int, int]:
    """Run `reference.propagate` on counting numbers: (dense, effective) multiplications.

    weights (J, P), values (B, J); dense counts every weight by every value, effective those where neither is zero.
    """
    tally = Tally()
    bias = counted(np.zeros(weights.shape[1]), tally)
    drive = reference.propagate(counted(weights, tally), counted(values, tally), bias)
    # What was counted must be the product, or the count would be of something else.
    products = np.frompyfunc(lambda number: number.value, 1, 1)(drive).astype(np.float64)
    expected = values.astype(np.float64) @ weights.astype(np.float64)
    bound = tolerance.drive_bound(weights, values, np.zeros(weights.shape[1]), tolerance.U64)
    assert (np.abs(products - expected) <= bound).all()
    return tally.dense, tally.effective
