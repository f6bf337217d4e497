"""Data sets for language models: vocabularies, corpora with fixed splits, and a trigram baseline."""

from __future__ import annotations

from eventrnn.data.text import Corpus as Corpus
from eventrnn.data.text import Vocabulary as Vocabulary
from eventrnn.data.text import from_path as from_path
from eventrnn.data.text import from_text as from_text
from eventrnn.data.text import located as located
from eventrnn.data.text import python_documentation as python_documentation
from eventrnn.data.text import read_parts as read_parts
from eventrnn.data.text import words as words
from eventrnn.data.trigram import TrigramModel as TrigramModel
