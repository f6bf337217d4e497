"""Draw figures/ from the lines in results/ that bench.py and pruning_sweep.py wrote. Nothing is measured.

    python experiments/plots.py

Of each case the last line counts that was measured on the machine of the file's last line. speedup.png needs the lines
of `bench.py --grid`, blocks.png those of several sparsities, and diversity.png those of N:M masks.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from command_line import command
from pruning_claims import best_dense, block_of, by_seed, perplexity, rule_of, size_of, units

from eventrnn.canvas import BLUE, GREY, HUES, INK, MARKS, ORANGE, new_figure, plain_axes, saved
from eventrnn.pruning.nm import mask_diversity
from eventrnn.pruning.patterns import parse_nm

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
# At most so many repeats: a case of bench.py's grid. Every other case is repeated more often.
GRID_REPEATS = 7
# Values of the options that the grid does not vary. It varies activity, sparsity and batch.
PLAIN = {"against": "torch", "hidden": 1350, "layers": 1, "variant": "evnn", "threads": 1, "dtype": "float32"}


def latest(lines: list[dict]) -> list[dict]:
    """The last line of each case, of the lines measured on the machine of the last one."""
    return list({case_of(line): line for line in lines if line["device"] == lines[-1]["device"]}.values())


def case_of(line: dict) -> str:
    """The options of a line as a string: equal for two measurements of the same case."""
    keys = (
        "measures",
        "hidden",
        "layers",
        "batch",
        "activity_asked",
        "sparsity_asked",
        "format",
        "block",
        "nm",
        "dtype",
        "variant",
        "threads",
        "against",
        "steps",
        "repeats",
    )
    return json.dumps([line[key] for key in keys])


def is_plain(line: dict) -> bool:
    """Whether the case belongs on the map: a layer with the options of `PLAIN`, dense or in blocks of 1x64."""
    weights = (line["format"], line["block"], line["sparsity_asked"] > 0)
    return all(line[k] == v for k, v in PLAIN.items()) and weights in (("dense", None, False), ("block", "1x64", True))


def map_cells(lines: list[dict]) -> dict[str, dict[tuple[float, float], float]]:
    """Speed-ups of the cases that belong on the map: panel per batch -> (activity, sparsity) -> speed-up."""
    panels: dict[str, dict[tuple[float, float], float]] = {}
    for line in sorted(filter(is_plain, lines), key=lambda line: line["batch"]):
        panel = panels.setdefault(f"batch {line['batch']}", {})
        panel[line["activity_asked"], line["sparsity_asked"]] = line["speedup"]
    return {name: panel for name, panel in panels.items() if len(panel) > 3}


def points(lines: list[dict]) -> list[dict]:
    """The cases for `roofline`. Those of the grid get no name, and so no bar."""
    found = []
    for line in lines:
        weights = line["block"] or (line["nm"] and line["nm"].removesuffix(":post")) or line["format"]
        narrow = "" if line["dtype"] == "float32" else f" {line['dtype']}"
        words = [
            f"{line['measures']} {line['hidden']}",
            f"{weights}{narrow}" + (f" {line['sparsity_asked']:.0%} pruned" if line["sparsity_asked"] else ""),
            f"{line['activity_asked']:.0%} active",
            f"batch {line['batch']}" if line["batch"] > 1 else "",
            f"{line['threads']} threads" if line["threads"] > 1 else "",
            line["variant"] if line["variant"] != "evnn" else "",
        ]
        found.append(
            line
            | {
                "group": f"{line['format']}{narrow}{', batch > 1' if line['batch'] > 1 else ''}",
                "name": ", ".join(word for word in words if word) if line["repeats"] > GRID_REPEATS else "",
            }
        )
    # The same case may have been measured beside several baselines: one bar is enough.
    seen: dict[str, dict] = {}
    for line in found:
        seen.setdefault(line["name"] or case_of(line), line)
    return list(seen.values())


def draw_pruned(lines: list[dict], figures: Path) -> None:
    """Draw perplexity over sparsity by rule and block, for the network and the number of epochs with the most lines,
    and over the diversity of masks, for every network. A point is the mean over seeds of the training that reads best.
    """
    size = Counter(map(size_of, lines)).most_common(1)[0][0]
    same = [line for line in lines if size_of(line) == size and not line["converted"]]
    dense = [perplexity(group) for group in best_dense(same).values()]
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for group in sorted(by_seed(same), key=perplexity):
        line, value = group[0], perplexity(group)
        if line["pruning.sparsity"] and not line["pruning.nm"]:
            rule = line["pruning.scope"] or line["pruning.method"]
            points = panels.setdefault(rule, {}).setdefault(block_of(line) or "1x1", [])
            if line["pruning.sparsity"] not in [share for share, _ in points]:
                points.append((line["pruning.sparsity"], value))
    if dense and any(len(points) > 1 for panel in panels.values() for points in panel.values()):
        pruning_curves(panels, dense[0], path=figures / "blocks.png")
        print(f"wrote {figures / 'blocks.png'}: {len(same)} points")
    else:
        print("blocks.png: not drawn, it needs the dense network and two sparsities of a rule and a block")
    masks = masked_networks(lines)
    if masks:
        draw_diversity(masks, figures / "diversity.png")
        print(f"wrote {figures / 'diversity.png'}: {len(masks)} networks")
    else:
        print("diversity.png: not drawn, it needs a dense network and the same in two patterns of masks")


def masked_networks(lines: list[dict]) -> dict[str, dict[str, list[float]]]:
    """Network in words -> pattern of masks -> perplexity per seed, by that of the dense network: of each text, cell and
    size the longest training, and of that the time of drawing masks that reads best, with two patterns or more."""
    found: dict[str, dict[str, list[float]]] = {}
    trained = [line for line in lines if not line["converted"] and line["pruning.nm"]]
    dense = best_dense(lines)
    for size in sorted(set(map(size_of, trained)), key=lambda size: (-size[-1], *size)):
        ways: dict[tuple, dict[str, list[float]]] = {}
        for group in by_seed(line for line in trained if size_of(line) == size):
            first = group[0]
            way = tuple(each for each in rule_of(first) if each[0] != "pruning.nm")
            if size in dense:
                ratios = [line["perplexity_valid"] / perplexity(dense[size]) for line in group]
                ways.setdefault(way, {})[first["pruning.nm"]] = ratios
        several = [way for way in ways.values() if len(way) > 1]
        name = f"{size[1].upper()} of {units({'model.hidden': size[2]})} units, by {size[0].split()[0]}s"
        if several and name not in found:
            found[name] = min(several, key=lambda way: np.mean([np.mean(ratios) for ratios in way.values()]))
    return found


def diversity(nm: str) -> float:
    """Bits per weight that choose one of the masks of a pattern in 8 x 8 weights, counted exactly."""
    n, m, axis = parse_nm(nm)
    masks = mask_diversity(n, m, 8)
    return math.log2(masks["transposable" if axis == "both" else "structured"]) / 64


def draw_diversity(networks: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> Figure:
    """Perplexity beside that of the dense network over the diversity of masks.

    networks : network in words -> pattern -> perplexity per seed, by that of the dense network. A bar spans the seeds
    """
    figure = new_figure(6.4, 3.6)
    panel = figure.subplots()
    panel.axhline(0, color=GREY, linewidth=1, linestyle="--", label="not pruned")
    for k, (name, patterns) in enumerate(networks.items()):
        for pattern, ratios in sorted(patterns.items(), key=lambda each: diversity(each[0])):
            # Networks beside one another, so that their bars can be told apart.
            bits, cost = diversity(pattern) + 0.004 * (k - (len(networks) - 1) / 2), 100 * (np.asarray(ratios) - 1)
            span = [[cost.mean() - cost.min()], [cost.max() - cost.mean()]]
            first = pattern == min(patterns, key=diversity)
            look = {"color": HUES[k % len(HUES)], "marker": MARKS[k % len(MARKS)], "markersize": 5, "capsize": 2}
            panel.errorbar([bits], [cost.mean()], yerr=span, label=name if first else None, **look)
    patterns = sorted({pattern for each in networks.values() for pattern in each}, key=diversity)
    panel.set_xticks([diversity(each) for each in patterns], [f"{each}\n{diversity(each):.2f}" for each in patterns])
    panel.set(xlabel="pattern, and bits per weight to choose a mask", ylabel="perplexity over dense (%)")
    panel.legend(fontsize=8, frameon=False)
    plain_axes(panel)
    return saved(figure, path)


def main(
    results: Annotated[Path, typer.Option(help="Lines of bench.py.")] = HERE / "results" / "cpu_inference.jsonl",
    figures: Annotated[Path, typer.Option(help="Folder to draw into.")] = HERE / "figures",
) -> None:
    """Draw every figure for which there are lines, and name the others."""
    every = [json.loads(line) for line in results.read_text().splitlines()]
    lines = [line for line in every if "measures" in line]
    if not lines:
        raise ValueError(f"results: {results} has no lines of this version of bench.py; run it first")
    lines = latest(lines)
    figures.mkdir(parents=True, exist_ok=True)
    panels = map_cells(lines)
    if panels:
        speedup_map(panels, title="Times faster than torch.nn.GRU: 1350 units, 1 thread", path=figures / "speedup.png")
        print(f"wrote {figures / 'speedup.png'}: {', '.join(f'{k}, {len(v)} cells' for k, v in panels.items())}")
    else:
        print("speedup.png: not drawn, it needs the lines of bench.py --grid")
    pruned = results.parent / "pruning_sweep.jsonl"
    if pruned.exists():
        draw_pruned([json.loads(line) for line in pruned.read_text().splitlines()], figures)
    roofline(points(lines), title="How close to the limits of the machine", path=figures / "roofline.png")
    print(f"wrote {figures / 'roofline.png'}: {len(points(lines))} cases")


def speedup_map(
    panels: Mapping[str, Mapping[tuple[float, float], float]],
    *,
    across: str = "activity",
    down: str = "sparsity",
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Speed-ups as a heat map: one cell per measured pair, one panel per name, one logarithmic scale centred on 1.

    panels       : name -> {(share across, share down): speed-up, > 0}; pairs that were not measured are hatched
    across, down : names of the two shares, which lie in [0, 1]

    Raises ValueError where nothing was measured or a speed-up is not a positive finite number.
    """
    cells = [value for panel in panels.values() for value in panel.values()]
    if not cells or not all(np.isfinite(value) and value > 0 for value in cells):
        raise ValueError("panels: need at least one measured pair, every speed-up finite and above 0")
    from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

    columns, rows = (sorted({pair[k] for panel in panels.values() for pair in panel}) for k in (0, 1))
    figure = new_figure(1.6 + len(panels) * (0.6 + 0.5 * len(columns)), 1.5 + 0.42 * len(rows))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    # White at 1 and darker to both sides, so that slower and faster differ in brightness as well as in colour.
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
        plain_axes(panel_axes)
        panel_axes.spines[["left", "bottom"]].set_visible(False)
    axes[0].set_ylabel(f"{down} (%)")
    marks = [1, *(step * 10.0**k for k in range(-3, 5) for step in (1, 2, 5))]
    shown = sorted({mark for mark in marks if slowest <= np.log10(mark) <= fastest})
    bar = figure.colorbar(image, ax=axes, pad=0.02, label="times faster")
    bar.set_ticks(np.log10(shown).tolist(), labels=[f"{mark:g}" for mark in shown])
    bar.ax.tick_params(labelsize=8)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return saved(figure, path)


def roofline(
    cases: Sequence[Mapping],
    *,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Roofline: operations per second over operations per byte of weights, below the limits of the machine.

    cases : each with `gflop_s` (two per executed multiplication), `bandwidth_gb_s`, `probe_gb_s` (the fastest read of
            the same bytes), `fma_gflop_s` (FMA in registers only), `group` (colour and marker) and, for a bar of its
            own on the right, `name`. A bar shows the shares of the read rate and of the FMA rate that were reached

    Raises ValueError where there is no case.
    """
    if not cases:
        raise ValueError("cases: got none, need at least one")
    named = [case for case in cases if case.get("name")]
    figure = new_figure(12.5 if named else 6.6, max(4.6, 1.2 + 0.24 * len(named)))
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
            intensity[of_group],
            rate[of_group],
            s=26,
            edgecolors="white",
            linewidths=0.5,
            zorder=3,
            label=group,
            color=HUES[k % len(HUES)],
            marker=MARKS[(k + k // len(HUES)) % len(MARKS)],
        )
    left.set(xscale="log", yscale="log", xlabel="operations per byte of weights (FLOP/B)", ylabel="GFLOP/s")
    left.set_ylim(rate.min() / 2, peaks.max() * 1.6)
    left.yaxis.set_major_formatter("{x:g}")
    left.xaxis.set_major_formatter("{x:g}")
    left.legend(fontsize=7, frameon=False, loc="lower right")
    for axes in right:
        _limits_panel(axes, named, groups)
    for axes in (left, *right):
        plain_axes(axes)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return saved(figure, path)


def pruning_curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    dense: float,
    *,
    quality: str = "perplexity",
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Quality over the share of weights pruned: one panel per method, one line per block.

    panels : name of a panel -> name of a line -> (share pruned, quality)
    dense  : quality of the unpruned network, a horizontal line in every panel

    The panels share their axes; the axis of quality is logarithmic. Raises ValueError where there is no point or a
    value is not finite.
    """
    from matplotlib.ticker import LogLocator

    points = [point for lines in panels.values() for line in lines.values() for point in line]
    if not points or not (np.isfinite(np.array(points)).all() and np.isfinite(dense)):
        raise ValueError(f"panels: got {dict(panels)} beside {dense}, need at least one point, all of them finite")
    names = sorted({label for lines in panels.values() for label in lines}, key=lambda name: (len(name), name))
    # The open marks of a line are larger than those of the lines drawn over it, so that equal points all show.
    looks = {
        name: {
            "color": HUES[k % len(HUES)],
            "marker": MARKS[k % len(MARKS)],
            "markersize": 4 + 1.5 * (len(names) - 1 - k),
            "markerfacecolor": "none",
            "linewidth": 1.2,
            "zorder": 2 + k / len(names),
        }
        for k, name in enumerate(names)
    }
    figure = new_figure(3.6 * len(panels), 3.4)
    every = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, lines) in zip(every, panels.items(), strict=True):
        axes.axhline(dense, color=GREY, linewidth=1, linestyle="--", label="not pruned")
        for label, line in lines.items():
            share, value = np.asarray(sorted(line), float).T
            axes.plot(100 * share, value, label=label, **looks[label])
        axes.set(xlabel="weights pruned (%)", yscale="log")
        axes.set_title(name, loc="left", fontsize=10)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 6, 8)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        plain_axes(axes)
    every[0].set_ylabel(f"{quality} (validation)")
    marks = {label: mark for axes in every for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    order = ["not pruned", *names]
    figure.legend([marks[name] for name in order], order, loc="outside right upper", fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return saved(figure, path)


def _limits_panel(axes: Axes, cases: Sequence[Mapping], groups: list) -> None:
    """One line per case, the first on top: the shares of the probe's read rate and of the FMA rate that it reaches."""
    for k, case in enumerate(reversed(cases)):
        colour = HUES[groups.index(case["group"]) % len(HUES)]
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


if __name__ == "__main__":
    command(main, __doc__).run()
