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
lists       shared   with one row of inputs in place of the sums, LIST_BYTES that `list_pieces` describes; then
                     (2, PIECE) float32, inputs of two pieces times their gates (`add_whole_rows`), and a barrier per
                     place of the ring, whose phases are copies of a piece
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

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.gated_strips import (
    gate_of,
    load8,
    lower_half,
    needed_rows,
    next_row,
    rows_in,
    upper_half,
)
from eventrnn.cuda.kernels.ptx import (
    OPEN_GROUPS,
    barrier_end,
    barrier_expect_bytes,
    barrier_init,
    barrier_init_done,
    barrier_try_wait,
    commit_copies,
    copy_async16,
    copy_async16_four,
    copy_bulk,
    load_shared4,
    load_shared_float4,
    shared_float32,
    shared_int32,
    shared_int64,
    store_shared_float4,
    wait_for_oldest_copies,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP, popcount
from eventrnn.cuda.tables import BARRIER_BYTES, LANES, LIST_BYTES, PIECE, SCALED_BYTES, STAGES, SUM_BYTES

assert OPEN_GROUPS == STAGES - 1, "the oldest of all stages must be complete"

# Rows that `add_whole_rows` multiplies per turn, and pieces that its ring has.
TURN, PIECES_AHEAD = 32, 3

# What a sum is added to without any change, also of its sign.
NOTHING_YET = np.float32(-0.0)

assert BARRIER_BYTES >= 8 * PIECES_AHEAD, "every place of the ring has a barrier"
assert PIECE == 1 << 7, "`pieces_of` shifts by 7"


@device_function
def add8(acc, weights, inputs):
    """The sum after eight terms."""
    acc = cuda.fma(weights[0], inputs[0], acc)
    acc = cuda.fma(weights[1], inputs[1], acc)
    acc = cuda.fma(weights[2], inputs[2], acc)
    acc = cuda.fma(weights[3], inputs[3], acc)
    acc = cuda.fma(weights[4], inputs[4], acc)
    acc = cuda.fma(weights[5], inputs[5], acc)
    acc = cuda.fma(weights[6], inputs[6], acc)
    return cuda.fma(weights[7], inputs[7], acc)


@device_function
def scaled8(gate, a, b, c, d, e, f, g, h):
    """Eight inputs, multiplied by their gate."""
    return gate * a, gate * b, gate * c, gate * d, gate * e, gate * f, gate * g, gate * h


@device_function
def wait_for_piece(barriers, slot, parity):
    """Wait for the piece in a place of the ring. Returns the place and the parity of the next one."""
    while barrier_try_wait(int32(barriers + int32(8) * slot), parity) == 0:
        pass
    slot = int32(slot + 1)
    if slot == PIECES_AHEAD:
        slot, parity = int32(0), int32(parity ^ 1)
    return slot, parity


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

    if narrow:

        @device_function
        def weights8(at, step):
            a, b, c, d = load_shared_float4(at)
            return (
                lower_half(a),
                upper_half(a),
                lower_half(b),
                upper_half(b),
                lower_half(c),
                upper_half(c),
                lower_half(d),
                upper_half(d),
            )
    else:
        weights8 = load8

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
    def rows_of_piece(strip):
        """Rows of a block row that `add_whole_rows` multiplies at a time."""
        return int32(min(strip.rows_of_block, PIECE))

    @device_function
    def pieces_of(strip):
        """Pieces of a block row. Divisions by numbers that the compiler does not know take hundreds of cycles."""
        return int32(int32(strip.rows_of_block + int32(PIECE - 1)) >> int32(7))

    @device_function
    def is_whole(strip, received):
        """Whether `add_whole_rows` can multiply the strip."""
        rows, pieces = rows_of_piece(strip), pieces_of(strip)
        piece_bytes = int32(rows * strip.width * size)
        whole = rows & int32(TURN - 1) == 0 and pieces * rows == strip.rows_of_block
        whole = whole and strip.n_rows == strip.block_rows * strip.rows_of_block
        room = PIECES_AHEAD * piece_bytes <= STAGES * stage_bytes
        one_block = strip.first_column == strip.last_column and strip.block_rows * pieces < LANES
        return received.samples == 1 and one_block and whole and room

    @device_function
    def copy_piece(strip, offset, target_at, barrier):
        """Start copying the piece at an offset to `target_at`, and a phase of the barrier. For one lane."""
        piece_bytes = int32(rows_of_piece(strip) * strip.width * size)
        barrier_expect_bytes(barrier, piece_bytes)
        copy_bulk(int32(target_at), strip.values_at + offset * size, piece_bytes, barrier)

    @device_function
    def list_pieces(strip, received, ring_at, lists_at, lane):
        """List the pieces of the block rows of a strip that the warp needs. Returns how many they are, and how many
        are resident.

        lists_at : address of (LANES, 4) int32: of each piece the place of its weights after `ring_at`, the place of its
                   inputs, and the bits of its gate; then of (LANES,) int64, offsets of those that are not resident

        Each lane looks at one block row.
        """
        rows, pieces = rows_of_piece(strip), pieces_of(strip)
        piece_bytes = int64(rows * size) * strip.width
        mask = needed_rows(strip, received, int32(0), strip.block_rows, lane)
        resident = int32(mask & int32((int32(1) << strip.resident) - 1))
        before, in_ring = int32(mask & int32((int32(1) << lane) - 1)), int32(popcount(resident) * pieces)
        # The lists of the strip before are not read any more.
        cuda.syncwarp(FULL_WARP)
        if (mask >> lane) & 1:
            entries, offsets = shared_int32(lists_at), shared_int64(lists_at + int64(16 * LANES))
            gate_at = received.gates_at + int64(4) * int32(strip.first_column + lane * strip.block_columns)
            gate, rank, piece = shared_int32(gate_at)[0], int32(popcount(before) * pieces), int32(0)
            while piece < pieces:
                place = strip.resident_at - ring_at + piece_bytes * int32(lane * pieces + piece)
                if lane >= strip.resident:
                    streamed = int32(rank - in_ring)
                    offsets[streamed] = strip.offsets[lane] + int64(piece * rows) * strip.width
                    # The remainder by three: the shifted product is the quotient for numbers below 32, as `is_whole`
                    # has them.
                    place = piece_bytes * int32(streamed - 3 * int32(int32(streamed * int32(11)) >> int32(5)))
                entries[int32(4 * rank)] = int32(place)
                entries[int32(4 * rank + 1)] = int32(4 * int32(strip.rows_of_block * lane + piece * rows))
                entries[int32(4 * rank + 2)] = gate
                rank, piece = int32(rank + 1), int32(piece + 1)
        cuda.syncwarp(FULL_WARP)
        return int32(popcount(mask) * pieces), in_ring

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
        while k + TURN <= rows:
            acc = add_scaled32(acc, w_at, x_at, step)
            k, w_at, x_at = int32(k + TURN), w_at + next32, x_at + int64(128)
        while k < rows:
            acc = add8(acc, weights8(w_at, step), load8(x_at, int64(16)))
            k, w_at, x_at = int32(k + 8), w_at + int64(8 * size) * width, x_at + int64(32)
        return acc

    @device_function
    def add_turn(acc, step, w_at, x_at, next_w, next_x, a, p, b, q, c, r):
        """Add the terms of 32 rows, of which weights and inputs of the first 24 are in six sets of registers.

        w_at, x_at     : addresses of the lane's weights and of the inputs of these rows
        next_w, next_x : the same of the rows of the next turn, of which the first 24 are loaded

        Returns the sum and the sets of the next turn.
        """
        next8 = int64(1 if narrow else 2) * step
        sixteen = int64(16)
        d, s = weights8(w_at + 3 * next8, step), load8(x_at + int64(96), sixteen)
        acc = add8(acc, a, p)
        next_a, next_p = weights8(next_w, step), load8(next_x, sixteen)
        acc = add8(acc, b, q)
        next_b, next_q = weights8(next_w + next8, step), load8(next_x + int64(32), sixteen)
        acc = add8(acc, c, r)
        next_c, next_r = weights8(next_w + 2 * next8, step), load8(next_x + int64(64), sixteen)
        acc = add8(acc, d, s)
        return acc, next_a, next_p, next_b, next_q, next_c, next_r

    @device_function
    def refill(strip, ring_at, offsets, barriers, done, resident, copied, streamed, free, lane):
        """Start copying the next piece to the place of the last one, if that was copied.

        done, copied : pieces that were multiplied, and copies that were started; free : the place of the last one

        Returns the new `copied` and `free`.
        """
        # All lanes have read the weights and the inputs of the last piece.
        cuda.syncwarp(FULL_WARP)
        if done > resident and copied < streamed:
            if lane == 0:
                piece_bytes = int64(rows_of_piece(strip) * size) * strip.width
                copy_piece(strip, offsets[copied], ring_at + piece_bytes * free, int32(barriers + int32(8) * free))
            copied, free = int32(copied + 1), int32(free + 1)
            if free == PIECES_AHEAD:
                free = int32(0)
        return copied, free

    @device_function
    def add_whole_rows(acc, strip, received, ring_at, lane):
        """`add_strip` for one row of inputs, a strip of one block column, and block rows of whole pieces.

        The lanes multiply the inputs of the next piece by its gate, each some of them, and add the terms of the
        present one. Pieces that are not resident are copied ahead, to a ring of PIECES_AHEAD, each by one lane.
        """
        rows, lists_at = rows_of_piece(strip), ring_at + int64(STAGES * stage_bytes)
        piece_bytes, scaled_at = int64(rows * size) * strip.width, lists_at + int64(LIST_BYTES)
        count, resident = list_pieces(strip, received, ring_at, lists_at, lane)
        offsets = shared_int64(lists_at + int64(16 * LANES))
        streamed, copied, barriers = (
            int32(count - resident),
            int32(0),
            int32(lists_at + int64(LIST_BYTES + SCALED_BYTES)),
        )
        if lane < PIECES_AHEAD:
            barrier_init(int32(barriers + int32(8) * lane), int32(1))
        barrier_init_done()
        cuda.syncwarp(FULL_WARP)
        while copied < min(streamed, int32(PIECES_AHEAD)):
            if lane == 0:
                copy_piece(strip, offsets[copied], ring_at + piece_bytes * copied, int32(barriers + int32(8) * copied))
            copied = int32(copied + 1)
        if count > 0:
            # Lanes without a column read what another lane reads.
            own_at = ring_at + int64(16) * min(lane, int32(strip.width - 1))
            raw_at, to_at = received.inputs_at + int64(16) * lane, scaled_at + int64(16) * lane
            step, next8, sixteen = int64(16) * strip.width, int64(8 * size) * strip.width, int64(16)
            # The entry of the next piece.
            entry_at, last_at = int32(lists_at), int32(int32(lists_at) + int32(16 * int32(count - 1)))
            place, raw, first_gate, _ = load_shared4(entry_at)
            v0, v1, v2, v3 = load_shared_float4(raw_at + int64(raw))
            gate = libdevice.int_as_float(first_gate)
            store_shared_float4(int32(to_at), gate * v0, gate * v1, gate * v2, gate * v3)
            entry_at = int32(min(int32(entry_at + int32(16)), last_at))
            next_place, next_raw, next_gate, _ = load_shared4(entry_at)
            # The streamed piece that is waited for next: its place in the ring, and the parity of its phase.
            done, half, slot, parity, free = int32(0), int32(0), int32(0), int32(0), int32(0)
            if resident == 0:
                slot, parity = wait_for_piece(barriers, slot, parity)
            # The other lanes have multiplied parts of the inputs of the piece.
            cuda.syncwarp(FULL_WARP)
            w_at, x_at = own_at + int64(place), scaled_at
            a0, a1, a2, a3, a4, a5, a6, a7 = weights8(w_at, step)
            p0, p1, p2, p3, p4, p5, p6, p7 = load8(x_at, sixteen)
            b0, b1, b2, b3, b4, b5, b6, b7 = weights8(w_at + next8, step)
            q0, q1, q2, q3, q4, q5, q6, q7 = load8(x_at + int64(32), sixteen)
            c0, c1, c2, c3, c4, c5, c6, c7 = weights8(w_at + 2 * next8, step)
            r0, r1, r2, r3, r4, r5, r6, r7 = load8(x_at + int64(64), sixteen)
            whole = rows == PIECE
            while whole and done < count:
                # Like the next loop, of pieces of PIECE rows, of which the sums are one sequence.
                copied, free = refill(strip, ring_at, offsets, barriers, done, resident, copied, streamed, free, lane)
                done = int32(done + 1)
                t0, t1, t2, t3 = load_shared_float4(raw_at + int64(next_raw))
                entry_at = int32(min(int32(entry_at + int32(16)), last_at))
                further_place, further_raw, further_gate, _ = load_shared4(entry_at)
                w_1, w_2, w_3 = w_at + 4 * next8, w_at + 8 * next8, w_at + 12 * next8
                x_1, x_2, x_3 = x_at + int64(128), x_at + int64(256), x_at + int64(384)
                acc, wa_1, xa_1, wb_1, xb_1, wc_1, xc_1 = add_turn(
                    acc,
                    step,
                    w_at,
                    x_at,
                    w_1,
                    x_1,
                    (a0, a1, a2, a3, a4, a5, a6, a7),
                    (p0, p1, p2, p3, p4, p5, p6, p7),
                    (b0, b1, b2, b3, b4, b5, b6, b7),
                    (q0, q1, q2, q3, q4, q5, q6, q7),
                    (c0, c1, c2, c3, c4, c5, c6, c7),
                    (r0, r1, r2, r3, r4, r5, r6, r7),
                )
                acc, wa_2, xa_2, wb_2, xb_2, wc_2, xc_2 = add_turn(
                    acc, step, w_1, x_1, w_2, x_2, wa_1, xa_1, wb_1, xb_1, wc_1, xc_1
                )
                acc, wa_3, xa_3, wb_3, xb_3, wc_3, xc_3 = add_turn(
                    acc, step, w_2, x_2, w_3, x_3, wa_2, xa_2, wb_2, xb_2, wc_2, xc_2
                )
                half, factor = int32(half ^ int32(4 * PIECE)), libdevice.int_as_float(next_gate)
                store_shared_float4(int32(to_at + int64(half)), factor * t0, factor * t1, factor * t2, factor * t3)
                w_at, x_at = own_at + int64(next_place), scaled_at + int64(half)
                if done >= resident and done < count:
                    slot, parity = wait_for_piece(barriers, slot, parity)
                # All lanes have written the inputs of the next piece.
                cuda.syncwarp(FULL_WARP)
                (
                    acc,
                    (a0, a1, a2, a3, a4, a5, a6, a7),
                    (p0, p1, p2, p3, p4, p5, p6, p7),
                    (b0, b1, b2, b3, b4, b5, b6, b7),
                    (q0, q1, q2, q3, q4, q5, q6, q7),
                    (c0, c1, c2, c3, c4, c5, c6, c7),
                    (r0, r1, r2, r3, r4, r5, r6, r7),
                ) = add_turn(acc, step, w_3, x_3, w_at, x_at, wa_3, xa_3, wb_3, xb_3, wc_3, xc_3)
                next_place, next_raw, next_gate = further_place, further_raw, further_gate
            while done < count:
                copied, free = refill(strip, ring_at, offsets, barriers, done, resident, copied, streamed, free, lane)
                done = int32(done + 1)
                u0, u1, u2, u3 = load_shared_float4(raw_at + int64(next_raw))
                entry_at = int32(min(int32(entry_at + int32(16)), last_at))
                later_place, later_raw, later_gate, _ = load_shared4(entry_at)
                turn = int32(TURN)
                while turn < rows:
                    (
                        acc,
                        (a0, a1, a2, a3, a4, a5, a6, a7),
                        (p0, p1, p2, p3, p4, p5, p6, p7),
                        (b0, b1, b2, b3, b4, b5, b6, b7),
                        (q0, q1, q2, q3, q4, q5, q6, q7),
                        (c0, c1, c2, c3, c4, c5, c6, c7),
                        (r0, r1, r2, r3, r4, r5, r6, r7),
                    ) = add_turn(
                        acc,
                        step,
                        w_at,
                        x_at,
                        w_at + 4 * next8,
                        x_at + int64(128),
                        (a0, a1, a2, a3, a4, a5, a6, a7),
                        (p0, p1, p2, p3, p4, p5, p6, p7),
                        (b0, b1, b2, b3, b4, b5, b6, b7),
                        (q0, q1, q2, q3, q4, q5, q6, q7),
                        (c0, c1, c2, c3, c4, c5, c6, c7),
                        (r0, r1, r2, r3, r4, r5, r6, r7),
                    )
                    turn, w_at, x_at = int32(turn + TURN), w_at + 4 * next8, x_at + int64(128)
                half, scale = int32(half ^ int32(4 * PIECE)), libdevice.int_as_float(next_gate)
                store_shared_float4(int32(to_at + int64(half)), scale * u0, scale * u1, scale * u2, scale * u3)
                next_w, next_x = own_at + int64(next_place), scaled_at + int64(half)
                if done >= resident and done < count:
                    slot, parity = wait_for_piece(barriers, slot, parity)
                # All lanes have written the inputs of the next piece.
                cuda.syncwarp(FULL_WARP)
                (
                    acc,
                    (a0, a1, a2, a3, a4, a5, a6, a7),
                    (p0, p1, p2, p3, p4, p5, p6, p7),
                    (b0, b1, b2, b3, b4, b5, b6, b7),
                    (q0, q1, q2, q3, q4, q5, q6, q7),
                    (c0, c1, c2, c3, c4, c5, c6, c7),
                    (r0, r1, r2, r3, r4, r5, r6, r7),
                ) = add_turn(
                    acc,
                    step,
                    w_at,
                    x_at,
                    next_w,
                    next_x,
                    (a0, a1, a2, a3, a4, a5, a6, a7),
                    (p0, p1, p2, p3, p4, p5, p6, p7),
                    (b0, b1, b2, b3, b4, b5, b6, b7),
                    (q0, q1, q2, q3, q4, q5, q6, q7),
                    (c0, c1, c2, c3, c4, c5, c6, c7),
                    (r0, r1, r2, r3, r4, r5, r6, r7),
                )
                w_at, x_at = next_w, next_x
                next_place, next_raw, next_gate = later_place, later_raw, later_gate
        # No phase is waited for any more.
        cuda.syncwarp(FULL_WARP)
        if lane < PIECES_AHEAD:
            barrier_end(int32(barriers + int32(8) * lane))
        return acc

    @device_function
    def add_strip(start, strip, received, ring_at, lane):
        if is_whole(strip, received):
            acc = add_whole_rows(start, strip, received, ring_at, lane)
        else:
            acc = end_strip(start, strip, received, begin_strip(strip, received, ring_at, lane), ring_at, lane)
        return acc

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
