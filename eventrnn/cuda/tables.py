"""Constants that kernels and their callers share, and the columns of the tables that kernels read.

Plain numbers; knows no CUDA. A kernel reads two int64 tables in global memory: one row per role of a layer
(LAYER_FIELDS columns) and one row per block (BLOCK_FIELDS columns). Addresses and offsets are in bytes.
"""

from __future__ import annotations

# Lanes of a warp, outputs of a strip.
LANES = 32

# Neighbouring units whose outputs a warp loads together, four per lane.
SEGMENT = 128

# Layout of a matrix (`packing.Strips.kind`): all weights of a strip are stored.
DENSE = 0

# Layout: each unit has a mask of the outputs that it reaches in the strip.
MASKED = 1

# Layout: MASKED, and the outputs that a unit reaches in a strip are neighbours.
RUNS = 2

# Mask of the layout kind in a layout code.
KINDS = 3

# Flag of a layout code: values are bfloat16.
NARROW = 4

# Flag of a layout code: values and table are in shared memory.
RESIDENT = 8

# Terms of a sum that are loaded together, in sparse strips.
TERMS_PER_GROUP = 16

# Terms of a sum that are loaded together, in dense strips.
DENSE_TERMS_PER_GROUP = 32

# Events with a weight in a masked strip that are kept before their products are added.
MAX_HITS = 160

# Zero entries after the end of an event list, so that whole groups can be read.
LIST_PAD = DENSE_TERMS_PER_GROUP

# Bytes of shared memory per warp for the hits of a masked strip: int64 table word and float32 value each.
HIT_BUFFER_BYTES = 12 * (MAX_HITS + LIST_PAD)

# Bytes of a hit of a gather: int32 row offset and float32 value.
HIT_BYTES = 8

# Units that a lane gathers together, at most.
MAX_UNITS_PER_LANE = 7

# Events of a list that a warp looks up together, five per lane.
EVENTS_PER_WARP = 160

# Neighbouring strips that share the look-up of an event, at most; also the bits of the mask in a word of
# `packing.GroupedStrips.index`.
STRIPS_PER_GROUP = 8

# Bytes of shared memory per warp for the hits among the events that it looks up together.
GATHER_BUFFER_BYTES = HIT_BYTES * (EVENTS_PER_WARP + LIST_PAD)

# Bits of a sum over the samples of a thread of `tensor_core_cells.cells_kernel`.
SUM_BITS = 4

# Samples of such a thread, at most.
MAX_SUMMED = (1 << SUM_BITS) - 1

# Columns of the layer table. An address of 0 means that the array is absent.
(
    UNITS,  # units of the layer
    INPUTS,  # presynaptic units of the input matrix
    WIDTH,  # units per tile
    PITCH,  # float32 from one row of the event log to the next
    INPUT_PITCH,  # the same of the event log of the layer below
    INPUT_LOG,  # event log of the layer below, from step 0 on, or 0 if DRIVE holds the finished input drives
    DRIVE,  # (steps * batch, gates * units) float32 input drives
    EVENT_LOG,  # (steps + 1, batch, pitch) float32
    GATED,  # the same for r * y, where the reset gate comes first
    CELLS,  # (batch, units) float32
    STATES,  # (steps, batch, units) float32 cells after each step, or 0
    THRESHOLD,  # (tiles, 32) float32
    BIAS_IN,  # (strips, 32) float32
    BIAS_REC,  # (strips, 32) float32
    IN_LAYOUT,  # layout code of the input matrix
    IN_VALUES,  # `packing.Strips.values` of the input matrix
    IN_TABLE,  # `packing.Strips.table`
    IN_STARTS,  # `packing.Strips.starts`
    REC_LAYOUT,  # layout code of the recurrent matrix
    REC_VALUES,  # `packing.Strips.values` of the recurrent matrix
    REC_TABLE,  # `packing.Strips.table`
    REC_STARTS,  # `packing.Strips.starts`
    UNITS_OF,  # `packing.CompactStrips.units`, for clusters
    ROWS_OF,  # `packing.CompactStrips.rows`
    BEGINS_OF,  # `packing.CompactStrips.begins`
    ROWS_BIAS,  # (strips, 32) float32 biases of strips of 32 columns
    LAYER_FIELDS,  # number of columns
) = range(27)

# Columns of the block table: what a block owns, then byte offsets of arrays in its shared memory. The docstrings of the
# kernels `persistent`, `single_stream` and `cluster` describe the arrays.
(
    LAYER,  # row of the layer table
    TILE,  # first tile
    TILES,  # number of tiles
    SAMPLE,  # first sample
    SAMPLES,  # number of samples
    CAPACITY,  # entries of an event list, or of a strip's table of units in clusters
    AT_VALUES_IN,
    AT_TABLE_IN,
    AT_VALUES_REC,
    AT_TABLE_REC,
    AT_BASES,
    AT_LIST,
    AT_COUNTS,
    AT_STAGED,
    AT_SEGMENT_COUNTS,
    AT_HITS,
    AT_SUMS_IN,
    AT_SUMS_REC,
    AT_CELLS,
    AT_Y,
    AT_THRESHOLD,
    AT_BIAS,
    AT_UNITS,
    AT_ROWS,
    AT_STRIPS,
    AT_BARRIERS,
    ALL_TILES,  # tiles of the layer, for clusters
    BLOCK_FIELDS,  # number of columns
) = range(28)

# Entries of the int64 status vector of a run. Counts of events follow after the first STATUS_FIELDS entries.
(
    STATUS_FAULT,  # 1 if a word was not written in time
    STATUS_INPUT,  # LAST minus the first position of an invalid input, or 0
    STATUS_CELLS,  # 1 if a cell is not finite
    STATUS_LARGE,  # 1 if an event or an input is beyond the float16 range
    STATUS_FIELDS,  # number of entries
) = range(5)

# Larger than any position of an input, so that an atomic maximum of LAST - position finds the first one.
LAST = 1 << 62


def layout_code(kind: int, narrow: bool, resident: bool) -> int:
    """Layout of a matrix as one number: DENSE, MASKED or RUNS, bfloat16 or not, in shared memory or not."""
    return int(kind + NARROW * narrow + RESIDENT * resident)
