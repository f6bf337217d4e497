"""A small network with a read-out, and inputs for it, for tests of calls rather than of numbers."""

from __future__ import annotations

import numpy as np

from eventrnn.cells import Cell
from eventrnn.network import Network
from support.gated import gated

#: what a layer can be, beside one of EGRU cells with plain matrices
KINDS = ("gru", "lstm", "gated")


def drawn(symbols: bool = False, kind: str = "egru") -> Network:
    """Two layers; with `symbols` 5 of them, otherwise 6 inputs. The kind is "egru" or one of `KINDS`."""
    fed = {"symbols": 5, "embedding": 6} if symbols else {"inputs": 6}
    return of_kind(kind, [24, 17], readout=3, **fed)


def of_kind(kind: str, units: list[int], **sizes) -> Network:
    """A random network of a kind."""
    cell = Cell(kind) if kind in ("gru", "lstm") else Cell()
    options = sizes | ({"threshold": 0.05} if cell.thresholded else {})
    network = Network.random(units, rng=np.random.default_rng(0), cell=cell, **options)
    if kind != "gated":
        return network
    matrices = network.matrices().items()
    return network.with_matrices({name: gated(weights, block=(4, 3), rule="softmax") for name, weights in matrices})


def inputs(steps: int, symbols: bool = False) -> np.ndarray:
    """Inputs of two samples for `drawn`."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 5, (steps, 2)) if symbols else rng.normal(size=(steps, 2, 6)).astype(np.float32)
