"""Figures of a run, of its cost, of the weights that are left and of a training. Needs the `plots` extra.

Each function but `animated_raster` returns a `matplotlib.figure.Figure` and, given a `path`, writes it there in the
format that the suffix names. A notebook shows it at the end of a cell. No window is opened, and the state of pyplot is
not touched.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn._checks import float32_array, need_kind, need_number, need_whole
from eventrnn._files import write_whole
from eventrnn.canvas import BLUE, GREY, HUES, INK, MARKS, ORANGE, new_figure, plain_axes, saved
from eventrnn.events import Events
from eventrnn.weights import GatedBlocks, MatrixId, Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BAR_COLOURS = (GREY, BLUE, ORANGE)

# Cells per side of a map. More could not be told apart and would only make the file large.
MAP_CELLS = 256

# Points of a curve above which they are not marked: marks would hide the line.
MOST_MARKS = 60

# Bins of a histogram of margins on each side of the threshold.
MARGIN_BINS = 60


def raster(
    events: Events,
    *,
    sample: int = 0,
    start: int = 0,
    steps: int = 200,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Raster plot: every event of one sample as a dot, coloured by its value, above the share of active units.

    Parameters
    ----------
    events : events of any layer, (steps, batch, size)
    sample : index in the batch
    start, steps : first step and number of steps shown; the range is cut at the end of the run

    Raises ValueError for a sample or a range of steps that the run does not have.
    """
    time, unit, value, stop = _events_of(events, sample, start, steps)
    size = events.shape[2]

    figure = new_figure(7.2, 4.4)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    marks = above.scatter(time, unit, c=value, s=4, cmap="viridis", linewidths=0, rasterized=True)
    above.set(ylabel="unit", ylim=(-0.5, size - 0.5), xlim=(start - 0.5, stop - 0.5))
    if len(value):
        figure.colorbar(marks, ax=[above, below], label="value sent", pad=0.02)
    share = 100 * np.bincount(time - start, minlength=stop - start) / max(size, 1)
    below.fill_between(np.arange(start, stop), share, step="mid", color=BLUE, linewidth=0)
    below.set(xlabel="time step", ylabel="active (%)")
    below.set_ylim(bottom=0)
    above.set_title(title or f"{len(value):,} events of {size} units, {share.mean():.1f} % active", loc="left")
    for axes in (above, below):
        plain_axes(axes)
    return saved(figure, path)


def bars(
    operations: Mapping[str, float],
    microseconds: Mapping[str, float],
    *,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Cost of a step: multiplications on the left, measured time on the right, with the ratio to the first bar.

    Parameters
    ----------
    operations   : name -> multiplications per step, such as dense, effective, executed
    microseconds : name -> microseconds per step, such as dense, event-driven

    The axis of operations is logarithmic where they differ by more than a factor of 20; the axis of time starts at
    zero. Raises ValueError where a mapping is empty or a value is negative or not finite.
    """
    for name, values in (("operations", operations), ("microseconds", microseconds)):
        need_kind(name, values, Mapping, "a mapping of names to numbers")
        if not values:
            raise ValueError(f"{name}: got none, need at least one number >= 0")
        for label, value in values.items():
            try:
                need_number(name, value, at_least=0)
            except ValueError as error:
                raise ValueError(f"{error} for {label!r}") from None
    figure = new_figure(7.2, 3.2)
    left, right = figure.subplots(1, 2)
    _bar_panel(left, operations, "multiplications per step", "{:,.0f}")
    _bar_panel(right, microseconds, "time per step (µs)", "{:,.3g}")
    positive = [value for value in operations.values() if value > 0]
    if positive and max(positive) > 20 * min(positive):
        left.set_yscale("log")
        left.set_ylim(min(positive) / 4, max(positive) * 4)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return saved(figure, path)


def mask_map(
    matrices: Mapping[str, Weights],
    *,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Remaining weights, one panel per matrix: the share of non-zero weights in each cell, white for none.

    matrices : name -> weights, as returned by `Network.matrices()`. Presynaptic units run downwards. A cell is one
               weight, or a tile of several weights where a side has more than 256. Lines separate the gates of a
               layer, whose number the names of `Network.matrices()` state

    Every matrix is made dense once: O(n_pre * n_post) memory. Raises ValueError where there is no matrix.
    """
    need_kind("matrices", matrices, Mapping, "a mapping of names to weights, such as Network.matrices()")
    if not matrices:
        raise ValueError("matrices: got none, need at least one to draw")
    for name, weights in matrices.items():
        need_kind(f"matrices: {name}", weights, Weights, "weights: Dense(array), or another format")
    figure = new_figure(7.2, 0.6 + 2.1 * len(matrices))
    panels = figure.subplots(len(matrices), 1, squeeze=False)[:, 0]
    for axes, (name, weights) in zip(panels, matrices.items(), strict=True):
        n_pre, n_post = weights.shape
        # Gated blocks have no equal matrix; what is stored of them is.
        stored = weights.blocks if isinstance(weights, GatedBlocks) else weights
        rows, columns, share = _cell_means(stored.to_dense() != 0)
        image = axes.pcolormesh(
            np.append(columns, n_post), np.append(rows, n_pre), share, cmap="Greys", vmin=0, vmax=1, rasterized=True
        )
        axes.invert_yaxis()
        axes.set_ylabel("unit")
        gates = MatrixId(name).stated_gates or 1
        for k in range(1, gates):
            axes.axvline(k * n_post / gates, color=ORANGE, linewidth=0.8)
        left = 100 * weights.nnz / max(1, n_pre * n_post)
        axes.set_title(f"{name}: {n_pre} × {n_post}, {weights.name}, {left:.1f} % of the weights left", loc="left")
        plain_axes(axes)
    panels[-1].set_xlabel("postsynaptic row")
    figure.colorbar(image, ax=panels, label="share of weights left", pad=0.02)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return saved(figure, path)


def learning_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    quality: str = "perplexity",
    measured: str = "validation",
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Training runs in their course: quality on the left, activity on the right.

    Parameters
    ----------
    curves   : name of a run -> (update, quality, activity) of each validation, or of each line of its log
    quality  : name of the second number, the label of its axis
    measured : where the quality was measured, such as validation or training, for the label

    The axis of quality is logarithmic where it spans more than a factor of 2. Raises ValueError where there is no run,
    a run without points, or a value that is not finite.
    """
    need_kind("curves", curves, Mapping, "a mapping of names of runs to points (update, quality, activity)")
    if not curves:
        raise ValueError("curves: got none, need at least one run")
    for name, points in curves.items():
        array = float32_array(f"curves: {name}", points, "(points, 3): update, quality and activity", ndim=2)
        if not len(array) or array.shape[1] != 3:
            raise ValueError(f"curves: {name}: got shape {array.shape}, need at least one (update, quality, activity)")
    figure = new_figure(7.2, 3.2)
    from matplotlib.ticker import LogLocator

    left, right = figure.subplots(1, 2)
    for k, (name, points) in enumerate(curves.items()):
        step, value, activity = np.asarray(points, float).T
        mark = MARKS[k % len(MARKS)] if len(points) <= MOST_MARKS else None
        look = {"color": HUES[k % len(HUES)], "marker": mark, "markersize": 4, "linewidth": 1.2}
        left.plot(step, value, label=f"{name}: {value.min():.4g}", **look)
        right.plot(step, 100 * activity, label=name, **look)
    every = np.concatenate([np.asarray(points, float)[:, 1] for points in curves.values()])
    if every.min() > 0 and every.max() > 2 * every.min():
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        # Labels of all places between powers of ten would overlap where the axis spans much.
        if every.max() > 5 * every.min():
            left.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        left.yaxis.set_minor_formatter("{x:g}" if every.max() < 1e3 * every.min() else "")
    left.set(xlabel="update", ylabel=f"{quality} ({measured})")
    right.set(xlabel="update", ylabel="activity (%)", ylim=(0, 105))
    left.legend(fontsize=8, frameon=False, title="best", title_fontsize=8)
    for axes in (left, right):
        plain_axes(axes)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return saved(figure, path)


def margins(
    distances: Mapping[str, Sequence[float] | np.ndarray],
    *,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Threshold margins: how far the cells of each layer are from their thresholds, as histograms of equal bins.

    distances : name of a layer -> v - threshold of every unit and step, as returned by
                `eventrnn.margins.threshold_margins`. A unit sends where its distance is above 0, right of the line

    The title of a panel states the share above 0 and the smallest distance: an error of rounding above it could change
    an event. Raises ValueError where there is no layer, or a layer without values or with one that is not finite.
    """
    need_kind("distances", distances, Mapping, "a mapping of layers to distances, such as threshold_margins returns")
    if not distances:
        raise ValueError("distances: got none, need at least one layer with thresholds")
    figure = new_figure(7.2, 0.6 + 1.8 * len(distances))
    panels = figure.subplots(len(distances), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (name, given) in zip(panels, distances.items(), strict=True):
        values = np.asarray(given, np.float64).ravel()
        if not values.size or not np.isfinite(values).all():
            raise ValueError(f"distances: {name}: got {values.size} values, need at least one, all finite")
        reach = float(np.abs(values).max()) or 1.0
        counts, edges = np.histogram(values, bins=np.linspace(-reach, reach, 2 * MARGIN_BINS + 1))
        axes.stairs(counts / values.size, edges, fill=True, color=BLUE)
        axes.axvline(0, color=ORANGE, linewidth=1)
        axes.set_title(
            f"{name}: {np.mean(values > 0):.1%} above 0, smallest distance {np.abs(values).min():.1e}", loc="left"
        )
        axes.set_ylabel("share")
        plain_axes(axes)
    panels[-1].set_xlabel("cell before the event, less its threshold")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return saved(figure, path)


def operations_by_step(
    operations: Mapping[str, Sequence[float] | np.ndarray],
    *,
    dense: float | None = None,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Operations of each step, stacked by matrix.

    Parameters
    ----------
    operations : name of a matrix -> (steps,) operations, such as the counts "effective" of
                 `eventrnn.count_per_step`, summed over samples. All of one length
    dense      : operations per step of the dense network, for the title

    The axis starts at zero. Raises ValueError where there is no matrix, for other shapes and for negative values.
    """
    need_kind("operations", operations, Mapping, "a mapping of matrices to operations per step")
    if not operations:
        raise ValueError("operations: got none, need at least one matrix")
    stacked = [np.asarray(values, np.float64) for values in operations.values()]
    for name, values in zip(operations, stacked, strict=True):
        if values.ndim != 1 or values.shape != stacked[0].shape or not values.size or not (values >= 0).all():
            raise ValueError(
                f"operations: {name}: got shape {values.shape}, need numbers >= 0 of shape (steps,), equal for all"
            )
    figure = new_figure(7.2, 3.4)
    axes = figure.subplots()
    steps = np.arange(len(stacked[0]) + 1)
    below = np.zeros(len(stacked[0]))
    for k, (name, values) in enumerate(zip(operations, stacked, strict=True)):
        above = below + values
        hue = HUES[k % len(HUES)]
        axes.stairs(above, steps, baseline=below, fill=True, color=hue, label=f"{name}: {values.mean():,.0f} per step")
        below = above
    axes.set(xlabel="time step", ylabel="multiplications per step", xlim=(0, len(below)))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    mean = below.mean()
    fewer = f", {dense / mean:,.1f} times fewer than dense" if dense and mean else ""
    axes.set_title(title or f"{mean:,.0f} multiplications per step{fewer}, over {_steps(len(below))}", loc="left")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    plain_axes(axes)
    return saved(figure, path)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats, cheapest first: less in one number and not more in the other.

    points : (cost, quality) of each model; less is better in both. Of equal points the first counts
    """
    order = sorted(range(len(points)), key=lambda k: (points[k][0], points[k][1], k))
    front, best = [], np.inf
    for k in order:
        if points[k][1] < best:
            front.append(k)
            best = points[k][1]
    return front


def pareto(
    points: Mapping[str, tuple[float, float]],
    *,
    quality: str = "perplexity",
    cost: str = "multiplications per step",
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Quality over cost, with the Pareto front: the models that no other model beats in both.

    points        : name of a model -> (cost, quality); less is better in both. The axis of cost is logarithmic
    quality, cost : labels of the axes

    Raises ValueError where there is no point, a cost is not above 0 or a number is not finite.
    """
    need_kind("points", points, Mapping, "a mapping of models to (cost, quality)")
    if not points:
        raise ValueError("points: got none, need at least one model")
    for name, (spent, reached) in points.items():
        if not (np.isfinite([spent, reached]).all() and spent > 0):
            raise ValueError(f"points: {name}: got ({spent}, {reached}), need a finite cost > 0 and a finite quality")
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    values = list(points.values())
    front = pareto_front(values)
    # A step shows what is reached at most at a cost between two models.
    axes.step(*zip(*(values[k] for k in front), strict=True), where="post", color=GREY, linewidth=1.2, zorder=1)
    for k, (name, point) in enumerate(points.items()):
        axes.scatter(*point, color=BLUE if k in front else GREY, s=28, zorder=2)
        axes.annotate(name, point, (5, 4), textcoords="offset points", fontsize=7, color=INK)
    axes.set_xscale("log")
    axes.margins(x=0.15, y=0.1)
    axes.set(xlabel=cost, ylabel=quality)
    axes.set_title(title or f"{len(front)} of {len(points)} models are not beaten by another", loc="left")
    plain_axes(axes)
    return saved(figure, path)


def animated_raster(
    events: Events,
    path: str | os.PathLike,
    *,
    sample: int = 0,
    start: int = 0,
    steps: int = 200,
    shown: int = 60,
    frames_per_second: int = 20,
    overwrite: bool = True,
    drawn: Callable[[int, int], None] | None = None,
) -> int:
    """Write a raster plot that moves through time, one frame per step, as an animated GIF. Returns its frames.

    Parameters
    ----------
    events              : events of any layer, (steps, batch, size)
    path                : ends in .gif
    sample, start, steps: as in `raster`
    shown               : steps that are visible at a time
    frames_per_second   : speed of the animation
    overwrite           : replace an existing file; otherwise raise FileExistsError
    drawn               : called with the frames that are drawn, and their number, after every frame

    Every frame is drawn by matplotlib, which takes some 0.1 s. The file is written whole at the end. Raises ValueError
    for another suffix and for a sample or a range of steps that the run does not have.
    """
    from matplotlib.animation import FuncAnimation, PillowWriter

    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"path: got {Path(path).name!r}, need a name that ends in .gif")
    time, unit, value, stop = _events_of(events, sample, start, steps)
    need_whole("shown", shown, at_least=1)
    need_whole("frames_per_second", frames_per_second, at_least=1)
    figure = new_figure(6.0, 3.6)
    axes = figure.subplots()
    axes.set(xlabel="time step", ylabel="unit", ylim=(-0.5, events.shape[2] - 0.5))
    marks = axes.scatter(time, unit, c=value, s=5, cmap="viridis", linewidths=0)
    if len(value):
        figure.colorbar(marks, ax=axes, label="value sent", pad=0.02)
    plain_axes(axes)

    def draw(now: int) -> list[Any]:
        seen = (time <= now) & (time > now - shown)
        marks.set_offsets(np.column_stack([time[seen], unit[seen]]))
        marks.set_array(value[seen])
        axes.set_xlim(now - shown + 0.5, now + 0.5)
        axes.set_title(f"step {now}: {np.count_nonzero(time == now):,} of {events.shape[2]} units send", loc="left")
        return [marks]

    # Places are found once: to find them anew for every frame takes most of the time.
    draw(stop - 1)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    frames = range(start, stop)
    animation = FuncAnimation(figure, draw, frames=frames, blit=False, cache_frame_data=False)
    with TemporaryDirectory() as folder:
        made = Path(folder) / "raster.gif"
        after = None if drawn is None else lambda k, _: drawn(k + 1, len(frames))
        animation.save(made, writer=PillowWriter(fps=frames_per_second), dpi=90, progress_callback=after)
        write_whole(Path(path).resolve(), made.read_bytes(), overwrite=overwrite)
    return len(frames)


def _events_of(events: Events, sample: int, start: int, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Step, unit and value of the events of one sample within a range of steps, and the step after the last.

    Raises TypeError and ValueError as `raster` says.
    """
    need_kind("events", events, Events, "the Events of a layer, or Events.from_dense(array)")
    length, batch, _ = events.shape
    need_whole("sample", sample, at_least=0, at_most=batch - 1)
    need_whole("start", start, at_least=0, at_most=length - 1)
    need_whole("steps", steps, at_least=1)
    stop = min(start + steps, length)
    time, which = np.divmod(events.rows(), batch)
    shown = (which == sample) & (time >= start) & (time < stop)
    return time[shown], events.indices[shown], events.values[shown], stop


def _steps(number: int) -> str:
    return f"{number:,} step{'' if number == 1 else 's'}"


def _cell_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of the tiles of a (rows, columns) array, at most `MAP_CELLS` tiles per side.

    Returns the first row of each row of tiles, the first column of each column of tiles, and the means.
    """
    r, c = (-(-n // MAP_CELLS) for n in values.shape)
    rows, columns = np.arange(0, values.shape[0], r), np.arange(0, values.shape[1], c)
    total = np.add.reduceat(np.add.reduceat(values.astype(np.float32), rows, axis=0), columns, axis=1)
    heights, widths = np.minimum(r, values.shape[0] - rows), np.minimum(c, values.shape[1] - columns)
    return rows, columns, total / (heights[:, None] * widths)


def _bar_panel(axes: Axes, values: Mapping[str, float], label: str, number: str) -> None:
    colours = [BAR_COLOURS[min(k, len(BAR_COLOURS) - 1)] for k in range(len(values))]
    drawn = axes.bar(list(values), list(values.values()), color=colours, width=0.62)
    first = next(iter(values.values()))
    texts = [number.format(value) for value in values.values()]
    for k, value in enumerate(values.values()):
        if k and value > 0:
            texts[k] += f"\n{first / value:,.1f}× less" if value <= first else f"\n{value / first:,.1f}× more"
    axes.bar_label(drawn, texts, padding=3, fontsize=8, color=INK)
    axes.set_ylabel(label)
    axes.margins(y=0.25)
    plain_axes(axes)
