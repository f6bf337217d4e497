"""The folder of a run that a recipe describes, and the model file that the run writes.

The folder has `config.toml` (the recipe with every value written out), `log.jsonl` and the checkpoints of
`training.run`, and `out.sha256`, by which a run knows the model files that it may replace.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn import io
from eventrnn._checks import need_number, need_whole
from eventrnn._files import LOCK, file_sha256, printable, write_whole
from eventrnn.io.model_file import encoded
from eventrnn.network import Network
from eventrnn.training import parts
from eventrnn.training.recipes import toml_config
from eventrnn.training.recipes.toml_config import need_file_name
from eventrnn.training.run import CHECKPOINT, FILES, LOG

CONFIG = "config.toml"

# The copy of a text that can be read only once.
TEXT = "text.txt"

# The copy of the model that is fine-tuned.
GIVEN = "given.safetensors"

# The folder of the checkpoint in parts, in the folder of the run.
PARTS = "parts"

# The SHA-256 of the model files that the run may replace: what it wrote itself, and what it was told to overwrite.
OWN = "out.sha256"


@dataclass(frozen=True)
class RunSettings:
    """Settings that do not change the trained network.

    Attributes
    ----------
    out                : model file to write; a GRU or an LSTM may go without
    log_every          : updates per line of the log
    checkpoint_seconds : seconds between two checkpoints
    """

    out: str = ""
    log_every: int = 50
    checkpoint_seconds: float = 120.0

    def __post_init__(self):
        need_file_name("out", self.out)
        need_whole("log_every", self.log_every, at_least=1)
        if self.checkpoint_seconds != np.inf:
            need_number("checkpoint_seconds", self.checkpoint_seconds, at_least=0)


class NotBegun(KeyboardInterrupt):
    """The run was interrupted before its training, and has written nothing; a run in its folder is as it was."""


def run_table(folder: Path) -> dict[str, Any]:
    """The tables of the configuration in the folder of a run. Raises OSError and ValueError where it cannot be read."""
    return toml_config.read_toml((folder / CONFIG).read_text("utf-8"), folder / CONFIG)


def holds_fine_tuning(folder: Path) -> bool:
    """Whether the run in a folder is a fine-tuning, and not the training of a recipe."""
    return "task" in run_table(folder)


def split_run(folder: str | os.PathLike, megabytes: float) -> dict[str, Any]:
    """Write the newest checkpoint of a run in parts of at most so many million bytes, to its folder `parts`.

    That folder can be copied to another machine and resumed there as the run itself. The run may go on meanwhile.
    Returns the folder, the number of parts and their bytes. Raises ValueError for a size that is no positive number and
    for a folder without a checkpoint.
    """
    need_number("split", megabytes, above=0)
    source, target = Path(folder) / CHECKPOINT, Path(folder) / PARTS
    if not source.is_file():
        raise ValueError(f"split: {printable(folder)} holds no {CHECKPOINT}")
    count = parts.split_checkpoint(source, target, max(1, int(megabytes * 1e6)), beside=(CONFIG, LOG, TEXT, GIVEN))
    return {"folder": str(target), "parts": count, "bytes": parts.nbytes(target)}


def begin_run(folder: Path, *, overwrite: bool, text: str | None) -> str | None:
    """Make room for a new run in its locked folder, and keep a copy of a text that can be read only once.

    Returns the path of the copy, or None without a text. Raises ValueError for a folder that holds a run when
    `overwrite` is not set.
    """
    if overwrite:
        remove_run(folder)
    need_no_run(folder)
    if text is None:
        return None
    write_whole(folder / TEXT, text.encode(), overwrite=True)
    return str((folder / TEXT).absolute())


def write_config(folder: Path, recipe: Any) -> None:
    """Write the recipe of a run to its folder, with every value written out."""
    write_whole(folder / CONFIG, toml_config.to_toml(recipe).encode(), overwrite=True)


def remove_run(folder: str | os.PathLike) -> None:
    """Delete the files of a run from its folder. Other files are not touched."""
    parts.remove(Path(folder))
    for name in (CONFIG, OWN, GIVEN, *FILES):
        (Path(folder) / name).unlink(missing_ok=True)


def need_no_run(folder: Path) -> None:
    """Raise ValueError for a folder that holds a run."""
    if any((folder / name).exists() for name in (CONFIG, *FILES)):
        raise ValueError(
            f"run: {printable(folder)} holds a run; give --resume {printable(folder)}, another folder, or --force"
        )


def need_own_name(out: Path, folder: Path) -> None:
    """Refuse a model file that would be a file of the run itself."""
    if out.name in (CONFIG, OWN, TEXT, GIVEN, LOCK, *FILES) and out.absolute().parent.resolve() == folder.resolve():
        raise ValueError(f"out: {printable(out)} is the name of a file of the run itself; give another name")


def claim_out(out: Path, folder: Path, overwrite: bool) -> None:
    """Refuse a model file that the run may not replace, before the training. With `overwrite` it may from now on."""
    found = _digest(out)
    if found is None:
        return
    if overwrite:
        _allow(folder, out, _own(folder) | {found})
        return
    # Runs of earlier versions have no record; the file is compared with the network after the training.
    before = Path(run_table(folder)["run"]["out"])
    unrecorded = not (folder / OWN).exists() and before.resolve() == out.resolve()
    if found not in _own(folder) and not unrecorded:
        raise _foreign(out, folder)


def save_out(network: Network, out: Path, folder: Path) -> None:
    """Write the model file. Raises FileExistsError if a file is there that the run may not replace."""
    own = _own(folder) | {hashlib.sha256(encoded(network)).hexdigest()}
    # Before the file, so that a process that is killed between the two writes knows the file as its own.
    found = _digest(out)
    if found is not None and found not in own:
        raise _foreign(out, folder)
    _allow(folder, out, own)
    try:
        io.save(network, out, overwrite=found is not None)
    except FileExistsError:
        raise _foreign(out, folder) from None


def _own(folder: Path) -> set[str]:
    try:
        return {line.split(" ")[0] for line in (folder / OWN).read_text("ascii", "replace").splitlines()}
    except FileNotFoundError:
        return set()


def _allow(folder: Path, out: Path, digests: set[str]) -> None:
    text = "".join(f"{digest}  {printable(out.absolute())}\n" for digest in sorted(digests))
    write_whole(folder / OWN, text.encode(), overwrite=True)


def _digest(path: Path) -> str | None:
    """The SHA-256 of a file, in the notation of `sha256sum`; None where there is none."""
    try:
        return file_sha256(path)
    except FileNotFoundError:
        return None


def _foreign(out: Path, folder: Path) -> FileExistsError:
    file, run = printable(out), printable(folder)
    return FileExistsError(
        f"out: {file} exists and is not what the run in {run} wrote; it is left as it is. Give --resume {run} with "
        f"--out and another file, or with --out {file} --force to overwrite it"
    )
