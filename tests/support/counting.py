"""Numbers that count multiplications: the loops of the specification run with them and are counted."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from eventrnn import reference
from eventrnn.weights import CSR, NM, BlockCSR, Weights
from support import tolerance


@dataclass
class Tally:
    """Number of multiplications: all of them, and those of two non-zero numbers."""

    dense: int = 0
    effective: int = 0


@dataclass(frozen=True)
class Counted:
    """A number that adds and multiplies, and counts its products in a tally."""

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


def nm_places(weights: NM) -> list[tuple[int, int]]:
    """Sorted (unit, output) of every stored weight of an N:M matrix, decoded from its codes bit by bit."""
    n_pre, n_post = weights.shape
    post = weights.axis == "post"
    length, lines = (n_post, n_pre) if post else (n_pre, n_post)
    starts = range(0, length, weights.m)
    walk = (
        [(g, line) for line in range(lines) for g in starts] if post else [(g, k) for g in starts for k in range(lines)]
    )
    stream = sum(int(byte) << 8 * k for k, byte in enumerate(weights.codes))
    width, places = max(1, math.ceil(math.log2(weights.m))), []
    for start, line in walk:
        for _ in range(min(weights.n, length - start)):
            place, stream = start + stream % 2**width, stream >> width
            places.append((line, place) if post else (place, line))
    return sorted(places)


def count_multiplications(weights: np.ndarray, values: np.ndarray) -> tuple[int, int]:
    """Run `reference.propagate` on counting numbers and return the (dense, effective) multiplications.

    weights (J, P), values (B, J). Dense counts the product of every weight and every value, effective only the
    products of two non-zero numbers.
    """
    tally = Tally()
    bias = counted(np.zeros(weights.shape[1]), tally)
    drive = reference.propagate(counted(weights, tally), counted(values, tally), bias)
    # The counted operations must have computed the product. Otherwise the count is of something else.
    products = np.frompyfunc(lambda number: number.value, 1, 1)(drive).astype(np.float64)
    expected = values.astype(np.float64) @ weights.astype(np.float64)
    bound = tolerance.drive_bound(weights, values, np.zeros(weights.shape[1]), tolerance.U64)
    assert (np.abs(products - expected) <= bound).all()
    return tally.dense, tally.effective


def count_executed(weights: Weights, fired: np.ndarray) -> int:
    """The multiplications of one drive row that count as executed, counted in the arrays of the format.

    fired (n_pre,): not zero for the units that send an event.
    """
    total = 0
    for j in np.flatnonzero(fired):
        if isinstance(weights, CSR):
            total += int(weights.indptr[j + 1] - weights.indptr[j])
        elif isinstance(weights, BlockCSR):
            row = j // weights.block[0]
            total += int(weights.indptr[row + 1] - weights.indptr[row]) * weights.block[1]
        elif isinstance(weights, NM):
            total += sum(unit == j for unit, _ in nm_places(weights))
        else:
            total += weights.shape[1]
    return total
