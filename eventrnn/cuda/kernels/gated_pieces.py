"""Products with gated blocks of one row of inputs, in pieces of block rows: device functions for one warp.

begin_pieces : lists the pieces of a strip that some input and the gate need, and starts to copy some of them.
end_pieces   : multiplies them in ascending order.
feed_ring    : a lane of another warp copies further pieces of a strip to the places that were multiplied.

A strip has one block column, and block rows of whole pieces (`gated_matrix.GatedMatrix.has_pieces`). The first block
rows may be resident in shared memory; pieces of the others are copied to the ring of the strip, PIECES_AHEAD at a time,
each by one lane. Starting a copy takes a warp some 150 cycles, in which it would add nothing; so another warp does it.

Rings, resident weights and inputs are those of `gated_blocks.py`. Behind the stages of its ring a warp has

lists    : (LANES, 4) int32 and (LANES,) int64, which `list_pieces` describes
scaled   : (2, PIECE) float32, inputs of the present and of the next piece times their gates
barriers : (2, PIECES_AHEAD) barriers, two per place of the ring: the phases of the first one are copies of a piece, and
           those of the second one end when a piece is multiplied; then int32, the pieces that are not resident
"""

from __future__ import annotations

from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function
from eventrnn.cuda.kernels.gated_strips import add8, load8, make_weights8
from eventrnn.cuda.kernels.ptx import (
    barrier_arrive,
    barrier_expect_bytes,
    barrier_init,
    barrier_init_done,
    barrier_test,
    barrier_try_wait,
    copy_bulk,
    load_shared,
    load_shared4,
    load_shared_float,
    load_shared_float4,
    shared_float32,
    shared_int32,
    shared_int64,
    sleep,
    store_shared_float4,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP, popcount
from eventrnn.cuda.tables import BARRIER_BYTES, LANES, LIST_BYTES, PIECE, SCALED_BYTES, STAGES

# Rows that are multiplied per turn, and pieces that the ring has.
TURN, PIECES_AHEAD = 32, 3

# The barriers of multiplied pieces, and the number of streamed pieces, after the first barrier.
MULTIPLIED, STREAMED = 8 * PIECES_AHEAD, 16 * PIECES_AHEAD

# Nanoseconds between two looks at a barrier, a fraction of the time in which a piece is multiplied.
REST = 100

assert BARRIER_BYTES >= STREAMED + 4, "every place of the ring has two barriers"
assert PIECE == 1 << 7 == 4 * LANES, "`pieces_of` shifts by 7, and a warp multiplies a piece of inputs at once"


@device_function
def rows_of_piece(strip):
    """Rows of a block row that are multiplied at a time."""
    return int32(min(strip.rows_of_block, PIECE))


@device_function
def pieces_of(strip):
    """Pieces of a block row. Divisions by numbers that the compiler does not know take hundreds of cycles."""
    return int32(int32(strip.rows_of_block + int32(PIECE - 1)) >> int32(7))


@device_function
def next_place(slot, parity, further):
    """The place of the ring that is at most PIECES_AHEAD places after another one, and the parity of its phase."""
    slot = int32(slot + further)
    if slot >= PIECES_AHEAD:
        slot, parity = int32(slot - PIECES_AHEAD), int32(parity ^ 1)
    return slot, parity


@device_function
def wait_for_piece(barriers, slot, parity):
    """Wait for the piece in a place of the ring. Returns the place and the parity of the next one."""
    while barrier_try_wait(int32(barriers + int32(8) * slot), parity) == 0:
        pass
    return next_place(slot, parity, int32(1))


@device_function
def chosen_rows(strip, received, keys, fresh, lane):
    """A mask of the block rows of a strip that the warp has to multiply. Each lane looks at one: its key and block."""
    # The three numbers are under way at the same time.
    row = int32(min(lane, int32(strip.block_rows - 1)))
    stored, active = strip.offsets[row] >= 0, shared_int32(received.active_at)[row] != 0
    block = int32(strip.first_column + row * strip.block_columns)
    key, gate = keys[block], shared_float32(received.gates_at)[block]
    taken = key >= 0
    if fresh == 0:
        taken = gate != 0
    return int32(cuda.ballot_sync(FULL_WARP, lane < strip.block_rows and stored and active and taken)), key, block


@device_function
def after_place(slot, further):
    """The place of the ring that is `further` places after another one, for fewer than LANES.

    The shifted product is the quotient by three.
    """
    place = int32(slot + further)
    return int32(place - int32(PIECES_AHEAD) * int32(int32(place * int32(43)) >> int32(7)))


def make_pieces(narrow: bool, stage_bytes: int):
    """The device functions prepare_ring, begin_pieces, end_pieces and feed_ring for float32 weights, or for bfloat16.

    stage_bytes : a STAGES-th of the ring of a warp

    prepare_ring(ring_at, lane) initialises the barriers of a ring, once. The block is synchronised after it.

    begin_pieces(strip, received, keys, ratios_at, fresh, ring_at, slot, lane) -> the pieces, and how many of them are
    resident.
    keys, ratios_at : what `choose_places` made of the logits, where `fresh` is 1; with 0 the gates of an earlier step
                      count, and their `factor` is 1
    slot   : the place of the ring that is used next

    end_pieces(start, factor, strip, received, count, resident, ring_at, slot, parity, lane) -> start + sum over j of
    weight * (gate * input), and the next place and the parity of its next phase. All steps use the places in turn.

    feed_ring(strips, ring_at, slot, parity) -> the same of the lane that feeds a ring, from the block barrier after
    begin_pieces on.
    """
    size, weights8 = 2 if narrow else 4, make_weights8(narrow)

    @device_function
    def barriers_of(ring_at):
        """The address of the barriers of a ring."""
        return int32(ring_at + int64(STAGES * stage_bytes + LIST_BYTES + SCALED_BYTES))

    @device_function
    def list_pieces(strip, received, keys, ratios_at, fresh, ring_at, lists_at, slot, lane):
        """List the pieces of the block rows of a strip that the warp needs. Returns how many they are, and how many of
        them are resident.

        lists_at : address of (LANES, 4) int32: of each piece the place of its weights after `ring_at`, the place of its
                   inputs, and the address of its ratio or gate; then of (LANES,) int64, offsets of those that
                   are not resident
        """
        rows, pieces = rows_of_piece(strip), pieces_of(strip)
        piece_bytes = int32(int32(rows * size) * strip.width)
        mask, key, block = chosen_rows(strip, received, keys, fresh, lane)
        resident = int32(mask & int32((int32(1) << strip.resident) - 1))
        before, in_ring = int32(mask & int32((int32(1) << lane) - 1)), int32(popcount(resident) * pieces)
        # The lists of the strip before are not read any more.
        cuda.syncwarp(FULL_WARP)
        if (mask >> lane) & 1:
            entries, offsets = shared_int32(lists_at), shared_int64(lists_at + int64(16 * LANES))
            gate_at = int32(received.gates_at + int64(4) * block)
            if fresh != 0:
                gate_at = int32(ratios_at + int64(4) * key)
            rank, piece = int32(popcount(before) * pieces), int32(0)
            while piece < pieces:
                place = int32(int32(strip.resident_at - ring_at) + piece_bytes * int32(lane * pieces + piece))
                if lane >= strip.resident:
                    streamed = int32(rank - in_ring)
                    offsets[streamed] = strip.offsets[lane] + int64(piece * rows) * strip.width
                    place = int32(piece_bytes * after_place(slot, streamed))
                entries[int32(4 * rank)] = place
                entries[int32(4 * rank + 1)] = int32(4 * int32(strip.rows_of_block * lane + piece * rows))
                entries[int32(4 * rank + 2)] = gate_at
                rank, piece = int32(rank + 1), int32(piece + 1)
        cuda.syncwarp(FULL_WARP)
        return int32(popcount(mask) * pieces), in_ring

    @device_function
    def copy_piece(strip, offset, target_at, barrier):
        """Start copying the piece at an offset to `target_at`, and a phase of the barrier. For one lane per ring."""
        piece_bytes = int32(rows_of_piece(strip) * strip.width * size)
        barrier_expect_bytes(barrier, piece_bytes)
        copy_bulk(int32(target_at), strip.values_at + offset * size, piece_bytes, barrier)

    @device_function
    def release(barriers, done, resident, free, lane):
        """Say that the last piece of `done` ones was multiplied, if it lay in the ring, in place `free`. Returns the
        place of the next one."""
        # All lanes have read the weights and the inputs of the last piece.
        cuda.syncwarp(FULL_WARP)
        if done > resident:
            if lane == 0:
                barrier_arrive(int32(barriers + int32(MULTIPLIED) + int32(8) * free))
            free = int32(free + 1)
            if free == PIECES_AHEAD:
                free = int32(0)
        return free

    @device_function
    def feed_ring(strips, ring_at, slot, parity):
        lists_at, barriers = ring_at + int64(STAGES * stage_bytes), barriers_of(ring_at)
        piece_bytes = int64(rows_of_piece(strips) * size) * strips.width
        offsets, streamed = shared_int64(lists_at + int64(16 * LANES)), load_shared(int32(barriers + int32(STREAMED)))
        copied = int32(min(streamed, int32(PIECES_AHEAD)))
        slot, parity = next_place(slot, parity, copied)
        while copied < streamed:
            # The phase before the one that the copy will begin.
            if barrier_test(int32(barriers + int32(MULTIPLIED) + int32(8) * slot), int32(parity ^ 1)) != 0:
                place, barrier = ring_at + piece_bytes * slot, int32(barriers + int32(8) * slot)
                copy_piece(strips, offsets[copied], place, barrier)
                copied = int32(copied + 1)
                slot, parity = next_place(slot, parity, int32(1))
            else:
                # Reads of barriers would delay those of weights.
                sleep(int32(REST))
        return slot, parity

    @device_function
    def add_turn(acc, step, w_at, x_at, next_w, next_x, a, p, b, q, c, r):
        """Add the terms of 32 rows, of which weights and inputs of the first 24 are in six sets of registers.

        w_at, x_at     : addresses of the lane's weights and of the inputs of these rows
        next_w, next_x : the same of the rows of the next turn, of which the first 24 are loaded

        Returns the sum and the sets of the next turn.
        """
        next8, sixteen = int64(1 if narrow else 2) * step, int64(16)
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
    def keep_scaled(to_at, gate, a, b, c, d):
        """Write four inputs times their gate."""
        store_shared_float4(int32(to_at), gate * a, gate * b, gate * c, gate * d)

    @device_function
    def prepare_ring(ring_at, lane):
        if lane < 2 * PIECES_AHEAD:
            barrier_init(int32(barriers_of(ring_at) + int32(8) * lane), int32(1))
        barrier_init_done()

    @device_function
    def begin_pieces(strip, received, keys, ratios_at, fresh, ring_at, slot, lane):
        lists_at, piece_bytes = (
            ring_at + int64(STAGES * stage_bytes),
            int64(rows_of_piece(strip) * size) * strip.width,
        )
        count, resident = list_pieces(strip, received, keys, ratios_at, fresh, ring_at, lists_at, slot, lane)
        if lane == 0:
            shared_int32(lists_at + int64(LIST_BYTES + SCALED_BYTES))[STREAMED // 4] = int32(count - resident)
        # A lane starts one copy.
        if lane < min(int32(count - resident), int32(PIECES_AHEAD)):
            place, offset = after_place(slot, lane), shared_int64(lists_at + int64(16 * LANES))[lane]
            copy_piece(strip, offset, ring_at + piece_bytes * place, int32(barriers_of(ring_at) + int32(8) * place))
        return count, resident

    @device_function
    def end_pieces(acc, factor, strip, received, count, resident, ring_at, slot, parity, lane):
        rows, lists_at = rows_of_piece(strip), ring_at + int64(STAGES * stage_bytes)
        scaled_at, barriers = lists_at + int64(LIST_BYTES), barriers_of(ring_at)
        if count > 0:
            # Lanes without a column read what another lane reads.
            own_at = ring_at + int64(16) * min(lane, int32(strip.width - 1))
            raw_at, to_at = received.inputs_at + int64(16) * lane, scaled_at + int64(16) * lane
            step, next8, sixteen = int64(16) * strip.width, int64(8 * size) * strip.width, int64(16)
            # The entry of the next piece.
            entry_at, last_at = int32(lists_at), int32(int32(lists_at) + int32(16 * int32(count - 1)))
            place, raw, first_gate, _ = load_shared4(entry_at)
            v0, v1, v2, v3 = load_shared_float4(raw_at + int64(raw))
            gate = factor * load_shared_float(first_gate)
            keep_scaled(to_at, gate, v0, v1, v2, v3)
            entry_at = int32(min(int32(entry_at + int32(16)), last_at))
            place_after, next_raw, next_gate, _ = load_shared4(entry_at)
            # `slot` and `parity` are those of the streamed piece that is waited for next, `free` of the one multiplied.
            done, half, free = int32(0), int32(0), slot
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
                free = release(barriers, done, resident, free, lane)
                done = int32(done + 1)
                t0, t1, t2, t3 = load_shared_float4(raw_at + int64(next_raw))
                entry_at = int32(min(int32(entry_at + int32(16)), last_at))
                further_place, further_raw, further_gate, _ = load_shared4(entry_at)
                w_1, w_2, w_3 = w_at + 4 * next8, w_at + 8 * next8, w_at + 12 * next8
                x_1, x_2, x_3 = x_at + int64(128), x_at + int64(256), x_at + int64(384)
                acc, wa_1, xa_1, wb_1, xb_1, wc_1, xc_1 = add_turn(
                    *(acc, step, w_at, x_at, w_1, x_1),
                    *((a0, a1, a2, a3, a4, a5, a6, a7), (p0, p1, p2, p3, p4, p5, p6, p7)),
                    *((b0, b1, b2, b3, b4, b5, b6, b7), (q0, q1, q2, q3, q4, q5, q6, q7)),
                    *((c0, c1, c2, c3, c4, c5, c6, c7), (r0, r1, r2, r3, r4, r5, r6, r7)),
                )
                acc, wa_2, xa_2, wb_2, xb_2, wc_2, xc_2 = add_turn(
                    acc, step, w_1, x_1, w_2, x_2, wa_1, xa_1, wb_1, xb_1, wc_1, xc_1
                )
                acc, wa_3, xa_3, wb_3, xb_3, wc_3, xc_3 = add_turn(
                    acc, step, w_2, x_2, w_3, x_3, wa_2, xa_2, wb_2, xb_2, wc_2, xc_2
                )
                half, scale = int32(half ^ int32(4 * PIECE)), factor * load_shared_float(next_gate)
                keep_scaled(to_at + int64(half), scale, t0, t1, t2, t3)
                w_at, x_at = own_at + int64(place_after), scaled_at + int64(half)
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
                place_after, next_raw, next_gate = further_place, further_raw, further_gate
            while done < count:
                free = release(barriers, done, resident, free, lane)
                done = int32(done + 1)
                u0, u1, u2, u3 = load_shared_float4(raw_at + int64(next_raw))
                entry_at = int32(min(int32(entry_at + int32(16)), last_at))
                later_place, later_raw, later_gate, _ = load_shared4(entry_at)
                half, ratio, turn = int32(half ^ int32(4 * PIECE)), load_shared_float(next_gate), int32(TURN)
                keep_scaled(to_at + int64(half), factor * ratio, u0, u1, u2, u3)
                if done >= resident and done < count:
                    slot, parity = wait_for_piece(barriers, slot, parity)
                cuda.syncwarp(FULL_WARP)
                while turn <= rows:
                    next_w, next_x = w_at + 4 * next8, x_at + int64(128)
                    if turn == rows:
                        next_w, next_x = own_at + int64(place_after), scaled_at + int64(half)
                    (
                        acc,
                        (a0, a1, a2, a3, a4, a5, a6, a7),
                        (p0, p1, p2, p3, p4, p5, p6, p7),
                        (b0, b1, b2, b3, b4, b5, b6, b7),
                        (q0, q1, q2, q3, q4, q5, q6, q7),
                        (c0, c1, c2, c3, c4, c5, c6, c7),
                        (r0, r1, r2, r3, r4, r5, r6, r7),
                    ) = add_turn(
                        *(acc, step, w_at, x_at, next_w, next_x),
                        *((a0, a1, a2, a3, a4, a5, a6, a7), (p0, p1, p2, p3, p4, p5, p6, p7)),
                        *((b0, b1, b2, b3, b4, b5, b6, b7), (q0, q1, q2, q3, q4, q5, q6, q7)),
                        *((c0, c1, c2, c3, c4, c5, c6, c7), (r0, r1, r2, r3, r4, r5, r6, r7)),
                    )
                    turn, w_at, x_at = int32(turn + TURN), next_w, next_x
                place_after, next_raw, next_gate = later_place, later_raw, later_gate
            release(barriers, done, resident, free, lane)
        return acc, slot, parity

    return prepare_ring, begin_pieces, end_pieces, feed_ring
