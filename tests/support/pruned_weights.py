"""Weight formats of the backward pass, and matrices pruned for them."""

import numpy as np

from eventrnn.weights import convert

FORMATS = [
    ("dense", {}),
    ("csr", {}),
    ("block", {"block": (1, 16)}),
    ("block", {"block": (2, 32)}),
    ("block", {"block": (3, 5)}),
    ("block", {"block": (1, 64)}),
    ("nm", {"nm": (2, 8, "post")}),
]


def pruned(dense: np.ndarray, form: str, options: dict, rng: np.random.Generator):
    """The matrix in a format, three quarters of its blocks left out."""
    if form == "nm":
        n, m, _ = options["nm"]
        keep = np.zeros(dense.shape, bool)
        for start in range(0, dense.shape[1], m):
            keep[:, start : start + n] = True
        return convert(dense * keep, form, **options)
    r, c = options.get("block", (1, 1))
    if form == "dense" or c > dense.shape[1] or r > dense.shape[0]:
        return convert(dense, "dense")
    grid = rng.random((-(-dense.shape[0] // r), -(-dense.shape[1] // c))) < 0.25
    keep = np.repeat(np.repeat(grid, r, axis=0), c, axis=1)[: dense.shape[0], : dense.shape[1]]
    return convert(dense * keep, form, **options)
