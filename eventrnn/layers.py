"""The parts of a network: one event layer, and the linear read-out above."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eventrnn.cells import Cell
from eventrnn.events import check_finite
from eventrnn.weights import Weights


@dataclass(frozen=True, eq=False, repr=False)
class Layer:
    """One event layer of N units over I inputs.

    Attributes
    ----------
    w_in, w_rec       : weights (I, 3N) and (N, 3N), any format, gate rows (u, r, g)
    bias_in, bias_rec : (3N,) float32
    threshold         : (N,) float32, >= 0
    cell              : which equations
    """

    w_in: Weights
    w_rec: Weights
    bias_in: np.ndarray
    bias_rec: np.ndarray
    threshold: np.ndarray
    cell: Cell = Cell()

    def __post_init__(self):
        units = self.units
        if units < 1:
            raise ValueError("threshold: got none, need one for each of at least one unit")
        rows = self.cell.gates * units
        if self.w_rec.shape != (units, rows):
            raise ValueError(f"w_rec: got shape {self.w_rec.shape}, need ({units}, {rows}) for {units} thresholds")
        if self.w_in.shape[1] != rows:
            raise ValueError(f"w_in: got shape {self.w_in.shape}, need (inputs, {rows}) for {units} units")
        for name, size in (("bias_in", rows), ("bias_rec", rows), ("threshold", units)):
            need_vector(name, getattr(self, name), size)
        if (self.threshold < 0).any():
            i = int(np.argmax(self.threshold < 0))
            raise ValueError(f"threshold: got {self.threshold[i]} at unit {i}; need >= 0")

    def __repr__(self) -> str:
        return f"Layer({self.units} {self.cell.variant} units, w_in={self.w_in!r}, w_rec={self.w_rec!r})"

    @property
    def units(self) -> int:
        return len(self.threshold)

    @property
    def inputs(self) -> int:
        return self.w_in.shape[0]


@dataclass(frozen=True, eq=False)
class Readout:
    """Linear read-out of the last layer's events: `output = bias + sum over fired j of weights[j] * y[j]`.

    Attributes
    ----------
    weights : (N, V), any format
    bias    : (V,) float32
    tied    : the weights are the embedding's transpose (V, N) -> (N, V) and are saved once
    """

    weights: Weights
    bias: np.ndarray
    tied: bool = False

    def __post_init__(self):
        need_vector("readout bias", self.bias, self.weights.shape[1])


def need_vector(name: str, array: np.ndarray, size: int) -> None:
    """Refuse what is not a finite float32 vector of that size. Raises TypeError or ValueError."""
    need_float32(name, array, 1)
    if len(array) != size:
        raise ValueError(f"{name}: got length {len(array)}, need {size}")


def need_float32(name: str, array: np.ndarray, ndim: int) -> None:
    """Refuse what is not a finite float32 array of so many dimensions. Raises TypeError or ValueError."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != ndim:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"{name}: got {got}, need a float32 array with {ndim} dimension{'s' * (ndim > 1)}")
    check_finite(name, array)
