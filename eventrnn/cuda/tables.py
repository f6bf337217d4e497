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
    CLOCKS,  # (blocks, warps, TURN_PHASES) int64, for a kernel that measures its phases
    LAYER_FIELDS,  # number of columns
) = range(28)

# Phases of a turn of a recurrent cluster whose cycles are measured: until the drives are there, until the outputs of
# the step before are there, products and gates, the barrier of the block, cells and sending.
TURN_PHASES = ("drives", "wait", "products", "barrier", "cells")

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

# Arguments of the kernel of a layer for single steps (`kernels/single_step.py`): sizes and addresses.
(
    STEP_UNITS,  # units of the layer
    STEP_INPUTS,  # presynaptic units of the input matrix
    STEP_X,  # (batch, inputs) float32
    STEP_Y_BEFORE,  # (batch, units) float32, like the following three
    STEP_C_BEFORE,
    STEP_Y_AFTER,
    STEP_C_AFTER,
    STEP_THRESHOLD,  # (tiles, 32) float32
    STEP_IN_UNITS,  # `packing.CompactStrips` of the input matrix
    STEP_IN_ROWS,
    STEP_IN_BEGINS,
    STEP_IN_BIAS,  # (strips, 32) float32
    STEP_REC_UNITS,  # the same of the recurrent matrix
    STEP_REC_ROWS,
    STEP_REC_BEGINS,
    STEP_REC_BIAS,
    STEP_STATUS,  # (STATUS_FIELDS,) int64, then an int32: the blocks of the last layer that are complete
    STEP_CHECKED,  # 1 where the kernel checks that the inputs are finite
    STEP_OUTPUT,  # (batch, units) float32 in pinned host memory, or 0
    STEP_ANSWER,  # (STATUS_FIELDS + 1,) int64 in pinned host memory, or 0 for a layer that is not the last one
    STEP_FIELDS,  # number of arguments
) = range(21)

# Entries of the int64 status vector of a run. Counts of events follow after the first STATUS_FIELDS entries.
(
    STATUS_FAULT,  # 1 if a word was not written in time
    STATUS_INPUT,  # LAST minus the first position of an invalid input, or 0
    STATUS_CELLS,  # 1 if a cell is not finite
    STATUS_LARGE,  # 1 if an event or an input is beyond the float16 range
    STATUS_GATES,  # LAST minus the number of a matrix of gated blocks whose gates are not finite, or 0
    STATUS_FIELDS,  # number of entries
) = range(6)

# Larger than any position of an input, so that an atomic maximum of LAST - position finds the first one.
LAST = 1 << 62


def layout_code(kind: int, narrow: bool, resident: bool) -> int:
    """Layout of a matrix as one number: DENSE, MASKED or RUNS, bfloat16 or not, in shared memory or not."""
    return int(kind + NARROW * narrow + RESIDENT * resident)


# --- gated blocks (`kernels/gated_blocks.py`) ---------------------------------------------------------------

# Copies of weights to shared memory that a warp may have under way, and their bytes: for independent rows, and for the
# time loop of a layer, whose stages leave room for resident weights. Four of 4608 bytes hold three block rows of 128
# rows and 12 columns.
STAGES, ROWS_STAGE_BYTES, LAYER_STAGE_BYTES = 4, 4096, 4608

# Rows of a block row are padded to a multiple of this number, of which a lane reads the weights by 16 bytes.
ROW_GROUP = 8

# Steps of a run from which on a layer keeps weights in shared memory.
RESIDENT_STEPS = 4

# Rows of inputs that are multiplied together, at most, so that they share the weights they read; and the bytes of the
# sums of these rows, which follow the stages in the ring of a warp.
MAX_SAMPLES = 8
SUM_BYTES = 4 * LANES * MAX_SAMPLES

# Rows of a block row that are multiplied at a time, at most. In place of the sums, a warp with one row of inputs has
# lists of such pieces, and the inputs of two of them.
PIECE = 128
LIST_BYTES, SCALED_BYTES, BARRIER_BYTES = (16 + 8) * LANES, 2 * 4 * PIECE, 64

# What follows the stages in the ring of a warp: the sums and as many totals of logits, or lists, inputs
# and barriers.
TAIL_BYTES = max(2 * SUM_BYTES, LIST_BYTES + SCALED_BYTES + BARRIER_BYTES)

# Classes of logits by which a block of threads chooses, and logits of one class that it ranks at most.
CLASSES, RANKED = 256, 32

# Words of shared memory in which the warps of a block exchange counts while they choose, without two rows of a warp for
# each of them; and numbers behind the ratios.
CHOICE_WORDS, RATIO_PAD = 160 + CLASSES + RANKED, 64

# Columns of the first of two factors of a gate of which a block computes all logits (`kernels/gated_factors.py`).
FACTOR_COLUMNS = 16

# Rows and columns of a tile of `kernels/row_tiles.py`, and inputs that are multiplied between two barriers.
TILE_SIDE, TILE_INPUTS = 64, 16

# Columns of the table of one matrix of gated blocks. Addresses are in bytes. "Strips" are `gated_matrix.RowStrips`.
(
    BLOCK_VALUES,  # strips of the weights
    BLOCK_OFFSETS,  # their offsets
    BLOCK_WIDTH,  # columns of a strip
    BLOCK_STAGE,  # rows of a strip that are copied at a time
    BLOCK_STRIPS,  # number of strips
    BLOCK_SPAN,  # neighbouring units that a strip does not cross (`gated_matrix.RowStrips.span`)
    N_PRE,  # presynaptic units
    N_POST,  # columns of the matrix
    GRID_ROWS,  # block rows
    GRID_COLUMNS,  # block columns
    ROWS_OF_BLOCK,  # r
    COLUMNS_OF_BLOCK,  # c
    PADDED_ROWS,  # r, rounded up to a multiple of ROW_GROUP
    PADDED_PRE,  # rows of all block rows, each with its padding
    ALL_BLOCKS,  # block rows * block columns
    KEPT_BLOCKS,  # blocks that an input chooses
    SOFTMAX,  # 1 for the rule "softmax", 0 for "linear"
    PERIOD,  # steps that share a choice; 0 where no step chooses, and all gates are 1
    BIAS,  # (N_POST,) float32
    RANK,  # of a gate with two factors; 0 for one factor
    INNER_VALUES,  # strips of the first of two factors, (N_PRE, RANK)
    INNER_OFFSETS,
    INNER_WIDTH,
    INNER_STAGE,
    INNER_STRIPS,
    LOGIT_VALUES,  # strips of the only factor, (N_PRE, ALL_BLOCKS), or of the second one, (RANK, ALL_BLOCKS)
    LOGIT_OFFSETS,
    LOGIT_WIDTH,
    LOGIT_STAGE,
    LOGIT_STRIPS,
    LOGIT_BIAS,  # (ALL_BLOCKS,) float32
    PART_ROWS,  # rows of a part of a logit, with padding
    NUMBER,  # of the matrix in the network, for the status word
    GATED_FIELDS,  # number of columns
) = range(34)

# Columns of the table of shared memory of a kernel for gated blocks: byte offsets.
(
    AT_INPUTS,  # (samples, PADDED_PRE) float32
    AT_ACTIVE,  # (samples, block rows) int32, 1 if an input of the block row is not zero
    AT_INNER,  # (samples, rank) float32, what lies between two factors; the rank is padded as rows are
    AT_GATES,  # (samples, blocks) float32, logits and then gates
    AT_KEYS,  # (blocks,) int32
    AT_RATIOS,  # (kept blocks + RATIO_PAD,) float32
    AT_WORDS,  # (CHOICE_WORDS + 64 per warp,) int32
    AT_MAXIMA,  # (samples, 32) int32, bits of the largest magnitude of an input, per warp
    AT_RINGS,  # (WORKERS, STAGES * stage bytes + TAIL_BYTES), weights on their way, and sums
    AT_DRIVES_IN,  # (samples, tiles, gates, 32) float32
    AT_DRIVES_REC,  # the same
    AT_STATE,  # (samples, tiles, 32) float32 cells
    AT_OFFSETS,  # int64 offsets of the strips of the block, of its logits and of the first of two factors
    AT_ONES,  # float32 1 and int32 1: gate and activity of a factor
    AT_TILES,  # (tiles, 2) int32, the first unit of a tile and its units
    AT_STARTS,  # (tiles, gates, 32) float32, biases, then as many int32, block columns
    AT_LOGIT_STARTS,  # (strips of logits of the block, 32) float32, biases of the logits
    AT_PARTS,  # (strips of logits of the block, PARTS, 32) float32, parts of logits, where LOGITS_RESIDENT is 1; of a
    # block that chooses alone (PARTS, 32), parts of the numbers between two factors
    AT_HELD,  # (samples, 2) int32, further steps with the gates of a sample, and the bits of its largest gate
    AT_LOGITS,  # (strips of logits of the block, PADDED_PRE, LOGIT_WIDTH) float32, where LOGITS_RESIDENT is 1; of a
    # block that chooses alone the first of two factors, (PADDED_PRE, FACTOR_COLUMNS)
    AT_RESIDENT,  # (strips of the block, RESIDENT_ROWS, PADDED_ROWS, width), first block rows of the weights
    INPUT_PITCH_OF,  # float32 from one row of inputs to the next; not an offset, like the following columns
    ACTIVE_PITCH,
    INNER_PITCH,
    GATES_PITCH,
    WORKERS,  # warps that multiply, each with a ring; the others only help to choose
    RESIDENT_ROWS,  # block rows of a strip that stay in shared memory
    LOGITS_RESIDENT,  # 1 if the weights of the own logits stay in shared memory
    PARTS,  # parts of a logit
    IN_PIECES,  # 1 if every warp after the first has at most one strip, which goes through `kernels/gated_pieces.py`;
    # the host reads it, and takes another kernel
    PLACE_FIELDS,  # number of columns
) = range(31)

# Columns of the table of a layer with a recurrent matrix of gated blocks.
(
    ROW_UNITS,  # units of the layer
    ROW_PITCH,  # float32 from one row of the event log to the next
    ROW_LOG,  # event log, (steps + 1, batch, pitch) float32
    ROW_DRIVE,  # (steps * batch, gates * units) float32 input drives
    ROW_CELLS,  # (batch, units) float32
    ROW_STATES,  # (steps, batch, units) float32 cells after each step, or 0
    ROW_THRESHOLDS,  # (units,) float32
    ROW_LOGITS,  # (steps, batch, logit pitch) float32, not yet written
    ROW_LOGIT_PITCH,
    ROW_HELD_BEFORE,  # (batch, blocks) float32 gates before the run, of choices that steps share, or 0
    ROW_LEFT_BEFORE,  # (batch,) int32 further steps with these gates
    ROW_HELD,  # the gates after the run
    ROW_LEFT,  # further steps with them
    ROW_STAMPS,  # (steps, blocks, STAMPS) int64, or 0
    ROW_FIELDS,  # number of columns
) = range(15)

# Phases of a step of such a layer, and clocks that are read in a step: at its begin, and after each phase.
PHASES = ("outputs", "logits", "all logits", "choice", "products", "cells")
STAMPS = len(PHASES) + 1
