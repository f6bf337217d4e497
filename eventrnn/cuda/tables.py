"""The tables that kernels read: which column says what. Plain numbers; knows no CUDA.

Addresses and offsets are bytes. Everything is int64.
"""

from __future__ import annotations

# Lanes of a warp; units that a warp looks at in one go.
LANES, SEGMENT = 32, 128

# How a matrix lies (see `packing.py`); added to it, whether its values are bfloat16, and in shared memory.
DENSE, MASKED, RUNS = 0, 1, 2

KINDS, NARROW, RESIDENT = 3, 4, 8

# Terms that are loaded together, and those of a dense strip; hits of a masked strip held before they are walked.
TERMS_PER_GROUP, DENSE_TERMS_PER_GROUP, MAX_HITS = 16, 32, 160

# Entries of zero that end a list, so that groups may be read whole.
LIST_PAD = DENSE_TERMS_PER_GROUP

HIT_BUFFER_BYTES = 12 * (MAX_HITS + LIST_PAD)

# Of strips whose units are looked up: bytes of a hit; units that a lane looks up together at most, and events of a list
# that a warp does; strips of a lot that look up events together.
HIT_BYTES, MAX_UNITS_PER_LANE, EVENTS_PER_WARP, STRIPS_PER_GROUP = 8, 7, 160, 8

GATHER_BUFFER_BYTES = HIT_BYTES * (EVENTS_PER_WARP + LIST_PAD)

# Bits that a thread has for how many of its samples sent, and so how many samples it may have.
SUM_BITS = 4

MAX_SUMMED = (1 << SUM_BITS) - 1

#: of a layer: numbers, then addresses
(
    UNITS, INPUTS, WIDTH, PITCH, INPUT_PITCH,
    INPUT_LOG,  # what the layer below sent, or 0 where DRIVE holds the finished products
    DRIVE, EVENT_LOG, GATED, CELLS, STATES, THRESHOLD, BIAS_IN, BIAS_REC,
    IN_LAYOUT, IN_VALUES, IN_TABLE, IN_STARTS,
    REC_LAYOUT, REC_VALUES, REC_TABLE, REC_STARTS,
    UNITS_OF, ROWS_OF, FIRSTS_OF, ROWS_BIAS,  # `packing.CompactStrips` and biases by column, for clusters
    LAYER_FIELDS,
) = range(27)  # fmt: skip

#: of a block: what it owns, then offsets in its shared memory
(
    LAYER, TILE, TILES, SAMPLE, SAMPLES, CAPACITY,
    AT_VALUES_IN, AT_TABLE_IN, AT_VALUES_REC, AT_TABLE_REC, AT_BASES,
    AT_LIST, AT_COUNTS, AT_STAGED, AT_SEGMENT_COUNTS, AT_HITS,
    AT_SUMS_IN, AT_SUMS_REC, AT_CELLS, AT_Y, AT_THRESHOLD, AT_BIAS,
    AT_UNITS, AT_ROWS, AT_STRIPS, AT_BARRIERS, ALL_TILES,
    BLOCK_FIELDS,
) = range(28)  # fmt: skip

#: of a run's report: a word that never came; LAST less the first position of an input that is refused; whether cells
#: are not finite; the same for events and inputs too large for float16. Then counts of events.
STATUS_FAULT, STATUS_INPUT, STATUS_CELLS, STATUS_LARGE, STATUS_FIELDS = range(5)

LAST = 1 << 62


def layout_code(kind: int, narrow: bool, resident: bool) -> int:
    """How a matrix lies, as a number: kind, bfloat16 or not, in shared memory or not."""
    return int(kind + NARROW * narrow + RESIDENT * resident)
