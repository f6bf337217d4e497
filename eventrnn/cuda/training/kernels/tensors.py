"""Between arrays of a caller and the padded arrays of a window: rows, parameters, gradients and states.

The flat array of all parameters is cut into chunks as in `updates.py`, and a block owns a chunk; elsewhere a thread
owns every n-th element. Nothing is added up, so that the bits depend on no number of blocks or threads.

segments_at : (segments, SEGMENT_FIELDS) int64; chunks_at : (chunks, 3) int64: segment, begin and end in the flat array
"""

from __future__ import annotations

from numba import float32, int64, types

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.ptx import global_float32, global_int64, global_uint8
from eventrnn.cuda.training.kernels.cell_steps import cell_after, sent
from eventrnn.cuda.training.kernels.threads import BYTES, STORES, ZERO32, first_element, float_of, stride

#: columns of the table of segments
(
    FIRST,  # first element of the segment in the flat array
    ROWS,  # rows, gates and columns of the caller's array
    GATES,
    COLUMNS,
    PITCH,  # columns in the flat array
    ORDER,  # which gate of the caller's array stands at each place, four bits per place
    LOWEST_BITS,  # range of the values, as bits of float32
    HIGHEST_BITS,
    VALUES,  # address of the caller's array
    KEPT,  # address of bytes of the same shape, 0 where a weight is pruned; or 0
    GRADIENT,  # address of the caller's gradient, or 0
    SEGMENT_FIELDS,
) = range(12)

BITS_PER_PLACE = 4

INFINITE32, NAN32 = float32("inf"), float32("nan")


def rows_kernel(precision: str):
    """The kernel that copies a strided array (T, B, n) float32 into rows of operands, and its signature.

    Strides count float32. out_at : (T * B, pitch) operands; columns beyond n are left as they are
    """
    store, size = STORES[precision], BYTES[precision]

    def rows(source_at, step_stride, sample_stride, column_stride, columns, batch, count, out_at, pitch):
        source, at, step = global_float32(source_at), first_element(), stride()
        while at < count * columns:
            row = at // columns
            column = at - row * columns
            time = row // batch
            sample = row - time * batch
            value = source[time * step_stride + sample * sample_stride + column * column_stride]
            store(out_at + size * (row * pitch + column), value)
            at += step

    return rows, types.void(*[types.int64] * 9)


@device_function
def place_of(segments, segment, i):
    """Where element i of the flat array lies in the caller's array of its segment; -1 for padding."""
    field = segment * SEGMENT_FIELDS
    gates, columns, pitch = segments[field + GATES], segments[field + COLUMNS], segments[field + PITCH]
    local = i - segments[field + FIRST]
    row = local // (gates * pitch)
    local -= row * gates * pitch
    place = local // pitch
    column = local - place * pitch
    if row >= segments[field + ROWS] or column >= columns:
        return int64(-1)
    gate = (segments[field + ORDER] >> (BITS_PER_PLACE * place)) & 15
    return (row * gates + gate) * columns + column


def take_kernel(precision: str):
    """The kernel that takes the caller's parameters into the flat array, and its signature.

    Pruned weights become zero and values outside their range the nearest within, in the caller's arrays, too.
    values_at   : (size,) float32
    operands_at : (size,) operands, or address 0
    """
    store, size = STORES[precision], BYTES[precision]

    def take(values_at, operands_at, chunks_at, segments_at):
        segments, chunks, values = global_int64(segments_at), global_int64(chunks_at), global_float32(values_at)
        chunk = 3 * int64(cuda.blockIdx.x)
        segment, i, end = chunks[chunk], chunks[chunk + 1] + int64(cuda.threadIdx.x), chunks[chunk + 2]
        field = segment * SEGMENT_FIELDS
        source, kept_at = global_float32(segments[field + VALUES]), segments[field + KEPT]
        low, high = float_of(segments[field + LOWEST_BITS]), float_of(segments[field + HIGHEST_BITS])
        while i < end:
            place = place_of(segments, segment, i)
            if place >= 0:
                given = source[place]
                value = given
                if kept_at != 0 and global_uint8(kept_at)[place] == 0:
                    value = ZERO32
                if value < low:
                    value = low
                if value > high:
                    value = high
                if value != given:
                    source[place] = value
                values[i] = value
                if operands_at != 0:
                    store(operands_at + size * i, value)
            i += int64(cuda.blockDim.x)

    return take, types.void(*[types.int64] * 4)


def give_kernel():
    """The kernel that writes gradients (size,) float32 to the caller's arrays, and its signature. Those of pruned
    weights are zero."""

    def give(gradients_at, chunks_at, segments_at):
        segments, chunks = global_int64(segments_at), global_int64(chunks_at)
        chunk, gradients = 3 * int64(cuda.blockIdx.x), global_float32(gradients_at)
        segment, i, end = chunks[chunk], chunks[chunk + 1] + int64(cuda.threadIdx.x), chunks[chunk + 2]
        field = segment * SEGMENT_FIELDS
        out_at, kept_at = segments[field + GRADIENT], segments[field + KEPT]
        if out_at == 0:
            return
        out = global_float32(out_at)
        while i < end:
            place = place_of(segments, segment, i)
            if place >= 0:
                value = gradients[i]
                if kept_at != 0 and global_uint8(kept_at)[place] == 0:
                    value = ZERO32
                out[place] = value
            i += int64(cuda.blockDim.x)

    return give, types.void(*[types.int64] * 3)


def last_state_kernel():
    """The kernel of the state of each sample after its own last step, and its signature.

    cells_at, sent_at : (T, B, padded) float32, cells before the event, and what is sent above the threshold
    kept              : whether the cell stays as it is when the unit sends
    ends_at           : (B,) int64 numbers of steps, or address 0 where all samples have `steps`
    to_cells_at, to_outputs_at : (B, units) float32
    output_at         : (steps, B, units) float32, the output of the top layer; NaN is written at the last step of a
                        unit whose cell is not finite. Such a unit sends nothing, and nothing else would show it
    """

    def last_state(
        cells_at,
        sent_at,
        threshold_at,
        kept,
        ends_at,
        steps,
        units,
        padded,
        batch,
        to_cells_at,
        to_outputs_at,
        output_at,
    ):
        cells, values, thresholds = global_float32(cells_at), global_float32(sent_at), global_float32(threshold_at)
        to_cells, to_outputs = global_float32(to_cells_at), global_float32(to_outputs_at)
        output = global_float32(output_at)
        at, step = first_element(), stride()
        while at < units * batch:
            sample = at // units
            unit = at - sample * units
            last = steps - 1
            if ends_at != 0:
                last = global_int64(ends_at)[sample] - 1
            i = (last * batch + sample) * padded + unit
            threshold = thresholds[unit]
            cell = cell_after(cells[i], threshold, kept != 0)
            to_cells[at] = cell
            if not abs(cell) < INFINITE32:
                output[(last * batch + sample) * units + unit] = NAN32
            to_outputs[at] = sent(values[i], threshold)
            at += step

    return last_state, types.void(*[types.int64] * 12)
