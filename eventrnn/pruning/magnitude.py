"""Magnitude pruning: single weights (block 1x1) or r x c blocks, at once or gradually while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from eventrnn.network import Network
from eventrnn.weights import Weights, check_block, convert


def block_scores(dense: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Largest |w| of every r x c block (Narang et al. 2017), (ceil(n_pre / r), ceil(n_post / c)); padding is 0."""
    check_block(block, dense.shape)
    return _tiles(np.abs(dense), block).max(axis=(1, 3))


def magnitude_mask(
    dense: np.ndarray, sparsity: float, *, block: tuple[int, int] = (1, 1), within: np.ndarray | None = None
) -> np.ndarray:
    """Boolean mask of the weights to keep: the `sparsity` share of blocks with the smallest score is False.

    dense  : (n_pre, n_post)
    within : a mask of before; blocks that it pruned go first, so that masks only shrink

    Exactly `round(sparsity * number of blocks)` blocks are pruned; ties go in storage order. A sparsity that would
    leave no block is refused. O(n log n).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity}, need a share in [0, 1)")
    scores = block_scores(dense, block)
    pruned = round(sparsity * scores.size)
    if pruned >= scores.size:
        raise ValueError(
            f"sparsity: {sparsity} of {scores.size} blocks {block[0]}x{block[1]} leaves none of a "
            f"{dense.shape[0]}x{dense.shape[1]} matrix; use a lower sparsity or a smaller block"
        )
    if within is not None:
        scores = np.where(_tiles(within, block).any(axis=(1, 3)), scores, -1)
    kept = np.ones(scores.size, bool)
    kept[np.argsort(scores.ravel(), kind="stable")[:pruned]] = False
    whole = np.repeat(np.repeat(kept.reshape(scores.shape), block[0], axis=0), block[1], axis=1)
    return np.ascontiguousarray(whole[: dense.shape[0], : dense.shape[1]])


def cubic_schedule(final: float, start: int, end: int, *, initial: float = 0.0) -> Callable[[int], float]:
    """Sparsity over steps: `initial` until `start`, `final` from `end` on, fast first and slow last between
    (Zhu and Gupta 2017, eq. 1)."""
    if not 0 <= start < end:
        raise ValueError(f"pruning schedule: got start {start} and end {end}, need 0 <= start < end")

    def at(step: int) -> float:
        left = 1 - min(1.0, max(0.0, (step - start) / (end - start)))
        return final + (initial - final) * left**3

    return at


@dataclass
class GradualPruning:
    """Masks that grow along a cubic schedule while training.

    Attributes
    ----------
    sparsity   : share of blocks pruned at the end, in [0, 1)
    block      : (r, c), presynaptic x postsynaptic
    start, end : steps between which the masks grow
    every      : steps between two changes
    names      : which matrices; None for all weights of layers and an untied read-out
    """

    sparsity: float
    block: tuple[int, int] = (1, 1)
    start: int = 0
    end: int = 1
    every: int = 10
    names: tuple[str, ...] | None = None
    _schedule: Callable[[int], float] = field(init=False, repr=False)

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: got {self.sparsity}, need a share in [0, 1)")
        if self.every < 1:
            raise ValueError(f"every: got {self.every}, need a whole number >= 1")
        self._schedule = cubic_schedule(self.sparsity, self.start, self.end)

    def matrices(self, parameters: Mapping[str, np.ndarray]) -> tuple[str, ...]:
        return self.names or tuple(name for name in parameters if prunable(name))

    def check(self, parameters: Mapping[str, np.ndarray]) -> None:
        """Refuse unknown names, blocks larger than a matrix and a sparsity that would empty one, before any work."""
        for name in self.matrices(parameters):
            if name not in parameters:
                raise ValueError(f"pruning: no matrix {name!r}; have {', '.join(filter(prunable, parameters))}")
            magnitude_mask(parameters[name], self.sparsity, block=self.block)

    def update(self, step: int, parameters: Mapping[str, np.ndarray], masks: dict[str, np.ndarray]) -> bool:
        """Renew `masks` in place if a change is due at this step; says whether it was."""
        due = self.start <= step <= self.end and (step - self.start) % self.every == 0
        if not due and step != self.end:
            return False
        for name in self.matrices(parameters):
            sparsity = self._schedule(step)
            masks[name] = magnitude_mask(parameters[name], sparsity, block=self.block, within=masks.get(name))
        return True


def prunable(name: str) -> bool:
    """Whether a parameter is a weight matrix that pruning takes by default."""
    return name.endswith(("w_in", "w_rec")) or name == "readout"


def prune(
    network: Network, sparsity: float, *, block: tuple[int, int] = (1, 1), names: tuple[str, ...] | None = None
) -> Network:
    """The network with the smallest blocks of each matrix removed at once, in CSR (1x1) or block format.

    A tied read-out is left alone: its weights are the embedding's. Matrices not named keep their bits.
    """
    matrices = network.matrices()
    chosen = names or tuple(n for n in matrices if not (n == "readout" and network.readout and network.readout.tied))
    unknown = [name for name in chosen if name not in matrices]
    if unknown:
        raise ValueError(f"pruning: no matrix {unknown[0]!r}; have {', '.join(matrices)}")
    pruned: dict[str, Weights] = {}
    for name in chosen:
        dense = matrices[name].to_dense()
        pruned[name] = compress(dense * magnitude_mask(dense, sparsity, block=block), block)
    return network.with_matrices(pruned)


def compress(dense: np.ndarray, block: tuple[int, int]) -> Weights:
    """A pruned matrix in the format of its blocks: CSR for 1x1, else block."""
    return convert(dense, "csr") if block == (1, 1) else convert(dense, "block", block=block)


def _tiles(array: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """(rows, r, columns, c) view of the array padded with zeros to whole blocks."""
    (n_pre, n_post), (r, c) = array.shape, block
    padded = np.zeros((-(-n_pre // r) * r, -(-n_post // c) * c), array.dtype)
    padded[:n_pre, :n_post] = array
    return padded.reshape(padded.shape[0] // r, r, padded.shape[1] // c, c)
