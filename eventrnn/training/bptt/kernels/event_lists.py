"""Lists for the sparse products of training: non-zero elements by row or by unit, and active pairs.

An event list is a compressed sparse matrix in SciPy's terms (`indptr`, `indices`, `values`), one per tile. A tile is as
many rows of the other operand as fit in the L1 cache, a strip of columns wide. Within a tile, `order` puts the longer
lists last: loops over lists of equal length have predictable branches (weight gradients of 1350 units, 5600 rows, 10 %
active: 53 ms with the lists by unit, 44 ms with the lists by length).

An active pair is a (sample, unit) pair where the unit fired or its surrogate slope is not zero: only there does
`reference.backward` multiply the gradient of the unit's output by something other than zero.

Ownership: `events_csc` takes tiles from a counter that all threads share; the other kernels run within one thread, on
the scratch of that thread. Shapes and dtypes are in `records.py`.
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.cpu.kernels.cell_update import compact_events, compress
from eventrnn.cpu.kernels.jit import compiled, inlined
from eventrnn.cpu.kernels.simd import LANES, load
from eventrnn.cpu.kernels.simd_reductions import everywhere, sum_lanes
from eventrnn.cpu.kernels.sync import next_index
from eventrnn.training.bptt.kernels.records import ACTIVE, FIRED, ActivePairs

# Rows of a tile; with 8 vectors of columns, 40 KiB. Measured as above: 52 ms with 64 rows, 50 with 80 and with 96.
TILE_ROWS = 80

# The tiled list of a unit's samples is padded to a multiple of this.
PAIRS = 4


@compiled
def share(size, unit, thread, n_threads):
    """The beginning of a thread's share of `size` items, a multiple of `unit`; the share of `thread + 1` begins at its
    end."""
    whole = -(-size // unit)
    return min(size, unit * (-(-whole * thread // n_threads)))


@compiled
def order_by_count(counts, first, last, most, bins, order, at):
    """order[at:] = the numbers `first` to `last`, sorted by their counts (0 to `most`); a stable counting sort.

    bins : scratch (most + 2,)
    """
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
def events_csr(x, x_at, rows, n, tile, lists, counts, bins):
    """Non-zero elements of x (rows, n), which begins at `x_at`, by tile of units, then row; `indices` are units.

    List q of tile k belongs to row order[k * rows + q] and begins at indptr[k * (rows + 1) + q]. A tile has space for
    rows * tile + 16 entries. Scratch: counts (rows,), bins (tile + 2,).
    """
    order, indptr, indices, values = lists.order, lists.indptr, lists.indices, lists.values
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
        order_by_count(counts, 0, rows, tile, bins, order, k * rows)
        end, start = k * (rows * tile + LANES), k * (rows + 1)
        for q in range(rows):
            indptr[start + q] = end
            end += compact_events(x, x_at + order[k * rows + q] * n, low, high, indices, values, end)
        indptr[start + rows] = end


@compiled
def events_csc(thread, n_threads, counter, x, rows, n, tile, sort, lists, scratch):
    """Non-zero elements of x (rows, n) by tile of rows, then unit; `indices` are rows, ascending.

    The layout is that of `events_csr`. Without `sort`, list q belongs to unit q, and `order` is not written.
    """
    order, indptr, indices, values = lists.order, lists.indptr, lists.indices, lists.values
    count, bins = scratch.counts[thread], scratch.bins[thread]
    hit_units, hit_values = scratch.hit_units[thread], scratch.hit_values[thread]
    k = next_index(counter)
    while k < -(-rows // tile):
        first, last, start = k * tile, min(rows, k * tile + tile), k * (n + 1)
        for i in range(n):
            count[i] = 0
        for r in range(first, last):
            # The hits of a whole row are listed first, because the processor predicts the length of such a list more
            # often than the number of hits of one vector.
            for e in range(compact_events(x, r * n, 0, n, hit_units, hit_values, 0)):
                count[hit_units[e]] += 1
        if sort:
            order_by_count(count, 0, n, tile, bins, order, k * n)
        end = k * (tile * n + LANES)
        for q in range(n):
            unit = order[k * n + q] if sort else q
            indptr[start + q] = end
            # From here on `count` holds the position of the unit's next event.
            end, count[unit] = end + count[unit], end
        indptr[start + n] = end
        for r in range(first, last):
            for e in range(compact_events(x, r * n, 0, n, hit_units, hit_values, 0)):
                to = count[hit_units[e]]
                indices[to], values[to], count[hit_units[e]] = r, hit_values[e], to + 1
        k = next_index(counter)


# --- active pairs -------------------------------------------------------------------------------------------


@inlined
def pairs_of_thread(pairs, thread):
    """One thread's rows of the arrays of `ActivePairs`."""
    return ActivePairs(
        pairs.samples[thread],
        pairs.counts[thread],
        pairs.hit_units[thread],
        pairs.hit_values[thread],
        pairs.tile_begins[thread],
        pairs.tile_counts[thread],
        pairs.tile_samples[thread],
        pairs.sums[thread],
        pairs.delta_tile[thread],
    )


@compiled
def list_active(surrogate, v, row, rows, n, low, high, pairs):
    """The samples, among `rows` rows of v from `row` on, in which units `low` to `high` fired or have a slope.

    Unit j has `pairs.counts[j]` of them, ascending and counted from `row`, in `pairs.samples` from j * rows on.
    """
    hit_units, hit_values, threshold = pairs.hit_units, pairs.hit_values, surrogate.threshold
    for j in range(low, high):
        pairs.counts[j] = 0
    whole = low + (high - low) // LANES * LANES
    for b in range(rows):
        at, listed = (row + b) * n, 0
        for i in range(low, whole, LANES):
            value, theta = load(v, at + i), load(threshold, i)
            slope = cells.surrogate_slope(surrogate.kind, value - theta, surrogate.dampening, surrogate.support)
            event = cells.select(value > theta, cells.ONE, cells.ZERO)
            active = event + cells.absolute(slope) != cells.ZERO
            listed += compress(hit_units, hit_values, listed, i, active, value)
        for j in range(whole, high):
            value, theta = v[at + j], threshold[j]
            slope = cells.surrogate_slope(surrogate.kind, value - theta, surrogate.dampening, surrogate.support)
            if value > theta or slope != 0:
                hit_units[listed] = j
                listed += 1
        _append_sample(hit_units, listed, b, rows, pairs.samples, pairs.counts)


@inlined
def _append_sample(hit_units, listed, b, rows, samples, counts):
    """Append sample b to the lists of the first `listed` units of `hit_units`."""
    for e in range(listed):
        j = hit_units[e]
        samples[j * rows + counts[j]] = b
        counts[j] += 1


@compiled
def list_fired(y, row, rows, n, low, high, pairs):
    """`list_active` for the pairs where y is not zero."""
    for j in range(low, high):
        pairs.counts[j] = 0
    for b in range(rows):
        listed = compact_events(y, (row + b) * n, low, high, pairs.hit_units, pairs.hit_values, 0)
        _append_sample(pairs.hit_units, listed, b, rows, pairs.samples, pairs.counts)


@compiled
def list_every(rows, low, high, pairs):
    """`list_active` for all pairs."""
    for j in range(low, high):
        pairs.counts[j] = rows
        for b in range(rows):
            pairs.samples[j * rows + b] = b


@compiled
def tile_rows(rows):
    """The rows of a tile where `rows` rows are divided into equal tiles: at most TILE_ROWS, and at least one."""
    return max(1, -(-rows // max(1, -(-rows // TILE_ROWS))))


@compiled
def list_pairs(source, tiled, surrogate, v, row, rows, n, low, high, pairs, listed_out):
    """List the pairs of units `low` to `high` in `rows` rows from `row` on.

    source     : ACTIVE, FIRED (then v is the output y) or EVERY
    tiled      : also write the lists tile by tile, as `sddmm_dense` reads them: the list of tile k and unit j has
                 tile_counts[k * n + j] rows, counted from the first row of the tile, and is padded to a multiple of
                 PAIRS with a row that was already listed
    pairs      : one thread's rows of `ActivePairs`
    listed_out : (n,) int64, to which the number of pairs of each unit is added
    """
    together = tile_rows(rows) if tiled else max(1, rows)
    for k in range(-(-rows // together)):
        first, some = row + k * together, min(together, rows - k * together)
        if source == ACTIVE:
            list_active(surrogate, v, first, some, n, low, high, pairs)
        elif source == FIRED:
            list_fired(v, first, some, n, low, high, pairs)
        else:
            list_every(some, low, high, pairs)
        for j in range(low, high):
            listed_out[j] += pairs.counts[j]
        to = (k * n + low) * (together + PAIRS)
        for j in range(low, high if tiled else low):
            count = pairs.counts[j]
            padded = to + -(-count // PAIRS) * PAIRS
            pairs.tile_begins[k * n + j], pairs.tile_counts[k * n + j] = to, count
            for q in range(count):
                pairs.tile_samples[to + q] = pairs.samples[j * some + q]
            for q in range(to + count, padded):
                pairs.tile_samples[q] = pairs.tile_samples[to]
            to = padded
