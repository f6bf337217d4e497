"""What the training loop and a way of pruning say to each other, and schedules of sparsity.

The loop calls a `Pruning` object twice a step:

    if pruning.update(step, parameters, masks):                          before the forward pass
        parameters[name] *= mask for every mask
    ... forward, backward, clip, optimiser ...
    pruning.after_step(step, parameters, masks, gradients, rate)         after the optimiser, before masks are applied

`parameters` and `masks` are the model's own dictionaries, changed in place: float32 arrays and boolean arrays by the
same names. A weight whose matrix is in `masks` gets no gradient where the mask is False; a matrix that is not in
`masks` gets its whole gradient. A rule that needs the gradient of pruned weights (straight-through, regrowth)
therefore keeps its matrices out of `masks` for as long, and sets the pruned weights to zero itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import numpy as np

from eventrnn.weights import MatrixId

Arrays = Mapping[str, np.ndarray]

Masks = dict[str, np.ndarray]


class Pruning:
    """A way of pruning while training; subclasses say when and what.

    Attributes
    ----------
    start, end : first and last step at which it may change something; after `end` masks stay as they are
    names      : which matrices; None for all weights of layers and an untied read-out
    exempt     : of these, the ones to leave alone: whole names, or a layer (`layers.0`)
    """

    start: int
    end: int
    names: tuple[str, ...] | None = None
    exempt: tuple[str, ...] = ()

    def matrices(self, parameters: Arrays) -> tuple[str, ...]:
        """The names of the matrices that it prunes, in the order of the parameters. Raises ValueError."""
        return choose(filter(prunable, parameters), self.names, self.exempt)

    def check(self, parameters: Arrays) -> None:
        """Refuse, before any work, what cannot be done to these parameters. Raises ValueError."""
        self.matrices(parameters)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Before the forward pass of a step, numbered from 0; says whether `masks` changed."""
        raise TypeError(f"{type(self).__name__} has no update of its own")

    def after_step(self, step: int, parameters: Arrays, masks: Masks, gradients: Arrays, rate: float) -> None:
        """After the optimiser's step at that learning rate; `gradients` are those it was given."""

    def masked_view(self, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Parameters as a forward pass of now would see them, where neither they nor the model's masks say so: what a
        validation in the midst of training measures."""
        return parameters

    def arrays(self) -> dict[str, np.ndarray]:
        """What it must remember from step to step, for a checkpoint; empty where parameters and masks say all."""
        return {}

    def restore(self, arrays: Arrays) -> None:
        """Take up what `arrays` gave."""

    def digest(self) -> str:
        """What tells one way of pruning from another: a run is continued with the same one only.

        By default the type and all attributes, arrays by their content, without those whose names begin with `_`: keep
        what changes while training under such names, or give a digest of your own.
        """
        return describe(self)


class Combined(Pruning):
    """Several ways of pruning one after the other in every step, such as group lasso and block pruning."""

    def __init__(self, *parts: Pruning):
        if not parts:
            raise ValueError("combined: got no way of pruning, need at least one")
        self.parts = parts
        self.start, self.end = min(p.start for p in parts), max(p.end for p in parts)

    def __repr__(self) -> str:
        return f"Combined({', '.join(map(repr, self.parts))})"

    def matrices(self, parameters: Arrays) -> tuple[str, ...]:
        """Those of any part."""
        return tuple(dict.fromkeys(name for part in self.parts for name in part.matrices(parameters)))

    def check(self, parameters: Arrays) -> None:
        """Refuse what any part refuses."""
        for part in self.parts:
            part.check(parameters)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """All parts in order; each sees the masks of those before it."""
        changed = [part.update(step, parameters, masks) for part in self.parts]
        return any(changed)

    def after_step(self, step: int, parameters: Arrays, masks: Masks, gradients: Arrays, rate: float) -> None:
        """All parts in order."""
        for part in self.parts:
            part.after_step(step, parameters, masks, gradients, rate)

    def masked_view(self, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What all parts leave."""
        for part in self.parts:
            parameters = part.masked_view(parameters)
        return parameters

    def arrays(self) -> dict[str, np.ndarray]:
        """Those of every part, numbered."""
        return {f"{k}/{name}": a for k, part in enumerate(self.parts) for name, a in part.arrays().items()}

    def restore(self, arrays: Arrays) -> None:
        """Give every part its own."""
        for k, part in enumerate(self.parts):
            part.restore({n.partition("/")[2]: a for n, a in arrays.items() if n.partition("/")[0] == str(k)})


class CallOrderCheck:
    """Sees to it that `update` and `after_step` are called in turn: rules that need both would do nothing, unheard."""

    _waiting = False

    def note_update(self) -> None:
        """`update` was called. Raises RuntimeError if `after_step` was not since the last time."""
        if self._waiting:
            raise RuntimeError(f"{type(self).__name__}: the training loop must call after_step after each update")
        self._waiting = True

    def note_step(self) -> None:
        """`after_step` was called. Raises RuntimeError if `update` was not since the last time."""
        if not self._waiting:
            raise RuntimeError(f"{type(self).__name__}: the training loop called after_step twice for one update")
        self._waiting = False


def describe(value: Any, within: tuple[int, ...] = ()) -> str:
    """A value in words that are the same in another process: arrays by SHA-256, objects by type and attributes.

    Attributes whose names begin with `_` are left out, and what `within` (ids of the objects around it) holds already.
    Cost: O(bytes of the arrays).
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
        # What a closure holds is what tells two made by the same line apart.
        held = [cell.cell_contents for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}{describe((value.__defaults__, held), inner)}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    public = {name: v for name, v in getattr(value, "__dict__", {}).items() if not name.startswith("_")}
    if not public and " at 0x" not in (text := repr(value)):
        return text
    return f"{type(value).__qualname__}({', '.join(f'{k}={describe(v, inner)}' for k, v in public.items())})"


def prunable(name: str) -> bool:
    """Whether a parameter is a weight matrix that pruning takes by default."""
    return MatrixId(name).gated or name == "readout"


def choose(
    available: Iterable[str], names: tuple[str, ...] | None = None, exempt: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Of the matrices there are, those named and not exempt; `layers.0` exempts both matrices of that layer.

    Raises ValueError for names that there are not, and where nothing is left.
    """
    there = tuple(available)
    for asked in (*(names or ()), *exempt):
        if asked not in there and (asked not in exempt or not any(name.startswith(f"{asked}.") for name in there)):
            raise ValueError(f"pruning: no matrix {asked!r}; have {', '.join(there)}")
    chosen = tuple(name for name in names or there if not any(name == e or name.startswith(f"{e}.") for e in exempt))
    if not chosen:
        raise ValueError(f"pruning: nothing is left to prune, {', '.join(exempt)} are exempt; have {', '.join(there)}")
    return chosen


def check_span(start: int, end: int, every: int = 1) -> None:
    """Refuse a schedule that ends before it starts, and one that is never due."""
    if not 0 <= start <= end:
        raise ValueError(f"pruning schedule: got start {start} and end {end}, need 0 <= start <= end")
    if every < 1:
        raise ValueError(f"every: got {every}, need a whole number >= 1")


def is_due(step: int, start: int, end: int, every: int) -> bool:
    """Every so many steps from `start` on, and at `end`."""
    return step == end or (start <= step < end and (step - start) % every == 0)


def cubic_schedule(final: float, start: int, end: int, *, initial: float = 0.0) -> Callable[[int], float]:
    """Sparsity over steps: `initial` until `start`, `final` from `end` on, fast first and slow last between
    (Zhu and Gupta 2017, eq. 1)."""
    if not 0 <= start < end:
        raise ValueError(f"pruning schedule: got start {start} and end {end}, need 0 <= start < end")

    def at(step: int) -> float:
        left = 1 - min(1.0, max(0.0, (step - start) / (end - start)))
        return initial * left**3 + final * (1 - left**3)

    return at
