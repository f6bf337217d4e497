"""Element-wise parts of training, fused: a step of some units forward and backward, the loss.

The products around them are in `products.py` or BLAS. Same rules as inference: the scalar functions of `cells.py`,
sixteen lanes at a time. Arrays are flat; a drive holds the gates (u, r, g), N numbers each.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled
from eventrnn.cpu.kernels.simd import LANES, load, store
from eventrnn.cpu.kernels.simd_reductions import everywhere, sum_lanes

# Ones that a float32 lane adds up before all lanes do; sixteen times as many are still exact.
MOST_COUNTED = 1 << 20

# --- forward: one sample, units `low` to `high`; s is where the sample begins in (B, N) arrays -----------------


@compiled
def update(
    n, low, high, drive_in, a, drive_rec, b, threshold, c, c_at, s,
    u_out, r_out, g_out, q_out, v_out, y_out, c_out, to,
):  # fmt: skip
    """Released variant. `q_out` keeps the recurrent candidate drive; y and c of the step go to `to`."""
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
            load(c, c_at + i),
        )
        store(u_out, s + i, u)
        store(r_out, s + i, r)
        store(g_out, s + i, g)
        store(q_out, s + i, q)
        store(v_out, s + i, v)
        store(y_out, to + i, cells.select(v > theta, v, cells.ZERO))
        store(c_out, to + i, cells.select(v > theta, v - theta, v))
    for i in range(whole, high):
        q = drive_rec[b + 2 * n + i]
        v, u, r, g = cells.egru_value(
            drive_in[a + i],
            drive_in[a + n + i],
            drive_in[a + 2 * n + i],
            drive_rec[b + i],
            drive_rec[b + n + i],
            q,
            c[c_at + i],
        )
        u_out[s + i], r_out[s + i], g_out[s + i], q_out[s + i], v_out[s + i] = u, r, g, q, v
        y_out[to + i] = cells.select(v > threshold[i], v, cells.ZERO)
        c_out[to + i] = cells.select(v > threshold[i], v - threshold[i], v)


@compiled
def reset_gate(n, low, high, drive_in, a, drive_rec, b, y, y_at, s, r_out, q_out):
    """Paper's variant, first half: the reset gate and what it lets through, `q = r * y_before`."""
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        r = cells.egru_reset_gate(load(drive_in, a + n + i), load(drive_rec, b + n + i))
        store(r_out, s + i, r)
        store(q_out, s + i, r * load(y, y_at + i))
    for i in range(whole, high):
        r_out[s + i] = cells.egru_reset_gate(drive_in[a + n + i], drive_rec[b + n + i])
        q_out[s + i] = r_out[s + i] * y[y_at + i]


@compiled
def update_paper(
    n, low, high, drive_in, a, drive_rec, b, threshold, c, y, before, s, u_out, g_out, v_out, y_out, c_out, to
):
    """Paper's variant, second half: the candidate's recurrent drive is of q. y and c of the last step at `before`."""
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        v, u, g = cells.egru_paper_value(
            load(drive_in, a + i),
            load(drive_in, a + 2 * n + i),
            load(drive_rec, b + i),
            load(drive_rec, b + 2 * n + i),
            load(c, before + i),
            load(y, before + i),
        )
        store(u_out, s + i, u)
        store(g_out, s + i, g)
        store(v_out, s + i, v)
        store(c_out, to + i, v)
        store(y_out, to + i, cells.select(v > load(threshold, i), v, cells.ZERO))
    for i in range(whole, high):
        v, u, g = cells.egru_paper_value(
            drive_in[a + i],
            drive_in[a + 2 * n + i],
            drive_rec[b + i],
            drive_rec[b + 2 * n + i],
            c[before + i],
            y[before + i],
        )
        u_out[s + i], g_out[s + i], v_out[s + i], c_out[to + i] = u, g, v, v
        y_out[to + i] = cells.select(v > threshold[i], v, cells.ZERO)


@compiled
def hold(low, high, held, paper, threshold, before, s, u_out, v_out, y_out, c_out, to):
    """Zoneout, after an update: where `held`, the keep gate is 1; the backward pass then needs to know no more."""
    for i in range(low, high):
        if held[s + i]:
            v = c_out[before + i]
            if paper:
                v -= y_out[before + i]
            fired = v > threshold[i]
            u_out[s + i], v_out[s + i] = cells.ONE, v
            y_out[to + i] = cells.select(fired, v, cells.ZERO)
            c_out[to + i] = cells.select(fired, v - threshold[i], v) if not paper else v


# --- backward -----------------------------------------------------------------------------------------------


@compiled
def adjoint(
    n, low, high, kind, dampening, support, threshold,
    u, r, g, q, v, s, c, before, d_y, d_cell, d_cell_at,
    d_c, at, d_in_out, d_rec_out, d, d_threshold, d_bias,
):  # fmt: skip
    """Adjoint of `update`. `d_y` and `d_c` are of this step alone, at `at`; `d_c` is overwritten with the gradient one
    step before; `d_threshold` (N,) and `d_bias` (4N: u, r, g, recurrent g) are added to; rows of `d_in_out` and
    `d_rec_out` begin at d.
    """
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        theta, value = load(threshold, i), load(v, s + i)
        slope = cells.surrogate_slope(kind, value - theta, dampening, support)
        event = cells.select(value > theta, cells.ONE, cells.ZERO)
        d_u, d_r, d_g, d_q, d_before, d_theta = cells.egru_backward(
            load(u, s + i),
            load(r, s + i),
            load(g, s + i),
            load(q, s + i),
            load(c, before + i),
            value,
            event,
            slope,
            theta,
            load(d_y, at + i),
            load(d_c, at + i),
            load(d_cell, d_cell_at + i),
        )
        store(d_in_out, d + i, d_u)
        store(d_in_out, d + n + i, d_r)
        store(d_in_out, d + 2 * n + i, d_g)
        store(d_rec_out, d + i, d_u)
        store(d_rec_out, d + n + i, d_r)
        store(d_rec_out, d + 2 * n + i, d_q)
        store(d_c, at + i, d_before)
        store(d_threshold, i, load(d_threshold, i) + d_theta)
        store(d_bias, i, load(d_bias, i) + d_u)
        store(d_bias, n + i, load(d_bias, n + i) + d_r)
        store(d_bias, 2 * n + i, load(d_bias, 2 * n + i) + d_g)
        store(d_bias, 3 * n + i, load(d_bias, 3 * n + i) + d_q)
    for i in range(whole, high):
        slope = cells.surrogate_slope(kind, v[s + i] - threshold[i], dampening, support)
        event = cells.select(v[s + i] > threshold[i], cells.ONE, cells.ZERO)
        d_u, d_r, d_g, d_q, d_before, d_theta = cells.egru_backward(
            u[s + i], r[s + i], g[s + i], q[s + i], c[before + i], v[s + i], event, slope, threshold[i],
            d_y[at + i], d_c[at + i], d_cell[d_cell_at + i],
        )  # fmt: skip
        d_in_out[d + i], d_in_out[d + n + i], d_in_out[d + 2 * n + i] = d_u, d_r, d_g
        d_rec_out[d + i], d_rec_out[d + n + i], d_rec_out[d + 2 * n + i] = d_u, d_r, d_q
        d_c[at + i] = d_before
        d_threshold[i] += d_theta
        d_bias[i] += d_u
        d_bias[n + i] += d_r
        d_bias[2 * n + i] += d_g
        d_bias[3 * n + i] += d_q


@compiled
def adjoint_paper(
    n, low, high, kind, dampening, support, threshold,
    u, g, v, s, c, before, d_y, d_cell, d_cell_at,
    d_c, at, d_y_before_out, to, d_in_out, d, d_threshold, d_bias,
):  # fmt: skip
    """Adjoint of `update_paper`: rows u and g of `d_in_out`, and what the subtraction sends to `d_y_before_out`."""
    whole = low + (high - low) // LANES * LANES
    for i in range(low, whole, LANES):
        theta, value = load(threshold, i), load(v, s + i)
        slope = cells.surrogate_slope(kind, value - theta, dampening, support)
        event = cells.select(value > theta, cells.ONE, cells.ZERO)
        d_u, d_g, d_before, d_y_before, d_theta = cells.egru_paper_backward(
            load(u, s + i),
            load(g, s + i),
            load(c, before + i),
            value,
            event,
            slope,
            load(d_y, at + i),
            load(d_c, at + i),
            load(d_cell, d_cell_at + i),
        )
        store(d_in_out, d + i, d_u)
        store(d_in_out, d + 2 * n + i, d_g)
        store(d_c, at + i, d_before)
        store(d_y_before_out, to + i, d_y_before)
        store(d_threshold, i, load(d_threshold, i) + d_theta)
        store(d_bias, i, load(d_bias, i) + d_u)
        store(d_bias, 2 * n + i, load(d_bias, 2 * n + i) + d_g)
    for i in range(whole, high):
        slope = cells.surrogate_slope(kind, v[s + i] - threshold[i], dampening, support)
        event = cells.select(v[s + i] > threshold[i], cells.ONE, cells.ZERO)
        d_u, d_g, d_before, d_y_before, d_theta = cells.egru_paper_backward(
            u[s + i], g[s + i], c[before + i], v[s + i], event, slope, d_y[at + i], d_c[at + i], d_cell[d_cell_at + i]
        )
        d_in_out[d + i], d_in_out[d + 2 * n + i] = d_u, d_g
        d_c[at + i], d_y_before_out[to + i] = d_before, d_y_before
        d_threshold[i] += d_theta
        d_bias[i] += d_u
        d_bias[2 * n + i] += d_g


@compiled
def reset_gate_adjoint(n, low, high, r, s, y, before, d_sent, at, d_in_out, d, d_y_before, to, d_bias):
    """Adjoint of `reset_gate`: row r of `d_in_out`; adds to `d_y_before`. `d_sent` is the gradient of q."""
    for i in range(low, high):
        d_r, d_sender = cells.egru_paper_reset_backward(r[s + i], y[before + i], d_sent[at + i])
        d_in_out[d + n + i] = d_r
        d_y_before[to + i] += d_sender
        d_bias[n + i] += d_r


@compiled
def count_open(part, parts, kind, dampening, support, threshold, v, first, last, step, n, counts_out):
    """In how many of every `step`-th of the rows `first` to `last` of v (rows, N) each unit fired or has a slope, exact
    up to 2^24: a thread's units. float32, so that sixteen are counted at once."""
    vectors = -(-n // LANES)
    low, high = min(n, vectors * part // parts * LANES), min(n, vectors * (part + 1) // parts * LANES)
    counts_out[low:high] = 0
    whole = low + (high - low) // LANES * LANES
    for b in range(first, last, step):
        for i in range(low, whole, LANES):
            value, theta = load(v, b * n + i), load(threshold, i)
            slope = cells.surrogate_slope(kind, value - theta, dampening, support)
            event = cells.select(value > theta, cells.ONE, cells.ZERO)
            found = cells.select(event + cells.absolute(slope) != cells.ZERO, cells.ONE, cells.ZERO)
            store(counts_out, i, load(counts_out, i) + found)
        for i in range(whole, high):
            slope = cells.surrogate_slope(kind, v[b * n + i] - threshold[i], dampening, support)
            counts_out[i] += cells.ONE if v[b * n + i] > threshold[i] or slope != 0 else cells.ZERO


@compiled
def count_sent(part, parts, x, counts_out):
    """How many numbers of a thread's share of x are not zero; counts_out (parts,)."""
    vectors = len(x) // LANES
    low, high, sent = vectors * part // parts * LANES, vectors * (part + 1) // parts * LANES, everywhere(cells.ZERO)
    count = 0
    for first in range(low, high, MOST_COUNTED * LANES):
        for i in range(first, min(high, first + MOST_COUNTED * LANES), LANES):
            sent = sent + cells.select(load(x, i) != cells.ZERO, cells.ONE, cells.ZERO)
        count += np.int64(sum_lanes(sent))
        sent = everywhere(cells.ZERO)
    if part == parts - 1:
        for i in range(vectors * LANES, len(x)):
            count += x[i] != 0
    counts_out[part] = count


# --- a step of all units, for products by BLAS ---------------------------------------------------------------


@compiled
def update_all(
    n, rows, paper, drive_in, a, pitch, drive_rec, threshold, held, s,
    u_out, r_out, g_out, q_out, v_out, y_out, c_out,
):  # fmt: skip
    """One step of `rows` samples from both drives, biases in them; s is where the step begins in (T, B, N) arrays."""
    for b in range(rows):
        at, d, to = s + b * n, a + b * pitch, s + (rows + b) * n
        if paper:
            update_paper(
                n, 0, n, drive_in, d, drive_rec, b * 3 * n, threshold, c_out, y_out, at, at,
                u_out, g_out, v_out, y_out, c_out, to,
            )  # fmt: skip
        else:
            update(
                n, 0, n, drive_in, d, drive_rec, b * 3 * n, threshold, c_out, at, at,
                u_out, r_out, g_out, q_out, v_out, y_out, c_out, to,
            )  # fmt: skip
        if len(held) > 0:
            hold(0, n, held, paper, threshold, at, at, u_out, v_out, y_out, c_out, to)


@compiled
def reset_all(n, rows, drive_in, a, pitch, drive_rec, y, s, r_out, q_out):
    """`reset_gate` of `rows` samples."""
    for b in range(rows):
        at = s + b * n
        reset_gate(n, 0, n, drive_in, a + b * pitch, drive_rec, b * 3 * n, y, at, at, r_out, q_out)


@compiled
def adjoint_all(
    n, rows, paper, kind, dampening, support, threshold, u, r, g, q, v, c, s, d_y, d_cell, d_cell_at,
    d_c, d_y_before_out, d_in_out, d_rec_out, a, pitch, d_threshold, d_bias,
):  # fmt: skip
    """`adjoint` or `adjoint_paper` of `rows` samples; s is where the step begins in (T, B, N) arrays."""
    for b in range(rows):
        at, d = s + b * n, a + b * pitch
        if paper:
            adjoint_paper(
                n, 0, n, kind, dampening, support, threshold, u, g, v, at, c, at, d_y, d_cell, d_cell_at + b * n,
                d_c, b * n, d_y_before_out, b * n, d_in_out, d, d_threshold, d_bias,
            )  # fmt: skip
        else:
            adjoint(
                n, 0, n, kind, dampening, support, threshold, u, r, g, q, v, at, c, at, d_y, d_cell,
                d_cell_at + b * n, d_c, b * n, d_in_out, d_rec_out, d, d_threshold, d_bias,
            )  # fmt: skip


@compiled
def reset_adjoint_all(n, rows, r, y, s, d_sent, d_in_out, a, pitch, d_y_before, d_bias):
    """`reset_gate_adjoint` of `rows` samples."""
    for b in range(rows):
        at = s + b * n
        reset_gate_adjoint(n, 0, n, r, at, y, at, d_sent, b * n, d_in_out, a + b * pitch, d_y_before, b * n, d_bias)


@compiled
def copy_all(part, parts, source, target):
    """target[:] = source, as float32, a thread's share."""
    for i in range(len(source) * part // parts, len(source) * (part + 1) // parts):
        target[i] = source[i]
