"""Products with gated blocks: device functions for rows of inputs (`weights/gated.py` defines the product).

The results equal `reference.propagate_chosen`: logits and drives have the same bits. `gated_choice.py` makes gates of
the logits.

add_strip : one warp, one strip of up to 32 columns, one column per lane, for some rows of inputs. It walks the rows of
            the blocks that some lane needs, in ascending order, with one FMA per term. The first block rows may be
            resident in shared memory. The weights of the others are copied to a ring in shared memory of the warp, some
            stages before they are multiplied: the first stages while the resident ones are.

The rows of a block row are padded to a multiple of ROW_GROUP, in the strips as in the inputs. A lane therefore reads
the weights of several rows, and the inputs that belong to them, by 16 bytes. A term of padding is 0 * 0.

=========== ======== ===========================================================================================
array       memory   shape, dtype, contents
=========== ======== ===========================================================================================
inputs      shared   (samples, padded rows) float32, rows of inputs, silent ones and padding as zeros
active      shared   (samples, block rows) int32, 1 if an input of the block row is not zero
gates       shared   (samples, blocks) float32, logits and then gates, 0 for blocks that are not chosen
ring        shared   per warp, (STAGES, stage bytes), rows of a strip; then TAIL_BYTES of what the next two rows name
sums        shared   (samples, 32) float32, sums of several rows of inputs; then as many totals of logits (`end_factor`)
lists       shared   with one row of inputs in place of the sums, what `gated_pieces.py` describes
resident    shared   per strip, (block rows, padded rows of a block, width), the first block rows
strips      global   `gated_matrix.RowStrips`: values float32 or uint16 bits of bfloat16; offsets (strips, block rows)
                     int64, where the rows of a block row begin, -1 where no block is stored
=========== ======== ===========================================================================================

No variable that holds a tuple, with names or without, is assigned in two places, as before a loop and in it: libNVVM of
CUDA 12.8 and of 13.0 does not finish compiling a kernel where such variables meet. Numbers are carried over one by one.
"""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.gated_strips import add8, gate_of, load8, make_weights8, needed_rows, next_row, rows_in
from eventrnn.cuda.kernels.ptx import (
    OPEN_GROUPS,
    commit_copies,
    copy_async16,
    copy_async16_four,
    shared_float32,
    wait_for_oldest_copies,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP
from eventrnn.cuda.tables import LANES, PIECE, STAGES, SUM_BYTES

assert OPEN_GROUPS == STAGES - 1, "the oldest of all stages must be complete"

# What a sum is added to without any change, also of its sign.
NOTHING_YET = np.float32(-0.0)


@device_function
def scaled8(gate, a, b, c, d, e, f, g, h):
    """Eight inputs, multiplied by their gate."""
    return gate * a, gate * b, gate * c, gate * d, gate * e, gate * f, gate * g, gate * h


def make_add_strip(narrow: bool, stage_bytes: int):
    """The device functions add_strip, begin_strip, end_factor and add_piece for float32 weights, or for bfloat16 ones.

    stage_bytes : bytes of weights that a warp copies at a time

    add_strip(start, strip, received, ring_at, lane) -> start + sum over j of weight * (gate * input). For one row of
    inputs it returns the sum; those of several rows lie behind the ring (`sum_of_sample`).

    begin_strip(strip, received, ring_at, lane) starts the first copies; for a strip of a factor,
    end_factor(start, factor, part, received, ring_at, lane) does the rest.

    add_piece(acc, w_at, x_at, width, rows) adds the terms of some rows whose weights and inputs lie in shared memory.
    """
    size = 2 if narrow else 4

    weights8 = make_weights8(narrow)

    @device_function
    def start_stage(strip, received, row, first, mask, done, slot_at, lane):
        """Start copying the next rows: `done` rows of block row `row` were copied. Returns the place after them."""
        if row < strip.block_rows:
            rows = int32(min(strip.stage_rows, rows_in(strip, row) - done))
            source = strip.values_at + (strip.offsets[row] + int64(done) * strip.width) * size + int64(16) * lane
            left, target = int32(((rows * strip.width * size) >> 4) - lane), slot_at + int64(16) * lane
            while left > 3 * LANES:
                copy_async16_four(target, source)
                target, source, left = target + int64(64 * LANES), source + int64(64 * LANES), int32(left - 4 * LANES)
            while left > 0:
                copy_async16(target, source)
                target, source, left = target + int64(16 * LANES), source + int64(16 * LANES), int32(left - LANES)
            done = int32(done + rows)
            if done >= rows_in(strip, row):
                row, first, mask = next_row(strip, received, first, strip.block_rows, mask, lane)
                done = int32(0)
        commit_copies()
        return row, first, mask, done

    @device_function
    def add_rows(acc, w_at, x_at, rows, width, gate):
        """Add the terms of `rows` rows, a multiple of eight, whose inputs lie from `x_at` on.

        w_at : address of the lane's weights of the first rows

        The numbers of 24 rows are under way while those of eight rows are added, in four sets of registers in turn. The
        last ones may lie beyond the rows, and are not used.
        """
        step, next8, sixteen = int64(16) * width, int64(8 * size) * width, int64(16)
        k = int32(32)
        a0, a1, a2, a3, a4, a5, a6, a7 = weights8(w_at, step)
        p0, p1, p2, p3, p4, p5, p6, p7 = load8(x_at, sixteen)
        b0, b1, b2, b3, b4, b5, b6, b7 = weights8(w_at + next8, step)
        q0, q1, q2, q3, q4, q5, q6, q7 = load8(x_at + int64(32), sixteen)
        c0, c1, c2, c3, c4, c5, c6, c7 = weights8(w_at + 2 * next8, step)
        r0, r1, r2, r3, r4, r5, r6, r7 = load8(x_at + int64(64), sixteen)
        while k <= rows:
            d0, d1, d2, d3, d4, d5, d6, d7 = weights8(w_at + 3 * next8, step)
            s0, s1, s2, s3, s4, s5, s6, s7 = load8(x_at + int64(96), sixteen)
            acc = add8(acc, (a0, a1, a2, a3, a4, a5, a6, a7), scaled8(gate, p0, p1, p2, p3, p4, p5, p6, p7))
            a0, a1, a2, a3, a4, a5, a6, a7 = weights8(w_at + 4 * next8, step)
            p0, p1, p2, p3, p4, p5, p6, p7 = load8(x_at + int64(128), sixteen)
            acc = add8(acc, (b0, b1, b2, b3, b4, b5, b6, b7), scaled8(gate, q0, q1, q2, q3, q4, q5, q6, q7))
            b0, b1, b2, b3, b4, b5, b6, b7 = weights8(w_at + 5 * next8, step)
            q0, q1, q2, q3, q4, q5, q6, q7 = load8(x_at + int64(160), sixteen)
            acc = add8(acc, (c0, c1, c2, c3, c4, c5, c6, c7), scaled8(gate, r0, r1, r2, r3, r4, r5, r6, r7))
            c0, c1, c2, c3, c4, c5, c6, c7 = weights8(w_at + 6 * next8, step)
            r0, r1, r2, r3, r4, r5, r6, r7 = load8(x_at + int64(192), sixteen)
            acc = add8(acc, (d0, d1, d2, d3, d4, d5, d6, d7), scaled8(gate, s0, s1, s2, s3, s4, s5, s6, s7))
            k, w_at, x_at = int32(k + 32), w_at + 4 * next8, x_at + int64(128)
        if k - 24 <= rows:
            acc = add8(acc, (a0, a1, a2, a3, a4, a5, a6, a7), scaled8(gate, p0, p1, p2, p3, p4, p5, p6, p7))
        if k - 16 <= rows:
            acc = add8(acc, (b0, b1, b2, b3, b4, b5, b6, b7), scaled8(gate, q0, q1, q2, q3, q4, q5, q6, q7))
        if k - 8 <= rows:
            acc = add8(acc, (c0, c1, c2, c3, c4, c5, c6, c7), scaled8(gate, r0, r1, r2, r3, r4, r5, r6, r7))
        return acc

    @device_function
    def add_stage(acc, sums, strip, received, values_at, row, used, rows, lane):
        """Multiply some rows of a block row with every row of inputs that chose it. Returns the sum of the only one."""
        at, sample = int32(row * strip.rows_of_block + used), int32(0)
        # Lanes without a column read what another lane reads.
        w_at = values_at + int64(16) * min(lane, int32(strip.width - 1))
        while sample < received.samples:
            gate = gate_of(strip, received, sample, row)
            if gate != 0:
                place = int32(sample * LANES + lane)
                if received.samples > 1:
                    acc = sums[place]
                x_at = received.inputs_at + int64(4) * int32(sample * received.input_pitch + at)
                acc = add_rows(acc, w_at, x_at, rows, strip.width, gate)
                if received.samples > 1:
                    sums[place] = acc
            sample = int32(sample + 1)
        return acc

    @device_function
    def add_resident(acc, sums, strip, received, lane):
        """Multiply the block rows that are resident."""
        mask, block_bytes = int32(0), int64(strip.rows_of_block * strip.width * size)
        if strip.resident > 0:
            mask = needed_rows(strip, received, int32(0), strip.resident, lane)
        row, first, mask = next_row(strip, received, int32(0), strip.resident, mask, lane)
        while row < strip.resident:
            values_at = strip.resident_at + block_bytes * row
            acc = add_stage(acc, sums, strip, received, values_at, row, int32(0), rows_in(strip, row), lane)
            row, first, mask = next_row(strip, received, first, strip.resident, mask, lane)
        return acc

    @device_function
    def begin_strip(strip, received, ring_at, lane):
        """Start copying the first stages. Returns the first block row and the place after the copies."""
        mask = needed_rows(strip, received, strip.resident, strip.block_rows, lane)
        row, first, mask = next_row(strip, received, strip.resident, strip.block_rows, mask, lane)
        # The place of the copies: block row, the mask of later ones, and the rows of it that were copied.
        ahead, last, last_mask, done, slot = row, first, mask, int32(0), int32(0)
        while slot < STAGES - 1:
            slot_at = ring_at + int64(stage_bytes) * slot
            ahead, last, last_mask, done = start_stage(strip, received, ahead, last, last_mask, done, slot_at, lane)
            slot = int32(slot + 1)
        return row, first, mask, ahead, last, last_mask, done

    @device_function
    def end_strip(start, strip, received, begun, ring_at, lane):
        """Multiply; `begun` is the result of `begin_strip`."""
        row, first, mask, ahead, last, last_mask, done = begun
        acc, sums = start, shared_float32(ring_at + int64(STAGES * stage_bytes))
        sample = int32(0)
        while received.samples > 1 and sample < received.samples:
            sums[int32(sample * LANES + lane)] = start
            sample = int32(sample + 1)
        acc = add_resident(acc, sums, strip, received, lane)
        slot, used = int32(0), int32(0)
        while row < strip.block_rows:
            free_at = ring_at + int64(stage_bytes) * ((slot + int32(STAGES - 1)) & int32(STAGES - 1))
            ahead, last, last_mask, done = start_stage(strip, received, ahead, last, last_mask, done, free_at, lane)
            wait_for_oldest_copies()
            # The other lanes have copied parts of the rows.
            cuda.syncwarp(FULL_WARP)
            rows = int32(min(strip.stage_rows, rows_in(strip, row) - used))
            values_at = ring_at + int64(stage_bytes) * slot
            acc = add_stage(acc, sums, strip, received, values_at, row, used, rows, lane)
            # The stage is overwritten in the next round.
            cuda.syncwarp(FULL_WARP)
            used = int32(used + rows)
            if used >= rows_in(strip, row):
                row, first, mask = next_row(strip, received, first, strip.block_rows, mask, lane)
                used = int32(0)
            slot = (slot + int32(1)) & int32(STAGES - 1)
        return acc

    @device_function
    def add_scaled32(acc, w_at, x_at, step):
        """Add the terms of 32 rows whose inputs, from `x_at` on, are multiplied by their gate already.

        Loads stand before all additions; the assembler moves them ahead.
        """
        next8, sixteen = int64(1 if narrow else 2) * step, int64(16)
        a, p = weights8(w_at, step), load8(x_at, sixteen)
        b, q = weights8(w_at + next8, step), load8(x_at + int64(32), sixteen)
        c, r = weights8(w_at + int64(2) * next8, step), load8(x_at + int64(64), sixteen)
        d, s = weights8(w_at + int64(3) * next8, step), load8(x_at + int64(96), sixteen)
        return add8(add8(add8(add8(acc, a, p), b, q), c, r), d, s)

    @device_function
    def add_128(acc, w_at, x_at, width):
        """`add_piece` of PIECE rows."""
        step, next32 = int64(16) * width, int64(32 * size) * width
        acc = add_scaled32(acc, w_at, x_at, step)
        acc = add_scaled32(acc, w_at + next32, x_at + int64(128), step)
        acc = add_scaled32(acc, w_at + int64(2) * next32, x_at + int64(256), step)
        return add_scaled32(acc, w_at + int64(3) * next32, x_at + int64(384), step)

    @device_function
    def add_piece(acc, w_at, x_at, width, rows):
        """Add the terms of some rows, a multiple of eight. PIECE rows are one sequence without a branch, so that loads
        go ahead of the additions."""
        step, next32, k = int64(16) * width, int64(32 * size) * width, int32(0)
        if rows == PIECE:
            acc = add_128(acc, w_at, x_at, width)
            k = rows
        while k + 32 <= rows:
            acc = add_scaled32(acc, w_at, x_at, step)
            k, w_at, x_at = int32(k + 32), w_at + next32, x_at + int64(128)
        while k < rows:
            acc = add8(acc, weights8(w_at, step), load8(x_at, int64(16)))
            k, w_at, x_at = int32(k + 8), w_at + int64(8 * size) * width, x_at + int64(32)
        return acc

    @device_function
    def add_strip(start, strip, received, ring_at, lane):
        return end_strip(start, strip, received, begin_strip(strip, received, ring_at, lane), ring_at, lane)

    @device_function
    def end_factor(start, factor, part, received, ring_at, lane):
        """Multiply a strip of a factor, which is one block row that is always needed, after `begin_strip`.

        part : rows of a part of a sum, a multiple of eight; the first one starts from `start`
        """
        none, ahead, done = int32(0), int32(0), int32(min((STAGES - 1) * factor.stage_rows, factor.n_rows))
        if done == factor.n_rows or factor.resident > 0:
            ahead, done = factor.block_rows, none
        first, mask = none, none
        sums_at = ring_at + int64(STAGES * stage_bytes)
        sums, totals = shared_float32(sums_at), shared_float32(sums_at + int64(SUM_BYTES))
        sample, acc, total = none, start, NOTHING_YET
        while received.samples > 1 and sample < received.samples:
            sums[int32(sample * LANES + lane)], totals[int32(sample * LANES + lane)] = start, NOTHING_YET
            sample = int32(sample + 1)
        slot, used, end = none, none, int32(min(part, factor.n_rows))
        while used < factor.n_rows:
            rows, values_at = int32(factor.n_rows - used), factor.resident_at
            if factor.resident == 0:
                free_at = ring_at + int64(stage_bytes) * ((slot + int32(STAGES - 1)) & int32(STAGES - 1))
                ahead, first, mask, done = start_stage(factor, received, ahead, first, mask, done, free_at, lane)
                wait_for_oldest_copies()
                # The other lanes have copied parts of the rows.
                cuda.syncwarp(FULL_WARP)
                rows, values_at = int32(min(factor.stage_rows, rows)), ring_at + int64(stage_bytes) * slot
                slot = (slot + int32(1)) & int32(STAGES - 1)
            last = int32(used + rows)
            while used < last:
                rows, sample = int32(min(last, end) - used), none
                while lane < factor.width and sample < received.samples:
                    place = int32(sample * LANES + lane)
                    if received.samples > 1:
                        acc = sums[place]
                    x_at = received.inputs_at + int64(4) * int32(sample * received.input_pitch + used)
                    acc = add_piece(acc, values_at + int64(16) * lane, x_at, factor.width, rows)
                    if received.samples > 1:
                        sums[place] = acc
                    sample = int32(sample + 1)
                used, values_at = int32(used + rows), values_at + int64(rows * factor.width * size)
                if used == end:
                    end = int32(min(end + part, factor.n_rows))
                    total, sample = total + acc, none
                    acc = np.float32(0)
                    while received.samples > 1 and sample < received.samples:
                        place = int32(sample * LANES + lane)
                        totals[place] = totals[place] + sums[place]
                        sums[place] = np.float32(0)
                        sample = int32(sample + 1)
            # The stage is overwritten in the next round.
            cuda.syncwarp(FULL_WARP)
        sample = none
        while received.samples > 1 and sample < received.samples:
            sums[int32(sample * LANES + lane)] = totals[int32(sample * LANES + lane)]
            sample = int32(sample + 1)
        return total

    return add_strip, begin_strip, end_factor, add_piece
