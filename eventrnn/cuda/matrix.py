"""A matrix on the GPU, and its products with rows of events that need not wait for each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda import tables as k
from eventrnn.cuda.packing import Reached, Strips, pack, per_strip
from eventrnn.cuda.plan import MOST_REACHED
from eventrnn.cuda.products import products_kernel, reached_products_kernel
from eventrnn.cuda.tables import LANES

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device
    from eventrnn.weights import Weights

# Warps of a block of products; masked strips take little shared memory, and many warps hide what each waits for.
DENSE_WARPS, MASKED_WARPS = 16, 32


@dataclass(frozen=True)
class Matrix:
    """Strips on the device."""

    strips: Strips
    values: Any
    table: Any
    starts: Any
    bias: Any
    reached: Reached | None = None
    units: Any = None
    rows: Any = None
    firsts: Any = None

    @classmethod
    def of(cls, device: Device, weights: Weights, bias: np.ndarray, gates: int, width: int) -> Matrix:
        strips = pack(weights, gates, width)
        arrays = (strips.values, strips.table, strips.starts, per_strip(bias, gates, width))
        values, table, starts, biases = map(device.put, arrays)
        if strips.kind == k.DENSE or (strips.table[:, :, 0] != 0).mean() > MOST_REACHED:
            return cls(strips, values, table, starts, biases)
        reached = Reached.of(strips)
        units, rows, firsts = map(device.put, (reached.units, reached.rows, reached.firsts))
        return cls(strips, values, table, starts, biases, reached, units, rows, firsts)

    def described(self, resident: bool) -> str:
        """How it lies, in words."""
        strips = self.strips
        kind = ("dense", "masked", "runs")[strips.kind]
        storage = "bfloat16" if strips.values.dtype == np.uint16 else "float32"
        return f"{kind} {storage} in {'shared memory' if resident else 'L2'}"

    def products(self, device: Device, table, rows: int, row_of=None, out=None):
        """Drives of independent rows of events, (rows, gates * units)."""
        strips = self.strips
        n_pre, gates, units = strips.shape
        firsts, counts, lists = table
        if out is None:
            out = device.empty((rows, gates * units), np.float32)
        if rows == 0:
            return out
        resident, shared, warps = self.room(device)
        resident = resident and rows >= warps
        count = strips.tiles * gates
        splits = max(1, min(-(-rows // warps), device.multiprocessors // count))
        # How a row came about makes no difference.
        kind = strips.kind if self.reached is None else k.MASKED
        way = k.way(kind, strips.values.dtype == np.uint16, resident)
        if self.reached is None:
            make = products_kernel
            weights = (self.values, self.table, self.starts)
            last = (strips.one_strip_bytes()[1],)
        else:
            make, weights, last = reached_products_kernel, (self.units, self.rows, self.firsts), ()
        kernel = device.kernel((make.__name__, way, gates), lambda: make(way, gates), 32 * warps)
        device.launch(
            kernel, count * splits, 32 * warps,
            *(each.data.ptr for each in weights), self.bias.data.ptr,
            n_pre, units, strips.width, firsts.data.ptr, counts.data.ptr, lists.data.ptr,
            0 if row_of is None else row_of.data.ptr, rows, splits, out.data.ptr, *last,
            shared=shared[resident],
        )  # fmt: skip
        return out

    def room(self, device: Device) -> tuple[bool, tuple[int, int], int]:
        """Whether one strip fits in shared memory, for many rows of products; bytes without it and with it; warps."""
        strips, reached = self.strips, self.reached
        if reached is None:
            warps = DENSE_WARPS if strips.kind == k.DENSE else MASKED_WARPS
            least = k.HIT_BYTES * warps
            most = least + sum(strips.one_strip_bytes())
        else:
            warps = MASKED_WARPS
            least = k.CLUSTER_HIT_BYTES * warps + -(-4 * strips.shape[0] // 16) * 16
            most = least + LANES * strips.values.itemsize * int(np.diff(reached.firsts).max())
        return most <= device.shared_bytes, (least, most), warps
