"""The pruning methods by name: what each prunes to, which options it takes, and whether it trains.

Programs that let a user choose a method by name (the command line) read this table, so that a new method is one entry
here. Option names are those of the class or function that implements the method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

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

# Masks stop changing after this share of the training steps; the rest of the training adapts the kept weights.
LAST_CHANGE = 0.5


@dataclass(frozen=True)
class Method:
    """One pruning method.

    Attributes
    ----------
    summary         : a few words for a help text
    implementations : the classes and functions that do the work
    targets         : the options that set how much is pruned: "sparsity", "nm" or "ops_budget"; at most one is given
    options         : the further options that the method takes
    trains          : True for a method that prunes while it trains, False for one that never trains, None for one that
                      does either
    calibrates      : whether the method measures activity on calibration inputs
    """

    summary: str
    implementations: tuple[Callable[..., Any], ...]
    targets: tuple[str, ...]
    options: tuple[str, ...] = ()
    trains: bool | None = False
    calibrates: bool = False


#: method name -> method
METHODS: dict[str, Method] = {
    "magnitude": Method(
        "smallest weights, at once or gradually",
        (GradualPruning, StaticMasks),
        targets=("sparsity", "nm"),
        options=(*BLOCK_OPTIONS, *NM_OPTIONS),
        trains=None,
    ),
    "movement": Method(
        "weights that move towards zero",
        (MovementPruning,),
        targets=("sparsity",),
        options=BLOCK_OPTIONS,
        trains=True,
    ),
    "threshold": Method(
        "blocks below a rising threshold",
        (ThresholdPruning,),
        targets=("sparsity",),
        options=("block", "statistic"),
        trains=True,
    ),
    "lasso": Method(
        "group lasso with a rising threshold",
        (GroupLasso, ThresholdPruning),
        targets=("sparsity",),
        options=("block", "statistic", "strength"),
        trains=True,
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
    ),
    "regrow": Method(
        "blocks dropped and regrown (RigL)",
        (RegrownMasks,),
        targets=("sparsity",),
        options=("block", "statistic", "every"),
        trains=True,
    ),
    "adaprune": Method(
        "kept weights refitted to the outputs",
        (adaprune,),
        targets=("nm", "sparsity"),
        options=("block", "statistic", "gates", *NM_OPTIONS),
        calibrates=True,
    ),
    "operations": Method(
        "to a budget of measured operations",
        (prune_to_operations,),
        targets=("ops_budget",),
        options=("block", "criterion"),
        trains=None,
        calibrates=True,
    ),
}


def training_schedule(name: str, pattern: Pattern, steps: int, options: Mapping[str, Any]) -> Pruning | None:
    """The `Pruning` object that a trainer is given for a method, or None for a method without one.

    Parameters
    ----------
    name    : a key of `METHODS`
    pattern : what to prune to; it holds the sparsity and the block, or N and M
    steps   : updates of the whole training; masks stop changing after half of them
    options : values by option name, `exempt` (a tuple of names) among them; names that the method does not take are
              ignored

    Raises ValueError for fewer than two steps where masks change while training.
    """
    if name in ("iterative", "adaprune", "operations"):
        return None
    exempt = tuple(options.get("exempt", ()))
    if name == "magnitude" and not isinstance(pattern, Blocks):
        return StaticMasks(pattern, exempt=exempt)
    end = int(steps * LAST_CHANGE)
    if end < 1:
        raise ValueError(f"steps: got {steps}, but masks change in the first half of the training; give at least 2")
    every = {"every": options["every"]} if "every" in options else {}
    if name == "dynamic":
        return DynamicMasks(pattern, 0, end, exempt=exempt, **every)
    assert isinstance(pattern, Blocks)
    common = {"block": pattern.block, "start": 0, "end": end, "exempt": exempt}
    ranking = {option: options[option] for option in ("scope", "statistic", "gates") if option in options}
    if name == "magnitude":
        return GradualPruning(pattern.sparsity, **common, **ranking)
    if name == "movement":
        # Movement is summed over some steps before the first mask is drawn from it.
        start = min(end - 1, max(1, end // 4))
        return MovementPruning(pattern.sparsity, **common | {"start": start}, **ranking)
    if name == "regrow":
        return RegrownMasks(pattern.sparsity, **common, **ranking, **every)
    threshold = ThresholdPruning(ramp=end // 2, sparsity=pattern.sparsity, **common, **ranking)
    if name == "threshold":
        return threshold
    return Combined(GroupLasso(options.get("strength", 0.01), **common), threshold)
