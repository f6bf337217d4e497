"""Arrays that an object writes to, after it was unpickled.

joblib hands large arrays to its workers as maps of a file, which are read-only. Objects that train in place copy them.
"""

from __future__ import annotations

from typing import Any

import numpy as np


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
