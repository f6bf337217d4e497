"""Timing side by side: every contestant in turn in one run, medians, and the bytes held against a probe.

Probes do nothing but read the same weights, in the same order or straight on: a rate above the faster one's means that
the benchmark is wrong, and is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from eventrnn.counting.counts import Counts
from eventrnn.weights import Weights

SETTLE_SECONDS = 0.05

Run = Callable[[], object]

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Contest:
    """One case made ready. Every run does all steps.

    Attributes
    ----------
    ours, probes, rivals : what to time; rivals by variant
    check       : compares every rival's result with ours; raises RuntimeError where one computes something else
    counts      : operations of a run of ours
    read_bytes  : what it reads of the weights, and each probe too
    state_bytes : bytes of cells and outputs of a run
    weights     : every matrix
    activity    : as measured
    compile_seconds : of the first run
    """

    ours: Run
    probes: dict[str, Run]
    rivals: dict[str, Run]
    check: Run
    counts: Counts
    read_bytes: int
    state_bytes: int
    weights: list[Weights]
    activity: float
    compile_seconds: float


def interleaved(contestants: dict[Name, Run], repeats: int) -> dict[Name, list[float]]:
    """Seconds of every contestant, in turn, `repeats` times; each timed run follows an unmeasured one of the same."""
    seconds: dict[Name, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, run in contestants.items():
            # Worker threads of BLAS and OpenMP go on spinning for a while after their work, on our cores.
            time.sleep(SETTLE_SECONDS)
            # A rested core is slow at first, and its caches are full of somebody else's data.
            run()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def figures(contest: Contest, seconds: dict[str, list[float]], steps: int) -> dict:
    """What a timed contest says, a step. Raises RuntimeError where ours reads faster than the probe can."""
    ours = float(np.median(seconds["ours"])) / steps
    rate = contest.read_bytes / steps / ours / 1e9
    probe_rate = contest.read_bytes / min(min(seconds[name]) for name in contest.probes) / 1e9
    if rate > probe_rate:
        raise RuntimeError(
            f"benchmark: {rate:.1f} GB/s of weights read, but a probe reads them at {probe_rate:.1f} GB/s at best; "
            "the machine is too noisy or the kernel skips work"
        )
    counts, stored = contest.counts, sum(w.shape[0] * w.shape[1] for w in contest.weights)
    result = {
        "us_per_step": ours * 1e6,
        "against_us_per_step": None,
        "speedup": None,
        "against_variant": None,
        "against_variants_us_per_step": {},
        "activity": contest.activity,
        "sparsity": 1 - sum(w.nnz for w in contest.weights) / stored,
        "dense_per_step": counts.dense // steps,
        "effective_per_step": counts.effective / steps,
        "executed_per_step": counts.executed / steps,
        "bytes_per_step": (contest.read_bytes + contest.state_bytes) / steps,
        "storage_bytes": sum(w.nbytes for w in contest.weights),
        "bandwidth_gb_s": rate,
        "probe_gb_s": probe_rate,
        "bandwidth_fraction": rate / probe_rate,
        "gflop_s": 2 * counts.executed / steps / ours / 1e9,
        "compile_seconds": contest.compile_seconds,
    }
    if contest.rivals:
        each = {name: float(np.median(seconds[name])) / steps for name in contest.rivals}
        best = min(each, key=lambda name: each[name])
        result |= {
            "against_us_per_step": each[best] * 1e6,
            "speedup": each[best] / ours,
            "against_variant": best,
            "against_variants_us_per_step": {name: value * 1e6 for name, value in each.items()},
        }
    return result
