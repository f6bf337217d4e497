"""The kernels that a plan calls by address: one per kind and storage of column tiles, and per cell.

Each is compiled, or read from disk, when a network first needs it. A product kernel takes `by_address.PRODUCT`, and
writes some column tiles, all of its kind, over all drive rows.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from eventrnn.cells import fma
from eventrnn.cpu.kernels.array_table import float32_of
from eventrnn.cpu.kernels.by_address import GATING, PRODUCT, REST, UPDATE, address_of
from eventrnn.cpu.kernels.cell_update import (
    compact_gated_events,
    update,
    update_gru,
    update_gru_before,
    update_lstm,
    update_paper,
)
from eventrnn.cpu.kernels.gated_products import by_gates
from eventrnn.cpu.kernels.integer_products import product_in_integers
from eventrnn.cpu.kernels.jit import allocating_by_address, called_by_address
from eventrnn.cpu.kernels.row_products import (
    add_blocks,
    add_dense_rows,
    add_few_blocks,
    add_single,
    add_single_masked,
)
from eventrnn.cpu.kernels.silence import rest, rest_paper
from eventrnn.cpu.kernels.spmm import copy
from eventrnn.cpu.kernels.strip_products import by_strips
from eventrnn.cpu.kernels.tile_products import (
    bin_by_panel,
    blas_product,
    densify,
    panel_bits,
    single_tile_product,
    tile_product,
)
from eventrnn.cpu.tables import (
    BFLOAT16,
    BLAS,
    BLOCKS,
    DENSE_FROM,
    FEW_BLOCKS,
    FLOAT32,
    GATED,
    HIGH,
    IN_PLACE,
    INT8,
    INTEGER_BLOCKS,
    LOW,
    MASKED,
    PITCH,
    POINTERS,
    ROW_TILES,
    ROWS,
    SCATTER,
    SINGLE_TILES,
    SMALL_PANEL_BITS,
    STRIPS,
    VALUES,
    WIDTH,
)

#: storage -> type of its weights in the pool
_DTYPES = {FLOAT32: np.float32, BFLOAT16: np.uint16, INT8: np.int8}

#: kind of column tile -> what adds a list of events to a drive row
_ADD = {
    ROWS: add_dense_rows,
    SCATTER: add_single,
    MASKED: add_single_masked,
    BLOCKS: add_blocks,
    FEW_BLOCKS: add_few_blocks,
}


def _by_rows(add_events, dtype):
    """A kernel that computes one drive row after the other."""

    @called_by_address
    def product_by_rows(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
        pools, lists = tables.pools, events.lists
        weights = pools.values.view(dtype)
        for w in range(first_tile, last_tile):
            column_tile = tables.column_tiles[w]
            low, width = column_tile[LOW], column_tile[HIGH] - column_tile[LOW]
            for k in range(events.rows):
                at, first = k * tables.drive_pitch, events.first + k * events.per_row
                copy(pools.biases, bias_begin + low, drives, at + low, width)
                for q in range(first, first + events.per_row):
                    begin, count = lists.begins[q], lists.counts[q]
                    add_events(column_tile, weights, pools, lists, begin, count, drives, at, tables.workspace)

    return product_by_rows


def _by_tiles(dtype):
    """A kernel that reads a weight once for all drive rows.

    It takes the events panel by panel of units or, where most units are active, visits every unit.
    """

    @called_by_address
    def product_by_tiles(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
        total, weights = 0, tables.pools.values.view(dtype)
        for q in range(events.first, events.first + events.rows * events.per_row):
            total += events.lists.counts[q]
        every_unit = total >= tables.column_tiles[first_tile, DENSE_FROM] * events.rows
        if every_unit:
            densify(n_pre, events, tables.workspace.dense_inputs)
        else:
            bin_by_panel(n_pre, panel_bits(events.rows, weights), events, tables.workspace)
        for w in range(first_tile, last_tile):
            column_tile = tables.column_tiles[w]
            tile_product(column_tile, weights, tables, bias_begin, n_pre, every_unit, events.rows, drives)

    return product_by_tiles


def _by_single_tiles(dtype):
    """A kernel that makes a panel of single weights dense once for all drive rows."""

    @called_by_address
    def product_by_single_tiles(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
        weights = tables.pools.values.view(dtype)
        bin_by_panel(n_pre, SMALL_PANEL_BITS, events, tables.workspace)
        for w in range(first_tile, last_tile):
            single_tile_product(tables.column_tiles[w], weights, tables, bias_begin, n_pre, events.rows, drives)

    return product_by_single_tiles


@allocating_by_address
def product_by_blas(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
    """Column tiles through BLAS."""
    densify(n_pre, events, tables.workspace.dense_inputs)
    for w in range(first_tile, last_tile):
        blas_product(tables.column_tiles[w], tables, bias_begin, n_pre, events.rows, drives)


@called_by_address
def product_in_place(tables, first_tile, last_tile, bias_begin, n_pre, events, drives):
    """Column tiles of kind IN_PLACE: rows of the network's own array, one drive row after the other.

    A column tile ends where its segment ends: what lies behind it in a row belongs to another tile, or is no memory of
    the array.
    """
    pools, lists = tables.pools, events.lists
    for w in range(first_tile, last_tile):
        column_tile = tables.column_tiles[w]
        low, width, pitch = column_tile[LOW], column_tile[HIGH] - column_tile[LOW], column_tile[PITCH]
        weights = float32_of(column_tile[POINTERS], n_pre * pitch)
        for k in range(events.rows):
            at, first = k * tables.drive_pitch, events.first + k * events.per_row
            copy(pools.biases, bias_begin + low, drives, at + low, width)
            for q in range(first, first + events.per_row):
                begin, count = lists.begins[q], lists.counts[q]
                add_dense_rows(column_tile, weights, pools, lists, begin, count, drives, at, tables.workspace)
                for e in range(begin, begin + count):
                    row, value = column_tile[VALUES] + np.int64(lists.indices[e]) * pitch, lists.values[e]
                    for i in range(column_tile[WIDTH], width):
                        drives[at + low + i] = fma(weights[row + i], value, drives[at + low + i])


@cache
def _product(kind: int, storage: int):
    if kind == BLAS:
        return product_by_blas
    if kind == IN_PLACE:
        return product_in_place
    if kind == INTEGER_BLOCKS:
        return product_in_integers
    if kind == STRIPS:
        return by_strips(_DTYPES[storage])
    if kind == GATED:
        return by_gates(_DTYPES[storage])
    if kind == SINGLE_TILES:
        return _by_single_tiles(_DTYPES[storage])
    return _by_tiles(_DTYPES[storage]) if kind == ROW_TILES else _by_rows(_ADD[kind], _DTYPES[storage])


@cache
def product_address(kind: int, storage: int) -> int:
    """Address of the kernel for a kind and a storage of column tiles."""
    return address_of(_product(kind, storage), PRODUCT)


#: name and variant of a cell -> its update, what gates the events of the candidate where the reset gate is first, and
#: its silent steps
_UPDATES = {
    ("egru", "evnn"): (update, None, rest),
    ("egru", "paper"): (update_paper, compact_gated_events, rest_paper),
    ("gru", "after"): (update_gru, None, None),
    ("gru", "before"): (update_gru_before, compact_gated_events, None),
    ("lstm", "standard"): (update_lstm, None, None),
}


@cache
def update_addresses(name: str, variant: str) -> tuple[int, int, int]:
    """Addresses of a cell's update, of what gates the events of its candidate, and of its silent steps; 0 for none."""
    changes, gates, rests = (
        0 if kernel is None else address_of(kernel, kind)
        for kernel, kind in zip(_UPDATES[name, variant], (UPDATE, GATING, REST), strict=True)
    )
    return changes, gates, rests
