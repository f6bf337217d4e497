"""N:M masks: at most n weights of each m consecutive places, along outputs, along units, or along both.

Groups and tiles lie on a grid from entry [0, 0]; at an edge they have fewer members. Of a *transposable* mask every
m x m tile of the matrix keeps at most n in each of its rows and columns, so that the matrix and its transpose are both
N:M: the product of the forward pass and that of the input gradient (Hubara et al. 2021). A tile is a piece of the
matrix in both directions, not m^2 consecutive weights of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from math import comb, factorial, prod
from typing import Any

import numpy as np

from eventrnn.events import check_finite
from eventrnn.pruning.kernels import mask_kernels
from eventrnn.weights import check_nm

#: how to find a transposable mask
METHODS = ("exact", "greedy")

# Every mask of a tile of this size or less is tried: 186 for 2:4, of which 90 keep exactly two everywhere.
ENUMERATED = 4


def nm_mask(dense: np.ndarray, n: int, m: int, axis: str = "post", *, threads: int = 1) -> np.ndarray:
    """Keep the n largest magnitudes of each m consecutive outputs of a unit ("post") or units of an output ("pre").

    dense : (n_pre, n_post), finite; the mask has its shape. Of equals the later ones are kept. A last group of g < m
    members keeps min(n, g). O(size * m). Raises ValueError for an n, m or axis that the `NM` format cannot have.
    """
    check_nm(n, m, axis)
    magnitudes = _magnitudes(dense)
    lines = magnitudes if axis == "post" else np.ascontiguousarray(magnitudes.T)
    kept = np.empty(lines.shape, bool)
    _shared(mask_kernels.keep_of_groups, len(lines), threads, n, m, lines, kept)
    return kept if axis == "post" else np.ascontiguousarray(kept.T)


def transposable_mask(dense: np.ndarray, n: int, m: int, *, method: str = "exact", threads: int = 1) -> np.ndarray:
    """Keep at most n in every row and column of every m x m tile, so that the kept magnitudes add up to the most.

    Parameters
    ----------
    dense   : (n_pre, n_post), finite
    n, m    : 1 <= n <= m, 2 <= m <= 32
    method  : "exact", the optimum: min-cost flow, or for m <= 4 every mask tried; "greedy", sorted, the pruned
              magnitudes at most twice the optimum's; "transport", entropy-regularised optimal transport, rounded and
              improved by swaps, within a thousandth of the optimum on Gaussian tiles
    threads : tiles are shared among so many; the mask does not depend on it

    No zero is kept. Exact masks may keep fewer than n somewhere: n in every row and column can cost more than it
    brings. Cost a tile: O(n m^3), O(m^2 log m), O(m^2 (rounds + log m)). Raises ValueError.
    """
    check_nm(n, m, "post")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, need one of {', '.join(METHODS)}")
    stack = to_tiles(_magnitudes(dense), m)
    kept = np.empty(stack.shape, bool)
    if method == "greedy":
        _shared(mask_kernels.greedy_tiles, len(stack), threads, n, m, stack, kept)
    elif m <= ENUMERATED:
        _shared(mask_kernels.table_tiles, len(stack), threads, m, stack, _maximal_masks(n, m), kept)
    else:
        _shared(mask_kernels.exact_tiles, len(stack), threads, n, m, stack, kept)
    # Of masks that weigh the same, the one without zeros.
    kept &= stack > 0
    return from_tiles(kept, m, dense.shape)


def to_tiles(array: np.ndarray, m: int) -> np.ndarray:
    """(tiles, m * m) copy of the array's m x m tiles, row by row of tiles, padded with zeros."""
    rows, columns = (-(-size // m) for size in array.shape)
    padded = np.zeros((rows * m, columns * m), array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    tiled = padded.reshape(rows, m, columns, m).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiled).reshape(rows * columns, m * m)


def from_tiles(stack: np.ndarray, m: int, shape: tuple[int, ...]) -> np.ndarray:
    """The array of that shape whose tiles these are."""
    rows, columns = (-(-size // m) for size in shape)
    whole = stack.reshape(rows, columns, m, m).transpose(0, 2, 1, 3).reshape(rows * m, columns * m)
    return np.ascontiguousarray(whole[: shape[0], : shape[1]])


def legal(mask: np.ndarray, n: int, m: int, axis: str) -> bool:
    """Whether no group along "post", "pre" or "both" keeps more than n of each m."""
    check_nm(n, m, "post" if axis == "both" else axis)
    if axis == "both":
        return legal(mask, n, m, "post") and legal(mask, n, m, "pre")
    lines = mask if axis == "post" else mask.T
    return not lines.size or bool(
        (np.add.reduceat(lines, np.arange(0, lines.shape[1], m), axis=1, dtype=int) <= n).all()
    )


# --- how many masks there are -------------------------------------------------------------------------------


def mask_diversity(n: int, m: int, side: int | None = None) -> dict[str, int]:
    """How many masks keep exactly n of each m in a side x side matrix (m x m if not given): exact whole numbers.

    structured           : n of each m along one axis
    transposable         : n in each row and column of every m x m tile, counted
    transposable_formula : M! (M-1)! ... (M-N+1)! a tile, as Hubara et al. 2021 have it; too many: 144 for the 90 of 2:4
    unstructured         : any mask that keeps as many weights

    `side` must be a multiple of m. Raises ValueError.
    """
    check_nm(n, m, "post")
    side = m if side is None else side
    if side < m or side % m:
        raise ValueError(f"side: got {side}, need a multiple of m, {m}")
    tiles = (side // m) ** 2
    return {
        "structured": comb(m, n) ** (side * side // m),
        "transposable": regular_tiles(n, m) ** tiles,
        "transposable_formula": prod(factorial(m - k) for k in range(n)) ** tiles,
        "unstructured": comb(side * side, side * side * n // m),
    }


@cache
def regular_tiles(n: int, m: int) -> int:
    """How many m x m matrices of 0 and 1 have n ones in every row and every column.

    Row by row; columns that lack the same number of ones are alike, so the state is how many lack how many.
    """

    @cache
    def ways(rows: int, lacking: tuple[int, ...]) -> int:
        # lacking[k]: columns that lack k ones still.
        if rows == 0:
            return int(not any(lacking[1:]))
        total = 0
        for chosen in _splits(n, lacking[1:]):
            after = list(lacking)
            for k, count in enumerate(chosen, start=1):
                after[k] -= count
                after[k - 1] += count
            total += prod(comb(have, take) for have, take in zip(lacking[1:], chosen, strict=True)) * ways(
                rows - 1, tuple(after)
            )
        return total

    return ways(m, (*(0 for _ in range(n)), m))


def _splits(total: int, limits: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ways to write a total as a sum of whole numbers within limits."""
    if not limits:
        return [()] if total == 0 else []
    return [(first, *rest) for first in range(min(total, limits[0]) + 1) for rest in _splits(total - first, limits[1:])]


@cache
def _maximal_masks(n: int, m: int) -> np.ndarray:
    """Every legal mask of a tile that no entry can be added to, (masks, m) row bits; the fullest first.

    For 2:4 these are 90 masks with two everywhere and 96 with one fewer.
    """
    rows = [bits for bits in range(1 << m) if bits.bit_count() <= n]
    found = []
    for mask in product(rows, repeat=m):
        columns = [sum(bits >> j & 1 for bits in mask) for j in range(m)]
        if max(columns) > n:
            continue
        room = [j for j in range(m) if columns[j] < n]
        if not any(bits.bit_count() < n and not bits >> j & 1 for bits in mask for j in room):
            found.append(mask)
    found.sort(key=lambda mask: -sum(bits.bit_count() for bits in mask))
    return np.array(found, np.int64)


def _magnitudes(dense: np.ndarray) -> np.ndarray:
    """Contiguous float32 |w|; ValueError for what is no finite matrix."""
    dense = np.asarray(dense)
    if dense.ndim != 2:
        raise ValueError(f"weights: got shape {dense.shape}, need (n_pre, n_post)")
    check_finite("weight", dense)
    return np.ascontiguousarray(np.abs(dense), np.float32)


def _shared(kernel: Callable[..., Any], count: int, threads: int, *arguments: Any) -> None:
    """Run a kernel over 0..count - 1, in equal ranges on so many threads."""
    if threads < 1:
        raise ValueError(f"threads: got {threads}, need a whole number >= 1")
    edges = np.linspace(0, count, min(threads, max(1, count)) + 1).astype(int)
    if len(edges) == 2:
        kernel(0, count, *arguments)
        return
    with ThreadPoolExecutor(len(edges) - 1) as pool:
        for done in [pool.submit(kernel, a, b, *arguments) for a, b in zip(edges[:-1], edges[1:], strict=True)]:
            done.result()
