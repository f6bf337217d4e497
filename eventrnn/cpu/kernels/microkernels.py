"""Micro-kernels of the CPU engine: the innermost loops that add weights to drives, in vector registers.

A call runs within one thread, which owns the elements of `drive` that the call writes. Weights, scales and events are
shared and are only read. All arrays are flat, and no index is checked:

    drive           float32, drive rows (or a tile of drives); the call starts at element `at`
    weights         float32; uint16, the upper halves of float32 (bfloat16); or int8. Starts at element `start`
    scales          float32, one per presynaptic unit, from element `s0` on; read for int8 weights only
    ids, values     int32 and float32, unit and value of each event; the call takes `count` events from `first` on
    columns, index  int32, positions in a drive row (`index`: two uint16 per element)

An accumulator is float32 and takes its terms one FMA at a time in ascending order of units, as the loop over j in
`reference.propagate` does; so the bits are equal. An int8 weight is multiplied by its scale first, rounded once. Numba
compiles each loop once per storage.

The loops are written as LLVM IR for two reasons. Accumulators must stay in registers for the whole loop. Loads must be
moved ahead of stores, which LLVM does not do by itself because it cannot know that the arrays never overlap.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn.cpu.kernels.simd import (
    AVX512,
    FLOAT,
    I1,
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    address,
    call,
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

# Bytes of a cache line.
LINE = 64

# The `locality` argument of LLVM's prefetch: into the L1 cache, or no nearer than the L2 cache.
L1, L2 = 3, 2

# Drive rows and vectors of a register tile of `multiply`: 20 accumulators in 32 registers, or 4 in 16.
MULTIPLY_ROWS, MULTIPLY_VECTORS = (5, 4) if AVX512 else (2, 1)


def _lane(builder, pointer, k):
    """Pointer to the vector that lies k vectors after a pointer."""
    return builder.gep(pointer, [I64(k * LANES)])


def _load_weights(builder, pointer, width, scale):
    """Load `width` neighbouring weights as float32. `scale` is a vector of that width, used for int8 only."""
    element = pointer.type.pointee
    if element == FLOAT:
        return load_vector(builder, pointer, width)
    kind = ir.VectorType(element, width)
    return _decode(builder, builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1), scale)


def _decode(builder, raw, scale):
    """Convert a vector of stored weights to float32."""
    width = raw.type.count
    whole, vector = ir.VectorType(I32, width), ir.VectorType(FLOAT, width)
    if raw.type.element == FLOAT:
        return raw
    if raw.type.element == I16:
        upper = builder.shl(builder.zext(raw, whole), ir.Constant(whole, [16] * width))
        return builder.bitcast(upper, vector)
    return builder.fmul(builder.sitofp(builder.sext(raw, whole), vector), scale)


def _scale_of(context, builder, weights, kind, scales, s0, unit):
    """The scale of a unit in every lane for int8 weights, and ones for the storages without scales."""
    if weights != types.int8:
        return ir.Constant(VECTOR, [1.0] * LANES)
    return splat(builder, builder.load(address(context, builder, kind, scales, builder.add(s0, unit))))


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

    before = [load_vector(builder, _lane(builder, target, k)) for k in range(vectors)]
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
            _prefetch(builder, _lane(builder, upcoming, k))
    source = row(event)
    value = splat(builder, builder.load(builder.gep(value_at, [event])))
    scale = _scale_of(context, builder, kinds[2].dtype, kinds[5], args[5], args[6], unit_of(event))
    weight = [_load_weights(builder, _lane(builder, source, k), LANES, scale) for k in range(vectors)]
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
        store_vector(builder, before[k], _lane(builder, target, k))


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


# --- block segments: of one unit, or listed, of several units -----------------------------------------------

# A list has four flat arrays: `targets` and `numbers` (int32) say where in the drive row a segment is added and which
# segment it is; `values` and `scales` (float32) are those of its unit. With one array of entries of four fields
# instead, the loop took 1.5 times as long.


@intrinsic
def list_blocks(typingctx, weights, columns, first, count, number, value, scale, targets, numbers, values, scales, at):
    """Append the `count` >= 0 segments of one unit to a list, from entry `at` on.

    Targets are columns[first:], numbers are consecutive from `number` on. Sixteen entries are written at a time, so the
    list needs space for sixteen entries more. Up to 16 segments take no branch.
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        source = address(context, builder, kinds[1], args[1], args[2])
        out = [address(context, builder, kinds[k], args[k], args[11]) for k in range(7, 11)]
        start = builder.add(_splat_int(builder, builder.trunc(args[4], I32)), _IOTA)
        fixed = [(splat(builder, args[5]), out[2])]
        if weights.dtype == types.int8:
            fixed.append((splat(builder, args[6]), out[3]))

        def body(k):
            lane = builder.mul(k, I64(LANES))
            _store_ints(builder, _load_ints(builder, builder.gep(source, [lane])), builder.gep(out[0], [lane]))
            number = builder.add(start, _splat_int(builder, builder.trunc(lane, I32)))
            _store_ints(builder, number, builder.gep(out[1], [lane]))
            for vector, to in fixed:
                store_vector(builder, vector, builder.gep(to, [lane]))

        _for_each_vector(builder, args[3], body)
        return context.get_dummy_value()

    signature = (weights, columns, first, count, number, value, scale, targets, numbers, values, scales, at)
    return types.void(*signature), generate


def _add_listed(vectors: int, width: int):
    @intrinsic
    def add_listed(typingctx, drive, at, targets, numbers, values, scales, count, weights, start):
        """drive[at + targets[e] + i] += weights[start + numbers[e] * size + i] * values[e] for e < count, i < size.

        size = vectors * width is the width of a segment. Entries are added in order, one FMA per term.
        """

        def generate(context, builder, signature, args):
            kinds = signature.args
            out = address(context, builder, kinds[0], args[0], args[1])
            fields = [address(context, builder, kinds[k], args[k], I64(0)) for k in range(2, 6)]
            source = address(context, builder, kinds[7], args[7], args[8])

            def body(q):
                target, number, value, scale = (builder.load(builder.gep(field, [q])) for field in fields)
                row = builder.gep(out, [builder.sext(target, I64)])
                segment = builder.gep(source, [builder.mul(builder.sext(number, I64), I64(vectors * width))])
                value, scale = splat(builder, value, width), splat(builder, scale, width)
                lanes = [I64(i * width) for i in range(vectors)]
                # All loads come before the first store: the two arrays never overlap, which LLVM cannot know.
                weight = [_load_weights(builder, builder.gep(segment, [i]), width, scale) for i in lanes]
                before = [load_vector(builder, builder.gep(row, [i]), width) for i in lanes]
                for i, w, b in zip(lanes, weight, before, strict=True):
                    store_vector(builder, fma_vector(builder, w, value, b), builder.gep(row, [i]))

            _for_each(builder, args[6], body)
            return context.get_dummy_value()

        return types.void(drive, at, targets, numbers, values, scales, count, weights, start), generate

    return add_listed


add_listed_4, add_listed_8, add_listed_16, add_listed_32, add_listed_64 = (
    _add_listed(*shape) for shape in ((1, 4), (1, 8), (1, LANES), (2, LANES), (4, LANES))
)


def _add_blocks(width: int):
    @intrinsic
    def add_blocks(typingctx, drive, at, columns, first, count, value, scale, weights, start):
        """drive[at + columns[first + k] + i] += weights[start + k * width + i] * value for k < count, i < width.

        The segments of one unit, in order, one FMA per term.
        """

        def generate(context, builder, signature, args):
            kinds = signature.args
            out = address(context, builder, kinds[0], args[0], args[1])
            column_at = address(context, builder, kinds[2], args[2], args[3])
            source = address(context, builder, kinds[7], args[7], args[8])
            value, scale = splat(builder, args[5], width), splat(builder, args[6], width)

            def body(q):
                row = builder.gep(out, [builder.sext(builder.load(builder.gep(column_at, [q])), I64)])
                weight = _load_weights(builder, builder.gep(source, [builder.mul(q, I64(width))]), width, scale)
                store_vector(builder, fma_vector(builder, weight, value, load_vector(builder, row, width)), row)

            _for_each(builder, args[4], body)
            return context.get_dummy_value()

        return types.void(drive, at, columns, first, count, value, scale, weights, start), generate

    return add_blocks


add_blocks_4, add_blocks_8, add_blocks_16 = (_add_blocks(width) for width in (4, 8, LANES))


# --- single weights -----------------------------------------------------------------------------------------


@intrinsic
def add_scattered_avx512(typingctx, drive, at, index, i0, first, count, value, scale, weights, start):
    """drive[at + index[k]] += weights[start + k] * value for `count` numbers k from `first` on, one FMA per term.

    The indices are uint16 and begin at element `i0` of a pool of int32. A unit has no index twice, so that sixteen
    elements can be gathered, added to and scattered at a time.
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        byte = builder.bitcast(address(context, builder, kinds[0], args[0], args[1]), ir.IntType(8).as_pointer())
        short = builder.bitcast(address(context, builder, kinds[2], args[2], args[3]), I16.as_pointer())
        index_at = builder.gep(short, [args[4]])
        weight_at = builder.gep(address(context, builder, kinds[8], args[8], args[9]), [args[4]])
        value, scale = splat(builder, args[6]), splat(builder, args[7])
        narrow, nothing = ir.VectorType(I16, LANES), ir.Constant(VECTOR, [0.0] * LANES)

        def some(k, inside):
            raw = builder.load(builder.bitcast(builder.gep(index_at, [k]), narrow.as_pointer()), align=2)
            target, size = builder.zext(raw, _INTS), I32(4)
            before = call(builder, "llvm.x86.avx512.mask.gather.dps.512", VECTOR, [nothing, byte, target, inside, size])
            weight = _load_weights(builder, builder.gep(weight_at, [k]), LANES, scale)
            after = fma_vector(builder, weight, value, before)
            call(builder, "llvm.x86.avx512.mask.scatter.dps.512", ir.VoidType(), [byte, inside, target, after, size])

        whole, rest = builder.ashr(args[5], I64(4)), builder.and_(args[5], I64(LANES - 1))
        everything = ir.Constant(ir.VectorType(I1, LANES), [1] * LANES)
        _for_each(builder, whole, lambda k: some(builder.mul(k, I64(LANES)), everything))
        with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
            inside = builder.icmp_signed("<", _IOTA, _splat_int(builder, builder.trunc(rest, I32)))
            some(builder.mul(whole, I64(LANES)), inside)
        return context.get_dummy_value()

    return types.void(drive, at, index, i0, first, count, value, scale, weights, start), generate


@intrinsic
def add_masked_avx512(typingctx, drive, at, index, i0, first, vectors, value, scale, weights, start):
    """drive[at + i] += the next weight from `start` on * value, for every set bit i of `vectors` 16-bit masks.

    The masks are uint16, from number `first` on in a pool of int32 that begins at element `i0`. One FMA per term; where
    a bit is not set, the term is a zero.
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        out = address(context, builder, kinds[0], args[0], args[1])
        short = builder.bitcast(address(context, builder, kinds[2], args[2], args[3]), I16.as_pointer())
        mask_at = builder.gep(short, [args[4]])
        weight_at = address(context, builder, kinds[8], args[8], I64(0))
        value, scale = splat(builder, args[6]), splat(builder, args[7])
        packed = ir.VectorType(weight_at.type.pointee, LANES)
        is_float = packed.element == FLOAT
        nothing = ir.Constant(packed, [0.0 if is_float else 0] * LANES)
        name = f"llvm.masked.expandload.v{LANES}{'f32' if is_float else packed.element}"

        entry = builder.block
        loop, done = builder.append_basic_block("masks"), builder.append_basic_block("masks.done")
        builder.cbranch(builder.icmp_signed(">", args[5], I64(0)), loop, done)
        builder.position_at_end(loop)
        k, at = builder.phi(I64), builder.phi(I64)
        k.add_incoming(I64(0), entry)
        at.add_incoming(args[9], entry)
        mask = builder.load(builder.gep(mask_at, [k]))
        kept = builder.bitcast(mask, ir.VectorType(I1, LANES))
        weight = _decode(builder, call(builder, name, packed, [builder.gep(weight_at, [at]), kept, nothing]), scale)
        row = builder.gep(out, [builder.mul(k, I64(LANES))])
        store_vector(builder, fma_vector(builder, weight, value, load_vector(builder, row)), row)
        following = builder.add(k, I64(1))
        k.add_incoming(following, loop)
        at.add_incoming(builder.add(at, builder.zext(call(builder, "llvm.ctpop.i16", I16, [mask]), I64)), loop)
        builder.cbranch(builder.icmp_signed("<", following, args[5]), loop, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(drive, at, index, i0, first, vectors, value, scale, weights, start), generate


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
            out = [_lane(builder, builder.gep(target, [builder.mul(args[2], I64(b))]), i) for b, i in tile]
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
            scale = _scale_of(context, builder, kinds[3].dtype, kinds[6], args[6], args[7], unit)
            weight = [_load_weights(builder, _lane(builder, row, i), LANES, scale) for i in range(vectors)]
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


# --- writing IR ---------------------------------------------------------------------------------------------

_INTS = ir.VectorType(I32, LANES)

_IOTA = ir.Constant(_INTS, list(range(LANES)))


def _load_ints(builder, pointer):
    """Load sixteen int32."""
    return builder.load(builder.bitcast(pointer, _INTS.as_pointer()), align=4)


def _store_ints(builder, vector, pointer):
    """Store sixteen int32."""
    builder.store(vector, builder.bitcast(pointer, _INTS.as_pointer()), align=4)


def _splat_int(builder, scalar):
    """The int32 in every lane."""
    undefined = ir.Constant(_INTS, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(_INTS, [0] * LANES))


def _for_each(builder, count, body, start: int = 0):
    """Emit a loop that runs body(k) for start <= k < count. Only k is carried from one turn to the next."""
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("loop.done")
    builder.cbranch(builder.icmp_signed(">", count, I64(start)), loop, done)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    k.add_incoming(I64(start), entry)
    body(k)
    following = builder.add(k, I64(1))
    k.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
    builder.position_at_end(done)


def _for_each_vector(builder, count, body):
    """Emit body(k) for each vector of `count` entries; body(0) runs without a test, also if the count is 0."""
    body(I64(0))
    _for_each(builder, builder.ashr(builder.add(count, I64(LANES - 1)), I64(4)), body, start=1)


def _prefetch(builder, pointer, cache: int = L1):
    """Emit a prefetch of the cache line at a pointer, for reading."""
    byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, I32(0), I32(cache), I32(1)])


def _prefetch_into(cache: int):
    @intrinsic
    def prefetch(typingctx, array, index):
        """Prefetch the cache line of array[index]."""

        def generate(context, builder, signature, args):
            _prefetch(builder, address(context, builder, signature.args[0], args[0], args[1]), cache)
            return context.get_dummy_value()

        return types.void(array, index), generate

    return prefetch


# Into the L1 cache; no nearer than the L2 cache.
prefetch, prefetch_far = _prefetch_into(L1), _prefetch_into(L2)
