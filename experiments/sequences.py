"""Two tasks learned to known levels: the adding problem over 200 steps, and scikit-learn's digits read row by row.

    python experiments/sequences.py adding      # solved: mean squared error below 0.01; constant 1 has 0.167
    python experiments/sequences.py digits      # needs scikit-learn

Each task appends a line to results/sequences.jsonl. A run is kept in runs/, and a run that was stopped continues.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from command_line import command
from records import Records

from eventrnn import Cell, Network, State, Surrogate
from eventrnn.cli.terminal import as_line, progress
from eventrnn.training import (
    Batch,
    Classification,
    Model,
    Regularisers,
    Schedule,
    Settings,
    Task,
    Trainer,
    read_log,
    run,
    squared_error,
)

RESULTS = Path(__file__).parent / "results" / "sequences.jsonl"


class Adding(Task):
    """The adding problem (Hochreiter and Schmidhuber 1997): the target is the sum of the two marked numbers.

    The first input is a number drawn from [0, 1) at every step. The second is 1 at one step of each half of the
    sequence, which marks the number, and 0 elsewhere. No sequence occurs twice.
    """

    def __init__(self, steps: int, *, seed: int = 0):
        self.steps, self.seed = steps, seed

    def check(self, network: Network, batch: int, window: int) -> None:
        if network.layers[0].inputs != 2 or network.readout is None or network.readout.weights.shape[1] != 1:
            raise ValueError("network: adding takes 2 inputs and needs a read-out of 1")

    def length(self, batch: int) -> int:
        return 1000

    def batch(self, at: int, epoch: int, batch: int, window: int) -> Batch:
        rng = np.random.default_rng([self.seed, epoch, at])
        inputs = np.zeros((self.steps, batch, 2), np.float32)
        inputs[:, :, 0] = rng.random((self.steps, batch))
        samples, half = np.arange(batch), self.steps // 2
        marked = np.stack([rng.integers(0, half, batch), rng.integers(half, self.steps, batch)])
        inputs[marked, samples, 1] = 1
        return Batch(inputs, inputs[marked, samples, 0].sum(axis=0)[:, None], taken=1)

    def loss(self, output: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        d_output = np.zeros_like(output)
        loss, d_output[-1] = squared_error(output[-1], batch.targets)
        return loss, d_output

    def evaluate(self, model: Model) -> dict[str, float]:
        # Training counts epochs from 0 and never reaches this one.
        held_out = self.batch(0, 2**32 - 1, 1000, 0)
        output, _, tape = model.forward(held_out.inputs, State.zeros(model.template, 1000))
        return {"loss": self.loss(output, held_out)[0], "activity": float(tape.activity)}

    def digest(self) -> str:
        return f"adding {self.steps} {self.seed}"


def remembering(network: Network, steps: int, rng: np.random.Generator) -> Network:
    """The network with keep gates whose initial time constants reach the length of the task.

    Source: chrono initialisation, Tallec and Ollivier 2018.
    """
    layer = network.layers[0]
    bias = layer.bias_in.copy()
    bias[: layer.units] = np.log(rng.uniform(1, steps - 1, layer.units))
    return replace(network, layers=(replace(layer, bias_in=bias), *network.layers[1:]))


def adding(hidden: int, steps: int, length: int) -> Trainer:
    rng = np.random.default_rng(0)
    network = Network.random([hidden], inputs=2, readout=1, threshold=0.1, rng=rng)
    settings = Settings(
        steps=steps,
        batch=50,
        learning_rate=2e-3,
        weight_decay=0.0,
        validate_every=100,
        schedule=Schedule("cosine", constant=0.6, final=0.02),
    )
    return Trainer(remembering(network, length, rng), Adding(length), settings)


def digits(hidden: int, steps: int) -> tuple[Trainer, tuple[np.ndarray, np.ndarray]]:
    """The trainer for scikit-learn's digits, and the images and labels of the test.

    An image is 8 steps of 8 pixels. 1,149 images are for training, 288 for validation and 360 for the test. The
    activity cost is the best of 0.2, 0.3 and 0.5 by the validation loss.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("digits: needs scikit-learn; pip install scikit-learn") from None
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    train, valid, test = np.split(order, [1149, 1437])
    cell = Cell(surrogate=Surrogate("triangle", 0.7, 1.0))
    network = Network.random([hidden], inputs=8, readout=10, threshold=0.3, cell=cell, rng=np.random.default_rng(1))
    settings = Settings(
        steps=steps,
        batch=64,
        learning_rate=5e-3,
        weight_decay=0.01,
        validate_every=100,
        activity_cost=0.3,
        regularisers=Regularisers(dropout_input=0.1, dropout_top=0.3),
    )
    task = Classification(images[train], labels[train], (images[valid], labels[valid]), read="mean")
    return Trainer(network, task, settings), (images[test], labels[test])


def main(
    task: Annotated[str, typer.Argument(help="Task: adding or digits.")],
    hidden: Annotated[int, typer.Option(help="Units of the layer. [64 for adding, 128 for digits]")] = 0,
    steps: Annotated[int, typer.Option(help="Parameter updates.")] = 3000,
    length: Annotated[int, typer.Option(help="Time steps of a sequence of the adding problem.")] = 200,
    runs: Annotated[Path, typer.Option(help="Folder in which runs are kept.")] = Path("runs"),
    results: Annotated[Path, typer.Option(help="File to which the line is appended.")] = RESULTS,
) -> None:
    """Train and test the network, and append a line."""
    if task not in ("adding", "digits"):
        raise ValueError(f"task: got {task!r}, need adding or digits")
    units = hidden or (64 if task == "adding" else 128)
    trainer, test = (adding(units, steps, length), None) if task == "adding" else digits(units, steps)
    folder = runs / f"{task}-{units}-{steps}" if task == "digits" else runs / f"{task}-{units}-{steps}-{length}"
    with progress() as bar:

        def report(p, seconds):
            bar(task, p.step, steps, f"loss {p.loss:.4f}, activity {p.activity:.1%}")

        seconds = run(trainer, folder, resume=True, report=report)
    network, lines = trainer.network(best=True), read_log(folder)
    figures = trainer.task.evaluate(Model(network))
    if test is not None:
        figures = type(trainer.task)(*test, test, read="mean").evaluate(Model(network))
    line = {
        "experiment": task,
        "hidden": units,
        "steps": trainer.steps_done,
        "seconds": seconds,
        **figures,
        "support": lines[-1]["support"],
        "curve": [
            [each["step"], each["validation"]["loss"], each["validation"]["activity"]]
            for each in lines
            if each["validation"]
        ],
    }
    if task == "adding":
        # The sum of two numbers from [0, 1) has variance 1/6, which is the error of a constant output of 1.
        line |= {"length": length, "share_of_blind_error": figures["loss"] * 6}
    Records(results, ()).add(line)
    print(as_line({key: value for key, value in line.items() if key != "curve"}))


if __name__ == "__main__":
    command(main, __doc__).run()
