"""The training loop: updates, validation between them, and a state that can be saved and continued."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from eventrnn._arithmetic import standard_arithmetic
from eventrnn._arrays import own_arrays
from eventrnn._checks import need_kind
from eventrnn._exclusive import Use, exclusive
from eventrnn.backend import TrainingEngine, WindowResult, training_engine
from eventrnn.network import Network, need_thresholds
from eventrnn.pruning.schedule import Pruning
from eventrnn.state import HeldGates, State
from eventrnn.training.bptt.model import Model
from eventrnn.training.settings import Settings
from eventrnn.training.tasks import LanguageModelling, Task
from eventrnn.training.transaction import Transaction, backup_generator, backup_pruning

# Names in `Trainer.numbers`.
NUMBERS = ("steps", "epoch", "position", "generator", "optimiser", "best_value", "worse", "largest", "operations")


@dataclass(frozen=True)
class Progress:
    """The figures of one update.

    Attributes
    ----------
    step       : number of the update, from 1
    loss       : loss of the window in nats (or in the unit of the task), without penalties; with soft targets as it is
                 minimised, see `cross_entropy`
    penalty    : sum of the penalties of the regularisers and of the activity cost
    activity   : events per unit, step and sample
    support    : share of (step, sample, unit) entries whose surrogate derivative is not zero
    norm       : 2-norm of the gradient before clipping
    rate       : learning rate
    sparsity   : share of the weights of masked matrices that is pruned
    epoch      : number of complete passes over the data
    share      : share of the run that is done, in [0, 1]
    operations : effective multiplications of the layers so far, forward and backward, without the read-out. Forward
                 products count events; backward products count events and entries with a surrogate derivative. Of
                 gated blocks only those with a gate count, and the multiplications of the gates do not
    validation : figures of the validation after this update; empty if there was none
    """

    step: int
    loss: float
    penalty: float
    activity: float
    support: float
    norm: float
    rate: float
    sparsity: float
    epoch: int
    share: float
    operations: int
    validation: Mapping[str, float] = field(default_factory=dict)

    @property
    def bits(self) -> float:
        """The loss in bits."""
        return self.loss / float(np.log(2))


def updates(settings: Settings, task: Task) -> int:
    """Number of updates of a whole run. It is an estimate where windows have random lengths."""
    if not settings.epochs:
        return settings.steps
    taken = task.batch(0, 0, settings.batch, settings.window).taken
    return settings.epochs * -(-task.length(settings.batch) // taken)


def _engine(settings: Settings) -> Callable[..., TrainingEngine]:
    """The class of the engine; that of several devices is imported only where it is needed."""
    if settings.devices == 1:
        return training_engine(settings.backend)
    from eventrnn.training.data_parallel import DataParallelEngine

    return DataParallelEngine


class Diverged(FloatingPointError):
    """The loss, a gradient or a gate of blocks is not finite. The parameters are those before the update, or, where it
    was found in a validation, those of the last one."""


class Trainer:
    """Trains a network on a task.

    Parameters
    ----------
    network  : the network to start from; weights that its sparse matrices do not store stay pruned
    task     : a `Task`, or a text of (n,) integers in which the next symbol is predicted
    settings : the settings of the run
    pruning  : a pruning method that runs while training, or None
    model    : the model that computes outputs and gradients, in place of `Model(network)`

    An exception of any kind, also one that a signal handler raises, leaves the trainer as it was after the last whole
    update. A call from a second Python thread waits for the first one. A call from within a call, by a signal handler
    or by the task, is refused with a RuntimeError. `copy`, `deepcopy` and `pickle` give an independent trainer.
    With backend="cuda", an update that is interrupted while the GPU changes the parameters may be made by half. The
    trainer then refuses every further call until a checkpoint is restored. It cannot be copied. With several devices,
    what breaks off an update ends the processes of the other devices, so that a new trainer is needed.

    Raises ValueError for a task that does not fit the network or the model, for a batch larger than the data, for a
    pruning method that does not end within the run, and, for a network with GRU or LSTM cells, for settings of
    thresholds.
    """

    def __init__(
        self,
        network: Network,
        task: Task | np.ndarray,
        settings: Settings,
        *,
        pruning: Pruning | None = None,
        model: Model | None = None,
    ):
        need_kind("network", network, Network, "a Network")
        need_kind("settings", settings, Settings, "Settings(...)")
        if pruning is not None:
            need_kind("pruning", pruning, Pruning, "a method of eventrnn.pruning, or None")
        if model is not None:
            need_kind("model", model, Model, "a Model, or None")
        self.task = task if isinstance(task, Task) else LanguageModelling(task)
        self.task.check(network, settings.batch, settings.window)
        self.settings, self.pruning = settings, pruning
        if self.task.length(settings.batch) < 1:
            raise ValueError(f"batch: got {settings.batch}, more than the data has")
        if settings.backend != "cpu" and type(model) not in (Model, type(None)):
            kind = type(model).__name__
            raise ValueError(f"backend: got {settings.backend!r}, but a {kind} trains on the cpu only; use 'cpu'")
        if settings.activity_cost:
            need_thresholds(network, f"activity_cost: got {settings.activity_cost}", "leave it out")
        if isinstance(self.task, LanguageModelling) and self.task.carry == "events":
            need_thresholds(network, "carry: got 'events'", "use carry='state'")
        self.model = model or Model(
            network, backward=settings.backward, threads=settings.threads, thresholds=settings.thresholds
        )
        settings.regularisers.check(self.model)
        settings.gates.check(self.model, updates(settings, self.task))
        if pruning is not None:
            steps = updates(settings, self.task)
            if pruning.end >= steps:
                raise ValueError(
                    f"pruning: ends at step {pruning.end}, but training has {steps} steps; "
                    "train longer or end the pruning earlier"
                )
            pruning.check(self.model.parameters)
        self._shapes = {name: value.shape for name, value in self.model.parameters.items()}
        # The share of pruned weights, and the masks that it was counted in.
        self._pruned: tuple[dict[str, np.ndarray], float] | None = None
        self.optimiser = settings.optimiser.build(self.model.parameters, settings.weight_decay)
        self.engine: TrainingEngine = _engine(settings)(self.model, self.task, settings, self.optimiser)
        self.rng = np.random.default_rng(settings.seed)
        self.steps_done = self.epoch = self.position = 0
        self.best: Mapping[str, np.ndarray] = {}
        self.best_value, self.worse = float("inf"), 0
        self.largest, self.operations = "none yet", 0
        self._use = Use("trainer")
        self._transaction = Transaction(self._use, apart=self.engine.apart)

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        self._transaction.settle()
        return copy.deepcopy(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        own_arrays([self.optimiser, self.pruning, self.best, self.engine.state])

    def __deepcopy__(self, memo: dict) -> Trainer:
        other = object.__new__(type(self))
        vars(other).update(self.__getstate__())
        return other

    def __copy__(self) -> Trainer:
        return copy.deepcopy(self)

    # --- running ---

    def run(self, report: Callable[[Progress], None] = lambda progress: None) -> Network:
        """Do all remaining updates. Returns the trained network, whose matrices are dense or, where they were, gated
        blocks; pruned weights are exactly zero."""
        for progress in self:
            report(progress)
        return self.network()

    def __iter__(self) -> Iterator[Progress]:
        while not self.finished:
            progress = self.step()
            yield replace(progress, validation=self.validate()) if self._validation_due() else progress

    @property
    def finished(self) -> bool:
        """Whether all updates are done, or `patience` validations without a new best ended the run."""
        return self.share >= 1 or bool(self.settings.patience and self.worse >= self.settings.patience)

    @property
    def masks_are_final(self) -> bool:
        """Whether pruning is over. Until then no validation counts as the best one, and none ends the run."""
        return self.pruning is None or self.steps_done > self.pruning.end

    @property
    def share(self) -> float:
        """The share of the run that is done, in [0, 1]."""
        if not self.settings.epochs:
            return self.steps_done / self.settings.steps
        return (self.epoch + self.position / self.task.length(self.settings.batch)) / self.settings.epochs

    @exclusive
    @standard_arithmetic
    def step(self) -> Progress:
        """One update on one window: masks, noise, forward, loss, backward, clip, optimiser.

        Raises `Diverged` where the loss or a gradient is not finite. After this or any other exception the trainer is
        as it was after the last whole update.
        """
        self._transaction.settle()
        self._transaction.undo = self._backup()
        try:
            result, rate = self._update()
        except BaseException:
            self._transaction.put_back()
            raise
        return Progress(
            step=self.steps_done,
            loss=result.loss,
            penalty=result.penalty,
            activity=result.activity,
            support=result.support,
            norm=result.norm,
            rate=rate,
            sparsity=self._sparsity(),
            epoch=self.epoch,
            share=self.share,
            operations=self.operations,
        )

    def _backup(self) -> Callable[[], None]:
        """A function that puts back what an update changes before its commit."""
        model, parts = self.model, [backup_generator(self.rng)]
        if self.pruning is not None:
            with self.engine.reading():
                parts.append(backup_pruning(self.pruning, self.steps_done, model.parameters, model.masks))

        def put_back() -> None:
            for part in parts:
                part()

        return put_back

    def _update(self) -> tuple[WindowResult, float]:
        """One update; returns its figures and its learning rate. The engine commits it."""
        settings, task, pruning = self.settings, self.task, self.pruning
        if pruning is not None and pruning.update(self.steps_done, self.model.parameters, self.model.masks):
            self.engine.masks_changed()
        window = settings.draw_window(self.rng)
        batch = task.batch(self.position, self.epoch, settings.batch, window)
        rate = settings.learning_rate * settings.schedule.at(self.share, self.steps_done)
        if batch.carried:
            rate *= len(batch.inputs) / settings.window
        start = batch.carried if self.position else ""

        def after_step(parameters: Mapping[str, np.ndarray], gradients: Mapping[str, np.ndarray]) -> None:
            assert pruning is not None
            pruning.after_step(self.steps_done, parameters, self.model.masks, gradients, rate)

        def commit(change: Callable[[], WindowResult]) -> WindowResult:
            return self._transaction.commit(lambda: self._counted(change(), batch.taken))

        result = self.engine.update(
            batch,
            start=start,
            step=self.steps_done,
            rate=rate,
            after_step=None if pruning is None else after_step,
            commit=commit,
        )
        if result.fault:
            raise Diverged(self._divergence_message(result.fault))
        return result, rate

    def _counted(self, result: WindowResult, taken: int) -> WindowResult:
        """The result of an update that was made, after it was counted."""
        if not result.fault:
            largest = max(result.norms, key=lambda name: result.norms[name])
            self.largest = f"{largest} ({result.norms[largest]:.3g})"
            self.operations += result.operations
            self.steps_done += 1
            self._advance(taken)
        return result

    @exclusive
    @standard_arithmetic
    def validate(self) -> dict[str, float]:
        """The task's figures on held-out data; empty where the task holds nothing out.

        The parameters are those of a forward pass, averaged if the optimiser averages. Once masks are final, `best`
        keeps the parameters of a new best validation. An exception leaves the trainer as it was; `Diverged` is raised
        where the gates of blocks are not finite on that data.
        """
        self._transaction.settle()
        with self.engine.reading(), self.engine.evaluating(self._eval_parameters()) as model:
            try:
                figures = self.task.evaluate(model)
            except FloatingPointError as error:
                raise Diverged(self._divergence_message(str(error), "in the validation after")) from None
            if figures:
                self._transaction.uninterrupted(lambda: self._note(figures[self.task.figure]))
        return figures

    def _note(self, value: float) -> None:
        """Take account of a validation of the parameters in use."""
        best = self.engine.kept() if self.masks_are_final and value < self.best_value else None
        self.optimiser.validated(value, self.model.parameters)
        if not self.masks_are_final:
            return
        # While more blocks are chosen than in a validation, a poor one says little about the run.
        if self.steps_done >= self.settings.gates.anneal_steps:
            self.worse += 1
        if best is not None:
            self.best, self.best_value, self.worse = best, value, 0

    @exclusive
    @standard_arithmetic
    def network(self, *, best: bool = False) -> Network:
        """The trained network. Where it has thresholds, their rule is in `metadata["thresholds"]`.

        best : use the parameters of the best validation, if there was one; otherwise the present parameters, averaged
               if the optimiser averages
        """
        self._transaction.settle()
        with self.engine.reading():
            network = self.model.network(self.best if best and self.best else self._eval_parameters())
        # The network at the start can have had thresholds that the trained one has not.
        metadata = {name: text for name, text in network.metadata.items() if name != "thresholds"}
        if any(layer.cell.thresholded for layer in network.layers):
            metadata["thresholds"] = self.model.thresholds
        return replace(network, metadata=metadata)

    def _eval_parameters(self) -> dict[str, np.ndarray] | None:
        """The parameters that a forward pass would use now, averaged if the optimiser averages; None for the present
        ones."""
        if (self.pruning is None or not self.pruning.has_view) and not self.optimiser.averages:
            return None
        averaged = self.optimiser.averaged(self.model.parameters)
        return averaged if self.pruning is None else self.pruning.masked_view(averaged)

    def _advance(self, taken: int) -> None:
        self.position += taken
        if self.position >= self.task.length(self.settings.batch):
            self.epoch, self.position = self.epoch + 1, 0

    def _validation_due(self) -> bool:
        if self.settings.validate_every and self.steps_done % self.settings.validate_every == 0:
            return True
        return self.share >= 1 or (not self.settings.validate_every and self.position == 0)

    def _divergence_message(self, what: str, when: str = "") -> str:
        place = f"{when} step {self.steps_done}" if when else f"at step {self.steps_done + 1}"
        return (
            f"{what} {place}; the largest gradient before it was that of {self.largest}; "
            f"lower the learning rate ({self.settings.learning_rate}) or the clip ({self.settings.clip})"
        )

    def _sparsity(self) -> float:
        """The share of the weights of masked matrices that is pruned. Counting costs a pass over the masks, so it is
        done again only where a mask is another array, or the method may have changed one in place."""
        masks, step = self.model.masks, self.steps_done - 1
        acted = self.pruning is not None and self.pruning.acts(step)
        if self._pruned is not None and not acted:
            then, share = self._pruned
            if then.keys() == masks.keys() and all(then[name] is mask for name, mask in masks.items()):
                return share
        entries = sum(mask.size for mask in masks.values())
        share = 1 - sum(int(mask.sum()) for mask in masks.values()) / entries if entries else 0.0
        self._pruned = dict(masks), share
        return share

    # --- saving and continuing ---

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be continued: shapes and cells of the network, data, settings and pruning."""
        model = self.model
        return {
            "model": {name: list(shape) for name, shape in self._shapes.items()}
            | {f"layers.{k}.cell": repr(cell) for k, cell in enumerate(model.cells)}
            | {f"{name}.blocks": [*w.block, w.density, w.gate_rule] for name, w in model.gated.items()}
            | {f"{name}.gate_period": period for name, (_, period) in model.template.shared_gates().items()},
            "data": self.task.digest(),
            "settings": asdict(self.settings),
            "pruning": "None" if self.pruning is None else self.pruning.digest(),
        }

    @exclusive
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the state of the run, by name. They are the arrays of the run itself, not copies."""
        self._transaction.settle()
        with self.engine.reading():
            named = {f"parameters.{name}": value for name, value in self.model.parameters.items()}
            named |= {f"optimiser.{name}": value for name, value in self.optimiser.arrays().items()}
        named |= {f"masks.{name}": value for name, value in self.model.masks.items()}
        if self.pruning is not None:
            named |= {f"pruning.{name}": value for name, value in self.pruning.arrays().items()}
        named |= {f"best.{name}": value for name, value in self.best.items()}
        state = self.engine.state
        for k, (cells, outputs) in enumerate(zip(state.cells, state.outputs, strict=True)):
            named |= {f"state.cells.{k}": cells, f"state.outputs.{k}": outputs}
        for name, held in state.gates.items():
            named |= {f"state.gates.{name}": held.gates, f"state.left.{name}": held.left}
        return named

    @exclusive
    def numbers(self) -> dict[str, Any]:
        """The rest of the state of the run, as values that JSON can hold."""
        self._transaction.settle()
        return {
            "steps": self.steps_done,
            "epoch": self.epoch,
            "position": self.position,
            "generator": self.rng.bit_generator.state,
            "optimiser": self.optimiser.numbers(),
            # JSON has no infinity.
            "best_value": self.best_value if self.best else None,
            "worse": self.worse,
            "largest": self.largest,
            "operations": self.operations,
        }

    @exclusive
    def restore(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> None:
        """Continue from the `arrays` and `numbers` of a run with the same `identity`, bit for bit.

        Raises ValueError, before anything is changed, for parameters and states of other shapes and for numbers that
        are missing.
        """
        self._check_restored(arrays, numbers)

        def whole() -> None:
            try:
                self._restore(arrays, numbers)
            except BaseException as error:
                self._transaction.broken = error
                raise

        self._transaction.uninterrupted(whole)

    def _check_restored(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> None:
        missing = [name for name in NUMBERS if name not in numbers]
        if missing:
            raise ValueError(f"numbers: got none named {missing[0]}; give those of Trainer.numbers")
        needed = {f"parameters.{name}": tuple(shape) for name, shape in self._shapes.items()}
        state = self.engine.state
        for k, (cells, outputs) in enumerate(zip(state.cells, state.outputs, strict=True)):
            # Without the batch: the last one of an epoch may have been a smaller one.
            needed |= {f"state.cells.{k}": cells.shape[1:], f"state.outputs.{k}": outputs.shape[1:]}
        for name, held in state.gates.items():
            needed |= {f"state.gates.{name}": held.gates.shape[1:], f"state.left.{name}": ()}
        for name, shape in needed.items():
            found, kind = arrays.get(name), np.dtype(np.int64 if name.startswith("state.left.") else np.float32)
            if not (
                isinstance(found, np.ndarray)
                and found.dtype == kind
                and found.shape[name.startswith("state.") :] == shape
            ):
                raise ValueError(f"arrays: {name} does not fit; need {kind} {shape}, as Trainer.arrays gives it")
        others = [n for n in arrays if n.startswith(("parameters.", "state.")) and n not in needed]
        if others:
            raise ValueError(f"arrays: {others[0]} does not fit; the network has none of that name")

    def _restore(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> None:

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}

        for name, value in part("parameters.").items():
            self.model.parameters[name][...] = value
        self.model.masks.clear()
        self.model.masks.update({name: mask.copy() for name, mask in part("masks.").items()})
        self.engine.masks_changed()
        self.optimiser.restore(part("optimiser."), numbers["optimiser"])
        if self.pruning is not None:
            self.pruning.restore(part("pruning."))
        self.best = {name: value.copy() for name, value in part("best.").items()}
        layers = range(len(self.model.cells))
        self.engine.state = State(
            tuple(arrays[f"state.cells.{k}"].copy() for k in layers),
            tuple(arrays[f"state.outputs.{k}"].copy() for k in layers),
            {
                name: HeldGates(arrays[f"state.gates.{name}"].copy(), arrays[f"state.left.{name}"].copy())
                for name in self.model.template.shared_gates()
            },
        )
        self.steps_done, self.epoch, self.position = numbers["steps"], numbers["epoch"], numbers["position"]
        self.rng.bit_generator.state = numbers["generator"]
        self.best_value = float("inf") if numbers["best_value"] is None else numbers["best_value"]
        self.worse, self.largest, self.operations = numbers["worse"], numbers["largest"], numbers["operations"]
        self._transaction.forget()
