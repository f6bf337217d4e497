"""Fine-tuning: from a trained GRU to an EGRU whose units send as often as is wanted.

An EGRU with the weights of a GRU is another function: a unit sends its cell only where it exceeds the threshold. So the
thresholds are set to the wanted activity, and the network is trained on its task again. Training raises the activity,
since every event helps the task. Therefore a cost of the outputs is part of the loss, the cost rises as long as the
activity is too high and falls when it is too low, and the thresholds are set again after every epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from eventrnn._checks import need_kind, need_number, need_whole
from eventrnn.counting.counts import count
from eventrnn.cpu.engine import MOST_THREADS
from eventrnn.events import Events
from eventrnn.io.imported import as_egru
from eventrnn.network import Layer, Network
from eventrnn.simulation import simulate
from eventrnn.training.bptt.model import Model
from eventrnn.training.optim import Schedule
from eventrnn.training.settings import Settings
from eventrnn.training.tasks import Sequences, Task, digest_of
from eventrnn.training.trainer import Progress, Trainer
from eventrnn.weights import CSR, NM, BlockCSR, Weights, convert
from eventrnn.weights.gated import need_matrices

# Halvings of the interval of a threshold, whose width is then below 2 ** -12.
HALVINGS = 14

# Sequences by which thresholds are set and operations counted, and streams of a text.
SAMPLES, STREAMS = 200, 20

# The cost of the mean output in the first epoch, and the largest factor on it from one epoch to the next.
FIRST_COST, MOST = 1.0, 3.0

# Share of the learning rate in the last epoch.
FINAL = 0.02


@dataclass(frozen=True)
class FineTuned:
    """The result of `fine_tune`.

    Attributes
    ----------
    network : the tuned network of EGRU cells
    given   : figures of the network that was given
    start   : figures of the network of EGRU cells before its training
    tuned   : figures of the tuned network

    Figures are those of `Task.evaluate` on held-out data, and, on the first sequences of the training data, the
    measured `activity` and the multiplications per step and sample, `effective_per_step` and `dense_per_step`.
    """

    network: Network
    given: dict[str, float]
    start: dict[str, float]
    tuned: dict[str, float]


@dataclass(frozen=True)
class Tuning:
    """Settings of a fine-tuning.

    Attributes
    ----------
    activity      : the wanted share of units that send an event in a step, in (0, 1)
    epochs        : passes over the data
    batch, window : as in `Settings`
    learning_rate : in the first half of the epochs; it then falls to 2 % along a cosine
    seed, threads : as in `Settings`

    Raises ValueError for a value outside its range.
    """

    activity: float = 0.1
    epochs: int = 10
    batch: int = 32
    window: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    threads: int = 1

    def __post_init__(self):
        need_number("activity", self.activity, above=0, below=1, what="share")
        need_whole("epochs", self.epochs, at_least=1)
        need_whole("threads", self.threads, at_least=1, at_most=MOST_THREADS)
        self.settings()

    def settings(self) -> Settings:
        """The settings of the training, of which every epoch changes some."""
        return Settings(
            epochs=self.epochs,
            batch=self.batch,
            window=self.window,
            learning_rate=self.learning_rate,
            schedule=Schedule("constant"),
            seed=self.seed,
            threads=self.threads,
        )


def fine_tune(
    network: Network,
    task: Task,
    *,
    activity: float,
    epochs: int = 10,
    batch: int = 32,
    window: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
    threads: int = 1,
    report: Callable[[int, int, str], None] = lambda done, epochs, note: None,
) -> FineTuned:
    """Make an EGRU of a GRU, with the same weights, and train it on its task at a wanted activity.

    Parameters
    ----------
    network : a network of GRU cells, or one of EGRU cells that shall have another activity
    task    : the task that the network was trained on, with held-out data by which to judge it
    report  : called after every epoch with its number, that of all, and a note

    The others are those of `Tuning`. Every layer of the result has the wanted activity, or the nearest below it, on the
    first sequences of the training data. Pruned weights stay pruned. `FineTuning` is the same as a run that can be
    stopped and continued.

    Raises ValueError for other cells, for arguments outside their ranges, and as `Trainer` does; TypeError for gated
    blocks.
    """
    tuning = Tuning(activity, epochs, batch, window, learning_rate, seed, threads)
    run = FineTuning(network, task, tuning)
    for progress in run:
        if run.trainer.finished:
            report(progress.epoch, epochs, f"activity {run.before_thresholds:.3f} before the thresholds were set")
    return run.result()


class FineTuning:
    """A fine-tuning as a run: one `Trainer` per epoch, between which thresholds and the cost of activity are set.

    network, task : as for `fine_tune`
    tuning        : the settings

    `training.run` runs it in a folder and continues it, as it does a `Trainer`. Raises as `fine_tune` does.
    """

    def __init__(self, network: Network, task: Task, tuning: Tuning):
        need_kind("network", network, Network, "a Network")
        need_matrices(network.matrices(), "fine_tune")
        need_kind("task", task, Task, "a Task")
        need_kind("tuning", tuning, Tuning, "Tuning(...)")
        event = all(layer.cell.thresholded for layer in network.layers)
        # Any threshold will do: it is set before the training.
        made = network if event else as_egru(network, threshold=0.0)
        task.check(made, tuning.batch, tuning.window)
        self.network, self.task, self.tuning = network, task, tuning
        self._inputs, self._lengths = _sample(task, tuning.window)
        self.start = self._at_activity(made)
        self._begin(_Place(), self.start)

    # --- running ---

    def __iter__(self) -> Iterator[Progress]:
        while not self.finished:
            yield self.step()

    @property
    def finished(self) -> bool:
        return self.trainer.finished and self.place.epoch + 1 == self.tuning.epochs

    @property
    def steps_done(self) -> int:
        """Updates of all epochs so far."""
        return self.place.steps + self.trainer.steps_done

    def step(self) -> Progress:
        """One update. After the last one of an epoch the thresholds are set, and the network is validated with them."""
        if self.trainer.finished:
            ended = self._ended()
            place = _Place(
                self.place.epoch + 1,
                self.steps_done,
                self.place.operations + self.trainer.operations,
                ended.cost,
            )
            self._begin(place, ended.network)
        done, place = self.trainer.step(), self.place
        return replace(
            done,
            step=self.steps_done,
            epoch=place.epoch + done.epoch,
            share=(place.epoch + done.share) / self.tuning.epochs,
            operations=place.operations + done.operations,
            validation=self._ended().figures if self.trainer.finished else {},
        )

    @property
    def before_thresholds(self) -> float:
        """The activity at the end of the last epoch, before its thresholds were set."""
        return self._ended().activity

    def result(self) -> FineTuned:
        """What `fine_tune` returns, after the last update. Raises RuntimeError before it."""
        if not self.finished:
            raise RuntimeError(f"fine-tuning: epoch {self.place.epoch + 1} of {self.tuning.epochs} is not done; run it")
        ended = self._ended()
        start = self._figures(self.start, self.task.evaluate(Model(self.start)))
        return FineTuned(ended.network, self.given, start, self._figures(ended.network, ended.figures))

    @cached_property
    def given(self) -> dict[str, float]:
        """Figures of the given network, as `FineTuned` says them."""
        return self._figures(self.network, self.task.evaluate(Model(self.network)))

    def _begin(self, place: _Place, network: Network) -> None:
        """Begin the epoch of this place with this network."""
        whole, epoch = self.tuning.settings(), place.epoch
        settings = replace(
            whole,
            epochs=1,
            learning_rate=whole.learning_rate * _rate(epoch, whole.epochs),
            activity_cost=place.cost,
            seed=whole.seed + epoch,
        )
        self.trainer = Trainer(network, _reshuffled(self.task, epoch), settings)
        self.place, self._end = place, None

    def _ended(self) -> _Ended:
        """The end of an epoch whose updates are done. It follows from the state of its trainer."""
        if self._end is None:
            trained = self.trainer.network()
            measured = _measured(trained, self._inputs, self._lengths)["activity"]
            cost = self.place.cost * float(np.clip(measured / self.tuning.activity, 1 / MOST, MOST))
            network = self._at_activity(_pruned_as(self.network, trained))
            self._end = _Ended(network, cost, measured, self.task.evaluate(Model(network)))
        return self._end

    def _at_activity(self, network: Network) -> Network:
        return at_activity(network, self._inputs, self.tuning.activity, lengths=self._lengths)

    def _figures(self, network: Network, held_out: Mapping[str, float]) -> dict[str, float]:
        """What `FineTuned` says of a network: its figures on held-out data, its activity and its operations."""
        return {**held_out, **_measured(network, self._inputs, self._lengths)}

    # --- saving and continuing ---

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be continued: the given network, data and settings."""
        return self.trainer.identity() | {
            "data": self.task.digest(),
            "settings": asdict(self.tuning.settings()),
            "activity": self.tuning.activity,
            "given": digest_of(*self.network.arrays()),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the state of the run, by name: those of the trainer of the epoch."""
        return self.trainer.arrays()

    def numbers(self) -> dict[str, Any]:
        """The rest of the state of the run, as values that JSON can hold."""
        return self.trainer.numbers() | {"fine_tuning": asdict(self.place)}

    def restore(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> None:
        """Continue from the `arrays` and `numbers` of a run with the same `identity`, bit for bit.

        Raises as `Trainer.restore` does; the run is then as it was.
        """
        before = self.place, self.trainer, self._end
        try:
            # Parameters, masks and thresholds of the epoch are those of the checkpoint.
            self._begin(_Place(**numbers["fine_tuning"]), self.start)
            self.trainer.restore(arrays, numbers)
        except BaseException:
            self.place, self.trainer, self._end = before
            raise


@dataclass(frozen=True)
class _Place:
    """Where a fine-tuning is: the number of its epoch from 0, the updates and operations of those before it, and the
    cost of activity in it."""

    epoch: int = 0
    steps: int = 0
    operations: int = 0
    cost: float = FIRST_COST


@dataclass(frozen=True)
class _Ended:
    """The end of an epoch: the network with its thresholds set and its figures on held-out data, the activity before
    they were set, and the cost of activity in the next epoch."""

    network: Network
    cost: float
    activity: float
    figures: dict[str, float]


def at_activity(
    network: Network,
    inputs: np.ndarray | Events,
    activity: float,
    *,
    lengths: np.ndarray | None = None,
    backend: str = "cpu",
) -> Network:
    """The network with its thresholds moved by one number per layer, found by bisection, so that every layer has this
    activity on these inputs, or the nearest below it.

    inputs, lengths : as `simulate` takes them

    Thresholds stay at least 0. Raises ValueError for cells without thresholds. Cost: 14 runs per layer.
    """
    need_kind("network", network, Network, "a Network")
    need_number("activity", activity, above=0, at_most=1, what="share")
    layers: list[Layer] = []
    for k, layer in enumerate(network.layers):
        if not layer.cell.thresholded:
            raise ValueError(f"network: layer {k} has the cell {layer.cell.name!r}, which has no thresholds")
        # A cell is below 1, so that a threshold of 1 silences its unit.
        low, high = -float(layer.threshold.max()), 1.0
        for _ in range(HALVINGS):
            tried = _moved(layer, (low + high) / 2)
            part = replace(network, layers=(*layers, tried), readout=None)
            measured = simulate(part, inputs, lengths=lengths, backend=backend).activity[-1]
            low, high = ((low + high) / 2, high) if measured > activity else (low, (low + high) / 2)
        layers.append(_moved(layer, high))
    return replace(network, layers=tuple(layers))


def _moved(layer: Layer, by: float) -> Layer:
    return replace(layer, threshold=np.maximum(layer.threshold + np.float32(by), np.float32(0)))


def _rate(epoch: int, epochs: int) -> float:
    """Factor on the learning rate in an epoch: 1 in the first half, then down to `FINAL` along a cosine."""
    half = epochs // 2
    if epoch < half or epochs == 1:
        return 1.0
    return FINAL + (1 - FINAL) * 0.5 * (1 + float(np.cos(np.pi * (epoch - half) / max(1, epochs - 1 - half))))


def _reshuffled(task: Task, epoch: int) -> Task:
    """The task with another order of its sequences in every epoch, each of which is a run of its own."""
    if not isinstance(task, Sequences):
        return task
    other = copy.copy(task)
    other.seed = task.seed + epoch
    other._order = (-1, np.empty(0, np.int64))
    return other


def _pruned_as(given: Network, trained: Network) -> Network:
    """The trained network, whose matrices are dense, in the formats of the given one: what was pruned stays so."""
    formats: dict[str, Weights] = {}
    for name, like in given.matrices().items():
        weights = trained.matrices()[name]
        if isinstance(like, BlockCSR):
            formats[name] = convert(weights, "block", block=like.block)
        elif isinstance(like, NM):
            formats[name] = convert(weights, "nm", nm=(like.n, like.m, like.axis))
        elif isinstance(like, CSR):
            formats[name] = CSR.from_weights(weights)
    return trained.with_matrices(formats)


def _sample(task: Task, window: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Inputs of the training data, (T, B, I) or symbols (T, B), and their lengths, or None."""
    if isinstance(task, Sequences):
        drawn = task.batch(0, 0, min(SAMPLES, task.length(1)), window)
        return np.ascontiguousarray(drawn.inputs), drawn.extra
    return task.batch(0, 0, STREAMS, 10 * window).inputs, None


def _measured(network: Network, inputs: np.ndarray, lengths: np.ndarray | None) -> dict[str, float]:
    """Activity and operations on these inputs."""
    result = simulate(network, inputs, lengths=lengths)
    total, steps = count(network, result).total, result.sample_steps
    sent = sum(int(fired.total.sum()) for fired in result.fired)
    return {
        "activity": sent / (steps * sum(layer.units for layer in network.layers)),
        "effective_per_step": total.effective / steps,
        "dense_per_step": total.dense / steps,
    }
