"""The products of training over events, thread by thread: drives, gradients of weights, gradients of what was sent.

`M` is a matrix of rows (weights by presynaptic unit, or deltas by step and sample), rows `pitch` apart.

    add_rows         C[r] += value * M[j] over a list of r's (j, value): drives of a window, and weight gradients
    add_pieces       the same for stored pieces only: weight gradients of pruned matrices
    dots, dot_pieces, dot_single
                     d[b, j] += M[j] . delta[b] for listed pairs: gradients of what was sent, where it has a use

Weight gradients add their terms in ascending (step, sample), one FMA a term, so a silent unit that is skipped
changes no bit. Dots add sixteen lanes by themselves (`vectors.dot`): not the order of BLAS, but the same bits for any
list, any number of threads and any window.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.jit import compiled
from eventrnn.rows import add_near_rows_1, add_near_rows_2, add_near_rows_4, add_near_rows_8, add_near_rows_16
from eventrnn.simd import AVX512, LANES, bits, load, lowest_bit, store
from eventrnn.steps import send
from eventrnn.training.vectors import dot, dot_2, dot_4, dot_short, everywhere, gather, sum_lanes
from eventrnn.traverse import copy, propagate_all

# A tile of M, this many rows and vectors, lies in the L2 cache beside the strip of C that takes its sums. Measured at
# 1350 units and 1400 rows, 10 % active, 16 vectors: 42 ms with 64 rows, 37 with 128, 30 with 256, 34 with 512.
TILE_ROWS, TILE_VECTORS = 256, 16 if AVX512 else 4


@compiled
def share(size, unit, part, parts):
    """The first of a thread's share of `size`, in whole units; the share of `part + 1` begins where it ends."""
    whole = -(-size // unit)
    return min(size, unit * (-(-whole * part // parts)))


# --- lists of events ----------------------------------------------------------------------------------------


@compiled
def list_by_row(x, rows, n, tile, starts, ids, sent):
    """Non-zero x (rows, n) by tile of units, then row: entry k * rows + r of `starts` is where tile k of row r begins.

    `ids` (int32) are units. Lists have a vector to spare.
    """
    end, at = 0, 0
    for low in range(0, n, tile):
        high = min(n, low + tile)
        for r in range(rows):
            starts[at] = end
            at += 1
            end += send(x, r * n, low, high, ids, sent, end)
    starts[at] = end


@compiled
def list_by_unit(x, rows, n, tile, starts, ids, sent):
    """Non-zero x (rows, n) by tile of rows, then unit; `ids` are rows, ascending. See `list_by_row`."""
    whole, end, at = n // LANES * LANES, 0, 0
    for first in range(0, rows, tile):
        last, begin = min(rows, first + tile), end
        for k in range(at, at + n + 1):
            starts[k] = 0
        for r in range(first, last):
            for i in range(0, whole, LANES):
                chosen = bits(load(x, r * n + i) != cells.ZERO)
                while chosen != 0:
                    starts[at + i + lowest_bit(chosen)] += 1
                    chosen &= chosen - 1
            for i in range(whole, n):
                starts[at + i] += x[r * n + i] != 0
        for k in range(at, at + n):
            count = starts[k]
            starts[k] = end
            end += count
        for r in range(first, last):
            for i in range(0, whole, LANES):
                chosen = bits(load(x, r * n + i) != cells.ZERO)
                while chosen != 0:
                    j = i + lowest_bit(chosen)
                    to = starts[at + j]
                    ids[to], sent[to], starts[at + j] = r, x[r * n + j], to + 1
                    chosen &= chosen - 1
            for j in range(whole, n):
                if x[r * n + j] != 0:
                    to = starts[at + j]
                    ids[to], sent[to], starts[at + j] = r, x[r * n + j], to + 1
        # Every start has moved to its end, where the next one begins.
        for k in range(at + n, at, -1):
            starts[k] = starts[k - 1]
        starts[at] = begin
        at += n


@compiled
def list_both(part, parts, rows, tile_0, x_0, n_0, starts_0, ids_0, sent_0, tile_1, x_1, n_1, starts_1, ids_1, sent_1):
    """`list_by_unit` of two arrays, a thread each."""
    if part == 0:
        list_by_unit(x_0, rows, n_0, tile_0, starts_0, ids_0, sent_0)
    if part == parts - 1:
        list_by_unit(x_1, rows, n_1, tile_1, starts_1, ids_1, sent_1)


@compiled
def list_open(kind, dampening, support, threshold, v, row, rows, n, low, high, who, counts):
    """Of rows `row` on, the samples in which units `low` to `high` fired or have a slope; returns how many in all.

    Unit j's are who[j * rows:], `counts[j]` of them, ascending, counted from `row`.
    """
    for j in range(low, high):
        counts[j] = 0
    whole, found = low + (high - low) // LANES * LANES, 0
    for b in range(rows):
        at = (row + b) * n
        for i in range(low, whole, LANES):
            value, theta = load(v, at + i), load(threshold, i)
            slope = cells.surrogate_slope(kind, value - theta, dampening, support)
            event = cells.select(value > theta, cells.ONE, cells.ZERO)
            chosen = bits(event + cells.absolute(slope) != cells.ZERO)
            while chosen != 0:
                j = i + lowest_bit(chosen)
                who[j * rows + counts[j]] = b
                counts[j] += 1
                found += 1
                chosen &= chosen - 1
        for j in range(whole, high):
            slope = cells.surrogate_slope(kind, v[at + j] - threshold[j], dampening, support)
            if v[at + j] > threshold[j] or slope != 0:
                who[j * rows + counts[j]] = b
                counts[j] += 1
                found += 1
    return found


@compiled
def list_all(rows, low, high, who, counts):
    """`list_open` where every unit of every row is wanted."""
    for j in range(low, high):
        counts[j] = rows
        for b in range(rows):
            who[j * rows + b] = b
    return rows * (high - low)


# --- sums of rows -------------------------------------------------------------------------------------------


@compiled
def _add_vectors(vectors, c, at, m, start, pitch, ids, sent, first, count):
    """One row of C, some vectors of it."""
    if AVX512 and vectors == 16:
        add_near_rows_16(c, at, m, start, pitch, m, 0, ids, sent, first, count)
    elif AVX512 and vectors == 8:
        add_near_rows_8(c, at, m, start, pitch, m, 0, ids, sent, first, count)
    elif vectors == 4:
        add_near_rows_4(c, at, m, start, pitch, m, 0, ids, sent, first, count)
    elif vectors == 2:
        add_near_rows_2(c, at, m, start, pitch, m, 0, ids, sent, first, count)
    else:
        add_near_rows_1(c, at, m, start, pitch, m, 0, ids, sent, first, count)


@compiled
def add_rows(
    starts,
    ids,
    sent,
    tiles,
    rows,
    first,
    last,
    m,
    m_rows,
    m_pitch,
    fresh,
    c,
    c_pitch,
    low,
    high,
    m_tile,
    m_tail,
    c_tail,
):
    """C[r, i] += sum over the events (j, value) of r of value * M[j, i], for rows `first` to `last`, columns `low` to
    `high`, tile by tile of the lists, one FMA a term. `fresh`: C is zero before, whatever it says.

    Scratch: `m_tile` (TILE_ROWS, 16 TILE_VECTORS), to which a tile of M is copied, for vectors that cross cache lines
    take twice as long (1350 units, 1400 rows, 10 % active: 71 ms as the rows lie, 38 copied); for the columns that fill
    no vector `m_tail` (m_rows, 16), `c_tail` (rows, 16).
    """
    whole = low + (high - low) // LANES * LANES
    i = low
    while i < whole:
        vectors = TILE_VECTORS
        while vectors > (whole - i) // LANES:
            vectors //= 2
        for r in range(first, last if fresh else first):
            for k in range(r * c_pitch + i, r * c_pitch + i + vectors * LANES, LANES):
                store(c, k, everywhere(cells.ZERO))
        wide = vectors * LANES
        for tile in range(tiles):
            base = tile * TILE_ROWS
            for j in range(base, min(m_rows, base + TILE_ROWS)):
                copy(m, j * m_pitch + i, m_tile, (j - base) * wide, wide)
            for r in range(first, last):
                begin = starts[tile * rows + r]
                count = starts[tile * rows + r + 1] - begin
                if count > 0:
                    _add_vectors(vectors, c, r * c_pitch + i, m_tile, -base * wide, wide, ids, sent, begin, count)
        i += wide
    if whole < high:
        for j in range(m_rows):
            copy(m, j * m_pitch + whole, m_tail, j * LANES, high - whole)
        for r in range(first, last):
            if fresh:
                store(c_tail, r * LANES, everywhere(cells.ZERO))
            else:
                copy(c, r * c_pitch + whole, c_tail, r * LANES, high - whole)
        for tile in range(tiles):
            for r in range(first, last):
                begin = starts[tile * rows + r]
                count = starts[tile * rows + r + 1] - begin
                add_near_rows_1(c_tail, r * LANES, m_tail, 0, LANES, m_tail, 0, ids, sent, begin, count)
        for r in range(first, last):
            copy(c_tail, r * LANES, c, r * c_pitch + whole, high - whole)


@compiled
def add_pieces(order, first, last, units, columns, width, starts, ids, sent, delta, pitch, out):
    """Weight gradients of pieces `order[first:last]`: out[p] = sum over events (row, value) of its unit of
    value * delta[row, columns[p] : columns[p] + width], one FMA a term."""
    for k in range(first, last):
        p = order[k]
        unit, at = units[p], p * width
        begin = starts[unit]
        count = starts[unit + 1] - begin
        for i in range(at, at + width):
            out[i] = cells.ZERO
        if width == 64:
            add_near_rows_4(out, at, delta, columns[p], pitch, delta, 0, ids, sent, begin, count)
        elif width == 32:
            add_near_rows_2(out, at, delta, columns[p], pitch, delta, 0, ids, sent, begin, count)
        else:
            add_near_rows_1(out, at, delta, columns[p], pitch, delta, 0, ids, sent, begin, count)


# --- dots ---------------------------------------------------------------------------------------------------


@compiled
def dots(w, pitch, low, count, last, delta, start, d_pitch, first, end, who, counts, most, out, at, n):
    """out[at + b * n + j] += w[j, low : low + count] . delta[start + b * d_pitch + low :] for listed b of units
    `first` to `end`; a row of w is read once for all of them."""
    for j in range(first, end):
        k, listed, row = 0, counts[j], j * most
        a, d = j * pitch + low, start + low
        if count < LANES:
            for k in range(listed):
                b = who[row + k]
                out[at + b * n + j] += dot_short(w, a, delta, d + b * d_pitch, count)
            continue
        while k < listed:
            left = min(listed - k, 4)
            b0, b1 = np.int64(who[row + k]), np.int64(who[row + k + min(1, left - 1)])
            if left > 2:
                # Three are four with the last one twice.
                b2, b3 = np.int64(who[row + k + 2]), np.int64(who[row + k + left - 1])
                s0, s1, s2, s3 = dot_4(
                    w, a, delta, d + b0 * d_pitch, d + b1 * d_pitch, d + b2 * d_pitch, d + b3 * d_pitch, count, last
                )
                out[at + b0 * n + j] += s0
                out[at + b1 * n + j] += s1
                out[at + b2 * n + j] += s2
                if left > 3:
                    out[at + b3 * n + j] += s3
            elif left == 2:
                s0, s1 = dot_2(w, a, delta, d + b0 * d_pitch, d + b1 * d_pitch, count, last)
                out[at + b0 * n + j] += s0
                out[at + b1 * n + j] += s1
            else:
                out[at + b0 * n + j] += dot(w, a, delta, d + b0 * d_pitch, count, last)
            k += left


@compiled
def dot_pieces(values, pointers, columns, width, delta, start, d_pitch, first, end, who, counts, most, out, at, n):
    """`dots` over the stored pieces of each unit, `pointers[2j]` to `pointers[2j + 1]`; four samples at a time."""
    for j in range(first, end):
        begin, stop, row, k = pointers[2 * j], pointers[2 * j + 1], j * most, 0
        while k < counts[j]:
            # Fewer than four are made up with the last one, whose sums are made twice and added once.
            left = min(counts[j] - k, 4)
            b0, b1 = np.int64(who[row + k]), np.int64(who[row + k + min(1, left - 1)])
            b2, b3 = np.int64(who[row + k + min(2, left - 1)]), np.int64(who[row + k + min(3, left - 1)])
            d0, d1, d2, d3 = start + b0 * d_pitch, start + b1 * d_pitch, start + b2 * d_pitch, start + b3 * d_pitch
            s0, s1, s2, s3 = (
                everywhere(cells.ZERO), everywhere(cells.ZERO), everywhere(cells.ZERO), everywhere(cells.ZERO),
            )  # fmt: skip
            # A sum waits four cycles for its last term: two sets of them keep the core busy.
            r0, r1, r2, r3 = s0, s1, s2, s3
            for p in range(begin, stop):
                column, piece = np.int64(columns[p]), p * width
                for i in range(0, width - LANES, 2 * LANES):
                    w, x = load(values, piece + i), load(values, piece + i + LANES)
                    c0, c1, c2, c3 = d0 + column + i, d1 + column + i, d2 + column + i, d3 + column + i
                    s0 = cells.fma(w, load(delta, c0), s0)
                    s1 = cells.fma(w, load(delta, c1), s1)
                    s2 = cells.fma(w, load(delta, c2), s2)
                    s3 = cells.fma(w, load(delta, c3), s3)
                    r0 = cells.fma(x, load(delta, c0 + LANES), r0)
                    r1 = cells.fma(x, load(delta, c1 + LANES), r1)
                    r2 = cells.fma(x, load(delta, c2 + LANES), r2)
                    r3 = cells.fma(x, load(delta, c3 + LANES), r3)
                if width == LANES:
                    w = load(values, piece)
                    s0 = cells.fma(w, load(delta, d0 + column), s0)
                    s1 = cells.fma(w, load(delta, d1 + column), s1)
                    s2 = cells.fma(w, load(delta, d2 + column), s2)
                    s3 = cells.fma(w, load(delta, d3 + column), s3)
            s0, s1, s2, s3 = s0 + r0, s1 + r1, s2 + r2, s3 + r3
            out[at + b0 * n + j] += sum_lanes(s0)
            if left > 1:
                out[at + b1 * n + j] += sum_lanes(s1)
            if left > 2:
                out[at + b2 * n + j] += sum_lanes(s2)
            if left > 3:
                out[at + b3 * n + j] += sum_lanes(s3)
            k += left


@compiled
def dot_single(values, pointers, columns, delta, start, d_pitch, first, end, who, counts, most, out, at, n):
    """`dots` over the stored weights of each unit, sixteen gathered at a time."""
    for j in range(first, end):
        begin, stop, row = pointers[2 * j], pointers[2 * j + 1], j * most
        whole = begin + (stop - begin) // LANES * LANES
        for k in range(counts[j]):
            b = np.int64(who[row + k])
            d, total, rest = start + b * d_pitch, everywhere(cells.ZERO), cells.ZERO
            for p in range(begin, whole, LANES):
                total = cells.fma(load(values, p), gather(delta, d, columns, p), total)
            for p in range(whole, stop):
                rest = cells.fma(values[p], delta[d + columns[p]], rest)
            out[at + b * n + j] += sum_lanes(total) + rest


# --- whole matrices, a thread's share -----------------------------------------------------------------------

# Rows of C that are worked on together: a strip of them, TILE_VECTORS wide, lies in the L2 cache.
STRIP_ROWS = 512
# Rows of delta that dots go over together; they lie in the L2 cache while the weights go by.
DOT_ROWS = 64


@compiled
def input_drives(
    part, parts, starts, ids, sent, rows, w, n_pre, columns, bias, drive_out, pitch, m_tile, m_tail, c_tail
):
    """Drives of all rows from dense weights: the bias, then the events' terms in ascending unit. Splits rows."""
    tiles, end = -(-n_pre // TILE_ROWS), share(rows, 1, part + 1, parts)
    for first in range(share(rows, 1, part, parts), end, STRIP_ROWS):
        last = min(end, first + STRIP_ROWS)
        for r in range(first, last):
            copy(bias, 0, drive_out, r * pitch, columns)
        add_rows(
            starts, ids, sent, tiles, rows, first, last, w, n_pre, columns, False, drive_out, pitch, 0, columns,
            m_tile[part], m_tail[part], c_tail[part],
        )  # fmt: skip


@compiled
def stored_drives(
    part, parts, windows, values, index, pointers, n_pre, ids, sent, firsts, counts, rows, bias, drive_out, pitch,
    cuts, own_ids, own_sent, lists, amounts, x, tile, product,
):  # fmt: skip
    """`input_drives` from stored pieces or single weights; splits rows."""
    low, high = share(rows, 1, part, parts), share(rows, 1, part + 1, parts)
    propagate_all(
        windows, 0, len(windows), values, index, pointers, bias, 0, n_pre,
        ids, sent, firsts, counts, low, 1, high - low,
        cuts[part], own_ids[part], own_sent[part], lists[part], amounts[part], x[part], tile[part], product[part],
        drive_out[low * pitch :], pitch,
    )  # fmt: skip


@compiled
def dense_gradient(
    part, parts, starts, ids, sent, rows, n_pre, delta, pitch, gradient_out, columns, low, high,
    m_tile, m_tail, c_tail,
):  # fmt: skip
    """Columns `low` to `high` of a weight gradient (n_pre, columns), all of them written. Splits columns."""
    tiles, size = -(-rows // TILE_ROWS), high - low
    begin, end = low + share(size, LANES, part, parts), low + share(size, LANES, part + 1, parts)
    add_rows(
        starts, ids, sent, tiles, n_pre, 0, n_pre, delta, rows, pitch, True, gradient_out, columns, begin, end,
        m_tile[part], m_tail[part], c_tail[part],
    )  # fmt: skip


@compiled
def piece_gradient(part, parts, order, units, columns, width, starts, ids, sent, delta, pitch, out):
    """Gradients of the pieces in `order`, by column, so that a strip of delta stays in cache. Splits pieces."""
    first, last = share(len(order), 1, part, parts), share(len(order), 1, part + 1, parts)
    add_pieces(order, first, last, units, columns, width, starts, ids, sent, delta, pitch, out)


@compiled
def single_gradient(
    part, parts, order, strips, low, high, units, columns, starts, ids, sent, rows, n_pre, delta, pitch, strip, out
):
    """Gradients of the single weights in `order`, those of strip k between `strips[k]` and `strips[k + 1]`.

    A strip, TILE_VECTORS wide, is formed for all units that fired, and what is stored is picked from it; gathering from
    delta would read the same cache lines. Splits strips.
    """
    tiles, wide = -(-rows // TILE_ROWS), TILE_VECTORS * LANES
    for k in range(share(len(strips) - 1, 1, part, parts), share(len(strips) - 1, 1, part + 1, parts)):
        at = low + k * wide
        for i in range(0, n_pre * wide, LANES):
            store(strip[part], i, everywhere(cells.ZERO))
        # Rows of delta have a strip to spare.
        for tile in range(tiles):
            for r in range(n_pre):
                begin = starts[tile * n_pre + r]
                count = starts[tile * n_pre + r + 1] - begin
                if count > 0:
                    _add_vectors(TILE_VECTORS, strip[part], r * wide, delta, at, pitch, ids, sent, begin, count)
        pick_strip(strip[part], at, order, strips[k], strips[k + 1], units, columns, out)


# --- between parameters and what the products read ----------------------------------------------------------


@compiled
def pack_tiles(w, columns, table, first, last, n, values):
    """The columns of tile windows `first` to `last` of a table (`packing.ROW_TILES`) from w (n, columns)."""
    for j in range(n):
        for k in range(first, last):
            low, width = table[k, 0], table[k, 1]
            at = table[k, 2] + j * table[k, 3]
            copy(w, j * columns + low, values, at, width)


@compiled
def pack_pieces(w, columns, units, starts, valid, width, first, last, values):
    """Pieces `first` to `last` from w (n, columns): `valid` columns of each, from `starts` on; the rest stays."""
    for p in range(first, last):
        copy(w, np.int64(units[p]) * columns + starts[p], values, p * width, np.int64(valid[p]))


@compiled
def unpack_pieces(values, columns, units, starts, valid, width, first, last, out):
    """`pack_pieces` the other way, into a matrix (n, columns)."""
    for p in range(first, last):
        copy(values, p * width, out, np.int64(units[p]) * columns + starts[p], np.int64(valid[p]))


@compiled
def pick_strip(scratch, low, order, first, last, units, columns, out):
    """Gradients of single weights from a strip of columns from `low` on, entries `order[first:last]`."""
    for k in range(first, last):
        p = order[k]
        out[p] = scratch[np.int64(units[p]) * (TILE_VECTORS * LANES) + columns[p] - low]
