"""What a sweep leaves in its folder.

    sweep.json               what is swept, and the version of this layout
    results.jsonl            one line per point that has ended, in the order of their numbers
    points/0007/             one point
        model.safetensors        its model
        model.safetensors.run/   its run: configuration, log and checkpoints
        starts.jsonl             one line per start: time, process, host and GPU
        result.json              its figures, or its error; there once the point has ended

`result.json` counts. The worker writes it while it holds the lock of the point, and `results.jsonl` is made of all of
them, so that no point can be lost between the two.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from eventrnn._files import printable, write_whole
from eventrnn.sweeps.plan import Point, Study, Sweep, described, plain

SWEEP, RESULTS, RESULT, STARTS, STOP = "sweep.json", "results.jsonl", "result.json", "starts.jsonl", "stop"

# The version of the layout.
VERSION = 1

DONE, FAILED, STOPPED = "done", "failed", "stopped"


# --- the sweep ----------------------------------------------------------------------------------------------


def save_sweep(sweep: Sweep, folder: Path) -> None:
    """Write what is swept."""
    write_whole(folder / SWEEP, (json.dumps(_record(sweep), indent=1) + "\n").encode(), overwrite=True)


def saved_sweep(folder: str | os.PathLike) -> Sweep:
    """The sweep of a folder. Raises ValueError for a folder without one, and for one that cannot be read."""
    path = Path(folder) / SWEEP
    try:
        record = json.loads(path.read_bytes())
        if record["version"] != VERSION:
            raise ValueError(
                f"folder: the sweep in {printable(folder)} is of version {record['version']}, this is {VERSION}; "
                "use the version of eventrnn that began it"
            )
        study = record["sweep"].pop("study")
        points = tuple(record["sweep"].pop("points"))
        return Sweep(**record["sweep"], points=points, study=None if study is None else Study(**study))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"folder: {printable(folder)} holds no sweep: it has no {SWEEP}") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"folder: {printable(path)} cannot be read: {error}") from None


def need_same(sweep: Sweep, folder: Path) -> None:
    """Raise ValueError, with the first difference, where the folder holds another sweep."""
    own, given = _record(saved_sweep(folder))["sweep"], _record(sweep)["sweep"]
    for name in given:
        before, now = own[name], given[name]
        if isinstance(before, dict) and isinstance(now, dict):
            keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
            if keys:
                name, before, now = f"{name} {keys[0]}", before.get(keys[0]), now.get(keys[0])
            elif name == "grid":
                # The order of the keys decides the numbers of the points.
                name, before, now = "order of keys in the grid", list(before), list(now)
        if before != now:
            raise ValueError(
                f"resume: {printable(folder)} holds another sweep: its {name} is {_short(before)}, not "
                f"{_short(now)}; give another folder"
            )


def _record(sweep: Sweep) -> dict[str, Any]:
    # Through JSON, so that tuples and lists are the same.
    return json.loads(json.dumps({"version": VERSION, "sweep": asdict(sweep)}, default=plain))


def _short(value: Any) -> str:
    return "not given" if value is None else printable(json.dumps(value), 120)


def how_on(folder: str | os.PathLike) -> str:
    """How a sweep goes on, in words."""
    return f"go on with: eventrnn sweep --resume {shlex.quote(os.fspath(folder))}"


# --- points -------------------------------------------------------------------------------------------------


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a point; None where it has not ended."""
    try:
        found = json.loads((folder / RESULT).read_bytes())
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        # Damaged by something else than a kill: the file is written whole. The point goes on from its checkpoint.
        return None
    return found if isinstance(found, dict) and found.get("state") in (DONE, FAILED) else None


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the result of a point."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RESULT, (json.dumps(result) + "\n").encode(), overwrite=True)


def note_start(folder: Path, gpu: str | None = None) -> int:
    """Add a line to the starts of a point whose lock is held, with the name of its GPU. Returns how many there are."""
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "process": os.getpid(),
        "host": socket.gethostname(),
    } | ({} if gpu is None else {"gpu": gpu})
    path = folder / STARTS
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return path.read_bytes().count(b"\n")


def line_of(point: Point, result: Mapping[str, Any]) -> dict[str, Any]:
    """The line of a point that has ended, flat: its number, folder and state, its settings, its figures."""
    settings = {key: _cell(value) for key, value in point.chosen.items()}
    head = {"point": point.number, "folder": f"points/{point.folder.name}", "state": result["state"]}
    return head | settings | {key: value for key, value in result.items() if key != "state"}


def write_results(folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write the lines of all points that have ended."""
    ordered = sorted(lines, key=lambda line: line["point"])
    text = "".join(json.dumps(line) + "\n" for line in ordered)
    write_whole(folder / RESULTS, text.encode(), overwrite=True)


def read_results(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a sweep, one per point that has ended: `pandas.DataFrame(read_results(folder))` is a table.

    Raises ValueError where the folder has none, or where a line cannot be read.
    """
    path = Path(folder) / RESULTS
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"folder: {printable(folder)} holds no results of a sweep: it has no {RESULTS}; give the folder that "
            "`eventrnn sweep` wrote"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"folder: {printable(path)} cannot be read: {error}; `eventrnn sweep --resume` writes it anew from the "
            "results of the points"
        ) from None
    if not all(isinstance(line, dict) and "point" in line and "state" in line for line in lines):
        raise ValueError(f"folder: {printable(path)} has a line that is no result of a point")
    return lines


def failures(lines: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> str:
    """The points that failed, in words; empty if there is none.

    axes : keys in which the points differ
    """
    failed = [line for line in lines if line["state"] == FAILED]
    if not failed:
        return ""
    first = failed[0]
    chosen = {key: first[key] for key in axes if key in first}
    return (
        f"{len(failed)} of {len(lines)} points failed, the first of them point {first['point']} ({described(chosen)}): "
        f"{first['error']}"
    )


def _cell(value: Any) -> Any:
    """A setting as a cell of a table: a list or a table is its text in JSON, and infinity, which JSON lacks, a text."""
    value = plain(value)
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    return json.dumps(value) if isinstance(value, list | tuple | dict) else value
