"""Records and tables that the CPU engine hands to its kernels.

A record is a named tuple of arrays; Numba passes it to a kernel field by field, so that it costs no more than its
fields would as separate arguments. A table is an int64 array whose columns are named by the constants below. All arrays
are contiguous. Arrays with more than one axis are flat unless their axes are written (a, b): "(rows, units)" means one
array of two axes, "(rows * units,)" a flat one.

Symbols of the shapes: `n_threads` threads; `layers` layers; `units` units of all layers together; `rows` drive rows,
one per time step and sample of a chunk of time; `drive_pitch` numbers from one drive row to the next.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Columns of the table of column tiles: how the weights of a tile are stored, and where. A column tile is some
# neighbouring columns of a weight matrix, packed for one thread.
#   KIND        one of the kinds below
#   STORAGE     one of the storages below
#   LOW, HIGH   first position in a drive row, and the position after the last
#   VALUES      offset of the weights in `WeightPools.values`, in float32; IN_PLACE: in the network's own array
#   INDEX       offset in `WeightPools.index`, in int32
#   POINTERS    offset in `WeightPools.pointers`; IN_PLACE: address of the network's own array
#   WIDTH       columns per row, or per block segment; INTEGER_BLOCKS: bits of a rounded value without its sign
#   PITCH       weights from one row to the next; MASKED: mask words per unit; SINGLE_TILES: columns of a panel;
#               BLOCKS: 1 where each event prefetches weights of the next one, else 0; STRIPS, INTEGER_BLOCKS:
#               strips
#   SCALES      offset of the scales of int8 weights in `WeightPools.values`
#   DENSE_FROM  ROW_TILES: active units per drive row from which the product visits every unit; INTEGER_BLOCKS: 1 where
#               the strips are all columns of the tile, side by side
#   KERNEL      address of the kernel for the kind and the storage (`kernels/products.py`); 0 without columns
KIND, STORAGE, LOW, HIGH, VALUES, INDEX, POINTERS, WIDTH, PITCH, SCALES, DENSE_FROM, KERNEL = range(12)

FIELDS = 12

#: kinds of column tiles; `packing.py` describes their layouts
ROWS, ROW_TILES, SCATTER, MASKED, SINGLE_TILES, BLOCKS, FEW_BLOCKS, BLAS, GATED, IN_PLACE = range(10)

STRIPS, INTEGER_BLOCKS = 10, 11

# Columns of a tile of kind ROW_TILES or SINGLE_TILES: 64 drive rows of such a tile fit the L1 cache beside the weights
# that pass through.
ROW_TILE = 64

# Units of a small panel, as binary logarithm: the units whose weights in a tile are multiplied with the events of all
# drive rows before the next ones.
SMALL_PANEL_BITS = 6

# A block is cut into segments of the widest of these that divides its width.
SEGMENT_WIDTHS = (64, 32, 16, 8, 4)

# A tile of kind GATED (blocks that are chosen per input, `weights/gated.py`) has this header from POINTERS on:
#   FAULT             set by the kernel where gates are not finite, to the least cause that it found (BAD_LOGIT and so
#                     on, `state.GATE_FAULTS`); everything else in the pools is only read
#   ALL_BLOCKS, KEPT  the number of blocks of the matrix, and of those that an input chooses
#   SOFTMAX           1 for the rule "softmax", 0 for "linear"
#   BLOCK_ROWS, BLOCK_UNITS  the number of block rows, and of presynaptic units in one
#   GATE_PITCH        numbers of a row of gates: the blocks, in whole vectors
#   GATE_BIAS         offset of the biases in `WeightPools.values`, GATE_PITCH numbers
#   GATE, IN_PITCH    offset of the gate in `WeightPools.values`, and numbers from one unit to the next
#   RANK, GATE_OUT    rank of a gate with two factors, and offset of the second, in rows of GATE_PITCH; 0 for one factor
#   PERIOD            the number of steps that share a choice. If it is 1, the fields below are 0
#   HELD, HELD_PITCH  where the gates of the matrix begin among those that a sample holds, and numbers of a sample
# Then follow, for each block row, the number of its first piece, and the number of pieces; then the pieces. A piece is
# the part of a stored block in the columns of the tile, at most GATED_PIECE columns:
#   PIECE_BLOCK    number of the block
#   PIECE_TARGET   first position in a drive row
#   PIECE_VALUES   offset of its weights after VALUES, in weights: BLOCK_UNITS rows, padded to whole vectors
#   PIECE_VECTORS  vectors of a row
FAULT, ALL_BLOCKS, KEPT, SOFTMAX, BLOCK_ROWS, BLOCK_UNITS = range(6)

GATE_PITCH, GATE_BIAS, GATE, IN_PITCH, RANK, GATE_OUT = range(6, 12)

PERIOD, HELD, HELD_PITCH = range(12, 15)

GATED_HEADER = 15

# Gates that some steps share are kept from call to call at the end of `Workspace.scratch`, sample by sample, HELD_PITCH
# numbers each. Those of a matrix are a vector, whose first two numbers are an int64, the number of further steps that
# have the gates; then the gates, GATE_PITCH numbers. The last vector of `scratch` ends with an int64, the number of
# samples.

# Causes of gates that are not finite, in the order of `state.GATE_FAULTS`.
BAD_LOGIT, CANCELLED, TOO_LARGE = 1, 2, 3

# Columns whose parts of logits are summed at a time, at most.
GATE_TILE = 256

PIECE_BLOCK, PIECE_TARGET, PIECE_VALUES, PIECE_VECTORS = range(4)

PIECE_FIELDS = 4

GATED_PIECE = 256

# Drive rows that a product with gated blocks computes together, so that they share the weights they read.
GATED_ROWS = 64

# A tile of kind STRIPS (`kernels/strips.py`) has a table of strips, and one of groups of segments.
#   STRIP_POSITION  position in a drive row
#   STRIP_GROUP     number of its first group, from 0
#   STRIP_BASE      number of its first segment
# A group has, in this order, the byte where the bits of its range of units begin; the number within its strip of its
# first segment; the number of its segments; and where its list of segments ends, which the kernel writes.
STRIP_POSITION, STRIP_GROUP, STRIP_BASE = range(3)

STRIP_FIELDS, GROUP_FIELDS = 3, 4

# Units of a range, and segments of a group, at most.
RANGE_UNITS, GROUP_SEGMENTS = 512, 64

# A tile of kind INTEGER_BLOCKS (`kernels/integer_products.py`) has a bit per unit and strip, STRIPS_PER_WORD of them in
# a word of 64 bits. The events of LISTED_STRIPS strips are listed at a time, and those of a chunk, up to CHUNK_EVENTS,
# in LIST_WORDS words. Arrays by event have CHUNK_PITCH elements per chunk. A segment has SEGMENT_WORDS words.
STRIPS_PER_WORD, LISTED_STRIPS = 64, 8

CHUNK_EVENTS, CHUNK_PITCH, LIST_WORDS, SEGMENT_WORDS = 192, 256, 40, 8

#: storages of weights
FLOAT32, BFLOAT16, INT8 = range(3)

#: bytes per weight, by storage
ITEMSIZE = (4, 2, 1)

# Columns of the table of layers. The last row is the read-out, of whose columns those from REC on are zero, except
# BIAS_IN; without a read-out all are.
#   UNITS, INPUTS       sizes of the layer
#   IN, IN_END          first column tile of w_in, and the one after its last
#   PARTIAL, PARTIAL_END  the same for a chunk of fewer steps than others, for which another kernel may be faster
#   REC, REC_GATED      first column tiles of w_rec, and of the candidate's columns of w_rec, which are apart only where
#   END                 the reset gate comes before the product; END follows the last one
#   BIAS_IN, BIAS_REC   offsets of the biases in `WeightPools.biases`
#   UNIT_0              number of units in the layers below
#   UPDATE, GATING      addresses of the cell update, and of what gates the events of the candidate where the reset gate
#                       comes before the product (`kernels/products.py`)
#   REST                address of the kernel of silent steps (`kernels/silence.py`); 0 where every step is a whole one
UNITS, INPUTS, IN, IN_END, PARTIAL, PARTIAL_END, REC, REC_GATED, END = range(9)

BIAS_IN, BIAS_REC, UNIT_0, UPDATE, GATING, REST = range(9, 15)


class WeightPools(NamedTuple):
    """The packed weights of a network; column tiles say what lies where."""

    values: np.ndarray  # (n,) float32: weights of every storage, and scales
    index: np.ndarray  # (n,) int32: columns of block segments; 16-bit columns and masks, two per entry
    pointers: np.ndarray  # (n,) int64: where the weights of a unit begin
    biases: np.ndarray  # (n,) float32: biases, by position in a drive row


class EventLists(NamedTuple):
    """Many event lists; list q is events begins[q] to begins[q] + counts[q], in ascending order of units."""

    indices: np.ndarray  # (capacity,) int32: unit of each event
    values: np.ndarray  # (capacity,) float32: value of each event, not zero
    begins: np.ndarray  # (lists,) int64
    counts: np.ndarray  # (lists,) int64


class Workspace(NamedTuple):
    """Scratch arrays of `spmm.propagate_all`, for one thread; `plan.workspace` makes one for each, by a leading axis.

    For products of `drive_rows` rows and up to `inputs` units. Lists have one vector to spare.
    """

    panel_begins: np.ndarray  # (drive_rows * (panels + 1) + 1,) int64: where events of a panel and drive row begin
    panel_indices: np.ndarray  # (drive_rows * inputs + LANES,) int32: units of the events, in order of panels
    panel_values: np.ndarray  # (drive_rows * inputs + LANES,) float32: values of the events, in order of panels
    segment_numbers: np.ndarray  # (2, segments) int32: target position, and number, of each listed block segment
    segment_factors: np.ndarray  # (2, segments) float32: event value, and scale, of each listed block segment
    dense_inputs: np.ndarray  # (drive_rows * inputs,) float32: the events as dense rows
    tile: np.ndarray  # (drive_rows * ROW_TILE,) float32: drives of one column tile
    scratch: np.ndarray  # (n,) float32: result of BLAS, gates of GATED_ROWS + 1 drive rows, or a panel; held gates


class ThreadTables(NamedTuple):
    """What a thread needs for each of its products."""

    column_tiles: np.ndarray  # (tiles, FIELDS) int64: the table of the thread's column tiles
    pools: WeightPools
    workspace: Workspace
    drive_pitch: int


class RowEvents(NamedTuple):
    """The events of a product: drive row k gets the lists `first + k * per_row` to `first + (k + 1) * per_row`."""

    lists: EventLists
    first: int
    per_row: int
    rows: int


class NetworkTables(NamedTuple):
    """A network packed for the time loop."""

    layers: np.ndarray  # (layers + 1, 15) int64: the table of layers
    column_tiles: np.ndarray  # (n_threads, tiles, FIELDS) int64: the table of column tiles of each thread
    pools: WeightPools
    threshold: np.ndarray  # (units,) float32
    keep: np.ndarray  # (units,) float32: factor of a silent step (`silence.py`)
    pull: np.ndarray  # (units,) float32: addend of a silent step
    share_rows: int  # 1 where drive rows without events are equal; 0 with gated blocks, which zeros choose as well
    unit_bounds: np.ndarray  # (layers + 1, n_threads + 1) int64: units of each thread; last row: read-out outputs
    drive_begins: np.ndarray  # (layers + 1, n_threads) int64: first position of each thread's share of a drive row
    drive_pitch: int


class InputEvents(NamedTuple):
    """What a network receives: row k of the run, k = step * batch + sample, is row row_of[k] of a table of events."""

    indptr: np.ndarray  # (table rows + 1,) int64
    indices: np.ndarray  # (events,) int32
    values: np.ndarray  # (events,) float32
    row_of: np.ndarray  # (steps * batch,) int64


class RunSize(NamedTuple):
    """Which steps a call of the time loop computes."""

    steps: int  # of the run
    begin: int  # first step of this call
    end: int  # step after the last of this call
    batch: int
    chunk: int  # steps that go through a layer together


class RunBuffers(NamedTuple):
    """Scratch arrays of the time loop; `rows` = chunk * batch."""

    input_drives: np.ndarray  # (rows * drive_pitch,) float32
    recurrent_drives: np.ndarray  # (batch * drive_pitch,) float32
    events: EventLists  # of two layers: 2 * (rows + batch) rows of n_threads lists each
    list_begins: np.ndarray  # (n_threads, rows * n_threads) int64: each thread's own lists, of inputs or gated events
    list_counts: np.ndarray  # (n_threads, rows * n_threads) int64
    drive_of: np.ndarray  # (n_threads, rows) int64: where the input drives of each row of the chunk are
    rests: np.ndarray  # (n_threads * LINE,) int64: silent steps that each thread could take
    gated_indices: np.ndarray  # (n_threads, batch * row capacity) int32: what a candidate behind its reset gate gets
    gated_values: np.ndarray  # (n_threads, batch * row capacity) float32
    workspace: Workspace  # with a leading axis of threads


class SilentUnits(NamedTuple):
    """Units of a layer that take silent steps, in some samples."""

    keep: np.ndarray  # (units,) float32: see `NetworkTables`
    pull: np.ndarray  # (units,) float32
    threshold: np.ndarray  # (units,) float32
    unit: int  # the first one, in these three arrays
    count: int
    c: np.ndarray  # (units * batch,) float32: cells
    y: np.ndarray  # (units * batch,) float32: outputs
    at: int  # where the first one of the first sample is, in these two arrays
    samples: int
    pitch: int  # numbers from a unit of one sample to that of the next
    spare: np.ndarray  # float32: scratch of the thread, 3 * count numbers per sample
    spare_at: int  # where that of the first sample begins
    spare_pitch: int  # numbers from there to that of the next sample


class RunOutputs(NamedTuple):
    """What a run records; arrays of what is not recorded are empty."""

    output: np.ndarray  # (steps * batch * outputs,) float32
    events: np.ndarray  # (steps * batch * units,) float32, layer by layer
    states: np.ndarray  # (steps * batch * units,) float32, layer by layer
    graded: np.ndarray  # (units,) int64: events per unit of other values than 1 and -1
    binary: np.ndarray  # (units,) int64: events per unit of value 1 or -1
