"""Event-driven recurrent networks: work that is not done is not paid for.

The public names. Training, pruning, text, plots and test strategies are modules of their own:
`eventrnn.training`, `eventrnn.pruning`, `eventrnn.data`, `eventrnn.plots`, `eventrnn.testing`.

Names and modules are imported when they are first used: SciPy and Numba take a second, for which neither the list of
commands nor the completion of a shell has to wait.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eventrnn import backend as backend
    from eventrnn import cells as cells
    from eventrnn import counting as counting
    from eventrnn import data as data
    from eventrnn import events as events
    from eventrnn import folding as folding
    from eventrnn import io as io
    from eventrnn import network as network
    from eventrnn import plots as plots
    from eventrnn import pruning as pruning
    from eventrnn import simulation as simulation
    from eventrnn import state as state
    from eventrnn import testing as testing
    from eventrnn import training as training
    from eventrnn import weights as weights
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

# The module of each public name.
_HOMES = {
    name: module
    for module, names in {
        "backend": ("BackendUnavailable",),
        "cells": ("Cell", "Surrogate"),
        "counting.audit": ("audit",),
        "counting.counts": ("OpCounts", "count", "count_per_step"),
        "counting.energy": ("energy",),
        "events": ("Events", "encode_delta", "encode_threshold"),
        "folding": ("fold",),
        "io.evnn": ("from_evnn", "to_evnn"),
        "io.model_file": ("ModelFileError", "load", "save"),
        "network": ("Layer", "Network", "Readout"),
        "simulation": ("Simulation", "Simulator", "simulate"),
        "state": ("State",),
        "weights": ("CSR", "NM", "BlockCSR", "Dense", "GatedBlocks", "convert"),
    }.items()
    for name in names
}

# Modules that can be used after `import eventrnn` alone.
_MODULES = frozenset(
    {
        *("backend", "cells", "counting", "data", "events", "folding", "io", "network", "plots", "pruning"),
        *("simulation", "state", "testing", "training", "weights"),
    }
)


if not TYPE_CHECKING:
    # A type checker that sees this function takes every misspelt name for one of type Any.
    def __getattr__(name: str) -> Any:
        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in _HOMES:
            value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        if name == "__all__":
            return list(_HOMES)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
