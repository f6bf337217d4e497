"""One traversal a weight format: events of a row into a drive, and a bare read of the same bytes.

Tables and pools are those of `packing.py`.
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.jit import compiled
from eventrnn.packing import BLOCKS, INDEX, KIND, LOW, PITCH, POINTERS, ROWS, SCATTER, VALUES, WIDTH
from eventrnn.rows import (
    TILE,
    add_rows_1,
    add_rows_2,
    add_rows_4,
    add_rows_8,
    add_rows_tile,
    add_scaled_4,
    add_scaled_8,
    add_scaled_16,
    add_scaled_32,
    add_scaled_64,
    prefetch,
)
from eventrnn.simd import LANES, bits, load


@compiled
def propagate(matrix, values, index, pointers, ids, sent, first, count, drive, at):
    """drive[at + i] += weight[j, i] * sent of every event j, ascending j, one FMA a term, over a matrix window.

    Events are `ids[first:first + count]` with values `sent`. Reads only the rows of those units.
    """
    low = matrix[LOW]
    v0, i0, p0 = matrix[VALUES], matrix[INDEX], matrix[POINTERS]
    if matrix[KIND] == ROWS:
        _propagate_rows(matrix, values, ids, sent, first, count, drive, at + low)
    elif matrix[KIND] == SCATTER:
        for e in range(first, first + count):
            value = sent[e]
            for k in range(pointers[p0 + ids[e]], pointers[p0 + ids[e] + 1]):
                target = at + index[i0 + k]
                drive[target] = cells.fma(values[v0 + k], value, drive[target])
    elif matrix[KIND] == BLOCKS:
        _propagate_blocks(matrix, values, index, pointers, ids, sent, first, count, drive, at)
    else:
        for e in range(first, first + count):
            unit = p0 + 3 * ids[e]
            begin, end, start = pointers[unit], pointers[unit + 1], v0 + pointers[unit + 2]
            for k in range(begin, end):
                target, width = at + index[i0 + 2 * k], index[i0 + 2 * k + 1]
                whole = width // LANES * LANES
                for i in range(0, whole, LANES):
                    add_scaled_16(drive, target + i, values, start + i, sent[e])
                for i in range(whole, width):
                    drive[target + i] = cells.fma(values[start + i], sent[e], drive[target + i])
                start += width


@compiled
def _propagate_rows(matrix, values, ids, sent, first, count, drive, at):
    """Dense rows: a register tile of outputs walks the events, then the next tile."""
    width, pitch = matrix[WIDTH], matrix[PITCH]
    start = matrix[VALUES]
    left = width // LANES
    while left >= TILE:
        add_rows_tile(drive, at, values, start, pitch, ids, sent, first, count)
        left, at, start = left - TILE, at + TILE * LANES, start + TILE * LANES
    if left >= 8:
        add_rows_8(drive, at, values, start, pitch, ids, sent, first, count)
        left, at, start = left - 8, at + 8 * LANES, start + 8 * LANES
    if left >= 4:
        add_rows_4(drive, at, values, start, pitch, ids, sent, first, count)
        left, at, start = left - 4, at + 4 * LANES, start + 4 * LANES
    if left >= 2:
        add_rows_2(drive, at, values, start, pitch, ids, sent, first, count)
        left, at, start = left - 2, at + 2 * LANES, start + 2 * LANES
    if left >= 1:
        add_rows_1(drive, at, values, start, pitch, ids, sent, first, count)


@compiled
def _propagate_blocks(matrix, values, index, pointers, ids, sent, first, count, drive, at):
    """Blocks: one unit's values lie together; the drive stays in L1."""
    v0, i0, p0 = matrix[VALUES], matrix[INDEX], matrix[POINTERS]
    c = matrix[WIDTH]
    for e in range(first, first + count):
        unit, upcoming = p0 + 3 * ids[e], p0 + 3 * ids[min(e + 1, first + count - 1)]
        begin, end, start = pointers[unit], pointers[unit + 1], v0 + pointers[unit + 2]
        value = sent[e]
        ahead = v0 + pointers[upcoming + 2]
        for k in range(0, (pointers[upcoming + 1] - pointers[upcoming]) * c, LANES):
            prefetch(values, ahead + k)
        if c == 64:
            for k in range(begin, end):
                add_scaled_64(drive, at + index[i0 + k], values, start, value)
                start += 64
        elif c == 32:
            for k in range(begin, end):
                add_scaled_32(drive, at + index[i0 + k], values, start, value)
                start += 32
        elif c == 16:
            for k in range(begin, end):
                add_scaled_16(drive, at + index[i0 + k], values, start, value)
                start += 16
        elif c == 8:
            for k in range(begin, end):
                add_scaled_8(drive, at + index[i0 + k], values, start, value)
                start += 8
        elif c == 4:
            for k in range(begin, end):
                add_scaled_4(drive, at + index[i0 + k], values, start, value)
                start += 4
        else:
            for k in range(begin, end):
                target = at + index[i0 + k]
                for i in range(c):
                    drive[target + i] = cells.fma(values[start + i], value, drive[target + i])
                start += c


@compiled
def read_rows(matrix, values, index, pointers, indptr, ids, start, stop):
    """Sum of the weights in the rows of events `indptr[start]` to `indptr[stop]`: every byte read, no more done."""
    v0, i0, p0 = matrix[VALUES], matrix[INDEX], matrix[POINTERS]
    total = load(values, 0)
    checksum = 0
    for e in range(indptr[start], indptr[stop]):
        j = ids[e]
        if matrix[KIND] == ROWS:
            first, last = v0 + j * matrix[PITCH], v0 + j * matrix[PITCH] + matrix[WIDTH]
        elif matrix[KIND] == SCATTER:
            first, last = v0 + pointers[p0 + j], v0 + pointers[p0 + j + 1]
            for k in range(i0 + pointers[p0 + j], i0 + pointers[p0 + j + 1]):
                checksum += index[k]
        else:
            blocks = pointers[p0 + 3 * j + 1] - pointers[p0 + 3 * j]
            first, last = v0 + pointers[p0 + 3 * j + 2], v0 + pointers[p0 + 3 * j + 2] + blocks * matrix[WIDTH]
            if matrix[KIND] == BLOCKS:
                for k in range(i0 + pointers[p0 + 3 * j], i0 + pointers[p0 + 3 * j + 1]):
                    checksum += index[k]
        second = total
        third, fourth = total, total
        for k in range(first, last - 4 * LANES + 1, 4 * LANES):
            total = total + load(values, k)
            second = second + load(values, k + LANES)
            third = third + load(values, k + 2 * LANES)
            fourth = fourth + load(values, k + 3 * LANES)
        for k in range(first + (last - first) // (4 * LANES) * 4 * LANES, last, LANES):
            total = total + load(values, k)
        total = (total + second) + (third + fourth)
    # Returned, so that the compiler must read.
    return bits(total > cells.ZERO) + checksum
