"""Which objects may write to an array.

`hold` makes arrays read-only as long as an object lives that has read them. An engine packs the arrays of a network
once. An edit in place would then change the network and not the engine, without a word, so that NumPy refuses it.

`own_arrays` gives an object arrays that it may write to. joblib hands large arrays to its workers as maps of a file,
which are read-only; objects that train in place copy them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from eventrnn._exclusive import Use

# Number of objects that hold an array, by its id. The finalizer of each of them refers to the array, so that no other
# array can get the same id meanwhile.
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


def own_arrays(holder: Any) -> Any:
    """Replace arrays that cannot be written to, or are maps of files, by copies; returns the holder.

    holder : an array, or what has arrays in it: dictionaries, lists, tuples, and objects by their attributes. All but
             arrays and tuples are changed in place
    """
    seen: dict[int, tuple[Any, Any]] = {}

    def owned(value: Any) -> Any:
        if id(value) in seen:
            return seen[id(value)][1]
        made = value
        if isinstance(value, np.ndarray):
            made = value if type(value) is np.ndarray and value.flags.writeable else np.array(value)
        elif type(value) is tuple:
            made = tuple(owned(each) for each in value)
        elif isinstance(value, dict | list):
            seen[id(value)] = value, value
            for key in list(value) if isinstance(value, dict) else range(len(value)):
                value[key] = owned(value[key])
        elif hasattr(value, "__dict__") and not callable(value):
            seen[id(value)] = value, value
            for name, each in list(vars(value).items()):
                vars(value)[name] = owned(each)
        seen[id(value)] = value, made
        return made

    return owned(holder)
