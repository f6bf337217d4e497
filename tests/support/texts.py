"""A short text for models of characters, and a network that reads it."""

import numpy as np

from eventrnn import Network
from eventrnn.data import Vocabulary

#: 60 lines of all letters of the alphabet: 2,640 characters, 28 kinds of them.
TEXT = "the quick brown fox jumps over the lazy dog\n" * 60


def reader_of_text() -> Network:
    """A random network of 24 units that predicts the next character; its vocabulary is in its metadata."""
    vocabulary = Vocabulary.of(TEXT)
    return Network.random(
        [24],
        symbols=len(vocabulary),
        embedding=8,
        readout=len(vocabulary),
        rng=np.random.default_rng(0),
        metadata={"vocabulary": vocabulary.to_json()},
    )
