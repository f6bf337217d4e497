"""Which units a thread has, step by step: whoever waits at the barrier takes some from a neighbour.

Cores of one machine are seldom equally fast, by design or because of what else runs on them, and at every step all wait
for the slowest. Who computes a unit changes no bit. Of the two barriers of a step in the paper's variant one is looked
at.
"""

from __future__ import annotations

from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.sync import meet
from eventrnn.cpu.tables import HIGH, LOW, VALUES, WIDTH
from eventrnn.training.bptt.kernels.event_lists import share

# Turns of the waiting loop that two threads may be apart. Less than a vector of units takes, so that between equals a
# border goes to and fro by one; what a turn takes differs by processor.
SLACK = 32


@compiled
def even_shares(n, parts, edges_out):
    """Thread p has units edges[p] to edges[p + 1], in whole vectors, as nearly as many as the others."""
    for p in range(parts + 1):
        edges_out[p] = share(n, LANES, p, parts)


@compiled
def meet_and_move(barrier, part, parts, target, turn, waited, edges):
    """Wait at the `turn`-th barrier, then move a vector of units across each border between threads of which one waited
    longer the time before. Returns the next target; every thread moves its own `edges` (parts + 1), all alike.

    `waited` (2, parts) is shared: what was written before this barrier can be read now, and is overwritten after the
    next.
    """
    spins = meet(barrier, parts, target)
    before = waited[(turn + 1) % 2]
    for p in range(1, parts):
        ahead = before[p - 1] - before[p]
        if ahead > SLACK and edges[p] + LANES < edges[p + 1]:
            edges[p] += LANES
        elif ahead < -SLACK and edges[p] - LANES > edges[p - 1]:
            edges[p] -= LANES
    waited[turn % 2, part] = spins
    return target + parts


@compiled
def cut_windows(table, first, last, n, low, high, table_out, to):
    """The windows `first` to `last` of dense float32 rows, each of one gate's columns, as far as units `low` to `high`
    go, from row `to` of another table on; returns where it ends. `low` is a whole number of vectors."""
    for w in range(first, last):
        gate = table[w, LOW] // n * n
        a, b = max(table[w, LOW], gate + low), min(table[w, HIGH], gate + high)
        if a < b:
            for field in range(table.shape[1]):
                table_out[to, field] = table[w, field]
            table_out[to, LOW], table_out[to, HIGH] = a, b
            table_out[to, VALUES] += a - table[w, LOW]
            table_out[to, WIDTH] = -(-(b - a) // LANES) * LANES
            to += 1
    return to
