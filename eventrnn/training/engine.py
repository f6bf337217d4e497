"""The training engine of the CPU: one update from a batch to new parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np

from eventrnn.backend import WindowResult
from eventrnn.state import State
from eventrnn.training import thresholds
from eventrnn.training.bptt.model import Model, Tape
from eventrnn.training.optim import Rule, clip_by_layer, clip_by_norm, norms
from eventrnn.training.settings import Settings
from eventrnn.training.tasks import Batch, Task, carry_state


class CpuTrainingEngine:
    """Updates a model in place; see `backend.TrainingEngine`."""

    apart = True
    memory_use = ""

    def __init__(self, model: Model, task: Task, settings: Settings, optimiser: Rule):
        self.model, self.task, self.settings, self.optimiser = model, task, settings, optimiser
        self.state = State.zeros(model.template, settings.batch)

    def update(
        self, batch: Batch, *, start: str, step: int, rate: float, after_step: Callable | None, commit: Callable
    ) -> WindowResult:
        """See `backend.TrainingEngine`."""
        model, settings = self.model, self.settings
        steps, samples = batch.inputs.shape[:2]
        carried = start and self.state.batch == samples
        state = carry_state(self.state, start) if carried else State.zeros(model.template, samples)
        noise = settings.regularisers.draw(model, steps, samples, seed=settings.seed, step=step)
        try:
            output, after, tape = model.forward(batch.inputs, state, noise, settings.gates.at(model.gated, step))
        except FloatingPointError as error:
            return WindowResult(fault=str(error))
        loss, d_output = self.task.loss(output, batch)
        penalty = settings.regularisers.penalise(model, tape)
        if not np.isfinite(loss + penalty.loss):
            return WindowResult(fault=f"the loss is {loss + penalty.loss}")
        gradients = model.backward(
            tape,
            d_output,
            activity_cost=settings.activity_cost,
            d_events=tuple(penalty.d_events),
            d_cells=tuple(penalty.d_cells),
            d_logits=penalty.d_logits,
        )
        for k, d_threshold in penalty.d_thresholds.items():
            further = thresholds.gradient(model.thresholds, tape.layers[k].threshold, d_threshold)
            gradients[f"layers.{k}.threshold"] = gradients[f"layers.{k}.threshold"] + further
        sizes = norms(gradients)
        bad = [name for name, size in sizes.items() if not np.isfinite(size)]
        if bad:
            return WindowResult(fault=f"the gradient of {bad[0]} is not finite")
        if settings.clip_layers:
            clip_by_layer(gradients, settings.clip_layers)
        norm = clip_by_norm(gradients, settings.clip)
        result = WindowResult(
            loss=loss,
            penalty=penalty.loss + settings.activity_cost * _mean_sent(tape),
            activity=float(tape.activity),
            support=float(tape.support),
            norm=norm,
            operations=_operations(tape),
            norms=sizes,
        )

        def change() -> WindowResult:
            self.optimiser.step(model.parameters, gradients, rate)
            if after_step is not None:
                after_step(model.parameters, gradients)
            model.apply_masks()
            self.state = after
            return result

        return commit(change)

    def masks_changed(self) -> None:
        """See `backend.TrainingEngine`."""
        self.model.apply_masks()

    def reading(self) -> AbstractContextManager[None]:
        """See `backend.TrainingEngine`."""
        return nullcontext()

    def kept(self) -> Mapping[str, np.ndarray]:
        """See `backend.TrainingEngine`."""
        return {name: array.copy() for name, array in self.model.parameters.items()}

    @contextmanager
    def evaluating(self, parameters: Mapping[str, np.ndarray] | None = None) -> Iterator[Model]:
        """The model with other parameters; its own are put back at the end of the `with` block."""
        own = self.model.parameters
        self.model.parameters = own if parameters is None else dict(parameters)
        try:
            # The running mean of a weight that was pruned meanwhile is not zero.
            self.model.apply_masks()
            yield self.model
        finally:
            self.model.parameters = own


def _operations(tape: Tape) -> int:
    """Effective multiplications of a window.

    An event is multiplied by the kept weights of its unit in the forward pass and in the weight gradient; an open entry
    (non-zero surrogate derivative) is multiplied by them once, in the input gradient.
    """
    return sum(2 * work.of_events + work.of_pairs for work in tape.work.values())


def _mean_sent(tape: Tape) -> float:
    """Mean output of the units, summed over layers."""
    return sum(float(np.mean(layer.y[1:], dtype=np.float64)) for layer in tape.layers)
