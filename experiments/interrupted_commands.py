"""Ctrl-C at any moment of a command, for `interrupts.py`: it must end, and what it wrote must be whole.

Nine of ten commands are forked from a process that has imported the package, which takes a hundredth of the time of a
new interpreter; the others are new interpreters, whose start is interrupted too.
"""

import faulthandler
import os
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Self

import numpy as np

from eventrnn.cli import main

COMMANDS = ("eventrnn train", "eventrnn prune", "eventrnn run")

# How a command may end: by itself, with the code of Ctrl-C, or by the signal where Python runs no line of the package.
ENDS = (0, 130, -signal.SIGINT)

WRITTEN_ANEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC

TRAIN = (
    *("--hidden", "24", "--embedding", "8", "--steps", "30", "--batch", "4", "--window", "16"),
    *("--set", "data.valid_batch=2", "--set", "run.checkpoint_seconds=0.01", "--set", "run.log_every=5"),
)

# Python prints it, and ends with code 1, where Ctrl-C meets its own start. No line of the package has run by then.
STARTING = "Fatal Python error: init_import_site"

# Characters of the messages of a command that a fault describes, the last ones.
SAID = 1500

PRUNE = ("--sparsity", "0.6", "--steps", "20", "--batch", "4", "--window", "16")


class Commands:
    """One command, its input, and what it writes when it is left alone."""

    def __init__(self, command: str, threads: int):
        self.command, self.threads, self.tried = command.removeprefix("eventrnn "), threads, 0

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self.base = Path(self._folder.name)
        letters = np.random.default_rng(0).choice(list("abcdef \n"), 4000)
        self.text, self.model = self.base / "text.txt", self.base / "model.safetensors"
        self.messages = self.base / "messages"
        self.text.write_text("".join(letters))
        # Whoever interrupts this process does not interrupt the commands that it has forked.
        self._handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._need_success(self._train(self.model))
        for folder in (self.base / "first", self.base / "second"):
            folder.mkdir()
            started = time.perf_counter()
            self._need_success(self._arguments(folder))
            self.seconds = time.perf_counter() - started
        self.whole = _content(self.base / "second" / "out")
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._handler)
        self._folder.cleanup()

    def interrupted(self, rng: np.random.Generator, patience: float) -> dict[str, Any]:
        """Interrupt the command once or twice, and let it go on afterwards where it can.

        Returns `within`, whether the command was broken off, and `fault`, empty if there was none.
        """
        self.tried += 1
        folder, new = self.base / f"try-{self.tried}", self.tried % 10 == 0
        folder.mkdir()
        process = (_start if new else _fork)(self._arguments(folder), self.messages)
        # A new interpreter imports for about a second.
        time.sleep(float(rng.uniform(0, 1.05 * self.seconds + 1.5 * new)))
        for _ in range(rng.integers(1, 3)):
            # A process that has ended keeps its number until it is waited for.
            os.kill(process, signal.SIGINT)
            time.sleep(float(rng.uniform(0, 0.02)))
        code = _end_of(process, patience)
        if code == 1 and new and STARTING in self._said():
            code = -signal.SIGINT
        fault = self._fault(folder, code)
        # A process that aborts, or crashes, says why there; so does one that went on with its run.
        if fault and (said := self._said()):
            fault += f": …{said[-SAID:]}" if len(said) > SAID else f": {said}"
        return {"within": code != 0, "fault": f"{fault} (a new interpreter)" if fault and new else fault}

    def _said(self) -> str:
        """The messages of the last command."""
        return self.messages.read_text("utf-8", "replace") if self.messages.exists() else ""

    def _fault(self, folder: Path, code: int | None) -> str:
        """What is wrong after a command that was interrupted, empty if nothing is."""
        if code not in ENDS:
            return "the command did not end" if code is None else f"exit code {code}"
        found = _content(folder / "out")
        if found not in (None, self.whole) or (code == 0 and found != self.whole):
            return f"exit code {code}, and the model file is another one or missing"
        if self.command == "run" or (found is not None and self.command == "prune"):
            return ""
        config = folder / "out.run" / "config.toml"
        again = ["train", "--resume", str(config.parent)] if config.exists() else self._arguments(folder)
        code = _end_of(_fork(again, self.messages), 10 * self.seconds + 30)
        if code != 0 or _content(folder / "out") != self.whole:
            return f"once more: exit code {code}, and the model file is another one or missing"
        left = [path.name for path in folder.rglob("*.tmp")]
        return f"left {', '.join(left)}" if left else ""

    def _arguments(self, folder: Path) -> list[str]:
        out = folder / "out"
        if self.command == "train":
            return self._train(out)
        if self.command == "prune":
            return ["prune", str(self.model), "--out", str(out), "--text", str(self.text), *PRUNE]
        return ["run", str(self.model), "--text", str(self.text), "--part", "all", "--threads", str(self.threads)]

    def _train(self, out: Path) -> list[str]:
        return ["train", "--out", str(out), "--text", str(self.text), "--threads", str(self.threads), *TRAIN]

    def _need_success(self, arguments: list[str]) -> None:
        code = _end_of(_fork(arguments, self.messages), 600)
        if code != 0:
            raise RuntimeError(f"eventrnn {' '.join(arguments)}: exit code {code}")


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _start(arguments: list[str], messages: Path) -> int:
    """The process of a command in a new interpreter. Its messages go to a file."""
    nothing = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_RDWR, 0) for stream in range(2)]
    nothing.append((os.POSIX_SPAWN_OPEN, 2, os.fspath(messages), WRITTEN_ANEW, 0o600))
    command = [sys.executable, "-m", "eventrnn", *arguments]
    # Otherwise it would ignore SIGINT as this process does.
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
    return os.posix_spawn(sys.executable, command, environment, file_actions=nothing, setsigdef=[signal.SIGINT])


def _fork(arguments: list[str], messages: Path) -> int:
    """The process of a command. Its messages go to a file."""
    with warnings.catch_warnings():
        # The child uses none of the threads of its parent.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 130
    # The second interrupt may come at any line from here on, also in the inner `finally`. It must not bring the child
    # back into the campaign of its parent.
    try:
        try:
            code = _ended(arguments, messages)
        finally:
            os._exit(code)
    finally:
        os._exit(code)


def _ended(arguments: list[str], messages: Path) -> int:
    """The exit code of a command, in the process of its own that runs it."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(2):
        os.dup2(nothing, stream)
    os.dup2(os.open(messages, WRITTEN_ANEW, 0o600), 2)
    # An abort or a crash leaves the line of every thread.
    faulthandler.enable()
    sys.argv = ["eventrnn", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        return 1
    return 0


def _end_of(process: int, patience: float) -> int | None:
    """The exit code of a process; None, and it is killed, where it does not end within so many seconds."""
    until = time.monotonic() + patience
    while True:
        pid, status = os.waitpid(process, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return None
        time.sleep(0.002)
