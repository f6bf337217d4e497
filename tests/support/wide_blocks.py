"""Networks whose matrices are blocks of 64 columns or more, which kernels add output by output."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from eventrnn.cells import CELLS, Cell
from eventrnn.network import Network
from eventrnn.state import State
from eventrnn.weights import STORAGES, BlockCSR, convert
from support.conformance import Case

BLOCKS = ((1, 64), (3, 64), (1, 128))


def in_blocks(dense: np.ndarray, block=(1, 64), storage: str = "int8") -> BlockCSR:
    weights = convert(dense.astype(np.float32), "block", block=block, storage=storage)
    assert isinstance(weights, BlockCSR)
    return weights


@st.composite
def wide_block_networks(draw, storages=STORAGES) -> Network:
    """EGRUs of one or two layers, with or without a read-out."""
    cell = Cell(variant=draw(st.sampled_from(CELLS["egru"])))
    units, rng = (
        draw(st.lists(st.integers(43, 70), min_size=1, max_size=2)),
        np.random.default_rng(draw(st.integers(0, 99))),
    )
    network = Network.random(
        units,
        inputs=draw(st.integers(3, 90)),
        readout=draw(st.sampled_from((None, 70))),
        rng=rng,
        threshold=0.1,
        cell=cell,
    )
    storage = draw(st.sampled_from(storages))
    blocks = {name: draw(st.sampled_from(BLOCKS)) for name in network.matrices()}
    blocks |= {name: (1, 64) for name, weights in network.matrices().items() if weights.shape[1] < 128}
    return network.with_matrices(
        {
            name: in_blocks(weights.to_dense() * 3 * (rng.random(weights.shape) < 0.6), blocks[name], storage)
            for name, weights in network.matrices().items()
        }
    )


@st.composite
def wide_block_cases(draw) -> Case:
    """A network of wide blocks, inputs of some steps and samples, and a state of zeros."""
    network, steps, batch = draw(wide_block_networks()), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    x = rng.standard_normal((steps, batch, network.layers[0].inputs), dtype=np.float32)
    x *= rng.random(x.shape) < draw(st.sampled_from((0.0, 0.1, 0.5)))
    return Case(network, x, State.zeros(network, batch))
