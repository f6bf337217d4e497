"""The weights of a network, packed for its threads, and the selection of a kernel for each matrix.

A `Layout` partitions the units over the threads. `PackedWeights` are the weights packed for that layout, each matrix
for one or more kernels. A `Plan` says which of these a run uses: the kernel that a `KernelPolicy` selects for each
matrix, and perhaps another one for the last chunk of time, which may be shorter. Tables and records are those of
`tables.py`; `packing.py` packs a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from eventrnn._integers import ceil_div, round_up
from eventrnn.backend import INTEGERS
from eventrnn.cpu.held_gates import HeldLayout
from eventrnn.cpu.kernels.row_products import LISTED_SEGMENTS
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.strips import SELECTS
from eventrnn.cpu.memory import aligned_zeros
from eventrnn.cpu.packing import (
    BLOCK_TILE_BYTES,
    DENSE_ACTIVITY_THRESHOLD,
    PoolBuilder,
    Segment,
    empty_column_tile,
    is_single,
    pack,
    takes_strips,
)
from eventrnn.cpu.tables import (
    BIAS_IN,
    BLAS,
    FAULT,
    FIELDS,
    GATE_TILE,
    GATED,
    GATED_ROWS,
    HIGH,
    IN,
    IN_PLACE,
    INPUTS,
    INTEGER_BLOCKS,
    KERNEL,
    KIND,
    LOW,
    PARTIAL_END,
    POINTERS,
    RANGE_UNITS,
    ROW_TILE,
    ROW_TILES,
    ROWS,
    SEGMENT_WIDTHS,
    SMALL_PANEL_BITS,
    STORAGE,
    STRIPS,
    UNITS,
    WeightPools,
    Workspace,
)
from eventrnn.state import gates_not_finite
from eventrnn.weights import BlockCSR, Dense, MatrixId, Weights, takes_integers

if TYPE_CHECKING:
    from eventrnn.network import Network


# Kernels for one matrix product, by the names that a trace reports. FORMAT: in the format of the matrix, one drive row
# after the other; TILED: in column tiles that many drive rows share, of dense or single weights or of block segments;
# DENSIFIED and DENSIFIED_TILED: the same for a sparse matrix that was made dense; BY_STRIPS: blocks output by output;
# BLAS_PRODUCT: dense weights through BLAS.
FORMAT, TILED, DENSIFIED, DENSIFIED_TILED, BY_STRIPS, BLAS_PRODUCT = KERNELS = (
    *("stored", "tiles", "dense", "dense tiles"),
    *("strips", "blas"),
)

# The kernel that no policy selects (`fixed_kernel`): dense weights of a one-hot input, of which a drive row reads one
# row, where the network has it.
LOOK_UP = "look-up"

# Events per unit, over all drive rows, from which the TILED kernel is faster. Measured at 1350 units: about where
# reading a weight row once for all drive rows outweighs the narrower column tiles.
SHARED_EVENTS = 1.0

# For single weights the TILED kernel first makes a panel of them dense. Per element of the matrix that costs FILL, and
# MOVE per weight; the events cost ADD each, and the drive rows EACH_ROW each. The unit is the time of a weight that is
# added by its index. Fitted on a Zen 3 core to 72 cases of 256 and 1350 units, 5 to 40 % of the weights, 4 to 64 drive
# rows and 3 to 30 % active units; in none of them does the other kernel take less than nine tenths of the time.
FILL, MOVE, ADD, EACH_ROW = 0.08, 1.0, 0.055, 0.0036


# Blocks of up to STRIP_BYTES are added output by output where an output has STRIP_TERMS terms on average, for each
# range of units whose active ones are listed together. Measured with 90 % of 1x64 blocks pruned, unit by unit and
# output by output: 512 units in float32, 5.1 terms, 0.98 us and 0.72 us; 2.6 terms, 0.56 us both; 1,024 units in int8,
# two ranges and 10 terms, 3.45 us and 2.92 us; 1,350 units in int8, three ranges and 6.8 terms, 3.9 us and 4.8 us.
# Layers with larger matrices gained nothing.
STRIP_BYTES, STRIP_TERMS = 1 << 19, 3.5


class Selected(NamedTuple):
    """A kernel that was selected for a matrix.

    kernel     : one of `KERNELS`, `LOOK_UP` or `INTEGERS`
    dense_from : activity from which a tiled product of dense weights visits every unit; 0 for other products
    """

    kernel: str
    dense_from: float = 0.0


def shares_single(weights: Weights, rows: int, activity: float) -> bool:
    """Whether single weights should be in column tiles that `rows` drive rows share, rather than in rows."""
    density, events = weights.stored / max(1, weights.shape[0] * weights.shape[1]), rows * activity
    return FILL + MOVE * density + ADD * events + EACH_ROW * rows <= density * events


def shares_blocks(weights: Weights, rows: int, activity: float) -> bool:
    """Whether block segments should be in column tiles that `rows` drive rows share: where they exceed the L2 cache.

    Each tile lists the segments of every active unit anew, which pays for the widest segments only.
    """
    wide = isinstance(weights, BlockCSR) and weights.block[1] % max(SEGMENT_WIDTHS) == 0
    return wide and weights.values.nbytes > BLOCK_TILE_BYTES and rows * activity >= SHARED_EVENTS


def prefers_strips(weights: Weights, activity: float) -> bool:
    """Whether blocks should be added output by output: those of few bytes whose outputs have enough terms."""
    if not (SELECTS and takes_strips(weights) and weights.values.nbytes <= STRIP_BYTES):
        return False
    least = STRIP_TERMS * ceil_div(weights.shape[0], RANGE_UNITS)
    return weights.stored * activity >= least * weights.shape[1]


def block_kernel(weights: Weights, rows: int, activity: float) -> str:
    """The kernel for block segments; FORMAT for weights without any."""
    if shares_blocks(weights, rows, activity):
        return TILED
    return BY_STRIPS if prefers_strips(weights, activity) else FORMAT


class KernelPolicy:
    """Selects the kernel of a product by rules of thumb; `crossover.MeasuredPolicy` measures.

    exact : False selects INTEGERS where it can
    """

    may_blas = False

    def __init__(self, exact: bool = True):
        self.exact = exact

    def select_kernel(self, weights: Weights, rows: int, activity: float) -> str:
        """One of `KERNELS`, or INTEGERS, for `rows` drive rows; `activity`: events per presynaptic unit and row."""
        if not self.exact and takes_integers(weights):
            return INTEGERS
        if isinstance(weights, Dense):
            return TILED if rows * activity >= SHARED_EVENTS else FORMAT
        if is_single(weights):
            return TILED if shares_single(weights, rows, activity) else FORMAT
        return block_kernel(weights, rows, activity)

    def select(self, weights: Weights, rows: int, activity: float) -> Selected:
        """What `select_kernel` selects, and its dense activity threshold."""
        kernel = self.select_kernel(weights, rows, activity)
        if kernel == DENSIFIED_TILED or (kernel == TILED and isinstance(weights, Dense)):
            return Selected(kernel, self.dense_activity_threshold(rows))
        return Selected(kernel)

    def dense_activity_threshold(self, rows: int) -> float:
        """Activity from which a tiled product of `rows` drive rows visits every unit instead of the active ones."""
        return DENSE_ACTIVITY_THRESHOLD


def fixed_kernel(network: Network, name: str, weights: Weights) -> Selected | None:
    """The kernel of a product that no policy selects; None for others.

    A symbol is a single event of layer 0. Its row is read from the network's own array, which may be large: neither
    copied into each plan, nor ever read as a whole.
    """
    if not network.one_hot or name != MatrixId.of(0, "w_in"):
        return None
    in_place = isinstance(weights, Dense) and weights.storage == "float32" and weights.values.flags.aligned
    return Selected(LOOK_UP if in_place else FORMAT)


class Layout:
    """Partition of the units over the threads, and the position of their gate columns in a drive row.

    A thread owns whole vectors of units of each layer, and all gates of these units. In a drive row, the gates of its
    units lie side by side, in the order of the cell. No other thread reads or writes them, except for reset gates that
    come before the recurrent product, which all threads read. With one thread a drive row has the columns of the
    matrix. The outputs of the read-out are divided in the same way.

    Attributes
    ----------
    unit_bounds  : (layers + 1, n_threads + 1) int64, first unit of each thread, and the end; last row: read-out outputs
    drive_begins : (layers + 1, n_threads) int64, where a thread's share of a drive row begins
    biases       : float32, by position in a drive row: of each layer w_in's then w_rec's, then the read-out's
    bias_begins  : where each of those begins
    drive_pitch  : numbers from one drive row to the next
    layer_pitch  : numbers that a drive row of the layers needs; the read-out may need more
    held         : where the gates lie that some steps share
    """

    def __init__(self, network: Network, n_threads: int):
        self.n_threads, self.held = n_threads, HeldLayout(network)
        sizes = [layer.units for layer in network.layers]
        sizes.append(0 if network.readout is None else network.readout.weights.shape[1])
        bounds = [[min(n, round_up(ceil_div(n * q, n_threads), LANES)) for q in range(n_threads + 1)] for n in sizes]
        self.unit_bounds = np.array(bounds, np.int64)
        gates = np.array([layer.cell.gates for layer in network.layers] + [1])
        # Vectors and block segments may run past a share; so may the padding of a block that is not cut into segments.
        whole = [
            w.block[1]
            for w in network.matrices().values()
            if isinstance(w, BlockCSR) and w.block[1] % min(SEGMENT_WIDTHS)
        ]
        spare = round_up(max([*SEGMENT_WIDTHS, *whole]), LANES)
        shares = round_up(np.diff(self.unit_bounds, axis=1) * gates[:, None], LANES) + spare
        self.drive_begins = np.cumsum(shares, axis=1) - shares
        widths = shares.sum(axis=1)
        # The pitch is no multiple of a page, so that drive rows side by side do not compete for the same cache sets.
        self.layer_pitch, self.drive_pitch = (
            LANES * (lines + (4 - lines) % 8)
            for lines in (ceil_div(int(each.max()), LANES) for each in (widths[:-1], widths))
        )
        biases = [(k, bias) for k, layer in enumerate(network.layers) for bias in (layer.bias_in, layer.bias_rec)]
        biases += [(-1, network.readout.bias)] if network.readout is not None else []
        self.biases = aligned_zeros(sum(int(widths[k]) for k, _ in biases), np.float32)
        self.bias_begins, at = [], 0
        for k, bias in biases:
            for thread in range(n_threads):
                for segment in self.segments(k, thread, 0, int(gates[k])):
                    to = at + segment.position
                    self.biases[to : to + segment.stop - segment.start] = bias[segment.start : segment.stop]
            self.bias_begins.append(at)
            at += int(widths[k])

    def segments(self, layer: int, thread: int, first_gate: int, last_gate: int) -> list[Segment]:
        """A thread's columns of the gates `first_gate` to `last_gate`; layer -1 is the read-out."""
        n, low, high = (int(self.unit_bounds[layer, k]) for k in (-1, thread, thread + 1))
        base, units = int(self.drive_begins[layer, thread]), high - low
        if self.n_threads == 1:
            return [Segment(first_gate * n, last_gate * n, base + first_gate * n)]
        gates = range(first_gate, last_gate)
        return [Segment(g * n + low, g * n + high, base + g * units) for g in gates if units]


class PackedWeights:
    """The weights of a network, each matrix packed for one or more kernels.

    Attributes
    ----------
    column_tiles : (n_threads, tiles, FIELDS) int64, the table of column tiles
    pools        : the packed weights
    spans        : name of a matrix and a kernel -> first column tile; first of the gates that follow a product with the
                   reset gate, which only a recurrent matrix of a cell with the reset gate first has; and the one after
                   the last
    faults       : name of a matrix of gated blocks -> where its tiles have their FAULT in `pools.pointers`
    """

    def __init__(
        self,
        network: Network,
        layout: Layout,
        kernels: Mapping[str, Collection[Selected]],
        product_address: Callable[[int, int], int],
    ):
        self.layout, self._product_address, self._builder = layout, product_address, PoolBuilder.empty()
        self._tables: list[list[list[int]]] = [[] for _ in range(layout.n_threads)]
        self.spans: dict[tuple[str, Selected], tuple[int, int, int]] = {}
        self.faults: dict[str, list[int]] = {}
        for name, weights in network.matrices().items():
            layer, gates, cut = -1, 1, 1
            identity = MatrixId(name)
            if identity.layer is not None:
                cell = network.layers[layer := identity.layer].cell
                gates = cell.gates
                cut = gates - 1 if identity.recurrent and cell.reset_first else gates
            for selected in kernels[name]:
                first = len(self._tables[0])
                self._place(name, weights, selected, layer, 0, cut)
                after_reset = len(self._tables[0])
                self._place(name, weights, selected, layer, cut, gates)
                self.spans[name, selected] = first, after_reset, len(self._tables[0])
        self.column_tiles = np.array(self._tables, np.int64).reshape(layout.n_threads, -1, FIELDS)
        self.pools = WeightPools(*self._builder.freeze(), layout.biases)
        # The builder holds a second copy of the weights.
        del self._builder, self._tables, self._product_address

    def _place(
        self, name: str, weights: Weights, selected: Selected, layer: int, first_gate: int, last_gate: int
    ) -> None:
        """Pack each thread's share of some gates; layer -1 is the read-out."""
        if first_gate == last_gate:
            return
        kernel, threads = selected.kernel, range(self.layout.n_threads)
        is_dense = isinstance(weights, Dense)
        if kernel == BLAS_PRODUCT or (kernel in (DENSIFIED, DENSIFIED_TILED) and not is_dense):
            weights = Dense(weights.to_dense())
        kinds = {
            TILED: ROW_TILES,
            DENSIFIED_TILED: ROW_TILES,
            BLAS_PRODUCT: BLAS,
            LOOK_UP: IN_PLACE,
            INTEGERS: INTEGER_BLOCKS,
            BY_STRIPS: STRIPS if takes_strips(weights) else ROWS,
        }
        kind = kinds.get(kernel, ROWS)
        shares = [self.layout.segments(layer, thread, first_gate, last_gate) for thread in threads]
        held = self.layout.held.header(name)
        packed = [
            pack(self._builder, weights, each, kind, selected.dense_from, held) if each else [] for each in shares
        ]
        most = max(map(len, packed))
        for table, share in zip(self._tables, packed, strict=True):
            for row in share:
                row[KERNEL] = self._product_address(row[KIND], row[STORAGE]) if row[LOW] < row[HIGH] else 0
                if row[KIND] == GATED:
                    self.faults.setdefault(name, []).append(row[POINTERS] + FAULT)
            table += share + [empty_column_tile()] * (most - len(share))

    def serves(self, kernels: Mapping[str, Collection[Selected]]) -> bool:
        """Whether every matrix is packed for these kernels."""
        return all((name, selected) in self.spans for name, each in kernels.items() for selected in each)


class Plan:
    """The packed weights that a run uses: one kernel per matrix, and perhaps another one for a partial chunk.

    Attributes
    ----------
    packed            : the weights; `column_tiles`, `pools` and `faults` are theirs
    kernel_by_matrix  : name of a matrix -> its kernel
    kernel_at_the_end : the same for a partial chunk, which is the last one of a run
    has_partial       : whether any of these is another kernel
    layers            : (layers + 1, 15) int64, the table of layers; the last row is the read-out
    """

    def __init__(
        self,
        network: Network,
        packed: PackedWeights,
        whole: Mapping[str, Selected],
        partial: Mapping[str, Selected],
        update_addresses: Callable[[str, str], tuple[int, int, int]],
    ):
        self.packed, self.layout, self.n_threads = packed, packed.layout, packed.layout.n_threads
        self.column_tiles, self.pools, self.faults = packed.column_tiles, packed.pools, packed.faults
        self.kernel_by_matrix = {name: selected.kernel for name, selected in whole.items()}
        self.kernel_at_the_end = {name: selected.kernel for name, selected in partial.items()}
        self.has_partial = self.kernel_at_the_end != self.kernel_by_matrix

        def input_span(name: str) -> list[int]:
            return [packed.spans[name, each[name]][end] for each in (whole, partial) for end in (0, 2)]

        layers, unit_0, begins = [], 0, self.layout.bias_begins
        for k, layer in enumerate(network.layers):
            w_rec = f"layers.{k}.w_rec"
            columns = *input_span(f"layers.{k}.w_in"), *packed.spans[w_rec, whole[w_rec]]
            addresses = update_addresses(layer.cell.name, layer.cell.variant)
            layers.append([layer.units, layer.inputs, *columns, *begins[2 * k : 2 * k + 2], unit_0, *addresses])
            unit_0 += layer.units
        last = [0] * 15
        if network.readout is not None:
            inputs, outputs = network.readout.weights.shape
            last[UNITS], last[INPUTS], last[BIAS_IN] = outputs, inputs, begins[-1]
            last[IN : PARTIAL_END + 1] = input_span("readout")
        self.layers = np.array([*layers, last], np.int64)

    def check_gates(self) -> None:
        """Raise FloatingPointError, by the name of the matrix, where a run has found gates that are not finite."""
        for name, at in self.faults.items():
            if (found := self.pools.pointers[at]).any():
                raise gates_not_finite(name, int(found[found > 0].min()))

    def forget_faults(self) -> None:
        """Prepare a run: forget the faults of the run before, which may have been interrupted before its check."""
        for at in self.faults.values():
            self.pools.pointers[at] = 0


def workspace_shapes(
    n_threads: int,
    inputs: int,
    rows: int,
    segments: int,
    blas_columns: int,
    gated_blocks: int = 0,
    held: int = 0,
) -> tuple[tuple[tuple[int, ...], type], ...]:
    """Shape and dtype of each field of a `Workspace`, with a leading axis of threads.

    The workspace serves products of up to `inputs` units, `rows` drive rows, `segments` stored block segments per unit,
    `blas_columns` columns through BLAS, and `gated_blocks` blocks of a matrix that chooses some. It also holds one
    small panel of single weights, and `held` numbers of gates that some steps share (`HeldLayout.size`).
    """
    # Whole vectors: every thread's share starts on a cache line, which it shares with no other thread.
    most, listed = round_up(rows * inputs, LANES) + LANES, LISTED_SEGMENTS + round_up(segments, LANES) + LANES
    pitch = round_up(gated_blocks, LANES)
    gates = min(rows, GATED_ROWS) * pitch + max(pitch, GATE_TILE if gated_blocks else 0)
    scratch = max(round_up(rows * blas_columns, LANES), gates, ROW_TILE << SMALL_PANEL_BITS)
    return (
        ((n_threads, round_up(rows * (ceil_div(inputs, 1 << SMALL_PANEL_BITS) + 1) + 1, LANES)), np.int64),
        ((n_threads, most), np.int32),
        ((n_threads, most), np.float32),
        ((n_threads, 2, listed), np.int32),
        ((n_threads, 2, listed), np.float32),
        ((n_threads, round_up(rows * inputs, LANES)), np.float32),
        ((n_threads, rows * ROW_TILE), np.float32),
        ((n_threads, scratch + held), np.float32),
    )


def workspace(
    n_threads: int,
    inputs: int,
    rows: int,
    segments: int,
    blas_columns: int,
    gated_blocks: int = 0,
    *,
    held: int = 0,
) -> Workspace:
    """A `Workspace` of zeros; parameters as of `workspace_shapes`."""
    shapes = workspace_shapes(n_threads, inputs, rows, segments, blas_columns, gated_blocks, held)
    return Workspace(*(aligned_zeros(*each) for each in shapes))
