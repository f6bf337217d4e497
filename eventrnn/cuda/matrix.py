"""A matrix on the device, in the ways that kernels ask for, and products of many independent rows with it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from eventrnn.cuda import tables as k
from eventrnn.cuda.cluster_plan import MOST_REACHED
from eventrnn.cuda.device import Device
from eventrnn.cuda.packing import Reached, Strips, pack, per_strip
from eventrnn.cuda.products import products_kernel
from eventrnn.cuda.tables import LANES
from eventrnn.weights import Dense, Weights

# Warps of a block of products, and strips that it looks a row's events up in.
WARPS, MOST_TOGETHER = 32, 8


class Matrix:
    """Weights and biases, (n_pre, gates * units), each layout made when it is first asked for.

    `strips` : by gate and tile of `width` units (`packing.Strips`), with `values`, `table`, `starts`, `bias`
    `columns`: by 32 columns of all gates together (`packing.Reached`), with `units`, `rows`, `firsts`, `column_bias`
    """

    def __init__(self, device: Device, weights: Weights, bias: np.ndarray, gates: int, width: int):
        self.device, self.weights, self.gates, self.width = device, weights, gates, width
        self.host_bias = bias

    @property
    def narrow(self) -> bool:
        """Whether values are stored as bfloat16."""
        return self.weights.storage == "bfloat16"

    @property
    def sparse(self) -> bool:
        """Whether looking up who reaches a strip is worth it."""
        if isinstance(self.weights, Dense):
            return False
        return len(self.columns.units) <= MOST_REACHED * self.weights.shape[0] * (len(self.columns.firsts) - 1)

    @cached_property
    def strips(self) -> Strips:
        return pack(self.weights, self.gates, self.width)

    @cached_property
    def columns(self) -> Reached:
        return Reached.of(pack(self.weights, 1, LANES))

    def _put(self, array: np.ndarray) -> Any:
        with self.device.on_stream():
            return self.device.put(array)

    @cached_property
    def values(self) -> Any:
        return self._put(self.strips.values)

    @cached_property
    def table(self) -> Any:
        return self._put(self.strips.table)

    @cached_property
    def starts(self) -> Any:
        return self._put(self.strips.starts)

    @cached_property
    def bias(self) -> Any:
        return self._put(per_strip(self.host_bias, self.gates, self.width))

    @cached_property
    def units(self) -> Any:
        return self._put(self.columns.units)

    @cached_property
    def rows(self) -> Any:
        return self._put(self.columns.rows)

    @cached_property
    def firsts(self) -> Any:
        return self._put(self.columns.firsts)

    @cached_property
    def column_bias(self) -> Any:
        return self._put(per_strip(self.host_bias, 1, LANES))

    def described(self, resident: bool, kind: str = "rows") -> str:
        """How the weights lie and where they are read from."""
        storage = "bfloat16" if self.narrow else "float32"
        return f"{kind} {storage} in {'shared memory' if resident else 'L2'}"

    @cached_property
    def room(self) -> tuple[bool, int, int]:
        """Of products of many rows: whether the strips of a block fit in its memory, how many they are, its bytes."""
        firsts, n_pre = self.columns.firsts, self.weights.shape[0]
        least = k.LISTED_BYTES * WARPS
        index = -(-4 * n_pre // 16) * 16
        row_bytes = LANES * self.columns.rows.itemsize
        found = False, 1, least + index
        for together in range(1, min(MOST_TOGETHER, len(firsts) - 1) + 1):
            ends = firsts[np.minimum(np.arange(len(firsts) - 1) + together, len(firsts) - 1)]
            needed = least + index * together + row_bytes * int((ends - firsts[:-1]).max())
            if needed <= self.device.shared_bytes:
                found = True, together, needed
        return found

    def products(self, table: tuple[Any, Any, Any], rows: int, row_of=None):
        """Drives of independent rows of events, (rows, gates * units).

        `table`: where each list begins, how long it is, and the lists. `row_of`: the list of each row, if not its own.
        """
        device = self.device
        n_pre, columns = self.weights.shape
        firsts, counts, lists = table
        out = device.empty((rows, columns), np.float32)
        if rows == 0:
            return out
        resident, together, shared = self.room
        if rows < WARPS and resident:
            # Bringing weights in would cost more than the rows.
            resident, together, shared = False, 1, k.LISTED_BYTES * WARPS + -(-4 * n_pre // 16) * 16
        strips = len(self.columns.firsts) - 1
        lots = -(-strips // together)
        splits = max(1, min(-(-rows // WARPS), device.multiprocessors // lots))
        way = k.way(k.MASKED, self.narrow, resident)
        kernel = device.kernel(("products", way), lambda: products_kernel(way), 32 * WARPS)
        device.launch(
            kernel, lots * splits, 32 * WARPS,
            self.units.data.ptr, self.rows.data.ptr, self.firsts.data.ptr, self.column_bias.data.ptr,
            n_pre, columns, strips, together, firsts.data.ptr, counts.data.ptr, lists.data.ptr,
            0 if row_of is None else row_of.data.ptr, rows, splits, out.data.ptr,
            shared=shared,
        )  # fmt: skip
        return out
