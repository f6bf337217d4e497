"""The time loop of a layer whose recurrent matrix has gated blocks. See `gated_blocks.py` and `gated_choice.py`.

gated_layer : one persistent kernel for all steps of a layer. All blocks are resident at the same time (cooperative
              launch). As in `persistent.py`, outputs travel through an event log whose words are polled until they are
              written; the logits of a step travel through a log of their own. A block owns `tiles` neighbouring tiles
              of units and some strips of logits, for `samples` samples. It chooses for itself, so that gates are not
              exchanged.

The steps, with a block barrier after each: wait for the outputs of the step before; compute the own logits and send
them; wait for all logits; choose; multiply the chosen blocks of the own tiles; update cells, and send outputs. Each
step equals `reference.step`. As many block rows of the own strips as have room are copied to shared memory before the
first step.

Tables: `tables.GATED_FIELDS` describes a matrix, `tables.PLACE_FIELDS` shared memory, `tables.ROW_FIELDS` a layer. A
layer that is measured has stamps, (steps, blocks, STAMPS) int64: the clock of the multiprocessor at the begin of a step
and after each phase of `tables.PHASES`, as the first thread of a block reads it.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64, types

from eventrnn.cells import EQUATIONS
from eventrnn.cuda import tables
from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.cell_updates import UPDATES
from eventrnn.cuda.kernels.gated_blocks import make_add_strip
from eventrnn.cuda.kernels.gated_choice import (
    FACTOR,
    choose,
    choose_places,
    clear_counts,
    factor_of,
    find_factor,
    is_too_large,
    write_gates,
)
from eventrnn.cuda.kernels.gated_factors import (
    copy_factor,
    load_out,
    make_add_parts,
    place_of_logit,
    sum_of_parts,
    two_logits,
)
from eventrnn.cuda.kernels.gated_inputs import load_row
from eventrnn.cuda.kernels.gated_kernels import (
    any_chooses,
    keep_offsets,
    magnitude_bits,
    report,
    set_ones,
    strip_of_factor,
    write_zeros,
)
from eventrnn.cuda.kernels.gated_pieces import make_pieces
from eventrnn.cuda.kernels.gated_strips import OwnStrips, Received, strip_of_item, sum_of_sample
from eventrnn.cuda.kernels.persistent import Lane, next_item, poll_event_log
from eventrnn.cuda.kernels.ptx import (
    clock,
    copy_async,
    copy_async16,
    global_float32,
    global_int32,
    global_int64,
    max_of_warp,
    shared_base,
    shared_float32,
    shared_int32,
    shared_int64,
    store_relaxed,
    wait_for_copies,
    warps_barrier,
)
from eventrnn.cuda.tables import FACTOR_COLUMNS, LANES, LAYER_STAGE_BYTES, RESIDENT_STEPS, SEGMENT, STAGES, TAIL_BYTES


def gated_layer_kernel(
    kind: tuple[str, str], narrow: bool, stamped: bool = False, alone: bool = False, in_pieces: bool = False
):
    """The kernel of a layer with a gated recurrent matrix, and its signature.

    kind      : name and variant of the cell
    stamped   : whether the layer has stamps
    alone     : whether a block, which has one sample, computes all logits by itself (`gated_factors.py`)
    in_pieces : whether every warp after the first of a block, which has one sample, has at most one strip, of which
                `gated_pieces.py` makes the product
    matrix_at, place_at, layer_at : the tables of the matrix, of shared memory and of the layer
    first     : the first sample of the launch
    spread    : blocks of a group of samples; tiles, samples : what a block owns
    """
    (add_strip, _, _, _), update = make_add_strip(narrow, LAYER_STAGE_BYTES), UPDATES[kind]
    prepare_ring, begin_pieces, end_pieces, feed_ring = make_pieces(narrow, LAYER_STAGE_BYTES)
    _, begin_strip, end_factor, add_piece = make_add_strip(False, LAYER_STAGE_BYTES)
    add_parts = make_add_parts(add_piece)
    sums_offset = STAGES * LAYER_STAGE_BYTES
    ring_bytes = sums_offset + TAIL_BYTES
    n_gates, size = len(EQUATIONS[kind[0]][kind[1]].gates), 2 if narrow else 4

    if stamped:

        @device_function
        def stamp(stamps_at, t, number, thread):
            if thread == 0:
                row = (t * cuda.gridDim.x + cuda.blockIdx.x) * tables.STAMPS
                global_int64(stamps_at)[row + number] = clock()
    else:

        @device_function
        def stamp(stamps_at, t, number, thread):
            return

    def gated_layer(matrix_at, place_at, layer_at, status_at, steps, batch, first, spread, tiles, samples):
        thread, threads = int32(cuda.threadIdx.x), int32(cuda.blockDim.x)
        lane, warp, warps = thread & int32(31), thread >> int32(5), threads >> int32(5)
        me = Lane(lane, warp, warps)
        m, place, layer = global_int64(matrix_at), global_int64(place_at), global_int64(layer_at)
        shared = shared_base()
        group = int64(cuda.blockIdx.x) // spread
        part, first_sample = int64(cuda.blockIdx.x) - group * spread, first + group * samples
        own_samples, n = int32(1), int32(layer[tables.ROW_UNITS])
        if not alone and not in_pieces:
            own_samples = int32(min(samples, batch - first_sample))
        width, stage = int32(m[tables.BLOCK_WIDTH]), int32(m[tables.BLOCK_STAGE])
        first_tile = part * tiles
        own_tiles = int32(min(tiles, m[tables.BLOCK_STRIPS] // n_gates - first_tile))
        blocks, kept, softmax = int32(m[tables.ALL_BLOCKS]), int32(m[tables.KEPT_BLOCKS]), int32(m[tables.SOFTMAX])
        r, c, padded = int32(m[tables.ROWS_OF_BLOCK]), int32(m[tables.COLUMNS_OF_BLOCK]), int32(m[tables.PADDED_ROWS])
        n_rows = int32(m[tables.PADDED_PRE])
        grid_rows, grid_columns = int32(m[tables.GRID_ROWS]), int32(m[tables.GRID_COLUMNS])
        rank, inner_strips = int32(m[tables.RANK]), int32(m[tables.INNER_STRIPS])
        logit_width, logit_stage = int32(m[tables.LOGIT_WIDTH]), int32(m[tables.LOGIT_STAGE])
        block_values, bias_at = m[tables.BLOCK_VALUES], m[tables.BIAS]
        logit_values, logit_bias = m[tables.LOGIT_VALUES], m[tables.LOGIT_BIAS]
        own_logits = int32(0)
        if part < m[tables.LOGIT_STRIPS]:
            own_logits = int32((m[tables.LOGIT_STRIPS] - part + spread - 1) // spread)
        log_at, drive_at, states_at = layer[tables.ROW_LOG], layer[tables.ROW_DRIVE], layer[tables.ROW_STATES]
        row_bytes, logits_at = 4 * layer[tables.ROW_PITCH], layer[tables.ROW_LOGITS]
        logit_row_bytes, stamps_at = 4 * layer[tables.ROW_LOGIT_PITCH], layer[tables.ROW_STAMPS]
        thresholds = global_float32(layer[tables.ROW_THRESHOLDS])
        inputs_at, active_at = shared + place[tables.AT_INPUTS], shared + place[tables.AT_ACTIVE]
        inner_at, gates_at = shared + place[tables.AT_INNER], shared + place[tables.AT_GATES]
        keys, ratios_at = shared_int32(shared + place[tables.AT_KEYS]), shared + place[tables.AT_RATIOS]
        words_at, maxima_at = shared + place[tables.AT_WORDS], shared + place[tables.AT_MAXIMA]
        words = shared_int32(words_at)
        rings_at, workers = shared + place[tables.AT_RINGS], int32(place[tables.WORKERS])
        ring_at = rings_at + int64(ring_bytes) * warp
        ones_at = shared + place[tables.AT_ONES]
        drives_in_at, offsets_at = shared + place[tables.AT_DRIVES_IN], shared + place[tables.AT_OFFSETS]
        drives_in, drives_rec = (
            shared_float32(drives_in_at),
            shared_float32(shared + place[tables.AT_DRIVES_REC]),
        )
        state = shared_float32(shared + place[tables.AT_STATE])
        input_pitch, active_pitch = int32(place[tables.INPUT_PITCH_OF]), int32(place[tables.ACTIVE_PITCH])
        inner_pitch, gates_pitch = int32(place[tables.INNER_PITCH]), int32(place[tables.GATES_PITCH])
        inputs, active = shared_float32(inputs_at), shared_int32(active_at)
        gates, inner = shared_float32(gates_at), shared_float32(inner_at)
        sums, none = shared_float32(ring_at + int64(sums_offset)), int32(0)
        # Block rows of the own strips that stay in shared memory, if there are enough steps to read them again.
        resident, resident_at = int32(place[tables.RESIDENT_ROWS]), shared + place[tables.AT_RESIDENT]
        logits_resident, resident_logits_at = int32(place[tables.LOGITS_RESIDENT]), shared + place[tables.AT_LOGITS]
        if steps < RESIDENT_STEPS:
            resident = logits_resident = int32(0)
        logit_bytes = int64(4 * n_rows * logit_width)
        # Steps that share a choice, and where the gates and their further steps are kept between runs.
        period, held_at, left_at = int32(m[tables.PERIOD]), layer[tables.ROW_HELD_BEFORE], layer[tables.ROW_LEFT_BEFORE]
        units, held = shared_int32(shared + place[tables.AT_TILES]), shared_int32(shared + place[tables.AT_HELD])
        starts_at, own_items = shared + place[tables.AT_STARTS], int64(own_tiles * n_gates)
        starts, columns = shared_float32(starts_at), shared_int32(starts_at + 4 * LANES * own_items)
        logit_starts = shared_float32(shared + place[tables.AT_LOGIT_STARTS])
        block_bytes = int64(size * padded * width)

        set_ones(ones_at, thread)
        clear_counts(words_at, me)
        # In pieces every warp after the first has at most one strip, with a ring; the next place of it, and its parity.
        item, slot, parity, own_ring_at = int32(warp - 1), none, none, rings_at + int64(ring_bytes) * int32(warp - 1)
        has_pieces = in_pieces and warp > 0 and item < own_tiles * n_gates
        if has_pieces:
            prepare_ring(own_ring_at, lane)
        # Offsets of the own strips of weights, of the own strips of logits, and of the first of two factors.
        offsets, own_rows = shared_int64(offsets_at), int32(own_tiles * n_gates * grid_rows)
        own_offsets, own_begin, one = int32(own_rows + own_logits), first_tile * n_gates * grid_rows, int64(1)
        keep_offsets(offsets, none, m[tables.BLOCK_OFFSETS], own_begin, one, own_rows, thread, threads)
        keep_offsets(offsets, own_rows, m[tables.LOGIT_OFFSETS], part, spread, own_logits, thread, threads)
        keep_offsets(offsets, own_offsets, m[tables.INNER_OFFSETS], int64(0), one, inner_strips, thread, threads)
        # Padding stays zero.
        write_zeros(active, own_samples * active_pitch, thread, threads)
        write_zeros(inputs, own_samples * input_pitch, thread, threads)
        write_zeros(inner, own_samples * inner_pitch, thread, threads)
        # The units of the own tiles, and biases and block columns of their strips.
        span, k = int32(m[tables.BLOCK_SPAN]), thread
        span_tiles = int32((span + width - 1) // width)
        while k < own_tiles:
            of_span = int32((first_tile + k) // span_tiles)
            inside = int32((first_tile + k - of_span * span_tiles) * width)
            units[int32(2 * k)], units[int32(2 * k + 1)] = (
                int32(of_span * span + inside),
                int32(min(width, span - inside)),
            )
            k = int32(k + threads)
        cuda.syncthreads()
        item, tile, gate = warp, int32(0), warp
        while True:
            tile, gate = next_item(tile, gate, n_gates)
            if tile >= own_tiles:
                break
            column, own = int32(gate * n + units[int32(2 * tile)] + lane), int32(item * LANES + lane)
            if lane < units[int32(2 * tile + 1)]:
                starts[own], columns[own] = global_float32(bias_at)[column], int32(column // c)
            else:
                # A lane without a column computes nothing that is used.
                starts[own], columns[own] = np.float32(0), int32(0)
            gate, item = int32(gate + warps), int32(item + warps)
        item = warp
        while item < own_logits:
            column, own = int32((part + item * spread) * logit_width + lane), int32(item * LANES + lane)
            logit_starts[own] = np.float32(0)
            if lane < logit_width and column < blocks:
                logit_starts[own] = global_float32(logit_bias)[column]
            item = int32(item + warps)
        # Gates that the samples hold.
        sample = int32(0)
        while sample < own_samples:
            further, largest = int32(0), int32(0)
            if period == 0:
                further = int32(steps)
            if held_at != 0:
                further = global_int32(left_at)[first_sample + sample]
            # Every warp finds the largest one.
            k = lane
            while k < blocks:
                value = np.float32(1)
                if held_at != 0:
                    value = global_float32(held_at)[(first_sample + sample) * blocks + k]
                largest = int32(max(largest, magnitude_bits(value)))
                gates[int32(sample * gates_pitch + k)] = value
                k = int32(k + LANES)
            largest = max_of_warp(largest)
            if thread == 0:
                held[int32(2 * sample)], held[int32(2 * sample + 1)] = further, largest
            sample = int32(sample + 1)
        item = int32(0)
        while logits_resident > 0 and item < own_logits:
            source_of = logit_values + int64(4) * offsets[int32(own_rows + item)]
            target, piece = resident_logits_at + logit_bytes * item, int64(thread)
            while piece < logit_bytes >> 4:
                copy_async16(target + 16 * piece, source_of + 16 * piece)
                piece += threads
            item = int32(item + 1)
        item, block_row = int32(0), warp
        while resident > 0:
            item, block_row = next_item(item, block_row, resident)
            if item >= own_tiles * n_gates:
                break
            offset = offsets[int32(item * grid_rows + block_row)]
            if offset >= 0:
                here = int32(min(padded, n_rows - block_row * padded))
                target, piece = resident_at + block_bytes * int32(item * resident + block_row), int64(lane)
                while piece < (size * here * width) >> 4:
                    copy_async16(target + 16 * piece, block_values + size * offset + 16 * piece)
                    piece += LANES
            block_row = int32(block_row + warps)
        if alone:
            copy_factor(resident_logits_at, m[tables.INNER_VALUES], n_rows, thread, threads)
        wait_for_copies()
        cells, sample, tile, item = global_float32(layer[tables.ROW_CELLS]), int32(0), warp, warp
        while True:
            sample, tile = next_item(sample, tile, own_tiles)
            if sample >= own_samples:
                break
            unit = int32(units[int32(2 * tile)] + lane)
            if lane < units[int32(2 * tile + 1)]:
                state[item * LANES + lane] = cells[(first_sample + sample) * n + unit]
            tile, item = int32(tile + warps), int32(item + warps)
        cuda.syncthreads()

        # Inputs of the factor that gives the logits.
        source_at, source_pitch, n_source, part_rows = inputs_at, input_pitch, n_rows, int32(m[tables.PART_ROWS])
        parts, parts_at, logit_part = int32(place[tables.PARTS]), shared + place[tables.AT_PARTS], part_rows
        if rank > 0:
            source_at, source_pitch, n_source, logit_part = inner_at, inner_pitch, inner_pitch, inner_pitch
        for_inner = Received(own_samples, inputs_at, ones_at + int64(4), ones_at, input_pitch, none, none)
        for_logits = Received(own_samples, source_at, ones_at + int64(4), ones_at, source_pitch, none, none)
        for_blocks = Received(own_samples, inputs_at, active_at, gates_at, input_pitch, active_pitch, gates_pitch)
        own_strips = OwnStrips(
            *(block_values, offsets_at, width, stage, n_rows, grid_rows, padded, grid_columns, columns),
            *(resident, resident_at, block_bytes),
        )
        # The part of an own logit that a thread computes first. A matrix without blocks has no logits.
        of_strip = int32(max(1, parts * logit_width))
        first_strip = int32(thread // of_strip)
        first_part = int32(int32(thread - first_strip * of_strip) // logit_width)
        if alone:
            # Parts of a segment, and the two logits of the thread.
            shift = int32(cuda.ffs(int32(SEGMENT // part_rows)) - 1)
            start, out_at = place_of_logit(m, thread)
            other_start, other_out_at = place_of_logit(m, int32(thread + threads))
        t = int64(0)
        while t < steps:
            stamp(stamps_at, t, 0, thread)
            row = t * batch + first_sample
            sample, tile, gate, item = int32(0), int32(0), warp, warp
            while True:
                tile, gate = next_item(tile, gate, n_gates)
                sample, tile = next_item(sample, tile, own_tiles)
                if sample >= own_samples:
                    break
                unit = int32(units[int32(2 * tile)] + lane)
                if lane < units[int32(2 * tile + 1)]:
                    copy_async(
                        drives_in_at + int64(4) * (item * LANES + lane),
                        drive_at + int64(4) * ((row + sample) * (n_gates * n) + gate * n + unit),
                    )
                gate, item = int32(gate + warps), int32(item + warps)

            # Whether a sample chooses in this step.
            fresh = any_chooses(held, own_samples)
            # Weights of the first own logits are copied while outputs of the step before arrive.
            if not alone and fresh != 0 and logits_resident == 0 and rank == 0 and warp < workers and warp < own_logits:
                strip, at = int32(part + warp * spread), offsets_at + int64(8) * (own_rows + warp)
                factor = strip_of_factor(
                    *(logit_values, at, logit_width, logit_stage, n_source, blocks, strip, lane),
                    *(logits_resident, resident_logits_at),
                )
                begin_strip(factor, for_logits, ring_at, lane)

            # Outputs of the step before.
            missing, sample = int32(0), int32(0)
            if alone:
                w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, wa, wb, wc, wd, we, wf = load_out(out_at, logit_width)
                v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, va, vb, vc, vd, ve, vf = load_out(other_out_at, logit_width)
                sample = own_samples
                missing = load_row(
                    log_at + row * row_bytes, n, r, int32(padded - r), inputs, active, shared_int32(maxima_at), me
                )
                # Both warps of a pair have written inputs.
                warps_barrier(int32(int32(warp >> int32(1)) + 1), int32(2 * LANES))
                if fresh != 0 and (warp & int32(1)) == 0:
                    add_parts(inputs_at, resident_logits_at, parts_at, part_rows, shift, n_rows, me)
            while sample < own_samples:
                missing |= load_row(
                    log_at + (row + sample) * row_bytes,
                    n,
                    r,
                    int32(padded - r),
                    shared_float32(inputs_at + int64(4) * (sample * input_pitch)),
                    shared_int32(active_at + int64(4) * (sample * active_pitch)),
                    shared_int32(maxima_at + int64(4 * LANES) * sample),
                    me,
                )
                sample = int32(sample + 1)
            if cuda.syncthreads_or(missing):
                global_int32(status_at + int64(8 * tables.STATUS_FAULT))[0] = 1
                return

            stamp(stamps_at, t, 1, thread)

            if alone and fresh != 0:
                # All logits of this step.
                value = sum_of_parts(parts_at + int64(4) * (lane & int32(FACTOR_COLUMNS - 1)), parts)
                logit, other_logit = two_logits(
                    *(value, (w0, w1, w2, w3, w4, w5, w6, w7, w8, w9, wa, wb, wc, wd, we, wf)),
                    *((v0, v1, v2, v3, v4, v5, v6, v7, v8, v9, va, vb, vc, vd, ve, vf), start, other_start),
                )
                # The same thread reads them.
                if thread < blocks:
                    gates[thread] = logit
                if thread + threads < blocks:
                    gates[int32(thread + threads)] = other_logit
            if fresh != 0 and not alone:
                # The own logits of this step.
                if rank > 0:
                    # Numbers that only these layers need are read here, so that they occupy no registers elsewhere.
                    inner_values, inner_stage = m[tables.INNER_VALUES], int32(m[tables.INNER_STAGE])
                    strip, inner_width = warp, int32(m[tables.INNER_WIDTH])
                    while warp < workers and strip < inner_strips:
                        at = offsets_at + int64(8) * (own_offsets + strip)
                        factor = strip_of_factor(
                            *(inner_values, at, inner_width, inner_stage, n_rows, rank, strip, lane),
                            *(none, resident_logits_at),
                        )
                        begin_strip(factor, for_inner, ring_at, lane)
                        acc = end_factor(np.float32(0), factor, part_rows, for_inner, ring_at, lane)
                        column = int32(strip * inner_width + lane)
                        if lane < inner_width and column < rank:
                            sample = int32(0)
                            while sample < own_samples:
                                place_of = int32(sample * inner_pitch + column)
                                inner[place_of] = sum_of_sample(acc, sums, own_samples, sample, lane)
                                sample = int32(sample + 1)
                        strip = int32(strip + workers)
                    cuda.syncthreads()
                if logits_resident != 0 and own_samples == 1:
                    # Every thread computes a part of an own logit. Few warps are full, because the rate at which
                    # warps read shared memory limits the sums. A gate of two factors has no resident logits, so that
                    # the terms are the inputs of the matrix.
                    chain = thread
                    while chain < own_logits * of_strip:
                        k, number = first_strip, first_part
                        if chain > thread:
                            k = int32(chain // of_strip)
                            number = int32(int32(chain - k * of_strip) // logit_width)
                        column = int32(chain - int32(k * parts + number) * logit_width)
                        acc, first_row = np.float32(0), int32(number * part_rows)
                        if number == 0:
                            acc = logit_starts[int32(k * LANES + column)]
                        w_at = resident_logits_at + logit_bytes * k + int64(4) * int32(first_row * logit_width)
                        rows = int32(min(part_rows, n_rows - first_row))
                        acc = add_piece(
                            *(acc, w_at + int64(16) * column, inputs_at + int64(4) * first_row, logit_width, rows)
                        )
                        shared_float32(parts_at)[int32(int32(k * parts + number) * LANES + column)] = acc
                        chain = int32(chain + threads)
                    cuda.syncthreads()
                    k = warp
                    while k < own_logits:
                        column = int32(int32(part + k * spread) * logit_width + lane)
                        if lane < logit_width and column < blocks:
                            at = parts_at + int64(4) * int32(k * (parts * LANES) + lane)
                            store_relaxed(
                                logits_at + row * logit_row_bytes + int64(4) * column, sum_of_parts(at, parts)
                            )
                        k = int32(k + warps)
                k = warp
                if logits_resident != 0 and own_samples == 1:
                    k = own_logits
                while warp < workers and k < own_logits:
                    strip, at = int32(part + k * spread), offsets_at + int64(8) * (own_rows + k)
                    factor = strip_of_factor(
                        *(logit_values, at, logit_width, logit_stage, n_source, blocks, strip, lane),
                        *(logits_resident, resident_logits_at + logit_bytes * k),
                    )
                    if logits_resident == 0 and (k != warp or rank > 0):
                        begin_strip(factor, for_logits, ring_at, lane)
                    start = logit_starts[int32(k * LANES + lane)]
                    acc = end_factor(start, factor, logit_part, for_logits, ring_at, lane)
                    column = int32(strip * logit_width + lane)
                    if lane < logit_width and column < blocks:
                        sample = int32(0)
                        while sample < own_samples:
                            logit_at = logits_at + (row + sample) * logit_row_bytes + int64(4) * column
                            store_relaxed(logit_at, sum_of_sample(acc, sums, own_samples, sample, lane))
                            sample = int32(sample + 1)
                    k = int32(k + workers)
            stamp(stamps_at, t, 2, thread)
            if fresh != 0 and not alone:
                # All logits of this step.
                sample = int32(0)
                while sample < own_samples:
                    at, begin = int32(4 * thread), int32(sample * gates_pitch)
                    while held[int32(2 * sample)] == 0 and at < blocks:
                        a, b, e, d, complete = poll_event_log(
                            logits_at + (row + sample) * logit_row_bytes + int64(4) * at, int32(blocks - at)
                        )
                        if not complete:
                            missing = int32(1)
                        own = int32(begin + at)
                        gates[own], gates[int32(own + 1)], gates[int32(own + 2)], gates[int32(own + 3)] = a, b, e, d
                        at = int32(at + 4 * threads)
                    sample = int32(sample + 1)
                if cuda.syncthreads_or(missing):
                    global_int32(status_at + int64(8 * tables.STATUS_FAULT))[0] = 1
                    return
            stamp(stamps_at, t, 3, thread)
            sample = int32(0)
            while not in_pieces and sample < own_samples:
                own, sample_maxima = int32(2 * sample), shared_int32(maxima_at + int64(4 * LANES) * sample)
                if held[own] == 0:
                    bad = choose(
                        *(shared_float32(gates_at + int64(4) * (sample * gates_pitch)), keys, ratios_at, words_at),
                        *(sample_maxima, blocks, kept, softmax, me),
                    )
                    if thread == 0:
                        held[own], held[int32(own + 1)] = period, words[FACTOR]
                else:
                    bad = is_too_large(held[int32(own + 1)], sample_maxima, me)
                if bad and thread == 0:
                    report(status_at, m[tables.NUMBER])
                sample = int32(sample + 1)
            # Warps with a strip begin it while the first one still sums the ratios.
            item, pieces, resident_pieces, factor = int32(warp - 1), none, none, np.float32(1)
            if in_pieces:
                bad = False
                if fresh != 0:
                    bad = choose_places(gates, keys, ratios_at, words_at, blocks, kept, softmax, int32(1), me)
                if fresh != 0 and warp == 0:
                    find_factor(ratios_at, words_at, shared_int32(maxima_at), blocks, kept, softmax, warps, lane)
                if has_pieces:
                    tile, gate = next_item(none, item, n_gates)
                    pieces, resident_pieces = begin_pieces(
                        *(strip_of_item(own_strips, item, units[int32(2 * tile + 1)], lane), for_blocks),
                        *(keys, ratios_at, fresh, own_ring_at, slot, lane),
                    )
                cuda.syncthreads()
                if fresh != 0:
                    factor = factor_of(words)
                    # The warps without a strip write the gates, which the products need not.
                    strips = int32(own_tiles * n_gates)
                    others = Lane(lane, int32(max(warp - strips, none)), int32(warps - strips))
                    if not has_pieces:
                        bad = write_gates(gates, keys, ratios_at, words_at, blocks, others) or bad
                    if thread == 0:
                        held[0], held[1] = period, words[FACTOR]
                else:
                    bad = is_too_large(held[1], shared_int32(maxima_at), me)
                if bad and thread == 0:
                    report(status_at, m[tables.NUMBER])
            else:
                cuda.syncthreads()
            stamp(stamps_at, t, 4, thread)

            # The recurrent drives of the own tiles.
            if has_pieces:
                tile, gate = next_item(none, item, n_gates)
                acc, slot, parity = end_pieces(
                    *(starts[int32(item * LANES + lane)], factor),
                    *(strip_of_item(own_strips, item, units[int32(2 * tile + 1)], lane), for_blocks),
                    *(pieces, resident_pieces, own_ring_at, slot, parity, lane),
                )
                drives_rec[int32(item * LANES + lane)] = acc
            elif in_pieces and warp == 0 and lane < own_tiles * n_gates:
                # A lane feeds a strip's ring.
                slot, parity = feed_ring(own_strips, rings_at + int64(ring_bytes) * lane, slot, parity)
            tile, gate, item = none, warp, warp
            while not in_pieces and warp < workers:
                tile, gate = next_item(tile, gate, n_gates)
                if tile >= own_tiles:
                    break
                strip_rows = strip_of_item(own_strips, item, units[int32(2 * tile + 1)], lane)
                acc = add_strip(starts[int32(item * LANES + lane)], strip_rows, for_blocks, ring_at, lane)
                sample = int32(0)
                while sample < own_samples:
                    place_of = int32((sample * own_tiles * n_gates + item) * LANES + lane)
                    drives_rec[place_of] = sum_of_sample(acc, sums, own_samples, sample, lane)
                    sample = int32(sample + 1)
                gate, item = int32(gate + workers), int32(item + workers)
            wait_for_copies()
            cuda.syncthreads()
            stamp(stamps_at, t, 5, thread)

            # Cells and outputs of this step.
            if thread < own_samples:
                held[int32(2 * thread)] = int32(held[int32(2 * thread)] - 1)
            write_zeros(active, own_samples * active_pitch, thread, threads)
            sample, tile, item = int32(0), warp, warp
            while True:
                sample, tile = next_item(sample, tile, own_tiles)
                if sample >= own_samples:
                    break
                unit = int32(units[int32(2 * tile)] + lane)
                if lane < units[int32(2 * tile + 1)]:
                    s, p = int32(item * (n_gates * LANES) + lane), int32(item * LANES + lane)
                    value, after = update(drives_in, s, drives_rec, s, LANES, state[p], np.float32(0), thresholds, unit)
                    store_relaxed(log_at + (row + batch + sample) * row_bytes + int64(4) * unit, value)
                    state[p] = after
                    if states_at != 0:
                        global_float32(states_at)[(row + sample) * n + unit] = after
                tile, item = int32(tile + warps), int32(item + warps)
            cuda.syncthreads()
            stamp(stamps_at, t, 6, thread)
            t += 1

        cells, sample, tile, item = global_float32(layer[tables.ROW_CELLS]), int32(0), warp, warp
        while True:
            sample, tile = next_item(sample, tile, own_tiles)
            if sample >= own_samples:
                break
            unit = int32(units[int32(2 * tile)] + lane)
            if lane < units[int32(2 * tile + 1)]:
                cells[(first_sample + sample) * n + unit] = state[item * LANES + lane]
            tile, item = int32(tile + warps), int32(item + warps)

        sample = int32(0)
        while held_at != 0 and part == 0 and sample < own_samples:
            k = thread
            while k < blocks:
                value = gates[int32(sample * gates_pitch + k)]
                global_float32(layer[tables.ROW_HELD])[(first_sample + sample) * blocks + k] = value
                k = int32(k + threads)
            if thread == 0:
                global_int32(layer[tables.ROW_LEFT])[first_sample + sample] = held[int32(2 * sample)]
            sample = int32(sample + 1)

    return gated_layer, types.void(*[types.int64] * 10)
