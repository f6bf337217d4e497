"""Soft targets: what a teacher expects at every position of a text, for knowledge distillation.

They are computed once, before a training, in which no teacher is needed any more (`distillation.py`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eventrnn._checks import WHOLE, float32_array, need_number, number_array

# What rounding may add to a sum of probabilities.
ROUNDING = 1e-4


@dataclass(frozen=True, eq=False)
class SoftTargets:
    """The probabilities of the k most probable next symbols at every position.

    Attributes
    ----------
    symbols       : (..., k) integers, all different at a position
    probabilities : (..., k) numbers in [0, 1], whose sum at a position is at most 1. The remainder is the probability
                    of all other symbols together
    weight        : share of the soft targets in the loss, in [0, 1]; see `cross_entropy`

    The arrays are kept as read-only int32 and float32 copies. Raises ValueError for arrays that do not fit each other,
    and for values outside these ranges.
    """

    symbols: np.ndarray
    probabilities: np.ndarray
    weight: float = 0.5

    def __post_init__(self):
        symbols = number_array("symbols", self.symbols, "(..., k)", kinds=WHOLE)
        probabilities = float32_array("probabilities", self.probabilities, "(..., k)")
        if symbols.shape != probabilities.shape or not symbols.ndim or not symbols.shape[-1]:
            raise ValueError(
                f"probabilities: got shape {probabilities.shape} for symbols {symbols.shape}, need (..., k) both"
            )
        if symbols.size and not 0 <= symbols.min() <= symbols.max() < 1 << 31:
            raise ValueError(f"symbols: got {symbols.min()} to {symbols.max()}, need numbers from 0")
        symbols = np.array(symbols, np.int32, order="C")
        if not np.diff(np.sort(symbols, axis=-1), axis=-1).all():
            raise ValueError("symbols: got one twice at a position; need different symbols")
        if probabilities.size and (
            probabilities.min() < 0 or probabilities.sum(axis=-1, dtype=np.float64).max() > 1 + ROUNDING
        ):
            raise ValueError("probabilities: got negative ones, or a sum above 1 at a position; need shares of 1")
        need_number("weight", self.weight, at_least=0, at_most=1, what="share")
        self._take(symbols, np.array(probabilities, np.float32, order="C"), float(self.weight))

    def _take(self, symbols: np.ndarray, probabilities: np.ndarray, weight: float) -> None:
        for array in (symbols, probabilities):
            array.flags.writeable = False
        for name, value in (("symbols", symbols), ("probabilities", probabilities), ("weight", weight)):
            object.__setattr__(self, name, value)

    @property
    def top_k(self) -> int:
        """Symbols per position."""
        return self.symbols.shape[-1]

    @cached_property
    def _highest(self) -> int:
        return int(self.symbols.max(initial=0))

    def check(self, size: int) -> None:
        """Raise ValueError for symbols that are not among `size` ones."""
        if self._highest >= size:
            raise ValueError(f"soft targets: got symbol {self._highest}, need symbols below {size}, as the network has")

    def streams(self, batch: int) -> SoftTargets:
        """Those of a text (n, k) cut into `batch` streams as the text is, (n // batch, batch, k)."""
        length = len(self.symbols) // batch
        symbols, probabilities = (
            np.ascontiguousarray(each[: length * batch].reshape(batch, length, -1).swapaxes(0, 1))
            for each in (self.symbols, self.probabilities)
        )
        return self._with(symbols, probabilities)

    def steps(self, begin: int, end: int) -> SoftTargets:
        """Those of some steps of `streams`, views (end - begin, batch, k)."""
        return self._with(self.symbols[begin:end], self.probabilities[begin:end])

    def samples(self, own: slice) -> SoftTargets:
        """Those of some samples of `streams`, views (T, samples, k)."""
        return self._with(self.symbols[:, own], self.probabilities[:, own])

    def _with(self, symbols: np.ndarray, probabilities: np.ndarray) -> SoftTargets:
        """Some of these soft targets, which need no new check."""
        other = object.__new__(SoftTargets)
        other._take(symbols, probabilities, self.weight)
        # The bound holds for every part.
        other.__dict__["_highest"] = self._highest
        return other

    @cached_property
    def digest(self) -> str:
        """SHA-256 of symbols and probabilities, in hexadecimal digits."""
        total = hashlib.sha256(repr(self.symbols.shape).encode())
        for array in (self.symbols, self.probabilities):
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()
