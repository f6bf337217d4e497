"""Single time steps with one compiled call each: the addresses of all arrays of a step are collected once, in a table.

Numba takes some 50 ns to unpack an array argument of a compiled function. A step has some 40 arrays, so that unpacking
them would take longer than the step of a small network. The kernel is given the table of addresses instead
(`kernels/array_table.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eventrnn.state import State, need_finite_cells

NO_NUMBERS, NO_SYMBOLS = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)


class Stepper:
    """The `backend.Stepper` of the CPU engine.

    kernel        : compiled function (table, numbers, symbols, output) -> bool. It returns True where it refuses the
                    step because an input or a cell state is not finite, or a symbol does not exist
    arrays        : the arrays of the kernel's table, in order; the stepper keeps them alive
    c, y          : (units of all layers * batch,) float32, cells and outputs, which the kernel changes
    before        : copies of c and y, to which the kernel writes the state before its step
    by_layer      : splits such a flat array into one array (batch, N) per layer
    check         : converts an input to `dtype` and `shape`. Raises ValueError or TypeError for bad input
    dtype, shape  : dtype and shape of inputs that are passed to the kernel without a conversion
    output_shape  : shape of the output of a step
    """

    def __init__(
        self,
        kernel: Callable,
        arrays: Sequence[np.ndarray],
        c: np.ndarray,
        y: np.ndarray,
        before: tuple[np.ndarray, np.ndarray],
        *,
        by_layer: Callable[[np.ndarray], tuple[np.ndarray, ...]],
        check: Callable[[np.ndarray], np.ndarray],
        dtype: type,
        shape: tuple[int, ...],
        output_shape: tuple[int, ...],
    ):
        self.kernel, self.arrays, self.c, self.y, self.before = kernel, arrays, c, y, before
        self.by_layer, self.check = by_layer, check
        self.dtype, self.shape, self.output_shape = np.dtype(dtype), shape, output_shape
        self.takes_symbols = self.dtype.kind == "i"
        self.table = np.array([(each.ctypes.data, each.size) for each in arrays], np.int64)

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Compute one step; see `backend.Stepper`."""
        if (
            type(inputs) is not np.ndarray
            or inputs.dtype != self.dtype
            or inputs.shape != self.shape
            # Contiguous, aligned and writable: Numba would compile the kernel again for any other array.
            or not inputs.flags.carray
        ):
            inputs = self.check(inputs)
        output = np.empty(self.output_shape, np.float32)
        try:
            if self.takes_symbols:
                refused = self.kernel(self.table, NO_NUMBERS, inputs, output)
            else:
                refused = self.kernel(self.table, inputs, NO_SYMBOLS, output)
        except KeyboardInterrupt:
            # Python raises it when the kernel returns, that is after the step.
            self._undo(inputs)
            raise
        if refused:
            self._refuse(inputs)
        return output

    def state(self) -> State:
        """A copy of the state."""
        return State(*(tuple(part.copy() for part in self.by_layer(flat)) for flat in (self.c, self.y)))

    def _refuse(self, inputs: np.ndarray) -> None:
        """Restore the state and raise the error for a step that the kernel refused."""
        self.check(inputs)
        cells = self.state().cells
        self._undo(inputs)
        need_finite_cells(cells)

    def _undo(self, inputs: np.ndarray) -> None:
        """Restore the state before the last step. After bad input there is nothing to restore: no step was begun."""
        try:
            self.check(inputs)
        except ValueError:
            return
        self.c[:], self.y[:] = self.before
