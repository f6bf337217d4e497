"""The `eventrnn` command: each command is a few lines over the library.

Results go to stdout, as tables, or as one JSON object and nothing else with --json; progress goes to stderr. Bad input
ends with exit code 2 and one line, before any work.
"""

from __future__ import annotations

import os
import sys
import warnings
from io import StringIO
from typing import Any

import typer

from eventrnn._files import printable
from eventrnn.backend import BackendUnavailable
from eventrnn.cli.bench import bench_app
from eventrnn.cli.commands import app
from eventrnn.cli.plot import plot
from eventrnn.cli.prune import prune
from eventrnn.weights import NotAMatrix

app.command()(prune)

app.command()(plot)

app.add_typer(bench_app, name="bench")

# The error of Typer for options it cannot parse. Its module changed between releases; that of its subclass did not.
UsageError: Any = typer.BadParameter.__mro__[1]


def main() -> None:
    """Entry point. Errors of use become one line and exit code 2, a failed check one line and exit code 1."""
    for name in ("stdout", "stderr"):
        # A stream that was closed before the start is None.
        if getattr(sys, name) is None:
            setattr(sys, name, StringIO())
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            code = app(sys.argv[1:] or ["--help"], standalone_mode=False)
            # A full disk or a closed pipe behind stdout is an error of the command, not of the interpreter's end.
            sys.stdout.flush()
            raise SystemExit(code)
    except UsageError as error:
        raise _ended("error", error.format_message(), 2) from None
    except (ValueError, OSError, FloatingPointError, ImportError, MemoryError, BackendUnavailable, NotAMatrix) as error:
        raise _ended("error", str(error) or "out of memory; use smaller sizes", 2) from None
    except RuntimeError as error:
        raise _ended("failed", str(error), 1) from None
    except (KeyboardInterrupt, typer.Abort):
        print("eventrnn: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _warn(message: Any, *_: Any, **__: Any) -> None:
    """A warning of the library as one line, without the place in the code."""
    print(f"eventrnn: warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def _ended(how: str, words: str, code: int) -> SystemExit:
    """The end of the program with one line on stderr, in which text from a file cannot steer the terminal."""
    try:
        sys.stdout.flush()
    except OSError:
        # What could not be written is given up; the interpreter would try it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"eventrnn: {how}: {printable(' '.join(words.split()))}", file=sys.stderr)
    return SystemExit(code)
