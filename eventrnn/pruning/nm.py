"""N:M masks: at most n of each m consecutive weights are kept, along one axis of a matrix or along both.

Groups and tiles lie on a grid that starts at entry [0, 0]; those at an edge are smaller. In a *transposable* mask every
m x m tile keeps at most n weights in each of its rows and columns. The matrix and its transpose are then both N:M, and
so are the product of the forward pass and that of the input gradient (Hubara et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import product
from math import comb, factorial, prod
from typing import Any

import numpy as np

from eventrnn._checks import float32_array, need_choice, need_whole, plain_array
from eventrnn.pruning.kernels import mask_kernels
from eventrnn.weights import check_nm

#: Algorithms for transposable masks.
TRANSPOSABLE_METHODS = ("exact", "greedy")

# For tiles up to this size the exact method tries all maximal masks: 186 for 2:4, of which 90 keep exactly two in every
# row and column.
ENUMERATED = 4


def nm_mask(dense: np.ndarray, n: int, m: int, axis: str = "post", *, threads: int = 1) -> np.ndarray:
    """Mask of the n largest magnitudes in each group of m consecutive weights.

    Parameters
    ----------
    dense   : (n_pre, n_post), finite
    n, m    : 1 <= n <= m, 2 <= m <= 32
    axis    : "post" groups the weights of a presynaptic unit, "pre" those of an output
    threads : number of threads; the mask does not depend on it

    Returns a boolean array of the shape of `dense`. Of equal magnitudes the later one is kept. A last group of g < m
    weights keeps min(n, g). Raises ValueError for an n, m or axis that the `NM` format does not have, and for weights
    that are not finite. Cost: O(size * m).
    """
    check_nm(n, m, axis)
    magnitudes = _magnitudes(dense)
    lines = magnitudes if axis == "post" else np.ascontiguousarray(magnitudes.T)
    kept = np.empty(lines.shape, bool)
    _run_in_threads(mask_kernels.keep_of_groups, len(lines), threads, n, m, lines, kept)
    return kept if axis == "post" else np.ascontiguousarray(kept.T)


def transposable_mask(dense: np.ndarray, n: int, m: int, *, method: str = "exact", threads: int = 1) -> np.ndarray:
    """Transposable N:M mask of large magnitude: at most n weights in every row and column of every m x m tile.

    Parameters
    ----------
    dense   : (n_pre, n_post), finite
    n, m    : 1 <= n <= m, 2 <= m <= 32
    method  : "exact" maximises the sum of the kept magnitudes, by min-cost flow or, for m <= 4, by trying all maximal
              masks; "greedy" goes through the sorted magnitudes, and the sum that it prunes is at most twice the
              smallest possible one (Hubara et al. 2021)
    threads : number of threads; the mask does not depend on it

    Returns a boolean array of the shape of `dense`. Zero weights are never kept. An exact mask can keep fewer than n
    weights in a row or column, where n would force out larger ones. Raises ValueError for an unknown method, for an n
    or m out of range, and for weights that are not finite. Cost per tile: O(n m^3) for "exact", O(m^2 log m) for
    "greedy".
    """
    check_nm(n, m, "post")
    need_choice("method", method, TRANSPOSABLE_METHODS)
    stack = to_tiles(_magnitudes(dense), m)
    kept = np.empty(stack.shape, bool)
    if method == "greedy":
        _run_in_threads(mask_kernels.greedy_tiles, len(stack), threads, n, m, stack, kept)
    elif m <= ENUMERATED:
        _run_in_threads(mask_kernels.table_tiles, len(stack), threads, m, stack, _maximal_masks(n, m), kept)
    else:
        _run_in_threads(mask_kernels.exact_tiles, len(stack), threads, n, m, stack, kept)
    # A zero weight adds nothing to the sum, so masks with and without it are equal in magnitude.
    kept &= stack > 0
    return from_tiles(kept, m, dense.shape)


def to_tiles(array: np.ndarray, m: int) -> np.ndarray:
    """The m x m tiles of an array in row-major order, padded with zeros, as a new array (tiles, m * m)."""
    rows, columns = (-(-size // m) for size in array.shape)
    padded = np.zeros((rows * m, columns * m), array.dtype)
    padded[: array.shape[0], : array.shape[1]] = array
    tiled = padded.reshape(rows, m, columns, m).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiled).reshape(rows * columns, m * m)


def from_tiles(stack: np.ndarray, m: int, shape: tuple[int, ...]) -> np.ndarray:
    """The array of shape `shape` from its tiles (tiles, m * m): the inverse of `to_tiles`."""
    rows, columns = (-(-size // m) for size in shape)
    whole = stack.reshape(rows, columns, m, m).transpose(0, 2, 1, 3).reshape(rows * m, columns * m)
    return np.ascontiguousarray(whole[: shape[0], : shape[1]])


def legal(mask: np.ndarray, n: int, m: int, axis: str) -> bool:
    """Whether a mask keeps at most n of each m weights along an axis, "post", "pre" or "both"."""
    need_choice("nm axis", axis, ("post", "pre", "both"))
    check_nm(n, m, "post" if axis == "both" else axis)
    mask = plain_array("mask", mask)
    if mask.dtype != bool or mask.ndim != 2:
        raise ValueError(f"mask: got {mask.dtype} {mask.shape}, need booleans (n_pre, n_post)")
    if axis == "both":
        return legal(mask, n, m, "post") and legal(mask, n, m, "pre")
    lines = mask if axis == "post" else mask.T
    return not lines.size or bool(
        (np.add.reduceat(lines, np.arange(0, lines.shape[1], m), axis=1, dtype=int) <= n).all()
    )


# --- counting masks -----------------------------------------------------------------------------------------


def mask_diversity(n: int, m: int, side: int | None = None) -> dict[str, int]:
    """Numbers of masks that keep exactly n of each m weights in a side x side matrix, as exact integers.

    side : a multiple of m; m if not given

    Returns a dictionary:

    structured           : masks with n of each m along one axis
    transposable         : masks with n in each row and column of every m x m tile
    transposable_formula : M! (M-1)! ... (M-N+1)! per tile, the count of Hubara et al. 2021. It is too large: 144
                           instead of 90 for 2:4
    unstructured         : all masks that keep the same number of weights

    Raises ValueError for a side that is not a multiple of m.
    """
    check_nm(n, m, "post")
    side = m if side is None else need_whole("side", side, at_least=1)
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
    """Number of m x m matrices of zeros and ones with n ones in every row and column.

    Dynamic programming over rows. Columns that lack the same number of ones are interchangeable, so the state is the
    number of columns per number of lacking ones.
    """

    @cache
    def ways(rows: int, lacking: tuple[int, ...]) -> int:
        # lacking[k] is the number of columns that still lack k ones.
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
    """All tuples of integers between 0 and `limits` with the sum `total`."""
    if not limits:
        return [()] if total == 0 else []
    return [(first, *rest) for first in range(min(total, limits[0]) + 1) for rest in _splits(total - first, limits[1:])]


@cache
def _maximal_masks(n: int, m: int) -> np.ndarray:
    """All masks of a tile that satisfy n:m and to which no entry can be added, largest first.

    Returns (masks, m) int64: the bits of each row. For 2:4 there are 90 masks with eight entries and 96 with seven.
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
    """|w| as a contiguous float32 matrix. Raises ValueError for an array that is not a finite matrix."""
    dense = float32_array("weights", dense, "(n_pre, n_post)", ndim=2)
    return np.ascontiguousarray(np.abs(dense), np.float32)


def _run_in_threads(kernel: Callable[..., Any], count: int, threads: int, *arguments: Any) -> None:
    """Run `kernel(first, last, *arguments)` over the range 0..count in equal parts, one per thread."""
    need_whole("threads", threads, at_least=1)
    edges = np.linspace(0, count, min(threads, max(1, count)) + 1).astype(int)
    if len(edges) == 2:
        kernel(0, count, *arguments)
        return
    with ThreadPoolExecutor(len(edges) - 1) as pool:
        for done in [pool.submit(kernel, a, b, *arguments) for a, b in zip(edges[:-1], edges[1:], strict=True)]:
            done.result()
