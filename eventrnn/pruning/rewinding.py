"""Iterative pruning with rewinding: train, prune a part, go back to early weights, train what is left, and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from eventrnn.network import Network
from eventrnn.pruning.magnitude import check_sparsity, magnitude_masks
from eventrnn.pruning.patterns import Blocks, prunable_matrices, with_masks


@dataclass(frozen=True)
class Round:
    """One round: its number from 0 (nothing pruned), the share of blocks pruned, the network trained with that mask."""

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
    """Prune the same share of what is left in every round, each after a training (Frankle and Carbin 2019; Han 2015).

    Parameters
    ----------
    early    : the network to go back to: as it was drawn, or after some training (Frankle et al. 2020)
    train    : takes a network whose pruned weights are not stored and returns it trained, those weights still zero
    sparsity : share of blocks pruned after the last round, in [0, 1)
    rounds   : of pruning; `train` is called once more than that
    rewind   : go back to the weights of `early` after each pruning, else train on (iterative fine-tuning)
    others   : as `prune`

    Yields rounds + 1 times; the last is the result. Thresholds, biases and the embedding are rewound as well.
    Raises ValueError for a share that would empty a matrix.
    """
    check_sparsity(sparsity)
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, need a whole number >= 1")
    start = {name: weights.to_dense() for name, weights in prunable_matrices(early, names, exempt).items()}
    ranking = {"block": block, "scope": scope, "statistic": statistic}
    magnitude_masks(start, sparsity, **ranking)  # refuses now what the last round would
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
