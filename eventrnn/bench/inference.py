"""The inference benchmark: prepare a case, check its baselines, time all sides, return the figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from eventrnn.bench import gpu_inference, timing
from eventrnn.bench.bandwidth import ByUnits, probes, product_reads, rows_read
from eventrnn.bench.baselines import LayerBaselines, ProductBaselines
from eventrnn.bench.c_blocks import compiled
from eventrnn.bench.case import Case
from eventrnn.bench.machine import device, limited, peak, versions
from eventrnn.bench.networks import prepare_network, random_events, random_weights
from eventrnn.bench.timing import PreparedCase
from eventrnn.counting.counts import Counts, count
from eventrnn.cpu.engine import CpuBackend, CpuEngine
from eventrnn.cpu.plan import KernelPolicy
from eventrnn.cpu.single_product import Product
from eventrnn.state import State

Report = Callable[[str], None]


def inference(*, report: Report = lambda stage: None, **case: Any) -> dict:
    """Time whole sequences and return the figures of `eventrnn bench inference --json`.

    Parameters are the fields of `Case`; `report` is called with the name of each stage. `us_per_step` is the median
    over `repeats` of one run of `steps` steps for the whole batch, divided by the steps. Every variant of every
    baseline runs right after each run of ours, and is compared with ours before anything is timed.

    Raises ValueError for an impossible case, RuntimeError where a baseline computes something else, or where our rate
    of weight bytes exceeds that of the probe.
    """
    asked = Case(**case)
    if asked.backend == "cuda":
        return gpu_inference.inference(asked, report)
    prepared = _product(asked, report) if asked.measures == "product" else _layer(asked, report)
    with limited(asked.threads):
        report("comparing with the baselines")
        prepared.check()
        report(f"timing {asked.repeats} rounds")
        seconds = timing.interleaved({"ours": prepared.ours} | prepared.probes | prepared.baselines, asked.repeats)
    result = timing.figures(prepared, seconds, asked.steps)
    used = versions() | ({"c-blocks": compiled()[1]} if "c-blocks" in asked.baselines else {})
    return result | asked.record() | peak(asked.threads) | {"device": device(), "versions": used}


def _layer(case: Case, report: Report) -> PreparedCase:
    """A whole stack of layers."""
    backend = CpuBackend(case.exact)
    prepared = prepare_network(case, backend, report)
    network, inputs, simulation = prepared.network, prepared.inputs, prepared.simulation
    counts = count(network, simulation)
    engine, state = backend.engine(network, threads=case.threads), State.zeros(network, case.batch)
    run_inputs = engine.prepare(inputs)
    plan = engine.plan(case.steps, case.batch)
    probed = engine if ByUnits.served(plan) else CpuEngine(network, case.threads, ByUnits())
    reads, baselines = rows_read(probed, network, simulation), LayerBaselines.of(case.baselines, network, inputs)
    return PreparedCase(
        ours=lambda: engine.run(run_inputs, state),
        probes=probes(probed.plan(case.steps, case.batch), reads),
        baselines=baselines.runs,
        check=baselines.check,
        counts=counts.total,
        read_bytes=sum(r.nbytes for r in reads),
        state_bytes=sum(counts.state_bytes),
        weights=list(network.matrices().values()),
        activity=prepared.activity,
        compile_seconds=prepared.compile_seconds,
    )


def _product(case: Case, report: Report) -> PreparedCase:
    """One product per step with random events: no cells and no recurrence."""
    rng = np.random.default_rng(case.seed)
    weights = random_weights(
        (case.hidden, 3 * case.hidden),
        sparsity=case.left_out,
        format=case.format,
        block=case.block,
        nm=case.nm,
        dtype=case.dtype,
        rng=rng,
    )
    events = random_events(case.steps, case.batch, case.hidden, case.activity, rng)
    report("compiling")
    started = time.perf_counter()
    ours = Product(weights, events, case.threads, KernelPolicy(case.exact))
    ours.run()
    compile_seconds = time.perf_counter() - started
    probed = ours if ByUnits.served(ours.plan) else Product(weights, events, case.threads, ByUnits())
    reads, baselines = product_reads(probed), ProductBaselines.of(case.baselines, ours)
    rows = case.steps * case.batch
    sent = np.bincount(events.indices, minlength=case.hidden)
    graded = np.bincount(events.indices[events.graded], minlength=case.hidden)
    fan_out, effective = weights.fan_out(), int(sent @ weights.fan_out())
    return PreparedCase(
        ours=ours.run,
        probes=probes(probed.plan, reads),
        baselines=baselines.runs,
        check=baselines.check,
        counts=Counts(
            dense=rows * weights.shape[0] * weights.shape[1],
            effective=effective,
            executed=int(sent @ weights.executed_out()),
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
