"""The process of a further GPU: it makes the updates of rank 0 on the samples that it is sent, until rank 0 is gone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from eventrnn.cuda import nccl
from eventrnn.cuda.training.engine import CudaTrainingEngine
from eventrnn.cuda.training.program import Program
from eventrnn.network import Network
from eventrnn.training.data_parallel.messages import (
    Done,
    Failure,
    GiveState,
    Go,
    Job,
    Join,
    Ready,
    Start,
    TakeState,
)
from eventrnn.training.tasks import Batch, LanguageModelling

# Seconds between two looks at whether rank 0 still runs.
LOOK = 0.2


def main() -> None:
    """Work for the process that started this one. Arguments: descriptor of the connection to it, and its number."""
    descriptor, parent = map(int, sys.argv[1:3])
    # Rank 0 decides what follows Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    connection = Connection(descriptor)
    code = 0
    try:
        worker = Worker(connection)
        while True:
            worker.obey(connection.recv())
    except (EOFError, ConnectionResetError, BrokenPipeError):
        # Rank 0 needs no more updates.
        pass
    except BaseException as error:
        code = 1
        connection.send(Failure(type(error).__name__, str(error)))
    # Without the clean-up of CUDA and NCCL, which may wait for a GPU that is gone.
    os._exit(code)


def _end_with(parent: int) -> None:
    """End this process with the one that started it, also while it waits for its GPU."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    os._exit(1)


@dataclass
class FirstBatch(LanguageModelling):
    """What an engine asks the task of a run for, where another process has the data."""

    first: Batch

    def check(self, network: Network, batch: int, window: int) -> None:
        return None

    def batch(self, at: int, epoch: int, batch: int, window: int) -> Batch:
        return self.first

    def evaluation_window(self, outputs: int) -> tuple[int, int] | None:
        return None


class Worker:
    """The engine of this GPU. Its constructor receives what it is made of."""

    def __init__(self, connection: Connection):
        self.connection = connection
        start: Start = connection.recv()
        self.share = start.rank, start.settings.devices
        self.model = start.model
        settings = start.settings
        self.optimiser = settings.optimiser.build(self.model.parameters, settings.weight_decay)
        self.engine = CudaTrainingEngine(
            self.model, FirstBatch(start.first), settings, self.optimiser, share=self.share
        )
        self.program: Program | None = None
        connection.send(Ready(self.engine.device.bus))

    def obey(self, message: Any) -> None:
        """Do what rank 0 asks for."""
        engine = self.engine
        if isinstance(message, Job):
            self._prepare(message)
        elif isinstance(message, Go):
            assert self.program is not None
            with engine.device.on_stream():
                result = engine.launch(self.program, None)
            self.connection.send(Done(result.norm, bool(result.fault)))
        elif isinstance(message, GiveState):
            self.connection.send(engine.own_state())
        elif isinstance(message, TakeState):
            engine.take_state(message.state)
        else:
            assert isinstance(message, Join)
            with engine.device.on_stream():
                engine.join(nccl.Nccl(engine.device, message.identifier, *self.share))
            self.connection.send(Done())

    def _prepare(self, job: Job) -> None:
        engine, model, optimiser = self.engine, self.model, self.optimiser
        if job.masks is not None:
            model.masks.clear()
            model.masks.update(job.masks)
            engine.masks_changed()
        optimiser.steps, optimiser.counted = job.rule_steps, job.counted
        if job.averaged and not optimiser.mean:
            optimiser.mean = {name: np.zeros_like(value) for name, value in model.parameters.items()}
        with engine.device.on_stream():
            self.program = engine.prepare(job.batch, job.start, job.step, job.rate)
            if job.shared:
                engine.share_values()
