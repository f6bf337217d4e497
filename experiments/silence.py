"""What silence costs: event streams of which 99 % of the steps are silent, beside another version of the package.

    python experiments/silence.py --against ../other-checkout
    python experiments/silence.py --against ../other-checkout --case "one layer"

Every case is one network of layers of 1350 units with 90 % of their 1x64 blocks pruned, and a read-out of 10. In few
steps, drawn at random, 5 % of the inputs send an event. Each version has a process of its own; both compute the same
stream, and their outputs, states and counts must be equal in every bit before anything is timed. Then they take turns.
One line per case is appended to results/silence.jsonl: medians of the rounds in microseconds per step, for all samples
together, of wall clock and of the processor, which others may have used meanwhile; and what share of the steps of all
layers and samples was silent: without an input, and without an event that is carried into it. A version is the last
commit that changed the package.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from cold_start import version_of
from command_line import command
from records import ROOT, Records
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "silence.jsonl"
KEY = ("case", "version", "against")

#: name -> what differs from `DEFAULTS`
CASES = {
    "one layer": {},
    "one layer, slow cells": {"keep_bias": 4.0, "steps": 200_000},
    "one layer, twice as many inputs": {"share": 0.01, "steps": 200_000},
    "two layers": {"layers": 2, "steps": 200_000},
    "batch 8": {"batch": 8, "steps": 50_000},
    "one layer, numbers": {"given": "numbers", "steps": 20_000},
    "one layer, step by step": {"given": "steps", "steps": 5_000},
    "one layer, every step recorded": {"record": ["states"], "steps": 20_000},
}
DEFAULTS = {
    "hidden": 1350,
    "layers": 1,
    "batch": 1,
    "steps": 1_000_000,
    "share": 0.005,
    "keep_bias": 0.0,
    "threshold": 0.4,
    "given": "events",
    "record": [],
}

# Reads the case; then prints what it has measured, once for every line that it is sent.
WORKER = """
import hashlib, json, sys, time
from dataclasses import replace
import numpy as np
import eventrnn as er
from eventrnn.bench.networks import random_network, random_weights
from eventrnn.network import Readout

case = json.loads(sys.stdin.readline())
hidden, layers, batch, steps = (case[name] for name in ("hidden", "layers", "batch", "steps"))
rng = np.random.default_rng(0)
made = random_network(hidden, layers, sparsity=0.9, format="block", block=(1, 64), variant="evnn", rng=rng)

def biased(layer):
    bias = (rng.standard_normal(3 * hidden) / 10).astype(np.float32)
    bias[:hidden] += np.float32(case["keep_bias"])
    return replace(layer, bias_in=bias, threshold=np.full(hidden, case["threshold"], np.float32))

weights = random_weights((hidden, 10), sparsity=0, format="dense", rng=rng)
network = er.Network(tuple(map(biased, made.layers)), readout=Readout(weights, np.zeros(10, np.float32)))

def stream(steps):
    rng, each = np.random.default_rng(1), hidden // 20
    busy = np.flatnonzero(rng.random(steps * batch) < case["share"])
    units = [np.sort(rng.choice(hidden, each, replace=False)) for _ in busy]
    counts = np.zeros(steps * batch + 1, np.int64)
    counts[busy + 1] = each
    indices = np.concatenate([*units, np.zeros(0)]).astype(np.int32)
    values = rng.uniform(0.25, 1, len(indices)).astype(np.float32)
    return er.Events(np.cumsum(counts), indices, values, (steps, batch, hidden))

def silent(run):
    shares, below = [], run.inputs
    for sent in run.events:
        inputs, own = (np.diff(each.indptr).reshape(-1, batch) == 0 for each in (below, sent))
        shares.append(float((inputs[1:] & own[:-1]).mean()))
        below = sent
    return float(np.mean(shares))

fed = stream(steps)
if case["given"] != "events":
    fed = fed.to_dense()
simulator = er.Simulator(network, batch=batch)

def run():
    simulator.reset()
    started = np.array([time.perf_counter(), time.process_time()])
    if case["given"] == "steps":
        output = [simulator.step(x) for x in fed]
        fired = []
    else:
        result = simulator.run(fed, record=case["record"])
        fired, output = result.fired, result.output
    wall, processor = [time.perf_counter(), time.process_time()] - started
    digest = hashlib.sha256(np.asarray(output).tobytes())
    parts = [*simulator.state.cells, *simulator.state.outputs, *(each.total for each in fired)]
    for part in parts:
        digest.update(part.tobytes())
    return {"us": wall, "processor_us": processor, "digest": digest.hexdigest()}

found = er.simulate(network, stream(20_000), record="events")
print(json.dumps({"silent": silent(found), "activity": found.activity}), flush=True)
for line in sys.stdin:
    print(json.dumps(run()), flush=True)
"""


class Worker:
    """A process with one version of the package and one case; `described` is its share of silent steps."""

    def __init__(self, package: Path, case: dict):
        environment = {**os.environ, "PYTHONPATH": str(package)}
        command = [sys.executable, "-P", "-c", WORKER]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.described = self._ask(json.dumps(case))

    def _ask(self, line: str) -> dict:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self) -> dict:
        """What the stream has cost, and the digest of its results."""
        return self._ask("run")

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(case: dict, packages: list[Path], rounds: int) -> dict:
    """The figures of a case. Raises RuntimeError where the versions compute something else."""
    workers = [Worker(package, case) for package in packages]
    try:
        first = [worker.run()["digest"] for worker in workers]
        if len(set(first)) != 1:
            raise RuntimeError("the versions have computed different results")
        costs = [[worker.run() for worker in workers] for _ in range(rounds)]
        described = workers[-1].described
    finally:
        for worker in workers:
            worker.close()
    before, after = (
        {
            f"{name}_per_step": 1e6 * median(cost[name] for cost in each) / case["steps"]
            for name in ("us", "processor_us")
        }
        for each in zip(*costs, strict=True)
    )
    described |= after | {f"against_{name}": value for name, value in before.items()}
    ratios = (before[name] / after[name] for name in after)
    return described | dict(zip(("speedup", "processor_speedup"), ratios, strict=True))


def show(records: Records) -> Table:
    """One row per case: its latest line on this machine."""
    columns = ("case", "silent", "other version", "this version", "us per step", "us per step", "times faster")
    table = Table(*columns, title=records.device)
    for case in CASES:
        line = records.of({"case": case})
        if line is not None:
            times = (f"{line[name]:.3g}" for name in ("against_us_per_step", "us_per_step", "speedup"))
            table.add_row(case, f"{line['silent']:.1%}", line["against"], line["version"], *times)
    return table


def main(
    against: Annotated[Path, typer.Option(help="Checkout of another version to measure beside this one.")],
    cases: Annotated[list[str] | None, typer.Option("--case", help="Measure this case only; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs of each version, in turns.", min=1)] = 5,
    results: Annotated[Path, typer.Option(help="Lines are appended to this file.")] = RESULTS,
) -> None:
    """Measure every case and print a table."""
    unknown = set(cases or ()) - set(CASES)
    if unknown:
        raise typer.BadParameter(f"got {', '.join(sorted(unknown))}; need some of {', '.join(CASES)}")
    records, packages = Records(results, KEY), [against.resolve(), ROOT]
    names = dict(zip(("against", "version"), map(version_of, packages), strict=True))
    for name in cases or CASES:
        case = DEFAULTS | CASES[name]
        records.add({"case": name} | names | case | {"rounds": rounds} | measure(case, packages, rounds))
    Console().print(show(records))


if __name__ == "__main__":
    command(main, __doc__).run()
