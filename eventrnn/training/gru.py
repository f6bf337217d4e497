"""The dense twin to compare with: a GRU in the same loop, every unit sends its cell at every step.

That is the event cell of `cells.py` with an event always and nothing subtracted, `y = c = v` (reset gate after the
matrix, as cuDNN's GRU). It has no event network: use it to learn what events cost in quality, not to run.
"""

from __future__ import annotations

import numpy as np

from eventrnn.cells import Cell
from eventrnn.network import Network
from eventrnn.training.bptt import LayerTape, Model
from eventrnn.training.noise import Noise

F32 = np.float32


class GRU(Model):
    """A `Model` whose layers are GRUs. Thresholds and surrogates of the network given mean nothing and get no gradient.

    Source: Cho et al. 2014, arXiv 1406.1078v1, with u the gate that keeps.
    """

    def network(self) -> Network:
        """Refused: no event network computes what a GRU does. Raises ValueError."""
        raise ValueError("network: a GRU sends every value and has no event network; its numbers are in `parameters`")

    def _layer_forward(
        self, k: int, cell: Cell, x: np.ndarray, c: np.ndarray, y: np.ndarray, noise: Noise
    ) -> LayerTape:
        p = self.parameters
        w_rec, bias_rec = p[f"layers.{k}.w_rec"], p[f"layers.{k}.bias_rec"]
        if (dropped := noise.of("recurrent", k)) is not None:
            w_rec = w_rec * dropped
        held = noise.of("zoneout", k)
        (steps, batch), n = x.shape[:2], len(w_rec)
        drive_in = np.ascontiguousarray(x).reshape(steps * batch, -1) @ p[f"layers.{k}.w_in"] + p[f"layers.{k}.bias_in"]
        drive_in = drive_in.reshape(steps, batch, 3 * n)
        u, r, g, q = (np.empty((steps, batch, n), F32) for _ in range(4))
        ys = np.empty((steps + 1, batch, n), F32)
        ys[0] = y
        for t in range(steps):
            drive_rec = ys[t] @ w_rec + bias_rec
            gates = 1 / (1 + np.exp(-np.clip(drive_in[t, :, : 2 * n] + drive_rec[:, : 2 * n], -80, 80)))
            u[t], r[t], q[t] = gates[:, :n], gates[:, n:], drive_rec[:, 2 * n :]
            g[t] = np.tanh(drive_in[t, :, 2 * n :] + r[t] * q[t])
            if held is not None:
                u[t][held[t]] = 1
            ys[t + 1] = u[t] * ys[t] + (1 - u[t]) * g[t]
        return LayerTape(x, w_rec, u, r, g, q, ys[1:], ys, ys)

    def _layer_backward(
        self, k: int, tape: LayerTape, d_top: np.ndarray, d_cell: np.ndarray | None, gradients: dict
    ) -> np.ndarray:
        p, w_rec, h = self.parameters, tape.w_rec, tape.y
        steps, batch, n = tape.v.shape
        d_in, d_rec = np.empty((steps, batch, 3 * n), F32), np.empty((steps, batch, 3 * n), F32)
        d_later = np.zeros((batch, n), F32)
        for t in reversed(range(steps)):
            u, r, g = tape.u[t], tape.r[t], tape.g[t]
            d_h = d_top[t] + d_later
            if d_cell is not None:
                d_h = d_h + d_cell[t]
            d_in[t, :, :n] = d_h * (h[t] - g) * u * (1 - u)
            d_g = d_h * (1 - u) * (1 - g * g)
            d_in[t, :, n : 2 * n] = d_g * tape.q[t] * r * (1 - r)
            d_in[t, :, 2 * n :] = d_g
            d_rec[t] = d_in[t]
            d_rec[t, :, 2 * n :] *= r
            d_later = d_h * u + d_rec[t] @ w_rec.T
        tape.support = 1.0
        flat_in, flat_rec = d_in.reshape(-1, 3 * n), d_rec.reshape(-1, 3 * n)
        gradients[f"layers.{k}.w_in"] = np.ascontiguousarray(tape.x).reshape(steps * batch, -1).T @ flat_in
        gradients[f"layers.{k}.w_rec"] = h[:-1].reshape(-1, n).T @ flat_rec
        gradients[f"layers.{k}.bias_in"] = flat_in.sum(axis=0)
        gradients[f"layers.{k}.bias_rec"] = flat_rec.sum(axis=0)
        gradients[f"layers.{k}.threshold"] = np.zeros(n, F32)
        return (flat_in @ p[f"layers.{k}.w_in"].T).reshape(steps, batch, -1)
