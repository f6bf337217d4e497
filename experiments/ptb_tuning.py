"""For the command `tune` of ptb.py: gradual pruning of word models, with shares to keep by matrix, and the teacher."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import eventrnn as er
from eventrnn.pruning import Combined, GradualPruning, Pruning
from eventrnn.training.recipes.distillation import DistillationRecipe
from eventrnn.training.recipes.recipe import flags_to_settings

# How often gradual pruning changes the masks. On a GPU a change takes as long as some hundred updates.
CHANGES = 16

# Matrices of words. The magnitudes of a word's weights grow with its rarity, so that a ranking of all words together
# leaves frequent words hardly anything; every word keeps the same share instead.
WORDS = ("embedding", "readout")


def kept_shares(given: list[str], network: er.Network, sparsity: float) -> dict[str, float]:
    """Shares of blocks to keep by matrix, from texts MATRIX=SHARE; the matrix of words is always among them.

    sparsity : share of blocks to prune of a matrix of words that is not given; 0 where nothing is pruned

    Raises ValueError for other texts.
    """
    tied = network.readout is not None and network.readout.tied
    there = [name for name in network.matrices() if not (tied and name == "readout")] + ["embedding"] * tied
    shares: dict[str, float] = {}
    for text in given:
        matrix, _, share = text.partition("=")
        try:
            shares[matrix] = float(share)
        except ValueError:
            shares[matrix] = -1.0
        if matrix not in there or not 0 < shares[matrix] <= 1:
            raise ValueError(
                f"kept: got {text!r}, need MATRIX=SHARE with a share in (0, 1] of one of {', '.join(there)}"
            )
    for matrix in WORDS if sparsity else ():
        if matrix in there:
            shares.setdefault(matrix, 1 - sparsity)
    return shares


def gradual_pruning(
    sparsity: float,
    shares: dict[str, float],
    network: er.Network,
    block: tuple[int, int],
    updates: int,
    until: float,
) -> Pruning:
    """Gradual pruning by magnitude in the first part of a training of so many updates.

    sparsity : share of blocks to prune of the matrices that are not in `shares`, which are ranked together
    shares   : share of blocks to keep of a matrix; a matrix that keeps all is not pruned
    until    : share of the updates after which the masks stay

    Raises ValueError for a share `until` outside (0, 1), and where every matrix keeps all.
    """
    if not 0 < until < 1:
        raise ValueError(f"until: got {until}, need a share of the training in (0, 1)")
    end = max(1, int(until * updates))
    span = {"block": block, "start": 0, "end": end, "every": max(1, end // CHANGES), "statistic": "l2"}
    own = [
        GradualPruning(1 - kept, names=(matrix,), scope="column" if matrix in WORDS else "matrix", **span)
        for matrix, kept in shares.items()
        if kept < 1
    ]
    # The matrix of a tied read-out is among the shares as "embedding".
    rest = [
        name for name in network.matrices() if name not in shares and not (name == "readout" and "embedding" in shares)
    ]
    if rest:
        # The tied matrix is not among those that are pruned without being named.
        exempt = tuple(matrix for matrix in shares if matrix != "embedding")
        own.append(GradualPruning(sparsity, scope="global", exempt=exempt, **span))
    if not own:
        raise ValueError("kept: every matrix keeps all of its blocks; leave out --sparsity")
    return Combined(*own)


def taught(teacher: str | None, weight: float | None) -> list[tuple[str, Any]]:
    """Settings of a recipe for --teacher and --distillation; of "none" those of no teacher."""
    if teacher == "none":
        if weight:
            raise ValueError(f"distillation: got {weight} and --teacher none; leave one of them out")
        return [(f"distillation.{name}", value) for name, value in asdict(DistillationRecipe()).items()]
    return flags_to_settings({"distillation.teacher": teacher, "distillation.weight": weight})
