"""Event-driven recurrent networks: work that is not done is not paid for.

The public names. Training, pruning, text, plots and test strategies are modules of their own:
`eventrnn.training`, `eventrnn.pruning`, `eventrnn.data`, `eventrnn.plots`, `eventrnn.testing`.
"""

from __future__ import annotations

from eventrnn.backend import BackendUnavailable as BackendUnavailable
from eventrnn.cells import Cell as Cell
from eventrnn.cells import Surrogate as Surrogate
from eventrnn.counting.audit import audit as audit
from eventrnn.counting.counts import OpCounts as OpCounts
from eventrnn.counting.counts import count as count
from eventrnn.counting.counts import count_per_step as count_per_step
from eventrnn.counting.energy import energy as energy
from eventrnn.events import Events as Events
from eventrnn.events import encode_delta as encode_delta
from eventrnn.events import encode_threshold as encode_threshold
from eventrnn.folding import fold as fold
from eventrnn.io.evnn import from_evnn as from_evnn
from eventrnn.io.evnn import to_evnn as to_evnn
from eventrnn.io.model_file import ModelFileError as ModelFileError
from eventrnn.io.model_file import load as load
from eventrnn.io.model_file import save as save
from eventrnn.network import Layer as Layer
from eventrnn.network import Network as Network
from eventrnn.network import Readout as Readout
from eventrnn.simulation import Simulation as Simulation
from eventrnn.simulation import Simulator as Simulator
from eventrnn.simulation import simulate as simulate
from eventrnn.state import State as State
from eventrnn.weights import CSR as CSR
from eventrnn.weights import NM as NM
from eventrnn.weights import BlockCSR as BlockCSR
from eventrnn.weights import Dense as Dense
from eventrnn.weights import GatedBlocks as GatedBlocks
from eventrnn.weights import convert as convert

__version__ = "0.1.0"
