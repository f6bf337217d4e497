"""Small sweeps, the bits of their points trained alone, and processes that a test may kill."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from pathlib import Path

from eventrnn._files import locked
from eventrnn._gpus import VARIABLE
from eventrnn.sweeps import Sweep, gpus
from eventrnn.sweeps.plan import MODEL, point
from eventrnn.training.recipes.recipe import train

# A test fails if nothing happens for so many seconds.
PATIENCE = 120.0

SETTINGS = {
    "data.valid_batch": 2,
    "model.hidden": [12],
    "model.embedding": 5,
    "training.batch": 4,
    "training.window": 8,
    "training.steps": 20,
    "run.log_every": 5,
}


def small_sweep(text, **others) -> Sweep:
    """Six points of 20 updates: two learning rates, three seeds."""
    grid = {"training.learning_rate": [3e-3, 6e-3], "training.seed": [0, 1, 2]}
    return Sweep(**{"settings": {"data.text": str(text)} | SETTINGS, "grid": grid} | others)


def models_alone(sweep, folder) -> list[bytes]:
    """The model files of all points, each trained by itself in this process."""
    files = []
    for number, chosen in enumerate(sweep.combinations()):
        alone = point(sweep, folder, number, chosen)
        alone.folder.mkdir(parents=True)
        train(alone.recipe, alone.folder / "run")
        files.append((alone.folder / MODEL).read_bytes())
    return files


def models_of(folder) -> list[bytes]:
    """The model files of the points in the folder of a sweep."""
    return [(each / MODEL).read_bytes() for each in sorted((Path(folder) / "points").iterdir())]


class Inline(Executor):
    """An executor that does its work at once; `before` is called with every job."""

    def __init__(self, before=lambda job: None):
        self.before, self.jobs = before, []

    def submit(self, fn, /, job):
        self.before(job)
        self.jobs.append(job)
        future = Future()
        future.set_result(fn(job))
        return future


def wait_until(true, what):
    """Wait until a function returns a true value, and return it."""
    until = time.monotonic() + PATIENCE
    while not (found := true()):
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.05)
    return found


def starts(folder) -> list[int]:
    """The process numbers of all starts of points in the folder of a sweep."""
    files = sorted(Path(folder).glob("points/*/starts.jsonl"))
    return [json.loads(line)["process"] for file in files for line in file.read_text().splitlines()]


def results(folder) -> int:
    """The number of points that have ended."""
    return len(list(Path(folder).glob("points/*/result.json")))


@contextmanager
def last_point_held(folder, number=5):
    """Keep the last point of a sweep, which has begun, from being trained, so that the sweep cannot end."""
    held = Path(folder) / "points" / f"{number:04d}"
    with ExitStack() as stack:
        wait_until((Path(folder) / "sweep.json").exists, "the beginning of the sweep")
        held.mkdir(parents=True)
        stack.enter_context(locked(held))
        yield


def kill_and_wait(process):
    """Kill a process that is no child of this one, and wait for its end."""
    os.kill(process, signal.SIGKILL)
    wait_until(lambda: not runs(process), f"the end of process {process}")


def runs(process) -> bool:
    """Whether a process runs, and is not one that has ended and that nothing has waited for yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def started(*command, log):
    """A process of Python, which is killed at the end."""
    with open(log, "ab") as file:
        process = subprocess.Popen([sys.executable, "-m", *map(str, command)], stdout=file, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def gpu_beside_another(folder: Path) -> tuple[int, str]:
    """The number of this worker process and the GPU that it has chosen, once two processes have chosen theirs."""
    gpus.claim_gpu()
    (folder / str(os.getpid())).touch()
    wait_until(lambda: len(list(folder.iterdir())) == 2, "a second worker")
    return os.getpid(), os.environ[VARIABLE]
