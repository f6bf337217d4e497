"""The door to CUDA: the only file that imports its packages. Compiling, loading, launching, memory.

Kernels are compiled here to PTX for a named architecture, which needs no GPU, and loaded by the driver. No fused
multiply-add is made that the source does not write: `-fma=0` lets NVVM emit rounded `mul.rn` and `add.rn` only.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from eventrnn.backend import BackendUnavailable
from eventrnn.cuda.transfer import LARGE, Ferry

INSTALL = "pip install 'eventrnn[cuda13]' (driver 580 or newer) or 'eventrnn[cuda12]'"

# numba-cuda 0.30 asks for it at import, NumPy 2.5 has dropped it; and it warns of what a later NumPy will drop.
vars(np).setdefault("row_stack", np.vstack)

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from numba import cuda
        from numba.cuda import compiler as _compiler
        from numba.cuda import dispatcher as _dispatcher
        from numba.cuda import libdevice
        from numba.cuda.extending import intrinsic
except ImportError as error:
    raise BackendUnavailable(f"cuda: {error}; {INSTALL}") from None

#: oldest architecture: `redux` and 128-bit-wide relaxed loads need sm_80, large shared memory is used where it is
OLDEST = (8, 0)

#: clusters of blocks and their barriers need sm_90; larger ones than this are asked for
CLUSTERS_FROM, PORTABLE_CLUSTER = (9, 0), 8

PROBE = b".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry probe() { ret; }\n"

__all__ = ["Device", "compile_ptx", "cuda", "current_device", "device_function", "intrinsic", "libdevice"]

Blocks = int | tuple[int, int]

device_function = cuda.jit(device=True, forceinline=True)


@dataclass(frozen=True)
class _Target:
    compute_capability: tuple[int, int]


@contextmanager
def _target(architecture: tuple[int, int]) -> Iterator[None]:
    """Compile for that architecture, present or not, and without contraction."""
    compile_before, device_before = _compiler.compile_cuda, _dispatcher.get_current_device

    def compile_cuda(*args, **options):
        options["nvvm_options"] = {**options["nvvm_options"], "fma": False}
        return compile_before(*args, **options)

    # Numba asks the driver for the architecture of a device function, whatever the kernel is compiled for.
    _compiler.compile_cuda = compile_cuda
    _dispatcher.get_current_device = lambda: _Target(architecture)
    try:
        yield
    finally:
        _compiler.compile_cuda, _dispatcher.get_current_device = compile_before, device_before


def compile_ptx(kernel: Callable[..., None], signature, architecture: tuple[int, int], threads: int) -> str:
    """PTX of a kernel, for at most `threads` a block. Needs libNVVM, but no GPU. About a second."""
    threads = int(threads)
    with _target(architecture):
        # One block a multiprocessor: its registers are all for us.
        ptx, _ = cuda.compile(kernel, signature, device=False, abi="numba", cc=architecture, launch_bounds=(threads, 1))
    return ptx


@dataclass(frozen=True)
class _Foreign:
    """Somebody's stream, by the protocol that CuPy takes it with."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class Device:
    """The current GPU. Raises BackendUnavailable with the reason and the remedy."""

    def __init__(self):
        try:
            import cupy
            from cuda.core import Device as CoreDevice
        except ImportError as error:
            raise BackendUnavailable(f"cuda: {error}; {INSTALL}") from None
        if not cuda.is_available():
            raise BackendUnavailable(f"cuda: no GPU with a working driver is here; {INSTALL}, or use backend='cpu'")
        self.arrays: Any = cupy
        self.core = CoreDevice()
        self.core.set_current()
        major, minor = self.core.compute_capability
        self.architecture = int(major), int(minor)
        if self.architecture < OLDEST:
            have, need = (".".join(map(str, each)) for each in (self.architecture, OLDEST))
            raise BackendUnavailable(
                f"cuda: {self.core.name} has compute capability {have}, need {need} or newer; use backend='cpu'"
            )
        properties = self.core.properties
        self.multiprocessors = int(properties.multiprocessor_count)
        self.shared_bytes = int(properties.max_shared_memory_per_block_optin)
        self.name = self.core.name
        self.stream = self.core.create_stream()
        #: the same stream, for CuPy
        self.queue = cupy.cuda.Stream.from_external(self.stream)
        self._kernels: dict[tuple, Any] = {}
        self._clusters: dict[int, int] = {}

    def kernel(self, key: tuple, make: Callable[[], tuple[Callable[..., None], Any]], threads: int) -> Any:
        """The loaded kernel of that key; `make` gives function and signature, compiled where it is new."""
        from cuda.core import ObjectCode

        key = (*key, threads)
        if key not in self._kernels:
            function, signature = make()
            ptx = compile_ptx(function, signature, self.architecture, threads)
            name = next(line for line in ptx.splitlines() if ".entry" in line).split()[2].rstrip("(")
            code = ObjectCode.from_ptx(ptx.encode())
            self._kernels[key] = (code.get_kernel(name), code)
        return self._kernels[key][0]

    def launch(
        self,
        kernel: Any,
        blocks: int | tuple[int, int],
        threads: int,
        *arguments: int,
        shared: int = 0,
        together: bool = False,
        cluster: int = 0,
    ) -> None:
        """Put a kernel on the stream; all arguments are int64. `together`: all blocks must be resident at once.

        `cluster`: so many neighbouring blocks share their memory. Then the caller sees to it that all are resident
        (`clusters`), for the two kinds of launch do not mix.
        """
        from cuda.core import LaunchConfig, launch

        self._allow(kernel, shared, cluster)
        if cluster:
            # `grid` counts clusters.
            config = LaunchConfig(grid=int(blocks) // cluster, cluster=cluster, block=threads, shmem_size=shared)
        else:
            config = LaunchConfig(grid=blocks, block=threads, shmem_size=shared, is_cooperative=together)
        launch(self.stream, config, kernel, *(ctypes.c_int64(each) for each in arguments))

    def _allow(self, kernel: Any, shared: int, cluster: int) -> None:
        """Lift the limits that a kernel starts out with."""
        from cuda.bindings import driver

        attributes = driver.CUfunction_attribute
        wanted = {}
        if shared > 48 * 1024:
            wanted[attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES] = shared
        if cluster > PORTABLE_CLUSTER:
            wanted[attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
        for attribute, value in wanted.items():
            (error,) = driver.cuKernelSetAttribute(attribute, value, int(kernel.handle), self.core.device_id)
            if int(error):
                raise RuntimeError(f"cuda: {attribute.name} of {value} was refused ({error.name})")

    def clusters(self, size: int) -> int:
        """How many clusters of so many blocks that fill a multiprocessor run at once; 0 where there are none."""
        from cuda.bindings import driver
        from cuda.core import ObjectCode

        if self.architecture < CLUSTERS_FROM:
            return 0
        if size not in self._clusters:
            kernel = ObjectCode.from_ptx(PROBE).get_kernel("probe")
            self._allow(kernel, self.shared_bytes, size)
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dimensions = attribute.value.clusterDim
            dimensions.x, dimensions.y, dimensions.z = size, 1, 1
            attribute.value.clusterDim = dimensions
            config = driver.CUlaunchConfig()
            config.gridDimX, config.gridDimY, config.gridDimZ = size, 1, 1
            config.blockDimX, config.blockDimY, config.blockDimZ = 1024, 1, 1
            config.sharedMemBytes, config.attrs, config.numAttrs = self.shared_bytes, [attribute], 1
            _, function = driver.cuKernelGetFunction(int(kernel.handle))
            error, count = driver.cuOccupancyMaxActiveClusters(function, config)
            # A chip that knows no clusters of that size has none.
            self._clusters[size] = 0 if int(error) else int(count)
        return self._clusters[size]

    def load_library(self, name: str) -> ctypes.CDLL:
        """One of NVIDIA's libraries, found where their packages or the system have it. Raises as `ctypes.CDLL` does,
        ImportError and RuntimeError.
        """
        from cuda.pathfinder import load_nvidia_dynamic_lib

        found = load_nvidia_dynamic_lib(name)
        return ctypes.CDLL(found.abs_path or f"lib{name}.so")

    def seconds(self, enqueue: Callable[[], None]) -> float:
        """GPU time of what a call puts on the stream."""
        from cuda.core import EventOptions

        begin, end = (self.core.create_event(options=EventOptions(timing_enabled=True)) for _ in range(2))
        self.stream.record(begin)
        enqueue()
        self.stream.record(end)
        end.sync()
        return (end - begin) / 1e3

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """CuPy's work goes on the same stream. Raises MemoryError with the needed and the free bytes."""
        try:
            with self.queue:
                yield
        except self.arrays.cuda.memory.OutOfMemoryError as error:
            raise self._out_of_memory(int(getattr(error, "_size", 0))) from None

    def follow(self, array: Any) -> None:
        """What comes on the stream waits for what the caller's own streams have been given so far."""
        cuda_, torch = self.arrays.cuda, sys.modules.get("torch")
        waited = [cuda_.get_current_stream()]
        if torch is not None and isinstance(array, torch.Tensor):
            theirs = _Foreign(torch.cuda.current_stream(array.device).cuda_stream)
            waited.append(cuda_.Stream.from_external(theirs))
        for each in waited:
            if each.ptr != self.queue.ptr:
                self.queue.wait_event(each.record())

    def put(self, array: np.ndarray) -> Any:
        """A device copy. Raises MemoryError with the needed and the free bytes."""
        target = self.empty(array.shape, array.dtype)
        target.set(np.ascontiguousarray(array))
        return target

    def fetch(self, array: Any, target: np.ndarray) -> None:
        """Copy it to contiguous memory of the host; done on return."""
        array = self.arrays.ascontiguousarray(array)
        if array.nbytes < LARGE:
            array.get(out=target)
        else:
            self._ferry.fetch(array, target)

    def send(self, array: np.ndarray, target: Any) -> None:
        """Copy contiguous memory of the host to the device, on its stream."""
        if array.nbytes < LARGE:
            target.data.copy_from_host_async(array.ctypes.data, array.nbytes)
        else:
            self._ferry.send(array, target)

    @cached_property
    def _ferry(self) -> Ferry:
        return Ferry(self)

    def empty(self, shape, dtype) -> Any:
        """Device memory as it comes. Raises MemoryError with the needed and the free bytes."""
        try:
            return self.arrays.empty(shape, dtype)
        except self.arrays.cuda.memory.OutOfMemoryError:
            raise self._out_of_memory(int(np.prod(shape)) * np.dtype(dtype).itemsize) from None

    def _out_of_memory(self, needed: int) -> MemoryError:
        pool = self.arrays.get_default_memory_pool()
        free = self.arrays.cuda.runtime.memGetInfo()[0] + pool.free_bytes()
        if pool.get_limit():
            free = min(free, pool.get_limit() - pool.used_bytes())
        return MemoryError(
            f"cuda: {needed:,} bytes are needed and {free:,} are free on {self.name}; use a smaller batch, or fewer "
            "steps at a time"
        )


@cache
def current_device() -> Device:
    """The GPU of this process, opened once."""
    return Device()
