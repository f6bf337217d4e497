"""Time transposable masks by every method, on the sizes of the CASES, some of which are published ones.

    python experiments/masks.py --threads 2
    python experiments/masks.py --table

A line holds the output of `eventrnn bench pruning --json`, the commit and the time. A case that has a line of this
device is skipped. `eventrnn bench pruning` shows published times beside one case.
"""

from pathlib import Path
from typing import Annotated

import typer
from command_line import command
from records import Records
from rich.console import Console
from rich.table import Table

from eventrnn.bench.masks import masks

RESULTS = Path(__file__).parent / "results" / "masks.jsonl"
# Side of the square matrix, n, m, rounds, and per method the seconds that it should take at most on two cores.
CASES = (
    (4096, 4, 8, 3, {"exact": 60, "greedy": 1}),
    (4096, 2, 4, 3, {}),
    (512, 8, 16, 3, {}),
    (8192, 8, 16, 1, {}),
)


def main(
    threads: Annotated[int, typer.Option(help="Threads that divide the tiles.")] = 2,
    again: Annotated[bool, typer.Option("--again", help="Measure cases that have a line again.")] = False,
    table_only: Annotated[bool, typer.Option("--table", help="Measure nothing; show the lines that exist.")] = False,
    results: Annotated[Path, typer.Option(help="File to which a line per case is appended.")] = RESULTS,
) -> None:
    """Measure the cases that have no line, then show all of them."""
    records = Records(results, ("matrix", "nm", "threads"))
    table = Table("matrix", "n:m", "method", "seconds", "processor seconds", "goal, seconds", "magnitude / exact")
    for side, n, m, repeats, limits in CASES:
        asked = {"matrix": f"{side}x{side}", "nm": f"{n}:{m}", "threads": threads}
        line = records.of(asked)
        if (again or line is None) and not table_only:
            line = records.add(masks(rows=side, columns=side, n=n, m=m, threads=threads, repeats=repeats))
        for method, found in (line or {"methods": {}})["methods"].items():
            times = (f"{found['seconds']:.3f}", f"{found['cpu_seconds']:.3f}", str(limits.get(method, "")))
            table.add_row(asked["matrix"], asked["nm"], method, *times, f"{found['of_exact']:.4%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    command(main, __doc__).run()
