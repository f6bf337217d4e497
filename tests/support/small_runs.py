"""A small network with a read-out, and inputs for it, for tests of calls rather than of numbers."""

from __future__ import annotations

import numpy as np

from eventrnn.network import Network


def drawn(symbols: bool = False) -> Network:
    """Two layers; with `symbols` 5 of them, otherwise 6 inputs."""
    fed = {"symbols": 5, "embedding": 6} if symbols else {"inputs": 6}
    return Network.random([24, 17], **fed, readout=3, rng=np.random.default_rng(0), threshold=0.05)


def inputs(steps: int, symbols: bool = False) -> np.ndarray:
    """Inputs of two samples for `drawn`."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 5, (steps, 2)) if symbols else rng.normal(size=(steps, 2, 6)).astype(np.float32)
