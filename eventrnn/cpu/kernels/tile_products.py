"""Weights times events, many drive rows at once: column tiles of kinds ROW_TILES, SINGLE_TILES and BLAS."""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn._integers import ceil_div
from eventrnn.cpu.kernels.emit import LINE
from eventrnn.cpu.kernels.jit import inlined
from eventrnn.cpu.kernels.microkernels import (
    MULTIPLY_ROWS,
    MULTIPLY_VECTORS,
    add_near_rows,
    multiply_edge,
    multiply_row,
    multiply_tile,
    prefetch_far,
)
from eventrnn.cpu.kernels.row_products import values_at
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.single_weights import expand
from eventrnn.cpu.kernels.spmm import copy
from eventrnn.cpu.tables import HIGH, INDEX, LOW, PITCH, POINTERS, ROW_TILE, SCALES, SMALL_PANEL_BITS, VALUES, WIDTH

# Units per pass of `dense_product`. The weights of a column tile for so many units stay in the L1 cache while they are
# multiplied with all drive rows.
MULTIPLY_UNITS = 128

# Units per panel, as binary logarithms. The rows of a panel in a column tile stay in the L1 cache while the events of
# all drive rows are added. A panel of 128 rows of float32 fills an L1 cache of 32 KB: for 20 drive rows, 10 % of the
# units active, a product of half as many took three quarters of the time. More drive rows use each weight so often that
# longer lists of events are faster.
PANEL_BITS = 7

# Drive rows up to which panels of float32 weights are small.
SMALL_PANEL_ROWS = 64


@inlined
def panel_bits(rows, weights):
    """Binary logarithm of the units per panel, for so many drive rows and the dtype of the weights."""
    return SMALL_PANEL_BITS if weights.itemsize == 4 and rows <= SMALL_PANEL_ROWS else PANEL_BITS


@inlined
def densify(n_pre, events, x):
    """Write the events of each drive row as a dense row of `n_pre` numbers to `x`, the workspace's `dense_inputs`."""
    lists = events.lists
    for k in range(events.rows):
        for j in range(k * n_pre, (k + 1) * n_pre):
            x[j] = cells.ZERO
        first = events.first + k * events.per_row
        for q in range(first, first + events.per_row):
            for e in range(lists.begins[q], lists.begins[q] + lists.counts[q]):
                x[k * n_pre + lists.indices[e]] = lists.values[e]


@inlined
def bin_by_panel(n_pre, bits, events, workspace):
    """Sort the events into panels of 2**bits units, and within a panel by drive row, the order in which they are read.

    The events of row k in panel q begin at panel_begins[q * rows + k] and end where the next ones begin. In the order
    of rows instead, the lists of 80 rows of 135 events each exceed the L1 cache, and the product took a fifth longer.
    """
    begins, indices, values = workspace.panel_begins, workspace.panel_indices, workspace.panel_values
    lists, rows, panels = events.lists, events.rows, ceil_div(n_pre, 1 << bits)
    for q in range(panels * rows):
        begins[q] = 0
    for k in range(rows):
        first = events.first + k * events.per_row
        for q in range(first, first + events.per_row):
            for e in range(lists.begins[q], lists.begins[q] + lists.counts[q]):
                begins[(np.int64(lists.indices[e]) >> bits) * rows + k] += 1
    end = 0
    for q in range(panels * rows):
        end, begins[q] = end + begins[q], end
    begins[panels * rows] = end
    for k in range(rows):
        panel, to, first = 0, begins[k], events.first + k * events.per_row
        for q in range(first, first + events.per_row):
            for e in range(lists.begins[q], lists.begins[q] + lists.counts[q]):
                unit = lists.indices[e]
                while unit >> bits > panel:
                    panel += 1
                    to = begins[panel * rows + k]
                # planted fault: order of two units
                indices[to], values[to] = unit, lists.values[e]
                to += 1


@inlined
def tile_product(column_tile, weights, tables, bias_begin, n_pre, every_unit, rows, drives):
    """One column tile of kind ROW_TILES for many drive rows, from their bias on; units in ascending order.

    The sums are formed in `workspace.tile`, because drive rows lie a page apart: more pages than the address cache of a
    core holds.
    """
    low, width = column_tile[LOW], column_tile[HIGH] - column_tile[LOW]
    pools, workspace = tables.pools, tables.workspace
    for k in range(rows):
        copy(pools.biases, bias_begin + low, workspace.tile, k * ROW_TILE, width)
    if every_unit:
        dense_product(column_tile, weights, pools.values, n_pre, workspace.dense_inputs, rows, workspace.tile)
    else:
        panel_spmm(column_tile, weights, pools.values, n_pre, workspace, rows)
    for k in range(rows):
        copy(workspace.tile, k * ROW_TILE, drives, k * tables.drive_pitch + low, width)


@inlined
def single_tile_product(column_tile, weights, tables, bias_begin, n_pre, rows, drives):
    """One column tile of kind SINGLE_TILES for many drive rows, from their bias on; units in ascending order.

    The weights of a panel are made dense in `workspace.scratch`, which stays in the L1 cache while the events of all
    drive rows are added to `workspace.tile`. A panel without events is left out. With each drive row some lines of the
    next panel are prefetched; after the last panel that is the first one of the next column tile.
    """
    low, width, vectors = column_tile[LOW], column_tile[HIGH] - column_tile[LOW], column_tile[WIDTH] // LANES
    i0, p0, v0 = column_tile[INDEX], column_tile[POINTERS], values_at(column_tile, weights)
    pools, workspace = tables.pools, tables.workspace
    begins, ids, values = workspace.panel_begins, workspace.panel_indices, workspace.panel_values
    units, panel, tile, scales = 1 << SMALL_PANEL_BITS, workspace.scratch, workspace.tile, pools.values
    # Weights per prefetch. An index has two bytes, more than an int8 weight.
    line = LINE // max(weights.itemsize, 2)
    for k in range(rows):
        copy(pools.biases, bias_begin + low, tile, k * ROW_TILE, width)
    for q in range(ceil_div(n_pre, units)):
        if begins[q * rows] == begins[(q + 1) * rows]:
            continue
        for i in range(units * ROW_TILE):
            panel[i] = cells.ZERO
        first, last, s0 = pools.pointers[p0 + q], pools.pointers[p0 + q + 1], column_tile[SCALES] + q * units
        # planted fault: scale of another unit, panels of single weights
        # planted fault: rest of a panel dropped
        expand(panel, pools.index, i0, first, last - first, scales, s0, weights, v0)
        start, upcoming, share = -q * units * ROW_TILE, last, ceil_div(last - first, rows * line) * line
        for k in range(rows):
            for i in range(upcoming, upcoming + share, line):
                prefetch_far(weights, v0 + i)
                prefetch_far(pools.index, i0 + i // 2)
            upcoming += share
            first, at = begins[q * rows + k], k * ROW_TILE
            # planted fault: last event of a panel of single weights
            count = begins[q * rows + k + 1] - first
            add_near_rows(tile, at, panel, start, ROW_TILE, scales, 0, ids, values, first, count, vectors)
    for k in range(rows):
        copy(tile, k * ROW_TILE, drives, k * tables.drive_pitch + low, width)


@inlined
def blas_product(column_tile, tables, bias_begin, n_pre, rows, drives):
    """One column tile through BLAS, over every unit. Not exact, because BLAS chooses the order of the terms."""
    low, width, v0 = column_tile[LOW], column_tile[WIDTH], column_tile[VALUES]
    pools, workspace = tables.pools, tables.workspace
    weights = pools.values[v0 : v0 + n_pre * width].reshape((n_pre, width))
    x, product = workspace.dense_inputs[: rows * n_pre], workspace.scratch[: rows * width]
    np.dot(x.reshape((rows, n_pre)), weights, product.reshape((rows, width)))
    for k in range(rows):
        for i in range(width):
            drives[k * tables.drive_pitch + low + i] = product[k * width + i] + pools.biases[bias_begin + low + i]


@inlined
def panel_spmm(column_tile, weights, scales, n_pre, workspace, rows):
    """Add the events that `bin_by_panel` sorted to `workspace.tile`: those of one panel to all drive rows, then the
    next panel.

    The weights of a panel stay in the L1 cache. With each drive row some lines of the next panel are prefetched: after
    the last panel of a column tile, those that follow in memory, which are the first panel of the next column tile.
    """
    begins, ids, values = workspace.panel_begins, workspace.panel_indices, workspace.panel_values
    tile = workspace.tile
    # planted fault: scale of another unit, panels
    start, pitch, s0 = values_at(column_tile, weights), column_tile[PITCH], column_tile[SCALES]
    units, line = 1 << panel_bits(rows, weights), LINE // weights.itemsize
    size, vectors = units * pitch, column_tile[WIDTH] // LANES
    share = ceil_div(size, rows * line) * line
    for panel in range(ceil_div(n_pre, units)):
        upcoming = start + min((panel + 1) * units, n_pre) * pitch
        last = min(len(weights), upcoming + size)
        for k in range(rows):
            for i in range(upcoming, min(last, upcoming + share), line):
                prefetch_far(weights, i)
            upcoming += share
            first, at = begins[panel * rows + k], k * ROW_TILE
            # planted fault: last event of a panel
            count = begins[panel * rows + k + 1] - first
            add_near_rows(tile, at, weights, start, pitch, scales, s0, ids, values, first, count, vectors)


@inlined
def dense_product(column_tile, weights, scales, n_pre, x, rows, tile):
    """tile += x @ weights over every unit, whether active or not, by register tiles of some drive rows and columns.

    x : (rows * n_pre,) float32, dense inputs
    """
    start, width = values_at(column_tile, weights), column_tile[WIDTH]
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
