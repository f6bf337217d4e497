"""Networks of gated blocks."""

from __future__ import annotations

import warnings

import numpy as np

from eventrnn.cells import Cell
from eventrnn.network import Network
from eventrnn.simulation import RECORDABLE
from eventrnn.weights import GatedBlocks
from support.conformance import assert_same, cases, unmodified


def gated(weights, *, block=(2, 2), density=0.5, rule="linear", rng=None) -> GatedBlocks:
    """Gated blocks with a drawn gate, without the warning that small gates do not pay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return GatedBlocks.from_weights(
            weights, block=block, density=density, rng=rng or np.random.default_rng(0), gate_rule=rule
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
