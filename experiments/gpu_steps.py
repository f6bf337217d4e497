"""The time of a single step of a stream on a GPU, and of its parts.

    python experiments/gpu_steps.py

Sparse networks have a kernel per layer for single steps (`cuda/fused_step.py`). It is timed beside the graph of all the
kernels of a run, which other networks have, in turn and with equal outputs. Lines go to results/gpu_steps.jsonl:
microseconds by the clock, medians and 99th percentiles. Needs a GPU.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from command_line import command
from records import Records
from rich.console import Console
from rich.table import Table

from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.cuda import engine
from eventrnn.simulation import Simulator

RESULTS = Path(__file__).parent / "results" / "gpu_steps.jsonl"
KEY = ("hidden", "layers", "batch")
CASES = ((1350, 1, 1), (512, 1, 1), (1350, 3, 1), (1350, 1, 16), (1350, 1, 64), (512, 1, 64))
STEPS, CALLS, ROUNDS = 200, 400, 5


def clocked(call: Callable[[], object], calls: int = CALLS) -> list[float]:
    """Microseconds of each call."""
    found = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        found.append((time.perf_counter() - started) * 1e6)
    return found


def measured(hidden: int, layers: int, batch: int) -> dict:
    """The figures of one network."""
    rng = np.random.default_rng(0)
    options = {"sparsity": 0.9, "format": "block", "block": (1, 32), "variant": "evnn", "dtype": "bfloat16"}
    network = random_network(hidden, layers, rng=rng, **options)
    inputs = random_events(STEPS, batch, hidden, 0.1, rng)
    network = at_activity(network, inputs, 0.1, "cuda")
    x, simulators, first = inputs.to_dense(), {}, {}
    fits = engine.fits
    for name in ("fused", "graph"):
        engine.fits = fits if name == "fused" else lambda network, batch: False
        simulators[name] = Simulator(network, batch=batch, backend="cuda")
        first[name] = [simulators[name].step(each) for each in x[:20]]
    engine.fits = fits
    if not all(map(np.array_equal, first["fused"], first["graph"])):
        raise RuntimeError("single steps of the two kinds differ")
    seconds: dict[str, list[float]] = {name: [] for name in simulators}
    for _ in range(ROUNDS):
        for name, simulator in simulators.items():
            rows = iter(np.resize(np.arange(STEPS), CALLS))
            seconds[name] += clocked(lambda simulator=simulator, rows=rows: simulator.step(x[next(rows)]))
    fused, graph = (simulator._stepper.loop for simulator in simulators.values())
    device = fused.device
    x_there, replay = device.put(x[0]), fused.replays[fused.turn, True]
    on_gpu = clocked(lambda: simulators["fused"].step(x_there))

    def launch_and_wait() -> None:
        fused.complete[0] = 0
        replay()
        fused._wait()

    def nothing() -> None:
        with device.on_stream():
            pass

    with device.on_stream():
        parts = {
            "gpu_us": np.median([device.seconds(replay) for _ in range(CALLS)]) * 1e6,
            "graph_gpu_us": np.median([device.seconds(graph.replay) for _ in range(CALLS)]) * 1e6,
            "launch_and_wait_us": np.median(clocked(launch_and_wait)),
        }
    return {
        "hidden": hidden,
        "layers": layers,
        "batch": batch,
        "call_us": np.median(seconds["fused"]),
        "call_99_us": np.percentile(seconds["fused"], 99),
        "graph_call_us": np.median(seconds["graph"]),
        "graph_call_99_us": np.percentile(seconds["graph"], 99),
        "call_on_gpu_us": np.median(on_gpu),
        "stream_us": np.median(clocked(nothing)),
        **parts,
        "device": device.name,
    }


def main() -> None:
    """Measure every case, and append a line each to results/gpu_steps.jsonl."""
    table, records = None, Records(RESULTS, KEY)
    for case in CASES:
        found = measured(*case)
        records.device = found.pop("device")
        line = records.add(found)
        shown = [name for name in line if name.endswith("_us") or name in ("hidden", "layers", "batch")]
        table = table or Table(*shown)
        table.add_row(*(f"{line[name]:.4g}" for name in shown))
    if table is not None:
        Console(width=150).print(table)


if __name__ == "__main__":
    command(main, __doc__).run()
