"""Kernels over groups and square tiles of magnitudes: which weights an N:M mask keeps.

Each kernel fills `kept_out` for tiles (or lines) first..last - 1 and touches nothing else, so that threads may share
the work by ranges. A tile is M x M magnitudes, flat, row by row; at most `n` of each row and of each column are kept.
Magnitudes are finite and >= 0: their float32 bits then sort as integers, and ties go in storage order. Only
`transposable.py` calls these.
"""

from __future__ import annotations

import numpy as np

from eventrnn.cpu.kernels.jit import allocating, compiled

# Place of an entry within its tile, in the low bits of a sorting key: 32 x 32 fits.
_PLACE_BITS = 16

_PLACE = (1 << _PLACE_BITS) - 1

# Ciura 2001: the best gaps known for sorting a few thousand numbers.
_GAPS = (701, 301, 132, 57, 23, 10, 4, 1)


@compiled
def keep_of_groups(first, last, n, m, magnitudes, kept_out):
    """The n largest of every m consecutive magnitudes of a line; the last group of a line may be shorter.

    magnitudes, kept_out : (lines, length)
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
    """Ascending, in place: shell sort, for there is nothing to allocate."""
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
    """Keep, heaviest first, what both its row and its column have room for; no zero. `rows`, `columns`: how many are.

    keys : bits of a magnitude, or of any number that is only zero where it is, above the place
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
    """Sorted greedy (Hubara et al. 2021): prune the lightest whose row or column has too many, then refill.

    What is pruned weighs at most twice what an optimal mask prunes; refilling only lessens it. O(M^2 log M) a tile.
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
            # A zero, such as padding, is pruned first and for nothing: it must not take the room of a weight.
            prune = key <= _PLACE or rows[i] > n or columns[j] > n
            kept[place] = not prune
            rows[i] -= prune
            columns[j] -= prune
        _refill(n, m, keys, rows, columns, kept)


@allocating
def exact_tiles(first, last, n, m, tiles, kept_out):
    """The heaviest legal mask: min-cost flow by successive shortest paths (Dijkstra with potentials), float64.

    Each row sends n units, each over a free entry of its row into a column with room for n, at the cost of minus the
    magnitude, or to nowhere at no cost; a unit may push others aside. O(n M^3) a tile.
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
    """The heaviest of a table of masks, every one tried; float64 sums, the first of equals.

    table : (masks, M), the bits of each row
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
