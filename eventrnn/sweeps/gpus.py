"""One GPU per worker process, where a machine has several.

A process chooses its GPU before its first call of CUDA, by `CUDA_VISIBLE_DEVICES`. It holds a lock until it ends, which
counts as its use of the GPU, so that the choice needs no agreement with other workers, whichever engine started them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eventrnn._gpus import VARIABLE, visible_gpus

# The descriptor of the lock of this process, which is held to its end; None before a choice.
_held: int | None = None


def claim_gpu() -> str | None:
    """Choose the GPU that fewest workers of this machine use, for the rest of this process, and return its name.

    With a single GPU, or none, nothing is chosen, and the name of the single one or None is returned. Workers of a
    driver that was killed count until they end, so that all GPUs may be in use when a sweep goes on.
    """
    global _held
    names = visible_gpus()
    if len(names) < 2:
        return names[0] if names else None
    with _choosing():
        name = min(names, key=_users)
        _held, _ = tempfile.mkstemp(".lock", _prefix(name))
        fcntl.flock(_held, fcntl.LOCK_EX)
    os.environ[VARIABLE] = name
    return name


def _prefix(name: str) -> str:
    """What the names of the lock files of a GPU begin with; the process of each is the one that holds its lock."""
    return f"eventrnn-gpu-{os.getuid()}-{hashlib.sha256(name.encode()).hexdigest()[:16]}-"


@contextmanager
def _choosing() -> Iterator[None]:
    """Within the context no other process chooses."""
    with open(Path(tempfile.gettempdir()) / f"eventrnn-gpus-{os.getuid()}.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _users(name: str) -> int:
    """How many processes hold a lock of a GPU. Files of processes that have ended are removed."""
    users = 0
    for path in Path(tempfile.gettempdir()).glob(f"{_prefix(name)}*.lock"):
        with suppress(FileNotFoundError), open(path, "r+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                users += 1
            else:
                path.unlink()
    return users
