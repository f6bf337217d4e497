"""Atomic, durable file writes, and the cache folder of the package."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """Folder for files that can be made again.

    The environment variable `EVENTRNN_CACHE` overrides it. It may not exist. Raises OSError where there is no home.
    """
    if named := os.environ.get("EVENTRNN_CACHE"):
        return Path(named)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "eventrnn"
    try:
        return Path.home() / ".cache" / "eventrnn"
    except RuntimeError:
        raise OSError("there is no home folder; set EVENTRNN_CACHE to a folder that can be written") from None


def write_whole(target: Path, raw: bytes, *, overwrite: bool = False, keep: Path | None = None) -> None:
    """Write a file atomically: under a temporary name, flushed to disk, then renamed.

    A reader sees the old file or the new one.

    overwrite : replace an existing file; otherwise raise `FileExistsError`, also for a file that appears meanwhile
    keep      : path under which the existing file is kept; a file exists under `target` at every moment

    Raises `OSError` of the disk; the old file is then unchanged. A process that is killed meanwhile leaves a hidden
    `.tmp` file.
    """
    # The temporary file is in the same folder, because a rename is atomic only within a file system.
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and target.exists():
            second = temporary.with_suffix(".kept.tmp")
            os.link(target, second)
            os.replace(second, keep)
        if overwrite:
            os.replace(temporary, target)
        else:
            # Unlike a rename, a link fails if a file with that name has appeared meanwhile.
            os.link(temporary, target)
            temporary.unlink()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def clean(folder: Path) -> None:
    """Remove the temporary files that killed processes left in a folder."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself durable. Some file systems refuse it; the file is complete all the same.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
