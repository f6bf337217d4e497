"""How Numba compiles this package: the cache rule, and the primitives of `cells.py` as single instructions.

No `fastmath` anywhere: LLVM then neither reorders nor contracts, and every FMA is one we wrote.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import caching
from numba.extending import intrinsic, overload, register_jitable

from eventrnn import cells


@cache
def _source_digest() -> str:
    """Digest of every source file of the package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _stamped_by_package(locator: type) -> type:
    class PackageLocator(locator):
        def get_source_stamp(self):
            return _source_digest()

    return PackageLocator


class _PackageCacheImpl(caching.CompileResultCacheImpl):
    _locator_classes = [_stamped_by_package(each) for each in caching.CompileResultCacheImpl._locator_classes]


class _PackageCache(caching.FunctionCache):
    # Numba stamps a cached kernel by its own file only, so editing cells.py would leave the kernels of cpu.py
    # stale on disk: wrong answers without a sound.
    _impl_class = _PackageCacheImpl


def compiled(function):
    """`numba.njit`, releasing the GIL, cached on disk until any file of the package changes."""
    # The NumPy error model: Python's checks every division for zero, which stops the vectoriser.
    dispatcher = numba.njit(nogil=True, error_model="numpy")(function)
    dispatcher._cache = _PackageCache(function)
    return dispatcher




for _rule in (
    cells.exp_float32,
    cells.sigmoid_float32,
    cells.tanh_float32,
    cells.egru_value,
    cells.egru_reset_gate,
    cells.egru_paper_value,
    cells.egru_backward,
    cells.egru_paper_backward,
    cells.egru_paper_reset_backward,
    cells.surrogate_slope,
):
    register_jitable(_rule)


def _unary_float32(llvm_name: str):
    @intrinsic
    def operation(typingctx, x):
        def generate(context, builder, signature, args):
            function = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
            return builder.call(builder.module.declare_intrinsic(llvm_name, [ir.FloatType()], function), args)

        if x == types.float32:
            return types.float32(x), generate

    return operation


@intrinsic
def _fma_float32(typingctx, a, b, c):
    def generate(context, builder, signature, args):
        return builder.fma(*args)

    if a == b == c == types.float32:
        return types.float32(a, b, c), generate


@intrinsic
def _power_of_two(typingctx, n):
    def generate(context, builder, signature, args):
        i32 = ir.IntType(32)
        whole = builder.fptosi(args[0], i32)
        bits = builder.shl(builder.add(whole, i32(127)), i32(23))
        return builder.bitcast(bits, ir.FloatType())

    if n == types.float32:
        return types.float32(n), generate


@intrinsic
def _select(typingctx, condition, a, b):
    def generate(context, builder, signature, args):
        return builder.select(args[0], args[1], args[2])

    if condition == types.boolean and a == b == types.float32:
        return types.float32(condition, a, b), generate


_round_even = _unary_float32("llvm.rint")


@overload(cells.fma, inline="always")
def _(a, b, c):
    return lambda a, b, c: _fma_float32(a, b, c)


@overload(cells.round_even, inline="always")
def _(x):
    return lambda x: _round_even(x)


@overload(cells.power_of_two, inline="always")
def _(n):
    return lambda n: _power_of_two(n)


@overload(cells.select, inline="always")
def _(condition, a, b):
    return lambda condition, a, b: _select(condition, a, b)


@overload(cells.sigmoid)
def _(x):
    return lambda x: cells.sigmoid_float32(x)


@overload(cells.tanh)
def _(x):
    return lambda x: cells.tanh_float32(x)


