"""Compiled kernels on disk: a convenience that may be missing, full, damaged or shared, and never changes a result.

Numba's own cache is not used, for four reasons. It stamps a kernel by its own file only, so that an edit of `cells.py`
would leave stale kernels. It refuses to import where no folder can be written. A file that was cut off or damaged makes
every later run fail. And two processes that compile different signatures of one kernel at the same time can give
both the same file name.

Here every signature has a file of its own, with a checksum, which is written under another name and then renamed. It is
used only if all source that the kernel is made of is unchanged. A file that cannot be used is compiled again, and one
that cannot be kept is a warning.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Callable
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching, event
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from eventrnn._kernel_files import PACKAGE, announce, folders, keep, kept, source_digest, warn

#: what Numba made of a kernel (`CompileResult`) -> its machine code
machine_code = attrgetter("library")


class KernelCache(caching._Cache):
    """The compiled signatures of one function, by the interface that Numba's dispatchers expect.

    variant : whatever else than source, signature and processor the machine code depends on
    """

    def __init__(self, function: Callable, variant: object = None):
        self._source, self._variant = Path(function.__code__.co_filename), variant
        self._enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
        # Read now: the files may be edited before the function is compiled.
        made_of = {function.__module__, *(each.py_func.__module__ for each in self._enclosed if _is_kernel(each))}
        # A kernel of a test or of a user is compiled anew in every process: what it is made of is not known.
        self._enabled = all(module.partition(".")[0] == PACKAGE.name for module in made_of)
        try:
            self._sources = tuple(source_digest(module) for module in sorted(made_of) if self._enabled)
        except OSError as error:
            # Without its source as imported, a kernel that was kept cannot be told from one of another version.
            self._sources, self._enabled = (), False
            warn(f"compiled kernels are neither read nor kept: {error}")
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"

    @property
    def cache_path(self) -> str:
        """The first folder where a compiled kernel is looked for."""
        return str(next(folders(self._source)))

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Forget every signature that was kept, where the files can be removed."""
        for folder in folders(self._source):
            for file in folder.glob(f"{self._name}-*.nbc"):
                with suppress(OSError):
                    file.unlink()

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """The compiled signature, or None where none is kept that can be used."""
        if not self._enabled:
            return None
        target_context.refresh()
        name, identity = self._file_name(sig, target_context.codegen()), self._identity(sig)
        for body in kept(self._source, name):
            # Something that is whole, but not what this version of Numba writes, is no reason to stop.
            with suppress(Exception):
                found, result = pickle.loads(body)
                if found == identity:
                    return CompileResult._rebuild(target_context, *result)
        return None

    def save_overload(self, sig: Any, data: CompileResult) -> None:
        """Keep a compiled signature in the first folder that takes it; warns where none does."""
        whole = all(each.can_cache for each in data.lifted) and not machine_code(data).has_dynamic_globals
        if not self._enabled or not whole:
            return
        keep(self._source, self._file_name(sig, data.codegen), dumps((self._identity(sig), data._reduce())))

    def _file_name(self, sig: Any, codegen: Any) -> str:
        """One name per signature and kind of processor; a changed source has the same name, so that it replaces."""
        tools = sys.version, numba.__version__, llvmlite.__version__
        made_for = repr((str(sig), codegen.magic_tuple(), self._variant, list(map(_described, self._enclosed)), tools))
        return f"{self._name}-{hashlib.sha256(made_for.encode()).hexdigest()[:24]}.nbc"

    def _identity(self, sig: Any) -> tuple[str, ...]:
        """The signature, and the source that the kernel is made of."""
        return str(sig), *self._sources


def _described(enclosed: Any) -> str:
    """What a kernel takes from the function around it, in words that are the same in every process."""
    if _is_kernel(enclosed):
        return f"{enclosed.py_func.__module__}.{enclosed.py_func.__qualname__}"
    if isinstance(enclosed, int | float | str | type):
        return repr(enclosed)
    raise TypeError(f"a kernel may enclose numbers, names, types and kernels only, got {enclosed!r}")


def _is_kernel(enclosed: Any) -> bool:
    return hasattr(enclosed, "py_func")


class _Announcement(event.Listener):
    """Says on a terminal which kernel is being compiled, by name unless it is part of another kernel."""

    depth = 0

    def on_start(self, event: Any) -> None:
        dispatcher = event.data["dispatcher"]
        if self.depth == 0 and isinstance(dispatcher._cache, KernelCache):
            announce(dispatcher.py_func.__name__, "processor")
        self.depth += 1

    def on_end(self, event: Any) -> None:
        self.depth -= 1


event.register("numba:compile", _Announcement())
