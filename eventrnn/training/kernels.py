"""Element-wise parts of training, fused: one pass forward, one pass backward, the loss.

The products around them are BLAS calls (`bptt.py`). Same rules as inference: the scalar functions of `cells.py`,
sixteen lanes at a time. Arrays are flat and C-contiguous; rows of 3N hold the gates (u, r, g).
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.jit import compiled
from eventrnn.simd import LANES, bits, load, store


@compiled
def count_bits(word):
    """How many bits of a 64-bit integer are set."""
    count = 0
    while word != 0:
        word &= word - 1
        count += 1
    return count


@compiled
def forward(
    n, rows, drive_in, drive_rec, bias_rec, threshold, c_before, u_out, r_out, g_out, q_out, v_out, y_out, c_out
):
    """One step of the released variant for `rows` samples. `q_out` keeps the recurrent candidate drive."""
    whole = n // LANES * LANES
    for b in range(rows):
        d, s = b * 3 * n, b * n
        for i in range(0, whole, LANES):
            q = load(drive_rec, d + 2 * n + i) + load(bias_rec, 2 * n + i)
            v, u, r, g = cells.egru_value(
                load(drive_in, d + i),
                load(drive_in, d + n + i),
                load(drive_in, d + 2 * n + i),
                load(drive_rec, d + i) + load(bias_rec, i),
                load(drive_rec, d + n + i) + load(bias_rec, n + i),
                q,
                load(c_before, s + i),
            )
            theta = load(threshold, i)
            store(u_out, s + i, u)
            store(r_out, s + i, r)
            store(g_out, s + i, g)
            store(q_out, s + i, q)
            store(v_out, s + i, v)
            store(y_out, s + i, cells.select(v > theta, v, cells.ZERO))
            store(c_out, s + i, cells.select(v > theta, v - theta, v))
        for i in range(whole, n):
            q = drive_rec[d + 2 * n + i] + bias_rec[2 * n + i]
            v, u, r, g = cells.egru_value(
                drive_in[d + i],
                drive_in[d + n + i],
                drive_in[d + 2 * n + i],
                drive_rec[d + i] + bias_rec[i],
                drive_rec[d + n + i] + bias_rec[n + i],
                q,
                c_before[s + i],
            )
            u_out[s + i], r_out[s + i], g_out[s + i], q_out[s + i], v_out[s + i] = u, r, g, q, v
            y_out[s + i] = cells.select(v > threshold[i], v, cells.ZERO)
            c_out[s + i] = cells.select(v > threshold[i], v - threshold[i], v)


@compiled
def hold(n, rows, held, paper, threshold, c_before, y_before, u_out, v_out, y_out, c_out):
    """Zoneout, after `forward` or `paper_forward`: where held (rows * N), the keep gate is 1."""
    for b in range(rows):
        for i in range(n):
            s = b * n + i
            if held[s]:
                v = c_before[s] - y_before[s] if paper else c_before[s]
                u_out[s], v_out[s] = cells.ONE, v
                y_out[s] = cells.select(v > threshold[i], v, cells.ZERO)
                c_out[s] = cells.select(v > threshold[i], v - threshold[i], v) if not paper else v


@compiled
def backward(
    n, rows, kind, dampening, support, threshold,
    u, r, g, q, v, c_before, d_y, d_cell,
    d_c, d_in_out, d_rec_out, d_threshold,
):  # fmt: skip
    """Adjoint of `forward`. `d_c` is read and overwritten with the gradient one step before; `d_threshold` (N,)
    is added to; `d_in_out`, `d_rec_out` (rows, 3N) get the gradients of the two drives. `d_cell` is that of v itself.
    Returns how many fired or have a slope."""
    whole, paths = n // LANES * LANES, 0
    for b in range(rows):
        d, s = b * 3 * n, b * n
        for i in range(0, whole, LANES):
            theta, value = load(threshold, i), load(v, s + i)
            slope = cells.surrogate_slope(kind, value - theta, dampening, support)
            event = cells.select(value > theta, cells.ONE, cells.ZERO)
            d_u, d_r, d_g, d_q, d_before, d_theta = cells.egru_backward(
                load(u, s + i),
                load(r, s + i),
                load(g, s + i),
                load(q, s + i),
                load(c_before, s + i),
                value,
                event,
                slope,
                theta,
                load(d_y, s + i),
                load(d_c, s + i),
                load(d_cell, s + i),
            )
            paths += count_bits(bits(event + cells.absolute(slope) != cells.ZERO))
            store(d_in_out, d + i, d_u)
            store(d_in_out, d + n + i, d_r)
            store(d_in_out, d + 2 * n + i, d_g)
            store(d_rec_out, d + i, d_u)
            store(d_rec_out, d + n + i, d_r)
            store(d_rec_out, d + 2 * n + i, d_q)
            store(d_c, s + i, d_before)
            store(d_threshold, i, load(d_threshold, i) + d_theta)
        for i in range(whole, n):
            slope = cells.surrogate_slope(kind, v[s + i] - threshold[i], dampening, support)
            event = cells.select(v[s + i] > threshold[i], cells.ONE, cells.ZERO)
            d_u, d_r, d_g, d_q, d_before, d_theta = cells.egru_backward(
                u[s + i],
                r[s + i],
                g[s + i],
                q[s + i],
                c_before[s + i],
                v[s + i],
                event,
                slope,
                threshold[i],
                d_y[s + i],
                d_c[s + i],
                d_cell[s + i],
            )
            paths += event != 0 or slope != 0  # fmt: skip
            d_in_out[d + i], d_in_out[d + n + i], d_in_out[d + 2 * n + i] = d_u, d_r, d_g
            d_rec_out[d + i], d_rec_out[d + n + i], d_rec_out[d + 2 * n + i] = d_u, d_r, d_q
            d_c[s + i] = d_before
            d_threshold[i] += d_theta
    return paths


@compiled
def reset_gate(n, rows, drive_in, drive_rec, bias_rec, y_before, r_out, sent_out):
    """Paper's variant, first half: the reset gate and what it lets through, `sent = r * y_before`."""
    for b in range(rows):
        for i in range(n):
            k, s = b * 3 * n + n + i, b * n + i
            r_out[s] = cells.egru_reset_gate(drive_in[k], drive_rec[b * 2 * n + n + i] + bias_rec[n + i])
            sent_out[s] = r_out[s] * y_before[s]


@compiled
def paper_forward(
    n, rows, drive_in, drive_rec, drive_sent, bias_rec, threshold, c_before, y_before, u_out, g_out, v_out, y_out, c_out
):
    """Paper's variant, second half. `drive_rec` (rows, 2N) of y, `drive_sent` (rows, N) of r * y."""
    for b in range(rows):
        for i in range(n):
            k, s = b * 3 * n + i, b * n + i
            v, u, g = cells.egru_paper_value(
                drive_in[k],
                drive_in[k + 2 * n],
                drive_rec[b * 2 * n + i] + bias_rec[i],
                drive_sent[s] + bias_rec[2 * n + i],
                c_before[s],
                y_before[s],
            )
            u_out[s], g_out[s], v_out[s], c_out[s] = u, g, v, v
            y_out[s] = cells.select(v > threshold[i], v, cells.ZERO)


@compiled
def paper_backward(
    n, rows, kind, dampening, support, threshold,
    u, g, v, c_before, d_y, d_cell,
    d_c, d_y_before_out, d_in_out, d_threshold,
):  # fmt: skip
    """Adjoint of `paper_forward` but for the reset gate; rows u and g of `d_in_out` (rows, 3N) are written. Returns as `backward`."""
    paths = 0
    for b in range(rows):
        for i in range(n):
            k, s = b * 3 * n + i, b * n + i
            slope = cells.surrogate_slope(kind, v[s] - threshold[i], dampening, support)
            event = cells.select(v[s] > threshold[i], cells.ONE, cells.ZERO)
            d_u, d_g, d_before, d_y_before, d_theta = cells.egru_paper_backward(
                u[s], g[s], c_before[s], v[s], event, slope, d_y[s], d_c[s], d_cell[s]
            )
            paths += event != 0 or slope != 0
            d_in_out[k], d_in_out[k + 2 * n] = d_u, d_g
            d_c[s], d_y_before_out[s] = d_before, d_y_before
            d_threshold[i] += d_theta
    return paths


@compiled
def reset_gate_backward(n, rows, r, y_before, d_sent, d_in_out, d_y_before):
    """Adjoint of `reset_gate`: writes row r of `d_in_out` (rows, 3N), adds to `d_y_before`."""
    for b in range(rows):
        for i in range(n):
            s = b * n + i
            d_r, d_sender = cells.egru_paper_reset_backward(r[s], y_before[s], d_sent[s])
            d_in_out[b * 3 * n + n + i] = d_r
            d_y_before[s] += d_sender


@compiled
def softmax_cross_entropy(rows, size, logits, targets, scale, d_logits_out):
    """Sum of -ln softmax(logits)[target] over rows, in float64; `d_logits_out` gets its gradient times `scale`."""
    total = 0.0
    whole = size // LANES * LANES
    for row in range(rows):
        at = row * size
        largest = logits[at]
        for i in range(1, size):
            largest = max(largest, logits[at + i])
        for i in range(0, whole, LANES):
            store(d_logits_out, at + i, cells.exp_float32(load(logits, at + i) - largest))
        for i in range(whole, size):
            d_logits_out[at + i] = cells.exp_float32(logits[at + i] - largest)
        norm = 0.0
        for i in range(size):
            norm += d_logits_out[at + i]
        target = targets[row]
        total += np.log(norm) - (logits[at + target] - largest)
        factor = np.float32(scale / norm)
        for i in range(size):
            d_logits_out[at + i] *= factor
        d_logits_out[at + target] -= scale
    return total
