"""Block segments of 64 columns, output by output: where they lie, and which of them belong to active units.

A *strip* is the columns of the segments that lie at one position of a drive row; their sums fill vector registers, so
that no drive is read or written between two terms. The segments of a strip lie together, in the order of units. A
*group* is up to 64 of them, of units within one range of 512 units. Which of these units have an event is seen from one
vector, the bits of the range: each byte of a second vector selects the byte of a unit, and each byte of a third one the
bit. A column tile has in `pools.pointers`

    strips  STRIP_FIELDS numbers each, and those of one strip more at the end
    groups  GROUP_FIELDS numbers each, after those of an empty group
    fired   512 bits per range of units, which the kernel sets
    lists   uint16, segments of units with an event, which the kernel writes: numbers within a strip

in `pools.values`, before the segments, 64 bytes and 64 bits per group, uint8, zero after its last segment; and in
`pools.index` the unit of every segment, uint16. A thread writes what belongs to its own column tiles.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from eventrnn.cpu.kernels.emit import carry_each, for_each
from eventrnn.cpu.kernels.jit import inlined
from eventrnn.cpu.kernels.simd import AVX512, I1, I16, I32, I64, LANES, address, call, may_use
from eventrnn.cpu.tables import (
    GROUP_FIELDS,
    GROUP_SEGMENTS,
    PITCH,
    POINTERS,
    RANGE_UNITS,
    STRIP_BASE,
    STRIP_FIELDS,
    STRIP_GROUP,
    STRIP_POSITION,
    VALUES,
)

I8 = ir.IntType(8)

# 512 bits as bytes and as words of 16 bits.
BYTES, WORDS = ir.VectorType(I8, 4 * LANES), ir.VectorType(I16, 2 * LANES)

#: Whether there are instructions that select bytes of a vector by bytes of another one, and that compress words.
#: Without them the units of a strip are tested one by one, which takes longer than sums in the order of events.
SELECTS = AVX512 and all(map(may_use, ("avx512bw", "avx512vbmi", "avx512vbmi2")))


def mark_unit(builder, bits, unit):
    """Set the bit of a unit, int32, among the bits from a pointer to bytes on."""
    byte = builder.gep(bits, [builder.sext(builder.lshr(unit, I32(3)), I64)])
    bit = builder.shl(I8(1), builder.trunc(builder.and_(unit, I32(7)), I8))
    builder.store(builder.or_(builder.load(byte), bit), byte)


@inlined
def strips_of(column_tile, pointers, n_pre):
    """Where the tables of a column tile begin: strips, groups after the empty one, fired, lists, and the segments.

    The segments are counted in bytes of `pools.values`. The sixth number is that of the groups. No unit has fired.
    """
    strips, n_strips = column_tile[POINTERS], column_tile[PITCH]
    groups = strips + STRIP_FIELDS * (n_strips + 1) + GROUP_FIELDS
    n_groups = pointers[groups - GROUP_FIELDS - STRIP_FIELDS + STRIP_GROUP]
    fired = groups + GROUP_FIELDS * n_groups
    lists = fired + (n_pre + RANGE_UNITS - 1) // RANGE_UNITS * (RANGE_UNITS // 64)
    segments = 4 * column_tile[VALUES] + n_groups * (2 * GROUP_SEGMENTS)
    return strips, groups, fired, lists, segments, n_groups


@inlined
def forget_events(pointers, fired, lists):
    """Clear the bits of all units."""
    for i in range(fired, lists):
        pointers[i] = 0


@inlined
def strip_at(pointers, strip, groups):
    """Position of a strip in a drive row, its first segment, and where its list ends."""
    following = strip + STRIP_FIELDS
    end = pointers[groups + GROUP_FIELDS * (pointers[following + STRIP_GROUP] - 1) + 3]
    return pointers[strip + STRIP_POSITION], pointers[strip + STRIP_BASE], end


@intrinsic
def list_segments(typingctx, tests, start, pointers, groups, count, fired, lists):
    """Write the numbers of the segments whose units have an event to the lists, group by group.

    Each of the `count` groups from `groups` on, after an empty one, gets where its list ends. Up to 31 numbers more are
    written.

    tests    : int8, from element `start` on the bytes and bits of the groups
    pointers : int64; `fired` and `lists` say where the bits of units and the lists, uint16, are
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        bytes_at = address(context, builder, kinds[0], args[0], args[1])
        group_at, fired_at, list_at = (address(context, builder, kinds[2], args[2], args[k]) for k in (3, 5, 6))
        fired_at = builder.bitcast(fired_at, I8.as_pointer())
        list_at = builder.bitcast(list_at, I16.as_pointer())
        end_at = cgutils.alloca_once_value(builder, I64(0))

        def group(g):
            record = builder.gep(group_at, [builder.mul(g, I64(GROUP_FIELDS))])
            first, row, size = (builder.load(builder.gep(record, [I64(k)])) for k in range(3))
            byte_at = builder.gep(bytes_at, [builder.mul(g, I64(2 * GROUP_SEGMENTS))])
            bit_at, bits = builder.gep(byte_at, [I64(GROUP_SEGMENTS)]), builder.gep(fired_at, [first])
            row = builder.trunc(row, I16)
            if SELECTS:
                _list_by_selection(builder, byte_at, bit_at, bits, row, list_at, end_at)
            else:
                _list_one_by_one(builder, byte_at, bit_at, bits, row, size, list_at, end_at)
            builder.store(builder.load(end_at), builder.gep(record, [I64(3)]))

        for_each(builder, args[4], group, unrolled=False)
        return context.get_dummy_value()

    return types.void(tests, start, pointers, groups, count, fired, lists), generate


def _list_by_selection(builder, byte_at, bit_at, bits, row, list_at, end_at):
    """Append the numbers from `row` on, of the segments of a group whose units have an event, to a list."""
    byte, bit, fired = (
        builder.load(builder.bitcast(each, BYTES.as_pointer()), align=1) for each in (byte_at, bit_at, bits)
    )
    selected = builder.and_(call(builder, "llvm.x86.avx512.permvar.qi.512", BYTES, [fired, byte]), bit)
    mask = builder.icmp_unsigned("!=", selected, ir.Constant(BYTES, [0] * GROUP_SEGMENTS))
    words = builder.bitcast(mask, I64)
    undefined = ir.Constant(WORDS, ir.Undefined)
    numbers = builder.insert_element(undefined, row, I32(0))
    numbers = builder.shuffle_vector(numbers, undefined, ir.Constant(ir.VectorType(I32, 2 * LANES), [0] * 2 * LANES))
    for part in range(2):
        some = builder.trunc(builder.lshr(words, I64(32 * part)), I32)
        chosen = builder.bitcast(some, ir.VectorType(I1, 2 * LANES))
        these = builder.add(numbers, ir.Constant(WORDS, list(range(32 * part, 32 * part + 32))))
        packed = call(builder, "llvm.x86.avx512.mask.compress.v32i16", WORDS, [these, these, chosen])
        end = builder.load(end_at)
        builder.store(packed, builder.bitcast(builder.gep(list_at, [end]), WORDS.as_pointer()), align=2)
        builder.store(builder.add(end, builder.zext(call(builder, "llvm.ctpop.i32", I32, [some]), I64)), end_at)


def _list_one_by_one(builder, byte_at, bit_at, bits, row, size, list_at, end_at):
    """`_list_by_selection` for other processors: without a branch, of the `size` segments of the group."""

    def segment(k):
        fired = builder.load(builder.gep(bits, [builder.zext(builder.load(builder.gep(byte_at, [k])), I64)]))
        sent = builder.icmp_unsigned("!=", builder.and_(fired, builder.load(builder.gep(bit_at, [k]))), I8(0))
        end = builder.load(end_at)
        builder.store(builder.add(row, builder.trunc(k, I16)), builder.gep(list_at, [end]))
        builder.store(builder.add(end, builder.zext(sent, I64)), end_at)

    for_each(builder, size, segment)


def sum_listed(builder, lists, count, units, segments, base, totals, add):
    """Emit the loop over the `count` listed segments of a strip; returns the sums, vectors, that begin as `totals`.

    add(unit, segment, totals) emits the sums with one segment more. `lists` points to the numbers of the segments
    within the strip, `units` to the unit of each row, `segments` to rows of 64 weights, of which `base` is the first of
    the strip.
    """

    def listed(k, sums):
        row = builder.add(base, builder.zext(builder.load(builder.gep(lists, [k])), I64))
        unit = builder.zext(builder.load(builder.gep(units, [row])), I64)
        return add(unit, builder.gep(segments, [builder.mul(row, I64(4 * LANES))]), sums)

    return carry_each(builder, count, totals, listed)
