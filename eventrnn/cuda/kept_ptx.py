"""PTX of kernels on disk, so that a process compiles only the kernels that none before it has compiled.

Numba takes seconds per kernel, and about a minute for all kernels of some networks. The driver has a cache of its own
for what it makes of PTX.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np

from eventrnn._kernel_files import announce, keep, kept, source_digest, warn


def ptx_of(function: Callable[..., None], made_for: tuple, compiler: tuple, compiled: Callable[[], str]) -> str:
    """PTX of a kernel: what was kept for it, or what `compiled` returns, which is then kept.

    function : the kernel. One of a module outside this package, such as a test, is compiled anew in every process
    made_for : whatever else than its source the PTX depends on: numbers, names, and tuples and records of them. Raises
               TypeError for anything else
    compiler : the versions of the compiler, likewise
    """
    module, name = function.__module__, function.__name__
    if not module.startswith("eventrnn."):
        return compiled()
    source, tools = Path(str(sys.modules[module].__file__)), (sys.version, numba.__version__, llvmlite.__version__)
    described = repr((name, plain(made_for), plain(compiler), tools))
    file = f"{module.rpartition('.')[2]}.{name}-{hashlib.sha256(described.encode()).hexdigest()[:24]}.ptx"
    try:
        identity = source_digest(module)
    except OSError as error:
        # Without its source as imported, a kernel that was kept cannot be told from one of another version.
        warn(f"compiled kernels are neither read nor kept: {error}")
        return compiled()
    for body in kept(source, file):
        found, _, ptx = body.decode().partition("\n")
        if found == identity:
            return ptx
    announce(name, "GPU")
    ptx = compiled()
    keep(source, file, f"{identity}\n{ptx}".encode())
    return ptx


def plain(value: Any) -> Any:
    """A value in words that are the same in every process. Raises TypeError for what has none."""
    if value is None or isinstance(value, bool | int | float | str | np.number):
        return value.item() if isinstance(value, np.number) else value
    if isinstance(value, tuple):
        return tuple(plain(each) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, *(plain(getattr(value, each.name)) for each in fields(value))
    raise TypeError(f"a kernel may be made for numbers, names, and tuples and records of them only, got {value!r}")
