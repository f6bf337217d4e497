"""Verification of backend="auto": every kernel for a set of products beside the one that auto picks, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product as pairs
from typing import Any

import numpy as np

from eventrnn.bench.machine import limited
from eventrnn.bench.networks import random_events, random_weights
from eventrnn.bench.timing import interleaved
from eventrnn.cpu.crossover import Crossover, ForcedPolicy, MeasuredPolicy
from eventrnn.cpu.packing import is_single
from eventrnn.cpu.plan import BLAS_PRODUCT, DENSIFIED, DENSIFIED_TILED, FORMAT, TILED, KernelPolicy
from eventrnn.cpu.single_product import Product
from eventrnn.weights import Dense, Weights

ACTIVITIES, BATCHES = (0.01, 0.1, 0.3, 1.0), (1, 4, 20, 80, 128)

WEIGHTS = (
    {"format": "dense", "sparsity": 0.0},
    {"format": "csr", "sparsity": 0.5},
    {"format": "csr", "sparsity": 0.9},
    {"format": "block", "block": (1, 16), "sparsity": 0.5},
    {"format": "block", "block": (1, 64), "sparsity": 0.9},
)

# A first run of FIRST_STEPS steps drops kernels that are OUT times slower than the fastest. The timed runs then have
# as many steps, between LEAST_STEPS and MOST_STEPS, as the fastest kernel does in RUN_SECONDS.
RUN_SECONDS, OUT, FIRST_STEPS, LEAST_STEPS, MOST_STEPS = 1e-2, 3.0, 4, 2, 4096

#: a kernel name of cpu/plan.py, and the share of active units from which a tiled kernel multiplies all units
Way = tuple[str, float]

# No share of active units is as large.

NEVER = 2.0

Report = Callable[[int, int, str], None]


def verify(crossover: Crossover, hidden: int, repeats: int, report: Report, seed: int = 0) -> Iterator[dict]:
    """Time every kernel for each weights x batch x activity, beside the pick of "auto". Takes some minutes.

    Yields one record per case: microseconds of a product by kernel, the picks of "auto" (exact and inexact), and the
    speed of each pick as a share of the fastest kernel's: the median of the ratios of `repeats` interleaved rounds.
    Where "auto" picks one of the timed kernels unchanged, that kernel's time is used for both.
    """
    rng, plans, weights = np.random.default_rng(seed), {}, None
    total = len(WEIGHTS) * len(BATCHES) * len(ACTIVITIES)
    with limited(1):
        for done, (case, batch, activity) in enumerate(pairs(WEIGHTS, BATCHES, ACTIVITIES)):
            asked = case | {"batch": batch, "activity": activity, "hidden": hidden}
            report(done, total, case_name(asked))
            if activity == ACTIVITIES[0] and batch == BATCHES[0]:
                weights, plans = _weights(case, hidden, rng), {}
            assert weights is not None
            yield _line(crossover, weights, batch, activity, repeats, plans, rng) | asked
        report(total, total, "done")


def case_name(line: dict) -> str:
    """The name of a case for people."""
    return f"{line['format']} {line['sparsity']:.0%}, batch {line['batch']}, {line['activity']:.0%} active"


def _line(
    crossover: Crossover,
    weights: Weights,
    batch: int,
    activity: float,
    repeats: int,
    plans: dict,
    rng: np.random.Generator,
) -> dict:
    def runs(steps: int, ways: Iterable[Way]) -> dict[Way, Callable[[], object]]:
        events, found = random_events(steps, batch, weights.shape[0], activity, rng), {}
        for way in ways:
            product = Product(weights, events, policy=ForcedPolicy(*way), plan=plans.get(way))
            plans[way], found[way] = product.plan, product.run
        return found

    exact = [(FORMAT, NEVER), *_tiles(weights)]
    auto = _taken(MeasuredPolicy(crossover, False), weights, batch, activity)
    inexact = _taken(MeasuredPolicy(crossover, True), weights, batch, activity)
    first = _medians(interleaved(runs(FIRST_STEPS, {*exact, (BLAS_PRODUCT, NEVER), auto, inexact}), 3), FIRST_STEPS)
    fastest, fastest_exact = min(first.values()), min(first[way] for way in exact)
    steps = int(min(max(RUN_SECONDS / fastest, LEAST_STEPS), MOST_STEPS))
    left = {way for way in first if first[way] < OUT * (fastest_exact if way in exact else fastest)} | {auto, inexact}
    rounds = interleaved(runs(steps, sorted(left)), repeats)
    times = _medians(rounds, steps)
    return {
        "microseconds": {_words(way): 1e6 * seconds for way, seconds in (first | times).items()},
        "picked": _words(auto),
        "picked_inexact": _words(inexact),
        "exact_ratio": min(_ratio(rounds[way], rounds[auto]) for way in rounds if way[0] != BLAS_PRODUCT),
        "inexact_ratio": min(_ratio(rounds[way], rounds[inexact]) for way in rounds),
    }


def _tiles(weights: Weights) -> list[Way]:
    """The exact kernels apart from that of the stored format."""
    if isinstance(weights, Dense):
        return [(TILED, NEVER), (TILED, 0.0)]
    tiled = [(TILED, NEVER)] if is_single(weights) else []
    return [*tiled, (DENSIFIED, NEVER), (DENSIFIED_TILED, NEVER), (DENSIFIED_TILED, 0.0)]


def _taken(choice: KernelPolicy, weights: Weights, batch: int, activity: float) -> Way:
    """The kernel that a policy picks. The share is `NEVER` where the kernel does not use it."""
    pick = choice.select_kernel(weights, batch, activity)
    dense = pick == DENSIFIED_TILED or (pick == TILED and isinstance(weights, Dense))
    return pick, choice.dense_activity_threshold(batch) if dense else NEVER


def _words(way: Way) -> str:
    pick, dense_activity_threshold = way
    if pick not in (TILED, DENSIFIED_TILED):
        return pick
    return (
        f"{pick}, every"
        if dense_activity_threshold == 0
        else f"{pick}, panels"
        if dense_activity_threshold == NEVER
        else pick
    )


def _medians(rounds: dict[Way, list[float]], steps: int) -> dict[Way, float]:
    return {way: float(np.median(seconds)) / steps for way, seconds in rounds.items()}


def _ratio(way: list[float], auto: list[float]) -> float:
    """Median over rounds of the ratio within a round, because the speed of the machine drifts between rounds."""
    return float(np.median(np.array(way) / np.array(auto)))


def picks(crossover: Crossover, hidden: int, seed: int = 0) -> list[dict]:
    """The picks of "auto" for the same products by activity, exact and inexact: one record per weights x batch."""
    rng, lines = np.random.default_rng(seed), []
    for case in WEIGHTS:
        weights = _weights(case, hidden, rng)
        for batch in BATCHES:
            choices = {"exact": MeasuredPolicy(crossover, False), "inexact": MeasuredPolicy(crossover, True)}
            found = {
                name: [each.select_kernel(weights, batch, a) for a in ACTIVITIES] for name, each in choices.items()
            }
            lines.append({"weights": f"{case['format']} {case['sparsity']:.0%}", "batch": batch} | found)
    return lines


def _weights(case: dict, hidden: int, rng: np.random.Generator) -> Weights:
    options: dict[str, Any] = {"block": None} | case
    return random_weights((hidden, 3 * hidden), rng=rng, **options)
