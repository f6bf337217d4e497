"""Random networks and events of a given size, sparsity and activity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from eventrnn.cells import Cell
from eventrnn.events import Events
from eventrnn.network import Layer, Network
from eventrnn.simulation import simulate
from eventrnn.weights import Weights, check_block, convert

# Above this activity the candidate gates get a bias: without it half of all cells are negative and never fire.
BIASED_ACTIVITY = 0.4

CANDIDATE_BIAS = 8.0


def random_weights(
    shape: tuple[int, int],
    *,
    sparsity: float,
    format: str,
    block: tuple[int, int] | None = None,
    nm: tuple[int, int, str] | None = None,
    dtype: str = "float32",
    rng: np.random.Generator,
) -> Weights:
    """Gaussian weights (n_pre, n_post); `sparsity` of the blocks (or weights) left out, or n random ones of m kept.

    Scaled so that a drive's deviation does not depend on size and sparsity. O(size of the matrix).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: got {sparsity}, need a share in [0, 1)")
    if format == "dense" and sparsity:
        raise ValueError(f"sparsity: got {sparsity} with format dense, which stores every weight; use csr or block")
    if nm is not None:
        mask, kept = _nm_mask(shape, *nm, rng), nm[0] / nm[1]
    else:
        mask, kept = _block_mask(shape, block or (1, 1), sparsity, rng), 1 - sparsity
    scale = 2 / np.sqrt(shape[0] * kept)
    dense = (rng.standard_normal(shape) * scale * mask).astype(np.float32)
    return convert(dense, format, block=block, nm=nm, storage=dtype)


def _block_mask(shape: tuple[int, int], block: tuple[int, int], sparsity: float, rng: np.random.Generator):
    r, c = block
    check_block((r, c), shape)
    grid = (-(-shape[0] // r), -(-shape[1] // c))
    kept = np.ones(grid[0] * grid[1], bool)
    kept[rng.permutation(len(kept))[: round(sparsity * len(kept))]] = False
    return np.repeat(np.repeat(kept.reshape(grid), r, axis=0), c, axis=1)[: shape[0], : shape[1]]


def _nm_mask(shape: tuple[int, int], n: int, m: int, axis: str, rng: np.random.Generator):
    if axis == "pre":
        return _nm_mask((shape[1], shape[0]), n, m, "post", rng).T
    groups = -(-shape[1] // m)
    scores = np.full((shape[0], groups * m), 2.0)  # what pads the last group comes last
    scores[:, : shape[1]] = rng.random(shape)
    ranks = scores.reshape(shape[0], groups, m).argsort(axis=2).argsort(axis=2)
    return (ranks < n).reshape(shape[0], -1)[:, : shape[1]]


def random_network(
    hidden: int,
    layers: int,
    *,
    sparsity: float,
    format: str,
    block: tuple[int, int] | None,
    variant: str,
    rng: np.random.Generator,
    nm: tuple[int, int, str] | None = None,
    dtype: str = "float32",
) -> Network:
    """Layers of `hidden` units on `hidden` inputs, biases and thresholds zero; weights as of `random_weights`."""

    def weights() -> Weights:
        return random_weights(
            (hidden, 3 * hidden), sparsity=sparsity, format=format, block=block, nm=nm, dtype=dtype, rng=rng
        )

    zeros = np.zeros(3 * hidden, np.float32)
    cell = Cell(variant=variant)
    layer = [Layer(weights(), weights(), zeros, zeros, np.zeros(hidden, np.float32), cell) for _ in range(layers)]
    return Network(tuple(layer))


def at_activity(network: Network, inputs: Events, activity: float, backend: str = "cpu") -> Network:
    """The network with each layer's common threshold bisected until it fires at the asked rate on these inputs.

    For more than `BIASED_ACTIVITY`, candidates are biased upwards. Cost: 14 runs a layer.
    """
    layers: list[Layer] = []
    for layer in network.layers:
        if activity > BIASED_ACTIVITY:
            bias = layer.bias_in.copy()
            bias[2 * layer.units :] = CANDIDATE_BIAS
            layer = replace(layer, bias_in=bias)
        low, high = 0.0, 2.0
        for _ in range(14):
            threshold = np.full(layer.units, (low + high) / 2, np.float32)
            tried = [*layers, replace(layer, threshold=threshold)]
            measured = simulate(Network(tuple(tried)), inputs, backend=backend).activity[-1]
            low, high = ((low + high) / 2, high) if measured > activity else (low, (low + high) / 2)
        layers.append(replace(layer, threshold=np.full(layer.units, high, np.float32)))
    return replace(network, layers=tuple(layers))


def random_events(steps: int, batch: int, size: int, activity: float, rng: np.random.Generator) -> Events:
    """Graded events, each unit at each step with probability `activity`, values in [0.25, 1)."""
    fired = rng.random((steps, batch, size)) < activity
    return Events.from_dense(np.where(fired, rng.uniform(0.25, 1, fired.shape), 0).astype(np.float32))
