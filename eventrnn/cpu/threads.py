"""What threads need to meet: a pool that is there, a counter that all add to, and ways to wait for it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from threading import Event

import numpy as np
from threadpoolctl import ThreadpoolController


def started(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads all run: a thread that could not be started in the midst of a run would leave the others
    waiting at their barrier for ever."""
    pool, go = ThreadPoolExecutor(threads), Event()
    try:
        for _ in range(threads):
            pool.submit(go.wait)
    except RuntimeError as error:
        pool.shutdown(wait=False)
        raise RuntimeError(f"threads: asked for {threads + 1}, but the system starts no more ({error})") from error
    finally:
        go.set()
    return pool


class Team:
    """Threads that run one compiled function together, each with its part."""

    def __init__(self, threads: int):
        self.threads = threads
        self.pool = started(threads - 1) if threads > 1 else None

    def run(self, function: Callable, *arguments, counter: bool = False) -> None:
        """function(part, threads, [counter,] *arguments) on every thread; returns when all have. A counter, shared and
        zero at first, is a barrier to meet at or a queue to take work from (`eventrnn.team`)."""
        shared = (np.zeros(1, np.int64),) if counter else ()
        if self.pool is None:
            function(0, 1, *shared, *arguments)
            return
        others = [
            self.pool.submit(function, part, self.threads, *shared, *arguments) for part in range(1, self.threads)
        ]
        function(0, self.threads, *shared, *arguments)
        for other in others:
            other.result()

    def multiply(self, a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """a @ b through BLAS, a part of the longer side of the result on each thread, and on one thread of BLAS: its
        own would go on waiting in a loop, after their work, on the cores that the next kernel wants."""
        out = np.empty((a.shape[0], b.shape[1]), np.float32) if out is None else out
        if self.pool is None:
            return np.matmul(a, b, out=out)
        rows, columns = out.shape
        edges = [max(rows, columns) * part // self.threads for part in range(self.threads + 1)]
        parts = [slice(*edge) for edge in pairwise(edges)]
        jobs = [(a[p], b, out[p]) if rows >= columns else (a, b[:, p], out[:, p]) for p in parts]
        with _blas().limit(limits=1, user_api="blas"):
            others = [self.pool.submit(np.matmul, *job) for job in jobs[1:]]
            np.matmul(*jobs[0])
            for other in others:
                other.result()
        return out


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
