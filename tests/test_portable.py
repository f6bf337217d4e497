"""Kernels for other processors give the same bits, and the kernel cache on disk keeps them apart.

Kernels are chosen for a processor when they are imported, so that each kind needs a process of its own.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from digest import digest, digest_of_cells_and_gates, digest_of_integers
from eventrnn.cpu.kernels import simd

ROOT = Path(__file__).parent.parent
# An older processor, whose kernels are the portable ones and for which LLVM uses neither wider registers nor masks.
# Where this processor has no masks either, the portable kernels are those of every other test.
KINDS = {}
if platform.machine() in ("x86_64", "AMD64") and simd.AVX512:
    KINDS["haswell"] = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}


def start(command: list[str], **environment: str) -> subprocess.Popen:
    inherited = {k: v for k, v in os.environ.items() if k not in ("EVENTRNN_VECTORS", "NUMBA_CPU_NAME")}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, *command],
        env={**inherited, "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen) -> dict:
    printed, complaint = process.communicate()
    assert process.returncode == 0, complaint
    return json.loads(printed)


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, subprocess.Popen]:
    """Processes that run `digest.py` for each other kind of processor, at the same time, with empty caches."""
    script = str(Path(__file__).with_name("digest.py"))
    return {
        kind: start([script], NUMBA_CACHE_DIR=str(tmp_path_factory.mktemp(kind)), **environment)
        for kind, environment in KINDS.items()
    }


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return {"digest": digest(), "cells_and_gates": digest_of_cells_and_gates(), "integers": digest_of_integers()}


@pytest.mark.parametrize("kind", KINDS)
def test_kernels_for_other_processors_give_equal_bits(kind, others, here):
    there = answer(others[kind])
    assert not there["avx512"]
    assert {name: there[name] for name in here} == here


def test_kernel_cache_separates_processors():
    code = (
        "import json, numba; from eventrnn.cpu.kernels import simd, sync; from numba.core.registry import cpu_target;"
        "name = sync.next_index._cache._file_name((), cpu_target.target_context.codegen());"
        "print(json.dumps([simd.AVX512, name]))"
    )
    (native, file), (portable, portable_file) = (
        answer(start(["-c", code], **environment)) for environment in ({}, {"EVENTRNN_VECTORS": "portable"})
    )
    assert not portable
    assert (native == portable) == (file == portable_file)
