"""How gated blocks are trained: the gradient of the choice, and a density that falls to that of the network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from eventrnn._checks import need_flag, need_number, need_whole
from eventrnn.training.bptt.gated_products import Gating
from eventrnn.training.bptt.model import Model
from eventrnn.weights import GatedBlocks


@dataclass(frozen=True)
class GateSettings:
    """Settings of networks with gated blocks.

    Attributes
    ----------
    straight_through : give blocks that were not chosen a gradient, as if the choice were the identity
                       (`bptt/gated_products.py`); otherwise the gradient is the exact one, of the chosen blocks
    start_density    : share of the blocks that an input chooses at the first update, in (0, 1]. It then changes
                       linearly to the density of each matrix. 0 for the density of the matrix from the start on
    anneal_steps     : number of updates until the density of the matrix is reached; 0 without `start_density`

    Validations and the trained network always have the density of the matrix. Until it is reached, no validation ends
    the run (`Settings.patience`).

    Raises ValueError for a value outside its range, and for one of the last two without the other.
    """

    straight_through: bool = False
    start_density: float = 0.0
    anneal_steps: int = 0

    def __post_init__(self):
        need_flag("gates straight_through", self.straight_through)
        need_number("gates start_density", self.start_density, at_least=0, at_most=1, what="share of kept blocks")
        need_whole("gates anneal_steps", self.anneal_steps, at_least=0)
        if bool(self.start_density) != bool(self.anneal_steps):
            raise ValueError(
                f"gates: got start_density={self.start_density} and anneal_steps={self.anneal_steps}; give both, or "
                "neither for a density that does not change"
            )

    def check(self, model: Model, updates: int) -> None:
        """Raise ValueError for a setting that a run of so many updates of the model would ignore."""
        if self != GateSettings() and not model.gated:
            raise ValueError(
                f"gates: got {self}, but no matrix of the network has gated blocks; leave it out, or give the network "
                "some (GatedBlocks.from_weights, model.gates of a recipe)"
            )
        if self.anneal_steps and self.anneal_steps >= updates:
            raise ValueError(
                f"gates anneal_steps: got {self.anneal_steps}, but training has {updates} updates; give fewer, so that "
                "the last ones have the density of the network"
            )

    def density(self, final: float, step: int) -> float:
        """The density at an update, counted from 0, of a matrix with a density of its own."""
        if step >= self.anneal_steps:
            return final
        return self.start_density + (final - self.start_density) * step / self.anneal_steps

    def at(self, gated: Mapping[str, GatedBlocks], step: int) -> Gating:
        """How the gates of all matrices choose at an update, counted from 0."""
        changed = gated if step < self.anneal_steps else {}
        return Gating(self.straight_through, {name: self.density(w.density, step) for name, w in changed.items()})
