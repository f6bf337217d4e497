"""The figure of a sweep: a figure of every point over one of its settings, or over another figure."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn._checks import need_choice
from eventrnn.canvas import HUES, MARKS, new_figure, plain_axes, saved
from eventrnn.sweeps.results import DONE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEED = "training.seed"

# The axis is logarithmic where its numbers span more than this factor.
LOGARITHMIC = 9.0


def sweep_figure(
    lines: Sequence[Mapping[str, Any]],
    axes: Sequence[str],
    *,
    x: str | None = None,
    y: str = "bits_per_symbol_best",
    by: Sequence[str] | None = None,
    title: str | None = None,
    path: str | os.PathLike | None = None,
) -> Figure:
    """A dot per point, and a line through the means of the points that are equal in all but their seeds.

    Parameters
    ----------
    lines : of `read_results`; points that failed, and those without finite numbers, are left out
    axes  : settings in which points differ, as of `Sweep.axes`
    x     : setting or figure on the horizontal axis; by default the first setting of numbers that varies and is no
            seed, or else the first that varies
    y     : figure on the vertical axis
    by    : settings whose values have a colour each; by default all that vary, without x and the seed

    Raises ValueError for a name that the lines do not have, and where no point is left to draw.
    """
    done = [line for line in lines if line["state"] == DONE]
    if not done:
        raise ValueError("sweep: no point is done, so there is nothing to draw")
    varying = [key for key in axes if len({_known(line.get(key)) for line in done}) > 1]
    names = list(dict.fromkeys([*axes, *(name for line in done for name in line)]))
    x = need_choice("x", _first(done, varying, axes) if x is None else x, names)
    need_choice("y", y, names)
    by = [key for key in varying if key not in (x, SEED)] if by is None else list(by)
    for key in by:
        need_choice("by", key, names)
    shown = [line for line in done if _is_number(line.get(y)) and line.get(x) is not None]
    if not shown:
        raise ValueError(f"y: no point has a finite {y} and a value of {x}; need one of {', '.join(_numbers(done))}")

    figure = new_figure(7.2, 4.2)
    panel = figure.subplots()
    numeric = all(_is_number(line[x]) for line in shown)
    places = {} if numeric else {value: k for k, value in enumerate(dict.fromkeys(_known(line[x]) for line in shown))}
    groups: dict[str, list[tuple[float, float]]] = {}
    for line in shown:
        label = ", ".join(f"{key} = {line.get(key)}" for key in by)
        place = float(line[x]) if numeric else float(places[_known(line[x])])
        groups.setdefault(label, []).append((place, float(line[y])))
    for k, (label, points) in enumerate(groups.items()):
        look: dict[str, Any] = {"color": HUES[k % len(HUES)], "marker": MARKS[k % len(MARKS)]}
        place, value = np.array(sorted(points)).T
        panel.scatter(place, value, s=16, alpha=0.6, linewidths=0, **look)
        if x in axes:
            single, which = np.unique(place, return_inverse=True)
            means = np.bincount(which, weights=value) / np.bincount(which)
            panel.plot(single, means, linewidth=1.2, color=look["color"])
        panel.plot([], [], linewidth=1.2, markersize=4, label=label.replace("$", r"\$"), **look)
    if places:
        panel.set_xticks(list(places.values()), [str(value).replace("$", r"\$") for value in places])
    elif _spans(line[x] for line in shown):
        panel.set_xscale("log")
    panel.set(xlabel=x, ylabel=y)
    panel.set_title(title or f"{len(shown)} of {len(lines)} points", loc="left")
    if any(groups):
        panel.legend(fontsize=7, frameon=False)
    plain_axes(panel)
    return saved(figure, path)


def _first(done: Sequence[Mapping[str, Any]], varying: Sequence[str], axes: Sequence[str]) -> str:
    """The setting to draw over."""
    others = [key for key in varying if key != SEED]
    numeric = [key for key in others if all(_is_number(line.get(key)) for line in done)]
    return [*numeric, *others, *varying, *axes][0]


def _numbers(done: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in done[0] if _is_number(done[0][name]) and name != "point"]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _known(value: Any) -> Any:
    """A setting as a key; a list that a caller made of its text is a text again."""
    return value if isinstance(value, str | int | float | type(None)) else str(value)


def _spans(values: Any) -> bool:
    numbers = [float(value) for value in values]
    return min(numbers) > 0 and max(numbers) > LOGARITHMIC * min(numbers)
