"""The compiler works where no signal handler can break it off; what a handler raises comes afterwards."""

from __future__ import annotations

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

from eventrnn.cpu.kernels import jit
from eventrnn.cpu.kernels.by_address import address_of
from eventrnn.cpu.uninterrupted import uninterrupted

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


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), Stop()])
def test_a_thread_that_does_not_start_is_replaced_and_an_exception_before_it_leaves_the_call_undone(error):
    calls: list[int] = []
    with patch.object(threading.Thread, "start", side_effect=error):
        if isinstance(error, Stop):
            with pytest.raises(Stop):
                uninterrupted(lambda: calls.append(1))
        else:
            uninterrupted(lambda: calls.append(1))
    assert calls == ([] if isinstance(error, Stop) else [1])


def test_an_exception_while_a_thread_starts_waits_for_it():
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        time.sleep(0.02)
        raise Stop

    calls: list[int] = []
    with patch.object(threading.Thread, "start", interrupted), pytest.raises(Stop):
        uninterrupted(lambda: calls.append(1))
    assert calls == [1]


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
