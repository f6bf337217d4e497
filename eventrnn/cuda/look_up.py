"""The table of a one-hot input on the GPU: a row of drives is the row of a symbol, which is read where it lies."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.kernels.batched_products import look_up_kernel

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.weights import Dense

# Threads of a block, each of which computes a column.
THREADS = 128

# Blocks along the rows, at most: a launch has no more than 65,535.
MOST_ROW_BLOCKS = 1 << 12


class LookUpTable:
    """Dense float32 weights (symbols, columns) of a one-hot input, and biases (columns,). The GPU has one copy.

    Packed strips would be a further copy, and kernels of strips keep an index of all symbols in shared memory.

    device    : the GPU
    weights   : the weights on the host
    host_bias : the biases on the host
    """

    sparse = False
    product_description = "look-up float32 in L2"

    def __init__(self, device: Device, weights: Dense, bias: np.ndarray):
        self.device, self.weights, self.host_bias = device, weights, bias

    @cached_property
    def _rows(self) -> tuple[Any, Any]:
        """The weights and the biases on the GPU."""
        with self.device.on_stream():
            return self.device.put(self.weights.values), self.device.put(self.host_bias)

    def products(self, device: Device, table, rows: int, row_of=None, out=None, status=None):
        """Drives (rows, columns) float32 of independent rows of events, put on the stream; see `Matrix.products`."""
        columns = self.weights.shape[1]
        if out is None:
            out = device.empty((rows, columns), np.float32)
        if rows == 0:
            return out
        begins, counts, lists = table
        addresses = (each.data.ptr for each in self._rows)
        events = begins.data.ptr, counts.data.ptr, lists.data.ptr, 0 if row_of is None else row_of.data.ptr
        blocks = -(-columns // THREADS), min(rows, MOST_ROW_BLOCKS)
        kernel = device.kernel(("look_up",), look_up_kernel, THREADS)
        device.launch(kernel, blocks, THREADS, *addresses, columns, *events, rows, out.data.ptr)
        return out
