"""N:M masks: dense, 2:4, 4:8 and transposable 4:8, trained with dynamic masks or converted by AdaPrune.

    python experiments/nm_masks.py --text FOLDER --kind word --vocabulary 1000
    python experiments/nm_masks.py --table

All are trained from the same start for as many steps; `dynamic` recomputes its masks while training, `adaprune`
refits the trained dense model on a part of the validation text, `magnitude` only masks it. A line has the quality on
the test text, and measured times: of a training step, of the conversion, of an inference step beside the dense twin.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from models import SECONDS, Job, figures, kept, side_by_side
from records import Records
from rich.console import Console
from rich.table import Table

from eventrnn.cli.terminal import progress
from eventrnn.network import Network
from eventrnn.pruning import DynamicMasks, NofM, adaprune, after_training, prune_to

RESULTS = Path(__file__).parent / "results" / "nm_masks.jsonl"
PATTERNS = {"2:4": NofM(2, 4), "4:8": NofM(4, 8), "4:8 both": NofM(4, 8, "both")}
WAYS = ("dynamic", "adaprune", "magnitude")
KEY = ("job", "steps", "every", "way", "nm")
# Masks are final after this share of the steps.
SETTLED = 0.8
# Steps and streams of the validation text that matrices are refitted on.
CALIBRATION = (500, 8)


def made(job: Job, work: Path, asked: dict, report=lambda *stage: None) -> tuple[Network, float]:
    """The network that was trained with dynamic masks, and the seconds of a training step; kept in the folder."""
    pattern, steps = PATTERNS[asked["nm"]], asked["steps"]

    def make() -> tuple[Network, float]:
        rule = DynamicMasks(pattern, 0, max(1, int(SETTLED * steps)), every=asked["every"])
        start = job.untrained()
        trained, masks, seconds = job.train(start, steps, report, rule)
        return after_training(trained, start, masks, pattern), seconds

    name = f"{asked['way']}-{asked['nm'].replace(':', '_')}-{steps}-{asked['every']}-{job.name()}"
    return kept(work / f"{name}.safetensors", make)


def point(job: Job, work: Path, asked: dict, limit: int | None, report) -> dict:
    """One line."""
    if asked["way"] == "dynamic":
        network, seconds = made(job, work, asked, report)
        return asked | {SECONDS: seconds} | figures(network, job, limit)
    dense, seconds = job.dense(work, asked["steps"], report)
    if asked["way"] == "dense":
        return asked | {SECONDS: seconds} | figures(dense, job, limit)
    streams, length = CALIBRATION[1], min(CALIBRATION[0], len(job.corpus.valid) // CALIBRATION[1])
    calibration = np.ascontiguousarray(job.corpus.valid[: streams * length].reshape(streams, length).T)
    pattern, started = PATTERNS[asked["nm"]], time.perf_counter()
    if asked["way"] == "adaprune":
        converted, fits = adaprune(dense, calibration, pattern)
        errors = {name: [fit.masked, fit.refitted] for name, fit in fits.items()}
    else:
        converted, errors = prune_to(dense, pattern), None
    seconds = time.perf_counter() - started
    return asked | {"convert_seconds": seconds, "errors": errors} | figures(converted, job, limit)


def show(records: Records, asked: list[dict]) -> Table:
    """A line a point."""
    columns = ("way", "n:m", "perplexity", "bits", "activity", "file", "train ms", "convert s", "µs", "dense µs")
    table = Table(*columns, title=f"on the test text; µs of an inference step at batch 1, {records.device}")
    for each in asked:
        line = records.of(each)
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


def main(
    text: Annotated[str, typer.Option(help="'builtin', a text file, or a folder of text files.")] = "builtin",
    kind: Annotated[str, typer.Option(help="character or word.")] = "character",
    vocabulary: Annotated[int | None, typer.Option(help="Keep this many words.")] = None,
    hidden: Annotated[list[int] | None, typer.Option(help="Units of a layer; repeat. [256 256]")] = None,
    embedding: Annotated[int, typer.Option(help="Width of the embedding.")] = 32,
    steps: Annotated[int, typer.Option(help="Updates.")] = 1000,
    every: Annotated[int, typer.Option(help="Steps between two changes of dynamic masks.")] = 40,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Read at most this much of the test text.")] = 20_000,
    processes: Annotated[int, typer.Option(min=1, help="Train so many models side by side, then measure.")] = 1,
    work: Annotated[Path, typer.Option(help="Folder for models.")] = Path("eventrnn-nm"),
    table_only: Annotated[bool, typer.Option("--table", help="Measure nothing: the last device's lines.")] = False,
    results: Annotated[Path, typer.Option(help="Lines are appended here.")] = RESULTS,
) -> None:
    """Measure what is missing, then show everything asked for."""
    job = Job(text, kind, vocabulary, tuple(hidden or (256, 256)), embedding, seed=seed)
    records, console = Records(results, KEY), Console(width=130)
    common = {"job": job.name(), "steps": steps, "every": every}
    asked = [common | {"way": "dense", "nm": ""}]
    asked += [common | {"way": way, "nm": nm} for way in WAYS for nm in PATTERNS]
    if table_only:
        records.as_last()
    else:
        missing = [each for each in asked if records.of(each) is None]
        with progress() as report:
            if processes > 1:
                dynamic = [(made, job, work, each) for each in missing if each["way"] == "dynamic"]
                side_by_side([(Job.dense, job, work, steps), *dynamic], processes, report)
            for done, each in enumerate(asked):
                report("points", done, len(asked), f"{each['way']} {each['nm']}")
                if records.of(each) is None:
                    records.add(point(job, work, each, limit, report))
    console.print(show(records, asked))


if __name__ == "__main__":
    typer.run(main)
