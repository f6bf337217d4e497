"""Exact operation counts: forward, backward, audit and energy."""

from eventrnn.counting.audit import Audit as Audit
from eventrnn.counting.audit import audit as audit
from eventrnn.counting.backward import BackwardCounts as BackwardCounts
from eventrnn.counting.backward import BackwardWork as BackwardWork
from eventrnn.counting.backward import count_backward as count_backward
from eventrnn.counting.counts import NOTE as NOTE
from eventrnn.counting.counts import Counts as Counts
from eventrnn.counting.counts import OpCounts as OpCounts
from eventrnn.counting.counts import count as count
from eventrnn.counting.counts import count_per_step as count_per_step
from eventrnn.counting.counts import events_by_matrix as events_by_matrix
from eventrnn.counting.energy import HOROWITZ_2014 as HOROWITZ_2014
from eventrnn.counting.energy import energy as energy
