"""Block-sparse models: quality, time and file size over sparsity x block x way of pruning (after Narang et al. 2017).

    python experiments/block_sparse.py --text FOLDER --kind word --vocabulary 1000 --hidden 384 --hidden 384
    python experiments/block_sparse.py --text FOLDER --kind word --hidden 1350 --hidden 1350 --hidden 750 --larger 1.5
    python experiments/block_sparse.py --table

A dense model is trained once and kept in --work. Every point goes on from it: `pruning` raises a threshold under the
blocks, `lasso` adds the group lasso; both end at the same share of blocks, and train on to the end. Then, for each
block and way, a network of --larger times the units is pruned to as many weights as the dense one has. A point that
has its line for the same job and device is skipped.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from models import Job, figures
from records import Records
from rich.console import Console
from rich.table import Table

from eventrnn.pruning import Blocks, Combined, GroupLasso, Pruning, ThresholdPruning, after_training
from eventrnn.terminal import progress

RESULTS = Path(__file__).parent / "results" / "block_sparse.jsonl"
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
BLOCKS = ((1, 1), (1, 16), (4, 4), (16, 16), (32, 32))
WAYS = ("pruning", "lasso")
KEY = ("job", "steps", "tuning", "strength", "way", "block", "sparsity", "larger")
# Masks are final after this share of the steps.
SETTLED = 0.4


def schedule(way: str, block: tuple[int, int], sparsity: float, steps: int, strength: float) -> Pruning:
    """Masks that reach the share of blocks, the last steps being left to train what remains."""
    end = max(2, int(steps * SETTLED))
    threshold = ThresholdPruning(block, 0, end // 2, end, every=max(1, end // 40), sparsity=sparsity)
    return threshold if way == "pruning" else Combined(GroupLasso(strength, block, 0, end), threshold)


def point(job: Job, work: Path, asked: dict, limit: int | None, report) -> dict:
    """One line: the dense model of that size, pruned and trained on."""
    block = tuple(int(size) for size in asked["block"].split("x"))
    wide = replace(job, hidden=tuple(int(asked["larger"] * units) for units in job.hidden))
    dense = wide.dense(work, asked["steps"], report)
    sparsity = asked["sparsity"]
    if asked["larger"] != 1:
        sizes = [sum(w.nnz for w in net.matrices().values()) for net in (job.untrained(), dense)]
        sparsity = 1 - sizes[0] / sizes[1]
    rule = schedule(asked["way"], block, sparsity, asked["tuning"], asked["strength"])
    trained, masks, seconds = wide.train(dense, asked["tuning"], report, rule)
    pruned = after_training(trained, dense, masks, Blocks(sparsity, block))
    return asked | {"share": sparsity, "train_seconds_per_step": seconds} | figures(pruned, wide, limit)


def reference(job: Job, work: Path, asked: dict, limit: int | None, report) -> dict:
    """The dense model, trained as long as the pruned ones are."""
    dense = job.dense(work, asked["steps"], report)
    trained, _, seconds = job.train(dense, asked["tuning"], report)
    return asked | {"share": 0.0, "train_seconds_per_step": seconds} | figures(trained, job, limit)


def points(steps: int, tuning: int, strength: float, larger: float, job: Job) -> list[dict]:
    """The dense model, the grid, and the larger network pruned to its size."""
    common = {"job": job.name(), "steps": steps, "tuning": tuning, "strength": strength}
    dense = {"way": "dense", "block": "", "sparsity": 0.0, "larger": 1.0}
    grid = [
        {"way": way, "block": f"{r}x{c}", "sparsity": sparsity, "larger": 1.0}
        for sparsity, (r, c), way in product(SPARSITIES, BLOCKS, WAYS)
    ]
    wide = [
        {"way": way, "block": f"{r}x{c}", "sparsity": 0.0, "larger": larger} for (r, c), way in product(BLOCKS, WAYS)
    ]
    return [common | each for each in (dense, *grid, *wide)]


def show(records: Records, asked: list[dict]) -> Table:
    """A line a point: quality and cost beside the dense model's."""
    columns = ("way", "block", "pruned", "units", "perplexity", "weights", "file", "times smaller", "µs", "dense µs")
    table = Table(*columns, title="on the test text; µs a step at batch 1")
    dense = records.of(asked[0])
    for each in asked:
        line = records.of(each)
        if line is None or dense is None:
            continue
        smaller = dense["file_bytes"] / line["file_bytes"]
        table.add_row(
            *(line["way"], line["block"], f"{line['share']:.1%}", f"x{line['larger']:g}", f"{line['perplexity']:.2f}"),
            *(f"{line['weights']:,}", f"{line['file_bytes']:,}", f"{smaller:.2f}"),
            *(f"{line['us_per_step']:.1f}", f"{line['dense_us_per_step']:.1f}"),
        )
    return table


def main(
    text: Annotated[str, typer.Option(help="'builtin', a text file, or a folder of text files.")] = "builtin",
    kind: Annotated[str, typer.Option(help="character or word.")] = "character",
    vocabulary: Annotated[int | None, typer.Option(help="Keep this many words.")] = None,
    hidden: Annotated[list[int] | None, typer.Option(help="Units of a layer; repeat. [256 256]")] = None,
    embedding: Annotated[int, typer.Option(help="Width of the embedding, which is not pruned.")] = 32,
    steps: Annotated[int, typer.Option(help="Updates of the dense model.")] = 600,
    tuning: Annotated[int, typer.Option(help="Updates while and after pruning.")] = 600,
    strength: Annotated[float, typer.Option(help="Of the group lasso.")] = 0.02,
    larger: Annotated[float, typer.Option(help="Units of the larger network, in those of the dense one.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Read at most this much of the test text.")] = 20_000,
    only: Annotated[str, typer.Option(help="Points of this way or block only.")] = "",
    work: Annotated[Path, typer.Option(help="Folder for dense models.")] = Path("eventrnn-blocks"),
    table_only: Annotated[bool, typer.Option("--table", help="Measure nothing.")] = False,
    results: Annotated[Path, typer.Option(help="Lines are appended here.")] = RESULTS,
) -> None:
    """Measure what is missing, then show everything asked for."""
    job = Job(text, kind, vocabulary, tuple(hidden or (256, 256)), embedding, seed=seed)
    records, console = Records(results, KEY), Console(width=140)
    asked = points(steps, tuning, strength, larger, job)
    asked = [each for each in asked if only in ("", each["way"], each["block"]) or each["way"] == "dense"]
    if not table_only:
        with progress() as report:
            for done, each in enumerate(asked):
                report("points", done, len(asked), f"{each['way']} {each['block']} {each['sparsity']:.0%}")
                if records.of(each) is None:
                    measure = reference if each["way"] == "dense" else point
                    try:
                        records.add(measure(job, work, each, limit, report))
                    except ValueError as error:
                        console.print(f"{each['way']} {each['block']} {each['sparsity']:.0%}: {error}")
    console.print(show(records, asked))


if __name__ == "__main__":
    typer.run(main)
