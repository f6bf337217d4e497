"""The documents tell the truth: code runs, files and names exist, links resolve, commands and options exist.

Names are checked where they stand between backticks, in three forms:

- a path of a file, from the root of the project or from `eventrnn/`: `tests/conftest.py`, `cpu/engine.py`;
- a dotted name of the package: `eventrnn.weights.Dense`;
- names with their file: `Dense` and `CSR` in `weights/__init__.py`.
"""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer

from eventrnn import cells, cli

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]

FENCE = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
SUFFIXES = ("py", "md", "toml", "cff", "jsonl", "png")
PATH = re.compile(rf"[\w.-]+(/[\w.*-]+)*\.({'|'.join(SUFFIXES)})|([\w.-]+/)+")
DOTTED = re.compile(r"eventrnn(\.\w+)+")
# One or more names, then "in" or "of", then a file.
NAMED = re.compile(r"((?:`[A-Za-z_][\w.]*(?:\(\))?`(?:, and |, | and | or )?)+)\s(?:in|of)\s`([\w/]+\.py)`")

#: Files that a user or a run writes, and `kernels/`, which many folders contain.
EXAMPLES = re.compile(
    r"(^kernels/$|my_|runs/|recipe\.toml|config\.toml|log\.jsonl|starts\.jsonl|out/|build/|picture|docs/_build/|checkpoints/)"
)


def identify(path):
    return path.relative_to(ROOT).as_posix()


def text_of(page):
    return page.read_text(encoding="utf-8")


def prose_of(page):
    """The text without blocks of code; a line break within a paragraph is a space."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", FENCE.sub("", text_of(page)))


def located(path):
    """The file or folder of a path in the documents, or None."""
    for base in (ROOT, ROOT / "eventrnn"):
        if any(base.glob(path.rstrip("/"))):
            return next(base.glob(path.rstrip("/")))
    return None


def defined_in(path):
    """Every name that a file defines at module level, and the methods and fields of its classes as `Class.name`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        names |= names_of(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for child in node.body for name in names_of(child)}
    return names


def names_of(node):
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_files_exist(page):
    if page.name == "CHANGELOG.md":
        pytest.skip("the table of moved modules names files of past versions; its new names have a test of their own")
    paths = {span for span in SPAN.findall(prose_of(page)) if PATH.fullmatch(span) and not EXAMPLES.search(span)}
    assert sorted(path for path in paths if located(path) is None) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=identify)
def test_dotted_names_exist(page):
    missing = []
    for name in {span.removesuffix("()") for span in SPAN.findall(prose_of(page))}:
        if DOTTED.fullmatch(name) and not resolves(name):
            missing.append(name)
    assert sorted(missing) == []


def resolves(name):
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:k]))
        except ModuleNotFoundError:
            continue
        for part in parts[k:]:
            if not hasattr(found, part):
                return part in getattr(found, "__annotations__", {})
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=identify)
def test_names_are_in_the_files_that_are_said(page):
    missing = []
    for names, file in NAMED.findall(prose_of(page)):
        path = located(file)
        there = defined_in(path) if path else set()
        missing += [f"{name} in {file}" for name in SPAN.findall(names) if name.removesuffix("()") not in there]
    assert missing == []


def test_the_architecture_page_names_functions_with_their_files():
    assert len(NAMED.findall(prose_of(ROOT / "docs" / "architecture.md"))) >= 30


def test_new_names_of_moved_modules_exist():
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)`", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert len(rows) >= 30
    assert [new for _, new in rows if not resolves(new)] == []


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_relative_links_resolve(page):
    prose = FENCE.sub("", text_of(page))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path)
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(page):
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def blocks(page):
    return [body for language, body in FENCE.findall(text_of(page)) if language == "python"]


@pytest.mark.parametrize("page", [page for page in DOCS if blocks(page)], ids=identify)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run one after the other, with the names of those before. A block that begins with a comment
    `# not run: reason` is only compiled."""
    monkeypatch.chdir(tmp_path)
    names = {}
    for k, body in enumerate(blocks(page)):
        code = compile(body, f"{identify(page)}, block {k + 1}", "exec")
        if not body.startswith("# not run: "):
            exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_commands_exist(page):
    command = typer.main.get_command(cli.app)
    lines = [span for span in SPAN.findall(prose_of(page)) if span.startswith("eventrnn ")]
    for language, body in FENCE.findall(text_of(page)):
        if language in ("", "console", "bash"):
            joined = body.replace("\\\n", " ")
            lines += [line.strip() for line in re.findall(r"(?:^|&& )(eventrnn [^\n&|]*)", joined, re.MULTILINE)]
    for line in lines:
        words = shlex.split(line)[1:]
        node = command
        while words and hasattr(node, "commands") and words[0] in node.commands:
            name = words.pop(0)
            node = cli.command(name) if node is command else node.commands[name]
        own = node is command and (not words or words[0].startswith("--") or not words[0].islower())
        assert node is not command or own, f"no command: {line}"
        known = {name for parameter in node.params for name in (*parameter.opts, *parameter.secondary_opts)}
        options = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert options <= known | {"--help"}, line


def test_every_command_has_a_section():
    page = text_of(ROOT / "docs" / "cli.md")
    for name in cli.COMMANDS:
        assert re.search(rf"^## `eventrnn {name}", page, re.MULTILINE), name


def test_every_public_name_is_in_the_reference():
    listed = {
        name for page in (ROOT / "docs" / "api").glob("*.md") for name in re.findall(r"auto\w+:: (\w+)", text_of(page))
    }
    for package in ("eventrnn", "eventrnn/training", "eventrnn/pruning"):
        source = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
        # The modules of `eventrnn` that need no import of their own are pages, not names.
        public = set(re.findall(r"^ *from (?!eventrnn import ).*import (\w+) as \1$", source, re.MULTILINE))
        assert len(public) > 10, package
        assert public - listed == set(), package


def test_the_reference_lists_names_that_exist():
    for page in (ROOT / "docs" / "api").glob("*.md"):
        module = ""
        for line in text_of(page).splitlines():
            if line.startswith(".. currentmodule:: "):
                module = line.rpartition(" ")[2]
            elif match := re.match(r"\.\. auto\w+:: (\w+)", line):
                assert resolves(f"{module}.{match[1]}"), f"{identify(page)}: {module}.{match[1]}"


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for page in DOCS:
        for language, body in FENCE.findall(text_of(page)):
            if language == "{toctree}":
                entries = [line.strip() for line in body.splitlines() if line.strip() and not line.startswith(":")]
                listed |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    assert {page.resolve() for page in DOCS} - listed == {(ROOT / "docs" / "index.md").resolve()}


def test_figures_of_the_readme_are_measured_ones():
    """Each time in the table of the README occurs in the table of results."""
    readme = re.findall(r"^\| (?:CPU|H100|H200).*$", text_of(ROOT / "README.md"), re.MULTILINE)
    assert len(readme) == 7
    results = text_of(ROOT / "docs" / "results.md")
    for row in readme:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        # A row may have several cases: 0.98 / 1.36 µs.
        times = [re.search(r"((?:[\d.,]+ / )*[\d.,]+) (?:µs|ms)", cell)[1] for cell in cells[1:3]]
        for case in zip(*(figures.split(" / ") for figures in (*times, cells[3])), strict=True):
            pattern = r"\|.*\| {} \| {} \|(?:.*\|)? {} \|".format(*map(re.escape, case))
            assert re.search(pattern, results), (row, case)


def test_the_citation_file_is_whole():
    text = text_of(ROOT / "CITATION.cff")
    for key in ("cff-version", "message", "title", "authors", "version", "license", "references"):
        assert re.search(rf"^{key}:", text, re.MULTILINE), key
    version = re.search(r'^version = "(.+)"$', text_of(ROOT / "pyproject.toml"), re.MULTILINE)[1]
    assert re.search(rf'^version: "?{re.escape(version)}"?$', text, re.MULTILINE)


@pytest.mark.parametrize("kind", cells.SURROGATES)
def test_training_page_names_every_surrogate(kind):
    assert f"`{kind}`" in text_of(ROOT / "docs" / "training.md")
