"""Compiled kernels on disk, of any backend: a convenience that may be missing, full, damaged or shared.

Every kernel has a file of its own, with a checksum, which is written under another name and then renamed. A file that
is damaged counts as missing, and one that cannot be kept is a warning. What a kernel is made of says `source_digest`.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from numba.core import config

from eventrnn._files import cache_folder

PACKAGE = Path(__file__).parent

#: modules that say where kernels are kept, not what they compute
KEEPERS = ("eventrnn._kernel_files", "eventrnn.cpu.kernel_cache", "eventrnn.cuda.kept_ptx")

#: when this process began to import kernels, in seconds since 1970
_BEGAN = time.time()

_IMPORT = re.compile(r"^[ \t]*from (eventrnn[\w.]*) import (\([^)]*\)|.*)|^[ \t]*import (eventrnn[\w.]*)", re.MULTILINE)


# --- files --------------------------------------------------------------------------------------------------


def folders(source: Path) -> Iterator[Path]:
    """Where the kernels of a source file are kept, in order of preference.

    `NUMBA_CACHE_DIR` if it is set; otherwise beside the source, and where that cannot be written, in the package's
    cache folder. Kernels are read from all of them: those of an image that is read-only may have been compiled before.
    """
    beside = "-".join((*source.parent.parts[-3:], hashlib.sha256(str(source.parent).encode()).hexdigest()[:12]))
    if named := getattr(config, "CACHE_DIR", ""):
        yield Path(named) / beside
        return
    yield source.parent / "__pycache__"
    with suppress(OSError):
        yield cache_folder() / "kernels" / beside


def kept(source: Path, name: str) -> Iterator[bytes]:
    """What the files of that name hold, folder by folder, where they are what was written."""
    for folder in folders(source):
        try:
            raw = (folder / name).read_bytes()
        except OSError:
            continue
        body = raw[32:]
        if hashlib.sha256(body).digest() == raw[:32]:
            yield body
        else:
            warn(f"{folder}: compiled kernels are damaged; they are compiled again and replaced")


def keep(source: Path, name: str, body: bytes) -> None:
    """Write a file of that name to the first folder that takes it; warns where none does."""
    reasons = []
    for folder in folders(source):
        try:
            write(folder / name, hashlib.sha256(body).digest() + body)
            return
        except OSError as error:
            reasons.append(f"{folder}: {error.strerror or error}")
    warn(
        f"compiled kernels cannot be kept ({'; '.join(reasons) or 'there is no home folder'}); every process "
        "compiles them again. Set EVENTRNN_CACHE to a folder that can be written"
    )


def write(target: Path, raw: bytes) -> None:
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


@cache
def warn(message: str) -> None:
    """Warn once per process and folder, not once per kernel."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def announce(kernel: str, processor: str) -> None:
    """Say on a terminal which kernel is being compiled."""
    if sys.stderr and sys.stderr.isatty():
        sys.stderr.write(f"eventrnn: compiling {kernel} for this {processor}, once\n")


class SourceChanged(OSError):
    """A source of a kernel was edited after this process began. No folder that can be written is the remedy."""


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
        if name not in found and name not in KEEPERS:
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
    source, found = file.read_text(encoding="utf-8"), file.stat()
    if max(found.st_mtime, found.st_ctime) > _BEGAN:
        # This process may have imported what the file held before.
        raise SourceChanged(f"{file} has changed since this process began; start another process")
    return source


def _file(module: str) -> Path | None:
    path = PACKAGE.parent.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
