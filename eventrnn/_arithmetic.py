"""The floating-point mode on which the bits of every result rest, whatever another library has set.

A processor has, for each thread, a rounding mode, traps, and switches by which numbers near zero become zero
(flush-to-zero). Libraries change them for the whole process (`torch.set_flush_denormal`, code built with -ffast-math).
NumPy has, for each thread, settings by which an overflow warns or raises. Both would change results, or raise in the
midst of a computation whose overflows are meant or are found by the caller's own check.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

P = ParamSpec("P")

R = TypeVar("R")

# A `fenv_t` of the C library: at most 512 bytes on any processor.
_Environment: Any = ctypes.c_uint32 * 128

# The default environment: round to nearest, no traps, no flush-to-zero. The value is that of glibc and of musl.
_DEFAULT = ctypes.c_void_p(-1)

# On x86-64, word 7 of a `fenv_t` is the control register of vector instructions. These bits of it are the mode; the
# others record what has happened.
_X86_WORD, _X86_MODE, _X86_STANDARD = 7, 0xFFC0, 0x1F80

_IS_X86 = platform.machine() in ("x86_64", "AMD64")


def _c_library() -> Any:
    """The C library with `fegetenv` and `fesetenv`; None on systems where the default environment is another."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.PyDLL(None)
    if not (hasattr(library, "fegetenv") and hasattr(library, "fesetenv")):
        return None
    library.fegetenv.argtypes = library.fesetenv.argtypes = [ctypes.c_void_p]
    return library


_C = _c_library()


def set_standard_mode() -> None:
    """Set the standard floating-point mode of the calling thread, for good."""
    if _C is not None:
        _C.fesetenv(_DEFAULT)


def standard_arithmetic(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs in the standard floating-point mode and without NumPy's floating-point errors.

    The caller finds both as they were, also after an exception. Cost: about two microseconds.
    """

    @wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        return quiet_context().run(in_standard_mode, function, *arguments, **keywords)

    return call


def quiet_context() -> Context:
    """A copy of the present context in which NumPy's floating-point errors are ignored.

    NumPy keeps its settings in a context variable, so they end with the context, whatever is raised.
    """
    context = copy_context()
    context.run(np.seterr, all="ignore")
    return context


def in_standard_mode(function: Callable[P, R], *arguments: P.args, **keywords: P.kwargs) -> R:
    """Call a function in the standard floating-point mode of the processor."""
    if _C is None:
        return function(*arguments, **keywords)
    saved = _Environment()
    _C.fegetenv(saved)
    if _IS_X86 and saved[_X86_WORD] & _X86_MODE == _X86_STANDARD:
        return function(*arguments, **keywords)
    try:
        _C.fesetenv(_DEFAULT)
        return function(*arguments, **keywords)
    finally:
        _C.fesetenv(saved)
