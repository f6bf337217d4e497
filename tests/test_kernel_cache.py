"""The cache of compiled kernels is a convenience: whatever happens to it, results stay right and healing needs no hand.

Every test compiles one small kernel of the package, with a cache in a folder of its own.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import sys
import warnings
from pathlib import Path

import numba
import numpy as np
import pytest
from numba import types

from eventrnn import _kernel_files as kernel_files
from eventrnn.cpu import kernel_cache
from eventrnn.cpu.kernels import jit, sync
from support.sources import check_sources


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """An empty cache. Every warning of the cache may be given again, and is an error unless a test expects it."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    kernel_files.warn.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield tmp_path / "kernels"


def process():
    """The kernel as another process would have it: not compiled, but with the same cache."""
    return jit.compiled(sync.next_index.py_func)


def used(kernel, kind=np.int64) -> int:
    """Call the kernel, check its result, and return how often it was compiled."""
    counter = np.array([41], kind)
    assert [kernel(counter), counter[0]] == [41, 42]
    return sum(kernel.stats.cache_misses.values())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_kept_kernel_is_compiled_once(folder):
    assert [used(process()), used(process())] == [1, 0]
    assert len(files(folder)) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :],
        lambda raw: bytes(len(raw)),
    ],
    ids=["empty", "half", "one byte short", "one bit flipped", "zeros"],
)
def test_damaged_file_is_compiled_again_and_replaced(folder, damage):
    used(process())
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(RuntimeWarning, match="damaged; they are compiled again and replaced"):
        assert used(process()) == 1
    assert used(process()) == 0
    assert files(folder) == [file]


def test_whole_file_of_something_else_is_compiled_again(folder):
    used(process())
    (file,) = files(folder)
    kernel_files.write(file, hashlib.sha256(b"no pickle").digest() + b"no pickle")
    assert [used(process()), used(process())] == [1, 0]


def test_changed_source_is_compiled_again_and_replaces_the_file(folder, monkeypatch):
    used(process())
    with monkeypatch.context() as patch:
        patch.setattr(kernel_cache, "source_digest", lambda module: "another version")
        assert [used(process()), used(process())] == [1, 0]
    assert len(files(folder)) == 1
    assert used(process()) == 1


def test_folder_that_cannot_be_made_is_one_warning_with_the_remedy(folder):
    folder.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="set EVENTRNN_CACHE to a folder|Set EVENTRNN_CACHE to a folder") as given:
        assert used(process()) == 1
    assert len(given) == 1
    assert used(process()) == 1


def test_full_disk_leaves_no_file(folder, monkeypatch):
    def full(path, raw):
        with open(path, "wb") as file:
            file.write(raw[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert used(process()) == 1
    assert files(folder) == []


def without_place_beside_the_source(monkeypatch) -> None:
    """As in an installation that is read-only; Numba's own setting is not given."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    write = kernel_files.write

    def refusing(target, raw):
        if "__pycache__" in target.parts:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        write(target, raw)

    monkeypatch.setattr(kernel_files, "write", refusing)
    # A kernel that lies there from an earlier run is of another version.
    monkeypatch.setattr(kernel_cache, "source_digest", lambda module: "read-only")


def test_read_only_package_keeps_kernels_in_the_cache_folder(tmp_path, monkeypatch):
    without_place_beside_the_source(monkeypatch)
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path / "mine"))
    assert [used(process()), used(process())] == [1, 0]
    assert len(files(tmp_path / "mine")) == 1


def test_read_only_package_without_a_home_runs(monkeypatch):
    without_place_beside_the_source(monkeypatch)
    for name in ("EVENTRNN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(RuntimeWarning, match="Read-only file system.*Set EVENTRNN_CACHE"):
        assert used(process()) == 1


def test_two_processes_keep_two_signatures_at_once(folder):
    # Both look before either has kept anything.
    first, second = process(), process()
    assert [used(first, np.int64), used(second, np.uint64)] == [1, 1]
    assert len(files(folder)) == 2
    assert [used(process(), np.int64), used(process(), np.uint64)] == [0, 0]


def test_kinds_of_processors_have_files_of_their_own(folder):
    for variant in (True, False):
        kernel = process()
        kernel._cache = kernel_cache.KernelCache(kernel.py_func, variant=variant)
        assert used(kernel) == 1
    assert len(files(folder)) == 2


def test_function_within_a_function_is_kept_by_what_it_encloses(folder):
    def made(amount):
        def add(x):
            return x + amount

        kernel = numba.njit(add)
        add.__module__ = sync.__name__
        kernel._cache = kernel_cache.KernelCache(add)
        return kernel

    assert [made(1)(5), made(2)(5), made(1)(5)] == [6, 7, 6]
    assert len(files(folder)) == 2
    with pytest.raises(TypeError, match="may enclose numbers"):
        made([1])(5)


def test_source_of_a_kernel_is_all_it_imports():
    check_sources(
        "eventrnn.cpu.kernels",
        "eventrnn.training.bptt.kernels",
        "eventrnn.training.kernels",
        "eventrnn.pruning.kernels",
        "eventrnn.bench.kernels",
    )


def test_compiling_is_said_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, lines in ((Terminal(), 1), (io.StringIO(), 0)):
        monkeypatch.setattr(sys, "stderr", stream)
        process().compile((types.Array(types.int64, 1, "C"),))
        said = stream.getvalue()
        assert said.count("\n") == lines and said.count("next_index") == lines
        monkeypatch.setattr(numba.config, "CACHE_DIR", numba.config.CACHE_DIR + "-")
