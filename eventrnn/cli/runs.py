"""What the commands of training runs share: the files of a run, and what is said where it stops."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from eventrnn._files import FULL, printable
from eventrnn.backend import BackendUnavailable

RUN_FILES = ("config.toml", "log.jsonl", "checkpoint.safetensors", "previous-checkpoint.safetensors", "parts.json")


@contextmanager
def continuing(command: str, folder: Path, resumed: bool) -> Iterator[None]:
    """Say with every end of a run in the folder but its own how the run is continued.

    command : the name of the command
    resumed : whether the run was there before
    """
    from eventrnn.training.recipes.run_folder import NotBegun
    from eventrnn.training.run import CHECKPOINT

    words = f"continue with: eventrnn {command} --resume {folder}"
    try:
        yield
    except KeyboardInterrupt as stop:
        # Click would replace the interrupt by one without a message.
        said = str(stop) or f"stopped at once; the last checkpoint is in {folder}"
        if resumed or not isinstance(stop, NotBegun):
            said = f"{said}; {words}"
        print(printable(f"eventrnn: {said}"), file=sys.stderr)
        raise typer.Exit(130) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise OSError(error.errno, f"{error.strerror}; make room, then {words}", error.filename) from None
    except (MemoryError, RuntimeError) as error:
        # Of a GPU, for example. The errors of CUDA cannot be made with other words.
        if isinstance(error, BackendUnavailable) or not (folder / CHECKPOINT).exists():
            raise
        kind = MemoryError if isinstance(error, MemoryError) else RuntimeError
        raise kind(f"{str(error) or 'out of memory'}; the last checkpoint is in {folder}; {words}") from None
