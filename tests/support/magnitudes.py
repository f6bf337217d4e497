"""Sums of the magnitudes that a backward pass adds up: S in the error bound gamma(n) S of tolerance.py."""

import numpy as np


def backward_magnitudes(cell, parameters: dict, x, tapes, d_y, d_c, d_cell=None) -> dict:
    """`reference.backward` in float64 with every term replaced by its magnitude and every difference by a sum.

    No intermediate result of a backward pass exceeds its value here, so that the sums cover the rounding of each.
    """
    size = {name: np.abs(value) for name, value in parameters.items()}
    w_rec, threshold, n = size["w_rec"], size["threshold"], len(size["threshold"])
    total = {name: np.zeros_like(value) for name, value in size.items()}
    d_x = np.zeros_like(x)
    d_cell = np.zeros_like(d_y) if d_cell is None else np.abs(d_cell)
    d_y_later, d_c_later = np.zeros_like(d_y[0]), np.zeros_like(d_c[0])
    for t in reversed(range(len(x))):
        k = tapes[t]
        dy, dc, y_before = np.abs(d_y[t]) + d_y_later, np.abs(d_c[t]) + d_c_later, np.abs(k.y_before)
        if cell.name == "lstm":
            d_in, d_c_later = _lstm(k, dy, dc + d_cell[t])
            d_rec, d_y_later = d_in, d_in @ w_rec.T
            total["w_rec"] += y_before.T @ d_rec
        else:
            event, slope = k.event, np.abs(k.slope)
            kept = threshold * dc if cell.variant == "evnn" else 0.0
            d_event = slope * (np.abs(k.v) * dy + kept)
            d_v = event * dy + d_event + dc + d_cell[t]
            d_g = (1 - k.u) * d_v * (1 + k.g * k.g)
            d_u = (np.abs(k.c_before) + np.abs(k.g)) * d_v * k.u * (1 - k.u)
            d_c_later = k.u * d_v
            if not cell.reset_first:
                d_r = d_g * np.abs(k.rec_g) * k.r * (1 - k.r)
                d_rec = np.concatenate([d_u, d_r, d_g * k.r], axis=1)
                d_y_later = d_rec @ w_rec.T
                total["w_rec"] += y_before.T @ d_rec
            else:
                d_sent = d_g @ w_rec[:, 2 * n :].T
                d_r = d_sent * y_before * k.r * (1 - k.r)
                d_gates = np.concatenate([d_u, d_r], axis=1)
                d_rec = np.concatenate([d_gates, d_g], axis=1)
                subtracted = d_v if cell.thresholded else 0.0
                d_y_later = subtracted + d_sent * k.r + d_gates @ w_rec[:, : 2 * n].T
                total["w_rec"][:, : 2 * n] += y_before.T @ d_gates
                total["w_rec"][:, 2 * n :] += (k.r * y_before).T @ d_g
            d_in = np.concatenate([d_u, d_r, d_g], axis=1)
            if cell.thresholded:
                total["threshold"] += (d_event + (event * dc if cell.variant == "evnn" else 0.0)).sum(axis=0)
        total["w_in"] += np.abs(x[t]).T @ d_in
        total["bias_in"] += d_in.sum(axis=0)
        total["bias_rec"] += d_rec.sum(axis=0)
        d_x[t] = d_in @ size["w_in"].T
    return total | {"x": d_x}


def _lstm(k, d_y, d_c) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of the gradients of all drives (B, 4N), and of the cell of the step before."""
    t = np.abs(np.tanh(k.c))
    d_c = d_c + d_y * k.o * (1 + t * t)
    d_i, d_f = d_c * np.abs(k.g) * k.i * (1 - k.i), d_c * np.abs(k.c_before) * k.f * (1 - k.f)
    d_g, d_o = d_c * k.i * (1 + k.g * k.g), d_y * t * k.o * (1 - k.o)
    return np.concatenate([d_i, d_f, d_g, d_o], axis=1), d_c * k.f
