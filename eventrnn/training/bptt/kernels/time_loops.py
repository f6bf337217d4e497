"""All time steps of one layer, forward and backward, in one compiled call per thread.

A thread owns some units: their drives, cells and deltas, for all samples. Threads meet at a barrier where a step needs
what all units sent (forward) or the deltas of all units (backward). No sum is ever split between threads, so the bits
depend neither on their number nor on the owner of a unit. Once a barrier is abandoned (`sync.py`), every thread
returns, and what was written is useless. Arrays, with shapes and dtypes, are named in `records.py`: weights and the
tape are shared, event lists are written by all threads and read by all, scratch is each thread's own.

    forward                `reference.forward`
    backward               the loop over steps of `reference.backward`: deltas, and the gradients of bias and threshold
    gradient_of_inputs     `d_x` of `reference.backward`

Weight gradients are products over the whole window and stand in `spmm.py`.

What the backward pass may skip. In the released variant the gradient of v is

    event * d_y + slope * (v * d_y - threshold * d_c) + d_c

Its last term passes the keep gate at every unit, so the deltas are dense. But `d_y`, the product of the next step's
deltas with the recurrent weights, is multiplied by `event` and `slope`. It matters only for active pairs, the (sample,
unit) pairs where the unit fired or the slope is not zero, and `backward` computes it for these alone. In the paper's
variant the gradient of `r * y` of the step before is needed at the same pairs, because a unit that fired is an active
one. In both variants what is left out would be multiplied by an exact zero.
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.cpu.kernels.cell_update import compact_events
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.microkernels import prefetch
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.spmm import copy, propagate_all, workspace_of
from eventrnn.cpu.kernels.sync import barrier_wait, next_chunk
from eventrnn.cpu.tables import RowEvents, ThreadTables
from eventrnn.training.bptt.kernels.cell_update import (
    adjoint,
    adjoint_paper,
    apply_zoneout,
    reset_gate,
    reset_gate_adjoint,
    update,
    update_paper,
)
from eventrnn.training.bptt.kernels.event_lists import TILE_ROWS, list_pairs, pairs_of_thread, share, tile_rows
from eventrnn.training.bptt.kernels.records import ACTIVE, ALL, FIRED
from eventrnn.training.bptt.kernels.sddmm import pack_chunks, sddmm

# Rows of delta that the input gradient handles together, with all weights and with stored ones. Meanwhile a chunk of
# the weights, or the rows of delta, stay in the L2 cache.
WINDOW_ROWS, STORED_ROWS = 6 * TILE_ROWS, 64


@compiled
def forward(
    thread,
    n_threads,
    barrier,
    shape,
    weights,
    threshold,
    drive_in,
    pitch,
    zoneout_mask,
    drives,
    events,
    workspaces,
    tape,
):
    """All steps of a layer from its input drives; the same bits as the inference engine.

    shape        : WindowShape
    weights      : PackedWeights
    drive_in     : (R, pitch), the input drives, bias included
    zoneout_mask : (T, B, N) bool, or empty
    drives       : (threads, B * pitch), the recurrent drives of one step; a thread writes those of its units
    events       : cpu EventLists, scratch: three buffers of B rows with one list per thread and row. Buffers 0 and 1 in
                   turn hold the output of the step before; buffer 2 holds r * y (paper's variant). All threads read it
    workspaces   : cpu Workspace with a leading axis of threads
    tape         : TapeArrays, written; `y` and `c` hold the state before the window in front
    """
    steps, batch, n, paper = shape.steps, shape.batch, shape.units, shape.paper
    indices, values, begins, counts = events.indices, events.values, events.begins, events.counts
    size, wide, drive = batch * n, n + LANES * n_threads, drives[thread]
    low, high = share(n, LANES, thread, n_threads), share(n, LANES, thread + 1, n_threads)
    tables = ThreadTables(weights.tiles[thread], weights.pools, workspace_of(workspaces, thread), pitch)
    gates, last = weights.n_gate_tiles, len(tables.column_tiles)
    own, target = low + LANES * thread, n_threads
    for b in range(batch):
        slot, first = b * n_threads + thread, b * wide + own
        begins[slot] = first
        counts[slot] = compact_events(tape.y, b * n, low, high, indices, values, first)
    target = barrier_wait(barrier, n_threads, target)
    if target < 0:
        return
    for t in range(steps):
        buffer, following = (t % 2) * batch, ((t + 1) % 2) * batch
        for q in range(buffer * n_threads, (buffer + batch) * n_threads if n_threads > 1 else 0):
            # Prefetch all lines at once, since they lie in the cache of another core.
            for e in range(begins[q], begins[q] + counts[q], LANES):
                prefetch(indices, e)
                prefetch(values, e)
        sent = RowEvents(events, buffer * n_threads, n_threads, batch)
        propagate_all(tables, 0, gates if paper else last, 0, n, sent, drive)
        if paper:
            for b in range(batch):
                s = t * size + b * n
                reset_gate(n, low, high, drive_in, (t * batch + b) * pitch, drive, b * pitch, tape, s)
                slot, first = (2 * batch + b) * n_threads + thread, (2 * batch + b) * wide + own
                begins[slot] = first
                counts[slot] = compact_events(tape.q, s, low, high, indices, values, first)
            target = barrier_wait(barrier, n_threads, target)
            if target < 0:
                return
            propagate_all(tables, gates, last, 0, n, RowEvents(events, 2 * batch * n_threads, n_threads, batch), drive)
        for b in range(batch):
            s, a = t * size + b * n, (t * batch + b) * pitch
            if paper:
                update_paper(n, low, high, drive_in, a, drive, b * pitch, threshold, tape, s, s + size)
            else:
                update(n, low, high, drive_in, a, drive, b * pitch, threshold, tape, s, s + size)
            if len(zoneout_mask) > 0:
                apply_zoneout(low, high, zoneout_mask, paper, threshold, tape, s, s + size)
            slot, first = (following + b) * n_threads + thread, (following + b) * wide + own
            begins[slot] = first
            counts[slot] = compact_events(tape.y, s + size, low, high, indices, values, first)
        target = barrier_wait(barrier, n_threads, target)
        if target < 0:
            return


@compiled
def backward(
    thread,
    n_threads,
    barrier,
    shape,
    surrogate,
    w_rec,
    gate_weights,
    candidate_weights,
    tape,
    upstream,
    all_pairs,
    d_y_step,
    d_sent,
    deltas,
    dots_out,
):
    """The deltas of all steps, from the last to the first, and the gradients of bias and threshold.

    surrogate         : SurrogateParameters
    w_rec             : (N, 3N), read for the layout ALL only, where each thread packs its units' weights into
                        `gate_weights.values` and `candidate_weights.values`
    gate_weights      : SampledWeights of all gates, or, in the paper's variant, of u and r
    candidate_weights : SampledWeights of the candidate in the paper's variant; else a range without columns
    upstream          : Upstream
    all_pairs         : ActivePairs of all threads
    d_y_step          : (B, N) scratch, gradient of one step's output: the upstream part, then the recurrent part added
    d_sent            : (2, B, N) scratch of the paper's variant: gradient of r * y, and of the output one step before
                        through all but the recurrent weights of u and r
    deltas            : Deltas, written; in the paper's variant both drives have the same
    dots_out          : (N,) int64, to which the number of dot products of each unit is added
    """
    steps, batch, n, paper = shape.steps, shape.batch, shape.units, shape.paper
    pitch, d_in, d_rec = deltas.pitch, deltas.d_in, deltas.d_rec
    d_y, d_cell, d_c, pairs = upstream.d_y, upstream.d_cell, upstream.d_c, pairs_of_thread(all_pairs, thread)
    low, high = share(n, LANES, thread, n_threads), share(n, LANES, thread + 1, n_threads)
    size, target, gates, tiled = batch * n, n_threads, gate_weights.n_columns, gate_weights.layout == ALL
    each_cell = size if len(d_cell) > size else 0
    if tiled:
        pack_chunks(w_rec, 3 * n, 0, gates, low, high, n, gate_weights.values)
        pack_chunks(w_rec, 3 * n, gates, 3 * n - gates, low, high, n, candidate_weights.values)
    for b in range(batch if steps > 0 else 0):
        copy(d_y, (steps - 1) * size + b * n + low, d_y_step, b * n + low, high - low)
    for t in range(steps - 1, -1, -1):
        for b in range(batch):
            s, row, cell_at, d = t * size + b * n, b * n, t * each_cell + b * n, (t * batch + b) * pitch
            if paper:
                adjoint_paper(
                    n,
                    low,
                    high,
                    surrogate,
                    tape,
                    s,
                    d_y_step,
                    d_cell,
                    cell_at,
                    d_c,
                    row,
                    d_sent,
                    size + row,
                    deltas,
                    d,
                )
            else:
                adjoint(n, low, high, surrogate, tape, s, d_y_step, d_cell, cell_at, d_c, row, deltas, d)
        target = barrier_wait(barrier, n_threads, target)
        if target < 0:
            return
        start = t * batch * pitch
        if t == 0 and not paper:
            continue
        for b in range(batch if t > 0 else 0):
            copy(d_y, (t - 1) * size + b * n + low, d_y_step, b * n + low, high - low)
        # The state before the window has no slope: only its events pass a gradient on to the reset gate.
        source, listed = (ACTIVE, tape.v) if t > 0 else (FIRED, tape.y)
        list_pairs(source, tiled, surrogate, listed, max(0, t - 1) * batch, batch, n, low, high, pairs, dots_out)
        if paper:
            for b in range(batch):
                for i in range(b * n + low, b * n + high):
                    d_sent[i] = cells.ZERO
            sddmm(candidate_weights, d_in, start, pitch, batch, low, high, n, pairs, d_sent, 0)
            for b in range(batch):
                s, row = t * size + b * n, b * n
                reset_gate_adjoint(n, low, high, tape, s, d_sent, row, deltas, start + b * pitch, d_sent, size + row)
                for i in range(low, high if t > 0 else low):
                    d_y_step[row + i] += d_sent[size + row + i]
            target = barrier_wait(barrier, n_threads, target)
            if target < 0:
                return
        if t > 0:
            sddmm(gate_weights, d_rec, start, pitch, batch, low, high, n, pairs, d_y_step, 0)


@compiled
def gradient_of_inputs(
    thread,
    n_threads,
    counter,
    weights,
    delta,
    pitch,
    rows,
    n_pre,
    source,
    surrogate,
    v,
    all_pairs,
    d_x_out,
    dots_out,
):
    """d_x (rows, n_pre) = delta @ W.T at the pairs that `source` names, and zero elsewhere.

    source    : EVERY, or ACTIVE for the pairs where the unit below, with cell state v, fired or has a slope
    weights   : SampledWeights of w_in; for the layout ALL, packed already
    dots_out  : (threads, n_pre) int64, to which the number of dot products of each input is added

    Threads take rows from a counter.
    """
    unit, most, tiled = 1, STORED_ROWS, weights.layout == ALL
    pairs = pairs_of_thread(all_pairs, thread)
    if tiled:
        unit = tile_rows(min(rows, WINDOW_ROWS))
        most = -(-min(rows, WINDOW_ROWS) // unit)
    first, some = next_chunk(counter, -(-rows // unit), most, 1, n_threads)
    while some > 0:
        first, some = first * unit, min(some * unit, rows - first * unit)
        for i in range(first * n_pre, (first + some) * n_pre):
            d_x_out[i] = cells.ZERO
        list_pairs(source, tiled, surrogate, v, first, some, n_pre, 0, n_pre, pairs, dots_out[thread])
        sddmm(weights, delta, first * pitch, pitch, some, 0, n_pre, n_pre, pairs, d_x_out, first * n_pre)
        first, some = next_chunk(counter, -(-rows // unit), most, 1, n_threads)
