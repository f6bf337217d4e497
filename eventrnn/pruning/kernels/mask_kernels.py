"""CPU kernels for N:M masks (called by `pruning/nm.py`).

Each call fills `kept_out` for the lines or tiles first..last - 1 and writes nothing else, so that threads can share the
work by ranges. There is no counterpart in `reference.py`; the tests compare the exact masks with an integer program.

    magnitudes : (lines, length) float32, finite and >= 0
    tiles      : (tiles, M * M) float32, finite and >= 0; one M x M tile per line, row by row
    kept_out   : boolean array of the shape of `magnitudes` or `tiles`

The bits of non-negative float32 numbers sort as integers. Sorting keys hold these bits above the index of the entry, so
that equal magnitudes are ordered by index.
"""

from __future__ import annotations

import numpy as np

from eventrnn.cpu.kernels.jit import allocating, compiled

# Low bits of a sorting key that hold the index of an entry in its tile; 32 x 32 entries fit.
_PLACE_BITS = 16

_PLACE = (1 << _PLACE_BITS) - 1

# Gaps of shell sort: those of Ciura (2001), chosen for few comparisons at up to a few thousand elements.
_GAPS = (701, 301, 132, 57, 23, 10, 4, 1)


@compiled
def keep_of_groups(first, last, n, m, magnitudes, kept_out):
    """Keep the n largest of every m consecutive magnitudes of a line; the last group of a line may be shorter.

    The rank of a magnitude is the number of larger ones in its group, plus the number of equal ones after it.
    """
    length = magnitudes.shape[1]
    for line in range(first, last):
        for start in range(0, length, m):
            stop = min(start + m, length)
            for k in range(start, stop):
                ahead = 0
                for other in range(start, stop):
                    larger = magnitudes[line, other] > magnitudes[line, k]
                    tied_before = magnitudes[line, other] == magnitudes[line, k] and other > k
                    ahead += larger or tied_before
                kept_out[line, k] = ahead < n


@compiled
def _sort(keys):
    """Sort int64 keys in ascending order, in place. Shell sort needs no allocation."""
    for gap in _GAPS:
        for k in range(gap, len(keys)):
            key = keys[k]
            at = k
            while at >= gap and keys[at - gap] > key:
                keys[at] = keys[at - gap]
                at -= gap
            keys[at] = key


@compiled
def _refill(n, m, keys, rows, columns, kept):
    """Keep further entries, largest first, whose row and column both have fewer than n; entries of zero are skipped.

    keys          : (M * M,) int64 sorting keys, ascending
    rows, columns : (M,) int64, number of kept entries per row and column, updated
    kept          : (M * M,) boolean, updated
    """
    for k in range(len(keys) - 1, -1, -1):
        place = keys[k] & _PLACE
        i, j = place // m, place % m
        if keys[k] > _PLACE and not kept[place] and rows[i] < n and columns[j] < n:
            kept[place] = True
            rows[i] += 1
            columns[j] += 1


@allocating
def greedy_tiles(first, last, n, m, tiles, kept_out):
    """Sorted greedy masks (Hubara et al. 2021): prune the smallest entry of an over-full row or column, then refill.

    The sum of the pruned magnitudes is at most twice that of an optimal mask; refilling only lowers it. Cost per tile:
    O(M^2 log M).
    """
    bits = tiles.view(np.int32)
    keys = np.empty(m * m, np.int64)
    rows, columns = np.empty(m, np.int64), np.empty(m, np.int64)
    for t in range(first, last):
        for place in range(m * m):
            keys[place] = (np.int64(bits[t, place]) << _PLACE_BITS) | place
        _sort(keys)
        rows[:] = m
        columns[:] = m
        kept = kept_out[t]
        for key in keys:
            place = key & _PLACE
            i, j = place // m, place % m
            # A zero (padding, for example) is always pruned; it must not take the place of a weight.
            prune = key <= _PLACE or rows[i] > n or columns[j] > n
            kept[place] = not prune
            rows[i] -= prune
            columns[j] -= prune
        _refill(n, m, keys, rows, columns, kept)


@allocating
def exact_tiles(first, last, n, m, tiles, kept_out):
    """Masks of maximal magnitude by min-cost flow: successive shortest paths (Dijkstra with potentials), float64.

    The flow network: each row is a source of n units, each entry is an edge of capacity 1 from its row to its column
    with cost -magnitude, each column leads to the sink with capacity n at no cost, and each row leads to the sink
    directly at no cost. Nodes 0..M - 1 are the rows, M..2M - 1 the columns. `kept` holds the edges with flow; the
    residual edge of a kept entry leads from its column back to its row. Cost per tile: O(n M^3).
    """
    infinite = np.inf
    row_price, column_price = np.empty(m), np.empty(m)
    distance = np.empty(2 * m)
    before = np.empty(2 * m, np.int64)
    done = np.empty(2 * m, np.bool_)
    load = np.empty(m, np.int64)
    weights = np.empty(m * m)
    for t in range(first, last):
        kept = kept_out[t]
        kept[:] = False
        load[:] = 0
        row_price[:] = 0
        sink_price = 0.0
        for j in range(m):
            column_price[j] = 0
            for i in range(m):
                weights[i * m + j] = tiles[t, i * m + j]
                column_price[j] = min(column_price[j], -weights[i * m + j])
            sink_price = min(sink_price, column_price[j])
        for unit in range(m * n):
            distance[:] = infinite
            done[:] = False
            distance[unit // n] = 0.0
            before[unit // n] = -1
            sink_distance, end = infinite, -1
            while True:
                node, nearest = -1, sink_distance
                for k in range(2 * m):
                    if not done[k] and distance[k] < nearest:
                        node, nearest = k, distance[k]
                if node < 0:
                    break
                done[node] = True
                if node < m:
                    i = node
                    base = nearest + row_price[i]
                    if base - sink_price < sink_distance:
                        sink_distance, end = base - sink_price, node
                    for j in range(m):
                        through = base - weights[i * m + j] - column_price[j]
                        if not kept[i * m + j] and through < distance[m + j]:
                            distance[m + j] = through
                            before[m + j] = i
                else:
                    j = node - m
                    base = nearest + column_price[j]
                    if load[j] < n and base - sink_price < sink_distance:
                        sink_distance, end = base - sink_price, node
                    for i in range(m):
                        through = base + weights[i * m + j] - row_price[i]
                        if kept[i * m + j] and through < distance[i]:
                            distance[i] = through
                            before[i] = node
            for k in range(m):
                row_price[k] += min(distance[k], sink_distance)
                column_price[k] += min(distance[m + k], sink_distance)
            sink_price += sink_distance
            if end >= m:
                load[end - m] += 1
            node = end
            while before[node] >= 0:
                i, j = (before[node], node - m) if node >= m else (node, before[node] - m)
                kept[i * m + j] = node >= m
                node = before[node]


@allocating
def table_tiles(first, last, m, tiles, table, kept_out):
    """The mask of maximal magnitude in a table, by trying all of them with float64 sums; the first of equal ones wins.

    table : (masks, M) int64, bit j of table[k, i] says whether mask k keeps entry (i, j)
    """
    patterns = 1 << m
    sums = np.empty((m, patterns))
    for t in range(first, last):
        for i in range(m):
            for pattern in range(patterns):
                total = 0.0
                for j in range(m):
                    if pattern >> j & 1:
                        total += tiles[t, i * m + j]
                sums[i, pattern] = total
        best, heaviest = 0, -1.0
        for k in range(len(table)):
            total = 0.0
            for i in range(m):
                total += sums[i, table[k, i]]
            if total > heaviest:
                best, heaviest = k, total
        for place in range(m * m):
            kept_out[t, place] = table[best, place // m] >> (place % m) & 1
