"""Training on a GPU made of NumPy: the training kernels themselves run as plain Python, products in NumPy."""

from __future__ import annotations

import numpy as np

from support.fake_gpu import FakeDevice, enqueued, half, widened
from support.python_kernels import in_python


class TrainingDevice(FakeDevice):
    """`device.Device` for `cuda.training`; every kernel runs with one thread per block."""

    def __init__(self, room: int = 1 << 40):
        super().__init__(room)
        self.functions: dict = {}

    def kernel(self, key, make, threads):
        if key not in self.functions:
            self.functions[key] = make()[0]
        return key

    def launch(self, kernel, blocks, threads, *arguments, stream=None) -> None:
        if isinstance(blocks, tuple):
            # Kernels with a grid of two dimensions own one unit per thread, and here a block has one thread.
            blocks = blocks[0] * threads, blocks[1]
        if (kernel, blocks) not in self.functions:
            grid = blocks if isinstance(blocks, tuple) else (blocks, 1)
            self.functions[kernel, blocks] = in_python(self.functions[kernel], grid)
        enqueued(self.functions[kernel, blocks])(*arguments)


class Cublas:
    """`cublas.Cublas` for `cuda.training`."""

    def __init__(self, device, queue=None):
        self.device = device

    def multiply(self, precision, a, b, out, shape, *, multiprocessors=0, count=1, accumulate=False) -> None:
        enqueued(_multiply)(precision, a, b, out, *shape, count, accumulate)


@np.errstate(all="ignore")
def _multiply(precision, a, b, out, rows, width, columns, count, accumulate) -> None:
    size = 2 if precision == "bfloat16" else 4
    for k in range(count):
        left, right = (each._replace(at=each.at + size * k * each.apart) for each in (a, b))
        target = _stored(out._replace(at=out.at + 4 * k * out.apart), rows, columns, "float32")
        product = _matrix(left, rows, width, precision) @ _matrix(right, width, columns, precision)
        target[...] = target + product if accumulate else product


def _matrix(factor, rows: int, columns: int, precision: str) -> np.ndarray:
    if factor.transposed:
        return widened(np.ascontiguousarray(_stored(factor, columns, rows, precision)), precision).T
    return widened(np.ascontiguousarray(_stored(factor, rows, columns, precision)), precision)


def _stored(factor, rows: int, columns: int, precision: str) -> np.ndarray:
    """The words of an array in memory, (rows, columns)."""
    words = half(factor.at, (rows - 1) * factor.pitch + columns, "bfloat16" if precision == "bfloat16" else "tf32")
    return np.lib.stride_tricks.as_strided(words, (rows, columns), (factor.pitch * words.itemsize, words.itemsize))


def install(monkeypatch, room: int = 1 << 40) -> TrainingDevice:
    """Let `backend="cuda"` train on a fake."""
    from eventrnn.cuda.training import engine, lanes

    device = TrainingDevice(room)
    monkeypatch.setattr(engine, "current_device", lambda: device)
    monkeypatch.setattr(lanes, "Cublas", Cublas)
    return device
