"""How Numba compiles this package: the cache rule, and the rules of `cells.py` made callable from kernels.

No `fastmath` anywhere: LLVM then neither reorders nor contracts, and every FMA is one we wrote.
"""

from __future__ import annotations

from typing import Any

import numba
from numba.extending import register_jitable

from eventrnn import _integers, cells
from eventrnn.cpu.kernel_cache import KernelCache
from eventrnn.cpu.kernels import simd  # simd also gives the primitives of `cells` their instructions
from eventrnn.cpu.uninterrupted import compile_uninterrupted


def compiled(function) -> Any:
    """`numba.njit`, releasing the GIL, kept on disk until a file that the kernel is made of changes.

    Arrays are the caller's throughout: nothing is allocated, and no reference is counted. Counting takes two locked
    instructions a view: with it, a product without any event took 0.75 us, without 0.07 (256 units).
    """
    return _compiled(function, _nrt=False)


def inlined(function) -> Any:
    """`compiled` for what is to be part of its callers: a call passes seven numbers an array."""
    # By Numba, not by LLVM, which would compile it by itself first. A caller that is kept on disk contains it.
    return _njit(function, _nrt=False, inline="always")


def internal(function) -> Any:
    """`compiled` for what only kernels call; every caller that is kept on disk contains it."""
    return _njit(function, _nrt=False, **_NO_WRAPPERS)


def called_by_address(function) -> Any:
    """`compiled` for what kernels call by its address (`by_address.py`), and Python does not call."""
    return _compiled(function, _nrt=False, **_NO_WRAPPERS)


def allocating_by_address(function) -> Any:
    """`called_by_address` for what makes arrays, or calls what may."""
    return _compiled(function, _nrt=True, **_NO_WRAPPERS)


def allocating(function) -> Any:
    """`compiled` for what makes arrays, or calls what may."""
    return _compiled(function, _nrt=True)


# What calls a function from Python and from C: code of its own for each, and much of it for records of arrays.
_NO_WRAPPERS = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def _njit(function, **options) -> Any:
    # The NumPy error model: Python's checks every division for zero, which stops the vectoriser.
    return numba.njit(nogil=True, error_model="numpy", **options)(function)


def _compiled(function, **options) -> Any:
    dispatcher = _njit(function, **{"no_cfunc_wrapper": True} | options)
    # Numba tells processors apart, but not what was asked for by hand on one of them.
    dispatcher._cache = KernelCache(function, variant=simd.AVX512)
    compile_uninterrupted(dispatcher)
    return dispatcher


for _rule in (
    _integers.ceil_div,
    _integers.round_up,
    cells.reciprocal,
    cells.exp_in_range,
    cells.exp_float32,
    cells.sigmoid_float32,
    cells.tanh_float32,
    cells.absolute,
    cells.egru_value_of_gates,
    cells.egru_value,
    cells.egru_decay,
    cells.egru_reset_gate,
    cells.egru_paper_value,
    cells.egru_backward,
    cells.egru_paper_backward,
    cells.egru_paper_reset_backward,
    cells.gru_value,
    cells.gru_before_value,
    cells.lstm_output,
    cells.lstm_value,
    cells.gru_backward,
    cells.gru_before_backward,
    cells.lstm_backward,
    cells.surrogate_slope,
):
    register_jitable(no_cfunc_wrapper=True)(_rule)
