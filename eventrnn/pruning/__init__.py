"""Removing weights: masks, when to change them, and the formats that make the holes pay."""

from eventrnn.pruning.magnitude import GradualPruning as GradualPruning
from eventrnn.pruning.magnitude import block_scores as block_scores
from eventrnn.pruning.magnitude import compress as compress
from eventrnn.pruning.magnitude import cubic_schedule as cubic_schedule
from eventrnn.pruning.magnitude import magnitude_mask as magnitude_mask
from eventrnn.pruning.magnitude import prune as prune
