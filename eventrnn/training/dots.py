"""Gradients of what was sent, d[b, j] += weights[j] . delta[b], for listed (sample, unit) pairs: where they have a use.

A dot adds sixteen lanes by themselves (`vectors.dot`): not the order of BLAS, but the same bits for any list, any
number of threads and any window.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.jit import compiled
from eventrnn.simd import LANES, bits, load, lowest_bit, store
from eventrnn.training.vectors import dot, dot_2, dot_4, dot_short, everywhere, gather, sum_lanes
from eventrnn.traverse import copy

# Rows of delta that dots go over together; they lie in the L2 cache while the weights go by.
DOT_ROWS = 64
# `dots_of_window`: units and groups of DOT_ROWS rows that a piece of the weights serves while it is in the L2 cache;
# columns of a piece. Measured at 1350 units and inputs, 16 % of them open, two threads: 36 ms for 1400 rows and 150 for
# 5600, where `dots` of 64 rows at a time took 90 and 250, BLAS (all of them) 64 and 260.
DOT_UNITS, DOT_GROUPS, DOT_COLUMNS = 256, 2, 8 * LANES


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
def dots_of_window(w, count, delta, start, d_pitch, rows, first, end, who, counts, out, at, n, tile, sums):
    """`dots` of up to DOT_GROUPS * DOT_ROWS rows; their listed samples are those of each group of DOT_ROWS, n units
    after the group before. Needs count >= DOT_COLUMNS.

    A step has few rows, and its time goes into reading the weights. A window has many: a tile of delta lies in the L1
    cache (`tile`), a piece of a row of w in registers, and `sums` has the sixteen of each listed pair. Where columns
    are no multiple of DOT_COLUMNS, the last piece begins earlier and has zeros for what it overlaps.
    """
    for low in range(first, end, DOT_UNITS):
        high, p = min(end, low + DOT_UNITS), 0
        for group in range(0, rows, DOT_ROWS):
            for j in range(low, high):
                for _ in range(counts[group // DOT_ROWS * n + j]):
                    store(sums, p, everywhere(cells.ZERO))
                    p += LANES
        for column in range(0, count, DOT_COLUMNS):
            c, p = min(column, count - DOT_COLUMNS), 0
            for group in range(0, rows, DOT_ROWS):
                some = min(DOT_ROWS, rows - group)
                for b in range(some):
                    copy(delta, start + (group + b) * d_pitch + c, tile, b * DOT_COLUMNS, DOT_COLUMNS)
                    for i in range(b * DOT_COLUMNS, b * DOT_COLUMNS + column - c):
                        tile[i] = cells.ZERO
                listed, lists = group // DOT_ROWS * n, group * n
                for j in range(low, high):
                    a, mine = j * count + c, lists + j * some
                    w0, w1, w2, w3 = load(w, a), load(w, a + 16), load(w, a + 32), load(w, a + 48)
                    w4, w5, w6, w7 = load(w, a + 64), load(w, a + 80), load(w, a + 96), load(w, a + 112)
                    for k in range(mine, mine + counts[listed + j]):
                        t = np.int64(who[k]) * DOT_COLUMNS
                        total = cells.fma(w0, load(tile, t), load(sums, p))
                        total = cells.fma(w1, load(tile, t + 16), total)
                        total = cells.fma(w2, load(tile, t + 32), total)
                        total = cells.fma(w3, load(tile, t + 48), total)
                        total = cells.fma(w4, load(tile, t + 64), total)
                        total = cells.fma(w5, load(tile, t + 80), total)
                        total = cells.fma(w6, load(tile, t + 96), total)
                        total = cells.fma(w7, load(tile, t + 112), total)
                        store(sums, p, total)
                        p += LANES
        p = 0
        for group in range(0, rows, DOT_ROWS):
            some = min(DOT_ROWS, rows - group)
            for j in range(low, high):
                mine = group * n + j * some
                for k in range(mine, mine + counts[group // DOT_ROWS * n + j]):
                    out[at + (group + np.int64(who[k])) * n + j] += sum_lanes(load(sums, p))
                    p += LANES


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
