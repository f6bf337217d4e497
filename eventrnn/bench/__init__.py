"""Measured inference: our engine beside its rivals, interleaved in one run, medians, compile time apart.

`case.py` says what can be measured, `rivals.py` against whom, `contest.py` how times become figures; `measure.py` joins
them. `engine.py` is all that knows the engine from within.
"""

from __future__ import annotations

from eventrnn.bench.bandwidth import first_call as first_call
from eventrnn.bench.case import LAYER_RIVALS as LAYER_RIVALS
from eventrnn.bench.case import PRODUCT_RIVALS as PRODUCT_RIVALS
from eventrnn.bench.case import RIVALS as RIVALS
from eventrnn.bench.case import Case as Case
from eventrnn.bench.inference import inference as inference
from eventrnn.bench.machine import device as device
from eventrnn.bench.machine import versions as versions
from eventrnn.bench.networks import at_activity as at_activity
from eventrnn.bench.networks import random_events as random_events
from eventrnn.bench.networks import random_network as random_network
from eventrnn.bench.networks import random_weights as random_weights
from eventrnn.bench.timing import interleaved as interleaved
from eventrnn.bench.training import TRAINING_RIVALS as TRAINING_RIVALS
from eventrnn.bench.training import TrainingCase as TrainingCase
from eventrnn.bench.training import training as training
