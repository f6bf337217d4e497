"""Event networks on recordings of events: classification from end to end, and a decoder that runs step by step.

    python experiments/events.py classify bars        # synthetic event camera, no download
    python experiments/events.py classify chirps      # synthetic cochlea, no download
    python experiments/events.py classify DIR         # SHD or SSC, the unpacked .h5 files; needs h5py
    python experiments/events.py decode               # synthetic neural recording: velocity of a hand from spikes

The parameters that are tested are those of the best validation; the test recordings are read once, at the end. Each
command appends a line to results/events.jsonl. A run is kept in runs/, and a run that was stopped continues.

To compare with on SHD and SSC: a plain GRU reaches 90.4 % and 79.05 % of the test recordings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from command_line import commands
from records import Records
from scipy import linalg

import eventrnn as er
from eventrnn.cli.terminal import as_line, progress
from eventrnn.data import Recording, bin_events, chirps, moving_bars, padded_counts, read_heidelberg
from eventrnn.training import (
    Batch,
    Classification,
    Model,
    Regularisers,
    Schedule,
    Settings,
    Task,
    Trainer,
    run,
    squared_error,
)

RESULTS = Path(__file__).parent / "results" / "events.jsonl"

# Sizes of the synthetic sets: recordings to train on, to validate on, and to test on.
SIZES = (800, 200, 400)

# Names of the files of SHD and SSC by part; SHD has no validation file.
FILES = {"train": ("shd_train.h5", "ssc_train.h5"), "valid": ("ssc_valid.h5",), "test": ("shd_test.h5", "ssc_test.h5")}

# The share of SHD's training recordings that is held out for validation.
HELD_OUT = 0.1

# Recordings that are run together for the count of operations.
COUNTED = 64

app = commands(__doc__)

Runs = Annotated[Path, typer.Option(help="Folder in which runs are kept.")]
Results = Annotated[Path, typer.Option(help="File to which the line is appended.")]
Threads = Annotated[int, typer.Option(help="Threads.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the network, of the order of the data, and of synthetic data.")]


@dataclass(frozen=True)
class Part:
    """Labelled recordings: those to train on, to validate on, or to test on."""

    recordings: Sequence[Recording]
    labels: np.ndarray


def synthetic(data: str, seed: int) -> tuple[int, list[Part]]:
    """The window in microseconds and the three parts of a synthetic set. Each part has a seed of its own."""
    draw, window = (moving_bars, 4000) if data == "bars" else (chirps, 10_000)
    return window, [Part(*draw(n, seed=3 * seed + k)) for k, n in enumerate(SIZES)]


def heidelberg(folder: Path, seed: int, limit: int | None) -> tuple[int, list[Part]]:
    """The window and the three parts of SHD or SSC. Without a validation file a share of the training is held out."""
    found = {part: [folder / name for name in names if (folder / name).exists()] for part, names in FILES.items()}
    for part in ("train", "test"):
        if len(found[part]) != 1:
            raise ValueError(f"data: {folder} has {len(found[part])} of {', '.join(FILES[part])}, need one of them")
    parts = {part: Part(*read_heidelberg(files[0], limit=limit)) for part, files in found.items() if files}
    if "valid" not in parts:
        train = parts["train"]
        order = np.random.default_rng(seed).permutation(len(train.labels))
        held_out, kept = np.split(order, [max(1, round(HELD_OUT * len(order)))])
        for part, chosen in (("train", kept), ("valid", held_out)):
            parts[part] = Part([train.recordings[k] for k in chosen], train.labels[chosen])
    return 10_000, [parts[part] for part in ("train", "valid", "test")]


def operations(network: er.Network, recordings: Sequence[Recording], window: int) -> dict[str, float]:
    """Multiplications per step of the network on recordings that are not padded, and the events of the recordings."""
    effective = dense = steps = sent = 0
    for at in range(0, len(recordings), COUNTED):
        events, lengths = bin_events(recordings[at : at + COUNTED], window)
        total = er.count(network, er.simulate(network, events, lengths=lengths)).total
        effective, dense = effective + total.effective, dense + total.dense
        steps, sent = steps + int(lengths.sum()), sent + len(events)
    return {
        "steps_per_recording": steps / len(recordings),
        "input_activity": sent / (steps * recordings[0].size),
        "effective_per_step": effective / steps,
        "dense_per_step": dense / steps,
        "fewer": dense / effective,
    }


@app.command()
def classify(
    data: Annotated[str, typer.Argument(help="bars, chirps, or a folder with the .h5 files of SHD or SSC.")],
    hidden: Annotated[int, typer.Option(min=1, help="Units of the layer.")] = 128,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training recordings.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Recordings per update.")] = 50,
    window: Annotated[int, typer.Option(min=0, help="Microseconds per time step. [4000 for bars, else 10000]")] = 0,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 3e-3,
    activity_cost: Annotated[float, typer.Option(help="Weight of the mean output in the loss.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Of SHD and SSC: recordings of each file to read.")] = None,
    seed: Seed = 0,
    threads: Threads = 1,
    runs: Runs = Path("runs"),
    results: Results = RESULTS,
) -> None:
    """Train an EGRU to tell recordings apart, and test the parameters of the best validation."""
    known = data in ("bars", "chirps")
    if not known and not Path(data).is_dir():
        raise ValueError(f"data: got {data!r}, need bars, chirps, or a folder with the files of SHD or SSC")
    usual, (train, valid, test) = synthetic(data, seed) if known else heidelberg(Path(data), seed, limit)
    window, name = window or usual, data if known else Path(data).name
    inputs, lengths = padded_counts(train.recordings, window)
    held, held_lengths = padded_counts(valid.recordings, window)
    task = Classification(
        inputs, train.labels, (held, valid.labels, held_lengths), read="mean", lengths=lengths, seed=seed
    )
    network = er.Network.random(
        [hidden],
        inputs=train.recordings[0].size,
        # The first recordings of a file, which --limit takes, need not have every class.
        readout=1 + max(int(part.labels.max()) for part in (train, valid, test)),
        threshold=0.1,
        rng=np.random.default_rng(seed),
    )
    settings = Settings(
        epochs=epochs,
        batch=batch,
        learning_rate=rate,
        weight_decay=0.01,
        schedule=Schedule("cosine", constant=0.5, final=0.02),
        activity_cost=activity_cost,
        regularisers=Regularisers(dropout_top=0.2),
        seed=seed,
        threads=threads,
    )
    trainer = Trainer(network, task, settings)
    folder = runs / f"events-{name}-{hidden}-{epochs}-{window}-{activity_cost:g}-{seed}"
    seconds = trained(trainer, folder, name, "accuracy")
    network = trainer.network(best=True)
    counts, ends = padded_counts(test.recordings, window)
    tested = Classification(counts, test.labels, (counts, test.labels, ends), read="mean", lengths=ends).evaluate(
        Model(network)
    )
    line = {
        "experiment": "classify",
        "data": name,
        "recordings": [len(part.labels) for part in (train, valid, test)],
        "window": window,
        "hidden": hidden,
        "epochs": epochs,
        "activity_cost": activity_cost,
        "seed": seed,
        "seconds": seconds,
        "valid_accuracy": task.evaluate(Model(network))["accuracy"],
        "test_accuracy": tested["accuracy"],
        "activity": tested["activity"],
        **operations(network, test.recordings, window),
    }
    Records(results, ()).add(line)
    print(as_line(line))


# --- a decoder that runs step by step -------------------------------------------------------------------------

# The synthetic neural recording: seconds per step, neurons, spikes per second at rest and at full speed.
BIN, NEURONS, REST, GAIN = 0.01, 96, 5.0, 20.0

# Steps of its three parts.
DECODED = (60_000, 10_000, 20_000)

# Steps of spikes that the linear decoder sees, what is added to the squares of its inputs, and rows per product.
HISTORY, RIDGE, PART = 20, 1.0, 5000


def reaching(steps: int, rng: np.random.Generator, preferred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spike counts (steps, NEURONS) and the velocity (steps, 2) that caused them.

    The velocity is a random walk that is pulled to zero, with a time constant of 0.3 s. A neuron fires more the closer
    the velocity is to its preferred direction (Georgopoulos et al. 1982), 50 ms before the movement.

    preferred : (NEURONS,) angles in radians
    """
    late = round(0.05 / BIN)
    drive = rng.normal(size=(steps + late, 2))
    velocity, keep = np.zeros((steps + late, 2)), np.exp(-BIN / 0.3)
    for t in range(1, len(velocity)):
        velocity[t] = keep * velocity[t - 1] + np.sqrt(1 - keep**2) * drive[t]
    tuned = velocity @ np.stack([np.cos(preferred), np.sin(preferred)])
    rates = np.maximum(0.0, REST + GAIN * tuned)[late:]
    return rng.poisson(rates * BIN).astype(np.float32), velocity[:steps].astype(np.float32)


class Decoding(Task):
    """The velocity at every step, from the spikes so far. The recording is cut into streams that carry their state."""

    def __init__(self, train: tuple[np.ndarray, np.ndarray], valid: tuple[np.ndarray, np.ndarray]):
        self.spikes, self.velocity = train
        self.valid = valid

    def check(self, network: er.Network, batch: int, window: int) -> None:
        if network.readout is None or network.readout.weights.shape[1] != self.velocity.shape[1]:
            raise ValueError(f"network: needs a read-out of {self.velocity.shape[1]}")
        if self.length(batch) < window:
            raise ValueError(f"batch: got {batch} streams of {self.length(batch)} steps, need windows of {window}")

    def length(self, batch: int) -> int:
        return len(self.spikes) // batch

    def batch(self, at: int, epoch: int, batch: int, window: int) -> Batch:
        steps = self.length(batch)
        parts = [
            np.moveaxis(array[: steps * batch].reshape(batch, steps, -1)[:, at : at + window], 0, 1)
            for array in (self.spikes, self.velocity)
        ]
        return Batch(*map(np.ascontiguousarray, parts), taken=len(parts[0]), carried="state")

    def loss(self, output: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        return squared_error(output, batch.targets)

    def evaluate(self, model: Model) -> dict[str, float]:
        spikes, velocity = self.valid
        output, _, tape = model.forward(spikes[:, None], er.State.zeros(model.template, 1))
        return {
            "loss": squared_error(output[:, 0], velocity)[0],
            "explained": explained(output[:, 0], velocity),
            "activity": float(tape.activity),
        }


def explained(found: np.ndarray, wanted: np.ndarray) -> float:
    """The share of the variance of the velocity that is explained."""
    return float(1 - ((found - wanted) ** 2).sum() / ((wanted - wanted.mean(axis=0)) ** 2).sum())


def linear_decoder(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """What least squares over the last `HISTORY` steps explain: the usual filter for such recordings."""

    def past(spikes: np.ndarray, at: int, end: int) -> np.ndarray:
        """The spikes before each of the steps from `at` to `end`, and a constant, (end - at, HISTORY * NEURONS + 1)."""
        padded = np.concatenate([np.zeros((HISTORY - 1, spikes.shape[1]), spikes.dtype), spikes])
        seen = np.lib.stride_tricks.sliding_window_view(padded, HISTORY, axis=0)[at:end].reshape(end - at, -1)
        return np.concatenate([seen, np.ones((end - at, 1), spikes.dtype)], axis=1)

    # The normal equations, in parts: all rows at once take a gigabyte.
    spikes, velocity = train
    size = HISTORY * spikes.shape[1] + 1
    square, product = np.zeros((size, size)), np.zeros((size, velocity.shape[1]))
    for at in range(0, len(spikes), PART):
        end = min(at + PART, len(spikes))
        seen = past(spikes, at, end).astype(float)
        square += seen.T @ seen
        product += seen.T @ velocity[at:end]
    square[np.diag_indices(size)] += RIDGE
    weights = linalg.solve(square, product, assume_a="pos")
    return explained(past(test[0], 0, len(test[0])) @ weights, test[1])


@app.command()
def decode(
    hidden: Annotated[int, typer.Option(min=1, help="Units of the layer.")] = 128,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training recording.")] = 10,
    activity_cost: Annotated[float, typer.Option(help="Weight of the mean output in the loss.")] = 0.1,
    seed: Seed = 0,
    threads: Threads = 1,
    runs: Runs = Path("runs"),
    results: Results = RESULTS,
) -> None:
    """Train a decoder of a neural recording, and run it spike count by spike count."""
    rng = np.random.default_rng(seed)
    preferred = rng.uniform(0, 2 * np.pi, NEURONS)
    train, valid, test = (reaching(steps, rng, preferred) for steps in DECODED)
    network = er.Network.random([hidden], inputs=NEURONS, readout=2, threshold=0.1, rng=rng)
    settings = Settings(
        epochs=epochs,
        batch=20,
        window=100,
        learning_rate=3e-3,
        weight_decay=0.01,
        schedule=Schedule("cosine", constant=0.5, final=0.02),
        activity_cost=activity_cost,
        regularisers=Regularisers(dropout_input=0.1),
        seed=seed,
        threads=threads,
    )
    trainer = Trainer(network, Decoding(train, valid), settings)
    seconds = trained(
        trainer, runs / f"events-decode-{hidden}-{epochs}-{activity_cost:g}-{seed}", "decode", "explained"
    )
    network = trainer.network(best=True)
    whole = er.simulate(network, test[0][:, None])
    total = er.count(network, whole).total
    output, times = step_by_step(network, test[0])
    line = {
        "experiment": "decode",
        "hidden": hidden,
        "epochs": epochs,
        "activity_cost": activity_cost,
        "seed": seed,
        "seconds": seconds,
        "explained": explained(output, test[1]),
        "explained_by_linear_decoder": linear_decoder(train, test),
        "steps_equal_the_whole_run": bool(np.array_equal(output, whole.output[:, 0])),
        "activity": whole.activity[0],
        "effective_per_step": total.effective / len(test[0]),
        "dense_per_step": total.dense / len(test[0]),
        "fewer": total.dense / total.effective,
        "step_us": {"median": float(np.median(times)), "p99": float(np.quantile(times, 0.99))},
    }
    Records(results, ()).add(line)
    print(as_line(line))


def step_by_step(network: er.Network, spikes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The output of every step of a stream (steps, V), and the microseconds that each step took."""
    decoder = er.Simulator(network)
    decoder.step(spikes[:1])  # compiles
    decoder.reset()
    output, times = np.empty((len(spikes), 2), np.float32), np.empty(len(spikes))
    for t in range(len(spikes)):
        begun = time.perf_counter()
        output[t] = decoder.step(spikes[t : t + 1])[0]
        times[t] = 1e6 * (time.perf_counter() - begun)
    return output, times


def trained(trainer: Trainer, folder: Path, what: str, figure: str) -> float:
    """Run to the end, or continue the run of the folder; returns its seconds."""
    with progress() as bar:
        last: dict[str, Any] = {}

        def report(p, seconds):
            last.update(p.validation)
            said = f", {figure} {last[figure]:.3f}" if figure in last else ""
            bar(what, round(1000 * p.share), 1000, f"loss {p.loss:.4f}, activity {p.activity:.1%}{said}")

        return run(trainer, folder, resume=True, report=report)


if __name__ == "__main__":
    app.run()
