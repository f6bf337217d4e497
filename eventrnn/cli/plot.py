"""`eventrnn plot`: figures of a model, of a run over a text, of a training run, and of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, fields
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
    takes,
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
    "sweep": ("x", "y", "by"),
}


@dataclass(frozen=True)
class PlotOptions:
    """Options of `eventrnn plot`."""

    model: Annotated[
        Path,
        typer.Argument(help="Model file; for the figure training the folder of a run, for sweep that of a sweep."),
    ]
    what: Annotated[str, typer.Argument(help=f"Figure to draw: {', '.join(WHAT)}.")]
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write: .png, .pdf or .svg; .gif for animation.")]
    text: Text = "builtin"
    part: Part = "test"
    layer: Annotated[int, typer.Option(help="Layer of the raster or animation, counted from 0.")] = 0
    start: Annotated[int, typer.Option(help="First step that is shown, of the raster, the animation and steps.")] = 0
    steps: Annotated[int, typer.Option(help="Number of steps that are shown.")] = STEPS
    symbols: Annotated[
        int, typer.Option(help="Number of symbols to read for the figures operations and margins, at most.")
    ] = SYMBOLS
    unknown: Unknown = None
    x: Annotated[str | None, typer.Option("--x", help="Setting or figure below a sweep. [the first that varies]")] = (
        None
    )
    y: Annotated[str | None, typer.Option("--y", help="Figure beside a sweep. [bits_per_symbol_best]")] = None
    by: Annotated[
        list[str] | None,
        typer.Option("--by", help="Setting with a colour per value; repeat for more. [all that vary but seeds]"),
    ] = None
    force: Force = False
    as_json: Json = False


@takes(PlotOptions)
def plot(options: PlotOptions) -> None:
    """Draw a model, the events of a run, its operations and time, a training run, or a sweep.

    weights: shares of weights left; raster and animation: events of a layer; margins: distances of cells from their
    thresholds; operations: multiplications and time beside the dense network; steps: multiplications of each step by
    matrix; training: validations of a run; sweep: a figure of every point over a setting.
    """
    _check(options)
    model, what, out, force = options.model, options.what, options.out, options.force
    from eventrnn import canvas, plots

    if what == "training":
        figure = _training(model)
    elif what == "sweep":
        figure = _sweep(options)
    elif what == "weights":
        figure = plots.mask_map(own_model(model).matrices(), title=picture_text(model.name))
    elif what == "animation":
        network, read = _read(options)
        layer, start, steps = options.layer, options.start, options.steps
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
        _report(out, options.as_json)
        return
    else:
        network, read = _read(options)
        if what == "raster":
            figure = _raster(network, read, options.layer, options.start, options.steps)
        elif what == "margins":
            figure = _margins(network, read[: options.symbols])
        elif what == "steps":
            figure = _steps(network, read, options.start, options.steps)
        else:
            figure = _operations(network, read[: options.symbols])
    canvas.saved(figure, out, overwrite=force)
    _report(out, options.as_json)


def _check(options: PlotOptions) -> None:
    """Refuse options that do not apply to the figure, before any work."""
    what = options.what
    if what not in WHAT:
        raise ValueError(f"what: got {what!r}, need one of {', '.join(WHAT)}")
    for name, least in (("layer", 0), ("start", 0), ("steps", 1), ("symbols", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"{name}: got {getattr(options, name)}, need a whole number >= {least}")
    every = {each.name: each.default for each in fields(options)}
    for name in dict.fromkeys(name for names in WHAT.values() for name in names):
        if getattr(options, name) != every[name] and name not in WHAT[what]:
            raise ValueError(f"{name}: the figure {what} does not take it; leave it out")
    writable_picture(options.out, options.force, formats=(".gif",) if what == "animation" else PICTURES)


def _read(options: PlotOptions) -> tuple[Network, np.ndarray]:
    """The network, and (symbols, 1) symbols of the text."""
    network = own_model(options.model)
    if options.layer >= len(network.layers):
        raise ValueError(f"layer: got {options.layer}, but {options.model} has {len(network.layers)}, counted from 0")
    return network, load_symbols(network, options.text, options.part, options.unknown)[:, None]


def _sweep(options: PlotOptions) -> Figure:
    from eventrnn.sweeps.figure import sweep_figure
    from eventrnn.sweeps.results import read_results, saved_sweep

    given = {name: getattr(options, name) for name in WHAT["sweep"] if getattr(options, name) is not None}
    return sweep_figure(read_results(options.model), saved_sweep(options.model).axes, **given)


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
