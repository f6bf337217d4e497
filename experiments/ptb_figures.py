"""Figures of ptb.py: perplexity over operations beside published points, and whether the two savings multiply."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eventrnn.canvas import GREY, HUES, INK, MARKS, new_figure, plain_axes, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Published test perplexities and multiplications per token, in millions, with the decoder: name -> (MAC, perplexity,
# source). EGRU: the first version of Subramoney et al. (arXiv 2206.06178), table 3; later versions give no operations.
PUBLISHED = {
    "AWD-LSTM": (24.2, 57.3, "Merity et al. 2017"),
    "LSTM": (24.0, 59.6, "Melis et al. 2017"),
    "GRU 1350": (24.0, 68.8, "Subramoney et al., v1"),
    "EGRU 1350": (4.7, 64.5, "Subramoney et al., v1"),
    "EGRU 2000": (6.6, 63.7, "Subramoney et al., v1"),
    "EGRU 2700": (8.1, 63.5, "Subramoney et al., v1"),
}

# "Up to 20 times fewer operations with perplexity below 60" (Mukherji et al. 2023, abstract), here of AWD-LSTM's.
CLAIM = (1.2, 60.0)


def operations_figure(lines: Sequence[Mapping[str, Any]], *, path: str | os.PathLike | None = None) -> Figure:
    """Perplexity over operations per token: evaluated models beside published ones.

    lines : lines of `ptb.py evaluate`. Filled marks are the test text, hollow ones the validation text where the test
            text was not read
    """
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots()
    for name, (millions, perplexity, _) in PUBLISHED.items():
        axes.scatter(1e6 * millions, perplexity, color=GREY, marker="x", s=30, zorder=2)
        # A name stands left of its mark, because the marks on the right edge leave no room; one would hide another.
        place = {"ha": "right", "va": "top" if name == "EGRU 2700" else "bottom"}
        axes.annotate(
            name, (1e6 * millions, perplexity), (-4, 0), textcoords="offset points", fontsize=7, color=INK, **place
        )
    axes.scatter(
        1e6 * CLAIM[0], CLAIM[1], color=GREY, marker="+", s=70, label="claim of Mukherji et al. 2023", zorder=2
    )
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        kind = f"pruned {line['pruned']}" if line["pruned"] else "not pruned"
        groups.setdefault(f"{line['model'].upper()}, {kind}", []).append(line)
    for k, (group, members) in enumerate(groups.items()):
        for n, line in enumerate(members):
            part = "test" if "test" in line else "valid"
            axes.scatter(
                line[part]["effective"],
                line[part]["perplexity"],
                facecolors=HUES[k % len(HUES)] if part == "test" else "none",
                edgecolors=HUES[k % len(HUES)],
                marker=MARKS[k % len(MARKS)],
                s=34,
                zorder=3,
                label=group if n == 0 else None,
            )
    axes.set(xscale="log", xlabel="multiplications per token, decoder included", ylabel="perplexity")
    axes.set_title(
        "Penn Treebank: filled test text, hollow validation text, crosses published", loc="left", fontsize=10
    )
    axes.legend(fontsize=8, frameon=False)
    plain_axes(axes)
    return saved(figure, path)


# Times the perplexity of the model as it is, above which a point of a grid is drawn hollow: it predicts little.
USEFUL = 3


def grid_figure(
    lines: Sequence[Mapping[str, Any]],
    tuned: Sequence[Mapping[str, Any]] = (),
    *,
    path: str | os.PathLike | None = None,
) -> Figure:
    """Operations over dense operations against activity x density: on the diagonal the two savings multiply.

    lines : lines of `ptb.py grid` of one model, pruned at once. A network whose perplexity is more than three times
            that of the model as it is has a hollow mark
    tuned : lines of models that were pruned while they were trained

    Raises ValueError where there are no lines.
    """
    if not lines:
        raise ValueError("lines: got none, need the lines of a grid")
    figure = new_figure(7.2, 3.6)
    left, right = figure.subplots(1, 2)
    every = [*lines, *tuned]
    shares = [line["activity"] * line["density"] for line in every]
    left.plot([min(shares), max(shares)], [min(shares), max(shares)], color=GREY, linewidth=1)
    right.axhline(1, color=GREY, linewidth=1)
    first = min(lines, key=lambda line: (line["added"], -line["kept"]))["perplexity"]
    groups = {f"thresholds +{added:g}": added for added in dict.fromkeys(line["added"] for line in lines)}
    chosen = [(name, [line for line in lines if line["added"] == added]) for name, added in groups.items()]
    for k, (name, row) in enumerate([*chosen, ("pruned in training", list(tuned))]):
        colour = INK if row and row[0] in tuned else HUES[k % len(HUES)]
        marker = "*" if colour == INK else MARKS[k % len(MARKS)]
        for n, line in enumerate(row):
            look = {
                "marker": marker,
                "s": 60 if marker == "*" else 18,
                "edgecolors": colour,
                "facecolors": colour if line["perplexity"] <= USEFUL * first else "none",
                "zorder": 3,
                "label": name if n == 0 else None,
            }
            left.scatter(line["activity"] * line["density"], line["effective"] / line["dense"], **look)
            right.scatter(line["density"], line["ratio"], **look)
    left.set(xscale="log", yscale="log", xlabel="activity x density", ylabel="operations / dense operations")
    right.set(xscale="log", xlabel="density", ylabel="operations / (dense x activity x density)")
    for n, line in enumerate(tuned):
        label = "the same, product within each matrix" if n == 0 else None
        right.scatter(line["density"], line["ratio_by_matrix"], color=INK, marker="x", s=30, zorder=3, label=label)
    if tuned:
        right.legend(*([part[-1:] for part in right.get_legend_handles_labels()]), fontsize=8, frameon=False)
    ratios = [line["ratio"] for line in every]
    right.set_ylim(min(0.8, *ratios) - 0.02, max(1.2, *ratios) + 0.02)
    left.set_title("On the line the savings multiply. Hollow: of little use", loc="left", fontsize=8)
    left.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        plain_axes(axes)
    return saved(figure, path)
