"""The protocol between the training loop and a pruning method, and schedules of sparsity.

The training loop calls a `Pruning` object twice per step:

    if pruning.update(step, parameters, masks):                          before the forward pass
        parameters[name] *= mask for every mask
    ... forward, backward, clip, optimiser ...
    pruning.after_step(step, parameters, masks, gradients, rate)         after the optimiser, before masks are applied

`parameters` (float32 arrays) and `masks` (boolean arrays) are dictionaries of the model with the same names; both are
changed in place. A matrix in `masks` has gradient zero where its mask is False. A matrix that is not in `masks` has its
full gradient. A method that needs the gradient of pruned weights (straight-through, regrowth) therefore removes its
matrices from `masks` for these steps, and sets the pruned weights to zero itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np

from eventrnn._checks import need_names, need_number, need_whole
from eventrnn.weights import MatrixId

Arrays = Mapping[str, np.ndarray]

Masks = dict[str, np.ndarray]

#: The one matrix of an embedding and the read-out that is tied to it, among parameters and masks: (V, E).
EMBEDDING = "embedding"


class Pruning:
    """Base class of the methods that prune during training.

    Attributes
    ----------
    start, end : first and last step at which the method acts; masks do not change after `end`
    names      : matrices to prune; None for all weights of layers and the read-out if it is not tied. The matrix of a
                 tied read-out is pruned where it is named, "embedding": one mask then acts on symbols and on scores
    exempt     : matrices among these that are not pruned: a full name, or a layer (`layers.0`)
    """

    #: whether the method can prune the matrix of a tied read-out
    prunes_tied = False

    start: int
    end: int
    names: tuple[str, ...] | None = None
    exempt: tuple[str, ...] = ()

    def matrices(self, parameters: Arrays) -> tuple[str, ...]:
        """Names of the matrices to prune, in the order of the parameters. Raises ValueError for unknown names."""
        there = [name for name in parameters if prunable(name)]
        if self.names and EMBEDDING in self.names:
            need_tied(EMBEDDING in parameters and "readout.bias" in parameters and "readout" not in parameters)
            if not self.prunes_tied:
                raise ValueError(
                    f"names: got {EMBEDDING!r}, but {type(self).__name__} does not prune the matrix of a tied "
                    "read-out; use GradualPruning or MovementPruning, or prune the readout of network.untied()"
                )
            there.append(EMBEDDING)
        return choose(there, self.names, self.exempt)

    def check(self, parameters: Arrays) -> None:
        """Raise ValueError, before the training, for parameters to which the method does not apply."""
        self.matrices(parameters)

    def acts(self, step: int) -> bool:
        """Whether `update` may change parameters, masks or arrays of the method at this step.

        The trainer copies these before such an `update`, which takes longer than a step of training on a GPU.
        """
        return self.start <= step <= self.end

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Called before the forward pass of a step, numbered from 0. Returns whether `masks` changed."""
        raise TypeError(f"{type(self).__name__} must implement update()")

    def after_step(self, step: int, parameters: Arrays, masks: Masks, gradients: Arrays, rate: float) -> None:
        """Called after the optimiser's step, with its gradients and its learning rate, before masks are applied."""

    def masked_view(self, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parameters that a forward pass would use now; a validation during training measures these.

        They differ from `parameters` for methods whose masks are not in the model's masks.
        """
        return parameters

    @property
    def has_view(self) -> bool:
        """Whether `masked_view` may differ from the parameters. It is not called otherwise, which saves a copy of the
        parameters from a GPU per validation."""
        return type(self).masked_view is not Pruning.masked_view

    def arrays(self) -> dict[str, np.ndarray]:
        """The state of the method beside parameters and masks, for a checkpoint; empty if it has none."""
        return {}

    def restore(self, arrays: Arrays) -> None:
        """Restore the state from `arrays`."""

    def digest(self) -> str:
        """Identifies the method and its settings; a run continues only with a method of the same digest.

        By default it covers the type and all attributes (arrays by content) except those whose names begin with `_`.
        Use such names for attributes that change while training, or override this method.
        """
        return describe(self)


class Combined(Pruning):
    """Several methods, applied one after the other in every step; for example group lasso and block pruning."""

    def __init__(self, *parts: Pruning):
        if not parts:
            raise ValueError("combined: got no pruning method, need at least one")
        self.parts = parts
        self.start, self.end = min(p.start for p in parts), max(p.end for p in parts)

    def __repr__(self) -> str:
        return f"Combined({', '.join(map(repr, self.parts))})"

    def matrices(self, parameters: Arrays) -> tuple[str, ...]:
        """The matrices of all parts."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.matrices(parameters)))

    def check(self, parameters: Arrays) -> None:
        """Check all parts."""
        for part in self.parts:
            part.check(parameters)

    def acts(self, step: int) -> bool:
        """Whether one of the parts acts."""
        return any(part.acts(step) for part in self.parts)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Update all parts in order; each part gets the masks of the parts before it."""
        changed = [part.update(step, parameters, masks) for part in self.parts]
        return any(changed)

    def after_step(self, step: int, parameters: Arrays, masks: Masks, gradients: Arrays, rate: float) -> None:
        """Call all parts in order."""
        for part in self.parts:
            part.after_step(step, parameters, masks, gradients, rate)

    @property
    def has_view(self) -> bool:
        """Whether one of the parts has a view of its own."""
        return any(part.has_view for part in self.parts)

    def masked_view(self, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The view of all parts, one applied after the other."""
        for part in self.parts:
            parameters = part.masked_view(parameters)
        return parameters

    def arrays(self) -> dict[str, np.ndarray]:
        """The state of every part; names begin with the number of the part."""
        return {f"{k}/{name}": a for k, part in enumerate(self.parts) for name, a in part.arrays().items()}

    def restore(self, arrays: Arrays) -> None:
        """Restore every part."""
        for k, part in enumerate(self.parts):
            part.restore({n.partition("/")[2]: a for n, a in arrays.items() if n.partition("/")[0] == str(k)})


class CallOrderCheck:
    """Checks that the training loop calls `update` and `after_step` alternately.

    A method that needs both calls would otherwise fail silently.
    """

    _waiting = False

    def note_update(self) -> None:
        """Record a call of `update`. Raises RuntimeError if `after_step` was not called since the last one."""
        if self._waiting:
            raise RuntimeError(f"{type(self).__name__}: the training loop must call after_step after each update")
        self._waiting = True

    def note_step(self) -> None:
        """Record a call of `after_step`. Raises RuntimeError if `update` was not called since the last one."""
        if not self._waiting:
            raise RuntimeError(f"{type(self).__name__}: the training loop called after_step twice for one update")
        self._waiting = False


def describe(value: Any, within: tuple[int, ...] = ()) -> str:
    """A description of a value that is the same in every process: arrays by SHA-256, objects by type and attributes.

    within : ids of the enclosing objects; a reference to one of them is described by its type only

    Attributes whose names begin with `_` are left out. Cost: O(bytes of the arrays).
    """
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return describe(value.tolist(), within)
        total = hashlib.sha256(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        return f"{value.dtype}{value.shape} {total.hexdigest()[:16]}"
    inner = (*within, id(value))
    if id(value) in within:
        return type(value).__qualname__
    if within and isinstance(value, Pruning):
        return value.digest()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{describe(k, inner)}: {describe(v, inner)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(describe(v, inner) for v in value)})"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(describe(v, inner) for v in value))}}}"
    if isinstance(value, FunctionType):
        # Two functions of the same source line differ in their defaults and in the variables of their closure.
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}{describe((value.__defaults__, held), inner)}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    public = {name: v for name, v in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    if not public and " at 0x" not in (text := repr(value)):
        return text
    return f"{type(value).__qualname__}({', '.join(f'{k}={describe(v, inner)}' for k, v in public.items())})"


def prunable(name: str) -> bool:
    """Whether the parameter with that name is a weight matrix that is pruned by default."""
    return MatrixId(name).gated or name == "readout"


def need_tied(tied: bool) -> None:
    """Raise ValueError, for the name of the tied matrix, unless the read-out is tied."""
    if not tied:
        raise ValueError(
            f"names: got {EMBEDDING!r}, but no read-out is tied to the embedding; name 'readout', or leave it out"
        )


def choose(
    available: Iterable[str], names: tuple[str, ...] | None = None, exempt: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The matrices among `available` that are in `names` (None for all) and not in `exempt`.

    The name of a layer in `exempt`, `layers.0`, stands for both of its matrices. Raises ValueError for an unknown name,
    and if no matrix remains.
    """
    # The names that are returned are those of `available`, which can carry the number of gates (`MatrixId`).
    there = {name: name for name in available}
    names, exempt = None if names is None else need_names("names", names), need_names("exempt", exempt)
    for asked in (*(names or ()), *exempt):
        if asked not in there and (asked not in exempt or not any(name.startswith(f"{asked}.") for name in there)):
            raise ValueError(f"pruning: no matrix {asked!r}; have {', '.join(there)}")
    asked_for = (there[name] for name in names or there)
    chosen = tuple(name for name in asked_for if not any(name == e or name.startswith(f"{e}.") for e in exempt))
    if not chosen:
        raise ValueError(f"pruning: nothing is left to prune, {', '.join(exempt)} are exempt; have {', '.join(there)}")
    return chosen


def check_span(start: int, end: int, every: int = 1) -> None:
    """Raise ValueError unless 0 <= start <= end and every >= 1."""
    need_whole("start", start, at_least=0)
    need_whole("end", end, at_least=0)
    if start > end:
        raise ValueError(f"pruning schedule: got start {start} and end {end}, need 0 <= start <= end")
    need_whole("every", every, at_least=1)


def is_due(step: int, start: int, end: int, every: int) -> bool:
    """Whether masks change at this step: every `every` steps from `start` on, and at `end`."""
    return step == end or (start <= step < end and (step - start) % every == 0)


def cubic_schedule(final: float, start: int, end: int, *, initial: float = 0.0) -> Callable[[int], float]:
    """Sparsity as a function of the step: cubic from `initial` at `start` to `final` at `end` (Zhu and Gupta 2017, eq.
    1).

    Raises ValueError unless 0 <= start < end.
    """
    for name, share in (("final", final), ("initial", initial)):
        need_number(name, share, at_least=0, at_most=1, what="share")
    check_span(start, end)
    if start == end:
        raise ValueError(f"pruning schedule: got start {start} and end {end}, need 0 <= start < end")

    # A function of this one could not be pickled.
    return partial(_cubic, final, start, end, initial)


def _cubic(final: float, start: int, end: int, initial: float, step: int) -> float:
    left = 1 - min(1.0, max(0.0, (step - start) / (end - start)))
    return initial * left**3 + final * (1 - left**3)
