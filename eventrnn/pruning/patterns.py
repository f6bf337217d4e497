"""What a mask may look like, and networks pruned to it at once, in the format that stores it.

A pattern says which weights of a matrix stay, and in which format they are kept. Pruning changes no storage: what was
bfloat16 or int8 stays so, code by code.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from eventrnn.network import Network
from eventrnn.pruning.magnitude import GATES, STATISTICS, check_sparsity, magnitude_masks
from eventrnn.pruning.nm import METHODS, nm_mask, transposable_mask
from eventrnn.pruning.schedule import choose
from eventrnn.weights import NM, BlockCSR, Weights, check_nm, convert


class Pattern(ABC):
    """Which weights of a matrix stay."""

    @abstractmethod
    def mask(self, name: str, dense: np.ndarray) -> np.ndarray:
        """True where a weight stays; the shape of `dense` (n_pre, n_post). `name` as in `Network.matrices()`.

        Raises ValueError where the matrix cannot have this pattern.
        """

    @abstractmethod
    def store(self, weights: Weights | np.ndarray) -> Weights:
        """Weights that have this pattern, in its format; storage and scales stay."""


@dataclass(frozen=True)
class Blocks(Pattern):
    """A share of the blocks of each matrix pruned by magnitude, as `magnitude_masks`: CSR for 1x1, else blocks."""

    sparsity: float
    block: tuple[int, int] = (1, 1)
    statistic: str = "max"
    gates: str = "all"

    def __post_init__(self):
        check_sparsity(self.sparsity)
        for name, value, known in (("statistic", self.statistic, STATISTICS), ("gates", self.gates, GATES)):
            if value not in known:
                raise ValueError(f"{name}: got {value!r}, need one of {', '.join(known)}")

    def __str__(self) -> str:
        return f"{self.sparsity:.0%} of {self.block[0]}x{self.block[1]}"

    def mask(self, name: str, dense: np.ndarray) -> np.ndarray:
        """The largest blocks."""
        return magnitude_masks(
            {name: dense}, self.sparsity, block=self.block, statistic=self.statistic, gates=self.gates
        )[name]

    def store(self, weights: Weights | np.ndarray) -> Weights:
        """CSR or blocks."""
        return compress(weights, self.block)


@dataclass(frozen=True)
class NofM(Pattern):
    """At most n of each m: along "post", "pre" or "both" (transposable), in the NM format.

    A transposable mask is stored along "post"; `NM.transposed()` is then legal as well. method, threads: of
    `transposable_mask`.
    """

    n: int
    m: int
    axis: str = "post"
    method: str = "exact"
    threads: int = 1

    def __post_init__(self):
        check_nm(self.n, self.m, "post" if self.axis == "both" else self.axis)
        if self.method not in METHODS:
            raise ValueError(f"method: got {self.method!r}, need one of {', '.join(METHODS)}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m} {self.axis}"

    def mask(self, name: str, dense: np.ndarray) -> np.ndarray:
        """The largest of each group, or the heaviest transposable mask."""
        if self.axis == "both":
            return transposable_mask(dense, self.n, self.m, method=self.method, threads=self.threads)
        return nm_mask(dense, self.n, self.m, self.axis, threads=self.threads)

    def store(self, weights: Weights | np.ndarray) -> Weights:
        """N of each M."""
        return convert(weights, "nm", nm=(self.n, self.m, "post" if self.axis == "both" else self.axis))


#: Axes of an N:M pattern. "both" is a transposable mask; the `NM` weight format itself has only the other two.
NM_AXES = ("post", "pre", "both")


def parse_nm(text: str, axes: tuple[str, ...] = NM_AXES) -> tuple[int, int, str]:
    """Read N:M or N:M:AXIS, the way an N:M pattern is written in text: (4, 8, "both") from "4:8:both".

    axes : the axes that are allowed here; without an axis in the text it is "post"

    Raises ValueError for any other text, and for an N and M that the `NM` format does not have.
    """
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
    """A pruned matrix in the format of its blocks: CSR for 1x1, else block. Storage and scales stay."""
    return convert(weights, "csr") if block == (1, 1) else convert(weights, "block", block=block)


def masked(weights: Weights, mask: np.ndarray) -> Weights:
    """The weights where the mask holds, zero elsewhere, as dense weights of the same storage and scales."""
    if mask.shape != weights.shape:
        raise ValueError(f"mask: got shape {mask.shape}, need that of the weights, {weights.shape}")
    dense = convert(weights, "dense")
    return replace(dense, values=np.where(mask, dense.values, dense.values.dtype.type(0)))  # type: ignore[type-var]


def prunable_matrices(
    network: Network, names: tuple[str, ...] | None = None, exempt: tuple[str, ...] = ()
) -> dict[str, Weights]:
    """The matrices of a network that are to be pruned: those named, or all but a tied read-out; not those exempt.

    Raises ValueError for names that there are not, and for a tied read-out, whose weights are the embedding's.
    """
    matrices = network.matrices()
    tied = network.readout is not None and network.readout.tied
    if tied and "readout" in (names or ()):
        raise ValueError("pruning: the read-out is tied to the embedding and cannot be pruned; leave it out")
    there = [name for name in matrices if not (tied and name == "readout")]
    return {name: matrices[name] for name in choose(there, names, exempt)}


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
    """The network with the smallest blocks removed at once, in CSR (1x1) or block format.

    A tied read-out is left alone: its weights are the embedding's. Matrices not named, and those exempt, keep their
    record. Storage stays as it is. Parameters as `magnitude_masks`, `names` and `exempt` as `Pruning`.
    """
    matrices = prunable_matrices(network, names, exempt)
    dense = {name: weights.to_dense() for name, weights in matrices.items()}
    masks = magnitude_masks(dense, sparsity, block=block, scope=scope, statistic=statistic, gates=gates)
    return with_masks(network, masks, Blocks(sparsity, block))


def prune_to(
    network: Network, pattern: Pattern, *, names: tuple[str, ...] | None = None, exempt: tuple[str, ...] = ()
) -> Network:
    """The network with its matrices pruned to a pattern by magnitude, in the pattern's format. As `prune`."""
    matrices = prunable_matrices(network, names, exempt)
    return with_masks(network, {name: pattern.mask(name, w.to_dense()) for name, w in matrices.items()}, pattern)


def with_masks(network: Network, masks: Mapping[str, np.ndarray], pattern: Pattern) -> Network:
    """The network with only the weights that masks keep, in the pattern's format; other matrices keep their record.

    masks : name -> boolean array, as `Model.masks` holds them after training
    """
    matrices = network.matrices()
    unknown = set(masks) - set(matrices)
    if unknown:
        raise ValueError(f"masks: no {', '.join(sorted(unknown))}; have {', '.join(matrices)}")
    return network.with_matrices({name: pattern.store(masked(matrices[name], mask)) for name, mask in masks.items()})


def after_training(trained: Network, before: Network, masks: Mapping[str, np.ndarray], pattern: Pattern) -> Network:
    """What a trainer returns, dense and float32, in the formats and storages of before, but for what it pruned.

    trained : weights that masks leave out are zero
    masks   : of the matrices that were pruned, which take the pattern's format

    Narrow weights have moved, so int8 takes new scales.
    """
    changed = {}
    for name, old in before.matrices().items():
        if trained.readout is not None and trained.readout.tied and name == "readout":
            continue
        new = trained.matrices()[name]
        made = pattern.store(masked(new, masks[name])) if name in masks else _in_format_of(new, old)
        changed[name] = made.stored_as(old.storage)
    return trained.with_matrices(changed)


def _in_format_of(new: Weights, old: Weights) -> Weights:
    if isinstance(old, BlockCSR):
        return convert(new, "block", block=old.block)
    if isinstance(old, NM):
        return convert(new, "nm", nm=(old.n, old.m, old.axis))
    return convert(new, old.name)
