"""The teacher of a recipe: a trained network whose probabilities are part of the loss of another one."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn import io
from eventrnn._checks import need_number, need_whole
from eventrnn._files import printable
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.network import Network
from eventrnn.training.distillation import soft_targets
from eventrnn.training.recipes.toml_config import need_file_name
from eventrnn.training.settings import Settings
from eventrnn.training.targets import SoftTargets
from eventrnn.training.tasks import check_symbols

# Threads that rank symbols while a GPU runs the teacher.
MOST_RANKING_THREADS = 8


@dataclass(frozen=True)
class DistillationRecipe:
    """Knowledge distillation; see `eventrnn.training.soft_targets` and `cross_entropy`.

    Attributes
    ----------
    teacher : model file of a network with the same vocabulary, or what else `io.located_model` takes; "" for none. A
              relative path is found from the working directory, and a run saves it as an absolute one
    weight  : share of the soft targets in the loss, in [0, 1]; 0 without a teacher
    top_k   : symbols that are kept per position of the text, the teacher's most probable ones; all where it has fewer

    Raises ValueError for a value outside its range, for a weight without a teacher, and for a teacher without a weight.
    """

    teacher: str = ""
    weight: float = 0.0
    top_k: int = 32

    def __post_init__(self):
        need_file_name("teacher", self.teacher)
        need_number("distillation weight", self.weight, at_least=0, at_most=1, what="share")
        need_whole("top_k", self.top_k, at_least=1)
        if self.weight and not self.teacher:
            raise ValueError(f"distillation weight: got {self.weight} without a teacher; give teacher a model file")
        if self.teacher and not self.weight:
            raise ValueError(f"teacher: got {self.teacher} with weight 0; give a distillation weight above 0, up to 1")
        if not self.teacher and self.top_k != type(self).top_k:
            raise ValueError(f"top_k: got {self.top_k} without a teacher; leave it out, or give teacher a model file")

    def located(self) -> DistillationRecipe:
        """The record with the absolute path of the teacher, where it is a file seen from the working directory."""
        return replace(self, teacher=str(Path(self.teacher).absolute())) if Path(self.teacher).is_file() else self

    def said(self) -> dict[str, Any]:
        """The teacher and its share of the loss, as figures of a run; empty without a teacher."""
        if not self.teacher:
            return {}
        # Where a file lies is no property of the model.
        name = self.teacher if "://" in self.teacher else Path(self.teacher).name
        return {"teacher": name, "distillation": self.weight}

    def metadata(self) -> dict[str, str]:
        """The same as metadata of the network that is trained."""
        return {name: str(value) for name, value in self.said().items()}

    def targets(
        self,
        vocabulary: Vocabulary,
        symbols: np.ndarray,
        training: Settings,
        report: Callable[[str, int, int, str], None] = lambda stage, done, total, note: None,
    ) -> SoftTargets | None:
        """The soft targets of the text of a training; None without a teacher.

        vocabulary : that of the network that is trained
        symbols    : (n,) integers, the text
        training   : its backend runs the teacher
        report     : called with a stage, the positions done, and all of them

        Raises ValueError, before the text is read, for a teacher that cannot be loaded, that has another vocabulary, or
        that cannot predict symbols.
        """
        if not self.teacher:
            return None
        teacher = self._network(vocabulary, symbols)
        on_gpu = training.backend == "cuda"
        return soft_targets(
            teacher,
            symbols,
            weight=self.weight,
            top_k=min(self.top_k, len(vocabulary)),
            backend=training.backend,
            threads=min(MOST_RANKING_THREADS, os.cpu_count() or 1) if on_gpu else training.threads,
            report=lambda done, total: report("soft targets", done, total, f"{printable(self.teacher)} reads the text"),
        )

    def _network(self, vocabulary: Vocabulary, symbols: np.ndarray) -> Network:
        try:
            network = io.load(io.located_model(self.teacher))
        except OSError as error:
            raise ValueError(f"teacher: {printable(self.teacher)}: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"teacher: {error}") from None
        try:
            _check(network, vocabulary, symbols)
        except ValueError as error:
            raise ValueError(f"teacher: {printable(self.teacher)}: {error}") from None
        return network


def _check(teacher: Network, vocabulary: Vocabulary, symbols: np.ndarray) -> None:
    """Raise ValueError for a teacher of another vocabulary, or that cannot predict the symbols of the text."""
    if "vocabulary" not in teacher.metadata:
        raise ValueError("it has no vocabulary; need a network that was trained on texts")
    own = Vocabulary.from_json(teacher.metadata["vocabulary"])
    if own.symbols != vocabulary.symbols:
        pairs = enumerate(zip(own.symbols, vocabulary.symbols, strict=False))
        first = next((k for k, (a, b) in pairs if a != b), min(len(own), len(vocabulary)))
        raise ValueError(
            f"it has another vocabulary than the network that is trained ({len(own):,} and {len(vocabulary):,} "
            f"symbols, which differ from number {first} on); need the same"
        )
    read = teacher.symbols
    if read != len(own):
        raise ValueError(f"it reads {read or 0} symbols, but its vocabulary has {len(own)}; need as many")
    check_symbols(teacher, symbols)
