"""Pruned networks on the text of the Penn Treebank, as sweeps (after Narang et al. and Hubara et al.).

    python experiments/pruning_sweep.py plan gru.toml --cell gru             # what is trained
    eventrnn sweep gru.toml --out sweep-gru --workers 4                      # trains it on a GPU
    python experiments/pruning_sweep.py collect sweep-gru                    # a line of results per trained point
    python experiments/pruning_sweep.py convert sweep-gru                    # N:M without training, by AdaPrune
    python experiments/pruning_sweep.py table

A point is trained from random weights to its last epoch: dense, or pruned by one of RULES to a sparsity in one of
BLOCKS, or with N:M masks of MASKS. The learning rate falls from half-way on, so that every training ends where it stops
improving; a dense network that is trained for twice as long shows by how much that is not so. There are two networks:
the one of `--hidden`, and a smaller one of half of its units. The larger is pruned to 90 %, and also to the weights of
the smaller one; masks and rules are compared on the smaller one. Words are the whole vocabulary; their embedding is
also the read-out and as wide as the last layer, and is not pruned. The second task, `characters`, is the same text by
characters, for one layer with a read-out of its own.

A sweep has one or several of PARTS, in the order in which they are named, so that a sweep that is cut short has whole
answers. `collect` takes the figures of the runs and adds the bytes of the model file in each of STORAGES. `convert`
prunes dense networks, and those with half of their single weights, to N:M masks without training. Neither measures
time: see `block_steps.py`.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import numpy as np
import typer
from pruning_claims import best_dense, perplexity
from records import Records
from rich.console import Console
from rich.table import Table

import eventrnn as er
from eventrnn.cli.options import writable_file
from eventrnn.cli.terminal import progress
from eventrnn.network import Network
from eventrnn.pruning import NofM, adaprune, prune_to
from eventrnn.pruning.patterns import parse_nm
from eventrnn.sweeps import read_results
from eventrnn.sweeps.plan import MODEL
from eventrnn.sweeps.results import saved_sweep
from eventrnn.training.evaluation import evaluate_text
from eventrnn.training.recipes.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "pruning_sweep.jsonl"

# The recipe that all points share. Trainings are short and the networks small, which takes less noise. A matrix with a
# share of its weights has the DropConnect of a dense one times the root of the share (Han et al. 2015, section 3.2, of
# dropout): at 90 % a third. With all of it a pruned network learns the training text much worse than the dense one.
PRESET = "egru-ptb"
NOISE = {"dropout_input": 0.4, "dropout_top": 0.4}

# DropConnect of the larger and of the smaller dense network.
DROPCONNECT = (0.4, 0.25)

# Validations take a tenth of the time of a training where there is one after every epoch.
BETWEEN_VALIDATIONS = 824

# The recipe of characters: 5 million of them, 50 different ones.
CHARACTERS: dict[str, Any] = {
    "data.kind": "character",
    "model.embedding": 128,
    "model.tied": False,
    "training.window": 128,
    "training.regularisers.dropout_input": 0.0,
    "training.regularisers.dropout_words": 0.0,
    "training.regularisers.dropout_between": 0.0,
    "training.regularisers.dropout_top": 0.2,
}
OF_CHARACTERS = 1024

# Settings in which points differ, beside those of all points of a sweep that a line also holds. What neither has is
# that of the preset.
RULE = ("method", "nm", "block", "sparsity", "statistic", "scope", "exempt", "since", "until", "strength")
NOISES = tuple(f"training.regularisers.dropout_{name}" for name in ("input", "words", "between", "top"))
RATES = ("training.learning_rate", "training.schedule.constant", "training.weight_decay")
# A network that `convert` made has the name of the one that it began with.
TRAINED = ("training.regularisers.dropconnect", "training.epochs", "training.seed")
AXES = ("model.hidden", *(f"pruning.{name}" for name in RULE), *NOISES, *RATES, *TRAINED, "converted")
SHARED = ("data.text", "data.kind", "model.cell", "model.embedding", "training.precision")
KEY = (*SHARED, *AXES)

FIRST, OTHERS = 0.9, (0.8, 0.95)
SINGLE, BLOCKS = (1, 1), ((1, 16), (4, 4), (16, 16), (32, 32))

# Rules for blocks. The first two are those of Narang et al., without and with the group lasso. Both compare the largest
# weight of a block with a threshold. The last one compares norms, and leaves every group of units the same number of
# blocks, so that none is cut off; with large blocks a layer has few of them.
SPAN = {"since": 0.2, "until": 0.6}
RULES: dict[str, dict[str, Any]] = {
    "threshold": {"method": "threshold", **SPAN},
    "lasso": {"method": "lasso", **SPAN},
    "column": {"method": "magnitude", "statistic": "l2", "scope": "column", **SPAN},
}
BEST = "column"

# What else was tried with the largest blocks, each beside the best known rule in one respect.
ARMS: tuple[dict[str, Any], ...] = (
    {},
    {"pruning.since": 0.05, "pruning.until": 0.4},
    {
        "training.regularisers.dropout_input": 0.25,
        "training.regularisers.dropout_words": 0.05,
        "training.regularisers.dropout_between": 0.1,
    },
    {TRAINED[0]: 0.2},
    {"training.learning_rate": 3e-3},
    {"training.weight_decay": 0.03},
    {"pruning.scope": "matrix"},
    {"training.schedule.constant": 0.7},
    {"pruning.since": 0.4, "pruning.until": 0.8},
    {TRAINED[0]: 0.0},
    {"pruning.statistic": "max"},
)

# Masks are drawn once, from weights that have learnt.
MASKS, MASKED_SINCE = ("2:4", "4:8:both", "4:8"), 0.3
HALF = {"method": "magnitude", "sparsity": 0.5, **SPAN}

# Masks of networks that are converted, and steps and streams of the training text on which weights are refitted.
CONVERTED = ("2:4", "4:8:both")
CALIBRATION = (1000, 8)
STORAGES = ("float32", "bfloat16", "int8")

# A GRU has no silent units that a penalty could wake.
OF_CELL: dict[str, dict[str, Any]] = {"egru": {}, "gru": {"training.regularisers.activity_rate": 0.0}}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=__doc__)


@dataclass(frozen=True)
class Plan:
    """The points of a sweep.

    hidden      : units of the layers of the larger network
    epochs      : of every training but those for twice as long
    seeds       : the seed of every training, one after the other
    dropconnect : of the larger and of the smaller dense network
    """

    hidden: list[int]
    epochs: int
    seeds: list[int]
    dropconnect: tuple[float, float] = DROPCONNECT

    @property
    def smaller(self) -> list[int]:
        """Half of the units in all layers but the last one, or in the only one."""
        last = len(self.hidden) > 1
        return [*(units // 2 for units in self.hidden[: len(self.hidden) - last]), *self.hidden[-1:] * last]

    def one(
        self, seed: int, units: list[int], *, longer: int = 1, left: float | None = None, **rule: Any
    ) -> dict[str, Any]:
        """A point. left : the share of the weights by which DropConnect goes, where it is not that of the rule"""
        kept = left or (0.5 if "nm" in rule else 1 - rule.get("sparsity", 0.0))
        dropconnect = self.dropconnect[units != self.hidden]
        trained = (round(dropconnect * kept**0.5, 3), longer * self.epochs, seed)
        own = {"model.hidden": units} | dict(zip(TRAINED, trained, strict=True))
        return own | {f"pruning.{name}": value for name, value in rule.items()}

    def dense(self, seed: int) -> list[dict[str, Any]]:
        """Both networks."""
        return [self.one(seed, self.hidden), self.one(seed, self.smaller)]

    def noise(self, seed: int) -> list[dict[str, Any]]:
        """Both networks with less noise, so that it is no advantage of the pruned ones."""
        return [self.one(seed, units, left=left) for units in (self.hidden, self.smaller) for left in (0.5, 1 - FIRST)]

    def longer(self, seed: int) -> list[dict[str, Any]]:
        """Both networks, trained for twice as long."""
        return [self.one(seed, units, longer=2) for units in (self.smaller, self.hidden)]

    def blocks(self, seed: int) -> list[dict[str, Any]]:
        """The larger network, 90 % pruned by the best known rule."""
        return [self.one(seed, self.hidden, **RULES[BEST], block=list(b), sparsity=FIRST) for b in BLOCKS]

    def shrunk(self, seed: int) -> list[dict[str, Any]]:
        """The larger network, pruned to the weights of the smaller one."""
        share = round(1 - weights(self.smaller) / weights(self.hidden), 4)
        return [self.one(seed, self.hidden, **RULES[BEST], block=list(b), sparsity=share) for b in BLOCKS]

    def rules(self, seed: int) -> list[dict[str, Any]]:
        """The smaller network, 90 % pruned by each rule; the best one with the largest blocks is among the arms."""
        pairs = [pair for pair in product(BLOCKS, RULES) if pair != (BLOCKS[-1], BEST)]
        return [self.one(seed, self.smaller, **RULES[rule], block=list(b), sparsity=FIRST) for b, rule in pairs]

    def arms(self, seed: int) -> list[dict[str, Any]]:
        """The smaller network, 90 % pruned in the largest blocks by what is in ARMS."""
        best = self.one(seed, self.smaller, **RULES[BEST], block=list(BLOCKS[-1]), sparsity=FIRST)
        return [best | arm for arm in ARMS]

    def masks(self, seed: int) -> list[dict[str, Any]]:
        """The smaller network with N:M masks, and with half of its single weights."""
        drawn = {"method": "magnitude", "since": MASKED_SINCE}
        return [
            *(self.one(seed, self.smaller, **drawn, nm=pattern) for pattern in MASKS),
            self.one(seed, self.smaller, **HALF),
        ]

    def curve(self, seed: int) -> list[dict[str, Any]]:
        """The larger network at other sparsities, and in single weights."""
        pairs = [*product(OTHERS, [SINGLE, *BLOCKS]), (FIRST, SINGLE)]
        return [self.one(seed, self.hidden, **RULES[BEST], block=list(b), sparsity=share) for share, b in pairs]

    def characters(self, seed: int) -> list[dict[str, Any]]:
        """One layer that reads characters: dense, with N:M masks, and dense for twice as long."""
        drawn = {"method": "magnitude", "since": MASKED_SINCE, "exempt": ["readout"]}
        points = [self.one(seed, self.smaller), *(self.one(seed, self.smaller, **drawn, nm=nm) for nm in MASKS[:2])]
        return [*points, *([self.one(seed, self.smaller, longer=2)] if seed == 0 else [])]

    def points(self, parts: list[str]) -> Iterator[dict[str, Any]]:
        """The settings in which each point differs from the others, in the order in which they are trained."""
        for part, seed in product(parts, self.seeds):
            yield from getattr(self, part)(seed)


PARTS = ("dense", "blocks", "arms", "shrunk", "masks", "rules", "longer", "noise", "curve", "characters")


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
    part: Annotated[
        list[str] | None, typer.Option(help="One of PARTS; repeat for several. [all but characters]")
    ] = None,
    hidden: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Units of a layer of the larger network; repeat for a stack. [2048 512]"),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training text.")] = 40,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 2e-3,
    dropconnect: Annotated[
        tuple[float, float], typer.Option(help="DropConnect of the larger and of the smaller dense network.")
    ] = DROPCONNECT,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Seed; repeat for several. [0 1 2]")] = None,
    backend: Annotated[str, typer.Option(help="cuda, or cpu for a small case.")] = "cuda",
    text: Annotated[str, typer.Option(help="Folder with the three texts, or ptb.")] = "ptb",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Write the file of a sweep of some parts."""
    parts = list(part or PARTS[:-1])
    for name, chosen, choices in (("cell", [cell], OF_CELL), ("part", parts, PARTS)):
        for each in chosen:
            if each not in choices:
                raise ValueError(f"{name}: got {each!r}, need one of {', '.join(choices)}")
    by_characters = "characters" in parts
    if by_characters and len(parts) > 1:
        raise ValueError(f"part: got {', '.join(parts)}, but characters are a sweep of their own; plan them apart")
    writable_file(out, force=force)
    units = list(hidden or ([2 * OF_CHARACTERS] if by_characters else [2048, 512]))
    settings = {
        "data.text": text,
        "model.cell": cell,
        "model.embedding": units[-1],
        "training.learning_rate": rate,
        "training.schedule.constant": 0.5,
        "training.validate_every": BETWEEN_VALIDATIONS,
        **{f"training.regularisers.{name}": share for name, share in NOISE.items()},
        "training.backend": backend,
        **({"training.precision": "bfloat16"} if backend == "cuda" else {}),
        **OF_CELL[cell],
        **(CHARACTERS if by_characters else {}),
    }
    points = list(Plan(units, epochs, list(seed or (0, 1, 2)), dropconnect).points(parts))
    # What one point sets, all of them have to set.
    swept = {key: settings.pop(key) for key in [*settings] if any(key in point for point in points)}
    lines = [
        f"preset = {toml(PRESET)}",
        "",
        "[settings]",
        *(f"{key} = {toml(value)}" for key, value in settings.items()),
    ]
    for point in (swept | point for point in points):
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
    records = Records(results, KEY)
    done = trained_points(folder)
    if saved_sweep(folder).settings.get("training.backend") == "cuda":
        on_gpu(records)
    with progress() as report:
        for number, (point, line) in enumerate(done):
            report("points", number, len(done), line["folder"])
            if has_line(records, point):
                continue
            figures = {key: value for key, value in line.items() if key not in (*AXES, "point", "folder", "state")}
            records.add(point | figures | sizes(er.load(folder / line["folder"] / MODEL)))


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="Folder of the sweep, finished or not.")],
    backend: Annotated[str, typer.Option(help="Backend that reads the validation text.")] = "cuda",
    results: Annotated[Path, typer.Option(help="File to which a line per network is appended.")] = RESULTS,
) -> None:
    """Prune each dense and each half-pruned network to N:M masks without training, with AdaPrune and without."""
    records, found = Records(results, KEY), trained_points(folder)
    if backend == "cuda":
        on_gpu(records)
    half = {f"pruning.{name}": value for name, value in HALF.items()}
    dense = [point for point, _ in found if point["pruning.method"] is None]
    # Of the smallest network, and not the ones that are trained for longer, or with less noise.

    def rank(point: dict[str, Any]) -> tuple[float, ...]:
        units = json.loads(str(point["model.hidden"])) if point["model.hidden"] else [0]
        return -weights(units), -point["training.epochs"], point[TRAINED[0]]

    begun = {
        "dense": lambda point: point in dense and rank(point) == max(map(rank, dense)),
        "half": lambda point: all(point[key] == value for key, value in half.items()),
    }
    corpus = load_recipe(preset=PRESET, settings=list(saved_sweep(folder).settings.items())).data.corpus()
    steps, streams = CALIBRATION
    length = min(steps, len(corpus.train) // streams)
    text = np.ascontiguousarray(corpus.train[: length * streams].reshape(streams, length).T)
    chosen = [(name, point, line) for point, line in found for name, fits in begun.items() if fits(point)]
    with progress() as report:
        for number, (name, point, line) in enumerate(chosen):
            report("networks", number, len(chosen), line["folder"])
            network = er.load(folder / line["folder"] / MODEL)
            # A backend that is unknown, or cannot run here, is refused before any work.
            er.Simulator(network, backend=backend)
            for pattern, method in product(CONVERTED, ("adaprune", "magnitude")):
                rule = dict.fromkeys(f"pruning.{each}" for each in RULE)
                own = point | rule | {"pruning.method": method, "pruning.nm": pattern, "converted": name}
                if has_line(records, own):
                    continue
                started, to = time.perf_counter(), NofM(*parse_nm(pattern))
                made = adaprune(network, text, to)[0] if method == "adaprune" else prune_to(network, to)
                seconds = time.perf_counter() - started
                read = evaluate_text(made, corpus.valid, backend=backend)
                figures = {f"{key}_valid": read[key] for key in ("perplexity", "activity")}
                figures |= {"effective_ops_per_step": read["effective_ops_per_step"], "convert_seconds": seconds}
                records.add(own | figures | sizes(made))


def trained_points(folder: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The key of every point that is trained, and its line in the results of the sweep."""
    shared, found = saved_sweep(folder).settings, []
    for line in read_results(folder):
        if line["state"] == "done":
            point = {key: line.get(key, shared.get(key)) for key in KEY}
            # A text is known by its name, wherever it lies.
            found.append((point | {"data.text": Path(str(point["data.text"])).name}, line))
    return found


def on_gpu(records: Records) -> None:
    """Lines name the GPU of this machine, where it has one."""
    from eventrnn.cuda.device import current_device

    with suppress(er.BackendUnavailable):
        records.device = current_device().name


def has_line(records: Records, point: dict[str, Any]) -> bool:
    """Whether a point has a line, from whichever machine."""
    return any(all(old.get(key) == point[key] for key in KEY) for old in records.lines)


def sizes(network: Network) -> dict[str, Any]:
    """The layers without the vocabulary and the embedding: the share of their weights that is left, and the bytes of
    their file for each storage of the weights."""
    bare, nbytes = replace(network, metadata={}, embedding=None, readout=None), {}
    with tempfile.TemporaryDirectory() as scratch:
        for storage in STORAGES:
            path = Path(scratch) / f"{storage}.safetensors"
            matrices = {name: w.stored_as(storage) for name, w in bare.matrices().items()}
            er.save(bare.with_matrices(matrices), path)
            nbytes[storage] = path.stat().st_size
    matrices = bare.matrices().values()
    density = sum(w.nnz for w in matrices) / sum(w.shape[0] * w.shape[1] for w in matrices)
    return {"density_of_layers": density, "file_bytes": nbytes}


@app.command()
def table(results: Annotated[Path, typer.Option(help="File of the lines.")] = RESULTS) -> None:
    """Show the mean of each point over its seeds, and how much worse it reads than the best dense one of its epochs."""
    groups: dict[str, dict[str, list[dict]]] = {}
    collected = Records(results, KEY).lines
    if not collected:
        raise ValueError(f"results: there is no line in {results}; the command collect writes them")
    for line in collected:
        model = json.dumps({key: line[key] for key in SHARED})
        rest = json.dumps({key: line[key] for key in AXES if key != "training.seed"})
        groups.setdefault(model, {}).setdefault(rest, []).append(line)
    for model, rows in groups.items():
        columns = ("units", "method", "pattern", "weights", "seeds", "perplexity", "±", "over dense", "activity")
        shown = Table(*columns, "operations", *STORAGES, title=model)
        dense = [line for lines in rows.values() for line in lines if line["pruning.method"] is None]
        for lines in rows.values():
            beside = best_dense(dense).get(lines[0]["training.epochs"])
            at = perplexity(beside) if beside else None
            shown.add_row(*row(lines, at, dense[0]["file_bytes"]["float32"] if dense else None))
        Console(width=150).print(shown)


def row(lines: list[dict], dense: float | None, whole: int | None) -> list[str]:
    """The cells of a point: `lines` of its seeds, the dense network's perplexity, and the bytes of its float32 file."""
    first, read = lines[0], [line["perplexity_valid"] for line in lines]
    sizes = [first["file_bytes"][storage] for storage in STORAGES]
    return [
        first["model.hidden"],
        named(first),
        first["pruning.nm"] or first["pruning.block"] or "",
        f"{first['density_of_layers']:.1%}",
        str(len(lines)),
        f"{mean(read):.2f}",
        f"{stdev(read):.2f}" if len(read) > 1 else "",
        f"{mean(read) / dense - 1:+.1%}" if dense else "",
        f"{mean(line['activity_valid'] for line in lines):.1%}",
        f"{mean(line['effective_ops_per_step'] for line in lines):,.0f}",
        *(f"{whole / size:.1f}x" if whole else f"{size:,}" for size in sizes),
    ]


def named(line: dict) -> str:
    """The method of a line in words."""
    if line.get("converted"):
        return f"{line['pruning.method']} of the {line['converted']} network"
    scope = f", {line['pruning.scope']}" if line["pruning.scope"] else ""
    return f"{line['pruning.method'] or 'dense'}{scope}, {line['training.epochs']} epochs"


if __name__ == "__main__":
    try:
        app()
    except (ValueError, OSError, er.BackendUnavailable) as error:
        raise SystemExit(f"pruning_sweep.py: {error}") from None
