"""`inference`: make a case ready, check its rivals, time them all, say what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from eventrnn.bench import gpu_inference as gpu
from eventrnn.bench import timing
from eventrnn.bench.bandwidth import probes, product_reads, rows_read
from eventrnn.bench.baselines import LayerRivals, ProductRivals
from eventrnn.bench.case import Case
from eventrnn.bench.machine import device, limited, peak, versions
from eventrnn.bench.networks import at_activity, random_events, random_network, random_weights
from eventrnn.bench.timing import Contest
from eventrnn.counting.counts import Counts, count
from eventrnn.cpu.engine import CpuEngine
from eventrnn.cpu.single_product import Product
from eventrnn.simulation import simulate
from eventrnn.state import State

# How far the measured activity may be from what was asked, as a share of it.
ACTIVITY_TOLERANCE = 0.1

Report = Callable[[str], None]


def inference(*, report: Report = lambda stage: None, **case: Any) -> dict:
    """Time whole sequences and return the figures of `eventrnn bench inference --json`.

    Parameters are the fields of `Case`. `us_per_step` is the median over `repeats` of one run of `steps` steps for the
    whole batch, divided by the steps; every variant of every rival runs right after each of ours. Rivals are
    compared with us before anything is timed. Raises ValueError for a case that cannot be, RuntimeError when a rival
    computes something else, or when our weight bytes per second exceed what the probe could read.
    """
    asked = Case(**case)
    if asked.backend == "cuda":
        return gpu.inference(asked, report)
    contest = _product(asked, report) if asked.measures == "product" else _layer(asked, report)
    with limited(asked.threads):
        report("comparing with the rivals")
        contest.check()
        report(f"timing {asked.repeats} rounds")
        seconds = timing.interleaved({"ours": contest.ours} | contest.probes | contest.rivals, asked.repeats)
    result = timing.figures(contest, seconds, asked.steps)
    return result | asked.record() | peak(asked.threads) | {"device": device(), "versions": versions()}


def _layer(case: Case, report: Report) -> Contest:
    """A whole stack of layers."""
    rng = np.random.default_rng(case.seed)
    network = random_network(
        case.hidden, case.layers, sparsity=case.left_out, format=case.format, block=case.block, variant=case.variant,
        rng=rng, nm=case.nm, dtype=case.dtype,
    )  # fmt: skip
    inputs = random_events(case.steps, case.batch, case.hidden, case.activity, rng)
    report("compiling")
    started = time.perf_counter()
    simulate(network, inputs)
    compile_seconds = time.perf_counter() - started
    report("setting the activity")
    network = at_activity(network, inputs, case.activity)
    simulation = simulate(network, inputs, record="events")
    measured = float(np.mean(simulation.activity))
    if abs(measured - case.activity) > ACTIVITY_TOLERANCE * case.activity:
        raise ValueError(
            f"activity: got {case.activity}, but thresholds bring this random network to {measured:.3f} at best; "
            "ask for less, or use more units"
        )
    counts = count(network, simulation)
    engine, state = CpuEngine(network, case.threads), State.zeros(network, case.batch)
    prepared = engine.prepare(inputs)
    reads, rivals = rows_read(engine, network, simulation), LayerRivals.of(case.rivals, network, inputs)
    return Contest(
        ours=lambda: engine.run(prepared, state),
        probes=probes(engine.plan(case.steps, case.batch), reads),
        rivals=rivals.runs,
        check=rivals.check,
        counts=counts.total,
        read_bytes=sum(r.nbytes for r in reads),
        state_bytes=sum(counts.state_bytes),
        weights=list(network.matrices().values()),
        activity=measured,
        compile_seconds=compile_seconds,
    )


def _product(case: Case, report: Report) -> Contest:
    """One product a step, with random events: no cells, and no memory of the step before."""
    rng = np.random.default_rng(case.seed)
    weights = random_weights(
        (case.hidden, 3 * case.hidden), sparsity=case.left_out, format=case.format, block=case.block, nm=case.nm,
        dtype=case.dtype, rng=rng,
    )  # fmt: skip
    events = random_events(case.steps, case.batch, case.hidden, case.activity, rng)
    report("compiling")
    started = time.perf_counter()
    ours = Product(weights, events, case.threads)
    ours.run()
    compile_seconds = time.perf_counter() - started
    reads, rivals = product_reads(ours), ProductRivals.of(case.rivals, ours)
    rows = case.steps * case.batch
    sent = np.bincount(events.indices, minlength=case.hidden)
    graded = np.bincount(events.indices[events.graded], minlength=case.hidden)
    fan_out, effective = weights.fan_out(), int(sent @ weights.fan_out())
    return Contest(
        ours=ours.run,
        probes=probes(ours.plan, reads),
        rivals=rivals.runs,
        check=rivals.check,
        counts=Counts(
            dense=rows * weights.shape[0] * weights.shape[1],
            effective=effective,
            executed=int(sent @ weights.stored_out()),
            graded=int(graded @ fan_out),
            binary=effective - int(graded @ fan_out),
            weight_bytes=int(sent @ weights.row_bytes()),
        ),
        read_bytes=sum(r.nbytes for r in reads),
        state_bytes=0,
        weights=[weights],
        activity=len(events.indices) / (rows * case.hidden),
        compile_seconds=compile_seconds,
    )
