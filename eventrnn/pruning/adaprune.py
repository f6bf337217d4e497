"""AdaPrune: what stays makes up for what goes, matrix by matrix, on a few calibration inputs and with no training.

Of each product X W of the network as it was, the pruned matrix keeps what it can: least squares on the weights that
its mask keeps (Hubara et al. 2021, there by Adam). Matrices do not know of each other; the events X are those of the
network before pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from eventrnn import counting
from eventrnn.network import Network
from eventrnn.pruning.patterns import Pattern, prunable_matrices
from eventrnn.simulation import simulate
from eventrnn.weights import Dense


@dataclass(frozen=True)
class Fit:
    """How well one matrix was made up for: |X W' - X W|^2 / |X W|^2 with weights only masked, and refitted."""

    masked: float
    refitted: float


def adaprune(
    network: Network,
    inputs: np.ndarray | object,
    pattern: Pattern | Mapping[str, np.ndarray],
    *,
    store: Pattern | None = None,
    names: tuple[str, ...] | None = None,
    exempt: tuple[str, ...] = (),
    bias: bool = True,
    tolerance: float = 1e-5,
    iterations: int = 200,
    report: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> tuple[Network, dict[str, Fit]]:
    """The network pruned to a pattern by magnitude and refitted, in the pattern's format; and how well that went.

    Parameters
    ----------
    inputs     : what `simulate` takes; a few thousand steps times samples. Unknowns should be fewer than these
    pattern    : of every matrix; or masks by matrix name, then `store` says in which format they are kept
    names      : and `exempt`: which matrices, as `Pruning`
    bias       : refit each matrix's bias with it
    tolerance  : of the gradient of each output's squares, as a share of what it was
    iterations : of conjugate gradients at most, a product of (n_pre, n_pre) and (n_pre, n_post) each
    report     : called with the matrix, how many are done, and of how many

    Of the paper's variant, whose candidate takes `r y`, the recurrent matrix is refitted for `y` all the same.
    Narrow storage is kept; int8 takes new scales, since weights grow. A matrix already pruned is not filled again.
    Raises ValueError for inputs that the network cannot take and for masks of another shape.
    """
    matrices = prunable_matrices(network, names if isinstance(pattern, Pattern) else tuple(pattern), exempt)
    keeper = store if store is not None else pattern
    if not isinstance(keeper, Pattern):
        raise ValueError("store: got none for given masks; say in which pattern's format they are kept")
    simulation = simulate(network, inputs, record="events")  # type: ignore[arg-type]
    changed, biases, fits = {}, {}, {}
    for done, (name, (_, events)) in enumerate(counting.senders(network, simulation).items()):
        if name not in matrices:
            continue
        report(name, done, len(matrices))
        old = matrices[name]
        dense = old.to_dense()
        mask = pattern.mask(name, dense) if isinstance(pattern, Pattern) else pattern[name]
        if mask.shape != dense.shape:
            raise ValueError(f"mask: {name} has shape {dense.shape}, got a mask of {mask.shape}")
        mask = mask & (dense != 0)
        sent = events.to_dense().reshape(-1, dense.shape[0])
        fitted, shift, fits[name] = refit(dense, mask, sent, bias=bias, tolerance=tolerance, iterations=iterations)
        made = keeper.store(Dense(fitted))
        changed[name] = made if old.storage == "float32" else made.stored_as(old.storage)
        biases[name] = shift
    return _with_biases(network.with_matrices(changed), biases) if bias else network.with_matrices(changed), fits


def refit(
    dense: np.ndarray,
    mask: np.ndarray,
    sent: np.ndarray,
    *,
    bias: bool = True,
    tolerance: float = 1e-5,
    iterations: int = 200,
) -> tuple[np.ndarray, np.ndarray, Fit]:
    """Weights within a mask, and what to add to a bias, that come nearest to `sent @ dense`.

    dense, mask : (n_pre, n_post)
    sent        : (samples, n_pre)

    Conjugate gradients on the normal equations of every output at once, in float64, from the masked weights; where
    `sent` does not say (a unit that never fired), weights stay as they were. Returns (n_pre, n_post) float32,
    (n_post,) float32 (zeros without `bias`), and the fit.
    """
    samples = np.concatenate([sent, np.ones((len(sent), 1))], axis=1) if bias else sent
    squares = samples.T.astype(np.float64) @ samples
    target = np.zeros((len(squares), dense.shape[1]))
    target[: len(dense)] = dense
    free = np.ones(target.shape, bool)
    free[: len(dense)] = mask
    found = np.where(free, target, 0)
    whole = float(np.einsum("ij,ij->", target, squares @ target)) or 1.0

    def left() -> float:
        error = found - target
        return float(np.einsum("ij,ij->", error, squares @ error)) / whole

    before = left()
    residual = np.where(free, squares @ (target - found), 0)
    direction, size = residual.copy(), np.square(residual).sum(axis=0)
    goal = tolerance**2 * size
    for _ in range(iterations):
        if (size <= goal).all():
            break
        curved = np.where(free, squares @ direction, 0)
        curvature = np.einsum("ij,ij->j", direction, curved)
        active = (size > goal) & (curvature > 0)
        step = np.where(active, size / np.where(active, curvature, 1), 0)
        found += step * direction
        residual -= step * curved
        after = np.square(residual).sum(axis=0)
        direction = residual + np.where(active, after / np.where(active, size, 1), 0) * direction
        size = np.where(active, after, 0)
    weights = np.where(mask, found[: len(dense)], 0).astype(np.float32)
    shift = found[-1].astype(np.float32) if bias else np.zeros(dense.shape[1], np.float32)
    return weights, shift, Fit(before, left())


def _with_biases(network: Network, shifts: Mapping[str, np.ndarray]) -> Network:
    """The network with these added to the biases that belong to the matrices."""
    layers = list(network.layers)
    for k, layer in enumerate(layers):
        changed = {
            f"bias_{side}": getattr(layer, f"bias_{side}") + shifts[f"layers.{k}.w_{side}"]
            for side in ("in", "rec")
            if f"layers.{k}.w_{side}" in shifts
        }
        layers[k] = replace(layer, **changed)
    readout = network.readout
    if readout is not None and "readout" in shifts:
        readout = replace(readout, bias=readout.bias + shifts["readout"])
    return replace(network, layers=tuple(layers), readout=readout)
