"""Pruning to a budget of measured operations: a weight costs what its unit fires, not one.

The effective multiplications of a run are, over all weights, how often the presynaptic unit sent an event. Weights are
pruned in the order of what they are worth for what they cost, until no more than the budget is left; then activity is
measured anew, for pruning changes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eventrnn import counting
from eventrnn.network import Network
from eventrnn.pruning.magnitude import block_scores, from_blocks, to_blocks
from eventrnn.pruning.patterns import Blocks, prunable_matrices, with_masks
from eventrnn.simulation import simulate
from eventrnn.weights import Weights

#: what goes first: the least of this. w a weight, a how often its unit fires, y what it sends then
CRITERIA = {
    "magnitude": "|w|",
    "activity": "|w| / a: busy units lose synapses first",
    "root": "|w| / sqrt(a)",
    "contribution": "|w| rms(y), events and silence alike: what the drives would miss (Sun et al. 2023)",
    "return": "w^2 mean(y^2) / a: what the drives would miss for each operation saved",
}

# The measured operations may stay this share of the budget below it.
CLOSE = 0.02

MEASUREMENTS = 10


@dataclass(frozen=True)
class Budgeted:
    """The pruned network and its effective operations a step and sample: before, asked for, planned with the activity
    of before, and measured after; and how often it was measured."""

    network: Network
    before: float
    budget: float
    planned: float
    measured: float
    measurements: int


@dataclass(frozen=True)
class _Usage:
    """Of one matrix: how often each presynaptic unit fires in a step, and the mean square of what it sends then."""

    activity: np.ndarray
    power: np.ndarray


def prune_to_operations(
    network: Network,
    inputs: np.ndarray | object,
    budget: float,
    *,
    criterion: str = "return",
    block: tuple[int, int] = (1, 1),
    names: tuple[str, ...] | None = None,
    exempt: tuple[str, ...] = (),
    allow_empty: bool = False,
    report: Callable[[int, float], None] = lambda measurement, operations: None,
) -> Budgeted:
    """The network with so many of its blocks removed that a run does at most `budget` of its effective operations.

    Parameters
    ----------
    inputs    : what `simulate` takes; activity and operations are measured on them
    budget    : share of the operations of all matrices, those exempt and a tied read-out too, in (0, 1]
    criterion : one of `CRITERIA`, compared over all matrices, w in units of its matrix's root mean square
    block     : (r, c); a block costs what its weights cost
    names     : and `exempt`: which matrices, as `Pruning`
    report    : called after each measurement with its number and the operations a step

    As units fall silent with their inputs, operations fall by more than is pruned: the plan is corrected until the
    measured ones lie within 2 % below the budget, or ten measurements were made. Every matrix keeps its best
    block. Raises ValueError for a budget that cannot be met, with the one that can. Cost: a run a measurement.
    """
    check_budget(budget, criterion)
    matrices = prunable_matrices(network, names, exempt)
    usage, before = _measure(network, inputs)
    if before == 0:
        raise ValueError("budget: the network does no operations on these inputs; nothing can be saved")
    ranking = _Ranking.of({n: matrices[n].to_dense() for n in matrices}, usage, criterion, block, allow_empty)
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
        # In proportion first, to the middle of what is close; where that leaves the bracket, halve it.
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
    """Refuse what is no share of the operations, and an unknown criterion."""
    if not 0 < budget <= 1:
        raise ValueError(f"budget: got {budget}, need a share of the operations in (0, 1]")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: got {criterion!r}, need one of {', '.join(CRITERIA)}")


@dataclass(frozen=True)
class _Ranking:
    """All blocks of all matrices, worst first, and what each costs in operations a step."""

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
        block: tuple[int, int],
        allow_empty: bool,
    ) -> _Ranking:
        worth, cost, firsts = [], [], []
        for name, weights in dense.items():
            scores, price = _judged(weights, usage[name], criterion, block)
            if not allow_empty:
                best = int(np.argmax(np.where(price > 0, scores, -np.inf)))
                scores[best] = np.inf
                firsts.append(price[best])
            worth.append(scores)
            cost.append(price)
        # What saves nothing is left alone.
        prices = np.concatenate(cost)
        flat = np.where(prices > 0, np.concatenate(worth), np.inf)
        return cls(
            names=tuple(dense),
            block=block,
            sizes=tuple(len(w) for w in worth),
            order=np.argsort(flat, kind="stable"),
            cost=prices,
            total=float(prices.sum()),
            least=float(sum(firsts)),
            removable=int(np.isfinite(flat).sum()),
        )

    def masks(self, budget: float, matrices: dict[str, Weights]) -> dict[str, np.ndarray]:
        """The best blocks that cost no more than the budget together, pruned weights excepted."""
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


def _judged(
    weights: np.ndarray, usage: _Usage, criterion: str, block: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Worth and cost of every block, flat."""
    activity, power = usage.activity[:, None], usage.power[:, None]
    size = np.abs(weights, dtype=np.float64)
    fired = np.where(activity > 0, activity, 1)
    value = {
        "magnitude": lambda: size,
        "activity": lambda: size / fired,
        "root": lambda: size / np.sqrt(fired),
        "contribution": lambda: size * np.sqrt(activity * power),
        # A root, so that blocks are ranked in units of a weight, as by the others.
        "return": lambda: size * np.sqrt(power),
    }[criterion]()
    # Of the weights, not of their worth: else a few units that hardly fire would set the scale of all others.
    scale = float(np.sqrt(np.mean(np.square(size)))) or 1.0
    cost = to_blocks(np.where(weights != 0, activity, 0), block).sum(axis=(1, 3))
    return block_scores(value, block, "l2").ravel() / scale, cost.ravel()


def _measure(network: Network, inputs: np.ndarray | object) -> tuple[dict[str, _Usage], float]:
    """How units are used, and the effective operations a step and sample."""
    simulation = simulate(network, inputs, record="events")  # type: ignore[arg-type]
    rows = simulation.steps * simulation.batch
    usage = {}
    for name, (weights, events) in counting.senders(network, simulation).items():
        fired = np.bincount(events.indices, minlength=weights.shape[0])
        squares = np.bincount(events.indices, np.square(events.values, dtype=np.float64), minlength=weights.shape[0])
        usage[name] = _Usage(fired / rows, squares / np.maximum(fired, 1))
    return usage, counting.count(network, simulation).total.effective / rows
