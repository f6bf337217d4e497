"""Data sets: text, and the trigram baseline."""
