"""What every script of this folder is on a command line: its docstring is its help, and its errors are one line."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from eventrnn.cli import run_program


class Program(typer.Typer):
    """A command line that ends like `eventrnn`: bad input with exit code 2 and one line, a failed check with 1."""

    def run(self) -> None:
        """Run the arguments of this process and end it."""
        run_program(self, Path(sys.argv[0]).name, sys.argv[1:])


def commands(docstring: str | None) -> Program:
    """A program of several commands, whose help is the docstring."""
    return Program(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=_as_help(docstring)
    )


def command(main: Callable[..., Any], docstring: str | None) -> Program:
    """A program of one command, whose help is the docstring."""
    program = commands(docstring)
    program.command(help=_as_help(docstring))(main)
    return program


def _as_help(docstring: str | None) -> str:
    """A docstring in which the paragraphs of examples and lists keep their lines.

    Click joins the lines of a paragraph, unless a line with the backspace character stands before it. An example is
    indented by four columns. An item of a list begins with a hyphen.
    """
    paragraphs = (docstring or "").split("\n\n")
    return "\n\n".join(f"\b\n{each}" if each.lstrip("\n").startswith(("    ", "- ")) else each for each in paragraphs)
