"""Is "auto" ever slower than the best way? Every way of some products beside its own choice, interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product as pairs
from typing import Any

import numpy as np

from eventrnn.bench.contest import interleaved
from eventrnn.bench.machine import limited
from eventrnn.bench.networks import random_events, random_weights
from eventrnn.crossover import Crossover, Forced, MeasuredChoice
from eventrnn.plan import AS_STORED, BLAS_PRODUCT, DENSE, DENSE_TILES, TILES, Choice
from eventrnn.product import Product
from eventrnn.weights import Dense, Weights

ACTIVITIES, BATCHES = (0.01, 0.1, 0.3, 1.0), (1, 4, 20, 80, 128)
WEIGHTS = (
    {"format": "dense", "sparsity": 0.0},
    {"format": "csr", "sparsity": 0.5},
    {"format": "csr", "sparsity": 0.9},
    {"format": "block", "block": (1, 16), "sparsity": 0.5},
    {"format": "block", "block": (1, 64), "sparsity": 0.9},
)
# Terms of a timed run, at least; a few milliseconds of the fastest way.
RUN_TERMS = 2e7

Report = Callable[[int, int, str], None]


def verify(crossover: Crossover, hidden: int, repeats: int, report: Report, seed: int = 0) -> Iterator[dict]:
    """A line for each weights x batch x activity: microseconds of a product by way, what "auto" picks, and its share of
    the best way's speed, exact and not. Each way is timed `repeats` times, in turn; medians. Some minutes.
    """
    rng, plans, weights = np.random.default_rng(seed), {}, None
    total = len(WEIGHTS) * len(BATCHES) * len(ACTIVITIES)
    with limited(1):
        for done, (case, batch, activity) in enumerate(pairs(WEIGHTS, BATCHES, ACTIVITIES)):
            report(done, total, f"{case['format']} {case['sparsity']:.0%}, batch {batch}, {activity:.0%} active")
            if activity == ACTIVITIES[0] and batch == BATCHES[0]:
                weights, plans = _weights(case, hidden, rng), {}
            assert weights is not None
            terms = batch * activity * weights.stored
            events = random_events(max(1, int(RUN_TERMS // terms)), batch, hidden, activity, rng)
            yield _line(crossover, weights, events, activity, repeats, plans) | case | {
                "batch": batch, "activity": activity, "hidden": hidden,
            }  # fmt: skip
        report(total, total, "done")


def _line(crossover: Crossover, weights: Weights, events, activity: float, repeats: int, plans: dict) -> dict:
    batch, dense = events.shape[1], isinstance(weights, Dense)
    ways: dict[str, tuple[str, float]] = {
        AS_STORED: (AS_STORED, 2.0),
        "panels": (TILES if dense else DENSE_TILES, 2.0),
        "every": (TILES if dense else DENSE_TILES, 0.0),
        "blas": (BLAS_PRODUCT, 2.0),
    }
    if not dense:
        ways[DENSE] = (DENSE, 2.0)
    choices: dict[str, Choice] = {name: Forced(*way) for name, way in ways.items()}
    choices |= {"auto": MeasuredChoice(crossover, False), "auto inexact": MeasuredChoice(crossover, True)}
    runs, picked = {}, {}
    for name, choice in choices.items():
        pick, every_from = choice.pick(weights, batch, activity), choice.every_from(batch)
        key = pick, every_from, choice.may_blas
        each = Product(weights, events, choice=choice, plan=plans.get(key))
        plans[key], runs[name], picked[name] = each.plan, each.run, pick
    steps = events.shape[0]
    times = {name: float(np.median(s)) / steps for name, s in interleaved(runs, repeats).items()}
    exact = min(times[name] for name in ways if name != "blas")
    return {
        "microseconds": {name: 1e6 * seconds for name, seconds in times.items()},
        "picked": picked["auto"],
        "picked_inexact": picked["auto inexact"],
        "exact_ratio": exact / times["auto"],
        "inexact_ratio": min(exact, times["blas"]) / times["auto inexact"],
    }


def picks(crossover: Crossover, hidden: int, seed: int = 0) -> list[dict]:
    """What "auto" picks for the same products, exact and not, by activity: a line for each weights x batch."""
    rng, lines = np.random.default_rng(seed), []
    for case in WEIGHTS:
        weights = _weights(case, hidden, rng)
        for batch in BATCHES:
            choices = {"exact": MeasuredChoice(crossover, False), "inexact": MeasuredChoice(crossover, True)}
            found = {name: [each.pick(weights, batch, a) for a in ACTIVITIES] for name, each in choices.items()}
            lines.append({"weights": f"{case['format']} {case['sparsity']:.0%}", "batch": batch} | found)
    return lines


def _weights(case: dict, hidden: int, rng: np.random.Generator) -> Weights:
    options: dict[str, Any] = {"block": None} | case
    return random_weights((hidden, 3 * hidden), rng=rng, **options)
