"""MOVED."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


# Columns of the table: how a window is stored, and where.
KIND, STORAGE, LOW, HIGH, VALUES, INDEX, POINTERS, WIDTH, PITCH, SCALES, EVERY_FROM = range(11)

FIELDS = 11

#: kinds of traversal
ROWS, ROW_TILES, SCATTER, MASKED, BLOCKS, MANY_BLOCKS, BLAS = range(7)

# Columns of a narrow window: 64 drives of them fit the L1 cache beside the weights that pass through.
ROW_TILE = 64

# Blocks are cut into pieces of the widest of these that divides them.
PIECES = (64, 32, 16, 8, 4)

#: how a window's weights are stored
FLOAT32, BFLOAT16, INT8 = range(3)

ITEMSIZE = (4, 2, 1)

# Columns of the layer table. IN to REC are the windows of w_in, REC to REC_GATED those of w_rec, and REC_GATED to END
# the candidate's columns of w_rec, apart in the paper's variant only. Biases and units: where the layer's begin.
UNITS, INPUTS, IN, REC, REC_GATED, END, BIAS_IN, BIAS_REC, UNIT_0 = range(9)
