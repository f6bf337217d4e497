"""The training engine of several GPUs: that of the first one, which leads those of the others."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn._gpus import VARIABLE
from eventrnn.backend import WindowResult
from eventrnn.cuda import nccl
from eventrnn.cuda.training.engine import CudaTrainingEngine
from eventrnn.cuda.training.program import Program
from eventrnn.state import State
from eventrnn.training.data_parallel import need_devices
from eventrnn.training.data_parallel.crew import Crew
from eventrnn.training.data_parallel.messages import Done, GiveState, Go, Job, Join, Ready, Start, TakeState

if TYPE_CHECKING:
    from eventrnn.training.bptt.model import Model
    from eventrnn.training.optim import Rule
    from eventrnn.training.settings import Settings
    from eventrnn.training.tasks import Batch, Task


class DataParallelEngine(CudaTrainingEngine):
    """Updates a model on `settings.devices` GPUs; see `backend.TrainingEngine`.

    The state and all figures are those of the joined batch. An error on one device ends the run on all of them; every
    later update raises it again, and a new trainer continues from the last checkpoint. So does an interruption between
    the start and the end of an update.

    Raises, before any work, ValueError for more devices than there are and for a task whose loss is not the mean
    cross-entropy of all steps; BackendUnavailable without NCCL; MemoryError for a device that has too little memory.
    """

    def __init__(self, model: Model, task: Task, settings: Settings, optimiser: Rule):
        ranks = settings.devices
        if not task.is_cross_entropy_of_steps or "readout.bias" not in model.parameters:
            raise ValueError(
                f"devices: got {ranks}, but the loss of {type(task).__name__} is not the mean cross-entropy of all "
                "steps and samples, as that of LanguageModelling is; use devices=1"
            )
        names = need_devices(ranks)
        first = task.batch(0, 0, settings.batch, settings.window)
        self._shared = False
        self._unanswered: WindowResult | None = None
        self._sent_masks: dict[str, np.ndarray] | None = None
        self.crew = Crew(names, ranks)
        weakref.finalize(self, self.crew.end)
        try:
            for rank in self.others:
                self.crew.send(rank, Start(model, settings, first, rank))
            super().__init__(model, task, settings, optimiser, share=(0, ranks))
            self._join_all()
        except BaseException:
            self.crew.end()
            raise

    @property
    def others(self) -> range:
        """The ranks of the other devices."""
        return range(1, self.crew.ranks)

    def _join_all(self) -> None:
        """Connect the GPUs."""
        buses = {0: self.device.bus} | {rank: self.crew.receive(rank, Ready).bus for rank in self.others}
        if len(set(buses.values())) < len(buses):
            raise ValueError(
                f"devices: two of {len(buses)} processes have the same GPU ({', '.join(buses.values())}); let the "
                f"first entry of {VARIABLE} name the GPU of this process"
            )
        identifier = nccl.new_identifier(self.device)
        for rank in self.others:
            self.crew.send(rank, Join(identifier))

        def join() -> nccl.Nccl:
            with self.device.on_stream():
                return nccl.Nccl(self.device, identifier, 0, self.crew.ranks)

        group = self.crew.together(join)
        self.crew.abort = group.abort
        with self.crew.waiting(), self.device.on_stream():
            self.join(group)
        for rank in self.others:
            self.crew.receive(rank, Done)

    # --- the protocol ---

    @property
    def memory_use(self) -> str:
        """See `backend.TrainingEngine`."""
        return f"{super().memory_use}; as many on each of {self.crew.ranks} devices"

    @property
    def state(self) -> State:
        """State of the network after the last window, of all samples."""
        self._take_answers()
        for rank in self.others:
            self.crew.send(rank, GiveState())
        parts = [self.own_state(), *(self.crew.receive(rank, State) for rank in self.others)]
        arrays = [np.concatenate(each, axis=0) for each in zip(*(part.arrays() for part in parts), strict=True)]
        return parts[0].with_arrays(arrays)

    @state.setter
    def state(self, state: State) -> None:
        ranks = self.crew.ranks
        if state.batch % ranks:
            raise ValueError(f"state: got {state.batch} samples, which {ranks} devices cannot share; use devices=1")
        size = state.batch // ranks
        self._take_answers()
        for rank in range(ranks):
            own = slice(rank * size, (rank + 1) * size)
            part = state.with_arrays([np.ascontiguousarray(array[own]) for array in state.arrays()])
            if rank:
                self.crew.send(rank, TakeState(part))
            else:
                self.take_state(part)

    def update(
        self,
        batch: Batch,
        *,
        start: str,
        step: int,
        rate: float,
        after_step: Callable[[Any, Any], None] | None,
        commit: Callable[[Callable[[], WindowResult]], WindowResult],
    ) -> WindowResult:
        """See `backend.TrainingEngine`."""
        ranks, samples = self.crew.ranks, batch.inputs.shape[1]
        if samples % ranks:
            raise ValueError(f"batch: got {samples} samples, which {ranks} devices cannot share; need a multiple")
        self._take_answers()
        try:
            with self.device.on_stream():
                self._take_over()
                optimiser = self.optimiser
                job = Job(
                    batch,
                    start,
                    step,
                    rate,
                    optimiser.steps,
                    optimiser.counted,
                    bool(optimiser.mean),
                    None if self._masks is self._sent_masks else self._masks,
                    self._shared,
                )
                for rank in self.others:
                    self.crew.send(rank, replace(job, batch=batch.part(rank, ranks)))
                self._sent_masks = self._masks
                program = self.prepare(batch.part(0, ranks), start, step, rate)
                if self._shared:
                    self.share_values()
                    self._shared = False
            return commit(lambda: self._change(program, None, after_step))
        except BaseException as error:
            # The others may wait for what this process no longer does.
            self.crew.break_up(error)
            raise

    def launch(self, program: Program, loss: float | None) -> WindowResult:
        """See `CudaTrainingEngine.launch`; on all devices."""
        with self.crew.waiting():
            for rank in self.others:
                self.crew.send(rank, Go())
            result = super().launch(program, loss)
        self._unanswered = result
        return result

    def _take_answers(self) -> None:
        """Take the answers of the last update, which must be that of this device."""
        result, self._unanswered = self._unanswered, None
        if result is None:
            self.crew.need_whole()
            return
        for rank in self.others:
            answer = self.crew.receive(rank, Done)
            if answer != Done(result.norm, bool(result.fault)):
                error = RuntimeError(f"devices: the gradient of device {rank} is not that of device 0")
                self.crew.break_up(error)
                raise error

    def _take_over(self) -> bool:
        sent = super()._take_over()
        # Validations take over too; the other devices get all of it before the next update.
        self._shared |= sent
        return sent
