"""Kill training on a GPU by signal 9, go on, and compare the end with that of a run that was left alone.

    python experiments/gpu_kills.py --times 10

Every run is `eventrnn train --backend cuda` from a shell, with every kind of noise, windows of random length and a
checkpoint after every update. Each is killed twice at random moments of its training; the last start ends it. Several
runs go side by side, because a start takes longer than the training. One line is appended to results/robustness.jsonl.
"""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from command_line import command
from records import Records

from eventrnn.bench.machine import gpu
from eventrnn.cli.terminal import as_line
from eventrnn.training import read_log
from eventrnn.training.checkpoint import read_checkpoint

RESULTS = Path(__file__).parent / "results" / "robustness.jsonl"

UPDATES, KILLS_PER_RUN = 400, 2

# A start that has not written this many log lines in so many seconds counts as a fault.
PATIENCE = 120.0

NOISE = ("dropconnect", "dropout_input", "dropout_between", "dropout_top", "dropout_words", "zoneout")

SETTINGS = {
    "hidden": ["96", "64"],
    "embedding": ["48"],
    "steps": [str(UPDATES)],
    "batch": ["16"],
    "window": ["20"],
    "backend": ["cuda"],
    "set": [
        *(f"training.regularisers.{name}=0.2" for name in NOISE),
        "training.window_jitter=3",
        "training.validate_every=50",
        "run.checkpoint_seconds=0",
        "run.log_every=10",
    ],
}


def start(folder: Path, *, resume: bool) -> subprocess.Popen:
    """A process that trains in the folder."""
    options = [f"--{name}={value}" for name, values in SETTINGS.items() for value in values]
    given = ["--resume", str(folder)] if resume else [*options, "--out", f"{folder}.model", "--run", str(folder)]
    command = [sys.executable, "-m", "eventrnn", "train", "--json", *given]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def outcome(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The state of a run, every bit of it, and its log without times."""
    arrays, record = read_checkpoint(folder / "checkpoint.safetensors")
    bits = {name: array.tobytes() for name, array in arrays.items()} | {"rest": record["numbers"]}
    return bits, [{key: value for key, value in line.items() if key != "seconds"} for line in read_log(folder)]


def lines(folder: Path) -> int:
    """Number of lines of the log of a run."""
    return (folder / "log.jsonl").read_bytes().count(b"\n") if (folder / "log.jsonl").exists() else 0


def killed_run(folder: Path, seed: int) -> tuple[int, str]:
    """Train in the folder, killed KILLS_PER_RUN times. Returns the kills and the fault, empty without one."""
    rng, kills = np.random.default_rng(seed), 0
    # Lines of the log after which the run is killed: well apart, and before its end.
    moments = np.linspace(0, UPDATES // 10, KILLS_PER_RUN + 2)[1:-1].astype(int)
    for after in moments:
        child, until = start(folder, resume=kills > 0), time.monotonic() + PATIENCE
        while lines(folder) < after and child.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.3)
        child.send_signal(signal.SIGKILL)
        _, said = child.communicate()
        if child.returncode != -signal.SIGKILL:
            return kills, f"it ended by itself with code {child.returncode}: {said[-300:]}"
        kills += 1
    last = start(folder, resume=True)
    _, said = last.communicate()
    return kills, "" if last.returncode == 0 else f"it did not go on: {said[-300:]}"


def main(
    times: Annotated[int, typer.Option(help="Kills.")] = 10,
    workers: Annotated[int, typer.Option(help="Runs side by side.")] = 6,
    seed: Annotated[int, typer.Option(help="Seed of the moments.")] = 0,
) -> None:
    """Kill runs, and compare them with one that was left alone."""
    runs = -(-times // KILLS_PER_RUN)
    begun, faults = time.monotonic(), []
    with tempfile.TemporaryDirectory() as base, ThreadPoolExecutor(workers) as pool:
        folders = [Path(base) / f"killed-{k}" for k in range(runs)]
        straight = Path(base) / "straight"
        alone = pool.submit(lambda: start(straight, resume=False).communicate()[1])
        ends = list(pool.map(killed_run, folders, range(seed, seed + runs)))
        said = alone.result()
        if not (straight / "checkpoint.safetensors").exists():
            raise RuntimeError(f"the run that was left alone failed: {said[-500:]}")
        expected = outcome(straight)
        for number, (folder, (_, fault)) in enumerate(zip(folders, ends, strict=True)):
            fault = fault or ("" if outcome(folder) == expected else "other bits or another log")
            if fault:
                faults.append({"run": number, "fault": fault})
            shutil.rmtree(folder, ignore_errors=True)
    line = {
        "campaign": "kills on a GPU",
        "faults": len(faults),
        "described": faults,
        "seed": seed,
        "killed": sum(kills for kills, _ in ends),
        "runs": runs,
        "updates": UPDATES,
        "settings": json.dumps(SETTINGS),
        "gpu": gpu()["gpu"],
        "seconds": round(time.monotonic() - begun, 1),
    }
    print(as_line(Records(RESULTS, ("campaign",)).add(line)))


if __name__ == "__main__":
    command(main, __doc__).run()
