"""Sizes of a matrix of gated blocks, and the arrays that its product needs in a window."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from eventrnn.cuda.training.kernels.gated_blocks import MOST_BLOCKS
from eventrnn.cuda.training.layout import INPUT_ORDERS, up
from eventrnn.weights import GatedBlocks, MatrixId
from eventrnn.weights.gated import block_grid

# Rows that a validation multiplies at once. Training keeps the products of all rows for the backward pass.
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class GatedSizes:
    """Sizes of a matrix of gated blocks.

    Attributes
    ----------
    name     : of the matrix
    inputs   : of the matrix
    gates, units : its outputs are `units` of each of `gates` gates of a cell; of a read-out there is one gate
    block    : inputs and outputs of a block
    rank     : of a gate with two factors; 0 for one factor
    softmax  : whether the rule of the gates is "softmax"; otherwise it is "linear"
    """

    name: str
    inputs: int
    gates: int
    units: int
    block: tuple[int, int]
    rank: int
    softmax: bool

    @classmethod
    def of(cls, name: str, weights: GatedBlocks, gates: int) -> GatedSizes:
        """The sizes of a matrix whose outputs belong to so many gates of a cell. Raises ValueError for more blocks than
        the kernels can count."""
        inputs, outputs = weights.shape
        if weights.n_blocks > MOST_BLOCKS:
            raise ValueError(
                f"{name}: got {weights.n_blocks:,} blocks, but training on a GPU takes at most {MOST_BLOCKS:,}; use "
                "larger blocks, or backend='cpu'"
            )
        rank = 0 if weights.gate_out is None else len(weights.gate_out)
        return cls(name, inputs, gates, outputs // gates, weights.block, rank, weights.gate_rule == "softmax")

    @property
    def grid(self) -> tuple[int, int]:
        """Block rows and block columns."""
        return block_grid((self.inputs, self.gates * self.units), self.block)

    @property
    def blocks(self) -> int:
        return prod(self.grid)

    @property
    def pitch(self) -> int:
        """The number of blocks, padded."""
        return up(self.blocks)

    @property
    def columns(self) -> int:
        """Outputs, each gate padded."""
        return self.gates * up(self.units)

    @property
    def shift(self) -> int:
        """By how many places the gates of the host are shifted in the product."""
        order = INPUT_ORDERS[self.gates] if MatrixId(self.name).role == "w_in" else (0,)
        return order.index(0)

    def rows_at_once(self, rows: int, *, training: bool) -> int:
        """Rows whose products are in memory together."""
        return rows if training else min(rows, ROWS_AT_ONCE)

    def outline(self, rows: int, steps: int, operand: Any, *, training: bool) -> dict[Any, tuple[tuple[int, ...], Any]]:
        """Name -> shape and type of every array of a window of so many rows (step and sample)."""
        name, blocks = self.name, (rows, self.pitch)
        products = (self.rows_at_once(rows, training=training), self.grid[0], self.columns)
        spec: dict[Any, tuple[tuple[int, ...], Any]] = {
            ("logits", name): (blocks, np.float32),
            ("gates", name): (blocks, np.float32),
            ("faults", name): ((rows,), np.int64),
            ("products", name): (products, np.float32),
        }
        if self.rank:
            inner = rows, up(self.rank)
            spec |= {("inner", name): (inner, np.float32), ("inner operands", name): (inner, operand)}
        if training:
            spec |= {
                ("slopes", name): (blocks, np.float32),
                ("chosen", name): (blocks, np.uint8),
                ("penalties of gates", name): ((rows,), np.float64),
                ("used", name): ((self.pitch,), np.float64),
                ("d_products", name): (products, operand),
                ("d_gates", name): (blocks, np.float32),
                ("d_logits", name): (blocks, operand),
                ("partial gates", name): ((steps, self.pitch), np.float32),
            }
        if training and self.rank:
            spec |= {("d_inner", name): (inner, np.float32), ("d_inner operands", name): (inner, operand)}
        return spec
