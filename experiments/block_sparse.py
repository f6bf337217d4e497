"""Block-sparse models: quality, time and file size over sparsity x block x way of pruning (after Narang et al. 2017).

    python experiments/block_sparse.py --text FOLDER --kind word --vocabulary 1000 --hidden 384 --hidden 384
    python experiments/block_sparse.py --text FOLDER --kind word --hidden 1350 --hidden 1350 --hidden 750 --larger 1.5
    python experiments/block_sparse.py --table

A dense model is trained once; it and all others are kept in --work. Every point goes on from it: `pruning` raises a
threshold under the blocks, `lasso` adds the group lasso; both end at the same share of blocks, and train on to the
end. Then, for each block and way, a network of --larger times the units is pruned to as many weights as the dense one
has. A point that has its line for the same job and device is skipped.
"""

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from models import SECONDS, Job, figures, kept, side_by_side
from records import Records
from rich.console import Console
from rich.table import Table

from eventrnn.cli.terminal import progress
from eventrnn.network import Network
from eventrnn.pruning import Blocks, Combined, GroupLasso, Pruning, ThresholdPruning, after_training

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


def made(job: Job, work: Path, asked: dict, report=lambda *stage: None) -> tuple[Network, float]:
    """The pruned network of a point, and the seconds of a training step; kept in the folder."""
    wide = widened(job, asked)
    dense, _ = wide.dense(work, asked["steps"], report)

    def make() -> tuple[Network, float]:
        if asked["way"] == "dense":
            trained, _, seconds = wide.train(dense, asked["tuning"], report)
            return trained, seconds
        block = tuple(int(size) for size in asked["block"].split("x"))
        sparsity = share(job, asked)
        rule = schedule(asked["way"], block, sparsity, asked["tuning"], asked["strength"])
        trained, masks, seconds = wide.train(dense, asked["tuning"], report, rule)
        return after_training(trained, dense, masks, Blocks(sparsity, block)), seconds

    name = "-".join(str(asked[key]) for key in KEY if key != "job")
    return kept(work / f"{name}-{job.name()}.safetensors", make)


def widened(job: Job, asked: dict) -> Job:
    """The job of a network so many times larger."""
    return replace(job, hidden=tuple(int(asked["larger"] * units) for units in job.hidden))


def share(job: Job, asked: dict) -> float:
    """Of the weights, what is pruned: as asked, or until a larger network has as many as the dense one."""
    if asked["larger"] == 1:
        return asked["sparsity"]
    sizes = [sum(w.nnz for w in each.untrained().matrices().values()) for each in (job, widened(job, asked))]
    return 1 - sizes[0] / sizes[1]


def point(job: Job, work: Path, asked: dict, limit: int | None, report) -> dict:
    """One line."""
    network, seconds = made(job, work, asked, report)
    line = asked | {"share": share(job, asked), SECONDS: seconds}
    return line | figures(network, job, limit)


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
    table = Table(*columns, title=f"on the test text; µs a step at batch 1, {records.device}")
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
    processes: Annotated[int, typer.Option(min=1, help="Train so many points side by side, then measure.")] = 1,
    work: Annotated[Path, typer.Option(help="Folder for models.")] = Path("eventrnn-blocks"),
    table_only: Annotated[bool, typer.Option("--table", help="Measure nothing: the last device's lines.")] = False,
    results: Annotated[Path, typer.Option(help="Lines are appended here.")] = RESULTS,
) -> None:
    """Measure what is missing, then show everything asked for."""
    job = Job(text, kind, vocabulary, tuple(hidden or (256, 256)), embedding, seed=seed)
    records, console = Records(results, KEY), Console(width=140)
    asked = points(steps, tuning, strength, larger, job)
    asked = [each for each in asked if only in ("", each["way"], each["block"]) or each["way"] == "dense"]
    if table_only:
        records.as_last()
    else:
        missing = [each for each in asked if records.of(each) is None]
        with progress() as report:
            if processes > 1:
                wide = {each["larger"]: (Job.dense, widened(job, each), work, steps) for each in missing}
                side_by_side(list(wide.values()), processes, report)
                side_by_side([(made, job, work, each) for each in missing], processes, report)
            for done, each in enumerate(asked):
                report("points", done, len(asked), f"{each['way']} {each['block']} {each['sparsity']:.0%}")
                if records.of(each) is None:
                    try:
                        records.add(point(job, work, each, limit, report))
                    except ValueError as error:
                        console.print(f"{each['way']} {each['block']} {each['sparsity']:.0%}: {error}")
    console.print(show(records, asked))


if __name__ == "__main__":
    typer.run(main)
