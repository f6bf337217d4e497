"""The figure of dynamic_blocks.py: perplexity over operations, and how often every block is chosen."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eventrnn.canvas import GREY, HUES, MARKS, new_figure, plain_axes, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def quality_figure(lines: Sequence[Mapping[str, Any]], *, path: str | os.PathLike | None = None) -> Figure:
    """Left: perplexity over operations of the two matrices, gates included, a mark per seed. Right: share of the tokens
    that chose each block, sorted, of the first seed of each variant with gates.

    lines : lines of `dynamic_blocks.py quality` of one cell and size. Raises ValueError where there is none.
    """
    if not lines:
        raise ValueError("lines: got none, need those of `quality`")
    figure = new_figure(9.0, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    variants = list(dict.fromkeys(line["variant"] for line in lines))
    for k, variant in enumerate(variants):
        own = [line for line in lines if line["variant"] == variant]
        look = {"color": HUES[k % len(HUES)], "label": variant}
        left.scatter(
            [line["executed"] + line["selection"] for line in own],
            [line["perplexity_valid"] for line in own],
            # A colour that comes again has another mark.
            marker=MARKS[(k + k // len(HUES)) % len(MARKS)],
            s=28,
            **look,
        )
        for name, shares in own[0].get("usage", {}).items():
            places = [(place + 0.5) / len(shares) for place in range(len(shares))]
            dashes = "-" if name.endswith("w_in") else ":"
            right.plot(places, sorted(shares, reverse=True), dashes, linewidth=1, color=look["color"])
    densities = {line["density"] for line in lines if line.get("density")}
    for density in densities:
        right.axhline(density, color=GREY, linewidth=0.8)
    left.set(xlabel="multiplications per token of the two matrices, gates included", ylabel="perplexity, validation")
    cell, words = lines[0]["cell"].upper(), lines[0]["symbols"]
    left.set_title(f"{cell} of {lines[0]['hidden']} units, {words:,} words", loc="left")
    left.legend(fontsize=7, frameon=False, ncols=2)
    right.set(xlabel="blocks, most chosen first", ylabel="share of the tokens that chose the block")
    right.set_title("solid: inputs; dotted: recurrent", loc="left")
    right.set_ylim(0, 1.02)
    for axes in (left, right):
        plain_axes(axes)
    return saved(figure, path)
