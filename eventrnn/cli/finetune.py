"""The command `fine-tune`: from a trained GRU to an EGRU of a wanted activity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from eventrnn import io
from eventrnn._checks import need_choice
from eventrnn._files import read_arrays
from eventrnn.cli.options import (
    Force,
    GivenModel,
    Json,
    NamedModel,
    Seed,
    Threads,
    load_parts,
    model_file,
    save_model,
    takes,
    writable_file,
)
from eventrnn.cli.terminal import progress, show

# Synthetic sets by name: microseconds per step, and recordings to train on and to validate on.
SYNTHETIC = {"bars": 4000, "chirps": 10_000}

RECORDINGS = (800, 200)

# Of a file without data to validate on, the share that is held out.
HELD_OUT = 0.2


@dataclass(frozen=True)
class FineTuneOptions:
    """Options of `eventrnn fine-tune`."""

    model: GivenModel = None
    named: NamedModel = None
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Model file to write.")] = None
    activity: Annotated[float, typer.Option(help="Wanted share of units that send an event in a step.")] = 0.1
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.npz|bars|chirps",
            help="Sequences of the task: a file with inputs (samples, steps, size) and labels (samples,) or targets "
            "(samples, outputs), or a synthetic set that the library draws.",
        ),
    ] = None
    text: Annotated[
        str | None, typer.Option(help="In place of --data: text to read, for a model with a vocabulary; as for train.")
    ] = None
    read: Annotated[
        str, typer.Option(help="Of --data: the output that counts, of the last step or the mean: last, mean.")
    ] = "last"
    epochs: Annotated[int, typer.Option(help="Number of passes over the data.")] = 10
    batch: Annotated[int, typer.Option(help="Number of sequences, or of streams of a text, per update.")] = 32
    window: Annotated[int, typer.Option(help="Of --text: time steps per window.")] = 64
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the first half of the epochs.")] = 3e-3
    seed: Seed = 0
    threads: Threads = 1
    force: Force = False
    as_json: Json = False


@takes(FineTuneOptions)
def fine_tune(given: FineTuneOptions) -> None:
    """Make an EGRU of a trained GRU, and train it on its task until it has a wanted activity.

    The model is a file of this library; `eventrnn import` writes it of a GRU of another one. Weights are kept, units
    get thresholds, and training makes up for the values that are no longer sent.
    """
    from eventrnn import training
    from eventrnn.training.tasks import READS

    if given.out is None:
        raise ValueError("out: give --out a model file to write")
    if (given.data is None) == (given.text is None):
        raise ValueError("data: give --data the sequences of the task, or --text a text for a model with a vocabulary")
    need_choice("read", given.read, READS)
    writable_file(given.out, given.force)
    network = io.load(model_file(given.model, given.named))
    if given.text is not None:
        parts = load_parts(network, given.text, ("train", "valid"))
        task: training.Task = training.LanguageModelling(parts["train"], parts["valid"])
    elif given.data in SYNTHETIC:
        task = _synthetic(given.data, given.read, given.seed)
    else:
        task = _of_file(Path(given.data or ""), given.read, given.seed)
    with progress() as bar:
        result = training.fine_tune(
            network,
            task,
            activity=given.activity,
            epochs=given.epochs,
            batch=given.batch,
            window=given.window,
            learning_rate=given.learning_rate,
            seed=given.seed,
            threads=given.threads,
            report=lambda done, epochs, note: bar("fine-tuning", done, epochs, note),
        )
    save_model(result.network, given.out, given.force)
    figures = {"given": result.given, "start": result.start, "tuned": result.tuned}
    if given.as_json:
        show(f"wrote {given.out}", figures | {"bytes": given.out.stat().st_size}, True)
        return
    _table(figures, given.out)


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


def _synthetic(name: str, read: str, seed: int) -> Any:
    """The task of a synthetic set. Its two parts have seeds of their own."""
    from eventrnn.data import chirps, moving_bars, padded_counts
    from eventrnn.training import Classification

    draw = moving_bars if name == "bars" else chirps
    (train, labels), (valid, valid_labels) = (draw(n, seed=2 * seed + k) for k, n in enumerate(RECORDINGS))
    (inputs, ends), (held, held_ends) = (padded_counts(each, SYNTHETIC[name]) for each in (train, valid))
    return Classification(inputs, labels, (held, valid_labels, held_ends), read=read, lengths=ends, seed=seed)


def _of_file(path: Path, read: str, seed: int) -> Any:
    """The task of an `.npz` file. Raises ValueError, with the name of the array, for another content."""
    from eventrnn.training import Classification, Regression

    if not path.exists():
        raise ValueError(f"data: there is no file {path}; give an .npz file, {' or '.join(SYNTHETIC)}")
    arrays = read_arrays(path)
    if isinstance(arrays, np.ndarray):
        raise ValueError(
            f"data: {path.name} holds a single array, need an .npz file with inputs, and labels or targets"
        )
    kinds = [name for name in ("labels", "targets") if name in arrays]
    if "inputs" not in arrays or len(kinds) != 1:
        raise ValueError(f"data: {path.name} holds {', '.join(arrays)}; need inputs, and one of labels and targets")
    names = ["inputs", kinds[0], *(["lengths"] if "lengths" in arrays else [])]
    known = {*names, *(f"valid_{name}" for name in names)}
    if others := sorted(set(arrays) - known):
        raise ValueError(f"data: {path.name} holds {', '.join(others)} too, need only {', '.join(sorted(known))}")
    held = [f"valid_{name}" for name in names]
    if there := [name for name in held if name in arrays]:
        if missing := sorted(set(held) - set(there)):
            raise ValueError(f"data: {path.name} holds {there[0]}, but no {missing[0]}")
        train, valid = [arrays[name] for name in names], [arrays[name] for name in held]
    else:
        samples = {name: len(arrays[name]) if arrays[name].ndim else 0 for name in names}
        if len(set(samples.values())) > 1 or min(samples.values()) < 2:
            found = ", ".join(f"{n} of {name}" for name, n in samples.items())
            raise ValueError(f"data: {path.name} holds {found}; need as many of each, and at least 2")
        order = np.random.default_rng(seed).permutation(samples["inputs"])
        out, kept = np.split(order, [max(1, round(HELD_OUT * len(order)))])
        train, valid = ([arrays[name][np.sort(chosen)] for name in names] for chosen in (kept, out))
    task = Classification if kinds[0] == "labels" else Regression
    held_out = (valid[0], valid[1], valid[2]) if len(valid) > 2 else (valid[0], valid[1])
    return task(train[0], train[1], held_out, read=read, lengths=train[2] if len(train) > 2 else None, seed=seed)
