"""The common parts of the commands: options, records of options, parsing of blocks, checks of paths, texts."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
from functools import wraps
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import numpy as np
import typer

from eventrnn import io
from eventrnn._checks import need_choice
from eventrnn._files import name_beside, printable
from eventrnn.backend import BACKENDS
from eventrnn.cli.terminal import progress
from eventrnn.network import Network
from eventrnn.weights.storage import FEWEST_BITS, MOST_BITS

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]

Force = Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")]

Out = Annotated[Path, typer.Option("--out", "-o", help="Model file to write.")]

Model = Annotated[Path, typer.Argument(help="Model file.")]

GivenModel = Annotated[str | None, typer.Argument(metavar="MODEL", help="Model file; or give --model.")]

NamedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="FILE|NAME|ADDRESS",
        help="Model: a file, the name of a trained model ("
        + (", ".join(io.MODELS) or "this version has none")
        + "), or an address that ends in #sha256=CHECKSUM.",
    ),
]

Text = Annotated[
    str,
    typer.Option(
        "--text",
        help="Text: 'builtin' (Python's documentation), a text file, a folder of text files, or ptb (Penn Treebank).",
    ),
]

VocabularyOption = Annotated[
    str | None,
    typer.Option(
        "--vocabulary",
        metavar=f"FILE|{'|'.join(io.OWN_VOCABULARIES)}",
        help="Symbols that the model reads and predicts, in the order of its training: a file with one symbol per "
        "line, or JSON; or the characters or words of --text, characters by code point and words by falling frequency.",
    ),
]

# What a command says that reads a text, of a model that was imported without the symbols of its training.
NO_VOCABULARY = (
    "model: has no vocabulary, so it cannot read text; a model of symbols gets those of its training from eventrnn "
    "import --vocabulary or fine-tune --vocabulary, in Python from eventrnn.io.with_vocabulary; of other models, "
    "eventrnn.count(network, run) counts a run on any input"
)

PICTURES = (".png", ".pdf", ".svg")

PARTS = ("train", "valid", "test", "all")

Part = Annotated[str, typer.Option(help=f"Part of the text to read: {', '.join(PARTS)}.")]

Unknown = Annotated[
    str | None,
    typer.Option(
        help="Symbol of the model that stands for all symbols that its vocabulary lacks. [that of the vocabulary]"
    ),
]

Fold = Annotated[
    bool,
    typer.Option(
        "--fold",
        help="Fold the embedding and the input weights into one table first, for fewer operations: the same results.",
    ),
]

Backend = Annotated[str, typer.Option(help=f"Backend that runs the network: {', '.join(BACKENDS)}.")]

Threads = Annotated[int, typer.Option(help="Number of threads of the cpu backend.")]

Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]

Block = Annotated[str, typer.Option("--block", metavar="RxC", help="Size of a block: presynaptic x postsynaptic.")]

Steps = Annotated[int, typer.Option(help="Number of parameter updates.")]

Teacher = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|NAME|ADDRESS",
        help="Trained model with the same vocabulary, whose probabilities of the next symbol join the loss (knowledge "
        "distillation); needs --distillation. [none]",
    ),
]

Distillation = Annotated[
    float | None,
    typer.Option(help="Share of the teacher's probabilities in the loss, in (0, 1]; needs --teacher."),
]

TopK = Annotated[
    int | None,
    typer.Option("--top-k", help="Most probable symbols of the teacher that are kept per position, at most. [32]"),
]

Options = TypeVar("Options")


def takes(record: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Turn a function of one record into a command with one option per field of the record.

    Typer makes one option of each parameter of a command. The decorated function keeps its name and its docstring,
    which is the help text, and gets one keyword parameter per field, with the annotation and the default of the field.

    record : dataclass whose fields are annotated as parameters of a Typer command are: `Annotated[int, typer.Option()]`
    """
    types = get_type_hints(record, include_extras=True)

    def decorate(command: Callable[[Options], None]) -> Callable[..., None]:
        @wraps(command)
        def with_options(**values: Any) -> None:
            command(record(**values))

        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=types[field.name],
            )
            for field in fields(record)  # pyright: ignore[reportArgumentType]
        ]
        with_options.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportAttributeAccessIssue]
        with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_options

    return decorate


def parse_block(text: str) -> tuple[int, int]:
    """(1, 16) from "1x16"."""
    rows, cross, columns = text.lower().partition("x")
    if not (cross and rows.isdigit() and columns.isdigit() and int(rows) and int(columns)):
        raise ValueError(f"block: got {text!r}, need two sizes >= 1 such as 1x16")
    return int(rows), int(columns)


def untied(network: Network, untie: bool, source: Path) -> Network:
    """The network for --untie, or as it is. Raises ValueError where its read-out is not tied."""
    if untie and (network.readout is None or not network.readout.tied):
        raise ValueError(f"untie: the read-out of {source} is not tied; leave out --untie")
    return network.untied() if untie else network


def parse_bits(given: list[str], names: Sequence[str]) -> dict[str, int]:
    """Bits of the codes per name, from texts "7", for all of `names`, and "readout=6", for one; 8 for the others.

    Raises ValueError for another text, and for two texts of the same name or of none.
    """
    wrong = f"need a number from {FEWEST_BITS} to {MOST_BITS}, as 7 or MATRIX=7 with one of {', '.join(names)}"
    found = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        if (equals and name not in names) or not number.isdecimal() or not FEWEST_BITS <= int(number) <= MOST_BITS:
            raise ValueError(f"bits: got {text!r}, {wrong}")
        if name in found:
            of = f"of {name}" if equals else "for all"
            raise ValueError(f"bits: got {text!r}, but the bits {of} are {found[name]} already; give them once")
        found[name] = int(number)
    # The number without a name is that of all others, wherever it stands on the command line.
    return {name: found.get(name, found.get("", MOST_BITS)) for name in names}


def writable_file(path: Path, force: bool, option: str = "out") -> None:
    """Raise ValueError, before any work, where a file could not be written there at the end."""
    _need_legal(path, option)
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; give a file name")
    if path.exists() and not force:
        raise ValueError(f"{option}: {path} exists; use --force to overwrite it")
    _probe_folder(path.parent, option)


def save_model(network: Network, path: Path, force: bool, option: str = "out") -> None:
    """`io.save` at the end of the work. A file that appeared meanwhile is left, and the model written beside it.

    Raises ValueError that names the other file.
    """
    try:
        io.save(network, path, overwrite=force)
    except FileExistsError:
        beside = next(each for k in count(1) if not (each := name_beside(path, f"{k}-")).exists())
        io.save(network, beside)
        raise ValueError(
            f"{option}: {path} appeared meanwhile and is left as it is; the model is in {beside}"
        ) from None


def writable_picture(path: Path, force: bool, option: str = "out", formats: Sequence[str] = PICTURES) -> None:
    """As `writable_file`, for a picture of one of the formats. Raises ImportError where matplotlib is missing."""
    if path.suffix not in formats:
        *others, last = formats
        names = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{option}: got {path}, need a name that ends in {names}")
    writable_file(path, force, option)
    if find_spec("matplotlib") is None:
        raise ImportError(f"{option}: pictures need matplotlib: pip install 'eventrnn[plots]'")


def picture_text(name: object) -> str:
    """The name of a file as text of a picture: matplotlib reads no formula in it."""
    return printable(name).replace("$", r"\$")


def writable_folder(folder: Path, names: tuple[str, ...], force: bool, option: str = "out") -> None:
    """As `writable_file`, for a folder in which files of these names will be written."""
    _need_legal(folder, option)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option}: {folder} is not a folder")
    there = [name for name in names if (folder / name).exists()]
    if there and not force:
        raise ValueError(f"{option}: {folder} already holds {', '.join(there)}; use --force to overwrite")
    _probe_folder(folder if folder.exists() else folder.absolute().parent, option)


def _need_legal(path: Path, option: str) -> None:
    """Refuse a path that the system refuses, for example because its name is too long."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise ValueError(f"{option}: {path}: {error.strerror}; give another name") from None


def _probe_folder(folder: Path, option: str = "out") -> None:
    if not folder.is_dir():
        raise ValueError(f"{option}: there is no folder {folder}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option}: cannot write into {folder}: {error.strerror}") from None


def model_file(given: str | None, named: str | None) -> Path:
    """The model file that is given as an argument or by --model, downloaded first if it is elsewhere.

    Raises ValueError unless exactly one of the two is given, and `ModelFileError` for a file that cannot be had.
    """
    if (given is None) == (named is None):
        got = "both MODEL and --model" if given is not None else "none"
        raise ValueError(
            f"model: got {got}; give a model file, or --model with a file, a name ({', '.join(io.MODELS)}) or an "
            "address; eventrnn train writes a model file"
        )
    with progress() as report:
        return io.located_model(given or named or "", report)


def folded(network: Network, fold: bool) -> Network:
    """The network, folded where the option --fold was given. Raises as `fold` does."""
    if not fold:
        return network
    from eventrnn.folding import fold as fold_network

    return fold_network(network)


def load_symbols(network: Network, text: str, part: str, unknown: str | None = None) -> np.ndarray:
    """A part of a text as symbols of the model; see `load_parts`."""
    return load_parts(network, text, (part,), unknown)[part]


def load_parts(network: Network, text: str, wanted: Sequence[str], unknown: str | None = None) -> dict[str, np.ndarray]:
    """Parts of a text as symbols of the model, by name. The text is read once, so that it may be a pipe.

    unknown : the symbol of the model that stands for all that its vocabulary does not have; None for that of the
              vocabulary. How many these are is said on stderr

    Raises ValueError for an unknown part, without a vocabulary, and for symbols that the vocabulary does not have.
    """
    from eventrnn.data.text import encoded_parts
    from eventrnn.data.vocabulary import Vocabulary

    for part in wanted:
        need_choice("part", part, PARTS)
    if "vocabulary" not in network.metadata:
        raise ValueError(NO_VOCABULARY)
    vocabulary = Vocabulary.from_json(network.metadata["vocabulary"])
    if unknown is not None:
        if unknown not in vocabulary.symbols:
            raise ValueError(f"unknown: got {unknown!r}, need one of the {len(vocabulary)} symbols of the model")
        vocabulary = replace(vocabulary, unknown=unknown)
    found = encoded_parts(text, vocabulary, wanted)
    for part, (symbols, replaced) in found.items():
        if replaced:
            print(
                f"eventrnn: {replaced:,} of the {len(symbols):,} {vocabulary.kind}s in part {part} of {text} are "
                f"not in the vocabulary and are read as {vocabulary.unknown!r}",
                file=sys.stderr,
            )
    return {part: symbols for part, (symbols, _) in found.items()}
