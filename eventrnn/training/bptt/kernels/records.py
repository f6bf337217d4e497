"""Named tuples of arrays that the training kernels take. Numba unpacks them: a field costs what an argument costs.

Letters: T steps and B samples of the window, N units of the layer, I inputs of a matrix, R = T * B rows. Arrays are
flat and C-ordered, and a shape such as (T, B, N) names the order of their elements; only a leading axis `threads` is an
axis of the array, and gives one row to each thread. Values, weights and gradients have no unit of measure. "Scratch"
has no meaning between two calls.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from eventrnn.cpu.tables import WeightPools

# Which weights of a matrix a product reads: all of them; segments of neighbouring columns; single weights.
ALL, SEGMENTS, SINGLE = range(3)

# Which (sample, unit) pairs are listed: units that fired or whose surrogate slope is not zero; units that fired; all.
ACTIVE, FIRED, EVERY = range(3)


class WindowShape(NamedTuple):
    """Size of a window, and which variant of the cell it runs."""

    paper: bool  # True for the paper's variant (reset gate before the recurrent product)
    steps: int  # T
    batch: int  # B
    units: int  # N


class SurrogateParameters(NamedTuple):
    """The surrogate derivative of an event (`cells.surrogate_slope`) and the thresholds that it is centred on."""

    kind: int  # code of `cells.SURROGATES`
    dampening: np.float32  # height of the slope
    support: np.float32  # inverse of the half width, per unit of cell state
    threshold: np.ndarray  # (N,) float32, in units of the cell state


class TapeArrays(NamedTuple):
    """The values of a layer that the forward pass keeps. `y` and `c` begin with the state before the window."""

    u: np.ndarray  # (T, B, N) float32, keep gate
    r: np.ndarray  # (T, B, N) float32, reset gate
    g: np.ndarray  # (T, B, N) float32, candidate
    q: np.ndarray  # (T, B, N) float32, the candidate's recurrent drive; paper's variant: r * y of the step before
    v: np.ndarray  # (T, B, N) float32, cell state before the event
    y: np.ndarray  # (T + 1, B, N) float32, output
    c: np.ndarray  # (T + 1, B, N) float32, cell state after the event


class PlainSize(NamedTuple):
    """Size of a step of a cell without thresholds."""

    batch: int  # B
    units: int  # N


class PlainDrives(NamedTuple):
    """The drives of a cell without thresholds, of G gates, before biases are added."""

    into: np.ndarray  # (T, B, GN) float32, input drives
    rec: np.ndarray  # (B, GN) float32, recurrent drives of the step
    bias_in: np.ndarray  # (GN,) float32
    bias_rec: np.ndarray  # (GN,) float32
    held: np.ndarray  # (T, B, N) float32, above zero where a unit keeps its cell; (0,) without zoneout


class PlainArrays(NamedTuple):
    """The values of a layer without thresholds that the forward pass keeps. `y` and `c` begin with the state before."""

    gates: np.ndarray  # (T, B, GN) float32
    extra: np.ndarray  # (T, B, N) float32, GRU: the candidate's recurrent drive, or r * h if the reset gate is first
    y: np.ndarray  # (T + 1, B, N) float32, output
    c: np.ndarray  # (T + 1, B, N) float32, cell; in a GRU the same memory as `y`


class PlainDeltas(NamedTuple):
    """Gradients of a layer without thresholds. `d_y` and `d_c` are those of one step."""

    d_in: np.ndarray  # (T, B, GN) float32, of the input drives
    d_rec: np.ndarray  # (T, B, GN) float32, of the recurrent drives; the memory of `d_in` where they are equal
    d_y: np.ndarray  # (B, N) float32, of the output
    d_cell: np.ndarray  # (T, B, N) float32, of the cell, by terms of the loss that contain it; (0,) for none
    d_c: np.ndarray  # (B, N) float32, of the cell carried to the next step


class PackedWeights(NamedTuple):
    """A packed matrix as `propagate_all` reads it (laid out by `cpu/packing.py`), and the bias of its drives."""

    tiles: np.ndarray  # (threads, tiles, FIELDS) int64, column tiles of each thread's units
    n_gate_tiles: int  # the first so many tiles hold columns of the gates u and r, the others those of the candidate
    pools: WeightPools  # `biases` has (columns,) entries


class SampledWeights(NamedTuple):
    """A matrix (n_pre, columns) as the sampled product reads it, or a range of its columns."""

    layout: int  # ALL, SEGMENTS or SINGLE
    width: int  # columns of a segment; 0 for ALL
    values: np.ndarray  # float32; for ALL: (chunks, n_pre, CHUNK), else (stored, width), by unit, then column
    columns: np.ndarray  # (stored,) int32, first column of each entry
    bounds: np.ndarray  # (n_pre, 2) int64, first and past-the-last entry of each unit within the range of columns
    first_column: int  # where the range begins
    n_columns: int  # columns of the range


class ActivePairs(NamedTuple):
    """Lists of (sample, unit) pairs whose gradient is computed, and the scratch of the sampled product.

    In time loops and kernels that take rows from a counter, every array has a leading axis `threads`;
    `pairs_of_thread` gives one thread's rows. Tile k covers `tile_rows(rows)` rows of the deltas.
    """

    samples: np.ndarray  # (n * rows,) int32: those of unit j begin at j * rows
    counts: np.ndarray  # (n,) int64, samples of each unit
    hit_units: np.ndarray  # (n + 16,) int32, scratch
    hit_values: np.ndarray  # (n + 16,) float32, scratch
    tile_begins: np.ndarray  # (tiles * n,) int64, where the list of tile k and unit j begins in `tile_samples`
    tile_counts: np.ndarray  # (tiles * n,) int64, its length without the padding to a multiple of PAIRS
    tile_samples: np.ndarray  # int32, rows counted from the first row of the tile
    sums: np.ndarray  # as `tile_samples`, float32, scratch
    delta_tile: np.ndarray  # (tile_rows * CHUNK,) float32, scratch


class Upstream(NamedTuple):
    """Gradients that reach a layer from outside of its recurrence."""

    d_y: np.ndarray  # (T, B, N) float32, of the output
    d_cell: np.ndarray  # (T, B, N) float32, of the cell state before the event; (B, N) zeros where there is none
    d_c: np.ndarray  # (B, N) float32, of the cell state after the window; updated in place, step by step


class Deltas(NamedTuple):
    """Gradients of the drives, and the sums over the window that are formed beside them."""

    d_in: np.ndarray  # (R, pitch) float32, of the input drives; the first 3N columns hold the gates (u, r, g)
    d_rec: np.ndarray  # the same of the recurrent drives; in the paper's variant the same array
    pitch: int  # floats from one row to the next
    d_threshold: np.ndarray  # (N,) float32
    d_bias: np.ndarray  # (4N,) float32: u, r, g of the input drive, g of the recurrent drive


class CompressedEvents(NamedTuple):
    """Non-zero elements of a matrix, tile by tile, compressed by row or by unit (`event_lists.py`)."""

    order: np.ndarray  # int32, the row (or unit) of each list of a tile
    indptr: np.ndarray  # int64, where each list begins; one more than there are lists, per tile
    indices: np.ndarray  # int32, the unit (or row) of each event
    values: np.ndarray  # float32, the value of each event


class ListScratch(NamedTuple):
    """Scratch of a thread that builds event lists."""

    counts: np.ndarray  # (threads, n) int64
    bins: np.ndarray  # (threads, tile + 2) int64
    hit_units: np.ndarray  # (threads, n + 16) int32; unused by `events_csr`
    hit_values: np.ndarray  # (threads, n + 16) float32; unused by `events_csr`


class StripScratch(NamedTuple):
    """Scratch of a thread that adds rows of a matrix, a strip of columns wide."""

    tile: np.ndarray  # (threads, TILE_ROWS * STRIP) float32, a tile of the matrix
    strip: np.ndarray  # (threads, rows * STRIP) float32, the sums


class StoredEntries(NamedTuple):
    """Stored weights of a pruned matrix whose gradient is formed together, in the order column, then unit."""

    chosen: np.ndarray  # (entries,) int32, which of the stored entries
    units: np.ndarray  # (stored,) int32, presynaptic unit of each
    columns: np.ndarray  # (stored,) int32, first column of each
    width: int  # columns of each; 1 for single weights
