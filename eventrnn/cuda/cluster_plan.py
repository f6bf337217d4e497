"""Cluster plans: one layer of a stream lives in one thread-block cluster. Plain NumPy, no CUDA.

A cluster has one role for one layer and some samples (`kernels/cluster.py`). RECURRENT: recurrent drives, cells and
events. INPUT: the input drives of that layer. The first layer of a network has no cluster in the role INPUT.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.packing import CompactStrips
from eventrnn.cuda.plan import Chip, LayerPlan, Plan
from eventrnn.cuda.tables import LANES

# Blocks per cluster that a plan may choose. Sizes that are no power of two leave fewer multiprocessors without a
# cluster: of 132, 16 clusters of 6 use 96, and those of 4 use 64.
CLUSTER_SIZES = (16, 8, 6, 5, 4, 3, 2, 1)

# Those of them that a plan chooses only if the recurrent weights are in shared memory: with weights in L2, 16 streams
# of 1344 units took longer with clusters of 6 than with clusters of 4.
RESIDENT_SIZES = (6, 5, 3)

# Warps per block, at most. With more, a thread has too few registers for the weights that it is loading.
CLUSTER_WARPS = 24

# Share of all presynaptic units that reach a strip, averaged over the strips, up to which a gather of their outputs
# per strip costs less than one list of events per step.
MAX_GATHERED_SHARE = 0.4

# The following costs are cycles, fitted to lines of `experiments/gpu_phases.py` of an H200 with one stream.

# Latency from sending outputs to their arrival in the other blocks of the cluster, and its increase per tile.
EXCHANGE, EXCHANGE_TILE = 350, 10

# Latency from the arrival of outputs to the drives of a strip, and its increase if the weights are in L2.
STRIP, STRIP_FAR = 800, 300

# Latency of updating the cells of a tile.
CELLS = 600

# Issue slots of a multiprocessor that a strip and the cells of a tile take from other warps.
STRIP_ISSUE, CELLS_ISSUE = 90, 90

# The same where a cluster has one sample and a warp one strip. A strip's latency grows with the units that reach it.
STREAM_EXCHANGE, STREAM_EXCHANGE_TILE, STREAM_CELLS = 350, 6, 250
STREAM_STRIP, STREAM_UNIT = 250, 4.5
STREAM_STRIP_ISSUE, STREAM_CELLS_ISSUE = 60, 40

# Bytes of one float32 per unit of a tile.
TILE_BYTES = 4 * LANES


@dataclass(frozen=True)
class ClusterShape:
    """One layer as the plan sees it. `w_in` is None where the input drives are computed before the launch."""

    units: int
    w_in: CompactStrips | None
    w_rec: CompactStrips

    @property
    def tiles(self) -> int:
        return -(-self.units // LANES)

    def matrices(self) -> list[CompactStrips]:
        """The matrix of each role: INPUT first, because it waits for the layer below only."""
        return [self.w_rec] if self.w_in is None else [self.w_in, self.w_rec]


def cluster_plan(shapes: Sequence[ClusterShape], batch: int, chip: Chip) -> Plan | None:
    """The cluster plan of a launch of these layers: of the cluster sizes, that of the least cost.

    Its `layers` are roles: for each layer INPUT, unless its `w_in` is None, then RECURRENT. None if the GPU has no
    clusters, if a cluster cannot hold a layer, or if the matrices have different storage types.
    """
    matrices = [matrix for shape in shapes for matrix in shape.matrices()]
    if len({matrix.rows.dtype for matrix in matrices}) > 1:
        return None
    roles = [(shape, matrix) for shape in shapes for matrix in shape.matrices()]
    recurrent, inputs = [shape.w_rec for shape in shapes], [shape.w_in for shape in shapes if shape.w_in is not None]
    per_lane = units_per_lane_of(recurrent), units_per_lane_of(inputs)
    best = None
    for size in CLUSTER_SIZES:
        max_groups = chip.clusters.get(size, 0) // len(roles)
        if max_groups == 0 or size > min(shape.tiles for shape in shapes):
            continue
        samples = -(-batch // max_groups)
        while samples:
            found = _lay_out(roles, size, samples, per_lane, chip)
            if found is not None:
                resident = found[0][-1].layout_rec & tables.RESIDENT
                if size in RESIDENT_SIZES and not resident:
                    break
                groups = min(max_groups, -(-batch // samples))
                cost = _cost(shapes, *found, samples) * -(-batch // (groups * samples))
                if best is None or cost < best[0]:
                    best = cost, size, samples, groups, *found
                break
            samples //= 2
    if best is None:
        return None
    _, size, samples, groups, layers, warps, _, single = best
    table = []
    # Lower layers come first, because they never wait for layers above.
    for number, ((shape, _), layer) in enumerate(zip(roles, layers, strict=True)):
        bounds = tile_bounds(shape.tiles, size)
        for group in range(groups):
            for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
                row = np.zeros(tables.BLOCK_FIELDS, np.int64)
                row[[tables.LAYER, tables.TILE, tables.TILES]] = number, begin, end - begin
                row[[tables.SAMPLE, tables.SAMPLES, tables.ALL_TILES]] = group * samples, samples, shape.tiles
                for field, offset in layer.offsets.items():
                    row[field] = offset
                table.append(row)
    shared = max(layer.shared for layer in layers)
    return Plan(
        tuple(layers),
        samples,
        groups,
        warps,
        shared,
        0,
        np.array(table),
        size,
        per_lane,
        single,
    )


def tile_bounds(tiles: int, size: int) -> np.ndarray:
    """The first tile of each block of a cluster, then the number of tiles: (size + 1,), as even as possible."""
    return np.arange(size + 1) * tiles // size


def strips_of(units: int, tile: int, tiles: int) -> list[tuple[int, int]]:
    """Per gate, the range of strips of 32 columns that contain the gate rows of tiles `tile` to `tile + tiles - 1`."""
    first, last = tile * LANES, min(units, (tile + tiles) * LANES)
    return [((gate * units + first) // LANES, -(-(gate * units + last) // LANES)) for gate in range(3)]


def units_per_lane_of(matrices: Sequence[CompactStrips]) -> int:
    """Units that a lane gathers together, at most MAX_UNITS_PER_LANE; 0 without a matrix.

    A chunk is 32 times as many units. The number is the smallest with which the units of the longest strip still take
    as few chunks as possible.
    """
    if not matrices:
        return 0
    longest = max(1, *(int(np.diff(matrix.begins).max(initial=1)) for matrix in matrices))
    chunks = -(-longest // (LANES * tables.MAX_UNITS_PER_LANE))
    return -(-longest // (LANES * chunks))


def _lay_out(
    roles: Sequence[tuple[ClusterShape, CompactStrips]], size: int, samples: int, per_lane: tuple[int, int], chip: Chip
) -> tuple[list[LayerPlan], int, int, bool] | None:
    """Place the roles on clusters of `size` blocks; None if shared memory is too small.

    Recurrent weights, input weights or both go to shared memory if those of all layers fit; recurrent ones come first.
    Returns the placements, the warps per block, the strips of the block that has most, and `Plan.single_strips`.
    """
    owned = [
        [strips_of(shape.units, begin, end - begin) for begin, end in _pairs(tile_bounds(shape.tiles, size))]
        for shape, _ in roles
    ]
    strips = max(sum(end - begin for begin, end in block) for blocks in owned for block in blocks)
    # The fewest warps with which no warp has more strips than with CLUSTER_WARPS.
    warps = -(-strips // -(-strips // CLUSTER_WARPS))
    lengths = [np.diff(shape.w_rec.begins) for shape, _ in roles]
    single = samples == 1 and strips <= warps
    single = single and all(0 < each.min() and each.max() <= LANES * per_lane[0] for each in lengths)
    for near_rec, near_in in ((True, True), (True, False), (False, True), (False, False)):
        placed = []
        for (shape, matrix), blocks in zip(roles, owned, strict=True):
            is_input = matrix is shape.w_in
            near, own = (near_rec, near_in)[is_input], single and not is_input
            placed.append(_lay_out_role(shape, matrix, blocks, size, samples, per_lane[is_input], warps, near, own))
        if max(each.shared for each in placed) <= chip.shared_bytes:
            return placed, warps, strips, single
    return None


def _pairs(bounds: np.ndarray) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in pairwise(bounds)]


def _lay_out_role(
    shape: ClusterShape,
    matrix: CompactStrips,
    blocks: Sequence[Sequence[tuple[int, int]]],
    size: int,
    samples: int,
    per_lane: int,
    warps: int,
    near: bool,
    single: bool,
) -> LayerPlan:
    """Place one role of a layer.

    matrix   : the weights of that role
    blocks   : per block of the cluster and per gate, the range of its strips (`strips_of`)
    size     : blocks per cluster
    per_lane : units that a lane gathers together
    near     : whether the weights are in shared memory
    single   : whether the kernel keeps units and drives in registers, as for `Plan.single_strips`
    """
    tiles = int(np.diff(tile_bounds(shape.tiles, size)).max())
    strips = max(sum(end - begin for begin, end in gates) for gates in blocks)
    entries = max(sum(int(matrix.begins[end] - matrix.begins[begin]) for begin, end in gates) for gates in blocks)
    # Every strip has room for the same number of whole chunks.
    chunk = LANES * per_lane
    capacity = chunk * max(1, -(-int(np.diff(matrix.begins).max(initial=0)) // chunk))
    sizes = {
        # The first two arrays have the same offset in every block of a cluster, because blocks write to each other's.
        tables.AT_BARRIERS: 16 * samples,
        tables.AT_Y: 2 * samples * (shape.tiles * TILE_BYTES + 16),
        tables.AT_STRIPS: 32 + 16 * strips,
        tables.AT_BIAS: TILE_BYTES * strips,
        tables.AT_THRESHOLD: TILE_BYTES * tiles,
        tables.AT_SUMS_IN: 0 if single else 2 * TILE_BYTES * strips,
        tables.AT_SUMS_REC: 4 * TILE_BYTES * (strips + 1),
        tables.AT_CELLS: TILE_BYTES * samples * tiles,
        tables.AT_HITS: tables.HIT_BYTES * (chunk + tables.LIST_PAD) * warps,
        tables.AT_UNITS: 0 if single else 4 * capacity * strips,
        tables.AT_ROWS: LANES * matrix.rows.itemsize * entries * near,
    }
    offsets, at = {tables.CAPACITY: capacity}, 0
    for field, bytes_ in sizes.items():
        offsets[field], at = at, at + -(-bytes_ // 16) * 16
    layout = tables.layout_code(tables.MASKED, matrix.rows.dtype == np.uint16, near)
    return LayerPlan(tiles, layout, layout, at, offsets)


def _cost(
    shapes: Sequence[ClusterShape], layers: Sequence[LayerPlan], warps: int, strips: int, single: bool, samples: int
) -> float:
    """Estimated cycles of a step; for `layers`, `warps`, `strips` and `single` see `_lay_out`."""
    widest, tiles = max(shape.tiles for shape in shapes), max(layer.tiles for layer in layers)
    far = not layers[-1].layout_rec & tables.RESIDENT
    # One turn is one sample of a block. It takes as long as the longest chain of latencies of a warp, or as all its
    # instructions take to issue.
    if single:
        reached = max(len(shape.w_rec.units) / (len(shape.w_rec.begins) - 1) for shape in shapes)
        latency = STREAM_STRIP + STREAM_UNIT * reached + STRIP_FAR * far
        turn = max(latency, strips * STREAM_STRIP_ISSUE + tiles * STREAM_CELLS_ISSUE)
        return STREAM_EXCHANGE + STREAM_EXCHANGE_TILE * widest + turn + STREAM_CELLS
    latency = -(-strips // warps) * (STRIP + STRIP_FAR * far) + -(-tiles // warps) * CELLS
    turn = max(latency, strips * STRIP_ISSUE + tiles * CELLS_ISSUE)
    return samples * (EXCHANGE + EXCHANGE_TILE * widest + turn)
