"""Fine-tuning: from a trained GRU to an EGRU whose units send as often as is wanted.

An EGRU with the weights of a GRU is another function: a unit sends its cell only where it exceeds the threshold. So the
thresholds are set to the wanted activity, and the network is trained on its task again. Training raises the activity,
since every event helps the task. Therefore a cost of the outputs is part of the loss, the cost rises as long as the
activity is too high and falls when it is too low, and the thresholds are set again after every epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from eventrnn._checks import need_kind, need_number, need_whole
from eventrnn.counting.counts import count
from eventrnn.events import Events
from eventrnn.io.imported import as_egru
from eventrnn.network import Layer, Network
from eventrnn.simulation import simulate
from eventrnn.training.bptt.model import Model
from eventrnn.training.optim import Schedule
from eventrnn.training.settings import Settings
from eventrnn.training.tasks import Sequences, Task
from eventrnn.training.trainer import Trainer
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
    network       : a network of GRU cells, or one of EGRU cells that shall have another activity
    task          : the task that the network was trained on, with held-out data by which to judge it
    activity      : the wanted share of units that send an event in a step, in (0, 1)
    epochs        : passes over the data
    batch, window : as in `Settings`
    learning_rate : in the first half of the epochs; it then falls to 2 % along a cosine
    seed, threads : as in `Settings`
    report        : called after every epoch with its number, that of all, and a note

    Every layer of the result has the wanted activity, or the nearest below it, on the first sequences of the training
    data. Pruned weights stay pruned.

    Raises ValueError for other cells, for arguments outside their ranges, and as `Trainer` does; TypeError for gated
    blocks.
    """
    need_kind("network", network, Network, "a Network")
    need_matrices(network.matrices(), "fine_tune")
    need_kind("task", task, Task, "a Task")
    need_number("activity", activity, above=0, below=1, what="share")
    for name, value in (("epochs", epochs), ("batch", batch), ("window", window)):
        need_whole(name, value, at_least=1)
    event = all(layer.cell.thresholded for layer in network.layers)
    # Any threshold will do: it is set before the training.
    made = network if event else as_egru(network, threshold=0.0)
    task.check(made, batch, window)
    inputs, lengths = _sample(task, window)
    made = start = at_activity(made, inputs, activity, lengths=lengths)
    given, began = (_figures(each, task, inputs, lengths) for each in (network, start))
    cost = FIRST_COST
    for epoch in range(epochs):
        settings = Settings(
            epochs=1,
            batch=batch,
            window=window,
            learning_rate=learning_rate * _rate(epoch, epochs),
            schedule=Schedule("constant"),
            activity_cost=cost,
            seed=seed + epoch,
            threads=threads,
        )
        trained = Trainer(made, _reshuffled(task, epoch), settings).run()
        measured = _measured(trained, inputs, lengths)["activity"]
        cost *= float(np.clip(measured / activity, 1 / MOST, MOST))
        made = at_activity(_pruned_as(network, trained), inputs, activity, lengths=lengths)
        report(epoch + 1, epochs, f"activity {measured:.3f} before the thresholds were set")
    return FineTuned(made, given, began, _figures(made, task, inputs, lengths))


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


def _figures(network: Network, task: Task, inputs: np.ndarray, lengths: np.ndarray | None) -> dict[str, float]:
    """What `FineTuned` says of a network."""
    return task.evaluate(Model(network)) | _measured(network, inputs, lengths)


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
