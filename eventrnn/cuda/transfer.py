"""Large copies between host memory and GPU memory.

The driver copies pageable memory with one thread, through pinned memory of its own. Here several threads fill and empty
pinned staging buffers while the GPU copies others: 30 gigabytes per second into a new array on an H100, instead of two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

# Bytes of a staging buffer, and the size from which a copy goes through staging buffers.
STAGING_BYTES, LARGE = 4 << 20, 16 << 20

THREADS = min(8, os.cpu_count() or 1)

BUFFERS = THREADS + 2


class StagedCopier:
    """Pinned staging buffers, kept between copies, and the event on the stream after the last use of each."""

    def __init__(self, arrays: Any, queue: Any):
        self.queue = queue
        pinned = arrays.cuda.alloc_pinned_memory
        self.buffers = [np.frombuffer(pinned(STAGING_BYTES), np.uint8, STAGING_BYTES) for _ in range(BUFFERS)]
        self.used: list[Any] = [None] * BUFFERS

    def fetch(self, source: Any, target: np.ndarray) -> None:
        """Copy from the GPU to the host on the stream; complete on return. Both arrays are contiguous."""
        there, here = source.view(np.uint8).ravel(), target.reshape(-1).view(np.uint8)
        with self._threads() as start:
            pending: list[Future | None] = [None] * BUFFERS
            for number, (begin, end) in enumerate(_cuts(len(here))):
                own = number % BUFFERS
                _finish(pending[own])
                buffer = self.buffers[own][: end - begin]
                there[begin:end].data.copy_to_host_async(buffer.ctypes.data, end - begin)
                self.used[own] = self.queue.record()
                pending[own] = start(_after, self.used[own], here[begin:end], buffer)
            for each in pending:
                _finish(each)

    def send(self, source: np.ndarray, target: Any) -> None:
        """Copy from the host to the GPU on the stream; the source may change on return. Both arrays are contiguous."""
        here, there = source.reshape(-1).view(np.uint8), target.view(np.uint8).ravel()
        with self._threads() as start:
            cuts = list(_cuts(len(here)))
            filled: list[Future | None] = [None] * BUFFERS
            for number in range(len(cuts) + BUFFERS):
                own = number % BUFFERS
                if number >= BUFFERS:
                    # The copies are enqueued in order, each once its buffer is full.
                    begin, end = cuts[number - BUFFERS]
                    _finish(filled[own])
                    there[begin:end].data.copy_from_host_async(self.buffers[own].ctypes.data, end - begin)
                    self.used[own] = self.queue.record()
                if number < len(cuts):
                    begin, end = cuts[number]
                    filled[own] = start(_after, self.used[own], self.buffers[own][: end - begin], here[begin:end])

    @contextmanager
    def _threads(self) -> Iterator[Callable[..., Future]]:
        # Leaving the pool waits for its threads, so that none writes to the caller's memory afterwards.
        with ThreadPoolExecutor(THREADS) as pool:
            yield pool.submit


def _after(event: Any, target: np.ndarray, source: np.ndarray) -> None:
    if event is not None:
        event.synchronize()
    np.copyto(target, source)


def _finish(task: Future | None) -> None:
    if task is not None:
        task.result()


def _cuts(size: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size, STAGING_BYTES):
        yield begin, min(size, begin + STAGING_BYTES)
