"""All parameters as one flat array on the GPU, their gradients and operands beside it, and addresses in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.cuda.training.kernels import threads
from eventrnn.cuda.training.layout import Layout

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device

F32 = np.float32


class FlatArrays:
    """What the passes of a window read and write of the parameters.

    Parameters
    ----------
    device     : where
    parameters : host arrays by name, of which only the shapes are read
    precision  : type of operands
    rule       : rule of the thresholds, see `training.thresholds`
    shared     : the values are their own operands where both are float32

    Attributes
    ----------
    layout    : where each parameter lies
    values, gradients : float32
    operands  : the values as factors of products
    tied, readout : whether the read-out is the embedding; name of the matrix of the read-out
    """

    def __init__(
        self, device: Device, parameters: Mapping[str, np.ndarray], precision: str, rule: str, *, shared: bool = False
    ):
        self.device, self.precision, self.rule = device, precision, rule
        self.layout, self.size = Layout(parameters), threads.BYTES[precision]
        self.tied = "readout.bias" in parameters and "readout" not in parameters
        self.readout = "embedding" if self.tied else "readout"
        operand = np.uint16 if self.size == 2 else F32
        self.values, self.gradients = (self._zeros(self.layout.size, F32) for _ in range(2))
        self.operands = self.values if shared and self.size == 4 else self._zeros(self.layout.size, operand)
        self.job, self.no_fault = self._zeros(1, np.int64), self._zeros(1, np.float64)

    def _zeros(self, size: int, dtype: Any) -> Any:
        array = self.device.empty((size,), dtype)
        array.data.memset_async(0, array.nbytes)
        return array

    def _part(self, array: Any, name: str) -> Any:
        segment = self.layout[name]
        return array[segment.first : segment.first + segment.size]

    # --- addresses ---

    def value_at(self, name: str) -> int:
        """Address of a parameter."""
        return self.values.data.ptr + 4 * self.layout[name].first

    def gradient_at(self, name: str) -> int:
        """Address of a gradient."""
        return self.gradients.data.ptr + 4 * self.layout[name].first

    def operand_at(self, name: str) -> int:
        """Address of the operands of a parameter."""
        return self.operands.data.ptr + self.size * self.layout[name].first

    def gradient(self, name: str) -> Any:
        """A gradient as it lies on the GPU, flat."""
        return self._part(self.gradients, name)

    @property
    def job_at(self) -> int:
        """Address of the number of the step."""
        return self.job.data.ptr

    @property
    def no_fault_at(self) -> int:
        """Address of a result without a fault."""
        return self.no_fault.data.ptr

    @property
    def results_at(self) -> int:
        """Address of the results, which begin with whether the window has failed."""
        return self.no_fault_at
