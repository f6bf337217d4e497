"""Plants faults in the library's own code, for tests that must catch them. A fault is an edit of the syntax tree.

A Python function is edited in place. The kernels of the CPU engine are copied and compiled once, with every fault in
them. A switch that the running kernels read says which fault acts. While none acts, the copy works as the original.
"""

from __future__ import annotations

import ast
import functools
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

from eventrnn import cpu
from eventrnn.backend import BACKENDS
from eventrnn.cpu.kernels.simd import I64
from eventrnn.cpu.uninterrupted import compile_uninterrupted
from support import conformance
from support.kernel_faults import KERNEL_FAULTS
from support.syntax_edits import edited_at_marks, marks, replaced, switched


def plant(monkeypatch, owner, name: str, edits: dict[str, str]) -> None:
    """Put an edited copy of a function, or of a method of a class, in its place.

    edits: expressions of the function -> what stands in their place.
    """
    module = sys.modules[owner.__module__] if isinstance(owner, type) else owner
    tree = replaced(ast.parse(textwrap.dedent(inspect.getsource(getattr(owner, name)))), edits)
    # The names of the module stay live, so that two plants in one module meet.
    namespace = vars(module).copy()
    exec(compile(tree, f"<fault in {name}>", "exec"), namespace)
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
    return _compiled(function, _nrt=False)


def inlined(function):
    """`jit.inlined`, likewise."""
    return numba.njit(nogil=True, error_model="numpy", _nrt=False, inline="always")(function)


def allocating(function):
    """`jit.allocating`, likewise."""
    return _compiled(function, _nrt=True)


def _compiled(function, **options):
    dispatcher = numba.njit(nogil=True, error_model="numpy", **options)(function)
    compile_uninterrupted(dispatcher)
    return dispatcher


internal, called_by_address, allocating_by_address = compiled, compiled, allocating


def _imports(tree: ast.Module) -> set[str]:
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def _cpu_modules() -> dict[str, Path]:
    """Name -> file of every module of the CPU engine."""
    package = Path(cpu.__path__[0])
    files = sorted(package.rglob("*.py"))
    return {".".join((cpu.__name__, *file.relative_to(package).with_suffix("").parts)): file for file in files}


def marked_faults() -> dict[str, list[str]]:
    """Module of the CPU engine -> the faults that are marked in it, for modules with marks."""
    found = {name: [*marks(path.read_text()).values()] for name, path in _cpu_modules().items()}
    return {name: faults for name, faults in found.items() if faults}


def _copied(trees: dict[str, ast.Module], faulty: set[str]) -> list[str]:
    """The faulty kernels, the kernels that call them, and the engine, each module after those that it imports.

    Modules between the kernels and the engine are shared with the healthy engine: tests patch their constants.
    """
    order: list[str] = []

    def visit(name: str) -> bool:
        """Whether a module is to be copied. Appends it, and what it needs, to `order`."""
        kernels = {each for each in _imports(trees[name]) if each in trees and ".kernels." in each}
        below = [visit(each) for each in sorted(kernels)]
        if any(below) or name in faulty:
            order.extend({name} - {*order})
        return name in order

    visit("eventrnn.cpu.engine")
    return order


@functools.cache
def _engine_with_every_fault() -> str:
    """Edited copies of the modules from the kernels up to the engine; returns the entry of `BACKENDS`."""
    numbers = {fault: number for number, fault in enumerate(KERNEL_FAULTS, start=1)}
    edits = {fault: switched(edit, f"planted({numbers[fault]})") for fault, edit in KERNEL_FAULTS.items()}
    trees = {name: edited_at_marks(path.read_text(), edits) for name, path in _cpu_modules().items()}
    copies = {"eventrnn.cpu.kernels.jit": "support.planting"}
    for name in _copied(trees, set(marked_faults())):
        copy = ModuleType("faulty_" + name.removeprefix("eventrnn.cpu.").replace(".", "_"))
        for node in ast.walk(trees[name]):
            if isinstance(node, ast.ImportFrom):
                node.module = copies.get(node.module or "", node.module)
        sys.modules[copy.__name__], copies[name] = copy, copy.__name__
        vars(copy)["planted"] = planted
        exec(compile(trees[name], f"<{copy.__name__}>", "exec"), vars(copy))
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

# No shrinking, and no memory of the failure for the next run of the healthy suite. The first failure ends the drawing,
# so more examples cost time only where a fault is hard to find. With 100, one was missed in a dozen runs.
FAULTS = settings(
    max_examples=400,
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
