"""Training on a GPU: its speed, and the learning curve of a run; a line per case.

    python experiments/gpu_training.py speed
    eventrnn train --preset egru-ptb --text ptb --backend cuda --out ptb.safetensors --epochs 40 \\
        --set training.schedule.kind=constant
    python experiments/gpu_training.py curve ptb.safetensors.run
    python experiments/gpu_training.py devices

Speed is that of one layer beside cuDNN, and of whole updates of the recipe `egru-ptb`. A layer's line is the output of
`eventrnn bench training --backend cuda --json`. A line of the recipe is the median of whole updates (noise, forward,
loss, backward, clipping, AdamW) of its network, batch and window, on random symbols: by the GPU's clock, and by the
wall clock, which includes the batch and the figures. Needs a GPU, and torch with CUDA.

A learning curve is read from the log of a run: perplexity and activity of its validations at some epochs.

`devices` compares whole updates of the recipe on several GPUs with those on one, at the same batch per device and at
the same joined batch, in one process, round by round; and the parameters of two equal runs on several GPUs, bit by bit.
"""

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from command_line import commands
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

app = commands(__doc__)

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


def preset_trainer(batch: int, devices: int, precision: str, words: int = 10_000) -> Trainer:
    """The network of the preset `egru-ptb` and its settings, with windows of one length, on random symbols."""
    # The text is not read, but the preset needs one of words.
    chosen = load_recipe(preset="egru-ptb", settings=[("data.text", "ptb")])
    rng, model = np.random.default_rng(0), chosen.model
    network = Network.random(
        list(model.hidden),
        rng=rng,
        symbols=words,
        embedding=model.embedding,
        tied=model.tied,
        threshold=model.threshold,
        cell=model.equations(),
    )
    settings = replace(
        chosen.training, epochs=0, steps=10_000, window_jitter=0.0, batch=batch, devices=devices, backend="cuda"
    )
    text = rng.integers(0, words, batch * 3000)
    return Trainer(network, LanguageModelling(text), replace(settings, precision=precision))


def parameters_digest(trainer: Trainer) -> str:
    """SHA-256 of all arrays of a run."""
    total = hashlib.sha256()
    for name, array in sorted(trainer.arrays().items()):
        total.update(name.encode() + np.ascontiguousarray(array).data)
    return total.hexdigest()


@app.command()
def devices(
    number: Annotated[int, typer.Option(help="GPUs.")] = 2,
    batch: Annotated[int, typer.Option(help="Samples per GPU.")] = 128,
    precision: Annotated[str, typer.Option(help="Type of the factors of products.")] = "bfloat16",
    rounds: Annotated[int, typer.Option(help="Rounds, of which every trainer has one part.")] = 8,
    updates: Annotated[int, typer.Option(help="Updates of a part.")] = 10,
    results: Annotated[Path, typer.Option(help="File to which the line is appended.")] = RESULTS,
) -> None:
    """Updates on several GPUs beside those on one."""
    began = time.perf_counter()
    cases = {"one": (batch, 1), "several": (batch * number, number), "joined": (batch * number, 1)}
    trainers = {name: preset_trainer(*case, precision) for name, case in cases.items()}
    setup = time.perf_counter() - began
    wall: dict[str, list[float]] = {name: [] for name in trainers}
    for part in range(rounds + 1):
        for name, trainer in trainers.items():
            for _ in range(updates):
                started = time.perf_counter()
                trainer.step()
                if part:
                    # The first part compiles kernels and captures graphs.
                    wall[name].append(time.perf_counter() - started)
    digests = [parameters_digest(trainers.pop("several"))]
    again = preset_trainer(batch * number, number, precision)
    for _ in range((rounds + 1) * updates):
        again.step()
    digests.append(parameters_digest(again))
    ms = {name: float(np.median(times)) * 1e3 for name, times in wall.items()}
    records = Records(results, KEY)
    records.device = again.engine.device.name
    line = {
        "what": "devices",
        "hidden": [1350, 1350, 750],
        "batch": batch,
        "devices": number,
        "precision": precision,
        "ms_one_device": ms["one"],
        "ms_several_devices": ms["several"],
        "ms_joined_batch_on_one": ms["joined"],
        "speedup": number * ms["one"] / ms["several"],
        "speedup_of_joined_batch": ms["joined"] / ms["several"],
        "setup_seconds": setup,
        "updates": rounds * updates,
        "gpu_bytes_per_device": again.engine.nbytes,
        "same_bits": len(set(digests)) == 1,
        "sha256": digests[0],
    }
    print(as_line(records.add(line)))


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
    app.run()
