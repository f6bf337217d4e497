"""Recurrent weights as tiles for tensor cores, and how the blocks of a cluster share them. Plain NumPy, no CUDA.

`kernels/tensor_core_cluster.py` describes tiles, steps and fragments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from eventrnn.cuda.cluster_plan import tile_bounds
from eventrnn.cuda.kernels.tensor_core_cluster import BLOCK_FIELDS
from eventrnn.cuda.kernels.tensor_core_pieces import ROW_BYTES, SAMPLES, STEP_BYTES, TILE, UNITS_BYTES
from eventrnn.cuda.plan import Chip
from eventrnn.cuda.tables import LANES

# Rows of y side by side in the banks of shared memory.
BANKS = 128 // ROW_BYTES

# Blocks per cluster, and pairs of samples per cluster, that a plan may choose.
CLUSTER_SIZES = (16, 12, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1)
PAIRS = (1, 2, SAMPLES // 2)

# Registers of a multiprocessor, those that a thread can have, and by pairs of samples per thread in the cell update,
# those that it needs without weights.
REGISTERS, MAX_REGISTERS, OWN_REGISTERS = 65536, 248, {1: 68, 2: 92}

# Threads per block, at most, and warps per block up to which every tile has a warp of its own, by pairs of samples per
# thread: fewer warps have more registers each.
MAX_THREADS, TILE_WARPS = 1024, {1: 16, 2: 12}

# Tiles of a warp that are held in registers, at most.
MAX_HELD_TILES = 2

# Warps of a team, whose outputs are copied together. A block of MAX_THREADS may have 15 teams, one per barrier.
SENDERS = 4

# Cycles on an H200: latencies of a step, the copies of a pair of outputs of one unit to all blocks of a cluster, the
# laying out of the outputs of a unit, and what a step of a tile reads from shared memory, rows of y and weights.
EXCHANGE, STORE, LAY_OUT, LOAD_ROWS, LOAD_WEIGHTS = 1000, 0.25, 0.1, 2.5, 4

# Cycles of one multiprocessor for the input products of one cluster: their inputs, and each step of a tile.
INPUT_GROUP, INPUT_STEP = 2500, 6

# Share of the multiprocessors from which input products are computed side by side with the time loop.
SPARE = 1 / 4

# Clusters that run one after the other on the same multiprocessors, at most. With more streams, a product of cuBLAS per
# step is taken to be faster. This limit was not measured.
MAX_WAVES = 4


@dataclass(frozen=True)
class Tiles:
    """The tiles of a matrix of three gates.

    words  : (n_pre, 3 * units) uint16, the weights rounded to the type of the products
    begins : (tiles + 1,) int64, where the rows of a tile begin in `rows`, in steps of TILE rows
    rows   : (steps, TILE) int64, presynaptic units; n_pre stands for none
    """

    words: np.ndarray
    begins: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, words: np.ndarray, even: bool = False) -> Tiles:
        """The tiles of a matrix of rounded weights, (n_pre, 3 * units) uint16.

        even : give every tile an even number of steps
        """
        units, columns = words.shape
        tiles = -(-columns // TILE)
        # A negative zero is a zero.
        kept = np.zeros((units, tiles * TILE), bool)
        kept[:, :columns] = (words & 0x7FFF) != 0
        reached = kept.reshape(units, tiles, TILE).any(axis=2).T
        counts = reached.sum(axis=1)
        steps = -(-counts // TILE)
        begins = np.concatenate([[0], np.cumsum(steps + (steps % 2 if even else 0))])
        rows = np.full(begins[-1] * TILE, units, np.int64)
        tile, unit = np.nonzero(reached)
        # Eight lanes load eight rows of 16 bytes at a time, without a conflict if the rows lie in different banks. So
        # the first unit of each group of banks comes first, then the second one of each, and so on.
        bank = tile * BANKS + unit % BANKS
        by_bank = np.argsort(bank, kind="stable")
        places = np.bincount(bank, minlength=tiles * BANKS)
        turn = np.empty(len(tile), np.int64)
        turn[by_bank] = np.arange(len(tile)) - np.repeat(np.cumsum(places) - places, places)
        order = np.lexsort((unit % BANKS, turn, tile))
        within = np.arange(len(tile)) - np.repeat(np.cumsum(counts) - counts, counts)
        rows[begins[tile] * TILE + within] = unit[order]
        return cls(words, begins, rows.reshape(-1, TILE))

    @property
    def n_pre(self) -> int:
        """Presynaptic units."""
        return len(self.words)

    @property
    def units(self) -> int:
        """Units of the layer."""
        return self.words.shape[1] // 3

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.begins) - 1

    @cached_property
    def fragments(self) -> np.ndarray:
        """(steps, LANES, 4) int32: the weights of each step as the operand `a` of `tensor_core_ptx.MULTIPLY`."""
        units, columns = self.words.shape
        padded = np.zeros((units + 1, -(-columns // TILE) * TILE), np.uint16)
        padded[:units, :columns] = self.words
        tile = np.repeat(np.arange(len(self.begins) - 1), np.diff(self.begins))
        return fragments_of(padded, self.rows, TILE * tile[:, None] + np.arange(TILE))


def fragments_of(words: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(..., LANES, 4) int32: weights as operands `a` of `tensor_core_ptx.MULTIPLY`.

    words : (n_pre, n) uint16, the rounded weights; rows, columns : (..., TILE), those of each operand
    """
    lane, word, half = np.ogrid[:LANES, :4, :2]
    column = lane // 4 + 8 * (word & 1)
    row = 2 * (lane % 4) + 8 * (word >> 1) + half
    # Lane, word, half: the weight of one presynaptic unit in one column.
    chosen = words[rows[..., row], columns[..., column]]
    return np.ascontiguousarray(chosen).view(np.int32)[..., 0]


@dataclass(frozen=True)
class TilePlan:
    """How clusters run the tiles of a layer.

    blocks     : blocks per cluster
    pairs      : pairs of samples per cluster
    own_pairs  : pairs of samples per thread in the cell update
    threads    : threads per block
    held       : steps of a held tile that are held in registers, an even number
    held_tiles : tiles of a warp that are held
    shared     : bytes of shared memory per block
    senders    : warps whose outputs are copied together
    """

    blocks: int
    pairs: int
    own_pairs: int
    threads: int
    held: int
    held_tiles: int
    shared: int
    senders: int

    @property
    def warps(self) -> int:
        """The number of warps per block."""
        return self.threads // LANES

    @property
    def first_tiles(self) -> int:
        """The tiles of a block that are held."""
        return self.held_tiles * self.warps

    def clusters(self, batch: int) -> int:
        """The number of clusters for so many samples."""
        return -(-batch // (2 * self.pairs))


@dataclass(frozen=True)
class Share:
    """What a block of a cluster computes: some units, and per gate the tiles with a column of theirs."""

    first: int
    count: int
    tiles: tuple[range, ...]


def shares(units: int, blocks: int) -> list[Share]:
    """The shares of the blocks of a cluster. Units are divided by whole tiles of the first gate."""
    bounds = np.minimum(TILE * tile_bounds(-(-units // TILE), blocks), units)
    found = []
    for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        columns = [(gate * units + first, gate * units + end) for gate in range(3)]
        tiles = tuple(range(a // TILE, -(-b // TILE)) for a, b in columns)
        found.append(Share(first, end - first, tiles))
    return found


def lengths_of(tiles: Tiles, share: Share) -> np.ndarray:
    """The steps of each tile of a block."""
    return np.concatenate([np.diff(tiles.begins[t.start : t.stop + 1]) for t in share.tiles])


def order_of(lengths: np.ndarray, held: int, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The tiles of a block from the longest to the shortest, and how many steps of each are not held in registers.

    first : the number of tiles of which `held` steps are held
    """
    order = np.argsort(-lengths, kind="stable")
    kept = np.where(np.arange(len(order)) < first, held, 0)
    return order, np.maximum(lengths[order] - kept, 0)


def layout(tiles: Tiles, blocks: int, pairs: int, held: int, first: int) -> tuple[dict[str, int], int]:
    """Offsets of the arrays in shared memory, the same for all blocks of a cluster, and the bytes of all of them."""
    most = steps = 0
    for share in shares(tiles.units, blocks):
        lengths = lengths_of(tiles, share)
        most, steps = max(most, len(lengths)), max(steps, int(order_of(lengths, held, first)[1].sum()))
    # With SAMPLES samples y has two parts itself.
    whole, row = 2 * pairs == SAMPLES, ROW_BYTES * (tiles.units + 1)
    sizes = {
        "barriers": 16,
        "y": 2 * row if whole else row,
        "parts": 0 if whole else 2 * whole_words(4 * pairs * tiles.units),
        "tiles": 16 * most,
        "values": STEP_BYTES * steps,
        "units": UNITS_BYTES * (steps + 1),
        "sums": 8 * pairs * TILE * most,
    }
    offsets, at = {}, 0
    for name, size in sizes.items():
        offsets[name] = at
        at += whole_words(size)
    if whole:
        offsets["parts"] = offsets["y"]
    return offsets, at


def whole_words(size: int) -> int:
    """Bytes, rounded up to a multiple of 16."""
    return -(-size // 16) * 16


def tile_plan(tiles: Tiles, blocks: int, pairs: int, own_pairs: int = 1) -> TilePlan | None:
    """The plan with clusters of this size and so many pairs of samples, per cluster and per thread; None if a block has
    too few or many units."""
    each = shares(tiles.units, blocks)
    # The phases of the kernel's barriers count on it that every block waits for all others.
    if min(share.count for share in each) == 0:
        return None
    cell_warps = -(-max(share.count for share in each) * pairs // own_pairs // LANES)
    longest = max(int(lengths_of(tiles, share).max(initial=0)) for share in each)
    most = max(sum(map(len, share.tiles)) for share in each)
    warps = max(cell_warps, min(most, TILE_WARPS[own_pairs]))
    if LANES * warps > MAX_THREADS:
        return None
    # Registers are given to four warps at a time, eight per thread.
    registers = min(MAX_REGISTERS, REGISTERS // (4 * LANES * -(-warps // 4)) // 8 * 8)
    # A step that is held has four words of weights, and half a word for its rows.
    room = max(0, (registers - OWN_REGISTERS[own_pairs]) * 2 // 9)
    even = longest + longest % 2
    options = [
        (min(even, room // count // 2 * 2), count) for count in range(1, min(-(-most // warps), MAX_HELD_TILES) + 1)
    ]
    held, held_tiles = max(options, key=lambda each: each[0] * each[1])
    shared = layout(tiles, blocks, pairs, held, held_tiles * warps)[1]
    return TilePlan(blocks, pairs, own_pairs, LANES * warps, held, held_tiles, shared, SENDERS)


def plan_tiles(tiles: Tiles, input_steps: int, batch: int, chip: Chip) -> TilePlan | None:
    """The plan with the least expected time, or None where no block holds its share or the waves would be too many.

    tiles, input_steps : the recurrent weights, and the steps of all tiles of the input weights
    """
    found = []
    for blocks, pairs, own_pairs in product(CLUSTER_SIZES, PAIRS, OWN_REGISTERS):
        resident = chip.clusters.get(blocks, 0) if own_pairs <= pairs else 0
        plan = tile_plan(tiles, blocks, pairs, own_pairs) if resident else None
        if plan is None or plan.shared > chip.shared_bytes:
            continue
        clusters = plan.clusters(batch)
        waves = -(-clusters // resident)
        if waves > MAX_WAVES:
            continue
        cycles, of_inputs = waves * _cycles(tiles, plan), clusters * (INPUT_GROUP + INPUT_STEP * input_steps)
        spare = spare_multiprocessors(plan, batch, chip.multiprocessors)
        cycles = max(cycles, of_inputs / spare) if spare else cycles + of_inputs / chip.multiprocessors
        found.append((cycles, clusters * blocks, plan))
    return min(found, key=lambda each: each[:2])[2] if found else None


def spare_multiprocessors(plan: TilePlan, batch: int, multiprocessors: int) -> int:
    """The multiprocessors that compute input products side by side with the time loop; 0 if they are too few."""
    spare = multiprocessors - plan.clusters(batch) * plan.blocks
    return spare if spare >= SPARE * multiprocessors else 0


def _cycles(tiles: Tiles, plan: TilePlan) -> float:
    """The expected cycles of a step."""
    products = 0
    for share in shares(tiles.units, plan.blocks):
        lengths = lengths_of(tiles, share)
        others = order_of(lengths, plan.held, plan.first_tiles)[1]
        # A shorter tile that is held is padded.
        rows = plan.held * min(plan.first_tiles, len(lengths)) + others.sum()
        products = max(products, LOAD_ROWS * rows + LOAD_WEIGHTS * others.sum())
    outputs = tiles.units * (STORE * plan.pairs + (0 if 2 * plan.pairs == SAMPLES else LAY_OUT))
    return EXCHANGE + outputs + products


def team_table(share: Share, plan: TilePlan) -> np.ndarray:
    """The team of each warp of a block, (warps, 4) int32: see `teams` in `kernels/tensor_core_cluster.py`."""
    warp = np.arange(plan.warps)
    team = warp // plan.senders
    per_unit = plan.pairs // plan.own_pairs
    units = LANES * plan.senders // per_unit
    count = np.clip(share.count - units * team, 0, units)
    row = 4 * plan.pairs
    offsets = row * np.minimum(share.first + units * team, share.first + share.count)
    threads = LANES * -(-count * per_unit // LANES)
    threads = np.where(LANES * (warp % plan.senders) < threads, threads, 0)
    # Only the last units of a layer may need padding.
    sizes = -(-row * count // 16) * 16
    return np.stack([offsets, sizes, threads, 1 + team], axis=1).astype(np.int32)


def block_table(tiles: Tiles, plan: TilePlan, addresses: Callable[[np.ndarray], int]) -> np.ndarray:
    """The table of the blocks of a cluster, (blocks, BLOCK_FIELDS) int64.

    addresses : puts an array on the device and gives its address
    """
    offsets, _ = layout(tiles, plan.blocks, plan.pairs, plan.held, plan.first_tiles)
    rows = tiles.rows.astype(np.uint16)
    table = np.zeros((plan.blocks, BLOCK_FIELDS), np.int64)
    each = shares(tiles.units, plan.blocks)
    sent = [whole_words(4 * plan.pairs * share.count) for share in each]
    for line, share, own in zip(table, each, sent, strict=True):
        lengths, shifts, slot = lengths_of(tiles, share), [], 0
        begins = np.concatenate([tiles.begins[t.start : t.stop] for t in share.tiles])
        for gate, owned in enumerate(share.tiles):
            shifts.append(TILE * (slot - owned.start) + gate * tiles.units + share.first)
            slot += len(owned)
        order, others = order_of(lengths, plan.held, plan.first_tiles)
        ends = (begins + lengths)[order]
        held, held_rows = _held(tiles, begins[order], lengths[order], plan)
        steps = np.concatenate([np.arange(end - left, end) for end, left in zip(ends, others, strict=True)] or [[]])
        steps = steps.astype(np.int64)
        entries = np.zeros((slot, 4), np.int32)
        entries[:, 0], entries[:, 1], entries[:, 2] = order, np.cumsum(others) - others, others
        teams = team_table(share, plan)
        arrays = held, held_rows, teams, entries, tiles.fragments[steps], rows[steps]
        at = (offsets[name] for name in ("y", "parts", "tiles", "values", "units", "sums"))
        counts = slot, len(steps), len(np.unique(teams[teams[:, 2] > 0, 3]))
        line[:] = share.first, share.count, *counts, *shifts, *map(addresses, arrays), sum(sent) - own, *at
    return table


def _held(tiles: Tiles, begins: np.ndarray, lengths: np.ndarray, plan: TilePlan) -> tuple[np.ndarray, np.ndarray]:
    """The first `held` steps of the held tiles, padded by steps without weights: weights and rows.

    Returns (warps, held tiles * held, LANES, 4) int32 and (warps, held tiles * held / 2, LANES) int32; arrays that
    nothing reads if nothing is held.
    """
    shape = plan.warps, max(1, plan.held_tiles), max(2, plan.held), LANES
    words = np.zeros((*shape, 4), np.int32)
    rows = np.full((*shape[:3], TILE), tiles.n_pre)
    first = begins[: plan.first_tiles]
    for k, (begin, length) in enumerate(zip(first, np.minimum(lengths[: len(first)], plan.held), strict=True)):
        # A warp has every `warps`-th tile.
        turn, warp = divmod(k, plan.warps)
        words[warp, turn, :length] = tiles.fragments[begin : begin + length]
        rows[warp, turn, :length] = tiles.rows[begin : begin + length]
    return words, (ROW_BYTES * rows).astype(np.int32).reshape(plan.warps, -1, LANES)
