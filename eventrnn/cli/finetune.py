"""The command `fine-tune`: from a trained GRU to an EGRU of a wanted activity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eventrnn.cli.imports import own_model
from eventrnn.cli.options import (
    Force,
    GivenModel,
    Json,
    NamedModel,
    VocabularyOption,
    model_file,
    takes,
    writable_file,
    writable_folder,
)
from eventrnn.cli.runs import RUN_FILES, continuing
from eventrnn.cli.terminal import progress, show

if TYPE_CHECKING:
    from eventrnn.training.recipes.fine_tuning import FineTuneRecipe

#: options that are settings of `TaskRecipe`, and those of `Tuning`
TASK = ("data", "read", "text", "vocabulary")
TUNING = ("activity", "epochs", "batch", "window", "learning_rate", "seed", "threads")

#: options that a run may be continued with
CONTINUED = ("data", "text", "threads")


@dataclass(frozen=True)
class FineTuneOptions:
    """Options of `eventrnn fine-tune`. None: the option was not given."""

    model: GivenModel = None
    named: NamedModel = None
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Model file to write.")] = None
    activity: Annotated[
        float | None, typer.Option(help="Wanted share of units that send an event in a step. [0.1]")
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.npz|bars|chirps",
            help="Sequences of the task: a file with inputs (samples, steps, size) and labels (samples,) or targets "
            "(samples, outputs), or a synthetic set that the library draws.",
        ),
    ] = None
    text: Annotated[
        str | None, typer.Option(help="In place of --data: text to read, for a model of symbols; as for train.")
    ] = None
    vocabulary: VocabularyOption = None
    read: Annotated[
        str | None,
        typer.Option(help="Of --data: the output that counts, of the last step or the mean: last, mean. [last]"),
    ] = None
    epochs: Annotated[int | None, typer.Option(help="Number of passes over the data. [10]")] = None
    batch: Annotated[
        int | None, typer.Option(help="Number of sequences, or of streams of a text, per update. [32]")
    ] = None
    window: Annotated[int | None, typer.Option(help="Of --text: time steps per window. [64]")] = None
    learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate of the first half of the epochs. [0.003]")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers. [0]")] = None
    threads: Annotated[int | None, typer.Option(help="Number of threads of the training kernels. [1]")] = None
    folder: Annotated[
        Path | None, typer.Option("--run", help="Folder for the log, the configuration and checkpoints. [OUT.run]")
    ] = None
    resume: Annotated[Path | None, typer.Option(help="Folder of a run to continue.")] = None
    force: Force = False
    as_json: Json = False

    def some(self, *names: str) -> dict[str, Any]:
        """Those of the named options that were given."""
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


@takes(FineTuneOptions)
def fine_tune(given: FineTuneOptions) -> None:
    """Make an EGRU of a trained GRU, and train it on its task until it has a wanted activity.

    The model is a file of this library; `eventrnn import` writes it of a GRU of another one. Weights are kept, units
    get thresholds, and training makes up for the values that are no longer sent. Ctrl-C stops, and --resume continues.
    """
    from eventrnn.training.recipes.fine_tuning import fine_tune_in

    resumed = given.resume is not None
    recipe, folder = _resumed(given.resume, given) if given.resume is not None else _new(given)
    with progress() as report, continuing("fine-tune", folder, resumed):
        figures = fine_tune_in(recipe, folder, resume=resumed, overwrite=given.force, report=report)
    out = Path(recipe.run.out)
    if given.as_json:
        show(f"wrote {out}", figures | {"bytes": out.stat().st_size}, True)
        return
    _table({name: figures[name] for name in ("given", "start", "tuned")}, out)


def _new(given: FineTuneOptions) -> tuple[FineTuneRecipe, Path]:
    """The recipe of a new run and its folder, checked. `fine_tune_in` checks the rest before it writes."""
    from eventrnn.training.finetune import Tuning
    from eventrnn.training.recipes.fine_tuning import FineTuneRecipe, TaskRecipe
    from eventrnn.training.recipes.run_folder import RunSettings

    if given.out is None:
        raise ValueError("out: give --out a model file to write")
    task = TaskRecipe(model="", **given.some(*TASK))
    tuning = Tuning(**given.some(*TUNING))
    folder = given.folder or Path(f"{given.out}.run")
    writable_file(given.out, given.force)
    writable_folder(folder, RUN_FILES, given.force, "run")
    path = model_file(given.model, given.named)
    own_model(path)
    task = replace(task, model=str(path.absolute()), **_located(given))
    return FineTuneRecipe(task, tuning, RunSettings(out=str(given.out.absolute()))), folder


def _resumed(folder: Path, given: FineTuneOptions) -> tuple[FineTuneRecipe, Path]:
    """The recipe of the run in the folder, with what was given besides."""
    from eventrnn.training.recipes.fine_tuning import load_fine_tuning

    others = given.some("model", "named", "folder", *(n for n in (*TASK, *TUNING) if n not in CONTINUED))
    if others or (given.force and given.out is None):
        names = {"named": "--model", "model": "MODEL", "folder": "--run"}
        first = next(iter(others), "force")
        raise ValueError(
            f"resume: continues the run unchanged; leave out {names.get(first, '--' + first.replace('_', '-'))}"
        )
    recipe = load_fine_tuning(folder)
    task, tuning = replace(recipe.task, **_located(given)), replace(recipe.tuning, **given.some("threads"))
    out = recipe.run.out if given.out is None else str(given.out.absolute())
    # Whether an existing file may be replaced depends on its content, which `fine_tune_in` knows.
    writable_file(Path(out), force=True)
    return replace(recipe, task=task, tuning=tuning, run=replace(recipe.run, out=out)), folder


def _located(given: FineTuneOptions) -> dict[str, str]:
    """The paths of the data, the text and the vocabulary that were given, as they are found from every folder."""
    from eventrnn import io
    from eventrnn.data.text import located
    from eventrnn.training.recipes.fine_tuning import SYNTHETIC

    found = given.some("data", "text", "vocabulary")
    if "data" in found and found["data"] not in SYNTHETIC:
        found["data"] = str(Path(found["data"]).absolute())
    if "text" in found and found["text"] != "builtin":
        found["text"] = str(located(found["text"]).absolute())
    if "vocabulary" in found and found["vocabulary"] not in io.OWN_VOCABULARIES:
        found["vocabulary"] = str(Path(found["vocabulary"]).absolute())
    return found


def _table(figures: Mapping[str, Mapping[str, float]], out: Path) -> None:
    """One row per figure, one column per network."""
    from rich.table import Table

    from eventrnn._files import printable
    from eventrnn.cli.terminal import console

    words = {"given": "as given", "start": "as an EGRU", "tuned": "fine-tuned"}
    table = Table("", *words.values(), title=printable(f"wrote {out}"))
    for name in figures["tuned"]:
        form = ",.0f" if name.endswith("_per_step") else ".4g"
        table.add_row(name.replace("_", " "), *(f"{figures[each][name]:{form}}" for each in words))
    console().print(table)
