"""Sparse products (SpMM) of training: input drives, and gradients of weights.

`M` is a matrix of rows, `pitch` floats apart: weights by presynaptic unit (input drives), or deltas by step and sample
(weight gradients). The other operand is a list of events per row of the result.

    add_rows       C[r] += value * M[j] over r's events (j, value), a strip of columns wide
    add_segments   the same for stored segments of a weight gradient only

Sums take their terms in ascending order of j (unit; or step and sample), one FMA per term, so that skipping a silent
unit changes no bit. References: `reference.propagate` for the drives, `reference.backward` for the weight gradients.

Ownership: in kernels that end in `_drives` and `_gradient`, threads take rows, strips of columns or segments from a
counter that all share; scratch has a row per thread. The kernels that copy between parameters and packed weights give
each thread an equal share. Shapes and dtypes are in `records.py`.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.cell_update import compact_events
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.microkernels import NEAR_TILE, add_near_rows, prefetch_far
from eventrnn.cpu.kernels.simd import LANES, load
from eventrnn.cpu.kernels.simd_reductions import store_past
from eventrnn.cpu.kernels.spmm import copy, propagate_all, workspace_of
from eventrnn.cpu.kernels.sync import next_chunk, next_index
from eventrnn.cpu.tables import EventLists, RowEvents, ThreadTables
from eventrnn.training.bptt.kernels.event_lists import TILE_ROWS, events_csr, share
from eventrnn.training.bptt.kernels.records import CompressedEvents

# Columns of a strip: their sums stay in registers, and a tile of M of that width stays in the L1 cache.
STRIP = NEAR_TILE * LANES

# Rows of a tile of delta for segments, which are narrower than a strip.
SEGMENT_ROWS = 2 * TILE_ROWS


# --- sums of rows -------------------------------------------------------------------------------------------


@compiled
def add_rows(lists, rows, m, m_rows, pitch, column, width, m_tile, strip):
    """strip[r] += the sum over r's events (j, value) of value * M[j, column : column + width], one FMA per term.

    lists  : CompressedEvents of `rows` rows by `event_lists.events_csr`, in tiles of TILE_ROWS rows of M
    strip  : (rows, STRIP), of which the first `width` columns are used
    m_tile : scratch (TILE_ROWS, STRIP), to which a tile of M is copied so that no vector crosses a cache line, which
             would double its cost

    Measured with 1350 units, 5600 rows, 10 % active
    and two threads: 62 ms from tiles in the L2 cache (256 rows, 16 vectors), 44 ms from tiles in the L1 cache, as here.
    """
    order, indptr, indices, values = lists.order, lists.indptr, lists.indices, lists.values
    for k in range(-(-m_rows // TILE_ROWS)):
        base = k * TILE_ROWS
        for j in range(min(TILE_ROWS, m_rows - base)):
            copy(m, (base + j) * pitch + column, m_tile, j * STRIP, width)
        # Prefetch the next tile meanwhile, row by row.
        coming, fetched = base + TILE_ROWS, 0
        every = due = max(1, rows // TILE_ROWS)
        for q in range(rows):
            due -= 1
            if due == 0 and coming < m_rows and fetched < TILE_ROWS:
                for i in range(coming * pitch + column, coming * pitch + column + STRIP, LANES):
                    prefetch_far(m, i)
                coming, fetched, due = coming + 1, fetched + 1, every
            at = indptr[k * (rows + 1) + q]
            count = indptr[k * (rows + 1) + q + 1] - at
            if count > 0:
                row = order[k * rows + q] * STRIP
                start = -base * STRIP
                add_near_rows(strip, row, m_tile, start, STRIP, m_tile, 0, indices, values, at, count, NEAR_TILE)


@compiled
def add_segments(entries, first, last, lists, rows, n, delta, pitch, m_tile, out):
    """Weight gradients of the segments `chosen[first:last]` of `entries` (StoredEntries), which are sorted by column.

    out[p] = the sum over the events (row, value) of p's unit of value * delta[row, columns[p] : columns[p] + width],
    one FMA per term.

    lists  : CompressedEvents of n units by `events_csc`, unsorted, in tiles of SEGMENT_ROWS rows
    m_tile : scratch (SEGMENT_ROWS, width)
    """
    chosen, units, columns, width = entries.chosen, entries.units, entries.columns, entries.width
    indptr, indices, values = lists.indptr, lists.indices, lists.values
    for k in range(first, last):
        for i in range(chosen[k] * width, (chosen[k] + 1) * width):
            out[i] = cells.ZERO
    k = first
    while k < last:
        column, end = columns[chosen[k]], k + 1
        while end < last and columns[chosen[end]] == column:
            end += 1
        for tile in range(-(-rows // SEGMENT_ROWS)):
            base = tile * SEGMENT_ROWS
            for r in range(base, min(rows, base + SEGMENT_ROWS)):
                copy(delta, r * pitch + column, m_tile, (r - base) * width, width)
            for q in range(k, end):
                p = chosen[q]
                at = indptr[tile * (n + 1) + units[p]]
                count = indptr[tile * (n + 1) + units[p] + 1] - at
                if count > 0:
                    to, start, vectors = p * width, -base * width, width // LANES
                    add_near_rows(out, to, m_tile, start, width, m_tile, 0, indices, values, at, count, vectors)
        k = end


# --- whole matrices, by all threads -------------------------------------------------------------------------

# Rows of drives that a thread takes together. A strip of them fits in the L2 cache. Towards the end fewer rows are
# taken, down to LEAST_ROWS, so that all threads end at about the same time.
STRIP_ROWS, LEAST_ROWS = 1024, 128

# Rows of drives that a thread takes together for stored weights, which read nothing twice.
LISTED_ROWS = 128

# The smallest number of segments of a weight gradient that a thread takes together, because neighbouring segments share
# the columns of delta that they read.
LEAST_SEGMENTS = 64


@compiled
def input_drives(
    thread, n_threads, counter, x, rows, w, n_pre, columns, bias, drive_out, pitch, lists, list_scratch, strip_scratch
):
    """Drives of all rows of x (rows, n_pre) from dense weights w (n_pre, columns): the bias, then the terms of the
    events in ascending unit.

    drive_out : (rows, pitch); rows begin on cache lines
    lists     : CompressedEvents with a leading axis `threads`, for STRIP_ROWS rows each
    """
    own = CompressedEvents(lists.order[thread], lists.indptr[thread], lists.indices[thread], lists.values[thread])
    counts, bins = list_scratch.counts[thread], list_scratch.bins[thread]
    tile, strip = strip_scratch.tile[thread], strip_scratch.strip[thread]
    first, some = next_chunk(counter, rows, STRIP_ROWS, LEAST_ROWS, n_threads)
    while some > 0:
        events_csr(x, first * n_pre, some, n_pre, TILE_ROWS, own, counts, bins)
        for column in range(0, columns, STRIP):
            width = min(STRIP, columns - column)
            for r in range(some):
                copy(bias, column, strip, r * STRIP, width)
            add_rows(own, some, w, n_pre, columns, column, width, tile, strip)
            whole = width // LANES * LANES
            for r in range(some):
                at = (first + r) * pitch + column
                # Bypass the caches, which could not hold the drives of a window anyway.
                for i in range(0, whole, LANES):
                    store_past(drive_out, at + i, load(strip, r * STRIP + i))
                copy(strip, r * STRIP + whole, drive_out, at + whole, width - whole)
        first, some = next_chunk(counter, rows, STRIP_ROWS, LEAST_ROWS, n_threads)


@compiled
def stored_drives(thread, n_threads, counter, x, weights, n_pre, rows, drive_out, pitch, events, workspaces):
    """`input_drives` from stored segments or single weights, by the product of the inference engine.

    weights : PackedWeights, of which the tiles of thread 0 hold all columns
    events  : `cpu.tables.EventLists` with a leading axis `threads`, one list for each of LISTED_ROWS rows
    workspaces : `cpu.tables.Workspace` with a leading axis `threads`
    """
    tables = ThreadTables(weights.tiles[0], weights.pools, workspace_of(workspaces, thread), pitch)
    indices, values = events.indices[thread], events.values[thread]
    begins, counts = events.begins[thread], events.counts[thread]
    own = EventLists(indices, values, begins, counts)
    first, some = next_chunk(counter, rows, LISTED_ROWS, 1, n_threads)
    while some > 0:
        to = 0
        for r in range(some):
            begins[r], counts[r] = to, compact_events(x, (first + r) * n_pre, 0, n_pre, indices, values, to)
            to += counts[r]
        propagate_all(
            tables, 0, len(tables.column_tiles), 0, n_pre, RowEvents(own, 0, 1, some), drive_out[first * pitch :]
        )
        first, some = next_chunk(counter, rows, LISTED_ROWS, 1, n_threads)


@compiled
def dense_gradient(
    thread, n_threads, counter, lists, rows, n_pre, delta, pitch, gradient_out, columns, low, high, strip_scratch
):
    """Columns `low` to `high` of a weight gradient (n_pre, columns), all of them written. Threads take strips.

    lists : CompressedEvents by `events_csc`, sorted
    """
    tile, strip = strip_scratch.tile[thread], strip_scratch.strip[thread]
    column = low + next_index(counter) * STRIP
    while column < high:
        width = min(STRIP, high - column)
        for i in range(n_pre * STRIP):
            strip[i] = cells.ZERO
        add_rows(lists, n_pre, delta, rows, pitch, column, width, tile, strip)
        for r in range(n_pre):
            copy(strip, r * STRIP, gradient_out, r * columns + column, width)
        column = low + next_index(counter) * STRIP


@compiled
def segment_gradient(thread, n_threads, counter, entries, lists, rows, n_pre, delta, pitch, segment_tile, out):
    """Gradients of stored segments (`add_segments`). Threads take segments; `segment_tile` has a row per thread."""
    total = len(entries.chosen)
    most = max(LEAST_SEGMENTS, total // (4 * n_threads))
    first, some = next_chunk(counter, total, most, LEAST_SEGMENTS, n_threads)
    while some > 0:
        add_segments(entries, first, first + some, lists, rows, n_pre, delta, pitch, segment_tile[thread], out)
        first, some = next_chunk(counter, total, most, LEAST_SEGMENTS, n_threads)


@compiled
def single_gradient(
    thread, n_threads, counter, entries, strips, low, high, lists, rows, n_pre, delta, pitch, strip_scratch, out
):
    """Gradients of single stored weights within columns `low` to `high`.

    strips : (strips + 1,) int64, where the entries of each strip begin among `entries.chosen`

    A strip of the dense gradient is formed for all units that fired, and the stored entries are picked from it:
    gathering from delta would read the same cache lines. Threads take strips.
    """
    tile, strip, chosen = strip_scratch.tile[thread], strip_scratch.strip[thread], entries.chosen
    k = next_index(counter)
    while k < len(strips) - 1:
        column = low + k * STRIP
        for i in range(n_pre * STRIP):
            strip[i] = cells.ZERO
        width = min(STRIP, high - column)
        add_rows(lists, n_pre, delta, rows, pitch, column, width, tile, strip)
        for e in range(strips[k], strips[k + 1]):
            p = chosen[e]
            out[p] = strip[np.int64(entries.units[p]) * STRIP + entries.columns[p] - column]
        k = next_index(counter)


# --- between parameters and packed weights ------------------------------------------------------------------


@compiled
def pack_tiles(thread, n_threads, w, columns, tiles, n, values):
    """Copy w (n, columns) into column tiles. A row of `tiles` (tiles, 4) is: first column, columns, where the tile
    begins in `values`, floats from row to row. A thread copies its share of the units."""
    for j in range(share(n, 1, thread, n_threads), share(n, 1, thread + 1, n_threads)):
        for k in range(len(tiles)):
            low, width = tiles[k, 0], tiles[k, 1]
            at = tiles[k, 2] + j * tiles[k, 3]
            copy(w, j * columns + low, values, at, width)


@compiled
def pack_segments(thread, n_threads, w, columns, units, starts, valid, width, values):
    """Copy stored segments from w (n, columns): `valid` columns of each, from `starts` on. The padding of a segment is
    not written. A thread copies its share of the segments."""
    for p in range(share(len(units), 1, thread, n_threads), share(len(units), 1, thread + 1, n_threads)):
        copy(w, np.int64(units[p]) * columns + starts[p], values, p * width, np.int64(valid[p]))


@compiled
def unpack_segments(thread, n_threads, values, columns, units, starts, valid, width, out):
    """The inverse of `pack_segments`, into a matrix (n, columns) whose other elements are not written."""
    for p in range(share(len(units), 1, thread, n_threads), share(len(units), 1, thread + 1, n_threads)):
        copy(values, p * width, out, np.int64(units[p]) * columns + starts[p], np.int64(valid[p]))


@compiled
def join_segments(thread, n_threads, values, valid, ends, width, out):
    """Copy the `valid` columns of all segments side by side, without padding; segment p ends at ends[p]."""
    for p in range(share(len(valid), 1, thread, n_threads), share(len(valid), 1, thread + 1, n_threads)):
        copy(values, p * width, out, ends[p] - valid[p], np.int64(valid[p]))


@compiled
def find_difference(thread, n_threads, a, b, found_out):
    """found_out[thread]: whether a and b differ within the thread's share."""
    found_out[thread] = False
    for i in range(share(len(a), 1, thread, n_threads), share(len(a), 1, thread + 1, n_threads)):
        if a[i] != b[i]:
            found_out[thread] = True
            return
