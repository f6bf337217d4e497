"""Records of one layer and window: what the forward pass keeps, and what the backward pass takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eventrnn import cells
from eventrnn.cells import Cell
from eventrnn.counting.backward import BackwardWork
from eventrnn.cpu.threads import Team
from eventrnn.training.bptt.gated_products import GatedProduct
from eventrnn.training.bptt.kernels import cell_update
from eventrnn.training.bptt.kernels.records import CompressedEvents, SurrogateParameters, TapeArrays
from eventrnn.training.bptt.workspace import Arena

F32 = np.float32


@dataclass
class LayerTape:
    """What every backward pass needs of one layer and window. T steps, B samples, N units, I inputs; float32.

    Attributes
    ----------
    x         : (T, B, I) inputs
    w_rec     : (N, 3N) recurrent weights that were used, with DropConnect applied; (N, 4N) of an LSTM
    v         : (T, B, N) cell before the event; the cell itself where there is no event
    y, c      : (T + 1, B, N) output and cell after the event; the first step is the state before the window
    threshold : (N,)
    share_in  : share of x that is not zero
    support   : share of (step, sample, unit) triples where the unit fired or its surrogate slope is not zero; NaN until
                the backward pass
    work      : operations of the backward pass by matrix; empty until the backward pass
    engine    : the engine that wrote the tape
    products  : the product of each matrix of gated blocks, `w_in` or `w_rec`
    """

    x: np.ndarray
    w_rec: np.ndarray
    v: np.ndarray
    y: np.ndarray
    c: np.ndarray
    threshold: np.ndarray
    share_in: float = float("nan")
    support: float = float("nan")
    work: dict[str, BackwardWork] = field(default_factory=dict)
    engine: object | None = field(default=None, repr=False)
    products: dict[str, GatedProduct] = field(default_factory=dict)


@dataclass(kw_only=True)
class EventTape(LayerTape):
    """The tape of EGRU cells.

    Attributes
    ----------
    u, r, g : (T, B, N) keep gate, reset gate and candidate
    q       : (T, B, N) recurrent drive of the candidate; in the paper's variant r * y of the step before
    """

    u: np.ndarray
    r: np.ndarray
    g: np.ndarray
    q: np.ndarray

    def arrays(self) -> TapeArrays:
        """The arrays of the tape, flat, for kernels."""
        return TapeArrays(*(a.reshape(-1) for a in (self.u, self.r, self.g, self.q, self.v, self.y, self.c)))


@dataclass
class MatrixInputs:
    """The presynaptic values with which a matrix was multiplied in a window.

    Attributes
    ----------
    arrays : flat arrays (T * B, n_pre). There is one; for `w_rec` in the paper's variant there are two, the inputs of
             the gates u and r, and those of the candidate
    share  : share of the first array that is not zero
    lists  : events of each array by unit; empty where the weight gradient is computed by BLAS
    """

    arrays: tuple[np.ndarray, ...]
    share: float
    lists: list[CompressedEvents] = field(default_factory=list)


@dataclass
class LayerGradients:
    """The result of the backward pass of a layer.

    Attributes
    ----------
    gradients : arrays by name: `w_in`, `w_rec`, `bias_in`, `bias_rec`, `threshold`; of gated blocks also `w_in.gate`
                and the like
    d_x       : (T, B, I) gradient of the input; None where it was not requested
    """

    gradients: dict[str, np.ndarray]
    d_x: np.ndarray | None


@dataclass(frozen=True)
class GradientMask:
    """The inputs of a layer at which the gradient is needed: all of them, or the active pairs of the layer below.

    Attributes
    ----------
    v         : flat (T * B, I) cell states of the layer below; None where the gradient is needed at all inputs
    surrogate : surrogate and thresholds of the layer below
    zeroed    : True where the gradient must be zero at the other inputs; otherwise it is undefined there
    """

    v: np.ndarray | None = None
    surrogate: SurrogateParameters = field(
        default_factory=lambda: SurrogateParameters(0, F32(0), F32(1), np.zeros(0, F32))
    )
    zeroed: bool = False

    @classmethod
    def of_layer(cls, tape: LayerTape, cell: Cell) -> GradientMask:
        """The active pairs of the layer that sent the inputs: all of them where the cell has no thresholds."""
        if not cell.thresholded:
            return cls()
        return cls(tape.v.reshape(-1), surrogate_parameters(cell, tape.threshold))

    @classmethod
    def of_mask(cls, mask: np.ndarray, team: Team, arena: Arena) -> GradientMask:
        """The inputs where a boolean mask (T, B, I) is True, as cell states of one with thresholds of zero."""
        v = arena.take(mask.size)
        team.run(cell_update.convert_to_float32, np.ascontiguousarray(mask).reshape(-1), v)
        return cls(v, SurrogateParameters(0, F32(0), F32(1), np.zeros(mask.shape[2], F32)), zeroed=True)

    def needed(self, shape: tuple[int, int]) -> np.ndarray:
        """The inputs (T * B, I) at which the gradient is needed, as booleans."""
        if self.v is None:
            return np.ones(shape, bool)
        return _active(self.surrogate, self.v.reshape(shape))

    def zero_elsewhere(self, d_x: np.ndarray) -> None:
        """Set a gradient that was computed everywhere to zero where it is not needed, if `zeroed`."""
        if self.zeroed and self.v is not None:
            d_x[self.v.reshape(d_x.shape) == 0] = 0


def active(cell: Cell, v: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Where a unit fired or its surrogate slope is not zero: cells v (..., N) before the event, thresholds (N,)."""
    return _active(surrogate_parameters(cell, threshold), v)


def _active(rule: SurrogateParameters, v: np.ndarray) -> np.ndarray:
    slope = cells.surrogate_slope(rule.kind, v - rule.threshold, rule.dampening, rule.support)
    return (v > rule.threshold) | (slope != 0)


def surrogate_parameters(cell: Cell, threshold: np.ndarray) -> SurrogateParameters:
    """The surrogate of a cell and the thresholds (N,) as the record of the kernels."""
    rule = cell.surrogate
    return SurrogateParameters(rule.code, F32(rule.dampening), F32(rule.support), threshold)
