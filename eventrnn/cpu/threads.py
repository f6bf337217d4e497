"""Thread pools whose threads run one compiled function together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from threading import Event

import numpy as np
from threadpoolctl import ThreadpoolController


def start_pool(threads: int) -> ThreadPoolExecutor:
    """A pool of which every thread has started.

    A thread that the system refused in the middle of a run would leave the others waiting at their barrier for ever.

    Raises
    ------
    RuntimeError : the system starts no more threads
    """
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
    """Threads that run one compiled function together, each with its own number; the caller is thread 0."""

    def __init__(self, threads: int):
        self.threads = threads
        self.pool = start_pool(threads - 1) if threads > 1 else None

    def run(self, function: Callable, *arguments, counter: bool = False) -> None:
        """Call function(thread, n_threads, [counter,] *arguments) on every thread; returns when all have returned.

        counter : also pass an int64 array (1,), zero at first and shared by all threads, which the function uses as
                  barrier or as work counter (`kernels/sync.py`)
        """
        shared = (np.zeros(1, np.int64),) if counter else ()
        if self.pool is None:
            function(0, 1, *shared, *arguments)
            return
        others = [
            self.pool.submit(function, thread, self.threads, *shared, *arguments) for thread in range(1, self.threads)
        ]
        function(0, self.threads, *shared, *arguments)
        for other in others:
            other.result()

    def multiply(self, a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """a @ b through BLAS; the longer side of the result is split between the threads.

        BLAS runs on one thread here. Its own worker threads keep spinning after a call, on the cores that the next
        kernel needs.
        """
        out = np.empty((a.shape[0], b.shape[1]), np.float32) if out is None else out
        if self.pool is None:
            return np.matmul(a, b, out=out)
        rows, columns = out.shape
        bounds = [max(rows, columns) * thread // self.threads for thread in range(self.threads + 1)]
        shares = [slice(*pair) for pair in pairwise(bounds)]
        jobs = [(a[s], b, out[s]) if rows >= columns else (a, b[:, s], out[:, s]) for s in shares]
        with _blas().limit(limits=1, user_api="blas"):
            others = [self.pool.submit(np.matmul, *job) for job in jobs[1:]]
            np.matmul(*jobs[0])
            for other in others:
                other.result()
        return out


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()
