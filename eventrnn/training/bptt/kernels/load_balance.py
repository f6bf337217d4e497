"""Load balancing between threads: at each barrier, a vector of units can move to a thread that waited longer.

Within a time step every thread owns a range of units, and at the end of the step all threads wait for the slowest one.
Cores of a machine differ in speed, by design or because of other processes. The bounds between the threads' units
therefore move, by one vector of units per step, towards the thread that arrived later at the barrier of the step
before. Sums are never split, so the owner of a unit does not affect any bit of the result. In the paper's variant,
which has two barriers per step, only the second one is used.

Measured on two threads, one window of training: with another process that took about 40 % of one core, 678 ms with
moving bounds and 769 ms with fixed ones; on otherwise idle cores the times were equal.

Every thread keeps its own copy of the bounds (`Rebalancing.unit_bounds`), and all threads compute the same update from
the shared waiting times, so the exchange needs no further barrier. There is no counterpart in `reference.py`.
"""

from __future__ import annotations

from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.sync import barrier_wait
from eventrnn.cpu.tables import HIGH, LOW, VALUES, WIDTH
from eventrnn.training.bptt.kernels.event_lists import share

# Turns of the waiting loop by which two threads may differ. This is less than the time that a vector of units takes, so
# that between equal threads a bound moves by one vector at most; the length of a turn depends on the processor.
SLACK = 32


@compiled
def even_bounds(n, n_threads, unit_bounds_out):
    """Thread p owns units unit_bounds[p] to unit_bounds[p + 1]: equal shares, in whole vectors."""
    for p in range(n_threads + 1):
        unit_bounds_out[p] = share(n, LANES, p, n_threads)


@compiled
def barrier_and_rebalance(barrier, thread, n_threads, target, turn, balance):
    """Wait at the barrier of step `turn`, then move the bounds of this thread's copy. Returns the next target.

    A bound moves by one vector if the waits of the two threads beside it differed by more than the slack at the barrier
    before; every thread keeps at least one unit. A thread's wait is written after this barrier, read after the next
    one, and overwritten after the one that follows it: two rows suffice.
    """
    next_target, spins = barrier_wait(barrier, n_threads, target)
    if next_target < 0:
        return next_target
    before, bounds = balance.waited[(turn + 1) % 2], balance.unit_bounds[thread]
    for p in range(1, n_threads):
        difference = before[p - 1] - before[p]
        if difference > balance.slack and bounds[p] + LANES < bounds[p + 1]:
            bounds[p] += LANES
        elif difference < -balance.slack and bounds[p] - LANES > bounds[p - 1]:
            bounds[p] -= LANES
    balance.waited[turn % 2, thread] = spins
    return next_target


@compiled
def cut_tiles(tiles, first, last, n, low, high, tiles_out, to):
    """Restrict the column tiles `first` to `last` of dense float32 rows to units `low` to `high`.

    A tile holds columns of one gate; `low` is a multiple of the vector length. The restricted tiles go to `tiles_out`
    from row `to` on. Returns the row after the last one.
    """
    for w in range(first, last):
        gate = tiles[w, LOW] // n * n
        a, b = max(tiles[w, LOW], gate + low), min(tiles[w, HIGH], gate + high)
        if a < b:
            for field in range(tiles.shape[1]):
                tiles_out[to, field] = tiles[w, field]
            tiles_out[to, LOW], tiles_out[to, HIGH] = a, b
            tiles_out[to, VALUES] += a - tiles[w, LOW]
            tiles_out[to, WIDTH] = -(-(b - a) // LANES) * LANES
            to += 1
    return to
