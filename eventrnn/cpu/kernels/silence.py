"""Steps in which nothing is sent: a sample is silent in a step of a layer if it has no input and no event of the layer.

Both products of such a step are their biases, so its gates are the same numbers in every silent step. They are computed
once per network (`cpu/silence.py`), and the step is one FMA per unit: `c = keep * c + pull`, the last operation of
`cells.egru_value` on the same numbers. The result has the bits of the whole step.

Runs of silent steps are taken together, with nothing between them but these FMAs. A rounded FMA with a positive factor
is monotonic in the cell, so that the cells of a run rise or fall towards a fixed point and reach it. Once no cell of
the layer has changed in a step, no later one changes any, and the rest of the run takes no time.

A run ends with the step in which a unit sends an event, because the step after it is not silent.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.by_address import call_rest
from eventrnn.cpu.kernels.jit import called_by_address, inlined, internal
from eventrnn.cpu.kernels.simd import LANES, bits, in_every_lane, load, load_some, store, store_some
from eventrnn.cpu.kernels.spmm import copy
from eventrnn.cpu.kernels.sync import barrier_wait
from eventrnn.cpu.tables import SilentUnits

# Silent steps that each vector of units takes before the next vector.
STRIDE = 8

# Numbers of int64 from one thread's entry to the next one's, which is in another cache line.
LINE = 8


@internal
def share_silent_rows(share, events, begins, counts, drive_of):
    """List the rows of events that are not empty, one after the other; all others share one row, the biases.

    share          : 0 lists all rows as if none were empty
    events         : `RowEvents` of a product; its lists may be those of `begins` and `counts`
    begins, counts : (rows * per_row,) int64, the lists of the rows of the product that is left, written here
    drive_of       : (rows,) int64, the row of that product that every row of events takes, written here

    Returns the number of rows that are not empty. It is also the number of the shared row, where there is one.
    """
    lists, per_row, used = events.lists, events.per_row, 0
    for k in range(events.rows):
        first, sent = events.first + k * per_row, 0
        for q in range(first, first + per_row):
            sent += lists.counts[q]
        drive_of[k] = -1
        if sent > 0 or share == 0:
            for q in range(per_row):
                # The lists that are read lie here or behind, so none is overwritten before.
                begins[used * per_row + q] = lists.begins[first + q]
                counts[used * per_row + q] = lists.counts[first + q]
            drive_of[k] = used
            used += 1
    if used < events.rows:
        for q in range(per_row):
            begins[used * per_row + q] = 0
            counts[used * per_row + q] = 0
        for k in range(events.rows):
            if drive_of[k] < 0:
                drive_of[k] = used
    return used


@inlined
def is_silent(drive_of, used, k, counts, first, n_lists):
    """Whether row k has no input, and the lists `first` to `first + n_lists`, the events carried into it, are empty."""
    silent = drive_of[k] == used
    if silent:
        for q in range(first, first + n_lists):
            silent &= counts[q] == 0
    return silent


@inlined
def steps_without_input(drive_of, used, batch, t, length):
    """The number of steps from t on, of the `length` steps of a chunk, in which no sample has an input."""
    k = t * batch
    while k < length * batch and drive_of[k] == used:
        k += 1
    return k // batch - t


@inlined
def silent_units(network, unit, count, c, y, at, samples, pitch, spare, spare_at):
    """`SilentUnits` of a layer; `spare` has the pitch of a drive row."""
    return SilentUnits(
        network.keep,
        network.pull,
        network.threshold,
        unit,
        count,
        c,
        y,
        at,
        np.int64(samples),
        pitch,
        spare,
        spare_at,
        network.drive_pitch,
    )


# What `_rest_step` has found: no cell has changed, some have, or some are above their thresholds.
_STILL, _MOVING, _SENDING = range(3)


@inlined
def _rest(most, units, reset_first):
    """Take up to `most` silent steps; returns how many, of which only the last may have events.

    most        : at least 1
    units       : `SilentUnits`, whose cells and outputs are updated in place
    reset_first : whether the variant is the paper's
    """
    # A state of the caller may have outputs of -0. Subtracting one in the paper's variant turns a cell of -0 into +0.
    found = _rest_step(units, True, reset_first)
    steps, striding = 1, True
    while found == _MOVING and steps < most:
        striding &= steps + STRIDE <= most
        if striding:
            found = _stride(units)
            steps += STRIDE
            if found == _SENDING:
                # Nothing was changed; the steps to the event follow one by one.
                found, steps, striding = _MOVING, steps - STRIDE, False
        else:
            found = _rest_step(units, False, False)
            steps += 1
    if found == _SENDING:
        _send(units, reset_first)
        return steps
    return most


@inlined
def _stride(units):
    """`STRIDE` silent steps at once, if no unit sends an event in any of them; returns what it has found.

    All cells are at most at their thresholds. A cell that falls stays there, and one that rises is highest in the last
    step, so that no other step is compared.
    """
    keep, pull, threshold, unit, n, c, _, at, samples, pitch, spare, spare_at, spare_pitch = units
    whole = n // LANES * LANES
    sent, moved = in_every_lane(cells.ZERO), in_every_lane(cells.ZERO)
    for b in range(samples):
        s, to = at + b * pitch, spare_at + b * spare_pitch
        for i in range(0, whole, LANES):
            factor, addend, before = load(keep, unit + i), load(pull, unit + i), load(c, s + i)
            for _ in range(STRIDE - 1):
                before = cells.egru_decay(factor, addend, before)
            v = cells.egru_decay(factor, addend, before)
            # planted fault: event of a silent step missed
            sent = cells.select(v > load(threshold, unit + i), cells.ONE, sent)
            # planted fault: silence taken for its fixed point
            moved = cells.select(v != before, cells.ONE, moved)
            store(spare, to + i, v)
        if whole < n:
            i, some = whole, n - whole
            factor, addend = load_some(keep, unit + i, some), load_some(pull, unit + i, some)
            before = load_some(c, s + i, some)
            for _ in range(STRIDE - 1):
                before = cells.egru_decay(factor, addend, before)
            v = cells.egru_decay(factor, addend, before)
            # planted fault: event of a silent step missed
            sent = cells.select(v > load_some(threshold, unit + i, some), cells.ONE, sent)
            # planted fault: silence taken for its fixed point
            moved = cells.select(v != before, cells.ONE, moved)
            store_some(spare, to + i, some, v)
    if bits(sent != cells.ZERO) != 0:
        return _SENDING
    for b in range(samples):
        copy(spare, spare_at + b * spare_pitch, c, at + b * pitch, n)
    return _MOVING if bits(moved != cells.ZERO) != 0 else _STILL


@inlined
def _rest_step(units, first_step, subtract):
    """One silent step, without the events that may come of it; returns what it has found.

    first_step : whether outputs are set to zero; in later steps they are
    subtract   : whether outputs are subtracted before
    """
    keep, pull, threshold, unit, n, c, y, at, samples, pitch, _, _, _ = units
    whole, zeros = n // LANES * LANES, in_every_lane(cells.ZERO)
    sent, moved = zeros, zeros
    for b in range(samples):
        s = at + b * pitch
        for i in range(0, whole, LANES):
            before = load(c, s + i)
            v = cells.egru_decay(load(keep, unit + i), load(pull, unit + i), before)
            if subtract:
                v = v - load(y, s + i)
            # planted fault: event of a silent step missed
            sent = cells.select(v > load(threshold, unit + i), cells.ONE, sent)
            # planted fault: silence taken for its fixed point
            moved = cells.select(v != before, cells.ONE, moved)
            store(c, s + i, v)
            if first_step:
                store(y, s + i, zeros)
        if whole < n:
            i, some = whole, n - whole
            before = load_some(c, s + i, some)
            v = cells.egru_decay(load_some(keep, unit + i, some), load_some(pull, unit + i, some), before)
            if subtract:
                v = v - load_some(y, s + i, some)
            # Lanes without a unit are zero throughout: they neither change nor exceed a threshold.
            # planted fault: event of a silent step missed
            sent = cells.select(v > load_some(threshold, unit + i, some), cells.ONE, sent)
            # planted fault: silence taken for its fixed point
            moved = cells.select(v != before, cells.ONE, moved)
            store_some(c, s + i, some, v)
            if first_step:
                store_some(y, s + i, some, zeros)
    if bits(sent != cells.ZERO) != 0:
        return _SENDING
    return _MOVING if bits(moved != cells.ZERO) != 0 else _STILL


@inlined
def _send(units, reset_first):
    """Outputs, and cells after the event, from cells before the event."""
    for b in range(units.samples):
        for i in range(units.count):
            at = units.at + b * units.pitch + i
            v, theta = units.c[at], units.threshold[units.unit + i]
            if v > theta:
                units.y[at] = v
                if not reset_first:
                    units.c[at] = v - theta


@called_by_address
def rest(most, units):
    """`_rest` in the released variant."""
    return _rest(most, units, False)


@called_by_address
def rest_paper(most, units):
    """`_rest` in the paper's variant, whose cells are not reset."""
    return _rest(most, units, True)


@inlined
def rest_together(thread, n_threads, barrier, target, kernel, most, units, rests):
    """Take up to `most` silent steps on all threads, each with its own units, until a unit of any of them sends.

    kernel : address of `rest` or `rest_paper`
    units  : `SilentUnits` of the thread
    rests  : (n_threads * LINE,) int64, shared: the steps that each thread could take

    Returns the number of steps, and the next target of the barrier, which is negative where it was abandoned.
    """
    alone, n = n_threads == 1 or most == 1, units.count
    if not alone:
        # The state from before; the first part of the scratch is for strides.
        for b in range(units.samples):
            s, to = units.at + b * units.pitch, units.spare_at + b * units.spare_pitch + n
            copy(units.c, s, units.spare, to, n)
            copy(units.y, s, units.spare, to + n, n)
    steps = call_rest(kernel, (most, units))
    if not alone:
        rests[thread * LINE] = steps
        target = barrier_wait(barrier, n_threads, target)
        if target < 0:
            return steps, target
        least = steps
        for q in range(n_threads):
            least = min(least, rests[q * LINE])
        if least < steps:
            for b in range(units.samples):
                s, to = units.at + b * units.pitch, units.spare_at + b * units.spare_pitch + n
                copy(units.spare, to, units.c, s, n)
                copy(units.spare, to + n, units.y, s, n)
            steps = call_rest(kernel, (least, units))
    return steps, target
