"""An interpolated trigram model: a baseline for language models that needs no network."""

from __future__ import annotations

import numpy as np

from eventrnn._checks import WHOLE, need_whole, number_array


class TrigramModel:
    """Interpolation of a uniform, a unigram, a bigram and a trigram model (Jelinek and Mercer 1980).

    The four weights depend on the count of the two preceding symbols in the training text, in buckets of powers of two
    (Chen and Goodman 1999, section 2.3), and are fitted by expectation maximisation on held-out text. A model whose
    context does not occur in the training text has weight 0, so that probabilities add up to 1.

    Parameters
    ----------
    train   : (n,) symbols to count
    heldout : (m,) symbols of another text, on which the weights are fitted
    size    : number of symbols in the vocabulary

    Raises ValueError for texts of less than three symbols and for symbols outside the vocabulary. Cost: sorting n
    numbers, and 50 passes over m x 4 numbers.
    """

    ROUNDS, BUCKETS = 50, 13

    def __init__(self, train: np.ndarray, heldout: np.ndarray, size: int):
        self.size = need_whole("size", size, at_least=1)
        train, heldout = self._checked("train", train, 3), self._checked("heldout", heldout, 3)
        # Contexts are counted without the last symbol, which has no successor.
        self._singles = _Counts(train)
        self._before_one = _Counts(train[:-1])
        self._pairs = _Counts(self._keys(train, 2))
        self._before_two = _Counts(self._keys(train[:-1], 2))
        self._triples = _Counts(self._keys(train, 3))
        # Bucket 0: the preceding symbol does not occur in training; 1: the two preceding symbols do not; from 2 on by
        # the count of these two; the last bucket is for counts of 1,024 and more.
        takes_part = np.ones((self.BUCKETS, 4))
        takes_part[:2, 3] = takes_part[0, 2] = 0
        self.weights = takes_part / takes_part.sum(axis=1, keepdims=True)
        probabilities, buckets = self._predictions(heldout)
        for _ in range(self.ROUNDS):
            share = self.weights[buckets] * probabilities
            share /= share.sum(axis=1, keepdims=True)
            total = np.stack([np.bincount(buckets, share[:, k], minlength=self.BUCKETS) for k in range(4)], axis=1)
            # One pseudo-count per model: no weight becomes zero in a bucket with little held-out text.
            total += takes_part
            self.weights = total / total.sum(axis=1, keepdims=True)

    def bits_per_symbol(self, symbols: np.ndarray) -> float:
        """Mean of -log2 p over all symbols but the first, given the preceding ones.

        Raises ValueError for less than two.
        """
        return float(-np.log2(self.probabilities(symbols)).mean())

    def probabilities(self, symbols: np.ndarray) -> np.ndarray:
        """Probability of every symbol but the first, given the preceding ones: (n - 1,) float64.

        Raises ValueError for less than two symbols and for symbols outside the vocabulary.
        """
        symbols = self._checked("symbols", symbols, 2)
        by_model, buckets = self._predictions(symbols)
        return (self.weights[buckets] * by_model).sum(axis=1)

    def _checked(self, name: str, symbols: np.ndarray, fewest: int) -> np.ndarray:
        """The symbols as a plain array (n,) int64, n >= fewest. Raises ValueError."""
        array = number_array(name, symbols, "(n,)", ndim=1, kinds=WHOLE)
        if len(array) < fewest or array.min() < 0 or array.max() >= self.size:
            got = f"{len(array)} symbols from {array.min()} to {array.max()}" if len(array) else "none"
            raise ValueError(f"{name}: got {got}, need at least {fewest} symbols, all in 0..{self.size - 1}")
        return array.astype(np.int64)

    def _predictions(self, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities of every symbol but the first by the four models, (n - 1, 4), and the buckets, (n - 1,)."""
        symbols = np.asarray(symbols, np.int64)
        targets = symbols[1:]
        # Only one symbol precedes the second symbol of a text, so its counts after two symbols are 0.
        before_two = np.concatenate([[0], self._before_two.of(self._keys(symbols[:-1], 2))])
        triples = np.concatenate([[0], self._triples.of(self._keys(symbols, 3))])
        pairs, before_one = self._pairs.of(self._keys(symbols, 2)), self._before_one.of(symbols[:-1])
        probabilities = np.stack(
            [
                np.full(len(targets), 1 / self.size),
                self._singles.of(targets) / self._singles.total,
                pairs / np.maximum(before_one, 1),
                triples / np.maximum(before_two, 1),
            ],
            axis=1,
        )
        return probabilities, np.where(before_one == 0, 0, np.minimum(1 + np.frexp(before_two)[1], self.BUCKETS - 1))

    def _keys(self, symbols: np.ndarray, length: int) -> np.ndarray:
        """One number per sequence of `length` consecutive symbols: (n - length + 1,) int64."""
        n = len(symbols) - length + 1
        keys = np.zeros(n, np.int64)
        for k in range(length):
            keys = keys * self.size + symbols[k : k + n]
        return keys


class _Counts:
    """Counts of the numbers in an array."""

    def __init__(self, keys: np.ndarray):
        self.keys, self.counts = np.unique(keys, return_counts=True)
        self.total = len(keys)

    def of(self, keys: np.ndarray) -> np.ndarray:
        """The count of every key; 0 for a key that does not occur."""
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.counts[place], 0)
