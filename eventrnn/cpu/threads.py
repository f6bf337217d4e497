"""Threads that run one compiled function together, and that end whatever happens between their starts.

A function may let its threads wait for each other at a barrier. A thread that is missing there would leave the others
spinning for ever. It can be missing because an exception came between the start of one thread and of the next (Ctrl-C,
a handler of SIGALRM, no memory), or within a thread. The barrier is then abandoned, which every waiting thread sees.
"""

from __future__ import annotations

import os
import weakref
from _thread import start_new_thread
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numba import config
from threadpoolctl import ThreadpoolController

from eventrnn._arithmetic import set_standard_mode
from eventrnn._exclusive import Use, exclusive
from eventrnn.backend import BackendUnavailable
from eventrnn.cpu.kernels.sync import ABANDONED
from eventrnn.cpu.uninterrupted import is_refusal

# Seconds after which a wait for the workers looks at the state again. A worker wakes the waiting thread at once; the
# time matters only where a signal handler has taken that message away.
RECHECK_SECONDS = 0.05


class Job:
    """One call of a function on all threads of a team, and who has begun and ended it.

    function : takes the number of the thread
    barrier  : (1,) int64 that the threads wait at; None where none waits
    """

    def __init__(self, function: Callable[[int], object], barrier: np.ndarray | None):
        self.function, self.barrier, self.cancelled = function, barrier, False
        # Appending to a list and reading its length are atomic; no lock is needed that a thread could leave locked.
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.errors: list[BaseException] = []
        self.bell: SimpleQueue[None] = SimpleQueue()

    def share(self, thread: int) -> None:
        """A worker's share. A failure is kept for the caller, and lets the other threads go."""
        # The order matters: `cancel` sets the mark first, and then waits for all that have begun.
        self.begun.append(thread)
        try:
            if not self.cancelled:
                self.function(thread)
        except BaseException as error:
            self.errors.append(error)
            self.abandon()
        finally:
            self.ended.append(thread)
            self.bell.put(None)

    def abandon(self) -> None:
        """Let every thread that waits at the barrier go."""
        if self.barrier is not None:
            self.barrier[0] = ABANDONED

    def wait(self, shares: int) -> None:
        """Wait until so many workers have ended their share, and all that have begun one.

        It may be called again after an exception. The number alone would not do: a worker that begins after `cancel`
        ends at once, and would be taken for one that is still at work.
        """
        # The ended ones are counted first, so that equal numbers are those of the same workers.
        while len(self.ended) < max(shares, len(self.begun)):
            try:
                self.bell.get(timeout=RECHECK_SECONDS)
            except Empty:
                continue

    def cancel(self) -> None:
        """Let no worker begin any more, and wait for those that have. It may be called again after an exception."""
        self.cancelled = True
        self.abandon()
        self.wait(0)


class Worker:
    """A thread that takes jobs from its mailbox until it gets None. It keeps no process from exiting.

    `work` is started by a single call of the interpreter: `threading.Thread.start` does not stand an exception of a
    signal handler (`uninterrupted.py`).
    """

    def __init__(self):
        self.mailbox: SimpleQueue = SimpleQueue()
        self.process, self.ended = os.getpid(), False

    def is_alive(self) -> bool:
        """Whether the thread can take a job. The process after a fork has no threads of the one before."""
        return not self.ended and self.process == os.getpid()

    def work(self) -> None:
        """Do what the thread does."""
        try:
            # A new thread has the floating-point mode of the one that started it.
            set_standard_mode()
            while (task := self.mailbox.get()) is not None:
                job, thread = task
                job.share(thread)
                # No arrays are kept alive while the worker waits.
                del job, task
        finally:
            self.ended = True


class Crew:
    """The workers of a team.

    Raises RuntimeError where the system starts no more threads.
    """

    def __init__(self, workers: int):
        self.job: Job | None = None
        self.workers = [Worker() for _ in range(workers)]
        try:
            for worker in self.workers:
                start_new_thread(worker.work, ())
        except BaseException as error:
            self.dismiss()
            if is_refusal(error):
                raise RuntimeError(
                    f"threads: asked for {workers + 1}, but the system starts no more ({error})"
                ) from error
            raise

    def dismiss(self) -> None:
        """Let every worker end, also one that waits at a barrier."""
        if self.job is not None:
            self.job.cancelled = True
            self.job.abandon()
        for worker in self.workers:
            worker.mailbox.put(None)


class Team:
    """Threads that run one compiled function together, each with its own number; the caller is thread 0.

    Only one call at a time runs; one from a second Python thread waits. Workers that are missing, because the process
    was forked or because a worker died, are replaced before the next call. A copy of a team has workers of its own.

    Raises RuntimeError where the system starts no more threads, and BackendUnavailable where Numba compiles nothing.
    """

    def __init__(self, threads: int):
        need_compiler()
        self.threads, self._use = threads, Use("threads")
        # The system may refuse a thread: it does so here, before any run, and not in the midst of one.
        self._crew = self._new_crew() if threads > 1 else None

    def __reduce__(self):
        return Team, (self.threads,)

    def run(self, function: Callable, *arguments: Any, counter: bool = False, barrier: bool = False) -> None:
        """Call function(thread, n_threads, [shared,] *arguments) on every thread; returns when all have returned.

        counter : also pass an int64 array (1,), zero at first and shared by all threads, which the function uses as
                  work counter (`kernels/sync.py`)
        barrier : the same for a function that uses the array as barrier

        An exception, of a thread or of a signal handler, is raised when no thread runs the function any more. What the
        function has written is then of no use.
        """
        shared = [np.zeros(1, np.int64)] if counter or barrier else []
        if self.threads == 1:
            function(0, 1, *shared, *arguments)
            return
        self._together(
            lambda thread: function(thread, self.threads, *shared, *arguments), shared[0] if barrier else None
        )

    def multiply(self, a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """a @ b through BLAS; the longer side of the result is split between the threads.

        BLAS runs on one thread here. Its own worker threads keep spinning after a call, on the cores that the next
        kernel needs.
        """
        product = np.empty((a.shape[0], b.shape[1]), np.float32) if out is None else out
        if self.threads == 1:
            return np.matmul(a, b, out=product)
        rows, columns = product.shape
        bounds = [max(rows, columns) * thread // self.threads for thread in range(self.threads + 1)]
        shares = [slice(*pair) for pair in pairwise(bounds)]

        def share(thread: int) -> None:
            own = shares[thread]
            if rows >= columns:
                np.matmul(a[own], b, out=product[own])
            else:
                np.matmul(a, b[:, own], out=product[:, own])

        with _blas().limit(limits=1, user_api="blas"):
            self._together(share, None)
        return product

    def run_apart(self, function: Callable[[], object]) -> None:
        """Call function() on a worker; returns when it has returned.

        A signal handler, which Python runs in the main thread, cannot break it off there. An exception of a handler is
        raised after the function has returned, or if it was not begun.
        """
        self._together(lambda thread: function() if thread == 1 else None, None)

    @exclusive
    def _together(self, function: Callable[[int], object], barrier: np.ndarray | None) -> None:
        """Call function(thread) on every thread; returns when all have returned."""
        crew = self._ready()
        crew.job = job = Job(function, barrier)
        try:
            for thread, worker in enumerate(crew.workers, start=1):
                worker.mailbox.put((job, thread))
            function(0)
            job.wait(len(crew.workers))
        except BaseException:
            job.abandon()
            _end(crew)
            raise
        crew.job = None
        # A worker may hold the job a moment longer than its arrays may be in use.
        job.function = _nothing
        if job.errors:
            raise job.errors.pop(0)

    def _ready(self) -> Crew:
        """The workers, all of them alive and none at work."""
        crew = self._crew
        assert crew is not None
        alive = [worker.is_alive() for worker in crew.workers]
        if crew.job is not None and any(alive):
            # An exception came while the last call ended.
            _end(crew)
        if not all(alive):
            # A worker has died, or all have: the process was forked, and a job of the parent never ends here.
            crew.dismiss()
            self._crew = crew = self._new_crew()
        return crew

    def _new_crew(self) -> Crew:
        crew = Crew(self.threads - 1)
        # At the end of the team, and of the process. The crew does not know its team, which can therefore end.
        weakref.finalize(self, crew.dismiss)
        return crew


def _end(crew: Crew) -> None:
    """Wait until no worker is at work on the job, however often a signal handler raises meanwhile."""
    raised = None
    while crew.job is not None:
        try:
            crew.job.cancel()
            crew.job = None
        except BaseException as error:
            raised = error
    if raised is not None:
        raise raised


def _nothing(thread: int) -> None:
    """The function of a job that has ended."""


def need_compiler() -> None:
    """Raise BackendUnavailable where Numba was told to compile nothing."""
    # Numba sets this variable of the module while it reads the environment, unseen by type checkers.
    if vars(config)["DISABLE_JIT"]:
        raise BackendUnavailable(
            "NUMBA_DISABLE_JIT is set, and the kernels run compiled only; unset it, or use backend='reference'"
        )


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
