"""Tasks: what is read, what the loss is, what is validated. Write your own: four short methods.

The trainer asks for a batch by its place in the data and by nothing else, so that a run can be continued anywhere.

    class Echo(Task):                                    # say the input again two steps later
        figure = "loss"
        def check(self, network, batch, window): ...     # refuse what does not fit, before any work
        def length(self, batch): return 1000             # places in an epoch
        def batch(self, at, epoch, batch, window):       # draw from (epoch, at), never from a global generator
            x = np.random.default_rng([epoch, at]).normal(size=(window, batch, 1)).astype(np.float32)
            late = np.concatenate([np.zeros((2, batch, 1), np.float32), x])[:window]
            return Batch(x, late, taken=1)
        def loss(self, output, batch): return squared_error(output, batch.targets)
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from eventrnn.network import Network
from eventrnn.pruning.schedule import describe
from eventrnn.simulation import CARRIES
from eventrnn.state import State
from eventrnn.training.bptt.model import Model, check_range
from eventrnn.training.losses import cross_entropy, squared_error

READS = ("last", "mean")


@dataclass(frozen=True)
class Batch:
    """What one update learns from.

    Attributes
    ----------
    inputs  : (T, B) symbols or (T, B, I) float32
    targets : whatever the task's loss needs
    taken   : how far the place in the data moves
    carried : "state" goes on from the batch before, "events" only from the outputs it ended with, "" from zero
    extra   : further numbers for the loss
    """

    inputs: np.ndarray
    targets: np.ndarray
    taken: int
    carried: str = ""
    extra: Any = None


class Task(ABC):
    """What to learn; see the head of this file.

    Attributes
    ----------
    figure : the name of the figure, among those that `evaluate` gives, that is best when lowest
    """

    figure: str = "loss"

    @abstractmethod
    def check(self, network: Network, batch: int, window: int) -> None:
        """Refuse a network that cannot do the task, or too little data. Raises ValueError."""

    @abstractmethod
    def length(self, batch: int) -> int:
        """Places in an epoch, at `batch` samples side by side."""

    @abstractmethod
    def batch(self, at: int, epoch: int, batch: int, window: int) -> Batch:
        """The batch at place `at` of an epoch: a function of its arguments and of the data, of nothing else.

        batch, window : samples side by side and steps, where the task has a choice
        """

    @abstractmethod
    def loss(self, output: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        """Mean loss in nats (or what the task measures) and its gradient; output (T, B, V) of the read-out."""

    def evaluate(self, model: Model) -> dict[str, float]:
        """Figures on held-out data, `figure` among them; empty where nothing is held out."""
        return {}

    def digest(self) -> str:
        """What tells one data set from another: a run is continued with the same one only.

        By default the type and all attributes, arrays by their content, without those whose names begin with `_`: keep
        what changes while training under such names, or give a digest of your own.
        """
        return digest_of(describe(self))


def digest_of(*parts: Any) -> str:
    """SHA-256 over arrays (type, shape, bytes) and anything that prints."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype.str}{part.shape}".encode())
            total.update(np.ascontiguousarray(part).data)
        else:
            total.update(repr(part).encode())
    return total.hexdigest()


class LanguageModelling(Task):
    """Predict the next symbol of a text that is read as parallel streams, the state carried from window to window.

    Parameters
    ----------
    train : (n,) symbols, cut into streams of equal length; at most `batch` symbols at the end are left over
    valid : (m,) symbols to validate on, or None
    valid_batch : streams that the validation text is cut into; each starts from the zero state
    carry : "state", or "events": cells start from zero in every window, as EvNN trains and evaluates
    """

    figure = "bits"

    def __init__(
        self, train: np.ndarray, valid: np.ndarray | None = None, *, valid_batch: int = 10, carry: str = "state"
    ):
        self.train, self.valid = np.asarray(train), None if valid is None else np.asarray(valid)
        for name, symbols in (("train", self.train), ("valid", self.valid)):
            if symbols is not None and (symbols.ndim != 1 or len(symbols) < 2 or symbols.dtype.kind not in "iu"):
                raise ValueError(
                    f"{name}: got {symbols.dtype} {symbols.shape}, need at least 2 whole numbers in one row"
                )
        if valid_batch < 1:
            raise ValueError(f"valid_batch: got {valid_batch}, need a whole number >= 1")
        if carry not in CARRIES:
            raise ValueError(f"carry: got {carry!r}, need one of {', '.join(CARRIES)}")
        self.carry, self.window = carry, 0
        # A short text is read as fewer streams rather than refused.
        self.valid_batch = valid_batch if self.valid is None else min(valid_batch, len(self.valid) // 2)
        self._streams: dict[int, np.ndarray] = {}

    def check(self, network: Network, batch: int, window: int) -> None:
        check_symbols(network, self.train)
        if self.valid is not None:
            check_symbols(network, self.valid)
        if self.length(batch) < window:
            raise ValueError(
                f"text: {len(self.train)} symbols are too few for {batch} streams of one window of {window} and a "
                f"target; need {batch * (window + 1)}, or a smaller batch or window"
            )
        self.window = window

    def length(self, batch: int) -> int:
        return len(self.train) // batch - 1

    def batch(self, at: int, epoch: int, batch: int, window: int) -> Batch:
        if batch not in self._streams:
            self._streams = {batch: streams(self.train, batch)}
        part = self._streams[batch][at : at + window + 1]
        return Batch(part[:-1], part[1:], taken=len(part) - 1, carried=self.carry)

    def loss(self, output: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        return cross_entropy(output, batch.targets)

    def evaluate(self, model: Model) -> dict[str, float]:
        if self.valid is None:
            return {}
        text = streams(self.valid, self.valid_batch)
        state, total, sent, places = State.zeros(model.like, self.valid_batch), 0.0, 0.0, len(text) - 1
        # The read-out of a piece stays below 64 MB.
        piece = max(1, min(256, (1 << 24) // (self.valid_batch * model.parameters["readout.bias"].size)))
        if self.carry == "events":
            piece = self.window
        for at in range(0, places, piece):
            part, state = text[at : at + piece + 1], going_on(state, self.carry)
            output, state, tape = model.forward(part[:-1], state)
            total += cross_entropy(output, part[1:])[0] * (len(part) - 1)
            sent += tape.activity * (len(part) - 1)
        nats = total / places
        return {
            "bits": nats / float(np.log(2)),
            "perplexity": float(np.exp(min(nats, 700.0))),
            "activity": float(sent / places),
        }

    def digest(self) -> str:
        return digest_of("language", self.train, self.valid, self.valid_batch, self.carry)


class Sequences(Task):
    """What classification and regression share: whole sequences, shuffled every epoch, each from the zero state.

    Parameters
    ----------
    inputs  : (S, T, I) float32, or (S, T) symbols: S sequences
    targets : one entry a sequence
    valid   : (inputs, targets) to validate on, or None; (inputs, targets, lengths) where `lengths` are given
    read    : "last" reads out at the end of a sequence, "mean" takes the mean of the read-out over its steps
    lengths : (S,) steps of each sequence, if they differ; what is beyond is read but not read out
    seed    : of the shuffling
    """

    def __init__(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
        valid: tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        *,
        read: str = "last",
        lengths: np.ndarray | None = None,
        seed: int = 0,
    ):
        if read not in READS:
            raise ValueError(f"read: got {read!r}, need one of {', '.join(READS)}")
        if valid is not None and len(valid) != 2 + (lengths is not None):
            need = "(inputs, targets)" if lengths is None else "(inputs, targets, lengths), as `lengths` are given"
            raise ValueError(f"valid: got {len(valid)} entries, need {need}")
        _check_sizes("train", inputs, targets, lengths)
        if valid is not None:
            _check_sizes("valid", *valid)
        self.inputs, self.targets, self.valid = inputs, targets, valid
        self.read, self.lengths, self.seed = read, lengths, seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def check(self, network: Network, batch: int, window: int) -> None:
        if network.readout is None:
            raise ValueError("network: needs a read-out to classify or to predict")
        for name, inputs in (("train inputs", self.inputs), ("valid inputs", self.valid[0] if self.valid else None)):
            if inputs is not None:
                check_inputs(network, name, inputs)
        self._check_targets(network.readout.weights.shape[1])

    @abstractmethod
    def _check_targets(self, size: int) -> None: ...

    @abstractmethod
    def _loss(self, output: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]: ...

    def length(self, batch: int) -> int:
        return len(self.inputs)

    def batch(self, at: int, epoch: int, batch: int, window: int) -> Batch:
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.inputs))
        chosen = self._order[1][at : at + batch]
        lengths = None if self.lengths is None else self.lengths[chosen]
        inputs = np.ascontiguousarray(np.moveaxis(self.inputs[chosen], 0, 1))
        return Batch(inputs, self.targets[chosen], taken=len(chosen), extra=lengths)

    def loss(self, output: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        shares = self._shares(len(output), output.shape[1], batch.extra)[:, :, None]
        loss, d_read = self._loss((output * shares).sum(axis=0), batch.targets)
        return loss, d_read * shares

    def _shares(self, steps: int, batch: int, lengths: np.ndarray | None) -> np.ndarray:
        """How much each step (T, B) counts in what is read out."""
        ends = np.full(batch, steps) if lengths is None else lengths
        step = np.arange(steps)[:, None]
        if self.read == "last":
            return (step == ends - 1).astype(np.float32)
        return (step < ends).astype(np.float32) / ends.astype(np.float32)

    def outputs(self, model: Model, inputs: np.ndarray, lengths: np.ndarray | None = None) -> tuple[np.ndarray, float]:
        """What is read out for each of S sequences, (S, V), and the activity."""
        read, sent = [], 0.0
        for at in range(0, len(inputs), 256):
            part = np.ascontiguousarray(np.moveaxis(inputs[at : at + 256], 0, 1))
            output, _, tape = model.forward(part, State.zeros(model.like, part.shape[1]))
            ends = None if lengths is None else lengths[at : at + 256]
            read.append((output * self._shares(len(output), output.shape[1], ends)[:, :, None]).sum(axis=0))
            sent += tape.activity * part.shape[1]
        return np.concatenate(read), float(sent / len(inputs))

    def evaluate(self, model: Model) -> dict[str, float]:
        if self.valid is None:
            return {}
        inputs, targets, *lengths = self.valid
        read, activity = self.outputs(model, inputs, *lengths)
        loss, _ = self._loss(read, targets)
        return {"loss": loss, **self._figures(read, targets), "activity": activity}

    def _figures(self, read: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        return {}

    def digest(self) -> str:
        valid = self.valid or (None, None)
        return digest_of(
            type(self).__name__, self.inputs, self.targets, *valid, self.read, self.lengths, self.seed
        )  # fmt: skip


class Classification(Sequences):
    """Sequence classification by cross-entropy; targets (S,) whole numbers. Other parameters as `Sequences`."""

    def _check_targets(self, size: int) -> None:
        for name, targets in (("train", self.targets), ("valid", self.valid[1] if self.valid else self.targets)):
            if targets.ndim != 1 or targets.dtype.kind not in "iu" or not 0 <= targets.min() <= targets.max() < size:
                raise ValueError(f"{name} targets: got {targets.dtype} {targets.shape}, need classes 0..{size - 1}")

    def _loss(self, output: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
        return cross_entropy(output, targets)

    def _figures(self, read: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        return {"accuracy": float((read.argmax(axis=1) == targets).mean())}


class Regression(Sequences):
    """Sequence regression by mean squared error; targets (S, V) numbers. Other parameters as `Sequences`."""

    def _check_targets(self, size: int) -> None:
        for name, targets in (("train", self.targets), ("valid", self.valid[1] if self.valid else self.targets)):
            if targets.ndim != 2 or targets.shape[1] != size or not np.isfinite(targets).all():
                raise ValueError(f"{name} targets: got shape {targets.shape}, need finite numbers (S, {size})")

    def _loss(self, output: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
        return squared_error(output, targets)


def going_on(state: State, carry: str) -> State:
    """What a window starts from, of the state that the one before ended with."""
    if carry == "state":
        return state
    outputs = state.outputs if carry == "events" else tuple(np.zeros_like(y) for y in state.outputs)
    return State(tuple(np.zeros_like(c) for c in state.cells), outputs)


def streams(symbols: np.ndarray, batch: int) -> np.ndarray:
    """A text as `batch` streams of equal length side by side, (n // batch, batch) int64."""
    length = len(symbols) // batch
    return np.ascontiguousarray(np.asarray(symbols, np.int64)[: length * batch].reshape(batch, length).T)


def _check_sizes(name: str, inputs: np.ndarray, targets: np.ndarray, lengths: np.ndarray | None = None) -> None:
    if inputs.ndim not in (2, 3) or len(inputs) != len(targets) or not len(inputs) or not inputs.shape[1]:
        raise ValueError(
            f"{name}: got inputs {inputs.shape} and {len(targets)} targets, need as many sequences (S, T, I) as targets"
        )
    if lengths is None:
        return
    wrong = lengths.shape != (len(inputs),) or lengths.dtype.kind not in "iu"
    if wrong or lengths.min() < 1 or lengths.max() > inputs.shape[1]:
        raise ValueError(
            f"{name} lengths: got {lengths.dtype} {lengths.shape}, need a whole number 1..{inputs.shape[1]} "
            f"for each of the {len(inputs)} sequences"
        )


def check_inputs(network: Network, name: str, inputs: np.ndarray) -> None:
    """Refuse sequences (S, T) or (S, T, I) that the network cannot read, and where among them. Raises ValueError."""
    if network.embedding is not None:
        if inputs.ndim != 2:
            raise ValueError(f"{name}: got shape {inputs.shape}, need symbols (S, T) for the embedding")
        check_range(name, inputs, len(network.embedding), "(sequence, step)")
        return
    size = network.layers[0].inputs
    if inputs.ndim != 3 or inputs.shape[2] != size or inputs.dtype.kind not in "fiub":
        raise ValueError(f"{name}: got {inputs.dtype} {inputs.shape}, need numbers (S, T, {size})")
    # In parts: data sets are large, and as float32 each part is a copy.
    for at in range(0, len(inputs), 256):
        with np.errstate(over="ignore"):
            wrong = ~np.isfinite(inputs[at : at + 256].astype(np.float32))
        if wrong.any():
            k, step, unit = map(int, np.argwhere(wrong)[0])
            value = inputs[at + k, step, unit]
            raise ValueError(
                f"{name}: got {value} at (sequence, step, input) {(at + k, step, unit)}, need finite float32"
            )


def check_symbols(network: Network, symbols: np.ndarray) -> None:
    """Refuse symbols that the network cannot read and predict, and a network that cannot predict symbols."""
    if network.embedding is None or network.readout is None:
        raise ValueError("network: needs an embedding and a read-out to read and predict symbols")
    size, known = network.readout.weights.shape[1], len(network.embedding)
    if size != known:
        raise ValueError(f"network: reads {known} symbols but its read-out predicts {size}; they must be the same")
    symbols = np.asarray(symbols)
    if symbols.ndim != 1 or len(symbols) < 2 or symbols.dtype.kind not in "iu":
        raise ValueError(f"symbols: got {symbols.dtype} {symbols.shape}, need at least 2 whole numbers in one row")
    if not (0 <= symbols.min() and symbols.max() < size):
        k = int(np.argmax((symbols < 0) | (symbols >= size)))
        raise ValueError(f"symbols: got {symbols[k]} at position {k}, need 0..{size - 1}")
