"""Pruning: which weights are removed, when, and in which format the remaining weights are stored.

Functions that prune a network once: `prune` (by magnitude, single weights or blocks), `prune_to` (to a pattern,
`Blocks`, `NofM` or `BlockDiagonal`), `adaprune` (refits the remaining weights on calibration inputs),
`prune_to_operations` (to a budget of measured operations) and `iterative_pruning` (rounds of training and pruning).

Classes that prune during training, passed to the trainer as `pruning=`: `GradualPruning`, `MovementPruning`,
`ThresholdPruning`, `GroupLasso`, `StaticMasks`, `DynamicMasks`, `RegrownMasks`, and `Combined` for several of them. The
protocol between them and the training loop is in `schedule.py`. `methods.py` lists all methods by name.
"""

from __future__ import annotations

from eventrnn.pruning.adaprune import Fit as Fit
from eventrnn.pruning.adaprune import adaprune as adaprune
from eventrnn.pruning.adaprune import refit as refit
from eventrnn.pruning.dynamic import DynamicMasks as DynamicMasks
from eventrnn.pruning.dynamic import RegrownMasks as RegrownMasks
from eventrnn.pruning.dynamic import StaticMasks as StaticMasks
from eventrnn.pruning.magnitude import GradualPruning as GradualPruning
from eventrnn.pruning.magnitude import MovementPruning as MovementPruning
from eventrnn.pruning.magnitude import block_scores as block_scores
from eventrnn.pruning.magnitude import magnitude_mask as magnitude_mask
from eventrnn.pruning.magnitude import magnitude_masks as magnitude_masks
from eventrnn.pruning.nm import legal as legal
from eventrnn.pruning.nm import mask_diversity as mask_diversity
from eventrnn.pruning.nm import nm_mask as nm_mask
from eventrnn.pruning.nm import transposable_mask as transposable_mask
from eventrnn.pruning.operations import CRITERIA as CRITERIA
from eventrnn.pruning.operations import Budgeted as Budgeted
from eventrnn.pruning.operations import prune_to_operations as prune_to_operations
from eventrnn.pruning.patterns import BlockDiagonal as BlockDiagonal
from eventrnn.pruning.patterns import Blocks as Blocks
from eventrnn.pruning.patterns import NofM as NofM
from eventrnn.pruning.patterns import Pattern as Pattern
from eventrnn.pruning.patterns import after_training as after_training
from eventrnn.pruning.patterns import compress as compress
from eventrnn.pruning.patterns import masked as masked
from eventrnn.pruning.patterns import prune as prune
from eventrnn.pruning.patterns import prune_to as prune_to
from eventrnn.pruning.patterns import with_masks as with_masks
from eventrnn.pruning.rewinding import Round as Round
from eventrnn.pruning.rewinding import iterative_pruning as iterative_pruning
from eventrnn.pruning.schedule import Combined as Combined
from eventrnn.pruning.schedule import Pruning as Pruning
from eventrnn.pruning.schedule import cubic_schedule as cubic_schedule
from eventrnn.pruning.threshold import GroupLasso as GroupLasso
from eventrnn.pruning.threshold import ThresholdPruning as ThresholdPruning
