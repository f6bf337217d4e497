"""What every script of this folder is on a command line: its docstring is its help."""

from collections.abc import Callable
from typing import Any

import typer


def commands(docstring: str | None) -> typer.Typer:
    """A program of several commands, whose help is the docstring."""
    return typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, help=_as_help(docstring)
    )


def command(main: Callable[..., Any], docstring: str | None) -> typer.Typer:
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
