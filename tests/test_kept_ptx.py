"""PTX of GPU kernels on disk: a kernel is compiled once for all processes, and again for whatever it depends on."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numba
import numpy as np
import pytest

from eventrnn import _kernel_files as kernel_files
from eventrnn import cells
from eventrnn.cuda import kept_ptx
from support.ptx import compiler
from support.sources import check_sources

HOPPER, COMPILER = (9, 0), ("0.30.4", "libnvvm.so", 1, 2)


@dataclass(frozen=True)
class Layout:
    narrow: bool
    groups: tuple[int, ...]


def kernel(address):
    """A kernel of the package, as far as its files know."""


kernel.__module__ = cells.__name__


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache. Every warning of the cache is an error unless a test expects it."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kernels"))
    kernel_files.warn.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield tmp_path / "kernels"


class Compiler:
    """Counts how often it is asked."""

    def __init__(self):
        self.times = 0

    def __call__(self) -> str:
        self.times += 1
        return f".entry kernel // {self.times}\n"


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_kernel_is_compiled_once_per_whatever_it_depends_on(folder):
    compiled = Compiler()
    asked = [
        (("cluster", 1, 8), COMPILER),
        (("cluster", 1, 8, 128), COMPILER),
        (("cluster", "1", 8), COMPILER),
        (("cluster", True, 8), COMPILER),
        (("cluster", Layout(True, (1, 2)), 8), COMPILER),
        (("cluster", Layout(True, (1, 3)), 8), COMPILER),
        (("cluster", 1, 8), (*COMPILER[:-1], 3)),
    ]
    first = [kept_ptx.ptx_of(kernel, *each, compiled) for each in asked]
    assert compiled.times == len(asked) == len(set(first)) == len(files(folder))
    assert [kept_ptx.ptx_of(kernel, *each, compiled) for each in asked] == first
    assert kept_ptx.ptx_of(kernel, ("cluster", np.int64(1), 8), COMPILER, compiled) == first[0]
    assert compiled.times == len(asked)


def test_kernel_of_another_package_is_compiled_in_every_process(folder):
    compiled = Compiler()

    def own():
        """A kernel of this test."""

    assert [kept_ptx.ptx_of(own, (1,), COMPILER, compiled) for _ in range(2)] == [
        f".entry kernel // {k}\n" for k in (1, 2)
    ]
    assert not files(folder)


def test_changed_source_is_compiled_again_and_replaces_the_file(folder, monkeypatch):
    compiled = Compiler()
    kept_ptx.ptx_of(kernel, (1,), COMPILER, compiled)
    monkeypatch.setattr(kept_ptx, "source_digest", lambda module: "another version")
    found = {kept_ptx.ptx_of(kernel, (1,), COMPILER, compiled) for _ in range(2)}
    assert found == {".entry kernel // 2\n"} and len(files(folder)) == 1


def test_source_that_changed_since_the_process_began_is_no_name_for_what_was_imported(folder, monkeypatch):
    compiled = Compiler()
    kept_ptx.ptx_of(kernel, (1,), COMPILER, compiled)
    for digests in (kernel_files._source, kernel_files.source_digest):
        digests.cache_clear()
    monkeypatch.setattr(kernel_files, "_BEGAN", 0.0)
    with pytest.warns(RuntimeWarning, match=r"neither read nor kept: .*py has changed since") as given:
        found = [kept_ptx.ptx_of(kernel, (1,), COMPILER, compiled) for _ in range(2)]
    assert found == [f".entry kernel // {k}\n" for k in (2, 3)] and len(files(folder)) == len(given) == 1


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-1], lambda raw: raw[:40] + b"?" + raw[41:]])
def test_damaged_file_is_compiled_again_and_replaced(folder, damage):
    compiled = Compiler()
    kept_ptx.ptx_of(kernel, (1,), COMPILER, compiled)
    (file,) = files(folder)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(RuntimeWarning, match="damaged; they are compiled again and replaced"):
        assert kept_ptx.ptx_of(kernel, (1,), COMPILER, compiled) == ".entry kernel // 2\n"
    assert kept_ptx.ptx_of(kernel, (1,), COMPILER, compiled) == ".entry kernel // 2\n"


def test_folder_that_cannot_be_made_is_one_warning_with_the_remedy(folder):
    folder.write_text("a file where the folder should be")
    compiled = Compiler()
    with pytest.warns(RuntimeWarning, match="Set EVENTRNN_CACHE to a folder") as given:
        kept_ptx.ptx_of(kernel, (1,), COMPILER, compiled)
    kept_ptx.ptx_of(kernel, (1,), COMPILER, compiled)
    assert len(given) == 1 and compiled.times == 2


@pytest.mark.parametrize("value", [object(), [1], len, {"a": 1}, Layout])
def test_what_has_no_words_of_its_own_is_refused(value):
    with pytest.raises(TypeError, match="may be made for numbers, names"):
        kept_ptx.ptx_of(kernel, ("cluster", (1, value)), COMPILER, Compiler())


def test_ptx_that_was_kept_is_what_the_compiler_returns(folder):
    compile_made = compiler()
    from eventrnn.cuda import device
    from eventrnn.cuda.kernels.input_checks import finite_kernel

    (function, signature), compiled = finite_kernel(), Compiler()
    whole = compile_made((function, signature))
    version = device.compiler_version()
    assert kept_ptx.ptx_of(function, (str(signature), HOPPER, 352), version, lambda: whole) == whole
    assert kept_ptx.ptx_of(finite_kernel()[0], (str(signature), HOPPER, 352), version, compiled) == whole
    assert compiled.times == 0


def test_compiler_is_known_by_its_settings_and_files(monkeypatch):
    compiler()
    from eventrnn.cuda import device

    monkeypatch.setattr(device, "compiler_version", device.compiler_version.__wrapped__)
    before = device.compiler_version()
    assert kept_ptx.plain(before) == before
    assert ["nvvm" in before[-2][0], "libdevice" in before[-1][0]] == [True, True]
    monkeypatch.setattr(device.config, "CUDA_DEBUGINFO_DEFAULT", 1)
    assert device.compiler_version() != before


def test_source_of_a_kernel_is_all_it_imports():
    compiler()
    check_sources("eventrnn.cuda.kernels", "eventrnn.cuda.training.kernels")
