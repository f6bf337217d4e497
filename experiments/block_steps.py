"""The time of a step by block size and batch, beside the dense layer (after Narang et al. 2017).

    python experiments/block_steps.py                       # one CPU thread
    python experiments/block_steps.py --backend cuda

One layer of random weights, of which 90 % are pruned: a GRU, whose units all send, and an EGRU of which 10 % do. The
dense layer, single weights and every block size run in turn, and beside them the GRU of PyTorch with the dense weights
(of cuDNN on a GPU). A line per cell and batch goes to results/block_steps.jsonl: microseconds per step for the whole
batch, medians. On a GPU these are times of the GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated

import numpy as np
import typer
from command_line import command
from records import Records

from eventrnn.bench.baselines import LayerBaselines
from eventrnn.bench.machine import limited
from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.bench.timing import interleaved
from eventrnn.cells import Cell
from eventrnn.cpu.engine import CpuEngine
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.state import State

RESULTS = Path(__file__).parent / "results" / "block_steps.jsonl"
KEY = ("backend", "cell", "hidden", "batch")

# Share of the units that send.
ACTIVITY = {"gru": 1.0, "egru": 0.1}
BATCHES = (1, 4, 16, 64)
SPARSITY = 0.9
BLOCKS = ("dense", "1x1", "1x16", "4x4", "16x16", "32x32")


def layer(hidden: int, block: str, cell: str, inputs: Events, backend: str) -> Network:
    """A layer of these units and inputs, dense or pruned in blocks of this size."""
    r, c = (1, 1) if block == "dense" else map(int, block.split("x"))
    kind = {"dense": "dense", "1x1": "csr"}.get(block, "block")
    options = {"sparsity": 0.0 if kind == "dense" else SPARSITY, "format": kind, "variant": "evnn"}
    network = random_network(
        hidden, 1, block=(r, c) if kind == "block" else None, rng=np.random.default_rng(0), **options
    )
    if cell == "egru":
        return at_activity(network, inputs, ACTIVITY[cell], backend)
    return replace(network, layers=tuple(replace(each, cell=Cell(cell)) for each in network.layers))


def measured(backend: str, cell: str, hidden: int, batch: int, steps: int, repeats: int) -> dict:
    """The line of a cell and a batch."""
    inputs = random_events(steps, batch, hidden, ACTIVITY[cell], np.random.default_rng(1))
    networks = {block: layer(hidden, block, cell, inputs, backend) for block in BLOCKS}
    timed = on_cpu if backend == "cpu" else on_gpu
    seconds = timed(networks, inputs, repeats)
    us = {name: median(each) / steps * 1e6 for name, each in seconds.items()}
    line = {"backend": backend, "cell": cell, "hidden": hidden, "batch": batch, "sparsity": SPARSITY}
    return line | {"activity": ACTIVITY[cell], "steps": steps, "repeats": repeats, "us_per_step": us}


def on_cpu(networks: dict[str, Network], inputs: Events, repeats: int) -> dict[str, list[float]]:
    """Seconds of runs of one thread each."""

    def run(network: Network) -> Callable[[], object]:
        engine, state = CpuEngine(network, 1), State.zeros(network, inputs.shape[1])
        given = engine.prepare(inputs)
        return lambda: engine.run(given, state)

    runs = {name: run(network) for name, network in networks.items()}
    for compile_first in runs.values():
        compile_first()
    runs |= LayerBaselines.of(("torch",), networks["dense"], inputs).runs
    with limited(1):
        return interleaved(runs, repeats)


def on_gpu(networks: dict[str, Network], inputs: Events, repeats: int) -> dict[str, list[float]]:
    """Seconds of the GPU."""
    from eventrnn.bench.gpu_baselines import baselines
    from eventrnn.cuda import CudaBackend

    def run(network: Network) -> Callable[[], float]:
        engine, state = CudaBackend().engine(network), State.zeros(network, inputs.shape[1])
        given = engine.prepare(inputs)
        # The first run selects the kernels.
        engine.run(given, state)
        device, enqueue = engine.device, engine.on_device(given, state)
        return lambda: device.seconds(enqueue)

    runs = {name: run(network) for name, network in networks.items()}
    runs |= baselines(("cudnn",), networks["dense"], inputs, lambda stage: None).runs
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, timed in runs.items():
            timed()
            seconds[name].append(timed())
    return seconds


def main(
    backend: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    hidden: Annotated[int, typer.Option(min=32, help="Units and inputs of the layer.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run.")] = 20,
    repeats: Annotated[int, typer.Option(min=3, help="Rounds.")] = 5,
    results: Annotated[Path, typer.Option(help="File to which a line per case is appended.")] = RESULTS,
) -> None:
    if backend not in ("cpu", "cuda"):
        raise ValueError(f"backend: got {backend!r}, need cpu or cuda")
    records = Records(results, KEY)
    if backend == "cuda":
        from eventrnn.cuda.device import current_device

        records.device = current_device().name
    for batch in BATCHES:
        for cell in ACTIVITY:
            line = records.add(measured(backend, cell, hidden, batch, steps, repeats))
            cells = ", ".join(f"{name} {us:.1f}" for name, us in line["us_per_step"].items())
            print(f"{cell}, batch {batch}: {cells} µs per step", flush=True)


if __name__ == "__main__":
    command(main, __doc__).run()
