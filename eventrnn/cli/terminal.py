"""Output of the command line: progress on stderr, tables or one line of JSON on stdout.

Text that comes from files is shown as it is: control characters are escaped, and rich reads no markup in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from eventrnn._files import printable


def console(*, stderr: bool = False, least_width: int = 0) -> Console:
    """A console that reads no markup and no names of emoji in text, at least so many characters wide."""
    made = Console(stderr=stderr, markup=False, emoji=False)
    if made.width < least_width:
        made.width = least_width
    return made


@contextmanager
def progress() -> Iterator[Callable[[str, int, int, str], None]]:
    """Yield `report(stage, done, total, note)`: progress bars where stderr is a terminal, else one line per tenth."""
    to = console(stderr=True)
    if not to.is_terminal:
        tenths: dict[str, int] = {}

        def line(stage: str, done: int, total: int, note: str) -> None:
            if done * 10 // total > tenths.get(stage, -1):
                tenths[stage] = done * 10 // total
                share = f"{done / total:.0%}" if done else "…"
                words = f"{stage} {share} {note}".rstrip()
                # The work goes on where stderr is a file on a full disk.
                with suppress(OSError):
                    print(printable(words), file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        *(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=to, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def bar(stage: str, done: int, total: int, note: str) -> None:
            stage, note = printable(stage), printable(note)
            if stage not in tasks:
                for earlier in tasks.values():
                    bars.update(earlier, completed=bars.tasks[earlier].total)
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, note=note)

        yield bar


def show(title: str, figures: Mapping, as_json: bool) -> None:
    """Print figures as a table, or as one JSON object."""
    if as_json:
        print(as_line(figures))
        return
    table = Table("", "", title=printable(title), show_header=False)
    for name, value in figures.items():
        if value is not None:
            # Names with dots are parameters of the library and of files, and are not changed.
            table.add_row(printable(name if "." in name else name.replace("_", " ")), printable(_readable(value)))
    console().print(table)


def as_line(figures: Mapping) -> str:
    """One line of JSON. Numbers that are not finite become null, because JSON cannot express them."""

    def finite(value):
        if isinstance(value, Mapping):
            return {name: finite(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [finite(each) for each in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return json.dumps(finite(figures), allow_nan=False)


def _readable(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_readable(v)}" for k, v in value.items())
    return str(value)
