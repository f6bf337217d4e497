"""Time training on a GPU: one layer beside cuDNN, and whole updates of the recipe `egru-ptb`; a line per case.

    python experiments/gpu_training.py

A layer's line is the output of `eventrnn bench training --backend cuda --json`. A line of the recipe is the median of
whole updates (noise, forward, loss, backward, clipping, AdamW) of its network, batch and window, on random symbols: by
the GPU's clock, and by the wall clock, which includes the batch and the figures. Needs a GPU, and torch with CUDA.
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
from eventrnn.network import Network
from eventrnn.training import LanguageModelling, Optimiser, Regularisers, Settings, Trainer

RESULTS = Path(__file__).parent / "results" / "cuda_training.jsonl"
KEY = ("commit", "what", "hidden", "batch", "precision")
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


def main(
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


if __name__ == "__main__":
    typer.run(main)
