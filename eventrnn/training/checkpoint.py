"""Checkpoints: the state of a run in one file, from which the run continues bit for bit.

A checkpoint is a safetensors file with the arrays of the trainer. Its metadata hold the trainer's numbers, its identity
(what must be equal for the run to be continued) and a SHA-256 over both and all arrays.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy

from eventrnn._files import name_beside, printable, write_whole
from eventrnn.training.settings import Settings
from eventrnn.training.trainer import Progress

FORMAT = "eventrnn checkpoint"

VERSION = "1"

# Settings that the first version did not have. It drew noise in another way, so that its runs cannot go on.
SINCE_NOISE_BY_PLACE = ("backend", "precision")


class Resumable(Protocol):
    """What a run in a folder needs of a `Trainer`, or of what consists of several. See there what the methods do."""

    @property
    def steps_done(self) -> int: ...

    def __iter__(self) -> Iterator[Progress]: ...

    def identity(self) -> dict[str, Any]: ...

    def arrays(self) -> dict[str, np.ndarray]: ...

    def numbers(self) -> dict[str, Any]: ...

    def restore(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> None: ...


class CheckpointError(ValueError):
    """The file is missing, damaged, or belongs to another run; the message says which."""


class UnreadableCheckpoint(CheckpointError):
    """The file is missing, damaged, or of another version: nothing in it can be used."""


def save_checkpoint(trainer: Resumable, path: str | os.PathLike, *, notes: Mapping[str, Any] | None = None) -> None:
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


def load_checkpoint(trainer: Resumable, path: str | os.PathLike) -> dict[str, Any]:
    """Restore the state of a checkpoint in a trainer that is in its initial state. Returns the notes.

    Raises `UnreadableCheckpoint` for a file that is missing, damaged or not a checkpoint, and `CheckpointError` for a
    run with another model, data or settings; the message names the differences. The trainer is then unchanged.

    The number of threads may differ. The run then goes on, and a warning says that products through BLAS may be rounded
    differently. Those are the products of the read-out, and further ones unless `Settings.backward` is "sparse". So may
    the number of devices, on which sums over the batch are rounded differently.
    """
    arrays, record = read_checkpoint(path)
    now, then = json.loads(json.dumps(trainer.identity())), record["identity"]
    defaults = json.loads(json.dumps(asdict(Settings())))
    _add_defaults(_settings(then), {name: defaults[name] for name in defaults if name not in SINCE_NOISE_BY_PLACE})
    threads_now, threads_then = (_settings(identity).pop("threads", None) for identity in (now, then))
    devices_now, devices_then = (_settings(identity).pop("devices", None) for identity in (now, then))
    changed = differences(now, then)
    if changed:
        raise CheckpointError(printable(f"{path}: belongs to another run: {'; '.join(changed)}"))
    try:
        trainer.restore(arrays, record["numbers"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnreadableCheckpoint(printable(f"{path}: holds no state of this run: {error}")) from None
    if threads_now != threads_then:
        warnings.warn(
            f"threads: {printable(threads_then)} in the checkpoint, {threads_now} now: the run goes on, but products "
            'through BLAS (of the read-out, and others unless backward="sparse") may be rounded differently',
            stacklevel=2,
        )
    if devices_now != devices_then:
        warnings.warn(
            f"devices: {printable(devices_then)} in the checkpoint, {devices_now} now: the run goes on, but sums over "
            "the batch are rounded differently",
            stacklevel=2,
        )
    return record["notes"]


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the record of a checkpoint: `numbers`, `identity` and `notes`. Raises `UnreadableCheckpoint`."""
    try:
        arrays, record = _decoded(_read(Path(path)))
    except UnreadableCheckpoint as error:
        raise UnreadableCheckpoint(f"{printable(path)}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        raise UnreadableCheckpoint(f"{printable(path)}: damaged, or no checkpoint: {printable(error)}") from None
    return arrays, record


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UnreadableCheckpoint("cannot be read: not a regular file")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableCheckpoint(f"cannot be read: {error.strerror}") from None


def _decoded(raw: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    if (metadata["format"], metadata["version"]) != (FORMAT, VERSION):
        found = printable(f"{metadata['format']} {metadata['version']}", 60)
        raise UnreadableCheckpoint(f"damaged, or no checkpoint that this eventrnn reads: {found}")
    arrays = safetensors.numpy.load(raw)
    if _digest(arrays, metadata["run"]) != metadata["sha256"]:
        raise UnreadableCheckpoint("damaged: the content does not match its checksum")
    record = json.loads(metadata["run"])
    for part in ("numbers", "identity", "notes"):
        if not isinstance(record[part], dict):
            raise UnreadableCheckpoint(f"holds no {part}")
    return arrays, record


def _settings(identity: Mapping[str, Any]) -> dict[str, Any]:
    settings = identity.get("settings")
    return settings if isinstance(settings, dict) else {}


def _add_defaults(settings: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Add settings that the version that wrote a checkpoint did not have, whose defaults do what it did."""
    for name, value in defaults.items():
        if isinstance(value, dict) and isinstance(settings.get(name), dict):
            _add_defaults(settings[name], value)
        else:
            settings.setdefault(name, value)


def previous(path: Path) -> Path:
    """Path of the checkpoint before this one."""
    return name_beside(path, "previous-")


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
