"""Rows of the table by which a single step finds its arrays (`stepper.Stepper`); a row is (address, length).

The arrays are those of the records of `tables.py`, with one thread and one step, so an axis of threads has length one.
"""

from __future__ import annotations

(
    NUMBERS,
    BARRIER,
    LAYERS,
    COLUMN_TILES,
    VALUES,
    INDEX,
    POINTERS,
    BIASES,
    THRESHOLD,
    KEEP,
    PULL,
    UNIT_BOUNDS,
    DRIVE_BEGINS,
    INPUT_DRIVES,
    RECURRENT_DRIVES,
    EVENT_INDICES,
    EVENT_VALUES,
    EVENT_BEGINS,
    EVENT_COUNTS,
    LIST_BEGINS,
    LIST_COUNTS,
    DRIVE_OF,
    RESTS,
    GATED_INDICES,
    GATED_VALUES,
    PANEL_BEGINS,
    PANEL_INDICES,
    PANEL_VALUES,
    SEGMENT_NUMBERS,
    SEGMENT_FACTORS,
    DENSE_INPUTS,
    TILE,
    SCRATCH,
    INPUT_INDPTR,
    INPUT_INDICES,
    INPUT_VALUES,
    INPUT_ROW_OF,
    CELLS,
    OUTPUTS,
    HELD,
    CELLS_BEFORE,
    OUTPUTS_BEFORE,
    HELD_BEFORE,
    GRADED,
    BINARY,
    EMPTY,
) = range(46)

# Entries of the int64 array NUMBERS; RUN is the address of the compiled `time_loop.run`.
BATCH, CHUNK, DRIVE_PITCH, N_LAYERS, N_COLUMN_TILES, SHARE_ROWS, RUN = range(7)
