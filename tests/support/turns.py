"""Threads of a kernel that take turns in one thread of Python: each runs until it waits for others.

Who runs first, and who goes on first after a barrier, is drawn anew at every barrier from a fixed seed. A kernel that
lacks a barrier therefore meets its threads in many orders, which are the same in every run. To change threads takes
microseconds; threads of Python, which the operating system wakes one after the other, need a hundred times as long.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from random import Random

from greenlet import GreenletExit, getcurrent, greenlet

#: seconds after which threads that only poll are an error
PATIENCE = 60


class Deadlock(RuntimeError):
    """Threads wait for others that have ended, or poll in vain."""


class Turns:
    """The threads of one launch.

    here : what the running thread knows of its place; its attributes are set to those of the thread that goes on
    """

    def __init__(self, here: object):
        self.here, self.ready, self.random, self.places = here, deque(), Random(0), {}

    def run(self, calls: Iterable[tuple[dict, Callable[[], None]]]) -> None:
        """Run one thread per call, with its place, to the end. The first error of a thread is raised."""
        for place, call in calls:
            thread = greenlet(call)
            self.places[thread] = place
            self.ready.append(thread)
        self.random.shuffle(self.ready)
        until = time.monotonic() + PATIENCE
        try:
            while self.ready:
                thread = self.ready.popleft()
                self.here.__dict__.update(self.places[thread])
                # An error of the thread is raised here.
                thread.switch()
                if time.monotonic() > until:
                    raise Deadlock(f"threads still run after {PATIENCE} s")
            if not all(thread.dead for thread in self.places):
                raise Deadlock("threads wait at a barrier that others never reach")
        finally:
            for thread in self.places:
                if not thread.dead:
                    thread.throw(GreenletExit)

    def give_way(self) -> None:
        """Let the threads run that this one may wait for."""
        self.ready.append(getcurrent())
        self.wait()

    def wait(self) -> None:
        """Run on when this thread is among `ready` again."""
        getcurrent().parent.switch()

    def resume(self, threads: list) -> None:
        """Make threads ready, in an order of chance, and take their list."""
        self.random.shuffle(threads)
        self.ready += threads
        threads.clear()


class Group:
    """Some threads that vote and wait for each other: a warp, a block or a cluster."""

    def __init__(self, size: int, turns: Turns):
        self.size, self.turns, self.waiting = size, turns, []
        self.votes: list = [0] * size
        self.groups: dict[int, Group] = {}

    def some(self, number: int, size: int) -> Group:
        """A barrier of neighbouring threads of a block, by its number."""
        return self.groups.setdefault(number, Group(size, self.turns))

    def exchange(self, member: int, vote) -> list:
        """What every member gave. The list is the same for all, and no one changes it."""
        votes = self.votes
        votes[member] = vote
        self.waiting.append(getcurrent())
        if len(self.waiting) == self.size:
            self.votes = [0] * self.size
            self.turns.resume(self.waiting)
        self.turns.wait()
        return votes
