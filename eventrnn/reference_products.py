"""The products of the specification: drives from weights and values, forward and back, in plain loops.

`reference.py` calls them; its head says which symbols the shapes have, and what they are for. Of gated blocks
(`weights/gated.py`), J inputs, P outputs and K blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from eventrnn import cells
from eventrnn.state import HeldGates, gates_not_finite
from eventrnn.weights import BlockCSR, GatedBlocks, Weights
from eventrnn.weights.gated import rows_of_part

# Causes of gates that are not finite, in the order of `state.GATE_FAULTS`.
BAD_LOGIT, CANCELLED, TOO_LARGE = 1, 2, 3


def propagate(weights, values, bias):
    """The drive of all gate rows: `bias + sum over j of weights[j] * values[:, j]`, in ascending j, one FMA per term.

    weights : (J, P), by presynaptic unit; or blocks of which every input chooses some
    values  : (B, J), what the presynaptic units sent
    bias    : (P,)

    Returns (B, P).
    """
    if isinstance(weights, ChosenBlocks):
        return propagate_chosen(weights, values, bias)
    if isinstance(weights, CodedWeights):
        return propagate_integers(weights, values, bias)
    drive = np.repeat(bias[None, :], len(values), axis=0)
    for j in range(len(weights)):
        drive = cells.fma(weights[j][None, :], values[:, j, None], drive)
    return drive


# --- int8 weights times rounded values, in integers ----------------------------------------------------------


@dataclass(frozen=True)
class CodedWeights:
    """A matrix of int8 whose products need not be exact.

    Attributes
    ----------
    codes  : (J, P) int8
    scales : (J,) float32; a weight is code * scale
    bits   : of the rounded values, see `BlockCSR.integer_bits`
    """

    codes: np.ndarray
    scales: np.ndarray
    bits: int

    def __getitem__(self, columns) -> CodedWeights:
        return CodedWeights(self.codes[columns], self.scales, self.bits)


def propagate_integers(weights: CodedWeights, values, bias):
    """`propagate` with values that are rounded to integers: the only roundings are these, and two per drive.

    The scales join the values: a row of values (J,) is x[j] = value[j] * scale[j], a float32 multiplication. With the
    step of `rounding_step`, q[j] is x[j] / step rounded to the nearest integer, a tie to the even one. A drive is
    fma(float32(sum over j of code[j] * q[j]), step, bias): the sum is exact, in any order.

    A drive is within step / 2 * sum over the values of |code[j]| of the one that `propagate` defines, up to roundings
    of float32. The step is at most 2^-13 times the largest |x|, where no output has more than 1023 weights, or 2^-126.
    Where an x overflows, all drives of its row are NaN.
    """
    drives = np.empty((len(values), len(bias)), np.float32)
    with np.errstate(over="ignore", under="ignore"):
        scaled = values.astype(np.float32) * weights.scales
    for drive, row in zip(drives, scaled, strict=True):
        step = rounding_step(row, weights.bits)
        if np.isnan(step):
            drive[:] = np.nan
        else:
            # A quotient of a power of two is exact, or too small to count.
            whole = np.rint(row / step).astype(np.int64)
            drive[:] = cells.fma((whole @ weights.codes.astype(np.int64)).astype(np.float32), step, bias)
    return drives


def rounding_step(row: np.ndarray, bits: int) -> np.float32:
    """The step to which a row (J,) is rounded, a power of two; NaN where the row has an infinity.

    It is the smallest one, but at least 2^-126, that is certain to leave every value at or below 2^bits steps.
    """
    largest = np.abs(row).max(initial=np.float32(0))
    if not np.isfinite(largest):
        return np.float32(np.nan)
    # A number of this exponent is below 2^exponent; those of zero and of subnormal numbers are raised.
    _, exponent = np.frexp(np.maximum(largest, np.float32(2.0**-126)))
    return np.float32(2.0 ** max(int(exponent) - bits, -126))


# --- blocks of which every input chooses some ----------------------------------------------------------------


@dataclass(frozen=True)
class ChosenBlocks:
    """The arrays of `GatedBlocks` in one precision; `weights/gated.py` defines the product.

    Attributes
    ----------
    name      : of the matrix, for messages
    weights   : (J, P), the matrix without gates
    gate      : (J, K), for K blocks; of two factors (J, rank)
    gate_bias : (K,)
    gate_out  : (rank, K), the second factor; None for one
    block     : (r, c)
    kept      : the number of blocks that an input chooses
    rule      : one of `GATE_RULES`
    period    : the number of steps that share a choice
    """

    name: str
    weights: np.ndarray
    gate: np.ndarray
    gate_bias: np.ndarray
    gate_out: np.ndarray | None
    block: tuple[int, int]
    kept: int
    rule: str
    period: int = 1


def block_gates(blocks: ChosenBlocks, values) -> np.ndarray:
    """The gate of every block, 0 for those that are not chosen; values (B, J), returns (B, K).

    Raises FloatingPointError for gates that are not finite, by the name of the matrix.
    """
    if blocks.gate_out is None:
        logits = propagate_parts(blocks, values, blocks.gate_bias)
    else:
        inner = propagate_parts(blocks, values, np.zeros_like(blocks.gate_out[:, 0]))
        logits = propagate(blocks.gate_out, inner, blocks.gate_bias)
    gates = gates_of_logits(blocks, logits)
    _need_finite_products(blocks.name, gates, values)
    return gates


def propagate_parts(blocks: ChosenBlocks, values, start):
    """`propagate` of the only factor of a gate, or of the first one, whose sums have parts."""
    rows, total = rows_of_part(blocks.block[0]), np.repeat(start[None], len(values), axis=0)
    for first in range(0, len(blocks.gate), rows):
        part = slice(first, first + rows)
        if first == 0:
            total = propagate(blocks.gate[part], values[:, part], start)
        else:
            total = total + propagate(blocks.gate[part], values[:, part], np.zeros_like(start))
    return total


def gates_of_logits(blocks: ChosenBlocks, logits):
    """`block_gates` of the logits (B, K) of all blocks."""
    _need_finite(blocks.name, logits, BAD_LOGIT)
    gates = np.zeros_like(logits)
    for row, gate in zip(logits, gates, strict=True):
        # A stable sort leaves equal logits in the order of their blocks.
        chosen = np.sort(np.argsort(-row, kind="stable")[: blocks.kept])
        if not len(chosen):
            continue
        kept = row[chosen]
        if blocks.rule == "softmax":
            ratios = cells.exp(kept - kept.max())
        else:
            pivot = kept[np.argmax(np.abs(kept))]
            ratios = kept / pivot if pivot != 0 else np.ones_like(kept)
        total = row.dtype.type(0)
        for ratio in ratios:
            total = total + ratio
        factor = row.dtype.type(len(row)) / total
        _need_finite(blocks.name, factor, CANCELLED)
        gate[chosen] = ratios * factor
    return gates


@dataclass(frozen=True)
class StepGates(HeldGates):
    """The gates of a step of blocks whose choices some steps share, which are also what the step leaves.

    fresh : (B,) boolean, the samples that chose in this step
    """

    fresh: np.ndarray


def gates_of_step(blocks: ChosenBlocks, values, held: HeldGates) -> StepGates:
    """The gates of a step with inputs (B, J), from what the step before left. A sample without a step left chooses.

    Raises FloatingPointError as `block_gates` does.
    """
    fresh, gates = held.left == 0, held.gates.astype(values.dtype)
    if fresh.any():
        gates[fresh] = block_gates(blocks, values[fresh])
    _need_finite_products(blocks.name, gates, values)
    return StepGates(gates, np.where(fresh, blocks.period, held.left) - 1, fresh)


def propagate_steps(weights, values, bias, held: HeldGates | None = None) -> tuple[np.ndarray, list[StepGates]]:
    """`propagate` of the values (T, B, J) of all steps; and, where some share a choice, the gates of each step.

    held : what the step before the first one left; None for a stream that begins here
    """
    (steps, batch), size = values.shape[:2], len(bias)
    if not shares_gates(weights):
        return propagate(weights, values.reshape(steps * batch, values.shape[2]), bias).reshape(steps, batch, size), []
    drives, gates = np.zeros((steps, batch, size), bias.dtype), []
    for t, x in enumerate(values):
        gates.append(gates_of_step(weights, x, gates[-1] if t else _at_first(weights, batch, held)))
        drives[t] = propagate_chosen(weights, x, bias, gates[t].gates)
    return drives, gates


def shares_gates(weights) -> bool:
    """Whether a matrix has blocks whose choices some steps share."""
    return isinstance(weights, ChosenBlocks) and weights.period > 1


def _at_first(blocks: ChosenBlocks, batch: int, held: HeldGates | None) -> HeldGates:
    return HeldGates.zeros(batch, len(blocks.gate_bias)) if held is None else held


def propagate_chosen(blocks: ChosenBlocks, values, bias, gates=None):
    """`propagate` with blocks that every input chooses: each term is `fma(weight, gate * value, sum)`.

    gates : (B, K), those of a step that does not choose; by default those that the values choose
    """
    gates, (r, c) = block_gates(blocks, values) if gates is None else gates, blocks.block
    n_post = blocks.weights.shape[1]
    columns = np.arange(n_post) // c
    drive = np.repeat(bias[None, :], len(values), axis=0)
    for j in range(len(blocks.weights)):
        # The number of the block of each output. A product of gate and value is rounded once.
        block = j // r * -(-n_post // c) + columns
        drive = cells.fma(blocks.weights[j][None, :], gates[:, block] * values[:, j, None], drive)
    return drive


def arrays_of(weights) -> dict[str, np.ndarray]:
    """The arrays of a matrix by the end of their names: "" for its weights, ".gate" and the like for gated blocks."""
    if not isinstance(weights, ChosenBlocks):
        return {"": weights}
    found = {"": weights.weights, ".gate": weights.gate, ".gate_bias": weights.gate_bias}
    return found if weights.gate_out is None else found | {".gate_out": weights.gate_out}


def propagate_back(weights, values, d_drive, *, straight_through: bool = False) -> tuple[np.ndarray, dict]:
    """Back through `propagate`: the gradient of the values (B, J), and of the arrays of the matrix as `arrays_of` names
    them, from the gradient of the drives (B, P).

    The choice of blocks counts as constant. With `straight_through` the gradient passes it as if it were the identity,
    so that blocks that were not chosen have one too. Chosen logits that are all 0 have a gradient of 0 with the rule
    "linear", whose gates have no derivative there.
    """
    if not isinstance(weights, ChosenBlocks):
        return d_drive @ weights.T, {"": values.T @ d_drive}
    gates = block_gates(weights, values)
    d_values, d_weights, d_gates = _product_back(weights, values, d_drive, gates)
    d_further, gradients = _gates_back(weights, values, gates, d_gates, straight_through)
    return d_values + d_further, {"": d_weights} | gradients


def propagate_back_steps(
    weights, values, d_drives, gates: Sequence[StepGates] = (), *, straight_through: bool = False
) -> tuple[np.ndarray, dict]:
    """Back through `propagate_steps`: gradients of the values (T, B, J), and of the arrays of the matrix.

    gates : what `propagate_steps` returned

    The gates of a choice have the sum of the gradients of all steps that share it. Those that the state before the
    first step held are constants.
    """
    if not shares_gates(weights):
        flat = (each.reshape(-1, each.shape[2]) for each in (values, d_drives))
        d_values, found = propagate_back(weights, *flat, straight_through=straight_through)
        return d_values.reshape(values.shape), found
    d_values, waiting = np.zeros_like(values), SharedGradients(weights, values.shape[1])
    for t in reversed(range(len(values))):
        d_values[t] = waiting.back(values[t], d_drives[t], gates[t], straight_through)
    return d_values, waiting.gradients


class SharedGradients:
    """Gradients of blocks whose choices some steps share, in a pass back over the steps.

    waiting   : (B, K) gradients of gates that wait for the step that chose them
    gradients : those of the arrays of the matrix so far
    """

    def __init__(self, blocks: ChosenBlocks, batch: int):
        self.blocks, kind = blocks, blocks.weights.dtype
        self.waiting = np.zeros((batch, len(blocks.gate_bias)), kind)
        self.gradients = {end: np.zeros_like(array) for end, array in arrays_of(blocks).items()}

    def back(self, values, d_drive, step: StepGates, straight_through: bool):
        """Go back one step: returns the gradient of its values (B, J)."""
        d_values, d_weights, d_gates = _product_back(self.blocks, values, d_drive, step.gates)
        self.waiting += d_gates
        some = step.fresh
        arrays = values[some], step.gates[some], self.waiting[some]
        d_further, found = _gates_back(self.blocks, *arrays, straight_through)
        self.waiting[some] = 0
        d_values[some] += d_further
        for end, gradient in ({"": d_weights} | found).items():
            self.gradients[end] += gradient
        return d_values


def _product_back(blocks: ChosenBlocks, values, d_drive, gates) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of the values (B, J), the weights (J, P) and the gates (B, K) through `propagate_chosen`."""
    (r, c), (n_pre, n_post) = blocks.block, blocks.weights.shape
    columns = np.arange(n_post) // c
    d_values, d_gates, d_weights = np.zeros_like(values), np.zeros_like(gates), np.zeros_like(blocks.weights)
    for j in range(n_pre):
        block = j // r * -(-n_post // c) + columns
        terms = d_drive * blocks.weights[j]
        d_values[:, j] = (gates[:, block] * terms).sum(axis=1)
        d_weights[j] = (gates[:, block] * values[:, j, None] * d_drive).sum(axis=0)
        for i in range(n_post):
            d_gates[:, block[i]] += values[:, j] * terms[:, i]
    return d_values, d_weights, d_gates


def _gates_back(blocks: ChosenBlocks, values, gates, d_gates, straight_through: bool) -> tuple[np.ndarray, dict]:
    """Gradients of the values (B, J) that chose gates (B, K), and of the arrays of the gate, through `block_gates`."""
    inner = values if blocks.gate_out is None else values @ blocks.gate
    logits = inner @ (blocks.gate if blocks.gate_out is None else blocks.gate_out) + blocks.gate_bias
    d_logits, n_blocks = np.zeros_like(logits), gates.shape[1]
    for row in range(len(values)):
        chosen = np.sort(np.argsort(-logits[row], kind="stable")[: blocks.kept])
        # The ratios, up to a common factor, and their derivatives; see `weights/gated.py`.
        ratios = logits[row] if blocks.rule == "linear" else np.exp(logits[row] - logits[row].max())
        slopes = np.ones_like(ratios) if blocks.rule == "linear" else ratios
        total = ratios[chosen].sum()
        if blocks.rule == "linear" and not logits[row][chosen].any():
            continue
        through_mean = (d_gates[row] * gates[row]).sum() / n_blocks
        passing = np.arange(n_blocks) if straight_through else chosen
        d_logits[row, passing] = (slopes * n_blocks / total * (d_gates[row] - through_mean))[passing]
    d_inner = d_logits if blocks.gate_out is None else d_logits @ blocks.gate_out.T
    gradients = {".gate": values.T @ d_inner, ".gate_bias": d_logits.sum(axis=0)}
    if blocks.gate_out is not None:
        gradients[".gate_out"] = inner.T @ d_logits
    return d_inner @ blocks.gate.T, gradients


def _need_finite_products(name: str, gates, values) -> None:
    largest = np.abs(gates).max(axis=1, initial=0) * np.abs(values).max(axis=1, initial=0)
    _need_finite(name, largest, TOO_LARGE)


def _need_finite(name: str, numbers: np.ndarray, fault: int) -> None:
    if not np.isfinite(numbers).all():
        raise gates_not_finite(name, fault)


def weight_arrays(name: str, weights: Weights, dtype: DTypeLike, integers: Collection[str] = ()) -> Any:
    """A matrix as a dense array, the arrays of gated blocks, or `CodedWeights`, for `propagate`.

    integers : names of the matrices that are multiplied in integers
    """
    if name in integers and isinstance(weights, BlockCSR) and weights.scales is not None:
        return CodedWeights(weights.codes(), weights.scales, weights.integer_bits())
    if not isinstance(weights, GatedBlocks):
        return weights.to_dense().astype(dtype)
    dense, gate, bias = (a.astype(dtype) for a in (weights.blocks.to_dense(), weights.gate, weights.gate_bias))
    out = None if weights.gate_out is None else weights.gate_out.astype(dtype)
    rule = weights.gate_rule, weights.gate_period
    return ChosenBlocks(name, dense, gate, bias, out, weights.block, weights.kept_blocks, *rule)
