"""Time a training window (forward and backward) beside PyTorch in the CASES, and append a line per case to results/.

    python experiments/bench_training.py
    python experiments/bench_training.py --table
    python experiments/bench_training.py --only "batch 20, 0% pruned, 2 threads" --baselines torch

A line holds the output of `eventrnn bench training --json`, the commit and the time. A case whose last line of this
device and commit has all baselines that are asked for is skipped. Needs torch.
"""

from pathlib import Path
from typing import Annotated

import typer
from command_line import command
from records import Records, commit
from rich.console import Console
from rich.table import Table

from eventrnn import bench
from eventrnn.cli.terminal import progress
from eventrnn.pruning.patterns import parse_nm
from eventrnn.weights.nm import AXES

RESULTS = Path(__file__).parent / "results" / "cpu_training.jsonl"
KEY = ("commit", "batch", "sparsity_asked", "nm", "threads", "input_gradient")
# Batch, share of blocks pruned or pattern of masks, threads, input gradient, and per baseline the speed-up to reach
# ("": no goal).
CASES = (
    (20, 0.0, 2, "open", {"torch": 2.5, "torch-loop": "", "torch-loop-indexed": 4}),
    (80, 0.0, 2, "open", {"torch": 3, "torch-loop": "", "torch-loop-indexed": 7}),
    (20, 0.9, 2, "open", {"torch": 8}),
    (80, 0.9, 2, "open", {"torch": 8}),
    (20, 0.0, 2, "all", {"torch": 2.5}),
    (80, 0.0, 2, "all", {"torch": 3}),
    (20, 0.9, 2, "all", {"torch": 8}),
    (20, 0.0, 1, "open", {"torch": ""}),
    (80, 0.0, 1, "open", {"torch": ""}),
    (20, 0.9, 1, "open", {"torch": ""}),
    (80, 0.9, 1, "open", {"torch": ""}),
    (20, "2:4", 1, "open", {"dense": "", "torch": ""}),
    (80, "2:4", 1, "open", {"dense": "", "torch": ""}),
    (20, "1:8", 1, "open", {"dense": "", "torch": ""}),
)


def asked_of(case: tuple) -> dict:
    """The fields that a line has for one of the CASES."""
    batch, pruned, threads, inputs, _ = case
    share, nm = (0.0, f"{pruned}:post") if isinstance(pruned, str) else (pruned, None)
    return {"batch": batch, "sparsity_asked": share, "nm": nm, "threads": threads, "input_gradient": inputs}


def pruned_of(case: tuple) -> str:
    """What is pruned in one of the CASES, in words."""
    return f"{case[1]} masks" if isinstance(case[1], str) else f"{case[1]:.0%} pruned"


def show(records: Records) -> Table:
    """One row per case, from its last line."""
    columns = (
        "batch",
        "pruned",
        "threads",
        "d inputs",
        "open",
        "ms",
        "nn.GRU ms",
        "faster",
        "goal",
        "loop ms",
        "faster",
        "indexed ms",
        "faster",
        "goal",
        "dense ms",
        "faster",
    )
    table = Table(*columns, "operations", title=f"1350 units, 70 steps, 10 % active, 10 % support: {records.device}")
    for case in CASES:
        batch, _, threads, inputs, goals = case
        line = records.of(asked_of(case))
        if line is None:
            continue
        cells = []
        for baseline in ("torch", "torch-loop", "torch-loop-indexed", "dense"):
            each = line["against_each"].get(baseline)
            cells += [f"{each['ms_per_iteration']:.0f}", f"{each['speedup']:.2f}"] if each else ["", ""]
            if baseline in ("torch", "torch-loop-indexed"):
                cells.append(f"{goals.get(baseline, '')}")
        head = (str(batch), pruned_of(case), str(threads), inputs)
        cells = [*head, f"{line['open']:.1%}", f"{line['ms_per_iteration']:.0f}", *cells]
        share = line["executed_per_iteration"] / line["dense_per_iteration"]
        table.add_row(*cells, f"{line['executed_per_iteration']:.3g} ({share:.1%} of dense)")
    return table


def name_of(case: tuple) -> str:
    """The name of one of the CASES."""
    batch, _, threads, inputs, _ = case
    return f"batch {batch}, {pruned_of(case)}, {threads} threads, {inputs} input gradients"


def main(
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 7,
    only: Annotated[str, typer.Option(help="Measure only cases whose name contains these words.")] = "",
    only_baselines: Annotated[str, typer.Option("--baselines", help="Beside these only, comma-separated.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Measure cases that have a line again.")] = False,
    table_only: Annotated[bool, typer.Option("--table", help="Measure nothing; show the last device's lines.")] = False,
    results: Annotated[Path, typer.Option(help="File to which a line per case is appended.")] = RESULTS,
) -> None:
    """Measure the cases that have no line, then show all of them."""
    records, at = Records(results, KEY), commit()
    if table_only:
        records.as_last()
    else:
        cases = [case for case in CASES if only in name_of(case)]
        if not cases:
            names = "\n".join(map(name_of, CASES))
            raise typer.BadParameter(f"got {only!r}, need words from one of the names\n{names}", param_hint="--only")
        with progress() as report:
            for done, asked in enumerate(cases):
                report("cases", done, len(cases), name_of(asked))
                case = asked_of(asked)
                against = only_baselines.split(",") if only_baselines else list(asked[-1])
                line = records.of(case | {"commit": at})
                if again or line is None or not set(against) <= line["against_each"].keys():
                    case["sparsity"] = case.pop("sparsity_asked")
                    case["nm"] = case["nm"] and parse_nm(case["nm"], AXES)
                    records.add(bench.training(**case, repeats=repeats, against=",".join(against)))
    console = Console(width=190)
    console.print(show(records))


if __name__ == "__main__":
    command(main, __doc__).run()
