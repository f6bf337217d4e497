"""Iterative magnitude pruning with rewinding (the lottery ticket procedure): rounds of training and pruning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from eventrnn._checks import need_flag, need_whole
from eventrnn.network import Network
from eventrnn.pruning.magnitude import check_sparsity, magnitude_masks
from eventrnn.pruning.patterns import Blocks, prunable_matrices, with_masks


@dataclass(frozen=True)
class Round:
    """The result of one round.

    Attributes
    ----------
    number   : number of the round; in round 0 nothing is pruned
    sparsity : share of blocks that is pruned
    network  : the network that was trained with these masks
    """

    number: int
    sparsity: float
    network: Network


def iterative_pruning(
    early: Network,
    train: Callable[[Network], Network],
    sparsity: float,
    *,
    rounds: int = 5,
    block: tuple[int, int] = (1, 1),
    scope: str = "matrix",
    statistic: str = "max",
    rewind: bool = True,
    names: tuple[str, ...] | None = None,
    exempt: tuple[str, ...] = (),
) -> Iterator[Round]:
    """Train and prune in rounds, with the same share of the remaining blocks pruned in each.

    Parameters
    ----------
    early    : the network to go back to, at initialisation (Frankle and Carbin 2019) or after some training (Frankle et
               al. 2020)
    train    : function that trains a network and returns it; pruned weights are not stored in its argument, and must be
               zero in its result
    sparsity : share of blocks that is pruned after the last round, in [0, 1)
    rounds   : rounds of pruning; `train` is called rounds + 1 times
    rewind   : go back to the weights of `early` after each pruning; otherwise continue from the trained weights (Han et
               al. 2015). Thresholds, biases and the embedding are rewound as well
    others   : see `prune`

    Yields rounds + 1 results, of which the last has the full sparsity. Raises ValueError for a sparsity that empties a
    matrix.
    """
    check_sparsity(sparsity)
    need_whole("rounds", rounds, at_least=1)
    need_flag("rewind", rewind)
    if not callable(train):
        raise TypeError(f"train: got {train!r}, need a function that trains a network and returns it")
    start = {name: weights.to_dense() for name, weights in prunable_matrices(early, names, exempt).items()}
    ranking = {"block": block, "scope": scope, "statistic": statistic}
    # Raises the errors of the last round before the first training.
    magnitude_masks(start, sparsity, **ranking)
    pattern, masks = Blocks(sparsity, block, statistic), {name: np.ones(w.shape, bool) for name, w in start.items()}
    network = early
    for number in range(rounds + 1):
        trained = train(network)
        share = 1 - (1 - sparsity) ** (number / rounds)
        yield Round(number, share, with_masks(trained, masks, pattern) if number else trained)
        if number == rounds:
            return
        weights = {name: trained.matrices()[name].to_dense() for name in masks}
        share = 1 - (1 - sparsity) ** ((number + 1) / rounds)
        masks = magnitude_masks(weights, share, within=masks, **ranking)
        network = with_masks(replace(early if rewind else trained, metadata=early.metadata), masks, pattern)
