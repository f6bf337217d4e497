"""Updates of a trainer that are made whole or not at all, whatever is raised meanwhile.

An update computes gradients, which takes nearly all of its time, and then changes parameters, moments, masks and
counters in place. Python runs signal handlers in the main thread only, so these changes are made on another thread,
and the main thread waits for it. What was changed before, the generator and the state of a pruning method, is put back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import copy_context
from functools import partial

import numpy as np

from eventrnn._exclusive import Use
from eventrnn.backend import WindowResult
from eventrnn.cpu.threads import Team
from eventrnn.pruning.schedule import Masks, Pruning


class Transaction:
    """Makes one update of a trainer after the other, and remembers what has to be put back.

    use    : of the trainer, which the work on another thread belongs to
    apart  : whether changes are made on another thread, where no signal handler can break them off
    undo   : puts back what an update has changed; None where there is nothing to put back
    broken : the exception that came in the midst of a commit; None as long as there was none
    """

    def __init__(self, use: Use, *, apart: bool):
        self.use, self.apart = use, apart
        self.undo: Callable[[], None] | None = None
        self.broken: BaseException | None = None
        self._helper = Team(2)

    def __reduce__(self):
        # A trainer settles before it is copied.
        return partial(Transaction, apart=self.apart), (self.use,)

    def commit(self, change: Callable[[], WindowResult]) -> WindowResult:
        """Make the lasting changes of an update; unless they found a fault, nothing is put back any more."""
        results: list[WindowResult] = []

        def whole() -> None:
            try:
                results.append(change())
                if not results[0].fault:
                    self.undo = None
            except BaseException as error:
                self.broken, self.undo = error, None
                raise

        self.uninterrupted(whole)
        return results[0]

    def put_back(self) -> None:
        """Put back what an update has changed that was not committed."""
        if self.undo is not None:
            self.uninterrupted(self._put_back)

    def settle(self) -> None:
        """Put back what an update has changed that was not committed.

        Raises RuntimeError after an exception in the midst of a commit, for example MemoryError.
        """
        self.put_back()
        if self.broken is not None:
            raise RuntimeError(
                f"trainer: its last update failed half-way ({type(self.broken).__name__}: {self.broken}); restore the "
                "last checkpoint, here or in a new trainer"
            ) from self.broken

    def uninterrupted(self, function: Callable[[], object]) -> None:
        """Call a function, on another thread than the main one if `apart`."""
        if not self.apart or threading.current_thread() is not threading.main_thread():
            function()
            return
        # The helper gets the settings of NumPy that this thread has.
        context = copy_context()
        self._helper.run_apart(lambda: context.run(self._as_deputy, function))

    def forget(self) -> None:
        """Start anew, after the whole state was replaced."""
        self.undo = self.broken = None

    def _as_deputy(self, function: Callable[[], object]) -> None:
        self.use.deputy = threading.get_ident()
        try:
            function()
        finally:
            self.use.deputy = None

    def _put_back(self) -> None:
        if self.undo is not None:
            self.undo()
            self.undo = None


def backup_generator(rng: np.random.Generator) -> Callable[[], None]:
    """A function that puts a generator back to its present state."""
    bits, state = rng.bit_generator, rng.bit_generator.state

    def put_back() -> None:
        bits.state = state

    return put_back


def backup_pruning(
    pruning: Pruning, step: int, parameters: Mapping[str, np.ndarray], masks: Masks
) -> Callable[[], None]:
    """A function that puts back a pruning method, its matrices and all masks as they are before `Pruning.update`.

    Arrays are copied at the steps at which the method acts, which costs a pass over its matrices.
    """
    acts = pruning.acts(step)
    weights = {name: parameters[name].copy() for name in pruning.matrices(parameters)} if acts else {}
    kept = {name: mask.copy() if acts else mask for name, mask in masks.items()}
    attributes = _attributes(pruning, acts)

    def put_back() -> None:
        for own, saved in attributes:
            own.clear()
            own.update(saved)
        for name, weight in weights.items():
            parameters[name][...] = weight
        masks.clear()
        masks.update(kept)

    return put_back


def _attributes(pruning: Pruning, with_arrays: bool) -> list[tuple[dict, dict]]:
    """The attributes of a method and of the objects in it, each as the dictionary itself and a copy of it."""
    found: dict[int, tuple[dict, dict]] = {}

    def copied(value):
        if isinstance(value, np.ndarray):
            return value.copy() if with_arrays else value
        if isinstance(value, dict):
            return {key: copied(each) for key, each in value.items()}
        return list(value) if isinstance(value, list) else value

    def visit(value) -> None:
        if isinstance(value, list | tuple):
            for each in value:
                visit(each)
        elif hasattr(value, "__dict__") and not callable(value) and id(value) not in found:
            found[id(value)] = vars(value), {name: copied(each) for name, each in vars(value).items()}
            for each in vars(value).values():
                visit(each)

    visit(pruning)
    return list(found.values())
