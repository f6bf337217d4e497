"""A matrix on the GPU, in the ways that kernels ask for, and its products with rows of events that need not wait."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.cluster_plan import MOST_REACHED
from eventrnn.cuda.kernels.batched_products import products_kernel
from eventrnn.cuda.packing import CompactStrips, GroupedStrips, Strips, pack, per_strip
from eventrnn.cuda.tables import LANES
from eventrnn.weights import Dense

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.weights import Weights


# Warps of a block of products.
WARPS = 32


class Matrix:
    """Weights and biases, (n_pre, gates * units), each layout made when it is first asked for.

    `strips` : by gate and tile of `width` units (`packing.Strips`), with `values`, `table`, `starts`, `bias`
    `columns`: by 32 columns of all gates (`packing.CompactStrips`), with `units`, `rows`, `firsts`, `column_bias`
    `lots`   : the same for products (`packing.GroupedStrips`), with `index`, `lot_rows`, `lot_firsts`
    """

    def __init__(self, device: Device, weights: Weights, bias: np.ndarray, gates: int, width: int):
        self.device, self.weights, self.gates, self.width = device, weights, gates, width
        self.host_bias = bias

    @classmethod
    def of(cls, device: Device, weights: Weights, bias: np.ndarray, gates: int, width: int) -> Matrix:
        """That matrix; nothing is put on the GPU yet."""
        return cls(device, weights, bias, gates, width)

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
    def columns(self) -> CompactStrips:
        return CompactStrips.of(pack(self.weights, 1, LANES))

    @cached_property
    def lots(self) -> GroupedStrips:
        return GroupedStrips.of(self.columns, self.weights.shape[0], self.room(self.device)[1])

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

    @cached_property
    def index(self) -> Any:
        return self._put(self.lots.index)

    @cached_property
    def lot_rows(self) -> Any:
        return self._put(self.lots.rows)

    @cached_property
    def lot_firsts(self) -> Any:
        return self._put(self.lots.firsts)

    def described(self, resident: bool, kind: str = "rows") -> str:
        """How it lies and where it is read from, in words."""
        storage = "bfloat16" if self.narrow else "float32"
        return f"{kind} {storage} in {'shared memory' if resident else 'L2'}"

    def described_way(self, way: int, cluster: int) -> str:
        """The same of one that kernels of layers take that way."""
        kind = "rows" if cluster else ("dense", "masked", "runs")[way & tables.KINDS]
        return self.described(bool(way & tables.RESIDENT), kind)

    def room(self, device: Device) -> tuple[bool, int, int]:
        """Of products of many rows: whether a lot of strips fits in shared memory, how many they are, and its bytes."""
        firsts = self.columns.firsts
        count = len(firsts) - 1
        row_bytes = LANES * self.columns.rows.itemsize
        for together in range(min(tables.STRIPS_PER_GROUP, count), 0, -1):
            edges = np.append(firsts[:-1:together], firsts[-1])
            needed = self._least + row_bytes * int(np.diff(edges).max(initial=0))
            if needed <= device.shared_bytes:
                return True, together, needed
        return False, min(tables.STRIPS_PER_GROUP, count), self._least

    @property
    def _least(self) -> int:
        """Bytes of shared memory that products take without the weights."""
        return tables.GATHER_BUFFER_BYTES * WARPS + -(-4 * self.weights.shape[0] // 16) * 16

    def products(self, device: Device, table, rows: int, row_of=None, out=None):
        """Drives of independent rows of events, (rows, gates * units).

        `table`: where each list begins, how long it is, and the lists. `row_of`: the list of each row, if not its own.
        """
        n_pre, columns = self.weights.shape
        firsts, counts, lists = table
        if out is None:
            out = device.empty((rows, columns), np.float32)
        if rows == 0:
            return out
        resident, together, shared = self.room(device)
        if rows < WARPS:
            # Bringing weights in would take longer than the rows.
            resident, shared = False, self._least
        strips = len(self.columns.firsts) - 1
        lots = -(-strips // together)
        splits = max(1, min(-(-rows // WARPS), device.multiprocessors // lots))
        way = tables.layout_code(tables.MASKED, self.narrow, resident)
        kernel = device.kernel(("products", way), lambda: products_kernel(way), 32 * WARPS)
        device.launch(
            kernel, lots * splits, 32 * WARPS,
            self.index.data.ptr, self.lot_rows.data.ptr, self.lot_firsts.data.ptr, self.column_bias.data.ptr,
            n_pre, columns, strips, together, firsts.data.ptr, counts.data.ptr, lists.data.ptr,
            0 if row_of is None else row_of.data.ptr, rows, splits, out.data.ptr,
            shared=shared,
        )  # fmt: skip
        return out
