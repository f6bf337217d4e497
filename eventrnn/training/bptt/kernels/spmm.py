"""The products of training over events, thread by thread: drives and gradients of weights.

`M` is a matrix of rows (weights by presynaptic unit, or deltas by step and sample), rows `pitch` apart.

    add_rows         C[r] += value * M[j] over a list of r's (j, value), a strip of columns: drives and weight gradients
    add_pieces       the same for stored pieces only: weight gradients of pruned matrices

Sums take their terms in ascending order (unit; or step and sample), one FMA a term, so a silent unit that is skipped
changes no bit.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.cell_update import send
from eventrnn.cpu.kernels.jit import compiled, inlined
from eventrnn.cpu.kernels.microkernels import (
    add_near_rows_1,
    add_near_rows_2,
    add_near_rows_4,
    add_near_rows_8,
    prefetch_far,
)
from eventrnn.cpu.kernels.simd import AVX512, LANES, load
from eventrnn.cpu.kernels.simd_reductions import store_past
from eventrnn.cpu.kernels.spmm import copy, propagate_all
from eventrnn.cpu.kernels.sync import take, take_piece
from eventrnn.training.bptt.kernels.event_lists import TILE_ROWS, list_by_row, share

# Vectors of columns that go together: sums stay in registers, a tile of M of so many columns in the L1 cache.
TILE_VECTORS = 8 if AVX512 else 4

STRIP = TILE_VECTORS * LANES

# Rows of a tile of delta for pieces, which are narrower.
PIECE_ROWS = 2 * TILE_ROWS


# --- sums of rows -------------------------------------------------------------------------------------------


@inlined
def _add_vectors(vectors, c, at, m, start, ids, sent, first, count):
    """One row of C, some vectors of it, as wide as those of M."""
    pitch = vectors * LANES
    if AVX512 and vectors == 8:
        add_near_rows_8(c, at, m, start, pitch, m, 0, ids, sent, first, count)
    elif vectors == 4:
        add_near_rows_4(c, at, m, start, pitch, m, 0, ids, sent, first, count)
    elif vectors == 2:
        add_near_rows_2(c, at, m, start, pitch, m, 0, ids, sent, first, count)
    else:
        add_near_rows_1(c, at, m, start, pitch, m, 0, ids, sent, first, count)


@compiled
def add_rows(order, starts, ids, sent, rows, m, m_rows, m_pitch, column, width, m_tile, strip):
    """strip[r] += the sum over r's events (j, value) of value * M[j, column : column + width], one FMA a term.

    strip is (rows, STRIP), of which `width` columns mean something. Lists as of `lists.list_by_row`, tiles of M's rows.
    `m_tile` (TILE_ROWS, STRIP) is scratch, to which a tile of M is copied: vectors that cross cache lines take twice as
    long. 1350 units, 5600 rows, 10 % active, two threads: 62 ms from tiles in the L2 cache (256 rows, 16 vectors), 44
    so.
    """
    for k in range(-(-m_rows // TILE_ROWS)):
        base = k * TILE_ROWS
        for j in range(min(TILE_ROWS, m_rows - base)):
            copy(m, (base + j) * m_pitch + column, m_tile, j * STRIP, width)
        # Meanwhile the next tile comes, a row at a time.
        coming, fetched = base + TILE_ROWS, 0
        every = due = max(1, rows // TILE_ROWS)
        for q in range(rows):
            due -= 1
            if due == 0 and coming < m_rows and fetched < TILE_ROWS:
                for i in range(coming * m_pitch + column, coming * m_pitch + column + STRIP, LANES):
                    prefetch_far(m, i)
                coming, fetched, due = coming + 1, fetched + 1, every
            at = starts[k * (rows + 1) + q]
            count = starts[k * (rows + 1) + q + 1] - at
            if count > 0:
                row = order[k * rows + q] * STRIP
                _add_vectors(TILE_VECTORS, strip, row, m_tile, -base * STRIP, ids, sent, at, count)


@compiled
def add_pieces(chosen, first, last, units, columns, width, starts, ids, sent, rows, n, delta, pitch, m_tile, out):
    """Weight gradients of pieces `chosen[first:last]`, by column: out[p] = sum over events (row, value) of its unit of
    value * delta[row, columns[p] : columns[p] + width], one FMA a term. Lists by unit, of n units, as they come, tiles
    of PIECE_ROWS; scratch `m_tile` (PIECE_ROWS, width)."""
    for k in range(first, last):
        for i in range(chosen[k] * width, (chosen[k] + 1) * width):
            out[i] = cells.ZERO
    k = first
    while k < last:
        column, end = columns[chosen[k]], k + 1
        while end < last and columns[chosen[end]] == column:
            end += 1
        for tile in range(-(-rows // PIECE_ROWS)):
            base = tile * PIECE_ROWS
            for r in range(base, min(rows, base + PIECE_ROWS)):
                copy(delta, r * pitch + column, m_tile, (r - base) * width, width)
            for q in range(k, end):
                p = chosen[q]
                at = starts[tile * (n + 1) + units[p]]
                count = starts[tile * (n + 1) + units[p] + 1] - at
                if count > 0:
                    _add_vectors(width // LANES, out, p * width, m_tile, -base * width, ids, sent, at, count)
        k = end


# --- whole matrices, by all threads -------------------------------------------------------------------------

# Drives that are worked on together: a strip of them lies in the L2 cache. The last ones are fewer, not to wait long.
STRIP_ROWS, LEAST_ROWS = 1024, 128

# The same from stored weights, where nothing is read twice.
LISTED_ROWS = 128

# Pieces of a weight gradient that are worked on together, at least: some share the columns of delta that they read.
LEAST_PIECES = 64


@compiled
def input_drives(
    part, parts, queue, x, rows, w, n_pre, columns, bias, drive_out, pitch,
    order, starts, ids, sent, counts, bins, m_tile, strip,
):  # fmt: skip
    """Drives of all rows of x (rows, n_pre) from dense weights: the bias, then the events' terms in ascending unit.
    Threads take rows; scratch is a thread's own, lists and strip for STRIP_ROWS rows. Rows of `drive_out` begin on
    cache lines."""
    first, some = take_piece(queue, rows, STRIP_ROWS, LEAST_ROWS, parts)
    while some > 0:
        lists = order[part], starts[part], ids[part], sent[part]
        list_by_row(x, first * n_pre, some, n_pre, TILE_ROWS, *lists, counts[part], bins[part])
        for column in range(0, columns, STRIP):
            width = min(STRIP, columns - column)
            for r in range(some):
                copy(bias, column, strip[part], r * STRIP, width)
            add_rows(*lists, some, w, n_pre, columns, column, width, m_tile[part], strip[part])
            whole = width // LANES * LANES
            for r in range(some):
                at = (first + r) * pitch + column
                # A window's drives are more than the caches hold.
                for i in range(0, whole, LANES):
                    store_past(drive_out, at + i, load(strip[part], r * STRIP + i))
                copy(strip[part], r * STRIP + whole, drive_out, at + whole, width - whole)
        first, some = take_piece(queue, rows, STRIP_ROWS, LEAST_ROWS, parts)


@compiled
def stored_drives(
    part, parts, queue, x, windows, values, index, pointers, n_pre, rows, bias, drive_out, pitch,
    ids, sent, firsts, counts, cuts, own_ids, own_sent, lists, amounts, scratch, tile, product,
):  # fmt: skip
    """`input_drives` from stored pieces or single weights. Lists, a thread's own, for LISTED_ROWS rows."""
    first, some = take_piece(queue, rows, LISTED_ROWS, 1, parts)
    while some > 0:
        to = 0
        for r in range(some):
            firsts[part, r], counts[part, r] = to, send(x, (first + r) * n_pre, 0, n_pre, ids[part], sent[part], to)
            to += counts[part, r]
        propagate_all(
            windows, 0, len(windows), values, index, pointers, bias, 0, n_pre,
            ids[part], sent[part], firsts[part], counts[part], 0, 1, some,
            cuts[part], own_ids[part], own_sent[part], lists[part], amounts[part],
            scratch[part], tile[part], product[part], drive_out[first * pitch :], pitch,
        )  # fmt: skip
        first, some = take_piece(queue, rows, LISTED_ROWS, 1, parts)


@compiled
def dense_gradient(
    part, parts, queue, order, starts, ids, sent, rows, n_pre, delta, pitch, gradient_out, columns, low, high,
    m_tile, strip,
):  # fmt: skip
    """Columns `low` to `high` of a weight gradient (n_pre, columns), all of them written. Threads take strips; scratch
    is a thread's own, strip for n_pre rows."""
    column = low + take(queue) * STRIP
    while column < high:
        width = min(STRIP, high - column)
        for i in range(n_pre * STRIP):
            strip[part, i] = cells.ZERO
        add_rows(
            order, starts, ids, sent, n_pre, delta, rows, pitch, column, width, m_tile[part], strip[part]
        )  # fmt: skip
        for r in range(n_pre):
            copy(strip[part], r * STRIP, gradient_out, r * columns + column, width)
        column = low + take(queue) * STRIP


@compiled
def piece_gradient(
    part, parts, queue, chosen, units, columns, width, starts, ids, sent, rows, n_pre, delta, pitch, m_tile, out
):
    """Gradients of the pieces `chosen`, by column. Threads take pieces."""
    most = max(LEAST_PIECES, len(chosen) // (4 * parts))
    first, some = take_piece(queue, len(chosen), most, LEAST_PIECES, parts)
    while some > 0:
        add_pieces(
            chosen, first, first + some, units, columns, width, starts, ids, sent, rows, n_pre, delta, pitch,
            m_tile[part], out,
        )  # fmt: skip
        first, some = take_piece(queue, len(chosen), most, LEAST_PIECES, parts)


@compiled
def single_gradient(
    part, parts, queue, chosen, strips, low, high, units, columns, order, starts, ids, sent, rows, n_pre, delta, pitch,
    m_tile, strip, out,
):  # fmt: skip
    """Gradients of the single weights `chosen`, those of strip k between `strips[k]` and `strips[k + 1]`.

    A strip, from column `low` on, is formed for all units that fired, and what is stored is picked from it; gathering
    from delta would read the same cache lines. Threads take strips.
    """
    k = take(queue)
    while k < len(strips) - 1:
        column = low + k * STRIP
        for i in range(n_pre * STRIP):
            strip[part, i] = cells.ZERO
        add_rows(
            order, starts, ids, sent, n_pre, delta, rows, pitch, column, min(STRIP, high - column),
            m_tile[part], strip[part],
        )  # fmt: skip
        pick_strip(strip[part], column, chosen, strips[k], strips[k + 1], units, columns, out)
        k = take(queue)


# --- between parameters and what the products read ----------------------------------------------------------


@compiled
def pack_tiles(part, parts, w, columns, table, n, values):
    """The columns of the tile windows of a table (`packing.ROW_TILES`) from w (n, columns). Splits rows."""
    for j in range(share(n, 1, part, parts), share(n, 1, part + 1, parts)):
        for k in range(len(table)):
            low, width = table[k, 0], table[k, 1]
            at = table[k, 2] + j * table[k, 3]
            copy(w, j * columns + low, values, at, width)


@compiled
def pack_pieces(part, parts, w, columns, units, starts, valid, width, values):
    """Pieces from w (n, columns): `valid` columns of each, from `starts` on; the rest stays. Splits pieces."""
    for p in range(share(len(units), 1, part, parts), share(len(units), 1, part + 1, parts)):
        copy(w, np.int64(units[p]) * columns + starts[p], values, p * width, np.int64(valid[p]))


@compiled
def unpack_pieces(part, parts, values, columns, units, starts, valid, width, out):
    """`pack_pieces` the other way, into a matrix (n, columns)."""
    for p in range(share(len(units), 1, part, parts), share(len(units), 1, part + 1, parts)):
        copy(values, p * width, out, np.int64(units[p]) * columns + starts[p], np.int64(valid[p]))


@compiled
def join_pieces(part, parts, values, valid, ends, width, out):
    """The `valid` columns of pieces one after another; piece p ends at ends[p]. Splits pieces."""
    for p in range(share(len(valid), 1, part, parts), share(len(valid), 1, part + 1, parts)):
        copy(values, p * width, out, ends[p] - valid[p], np.int64(valid[p]))


@compiled
def find_difference(part, parts, a, b, found_out):
    """found_out[part]: whether a differs from b in a thread's share."""
    found_out[part] = False
    for i in range(share(len(a), 1, part, parts), share(len(a), 1, part + 1, parts)):
        if a[i] != b[i]:
            found_out[part] = True
            return


@compiled
def pick_strip(scratch, low, chosen, first, last, units, columns, out):
    """Gradients of single weights from a strip of columns from `low` on, entries `chosen[first:last]`."""
    for k in range(first, last):
        p = chosen[k]
        out[p] = scratch[np.int64(units[p]) * STRIP + columns[p] - low]
