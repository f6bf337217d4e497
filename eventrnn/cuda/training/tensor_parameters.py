"""Parameters that a caller keeps on the GPU, in its own arrays: taken before a window, their gradients given back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eventrnn.cuda.training.flat_arrays import FlatArrays
from eventrnn.cuda.training.kernels import tensors
from eventrnn.cuda.training.kernels.updates import CHUNK
from eventrnn.cuda.training.lanes import Lane, bits
from eventrnn.weights import MatrixId

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device


@dataclass(frozen=True)
class ParameterTensors:
    """Addresses of contiguous arrays of a caller, by name.

    values : float32, in the order of gates of `training.Model`; pruned weights and thresholds out of range are set to
             what their masks and the rule allow
    masks  : bytes, 0 where a weight is pruned; for some of the matrices
    """

    values: Mapping[str, int]
    masks: Mapping[str, int]


class TensorParameters(FlatArrays):
    """The parameters of a caller as the passes of a window read them. One launch takes all, whatever their number.

    bounds : smallest and largest number that stands for a threshold; otherwise as `FlatArrays`
    """

    def __init__(
        self,
        device: Device,
        parameters: Mapping[str, np.ndarray],
        precision: str,
        rule: str,
        bounds: tuple[float, float],
    ):
        super().__init__(device, parameters, precision, rule, shared=True)
        chunks = self.layout.chunks(CHUNK)
        self.chunks, self.number_of_chunks = device.put(chunks), len(chunks)
        self.table = np.zeros((len(self.layout), tensors.SEGMENT_FIELDS), np.int64)
        for line, segment in zip(self.table, self.layout, strict=True):
            low, high = bounds if MatrixId(segment.name).role == "threshold" else (-np.inf, np.inf)
            line[[tensors.ROWS, tensors.GATES, tensors.COLUMNS]] = segment.rows, segment.gates, segment.columns
            line[tensors.FIRST], line[tensors.PITCH] = segment.first, segment.padded[2]
            places = enumerate(segment.order)
            line[tensors.ORDER] = sum(gate << (tensors.BITS_PER_PLACE * place) for place, gate in places)
            line[[tensors.LOWEST_BITS, tensors.HIGHEST_BITS]] = bits(low), bits(high)
        self.segments = device.put(self.table)
        self._sent = self.table.copy()

    def take(self, lane: Lane, given: ParameterTensors) -> None:
        """Take over the caller's parameters."""
        self._note(tensors.VALUES, given.values)
        self._note(tensors.KEPT, given.masks)
        self._update_table()
        lane.blocks(
            ("take", self.precision),
            lambda: tensors.take_kernel(self.precision),
            self.number_of_chunks,
            self.values.data.ptr,
            0 if self.operands is self.values else self.operands.data.ptr,
            self.chunks.data.ptr,
            self.segments.data.ptr,
        )

    def give(self, lane: Lane, given: ParameterTensors, gradients: Mapping[str, int]) -> None:
        """Write gradients to the caller's arrays, those that have an address."""
        self._note(tensors.KEPT, given.masks)
        self._note(tensors.GRADIENT, gradients)
        self._update_table()
        lane.blocks(
            ("give",),
            tensors.give_kernel,
            self.number_of_chunks,
            self.gradients.data.ptr,
            self.chunks.data.ptr,
            self.segments.data.ptr,
        )

    def _note(self, field: int, addresses: Mapping[str, int]) -> None:
        for line, segment in zip(self.table, self.layout, strict=True):
            line[field] = addresses.get(segment.name, 0)

    def _update_table(self) -> None:
        if not np.array_equal(self.table, self._sent):
            self.device.send(self.table, self.segments)
            self._sent = self.table.copy()
