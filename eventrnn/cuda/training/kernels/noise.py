"""Random masks on the GPU, the same as those of `training.bptt.noise`: NumPy's Philox, by seed, step and place.

`numpy.random.Philox` with key (seed, place) and counter (0, 0, step, 0) increments its counter before each block of
four 64-bit words, and takes from each word two float32: the upper 24 of its lower 32 bits, then the upper 24 of its
upper 32 bits, times 2^-24. Block q of a mask therefore holds its elements 8 q to 8 q + 7, whatever thread draws it.

A thread owns every n-th block. All arrays are in global memory.

Where several devices share a batch, each draws its own samples of the masks of the joined batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numba import int64, types

from eventrnn.cuda.device import device_function, libdevice
from eventrnn.cuda.kernels.ptx import global_float32, global_int64, global_uint8
from eventrnn.cuda.training.kernels.threads import BYTES, STORES, first_element, float_of, stride

if TYPE_CHECKING:
    from eventrnn.training.bptt.noise import Mask

# Constants of Philox4x64-10 (Salmon et al. 2011), as signed numbers.
MULTIPLY_0, MULTIPLY_1 = np.uint64(0xD2E7470EE14C6C93).astype(np.int64), np.uint64(0xCA5A826395121157).astype(np.int64)
WEYL_0, WEYL_1 = np.uint64(0x9E3779B97F4A7C15).astype(np.int64), np.uint64(0xBB67AE8584CAA73B).astype(np.int64)
ROUNDS = 10

LOW, UNIT = np.int64(0xFFFFFFFF), np.float32(2.0**-24)

# Numbers of one block.
PER_BLOCK = 8


class Part(NamedTuple):
    """The elements of a mask of the joined batch that one device draws: `width` of them, from `offset` on, of each
    `apart` ones; and the blocks of numbers that they touch."""

    width: int
    apart: int
    offset: int
    blocks: int


def part_of(mask: Mask, steps: int, batch: int, rank: int, ranks: int) -> Part:
    """The part of a mask that device `rank` of `ranks` draws, for `batch` samples of the joined ones. A mask that the
    samples share is drawn whole by every device."""
    width = joined = int(np.prod(mask.sizes(steps, batch)))
    if "B" in mask.shape and ranks > 1:
        width = int(np.prod(mask.sizes(1, batch)))
        joined = width * ranks
    offset = rank * width if joined > width else 0
    blocks = -(-width // PER_BLOCK)
    # A part that does not begin with a block can touch one more.
    return Part(width, joined, offset, blocks + bool(joined > width and (offset % PER_BLOCK or joined % PER_BLOCK)))


@device_function
def multiply_high(a, b):
    """The upper 64 bits of the product of two unsigned 64-bit numbers."""
    return int64(libdevice.umul64hi(a, b))


@device_function
def philox(counter, step, seed, place):
    """Four words, int64, of the block with that counter."""
    c0, c1, c2, c3 = int64(counter), int64(0), int64(step), int64(0)
    k0, k1 = int64(seed), int64(place)
    for _ in range(ROUNDS):
        high0, low0 = multiply_high(MULTIPLY_0, c0), MULTIPLY_0 * c0
        high1, low1 = multiply_high(MULTIPLY_1, c2), MULTIPLY_1 * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + WEYL_0, k1 + WEYL_1
    return c0, c1, c2, c3


def draw_kernel():
    """The kernel that draws a mask of bytes, and its signature: 1 where the number is at least `rate`, else 0.

    job_at : int64, its first entry is the step
    count  : elements that are drawn; element i lies at out_at + (i // columns) * pitch + i % columns
    width, apart, offset, touched : see `Part`: element i is number i % width + (i // width) * apart + offset of the
             joined batch, whose numbers are drawn in blocks
    """

    def draw(job_at, seed, place, rate_bits, count, columns, pitch, out_at, width, apart, offset, touched):
        step, rate, out = global_int64(job_at)[0], float_of(rate_bits), global_uint8(out_at)
        own, own_apart = first_element(), stride()
        while own < count // width * touched:
            period = own // touched
            begin = period * apart + offset
            block = begin // PER_BLOCK + (own - period * touched)
            words = philox(block + 1, step, seed, place)
            # The first block may begin before the part does.
            i = block * PER_BLOCK - begin
            at = period * width + max(i, int64(0))
            row = at // columns
            column = at - row * columns
            for k in range(PER_BLOCK):
                if 0 <= i + k < width:
                    # Selected by comparison, since a tuple is not indexed by a variable at no cost.
                    word = words[0] if k < 2 else words[1] if k < 4 else words[2] if k < 6 else words[3]
                    if k % 2:
                        word = word >> 32
                    number = np.float32((word & LOW) >> 8) * UNIT
                    out[row * pitch + column] = 1 if number >= rate else 0
                    column += 1
                    if column == columns:
                        row, column = row + 1, int64(0)
            own += own_apart

    return draw, types.void(*[types.int64] * 12)


def drop_weights_kernel(precision: str):
    """The kernel of DropConnect, and its signature: weights (count,) float32 times a mask of bytes times a scale, as
    operands. A thread owns every n-th element."""
    store, size = STORES[precision], BYTES[precision]

    def drop_weights(weights_at, mask_at, scale_bits, count, out_at):
        weights, mask, scale = global_float32(weights_at), global_uint8(mask_at), float_of(scale_bits)
        i, step = first_element(), stride()
        while i < count:
            factor = scale if mask[i] else np.float32(0)
            store(out_at + size * i, weights[i] * factor)
            i += step

    return drop_weights, types.void(*[types.int64] * 5)
