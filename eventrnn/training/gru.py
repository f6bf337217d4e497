"""The dense baseline: a GRU (Cho et al. 2014) that is trained by the same loop as an event network.

It serves to measure the cost of events in quality. The reset gate is applied after the matrix product, as in cuDNN. The
trained network has the cell `Cell("gru")`, which every engine on the CPU runs.
"""

from __future__ import annotations

import numpy as np

from eventrnn.cells import Cell
from eventrnn.counting.backward import BackwardWork
from eventrnn.network import Network
from eventrnn.training.bptt import gated_layer
from eventrnn.training.bptt.gated_products import rows_of, values_of
from eventrnn.training.bptt.layer import LayerEngine
from eventrnn.training.bptt.model import Model
from eventrnn.training.bptt.tape import LayerGradients, LayerTape

F32 = np.float32


class GRU(Model):
    """A `Model` whose layers are GRUs. Parameters: see `Model`.

    network : its cells are GRUs, `Cell("gru")`; or EGRUs, whose thresholds and surrogates are not used. The gradient of
              the thresholds is zero

    Raises as `Model` does, and ValueError for LSTM cells and for variants whose reset gate comes before the product.
    Source: Cho et al. 2014, arXiv 1406.1078v1, where u is the gate that keeps the old state.
    """

    single_state = True

    def __init__(self, network: Network, *, backward: str = "auto", threads: int = 1, thresholds: str = "positive"):
        super().__init__(network, backward=backward, threads=threads, thresholds=thresholds)
        self._engines = [GRULayerEngine(cell, "dense", self._team, self._arena) for cell in self.cells]

    @staticmethod
    def _check_cells(network: Network) -> None:
        for k, layer in enumerate(network.layers):
            if layer.cell.name not in ("egru", "gru") or layer.cell.reset_first:
                raise ValueError(
                    f"network: layer {k} has the cell {layer.cell.name!r}, variant {layer.cell.variant!r}, but "
                    "training.GRU applies the reset gate after the product; give Cell('gru'), or Cell('egru', 'evnn')"
                )

    def _threshold_and_cell(self, k: int, parameter: np.ndarray) -> tuple[np.ndarray, Cell]:
        return np.zeros_like(parameter), Cell("gru")


class GRULayerEngine(LayerEngine):
    """One GRU layer in NumPy, forward and backward. Nearly all of its time is spent in matrix products through BLAS.

    In its tapes `q` is the recurrent drive of the candidate, `v` the state h after each step, and `y` and `c` are h
    with the state before the window in front.
    """

    def forward(self, p, x, c, y, zoneout_mask) -> LayerTape:
        """Run a window from the state y (B, N); c is not used. See `LayerEngine.forward`."""
        (steps, batch), w_rec = x.shape[:2], values_of(p["w_rec"])
        n, products = len(w_rec), gated_layer.products(p, steps * batch, self.team)
        inputs, recurrent = products.get("w_in"), products.get("w_rec")
        drive_in = rows_of(x) @ p["w_in"] if inputs is None else inputs.drives(rows_of(x), 0)
        drive_in = (drive_in + p["bias_in"]).reshape(steps, batch, 3 * n)
        u, r, g, q = (np.empty((steps, batch, n), F32) for _ in range(4))
        h = np.empty((steps + 1, batch, n), F32)
        h[0] = y
        for t in range(steps):
            drive_rec = h[t] @ w_rec if recurrent is None else recurrent.drives(h[t], t * batch)
            drive_rec = drive_rec + p["bias_rec"]
            gates = 1 / (1 + np.exp(-np.clip(drive_in[t, :, : 2 * n] + drive_rec[:, : 2 * n], -80, 80)))
            u[t], r[t], q[t] = gates[:, :n], gates[:, n:], drive_rec[:, 2 * n :]
            g[t] = np.tanh(drive_in[t, :, 2 * n :] + r[t] * q[t])
            if zoneout_mask is not None:
                u[t][zoneout_mask[t]] = 1
            h[t + 1] = u[t] * h[t] + (1 - u[t]) * g[t]
        return LayerTape(x, w_rec, u, r, g, q, h[1:], h, h, p["threshold"], products=products)

    def backward(self, p, tape, d_y, d_cell, input_mask, stored=False) -> LayerGradients:
        """Gradients of the parameters and of the input, by dense products. See `LayerEngine.backward`."""
        h, (steps, batch, n) = tape.y, tape.v.shape
        d_in, d_rec = np.empty((steps, batch, 3 * n), F32), np.empty((steps, batch, 3 * n), F32)
        d_later, recurrent = np.zeros((batch, n), F32), tape.products.get("w_rec")
        for t in reversed(range(steps)):
            u, r, g = tape.u[t], tape.r[t], tape.g[t]
            d_h = d_y[t] + d_later
            if d_cell is not None:
                d_h = d_h + d_cell[t]
            d_in[t, :, :n] = d_h * (h[t] - g) * u * (1 - u)
            d_g = d_h * (1 - u) * (1 - g * g)
            d_in[t, :, n : 2 * n] = d_g * tape.q[t] * r * (1 - r)
            d_in[t, :, 2 * n :] = d_g
            d_rec[t] = d_in[t]
            d_rec[t, :, 2 * n :] *= r
            if recurrent is None:
                d_later = d_h * u + d_rec[t] @ tape.w_rec.T
            else:
                d_later = d_h * u + recurrent.input_gradient(h[t], d_rec[t], t * batch)
        tape.support, rows = 1.0, steps * batch
        for name, columns in (("w_in", tape.x.shape[2]), ("w_rec", n)):
            work = tape.work[name] = BackwardWork.none(self.patterns[name].kept, 3 * n, rows)
            work.fired = work.active_pairs = work.gradient_rows = work.dots = np.full(columns, rows, np.int64)
            work.gradient_stored = work.dots_stored = np.full(columns, 3 * n, np.int64)
            work.input_gradient_rows = rows
        flat_in, flat_rec = d_in.reshape(-1, 3 * n), d_rec.reshape(-1, 3 * n)
        drives = {"w_in": flat_in, "w_rec": flat_rec}
        gradients, d_x = gated_layer.gradients(tape, drives, input_mask, np.ones((rows, n), bool), self.masks)
        if "w_in" not in tape.products:
            gradients["w_in"] = rows_of(tape.x).T @ flat_in
        if "w_rec" not in tape.products:
            gradients["w_rec"] = h[:-1].reshape(-1, n).T @ flat_rec
        gradients |= {
            "bias_in": flat_in.sum(axis=0),
            "bias_rec": flat_rec.sum(axis=0),
            "threshold": np.zeros(n, F32),
        }
        for name in ("w_in", "w_rec"):
            gradients[name] = self._masked(name, gradients[name], stored)
        if input_mask is not None and d_x is None:
            d_x = (flat_in @ p["w_in"].T).reshape(steps, batch, -1)
            input_mask.zero_elsewhere(d_x)
        return LayerGradients(gradients, d_x)
