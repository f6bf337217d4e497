"""`eventrnn train`: flags into a recipe, and the recipe into a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eventrnn.cli.options import Force, Json, writable_file, writable_folder
from eventrnn.cli.terminal import progress, show

if TYPE_CHECKING:
    from eventrnn.training.recipes.recipe import Recipe


RUN_FILES = ("config.toml", "log.jsonl", "checkpoint.safetensors")


def train(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Model file to write.")] = None,
    text: Annotated[
        str | None,
        typer.Option(help="'builtin' (Python's documentation), a file, a folder, or ptb. [builtin]"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Recipe to start from: characters, egru-ptb, egru-wt2, awd-egru-small, awd-gru. [characters]"
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file of a recipe, over the preset.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of a recipe; repeat for more.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--run", help="Folder of log, configuration and checkpoints. [OUT.run]")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Folder of a run to go on with.")] = None,
    kind: Annotated[str | None, typer.Option(help="Symbols: character or word.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Keep this many words (word kind only).")] = None,
    hidden: Annotated[list[int] | None, typer.Option(help="Units of a layer; repeat for a stack.")] = None,
    embedding: Annotated[int | None, typer.Option(help="Width of the embedding.")] = None,
    tied: Annotated[bool, typer.Option("--tied", help="Read out through the transposed embedding.")] = False,
    variant: Annotated[str | None, typer.Option(help="Equations: evnn or paper.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Mean of the initial thresholds.")] = None,
    steps: Annotated[int | None, typer.Option(help="Parameter updates.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the text, in place of --steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Streams side by side.")] = None,
    window: Annotated[int | None, typer.Option(help="Time steps a window.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Before its schedule.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Decoupled, or L2 if the optimiser is not adamw.")] = None,
    activity_cost: Annotated[float | None, typer.Option(help="Weight of the mean output in the loss.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Between layers and before the read-out.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the training kernels.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a network to predict the next symbol of a text; stop with Ctrl-C, go on with --resume."""
    from eventrnn.data.text import located
    from eventrnn.training.recipes import recipe as recipes
    from eventrnn.training.recipes.toml_config import parse_setting

    flags = {
        "data.text": text if text in (None, "builtin") else str(located(text).absolute()),
        "data.kind": kind,
        "data.vocabulary": vocabulary,
        "model.hidden": hidden,
        "model.embedding": embedding,
        "model.tied": tied or None,
        "model.variant": variant,
        "model.threshold": threshold,
        "training.steps": steps,
        "training.epochs": epochs if steps is None else epochs or 0,
        "training.batch": batch,
        "training.window": window,
        "training.learning_rate": learning_rate,
        "training.weight_decay": weight_decay,
        "training.activity_cost": activity_cost,
        "training.regularisers.dropout_top": dropout,
        "training.threads": threads,
        "training.seed": seed,
        "run.out": str(out.absolute()) if out else None,
    }
    given = [*recipes.flags_to_settings(flags), *map(parse_setting, settings or [])]
    if resume is not None:
        if folder is not None or config is not None or preset is not None or (force and out is None):
            raise ValueError("resume: goes on with the run as it is; leave out --run, --config, --preset and --force")
        if not (resume / recipes.CONFIG).exists():
            raise ValueError(f"resume: {resume} holds no run: it has no {recipes.CONFIG}")
        config = resume / recipes.CONFIG
    recipe = _merged(config, preset or "characters", given, dropout)
    if steps is not None and recipe.training.epochs:
        raise ValueError(f"steps: got {steps} and {recipe.training.epochs} epochs; give one of them")
    if resume is not None:
        folder = resume
        if recipe.run.out:
            own = Path(recipes.load_recipe(config).run.out).resolve() == Path(recipe.run.out).resolve()
            writable_file(Path(recipe.run.out), force or own)
    else:
        if recipe.model.cell == "gru" and folder is None:
            raise ValueError("run: a gru leaves no model file but its run; give --run a folder")
        if recipe.model.cell != "gru" and not recipe.run.out:
            raise ValueError("out: give --out a model file to write")
        folder = folder or Path(f"{recipe.run.out}.run")
        if recipe.run.out:
            writable_file(Path(recipe.run.out), force)
        writable_folder(folder, RUN_FILES, force)
        recipe.trainer()
        recipes.remove_run(folder)
    with progress() as report:
        try:
            figures = recipes.train(recipe, folder, resume=resume is not None, report=report)
        except KeyboardInterrupt as stop:
            # Click would turn the interrupt into one without words.
            words = str(stop) or f"stopped at once; the last checkpoint is in {folder}"
            print(f"eventrnn: {words}; go on with: eventrnn train --resume {folder}", file=sys.stderr)
            raise typer.Exit(130) from None
    show(f"wrote {recipe.run.out or folder}", figures, as_json)


def _merged(config: Path | None, preset: str, given: list[tuple[str, Any]], dropout: float | None) -> Recipe:
    """The recipe; `dropout` is that between layers, too, where it has more than one and nothing else was given."""
    from eventrnn.training.recipes.recipe import load_recipe

    recipe = load_recipe(config, preset=preset, settings=given)
    if dropout is not None and len(recipe.model.hidden) > 1:
        between = ("training.regularisers.dropout_between", dropout)
        recipe = load_recipe(config, preset=preset, settings=[between, *given])
    return recipe
