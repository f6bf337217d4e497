"""Block pruning with a rising threshold, and group lasso on the same blocks (Narang et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from eventrnn._checks import need_flag, need_kind, need_number, need_whole
from eventrnn.pruning.dynamic import DenseShadowWeights
from eventrnn.pruning.magnitude import (
    block_scores,
    check_blocks,
    check_choices,
    check_sparsity,
    from_blocks,
    magnitude_mask,
    to_blocks,
)
from eventrnn.pruning.schedule import Arrays, CallOrderCheck, Masks, Pruning, check_span, is_due
from eventrnn.weights import check_block


@dataclass
class ThresholdPruning(Pruning):
    """Prune the blocks whose largest magnitude is below a threshold that rises slowly, then faster.

    With k = `every`, at the steps start, start + k, ... and at `end` (Narang et al. 2017, with the schedule of the
    unstructured method before it):

        threshold = slope (step - start + 1) / k                                          before `ramp`
        threshold = (slope (ramp - start + 1) + steep * slope (step - ramp + 1)) / k      from `ramp` on
        slope     = 2 q k / (2 (ramp - start) + 3 (end - ramp)) * (r c)^growth

    where q is the `percentile` of |w| of a trained dense matrix. The factor (r c)^growth is not in the paper; it
    accounts for the maximum of a larger block being larger. If `sparsity` is given, the slope follows from it: the last
    threshold prunes that share of the blocks of the trained matrix. Before `end` no larger share is pruned, and at
    `end` exactly that share.

    Attributes
    ----------
    block            : (r, c), presynaptic x postsynaptic
    start, ramp, end : steps, with start <= ramp <= end and start < end
    every            : steps between two changes
    sparsity         : share of blocks that is pruned at `end`, or None for the slope of the paper
    percentile       : percentile that gives q, in (0, 100]
    steep            : ratio of the slopes after and before `ramp`, >= 1
    growth           : exponent of the block size
    statistic        : score of a block (see `block_scores`)
    dense            : compare the threshold with a dense copy of the weights that is trained with straight-through
                       gradients, so that a block can return; otherwise a pruned block stays pruned
    trained          : name -> trained dense matrix for q; a matrix that is missing is taken from the model at `start`
    names, exempt    : see `Pruning`
    """

    block: tuple[int, int] = (1, 1)
    start: int = 0
    ramp: int = 0
    end: int = 1
    every: int = 10
    sparsity: float | None = None
    percentile: float = 90.0
    steep: float = 1.5
    growth: float = 0.25
    statistic: str = "max"
    dense: bool = False
    trained: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    names: tuple[str, ...] | None = None
    exempt: tuple[str, ...] = ()
    _slopes: dict[str, float] = field(init=False, repr=False, default_factory=dict)
    _shadow: DenseShadowWeights = field(init=False, repr=False, default_factory=DenseShadowWeights)

    def __post_init__(self):
        check_span(self.start, self.end, self.every)
        check_choices(self)
        need_whole("ramp", self.ramp, at_least=0)
        need_flag("dense", self.dense)
        need_number("growth", self.growth)
        need_kind("trained", self.trained, Mapping, "a mapping of names to matrices")
        if not self.start <= self.ramp <= self.end or self.start == self.end:
            raise ValueError(
                f"pruning schedule: got start {self.start}, ramp {self.ramp}, end {self.end}; "
                "need start <= ramp <= end and start < end"
            )
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        need_number("percentile", self.percentile, above=0, at_most=100)
        need_number("steep", self.steep, at_least=1)

    def check(self, parameters: Arrays) -> None:
        """Raise ValueError if the last threshold would empty a matrix with its present weights."""
        for name in self.matrices(parameters):
            weights = self.trained.get(name, parameters[name])
            if weights.shape != parameters[name].shape:
                raise ValueError(f"trained: {name} has shape {weights.shape}, need {parameters[name].shape}")
            check_block(self.block, weights.shape, name)
            scores = block_scores(weights, self.block, self.statistic)
            if self.sparsity is not None:
                magnitude_mask(weights, self.sparsity, block=self.block, statistic=self.statistic)
            elif scores.max() < self._rise(self.end) * self._slope(weights):
                raise ValueError(
                    f"threshold: the last one, {self._rise(self.end) * self._slope(weights):.4g}, would empty {name}, "
                    f"whose largest block has {scores.max():.4g}; use a lower percentile or growth, or a sparsity"
                )

    def acts(self, step: int) -> bool:
        """Whether a change is due at this step. With a dense copy, every step moves that."""
        if self.dense:
            return super().acts(step)
        return is_due(step, self.start, self.end, self.every)

    def thresholds(self, step: int, parameters: Arrays) -> dict[str, float]:
        """Threshold of each matrix at a step. Before the first update the slope follows from these parameters."""
        return {
            name: self._rise(step) * self._slopes.get(name, self._slope(self.trained.get(name, parameters[name])))
            for name in self.matrices(parameters)
        }

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Prune the blocks below the threshold if a change is due. The largest block of a matrix is never pruned."""
        if not self.start <= step <= self.end:
            return False
        due, last = is_due(step, self.start, self.end, self.every), step == self.end
        for name in self.matrices(parameters):
            if name not in self._slopes:
                self._slopes[name] = self._slope(self.trained.get(name, parameters[name]))
            if self.dense:
                weights = self._shadow.absorb(name, parameters[name], masks)
                mask = self._mask(step, name, weights, None) if due else None
                mask = self._shadow.write_masked(name, parameters[name], mask)
                if last:
                    masks[name] = mask
            elif due:
                masks[name] = self._mask(step, name, parameters[name], masks.get(name))
        return last or (due and not self.dense)

    def masked_view(self, parameters: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The parameters with the present masks applied."""
        return self._shadow.masked_view(parameters)

    def arrays(self) -> dict[str, np.ndarray]:
        """The slopes, and the dense copies of the weights if there are any."""
        slopes = {f"slope/{name}": np.array(slope) for name, slope in self._slopes.items()}
        return slopes | self._shadow.arrays()

    def restore(self, arrays: Arrays) -> None:
        """Restore slopes and dense copies."""
        self._slopes = {n.removeprefix("slope/"): a.item() for n, a in arrays.items() if n.startswith("slope/")}
        self._shadow.restore(arrays)

    def _rise(self, step: int) -> float:
        """The threshold at a step, divided by the slope."""
        if step < self.ramp:
            return (step - self.start + 1) / self.every
        return (self.ramp - self.start + 1 + self.steep * (step - self.ramp + 1)) / self.every

    def _slope(self, weights: np.ndarray) -> float:
        if self.sparsity is None:
            q = float(np.percentile(np.abs(weights), self.percentile))
            length = 2 * (self.ramp - self.start) + 3 * (self.end - self.ramp)
            return 2 * q * self.every / length * (self.block[0] * self.block[1]) ** self.growth
        scores = np.sort(block_scores(weights, self.block, self.statistic).ravel())
        return float(scores[round(self.sparsity * len(scores))]) / self._rise(self.end)

    def _mask(self, step: int, name: str, weights: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        scores = block_scores(weights, self.block, self.statistic)
        kept = scores >= min(self._rise(step) * self._slopes[name], float(scores.max()))
        if before is not None:
            kept &= to_blocks(before, self.block).any(axis=(1, 3))
        if self.sparsity is not None:
            most = round(self.sparsity * kept.size)
            if step == self.end or (~kept).sum() > most:
                options = {"block": self.block, "statistic": self.statistic, "within": before}
                return magnitude_mask(weights, self.sparsity, **options)
        mask = from_blocks(kept, self.block, weights.shape)
        return mask if before is None else mask & before


@dataclass
class GroupLasso(Pruning, CallOrderCheck):
    """Group lasso: a cost of `strength` times the sum of the 2-norms of all blocks.

    It acts by a proximal step after every `every` steps of the optimiser:

        block <- block max(0, 1 - rates strength size / |block|),    size = sqrt(r c) if scaled, else 1

    where `rates` is the sum of the learning rates of these steps.

    Unlike a step along the gradient of the cost, it makes blocks exactly zero (Yuan and Lin 2006; Parikh and Boyd 2014,
    section 6.5.4). The blocks that are zero at `end` are pruned. A small strength is enough together with block
    pruning, `Combined(GroupLasso(...), ThresholdPruning(...))` (Narang et al. 2017). The step uses the learning rate of
    the schedule without the scaling of the optimiser, like decoupled weight decay.

    Attributes
    ----------
    strength      : factor of the cost, > 0
    block         : (r, c), presynaptic x postsynaptic
    start, end    : first step with the cost, and the step at which it ends
    scaled        : multiply the cost of a block by sqrt(r c), so that one strength suits all block sizes
    names, exempt : see `Pruning`
    every         : steps of the optimiser per proximal step, of which the last is at `end` at the latest. A proximal
                    step passes over all weights on the CPU, which takes longer than a step of training on a GPU
    """

    strength: float
    block: tuple[int, int] = (1, 1)
    start: int = 0
    end: int = 1
    scaled: bool = True
    names: tuple[str, ...] | None = None
    exempt: tuple[str, ...] = ()
    every: int = 1
    _rates: float = field(init=False, repr=False, default=0.0)

    def __post_init__(self):
        check_span(self.start, self.end, self.every)
        check_choices(self)
        need_flag("scaled", self.scaled)
        need_number("strength", self.strength, above=0)

    def check(self, parameters: Arrays) -> None:
        """Raise ValueError for blocks larger than a matrix."""
        check_blocks({name: parameters[name] for name in self.matrices(parameters)}, self.block)

    def acts(self, step: int) -> bool:
        """Whether the blocks that are zero are pruned at this step."""
        return step == self.end

    def update(self, step: int, parameters: Arrays, masks: Masks) -> bool:
        """Prune the blocks that are zero at `end`."""
        self.note_update()
        if not self.acts(step):
            return False
        for name in self.matrices(parameters):
            kept = from_blocks(block_scores(parameters[name], self.block) > 0, self.block, parameters[name].shape)
            masks[name] = kept & masks[name] if name in masks else kept
        return True

    def after_step(self, step: int, parameters: Arrays, masks: Masks, gradients: Arrays, rate: float) -> None:
        """Do the proximal step. Raises ValueError if it makes all weights of a matrix zero."""
        self.note_step()
        if not self.start <= step < self.end:
            return
        self._rates += rate
        if (step - self.start + 1) % self.every and step != self.end - 1:
            return
        rates, self._rates = self._rates, 0.0
        size = float(np.sqrt(self.block[0] * self.block[1])) if self.scaled else 1.0
        for name in self.matrices(parameters):
            parameter = parameters[name]
            if name in masks:
                parameter *= masks[name]
            shrink(parameter, self.block, rates * self.strength * size)
            if not parameter.any():
                raise ValueError(
                    f"group lasso: strength {self.strength} made all of {name} zero at step {step}; use a lower one"
                )

    def arrays(self) -> dict[str, np.ndarray]:
        """The learning rates since the last proximal step, where it is not that of every step."""
        return {"rates": np.array(self._rates)} if self.every > 1 else {}

    def restore(self, arrays: Arrays) -> None:
        """Restore the learning rates since the last proximal step."""
        self._rates = arrays["rates"].item() if "rates" in arrays else 0.0


def shrink(array: np.ndarray, block: tuple[int, int], amount: float) -> None:
    """Lower the 2-norm of every block by `amount`, in place; a block with a smaller norm becomes zero. O(size)."""
    norms = block_scores(array, block, "l2")
    factors = np.maximum(0, 1 - amount / np.where(norms > 0, norms, 1))
    array *= from_blocks(factors.astype(np.float32), block, array.shape)
