"""Who does what where a stream's layer lives in one cluster of blocks. Plain NumPy; knows no CUDA.

A part is what one cluster does for some streams: the recurrent half of a layer, or (a feeder) what its input adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.packing import CompactStrips
from eventrnn.cuda.plan import Chip, LayerPlan, Plan
from eventrnn.cuda.tables import LANES

CLUSTER_SIZES = (16, 8, 4, 2, 1)

# More leave a thread too few registers for the weights on their way.
CLUSTER_WARPS = 24

# Looking up more than this share of all units, strip by strip, costs more than making a list of events once.
MOST_REACHED = 0.4

# Cycles, measured on an H100: a send and its arrival, the same a tile; a strip from what arrived to its gate, with
# weights in L2 more; a tile's cells. Then what both keep a multiprocessor from doing for others.
EXCHANGE, EXCHANGE_TILE, STRIP, STRIP_FAR, CELLS, STRIP_ALONE, CELLS_ALONE = 350, 10, 500, 300, 450, 65, 100

TILE_BYTES = 4 * LANES


@dataclass(frozen=True)
class ClusterShape:
    """One layer as the plan sees it. `w_in` is None where the input's drives are made beforehand."""

    units: int
    w_in: CompactStrips | None
    w_rec: CompactStrips

    @property
    def tiles(self) -> int:
        return -(-self.units // LANES)

    def parts(self) -> list[CompactStrips]:
        """Feeder first: it waits for the layer below only."""
        return [self.w_rec] if self.w_in is None else [self.w_in, self.w_rec]


def cluster_plan(shapes: Sequence[ClusterShape], batch: int, chip: Chip) -> Plan | None:
    """The launch of some layers where a stream's layer lives in one cluster; None where that cannot be.

    The layers of the plan are its parts, in order: of each layer but the first its feeder, then itself.
    """
    matrices = [matrix for shape in shapes for matrix in shape.parts()]
    if len({matrix.rows.dtype for matrix in matrices}) > 1:
        return None
    parts = [(shape, matrix) for shape in shapes for matrix in shape.parts()]
    rounds = rounds_of([shape.w_rec for shape in shapes])
    rounds_in = rounds_of([shape.w_in for shape in shapes if shape.w_in is not None])
    best = None
    for size in CLUSTER_SIZES:
        most = chip.clusters.get(size, 0) // len(parts)
        if most == 0 or size > min(shape.tiles for shape in shapes):
            continue
        samples = -(-batch // most)
        while samples:
            found = _lay_out(parts, size, samples, (rounds, rounds_in), chip)
            if found is not None:
                layers, warps, strips = found
                groups = min(most, -(-batch // samples))
                cost = _cost(shapes, layers, samples, warps, strips) * -(-batch // (groups * samples))
                if best is None or cost < best[0]:
                    best = cost, size, samples, groups, warps, layers
                break
            samples //= 2
    if best is None:
        return None
    _, size, samples, groups, warps, layers = best
    table = []
    # Lower parts first: they wait for nobody above.
    for number, ((shape, _), layer) in enumerate(zip(parts, layers, strict=True)):
        edges = edges_of(shape.tiles, size)
        for group in range(groups):
            for begin, end in zip(edges[:-1], edges[1:], strict=True):
                row = np.zeros(tables.BLOCK_FIELDS, np.int64)
                row[[tables.LAYER, tables.TILE, tables.TILES]] = number, begin, end - begin
                row[[tables.SAMPLE, tables.SAMPLES, tables.ALL_TILES]] = group * samples, samples, shape.tiles
                for field, offset in layer.offsets.items():
                    row[field] = offset
                table.append(row)
    shared = max(layer.shared for layer in layers)
    return Plan(tuple(layers), samples, groups, warps, shared, 0, np.array(table), size, (rounds, rounds_in))


def edges_of(tiles: int, size: int) -> np.ndarray:
    """Where each block's tiles begin, as even as can be, and where the last one's end."""
    return np.arange(size + 1) * tiles // size


def strips_of(units: int, tile: int, tiles: int) -> list[tuple[int, int]]:
    """By gate, the strips of 32 columns from which on and before which some tiles have rows."""
    first, last = tile * LANES, min(units, (tile + tiles) * LANES)
    return [((gate * units + first) // LANES, -(-(gate * units + last) // LANES)) for gate in range(3)]


def rounds_of(matrices: Sequence[CompactStrips]) -> int:
    """How many units a lane looks up together, so that no lot is emptier than it must be; 0 for no matrix."""
    if not matrices:
        return 0
    most = max(1, *(int(np.diff(matrix.firsts).max(initial=1)) for matrix in matrices))
    lots = -(-most // (LANES * tables.MAX_UNITS_PER_LANE))
    return -(-most // (LANES * lots))


def _lay_out(
    parts: Sequence[tuple[ClusterShape, CompactStrips]], size: int, samples: int, rounds: tuple[int, int], chip: Chip
) -> tuple[list[LayerPlan], int, int] | None:
    """The parts with as many of their weights in shared memory as all of them can have there; warps, most strips."""
    owned = [
        [strips_of(shape.units, begin, end - begin) for begin, end in _pairs(edges_of(shape.tiles, size))]
        for shape, _ in parts
    ]
    strips = max(sum(end - begin for begin, end in block) for blocks in owned for block in blocks)
    # As few as share out the strips evenly.
    warps = -(-strips // -(-strips // CLUSTER_WARPS))
    for near_rec, near_in in ((True, True), (True, False), (False, True), (False, False)):
        laid = []
        for (shape, matrix), blocks in zip(parts, owned, strict=True):
            is_input = matrix is shape.w_in
            near = (near_rec, near_in)[is_input]
            laid.append(_lay_out_part(shape, matrix, blocks, size, samples, rounds[is_input], warps, near))
        if max(each.shared for each in laid) <= chip.shared_bytes:
            return laid, warps, strips
    return None


def _pairs(edges: np.ndarray) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]


def _lay_out_part(
    shape: ClusterShape,
    matrix: CompactStrips,
    blocks: Sequence[Sequence[tuple[int, int]]],
    size: int,
    samples: int,
    rounds: int,
    warps: int,
    near: bool,
) -> LayerPlan:
    tiles = int(np.diff(edges_of(shape.tiles, size)).max())
    strips = max(sum(end - begin for begin, end in gates) for gates in blocks)
    entries = max(sum(int(matrix.firsts[end] - matrix.firsts[begin]) for begin, end in gates) for gates in blocks)
    # Whole lots of what is looked up, as many for every strip.
    lot = LANES * rounds
    capacity = lot * max(1, -(-int(np.diff(matrix.firsts).max(initial=0)) // lot))
    sizes = {
        # At the same place in every block of the cluster.
        tables.AT_BARRIERS: 16 * samples,
        tables.AT_Y: 2 * samples * (shape.tiles * TILE_BYTES + 16),
        tables.AT_STRIPS: 32 + 16 * strips,
        tables.AT_BIAS: TILE_BYTES * strips,
        tables.AT_THRESHOLD: TILE_BYTES * tiles,
        tables.AT_SUMS_IN: 2 * TILE_BYTES * strips,
        tables.AT_SUMS_REC: 4 * TILE_BYTES * (strips + 1),
        tables.AT_CELLS: TILE_BYTES * samples * tiles,
        tables.AT_HITS: tables.HIT_BYTES * (LANES * rounds + tables.LIST_PAD) * warps,
        tables.AT_UNITS: 4 * capacity * strips,
        tables.AT_ROWS: LANES * matrix.rows.itemsize * entries * near,
    }
    offsets, at = {tables.CAPACITY: capacity}, 0
    for field, bytes_ in sizes.items():
        offsets[field], at = at, at + -(-bytes_ // 16) * 16
    way = tables.layout_code(tables.MASKED, matrix.rows.dtype == np.uint16, near)
    return LayerPlan(tiles, way, way, at, offsets)


def _cost(shapes: Sequence[ClusterShape], layers: Sequence[LayerPlan], samples: int, warps: int, strips: int) -> float:
    """Cycles of a step."""
    widest, tiles = max(shape.tiles for shape in shapes), max(layer.tiles for layer in layers)
    far = not layers[-1].way_rec & tables.RESIDENT
    # One turn after the other, as its warps wait for each other, and as their instructions fill the multiprocessor.
    waits = -(-strips // warps) * (STRIP + STRIP_FAR * far) + -(-tiles // warps) * CELLS
    turn = max(waits, strips * STRIP_ALONE + tiles * CELLS_ALONE)
    exchange = EXCHANGE + EXCHANGE_TILE * widest
    return max(exchange + turn, samples * (turn + widest * EXCHANGE_TILE))
