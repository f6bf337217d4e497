"""Recipes: a whole training run of a language model as one record, read from presets, TOML files and flags.

The model file holds the network of the best validation. `run_folder` describes the folder of a run. `eventrnn train` is
a thin layer over `train`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn._checks import need_choice, need_flag, need_whole
from eventrnn._files import is_endless, locked
from eventrnn.cells import CELLS, Cell, Surrogate
from eventrnn.data.text import Corpus, from_path, from_text, python_documentation, read_stream
from eventrnn.data.vocabulary import KINDS
from eventrnn.network import Network
from eventrnn.pruning.schedule import choose
from eventrnn.simulation import CARRIES
from eventrnn.training import LanguageModelling, Progress, Settings, Trainer
from eventrnn.training.evaluation import evaluate_text
from eventrnn.training.recipes import toml_config
from eventrnn.training.recipes.distillation import DistillationRecipe
from eventrnn.training.recipes.gates import GateRecipe
from eventrnn.training.recipes.pruning import PruningRecipe
from eventrnn.training.recipes.run_folder import (
    CONFIG,
    NotBegun,
    RunSettings,
    begin_run,
    claim_out,
    need_no_run,
    need_own_name,
    save_out,
    write_config,
)
from eventrnn.training.recipes.toml_config import need_file_name
from eventrnn.training.run import run_locked
from eventrnn.training.thresholds import initial
from eventrnn.training.trainer import updates
from eventrnn.weights import MatrixId

# Beginnings of the names of settings of thresholds and of the events above them. A GRU or an LSTM has neither.
_EVENT_SETTINGS = ("model.threshold", "model.surrogate", "training.thresholds")

# Figures of a trained recipe that say how good and how small it is.
FIGURES = (
    *("bits_per_symbol_best", "bits_per_symbol_valid", "perplexity_valid", "activity_valid"),
    *("effective_ops_per_step", "dense_ops_per_step", "density", "parameters", "seconds"),
)

STARTS = ("beta", "constant")


@dataclass(frozen=True)
class ModelSettings:
    """The network to start from.

    Attributes
    ----------
    cell            : name of the cell: "egru", or one of the dense baselines "gru" and "lstm", which take no thresholds
    variant         : variant of the cell, one of `CELLS[cell]`; "" for the first one
    hidden          : number of units of each layer
    embedding       : width of the embedding
    tied            : use the transposed embedding as the read-out
    threshold       : initial threshold, one number or one per layer
    threshold_start : "beta" draws the thresholds of a layer from a distribution with that mean, in (0, 1), as EvNN
                      does; "constant" gives every unit that number
    surrogate       : surrogate derivative of the event
    gates           : matrices of blocks that every input chooses, see `GateRecipe`
    """

    cell: str = "egru"
    variant: str = ""
    hidden: tuple[int, ...] = (256,)
    embedding: int = 64
    tied: bool = False
    threshold: float | tuple[float, ...] = 0.4
    threshold_start: str = "beta"
    surrogate: Surrogate = field(default_factory=Surrogate)
    gates: GateRecipe = field(default_factory=GateRecipe)

    def __post_init__(self):
        need_choice("cell", self.cell, CELLS)
        if not self.hidden:
            raise ValueError("hidden: got no layer, need the number of units of each, such as [256]")
        for units in self.hidden:
            need_whole("hidden", units, at_least=1)
        need_whole("embedding", self.embedding, at_least=1)
        need_flag("tied", self.tied)
        if self.tied and self.embedding != self.hidden[-1]:
            raise ValueError(
                f"tied: got an embedding of {self.embedding} numbers and {self.hidden[-1]} units in the last layer, "
                "need as many"
            )
        if self.variant:
            need_choice("variant", self.variant, CELLS[self.cell])
        need_choice("threshold_start", self.threshold_start, STARTS)
        if isinstance(self.threshold, tuple) and len(self.threshold) != len(self.hidden):
            raise ValueError(f"threshold: got {len(self.threshold)}, need one for each of {len(self.hidden)} layers")

    def equations(self) -> Cell:
        """The cell of every layer. A cell without thresholds has no surrogate."""
        cell = Cell(self.cell, self.variant)
        return replace(cell, surrogate=self.surrogate) if cell.thresholded else cell

    def matrices(self, symbols: int) -> dict[MatrixId, tuple[int, int]]:
        """Shape (presynaptic units, postsynaptic gate rows) of each matrix that is pruned by default.

        symbols : of the text, the outputs of a read-out of its own
        """
        gates, found, before = len(self.equations().equations.gates), {}, self.embedding
        for k, units in enumerate(self.hidden):
            found[MatrixId.of(k, "w_in", gates)] = before, gates * units
            found[MatrixId.of(k, "w_rec", gates)] = units, gates * units
            before = units
        return found if self.tied else found | {MatrixId("readout"): (before, symbols)}

    def thresholds(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Initial thresholds of every layer, (N,) float32 each; zeros for a cell without thresholds."""
        if not self.equations().thresholded:
            return [np.zeros(n, np.float32) for n in self.hidden]
        each = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * len(self.hidden)
        drawn = rng if self.threshold_start == "beta" else None
        return [initial(start, n, rng=drawn) for start, n in zip(each, self.hidden, strict=True)]


@dataclass(frozen=True)
class DataSettings:
    """The text and how it is read.

    Attributes
    ----------
    text        : "builtin" (Python's documentation), a file, a folder of text files, or "ptb"; see `data.read_parts`.
                  A pipe can be read only once, so `train` keeps a copy in the folder of the run
    kind        : kind of the symbols, "character" or "word"
    vocabulary  : number of symbols to keep, of which one stands for all others; 0 for all, see `data.Vocabulary.of`
    valid_batch : number of streams of the validation text
    carry       : "state", or "events" to set the cells to zero at the start of every window, as EvNN does. A GRU or an
                  LSTM takes "state" only
    """

    text: str = "builtin"
    kind: str = "character"
    vocabulary: int = 0
    valid_batch: int = 10
    carry: str = "state"

    def __post_init__(self):
        need_file_name("text", self.text)
        need_choice("kind", self.kind, KINDS)
        need_choice("carry", self.carry, CARRIES)
        need_whole("vocabulary", self.vocabulary, at_least=0)
        need_whole("valid_batch", self.valid_batch, at_least=1)
        if self.text == "builtin" and (self.kind != "character" or self.vocabulary):
            raise ValueError("text: the built-in text is read by characters; give --text a file for words")

    def corpus(self, text: str | None = None) -> Corpus:
        """Read the text. Raises ValueError for a text that is missing, empty or too short.

        text : the content of `text`, where it has been read already
        """
        if self.text == "builtin":
            return python_documentation()
        options = {"kind": self.kind, "size": self.vocabulary or None}
        return from_path(self.text, **options) if text is None else from_text(text, **options)


@dataclass(frozen=True)
class Recipe:
    """A whole training run: network, text, training settings, pruning, teacher, and files.

    Raises ValueError for a name in `pruning.exempt` that is no matrix or layer of the model, and where nothing is left
    to prune.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: Settings = field(default_factory=Settings)
    pruning: PruningRecipe = field(default_factory=PruningRecipe)
    distillation: DistillationRecipe = field(default_factory=DistillationRecipe)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self):
        if self.pruning.method:
            choose(self.model.matrices(symbols=1), exempt=self.pruning.exempt)

    def trainer(
        self,
        text: str | None = None,
        report: Callable[[str, int, int, str], None] = lambda stage, done, total, note: None,
    ) -> tuple[Trainer, Corpus]:
        """The trainer in its initial state, and its corpus.

        text   : the content of `data.text`, where it has been read already
        report : called while a teacher reads the text, as `train` does

        Raises ValueError for settings that contradict each other.
        """
        corpus, model, training = self.data.corpus(text), self.model, self.training
        symbols = len(corpus.vocabulary)
        rng = np.random.default_rng(training.seed)
        network = Network.random(
            list(model.hidden),
            rng=rng,
            symbols=symbols,
            embedding=model.embedding,
            readout=None if model.tied else symbols,
            tied=model.tied,
            threshold=0.0,
            cell=model.equations(),
            metadata={
                "vocabulary": corpus.vocabulary.to_json(),
                "corpus": self.data.text,
                **self.distillation.metadata(),
            },
        )
        layers = zip(network.layers, model.thresholds(rng), strict=True)
        network = replace(network, layers=tuple(replace(layer, threshold=drawn) for layer, drawn in layers))
        network = model.gates.applied(network, rng)
        options = {"valid_batch": self.data.valid_batch, "carry": self.data.carry}
        # What is wrong with the text is said before a teacher reads it.
        LanguageModelling(corpus.train, corpus.valid, **options).check(network, training.batch, training.window)
        soft = self.distillation.targets(corpus.vocabulary, corpus.train, training, report)
        task = LanguageModelling(corpus.train, corpus.valid, soft=soft, **options)
        return Trainer(network, task, training, pruning=self.pruning.schedule(updates(training, task))), corpus


def presets() -> list[str]:
    """Names of the recipes in the package."""
    return list(_presets())


@cache
def _presets() -> dict[str, dict[str, Any]]:
    """The tables of the recipes in the package, by name. They are read once, because a sweep has many points."""
    folder = resources.files("eventrnn.training.recipes")
    names = sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    return {name: toml_config.read_toml((folder / f"{name}.toml").read_text("utf-8"), name) for name in names}


def load_recipe(
    path: str | Path | Mapping[str, Any] | None = None,
    *,
    preset: str = "characters",
    settings: Iterable[tuple[str, Any]] = (),
) -> Recipe:
    """A recipe from a preset, a TOML file and single settings such as ("training.batch", 16); later ones win.

    path : the TOML file, or its tables

    Raises `ValueError` for an unknown key, with the most similar known key, for a value that is not allowed, and for a
    single setting of events where the cell is a GRU, which has none, or of gates where no matrix has them.
    """
    settings = list(settings)
    if preset not in presets():
        raise ValueError(f"preset: got {preset!r}, need one of {', '.join(presets())}")
    tables = [_presets()[preset]]
    if isinstance(path, Mapping):
        tables.append(dict(path))
    elif path is not None:
        if is_endless(path):
            raise ValueError(f"config: {path} is a device; need a file")
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"config: {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        tables.append(toml_config.read_toml(text, path))
    recipe = toml_config.from_table(Recipe, toml_config.merged([*tables, toml_config.nested(settings)]))
    for name, value in settings:
        if not recipe.model.equations().thresholded and name.startswith(_EVENT_SETTINGS):
            cell = recipe.model.cell
            raise ValueError(
                f"{name}: got {value!r}, but units of model.cell={cell!r} have no thresholds; leave it out"
            )
        # A value that is not the default is refused by `GateRecipe`.
        if name.startswith("model.gates.") and value and not recipe.model.gates.matrices:
            raise ValueError(f"{name}: got {value!r}, but no matrices; set model.gates.matrices too, or leave it out")
    return recipe


def train(
    recipe: Recipe,
    folder: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str, int, int, str], None] = lambda stage, done, total, note: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train a recipe in a folder, and write the network of the best validation to `recipe.run.out`.

    folder    : folder of the run, created if it is missing
    resume    : continue the run in the folder
    overwrite : replace the model file; without `resume`, replace the run in the folder too
    report    : called with the stage, the amount done, the whole amount, and a note
    stop      : called after every update; once it says so, the run is saved and `training.Stopped` is raised

    Returns bits, perplexity, activity and operations per step of the validation text when the network of the model file
    reads it (one stream, state carried even if `data.carry` is "events"), the share of the weights that it has, the
    best validation of the training (which follows `data.carry`), and the numbers of symbols, parameters, updates and
    seconds; with gated blocks, the multiplications of each matrix and its gate as a share of those without gates.
    Without `recipe.run.out` there is no such reading.

    Without `overwrite`, raises ValueError for a folder that holds a run when `resume` is not set, and FileExistsError
    for a model file that this run did not write: before the training, or after it if the file appeared meanwhile. The
    trained run is then complete in its folder, and `resume` with another `run.out` writes it. Raises ValueError for a
    resumed run with another weight or `top_k` of its teacher, and `NotBegun` for an interruption before the training.
    Other interruptions and errors: see `training.run`.
    """
    if recipe.model.equations().thresholded and not recipe.run.out:
        raise ValueError("out: got none; set run.out to the model file to write")
    if recipe.training.devices > 1:
        from eventrnn.training.data_parallel import need_devices

        need_devices(recipe.training.devices)
    folder = Path(folder)
    recipe = replace(recipe, distillation=recipe.distillation.located())
    if recipe.run.out:
        need_own_name(Path(recipe.run.out), folder)
    if not resume and not overwrite:
        need_no_run(folder)
    if resume:
        _need_same_distillation(recipe, folder)
    text = None if recipe.data.text == "builtin" else read_stream(recipe.data.text)
    try:
        trainer, corpus = recipe.trainer(text, report)
    except KeyboardInterrupt:
        # A teacher may read the text for minutes before the training.
        raise NotBegun("stopped before the training began; nothing was written") from None
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not resume:
            copied = begin_run(folder, overwrite=overwrite, text=text)
            if copied is not None:
                recipe = replace(recipe, data=replace(recipe.data, text=copied))
            write_config(folder, recipe)
        if recipe.run.out:
            claim_out(Path(recipe.run.out), folder, overwrite)
        return _train(recipe, folder, trainer, corpus, resume, report, stop)


def _train(
    recipe: Recipe,
    folder: Path,
    trainer: Trainer,
    corpus: Corpus,
    resume: bool,
    report: Callable[[str, int, int, str], None],
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """`train` in a locked folder whose files are ready."""
    if trainer.engine.memory_use:
        report("GPU memory", 1, 1, trainer.engine.memory_use)

    costs = {name: weights.gate_cost for name, weights in trainer.model.gated.items()}
    for name, cost in costs.items():
        report(f"gates of {name}", 1, 1, str(cost))

    soft = bool(recipe.distillation.teacher)

    def each(progress: Progress, seconds: float) -> None:
        report("training", round(1000 * progress.share), 1000, note(progress, recipe.data.kind, soft))

    seconds = run_locked(
        trainer,
        folder,
        resume=resume,
        log_every=recipe.run.log_every,
        checkpoint_seconds=recipe.run.checkpoint_seconds,
        report=each,
        stop=stop,
    )
    figures: dict[str, Any] = {
        "symbols": len(corpus.vocabulary),
        "parameters": sum(p.size for p in trainer.model.parameters.values()),
        "steps": trainer.steps_done,
        "seconds": seconds,
        "bits_per_symbol_best": trainer.best_value,
    }
    figures |= recipe.distillation.said()
    if costs:
        figures["gate_cost"] = {name: cost.cost for name, cost in costs.items()}
    if not recipe.run.out:
        return figures
    network = recipe.pruning.stored(trainer, trainer.network(best=True))
    save_out(network, Path(recipe.run.out), folder)
    read = evaluate_text(
        network,
        corpus.valid,
        backend=recipe.training.backend,
        report=lambda stage, done, total: report(stage, done, total, ""),
        stage="validating",
    )
    matrices = network.matrices().values()
    return {
        "bits_per_symbol_valid": read["bits_per_symbol"],
        "perplexity_valid": read["perplexity"],
        "activity_valid": read["activity"],
        "effective_ops_per_step": read["effective_ops_per_step"],
        "dense_ops_per_step": read["dense_ops_per_step"],
        "density": sum(w.nnz for w in matrices) / sum(w.shape[0] * w.shape[1] for w in matrices),
    } | figures


def _need_same_distillation(recipe: Recipe, folder: Path) -> None:
    """Refuse another distillation than that of the run before a teacher reads its text, which may take minutes.

    The teacher's file may have moved; whether it is the same shows in what it says, which the checkpoint knows.
    """
    if not (folder / CONFIG).exists():
        return
    own = load_recipe(folder / CONFIG).distillation
    for name in ("weight", "top_k"):
        before, now = getattr(own, name), getattr(recipe.distillation, name)
        if before != now:
            raise ValueError(
                f"distillation {name}: got {now}, but the run has {before}; leave it out to continue the run"
            )


def note(progress: Progress, kind: str, soft: bool = False) -> str:
    """One line about an update: quality, activity, surrogate support, sparsity and the operations so far.

    soft : whether the loss has soft targets. It is then shown as it is minimised, which is not the loss of the text
    """
    nats = progress.loss
    quality = f"perplexity {np.exp(min(nats, 700.0)):.1f}" if kind == "word" else f"{progress.bits:.3f} bits"
    if soft:
        quality = f"{nats:.3f} nats with soft targets"
    words = [quality, f"activity {progress.activity:.1%}", f"backward {progress.support:.0%}"]
    if progress.sparsity:
        words.append(f"{progress.sparsity:.0%} pruned")
    words.append(f"{progress.operations:.2e} operations")
    return ", ".join(words)


def flags_to_settings(flags: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The settings of the flags that were given. A flag that was not given is None."""
    return [(key, value) for key, value in flags.items() if value is not None]
