"""Vocabularies: the symbols of a text and their numbers, made of a text or read from a file of another library."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from eventrnn._checks import WHOLE, need_choice, need_text, need_whole, plain_array
from eventrnn._files import is_endless, printable

KINDS = ("character", "word")

END_OF_LINE = "<eos>"

UNKNOWN_WORD = "<unk>"

# The symbol for all characters that a vocabulary does not have, as `<unk>` is for words.
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Vocabulary:
    """The symbols of a text and their numbers.

    Words are separated by white space; the word `<eos>` ends every line.

    Attributes
    ----------
    symbols : text of symbol 0, 1, …; all different
    kind    : "character" or "word"
    unknown : the symbol for all characters or words that are not in `symbols`; None if these are an error

    Raises ValueError for symbols that are not different, for symbols of several characters with kind "character", and
    for an unknown symbol that is not in `symbols`.
    """

    symbols: tuple[str, ...]
    kind: str = "character"
    unknown: str | None = None

    def __post_init__(self):
        if not isinstance(self.symbols, Iterable):
            raise TypeError(f"vocabulary symbols: got {self.symbols!r}, need several texts: ('a', 'b')")
        object.__setattr__(self, "symbols", tuple(self.symbols))
        need_choice("vocabulary kind", self.kind, KINDS)
        for k, symbol in enumerate(self.symbols):
            need_text(f"vocabulary symbol {k}", symbol)
        if not self.symbols or len(set(self.symbols)) != len(self.symbols):
            raise ValueError(f"vocabulary symbols: got {len(self.symbols)}, need at least one, and no two the same")
        if self.kind == "character" and any(len(symbol) != 1 for symbol in self.symbols):
            raise ValueError("vocabulary symbols: need single characters; pass kind='word' for words")
        if self.unknown is not None and self.unknown not in self.symbols:
            raise ValueError(f"vocabulary unknown: got {self.unknown!r}, need one of the {len(self.symbols)} symbols")

    @classmethod
    def of(cls, text: str, *, kind: str = "character", size: int | None = None) -> Vocabulary:
        """The vocabulary of a text: characters by code point, words by falling frequency, then alphabetically.

        size : number of symbols to keep, >= 2: the most frequent ones, and one for all others, `<unk>` for words and
               U+FFFD for characters. Such a vocabulary can encode every text. None keeps all and has no such symbol

        Raises ValueError for a size below 2.
        """
        need_text("text", text)
        need_choice("vocabulary kind", kind, KINDS)
        if size is not None:
            need_whole("vocabulary size", size, at_least=2)
        if kind == "character" and size is None:
            return cls(tuple(sorted(set(text))), kind)
        counts = Counter(text if kind == "character" else words(text))
        ranked = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))
        if size is None:
            return cls(tuple(ranked), kind)
        unknown = REPLACEMENT if kind == "character" else UNKNOWN_WORD
        kept = [symbol for symbol in ranked if symbol != unknown][: size - 1]
        return cls((unknown, *(sorted(kept) if kind == "character" else kept)), kind, unknown)

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(self, text: str) -> np.ndarray:
        """The symbols of a text, (n,) int32. Cost: O(length of the text).

        Raises `ValueError` with the first unknown symbol and its position, if `unknown` is None.
        """
        numbers = self._found(text)
        missing = numbers < 0
        if missing.any():
            if self.unknown is None:
                k = int(missing.argmax())
                token, place = (text[k], "position") if self.kind == "character" else (words(text)[k], "word")
                raise ValueError(
                    f"text: unknown symbol {token!r} at {place} {k}; the vocabulary has {len(self)} {self.kind}s and "
                    "none for others: remove it, name one that stands for all others (Vocabulary.unknown, --unknown), "
                    "or train with a limited vocabulary, which has one"
                )
            numbers[missing] = self._numbers[self.unknown]
        return numbers

    def count_unknown(self, text: str) -> int:
        """How many characters or words of a text are not among the symbols."""
        return int((self._found(text) < 0).sum())

    def _found(self, text: str) -> np.ndarray:
        """The number of every character or word of a text, (n,) int32; -1 where it is not among the symbols."""
        need_text("text", text)
        if self.kind == "word":
            tokens = words(text)
            return np.fromiter((self._numbers.get(token, -1) for token in tokens), np.int32, len(tokens))
        # A table of all code points: a text of 100 million characters takes a second.
        table = np.full(sys.maxunicode + 1, -1, np.int32)
        table[[ord(symbol) for symbol in self.symbols]] = np.arange(len(self))
        return table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]

    def decode(self, numbers: np.ndarray | Sequence[int]) -> str:
        """The text of symbols (n,), with one space between words and a line break for each `<eos>`.

        Raises ValueError for symbols outside the vocabulary.
        """
        array = plain_array("symbols", numbers)
        if array.ndim != 1 or (array.size and array.dtype.kind not in WHOLE):
            raise ValueError(f"symbols: got {array.dtype} {array.shape}, need whole numbers (n,)")
        if array.size and not (0 <= array.min() and array.max() < len(self)):
            k = int(np.argmax((array < 0) | (array >= len(self))))
            raise ValueError(f"symbols: got {array[k]} at position {k}; need 0..{len(self) - 1}")
        tokens = [self.symbols[number] for number in array.tolist()]
        if self.kind == "character":
            return "".join(tokens)
        return "".join(
            "\n" if token == END_OF_LINE else token if k == 0 or tokens[k - 1] == END_OF_LINE else " " + token
            for k, token in enumerate(tokens)
        )

    def to_json(self) -> str:
        """The vocabulary as one line of JSON, for `Network.metadata`."""
        return json.dumps({"kind": self.kind, "symbols": self.symbols, "unknown": self.unknown})

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """The vocabulary from the text of `to_json`. Raises `ValueError` for other text."""
        try:
            record = json.loads(text)
            return cls(tuple(record["symbols"]), record["kind"], record["unknown"])
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"vocabulary: this is no vocabulary in JSON: {error!r}") from error

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {symbol: number for number, symbol in enumerate(self.symbols)}


def words(text: str) -> list[str]:
    """The words of a text, with `<eos>` at the end of every line; blank lines and the last line included."""
    lines = need_text("text", text).removesuffix("\n").split("\n") if text != "" else []
    return [word for line in lines for word in (*line.split(), END_OF_LINE)]


def read_vocabulary(path: str | Path) -> Vocabulary:
    """The vocabulary of a file: JSON, or one symbol per line in the order of their numbers.

    JSON is a list of the symbols, an object that maps every symbol to its number 0, 1, …, or the text of
    `Vocabulary.to_json`. The kind is "character" where every symbol is a single character. `<unk>` or U+FFFD is then
    the symbol for all others, where the file has it. Characters that include a line break need JSON.

    Raises ValueError, which begins with `vocabulary`, for a file that is missing or holds something else.
    """
    name = printable(path)
    try:
        if is_endless(path):
            raise ValueError(f"vocabulary: {name} is a device; need a file")
        text = Path(path).read_text(encoding="utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ValueError(f"vocabulary: {name}: {error.strerror}; give a file of symbols") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"vocabulary: {name}: not UTF-8 at byte {error.start}; need text, or JSON") from None
    symbols = text.removesuffix("\n").split("\n")
    named_json = Path(path).suffix.lower() == ".json"
    if named_json or text.lstrip()[:1] in ("[", "{"):
        try:
            symbols = json.loads(text)
        except (ValueError, RecursionError) as error:
            # The first of many lines may be a bracket.
            if named_json:
                raise ValueError(f"vocabulary: {name}: no valid JSON: {error}") from None
    try:
        if isinstance(symbols, dict) and isinstance(symbols.get("symbols"), list):
            return Vocabulary.from_json(text)
        return _of_symbols(symbols)
    except (ValueError, TypeError) as error:
        raise ValueError(f"vocabulary: {name}: {error}") from None


def _of_symbols(symbols: object) -> Vocabulary:
    if isinstance(symbols, dict):
        numbers = list(symbols.values())
        if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
            raise ValueError("maps symbols to other values than 0, 1, …; need every number once")
        symbols = sorted(symbols, key=symbols.__getitem__)
    if not isinstance(symbols, list):
        raise ValueError(f"holds {type(symbols).__name__}; need a list of symbols, or an object of symbols and numbers")
    if "" in symbols:
        raise ValueError(f"symbol {symbols.index('')} is empty; where it is a line break, write the symbols as JSON")
    kind = "character" if all(isinstance(each, str) and len(each) == 1 for each in symbols) else "word"
    unknown = REPLACEMENT if kind == "character" else UNKNOWN_WORD
    return Vocabulary(tuple(symbols), kind, unknown if unknown in symbols else None)
