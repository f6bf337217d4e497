"""The time loop of the CPU engine: all layers and steps of a run, and the single step of a simulator.

Every thread calls `run` with its number. A thread owns a range of whole vectors of units of each layer
(`unit_bounds[layer]`), all gate columns of these units, and their events; it also owns a range of read-out outputs.
Threads read each other's events only after a barrier, and in the order of units, so the result does not depend on their
number. It equals `reference.forward`, layer by layer, bit for bit.

Where the arrays live: weights in `NetworkTables`, read by all threads; drives, event lists and workspaces in
`RunBuffers`; cells `c` and outputs `y`, (units * batch,) float32, layer by layer and within a layer (batch, N), updated
in place. In a drive row, a thread's columns begin at `drive_begins[layer, thread]`: one gate of its units after the
other, in an EGRU and a GRU (u, r, g), in an LSTM (i, f, g, o).

Event lists of a layer: buffer `layer % 2`, row `(t + 1) * batch + b` of the chunk for step t and sample b; row b holds
the step before the chunk. A row has one list per thread. Thread q's list begins at its first unit, plus one vector for
every thread before it, so the lists of a row, read in order of threads, are in ascending order of units.

Rows without events share one drive row: `drive_of` says where the input drives of a row of the chunk are. Steps in
which neither an input nor a unit of the layer has sent are taken by `silence.py`, several at once.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from eventrnn.cpu import step_table
from eventrnn.cpu.kernels.array_table import first_not_finite, flat, float32_at, int32_at, int64_at
from eventrnn.cpu.kernels.by_address import RUN, address_of, call_gating, call_rest, call_run, call_update
from eventrnn.cpu.kernels.cell_update import compact_events, count_events
from eventrnn.cpu.kernels.float_mode import enter_standard_mode, leave_standard_mode
from eventrnn.cpu.kernels.jit import compiled, inlined
from eventrnn.cpu.kernels.microkernels import prefetch
from eventrnn.cpu.kernels.silence import is_silent, rest_together, share_silent_rows, silent_units, steps_without_input
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.spmm import copy, propagate_all, workspace_of
from eventrnn.cpu.kernels.sync import barrier_wait
from eventrnn.cpu.tables import (
    BIAS_IN,
    BIAS_REC,
    END,
    GATING,
    IN,
    IN_END,
    INPUTS,
    PARTIAL,
    PARTIAL_END,
    REC,
    REC_GATED,
    REST,
    UNIT_0,
    UNITS,
    UPDATE,
    EventLists,
    InputEvents,
    NetworkTables,
    RowEvents,
    RunBuffers,
    RunOutputs,
    RunSize,
    ThreadTables,
    WeightPools,
    Workspace,
)


@compiled
def run(thread, n_threads, barrier, network, inputs, size, buffers, c, y, outputs):
    """One thread's share of the steps `size.begin` to `size.end`; records are those of `tables.py`.

    barrier : (1,) int64, zero at first. Once it is abandoned, every thread returns, and the results are of no use
    """
    layers, events, batch, chunk = network.layers, buffers.events, size.batch, size.chunk
    drive_in, drive_rec, pitch = buffers.input_drives, buffers.recurrent_drives, network.drive_pitch
    n_layers = len(layers) - 1
    reads_out = layers[n_layers, UNITS] > 0
    rows = (chunk + 1) * batch
    row_capacity = len(events.indices) // (2 * rows)
    workspace = workspace_of(buffers.workspace, thread)
    tables = ThreadTables(network.column_tiles[thread], network.pools, workspace, pitch)
    begins, counts, drive_of = buffers.list_begins[thread], buffers.list_counts[thread], buffers.drive_of[thread]
    received = EventLists(inputs.indices, inputs.values, begins, counts)
    relayed = EventLists(events.indices, events.values, begins, counts)
    gated = EventLists(buffers.gated_indices[thread], buffers.gated_values[thread], begins, counts)
    recorded = len(outputs.events) > 0 or len(outputs.states) > 0
    target = n_threads
    for t0 in range(size.begin, size.end, chunk):
        length = min(chunk, size.end - t0)
        for layer in range(n_layers):
            n, unit_0 = layers[layer, UNITS], layers[layer, UNIT_0]
            low, high = network.unit_bounds[layer, thread], network.unit_bounds[layer, thread + 1]
            base = network.drive_begins[layer, thread]
            mine, below = (layer % 2) * rows, ((layer + 1) % 2) * rows
            # Each thread's list has one vector to spare.
            own = low + LANES * thread
            for b in range(batch):
                row = mine + b
                slot = row * n_threads + thread
                first = row * row_capacity + own
                events.begins[slot] = first
                events.counts[slot] = compact_events(
                    y, unit_0 * batch + b * n, low, high, events.indices, events.values, first
                )
            # After the barrier, no thread reads the drives of the last chunk, and the carried events are complete.
            target = barrier_wait(barrier, n_threads, target)
            if target < 0:
                return

            first_tile, last_tile, bias = layers[layer, IN], layers[layer, IN_END], layers[layer, BIAS_IN]
            if length < chunk:
                first_tile, last_tile = layers[layer, PARTIAL], layers[layer, PARTIAL_END]
            n_pre, drive_rows = layers[layer, INPUTS], length * batch
            if layer == 0:
                for k in range(drive_rows):
                    source = inputs.row_of[(t0 - size.begin) * batch + k]
                    begins[k] = inputs.indptr[source]
                    counts[k] = inputs.indptr[source + 1] - inputs.indptr[source]
                given = RowEvents(received, 0, 1, drive_rows)
            else:
                given = RowEvents(events, (below + batch) * n_threads, n_threads, drive_rows)
            used = share_silent_rows(network.share_rows, given, begins, counts, drive_of)
            listed = received if layer == 0 else relayed
            given = RowEvents(listed, 0, given.per_row, min(used + 1, drive_rows))
            propagate_all(tables, first_tile, last_tile, bias, n_pre, given, drive_in)

            first_tile, gated_tile, last_tile = layers[layer, REC], layers[layer, REC_GATED], layers[layer, END]
            bias, reset_first = layers[layer, BIAS_REC], last_tile > gated_tile
            rest, t = layers[layer, REST], 0
            while t < length:
                first_list = (mine + t * batch) * n_threads
                quiet = 0
                if rest != 0 and is_silent(drive_of, used, t * batch, events.counts, first_list, batch * n_threads):
                    quiet = steps_without_input(drive_of, used, batch, t, length)
                if quiet > 0:
                    first = unit_0 * batch + low
                    units = silent_units(network, unit_0 + low, high - low, c, y, first, batch, n, drive_rec, base)
                    # A step that is recorded is taken by itself.
                    most = 1 if recorded or (not reads_out and layer == n_layers - 1) else quiet
                    steps, target = rest_together(thread, n_threads, barrier, target, rest, most, units, buffers.rests)
                    if target < 0:
                        return
                    for row in range(mine + (t + 1) * batch, mine + (t + steps) * batch):
                        events.counts[row * n_threads + thread] = 0
                    # The last of these steps may have events.
                    t += steps - 1
                else:
                    for q in range(first_list, first_list + batch * n_threads if n_threads > 1 else first_list):
                        # The lines are in another core's cache: request all of them at once.
                        for e in range(events.begins[q], events.begins[q] + events.counts[q], LANES):
                            prefetch(events.indices, e)
                            prefetch(events.values, e)
                    sent = RowEvents(events, first_list, n_threads, batch)
                    propagate_all(tables, first_tile, gated_tile, bias, n, sent, drive_rec)
                    if reset_first:
                        # The events of the candidate product are multiplied by the reset gates of all units.
                        target = barrier_wait(barrier, n_threads, target)
                        if target < 0:
                            return
                        for b in range(batch):
                            a, s, to = drive_of[t * batch + b] * pitch, unit_0 * batch + b * n, b * row_capacity
                            begins[b] = to
                            for q in range(n_threads):
                                first, last = network.unit_bounds[layer, q], network.unit_bounds[layer, q + 1]
                                gate_r = network.drive_begins[layer, q] + last - first
                                r_in, r_rec = a + gate_r, b * pitch + gate_r
                                to += call_gating(
                                    layers[layer, GATING],
                                    (
                                        first,
                                        last,
                                        drive_in,
                                        r_in,
                                        drive_rec,
                                        r_rec,
                                        y,
                                        s,
                                        gated.indices,
                                        gated.values,
                                        to,
                                    ),
                                )
                            counts[b] = to - b * row_capacity
                        propagate_all(tables, gated_tile, last_tile, bias, n, RowEvents(gated, 0, 1, batch), drive_rec)
                        # After the barrier, no thread reads y or the reset gates of this step.
                        target = barrier_wait(barrier, n_threads, target)
                        if target < 0:
                            return
                    for b in range(batch):
                        k, s, p = t * batch + b, unit_0 * batch + b * n + low, unit_0 + low
                        lists = first_list + b * n_threads
                        if rest != 0 and is_silent(drive_of, used, k, events.counts, lists, n_threads):
                            units = silent_units(network, p, high - low, c, y, s, 1, n, drive_rec, base)
                            call_rest(rest, (np.int64(1), units))
                        else:
                            a, row_rec = drive_of[k] * pitch + base, b * pitch + base
                            call_update(
                                layers[layer, UPDATE],
                                (high - low, drive_in, a, drive_rec, row_rec, network.threshold, p, c, y, s),
                            )

                for b in range(batch):
                    row, s = mine + (t + 1) * batch + b, unit_0 * batch + b * n
                    # planted fault: parts swapped
                    slot, first = row * n_threads + thread, row * row_capacity + own
                    events.begins[slot] = first
                    events.counts[slot] = compact_events(y, s, low, high, events.indices, events.values, first)
                    # planted fault: last event dropped
                    count_events(
                        events.indices,
                        events.values,
                        first,
                        events.counts[slot],
                        unit_0,
                        outputs.graded,
                        outputs.binary,
                    )
                    at = unit_0 * size.steps * batch + ((t0 + t) * batch + b) * n + low
                    if len(outputs.events) > 0:
                        copy(y, s + low, outputs.events, at, high - low)
                    if len(outputs.states) > 0:
                        copy(c, s + low, outputs.states, at, high - low)
                    if not reads_out and layer == n_layers - 1:
                        copy(y, s + low, outputs.output, ((t0 + t) * batch + b) * n + low, high - low)
                # planted fault: barrier missing
                target = barrier_wait(barrier, n_threads, target)
                if target < 0:
                    return
                t += 1

        if reads_out:
            low, high = network.unit_bounds[n_layers, thread], network.unit_bounds[n_layers, thread + 1]
            base, n_outputs = network.drive_begins[n_layers, thread], network.unit_bounds[n_layers, n_threads]
            first_list = (((n_layers - 1) % 2) * rows + batch) * n_threads
            n_pre, drive_rows = layers[n_layers - 1, UNITS], length * batch
            sent = RowEvents(events, first_list, n_threads, drive_rows)
            first_tile, last_tile, bias = layers[n_layers, IN], layers[n_layers, IN_END], layers[n_layers, BIAS_IN]
            if length < chunk:
                first_tile, last_tile = layers[n_layers, PARTIAL], layers[n_layers, PARTIAL_END]
            used = share_silent_rows(network.share_rows, sent, begins, counts, drive_of)
            sent = RowEvents(relayed, 0, n_threads, min(used + 1, drive_rows))
            propagate_all(tables, first_tile, last_tile, bias, n_pre, sent, drive_in)
            for k in range(drive_rows):
                copy(
                    drive_in, drive_of[k] * pitch + base, outputs.output, (t0 * batch + k) * n_outputs + low, high - low
                )


@cache
def run_address() -> int:
    """Address of `run`, by which `step` calls it; compiled as for a call from Python."""
    return address_of(run, RUN)


@compiled
def step(table, inputs, output):
    """One step on one thread, of the arrays that a table names (`step_table.py`); True if its result is refused.

    The step takes `inputs` (batch, I) float32. It writes `output` (batch, outputs) float32 and the state after the
    step, beside the state before it. It is refused when an input or a cell is not finite. It runs in the standard
    floating-point mode.
    """
    mode = enter_standard_mode()
    refused = _compact_inputs(table, inputs) or _step(table, output)
    leave_standard_mode(mode)
    return refused


@compiled
def step_of_symbols(table, symbols, output):
    """`step` of a network that reads symbols: it takes them, (batch,) int64, and is refused for one out of range."""
    mode = enter_standard_mode()
    refused = _select_rows(table, symbols) or _step(table, output)
    leave_standard_mode(mode)
    return refused


@inlined
def _compact_inputs(table, inputs):
    """Write the input events of a step of `inputs` (batch, I) float32; True, without any, if one is not finite."""
    numbers, (samples, size) = flat(inputs), inputs.shape
    if first_not_finite(numbers, len(numbers)) >= 0:
        return True
    indptr = int64_at(table, step_table.INPUT_INDPTR)
    indices, values = int32_at(table, step_table.INPUT_INDICES), float32_at(table, step_table.INPUT_VALUES)
    for b in range(samples):
        indptr[b + 1] = indptr[b] + compact_events(numbers, b * size, 0, size, indices, values, indptr[b])
    return False


@inlined
def _select_rows(table, symbols):
    """Copy `symbols` (batch,) int64, the rows of the table of events that a step reads; True if there is no such row.

    The copy is checked and read: another thread may change the symbols meanwhile.
    """
    row_of, rows = int64_at(table, step_table.INPUT_ROW_OF), len(int64_at(table, step_table.INPUT_INDPTR)) - 1
    bad = False
    for b in range(len(symbols)):
        row_of[b] = symbols[b]
        bad |= not 0 <= row_of[b] < rows
    return bad


@inlined
def _step(table, output):
    """`step` in the floating-point mode that is set; sample b reads the input events of row `row_of[b]`."""
    indptr, row_of = int64_at(table, step_table.INPUT_INDPTR), int64_at(table, step_table.INPUT_ROW_OF)
    indices, values = int32_at(table, step_table.INPUT_INDICES), float32_at(table, step_table.INPUT_VALUES)
    numbers = int64_at(table, step_table.NUMBERS)
    n_layers, n_tiles = numbers[step_table.N_LAYERS], numbers[step_table.N_COLUMN_TILES]
    c, y = float32_at(table, step_table.CELLS), float32_at(table, step_table.OUTPUTS)
    copy(float32_at(table, step_table.CELLS_BEFORE), 0, c, 0, len(c))
    copy(float32_at(table, step_table.OUTPUTS_BEFORE), 0, y, 0, len(y))
    # Held gates are the end of the scratch array.
    held, scratch = float32_at(table, step_table.HELD), float32_at(table, step_table.SCRATCH)
    held_at = len(scratch) - len(held)
    copy(float32_at(table, step_table.HELD_BEFORE), 0, scratch, held_at, len(held))
    empty = float32_at(table, step_table.EMPTY)
    network = NetworkTables(
        int64_at(table, step_table.LAYERS, (n_layers + 1,)),
        int64_at(table, step_table.COLUMN_TILES, (1, n_tiles)),
        WeightPools(
            float32_at(table, step_table.VALUES),
            int32_at(table, step_table.INDEX),
            int64_at(table, step_table.POINTERS),
            float32_at(table, step_table.BIASES),
        ),
        float32_at(table, step_table.THRESHOLD),
        float32_at(table, step_table.KEEP),
        float32_at(table, step_table.PULL),
        numbers[step_table.SHARE_ROWS],
        int64_at(table, step_table.UNIT_BOUNDS, (n_layers + 1,)),
        int64_at(table, step_table.DRIVE_BEGINS, (n_layers + 1,)),
        numbers[step_table.DRIVE_PITCH],
    )
    buffers = RunBuffers(
        float32_at(table, step_table.INPUT_DRIVES),
        float32_at(table, step_table.RECURRENT_DRIVES),
        EventLists(
            int32_at(table, step_table.EVENT_INDICES),
            float32_at(table, step_table.EVENT_VALUES),
            int64_at(table, step_table.EVENT_BEGINS),
            int64_at(table, step_table.EVENT_COUNTS),
        ),
        int64_at(table, step_table.LIST_BEGINS, (1,)),
        int64_at(table, step_table.LIST_COUNTS, (1,)),
        int64_at(table, step_table.DRIVE_OF, (1,)),
        int64_at(table, step_table.RESTS),
        int32_at(table, step_table.GATED_INDICES, (1,)),
        float32_at(table, step_table.GATED_VALUES, (1,)),
        Workspace(
            int64_at(table, step_table.PANEL_BEGINS, (1,)),
            int32_at(table, step_table.PANEL_INDICES, (1,)),
            float32_at(table, step_table.PANEL_VALUES, (1,)),
            int32_at(table, step_table.SEGMENT_NUMBERS, (1, 2)),
            float32_at(table, step_table.SEGMENT_FACTORS, (1, 2)),
            float32_at(table, step_table.DENSE_INPUTS, (1,)),
            float32_at(table, step_table.TILE, (1,)),
            float32_at(table, step_table.SCRATCH, (1,)),
        ),
    )
    outputs = RunOutputs(
        flat(output),
        empty,
        empty,
        int64_at(table, step_table.GRADED),
        int64_at(table, step_table.BINARY),
    )
    size = RunSize(np.int64(1), np.int64(0), np.int64(1), numbers[step_table.BATCH], numbers[step_table.CHUNK])
    received = InputEvents(indptr, indices, values, row_of)
    # Numba types literals by themselves; the kernel takes numbers.
    thread, n_threads = np.int64(0), np.int64(1)
    barrier = int64_at(table, step_table.BARRIER)
    call_run(numbers[step_table.RUN], (thread, n_threads, barrier, network, received, size, buffers, c, y, outputs))
    copy(scratch, held_at, held, 0, len(held))
    return first_not_finite(c, len(c)) >= 0
