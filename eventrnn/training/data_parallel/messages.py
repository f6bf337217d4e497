"""What the processes of a run on several GPUs tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eventrnn.state import State

if TYPE_CHECKING:
    from eventrnn.training.bptt.model import Model
    from eventrnn.training.settings import Settings
    from eventrnn.training.tasks import Batch


@dataclass(frozen=True)
class Start:
    """To a worker, first: the model, the settings of the run, a batch of it for its sizes, and which device it is."""

    model: Model
    settings: Settings
    first: Batch
    rank: int


@dataclass(frozen=True)
class Ready:
    """From a worker: it has its memory. bus : address of its GPU on the bus"""

    bus: str


@dataclass(frozen=True)
class Join:
    """To a worker: join the group with that identifier."""

    identifier: bytes


@dataclass(frozen=True)
class Job:
    """To a worker: prepare an update.

    Attributes
    ----------
    batch       : its samples
    start, step, rate : see `backend.TrainingEngine.update`
    rule_steps  : updates that the rule of the optimiser has made
    counted     : terms of its running mean
    averaged    : whether there is a running mean
    masks       : of pruned weights, where they have changed; else None
    shared      : whether rank 0 sends parameters and optimiser state first
    """

    batch: Batch
    start: str
    step: int
    rate: float
    rule_steps: int
    counted: int
    averaged: bool
    masks: dict[str, np.ndarray] | None
    shared: bool


@dataclass(frozen=True)
class Go:
    """To a worker: make the update that it has prepared."""


@dataclass(frozen=True)
class Done:
    """From a worker: it has joined the group; or it made an update, with that norm of the gradient and that fault."""

    norm: float = 0.0
    failed: bool = False


@dataclass(frozen=True)
class GiveState:
    """To a worker: send the state of its samples."""


@dataclass(frozen=True)
class TakeState:
    """To a worker: replace the state of its samples."""

    state: State


@dataclass(frozen=True)
class Failure:
    """From a worker, last: why it ends. kind : name of the exception's class"""

    kind: str
    text: str
