"""`eventrnn train`: turn options into settings of a recipe, and train the recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eventrnn.cells import CELLS
from eventrnn.cli.options import Distillation, Force, Json, Teacher, TopK, takes, writable_file, writable_folder
from eventrnn.cli.runs import RUN_FILES, continuing
from eventrnn.cli.terminal import progress, show

if TYPE_CHECKING:
    from eventrnn.training.recipes.recipe import Recipe


#: option -> setting of the recipe
FLAGS = {
    "text": "data.text",
    "kind": "data.kind",
    "vocabulary": "data.vocabulary",
    "hidden": "model.hidden",
    "embedding": "model.embedding",
    "tied": "model.tied",
    "cell": "model.cell",
    "variant": "model.variant",
    "threshold": "model.threshold",
    "steps": "training.steps",
    "epochs": "training.epochs",
    "batch": "training.batch",
    "window": "training.window",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "activity_cost": "training.activity_cost",
    "dropout": "training.regularisers.dropout_top",
    "threads": "training.threads",
    "backend": "training.backend",
    "devices": "training.devices",
    "precision": "training.precision",
    "seed": "training.seed",
    "teacher": "distillation.teacher",
    "distillation": "distillation.weight",
    "top_k": "distillation.top_k",
    "out": "run.out",
}


@dataclass(frozen=True)
class TrainOptions:
    """Options of `eventrnn train`. None: the option was not given, and the recipe decides."""

    out: Annotated[Path | None, typer.Option("--out", "-o", help="Model file to write.")] = None
    text: Annotated[
        str | None,
        typer.Option(
            help="Text: 'builtin' (Python's documentation), a file, a folder, a pipe, or ptb (Penn Treebank). [builtin]"
        ),
    ] = None
    preset: Annotated[
        str | None,
        typer.Option(
            help="Recipe to start from: characters, egru-ptb, egru-wt2, awd-egru-small, awd-gru. [characters]"
        ),
    ] = None
    config: Annotated[Path | None, typer.Option(help="TOML file with settings that replace those of the preset.")] = (
        None
    )
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set one setting of the recipe; repeat for more."),
    ] = None
    folder: Annotated[
        Path | None, typer.Option("--run", help="Folder for the log, the configuration and checkpoints. [OUT.run]")
    ] = None
    resume: Annotated[Path | None, typer.Option(help="Folder of a run to continue.")] = None
    split: Annotated[
        float | None,
        typer.Option(
            metavar="MB",
            help="Only write the checkpoint of the run --resume in parts of so many megabytes, to its folder `parts`. "
            "--resume continues a copy of that folder on another machine.",
        ),
    ] = None
    kind: Annotated[str | None, typer.Option(help="Kind of symbols: character or word.")] = None
    vocabulary: Annotated[
        int | None, typer.Option(help="Number of symbols to keep, of which one stands for all others. [all]")
    ] = None
    hidden: Annotated[list[int] | None, typer.Option(help="Number of units of a layer; repeat for a stack.")] = None
    embedding: Annotated[int | None, typer.Option(help="Number of values per symbol in the embedding.")] = None
    tied: Annotated[bool, typer.Option("--tied", help="Use the transposed embedding as the read-out.")] = False
    cell: Annotated[str | None, typer.Option(help=f"Cell of the layers: {', '.join(CELLS)}. [egru]")] = None
    variant: Annotated[
        str | None, typer.Option(help="Variant of the cell's equations: evnn or paper; of gru after or before.")
    ] = None
    threshold: Annotated[float | None, typer.Option(help="Mean of the initial thresholds.")] = None
    steps: Annotated[int | None, typer.Option(help="Number of parameter updates.")] = None
    epochs: Annotated[int | None, typer.Option(help="Number of passes over the text, in place of --steps.")] = None
    batch: Annotated[int | None, typer.Option(help="Number of parallel streams.")] = None
    window: Annotated[int | None, typer.Option(help="Number of time steps per window.")] = None
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate before the schedule changes it.")] = None
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay: decoupled with adamw, L2 with other optimisers.")
    ] = None
    activity_cost: Annotated[
        float | None, typer.Option(help="Weight of the mean output in the loss, which lowers activity.")
    ] = None
    dropout: Annotated[float | None, typer.Option(help="Dropout rate between layers and before the read-out.")] = None
    threads: Annotated[int | None, typer.Option(help="Number of threads of the training kernels.")] = None
    backend: Annotated[str | None, typer.Option(help="cpu, or cuda for NVIDIA GPUs. [cpu]")] = None
    devices: Annotated[
        int | None, typer.Option(help="Only with cuda: number of GPUs of this machine that share every batch. [1]")
    ] = None
    precision: Annotated[
        str | None, typer.Option(help="Only with cuda: factors of products in bfloat16, tf32 or float32. [bfloat16]")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of all random numbers.")] = None
    teacher: Teacher = None
    distillation: Distillation = None
    top_k: TopK = None
    force: Force = False
    as_json: Json = False


@takes(TrainOptions)
def train(given: TrainOptions) -> None:
    """Train a network to predict the next symbol of a text. Ctrl-C stops the training, and --resume continues it."""
    from eventrnn.training.recipes import recipe as recipes
    from eventrnn.training.recipes.toml_config import parse_setting

    if given.split is not None:
        _split(given, given.split)
        return
    settings = [*recipes.flags_to_settings(_flags(given)), *map(parse_setting, given.settings or [])]
    if given.resume is None:
        recipe = _merged(given.config, given, settings)
        folder = _new_run(recipe, given)
    else:
        folder = given.resume
        recipe = _resumed(folder, given, settings)
    with progress() as report, continuing("train", folder, given.resume is not None):
        figures = recipes.train(recipe, folder, resume=given.resume is not None, overwrite=given.force, report=report)
    show(f"wrote {recipe.run.out or folder}", figures, given.as_json)


def _split(given: TrainOptions, megabytes: float) -> None:
    """Write the checkpoint of a run in parts."""
    from eventrnn.training.recipes.run_folder import split_run

    others = replace(given, resume=None, split=None, as_json=False)
    if given.resume is None or others != TrainOptions():
        raise ValueError("split: only writes the checkpoint of a run in parts; give --resume and the folder of the run")
    figures = split_run(given.resume, megabytes)
    show(f"wrote {figures['folder']}", figures, given.as_json)


def _flags(given: TrainOptions) -> dict[str, Any]:
    """Settings of the recipe by name; None where the option was not given."""
    from eventrnn.data.text import located

    flags = {setting: getattr(given, option) for option, setting in FLAGS.items()}
    # --steps replaces the epochs of a preset.
    epochs = given.epochs if given.steps is None else given.epochs or 0
    return flags | {
        "data.text": given.text if given.text in (None, "builtin") else str(located(given.text).absolute()),
        "model.tied": given.tied or None,
        "distillation.teacher": _absolute_path(given.teacher),
        "training.epochs": epochs,
        "run.out": str(given.out.absolute()) if given.out else None,
    }


def _absolute_path(model: str | None) -> str | None:
    """The model as it is given, or its absolute path where it is the path of a file that exists."""
    return str(Path(model).absolute()) if model and Path(model).exists() else model


def _new_run(recipe: Recipe, given: TrainOptions) -> Path:
    """The folder of a new run, checked. `recipe.train` checks the rest before it writes."""
    folder = given.folder
    if not recipe.run.out and recipe.model.equations().thresholded:
        raise ValueError("out: give --out a model file to write")
    if not recipe.run.out and folder is None:
        raise ValueError(
            f"out: give --out a model file to write, or --run a folder for a {recipe.model.cell} without a model file"
        )
    folder = folder or Path(f"{recipe.run.out}.run")
    if recipe.run.out:
        writable_file(Path(recipe.run.out), given.force)
    writable_folder(folder, RUN_FILES, given.force, "run")
    return folder


def _resumed(folder: Path, given: TrainOptions, settings: list[tuple[str, Any]]) -> Recipe:
    """The recipe of the run in the folder, with what was given besides."""
    from eventrnn.training.recipes.run_folder import CONFIG, holds_fine_tuning

    if given.folder or given.config or given.preset is not None or (given.force and given.out is None):
        raise ValueError("resume: continues the run unchanged; leave out --run, --config, --preset and --force")
    config = folder / CONFIG
    if not config.exists():
        raise ValueError(f"resume: {folder} holds no run: it has no {CONFIG}")
    if holds_fine_tuning(folder):
        raise ValueError(
            f"resume: {folder} holds a fine-tuning; continue it with: eventrnn fine-tune --resume {folder}"
        )
    recipe = _merged(config, given, settings)
    if recipe.run.out:
        # Whether an existing file may be replaced depends on its content, which `recipe.train` knows.
        writable_file(Path(recipe.run.out), force=True)
    return recipe


def _merged(config: Path | None, given: TrainOptions, settings: list[tuple[str, Any]]) -> Recipe:
    """The recipe of the preset, the file and the settings, in this order.

    In a network of several layers `--dropout` also sets the dropout between layers, unless a setting says otherwise.
    """
    from eventrnn.training.recipes.recipe import load_recipe

    preset = given.preset or "characters"
    recipe = load_recipe(config, preset=preset, settings=settings)
    if given.dropout is not None and len(recipe.model.hidden) > 1:
        between = ("training.regularisers.dropout_between", given.dropout)
        recipe = load_recipe(config, preset=preset, settings=[between, *settings])
    if given.steps is not None and recipe.training.epochs:
        raise ValueError(f"steps: got {given.steps} and {recipe.training.epochs} epochs; give one of them")
    return recipe
