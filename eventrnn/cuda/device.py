"""Access to CUDA: the only file that imports its packages. Compiling, loading, launching, memory.

Kernels are compiled to PTX for a given architecture, which needs no GPU, and loaded by the driver. The compiler must
not fuse multiplications and additions that the source does not fuse: with `-fma=0` NVVM emits `mul.rn` and `add.rn`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

from eventrnn.backend import BackendUnavailable
from eventrnn.cuda.kept_ptx import ptx_of
from eventrnn.cuda.transfer import LARGE, StagedCopier

# The remedy that error messages name.
INSTALL = "pip install 'eventrnn[cuda13]' (driver 580 or newer) or 'eventrnn[cuda12]'"

# numba-cuda 0.30 uses `np.row_stack` at import, which NumPy 2.5 has removed, and causes deprecation warnings.
vars(np).setdefault("row_stack", np.vstack)

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from numba import cuda
        from numba.cuda import compiler as _compiler
        from numba.cuda import config, libdevice
        from numba.cuda import dispatcher as _dispatcher
        from numba.cuda.cuda_paths import get_cuda_paths
        from numba.cuda.extending import intrinsic
        from numba_cuda import __version__ as numba_cuda_version
except ImportError as error:
    raise BackendUnavailable(f"cuda: {error}; {INSTALL}") from None

#: oldest supported compute capability: `redux` and 128-bit relaxed loads need sm_80
OLDEST = (8, 0)

#: compute capability from which thread-block clusters exist
CLUSTERS_FROM = (9, 0)

#: blocks per cluster up to which no special permission is needed
PORTABLE_CLUSTER = 8

#: bytes of shared memory per block up to which no special permission is needed
DEFAULT_SHARED_BYTES = 48 * 1024

#: an empty kernel, for questions about occupancy
PROBE = b".version 8.0\n.target sm_90\n.address_size 64\n.visible .entry probe() { ret; }\n"

__all__ = ["Device", "compile_ptx", "cuda", "current_device", "device_function", "intrinsic", "libdevice"]

#: decorator of device functions; they are always inlined
device_function = cuda.jit(device=True, forceinline=True)


@dataclass(frozen=True)
class _Target:
    """A device as far as Numba's compiler needs one."""

    compute_capability: tuple[int, int]


@contextmanager
def _target(architecture: tuple[int, int]) -> Iterator[None]:
    """Within the context Numba compiles for that architecture, even without such a GPU, and without contraction."""
    compile_before, device_before = _compiler.compile_cuda, _dispatcher.get_current_device

    def compile_cuda(*args, **options):
        options["nvvm_options"] = {**options["nvvm_options"], "fma": False}
        return compile_before(*args, **options)

    # For device functions Numba takes the architecture from the current device, not from the kernel being compiled.
    _compiler.compile_cuda = compile_cuda
    _dispatcher.get_current_device = lambda: _Target(architecture)
    try:
        yield
    finally:
        _compiler.compile_cuda, _dispatcher.get_current_device = compile_before, device_before


def compile_ptx(kernel: Callable[..., None], signature, architecture: tuple[int, int], threads: int) -> str:
    """PTX of a kernel for at most `threads` threads per block. Needs libNVVM, but no GPU. Takes seconds.

    kernel, signature : a Python function and its Numba signature, as the factories in `kernels/` return them
    """
    threads = int(threads)
    with _target(architecture):
        # One block per multiprocessor, so that it can use all registers.
        ptx, _ = cuda.compile(kernel, signature, device=False, abi="numba", cc=architecture, launch_bounds=(threads, 1))
    return ptx


@cache
def compiler_version() -> tuple:
    """What PTX depends on beside Numba: numba-cuda and its settings; libNVVM and libdevice by path, size and time."""
    libraries = [str(get_cuda_paths()[name].info) for name in ("nvvm", "libdevice")]
    found = [os.stat(library) for library in libraries]
    files = zip(libraries, (each.st_size for each in found), (each.st_mtime_ns for each in found), strict=True)
    return numba_cuda_version, str(config.OPT), config.CUDA_DEBUGINFO_DEFAULT, *files


@dataclass(frozen=True)
class _ForeignStream:
    """A stream of another library, in the protocol that CuPy accepts."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


class Device:
    """The current GPU and one stream on it. Raises BackendUnavailable with the reason and the remedy.

    architecture    : compute capability (major, minor)
    multiprocessors : number of multiprocessors
    shared_bytes    : bytes of shared memory that a block can have
    arrays          : the CuPy module
    """

    def __init__(self):
        try:
            import cupy
            from cuda.core import Device as CoreDevice
        except ImportError as error:
            raise BackendUnavailable(f"cuda: {error}; {INSTALL}") from None
        if not cuda.is_available():
            raise BackendUnavailable(f"cuda: no GPU with a working driver is here; {INSTALL}, or use backend='cpu'")
        #: the process that has opened the GPU
        self.process = os.getpid()
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
        """The loaded kernel of that key; for a new key, `make` returns the function and signature to compile."""
        from cuda.core import ObjectCode

        key = (*key, threads)
        if key not in self._kernels:
            function, signature = make()
            # A factory may ask the device, whose answers are no part of the key.
            made_for = key, str(signature), self.architecture, self.name, self.multiprocessors, self.shared_bytes
            ptx = ptx_of(
                function,
                made_for,
                compiler_version(),
                lambda: compile_ptx(function, signature, self.architecture, threads),
            )
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
        cooperative: bool = False,
        cluster: int = 0,
        stream: Any = None,
    ) -> None:
        """Launch a kernel. All arguments are passed as int64.

        shared      : bytes of dynamic shared memory per block
        cooperative : all blocks must be resident at the same time
        cluster     : blocks per cluster, 0 without clusters. A cluster launch is not cooperative, so the caller must
                      make sure that all clusters are resident (`clusters`)
        stream      : a stream of `new_stream`, or None for the device's own
        """
        from cuda.core import LaunchConfig, launch

        self._allow(kernel, shared, cluster)
        if cluster:
            # With a cluster, `grid` counts clusters.
            config = LaunchConfig(grid=int(blocks) // cluster, cluster=cluster, block=threads, shmem_size=shared)
        else:
            config = LaunchConfig(grid=blocks, block=threads, shmem_size=shared, is_cooperative=cooperative)
        launch(stream or self.stream, config, kernel, *(ctypes.c_int64(each) for each in arguments))

    def new_stream(self, *, urgent: bool = False) -> tuple[Any, Any]:
        """A further stream, and the same stream for CuPy. Kernels of an urgent one start before those of others."""
        from cuda.core import StreamOptions

        stream = self.core.create_stream(options=StreamOptions(priority=-1 if urgent else 0))
        return stream, self.arrays.cuda.Stream.from_external(stream)

    def _allow(self, kernel: Any, shared: int, cluster: int) -> None:
        """Request the permissions that a kernel needs. Raises RuntimeError if one is refused."""
        from cuda.bindings import driver

        attributes = driver.CUfunction_attribute
        wanted = {}
        if shared > DEFAULT_SHARED_BYTES:
            wanted[attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES] = shared
        if cluster > PORTABLE_CLUSTER:
            wanted[attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
        for attribute, value in wanted.items():
            (error,) = driver.cuKernelSetAttribute(attribute, value, int(kernel.handle), self.core.device_id)
            if int(error):
                raise RuntimeError(f"cuda: {attribute.name} of {value} was refused ({error.name})")

    def clusters(self, size: int) -> int:
        """Clusters of `size` blocks, each block filling a multiprocessor, that can be resident; 0 without clusters."""
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
            # The driver reports an error for a cluster size that the GPU does not support.
            self._clusters[size] = 0 if int(error) else int(count)
        return self._clusters[size]

    def load_library(self, name: str) -> ctypes.CDLL:
        """Load one of NVIDIA's libraries from its Python package or from the system.

        Raises OSError, ImportError or RuntimeError if it is not found.
        """
        from cuda.pathfinder import load_nvidia_dynamic_lib

        found = load_nvidia_dynamic_lib(name)
        return ctypes.CDLL(found.abs_path or f"lib{name}.so")

    def seconds(self, enqueue: Callable[[], None]) -> float:
        """GPU time in seconds of the work that `enqueue` puts on the stream."""
        from cuda.core import EventOptions

        begin, end = (self.core.create_event(options=EventOptions(timing_enabled=True)) for _ in range(2))
        self.stream.record(begin)
        enqueue()
        self.stream.record(end)
        end.sync()
        return (end - begin) / 1e3

    @property
    def bus(self) -> str:
        """The address of the GPU on the bus, which no other GPU of the machine has."""
        return self.arrays.cuda.Device(self.core.device_id).pci_bus_id

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Within the context CuPy uses this GPU and the same stream. Raises MemoryError with the needed and the free
        bytes."""
        try:
            with self.arrays.cuda.Device(self.core.device_id), self.queue:
                yield
        except self.arrays.cuda.memory.OutOfMemoryError as error:
            raise self._out_of_memory(int(getattr(error, "_size", 0))) from None

    def follow(self, array: Any) -> None:
        """Make later work on the stream wait for the caller's work so far.

        That is the work on CuPy's current stream and, for a torch tensor, on torch's current stream.
        """
        for each in self._streams_of(array):
            self.queue.wait_event(each.record())

    def precede(self, array: Any) -> None:
        """Make the caller's later work, on the streams of `follow`, wait for the work on the stream so far."""
        mark = self.queue.record()
        for each in self._streams_of(array):
            each.wait_event(mark)

    def _streams_of(self, array: Any) -> list[Any]:
        """The streams of the caller, other than the device's own."""
        cuda_, torch = self.arrays.cuda, sys.modules.get("torch")
        waited = [cuda_.get_current_stream()]
        if torch is not None and isinstance(array, torch.Tensor):
            theirs = _ForeignStream(torch.cuda.current_stream(array.device).cuda_stream)
            waited.append(cuda_.Stream.from_external(theirs))
        return [each for each in waited if each.ptr != self.queue.ptr]

    def put(self, array: np.ndarray) -> Any:
        """Copy an array to the device. Raises MemoryError with the needed and the free bytes."""
        target = self.empty(array.shape, array.dtype)
        target.set(np.ascontiguousarray(array))
        return target

    def fetch(self, array: Any, target: np.ndarray) -> None:
        """Copy a device array to contiguous host memory; complete on return."""
        array = self.arrays.ascontiguousarray(array)
        if array.nbytes < LARGE:
            array.get(out=target)
        else:
            self._copier.fetch(array, target)

    def send(self, array: np.ndarray, target: Any) -> None:
        """Copy contiguous host memory to the device, on the stream."""
        if array.nbytes < LARGE:
            target.data.copy_from_host_async(array.ctypes.data, array.nbytes)
        else:
            self._copier.send(array, target)

    @cached_property
    def _copier(self) -> StagedCopier:
        return StagedCopier(self.arrays, self.queue)

    def empty(self, shape, dtype) -> Any:
        """Uninitialised device memory. Raises MemoryError with the needed and the free bytes."""
        try:
            return self.arrays.empty(shape, dtype)
        except self.arrays.cuda.memory.OutOfMemoryError:
            raise self._out_of_memory(int(np.prod(shape)) * np.dtype(dtype).itemsize) from None

    def free_bytes(self) -> int:
        """Bytes that can still be allocated."""
        pool = self.arrays.get_default_memory_pool()
        free = self.arrays.cuda.runtime.memGetInfo()[0] + pool.free_bytes()
        # A limit that was set later may be below what is in use.
        return max(0, min(free, pool.get_limit() - pool.used_bytes())) if pool.get_limit() else free

    def need(self, needed: int) -> None:
        """Raise MemoryError with the needed and the free bytes unless so many bytes are free."""
        if needed > self.free_bytes():
            raise self._out_of_memory(needed)

    def _out_of_memory(self, needed: int) -> MemoryError:
        return MemoryError(
            f"cuda: {needed:,} bytes are needed and {self.free_bytes():,} are free on {self.name}; use a smaller "
            "batch, or fewer steps at a time"
        )


@cache
def _opened() -> Device:
    return Device()


def current_device() -> Device:
    """The GPU of this process; it is opened once. Raises BackendUnavailable as `Device` does, and in a process that was
    forked from one that had opened the GPU."""
    device = _opened()
    if device.process != os.getpid():
        raise BackendUnavailable(
            "cuda: this process was forked from one that had opened the GPU, which CUDA does not support; start it by "
            "spawn, as multiprocessing_context='spawn' of a DataLoader does, or use the CPU in it"
        )
    return device
