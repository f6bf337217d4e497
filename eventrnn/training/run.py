"""A training run in a folder: log, checkpoints, and continuation after an interruption."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eventrnn._files import clean, locked, name_beside, printable, write_whole
from eventrnn.training import parts
from eventrnn.training.checkpoint import Resumable, UnreadableCheckpoint, load_checkpoint, previous, save_checkpoint
from eventrnn.training.trainer import Diverged, Progress

CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"

# A checkpoint or log that is set aside because a run could not go on from it as it is.
DAMAGED = "damaged-"

# What a run writes into its folder.
FILES = (
    *(CHECKPOINT, f"previous-{CHECKPOINT}", f"{DAMAGED}{CHECKPOINT}"),
    *(LOG, f"previous-{LOG}", f"{DAMAGED}{LOG}", parts.INDEX),
)

# Figures of the log that are means over the updates since the previous line.
AVERAGED = ("loss", "penalty", "activity", "support", "norm")


class Stopped(KeyboardInterrupt):
    """The run was interrupted by Ctrl-C or SIGTERM and has been saved; the message names the step and the file."""


def run(
    trainer: Resumable,
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
    trainer            : a `Trainer`, or a `FineTuning`, in its initial state, also for a run that is continued
    folder             : is created. `log.jsonl` gets one line per `log_every` updates (with means over them) and one
                         per validation; `checkpoint.safetensors` is written every `checkpoint_seconds` and at the end
    resume             : continue bit for bit from the checkpoint in the folder, or from the one before it if that one
                         is lost or damaged, or from a checkpoint in parts (`split_checkpoint`); without any of them,
                         start anew. Nothing is lost: a damaged file stays as `damaged-…`, a log without a checkpoint as
                         `previous-log.jsonl`. A warning says so
    log_every          : updates per line of the log
    checkpoint_seconds : seconds between two checkpoints
    report             : called after every update with its figures and the seconds of training so far

    After a first Ctrl-C (or SIGTERM) the current update is finished, the run is saved and `Stopped` is raised; a second
    one interrupts at once. Raises `ValueError` if the folder holds a run and `resume` is not set, or if another process
    trains in it; `CheckpointError` if the run in it is another one, or no checkpoint of it can be read; and `Diverged`
    with the path of the last checkpoint.
    """
    folder = Path(folder)
    # Without a write, so that the folder of another run is not touched.
    _need_no_run(folder, resume)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        return run_locked(
            trainer,
            folder,
            resume=resume,
            log_every=log_every,
            checkpoint_seconds=checkpoint_seconds,
            report=report,
        )


def run_locked(
    trainer: Resumable,
    folder: Path,
    *,
    resume: bool,
    log_every: int,
    checkpoint_seconds: float,
    report: Callable[[Progress, float], None],
    stop: Callable[[], bool] = lambda: False,
) -> float:
    """`run` in a folder that exists and that the caller has locked.

    stop : called after every update; once it says so, the run is saved and `Stopped` is raised
    """
    path = folder / CHECKPOINT
    _need_no_run(folder, resume)
    clean(folder)
    log = _Log(folder / LOG, log_every)
    if resume:
        log.restore(_load(trainer, path), trainer.steps_done)
    saved_at, start = trainer.steps_done, time.perf_counter() - log.seconds

    def save() -> None:
        save_checkpoint(trainer, path, notes=log.notes())

    with stop_requests() as requests:
        last_save = time.perf_counter()
        try:
            for progress in trainer:
                log.seconds = time.perf_counter() - start
                log.add(progress)
                report(progress, log.seconds)
                due = time.perf_counter() - last_save >= checkpoint_seconds
                stopped = bool(requests) or stop()
                if due or stopped:
                    save()
                    saved_at, last_save = trainer.steps_done, time.perf_counter()
                if stopped:
                    raise Stopped(f"stopped after step {trainer.steps_done}, saved in {path}")
        except Diverged as error:
            where = f"{path}, step {saved_at}" if path.exists() else "none, nothing was saved yet"
            raise Diverged(f"{error}; last good checkpoint: {where}") from None
        save()
    return log.seconds


def _need_no_run(folder: Path, resume: bool) -> None:
    path = folder / CHECKPOINT
    if not resume and any(each.exists() for each in (path, previous(path), folder / LOG, folder / parts.INDEX)):
        raise ValueError(f"folder: {printable(folder)} holds a run; resume it, or give another folder")


def _load(trainer: Resumable, path: Path) -> dict[str, Any]:
    """Notes of the checkpoint in the folder, or of the one before if the last is lost or damaged; empty without both.

    A damaged checkpoint is renamed, so that the next one does not replace it.
    """
    before = previous(path)
    if not path.exists():
        if not before.exists():
            # A checkpoint that came in parts; the parts stay.
            return load_checkpoint(trainer, path) if parts.join(path.parent, path) else {}
        notes, reason = load_checkpoint(trainer, before), f"{printable(path)}: no such file"
    else:
        try:
            return load_checkpoint(trainer, path)
        except UnreadableCheckpoint as error:
            reason = str(error)
        try:
            notes = load_checkpoint(trainer, before)
        except UnreadableCheckpoint as error:
            raise UnreadableCheckpoint(f"{reason}; and the one before, {error}") from None
        aside = name_beside(path, DAMAGED)
        path.replace(aside)
        reason += f" (kept as {aside.name})"
    _warn(f"{reason}; the run goes on from the checkpoint before it, of step {trainer.steps_done}")
    return notes


def _warn(words: str) -> None:
    warnings.warn(words, stacklevel=4)


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
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            # A full disk does not say which file was written.
            raise OSError(error.errno, error.strerror, os.fspath(self.path)) from None
        self.count, self.sums = 0, dict.fromkeys(AVERAGED, 0.0)

    def notes(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "count": self.count, "sums": self.sums}

    def restore(self, notes: dict[str, Any], step: int) -> None:
        """Go back to the state at a checkpoint.

        Lines of later updates are removed; these updates will be logged again.
        """
        if notes:
            self.seconds, self.count, self.sums = notes["seconds"], notes["count"], dict(notes["sums"])
        lines, damaged = _read_lines(self.path) if self.path.exists() else ([], [])
        kept = [text for text, line in lines if line["step"] <= step]
        keep = None
        if damaged:
            keep = name_beside(self.path, DAMAGED)
            _warn(f"{_damage(self.path, damaged)}; the whole file is kept as {keep.name}")
        elif lines and not notes:
            keep = name_beside(self.path, "previous-")
            _warn(
                f"{printable(self.path.parent)}: has a log but no checkpoint, so the run starts again at its first "
                f"step; the log is kept as {keep.name}"
            )
        write_whole(self.path, b"".join(text + b"\n" for text in kept), overwrite=True, keep=keep)


def read_log(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of the log of a run.

    Damaged lines are left out with a warning; so is, without one, a last line that is still being written. Raises
    `FileNotFoundError` if there is no log.
    """
    path = Path(folder) / LOG
    lines, damaged = _read_lines(path)
    if damaged:
        warnings.warn(_damage(path, damaged), stacklevel=2)
    return [line for _, line in lines]


def _read_lines(path: Path) -> tuple[list[tuple[bytes, dict[str, Any]]], list[int]]:
    """The lines of a log, with their text, and the numbers of its damaged lines from 1. Text after the last end of a
    line was not written to its end, and is left out."""
    lines, damaged = [], []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            line = json.loads(text)
            whole = type(line["step"]) is int and (line["validation"] is None or isinstance(line["validation"], dict))
            # A name with a damaged letter is missing.
            whole = whole and all(name in line for name in AVERAGED)
        except (ValueError, KeyError, TypeError, RecursionError):
            whole = False
        if whole:
            lines.append((text, line))
        else:
            damaged.append(number)
    return lines, damaged


def _damage(path: Path, numbers: list[int]) -> str:
    some = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
    return f"{printable(path)}: damaged in line {some}, left out"


@contextmanager
def stop_requests() -> Iterator[list[int]]:
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
