"""Tables of calls and of values that their arguments must not take, for `test_arguments*.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, nan
from typing import Any

import numpy as np
import pytest

import eventrnn as er

RNG = np.random.default_rng(0)

NETWORK = er.Network.random([6, 4], inputs=5, readout=3, rng=RNG, threshold=0.1)

READER = er.Network.random([6], symbols=7, embedding=4, readout=7, rng=RNG, threshold=0.1)

SIGNAL = RNG.normal(size=(4, 2, 5)).astype(np.float32)

TEXT = RNG.integers(0, 7, 200)

MATRIX = RNG.normal(size=(4, 6)).astype(np.float32)

MASK = np.ones((4, 6), bool)

LAYER = NETWORK.layers[0]

RUN = er.simulate(NETWORK, SIGNAL, backend="reference", record="events")

# --- values that no argument of a kind may take ---

OTHERS = ("three", None, [1, 2], {}, True)

POSITIVE = (0, -1, 2.5, nan, inf, *OTHERS)  # a whole number >= 1

NATURAL = (-1, 2.5, nan, inf, *OTHERS)  # a whole number >= 0

ABOVE_ZERO = (0.0, -1.0, nan, inf, 1j, *OTHERS)  # a finite number > 0

FROM_ZERO = (-0.1, nan, inf, 1j, *OTHERS)  # a finite number >= 0

SHARE = (-0.1, 1.5, nan, inf, *OTHERS)  # a number in [0, 1)

FLAG = (0, 1, "yes", None, np.ones(2))  # True or False

NAME = ("no such name", None, 3, ["max"], np.ones(2))  # one of some names

NAMES = ("readout", 5, (3,))  # several names

BLOCK = ((), (1,), (0, 1), (1, -1), (1.5, 2), (True, 1), "12", 3, (9, 9))  # two sizes within a matrix


def instead_of(array: np.ndarray, *, symbols: bool = False) -> tuple[Any, ...]:
    """Arrays of the same shape that hold no real numbers, or that are no arrays, and one of another shape."""
    broken = array.astype(float)
    broken[(0,) * array.ndim] = nan
    found = (
        array.astype(complex),
        array.astype("M8[s]"),
        array.astype("m8[s]"),
        array.astype(str),
        array.astype(object),
        np.ma.masked_array(array, mask=True),
        array[..., None],
        None,
        "text",
    )
    return (*found, array.astype(float)) if symbols else (*found, broken)


@dataclass
class Row:
    """A call that is valid, and for each argument the values that it must not take.

    runs : whether to make the valid call; False where that would compile kernels
    """

    call: Any
    arguments: dict[str, Any]
    wrong: dict[str, tuple[Any, ...]]
    runs: bool = True
    words: dict[str, str] = field(default_factory=dict)


def row(call: Any, wrong: dict[str, tuple[Any, ...]], *, runs: bool = True, words: Any = None, **arguments: Any) -> Row:
    return Row(call, arguments, wrong, runs, words or {})


def wrong_arguments(rows: dict[str, Row]) -> list[tuple[str, str]]:
    """Name of the row and argument of every test that a table stands for."""
    return [(name, argument) for name, each in rows.items() for argument in each.wrong]


def check_valid(each: Row) -> None:
    """The call is valid, so that what is refused is the one argument that a test changes."""
    if each.runs:
        each.call(**each.arguments)


def check_refused(each: Row, argument: str) -> None:
    """Every wrong value of an argument is refused, and the message names the argument."""
    for value in each.wrong[argument]:
        with pytest.raises((ValueError, TypeError), match=each.words.get(argument, argument)) as refusal:
            each.call(**each.arguments | {argument: value})
        # Errors of Python and NumPy about something inside have other classes or words.
        assert type(refusal.value) in (ValueError, TypeError) and ": " in str(refusal.value), repr(value)
