"""Products of independent rows with gated blocks, for all steps of a run: input drives of a layer, and read-out.

gated_rows : a block owns every `groups`-th set of `samples` rows of inputs, which share the weights they read, and
             every `splits`-th set of strips; it computes all gates of its rows. A warp owns a strip at a time.

See `gated_blocks.py` and `gated_choice.py` for products and gates. `gated_loop.py` is the time loop of a layer; it
shares the device functions of factors. Tables: `tables.GATED_FIELDS` describes a matrix, `tables.PLACE_FIELDS` shared
memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import int32, int64, types

from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.gated_blocks import make_add_strip
from eventrnn.cuda.kernels.gated_choice import FACTOR, MAGNITUDE, choose, clear_counts, is_too_large
from eventrnn.cuda.kernels.gated_strips import Received, StripRows, sum_of_sample
from eventrnn.cuda.kernels.persistent import Lane
from eventrnn.cuda.kernels.ptx import (
    global_float32,
    global_int32,
    global_int64,
    max_of_warp,
    max_relaxed,
    shared_base,
    shared_float32,
    shared_int32,
    shared_int64,
)
from eventrnn.cuda.kernels.strip_product import high_word, low_word
from eventrnn.cuda.tables import LANES, ROWS_STAGE_BYTES, STAGES, TAIL_BYTES


@device_function
def magnitude_bits(value):
    """The bits of the magnitude of a float32, an int32 that is in the same order."""
    return int32(libdevice.float_as_int(value) & MAGNITUDE)


@device_function
def strip_of_factor(values_at, offsets_at, width, stage, rows, columns, strip, lane, resident, resident_at):
    """A strip of a factor of a gate; offsets_at is the address of its offset in shared memory.

    resident, resident_at : 1 if its weights stay in shared memory, and their address there
    """
    none, mine = int32(0), lane < width and int32(strip * width + lane) < columns
    return StripRows(
        values_at,
        shared_int64(offsets_at),
        width,
        stage,
        rows,
        int32(1),
        rows,
        none,
        none,
        none,
        none,
        mine,
        resident,
        resident_at,
    )


@device_function
def start_of_factor(factor, strip, bias_at, lane):
    """What the column of this lane starts from: bias (columns,) float32."""
    start = np.float32(0)
    if factor.mine:
        start = global_float32(bias_at)[int32(strip * factor.width + lane)]
    return start


@device_function
def set_ones(ones_at, thread):
    """The gate and the activity of a factor, whose rows are all multiplied."""
    if thread == 0:
        shared_float32(ones_at)[0] = np.float32(1)
        shared_int32(ones_at + int64(4))[0] = int32(1)


@device_function
def write_zeros(numbers, count, thread, threads):
    """The threads of a block write `count` zeros."""
    k = thread
    while k < count:
        numbers[k] = 0
        k = int32(k + threads)


@device_function
def any_chooses(held, samples):
    """1 if some sample has no further step with the gates that it holds. held : (samples, 2) int32"""
    fresh, sample = int32(0), int32(0)
    while sample < samples:
        if held[int32(2 * sample)] == 0:
            fresh = int32(1)
        sample = int32(sample + 1)
    return fresh


@device_function
def keep_offsets(offsets, to, source_at, first, step, count, thread, threads):
    """The threads of a block write every `step`-th offset of a table from `first` on to offsets[to:to + count]."""
    k = thread
    while k < count:
        offsets[int32(to + k)] = global_int64(source_at)[first + k * step]
        k = int32(k + threads)


@device_function
def report(status_at, number):
    """Report that gates of the matrix of this number are not finite."""
    max_relaxed(status_at + int64(8 * tables.STATUS_GATES), int64(tables.LAST) - number)


@device_function
def row_that_chose(row, batch, period, left):
    """The row (step * batch + sample) whose choice a row has; negative for a choice before the run.

    left : the first steps of the sample that have this choice
    """
    source = row
    if period > 1:
        step = row // batch
        source = row - ((step - left) % period) * batch
        if step < left:
            source = int64(-1)
    return source


class RowLists(NamedTuple):
    """The events of the rows; all int64, most of them addresses (`gated_rows_kernel`)."""

    lists_at: Any
    begins_at: Any
    counts_at: Any
    row_of_at: Any
    batch: Any
    left_before_at: Any


class SharedRows(NamedTuple):
    """Where rows of inputs lie in shared memory (`gated_blocks.py`)."""

    #: int64, addresses of `inputs`, `active` and `maxima`
    inputs_at: Any
    active_at: Any
    maxima_at: Any
    #: int32, numbers from one row to the next
    input_pitch: Any
    active_pitch: Any
    #: int32, rows of a block, and rows of zeros behind them
    rows_of_block: Any
    padding: Any


@device_function
def load_rows(rows, shared, first, own, period, me):
    """Write the inputs of the rows that chose for `own` rows from `first` on, and their largest magnitudes.

    period : 1 for the rows themselves. A row that has a choice from before the run gets zeros
    All threads must call it; it synchronises the block before and after.
    """
    lane, warp, warps = me
    thread, threads = int32(warp * LANES + lane), int32(warps * LANES)
    cuda.syncthreads()
    inputs, active = shared_float32(shared.inputs_at), shared_int32(shared.active_at)
    write_zeros(inputs, own * shared.input_pitch, thread, threads)
    write_zeros(active, own * shared.active_pitch, thread, threads)
    cuda.syncthreads()
    sample = int32(0)
    while sample < own:
        left, best = int64(0), int32(0)
        if period > 1:
            left = int64(global_int32(rows.left_before_at)[(first + sample) % rows.batch])
        source = row_that_chose(first + sample, rows.batch, period, left)
        if source >= 0:
            if rows.row_of_at != 0:
                source = global_int64(rows.row_of_at)[source]
            entries = global_int64(rows.lists_at + 8 * global_int64(rows.begins_at)[source])
            count, k = global_int32(rows.counts_at)[source], thread
            while k < count:
                unit, value = low_word(entries[k]), libdevice.int_as_float(high_word(entries[k]))
                block_row = int32(unit // shared.rows_of_block)
                inputs[int32(sample * shared.input_pitch + unit + block_row * shared.padding)] = value
                active[int32(sample * shared.active_pitch + block_row)] = int32(1)
                best = int32(max(best, magnitude_bits(value)))
                k = int32(k + threads)
        best = max_of_warp(best)
        if lane == 0:
            shared_int32(shared.maxima_at)[int32(sample * LANES + warp)] = best
        sample = int32(sample + 1)
    cuda.syncthreads()


def gated_rows_kernel(narrow: bool):
    """The kernel out[row] = bias + product of the row with gated blocks, and its signature.

    matrix_at, place_at            : the tables of the matrix and of shared memory
    begins_at, counts_at, lists_at : the event list set (`batched_products.py`)
    row_of_at                      : (rows,) int64, the list of each row, or address 0 for the list of the same number
    samples, splits                : rows of a block at a time, and blocks that share the strips of a row
    out_at                         : (rows, columns) float32
    batch                          : rows of a step, where steps share a choice
    before_at, left_before_at      : the gates before the run and their further steps; 0 where every step chooses
    held_at, left_at               : the same after the run
    """
    add_strip, _, _, _ = make_add_strip(narrow, ROWS_STAGE_BYTES)
    _, begin_strip, end_factor, _ = make_add_strip(False, ROWS_STAGE_BYTES)
    sums_offset = STAGES * ROWS_STAGE_BYTES
    ring_bytes = sums_offset + TAIL_BYTES

    def gated_rows(
        matrix_at,
        place_at,
        begins_at,
        counts_at,
        lists_at,
        row_of_at,
        rows,
        samples,
        splits,
        out_at,
        status_at,
        batch,
        before_at,
        left_before_at,
        held_at,
        left_at,
    ):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        me = Lane(lane, warp, warps)
        m, place, shared = global_int64(matrix_at), global_int64(place_at), shared_base()
        n_rows, columns, blocks = int32(m[tables.PADDED_PRE]), int32(m[tables.N_POST]), int32(m[tables.ALL_BLOCKS])
        r, c, padded = int32(m[tables.ROWS_OF_BLOCK]), int32(m[tables.COLUMNS_OF_BLOCK]), int32(m[tables.PADDED_ROWS])
        grid_rows, grid_columns = int32(m[tables.GRID_ROWS]), int32(m[tables.GRID_COLUMNS])
        width, stage = int32(m[tables.BLOCK_WIDTH]), int32(m[tables.BLOCK_STAGE])
        rank, number, period = int32(m[tables.RANK]), m[tables.NUMBER], m[tables.PERIOD]
        inputs_at, active_at = shared + place[tables.AT_INPUTS], shared + place[tables.AT_ACTIVE]
        inner_at, gates_at = shared + place[tables.AT_INNER], shared + place[tables.AT_GATES]
        inner, gates = shared_float32(inner_at), shared_float32(gates_at)
        input_pitch, active_pitch = int32(place[tables.INPUT_PITCH_OF]), int32(place[tables.ACTIVE_PITCH])
        inner_pitch, gates_pitch = int32(place[tables.INNER_PITCH]), int32(place[tables.GATES_PITCH])
        keys, ratios_at = shared_int32(shared + place[tables.AT_KEYS]), shared + place[tables.AT_RATIOS]
        words_at, maxima_at = shared + place[tables.AT_WORDS], shared + place[tables.AT_MAXIMA]
        words = shared_int32(words_at)
        ring_at, workers = shared + place[tables.AT_RINGS] + int64(ring_bytes) * warp, int32(place[tables.WORKERS])
        ones_at, offsets_at = shared + place[tables.AT_ONES], shared + place[tables.AT_OFFSETS]
        set_ones(ones_at, thread)
        clear_counts(words_at, me)
        write_zeros(inner, samples * inner_pitch, thread, threads)
        # Offsets of the strips of logits, then of the first of two factors.
        offsets, logit_strips, inner_strips = (
            shared_int64(offsets_at),
            int32(m[tables.LOGIT_STRIPS]),
            int32(m[tables.INNER_STRIPS]),
        )
        first, one = int64(0), int64(1)
        keep_offsets(offsets, int32(0), m[tables.LOGIT_OFFSETS], first, one, logit_strips, thread, threads)
        keep_offsets(offsets, logit_strips, m[tables.INNER_OFFSETS], first, one, inner_strips, thread, threads)
        largest_gates = shared_int32(shared + place[tables.AT_HELD])
        group = cuda.blockIdx.x // splits
        split, groups = cuda.blockIdx.x - group * splits, cuda.gridDim.x // splits
        sums = shared_float32(ring_at + int64(sums_offset))
        row = int64(group) * samples
        while row < rows:
            own, none = int32(min(samples, rows - row)), int32(0)
            rows_of = RowLists(lists_at, begins_at, counts_at, row_of_at, batch, left_before_at)
            shared_rows = SharedRows(inputs_at, active_at, maxima_at, input_pitch, active_pitch, r, int32(padded - r))
            load_rows(rows_of, shared_rows, row, own, period, me)
            source_at, source_pitch, n_source = inputs_at, input_pitch, n_rows
            part_rows = int32(m[tables.PART_ROWS])
            if rank > 0:
                for_inner = Received(own, inputs_at, ones_at + int64(4), ones_at, input_pitch, none, none)
                strip = warp
                while warp < workers and strip < inner_strips:
                    at = offsets_at + int64(8) * (logit_strips + strip)
                    inner_width, inner_stage = int32(m[tables.INNER_WIDTH]), int32(m[tables.INNER_STAGE])
                    factor = strip_of_factor(
                        *(m[tables.INNER_VALUES], at, inner_width, inner_stage, n_rows, rank, strip, lane),
                        *(none, int64(0)),
                    )
                    begin_strip(factor, for_inner, ring_at, lane)
                    acc = end_factor(np.float32(0), factor, part_rows, for_inner, ring_at, lane)
                    column = int32(strip * inner_width + lane)
                    if lane < inner_width and column < rank:
                        sample = int32(0)
                        while sample < own:
                            inner[int32(sample * inner_pitch + column)] = sum_of_sample(acc, sums, own, sample, lane)
                            sample = int32(sample + 1)
                    strip = int32(strip + workers)
                cuda.syncthreads()
                source_at, source_pitch, n_source, part_rows = inner_at, inner_pitch, inner_pitch, inner_pitch
            for_logits = Received(own, source_at, ones_at + int64(4), ones_at, source_pitch, none, none)
            strip = warp
            while warp < workers and strip < logit_strips:
                logit_width, logit_stage = int32(m[tables.LOGIT_WIDTH]), int32(m[tables.LOGIT_STAGE])
                at = offsets_at + int64(8) * strip
                factor = strip_of_factor(
                    *(m[tables.LOGIT_VALUES], at, logit_width, logit_stage, n_source, blocks, strip, lane),
                    *(none, int64(0)),
                )
                begin_strip(factor, for_logits, ring_at, lane)
                start = start_of_factor(factor, strip, m[tables.LOGIT_BIAS], lane)
                acc = end_factor(start, factor, part_rows, for_logits, ring_at, lane)
                column = int32(strip * logit_width + lane)
                if lane < logit_width and column < blocks:
                    sample = int32(0)
                    while sample < own:
                        gates[int32(sample * gates_pitch + column)] = sum_of_sample(acc, sums, own, sample, lane)
                        sample = int32(sample + 1)
                strip = int32(strip + workers)
            cuda.syncthreads()
            sample = int32(0)
            while sample < own:
                left, largest, own_gates = int64(0), int32(0), int32(sample * gates_pitch)
                if period > 1:
                    left = int64(global_int32(left_before_at)[(row + sample) % batch])
                if row_that_chose(row + sample, batch, period, left) >= 0:
                    bad = choose(
                        *(shared_float32(gates_at + int64(4) * own_gates), keys, ratios_at, words_at),
                        *(shared_int32(maxima_at + int64(4 * LANES) * sample), blocks),
                        *(int32(m[tables.KEPT_BLOCKS]), int32(m[tables.SOFTMAX]), me),
                    )
                    if bad and thread == 0:
                        report(status_at, number)
                    largest = words[FACTOR]
                else:
                    # Every warp finds the largest gate.
                    k = lane
                    while k < blocks:
                        value = global_float32(before_at)[((row + sample) % batch) * blocks + k]
                        gates[int32(own_gates + k)] = value
                        largest = int32(max(largest, magnitude_bits(value)))
                        k = int32(k + LANES)
                    largest = max_of_warp(largest)
                if thread == 0:
                    largest_gates[sample] = largest
                sample = int32(sample + 1)
            cuda.syncthreads()
            if period > 1:
                # The rows themselves.
                load_rows(rows_of, shared_rows, row, own, int64(1), me)
                sample = int32(0)
                while sample < own:
                    bad = is_too_large(largest_gates[sample], shared_int32(maxima_at + int64(4 * LANES) * sample), me)
                    if bad and thread == 0:
                        report(status_at, number)
                    if split == 0 and row + sample >= rows - batch:
                        # The last step of a sample.
                        stream, step = (row + sample) % batch, (row + sample) // batch
                        k = thread
                        while k < blocks:
                            value = gates[int32(sample * gates_pitch + k)]
                            global_float32(held_at)[stream * blocks + k] = value
                            k = int32(k + threads)
                        if thread == 0:
                            left = int64(global_int32(left_before_at)[stream])
                            further = left - step - 1
                            if step >= left:
                                further = period - 1 - (step - left) % period
                            global_int32(left_at)[stream] = int32(further)
                    sample = int32(sample + 1)
            for_blocks = Received(own, inputs_at, active_at, gates_at, input_pitch, active_pitch, gates_pitch)
            block_strip = split * workers + warp
            while warp < workers and block_strip < m[tables.BLOCK_STRIPS]:
                column, start = int32(block_strip * width + lane), np.float32(0)
                mine = lane < width and column < columns
                if mine:
                    start = global_float32(m[tables.BIAS])[column]
                last = int32(min(block_strip * width + width, columns) - 1)
                strip_offsets = global_int64(m[tables.BLOCK_OFFSETS] + 8 * (block_strip * grid_rows))
                strip_rows = StripRows(
                    m[tables.BLOCK_VALUES],
                    strip_offsets,
                    width,
                    stage,
                    n_rows,
                    grid_rows,
                    padded,
                    grid_columns,
                    int32(int32(block_strip * width) // c),
                    int32(last // c),
                    int32(column // c),
                    mine,
                    none,
                    int64(0),
                )
                acc = add_strip(start, strip_rows, for_blocks, ring_at, lane)
                if mine:
                    sample = int32(0)
                    while sample < own:
                        out = global_float32(out_at + 4 * ((row + sample) * columns))
                        out[column] = sum_of_sample(acc, sums, own, sample, lane)
                        sample = int32(sample + 1)
                block_strip += splits * workers
            cuda.syncthreads()
            row += groups * samples

    return gated_rows, types.void(*[types.int64] * 16)
