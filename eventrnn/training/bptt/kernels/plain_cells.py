"""One step of a layer without thresholds, forward and backward: all samples, sixteen units at a time.

The products of the step go through BLAS, before a forward kernel and after a backward one. All arrays are flat float32,
named in `records.py`; gates and drives of a sample are rows of G * N numbers, in the order of the cell: (u, r, g) or
(i, f, g, o). `t` is the number of the step. Zoneout (Krueger et al. 2017): a unit that is held keeps its cell, as if
its keep gate were 1, or its forget gate 1 and its input gate 0. These are the gates on the tape, so that the backward
pass needs nothing more.

The equations are the scalar rules of `cells.py`, applied to vectors. Reference: `reference.step` (forward) and
`reference.backward`. The kernels of the GRU whose reset gate comes first stand on both sides of its recurrent product.
"""

from __future__ import annotations

from eventrnn import cells
from eventrnn.cpu.kernels.jit import compiled, internal
from eventrnn.cpu.kernels.simd import LANES, load_some, store_some

# --- forward ------------------------------------------------------------------------------------------------


@internal
def _drive(drives, n, gates, row, sample, gate, i, some):
    """Input drive and recurrent drive of a gate, biases added; units `i` to `i + some`."""
    k = gate * n + i
    into = load_some(drives.into, row * gates * n + k, some) + load_some(drives.bias_in, k, some)
    rec = load_some(drives.rec, sample * gates * n + k, some) + load_some(drives.bias_rec, k, some)
    return into, rec


@internal
def _is_held(drives, at, some):
    """Whether the units are held, as a condition of `select`."""
    return load_some(drives.held, at, some) > cells.ZERO


@compiled
def gru(size, drives, tape, t):
    """GRU with the reset gate after the product. `tape.extra` keeps the candidate's recurrent drive."""
    n, batch, zoneout = size.units, size.batch, len(drives.held) > 0
    for b in range(batch):
        row = t * batch + b
        for i in range(0, n, LANES):
            some, s, a = min(LANES, n - i), row * n + i, 3 * row * n + i
            in_u, rec_u = _drive(drives, n, 3, row, b, 0, i, some)
            in_r, rec_r = _drive(drives, n, 3, row, b, 1, i, some)
            in_g, rec_g = _drive(drives, n, 3, row, b, 2, i, some)
            before = load_some(tape.y, s, some)
            h, u, r, g = cells.gru_value(in_u, in_r, in_g, rec_u, rec_r, rec_g, before)
            if zoneout:
                held = _is_held(drives, s, some)
                h, u = cells.select(held, before, h), cells.select(held, cells.ONE, u)
            store_some(tape.gates, a, some, u)
            store_some(tape.gates, a + n, some, r)
            store_some(tape.gates, a + 2 * n, some, g)
            store_some(tape.extra, s, some, rec_g)
            store_some(tape.y, s + batch * n, some, h)


@compiled
def gru_reset(size, drives, tape, t):
    """GRU with the reset gate before the product: that gate, and the input of the product, r * h in `tape.extra`."""
    n, batch = size.units, size.batch
    for b in range(batch):
        row = t * batch + b
        for i in range(0, n, LANES):
            some, s = min(LANES, n - i), row * n + i
            in_r, rec_r = _drive(drives, n, 3, row, b, 1, i, some)
            r = cells.egru_reset_gate(in_r, rec_r)
            store_some(tape.gates, 3 * row * n + n + i, some, r)
            store_some(tape.extra, s, some, r * load_some(tape.y, s, some))


@compiled
def gru_before(size, drives, tape, t):
    """GRU with the reset gate before the product, after that product."""
    n, batch, zoneout = size.units, size.batch, len(drives.held) > 0
    for b in range(batch):
        row = t * batch + b
        for i in range(0, n, LANES):
            some, s, a = min(LANES, n - i), row * n + i, 3 * row * n + i
            in_u, rec_u = _drive(drives, n, 3, row, b, 0, i, some)
            in_g, rec_g = _drive(drives, n, 3, row, b, 2, i, some)
            before = load_some(tape.y, s, some)
            h, u, g = cells.gru_before_value(in_u, in_g, rec_u, rec_g, before)
            if zoneout:
                held = _is_held(drives, s, some)
                h, u = cells.select(held, before, h), cells.select(held, cells.ONE, u)
            store_some(tape.gates, a, some, u)
            store_some(tape.gates, a + 2 * n, some, g)
            store_some(tape.y, s + batch * n, some, h)


@compiled
def lstm(size, drives, tape, t):
    """LSTM."""
    n, batch, zoneout = size.units, size.batch, len(drives.held) > 0
    for b in range(batch):
        row = t * batch + b
        for k in range(0, n, LANES):
            some, s, a = min(LANES, n - k), row * n + k, 4 * row * n + k
            in_i, rec_i = _drive(drives, n, 4, row, b, 0, k, some)
            in_f, rec_f = _drive(drives, n, 4, row, b, 1, k, some)
            in_g, rec_g = _drive(drives, n, 4, row, b, 2, k, some)
            in_o, rec_o = _drive(drives, n, 4, row, b, 3, k, some)
            before = load_some(tape.c, s, some)
            h, c, i, f, g, o = cells.lstm_value(in_i, in_f, in_g, in_o, rec_i, rec_f, rec_g, rec_o, before)
            if zoneout:
                held = _is_held(drives, s, some)
                i, f = cells.select(held, cells.ZERO, i), cells.select(held, cells.ONE, f)
                c = cells.select(held, before, c)
                h = cells.lstm_output(o, c)
            store_some(tape.gates, a, some, i)
            store_some(tape.gates, a + n, some, f)
            store_some(tape.gates, a + 2 * n, some, g)
            store_some(tape.gates, a + 3 * n, some, o)
            store_some(tape.c, s + batch * n, some, c)
            store_some(tape.y, s + batch * n, some, h)


# --- backward -----------------------------------------------------------------------------------------------


@internal
def _upstream(deltas, row, sample, n, i, some):
    """Gradients of the step's output and of its cell; units `i` to `i + some` of a sample."""
    at = sample * n + i
    d_c = load_some(deltas.d_c, at, some)
    if len(deltas.d_cell) > 0:
        d_c = d_c + load_some(deltas.d_cell, row * n + i, some)
    return load_some(deltas.d_y, at, some), d_c


@compiled
def gru_adjoint(size, tape, deltas, t):
    """Adjoint of `gru`. `deltas.d_c` is overwritten with the gradient of the output of the step before."""
    n, batch = size.units, size.batch
    for b in range(batch):
        row = t * batch + b
        for i in range(0, n, LANES):
            some, s, a = min(LANES, n - i), row * n + i, 3 * row * n + i
            d_y, d_c = _upstream(deltas, row, b, n, i, some)
            d_u, d_r, d_g, d_rec_g, d_before = cells.gru_backward(
                load_some(tape.gates, a, some),
                load_some(tape.gates, a + n, some),
                load_some(tape.gates, a + 2 * n, some),
                load_some(tape.extra, s, some),
                load_some(tape.y, s, some),
                d_y + d_c,
            )
            store_some(deltas.d_in, a, some, d_u)
            store_some(deltas.d_in, a + n, some, d_r)
            store_some(deltas.d_in, a + 2 * n, some, d_g)
            store_some(deltas.d_rec, a, some, d_u)
            store_some(deltas.d_rec, a + n, some, d_r)
            store_some(deltas.d_rec, a + 2 * n, some, d_rec_g)
            store_some(deltas.d_c, b * n + i, some, d_before)


@compiled
def gru_before_adjoint(size, tape, deltas, t):
    """Adjoint of `gru_before`. `deltas.d_c` is overwritten with the gradient of the output of the step before."""
    n, batch = size.units, size.batch
    for b in range(batch):
        row = t * batch + b
        for i in range(0, n, LANES):
            some, s, a = min(LANES, n - i), row * n + i, 3 * row * n + i
            d_y, d_c = _upstream(deltas, row, b, n, i, some)
            d_u, d_g, d_before = cells.gru_before_backward(
                load_some(tape.gates, a, some),
                load_some(tape.gates, a + 2 * n, some),
                load_some(tape.y, s, some),
                d_y + d_c,
            )
            store_some(deltas.d_in, a, some, d_u)
            store_some(deltas.d_in, a + 2 * n, some, d_g)
            store_some(deltas.d_c, b * n + i, some, d_before)


@compiled
def gru_reset_adjoint(size, tape, d_sent, deltas, t):
    """Adjoint of `gru_reset`, from the gradient `d_sent` (B, N) of r * h. `deltas.d_c` is added to."""
    n, batch = size.units, size.batch
    for b in range(batch):
        row = t * batch + b
        for i in range(0, n, LANES):
            some, s, a, at = min(LANES, n - i), row * n + i, 3 * row * n + i, b * n + i
            d_r, d_before = cells.egru_paper_reset_backward(
                load_some(tape.gates, a + n, some), load_some(tape.y, s, some), load_some(d_sent, at, some)
            )
            store_some(deltas.d_in, a + n, some, d_r)
            store_some(deltas.d_c, at, some, load_some(deltas.d_c, at, some) + d_before)


@compiled
def lstm_adjoint(size, tape, deltas, t):
    """Adjoint of `lstm`. `deltas.d_c` is overwritten with the gradient of the cell of the step before."""
    n, batch = size.units, size.batch
    for b in range(batch):
        row = t * batch + b
        for k in range(0, n, LANES):
            some, s, a = min(LANES, n - k), row * n + k, 4 * row * n + k
            d_y, d_c = _upstream(deltas, row, b, n, k, some)
            d_i, d_f, d_g, d_o, d_before = cells.lstm_backward(
                load_some(tape.gates, a, some),
                load_some(tape.gates, a + n, some),
                load_some(tape.gates, a + 2 * n, some),
                load_some(tape.gates, a + 3 * n, some),
                load_some(tape.c, s, some),
                load_some(tape.c, s + batch * n, some),
                d_y,
                d_c,
            )
            store_some(deltas.d_in, a, some, d_i)
            store_some(deltas.d_in, a + n, some, d_f)
            store_some(deltas.d_in, a + 2 * n, some, d_g)
            store_some(deltas.d_in, a + 3 * n, some, d_o)
            store_some(deltas.d_c, b * n + k, some, d_before)
