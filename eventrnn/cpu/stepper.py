"""Single steps without Python in between: everything a step needs is bound once, as addresses in one array.

A compiled function unpacks each array that it is given, at some 50 ns; a step would spend more on that than on small
networks. Kernels get the table instead, and find their arrays in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from eventrnn.state import State, need_finite_cells

NO_NUMBERS, NO_SYMBOLS = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)


class Stepper:
    """`backend.Stepper` over a compiled kernel(table, numbers, symbols, output) that returns whether it refuses.

    arrays  : what the kernel finds in its table, in order; kept alive here
    c, y    : (total * batch,) cells and outputs of all layers, which the kernel changes; `before`, as they were before
    dtype, shape : of inputs that go straight to the kernel; `check` turns any other into such, or raises
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
        """One step; see `backend.Stepper`."""
        if (
            type(inputs) is not np.ndarray
            or inputs.dtype != self.dtype
            or inputs.shape != self.shape
            or not inputs.flags.c_contiguous
        ):
            inputs = self.check(inputs)
        output = np.empty(self.output_shape, np.float32)
        try:
            if self.takes_symbols:
                refused = self.kernel(self.table, NO_NUMBERS, inputs, output)
            else:
                refused = self.kernel(self.table, inputs, NO_SYMBOLS, output)
        except KeyboardInterrupt:
            # It is raised when the kernel returns.
            self._undo(inputs)
            raise
        if refused:
            self._refuse(inputs)
        return output

    def state(self) -> State:
        """A copy of the state."""
        return State(*(tuple(part.copy() for part in self.by_layer(flat)) for flat in (self.c, self.y)))

    def _refuse(self, inputs: np.ndarray) -> None:
        """Say what the kernel found; the state goes back to before."""
        self.check(inputs)
        cells = self.state().cells
        self._undo(inputs)
        need_finite_cells(cells)

    def _undo(self, inputs: np.ndarray) -> None:
        """Back to the state before the last step. Bad input was none."""
        try:
            self.check(inputs)
        except ValueError:
            return
        self.c[:], self.y[:] = self.before
