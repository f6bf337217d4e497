"""A network as a module whose layers NeuroBench knows: it sees every product of the engine as a call of `nn.Linear`.

This library's engine runs the network. Its recorded events are then shown to one linear layer per matrix and to one
activation module per layer, where the hooks of NeuroBench read them. Needs torch and neurobench.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from neurobench.models import TorchModel
from torch import Tensor, nn

from eventrnn.counting.counts import events_by_matrix
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.simulation import Simulation, simulate
from eventrnn.weights import Weights
from eventrnn.weights.storage import to_bfloat16

#: Steps that are shown in one call.
ROWS = 256


class Product(nn.Linear):
    """A weight matrix as a linear layer without bias.

    NeuroBench counts in the type of `weight`, so that these are float64, in which its sums are exact below 2^53. They
    are no parameter; `stored` is, in the type of the storage, so that the footprint is right too.
    """

    def __init__(self, weights: Weights, *, tied: bool):
        nn.Module.__init__(self)
        self.in_features, self.out_features = weights.shape
        dense = weights.to_dense()
        self.weight = torch.from_numpy(dense.T.astype(np.float64))  # type: ignore[assignment]
        self.bias = None
        if not tied:
            self.stored = _parameter(_stored(weights, dense))
            if weights.scales is not None:
                self.scales = _parameter(torch.from_numpy(weights.scales.copy()))


class Sent(nn.Module):
    """Where NeuroBench reads the outputs of a layer."""

    def forward(self, outputs: Tensor) -> Tensor:
        """The outputs as they are."""
        return outputs


class EventLayers(nn.Module):
    """The network as NeuroBench sees it.

    network : without gated blocks
    options : of `simulate`
    """

    def __init__(self, network: Network, **options: Any):
        super().__init__()
        self.network, self.options = network, options
        self.products, self.outputs, self.others = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        for name, weights in network.matrices().items():
            tied = name == "readout" and network.readout is not None and network.readout.tied
            self.products[_key(name)] = Product(weights, tied=tied)
        for k, layer in enumerate(network.layers):
            # NeuroBench joins modules of equal names.
            self.outputs[f"layer_{k}"] = Sent()
            arrays = {"bias_in": layer.bias_in, "bias_rec": layer.bias_rec}
            arrays |= {"threshold": layer.threshold} if layer.cell.thresholded else {}
            for name, array in arrays.items():
                self.others[f"{name}_{k}"] = _parameter(torch.from_numpy(array.copy()))
        if network.embedding is not None:
            self.others["embedding"] = _parameter(torch.from_numpy(network.embedding.copy()))
        if network.readout is not None:
            self.others["bias_readout"] = _parameter(torch.from_numpy(network.readout.bias.copy()))

    def forward(self, batch: Tensor) -> Tensor:
        """Run a batch (samples, steps, inputs), or (samples, steps) symbols, and show its events to the layers."""
        inputs = np.ascontiguousarray(batch.detach().cpu().transpose(0, 1).numpy())
        simulation = simulate(self.network, inputs, record="events", **self.options)
        self.show(simulation)
        return torch.from_numpy(simulation.output).transpose(0, 1)

    @torch.no_grad()
    def show(self, simulation: Simulation) -> None:
        """Show the recorded values to the layer of every matrix and to the activation of every layer."""
        for name, (_, events) in events_by_matrix(self.network, simulation).items():
            _call(self.products[_key(name)], events, simulation.lengths)
        for k, events in enumerate(simulation.events):
            _call(self.outputs[f"layer_{k}"], events, simulation.lengths)


def wrapped(network: Network, backend: str, threads: int) -> TorchModel:
    """The model that `neurobench_model` returns."""
    model = TorchModel(EventLayers(network, backend=backend, threads=threads))
    model.add_activation_module(Sent)
    return model


def _call(module: nn.Module, events: Events, lengths: np.ndarray | None) -> None:
    """Show a module the values of all steps, without padding.

    Steps with a graded value are shown apart from those whose values are all binary, many in one call: NeuroBench's
    numbers are then those of one call per step, and its dense products are a few large ones.
    """
    steps, batch, _ = events.shape
    graded = np.zeros(steps, bool)
    graded[(events.rows() // max(1, batch))[events.graded]] = True
    present = np.ones((steps, batch), bool) if lengths is None else np.arange(steps)[:, None] < lengths
    dense = events.to_dense()
    for kind in (graded, ~graded):
        chosen = np.flatnonzero(kind)
        for first in range(0, len(chosen), ROWS):
            part = chosen[first : first + ROWS]
            module(torch.from_numpy(dense[part][present[part]].astype(np.float64)))


def _stored(weights: Weights, dense: np.ndarray) -> Tensor:
    """The dense matrix in the type of its storage."""
    if weights.storage == "bfloat16":
        return torch.from_numpy(to_bfloat16(dense).view(np.int16)).view(torch.bfloat16)
    if weights.scales is not None:
        return torch.from_numpy(np.rint(dense / weights.scales[:, None]).astype(np.int8))
    return torch.from_numpy(dense.copy())


def _parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


def _key(name: str) -> str:
    """The name of a matrix without dots, which names of modules cannot have."""
    return name.replace(".", "_")
