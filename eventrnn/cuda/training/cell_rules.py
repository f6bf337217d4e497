"""What training on a GPU knows about each cell: the arrays of a layer, and the kernels of a step. A new cell is a row
here and its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from eventrnn.cells import Cell
from eventrnn.cuda.training.kernels import cell_steps, plain_steps

#: the array of the tape that holds the cells, of an EGRU before the event
CELLS = 4


@dataclass(frozen=True)
class CellRule:
    """How layers of a cell are trained.

    Attributes
    ----------
    planes    : arrays (T, B, N') of the tape
    output    : the one of them that is sent on where it exceeds the threshold
    parts     : parts (B, N') of the gradients of the drives of a step; the first ones, one per gate, are those of the
                input product
    recurrent : the first part of the recurrent product
    forward   : precision -> kernel of the step after its products, and its signature
    adjoint   : precision and surrogate -> kernel of its adjoint, and its signature
    """

    planes: int
    output: int
    parts: int
    recurrent: int
    forward: Callable[[str], tuple]
    adjoint: Callable[[str, tuple[int, float, float]], tuple]


def _egru(paper: bool, precision: str, surrogate: tuple[int, float, float]) -> tuple:
    return cell_steps.adjoint_kernel(precision, paper, *surrogate)


def _plain(make: Callable[[str], tuple]) -> Callable[[str, Any], tuple]:
    """The adjoint of a cell without a surrogate derivative."""
    return lambda precision, surrogate: make(precision)


#: name and variant of a cell -> its rule
RULES = {
    ("egru", "evnn"): CellRule(5, CELLS, 5, 1, cell_steps.forward_kernel, partial(_egru, False)),
    ("egru", "paper"): CellRule(5, CELLS, 5, 1, cell_steps.paper_forward_kernel, partial(_egru, True)),
    ("gru", "after"): CellRule(5, CELLS, 4, 1, plain_steps.gru_kernel, _plain(plain_steps.gru_adjoint_kernel)),
    ("gru", "before"): CellRule(
        5, CELLS, 3, 1, plain_steps.gru_before_kernel, _plain(plain_steps.gru_before_adjoint_kernel)
    ),
    ("lstm", "standard"): CellRule(6, 5, 4, 0, plain_steps.lstm_kernel, _plain(plain_steps.lstm_adjoint_kernel)),
}


def rule_of(cell: Cell) -> CellRule:
    """The rule of a cell."""
    return RULES[cell.name, cell.variant]
