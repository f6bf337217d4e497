"""Faults of the CPU kernels: what changes at the statements that a comment `# planted fault: name` marks.

In a template ON is 1 while the fault acts, else 0.
"""

from __future__ import annotations

import ast

from support.syntax_edits import Edit, argument, assigned, becoming, call, followed_by, skipped_while, subscript


def _event_id(statement: ast.stmt) -> ast.AST:
    """Where vectors are compressed, the number of the first unit is an argument; in the tail it is assigned."""
    return argument(3)(statement) if isinstance(statement, ast.AugAssign) else assigned(0)(statement)


#: Reads the scale of the unit before.
_SCALE_OF_ANOTHER_UNIT = becoming(subscript("scales"), "L + max(R - ON, 0)")
#: Reads the scales one column further on.
_SCALES_OF_OTHER_COLUMNS = becoming(assigned(2), "X + ON")

KERNEL_FAULTS: dict[str, Edit] = {
    # The layer itself is right in that step. Its listeners, which read the list of events, are not.
    "last event dropped": followed_by("P0 = max(P0 - ON, 0)", argument(3)),
    "gates swapped": becoming(
        call(), "cells.egru_value_of_gates(A1 if ON == 1 else A0, A0 if ON == 1 else A1, A2, A3, A4)"
    ),
    "gates of an LSTM swapped": becoming(
        call(),
        "cells.lstm_value(A1 if ON == 1 else A0, A0 if ON == 1 else A1, A2, A3, A5 if ON == 1 else A4, "
        "A4 if ON == 1 else A5, A6, A7, A8)",
    ),
    "reset forgotten": becoming(call("select"), "A2 if ON == 1 else X"),
    "event of a silent step missed": becoming(call("select"), "A2 if ON == 1 else X"),
    "silence taken for its fixed point": becoming(call("select"), "A2 if ON == 1 else X"),
    # The events of two threads are in the wrong order: the sums have the same terms.
    "parts swapped": becoming(assigned(0), "X + (n_threads - 1 - 2 * thread) * ON"),
    # Events carry the place of a unit within its part in place of its number.
    "units of the wrong part": becoming(_event_id, "X - low * ON"),
    # A thread does not wait for the events of a step.
    "barrier missing": skipped_while("ON == 1"),
    "tail of scattered weights dropped": becoming(argument(5), "X // (1 + 15 * ON) * (1 + 15 * ON)"),
    "masks of the wrong unit": becoming(argument(4), "max(L - ON, 0) * R"),
    "scale of another unit, rows": _SCALES_OF_OTHER_COLUMNS,
    "scale of another unit, single weights": _SCALE_OF_ANOTHER_UNIT,
    "scale of another unit, masked weights": _SCALE_OF_ANOTHER_UNIT,
    "scale of another unit, blocks": becoming(assigned(9), "X + ON"),
    "scale of another unit, few blocks": _SCALES_OF_OTHER_COLUMNS,
    "scale of another unit, strips": becoming(argument(5), "X + ON"),
    "last event of a strip": becoming(argument(14), "X - ON"),
    "last event of blocks": becoming(assigned(13), "X - ON"),
    "scale of another unit, panels": _SCALES_OF_OTHER_COLUMNS,
    "scale of another unit, panels of single weights": becoming(argument(6), "X + ON"),
    "rest of a panel dropped": becoming(argument(4), "X // (1 + 15 * ON) * (1 + 15 * ON)"),
    "last event of a panel": becoming(assigned(), "X - ON"),
    "last event of a panel of single weights": becoming(assigned(), "X - ON"),
    "unit skipped": becoming(assigned(), "X - ON"),
    # The terms of two units change places: every sum has the same terms.
    "order of two units": followed_by(
        "if ON == 1 and to == begins[panel * rows + k] + 1:\n"
        "    indices[to - 1], indices[to] = indices[to], indices[to - 1]\n"
        "    values[to - 1], values[to] = values[to], values[to - 1]\n"
    ),
    "a chosen block too few": becoming(argument(5), "max(X - ON, 1)"),
    # The blocks are right, and their products are not scaled.
    "gate forgotten": becoming(assigned(), "R if ON == 1 else X"),
    # The last segments of a list, which no full list carried.
    "rest of a list dropped": becoming(argument(4), "X * (1 - ON) if event == end else X"),
}
