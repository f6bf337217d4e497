"""Lists of the events that reach a strip of 64 columns, from a bit per unit and strip.

A strip has block segments of some units; `strips.py` describes it. The kernel looks up the bits of the units that have
an event, a word for 64 strips. The transposed bits say, per strip, which events have a segment there. Their numbers are
listed without a branch per event. So the time depends on the number of events, and not on that of the stored segments.

Events are numbered in chunks of `CHUNK_EVENTS`, so that a number is a byte. An array by event has `CHUNK_PITCH`
elements per chunk.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn.cpu.kernels.emit import carry_each, for_each
from eventrnn.cpu.kernels.simd import I1, I32, I64, LANES, address, call, may_use
from eventrnn.cpu.kernels.strips import BYTES, I8, SELECTS
from eventrnn.cpu.tables import CHUNK_EVENTS, CHUNK_PITCH, LIST_WORDS

# Events of a block: those whose bits, for eight strips, fill a vector of 64 bytes.
BLOCK_EVENTS = 64

# Blocks of a chunk.
CHUNK_BLOCKS = CHUNK_EVENTS // BLOCK_EVENTS

#: A number that is no event, for the places after the last event of a list.
NOBODY = CHUNK_PITCH - 1

#: Whether four events at a time are added, of bytes that are interleaved. Their lists are filled up.
QUADS = SELECTS and may_use("avx512vnni")

_WORDS = ir.VectorType(I64, LANES // 2)


@intrinsic
def look_up(typingctx, ids, begin, count, pointers, records, pitch, by_event):
    """Copy pointers[records + unit * pitch] of each unit of a chunk to `by_event`.

    Elements after the last one, up to a whole block, become zero.

    ids      : int32, units of the events, of which the chunk has `count` > 0, from element `begin` on
    pointers : int64; the elements of the chunk in an array by event begin at pointers[by_event]
    """

    def generate(context, builder, signature, args):
        kinds, count = signature.args, args[2]
        id_at = address(context, builder, kinds[0], args[0], args[1])
        source, target = (address(context, builder, kinds[3], args[3], args[k]) for k in (4, 6))
        last_block = builder.gep(target, [builder.and_(builder.sub(count, I64(1)), I64(-BLOCK_EVENTS))])
        for i in range(0, BLOCK_EVENTS, LANES // 2):
            nothing = ir.Constant(_WORDS, [0] * (LANES // 2))
            builder.store(nothing, builder.bitcast(builder.gep(last_block, [I64(i)]), _WORDS.as_pointer()), align=8)

        def copy(k):
            word = builder.load(_record_of(builder, source, id_at, k, args[5]))
            builder.store(word, builder.gep(target, [k]))

        for_each(builder, count, copy)
        return context.get_dummy_value()

    return types.void(ids, begin, count, pointers, records, pitch, by_event), generate


@intrinsic
def look_up_offsets(typingctx, ids, begin, count, pointers, records, pitch, offsets):
    """As `look_up`, with the lower halves: those of event k of the chunk at element k of int32 from `offsets` on."""

    def generate(context, builder, signature, args):
        kinds = signature.args
        id_at = address(context, builder, kinds[0], args[0], args[1])
        source, target = (address(context, builder, kinds[3], args[3], args[k]) for k in (4, 6))
        target = builder.bitcast(target, I32.as_pointer())

        def copy(k):
            word = builder.load(_record_of(builder, source, id_at, k, args[5]))
            builder.store(builder.trunc(word, I32), builder.gep(target, [k]))

        for_each(builder, args[2], copy)
        return context.get_dummy_value()

    return types.void(ids, begin, count, pointers, records, pitch, offsets), generate


def _record_of(builder, records, ids, k, pitch):
    """Pointer to the record of the unit of event k."""
    unit = builder.sext(builder.load(builder.gep(ids, [k])), I64)
    return builder.gep(records, [builder.mul(unit, pitch)])


def _transposed(builder, vectors):
    """Eight vectors of 64 bytes: byte i of vector k is byte i % 8 of word 8 k + i / 8; returns them by byte of a word.

    Byte i of result k is byte k of word i.
    """
    undefined = ir.Constant(BYTES, ir.Undefined)
    order = ir.Constant(ir.VectorType(I32, 4 * LANES), [8 * j + b for b in range(8) for j in range(8)])
    rows = [builder.bitcast(builder.shuffle_vector(each, undefined, order), _WORDS) for each in vectors]
    # A square of eight words: its quarters off the diagonal change places, then those of each quarter, and so on.
    for half in (4, 2, 1):
        low = [k for k in range(8) if not k & half]
        first = [j if j in low else 8 + j - half for j in range(8)]
        second = [j + half if j in low else 8 + j for j in range(8)]
        for k in low:
            pair = rows[k], rows[k + half]
            for to, lanes in ((k, first), (k + half, second)):
                rows[to] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, 8), lanes))
    return [builder.bitcast(each, BYTES) for each in rows]


@intrinsic
def transpose_bits(typingctx, pointers, by_event, blocks, strip_bytes):
    """Sort the bytes of a word per event by strips: 64 bytes per block of events, `blocks` times for strips 0 to 7 of
    the word, then for strips 8 to 15, and so on.

    pointers : int64; an array by event begins at pointers[by_event], and the bytes at pointers[strip_bytes]
    """

    def generate(context, builder, signature, args):
        source, target = (address(context, builder, signature.args[0], args[0], args[k]) for k in (1, 3))
        target = builder.bitcast(target, BYTES.as_pointer())

        def block(n):
            first = builder.mul(n, I64(BLOCK_EVENTS))
            skipped = builder.mul(builder.udiv(first, I64(CHUNK_EVENTS)), I64(CHUNK_PITCH - CHUNK_EVENTS))
            words = builder.gep(source, [builder.add(first, skipped)])
            vectors = [
                builder.load(builder.bitcast(builder.gep(words, [I64(8 * i)]), BYTES.as_pointer()), align=8)
                for i in range(8)
            ]
            for b, sorted_bytes in enumerate(_transposed(builder, vectors)):
                place = builder.add(n, builder.mul(args[2], I64(b)))
                builder.store(sorted_bytes, builder.gep(target, [place]), align=8)

        for_each(builder, args[2], block, unrolled=False)
        return context.get_dummy_value()

    return types.void(pointers, by_event, blocks, strip_bytes), generate


@intrinsic
def list_events(typingctx, pointers, strip_bytes, blocks, chunks, strips, counts, listed):
    """List the numbers of the events that have the bit of a strip, in ascending order, for up to eight strips.

    Strip k has `chunks` lists, which begin at number k * chunks of all. With `QUADS` a list is filled up with NOBODY to
    a multiple of four.

    pointers : int64; the bytes of the `blocks` blocks begin at pointers[strip_bytes], the lists of bytes, LIST_WORDS
               each, at pointers[listed], and how many events they have at pointers[counts]
    """

    def generate(context, builder, signature, args):
        source, count_at, list_at = (address(context, builder, signature.args[0], args[0], args[k]) for k in (1, 5, 6))
        source = builder.bitcast(source, BYTES.as_pointer())
        (blocks, chunks, strips), undefined = args[2:5], ir.Constant(BYTES, ir.Undefined)

        def strip(i):
            bit = builder.insert_element(undefined, builder.shl(I8(1), builder.trunc(i, I8)), I32(0))
            bit = builder.shuffle_vector(bit, undefined, ir.Constant(ir.VectorType(I32, 4 * LANES), [0] * 4 * LANES))

            def chunk(c):
                number = builder.add(builder.mul(i, chunks), c)
                target = builder.gep(list_at, [builder.mul(number, I64(LIST_WORDS))])
                target, first = builder.bitcast(target, I8.as_pointer()), builder.mul(c, I64(CHUNK_BLOCKS))
                left = builder.sub(blocks, first)
                some = builder.select(builder.icmp_signed("<", left, I64(CHUNK_BLOCKS)), left, I64(CHUNK_BLOCKS))
                end = _list_chunk(builder, builder.gep(source, [first]), some, bit, target)
                builder.store(end, builder.gep(count_at, [number]))

            for_each(builder, chunks, chunk, unrolled=False)

        for_each(builder, strips, strip, unrolled=False)
        return context.get_dummy_value()

    return types.void(pointers, strip_bytes, blocks, chunks, strips, counts, listed), generate


def _list_chunk(builder, source, blocks, bit, target):
    """List the numbers of the events of a chunk that have a bit; returns how many there are."""

    def block(n, carried):
        end, numbers = carried
        chosen = builder.and_(builder.load(builder.gep(source, [n]), align=8), bit)
        mask = builder.icmp_unsigned("!=", chosen, ir.Constant(BYTES, [0] * BLOCK_EVENTS))
        word = builder.bitcast(mask, I64)
        if SELECTS:
            packed = call(builder, "llvm.x86.avx512.mask.compress.v64i8", BYTES, [numbers, numbers, mask])
            builder.store(packed, builder.bitcast(builder.gep(target, [end]), BYTES.as_pointer()), align=1)
        else:
            _list_bits(builder, word, builder.mul(n, I64(BLOCK_EVENTS)), builder.gep(target, [end]))
        found = call(builder, "llvm.ctpop.i64", I64, [word])
        return [builder.add(end, found), builder.add(numbers, ir.Constant(BYTES, [BLOCK_EVENTS] * BLOCK_EVENTS))]

    first = ir.Constant(BYTES, list(range(BLOCK_EVENTS)))
    end, _ = carry_each(builder, blocks, [I64(0), first], block)
    if QUADS:
        fill = ir.Constant(ir.VectorType(I8, 4), [NOBODY] * 4)
        builder.store(fill, builder.bitcast(builder.gep(target, [end]), fill.type.as_pointer()), align=1)
    return end


def _list_bits(builder, word, first, target):
    """Write `first` plus the number of each bit that is set in a word, one after the other."""

    def next_bit(k, carried):
        (left,) = carried
        number = builder.add(first, call(builder, "llvm.cttz.i64", I64, [left, I1(True)]))
        builder.store(builder.trunc(number, I8), builder.gep(target, [k]))
        return [builder.and_(left, builder.sub(left, I64(1)))]

    carry_each(builder, call(builder, "llvm.ctpop.i64", I64, [word]), [word], next_bit)
