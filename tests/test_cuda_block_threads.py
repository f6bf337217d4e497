"""Kernels of training on a GPU whose threads add up a block: many threads per block give what one thread gives.

The fake GPU has one thread per block. All numbers here are such that every sum is exact in any order.
"""

from __future__ import annotations

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from support.python_kernels import in_python

THREADS = 32


@pytest.fixture
def kernels():
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    from eventrnn.cuda.training.kernels import gated_blocks

    return gated_blocks


def run(kernel: tuple, blocks: int, threads: int, *arguments) -> None:
    in_python(kernel[0], (blocks, 1), threads)(*(a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments))


def chosen_by(kernels, threads: int, logits: np.ndarray, blocks: int, kept: int, softmax: bool) -> list[np.ndarray]:
    """What the choice writes: logits, gates, slopes, chosen blocks and faults."""
    rows, pitch = logits.shape
    inputs = np.ones((rows, 5), np.float32)
    logits, bias, faults = logits.copy(), np.zeros(blocks, np.float32), np.full(rows, 9)
    gates, slopes = (np.zeros((rows, pitch), np.float32) for _ in range(2))
    chosen, penalties = np.zeros((rows, pitch), np.uint8), np.ones(rows)
    sizes = blocks, pitch, np.array([kept])
    written = gates, slopes, chosen, faults, penalties
    kernel = kernels.choose_kernel("float32")
    run(kernel, rows, threads, logits, bias, inputs, 5, 5, *sizes, int(softmax), 1, *written)
    return [logits, *written]


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("blocks", "kept"), [(5, 2), (75, 40), (64, 64)])
def test_threads_of_a_block_choose_as_one_thread(kernels, softmax, blocks, kept):
    logits = np.zeros((2, -(-blocks // 8) * 8), np.float32)
    # Many logits are equal, also across threads; in the second row all of them.
    logits[0, :blocks] = np.random.default_rng(blocks).integers(-3, 4, blocks) + (0 if softmax else 4)
    one, many = (chosen_by(kernels, threads, logits, blocks, kept, softmax) for threads in (1, THREADS))
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))
    chosen, order = many[3], np.argsort(-logits[:, :blocks], axis=1, kind="stable")
    assert all(set(np.flatnonzero(row)) == set(own[:kept]) for row, own in zip(chosen, order, strict=True))


@pytest.mark.parametrize(
    ("units", "gates", "shift", "block"), [(5, 3, 1, (3, 4)), (9, 4, 0, (2, 36)), (11, 1, 0, (5, 1))]
)
def test_threads_of_a_block_spread_gradients_exactly(kernels, units, gates, shift, block):
    rng, rows, padded, columns, (height, width) = np.random.default_rng(units), 2, 16, gates * 16, block
    grid = -(-10 // height), -(-gates * units // width)
    pitch = -(-grid[0] * grid[1] // 8) * 8
    p = np.arange(gates * units)
    place = (p // units + shift) % gates * padded + p % units
    deltas, products = np.zeros((rows, columns), np.float32), np.zeros((rows, grid[0], columns), np.float32)
    deltas[:, place] = rng.integers(-4, 5, (rows, len(p)))
    products[:, :, place] = rng.integers(-4, 5, (rows, grid[0], len(p)))
    values = np.zeros((rows, pitch), np.float32)
    values[:, : grid[0] * grid[1]] = rng.integers(-2, 3, (rows, grid[0] * grid[1]))
    d_products, d_gates = np.zeros_like(products), np.zeros_like(values)
    sizes = pitch, *grid, width, units, padded, gates, shift
    kernel = kernels.spread_kernel("float32")
    run(kernel, rows * grid[0], THREADS, deltas, columns, products, values, *sizes, d_products, d_gates)
    of_blocks = values[:, : grid[0] * grid[1]].reshape(rows, *grid)
    expected = of_blocks[:, :, p // width] * deltas[:, None, place]
    assert np.array_equal(d_products[:, :, place], expected)
    terms = deltas[:, None, place] * products[:, :, place]
    sums = np.stack([terms[:, :, p // width == column].sum(axis=2) for column in range(grid[1])], axis=2)
    assert np.array_equal(d_gates[:, : grid[0] * grid[1]], sums.reshape(rows, -1))
    assert not d_gates[:, grid[0] * grid[1] :].any()


def test_threads_of_a_block_give_the_gradients_of_logits_of_one_thread(kernels):
    rng, rows, blocks, pitch = np.random.default_rng(3), 2, 75, 80
    d_gates, gates, slopes, logits = (rng.integers(-3, 4, (rows, pitch)).astype(np.float32) for _ in range(4))
    used, factor = rng.integers(0, 64, blocks) / 64, int(np.float32(0.5).view(np.int32))
    found = []
    for threads in (1, THREADS):
        penalties, d_logits = np.zeros(rows), np.zeros((rows, pitch), np.float32)
        arrays = d_gates, gates, slopes, logits
        kernel = kernels.logit_gradients_kernel("float32")
        run(kernel, rows, threads, *arrays, blocks, pitch, used, factor, penalties, d_logits)
        found.append((penalties, d_logits))
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][1][:, :blocks].any() and not found[0][1][:, blocks:].any()
