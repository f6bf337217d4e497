"""One step of a layer, forward and backward, around its recurrent products.

A thread owns a unit, and a row of blocks every n-th sample; in the last two kernels a thread owns every n-th element.
The rules are those of `cells.py` in float32, so that with float32 products only the order of their sums differs from
the CPU's. Reference: `reference.step` and `reference.backward`.

All arrays are in global memory, all rows padded: N units take `padded` columns, a multiple of 8; columns beyond N are
zero and are never written.

drive_at   : (B, 3, padded) float32, input products of the step, gates in the order g, u, r
rec_at     : (B, 3, padded) float32, recurrent products, gates in the order u, r, g
vectors_at : (6, padded) float32, biases of the input (g, u, r), then of the recurrence (u, r, g)
before_at  : (B, padded) float32, the cell before the event `v` of the step before; with `first`, the carried cell `c`
carried_at : (B, padded) float32, the outputs carried into the window, read with `first` in the paper's variant
tape_at    : (5, T, B, padded) float32 from the step on: u, r, g, q, v; `plane` bytes from one to the next. q is the
             candidate's recurrent drive; the paper's variant does not use it
y_at       : (B, padded) operands, what is sent
next_at    : (B, padded) operands, the same after dropout, or address 0
mask_at    : bytes of the dropout between this layer and the next, from the step on, or 0; `mask_pitch` bytes from one
             sample to the next, 0 where the samples share a mask
deltas_at  : (B, 5, padded) operands, gradients of the drives: g, u, r of the input, q (the recurrent row of g), and of
             the threshold. The columns g to r are the deltas of the input product, u to q those of the recurrent one
"""

from __future__ import annotations

import numpy as np
from numba import int64, types

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.ptx import (
    egru_backward,
    egru_paper_backward,
    egru_paper_reset_backward,
    egru_paper_value,
    egru_reset_gate,
    egru_value,
    global_float32,
    global_float64,
    global_uint8,
    sigmoid,
    surrogate_slope,
)
from eventrnn.cuda.training.kernels.threads import BYTES, ONE32, STORES, ZERO32, first_element, float_of, stride

#: how thresholds follow from their parameters
THRESHOLDS, LOGITS, NO_THRESHOLDS = range(3)


@device_function
def cell_after(v, threshold, paper):
    """The cell after the event."""
    if paper or v <= threshold:
        return v
    return v - threshold


@device_function
def sent(v, threshold):
    """What a unit sends."""
    return v if v > threshold else ZERO32


@device_function
def scale_of(mask_at, mask_pitch, sample, unit, scale_bits):
    """The factor of dropout."""
    if mask_at == 0:
        return ONE32
    return float_of(scale_bits) if global_uint8(mask_at)[sample * mask_pitch + unit] else ZERO32


def forward_kernel(precision: str):
    """The kernel of a step of the released variant, and its signature.

    hold_at : (B, padded) bytes of zoneout, 0 where the unit keeps its cell; or address 0
    """
    store, size = STORES[precision], BYTES[precision]

    def forward(
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
        vectors, thresholds, before = (
            global_float32(vectors_at),
            global_float32(threshold_at),
            global_float32(before_at),
        )
        drive, rec = global_float32(drive_at), global_float32(rec_at)
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            i, row = sample * padded + unit, sample * 3 * padded + unit
            threshold, carried = thresholds[unit], before[i]
            if not first:
                carried = cell_after(carried, threshold, False)
            q = rec[row + 2 * padded] + vectors[5 * padded + unit]
            v, u, r, g = egru_value(
                drive[row + padded] + vectors[padded + unit],
                drive[row + 2 * padded] + vectors[2 * padded + unit],
                drive[row] + vectors[unit],
                rec[row] + vectors[3 * padded + unit],
                rec[row + padded] + vectors[4 * padded + unit],
                q,
                carried,
            )
            if hold_at != 0 and global_uint8(hold_at)[i] == 0:
                u, v = ONE32, carried
            global_float32(tape_at)[i] = u
            global_float32(tape_at + plane)[i] = r
            global_float32(tape_at + 2 * plane)[i] = g
            global_float32(tape_at + 3 * plane)[i] = q
            global_float32(tape_at + 4 * plane)[i] = v
            y = sent(v, threshold)
            store(y_at + size * i, y)
            if next_at != 0:
                store(next_at + size * i, y * scale_of(mask_at, mask_pitch, sample, unit, scale_bits))
            sample += cuda.gridDim.y

    return forward, types.void(*[types.int64] * 18)


def reset_gate_kernel(precision: str):
    """The kernel of the paper's variant before the candidate's product, and its signature: r, and q = r * y.

    sent_at : (B, padded) operands, q
    """
    store, size = STORES[precision], BYTES[precision]

    def reset_gate(
        drive_at,
        rec_at,
        vectors_at,
        threshold_at,
        before_at,
        carried_at,
        first,
        tape_at,
        plane,
        sent_at,
        units,
        padded,
        batch,
    ):
        vectors, thresholds, before = (
            global_float32(vectors_at),
            global_float32(threshold_at),
            global_float32(before_at),
        )
        drive, rec, r_out = global_float32(drive_at), global_float32(rec_at), global_float32(tape_at + plane)
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            i, row = sample * padded + unit, sample * 3 * padded + unit
            y = global_float32(carried_at)[i] if first else sent(before[i], thresholds[unit])
            r = egru_reset_gate(
                drive[row + 2 * padded] + vectors[2 * padded + unit], rec[row + padded] + vectors[4 * padded + unit]
            )
            r_out[i] = r
            store(sent_at + size * i, r * y)
            sample += cuda.gridDim.y

    return reset_gate, types.void(*[types.int64] * 13)


def paper_forward_kernel(precision: str):
    """The kernel of the paper's variant after the candidate's product, and its signature. `hold_at` as in `forward`."""
    store, size = STORES[precision], BYTES[precision]

    def paper_forward(
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
        vectors, thresholds, before = (
            global_float32(vectors_at),
            global_float32(threshold_at),
            global_float32(before_at),
        )
        drive, rec = global_float32(drive_at), global_float32(rec_at)
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            i, row = sample * padded + unit, sample * 3 * padded + unit
            threshold, carried = thresholds[unit], before[i]
            y_before = global_float32(carried_at)[i] if first else sent(carried, threshold)
            v, u, g = egru_paper_value(
                drive[row + padded] + vectors[padded + unit],
                drive[row] + vectors[unit],
                rec[row] + vectors[3 * padded + unit],
                rec[row + 2 * padded] + vectors[5 * padded + unit],
                carried,
                y_before,
            )
            if hold_at != 0 and global_uint8(hold_at)[i] == 0:
                u, v = ONE32, carried - y_before
            global_float32(tape_at)[i] = u
            global_float32(tape_at + 2 * plane)[i] = g
            global_float32(tape_at + 4 * plane)[i] = v
            y = sent(v, threshold)
            store(y_at + size * i, y)
            if next_at != 0:
                store(next_at + size * i, y * scale_of(mask_at, mask_pitch, sample, unit, scale_bits))
            sample += cuda.gridDim.y

    return paper_forward, types.void(*[types.int64] * 18)


def adjoint_kernel(precision: str, paper: bool, kind: int, dampening: float, support: float):
    """The kernel of the adjoint of a step, and its signature; of the paper's variant, all but the reset gate.

    kind, dampening, support : the surrogate derivative

    upstream_at : (B, padded) float32, gradient of the outputs from above, before the dropout of `mask_at`
    product_at  : (B, padded) float32, gradient of the outputs through the recurrent product of the step after, or 0
    later_at    : (B, padded) float32, gradient of the cells from the step after; overwritten with that for the step
                  before
    d_sent_at   : (B, padded) float32, of the paper's variant: gradient of the outputs through their subtraction in the
                  step after; overwritten with that for the step before
    d_cell_at   : (B, padded) float32, the loss's own gradient of v - threshold, or 0
    """
    store, size = STORES[precision], BYTES[precision]
    kind, dampening, support = int(kind), np.float32(dampening), np.float32(support)

    def adjoint(
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
        thresholds, before, later = global_float32(threshold_at), global_float32(before_at), global_float32(later_at)
        upstream, d_sent = global_float32(upstream_at), global_float32(d_sent_at)
        us, rs, gs = global_float32(tape_at), global_float32(tape_at + plane), global_float32(tape_at + 2 * plane)
        qs, vs = global_float32(tape_at + 3 * plane), global_float32(tape_at + 4 * plane)
        unit, sample, gate = first_element(), int64(cuda.blockIdx.y), size * padded
        while unit < units and sample < batch:
            i = sample * padded + unit
            threshold, v, c_before = thresholds[unit], vs[i], before[i]
            if not first:
                c_before = cell_after(c_before, threshold, paper)
            event = ONE32 if v > threshold else ZERO32
            d_y = upstream[i] * scale_of(mask_at, mask_pitch, sample, unit, scale_bits)
            if product_at != 0:
                d_y += global_float32(product_at)[i]
            d_cell = ZERO32
            if d_cell_at != 0:
                d_cell = global_float32(d_cell_at)[i]
            slope = surrogate_slope(kind, v - threshold, dampening, support)
            out = deltas_at + size * (sample * 5 * padded + unit)
            if paper:
                d_u, d_g, d_before, d_subtracted, d_threshold = egru_paper_backward(
                    us[i], gs[i], c_before, v, event, slope, d_y + d_sent[i], later[i], d_cell
                )
                d_sent[i] = d_subtracted
            else:
                d_u, d_r, d_g, d_q, d_before, d_threshold = egru_backward(
                    us[i], rs[i], gs[i], qs[i], c_before, v, event, slope, threshold, d_y, later[i], d_cell
                )
                store(out + 2 * gate, d_r)
                store(out + 3 * gate, d_q)
            store(out, d_g)
            store(out + gate, d_u)
            # A penalty on v - threshold has the opposite gradient for the threshold.
            store(out + 4 * gate, d_threshold - d_cell)
            later[i] = d_before
            sample += cuda.gridDim.y

    return adjoint, types.void(*[types.int64] * 17)


def reset_gate_adjoint_kernel(precision: str):
    """The kernel of the adjoint of `reset_gate`, and its signature: the deltas of r, and a term of `d_sent_at`.

    d_q_at : (B, padded) float32, gradient of q = r * y, from the candidate's product
    parts  : of a row of `deltas_at`, of which the third is that of r
    """
    store, size = STORES[precision], BYTES[precision]

    def reset_gate_adjoint(
        tape_at,
        plane,
        before_at,
        carried_at,
        first,
        threshold_at,
        d_q_at,
        d_sent_at,
        deltas_at,
        parts,
        units,
        padded,
        batch,
    ):
        thresholds, before, rs = (
            global_float32(threshold_at),
            global_float32(before_at),
            global_float32(tape_at + plane),
        )
        d_q, d_sent = global_float32(d_q_at), global_float32(d_sent_at)
        unit, sample = first_element(), int64(cuda.blockIdx.y)
        while unit < units and sample < batch:
            i = sample * padded + unit
            y = global_float32(carried_at)[i] if first else sent(before[i], thresholds[unit])
            d_r, d_y = egru_paper_reset_backward(rs[i], y, d_q[i])
            store(deltas_at + size * ((sample * parts + 2) * padded + unit), d_r)
            d_sent[i] += d_y
            sample += cuda.gridDim.y

    return reset_gate_adjoint, types.void(*[types.int64] * 13)


def threshold_kernel():
    """The kernel of the thresholds (N,) that parameters stand for, and its signature.

    kind : THRESHOLDS for the parameters themselves, LOGITS for their sigmoid, or NO_THRESHOLDS for minus infinity, so
           that every output counts as sent
    """

    def thresholds(parameter_at, kind, units, out_at):
        parameter, out = global_float32(parameter_at), global_float32(out_at)
        unit, step = first_element(), stride()
        while unit < units:
            threshold = parameter[unit]
            if kind == LOGITS:
                threshold = sigmoid(threshold)
            elif kind == NO_THRESHOLDS:
                threshold = np.float32(-np.inf)
            out[unit] = threshold
            unit += step

    return thresholds, types.void(*[types.int64] * 4)


def carry_kernel(precision: str):
    """The kernel between windows, and its signature.

    With `begin`, the carried outputs `outputs_at` (B, padded) float32 are stored as operands at `y_at`. Otherwise the
    carried cells and outputs are set to those of the last step, unless `results_at` begins with a number that is not
    zero: then the window has failed, and they stay.

    last_at, sent_at : (B, padded) float32, cells of the last step before the event, and what is sent above the
                       threshold; the same array for a cell that sends its cell
    kept             : whether the cell stays as it is when the unit sends
    """
    store, size = STORES[precision], BYTES[precision]

    def carry(
        begin, last_at, sent_at, threshold_at, kept, cells_at, outputs_at, y_at, results_at, units, padded, batch
    ):
        from_outputs, to_cells, last = global_float32(outputs_at), global_float32(cells_at), global_float32(last_at)
        at, step = first_element(), stride()
        failed = not begin and global_float64(results_at)[0] != 0
        while at < units * batch and not failed:
            sample = at // units
            i = sample * padded + at - sample * units
            if begin:
                store(y_at + size * i, from_outputs[i])
            else:
                threshold = global_float32(threshold_at)[at - sample * units]
                to_cells[i] = cell_after(last[i], threshold, kept != 0)
                from_outputs[i] = sent(global_float32(sent_at)[i], threshold)
            at += step

    return carry, types.void(*[types.int64] * 12)
