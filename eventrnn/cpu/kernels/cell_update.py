"""One time step of a layer, sixteen units at a time: cells, outputs, events, and what is recorded of them.

The rules are those of `cells.py`; here is only where their numbers lie.
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import AVX512, LANES, bits, compress_avx512, load, lowest_bit, store


@compiled
def compress_portable(ids, sent, at, first, condition, vector):
    """`compress_avx512` for other processors."""
    store(sent, at, vector)
    chosen, count = bits(condition), 0
    while chosen != 0:
        lane = lowest_bit(chosen)
        ids[at + count] = first + lane
        # Never ahead of the lane that is read.
        sent[at + count] = sent[at + lane]
        count += 1
        chosen &= chosen - 1
    return count


compress = compress_avx512 if AVX512 else compress_portable


@compiled
def send(y, at, low, high, ids, sent, to):
    """Compact the non-zero y of units `low` to `high` into an event list at `to`; returns how many.

    Writes up to a vector past the last.
    """
    end = to
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        value = load(y, at + i)
        # planted fault: units of the wrong part
        end += compress(ids, sent, end, i, value != cells.ZERO, value)
    for i in range(whole, high):
        if y[at + i] != 0:
            # planted fault: units of the wrong part
            ids[end], sent[end] = i, y[at + i]
            end += 1
    return end - to


@compiled
def send_gated(low, high, drive_in, a, drive_rec, b, y, at, ids, sent, to):
    """`send` of y times the reset gate: what the paper's candidate product receives. a, b: the units' r drives."""
    end = to
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        value = load(y, at + i)
        reset = cells.egru_reset_gate(load(drive_in, a + i - low), load(drive_rec, b + i - low))
        end += compress(ids, sent, end, i, value != cells.ZERO, reset * value)
    for i in range(whole, high):
        if y[at + i] != 0:
            reset = cells.egru_reset_gate(drive_in[a + i - low], drive_rec[b + i - low])
            ids[end], sent[end] = i, reset * y[at + i]
            end += 1
    return end - to


@compiled
def update(n, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """Released variant: cells and outputs of n units, in place. Their drives (u, r, g) begin at a and b."""
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        # planted fault: gates swapped
        v, _, _, _ = cells.egru_value(
            load(drive_in, a + i),
            load(drive_in, a + n + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + i),
            load(drive_rec, b + n + i),
            load(drive_rec, b + 2 * n + i),
            load(c, s + i),
        )
        theta = load(threshold, p + i)
        store(y, s + i, cells.select(v > theta, v, cells.ZERO))
        # planted fault: reset forgotten
        store(c, s + i, cells.select(v > theta, v - theta, v))
    for i in range(whole, n):
        # planted fault: gates swapped
        v, _, _, _ = cells.egru_value(
            drive_in[a + i],
            drive_in[a + n + i],
            drive_in[a + 2 * n + i],
            drive_rec[b + i],
            drive_rec[b + n + i],
            drive_rec[b + 2 * n + i],
            c[s + i],
        )
        theta = threshold[p + i]
        y[s + i] = cells.select(v > theta, v, cells.ZERO)
        # planted fault: reset forgotten
        c[s + i] = cells.select(v > theta, v - theta, v)


@compiled
def update_paper(n, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """Paper's variant: cells and outputs of n units, in place. Their drives (u, r, g) begin at a and b."""
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        v, _, _ = cells.egru_paper_value(
            load(drive_in, a + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + i),
            load(drive_rec, b + 2 * n + i),
            load(c, s + i),
            load(y, s + i),
        )
        store(y, s + i, cells.select(v > load(threshold, p + i), v, cells.ZERO))
        store(c, s + i, v)
    for i in range(whole, n):
        v, _, _ = cells.egru_paper_value(
            drive_in[a + i], drive_in[a + 2 * n + i], drive_rec[b + i], drive_rec[b + 2 * n + i], c[s + i], y[s + i]
        )
        y[s + i] = cells.select(v > threshold[p + i], v, cells.ZERO)
        c[s + i] = v


@compiled
def tally(ids, sent, first, count, unit_0, graded_out, binary_out):
    """Count events by unit; y is never negative here."""
    for e in range(first, first + count):
        if sent[e] == 1:
            binary_out[unit_0 + ids[e]] += 1
        else:
            graded_out[unit_0 + ids[e]] += 1
