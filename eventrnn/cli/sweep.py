"""`eventrnn sweep`: train many points of one recipe, on worker processes of one machine or of several."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from eventrnn._files import printable
from eventrnn.cli.options import Json, writable_folder
from eventrnn.cli.terminal import as_line, console, show

if TYPE_CHECKING:
    from eventrnn.sweeps.driver import Report, Status
    from eventrnn.sweeps.plan import Point, Sweep

# Lines of a terminal that the table leaves to other text.
MARGIN = 8

# Order in which points are shown where there is no room for all of them.
ORDER = ("running", "failed", "done", "waiting")


def sweep(
    plan: Annotated[
        Path | None, typer.Argument(metavar="SWEEP.TOML", help="File with the grid, the points or the study.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder of the sweep to write.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a sweep to go on with.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set one setting of all points; repeat for more."),
    ] = None,
    executor: Annotated[
        str,
        typer.Option(
            help="Workers that train the points: processes or loky (of this machine), dask (with --address), "
            "executorlib, slurm (srun within an allocation) or mpi (mpi4py.futures)."
        ),
    ] = "processes",
    workers: Annotated[
        int | None, typer.Option(help="Number of processes. [as many as cores allow, or one per GPU]")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a dask scheduler, such as tcp://10.0.0.1:8786.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the points, and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train every point of a grid, or the trials of a study, each as a run of its own.

    The folder gets results.jsonl, with one line per point. Ctrl-C saves all runs; --resume goes on after it, and after
    the death of this process, of a worker or of a scheduler. Points that failed are tried again, except in a study.
    """
    from eventrnn import sweeps
    from eventrnn.sweeps.results import SWEEP, how_on

    planned = _planned(plan, out, resume, settings, dry_run)
    folder = resume or out
    if out is not None:
        writable_folder(out, (), force=False)
    if dry_run:
        points = sweeps.check_sweep(
            planned, folder, executor=executor, workers=workers, address=address, resume=resume is not None
        )
        _list(planned, points, as_json)
        return
    assert folder is not None
    with _live() as report:
        try:
            lines = sweeps.run_sweep(
                planned,
                folder,
                executor=executor,
                workers=workers,
                address=address,
                resume=resume is not None,
                report=report,
            )
        except KeyboardInterrupt as stop:
            words = str(stop) or "stopped at once; the runs are as their last checkpoints are"
            begun = (folder / SWEEP).exists()
            words = f"{words}; {how_on(folder)}" if begun else "stopped before any work; nothing was written"
            print(printable(f"eventrnn: {words}"), file=sys.stderr)
            raise typer.Exit(130) from None
    _summarise(folder, lines, as_json)


def _planned(
    plan: Path | None, out: Path | None, resume: Path | None, settings: list[str] | None, dry_run: bool
) -> Sweep:
    """The sweep of the file, or else that of the folder."""
    from eventrnn.sweeps import load_sweep
    from eventrnn.sweeps.results import saved_sweep
    from eventrnn.training.recipes.toml_config import parse_setting

    if plan is None and resume is None:
        raise ValueError("sweep: got no file; give a TOML file with a grid, or --resume and the folder of a sweep")
    if resume is not None and out is not None:
        raise ValueError("out: a sweep goes on in its own folder; give --out or --resume")
    if resume is None and out is None and not dry_run:
        raise ValueError("out: got none; give --out a folder to write, or --dry-run")
    if plan is None:
        assert resume is not None
        if settings:
            raise ValueError("set: a sweep goes on unchanged; leave out --set")
        return saved_sweep(resume)
    return load_sweep(plan, settings=dict(map(parse_setting, settings or [])))


def _list(planned: Sweep, points: Sequence[Point], as_json: bool) -> None:
    if planned.study is not None:
        show("nothing is written", {"trials": planned.study.trials, "keys": ", ".join(planned.axes)}, as_json)
        return
    if as_json:
        print(as_line({"points": [dict(each.chosen) for each in points]}))
        return
    table = Table("point", *map(printable, planned.axes), title="nothing is written")
    for each in points:
        table.add_row(str(each.number), *(_cell(each.chosen.get(key)) for key in planned.axes))
    console().print(table)


def _summarise(folder: Path, lines: Sequence[dict[str, Any]], as_json: bool) -> None:
    from eventrnn.sweeps.results import DONE, RESULTS, failures, saved_sweep

    ran = saved_sweep(folder)
    goal, sign = ("bits_per_symbol_best", 1) if ran.study is None else (ran.study.goal, 1 - 2 * ran.study.maximise)
    done = [line for line in lines if line["state"] == DONE]
    judged = [line for line in done if isinstance(line.get(goal), int | float)]
    best = min(judged, key=lambda line: sign * line[goal], default=None)
    figures: dict[str, Any] = {"points": len(lines), "done": len(done), "failed": len(lines) - len(done)}
    if best is not None:
        chosen = {key: best[key] for key in ran.axes if key in best}
        figures |= {"best_point": best["point"], f"best_{goal}": best[goal], "best_settings": chosen}
    show(f"wrote {folder / RESULTS}", figures, as_json)
    if words := failures(lines, ran.axes):
        raise RuntimeError(words)


# --- progress -----------------------------------------------------------------------------------------------


@contextmanager
def _live() -> Iterator[Report]:
    """Yield the report of a sweep: a table that is kept up to date on a terminal, else a line per point that ended."""
    to = console(stderr=True)
    if to.is_terminal:
        with Live(console=to, transient=True, auto_refresh=False) as live:
            yield lambda statuses, total: live.update(_table(statuses, total, to.height - MARGIN), refresh=True)
        return
    told: set[int] | None = None

    def lines(statuses: list[Status], total: int) -> None:
        nonlocal told
        ended = [each for each in statuses if each.state in ("done", "failed")]
        if told is None:
            told = {each.point.number for each in ended}
            if told:
                _say(f"{len(told)} of {total} points have ended before")
        for each in ended:
            number = each.point.number
            if number not in told:
                told.add(number)
                _say(f"point {number} {each.state}, {len(told)}/{total}: {_settings(each)} {_quality(each)}")

    yield lines


def _say(words: str) -> None:
    # The work goes on where stderr is a file on a full disk.
    with suppress(OSError):
        print(printable(words), file=sys.stderr, flush=True)


def _table(statuses: Sequence[Status], total: int, rows: int) -> Group:
    """The points that fit, those that are trained first."""
    keys = list(dict.fromkeys(key for each in statuses for key in each.point.chosen))
    shown = sorted(statuses, key=lambda each: (ORDER.index(each.state), -each.point.number))[: max(1, rows)]
    table = Table("point", *map(printable, keys), "state", "done", "quality", "seconds")
    for each in sorted(shown, key=lambda each: each.point.number):
        settings = [_cell(each.point.chosen.get(key)) for key in keys]
        seconds = each.line.get("seconds")
        took = f"{seconds:,.0f}" if isinstance(seconds, int | float) else ""
        table.add_row(str(each.point.number), *settings, each.state, f"{each.share:.0%}", _quality(each), took)
    counts = {state: sum(each.state == state for each in statuses) for state in ORDER}
    words = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    return Group(table, Text(f"{counts['done'] + counts['failed']} of {total} points ended: {words}"))


def _settings(each: Status) -> str:
    return " ".join(f"{key}={_cell(value)}" for key, value in each.point.chosen.items())


def _quality(each: Status) -> str:
    """The best validation of a point that has ended, the loss of one that is trained, or its error."""
    if each.state == "failed":
        return printable(each.line.get("error", ""), 60)
    best, loss = each.line.get("bits_per_symbol_best"), each.line.get("loss")
    if isinstance(best, int | float):
        return f"{best:.4g} bits"
    return f"loss {loss:.4g}" if isinstance(loss, int | float) else ""


def _cell(value: Any) -> str:
    return "" if value is None else printable(value, 60)
