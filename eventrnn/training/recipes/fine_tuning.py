"""The recipe of a fine-tuning: a trained model, its task, and an activity, in a folder as that of `recipe.train`.

The folder also keeps the given model, so that the run goes on where its file was moved or replaced.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn import io
from eventrnn._checks import need_choice
from eventrnn._files import locked, printable, read_arrays
from eventrnn.data import chirps, moving_bars, padded_counts
from eventrnn.data.text import encoded_parts, read_stream
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.network import Network
from eventrnn.training import Classification, FineTuning, LanguageModelling, Progress, Regression, Task, Tuning
from eventrnn.training.recipes import toml_config
from eventrnn.training.recipes.run_folder import (
    CONFIG,
    GIVEN,
    RunSettings,
    begin_run,
    claim_out,
    need_no_run,
    need_own_name,
    run_table,
    save_out,
    write_config,
)
from eventrnn.training.recipes.toml_config import need_file_name
from eventrnn.training.run import run_locked
from eventrnn.training.tasks import READS

Report = Callable[[str, int, int, str], None]

# Synthetic sets by name: the function that draws one, and microseconds per step.
SYNTHETIC = {"bars": (moving_bars, 4000), "chirps": (chirps, 10_000)}

# Recordings of a synthetic set to train on and to validate on.
RECORDINGS = (800, 200)

# Of a file without data to validate on, the share that is held out.
HELD_OUT = 0.2


# Times the bits of equal probabilities from which on a model reads with symbols that are not its own. One that was not
# trained has about 1, one that was trained on other numbers of the symbols has more.
WORSE = 1.05


@dataclass(frozen=True)
class TaskRecipe:
    """The model and its task. One of `data` and `text` is given.

    Attributes
    ----------
    model      : the model file, or what else `io.located_model` takes
    data       : an .npz file with inputs and labels or targets, or the name of a synthetic set; "" for none
    read       : of data: the output that counts, see `Sequences`
    text       : "builtin", a file, a folder of text files, or "ptb", as for `recipe.train`; "" for none
    vocabulary : of a model without symbols of its own: what `io.vocabulary_of` takes; "" for none
    """

    model: str = ""
    data: str = ""
    read: str = "last"
    text: str = ""
    vocabulary: str = ""

    def __post_init__(self):
        for name in ("model", "data", "text", "vocabulary"):
            need_file_name(name, getattr(self, name))
        if bool(self.data) == bool(self.text):
            given = "both data and text" if self.data else "neither data nor text"
            raise ValueError(
                f"data: got {given}; give --data the sequences of the task, or --text a text for a model of symbols"
            )
        need_choice("read", self.read, READS)
        if self.text and self.read != type(self).read:
            raise ValueError(f"read: got {self.read!r}, but every output of a text counts; leave it out")
        if self.vocabulary and not self.text:
            raise ValueError(f"vocabulary: got {printable(self.vocabulary)} without a text; leave it out")


@dataclass(frozen=True)
class FineTuneRecipe:
    """A whole fine-tuning: model and task, settings, and files."""

    task: TaskRecipe
    tuning: Tuning = field(default_factory=Tuning)
    run: RunSettings = field(default_factory=RunSettings)

    def network(self, content: str | None = None, report: Report = lambda stage, done, total, note: None) -> Network:
        """The given model, with its vocabulary.

        content : of the text, where it has been read already
        report  : called while the model is downloaded

        Raises ValueError for a model or a vocabulary that cannot be had, or that do not belong together.
        """
        task = self.task
        network = io.load(io.located_model(task.model, report))
        if not task.vocabulary:
            return network
        if "vocabulary" in network.metadata:
            raise ValueError(f"vocabulary: {printable(task.model)} has its own; leave --vocabulary out")
        return io.with_vocabulary(network, io.vocabulary_of(task.vocabulary, task.text, content))

    def tasked(self, network: Network, content: str | None = None) -> Task:
        """The task of the network. Raises ValueError for data or a text that it does not fit."""
        task, seed = self.task, self.tuning.seed
        if task.text:
            return _of_text(network, task.text, content)
        return _synthetic(task.data, task.read, seed) if task.data in SYNTHETIC else _of_file(task, seed)


def load_fine_tuning(folder: Path) -> FineTuneRecipe:
    """The recipe of the fine-tuning in a folder. Raises ValueError where the folder holds none."""
    try:
        table = run_table(folder)
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"resume: {printable(folder)} holds no run: it has no readable {CONFIG}") from None
    if "task" not in table:
        raise ValueError(
            f"resume: {printable(folder)} holds another kind of run; continue it with: eventrnn train --resume "
            f"{printable(folder)}"
        )
    return toml_config.from_table(FineTuneRecipe, table)


def fine_tune_in(
    recipe: FineTuneRecipe,
    folder: str | os.PathLike,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = lambda stage, done, total, note: None,
) -> dict[str, Any]:
    """Fine-tune in a folder, and write the EGRU to `recipe.run.out`.

    folder, resume, overwrite, report : as for `recipe.train`

    Returns the figures of `FineTuned`: `given`, `start` and `tuned`, and the numbers of updates and seconds. Raises as
    `recipe.train` and `fine_tune` do.
    """
    if not recipe.run.out:
        raise ValueError("out: got none; set run.out to the model file to write")
    folder, out = Path(folder), Path(recipe.run.out)
    need_own_name(out, folder)
    if not resume and not overwrite:
        need_no_run(folder)
    text = read_stream(recipe.task.text) if recipe.task.text not in ("", "builtin") else None
    if resume:
        network = io.load(folder / GIVEN)
    else:
        network = recipe.network(text, report)
    report("reading the task with the given model", 0, 1, "")
    run = FineTuning(network, recipe.tasked(network, text), recipe.tuning)
    _warn_of_order(run)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        if not resume:
            copied = begin_run(folder, overwrite=overwrite, text=text)
            if copied is not None:
                recipe = replace(recipe, task=replace(recipe.task, text=copied))
            io.save(network, folder / GIVEN, overwrite=True)
            write_config(folder, recipe)
        claim_out(out, folder, overwrite)

        def each(progress: Progress, seconds: float) -> None:
            report("fine-tuning", round(1000 * progress.share), 1000, _note(progress, run))

        seconds = run_locked(
            run,
            folder,
            resume=resume,
            log_every=recipe.run.log_every,
            checkpoint_seconds=recipe.run.checkpoint_seconds,
            report=each,
        )
        report("comparing with the given model", 0, 1, "")
        result = run.result()
        save_out(result.network, out, folder)
    figures = {"given": result.given, "start": result.start, "tuned": result.tuned}
    return figures | {"steps": run.steps_done, "seconds": seconds}


def _warn_of_order(run: FineTuning) -> None:
    """Warn where the given model predicts a text clearly worse than if it took every symbol for equally probable."""
    if not isinstance(run.task, LanguageModelling) or run.network.embedding is None:
        return
    uniform = float(np.log2(len(run.network.embedding)))
    if run.given["bits"] > WORSE * uniform:
        warnings.warn(
            f"model: reads the text with {run.given['bits']:.2f} bits per symbol, worse than the {uniform:.2f} bits of "
            "equal probabilities; see whether the vocabulary has the symbols in the order of the model's training",
            stacklevel=2,
        )


def _note(progress: Progress, run: FineTuning) -> str:
    """One line about an update, and about the validation where there was one."""
    figures = progress.validation
    told = next((f", {name} {figures[name]:.4g}" for name in ("perplexity", "accuracy", "loss") if name in figures), "")
    words = f"epoch {run.place.epoch + 1} of {run.tuning.epochs}, loss {progress.loss:.3f}, activity "
    return words + f"{progress.activity:.1%}" + (f"; thresholds set{told}" if figures else "")


# --- tasks --------------------------------------------------------------------------------------------------


def _of_text(network: Network, text: str, content: str | None) -> LanguageModelling:
    if "vocabulary" not in network.metadata:
        raise ValueError(
            "vocabulary: the model has none, so it cannot read text; give --vocabulary the symbols of its training: a "
            f"file, or {' or '.join(io.OWN_VOCABULARIES)} for those of the text"
        )
    vocabulary = Vocabulary.from_json(network.metadata["vocabulary"])
    found = encoded_parts(text, vocabulary, ("train", "valid"), content)
    for part, (symbols, replaced) in found.items():
        if replaced:
            warnings.warn(
                f"text: {replaced:,} of the {len(symbols):,} {vocabulary.kind}s in its {part} part are not in the "
                f"vocabulary and are read as {vocabulary.unknown!r}",
                stacklevel=2,
            )
    return LanguageModelling(found["train"][0], found["valid"][0])


def _synthetic(name: str, read: str, seed: int) -> Classification:
    """The task of a synthetic set. Its two parts have seeds of their own."""
    draw, step = SYNTHETIC[name]
    (train, labels), (valid, valid_labels) = (draw(n, seed=2 * seed + k) for k, n in enumerate(RECORDINGS))
    (inputs, ends), (held, held_ends) = (padded_counts(each, step) for each in (train, valid))
    return Classification(inputs, labels, (held, valid_labels, held_ends), read=read, lengths=ends, seed=seed)


def _of_file(given: TaskRecipe, seed: int) -> Classification | Regression:
    """The task of an `.npz` file. Raises ValueError, with the name of the array, for another content."""
    path, read = Path(given.data), given.read
    if not path.exists():
        raise ValueError(f"data: there is no file {path}; give an .npz file, {' or '.join(SYNTHETIC)}")
    arrays = read_arrays(path)
    if isinstance(arrays, np.ndarray):
        raise ValueError(
            f"data: {path.name} holds a single array, need an .npz file with inputs, and labels or targets"
        )
    kinds = [name for name in ("labels", "targets") if name in arrays]
    if "inputs" not in arrays or len(kinds) != 1:
        raise ValueError(f"data: {path.name} holds {', '.join(arrays)}; need inputs, and one of labels and targets")
    names = ["inputs", kinds[0], *(["lengths"] if "lengths" in arrays else [])]
    known = {*names, *(f"valid_{name}" for name in names)}
    if others := sorted(set(arrays) - known):
        raise ValueError(f"data: {path.name} holds {', '.join(others)} too, need only {', '.join(sorted(known))}")
    held = [f"valid_{name}" for name in names]
    if there := [name for name in held if name in arrays]:
        if missing := sorted(set(held) - set(there)):
            raise ValueError(f"data: {path.name} holds {there[0]}, but no {missing[0]}")
        train, valid = [arrays[name] for name in names], [arrays[name] for name in held]
    else:
        samples = {name: len(arrays[name]) if arrays[name].ndim else 0 for name in names}
        if len(set(samples.values())) > 1 or min(samples.values()) < 2:
            found = ", ".join(f"{n} of {name}" for name, n in samples.items())
            raise ValueError(f"data: {path.name} holds {found}; need as many of each, and at least 2")
        order = np.random.default_rng(seed).permutation(samples["inputs"])
        out, kept = np.split(order, [max(1, round(HELD_OUT * len(order)))])
        train, valid = ([arrays[name][np.sort(chosen)] for name in names] for chosen in (kept, out))
    task = Classification if kinds[0] == "labels" else Regression
    held_out = (valid[0], valid[1], valid[2]) if len(valid) > 2 else (valid[0], valid[1])
    return task(train[0], train[1], held_out, read=read, lengths=train[2] if len(train) > 2 else None, seed=seed)
