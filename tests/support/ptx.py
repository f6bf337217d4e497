"""Kernels compiled to PTX for Hopper, with or without a GPU, and what their instructions must not do."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest

from eventrnn.backend import BackendUnavailable

HOPPER = (9, 0)


class Compiler:
    """Compiles kernels to PTX for Hopper, and checks before that every libNVVM can.

    modules : what libNVVM was given, in LLVM's language
    """

    def __init__(self, compile_ptx: Callable[..., str], nvvm: ModuleType):
        self.compile_ptx, self.nvvm, self.modules = compile_ptx, nvvm, []

    def __call__(self, made: tuple, threads: int = 352) -> str:
        """PTX of a kernel, given as (function, signature)."""
        compile_ir = self.nvvm.compile_ir

        def checked(modules, *given, **options):
            # Before the compiler starts, because an old one would not end. A newer one does.
            assert not [merged for module in modules for merged in merged_tuples(module)]
            self.modules += modules
            return compile_ir(modules, *given, **options)

        self.nvvm.compile_ir = checked
        try:
            return self.compile_ptx(*made, HOPPER, threads)
        finally:
            self.nvvm.compile_ir = compile_ir


def compiler() -> Compiler:
    """A compiler of kernels, with or without a GPU. Skips the test where there is none."""
    device = pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    pytest.importorskip("cuda.bindings.nvvm", reason="needs libNVVM")
    from numba.cuda.cudadrv import nvvm

    return Compiler(device.compile_ptx, nvvm)


def check_ptx(ptx: str) -> None:
    """Check that PTX for Hopper contracts and approximates nothing and names the memory of every load and store."""
    assert re.search(r"^\.target sm_90", ptx, re.MULTILINE)
    assert ".entry" in ptx
    assert not re.findall(r"\b(?:mul|add|sub)\.f32", ptx)
    assert not re.findall(r"\b(?:div|sqrt|ex2)\.approx", ptx)
    # `ptx.reciprocal` begins with an approximation, and two fused operations round it correctly.
    assert all("fma.rn.f32" in after[:400] for after in ptx.split("rcp.approx")[1:])
    assert not re.findall(r"\s(?:ld|st)\.(?:f32|[us]\d+|b\d+)\b", ptx)
    # Fused operations that the source does ask for.
    assert "fma.rn.f32" in ptx


# A statement of LLVM that assigns a tuple to a variable: "store {i32, i64} %value, {i32, i64}* %variable".
ASSIGNED_TUPLE = re.compile(r'\s*store [{\[].*[}\]] (?P<value>\S+), .*(?:\*|ptr) (?P<variable>%"[^"]+")')


def merged_tuples(module: str) -> list[str]:
    """Variables of a module in LLVM's language that hold a tuple and are assigned in more than one place of a function.

    An assignment of zeros does not count, because Numba begins every variable with one. libNVVM of CUDA 12.8 and of
    13.0 merges such variables for ever, while it optimises, where paths of a function meet.
    """
    merged, places, function = [], Counter(), ""
    for line in module.splitlines():
        assigned = ASSIGNED_TUPLE.match(line)
        if line.startswith("define"):
            function, places = line, Counter()
        elif assigned and assigned["value"] != "zeroinitializer":
            places[assigned["variable"]] += 1
            if places[assigned["variable"]] == 2:
                merged.append(f"{assigned['variable']} of {function[:200]}")
    return merged
