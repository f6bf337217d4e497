"""Data: texts for language models, with vocabularies, fixed splits and a trigram baseline; recordings of events."""

from __future__ import annotations

from eventrnn.data.recording_files import RecordingError as RecordingError
from eventrnn.data.recording_files import from_nir as from_nir
from eventrnn.data.recording_files import read_heidelberg as read_heidelberg
from eventrnn.data.recording_files import read_recording as read_recording
from eventrnn.data.recording_files import to_nir as to_nir
from eventrnn.data.recordings import Recording as Recording
from eventrnn.data.recordings import bin_events as bin_events
from eventrnn.data.recordings import padded_counts as padded_counts
from eventrnn.data.synthetic import chirps as chirps
from eventrnn.data.synthetic import moving_bars as moving_bars
from eventrnn.data.text import Corpus as Corpus
from eventrnn.data.text import from_path as from_path
from eventrnn.data.text import from_text as from_text
from eventrnn.data.text import located as located
from eventrnn.data.text import python_documentation as python_documentation
from eventrnn.data.text import read_parts as read_parts
from eventrnn.data.trigram import TrigramModel as TrigramModel
from eventrnn.data.vocabulary import Vocabulary as Vocabulary
from eventrnn.data.vocabulary import read_vocabulary as read_vocabulary
from eventrnn.data.vocabulary import words as words
