"""Checks of arguments that the whole package shares.

Every check names the argument, what it got, and what is needed. A wrong value and a wrong type of array raise
ValueError; an object of another kind raises TypeError.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

# Kinds of NumPy data types that are no real numbers, in words.
_OTHER_KINDS = {
    "b": "booleans",
    "c": "complex numbers",
    "m": "time spans",
    "M": "dates",
    "O": "Python objects",
    "S": "bytes",
    "T": "text",
    "U": "text",
    "V": "records",
}

#: kinds of NumPy data types that are read as real numbers, and those of whole numbers
NUMBERS, WHOLE = "fiub", "iu"

# Numbers of a large array that are looked at together.
PART = 1 << 16

_LONGEST = 80


def said(value: Any) -> str:
    """A value as an error message shows it: arrays by type and shape, others by their text, shortened."""
    if isinstance(value, np.ndarray) and value.ndim:
        return f"{value.dtype} {value.shape}"
    try:
        text = str(value) if isinstance(value, np.generic) else repr(value)
    except ValueError:
        # Python writes no whole number of more than some thousand digits.
        text = f"a {type(value).__name__} that is too long to be written"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


# --- single values ------------------------------------------------------------------------------------------


def need_whole(name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """A whole number within bounds, as `int`. Raises ValueError; booleans are no numbers."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    low = at_least is None or (whole and value >= at_least)
    if not whole or not low or (at_most is not None and value > at_most):
        bounds = "" if at_least is None else f" >= {at_least}" if at_most is None else f" {at_least} to {at_most}"
        raise ValueError(f"{name}: got {said(value)}, need a whole number{bounds}")
    return int(value)


def need_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
    what: str = "number",
) -> float:
    """A finite number within bounds, as `float`. Raises ValueError; booleans are no numbers.

    what : the noun of the message, for example "share"
    """
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    # A whole number of Python may be beyond every float.
    real = real and not (isinstance(value, int) and abs(value) > sys.float_info.max)
    if not real or not (math.isfinite(value) and at_least <= value <= at_most and above < value < below):
        low, high = max(at_least, above), min(at_most, below)
        if high < math.inf:
            need = f"a {what} in {'[' if at_least > above else '('}{low:g}, {high:g}{']' if at_most < below else ')'}"
        elif low == -math.inf:
            need = f"a finite {what}"
        else:
            need = f"a positive {what}" if above == 0 else f"a {what} {'>' if above >= at_least else '>='} {low:g}"
        raise ValueError(f"{name}: got {said(value)}, need {need}")
    return float(value)


def need_flag(name: str, value: Any) -> bool:
    """True or False, as `bool`. Raises ValueError for everything else, numbers included."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: got {said(value)}, need True or False")
    return bool(value)


def need_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """One of the names. Raises ValueError for everything else."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: got {said(value)}, need one of {', '.join(known)}")
    return value


def need_text(name: str, value: Any) -> str:
    """A string. Raises TypeError for everything else."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {said(value)}, need text (a str)")
    return value


def need_kind(name: str, value: Any, kind: type | tuple[type, ...], words: str) -> None:
    """Raise TypeError for an object that is not of that class; `words` says what is needed."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got {said(value)} ({type(value).__name__}), need {words}")


def need_names(name: str, value: Any) -> tuple[str, ...]:
    """Several strings as a tuple. Raises TypeError, also for a single string, whose letters would be taken."""
    if isinstance(value, str) or not isinstance(value, Collection) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name}: got {said(value)}, need several names: ('readout',)")
    return tuple(value)


def need_pair(name: str, value: Any, words: str) -> tuple[int, int]:
    """Two whole numbers >= 1 as a tuple. Raises ValueError; `words` says what they are."""
    several = value.ndim > 0 if isinstance(value, np.ndarray) else isinstance(value, Sequence)
    pair = tuple(value) if several and not isinstance(value, str) else ()
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1 for n in pair):
        raise ValueError(f"{name}: got {said(value)}, need {words}")
    return int(pair[0]), int(pair[1])


# --- arrays -------------------------------------------------------------------------------------------------


def plain_array(name: str, value: Any) -> np.ndarray:
    """A value as a plain NumPy array.

    Raises ValueError for a masked array, whose masked entries have no value, and TypeError where NumPy cannot read it.
    """
    if type(value) is np.ndarray:
        return value
    if isinstance(value, np.ma.MaskedArray):
        raise ValueError(
            f"{name}: got a masked array, whose masked entries have no value; give array.filled(number), or array.data "
            "to use the numbers below the mask"
        )
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
        raise TypeError(f"{name}: NumPy cannot read this {kind} ({error}); give a NumPy array") from None


def number_array(name: str, value: Any, shape: str, *, ndim: int | None = None, kinds: str = NUMBERS) -> np.ndarray:
    """A value as a plain NumPy array of real numbers; they are not converted, and may be infinite or NaN.

    shape : the shape that is needed, in words, for the message
    ndim  : the number of dimensions that is needed; None for any
    kinds : the kinds of data types that are allowed, `NUMBERS` or `WHOLE`

    Raises ValueError for another data type (complex numbers, dates, text, objects) or number of dimensions, and as
    `plain_array` does.
    """
    array = plain_array(name, value)
    if array.dtype.kind not in kinds or (ndim is not None and array.ndim != ndim):
        words = _OTHER_KINDS.get(array.dtype.kind)
        what = f" ({words})" if words and array.dtype.kind not in kinds else ""
        need = "whole numbers" if kinds == WHOLE else "numbers"
        raise ValueError(f"{name}: got {array.dtype} {array.shape}{what}, need {need} {shape}")
    return array


def float32_array(name: str, value: Any, shape: str, *, ndim: int | None = None) -> np.ndarray:
    """A value as a plain float32 array of finite numbers; the array itself where it is one already.

    Raises ValueError for NaN, infinity and numbers beyond float32, with their position, and as `number_array` does.
    """
    array = number_array(name, value, shape, ndim=ndim)
    check_finite(name, array)
    if array.dtype == np.float32:
        return array
    with np.errstate(over="ignore"):
        narrow = array.astype(np.float32)
    check_finite(f"{name} as float32", narrow)
    return narrow


def class_array(name: str, value: Any, shape: tuple[int, ...], classes: int) -> np.ndarray:
    """Numbers of classes as a contiguous int64 array of that shape.

    Raises ValueError for another shape, for numbers outside 0..classes - 1, and as `number_array` does.
    """
    array = number_array(name, value, "that name classes", kinds=WHOLE)
    if array.shape != shape or (array.size and not 0 <= array.min() <= array.max() < classes):
        raise ValueError(f"{name}: got shape {array.shape}, need {shape} classes below {classes}")
    return np.ascontiguousarray(array, np.int64)


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise ValueError for NaN and infinity, with the position of the first one. Cost: one pass over the array."""
    first = 0
    for part in in_parts(array):
        finite = np.isfinite(part)
        if not finite.all():
            position = tuple(int(k) for k in np.argwhere(~finite)[0])
            position = (first + position[0], *position[1:]) if position else ()
            raise ValueError(f"{name}: got {array[position]} at position {position}; need finite numbers")
        first += len(part) if part.ndim else 0


def in_parts(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in consecutive parts of its first axis, at least one, each of about `PART` numbers.

    What is computed from a part takes little memory, however long the array is.
    """
    if array.size <= PART or array.ndim == 0:
        yield array
        return
    length = max(1, PART * len(array) // array.size)
    for first in range(0, len(array), length):
        yield array[first : first + length]


def need_mask(name: str, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """A boolean array of that shape. Raises ValueError for another data type or shape, and for a masked array."""
    array = plain_array(name, value)
    if array.dtype != bool:
        raise ValueError(f"{name}: got {array.dtype} {array.shape}, need booleans {tuple(shape)}")
    if array.shape != tuple(shape):
        raise ValueError(f"{name}: got shape {array.shape}, need {tuple(shape)}")
    return array


def need_lengths(lengths: Any, steps: int, batch: int) -> np.ndarray:
    """The number of steps of each sample, (batch,) int64. Raises ValueError unless they are whole numbers 0..steps."""
    array = plain_array("lengths", lengths)
    if array.shape != (batch,) or (array.dtype.kind not in WHOLE and array.size):
        raise ValueError(
            f"lengths: got {array.dtype} {array.shape}, need ({batch},) whole numbers 0..{steps}, one per sample"
        )
    wrong = (array < 0) | (array > steps)
    if wrong.any():
        sample = int(np.argmax(wrong))
        raise ValueError(f"lengths: got {array[sample]} for sample {sample}, need 0..{steps}, the steps of the inputs")
    return array.astype(np.int64)
