"""Kernels over groups and square tiles of magnitudes: which weights an N:M mask keeps.

Each kernel fills `kept_out` for tiles (or lines) first..last - 1 and touches nothing else, so that threads may share
the work by ranges. A tile is M x M magnitudes, flat, row by row; at most `n` of each row and of each column are kept.
Magnitudes are finite and >= 0: their float32 bits then sort as integers, and ties go in storage order. Only
`transposable.py` calls these.
"""

from __future__ import annotations

import numpy as np

from eventrnn.cpu.kernels.jit import allocating, compiled

# Tiles side by side in the transport iteration: one vector register of float32.
ABREAST = 16

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


@compiled
def _transport(n, m, rounds, plan, slack, factor):
    """Dykstra's projections of `plan` onto rows that sum to n, columns that sum to n, and entries of at most 1."""
    for _ in range(rounds):
        for i in range(m):
            factor[:] = 0
            for j in range(m):
                for lane in range(ABREAST):
                    factor[lane] += plan[i * m + j, lane]
            for lane in range(ABREAST):
                factor[lane] = np.float32(n) / factor[lane]
            for j in range(m):
                for lane in range(ABREAST):
                    plan[i * m + j, lane] *= factor[lane]
        for j in range(m):
            factor[:] = 0
            for i in range(m):
                for lane in range(ABREAST):
                    factor[lane] += plan[i * m + j, lane]
            for lane in range(ABREAST):
                factor[lane] = np.float32(n) / factor[lane]
            for i in range(m):
                for lane in range(ABREAST):
                    plan[i * m + j, lane] *= factor[lane]
        for place in range(m * m):
            for lane in range(ABREAST):
                whole = plan[place, lane] * slack[place, lane]
                clipped = min(whole, np.float32(1))
                # Only what was cut off is owed to the next round.
                slack[place, lane] = whole / clipped
                plan[place, lane] = clipped


@compiled
def _exchange(n, m, weights, rows, columns, kept):
    """Improve a legal mask by swaps until none gains.

    Two rows trade a column each; or a row and a column with room, whose common entry is kept, take one each from an
    entry that they push aside.
    """
    # Each swap gains, but rounding might let a circle of them look so: an end to it.
    for _ in range(m * m):
        better = False
        for place in range(m * m):
            if kept[place] and weights[place] == 0:  # after a trade
                kept[place] = False
                rows[place // m] -= 1
                columns[place % m] -= 1
        for i in range(m):
            for k in range(i):
                give, take, gain_give, gain_take = -1, -1, np.float32(-np.inf), np.float32(-np.inf)
                for j in range(m):
                    step = weights[k * m + j] - weights[i * m + j]
                    if kept[i * m + j] and not kept[k * m + j]:
                        if step > gain_give:
                            give, gain_give = j, step
                    elif kept[k * m + j] and not kept[i * m + j] and -step > gain_take:
                        take, gain_take = j, -step
                if give >= 0 and take >= 0 and gain_give + gain_take > 0:
                    kept[i * m + give], kept[k * m + give] = False, True
                    kept[i * m + take], kept[k * m + take] = True, False
                    better = True
                    continue
                # A row with room may take over an entry of the other, if that is heavier here.
                if rows[i] < n and take >= 0 and gain_take > 0:
                    kept[i * m + take], kept[k * m + take] = True, False
                    rows[i] += 1
                    rows[k] -= 1
                    better = True
                elif rows[k] < n and give >= 0 and gain_give > 0:
                    kept[i * m + give], kept[k * m + give] = False, True
                    rows[k] += 1
                    rows[i] -= 1
                    better = True
        for i in range(m):
            for j in range(m):
                if rows[i] >= n or columns[j] >= n:
                    continue
                best, aside = np.float32(0), -1
                if not kept[i * m + j] and weights[i * m + j] > 0:
                    best, aside = weights[i * m + j], i * m + j
                for k in range(m):
                    for q in range(m):
                        if k != i and q != j and kept[k * m + q] and not (kept[i * m + q] or kept[k * m + j]):
                            gain = weights[i * m + q] + weights[k * m + j] - weights[k * m + q]
                            if gain > best:
                                best, aside = gain, k * m + q
                if aside < 0:
                    continue
                rows[i] += 1
                columns[j] += 1
                better = True
                if aside == i * m + j:
                    kept[aside] = True
                else:
                    k, q = aside // m, aside % m
                    kept[aside] = False
                    kept[i * m + q] = kept[k * m + j] = True
        if not better:
            break


@allocating
def transport_tiles(first, last, n, m, tiles, sharpness, rounds, kept_out):
    """Entropy-regularised transport, rounded and improved by swaps (after Meng et al. 2025); `ABREAST` tiles at a time.

    sharpness : of exp(sharpness * magnitude / largest of the tile), at most 80, where float32 still has numbers
    rounds    : of projections
    """
    plan, slack = np.ones((m * m, ABREAST), np.float32), np.empty((m * m, ABREAST), np.float32)
    factor = np.empty(ABREAST, np.float32)
    fractions = np.empty(m * m, np.float32)
    bits = fractions.view(np.int32)
    keys = np.empty(m * m, np.int64)
    rows, columns = np.empty(m, np.int64), np.empty(m, np.int64)
    for start in range(first, last, ABREAST):
        count = min(ABREAST, last - start)
        for lane in range(count):
            largest = np.float32(0)
            for place in range(m * m):
                largest = max(largest, tiles[start + lane, place])
            # Divided, not multiplied by the inverse, which overflows for a subnormal; a tile of zeros stays flat.
            for place in range(m * m):
                share = tiles[start + lane, place] / largest if largest > 0 else np.float32(1)
                plan[place, lane] = np.exp(sharpness * (share - np.float32(1)))
        slack[:] = 1
        _transport(n, m, rounds, plan, slack, factor)
        for lane in range(count):
            kept = kept_out[start + lane]
            for place in range(m * m):
                fractions[place] = plan[place, lane] if tiles[start + lane, place] > 0 else np.float32(0)
            for place in range(m * m):
                keys[place] = (np.int64(bits[place]) << _PLACE_BITS) | place
            _sort(keys)
            kept[:] = False
            rows[:] = 0
            columns[:] = 0
            _refill(n, m, keys, rows, columns, kept)
            _exchange(n, m, tiles[start + lane], rows, columns, kept)
