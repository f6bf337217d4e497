"""Time and kept magnitude of transposable N:M masks: every method on one matrix, interleaved in one run."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from eventrnn._checks import need_whole
from eventrnn.bench.machine import device, versions
from eventrnn.bench.timing import interleaved
from eventrnn.pruning.nm import TRANSPOSABLE_METHODS, mask_diversity, nm_mask, transposable_mask
from eventrnn.weights import check_nm

#: published times on other machines: source, method, side of the matrix, n:m, seconds, machine
LITERATURE = (
    ("Meng et al. 2025", "min-cost flow", 512, "8:16", 1.82, "CPU"),
    ("Meng et al. 2025", "2-approximation", 512, "8:16", 0.13, "CPU"),
    ("Meng et al. 2025", "transport, theirs", 512, "8:16", 0.08, "H100"),
    ("Meng et al. 2025", "min-cost flow", 8192, "8:16", 350.0, "CPU"),
    ("Meng et al. 2025", "2-approximation", 8192, "8:16", 3.23, "CPU"),
    ("Meng et al. 2025", "transport, theirs", 8192, "8:16", 0.12, "H100"),
)


def masks(
    *,
    rows: int = 4096,
    columns: int = 4096,
    n: int = 4,
    m: int = 8,
    methods: tuple[str, ...] = TRANSPOSABLE_METHODS,
    threads: int = 1,
    repeats: int = 3,
    seed: int = 0,
    report: Callable[[str], None] = lambda stage: None,
) -> dict:
    """Time transposable n:m masks of a Gaussian matrix, beside a mask along one axis.

    Returns the figures of `eventrnn bench pruning --json`. For each method: median seconds; median processor seconds,
    which other load on the machine hardly changes; processor microseconds per tile; the share of the magnitude that
    the mask keeps, also relative to the exact method where that was run; and the share of weights kept. Also the
    number of valid masks of a tile. Compilation is not timed. Raises ValueError for an impossible case.
    """
    check_nm(n, m, "post")
    for name, value in (("rows", rows), ("columns", columns), ("threads", threads), ("repeats", repeats)):
        need_whole(name, value, at_least=1)
    unknown = [method for method in methods if method not in TRANSPOSABLE_METHODS]
    if unknown or not methods:
        raise ValueError(f"methods: got {', '.join(methods) or 'none'}, need some of {', '.join(TRANSPOSABLE_METHODS)}")
    dense = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    found: dict[str, np.ndarray] = {}
    busy: dict[str, list[float]] = {}

    def run(name: str) -> Callable[[], object]:
        def once() -> None:
            started = time.process_time()
            if name == "one axis":
                found[name] = nm_mask(dense, n, m, threads=threads)
            else:
                found[name] = transposable_mask(dense, n, m, method=name, threads=threads)
            busy.setdefault(name, []).append(time.process_time() - started)

        return once

    runs = {name: run(name) for name in ("one axis", *methods)}
    report("compiling")
    nm_mask(dense[:m, :m], n, m)
    for method in methods:
        transposable_mask(dense[:m, :m], n, m, method=method)
    report(f"timing {repeats} rounds")
    seconds = interleaved(runs, repeats)
    magnitude = np.abs(dense, dtype=np.float64)
    kept = {name: float(magnitude[mask].sum()) for name, mask in found.items()}
    tiles = -(-rows // m) * -(-columns // m)
    lines = {
        name: {
            "seconds": float(np.median(seconds[name])),
            "cpu_seconds": float(np.median(busy[name])),
            "us_per_tile": float(np.median(busy[name])) / tiles * 1e6,
            "kept_magnitude": kept[name] / float(magnitude.sum()),
            "of_exact": kept[name] / kept["exact"] if "exact" in kept else None,
            "kept_weights": float(mask.mean()),
        }
        for name, mask in found.items()
    }
    return {
        "matrix": f"{rows}x{columns}",
        "nm": f"{n}:{m}",
        "threads": threads,
        "repeats": repeats,
        "seed": seed,
        "methods": lines,
        "masks_of_a_tile": mask_diversity(n, m),
        "device": device(),
        "versions": versions(),
    }
