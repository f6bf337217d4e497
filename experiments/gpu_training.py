"""Training on a GPU: its speed, and the learning curve of a run; a line per case.

    python experiments/gpu_training.py speed
    eventrnn train --preset egru-ptb --text ptb --backend cuda --out ptb.safetensors --epochs 40 \\
        --set training.schedule.kind=constant
    python experiments/gpu_training.py curve ptb.safetensors.run

Speed is that of one layer beside cuDNN, and of whole updates of the recipe `egru-ptb`. A layer's line is the output of
`eventrnn bench training --backend cuda --json`. A line of the recipe is the median of whole updates (noise, forward,
loss, backward, clipping, AdamW) of its network, batch and window, on random symbols: by the GPU's clock, and by the
wall clock, which includes the batch and the figures. Needs a GPU, and torch with CUDA.

A learning curve is read from the log of a run: perplexity and activity of its validations at some epochs.
"""

import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from records import Records

from eventrnn.bench import versions
from eventrnn.bench.gpu_training import training
from eventrnn.cells import Cell, Surrogate
from eventrnn.cli.terminal import as_line
from eventrnn.network import Network
from eventrnn.training import LanguageModelling, Optimiser, Regularisers, Settings, Trainer, read_log
from eventrnn.training.recipes.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "cuda_training.jsonl"
KEY = ("commit", "what", "hidden", "batch", "precision")

# Epochs of a learning curve that its line names.
MARKS = (1, 2, 3, 5, 10, 15, 20, 30, 40, 60, 80, 100, 116, 150, 200, 300, 400, 500, 600, 700, 800, 900, 1000)

app = typer.Typer(add_completion=False, rich_markup_mode=None, help=__doc__)

LAYERS = ((1350, 64, "bfloat16"), (1350, 128, "bfloat16"), (1350, 64, "tf32"), (512, 64, "bfloat16"))


def recipe(precision: str, updates: int) -> dict:
    """The figures of updates of the recipe `egru-ptb`, after warming up."""
    rng, words = np.random.default_rng(0), 10_000
    cell = Cell(surrogate=Surrogate("triangle", 3.6, 3.6))
    network = Network.random(
        [1350, 1350, 750], rng=rng, symbols=words, embedding=750, tied=True, threshold=0.01, cell=cell
    )
    rates = {
        "dropconnect": 0.7,
        "dropout_input": 0.6,
        "dropout_words": 0.1,
        "dropout_between": 0.25,
        "dropout_top": 0.5,
    }
    settings = Settings(
        steps=10_000,
        batch=64,
        window=70,
        learning_rate=1.2e-3,
        weight_decay=0.1,
        clip=0.1,
        clip_layers=0.1,
        thresholds="fixed",
        backend="cuda",
        precision=precision,
        optimiser=Optimiser(beta1=0.0, decay_biases=True),
        regularisers=Regularisers(**rates, mask_sharing="batch"),
    )
    trainer = Trainer(network, LanguageModelling(rng.integers(0, words, 64 * 3000)), settings)
    engine = trainer.engine
    for _ in range(5):
        trainer.step()
    wall = []
    for _ in range(updates):
        started = time.perf_counter()
        trainer.step()
        wall.append(time.perf_counter() - started)
    program = engine.program(settings.window, settings.batch)
    with engine.device.on_stream():
        gpu = [engine.device.seconds(program.whole) for _ in range(updates)]
    return {
        "what": "egru-ptb",
        "hidden": [1350, 1350, 750],
        "batch": settings.batch,
        "steps": settings.window,
        "precision": precision,
        "ms_per_iteration": float(np.median(wall)) * 1e3,
        "gpu_ms_per_iteration": float(np.median(gpu)) * 1e3,
        "gpu_bytes": engine.nbytes,
        "device": engine.device.name,
        "versions": versions(),
    }


@app.command()
def speed(
    repeats: Annotated[int, typer.Option(help="Rounds and updates; medians are reported.")] = 30,
    results: Annotated[Path, typer.Option(help="File to which a line per case is appended.")] = RESULTS,
) -> None:
    """Measure all cases."""
    records = Records(results, KEY)

    def add(line: dict) -> None:
        # The machine of these lines is the GPU.
        records.device = line["device"]
        records.add(line)

    for precision in ("bfloat16", "tf32"):
        add(recipe(precision, repeats))
    for hidden, batch, precision in LAYERS:
        case = {"hidden": hidden, "batch": batch, "precision": precision, "repeats": repeats}
        add({"what": "layer"} | training(**case, against="cudnn,evnn-style"))


@app.command()
def curve(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `eventrnn train`.")],
    name: Annotated[str, typer.Option(help="What distinguishes the run from its preset.")] = "",
    device: Annotated[str, typer.Option(help="Machine of the run. [the GPU here]")] = "",
    results: Annotated[Path, typer.Option(help="File to which the line is appended.")] = RESULTS,
) -> None:
    """Append the learning curve of a run: the first validation after each mark, under the epochs done by then."""
    recipe = load_recipe(run / "config.toml")
    validations = [line for line in read_log(run) if line["validation"]]
    found = {}
    for mark in MARKS:
        after = [line for line in validations if line["epoch"] >= mark]
        if after:
            found[f"{after[0]['share'] * recipe.training.epochs:.1f}"] = after[0]
    last, records = validations[-1], Records(results, KEY)
    if device:
        records.device = device
    elif recipe.training.backend == "cuda":
        from eventrnn.cuda.device import current_device

        records.device = current_device().name
    line = {
        "what": "learning",
        "name": name,
        "hidden": list(recipe.model.hidden),
        "batch": recipe.training.batch,
        "precision": recipe.training.precision or "bfloat16",
        "epochs": recipe.training.epochs,
        "seed": recipe.training.seed,
        "carry": recipe.data.carry,
        "valid_batch": recipe.data.valid_batch,
        "perplexity_valid": {epochs: each["validation"]["perplexity"] for epochs, each in found.items()},
        "activity_valid": {
            epochs: [each["validation"][f"layers.{k}.activity"] for k in range(len(recipe.model.hidden))]
            for epochs, each in found.items()
        },
        "best_perplexity_valid": min(each["validation"]["perplexity"] for each in validations),
        "epochs_done": last["epoch"],
        "seconds_per_epoch": last["seconds"] / last["epoch"],
    }
    print(as_line(records.add(line)))


if __name__ == "__main__":
    app()
