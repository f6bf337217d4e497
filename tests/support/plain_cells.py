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


#: for each gate of PyTorch's order the place of ours: (u, r, g) is (r, z, n) there, and an LSTM has the same order
TORCH_GATES = {"gru": (1, 0, 2), "lstm": (0, 1, 2, 3)}

#: parameters of a layer in PyTorch and here
TORCH_NAMES = {"weight_ih": "w_in", "weight_hh": "w_rec", "bias_ih": "bias_in", "bias_hh": "bias_rec"}


def torch_order(cell: Cell, units: int) -> np.ndarray:
    """The place here of every gate row of PyTorch, (gates * units,)."""
    return np.concatenate([np.arange(k * units, (k + 1) * units) for k in TORCH_GATES[cell.name]])


def torch_module(network: Network):
    """The layers of a network of GRU or LSTM cells of one size as a module of PyTorch, in float64."""
    import torch

    (cell, units), *_ = [(layer.cell, layer.units) for layer in network.layers]
    kind = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell.name]
    module = kind(network.layers[0].inputs, units, len(network.layers)).double()
    order = torch_order(cell, units)
    with torch.no_grad():
        for k, layer in enumerate(network.layers):
            parameters = reference.layer_parameters(layer, np.float64)
            for theirs, ours in TORCH_NAMES.items():
                array = np.ascontiguousarray(parameters[ours][..., order].T)
                getattr(module, f"{theirs}_l{k}").copy_(torch.from_numpy(array))
    return module
