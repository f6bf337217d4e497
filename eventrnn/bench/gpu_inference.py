"""The inference benchmark on a GPU: GPU time by CUDA events, interleaved with the baselines, medians.

Inputs and weights of all sides are on the GPU, and the results stay there. Our run is one launch of a CUDA graph, as
every run is from its second time on, and includes counting; the baselines do not count. Four more figures are
wall-clock times: `run`, a whole run whose results come back as NumPy arrays; `chunk`, a stream on the GPU in chunks of
`CHUNK` steps; `call`, the same stream step by step; `host_call`, step by step from NumPy arrays to NumPy arrays.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from eventrnn.bench.case import Case
from eventrnn.bench.gpu_baselines import Seconds, baselines
from eventrnn.bench.machine import versions
from eventrnn.bench.networks import prepare_network
from eventrnn.counting.counts import count
from eventrnn.cuda import CudaBackend
from eventrnn.simulation import Simulator
from eventrnn.state import State

# Steps per chunk of a stream.
CHUNK = 100


def inference(case: Case, report: Callable[[str], None]) -> dict[str, Any]:
    """The figures of `eventrnn bench inference --backend cuda`.

    Raises as `bench.inference` does, and BackendUnavailable where there is no GPU.
    """
    from eventrnn.cuda.device import current_device

    current_device()  # raises BackendUnavailable before any work
    backend = CudaBackend(exact=case.exact)
    prepared = prepare_network(case, backend, report)
    network, inputs = prepared.network, prepared.inputs
    engine, state = backend.engine(network), State.zeros(network, case.batch)
    run_inputs = engine.prepare(inputs)
    engine.run(run_inputs, state)  # the first run selects the kernels
    device, enqueue = engine.device, engine.on_device(run_inputs, state)
    uncounted = engine.on_device(run_inputs, state, counting=False)
    runs: dict[str, Seconds] = {
        "ours": lambda: device.seconds(enqueue),
        "uncounted": lambda: device.seconds(uncounted),
    }
    against = baselines(case.baselines, network, inputs, report)
    runs |= against.runs
    runs["run"] = lambda: _clocked(lambda: engine.run(run_inputs, state))
    host_x = inputs.to_dense()[:CHUNK]
    stream, x = Simulator(network, batch=case.batch, backend=backend), device.put(host_x)
    stream.run(x)  # so does the first run of a stream
    runs["chunk"] = lambda: _clocked(lambda: stream.run(x)) / len(x) * case.steps
    runs["call"] = lambda: _clocked(lambda: [stream.step(each) for each in x]) / len(x) * case.steps
    runs["host_call"] = lambda: _clocked(lambda: [stream.step(each) for each in host_x]) / len(x) * case.steps
    report(f"timing {case.repeats} rounds")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(case.repeats):
        for name, measure in runs.items():
            # An untimed call first, as on a CPU, raises the clock rate and fills the caches.
            measure()
            seconds[name].append(measure())
    each = {name: float(np.median(s)) / case.steps * 1e6 for name, s in seconds.items()}
    ours, uncounted_us = each.pop("ours"), each.pop("uncounted")
    clocked = {f"{name}_us_per_step": each.pop(name) for name in ("run", "chunk", "call", "host_call")}
    best = min(each, key=lambda name: each[name]) if each else None
    total, matrices = count(network, prepared.simulation).total, network.matrices().values()
    stored = sum(w.shape[0] * w.shape[1] for w in matrices)
    figures = {
        "us_per_step": ours,
        "against_us_per_step": each[best] if best else None,
        "speedup": each[best] / ours if best else None,
        "against_variant": best,
        "against_variants_us_per_step": each,
        "against_first_us_per_step": {name: s / case.steps * 1e6 for name, s in against.first_seconds.items()},
        "against_left_out": against.left_out,
        "stream_steps_per_second": case.batch / ours * 1e6,
        **clocked,
        "counting_share": 1 - uncounted_us / ours,
        "activity": prepared.activity,
        "sparsity": 1 - sum(w.nnz for w in matrices) / stored,
        "dense_per_step": total.dense // case.steps,
        "effective_per_step": total.effective / case.steps,
        "executed_per_step": total.executed / case.steps,
        "storage_bytes": sum(w.nbytes for w in matrices),
        "paths": engine.paths(case.batch),
        "compile_seconds": prepared.compile_seconds,
    }
    return figures | case.record() | {"device": device.name, "versions": versions() | against.versions}


def _clocked(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
