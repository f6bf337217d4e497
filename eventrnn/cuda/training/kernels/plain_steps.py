"""One step of a layer without thresholds (GRU, LSTM), forward and backward, around its recurrent products.

A thread owns a unit, and a row of blocks every n-th sample. The rules are those of `cells.py` in float32. Arrays,
padding and signatures are those of `cell_steps.py`, so that one launch serves all cells; what a cell here does not need
is not read. Reference: `reference.step` and `reference.backward`.

drive_at, rec_at : (B, G, padded) float32 of G gates: g, u, r and u, r, g of a GRU; i, f, g, o and again of an LSTM
vectors_at       : (2 G, padded) float32, biases of the input and of the recurrence, in these orders
before_at        : (B, padded) float32, of a GRU the output and of an LSTM the cell of the step before
tape_at          : of a GRU (5, T, B, padded) float32: u, r, g, q, h, where q is the recurrent drive of the candidate;
                   of an LSTM (6, T, B, padded): i, f, g, o, c, h
deltas_at        : (B, parts, padded) operands: g, u, r and, where the reset gate comes after the product, q; of an
                   LSTM i, f, g, o

Where the reset gate comes before the product, `cell_steps.reset_gate` and its adjoint stand around that product. They
find the output of the step before as a value above the threshold: the thresholds of such a layer are minus infinity.
"""

from __future__ import annotations

from numba import int64, types

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.ptx import (
    global_float32,
    global_uint8,
    gru_backward,
    gru_before_backward,
    gru_before_value,
    gru_value,
    lstm_backward,
    lstm_output,
    lstm_value,
)
from eventrnn.cuda.training.kernels.cell_steps import scale_of
from eventrnn.cuda.training.kernels.threads import BYTES, ONE32, STORES, ZERO32, first_element


@device_function
def biased(drive_at, biases_at, sample, gate, gates, padded, unit):
    """The drive of a gate with its bias."""
    return (
        global_float32(drive_at)[(sample * gates + gate) * padded + unit]
        + global_float32(biases_at)[gate * padded + unit]
    )


@device_function
def is_held(hold_at, i):
    """Whether zoneout holds the unit."""
    return hold_at != 0 and global_uint8(hold_at)[i] == 0


@device_function
def upstream_of(upstream_at, product_at, i, mask_at, mask_pitch, sample, unit, scale_bits):
    """The gradient of the output, from above and from the step after."""
    d_y = global_float32(upstream_at)[i] * scale_of(mask_at, mask_pitch, sample, unit, scale_bits)
    if product_at != 0:
        d_y += global_float32(product_at)[i]
    return d_y


def _sender(precision: str):
    """A function that stores an output, and the same after dropout."""
    store, size = STORES[precision], BYTES[precision]

    @device_function
    def send(h, i, sample, unit, y_at, next_at, mask_at, mask_pitch, scale_bits):
        store(y_at + size * i, h)
        if next_at != 0:
            store(next_at + size * i, h * scale_of(mask_at, mask_pitch, sample, unit, scale_bits))

    return send


def gru_kernel(precision: str):
    """The kernel of a step of a GRU whose reset gate comes after the product, and its signature."""
    send = _sender(precision)

    def gru(
        drive_at,
        rec_at,
        vectors_at,
        threshold_at,
        before_at,
        carried_at,
        first,
        tape_at,
        plane,
        y_at,
        next_at,
        mask_at,
        mask_pitch,
        scale_bits,
        hold_at,
        units,
        padded,
        batch,
    ):
        biases_at = vectors_at + 4 * 3 * padded
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            i = sample * padded + unit
            before, q = global_float32(before_at)[i], biased(rec_at, biases_at, sample, 2, 3, padded, unit)
            h, u, r, g = gru_value(
                biased(drive_at, vectors_at, sample, 1, 3, padded, unit),
                biased(drive_at, vectors_at, sample, 2, 3, padded, unit),
                biased(drive_at, vectors_at, sample, 0, 3, padded, unit),
                biased(rec_at, biases_at, sample, 0, 3, padded, unit),
                biased(rec_at, biases_at, sample, 1, 3, padded, unit),
                q,
                before,
            )
            if is_held(hold_at, i):
                h, u = before, ONE32
            global_float32(tape_at)[i] = u
            global_float32(tape_at + plane)[i] = r
            global_float32(tape_at + 2 * plane)[i] = g
            global_float32(tape_at + 3 * plane)[i] = q
            global_float32(tape_at + 4 * plane)[i] = h
            send(h, i, sample, unit, y_at, next_at, mask_at, mask_pitch, scale_bits)
            sample += cuda.gridDim.y

    return gru, types.void(*[types.int64] * 18)


def gru_before_kernel(precision: str):
    """The kernel of a step of a GRU whose reset gate comes before the product, after that product; its signature."""
    send = _sender(precision)

    def gru_before(
        drive_at,
        rec_at,
        vectors_at,
        threshold_at,
        before_at,
        carried_at,
        first,
        tape_at,
        plane,
        y_at,
        next_at,
        mask_at,
        mask_pitch,
        scale_bits,
        hold_at,
        units,
        padded,
        batch,
    ):
        biases_at = vectors_at + 4 * 3 * padded
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            i = sample * padded + unit
            before = global_float32(before_at)[i]
            h, u, g = gru_before_value(
                biased(drive_at, vectors_at, sample, 1, 3, padded, unit),
                biased(drive_at, vectors_at, sample, 0, 3, padded, unit),
                biased(rec_at, biases_at, sample, 0, 3, padded, unit),
                biased(rec_at, biases_at, sample, 2, 3, padded, unit),
                before,
            )
            if is_held(hold_at, i):
                h, u = before, ONE32
            global_float32(tape_at)[i] = u
            global_float32(tape_at + 2 * plane)[i] = g
            global_float32(tape_at + 4 * plane)[i] = h
            send(h, i, sample, unit, y_at, next_at, mask_at, mask_pitch, scale_bits)
            sample += cuda.gridDim.y

    return gru_before, types.void(*[types.int64] * 18)


def lstm_kernel(precision: str):
    """The kernel of a step of an LSTM, and its signature. A unit that is held keeps its cell; its output gate acts."""
    send = _sender(precision)

    def lstm(
        drive_at,
        rec_at,
        vectors_at,
        threshold_at,
        before_at,
        carried_at,
        first,
        tape_at,
        plane,
        y_at,
        next_at,
        mask_at,
        mask_pitch,
        scale_bits,
        hold_at,
        units,
        padded,
        batch,
    ):
        biases_at = vectors_at + 4 * 4 * padded
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            at = sample * padded + unit
            before = global_float32(before_at)[at]
            h, c, i, f, g, o = lstm_value(
                biased(drive_at, vectors_at, sample, 0, 4, padded, unit),
                biased(drive_at, vectors_at, sample, 1, 4, padded, unit),
                biased(drive_at, vectors_at, sample, 2, 4, padded, unit),
                biased(drive_at, vectors_at, sample, 3, 4, padded, unit),
                biased(rec_at, biases_at, sample, 0, 4, padded, unit),
                biased(rec_at, biases_at, sample, 1, 4, padded, unit),
                biased(rec_at, biases_at, sample, 2, 4, padded, unit),
                biased(rec_at, biases_at, sample, 3, 4, padded, unit),
                before,
            )
            if is_held(hold_at, at):
                i, f, c = ZERO32, ONE32, before
                h = lstm_output(o, c)
            global_float32(tape_at)[at] = i
            global_float32(tape_at + plane)[at] = f
            global_float32(tape_at + 2 * plane)[at] = g
            global_float32(tape_at + 3 * plane)[at] = o
            global_float32(tape_at + 4 * plane)[at] = c
            global_float32(tape_at + 5 * plane)[at] = h
            send(h, at, sample, unit, y_at, next_at, mask_at, mask_pitch, scale_bits)
            sample += cuda.gridDim.y

    return lstm, types.void(*[types.int64] * 18)


def gru_adjoint_kernel(precision: str):
    """The kernel of the adjoint of `gru`, and its signature.

    Arguments: see `cell_steps.adjoint_kernel`. `later_at` holds the gradient of the output past its products.
    """
    store, size = STORES[precision], BYTES[precision]

    def gru_adjoint(
        tape_at,
        plane,
        before_at,
        first,
        threshold_at,
        upstream_at,
        product_at,
        later_at,
        d_sent_at,
        d_cell_at,
        mask_at,
        mask_pitch,
        scale_bits,
        deltas_at,
        units,
        padded,
        batch,
    ):
        later, part = global_float32(later_at), size * padded
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            i = sample * padded + unit
            d_y = upstream_of(upstream_at, product_at, i, mask_at, mask_pitch, sample, unit, scale_bits)
            d_u, d_r, d_g, d_q, d_before = gru_backward(
                global_float32(tape_at)[i],
                global_float32(tape_at + plane)[i],
                global_float32(tape_at + 2 * plane)[i],
                global_float32(tape_at + 3 * plane)[i],
                global_float32(before_at)[i],
                d_y + later[i],
            )
            out = deltas_at + size * (sample * 4 * padded + unit)
            store(out, d_g)
            store(out + part, d_u)
            store(out + 2 * part, d_r)
            store(out + 3 * part, d_q)
            later[i] = d_before
            sample += cuda.gridDim.y

    return gru_adjoint, types.void(*[types.int64] * 17)


def gru_before_adjoint_kernel(precision: str):
    """The kernel of the adjoint of `gru_before`, and its signature: all but the reset gate.

    Arguments: see `gru_adjoint_kernel`. d_sent_at : (B, padded) float32, the gradient of the output through the reset
    gate of the step after; becomes zero, and `cell_steps.reset_gate_adjoint` adds that for the step before
    """
    store, size = STORES[precision], BYTES[precision]

    def gru_before_adjoint(
        tape_at,
        plane,
        before_at,
        first,
        threshold_at,
        upstream_at,
        product_at,
        later_at,
        d_sent_at,
        d_cell_at,
        mask_at,
        mask_pitch,
        scale_bits,
        deltas_at,
        units,
        padded,
        batch,
    ):
        later, d_sent, part = global_float32(later_at), global_float32(d_sent_at), size * padded
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            i = sample * padded + unit
            d_y = upstream_of(upstream_at, product_at, i, mask_at, mask_pitch, sample, unit, scale_bits)
            d_u, d_g, d_before = gru_before_backward(
                global_float32(tape_at)[i],
                global_float32(tape_at + 2 * plane)[i],
                global_float32(before_at)[i],
                d_y + d_sent[i] + later[i],
            )
            out = deltas_at + size * (sample * 3 * padded + unit)
            store(out, d_g)
            store(out + part, d_u)
            later[i] = d_before
            d_sent[i] = ZERO32
            sample += cuda.gridDim.y

    return gru_before_adjoint, types.void(*[types.int64] * 17)


def lstm_adjoint_kernel(precision: str):
    """The kernel of the adjoint of `lstm`, and its signature.

    Arguments: see `cell_steps.adjoint_kernel`. `later_at` holds the gradient of the cell.
    """
    store, size = STORES[precision], BYTES[precision]

    def lstm_adjoint(
        tape_at,
        plane,
        before_at,
        first,
        threshold_at,
        upstream_at,
        product_at,
        later_at,
        d_sent_at,
        d_cell_at,
        mask_at,
        mask_pitch,
        scale_bits,
        deltas_at,
        units,
        padded,
        batch,
    ):
        later, part = global_float32(later_at), size * padded
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            i = sample * padded + unit
            d_y = upstream_of(upstream_at, product_at, i, mask_at, mask_pitch, sample, unit, scale_bits)
            d_i, d_f, d_g, d_o, d_before = lstm_backward(
                global_float32(tape_at)[i],
                global_float32(tape_at + plane)[i],
                global_float32(tape_at + 2 * plane)[i],
                global_float32(tape_at + 3 * plane)[i],
                global_float32(before_at)[i],
                global_float32(tape_at + 4 * plane)[i],
                d_y,
                later[i],
            )
            out = deltas_at + size * (sample * 4 * padded + unit)
            store(out, d_i)
            store(out + part, d_f)
            store(out + 2 * part, d_g)
            store(out + 3 * part, d_o)
            later[i] = d_before
            sample += cuda.gridDim.y

    return lstm_adjoint, types.void(*[types.int64] * 17)
