"""Parts of the kernels of `tensor_core_cluster.py`: weights that a lane holds, products of tiles, cell updates."""

from __future__ import annotations

import numpy as np
from numba import int32, int64

from eventrnn.cuda.device import device_function, libdevice
from eventrnn.cuda.kernels.cluster import in_all_lanes
from eventrnn.cuda.kernels.ptx import (
    fma,
    global_float32,
    load_readonly2,
    load_shared,
    load_shared4,
    load_shared_float2,
    load_shared_uint16,
    store_shared2,
)
from eventrnn.cuda.kernels.tensor_core_cells import ONE
from eventrnn.cuda.kernels.tensor_core_ptx import (
    load_one_column,
    load_readonly_word,
    load_shared2,
    load_two_columns,
    store_shared_float2,
    store_shared_word,
    tanh_approx,
)

#: samples of a row of y: the columns of a fragment
SAMPLES = 8

#: columns of a tile, and rows of a step
TILE = 16

#: bytes of a row of y, of the weights of a step, and of the units of a step
ROW_BYTES, STEP_BYTES, UNITS_BYTES = 2 * SAMPLES, 4 * 4 * 32, 2 * TILE

ZERO, HALF = np.float32(0), np.float32(0.5)


def make_hold(count: int, load, stride: int):
    """The device function hold(address): the words of `count` loads, which are `stride` bytes apart, as one tuple."""
    if count == 1:
        return load
    rest = make_hold(count - 1, load, stride)

    @device_function
    def hold(address):
        return load(address) + rest(address + int64(stride))

    return hold


@device_function
def load_row(address):
    """One word as a tuple."""
    return (load_readonly_word(address),)


def make_held_product(count: int, multiply):
    """The device function product(words, rows, y_at, sums): the product of a tile of 2 * count steps that is held.

    words, rows : what this lane holds of the weights and of the rows
    y_at        : shared address of the outputs
    s0 to t3    : two sums, to which the products are added, one of which gets the even steps
    """
    rest = make_held_product(count - 1, multiply) if count > 1 else None

    @device_function
    def product(words, rows, y_at, s0, s1, s2, s3, t0, t1, t2, t3):
        b0, b1, b2, b3 = load_two_columns(int32(y_at + rows[0]))
        s0, s1, s2, s3 = multiply(words[0], words[1], words[2], words[3], b0, b1, s0, s1, s2, s3)
        t0, t1, t2, t3 = multiply(words[4], words[5], words[6], words[7], b2, b3, t0, t1, t2, t3)
        return rest(words[8:], rows[1:], y_at, s0, s1, s2, s3, t0, t1, t2, t3)

    @device_function
    def last(words, rows, y_at, s0, s1, s2, s3, t0, t1, t2, t3):
        b0, b1, b2, b3 = load_two_columns(int32(y_at + rows[0]))
        s0, s1, s2, s3 = multiply(words[0], words[1], words[2], words[3], b0, b1, s0, s1, s2, s3)
        t0, t1, t2, t3 = multiply(words[4], words[5], words[6], words[7], b2, b3, t0, t1, t2, t3)
        return s0 + t0, s1 + t1, s2 + t2, s3 + t3

    return product if count > 1 else last


@device_function
def fast_sigmoid(x):
    """1 / (1 + exp(-x)) within an absolute error of 2^-12."""
    return fma(HALF, tanh_approx(HALF * x), HALF)


@device_function
def cell_before_event(inside_u, inside_r, inside_g, rec_u, rec_r, rec_g, bias_u, bias_r, bias_g, bias_rec_g, carried):
    """Cell state before the event: `cells.egru_value`, with the approximate sigmoid and tanh."""
    u = fast_sigmoid((inside_u + rec_u) + bias_u)
    r = fast_sigmoid((inside_r + rec_r) + bias_r)
    g = tanh_approx(fma(r, rec_g + bias_rec_g, inside_g + bias_g))
    return fma(u, carried, (ONE - u) * g)


def make_multiply_tile(multiply):
    """The device function multiply_tile(...): the products of steps of a tile whose weights lie in shared memory."""

    @device_function
    def multiply_tile(values_at, units_at, steps, y_at, s0, s1, s2, s3):
        """The product of steps of a tile with the outputs, plus the sums s0 to s3, as a fragment.

        values_at, units_at : shared addresses of the weights of the first step, and of its units, for this lane
        y_at                : shared address of the outputs
        """
        # Two sums, so that a product need not wait for the one before it.
        t0 = t1 = t2 = t3 = ZERO
        left = steps
        while left > 1:
            unit = load_shared_uint16(units_at)
            b0, b1, b2, b3 = load_two_columns(int32(y_at + int32(ROW_BYTES) * unit))
            a0, a1, a2, a3 = load_shared4(values_at)
            e0, e1, e2, e3 = load_shared4(int32(values_at + int32(STEP_BYTES)))
            s0, s1, s2, s3 = multiply(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3)
            t0, t1, t2, t3 = multiply(e0, e1, e2, e3, b2, b3, t0, t1, t2, t3)
            values_at = int32(values_at + int32(2 * STEP_BYTES))
            units_at = int32(units_at + int32(2 * UNITS_BYTES))
            left = int32(left - 2)
        if left > 0:
            # The addresses of the upper lanes are not used; one step follows the last one of a block.
            unit = load_shared_uint16(units_at)
            b0, b1 = load_one_column(int32(y_at + int32(ROW_BYTES) * unit))
            a0, a1, a2, a3 = load_shared4(values_at)
            s0, s1, s2, s3 = multiply(a0, a1, a2, a3, b0, b1, s0, s1, s2, s3)
        return s0 + t0, s1 + t1, s2 + t2, s3 + t3

    return multiply_tile


def make_tiles(count: int, held: int, pairs: int, multiply):
    """The device function run(...): the sums of a warp's first `count` tiles, of which `held` steps each are held.

    words, rows         : what this lane holds of all these tiles
    tile, tiles         : the first of them, and the number of tiles of the block, of which the warp has each `warps`-th
    tiles_at            : shared address of the table of tiles
    values_at, units_at : shared addresses of all weights, and of all units of steps, for this lane
    row_at, sums_at     : shared address of the outputs, and of the sums for this lane
    has_pair            : whether this lane's columns of the fragments are pairs of samples of the cluster
    """
    multiply_tile = make_multiply_tile(multiply)
    held_product = make_held_product(held // 2, multiply) if held else None
    rest = make_tiles(count - 1, held, pairs, multiply)[0] if count > 1 else None
    own_words, own_rows, sums_row = 4 * held, held // 2, 8 * pairs

    @device_function
    def finish(tile, tiles_at, values_at, units_at, row_at, sums_at, has_pair, s0, s1, s2, s3):
        slot, begin, length, _ = load_shared4(int32(tiles_at + 16 * tile))
        left = in_all_lanes(length)
        if left > 0:
            values, units = int32(values_at + int32(STEP_BYTES) * begin), int32(units_at + int32(UNITS_BYTES) * begin)
            s0, s1, s2, s3 = multiply_tile(values, units, left, row_at, s0, s1, s2, s3)
        if has_pair:
            at = int32(sums_at + int32(TILE * sums_row) * slot)
            store_shared_float2(at, s0, s1)
            store_shared_float2(int32(at + 8 * sums_row), s2, s3)

    @device_function
    def last(words, rows, tile, tiles, warps, tiles_at, values_at, units_at, row_at, sums_at, has_pair):
        if tile < tiles:
            zeros = ZERO, ZERO, ZERO, ZERO
            s0, s1, s2, s3 = held_product(words, rows, row_at, *zeros, *zeros)
            finish(tile, tiles_at, values_at, units_at, row_at, sums_at, has_pair, s0, s1, s2, s3)

    @device_function
    def several(words, rows, tile, tiles, warps, tiles_at, values_at, units_at, row_at, sums_at, has_pair):
        last(words, rows, tile, tiles, warps, tiles_at, values_at, units_at, row_at, sums_at, has_pair)
        later = int32(tile + warps), tiles, warps
        rest(words[own_words:], rows[own_rows:], *later, tiles_at, values_at, units_at, row_at, sums_at, has_pair)

    @device_function
    def others(tile, tiles, warps, tiles_at, values_at, units_at, row_at, sums_at, has_pair):
        while tile < tiles:
            finish(tile, tiles_at, values_at, units_at, row_at, sums_at, has_pair, ZERO, ZERO, ZERO, ZERO)
            tile = int32(tile + warps)

    return (several if rest else last), others


@device_function
def _load_drive_of_pair(address):
    return load_readonly_word(address), int32(0)


@device_function
def _load_sums_of_pair(address):
    a, b = load_shared_float2(address)
    return a, b, ZERO, ZERO


@device_function
def _load_sums_of_two(address):
    a, b, c, d = load_shared4(address)
    return libdevice.int_as_float(a), libdevice.int_as_float(b), libdevice.int_as_float(c), libdevice.int_as_float(d)


@device_function
def _store_pair(address, word, _):
    store_shared_word(address, word)


@device_function
def _lay_out_pair(part, row):
    store_shared_word(row, load_shared(part))


@device_function
def _lay_out_two(part, row):
    a, b = load_shared2(part)
    store_shared2(row, a, b)


@device_function
def _lay_out_four(part, row):
    """Nothing: four pairs are a whole row."""


#: by pairs of samples per thread: address of input products -> the word of each pair; a second one is zero if there is
#: none
LOAD_DRIVE = {1: _load_drive_of_pair, 2: load_readonly2}

#: shared address of sums -> four numbers, likewise
LOAD_SUMS = {1: _load_sums_of_pair, 2: _load_sums_of_two}

#: shared address and two words, of which the second one is dropped if there is one pair
STORE_PAIRS = {1: _store_pair, 2: store_shared2}

#: by pairs of samples per cluster: shared addresses of the outputs of a unit and of its row of y, into which they go
LAY_OUT = {1: _lay_out_pair, 2: _lay_out_two, 4: _lay_out_four}


@device_function
def store_outputs(has, sent, y, has_after, after, c):
    """Store the output and the cell state of one sample, if there is such a sample, and if states are asked for."""
    if has:
        global_float32(sent)[0] = y
        if has_after:
            global_float32(after)[0] = c
