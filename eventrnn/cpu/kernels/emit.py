"""Writing LLVM IR: what the micro-kernels of `microkernels.py` and `single_weights.py` share.

Each function appends instructions to the block at which a builder stands. Pointers are not checked.
"""

from __future__ import annotations

from llvmlite import ir

from eventrnn.cpu.kernels.simd import FLOAT, I16, I32, I64, LANES, call, load_vector

# Bytes of a cache line.
LINE = 64

# The `locality` argument of LLVM's prefetch: into the L1 cache, or no nearer than the L2 cache.
L1, L2 = 3, 2

INTS = ir.VectorType(I32, LANES)

IOTA = ir.Constant(INTS, list(range(LANES)))


def load_ints(builder, pointer):
    """Load sixteen int32."""
    return builder.load(builder.bitcast(pointer, INTS.as_pointer()), align=4)


def store_ints(builder, vector, pointer):
    """Store sixteen int32."""
    builder.store(vector, builder.bitcast(pointer, INTS.as_pointer()), align=4)


def splat_int(builder, scalar):
    """The int32 in every lane."""
    undefined = ir.Constant(INTS, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * LANES))


def for_each(builder, stop, body, start=None, step: int = 1, unrolled: bool = True):
    """Emit a loop that runs body(k) for k = start, start + step, … < stop; start is 0 by default.

    Only k is carried from one turn to the next. With `unrolled` LLVM may make a turn of several, and loops for the
    turns that remain. A loop of few turns has more branches then that the processor mispredicts.
    """
    first = I64(0) if start is None else start
    entry = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("loop.done")
    builder.cbranch(builder.icmp_signed(">", stop, first), loop, done)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    k.add_incoming(first, entry)
    body(k)
    following = builder.add(k, I64(step))
    k.add_incoming(following, builder.block)
    branch = builder.cbranch(builder.icmp_signed("<", following, stop), loop, done)
    if not unrolled:
        never_unrolled(builder, branch)
    builder.position_at_end(done)


def carry_each(builder, stop, values, body, start=None):
    """Emit a loop as `for_each` does, not unrolled, that carries values: returns what body(k, values) made of them."""
    first, entry = I64(0) if start is None else start, builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("loop.done")
    builder.cbranch(builder.icmp_signed(">", stop, first), loop, done)
    builder.position_at_end(loop)
    k, carried = builder.phi(I64), [builder.phi(each.type) for each in values]
    after = [builder.add(k, I64(1)), *body(k, carried)]
    for phi, before, following in zip([k, *carried], [first, *values], after, strict=True):
        phi.add_incoming(before, entry)
        phi.add_incoming(following, builder.block)
    never_unrolled(builder, builder.cbranch(builder.icmp_signed("<", after[0], stop), loop, done))
    last = builder.block
    builder.position_at_end(done)
    results = [builder.phi(each.type) for each in values]
    for result, before, following in zip(results, values, after[1:], strict=True):
        result.add_incoming(before, entry)
        result.add_incoming(following, last)
    return results


def never_unrolled(builder, branch):
    """Make LLVM leave the loop as it is that this branch repeats."""
    module = builder.module
    hint = module.add_metadata(["llvm.loop.unroll.disable"])
    node = ir.values.MDValue(module, [], name=str(len(module.metadata)))
    # LLVM demands that the first operand is the node itself.
    node.operands = (node, hint)
    branch.set_metadata("llvm.loop", node)


def for_each_vector(builder, count, body):
    """Emit body(k) for each vector of `count` entries; body(0) runs without a test, also if the count is 0."""
    body(I64(0))
    for_each(builder, builder.ashr(builder.add(count, I64(LANES - 1)), I64(4)), body, start=I64(1))


def emit_prefetch(builder, pointer, cache: int = L1):
    """Emit a prefetch of the cache line at a pointer, for reading."""
    byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, I32(0), I32(cache), I32(1)])


def lane(builder, pointer, k):
    """Pointer to the vector that lies k vectors after a pointer."""
    return builder.gep(pointer, [I64(k * LANES)])


def load_weights(builder, pointer, width, scale):
    """Load `width` neighbouring weights as float32. `scale` is a vector of that width, used for int8 only."""
    element = pointer.type.pointee
    if element == FLOAT:
        return load_vector(builder, pointer, width)
    kind = ir.VectorType(element, width)
    return decode(builder, builder.load(builder.bitcast(pointer, kind.as_pointer()), align=1), scale)


def decode(builder, raw, scale):
    """Convert a vector of stored weights to float32."""
    width = raw.type.count
    whole, vector = ir.VectorType(I32, width), ir.VectorType(FLOAT, width)
    if raw.type.element == FLOAT:
        return raw
    if raw.type.element == I16:
        upper = builder.shl(builder.zext(raw, whole), ir.Constant(whole, [16] * width))
        return builder.bitcast(upper, vector)
    return builder.fmul(builder.sitofp(builder.sext(raw, whole), vector), scale)
