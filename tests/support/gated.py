"""Networks of gated blocks."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np

from eventrnn import reference, reference_products
from eventrnn.cells import Cell
from eventrnn.network import Network
from eventrnn.simulation import RECORDABLE
from eventrnn.state import State
from eventrnn.weights import GatedBlocks
from support.conformance import assert_same, cases, unmodified


def gated(weights, *, block=(2, 2), density=0.5, rule="linear", rng=None, period=1) -> GatedBlocks:
    """Gated blocks with a drawn gate, without the warning that small gates do not pay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rng = rng or np.random.default_rng(0)
        return GatedBlocks.from_weights(
            weights, block=block, density=density, rng=rng, gate_rule=rule, gate_period=period
        )


def network_of(units=(12, 7), inputs=5, outputs=4, **options) -> Network:
    network = Network.random(units, inputs=inputs, readout=outputs, rng=np.random.default_rng(0), threshold=0.05)
    matrices = {name: gated(3 * w.to_dense(), **options) for name, w in network.matrices().items()}
    return network.with_matrices(matrices)


def check_gated(backend: str, cells: list[Cell], formats: tuple[str, ...], data, threads, record) -> None:
    """A network with gated blocks has the bits of the reference backend."""
    case = data.draw(cases(formats=formats, cells=cells))
    expected = case.simulator("reference").run(case.inputs, record=RECORDABLE)
    with unmodified(case):
        got = case.simulator(backend, threads=threads).run(case.inputs, record=record)
    assert_same(expected, got, record)


def gate_matrices(
    network: Network, *, rule="linear", rank=None, density=0.5, block=(3, 4), seed=5, period=1
) -> Network:
    """The network with a gate in front of every matrix that can have one, and biases of the gates that differ."""
    rng, made = np.random.default_rng(seed), {}
    with warnings.catch_warnings():
        # Matrices this small cost more with a gate.
        warnings.simplefilter("ignore", UserWarning)
        for name, weights in network.matrices().items():
            if name.role == "w_rec" and network.layers[name.layer].cell.reset_first:
                continue
            side = min(block[0], weights.shape[0]), min(block[1], weights.shape[1])
            options = {"density": density, "rank": rank, "gate_rule": rule, "gate_period": period}
            blocks = GatedBlocks.from_weights(2 * weights.to_dense(), block=side, rng=rng, **options)
            bias = rng.uniform(0.5, 1.5, blocks.n_blocks).astype(np.float32)
            made[name] = replace(blocks, gate_bias=bias)
    return network.with_matrices(made)


def specified(
    network: Network, tape, d_output: np.ndarray, straight_through: bool, kind: type, state: State | None = None
) -> dict:
    """Gradients of the read-out and of all layers by the specification, on the events of a tape, from the gates that a
    state holds."""
    readout = reference.weight_arrays("readout", network.readout.weights, kind)
    top, d_readout = tape.top.astype(kind), d_output.astype(kind)
    held = {} if state is None else dict(state.gates)
    gates = []
    if reference_products.shares_gates(readout):
        gates = reference_products.propagate_steps(readout, top, network.readout.bias, held.get("readout"))[1]
    d_y, found = reference_products.propagate_back_steps(
        readout, top, d_readout, gates, straight_through=straight_through
    )
    gradients = {f"readout{end}": each for end, each in found.items()}
    for k in reversed(range(len(network.layers))):
        layer, parameters = tape.layers[k], reference.layer_parameters(network.layers[k], kind)
        x, start = layer.x.astype(kind), [array[0].astype(kind) for array in (layer.c, layer.y)]
        own = {name: held[f"layers.{k}.{name}"] for name in ("w_in", "w_rec") if f"layers.{k}.{name}" in held}
        tapes = reference.forward(network.layers[k].cell, parameters, x, *start, held=own)
        each = reference.backward(
            *(network.layers[k].cell, parameters, x, tapes, d_y, np.zeros_like(d_y)), straight_through=straight_through
        )
        d_y = each.pop("x")
        gradients |= {f"layers.{k}.{name}": array for name, array in each.items() if name not in ("c", "y")}
    return gradients | {"inputs": d_y}
