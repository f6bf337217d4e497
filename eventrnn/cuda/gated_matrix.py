"""One matrix of gated blocks on the GPU: its layouts, and its products with independent rows of events."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.kernels.gated_kernels import gated_rows_kernel
from eventrnn.cuda.kernels.gated_pieces import PIECES_AHEAD, TURN
from eventrnn.cuda.packing import in_strips
from eventrnn.cuda.row_tiles import MIN_TILED_ROWS, GatedTiles, Scratch
from eventrnn.cuda.tables import (
    CHOICE_WORDS,
    FACTOR_COLUMNS,
    LANES,
    MAX_SAMPLES,
    PIECE,
    RATIO_PAD,
    ROW_GROUP,
    ROWS_STAGE_BYTES,
    SEGMENT,
    STAGES,
    TAIL_BYTES,
)
from eventrnn.weights import Dense, GatedBlocks, convert
from eventrnn.weights.gated import rows_of_part

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device


# Warps of a block that the kernels may have; few, because each number needs a kernel of its own. A row of outputs is
# waited for at once by one thread per four units. More threads would leave fewer registers to those that multiply.
WARPS = (8, 12, 16, 32)

# Blocks of weights per thread, at most, where a block of threads can have more threads.
LOGITS_PER_THREAD = 4

# Warps that receive parts in pairs, at most: each pair has one of the 15 barriers that a block has beside its own.
MAX_PAIRED = 30

# Rows of independent inputs from which one block takes a further row at a time.
ROWS_PER_SAMPLE = 32

# Rows of a block of dense weights.
DENSE_BLOCK_ROWS = 128, 64, 32

# Warps that multiply, at least, where a block has several rows of inputs at a time and as many strips.
MIN_WORKERS = 6


@dataclass(frozen=True)
class RowStrips:
    """A matrix in strips of neighbouring columns; the rows of stored blocks only, padded to whole groups.

    Attributes
    ----------
    values  : (stored,) float32, or uint16 bits of bfloat16: by strip, group of rows, column, and row of the group. A
              group has as many rows as 16 bytes have numbers
    offsets : (strips, block rows) int64, where the rows of a block row begin in `values`; -1 where the strip has no
              stored block in it
    width   : columns of a strip
    span    : neighbouring units that a strip does not cross; strips are counted from the first one of each span
    """

    values: np.ndarray
    offsets: np.ndarray
    width: int
    span: int

    def stage_rows(self, stage_bytes: int) -> int:
        """Rows that are copied to shared memory at a time: as many as a stage holds, in whole groups of eight."""
        return stage_bytes // (self.width * self.values.itemsize) // 8 * 8

    @classmethod
    def of_factor(cls, factor: np.ndarray, width: int) -> RowStrips:
        """A factor of a gate, (n, columns) float32, all rows of which are one block row; n is a multiple of 8."""
        strips = in_strips(factor, 1, width)
        starts = np.arange(len(strips), dtype=np.int64) * (factor.shape[0] * width)
        return cls(_grouped(strips.reshape(-1, width)), starts[:, None].copy(), width, factor.shape[1])

    @classmethod
    def of_blocks(cls, weights: GatedBlocks, gates: int, width: int, span: int | None = None) -> RowStrips:
        """The blocks of a matrix (n_pre, gates * units), in strips of one gate each. O(n_pre * gates * units).

        span : a divisor of the units, or None for all of them
        """
        span = weights.shape[1] // gates if span is None else span

        def strips(matrix: np.ndarray) -> np.ndarray:
            return in_strips(_spread(matrix, span, width), gates, width)

        values, (r, c) = dense_values(weights), weights.block
        block_rows, block_columns = weights.grid
        stored = np.zeros((block_rows, block_columns), bool)
        stored[np.repeat(np.arange(block_rows), np.diff(weights.indptr)), weights.indices] = True
        wanted = strips(stored[:, np.arange(weights.shape[1]) // c]).any(axis=2)
        rows = _rounded(np.minimum(r, weights.shape[0] - r * np.arange(block_rows)), ROW_GROUP)
        sizes = np.where(wanted, rows * width, 0).ravel()
        offsets = np.where(wanted, (np.cumsum(sizes) - sizes).reshape(wanted.shape), -1)
        kept = np.repeat(wanted, rows, axis=1)
        return cls(_grouped(strips(padded_rows(values, r))[kept]), offsets.astype(np.int64), width, span)


@dataclass(frozen=True)
class Owned:
    """What a block of threads owns of a layer.

    Attributes
    ----------
    tiles, gates, width : its tiles of units, strips per tile, and units per tile
    span                : see `RowStrips`
    logits, logit_width : its strips of logits, and logits per strip
    """

    tiles: int
    gates: int
    width: int
    span: int
    logits: int
    logit_width: int


class GatedMatrix:
    """Gated blocks (n_pre, gates * units) and biases (gates * units,). Layouts are packed and copied at first use.

    Attributes
    ----------
    device  : the GPU
    weights : the blocks on the host
    gates   : gate rows of a unit for the matrices of a layer, 1 for a read-out
    number  : of the matrix in the network, for the status word
    chooses : whether steps choose blocks; if not, all gates are 1
    """

    sparse = False

    def __init__(self, device: Device, weights: GatedBlocks, bias: np.ndarray, gates: int, number: int):
        self.device, self.weights, self.gates, self.number = device, weights, gates, number
        self.host_bias, self.chooses = bias, True
        self._kept: list[Any] = []
        self._places: dict[int, tuple[Any, int, int]] = {}

    @classmethod
    def of_dense(cls, device: Device, weights: Dense, bias: np.ndarray, gates: int, number: int) -> GatedMatrix:
        """Dense weights as blocks whose gates are 1. Rows of zeros are added, so that all block rows have as many."""
        values, (rows, columns) = weights.to_dense(), weights.shape
        r = next((r for r in DENSE_BLOCK_ROWS if r <= rows), rows)
        padded = np.zeros((_rounded(rows, r), columns), np.float32)
        padded[:rows] = values
        # int8 is decoded, as elsewhere on a GPU.
        stored = convert(padded, "dense", storage="bfloat16" if weights.storage == "bfloat16" else "float32")
        blocks = padded.shape[0] // r
        gate = {"gate": np.zeros((len(padded), blocks), np.float32), "gate_bias": np.zeros(blocks, np.float32)}
        with warnings.catch_warnings():
            # This gate is never computed.
            warnings.simplefilter("ignore", UserWarning)
            matrix = cls(
                device, GatedBlocks.from_weights(stored, block=(r, columns), density=1.0, **gate), bias, gates, number
            )
        matrix.chooses = False
        return matrix

    @property
    def narrow(self) -> bool:
        """Whether values are stored as bfloat16."""
        return self.weights.storage == "bfloat16"

    @property
    def rank(self) -> int:
        """Of a gate with two factors; 0 for one factor."""
        return 0 if self.weights.gate_out is None else len(self.weights.gate_out)

    @property
    def part_rows(self) -> int:
        """Rows of a part of a logit, with the padding of its block rows."""
        r = self.weights.block[0]
        return rows_of_part(r) // r * _rounded(r, ROW_GROUP)

    @property
    def product_description(self) -> str:
        """For `Simulation.paths`; "dense strips" are the dense weights of a layer that has a time loop of its own."""
        return f"{'gated' if self.chooses else 'dense strips'} {'bfloat16' if self.narrow else 'float32'} in L2"

    def _put(self, array: np.ndarray) -> int:
        """The address of a copy on the GPU, which lives as long as the matrix."""
        with self.device.on_stream():
            self._kept.append(self.device.put(array))
        return self._kept[-1].data.ptr

    def _sizes(self) -> dict[int, int]:
        """The columns of a table of the matrix that say nothing of strips: sizes, options, and addresses of biases."""
        weights = self.weights
        return {
            tables.N_PRE: weights.shape[0],
            tables.N_POST: weights.shape[1],
            tables.GRID_ROWS: weights.grid[0],
            tables.GRID_COLUMNS: weights.grid[1],
            tables.ROWS_OF_BLOCK: weights.block[0],
            tables.COLUMNS_OF_BLOCK: weights.block[1],
            tables.PADDED_ROWS: _rounded(weights.block[0], ROW_GROUP),
            tables.ALL_BLOCKS: weights.n_blocks,
            tables.KEPT_BLOCKS: weights.kept_blocks,
            tables.SOFTMAX: weights.gate_rule == "softmax",
            tables.PERIOD: weights.gate_period if self.chooses else 0,
            tables.BIAS: self._put(self.host_bias),
            tables.RANK: self.rank,
            tables.LOGIT_BIAS: self._put(weights.gate_bias),
            tables.PART_ROWS: self.part_rows,
            tables.NUMBER: self.number,
        }

    def table(self, strips: RowStrips, logit_width: int, stage_bytes: int) -> tuple[Any, tuple[int, int]]:
        """The table of the matrix on the GPU, and the numbers of strips of its logits and of its inner factor.

        strips      : the blocks, in any strips
        logit_width : logits per strip
        stage_bytes : bytes of weights that a warp copies at a time
        """
        weights, fields = self.weights, np.zeros(tables.GATED_FIELDS, np.int64)
        # The first factor has the rows of the inputs, padded as those.
        gate = out = padded_rows(weights.gate, weights.block[0])
        inner = None
        if weights.gate_out is not None:
            # Few columns are padded to as many as the logits of `kernels/gated_factors.py` take.
            columns = max(self.rank, FACTOR_COLUMNS)
            inner = RowStrips.of_factor(gate, min(LANES, columns))
            out = np.zeros((_rounded(columns, ROW_GROUP), weights.n_blocks), np.float32)
            out[: self.rank] = weights.gate_out
        logits = RowStrips.of_factor(out, logit_width)

        def place(values: int, each: RowStrips) -> None:
            stage_rows = each.stage_rows(stage_bytes)
            packed = self._put(each.values), self._put(each.offsets), each.width, stage_rows, len(each.offsets)
            fields[values : values + len(packed)] = packed

        place(tables.BLOCK_VALUES, strips)
        place(tables.LOGIT_VALUES, logits)
        if inner is not None:
            place(tables.INNER_VALUES, inner)
        rest = self._sizes() | {tables.PADDED_PRE: len(gate), tables.BLOCK_SPAN: strips.span}
        for field, value in rest.items():
            fields[field] = value
        with self.device.on_stream():
            table = self.device.put(fields)
        return table, (len(logits.offsets), 0 if inner is None else len(inner.offsets))

    @property
    def warps(self) -> int:
        """Warps of a block of the kernels: one thread per four inputs, and few blocks of weights per thread."""
        threads = max(self.weights.shape[0] // 4, self.weights.n_blocks // LOGITS_PER_THREAD)
        return next((warps for warps in WARPS if LANES * warps >= threads), WARPS[-1])

    @property
    def chooses_alone(self) -> bool:
        """Whether a block of a layer may compute all logits of one sample by itself: those of a gate of two factors,
        where a warp receives whole parts of the sums, and a thread computes two logits at most."""
        whole = self.weights.block[0] % ROW_GROUP == 0 and SEGMENT % self.part_rows == 0 and self.warps <= MAX_PAIRED
        return whole and 0 < self.rank <= FACTOR_COLUMNS and self.weights.n_blocks <= 2 * LANES * self.warps

    def _choice_bytes(self, samples: int) -> dict[int, int]:
        """The bytes of what a choice needs in shared memory, by column of the table of places."""
        blocks = self.weights.n_blocks
        return {
            tables.AT_GATES: 4 * samples * _rounded(blocks, 4),
            tables.AT_KEYS: 4 * blocks,
            tables.AT_RATIOS: 4 * (self.weights.kept_blocks + RATIO_PAD),
            tables.AT_WORDS: 4 * (CHOICE_WORDS + 2 * LANES * self.warps),
            tables.AT_MAXIMA: 4 * LANES * samples,
        }

    def places(
        self,
        samples: int,
        offsets: int,
        items: int,
        stage_bytes: int,
        owned: Owned | None = None,
        alone: bool = False,
    ) -> tuple[np.ndarray, int]:
        """The table of shared memory (tables.PLACE_FIELDS,) of a kernel, and its bytes.

        samples : rows of inputs in shared memory
        offsets : offsets of strips
        items   : strips that warps can multiply at the same time. As many warps do as have room for a ring
        stage_bytes : see `table`
        owned   : what a block owns of a layer; None for independent rows. Weights of its logits, and then the first
                  block rows of its strips, are resident, as many as have room
        alone   : whether a block chooses alone (`chooses_alone`)
        """
        owned = Owned(0, 0, 0, 0, 0, 0) if owned is None else owned
        own_strips = owned.tiles * owned.gates
        blocks, (r, _) = self.weights.n_blocks, self.weights.block
        pitches = {
            tables.INPUT_PITCH_OF: int(_rounded(_rows_of(self.weights.shape[0], r), ROW_GROUP).sum()),
            tables.ACTIVE_PITCH: self.weights.grid[0],
            tables.INNER_PITCH: _rounded(self.rank, ROW_GROUP),
            tables.GATES_PITCH: _rounded(blocks, 4),
        }
        parts = -(-pitches[tables.INPUT_PITCH_OF] // self.part_rows)
        sizes = {
            tables.AT_INPUTS: 4 * samples * pitches[tables.INPUT_PITCH_OF],
            tables.AT_ACTIVE: 4 * samples * pitches[tables.ACTIVE_PITCH],
            tables.AT_INNER: 4 * samples * pitches[tables.INNER_PITCH],
            **self._choice_bytes(samples),
            tables.AT_DRIVES_IN: 4 * LANES * samples * own_strips,
            tables.AT_DRIVES_REC: 4 * LANES * samples * own_strips,
            tables.AT_STATE: 4 * LANES * samples * owned.tiles,
            tables.AT_OFFSETS: 8 * offsets,
            tables.AT_ONES: 16,
            tables.AT_TILES: 8 * owned.tiles,
            tables.AT_STARTS: 8 * LANES * own_strips,
            tables.AT_LOGIT_STARTS: 4 * LANES * owned.logits,
            tables.AT_HELD: 8 * samples,
        }
        table, at = np.zeros(tables.PLACE_FIELDS, np.int64), 0
        for field, size in sizes.items():
            table[field], at = at, at + _rounded(size, 16)
        table[tables.PARTS] = parts
        for field, pitch in pitches.items():
            table[field] = pitch
        # Beyond the last row of a stage, weights of up to 24 rows are read and not used: sums, and what follows them.
        ring_bytes, beyond = STAGES * stage_bytes + TAIL_BYTES, max(0, 3 * ROW_GROUP * LANES * 4 - TAIL_BYTES)
        room = (self.device.shared_bytes - at - beyond) // ring_bytes
        workers = max(1, min(room, self.warps, items))
        room = max(0, self.device.shared_bytes - at - beyond - workers * ring_bytes)
        logit_bytes = 0 if self.rank else 4 * owned.logits * owned.logit_width * pitches[tables.INPUT_PITCH_OF]
        # Threads compute parts of resident logits for one row of inputs only.
        part_bytes = 4 * LANES * owned.logits * parts if logit_bytes and samples == 1 else 0
        table[tables.AT_PARTS], table[tables.AT_LOGITS] = at, at + part_bytes
        table[tables.LOGITS_RESIDENT] = 0 < logit_bytes and logit_bytes + part_bytes <= room
        if alone:
            part_bytes, logit_bytes = 4 * LANES * parts, 4 * FACTOR_COLUMNS * pitches[tables.INPUT_PITCH_OF]
            table[tables.AT_LOGITS] = at + part_bytes
        if alone or table[tables.LOGITS_RESIDENT]:
            at, room = at + part_bytes + logit_bytes, room - part_bytes - logit_bytes
        block_bytes = own_strips * owned.width * _rounded(r, ROW_GROUP) * (2 if self.narrow else 4)
        resident = max(0, min(self.weights.grid[0], room // block_bytes)) if block_bytes else 0
        table[tables.AT_RESIDENT], table[tables.RESIDENT_ROWS] = at, resident
        at += resident * block_bytes
        table[tables.AT_RINGS], table[tables.WORKERS] = at, workers
        pieces = samples == 1 and self.has_pieces(owned, stage_bytes)
        table[tables.IN_PIECES] = pieces and own_strips <= workers < self.warps
        return table, at + workers * ring_bytes + beyond

    def has_pieces(self, owned: Owned, stage_bytes: int) -> bool:
        """Whether strips of one block column have whole pieces of blocks, of which a ring has room for some."""
        (r, c), (block_rows, block_columns), n_pre = self.weights.block, self.weights.grid, self.weights.shape[0]
        rows, units = min(r, PIECE), self.weights.shape[1] // self.gates
        # Each lane lists the pieces of a block row.
        whole = rows % TURN == 0 and r % rows == 0 and n_pre % r == 0 and block_rows * (r // rows) < LANES
        # Strips begin at multiples of their width, counted from the first unit of each span.
        one_block = block_columns == 1 or (
            units % c == 0 and (owned.span == c or (owned.width and c % owned.width == 0))
        )
        room = PIECES_AHEAD * rows * owned.width * (2 if self.narrow else 4) <= STAGES * stage_bytes
        return bool(whole and one_block and room)

    # --- products ---

    @cached_property
    def _row_strips(self) -> tuple[Any, int]:
        """The table of the matrix for `gated_rows_kernel`, and how many offsets it keeps in shared memory."""
        table, (logits, inner) = self.table(RowStrips.of_blocks(self.weights, 1, LANES), LANES, ROWS_STAGE_BYTES)
        return table, logits + inner

    def _row_places(self, rows: int) -> tuple[Any, int, int]:
        """For so many rows: the table of shared memory on the GPU, its bytes, and the rows of a block at a time."""
        samples = max(1, min(MAX_SAMPLES, rows // ROWS_PER_SAMPLE))
        while samples not in self._places:
            places, shared = self.places(samples, self._row_strips[1], self.warps, ROWS_STAGE_BYTES)
            if samples > 1 and places[tables.WORKERS] < min(self.warps, MIN_WORKERS):
                samples -= 1
                continue
            need_shared(self.weights, shared, self.device.shared_bytes)
            with self.device.on_stream():
                self._places[samples] = self.device.put(places), shared, samples
        return self._places[samples]

    @cached_property
    def _tiles(self) -> GatedTiles:
        """What multiplies many rows; its table of the matrix has no strips."""
        fields, sizes = np.zeros(tables.GATED_FIELDS, np.int64), self._sizes()
        fields[list(sizes)] = list(sizes.values())
        places, at = np.zeros(tables.PLACE_FIELDS, np.int64), 0
        for field, size in {tables.AT_INNER: 4 * self.rank, **self._choice_bytes(1)}.items():
            places[field], at = at, at + _rounded(size, 16)
        need_shared(self.weights, at, self.device.shared_bytes)
        values = dense_values(self.weights)
        return GatedTiles(self.device, self.weights, values, fields, (places, at), self.warps, self.part_rows)

    def products(
        self,
        device: Device,
        table,
        rows: int,
        row_of=None,
        out=None,
        status: Any = None,
        *,
        batch: int = 1,
        held: tuple[int, int, int, int] = (0, 0, 0, 0),
        scratch: Scratch | None = None,
    ):
        """Drives (rows, gates * units) float32 of independent rows of events; see `Matrix.products`.

        status      : the status words, which get gates that are not finite
        batch, held : rows of a step, and what `RunBuffers.hold` returns, where steps share a choice
        scratch     : memory of the run for products in tiles; without it there are none
        """
        columns = self.weights.shape[1]
        if out is None:
            out = device.empty((rows, columns), np.float32)
        if rows == 0:
            return out
        lists = *(each.data.ptr for each in table), 0 if row_of is None else row_of.data.ptr
        if scratch is not None and rows >= MIN_TILED_ROWS and GatedTiles.fits(self.weights):
            self._tiles.products(lists, rows, out, status, batch, held, scratch)
            return out
        matrix, (places, shared, samples) = self._row_strips[0], self._row_places(rows)
        warps, narrow = self.warps, self.narrow
        # Every block of a row chooses for itself, so that a row is divided only where there are few rows.
        sets = -(-rows // samples)
        splits = max(1, min(device.multiprocessors // sets, -(-columns // LANES)))
        groups = min(sets, max(1, device.multiprocessors // splits))
        kernel = device.kernel(("gated_rows", narrow), lambda: gated_rows_kernel(narrow), LANES * warps)
        arguments = matrix.data.ptr, places.data.ptr, *lists, rows, samples, splits, out.data.ptr, status.data.ptr
        device.launch(kernel, groups * splits, LANES * warps, *arguments, batch, *held, shared=shared)
        return out


def dense_values(weights: GatedBlocks) -> np.ndarray:
    """All weights (n_pre, columns) float32, or uint16 bits of bfloat16, without their gates."""
    values = weights.blocks.to_dense()
    return (values.view(np.uint32) >> 16).astype(np.uint16) if weights.storage == "bfloat16" else values


def need_shared(weights: GatedBlocks, needed: int, there: int) -> None:
    """Raise ValueError where a matrix needs more shared memory than a block has."""
    if needed > there:
        raise ValueError(
            f"cuda: gated blocks {weights.block[0]}x{weights.block[1]} of a matrix "
            f"{weights.shape[0]}x{weights.shape[1]} need {needed:,} bytes of shared memory, more than the {there:,} "
            "bytes of a block; choose larger blocks, or use backend='cpu'"
        )


def padded_rows(matrix: np.ndarray, r: int) -> np.ndarray:
    """A matrix (n, columns) with rows of zeros after every r rows and at the end, up to multiples of ROW_GROUP."""
    rows = _rows_of(len(matrix), r)
    starts = np.cumsum(_rounded(rows, ROW_GROUP)) - _rounded(rows, ROW_GROUP)
    padded = np.zeros((int(_rounded(rows, ROW_GROUP).sum()), matrix.shape[1]), matrix.dtype)
    padded[np.arange(len(matrix)) - r * np.repeat(np.arange(len(rows)), rows) + np.repeat(starts, rows)] = matrix
    return padded


def _spread(matrix: np.ndarray, span: int, width: int) -> np.ndarray:
    """A matrix (n, columns) with zeros after every `span` columns, up to a multiple of `width`."""
    n, columns = matrix.shape
    spread = np.zeros((n, columns // span, _rounded(span, width)), matrix.dtype)
    spread[:, :, :span] = matrix.reshape(n, columns // span, span)
    return spread.reshape(n, -1)


def _rows_of(n: int, r: int) -> np.ndarray:
    """The rows of each block row of n rows in blocks of r rows."""
    return np.minimum(r, n - r * np.arange(-(-n // r)))


def _grouped(rows: np.ndarray) -> np.ndarray:
    """Rows (n, width) in groups that a lane reads by 16 bytes; with zeros at the end, so that none has memory, too."""
    group = 16 // rows.itemsize
    values = rows.reshape(-1, group, rows.shape[1]).transpose(0, 2, 1).ravel()
    return np.concatenate([values, np.zeros(LANES, values.dtype)])


def _rounded(size: Any, multiple: int) -> Any:
    """A whole number, or an array of such, rounded up to a multiple."""
    return -(-size // multiple) * multiple
