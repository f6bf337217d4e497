"""A training run in a folder: log, checkpoints, and continuation after an interruption."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eventrnn._files import clean, write_whole
from eventrnn.training.checkpoint import CheckpointError, load_checkpoint, previous, save_checkpoint
from eventrnn.training.trainer import Diverged, Progress, Trainer

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"

# Figures of the log that are means over the updates since the previous line.
AVERAGED = ("loss", "penalty", "activity", "support", "norm")


class Stopped(KeyboardInterrupt):
    """The run was interrupted by Ctrl-C or SIGTERM and has been saved; the message names the step and the file."""


def run(
    trainer: Trainer,
    folder: str | os.PathLike,
    *,
    resume: bool = False,
    log_every: int = 50,
    checkpoint_seconds: float = 120.0,
    report: Callable[[Progress, float], None] = lambda progress, seconds: None,
) -> float:
    """Train to the end, with a log and checkpoints in a folder. Returns the seconds of training without interruptions.

    Parameters
    ----------
    trainer            : a trainer in its initial state, also for a run that is continued
    folder             : is created. `log.jsonl` gets one line per `log_every` updates (with means over them) and one
                         per validation; `checkpoint.safetensors` is written every `checkpoint_seconds`, at every
                         validation and at the end
    resume             : continue bit for bit from the checkpoint in the folder; without a checkpoint, start anew
    log_every          : updates per line of the log
    checkpoint_seconds : seconds between two checkpoints
    report             : called after every update with its figures and the seconds of training so far

    After a first Ctrl-C (or SIGTERM) the current update is finished, the run is saved and `Stopped` is raised; a second
    one interrupts at once. Raises `ValueError` if the folder holds a run and `resume` is not set, `CheckpointError` if
    the run in it is another one, and `Diverged` with the path of the last checkpoint.
    """
    folder = Path(folder)
    path = folder / CHECKPOINT
    if not resume and (path.exists() or (folder / LOG).exists()):
        raise ValueError(f"folder: {folder} holds a run; resume it, or give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    log = _Log(folder / LOG, log_every)
    if resume:
        log.restore(_load(trainer, path), trainer.steps_done)
    saved_at, start = trainer.steps_done, time.perf_counter() - log.seconds

    def save() -> None:
        save_checkpoint(trainer, path, notes=log.notes())

    with _stop_requests() as requests:
        last_save = time.perf_counter()
        try:
            for progress in trainer:
                log.seconds = time.perf_counter() - start
                log.add(progress)
                report(progress, log.seconds)
                due = time.perf_counter() - last_save >= checkpoint_seconds
                if due or progress.validation or requests:
                    save()
                    saved_at, last_save = trainer.steps_done, time.perf_counter()
                if requests:
                    raise Stopped(f"stopped after step {trainer.steps_done}, saved in {path}")
        except Diverged as error:
            where = f"{path}, step {saved_at}" if path.exists() else "none, nothing was saved yet"
            raise Diverged(f"{error}; last good checkpoint: {where}") from None
        save()
    return log.seconds


def _load(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Notes of the checkpoint in the folder, or of the previous one if the last is damaged; empty if there is none."""
    if not path.exists():
        return {}
    try:
        return load_checkpoint(trainer, path)
    except CheckpointError as error:
        if "damaged" not in str(error) or not previous(path).exists():
            raise
        return load_checkpoint(trainer, previous(path))


class _Log:
    """The log: the file, and the sums since its last line."""

    def __init__(self, path: Path, every: int):
        if every < 1:
            raise ValueError(f"log_every: got {every}, need a whole number >= 1")
        self.path, self.every = path, every
        self.seconds, self.count = 0.0, 0
        self.sums = dict.fromkeys(AVERAGED, 0.0)

    def add(self, progress: Progress) -> None:
        self.count += 1
        for name in self.sums:
            self.sums[name] += getattr(progress, name)
        if self.count < self.every and not progress.validation:
            return
        means = {name: total / self.count for name, total in self.sums.items()}
        line = asdict(progress) | means | {"seconds": round(self.seconds, 3)}
        line["validation"] = dict(progress.validation) or None
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.count, self.sums = 0, dict.fromkeys(AVERAGED, 0.0)

    def notes(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "count": self.count, "sums": self.sums}

    def restore(self, notes: dict[str, Any], step: int) -> None:
        """Go back to the state at a checkpoint.

        Lines of later updates are removed; these updates will be logged again.
        """
        if notes:
            self.seconds, self.count, self.sums = notes["seconds"], notes["count"], dict(notes["sums"])
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
        kept = [line for line in lines[:-1] if json.loads(line)["step"] <= step]
        write_whole(self.path, "".join(line + "\n" for line in kept).encode(), overwrite=True)


def read_log(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of the log of a run."""
    return [json.loads(line) for line in (Path(folder) / LOG).read_text(encoding="utf-8").splitlines()]


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that is filled by the first SIGINT or SIGTERM; a second signal raises KeyboardInterrupt."""
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests
        return

    def note(number: int, frame: Any) -> None:
        if requests:
            raise KeyboardInterrupt
        requests.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
