"""A training run as one HTML page that needs no other file: figures, tables, configuration and versions.

The page opens offline, follows the light or dark theme of the reader, and fits a phone. Text from files is escaped.
Needs the `plots` extra.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn import __version__, counting, plots
from eventrnn._checks import need_whole
from eventrnn._files import printable
from eventrnn.bench import device, versions
from eventrnn.margins import threshold_margins
from eventrnn.network import Network
from eventrnn.simulation import simulate
from eventrnn.training import read_log
from eventrnn.training.recipes.run_folder import CONFIG

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Figures of a validation by which a run is judged, the first that it has: name -> whether less is better.
QUALITIES = {"perplexity": True, "bits": True, "accuracy": False, "loss": True}

# Validations that the table shows; of more, evenly spaced ones.
ROWS = 20

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --paper: #ffffff; --soft: #5c6570; --line: #d9dde2; --tile: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #15181c; --soft: #a2abb5; --line: #3a4149; --tile: #1f2429; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1.2rem; color: var(--ink); background: var(--paper);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
p { color: var(--soft); margin: .2rem 0 .8rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
dl div { background: var(--tile); border-radius: .4rem; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; } dd { margin: 0; font-size: 1.2rem; overflow-wrap: anywhere; }
figure { margin: 0 0 1rem; overflow-x: auto; } svg { width: 100%; min-width: 34rem; height: auto; }
svg text { fill: currentColor; }
/* A map of weights is a picture of pixels from white, no weight, to black. */
@media (prefers-color-scheme: dark) { svg image { filter: invert(1); } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child { text-align: left; }
details { margin: .6rem 0; } summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--tile); border-radius: .4rem; padding: .8rem; font-size: .85rem; }
"""


@dataclass(frozen=True)
class RunLog:
    """The log of a run that has been validated.

    lines   : of the log
    seen    : of these, the ones with a validation
    quality : name of the figure in `QUALITIES` by which the run is judged
    """

    lines: Sequence[Mapping[str, Any]]
    seen: Sequence[Mapping[str, Any]]
    quality: str

    def points(self) -> list[tuple[float, float, float]]:
        """(update, quality, activity) of the validations in which both are finite numbers."""
        found = [(line["step"], *(line["validation"].get(n) for n in (self.quality, "activity"))) for line in self.seen]
        return [point for point in found if all(map(_finite, point))]

    def best(self) -> Mapping[str, Any]:
        """The line of the best validation."""
        sign = 1 if QUALITIES[self.quality] else -1
        judged = [line for line in self.seen if _finite(line["validation"].get(self.quality))]
        return min(judged, key=lambda line: sign * line["validation"][self.quality])


def read_run(folder: Path, name: str = "folder") -> RunLog:
    """The log in the folder of a run. Raises ValueError, which begins with `name`, where there is none, and for a run
    without a validation whose figures are finite."""
    if not folder.is_dir():
        raise ValueError(
            f"{name}: {printable(folder)} is not the folder of a run; eventrnn train writes it to MODEL.run"
        )
    try:
        lines = read_log(folder)
    except FileNotFoundError:
        raise ValueError(f"{name}: {printable(folder)} holds no log of a run") from None
    lines = [line for line in lines if _finite(line["step"]) and _finite(line.get("seconds"))]
    seen = [line for line in lines if line["validation"]]
    if not seen:
        raise ValueError(f"{name}: the run in {printable(folder)} has not been validated yet")
    quality = next((each for each in QUALITIES if any(_finite(line["validation"].get(each)) for line in seen)), None)
    if quality is None:
        raise ValueError(
            f"{name}: the validations of the run in {printable(folder)} have no finite {', '.join(QUALITIES)}"
        )
    return RunLog(lines, seen, quality)


@dataclass(frozen=True)
class Measured:
    """A model of a run, and what it does on a text.

    network : the model
    symbols : (steps,) integers that it reads
    text    : words for this text
    """

    network: Network
    symbols: np.ndarray
    text: str


def run_report(
    folder: str | os.PathLike,
    *,
    model: Measured | None = None,
    shown: int = 200,
    report: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> str:
    """The page of a training run.

    Parameters
    ----------
    folder : of the run: its log and, where `eventrnn train` wrote it, its configuration
    model  : the model that the run wrote, with a text to read; None for a page without weights and operations
    shown  : steps of the figure of operations, at most
    report : called before every part with the parts done, their number, and what is done next

    Reading the text takes a simulation with recorded events and states: O(steps * units) memory. Raises ValueError for
    a folder without a log or with a run that has not been validated, and ImportError where matplotlib is missing.
    """
    folder = Path(folder)
    need_whole("shown", shown, at_least=1)
    log = read_run(folder)
    parts = [("drawing the curves", lambda: _training(log))]
    if model is not None:
        parts += [
            ("drawing the weights", lambda: _model(model.network)),
            (f"reading {len(model.symbols):,} symbols and counting", lambda: _operations(model, shown)),
        ]
    parts.append(("writing the page", lambda: _configuration(folder) + _versions()))
    sections = []
    for done, (words, part) in enumerate(parts):
        report(done, len(parts), words)
        sections.append(part())
    best, last = log.best(), log.lines[-1]
    tiles = {
        f"best {log.quality}": f"{best['validation'][log.quality]:,.4g}",
        "at update": f"{best['step']:,} of {last['step']:,}",
        "activity": _percent(best["validation"].get("activity")),
        "training": _duration(last["seconds"]),
    }
    if model is not None:
        matrices = model.network.matrices().values()
        tiles["weights"] = f"{sum(w.nnz for w in matrices):,}"
        tiles["weights left"] = _percent(sum(w.nnz for w in matrices) / sum(np.prod(w.shape) for w in matrices))
    return _page(folder.resolve().name, tiles, sections)


def _training(log: RunLog) -> str:
    points = log.points()
    losses = [(line["step"], line["loss"], line["activity"]) for line in log.lines]
    losses = [point for point in losses if all(map(_finite, point))]
    drawn = [
        inline_svg(plots.learning_curves({"run": found}, quality=quality, measured=measured))
        for found, quality, measured, least in (
            (losses, "loss", "training", 2),
            (points, log.quality, "validation", 1),
        )
        if len(found) >= least
    ]
    chosen = sorted({int(k) for k in np.linspace(0, len(log.seen) - 1, min(ROWS, len(log.seen)))})
    columns = list(dict.fromkeys(name for line in log.seen for name in line["validation"]))
    rows = [
        [f"{line['step']:,}", _cell(line["loss"], "loss"), *(_cell(line["validation"].get(c), c) for c in columns)]
        for line in (log.seen[k] for k in chosen)
    ]
    note = "" if len(chosen) == len(log.seen) else f"<p>{len(chosen)} of {_several(len(log.seen), 'validation')}.</p>"
    words = (
        f"{_several(len(log.lines), 'line')} of the log, {_several(len(log.seen), 'validation')}, "
        f"{_several(log.lines[-1]['step'], 'update')}."
    )
    if left_out := len(log.seen) - len(points):
        words += f" {_several(left_out, 'validation')} without a finite {log.quality} and activity not drawn."
    return _section("Training", words, *drawn, _table(["update", "loss", *columns], rows), note)


def _model(network: Network) -> str:
    rows = []
    for name, weights in network.matrices().items():
        size = weights.shape[0] * weights.shape[1]
        shape = f"{weights.shape[0]} × {weights.shape[1]}"
        rows.append(
            [name, shape, weights.name, weights.storage, f"{weights.nnz:,}", _percent(weights.nnz / max(1, size))]
        )
    cells = ", ".join(f"{layer.units} ({layer.cell.name})" for layer in network.layers)
    masks = plots.mask_map(network.matrices())
    table = _table(["matrix", "shape", "format", "storage", "weights", "left"], rows)
    return _section("Weights", f"Units of the layers: {cells}.", inline_svg(masks), table)


def _operations(model: Measured, shown: int) -> str:
    network = model.network
    result = simulate(network, model.symbols[:, None], record=("events", "states"))
    counts = counting.count(network, result)
    per_step = {
        name: found["effective"][:shown].sum(axis=1)
        for name, found in counting.count_per_step(network, result).items()
        if "effective" in found
    }
    steps = counts.sample_steps
    rows = [
        [
            name,
            *(
                f"{getattr(found, column) / steps:,.0f}"
                for column in ("dense", "effective", "executed", "weight_bytes")
            ),
        ]
        for name, found in {**counts.matrices, "total": counts.total}.items()
    ]
    margins = threshold_margins(network, result)
    agrees = "agrees" if counting.audit(network, result, counts).agrees else "does not agree"
    return _section(
        "Operations",
        f"Per step, over {steps:,} symbols of {model.text}: {counts.reduction:,.1f} times fewer multiplications than "
        f"dense. The audit, which counts by another route, {agrees}.",
        inline_svg(plots.operations_by_step(per_step, dense=counts.total.dense / steps)),
        _table(["matrix", "dense", "effective", "executed", "bytes of weights"], rows),
        inline_svg(plots.margins(margins)) if margins else "",
    )


def _configuration(folder: Path) -> str:
    path = folder / CONFIG
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        text = f"# not readable as TOML: {error}\n{text}"
    words = f"{CONFIG} of the run: `eventrnn train --config` repeats it."
    return _section("Configuration", words, f"<details><summary>{CONFIG}</summary><pre>{_text(text)}</pre></details>")


def _versions() -> str:
    rows = [[name, found] for name, found in versions().items()]
    words = f"Where this page was made: {device()}."
    return _section("Versions", words, _table(["package", "version"], rows))


def inline_svg(figure: Figure) -> str:
    """A figure as SVG that takes the colour of the text around it, so that it suits both themes.

    Text stays text. Identifiers differ from figure to figure, since a page holds several.
    """
    from matplotlib import rc_context

    for patch in (figure.patch, *(axes.patch for axes in figure.axes)):
        patch.set_alpha(0.0)
    raw = StringIO()
    with rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(raw, format="svg", metadata={"Date": None, "Creator": None}, dpi=160)
    drawn = raw.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    # Black and the dark grey of labels are the ink of the page.
    drawn = re.sub(r"#000000|#222222|(?<=[\s:])black\b", "currentColor", drawn)
    return f"<figure>{drawn}</figure>"


def _page(title: str, tiles: Mapping[str, str], sections: Iterable[str]) -> str:
    shown = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in tiles.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n<p>Training run, reported by eventrnn {__version__}</p>\n<dl>{shown}</dl>\n"
        f"{''.join(sections)}</body>\n</html>\n"
    )


def _section(title: str, words: str, *parts: str) -> str:
    code = re.sub(r"`([^`]+)`", r"<code>\1</code>", _text(words))
    return f"<section>\n<h2>{_text(title)}</h2>\n<p>{code}</p>\n{''.join(parts)}</section>\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>\n'


def _text(words: str) -> str:
    """Text for HTML, with control characters escaped but for line ends."""
    return "\n".join(escape(printable(line)) for line in words.split("\n"))


def _cell(value: Any, column: str) -> str:
    if not isinstance(value, int | float):
        return "–"
    return _percent(value) if column.endswith("activity") else f"{value:,.4g}"


def _finite(value: Any) -> bool:
    """Whether it is a number, and neither infinite nor NaN."""
    return type(value) in (int, float) and isfinite(value)


def _several(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _percent(share: Any) -> str:
    return f"{share:.1%}" if isinstance(share, int | float) else "–"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
