"""`inference` on a GPU: our engine beside a rival, GPU time by events, interleaved, medians.

Both sides have their inputs and weights on the GPU and leave their results there. Ours is one launch of a graph, as
every run is from its second time on, and includes counting; the others do not count. Told apart, by the clock: a run of
an event table that the GPU has already, whose rows are sent there and whose results come back as NumPy arrays; chunks
and single steps of a stream that lies on the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from eventrnn.bench.case import Case
from eventrnn.bench.gpu_baselines import Seconds, rivals
from eventrnn.bench.machine import versions
from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.counting.counts import count
from eventrnn.cuda import CudaBackend
from eventrnn.simulation import Simulator, simulate
from eventrnn.state import State

# Steps of a stream's chunk.
CHUNK = 100

# How far the measured activity may be from what was asked, as a share of it.
ACTIVITY_TOLERANCE = 0.1


def inference(case: Case, report: Callable[[str], None]) -> dict[str, Any]:
    """The figures of `eventrnn bench inference --backend cuda`.

    Raises as `bench.inference` does, and BackendUnavailable where there is no GPU.
    """
    from eventrnn.cuda.device import current_device

    current_device()  # nothing is begun where there is none
    rng = np.random.default_rng(case.seed)
    network = random_network(
        case.hidden, case.layers, sparsity=case.left_out, format=case.format, block=case.block, variant=case.variant,
        rng=rng, nm=case.nm, dtype=case.dtype,
    )  # fmt: skip
    inputs = random_events(case.steps, case.batch, case.hidden, case.activity, rng)
    report("compiling")
    started = time.perf_counter()
    simulate(network, inputs, backend="cuda")
    compile_seconds = time.perf_counter() - started
    report("setting the activity")
    network = at_activity(network, inputs, case.activity, "cuda")
    backend = CudaBackend(exact=case.exact)
    simulation = simulate(network, inputs, backend=backend, record="events")
    measured = float(np.mean(simulation.activity))
    if abs(measured - case.activity) > ACTIVITY_TOLERANCE * case.activity:
        raise ValueError(
            f"activity: got {case.activity}, but thresholds bring this random network to {measured:.3f} at best; "
            "ask for less, or use more units"
        )
    engine, state = backend.engine(network), State.zeros(network, case.batch)
    prepared = engine.prepare(inputs)
    engine.run(prepared, state)  # chooses
    device, enqueue = engine.device, engine.on_device(prepared, state)
    uncounted = engine.on_device(prepared, state, counting=False)
    contestants: dict[str, Seconds] = {
        "ours": lambda: device.seconds(enqueue),
        "uncounted": lambda: device.seconds(uncounted),
    }
    contestants |= rivals(case.against, network, inputs)
    contestants["run"] = lambda: _clocked(lambda: engine.run(prepared, state))
    stream, x = Simulator(network, batch=case.batch, backend=backend), device.put(inputs.to_dense()[:CHUNK])
    stream.run(x)  # chooses too
    contestants["chunk"] = lambda: _clocked(lambda: stream.run(x)) / len(x) * case.steps
    contestants["call"] = lambda: _clocked(lambda: [stream.step(each) for each in x]) / len(x) * case.steps
    report(f"timing {case.repeats} rounds")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(case.repeats):
        for name, measure in contestants.items():
            # As on a CPU: an unmeasured one before, so that clocks and caches are warm on both sides.
            measure()
            seconds[name].append(measure())
    each = {name: float(np.median(s)) / case.steps * 1e6 for name, s in seconds.items()}
    ours, uncounted_us, *clocked = (each.pop(name) for name in ("ours", "uncounted", "run", "chunk", "call"))
    best = min(each, key=lambda name: each[name]) if each else None
    total, matrices = count(network, simulation).total, network.matrices().values()
    stored = sum(w.shape[0] * w.shape[1] for w in matrices)
    return {
        "us_per_step": ours,
        "against_us_per_step": each[best] if best else None,
        "speedup": each[best] / ours if best else None,
        "against_variant": best,
        "against_variants_us_per_step": each,
        "stream_steps_per_second": case.batch / ours * 1e6,
        **dict(zip(("run_us_per_step", "chunk_us_per_step", "call_us_per_step"), clocked, strict=True)),
        "counting_share": 1 - uncounted_us / ours,
        "activity": measured,
        "sparsity": 1 - sum(w.nnz for w in matrices) / stored,
        "dense_per_step": total.dense // case.steps,
        "effective_per_step": total.effective / case.steps,
        "executed_per_step": total.executed / case.steps,
        "storage_bytes": sum(w.nbytes for w in matrices),
        "paths": engine.paths(case.batch),
        "compile_seconds": compile_seconds,
    } | case.record() | {"device": device.name, "versions": versions()}  # fmt: skip


def _clocked(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
