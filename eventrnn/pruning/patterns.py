"""Sparsity patterns, and functions that prune a network to a pattern in one step.

A pattern determines which weights of a matrix are kept and in which format they are stored. Pruning does not change the
storage: bfloat16 and int8 values keep their codes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace

import numpy as np

from eventrnn._checks import (
    need_choice,
    need_kind,
    need_mask,
    need_names,
    need_pair,
    need_text,
    need_whole,
    number_array,
)
from eventrnn.network import Network
from eventrnn.pruning.magnitude import check_choices, check_sparsity, gate_rows, magnitude_masks
from eventrnn.pruning.nm import TRANSPOSABLE_METHODS, nm_mask, transposable_mask
from eventrnn.pruning.schedule import EMBEDDING, choose, need_tied
from eventrnn.weights import NM, BlockCSR, Dense, GatedBlocks, MatrixId, Weights, check_nm, convert
from eventrnn.weights.gated import need_matrices

#: what an argument that is not a pattern should have been
PATTERNS = "a pattern: Blocks(...), NofM(...) or BlockDiagonal(...)"


class Pattern(ABC):
    """A rule for the weights of a matrix that are kept, and the format that stores them."""

    @abstractmethod
    def mask(self, name: str, dense: np.ndarray) -> np.ndarray:
        """Boolean mask of the weights to keep, of the shape of `dense` (n_pre, n_post).

        name : name of the matrix, one of `Network.matrices()`: these state the number of gates

        Raises ValueError for a matrix that cannot have this pattern.
        """

    @abstractmethod
    def store(self, name: str, weights: Weights | np.ndarray) -> Weights:
        """Weights with this pattern in the format of the pattern. Storage and scales do not change; `name` as in
        `mask`."""


@dataclass(frozen=True)
class Blocks(Pattern):
    """The largest blocks of each matrix by magnitude, in CSR for 1x1 blocks, otherwise in the block format.

    The fields are parameters of `magnitude_masks`; `sparsity` is the share of blocks that is pruned.
    """

    sparsity: float
    block: tuple[int, int] = (1, 1)
    statistic: str = "max"
    gates: str = "all"

    def __post_init__(self):
        check_sparsity(self.sparsity)
        check_choices(self)

    def __str__(self) -> str:
        return f"{self.sparsity:.0%} of {self.block[0]}x{self.block[1]}"

    def mask(self, name: str, dense: np.ndarray) -> np.ndarray:
        """Mask of the largest blocks."""
        return magnitude_masks(
            {name: dense}, self.sparsity, block=self.block, statistic=self.statistic, gates=self.gates
        )[name]

    def store(self, name: str, weights: Weights | np.ndarray) -> Weights:
        """The weights in CSR or in the block format."""
        return compress(weights, self.block)


@dataclass(frozen=True)
class NofM(Pattern):
    """At most n of each m weights along "post", "pre" or "both" (transposable), in the NM format.

    A transposable mask is stored along "post", and `NM.transposed()` satisfies n:m as well. `method` and `threads` are
    parameters of `transposable_mask`.
    """

    n: int
    m: int
    axis: str = "post"
    method: str = "exact"
    threads: int = 1

    def __post_init__(self):
        need_choice("nm axis", self.axis, NM_AXES)
        check_nm(self.n, self.m, "post" if self.axis == "both" else self.axis)
        need_choice("method", self.method, TRANSPOSABLE_METHODS)
        need_whole("threads", self.threads, at_least=1)

    def __str__(self) -> str:
        return f"{self.n}:{self.m} {self.axis}"

    def mask(self, name: str, dense: np.ndarray) -> np.ndarray:
        """Mask of the largest weights of each group, or a transposable mask."""
        if self.axis == "both":
            return transposable_mask(dense, self.n, self.m, method=self.method, threads=self.threads)
        return nm_mask(dense, self.n, self.m, self.axis, threads=self.threads)

    def store(self, name: str, weights: Weights | np.ndarray) -> Weights:
        """The weights in the NM format."""
        return convert(weights, "nm", nm=(self.n, self.m, "post" if self.axis == "both" else self.axis))


@dataclass(frozen=True)
class BlockDiagonal(Pattern):
    """Blocks along the diagonal: presynaptic and postsynaptic units in `parts` groups, and weights within a group only.

    The share 1 / parts of the weights is kept, whatever they are. Every gate has a diagonal of its own, so that a
    recurrent matrix consists of `parts` small cells. Groups follow one another and differ by at most one unit in size.
    The format is that of blocks, with the groups as blocks; CSR where `parts` does not divide both sides. This static
    pattern is a baseline of Hadifar et al. (arXiv 2001.04686) for blocks that every input chooses.
    """

    parts: int

    def __post_init__(self):
        need_whole("parts", self.parts, at_least=1)

    def __str__(self) -> str:
        return f"block-diagonal of {self.parts} parts"

    def mask(self, name: str, dense: np.ndarray) -> np.ndarray:
        """Mask of the blocks along the diagonal of every gate. Raises ValueError for more parts than units on a side,
        for a name that does not state its gates, and for gate rows that are not those of the gates."""
        array = number_array("weights", dense, "(n_pre, n_post)", ndim=2)
        (n_pre, n_post), gates = array.shape, MatrixId(name).gates
        n = gate_rows(name, n_post, gates)
        if self.parts > min(n_pre, n):
            raise ValueError(
                f"parts: got {self.parts}, but {name} has {n_pre} inputs and {n} outputs per gate; give at most "
                f"{min(n_pre, n)}, or leave {name} as it is: exempt=('{name}',), --exempt {name}"
            )
        pre, post = (np.arange(side) * self.parts // side for side in (n_pre, n))
        return np.tile(pre[:, None] == post[None, :], (1, gates))

    def store(self, name: str, weights: Weights | np.ndarray) -> Weights:
        """The weights in the block format, or in CSR where the parts do not divide both sides."""
        sides = weights.shape[0], weights.shape[1] // MatrixId(name).gates
        whole = not any(side % self.parts for side in sides)
        return compress(weights, (sides[0] // self.parts, sides[1] // self.parts) if whole else (1, 1))


#: Axes of an N:M pattern. "both" is a transposable mask; the `NM` weight format itself has only the other two.
NM_AXES = ("post", "pre", "both")


def parse_nm(text: str, axes: tuple[str, ...] = NM_AXES) -> tuple[int, int, str]:
    """Read N:M or N:M:AXIS, the way an N:M pattern is written in text: (4, 8, "both") from "4:8:both".

    axes : the axes that are allowed here; without an axis in the text it is "post"

    Raises ValueError for any other text, and for an N and M that the `NM` format does not have.
    """
    need_text("nm", text)
    found = re.fullmatch(r"(\d+):(\d+)(?::(\w+))?", text, re.ASCII)
    if found is None:
        raise ValueError(
            f"nm: got {text!r}, need N:M or N:M:AXIS, such as 2:4 or 2:4:pre, with one axis of {', '.join(axes)}"
        )
    n, m, axis = int(found[1]), int(found[2]), found[3] or "post"
    if axis not in axes:
        raise ValueError(f"nm axis: got {axis!r}, need one of {', '.join(axes)}")
    check_nm(n, m, "post")
    return n, m, axis


def compress(weights: Weights | np.ndarray, block: tuple[int, int]) -> Weights:
    """A pruned matrix in CSR for 1x1 blocks, otherwise in the block format. Storage and scales do not change."""
    block = need_pair("block", block, "two sizes >= 1 (presynaptic x postsynaptic)")
    return convert(weights, "csr") if block == (1, 1) else convert(weights, "block", block=block)


def masked(weights: Weights, mask: np.ndarray) -> Weights:
    """Dense weights that are zero where the mask is False, with the same storage and scales.

    Raises ValueError for a mask of another shape.
    """
    need_kind("weights", weights, Weights, "weights: Dense(array), or another format")
    mask = need_mask("mask", mask, weights.shape)
    dense = convert(weights, "dense")
    return replace(dense, values=np.where(mask, dense.values, dense.values.dtype.type(0)))  # type: ignore[type-var]


def prunable_matrices(
    network: Network,
    names: tuple[str, ...] | None = None,
    exempt: tuple[str, ...] = (),
    *,
    embedding: bool = False,
) -> dict[str, Weights]:
    """The matrices of a network to prune: those in `names` (by default all except a tied read-out) without `exempt`.

    embedding : allow the matrix of a tied read-out in `names`, as "embedding" (V, E)

    Raises ValueError for an unknown name, and for a tied read-out, whose weights are those of the embedding; TypeError
    for gated blocks.
    """
    need_kind("network", network, Network, "a Network")
    matrices = network.matrices()
    tied = network.readout is not None and network.readout.tied
    if names is not None:
        need_names("names", names)
    if tied and "readout" in (names or ()):
        raise ValueError(
            "pruning: the read-out is tied to the embedding and cannot be pruned; leave it out, or use network.untied()"
        )
    there = [name for name in matrices if not (tied and name == "readout")]
    if embedding and EMBEDDING in (names or ()):
        need_tied(tied)
        assert network.embedding is not None
        matrices[EMBEDDING] = Dense(network.embedding)
        there.append(EMBEDDING)
    chosen = {name: matrices[name] for name in choose(there, names, exempt)}
    _need_no_table(network, chosen, ", or leave it out: exempt=('layers.0.w_in',)")
    need_matrices(chosen, "pruning without training", "prune them in training: Trainer(pruning=...), --steps")
    return chosen


def prune(
    network: Network,
    sparsity: float,
    *,
    block: tuple[int, int] = (1, 1),
    scope: str = "matrix",
    statistic: str = "max",
    gates: str = "all",
    names: tuple[str, ...] | None = None,
    exempt: tuple[str, ...] = (),
) -> Network:
    """Prune the smallest blocks of a network in one step. Returns it with matrices in CSR (1x1 blocks) or block format.

    A tied read-out is pruned only where `names` holds "embedding": the embedding loses the same values. Other matrices
    that are not pruned are not changed, and the storage of values does not change. Parameters: see `magnitude_masks`;
    `names` and `exempt`: see `Pruning`. Raises ValueError for unknown names, a block larger than a matrix and a
    sparsity that empties a matrix.
    """
    matrices = prunable_matrices(network, names, exempt, embedding=True)
    dense = {name: weights.to_dense() for name, weights in matrices.items()}
    masks = magnitude_masks(dense, sparsity, block=block, scope=scope, statistic=statistic, gates=gates)
    return with_masks(network, masks, Blocks(sparsity, block))


def prune_to(
    network: Network, pattern: Pattern, *, names: tuple[str, ...] | None = None, exempt: tuple[str, ...] = ()
) -> Network:
    """Prune the matrices of a network to a pattern in one step, in the format of the pattern.

    Other rules: see `prune`.
    """
    need_kind("pattern", pattern, Pattern, PATTERNS)
    matrices = prunable_matrices(network, names, exempt)
    return with_masks(network, {name: pattern.mask(name, w.to_dense()) for name, w in matrices.items()}, pattern)


def with_masks(network: Network, masks: Mapping[str, np.ndarray], pattern: Pattern) -> Network:
    """Apply masks to matrices of a network and store them in the format of the pattern; other matrices do not change.

    masks : name -> boolean array, as in `Model.masks` after training; that of "embedding" (V, E) also acts on the
            read-out that is tied to it, which takes the format

    Raises ValueError for an unknown name and for a mask of another shape.
    """
    need_kind("network", network, Network, "a Network")
    need_kind("masks", masks, Mapping, "a mapping of names of matrices to boolean arrays")
    need_kind("pattern", pattern, Pattern, PATTERNS)
    matrices, masks = network.matrices(), dict(masks)
    if (mask := masks.pop(EMBEDDING, None)) is not None:
        network = _with_tied_mask(network, mask, pattern)
    unknown = set(masks) - set(matrices)
    if unknown:
        raise ValueError(f"masks: no {', '.join(sorted(unknown))}; have {', '.join(matrices)}")
    _need_no_table(network, masks, "")
    # The names of the network state the number of gates, which those of the masks need not do.
    return network.with_matrices(
        {name: pattern.store(name, masked(w, masks[name])) for name, w in matrices.items() if name in masks}
    )


def _need_no_table(network: Network, names: Container[str], otherwise: str) -> None:
    """Raise ValueError where the table of a folded network is among the matrices to prune."""
    folded = MatrixId.of(0, "w_in")
    if network.one_hot and folded in names:
        raise ValueError(
            f"pruning: {folded} is an embedding folded with the input weights, of which a symbol reads one row; prune "
            f"the network before it is folded{otherwise}"
        )


def _with_tied_mask(network: Network, mask: np.ndarray, pattern: Pattern) -> Network:
    """The network with a mask (V, E) on the embedding and on the read-out that is tied to it."""
    readout, embedding = network.readout, network.embedding
    need_tied(readout is not None and readout.tied)
    assert readout is not None and embedding is not None
    mask = need_mask(EMBEDDING, mask, embedding.shape)
    pruned = np.where(mask, embedding, np.float32(0))
    weights = pattern.store(MatrixId("readout"), Dense(np.ascontiguousarray(pruned.T)))
    return replace(network, embedding=pruned, readout=replace(readout, weights=weights))


def after_training(trained: Network, before: Network, masks: Mapping[str, np.ndarray], pattern: Pattern) -> Network:
    """Put the dense float32 network of a trainer back into the formats and storages of the network before training.

    trained : network of the trainer; weights that the masks prune are zero
    before  : network before training
    masks   : masks of the matrices that were pruned in training; these take the format of the pattern, but for gated
              blocks, which stay what they are

    int8 weights get new scales, because training changed the values. A tied read-out stays float32, as the embedding.
    """
    changed, masks = {}, dict(masks)
    tied = trained.readout is not None and trained.readout.tied
    if (mask := masks.pop(EMBEDDING, None)) is not None:
        trained = _with_tied_mask(trained, mask, pattern)
    elif tied:
        changed["readout"] = _in_format_of(trained.matrices()["readout"], before.matrices()["readout"])
    for name, old in before.matrices().items():
        if tied and name == "readout":
            continue
        new = trained.matrices()[name]
        if isinstance(new, GatedBlocks):
            # They have their format and masks already: blocks that are pruned are not stored.
            changed[name] = new.stored_as(old.storage)
            continue
        made = pattern.store(name, masked(new, masks[name])) if name in masks else _in_format_of(new, old)
        changed[name] = made.stored_as(old.storage)
    return trained.with_matrices(changed)


def _in_format_of(new: Weights, old: Weights) -> Weights:
    if isinstance(old, BlockCSR):
        return convert(new, "block", block=old.block)
    if isinstance(old, NM):
        return convert(new, "nm", nm=(old.n, old.m, old.axis))
    return convert(new, old.name)
