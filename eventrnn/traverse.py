"""One traversal a weight format: events of a row into a drive, and a bare read of the same bytes.

Tables and pools are those of `packing.py`.
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.jit import compiled
from eventrnn.packing import (
    BLOCK_COLUMNS,
    BLOCKS,
    FAR,
    HIGH,
    INDEX,
    KIND,
    LOW,
    PITCH,
    POINTERS,
    ROWS,
    SCATTER,
    VALUES,
    WIDTH,
)
from eventrnn.rows import (
    TILE,
    add_blocks_4,
    add_blocks_8,
    add_blocks_16,
    add_blocks_32,
    add_blocks_64,
    add_rows_1,
    add_rows_2,
    add_rows_4,
    add_rows_8,
    add_rows_tile,
    add_to_many_4,
    add_to_many_8,
    add_to_many_16,
    add_to_many_32,
    add_to_many_64,
    add_to_many_128,
    prefetch,
)
from eventrnn.simd import LANES, bits, load, store

# As many drives, and as wide a block, as make it pay to read weights once for all (measured at 1350 units, 10 %).
SHARED_ROWS, SHARED_BLOCKS, SHARED_WIDTH = 12, 32, 32


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
                    store(drive, target + i, cells.fma(load(values, start + i), sent[e], load(drive, target + i)))
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
    c, far = matrix[WIDTH], matrix[FAR]
    for e in range(first, first + count):
        unit = p0 + 3 * ids[e]
        begin, end, start = pointers[unit], pointers[unit + 1], v0 + pointers[unit + 2]
        if far != 0:
            upcoming = p0 + 3 * ids[min(e + 1, first + count - 1)]
            ahead = v0 + pointers[upcoming + 2]
            for k in range(0, (pointers[upcoming + 1] - pointers[upcoming]) * c, LANES):
                prefetch(values, ahead + k)
        blocks, i1, value = end - begin, i0 + begin, sent[e]
        if c == 64:
            add_blocks_64(drive, at, index, i1, blocks, values, start, value)
        elif c == 32:
            add_blocks_32(drive, at, index, i1, blocks, values, start, value)
        elif c == 16:
            add_blocks_16(drive, at, index, i1, blocks, values, start, value)
        elif c == 8:
            add_blocks_8(drive, at, index, i1, blocks, values, start, value)
        elif c == 4:
            add_blocks_4(drive, at, index, i1, blocks, values, start, value)
        else:
            for k in range(begin, end):
                target = at + index[i0 + k]
                for i in range(c):
                    drive[target + i] = cells.fma(values[start + i], value, drive[target + i])
                start += c


@compiled
def propagate_all(
    windows, first_window, last_window, values, index, pointers, bias, p, n_pre,
    ids, sent, firsts, counts, slot, segments, rows,
    starts, targets, grouped,
    drive, pitch,
):  # fmt: skip
    """Drives of `rows` rows, `pitch` apart, from their bias on, over some windows of a matrix.

    Row k's events are `segments` lists from slot + k * segments on. With many rows, events are grouped by unit first,
    so that a weight row is read once for all drives; `starts` (n_pre + 2), `targets`, `grouped` (one an event)
    are scratch for that.
    """
    together = shares_rows(windows[first_window, KIND], rows)
    if together:
        _group(n_pre, ids, sent, firsts, counts, slot, segments, rows, pitch, starts, targets, grouped)
    for w in range(first_window, last_window):
        window = windows[w]
        for k in range(rows):
            _start_from(bias, p, window, drive, k * pitch)
        if together:
            _propagate_many(window, values, index, pointers, n_pre, starts, targets, grouped, drive)
            continue
        for k in range(rows):
            for q in range(slot + k * segments, slot + (k + 1) * segments):
                propagate(window, values, index, pointers, ids, sent, firsts[q], counts[q], drive, k * pitch)


@compiled
def shares_rows(kind, rows):
    """Whether a weight row is read once for so many drives. Measured: fewer gain nothing, single weights never do."""
    return kind == BLOCK_COLUMNS or (kind == ROWS and rows >= SHARED_ROWS)


@compiled
def _start_from(bias, p, window, drive, at):
    """The drive of a window starts from its bias."""
    low, high = window[LOW], window[HIGH]
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        store(drive, at + i, load(bias, p + i))
    for i in range(whole, high):
        drive[at + i] = bias[p + i]


@compiled
def _group(n_pre, ids, sent, firsts, counts, slot, segments, rows, pitch, starts, targets, grouped):
    """Sort events by unit (by counting): unit j's are `starts[j]` to `starts[j + 1]`, rows in order."""
    for j in range(n_pre + 2):
        starts[j] = 0
    for q in range(slot, slot + rows * segments):
        for e in range(firsts[q], firsts[q] + counts[q]):
            starts[ids[e] + 2] += 1
    for j in range(1, n_pre + 2):
        starts[j] += starts[j - 1]
    # Now starts[j + 1] is where unit j's group begins; it moves to its end, where the next one begins.
    for k in range(rows):
        for q in range(slot + k * segments, slot + (k + 1) * segments):
            for e in range(firsts[q], firsts[q] + counts[q]):
                to = starts[ids[e] + 1]
                targets[to], grouped[to] = k * pitch, sent[e]
                starts[ids[e] + 1] = to + 1


@compiled
def _propagate_many(matrix, values, index, pointers, n_pre, starts, targets, grouped, drive):
    """`propagate` for many drives at once: each weight row is read once for all drives that its unit sends to.

    Events grouped by unit, `starts[j]` to `starts[j + 1]`; `targets` are offsets of drives. Units go in ascending
    order, so every drive still takes its terms in ascending order. For rows and block columns only.
    """
    v0, i0, p0 = matrix[VALUES], matrix[INDEX], matrix[POINTERS]
    if matrix[KIND] == ROWS:
        low, width, pitch = matrix[LOW], matrix[WIDTH], matrix[PITCH]
        for tile in range(0, width - 8 * LANES + 1, 8 * LANES):
            for j in range(n_pre):
                if starts[j + 1] > starts[j]:
                    start, count = v0 + j * pitch + tile, starts[j + 1] - starts[j]
                    add_to_many_128(drive, low + tile, values, start, targets, grouped, starts[j], count)
        for tile in range(width // (8 * LANES) * 8 * LANES, width, LANES):
            for j in range(n_pre):
                start, count = v0 + j * pitch + tile, starts[j + 1] - starts[j]
                add_to_many_16(drive, low + tile, values, start, targets, grouped, starts[j], count)
        return
    c = matrix[WIDTH]
    for column in range(matrix[LOW] // c, -(-matrix[HIGH] // c)):
        at, p = column * c, p0 + column - matrix[LOW] // c
        for k in range(pointers[p], pointers[p + 1]):
            j = index[i0 + k]
            first, count, start = starts[j], starts[j + 1] - starts[j], v0 + k * c
            if c == 64:
                add_to_many_64(drive, at, values, start, targets, grouped, first, count)
            elif c == 32:
                add_to_many_32(drive, at, values, start, targets, grouped, first, count)
            elif c == 16:
                add_to_many_16(drive, at, values, start, targets, grouped, first, count)
            elif c == 8:
                add_to_many_8(drive, at, values, start, targets, grouped, first, count)
            elif c == 4:
                add_to_many_4(drive, at, values, start, targets, grouped, first, count)
            else:
                for e in range(first, first + count):
                    for i in range(at + targets[e], at + targets[e] + c):
                        drive[i] = cells.fma(values[start + i - at - targets[e]], grouped[e], drive[i])


@compiled
def read_rows(matrix, values, index, pointers, indptr, ids, start, stop):
    """Read the weight rows of events `indptr[start]` to `indptr[stop]`, no more; of block columns, every block."""
    v0, i0, p0 = matrix[VALUES], matrix[INDEX], matrix[POINTERS]
    total = load(values, 0)
    checksum = 0
    if matrix[KIND] == BLOCK_COLUMNS:
        columns = -(-matrix[HIGH] // matrix[WIDTH]) - matrix[LOW] // matrix[WIDTH]
        blocks = pointers[p0 + columns]
        for _ in range(start, stop):
            for k in range(i0, i0 + blocks):
                checksum += index[k]
            total = _sum_of(values, v0, v0 + blocks * matrix[WIDTH], total)
        return bits(total > cells.ZERO) + checksum
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
        total = _sum_of(values, first, last, total)
    # Returned, so that the compiler must read.
    return bits(total > cells.ZERO) + checksum


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
