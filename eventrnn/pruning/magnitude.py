"""Magnitude pruning: single weights (block 1x1) or r x c blocks, at once or gradually while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from eventrnn.network import Network
from eventrnn.weights import Weights, check_block, convert

SCOPES = ("matrix", "global")
STATISTICS = ("max", "mean", "l2")


def block_scores(dense: np.ndarray, block: tuple[int, int], statistic: str = "max") -> np.ndarray:
    """Importance of every r x c block, (ceil(n_pre / r), ceil(n_post / c)); padding counts as 0.

    `statistic`: "max" of |w| (Narang et al. 2017), "mean" of |w|, or "l2", the root of the sum of squares.
    """
    check_block(block, dense.shape)
    if statistic not in STATISTICS:
        raise ValueError(f"statistic: got {statistic!r}, need one of {', '.join(STATISTICS)}")
    tiles = _tiles(np.abs(dense), block)
    if statistic == "max":
        return tiles.max(axis=(1, 3))
    if statistic == "mean":
        return tiles.mean(axis=(1, 3), dtype=np.float64)
    return np.sqrt(np.square(tiles, dtype=np.float64).sum(axis=(1, 3)))


def magnitude_mask(
    dense: np.ndarray,
    sparsity: float,
    *,
    block: tuple[int, int] = (1, 1),
    statistic: str = "max",
    within: np.ndarray | None = None,
) -> np.ndarray:
    """Boolean mask of the weights to keep: the `sparsity` share of blocks with the smallest score is False.

    dense     : (n_pre, n_post)
    statistic : see `block_scores`
    within    : a mask of before; blocks that it pruned go first, so that masks only shrink

    Exactly `round(sparsity * number of blocks)` blocks are pruned, or as many as in `within`; ties go in storage order.
    A sparsity that would leave no block is refused. O(n log n).
    """
    masks = {} if within is None else {"matrix": within}
    return magnitude_masks({"matrix": dense}, sparsity, block=block, statistic=statistic, within=masks)["matrix"]


def magnitude_masks(
    matrices: Mapping[str, np.ndarray],
    sparsity: float,
    *,
    block: tuple[int, int] = (1, 1),
    scope: str = "matrix",
    statistic: str = "max",
    within: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Masks of several matrices; `scope="matrix"` prunes the share in each, `"global"` ranks all blocks together.

    With the global scope, scores are compared in units of their matrix's root mean square, so that a matrix is not
    emptied for its scale. Other parameters as `magnitude_mask`.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity}, need a share in [0, 1)")
    if scope not in SCOPES:
        raise ValueError(f"scope: got {scope!r}, need one of {', '.join(SCOPES)}")
    scores = {name: _ranked(dense, block, statistic, (within or {}).get(name)) for name, dense in matrices.items()}
    groups = [[name] for name in scores] if scope == "matrix" else [list(scores)]
    masks = {}
    for names in groups:
        flat = np.concatenate([scores[name].ravel() for name in names])
        kept = np.ones(len(flat), bool)
        kept[np.argsort(flat, kind="stable")[: round(sparsity * len(flat))]] = False
        cuts = np.cumsum([scores[name].size for name in names])[:-1]
        for name, part in zip(names, np.split(kept, cuts), strict=True):
            if not part.any():
                rows, columns = matrices[name].shape
                raise ValueError(
                    f"sparsity: {sparsity} in blocks of {block[0]}x{block[1]} leaves nothing of {name} "
                    f"({rows}x{columns}, {part.size} blocks); use a lower sparsity or a smaller block"
                )
            masks[name] = _spread(part.reshape(scores[name].shape), block, matrices[name].shape)
            if within is not None and name in within:
                masks[name] &= within[name]
    return masks


def _ranked(dense: np.ndarray, block: tuple[int, int], statistic: str, within: np.ndarray | None) -> np.ndarray:
    """Scores in units of the matrix's scale; blocks pruned before come first."""
    scale = float(np.sqrt(np.mean(np.square(dense, dtype=np.float64)))) or 1.0
    scores = block_scores(dense, block, statistic) / scale
    return scores if within is None else np.where(_tiles(within, block).any(axis=(1, 3)), scores, -1)


def _spread(kept: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    whole = np.repeat(np.repeat(kept, block[0], axis=0), block[1], axis=1)
    return np.ascontiguousarray(whole[: shape[0], : shape[1]])


def cubic_schedule(final: float, start: int, end: int, *, initial: float = 0.0) -> Callable[[int], float]:
    """Sparsity over steps: `initial` until `start`, `final` from `end` on, fast first and slow last between
    (Zhu and Gupta 2017, eq. 1)."""
    if not 0 <= start < end:
        raise ValueError(f"pruning schedule: got start {start} and end {end}, need 0 <= start < end")

    def at(step: int) -> float:
        left = 1 - min(1.0, max(0.0, (step - start) / (end - start)))
        return initial * left**3 + final * (1 - left**3)

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
    scope      : "matrix" prunes the share in each matrix, "global" over all of them (see `magnitude_masks`)
    statistic  : what a block is ranked by (see `block_scores`)
    names      : which matrices; None for all weights of layers and an untied read-out
    """

    sparsity: float
    block: tuple[int, int] = (1, 1)
    start: int = 0
    end: int = 1
    every: int = 10
    scope: str = "matrix"
    statistic: str = "max"
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
        self._masks(self.sparsity, parameters, {})

    def update(self, step: int, parameters: Mapping[str, np.ndarray], masks: dict[str, np.ndarray]) -> bool:
        """Renew `masks` in place if a change is due at this step; says whether it was."""
        due = self.start <= step <= self.end and (step - self.start) % self.every == 0
        if not due and step != self.end:
            return False
        masks.update(self._masks(self._schedule(step), parameters, masks))
        return True

    def _masks(self, sparsity: float, parameters: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray]) -> dict:
        chosen = {name: parameters[name] for name in self.matrices(parameters)}
        return magnitude_masks(
            chosen, sparsity, block=self.block, scope=self.scope, statistic=self.statistic, within=masks
        )


def prunable(name: str) -> bool:
    """Whether a parameter is a weight matrix that pruning takes by default."""
    return name.endswith(("w_in", "w_rec")) or name == "readout"


def prune(
    network: Network,
    sparsity: float,
    *,
    block: tuple[int, int] = (1, 1),
    scope: str = "matrix",
    statistic: str = "max",
    names: tuple[str, ...] | None = None,
) -> Network:
    """The network with the smallest blocks removed at once, in CSR (1x1) or block format.

    A tied read-out is left alone: its weights are the embedding's. Matrices not named keep their bits; those pruned
    hold float32 values, whatever their storage was. Parameters as `magnitude_masks`.
    """
    matrices = network.matrices()
    chosen = names or tuple(n for n in matrices if not (n == "readout" and network.readout and network.readout.tied))
    unknown = [name for name in chosen if name not in matrices]
    if unknown:
        raise ValueError(f"pruning: no matrix {unknown[0]!r}; have {', '.join(matrices)}")
    dense = {name: matrices[name].to_dense() for name in chosen}
    masks = magnitude_masks(dense, sparsity, block=block, scope=scope, statistic=statistic)
    return network.with_matrices({name: compress(dense[name] * masks[name], block) for name in chosen})


def compress(dense: np.ndarray, block: tuple[int, int]) -> Weights:
    """A pruned matrix in the format of its blocks: CSR for 1x1, else block."""
    return convert(dense, "csr") if block == (1, 1) else convert(dense, "block", block=block)


def _tiles(array: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """(rows, r, columns, c) view of the array padded with zeros to whole blocks."""
    (n_pre, n_post), (r, c) = array.shape, block
    padded = np.zeros((-(-n_pre // r) * r, -(-n_post // c) * c), array.dtype)
    padded[:n_pre, :n_post] = array
    return padded.reshape(padded.shape[0] // r, r, padded.shape[1] // c, c)
