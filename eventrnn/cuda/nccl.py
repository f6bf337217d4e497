"""Copies between the GPUs of several processes by NCCL: sends and receives on a stream, which graphs can capture.

Only point-to-point copies are used. What is added, and in which order, is decided by kernels of this package, so that
sums do not depend on the algorithm that NCCL would choose for the machine.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Any

from eventrnn.backend import BackendUnavailable

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device

# ncclUint8; lengths are counted in bytes.
BYTES = 1

# NCCL_UNIQUE_ID_BYTES.
IDENTIFIER_BYTES = 128

# The remedy that error messages name.
INSTALL = "pip install 'eventrnn[nccl13]' or, beside the extra cuda12, 'eventrnn[nccl12]'"


class _Identifier(ctypes.Structure):
    """ncclUniqueId, which is passed by value."""

    _fields_ = (("internal", ctypes.c_char * IDENTIFIER_BYTES),)


def _library(device: Device) -> ctypes.CDLL:
    """NCCL. Raises BackendUnavailable where it cannot be loaded."""
    # Multicast over NVLink serves collective operations, of which there are none here; NCCL would reserve it all the
    # same.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    try:
        found = device.load_library("nccl")
    except (ImportError, RuntimeError, OSError) as error:
        try:
            # One of the system, or that another package has loaded.
            found = ctypes.CDLL("libnccl.so.2")
        except OSError:
            why = str(error).splitlines()[0]
            raise BackendUnavailable(f"cuda: several devices need NCCL ({why}); {INSTALL}; or use devices=1") from None
    found.ncclGetErrorString.restype = ctypes.c_char_p
    return found


def _check(library: ctypes.CDLL, name: str, status: int) -> None:
    if status:
        why = library.ncclGetErrorString(status).decode(errors="replace")
        raise RuntimeError(f"cuda: {name} failed with status {status} ({why}); NCCL_DEBUG=INFO says more")


def new_identifier(device: Device) -> bytes:
    """What names a new group of processes; one of them makes it, and the others are told. Raises BackendUnavailable."""
    library, made = _library(device), _Identifier()
    _check(library, "ncclGetUniqueId", library.ncclGetUniqueId(ctypes.byref(made)))
    return bytes(made)


class Nccl:
    """The member `rank` of a group of `ranks` processes, each with a GPU of its own.

    The constructor returns once all members have called it. Raises BackendUnavailable without NCCL.
    """

    def __init__(self, device: Device, identifier: bytes, rank: int, ranks: int):
        self.shared_library, self._group = _library(device), ctypes.c_void_p()
        named = _Identifier.from_buffer_copy(identifier)
        self._call("ncclCommInitRank", ctypes.byref(self._group), ctypes.c_int(ranks), named, ctypes.c_int(rank))

    def _call(self, name: str, *arguments: Any) -> None:
        _check(self.shared_library, name, getattr(self.shared_library, name)(*arguments))

    def copy(self, queue: Any, sends: list[tuple[int, int, int]], receives: list[tuple[int, int, int]]) -> None:
        """Put copies on a stream, which take place side by side.

        sends, receives : of each copy the address, the number of bytes and the other rank. What a rank sends to
                          another one is received in the order in which it is sent
        """
        stream = ctypes.c_void_p(queue.ptr)
        self._call("ncclGroupStart")
        try:
            for name, copies in (("ncclSend", sends), ("ncclRecv", receives)):
                for address, nbytes, peer in copies:
                    pointer, size = ctypes.c_void_p(address), ctypes.c_size_t(nbytes)
                    self._call(name, pointer, size, BYTES, ctypes.c_int(peer), self._group, stream)
        finally:
            self._call("ncclGroupEnd")

    def abort(self) -> None:
        """End all copies, also those that the GPU waits for, and leave the group. What they should have written is not
        defined. Another thread may call it."""
        group, self._group = self._group, ctypes.c_void_p()
        if group:
            self.shared_library.ncclCommAbort(group)
