"""One weight matrix on the GPU: the layouts that kernels read, and its products with independent rows of events."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables
from eventrnn.cuda.cluster_plan import MAX_GATHERED_SHARE
from eventrnn.cuda.kernels.batched_products import products_kernel
from eventrnn.cuda.packing import CompactStrips, GroupedStrips, Strips, pack, per_strip
from eventrnn.cuda.row_tiles import DenseTiles
from eventrnn.cuda.tables import LANES
from eventrnn.weights import Dense

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.weights import Weights


# Warps of a block of `products_kernel`.
WARPS = 32


@dataclass(frozen=True)
class ProductPlacement:
    """Where `products_kernel` reads the weights of one matrix.

    resident         : whether the weights of a group of strips fit in shared memory; otherwise they are read from L2
    strips_per_group : neighbouring strips of a group
    shared_bytes     : shared memory of a block, in bytes
    """

    resident: bool
    strips_per_group: int
    shared_bytes: int


class Matrix:
    """Weights (n_pre, gates * units) and biases (gates * units,). Each layout is packed and copied at its first use.

    Attributes
    ----------
    device    : the GPU
    weights   : the weights on the host, in their own format
    host_bias : the biases on the host
    gates     : gate rows of a unit for the matrices of a layer, 1 for a read-out
    width     : units per tile of `strips`
    tiled     : whether dense weights are multiplied with many rows in tiles, which skip no silent input

    Three layouts serve three kinds of kernels. Those on the host are records of `packing`, those on the GPU are arrays:

    strips  : `packing.Strips` by tile and gate, for the general and the single-stream plan. On the GPU `values`,
              `table`, `starts`, and `bias` (strips, 32) float32
    compact : `packing.CompactStrips` of 32 columns of all gates, for the cluster plan. On the GPU `units`, `rows`,
              `begins`, and `compact_bias` (strips, 32) float32
    grouped : `packing.GroupedStrips` of the same strips, for `products`. On the GPU `index`, `group_rows`,
              `group_begins`; the biases are `compact_bias`
    """

    def __init__(
        self, device: Device, weights: Weights, bias: np.ndarray, gates: int, width: int, *, tiled: bool = False
    ):
        self.device, self.weights, self.gates, self.width = device, weights, gates, width
        self.host_bias, self.tiled = bias, tiled and isinstance(weights, Dense)

    @property
    def narrow(self) -> bool:
        """Whether values are stored as bfloat16."""
        return self.weights.storage == "bfloat16"

    @property
    def sparse(self) -> bool:
        """Whether a gather of the units that reach a strip is faster than a list of all events."""
        if isinstance(self.weights, Dense):
            return False
        strips = len(self.compact.begins) - 1
        return len(self.compact.units) <= MAX_GATHERED_SHARE * self.weights.shape[0] * strips

    # --- layouts on the host ---

    @cached_property
    def strips(self) -> Strips:
        return pack(self.weights, self.gates, self.width)

    @cached_property
    def compact(self) -> CompactStrips:
        return CompactStrips.of(pack(self.weights, 1, LANES))

    @cached_property
    def grouped(self) -> GroupedStrips:
        return GroupedStrips.of(self.compact, self.weights.shape[0], self.placement.strips_per_group)

    # --- arrays on the GPU ---

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
        return self._put(self.compact.units)

    @cached_property
    def rows(self) -> Any:
        return self._put(self.compact.rows)

    @cached_property
    def begins(self) -> Any:
        return self._put(self.compact.begins)

    @cached_property
    def compact_bias(self) -> Any:
        return self._put(per_strip(self.host_bias, 1, LANES))

    @cached_property
    def index(self) -> Any:
        return self._put(self.grouped.index)

    @cached_property
    def group_rows(self) -> Any:
        return self._put(self.grouped.rows)

    @cached_property
    def group_begins(self) -> Any:
        return self._put(self.grouped.begins)

    # --- descriptions, for `Simulation.paths` ---

    def description(self, resident: bool, kind: str = "rows") -> str:
        """Layout, storage type and memory of the weights, such as "rows float32 in L2"."""
        storage = "bfloat16" if self.narrow else "float32"
        return f"{kind} {storage} in {'shared memory' if resident else 'L2'}"

    def layout_description(self, layout: int, cluster: int) -> str:
        """The description of a layout code, as a plan with `cluster` blocks per cluster (0: none) reads it."""
        kind = "rows" if cluster else ("dense", "masked", "runs")[layout & tables.KINDS]
        return self.description(bool(layout & tables.RESIDENT), kind)

    @property
    def product_description(self) -> str:
        """The description of the layout that `products` reads for many rows."""
        return self.description(False, "tiles") if self.tiled else self.description(self.placement.resident)

    # --- products ---

    @cached_property
    def placement(self) -> ProductPlacement:
        """As many strips per group as fit in shared memory; the largest group, read from L2, if not even one fits."""
        begins = self.compact.begins
        count = len(begins) - 1
        row_bytes = LANES * self.compact.rows.itemsize
        for strips in range(min(tables.STRIPS_PER_GROUP, count), 0, -1):
            bounds = np.append(begins[:-1:strips], begins[-1])
            needed = self._scratch_bytes + row_bytes * int(np.diff(bounds).max(initial=0))
            if needed <= self.device.shared_bytes:
                return ProductPlacement(True, strips, needed)
        return ProductPlacement(False, min(tables.STRIPS_PER_GROUP, count), self._scratch_bytes)

    @property
    def _scratch_bytes(self) -> int:
        """Bytes of shared memory that `products_kernel` needs without the weights: hits and the group's index."""
        return tables.GATHER_BUFFER_BYTES * WARPS + -(-4 * self.weights.shape[0] // 16) * 16

    @cached_property
    def tiles(self) -> DenseTiles:
        """What multiplies dense weights with many rows."""
        values = self.weights.to_dense()
        values = (values.view(np.uint32) >> 16).astype(np.uint16) if self.narrow else values
        return DenseTiles(self.device, values, self.host_bias)

    def products(self, device: Device, table, rows: int, row_of=None, out=None, status=None):
        """Drives (rows, gates * units) float32 of independent rows of events, put on the stream.

        table  : an event list set on the device (`kernels/batched_products.py`): begins, counts, events
        row_of : (rows,) int64, the list that each row reads; None where each row reads its own
        out    : the array to write; None for a new one
        status : not used; gated blocks report their faults there
        """
        n_pre, columns = self.weights.shape
        begins, counts, lists = table
        if out is None:
            out = device.empty((rows, columns), np.float32)
        if rows == 0:
            return out
        placement = self.placement
        resident, strips_per_group, shared = placement.resident, placement.strips_per_group, placement.shared_bytes
        if rows < WARPS:
            # Copying the weights to shared memory would take longer than the rows.
            resident, shared = False, self._scratch_bytes
        strips = len(self.compact.begins) - 1
        groups = -(-strips // strips_per_group)
        splits = max(1, min(-(-rows // WARPS), device.multiprocessors // groups))
        layout = tables.layout_code(tables.MASKED, self.narrow, resident)
        kernel = device.kernel(("products", layout), lambda: products_kernel(layout), 32 * WARPS)
        weights = (each.data.ptr for each in (self.index, self.group_rows, self.group_begins, self.compact_bias))
        events = begins.data.ptr, counts.data.ptr, lists.data.ptr, 0 if row_of is None else row_of.data.ptr
        sizes = n_pre, columns, strips, strips_per_group
        arguments = *weights, *sizes, *events, rows, splits, out.data.ptr
        device.launch(kernel, groups * splits, 32 * WARPS, *arguments, shared=shared)
        return out
