"""Products with gated blocks: device functions for rows of inputs (`weights/gated.py` defines the product).

The results equal `reference.propagate_chosen`: logits, the choice, gates and drives have the same bits.

add_strip : one warp, one strip of up to 32 columns, one column per lane, for some rows of inputs. It walks the rows of
            the blocks that some lane needs, in ascending order, with one FMA per term. The weights of the next stages
            are copied to a ring in shared memory of the warp while those of the present stage are multiplied.
choose    : all threads of a block; logits become gates. The smallest chosen logit is found bit by bit, equal ones are
            taken in ascending order. One warp makes the ratios, and sums them in ascending order of blocks.

=========== ======== ===========================================================================================
array       memory   shape, dtype, contents
=========== ======== ===========================================================================================
inputs      shared   (samples, n_pre) float32, rows of inputs, silent ones as zeros
active      shared   (samples, block rows) int32, 1 if an input of the block row is not zero
gates       shared   (samples, blocks) float32, logits and then gates, 0 for blocks that are not chosen
keys        shared   (blocks,) int32: bits of a logit in the order of the numbers; then the place among the chosen
ratios      shared   (kept blocks,) float32, of the chosen blocks in ascending order
words       shared   (CHOICE_WORDS,) int32, counts per warp
maxima      shared   (samples, 32) int32, per warp the bits of the largest magnitude among its inputs
ring        shared   per warp, (STAGES, stage bytes), rows of a strip; then (samples, 32) float32, sums of several rows
                     of inputs
strips      global   `gated_matrix.RowStrips`: values float32 or uint16 bits of bfloat16; offsets (strips, block rows)
                     int64, where the rows of a block row begin, -1 where no block is stored
=========== ======== ===========================================================================================

No variable that holds a tuple, with names or without, is assigned in two places, as before a loop and in it: libNVVM of
CUDA 12.8 and of 13.0 does not finish compiling a kernel where such variables meet. Numbers are carried over one by one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import cuda, device_function, libdevice
from eventrnn.cuda.kernels.ptx import (
    OPEN_GROUPS,
    commit_copies,
    copy_async16,
    exp_float32,
    load_shared_float4,
    max_of_warp,
    min_of_warp,
    shared_float32,
    shared_int32,
    shared_uint16,
    sum_of_warp,
    wait_for_oldest_copies,
)
from eventrnn.cuda.kernels.strip_product import FULL_WARP, load8, popcount
from eventrnn.cuda.tables import LANES, STAGES

assert OPEN_GROUPS == STAGES - 1, "the oldest of all stages must be complete"

# A key is the bits of a float32 as an integer that is in the same order: those of a negative number are flipped, apart
# from the sign. The same operation turns a key into bits.
LOWEST_KEY, MAGNITUDE = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)

# Places of `words`: counts of two votes per warp, and whether the gates are not finite.
SECOND_COUNTS, NOT_FINITE = 32, 64


class StripRows(NamedTuple):
    """One strip and the blocks that its columns read."""

    #: int64, address of the values of all strips
    values_at: Any
    #: array of int64, offsets of the rows of the strip's block rows
    offsets: Any
    #: int32, columns of the strip
    width: Any
    #: int32, rows that are copied at a time
    stage_rows: Any
    #: int32, presynaptic units
    n_pre: Any
    #: int32, block rows
    block_rows: Any
    #: int32, rows of a block
    rows_of_block: Any
    #: int32, block columns
    block_columns: Any
    #: int32, block columns of the first and of the last column of the strip, and of the lane's column
    first_column: Any
    last_column: Any
    block_column: Any
    #: boolean, whether the lane has a column
    mine: Any


class Received(NamedTuple):
    """Rows of inputs in shared memory, with what says which blocks they need; the docstring above has the shapes."""

    #: int32, number of rows
    samples: Any
    #: int64, addresses of `inputs`, `active` and `gates`
    inputs_at: Any
    active_at: Any
    gates_at: Any
    #: int32, numbers from one row to the next, of each
    input_pitch: Any
    active_pitch: Any
    gates_pitch: Any


@device_function
def key_of(word):
    """The key of the bits of a float32, and the bits of a key."""
    return int32(word ^ ((word >> int32(31)) & MAGNITUDE))


@device_function
def gate_of(strip, received, sample, row):
    """The gate of the lane's block in a block row."""
    gate = np.float32(0)
    if strip.mine:
        at = row * strip.block_columns + strip.block_column
        gate = shared_float32(received.gates_at)[int32(sample * received.gates_pitch + at)]
    return gate


@device_function
def needed_rows(strip, received, first, lane):
    """Of the 32 block rows from `first` on, a mask of those that the warp has to multiply. Each lane looks at one."""
    row, needed = int32(first + lane), False
    active, gates = shared_int32(received.active_at), shared_float32(received.gates_at)
    if row < strip.block_rows and strip.offsets[row] >= 0:
        sample = int32(0)
        while sample < received.samples:
            if active[int32(sample * received.active_pitch + row)] != 0:
                at = int32(sample * received.gates_pitch + row * strip.block_columns)
                column = strip.first_column
                while column <= strip.last_column:
                    if gates[int32(at + column)] != 0:
                        needed = True
                    column = int32(column + 1)
            sample = int32(sample + 1)
    return int32(cuda.ballot_sync(FULL_WARP, needed))


@device_function
def next_row(strip, received, first, mask, lane):
    """The next block row to multiply, of those in `mask` from block row `first` on and of later ones.

    Returns it, or the number of block rows if there is none, and the new `first` and `mask`.
    """
    while mask == 0 and first + LANES < strip.block_rows:
        first = int32(first + LANES)
        mask = needed_rows(strip, received, first, lane)
    row = strip.block_rows
    if mask != 0:
        row = int32(first + cuda.ffs(mask) - 1)
        mask = int32(mask & int32(mask - 1))
    return row, first, mask


@device_function
def rows_in(strip, row):
    """Rows of a block row; the last one may have fewer."""
    return int32(min(strip.rows_of_block, strip.n_pre - row * strip.rows_of_block))


@device_function
def inputs8(at):
    """Eight neighbouring inputs, from a byte address on that is a multiple of 16."""
    a, b = load_shared_float4(at), load_shared_float4(at + int64(16))
    return a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3]


@device_function
def sum_of_sample(acc, sums, samples, sample, lane):
    """The result of `add_strip` for one row of inputs."""
    if samples > 1:
        acc = sums[int32(sample * LANES + lane)]
    return acc


def make_add_strip(narrow: bool, stage_bytes: int):
    """The device functions add_strip, begin_strip and end_factor for float32 weights, or for bfloat16 ones.

    stage_bytes : bytes of weights that a warp copies at a time

    add_strip(start, strip, received, ring_at, lane) -> start + sum over j of weight * (gate * input). For one row of
    inputs it returns the sum; those of several rows lie behind the ring (`sum_of_sample`).

    begin_strip(strip, received, ring_at, lane) starts the first copies; for a strip of a factor,
    end_factor(start, factor, received, ring_at, lane) does the rest.
    """
    size, pointer = (2, shared_uint16) if narrow else (4, shared_float32)

    if narrow:

        @device_function
        def weight(values, at):
            # The upper half of a float32 is a bfloat16.
            return libdevice.int_as_float(int32(values[at]) << int32(16))
    else:

        @device_function
        def weight(values, at):
            return values[at]

    @device_function
    def weights8(values, at, width):
        return (
            weight(values, at),
            weight(values, int32(at + width)),
            weight(values, int32(at + 2 * width)),
            weight(values, int32(at + 3 * width)),
            weight(values, int32(at + 4 * width)),
            weight(values, int32(at + 5 * width)),
            weight(values, int32(at + 6 * width)),
            weight(values, int32(at + 7 * width)),
        )

    @device_function
    def start_stage(strip, received, row, first, mask, done, slot_at, lane):
        """Start copying the next rows: `done` rows of block row `row` were copied. Returns the place after them."""
        if row < strip.block_rows:
            rows = int32(min(strip.stage_rows, rows_in(strip, row) - done))
            source = strip.values_at + (strip.offsets[row] + int64(done) * strip.width) * size
            pieces, k = int32((rows * strip.width * size) >> 4), lane
            while k < pieces:
                copy_async16(slot_at + int64(16) * k, source + int64(16) * k)
                k = int32(k + LANES)
            done = int32(done + rows)
            if done >= rows_in(strip, row):
                row, first, mask = next_row(strip, received, first, mask, lane)
                done = int32(0)
        commit_copies()
        return row, first, mask, done

    @device_function
    def add_rows(acc, values, inputs_at, at, rows, width, gate, lane):
        """Add the terms of `rows` rows of a stage, whose inputs lie from `at` on.

        The numbers of the next eight rows are loaded before the present ones are added; the last loads are not used.
        """
        k, w, inputs = int32(0), lane, shared_float32(inputs_at)
        # Up to the first input whose address is a multiple of 16.
        while k < rows and ((at + k) & int32(3)) != 0:
            acc = cuda.fma(weight(values, w), gate * inputs[int32(at + k)], acc)
            k, w = int32(k + 1), int32(w + width)
        x_at = inputs_at + int64(4) * (at + k)
        w0, w1, w2, w3, w4, w5, w6, w7 = weights8(values, w, width)
        x0, x1, x2, x3, x4, x5, x6, x7 = inputs8(x_at)
        while k + 8 <= rows:
            k, w, x_at = int32(k + 8), int32(w + 8 * width), x_at + int64(32)
            next_weights, next_x = weights8(values, w, width), inputs8(x_at)
            acc = cuda.fma(w0, gate * x0, acc)
            acc = cuda.fma(w1, gate * x1, acc)
            acc = cuda.fma(w2, gate * x2, acc)
            acc = cuda.fma(w3, gate * x3, acc)
            acc = cuda.fma(w4, gate * x4, acc)
            acc = cuda.fma(w5, gate * x5, acc)
            acc = cuda.fma(w6, gate * x6, acc)
            acc = cuda.fma(w7, gate * x7, acc)
            w0, w1, w2, w3, w4, w5, w6, w7 = next_weights
            x0, x1, x2, x3, x4, x5, x6, x7 = next_x
        while k < rows:
            acc = cuda.fma(weight(values, w), gate * inputs[int32(at + k)], acc)
            k, w = int32(k + 1), int32(w + width)
        return acc

    @device_function
    def add_stage(acc, sums, strip, received, values, row, used, rows, lane):
        """Multiply a stage with every row of inputs that chose the block row. Returns the sum of the only one."""
        at, sample = int32(row * strip.rows_of_block + used), int32(0)
        while sample < received.samples:
            gate = gate_of(strip, received, sample, row)
            if gate != 0:
                place = int32(sample * LANES + lane)
                if received.samples > 1:
                    acc = sums[place]
                first_input = int32(sample * received.input_pitch + at)
                acc = add_rows(acc, values, received.inputs_at, first_input, rows, strip.width, gate, lane)
                if received.samples > 1:
                    sums[place] = acc
            sample = int32(sample + 1)
        return acc

    @device_function
    def begin_strip(strip, received, ring_at, lane):
        """Start copying the first stages. Returns the first block row and the place after the copies."""
        mask = needed_rows(strip, received, int32(0), lane)
        row, first, mask = next_row(strip, received, int32(0), mask, lane)
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
        slot, used = int32(0), int32(0)
        while row < strip.block_rows:
            free_at = ring_at + int64(stage_bytes) * ((slot + int32(STAGES - 1)) & int32(STAGES - 1))
            ahead, last, last_mask, done = start_stage(strip, received, ahead, last, last_mask, done, free_at, lane)
            wait_for_oldest_copies()
            # The other lanes have copied parts of the rows.
            cuda.syncwarp(FULL_WARP)
            rows = int32(min(strip.stage_rows, rows_in(strip, row) - used))
            values = pointer(ring_at + int64(stage_bytes) * slot)
            acc = add_stage(acc, sums, strip, received, values, row, used, rows, lane)
            # The stage is overwritten in the next round.
            cuda.syncwarp(FULL_WARP)
            used = int32(used + rows)
            if used >= rows_in(strip, row):
                row, first, mask = next_row(strip, received, first, mask, lane)
                used = int32(0)
            slot = (slot + int32(1)) & int32(STAGES - 1)
        return acc

    @device_function
    def add_strip(start, strip, received, ring_at, lane):
        return end_strip(start, strip, received, begin_strip(strip, received, ring_at, lane), ring_at, lane)

    @device_function
    def end_factor(start, factor, received, ring_at, lane):
        """Multiply a strip of a factor, which is one block row that is always needed, after `begin_strip`."""
        none, ahead, done = int32(0), int32(0), int32(min((STAGES - 1) * factor.stage_rows, factor.n_pre))
        if done == factor.n_pre:
            ahead, done = factor.block_rows, int32(0)
        begun = none, none, none, ahead, none, none, done
        return end_strip(start, factor, received, begun, ring_at, lane)

    return add_strip, begin_strip, end_factor


@device_function
def before_and_all(counts, first, me):
    """The sums of counts[first:] over the earlier warps and over all warps."""
    lane, warp, warps = me
    each = int32(0)
    if lane < warps:
        each = counts[int32(first + lane)]
    earlier = each
    if lane >= warp:
        earlier = int32(0)
    return sum_of_warp(earlier), sum_of_warp(each)


@device_function
def sum_in_order(numbers, count):
    """The sum of numbers[:count] from +0 on, one after the other."""
    total, k = np.float32(0), int32(0)
    # The next eight are loaded before the present ones are added; the last loads are not used.
    a, b, c, d, e, f, g, h = load8(numbers, k)
    while k + 8 <= count:
        k = int32(k + 8)
        following = load8(numbers, k)
        total = total + a
        total = total + b
        total = total + c
        total = total + d
        total = total + e
        total = total + f
        total = total + g
        total = total + h
        a, b, c, d, e, f, g, h = following
    while k < count:
        total = total + numbers[k]
        k = int32(k + 1)
    return total


@device_function
def place_chosen(gates, keys, ratios, words, n, lowest, room, me):
    """Write the logits of the chosen blocks to `ratios`, in ascending order, and their places to `keys`, else -1.

    lowest : the smallest key that is chosen; room : how many blocks with this key are chosen
    """
    lane, warp, warps = me
    lanes_below = int32((int32(1) << lane) - 1)
    ties, chosen, first = int32(0), int32(0), int32(0)
    while first < n:
        b = int32(first + warp * LANES + lane)
        key, logit = LOWEST_KEY, np.float32(0)
        if b < n:
            key, logit = keys[b], gates[b]
        tied = b < n and key == lowest
        votes = cuda.ballot_sync(FULL_WARP, tied)
        if lane == 0:
            words[warp] = popcount(votes)
        cuda.syncthreads()
        before, every = before_and_all(words, int32(0), me)
        taken = b < n and key > lowest
        if tied and int32(ties + before + popcount(votes & lanes_below)) < room:
            taken = True
        ties = int32(ties + every)
        votes = cuda.ballot_sync(FULL_WARP, taken)
        if lane == 0:
            words[int32(SECOND_COUNTS + warp)] = popcount(votes)
        cuda.syncthreads()
        before, every = before_and_all(words, int32(SECOND_COUNTS), me)
        if b < n:
            keys[b] = int32(-1)
            if taken:
                place = int32(chosen + before + popcount(votes & lanes_below))
                keys[b], ratios[place] = place, logit
        chosen = int32(chosen + every)
        first = int32(first + warps * LANES)
    cuda.syncthreads()


@device_function
def make_ratios(ratios, n, kept, softmax, maxima, warps, lane):
    """One warp turns the chosen logits into gates; True if gates and products with the inputs are finite."""
    best, k = LOWEST_KEY, lane
    while k < kept:
        word = libdevice.float_as_int(ratios[k])
        if softmax != 0:
            best = int32(max(best, key_of(word)))
        else:
            best = int32(max(best, word & MAGNITUDE))
        k = int32(k + LANES)
    best = max_of_warp(best)
    pivot = libdevice.int_as_float(key_of(best))
    if softmax == 0:
        # The first of the logits of this magnitude.
        place, k = kept, lane
        while k < kept:
            if place == kept and (libdevice.float_as_int(ratios[k]) & MAGNITUDE) == best:
                place = k
            k = int32(k + LANES)
        pivot = ratios[min_of_warp(place)]
    cuda.syncwarp(FULL_WARP)
    k = lane
    while k < kept:
        ratio = np.float32(1)
        if softmax != 0:
            ratio = exp_float32(ratios[k] - pivot)
        elif pivot != 0:
            ratio = ratios[k] / pivot
        ratios[k] = ratio
        k = int32(k + LANES)
    cuda.syncwarp(FULL_WARP)
    factor = np.float32(n) / sum_in_order(ratios, kept)
    cuda.syncwarp(FULL_WARP)
    best, k = int32(0), lane
    while k < kept:
        gate = ratios[k] * factor
        ratios[k] = gate
        best = int32(max(best, libdevice.float_as_int(gate) & MAGNITUDE))
        k = int32(k + LANES)
    value = int32(0)
    if lane < warps:
        value = maxima[lane]
    largest = libdevice.int_as_float(max_of_warp(best)) * libdevice.int_as_float(max_of_warp(value))
    return factor - factor == 0 and largest - largest == 0


@device_function
def choose(gates, keys, ratios, words, maxima, n, kept, softmax, me):
    """Turn the logits of `n` blocks into gates. Returns True where they are not finite. All threads must call it.

    The caller synchronises the block before other threads than the own one read `gates`.
    """
    lane, warp, warps = me
    thread, threads = int32(warp * LANES + lane), int32(warps * LANES)
    bad, b, own = int32(0), thread, LOWEST_KEY
    while b < n:
        logit = gates[b] + np.float32(0)
        if logit - logit != 0:
            bad = int32(1)
        gates[b] = logit
        keys[b] = key_of(libdevice.float_as_int(logit))
        b = int32(b + threads)
    if thread < n:
        own = keys[thread]
    faulty = cuda.syncthreads_or(bad) != 0
    # The largest number that at least `kept` keys reach, found bit by bit.
    lowest, bit = LOWEST_KEY, int32(31)
    while bit >= 0:
        candidate = int32(int64(lowest) + (int64(1) << int64(bit)))
        reached = int32(cuda.syncthreads_count(int32(thread < n and own >= candidate)))
        b = int32(thread + threads)
        while b - thread < n:
            reached = int32(reached + cuda.syncthreads_count(int32(b < n and keys[b] >= candidate)))
            b = int32(b + threads)
        if reached >= kept:
            lowest = candidate
        bit = int32(bit - 1)
    above = int32(cuda.syncthreads_count(int32(thread < n and own > lowest)))
    b = int32(thread + threads)
    while b - thread < n:
        above = int32(above + cuda.syncthreads_count(int32(b < n and keys[b] > lowest)))
        b = int32(b + threads)
    place_chosen(gates, keys, ratios, words, n, lowest, int32(kept - above), me)
    if warp == 0:
        finite = make_ratios(ratios, n, kept, softmax, maxima, warps, lane)
        if lane == 0:
            words[NOT_FINITE] = int32(not finite)
    cuda.syncthreads()
    b = thread
    while b < n:
        gate = np.float32(0)
        if keys[b] >= 0:
            gate = ratios[keys[b]]
        gates[b] = gate
        b = int32(b + threads)
    return faulty or words[NOT_FINITE] != 0
