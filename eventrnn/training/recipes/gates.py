"""The gates of a recipe: which matrices of the network to start from become blocks that every input chooses."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from eventrnn._checks import need_choice, need_names, need_number, need_whole
from eventrnn.network import Network
from eventrnn.weights import GATE_RULES, GatedBlocks, MatrixId
from eventrnn.weights.gated import LONGEST_PERIOD


@dataclass(frozen=True)
class GateRecipe:
    """Gates of the network to start from. They are drawn as `GatedBlocks.from_weights` does, after all other numbers.

    Attributes
    ----------
    matrices : "w_in" and "w_rec" for those of all layers, "readout", or names such as "layers.1.w_rec"; empty for none
    block    : sides of a block, presynaptic and postsynaptic; padded where it does not divide a matrix
    density  : share of the blocks that an input chooses, in (0, 1]
    rank     : of a gate with two factors; 0 for one factor
    rule     : how gates follow from logits, one of `weights.GATE_RULES`
    period   : number of steps that share a choice; with 1 every step chooses

    Raises ValueError for a value outside its range, and for further settings without matrices.
    """

    matrices: tuple[str, ...] = ()
    block: tuple[int, ...] = (64, 64)
    density: float = 0.5
    rank: int = 0
    rule: str = "linear"
    period: int = 1

    def __post_init__(self):
        need_names("gates matrices", self.matrices)
        if len(self.block) != 2:
            raise ValueError(
                f"gates block: got {list(self.block)}, need two numbers [inputs, outputs] such as [64, 64]"
            )
        for side in self.block:
            need_whole("gates block", side, at_least=1)
        need_number("gates density", self.density, above=0, at_most=1, what="share of kept blocks")
        need_whole("gates rank", self.rank, at_least=0)
        need_choice("gates rule", self.rule, GATE_RULES)
        need_whole("gates period", self.period, at_least=1, at_most=LONGEST_PERIOD)
        if not self.matrices and any(getattr(self, each.name) != each.default for each in fields(self)):
            raise ValueError(f'gates: got {self}, but no matrices; name some, such as matrices = ["w_in", "w_rec"]')

    def applied(self, network: Network, rng: np.random.Generator) -> Network:
        """The network with gates in front of the matrices.

        Warns where a gate costs more than the blocks that are not chosen. Raises ValueError for a matrix that the
        network does not have, that cannot be gated, or that is smaller than a block.
        """
        matrices, chosen = network.matrices(), {}
        for name in self.matrices:
            found = [each for each in matrices if name in (str(each), MatrixId(each).role)]
            if not found:
                raise ValueError(f"gates matrices: got {name!r}, need w_in, w_rec or one of {', '.join(matrices)}")
            chosen |= dict.fromkeys(found)
        if "readout" in chosen and network.readout is not None and network.readout.tied:
            raise ValueError("gates matrices: got 'readout', which is tied to the embedding; leave it out, or untie it")
        block = self.block[0], self.block[1]
        for name in chosen:
            rows, columns = matrices[name].shape
            if block[0] > rows or block[1] > columns:
                raise ValueError(
                    f"gates block: got {list(block)}, which is larger than {name}, a matrix {rows}x{columns}; give a "
                    "smaller block, or leave the matrix out"
                )
        options = {"density": self.density, "rank": self.rank or None, "gate_rule": self.rule, "rng": rng}
        options["gate_period"] = self.period
        return network.with_matrices(
            {name: GatedBlocks.from_weights(matrices[name], block=block, **options) for name in chosen}
        )
