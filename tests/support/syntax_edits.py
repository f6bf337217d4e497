"""Edits of source code by its syntax tree: of an expression in any spelling, or of a statement marked by a comment.

An edit of a marked statement does not name the variables around it where it can avoid it, so that it survives their
renaming. A template is an expression or some statements as text, in which names stand for parts of the code:
X the expression that changes, A0, A1, ... the arguments of X where it is a call, L and R the operands of X where it is
an operation, and whatever else the caller passes to `filled`.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable

#: An edit of one statement: what stands in its place.
Edit = Callable[[ast.stmt], list[ast.stmt]]

MARK = "# planted fault:"


class _Replacer(ast.NodeTransformer):
    """Replaces the nodes for which `chosen` holds. Counts them."""

    def __init__(self, chosen: Callable[[ast.AST], bool], new: Callable[[ast.AST], ast.AST]):
        self.chosen, self.new, self.count = chosen, new, 0

    def visit(self, node):
        if self.chosen(node):
            self.count += 1
            return self.new(node)
        return self.generic_visit(node)


def filled(template: str, parts: dict[str, ast.AST]) -> list[ast.stmt]:
    """Statements of a template, with the parts in place of their names."""
    names = _Replacer(
        lambda node: isinstance(node, ast.Name) and node.id in parts,
        # A new copy each time: a node may stand at one place of a tree only.
        lambda node: ast.parse(ast.unparse(parts[node.id]), mode="eval").body,
    )
    return [names.visit(statement) for statement in ast.parse(template).body]


def _expression(template: str, parts: dict[str, ast.AST]) -> ast.expr:
    (statement,) = filled(template, parts)
    assert isinstance(statement, ast.Expr)
    return statement.value


def _parts(node: ast.AST) -> dict[str, ast.AST]:
    parts = {"X": node}
    if isinstance(node, ast.Call):
        parts |= {f"A{k}": argument for k, argument in enumerate(node.args)}
    if isinstance(node, ast.BinOp):
        parts |= {"L": node.left, "R": node.right}
    return parts


def replaced(tree: ast.AST, edits: dict[str, str]) -> ast.AST:
    """The tree with expressions replaced, old text -> new text; every old one must be there, in whatever layout.

    ANY in an old text is any expression, and in the new text the expression that was found for it.
    """
    for old, new in edits.items():
        text = re.escape(ast.unparse(ast.parse(old, mode="eval")))
        pattern = re.compile(re.sub(r"\bANY\b", "(.+)", text))

        def found(node, pattern=pattern):
            return pattern.fullmatch(ast.unparse(node)) if isinstance(node, ast.expr) else None

        def made(node, found=found, new=new):
            text = re.sub(r"\bANY\b", f"({''.join(found(node).groups())})", new)
            return _with_context(ast.parse(text, mode="eval").body, node)

        replacer = _Replacer(lambda node, found=found: found(node) is not None, made)
        tree = replacer.visit(tree)
        assert replacer.count, f"no such expression to plant a fault in: {old}"
    return ast.fix_missing_locations(tree)


def _with_context(new: ast.expr, old: ast.AST) -> ast.expr:
    """Targets of an assignment stay targets."""
    if isinstance(getattr(old, "ctx", None), ast.Store):
        for node in (new, *getattr(new, "elts", [])):
            node.ctx = ast.Store()  # type: ignore[attr-defined]
    return new


# --- edits of a statement -----------------------------------------------------------------------------------


def call(name: str | None = None) -> Callable[[ast.stmt], ast.AST]:
    """The outermost call in a statement, or the first of a function or method of that name."""

    def find(statement):
        found = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
        named = [node for node in found if name in (None, getattr(node.func, "attr", getattr(node.func, "id", "")))]
        return named[0]

    return find


def argument(number: int) -> Callable[[ast.stmt], ast.AST]:
    """An argument of the outermost call."""
    return lambda statement: call()(statement).args[number]  # type: ignore[attr-defined]


def assigned(number: int | None = None) -> Callable[[ast.stmt], ast.AST]:
    """The value that a statement assigns, or one of several."""
    return lambda statement: statement.value if number is None else statement.value.elts[number]  # type: ignore


def subscript(array: str) -> Callable[[ast.stmt], ast.AST]:
    """The index into an array of that name."""

    def find(statement):
        found = [node for node in ast.walk(statement) if isinstance(node, ast.Subscript)]
        (index,) = (node.slice for node in found if getattr(node.value, "attr", getattr(node.value, "id", "")) == array)
        return index

    return find


def becoming(where: Callable[[ast.stmt], ast.AST], template: str) -> Edit:
    """Puts a template in the place of one expression of the statement."""

    def edit(statement):
        node = where(statement)
        replacer = _Replacer(lambda each: each is node, lambda each: _expression(template, _parts(each)))
        return [replacer.visit(statement)]

    return edit


def both(*edits: Edit) -> Edit:
    """One edit after the other; only the last may make several statements of one."""

    def edit(statement):
        for each in edits[:-1]:
            (statement,) = each(statement)
        return edits[-1](statement)

    return edit


def skipped_while(condition: str) -> Edit:
    """Runs the statement only where the condition is false."""
    return lambda statement: [ast.If(filled(f"not ({condition})", {})[0].value, [statement], [])]  # type: ignore


def followed_by(template: str, *parts: Callable[[ast.stmt], ast.AST]) -> Edit:
    """Puts statements after the statement; P0, P1, ... in the template are the parts that the functions find."""

    def edit(statement):
        found = {f"P{k}": part(statement) for k, part in enumerate(parts)}
        return [statement, *filled(template, found)]

    return edit


def switched(edit: Edit, switch: str) -> Edit:
    """The edit with the expression `switch` for ON."""
    parts = {"ON": ast.parse(switch, mode="eval").body}

    def edit_and_switch(statement):
        made = (ast.unparse(ast.fix_missing_locations(each)) for each in edit(statement))
        return [each for text in made for each in filled(text, parts)]

    return edit_and_switch


# --- marks --------------------------------------------------------------------------------------------------


def marks(source: str) -> dict[int, str]:
    """Line -> name of the fault that a comment marks there."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token for token in tokens if token.type == tokenize.COMMENT and token.string.startswith(MARK)]
    return {token.start[0]: token.string.removeprefix(MARK).strip() for token in comments}


def edited_at_marks(source: str, edits: dict[str, Edit]) -> ast.Module:
    """The tree of a file in which every marked statement is edited as the mark's name says.

    A mark stands on a line of its own before the statement, or at the end of one of the statement's lines.
    """
    tree = ast.parse(source)
    statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
    lines = source.splitlines()
    chosen: dict[ast.stmt, list[Edit]] = {}
    for line, name in marks(source).items():
        if lines[line - 1].lstrip().startswith("#"):
            line = min(node.lineno for node in statements if node.lineno > line)
        around = [node for node in statements if node.lineno <= line <= (node.end_lineno or 0)]
        # The innermost of the statements around the line.
        statement = min(around, key=lambda node: ((node.end_lineno or 0) - node.lineno, -node.col_offset))
        chosen.setdefault(statement, []).append(edits[name])

    class Editor(ast.NodeTransformer):
        def visit(self, node):
            node = self.generic_visit(node) if node not in chosen else node
            return both(*chosen[node])(node) if node in chosen else node

    return ast.fix_missing_locations(Editor().visit(tree))
