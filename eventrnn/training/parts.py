"""A run in parts: its newest checkpoint cut into small files, for moving it to another machine.

`split_checkpoint` writes a folder with the parts, other files of the run such as its log, and `parts.json` with
the size and SHA-256 of every part. `training.run` goes on from such a folder as from that of the run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eventrnn._checks import need_whole
from eventrnn._files import printable, write_whole
from eventrnn.training.checkpoint import UnreadableCheckpoint

FORMAT, VERSION = "eventrnn parts", 1

INDEX, PART = "parts.json", "checkpoint-{:04}.part"


def split_checkpoint(
    checkpoint: str | os.PathLike, folder: str | os.PathLike, size: int, *, beside: Iterable[str] = ()
) -> int:
    """Write a checkpoint in parts of at most `size` bytes. Returns the number of parts.

    checkpoint : file of the run. It may be replaced meanwhile by a training that goes on
    folder     : folder for the parts, created. Parts of an earlier call are replaced
    beside     : names of further files of the run, copied as they are where they exist

    Raises ValueError for a size below 1, and OSError for a file that cannot be read or written. Memory: one part.
    """
    need_whole("size", size, at_least=1)
    checkpoint, folder = Path(checkpoint), Path(folder)
    with open(checkpoint, "rb") as source:
        folder.mkdir(parents=True, exist_ok=True)
        remove(folder)
        for name in beside:
            if (checkpoint.parent / name).exists():
                write_whole(folder / name, (checkpoint.parent / name).read_bytes(), overwrite=True)
        parts = []
        while raw := source.read(size):
            name = PART.format(len(parts))
            write_whole(folder / name, raw, overwrite=True)
            parts.append({"name": name, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()})
    index = {"format": FORMAT, "version": VERSION, "parts": parts}
    # Last, so that a folder with an index has all parts.
    write_whole(folder / INDEX, json.dumps(index, indent=1).encode(), overwrite=True)
    return len(parts)


def join(folder: Path, checkpoint: Path) -> bool:
    """Write the checkpoint from the parts in a folder, if it holds any. Returns whether it does.

    Raises `UnreadableCheckpoint` with the name of a part that is missing or damaged; nothing is then written.
    """
    if not (folder / INDEX).exists():
        return False
    write_whole(checkpoint, b"".join(_contents(folder)), overwrite=True)
    return True


def nbytes(folder: Path) -> int:
    """Bytes of all parts in a folder."""
    return sum(part["bytes"] for part in _listed(folder / INDEX))


def remove(folder: Path) -> None:
    """Remove the parts of a folder and their index."""
    (folder / INDEX).unlink(missing_ok=True)
    for file in folder.glob(PART.replace("{:04}", "[0-9]*")):
        file.unlink()


def _contents(folder: Path) -> Iterator[bytes]:
    for part in _listed(folder / INDEX):
        path = folder / part["name"]
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise UnreadableCheckpoint(f"{printable(path)}: cannot be read: {error.strerror}") from None
        if len(raw) != part["bytes"] or hashlib.sha256(raw).hexdigest() != part["sha256"]:
            raise UnreadableCheckpoint(f"{printable(path)}: damaged: it is not the part that {INDEX} names")
        yield raw


def _listed(index: Path) -> list[dict[str, Any]]:
    """The parts that an index names."""
    try:
        found = json.loads(index.read_bytes())
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            raise ValueError
        parts = [{"name": p["name"], "bytes": p["bytes"], "sha256": p["sha256"]} for p in found["parts"]]
        # A name with a folder in it would read elsewhere.
        if [part["name"] for part in parts] != [PART.format(k) for k in range(len(parts))]:
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UnreadableCheckpoint(f"{printable(index)}: damaged, or no index of parts") from None
    return parts
