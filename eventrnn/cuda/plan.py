"""Who does what: tiles, blocks, stream groups, and what stays in shared memory. Plain NumPy; knows no CUDA.

A stream group is some samples; its blocks share out the tiles of every layer and meet nobody else's. More groups mean
fewer samples for each block, and fewer blocks (so more weights) for each group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eventrnn.cuda import tables as k
from eventrnn.cuda.packing import Reached, Strips
from eventrnn.cuda.tables import LANES

NARROWEST = 8
# Few numbers of warps, because a kernel is compiled for each.
WARPS = (8, 12, 16, 24, 32)
MOST_WARPS = 16
# Segments that the lanes of one warp can add up.
MOST_SINGLE = 32


@dataclass(frozen=True)
class Chip:
    """What a plan has to fit into: multiprocessors, bytes of shared memory a block may have.

    `clusters`: by blocks of a cluster, how many clusters of blocks that fill a multiprocessor run at once.
    """

    multiprocessors: int
    shared_bytes: int
    clusters: Mapping[int, int] = dataclasses.field(default_factory=dict)


def tile_width(units: int, share: int, dense: bool) -> int:
    """Units of a tile. Masked strips are as wide as a warp; dense ones so narrow that all multiprocessors have one."""
    if not dense:
        return LANES
    return int(np.clip(-(-units // share), NARROWEST, LANES))


@dataclass(frozen=True)
class LayerShape:
    """One layer as the plan sees it. `w_in` is None where the input's drives are made beforehand."""

    units: int
    inputs: int
    w_in: Strips | None
    w_rec: Strips
    reached_in: Reached | None = None
    reached_rec: Reached | None = None

    @property
    def tiles(self) -> int:
        return self.w_rec.tiles


@dataclass(frozen=True)
class LayerPlan:
    """How one layer lies on its blocks: tiles of a block, ways of its matrices, bytes of shared memory, offsets."""

    tiles: int
    way_in: int
    way_rec: int
    shared: int
    offsets: dict[int, int]

    def blocks(self, shape: LayerShape) -> int:
        return -(-shape.tiles // self.tiles)


@dataclass(frozen=True)
class Plan:
    """One launch: its layers, samples of a group, warps of a block, segments of the widest row, and the block table.

    `cluster`: blocks of a cluster, 0 where blocks meet in global memory only. `lookups`: times 128
    units that a recurrent strip there looks up, 0 for too many to do so at once.
    """

    layers: tuple[LayerPlan, ...]
    samples: int
    groups: int
    warps: int
    shared: int
    widest: int
    blocks: np.ndarray
    cluster: int = 0
    lookups: int = 0

    @property
    def single(self) -> bool:
        """Whether every block owns one tile of one sample, and its warps see all units at once."""
        return (
            not self.cluster
            and self.samples == 1
            and self.widest <= self.warps
            and all(layer.tiles == 1 for layer in self.layers)
        )

    @property
    def ways(self) -> tuple[int, ...]:
        return tuple(sorted({way for layer in self.layers for way in (layer.way_in, layer.way_rec)}))


def lay_out(shape: LayerShape, tiles: int, samples: int, warps: int, chip: Chip) -> LayerPlan | None:
    """A layer with so many tiles a block, as much of it in shared memory as fits; None where not even the lists do."""
    widest = max(shape.units, shape.inputs if shape.w_in is not None else 0)
    segments = -(-widest // k.SEGMENT)
    capacity = segments * k.SEGMENT + k.LIST_PAD
    sums = 4 * 3 * LANES * samples * tiles
    sizes = {
        # A single sample's kernel has a list of each kind.
        k.AT_LIST: 8 * capacity * (samples + (samples == 1 and shape.w_in is not None)),
        k.AT_COUNTS: 4 * samples,
        k.AT_STAGED: 4 * samples * segments * k.SEGMENT,
        k.AT_TOTALS: max(256, 4 * samples * segments),
        k.AT_BASES: 2 * 4 * 3 * tiles,
        k.AT_HITS: k.HIT_BYTES * warps,
        k.AT_SUMS_IN: 2 * sums,
        k.AT_SUMS_REC: sums,
        k.AT_CELLS: sums // 3,
        k.AT_Y: sums // 3,
        k.AT_THRESHOLD: 4 * LANES * tiles,
        k.AT_BIAS: 2 * 4 * 3 * LANES * tiles,
    }
    offsets, at = {k.CAPACITY: capacity}, 0

    def place(field: int, size: int) -> None:
        nonlocal at
        offsets[field], at = at, at + -(-size // 16) * 16

    for field, size in sizes.items():
        place(field, size)
    if at > chip.shared_bytes:
        return None
    ways = {}
    # What the next step waits for comes first.
    for name, strips, fields in (
        ("rec", shape.w_rec, (k.AT_VALUES_REC, k.AT_TABLE_REC)),
        ("in", shape.w_in, (k.AT_VALUES_IN, k.AT_TABLE_IN)),
    ):
        ways[name] = 0
        offsets |= dict.fromkeys(fields, 0)
        if strips is None:
            continue
        needed = strips.tile_bytes(tiles)
        resident = at + sum(needed) <= chip.shared_bytes
        if resident:
            for field, size in zip(fields, needed, strict=True):
                place(field, size)
        ways[name] = k.way(strips.kind, strips.values.dtype == np.uint16, resident)
    if shape.w_in is None:
        ways["in"] = ways["rec"]
    return LayerPlan(tiles, ways["in"], ways["rec"], at, offsets)


def plan(shapes: Sequence[LayerShape], batch: int, chip: Chip) -> Plan:
    """The launch of some layers for a batch: as many groups as find room, no more samples each than they must have.

    `blocks` serves the first `groups * samples` samples; later ones are further launches, with SAMPLE moved on.
    Raises ValueError for layers too wide for the shared memory.
    """
    share = chip.multiprocessors // len(shapes)
    best = None
    for samples in _samples(batch):
        for spread in range(share, 0, -1):
            tiles = [-(-shape.tiles // spread) for shape in shapes]
            blocks = sum(-(-shape.tiles // t) for shape, t in zip(shapes, tiles, strict=True))
            groups = min(chip.multiprocessors // blocks, -(-batch // samples))
            if groups * samples < batch and not (spread == 1 and samples == _samples(batch)[-1]):
                # Fewer blocks a group make room for more groups.
                continue
            warps = _warps(shapes, samples, max(tiles))
            laid = [lay_out(shape, t, samples, warps, chip) for shape, t in zip(shapes, tiles, strict=True)]
            if None in laid:
                continue
            layers = [each for each in laid if each is not None]
            cost = _cost(shapes, layers, samples) * -(-batch // (groups * samples))
            if best is None or cost < best[0]:
                best = cost, samples, groups, warps, layers
            break
    if best is None:
        return _smallest(shapes, batch, chip)
    _, samples, groups, warps, layers = best
    return _table(shapes, layers, samples, groups, warps)


def _samples(batch: int) -> list[int]:
    counts = [1, 2, 3, 4, 6, 8, 12, 16]
    return [s for s in counts if s < batch] + [min(batch, counts[-1])] if batch > 1 else [1]


def _cost(shapes: Sequence[LayerShape], layers: Sequence[LayerPlan], samples: int) -> float:
    """Relative time of a step: the exchange, the lists, then strips walked one after the other; more from afar."""
    slowest = 0.0
    for shape, layer in zip(shapes, layers, strict=True):
        strips = 3 * layer.tiles * samples
        rounds = -(-strips // MOST_WARPS)
        far = 1.0 if layer.way_rec & k.RESIDENT else 3.0
        lists = samples * -(-shape.units // k.SEGMENT) / MOST_WARPS
        slowest = max(slowest, 1.0 + 0.3 * far * rounds + 0.3 * lists)
    return slowest


def _smallest(shapes: Sequence[LayerShape], batch: int, chip: Chip) -> Plan:
    """One sample at a time, tiles as few a block as the multiprocessors allow."""
    share = chip.multiprocessors // len(shapes)
    tiles = [-(-shape.tiles // share) for shape in shapes]
    warps = _warps(shapes, 1, max(tiles))
    laid = [lay_out(shape, t, 1, warps, chip) for shape, t in zip(shapes, tiles, strict=True)]
    for shape, layer in zip(shapes, laid, strict=True):
        if layer is None:
            raise ValueError(
                f"cuda: a layer of {shape.units} units over {shape.inputs} inputs needs more shared memory than the "
                f"{chip.shared_bytes:,} bytes of a block; use backend='cpu'"
            )
    layers = [each for each in laid if each is not None]
    blocks = sum(layer.blocks(shape) for shape, layer in zip(shapes, layers, strict=True))
    return _table(shapes, layers, 1, min(batch, max(1, chip.multiprocessors // blocks)), warps)


def _warps(shapes: Sequence[LayerShape], samples: int, tiles: int) -> int:
    segments = max(map(_segments, shapes))
    if samples == tiles == 1 and segments <= MOST_SINGLE:
        wanted = segments
    else:
        wanted = min(MOST_WARPS, max(3 * samples * tiles, samples * segments))
    return next(warps for warps in WARPS if warps >= wanted)


def _segments(shape: LayerShape) -> int:
    """Segments of the widest row that the layer gathers."""
    return -(-max(shape.units, shape.inputs if shape.w_in is not None else 0) // k.SEGMENT)


def _table(shapes: Sequence[LayerShape], layers: Sequence[LayerPlan], samples: int, groups: int, warps: int) -> Plan:
    rows = []
    for group in range(groups):
        for number, (shape, layer) in enumerate(zip(shapes, layers, strict=True)):
            for tile in range(0, shape.tiles, layer.tiles):
                row = np.zeros(k.BLOCK_FIELDS, np.int64)
                row[[k.LAYER, k.TILE, k.TILES]] = number, tile, min(layer.tiles, shape.tiles - tile)
                row[[k.SAMPLE, k.SAMPLES]] = group * samples, samples
                for field, offset in layer.offsets.items():
                    row[field] = offset
                rows.append(row)
    shared = max(layer.shared for layer in layers)
    return Plan(tuple(layers), samples, groups, warps, shared, max(map(_segments, shapes)), np.array(rows))


def blocks_from(plan: Plan, first: int, batch: int) -> np.ndarray:
    """The block table for samples `first` on; blocks without a sample are left out."""
    rows = plan.blocks.copy()
    rows[:, k.SAMPLE] += first
    rows = rows[rows[:, k.SAMPLE] < batch]
    rows[:, k.SAMPLES] = np.minimum(rows[:, k.SAMPLES], batch - rows[:, k.SAMPLE])
    return rows


# --- clusters -----------------------------------------------------------------------------------------------

CLUSTER_SIZES = (16, 8, 4, 2, 1)
CLUSTER_WARPS = 32
# A block has 16 barriers, one of which is everybody's.
MOST_MEETINGS = 15
MOST_LOOKUPS = 4
# Looking up more than this share of all units, strip by strip, costs more than making a list of events once.
MOST_REACHED = 0.4
# Cycles, measured on an H100: a send and its arrival, the same a tile; a unit of work from what arrived to what is
# sent, with weights in L2 more; what its warps keep a multiprocessor from doing for others.
EXCHANGE, EXCHANGE_TILE, WORK, WORK_FAR, WORK_ALONE = 350, 10, 900, 600, 220


def cluster_plan(shapes: Sequence[LayerShape], batch: int, chip: Chip) -> Plan | None:
    """The launch of some layers where a stream's layer lives in one cluster; None where that cannot be."""
    matrices = [
        (strips, reached)
        for shape in shapes
        for strips, reached in ((shape.w_in, shape.reached_in), (shape.w_rec, shape.reached_rec))
        if strips is not None
    ]
    if any(reached is None for _, reached in matrices):
        return None
    inside = [shape.w_in for shape in shapes if shape.w_in is not None]
    for each in (inside, [shape.w_rec for shape in shapes]):
        if len({strips.values.dtype for strips in each}) > 1:
            return None
    best = None
    for size in CLUSTER_SIZES:
        most = chip.clusters.get(size, 0) // len(shapes)
        if most == 0 or size > min(shape.tiles for shape in shapes):
            continue
        tiles = max(-(-shape.tiles // size) for shape in shapes)
        roles = 6 if inside else 3
        samples = -(-batch // most)
        while samples:
            slots = min(samples, CLUSTER_WARPS // (roles * tiles), MOST_MEETINGS // tiles)
            found = _lay_out_clusters(shapes, size, samples, slots, chip) if slots else None
            if found is not None:
                groups = min(most, -(-batch // samples))
                far = not found[0].way_rec & k.RESIDENT
                cost = _cluster_cost(shapes, tiles, roles, samples, slots, far) * -(-batch // (groups * samples))
                if best is None or cost < best[0]:
                    best = cost, size, samples, slots, groups, roles * tiles * slots, found
                break
            samples //= 2
    if best is None:
        return None
    _, size, samples, slots, groups, warps, layers = best
    rows = []
    # Lower layers first: they wait for nobody above.
    for number, (shape, layer) in enumerate(zip(shapes, layers, strict=True)):
        edges = _edges(shape.tiles, size)
        for group in range(groups):
            for begin, end in zip(edges[:-1], edges[1:], strict=True):
                row = np.zeros(k.BLOCK_FIELDS, np.int64)
                row[[k.LAYER, k.TILE, k.TILES]] = number, begin, end - begin
                row[[k.SAMPLE, k.SAMPLES, k.SLOTS]] = group * samples, samples, slots
                row[k.ALL_TILES] = shape.tiles
                for field, offset in layer.offsets.items():
                    row[field] = offset
                rows.append(row)
    shared = max(layer.shared for layer in layers)
    most = max(int(np.diff(reached.firsts).max()) for shape in shapes if (reached := shape.reached_rec))
    lookups = -(-max(most, 1) // (32 * k.LOOKED))
    lookups = lookups if lookups <= MOST_LOOKUPS else 0
    return Plan(tuple(layers), samples, groups, warps, shared, 0, np.array(rows), size, lookups)


def _edges(tiles: int, size: int) -> np.ndarray:
    """Where each block's tiles begin, as even as can be, and where the last one's end."""
    return np.arange(size + 1) * tiles // size


def _lay_out_clusters(
    shapes: Sequence[LayerShape], size: int, samples: int, slots: int, chip: Chip
) -> list[LayerPlan] | None:
    """The layers with as many of their weights in shared memory as all of them can have there."""
    for near_rec, near_in in ((True, True), (True, False), (False, False)):
        laid = [_lay_out_cluster(shape, size, samples, slots, near_rec, near_in) for shape in shapes]
        if max(each.shared for each in laid) <= chip.shared_bytes:
            return laid
    return None


def _lay_out_cluster(
    shape: LayerShape, size: int, samples: int, slots: int, near_rec: bool, near_in: bool
) -> LayerPlan:
    edges = _edges(shape.tiles, size)
    tiles = int(np.diff(edges).max())
    work, roles = tiles * slots, 3 if shape.w_in is None else 6
    tile_bytes = 4 * LANES
    sizes = {
        # At the same place in every block of the cluster.
        k.AT_BARRIERS: 16 * samples,
        k.AT_Y: 2 * samples * (shape.tiles * tile_bytes + 16),
        k.AT_HITS: k.CLUSTER_HIT_BYTES * work * roles,
        k.AT_SUMS_IN: 6 * tile_bytes * work,
        k.AT_SUMS_REC: 4 * tile_bytes * work,
        k.AT_CELLS: samples * tiles * tile_bytes,
    }
    ways = {}
    for name, strips, reached, near, fields in (
        ("rec", shape.w_rec, shape.reached_rec, near_rec, (k.AT_UNITS_REC, k.AT_VALUES_REC)),
        ("in", shape.w_in, shape.reached_in, near_in, (k.AT_UNITS_IN, k.AT_VALUES_IN)),
    ):
        if strips is None or reached is None:
            continue
        narrow = strips.values.dtype == np.uint16
        # How a row came about makes no difference here.
        ways[name] = k.way(k.MASKED, narrow, near)
        entries = int(np.diff(reached.firsts[3 * edges]).max())
        sizes |= dict(zip(fields, (4 * entries, LANES * (2 if narrow else 4) * entries * near), strict=True))
    offsets, at = {}, 0
    for field, size_ in sizes.items():
        offsets[field], at = at, at + -(-size_ // 16) * 16
    return LayerPlan(tiles, ways.get("in", ways["rec"]), ways["rec"], at, offsets)


def _cluster_cost(shapes: Sequence[LayerShape], tiles: int, roles: int, samples: int, slots: int, far: bool) -> float:
    """Cycles of a step."""
    widest = max(shape.tiles for shape in shapes)
    work = WORK + WORK_FAR * far
    alone = samples * tiles * WORK_ALONE * roles / 3
    turns = -(-samples // slots)
    return max(EXCHANGE + EXCHANGE_TILE * widest + work + alone / samples, turns * work, alone) + (
        (samples - 1) * widest * EXCHANGE_TILE
    )
