"""What one layer keeps of a window, and what its backward pass takes and returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eventrnn.cells import Cell
from eventrnn.counting.backward import BackwardWork
from eventrnn.cpu.threads import Team
from eventrnn.training.bptt.kernels import cell_update
from eventrnn.training.bptt.kernels.records import CompressedEvents, SurrogateParameters, TapeArrays
from eventrnn.training.bptt.workspace import Arena

F32 = np.float32


@dataclass
class LayerTape:
    """What the backward pass needs of one layer and window. T steps, B samples, N units, I inputs.

    Attributes
    ----------
    x         : (T, B, I) inputs
    w_rec     : (N, 3N) recurrent weights that were used, DropConnect included
    u, r, g, q, v : (T, B, N) gates, candidate's recurrent drive (r * y in the paper's variant), cell before the event
    y, c      : (T + 1, B, N) output and cell after the event; the first step is the state before the window
    threshold : (N,)
    share_in  : share of x that is not zero
    support   : share of (step, sample, unit) triples where the unit fired or its surrogate slope is not zero; NaN until
                the backward pass
    work      : operations of the backward pass by matrix; empty until then
    engine    : the engine that wrote the tape
    """

    x: np.ndarray
    w_rec: np.ndarray
    u: np.ndarray
    r: np.ndarray
    g: np.ndarray
    q: np.ndarray
    v: np.ndarray
    y: np.ndarray
    c: np.ndarray
    threshold: np.ndarray
    share_in: float = float("nan")
    support: float = float("nan")
    work: dict[str, BackwardWork] = field(default_factory=dict)
    engine: object | None = field(default=None, repr=False)

    def arrays(self) -> TapeArrays:
        """The arrays of the tape, flat, for kernels."""
        return TapeArrays(*(a.reshape(-1) for a in (self.u, self.r, self.g, self.q, self.v, self.y, self.c)))


@dataclass
class MatrixInputs:
    """What a matrix was multiplied with over a window.

    Attributes
    ----------
    arrays : flat (T * B, n_pre) each: one array, or, for `w_rec` in the paper's variant, the inputs of the gates u and
             r, and those of the candidate
    share  : share of the first array that is not zero
    lists  : events of each array by unit, where the weight gradient goes over events
    """

    arrays: tuple[np.ndarray, ...]
    share: float
    lists: list[CompressedEvents] = field(default_factory=list)


@dataclass
class LayerGradients:
    """Result of a layer's backward pass: gradients by name (`w_in`, `w_rec`, `bias_in`, `bias_rec`, `threshold`), and
    that of its input (T, B, I), or None."""

    gradients: dict[str, np.ndarray]
    d_x: np.ndarray | None


@dataclass(frozen=True)
class GradientMask:
    """At which inputs of a layer the gradient is needed: at all of them, or at active pairs of the layer below.

    Attributes
    ----------
    v         : flat (T * B, I) cell states of the layer below; None: the gradient is needed everywhere
    surrogate : surrogate and thresholds of the layer below
    zeroed    : the gradient is zero where it is not needed; otherwise it may be anything there
    """

    v: np.ndarray | None = None
    surrogate: SurrogateParameters = field(
        default_factory=lambda: SurrogateParameters(0, F32(0), F32(1), np.zeros(0, F32))
    )
    zeroed: bool = False

    @classmethod
    def of_layer(cls, tape: LayerTape, cell: Cell) -> GradientMask:
        """The active pairs of the layer that sent the inputs."""
        return cls(tape.v.reshape(-1), surrogate_parameters(cell, tape.threshold))

    @classmethod
    def of_mask(cls, mask: np.ndarray, team: Team, arena: Arena) -> GradientMask:
        """Where a boolean mask (T, B, I) is True: cell states of one above thresholds of zero."""
        v = arena.take(mask.size)
        team.run(cell_update.convert_to_float32, np.ascontiguousarray(mask).reshape(-1), v)
        return cls(v, SurrogateParameters(0, F32(0), F32(1), np.zeros(mask.shape[2], F32)), zeroed=True)

    def zero_elsewhere(self, d_x: np.ndarray) -> None:
        """Set a gradient that was computed everywhere to zero where it is not needed, if `zeroed`."""
        if self.zeroed and self.v is not None:
            d_x[self.v.reshape(d_x.shape) == 0] = 0


def surrogate_parameters(cell: Cell, threshold: np.ndarray) -> SurrogateParameters:
    """The surrogate of a cell as kernels take it."""
    rule = cell.surrogate
    return SurrogateParameters(rule.code, F32(rule.dampening), F32(rule.support), threshold)
