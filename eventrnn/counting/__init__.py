"""Exact operation counts: forward, backward, audit and energy."""

from eventrnn.counting.audit import Audit as Audit
from eventrnn.counting.audit import audit as audit
from eventrnn.counting.audit import audit_neurobench as audit_neurobench
from eventrnn.counting.backward import BackwardCounts as BackwardCounts
from eventrnn.counting.backward import BackwardWork as BackwardWork
from eventrnn.counting.backward import count_backward as count_backward
from eventrnn.counting.counts import NOTE as NOTE
from eventrnn.counting.counts import Counts as Counts
from eventrnn.counting.counts import OpCounts as OpCounts
from eventrnn.counting.counts import count as count
from eventrnn.counting.counts import count_per_step as count_per_step
from eventrnn.counting.counts import events_by_matrix as events_by_matrix
from eventrnn.counting.energy import ENERGY_TABLES as ENERGY_TABLES
from eventrnn.counting.energy import ENGINES as ENGINES
from eventrnn.counting.energy import MEMORIES as MEMORIES
from eventrnn.counting.energy import EnergyTable as EnergyTable
from eventrnn.counting.energy import compare_energy as compare_energy
from eventrnn.counting.energy import energy as energy
from eventrnn.counting.neurobench import NEUROBENCH_DIFFERENCES as NEUROBENCH_DIFFERENCES
from eventrnn.counting.neurobench import NeuroBenchMetrics as NeuroBenchMetrics
from eventrnn.counting.neurobench import neurobench_metrics as neurobench_metrics
from eventrnn.counting.neurobench import neurobench_model as neurobench_model
