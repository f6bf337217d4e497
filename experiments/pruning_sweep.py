"""Pruned word models on the whole vocabulary of the Penn Treebank, as sweeps (after Narang et al. and Hubara et al.).

    python experiments/pruning_sweep.py plan gru.toml --cell gru             # what is trained
    eventrnn sweep gru.toml --out sweep-gru --workers 6                      # trains it on a GPU
    python experiments/pruning_sweep.py collect sweep-gru                    # a line of results per trained point
    python experiments/pruning_sweep.py table

A point is trained from random weights to its last epoch: dense, or pruned in the first half of its updates by one of
METHODS to one of SPARSITIES in one of BLOCKS; with `--masks`, to N:M masks of MASKS and to half of the single weights.
The points of a seed stand together, those of the first sparsity first, so that a sweep that is cut short has whole
tables. The embedding is also the read-out and as wide as the last layer; it is not pruned. Networks whose other layers
are larger are pruned to the weights of the dense one.

`collect` takes the figures of the runs and adds the bytes of the model file in each of STORAGES. It measures no time:
see `eventrnn bench inference --block`.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import typer
from records import Records
from rich.console import Console
from rich.table import Table

import eventrnn as er
from eventrnn.cli.options import writable_file
from eventrnn.cli.terminal import progress
from eventrnn.network import Network
from eventrnn.sweeps import read_results
from eventrnn.sweeps.plan import MODEL
from eventrnn.sweeps.results import saved_sweep
from eventrnn.training.recipes.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "pruning_sweep.jsonl"

# The recipe that all points share.
PRESET = "egru-ptb"

# Settings in which points differ, beside those of all points of a sweep that a line also holds.
AXES = ("model.hidden", "pruning.method", "pruning.nm", "pruning.block", "pruning.sparsity", "training.seed")
SHARED = (
    "data.text",
    "model.cell",
    "model.embedding",
    "training.epochs",
    "training.learning_rate",
    "training.precision",
)
KEY = (*SHARED, *AXES)

SPARSITIES = (0.9, 0.8, 0.95)
BLOCKS = ((1, 1), (1, 16), (4, 4), (16, 16), (32, 32))
METHODS = ("threshold", "lasso", "magnitude")
MASKS = ("2:4", "4:8", "4:8:both", "8:16:both")
STORAGES = ("float32", "bfloat16", "int8")

# A GRU has no silent units that a penalty could wake.
OF_CELL: dict[str, dict[str, Any]] = {"egru": {}, "gru": {"training.regularisers.activity_rate": 0.0}}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)


def points(hidden: list[int], larger: float, seeds: int) -> Iterator[dict[str, Any]]:
    """The settings in which each point differs from the others, in the order in which they are trained."""
    wide = [*(int(larger * units) for units in hidden[:-1]), hidden[-1]]
    for seed, sparsity in product(range(seeds), SPARSITIES):
        own = {"training.seed": seed}
        if sparsity == SPARSITIES[0]:
            yield own | {"model.hidden": hidden}
        for (r, c), method in product(BLOCKS, METHODS):
            yield own | pruned(hidden, method, (r, c), sparsity)
        if wide != hidden and sparsity == SPARSITIES[-1]:
            share = round(1 - weights(hidden) / weights(wide), 4)
            yield from (own | pruned(wide, METHODS[0], block, share) for block in BLOCKS)


def masked(hidden: list[int], seeds: int) -> Iterator[dict[str, Any]]:
    """The same of N:M masks: the dense network, half of the single weights, and masks drawn from the weights."""
    for seed in range(seeds):
        own = {"training.seed": seed, "model.hidden": hidden}
        yield own
        yield own | pruned(hidden, "magnitude", (1, 1), 0.5)
        yield from (own | {"pruning.method": "dynamic", "pruning.nm": pattern} for pattern in MASKS)


def pruned(hidden: list[int], method: str, block: tuple[int, int], sparsity: float) -> dict[str, Any]:
    """The settings of a pruned point."""
    rule = {"pruning.method": method, "pruning.block": list(block), "pruning.sparsity": sparsity}
    return {"model.hidden": hidden} | rule


def weights(hidden: list[int]) -> int:
    """The number of weights of the layers per gate; the embedding is as wide as the last of them."""
    return sum(units * (units + before) for units, before in zip(hidden, [hidden[-1], *hidden], strict=False))


def toml(value: Any) -> str:
    """A setting as TOML, whose strings, numbers and lists of numbers are those of JSON."""
    return json.dumps(value)


@app.command()
def plan(
    out: Annotated[Path, typer.Argument(help="File to write, for `eventrnn sweep`.")],
    cell: Annotated[str, typer.Option(help="egru, or gru for the dense cell.")] = "egru",
    hidden: Annotated[
        list[int] | None, typer.Option(min=1, help="Units of a layer; repeat for a stack. [1024 512]")
    ] = None,
    larger: Annotated[
        float,
        typer.Option(min=1, help="Units of all layers but the last in larger networks, as a multiple; 1 for none."),
    ] = 1.5,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training text.")] = 60,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each point.")] = 3,
    backend: Annotated[str, typer.Option(help="cuda, or cpu for a small case.")] = "cuda",
    masks: Annotated[bool, typer.Option("--masks", help="N:M masks in place of blocks.")] = False,
    text: Annotated[str, typer.Option(help="Folder with the three texts, or ptb.")] = "ptb",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Write the file of a sweep: every method, block and sparsity, and the dense network."""
    if cell not in OF_CELL:
        raise ValueError(f"cell: got {cell!r}, need one of {', '.join(OF_CELL)}")
    writable_file(out, force=force)
    units = list(hidden or (1024, 512))
    settings = {
        "data.text": text,
        "model.cell": cell,
        "model.embedding": units[-1],
        "training.epochs": epochs,
        "training.learning_rate": rate,
        "training.schedule.constant": 0.5,
        "training.regularisers.dropconnect": 0.3,
        "training.backend": backend,
        **OF_CELL[cell],
    }
    lines = [
        f"preset = {toml(PRESET)}",
        "",
        "[settings]",
        *(f"{key} = {toml(value)}" for key, value in settings.items()),
    ]
    for point in masked(units, seeds) if masks else points(units, larger, seeds):
        # What no point may have is refused here, not only by the sweep.
        load_recipe(preset=PRESET, settings=[*settings.items(), *point.items()])
        lines += ["", "[[points]]", *(f"{key} = {toml(value)}" for key, value in point.items())]
    out.write_text("\n".join(lines) + "\n")


@app.command()
def collect(
    folder: Annotated[Path, typer.Argument(help="Folder of the sweep, finished or not.")],
    results: Annotated[Path, typer.Option(help="File to which a line per point is appended.")] = RESULTS,
) -> None:
    """Append a line for every trained point that has none."""
    records, shared = Records(results, KEY), saved_sweep(folder).settings
    done = [line for line in read_results(folder) if line["state"] == "done"]
    with progress() as report:
        for number, line in enumerate(done):
            report("points", number, len(done), line["folder"])
            point = {key: shared.get(key) for key in SHARED} | {key: line.get(key) for key in AXES}
            # A text is known by its name, wherever it lies.
            point["data.text"] = Path(str(point["data.text"])).name
            if any(all(old.get(key) == point[key] for key in KEY) for old in records.lines):
                continue
            figures = {key: value for key, value in line.items() if key not in (*AXES, "point", "folder", "state")}
            records.add(point | figures | {"file_bytes": file_bytes(er.load(folder / line["folder"] / MODEL))})


def file_bytes(network: Network) -> dict[str, int]:
    """Bytes of the model file without the vocabulary and the embedding, for each storage of the weights."""
    bare, sizes = replace(network, metadata={}, embedding=None, readout=None), {}
    with tempfile.TemporaryDirectory() as scratch:
        for storage in STORAGES:
            path = Path(scratch) / f"{storage}.safetensors"
            matrices = {name: w.stored_as(storage) for name, w in bare.matrices().items()}
            er.save(bare.with_matrices(matrices), path)
            sizes[storage] = path.stat().st_size
    return sizes


@app.command()
def table(results: Annotated[Path, typer.Option(help="File of the lines.")] = RESULTS) -> None:
    """Show the mean of each point over its seeds, and how much worse than the dense network it reads."""
    groups: dict[str, dict[str, list[dict]]] = {}
    collected = Records(results, KEY).lines
    if not collected:
        raise ValueError(f"results: there is no line in {results}; the command collect writes them")
    for line in collected:
        model = json.dumps({key: line[key] for key in SHARED})
        rest = json.dumps({key: line[key] for key in AXES if key != "training.seed"})
        groups.setdefault(model, {}).setdefault(rest, []).append(line)
    for model, rows in groups.items():
        columns = ("units", "method", "pattern", "pruned", "seeds", "perplexity", "±", "over dense", "activity")
        shown = Table(*columns, "operations", *STORAGES, title=model)
        dense = [line for lines in rows.values() for line in lines if line["pruning.method"] is None]
        at = mean(line["perplexity_valid"] for line in dense) if dense else None
        whole = dense[0]["file_bytes"]["float32"] if dense else None
        for lines in rows.values():
            shown.add_row(*row(lines, at, whole))
        Console(width=150).print(shown)


def row(lines: list[dict], dense: float | None, whole: int | None) -> list[str]:
    """The cells of a point: `lines` of its seeds, the dense network's perplexity, and the bytes of its float32 file."""
    first, read = lines[0], [line["perplexity_valid"] for line in lines]
    sizes = [first["file_bytes"][storage] for storage in STORAGES]
    return [
        first["model.hidden"],
        first["pruning.method"] or "dense",
        first["pruning.nm"] or first["pruning.block"] or "",
        f"{first['pruning.sparsity'] or 0:.1%}",
        str(len(lines)),
        f"{mean(read):.2f}",
        f"{stdev(read):.2f}" if len(read) > 1 else "",
        f"{mean(read) / dense - 1:+.1%}" if dense else "",
        f"{mean(line['activity_valid'] for line in lines):.1%}",
        f"{mean(line['effective_ops_per_step'] for line in lines):,.0f}",
        *(f"{whole / size:.1f}x" if whole else f"{size:,}" for size in sizes),
    ]


if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError) as error:
        raise SystemExit(f"pruning_sweep.py: {error}") from None
