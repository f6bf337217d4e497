"""`eventrnn report`: a training run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from eventrnn._files import printable, write_whole
from eventrnn.cli.imports import own_model
from eventrnn.cli.options import NO_VOCABULARY, Force, Json, Part, Unknown, load_symbols, writable_file
from eventrnn.cli.terminal import as_line, progress
from eventrnn.training.recipes.run_folder import CONFIG, run_table

# The ending of the folder that `eventrnn train` makes beside a model file.
RUN_ENDING = ".run"


def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a training run.")],
    out: Annotated[
        Path | None, typer.Option("--html", "--out", "-o", help="Page to write, .html. [FOLDER.html]")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model file of the run. [the one beside the folder, where there is one]")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text to count operations on. [that of the training]")] = None,
    part: Part = "valid",
    symbols: Annotated[int, typer.Option(help="Number of symbols to read, at most.")] = 2000,
    unknown: Unknown = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a page about a training run: curves, weights, operations, configuration. It opens without a network."""
    from eventrnn import report as pages

    if symbols < 1:
        raise ValueError(f"symbols: got {symbols}, need a whole number >= 1")
    whole = folder.resolve()
    # The folder may be named by "." alone.
    out = out or (whole if folder.name in ("", "..") else folder).parent / f"{whole.name}.html"
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"html: got {out}, need a name that ends in .html")
    writable_file(out, force, "html")
    beside = whole.with_suffix("") if whole.name.endswith(RUN_ENDING) else None
    path = model or (beside if beside is not None and beside.is_file() else None)
    measured = None
    if path is not None:
        network = own_model(path)
        if "vocabulary" in network.metadata:
            source = _text_of(folder) if text is None else text
            try:
                read = load_symbols(network, source, part, unknown)[:symbols]
            except (ValueError, OSError) as error:
                if text is not None or not str(error).startswith("text: "):
                    raise
                raise ValueError(f"{error}; this is the text of the training; --text names another") from None
            measured = pages.Measured(network, read, f"the {part} part of {source}")
        elif model is not None or text is not None:
            raise ValueError(f"{NO_VOCABULARY}. For a page without operations leave out --model and --text")
    elif text is not None:
        raise ValueError("text: got a text but there is no model beside the folder; give --model")
    with progress() as bar:
        page = pages.run_report(folder, model=measured, report=lambda *done: bar("report", *done))
    write_whole(out.resolve(), page.encode(), overwrite=force)
    print(as_line({"wrote": str(out)}) if as_json else f"wrote {printable(out)}")


def _text_of(folder: Path) -> str:
    """The text that a run was trained on. Raises ValueError where its configuration does not say it."""
    try:
        table = run_table(folder)
        return str(table["task" if "task" in table else "data"]["text"])
    except (OSError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"text: {printable(folder / CONFIG)} does not say the text of the training; give --text"
        ) from None
