"""N:M masks: dense, 2:4, 4:8 and transposable 4:8, trained with dynamic masks or converted by AdaPrune.

    python experiments/nm_masks.py --text FOLDER --kind word --vocabulary 1000
    python experiments/nm_masks.py --table

All models start from the same parameters and are trained for as many steps. Method `dynamic` recomputes its masks
during training, `adaprune` refits the trained dense model on a part of the validation text, and `magnitude` masks it
without training. A line of results holds the point (its method in the field `way`), the quality on the test text, and
the times of a training step, of the conversion, and of an inference step beside the dense network's.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from models import SECONDS, Job, PruningOptions, figures, load_or_train, measure_missing
from records import Records
from rich.console import Console
from rich.table import Table

from eventrnn.cli.options import takes
from eventrnn.network import Network
from eventrnn.pruning import DynamicMasks, NofM, adaprune, after_training, prune_to

RESULTS = Path(__file__).parent / "results" / "nm_masks.jsonl"
PATTERNS = {"2:4": NofM(2, 4), "4:8": NofM(4, 8), "4:8 both": NofM(4, 8, "both")}
METHODS = ("dynamic", "adaprune", "magnitude")
KEY = ("job", "steps", "every", "way", "nm")

# Share of the updates after which dynamic masks are final.
SETTLED = 0.8

# Steps and streams of the validation text on which matrices are refitted.
CALIBRATION = (500, 8)


def dynamic_network(job: Job, work: Path, point: dict, report=lambda *stage: None) -> tuple[Network, float]:
    """The network trained with dynamic masks, and the seconds per training step. Its file in `work` is reused."""
    pattern, steps = PATTERNS[point["nm"]], point["steps"]

    def train() -> tuple[Network, float]:
        rule = DynamicMasks(pattern, 0, max(1, int(SETTLED * steps)), every=point["every"])
        start = job.untrained()
        trained, masks, seconds = job.train(start, steps, report, rule)
        return after_training(trained, start, masks, pattern), seconds

    name = f"{point['way']}-{point['nm'].replace(':', '_')}-{steps}-{point['every']}-{job.name()}"
    return load_or_train(work / f"{name}.safetensors", train)


def measure(job: Job, work: Path, point: dict, limit: int | None, report) -> dict:
    """The line of a point."""
    if point["way"] == "dynamic":
        network, seconds = dynamic_network(job, work, point, report)
        return point | {SECONDS: seconds} | figures(network, job, limit)
    dense, seconds = job.dense(work, point["steps"], report)
    if point["way"] == "dense":
        return point | {SECONDS: seconds} | figures(dense, job, limit)
    streams, length = CALIBRATION[1], min(CALIBRATION[0], len(job.corpus.valid) // CALIBRATION[1])
    calibration = np.ascontiguousarray(job.corpus.valid[: streams * length].reshape(streams, length).T)
    pattern, started = PATTERNS[point["nm"]], time.perf_counter()
    if point["way"] == "adaprune":
        converted, fits = adaprune(dense, calibration, pattern)
        errors = {name: [fit.masked, fit.refitted] for name, fit in fits.items()}
    else:
        converted, errors = prune_to(dense, pattern), None
    seconds = time.perf_counter() - started
    return point | {"convert_seconds": seconds, "errors": errors} | figures(converted, job, limit)


def show(records: Records, points: list[dict]) -> Table:
    """One row per point."""
    columns = ("method", "n:m", "perplexity", "bits", "activity", "file", "train ms", "convert s", "µs", "dense µs")
    table = Table(*columns, title=f"on the test text; µs per inference step at batch 1, {records.device}")
    for point in points:
        line = records.of(point)
        if line is None:
            continue
        train, convert = line.get(SECONDS), line.get("convert_seconds")
        table.add_row(
            *(line["way"], line["nm"], f"{line['perplexity']:.2f}", f"{line['bits']:.3f}", f"{line['activity']:.1%}"),
            f"{line['file_bytes']:,}",
            "" if train is None else f"{1e3 * train:.1f}",
            "" if convert is None else f"{convert:.2f}",
            *(f"{line['us_per_step']:.1f}", f"{line['dense_us_per_step']:.1f}"),
        )
    return table


@dataclass(frozen=True)
class Options(PruningOptions):
    """Options of the command line."""

    steps: Annotated[int, typer.Option(help="Updates of every model that is trained.")] = 1000
    work: Annotated[Path, typer.Option(help="Folder in which models are kept.")] = Path("eventrnn-nm")
    results: Annotated[Path, typer.Option(help="File to which a line per point is appended.")] = RESULTS
    every: Annotated[int, typer.Option(help="Updates between two changes of dynamic masks.")] = 40


@takes(Options)
def main(options: Options) -> None:
    """Measure the points that have no line, then show all of them. Exit code 1 if a point could not be measured."""
    job, work = options.job(), options.work
    records = Records(options.results, KEY)
    common = {"job": job.name(), "steps": options.steps, "every": options.every}
    points = [common | {"way": "dense", "nm": ""}]
    points += [common | {"way": method, "nm": nm} for method in METHODS for nm in PATTERNS]

    def train_tasks(missing: list[dict]) -> list[list[tuple]]:
        dynamic = [(dynamic_network, job, work, point) for point in missing if point["way"] == "dynamic"]
        return [[(Job.dense, job, work, options.steps), *dynamic]]

    def line_of(point: dict, report) -> dict:
        return measure(job, work, point, options.limit, report)

    try:
        if options.table_only:
            records.as_last()
        else:
            measure_missing(records, points, line_of, train_tasks, options.processes)
    finally:
        Console(width=130).print(show(records, points))


if __name__ == "__main__":
    typer.run(main)
