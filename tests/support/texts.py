"""A short text for models of characters."""

#: 60 lines of all letters of the alphabet: 2,640 characters, 28 kinds of them.
TEXT = "the quick brown fox jumps over the lazy dog\n" * 60
