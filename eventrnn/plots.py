"""Figures of a run, of its cost, of the weights that are left and of a training. Needs the `plots` extra.

Each function returns a `matplotlib.figure.Figure` and, given a `path`, writes it there in the format that the suffix
names. No window is opened and the state of pyplot is not touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eventrnn._checks import float32_array, need_kind, need_number, need_whole
from eventrnn._files import write_whole
from eventrnn.events import Events
from eventrnn.weights import MatrixId, Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, GREY, BLUE, ORANGE = "#222222", "#b8bcc2", "#2a6fbb", "#e07b39"

BAR_COLOURS = (GREY, BLUE, ORANGE)

# Colours that red-green colour-blind readers can tell apart (Okabe and Ito 2008); markers as a second cue.
HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#666666")

MARKS = ("o", "s", "^", "D", "v", "P", "X")

# Format of a picture whose name has no suffix.
DEFAULT_FORMAT = "png"

# Cells per side of a map. More could not be told apart and would only make the file large.
MAP_CELLS = 256


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
    need_kind("events", events, Events, "the Events of a layer, or Events.from_dense(array)")
    length, batch, size = events.shape
    need_whole("sample", sample, at_least=0, at_most=batch - 1)
    need_whole("start", start, at_least=0, at_most=length - 1)
    need_whole("steps", steps, at_least=1)
    stop = min(start + steps, length)
    time, which = np.divmod(events.rows(), batch)
    shown = (which == sample) & (time >= start) & (time < stop)
    time, unit, value = time[shown], events.indices[shown], events.values[shown]

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
        rows, columns, share = _cell_means(weights.to_dense() != 0)
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
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Validations in the course of training runs: quality on the left, activity on the right.

    Parameters
    ----------
    curves  : name of a run -> (update, quality, activity) of each validation
    quality : name of the second number, the label of its axis

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
    left, right = figure.subplots(1, 2)
    for k, (name, points) in enumerate(curves.items()):
        step, value, activity = np.asarray(points, float).T
        look = {"color": HUES[k % len(HUES)], "marker": MARKS[k % len(MARKS)], "markersize": 4, "linewidth": 1.2}
        left.plot(step, value, label=f"{name}: {value.min():.4g}", **look)
        right.plot(step, 100 * activity, label=name, **look)
    every = np.concatenate([np.asarray(points, float)[:, 1] for points in curves.values()])
    if every.min() > 0 and every.max() > 2 * every.min():
        left.set_yscale("log")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
    left.set(xlabel="update", ylabel=f"{quality} (validation)")
    right.set(xlabel="update", ylabel="activity (%)", ylim=(0, 105))
    left.legend(fontsize=8, frameon=False, title="best", title_fontsize=8)
    for axes in (left, right):
        plain_axes(axes)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return saved(figure, path)


def _cell_means(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means of the tiles of a (rows, columns) array, at most `MAP_CELLS` tiles per side.

    Returns the first row of each row of tiles, the first column of each column of tiles, and the means.
    """
    r, c = (-(-n // MAP_CELLS) for n in values.shape)
    rows, columns = np.arange(0, values.shape[0], r), np.arange(0, values.shape[1], c)
    total = np.add.reduceat(np.add.reduceat(values.astype(np.float32), rows, axis=0), columns, axis=1)
    heights, widths = np.minimum(r, values.shape[0] - rows), np.minimum(c, values.shape[1] - columns)
    return rows, columns, total / (heights[:, None] * widths)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, without pyplot. Raises ImportError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'eventrnn[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


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


def plain_axes(axes: Axes) -> None:
    """Remove the upper and right frame lines and set the font sizes of all figures here."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.title.set_fontsize(10)


def saved(figure: Figure, path: str | os.PathLike | None, *, overwrite: bool = True) -> Figure:
    """The figure, written atomically to the path if there is one.

    overwrite : replace an existing file; otherwise raise FileExistsError

    After an error an old file is unchanged and no new file is left. Raises ValueError for a suffix that names no
    format, and OSError if the disk is full or not writable.
    """
    if path is None:
        return figure
    target, raw = Path(path), BytesIO()
    if not target.suffix:
        target = target.with_name(f"{target.name}.{DEFAULT_FORMAT}")
    figure.savefig(raw, dpi=160, format=target.suffix[1:].lower())
    # Through a link, the file behind it is replaced.
    write_whole(target.resolve(), raw.getvalue(), overwrite=overwrite)
    return figure
