"""Sampled dense-dense products (SDDMM): out[b, j] += W[j] . delta[b] for listed pairs of a sample b and a unit j.

`W` (n_pre, columns) holds weights by presynaptic unit; `delta` has one row per step and sample, `pitch` floats apart.
This is the gradient of the units' outputs, the product `delta @ W.T` of `reference.backward`, at the listed pairs.

A kernel call runs within one thread, which owns units `first` to `end` of the sampled output. Weights are shared and
read only; the lists and the scratch are the thread's own (`records.ActivePairs`). A dot product is a sum of sixteen
lane sums. Its bits depend on its operands alone, not on the list, the number of threads or the window; they differ
from those of BLAS.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.microkernels import prefetch, prefetch_far
from eventrnn.cpu.kernels.simd import LANES, load
from eventrnn.cpu.kernels.simd_reductions import everywhere, gather, pair_of_dots, quad_of_dots, sum_lanes
from eventrnn.cpu.kernels.spmm import copy
from eventrnn.training.bptt.kernels.event_lists import PAIRS, share, tile_rows
from eventrnn.training.bptt.kernels.records import ALL, SEGMENTS

# Columns that are handled together: a unit's weights of a chunk stay in registers, a tile of delta in the L1 cache.
CHUNK = 8 * LANES

# Units ahead whose weights are prefetched.
AHEAD = 4


@compiled
def pack_chunks(w, pitch, low, count, first, end, n, chunks):
    """Copy columns `low` to `low + count` of units `first` to `end` into `chunks` (chunks, n, CHUNK), as `sddmm_dense`
    reads them. The last chunk is padded with zeros."""
    for j in range(first, end):
        for column in range(0, count, CHUNK):
            to, width = (column // CHUNK * n + j) * CHUNK, min(CHUNK, count - column)
            copy(w, j * pitch + low + column, chunks, to, width)
            for i in range(to + width, to + CHUNK):
                chunks[i] = cells.ZERO


@compiled
def pack_matrix_chunks(thread, n_threads, w, n, columns, chunks):
    """`pack_chunks` of a whole matrix (n, columns); a thread packs its share of the units."""
    pack_chunks(w, columns, 0, columns, share(n, 1, thread, n_threads), share(n, 1, thread + 1, n_threads), n, chunks)


@compiled
def sddmm(weights, delta, start, pitch, rows, first, end, n, pairs, out, at):
    """out[at + b * n + j] += W[j] . delta of row b, for the pairs of units `first` to `end` that `list_pairs` listed.

    weights : `records.SampledWeights`; only its range of columns is multiplied
    delta   : row b begins at start + b * pitch, column 0
    """
    if weights.layout == ALL:
        sddmm_dense(weights, delta, start, pitch, rows, first, end, n, pairs, out, at)
    elif weights.layout == SEGMENTS:
        sddmm_blocks(weights, delta, start, pitch, rows, first, end, n, pairs, out, at)
    else:
        sddmm_csr(weights, delta, start, pitch, rows, first, end, n, pairs, out, at)


@compiled
def sddmm_dense(weights, delta, start, pitch, rows, first, end, n, pairs, out, at):
    """`sddmm` over all weights of a range of columns, chunk by chunk, from the tiled lists.

    Measured with 1350 units, 5600 rows, 16 % of the pairs and two threads: 137 ms with whole rows of delta from the L2
    cache, four samples at a time; 83 ms as here, with tiles and chunks; 88 ms with unpacked weights.
    """
    if first >= end:
        # With more threads than shares of units, the neighbouring lists belong to another thread.
        return
    low, count, per_tile = weights.first_column, weights.n_columns, tile_rows(rows)
    begins, counts, tile, sums = pairs.tile_begins, pairs.tile_counts, pairs.delta_tile, pairs.sums
    tiles = -(-rows // per_tile)
    for k in range(tiles):
        last = k * n + end - 1
        for p in range(begins[k * n + first], begins[last] + counts[last]):
            sums[p] = cells.ZERO
    for column in range(0, count, CHUNK):
        width = min(CHUNK, count - column)
        for k in range(tiles):
            source = start + k * per_tile * pitch + low + column
            for b in range(min(per_tile, rows - k * per_tile)):
                copy(delta, source + b * pitch, tile, b * CHUNK, width)
                for i in range(b * CHUNK + width, (b + 1) * CHUNK):
                    tile[i] = cells.ZERO
            # Prefetch meanwhile what is copied next: the tile below, or the next chunk of the first tile.
            down = k + 1 < tiles
            coming = source + per_tile * pitch if down else start + low + column + CHUNK
            left = min(per_tile, rows - (k + 1) * per_tile if down else rows)
            if not down and column + CHUNK >= count:
                left = 0
            chunk = column // CHUNK * n * CHUNK
            _sddmm_tile(weights.values, chunk, pairs, k * n, first, end, delta, coming, pitch, left)
    for k in range(tiles):
        to = at + k * per_tile * n
        for j in range(first, end):
            p = begins[k * n + j]
            for q in range(p, p + counts[k * n + j]):
                out[to + pairs.tile_samples[q] * n + j] += sums[q]


@compiled
def _sddmm_tile(chunks, chunk, pairs, lists, first, end, delta, coming, pitch, left):
    """One chunk of columns, one tile of rows. Meanwhile prefetches `left` rows of delta from `coming` on."""
    samples, sums, tile = pairs.tile_samples, pairs.sums, pairs.delta_tile
    every = due = max(1, (end - first) // max(1, left))
    for j in range(first, end):
        due -= 1
        if due == 0 and left > 0:
            for i in range(coming, coming + CHUNK, LANES):
                prefetch_far(delta, i)
            coming, left, due = coming + pitch, left - 1, every
        a, p, listed = chunk + j * CHUNK, pairs.tile_begins[lists + j], pairs.tile_counts[lists + j]
        for i in range(a + AHEAD * CHUNK, a + (AHEAD + 1) * CHUNK, LANES):
            prefetch(chunks, i)
        if listed == 0:
            continue
        w0, w1, w2, w3 = load(chunks, a), load(chunks, a + 16), load(chunks, a + 32), load(chunks, a + 48)
        w4, w5, w6, w7 = load(chunks, a + 64), load(chunks, a + 80), load(chunks, a + 96), load(chunks, a + 112)
        while listed > 2:
            t0, t1 = samples[p] * CHUNK, samples[p + 1] * CHUNK
            t2, t3 = samples[p + 2] * CHUNK, samples[p + 3] * CHUNK
            quad_of_dots(tile, t0, t1, t2, t3, w0, w1, w2, w3, w4, w5, w6, w7, sums, p)
            p += PAIRS
            listed -= PAIRS
        if listed > 0:
            t0, t1 = samples[p] * CHUNK, samples[p + 1] * CHUNK
            pair_of_dots(tile, t0, t1, w0, w1, w2, w3, w4, w5, w6, w7, sums, p)


@compiled
def sddmm_blocks(weights, delta, start, pitch, rows, first, end, n, pairs, out, at):
    """`sddmm` over the stored segments of each unit, four samples at a time, from the untiled lists."""
    values, columns, width, bounds = weights.values, weights.columns, weights.width, weights.bounds
    samples, counts = pairs.samples, pairs.counts
    for j in range(first, end):
        begin, stop, row, k = bounds[2 * j], bounds[2 * j + 1], j * rows, 0
        while k < counts[j]:
            # Fewer than four samples are padded with the last one, whose dot product is then added only once.
            left = min(counts[j] - k, 4)
            b0, b1 = np.int64(samples[row + k]), np.int64(samples[row + k + min(1, left - 1)])
            b2, b3 = np.int64(samples[row + k + min(2, left - 1)]), np.int64(samples[row + k + min(3, left - 1)])
            d0, d1, d2, d3 = start + b0 * pitch, start + b1 * pitch, start + b2 * pitch, start + b3 * pitch
            s0 = s1 = s2 = s3 = everywhere(cells.ZERO)
            # An FMA takes four cycles until its sum can be used again: two sets of sums keep the core busy.
            r0, r1, r2, r3 = s0, s1, s2, s3
            for p in range(begin, stop):
                column, segment = np.int64(columns[p]), p * width
                for i in range(0, width - LANES, 2 * LANES):
                    w, x = load(values, segment + i), load(values, segment + i + LANES)
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
                    w = load(values, segment)
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
def sddmm_csr(weights, delta, start, pitch, rows, first, end, n, pairs, out, at):
    """`sddmm` over the single stored weights of each unit, sixteen gathered at a time, from the untiled lists."""
    values, columns, bounds = weights.values, weights.columns, weights.bounds
    for j in range(first, end):
        begin, stop, row = bounds[2 * j], bounds[2 * j + 1], j * rows
        whole = begin + (stop - begin) // LANES * LANES
        for k in range(pairs.counts[j]):
            b = np.int64(pairs.samples[row + k])
            d, total, rest = start + b * pitch, everywhere(cells.ZERO), cells.ZERO
            for p in range(begin, whole, LANES):
                total = cells.fma(load(values, p), gather(delta, d, columns, p), total)
            for p in range(whole, stop):
                rest = cells.fma(values[p], delta[d + columns[p]], rest)
            out[at + b * n + j] += sum_lanes(total) + rest
