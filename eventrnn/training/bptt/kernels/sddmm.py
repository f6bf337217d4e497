"""Gradients of what was sent: d[b, j] += M[j] . delta[b] for listed pairs of a sample b and a unit j.

`M` is a matrix of weights by presynaptic unit; `delta` has a row a step and sample, `pitch` apart. A dot is a sum of
sums of sixteen lanes, and depends on nothing but its operands: not the order of BLAS, but the same bits for any list,
any number of threads and any window.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.microkernels import prefetch, prefetch_far
from eventrnn.cpu.kernels.simd import LANES, load
from eventrnn.cpu.kernels.simd_reductions import everywhere, gather, pair_of_dots, quad_of_dots, sum_lanes
from eventrnn.cpu.kernels.spmm import copy
from eventrnn.training.bptt.kernels.event_lists import PAIRS, share

# Columns that go together: a unit's weights of them stay in registers, and those of a tile of delta in the L1 cache.
CHUNK = 8 * LANES

# Units ahead whose weights are asked for.
AHEAD = 4


@compiled
def pack_chunks(w, pitch, low, count, first, end, n, chunks):
    """Columns `low` to `low + count` of units `first` to `end`, as `dots` reads them: chunk by chunk, the last one
    filled up with zeros. chunks (chunks, n, CHUNK)."""
    for j in range(first, end):
        for column in range(0, count, CHUNK):
            to, width = (column // CHUNK * n + j) * CHUNK, min(CHUNK, count - column)
            copy(w, j * pitch + low + column, chunks, to, width)
            for i in range(to + width, to + CHUNK):
                chunks[i] = cells.ZERO


@compiled
def pack_all_chunks(part, parts, w, n, columns, chunks):
    """`pack_chunks` of a whole matrix (n, columns). Splits units."""
    pack_chunks(w, columns, 0, columns, share(n, 1, part, parts), share(n, 1, part + 1, parts), n, chunks)


@compiled
def dots(
    chunks, low, count, delta, start, pitch, rows, tile_rows, first, end,
    starts, amounts, pairs, sums, tile, out, at, n,
):  # fmt: skip
    """out[at + b * n + j] += w[j, low : low + count] . delta[start + b * pitch + low :], for the pairs that
    `lists.list_pairs` listed of units `first` to `end`, in tiles of `tile_rows` rows.

    Scratch: `sums` as `pairs`; `tile` (tile_rows, CHUNK). 1350 units, 5600 rows, 16 % of pairs, two threads: 137 ms
    with whole rows of delta from the L2 cache, for four samples at a time; 83 so, 88 with the weights as they lie.
    """
    if first >= end:
        # More threads than shares of units: the lists next to these are another thread's.
        return
    tiles = -(-rows // tile_rows)
    for k in range(tiles):
        last = k * n + end - 1
        for p in range(starts[k * n + first], starts[last] + amounts[last]):
            sums[p] = cells.ZERO
    for column in range(0, count, CHUNK):
        width = min(CHUNK, count - column)
        for k in range(tiles):
            source = start + k * tile_rows * pitch + low + column
            for b in range(min(tile_rows, rows - k * tile_rows)):
                copy(delta, source + b * pitch, tile, b * CHUNK, width)
                for i in range(b * CHUNK + width, (b + 1) * CHUNK):
                    tile[i] = cells.ZERO
            # Meanwhile comes what is next: the tile below, or further columns of the first.
            down = k + 1 < tiles
            coming = source + tile_rows * pitch if down else start + low + column + CHUNK
            left = min(tile_rows, rows - (k + 1) * tile_rows if down else rows)
            if not down and column + CHUNK >= count:
                left = 0
            _dots_of_tile(
                chunks, column // CHUNK * n * CHUNK, tile, starts, amounts, k * n, first, end, pairs, sums,
                delta, coming, pitch, left,
            )  # fmt: skip
    for k in range(tiles):
        to = at + k * tile_rows * n
        for j in range(first, end):
            p = starts[k * n + j]
            for q in range(p, p + amounts[k * n + j]):
                out[to + pairs[q] * n + j] += sums[q]


@compiled
def _dots_of_tile(chunks, at, tile, starts, amounts, lists, first, end, pairs, sums, delta, coming, pitch, left):
    """One chunk of columns, one tile of rows; meanwhile asks for `left` rows of delta from `coming` on."""
    every = due = max(1, (end - first) // max(1, left))
    for j in range(first, end):
        due -= 1
        if due == 0 and left > 0:
            for i in range(coming, coming + CHUNK, LANES):
                prefetch_far(delta, i)
            coming, left, due = coming + pitch, left - 1, every
        a, p, listed = at + j * CHUNK, starts[lists + j], amounts[lists + j]
        for i in range(a + AHEAD * CHUNK, a + (AHEAD + 1) * CHUNK, LANES):
            prefetch(chunks, i)
        if listed == 0:
            continue
        w0, w1, w2, w3 = load(chunks, a), load(chunks, a + 16), load(chunks, a + 32), load(chunks, a + 48)
        w4, w5, w6, w7 = load(chunks, a + 64), load(chunks, a + 80), load(chunks, a + 96), load(chunks, a + 112)
        while listed > 2:
            t0, t1, t2, t3 = pairs[p] * CHUNK, pairs[p + 1] * CHUNK, pairs[p + 2] * CHUNK, pairs[p + 3] * CHUNK
            quad_of_dots(tile, t0, t1, t2, t3, w0, w1, w2, w3, w4, w5, w6, w7, sums, p)
            p += PAIRS
            listed -= PAIRS
        if listed > 0:
            t0, t1 = pairs[p] * CHUNK, pairs[p + 1] * CHUNK
            pair_of_dots(tile, t0, t1, w0, w1, w2, w3, w4, w5, w6, w7, sums, p)


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
