"""Calls that no signal handler can break off, for the compiler.

Python runs signal handlers in the main thread, between any two of its instructions. The binding of LLVM does not stand
an exception there. One that comes between the making of an LLVM object and the note of its owner, or between taking the
lock of LLVM and noting that, leaves a process that later crashes or waits for ever. Of processes that were interrupted
while they loaded kernels for a first run, 7 of 440 ended so, and 0 of 802 with the thread below (llvmlite 0.50.0).
Kernels are therefore compiled, and read from disk, on another thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import wraps
from queue import SimpleQueue
from typing import Any, TypeVar

from numba.core.compiler_lock import global_compiler_lock

R = TypeVar("R")


def uninterrupted(function: Callable[[], R]) -> R:
    """function(); in the main thread, on another thread for which the main thread waits.

    An exception of a signal handler is raised after the function has returned, or if it was not begun. The other thread
    ends with the call: one that went on would make every later fork of the process a fork with threads.

    A main thread that holds the lock of the compiler calls the function itself, because the other thread would wait for
    the lock: it compiles a function of the user's that contains a kernel.
    """
    if threading.current_thread() is not threading.main_thread() or global_compiler_lock.is_locked():
        return function()
    # Taken by whichever comes first: the thread that begins, or this one, which gives up before it.
    permission: list[None] = [None]
    results: list[R] = []
    errors: list[BaseException] = []
    handlers: list[BaseException] = []
    ended: SimpleQueue[None] = SimpleQueue()
    # The settings of NumPy and of warnings are those of this thread.
    context = copy_context()

    def work() -> None:
        try:
            permission.pop()
        except IndexError:
            return
        try:
            results.append(context.run(function))
        except BaseException as error:
            errors.append(error)
        finally:
            ended.put(None)

    thread = threading.Thread(target=work)
    try:
        thread.start()
    except BaseException as error:
        if _took(permission):
            if isinstance(error, RuntimeError):
                # The system starts no more threads.
                return function()
            raise
        handlers.append(error)
    while not (results or errors):
        try:
            ended.get()
        except BaseException as error:
            handlers.append(error)
    thread.join()
    if handlers or errors:
        raise (handlers or errors)[0]
    return results[0]


def _took(permission: list[None]) -> bool:
    try:
        permission.pop()
    except IndexError:
        return False
    return True


def compile_uninterrupted(dispatcher: Any) -> None:
    """Let a dispatcher of Numba compile a signature, or read it from disk, by `uninterrupted`."""
    compile_here = dispatcher.compile

    @wraps(compile_here)
    def compile_apart(signature: Any) -> Any:
        return uninterrupted(lambda: compile_here(signature))

    dispatcher.compile = compile_apart
