"""The processes of the other GPUs: started here, told what to do, watched, and ended.

A GPU that waits for another one waits for ever if that one is gone. So a thread watches the processes; once one of them
has ended, or an answer takes too long, it breaks off the copies between the GPUs and ends the other processes. The
call that waited then raises the error of the process that failed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

from eventrnn._gpus import VARIABLE
from eventrnn.backend import BackendUnavailable
from eventrnn.training.data_parallel.messages import Failure

M = TypeVar("M")

#: what a worker process runs; its argument is the descriptor of its connection
PROGRAM = "from eventrnn.training.data_parallel.worker import main; main()"

# Seconds that all devices may take for an answer or for an update. The first update compiles its kernels.
PATIENCE = 300.0

# Seconds between two looks at the processes; seconds that they have to end by themselves.
LOOK, GRACE = 0.05, 5.0

#: classes of errors that the error of a worker is raised as; any other becomes a RuntimeError
KINDS: dict[str, type[Exception]] = {"MemoryError": MemoryError, "BackendUnavailable": BackendUnavailable}


class Crew:
    """The workers of the ranks 1 to `ranks - 1`.

    gpus  : names of the GPUs, of which the first is that of this process
    abort : breaks off the copies between the GPUs; set once there are any
    """

    def __init__(self, gpus: list[str], ranks: int):
        self.ranks = ranks
        self.abort: Callable[[], None] = lambda: None
        self._failure: Exception | None = None
        #: the rank whose process has ended, or 0 after a time-out; None while all is well
        self._gone: int | None = None
        self._waits_since: float | None = None
        self._over = threading.Event()
        self._processes: dict[int, subprocess.Popen] = {}
        self._connections: dict[int, Connection] = {}
        try:
            for rank in range(1, ranks):
                # All GPUs stay visible, so that they can copy to each other; the first is the own one.
                self._start(rank, [*gpus[rank:], *gpus[:rank]])
        except BaseException:
            self.end()
            raise
        threading.Thread(target=self._watch, name="eventrnn devices", daemon=True).start()

    def _start(self, rank: int, gpus: list[str]) -> None:
        here, there = socket.socketpair()
        # A worker finds modules where this process finds them, also where a script has changed the path.
        path = [each for each in sys.path if isinstance(each, str)]
        with there:
            self._connections[rank] = Connection(here.detach())
            # In a session of its own, a worker gets no Ctrl-C of the terminal; this process decides what follows it.
            self._processes[rank] = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import sys; sys.path[:] = {path}; {PROGRAM}",
                    str(there.fileno()),
                    str(os.getpid()),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[there.fileno()],
                env=os.environ | {VARIABLE: ",".join(gpus)},
                start_new_session=True,
            )

    # --- talking ---

    def send(self, rank: int, message: Any) -> None:
        """Send a message to a worker. Raises the error of a process that has failed."""
        self.need_whole()
        try:
            self._connections[rank].send(message)
        except OSError:
            self._lost(rank)

    def receive(self, rank: int, kind: type[M]) -> M:
        """The next message of a worker, which must be of that kind. Raises the error of a process that has failed."""
        connection = self._connections[rank]
        with self.waiting():
            while not connection.poll(LOOK):
                self.need_whole()
            try:
                message = connection.recv()
            except (EOFError, OSError):
                self._lost(rank)
        if isinstance(message, Failure):
            self._fail(_error_of(rank, message))
        if not isinstance(message, kind):
            self._fail(RuntimeError(f"devices: device {rank} sent {type(message).__name__}, need {kind.__name__}"))
        return message

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the context, this process waits for others: after `PATIENCE` seconds they have failed. Raises their
        error at the end of the context; what the GPU has computed meanwhile does not count then."""
        outer, self._waits_since = self._waits_since, self._waits_since or time.monotonic()
        try:
            yield
        finally:
            self._waits_since = outer
        self.need_whole()

    def together(self, call: Callable[[], M]) -> M:
        """Make a call that returns once all ranks have made it. It runs on another thread, which is left behind where
        a process fails meanwhile."""
        results: list[M] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(call())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        with self.waiting():
            thread.start()
            while thread.is_alive():
                thread.join(LOOK)
                self.need_whole()
        if errors:
            raise errors[0]
        return results[0]

    # --- failing ---

    def need_whole(self) -> None:
        """Raise the error of a process that has failed."""
        if self._failure is None and self._gone is not None:
            self._failure = self._reason(self._gone)
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)

    def break_up(self, error: BaseException) -> None:
        """End the run on all devices, because rank 0 cannot go on.

        Where a worker had failed before, its error is raised in place of an `Exception` that came of it.
        """
        if self._failure is None and self._gone is None:
            why = f"an update on {self.ranks} devices was broken off ({type(error).__name__}: {error})"
            self._failure = RuntimeError(f"devices: {why}; make a new trainer")
            self._stop()
        elif isinstance(error, Exception):
            self.need_whole()

    def _fail(self, error: Exception) -> NoReturn:
        self._failure = error
        self._stop()
        raise error

    def _lost(self, rank: int) -> NoReturn:
        """Raise the error of a worker whose connection is closed."""
        self._fail(self._reason(rank))

    def _reason(self, rank: int) -> Exception:
        """Why a worker has ended: what it said last, or its exit code. 0: after a time-out"""
        if rank == 0:
            return RuntimeError(f"devices: no answer within {PATIENCE:.0f} s, so the run on all of them has ended")
        with suppress(EOFError, OSError):
            while self._connections[rank].poll(GRACE):
                message = self._connections[rank].recv()
                if isinstance(message, Failure):
                    return _error_of(rank, message)
        with suppress(subprocess.TimeoutExpired):
            self._processes[rank].wait(GRACE)
        code = self._processes[rank].returncode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return RuntimeError(f"devices: the process of device {rank} has ended with {how}")

    def _watch(self) -> None:
        """Notice a worker that has ended, also while this process waits for its GPU, and one that takes too long."""
        while not self._over.wait(LOOK):
            ended = [rank for rank, process in self._processes.items() if process.poll() is not None]
            since = self._waits_since
            if ended or (since is not None and time.monotonic() - since > PATIENCE):
                self._gone = ended[0] if ended else 0
                self._stop()

    def _stop(self) -> None:
        """Break off the copies between the GPUs, and kill the workers that still run."""
        self._over.set()
        # It returns once the GPU has given up, which its graphs can delay.
        threading.Thread(target=self.abort, daemon=True).start()
        for process in self._processes.values():
            with suppress(OSError):
                process.kill()

    # --- the end ---

    def end(self) -> None:
        """End the workers. Those that do not end by themselves are killed. The group of NCCL is left to the end of the
        process, since graphs may still refer to it."""
        self._over.set()
        if self._failure is None:
            self._failure = RuntimeError("devices: the processes of the other devices have been ended")
        for connection in self._connections.values():
            connection.close()
        until = time.monotonic() + GRACE
        for process in self._processes.values():
            try:
                process.wait(max(0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _error_of(rank: int, message: Failure) -> Exception:
    """The error of a worker, as rank 0 raises it."""
    kind = KINDS.get(message.kind)
    if kind is not None:
        return kind(f"device {rank}: {message.text}")
    return RuntimeError(f"device {rank}: {message.kind}: {message.text}")
