"""What a worker does: it trains one point to its end, from wherever an earlier worker left it.

A point belongs to the process that holds the lock of its folder. The lock ends with the process, however it ends, so
that the next worker goes on from the last checkpoint. A worker that finds the lock taken waits: the other one may
belong to a driver that was killed, or to a scheduler that lost sight of it. So no point is trained twice.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from eventrnn._files import FULL, locked
from eventrnn.sweeps.gpus import claim_gpu
from eventrnn.sweeps.plan import MODEL
from eventrnn.sweeps.results import DONE, FAILED, STOP, STOPPED, note_start, read_result, write_result
from eventrnn.training.recipes.recipe import CONFIG, Recipe, train

# The folder of the run beside the model file, as `eventrnn train` names it.
RUN = f"{MODEL}.run"

# Seconds between two looks at a lock that another process holds, and at the request to stop.
WAIT_SECONDS, STOP_SECONDS = 0.2, 0.5

# A process trains one point at a time: the number of threads of BLAS belongs to the whole process, and so does the GPU.
_TRAINING = threading.Lock()

# Set once the process that started this one is gone.
_ORPHANED = threading.Event()


@dataclass(frozen=True)
class Job:
    """What a worker is sent.

    Attributes
    ----------
    folder : of the point
    sweep  : folder of the sweep
    recipe : of the point
    driver : name of the driver that sends it; only its own request to stop counts
    retry  : train a point that failed before again
    """

    folder: Path
    sweep: Path
    recipe: Recipe
    driver: str
    retry: bool


def run_point(job: Job) -> dict[str, Any]:
    """Train a point to its end, and return its result, which is then in its folder too.

    The state of the result is "done", "failed" (with the error), or "stopped" where the driver asked for it or Ctrl-C
    came; a stopped point has no result in its folder, and its run is saved. Raises OSError for a full disk, which is no
    fault of the point, and where the result cannot be written.
    """
    stop = _request(job)
    job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with _TRAINING, _owned(job.folder, stop):
            before = read_result(job.folder)
            if before is not None and (before["state"] == DONE or not job.retry):
                return before
            if stop():
                raise KeyboardInterrupt("stopped before the training")
            starts = note_start(job.folder, claim_gpu() if job.recipe.training.backend == "cuda" else None)
            result = _trained(job, stop) | {"starts": starts}
            write_result(job.folder, result)
            return result
    except KeyboardInterrupt as interrupt:
        return {"state": STOPPED, "error": str(interrupt)}


def _trained(job: Job, stop: Callable[[], bool]) -> dict[str, Any]:
    run, threads = job.folder / RUN, job.recipe.training.threads
    try:
        # Otherwise every worker would have as many threads of BLAS as the machine has cores.
        with threadpool_limits(limits=threads, user_api="blas"):
            figures = train(job.recipe, run, resume=(run / CONFIG).exists(), stop=stop)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        # Of whatever kind: the other points go on, and the message is in the results.
        return {"state": FAILED, "error": f"{type(error).__name__}: {error}"}
    return {"state": DONE, **_flat(figures)}


@contextmanager
def _owned(folder: Path, stop: Callable[[], bool]) -> Iterator[None]:
    """Hold the lock of a point, after waiting for the process that holds it. Raises KeyboardInterrupt on a request."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder))
                break
            except ValueError:
                if stop():
                    raise KeyboardInterrupt("stopped while another process trains the point") from None
                time.sleep(WAIT_SECONDS)
        yield


def _request(job: Job) -> Callable[[], bool]:
    """Whether the driver of the job asks its workers to stop, looked up at most twice per second."""
    path, looked, asked = job.sweep / STOP, 0.0, False

    def stop() -> bool:
        nonlocal looked, asked
        if not asked and time.monotonic() - looked >= STOP_SECONDS:
            looked = time.monotonic()
            asked = _ORPHANED.is_set() or stop_request(path) == job.driver
        return asked

    return stop


def stop_request(path: Path) -> str:
    """The driver that asks its workers to stop; empty for none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _flat(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures with one value per name. Numbers that are not finite become None, since JSON does not know them."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": each for key, each in _flat(value).items()}
        else:
            found[name] = None if isinstance(value, float) and not isfinite(value) else value
    return found


# --- processes of the driver's own --------------------------------------------------------------------------


def begin_process(driver: int) -> None:
    """Prepare a worker process that the driver, of that process number, has started itself.

    Ctrl-C reaches all processes of a terminal. An idle worker ignores it, and one that trains saves its run. When the
    driver is gone, a training is saved and the process ends; otherwise it would wait for work for ever.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(driver,), daemon=True).start()


def _end_with(driver: int) -> None:
    while os.getppid() == driver:
        time.sleep(STOP_SECONDS)
    _ORPHANED.set()
    with _TRAINING:
        os._exit(0)


def run_point_in_pool(job: Job) -> dict[str, Any]:
    """`run_point` in a process of `ProcessPoolExecutor`, which ends after a training that was stopped.

    A pool whose worker died sends SIGTERM to the others and waits for their end. A training takes the signal as a
    request to save its run, so that the process must end by itself afterwards.
    """
    result = run_point(job)
    if result["state"] == STOPPED:
        os._exit(0)
    return result
