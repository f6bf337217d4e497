"""The pruning methods by name: what each prunes to, which options it takes, and whether it trains.

Programs that let a user choose a method by name (the command line) read this table, so that a new method is one entry
here. Option names are those of the class or function that implements the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from eventrnn._integers import ceil_div
from eventrnn.pruning.adaprune import adaprune
from eventrnn.pruning.dynamic import DynamicMasks, RegrownMasks, StaticMasks
from eventrnn.pruning.magnitude import GradualPruning, MovementPruning
from eventrnn.pruning.operations import prune_to_operations
from eventrnn.pruning.patterns import Blocks, Pattern
from eventrnn.pruning.rewinding import iterative_pruning
from eventrnn.pruning.schedule import Combined, Pruning
from eventrnn.pruning.threshold import GroupLasso, ThresholdPruning

#: Options that say how blocks are ranked. They do not apply to an N:M pattern.
BLOCK_OPTIONS = ("block", "scope", "statistic", "gates")

#: Options of an N:M pattern. They do not apply to blocks.
NM_OPTIONS = ("mask",)

#: Options that set how much is pruned, each with the options of its pattern.
TARGETS: dict[str, tuple[str, ...]] = {
    "sparsity": BLOCK_OPTIONS,
    "nm": NM_OPTIONS,
    "diagonal": (),
    "ops_budget": BLOCK_OPTIONS,
}

# Masks change between these shares of the training steps; the rest of the training adapts the kept weights.
FIRST_CHANGE, LAST_CHANGE = 0.0, 0.5

# Changes of a gradual schedule in a long training, and proximal steps of the group lasso. Both are made by the CPU and
# take longer than a training step on a GPU.
MOST_CHANGES, MOST_PROXIMAL = 100, 200


def need_order(since: float, until: float) -> None:
    """Raise ValueError for shares of a training between which no mask can change."""
    if since >= until:
        raise ValueError(f"since: got {since:g}, need less than until, which is {until:g}")


@dataclass(frozen=True)
class Plan:
    """What a schedule is built from: the pattern, the options by name, and the updates of the whole training."""

    pattern: Pattern
    steps: int
    options: Mapping[str, Any]

    @property
    def exempt(self) -> tuple[str, ...]:
        """Names of matrices and layers that are not pruned."""
        return tuple(self.options.get("exempt", ()))

    @property
    def start(self) -> int:
        """The update at which masks begin to change."""
        return int(self.steps * self.options.get("since", FIRST_CHANGE))

    @property
    def end(self) -> int:
        """The update from which on masks stay. Raises ValueError where there is none to change them in."""
        since, until = self.options.get("since", FIRST_CHANGE), self.options.get("until", LAST_CHANGE)
        need_order(since, until)
        end = int(self.steps * until)
        if end <= self.start:
            raise ValueError(
                f"steps: got {self.steps}, but masks change between the shares {since:g} and {until:g} of the "
                f"training; give at least {self._fewest(since, until)}"
            )
        return end

    def _fewest(self, since: float, until: float) -> int:
        """The fewest updates with one in which masks change, and so of all larger numbers."""
        # In exact arithmetic: in floating point 0.3 - 0.2 is below 0.1, and 100 * 0.29 below 29.
        fewest = ceil(1 / (Fraction(str(until)) - Fraction(str(since))))
        while int(fewest * until) <= int(fewest * since):
            fewest += 1
        return fewest

    @property
    def blocks(self) -> dict[str, Any]:
        """The arguments that all schedules of blocks have in common."""
        assert isinstance(self.pattern, Blocks)
        return {"block": self.pattern.block, "start": self.start, "end": self.end, "exempt": self.exempt}

    @property
    def sparsity(self) -> float:
        """The share of blocks to prune."""
        assert isinstance(self.pattern, Blocks)
        return self.pattern.sparsity

    def some(self, *names: str) -> dict[str, Any]:
        """The options of these names that were given."""
        return {name: self.options[name] for name in names if name in self.options}

    def every(self, start: int | None = None) -> dict[str, int]:
        """Updates between two changes of a gradual schedule: ten, fewer where there would not be ten changes, and more
        where there would be more than `MOST_CHANGES` before the last one.

        start : of the schedule; None for that of the plan
        """
        span = self.end - (self.start if start is None else start)
        return {"every": max(1, min(10, span // 10), ceil_div(span, MOST_CHANGES))}


# Options of `BLOCK_OPTIONS` beside the block itself.
RANKING = ("scope", "statistic", "gates")


def _magnitude(plan: Plan) -> Pruning:
    if not isinstance(plan.pattern, Blocks):
        return StaticMasks(plan.pattern, plan.start, exempt=plan.exempt)
    return GradualPruning(plan.sparsity, **plan.blocks, **plan.every(), **plan.some(*RANKING))


def _movement(plan: Plan) -> Pruning:
    # Movement is summed over some steps before the first mask is drawn from it.
    start = min(plan.end - 1, max(1, plan.start + (plan.end - plan.start) // 4))
    return MovementPruning(plan.sparsity, **plan.blocks | {"start": start}, **plan.every(start), **plan.some(*RANKING))


def _threshold(plan: Plan) -> Pruning:
    options: dict[str, Any] = plan.blocks | plan.every() | plan.some("statistic")
    return ThresholdPruning(ramp=(plan.start + plan.end) // 2, sparsity=plan.sparsity, **options)


def _lasso(plan: Plan) -> Pruning:
    every = ceil_div(plan.end - plan.start, MOST_PROXIMAL)
    lasso = GroupLasso(plan.options.get("strength", 0.01), every=every, **plan.blocks)
    return Combined(lasso, _threshold(plan))


def _dynamic(plan: Plan) -> Pruning:
    return DynamicMasks(plan.pattern, plan.start, plan.end, exempt=plan.exempt, **plan.some("every"))


def _regrow(plan: Plan) -> Pruning:
    return RegrownMasks(plan.sparsity, **plan.blocks, **plan.some("statistic", "every"))


@dataclass(frozen=True)
class Method:
    """One pruning method.

    Attributes
    ----------
    summary         : a few words for a help text
    implementations : the classes and functions that do the work
    targets         : those of `TARGETS` that the method takes; at most one is given
    options         : the further options that the method takes
    trains          : True for a method that prunes while it trains, False for one that never trains, None for one that
                      does either
    calibrates      : whether the method measures activity on calibration inputs
    schedule        : makes the object that a trainer is given, or None for a method that prunes outside the training
    """

    summary: str
    implementations: tuple[Callable[..., Any], ...]
    targets: tuple[str, ...]
    options: tuple[str, ...] = ()
    trains: bool | None = False
    calibrates: bool = False
    schedule: Callable[[Plan], Pruning] | None = None


#: method name -> method
METHODS: dict[str, Method] = {
    "magnitude": Method(
        "smallest weights, at once or gradually",
        (GradualPruning, StaticMasks),
        targets=("sparsity", "nm", "diagonal"),
        options=(*BLOCK_OPTIONS, *NM_OPTIONS),
        trains=None,
        schedule=_magnitude,
    ),
    "movement": Method(
        "weights that move towards zero",
        (MovementPruning,),
        targets=("sparsity",),
        options=BLOCK_OPTIONS,
        trains=True,
        schedule=_movement,
    ),
    "threshold": Method(
        "blocks below a rising threshold",
        (ThresholdPruning,),
        targets=("sparsity",),
        options=("block", "statistic"),
        trains=True,
        schedule=_threshold,
    ),
    "lasso": Method(
        "group lasso with a rising threshold",
        (GroupLasso, ThresholdPruning),
        targets=("sparsity",),
        options=("block", "statistic", "strength"),
        trains=True,
        schedule=_lasso,
    ),
    "iterative": Method(
        "rounds of training, with rewinding",
        (iterative_pruning,),
        targets=("sparsity",),
        options=("block", "scope", "statistic", "rounds"),
        trains=True,
    ),
    "dynamic": Method(
        "masks recomputed from the weights",
        (DynamicMasks,),
        targets=("nm", "sparsity"),
        options=("block", "statistic", "gates", *NM_OPTIONS, "every"),
        trains=True,
        schedule=_dynamic,
    ),
    "regrow": Method(
        "blocks dropped and regrown (RigL)",
        (RegrownMasks,),
        targets=("sparsity",),
        options=("block", "statistic", "every"),
        trains=True,
        schedule=_regrow,
    ),
    "adaprune": Method(
        "kept weights refitted to the outputs",
        (adaprune,),
        targets=("nm", "sparsity", "diagonal"),
        options=("block", "statistic", "gates", *NM_OPTIONS),
        calibrates=True,
    ),
    "operations": Method(
        "to a budget of measured operations",
        (prune_to_operations,),
        targets=("ops_budget",),
        options=("block", "criterion", "scope"),
        trains=None,
        calibrates=True,
    ),
}


def options_with(method: Method, target: str | None) -> set[str]:
    """The options that a method takes beside a target of `TARGETS`, without those of other patterns.

    target : None for those of blocks
    """
    own = BLOCK_OPTIONS if target is None else TARGETS[target]
    return set(method.options) - ({option for each in TARGETS.values() for option in each} - set(own))


def training_schedule(name: str, pattern: Pattern, steps: int, options: Mapping[str, Any]) -> Pruning | None:
    """The `Pruning` object that a trainer is given for a method, or None for a method without one.

    Parameters
    ----------
    name    : a key of `METHODS`
    pattern : what to prune to; it holds the sparsity and the block, N and M, or the parts of a diagonal
    steps   : updates of the whole training
    options : values by option name; names that the method does not take are ignored. Every method takes `exempt` (a
              tuple of names), and `since` and `until`, the shares of the training between which masks change. Without
              these two it is the first half

    Raises ValueError, where masks change while training, unless `since` is below `until` and a step lies between them.
    """
    build = METHODS[name].schedule
    return None if build is None else build(Plan(pattern, steps, options))
