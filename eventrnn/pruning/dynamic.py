"""Masks during training: made once, recomputed from dense weights, or regrown with a fixed number of blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import cos, pi

import numpy as np

from eventrnn._checks import need_kind, need_number
from eventrnn.pruning.magnitude import (
    block_scores,
    check_choices,
    check_sparsity,
    from_blocks,
    magnitude_mask,
    to_blocks,
)
from eventrnn.pruning.patterns import PATTERNS, Pattern
from eventrnn.pruning.schedule import Arrays, CallOrderCheck, Masks, Pruning, check_span, is_due
from eventrnn.weights import check_block


class DenseShadowWeights:
    """A dense copy of masked parameters that is trained with straight-through gradients.

    Its matrices are not in the model's masks, so that the optimiser updates every entry. A pruned entry of the
    parameter is zero before the step, so its value after the step is the update, which is added to the dense copy.

    Attributes
    ----------
    dense  : name -> dense weights, float32
    masks  : name -> present mask
    before : name -> mask of weights that were pruned before the method started; these stay pruned
    """

    def __init__(self):
        self.dense: dict[str, np.ndarray] = {}
        self.masks: dict[str, np.ndarray] = {}
        self.before: dict[str, np.ndarray] = {}

    def absorb(self, name: str, parameter: np.ndarray, masks: Masks, decay: float = 0.0) -> np.ndarray:
        """Add the last optimiser step to the dense weights of a matrix. Returns these.

        masks : masks of the model; the one of this matrix is removed, and weights that it prunes stay zero
        decay : share of its value that a pruned weight loses per step
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
        """Set the parameter to the dense weights where the mask is True, and to zero elsewhere.

        mask : new mask, or None to keep the present one

        Returns the mask, in which weights that were pruned before the method started are False.
        """
        if mask is not None:
            self.masks[name] = mask & self.before[name] if name in self.before else mask
        np.copyto(parameter, np.where(self.masks[name], self.dense[name], np.float32(0)))
        return self.masks[name]

    def masked_view(self, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parameters, with the matrices that have a dense copy masked."""
        return parameters | {name: parameters[name] * mask for name, mask in self.masks.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of the state, for a checkpoint."""
        kinds = {"dense": self.dense, "mask": self.masks, "before": self.before}
        return {f"{kind}/{name}": a.copy() for kind, arrays in kinds.items() for name, a in arrays.items()}

    def restore(self, arrays: Arrays) -> None:
        """Restore the state from a checkpoint. Other keys are ignored."""
        kinds = {"dense": self.dense, "mask": self.masks, "before": self.before}
        for key, array in arrays.items():
            kind, _, name = key.partition("/")
            if kind in kinds:
                kinds[kind][name] = array.copy()


@dataclass
class StaticMasks(Pruning):
    """Prune to a pattern at one step of the training, then train the kept weights.

    Attributes
    ----------
    pattern       : pattern of the masks
    start         : step at which the masks are made, from the weights at that step
    names, exempt : see `Pruning`
    """

    pattern: Pattern
    start: int = 0
    names: tuple[str, ...] | None = None
    exempt: tuple[str, ...] = ()

    def __post_init__(self):
        need_kind("pattern", self.pattern, Pattern, PATTERNS)
        check_span(self.start, self.start)
        check_choices(self)

    @property
    def end(self) -> int:
        """The last step at which masks change: `start`."""
        return self.start

    def check(self, parameters: Arrays) -> None:
        """Raise ValueError for a matrix that cannot have the pattern."""
        _check_pattern(self.pattern, self, parameters)

    def acts(self, step: int) -> bool:
        """Whether the masks are made at this step."""
        return step == self.start

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Make the masks at step `start`. Weights that were pruned before stay pruned."""
        if not self.acts(step):
            return False
        for name in self.matrices(parameters):
            mask = self.pattern.mask(name, parameters[name])
            masks[name] = mask & masks[name] if name in masks else mask
        return True


@dataclass
class DynamicMasks(Pruning):
    """Masks that are recomputed every few steps from dense weights with straight-through gradients (Hubara et al.
    2021).

    The forward and the backward pass use masked weights; the optimiser updates all weights. Before `end` the model has
    no masks for these matrices, so no sparsity is reported. From `end` on the masks belong to the model and do not
    change.

    Attributes
    ----------
    pattern       : pattern of the masks
    start, end    : first step, and the step at which the masks become final
    every         : steps between two changes, at most end - start; 40 in the paper
    decay         : share of its value that a pruned weight loses per step, which keeps weights from alternating between
                    kept and pruned (Zhou et al. 2021). The weight decay of the optimiser does not act on pruned weights
    names, exempt : see `Pruning`
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
        need_kind("pattern", self.pattern, Pattern, PATTERNS)
        check_span(self.start, self.end, self.every)
        check_choices(self)
        need_number("decay", self.decay, at_least=0, below=1, what="share")
        # One more than the span, because masks change at `end` as well.
        _check_every(self.every, self.start, self.end, 1 + self.end - self.start)

    def check(self, parameters: Arrays) -> None:
        """Raise ValueError for a matrix that cannot have the pattern."""
        _check_pattern(self.pattern, self, parameters)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Set the parameters to masked weights, with new masks if they are due; at `end` the masks go to the model."""
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
        """The parameters with the present masks applied."""
        return self._shadow.masked_view(parameters)

    def arrays(self) -> dict[str, np.ndarray]:
        """The dense weights and their masks."""
        return self._shadow.arrays()

    def restore(self, arrays: Arrays) -> None:
        """Restore the dense weights and their masks."""
        self._shadow.restore(arrays)


@dataclass
class RegrownMasks(Pruning, CallOrderCheck):
    """Dynamic sparse training with a fixed number of blocks (RigL; Evci et al. 2020).

    At each change the kept blocks of smallest magnitude are dropped, and as many pruned blocks with the largest
    gradient are grown; grown weights start from zero. In the step before a change the matrices are not in the model's
    masks, so that pruned weights have a gradient; they are set to zero before the next forward pass. The optimiser's
    moments of pruned weights contain the gradients of these steps only.

    Attributes
    ----------
    sparsity      : share of pruned blocks, in [0, 1)
    block         : (r, c), presynaptic x postsynaptic
    start, end    : first and last step of the changes
    every         : steps between two changes, less than end - start; 100 in the paper
    share         : share of the kept blocks that are replaced at the first change; it falls to zero at `end` along half
                    a cosine
    statistic     : score of a block, for magnitudes and for gradients (see `block_scores`)
    names, exempt : see `Pruning`
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
    # Masks that are removed from the model for the step before a change.
    _withheld: dict[str, np.ndarray] = field(init=False, repr=False, default_factory=dict)
    # Masks of weights that were pruned before `start`; these stay pruned.
    _before: dict[str, np.ndarray] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self):
        check_span(self.start, self.end, self.every)
        check_sparsity(self.sparsity)
        check_choices(self)
        need_number("share", self.share, above=0, at_most=1)
        _check_every(self.every, self.start, self.end, self.end - self.start)

    def check(self, parameters: Arrays) -> None:
        """Raise ValueError for blocks larger than a matrix and for a sparsity that empties a matrix."""
        for name in self.matrices(parameters):
            check_block(self.block, parameters[name].shape, name)
            magnitude_mask(parameters[name], self.sparsity, block=self.block, statistic=self.statistic)

    def acts(self, step: int) -> bool:
        """Whether masks are made or taken away at this step."""
        return step == self.start or (self.start < step < self.end and (step - self.start) % self.every == 0)

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Make masks by magnitude at `start`; remove them for a step after which they change, to get all gradients."""
        self.note_update()
        if step == self.start:
            for name in self.matrices(parameters):
                if name in masks:
                    self._before[name] = masks[name]
                masks[name] = magnitude_mask(
                    parameters[name], self.sparsity, block=self.block, statistic=self.statistic, within=masks.get(name)
                )
            return True
        if self.acts(step):
            for name in self.matrices(parameters):
                self._withheld[name] = masks.pop(name)
        return False

    def after_step(self, step: int, parameters: Arrays, masks: Masks, gradients: Arrays, rate: float) -> None:
        """Drop and grow blocks, if a change is due after this step."""
        self.note_step()
        fraction = self.share * (1 + cos(pi * (step - self.start) / (self.end - self.start or 1))) / 2
        for name, mask in self._withheld.items():
            parameter = parameters[name]
            parameter *= mask
            before = self._before.get(name)
            masks[name] = self._replaced(parameter, gradients[name], mask, fraction, before)
            if before is not None:
                masks[name] &= before
            parameter *= masks[name]
        self._withheld = {}

    def arrays(self) -> dict[str, np.ndarray]:
        """The masks of weights that were pruned before `start`."""
        return dict(self._before)

    def restore(self, arrays: Arrays) -> None:
        """Restore these masks."""
        self._before = {name: array.astype(bool) for name, array in arrays.items()}

    def _replaced(
        self, weights: np.ndarray, gradient: np.ndarray, mask: np.ndarray, fraction: float, before: np.ndarray | None
    ) -> np.ndarray:
        """The mask after a change in which the share `fraction` of its kept blocks is replaced."""
        kept = to_blocks(mask, self.block).any(axis=(1, 3)).ravel()
        free = ~kept if before is None else ~kept & to_blocks(before, self.block).any(axis=(1, 3)).ravel()
        count = min(int(fraction * kept.sum()), int(free.sum()))
        size = block_scores(weights, self.block, self.statistic).ravel()
        drop = np.argsort(np.where(kept, size, np.inf), kind="stable")[:count]
        wanted = block_scores(gradient, self.block, self.statistic).ravel()
        # A block that was dropped in this change is not grown again, since otherwise nothing might change.
        grow = np.argsort(np.where(free, wanted, -np.inf), kind="stable")[len(kept) - count :]
        kept[drop], kept[grow] = False, True
        grid = [-(-side // b) for side, b in zip(mask.shape, self.block, strict=True)]
        return from_blocks(kept.reshape(grid), self.block, mask.shape)


def _check_every(every: int, start: int, end: int, too_many: int) -> None:
    """Raise ValueError if masks would not change between their first and their last step."""
    if every >= too_many:
        raise ValueError(
            f"every: got {every}, need less than {too_many} for masks that move from step {start} to {end}; "
            "change them more often, or train longer"
        )


def _check_pattern(pattern: Pattern, pruning: Pruning, parameters: Arrays) -> None:
    """Make each mask once, so that the pattern raises ValueError before the training for a matrix that does not fit."""
    for name in pruning.matrices(parameters):
        pattern.mask(name, parameters[name])
