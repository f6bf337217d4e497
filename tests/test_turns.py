"""The emulated GPU's threads: barriers hold, and a kernel that lacks one, or never ends, is found."""

from types import SimpleNamespace

import numpy as np
import pytest

from support import turns
from support.turns import Deadlock, Group, Turns

THREADS = 8


def launched(kernel, size: int = THREADS):
    """Run `kernel(thread, turns, block)` in every thread."""
    here = SimpleNamespace()
    own = Turns(here)
    block = Group(size, own)
    own.run(({"thread": k}, lambda: kernel(here, own, block)) for k in range(THREADS))


def reversed_by(barriers: int) -> np.ndarray:
    """What threads read that write their number and, after so many barriers, read that of their opposite."""
    shared, found = np.full(THREADS, -1), np.full(THREADS, -1)

    def kernel(here, own, block):
        shared[here.thread] = here.thread
        for _ in range(barriers):
            block.exchange(here.thread, 0)
        found[here.thread] = shared[THREADS - 1 - here.thread]

    launched(kernel)
    return found


def test_a_missing_barrier_shows_in_what_threads_read():
    assert np.array_equal(reversed_by(1), reversed_by(2)) and np.array_equal(reversed_by(1), np.arange(THREADS)[::-1])
    stale = reversed_by(0) == -1
    # Not the first threads alone: their order is drawn.
    assert stale.any() and stale[THREADS // 2 :].any()


def test_a_second_vote_reaches_no_thread_before_it_has_read_the_first():
    read = []

    def kernel(here, own, block):
        for round_ in range(20):
            votes = block.exchange(here.thread, 100 * round_ + here.thread)
            read.append(votes == [100 * round_ + k for k in range(THREADS)])

    launched(kernel)
    assert len(read) == 20 * THREADS and all(read)


def test_threads_that_wait_for_no_one_are_an_error():
    with pytest.raises(Deadlock, match="never reach"):
        launched(lambda here, own, block: here.thread and block.exchange(here.thread, 0))


def test_polls_in_vain_are_an_error(monkeypatch):
    monkeypatch.setattr(turns, "PATIENCE", 0.01)

    def kernel(here, own, block):
        while True:
            own.give_way()

    with pytest.raises(Deadlock, match="still run"):
        launched(kernel)


def test_an_error_of_a_thread_ends_all():
    ended = []

    def kernel(here, own, block):
        try:
            if here.thread == 3:
                raise ZeroDivisionError
            block.exchange(here.thread, 0)
        finally:
            ended.append(here.thread)

    with pytest.raises(ZeroDivisionError):
        launched(kernel)
    # Those that had begun.
    assert 3 in ended and len(ended) <= THREADS
