"""From events to drives: one traversal a window kind, and which way a product goes.

Tables, pools and kinds are those of `packing.py`. `propagate_all` is what the engine calls: all drives of a product.
Functions of `weights` compile once a storage; `scales` is the pool that int8 weights find their scales in.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import allocating, compiled, inlined
from eventrnn.cpu.kernels.microkernels import (
    LINE,
    MULTIPLY_ROWS,
    MULTIPLY_VECTORS,
    TILE,
    add_blocks_4,
    add_blocks_8,
    add_blocks_16,
    add_listed_4,
    add_listed_8,
    add_listed_16,
    add_listed_32,
    add_listed_64,
    add_masked_avx512,
    add_near_rows_1,
    add_near_rows_2,
    add_near_rows_4,
    add_rows_1,
    add_rows_2,
    add_rows_4,
    add_rows_8,
    add_rows_tile,
    add_scattered_avx512,
    list_blocks,
    multiply_edge,
    multiply_row,
    multiply_tile,
    prefetch_far,
)
from eventrnn.cpu.kernels.simd import AVX512, LANES, decoded, load, lowest_bit, store
from eventrnn.cpu.tables import (
    BFLOAT16,
    BLAS,
    BLOCKS,
    EVERY_FROM,
    FLOAT32,
    HIGH,
    INDEX,
    KIND,
    LOW,
    MANY_BLOCKS,
    MASKED,
    PITCH,
    POINTERS,
    ROW_TILE,
    ROW_TILES,
    ROWS,
    SCALES,
    STORAGE,
    VALUES,
    WIDTH,
)


@compiled
def products(
    windows, first_window, last_window, values, index, pointers, bias, p, n_pre,
    ids, sent, firsts, counts, start, stop, rows,
    cuts, own_ids, own_sent, lists, amounts, x, tile, product,
    drive_out, pitch,
):  # fmt: skip
    """The product of every step from `start` to `stop`, one after the other into the same drives."""
    for t in range(start, stop):
        propagate_all(
            windows, first_window, last_window, values, index, pointers, bias, p, n_pre,
            ids, sent, firsts, counts, t * rows, 1, rows,
            cuts, own_ids, own_sent, lists, amounts, x, tile, product,
            drive_out, pitch,
        )  # fmt: skip


# A list is worked off when it has so many pieces; small, so that it leaves the L1 cache to the drives.
LISTED_PIECES = 64

# Units of a pass of `_multiply`: a tile's weights of so many stay in the L1 cache while the drives go by.
MULTIPLY_UNITS = 128

# Units of a panel: their rows of a narrow window, 32 KB, stay in the L1 cache while all drives take their events.
PANEL = 128


@inlined
def propagate(matrix, values, index, pointers, ids, sent, first, count, drive, at, lists, amounts):
    """drive[at + i] += weight[j, i] * sent of every event j, ascending j, one FMA a term, over a matrix window.

    Events are `ids[first:first + count]` with values `sent`. Reads only the weights of those units.
    """
    if matrix[STORAGE] == FLOAT32:
        _propagate(matrix, values, values, index, pointers, ids, sent, first, count, drive, at, lists, amounts)
    elif matrix[STORAGE] == BFLOAT16:
        weights = values.view(np.uint16)
        _propagate(matrix, weights, values, index, pointers, ids, sent, first, count, drive, at, lists, amounts)
    else:
        weights = values.view(np.int8)
        _propagate(matrix, weights, values, index, pointers, ids, sent, first, count, drive, at, lists, amounts)


@inlined
def _propagate(matrix, weights, scales, index, pointers, ids, sent, first, count, drive, at, lists, amounts):
    if matrix[KIND] == ROWS:
        _add_dense_rows(matrix, weights, scales, ids, sent, first, count, drive, at)
    elif matrix[KIND] == BLOCKS:
        _add_blocks(matrix, weights, scales, index, pointers, ids, sent, first, count, drive, at, lists, amounts)
    elif matrix[KIND] == MANY_BLOCKS:
        _add_many_blocks(matrix, weights, scales, index, pointers, ids, sent, first, count, drive, at)
    else:
        _add_single(matrix, weights, scales, index, pointers, ids, sent, first, count, drive, at)


@inlined
def _values_at(matrix, weights):
    """Where a window's values begin, in weights: the table counts float32."""
    return matrix[VALUES] * (4 // weights.itemsize)


@inlined
def _add_dense_rows(matrix, weights, scales, ids, sent, first, count, drive, at):
    """A register tile of outputs walks the events, then the next tile."""
    # planted fault: scale of another unit, rows
    pitch, start, s0 = matrix[PITCH], _values_at(matrix, weights), matrix[SCALES]
    left, at = matrix[WIDTH] // LANES, at + matrix[LOW]
    while left >= TILE:
        add_rows_tile(drive, at, weights, start, pitch, scales, s0, ids, sent, first, count)
        left, at, start = left - TILE, at + TILE * LANES, start + TILE * LANES
    if left >= 8:
        add_rows_8(drive, at, weights, start, pitch, scales, s0, ids, sent, first, count)
        left, at, start = left - 8, at + 8 * LANES, start + 8 * LANES
    if left >= 4:
        add_rows_4(drive, at, weights, start, pitch, scales, s0, ids, sent, first, count)
        left, at, start = left - 4, at + 4 * LANES, start + 4 * LANES
    if left >= 2:
        add_rows_2(drive, at, weights, start, pitch, scales, s0, ids, sent, first, count)
        left, at, start = left - 2, at + 2 * LANES, start + 2 * LANES
    if left >= 1:
        add_rows_1(drive, at, weights, start, pitch, scales, s0, ids, sent, first, count)


@inlined
def add_scattered_portable(drive, at, index, i0, first, count, value, scale, weights, start):
    """`add_scattered_avx512` for other processors."""
    columns = index.view(np.uint16)
    for k in range(first, first + count):
        target = at + columns[2 * i0 + k]
        drive[target] = cells.fma(decoded(weights, start + k, scale), value, drive[target])


@inlined
def add_masked_portable(drive, at, index, i0, first, vectors, value, scale, weights, start):
    """`add_masked_avx512` for other processors: only the weights that are there."""
    masks = index.view(np.uint16)
    for k in range(vectors):
        kept = np.int64(masks[2 * i0 + first + k])
        while kept != 0:
            target = at + k * LANES + lowest_bit(kept)
            drive[target] = cells.fma(decoded(weights, start, scale), value, drive[target])
            start += 1
            kept &= kept - 1


add_scattered = add_scattered_avx512 if AVX512 else add_scattered_portable

add_masked = add_masked_avx512 if AVX512 else add_masked_portable


@inlined
def _add_single(matrix, weights, scales, index, pointers, ids, sent, first, count, drive, at):
    """Sixteen targets at a time, or every vector of the row by its mask."""
    p0, i0, v0, at = matrix[POINTERS], matrix[INDEX], _values_at(matrix, weights), at + matrix[LOW]
    masks = matrix[PITCH]
    for e in range(first, first + count):
        unit = np.int64(ids[e])
        # planted fault: scale of another unit, single weights
        begin, end, scale = pointers[p0 + unit], pointers[p0 + unit + 1], scales[matrix[SCALES] + unit]
        if matrix[KIND] == MASKED:
            # planted fault: masks of the wrong unit
            add_masked(drive, at, index, i0, unit * masks, masks, sent[e], scale, weights, v0 + begin)
        else:
            # planted fault: tail of scattered weights dropped
            add_scattered(drive, at, index, i0, begin, end - begin, sent[e], scale, weights, v0)


@inlined
def _add_blocks(matrix, weights, scales, index, pointers, ids, sent, first, count, drive, at, lists, amounts):
    """The pieces of some units are listed without a branch, then added in one loop."""
    i0, p0, s0 = matrix[INDEX], matrix[POINTERS], matrix[SCALES]
    listed = 0
    for e in range(first, first + count):
        unit = np.int64(ids[e])
        begin, end, number = pointers[p0 + 3 * unit], pointers[p0 + 3 * unit + 1], pointers[p0 + 3 * unit + 2]
        # planted fault: scale of another unit, blocks
        list_blocks(
            weights, index, i0 + begin, end - begin, number, sent[e], scales[s0 + unit],
            lists[0], lists[1], amounts[0], amounts[1], listed,
        )  # fmt: skip
        listed += end - begin
        if listed >= LISTED_PIECES:
            _add_listed(matrix, weights, lists, amounts, listed, drive, at)
            listed = 0
    # planted fault: rest of a list dropped
    _add_listed(matrix, weights, lists, amounts, listed, drive, at)


@inlined
def _add_many_blocks(matrix, weights, scales, index, pointers, ids, sent, first, count, drive, at):
    """The same, each unit's pieces in a loop of their own: less work a piece, one wrong guess of its end a unit."""
    i0, p0, s0, v0 = matrix[INDEX], matrix[POINTERS], matrix[SCALES], _values_at(matrix, weights)
    if matrix[WIDTH] == 16:
        for e in range(first, first + count):
            unit = np.int64(ids[e])
            begin, end, piece = pointers[p0 + 3 * unit], pointers[p0 + 3 * unit + 1], pointers[p0 + 3 * unit + 2]
            # planted fault: scale of another unit, many blocks
            value, scale = sent[e], scales[s0 + unit]
            add_blocks_16(drive, at, index, i0 + begin, end - begin, value, scale, weights, v0 + piece * 16)
    elif matrix[WIDTH] == 8:
        for e in range(first, first + count):
            unit = np.int64(ids[e])
            begin, end, piece = pointers[p0 + 3 * unit], pointers[p0 + 3 * unit + 1], pointers[p0 + 3 * unit + 2]
            # planted fault: scale of another unit, many blocks
            value, scale = sent[e], scales[s0 + unit]
            add_blocks_8(drive, at, index, i0 + begin, end - begin, value, scale, weights, v0 + piece * 8)
    else:
        for e in range(first, first + count):
            unit = np.int64(ids[e])
            begin, end, piece = pointers[p0 + 3 * unit], pointers[p0 + 3 * unit + 1], pointers[p0 + 3 * unit + 2]
            # planted fault: scale of another unit, many blocks
            value, scale = sent[e], scales[s0 + unit]
            add_blocks_4(drive, at, index, i0 + begin, end - begin, value, scale, weights, v0 + piece * 4)


@inlined
def _add_listed(matrix, weights, lists, amounts, count, drive, at):
    """Add the first `count` pieces of a list to the drives at their targets."""
    width, start = matrix[WIDTH], _values_at(matrix, weights)
    targets, numbers, sent, scales = lists[0], lists[1], amounts[0], amounts[1]
    if width == 64:
        add_listed_64(drive, at, targets, numbers, sent, scales, count, weights, start)
    elif width == 32:
        add_listed_32(drive, at, targets, numbers, sent, scales, count, weights, start)
    elif width == 16:
        add_listed_16(drive, at, targets, numbers, sent, scales, count, weights, start)
    elif width == 8:
        add_listed_8(drive, at, targets, numbers, sent, scales, count, weights, start)
    else:
        add_listed_4(drive, at, targets, numbers, sent, scales, count, weights, start)


# --- all drives of a product --------------------------------------------------------------------------------


@compiled
def propagate_all(
    windows, first_window, last_window, values, index, pointers, bias, p, n_pre,
    ids, sent, firsts, counts, slot, segments, rows,
    cuts, own_ids, own_sent, lists, amounts, x, tile, product,
    drive, pitch,
):  # fmt: skip
    """Drives of `rows` rows, `pitch` apart, from their bias on, over some windows of a matrix.

    Row k's events are `segments` lists from slot + k * segments on. Windows for many drives take the events panel by
    panel of units, so that a weight is read once for all drives; or, where most units are active, walk every unit.

    Scratch, all lists with a vector to spare: `cuts` (rows * panels + 1); `own_ids`, int32, and
    `own_sent`, float32, (events); `lists`, int32, and `amounts`, float32, (2, pieces); `x` (rows, n_pre); `tile`
    (rows, ROW_TILE); `product` (rows, columns), for BLAS only.
    """
    every = False
    if first_window >= last_window:
        return
    if windows[first_window, KIND] == ROW_TILES:
        events = 0
        for q in range(slot, slot + rows * segments):
            events += counts[q]
        every = events >= windows[first_window, EVERY_FROM] * rows
        if every:
            _spread(n_pre, ids, sent, firsts, counts, slot, segments, rows, x)
        else:
            _cut(n_pre, ids, sent, firsts, counts, slot, segments, rows, cuts, own_ids, own_sent)
    elif windows[first_window, KIND] == BLAS:
        _spread(n_pre, ids, sent, firsts, counts, slot, segments, rows, x)
    for w in range(first_window, last_window):
        window = windows[w]
        if window[KIND] == BLAS:
            _add_blas(window, values, bias, p, n_pre, x, product, rows, drive, pitch)
            continue
        if window[KIND] == ROW_TILES:
            if window[STORAGE] == FLOAT32:
                _add_tile(
                    window, values, values, bias, p, n_pre, every, cuts, own_ids, own_sent, x, tile, rows, drive, pitch
                )
            elif window[STORAGE] == BFLOAT16:
                weights = values.view(np.uint16)
                _add_tile(
                    window, weights, values, bias, p, n_pre, every, cuts, own_ids, own_sent, x, tile, rows, drive, pitch
                )
            else:
                weights = values.view(np.int8)
                _add_tile(
                    window, weights, values, bias, p, n_pre, every, cuts, own_ids, own_sent, x, tile, rows, drive, pitch
                )
            continue
        for k in range(rows):
            at = k * pitch
            copy(bias, p + window[LOW], drive, at + window[LOW], window[HIGH] - window[LOW])
            for q in range(slot + k * segments, slot + (k + 1) * segments):
                propagate(window, values, index, pointers, ids, sent, firsts[q], counts[q], drive, at, lists, amounts)


@inlined
def copy(source, s, target, t, count):
    """target[t:t + count] = source[s:s + count]."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store(target, t + i, load(source, s + i))
    for i in range(whole, count):
        target[t + i] = source[s + i]


@compiled
def _spread(n_pre, ids, sent, firsts, counts, slot, segments, rows, x):
    """Events as rows of numbers, n_pre apart."""
    for k in range(rows):
        for j in range(k * n_pre, (k + 1) * n_pre):
            x[j] = cells.ZERO
        for q in range(slot + k * segments, slot + (k + 1) * segments):
            for e in range(firsts[q], firsts[q] + counts[q]):
                x[k * n_pre + ids[e]] = sent[e]


@compiled
def _cut(n_pre, ids, sent, firsts, counts, slot, segments, rows, cuts, own_ids, own_sent):
    """The events panel by panel of PANEL units, in the order in which they will be read.

    Row k's of panel q are cuts[q * rows + k] to the next. 80 rows of 135 events lie in lists longer than the L1 cache:
    row by row, the product of all of them took a fifth longer.
    """
    panels = (n_pre + PANEL - 1) // PANEL
    for q in range(panels * rows):
        cuts[q] = 0
    for k in range(rows):
        for q in range(slot + k * segments, slot + (k + 1) * segments):
            for e in range(firsts[q], firsts[q] + counts[q]):
                cuts[np.int64(ids[e]) // PANEL * rows + k] += 1
    end = 0
    for q in range(panels * rows):
        end, cuts[q] = end + cuts[q], end
    cuts[panels * rows] = end
    for k in range(rows):
        panel, to = 0, cuts[k]
        for q in range(slot + k * segments, slot + (k + 1) * segments):
            for e in range(firsts[q], firsts[q] + counts[q]):
                unit = ids[e]
                while unit >= (panel + 1) * PANEL:
                    panel += 1
                    to = cuts[panel * rows + k]
                # planted fault: order of two units
                own_ids[to], own_sent[to] = unit, sent[e]
                to += 1


@compiled
def _add_tile(matrix, weights, scales, bias, p, n_pre, every, cuts, own_ids, own_sent, x, tile, rows, drive, pitch):
    """`propagate` for many drives at once, from their bias on; units go in ascending order, so terms do.

    In a tile of its own: rows of a drive lie a page apart, more pages than a core keeps addresses of.
    """
    low, width = matrix[LOW], matrix[HIGH] - matrix[LOW]
    for k in range(rows):
        copy(bias, p + low, tile, k * ROW_TILE, width)
    if every:
        _multiply(matrix, weights, scales, n_pre, x, rows, tile)
    else:
        _add_panels(matrix, weights, scales, n_pre, cuts, own_ids, own_sent, rows, tile)
    for k in range(rows):
        copy(tile, k * ROW_TILE, drive, k * pitch + low, width)


@allocating
def _add_blas(matrix, values, bias, p, n_pre, x, product, rows, drive, pitch):
    """Every unit, in an order that BLAS chooses. Not exact."""
    low, width, v0 = matrix[LOW], matrix[WIDTH], matrix[VALUES]
    weights = values[v0 : v0 + n_pre * width].reshape((n_pre, width))
    np.dot(x[: rows * n_pre].reshape((rows, n_pre)), weights, product[: rows * width].reshape((rows, width)))
    for k in range(rows):
        for i in range(width):
            drive[k * pitch + low + i] = product[k * width + i] + bias[p + low + i]


@compiled
def _add_panels(matrix, weights, scales, n_pre, cuts, ids, sent, rows, tile):
    """Every drive takes its events of a panel's units, whose rows stay in the L1 cache; then the next panel.

    Meanwhile the next panel is asked for, some lines a drive.
    """
    # planted fault: scale of another unit, panels
    start, pitch, s0 = _values_at(matrix, weights), matrix[PITCH], matrix[SCALES]
    size, line = PANEL * pitch, LINE // weights.itemsize
    some, last = -(-size // (rows * line)) * line, start + n_pre * pitch
    for panel in range((n_pre + PANEL - 1) // PANEL):
        coming = start + (panel + 1) * size
        for k in range(rows):
            for i in range(coming, min(last, coming + some), line):
                prefetch_far(weights, i)
            coming += some
            first, at, row, left = cuts[panel * rows + k], k * ROW_TILE, start, matrix[WIDTH] // LANES
            # planted fault: last event of a panel
            count = cuts[panel * rows + k + 1] - first
            if left >= 4:
                add_near_rows_4(tile, at, weights, row, pitch, scales, s0, ids, sent, first, count)
                left, at, row = left - 4, at + 4 * LANES, row + 4 * LANES
            if left >= 2:
                add_near_rows_2(tile, at, weights, row, pitch, scales, s0, ids, sent, first, count)
                left, at, row = left - 2, at + 2 * LANES, row + 2 * LANES
            if left >= 1:
                add_near_rows_1(tile, at, weights, row, pitch, scales, s0, ids, sent, first, count)


@compiled
def _multiply(matrix, weights, scales, n_pre, x, rows, tile):
    """Every unit, active or not: some drives and outputs stay in registers."""
    start, width, pitch, s0 = _values_at(matrix, weights), matrix[WIDTH], matrix[PITCH], matrix[SCALES]
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
