"""Tasks: the inputs of a run, its loss and its validation. A task of your own needs four short methods.

A batch is a function of its position in the data, so that a run can be continued from any update.

    class Echo(Task):                                    # repeat the input two steps later
        figure = "loss"
        def check(self, network, batch, window): ...     # raise ValueError if the network does not fit
        def length(self, batch): return 1000             # positions per epoch
        def batch(self, at, epoch, batch, window):       # depends on (epoch, at) only, never on a global generator
            x = np.random.default_rng([epoch, at]).normal(size=(window, batch, 1)).astype(np.float32)
            late = np.concatenate([np.zeros((2, batch, 1), np.float32), x])[:window]
            return Batch(x, late, taken=1)
        def loss(self, output, batch): return squared_error(output, batch.targets)
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from eventrnn._checks import WHOLE, need_choice, need_kind, need_whole, number_array, plain_array
from eventrnn.network import Network
from eventrnn.pruning.schedule import describe
from eventrnn.simulation import CARRIES
from eventrnn.state import State
from eventrnn.training.bptt.model import Model, check_range
from eventrnn.training.losses import cross_entropy, squared_error
from eventrnn.training.targets import SoftTargets

READS = ("last", "mean")


# Sequences that are evaluated at a time.
EVALUATED = 256


@dataclass(frozen=True)
class Batch:
    """The data of one update.

    Attributes
    ----------
    inputs  : (T, B) symbols or (T, B, I) float32
    targets : the targets, in the form that the loss of the task needs
    taken   : number of positions by which the update advances in the data
    carried : initial state: "state" is the final state of the previous batch, "events" its final outputs with cells at
              zero, "" is the zero state
    extra   : further data for the loss, or None
    soft    : soft targets of `targets`, (T, B, k), or None
    """

    inputs: np.ndarray
    targets: np.ndarray
    taken: int
    carried: str = ""
    extra: Any = None
    soft: SoftTargets | None = None

    def part(self, rank: int, ranks: int) -> Batch:
        """The samples of device `rank` of `ranks`: a block of neighbouring ones. For a loss over steps and samples."""
        if ranks == 1:
            return self
        size = self.inputs.shape[1] // ranks
        own = slice(rank * size, (rank + 1) * size)
        soft = None if self.soft is None else self.soft.samples(own)
        return replace(self, inputs=self.inputs[:, own], targets=self.targets[:, own], soft=soft)


class Task(ABC):
    """The data and the loss of a run; the head of this file has an example.

    Attributes
    ----------
    figure : name of the figure of `evaluate` that is to be minimised
    """

    figure: str = "loss"

    @abstractmethod
    def check(self, network: Network, batch: int, window: int) -> None:
        """Raise ValueError for a network that does not fit the task, and for too little data."""

    @abstractmethod
    def length(self, batch: int) -> int:
        """Number of positions per epoch, with `batch` samples per update."""

    @abstractmethod
    def batch(self, at: int, epoch: int, batch: int, window: int) -> Batch:
        """The batch at position `at` of an epoch. It depends on the arguments and on the data only.

        batch, window : number of samples and of time steps, for tasks that can choose them
        """

    @abstractmethod
    def loss(self, output: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        """Mean loss, in nats or in the unit of the task, and its gradient (T, B, V).

        output : (T, B, V) float32, the output of the read-out
        """

    @property
    def is_cross_entropy_of_steps(self) -> bool:
        """Whether `loss` is the mean cross-entropy of `batch.targets` (T, B) and of `batch.soft` over all steps and
        samples. An engine may then compute it without calling `loss`."""
        return getattr(self.loss, "__func__", None) is LanguageModelling.loss

    def evaluate(self, model: Model) -> dict[str, float]:
        """Figures on held-out data, with `figure` among them; empty if the task holds nothing out."""
        return {}

    def evaluation_window(self, outputs: int) -> tuple[int, int] | None:
        """Steps and samples of the largest window that `evaluate` runs, for an engine that reserves memory; None if it
        runs none, or if the task cannot say.

        outputs : outputs of the network
        """
        return None

    def digest(self) -> str:
        """Identifies the data and the settings of the task; a run continues only with a task of the same digest.

        By default it covers the type and all attributes (arrays by content) except those whose names begin with `_`.
        Use such names for attributes that change while training, or override this method.
        """
        return digest_of(describe(self))


def digest_of(*parts: Any) -> str:
    """SHA-256 of arrays (dtype, shape, bytes) and of the `repr` of all other values."""
    total = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            total.update(f"{part.dtype.str}{part.shape}".encode())
            total.update(np.ascontiguousarray(part).data)
        else:
            total.update(repr(part).encode())
    return total.hexdigest()


class LanguageModelling(Task):
    """Predict the next symbol of a text. The text is read as parallel streams; windows carry the state.

    Parameters
    ----------
    train       : (n,) symbols, cut into `batch` streams of equal length; fewer than `batch` symbols at the end are not
                  used
    valid       : (m,) symbols to validate on, or None
    valid_batch : number of streams of the validation text; each starts from the zero state
    carry       : "state", or "events": cells start from zero in every window, as in EvNN's training and evaluation
    soft        : soft targets of `train`, (n, k), for knowledge distillation (see `soft_targets`), or None. The loss
                  is then that of `cross_entropy` with them; validations are not concerned

    Raises ValueError for texts that are not rows of at least two integers, for unknown options, and for soft targets of
    another number of positions.
    """

    figure = "bits"

    def __init__(
        self,
        train: np.ndarray,
        valid: np.ndarray | None = None,
        *,
        valid_batch: int = 10,
        carry: str = "state",
        soft: SoftTargets | None = None,
    ):
        self.train = plain_array("train", train)
        self.valid = None if valid is None else plain_array("valid", valid)
        for name, symbols in (("train", self.train), ("valid", self.valid)):
            if symbols is not None and (symbols.ndim != 1 or len(symbols) < 2 or symbols.dtype.kind not in "iu"):
                raise ValueError(
                    f"{name}: got {symbols.dtype} {symbols.shape}, need at least 2 whole numbers in one row"
                )
        need_whole("valid_batch", valid_batch, at_least=1)
        need_choice("carry", carry, CARRIES)
        self.carry, self.window = carry, 0
        # A short validation text is read as fewer streams; it is not an error.
        self.valid_batch = valid_batch if self.valid is None else min(valid_batch, len(self.valid) // 2)
        if soft is not None:
            need_kind("soft", soft, SoftTargets, "SoftTargets, or None")
            if soft.symbols.shape[:-1] != self.train.shape:
                raise ValueError(f"soft: got targets {soft.symbols.shape}, need ({len(self.train)}, k), one per symbol")
        # Without a weight they are not part of the loss, and cost nothing.
        self.soft = soft if soft is not None and soft.weight else None
        self._streams: dict[int, tuple[np.ndarray, SoftTargets | None]] = {}

    def check(self, network: Network, batch: int, window: int) -> None:
        check_symbols(network, self.train)
        if self.valid is not None:
            check_symbols(network, self.valid)
        if self.soft is not None and network.readout is not None:
            self.soft.check(len(network.readout.bias))
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
            soft = None if self.soft is None else self.soft.streams(batch)
            self._streams = {batch: (streams(self.train, batch), soft)}
        text, soft = self._streams[batch]
        part = text[at : at + window + 1]
        # Those of a symbol are about the one after it.
        soft = None if soft is None else soft.steps(at, at + len(part) - 1)
        return Batch(part[:-1], part[1:], taken=len(part) - 1, carried=self.carry, soft=soft)

    def loss(self, output: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        return cross_entropy(output, batch.targets, batch.soft)

    def evaluate(self, model: Model) -> dict[str, float]:
        if self.valid is None:
            return {}
        text = streams(self.valid, self.valid_batch)
        state, total, places = State.zeros(model.template, self.valid_batch), 0.0, len(text) - 1
        sent = np.zeros(len(model.template.layers))
        chunk = self._chunk(model.parameters["readout.bias"].size)
        for at in range(0, places, chunk):
            part, state = text[at : at + chunk + 1], carry_state(state, self.carry)
            nats, state, activity = model.score(part[:-1], part[1:], state)
            total += nats * (len(part) - 1)
            sent += activity * (len(part) - 1)
        nats, units = total / places, [layer.units for layer in model.template.layers]
        return {
            "bits": nats / float(np.log(2)),
            "perplexity": float(np.exp(min(nats, 700.0))),
            "activity": float(sent @ units / (places * sum(units))),
            **{f"layers.{k}.activity": float(each / places) for k, each in enumerate(sent)},
        }

    def _chunk(self, outputs: int) -> int:
        """Steps of a forward pass of `evaluate`. Bounds the output of the read-out to 64 MB."""
        return self.window if self.carry == "events" else max(1, min(256, (1 << 24) // (self.valid_batch * outputs)))

    def evaluation_window(self, outputs: int) -> tuple[int, int] | None:
        if self.valid is None:
            return None
        return min(self._chunk(outputs), len(self.valid) // self.valid_batch - 1), self.valid_batch

    def digest(self) -> str:
        text = digest_of("language", self.train, self.valid, self.valid_batch, self.carry)
        if self.soft is None:
            return text
        return f"soft targets of weight {self.soft.weight!r}, top_k {self.soft.top_k}, {self.soft.digest}, text {text}"


class Sequences(Task):
    """Base class of sequence tasks: whole sequences, shuffled in every epoch, each from the zero state.

    Parameters
    ----------
    inputs  : S sequences, (S, T, I) float32 or (S, T) symbols
    targets : one target per sequence
    valid   : (inputs, targets) to validate on, or None; (inputs, targets, lengths) if `lengths` are given
    read    : "last" uses the output of the last step of a sequence, "mean" the mean output over its steps
    lengths : (S,) number of steps of each sequence, if they differ; the steps after it do not enter the loss
    seed    : seed of the shuffling

    Raises ValueError for sizes that do not fit each other.
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
        need_choice("read", read, READS)
        need_whole("seed", seed, at_least=0)
        if valid is not None and not isinstance(valid, tuple | list):
            raise TypeError(f"valid: got {type(valid).__name__}, need (inputs, targets), or None")
        if valid is not None and len(valid) != 2 + (lengths is not None):
            need = "(inputs, targets)" if lengths is None else "(inputs, targets, lengths), as `lengths` are given"
            raise ValueError(f"valid: got {len(valid)} entries, need {need}")
        self.inputs, self.targets, self.lengths = _checked("train", inputs, targets, lengths)
        self.valid = None
        if valid is not None:
            kept = _checked("valid", *valid)
            self.valid = kept[:2] if lengths is None else kept
        self.read, self.seed = read, seed
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
        """Weight of each step in the output of its sequence, (T, B) float32."""
        ends = np.full(batch, steps) if lengths is None else lengths
        step = np.arange(steps)[:, None]
        if self.read == "last":
            return (step == ends - 1).astype(np.float32)
        return (step < ends).astype(np.float32) / ends.astype(np.float32)

    def outputs(self, model: Model, inputs: np.ndarray, lengths: np.ndarray | None = None) -> tuple[np.ndarray, float]:
        """Output of each of S sequences, (S, V), and the activity, events per unit, step and sample without padding."""
        read, sent, steps = [], 0, 0
        for at in range(0, len(inputs), EVALUATED):
            part = np.ascontiguousarray(np.moveaxis(inputs[at : at + EVALUATED], 0, 1))
            output, _, tape = model.forward(part, State.zeros(model.template, part.shape[1]))
            ends = None if lengths is None else lengths[at : at + EVALUATED]
            read.append((output * self._shares(len(output), output.shape[1], ends)[:, :, None]).sum(axis=0))
            present = np.arange(len(output))[:, None] < (len(output) if ends is None else ends)
            present = np.broadcast_to(present, output.shape[:2])
            sent += int(tape.events[present].sum())
            steps += int(present.sum())
        units = sum(layer.units for layer in model.template.layers)
        return np.concatenate(read), sent / (steps * units)

    def evaluate(self, model: Model) -> dict[str, float]:
        if self.valid is None:
            return {}
        inputs, targets, *lengths = self.valid
        read, activity = self.outputs(model, inputs, *lengths)
        loss, _ = self._loss(read, targets)
        return {"loss": loss, **self._figures(read, targets), "activity": activity}

    def evaluation_window(self, outputs: int) -> tuple[int, int] | None:
        return None if self.valid is None else (self.valid[0].shape[1], min(EVALUATED, len(self.valid[0])))

    def _figures(self, read: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        return {}

    def digest(self) -> str:
        valid = self.valid or (None, None)
        return digest_of(type(self).__name__, self.inputs, self.targets, *valid, self.read, self.lengths, self.seed)


class Classification(Sequences):
    """Sequence classification with cross-entropy; targets (S,) integers. Other parameters: see `Sequences`."""

    def _check_targets(self, size: int) -> None:
        for name, targets in (("train", self.targets), ("valid", self.valid[1] if self.valid else self.targets)):
            if targets.ndim != 1 or targets.dtype.kind not in "iu" or not 0 <= targets.min() <= targets.max() < size:
                raise ValueError(f"{name} targets: got {targets.dtype} {targets.shape}, need classes 0..{size - 1}")

    def _loss(self, output: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
        return cross_entropy(output, targets)

    def _figures(self, read: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        return {"accuracy": float((read.argmax(axis=1) == targets).mean())}


class Regression(Sequences):
    """Sequence regression with the mean squared error; targets (S, V). Other parameters: see `Sequences`."""

    def _check_targets(self, size: int) -> None:
        for name, targets in (("train", self.targets), ("valid", self.valid[1] if self.valid else self.targets)):
            if targets.ndim != 2 or targets.shape[1] != size or not np.isfinite(targets).all():
                raise ValueError(f"{name} targets: got shape {targets.shape}, need finite numbers (S, {size})")

    def _loss(self, output: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
        return squared_error(output, targets)


def carry_state(state: State, carry: str) -> State:
    """Initial state of a window, from the final state of the previous one and a mode of carry (see `Batch.carried`)."""
    if carry == "state":
        return state
    nothing = state.with_arrays([np.zeros_like(array) for array in state.arrays()])
    return State(nothing.cells, state.outputs, state.gates) if carry == "events" else nothing


def streams(symbols: np.ndarray, batch: int) -> np.ndarray:
    """A text (n,) cut into `batch` streams of equal length, one per column: (n // batch, batch) int64."""
    length = len(symbols) // batch
    return np.ascontiguousarray(np.asarray(symbols, np.int64)[: length * batch].reshape(batch, length).T)


def _checked(
    name: str, inputs: np.ndarray, targets: np.ndarray, lengths: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Sequences, their targets and their lengths as plain arrays. Raises ValueError for sizes that do not fit."""
    inputs = number_array(f"{name} inputs", inputs, "(S, T, I), or symbols (S, T)")
    targets = number_array(f"{name} targets", targets, "(S,) or (S, V)")
    if not targets.ndim:
        raise ValueError(f"{name} targets: got one number, need one target for each sequence")
    if inputs.ndim not in (2, 3) or len(inputs) != len(targets) or not len(inputs) or not inputs.shape[1]:
        raise ValueError(
            f"{name}: got inputs {inputs.shape} and {len(targets)} targets, need as many sequences (S, T, I) as targets"
        )
    if lengths is None:
        return inputs, targets, None
    lengths = plain_array(f"{name} lengths", lengths)
    wrong = lengths.shape != (len(inputs),) or lengths.dtype.kind not in "iu"
    if wrong or lengths.min() < 1 or lengths.max() > inputs.shape[1]:
        raise ValueError(
            f"{name} lengths: got {lengths.dtype} {lengths.shape}, need a whole number 1..{inputs.shape[1]} "
            f"for each of the {len(inputs)} sequences"
        )
    return inputs, targets, lengths


def check_inputs(network: Network, name: str, inputs: np.ndarray) -> None:
    """Raise ValueError, with the position of the fault, for sequences (S, T) or (S, T, I) that cannot be read."""
    if network.symbols is not None:
        if inputs.ndim != 2:
            raise ValueError(f"{name}: got shape {inputs.shape}, need symbols (S, T)")
        check_range(name, inputs, network.symbols, "(sequence, step)")
        return
    size = network.layers[0].inputs
    if inputs.ndim != 3 or inputs.shape[2] != size or inputs.dtype.kind not in "fiub":
        raise ValueError(f"{name}: got {inputs.dtype} {inputs.shape}, need numbers (S, T, {size})")
    # In slices of 256 sequences: the conversion to float32 copies, and data sets are large.
    for at in range(0, len(inputs), 256):
        with np.errstate(over="ignore"):
            wrong = ~np.isfinite(inputs[at : at + 256].astype(np.float32))
        if wrong.any():
            k, step, unit = map(int, np.argwhere(wrong)[0])
            value = inputs[at + k, step, unit]
            raise ValueError(
                f"{name}: got {value} at (sequence, step, input) {(at + k, step, unit)}, need finite float32"
            )


def check_symbols(network: Network, symbols: np.ndarray) -> np.ndarray:
    """The symbols as a plain array.

    Raises ValueError for symbols that the network cannot read, and for a network that cannot predict symbols.
    """
    need_kind("network", network, Network, "a Network")
    known = network.symbols
    if known is None or network.readout is None:
        raise ValueError("network: needs an embedding and a read-out to read and predict symbols")
    size = network.readout.weights.shape[1]
    if size != known:
        raise ValueError(f"network: reads {known} symbols but its read-out predicts {size}; they must be the same")
    symbols = plain_array("symbols", symbols)
    if symbols.ndim != 1 or len(symbols) < 2 or symbols.dtype.kind not in WHOLE:
        raise ValueError(f"symbols: got {symbols.dtype} {symbols.shape}, need at least 2 whole numbers in one row")
    if not (0 <= symbols.min() and symbols.max() < size):
        k = int(np.argmax((symbols < 0) | (symbols >= size)))
        raise ValueError(f"symbols: got {symbols[k]} at position {k}, need 0..{size - 1}")
    return symbols
