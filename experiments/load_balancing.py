"""Does load balancing between threads pay? One training window, with moving and with fixed bounds, interleaved.

    python experiments/load_balancing.py

Two threads run on two cores. A window is timed on idle cores, and beside a process that computes for 40 % of the time
on one of the two cores. One line per case is appended to results/load_balancing.jsonl.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from records import Records
from rich.console import Console
from rich.table import Table

from eventrnn.bench.networks import at_activity, random_events, random_network
from eventrnn.bench.timing import interleaved
from eventrnn.bench.training import at_support
from eventrnn.cli.terminal import progress
from eventrnn.state import State
from eventrnn.training.bptt.model import Model
from eventrnn.training.bptt.workspace import Workspace

RESULTS = Path(__file__).parent / "results" / "load_balancing.jsonl"
KEY = ("competitor", "batch", "hidden", "steps")

#: share of one core's time that the competing process takes; 0 stands for no such process
COMPETITORS = (0.0, 0.4)

# Turns by which two threads never differ, so that no bound moves.
NEVER = 1 << 60

# Seconds of computing and sleeping after which the competing process starts again.
PERIOD = 0.01


def compete(core: int, share: float) -> None:
    """Compute on one core for a share of the time, until the process is ended."""
    os.sched_setaffinity(0, {core})
    while True:
        started = time.perf_counter()
        while time.perf_counter() - started < share * PERIOD:
            pass
        time.sleep((1 - share) * PERIOD)


@contextmanager
def competitor(core: int, share: float) -> Iterator[None]:
    """A process that takes a share of one core while the context is open."""
    if not share:
        yield
        return
    process = multiprocessing.get_context("spawn").Process(target=compete, args=(core, share), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def window(hidden: int, batch: int, steps: int) -> Callable[[], object]:
    """Forward and backward pass of one layer on two threads, 10 % active, 10 % with a surrogate derivative."""
    rng = np.random.default_rng(0)
    inputs = random_events(steps, batch, hidden, 0.1, rng)
    network = at_activity(random_network(hidden, 1, sparsity=0.0, format="dense", block=None, variant="evnn", rng=rng), inputs, 0.1)
    x = inputs.to_dense()
    network = at_support(network, x, 0.1)
    d_output = rng.standard_normal((steps, batch, hidden), dtype=np.float32) / np.float32(x.size)
    model, state = Model(network, threads=2), State.zeros(network, batch)

    def run() -> object:
        tape = model.forward(x, state)[2]
        return model.backward(tape, d_output, d_inputs=True)

    return run


def with_bounds(run: Callable[[], object], moving: bool) -> Callable[[], object]:
    """`run`, with bounds between the threads' units that move or stay where they are."""
    rebalancing = Workspace.rebalancing

    def fixed(workspace: Workspace):
        return rebalancing(workspace)._replace(slack=NEVER)

    def timed() -> object:
        Workspace.rebalancing = rebalancing if moving else fixed
        try:
            return run()
        finally:
            Workspace.rebalancing = rebalancing

    return timed


def show(records: Records) -> Table:
    """One row per competitor."""
    table = Table("competitor", "moving bounds", "fixed bounds", "fixed / moving", title=records.device)
    for share in COMPETITORS:
        line = records.of({"competitor": share})
        if line is not None:
            moving, fixed = line["ms_moving"], line["ms_fixed"]
            table.add_row(f"{share:.0%} of one core", f"{moving:.0f} ms", f"{fixed:.0f} ms", f"{fixed / moving:.2f}")
    return table


def main(
    hidden: Annotated[int, typer.Option(help="Units of the layer, and inputs.")] = 1350,
    batch: Annotated[int, typer.Option(help="Samples.")] = 20,
    steps: Annotated[int, typer.Option(help="Steps of the window.")] = 70,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds. The medians are reported.")] = 15,
    results: Annotated[Path, typer.Option(help="Lines are appended to this file.")] = RESULTS,
) -> None:
    """Measure both cases and print a table."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("load_balancing.py needs two cores; this process may use one")
    os.sched_setaffinity(0, cores)
    records = Records(results, KEY)
    with progress() as report:
        report("cases", 0, len(COMPETITORS), "compiling")
        run = window(hidden, batch, steps)
        runs = {"moving": with_bounds(run, True), "fixed": with_bounds(run, False)}
        for done, share in enumerate(COMPETITORS):
            report("cases", done, len(COMPETITORS), f"a competitor with {share:.0%} of one core")
            with competitor(cores[1], share):
                seconds = interleaved(runs, repeats)
            medians = {f"ms_{name}": float(np.median(times)) * 1e3 for name, times in seconds.items()}
            case = {"competitor": share, "hidden": hidden, "batch": batch, "steps": steps, "repeats": repeats}
            records.add(case | medians)
    Console().print(show(records))


if __name__ == "__main__":
    typer.run(main)
