"""Micro-kernels of the CPU engine: the innermost loops that add weights to drives, in vector registers.

A call runs within one thread, which owns the elements of `drive` that the call writes. Weights, scales and events are
shared and are only read. All arrays are flat, and no index is checked:

    drive           float32, drive rows (or a tile of drives); the call starts at element `at`
    weights         float32; uint16, the upper halves of float32 (bfloat16); or int8. Starts at element `start`
    scales          float32, one per presynaptic unit, from element `s0` on; read for int8 weights only
    ids, values     int32 and float32, unit and value of each event; the call takes `count` events from `first` on
    columns         int32, positions in a drive row

An accumulator is float32 and takes its terms one FMA at a time in ascending order of units, as the loop over j in
`reference.propagate` does; so the bits are equal. An int8 weight is multiplied by its scale first, rounded once. Numba
compiles each loop once per storage.

The loops are written as LLVM IR for two reasons. Accumulators must stay in registers for the whole loop. Loads must be
moved ahead of stores, which LLVM does not do by itself because it cannot know that the arrays never overlap. Those of
single weights are in `single_weights.py`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn.cpu.kernels.emit import (
    IOTA,
    L1,
    L2,
    LINE,
    emit_prefetch,
    for_each,
    for_each_vector,
    lane,
    load_ints,
    load_weights,
    splat_int,
    store_ints,
)
from eventrnn.cpu.kernels.simd import (
    AVX512,
    FLOAT,
    I32,
    I64,
    LANES,
    VECTOR,
    address,
    fma_vector,
    load_vector,
    splat,
    store_vector,
)

# Vectors of a register tile. So many accumulators stay in registers beside the weights: 16 of 32 registers on AVX-512,
# and 4 vectors elsewhere, which are 8 AVX registers.
TILE = 16 if AVX512 else 4

# A loop over events prefetches the row of the event that comes so many events later.
PREFETCH_ROWS = 4

# With block segments out of the L2 cache, each event prefetches so many cache lines of the next event's weights. The
# hardware prefetcher finds the lines after them: prefetching all 26 lines of 4x8 blocks (1350 units, 90 % pruned) took
# a fifth longer than these eight.
NEXT_LINES = 8

# Drive rows and vectors of a register tile of `multiply`: 20 accumulators in 32 registers, or 4 in 16.
MULTIPLY_ROWS, MULTIPLY_VECTORS = (5, 4) if AVX512 else (2, 1)


def scale_of(context, builder, weights, kind, scales, s0, unit, width: int = LANES):
    """The scale of a unit in every lane for int8 weights, and ones for the storages without scales."""
    if weights != types.int8:
        return ir.Constant(ir.VectorType(FLOAT, width), [1.0] * width)
    return splat(builder, builder.load(address(context, builder, kind, scales, builder.add(s0, unit))), width)


# --- one drive row, the weight rows of many events ----------------------------------------------------------


def _sum_rows(context, builder, kinds, args, vectors, far, column):
    """Emit the loop of `add_rows` over the events, for one register tile of `vectors` vectors from `column` on."""
    target = builder.gep(address(context, builder, kinds[0], args[0], args[1]), [column])
    rows, pitch = builder.gep(address(context, builder, kinds[2], args[2], args[3]), [column]), args[4]
    id_at = address(context, builder, kinds[7], args[7], args[9])
    value_at = address(context, builder, kinds[8], args[8], args[9])
    count = args[10]

    def unit_of(event):
        return builder.sext(builder.load(builder.gep(id_at, [event])), I64)

    def row(event):
        return builder.gep(rows, [builder.mul(unit_of(event), pitch)])

    before = [load_vector(builder, lane(builder, target, k)) for k in range(vectors)]
    entry, loop = builder.block, builder.append_basic_block("events")
    done = builder.append_basic_block("events.done")
    builder.cbranch(builder.icmp_signed(">", count, I64(0)), loop, done)

    builder.position_at_end(loop)
    event = builder.phi(I64)
    event.add_incoming(I64(0), entry)
    sums = [builder.phi(VECTOR) for _ in range(vectors)]
    for phi, start in zip(sums, before, strict=True):
        phi.add_incoming(start, entry)
    if far:
        ahead, last = builder.add(event, I64(PREFETCH_ROWS)), builder.sub(count, I64(1))
        upcoming = row(builder.select(builder.icmp_signed("<", ahead, count), ahead, last))
        for k in range(0, vectors, LINE // kinds[2].dtype.bitwidth * 8 // LANES):
            emit_prefetch(builder, lane(builder, upcoming, k))
    source = row(event)
    value = splat(builder, builder.load(builder.gep(value_at, [event])))
    scale = scale_of(context, builder, kinds[2].dtype, kinds[5], args[5], args[6], unit_of(event))
    weight = [load_weights(builder, lane(builder, source, k), LANES, scale) for k in range(vectors)]
    after = [fma_vector(builder, w, value, total) for w, total in zip(weight, sums, strict=True)]
    following = builder.add(event, I64(1))
    event.add_incoming(following, loop)
    for phi, total in zip(sums, after, strict=True):
        phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)

    builder.position_at_end(done)
    for k in range(vectors):
        total = builder.phi(VECTOR)
        total.add_incoming(before[k], entry)
        total.add_incoming(after[k], loop)
        before[k] = total
    for k in range(vectors):
        store_vector(builder, before[k], lane(builder, target, k))


def _add_rows(widest: int, far: bool):
    @intrinsic
    def add_rows(typingctx, drive, at, weights, start, pitch, scales, s0, ids, values, first, count, vectors):
        """drive[at + i] += sum over events e of weights[start + ids[e] * pitch + i] * values[e], i < 16 * vectors.

        Adds events `first` to `first + count` in order, one FMA per term. `vectors` is less than twice `widest`, a
        power of two. The columns are divided into register tiles of `widest`, `widest` / 2, …, 1 vectors, of which
        there is one for each bit that is set in `vectors`. All events are added to one register tile before the next.
        With `far`, each event prefetches the weights of a later one; weights that are in the L1 cache need no prefetch.
        """

        def generate(context, builder, signature, args):
            width, total = widest, args[11]
            while width:
                with builder.if_then(builder.icmp_signed("!=", builder.and_(total, I64(width)), I64(0))):
                    column = builder.mul(builder.and_(total, I64(-2 * width)), I64(LANES))
                    _sum_rows(context, builder, signature.args, args, width, far, column)
                width //= 2
            return context.get_dummy_value()

        return types.void(drive, at, weights, start, pitch, scales, s0, ids, values, first, count, vectors), generate

    return add_rows


# The widest register tile of weights that are in the L1 cache.
NEAR_TILE = 8 if AVX512 else 4

add_rows, add_near_rows = _add_rows(TILE, far=True), _add_rows(NEAR_TILE, far=False)


# --- block segments: listed, of several units, or unit by unit ----------------------------------------------

# A list has four flat arrays: `targets` and `numbers` (int32) say where in the drive row a segment is added and which
# segment it is; `values` and `scales` (float32) are those of its unit. With one array of entries of four fields
# instead, the loop took 1.5 times as long.


def _rows_of(context, builder, kind, array):
    """Pointers to the two rows of a contiguous array of two axes."""
    record = context.make_array(kind)(context, builder, array)
    return record.data, builder.gep(record.data, [builder.extract_value(record.shape, 1)])


@intrinsic
def list_blocks(
    typingctx, weights, pointers, p0, columns, i0, ids, sent, event, last, unit_scales, s0, most, list_of, factors
):
    """Write the segments of the events `event` to `last` to a list, until it has `most` of them or more.

    Returns the first event that is left, and how many segments were listed. Unit j has three of the `pointers` from
    p0 + 3 * j on: its first and its last index of `columns` after i0, and the number of its first segment. Sixteen
    entries are written at a time, so the list needs space for the segments of a unit and sixteen more. A unit of up to
    16 segments takes no branch.

    sent             : float32, value of each event
    unit_scales      : float32, from element s0 on one per unit; read for int8 weights only
    list_of, factors : (2, entries) int32 and float32: targets and numbers, values and scales
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        pointer_at = address(context, builder, kinds[1], args[1], args[2])
        column_at = address(context, builder, kinds[3], args[3], args[4])
        id_at, sent_at = (address(context, builder, kinds[k], args[k], I64(0)) for k in (5, 6))
        scale_at = address(context, builder, kinds[9], args[9], args[10])
        targets, numbers = _rows_of(context, builder, kinds[12], args[12])
        values, scales = _rows_of(context, builder, kinds[13], args[13])
        start, stop, most = args[7], args[8], args[11]

        entry, loop = builder.block, builder.append_basic_block("units")
        done = builder.append_basic_block("units.done")
        builder.cbranch(builder.icmp_signed("<", start, stop), loop, done)
        builder.position_at_end(loop)
        event, listed = builder.phi(I64), builder.phi(I64)
        event.add_incoming(start, entry)
        listed.add_incoming(I64(0), entry)
        unit = builder.sext(builder.load(builder.gep(id_at, [event])), I64)
        of_unit = builder.gep(pointer_at, [builder.mul(unit, I64(3))])
        first, end, number = (builder.load(builder.gep(of_unit, [I64(k)])) for k in range(3))
        first_number = builder.add(splat_int(builder, builder.trunc(number, I32)), IOTA)
        fixed = [(splat(builder, builder.load(builder.gep(sent_at, [event]))), values)]
        if weights.dtype == types.int8:
            fixed.append((splat(builder, builder.load(builder.gep(scale_at, [unit]))), scales))

        def body(k):
            ahead = builder.mul(k, I64(LANES))
            source, to = builder.gep(column_at, [builder.add(first, ahead)]), builder.add(listed, ahead)
            store_ints(builder, load_ints(builder, source), builder.gep(targets, [to]))
            vector = builder.add(first_number, splat_int(builder, builder.trunc(ahead, I32)))
            store_ints(builder, vector, builder.gep(numbers, [to]))
            for vector, field in fixed:
                store_vector(builder, vector, builder.gep(field, [to]))

        count = builder.sub(end, first)
        for_each_vector(builder, count, body)
        following, total = builder.add(event, I64(1)), builder.add(listed, count)
        event.add_incoming(following, builder.block)
        listed.add_incoming(total, builder.block)
        more = builder.and_(builder.icmp_signed("<", following, stop), builder.icmp_signed("<", total, most))
        exit_block = builder.block
        builder.cbranch(more, loop, done)

        builder.position_at_end(done)
        results = []
        for before, after in ((start, following), (I64(0), total)):
            result = builder.phi(I64)
            result.add_incoming(before, entry)
            result.add_incoming(after, exit_block)
            results.append(result)
        return context.make_tuple(builder, signature.return_type, results)

    signature = (weights, pointers, p0, columns, i0, ids, sent, event, last, unit_scales, s0, most, list_of, factors)
    return types.UniTuple(types.int64, 2)(*signature), generate


def _add_listed(width: int):
    @intrinsic
    def add_listed(typingctx, drive, at, list_of, factors, count, weights, start):
        """drive[at + targets[e] + i] += weights[start + numbers[e] * width + i] * values[e] for e < count, i < width.

        Entries are added in order, one FMA per term. `list_of` has the rows `targets` and `numbers`, `factors` the rows
        `values` and `scales`.
        """

        def generate(context, builder, signature, args):
            kinds = signature.args
            out = address(context, builder, kinds[0], args[0], args[1])
            fields = [row for k in (2, 3) for row in _rows_of(context, builder, kinds[k], args[k])]
            source = address(context, builder, kinds[5], args[5], args[6])

            def body(q):
                target, number, value, scale = (builder.load(builder.gep(field, [q])) for field in fields)
                row = builder.gep(out, [builder.sext(target, I64)])
                segment = builder.gep(source, [builder.mul(builder.sext(number, I64), I64(width))])
                value, scale = splat(builder, value, width), splat(builder, scale, width)
                weight = load_weights(builder, segment, width, scale)
                store_vector(builder, fma_vector(builder, weight, value, load_vector(builder, row, width)), row)

            for_each(builder, args[4], body)
            return context.get_dummy_value()

        return types.void(drive, at, list_of, factors, count, weights, start), generate

    return add_listed


add_listed_4, add_listed_8, add_listed_16 = (_add_listed(width) for width in (4, 8, LANES))


def _add_blocks(vectors: int, width: int):
    @intrinsic
    def add_blocks(
        typingctx, drive, at, columns, i0, pointers, p0, weights, start, scales, s0, ids, values, first, count, far
    ):
        """Add the segments of the units of `count` events, unit by unit.

        drive[at + columns[i0 + q] + i] += weights[start + number * size + i] * value for i < size, in order, one FMA
        per term. size = vectors * width is the width of a segment. Unit j has three of the `pointers` from p0 + 3 * j
        on: its first and its last index of `columns` after i0, and the number of its first segment. Where `far` is not
        zero, each event prefetches the first weights of the next one.
        """

        def generate(context, builder, signature, args):
            kinds, size = signature.args, I64(vectors * width)
            out = address(context, builder, kinds[0], args[0], args[1])
            column_at = address(context, builder, kinds[2], args[2], args[3])
            pointer_at = address(context, builder, kinds[4], args[4], args[5])
            source = address(context, builder, kinds[6], args[6], args[7])
            id_at, value_at = (address(context, builder, kinds[k], args[k], args[12]) for k in (10, 11))
            count, far = args[13], args[14]
            lanes = [I64(i * width) for i in range(vectors)]

            def unit_of(event):
                return builder.sext(builder.load(builder.gep(id_at, [event])), I64)

            def pointer(unit, k):
                return builder.load(builder.gep(pointer_at, [builder.add(builder.mul(unit, I64(3)), I64(k))]))

            def weights_of(unit):
                return builder.gep(source, [builder.mul(pointer(unit, 2), size)])

            def add_unit(event):
                unit = unit_of(event)
                with builder.if_then(builder.icmp_signed("!=", far, I64(0))):
                    ahead = builder.add(event, I64(1))
                    upcoming = weights_of(unit_of(builder.select(builder.icmp_signed("<", ahead, count), ahead, event)))
                    for k in range(NEXT_LINES):
                        emit_prefetch(builder, builder.gep(upcoming, [I64(k * LINE * 8 // kinds[6].dtype.bitwidth)]))
                value = splat(builder, builder.load(builder.gep(value_at, [event])), width)
                scale = scale_of(context, builder, kinds[6].dtype, kinds[8], args[8], args[9], unit, width)
                begin, segments = pointer(unit, 0), weights_of(unit)
                column_of = builder.gep(column_at, [begin])

                def add_segment(q):
                    row = builder.gep(out, [builder.sext(builder.load(builder.gep(column_of, [q])), I64)])
                    segment = builder.gep(segments, [builder.mul(q, size)])
                    # All loads come before the first store: the two arrays never overlap, which LLVM cannot know.
                    weight = [load_weights(builder, builder.gep(segment, [i]), width, scale) for i in lanes]
                    before = [load_vector(builder, builder.gep(row, [i]), width) for i in lanes]
                    for i, w, b in zip(lanes, weight, before, strict=True):
                        store_vector(builder, fma_vector(builder, w, value, b), builder.gep(row, [i]))

                # Unrolled, it would end in several branches that the processor mispredicts.
                for_each(builder, builder.sub(pointer(unit, 1), begin), add_segment, unrolled=False)

            for_each(builder, count, add_unit)
            return context.get_dummy_value()

        matrix = columns, i0, pointers, p0, weights, start, scales, s0
        return types.void(drive, at, *matrix, ids, values, first, count, far), generate

    return add_blocks


add_blocks_4, add_blocks_8, add_blocks_16, add_blocks_32, add_blocks_64 = (
    _add_blocks(*shape) for shape in ((1, 4), (1, 8), (1, LANES), (2, LANES), (4, LANES))
)


# --- many drive rows, every unit ----------------------------------------------------------------------------


def _multiply(rows: int, vectors: int):
    @intrinsic
    def multiply(typingctx, drive, at, drive_pitch, weights, start, pitch, scales, s0, x, x_at, x_pitch, first, count):
        """drive[at + b * drive_pitch + i] += sum over j of weights[start + j * pitch + i] * x[x_at + b * x_pitch + j].

        b < rows and i < 16 * vectors; all of these sums stay in registers. The units j are `count` ascending numbers
        from `first` on, one FMA per term. `x` holds dense inputs, float32.
        """

        def generate(context, builder, signature, args):
            kinds = signature.args
            tile = [(b, i) for b in range(rows) for i in range(vectors)]
            target = address(context, builder, kinds[0], args[0], args[1])
            source, pitch = address(context, builder, kinds[3], args[3], args[4]), args[5]
            inputs = address(context, builder, kinds[8], args[8], args[9])
            first, count = args[11], args[12]
            x_rows = [builder.gep(inputs, [builder.mul(args[10], I64(b))]) for b in range(rows)]
            out = [lane(builder, builder.gep(target, [builder.mul(args[2], I64(b))]), i) for b, i in tile]
            before = [load_vector(builder, pointer) for pointer in out]

            entry, loop = builder.block, builder.append_basic_block("units")
            done = builder.append_basic_block("units.done")
            builder.cbranch(builder.icmp_signed(">", count, I64(0)), loop, done)
            builder.position_at_end(loop)
            k = builder.phi(I64)
            k.add_incoming(I64(0), entry)
            sums = [builder.phi(VECTOR) for _ in tile]
            for phi, value in zip(sums, before, strict=True):
                phi.add_incoming(value, entry)
            unit = builder.add(first, k)
            row = builder.gep(source, [builder.mul(unit, pitch)])
            scale = scale_of(context, builder, kinds[3].dtype, kinds[6], args[6], args[7], unit)
            weight = [load_weights(builder, lane(builder, row, i), LANES, scale) for i in range(vectors)]
            value = [splat(builder, builder.load(builder.gep(x_row, [unit]))) for x_row in x_rows]
            after = [fma_vector(builder, weight[i], value[b], total) for (b, i), total in zip(tile, sums, strict=True)]
            following = builder.add(k, I64(1))
            k.add_incoming(following, loop)
            for phi, total in zip(sums, after, strict=True):
                phi.add_incoming(total, loop)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
            builder.position_at_end(done)
            totals = [builder.phi(VECTOR) for _ in tile]
            for total, old, new in zip(totals, before, after, strict=True):
                total.add_incoming(old, entry)
                total.add_incoming(new, loop)
            for total, pointer in zip(totals, out, strict=True):
                store_vector(builder, total, pointer)
            return context.get_dummy_value()

        matrix, inputs = (weights, start, pitch, scales, s0), (x, x_at, x_pitch)
        return types.void(drive, at, drive_pitch, *matrix, *inputs, first, count), generate

    return multiply


multiply_tile, multiply_row, multiply_edge = (
    _multiply(*shape) for shape in ((MULTIPLY_ROWS, MULTIPLY_VECTORS), (1, MULTIPLY_VECTORS), (1, 1))
)


def _prefetch_into(cache: int):
    @intrinsic
    def prefetch(typingctx, array, index):
        """Prefetch the cache line of array[index]."""

        def generate(context, builder, signature, args):
            emit_prefetch(builder, address(context, builder, signature.args[0], args[0], args[1]), cache)
            return context.get_dummy_value()

        return types.void(array, index), generate

    return prefetch


# Into the L1 cache; no nearer than the L2 cache.
prefetch, prefetch_far = _prefetch_into(L1), _prefetch_into(L2)
