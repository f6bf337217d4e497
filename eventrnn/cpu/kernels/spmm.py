"""Sparse products (SpMM) of the CPU engine: from event lists to drives, for every format of packed weights.

A drive is the sum of a bias and of weight * event value over the events. `propagate_all` computes all drive rows of one
product. It equals `reference.propagate` bit for bit, except for column tiles of kind BLAS.

A thread computes the columns of its own column tiles, over all events, so no sum is split between threads. The shapes
and dtypes of the records are in `cpu/tables.py`:

    column_tiles  (tiles, FIELDS) int64, the table of the thread's column tiles; `column_tile` is one of its rows
    pools         `WeightPools`, which all threads read
    events        `EventLists`, which all threads read
    workspace     `Workspace`, which belongs to the thread
    drives        (rows * drive_pitch,) float32, of which a thread writes the positions of its own columns

Functions that take `weights` are compiled once per storage. `weights` is `pools.values` viewed as float32, uint16 or
int8. The scales of int8 weights are float32 elements of `pools.values`.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn._integers import ceil_div
from eventrnn.cpu.kernels.jit import allocating, compiled, inlined
from eventrnn.cpu.kernels.microkernels import (
    LINE,
    MULTIPLY_ROWS,
    MULTIPLY_VECTORS,
    TILE,
    add_blocks_4,
    add_blocks_8,
    add_blocks_16,
    add_listed_4,
    add_listed_8,
    add_listed_16,
    add_listed_32,
    add_listed_64,
    add_masked_avx512,
    add_near_rows,
    add_rows,
    add_scattered_avx512,
    list_blocks,
    multiply_edge,
    multiply_row,
    multiply_tile,
    prefetch_far,
)
from eventrnn.cpu.kernels.simd import AVX512, LANES, decoded, load, lowest_bit, store
from eventrnn.cpu.tables import (
    BFLOAT16,
    BLAS,
    BLOCKS,
    DENSE_FROM,
    FLOAT32,
    HIGH,
    INDEX,
    KIND,
    LOW,
    MANY_BLOCKS,
    MASKED,
    PITCH,
    POINTERS,
    ROW_TILE,
    ROW_TILES,
    ROWS,
    SCALES,
    STORAGE,
    VALUES,
    WIDTH,
    Workspace,
)


@compiled
def propagate_steps(
    column_tiles,
    first_tile,
    last_tile,
    pools,
    bias_begin,
    n_pre,
    events,
    begin,
    end,
    rows,
    workspace,
    drives,
    drive_pitch,
):
    """Compute the products of the steps `begin` to `end`, one after the other, into the same drives.

    Every step has `rows` event lists, one per drive row. Other parameters: see `propagate_all`.
    """
    for t in range(begin, end):
        propagate_all(
            column_tiles,
            first_tile,
            last_tile,
            pools,
            bias_begin,
            n_pre,
            events,
            t * rows,
            1,
            rows,
            workspace,
            drives,
            drive_pitch,
        )


# Block segments are listed until there are so many, and then added. The list is short so that the drives stay in the L1
# cache.
LISTED_SEGMENTS = 64

# Units per pass of `dense_product`. The weights of a column tile for so many units stay in the L1 cache while they are
# multiplied with all drive rows.
MULTIPLY_UNITS = 128

# Units per panel. Their rows of a column tile, 32 KB, stay in the L1 cache while the events of all drive rows are
# added.
PANEL = 128


@inlined
def propagate(column_tile, pools, events, begin, count, drives, at, workspace):
    """drives[at + i] += weight[j, i] * value, for every event (j, value), over the columns i of a column tile.

    The events are `begin` to `begin + count` of `events`. Their terms are added in that order, one FMA per term. Only
    the weights of their units are read. Not for the kinds ROW_TILES and BLAS.
    """
    if column_tile[STORAGE] == FLOAT32:
        _propagate(column_tile, pools.values, pools, events, begin, count, drives, at, workspace)
    elif column_tile[STORAGE] == BFLOAT16:
        _propagate(column_tile, pools.values.view(np.uint16), pools, events, begin, count, drives, at, workspace)
    else:
        _propagate(column_tile, pools.values.view(np.int8), pools, events, begin, count, drives, at, workspace)


@inlined
def _propagate(column_tile, weights, pools, events, begin, count, drives, at, workspace):
    """`propagate` for one storage."""
    if column_tile[KIND] == ROWS:
        _add_dense_rows(column_tile, weights, pools, events, begin, count, drives, at)
    elif column_tile[KIND] == BLOCKS:
        _add_blocks(column_tile, weights, pools, events, begin, count, drives, at, workspace)
    elif column_tile[KIND] == MANY_BLOCKS:
        _add_many_blocks(column_tile, weights, pools, events, begin, count, drives, at)
    else:
        _add_single(column_tile, weights, pools, events, begin, count, drives, at)


@inlined
def _values_at(column_tile, weights):
    """Offset of a column tile in `weights`. The table gives it in float32, which are wider than other storages."""
    return column_tile[VALUES] * (4 // weights.itemsize)


@inlined
def _add_dense_rows(column_tile, weights, pools, events, begin, count, drives, at):
    """Dense rows: all events are added to one register tile of columns, then to the next one."""
    ids, values, scales = events.indices, events.values, pools.values
    # planted fault: scale of another unit, rows
    pitch, start, s0 = column_tile[PITCH], _values_at(column_tile, weights), column_tile[SCALES]
    left, at = column_tile[WIDTH] // LANES, at + column_tile[LOW]
    while left > 0:
        vectors = min(left, TILE)
        add_rows(drives, at, weights, start, pitch, scales, s0, ids, values, begin, count, vectors)
        left, at, start = left - vectors, at + vectors * LANES, start + vectors * LANES


@inlined
def add_scattered_portable(drives, at, index, i0, first, count, value, scale, weights, start):
    """`add_scattered_avx512` for other processors: one weight at a time."""
    columns = index.view(np.uint16)
    for k in range(first, first + count):
        target = at + columns[2 * i0 + k]
        drives[target] = cells.fma(decoded(weights, start + k, scale), value, drives[target])


@inlined
def add_masked_portable(drives, at, index, i0, first, vectors, value, scale, weights, start):
    """`add_masked_avx512` for other processors: one set bit at a time."""
    masks = index.view(np.uint16)
    for k in range(vectors):
        mask = np.int64(masks[2 * i0 + first + k])
        while mask != 0:
            target = at + k * LANES + lowest_bit(mask)
            drives[target] = cells.fma(decoded(weights, start, scale), value, drives[target])
            start += 1
            mask &= mask - 1


add_scattered = add_scattered_avx512 if AVX512 else add_scattered_portable

add_masked = add_masked_avx512 if AVX512 else add_masked_portable


@inlined
def _add_single(column_tile, weights, pools, events, begin, count, drives, at):
    """Single weights: sixteen targets at a time by index (SCATTER), or every vector of the row by mask (MASKED)."""
    p0, i0, s0 = column_tile[POINTERS], column_tile[INDEX], column_tile[SCALES]
    v0, at, masks = _values_at(column_tile, weights), at + column_tile[LOW], column_tile[PITCH]
    pointers, scales = pools.pointers, pools.values
    for e in range(begin, begin + count):
        unit, value = np.int64(events.indices[e]), events.values[e]
        # planted fault: scale of another unit, single weights
        first, last, scale = pointers[p0 + unit], pointers[p0 + unit + 1], scales[s0 + unit]
        if column_tile[KIND] == MASKED:
            # planted fault: masks of the wrong unit
            add_masked(drives, at, pools.index, i0, unit * masks, masks, value, scale, weights, v0 + first)
        else:
            # planted fault: tail of scattered weights dropped
            add_scattered(drives, at, pools.index, i0, first, last - first, value, scale, weights, v0)


@inlined
def _add_blocks(column_tile, weights, pools, events, begin, count, drives, at, workspace):
    """Block segments: the segments of several units are listed without a branch, and then added in one loop."""
    i0, p0, s0 = column_tile[INDEX], column_tile[POINTERS], column_tile[SCALES]
    numbers, factors, scales = workspace.segment_numbers, workspace.segment_factors, pools.values
    listed = 0
    for e in range(begin, begin + count):
        unit, value = np.int64(events.indices[e]), events.values[e]
        first, last, number = _segments_of(pools, p0, unit)
        # planted fault: scale of another unit, blocks
        scale = scales[s0 + unit]
        list_blocks(
            weights,
            pools.index,
            i0 + first,
            last - first,
            number,
            value,
            scale,
            numbers[0],
            numbers[1],
            factors[0],
            factors[1],
            listed,
        )
        listed += last - first
        if listed >= LISTED_SEGMENTS:
            _add_listed(column_tile, weights, numbers, factors, listed, drives, at)
            listed = 0
    # planted fault: rest of a list dropped
    _add_listed(column_tile, weights, numbers, factors, listed, drives, at)


@inlined
def _segments_of(pools, p0, unit):
    """The first index of a unit, the index after its last one, and the number of its first segment."""
    return pools.pointers[p0 + 3 * unit], pools.pointers[p0 + 3 * unit + 1], pools.pointers[p0 + 3 * unit + 2]


@inlined
def _add_many_blocks(column_tile, weights, pools, events, begin, count, drives, at):
    """Block segments: the segments of each unit are added in a loop of their own, without a list.

    That is less work per segment, but the processor mispredicts the end of the loop once per unit.
    """
    i0, p0, s0, width = column_tile[INDEX], column_tile[POINTERS], column_tile[SCALES], column_tile[WIDTH]
    v0, index, scales = _values_at(column_tile, weights), pools.index, pools.values
    for e in range(begin, begin + count):
        unit, value = np.int64(events.indices[e]), events.values[e]
        first, last, number = _segments_of(pools, p0, unit)
        # planted fault: scale of another unit, many blocks
        scale = scales[s0 + unit]
        if width == 16:
            add_blocks_16(drives, at, index, i0 + first, last - first, value, scale, weights, v0 + number * 16)
        elif width == 8:
            add_blocks_8(drives, at, index, i0 + first, last - first, value, scale, weights, v0 + number * 8)
        else:
            add_blocks_4(drives, at, index, i0 + first, last - first, value, scale, weights, v0 + number * 4)


@inlined
def _add_listed(column_tile, weights, numbers, factors, count, drives, at):
    """Add the first `count` listed block segments to the drives at their targets."""
    width, start = column_tile[WIDTH], _values_at(column_tile, weights)
    if width == 64:
        add_listed_64(drives, at, numbers[0], numbers[1], factors[0], factors[1], count, weights, start)
    elif width == 32:
        add_listed_32(drives, at, numbers[0], numbers[1], factors[0], factors[1], count, weights, start)
    elif width == 16:
        add_listed_16(drives, at, numbers[0], numbers[1], factors[0], factors[1], count, weights, start)
    elif width == 8:
        add_listed_8(drives, at, numbers[0], numbers[1], factors[0], factors[1], count, weights, start)
    else:
        add_listed_4(drives, at, numbers[0], numbers[1], factors[0], factors[1], count, weights, start)


# --- all drive rows of a product ----------------------------------------------------------------------------


@compiled
def propagate_all(
    column_tiles,
    first_tile,
    last_tile,
    pools,
    bias_begin,
    n_pre,
    events,
    first_list,
    lists_per_row,
    rows,
    workspace,
    drives,
    drive_pitch,
):
    """Write `rows` drive rows over the column tiles `first_tile` to `last_tile` of a matrix (n_pre, columns).

    A drive row starts from the bias, which is `pools.biases` from `bias_begin` on. The events of row k are the
    `lists_per_row` lists from `first_list + k * lists_per_row` on.

    Column tiles of kind ROW_TILES read a weight once for all drive rows. They add the events panel by panel of units.
    Where most units are active, they visit every unit instead.
    """
    every_unit = False
    if first_tile >= last_tile:
        return
    if column_tiles[first_tile, KIND] == ROW_TILES:
        total = 0
        for q in range(first_list, first_list + rows * lists_per_row):
            total += events.counts[q]
        every_unit = total >= column_tiles[first_tile, DENSE_FROM] * rows
        if every_unit:
            densify(n_pre, events, first_list, lists_per_row, rows, workspace)
        else:
            bin_by_panel(n_pre, events, first_list, lists_per_row, rows, workspace)
    elif column_tiles[first_tile, KIND] == BLAS:
        densify(n_pre, events, first_list, lists_per_row, rows, workspace)
    for w in range(first_tile, last_tile):
        column_tile = column_tiles[w]
        if column_tile[KIND] == BLAS:
            blas_product(column_tile, pools, bias_begin, n_pre, workspace, rows, drives, drive_pitch)
            continue
        if column_tile[KIND] == ROW_TILES:
            tile_product(column_tile, pools, bias_begin, n_pre, every_unit, workspace, rows, drives, drive_pitch)
            continue
        low, width = column_tile[LOW], column_tile[HIGH] - column_tile[LOW]
        for k in range(rows):
            at = k * drive_pitch
            copy(pools.biases, bias_begin + low, drives, at + low, width)
            for q in range(first_list + k * lists_per_row, first_list + (k + 1) * lists_per_row):
                propagate(column_tile, pools, events, events.begins[q], events.counts[q], drives, at, workspace)


@inlined
def workspace_of(shared, thread):
    """The `Workspace` of one thread, out of a `Workspace` whose arrays have a leading axis of threads."""
    return Workspace(
        shared.panel_begins[thread],
        shared.panel_indices[thread],
        shared.panel_values[thread],
        shared.segment_numbers[thread],
        shared.segment_factors[thread],
        shared.dense_inputs[thread],
        shared.tile[thread],
        shared.blas_product[thread],
    )


@inlined
def copy(source, s, target, t, count):
    """target[t:t + count] = source[s:s + count]."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store(target, t + i, load(source, s + i))
    for i in range(whole, count):
        target[t + i] = source[s + i]


@compiled
def densify(n_pre, events, first_list, lists_per_row, rows, workspace):
    """Write the events of each drive row as a dense row of `n_pre` numbers to `workspace.dense_inputs`."""
    x = workspace.dense_inputs
    for k in range(rows):
        for j in range(k * n_pre, (k + 1) * n_pre):
            x[j] = cells.ZERO
        for q in range(first_list + k * lists_per_row, first_list + (k + 1) * lists_per_row):
            for e in range(events.begins[q], events.begins[q] + events.counts[q]):
                x[k * n_pre + events.indices[e]] = events.values[e]


@compiled
def bin_by_panel(n_pre, events, first_list, lists_per_row, rows, workspace):
    """Sort the events into panels of PANEL units, and within a panel by drive row, the order in which they are read.

    The events of row k in panel q begin at panel_begins[q * rows + k] and end where the next ones begin. In the order
    of rows instead, the lists of 80 rows of 135 events each exceed the L1 cache, and the product took a fifth longer.
    """
    begins, indices, values = workspace.panel_begins, workspace.panel_indices, workspace.panel_values
    panels = ceil_div(n_pre, PANEL)
    for q in range(panels * rows):
        begins[q] = 0
    for k in range(rows):
        for q in range(first_list + k * lists_per_row, first_list + (k + 1) * lists_per_row):
            for e in range(events.begins[q], events.begins[q] + events.counts[q]):
                begins[np.int64(events.indices[e]) // PANEL * rows + k] += 1
    end = 0
    for q in range(panels * rows):
        end, begins[q] = end + begins[q], end
    begins[panels * rows] = end
    for k in range(rows):
        panel, to = 0, begins[k]
        for q in range(first_list + k * lists_per_row, first_list + (k + 1) * lists_per_row):
            for e in range(events.begins[q], events.begins[q] + events.counts[q]):
                unit = events.indices[e]
                while unit >= (panel + 1) * PANEL:
                    panel += 1
                    to = begins[panel * rows + k]
                # planted fault: order of two units
                indices[to], values[to] = unit, events.values[e]
                to += 1


@compiled
def tile_product(column_tile, pools, bias_begin, n_pre, every_unit, workspace, rows, drives, drive_pitch):
    """One column tile of kind ROW_TILES for many drive rows, from their bias on; units in ascending order.

    The sums are formed in `workspace.tile`, because drive rows lie a page apart: more pages than the address cache of a
    core holds.
    """
    low, width = column_tile[LOW], column_tile[HIGH] - column_tile[LOW]
    for k in range(rows):
        copy(pools.biases, bias_begin + low, workspace.tile, k * ROW_TILE, width)
    if column_tile[STORAGE] == FLOAT32:
        _add_row_tile(column_tile, pools.values, pools, n_pre, every_unit, workspace, rows)
    elif column_tile[STORAGE] == BFLOAT16:
        _add_row_tile(column_tile, pools.values.view(np.uint16), pools, n_pre, every_unit, workspace, rows)
    else:
        _add_row_tile(column_tile, pools.values.view(np.int8), pools, n_pre, every_unit, workspace, rows)
    for k in range(rows):
        copy(workspace.tile, k * ROW_TILE, drives, k * drive_pitch + low, width)


@inlined
def _add_row_tile(column_tile, weights, pools, n_pre, every_unit, workspace, rows):
    """Add the terms of the active units, or of every unit, to `workspace.tile`, for one storage."""
    if every_unit:
        dense_product(column_tile, weights, pools.values, n_pre, workspace.dense_inputs, rows, workspace.tile)
    else:
        panel_spmm(column_tile, weights, pools.values, n_pre, workspace, rows)


@allocating
def blas_product(column_tile, pools, bias_begin, n_pre, workspace, rows, drives, drive_pitch):
    """One column tile through BLAS, over every unit. Not exact, because BLAS chooses the order of the terms."""
    low, width, v0 = column_tile[LOW], column_tile[WIDTH], column_tile[VALUES]
    weights = pools.values[v0 : v0 + n_pre * width].reshape((n_pre, width))
    x, product = workspace.dense_inputs[: rows * n_pre], workspace.blas_product[: rows * width]
    np.dot(x.reshape((rows, n_pre)), weights, product.reshape((rows, width)))
    for k in range(rows):
        for i in range(width):
            drives[k * drive_pitch + low + i] = product[k * width + i] + pools.biases[bias_begin + low + i]


@compiled
def panel_spmm(column_tile, weights, scales, n_pre, workspace, rows):
    """Add the events that `bin_by_panel` sorted to `workspace.tile`: those of one panel to all drive rows, then the
    next panel.

    The weights of a panel stay in the L1 cache. With each drive row some lines of the next panel are prefetched.
    """
    begins, ids, values = workspace.panel_begins, workspace.panel_indices, workspace.panel_values
    tile = workspace.tile
    # planted fault: scale of another unit, panels
    start, pitch, s0 = _values_at(column_tile, weights), column_tile[PITCH], column_tile[SCALES]
    size, line = PANEL * pitch, LINE // weights.itemsize
    share, last, vectors = ceil_div(size, rows * line) * line, start + n_pre * pitch, column_tile[WIDTH] // LANES
    for panel in range(ceil_div(n_pre, PANEL)):
        upcoming = start + (panel + 1) * size
        for k in range(rows):
            for i in range(upcoming, min(last, upcoming + share), line):
                prefetch_far(weights, i)
            upcoming += share
            first, at = begins[panel * rows + k], k * ROW_TILE
            # planted fault: last event of a panel
            count = begins[panel * rows + k + 1] - first
            add_near_rows(tile, at, weights, start, pitch, scales, s0, ids, values, first, count, vectors)


@compiled
def dense_product(column_tile, weights, scales, n_pre, x, rows, tile):
    """tile += x @ weights over every unit, whether active or not, by register tiles of some drive rows and columns.

    x : (rows * n_pre,) float32, dense inputs
    """
    start, width = _values_at(column_tile, weights), column_tile[WIDTH]
    pitch, s0 = column_tile[PITCH], column_tile[SCALES]
    wide, many = MULTIPLY_VECTORS * LANES, rows // MULTIPLY_ROWS * MULTIPLY_ROWS
    for j in range(0, n_pre, MULTIPLY_UNITS):
        # planted fault: unit skipped
        units = min(MULTIPLY_UNITS, n_pre - j)
        for i in range(0, width // wide * wide, wide):
            for k in range(0, many, MULTIPLY_ROWS):
                at, row = i + k * ROW_TILE, k * n_pre
                multiply_tile(tile, at, ROW_TILE, weights, start + i, pitch, scales, s0, x, row, n_pre, j, units)
            for k in range(many, rows):
                at, row = i + k * ROW_TILE, k * n_pre
                multiply_row(tile, at, ROW_TILE, weights, start + i, pitch, scales, s0, x, row, n_pre, j, units)
        for i in range(width // wide * wide, width, LANES):
            for k in range(rows):
                at, row = i + k * ROW_TILE, k * n_pre
                multiply_edge(tile, at, ROW_TILE, weights, start + i, pitch, scales, s0, x, row, n_pre, j, units)
