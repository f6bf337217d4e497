"""Layers on tensor cores, compared with float64 step by step."""

from __future__ import annotations

import numpy as np

from eventrnn.cuda import CudaBackend
from eventrnn.network import Network
from eventrnn.reference import layer_parameters
from eventrnn.simulation import Simulator
from support import tolerance


def through_tensor_cores(network: Network, batch: int, precision: str = "float16") -> Simulator:
    """A simulator whose layers all go through tensor cores, as after a measurement in which they were faster."""
    simulator = Simulator(network, batch=batch, backend=CudaBackend(exact=False, precision=precision))
    simulator.engine.tensor_layers[batch] = tuple(range(len(network.layers)))
    return simulator


def check_bound(precision: str, network: Network, x: np.ndarray, clusters: bool = False, grid: str = "") -> None:
    """Compare every step, from the cells and outputs of the step before, with float64.

    clusters : whether all layers run in clusters of blocks
    grid     : what the path of recurrent matrices says where all blocks of the GPU run them
    """
    batch = x.shape[1]
    result = through_tensor_cores(network, batch, precision).run(x, record=("events", "states"))
    assert not result.exact
    for name, path in result.paths.items():
        product, _, blocks = path.removesuffix(grid if name.endswith("w_rec") else "").partition(" in clusters of ")
        assert product == f"tensor {precision}" and bool(blocks) == (clusters and name.endswith("w_rec"))
    sent = [x, *(each.to_dense() for each in result.events)]
    inside = total = 0
    for k, layer in enumerate(network.layers):
        parameters = layer_parameters(layer, np.float64)
        c = y = np.zeros((batch, layer.units))
        for t in range(len(x)):
            before = sent[k][t].astype(np.float64), c, y
            v = tolerance.rounded_cell_bound(precision, parameters, *before, instruction=clusters or bool(grid))
            near = np.abs(v.value - parameters["threshold"]) <= v.error
            c, y = result.states[k][t].astype(np.float64), sent[k + 1][t].astype(np.float64)
            fired = v.value > parameters["threshold"]
            assert np.array_equal((y != 0)[~near], fired[~near])
            error = v.error + tolerance.U32 * (np.abs(v.value) + v.error + parameters["threshold"])
            assert (np.abs(c - (v.value - fired * parameters["threshold"])) <= error)[~near].all()
            assert (np.abs(y - fired * v.value) <= error)[~near].all()
            inside, total = inside + near.sum(), total + near.size
    assert 0.02 < np.mean(result.activity) < 0.98
    if precision == "float16":
        assert inside <= tolerance.INSIDE_MARGIN * total


def check_goes_on(network: Network, inputs: np.ndarray, shorten) -> None:
    """Compare a whole run with one of several chunks, and with several runs: the same events, states and counts.

    inputs  : (40, batch, n)
    shorten : makes chunks shorter from then on
    """
    batch = inputs.shape[1]
    whole = through_tensor_cores(network, batch).run(inputs, record=("events", "states"))
    shorten()
    for lengths in ((40,), (1, 22, 17)):
        simulator, begin = through_tensor_cores(network, batch), 0
        for length in lengths:
            part = simulator.run(inputs[begin : begin + length], record=("events", "states"))
            assert np.array_equal(part.states[0], whole.states[0][begin : begin + length])
            assert np.array_equal(part.fired[0].total, (part.events[0].to_dense() != 0).sum(axis=(0, 1)))
            begin += length
        assert np.array_equal(simulator.state.cells[0], whole.state.cells[0])
