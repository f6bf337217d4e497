"""Time the acceptance cases, the README's cases and the speed-up map, and append a line per case to results/.

    python experiments/bench.py                    # acceptance and README cases
    python experiments/bench.py --grid             # activity x sparsity x batch, for the speed-up map
    python experiments/bench.py --only "batch 20"  # the cases whose name contains these words
    python experiments/bench.py --table            # show the lines that exist beside their goals; measure nothing

A line holds the output of `eventrnn bench inference --json`, the commit and the time. It is written as soon as it is
measured, and a case that has a line of this commit of the package and this device is skipped, so a run can be stopped
and continued. Needs torch, and sparse_dot_mkl or a C compiler for some cases; the table names the cases that could not
be measured.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from command_line import command
from records import commit
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from eventrnn import bench
from eventrnn.cli.terminal import as_line

RESULTS = Path(__file__).parent / "results" / "cpu_inference.jsonl"

# Columns of the table. In a narrower terminal its cells would be cut.
TABLE_WIDTH = 170
DENSE = {"format": "dense"}
SPARSE_LIBRARIES, BLAS = "scipy,torch-csr,mkl", "numpy,torch-mm"
IN_C = {"against": "c-blocks"}


@dataclass(frozen=True)
class Row:
    """A case of `eventrnn.bench.Case` and its goals.

    name     : name of the row
    case     : arguments of the case; defaults are left out
    at_least : value of `figure` that the case must reach; None if there is no goal
    aim      : value of `figure` that would be better still
    figure   : field of the measured line that is compared
    """

    name: str
    case: dict = field(hash=False)
    at_least: float | None = None
    aim: float | None = None
    figure: str = "speedup"

    def __post_init__(self):
        object.__setattr__(self, "case", {"repeats": REPEATS} | self.case)


def acceptance() -> list[Row]:
    """Goals of the CPU engine: one layer or one product of 1350 units, 10 % active unless the name says otherwise."""
    rows = []
    for threads, layer, aims, blocks, block_aim in ((1, 5.5, None, 50, 60), (2, 7, None, 65, 96)):
        case = DENSE | {"threads": threads}
        label = f"{threads} thread{'s' * (threads > 1)}"
        rows += [
            Row(f"layer, dense, {label}", case, layer, aims),
            Row(f"layer, dense, {label}: share of the probe", case, 0.85, 0.92, "bandwidth_fraction"),
            Row(f"layer, dense, step by step, {label}", case | {"against": "torch-step"}, 12, 15),
            Row(f"layer, 90 % of 1x64, {label}", {"threads": threads}, blocks, block_aim),
        ]
    rows += [
        Row("layer, 90 % of 1x16", {"block": (1, 16)}, 28, 45),
        Row("layer, 95 % of 1x64, 5 %", {"sparsity": 0.95, "activity": 0.05}, 90, 150),
        *(
            Row(f"layer, 90 % of 1x64, {hidden} units", {"hidden": hidden}, least)
            for hidden, least in ((512, 40), (2048, 35), (4096, 55))
        ),
        *(
            Row(f"product, 90 % of {r}x{c}", {"block": (r, c), "against": SPARSE_LIBRARIES}, 25, 40)
            for r, c in ((1, 64), (16, 16), (32, 32))
        ),
        *(
            Row(f"product, 90 % of {r}x{c}, {dtype}, against C", {"block": (r, c), "dtype": dtype} | IN_C, least, aim)
            for dtype, least, aim in (("float32", 8, 10), ("int8", 5, 8))
            for r, c in ((1, 64), (4, 8))
        ),
        Row("product, 90 % of 1x64, int8 in integers, against C", {"dtype": "int8", "exact": False} | IN_C, 5, 8),
        Row("product, 90 % of single weights", {"format": "csr", "against": SPARSE_LIBRARIES}, 4.5, 8),
        Row("product, dense bfloat16 against float32", DENSE | {"dtype": "bfloat16", "against": "float32"}, 2, 2.3),
    ]
    for batch, steps, dense, dense_aim, blocks, active in ((20, 64, 2.5, 4, 11, 0.7), (80, 24, 3, 5, 9, 0.7)):
        for threads in (1, 2):
            case = {"batch": batch, "steps": steps, "threads": threads, "against": BLAS}
            label = f"batch {batch}, {threads} thread{'s' * (threads > 1)}"
            rows += [
                Row(f"product, dense, {label}", DENSE | case, dense, dense_aim),
                Row(f"product, 90 % of 1x64, {label}", case, blocks, 20),
                Row(f"product, dense, all active, {label}", DENSE | case | {"activity": 1.0}, active, 0.9),
            ]
    return rows


def readme() -> list[Row]:
    """Further cases that the README or docs/results.md quotes."""
    return [
        Row("README: 90 % of 1x64, step by step", {"against": "torch-step"}),
        Row("README: 90 % of single weights", {"format": "csr"}),
        Row("README: dense, half active", DENSE | {"activity": 0.5}),
        Row("README: 90 % of 1x64, batch 20", {"batch": 20}),
        Row("README: dense, batch 20", DENSE | {"batch": 20}),
        Row("README: 90 % of 1x64, paper", {"variant": "paper"}),
        Row("README: dense bfloat16", DENSE | {"dtype": "bfloat16"}),
        Row("README: dense int8", DENSE | {"dtype": "int8"}),
        Row("README: 2:4", {"format": "nm", "nm": (2, 4, "post")}),
    ]


ACTIVITIES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SPARSITIES = (0.0, 0.8, 0.9, 0.95)
BATCHES = (1, 20)
# Repeats of a case, and of a case of the grid. The grid has fewer, by which plots.py recognises its lines.
REPEATS, GRID_REPEATS = 9, 5


def grid() -> list[Row]:
    """The cases of the speed-up map: a layer beside nn.GRU, dense if nothing is pruned, else in blocks of 1x64."""
    return [
        Row(
            f"grid: batch {batch}, sparsity {sparsity:g}, activity {activity:g}",
            (DENSE if sparsity == 0 else {"sparsity": sparsity})
            | {"activity": activity, "batch": batch, "steps": 200 if batch == 1 else 64, "repeats": GRID_REPEATS},
        )
        for batch in BATCHES
        for sparsity in SPARSITIES
        for activity in ACTIVITIES
    ]


def measured(lines: Iterable[dict], at: str, device: str) -> list[dict]:
    """The lines of that commit and device. A tree with changes has none, because it may have changed since."""
    return (
        [] if at.endswith("-changed") else [line for line in lines if (line["commit"], line["device"]) == (at, device)]
    )


def line_of(row: Row, lines: list[dict]) -> dict | None:
    """The latest line that measured the row's case."""
    # A line says whether its products were exact only where they were not.
    asked = {"exact": True} | bench.Case(**row.case).record()
    told = ({"exact": True} | line for line in reversed(lines))
    return next((line for line in told if all(k in line and line[k] == v for k, v in asked.items())), None)


def impossible(rows: list[Row]) -> dict[str, str]:
    """The names of rows whose case the package refuses, with the reason."""
    found = {}
    for row in rows:
        try:
            bench.Case(**row.case)
        except ValueError as error:
            found[row.name] = str(error)
    return found


def read(path: Path) -> list[dict]:
    """Every line of a results file; none if the file does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def verdict(row: Row, line: dict) -> str:
    """pass, or by how much the goal is missed; empty without a goal."""
    if row.at_least is None:
        return ""
    value = line[row.figure]
    return "pass" if value >= row.at_least else f"short by {1 - value / row.at_least:.0%}"


def table(rows: list[Row], lines: list[dict], refused: dict[str, str]) -> Table:
    """One row per case: the measured figures beside the goals.

    refused : names of cases that could not be measured, with the reason
    """
    columns = (
        "case",
        "µs",
        "baseline µs",
        "fastest baseline",
        "figure",
        "at least",
        "aim",
        "",
        "probe",
        "ops",
        "bytes",
    )
    shown = Table(*columns, title="per step; probe: share of its read rate that is reached; ops: executed")
    for row in rows:
        line = None if row.name in refused else line_of(row, lines)
        if line is None:
            shown.add_row(row.name, *[""] * 6, refused.get(row.name, "not measured"))
            continue
        baseline = line["against_us_per_step"]
        shown.add_row(
            row.name,
            f"{line['us_per_step']:,.1f}",
            "" if baseline is None else f"{baseline:,.1f}",
            line["against_variant"],
            f"{line[row.figure]:.2f}",
            "" if row.at_least is None else f"{row.at_least:g}",
            "" if row.aim is None else f"{row.aim:g}",
            verdict(row, line),
            f"{line['bandwidth_fraction']:.0%}",
            f"{line['executed_per_step']:,.0f}",
            f"{line['bytes_per_step']:,.0f}",
        )
    return shown


def main(
    only: Annotated[str, typer.Option(help="Measure only cases whose name contains these words.")] = "",
    with_grid: Annotated[bool, typer.Option("--grid", help="Measure the cases of the speed-up map too.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Measure again even if there is a line.")] = False,
    table_only: Annotated[bool, typer.Option("--table", help="Measure nothing; show the lines that exist.")] = False,
    results: Annotated[Path, typer.Option(help="File to which a line per case is appended.")] = RESULTS,
) -> None:
    """Measure the cases that have no line, then show all of them. Exit code 1 if a case could not be measured."""
    rows = [row for row in acceptance() + readme() + (grid() if with_grid else []) if only in row.name]
    if not rows:
        raise typer.BadParameter(f"got {only!r}, need words from the name of a case, see --table", param_hint="--only")
    console, at, device = Console(width=max(TABLE_WIDTH, Console().width)), commit(), bench.device()
    refused = impossible(rows)
    if table_only:
        console.print(table(rows, measured(read(results), at, device), refused))
        return
    lines = [] if again else measured(read(results), at, device)
    results.parent.mkdir(exist_ok=True)
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with bars:
        task = bars.add_task("", total=len(rows) - len(refused))
        for row in (row for row in rows if row.name not in refused):
            bars.update(task, description=row.name)
            try:
                if line_of(row, lines) is None:
                    line = {"commit": at, "time": datetime.now(UTC).isoformat(timespec="seconds")}
                    lines.append(line | bench.inference(**row.case))
                    with results.open("a") as file:
                        file.write(as_line(lines[-1]) + "\n")
            except (ValueError, RuntimeError, MemoryError) as error:
                refused[row.name] = str(error)
                bars.console.print(f"{row.name}: {error}")
            bars.advance(task)
    console.print(table(rows, lines, refused))
    raise typer.Exit(1 if refused else 0)


if __name__ == "__main__":
    command(main, __doc__).run()
