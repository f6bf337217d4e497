"""Lists of what the products of training go over: events by row or by unit, and pairs whose dots are wanted.

Lists are made tile by tile, a tile being as many rows of a matrix as lie in the L1 cache, a strip of columns wide. Of
events, the longer lists of a tile come last: loops over lists of one length have branches that the processor foresees
(1350 units, 5600 rows, 10 % active, weight gradients: 53 ms as the units come, 44 by length).
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.cpu.kernels.cell_update import compress, send
from eventrnn.cpu.kernels.jit import compiled, inlined
from eventrnn.cpu.kernels.simd import LANES, load
from eventrnn.cpu.kernels.simd_reductions import everywhere, sum_lanes
from eventrnn.cpu.kernels.sync import take

# Rows of a tile; with 8 vectors of columns, 40 KiB. Measured as above: 52 ms with 64 rows, 50 with 80 and with 96.
TILE_ROWS = 80

# A list of pairs is filled up to a multiple of this.
PAIRS = 4

# Which pairs: of units that fired or have a slope, of units that fired, all.
OPEN, SENT, ALL = range(3)


@compiled
def share(size, unit, part, parts):
    """The first of a thread's share of `size`, in whole units; the share of `part + 1` begins where it ends."""
    whole = -(-size // unit)
    return min(size, unit * (-(-whole * part // parts)))


@compiled
def by_count(counts, first, last, most, bins, order, at):
    """order[at:] = `first` to `last`, those with few counts first, else as they come. bins: scratch (most + 2,)."""
    for c in range(most + 2):
        bins[c] = 0
    for k in range(first, last):
        bins[counts[k] + 1] += 1
    for c in range(most + 1):
        bins[c + 1] += bins[c]
    for k in range(first, last):
        order[at + bins[counts[k]]] = k
        bins[counts[k]] += 1


# --- events -------------------------------------------------------------------------------------------------


@compiled
def list_by_row(x, x_at, rows, n, tile, order, starts, ids, sent, counts, bins):
    """Non-zero x (rows, n), which begins at `x_at`, by tile of units, then row; `ids` (int32) are units.

    Tile k: its q-th list is of row order[k * rows + q], from starts[k * (rows + 1) + q] on to where the next begins.
    A tile has rows * tile + 16 entries to itself. Scratch: counts (rows,), bins (tile + 2,).
    """
    for k in range(-(-n // tile)):
        low, high = k * tile, min(n, k * tile + tile)
        whole = low + (high - low) // LANES * LANES
        for r in range(rows):
            at, found = x_at + r * n, everywhere(cells.ZERO)
            for i in range(low, whole, LANES):
                found = found + cells.select(load(x, at + i) != cells.ZERO, cells.ONE, cells.ZERO)
            counts[r] = int(sum_lanes(found))
            for i in range(whole, high):
                counts[r] += x[at + i] != 0
        by_count(counts, 0, rows, tile, bins, order, k * rows)
        end, start = k * (rows * tile + LANES), k * (rows + 1)
        for q in range(rows):
            starts[start + q] = end
            end += send(x, x_at + order[k * rows + q] * n, low, high, ids, sent, end)
        starts[start + rows] = end


@compiled
def list_by_unit(part, parts, queue, x, rows, n, tile, sort, order, starts, ids, sent, counts, bins, found, values):
    """Non-zero x (rows, n) by tile of rows, then unit; `ids` are rows, ascending. As `list_by_row`; without `sort` list
    q is of unit q, and `order` stays as it is. Threads take tiles. Scratch, a row a thread: counts (n,), bins
    (tile + 2,), found and values (n + 16,)."""
    count, units, numbers = counts[part], found[part], values[part]
    k = take(queue)
    while k < -(-rows // tile):
        first, last, start = k * tile, min(rows, k * tile + tile), k * (n + 1)
        for i in range(n):
            count[i] = 0
        for r in range(first, last):
            # One list a row: its length is foreseen more often than that of one vector.
            for e in range(send(x, r * n, 0, n, units, numbers, 0)):
                count[units[e]] += 1
        if sort:
            by_count(count, 0, n, tile, bins[part], order, k * n)
        end = k * (tile * n + LANES)
        for q in range(n):
            unit = order[k * n + q] if sort else q
            starts[start + q] = end
            # From here on where the unit's next event goes.
            end, count[unit] = end + count[unit], end
        starts[start + n] = end
        for r in range(first, last):
            for e in range(send(x, r * n, 0, n, units, numbers, 0)):
                to = count[units[e]]
                ids[to], sent[to], count[units[e]] = r, numbers[e], to + 1
        k = take(queue)


# --- pairs of a sample and a unit ---------------------------------------------------------------------------


@compiled
def list_open(kind, dampening, support, threshold, v, row, rows, n, low, high, who, counts, found, values):
    """Of rows `row` on, the samples in which units `low` to `high` fired or have a slope.

    Unit j's are who[j * rows:], `counts[j]` of them, ascending, counted from `row`. Scratch: found, values (n + 16,).
    """
    for j in range(low, high):
        counts[j] = 0
    whole = low + (high - low) // LANES * LANES
    for b in range(rows):
        at, listed = (row + b) * n, 0
        for i in range(low, whole, LANES):
            value, theta = load(v, at + i), load(threshold, i)
            slope = cells.surrogate_slope(kind, value - theta, dampening, support)
            event = cells.select(value > theta, cells.ONE, cells.ZERO)
            listed += compress(found, values, listed, i, event + cells.absolute(slope) != cells.ZERO, value)
        for j in range(whole, high):
            slope = cells.surrogate_slope(kind, v[at + j] - threshold[j], dampening, support)
            if v[at + j] > threshold[j] or slope != 0:
                found[listed] = j
                listed += 1
        _append(found, listed, b, rows, who, counts)


@inlined
def _append(found, listed, b, rows, who, counts):
    for e in range(listed):
        j = found[e]
        who[j * rows + counts[j]] = b
        counts[j] += 1


@compiled
def list_sent(y, row, rows, n, low, high, who, counts, found, values):
    """`list_open` of what was sent: where y is not zero."""
    for j in range(low, high):
        counts[j] = 0
    for b in range(rows):
        _append(found, send(y, (row + b) * n, low, high, found, values, 0), b, rows, who, counts)


@compiled
def list_all(rows, low, high, who, counts):
    """`list_open` where every unit of every row is wanted."""
    for j in range(low, high):
        counts[j] = rows
        for b in range(rows):
            who[j * rows + b] = b


@compiled
def tile_rows(rows):
    """Rows of a tile when there are so many: even shares, no more than TILE_ROWS, one at least."""
    return max(1, -(-rows // max(1, -(-rows // TILE_ROWS))))


@compiled
def list_pairs(
    source, tiled, kind, dampening, support, threshold, v, row, rows, n, low, high,
    who, counts, found, values, made_out, starts, amounts, pairs,
):  # fmt: skip
    """The pairs of `rows` rows from `row` on that `source` says, as `list_open` leaves them, or, `tiled`, by tile of
    `tile_rows(rows)` rows: tile k and unit j have amounts[k * n + j] rows, counted from the tile's first, in `pairs`
    from starts[k * n + j] on, filled up to a multiple of PAIRS. `made_out` (n,) counts them.
    """
    together = tile_rows(rows) if tiled else max(1, rows)
    for k in range(-(-rows // together)):
        first, some = row + k * together, min(together, rows - k * together)
        if source == OPEN:
            list_open(kind, dampening, support, threshold, v, first, some, n, low, high, who, counts, found, values)
        elif source == SENT:
            list_sent(v, first, some, n, low, high, who, counts, found, values)
        else:
            list_all(some, low, high, who, counts)
        for j in range(low, high):
            made_out[j] += counts[j]
        to = (k * n + low) * (together + PAIRS)
        for j in range(low, high if tiled else low):
            count = counts[j]
            filled = to + -(-count // PAIRS) * PAIRS
            starts[k * n + j], amounts[k * n + j] = to, count
            for q in range(count):
                pairs[to + q] = who[j * some + q]
            for q in range(to + count, filled):
                pairs[q] = pairs[to]
            to = filled
