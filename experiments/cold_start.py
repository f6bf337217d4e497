"""What a first run costs: compile time with an empty cache, and memory of pruned networks and of long inputs.

    python experiments/cold_start.py
    python experiments/cold_start.py --against ../other-checkout

Every case runs in a process of its own; those of a cold start with an empty cache of kernels. With another checkout of
the package, every case is also run with that one, before this one. One line per call and version is appended to
results/cold_start.jsonl: seconds of wall clock and of the processor, functions that Numba compiled, and the growth of
the largest resident memory. A version is the last commit that changed the package.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from command_line import command
from records import ROOT, Records
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "cold_start.jsonl"
KEY = ("call", "version")

# What every process begins with. `measured` returns what a call cost.
HEAD = """
import json, resource, time
import numpy as np
import eventrnn as er
from numba.core import event

compiled = []

class Listener(event.Listener):
    def on_start(self, event):
        compiled.append(event)
    def on_end(self, event):
        pass

event.register("numba:compile", Listener())

def measured(call):
    compiled.clear()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return {
        "seconds": time.perf_counter() - wall,
        "processor_seconds": time.process_time() - processor,
        "compiled": len(compiled),
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1e3,
    }

rng = np.random.default_rng(0)
zeros = np.zeros((3, 1, 4), np.float32)
small = er.Network.random([16], inputs=4, rng=rng)
"""

# One layer, one sample, dense weights or 1x64 blocks of which 90 % are pruned.
COLD = """
from eventrnn.pruning import prune
network = er.Network.random([256], inputs=64, readout=10, rng=rng, threshold=0.1)
if {pruned}:
    network = prune(network, 0.9, block=(1, 64), exempt=("readout",))
x = rng.standard_normal((100, 1, 64)).astype(np.float32)
simulator = er.Simulator(network)
first = measured(lambda: er.simulate(network, x))
print(json.dumps({{"first simulate": first, "first step": measured(lambda: simulator.step(x[0]))}}))
"""

# 12,000 units with 64 weights each, single or in 1x8 blocks.
PRUNED = """
n, width = 12_000, {width}
columns = np.sort(rng.integers(0, 3 * n // width, (n, 64 // width)), axis=1)
kept = np.concatenate([np.ones((n, 1), bool), np.diff(columns, axis=1) > 0], axis=1)
indptr = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int64)
values = rng.standard_normal(kept.sum() * width).astype(np.float32) / 8
arrays = indptr, columns[kept].astype(np.int32), values, (n, 3 * n)
weights = er.CSR(*arrays) if width == 1 else er.BlockCSR(*arrays, (1, width))
bias, few = np.zeros(3 * n, np.float32), er.Dense(rng.standard_normal((4, 3 * n), dtype=np.float32))
x = rng.standard_normal((5, 1, 4)).astype(np.float32)
er.simulate(small, zeros)
def run():
    er.simulate(er.Network((er.Layer(few, weights, bias, bias, np.full(n, 0.05, np.float32)),)), x)
print(json.dumps({{"simulate": measured(run) | {{"given_megabytes": weights.nbytes / 1e6}}}}))
"""

# A long input of numbers, all of which are events.
LONG = """
network = er.Network.random([16], inputs=64, readout=2, rng=rng, threshold=0.3)
er.simulate(network, np.zeros((2, 1, 64), np.float32))
x = rng.standard_normal((300_000, 1, 64), dtype=np.float32)
print(json.dumps({"simulate": measured(lambda: er.simulate(network, x)) | {"given_megabytes": x.nbytes / 1e6}}))
"""

CASES = {
    "cold start, dense": COLD.format(pruned=False),
    "cold start, 1x64 blocks": COLD.format(pruned=True),
    "pruned network, single weights": PRUNED.format(width=1),
    "pruned network, 1x8 blocks": PRUNED.format(width=8),
    "long input": LONG,
}


def measure(case: str, package: Path) -> dict[str, dict]:
    """What the calls of one process cost, by name."""
    environment = {**os.environ, "PYTHONPATH": str(package)}
    command = [sys.executable, "-P", "-c", HEAD + CASES[case]]
    with tempfile.TemporaryDirectory() as folder:
        if case.startswith("cold"):
            environment["NUMBA_CACHE_DIR"] = folder
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return {f"{case}: {name}": cost for name, cost in json.loads(finished.stdout).items()}


def version_of(package: Path) -> str:
    """The last commit that changed the package of a checkout."""
    command = ["git", "-C", str(package), "log", "-1", "--format=%h", "--", "eventrnn"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def show(records: Records, versions: list[str]) -> Table:
    """One row per call and version."""
    columns = ("call", "version", "seconds", "processor", "compiled", "memory", "given")
    table = Table(*columns, title=records.device)
    for call in dict.fromkeys(line["call"] for line in records.lines):
        for version in versions:
            line = records.of({"call": call, "version": version})
            if line is not None:
                given = f"{line['given_megabytes']:.0f} MB" if "given_megabytes" in line else ""
                seconds = (f"{line[name]:.1f} s" for name in ("seconds", "processor_seconds"))
                table.add_row(call, version, *seconds, str(line["compiled"]), f"{line['megabytes']:.0f} MB", given)
    return table


def main(
    against: Annotated[Path | None, typer.Option(help="Checkout of another version to measure first.")] = None,
    cases: Annotated[list[str] | None, typer.Option("--case", help="Measure this case only; may be repeated.")] = None,
    results: Annotated[Path, typer.Option(help="Lines are appended to this file.")] = RESULTS,
) -> None:
    """Measure every case and print a table."""
    unknown = set(cases or ()) - set(CASES)
    if unknown:
        raise typer.BadParameter(f"got {', '.join(sorted(unknown))}; need some of {', '.join(CASES)}")
    records = Records(results, KEY)
    packages = [ROOT] if against is None else [against.resolve(), ROOT]
    for case in cases or CASES:
        for package in packages:
            for call, cost in measure(case, package).items():
                records.add({"call": call, "version": version_of(package)} | cost)
    Console().print(show(records, list(map(version_of, packages))))


if __name__ == "__main__":
    command(main, __doc__).run()
