"""Arrays that are read-only as long as an object lives that has read them.

An engine packs the arrays of a network once. An edit in place would change the network and not the engine, without a
word. So NumPy refuses edits meanwhile, and allows them again when no such object is left.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

import numpy as np

from eventrnn._exclusive import Use

# Number of objects that hold an array, by its id. Whoever counts here also refers to the array, so no id is used again.
_HOLDERS: dict[int, int] = {}

_USE = Use("arrays")


def hold(owner: object, arrays: Iterable[np.ndarray]) -> None:
    """Make the arrays, and those that they are views of, read-only until `owner` has ended.

    Other views that exist already stay writable: NumPy does not know them. An array that was read-only stays so, and a
    large one that was unpickled stays read-only for good.
    """
    held, whole = [], {id(each): each for given in arrays for each in _bases(given)}
    with _USE.lock:
        for array in whole.values():
            if id(array) not in _HOLDERS and not array.flags.writeable:
                continue
            held.append(array)
            _HOLDERS[id(array)] = _HOLDERS.get(id(array), 0) + 1
            array.flags.writeable = False
    weakref.finalize(owner, _release, held).atexit = False


def _release(held: list[np.ndarray]) -> None:
    with _USE.lock:
        for array in held:
            _HOLDERS[id(array)] -= 1
            if not _HOLDERS[id(array)]:
                del _HOLDERS[id(array)]
                _make_writable(array)


def _make_writable(array: np.ndarray) -> None:
    """Make an array writable; NumPy allows it to a view only while the array is writable that it is a view of."""
    below = [(base, base.flags.writeable) for base in _bases(array)][1:]
    try:
        for each in (*(base for base, _ in reversed(below)), array):
            each.flags.writeable = True
    except ValueError:
        # NumPy lets an array that was unpickled write into memory of a `bytes` object, but not once more.
        return
    finally:
        for each, before in below:
            each.flags.writeable = before


def _bases(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array, the array that it is a view of, and so on."""
    each: object = array
    while isinstance(each, np.ndarray):
        yield each
        each = each.base
