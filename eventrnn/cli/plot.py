"""`eventrnn plot`: figures of a model, of a run over a text, and of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from eventrnn._files import printable
from eventrnn.cli.imports import own_model
from eventrnn.cli.options import (
    PICTURES,
    Force,
    Json,
    Part,
    Text,
    Unknown,
    load_symbols,
    picture_text,
    writable_picture,
)
from eventrnn.cli.terminal import as_line, progress
from eventrnn.network import Network
from eventrnn.simulation import Simulator, simulate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Symbols and rounds of the timing for the figure of operations.
TIMED, REPEATS = 2000, 7

# Steps that are shown, and symbols that are read, unless others are given.
STEPS, SYMBOLS = 200, 10_000

# Figure -> the options that it takes besides --out.
READ = ("text", "part", "unknown")
WHAT = {
    "weights": (),
    "raster": (*READ, "layer", "start", "steps"),
    "animation": (*READ, "layer", "start", "steps"),
    "margins": (*READ, "symbols"),
    "operations": (*READ, "symbols"),
    "steps": (*READ, "start", "steps"),
    "training": (),
}


def plot(
    model: Annotated[Path, typer.Argument(help="Model file, or for the figure training the folder of a run.")],
    what: Annotated[str, typer.Argument(help=f"Figure to draw: {', '.join(WHAT)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write: .png, .pdf or .svg; .gif for animation.")],
    text: Text = "builtin",
    part: Part = "test",
    layer: Annotated[int, typer.Option(help="Layer of the raster or animation, counted from 0.")] = 0,
    start: Annotated[int, typer.Option(help="First step that is shown, of the raster, the animation and steps.")] = 0,
    steps: Annotated[int, typer.Option(help="Number of steps that are shown.")] = STEPS,
    symbols: Annotated[
        int, typer.Option(help="Number of symbols to read for the figures operations and margins, at most.")
    ] = SYMBOLS,
    unknown: Unknown = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw the masks of a model, the events of a run, its operations and time, or the validations of a training run.

    weights: shares of weights left; raster and animation: events of a layer; margins: distances of cells from their
    thresholds; operations: multiplications and time beside the dense network; steps: multiplications of each step by
    matrix; training: validations of a run.
    """
    if what not in WHAT:
        raise ValueError(f"what: got {what!r}, need one of {', '.join(WHAT)}")
    for name, value, least in (("layer", layer, 0), ("start", start, 0), ("steps", steps, 1), ("symbols", symbols, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, need a whole number >= {least}")
    given = {
        "text": text != "builtin",
        "part": part != "test",
        "unknown": unknown is not None,
        "layer": layer != 0,
        "start": start != 0,
        "steps": steps != STEPS,
        "symbols": symbols != SYMBOLS,
    }
    for name in given:
        if given[name] and name not in WHAT[what]:
            raise ValueError(f"{name}: the figure {what} does not take it; leave it out")
    writable_picture(out, force, formats=(".gif",) if what == "animation" else PICTURES)
    from eventrnn import plots

    if what == "training":
        figure = _training(model)
    elif what == "weights":
        figure = plots.mask_map(own_model(model).matrices(), title=picture_text(model.name))
    else:
        network = own_model(model)
        if layer >= len(network.layers):
            raise ValueError(f"layer: got {layer}, but {model} has {len(network.layers)}, counted from 0")
        read = load_symbols(network, text, part, unknown)[:, None]
        if what == "animation":
            run = simulate(network, read[: start + steps], record="events")
            with progress() as told:
                plots.animated_raster(
                    run.events[layer],
                    out,
                    start=start,
                    steps=steps,
                    overwrite=force,
                    drawn=lambda done, frames: told("drawing", done, frames, "frames"),
                )
            _report(out, as_json)
            return
        if what == "raster":
            figure = _raster(network, read, layer, start, steps)
        elif what == "margins":
            figure = _margins(network, read[:symbols])
        elif what == "steps":
            figure = _steps(network, read, start, steps)
        else:
            figure = _operations(network, read[:symbols])
    plots.saved(figure, out, overwrite=force)
    _report(out, as_json)


def _report(out: Path, as_json: bool) -> None:
    print(as_line({"wrote": str(out)}) if as_json else f"wrote {printable(out)}")


def _training(folder: Path) -> Figure:
    from eventrnn import plots
    from eventrnn.report import read_run

    log = read_run(folder, "model")
    points = log.points()
    if not points:
        raise ValueError(f"model: no validation of the run in {folder} has a finite {log.quality} and an activity")
    return plots.learning_curves({picture_text(folder.name): points}, quality=log.quality)


def _raster(network: Network, read: np.ndarray, layer: int, start: int, steps: int) -> Figure:
    from eventrnn import plots

    run = simulate(network, read[: start + steps], record="events")
    return plots.raster(run.events[layer], start=start, steps=steps)


def _margins(network: Network, read: np.ndarray) -> Figure:
    from eventrnn import plots
    from eventrnn.margins import threshold_margins

    if not any(layer.cell.thresholded for layer in network.layers):
        raise ValueError("model: has no cells with thresholds, so there are no margins to draw")
    return plots.margins(threshold_margins(network, simulate(network, read, record=("events", "states"))))


def _steps(network: Network, read: np.ndarray, start: int, steps: int) -> Figure:
    from eventrnn import counting, plots

    if start >= len(read):
        raise ValueError(f"start: got {start}, but the text has {len(read):,} symbols, counted from 0")
    run = simulate(network, read[: start + steps], record="events")
    per_step = {name: counts for name, counts in counting.count_per_step(network, run).items() if "effective" in counts}
    shown = {name: counts["effective"][start:].sum(axis=1) for name, counts in per_step.items()}
    return plots.operations_by_step(shown, dense=sum(counts["dense"][0].sum() for counts in per_step.values()))


def _operations(network: Network, read: np.ndarray) -> Figure:
    from eventrnn import counting, plots
    from eventrnn.bench import interleaved

    run = simulate(network, read, record="events")
    counts = counting.count(network, run)
    rows, total = counts.sample_steps, counts.total
    operations = {name: getattr(total, name) / rows for name in ("dense", "effective", "executed")}
    engines = {name: Simulator(network, backend=name) for name in ("blas", "cpu")}
    seconds = interleaved({name: lambda s=s: s.run(read[:TIMED]) for name, s in engines.items()}, REPEATS)
    times = {name: 1e6 * sorted(each)[REPEATS // 2] / len(read[:TIMED]) for name, each in seconds.items()}
    return plots.bars(operations, {"dense (BLAS)": times["blas"], "event-driven": times["cpu"]})
