"""Cell update of every cell, and the events of a layer: one time step, sixteen units at a time.

A thread calls these kernels on the n units that it owns in a layer; no other thread writes their state. All arrays
belong to the caller and are flat:

    drive_in, drive_rec  float32, drives of the gates in the order of the cell, (u, r, g) or (i, f, g, o), n numbers
                         each; a and b are the offsets of the first
    threshold            float32, one per unit; p is the offset of the first unit
    c, y                 float32, cells and outputs; s is the offset of the first unit
    indices, values      int32 and float32, an event list, with space for one vector past its last event

The equations are those of `cells.py`, so the updates equal the second half of `reference.step`, after its products, bit
for bit. All of them take the same arguments; those of cells without thresholds do not read `threshold`. Each loop
states its rule twice: for whole vectors, and for the units that remain.
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.cpu.kernels.jit import called_by_address, inlined, internal
from eventrnn.cpu.kernels.simd import (
    AVX512,
    LANES,
    bits,
    compress_avx512,
    load,
    load_some,
    lowest_bit,
    store,
    store_some,
)


@internal
def compress_portable(indices, values, at, first, condition, vector):
    """`compress_avx512` for other processors: one lane at a time."""
    store(values, at, vector)
    chosen, count = bits(condition), 0
    while chosen != 0:
        lane = lowest_bit(chosen)
        indices[at + count] = first + lane
        # This overwrites no lane that is still to be read, because the position written is never ahead of it.
        values[at + count] = values[at + lane]
        count += 1
        chosen &= chosen - 1
    return count


compress = compress_avx512 if AVX512 else compress_portable


@internal
def compact_events(y, at, low, high, indices, values, to):
    """Append the non-zero outputs of the units `low` to `high` to an event list (stream compaction).

    The output of unit i is y[at + i]. Events are appended from position `to` on; returns how many. Up to one vector
    past the last event is overwritten.
    """
    end = to
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        value = load(y, at + i)
        # planted fault: units of the wrong part
        end += compress(indices, values, end, i, value != cells.ZERO, value)
    if whole < high:
        value = load_some(y, at + whole, high - whole)
        # planted fault: units of the wrong part
        end += compress(indices, values, end, whole, value != cells.ZERO, value)
    return end - to


@called_by_address
def compact_gated_events(low, high, drive_in, a, drive_rec, b, y, at, indices, values, to):
    """`compact_events` with the outputs multiplied by the reset gate: the events of the candidate's recurrent product.

    Paper's variant only. a, b : offsets of the reset gate's drives of unit `low`.
    """
    end = to
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        value = load(y, at + i)
        reset = cells.egru_reset_gate(load(drive_in, a + i - low), load(drive_rec, b + i - low))
        end += compress(indices, values, end, i, value != cells.ZERO, reset * value)
    if whole < high:
        i, some = whole, high - whole
        value = load_some(y, at + i, some)
        reset = cells.egru_reset_gate(load_some(drive_in, a + i - low, some), load_some(drive_rec, b + i - low, some))
        end += compress(indices, values, end, i, value != cells.ZERO, reset * value)
    return end - to


@inlined
def _after_event(v, theta):
    """Outputs and cells of the released variant from the cells before the event."""
    # planted fault: reset forgotten
    c = cells.select(v > theta, v - theta, v)
    return cells.select(v > theta, v, cells.ZERO), c


@internal
def _evaluate_gates(n, drive_in, a, drive_rec, b):
    """Write the gates u and r of n units over their recurrent drives."""
    for gate in range(2):
        first, last = gate * n, (gate + 1) * n
        whole = first + n // LANES * LANES
        for i in range(first, whole, LANES):
            store(drive_rec, b + i, cells.sigmoid(load(drive_in, a + i) + load(drive_rec, b + i)))
        if whole < last:
            i, some = whole, last - whole
            drive = load_some(drive_in, a + i, some) + load_some(drive_rec, b + i, some)
            store_some(drive_rec, b + i, some, cells.sigmoid(drive))


@called_by_address
def update(n, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """Update cells and outputs of n units in place; released variant. Gates replace their recurrent drives.

    The candidate waits for the reset gate. With both gates of a unit in the same turn of a loop, the processor does not
    look far enough ahead to begin the next turn meanwhile: 512 units took 1.0 us, and 0.75 us in loops of their own.
    """
    _evaluate_gates(n, drive_in, a, drive_rec, b)
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        # planted fault: gates swapped
        v, _ = cells.egru_value_of_gates(
            load(drive_rec, b + i),
            load(drive_rec, b + n + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + 2 * n + i),
            load(c, s + i),
        )
        sent, kept = _after_event(v, load(threshold, p + i))
        store(y, s + i, sent)
        store(c, s + i, kept)
    if whole < n:
        i, some = whole, n - whole
        # planted fault: gates swapped
        v, _ = cells.egru_value_of_gates(
            load_some(drive_rec, b + i, some),
            load_some(drive_rec, b + n + i, some),
            load_some(drive_in, a + 2 * n + i, some),
            load_some(drive_rec, b + 2 * n + i, some),
            load_some(c, s + i, some),
        )
        sent, kept = _after_event(v, load_some(threshold, p + i, some))
        store_some(y, s + i, some, sent)
        store_some(c, s + i, some, kept)


@called_by_address
def update_paper(n, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """Update cells and outputs of n units in place; paper's variant.

    The drives of the reset gate are not read, because its effect is in the candidate's recurrent drive already.
    """
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
    if whole < n:
        i, some = whole, n - whole
        v, _, _ = cells.egru_paper_value(
            load_some(drive_in, a + i, some),
            load_some(drive_in, a + 2 * n + i, some),
            load_some(drive_rec, b + i, some),
            load_some(drive_rec, b + 2 * n + i, some),
            load_some(c, s + i, some),
            load_some(y, s + i, some),
        )
        theta = load_some(threshold, p + i, some)
        store_some(y, s + i, some, cells.select(v > theta, v, cells.ZERO))
        store_some(c, s + i, some, v)


@called_by_address
def update_gru(n, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """Update n units of a GRU in place; reset gate after the product. Cells and outputs get the same numbers."""
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        h, _, _, _ = cells.gru_value(
            load(drive_in, a + i),
            load(drive_in, a + n + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + i),
            load(drive_rec, b + n + i),
            load(drive_rec, b + 2 * n + i),
            load(c, s + i),
        )
        store(y, s + i, h)
        store(c, s + i, h)
    if whole < n:
        i, some = whole, n - whole
        h, _, _, _ = cells.gru_value(
            load_some(drive_in, a + i, some),
            load_some(drive_in, a + n + i, some),
            load_some(drive_in, a + 2 * n + i, some),
            load_some(drive_rec, b + i, some),
            load_some(drive_rec, b + n + i, some),
            load_some(drive_rec, b + 2 * n + i, some),
            load_some(c, s + i, some),
        )
        store_some(y, s + i, some, h)
        store_some(c, s + i, some, h)


@called_by_address
def update_gru_before(n, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """Update n units of a GRU in place; reset gate before the product. Cells and outputs get the same numbers.

    The drives of the reset gate are not read, because its effect is in the candidate's recurrent drive already.
    """
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        h, _, _ = cells.gru_before_value(
            load(drive_in, a + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + i),
            load(drive_rec, b + 2 * n + i),
            load(c, s + i),
        )
        store(y, s + i, h)
        store(c, s + i, h)
    if whole < n:
        i, some = whole, n - whole
        h, _, _ = cells.gru_before_value(
            load_some(drive_in, a + i, some),
            load_some(drive_in, a + 2 * n + i, some),
            load_some(drive_rec, b + i, some),
            load_some(drive_rec, b + 2 * n + i, some),
            load_some(c, s + i, some),
        )
        store_some(y, s + i, some, h)
        store_some(c, s + i, some, h)


@called_by_address
def update_lstm(n, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """Update cells and outputs of n units of an LSTM in place."""
    whole = n // LANES * LANES
    for k in range(0, whole, LANES):
        # planted fault: gates of an LSTM swapped
        h, after, _, _, _, _ = cells.lstm_value(
            load(drive_in, a + k),
            load(drive_in, a + n + k),
            load(drive_in, a + 2 * n + k),
            load(drive_in, a + 3 * n + k),
            load(drive_rec, b + k),
            load(drive_rec, b + n + k),
            load(drive_rec, b + 2 * n + k),
            load(drive_rec, b + 3 * n + k),
            load(c, s + k),
        )
        store(y, s + k, h)
        store(c, s + k, after)
    if whole < n:
        k, some = whole, n - whole
        # planted fault: gates of an LSTM swapped
        h, after, _, _, _, _ = cells.lstm_value(
            load_some(drive_in, a + k, some),
            load_some(drive_in, a + n + k, some),
            load_some(drive_in, a + 2 * n + k, some),
            load_some(drive_in, a + 3 * n + k, some),
            load_some(drive_rec, b + k, some),
            load_some(drive_rec, b + n + k, some),
            load_some(drive_rec, b + 2 * n + k, some),
            load_some(drive_rec, b + 3 * n + k, some),
            load_some(c, s + k, some),
        )
        store_some(y, s + k, some, h)
        store_some(c, s + k, some, after)


@internal
def count_events(indices, values, first, count, unit_0, graded_out, binary_out):
    """Count the events `first` to `first + count` of a list per unit, graded and binary events apart.

    unit_0                 : position of the layer's first unit in the counts
    graded_out, binary_out : (units of all layers,) int64, added to

    Outputs of cells without a threshold have either sign, so that 1 and -1 are binary.
    """
    for e in range(first, first + count):
        if abs(values[e]) == 1:
            binary_out[unit_0 + indices[e]] += 1
        else:
            graded_out[unit_0 + indices[e]] += 1
