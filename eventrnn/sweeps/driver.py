"""The driver of a sweep: it hands out points, collects their results, and goes on where an earlier driver stopped.

What has ended is in the folders of the points. The driver keeps nothing else, so that it can be killed at any moment:
the next one reads the results and hands out the other points, whose runs go on from their checkpoints.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eventrnn._checks import need_flag, need_kind
from eventrnn._files import FULL, LOCK, clean, locked, printable, write_whole
from eventrnn.sweeps.engines import Engine, Needs, engine_of
from eventrnn.sweeps.plan import Point, Sweep, described, flat, known_points, point
from eventrnn.sweeps.results import (
    DONE,
    FAILED,
    RESULTS,
    STARTS,
    STOP,
    STOPPED,
    how_on,
    line_of,
    need_same,
    read_result,
    save_sweep,
    saved_sweep,
    write_result,
    write_results,
)
from eventrnn.sweeps.results import SWEEP as SWEEP_FILE
from eventrnn.sweeps.study import Proposals, need_optuna
from eventrnn.sweeps.worker import RUN, Job
from eventrnn.training.recipes.recipe import CONFIG, load_recipe
from eventrnn.training.run import LOG, stop_requests

# Seconds between two reports, and between two looks at a request to stop.
POLL = 0.5

# Deaths of workers that trained a point. From the second one on the point is trained while nothing else is, so that it
# is known whose fault the next one is; with the last one it fails.
SUSPECT, MOST_DEATHS = 2, 4

# Bytes from the end of a log in which its last line lies.
TAIL = 4096

# The results are written again after this many times the seconds that it took, which are many with 100 000 points.
PAUSE = 10.0


class SweepStopped(KeyboardInterrupt):
    """The sweep was interrupted by Ctrl-C or SIGTERM; the message says what is done and how it goes on."""


@dataclass(frozen=True)
class Status:
    """Where a point stands.

    Attributes
    ----------
    point : the point
    state : "waiting", "running", "done" or "failed"
    share : share of its updates that are done, in [0, 1]
    line  : its line of the results once it has ended, otherwise the last line of its log; empty before
    """

    point: Point
    state: str
    share: float
    line: Mapping[str, Any]


Report = Callable[[list[Status], int], None]


def run_sweep(
    sweep: Sweep | None,
    folder: str | os.PathLike,
    *,
    executor: str | Executor = "processes",
    workers: int | None = None,
    address: str | None = None,
    resume: bool = False,
    report: Report = lambda statuses, points: None,
) -> list[dict[str, Any]]:
    """Train every point of a sweep, and return the lines of `results.jsonl`, one per point.

    Parameters
    ----------
    sweep    : what is swept; None to go on with the sweep in the folder
    folder   : of the sweep, created if it is missing; all workers must see it. `results.jsonl` in it is written anew
               whenever a point has ended, and each point has a folder of its own with its model and its run
    executor : a name in `ENGINES`, or any `concurrent.futures.Executor`
    workers  : number of processes; by default as many as cores allow at `training.threads` threads each, or as GPUs
    address  : of a dask scheduler
    resume   : go on with the sweep in the folder: points that are done are kept, those that were cut off go on from
               their checkpoints, those that failed are tried again (of a study they stay failed, since later proposals
               follow from them)
    report   : called about twice per second with the points that have been handed out, and the number of all points

    A point has the bits of the same recipe trained alone with as many threads of BLAS as `training.threads` says. A
    worker that dies is replaced where the engine allows it, and its point goes on. A point whose training raises an
    exception has failed; the others go on.

    A script calls it under `if __name__ == "__main__":`, because worker processes of this machine import the script.

    Everything is checked before any work: raises ValueError for settings that are not allowed, for two points that are
    the same run, for a folder that holds a sweep without `resume` or another one with it, for a sweep that another
    process drives, and for an address that does not answer; ImportError for a library that is missing. Raises
    `SweepStopped` after Ctrl-C or SIGTERM, once every worker has saved its run, and RuntimeError where the executor or
    the scheduler is lost. A full disk ends the sweep with OSError, and fails no point.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "run_sweep: called again by a worker process, which imports the script; call it there under "
            '`if __name__ == "__main__":`'
        )
    folder, driver = Path(folder), uuid.uuid4().hex
    sweep, points, engine = _checked(sweep, folder, executor, workers, address, resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not resume:
                # Another driver may have used the folder while the texts were read.
                _need_unused(folder)
                save_sweep(sweep, folder)
            clean(folder)
            (folder / STOP).unlink(missing_ok=True)
            source = _Listed(points) if sweep.study is None else _Proposed(sweep, folder)
            return _Drive(folder, driver, source, engine, report).run()
    finally:
        engine.close()


def check_sweep(
    sweep: Sweep | None,
    folder: str | os.PathLike | None = None,
    *,
    executor: str | Executor = "processes",
    workers: int | None = None,
    address: str | None = None,
    resume: bool = False,
) -> list[Point]:
    """The points of a sweep after all checks of `run_sweep`, with its parameters; nothing is begun or written.

    folder : None where it is not known yet

    Of a study, whose trials follow from results, the points are those of `Study.corners`. Raises as `run_sweep` does
    before any work.
    """
    if folder is None and resume:
        raise ValueError("folder: got None; give the folder of the sweep that goes on")
    place = None if folder is None else Path(folder)
    _, points, engine = _checked(sweep, place, executor, workers, address, resume)
    engine.close()
    return points


def _checked(
    sweep: Sweep | None,
    folder: Path | None,
    executor: str | Executor,
    workers: int | None,
    address: str | None,
    resume: bool,
) -> tuple[Sweep, list[Point], Engine]:
    """The sweep, its points and its engine, after all checks."""
    need_flag("resume", resume)
    sweep = _sweep_of(sweep, folder, resume)
    points = known_points(sweep, folder or Path())
    if sweep.study is not None:
        need_optuna()
    needs = Needs(
        points=min(sweep.study.trials, sweep.study.ahead) if sweep.study else len(points),
        threads=max(each.recipe.training.threads for each in points),
        gpu=any(each.recipe.training.backend == "cuda" for each in points),
        folder=folder or Path(),
    )
    return sweep, points, engine_of(executor, needs, workers, address)


def _sweep_of(sweep: Sweep | None, folder: Path | None, resume: bool) -> Sweep:
    """The sweep to run. Raises ValueError where it is not that of the folder."""
    if sweep is None and not resume:
        raise ValueError("sweep: got None, need a Sweep, or resume=True for that of the folder")
    if resume:
        assert folder is not None
        if sweep is None:
            return saved_sweep(folder)
        need_kind("sweep", sweep, Sweep, "a Sweep, or None")
        sweep = sweep.anchored()
        need_same(sweep, folder)
        return sweep
    need_kind("sweep", sweep, Sweep, "a Sweep")
    assert sweep is not None
    if folder is not None:
        _need_unused(folder)
    return sweep.anchored()


def _need_unused(folder: Path) -> None:
    """Raise ValueError for a folder with files of another sweep, or with others that a sweep would replace."""
    if (folder / SWEEP_FILE).exists():
        raise ValueError(
            f"out: {printable(folder)} holds a sweep; give --resume {printable(folder)} to go on with it (in Python "
            "resume=True), or another folder"
        )
    for name in ("points", RESULTS, STOP):
        if (folder / name).exists():
            raise ValueError(f"out: {printable(folder)} holds {name}, which is of no sweep; give another folder")


def _need_own_run(chosen: Point) -> None:
    """Raise ValueError where the folder of a point holds the run of another one."""
    path = chosen.folder / RUN / CONFIG
    if not path.exists():
        return
    own, now = (flat(asdict(each)) for each in (replace(load_recipe(path), run=chosen.recipe.run), chosen.recipe))
    for key in now:
        if own[key] != now[key]:
            raise ValueError(
                f"resume: {printable(chosen.folder)} holds another run than point {chosen.number} "
                f"({described(chosen.chosen)}): its {key} is {own[key]!r}, not {now[key]!r}. Another version of "
                "eventrnn may have other presets; in a study, another version of optuna, or another result, gives "
                "other proposals. Use the versions that began it, or begin a new sweep"
            )


# --- where points come from ---------------------------------------------------------------------------------


class _Listed:
    """The points of a grid."""

    retry = True

    def __init__(self, points: list[Point]):
        self.total, self._left = len(points), list(reversed(points))

    def next(self) -> Point | None:
        """The next point; None where there is none at the moment."""
        return self._left.pop() if self._left else None

    def tell(self, ended: Point, result: Mapping[str, Any]) -> None:
        """The result of a point."""


class _Proposed:
    """The points of a study."""

    retry = False

    def __init__(self, sweep: Sweep, folder: Path):
        assert sweep.study is not None
        self.total = sweep.study.trials
        self._sweep, self._folder, self._proposals = sweep, folder, Proposals(sweep.study)

    def next(self) -> Point | None:
        proposed = self._proposals.ask()
        return None if proposed is None else point(self._sweep, self._folder, *proposed)

    def tell(self, ended: Point, result: Mapping[str, Any]) -> None:
        self._proposals.tell(ended.number, result)


# --- the loop -----------------------------------------------------------------------------------------------


class _Drive:
    """One driver at work in a locked folder."""

    def __init__(self, folder: Path, driver: str, source: _Listed | _Proposed, engine: Engine, report: Report):
        self.folder, self.driver, self.source, self.engine, self.report = folder, driver, source, engine, report
        # Points that were handed out and have not ended, with the bytes of their starts at that time.
        self.out: dict[int, tuple[Point, int]] = {}
        self.futures: dict[Any, Point] = {}
        # Points whose worker died, or was told to stop, to be handed out again.
        self.queue: list[Point] = []
        # Points that have not been handed out yet; None before the first look for those that ended earlier.
        self.ready: deque[Point] | None = None
        self.deaths: dict[int, int] = {}
        self.lines: dict[int, dict[str, Any]] = {}
        self.ended: dict[int, Point] = {}
        # Whether there are lines that are not written yet, and the time from which on they may be.
        self.unsaved, self.save_from = False, 0.0
        # Deaths of workers before any of them began a point.
        self.unborn = 0
        # Filled by Ctrl-C and SIGTERM.
        self.requests: list[int] = []

    def run(self) -> list[dict[str, Any]]:
        """Train all points. Returns their lines."""
        try:
            return self._run()
        except SweepStopped:
            (self.folder / STOP).unlink(missing_ok=True)
            raise
        except BaseException as error:
            # Otherwise the end of the executor would wait for trainings that go on.
            with suppress(OSError):
                write_whole(self.folder / STOP, self.driver.encode(), overwrite=True)
                if self.ready is not None:
                    write_results(self.folder, self.lines.values())
            if isinstance(error, OSError) and error.errno in FULL:
                words = f"{error.strerror}; make room, then {how_on(self.folder)}"
                raise OSError(error.errno, words, error.filename) from None
            raise

    def _run(self) -> list[dict[str, Any]]:
        with stop_requests() as self.requests:
            while True:
                self._submit()
                self.report(self._statuses(), self.source.total)
                if not self.futures and not self.queue:
                    break
                done, _ = wait(self.futures, timeout=POLL, return_when=FIRST_COMPLETED)
                broken = self._collect(done)
                self._save()
                if self.requests:
                    self._stop()
                if broken is not None:
                    self._after_death(broken)
                if lost := self.engine.lost():
                    raise RuntimeError(f"{lost}; {self._how_on()}")
        write_results(self.folder, self.lines.values())
        return [self.lines[number] for number in sorted(self.lines)]

    # --- handing out ---

    def _submit(self) -> None:
        """Hand out points, as many as the engine takes at a time."""
        capacity = self.engine.capacity
        while not self.requests and (capacity is None or len(self.futures) < capacity):
            suspects = {number for number, deaths in self.deaths.items() if deaths >= SUSPECT}
            if suspects and any(each.number in suspects for each in self.futures.values()):
                return
            chosen = self._next()
            if chosen is None:
                return
            job = Job(chosen.folder.absolute(), self.folder.absolute(), chosen.recipe, self.driver, self.source.retry)
            self.out[chosen.number] = chosen, _starts_bytes(chosen)
            try:
                self.futures[self.engine.submit(job)] = chosen
            except BrokenExecutor as error:
                # A worker died while it had nothing to do.
                self._again(chosen, deaths=0)
                self._after_death(error)

    def _next(self) -> Point | None:
        """The next point that has not ended. A suspect comes last, when nothing else is trained."""
        for k, each in enumerate(self.queue):
            if self.deaths[each.number] < SUSPECT:
                return self.queue.pop(k)
        if ready := self._ready():
            return ready.popleft()
        return self.queue.pop() if self.queue and not self.futures else None

    def _ready(self) -> deque[Point]:
        """The points that can be handed out for the first time. Results of an earlier driver are taken before."""
        ready = deque() if self.ready is None else self.ready
        while (chosen := self.source.next()) is not None:
            _need_own_run(chosen)
            before = read_result(chosen.folder)
            if before is None or (before["state"] == FAILED and self.source.retry):
                ready.append(chosen)
            else:
                self._end(chosen, before)
        self.ready = ready
        return ready

    # --- results ---

    def _collect(self, done: set[Any]) -> BaseException | None:
        """Take the results of futures. Returns the error of a broken executor, if there is one."""
        broken = None
        for future in done:
            chosen = self.futures.pop(future)
            try:
                result = future.result()
            except BrokenExecutor as error:
                # The worker may have died after it wrote the result.
                result, broken = read_result(chosen.folder), error
                if result is None:
                    self._again(chosen, deaths=1)
                    continue
            except CancelledError:
                raise RuntimeError(
                    f"{self.engine.lost() or 'the executor gave up a point'}; {self._how_on()}"
                ) from None
            except Exception as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                result = self._failed(chosen, f"its worker failed: {type(error).__name__}: {error}")
            if result["state"] == STOPPED:
                # By a signal to the worker alone.
                self._again(chosen, deaths=0)
                continue
            self._end(chosen, result)
        return broken

    def _save(self) -> None:
        """Write the results, if there are new ones, in a small part of the time."""
        begin = time.monotonic()
        if self.unsaved and begin >= self.save_from:
            write_results(self.folder, self.lines.values())
            self.unsaved, end = False, time.monotonic()
            self.save_from = end + PAUSE * (end - begin)

    def _again(self, chosen: Point, deaths: int) -> None:
        """Hand a point out again later."""
        self.out[chosen.number] = chosen, _starts_bytes(chosen)
        self.queue.append(chosen)
        self.deaths[chosen.number] = self.deaths.get(chosen.number, 0) + deaths

    def _end(self, chosen: Point, result: Mapping[str, Any]) -> None:
        self.out.pop(chosen.number, None)
        self.unsaved = True
        self.lines[chosen.number], self.ended[chosen.number] = line_of(chosen, result), chosen
        self.source.tell(chosen, result)

    def _failed(self, chosen: Point, error: str) -> dict[str, Any]:
        """The result of a point that has none of its own."""
        result = {"state": FAILED, "error": error}
        write_result(chosen.folder, result)
        return result

    def _after_death(self, error: BaseException) -> None:
        """Go on after the death of a worker, with new ones."""
        # The other futures of a broken executor have failed too, or do so at once.
        self._collect(wait(self.futures).done)
        self.unborn += not self.lines and not any((each.folder / STARTS).exists() for each in self.queue)
        if self.unborn >= SUSPECT:
            raise RuntimeError(
                f"workers die before they begin ({error}); a script must call run_sweep under "
                '`if __name__ == "__main__":`, because its worker processes import it'
            )
        for each in list(self.queue):
            if self.deaths[each.number] >= MOST_DEATHS:
                self.queue.remove(each)
                times = self.deaths[each.number]
                self._end(each, self._failed(each, f"its worker died {times} times ({type(error).__name__})"))
        if not self.engine.renews:
            raise RuntimeError(f"the executor is broken ({error}); {self._how_on()}")
        warnings.warn(f"a worker died ({type(error).__name__}); its point goes on with another one", stacklevel=2)
        self.engine.renew()

    # --- ends ---

    def _stop(self) -> None:
        """Let every worker save its run, and raise `SweepStopped`."""
        # Points that wait for a worker are not cancelled: they return at once when they get one.
        write_whole(self.folder / STOP, self.driver.encode(), overwrite=True)
        while self.futures:
            done, _ = wait(self.futures, timeout=POLL)
            for future in done:
                chosen, result = self.futures.pop(future), None
                with suppress(Exception, CancelledError):
                    result = future.result()
                if result is not None and result["state"] in (DONE, FAILED):
                    self._end(chosen, result)
            if self.engine.lost():
                break
        write_results(self.folder, self.lines.values())
        raise SweepStopped(f"stopped with {len(self.lines)} of {self.source.total} points ended, the others are saved")

    def _how_on(self) -> str:
        return f"{len(self.lines)} of {self.source.total} points have ended; {how_on(self.folder)}"

    # --- progress ---

    def _statuses(self) -> list[Status]:
        ended = [
            Status(self.ended[number], self.lines[number]["state"], 1.0, self.lines[number]) for number in self.lines
        ]
        return sorted([*ended, *(_status(*each) for each in self.out.values())], key=lambda status: status.point.number)


def _status(each: Point, starts: int) -> Status:
    """Where a point stands that has not ended, by its files.

    starts : bytes of its starts when it was handed out. A worker that begins adds a line to them; the lock alone may
             have been left by a process that was killed
    """
    running = _starts_bytes(each) > starts and (each.folder / LOCK).exists()
    line = _last_line(each.folder / RUN / LOG) if running else {}
    return Status(each, "running" if running else "waiting", float(line.get("share", 0.0)), line)


def _starts_bytes(each: Point) -> int:
    try:
        return (each.folder / STARTS).stat().st_size
    except OSError:
        return 0


def _last_line(log: Path) -> dict[str, Any]:
    """The last whole line of a log; empty where there is none."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().split(b"\n")[:-1]
        found = json.loads(lines[-1]) if lines else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
