"""Interleaved timing, and the figures of a timed case.

All sides are timed in turn, round after round, and medians are compared. A probe reads the same weights and does
nothing else; a measured read rate above that of the probe means that the benchmark is wrong, and is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from eventrnn._checks import need_whole
from eventrnn.counting.counts import Counts
from eventrnn.weights import Weights

# Pause before every timed run, and the least time of the untimed runs of the same side after it. A core that has slept
# takes some milliseconds to reach its clock rate. A layer of 512 units whose runs take 1.4 ms took 7.0 µs per step
# after one untimed run, and 5.8 µs after 20 ms of them; PyTorch, whose runs take 40 ms, took as long after one.
SETTLE_SECONDS, WARM_SECONDS = 0.05, 0.02

Run = Callable[[], object]

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class PreparedCase:
    """One case ready to be timed. Every run covers all steps.

    Attributes
    ----------
    ours        : our run
    probes      : name -> run that only reads the weights
    baselines   : variant -> run of a baseline
    check       : compares the results of the baselines with ours; raises RuntimeError where one differs
    counts      : operations of our run
    read_bytes  : bytes of weights that our run, and each probe, reads
    state_bytes : bytes of cells and outputs of our run
    weights     : the weight matrices
    activity    : measured activity
    compile_seconds : seconds of the first run
    """

    ours: Run
    probes: dict[str, Run]
    baselines: dict[str, Run]
    check: Run
    counts: Counts
    read_bytes: int
    state_bytes: int
    weights: list[Weights]
    activity: float
    compile_seconds: float


def interleaved(runs: dict[Name, Run], repeats: int) -> dict[Name, list[float]]:
    """Seconds of every run, `repeats` times in turn. Every timed call follows untimed calls of the same run."""
    need_whole("repeats", repeats, at_least=1)
    seconds: dict[Name, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            # Worker threads of BLAS and OpenMP keep spinning for a while after a call and would compete for the cores.
            time.sleep(SETTLE_SECONDS)
            # Untimed calls raise the clock rate of an idle core and fill its caches.
            warm_from = time.perf_counter()
            run()
            while time.perf_counter() - warm_from < WARM_SECONDS:
                run()
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def figures(case: PreparedCase, seconds: dict[str, list[float]], steps: int) -> dict:
    """The figures per step of a timed case. Raises RuntimeError where our run reads faster than the probes."""
    ours = float(np.median(seconds["ours"])) / steps
    rate = case.read_bytes / steps / ours / 1e9
    probe_rate = case.read_bytes / min(min(seconds[name]) for name in case.probes) / 1e9
    if rate > probe_rate:
        raise RuntimeError(
            f"benchmark: {rate:.1f} GB/s of weights read, but a probe reads them at {probe_rate:.1f} GB/s at best; "
            "the machine is too noisy or the kernel skips work"
        )
    counts, stored = case.counts, sum(w.shape[0] * w.shape[1] for w in case.weights)
    result = {
        "us_per_step": ours * 1e6,
        "against_us_per_step": None,
        "speedup": None,
        "against_variant": None,
        "against_variants_us_per_step": {},
        "activity": case.activity,
        "sparsity": 1 - sum(w.nnz for w in case.weights) / stored,
        "dense_per_step": counts.dense // steps,
        "effective_per_step": counts.effective / steps,
        "executed_per_step": counts.executed / steps,
        "bytes_per_step": (case.read_bytes + case.state_bytes) / steps,
        "storage_bytes": sum(w.nbytes for w in case.weights),
        "bandwidth_gb_s": rate,
        "probe_gb_s": probe_rate,
        "bandwidth_fraction": rate / probe_rate,
        "gflop_s": 2 * counts.executed / steps / ours / 1e9,
        "compile_seconds": case.compile_seconds,
    }
    if case.baselines:
        each = {name: float(np.median(seconds[name])) / steps for name in case.baselines}
        best = min(each, key=lambda name: each[name])
        result |= {
            "against_us_per_step": each[best] * 1e6,
            "speedup": each[best] / ours,
            "against_variant": best,
            "against_variants_us_per_step": {name: value * 1e6 for name, value in each.items()},
        }
    return result
