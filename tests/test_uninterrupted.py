"""The compiler works where no signal handler can break it off; what a handler raises comes afterwards."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numba
import numpy as np
import pytest
from numba.core import event, types
from numba.core.compiler_lock import global_compiler_lock

from eventrnn.cpu.kernels import jit
from eventrnn.cpu.kernels.by_address import address_of
from eventrnn.cpu.uninterrupted import uninterrupted, without_collector

NEEDS_TIMER = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs an interval timer")


class Stop(Exception):
    """What the handler of these tests raises."""


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise Stop in the main thread after so many seconds, by a signal handler."""

    def stop(number, frame):
        raise Stop

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def ident() -> int:
    return threading.get_ident()


def test_the_main_thread_hands_the_call_to_another_thread_that_ends_with_it():
    before = threading.active_count()
    assert uninterrupted(ident) != ident()
    assert threading.active_count() == before


def test_another_thread_makes_the_call_itself():
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(uninterrupted(ident) == ident()))
    thread.start()
    thread.join()
    assert found == [True]
    # As a kernel does that is compiled as a part of another one.
    assert uninterrupted(lambda: uninterrupted(ident) == ident())


def test_an_error_of_the_call_and_the_settings_of_numpy_are_those_of_the_caller():
    with pytest.raises(ZeroDivisionError):
        uninterrupted(lambda: 1 // 0)
    with np.errstate(divide="raise"):
        assert uninterrupted(np.geterr)["divide"] == "raise"


@NEEDS_TIMER
def test_an_exception_of_a_handler_is_raised_when_the_call_has_returned():
    ended: list[bool] = []

    def work() -> None:
        time.sleep(0.1)
        ended.append(True)

    with stopped_after(0.02), pytest.raises(Stop):
        uninterrupted(work)
    assert ended == [True]


def test_where_the_system_starts_no_thread_the_main_thread_makes_the_call():
    before = threading.stack_size(1 << 50)
    try:
        assert uninterrupted(ident) == ident()
    finally:
        threading.stack_size(before)


# A RuntimeError is also what Python raises where the system starts no thread.
@pytest.mark.parametrize("error", [Stop(), RuntimeError("of a handler")])
@pytest.mark.parametrize("begun", [False, True])
def test_an_exception_of_a_handler_while_the_thread_starts_is_raised(begun, error):
    def interrupted(function, arguments) -> None:
        if begun:
            thread = threading.Thread(target=function, args=arguments)
            thread.start()
            thread.join()
        raise error

    calls: list[int] = []
    with patch("eventrnn.cpu.uninterrupted.start_new_thread", interrupted), pytest.raises(type(error)) as raised:
        uninterrupted(lambda: calls.append(1))
    assert raised.value is error and calls == [1] * begun


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_that_was_forked_while_another_thread_compiled_is_told():
    locked, over = threading.Event(), threading.Event()

    def compile_something() -> None:
        with global_compiler_lock:
            locked.set()
            over.wait()

    thread = threading.Thread(target=lambda: without_collector(compile_something))
    thread.start()
    locked.wait()
    assert not gc.isenabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            uninterrupted(ident)
        except RuntimeError as error:
            os._exit(7 if "forked while another thread compiled" in str(error) and gc.isenabled() else 1)
        finally:
            os._exit(1)
    over.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert uninterrupted(ident) != ident() and gc.isenabled()


def test_every_way_to_compile_a_kernel_leaves_the_main_thread():
    threads: list[int] = []

    class Listener(event.Listener):
        def on_start(self, event) -> None:
            threads.append(ident())

        def on_end(self, event) -> None:
            pass

    def double(x):
        return x + x

    listener = Listener()
    event.register("numba:compile", listener)
    try:
        assert jit.compiled(double)(2) == 4
        assert address_of(jit.called_by_address(double), (types.int64,)) != 0
    finally:
        event.unregister("numba:compile", listener)
    assert len(threads) == 2 and ident() not in threads


def test_a_function_of_a_user_may_contain_a_kernel():
    def add_one(x):
        return x + 1

    kernel = jit.compiled(add_one)

    @numba.njit
    def twice(x):
        return kernel(kernel(x))

    # The main thread holds the lock of the compiler while it compiles the kernel.
    assert twice(3) == 5


def test_a_warning_of_the_call_is_one_of_the_process():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        uninterrupted(lambda: warnings.warn("said", RuntimeWarning, stacklevel=1))
    assert [str(each.message) for each in caught] == ["said"]


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_rests_while_a_kernel_compiles_and_is_as_before_afterwards(collects):
    def failing() -> None:
        assert not gc.isenabled()
        raise Stop

    before = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        assert without_collector(gc.isenabled) is False
        assert gc.isenabled() == collects
        with pytest.raises(Stop):
            without_collector(failing)
        assert gc.isenabled() == collects
    finally:
        (gc.enable if before else gc.disable)()


def test_a_kernel_compiles_without_the_collector():
    states: list[bool] = []

    class Listener(event.Listener):
        def on_start(self, event):
            states.append(gc.isenabled())

        def on_end(self, event):
            states.append(gc.isenabled())

    kernel = jit.compiled(lambda x: x + 1)
    listener = Listener()
    event.register("numba:compile", listener)
    try:
        assert kernel(1) == 2
    finally:
        event.unregister("numba:compile", listener)
    assert states and not any(states) and gc.isenabled()
