"""Large copies between the host's arrays and the GPU's.

The driver copies ordinary memory by one thread, through pinned memory of its own. Here threads fill and empty pinned
pieces beside each other, and beside the GPU: on an H100 thirty gigabytes a second into a new array instead of two.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

# Bytes of a pinned buffer, and from how many on a copy goes through them.
STAGING_BYTES, LARGE = 4 << 20, 16 << 20

THREADS = min(8, os.cpu_count() or 1)

BUFFERS = THREADS + 2


class StagedCopier:
    """Pinned pieces, kept, and where on the stream each was last used."""

    def __init__(self, arrays: Any, queue: Any):
        self.queue = queue
        pinned = arrays.cuda.alloc_pinned_memory
        self.buffers = [np.frombuffer(pinned(STAGING_BYTES), np.uint8, STAGING_BYTES) for _ in range(BUFFERS)]
        self.used: list[Any] = [None] * BUFFERS

    def fetch(self, source: Any, target: np.ndarray) -> None:
        """From the GPU to the host, both contiguous, on the device's stream; done on return."""
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
        """From the host to the GPU, both contiguous, on the device's stream; the source may change on return."""
        here, there = source.reshape(-1).view(np.uint8), target.view(np.uint8).ravel()
        with self._threads() as start:
            cuts = list(_cuts(len(here)))
            filled: list[Future | None] = [None] * BUFFERS
            for number in range(len(cuts) + BUFFERS):
                own = number % BUFFERS
                if number >= BUFFERS:
                    # The copy of a piece begins once it is full, in order.
                    begin, end = cuts[number - BUFFERS]
                    _finish(filled[own])
                    there[begin:end].data.copy_from_host_async(self.buffers[own].ctypes.data, end - begin)
                    self.used[own] = self.queue.record()
                if number < len(cuts):
                    begin, end = cuts[number]
                    filled[own] = start(_after, self.used[own], self.buffers[own][: end - begin], here[begin:end])

    @contextmanager
    def _threads(self) -> Iterator[Callable[..., Future]]:
        # Whatever happens, no thread writes to anybody's memory any more afterwards.
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
