"""One GPU per worker process, where a machine has several.

A process chooses its GPU before its first call of CUDA, by `CUDA_VISIBLE_DEVICES`. It holds a lock on the GPU until it
ends, so that the choice needs no agreement with other workers, whichever engine started them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from eventrnn._gpus import VARIABLE, visible_gpus

# The descriptor of the lock of the GPU of this process, which is held to its end; None before a choice.
_held: int | None = None


def claim_gpu() -> str | None:
    """Choose a GPU that no other worker of this machine uses, for the rest of this process, and return its name.

    With a single GPU, or none, nothing is chosen, and the name of the single one or None is returned. Where all of them
    are taken, the process shares one.
    """
    global _held
    names = visible_gpus()
    if len(names) < 2:
        return names[0] if names else None
    for name in names:
        if (lock := _locked(name)) is not None:
            _held, os.environ[VARIABLE] = lock, name
            return name
    os.environ[VARIABLE] = names[os.getpid() % len(names)]
    return os.environ[VARIABLE]


def _locked(name: str) -> int | None:
    """The descriptor of the lock of a GPU, or None where another process holds it."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"eventrnn-gpu-{os.getuid()}-{digest}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
