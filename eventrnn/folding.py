"""Folding: the embedding of a network and the input weights of its first layer as one table, for inference.

A symbol selects a row of the embedding, and the input drive of layer 0 is that row times `w_in`: it depends on the
symbol alone. `fold` computes the drive of every symbol once. A step then reads one row of a table instead of a
multiplication per value of the embedding and weight.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from eventrnn._arithmetic import standard_arithmetic
from eventrnn._checks import need_kind
from eventrnn.events import Events
from eventrnn.network import Layer, Network
from eventrnn.weights import Dense, GatedBlocks

# Symbols whose drives are computed together. They share the weights that are read.
TOGETHER = 64


@standard_arithmetic
def fold(network: Network) -> Network:
    """The network with its embedding folded into the input weights of layer 0: the same symbols in, the same bits out.

    `layers.0.w_in` becomes a dense table (symbols, G N) float32, G N gate rows of N units. Row k is the input drive of
    symbol k by the contract of `docs/numerics.md`: it starts from `bias_in` and takes the terms
    `embedding[k, j] * w_in[j]` in ascending j, one float32 FMA per term, weights decoded from their storage, a zero
    with the sign +. So the table is the same on every machine. `bias_in` becomes zeros, and the input of a step an
    event of value 1 (`Network.one_hot`), so that the drive is `fma(table[k], 1, 0)`, which is `table[k]`. Events,
    states and outputs are therefore those of the network before, bit for bit.

    A read-out that was tied to the embedding keeps its weights as its own. Gated blocks of `w_in` are folded too: which
    of them a symbol chooses is known. The table has symbols x G N numbers: 162 MB for 10,000 words and 1350 EGRU
    units, where the factors take 42 MB. The CPU engine reads it where it is; the GPU engine has a copy. It is for
    inference: training and pruning of the table are refused. A model file holds the table if a folded network is
    saved; to keep the file small, save the network before, and fold it when it is loaded.

    A network that is folded is returned as it is. Raises TypeError for what is no network, ValueError for one without
    an embedding and for gated blocks whose choices several steps share, and FloatingPointError where a drive overflows.
    Cost: as many multiplications as one pass of all symbols through `w_in`, a few seconds for 10,000 words.

    >>> network = Network.random([8], symbols=5, embedding=4, readout=5, rng=np.random.default_rng(0), threshold=0.1)
    >>> text = np.array([[0], [3], [3], [1]])
    >>> folded = fold(network)
    >>> folded.layers[0].w_in.shape
    (5, 24)
    >>> np.array_equal(eventrnn.simulate(folded, text).output, eventrnn.simulate(network, text).output)
    True
    """
    need_kind("network", network, Network, "a Network")
    if network.one_hot:
        return network
    if network.embedding is None:
        raise ValueError("fold: the network has no embedding; only a network that reads symbols can be folded")
    first = network.layers[0]
    if isinstance(first.w_in, GatedBlocks) and first.w_in.gate_period > 1:
        raise ValueError(
            f"fold: layers.0.w_in has gate_period={first.w_in.gate_period}: the blocks of a step depend on earlier "
            "symbols too, so that there is no table of symbols; fold a network whose w_in chooses in every step"
        )
    table = _drives(first, network.embedding)
    if not np.isfinite(table).all():
        symbol = int(np.argmin(np.isfinite(table).all(axis=1)))
        raise FloatingPointError(
            f"fold: the input drive of symbol {symbol} is not finite; check the scale of the embedding and of "
            "layers.0.w_in"
        )
    folded = replace(first, w_in=Dense(table), bias_in=np.zeros_like(first.bias_in))
    return replace(network.untied(), layers=(folded, *network.layers[1:]), embedding=None, one_hot=True)


def _drives(layer: Layer, embedding: np.ndarray) -> np.ndarray:
    """The input drives of a layer for every row of an embedding (V, E), bias included: (V, G N) float32."""
    # Not above, because it imports Numba.
    from eventrnn.cpu.single_product import Product

    steps, (symbols, width) = -(-len(embedding) // TOGETHER), embedding.shape
    rows = Events.from_dense(embedding[None])
    # Rows without events fill the last step.
    indptr = np.concatenate([rows.indptr, np.full(steps * TOGETHER - symbols, len(rows), np.int64)])
    events = Events(indptr, rows.indices, rows.values, (steps, TOGETHER, width))
    product = Product(layer.w_in, events, bias=layer.bias_in, cell=layer.cell)
    table = np.empty((symbols, layer.w_in.shape[1]), np.float32)
    for step in range(steps):
        part = table[step * TOGETHER : (step + 1) * TOGETHER]
        # The sum with zero turns -0 into +0.
        np.add(product.result(step)[: len(part)], np.float32(0), out=part)
        product.plan.check_gates()
    return table
