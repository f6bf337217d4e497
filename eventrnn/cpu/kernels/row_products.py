"""Weights of each format times events, one drive row after the other: rows, single weights and block segments.

`weights` is `pools.values` seen as float32, uint16 or int8; the scales of int8 weights are found in `pools.values`
itself. Each function adds to a drive row, over the columns i of a column tile, weight[j, i] * value for the events
(j, value) of a list, one FMA each, in the order of the list.
"""

from __future__ import annotations

import numpy as np

from eventrnn.cpu.kernels.jit import inlined
from eventrnn.cpu.kernels.microkernels import (
    TILE,
    add_blocks_4,
    add_blocks_8,
    add_blocks_16,
    add_blocks_32,
    add_blocks_64,
    add_listed_4,
    add_listed_8,
    add_listed_16,
    add_rows,
    list_blocks,
)
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.single_weights import add_masked, add_scattered
from eventrnn.cpu.tables import INDEX, LOW, PITCH, POINTERS, SCALES, VALUES, WIDTH

# Block segments are listed until there are so many, and then added. The list is short so that the drives stay in the L1
# cache.
LISTED_SEGMENTS = 64

# With single weights, each event prefetches those of the event that comes so many events later. Rows of single weights
# are short, and read at random: the hardware prefetcher detects each of them late. With 12 % of 1350 x 4050 weights out
# of the cache a weight took 2.3 ns, and 1.1 ns with this; 0.65 ns of them are work. Distances of 1 to 6 differ little.
UPCOMING = 2


@inlined
def values_at(column_tile, weights):
    """Offset of a column tile in `weights`. The table gives it in float32, which are wider than other storages."""
    return column_tile[VALUES] * (4 // weights.itemsize)


@inlined
def add_dense_rows(column_tile, weights, pools, events, begin, count, drives, at, workspace):
    """Dense rows: all events are added to one register tile of columns, then to the next one."""
    ids, values, scales = events.indices, events.values, pools.values
    # planted fault: scale of another unit, rows
    pitch, start, s0 = column_tile[PITCH], values_at(column_tile, weights), column_tile[SCALES]
    left, at = column_tile[WIDTH] // LANES, at + column_tile[LOW]
    while left > 0:
        vectors = min(left, TILE)
        add_rows(drives, at, weights, start, pitch, scales, s0, ids, values, begin, count, vectors)
        left, at, start = left - vectors, at + vectors * LANES, start + vectors * LANES


@inlined
def add_single(column_tile, weights, pools, events, begin, count, drives, at, workspace):
    """Single weights by index: some targets at a time."""
    p0, i0, s0 = column_tile[POINTERS], column_tile[INDEX], column_tile[SCALES]
    v0, at = values_at(column_tile, weights), at + column_tile[LOW]
    pointers, scales = pools.pointers, pools.values
    for e in range(begin, begin + count):
        unit, value = np.int64(events.indices[e]), events.values[e]
        ahead = pointers[p0 + np.int64(events.indices[min(e + UPCOMING, begin + count - 1)])]
        # planted fault: scale of another unit, single weights
        first, last, scale = pointers[p0 + unit], pointers[p0 + unit + 1], scales[s0 + unit]
        # planted fault: tail of scattered weights dropped
        add_scattered(drives, at, pools.index, i0, first, last - first, ahead, value, scale, weights, v0)


@inlined
def add_single_masked(column_tile, weights, pools, events, begin, count, drives, at, workspace):
    """Single weights by mask: every vector of the row."""
    p0, i0, s0 = column_tile[POINTERS], column_tile[INDEX], column_tile[SCALES]
    v0, at, masks = values_at(column_tile, weights), at + column_tile[LOW], column_tile[PITCH]
    pointers, scales = pools.pointers, pools.values
    for e in range(begin, begin + count):
        unit, value = np.int64(events.indices[e]), events.values[e]
        # planted fault: scale of another unit, masked weights
        first, scale = pointers[p0 + unit], scales[s0 + unit]
        # planted fault: masks of the wrong unit
        add_masked(drives, at, pools.index, i0, unit * masks, masks, value, scale, weights, v0 + first)


@inlined
def add_blocks(column_tile, weights, pools, events, begin, count, drives, at, workspace):
    """Block segments: all of one event, then those of the next one.

    The processor mispredicts the end of most units, which costs less than a list of segments, unless it is short work.
    """
    width = column_tile[WIDTH]
    # planted fault: scale of another unit, blocks
    # planted fault: last event of blocks
    given = (
        drives,
        at,
        pools.index,
        column_tile[INDEX],
        pools.pointers,
        column_tile[POINTERS],
        weights,
        values_at(column_tile, weights),
        pools.values,
        column_tile[SCALES],
        events.indices,
        events.values,
        begin,
        count,
        column_tile[PITCH],
    )
    if width == 64:
        add_blocks_64(*given)
    elif width == 32:
        add_blocks_32(*given)
    elif width == 16:
        add_blocks_16(*given)
    elif width == 8:
        add_blocks_8(*given)
    else:
        add_blocks_4(*given)


@inlined
def add_few_blocks(column_tile, weights, pools, events, begin, count, drives, at, workspace):
    """Few narrow block segments: those of several units are listed without a branch, and then added in one loop."""
    # planted fault: scale of another unit, few blocks
    i0, p0, s0 = column_tile[INDEX], column_tile[POINTERS], column_tile[SCALES]
    segments, factors, event, end = workspace.segment_numbers, workspace.segment_factors, begin, begin + count
    while event < end:
        event, listed = list_blocks(
            weights,
            pools.pointers,
            p0,
            pools.index,
            i0,
            events.indices,
            events.values,
            event,
            end,
            pools.values,
            s0,
            LISTED_SEGMENTS,
            segments,
            factors,
        )
        # planted fault: rest of a list dropped
        _add_listed(column_tile, weights, segments, factors, listed, drives, at)


@inlined
def _add_listed(column_tile, weights, segments, factors, count, drives, at):
    """Add the first `count` listed block segments to the drives at their targets."""
    width, start = column_tile[WIDTH], values_at(column_tile, weights)
    if width == 16:
        add_listed_16(drives, at, segments, factors, count, weights, start)
    elif width == 8:
        add_listed_8(drives, at, segments, factors, count, weights, start)
    else:
        add_listed_4(drives, at, segments, factors, count, weights, start)
