"""Gated blocks in training: the product of a window, its exact gradient, and its counts.

Of one row (step and sample), with inputs x, blocks b = (R, C) of the grid, gates g and weights W, the drive of the
block column C is

    y[C] = sum over R of (g[R, C] * x[R]) @ W[R, C]

so that all rows are multiplied by a block column at once through BLAS, after their inputs were scaled by the gates of
that column. Back from the gradient d_y of the drives:

    d_s[C]    = d_y[C] @ W[:, C].T             gradient with respect to the scaled inputs of the column C
    d_W[:, C] = (g[R, C] * x[R]).T @ d_y[C]    summed over the rows
    d_g[R, C] = d_s[C][R] . x[R]
    d_l[b]    = slope[b] * (d_g[b] - sum over a of d_g[a] * g[a] / blocks)
    d_x[R]    = sum over C of g[R, C] * d_s[C][R], plus the gradient through the logits l

The slope of a chosen block is the derivative of its gate by its own logit as long as the sum s of the ratios is held
fixed (`weights/gated.py` defines ratios and gates): blocks / (sum of the chosen logits) for the rule "linear", and the
gate itself for the rule "softmax". The sum over a is the derivative of the normalisation. This is the exact gradient
where the choice is constant. Blocks that were not chosen have the slope 0; straight-through (Bengio, Leonard and
Courville 2013, arXiv 1308.3432) lets the gradient pass the choice as if it were the identity: their slope is then that
of a chosen block with their logit. Where all chosen logits are 0, the rule "linear" has no derivative, and the slope
is 0.

Where some steps share a choice (`GatedBlocks.gate_period`), d_g of a choice is the sum over all rows of the window that
have its gates, and only rows that choose have logits. Gates that the state before the window held are constants.

All blocks are multiplied in training; only their gates are 0. `counting` counts what the trained network executes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from eventrnn._checks import need_flag, need_kind, need_number
from eventrnn.counting.backward import BackwardWork
from eventrnn.cpu.tables import TOO_LARGE
from eventrnn.cpu.threads import Team
from eventrnn.state import HeldGates, gates_not_finite
from eventrnn.training.bptt.kernels import gated_blocks
from eventrnn.training.bptt.workspace import Arena
from eventrnn.weights.gated import GatedBlocks, block_grid, chosen_at, kept_blocks

F32 = np.float32

# Scaled inputs of all block columns that are in memory at once, 4 MB.
TOGETHER = 1 << 20

#: what stands behind the name of a matrix in the names of the parameters of its gate
GATE_PARAMETERS = (".gate", ".gate_bias", ".gate_out")


@dataclass(frozen=True)
class Gating:
    """How the gates of a window choose.

    Attributes
    ----------
    straight_through : whether blocks that were not chosen get a gradient, see the head of this file
    densities        : share of the blocks that an input chooses, by matrix, in place of the matrix' own

    Raises ValueError for a density outside (0, 1], and TypeError for another type.
    """

    straight_through: bool = False
    densities: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        need_flag("gating straight_through", self.straight_through)
        need_kind("gating densities", self.densities, Mapping, "a mapping of names of matrices to shares")
        for name, density in self.densities.items():
            need_number(f"gating densities of {name}", density, above=0, at_most=1, what="share of kept blocks")


@dataclass(frozen=True, eq=False)
class GatedMatrix:
    """A matrix of gated blocks as one window uses it; J inputs, P outputs, K blocks. Arrays are C-ordered float32.

    Attributes
    ----------
    name             : of the matrix, for messages
    weights          : (J, P), the matrix without gates, zero where it is pruned
    gate, gate_bias  : (J, K) or, with two factors, (J, rank); (K,)
    gate_out         : (rank, K), or None
    block            : (r, c)
    kept             : number of blocks that an input chooses
    rule             : one of `weights.GATE_RULES`
    straight_through : see the head of this file
    period           : number of steps that share a choice
    held             : the gates of the state before the window, where this number is above 1; else None
    """

    name: str
    weights: np.ndarray
    gate: np.ndarray
    gate_bias: np.ndarray
    gate_out: np.ndarray | None
    block: tuple[int, int]
    kept: int
    rule: str
    straight_through: bool
    period: int = 1
    held: HeldGates | None = None

    @classmethod
    def of(
        cls,
        name: str,
        template: GatedBlocks,
        parameters: Mapping[str, np.ndarray],
        gating: Gating,
        held: HeldGates | None = None,
    ) -> GatedMatrix:
        """The matrix of that name, of parameters of a model and gates of a state. The rest is the template's."""
        weights, gate, bias = (parameters[name + end] for end in ("", ".gate", ".gate_bias"))
        kept = kept_blocks(gating.densities.get(name, template.density), template.n_blocks)
        out = parameters.get(f"{name}.gate_out")
        rule = template.gate_rule, gating.straight_through, template.gate_period, held
        return cls(name, weights, gate, bias, out, template.block, kept, *rule)

    def scaled_by(self, scale: np.ndarray) -> GatedMatrix:
        """The matrix with its weights multiplied by a scale (J, P), as DropConnect does; the gate is the same."""
        return replace(self, weights=np.multiply(self.weights, scale, dtype=F32))


def rows_of(x: np.ndarray) -> np.ndarray:
    """Numbers (T, B, J) as rows (T * B, J), C-ordered."""
    return np.ascontiguousarray(x).reshape(x.shape[0] * x.shape[1], x.shape[2])


def values_of(matrix: np.ndarray | GatedMatrix) -> np.ndarray:
    """The weights (J, P) of a matrix with or without gates."""
    return matrix.weights if isinstance(matrix, GatedMatrix) else matrix


def gate_parameters(name: str, weights: GatedBlocks) -> dict[str, np.ndarray]:
    """Copies of the arrays of a gate, by the names of their parameters."""
    found = {f"{name}.gate": weights.gate.copy(), f"{name}.gate_bias": weights.gate_bias.copy()}
    return found if weights.gate_out is None else found | {f"{name}.gate_out": weights.gate_out.copy()}


class GatedProduct:
    """The product of a matrix of gated blocks with the rows of a window, forward and backward.

    `drives` is called for all rows, together or a step at a time, each with the number of its first row;
    `input_gradient` in the same way, and `gradients` after both. The kernels run on the threads of the team.

    Parameters
    ----------
    matrix : the matrix
    rows   : steps times samples of the window
    team   : the threads
    arena  : memory for arrays, shared by the products of a model; a new one by default

    Attributes
    ----------
    logits, gates, slopes : (rows, K) float32 of the rows that `drives` has seen; slopes as the head of this file says.
                            Rows that do not choose have the gates and the slopes of the row that did, and logits of 0
    chosen                : (rows, K) int32, 1 where the row chose the block
    sources               : (rows,) int64, the row that chose for each row (`weights.gated.chosen_at`); None where every
                            row chooses
    d_logits              : (rows, K) gradient of the logits, of the rows that `input_gradient` has seen
    d_further             : (rows, K) gradient of the logits from elsewhere, such as a penalty, which `input_gradient`
                            adds; None for none
    """

    def __init__(self, matrix: GatedMatrix, rows: int, team: Team, arena: Arena | None = None):
        self.matrix, self.rows, self.team = matrix, rows, team
        self.take = take = (Arena() if arena is None else arena).take
        self.grid = block_grid(matrix.weights.shape, matrix.block)
        size = rows, len(matrix.gate_bias)
        self.logits, self.gates, self.slopes, self.d_logits = (take(*size) for _ in range(4))
        self.chosen = take(*size, dtype=np.int32)
        self.inner = take(rows, 0 if matrix.gate_out is None else len(matrix.gate_out))
        self.d_further: np.ndarray | None = None
        self.sources: np.ndarray | None = None
        if matrix.held is not None:
            batch = len(matrix.held.left)
            self.sources = chosen_at(matrix.period, matrix.held.left, rows // max(1, batch))
            # Gradients of gates, per sample, that wait for the row that chose them.
            self.waiting = np.zeros((batch, size[1]), F32)

    def drives(self, x: np.ndarray, first: int, out: np.ndarray | None = None) -> np.ndarray:
        """The drives (n, P) of inputs x (n, J), C-ordered, without a bias; they are the rows from `first` on.

        Raises FloatingPointError, as the engine does, where the gates of a row are not finite.
        """
        matrix, team, n = self.matrix, self.team, len(x)
        gates = self._choose(x, first)
        drives = self.take(n, matrix.weights.shape[1]) if out is None else out
        if self._together(n):
            scaled = self._scaled(x, gates, 0, self.grid[1])
            products = np.matmul(scaled, self.stacked, out=self.take(self.grid[1], n, matrix.block[1]))
            by_row = products.transpose(1, 0, 2).reshape(n, self.grid[1] * matrix.block[1])
            drives[:] = by_row[:, : drives.shape[1]]
            return drives
        for column, outputs in self._columns():
            team.multiply(self._scaled(x, gates, column, column + 1)[0], matrix.weights[:, outputs], drives[:, outputs])
        return drives

    def _choose(self, x: np.ndarray, first: int) -> np.ndarray:
        """Choose for inputs x (n, J), the rows from `first` on; returns their gates (n, K)."""
        some = slice(first, first + len(x))
        logits, gates, slopes, chosen, inner = (
            array[some] for array in (self.logits, self.gates, self.slopes, self.chosen, self.inner)
        )
        if self.sources is None:
            self._choose_all(x, logits, gates, slopes, chosen, inner)
            return gates
        assert self.matrix.held is not None
        own, rows = self.sources[some], np.arange(first, first + len(x))
        fresh, before = np.flatnonzero(own == rows), np.flatnonzero(own < 0)
        arrays = logits, gates, slopes, chosen, inner
        parts = [self.take(len(fresh), array.shape[1], dtype=array.dtype) for array in arrays]
        self._choose_all(np.ascontiguousarray(x[fresh]), *parts)
        for array, part in zip(arrays, parts, strict=True):
            array[:] = 0
            array[fresh] = part
        # The rows that chose stand before those that have their gates.
        later = np.flatnonzero((own >= 0) & (own != rows))
        for array in (self.gates, self.slopes, self.chosen):
            array[rows[later]] = array[own[later]]
        gates[before] = self.matrix.held.gates[own[before]]
        chosen[before] = gates[before] != 0
        with np.errstate(over="ignore"):
            largest = np.abs(gates).max(axis=1, initial=0) * np.abs(x).max(axis=1, initial=0)
        if not np.isfinite(largest).all():
            raise gates_not_finite(self.matrix.name, TOO_LARGE)
        return gates

    def _choose_all(
        self,
        x: np.ndarray,
        logits: np.ndarray,
        gates: np.ndarray,
        slopes: np.ndarray,
        chosen: np.ndarray,
        inner: np.ndarray,
    ) -> None:
        """Choose for inputs x (n, J), which all choose; the other arrays (n, K), and `inner` (n, rank), are written."""
        matrix, team = self.matrix, self.team
        if not len(x):
            return
        if matrix.gate_out is None:
            team.multiply(x, matrix.gate, logits)
        else:
            team.multiply(team.multiply(x, matrix.gate, inner), matrix.gate_out, logits)
        logits += matrix.gate_bias
        faults = np.zeros(team.threads, np.int64)
        team.run(
            gated_blocks.gates_of_logits,
            *(len(x), x.reshape(-1), x.shape[1], logits.reshape(-1), logits.shape[1], matrix.kept),
            *(matrix.rule == "softmax", matrix.straight_through, chosen.reshape(-1)),
            *(gates.reshape(-1), slopes.reshape(-1), faults),
        )
        if faults.any():
            raise gates_not_finite(matrix.name, int(faults[faults > 0].min()))

    @property
    def choosing(self) -> np.ndarray | slice:
        """The rows of the window that choose, as an index."""
        return slice(None) if self.sources is None else np.flatnonzero(self.sources == np.arange(self.rows))

    def held(self) -> HeldGates | None:
        """What the state after the window holds; None where every row chooses."""
        before = self.matrix.held
        if before is None or self.sources is None:
            return None
        batch = len(before.left)
        steps = self.rows // max(1, batch)
        gates = self.gates[-batch:].copy() if self.rows else before.gates.copy()
        return HeldGates(gates, (before.left - steps) % self.matrix.period)

    def _sum_over_shares(self, d_gates: np.ndarray, first: int) -> None:
        """Sum the gradients of gates (n, K), of the rows from `first` on, over the rows that have the same gates.

        The row that chose gets the sum, and the others 0. Calls go from the last step of the window to the first.
        """
        if self.sources is None:
            return
        if first + len(d_gates) == self.rows:
            self.waiting[:] = 0
        batch = len(self.waiting)
        for at in reversed(range(0, len(d_gates), max(1, batch))):
            step, rows = d_gates[at : at + batch], np.arange(first + at, first + at + batch)
            self.waiting += step
            fresh = self.sources[rows] == rows
            step[:] = np.where(fresh[:, None], self.waiting, F32(0))
            self.waiting[fresh] = 0

    def input_gradient(self, x: np.ndarray, d_drives: np.ndarray, first: int) -> np.ndarray:
        """Gradient of the inputs x (n, J) from that of the drives (n, P); the rows are those from `first` on.

        The gradient of the logits is added, and kept for `gradients`.
        """
        matrix, team, n = self.matrix, self.team, len(x)
        some = slice(first, first + n)
        gates, slopes, d_logits = self.gates[some], self.slopes[some], self.d_logits[some]
        d_x = self.take(*x.shape)
        d_x[:] = 0

        def scale_back(first: int, last: int, d_scaled: np.ndarray) -> None:
            team.run(
                gated_blocks.scale_back,
                *(n, x.reshape(-1), x.shape[1], gates.reshape(-1), slopes.reshape(-1), gates.shape[1], self.grid[1]),
                *(first, last, matrix.block[0], d_scaled.reshape(-1), d_x.reshape(-1), d_logits.reshape(-1)),
            )

        if self._together(n):
            padded = np.zeros((n, self.grid[1] * matrix.block[1]), F32)
            padded[:, : d_drives.shape[1]] = d_drives
            by_column = padded.reshape(n, self.grid[1], matrix.block[1]).transpose(1, 0, 2)
            d_scaled = self.take(self.grid[1], *x.shape)
            scale_back(0, self.grid[1], np.matmul(by_column, self.stacked.transpose(0, 2, 1), out=d_scaled))
        else:
            d_scaled = self.take(*x.shape)
            for column, outputs in self._columns():
                team.multiply(d_drives[:, outputs], matrix.weights[:, outputs].T, d_scaled)
                scale_back(column, column + 1, d_scaled)
        # Until here these are the gradients of the gates.
        self._sum_over_shares(d_logits, first)
        d_logits -= np.einsum("rk,rk->r", d_logits, gates)[:, None] / F32(max(1, gates.shape[1]))
        d_logits *= slopes
        if self.d_further is not None:
            d_logits += self.d_further[some]
        if self.sources is None:
            d_x += team.multiply(self._d_inner(d_logits), matrix.gate.T)
        else:
            fresh = np.flatnonzero(self.sources[some] == np.arange(first, first + n))
            if len(fresh):
                d_x[fresh] += team.multiply(self._d_inner(d_logits[fresh]), matrix.gate.T)
        return d_x

    def gradients(self, x: np.ndarray, d_drives: np.ndarray) -> dict[str, np.ndarray]:
        """Gradients of the weights and of the gate from all inputs (rows, J) and gradients of the drives (rows, P).

        By the end of the name of each parameter: "" for the weights, and `GATE_PARAMETERS`.
        """
        matrix, team = self.matrix, self.team
        d_weights = self.take(*matrix.weights.shape)
        for column, outputs in self._columns():
            scaled = self._scaled(x, self.gates, column, column + 1)[0]
            team.multiply(scaled.T, d_drives[:, outputs], d_weights[:, outputs])
        chose, d_logits = x[self.choosing], self.d_logits[self.choosing]
        found = {
            "": d_weights,
            ".gate": team.multiply(chose.T, self._d_inner(d_logits)),
            ".gate_bias": d_logits.sum(axis=0),
        }
        if matrix.gate_out is not None:
            found[".gate_out"] = team.multiply(self.inner[self.choosing].T, d_logits)
        return found

    def work(self, x: np.ndarray, mask: np.ndarray | None, pairs: np.ndarray, input_gradient_rows: int) -> BackwardWork:
        """The operations of the backward pass.

        x     : (rows, J) inputs
        mask  : (J, P) kept weights; None for all
        pairs : (rows, J) boolean, the inputs whose gradient is needed
        input_gradient_rows : see `BackwardWork`
        """
        (inputs, outputs), (r, c) = self.matrix.weights.shape, self.matrix.block
        firsts = np.arange(0, outputs, c)
        if mask is None:
            kept = np.broadcast_to(np.diff(firsts, append=outputs), (inputs, self.grid[1]))
        else:
            kept = np.add.reduceat(mask, firsts, axis=1, dtype=np.int64)
        fired = x != 0
        work = BackwardWork.none(kept.sum(axis=1), outputs, self.rows)
        work.fired, work.active_pairs = np.count_nonzero(fired, axis=0), np.count_nonzero(pairs, axis=0)
        work.event_products, work.pair_products = (self._products(some, kept, r) for some in (fired, pairs))
        work.gradient_rows, work.gradient_stored = (np.full(inputs, size, np.int64) for size in (self.rows, outputs))
        work.dots, work.dots_stored = (np.full(inputs, size, np.int64) for size in (self.rows, outputs))
        work.input_gradient_rows = input_gradient_rows
        blocks, out = self.gates.shape[1], self.matrix.gate_out
        logits = inputs * blocks if out is None else inputs * len(out) + out.size
        # Inputs scaled again, and the gradients of inputs and gates from those of the scaled inputs; two products for
        # the gradients of the gate's weights and of its inputs; and two per block back through the normalisation.
        choices = self.rows if self.sources is None else len(self.d_logits[self.choosing])
        work.selection = self.rows * 3 * inputs * self.grid[1] + choices * (2 * logits + 2 * blocks)
        return work

    def _products(self, some: np.ndarray, kept: np.ndarray, units: int) -> int:
        """Kept weights in blocks with a gate, summed over the entries of a boolean array (rows, J)."""
        total, used = 0, (self.gates != 0).reshape(self.rows, *self.grid)
        for row in range(self.grid[0]):
            part = slice(row * units, (row + 1) * units)
            # Whole numbers below 2^53: exact.
            total += int(((some[:, part].astype(np.float64).T @ used[:, row].astype(np.float64)) * kept[part]).sum())
        return total

    def _columns(self) -> list[tuple[int, slice]]:
        """The block columns: the number of each, and its outputs."""
        c, outputs = self.matrix.block[1], self.matrix.weights.shape[1]
        return [(k, slice(k * c, min((k + 1) * c, outputs))) for k in range(self.grid[1])]

    def _together(self, n: int) -> bool:
        """Whether so many rows are multiplied by all block columns in one call, which saves a call per column. The
        threads share one column after the other."""
        return self.team.threads == 1 and n * self.grid[1] * self.matrix.weights.shape[0] <= TOGETHER

    @cached_property
    def stacked(self) -> np.ndarray:
        """The weights by block column (columns, J, c), with zeros beyond the last output."""
        (inputs, outputs), c = self.matrix.weights.shape, self.matrix.block[1]
        padded = np.zeros((inputs, self.grid[1] * c), F32)
        padded[:, :outputs] = self.matrix.weights
        return np.ascontiguousarray(padded.reshape(inputs, self.grid[1], c).transpose(1, 0, 2))

    def _scaled(self, x: np.ndarray, gates: np.ndarray, first: int, last: int) -> np.ndarray:
        """The inputs scaled by the gates of the block columns from `first` to `last` (columns, n, J)."""
        scaled = self.take(last - first, *x.shape)
        size = len(x), x.reshape(-1), x.shape[1], gates.reshape(-1), gates.shape[1], self.grid[1]
        self.team.run(gated_blocks.scale_inputs, *size, first, last, self.matrix.block[0], scaled.reshape(-1))
        return scaled

    def _d_inner(self, d_logits: np.ndarray) -> np.ndarray:
        """Gradient of what the first factor of the gate gives: of the logits, if there is no second one."""
        out = self.matrix.gate_out
        return d_logits if out is None else self.team.multiply(d_logits, out.T)
