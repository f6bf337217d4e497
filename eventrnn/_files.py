"""Files that are written whole or not at all, and survive a power cut once written; and where caches lie."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path:
    """Where the package keeps what can be made again; `EVENTRNN_CACHE` names another folder. It need not exist."""
    named = os.environ.get("EVENTRNN_CACHE")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eventrnn"


def write_whole(target: Path, raw: bytes, *, overwrite: bool = False, keep: Path | None = None) -> None:
    """Write a file under another name, onto the disk, then give it its name: a reader sees the old file or the new.

    overwrite : else a file that is there, or comes meanwhile, is left alone: `FileExistsError`
    keep      : a name for the file that was there; there is one under `target` at every moment

    Raises `OSError` of the disk, the old file as it was. A process killed half-way leaves a hidden `.tmp` file.
    """
    # In the same folder, or the rename would not be atomic.
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
            # Unlike a rename, a link does not replace a file that came meanwhile.
            os.link(temporary, target)
            temporary.unlink()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def clean(folder: Path) -> None:
    """Remove what killed writers left in a folder."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    # So that the rename itself survives a power cut; the file is complete either way, so a refusal is no failure.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
