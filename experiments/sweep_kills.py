"""Kill workers, the driver and the scheduler of a sweep by signal 9, go on, and compare every point with a run alone.

    python experiments/sweep_kills.py dask --points 40 --scheduler
    python experiments/sweep_kills.py loky --points 40
    python experiments/sweep_kills.py loky --points 40 --gpus       # a process per GPU of this machine

A quarter of the way a worker is killed, half-way the driver, and with --scheduler, of dask only, at three quarters the
scheduler. Each time the sweep goes on with `eventrnn sweep --resume`. At the end there must be one result per point,
with the model file of a run alone, and no point may have started again after its end. All workers must have trained at
the same time, and with --gpus every GPU must have seen at least half of its equal share of the starts. One line is
appended to results/robustness.jsonl.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from command_line import command
from records import Records
from threadpoolctl import threadpool_limits

from eventrnn._gpus import visible_gpus
from eventrnn.cli.terminal import as_line
from eventrnn.sweeps import load_sweep, read_results
from eventrnn.sweeps.plan import MODEL, Sweep, point
from eventrnn.training.recipes.recipe import train

RESULTS = Path(__file__).parent / "results" / "robustness.jsonl"

# A campaign in which nothing ends for so many seconds has failed.
PATIENCE = 300.0

# Processes that train points on the CPU.
WORKERS = 2

# A point takes about a second on an idle core, and is saved several times.
SETTINGS = {
    "data.valid_batch": 2,
    "model.hidden": [48],
    "model.embedding": 16,
    "training.batch": 8,
    "training.window": 16,
    "training.steps": 400,
    "training.regularisers.dropout_top": 0.2,
    "run.checkpoint_seconds": 0.2,
    "run.log_every": 20,
}


class Campaign:
    """A sweep on one engine, and its processes."""

    def __init__(self, engine: str, points: int, on_gpus: bool, base: Path, stack: ExitStack):
        self.engine, self.points, self.base, self.stack = engine, points, base, stack
        self.workers = len(visible_gpus()) if on_gpus else WORKERS
        self.folder, self.plan, self.address = base / "sweep", base / "sweep.toml", ""
        letters = np.random.default_rng(0).choice(list("abcdef \n"), 20_000)
        (base / "text.txt").write_text("".join(letters))
        settings = {"data.text": str(base / "text.txt")} | SETTINGS | ({"training.backend": "cuda"} if on_gpus else {})
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        seeds = list(range(points // 2)), [0.003, 0.006]
        axes = f"training.seed = {seeds[0]}\ntraining.learning_rate = {seeds[1]}\n"
        self.plan.write_text("[settings]\n" + "\n".join(lines) + f"\n[grid]\n{axes}")

    def start(self, *command: object) -> subprocess.Popen:
        """A process of Python, which does not outlive the campaign."""
        with open(self.base / "log.txt", "ab") as log:
            process = subprocess.Popen([sys.executable, "-m", *map(str, command)], stdout=log, stderr=log)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    def cluster(self) -> subprocess.Popen:
        """A scheduler of dask with its workers."""
        file = self.base / "scheduler.json"
        file.unlink(missing_ok=True)
        options = "--host", "127.0.0.1", "--port", 0, "--no-dashboard", "--scheduler-file", file
        scheduler = self.start("distributed.cli.dask_scheduler", *options)
        self.wait(file.exists, "a scheduler")
        time.sleep(1)
        self.address = json.loads(file.read_text())["address"]
        for _ in range(self.workers):
            options = self.address, "--nthreads", 1, "--no-nanny", "--no-dashboard"
            self.start("distributed.cli.dask_worker", *options)
        return scheduler

    def drive(self, *, resume: bool) -> subprocess.Popen:
        """A driver of the sweep."""
        what = ["--resume", self.folder] if resume else [self.plan, "--out", self.folder]
        where = ["--address", self.address] if self.address else ["--workers", self.workers]
        return self.start("eventrnn", "sweep", *what, "--executor", self.engine, *where)

    def wait(self, true: Callable[[], Any], what: str) -> None:
        """Wait until a function says so."""
        until = time.monotonic() + PATIENCE
        while not true():
            if time.monotonic() > until:
                raise RuntimeError(f"waited for {what}: …{(self.base / 'log.txt').read_text()[-2000:]}")
            time.sleep(0.01)

    def ended(self) -> dict[str, int]:
        """How often each point that has ended was started."""
        found = {}
        for result in sorted(self.folder.glob("points/*/result.json")):
            found[result.parent.name] = (result.parent / "starts.jsonl").read_bytes().count(b"\n")
        return found

    def gpus(self) -> Counter[str]:
        """How many starts each GPU has seen."""
        files = sorted(self.folder.glob("points/*/starts.jsonl"))
        return Counter(json.loads(line).get("gpu") for file in files for line in file.read_text().splitlines())

    def at_a_time(self) -> int:
        """The largest number of points that were trained at the same time, each from its last start to its end."""
        spans = []
        for end in sorted(self.folder.glob("points/*/result.json")):
            start = json.loads((end.parent / "starts.jsonl").read_text().splitlines()[-1])
            spans.append((datetime.fromisoformat(start["time"]).timestamp(), end.stat().st_mtime))
        return max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans)

    def wait_for(self, share: float) -> None:
        """Wait until this share of the points has ended."""
        self.wait(lambda: len(self.ended()) >= share * self.points, f"{share:.0%} of the points")

    def end_of(self, driver: subprocess.Popen) -> int:
        """The exit code of a driver, which may take as long as it likes while points end."""
        before = -1
        while len(self.ended()) > before:
            before = len(self.ended())
            try:
                return driver.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                continue
        raise RuntimeError(f"the driver hangs: …{(self.base / 'log.txt').read_text()[-2000:]}")

    def kill_worker(self) -> None:
        """Kill the worker that holds the lock of a point."""

        def killed() -> bool:
            for lock in sorted(self.folder.glob("points/*/.lock")):
                held = lock.read_text().split()
                if len(held) > 1 and not (lock.parent / "result.json").exists():
                    try:
                        os.kill(int(held[1]), signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                    return True
            return False

        self.wait(killed, "a worker at work")


def alone(sweep: Sweep, folder: Path) -> dict[str, bytes]:
    """The model file of every point, each trained by itself in this process."""
    found = {}
    for number, chosen in enumerate(sweep.combinations()):
        each = point(sweep, folder, number, chosen)
        each.folder.mkdir(parents=True)
        with threadpool_limits(limits=each.recipe.training.threads, user_api="blas"):
            train(each.recipe, each.folder / "run")
        found[each.folder.name] = (each.folder / MODEL).read_bytes()
    return found


def killed_sweep(campaign: Campaign, scheduler: bool) -> tuple[dict[str, int], list[str]]:
    """Run the sweep to its end through all kills. Returns the starts per point and the faults."""
    faults: list[str] = []
    dask = campaign.cluster() if campaign.engine == "dask" else None
    driver = campaign.drive(resume=False)

    def go_on(what: str) -> subprocess.Popen:
        before = campaign.ended()
        process = campaign.drive(resume=True)
        checks.append((what, before))
        return process

    checks: list[tuple[str, dict[str, int]]] = []
    campaign.wait_for(0.25)
    campaign.kill_worker()
    campaign.wait_for(0.5)
    driver.kill()
    driver.wait()
    driver = go_on("the driver")
    if scheduler and dask is not None:
        campaign.wait_for(0.75)
        dask.kill()
        dask.wait()
        if campaign.end_of(driver) not in (1, 2):
            faults.append(f"the driver ended with code {driver.returncode} after its scheduler was killed")
        campaign.cluster()
        driver = go_on("the scheduler")
    if campaign.end_of(driver):
        faults.append(f"the last driver ended with code {driver.returncode}")
    starts = campaign.ended()
    for what, before in checks:
        faults += [f"point {name} started again after {what} died" for name in before if starts[name] != before[name]]
    return starts, faults


def main(
    engine: Annotated[str, typer.Argument(help="Engine: processes, loky, dask or executorlib.")] = "dask",
    points: Annotated[int, typer.Option(help="Points.")] = 40,
    scheduler: Annotated[bool, typer.Option("--scheduler", help="Kill the scheduler, too.")] = False,
    gpus: Annotated[bool, typer.Option("--gpus", help="Train on GPUs, a process per GPU of this machine.")] = False,
) -> None:
    """Kill a sweep, and compare its points with runs alone."""
    if gpus and not visible_gpus():
        raise typer.BadParameter("found no GPU (nvidia-smi); leave it out to train on the CPU", param_hint="--gpus")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made, ExitStack() as stack:
        base = Path(made)
        campaign = Campaign(engine, points, gpus, base, stack)
        starts, faults = killed_sweep(campaign, scheduler)
        expected = alone(load_sweep(campaign.plan), base / "alone")
        lines, used, at_a_time = read_results(campaign.folder), campaign.gpus(), campaign.at_a_time()
        if [line["state"] for line in lines] != ["done"] * len(expected):
            faults.append(f"states {[line['state'] for line in lines]}")
        for name, content in expected.items():
            if (campaign.folder / "points" / name / MODEL).read_bytes() != content:
                faults.append(f"point {name} has other bits than a run alone")
        if gpus and (
            idle := [name for name in visible_gpus() if used[name] < sum(used.values()) / campaign.workers / 2]
        ):
            faults.append(f"{idle} saw less than half of their equal share of the starts, {used}")
        if at_a_time != campaign.workers:
            faults.append(f"{at_a_time} points at a time, of {campaign.workers} workers")
    line = {
        "campaign": "kills of sweeps",
        "engine": engine,
        "faults": len(faults),
        "described": faults[:10],
        "points": len(expected),
        "workers": campaign.workers,
        "at_a_time": at_a_time,
        "starts_per_gpu": list(used.values()) if gpus else None,
        "killed": ["worker", "driver", *(["scheduler"] if scheduler else [])],
        "starts": sum(starts.values()),
        "settings": json.dumps(SETTINGS),
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(as_line(Records(RESULTS, ("campaign",)).add(line)))
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    command(main, __doc__).run()
