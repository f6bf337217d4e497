"""Dense products by cuBLAS on the engine's stream, in a way that a graph can capture."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

from eventrnn.backend import BackendUnavailable

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device


# cuBLAS's numbers: types of arrays, what sums are made in, not transposed, the algorithm that it finds best.
TYPES = {"float16": 2, "bfloat16": 14, "tf32": 0}

SUMS = {"float16": 68, "bfloat16": 68, "tf32": 77}

PLAIN, DEFAULT = 0, -1

# What NVIDIA recommends for Hopper.
WORKSPACE_BYTES = 32 << 20


class Cublas:
    """A handle of its own, with a workspace that stays. Raises BackendUnavailable where there is no cuBLAS."""

    def __init__(self, device: Device):
        try:
            self.functions = device.load_library("cublas")
        except (ImportError, RuntimeError, OSError) as error:
            why = str(error).splitlines()[0]
            raise BackendUnavailable(
                f"cuda: exact=False needs cuBLAS ({why}); the extras cuda12 and cuda13 bring it"
            ) from None
        self.workspace = device.empty(WORKSPACE_BYTES, "u1")
        self.handle, self.one, self.zero = ctypes.c_void_p(), ctypes.c_float(1), ctypes.c_float(0)
        self._call("cublasCreate_v2", ctypes.byref(self.handle))
        self._call("cublasSetStream_v2", self.handle, ctypes.c_void_p(device.queue.ptr))
        workspace = ctypes.c_void_p(self.workspace.data.ptr), ctypes.c_size_t(WORKSPACE_BYTES)
        self._call("cublasSetWorkspace_v2", self.handle, *workspace)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.functions, name)(*arguments)
        if status:
            raise RuntimeError(f"cuda: {name} failed with status {status}")

    def product(self, precision: str, a: Any, b: Any, out: Any, rows: int, width: int, columns: int) -> None:
        """out (rows, columns) = a (rows, width) @ b (width, columns), all rounded; cuBLAS sees it transposed."""
        kind, pointer = TYPES[precision], ctypes.c_void_p
        self._call(
            "cublasGemmEx", self.handle, PLAIN, PLAIN, columns, rows, width, ctypes.byref(self.one),
            pointer(b.data.ptr), kind, columns, pointer(a.data.ptr), kind, width, ctypes.byref(self.zero),
            pointer(out.data.ptr), kind, columns, SUMS[precision], DEFAULT,
        )  # fmt: skip
