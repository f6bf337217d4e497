"""Random networks and events of a given size, sparsity and activity."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from eventrnn import training
from eventrnn._checks import need_choice, need_number, need_pair, need_whole
from eventrnn.backend import Backend
from eventrnn.bench.case import Case
from eventrnn.cells import Cell
from eventrnn.events import Events
from eventrnn.network import Layer, Network
from eventrnn.simulation import Simulation, simulate
from eventrnn.weights import FORMATS, STORAGES, Weights, check_block, convert

# Above this activity the candidate gates get a positive bias. Without it half of all cells are negative and never fire.
BIASED_ACTIVITY = 0.4

CANDIDATE_BIAS = 8.0

# Largest difference of the measured from the requested activity, as a share of the requested one.
ACTIVITY_TOLERANCE = 0.1


# Bytes per weight while random weights are made: two arrays of float64, one of float32 and a mask.
MAKING_BYTES = 21


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
    """Gaussian weights (n_pre, n_post) with a share `sparsity` of the blocks or weights left out, or n of each m kept.

    The scale makes the deviation of a drive independent of size and sparsity. O(n_pre * n_post). Raises ValueError for
    a sparsity outside [0, 1), for one with the dense format, and for a matrix that this machine cannot make.
    """
    need_pair("shape", shape, "two sizes >= 1 (n_pre, n_post)")
    need_number("sparsity", sparsity, at_least=0, below=1, what="share")
    need_choice("format", format, FORMATS)
    need_choice("dtype", dtype, STORAGES)
    needed, memory = MAKING_BYTES * shape[0] * shape[1], os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        raise ValueError(
            f"hidden: making {shape[0]} x {shape[1]} random weights takes {needed / 2**30:,.0f} GiB, and this machine "
            f"has {memory / 2**30:.0f} GiB; give fewer units"
        )
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
    scores = np.full((shape[0], groups * m), 2.0)  # padding of the last group is never among the n smallest
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
    """Layers of `hidden` units on `hidden` inputs, with `random_weights`, and zero biases and thresholds."""

    def weights() -> Weights:
        return random_weights(
            (hidden, 3 * hidden), sparsity=sparsity, format=format, block=block, nm=nm, dtype=dtype, rng=rng
        )

    zeros = np.zeros(3 * hidden, np.float32)
    cell = Cell(variant=variant)
    layer = [Layer(weights(), weights(), zeros, zeros, np.zeros(hidden, np.float32), cell) for _ in range(layers)]
    return Network(tuple(layer))


def at_activity(network: Network, inputs: Events, activity: float, backend: str = "cpu") -> Network:
    """The network with one threshold per layer so that it has this activity on them (`training.at_activity`).

    Above `BIASED_ACTIVITY` the candidate gates get a positive bias. The thresholds of the network must be equal within
    a layer.
    """
    need_number("activity", activity, above=0, at_most=1, what="share")
    if activity > BIASED_ACTIVITY:
        layers = []
        for layer in network.layers:
            bias = layer.bias_in.copy()
            bias[2 * layer.units :] = CANDIDATE_BIAS
            layers.append(replace(layer, bias_in=bias))
        network = replace(network, layers=tuple(layers))
    return training.at_activity(network, inputs, activity, backend=backend)


def random_events(steps: int, batch: int, size: int, activity: float, rng: np.random.Generator) -> Events:
    """Graded events (steps, batch, size) in [0.25, 1); each unit fires in each step with probability `activity`."""
    for name, n in (("steps", steps), ("batch", batch), ("size", size)):
        need_whole(name, n, at_least=0)
    need_number("activity", activity, at_least=0, at_most=1, what="share")
    fired = rng.random((steps, batch, size)) < activity
    return Events.from_dense(np.where(fired, rng.uniform(0.25, 1, fired.shape), 0).astype(np.float32))


@dataclass(frozen=True)
class PreparedNetwork:
    """A random network at the activity of its case.

    Attributes
    ----------
    network, inputs : the network, and its input events (steps, batch, hidden)
    simulation      : its recorded run over the inputs
    activity        : measured activity, the mean over the layers
    compile_seconds : seconds of the first run
    """

    network: Network
    inputs: Events
    simulation: Simulation
    activity: float
    compile_seconds: float


def prepare_network(case: Case, backend: str | Backend, report: Callable[[str], None]) -> PreparedNetwork:
    """Draw the network and the inputs of a case, compile, and set the thresholds for the activity of the case.

    backend : runs the recorded simulation; the thresholds are searched with the default backend of the case's device

    Raises ValueError where no threshold brings the measured activity within `ACTIVITY_TOLERANCE` of the case's.
    """
    rng = np.random.default_rng(case.seed)
    network = random_network(
        case.hidden,
        case.layers,
        sparsity=case.left_out,
        format=case.format,
        block=case.block,
        variant=case.variant,
        rng=rng,
        nm=case.nm,
        dtype=case.dtype,
    )
    inputs = random_events(case.steps, case.batch, case.hidden, case.activity, rng)
    report("compiling")
    started = time.perf_counter()
    simulate(network, inputs, backend=case.backend)
    compile_seconds = time.perf_counter() - started
    report("setting the activity")
    network = at_activity(network, inputs, case.activity, case.backend)
    simulation = simulate(network, inputs, backend=backend, record="events")
    measured = float(np.mean(simulation.activity))
    if abs(measured - case.activity) > ACTIVITY_TOLERANCE * case.activity:
        raise ValueError(
            f"activity: got {case.activity}, but thresholds bring this random network to {measured:.3f} at best; "
            "use a lower activity or more units"
        )
    return PreparedNetwork(network, inputs, simulation, measured, compile_seconds)
