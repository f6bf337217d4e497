"""Magnitude pruning of single weights (1x1 blocks) or r x c blocks, in one step or gradually during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eventrnn._checks import (
    check_finite,
    need_choice,
    need_flag,
    need_kind,
    need_mask,
    need_names,
    need_number,
    need_pair,
    need_whole,
    number_array,
)
from eventrnn.pruning.schedule import EMBEDDING, Arrays, CallOrderCheck, Masks, Pruning, cubic_schedule, is_due
from eventrnn.weights import MatrixId, check_block

#: "matrix" prunes the same share of every matrix, "global" ranks the blocks of all matrices together, "column" prunes
#: the same share of every column of blocks, so that each postsynaptic unit (or group of them) keeps as many.
SCOPES = ("matrix", "global", "column")

#: Score of a block: largest magnitude, mean magnitude, or root of the sum of squares.
STATISTICS = ("max", "mean", "l2")

#: Masks of the gates of a layer's matrix: one grid of blocks over all gates, one grid per gate with the same
#: share pruned in each, or one mask for all gates.
GATES = ("all", "each", "shared")


def block_scores(dense: np.ndarray, block: tuple[int, int], statistic: str = "max") -> np.ndarray:
    """Score of every r x c block of a matrix (n_pre, n_post): (ceil(n_pre / r), ceil(n_post / c)).

    statistic : "max" of |w| (Narang et al. 2017), "mean" of |w|, or "l2", the root of the sum of squares

    Blocks at an edge are scored by the entries that they have. Raises ValueError for a block larger than the matrix,
    for an unknown statistic, and for what is not a matrix of finite numbers.
    """
    return _reduced(np.abs(_matrix("weights", dense)), block, statistic)


def _matrix(name: str, dense: np.ndarray) -> np.ndarray:
    """The array itself, if it is a plain matrix of finite numbers. Raises ValueError."""
    array = number_array(name, dense, "(n_pre, n_post)", ndim=2)
    check_finite(name, array)
    return array


def check_blocks(matrices: Arrays, block: tuple[int, int]) -> None:
    """Raise ValueError for a block larger than a matrix, with the name of the matrix and the way out."""
    for name, array in matrices.items():
        check_block(block, array.shape, name)


def _reduced(values: np.ndarray, block: tuple[int, int], statistic: str) -> np.ndarray:
    check_block(block, values.shape)
    need_choice("statistic", statistic, STATISTICS)
    if tuple(block) == (1, 1):
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
    """Boolean mask of the weights to keep; it is False in the blocks with the smallest scores.

    Parameters
    ----------
    dense       : (n_pre, n_post)
    sparsity    : share of blocks to prune, in [0, 1)
    block       : (r, c), presynaptic x postsynaptic
    statistic   : see `block_scores`
    within      : an earlier mask; its pruned blocks are pruned first and stay pruned
    allow_empty : allow a mask that keeps nothing

    Exactly `round(sparsity * number of blocks)` blocks are pruned, or more if `within` has more; equal scores are
    ordered by position. Raises ValueError for a sparsity that leaves no block, unless `allow_empty`. Cost: O(n).
    """
    check_block(block, _matrix("matrix", dense).shape)
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
    """Masks of several matrices by magnitude.

    Parameters
    ----------
    matrices   : name -> (n_pre, n_post)
    scope      : "matrix" prunes the share of blocks in each matrix; "global" ranks the blocks of all matrices together,
                 with scores divided by the root mean square of their matrix, so that the scale of a matrix does not
                 matter; "column" prunes the share in each column of blocks, so that each word of a read-out keeps as
                 many weights as any other, however small they are
    gates      : for matrices of layers (names that end in w_in or w_rec): "all" is one grid of blocks over all
                 gate rows, "each" prunes the share in every gate on its own grid, "shared" gives all gates the same
                 mask. "each" and "shared" need names that state the number of gates: those of `Network.matrices`, or
                 `MatrixId(name, gates)`
    importance : name -> numbers of either sign that rank the weights in place of |w|; not with "l2"
    others     : see `magnitude_mask`

    A matrix named `embedding` (V, E) is ranked as the read-out that is tied to it: blocks and columns are those of its
    transpose. Its mask has its own shape. Raises ValueError for an unknown option, for a name that does not state its
    gates where they matter, for a number of gate rows that the number of gates does not divide, and for a sparsity that
    leaves no block of a matrix, unless `allow_empty`.
    """
    need_flag("allow_empty", allow_empty)
    check_sparsity(sparsity, allow_empty)
    need_choice("scope", scope, SCOPES)
    need_choice("gates", gates, GATES)
    need_choice("statistic", statistic, STATISTICS)
    need_kind("matrices", matrices, Mapping, "a mapping of names to arrays (n_pre, n_post)")
    if not matrices:
        raise ValueError("matrices: got none, need at least one")
    matrices = {name: _matrix(name, dense) for name, dense in matrices.items()}
    within = {name: need_mask(f"within {name}", mask, matrices[name].shape) for name, mask in _given(within, matrices)}
    importance = {name: _matrix(f"importance {name}", each) for name, each in _given(importance, matrices)}
    matrices, within, importance = (_upright(each) for each in (matrices, within, importance))
    check_blocks(matrices, block)
    for name, dense in matrices.items():
        gate_rows(name, dense.shape[1], _gates(name, gates)[0])
    ranked = {
        name: _ranked(dense, block, statistic, _gates(name, gates), within.get(name), importance.get(name))
        for name, dense in matrices.items()
    }
    panels = [(name, k) for name, scores in ranked.items() for k in range(len(scores))]
    masks: dict[str, list[np.ndarray]] = {name: [] for name in ranked}
    for group in [panels] if scope == "global" else [[panel] for panel in panels]:
        if scope == "column":
            (name, k) = group[0]
            columns = np.ascontiguousarray(ranked[name][k].T)
            masks[name].append(~_smallest(columns, round(sparsity * columns.shape[1])).T)
            continue
        flat = np.concatenate([ranked[name][k].ravel() for name, k in group])
        kept = ~_smallest(flat[None], round(sparsity * len(flat)))[0]
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
        spread[name] = whole & within[name] if name in within else whole
    return _upright(spread)


def _upright(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with an embedding transposed, to the read-out that is tied to it and back."""
    return {name: np.ascontiguousarray(a.T) if name == EMBEDDING else a for name, a in arrays.items()}


def _smallest(scores: np.ndarray, count: int) -> np.ndarray:
    """Where the `count` smallest scores of each row of (rows, n) are, as booleans; the first of equal ones. O(size)."""
    if not count:
        return np.zeros(scores.shape, bool)
    limit = np.partition(scores, count - 1, axis=1)[:, count - 1, None]
    smallest, equal = scores < limit, scores == limit
    left = count - np.count_nonzero(smallest, axis=1)
    for row in np.flatnonzero(np.count_nonzero(equal, axis=1) > left):
        equal[row, np.flatnonzero(equal[row])[left[row] :]] = False
    return np.logical_or(smallest, equal, out=smallest)


def _given(arrays: Arrays | None, matrices: Arrays) -> list[tuple[str, np.ndarray]]:
    """Names and arrays of those that belong to the matrices."""
    return [(name, array) for name, array in (arrays or {}).items() if name in matrices]


def check_sparsity(sparsity: float, allow_empty: bool = False) -> None:
    """Raise ValueError unless 0 <= sparsity < 1; with `allow_empty` 1 is allowed."""
    if not allow_empty:
        need_number("sparsity", sparsity, at_least=0, below=1, what="share")
    need_number("sparsity", sparsity, at_least=0, at_most=1, what="share")


def check_choices(settings: Any) -> None:
    """Raise ValueError or TypeError for the fields that pruning methods share, where a method has them."""
    need_pair("block", getattr(settings, "block", (1, 1)), "two sizes >= 1 (presynaptic x postsynaptic)")
    for name, known in (("scope", SCOPES), ("statistic", STATISTICS), ("gates", GATES)):
        need_choice(name, getattr(settings, name, known[0]), known)
    for name in ("names", "exempt"):
        if (value := getattr(settings, name, None)) is not None:
            need_names(name, value)


def _gates(name: str, gates: str) -> tuple[int, bool]:
    """Number of parts into which the postsynaptic rows are divided, and whether these share one mask."""
    rows = MatrixId(name).gates if gates != "all" else 1
    return (rows, gates == "shared") if rows > 1 else (1, False)


def gate_rows(name: str, n_post: int, gates: int) -> int:
    """The number of postsynaptic rows of one gate. Raises ValueError where `gates` does not divide all of them."""
    if n_post % gates:
        raise ValueError(
            f"gates: the {n_post} gate rows of {name} are not those of {gates} gates; take the name from "
            "Network.matrices, which states their number, or one grid of blocks over all gates: gates='all'"
        )
    return n_post // gates


def _ranked(
    dense: np.ndarray,
    block: tuple[int, int],
    statistic: str,
    gates: tuple[int, bool],
    within: np.ndarray | None,
    importance: np.ndarray | None,
) -> list[np.ndarray]:
    """Scores of each grid of blocks divided by the root mean square of the matrix; -inf for blocks pruned before."""
    if importance is not None and statistic == "l2":
        raise ValueError("statistic: got 'l2', which is for magnitudes; rank by max or mean here")
    values = np.abs(dense) if importance is None else importance
    scale = float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) or 1.0
    count, shared = gates
    scores = [_reduced(part, block, statistic) / scale for part in np.split(values, count, axis=1)]
    alive = [np.ones(part.shape, bool) for part in scores]
    if within is not None:
        parts = np.split(within, count, axis=1)
        alive = parts if tuple(block) == (1, 1) else [to_blocks(part, block).any(axis=(1, 3)) for part in parts]
    if shared:
        joined = np.stack(scores)
        joined = {"max": joined.max(axis=0), "mean": joined.mean(axis=0), "l2": np.sqrt((joined**2).sum(axis=0))}
        scores, alive = [joined[statistic]], [np.logical_or.reduce(alive)]
    return [np.where(here, part, -np.inf) for here, part in zip(alive, scores, strict=True)]


def to_blocks(array: np.ndarray, block: tuple[int, int], padding: float = 0) -> np.ndarray:
    """The array padded to whole blocks, as (rows of blocks, r, columns of blocks, c)."""
    (n_pre, n_post), (r, c) = array.shape, block
    padded = np.full((-(-n_pre // r) * r, -(-n_post // c) * c), padding, array.dtype)
    padded[:n_pre, :n_post] = array
    return padded.reshape(padded.shape[0] // r, r, padded.shape[1] // c, c)


def from_blocks(scores: np.ndarray, block: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Repeat one number per block over the entries of the block; the inverse of a reduction of `to_blocks`."""
    if tuple(block) == (1, 1):
        return np.array(scores, order="C")
    whole = np.repeat(np.repeat(scores, block[0], axis=0), block[1], axis=1)
    return np.ascontiguousarray(whole[: shape[0], : shape[1]])


@dataclass
class GradualPruning(Pruning):
    """Magnitude pruning during training, with a sparsity that rises along a cubic schedule (Zhu and Gupta 2017).

    Attributes
    ----------
    sparsity      : share of blocks that is pruned at the end, in [0, 1)
    block         : (r, c), presynaptic x postsynaptic
    start, end    : first and last step of the schedule. By default (0, 1) all is pruned at step 1
    every         : steps between two changes
    scope, gates  : see `magnitude_masks`
    statistic     : score of a block, see `block_scores`
    names, exempt : see `Pruning`; `names` may hold the tied matrix, "embedding"
    """

    prunes_tied = True

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
        check_choices(self)
        need_whole("every", self.every, at_least=1)
        self._schedule = cubic_schedule(self.sparsity, self.start, self.end)

    def check(self, parameters: Arrays) -> None:
        """Raise ValueError for unknown names, a block larger than a matrix and a sparsity that empties a matrix."""
        self._masks(self.sparsity, parameters, {})

    def acts(self, step: int) -> bool:
        """Whether a change is due at this step."""
        return is_due(step, self.start, self.end, self.every)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Update `masks` in place if a change is due at this step. Returns whether it was."""
        if not self.acts(step):
            return False
        masks.update(self._masks(self._schedule(step), parameters, masks))
        return True

    def _masks(self, sparsity: float, parameters: Arrays, masks: Mapping[str, np.ndarray]) -> Masks:
        chosen = {name: parameters[name] for name in self.matrices(parameters)}
        return magnitude_masks(
            chosen,
            sparsity,
            block=self.block,
            scope=self.scope,
            statistic=self.statistic,
            gates=self.gates,
            within=masks,
            importance=self._importance(chosen),
        )

    def _importance(self, parameters: Arrays) -> Arrays | None:
        """Numbers that rank the weights in place of |w|, or None."""
        return None


@dataclass
class MovementPruning(GradualPruning, CallOrderCheck):
    """Movement pruning (Sanh et al. 2020): weights are ranked by the running sum of `-w dL/dw` in place of |w|.

    The sum is taken after each optimiser step, and is small for weights that training moves towards zero. The statistic
    is "max" or "mean". Unlike in the paper, a pruned weight stays pruned. The sum is zero at the first step, so `start`
    should be some steps later. Attributes: see `GradualPruning`.
    """

    _scores: dict[str, np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """See `GradualPruning`. Raises RuntimeError if the training loop did not call `after_step`."""
        self.note_update()
        return super().update(step, parameters, masks)

    def after_step(self, step: int, parameters: Arrays, masks: Masks, gradients: Arrays, rate: float) -> None:
        """Add the movement of this step to the scores."""
        self.note_step()
        for name in self.matrices(parameters):
            moved = gradients[name] * parameters[name]
            self._scores[name] = self._scores[name] - moved if name in self._scores else -moved

    def arrays(self) -> dict[str, np.ndarray]:
        """The scores."""
        return dict(self._scores)

    def restore(self, arrays: Arrays) -> None:
        """Restore the scores."""
        self._scores = {name: array.copy() for name, array in arrays.items()}

    def _importance(self, parameters: Arrays) -> Arrays | None:
        return self._scores or None
