"""Figures: who fired when, what a run cost, where the blocks are, how fast it was. Needs the `plots` extra.

Each function returns a `matplotlib.figure.Figure` and, given a `path`, writes it there (the ending says the format).
No window is opened and no state of pyplot is touched.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eventrnn.events import Events
from eventrnn.weights import BlockCSR, Weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, GREY, BLUE, ORANGE = "#222222", "#b8bcc2", "#2a6fbb", "#e07b39"

_BAR_COLOURS = (GREY, BLUE, ORANGE)

# Told apart by eyes that confuse red and green (Okabe and Ito 2008), and by their marks.
_HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#666666")

_MARKS = ("o", "s", "^", "D", "v", "P", "X")

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
    rows, columns, magnitude = _cell_means(np.abs(weights.to_dense()), block)
    mean = np.ma.masked_equal(magnitude, 0)

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


def mask_map(
    matrices: Mapping[str, Weights],
    *,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Which weights are left, a panel a matrix: the share of non-zero weights in each cell, white where there are none.

    matrices : name -> weights, as `Network.matrices()` gives them; presynaptic units downwards. A cell is one weight,
               or a tile of several where a side has more than 256. Layers' gates (u, r, g) are told apart by lines
    """
    if not matrices:
        raise ValueError("matrices: got none, need at least one to draw")
    figure = _figure(7.2, 0.6 + 2.1 * len(matrices))
    panels = figure.subplots(len(matrices), 1, squeeze=False)[:, 0]
    for axes, (name, weights) in zip(panels, matrices.items(), strict=True):
        n_pre, n_post = weights.shape
        rows, columns, share = _cell_means(weights.to_dense() != 0, (1, 1))
        image = axes.pcolormesh(
            np.append(columns, n_post), np.append(rows, n_pre), share, cmap="Greys", vmin=0, vmax=1, rasterized=True
        )
        axes.invert_yaxis()
        axes.set_ylabel("unit")
        for k in range(1, 3 if name.endswith(("w_in", "w_rec")) else 1):
            axes.axvline(k * n_post / 3, color=ORANGE, linewidth=0.8)
        left = 100 * weights.nnz / max(1, n_pre * n_post)
        axes.set_title(f"{name}: {n_pre} × {n_post}, {weights.name}, {left:.1f} % of the weights left", loc="left")
        _plain(axes)
    panels[-1].set_xlabel("postsynaptic row")
    figure.colorbar(image, ax=panels, label="share of weights left", pad=0.02)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return _saved(figure, path)


def speedup_map(
    panels: Mapping[str, Mapping[tuple[float, float], float]],
    *,
    across: str = "activity",
    down: str = "sparsity",
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """How many times faster, a cell each measured pair, a panel each name, all on one logarithmic scale around 1.

    panels       : name -> {(share across, share down): times faster, > 0}; pairs not measured are hatched
    across, down : what the shares are, in [0, 1]
    """
    cells = [value for panel in panels.values() for value in panel.values()]
    if not cells or not all(np.isfinite(value) and value > 0 for value in cells):
        raise ValueError("panels: need at least one measured pair, every speed-up finite and above 0")
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    columns, rows = (sorted({pair[k] for panel in panels.values() for pair in panel}) for k in (0, 1))
    figure = _figure(1.6 + len(panels) * (0.6 + 0.5 * len(columns)), 1.5 + 0.42 * len(rows))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    # White at 1, darker to both sides, each to its own end: slower is seen at once, and without colour, too.
    shades = [(0, "#8c3a06"), (0.25, ORANGE), (0.5, "#ffffff"), (0.65, "#8fbce6"), (0.82, BLUE), (1, "#0b2c56")]
    scale = LinearSegmentedColormap.from_list("times faster", shades)
    slowest, fastest = np.log10(min(0.25, *cells)), np.log10(max(4.0, *cells))
    norm = TwoSlopeNorm(0, slowest, fastest)
    for panel_axes, (name, panel) in zip(axes, panels.items(), strict=True):
        grid = np.array([[panel.get((x, y), np.nan) for x in columns] for y in rows])
        panel_axes.set_facecolor("#f3f4f6")
        panel_axes.patch.set(hatch="////", edgecolor=GREY)
        powers = np.ma.masked_invalid(np.log10(grid))
        image = panel_axes.pcolormesh(powers, cmap=scale, norm=norm, edgecolors="white", linewidth=1)
        for (y, x), value in np.ndenumerate(grid):
            if np.isfinite(value):
                dark = abs(norm(np.log10(value)) - 0.5) > 0.25
                text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"
                panel_axes.text(
                    x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color="white" if dark else INK
                )
        for axis, shares in ((panel_axes.xaxis, columns), (panel_axes.yaxis, rows)):
            axis.set_ticks(np.arange(len(shares)) + 0.5, [f"{100 * share:g}" for share in shares])
            axis.set_tick_params(length=0)
        panel_axes.set_title(name, loc="left", fontsize=10)
        panel_axes.set_xlabel(f"{across} (%)")
        _plain(panel_axes)
        panel_axes.spines[["left", "bottom"]].set_visible(False)
    axes[0].set_ylabel(f"{down} (%)")
    marks = [1, *(step * 10.0**k for k in range(-3, 5) for step in (1, 2, 5))]
    shown = sorted({mark for mark in marks if slowest <= np.log10(mark) <= fastest})
    bar = figure.colorbar(image, ax=axes, pad=0.02, label="times faster")
    bar.set_ticks(np.log10(shown).tolist(), labels=[f"{mark:g}" for mark in shown])
    bar.ax.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return _saved(figure, path)


def roofline(
    cases: Sequence[Mapping],
    *,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Operations a second over operations a byte of weights, under what the machine can multiply and read.

    cases : each with `gflop_s` (two an executed multiplication), `bandwidth_gb_s`, `probe_gb_s` (the fastest read of
            the same bytes), `fma_gflop_s` (registers only), `group` (colour and mark) and, where it should have a
            bar of its own on the right, `name`: its shares of what it could read and multiply
    """
    if not cases:
        raise ValueError("cases: got none, need at least one")
    named = [case for case in cases if case.get("name")]
    figure = _figure(12.5 if named else 6.6, max(4.6, 1.2 + 0.24 * len(named)))
    left, *right = figure.subplots(1, 2 if named else 1, width_ratios=[1.15, 1] if named else None, squeeze=False)[0]
    intensity = np.array([case["gflop_s"] / case["bandwidth_gb_s"] for case in cases])
    rate = np.array([case["gflop_s"] for case in cases])
    probes, peaks = (np.array([case[key] for case in cases]) for key in ("probe_gb_s", "fma_gflop_s"))
    x = np.geomspace(intensity.min() / 1.6, max(intensity.max() * 1.6, 2 * peaks.max() / probes.min()), 200)
    roofs = [np.minimum(x * reads, peaks.max()) for reads in (probes.min(), probes.max())]
    left.fill_between(x, *roofs, color=GREY, alpha=0.35, linewidth=0, label="what the probe reads, slowest to fastest")
    left.plot(x, roofs[1], color=INK, linewidth=1, label=f"fastest FMA, {peaks.max():,.0f} GFLOP/s, and fastest read")
    groups = list(dict.fromkeys(case["group"] for case in cases))
    for k, group in enumerate(groups):
        of_group = np.array([case["group"] == group for case in cases])
        left.scatter(
            intensity[of_group], rate[of_group], s=26, edgecolors="white", linewidths=0.5, zorder=3, label=group,
            color=_HUES[k % len(_HUES)], marker=_MARKS[(k + k // len(_HUES)) % len(_MARKS)],
        )  # fmt: skip
    left.set(xscale="log", yscale="log", xlabel="operations a byte of weights (FLOP/B)", ylabel="GFLOP/s")
    left.set_ylim(rate.min() / 2, peaks.max() * 1.6)
    left.yaxis.set_major_formatter("{x:g}")
    left.xaxis.set_major_formatter("{x:g}")
    left.legend(fontsize=7, frameon=False, loc="lower right")
    for axes in right:
        _limits_panel(axes, named, groups)
    for axes in (left, *right):
        _plain(axes)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return _saved(figure, path)


def learning_curves(
    curves: Mapping[str, Sequence[tuple[float, float, float]]],
    *,
    quality: str = "perplexity",
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """What validation said in the course of runs: their quality on the left, their activity on the right.

    curves  : name of a run -> (update, quality, activity) of each validation
    quality : what the second number is called

    The axis of quality is logarithmic where it spans more than a factor of 2.
    """
    if not curves or not all(len(points) and np.isfinite(np.asarray(points)).all() for points in curves.values()):
        raise ValueError(f"curves: got {dict(curves)}, need at least one finite point for each of at least one run")
    figure = _figure(7.2, 3.2)
    left, right = figure.subplots(1, 2)
    for k, (name, points) in enumerate(curves.items()):
        step, value, activity = np.asarray(points, float).T
        look = {"color": _HUES[k % len(_HUES)], "marker": _MARKS[k % len(_MARKS)], "markersize": 4, "linewidth": 1.2}
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
        _plain(axes)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return _saved(figure, path)


def pruning_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    dense: float,
    *,
    quality: str = "perplexity",
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """What pruning costs: quality over the share of weights pruned, a panel for each way and a line for each block.

    panels : name of a panel -> name of a line -> (share pruned, quality)
    dense  : quality of the unpruned network, drawn across every panel

    Panels share their axes; that of quality is logarithmic.
    """
    from matplotlib.ticker import LogLocator

    points = [point for lines in panels.values() for line in lines.values() for point in line]
    if not points or not (np.isfinite(np.array(points)).all() and np.isfinite(dense)):
        raise ValueError(f"panels: got {dict(panels)} beside {dense}, need at least one point, all of them finite")
    figure = _figure(3.6 * len(panels), 3.4)
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, lines) in zip(every, panels.items(), strict=True):
        axes.axhline(dense, color=GREY, linewidth=1, linestyle="--", label="not pruned")
        for k, (label, line) in enumerate(lines.items()):
            share, value = np.asarray(sorted(line), float).T
            look = {
                "color": _HUES[k % len(_HUES)],
                "marker": _MARKS[k % len(_MARKS)],
                "markersize": 4,
                "linewidth": 1.2,
            }
            axes.plot(100 * share, value, label=label, **look)
        axes.set(xlabel="weights pruned (%)", yscale="log")
        axes.set_title(name, loc="left", fontsize=10)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        _plain(axes)
    every[0].set_ylabel(f"{quality} (test)")
    every[0].legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return _saved(figure, path)


def _limits_panel(axes: Axes, cases: Sequence[Mapping], groups: list) -> None:
    """A line a case, the first on top: how much of the probe's read rate and of the FMA rate it reaches."""
    for k, case in enumerate(reversed(cases)):
        colour = _HUES[groups.index(case["group"]) % len(_HUES)]
        reads, multiplies = (
            100 * case["bandwidth_gb_s"] / case["probe_gb_s"],
            100 * case["gflop_s"] / case["fma_gflop_s"],
        )
        axes.barh(k, reads, height=0.62, color=colour, alpha=0.85)
        axes.plot(multiplies, k, "|", color=INK, markersize=9, markeredgewidth=1.6)
        axes.text(102, k, f"{case['bandwidth_gb_s']:.0f} GB/s, {case['gflop_s']:.0f} GFLOP/s", va="center", fontsize=7)
    axes.set_yticks(range(len(cases)), [case["name"] for case in reversed(cases)])
    axes.axvline(100, color=INK, linewidth=0.8)
    axes.set(xlim=(0, 142), ylim=(-0.7, len(cases) - 0.3), xlabel="share of the limit (%)")
    axes.set_xticks(range(0, 101, 20))
    axes.set_title("bar: of the probe's read rate; tick: of the FMA rate", loc="left", fontsize=9)


def _cell_means(values: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First row and column of each cell, whole blocks so that at most `_MAP_CELLS` are a side; and their means."""
    r, c = (size * -(-n // (size * _MAP_CELLS)) for n, size in zip(values.shape, block, strict=True))
    rows, columns = np.arange(0, values.shape[0], r), np.arange(0, values.shape[1], c)
    total = np.add.reduceat(np.add.reduceat(values.astype(np.float32), rows, axis=0), columns, axis=1)
    heights, widths = np.minimum(r, values.shape[0] - rows), np.minimum(c, values.shape[1] - columns)
    return rows, columns, total / (heights[:, None] * widths)


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
