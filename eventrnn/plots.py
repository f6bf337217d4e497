"""Figures: who fired when, what a run cost, where the blocks are. Needs the `plots` extra.

Each function returns a `matplotlib.figure.Figure` and, given a `path`, writes it there (the ending says the format).
No window is opened and no state of pyplot is touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from eventrnn.events import Events
from eventrnn.weights import BlockCSR, Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, BLUE, ORANGE = "#222222", "#b8bcc2", "#2a6fbb", "#e07b39"
_BAR_COLOURS = (GREY, BLUE, ORANGE)
# More cells than this a side are no longer seen, but make the file large.
_MAP_CELLS = 256


def raster(
    events: Events,
    *,
    sample: int = 0,
    start: int = 0,
    steps: int = 200,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Every event of one sample as a dot, coloured by the value sent, over the share of units that fired.

    events : of any layer, (steps, batch, size)
    sample : which row of the batch
    start, steps : the part shown, cut at the end of the run
    """
    length, batch, size = events.shape
    if not 0 <= sample < batch:
        raise ValueError(f"sample: got {sample}, need 0..{batch - 1}")
    if not 0 <= start < length or steps < 1:
        raise ValueError(f"steps: got {steps} from {start}, need at least one of the {length} steps")
    stop = min(start + steps, length)
    time, which = np.divmod(events.rows(), batch)
    shown = (which == sample) & (time >= start) & (time < stop)
    time, unit, value = time[shown], events.indices[shown], events.values[shown]

    figure = _figure(7.2, 4.4)
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
        _plain(axes)
    return _saved(figure, path)


def bars(
    operations: Mapping[str, float],
    microseconds: Mapping[str, float],
    *,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """What a step costs: multiplications on the left, measured time on the right, each with how many times less.

    operations   : name -> multiplications a step, such as dense, effective, executed; the first is the measure
    microseconds : name -> microseconds a step, such as dense, event-driven; the first is the measure

    The axis of operations is logarithmic where they differ by more than a factor of 20; times start at zero.
    """
    for name, values in (("operations", operations), ("microseconds", microseconds)):
        if not values or not all(np.isfinite(value) and value >= 0 for value in values.values()):
            raise ValueError(f"{name}: got {dict(values)}, need at least one number >= 0, all finite")
    figure = _figure(7.2, 3.2)
    left, right = figure.subplots(1, 2)
    _bar_panel(left, operations, "multiplications per step", "{:,.0f}")
    _bar_panel(right, microseconds, "time per step (µs)", "{:,.3g}")
    positive = [value for value in operations.values() if value > 0]
    if positive and max(positive) > 20 * min(positive):
        left.set_yscale("log")
        left.set_ylim(min(positive) / 4, max(positive) * 4)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    return _saved(figure, path)


def block_map(
    weights: Weights,
    *,
    gates: int = 1,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Where the weights are: mean magnitude a block, or a tile of several where a side has more than 256.

    weights : (n_pre, n_post), any format, those without blocks as 1 x 1; presynaptic units downwards. Made dense
              once: O(n_pre * n_post) memory
    gates   : draw lines between that many equal parts of the postsynaptic rows: 3 for a layer, (u, r, g)
    """
    n_pre, n_post = weights.shape
    if gates < 1 or n_post % gates:
        raise ValueError(f"gates: got {gates}, need a divisor of the {n_post} postsynaptic rows")
    if not n_pre * n_post:
        raise ValueError(f"weights: got shape {weights.shape}, need at least one weight to draw")
    block = weights.block if isinstance(weights, BlockCSR) else (1, 1)
    r, c = (size * -(-n // (size * _MAP_CELLS)) for n, size in zip(weights.shape, block, strict=True))
    rows, columns = np.arange(0, n_pre, r), np.arange(0, n_post, c)
    magnitude = np.add.reduceat(np.add.reduceat(np.abs(weights.to_dense()), rows, axis=0), columns, axis=1)
    area = np.outer(np.diff(np.append(rows, n_pre)), np.diff(np.append(columns, n_post)))
    mean = np.ma.masked_equal(magnitude / area, 0)

    figure = _figure(7.2, 4.0)
    axes = figure.subplots()
    axes.set_facecolor("#f3f4f6")
    # Corners, not an extent: padded edge blocks are narrower than the others.
    image = axes.pcolormesh(
        np.append(columns, n_post), np.append(rows, n_pre), mean, cmap="YlGnBu", vmin=0, rasterized=True
    )
    axes.invert_yaxis()
    axes.set(xlabel="postsynaptic row", ylabel="presynaptic unit")
    for k in range(1, gates):
        axes.axvline(k * n_post / gates, color=INK, linewidth=0.8)
    if mean.count():  # nothing to colour where every weight was pruned
        figure.colorbar(image, ax=axes, label="mean magnitude of the weights", pad=0.02)
    zeros = 100 * (1 - weights.nnz / (n_pre * n_post))
    kind = f"block {block[0]}×{block[1]}" if isinstance(weights, BlockCSR) else weights.name
    axes.set_title(title or f"{n_pre} × {n_post}, {kind}: {zeros:.1f} % of the weights are zero", loc="left")
    _plain(axes)
    return _saved(figure, path)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'eventrnn[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _bar_panel(axes: Axes, values: Mapping[str, float], label: str, number: str) -> None:
    colours = [_BAR_COLOURS[min(k, len(_BAR_COLOURS) - 1)] for k in range(len(values))]
    drawn = axes.bar(list(values), list(values.values()), color=colours, width=0.62)
    first = next(iter(values.values()))
    texts = [number.format(value) for value in values.values()]
    for k, value in enumerate(values.values()):
        if k and value > 0:
            texts[k] += f"\n{first / value:,.1f}× less" if value <= first else f"\n{value / first:,.1f}× more"
    axes.bar_label(drawn, texts, padding=3, fontsize=8, color=INK)
    axes.set_ylabel(label)
    axes.margins(y=0.25)
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.title.set_fontsize(10)


def _saved(figure: Figure, path: str | os.PathLike | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure
