"""Vocabularies, corpora and the trigram baseline."""

import hashlib
import os
import re
import sys
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventrnn.data import text as text_module
from eventrnn.data.text import Corpus, from_path, from_text, python_documentation, read_parts, read_stream
from eventrnn.data.trigram import TrigramModel
from eventrnn.data.vocabulary import REPLACEMENT, UNKNOWN_WORD, Vocabulary, read_vocabulary, words
from support.tolerance import U64, gamma

# --- vocabulary ---------------------------------------------------------------------------------------------


@given(st.text(min_size=1))
def test_characters_round_trip(text):
    vocabulary = Vocabulary.of(text)
    numbers = vocabulary.encode(text)
    assert numbers.dtype == np.int32 and len(numbers) == len(text)
    assert vocabulary.decode(numbers) == text
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


@given(st.lists(st.lists(st.sampled_from(["a", "b", "<unk>", "é", "N"])), min_size=1))
def test_words_round_trip(lines):
    text = "".join(" ".join(line) + "\n" for line in lines)
    vocabulary = Vocabulary.of(text, kind="word")
    numbers = vocabulary.encode(text)
    assert len(numbers) == sum(map(len, lines)) + len(lines)
    assert vocabulary.decode(numbers) == text
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_every_line_ends_with_a_word_of_its_own():
    assert words(" a  b \n\nc") == ["a", "b", "<eos>", "<eos>", "c", "<eos>"]
    assert words("c\n") == ["c", "<eos>"]
    assert words("\n") == ["<eos>"]
    assert words("") == []


def test_a_word_that_contains_the_end_of_line_is_a_word():
    vocabulary = Vocabulary.of("x<eos>y z\n", kind="word")
    assert vocabulary.decode(vocabulary.encode("z x<eos>y\n")) == "z x<eos>y\n"


def test_a_limited_vocabulary_keeps_the_most_frequent_words():
    vocabulary = Vocabulary.of("b b b c c a a d\n", kind="word", size=4)
    assert vocabulary.symbols == (UNKNOWN_WORD, "b", "a", "c")
    assert vocabulary.decode(vocabulary.encode("a d e\n")) == "a <unk> <unk> <unk>"
    assert Vocabulary.from_json(vocabulary.to_json()).encode("zebra").tolist() == [0, 0]
    assert Vocabulary.of("<unk> <unk> a\n", kind="word", size=9).symbols == (UNKNOWN_WORD, "<eos>", "a")


def test_unlimited_words_come_by_frequency_then_alphabet():
    assert Vocabulary.of("b a b c\n", kind="word").symbols == ("b", "<eos>", "a", "c")


def test_an_unknown_character_is_named_with_its_position():
    with pytest.raises(ValueError, match="unknown symbol 'é' at position 2; the vocabulary has 3 characters"):
        Vocabulary.of("abc").encode("abéa")


def test_an_unknown_word_is_named_with_its_place():
    with pytest.raises(ValueError, match="unknown symbol 'zebra' at word 3"):
        Vocabulary.of("a b\n", kind="word").encode("a b\nzebra b\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vocabulary(()), "need at least one"),
        (lambda: Vocabulary(("a", "a")), "no two the same"),
        (lambda: Vocabulary(("ab",)), "need single characters"),
        (lambda: Vocabulary(("a",), "letter"), "kind: got 'letter', need one of character, word"),
        (lambda: Vocabulary(("a",), "word", "b"), "vocabulary unknown: got 'b', need one of the 1 symbols"),
        (lambda: Vocabulary.of("abc", kind="word", size=1), "size: got 1, need a whole number >= 2"),
        (lambda: Vocabulary.of(""), "need at least one"),
        (lambda: Vocabulary.from_json("{"), "no vocabulary in JSON"),
        (lambda: Vocabulary.from_json("[]"), "no vocabulary in JSON"),
        (lambda: Vocabulary.from_json("[" * 100_000), "no vocabulary in JSON"),
        (lambda: Vocabulary.from_json('{"kind": "word"}'), "no vocabulary in JSON"),
        (lambda: Vocabulary(("a", "b")).decode([0, 2]), "got 2 at position 1; need 0..1"),
        (lambda: Vocabulary(("a", "b")).decode([-1]), "got -1 at position 0"),
        (lambda: Vocabulary(("a", "b")).decode([0.5]), "need whole numbers"),
    ],
)
def test_invalid_vocabularies_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_limited_vocabulary_of_characters_can_encode_every_text():
    vocabulary = Vocabulary.of("bbbccad", size=3)
    assert vocabulary.symbols == (REPLACEMENT, "b", "c") and vocabulary.unknown == REPLACEMENT
    assert vocabulary.decode(vocabulary.encode("abcé\U0001f600")) == f"{REPLACEMENT}bc{REPLACEMENT}{REPLACEMENT}"
    assert vocabulary.count_unknown("abcé\U0001f600") == 3
    assert Vocabulary.of("ab", size=9).symbols == (REPLACEMENT, "a", "b")
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


def test_a_symbol_can_be_chosen_for_all_others():
    vocabulary = replace(Vocabulary.of("ab ?"), unknown="?")
    assert vocabulary.decode(vocabulary.encode("abc")) == "ab?"
    assert vocabulary.count_unknown("abc") == 1 and vocabulary.count_unknown("ab?") == 0
    words_of = replace(Vocabulary.of("a b\n", kind="word"), unknown="b")
    assert words_of.decode(words_of.encode("a zebra\n")) == "a b\n"


def test_empty_text_is_valid():
    assert Vocabulary.of("abc").encode("").tolist() == []
    assert Vocabulary.of("abc").decode([]) == ""


@pytest.mark.parametrize(
    ("content", "symbols", "kind", "unknown"),
    [
        ("the\nfox\n<unk>\n", ("the", "fox", "<unk>"), "word", "<unk>"),
        ('["a", "\\n", "b"]', ("a", "\n", "b"), "character", None),
        ('{"b": 1, "\\ufffd": 2, "a": 0}', ("a", "b", "\ufffd"), "character", "\ufffd"),
        (Vocabulary(("a", "b"), "word", "b").to_json(), ("a", "b"), "word", "b"),
        ("[\na\n", ("[", "a"), "character", None),
    ],
)
def test_read_vocabulary_takes_lines_and_json(tmp_path, content, symbols, kind, unknown):
    (tmp_path / "v").write_text(content)
    assert read_vocabulary(tmp_path / "v") == Vocabulary(symbols, kind, unknown)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("v.txt", b"a\nb\na\n", "no two the same"),
        ("v.txt", b"a\n\nb\n", "symbol 1 is empty; where it is a line break, write the symbols as JSON"),
        ("v.txt", b"", "symbol 0 is empty"),
        ("v.txt", b"\xff", "not UTF-8"),
        ("v.json", b"a\nb", "no valid JSON"),
        ("v.json", b"7", "holds int"),
        ("v.json", b'{"a": 0, "b": 2}', "other values than 0, 1"),
        ("v.json", b"[1, 2]", "vocabulary symbol 0"),
        ("v.json", b'{"symbols": [], "kind": "word", "unknown": null}', "need at least one"),
    ],
)
def test_read_vocabulary_refuses_by_name(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^vocabulary: .*{re.escape(name)}: .*{re.escape(words)}"):
        read_vocabulary(tmp_path / name)


# --- Python's documentation ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documentation():
    return python_documentation()


def test_documentation_is_large_and_split_as_promised(documentation):
    train, valid, test = (len(part) for part in (documentation.train, documentation.valid, documentation.test))
    total = train + valid + test
    assert total > 300_000
    assert 20_000 <= test < 31_000
    assert total / 25 <= valid < total / 20 + 10_001
    assert train > total * 4 / 5


def test_documentation_is_the_same_every_time(documentation):
    again = python_documentation()
    assert again.vocabulary == documentation.vocabulary
    assert all(np.array_equal(getattr(again, p), getattr(documentation, p)) for p in ("train", "valid", "test"))


def test_no_paragraph_of_the_documentation_is_in_two_parts(documentation):
    def paragraphs(part):
        text = documentation.vocabulary.decode(part)
        return {" ".join(p.split()) for p in text.split("\n\n") if len(p) >= 60}

    train, valid, test = (paragraphs(p) for p in (documentation.train, documentation.valid, documentation.test))
    assert len(test) > 50
    assert not train & test and not train & valid and not valid & test


def test_every_character_of_the_documentation_was_trained_often(documentation):
    symbols = documentation.vocabulary.symbols
    counts = np.bincount(documentation.train, minlength=len(symbols))
    assert REPLACEMENT in symbols
    assert all(counts[k] >= 10 for k, symbol in enumerate(symbols) if symbol != REPLACEMENT)
    assert counts[symbols.index(REPLACEMENT)] > 0
    assert 80 < len(symbols) < 120


def test_documentation_of_a_larger_size(documentation):
    larger = python_documentation(rare=1, test_size=40_000)
    assert len(larger.test) >= 40_000
    assert len(larger.vocabulary) > len(documentation.vocabulary)


# --- files and folders --------------------------------------------------------------------------------------

LINES = "".join(f"line {k} of the text\n" for k in range(400))


def texts(corpus):
    return [corpus.vocabulary.decode(part) for part in (corpus.train, corpus.valid, corpus.test)]


@pytest.mark.parametrize("kind", ["character", "word"])
def test_a_file_is_split_at_line_ends_and_loses_nothing(tmp_path, kind):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode())
    parts = texts(from_path(path, kind=kind))
    assert "".join(parts) == LINES
    assert all(part.endswith("\n") for part in parts)
    first, second = len(parts[0]) / len(LINES), len(parts[0] + parts[1]) / len(LINES)
    line = 21 / len(LINES)
    assert 0.9 <= first <= 0.9 + line and 0.95 <= second <= 0.95 + line


def test_the_texts_of_a_folder_are_joined_in_order(tmp_path):
    for name, part in (("b.txt", LINES[4000:]), ("a.txt", LINES[:4000].removesuffix("\n")), ("c.md", "no")):
        (tmp_path / name).write_text(part)
    joined = LINES[:4000].removesuffix("\n") + "\n" + LINES[4000:]
    assert "".join(texts(from_path(tmp_path))) == joined


@pytest.mark.parametrize(
    "names",
    [
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("training.txt", "dev.txt", "test"),
    ],
)
def test_a_split_folder_is_taken_as_it_is(tmp_path, names):
    for name, part in zip(names, ("a b\nc\n", "b\n", "d a"), strict=True):
        (tmp_path / name).write_text(part)
    (tmp_path / "contest.txt").write_text("not a test")
    assert texts(from_path(tmp_path)) == ["a b\nc\n", "b\n", "d a"]
    assert texts(from_path(tmp_path, kind="word")) == ["a b\nc\n", "b\n", "d a\n"]
    limited = from_path(tmp_path, kind="word", size=4)
    assert limited.vocabulary.symbols == (UNKNOWN_WORD, "<eos>", "a", "b")
    assert texts(limited)[2] == "<unk> a\n"


def refused(path, message, **options):
    with pytest.raises(ValueError, match=message):
        from_path(path, **options)


def test_invalid_text_is_refused(tmp_path):
    refused(tmp_path / "none.txt", r"text: .*none\.txt: no such file")
    refused(tmp_path, "has no .*txt file")
    file = tmp_path / "book.txt"
    for blank in ("", " \n\n"):
        file.write_text(blank)
        refused(file, r"text: .*book\.txt is empty")
    file.write_bytes(b"gr\xfcn\n")
    refused(file, "not UTF-8, byte 0xfc at position 2")
    for short in ("one line only", "a\nb\n", "end" + "\n" * 99):
        file.write_text(short)
        refused(file, "too short to split into train, valid and test")
    refused(file, "kind: got 'letter'", kind="letter")
    file.write_text(LINES)
    refused(file, "size: got 1, need a whole number >= 2", size=1)


@pytest.mark.parametrize(
    ("text", "ends"),
    [
        (" " + " ".join(["anarchism", "originated"] * 200), " "),
        ("acgt" * 50, ("a", "c", "g", "t")),
        ("long line " * 50 + "\nend", " "),
    ],
)
def test_a_text_without_line_ends_is_split_at_spaces_or_characters(tmp_path, text, ends):
    path = tmp_path / "one-line"
    path.write_text(text)
    parts = read_parts(path)
    assert "".join(parts.values()) == text
    first, size = len(parts["train"]), len(text)
    second = first + len(parts["valid"])
    # The longest word has ten characters.
    assert 0 <= first - size * 90 // 100 <= 11 and 0 <= second - size * 95 // 100 <= 11
    assert parts["train"].endswith(ends) and parts["valid"].endswith(ends)
    assert texts(from_text(text)) == list(parts.values())


def test_a_device_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="text: /dev/full is a device"):
        from_path("/dev/full")


def test_a_pipe_is_read_to_its_end_once(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(LINES,))
    writer.start()
    assert read_stream(pipe) == LINES
    writer.join()
    assert read_stream(tmp_path) is None
    plain = tmp_path / "plain.txt"
    plain.write_text(LINES)
    assert read_stream(plain) is None


def test_a_split_folder_must_be_whole(tmp_path):
    for name in ("ptb.train.txt", "ptb.test.txt"):
        (tmp_path / name).write_text("a\n")
    refused(tmp_path, "but none named valid; need one each of train, valid, test")
    (tmp_path / "ptb.valid.txt").write_text("")
    refused(tmp_path, r"ptb\.valid\.txt is empty")
    (tmp_path / "ptb.valid.txt").write_text("a\n")
    (tmp_path / "old.test.txt").write_text("a\n")
    refused(tmp_path, "2 files named test")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server of this machine with a corpus named `fox`, and what it was asked for."""
    files = {"train": "a b c\n" * 9, "valid": "b c a\n" * 3, "test": "c a b\n" * 3}
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(files[self.path.split(".")[1]].encode())

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/fox"
    sums = {f"{address}.{part}.txt": hashlib.sha256(text.encode()).hexdigest() for part, text in files.items()}
    monkeypatch.setitem(text_module.NAMED, "fox", sums)
    monkeypatch.setenv("EVENTRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield files, asked
    server.shutdown()
    server.server_close()


def test_a_corpus_with_a_name_is_downloaded_once_and_held_against_its_checksum(served, monkeypatch):
    pytest.importorskip("pooch", reason="downloads need pooch, the data extra")
    files, asked = served
    for _ in range(2):
        assert text_module.read_parts("fox") == files and len(asked) == 3
    address = next(iter(text_module.NAMED["fox"]))
    monkeypatch.setitem(text_module.NAMED["fox"], address, "0" * 64)
    refused("fox", "fox cannot be downloaded from http://127.0.0.1")
    Path("fox").write_text("what lies here comes first\n" * 99)
    assert text_module.read_parts("fox")["test"].startswith("what lies here")


def test_without_pooch_a_corpus_with_a_name_is_refused(served, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    refused("fox", r"pip install 'eventrnn\[data\]'\); try again, or give --text a folder that has it")
    assert served[1] == []


def test_a_corpus_needs_all_parts():
    with pytest.raises(ValueError, match="text: the valid part is empty"):
        Corpus.of("a", "", "b")


@pytest.mark.data
@pytest.mark.skipif("EVENTRNN_PTB" not in os.environ, reason="EVENTRNN_PTB names no folder with the Penn Treebank text")
def test_penn_treebank():
    corpus = from_path(Path(os.environ["EVENTRNN_PTB"]), kind="word")
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [929_589, 73_760, 82_430]
    assert len(corpus.vocabulary) == 10_000


# --- trigram model ------------------------------------------------------------------------------------------


@st.composite
def trigram_cases(draw):
    size = draw(st.integers(1, 5))
    text = st.lists(st.integers(0, size - 1), min_size=3, max_size=40)
    return tuple(np.array(draw(text), np.int32) for _ in range(3)), size


@given(trigram_cases())
def test_trigram_probabilities_equal_the_definition(case):
    (train, heldout, text), size = case
    model = TrigramModel(train, heldout, size)
    runs = [Counter(tuple(train[k : k + n].tolist()) for k in range(len(train) - n + 1)) for n in (1, 2, 3)]
    before = [Counter(tuple(train[k : k + n].tolist()) for k in range(len(train) - n)) for n in (1, 2)]
    expected = []
    for t in range(1, len(text)):
        a, b, c = (None if t < 2 else int(text[t - 2])), int(text[t - 1]), int(text[t])
        pair, single = before[1][a, b], before[0][(b,)]
        bucket = 0 if single == 0 else 1 + pair.bit_length()
        by_model = np.array(
            [
                1 / size,
                runs[0][(c,)] / len(train),
                runs[1][b, c] / max(single, 1),
                runs[2][a, b, c] / max(pair, 1),
            ]
        )
        expected.append(model.weights[bucket] @ by_model)
    got = model.probabilities(text)
    # Four products and three additions, each side in its own order.
    assert (np.abs(got - expected) <= 2 * gamma(8, U64) * np.array(expected)).all()


@given(trigram_cases())
def test_trigram_probabilities_add_up_to_one(case):
    (train, heldout, _), size = case
    model = TrigramModel(train, heldout, size)
    for a in range(size):
        for b in range(size):
            total = sum(model.probabilities(np.array([a, b, c]))[1] for c in range(size))
            # Weights are quotients of sums; each probability has 4 terms, the total 4 * size.
            assert abs(total - 1) <= gamma(4 * size + 16, U64)


def test_trigram_learns_a_deterministic_text():
    # After two symbols the next is certain, after one it is not.
    text = np.tile(np.array([0, 0, 1, 1], np.int32), 500)
    model = TrigramModel(text, text, 2)
    assert model.bits_per_symbol(text) < 0.02
    noise = np.random.default_rng(0).integers(0, 2, 5000).astype(np.int32)
    assert model.bits_per_symbol(noise) > 1


def test_trigram_beats_lower_orders_on_the_documentation(documentation):
    size = len(documentation.vocabulary)
    model = TrigramModel(documentation.train, documentation.valid, size)
    share = np.bincount(documentation.train, minlength=size) / len(documentation.train)
    unigram = -np.log2(share[documentation.test]).mean()
    bits = model.bits_per_symbol(documentation.test)
    assert 2 < bits < 3 < unigram < np.log2(size)


@pytest.mark.parametrize("symbols", [np.array([0, 1]), np.array([0, 1, 5]), np.array([0, -1, 1])])
def test_trigram_refuses_texts_that_are_too_short(symbols):
    good = np.array([0, 1, 0])
    with pytest.raises(ValueError, match="train: got .* need at least 3 symbols"):
        TrigramModel(symbols, good, 2)
    with pytest.raises(ValueError, match="heldout: got .* need at least 3 symbols"):
        TrigramModel(good, symbols, 2)
    with pytest.raises(ValueError, match="need at least 2"):
        TrigramModel(good, good, 2).bits_per_symbol(np.array([1]))
