"""Plants faults in the library's own code, for tests that must catch them. A fault is an edit of the source.

Python is edited in place. Kernels are compiled once, with every fault in them, and a switch that a running kernel
reads says which one acts: none, and the edited engine is as healthy as the real one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numba
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from eventrnn.backend import BACKENDS
from eventrnn.cpu.kernels.simd import I64
from support import conformance


def edited(source: str, edits: dict[str, str]) -> str:
    for old, new in edits.items():
        assert old in source, f"nothing to plant a fault in: {old}"
        source = source.replace(old, new)
    return source


def plant(monkeypatch, owner, name: str, edits: dict[str, str]) -> None:
    """Put an edited copy of a function, or of a method of a class, in its place."""
    module = sys.modules[owner.__module__] if isinstance(owner, type) else owner
    source = edited(textwrap.dedent(inspect.getsource(getattr(owner, name))), edits)
    # The names of the module stay live, so that two plants in one module meet.
    namespace = vars(module).copy()
    code = compile("from __future__ import annotations\n" + source, f"<fault in {name}>", "exec")
    exec(code, namespace)
    monkeypatch.setattr(owner, name, namespace[name])


# --- kernels ------------------------------------------------------------------------------------------------

_ACTING = np.zeros(1, np.int64)


@intrinsic
def planted(typingctx, number):
    """1 while the fault of that number acts, else 0."""

    def generate(context, builder, signature, args):
        acting = builder.load(builder.inttoptr(I64(_ACTING.ctypes.data), ir.PointerType(I64)))
        return builder.zext(builder.icmp_signed("==", acting, args[0]), I64)

    return types.int64(types.int64), generate


def compiled(function):
    """`jit.compiled`, but never on disk: the kernels hold an address."""
    return numba.njit(nogil=True, error_model="numpy", _nrt=False)(function)


def inlined(function):
    """`jit.inlined`, likewise."""
    return numba.njit(nogil=True, error_model="numpy", _nrt=False, forceinline=True)(function)


def allocating(function):
    """`jit.allocating`, likewise."""
    return numba.njit(nogil=True, error_model="numpy", _nrt=True)(function)


#: fault -> module, and its edits; ON is 1 while it acts, else 0.
KERNEL_FAULTS: dict[str, tuple[str, dict[str, str]]] = {
    # The layer itself is right in that step; who listens is not.
    "last event dropped": (
        "time_loop",
        {
            "tally(ids, sent, first, counts[slot], unit_0, graded_out, binary_out)\n": "tally("
            "ids, sent, first, counts[slot], unit_0, graded_out, binary_out)\n"
            "                    counts[slot] = max(counts[slot] - ON, 0)\n"
        },
    ),
    "gates swapped": (
        "cell_update",
        {
            "load(drive_in, a + i),\n            load(drive_in, a + n + i),\n": "load(drive_in, a + n * ON + i),\n"
            "            load(drive_in, a + n * (1 - ON) + i),\n",
            "drive_in[a + i],\n            drive_in[a + n + i],\n": "drive_in[a + n * ON + i],\n"
            "            drive_in[a + n * (1 - ON) + i],\n",
        },
    ),
    "reset forgotten": (
        "cell_update",
        {"cells.select(v > theta, v - theta, v)": "(v if ON == 1 else cells.select(v > theta, v - theta, v))"},
    ),
    # Two threads' events in the wrong order: the sums have the same terms.
    "parts swapped": (
        "time_loop",
        {"slot, first = row * parts + part,": "slot, first = row * parts + part + (parts - 1 - 2 * part) * ON,"},
    ),
    # Events named after the place of a unit in its part.
    "units of the wrong part": (
        "cell_update",
        {
            "compress(ids, sent, end, i, value != cells.ZERO, value)": (
                "compress(ids, sent, end, i - low * ON, value != cells.ZERO, value)"
            ),
            "ids[end], sent[end] = i, y[at + i]": "ids[end], sent[end] = i - low * ON, y[at + i]",
        },
    ),
    # Nobody waits for the events of a step.
    "barrier missing": (
        "time_loop",
        {
            "                target = wait(barrier, parts, target)\n\n        if readout": (
                "                if ON == 0:\n"
                "                    target = wait(barrier, parts, target)\n\n        if readout"
            )
        },
    ),
    "tail of scattered weights dropped": (
        "spmm",
        {
            "add_scattered(drive, at, index, i0, begin, end - begin, sent[e]": (
                "add_scattered(drive, at, index, i0, begin, (end - begin) // (1 + 15 * ON) * (1 + 15 * ON), sent[e]"
            )
        },
    ),
    "masks of the wrong unit": (
        "spmm",
        {"index, i0, unit * masks,": "index, i0, max(unit - ON, 0) * masks,"},
    ),
    "scale of another unit, rows": (
        "spmm",
        {"matrix[SCALES]\n    left": "matrix[SCALES] + ON\n    left"},
    ),
    "scale of another unit, single weights": (
        "spmm",
        {"scales[matrix[SCALES] + unit]": "scales[matrix[SCALES] + max(unit - ON, 0)]"},
    ),
    "scale of another unit, blocks": (
        "spmm",
        {"sent[e], scales[s0 + unit],": "sent[e], scales[s0 + max(unit - ON, 0)],"},
    ),
    "scale of another unit, many blocks": (
        "spmm",
        {"value, scale = sent[e], scales[s0 + unit]": "value, scale = sent[e], scales[s0 + max(unit - ON, 0)]"},
    ),
    "scale of another unit, panels": ("spmm", {"matrix[SCALES]\n    size": "matrix[SCALES] + ON\n    size"}),
    "last event of a panel": ("spmm", {"k + 1] - first\n": "k + 1] - first - ON\n"}),
    "unit skipped": (
        "spmm",
        {"units = min(MULTIPLY_UNITS, n_pre - j)": "units = min(MULTIPLY_UNITS, n_pre - j) - ON"},
    ),
    # Two units' terms change places: every sum has the same terms.
    "order of two units": (
        "spmm",
        {
            "                own_ids[to], own_sent[to] = unit, sent[e]\n": (
                "                own_ids[to], own_sent[to] = unit, sent[e]\n"
                "                if ON == 1 and to == cuts[panel * rows + k] + 1:\n"
                "                    own_ids[to - 1], own_sent[to - 1], own_ids[to], own_sent[to] = (\n"
                "                        unit, sent[e], own_ids[to - 1], own_sent[to - 1]\n"
                "                    )\n"
            )
        },
    ),
    # The last pieces of a list, which no full list carried.
    "rest of a list dropped": (
        "spmm",
        {
            "    _add_listed(matrix, weights, lists, amounts, listed, drive, at)\n\n": (
                "    _add_listed(matrix, weights, lists, amounts, listed * (1 - ON), drive, at)\n\n"
            )
        },
    ),
}


@functools.cache
def _engine_with_every_fault() -> str:
    """Edited copies of the modules from the kernels up to the engine; returns the entry of `BACKENDS`."""
    copies = {}
    for name in ("cell_update", "spmm", "time_loop", "engine"):
        folder = "cpu" if name == "engine" else "cpu.kernels"
        source = Path(importlib.import_module(f"eventrnn.{folder}.{name}").__file__ or "").read_text()
        for k, (module, edits) in enumerate(KERNEL_FAULTS.values(), start=1):
            if module == name:
                source = edited(source, {old: new.replace("ON", f"planted({k})") for old, new in edits.items()})
        imports = {
            "from eventrnn.cpu.kernels.jit import compiled\n": "from support.planting import compiled, planted\n"
        }
        imports |= {
            "from eventrnn.cpu.kernels.jit import allocating, compiled, inlined\n": (
                "from support.planting import allocating, compiled, inlined, planted\n"
            )
        }
        imports |= {
            f"from eventrnn.cpu.kernels.{other} import": f"from {copy.__name__} import"
            for other, copy in copies.items()
        }
        source = edited(source, {old: new for old, new in imports.items() if old in source})
        copy = copies[name] = ModuleType(f"faulty_{name}")
        sys.modules[copy.__name__] = copy
        exec(compile(source, f"<{copy.__name__}>", "exec"), vars(copy))
    return "faulty_engine:CpuBackend"


@contextmanager
def faulty_kernels(fault: str | None) -> Iterator[str]:
    """An engine of its own in which one fault acts, or none; gives the backend's name."""
    number = list(KERNEL_FAULTS).index(fault) + 1 if fault else 0
    with patch.dict(BACKENDS, faulty=_engine_with_every_fault()):
        _ACTING[0] = number
        try:
            yield "faulty"
        finally:
            _ACTING[0] = 0


# --- the suite ----------------------------------------------------------------------------------------------

# No shrinking, and no memory of the failure for the next run of the healthy suite.
FAULTS = settings(
    max_examples=100,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    print_blob=False,
)
#: What a check of `support` may be given; `suite_catches` draws whatever the caller leaves out.
DRAWN = {
    "data": st.data(),
    "threads": st.integers(1, 3),
    "record": conformance.records,
    "carry": conformance.carries(),
}


def suite_catches(check, *, by: type[Exception] | tuple[type[Exception], ...] = AssertionError, **arguments) -> None:
    """Run a check of the suite with drawn examples and demand that it fails.

    check: a function with parameters among those of `DRAWN` and of `arguments`. Parameters that are not given are
    drawn; a check without any left is called once.
    """
    drawn = {name: DRAWN[name] for name in inspect.signature(check).parameters if name not in arguments}
    test = functools.partial(check, **arguments)
    if drawn:
        test = FAULTS(given(**drawn)(lambda **examples: check(**arguments, **examples)))
    with pytest.raises(by):
        test()
