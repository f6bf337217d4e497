"""Texts that a model reads."""

from __future__ import annotations

import numpy as np

from eventrnn.cli.options import PARTS
from eventrnn.network import Network


def encoded(network: Network, text: str, part: str) -> np.ndarray:
    """A part of a text in the model's own symbols."""
    from eventrnn.text import SPLITS, Vocabulary, python_documentation, read_parts

    if part not in PARTS:
        raise ValueError(f"part: got {part!r}, need one of {', '.join(PARTS)}")
    if "vocabulary" not in network.metadata:
        raise ValueError(
            "model: has no vocabulary, so it cannot read text: it was not trained by eventrnn train; "
            "in Python, eventrnn.count(network, run) counts a run on any input"
        )
    vocabulary = Vocabulary.from_json(network.metadata["vocabulary"])
    if text == "builtin":
        corpus = python_documentation()
        parts = {name: corpus.vocabulary.decode(getattr(corpus, name)) for name in SPLITS}
    else:
        parts = read_parts(text)
    try:
        return vocabulary.encode("".join(parts.values()) if part == "all" else parts[part])
    except ValueError as error:
        raise ValueError(f"{error} (part {part} of {text})") from None
