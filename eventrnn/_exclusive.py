"""Objects that one call at a time may use, whichever thread or signal handler it comes from.

A kernel releases the GIL and works in scratch memory of its object, so two calls side by side would corrupt each other.
A call from a second thread waits for the first one. A call from the same thread, which only a signal handler or a
callback can make, would wait for ever and is refused.

The lock is taken by the `with` statement on a lock of the interpreter itself. An exception of a signal handler can
then not fall between taking the lock and noting that it must be given back, as it can within a Python function.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

P = ParamSpec("P")

R = TypeVar("R")


class Use:
    """Whether an object is in use.

    lock   : held by the thread that uses the object
    busy   : whether a call is under way; the lock alone lets the same thread in again
    deputy : the thread that works for the call meanwhile, or None; it would wait for its own call
    """

    __slots__ = ("__weakref__", "busy", "deputy", "lock", "name")

    def __init__(self, name: str):
        self.name = name
        self.renew()
        _IN_PROCESS.add(self)

    def renew(self) -> None:
        """Forget every call: after a fork, the threads that made them do not exist."""
        self.lock, self.busy = threading.RLock(), False
        self.deputy: int | None = None

    def refuse(self) -> None:
        """Raise RuntimeError for a call from within another one."""
        raise RuntimeError(
            f"{self.name}: in use by a call that has not returned; a signal handler or a callback of that call cannot "
            "use it, call it afterwards"
        )

    def __reduce__(self):
        # A copy of an object is not in use.
        return Use, (self.name,)


_IN_PROCESS: weakref.WeakSet[Use] = weakref.WeakSet()


def _renew_all() -> None:
    for use in list(_IN_PROCESS):
        use.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)


class _HasUse(Protocol):
    _use: Use


S = TypeVar("S", bound=_HasUse)


def exclusive(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """A method that is one call of `self._use`. Methods that it calls on the same object must not be exclusive."""

    @wraps(method)
    def call(self: S, *arguments: P.args, **keywords: P.kwargs) -> R:
        use: Any = self._use
        if use.deputy == threading.get_ident():
            use.refuse()
        with use.lock:
            if use.busy:
                use.refuse()
            use.busy = True
            try:
                return method(self, *arguments, **keywords)
            finally:
                use.busy = False

    return call
