"""Where the cycles of a step of one layer go, in the kernel of the cluster plan, and which cluster size is the fastest.

    python experiments/gpu_phases.py                       # hidden 512, 768, 1024, 1344; batch 1
    python experiments/gpu_phases.py --hidden 1350 --batch 16 --cluster 16
    python experiments/gpu_phases.py --no-exact --hidden 1350 --batch 64    # tensor cores in clusters

For every cluster size: microseconds per step of the kernel as it always runs, and the mean cycles per turn of each
phase, from a variant that reads the clock of the multiprocessor. "slowest" is the warp with the most cycles of
products. Lines go to results/gpu_phases.jsonl. Needs a GPU with clusters.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from command_line import command
from records import Records
from rich.console import Console
from rich.table import Table

from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.cuda import CudaBackend, cluster_plan, tables, tensor_core_loop, tensor_core_tiles
from eventrnn.cuda.cluster_plan import CLUSTER_SIZES
from eventrnn.cuda.plan import Plan
from eventrnn.network import Network
from eventrnn.state import State

RESULTS = Path(__file__).parent / "results" / "gpu_phases.jsonl"
KEY = ("hidden", "batch", "activity", "cluster", "most_warps", "exact")
PHASES = tables.TURN_PHASES
SIZES, REPEATS = (512, 768, 1024, 1344), 15

TENSOR_SIZES = tensor_core_tiles.CLUSTER_SIZES

# Steps of one stream; of more there are fewer, because a run must be one launch for its cycles.
STEPS, FEWEST_STEPS = 1000, 100


def measured(network: Network, inputs, size: int, exact: bool) -> dict | None:
    """The figures of one cluster size; None where the layer does not fit."""
    cluster_plan.CLUSTER_SIZES = tensor_core_tiles.CLUSTER_SIZES = (size,)
    steps, batch, found = inputs.shape[0], inputs.shape[1], {}
    for clocked in (False, True):
        engine = CudaBackend(exact=exact).engine(network)
        if exact:
            plan, clocks = engine.packed.plans(batch, ())[0], engine.packed
            if not isinstance(plan, Plan) or not plan.cluster:
                return None
            blocks, warps, turns = len(plan.blocks), plan.warps, steps * plan.samples
            found |= {"warps": warps, "samples": plan.samples, "groups": plan.groups}
            found |= {"tiles": plan.layers[0].tiles, "near": bool(plan.layers[0].layout_rec & tables.RESIDENT)}
        else:
            engine.tensor_layers[batch] = (0,)
            clocks = engine.packed.tensors[0].loop(batch)
            if clocks is None:
                return None
            plan = clocks.plan
            clusters = plan.clusters(batch)
            blocks, warps, turns = plan.blocks * clusters, plan.threads // 32, steps
            found |= {"warps": warps, "samples": 2 * plan.pairs, "groups": clusters, "held": plan.held}
        if clocked:
            clocks.clocks = engine.device.put(np.zeros((blocks, warps, len(PHASES)), np.int64))
        enqueue = engine.on_device(engine.prepare(inputs), State.zeros(network, batch), counting=False)
        seconds = [engine.device.seconds(enqueue) for _ in range(REPEATS)]
        name = "clocked_us_per_step" if clocked else "us_per_step"
        found[name] = float(np.median(seconds[2:])) / steps * 1e6
        if clocked:
            cycles = clocks.clocks.get() / turns
            found["cycles"] = dict(zip(PHASES, cycles.mean(axis=(0, 1)), strict=True))
            slowest = np.unravel_index(cycles[:, :, 2].argmax(), cycles.shape[:2])
            found["slowest"] = dict(zip(PHASES, cycles[slowest], strict=True))
            found["cycles_per_turn"] = float(cycles.sum(axis=2).mean())
    return found


def main(
    hidden: Annotated[list[int] | None, typer.Option(help="Units of the layer; may be given several times.")] = None,
    batch: Annotated[int, typer.Option(help="Samples.")] = 1,
    activity: Annotated[float, typer.Option(help="Share of units that fire in a step.")] = 0.1,
    cluster: Annotated[list[int] | None, typer.Option(help="Blocks per cluster; may be given several times.")] = None,
    warps: Annotated[int, typer.Option(help="Warps per block, at most.")] = cluster_plan.CLUSTER_WARPS,
    exact: Annotated[
        bool, typer.Option(help="Without it: the clusters of tensor cores, all steps in one launch.")
    ] = True,
    results: Annotated[Path, typer.Option(help="File of the lines.")] = RESULTS,
) -> None:
    """Measure every cluster size of every layer, and append a line each."""
    from eventrnn.cuda.device import current_device

    records = Records(results, KEY)
    records.device = current_device().name
    cluster_plan.CLUSTER_WARPS = warps
    tensor_core_loop.FIRST_STEPS = STEPS
    table = Table("units", "blocks", "warps", "µs", "clocked", *PHASES, *(f"{name}, slowest" for name in PHASES))
    for units in hidden or SIZES:
        rng = np.random.default_rng(0)
        options = {"sparsity": 0.9, "format": "block", "block": (1, 32), "variant": "evnn", "dtype": "bfloat16"}
        network = random_network(units, 1, rng=rng, **options)
        inputs = random_events(max(FEWEST_STEPS, STEPS // batch), batch, units, activity, rng)
        network = at_activity(network, inputs, activity, "cuda")
        for size in cluster or (CLUSTER_SIZES if exact else TENSOR_SIZES):
            found = measured(network, inputs, size, exact)
            if found is None:
                continue
            case = {"hidden": units, "batch": batch, "activity": activity, "cluster": size, "most_warps": warps}
            records.add({**case, "exact": exact, **found})
            cycles = [f"{found[kind][name]:.0f}" for kind in ("cycles", "slowest") for name in PHASES]
            table.add_row(
                *(str(units), str(size), str(found["warps"])),
                *(f"{found['us_per_step']:.2f}", f"{found['clocked_us_per_step']:.2f}", *cycles),
            )
    Console(width=170).print(table)


if __name__ == "__main__":
    command(main, __doc__).run()
