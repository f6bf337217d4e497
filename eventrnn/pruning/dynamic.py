"""Masks that follow the weights: static, recomputed while training with straight-through gradients, or regrown."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import cos, pi

import numpy as np

from eventrnn.pruning.magnitude import block_scores, check_sparsity, from_blocks, magnitude_mask, to_blocks
from eventrnn.pruning.patterns import Pattern
from eventrnn.pruning.schedule import Arrays, CallOrderCheck, Masks, Pruning, check_span, is_due


class DenseShadowWeights:
    """Dense weights behind masked parameters, which the gradient of the masked ones moves: straight-through.

    While it is in use its matrices are not in the model's masks, so that the optimiser moves every entry. Where the
    mask is False the parameter was zero before the step; what stands there after it is the step, and is added to the
    shadow.
    """

    def __init__(self):
        self.dense: dict[str, np.ndarray] = {}
        self.masks: dict[str, np.ndarray] = {}
        self.before: dict[str, np.ndarray] = {}

    def absorb(self, name: str, parameter: np.ndarray, masks: Masks, decay: float = 0.0) -> np.ndarray:
        """Take over what the last step did; the dense weights of the matrix.

        masks : the model's, which lose this one; what it pruned before stays zero
        decay : share of its value that a pruned weight loses
        """
        if name in masks:
            self.before[name] = masks.pop(name)
        if name not in self.dense:
            self.dense[name] = parameter.copy()
        else:
            dense = self.dense[name]
            moved = (dense * np.float32(1 - decay) if decay else dense) + parameter
            np.copyto(dense, np.where(self.masks[name], parameter, moved))
        if name in self.before:
            self.dense[name] *= self.before[name]
        return self.dense[name]

    def write_masked(self, name: str, parameter: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Let the parameter be the dense weights where the mask holds, zero elsewhere; None keeps the mask it had.

        Returns the mask, without what was pruned before.
        """
        if mask is not None:
            self.masks[name] = mask & self.before[name] if name in self.before else mask
        np.copyto(parameter, np.where(self.masks[name], self.dense[name], np.float32(0)))
        return self.masks[name]

    def masked_view(self, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Masked copies of the matrices it keeps dense."""
        return parameters | {name: parameters[name] * mask for name, mask in self.masks.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """For a checkpoint."""
        kinds = {"dense": self.dense, "mask": self.masks, "before": self.before}
        return {f"{kind}/{name}": a.copy() for kind, arrays in kinds.items() for name, a in arrays.items()}

    def restore(self, arrays: Arrays) -> None:
        """From a checkpoint; keys of other kinds are left alone."""
        kinds = {"dense": self.dense, "mask": self.masks, "before": self.before}
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            if kind in kinds:
                kinds[kind][name] = array.copy()


@dataclass
class StaticMasks(Pruning):
    """The pattern's masks of the weights as they are at one step, and no others: prune, then train what is left."""

    pattern: Pattern
    start: int = 0
    names: tuple[str, ...] | None = None
    exempt: tuple[str, ...] = ()

    def __post_init__(self):
        check_span(self.start, self.start)

    @property
    def end(self) -> int:
        """The same step."""
        return self.start

    def check(self, parameters: Arrays) -> None:
        """Refuse what the pattern cannot do to a matrix."""
        _check(self.pattern, self, parameters)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """At its step, the masks; a weight pruned before stays pruned."""
        if step != self.start:
            return False
        for name in self.matrices(parameters):
            mask = self.pattern.mask(name, parameters[name])
            masks[name] = mask & masks[name] if name in masks else mask
        return True


@dataclass
class DynamicMasks(Pruning):
    """Masks recomputed every few steps from dense weights that straight-through gradients move (Hubara et al. 2021).

    The forward and backward pass see masked weights, the optimiser moves every weight as if it were there. From `end`
    on the masks are those of the model and stay; until then it does not know of any, and reports no sparsity.

    Attributes
    ----------
    pattern       : which masks
    start, end    : first step, and the step at which the masks become final
    every         : steps between two changes, no more than there are from `start` to `end`; 40 in the paper
    decay         : share of its value that a pruned weight loses in a step; draws what wavers to one side
                    (Zhou et al. 2021). The optimiser's own decay does not reach pruned weights
    names, exempt : as `Pruning`
    """

    pattern: Pattern
    start: int = 0
    end: int = 1
    every: int = 40
    decay: float = 0.0
    names: tuple[str, ...] | None = None
    exempt: tuple[str, ...] = ()
    _shadow: DenseShadowWeights = field(init=False, repr=False, default_factory=DenseShadowWeights)

    def __post_init__(self):
        check_span(self.start, self.end, self.every)
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: got {self.decay}, need a share in [0, 1)")
        # One more than the span: here masks change at `end`, too.
        _check_every(self.every, self.start, self.end, 1 + self.end - self.start)

    def check(self, parameters: Arrays) -> None:
        """Refuse what the pattern cannot do to a matrix."""
        _check(self.pattern, self, parameters)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Masked weights in place of what the optimiser made of them; at `end`, the final masks."""
        if not self.start <= step <= self.end:
            return False
        due, last = is_due(step, self.start, self.end, self.every), step == self.end
        for name in self.matrices(parameters):
            dense = self._shadow.absorb(name, parameters[name], masks, self.decay)
            mask = self._shadow.write_masked(name, parameters[name], self.pattern.mask(name, dense) if due else None)
            if last:
                masks[name] = mask
        return last

    def masked_view(self, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """With the present masks."""
        return self._shadow.masked_view(parameters)

    def arrays(self) -> dict[str, np.ndarray]:
        """The dense weights and the present masks."""
        return self._shadow.arrays()

    def restore(self, arrays: Arrays) -> None:
        """Go on with these."""
        self._shadow.restore(arrays)


@dataclass
class RegrownMasks(Pruning, CallOrderCheck):
    """A fixed number of blocks that wander: the smallest are dropped, and as many grown where the gradient is largest
    (RigL, Evci et al. 2020).

    In the step before masks change, the matrices are not in the model's masks, so that pruned weights have a gradient;
    they are back at zero before the next forward pass. What is grown starts from zero. The optimiser's moments of
    pruned weights see the gradients of these steps only.

    Attributes
    ----------
    sparsity   : share of blocks that are pruned, in [0, 1)
    block      : (r, c)
    start, end : steps between which blocks wander
    every      : steps between two changes, less than there are from `start` to `end`; 100 in the paper
    share      : of the kept blocks, how many move at first; falls to zero at `end` along half a cosine
    statistic  : of a block, for magnitudes and gradients alike (see `block_scores`)
    """

    sparsity: float
    block: tuple[int, int] = (1, 1)
    start: int = 0
    end: int = 1
    every: int = 40
    share: float = 0.3
    statistic: str = "l2"
    names: tuple[str, ...] | None = None
    exempt: tuple[str, ...] = ()
    _hidden: dict[str, np.ndarray] = field(init=False, repr=False, default_factory=dict)
    # What was pruned before the first step stays so.
    _before: dict[str, np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        check_span(self.start, self.end, self.every)
        check_sparsity(self.sparsity)
        if not 0 < self.share <= 1:
            raise ValueError(f"share: got {self.share}, need one in (0, 1]")
        _check_every(self.every, self.start, self.end, self.end - self.start)

    def check(self, parameters: Arrays) -> None:
        """Refuse blocks larger than a matrix and a sparsity that would empty one."""
        for name in self.matrices(parameters):
            magnitude_mask(parameters[name], self.sparsity, block=self.block, statistic=self.statistic)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """At `start` the masks by magnitude; in steps after which they change, none, so that every gradient comes."""
        self.note_update()
        if step == self.start:
            for name in self.matrices(parameters):
                if name in masks:
                    self._before[name] = masks[name]
                masks[name] = magnitude_mask(
                    parameters[name], self.sparsity, block=self.block, statistic=self.statistic, within=masks.get(name)
                )
            return True
        if self.start < step < self.end and (step - self.start) % self.every == 0:
            for name in self.matrices(parameters):
                self._hidden[name] = masks.pop(name)
        return False

    def after_step(self, step: int, parameters: Arrays, masks: Masks, gradients: Arrays, rate: float) -> None:
        """Drop and grow, where it is due."""
        self.note_step()
        fraction = self.share * (1 + cos(pi * (step - self.start) / (self.end - self.start or 1))) / 2
        for name, mask in self._hidden.items():
            parameter = parameters[name]
            parameter *= mask
            before = self._before.get(name)
            masks[name] = self._moved(parameter, gradients[name], mask, fraction, before)
            if before is not None:
                masks[name] &= before
            parameter *= masks[name]
        self._hidden = {}

    def arrays(self) -> dict[str, np.ndarray]:
        """What was pruned before."""
        return dict(self._before)

    def restore(self, arrays: Arrays) -> None:
        """Go on with it."""
        self._before = {name: array.astype(bool) for name, array in arrays.items()}

    def _moved(
        self, weights: np.ndarray, gradient: np.ndarray, mask: np.ndarray, fraction: float, before: np.ndarray | None
    ) -> np.ndarray:
        kept = to_blocks(mask, self.block).any(axis=(1, 3)).ravel()
        free = ~kept if before is None else ~kept & to_blocks(before, self.block).any(axis=(1, 3)).ravel()
        count = min(int(fraction * kept.sum()), int(free.sum()))
        size = block_scores(weights, self.block, self.statistic).ravel()
        drop = np.argsort(np.where(kept, size, np.inf), kind="stable")[:count]
        wanted = block_scores(gradient, self.block, self.statistic).ravel()
        # What was dropped may not come back in the same step, or nothing would wander.
        grow = np.argsort(np.where(free, wanted, -np.inf), kind="stable")[len(kept) - count :]
        kept[drop], kept[grow] = False, True
        grid = [-(-side // b) for side, b in zip(mask.shape, self.block, strict=True)]
        return from_blocks(kept.reshape(grid), self.block, mask.shape)


def _check_every(every: int, start: int, end: int, too_many: int) -> None:
    """Refuse masks that would not change between their first step and their last."""
    if every >= too_many:
        raise ValueError(
            f"every: got {every}, need less than {too_many} for masks that move from step {start} to {end}; "
            "change them more often, or train longer"
        )


def _check(pattern: Pattern, pruning: Pruning, parameters: Arrays) -> None:
    """Ask the pattern for each mask once: cheap beside training."""
    for name in pruning.matrices(parameters):
        pattern.mask(name, parameters[name])
