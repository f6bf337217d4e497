"""The symbols of a language model that another library trained: its file holds weights only."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from eventrnn._checks import need_kind
from eventrnn.data.text import from_path, from_text, python_documentation
from eventrnn.data.vocabulary import Vocabulary, read_vocabulary
from eventrnn.network import Network

#: In place of a file: the vocabulary that this library makes of a text -> its kind.
OWN_VOCABULARIES = {"characters": "character", "words": "word"}


def with_vocabulary(network: Network, vocabulary: Vocabulary) -> Network:
    """The network with the symbols that it reads and predicts, so that it can read texts.

    vocabulary : symbol k is that of row k of the embedding and of output k. A network without an embedding reads
                 symbols as vectors of zeros and a one, and gets the identity matrix as its embedding

    Raises ValueError for another number of symbols than the network has, and for a network without a read-out.
    """
    need_kind("network", network, Network, "a Network")
    need_kind("vocabulary", vocabulary, Vocabulary, "a Vocabulary")
    if network.readout is None:
        raise ValueError(
            "vocabulary: the network has no read-out, so it predicts no symbols; import it with its read-out"
        )
    read = network.layers[0].inputs if network.symbols is None else network.symbols
    predicted = network.readout.weights.shape[1]
    if not read == predicted == len(vocabulary):
        what = "inputs (it has no embedding)" if network.embedding is None else "rows of its embedding"
        raise ValueError(
            f"vocabulary: got {len(vocabulary)} symbols for a network with {read} {what} and {predicted} outputs; need "
            "as many of each, the symbols with which it was trained"
        )
    below = np.eye(read, dtype=np.float32) if network.symbols is None else network.embedding
    metadata = {**network.metadata, "vocabulary": vocabulary.to_json()}
    return replace(network, embedding=below, metadata=metadata)


def vocabulary_of(given: str, text: str | None = None, content: str | None = None) -> Vocabulary:
    """The vocabulary of a file, or for "characters" and "words" that which this library makes of a text.

    text    : "builtin", or a path that `data.read_parts` takes; only for a vocabulary of a text
    content : the content of `text`, where it has been read already

    Raises ValueError as `read_vocabulary` and `data.from_path` do, and for a text that is missing or not asked for.
    """
    if given not in OWN_VOCABULARIES:
        return read_vocabulary(given)
    if text is None:
        raise ValueError(f"vocabulary: got {given!r}, the {given} of a text; give --text too")
    kind = OWN_VOCABULARIES[given]
    if text == "builtin":
        if kind == "word":
            raise ValueError("vocabulary: got 'words', but the built-in text is read by characters; give another text")
        return python_documentation().vocabulary
    corpus = from_path(text, kind=kind) if content is None else from_text(content, kind=kind)
    return corpus.vocabulary
