"""Short trainings, and counts of the backward pass, behind rows of `claims.py` (Subramoney et al., Mukherji et al.).

    python experiments/short_trainings.py backward ptb                       # counts of a model, by name or file
    python experiments/short_trainings.py plan decay decay.toml              # or sizes, or connectivity
    eventrnn sweep decay.toml --out sweep-decay --workers 4                  # trains it on a GPU
    python experiments/short_trainings.py collect decay sweep-decay          # a line of results per trained point

Every study trains from random weights on the whole vocabulary of the Penn Treebank, for the same few epochs; the
learning rate falls to zero from half-way on. Such a training is far from converged: it shows a direction, and its line
states the epochs.

- sizes: EGRU of 1350, 2000 and 2700 units in its first two layers, without a penalty of activity, which would steer
  what is measured. Are larger networks sparser?
- decay: EGRU of 1024 and 512 units with four weight decays, again without that penalty. Does decay steer the activity?
- connectivity: LSTM and EGRU of 1024 and 512 units with single weights pruned while they are trained. The decoder is a
  matrix of its own, so that it is pruned too. Do pruned LSTMs need as few operations?

`backward` reads a text in windows, as a training does but without noise, and counts the work of their backward passes.
Nothing is timed.
"""

from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from command_line import commands
from pruning_sweep import toml
from ptb_measures import quality, sizes
from records import Records

import eventrnn as er
from eventrnn.cli.options import writable_file
from eventrnn.cli.terminal import progress
from eventrnn.counting.backward import BackwardCounts, count_backward
from eventrnn.io import located_model
from eventrnn.state import State
from eventrnn.sweeps import read_results
from eventrnn.sweeps.plan import MODEL
from eventrnn.sweeps.results import saved_sweep
from eventrnn.training import LanguageModelling, Model
from eventrnn.training.recipes.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "short_trainings.jsonl"
PRESET = "egru-ptb"

# Noise of all points. Trainings are short, which takes less of it than the recipe has.
NOISE = {"dropout_input": 0.4, "dropout_top": 0.4}
DROPCONNECT = 0.3
NO_PENALTY = {"training.regularisers.activity_rate": 0.0}
SMALL = [1024, 512]

# Study -> the settings in which its points differ from each other, and from the other studies.
STUDIES: dict[str, list[dict[str, Any]]] = {
    "sizes": [
        {"model.hidden": [units, units, 750], "model.embedding": 750, "training.learning_rate": 1.2e-3, **NO_PENALTY}
        for units in (1350, 2000, 2700)
    ],
    "decay": [
        {"model.hidden": SMALL, "model.embedding": SMALL[-1], "training.weight_decay": decay, **NO_PENALTY}
        for decay in (0.0, 0.1, 0.3, 1.0)
    ],
    "connectivity": [
        {"model.cell": cell, "model.hidden": SMALL, "model.embedding": SMALL[-1], "model.tied": False}
        # A matrix with a share of its weights has the DropConnect of a dense one times the root of the share.
        | {"training.regularisers.dropconnect": round(DROPCONNECT * (1 - sparsity) ** 0.5, 3)}
        | ({"pruning.method": "magnitude", "pruning.sparsity": sparsity} if sparsity else {})
        # The units of an LSTM are never silent, so that a penalty has nothing to act on.
        | (NO_PENALTY if cell == "lstm" else {})
        for cell, sparsity in [*product(("lstm", "egru"), (0.0, 0.8, 0.9)), ("lstm", 0.95), ("lstm", 0.98)]
    ],
}

app = commands(__doc__)


def study_points(study: str) -> list[dict[str, Any]]:
    """The points of a study. Raises ValueError for an unknown one."""
    if study not in STUDIES:
        raise ValueError(f"study: got {study!r}, need one of {', '.join(STUDIES)}")
    return STUDIES[study]


@app.command()
def plan(
    study: Annotated[str, typer.Argument(help=f"One of {', '.join(STUDIES)}.")],
    out: Annotated[Path, typer.Argument(help="File to write, for `eventrnn sweep`.")],
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training text.")] = 30,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each point.")] = 1,
    backend: Annotated[str, typer.Option(help="cuda, or cpu for a small case.")] = "cuda",
    text: Annotated[str, typer.Option(help="Folder with the three texts, or ptb.")] = "ptb",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Write the file of a sweep."""
    found = study_points(study)
    writable_file(out, force=force)
    settings = {
        "data.text": text,
        "training.epochs": epochs,
        "training.schedule.constant": 0.5,
        **{f"training.regularisers.{name}": share for name, share in NOISE.items()},
        "training.backend": backend,
        **({"training.precision": "bfloat16"} if backend == "cuda" else {}),
    }
    own = {"training.learning_rate": 2e-3, "training.regularisers.dropconnect": DROPCONNECT}
    lines = [
        f"preset = {toml(PRESET)}",
        "",
        "[settings]",
        *(f"{key} = {toml(value)}" for key, value in settings.items()),
    ]
    for seed, point in product(range(seeds), found):
        whole = own | point | {"training.seed": seed}
        # What no point may have is refused here, not only by the sweep.
        load_recipe(preset=PRESET, settings=[*settings.items(), *whole.items()])
        lines += ["", "[[points]]", *(f"{key} = {toml(value)}" for key, value in whole.items())]
    out.write_text("\n".join(lines) + "\n")


@app.command()
def collect(
    study: Annotated[str, typer.Argument(help=f"One of {', '.join(STUDIES)}.")],
    folder: Annotated[Path, typer.Argument(help="Folder of the sweep, finished or not.")],
    backend: Annotated[str, typer.Option(help="Backend that reads the validation text.")] = "cuda",
    results: Annotated[Path, typer.Option(help="File to which a line per point is appended.")] = RESULTS,
) -> None:
    """Append a line for every trained point that has none: the figures of its model on the validation text."""
    study_points(study)
    sweep, records = saved_sweep(folder), Records(results, ())
    corpus = load_recipe(preset=PRESET, settings=list(sweep.settings.items())).data.corpus()
    done = [line for line in read_results(folder) if line["state"] == "done"]
    with progress() as report:
        for number, line in enumerate(done):
            report("points", number, len(done), line["folder"])
            point = {key: line[key] for key in sweep.axes if line.get(key) is not None}
            shared = {key: value for key, value in sweep.settings.items() if key != "data.text"}
            own = {"what": "training", "study": study, "settings": shared | point}
            if any(all(old.get(key) == own[key] for key in own) for old in records.lines):
                continue
            network = er.load(folder / line["folder"] / MODEL)
            valid = quality(network, corpus.valid, backend=backend)
            figures = {"model": network.layers[0].cell.name, "valid": valid}
            events = network.layers[0].cell.thresholded
            counts = {"backward": backward_counts(network, corpus.valid)} if events else {}
            records.add(own | sizes(network) | figures | counts)


@app.command()
def backward(
    model: Annotated[str, typer.Argument(help="Model file, or the name of a trained model.")],
    text: Annotated[str, typer.Option(help="Folder with the three texts, or ptb.")] = "ptb",
    name: Annotated[str, typer.Option(help="Name of the model in the line. [that of the argument]")] = "",
    results: Annotated[Path, typer.Option(help="File to which the line is appended.")] = RESULTS,
) -> None:
    """Count the backward pass of a model on the validation text."""
    network = er.load(located_model(model))
    for layer in network.layers:
        if not layer.cell.thresholded:
            raise ValueError(
                f"model: {model} has a layer of {layer.cell.name}, whose units send no events; need an EGRU"
            )
    corpus = load_recipe(preset=PRESET, settings=[("data.text", text)]).data.corpus()
    line = {"what": "backward", "name": name or model} | sizes(network)
    Records(results, ()).add(line | {"backward": backward_counts(network, corpus.valid)})


def backward_counts(
    network: er.Network, symbols: np.ndarray, batch: int = 64, window: int = 70, windows: int = 8
) -> dict[str, Any]:
    """The backward passes of the first windows of a text, from the zero state, carried from window to window.

    symbols : (n,) the text, which is read as `batch` streams

    Returns the share of unit x step x sample entries through which no gradient passes to the output of the unit, over
    all layers and by layer: the unit sent no event and its surrogate slope is zero. It also returns the multiplications
    per symbol of a dense engine and the effective ones, without the read-out, over all matrices and by matrix.
    """
    task, engine = LanguageModelling(symbols), Model(network, backward="sparse")
    task.check(network, batch, window)
    state, silent, steps = State.zeros(network, batch), np.zeros(len(network.layers)), 0
    total: dict[str, BackwardCounts] = {}
    while steps < windows * window and steps + window <= task.length(batch):
        part = task.batch(steps, 0, batch, window)
        output, state, tape = engine.forward(part.inputs, state)
        engine.backward(tape, task.loss(output, part)[1])
        silent += [(1 - layer.support) * part.taken for layer in tape.layers]
        steps += part.taken
        for key, count in count_backward(tape.work).items():
            total[key] = total.get(key, BackwardCounts()) + count
    units, symbols_read = [layer.units for layer in network.layers], steps * batch
    whole = sum(total.values(), BackwardCounts())
    return {
        "symbols": symbols_read,
        "window": window,
        "no_gradient": float(silent @ units / (steps * sum(units))),
        "no_gradient_by_layer": [float(each / steps) for each in silent],
        "dense": whole.backward_dense / symbols_read,
        "effective": whole.backward_effective / symbols_read,
        "effective_by_matrix": {key: count.backward_effective / symbols_read for key, count in total.items()},
    }


if __name__ == "__main__":
    app.run()
