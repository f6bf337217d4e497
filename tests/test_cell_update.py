"""The update of cells gives the same bits, however many units have their gates evaluated first."""

from __future__ import annotations

from unittest.mock import patch

import numba
import numpy as np
import pytest

from eventrnn.cpu.kernels import cell_update
from eventrnn.cpu.kernels.simd import LANES


@pytest.mark.parametrize("gated_units", [LANES, 3 * LANES, 1 << 30])
def test_gates_of_any_number_of_units_first_give_the_same_bits(gated_units):
    rng = np.random.default_rng(0)
    with patch.object(cell_update, "GATED_UNITS", gated_units):
        update = numba.njit(error_model="numpy")(cell_update.update.py_func)
        for n in (1, 15, 16, 17, 47, 48, 49, 100):
            # Around the units lie others, which no update touches.
            before, after = rng.standard_normal((2, 9 * n), dtype=np.float32)
            found = []
            for tested in (update, cell_update_of_a_unit):
                arrays = [each.copy() for each in (before, after, before[:n], before[n:], after[n:])]
                tested(n, arrays[0], n, arrays[1], 2 * n, arrays[2], 0, arrays[3], arrays[4], n)
                found.append(arrays)
            for array, expected in zip(*found, strict=True):
                assert array.tobytes() == expected.tobytes()


def cell_update_of_a_unit(n, drive_in, a, drive_rec, b, threshold, p, c, y, s):
    """`update`, unit by unit, by the rules of `cells.py`."""
    for i in range(n):
        given = [drive[at + gate * n + i] for drive, at in ((drive_in, a), (drive_rec, b)) for gate in range(3)]
        v, drive_rec[b + i], drive_rec[b + n + i], _ = cell_update.cells.egru_value(*given, c[s + i])
        fires = v > threshold[p + i]
        y[s + i], c[s + i] = (v, v - threshold[p + i]) if fires else (np.float32(0), v)
