"""Magnitude pruning: single weights (block 1x1) or r x c blocks, at once or gradually while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from eventrnn.pruning.schedule import Arrays, CallOrderCheck, Masks, Pruning, cubic_schedule, is_due
from eventrnn.weights import MatrixId, check_block

SCOPES = ("matrix", "global")

STATISTICS = ("max", "mean", "l2")

#: how the three gates of a layer's matrix share a mask: one grid over all rows, a share within each, the same mask
GATES = ("all", "each", "shared")


def block_scores(dense: np.ndarray, block: tuple[int, int], statistic: str = "max") -> np.ndarray:
    """Importance of every r x c block, (ceil(n_pre / r), ceil(n_post / c)); padding counts as 0.

    `statistic`: "max" of |w| (Narang et al. 2017), "mean" of |w|, or "l2", the root of the sum of squares.
    """
    return _reduced(np.abs(dense), block, statistic)


def _reduced(values: np.ndarray, block: tuple[int, int], statistic: str) -> np.ndarray:
    check_block(block, values.shape)
    if statistic not in STATISTICS:
        raise ValueError(f"statistic: got {statistic!r}, need one of {', '.join(STATISTICS)}")
    if block == (1, 1):
        return values.astype(np.float64)
    tiles = to_blocks(values, block, -np.inf if statistic == "max" else 0)
    if statistic == "max":
        return tiles.max(axis=(1, 3))
    if statistic == "mean":
        there = to_blocks(np.ones(values.shape), block).sum(axis=(1, 3))
        return tiles.sum(axis=(1, 3), dtype=np.float64) / there
    return np.sqrt(np.square(tiles, dtype=np.float64).sum(axis=(1, 3)))


def magnitude_mask(
    dense: np.ndarray,
    sparsity: float,
    *,
    block: tuple[int, int] = (1, 1),
    statistic: str = "max",
    within: np.ndarray | None = None,
    allow_empty: bool = False,
) -> np.ndarray:
    """Boolean mask of the weights to keep: the `sparsity` share of blocks with the smallest score is False.

    dense       : (n_pre, n_post)
    statistic   : see `block_scores`
    within      : a mask of before; blocks that it pruned go first, so that masks only shrink
    allow_empty : whether nothing may be left

    Exactly `round(sparsity * number of blocks)` blocks are pruned, or as many as in `within`; ties go in storage order.
    A sparsity that would leave no block is refused, unless asked for. O(n log n).
    """
    masks = {} if within is None else {"matrix": within}
    options = {"block": block, "statistic": statistic, "within": masks, "allow_empty": allow_empty}
    return magnitude_masks({"matrix": dense}, sparsity, **options)["matrix"]


def magnitude_masks(
    matrices: Arrays,
    sparsity: float,
    *,
    block: tuple[int, int] = (1, 1),
    scope: str = "matrix",
    statistic: str = "max",
    gates: str = "all",
    within: Arrays | None = None,
    importance: Arrays | None = None,
    allow_empty: bool = False,
) -> Masks:
    """Masks of several matrices; `scope="matrix"` prunes the share in each, `"global"` ranks all blocks together.

    With the global scope, scores are compared in units of their matrix's root mean square, so that a matrix is not
    emptied for its scale.

    gates      : of a layer's matrices (names ending in w_in or w_rec), "all" lays one grid of blocks over the 3N rows,
                 "each" prunes the share within every gate, on a grid of its own, "shared" gives the gates one mask
    importance : what to rank by in place of |w|, a number a weight of either sign; "l2" is for magnitudes only

    Other parameters as `magnitude_mask`.
    """
    check_sparsity(sparsity, allow_empty)
    if scope not in SCOPES:
        raise ValueError(f"scope: got {scope!r}, need one of {', '.join(SCOPES)}")
    if gates not in GATES:
        raise ValueError(f"gates: got {gates!r}, need one of {', '.join(GATES)}")
    ranked = {
        name: _ranked(
            dense, block, statistic, _gates(name, gates), (within or {}).get(name), (importance or {}).get(name)
        )
        for name, dense in matrices.items()
    }
    panels = [(name, k) for name, scores in ranked.items() for k in range(len(scores))]
    masks: dict[str, list[np.ndarray]] = {name: [] for name in ranked}
    for group in [panels] if scope == "global" else [[panel] for panel in panels]:
        flat = np.concatenate([ranked[name][k].ravel() for name, k in group])
        kept = np.ones(len(flat), bool)
        kept[np.argsort(flat, kind="stable")[: round(sparsity * len(flat))]] = False
        cuts = np.cumsum([ranked[name][k].size for name, k in group])[:-1]
        for (name, k), part in zip(group, np.split(kept, cuts), strict=True):
            masks[name].append(part.reshape(ranked[name][k].shape))
    spread = {}
    for name, parts in masks.items():
        rows, columns = matrices[name].shape
        if not (allow_empty or all(part.any() for part in parts)):
            raise ValueError(
                f"sparsity: {sparsity} in blocks of {block[0]}x{block[1]} leaves nothing of {name} ({rows}x{columns}, "
                f"{sum(part.size for part in parts)} blocks); use a lower sparsity or a smaller block"
            )
        wide = [from_blocks(part, block, (rows, columns // _gates(name, gates)[0])) for part in parts]
        whole = np.concatenate(wide * (_gates(name, gates)[0] // len(wide)), axis=1)
        spread[name] = whole & within[name] if within is not None and name in within else whole
    return spread


def check_sparsity(sparsity: float, allow_empty: bool = False) -> None:
    """Refuse what is no share below 1, or up to 1 where everything may go."""
    if not (0 <= sparsity < 1 or (allow_empty and sparsity == 1)):
        raise ValueError(f"sparsity: got {sparsity}, need a share in [0, 1)")


def _gates(name: str, gates: str) -> tuple[int, bool]:
    """Into how many parts the postsynaptic rows fall, and whether these have one mask."""
    layered = MatrixId(name).gated and gates != "all"
    return (3, gates == "shared") if layered else (1, False)


def _ranked(
    dense: np.ndarray,
    block: tuple[int, int],
    statistic: str,
    gates: tuple[int, bool],
    within: np.ndarray | None,
    importance: np.ndarray | None,
) -> list[np.ndarray]:
    """Scores of each grid in units of the matrix's scale; blocks pruned before come first."""
    if importance is not None and statistic == "l2":
        raise ValueError("statistic: got 'l2', which is for magnitudes; rank by max or mean here")
    values = np.abs(dense) if importance is None else importance
    scale = float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) or 1.0
    count, shared = gates
    scores = [_reduced(part, block, statistic) / scale for part in np.split(values, count, axis=1)]
    alive = [np.ones(part.shape, bool) for part in scores]
    if within is not None:
        alive = [to_blocks(part, block).any(axis=(1, 3)) for part in np.split(within, count, axis=1)]
    if shared:
        joined = np.stack(scores)
        joined = {"max": joined.max(axis=0), "mean": joined.mean(axis=0), "l2": np.sqrt((joined**2).sum(axis=0))}
        scores, alive = [joined[statistic]], [np.logical_or.reduce(alive)]
    return [np.where(here, part, -np.inf) for here, part in zip(alive, scores, strict=True)]


def to_blocks(array: np.ndarray, block: tuple[int, int], padding: float = 0) -> np.ndarray:
    """(rows, r, columns, c) view of the array padded to whole blocks."""
    (n_pre, n_post), (r, c) = array.shape, block
    padded = np.full((-(-n_pre // r) * r, -(-n_post // c) * c), padding, array.dtype)
    padded[:n_pre, :n_post] = array
    return padded.reshape(padded.shape[0] // r, r, padded.shape[1] // c, c)


def from_blocks(scores: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """A number a block, at each of its entries: (rows, columns) to `shape`."""
    whole = np.repeat(np.repeat(scores, block[0], axis=0), block[1], axis=1)
    return np.ascontiguousarray(whole[: shape[0], : shape[1]])


@dataclass
class GradualPruning(Pruning):
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
    exempt     : of these, the ones to leave alone
    gates      : how gates share a mask (see `magnitude_masks`)
    """

    sparsity: float
    block: tuple[int, int] = (1, 1)
    start: int = 0
    end: int = 1
    every: int = 10
    scope: str = "matrix"
    statistic: str = "max"
    names: tuple[str, ...] | None = None
    exempt: tuple[str, ...] = ()
    gates: str = "all"
    _schedule: Callable[[int], float] = field(init=False, repr=False)

    def __post_init__(self):
        check_sparsity(self.sparsity)
        if self.every < 1:
            raise ValueError(f"every: got {self.every}, need a whole number >= 1")
        self._schedule = cubic_schedule(self.sparsity, self.start, self.end)

    def check(self, parameters: Arrays) -> None:
        """Refuse unknown names, blocks larger than a matrix and a sparsity that would empty one, before any work."""
        self._masks(self.sparsity, parameters, {})

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Renew `masks` in place if a change is due at this step; says whether it was."""
        if not is_due(step, self.start, self.end, self.every):
            return False
        masks.update(self._masks(self._schedule(step), parameters, masks))
        return True

    def _masks(self, sparsity: float, parameters: Arrays, masks: Mapping[str, np.ndarray]) -> Masks:
        chosen = {name: parameters[name] for name in self.matrices(parameters)}
        return magnitude_masks(
            chosen, sparsity, block=self.block, scope=self.scope, statistic=self.statistic, gates=self.gates,
            within=masks, importance=self._importance(chosen),
        )  # fmt: skip

    def _importance(self, parameters: Arrays) -> Arrays | None:
        """What to rank by in place of |w|."""
        return None


@dataclass
class MovementPruning(GradualPruning, CallOrderCheck):
    """Gradual pruning of the weights that training moves towards zero (Sanh et al. 2020): ranked by the running sum of
    `-w dL/dw`, taken after each step, in place of |w|. Blocks by "max" or "mean". Masks only shrink, unlike theirs.

    Nothing has moved at the first step: let `start` come some steps later.
    """

    _scores: dict[str, np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """As `GradualPruning`. Raises RuntimeError where steps were made of which it was not told."""
        self.note_update()
        return super().update(step, parameters, masks)

    def after_step(self, step: int, parameters: Arrays, masks: Masks, gradients: Arrays, rate: float) -> None:
        """Add this step's movement."""
        self.note_step()
        for name in self.matrices(parameters):
            moved = gradients[name] * parameters[name]
            self._scores[name] = self._scores[name] - moved if name in self._scores else -moved

    def arrays(self) -> dict[str, np.ndarray]:
        """The scores so far."""
        return dict(self._scores)

    def restore(self, arrays: Arrays) -> None:
        """Go on with these scores."""
        self._scores = {name: array.copy() for name, array in arrays.items()}

    def _importance(self, parameters: Arrays) -> Arrays | None:
        return self._scores or None
