"""Arrays whose newest values are on the GPU, as a mapping that fetches an array when it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager

import numpy as np


class Mirror(MutableMapping[str, np.ndarray]):
    """Host arrays by name, and what is known about their twins on the GPU.

    Reading an array fetches it if the GPU has changed it, and assumes that the reader may write to it: it is sent back
    before the next update. Arrays read within `reading` are not sent back.

    Parameters
    ----------
    arrays : the host arrays, which hold the newest values
    fetch  : copies the twin with a name to a host array
    """

    def __init__(self, arrays: dict[str, np.ndarray], fetch: Callable[[str, np.ndarray], None]):
        self._arrays, self._fetch = arrays, fetch
        self._old: set[str] = set()
        self._touched: set[str] = set(arrays)
        self._only_read = False

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self._old:
            self._fetch(name, self._arrays[name])
            self._old.discard(name)
        if not self._only_read:
            self._touched.add(name)
        return self._arrays[name]

    def __setitem__(self, name: str, value: np.ndarray) -> None:
        own = self._arrays[name]
        if value is not own:
            own[...] = value
        self._old.discard(name)
        self._touched.add(name)

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name}: the arrays of a run cannot be removed")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def changed_on_gpu(self, names: Iterable[str] | None = None) -> None:
        """Twins have changed, all of them by default."""
        self._old = set(self._arrays) if names is None else self._old | set(names)

    def send_touched(self, send: Callable[[str, np.ndarray], None]) -> bool:
        """Send the arrays that may have been written to since they were sent, and return whether there were any. After
        an exception, the next call sends the others."""
        touched = [name for name in self._arrays if name in self._touched]
        for name in touched:
            send(name, self._arrays[name])
            self._touched.discard(name)
        return bool(touched)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Within the context, arrays that are read are not written to."""
        before, self._only_read = self._only_read, True
        try:
            yield
        finally:
            self._only_read = before
