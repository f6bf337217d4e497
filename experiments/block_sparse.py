"""Block-sparse models: quality, time and file size by sparsity, block and method (after Narang et al. 2017).

    python experiments/block_sparse.py --text FOLDER --kind word --vocabulary 1000 --hidden 384 --hidden 384
    python experiments/block_sparse.py --text FOLDER --kind word --hidden 1350 --hidden 1350 --hidden 750 --larger 1.5
    python experiments/block_sparse.py --table

A dense model is trained once, and every point continues its training. Method `pruning` prunes blocks below a rising
threshold; `lasso` adds the group lasso. Both reach the same share of blocks after SETTLED of the updates. Then, for
each block and method, a network with --larger times the units is pruned to the number of weights of the dense one.

A line of results holds the point (its method in the field `way`) and its figures. A point that has a line of this
device is not measured again. Trained models are kept in --work.
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from models import SECONDS, Job, PruningOptions, figures, load_or_train, measure_missing
from records import Records
from rich.console import Console
from rich.table import Table

from eventrnn.cli.options import takes
from eventrnn.network import Network
from eventrnn.pruning import Blocks, Combined, GroupLasso, Pruning, ThresholdPruning, after_training

RESULTS = Path(__file__).parent / "results" / "block_sparse.jsonl"
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
BLOCKS = ((1, 1), (1, 16), (4, 4), (16, 16), (32, 32))
METHODS = ("pruning", "lasso")
KEY = ("job", "steps", "tuning", "strength", "way", "block", "sparsity", "larger")

# Share of the updates after which the masks are final.
SETTLED = 0.4


def schedule(method: str, block: tuple[int, int], sparsity: float, steps: int, strength: float) -> Pruning:
    """The rule that prunes a share `sparsity` of the blocks within the first SETTLED of the steps."""
    end = max(2, int(steps * SETTLED))
    threshold = ThresholdPruning(block, 0, end // 2, end, every=max(1, end // 40), sparsity=sparsity)
    return threshold if method == "pruning" else Combined(GroupLasso(strength, block, 0, end), threshold)


def pruned_network(job: Job, work: Path, point: dict, report=lambda *stage: None) -> tuple[Network, float]:
    """The network of a point, and the seconds per training step. Its file in `work` is reused."""
    wide = widened(job, point["larger"])
    dense, _ = wide.dense(work, point["steps"], report)

    def train() -> tuple[Network, float]:
        if point["way"] == "dense":
            trained, _, seconds = wide.train(dense, point["tuning"], report)
            return trained, seconds
        block = tuple(int(size) for size in point["block"].split("x"))
        share = pruned_share(job, point)
        rule = schedule(point["way"], block, share, point["tuning"], point["strength"])
        trained, masks, seconds = wide.train(dense, point["tuning"], report, rule)
        return after_training(trained, dense, masks, Blocks(share, block)), seconds

    name = "-".join(str(point[key]) for key in KEY if key != "job")
    return load_or_train(work / f"{name}-{job.name()}.safetensors", train)


def widened(job: Job, larger: float) -> Job:
    """The job of a network with `larger` times the units."""
    return replace(job, hidden=tuple(int(larger * units) for units in job.hidden))


def pruned_share(job: Job, point: dict) -> float:
    """The share of weights to prune. A larger network is pruned to the number of weights of the dense one."""
    if point["larger"] == 1:
        return point["sparsity"]
    jobs = job, widened(job, point["larger"])
    small, large = (sum(w.nnz for w in each.untrained().matrices().values()) for each in jobs)
    return 1 - small / large


def measure(job: Job, work: Path, point: dict, limit: int | None, report) -> dict:
    """The line of a point."""
    network, seconds = pruned_network(job, work, point, report)
    line = point | {"share": pruned_share(job, point), SECONDS: seconds}
    return line | figures(network, job, limit)


def all_points(steps: int, tuning: int, strength: float, larger: float, job: Job) -> list[dict]:
    """The dense model, the grid, and the larger networks pruned to its size."""
    common = {"job": job.name(), "steps": steps, "tuning": tuning, "strength": strength}
    dense = {"way": "dense", "block": "", "sparsity": 0.0, "larger": 1.0}
    grid = [
        {"way": method, "block": f"{r}x{c}", "sparsity": sparsity, "larger": 1.0}
        for sparsity, (r, c), method in product(SPARSITIES, BLOCKS, METHODS)
    ]
    wide = [
        {"way": method, "block": f"{r}x{c}", "sparsity": 0.0, "larger": larger}
        for (r, c), method in product(BLOCKS, METHODS)
    ]
    return [common | point for point in (dense, *grid, *wide)]


def show(records: Records, points: list[dict]) -> Table:
    """One row per point: quality and cost beside the dense model's."""
    columns = ("method", "block", "pruned", "units", "perplexity", "weights", "file", "times smaller", "µs", "dense µs")
    table = Table(*columns, title=f"on the test text; µs per step at batch 1, {records.device}")
    dense = records.of(points[0])
    for point in points:
        line = records.of(point)
        if line is None or dense is None:
            continue
        smaller = dense["file_bytes"] / line["file_bytes"]
        table.add_row(
            *(line["way"], line["block"], f"{line['share']:.1%}", f"x{line['larger']:g}", f"{line['perplexity']:.2f}"),
            *(f"{line['weights']:,}", f"{line['file_bytes']:,}", f"{smaller:.2f}"),
            *(f"{line['us_per_step']:.1f}", f"{line['dense_us_per_step']:.1f}"),
        )
    return table


@dataclass(frozen=True)
class Options(PruningOptions):
    """Options of the command line."""

    steps: Annotated[int, typer.Option(help="Updates of the dense model.")] = 600
    work: Annotated[Path, typer.Option(help="Folder in which models are kept.")] = Path("eventrnn-blocks")
    results: Annotated[Path, typer.Option(help="File to which a line per point is appended.")] = RESULTS
    tuning: Annotated[int, typer.Option(help="Updates during and after pruning.")] = 600
    strength: Annotated[float, typer.Option(help="Strength of the group lasso.")] = 0.02
    larger: Annotated[float, typer.Option(help="Units of the larger networks, as a multiple of the dense ones.")] = 2.0
    only: Annotated[str, typer.Option(help="Measure the points of this method or block only.")] = ""


@takes(Options)
def main(options: Options) -> None:
    """Measure the points that have no line, then show all of them. Exit code 1 if a point could not be measured."""
    job, work = options.job(), options.work
    records = Records(options.results, KEY)
    points = [
        point
        for point in all_points(options.steps, options.tuning, options.strength, options.larger, job)
        if options.only in ("", point["way"], point["block"]) or point["way"] == "dense"
    ]

    def train_tasks(missing: list[dict]) -> list[list[tuple]]:
        sizes = dict.fromkeys(point["larger"] for point in missing)
        dense = [(Job.dense, widened(job, larger), work, options.steps) for larger in sizes]
        return [dense, [(pruned_network, job, work, point) for point in missing]]

    def line_of(point: dict, report) -> dict:
        return measure(job, work, point, options.limit, report)

    try:
        if options.table_only:
            records.as_last()
        else:
            measure_missing(records, points, line_of, train_tasks, options.processes)
    finally:
        Console(width=140).print(show(records, points))


if __name__ == "__main__":
    typer.run(main)
