"""One step of a layer, forward and backward, and counts of what happened in it.

A call of a kernel here handles one sample and units `low` to `high`, sixteen units per vector, one at a time after the
last whole vector. The kernels named `*_batch` loop over the samples of a step, for products that go through BLAS.

Arrays are flat float32, named in `records.py`. A drive holds the gates (u, r, g), N numbers each; `a`, `b`, `d` and `s`
say where the sample begins in input drives, recurrent drives, deltas and (T, B, N) arrays. In the tape's `y` and `c`,
which have T + 1 steps, the state before the step begins at `s` and the state after it at `to`.

The equations are the scalar rules of `cells.py`, applied to vectors. Reference: `reference.step` (forward) and
`reference.backward`; the two kernels of the paper's variant stand on both sides of its recurrent product.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import LANES, load, store
from eventrnn.cpu.kernels.simd_reductions import everywhere, sum_lanes

# Vectors that are counted in float32 lanes before the lanes are summed. The sum of sixteen lanes is then at most 2^24,
# up to which float32 counts exactly.
MOST_COUNTED = 1 << 20

# --- forward ------------------------------------------------------------------------------------------------


@compiled
def update(n, low, high, drive_in, a, drive_rec, b, threshold, tape, s, to):
    """Update the units in the released variant. `tape.q` keeps the candidate's recurrent drive."""
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        q, theta = load(drive_rec, b + 2 * n + i), load(threshold, i)
        v, u, r, g = cells.egru_value(
            load(drive_in, a + i),
            load(drive_in, a + n + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + i),
            load(drive_rec, b + n + i),
            q,
            load(tape.c, s + i),
        )
        store(tape.u, s + i, u)
        store(tape.r, s + i, r)
        store(tape.g, s + i, g)
        store(tape.q, s + i, q)
        store(tape.v, s + i, v)
        store(tape.y, to + i, cells.select(v > theta, v, cells.ZERO))
        store(tape.c, to + i, cells.select(v > theta, v - theta, v))
    for i in range(whole, high):
        q = drive_rec[b + 2 * n + i]
        v, u, r, g = cells.egru_value(
            drive_in[a + i],
            drive_in[a + n + i],
            drive_in[a + 2 * n + i],
            drive_rec[b + i],
            drive_rec[b + n + i],
            q,
            tape.c[s + i],
        )
        tape.u[s + i], tape.r[s + i], tape.g[s + i], tape.q[s + i], tape.v[s + i] = u, r, g, q, v
        tape.y[to + i] = cells.select(v > threshold[i], v, cells.ZERO)
        tape.c[to + i] = cells.select(v > threshold[i], v - threshold[i], v)


@compiled
def reset_gate(n, low, high, drive_in, a, drive_rec, b, tape, s):
    """Paper's variant, before the candidate's recurrent product: the reset gate r, and its input q = r * y."""
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        r = cells.egru_reset_gate(load(drive_in, a + n + i), load(drive_rec, b + n + i))
        store(tape.r, s + i, r)
        store(tape.q, s + i, r * load(tape.y, s + i))
    for i in range(whole, high):
        tape.r[s + i] = cells.egru_reset_gate(drive_in[a + n + i], drive_rec[b + n + i])
        tape.q[s + i] = tape.r[s + i] * tape.y[s + i]


@compiled
def update_paper(n, low, high, drive_in, a, drive_rec, b, threshold, tape, s, to):
    """Paper's variant, after the candidate's recurrent product, which gives its recurrent drive W_rec_g q."""
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        v, u, g = cells.egru_paper_value(
            load(drive_in, a + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + i),
            load(drive_rec, b + 2 * n + i),
            load(tape.c, s + i),
            load(tape.y, s + i),
        )
        store(tape.u, s + i, u)
        store(tape.g, s + i, g)
        store(tape.v, s + i, v)
        store(tape.c, to + i, v)
        store(tape.y, to + i, cells.select(v > load(threshold, i), v, cells.ZERO))
    for i in range(whole, high):
        v, u, g = cells.egru_paper_value(
            drive_in[a + i],
            drive_in[a + 2 * n + i],
            drive_rec[b + i],
            drive_rec[b + 2 * n + i],
            tape.c[s + i],
            tape.y[s + i],
        )
        tape.u[s + i], tape.g[s + i], tape.v[s + i], tape.c[to + i] = u, g, v, v
        tape.y[to + i] = cells.select(v > threshold[i], v, cells.ZERO)


@compiled
def apply_zoneout(low, high, zoneout_mask, paper, threshold, tape, s, to):
    """After an update: where `zoneout_mask` (T, B, N) is True, the keep gate is 1 and the unit keeps its cell state
    (Krueger et al. 2017). The backward pass needs nothing more, because it reads the gate from the tape."""
    for i in range(low, high):
        if zoneout_mask[s + i]:
            v = tape.c[s + i]
            if paper:
                v -= tape.y[s + i]
            fired = v > threshold[i]
            tape.u[s + i], tape.v[s + i] = cells.ONE, v
            tape.y[to + i] = cells.select(fired, v, cells.ZERO)
            tape.c[to + i] = cells.select(fired, v - threshold[i], v) if not paper else v


# --- backward -----------------------------------------------------------------------------------------------


@compiled
def adjoint(n, low, high, surrogate, tape, s, d_y, d_cell, d_cell_at, d_c, at, deltas, d):
    """Adjoint of `update`. `d_y` and `d_c` (B, N), of this step alone, begin at `at`.

    `d_c` is overwritten with the gradient of the step before; `deltas.d_threshold` and `deltas.d_bias` are added to.
    """
    whole = low + (high - low) // LANES * LANES
    d_in, d_rec, d_threshold, d_bias = deltas.d_in, deltas.d_rec, deltas.d_threshold, deltas.d_bias
    threshold = surrogate.threshold
    for i in range(low, whole, LANES):
        theta, value = load(threshold, i), load(tape.v, s + i)
        slope = cells.surrogate_slope(surrogate.kind, value - theta, surrogate.dampening, surrogate.support)
        event = cells.select(value > theta, cells.ONE, cells.ZERO)
        d_u, d_r, d_g, d_q, d_before, d_theta = cells.egru_backward(
            load(tape.u, s + i),
            load(tape.r, s + i),
            load(tape.g, s + i),
            load(tape.q, s + i),
            load(tape.c, s + i),
            value,
            event,
            slope,
            theta,
            load(d_y, at + i),
            load(d_c, at + i),
            load(d_cell, d_cell_at + i),
        )
        store(d_in, d + i, d_u)
        store(d_in, d + n + i, d_r)
        store(d_in, d + 2 * n + i, d_g)
        store(d_rec, d + i, d_u)
        store(d_rec, d + n + i, d_r)
        store(d_rec, d + 2 * n + i, d_q)
        store(d_c, at + i, d_before)
        store(d_threshold, i, load(d_threshold, i) + d_theta)
        store(d_bias, i, load(d_bias, i) + d_u)
        store(d_bias, n + i, load(d_bias, n + i) + d_r)
        store(d_bias, 2 * n + i, load(d_bias, 2 * n + i) + d_g)
        store(d_bias, 3 * n + i, load(d_bias, 3 * n + i) + d_q)
    for i in range(whole, high):
        theta, value = threshold[i], tape.v[s + i]
        slope = cells.surrogate_slope(surrogate.kind, value - theta, surrogate.dampening, surrogate.support)
        event = cells.select(value > theta, cells.ONE, cells.ZERO)
        d_u, d_r, d_g, d_q, d_before, d_theta = cells.egru_backward(
            tape.u[s + i],
            tape.r[s + i],
            tape.g[s + i],
            tape.q[s + i],
            tape.c[s + i],
            value,
            event,
            slope,
            theta,
            d_y[at + i],
            d_c[at + i],
            d_cell[d_cell_at + i],
        )
        d_in[d + i], d_in[d + n + i], d_in[d + 2 * n + i] = d_u, d_r, d_g
        d_rec[d + i], d_rec[d + n + i], d_rec[d + 2 * n + i] = d_u, d_r, d_q
        d_c[at + i] = d_before
        d_threshold[i] += d_theta
        d_bias[i] += d_u
        d_bias[n + i] += d_r
        d_bias[2 * n + i] += d_g
        d_bias[3 * n + i] += d_q


@compiled
def adjoint_paper(n, low, high, surrogate, tape, s, d_y, d_cell, d_cell_at, d_c, at, d_y_before, to, deltas, d):
    """Adjoint of `update_paper`: rows u and g of the deltas, and, in `d_y_before` from `to` on, the gradient of the
    output one step before through the subtraction of that output from the cell."""
    whole = low + (high - low) // LANES * LANES
    d_in, d_threshold, d_bias, threshold = deltas.d_in, deltas.d_threshold, deltas.d_bias, surrogate.threshold
    for i in range(low, whole, LANES):
        theta, value = load(threshold, i), load(tape.v, s + i)
        slope = cells.surrogate_slope(surrogate.kind, value - theta, surrogate.dampening, surrogate.support)
        event = cells.select(value > theta, cells.ONE, cells.ZERO)
        d_u, d_g, d_before, d_sent, d_theta = cells.egru_paper_backward(
            load(tape.u, s + i),
            load(tape.g, s + i),
            load(tape.c, s + i),
            value,
            event,
            slope,
            load(d_y, at + i),
            load(d_c, at + i),
            load(d_cell, d_cell_at + i),
        )
        store(d_in, d + i, d_u)
        store(d_in, d + 2 * n + i, d_g)
        store(d_c, at + i, d_before)
        store(d_y_before, to + i, d_sent)
        store(d_threshold, i, load(d_threshold, i) + d_theta)
        store(d_bias, i, load(d_bias, i) + d_u)
        store(d_bias, 2 * n + i, load(d_bias, 2 * n + i) + d_g)
    for i in range(whole, high):
        theta, value = threshold[i], tape.v[s + i]
        slope = cells.surrogate_slope(surrogate.kind, value - theta, surrogate.dampening, surrogate.support)
        event = cells.select(value > theta, cells.ONE, cells.ZERO)
        d_u, d_g, d_before, d_sent, d_theta = cells.egru_paper_backward(
            tape.u[s + i],
            tape.g[s + i],
            tape.c[s + i],
            value,
            event,
            slope,
            d_y[at + i],
            d_c[at + i],
            d_cell[d_cell_at + i],
        )
        d_in[d + i], d_in[d + 2 * n + i] = d_u, d_g
        d_c[at + i], d_y_before[to + i] = d_before, d_sent
        d_threshold[i] += d_theta
        d_bias[i] += d_u
        d_bias[2 * n + i] += d_g


@compiled
def reset_gate_adjoint(n, low, high, tape, s, d_q, at, deltas, d, d_y_before, to):
    """Adjoint of `reset_gate`: row r of the deltas, and a term that is added to `d_y_before`. `d_q` is the gradient of
    q = r * y."""
    for i in range(low, high):
        d_r, d_sent = cells.egru_paper_reset_backward(tape.r[s + i], tape.y[s + i], d_q[at + i])
        deltas.d_in[d + n + i] = d_r
        d_y_before[to + i] += d_sent
        deltas.d_bias[n + i] += d_r


# --- counts -------------------------------------------------------------------------------------------------


@compiled
def count_active(thread, n_threads, surrogate, v, first, last, step, n, counts_out):
    """Count the rows of v (rows, N) in which each unit fired or has a slope, among every `step`-th row of a range.

    The range is `first` to `last`. A thread owns some units. `counts_out` (N,) is float32, so that sixteen units are
    counted at once; this is exact up to 2^24.
    """
    vectors = -(-n // LANES)
    low, high = min(n, vectors * thread // n_threads * LANES), min(n, vectors * (thread + 1) // n_threads * LANES)
    counts_out[low:high] = 0
    whole, threshold = low + (high - low) // LANES * LANES, surrogate.threshold
    for b in range(first, last, step):
        for i in range(low, whole, LANES):
            value, theta = load(v, b * n + i), load(threshold, i)
            slope = cells.surrogate_slope(surrogate.kind, value - theta, surrogate.dampening, surrogate.support)
            event = cells.select(value > theta, cells.ONE, cells.ZERO)
            found = cells.select(event + cells.absolute(slope) != cells.ZERO, cells.ONE, cells.ZERO)
            store(counts_out, i, load(counts_out, i) + found)
        for i in range(whole, high):
            value, theta = v[b * n + i], threshold[i]
            slope = cells.surrogate_slope(surrogate.kind, value - theta, surrogate.dampening, surrogate.support)
            counts_out[i] += cells.ONE if value > theta or slope != 0 else cells.ZERO


@compiled
def count_nonzero(thread, n_threads, x, counts_out):
    """Count the elements of a thread's share of x that are not zero; `counts_out` (threads,) int64."""
    vectors = len(x) // LANES
    low, high = vectors * thread // n_threads * LANES, vectors * (thread + 1) // n_threads * LANES
    count, found = 0, everywhere(cells.ZERO)
    for first in range(low, high, MOST_COUNTED * LANES):
        for i in range(first, min(high, first + MOST_COUNTED * LANES), LANES):
            found = found + cells.select(load(x, i) != cells.ZERO, cells.ONE, cells.ZERO)
        count += np.int64(sum_lanes(found))
        found = everywhere(cells.ZERO)
    if thread == n_threads - 1:
        for i in range(vectors * LANES, len(x)):
            count += x[i] != 0
    counts_out[thread] = count


# --- a step of all samples, for products through BLAS -------------------------------------------------------


@compiled
def update_batch(shape, drive_in, a, pitch, drive_rec, threshold, zoneout_mask, tape, s):
    """`update` or `update_paper` of one step of all samples, from both drives, which contain their biases.

    pitch : floats from one input drive to the next; recurrent drives are 3N floats apart
    """
    n = shape.units
    for b in range(shape.batch):
        at, d, to = s + b * n, a + b * pitch, s + (shape.batch + b) * n
        if shape.paper:
            update_paper(n, 0, n, drive_in, d, drive_rec, b * 3 * n, threshold, tape, at, to)
        else:
            update(n, 0, n, drive_in, d, drive_rec, b * 3 * n, threshold, tape, at, to)
        if len(zoneout_mask) > 0:
            apply_zoneout(0, n, zoneout_mask, shape.paper, threshold, tape, at, to)


@compiled
def reset_gate_batch(shape, drive_in, a, pitch, drive_rec, tape, s):
    """`reset_gate` of one step of all samples."""
    n = shape.units
    for b in range(shape.batch):
        reset_gate(n, 0, n, drive_in, a + b * pitch, drive_rec, b * 3 * n, tape, s + b * n)


@compiled
def adjoint_batch(shape, surrogate, tape, s, d_y, upstream, d_cell_at, d_y_before, deltas, a):
    """`adjoint` or `adjoint_paper` of one step of all samples; the rows of the deltas begin at `a`."""
    n, d_cell, d_c = shape.units, upstream.d_cell, upstream.d_c
    for b in range(shape.batch):
        at, d, row = s + b * n, a + b * deltas.pitch, b * n
        if shape.paper:
            adjoint_paper(
                n, 0, n, surrogate, tape, at, d_y, d_cell, d_cell_at + row, d_c, row, d_y_before, row, deltas, d
            )
        else:
            adjoint(n, 0, n, surrogate, tape, at, d_y, d_cell, d_cell_at + row, d_c, row, deltas, d)


@compiled
def reset_gate_adjoint_batch(shape, tape, s, d_q, deltas, a, d_y_before):
    """`reset_gate_adjoint` of one step of all samples."""
    n = shape.units
    for b in range(shape.batch):
        reset_gate_adjoint(n, 0, n, tape, s + b * n, d_q, b * n, deltas, a + b * deltas.pitch, d_y_before, b * n)


@compiled
def convert_to_float32(thread, n_threads, source, target):
    """target[:] = source, as float32; a thread converts its share."""
    for i in range(len(source) * thread // n_threads, len(source) * (thread + 1) // n_threads):
        target[i] = source[i]
