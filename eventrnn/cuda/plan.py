"""Who does what: tiles, blocks, stream groups, and what stays in shared memory. Plain NumPy; knows no CUDA.

A stream group is some samples; its blocks share out the tiles of every layer and meet nobody else's. More groups mean
fewer samples for each block, and fewer blocks (so more weights) for each group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.packing import Strips
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

    `cluster`: blocks of a cluster, 0 where blocks meet in global memory only. `rounds`: how many units a lane looks up
    together there, in recurrent strips and in those of the input.
    """

    layers: tuple[LayerPlan, ...]
    samples: int
    groups: int
    warps: int
    shared: int
    widest: int
    blocks: np.ndarray
    cluster: int = 0
    rounds: tuple[int, int] = (0, 0)

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
    segments = -(-widest // tables.SEGMENT)
    capacity = segments * tables.SEGMENT + tables.LIST_PAD
    sums = 4 * 3 * LANES * samples * tiles
    sizes = {
        # A single sample's kernel has a list of each kind.
        tables.AT_LIST: 8 * capacity * (samples + (samples == 1 and shape.w_in is not None)),
        tables.AT_COUNTS: 4 * samples,
        tables.AT_STAGED: 4 * samples * segments * tables.SEGMENT,
        tables.AT_SEGMENT_COUNTS: max(256, 4 * samples * segments),
        tables.AT_BASES: 2 * 4 * 3 * tiles,
        tables.AT_HITS: tables.HIT_BUFFER_BYTES * warps,
        tables.AT_SUMS_IN: 2 * sums,
        tables.AT_SUMS_REC: sums,
        tables.AT_CELLS: sums // 3,
        tables.AT_Y: sums // 3,
        tables.AT_THRESHOLD: 4 * LANES * tiles,
        tables.AT_BIAS: 2 * 4 * 3 * LANES * tiles,
    }
    offsets, at = {tables.CAPACITY: capacity}, 0

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
        ("rec", shape.w_rec, (tables.AT_VALUES_REC, tables.AT_TABLE_REC)),
        ("in", shape.w_in, (tables.AT_VALUES_IN, tables.AT_TABLE_IN)),
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
        ways[name] = tables.layout_code(strips.kind, strips.values.dtype == np.uint16, resident)
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
        far = 1.0 if layer.way_rec & tables.RESIDENT else 3.0
        lists = samples * -(-shape.units // tables.SEGMENT) / MOST_WARPS
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
    return -(-max(shape.units, shape.inputs if shape.w_in is not None else 0) // tables.SEGMENT)


def _table(shapes: Sequence[LayerShape], layers: Sequence[LayerPlan], samples: int, groups: int, warps: int) -> Plan:
    rows = []
    for group in range(groups):
        for number, (shape, layer) in enumerate(zip(shapes, layers, strict=True)):
            for tile in range(0, shape.tiles, layer.tiles):
                row = np.zeros(tables.BLOCK_FIELDS, np.int64)
                row[[tables.LAYER, tables.TILE, tables.TILES]] = number, tile, min(layer.tiles, shape.tiles - tile)
                row[[tables.SAMPLE, tables.SAMPLES]] = group * samples, samples
                for field, offset in layer.offsets.items():
                    row[field] = offset
                rows.append(row)
    shared = max(layer.shared for layer in layers)
    return Plan(tuple(layers), samples, groups, warps, shared, max(map(_segments, shapes)), np.array(rows))


def blocks_from(plan: Plan, first: int, batch: int) -> np.ndarray:
    """The block table for samples `first` on; blocks without a sample are left out."""
    rows = plan.blocks.copy()
    rows[:, tables.SAMPLE] += first
    rows = rows[rows[:, tables.SAMPLE] < batch]
    rows[:, tables.SAMPLES] = np.minimum(rows[:, tables.SAMPLES], batch - rows[:, tables.SAMPLE])
    return rows


# --- launches -----------------------------------------------------------------------------------------------


def launches_of(variants: Sequence[str], most: int, ways: tuple[int, ...] = ()) -> list[range]:
    """Neighbouring layers that run in one launch: of one variant, and no more than there are multiprocessors.

    What is above follows in the next launch; the record holds everything that it needs. Layers in `ways` are alone.
    """
    launches: list[range] = []
    for n, variant in enumerate(variants):
        last = launches[-1] if launches else None
        alone = n in ways or n - 1 in ways
        if last is not None and not alone and len(last) < most and variants[last.start] == variant:
            launches[-1] = range(last.start, n + 1)
        else:
            launches.append(range(n, n + 1))
    return launches


def parts_of(layers: range, each: Plan) -> list[tuple[int, bool]]:
    """What a launch consists of, in the order of its plan: which layer, and whether its feeder."""
    return [(n, is_input) for n in layers for is_input in (True, False) if not is_input or (n and each.cluster)]
