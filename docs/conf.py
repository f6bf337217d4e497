"""Sphinx configuration: MyST pages, and API pages made from the docstrings.

Build with `sphinx-build -W --keep-going -b html docs docs/_build`.
"""

from __future__ import annotations

import importlib.util
import re

import eventrnn

project = "eventrnn"
author = "the eventrnn authors"
project_copyright = "the eventrnn authors"
version = release = eventrnn.__version__

# The first reads MyST pages, and runs those that are notebooks.
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

# A tutorial that fails, or takes longer than this many seconds for a cell, fails the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
# Without PyTorch, the tutorial that needs it is shown without its output.
nb_execution_excludepatterns = [] if importlib.util.find_spec("torch") else ["tutorials/from_pytorch_and_back.md"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "show-inheritance": True}
python_maximum_signature_line_length = 100
# Annotations name private helpers and NumPy types that have no page here.
nitpicky = False

# The page of `eventrnn.torch` is made without PyTorch, too.
autodoc_mock_imports = [] if importlib.util.find_spec("torch") else ["torch"]

html_theme = "pydata_sphinx_theme"
html_title = "eventrnn"
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False}

# --- docstrings ---------------------------------------------------------------------------------------------
#
# The docstrings of this package are plain text: code stands between single backticks, a section is a title
# underlined with hyphens, and an entry of a section is `name : text`, continued by indented lines. The functions
# below write that as reStructuredText.

_ENTRY = re.compile(r"(?P<name>\*{0,2}\w[\w, *]*?)\s*: (?P<text>.*)")
_CODE = re.compile(r"(`[^`]+`)")
_EMPHASIS = re.compile(r"(?<![\w*])(\*[^\s*](?:[^*]*[^\s*])?\*)(?![\w*])")


def _prose(text: str) -> str:
    """One line of prose: code becomes a literal, and signs with a meaning in reStructuredText are escaped."""
    parts = []
    for k, part in enumerate(_CODE.split(text)):
        if k % 2:
            parts.append(f"`{part}`")
            continue
        pieces = _EMPHASIS.split(part)
        parts.append("".join(p if j % 2 else re.sub(r"([*_|\\])", r"\\\1", p) for j, p in enumerate(pieces)))
    return "".join(parts)


def _joined_code(lines: list[str]) -> list[str]:
    """Lines joined where a code span between single backticks goes on in the next line of the same paragraph."""
    joined: list[str] = []
    for line in lines:
        if joined and joined[-1].count("`") % 2 and line.strip():
            joined[-1] = f"{joined[-1]} {line.strip()}"
        else:
            joined.append(line)
    return joined


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def to_restructured_text(lines: list[str]) -> list[str]:
    """A docstring of this package as reStructuredText."""
    lines = _joined_code(lines)
    out: list[str] = []
    k, in_section, in_literal, in_example = 0, False, False, False
    while k < len(lines):
        line = lines[k]
        if k + 1 < len(lines) and line.strip() and re.fullmatch(r"-{3,}", lines[k + 1].strip()):
            out += ["", f".. rubric:: {line.strip()}", ""]
            k, in_section, in_literal = k + 2, True, False
            continue
        if not line.strip():
            out.append("")
            in_example = False
        elif line.lstrip().startswith(">>>") or in_example or (in_literal and _indent(line)):
            # The output of an example stands below it, up to the next empty line.
            in_example = in_example or line.lstrip().startswith(">>>")
            if not in_literal:
                out += ["", ".. code-block:: python", ""]
                in_literal = True
            out.append(f"    {line}")
        elif in_section and not _indent(line):
            entry = _ENTRY.fullmatch(line.rstrip())
            if entry:
                out.append(f"* ``{entry['name'].strip()}``: {_prose(entry['text'])}")
            else:
                in_section = False
                out += ["", _prose(line)]
        elif in_section:
            out.append(f"  {_prose(line.strip())}")
        elif _indent(line) and (k == 0 or not lines[k - 1].strip()):
            # An indented block after an empty line is a formula or a table.
            out += ["", "::", "", f"    {line}"]
            in_literal = True
        else:
            in_literal = False
            out.append(_prose(line.strip()))
        k += 1
    return out


def _process_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    lines[:] = to_restructured_text(lines)


def _process_signature(app, what, name, obj, options, signature, returned):
    """A default that a dataclass makes anew, shown as `...`: Sphinx cannot parse `<factory>`."""
    return (signature.replace("<factory>", "...") if signature else signature), returned


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", _process_signature)
    app.connect("autodoc-process-docstring", _process_docstring)
