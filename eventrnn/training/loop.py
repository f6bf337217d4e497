"""The training loop of a symbol model: one visible step, gradual pruning inside it, evaluation by the event engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from eventrnn.backend import State
from eventrnn.network import Network, Simulator
from eventrnn.pruning.magnitude import GradualPruning
from eventrnn.training import kernels
from eventrnn.training.bptt import Model
from eventrnn.training.noise import Noise
from eventrnn.training.optim import AdamW, clip_by_norm, cosine_schedule


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes
    ----------
    steps         : parameter updates
    batch         : streams side by side
    window        : time steps a window; gradients stop at its edge, the state goes on
    learning_rate : constant, then a cosine to 2 %
    weight_decay  : decoupled
    clip          : bound on the joint gradient norm
    activity_cost : weight of the mean output in the loss, which quietens units
    dropout       : between layers and before the read-out, one mask a window
    seed          : the run is a function of it, bit for bit (on one machine and BLAS thread count)
    """

    steps: int = 1000
    batch: int = 32
    window: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    activity_cost: float = 0.0
    dropout: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name in ("steps", "batch", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need a whole number >= 1")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, need a positive number")
        for name in ("weight_decay", "activity_cost"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, need a number >= 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, need a rate in [0, 1)")
        if self.seed < 0:
            raise ValueError(f"seed: got {self.seed}, need a whole number >= 0")


@dataclass(frozen=True)
class Progress:
    """One update: its number from 1, the loss in bits a symbol, events per unit and step, gradient norm, sparsity."""

    step: int
    bits: float
    activity: float
    norm: float
    sparsity: float


class Trainer:
    """Trains a network with an embedding and a read-out to predict the next symbol.

    Parameters
    ----------
    network  : where to start; weights that its CSR and block matrices do not store stay pruned
    symbols  : (n,) integers, the training text; cut into `batch` streams of equal length (a tail shorter than a
               stream step is not used)
    pruning  : masks that grow while training, or None
    """

    def __init__(
        self, network: Network, symbols: np.ndarray, settings: Settings, *, pruning: GradualPruning | None = None
    ):
        check_symbols(network, symbols)
        if pruning is not None and pruning.end >= settings.steps:
            raise ValueError(
                f"pruning: reaches its sparsity at step {pruning.end}, but training has {settings.steps} steps; "
                "train longer or end the pruning earlier"
            )
        self.streams = _streams(symbols, settings.batch, settings.window)
        self.settings, self.pruning = settings, pruning
        self.model = Model(network)
        self.optimiser = AdamW(self.model.parameters, weight_decay=settings.weight_decay)
        self.rate = cosine_schedule(settings.learning_rate, settings.steps)
        self.rng = np.random.default_rng(settings.seed)
        self.state = State.zeros(network, settings.batch)
        self.position = 0
        self.steps_done = 0
        if pruning is not None:
            pruning.check(self.model.parameters)

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> Network:
        """All remaining updates; returns the trained network, dense weights, pruned ones exactly zero."""
        for progress in self:
            report(progress)
        return self.model.network()

    def __iter__(self) -> Iterator[Progress]:
        while self.steps_done < self.settings.steps:
            yield self.step()

    def step(self) -> Progress:
        """One window: forward, loss, backward, clip, update, masks."""
        model, settings = self.model, self.settings
        if self.pruning is not None and self.pruning.update(self.steps_done, model.parameters, model.masks):
            model.apply_masks()
        inputs, targets = self._window()
        output, state, tape = model.forward(inputs, self.state, self._noise())
        rows, size = targets.size, output.shape[2]
        d_output = np.empty_like(output)
        loss = kernels.softmax_cross_entropy(rows, size, output.ravel(), targets, 1 / rows, d_output.reshape(-1))
        bits = float(loss / rows / np.log(2))
        if not np.isfinite(bits):
            raise FloatingPointError(
                f"loss is {bits} at step {self.steps_done + 1}; lower the learning rate ({settings.learning_rate})"
            )
        gradients = model.backward(tape, d_output, activity_cost=settings.activity_cost)
        norm = clip_by_norm(gradients, settings.clip)
        self.optimiser.step(model.parameters, gradients, self.rate(self.steps_done))
        model.apply_masks()
        self.state = state
        self.steps_done += 1
        return Progress(self.steps_done, bits, float(tape.activity), norm, self._sparsity())

    def _window(self) -> tuple[np.ndarray, np.ndarray]:
        window = self.settings.window
        if self.position + window + 1 > len(self.streams):
            self.position = 0
            self.state = State.zeros(self.model.like, self.settings.batch)
        at = self.position
        self.position += window
        return self.streams[at : at + window], self.streams[at + 1 : at + window + 1].ravel()

    def _noise(self) -> Noise:
        """Dropout between layers and before the read-out: a mask a window and sample, survivors scaled up."""
        rate, batch = self.settings.dropout, self.settings.batch
        if rate == 0:
            return Noise()
        sizes = [layer.units for layer in self.model.like.layers]
        masks = [(self.rng.random((batch, n), np.float32) >= rate) / np.float32(1 - rate) for n in sizes]
        return Noise(between=tuple(masks[:-1]), top=masks[-1])

    def _sparsity(self) -> float:
        masks = self.model.masks.values()
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.size for m in masks) if masks else 0.0


def evaluate(
    network: Network,
    symbols: np.ndarray,
    *,
    backend: str = "cpu",
    threads: int = 1,
    chunk: int = 4096,
    report: Callable[[int], None] = lambda done: None,
) -> float:
    """Bits per symbol of a text read as one stream, event by event: mean of -log2 p(next symbol).

    symbols : (n,) integers, n >= 2; the first is given, the others are predicted
    report  : called with the number of symbols done after every chunk
    """
    symbols = np.asarray(symbols)
    check_symbols(network, symbols)
    simulator = Simulator(network, backend=backend, threads=threads)
    total = 0.0
    for start in range(0, len(symbols) - 1, chunk):
        stop = min(start + chunk, len(symbols) - 1)
        output = simulator.run(symbols[start:stop, None]).output
        targets = symbols[start + 1 : stop + 1].astype(np.int64)
        total += cross_entropy_bits(output[:, 0], targets)
        report(stop)
    return total / (len(symbols) - 1)


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


def cross_entropy_bits(logits: np.ndarray, targets: np.ndarray) -> float:
    """Sum over rows of -log2 softmax(logits)[target]; logits (rows, V), targets (rows,) integers in 0..V - 1."""
    targets = np.asarray(targets)
    if targets.shape != logits.shape[:1] or (
        targets.size and not 0 <= targets.min() <= targets.max() < logits.shape[1]
    ):
        raise ValueError(f"targets: got shape {targets.shape}, need {logits.shape[:1]} symbols below {logits.shape[1]}")
    scratch = np.empty(logits.size, np.float32)
    flat = np.ascontiguousarray(logits, np.float32).ravel()
    total = kernels.softmax_cross_entropy(len(logits), logits.shape[1], flat, targets.astype(np.int64), 1.0, scratch)
    return float(total / np.log(2))


def _streams(symbols: np.ndarray, batch: int, window: int) -> np.ndarray:
    symbols = np.asarray(symbols, np.int64)
    length = len(symbols) // batch
    if length < window + 1:
        raise ValueError(
            f"text: {len(symbols)} symbols are too few for {batch} streams of one window of {window} and a target; "
            f"need {batch * (window + 1)}, or a smaller batch or window"
        )
    return np.ascontiguousarray(symbols[: length * batch].reshape(batch, length).T)
