"""The `eventrnn` command: each command is a few lines over the library.

Results go to stdout, as tables, or as one JSON object and nothing else with --json; progress goes to stderr. Bad input
ends with exit code 2 and one line, before any work.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from importlib import import_module
from io import StringIO
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from eventrnn import __version__
from eventrnn._files import FULL, full_disk, printable

# The name of a command, its module and its function there, and what the list of commands says of it, in the order of a
# first use. A module is imported when its command is called: most take Numba with them, and a list needs none of it.
COMMANDS = {
    "demo": ("commands", "demo", "Train, prune, run and count an example: two to three minutes."),
    "train": ("train", "train", "Train a network on a text."),
    "sweep": ("sweep", "sweep", "Train many networks: a grid or a search over settings."),
    "prune": ("prune", "prune", "Remove weights, blocks or N:M groups, at once or in training."),
    "run": ("commands", "run", "Read a text event by event: bits, activity, operations."),
    "count": ("count", "count", "Count every operation and audit the counts."),
    "plot": ("plot", "plot", "Draw masks, events, operations or learning curves."),
    "report": ("report", "report", "Write a training run as one HTML page."),
    "import": ("imports", "import_command", "Take a GRU or LSTM of PyTorch, Keras, ONNX or EvNN."),
    "fine-tune": ("finetune", "fine_tune", "Make an EGRU of a wanted activity of a trained GRU."),
    "export": ("imports", "export_command", "Write a model as a file of PyTorch, Keras or ONNX."),
    "convert": ("commands", "convert_command", "Change the weight format or storage type of a model."),
    "info": ("commands", "info", "Show what is installed, or what a model file holds."),
    "bench": ("bench", "bench_app", "Measure speed beside baselines, all in one run."),
}

HELP = ["-h", "--help"]

# Lines after \b keep their breaks.
STORY = """Simulate, prune, train and count event-based GRUs.

\b
First:   eventrnn demo
Train:   eventrnn train --out my.safetensors --text my_text.txt
Sweep:   eventrnn sweep my_sweep.toml --out my_sweep
Prune:   eventrnn prune my.safetensors --out small.safetensors --sparsity 0.9 --steps 500
Use:     eventrnn run small.safetensors --text my_text.txt
Count:   eventrnn count small.safetensors --text my_text.txt
Report:  eventrnn report my.safetensors.run
Speed:   eventrnn bench inference

Without a text, commands read the documentation that Python carries. A trained word model is at hand as --model ptb.
`eventrnn COMMAND --help` lists the options of a command; --json makes its output one line for a script.
"""


def command(name: str) -> Any:
    """The command of this name with its options, or the group of `bench`."""
    module, attribute, line = COMMANDS[name]
    found = getattr(import_module(f"eventrnn.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = typer.Typer(rich_markup_mode=None, add_completion=False)
    alone.command(name=name, short_help=line)(found)
    return typer.main.get_command(alone)


class Commands(TyperGroup):
    """The group of all commands, which knows their names and lines, and imports one when it is called."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.commands.update({name: TyperCommand(name, short_help=line) for name, (_, _, line) in COMMANDS.items()})

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The name, the command and the arguments that are left."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, command(name) if name in COMMANDS else found, rest


app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"eventrnn {__version__}")
        raise typer.Exit


@app.callback(help=STORY)
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """What can stand before the name of a command."""


# The error of Typer for options it cannot parse. Its module changed between releases; that of its subclass did not.
UsageError: Any = typer.BadParameter.__mro__[1]


def main() -> None:
    """Entry point of `eventrnn`."""
    run_program(app, "eventrnn", sys.argv[1:] or ["--help"])


def run_program(program: typer.Typer, name: str, arguments: list[str]) -> NoReturn:
    """Run a command line and end the process: errors of use become one line and exit code 2, a failed check one line
    and exit code 1.

    name : what the program is called in its messages
    """
    for stream in ("stdout", "stderr"):
        # A stream that was closed before the start is None.
        if getattr(sys, stream) is None:
            setattr(sys, stream, StringIO())
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_warn, name)
            code = program(arguments, prog_name=name, standalone_mode=False)
            # A full disk or a closed pipe behind stdout is an error of the command, not of the interpreter's end.
            sys.stdout.flush()
            raise SystemExit(code)
    except UsageError as error:
        help_of = f" ({error.ctx.command_path} --help lists what it takes)" if error.ctx else ""
        raise _ended(f"{name}: error", f"{error.format_message()}{help_of}", 2) from None
    except OSError as error:
        raise _ended(f"{name}: error", full_disk(error) if error.errno in FULL else str(error), 2) from None
    except (ValueError, FloatingPointError, ImportError, MemoryError) as error:
        raise _ended(f"{name}: error", str(error) or "out of memory; use smaller sizes", 2) from None
    except (RuntimeError, TypeError) as error:
        from eventrnn.backend import BackendUnavailable
        from eventrnn.weights import NotAMatrix

        if isinstance(error, BackendUnavailable | NotAMatrix):
            raise _ended(f"{name}: error", str(error), 2) from None
        if isinstance(error, TypeError):
            raise
        raise _ended(f"{name}: failed", str(error), 1) from None
    except (KeyboardInterrupt, typer.Abort):
        print(f"{name}: stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _warn(name: str, message: Any, *_: Any, **__: Any) -> None:
    """A warning of the library as one line, without the place in the code."""
    print(f"{name}: warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def _ended(how: str, words: str, code: int) -> SystemExit:
    """The end of the program with one line on stderr, in which text from a file cannot steer the terminal."""
    try:
        sys.stdout.flush()
    except OSError:
        # What could not be written is given up; the interpreter would try it again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"{how}: {printable(' '.join(words.split()))}", file=sys.stderr)
    return SystemExit(code)
