"""Kernels of the benchmarks: FMA rate in registers, and reads of weights without other work.

Every thread calls these functions by itself on its own range; nothing is shared or written but the first vector of
`data`. `values` (float32), `index` and `pointers` (integers) are the pools of packed weights of `cpu/packing.py`, and
`matrix` is one row of their table (`cpu/tables.py`). No function here has a counterpart in reference.py.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.emit import LINE
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.microkernels import prefetch
from eventrnn.cpu.kernels.simd import LANES, bits, load, store
from eventrnn.cpu.tables import (
    BFLOAT16,
    BLAS,
    BLOCKS,
    FEW_BLOCKS,
    FLOAT32,
    INDEX,
    KIND,
    MASKED,
    PITCH,
    POINTERS,
    ROW_TILE,
    ROW_TILES,
    ROWS,
    SINGLE_TILES,
    SMALL_PANEL_BITS,
    STORAGE,
    VALUES,
    WIDTH,
)

# Independent chains: enough to hide the latency of an FMA, few enough for the registers.
CHAINS = 12


@compiled
def multiply_add(rounds, data):
    """Run `CHAINS` independent chains of `rounds` vector FMAs each.

    data : float32, (CHAINS + 4) * LANES: the starting values of the chains; the result overwrites the first vector
    """
    x = load(data, 12 * LANES)
    a, b, c, d = load(data, 0), load(data, LANES), load(data, 2 * LANES), load(data, 3 * LANES)
    e, f, g, h = load(data, 4 * LANES), load(data, 5 * LANES), load(data, 6 * LANES), load(data, 7 * LANES)
    i, j, k, m = load(data, 8 * LANES), load(data, 9 * LANES), load(data, 10 * LANES), load(data, 11 * LANES)
    y = x - x
    for _ in range(rounds):
        a, b, c, d = cells.fma(a, x, y), cells.fma(b, x, y), cells.fma(c, x, y), cells.fma(d, x, y)
        e, f, g, h = cells.fma(e, x, y), cells.fma(f, x, y), cells.fma(g, x, y), cells.fma(h, x, y)
        i, j, k, m = cells.fma(i, x, y), cells.fma(j, x, y), cells.fma(k, x, y), cells.fma(m, x, y)
    store(data, 0, ((a + b) + (c + d)) + ((e + f) + (g + h)) + ((i + j) + (k + m)))


# The probe prefetches the row of the unit this many events ahead.
PROBE_AHEAD = 8


@compiled
def read_rows(matrix, values, index, pointers, indptr, ids, start, stop):
    """Read the weights and indices of the groups `start` to `stop`, and do nothing else.

    indptr, ids : ids[indptr[g] : indptr[g + 1]] are the units whose rows group g reads
    """
    v0, i0, p0, kind = matrix[VALUES], matrix[INDEX], matrix[POINTERS], matrix[KIND]
    # Bytes per weight; offsets into the pool count float32.
    size = 4 if matrix[STORAGE] == FLOAT32 else 2 if matrix[STORAGE] == BFLOAT16 else 1
    total = load(values, 0)
    checksum = 0
    for e in range(indptr[start], indptr[stop]):
        j = ids[e]
        if kind in (ROWS, ROW_TILES, BLAS):
            first, last = j * matrix[PITCH], j * matrix[PITCH] + matrix[WIDTH]
            # Narrow rows end before the hardware prefetcher detects the stream.
            ahead = v0 + np.int64(ids[min(e + PROBE_AHEAD, indptr[stop] - 1)]) * matrix[PITCH] * size // 4
            for k in range(ahead, ahead + min(ROW_TILE, matrix[WIDTH]) * size // 4, LINE // 4):
                prefetch(values, k)
        elif kind in (BLOCKS, FEW_BLOCKS):
            first = pointers[p0 + 3 * j + 2] * matrix[WIDTH]
            last = first + (pointers[p0 + 3 * j + 1] - pointers[p0 + 3 * j]) * matrix[WIDTH]
            for k in range(i0 + pointers[p0 + 3 * j], i0 + pointers[p0 + 3 * j + 1]):
                checksum += index[k]
        else:
            if kind == SINGLE_TILES:
                # The first unit of a panel stands for all.
                panel, inside = j >> SMALL_PANEL_BITS, j & ((1 << SMALL_PANEL_BITS) - 1)
                first, last = pointers[p0 + panel], pointers[p0 + panel + (1 if inside == 0 else 0)]
            else:
                first, last = pointers[p0 + j], pointers[p0 + j + 1]
            # 16-bit indices or masks, two per entry of the pool.
            low, high = (j * matrix[PITCH], (j + 1) * matrix[PITCH]) if kind == MASKED else (first, last)
            for k in range(i0 + low // 2, i0 + high // 2):
                checksum += index[k]
        total = _sum_of(values, v0 + first * size // 4, v0 + last * size // 4, total)
    # The result depends on every value, so that the compiler keeps the reads.
    return bits(total > cells.ZERO) + checksum


@compiled
def read_through(values, first, last, amount):
    """Read `amount` floats of the pool sequentially, again and again from `first` to `last`."""
    total = load(values, 0)
    while amount > 0:
        stop = min(last, first + max(amount, LANES))
        total = _sum_of(values, first, stop, total)
        amount -= max(stop - first, 1)
    return bits(total > cells.ZERO)


@compiled
def _sum_of(values, first, last, total):
    second, third, fourth = total, total, total
    for k in range(first, last - 4 * LANES + 1, 4 * LANES):
        total = total + load(values, k)
        second = second + load(values, k + LANES)
        third = third + load(values, k + 2 * LANES)
        fourth = fourth + load(values, k + 3 * LANES)
    for k in range(first + (last - first) // (4 * LANES) * 4 * LANES, last, LANES):
        total = total + load(values, k)
    return (total + second) + (third + fourth)
