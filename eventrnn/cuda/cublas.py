"""Dense products by cuBLAS on the engine's stream. Nothing is allocated per call, so that graphs can capture them."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from eventrnn.backend import BackendUnavailable

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device


# cudaDataType of the arrays of each precision.
TYPES = {"float16": 2, "bfloat16": 14, "tf32": 0, "float32": 0}

# cublasComputeType of each precision: sums in float32.
SUMS = {"float16": 68, "bfloat16": 68, "tf32": 77, "float32": 68}

# CUBLAS_OP_N and CUBLAS_OP_T. CUBLAS_GEMM_DEFAULT: cuBLAS selects the algorithm.
NOT_TRANSPOSED, TRANSPOSED, DEFAULT = 0, 1, -1

# The size that NVIDIA recommends for Hopper.
WORKSPACE_BYTES = 32 << 20


class Cublas:
    """A cuBLAS handle with its own workspace. Raises BackendUnavailable if cuBLAS cannot be loaded.


    queue : the stream of its products; the device's own by default
    """

    def __init__(self, device: Device, queue: Any = None):
        try:
            self.functions = device.load_library("cublas")
        except (ImportError, RuntimeError, OSError) as error:
            why = str(error).splitlines()[0]
            raise BackendUnavailable(
                f"cuda: exact=False and training need cuBLAS ({why}); the extras cuda12 and cuda13 bring it"
            ) from None
        self.workspace = device.empty(WORKSPACE_BYTES, "u1")
        self.handle, self.one, self.zero = ctypes.c_void_p(), ctypes.c_float(1), ctypes.c_float(0)
        self._call("cublasCreate_v2", ctypes.byref(self.handle))
        self._call("cublasSetStream_v2", self.handle, ctypes.c_void_p((queue or device.queue).ptr))
        workspace = ctypes.c_void_p(self.workspace.data.ptr), ctypes.c_size_t(WORKSPACE_BYTES)
        self._call("cublasSetWorkspace_v2", self.handle, *workspace)
        self.multiprocessors = 0

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.functions, name)(*arguments)
        if status:
            raise RuntimeError(f"cuda: {name} failed with status {status}")

    def product(self, precision: str, a: Any, b: Any, out: Any, rows: int, width: int, columns: int) -> None:
        """Compute out (rows, columns) = a (rows, width) @ b (width, columns), all stored in `precision`.

        cuBLAS is column-major, so it is given the transposed product: out.T = b.T @ a.T.
        """
        kind, pointer = TYPES[precision], ctypes.c_void_p
        left = pointer(b.data.ptr), kind, columns
        right = pointer(a.data.ptr), kind, width
        target = pointer(out.data.ptr), kind, columns
        shape, one, zero = (columns, rows, width), ctypes.byref(self.one), ctypes.byref(self.zero)
        operations = NOT_TRANSPOSED, NOT_TRANSPOSED
        arguments = *operations, *shape, one, *left, *right, zero, *target, SUMS[precision], DEFAULT
        self._call("cublasGemmEx", self.handle, *arguments)

    def multiply(
        self,
        precision: str,
        a: Any,
        b: Any,
        out: Any,
        shape: tuple[int, int, int],
        *,
        multiprocessors: int = 0,
        count: int = 1,
        accumulate: bool = False,
    ) -> None:
        """out (rows, columns) float32 = a (rows, width) @ b (width, columns), of `shape` (rows, width, columns).

        a, b, out       : `training.lanes.Factor`: address, pitch, whether the array is stored transposed, and the
                          distance of the matrices of several products
        multiprocessors : how many the kernel should be chosen for, because others run beside it; 0 for all
        count           : number of products
        accumulate      : add to `out`
        """
        rows, width, columns = shape
        if multiprocessors != self.multiprocessors:
            self._call("cublasSetSmCountTarget", self.handle, ctypes.c_int(multiprocessors))
            self.multiprocessors = multiprocessors
        kind, pointer, several = TYPES[precision], ctypes.c_void_p, count > 1

        def array(factor: Any, kind: int) -> tuple:
            """The arguments of an array; the distance of matrices is one of 64 bits."""
            own = pointer(factor.at), kind, factor.pitch
            return (*own, ctypes.c_longlong(factor.apart)) if several else own

        # cuBLAS counts columns first, so that every array is seen transposed and the factors change places.
        self._call(
            "cublasGemmStridedBatchedEx" if several else "cublasGemmEx",
            self.handle,
            TRANSPOSED if b.transposed else NOT_TRANSPOSED,
            TRANSPOSED if a.transposed else NOT_TRANSPOSED,
            columns,
            rows,
            width,
            ctypes.byref(self.one),
            *array(b, kind),
            *array(a, kind),
            ctypes.byref(self.one if accumulate else self.zero),
            *array(out, TYPES["float32"]),
            *((count,) if several else ()),
            SUMS[precision],
            DEFAULT,
        )
