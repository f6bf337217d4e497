"""Pruning of a recipe: a method that removes weights while the network is trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from eventrnn._checks import need_choice, need_names, need_number, need_whole
from eventrnn.network import Network
from eventrnn.pruning.magnitude import GATES, SCOPES, STATISTICS
from eventrnn.pruning.methods import (
    FIRST_CHANGE,
    LAST_CHANGE,
    METHODS,
    need_order,
    options_with,
    training_schedule,
)
from eventrnn.pruning.nm import TRANSPOSABLE_METHODS
from eventrnn.pruning.patterns import BlockDiagonal, Blocks, NofM, Pattern, after_training, parse_nm
from eventrnn.pruning.schedule import Pruning
from eventrnn.training.trainer import Trainer

# Methods that a trainer is given, by name.
GRADUAL = tuple(name for name, method in METHODS.items() if method.schedule is not None)

TARGETS = ("sparsity", "nm", "diagonal")


@dataclass(frozen=True)
class PruningRecipe:
    """Pruning while training; see `eventrnn.pruning`.

    Attributes
    ----------
    method    : one of `GRADUAL`, "" for none
    sparsity  : share of the blocks to prune, in [0, 1); with `nm` or `diagonal` leave it out
    nm        : "N:M" or "N:M:AXIS" in place of a sparsity, such as "2:4" or "4:8:both"
    diagonal  : parts of a block diagonal in place of a sparsity
    block     : sides of a block, presynaptic and postsynaptic
    scope, statistic, gates : how blocks are ranked; "" for what the method does by itself
    mask      : "exact" or "greedy", for N:M masks along both axes; "" for exact
    strength  : of the group lasso; 0 for 0.01
    every     : updates between two changes of the masks, of "dynamic" and "regrow"; 0 for 40
    exempt    : names of matrices and layers that are not pruned
    since     : share of the updates after which masks begin to change, in [0, until). Until then the network is dense
    until     : share of the updates after which masks stay, in (since, 1). "magnitude" draws N:M masks and diagonals
                once, after `since`, and takes no `until` with them

    Raises ValueError for a value outside its range, for settings without a method, for a method without exactly one of
    `sparsity`, `nm` and `diagonal`, and for settings that the method does not take.
    """

    method: str = ""
    sparsity: float = 0.0
    nm: str = ""
    diagonal: int = 0
    block: tuple[int, ...] = (1, 1)
    scope: str = ""
    statistic: str = ""
    gates: str = ""
    mask: str = ""
    strength: float = 0.0
    every: int = 0
    exempt: tuple[str, ...] = ()
    since: float = FIRST_CHANGE
    until: float = LAST_CHANGE

    def __post_init__(self):
        need_number("sparsity", self.sparsity, at_least=0, below=1, what="share")
        need_whole("diagonal", self.diagonal, at_least=0)
        if len(self.block) != 2:
            raise ValueError(f"block: got {list(self.block)}, need two numbers [inputs, outputs] such as [1, 16]")
        for side in self.block:
            need_whole("block", side, at_least=1)
        for name, choices in (("scope", SCOPES), ("statistic", STATISTICS), ("gates", GATES)):
            if getattr(self, name):
                need_choice(name, getattr(self, name), choices)
        if self.mask:
            need_choice("mask", self.mask, TRANSPOSABLE_METHODS)
        need_number("strength", self.strength, at_least=0)
        need_whole("every", self.every, at_least=0)
        need_names("exempt", self.exempt)
        need_number("until", self.until, above=0, below=1, what="share")
        need_number("since", self.since, at_least=0, below=1, what="share")
        given = self._given()
        if not self.method:
            if given:
                raise ValueError(f"{', '.join(given)}: got no method; give pruning.method, such as 'magnitude'")
            return
        need_choice("method", self.method, GRADUAL)
        self._check_options(given)
        _ = self.pattern

    def _check_options(self, given: dict[str, Any]) -> None:
        method, targets = METHODS[self.method], [name for name in TARGETS if name in given]
        taken = [name for name in method.targets if name in TARGETS]
        if len(targets) != 1 or targets[0] not in taken:
            got = ", ".join(targets) or "none"
            dense = "" if targets else "; a sparsity of 0 prunes nothing: leave out the method too"
            raise ValueError(f"target: got {got} for {self.method}, need one of {', '.join(taken)}{dense}")
        once = self.method == "magnitude" and targets[0] != "sparsity"
        if once and "until" in given:
            raise ValueError(f"until: {self.method} draws the masks of {targets[0]} once, after since; leave it out")
        if not once:
            need_order(self.since, self.until)
        options = options_with(method, targets[0])
        for name in given:
            if name not in options and name not in (*TARGETS, "exempt", "since", "until"):
                raise ValueError(
                    f"{name}: not an option of {self.method} with {targets[0]}; it takes "
                    f"{', '.join(sorted(options)) or 'no further option'}"
                )

    def _given(self) -> dict[str, Any]:
        """The settings that differ from their defaults, beside the method."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "method"}
        return {name: value for name, value in values.items() if value != getattr(type(self), name)}

    @property
    def pattern(self) -> Pattern:
        """What is pruned to."""
        if self.nm:
            return NofM(*parse_nm(self.nm), self.mask or "exact")
        if self.diagonal:
            return BlockDiagonal(self.diagonal)
        ranking = {name: getattr(self, name) for name in ("statistic", "gates") if getattr(self, name)}
        return Blocks(self.sparsity, (self.block[0], self.block[1]), **ranking)

    def schedule(self, steps: int) -> Pruning | None:
        """What a trainer of so many updates is given; None without a method. Raises ValueError for too few updates."""
        return training_schedule(self.method, self.pattern, steps, self._given()) if self.method else None

    def stored(self, trainer: Trainer, network: Network) -> Network:
        """The network of a trainer with the matrices that were pruned in the format of the pattern."""
        if trainer.pruning is None:
            return network
        chosen = trainer.pruning.matrices(trainer.model.parameters)
        masks = {name: trainer.model.masks[name] for name in chosen}
        return after_training(network, trainer.model.template, masks, self.pattern)
