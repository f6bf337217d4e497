"""A network's weights packed for one way to run: which matrix lies where, for which thread.

Tables and pools are those of `packing.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eventrnn.packing import FIELDS, ROW_TILE, Pools, empty_window, pack, window_edges
from eventrnn.simd import LANES
from eventrnn.traverse import LISTED_PIECES
from eventrnn.weights import BlockCSR, Dense, Weights

if TYPE_CHECKING:
    from eventrnn.network import Network

# Columns of the layer table. IN to REC are the windows of w_in, REC to REC_GATED those of w_rec, and REC_GATED to END
# the candidate's columns of w_rec, apart in the paper's variant only.
UNITS, INPUTS, IN, REC, REC_GATED, END, BIAS_IN, BIAS_REC, UNIT_0 = range(9)

# As many drives, and as wide a block, as make it pay to read weights once for all.
SHARED_ROWS, SHARED_BLOCKS, SHARED_WIDTH = 12, 32, 32


def many_drives(rows: int) -> tuple[bool, bool]:
    """Whether a product with so many drives at once shares dense rows, and wide blocks, among them."""
    return rows >= SHARED_ROWS, rows >= SHARED_BLOCKS


class Plan:
    """A network's weights packed for one way to run.

    `in_rows` and `rec_rows` are the drives that an input and a recurrent product have at once. With many of them, dense
    rows want narrow windows and wide blocks go by column: so the drives' share of either stays in the L1 cache.
    """

    def __init__(self, network: Network, parts: int, in_rows: int, rec_rows: int):
        self.parts, self.pools = parts, Pools.empty()
        self.tables: list[list[list[int]]] = [[] for _ in range(parts)]
        layers, at, unit_0 = [], 0, 0
        for layer in network.layers:
            n, rows = layer.units, layer.w_rec.shape[1]
            cut = 2 * n if layer.cell.variant == "paper" else rows
            w_in = self._place(layer.w_in, 0, rows, in_rows)
            w_rec = self._place(layer.w_rec, 0, cut, rec_rows)
            w_gated = self._place(layer.w_rec, cut, rows, rec_rows) if cut < rows else len(self.tables[0])
            layers.append([n, layer.inputs, w_in, w_rec, w_gated, len(self.tables[0]), at, at + rows, unit_0])
            at, unit_0 = at + 2 * rows, unit_0 + n
        self.readout = -1
        if network.readout is not None:
            self.readout = self._place(network.readout.weights, 0, network.readout.weights.shape[1], in_rows)
        self.layers = np.array(layers, np.int64)
        self.windows = np.array(self.tables, np.int64).reshape(parts, -1, FIELDS)
        self.values, self.index, self.pointers = self.pools.freeze()
        del self.pools, self.tables  # as large as the weights, and copied now

    def _place(self, weights: Weights, start: int, stop: int, rows: int) -> int:
        """Pack the columns `start` to `stop`, each thread's share; returns the first window."""
        before, edges = len(self.tables[0]), window_edges(weights, start, stop, self.parts)
        many_rows, many_blocks = many_drives(rows)
        if isinstance(weights, BlockCSR):
            many = many_blocks and weights.block[1] >= SHARED_WIDTH
        else:
            many = many_rows and isinstance(weights, Dense)
        packed = [pack(self.pools, weights, a, b, many) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        most = max(map(len, packed))
        for table, share, low in zip(self.tables, packed, edges[:-1], strict=True):
            table += share + [empty_window(low)] * (most - len(share))
        return before


def product_scratch(parts: int, inputs: int, rows: int, pieces: int) -> tuple[np.ndarray, ...]:
    """What `propagate_all` writes on, one of each a thread, for products of up to `inputs` units, `rows` drives and
    `pieces` stored pieces of one unit: starts, groups, grouped, lists, amounts, x, tile."""
    most, listed = rows * inputs + LANES, LISTED_PIECES + max(pieces, rows) + LANES
    return (
        np.zeros((parts, inputs + 2), np.int64),
        np.zeros((parts, 2, most), np.int32),
        np.zeros((parts, 2, most), np.float32),
        np.zeros((parts, 2, listed), np.int32),
        np.zeros((parts, 2, listed), np.float32),
        np.zeros((parts, rows * inputs), np.float32),
        np.zeros((parts, rows * ROW_TILE), np.float32),
    )
