"""The format "gated": blocks of weights of which every input chooses some (block-wise dynamic sparseness).

After Hadifar, Deleu, Develder and Demeester, "Block-wise Dynamic Sparseness" (arXiv 2001.04686) and their released
code. A small linear gate computes one number per block from what the matrix receives. The blocks with the largest
numbers are multiplied, and the others are not read. Everything below holds per sample and time step:

    logits   l[b] = gate_bias[b] + sum over j of gate[j, b] * x[j], one float32 FMA per term. The sum over j has parts
             of `rows_of_part` neighbouring inputs: each part is a sum in ascending j, of which the first starts from
             the bias and the others from 0, and the other parts are added to the first in ascending order.
             With two factors, z[q] = sum over j of gate[j, q] * x[j], in the same parts, of which the first starts from
             0, too; and l[b] = gate_bias[b] + sum over q of gate_out[q, b] * z[q], in ascending q
    choice   the `kept_blocks` = ceil(density * blocks) largest logits; of equal ones the lowest block number
    ratios   of the chosen blocks: q[b] = l[b] / p for the rule "linear", where p is the chosen logit of the largest
             magnitude (of equal magnitudes that of the lowest block number); all q are 1 if p is 0.
             q[b] = exp(l[b] - p) for the rule "softmax", where p is the largest logit
    gates    q[b] * (blocks / s), where s is the sum of the ratios in ascending block number. Their mean over all
             blocks is 1, apart from rounding; the blocks that were not chosen have the gate 0
    drive    bias[i] + sum over j of weight[j, i] * (gate[b of j, i] * x[j]), in ascending j, one FMA per term; the
             product of gate and input is rounded first

A choice may be shared over some steps (`gate_period`): at steps 0, k, 2k and so on of a sample, logits and gates are
those of the values that the matrix receives at that step, and the same gates hold for the next k - 1 steps. What a
sample holds, and for how many further steps, is a part of the state (`state.HeldGates`). Samples of a batch need not
choose in the same steps.

The blocks are numbered row by row: block row R and block column C have the number R * (block columns) + C, whether or
not the block is stored. With all blocks chosen and equal logits every gate is exactly 1, and the matrix is the one
without gates.

The rule "linear" is the published one. Its logits may be negative and cancel: a sum s of zero has no gates, and a sum
near zero has large ones. A run stops with FloatingPointError where blocks / s, a logit, or the product of the largest
gate and the largest input, by magnitude, is not finite. The rule "softmax" has positive gates of at most the number of
blocks.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from eventrnn._checks import check_finite, float32_array, need_choice, need_kind, need_number, need_whole, number_array
from eventrnn.weights.base import Weights, need_plain, need_shape
from eventrnn.weights.block import BlockCSR, check_block

#: Rules that make gates of logits; the head of this file defines them.
GATE_RULES = ("linear", "softmax")

#: The most steps that can share a choice.
LONGEST_PERIOD = 2**31 - 1

#: The inputs that a part of a logit has, at least.
PART_INPUTS = 32


def rows_of_part(block_rows: int) -> int:
    """The inputs of a part of a logit, of a matrix whose blocks have so many rows: whole blocks, as few as have
    `PART_INPUTS`. The last part of a logit may have fewer."""
    return -(-PART_INPUTS // block_rows) * block_rows


class NotAMatrix(TypeError):
    """Gated blocks were given where only a matrix will do. Model files can hold them: the command line says it in a
    line."""


@dataclass(frozen=True, eq=False, repr=False)
class GatedBlocks(Weights):
    """Blocks of which every input chooses some; the head of this file defines the product.

    The blocks themselves are those of `BlockCSR`, padded at the far edges. Blocks of zeros need not be stored: a gate
    may choose them, and nothing is read then. There is no equal dense matrix, so that `to_dense` and `places` raise
    TypeError; `blocks` is the matrix without its gates.

    Attributes
    ----------
    indptr, indices, values, shape, block, scales : see `BlockCSR`
    gate      : (n_pre, blocks) float32, by presynaptic unit; of a gate with two factors (n_pre, rank)
    gate_bias : (blocks,) float32
    gate_out  : (rank, blocks) float32, the second factor; None for a gate with one
    density   : share of the blocks that an input chooses, in (0, 1]
    gate_rule : one of `GATE_RULES`
    gate_period : the number of steps that share a choice; with 1 every step chooses

    Examples
    --------
    >>> gate, bias = np.zeros((4, 4), np.float32), np.array([1, 3, 2, 2], np.float32)
    >>> weights = GatedBlocks.from_weights(np.ones((4, 4)), block=(2, 2), density=0.5, gate=gate, gate_bias=bias)
    >>> weights.n_blocks, weights.kept_blocks  # blocks 1 and 2 are chosen: of equal logits the lowest number
    (4, 2)
    """

    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    shape: tuple[int, int]
    block: tuple[int, int]
    gate: np.ndarray
    gate_bias: np.ndarray
    density: float
    gate_rule: str = "linear"
    gate_out: np.ndarray | None = None
    scales: np.ndarray | None = None
    gate_period: int = 1
    name: ClassVar[str] = "gated"

    def __post_init__(self):
        need_shape(self.shape)
        object.__setattr__(self, "density", need_density(self.density))
        need_choice("gate_rule", self.gate_rule, GATE_RULES)
        object.__setattr__(self, "gate_period", need_period(self.gate_period))
        check_block(self.block, self.shape)
        _need_gate(self.shape, self.block, self.gate, self.gate_bias, self.gate_out)
        # The record of the blocks checks their sizes.
        _ = self.blocks

    @cached_property
    def blocks(self) -> BlockCSR:
        """The matrix without its gates, in the same memory."""
        return BlockCSR(self.indptr, self.indices, self.values, self.shape, self.block, self.scales)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of block rows and of block columns, stored or not."""
        return block_grid(self.shape, self.block)

    @property
    def n_blocks(self) -> int:
        """The number of blocks, stored or not."""
        return math.prod(self.grid)

    @property
    def kept_blocks(self) -> int:
        """The number of blocks that an input chooses: ceil(density * n_blocks), of the density as it is written."""
        return kept_blocks(self.density, self.n_blocks)

    @property
    def gate_cost(self) -> GateCost:
        """What the gate costs and saves, see `gate_cost`."""
        rank = None if self.gate_out is None else len(self.gate_out)
        return gate_cost(self.shape, block=self.block, density=self.density, rank=rank, period=self.gate_period)

    @classmethod
    def from_weights(
        cls,
        weights: Weights | np.ndarray,
        *,
        block: tuple[int, int],
        density: float,
        gate: np.ndarray | None = None,
        gate_bias: np.ndarray | None = None,
        gate_out: np.ndarray | None = None,
        rank: int | None = None,
        rng: np.random.Generator | None = None,
        gate_rule: str = "linear",
        gate_period: int = 1,
    ) -> GatedBlocks:
        """Put a gate in front of the blocks of a matrix. Blocks of zeros are not stored. O(size of the matrix).

        Parameters
        ----------
        weights   : any other format, or a (n_pre, n_post) array; the storage of the values is kept
        block     : (r, c); where it does not divide the shape, the blocks at the far edges are padded
        density   : share of the blocks that an input chooses, in (0, 1]
        gate, gate_bias : the gate, (n_pre, blocks) and (blocks,) numbers
        gate_out  : its second factor (rank, blocks), where it has two; `gate` is then (n_pre, rank)
        rng       : draw a gate instead, with deviation 1 / sqrt(n_pre), and biases of 1: the logits of small inputs are
                    then positive
        rank      : of a drawn gate with two factors, the second with deviation 1 / sqrt(rank); None for one factor
        gate_rule : one of `GATE_RULES`
        gate_period : the number of steps that share a choice; with 1 every step chooses

        Warns where the gate costs more multiplications than the blocks that are not chosen (`gate_cost`). Raises
        ValueError for a block that does not fit the matrix, a density or a period out of range, numbers that are not
        finite, and where neither or both of a gate and an rng are given; TypeError for gates of another shape.
        """
        if isinstance(weights, GatedBlocks):
            raise NotAMatrix("weights: got gated blocks, which have a gate already; give their `blocks`")
        if (gate is None) != (gate_bias is None) or (gate is None) == (rng is None):
            raise ValueError("gate: give gate and gate_bias, or an rng that draws them")
        if rng is None and rank is not None:
            raise ValueError(f"rank: got {rank}, but only a drawn gate takes it; the rank of a given one is its own")
        if rng is not None and gate_out is not None:
            raise ValueError("gate_out: got one together with an rng, which draws the gate; give a rank")
        if rng is not None:
            need_kind("rng", rng, np.random.Generator, "a numpy Generator: numpy.random.default_rng(seed)")
        if rank is not None:
            need_whole("rank", rank, at_least=1)
        if gate_out is not None:
            gate_out = float32_array("gate_out", gate_out, "(rank, blocks)", ndim=2)
            if len(gate_out) == 0:
                raise ValueError(f"gate_out: got shape {gate_out.shape}, need (rank, blocks) with a rank >= 1")
        density, gate_period = need_density(density), need_period(gate_period)
        need_choice("gate_rule", gate_rule, GATE_RULES)
        if not isinstance(weights, Weights):
            weights = number_array("weights", weights, "(n_pre, n_post)", ndim=2)
        check_block(block, weights.shape)
        if gate is not None:
            gate, gate_bias = (
                float32_array("gate", gate, "(n_pre, blocks)"),
                float32_array("gate_bias", gate_bias, "(b,)"),
            )
            _need_gate(weights.shape, block, gate, gate_bias, gate_out)
        if isinstance(weights, Weights):
            inner = BlockCSR.from_weights(weights, block=block)
        else:
            inner = BlockCSR.from_dense(weights, block=block)
        values, scales = inner.values, None
        if isinstance(weights, Weights) and weights.storage != "float32":
            narrow = inner._encoded(weights.storage, weights.scales)
            values, scales = narrow.values, narrow.scales
        n_blocks = math.prod(block_grid(inner.shape, inner.block))
        rank = len(gate_out) if gate_out is not None else rank
        cost = gate_cost(inner.shape, block=inner.block, density=density, rank=rank, period=gate_period)
        if rng is not None:
            gate = _drawn(rng, inner.shape[0], n_blocks if rank is None else rank)
            gate_out = None if rank is None else _drawn(rng, rank, n_blocks)
            gate_bias = np.ones(n_blocks, np.float32)
        assert gate is not None and gate_bias is not None
        made = cls(
            *(inner.indptr, inner.indices, values, inner.shape, inner.block),
            *(gate, gate_bias, density, gate_rule, gate_out, scales, gate_period),
        )
        if not cost.pays:
            warnings.warn(f"gated blocks: {cost}", stacklevel=2)
        return made

    def with_numbers(
        self, weights: np.ndarray, gate: np.ndarray, gate_bias: np.ndarray, gate_out: np.ndarray | None = None
    ) -> GatedBlocks:
        """Other weights (n_pre, n_post) and another gate in the same blocks, with the same density, rule and period.

        Arrays are copied. Weights are stored as float32, and blocks of zeros are not. Raises TypeError for a gate of
        another shape, and ValueError for weights of another shape.
        """
        if np.shape(weights) != self.shape:
            raise ValueError(f"weights: got shape {np.shape(weights)}, need {self.shape}")
        inner = BlockCSR.from_dense(weights, block=self.block)
        arrays = gate.copy(), gate_bias.copy()
        out = None if gate_out is None else gate_out.copy()
        index = inner.indptr, inner.indices, inner.values
        rule = self.density, self.gate_rule
        return GatedBlocks(*index, self.shape, self.block, *arrays, *rule, out, gate_period=self.gate_period)

    def options(self) -> dict[str, Any]:
        """See `Weights.options`. A period of 1 is left out: releases without periods read the files of such blocks."""
        return {name: value for name, value in super().options().items() if (name, value) != ("gate_period", 1)}

    def check(self, full: bool = False) -> None:
        """With `full`, check the blocks as `BlockCSR` does, and that the gate is finite. Raises ValueError."""
        self.blocks.check(full)
        if full:
            self.check_gate("weight")

    def check_index(self) -> None:
        self.blocks.check_index()

    def check_finite(self, name: str) -> None:
        super().check_finite(name)
        self.check_gate(name)

    def check_gate(self, name: str) -> None:
        """Raise ValueError for a number of the gate that is not finite; `name` is that of the matrix. O(gate)."""
        check_finite(f"{name} gate", self.gate)
        check_finite(f"{name} gate_bias", self.gate_bias)
        if self.gate_out is not None:
            check_finite(f"{name} gate_out", self.gate_out)

    def to_dense(self) -> np.ndarray:
        """Raises TypeError: which weights act depends on the input."""
        raise NotAMatrix(f"{self!r}: gated blocks have no equal matrix; their `blocks` are the matrix without gates")

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Raises TypeError, as `to_dense` does, so that no conversion drops a gate."""
        raise NotAMatrix(f"{self!r}: gated blocks have no equal matrix; their `blocks` are the matrix without gates")

    def kept(self) -> np.ndarray:
        """The mask of stored entries, (n_pre, n_post) boolean, whether or not an input chooses them."""
        return self.blocks.kept()

    def fan_out(self) -> np.ndarray:
        """Weights of each unit that are not zero, in chosen blocks and others, (n_pre,) int64."""
        return self.blocks.fan_out()

    def stored_out(self) -> np.ndarray:
        return self.blocks.stored_out()

    def row_bytes(self) -> np.ndarray:
        """Bytes that an event of each unit reads at most, where all blocks are chosen, its row of the gate included."""
        return self.blocks.row_bytes() + 4 * self.gate.shape[1]

    def _spread(self, per_unit: np.ndarray) -> np.ndarray:
        return self.blocks._spread(per_unit)

    def _detail(self) -> str:
        r, c = self.block
        rank = "" if self.gate_out is None else f" of rank {len(self.gate_out)}"
        period = "" if self.gate_period == 1 else f" every {self.gate_period} steps"
        share = _padding(self.shape, self.block)
        padding = f", {share:.1%} padding" if share else ""
        chosen = f"{self.kept_blocks} of {self.n_blocks} blocks per input"
        return f"{r}x{c}, {chosen}, {self.gate_rule} gate{rank}{period}{padding}"


def _need_gate(
    shape: tuple[int, ...],
    block: tuple[int, int],
    gate: np.ndarray,
    gate_bias: np.ndarray,
    gate_out: np.ndarray | None,
) -> None:
    """Raise TypeError for a gate that is not float32 of the shapes that blocks of a matrix of that shape need."""
    n_blocks, arrays = math.prod(block_grid((shape[0], shape[1]), block)), {"gate": gate, "gate_bias": gate_bias}
    shapes: dict[str, tuple[int, ...]] = {"gate": (shape[0], n_blocks), "gate_bias": (n_blocks,)}
    if gate_out is not None:
        arrays["gate_out"] = gate_out
        need_plain("gate_out", gate_out)
        rank = len(gate_out) if gate_out.ndim else 0
        shapes |= {"gate": (shape[0], max(1, rank)), "gate_out": (max(1, rank), n_blocks)}
    for name, need in shapes.items():
        array = arrays[name]
        need_plain(name, array)
        if array.dtype != np.float32 or array.shape != need:
            raise TypeError(f"{name}: got {array.dtype} of shape {array.shape}, need float32 of shape {need}")


def _drawn(rng: np.random.Generator, n: int, columns: int) -> np.ndarray:
    """Normal numbers (n, columns) with deviation 1 / sqrt(n)."""
    return rng.standard_normal((n, columns), np.float32) / np.float32(np.sqrt(n))


def need_density(density: Any) -> float:
    """A share in (0, 1]. Raises ValueError."""
    number = need_number("density", density, above=0, at_most=1, what="share of kept blocks")
    # As it is written: float32 0.1 is 0.1, not the float64 next to it, which is larger and rounds up to a block more.
    return float(str(density)) if isinstance(density, np.floating) else number


def need_period(period: Any) -> int:
    """A number of steps, 1 or more. Raises ValueError."""
    return need_whole("gate_period", period, at_least=1, at_most=LONGEST_PERIOD)


def chosen_at(period: int, left: np.ndarray, steps: int) -> np.ndarray:
    """The row (step * batch + sample) of a run whose gates each row has, (steps * batch,) int64.

    period : the number of steps that share a choice
    left   : (batch,) number of first steps of each sample that have the gates of an earlier run. Sample b has the row
             b - batch there, which is negative
    """
    batch = len(left)
    step, sample = np.arange(steps)[:, None], np.arange(batch)
    since = (step - left) % period
    return np.where(step < left, sample - batch, (step - since) * batch + sample).ravel()


def block_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """The number of block rows and of block columns that cover a matrix."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def kept_blocks(density: float, n_blocks: int) -> int:
    """ceil(density * n_blocks), of the density as it is written: 7 for 0.07 of 100 blocks, where floats give 8."""
    return math.ceil(Fraction(repr(float(density))) * n_blocks)


def need_matrices(matrices: dict[str, Weights], what: str, remedy: str = "") -> None:
    """Raise NotAMatrix, a TypeError, for gated blocks where only a matrix will do; `what` names what needs it, and
    `remedy` what can be done instead."""
    for name, weights in matrices.items():
        if isinstance(weights, GatedBlocks):
            raise NotAMatrix(
                f"{name}: {what} cannot take gated blocks, which backend 'cpu' runs; "
                f"{remedy + '; ' if remedy else ''}their `blocks` are the matrix without gates"
            )


# --- what a gate costs and saves ----------------------------------------------------------------------------


@dataclass(frozen=True)
class GateCost:
    """Multiplications of gated blocks, as shares of those of the matrix without gates; see `gate_cost`.

    Attributes
    ----------
    shape, block, density : of the matrix (n_pre, n_post)
    rank           : of a gate with two factors; None for one factor
    period         : the number of steps that share a choice
    blocks, kept   : the number of blocks, and of those that an input chooses
    gate           : multiplications of the logits, per step: those of a choice divided by the period
    products       : multiplications of the chosen blocks, with padding
    padding        : share of the entries of all blocks that lie beyond the matrix
    smallest_block : side of the smallest square block with a cost below 1; None where there is none
    """

    shape: tuple[int, int]
    block: tuple[int, int]
    density: float
    rank: int | None
    period: int
    blocks: int
    kept: int
    gate: float
    products: float
    padding: float
    smallest_block: int | None

    @property
    def cost(self) -> float:
        """Multiplications of gate and chosen blocks together."""
        return self.gate + self.products

    @property
    def pays(self) -> bool:
        """Whether gate and chosen blocks cost less than the matrix without gates."""
        return self.cost < 1

    def __str__(self) -> str:
        (n_pre, n_post), (r, c) = self.shape, self.block
        rank = "" if self.rank is None else f"of rank {self.rank} "
        period = "" if self.period == 1 else f", used for {self.period} steps,"
        text = (
            f"the gate {rank}of {r}x{c} blocks of a matrix {n_pre}x{n_post}{period} costs {self.gate:.1%} of the "
            f"matrix, and the chosen blocks ({self.kept} of {self.blocks}) {self.products:.1%}: "
            f"together {self.cost:.1%}"
        )
        if self.padding:
            text += f"; {self.padding:.1%} of the blocks is padding, because {r}x{c} does not divide {n_pre}x{n_post}"
        if self.smallest_block is None:
            return text if self.pays else f"{text}; no square block pays at density {self.density:g}"
        return f"{text}; square blocks pay from {self.smallest_block}x{self.smallest_block} on"


def gate_cost(
    shape: tuple[int, int], *, block: tuple[int, int], density: float, rank: int | None = None, period: int = 1
) -> GateCost:
    """What the gate of a matrix costs, and what it saves, in multiplications of a step in which all inputs are active.

    A matrix has n_post multiplications per input, a gate has one per block. With blocks that divide the matrix the cost
    is `density + n_pre / (r * c)`: for 1536 inputs, blocks of 128 x 128 and density 0.5 it is 0.5 + 0.094. A gate of
    two factors has `rank` multiplications per input, and `rank` per block and step. The one-factor gate and the blocks
    cost less where fewer inputs are active, and so does the first factor; the second factor does not. A choice that
    `period` steps share costs each of them a share of the gate.

    Raises ValueError for a block that does not fit the matrix, a density outside (0, 1], and a rank or period below 1.
    """
    need_shape(shape)
    if rank is not None:
        need_whole("rank", rank, at_least=1)
    check_block(block, shape)
    density, (r, c) = need_density(density), (int(block[0]), int(block[1]))
    period = need_whole("period", period, at_least=1, at_most=LONGEST_PERIOD)
    blocks, kept, gate, products = _shares(shape, (r, c), density, rank, period)
    smallest = _smallest_block(shape, density, rank, period)
    return GateCost(
        *(shape, (r, c), density, rank, period, blocks, kept, gate, products),
        padding=_padding(shape, (r, c)),
        smallest_block=smallest,
    )


def _padding(shape: tuple[int, int], block: tuple[int, int]) -> float:
    """The share of the entries of all blocks that lie beyond the matrix."""
    size = max(1, math.prod(shape))
    return 1 - size / max(size, math.prod(block_grid(shape, block)) * math.prod(block))


def _shares(
    shape: tuple[int, int], block: tuple[int, int], density: float, rank: int | None, period: int
) -> tuple[int, int, float, float]:
    """Blocks, chosen blocks, and the shares of the gate and of the chosen blocks in the multiplications."""
    size, blocks = max(1, shape[0] * shape[1]), math.prod(block_grid(shape, block))
    kept = kept_blocks(density, blocks)
    gate = shape[0] * blocks if rank is None else rank * (shape[0] + blocks)
    return blocks, kept, gate / (period * size), kept * block[0] * block[1] / size


def _smallest_block(shape: tuple[int, int], density: float, rank: int | None, period: int) -> int | None:
    if density == 1:
        return None
    # Padding and rounding up only add to density + n_pre / (period * side^2), with the rank for n_pre of two factors.
    first = max(1, math.isqrt(int((shape[0] if rank is None else rank) / (period * (1 - density)))))
    for side in range(first, min(shape) + 1):
        if sum(_shares(shape, (side, side), density, rank, period)[2:]) < 1:
            return side
    return None
