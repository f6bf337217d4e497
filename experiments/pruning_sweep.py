"""Pruned word models of the Penn Treebank, and small character models, as sweeps (Narang et al., Hubara et al.).

    python experiments/pruning_sweep.py plan gru.toml --cell gru             # what is trained
    eventrnn sweep gru.toml --out sweep-gru --workers 4                      # trains it on a GPU
    python experiments/pruning_sweep.py collect sweep-gru                    # a line of results per trained point
    python experiments/pruning_sweep.py convert sweep-gru                    # N:M without training, by AdaPrune
    python experiments/pruning_sweep.py table

A point is trained from random weights to its last epoch: dense, or pruned by one of RULES to a sparsity in one of
BLOCKS, or with N:M masks of MASKS. The learning rate falls from half-way on, so that every training ends where it
stops improving; a dense network that is trained for half as long again shows by how much that is not so. Networks
whose layers but the last are larger are pruned to the weights of the dense one. Words are the whole vocabulary; their
embedding is also the read-out and as wide as the last layer, and is not pruned. The second task, `characters`, is
Python's documentation for small networks, which a CPU can train; their read-out is not pruned either.

A sweep has one or several of PARTS, in the order in which they are named, so that a sweep that is cut short has whole
answers. `collect` takes the figures of the runs and adds the bytes of the model file in each of STORAGES. `convert`
prunes dense networks, and those with half of their single weights, to N:M masks without training. Neither measures
time: see `block_steps.py`.
"""

import json
import math
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
from command_line import commands
from pruning_claims import LONGER, best_dense, perplexity, size_of, weights
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

# Settings in which points differ, beside those of all points of a sweep that a line also holds. What neither has is
# that of the preset.
RULE = ("method", "nm", "block", "sparsity", "statistic", "scope", "exempt", "since", "until", "strength")
NOISES = tuple(f"training.regularisers.dropout_{name}" for name in ("input", "words", "between", "top"))
RATES = (
    *("training.learning_rate", "training.weight_decay"),
    *("training.schedule.constant", "training.schedule.warmup"),
)
# A network that `convert` made has the name of the one that it began with.
TRAINED = ("training.regularisers.dropconnect", "training.epochs", "training.seed")
AXES = ("model.hidden", *(f"pruning.{name}" for name in RULE), *NOISES, *RATES, *TRAINED, "converted")
SHARED = ("data.text", "data.kind", "model.cell", "model.embedding", "training.precision")
KEY = (*SHARED, *AXES)

SINGLE, BLOCKS = (1, 1), ((1, 16), (4, 4), (16, 16), (32, 32))


@dataclass(frozen=True)
class Task:
    """A text, and how networks learn it.

    preset      : the recipe to start from
    text        : as of `data.text`
    hidden      : units of the layers; the embedding is as wide as the last of them
    epochs      : passes over the text
    rate        : learning rate
    dropconnect : of the dense network and of a larger one
    blocks      : that the matrices can have
    sparsities  : beside 90 %
    settings    : further settings of the recipe
    exempt      : matrices that are not pruned, beside an embedding that is also the read-out

    A matrix with a share of its weights has the DropConnect of a dense one times the root of the share (Han et al.
    2015, section 3.2, of dropout): at 90 % a third. With all of it a pruned network learns the training text much worse
    than the dense one. Half of the weights, in N:M masks, overfit as the dense network does, and take as much as that.
    """

    preset: str
    text: str
    hidden: tuple[int, ...]
    epochs: int
    rate: float
    dropconnect: tuple[float, float]
    blocks: tuple[tuple[int, int], ...]
    sparsities: tuple[float, ...]
    settings: dict[str, Any]
    exempt: tuple[str, ...] = ()


# Trainings are short, which takes less noise than the preset has. Without a warm-up, some seeds of 1024 units and all
# networks of 2048 units that were tried lost many epochs or learnt next to nothing. A validation after every epoch
# would take a tenth of the time.
TASKS = {
    "words": Task(
        "egru-ptb",
        "ptb",
        (1024, 512),
        epochs=60,
        rate=1.5e-3,
        dropconnect=(0.35, 0.45),
        blocks=BLOCKS,
        sparsities=(0.8, 0.95),
        settings={
            "training.schedule.constant": 0.5,
            "training.schedule.warmup": 400,
            "training.validate_every": 1236,
            "training.regularisers.dropout_input": 0.4,
            "training.regularisers.dropout_top": 0.4,
        },
    ),
    "characters": Task(
        "characters",
        "builtin",
        (128, 64),
        epochs=20,
        rate=4e-3,
        dropconnect=(0.0, 0.0),
        blocks=((1, 16), (4, 4)),
        sparsities=(0.8,),
        settings={
            "data.kind": "character",
            "model.tied": False,
            "training.schedule.constant": 0.5,
            "training.schedule.warmup": 100,
        },
        # A read-out that is tied to an embedding of so few symbols learns their frequencies, and for long nothing else.
        exempt=("readout",),
    ),
}

FIRST = 0.9

# Rules for blocks. The first two are those of Narang et al., without and with the group lasso. Both compare the largest
# weight of a block with a threshold. The other two compare norms, of all blocks of a matrix or of those of a column,
# which leaves every group of units the same number of blocks, so that none is cut off.
SPAN = {"since": 0.3, "until": 0.7}
RULES: dict[str, dict[str, Any]] = {
    "threshold": {"method": "threshold", **SPAN},
    "lasso": {"method": "lasso", **SPAN},
    "column": {"method": "magnitude", "statistic": "l2", "scope": "column", **SPAN},
    "matrix": {"method": "magnitude", "statistic": "l2", "scope": "matrix", **SPAN},
}
BEST = "matrix"

# What else was tried with the largest blocks, each beside the best known rule in one respect.
ARMS: tuple[dict[str, Any], ...] = (
    {"pruning.since": 0.05, "pruning.until": 0.4},
    {"pruning.since": 0.2, "pruning.until": 0.6},
    {
        "training.regularisers.dropout_input": 0.25,
        "training.regularisers.dropout_words": 0.05,
        "training.regularisers.dropout_between": 0.1,
    },
    {TRAINED[0]: 0.2},
    {"training.learning_rate": 3e-3},
    {"training.weight_decay": 0.03},
    {"training.schedule.constant": 0.7},
)

# Masks are drawn once, from weights that have learnt: the earlier, the more they cost.
MASKS, MASKED_SINCE = ("2:4", "4:8:both", "4:8"), 0.5
HALF = {"method": "magnitude", "sparsity": 0.5, **SPAN}

# Masks of networks that are converted, and steps and streams of the training text on which weights are refitted.
CONVERTED = ("2:4", "4:8:both")
CALIBRATION = (1000, 8)
STORAGES = ("float32", "bfloat16", "int8")

# A GRU has no silent units that a penalty could wake.
OF_CELL: dict[str, dict[str, Any]] = {"egru": {}, "gru": {"training.regularisers.activity_rate": 0.0}}

app = commands(__doc__)


@dataclass(frozen=True)
class Plan:
    """The points of a sweep of `task`.

    larger : units of all layers but the last in larger networks, as a multiple
    seeds  : the seed of every training, one after the other
    """

    task: Task
    larger: float
    seeds: list[int]

    @property
    def hidden(self) -> list[int]:
        """The units of the layers."""
        return list(self.task.hidden)

    @property
    def wide(self) -> list[int]:
        """The units of the larger network."""
        return [*(int(self.larger * units) for units in self.hidden[:-1]), self.hidden[-1]]

    def one(
        self, seed: int, units: list[int] | None = None, *, longer: float = 1, left: float | None = None, **rule: Any
    ) -> dict[str, Any]:
        """A point. left : the share of the weights by which DropConnect goes, where it is not that of the rule"""
        units = units or self.hidden
        kept = left or 1 - rule.get("sparsity", 0.0)
        dropconnect = self.task.dropconnect[units != self.hidden]
        trained = (round(dropconnect * kept**0.5, 3), math.ceil(longer * self.task.epochs), seed)
        own = {"model.hidden": units} | dict(zip(TRAINED, trained, strict=True))
        if rule and self.task.exempt:
            rule["exempt"] = list(self.task.exempt)
        return own | {f"pruning.{name}": value for name, value in rule.items()}

    def pruned(
        self, seed: int, rule: str, sparsity: float, block: tuple[int, int], units: list[int] | None = None
    ) -> dict[str, Any]:
        """A point that is pruned in blocks."""
        return self.one(seed, units, **RULES[rule], block=list(block), sparsity=sparsity)

    def dense(self, seed: int) -> list[dict[str, Any]]:
        """The dense network."""
        return [self.one(seed)]

    def noise(self, seed: int) -> list[dict[str, Any]]:
        """The dense network with more noise and with less, so that it is no advantage of the pruned ones."""
        return [self.one(seed, left=left) for left in (2.0, 0.5, 1 - FIRST)]

    def longer(self, seed: int) -> list[dict[str, Any]]:
        """The dense network, trained for longer."""
        return [self.one(seed, longer=LONGER)]

    def blocks(self, seed: int) -> list[dict[str, Any]]:
        """90 % pruned by the best known rule."""
        return [self.pruned(seed, BEST, FIRST, block) for block in self.task.blocks]

    def arms(self, seed: int) -> list[dict[str, Any]]:
        """90 % pruned in the largest blocks by what is in ARMS."""
        return [self.pruned(seed, BEST, FIRST, self.task.blocks[-1]) | arm for arm in ARMS]

    def shrunk(self, seed: int) -> list[dict[str, Any]]:
        """The larger network, pruned to the weights of the dense one."""
        if weights(self.wide) <= weights(self.hidden):
            raise ValueError(
                f"larger: got {self.larger:g} with hidden {self.hidden}, but then no network is larger; the last layer "
                "stays as it is. Give a larger multiple or further layers, or name parts without shrunk"
            )
        share = round(1 - weights(self.hidden) / weights(self.wide), 4)
        return [self.pruned(seed, BEST, share, block, self.wide) for block in self.task.blocks]

    def rules(self, seed: int) -> list[dict[str, Any]]:
        """90 % pruned by the other rules."""
        others = [rule for rule in RULES if rule != BEST]
        return [self.pruned(seed, rule, FIRST, block) for block, rule in product(self.task.blocks, others)]

    def masks(self, seed: int) -> list[dict[str, Any]]:
        """N:M masks, and half of the single weights."""
        drawn = {"method": "magnitude", "since": MASKED_SINCE}
        return [*(self.one(seed, **drawn, nm=pattern) for pattern in MASKS), self.one(seed, **HALF)]

    def curve(self, seed: int) -> list[dict[str, Any]]:
        """Other sparsities, and single weights."""
        pairs = [(FIRST, SINGLE), *product(self.task.sparsities, [SINGLE, *self.task.blocks])]
        return [self.pruned(seed, BEST, share, block) for share, block in pairs]

    def points(self, parts: list[str]) -> Iterator[dict[str, Any]]:
        """The settings in which each point differs from the others, in the order in which they are trained."""
        known: list[dict[str, Any]] = []
        for part, seed in product(parts, self.seeds):
            # Without DropConnect, less of it is the same point.
            known += [point for point in getattr(self, part)(seed) if point not in known]
        yield from known


PARTS = ("dense", "blocks", "arms", "shrunk", "masks", "rules", "longer", "noise", "curve")


def toml(value: Any) -> str:
    """A setting as TOML, whose strings, numbers and lists of numbers are those of JSON."""
    return json.dumps(value)


@app.command()
def plan(
    out: Annotated[Path, typer.Argument(help="File to write, for `eventrnn sweep`.")],
    task: Annotated[str, typer.Option(help="words, or characters.")] = "words",
    cell: Annotated[str, typer.Option(help="egru, or gru for the dense cell.")] = "egru",
    part: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(PARTS)}; repeat for several. [all]")
    ] = None,
    hidden: Annotated[
        list[int] | None, typer.Option(min=1, help="Units of a layer; repeat for a stack. [1024 512, or 128 64]")
    ] = None,
    larger: Annotated[
        float, typer.Option(min=1, help="Units of all layers but the last in larger networks, as a multiple.")
    ] = 2.0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training text. [60, or 20]")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate. [0.0015, or 0.004]")] = None,
    dropconnect: Annotated[
        tuple[float, float] | None,
        typer.Option(help="DropConnect of the dense network and of a larger one. [0.35 0.45, or 0 0]"),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(min=0, help="Seed; repeat for several. [0 1 2]")] = None,
    backend: Annotated[str, typer.Option(help="cuda, or cpu for a small case.")] = "cuda",
    text: Annotated[str, typer.Option(help="Folder with the three texts, ptb, or builtin. [ptb, or builtin]")] = "",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Write the file of a sweep of some parts."""
    parts = list(part or PARTS)
    for name, chosen, choices in (("task", [task], TASKS), ("cell", [cell], OF_CELL), ("part", parts, PARTS)):
        for each in chosen:
            if each not in choices:
                raise ValueError(f"{name}: got {each!r}, need one of {', '.join(choices)}")
    if not larger < float("inf"):
        raise ValueError(f"larger: got {larger}, need a finite multiple")
    writable_file(out, force=force)
    given = {"hidden": hidden and tuple(hidden), "epochs": epochs, "rate": rate, "dropconnect": dropconnect}
    own = replace(TASKS[task], **{name: value for name, value in given.items() if value is not None})
    own = replace(own, text=text or own.text)
    settings = {
        "data.text": own.text,
        "model.cell": cell,
        "model.embedding": own.hidden[-1],
        "training.learning_rate": own.rate,
        "training.backend": backend,
        **({"training.precision": "bfloat16"} if backend == "cuda" else {}),
        **own.settings,
        **OF_CELL[cell],
    }
    points = list(Plan(own, larger, list(seed or (0, 1, 2))).points(parts))
    # What one point sets, all of them have to set.
    swept = {key: settings.pop(key) for key in [*settings] if any(key in point for point in points)}
    lines = [
        f"preset = {toml(own.preset)}",
        "",
        "[settings]",
        *(f"{key} = {toml(value)}" for key, value in settings.items()),
    ]
    for point in (swept | point for point in points):
        # What no point may have is refused here, not only by the sweep.
        load_recipe(preset=own.preset, settings=[*settings.items(), *point.items()])
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
    # Not the ones that are trained for longer, or with less noise.
    usual = [(-point["training.epochs"], point[TRAINED[0]]) for point in dense]
    begun = {
        "dense": lambda point: point in dense and (-point["training.epochs"], point[TRAINED[0]]) == max(usual),
        "half": lambda point: all(point[key] == value for key, value in half.items()),
    }
    of_data = [(key, value) for key, value in saved_sweep(folder).settings.items() if key.startswith("data.")]
    corpus = load_recipe(preset=saved_sweep(folder).preset, settings=of_data).data.corpus()
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
        model = json.dumps({key: line.get(key) for key in SHARED})
        rest = json.dumps({key: line.get(key) for key in AXES if key != "training.seed"})
        groups.setdefault(model, {}).setdefault(rest, []).append(line)
    for model, rows in groups.items():
        columns = ("units", "method", "pattern", "weights", "seeds", "perplexity", "±", "over dense", "activity")
        shown = Table(*columns, "operations", *STORAGES, title=model)
        dense = best_dense(line for lines in rows.values() for line in lines)
        whole = {size[:-1]: lines[0]["file_bytes"]["float32"] for size, lines in dense.items()}
        for lines in rows.values():
            size = size_of(lines[0])
            at = perplexity(dense[size]) if size in dense else None
            shown.add_row(*row(lines, at, whole.get(size[:-1])))
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
    app.run()
