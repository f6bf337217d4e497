"""For the command `tune` of ptb.py: gradual pruning of word models, with shares to keep by matrix, and the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

import eventrnn as er
from eventrnn.pruning import Combined, GradualPruning, Pruning, magnitude_masks
from eventrnn.training.recipes.distillation import DistillationRecipe
from eventrnn.training.recipes.recipe import flags_to_settings

# How often gradual pruning changes the masks. On a GPU a change takes as long as some hundred updates.
CHANGES = 16

# Matrices of words. The magnitudes of a word's weights grow with its rarity, so that a ranking of all words together
# leaves frequent words hardly anything; every word keeps the same share instead.
WORDS = ("embedding", "readout")


def kept_shares(given: list[str], network: er.Network, sparsity: float) -> dict[str, float]:
    """Shares of blocks to keep by matrix, from texts MATRIX=SHARE; the matrix of words is always among them.

    A text MATRIX:WORD=SHARE gives the share of a matrix of words from this word on, under the key MATRIX:WORD.

    sparsity : share of blocks to prune of a matrix of words that is not given; 0 where nothing is pruned

    Raises ValueError for other texts.
    """
    tied = network.readout is not None and network.readout.tied
    there = [name for name in network.matrices() if not (tied and name == "readout")] + ["embedding"] * tied
    shares: dict[str, float] = {}
    for text in given:
        key, _, share = text.partition("=")
        matrix, colon, word = key.partition(":")
        try:
            shares[key] = float(share)
        except ValueError:
            shares[key] = -1.0
        if matrix not in there or not 0 < shares[key] <= 1:
            raise ValueError(
                f"kept: got {text!r}, need MATRIX=SHARE with a share in (0, 1] of one of {', '.join(there)}"
            )
        if colon and not (matrix in WORDS and word.isdecimal() and 0 < int(word) < (network.symbols or 0)):
            words = "readout" if "readout" in there else "embedding"
            raise ValueError(f"kept: got {text!r}, need {words}:WORD=SHARE with the number of a word but the first")
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
    since: float = 0.0,
) -> Pruning:
    """Gradual pruning by magnitude in a part of a training of so many updates.

    sparsity : share of blocks to prune of the matrices that are not in `shares`, which are ranked together
    shares   : share of blocks to keep of a matrix; a matrix that keeps all is not pruned
    until    : share of the updates after which the masks stay
    since    : share of the updates before the first weight is pruned

    Raises ValueError for shares that are not 0 <= since < until < 1, for a band of words that begins within a block,
    and where every matrix keeps all.
    """
    if not 0 < until < 1:
        raise ValueError(f"until: got {until}, need a share of the training in (0, 1)")
    if not 0 <= since < until:
        raise ValueError(f"since: got {since}, need a share of the training below {until}, that of --until")
    start = int(since * updates)
    end = max(start + 1, int(until * updates))
    span = {"block": block, "start": start, "end": end, "every": max(1, (end - start) // CHANGES), "statistic": "l2"}
    bands = {matrix: word_bands(matrix, shares, block) for matrix in WORDS if matrix in shares}
    own: list[Pruning] = [
        WordPruning(1 - min(kept for _, kept in each), names=(matrix,), scope="column", bands=each, **span)
        for matrix, each in bands.items()
        if any(kept < 1 for _, kept in each)
    ]
    shares = {matrix: kept for matrix, kept in shares.items() if matrix.partition(":")[0] not in WORDS}
    own += [
        GradualPruning(1 - kept, names=(matrix,), scope="matrix", **span) for matrix, kept in shares.items() if kept < 1
    ]
    shares |= dict.fromkeys(bands, 1.0)
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


def word_bands(matrix: str, shares: Mapping[str, float], block: tuple[int, int]) -> tuple[tuple[int, float], ...]:
    """First words and kept shares of the bands of a matrix of words, ascending.

    Raises ValueError for a band that begins within a block.
    """
    found = {0: shares[matrix]}
    found |= {int(key.partition(":")[2]): kept for key, kept in shares.items() if key.startswith(f"{matrix}:")}
    for word in found:
        if word % block[1]:
            raise ValueError(
                f"kept: got {matrix}:{word}, which lies within a block of {block[1]} words; need a multiple"
            )
    return tuple(sorted(found.items()))


@dataclass
class WordPruning(GradualPruning):
    """Gradual pruning of the matrix of words, with a share to keep per band of words.

    `sparsity` is that of the band that keeps least; the others are pruned in proportion at all times.

    bands : first word and kept share of each band, ascending, from word 0 on
    """

    bands: tuple[tuple[int, float], ...] = ((0, 1.0),)

    def _masks(self, sparsity: float, parameters: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> dict:
        (name,) = self.matrices(parameters)
        # Words are the rows of an embedding, and the columns of a read-out.
        axis = 0 if name == "embedding" else 1
        cuts, progress = [first for first, _ in self.bands[1:]], sparsity / self.sparsity
        parts = np.split(parameters[name], cuts, axis=axis)
        before = np.split(masks[name], cuts, axis=axis) if name in masks else [None] * len(parts)
        options = {"block": self.block, "scope": self.scope, "statistic": self.statistic}
        made = [
            magnitude_masks({name: part}, progress * (1 - kept), within=None if old is None else {name: old}, **options)
            for part, old, (_, kept) in zip(parts, before, self.bands, strict=True)
        ]
        return {name: np.concatenate([each[name] for each in made], axis=axis)}


def taught(teacher: str | None, weight: float | None) -> list[tuple[str, Any]]:
    """Settings of a recipe for --teacher and --distillation; of "none" those of no teacher."""
    if teacher == "none":
        if weight:
            raise ValueError(f"distillation: got {weight} and --teacher none; leave one of them out")
        return [(f"distillation.{name}", value) for name, value in asdict(DistillationRecipe()).items()]
    return flags_to_settings({"distillation.teacher": teacher, "distillation.weight": weight})
