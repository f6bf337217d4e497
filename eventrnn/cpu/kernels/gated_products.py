"""Blocks that every input chooses, times events: column tiles of kind GATED (`weights/gated.py` defines the product).

A thread computes all gates of a drive row by itself, and multiplies the pieces of the chosen blocks that lie in its own
columns. The gates therefore have the same bits for every number of threads, and no thread waits for another one. Where
some steps share a choice, each thread also keeps the gates of each sample by itself, from step to step and from call to
call, at the end of `scratch` of its workspace (`tables.py`); it equals `reference_products.gates_of_step`.

Some drive rows go through the blocks together, so that a block that several of them chose is read from memory once.
Within a drive row, the blocks are visited by block row. The terms of an output are therefore added in ascending order
of units.
"""

from __future__ import annotations

import numpy as np

from eventrnn import cells
from eventrnn.cpu.kernels.jit import called_by_address, inlined, internal
from eventrnn.cpu.kernels.microkernels import TILE, add_rows
from eventrnn.cpu.kernels.row_products import values_at
from eventrnn.cpu.kernels.simd import LANES
from eventrnn.cpu.kernels.spmm import copy
from eventrnn.cpu.tables import (
    ALL_BLOCKS,
    BAD_LOGIT,
    BLOCK_ROWS,
    BLOCK_UNITS,
    CANCELLED,
    FAULT,
    GATE,
    GATE_BIAS,
    GATE_OUT,
    GATE_PITCH,
    GATE_TILE,
    GATED_HEADER,
    GATED_ROWS,
    HELD,
    HELD_PITCH,
    HIGH,
    IN_PITCH,
    KEPT,
    LOW,
    PERIOD,
    PIECE_BLOCK,
    PIECE_FIELDS,
    PIECE_TARGET,
    PIECE_VALUES,
    PIECE_VECTORS,
    POINTERS,
    RANK,
    SCALES,
    SOFTMAX,
    TOO_LARGE,
)
from eventrnn.weights.gated import PART_INPUTS

assert TILE * LANES <= GATE_TILE, "a part of the logits of a tile of columns must fit into its scratch"

# A key is the bits of a float32 as an integer that is in the same order: those of a negative number are flipped, apart
# from the sign.
LOWEST_KEY, FLIPPED, KEY_BITS = -(1 << 31), (1 << 31) - 1, 32


@inlined
def gather_events(events, first_row, rows, n_pre, workspace):
    """Write the events of drive row k to panel_indices and panel_values from k * n_pre on, and their number to
    panel_begins[rows + k]."""
    lists, indices, values = events.lists, workspace.panel_indices, workspace.panel_values
    for k in range(rows):
        to, first = k * n_pre, events.first + (first_row + k) * events.per_row
        for q in range(first, first + events.per_row):
            for e in range(lists.begins[q], lists.begins[q] + lists.counts[q]):
                indices[to], values[to] = lists.indices[e], lists.values[e]
                to += 1
        workspace.panel_begins[rows + k] = to - k * n_pre


@inlined
def add_logits(pools, p0, workspace, begin, count, gates, at, spare):
    """gates[at:] = the logits of all blocks, for `count` of the gathered events from `begin` on.

    GATE_TILE numbers of gates[spare:] are scratch.
    """
    pointers, values = pools.pointers, pools.values
    pitch, rank, units = pointers[p0 + GATE_PITCH], pointers[p0 + RANK], pointers[p0 + BLOCK_UNITS]
    part = (PART_INPUTS + units - 1) // units * units
    copy(values, pointers[p0 + GATE_BIAS], gates, at, pitch)
    ids, sent = workspace.panel_indices, workspace.panel_values
    if rank == 0:
        add_gate_rows(values, pointers[p0 + GATE], pitch, ids, sent, begin, count, gates, at, part, gates, spare)
    else:
        # What lies between the factors, and its numbers: an event list of all of them.
        between, numbers, in_pitch = workspace.segment_factors[0], workspace.segment_numbers[0], pointers[p0 + IN_PITCH]
        for q in range(in_pitch):
            between[q] = cells.ZERO
            numbers[q] = q
        add_gate_rows(*(values, pointers[p0 + GATE], in_pitch, ids, sent, begin, count, between, 0, part, gates, spare))
        # A sum over what lies between the factors has one part.
        add_gate_rows(
            *(values, pointers[p0 + GATE_OUT], pitch, numbers, between, 0, rank, gates, at, in_pitch, gates, spare)
        )


@internal
def add_gate_rows(values, start, pitch, ids, sent, begin, count, sums, at, part, scratch, spare):
    """Add the rows of a gate, `pitch` numbers each from values[start] on, of `count` events to sums[at:].

    part : the inputs of a part of a sum; the first part is added to what is there, term by term
    GATE_TILE numbers of scratch[spare:] are overwritten
    """
    end = begin + count
    for i in range(0, pitch, TILE * LANES):
        vectors, first = min(TILE, (pitch - i) // LANES), begin
        while first < end:
            last, limit = first, (ids[first] // part + 1) * part
            while last < end and ids[last] < limit:
                last += 1
            if limit == part:
                add_rows(sums, at + i, values, start + i, pitch, values, 0, ids, sent, first, last - first, vectors)
            else:
                for k in range(vectors * LANES):
                    scratch[spare + k] = cells.ZERO
                add_rows(scratch, spare, values, start + i, pitch, values, 0, ids, sent, first, last - first, vectors)
                for k in range(vectors * LANES):
                    sums[at + i + k] += scratch[spare + k]
            first = last


@inlined
def choose(gates, at, keys, k0, n, kept):
    """keys[k0 + b] = 1 for the `kept` largest of the `n` logits gates[at:], 0 for the others; True if all are finite.

    Of equal logits, those of the lowest numbers are chosen. -0 becomes +0, which is equal to it.
    """
    finite, raw = True, gates.view(np.int32)
    for b in range(n):
        logit = gates[at + b] + cells.ZERO
        finite &= logit - logit == cells.ZERO
        gates[at + b] = logit
    for b in range(n):
        key = raw[at + b]
        keys[k0 + b] = key ^ ((key >> 31) & FLIPPED)
    # The largest number that at least `kept` keys reach, found bit by bit.
    lowest = LOWEST_KEY
    for bit in range(KEY_BITS):
        candidate, reached = np.int32(lowest + (1 << (KEY_BITS - 1 - bit))), 0
        for b in range(n):
            reached += keys[k0 + b] >= candidate
        if reached >= kept:
            lowest = np.int64(candidate)
    room = kept
    for b in range(n):
        room -= keys[k0 + b] > lowest
    for b in range(n):
        key = keys[k0 + b]
        tied = key == lowest and room > 0
        room -= tied
        keys[k0 + b] = key > lowest or tied
    return finite


@inlined
def to_gates(gates, at, keys, k0, n, softmax):
    """Turn the logits gates[at:] of the chosen blocks into gates, and others into 0; True if the gates are finite."""
    pivot, total = cells.ZERO, cells.ZERO
    started = False
    for b in range(n):
        if keys[k0 + b] != 0:
            logit = gates[at + b]
            larger = logit > pivot if softmax else cells.absolute(logit) > cells.absolute(pivot)
            if larger or not started:
                pivot, started = logit, True
    for b in range(n):
        ratio = cells.ZERO
        if keys[k0 + b] != 0:
            ratio = cells.ONE
            if softmax:
                ratio = cells.exp(gates[at + b] - pivot)
            elif pivot != cells.ZERO:
                ratio = gates[at + b] / pivot
            total += ratio
        gates[at + b] = ratio
    factor = np.float32(n) / total
    for b in range(n):
        gates[at + b] *= factor
    return factor - factor == cells.ZERO


@inlined
def products_are_finite(gates, at, n, values, begin, count):
    """Whether the product of the largest of `n` gates and the largest of `count` event values is finite."""
    gate, value = cells.ZERO, cells.ZERO
    for b in range(n):
        gate = max(gate, cells.absolute(gates[at + b]))
    for e in range(begin, begin + count):
        value = max(value, cells.absolute(values[e]))
    largest = gate * value
    return largest - largest == cells.ZERO


@inlined
def gates_of_row(gates, at, keys, k0, n, kept, softmax, values, begin, count):
    """Turn the `n` logits gates[at:] of a row into gates; returns 0, or why they are not finite.

    keys          : from k0 on 1 for a chosen block, else 0, written here
    values        : the inputs of the row, `count` from `begin` on
    """
    # planted fault: a chosen block too few
    finite = choose(gates, at, keys, k0, n, kept)
    fault = 0 if finite else BAD_LOGIT
    if not to_gates(gates, at, keys, k0, n, softmax) and fault == 0:
        fault = CANCELLED
    if not products_are_finite(gates, at, n, values, begin, count) and fault == 0:
        fault = TOO_LARGE
    return fault


@inlined
def row_gates(pools, p0, workspace, row, begin, count, at, spare):
    """Write the gates of drive row `row` to workspace.scratch from `at` on; what lies from `spare` on is scratch.

    The drive rows of a sample are visited in the order of their steps.
    """
    pointers, gates, values = pools.pointers, workspace.scratch, workspace.panel_values
    n, kept, period = pointers[p0 + ALL_BLOCKS], pointers[p0 + KEPT], pointers[p0 + PERIOD]
    keys, longs, own, fault = gates.view(np.int32), gates.view(np.int64), 0, 0
    if period > 1:
        samples, pitch = longs[len(longs) - 1], pointers[p0 + HELD_PITCH]
        own = len(gates) - LANES - (samples - row % samples) * pitch + pointers[p0 + HELD]
    # The number of further steps with the same gates, and the gates.
    left, held = own >> 1, own + LANES
    if period > 1 and longs[left] > 0:
        copy(gates, held, gates, at, n)
        longs[left] -= 1
        if not products_are_finite(gates, at, n, values, begin, count):
            fault = TOO_LARGE
    else:
        add_logits(pools, p0, workspace, begin, count, gates, at, spare)
        if n > 0:
            softmax = pointers[p0 + SOFTMAX] != 0
            fault = gates_of_row(gates, at, keys, spare, n, kept, softmax, values, begin, count)
        if period > 1:
            copy(gates, at, gates, held, n)
            longs[left] = period - 1
    if fault != 0 and (pointers[p0 + FAULT] == 0 or fault < pointers[p0 + FAULT]):
        pointers[p0 + FAULT] = fault


@inlined
def add_pieces(column_tile, weights, tables, n_pre, first_row, rows, drives):
    """Add the chosen blocks of some drive rows, whose events were gathered and whose gates are known."""
    pools, workspace, p0 = tables.pools, tables.workspace, column_tile[POINTERS]
    pointers, gates, s0 = pools.pointers, workspace.scratch, column_tile[SCALES]
    block_rows, units, gate_pitch = pointers[p0 + BLOCK_ROWS], pointers[p0 + BLOCK_UNITS], pointers[p0 + GATE_PITCH]
    ids, values, scaled = workspace.panel_indices, workspace.panel_values, workspace.dense_inputs
    # Where the events of a drive row in the present block row begin, and how many events the drive row has.
    begins = workspace.panel_begins
    firsts = p0 + GATED_HEADER
    pieces = firsts + block_rows + 1
    for k in range(rows):
        begins[k] = k * n_pre
    for row in range(block_rows):
        for q in range(pointers[firsts + row], pointers[firsts + row + 1]):
            piece = pieces + PIECE_FIELDS * q
            block, target = pointers[piece + PIECE_BLOCK], pointers[piece + PIECE_TARGET]
            vectors = pointers[piece + PIECE_VECTORS]
            pitch, tile = vectors * LANES, TILE * LANES
            # Where the weights of unit 0 would lie.
            start = values_at(column_tile, weights) + pointers[piece + PIECE_VALUES] - row * units * pitch
            for k in range(rows):
                gate, begin, end = gates[k * gate_pitch + block], begins[k], k * n_pre + begins[rows + k]
                if gate != cells.ZERO:
                    last = begin
                    while last < end and ids[last] < (row + 1) * units:
                        # planted fault: gate forgotten
                        scaled[last] = gate * values[last]
                        last += 1
                    at, count = (first_row + k) * tables.drive_pitch + target, last - begin
                    for i in range(0, pitch, tile):
                        some = min(TILE, vectors - i // LANES)
                        add_rows(
                            *(drives, at + i, weights, start + i, pitch, pools.values, s0),
                            *(ids, scaled, begin, count, some),
                        )
        for k in range(rows):
            end = k * n_pre + begins[rows + k]
            while begins[k] < end and ids[begins[k]] < (row + 1) * units:
                begins[k] += 1


def by_gates(dtype):
    """The kernel for weights of a dtype."""

    @called_by_address
    def product_by_gates(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
        pools, workspace = tables.pools, tables.workspace
        weights = pools.values.view(dtype)
        for w in range(first_tile, last_tile):
            column_tile = tables.column_tiles[w]
            low, width, p0 = column_tile[LOW], column_tile[HIGH] - column_tile[LOW], column_tile[POINTERS]
            pitch = pools.pointers[p0 + GATE_PITCH]
            for first_row in range(0, events.rows, GATED_ROWS):
                rows = min(GATED_ROWS, events.rows - first_row)
                gather_events(events, first_row, rows, n_pre, workspace)
                for k in range(rows):
                    copy(pools.biases, bias_begin + low, drives, (first_row + k) * tables.drive_pitch + low, width)
                    count = workspace.panel_begins[rows + k]
                    row_gates(pools, p0, workspace, first_row + k, k * n_pre, count, k * pitch, rows * pitch)
                add_pieces(column_tile, weights, tables, n_pre, first_row, rows, drives)

    return product_by_gates
