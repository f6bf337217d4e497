"""Checkpoints: the state of a run in one file, from which the run continues bit for bit.

A checkpoint is a safetensors file with the arrays of the trainer. Its metadata hold the trainer's numbers, its identity
(what must be equal for the run to be continued) and a SHA-256 over both and all arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from eventrnn._files import write_whole
from eventrnn.training.trainer import Trainer

FORMAT = "eventrnn checkpoint"

VERSION = "1"


class CheckpointError(ValueError):
    """The file is missing, damaged, or belongs to another run; the message says which."""


def save_checkpoint(trainer: Trainer, path: str | os.PathLike, *, notes: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint atomically and flush it to disk. The previous checkpoint is kept as `previous-…` beside it.

    notes : further values to save, which JSON must be able to hold

    Raises `OSError` if the disk is full or not writable; both older files are then unchanged. Cost: two copies of the
    arrays in memory.
    """
    path = Path(path)
    arrays = {name: np.ascontiguousarray(array) for name, array in trainer.arrays().items()}
    record = {"numbers": trainer.numbers(), "identity": trainer.identity(), "notes": dict(notes or {})}
    text = json.dumps(record, sort_keys=True)
    metadata = {"format": FORMAT, "version": VERSION, "run": text, "sha256": _digest(arrays, text)}
    write_whole(path, safetensors.numpy.save(arrays, metadata), overwrite=True, keep=previous(path))


def load_checkpoint(trainer: Trainer, path: str | os.PathLike) -> dict[str, Any]:
    """Restore the state of a checkpoint in a trainer that is in its initial state. Returns the notes.

    Raises `CheckpointError` for a file that is missing, damaged or not a checkpoint, and for a run with another model,
    data or settings; the message names the differences. The trainer is then unchanged.
    """
    arrays, record = read_checkpoint(path)
    changed = differences(json.loads(json.dumps(trainer.identity())), record["identity"])
    if changed:
        raise CheckpointError(f"{path}: belongs to another run: {'; '.join(changed)}")
    trainer.restore(arrays, record["numbers"])
    return record["notes"]


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the record of a checkpoint: `numbers`, `identity` and `notes`. Raises `CheckpointError`."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT or metadata["version"] != VERSION:
            raise CheckpointError(f"{path}: is no checkpoint that this eventrnn reads")
        arrays = safetensors.numpy.load(raw)
        intact = _digest(arrays, metadata["run"]) == metadata["sha256"]
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged, or no checkpoint: {error}") from None
    if not intact:
        raise CheckpointError(f"{path}: damaged: the content does not match its checksum")
    return arrays, json.loads(metadata["run"])


def previous(path: Path) -> Path:
    """Path of the checkpoint before this one."""
    return path.with_name(f"previous-{path.name}")


def differences(now: Any, then: Any, name: str = "") -> list[str]:
    """The differences of two records, as lines such as `settings.batch: 32 in the checkpoint, 16 now`."""
    if isinstance(now, dict) and isinstance(then, dict):
        found = []
        for key in sorted(now.keys() | then.keys()):
            found += differences(now.get(key), then.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if now == then else [f"{name}: {_short(then)} in the checkpoint, {_short(now)} now"]


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _digest(arrays: Mapping[str, np.ndarray], text: str) -> str:
    total = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        total.update(f"{name}{arrays[name].dtype.str}{arrays[name].shape}".encode())
        total.update(np.ascontiguousarray(arrays[name]).data)
    return total.hexdigest()
