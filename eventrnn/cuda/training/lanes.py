"""Lanes: streams that work side by side, each with its own cuBLAS handle, in a way that one graph can capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from eventrnn.cuda.cublas import Cublas
from eventrnn.cuda.training.kernels.threads import BYTES

if TYPE_CHECKING:
    from eventrnn.cuda.device import Device

# Threads per block of kernels whose threads own every n-th element, and of those that sum over a block.
THREADS, SUM_THREADS = 256, 256

# Threads per block of the kernels of a step.
STEP_THREADS = 128

# Most rows of blocks of a grid.
MOST_BLOCK_ROWS = 65535

# Most blocks of a kernel whose threads own every n-th element, per multiprocessor.
BLOCKS_PER_MULTIPROCESSOR = 16


def bits(number: float | np.floating) -> int:
    """The bits of a float32, as kernels take it."""
    return int(np.float32(number).view(np.int32))


class Factor(NamedTuple):
    """A matrix of a product, or several: address, elements from one row to the next, whether it is stored transposed,
    and elements from one of several matrices to the next."""

    at: int
    pitch: int
    transposed: bool = False
    apart: int = 0

    @property
    def turned(self) -> Factor:
        """The transposed matrix."""
        return self._replace(transposed=not self.transposed)


class Lane:
    """A stream of a device with its cuBLAS handle.

    device, precision : the device, and the type of operands
    first             : use the device's own stream instead of a new one
    urgent            : its kernels start before those of other lanes
    """

    def __init__(self, device: Device, precision: str, *, first: bool = False, urgent: bool = False):
        self.device, self.precision, self.size = device, precision, BYTES[precision]
        self.stream, self.queue = (device.stream, device.queue) if first else device.new_stream(urgent=urgent)
        self.cublas = Cublas(device, self.queue)

    def each(self, key: tuple, make: Callable[[], tuple], elements: int, *arguments: int) -> None:
        """Launch a kernel whose threads own every n-th of so many elements."""
        most = BLOCKS_PER_MULTIPROCESSOR * self.device.multiprocessors
        self.blocks(key, make, min(most, -(-elements // THREADS)), *arguments)

    def units(self, key: tuple, make: Callable[[], tuple], units: int, samples: int, *arguments: int) -> None:
        """Launch a kernel whose threads own units, and whose rows of blocks own every n-th sample."""
        rows = min(samples, MOST_BLOCK_ROWS)
        self.blocks(key, make, (-(-units // STEP_THREADS), rows), *arguments, threads=STEP_THREADS)

    def blocks(
        self,
        key: tuple,
        make: Callable[[], tuple],
        blocks: int | tuple[int, int],
        *arguments: int,
        threads: int = THREADS,
    ) -> None:
        """Launch so many blocks of a kernel."""
        if blocks:
            kernel = self.device.kernel(("training", *key), make, threads)
            self.device.launch(kernel, blocks, threads, *arguments, stream=self.stream)

    def multiply(
        self,
        a: Factor,
        b: Factor,
        out: Factor,
        rows: int,
        width: int,
        columns: int,
        *,
        share: int = 1,
        count: int = 1,
        accumulate: bool = False,
    ) -> None:
        """out (rows, columns) float32 = a (rows, width) @ b (width, columns); operands of this lane's precision.

        share      : the kernel is chosen for one of so many shares of the multiprocessors
        count      : number of products, each of matrices of their own (`Factor.apart`)
        accumulate : add to `out`
        """
        part = 0 if share == 1 else max(1, self.device.multiprocessors // share)
        if rows and columns:
            self.cublas.multiply(
                self.precision,
                a,
                b,
                out,
                (rows, width, columns),
                multiprocessors=part,
                count=count,
                accumulate=accumulate,
            )

    def clear(self, array: Any, nbytes: int | None = None) -> None:
        """Set bytes of an array to zero."""
        with self.queue:
            array.data.memset_async(0, array.nbytes if nbytes is None else nbytes)

    def record(self) -> Any:
        """A mark after the work so far."""
        return self.queue.record()

    def wait(self, mark: Any) -> None:
        """Let later work wait for a mark of another lane."""
        self.queue.wait_event(mark)
