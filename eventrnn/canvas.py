"""What all figures share: colours and markers, an empty figure, plain axes, and the file of a picture."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from eventrnn._files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, BLUE, ORANGE = "#222222", "#b8bcc2", "#2a6fbb", "#e07b39"

# Colours that red-green colour-blind readers can tell apart (Okabe and Ito 2008); markers as a second cue.
HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#666666")

MARKS = ("o", "s", "^", "D", "v", "P", "X")

# Format of a picture whose name has no suffix.
DEFAULT_FORMAT = "png"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that size in inches, without pyplot. Raises ImportError where matplotlib is missing."""
    try:
        from eventrnn._figure import ShownFigure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'eventrnn[plots]'") from error
    return ShownFigure(figsize=(width, height), layout="constrained", facecolor="white")


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
