"""From a GRU that PyTorch trained to EGRUs of several activities: accuracy over operations. No download.

    python experiments/fine_tune.py run bars       # or chirps; needs torch; four minutes on two idle cores
    python experiments/fine_tune.py figure

`run` trains an `nn.GRU` with PyTorch on a synthetic set (`eventrnn.data`), writes its `state_dict`, imports it as
`eventrnn import` does, and fine-tunes it as `eventrnn fine-tune` does, once per activity. Recordings of a third part,
which no training and no choice has seen, are then counted and classified. Every activity appends a line to
results/fine_tune.jsonl, and `figure` draws the last line of each.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from command_line import commands
from records import Records

import eventrnn as er
from eventrnn.cli.terminal import as_line
from eventrnn.data import bin_events, chirps, moving_bars, padded_counts
from eventrnn.io import from_torch
from eventrnn.training import Classification, Model, at_activity, fine_tune

RESULTS = Path(__file__).parent / "results" / "fine_tune.jsonl"
FIGURE = Path(__file__).parent / "figures" / "fine_tune.png"

SETS = {"bars": (moving_bars, 4000), "chirps": (chirps, 10_000)}

# Recordings to train on, to validate on, and to test on.
SIZES = (800, 200, 400)

ACTIVITIES = (0.5, 0.2, 0.1, 0.05, 0.02)

# Recordings that are run together for the count of operations.
COUNTED = 64

app = commands(__doc__)


def trained_gru(
    inputs: np.ndarray, labels: np.ndarray, lengths: np.ndarray, hidden: int, epochs: int, seed: int
) -> Any:
    """An `nn.GRU` and an `nn.Linear` on the mean of its outputs, trained by PyTorch alone."""
    import torch

    torch.manual_seed(seed)
    model = torch.nn.ModuleDict(
        {"rnn": torch.nn.GRU(inputs.shape[2], hidden, batch_first=True), "top": torch.nn.Linear(hidden, 4)}
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    x, y, ends = torch.from_numpy(inputs.astype(np.float32)), torch.from_numpy(labels), torch.from_numpy(lengths)
    for _ in range(epochs):
        for chosen in torch.randperm(len(x)).split(50):
            output = model["rnn"](x[chosen])[0]
            there = (torch.arange(output.shape[1]) < ends[chosen, None])[:, :, None]
            mean = (output * there).sum(dim=1) / ends[chosen, None]
            loss = torch.nn.functional.cross_entropy(model["top"](mean), y[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model


def tested(network: er.Network, recordings: Any, labels: np.ndarray, window: int) -> dict[str, float]:
    """Accuracy, activity and operations per step on recordings."""
    counts, ends = padded_counts(recordings, window)
    task = Classification(counts, labels, (counts, labels, ends), read="mean", lengths=ends)
    figures, effective, dense, steps = task.evaluate(Model(network)), 0, 0, 0
    for at in range(0, len(recordings), COUNTED):
        events, lengths = bin_events(recordings[at : at + COUNTED], window)
        total = er.count(network, er.simulate(network, events, lengths=lengths)).total
        effective, dense, steps = effective + total.effective, dense + total.dense, steps + int(lengths.sum())
    return {
        "accuracy": figures["accuracy"],
        "activity": figures["activity"],
        "effective_per_step": effective / steps,
        "dense_per_step": dense / steps,
    }


@app.command()
def run(
    data: Annotated[str, typer.Argument(help="bars or chirps.")],
    hidden: Annotated[int, typer.Option(min=1, help="Units of the GRU.")] = 64,
    gru_epochs: Annotated[int, typer.Option(min=1, help="Passes over the data by PyTorch.")] = 6,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data by fine-tuning.")] = 10,
    activity: Annotated[list[float] | None, typer.Option(help="Wanted activity; repeat for more. [five]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the fine-tuning.")] = 2,
    results: Annotated[Path, typer.Option(help="File to which the lines are appended.")] = RESULTS,
) -> None:
    """Train a GRU with PyTorch, and fine-tune it to EGRUs."""
    if data not in SETS:
        raise ValueError(f"data: got {data!r}, need bars or chirps")
    import torch

    draw, window = SETS[data]
    parts = [draw(n, seed=3 * seed + k) for k, n in enumerate(SIZES)]
    (inputs, lengths), (held, held_lengths) = (padded_counts(recordings, window) for recordings, _ in parts[:2])
    labels = [part[1] for part in parts]
    begun = time.perf_counter()
    module = trained_gru(inputs, labels[0], lengths, hidden, gru_epochs, seed)
    seconds = {"gru_seconds": time.perf_counter() - begun}
    with TemporaryDirectory() as folder:
        torch.save(module.state_dict(), Path(folder) / "gru.pt")
        network = from_torch(Path(folder) / "gru.pt", readout="top")
    task = Classification(inputs, labels[0], (held, labels[1], held_lengths), read="mean", lengths=lengths, seed=seed)
    given = tested(network, parts[2][0], labels[2], window)
    sample = bin_events(parts[0][0][:200], window)
    for wanted in activity or ACTIVITIES:
        begun = time.perf_counter()
        result = fine_tune(network, task, activity=wanted, epochs=epochs, batch=50, seed=seed, threads=threads)
        start = at_activity(er.io.as_egru(network, threshold=0.0), sample[0], wanted, lengths=sample[1])
        line = {
            "experiment": "fine_tune",
            "data": data,
            "hidden": hidden,
            "gru_epochs": gru_epochs,
            "epochs": epochs,
            "wanted": wanted,
            "seed": seed,
            **seconds,
            "seconds": time.perf_counter() - begun,
            "valid_accuracy": result.tuned["accuracy"],
            "given": given,
            "start": tested(start, parts[2][0], labels[2], window),
            "tuned": tested(result.network, parts[2][0], labels[2], window),
        }
        Records(results, ()).add(line)
        print(as_line(line))


@app.command()
def figure(
    results: Annotated[Path, typer.Option(help="File of the lines.")] = RESULTS,
    out: Annotated[Path, typer.Option(help="Picture to write.")] = FIGURE,
) -> None:
    """Draw accuracy over operations: the GRU, the EGRUs before and after fine-tuning."""
    from eventrnn.canvas import GREY, HUES, new_figure, plain_axes, saved

    lines = Records(results, ()).lines
    names = [name for name in SETS if any(line["data"] == name for line in lines)]
    made = new_figure(4.5 * len(names), 3.6)
    for axes, name in zip(np.atleast_1d(made.subplots(1, len(names))), names, strict=True):
        last = {line["wanted"]: line for line in lines if line["data"] == name}
        own = [last[wanted] for wanted in sorted(last, reverse=True)]
        for kind, hue, words in (("start", GREY, "EGRU with its weights"), ("tuned", HUES[0], "fine-tuned EGRU")):
            x = [line[kind]["effective_per_step"] for line in own]
            axes.plot(x, [100 * line[kind]["accuracy"] for line in own], "o-", color=hue, label=words, markersize=4)
        for line in own:
            place = (line["tuned"]["effective_per_step"], 100 * line["tuned"]["accuracy"])
            axes.annotate(f"{line['tuned']['activity']:.2g}", place, (0, 6), textcoords="offset points", fontsize=7)
        given = own[0]["given"]
        axes.plot(given["effective_per_step"], 100 * given["accuracy"], "s", color=HUES[1], label="GRU of PyTorch")
        axes.set(xlabel="multiplications per step", ylabel="test recordings, % right", ylim=(0, 108))
        axes.set_title(f"{name}: {own[0]['hidden']} units; numbers: activity", loc="left")
        axes.set_xlim(left=0)
        axes.legend(fontsize=7, frameon=False, loc="lower right")
        plain_axes(axes)
    saved(made, out)


if __name__ == "__main__":
    app.run()
