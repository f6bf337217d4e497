"""AdaPrune: refit the kept weights of a pruned matrix on calibration inputs, without training (Hubara et al. 2021).

The kept weights minimise |X W' - X W|^2, where X are the events that the matrix receives in the network before pruning
and W are its weights before pruning. Each matrix is refitted independently. The least-squares problem is solved by
conjugate gradients; the paper uses Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from eventrnn import counting
from eventrnn._checks import float32_array, need_flag, need_kind, need_mask, need_number, need_whole
from eventrnn.network import Network
from eventrnn.pruning.patterns import Pattern, prunable_matrices
from eventrnn.simulation import simulate
from eventrnn.weights import Dense


@dataclass(frozen=True)
class Fit:
    """Relative error |X W' - X W|^2 / |X W|^2 of one matrix.

    Attributes
    ----------
    masked    : with the masked weights
    refitted  : with the refitted weights
    """

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
    """Prune a network to a pattern by magnitude and refit the kept weights. Returns it and the fit of each matrix.

    Parameters
    ----------
    inputs        : inputs for `simulate`; steps times samples should exceed the number of presynaptic units, a few
                    thousand for example
    pattern       : pattern of every matrix; or masks by matrix name, which need `store`
    store         : pattern in whose format given masks are stored
    names, exempt : see `Pruning`
    bias          : refit the bias of each matrix as well
    tolerance     : the iteration ends when the norm of the gradient of each output has fallen by this factor
    iterations    : most iterations of conjugate gradients; each multiplies (n_pre, n_pre) by (n_pre, n_post)
    report        : called with the name of the matrix, the number of matrices done and their total number

    Where the reset gate comes first (EGRU "paper", GRU "before") the candidate takes `r y`; the recurrent matrix is
    refitted for `y` there, too. Storage is kept; int8 weights get new scales, because weights grow. Weights that were
    pruned before stay pruned. Raises ValueError for inputs that the network cannot take, for masks of another shape and
    for masks without `store`.
    """
    _check_iteration(bias, tolerance, iterations)
    need_kind("pattern", pattern, (Pattern, Mapping), "a pattern, or a mapping of names of matrices to masks")
    matrices = prunable_matrices(network, names if isinstance(pattern, Pattern) else tuple(pattern), exempt)
    keeper = store if store is not None else pattern
    if not isinstance(keeper, Pattern):
        raise ValueError("store: got none, but masks are given; give the pattern in whose format they are stored")
    simulation = simulate(network, inputs, record="events")  # type: ignore[arg-type]
    changed, biases, fits = {}, {}, {}
    for done, (name, (_, events)) in enumerate(counting.events_by_matrix(network, simulation).items()):
        if name not in matrices:
            continue
        report(name, done, len(matrices))
        old = matrices[name]
        dense = old.to_dense()
        mask = pattern.mask(name, dense) if isinstance(pattern, Pattern) else pattern[name]
        mask = need_mask(f"mask of {name}", mask, dense.shape) & (dense != 0)
        sent = events.to_dense().reshape(-1, dense.shape[0])
        fitted, shift, fits[name] = refit(dense, mask, sent, bias=bias, tolerance=tolerance, iterations=iterations)
        made = keeper.store(name, Dense(fitted))
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
    """Weights within a mask, and a change of the bias, that minimise the squared error to `sent @ dense`.

    Parameters
    ----------
    dense, mask : (n_pre, n_post)
    sent        : (samples, n_pre) values that the matrix receives
    others      : see `adaprune`

    Returns weights (n_pre, n_post) float32, the change of the bias (n_post,) float32 (zeros without `bias`), and the
    fit. Conjugate gradients on the normal equations of all outputs at once, in float64, starting from the masked
    weights. Weights that `sent` does not determine, those of a unit without events, keep their values.
    """
    _check_iteration(bias, tolerance, iterations)
    dense = float32_array("dense", dense, "(n_pre, n_post)", ndim=2)
    sent = float32_array("sent", sent, "(samples, n_pre)", ndim=2)
    if sent.shape[1] != len(dense):
        raise ValueError(f"sent: got shape {sent.shape}, need (samples, {len(dense)}) for weights {dense.shape}")
    mask = need_mask("mask", mask, dense.shape)
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


def _check_iteration(bias: bool, tolerance: float, iterations: int) -> None:
    need_flag("bias", bias)
    need_number("tolerance", tolerance, at_least=0)
    need_whole("iterations", iterations, at_least=0)


def _with_biases(network: Network, shifts: Mapping[str, np.ndarray]) -> Network:
    """The network with `shifts`, by name of the matrix, added to the biases of the matrices."""
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
