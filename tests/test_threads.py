"""Threads that always end: at a barrier, after an exception of any thread, in a forked process, and with their team."""

import gc
import os
import sys
import threading
import time
import warnings

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.cpu import threads
from eventrnn.cpu.kernels.sync import barrier_wait
from eventrnn.cpu.threads import Job, Team


class Fault(BaseException):
    """What no part of the library knows."""


def meet(thread, n_threads, barrier, met):
    """Wait for all other threads; notes the thread if all came."""
    target = barrier_wait(barrier, n_threads, n_threads)
    if target > 0:
        met.append(thread)


def meets(team) -> bool:
    """Whether all threads of a team meet at a barrier."""
    met: list[int] = []
    team.run(meet, met, barrier=True)
    return sorted(met) == list(range(team.threads))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_thread_that_fails_lets_the_others_go(failing):
    team, met = Team(3), []

    def fail(thread, n_threads, barrier):
        if thread == failing:
            raise Fault
        meet(thread, n_threads, barrier, met)

    for _ in range(3):
        with pytest.raises(Fault):
            team.run(fail, barrier=True)
        assert not met
        assert meets(team)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_exception_between_two_starts_lets_the_started_threads_go(which):
    team, met = Team(4), []
    worker = team._crew.workers[which]

    class Interrupted:
        """A mailbox at which a signal handler raises."""

        def put(self, task):
            raise Fault

    worker.mailbox, own = Interrupted(), worker.mailbox
    with pytest.raises(Fault):
        team.run(meet, met, barrier=True)
    worker.mailbox = own
    assert not met
    assert meets(team)


def test_interrupts_while_the_threads_are_awaited_are_raised_when_none_runs(monkeypatch):
    team, running, interrupts, wait = Team(3), [0], [], Job.wait

    def interrupted(job, shares):
        interrupts.append(shares)
        if len(interrupts) < 5:
            raise Fault
        wait(job, shares)

    def slow(thread, n_threads):
        running[0] += 1
        time.sleep(0.05 * thread)
        running[0] -= 1

    monkeypatch.setattr(Job, "wait", interrupted)
    with pytest.raises(Fault):
        team.run(slow)
    assert len(interrupts) == 5
    assert running == [0]
    monkeypatch.undo()
    assert meets(team)


def test_a_worker_that_begins_after_a_cancel_is_not_taken_for_one_that_is_at_work():
    begun, go = threading.Event(), threading.Event()

    def work(thread):
        begun.set()
        go.wait()

    job = Job(work, None)
    threading.Thread(target=job.share, args=(1,)).start()
    begun.wait()
    cancels = threading.Thread(target=job.cancel)
    cancels.start()
    while not job.cancelled:
        time.sleep(0.001)
    job.share(2)
    cancels.join(0.2)
    waits = cancels.is_alive()
    go.set()
    cancels.join()
    assert waits


def test_a_wait_that_an_interrupt_took_away_is_made_up_for_by_the_next_call(monkeypatch):
    team, met = Team(2), []

    def lost(crew):
        raise Fault

    monkeypatch.setattr(threads, "_end", lost)
    with pytest.raises(Fault):
        team.run(lambda thread, n_threads, barrier: 1 / thread if thread == 0 else meet(thread, 2, barrier, met),
                 barrier=True)  # fmt: skip
    monkeypatch.undo()
    assert meets(team)
    assert not met


def ended(worker):
    """Wait until a worker has ended."""
    deadline = time.monotonic() + 60
    while worker.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.001)


# A RuntimeError is also what Python raises where the system starts no thread.
@pytest.mark.parametrize("error", [Fault(), RuntimeError("of a handler")])
@pytest.mark.parametrize("begun", [False, True])
def test_an_exception_of_a_handler_while_a_worker_starts_is_raised_and_leaves_no_worker(monkeypatch, begun, error):
    begin, workers = threads.start_new_thread, []

    def interrupted(function, arguments):
        workers.append(function.__self__)
        if begun or len(workers) == 1:
            begin(function, arguments)
        if len(workers) == 2:
            raise error

    monkeypatch.setattr(threads, "start_new_thread", interrupted)
    with pytest.raises(type(error)) as raised:
        Team(4)
    assert raised.value is error and len(workers) == 2
    for worker in workers[: 1 + begun]:
        ended(worker)


def test_where_the_system_starts_no_thread_the_message_says_so():
    before = threading.stack_size(1 << 50)
    try:
        with pytest.raises(RuntimeError, match="asked for 2, but the system starts no more"):
            Team(2)
    finally:
        threading.stack_size(before)


def test_a_worker_that_died_is_replaced():
    team = Team(3)
    worker = team._crew.workers[1]
    worker.mailbox.put(None)
    ended(worker)
    assert meets(team)


def test_run_apart_runs_on_another_thread_and_raises_what_it_raises():
    team, seen = Team(2), []
    team.run_apart(lambda: seen.append(threading.get_ident()))
    assert len(seen) == 1
    assert seen[0] != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        team.run_apart(lambda: 1 / 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own():
    team = Team(3)
    assert meets(team)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os._exit(0 if meets(team) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert meets(team)


def test_two_callers_of_a_team_take_turns():
    team, within, most = Team(2), [0], [0]

    def alone(thread, n_threads):
        if thread == 0:
            within[0] += 1
            most[0] = max(most[0], within[0])
            time.sleep(0.01)
            within[0] -= 1

    callers = [threading.Thread(target=team.run, args=(alone,)) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert most == [1]


def test_workers_end_with_their_team_and_keep_no_array():
    team, array = Team(3), np.zeros(3)
    workers, idle = team._crew.workers, sys.getrefcount(array)

    def use(thread, n_threads, given):
        given[thread] = 1

    team.run(use, array)
    assert array.all()
    assert sys.getrefcount(array) == idle
    del team
    gc.collect()
    for worker in workers:
        ended(worker)


def test_disabled_compilation_is_refused(monkeypatch):
    monkeypatch.setattr(threads.config, "DISABLE_JIT", 1)
    with pytest.raises(BackendUnavailable, match=r"NUMBA_DISABLE_JIT is set.*use backend='reference'"):
        Team(1)
