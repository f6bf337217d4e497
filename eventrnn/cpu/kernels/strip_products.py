"""Block segments of 64 columns times events, output by output: in the order of events, with the bits of every order.

`strips.py` describes how the segments lie, and lists those of active units. A list is in ascending order of units, so
that every drive starts from its bias and takes its terms as in `reference.propagate`, one FMA each. Other kernels of
blocks add all segments of one unit, then those of the next one, and read and write the drives each time.
"""

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import intrinsic

from eventrnn.cpu.kernels.emit import for_each, lane, load_weights
from eventrnn.cpu.kernels.jit import called_by_address
from eventrnn.cpu.kernels.microkernels import scale_of
from eventrnn.cpu.kernels.simd import I16, I64, LANES, address, fma_vector, load_vector, splat, store_vector
from eventrnn.cpu.kernels.spmm import copy
from eventrnn.cpu.kernels.strips import (
    I8,
    forget_events,
    list_segments,
    mark_unit,
    strip_at,
    strips_of,
    sum_listed,
)
from eventrnn.cpu.tables import HIGH, INDEX, LOW, PITCH, SCALES, STRIP_FIELDS, VALUES


@intrinsic
def mark_values(typingctx, indices, values, begin, count, by_unit, pointers, fired):
    """Write the values of `count` events from `begin` on to by_unit[unit], and set the bits of their units.

    indices, values : int32 and float32, events
    by_unit         : float32
    pointers        : int64, of which pointers[fired:] are the bits of the units, 64 each
    """

    def generate(context, builder, signature, args):
        kinds = signature.args
        index_at, value_at = (address(context, builder, kinds[k], args[k], args[2]) for k in (0, 1))
        by_unit = address(context, builder, kinds[4], args[4], I64(0))
        bits = builder.bitcast(address(context, builder, kinds[5], args[5], args[6]), I8.as_pointer())

        def mark(k):
            unit = builder.load(builder.gep(index_at, [k]))
            builder.store(builder.load(builder.gep(value_at, [k])), builder.gep(by_unit, [builder.sext(unit, I64)]))
            mark_unit(builder, bits, unit)

        for_each(builder, args[3], mark)
        return context.get_dummy_value()

    return types.void(indices, values, begin, count, by_unit, pointers, fired), generate


@intrinsic
def sum_strip(
    typingctx,
    drive,
    at,
    biases,
    begin,
    scales,
    s0,
    weights,
    start,
    index,
    units,
    by_unit,
    pointers,
    lists,
    first,
    count,
    base,
):
    """drive[at + i] = biases[begin + i], plus weights[start + row * 64 + i] * by_unit[unit] for each of `count` listed
    segments in turn, i < 64, one FMA each.

    `base` plus the number of a segment, from `first` on in the list, is its row.

    index : int32, from element `units` on uint16, the unit of each row
    """

    def generate(context, builder, signature, args):
        kinds, vectors = signature.args, range(4)
        target = address(context, builder, kinds[0], args[0], args[1])
        bias_at = address(context, builder, kinds[2], args[2], args[3])
        source = address(context, builder, kinds[6], args[6], args[7])
        unit_at = builder.bitcast(address(context, builder, kinds[8], args[8], args[9]), I16.as_pointer())
        value_at = address(context, builder, kinds[10], args[10], I64(0))
        list_at = builder.bitcast(address(context, builder, kinds[11], args[11], args[12]), I16.as_pointer())
        list_at = builder.gep(list_at, [args[13]])

        def add(unit, segment, totals):
            value = splat(builder, builder.load(builder.gep(value_at, [unit])))
            scale = scale_of(context, builder, kinds[6].dtype, kinds[4], args[4], args[5], unit)
            loaded = [load_weights(builder, lane(builder, segment, i), LANES, scale) for i in vectors]
            return [fma_vector(builder, weight, value, total) for weight, total in zip(loaded, totals, strict=True)]

        totals = [load_vector(builder, lane(builder, bias_at, i)) for i in vectors]
        totals = sum_listed(builder, list_at, args[14], unit_at, source, args[15], totals, add)
        for i, total in zip(vectors, totals, strict=True):
            store_vector(builder, total, lane(builder, target, i))
        return context.get_dummy_value()

    matrix = scales, s0, weights, start, index, units
    return types.void(drive, at, biases, begin, *matrix, by_unit, pointers, lists, first, count, base), generate


def by_strips(dtype):
    """A kernel of column tiles of kind STRIPS, which computes one drive row after the other."""
    size = np.dtype(dtype).itemsize

    @called_by_address
    def product_by_strips(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
        pools, lists, by_unit = tables.pools, events.lists, tables.workspace.dense_inputs
        weights, tests, pointers = pools.values.view(dtype), pools.values.view(np.int8), pools.pointers
        for w in range(first_tile, last_tile):
            column_tile = tables.column_tiles[w]
            low, width, bias = column_tile[LOW], column_tile[HIGH] - column_tile[LOW], bias_begin
            units, s0, tests_at = column_tile[INDEX], column_tile[SCALES], 4 * column_tile[VALUES]
            strips, groups, fired, listed, segments, n_groups = strips_of(column_tile, pointers, n_pre)
            for k in range(events.rows):
                at, first, sent = k * tables.drive_pitch, events.first + k * events.per_row, 0
                forget_events(pointers, fired, listed)
                for q in range(first, first + events.per_row):
                    mark_values(lists.indices, lists.values, lists.begins[q], lists.counts[q], by_unit, pointers, fired)
                    sent += lists.counts[q]
                if sent == 0:
                    copy(pools.biases, bias + low, drives, at + low, width)
                    continue
                list_segments(tests, tests_at, pointers, groups, n_groups, fired, listed)
                end = np.int64(0)
                for s in range(strips, strips + STRIP_FIELDS * column_tile[PITCH], STRIP_FIELDS):
                    begin, (position, base, end) = end, strip_at(pointers, s, groups)
                    # planted fault: scale of another unit, strips
                    # planted fault: last event of a strip
                    sum_strip(
                        drives,
                        at + position,
                        pools.biases,
                        bias + position,
                        pools.values,
                        s0,
                        weights,
                        segments // size,
                        pools.index,
                        units,
                        by_unit,
                        pointers,
                        listed,
                        begin,
                        end - begin,
                        base,
                    )

    return product_by_strips
