"""Pruning to a budget of measured operations.

A weight costs one multiplication per event of its presynaptic unit, so the cost of a weight is the activity of that
unit. Weights are pruned in the order of a criterion until the operations are within the budget. Pruning changes the
activity, therefore it is measured again and the plan is corrected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eventrnn import counting
from eventrnn._checks import need_choice, need_flag, need_number
from eventrnn.network import Network
from eventrnn.pruning.magnitude import block_scores, from_blocks, to_blocks
from eventrnn.pruning.patterns import Blocks, prunable_matrices, with_masks
from eventrnn.simulation import simulate
from eventrnn.weights import Weights, check_block

#: Criteria: weights with the smallest value are pruned first. w is the weight, a the events per step of its presynaptic
#: unit, y the values of these events.
CRITERIA = {
    "magnitude": "|w|",
    "activity": "|w| / a: busy units lose synapses first",
    "root": "|w| / sqrt(a)",
    "contribution": "|w| rms(y), events and silence alike: what the drives would miss (Sun et al. 2023)",
    "return": "w^2 mean(y^2) / a: what the drives would miss for each operation saved",
}

#: Scopes of a budget, see `prune_to_operations`.
BUDGET_SCOPES = ("matrix", "global")

# The search ends when the measured operations are at most this share of the budget below it.
CLOSE = 0.02

MEASUREMENTS = 10


@dataclass(frozen=True)
class Budgeted:
    """The result of `prune_to_operations`. Operations are effective multiplications per step and sample.

    Attributes
    ----------
    network      : the pruned network
    before       : operations before pruning
    budget       : operations allowed by the budget
    planned      : operations of the final masks with the activity before pruning
    measured     : operations of the pruned network
    measurements : number of runs of a pruned network
    """

    network: Network
    before: float
    budget: float
    planned: float
    measured: float
    measurements: int


@dataclass(frozen=True)
class _Usage:
    """Use of one matrix, per presynaptic unit.

    Attributes
    ----------
    activity : (n_pre,) events per step
    power    : (n_pre,) mean square of the values of these events
    """

    activity: np.ndarray
    power: np.ndarray


def prune_to_operations(
    network: Network,
    inputs: np.ndarray | object,
    budget: float,
    *,
    criterion: str = "return",
    scope: str = "global",
    block: tuple[int, int] = (1, 1),
    names: tuple[str, ...] | None = None,
    exempt: tuple[str, ...] = (),
    allow_empty: bool = False,
    report: Callable[[int, float], None] = lambda measurement, operations: None,
) -> Budgeted:
    """Prune blocks until a run does at most the share `budget` of its effective operations.

    Parameters
    ----------
    inputs        : inputs for `simulate`, on which activity and operations are measured
    budget        : share of the operations of all matrices, in (0, 1]; matrices that are not pruned are included
    criterion     : one of `CRITERIA`
    scope         : "global" compares weights of different matrices, after division by the root mean square of their
                    matrix, and may leave hardly anything of a matrix that is expensive, such as one whose inputs are
                    dense; "matrix" leaves every matrix the same share of its operations
    block         : (r, c), presynaptic x postsynaptic; the cost of a block is the sum over its weights
    names, exempt : see `Pruning`
    allow_empty   : allow that a matrix loses all blocks; otherwise every matrix keeps its best block
    report        : called after each measurement with its number and the operations per step

    Units with fewer inputs send fewer events, so operations fall by more than the plan says. The plan is corrected
    until the measured operations are within 2 % below the budget, or after ten measurements. Raises ValueError for a
    budget that cannot be met, with the smallest one that can. Cost: one run per measurement.
    """
    check_budget(budget, criterion)
    need_choice("scope", scope, BUDGET_SCOPES)
    need_flag("allow_empty", allow_empty)
    matrices = prunable_matrices(network, names, exempt)
    for name, weights in matrices.items():
        check_block(block, weights.shape, name)
    usage, before = _measure(network, inputs)
    if before == 0:
        raise ValueError("budget: the network does no operations on these inputs; nothing can be saved")
    ranking = _Ranking.of({n: matrices[n].to_dense() for n in matrices}, usage, criterion, scope, block, allow_empty)
    others = before - ranking.total
    least = (others + ranking.least) / before
    if budget < least:
        raise ValueError(
            f"budget: got {budget:g}, but at least {least:.4g} of the operations remain: those of matrices that are "
            "not pruned, and the best block of each that is"
        )
    low, high, best = (ranking.least + others) / before, 1.0, None
    plan, measurements = budget, 0
    while measurements < MEASUREMENTS:
        pruned = with_masks(network, ranking.masks(plan * before - others, matrices), Blocks(0.0, block))
        _, measured = _measure(pruned, inputs)
        measurements += 1
        report(measurements, measured)
        if measured <= budget * before:
            if best is None or measured > best.measured:
                best = Budgeted(pruned, before, budget * before, plan * before, measured, measurements)
            low = plan
        else:
            high = plan
        if best is not None and best.measured >= (1 - CLOSE) * budget * before:
            break
        # First a proportional correction that aims at the middle of the accepted range; bisection if it leaves the
        # bracket.
        plan *= (1 - CLOSE / 2) * budget * before / max(measured, ranking.least + others, 1e-9 * before)
        if not low < plan < high:
            plan = (low + high) / 2
    if best is None:
        raise ValueError(
            f"budget: got {budget:g}, but pruning to it raises the activity: the least measured is "
            f"{measured / before:.4g} of the operations; ask for more"
        )
    return Budgeted(best.network, before, budget * before, best.planned, best.measured, measurements)


def check_budget(budget: float, criterion: str) -> None:
    """Raise ValueError for a budget outside (0, 1] and for an unknown criterion."""
    need_number("budget", budget, above=0, at_most=1, what="share of the operations")
    need_choice("criterion", criterion, CRITERIA)


@dataclass(frozen=True)
class _Ranking:
    """The blocks of all matrices in the order in which they are pruned.

    Attributes
    ----------
    names     : names of the matrices
    block     : (r, c)
    sizes     : number of blocks per matrix
    order     : indices of all blocks, in the order in which they are pruned
    cost      : operations per step of every block
    total     : operations per step of all blocks
    least     : operations per step of the blocks that are never pruned
    removable : number of blocks that can be pruned
    """

    names: tuple[str, ...]
    block: tuple[int, int]
    sizes: tuple[int, ...]
    order: np.ndarray
    cost: np.ndarray
    total: float
    least: float
    removable: int

    @classmethod
    def of(
        cls,
        dense: dict[str, np.ndarray],
        usage: dict[str, _Usage],
        criterion: str,
        scope: str,
        block: tuple[int, int],
        allow_empty: bool,
    ) -> _Ranking:
        values, cost, firsts = [], [], []
        for name, weights in dense.items():
            scores, costs = _values_and_costs(weights, usage[name], criterion, block)
            if scope == "matrix":
                scores = _share_before(scores, costs)
            if not allow_empty:
                best = int(np.argmax(np.where(costs > 0, scores, -np.inf)))
                scores[best] = np.inf
                firsts.append(costs[best])
            values.append(scores)
            cost.append(costs)
        # A block without cost saves nothing and is not pruned.
        prices = np.concatenate(cost)
        flat = np.where(prices > 0, np.concatenate(values), np.inf)
        return cls(
            names=tuple(dense),
            block=block,
            sizes=tuple(len(w) for w in values),
            order=np.argsort(flat, kind="stable"),
            cost=prices,
            total=float(prices.sum()),
            least=float(sum(firsts)),
            removable=int(np.isfinite(flat).sum()),
        )

    def masks(self, budget: float, matrices: dict[str, Weights]) -> dict[str, np.ndarray]:
        """Masks that keep the last blocks of the order whose cost, in operations per step, is within the budget."""
        left = self.total - np.cumsum(self.cost[self.order])
        gone = int(np.searchsorted(-left, -max(budget, self.least), side="left")) + 1 if self.total > budget else 0
        kept = np.ones(len(self.order), bool)
        kept[self.order[: min(gone, self.removable)]] = False
        found = {}
        for name, part in zip(self.names, np.split(kept, np.cumsum(self.sizes)[:-1]), strict=True):
            shape = matrices[name].shape
            grid = [-(-size // b) for size, b in zip(shape, self.block, strict=True)]
            found[name] = from_blocks(part.reshape(grid), self.block, shape)
        return found


def _share_before(scores: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """For every block of a matrix, the share of its operations in the blocks of no higher score. In the order of these
    shares, all matrices are pruned to the same share at the same time."""
    order = np.argsort(scores, kind="stable")
    shares = np.empty(len(scores))
    shares[order] = np.cumsum(costs[order]) / max(float(costs.sum()), 1e-300)
    return shares


def _values_and_costs(
    weights: np.ndarray, usage: _Usage, criterion: str, block: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Value by the criterion and cost in operations per step of every block, both flat."""
    activity, power = usage.activity[:, None], usage.power[:, None]
    size = np.abs(weights, dtype=np.float64)
    fired = np.where(activity > 0, activity, 1)
    value = {
        "magnitude": lambda: size,
        "activity": lambda: size / fired,
        "root": lambda: size / np.sqrt(fired),
        "contribution": lambda: size * np.sqrt(activity * power),
        # The square root of the criterion: same order, and in units of a weight as the other criteria.
        "return": lambda: size * np.sqrt(power),
    }[criterion]()
    # The scale is that of the weights. The scale of the values would depend on a few units that are hardly active.
    scale = float(np.sqrt(np.mean(np.square(size)))) or 1.0
    cost = to_blocks(np.where(weights != 0, activity, 0), block).sum(axis=(1, 3))
    return block_scores(value, block, "l2").ravel() / scale, cost.ravel()


def _measure(network: Network, inputs: np.ndarray | object) -> tuple[dict[str, _Usage], float]:
    """Use of every matrix, and the effective operations per step and sample of the network."""
    simulation = simulate(network, inputs, record="events")  # type: ignore[arg-type]
    rows = simulation.sample_steps
    usage = {}
    for name, (weights, events) in counting.events_by_matrix(network, simulation).items():
        fired = np.bincount(events.indices, minlength=weights.shape[0])
        squares = np.bincount(events.indices, np.square(events.values, dtype=np.float64), minlength=weights.shape[0])
        usage[name] = _Usage(fired / rows, squares / np.maximum(fired, 1))
    return usage, counting.count(network, simulation).total.effective / rows
