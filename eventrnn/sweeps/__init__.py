"""Sweeps: many training runs of one recipe with other settings, on worker processes of one machine or of several."""

from __future__ import annotations

from eventrnn.sweeps.driver import Status as Status
from eventrnn.sweeps.driver import SweepStopped as SweepStopped
from eventrnn.sweeps.driver import check_sweep as check_sweep
from eventrnn.sweeps.driver import run_sweep as run_sweep
from eventrnn.sweeps.engines import ENGINES as ENGINES
from eventrnn.sweeps.plan import Study as Study
from eventrnn.sweeps.plan import Sweep as Sweep
from eventrnn.sweeps.plan import load_sweep as load_sweep
from eventrnn.sweeps.results import read_results as read_results
