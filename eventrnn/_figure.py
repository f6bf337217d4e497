"""A figure of matplotlib that notebooks show. Imported by `canvas.new_figure` only, since it needs matplotlib."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure without pyplot, which would otherwise have to be told of it to show it in a notebook."""

    def _repr_png_(self) -> bytes:
        """The figure as a notebook asks for it, at the end of a cell."""
        raw = BytesIO()
        self.savefig(raw, format="png")
        return raw.getvalue()
