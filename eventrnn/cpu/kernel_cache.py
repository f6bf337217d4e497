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
import os
import pickle
import re
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching, config, event
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from eventrnn._files import cache_folder

PACKAGE = Path(__file__).parents[1]

_IMPORT = re.compile(r"^[ \t]*from (eventrnn[\w.]*) import (\([^)]*\)|.*)|^[ \t]*import (eventrnn[\w.]*)", re.MULTILINE)

#: what Numba made of a kernel (`CompileResult`) -> its machine code
machine_code = attrgetter("library")


class KernelCache(caching._Cache):
    """The compiled signatures of one function, by the interface that Numba's dispatchers expect.

    variant : whatever else than source, signature and processor the machine code depends on
    """

    def __init__(self, function: Callable, variant: object = None):
        self._function, self._variant = function, variant
        self._enclosed = [cell.cell_contents for cell in function.__closure__ or ()]
        # Read now: the files may be edited before the function is compiled.
        made_of = {function.__module__, *(each.py_func.__module__ for each in self._enclosed if _is_kernel(each))}
        # A kernel of a test or of a user is compiled anew in every process: what it is made of is not known.
        self._enabled = all(module.partition(".")[0] == PACKAGE.name for module in made_of)
        try:
            self._sources = tuple(source_digest(module) for module in sorted(made_of) if self._enabled)
        except OSError as error:
            # Without its source, a kernel that was kept cannot be told from one of another version.
            self._sources, self._enabled = (), False
            _warn(f"compiled kernels are not kept, because their source cannot be read ({error})")
        self._name = f"{function.__module__.rpartition('.')[2]}.{function.__qualname__}"

    @property
    def cache_path(self) -> str:
        """The first folder where a compiled kernel is looked for."""
        return str(next(_folders(self._function)))

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Forget every signature that was kept, where the files can be removed."""
        for folder in _folders(self._function):
            for file in folder.glob(f"{self._name}-*.nbc"):
                with suppress(OSError):
                    file.unlink()

    def load_overload(self, sig: Any, target_context: Any) -> CompileResult | None:
        """The compiled signature, or None where none is kept that can be used."""
        if not self._enabled:
            return None
        target_context.refresh()
        name, identity = self._file_name(sig, target_context.codegen()), self._identity(sig)
        for folder in _folders(self._function):
            try:
                kept = (folder / name).read_bytes()
            except OSError:
                continue
            body = _checked(kept)
            if body is None:
                _warn(f"{folder}: compiled kernels are damaged; they are compiled again and replaced")
                continue
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
        body = dumps((self._identity(sig), data._reduce()))
        name, reasons = self._file_name(sig, data.codegen), []
        for folder in _folders(self._function):
            try:
                _write(folder / name, hashlib.sha256(body).digest() + body)
                return
            except OSError as error:
                reasons.append(f"{folder}: {error.strerror or error}")
        _warn(
            f"compiled kernels cannot be kept ({'; '.join(reasons) or 'there is no home folder'}); every process "
            "compiles them again. Set EVENTRNN_CACHE to a folder that can be written"
        )

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


def _folders(function: Callable) -> Iterator[Path]:
    """Where kernels are kept, in order of preference.

    `NUMBA_CACHE_DIR` if it is set; otherwise beside the source, and where that cannot be written, in the package's
    cache folder. Kernels are read from all of them: those of an image that is read-only may have been compiled before.
    """
    source = Path(function.__code__.co_filename)
    beside = "-".join((*source.parent.parts[-3:], hashlib.sha256(str(source.parent).encode()).hexdigest()[:12]))
    if named := getattr(config, "CACHE_DIR", ""):
        yield Path(named) / beside
        return
    yield source.parent / "__pycache__"
    with suppress(OSError):
        yield cache_folder() / "kernels" / beside


def _write(target: Path, raw: bytes) -> None:
    """Write a file so that a reader sees all of it or nothing. It need not survive a power cut: it has a checksum."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(raw)
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _checked(raw: bytes) -> bytes | None:
    """What a file holds behind its checksum; None if it is not what was written."""
    body = raw[32:]
    return body if hashlib.sha256(body).digest() == raw[:32] else None


@cache
def _warn(message: str) -> None:
    # Once per process and folder, not once per kernel.
    warnings.warn(message, RuntimeWarning, stacklevel=2)


class _Announcement(event.Listener):
    """Says on a terminal which kernel is being compiled, by name unless it is part of another kernel."""

    depth = 0

    def on_start(self, event: Any) -> None:
        dispatcher = event.data["dispatcher"]
        if self.depth == 0 and isinstance(dispatcher._cache, KernelCache) and sys.stderr and sys.stderr.isatty():
            name = dispatcher.py_func.__name__
            sys.stderr.write(f"eventrnn: compiling {name} for this processor, once\n")
        self.depth += 1

    def on_end(self, event: Any) -> None:
        self.depth -= 1


event.register("numba:compile", _Announcement())


# --- what a kernel is made of -------------------------------------------------------------------------------


@cache
def source_digest(module: str) -> str:
    """Digest of the source of a module of this package and of all modules of it that it imports, directly or not.

    A kernel is made of nothing else of the package. What its module does not import cannot change it, so that edits
    elsewhere leave compiled kernels in use.
    """
    digest = hashlib.sha256()
    for name in sorted(_imported(module)):
        digest.update(f"{name} {_source(name)}".encode())
    return digest.hexdigest()


def _imported(module: str) -> set[str]:
    found, ahead = set(), [module]
    while ahead:
        name = ahead.pop()
        # This file says where kernels are kept, not what they compute.
        if name not in found and name != __name__:
            found.add(name)
            ahead += _imports(name)
    return found


@cache
def _imports(module: str) -> list[str]:
    """The modules of the package that a module imports, in any place; a package only if something is taken from it."""
    found = []
    for source, names, whole in _IMPORT.findall(_source(module)):
        if whole:
            found.append(whole)
            continue
        inner = [f"{source}.{name}" for name in re.findall(r"\w+", names)]
        found += [each if _file(each) else source for each in inner]
    return found


@cache
def _source(module: str) -> str:
    file = _file(module)
    if file is None:
        raise OSError(f"no source of {module}")
    return file.read_text(encoding="utf-8")


def _file(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
