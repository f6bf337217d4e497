"""A network's weights packed for one way to run: which matrix lies where, for which thread.

Tables and pools are those of `packing.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.spmm import LISTED_PIECES, PANEL
from eventrnn.cpu.packing import EVERY_FROM_SHARE, Pools, Segment, empty_window, pack
from eventrnn.cpu.tables import BLAS, FIELDS, PIECES, ROW_TILE, ROW_TILES, ROWS
from eventrnn.weights import BlockCSR, Dense, Weights

if TYPE_CHECKING:
    from eventrnn.network import Network


# The ways of a product: as the format has it, drive by drive; dense rows shared by many drives; weights that are not
# dense as if they were, either way; BLAS.
AS_STORED, TILES, DENSE, DENSE_TILES, BLAS_PRODUCT = PICKS = ("stored", "tiles", "dense", "dense tiles", "blas")


class Choice:
    """Which way a product goes: rules of thumb among exact ways. `crossover.py` has measured ones."""

    may_blas = False

    def pick(self, weights: Weights, rows: int, activity: float) -> str:
        """One of `PICKS`, for so many drives whose senders fire so often.

        Dense rows are shared from one event a unit on (1350 units; about where reading a row once for all outweighs
        the narrower windows).
        """
        return TILES if isinstance(weights, Dense) and rows * activity >= SHARED_EVENTS else AS_STORED

    def every_from(self, rows: int) -> float:
        """From which share of active units on, shared rows are those of every unit."""
        return EVERY_FROM_SHARE


# Events a unit, over all drives, that make it pay to share dense rows.
SHARED_EVENTS = 1.0


class Layout:
    """Who owns what, and where in a drive it lies.

    A thread owns some units, whole vectors of them, and all their gate rows, side by side in a drive: (u, r, g) of its
    units. So nobody else ever reads or writes its drives, but for the reset gates of the paper's variant. One thread's
    drives lie as in the matrix. The read-out's outputs are dealt out in the same way.

    Attributes
    ----------
    edges  : (layers + 1, parts + 1) first unit of each part, and the end; the last row counts outputs
    bases  : (layers + 1, parts) where a part's share of a drive begins
    biases : one after the other by position in their drives: of each layer w_in's and w_rec's, then the read-out's
    starts : where each of those begins
    pitch  : from one drive to the next
    """

    def __init__(self, network: Network, parts: int):
        self.parts = parts
        sizes = [layer.units for layer in network.layers]
        sizes.append(0 if network.readout is None else network.readout.weights.shape[1])
        cuts = [[min(n, _up(-(-n * q // parts), LANES)) for q in range(parts + 1)] for n in sizes]
        self.edges = np.array(cuts, np.int64)
        gates = np.array([layer.cell.gates for layer in network.layers] + [1])
        # Vectors and blocks may run past a share, and the padding of a block that is not cut into pieces.
        whole = [
            w.block[1] for w in network.matrices().values() if isinstance(w, BlockCSR) and w.block[1] % min(PIECES)
        ]
        spare = _up(max([*PIECES, *whole]), LANES)
        shares = _up(np.diff(self.edges, axis=1) * gates[:, None], LANES) + spare
        self.bases = np.cumsum(shares, axis=1) - shares
        widths = shares.sum(axis=1)
        # No multiple of a page, for drives side by side in a cache.
        lines = -(-int(widths.max()) // LANES)
        self.pitch = LANES * (lines + (4 - lines) % 8)
        biases = [(k, bias) for k, layer in enumerate(network.layers) for bias in (layer.bias_in, layer.bias_rec)]
        biases += [(-1, network.readout.bias)] if network.readout is not None else []
        self.biases = np.zeros(sum(int(widths[k]) for k, _ in biases), np.float32)
        self.starts, at = [], 0
        for k, bias in biases:
            for part in range(parts):
                for segment in self.segments(k, part, 0, int(gates[k])):
                    to = at + segment.position
                    self.biases[to : to + segment.stop - segment.start] = bias[segment.start : segment.stop]
            self.starts.append(at)
            at += int(widths[k])

    def segments(self, layer: int, part: int, first_gate: int, last_gate: int) -> list[Segment]:
        """A part's columns of some gates; of layer -1, the read-out."""
        n, low, high = (int(self.edges[layer, k]) for k in (-1, part, part + 1))
        base, units = int(self.bases[layer, part]), high - low
        if self.parts == 1:
            return [Segment(first_gate * n, last_gate * n, base + first_gate * n)]
        gates = range(first_gate, last_gate)
        return [Segment(g * n + low, g * n + high, base + g * units) for g in gates if units]


class Plan:
    """A network's weights packed for one way to run: by matrix one of `PICKS`, and `Choice.every_from`."""

    def __init__(self, network: Network, layout: Layout, picks: Mapping[str, str], every_from: Mapping[str, float]):
        self.layout, self.parts, self.picks, self.pools = layout, layout.parts, dict(picks), Pools.empty()
        self.every_from = every_from
        self.tables: list[list[list[int]]] = [[] for _ in range(self.parts)]
        layers, unit_0 = [], 0
        for k, layer in enumerate(network.layers):
            gates = layer.cell.gates
            cut = gates - 1 if layer.cell.variant == "paper" else gates
            w_in = self._place(f"layers.{k}.w_in", layer.w_in, k, 0, gates)
            w_rec = self._place(f"layers.{k}.w_rec", layer.w_rec, k, 0, cut)
            w_gated = (
                self._place(f"layers.{k}.w_rec", layer.w_rec, k, cut, gates) if cut < gates else len(self.tables[0])
            )
            biases = layout.starts[2 * k : 2 * k + 2]
            layers.append([layer.units, layer.inputs, w_in, w_rec, w_gated, len(self.tables[0]), *biases, unit_0])
            unit_0 += layer.units
        self.readout = -1
        if network.readout is not None:
            self.readout = self._place("readout", network.readout.weights, -1, 0, 1)
        self.layers = np.array(layers, np.int64)
        self.windows = np.array(self.tables, np.int64).reshape(self.parts, -1, FIELDS)
        self.values, self.index, self.pointers = self.pools.freeze()
        del self.pools, self.tables, self.every_from  # as large as the weights, and copied now

    def _place(self, name: str, weights: Weights, layer: int, first_gate: int, last_gate: int) -> int:
        """Pack each thread's share of some gates; returns the first window."""
        before, pick, every_from = len(self.tables[0]), self.picks[name], self.every_from[name]
        if first_gate == last_gate:
            return before
        if pick in (DENSE, DENSE_TILES, BLAS_PRODUCT) and (pick == BLAS_PRODUCT or not isinstance(weights, Dense)):
            weights = Dense(weights.to_dense())
        kind = {TILES: ROW_TILES, DENSE_TILES: ROW_TILES, BLAS_PRODUCT: BLAS}.get(pick, ROWS)
        shares = [self.layout.segments(layer, part, first_gate, last_gate) for part in range(self.parts)]
        packed = [pack(self.pools, weights, each, kind, every_from) if each else [] for each in shares]
        most = max(map(len, packed))
        for table, share in zip(self.tables, packed, strict=True):
            table += share + [empty_window()] * (most - len(share))
        return before


def _up(size, multiple: int):
    return -(-size // multiple) * multiple


def scratch_shapes(parts: int, inputs: int, rows: int, pieces: int, blas: int) -> tuple[tuple[tuple, type], ...]:
    """Shapes and dtypes of what `propagate_all` writes on, one of each a thread, for products of up to `inputs` units,
    `rows` drives and `pieces` stored pieces of one unit: cuts, own_ids, own_sent, lists, amounts, x, tile, product (of
    `blas` columns)."""
    most, listed = rows * inputs + LANES, LISTED_PIECES + pieces + LANES
    return (
        ((parts, rows * -(-inputs // PANEL) + 1), np.int64),
        ((parts, most), np.int32),
        ((parts, most), np.float32),
        ((parts, 2, listed), np.int32),
        ((parts, 2, listed), np.float32),
        ((parts, rows * inputs), np.float32),
        ((parts, rows * ROW_TILE), np.float32),
        ((parts, rows * blas), np.float32),
    )


def product_scratch(parts: int, inputs: int, rows: int, pieces: int, blas: int) -> tuple[np.ndarray, ...]:
    """Arrays of `scratch_shapes`."""
    return tuple(np.zeros(*each) for each in scratch_shapes(parts, inputs, rows, pieces, blas))
