"""Time layers on a GPU beside every algorithm of cuDNN's GRU and LSTM, and append a line each to results/.

    python experiments/every_cudnn.py                      # hidden 512, 768, 1024, 1344; batch 1, 16, 64; 3 more
    python experiments/every_cudnn.py --hidden 768 --hidden 1024 --batch 16
    python experiments/every_cudnn.py --no-exact           # only those that may use tensor cores

A line holds the output of `eventrnn bench inference --backend cuda --json`, the commit and the time. A case that has a
line of this commit is skipped, so a run can be stopped and continued. Needs a GPU and cuDNN.
"""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from command_line import command
from records import commit
from rich.console import Console

from eventrnn import bench
from eventrnn.cli.terminal import as_line

RESULTS = Path(__file__).parent / "results" / "cudnn_persistent.jsonl"
BLOCKS = {"format": "block", "block": (1, 32), "dtype": "bfloat16"}
# The rows that answer most come first.
CASES = [
    *(BLOCKS | {"hidden": hidden, "batch": 1} for hidden in (768, 1024)),
    {"format": "dense", "hidden": 1344, "batch": 1},
    # The size at which dynamic_blocks.py times gated blocks, beside the algorithms that PyTorch calls only.
    {"format": "dense", "hidden": 1536, "batch": 1},
    BLOCKS | {"hidden": 1350, "batch": 64},
    *(BLOCKS | {"hidden": hidden, "batch": 1} for hidden in (512, 1344)),
    *(BLOCKS | {"hidden": hidden, "batch": batch} for hidden in (768, 1024) for batch in (16, 64)),
    *(BLOCKS | {"hidden": hidden, "batch": batch} for hidden in (512, 1344) for batch in (16, 64)),
]
# With exact=False, layers whose weights lie in the shared memory of a cluster go through tensor cores.
CASES += [BLOCKS | {"hidden": hidden, "batch": 64, "exact": False} for hidden in (1350, 1024, 768, 512)]
CASES += [BLOCKS | {"hidden": hidden, "batch": 16, "exact": False} for hidden in (1024, 1344)]
CASES += [
    {"format": "dense", "hidden": hidden, "batch": batch, "exact": False} for hidden in (1344, 1536) for batch in (1, 8)
]
STEPS, REPEATS = 1000, 9


def main(
    hidden: Annotated[list[int] | None, typer.Option(help="Only layers of so many units; may be repeated.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Only this batch size; may be repeated.")] = None,
    format: Annotated[str | None, typer.Option(help="Only this format: block or dense.")] = None,
    exact: Annotated[
        bool | None, typer.Option(help="Only exact layers, or only those that may use tensor cores.")
    ] = None,
    results: Annotated[Path, typer.Option(help="File of the lines.")] = RESULTS,
) -> None:
    """Measure every case that is asked for, and append a line each."""
    console, at = Console(stderr=True), commit()
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = [line for line in lines if line["commit"] == at and not at.endswith("-changed")]
    wanted = {"hidden": hidden, "batch": batch, "format": [format] if format else None}
    wanted |= {"exact": None if exact is None else [exact]}
    every = [{"exact": True} | case for case in CASES]
    cases = [case for case in every if all(not each or case[name] in each for name, each in wanted.items())]
    if not cases:
        raise typer.BadParameter(f"got {wanted}, which no case has; the cases are {CASES}")
    for case in cases:
        case = {"backend": "cuda", "against": "cudnn-persistent", "steps": STEPS, "repeats": REPEATS} | case
        asked = {"exact": True} | bench.Case(**case).record()
        if any(all(({"exact": True} | line).get(name) == value for name, value in asked.items()) for line in done):
            continue
        line = {"commit": at, "time": datetime.now(UTC).isoformat(timespec="seconds"), **bench.inference(**case)}
        with results.open("a") as file:
            file.write(as_line(line) + "\n")
        us = f"{line['us_per_step']:.2f} µs, {line['against_variant']} {line['against_us_per_step']:.2f} µs"
        console.print(
            f"{case['hidden']} units, batch {case['batch']}, {case['format']}{'' if case['exact'] else ', not exact'}: "
            f"{us}, {line['speedup']:.2f}x"
        )


if __name__ == "__main__":
    command(main, __doc__).run()
