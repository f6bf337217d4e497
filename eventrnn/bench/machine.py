"""The machine of a measurement: processor, package versions, threads, and the rate of FMA in registers."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from eventrnn.bench.kernels.probes import CHAINS, multiply_add
from eventrnn.cpu.kernels.simd import LANES

GPU_PACKAGES = ("numba-cuda", "cupy-cuda12x", "cupy-cuda13x", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")

# Rounds of FMA per run, a few milliseconds, and runs.
PEAK_ROUNDS, PEAK_REPEATS = 1_000_000, 5


def device() -> str:
    """The processor's name and number of cores."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of this package and of the packages that its speed, or that of a baseline, depends on."""
    found = {"python": platform.python_version()}
    for name in ("eventrnn", "numba", "llvmlite", "numpy", "scipy", "torch", "mkl", "sparse_dot_mkl", *GPU_PACKAGES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def gpu() -> dict[str, str]:
    """The GPU of backend="cuda", what it runs for inference and for training, and its free memory; or why there is
    none."""
    from eventrnn.backend import BackendUnavailable

    try:
        from eventrnn.cuda.device import current_device

        found = current_device()
    except BackendUnavailable as error:
        return {"gpu": f"none; {error}"}
    from eventrnn.cuda import PRECISIONS as FOR_INFERENCE
    from eventrnn.training.settings import PRECISIONS

    version = ".".join(map(str, found.architecture))
    default, *others = PRECISIONS
    return {
        "gpu": f"{found.name}, compute capability {version}, {found.free_bytes():,} bytes free",
        "gpu_inference": f"exact float32; with exact=False tensor cores in {', '.join(FOR_INFERENCE)}",
        "gpu_training": f"one CUDA graph per update; products by cuBLAS in {default}, or {', '.join(others)}, "
        "with float32 sums and parameters",
    }


@contextmanager
def limited(threads: int) -> Iterator[None]:
    """Limit BLAS, OpenMP and torch, where they are loaded, to that many threads."""
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    with threadpool_limits(limits=threads):
        if torch:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)


def peak(threads: int) -> dict[str, float | None]:
    """Peak float32 rate in registers: GFLOP/s of all threads (two operations per FMA), and as a multiple of one thread.

    A multiple well below the number of threads shows that threads shared a core during the measurement.
    """
    # Every thread gets its own cache lines.
    data = [np.ones((CHAINS + 4) * LANES, np.float32) for _ in range(threads)]
    multiply_add(1, data[0])

    def rate(parts: int) -> float:
        best = float("inf")
        with ThreadPoolExecutor(parts) as pool:
            for _ in range(PEAK_REPEATS):
                started = time.perf_counter()
                list(pool.map(multiply_add, [PEAK_ROUNDS] * parts, data[:parts]))
                best = min(best, time.perf_counter() - started)
        return parts * PEAK_ROUNDS * CHAINS * LANES * 2 / best / 1e9

    one = rate(1)
    every = rate(threads) if threads > 1 else one
    return {"fma_gflop_s": every, "fma_scaling": every / one if threads > 1 else None}
