"""Single time steps with one compiled call each: the addresses of all arrays of a step are collected once, in a table.

Numba takes some 50 ns to unpack an array argument of a compiled function. A step has some 40 arrays, so that unpacking
them would take longer than the step of a small network. The kernel is given the table of addresses instead
(`kernels/array_table.py`).

The state lies in memory twice. A step reads one state and writes the other, and counts as made when the number of
steps is raised, which is the last thing it does. Whatever is raised before leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from eventrnn._arithmetic import in_standard_mode, quiet_context, standard_arithmetic
from eventrnn.cpu import step_table
from eventrnn.state import State

if TYPE_CHECKING:
    from eventrnn.cpu.plan import Plan

# Rows of the table with the state before a step, and with that after it; they swap from step to step.
BEFORE = step_table.CELLS_BEFORE, step_table.OUTPUTS_BEFORE, step_table.HELD_BEFORE
AFTER = step_table.CELLS, step_table.OUTPUTS, step_table.HELD


class Stepper:
    """The `backend.Stepper` of the CPU engine.

    kernel        : compiled function (table, inputs, output) -> bool. It returns True where it refuses the
                    step because an input or a cell state is not finite, or a symbol does not exist
    arrays        : the arrays of the kernel's table, in order; the stepper keeps them alive
    state_of      : makes a state of views of the cells of all layers, their outputs, and held gates
    check         : converts an input to `dtype` and `shape`. Raises ValueError or TypeError for bad input
    dtype, shape  : dtype and shape of inputs that are passed to the kernel without a conversion
    output_shape  : shape of the output of a step
    gates         : the plan of a network with gated blocks, which knows whether their gates were finite; else None

    Attributes
    ----------
    steps : the number of steps that were made; its parity says which of the two states is the present one
    """

    def __init__(
        self,
        kernel: Callable,
        arrays: Sequence[np.ndarray],
        *,
        state_of: Callable[..., State],
        check: Callable[[np.ndarray], np.ndarray],
        dtype: type,
        shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        gates: Plan | None = None,
    ):
        self.kernel, self.arrays, self.check, self.steps = kernel, arrays, check, 0
        self.dtype, self.shape, self.output_shape = np.dtype(dtype), shape, output_shape
        self.gates = gates
        self.takes_symbols = self.dtype.kind == "i"
        # Made once: a conversion takes less time than making a context.
        self.context = quiet_context()
        rows = [(each.ctypes.data, each.size) for each in arrays]
        self.states = [state_of(*(arrays[row] for row in rows_of)) for rows_of in (BEFORE, AFTER)]
        swapped = list(rows)
        for before, after in zip(BEFORE, AFTER, strict=True):
            swapped[before], swapped[after] = rows[after], rows[before]
        self.tables = np.array(rows, np.int64), np.array(swapped, np.int64)

    def __reduce__(self):
        raise TypeError("stepper: holds addresses of its engine's memory and cannot be copied; copy the simulator")

    def __call__(self, inputs: np.ndarray) -> np.ndarray:
        """Compute one step; see `backend.Stepper`."""
        given = inputs
        if (
            type(inputs) is not np.ndarray
            or inputs.dtype is not self.dtype
            or inputs.shape != self.shape
            # Contiguous, aligned and writable: Numba would compile the kernel again for any other array.
            or not inputs.flags.carray
        ):
            inputs = self.context.run(in_standard_mode, self._converted, inputs)
        output, table = np.empty(self.output_shape, np.float32), self.tables[self.steps & 1]
        gates = self.gates
        if gates is None:
            refused = self.kernel(table, inputs, output)
        else:
            gates.forget_faults()
            refused = self.kernel(table, inputs, output)
            gates.check_gates()
        if refused:
            self._refuse(given)
        self.steps += 1
        return output

    def state(self) -> State:
        """A copy of the state."""
        return self.states[self.steps & 1].copy()

    def take_back(self) -> None:
        """See `backend.Stepper`: the state before the last step is still in memory."""
        self.steps -= 1

    def _converted(self, inputs: np.ndarray) -> np.ndarray:
        """The inputs as the kernel takes them, writable, so that Numba compiles it once. Raises for other inputs."""
        kinds = "iu" if self.takes_symbols else "fiub"
        if type(inputs) is np.ndarray and inputs.shape == self.shape and inputs.dtype.kind in kinds:
            # The kernel finds what is not finite, or no symbol, after the conversion.
            return inputs.astype(self.dtype, order="C")
        return self.check(inputs)

    @standard_arithmetic
    def _refuse(self, inputs: np.ndarray) -> NoReturn:
        """Raise for what the kernel found in the inputs, or else in the cells that it wrote."""
        self.check(inputs)
        self.states[~self.steps & 1].need_finite()
        raise ValueError("inputs: another thread changed them during the step; give each thread arrays of its own")
