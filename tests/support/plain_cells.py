"""Networks of cells without thresholds, and a bound on the error of their float32 outputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eventrnn import reference
from eventrnn.cells import Cell
from eventrnn.network import Network
from eventrnn.testing import ALL_CELLS
from support import tolerance

PLAIN = [cell for cell in ALL_CELLS if not cell.thresholded]


def said(cell: Cell) -> str:
    return f"{cell.name}-{cell.variant}"


each_cell = pytest.mark.parametrize("cell", PLAIN, ids=said)


def random_network(cell: Cell, units=(9, 9), inputs=5, seed=0, **options) -> Network:
    """A network with random biases, too."""
    rng = np.random.default_rng(seed)
    drawn = Network.random(list(units), rng=rng, inputs=inputs, cell=cell, **options)
    layers = [
        replace(
            layer,
            bias_in=rng.standard_normal(len(layer.bias_in)).astype(np.float32) / 2,
            bias_rec=rng.standard_normal(len(layer.bias_in)).astype(np.float32) / 2,
        )
        for layer in drawn.layers
    ]
    return replace(drawn, layers=tuple(layers))


def numbers(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def bounded(network: Network, x: np.ndarray) -> list[tolerance.Running]:
    """The outputs of the last layer at every step from the zero state, with a bound on the error of a float32 run."""
    sent = [tolerance.Running(each.astype(np.float64)) for each in x]
    for layer in network.layers:
        zero = tolerance.Running(np.zeros((x.shape[1], layer.units)))
        parameters, c, y = reference.layer_parameters(layer, np.float64), zero, zero
        for t, value in enumerate(sent):
            y, c = tolerance.plain_bound(layer.cell, parameters, value, c, y)
            sent[t] = y
    return sent
