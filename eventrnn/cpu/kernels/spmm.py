"""Sparse products (SpMM) of the CPU engine: all drive rows of one product, from event lists.

A drive is the sum of a bias and of weight * event value over the events. `propagate_all` equals `reference.propagate`
bit for bit, except for column tiles of kind BLAS.

A thread computes the columns of its own column tiles, over all events, so no sum is split between threads. The shapes
and dtypes of the records are in `cpu/tables.py`:

    tables  `ThreadTables`: the thread's column tiles and workspace, and weights, which all threads read
    events  `RowEvents`: the event lists of each drive row, which all threads read
    drives  (rows * drive_pitch,) float32, of which a thread writes the positions of its own columns

The kernels that read weights are in `products.py`, one per kind and storage of column tiles. They are called by the
address that a column tile states, so that nothing here is compiled again for another format, and a kernel that no
network of this process needs is not compiled at all.
"""

from __future__ import annotations

from eventrnn.cpu.kernels.by_address import call_product
from eventrnn.cpu.kernels.jit import compiled, inlined
from eventrnn.cpu.kernels.simd import LANES, load, store
from eventrnn.cpu.tables import KERNEL, RowEvents, Workspace


@compiled
def propagate_steps(tables, first_tile, last_tile, bias_begin, n_pre, lists, begin, end, rows, drives):
    """Compute the products of the steps `begin` to `end`, one after the other, into the same drives.

    Every step has `rows` of the event lists, one per drive row. Other parameters: see `propagate_all`.
    """
    for t in range(begin, end):
        events = RowEvents(lists, t * rows, 1, rows)
        propagate_all(tables, first_tile, last_tile, bias_begin, n_pre, events, drives)


@inlined
def propagate_all(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
    """Write drive rows over the column tiles `first_tile` to `last_tile` of a matrix (n_pre, columns).

    A drive row starts from the bias, which is `pools.biases` from `bias_begin` on. The terms of its events are added in
    the order of its lists, one FMA per term. Only the weights of their units are read, except where many drive rows
    share weights: single ones are then read by whole panels, and dense ones all if most units are active.
    """
    first, column_tiles = first_tile, tables.column_tiles
    while first < last_tile:
        kernel, last = column_tiles[first, KERNEL], first + 1
        while last < last_tile and column_tiles[last, KERNEL] == kernel:
            last += 1
        # A column tile without columns has no kernel.
        if kernel != 0:
            call_product(kernel, (tables, first, last, bias_begin, n_pre, events, drives))
        first = last


@inlined
def workspace_of(shared, thread):
    """The `Workspace` of one thread, out of a `Workspace` whose arrays have a leading axis of threads."""
    return Workspace(
        shared.panel_begins[thread],
        shared.panel_indices[thread],
        shared.panel_values[thread],
        shared.segment_numbers[thread],
        shared.segment_factors[thread],
        shared.dense_inputs[thread],
        shared.tile[thread],
        shared.scratch[thread],
    )


@inlined
def copy(source, s, target, t, count):
    """target[t:t + count] = source[s:s + count]."""
    whole = count // LANES * LANES
    for i in range(0, whole, LANES):
        store(target, t + i, load(source, s + i))
    for i in range(whole, count):
        target[t + i] = source[s + i]
