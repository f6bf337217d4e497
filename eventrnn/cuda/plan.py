"""Launch plans: which block owns which tiles and samples, and what lies in shared memory. Plain NumPy, no CUDA.

A stream group is a set of samples. Its blocks divide the tiles of every layer among them and never wait for blocks of
another group. More groups mean fewer samples per block, but also fewer blocks per group, and so more weights per block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.packing import Strips
from eventrnn.cuda.tables import LANES

# Units of the narrowest tile.
MIN_TILE_WIDTH = 8

# Warps per block that a plan may choose; few, because each number needs a kernel of its own.
WARPS = (8, 12, 16, 24, 32)

# Warps per block of the general plan, at most.
MAX_WARPS = 16

# Segments of a row in the single-stream plan, at most: one warp sums their event counts, one lane per segment.
MAX_SINGLE_SEGMENTS = 32


@dataclass(frozen=True)
class Chip:
    """The limits of a GPU that plans must keep.

    multiprocessors : number of multiprocessors
    shared_bytes    : bytes of shared memory that a block can have
    clusters        : by blocks per cluster, the clusters that can be resident if each block fills a multiprocessor
    """

    multiprocessors: int
    shared_bytes: int
    clusters: Mapping[int, int] = dataclasses.field(default_factory=dict)


def tile_width(units: int, share: int, dense: bool) -> int:
    """Units per tile of a layer that runs on `share` multiprocessors.

    Sparse strips are as wide as a warp. Dense strips are narrower if that gives every multiprocessor a tile.
    """
    if not dense:
        return LANES
    return int(np.clip(-(-units // share), MIN_TILE_WIDTH, LANES))


@dataclass(frozen=True)
class LayerShape:
    """One layer as the plan sees it. `w_in` is None where the input drives are computed before the launch."""

    units: int
    inputs: int
    w_in: Strips | None
    w_rec: Strips

    @property
    def tiles(self) -> int:
        return self.w_rec.tiles

    @property
    def gates(self) -> int:
        """Gate rows of a unit."""
        return self.w_rec.shape[1]

    @property
    def segments(self) -> int:
        """Segments of the widest row of outputs that the layer reads."""
        widest = max(self.units, self.inputs if self.w_in is not None else 0)
        return -(-widest // tables.SEGMENT)


@dataclass(frozen=True)
class LayerPlan:
    """How one layer, or one role of a layer in a cluster plan, is placed on its blocks.

    tiles                 : tiles per block
    layout_in, layout_rec : layout codes of the input and of the recurrent matrix (`tables.layout_code`)
    shared                : bytes of shared memory per block
    offsets               : by column of the block table, the byte offsets of the arrays in shared memory
    """

    tiles: int
    layout_in: int
    layout_rec: int
    shared: int
    offsets: dict[int, int]

    def blocks(self, shape: LayerShape) -> int:
        return -(-shape.tiles // self.tiles)


@dataclass(frozen=True)
class Plan:
    """The plan of one launch.

    layers   : per layer, or per role in a cluster plan (`roles_of`), its placement
    samples  : samples per group
    groups   : groups that run at the same time; further samples are further launches
    warps    : warps per block
    shared   : bytes of shared memory per block
    segments : segments of the widest row of outputs; 0 in a cluster plan
    blocks   : (blocks, tables.BLOCK_FIELDS) int64, the block table of the first `groups * samples` samples
    cluster  : blocks per cluster; 0 without clusters
    units_per_lane : units that a lane of a cluster gathers together, in recurrent strips and in input strips
    single_strips : whether recurrent clusters have one sample, and their warps at most one strip each, of one chunk
    """

    layers: tuple[LayerPlan, ...]
    samples: int
    groups: int
    warps: int
    shared: int
    segments: int
    blocks: np.ndarray
    cluster: int = 0
    units_per_lane: tuple[int, int] = (0, 0)
    single_strips: bool = False

    @property
    def single(self) -> bool:
        """Whether `single_stream.py` can run it: one tile of one sample per block, one warp per segment of a row."""
        return (
            not self.cluster
            and self.samples == 1
            and self.segments <= self.warps
            and all(layer.tiles == 1 for layer in self.layers)
        )

    @property
    def layouts(self) -> tuple[int, ...]:
        """The layout codes that the kernel must read, ascending."""
        return tuple(sorted({code for layer in self.layers for code in (layer.layout_in, layer.layout_rec)}))


def lay_out(shape: LayerShape, tiles: int, samples: int, warps: int, chip: Chip) -> LayerPlan | None:
    """Place a layer with `tiles` tiles and `samples` samples per block, with as many weights in shared memory as fit.

    None if shared memory cannot even hold the event lists and drives.
    """
    segments = shape.segments
    capacity = segments * tables.SEGMENT + tables.LIST_PAD
    gates, units = shape.gates, 4 * LANES * samples * tiles
    sizes = {
        # The single-stream kernel has a list of the layer's own events and one of its input's.
        tables.AT_LIST: 8 * capacity * (samples + (samples == 1 and shape.w_in is not None)),
        tables.AT_COUNTS: 4 * samples,
        tables.AT_STAGED: 4 * samples * segments * tables.SEGMENT,
        tables.AT_SEGMENT_COUNTS: max(256, 4 * samples * segments),
        tables.AT_BASES: 2 * 4 * gates * tiles,
        tables.AT_HITS: tables.HIT_BUFFER_BYTES * warps,
        tables.AT_SUMS_IN: 2 * gates * units,
        tables.AT_SUMS_REC: gates * units,
        tables.AT_CELLS: units,
        tables.AT_Y: units,
        tables.AT_THRESHOLD: 4 * LANES * tiles,
        tables.AT_BIAS: 2 * 4 * gates * LANES * tiles,
    }
    offsets, at = {tables.CAPACITY: capacity}, 0

    def place(field: int, size: int) -> None:
        nonlocal at
        offsets[field], at = at, at + -(-size // 16) * 16

    for field, size in sizes.items():
        place(field, size)
    if at > chip.shared_bytes:
        return None
    layouts = {}
    # Recurrent weights are placed first, because the next step waits for their product.
    for name, strips, fields in (
        ("rec", shape.w_rec, (tables.AT_VALUES_REC, tables.AT_TABLE_REC)),
        ("in", shape.w_in, (tables.AT_VALUES_IN, tables.AT_TABLE_IN)),
    ):
        layouts[name] = 0
        offsets |= dict.fromkeys(fields, 0)
        if strips is None:
            continue
        needed = strips.tile_bytes(tiles)
        resident = at + sum(needed) <= chip.shared_bytes
        if resident:
            for field, size in zip(fields, needed, strict=True):
                place(field, size)
        layouts[name] = tables.layout_code(strips.kind, strips.values.dtype == np.uint16, resident)
    if shape.w_in is None:
        layouts["in"] = layouts["rec"]
    return LayerPlan(tiles, layouts["in"], layouts["rec"], at, offsets)


def plan(shapes: Sequence[LayerShape], batch: int, chip: Chip) -> Plan:
    """The plan of a launch of these layers: of the samples per group and tiles per block, those of the least cost.

    `blocks` serves the first `groups * samples` samples; `blocks_from` gives the tables of further launches. Raises
    ValueError for layers that are too wide for the shared memory.
    """
    share = chip.multiprocessors // len(shapes)
    best = None
    for samples in _sample_counts(batch):
        for spread in range(share, 0, -1):
            tiles = [-(-shape.tiles // spread) for shape in shapes]
            blocks = sum(-(-shape.tiles // t) for shape, t in zip(shapes, tiles, strict=True))
            groups = min(chip.multiprocessors // blocks, -(-batch // samples))
            if groups * samples < batch and not (spread == 1 and samples == _sample_counts(batch)[-1]):
                # With fewer blocks per group, more groups fit.
                continue
            warps = _warps(shapes, samples, max(tiles))
            placed = [lay_out(shape, t, samples, warps, chip) for shape, t in zip(shapes, tiles, strict=True)]
            if None in placed:
                continue
            layers = [each for each in placed if each is not None]
            cost = _cost(shapes, layers, samples) * -(-batch // (groups * samples))
            if best is None or cost < best[0]:
                best = cost, samples, groups, warps, layers
            break
    if best is None:
        return _smallest(shapes, batch, chip)
    _, samples, groups, warps, layers = best
    return _table(shapes, layers, samples, groups, warps)


def _sample_counts(batch: int) -> list[int]:
    """The numbers of samples per group to try, ascending."""
    counts = [1, 2, 3, 4, 6, 8, 12, 16]
    return [s for s in counts if s < batch] + [min(batch, counts[-1])] if batch > 1 else [1]


def _cost(shapes: Sequence[LayerShape], layers: Sequence[LayerPlan], samples: int) -> float:
    """Relative time of a step: exchange of events, event lists, then the strips of each warp one after the other.

    A strip whose weights are read from L2 counts three times as much as one in shared memory.
    """
    slowest = 0.0
    for shape, layer in zip(shapes, layers, strict=True):
        strips = shape.gates * layer.tiles * samples
        rounds = -(-strips // MAX_WARPS)
        far = 1.0 if layer.layout_rec & tables.RESIDENT else 3.0
        lists = samples * -(-shape.units // tables.SEGMENT) / MAX_WARPS
        slowest = max(slowest, 1.0 + 0.3 * far * rounds + 0.3 * lists)
    return slowest


def _smallest(shapes: Sequence[LayerShape], batch: int, chip: Chip) -> Plan:
    """The plan that needs the least shared memory: one sample per group, and as few tiles per block as possible."""
    share = chip.multiprocessors // len(shapes)
    tiles = [-(-shape.tiles // share) for shape in shapes]
    warps = _warps(shapes, 1, max(tiles))
    placed = [lay_out(shape, t, 1, warps, chip) for shape, t in zip(shapes, tiles, strict=True)]
    for shape, layer in zip(shapes, placed, strict=True):
        if layer is None:
            raise ValueError(
                f"cuda: a layer of {shape.units} units over {shape.inputs} inputs needs more shared memory than the "
                f"{chip.shared_bytes:,} bytes of a block; use backend='cpu'"
            )
    layers = [each for each in placed if each is not None]
    blocks = sum(layer.blocks(shape) for shape, layer in zip(shapes, layers, strict=True))
    return _table(shapes, layers, 1, min(batch, max(1, chip.multiprocessors // blocks)), warps)


def _warps(shapes: Sequence[LayerShape], samples: int, tiles: int) -> int:
    """Warps per block: one per segment for a single stream, else one per strip or segment, at most MAX_WARPS."""
    segments, gates = max(shape.segments for shape in shapes), shapes[0].gates
    if samples == tiles == 1 and segments <= MAX_SINGLE_SEGMENTS:
        wanted = segments
    else:
        wanted = min(MAX_WARPS, max(gates * samples * tiles, samples * segments))
    return next(warps for warps in WARPS if warps >= wanted)


def _table(shapes: Sequence[LayerShape], layers: Sequence[LayerPlan], samples: int, groups: int, warps: int) -> Plan:
    """The plan with its block table: group by group, layer by layer, from the first tile to the last."""
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
    return Plan(tuple(layers), samples, groups, warps, shared, max(shape.segments for shape in shapes), np.array(rows))


def blocks_from(plan: Plan, first: int, batch: int) -> np.ndarray:
    """The block table of a plan for the samples from `first` on; blocks without a sample are left out."""
    rows = plan.blocks.copy()
    rows[:, tables.SAMPLE] += first
    rows = rows[rows[:, tables.SAMPLE] < batch]
    rows[:, tables.SAMPLES] = np.minimum(rows[:, tables.SAMPLES], batch - rows[:, tables.SAMPLE])
    return rows


# --- launches -----------------------------------------------------------------------------------------------


def launches_of(kinds: Sequence[tuple[str, str]], max_layers: int, alone: tuple[int, ...] = ()) -> list[range]:
    """Neighbouring layers that run in one launch: at most `max_layers`, all of one kind.

    kinds : per layer, the name and the variant of its cell
    alone : layers that are launched alone

    The layers above follow in the next launch and read their input from the event log.
    """
    launches: list[range] = []
    for k, kind in enumerate(kinds):
        last = launches[-1] if launches else None
        split = k in alone or k - 1 in alone
        if last is not None and not split and len(last) < max_layers and kinds[last.start] == kind:
            launches[-1] = range(last.start, k + 1)
        else:
            launches.append(range(k, k + 1))
    return launches


def roles_of(layers: range, each: Plan) -> list[tuple[int, bool]]:
    """The layers of a launch, in the order of its plan, and whether they are in the role INPUT.

    In a cluster plan every layer but the first of the network has two roles: INPUT, then RECURRENT.
    """
    return [(k, is_input) for k in layers for is_input in (True, False) if not is_input or (k and each.cluster)]
