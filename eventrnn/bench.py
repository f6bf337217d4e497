"""Measured inference: our engine beside a dense rival, interleaved in one run, medians, compile time apart.

Bytes are counted from the events and compared with a probe that does nothing but read the same rows in the same
order: a rate above the probe's means that the benchmark is wrong, and is an error.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from eventrnn.backend import State
from eventrnn.cells import Cell
from eventrnn.cpu import CpuEngine
from eventrnn.plan import END, IN, REC, REC_GATED, Plan
from eventrnn.events import Events
from eventrnn.network import Layer, Network, Simulation, simulate
from eventrnn.observe import count, senders
from eventrnn.packing import BLOCK_COLUMNS, HIGH, KIND, LOW, ROW_TILES
from eventrnn.traverse import read_rows
from eventrnn.weights import Weights, check_block, convert

# How far the measured activity may be from what was asked, as a share of it.
ACTIVITY_TOLERANCE = 0.1
SETTLE_SECONDS = 0.05
RIVALS = ("torch", "torch-step", "blas", "none")


def random_network(
    hidden: int,
    layers: int,
    *,
    sparsity: float,
    format: str,
    block: tuple[int, int] | None,
    variant: str,
    rng: np.random.Generator,
) -> Network:
    """Layers of `hidden` units on `hidden` inputs, weights Gaussian; `sparsity` of the blocks (or weights) left out."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity}, need a share in [0, 1)")
    if format == "dense" and sparsity:
        raise ValueError(f"sparsity: got {sparsity} with format dense, which stores every weight; use csr or block")

    def weights() -> Weights:
        shape = (hidden, 3 * hidden)
        r, c = block or (1, 1)
        check_block((r, c), shape)
        grid = (-(-shape[0] // r), -(-shape[1] // c))
        kept = np.ones(grid[0] * grid[1], bool)
        kept[rng.permutation(len(kept))[: round(sparsity * len(kept))]] = False
        mask = np.repeat(np.repeat(kept.reshape(grid), r, axis=0), c, axis=1)[: shape[0], : shape[1]]
        scale = 2 / np.sqrt(hidden * (1 - sparsity))
        return convert((rng.standard_normal(shape) * scale * mask).astype(np.float32), format, block=block)

    zeros = np.zeros(3 * hidden, np.float32)
    cell = Cell(variant=variant)
    layer = [Layer(weights(), weights(), zeros, zeros, np.zeros(hidden, np.float32), cell) for _ in range(layers)]
    return Network(tuple(layer))


def at_activity(network: Network, inputs: Events, activity: float) -> Network:
    """The network with each layer's common threshold bisected until it fires at the asked rate on these inputs."""
    layers: list[Layer] = []
    for layer in network.layers:
        low, high = 0.0, 2.0
        for _ in range(14):
            threshold = np.full(layer.units, (low + high) / 2, np.float32)
            tried = [*layers, replace(layer, threshold=threshold)]
            measured = simulate(Network(tuple(tried)), inputs).activity[-1]
            low, high = ((low + high) / 2, high) if measured > activity else (low, (low + high) / 2)
        layers.append(replace(layer, threshold=np.full(layer.units, high, np.float32)))
    return replace(network, layers=tuple(layers))


def random_events(steps: int, batch: int, size: int, activity: float, rng: np.random.Generator) -> Events:
    """Graded events, each unit at each step with probability `activity`, values in [0.25, 1)."""
    fired = rng.random((steps, batch, size)) < activity
    return Events.from_dense(np.where(fired, rng.uniform(0.25, 1, fired.shape), 0).astype(np.float32))


def inference(
    *,
    hidden: int = 1350,
    layers: int = 1,
    batch: int = 1,
    activity: float = 0.1,
    sparsity: float = 0.9,
    format: str = "block",
    block: tuple[int, int] | None = (1, 64),
    variant: str = "evnn",
    threads: int = 1,
    against: str = "torch",
    steps: int = 200,
    repeats: int = 15,
    seed: int = 0,
    report: Callable[[str], None] = lambda stage: None,
) -> dict:
    """Time whole sequences and return the figures of `eventrnn bench inference --json`.

    `us_per_step` is the median over `repeats` of one run of `steps` steps for the whole batch, divided by the steps;
    `against` runs the dense rival of the same size right after each of ours. Raises RuntimeError when the weight
    bytes per second exceed what the probe could read.
    """
    for name, value in (
        ("hidden", hidden),
        ("layers", layers),
        ("batch", batch),
        ("threads", threads),
        ("steps", steps),
    ):
        if value < 1:
            raise ValueError(f"{name}: got {value}, need a whole number >= 1")
    if repeats < 3:
        raise ValueError(f"repeats: got {repeats}, need at least 3 for a median")
    if not 0 < activity <= 1:
        raise ValueError(f"activity: got {activity}, need a share in (0, 1]")
    if against not in RIVALS:
        raise ValueError(f"against: got {against!r}, need one of {', '.join(RIVALS)}")
    rng = np.random.default_rng(seed)
    network = random_network(hidden, layers, sparsity=sparsity, format=format, block=block, variant=variant, rng=rng)
    inputs = random_events(steps, batch, hidden, activity, rng)
    report("compiling")
    started = time.perf_counter()
    simulate(network, inputs)
    compile_seconds = time.perf_counter() - started
    report("setting the activity")
    network = at_activity(network, inputs, activity)
    simulation = simulate(network, inputs, record="events")
    measured = float(np.mean(simulation.activity))
    if abs(measured - activity) > ACTIVITY_TOLERANCE * activity:
        raise ValueError(
            f"activity: got {activity}, but thresholds bring this random network to {measured:.3f} at best; "
            "ask for less, or use more units"
        )
    counts = count(network, simulation)

    engine, feed, state = CpuEngine(network, threads), network.feed(inputs), State.zeros(network, batch)
    contestants: dict[str, Callable[[], object]] = {"ours": lambda: engine.run(feed, state)}
    reads = rows_read(engine, network, simulation)
    contestants["probe"] = _probe(engine.plan(steps, batch), reads)
    if against != "none":
        contestants["against"] = _rival(against, network, inputs, threads)
    report(f"timing {repeats} rounds")
    seconds = interleaved(contestants, repeats)

    ours = float(np.median(seconds["ours"])) / steps
    weight_bytes = sum(r.nbytes for r in reads) / steps
    rate = weight_bytes / ours / 1e9
    probe_rate = sum(r.probed for r in reads) / float(np.min(seconds["probe"])) / 1e9
    if rate > probe_rate:
        raise RuntimeError(
            f"benchmark: {rate:.1f} GB/s of weights read, but the probe reads these rows at {probe_rate:.1f} GB/s at "
            "best; the machine is too noisy or the kernel skips work"
        )
    result = {
        "us_per_step": ours * 1e6,
        "against_us_per_step": None,
        "speedup": None,
        "against": against,
        "activity": measured,
        "activity_asked": activity,
        "sparsity": 1 - sum(w.nnz for w in network.matrices().values()) / (6 * hidden * hidden * layers),
        "dense_per_step": counts.total.dense // steps,
        "effective_per_step": counts.total.effective / steps,
        "executed_per_step": counts.total.executed / steps,
        "bytes_per_step": weight_bytes + sum(counts.state_bytes) / steps,
        "bandwidth_gb_s": rate,
        "probe_gb_s": probe_rate,
        "bandwidth_fraction": rate / probe_rate,
        "compile_seconds": compile_seconds,
    }
    if "against" in seconds:
        rival = float(np.median(seconds["against"])) / steps
        result |= {"against_us_per_step": rival * 1e6, "speedup": rival / ours}
    return result | {
        "hidden": hidden,
        "layers": layers,
        "batch": batch,
        "format": format,
        "block": f"{block[0]}x{block[1]}" if block else None,
        "variant": variant,
        "threads": threads,
        "steps": steps,
        "repeats": repeats,
        "device": device(),
        "versions": versions(),
    }


def interleaved(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every contestant, each run once unmeasured, then in turn, `repeats` times, rested."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(repeats):
        for name, run in contestants.items():
            # Worker threads of BLAS and OpenMP go on spinning for a while after their work, on our cores.
            time.sleep(SETTLE_SECONDS)
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def _rival(name: str, network: Network, inputs: Events, threads: int) -> Callable[[], object]:
    if name == "blas":
        from eventrnn.blas import BlasEngine

        dense, feed = BlasEngine(network), network.feed(inputs)
        state = State.zeros(network, inputs.shape[1])
        return lambda: dense.run(feed, state)
    try:
        import torch
    except ImportError:
        raise ValueError("against: torch is not installed; pip install torch, or use --against blas") from None
    torch.set_num_threads(threads)
    hidden, layers = network.layers[0].units, len(network.layers)
    gru = torch.nn.GRU(hidden, hidden, layers)
    x = torch.from_numpy(inputs.to_dense())

    def sequence():
        with torch.inference_mode():
            return gru(x)

    def stepwise():
        with torch.inference_mode():
            state = None
            for t in range(len(x)):
                _, state = gru(x[t : t + 1], state)
            return state

    return sequence if name == "torch" else stepwise


@dataclass(frozen=True)
class Reads:
    """The weight rows that a run reads from one matrix, in groups; a group reads a row once.

    Attributes
    ----------
    windows     : of the engine's plan, each read by every group
    indptr, ids : units read by each group
    per_chunk   : groups in a chunk of time
    nbytes      : values and indices of all these rows, over all threads
    probed      : what the probe reads for them: of block columns, which it does not pick from, every block
    """

    windows: range
    indptr: np.ndarray
    ids: np.ndarray
    per_chunk: int
    nbytes: int
    probed: int


def rows_read(engine: CpuEngine, network: Network, simulation: Simulation) -> list[Reads]:
    """What the engine reads in a recorded run, in its order: a layer's chunk of inputs, then its recurrent steps.

    An input product shares rows over its chunk, a recurrent one over the batch of a step (see `propagate_all`).
    """
    batch, chunk = simulation.batch, engine.chunk_steps(simulation.batch)
    total, plan = simulation.steps * batch, engine.plan(simulation.steps, batch)
    received, reads = senders(network, simulation), []
    for k, layer in enumerate(plan.layers):
        for column, after, name, rows in (
            (IN, REC, "w_in", chunk * batch),
            (REC, REC_GATED, "w_rec", batch),
            (REC_GATED, END, "w_rec", batch),
        ):
            if layer[column] == layer[after]:
                continue
            weights, events = received[f"layers.{k}.{name}"]
            window = plan.windows[0, layer[column]]
            columns = int(sum(w[HIGH] - w[LOW] for part in plan.windows for w in part[layer[column] : layer[after]]))
            groups = [
                np.unique(events.indices[a:b]) if window[KIND] in (ROW_TILES, BLOCK_COLUMNS) else events.indices[a:b]
                for part in (range(at, min(at + rows, total)) for at in range(0, total, rows))
                for a, b in ((events.indptr[part[0]], events.indptr[part[-1] + 1]),)
            ]
            ids = np.concatenate([*groups, np.zeros(0, np.int32)])
            indptr = np.cumsum([0, *map(len, groups)])
            # The paper's variant cuts the row in two.
            share = columns / weights.shape[1]
            nbytes = probed = int(weights.row_bytes()[ids].sum() * share)
            if window[KIND] == BLOCK_COLUMNS:
                probed = int(weights.row_bytes().sum() * share) * len(groups)
            span = range(int(layer[column]), int(layer[after]))
            reads.append(Reads(span, indptr, ids, chunk * batch // rows, nbytes, probed))
    return reads


def _probe(plan: Plan, reads: list[Reads]) -> Callable[[], object]:
    """Reads those rows and does nothing else."""
    workers = ThreadPoolExecutor(plan.parts)
    pools = plan.values, plan.index, plan.pointers

    def share(part: int) -> None:
        for at in range(max(-(-(len(r.indptr) - 1) // r.per_chunk) for r in reads)):
            for r in reads:
                start, stop = (min(k * r.per_chunk, len(r.indptr) - 1) for k in (at, at + 1))
                for window in r.windows:
                    read_rows(plan.windows[part, window], *pools, r.indptr, r.ids, start, stop)

    # One thread reads without the hand-over to a pool, as the engine does.
    return (lambda: share(0)) if plan.parts == 1 else (lambda: list(workers.map(share, range(plan.parts))))


def device() -> str:
    """The processor's name and number of cores."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    import os

    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of this package and what its speed depends on."""
    found = {"python": platform.python_version()}
    for name in ("eventrnn", "numba", "llvmlite", "numpy", "scipy", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def first_call() -> dict:
    """Seconds until the first answer of the cpu engine in this process, and whether kernels came from the cache."""
    from eventrnn import cpu

    network = Network.random([8], inputs=4, rng=np.random.default_rng(0))
    started = time.perf_counter()
    simulate(network, np.zeros((1, 1, 4), np.float32))
    seconds = time.perf_counter() - started
    hits = sum(cpu.run.stats.cache_hits.values())
    return {"first_call_seconds": seconds, "kernels_from_cache": bool(hits), "kernel_cache": cpu.run.stats.cache_path}
