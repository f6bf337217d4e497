"""Calls that no signal handler can break off, for the compiler.

Python runs signal handlers in the main thread, between any two of its instructions. The binding of LLVM does not stand
an exception there. One that comes between the making of an LLVM object and the note of its owner, or between taking the
lock of LLVM and noting that, leaves a process that later crashes or waits for ever. Of processes that were interrupted
while they loaded kernels for a first run, 7 of 440 ended so, and 0 of 802 with the thread below (llvmlite 0.50.0).
Kernels are therefore compiled, and read from disk, on another thread.

`Thread.start` does not stand such an exception either: one in its wait for the new thread could leave that thread, and
then the end of the process, waiting for ever. `start_new_thread` is a single call of the interpreter.
"""

from __future__ import annotations

import gc
import os
import threading
from _thread import start_new_thread
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

    Raises RuntimeError in a process that was forked while another thread compiled.
    """
    if _LEFT_LOCKED:
        raise RuntimeError(
            "kernels: this process was forked while another thread compiled, and cannot compile; fork when the kernels "
            "are compiled, or start the process by spawn"
        )
    if threading.get_ident() != threading.main_thread().ident or global_compiler_lock.is_locked():
        return function()
    # Taken by whichever comes first: the thread that begins, or this one, which gives up before it. It is taken by
    # `del`, because a signal handler may run after every call.
    permission: list[None] = [None]
    results: list[R] = []
    errors: list[BaseException] = []
    handlers: list[BaseException] = []
    ended: SimpleQueue[None] = SimpleQueue()
    # The settings of NumPy and of warnings are those of this thread.
    context = copy_context()

    def work() -> None:
        try:
            del permission[0]
        except IndexError:
            return
        try:
            results.append(context.run(function))
        except BaseException as error:
            errors.append(error)
        finally:
            ended.put(None)

    try:
        start_new_thread(work, ())
    except BaseException as error:
        try:
            del permission[0]
        except IndexError:
            handlers += [error]
        else:
            if is_refusal(error):
                return function()
            raise
    while not (results or errors):
        try:
            ended.get()
        except BaseException as error:
            handlers += [error]
    if handlers or errors:
        raise (handlers or errors)[0]
    return results[0]


def is_refusal(error: BaseException) -> bool:
    """Whether the system starts no more threads. A RuntimeError of a signal handler has a frame of the handler."""
    trace = error.__traceback__
    return isinstance(error, RuntimeError) and trace is not None and trace.tb_next is None


# Has an entry if this process was forked while a thread that it does not have held the lock of the compiler.
_LEFT_LOCKED: list[None] = []

# Has an entry for every thread that will switch the collector on again.
_RESTING: list[None] = []


def _after_fork() -> None:
    if global_compiler_lock._lock.acquire(blocking=False):
        global_compiler_lock._lock.release()
    else:
        _LEFT_LOCKED.append(None)
    # The new process does not have these threads.
    if _RESTING:
        _RESTING.clear()
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def without_collector(function: Callable[[], R]) -> R:
    """function(), while Python looks for no cycles of references.

    The compiler makes many objects that stay until its end. Looking through them again and again took 8 to 16 % of the
    processor time of a first run (Numba 0.68, Python 3.11).
    """
    if not gc.isenabled():
        return function()
    _RESTING.append(None)
    gc.disable()
    try:
        return function()
    finally:
        gc.enable()
        _RESTING.pop()


def compile_uninterrupted(dispatcher: Any) -> None:
    """Let a dispatcher of Numba compile, or read from disk, by `uninterrupted` and `without_collector`."""
    compile_here = dispatcher.compile

    @wraps(compile_here)
    def compile_apart(signature: Any) -> Any:
        return uninterrupted(lambda: without_collector(lambda: compile_here(signature)))

    dispatcher.compile = compile_apart
