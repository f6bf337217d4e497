"""Truncated back-propagation through time through the whole stack: products by BLAS, the rest fused.

`Model` holds a network's parameters as dense float32 arrays by name. Window by window: `forward` keeps a tape,
`backward` turns the gradient of the output into gradients of every parameter. The surrogate derivative stands in
for that of the event; with a smooth event the gradients are exact (`reference.backward`, tested by finite
differences). Training products are not of the exact tier: BLAS sums in its own order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp

from eventrnn.backend import State
from eventrnn.cells import Cell
from eventrnn.network import Layer, Network, Readout
from eventrnn.training import kernels
from eventrnn.weights import Dense

F32 = np.float32


@dataclass
class LayerTape:
    """One layer over a window, all the backward pass needs. (T, B, N) arrays; `y` and `c` have T + 1 steps, the
    first being the state before the window."""

    x: np.ndarray
    dropped: np.ndarray | None
    u: np.ndarray
    r: np.ndarray
    g: np.ndarray
    q: np.ndarray
    v: np.ndarray
    y: np.ndarray
    c: np.ndarray


@dataclass
class Tape:
    """A window: the layers, the read-out's input and its dropout mask, and the symbols that were looked up."""

    layers: list[LayerTape]
    symbols: np.ndarray | None
    top: np.ndarray
    top_dropped: np.ndarray | None

    @property
    def activity(self) -> float:
        """Events per unit, step and sample over all layers."""
        return sum(np.count_nonzero(k.y[1:]) for k in self.layers) / max(1, sum(k.v.size for k in self.layers))


class Model:
    """A network's parameters, dense, by name; weights pruned by `masks` stay exactly zero.

    Attributes
    ----------
    parameters : `embedding` (V, E), `layers.k.w_in` (I, 3N), `.w_rec` (N, 3N), `.bias_in`, `.bias_rec` (3N,),
                 `.threshold` (N,), `readout` (N, V), `readout.bias` (V,); no `readout` when tied
    masks      : boolean arrays by parameter name, False where pruned; at first what CSR and block matrices do not store
    """

    def __init__(self, network: Network):
        self.like = network
        self.cells: list[Cell] = [layer.cell for layer in network.layers]
        self.tied = network.readout is not None and network.readout.tied
        self.masks: dict[str, np.ndarray] = {}
        self.parameters: dict[str, np.ndarray] = {}
        if network.embedding is not None:
            self.parameters["embedding"] = network.embedding.copy()
        for k, layer in enumerate(network.layers):
            for name in ("w_in", "w_rec"):
                self.parameters[f"layers.{k}.{name}"] = np.ascontiguousarray(getattr(layer, name).to_dense())
            for name in ("bias_in", "bias_rec", "threshold"):
                self.parameters[f"layers.{k}.{name}"] = getattr(layer, name).copy()
        if network.readout is not None:
            if not self.tied:
                self.parameters["readout"] = np.ascontiguousarray(network.readout.weights.to_dense())
            self.parameters["readout.bias"] = network.readout.bias.copy()
        for name, weights in network.matrices().items():
            if name in self.parameters and not isinstance(weights, Dense):
                self.masks[name] = weights.kept()

    def network(self) -> Network:
        """The network of the present parameters, dense weights."""
        p = self.parameters
        layers = tuple(
            Layer(
                Dense(p[f"layers.{k}.w_in"].copy()),
                Dense(p[f"layers.{k}.w_rec"].copy()),
                p[f"layers.{k}.bias_in"].copy(),
                p[f"layers.{k}.bias_rec"].copy(),
                p[f"layers.{k}.threshold"].copy(),
                cell,
            )
            for k, cell in enumerate(self.cells)
        )
        embedding = p["embedding"].copy() if "embedding" in p else None
        readout = None
        if "readout.bias" in p:
            weights = np.ascontiguousarray(embedding.T) if self.tied and embedding is not None else p["readout"].copy()
            readout = Readout(Dense(weights), p["readout.bias"].copy(), tied=self.tied)
        return replace(self.like, layers=layers, embedding=embedding, readout=readout)

    def apply_masks(self) -> None:
        """Set every pruned weight to zero."""
        for name, mask in self.masks.items():
            self.parameters[name] *= mask

    def readout_weights(self) -> np.ndarray:
        return self.parameters["embedding"].T if self.tied else self.parameters["readout"]

    def forward(
        self, inputs: np.ndarray, state: State, *, dropout: float = 0.0, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, State, Tape]:
        """A window from a state on.

        inputs  : (T, B) symbols or (T, B, I) numbers
        dropout : rate between layers and before the read-out; one mask a window and sample, shared over time
                  (Gal and Ghahramani 2016), survivors scaled up

        Returns output (T, B, V) (or the last layer's events), the state after the window, and the tape.
        """
        p = self.parameters
        symbols = inputs if "embedding" in p else None
        x = p["embedding"][inputs] if symbols is not None else np.ascontiguousarray(inputs, F32)
        layers, cells_after, outputs_after = [], [], []
        for k, cell in enumerate(self.cells):
            dropped = None
            if k > 0:
                x, dropped = _drop(x, dropout, rng)
            tape = self._layer_forward(k, cell, x, state.cells[k], state.outputs[k])
            tape.dropped = dropped
            layers.append(tape)
            cells_after.append(tape.c[-1].copy())
            outputs_after.append(tape.y[-1].copy())
            x = tape.y[1:]
        x, dropped = _drop(x, dropout, rng)
        output = x
        if "readout.bias" in p:
            flat = x.reshape(-1, x.shape[2]) @ self.readout_weights()
            flat += p["readout.bias"]
            output = flat.reshape(*x.shape[:2], -1)
        return output, State(tuple(cells_after), tuple(outputs_after)), Tape(layers, symbols, x, dropped)

    def _layer_forward(self, k: int, cell: Cell, x: np.ndarray, c: np.ndarray, y: np.ndarray) -> LayerTape:
        p = self.parameters
        w_rec, bias_rec, threshold = (p[f"layers.{k}.{name}"] for name in ("w_rec", "bias_rec", "threshold"))
        steps, batch, n = x.shape[0], x.shape[1], len(threshold)
        drive_in = np.ascontiguousarray(x).reshape(steps * batch, -1) @ p[f"layers.{k}.w_in"]
        drive_in += p[f"layers.{k}.bias_in"]
        drive_in = drive_in.reshape(steps, batch * 3 * n)
        u, r, g, q, v = (np.empty((steps, batch, n), F32) for _ in range(5))
        ys, cs = np.empty((steps + 1, batch, n), F32), np.empty((steps + 1, batch, n), F32)
        ys[0], cs[0] = y, c
        tape = LayerTape(x, None, u, r, g, q, v, ys, cs)
        w_gates, w_candidate = _split_gates(cell, w_rec)
        for t in range(steps):
            if cell.variant == "evnn":
                kernels.forward(
                    n, batch, drive_in[t], (ys[t] @ w_rec).ravel(), bias_rec, threshold, cs[t].ravel(),
                    *(a[t].ravel() for a in (u, r, g, q, v)), ys[t + 1].ravel(), cs[t + 1].ravel(),
                )  # fmt: skip
                continue
            # q keeps r * y here, which the candidate's weight gradient needs.
            drive_rec = (ys[t] @ w_gates).ravel()
            kernels.reset_gate(n, batch, drive_in[t], drive_rec, bias_rec, ys[t].ravel(), r[t].ravel(), q[t].ravel())
            kernels.paper_forward(
                n, batch, drive_in[t], drive_rec, (q[t] @ w_candidate).ravel(), bias_rec, threshold, cs[t].ravel(),
                ys[t].ravel(), *(a[t].ravel() for a in (u, g, v)), ys[t + 1].ravel(), cs[t + 1].ravel(),
            )  # fmt: skip
        return tape

    def backward(self, tape: Tape, d_output: np.ndarray, *, activity_cost: float = 0.0) -> dict[str, np.ndarray]:
        """Gradients of all parameters from that of the output (T, B, V). The state before the window is a constant.

        `activity_cost` adds that many times the mean output (values sent, over steps, samples and units of each layer)
        to the loss. Pruned weights get a zero gradient.
        """
        p, gradients = self.parameters, {}
        d_x = d_output
        if "readout.bias" in p:
            flat = d_output.reshape(-1, d_output.shape[2])
            top = np.ascontiguousarray(tape.top).reshape(len(flat), -1)
            d_weights = top.T @ flat
            gradients["readout.bias"] = flat.sum(axis=0)
            gradients["embedding" if self.tied else "readout"] = d_weights.T.copy() if self.tied else d_weights
            d_x = (flat @ self.readout_weights().T).reshape(tape.top.shape)
        d_x = _drop_back(d_x, tape.top_dropped)
        for k in reversed(range(len(self.cells))):
            layer = tape.layers[k]
            if activity_cost:
                d_x = d_x + F32(activity_cost / layer.v.size) * (layer.y[1:] > 0)
            d_x = _drop_back(self._layer_backward(k, layer, d_x, gradients), layer.dropped)
        if tape.symbols is not None:
            d_embedding = _sum_by_symbol(tape.symbols, d_x, len(p["embedding"]))
            gradients["embedding"] = gradients["embedding"] + d_embedding if self.tied else d_embedding
        for name, mask in self.masks.items():
            gradients[name] *= mask
        return gradients

    def _layer_backward(self, k: int, tape: LayerTape, d_top: np.ndarray, gradients: dict) -> np.ndarray:
        p, cell = self.parameters, self.cells[k]
        w_in, w_rec, threshold = (p[f"layers.{k}.{name}"] for name in ("w_in", "w_rec", "threshold"))
        steps, batch, n = tape.v.shape
        rule = cell.surrogate
        head = (n, batch, rule.code, F32(rule.dampening), F32(rule.support), threshold)
        d_in, d_rec = np.empty((steps, batch, 3 * n), F32), np.empty((steps, batch, 3 * n), F32)
        d_threshold, d_c = np.zeros(n, F32), np.zeros(batch * n, F32)
        d_later = np.zeros((batch, n), F32)
        w_gates, w_candidate = _split_gates(cell, w_rec)
        for t in reversed(range(steps)):
            d_y = (d_top[t] + d_later).ravel()
            if cell.variant == "evnn":
                kernels.backward(
                    *head, *(a[t].ravel() for a in (tape.u, tape.r, tape.g, tape.q, tape.v, tape.c)), d_y,
                    d_c, d_in[t].ravel(), d_rec[t].ravel(), d_threshold,
                )  # fmt: skip
                d_later = d_rec[t] @ w_rec.T
                continue
            d_before = np.empty(batch * n, F32)
            kernels.paper_backward(
                *head, *(a[t].ravel() for a in (tape.u, tape.g, tape.v, tape.c)), d_y,
                d_c, d_before, d_in[t].ravel(), d_threshold,
            )  # fmt: skip
            d_sent = (d_in[t, :, 2 * n :] @ w_candidate.T).ravel()
            kernels.reset_gate_backward(
                n, batch, tape.r[t].ravel(), tape.y[t].ravel(), d_sent, d_in[t].ravel(), d_before
            )
            d_later = d_before.reshape(batch, n) + d_in[t, :, : 2 * n] @ w_gates.T
        flat_in = d_in.reshape(steps * batch, 3 * n)
        flat_rec = flat_in if cell.variant == "paper" else d_rec.reshape(steps * batch, 3 * n)
        before = tape.y[:-1].reshape(steps * batch, n)
        gradients[f"layers.{k}.w_in"] = np.ascontiguousarray(tape.x).reshape(steps * batch, -1).T @ flat_in
        gradients[f"layers.{k}.w_rec"] = before.T @ flat_rec
        if cell.variant == "paper":
            sent = tape.q.reshape(steps * batch, n)
            gradients[f"layers.{k}.w_rec"][:, 2 * n :] = sent.T @ flat_in[:, 2 * n :]
        gradients[f"layers.{k}.bias_in"] = flat_in.sum(axis=0)
        gradients[f"layers.{k}.bias_rec"] = flat_rec.sum(axis=0)
        gradients[f"layers.{k}.threshold"] = d_threshold
        return (flat_in @ w_in.T).reshape(steps, batch, -1)


def _sum_by_symbol(symbols: np.ndarray, d_x: np.ndarray, size: int) -> np.ndarray:
    """Rows of d_x (T, B, E) summed by their symbol, (size, E): a sparse one-hot product, 20 times `np.add.at`."""
    n = symbols.size
    ones = sp.csc_array((np.ones(n, F32), symbols.ravel(), np.arange(n + 1)), shape=(size, n))
    return ones @ d_x.reshape(n, -1)


def _split_gates(cell: Cell, w_rec: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Paper's variant: the (u, r) rows and the candidate rows, contiguous for BLAS."""
    n = len(w_rec)
    if cell.variant == "evnn":
        return w_rec, w_rec
    return np.ascontiguousarray(w_rec[:, : 2 * n]), np.ascontiguousarray(w_rec[:, 2 * n :])


def _drop(x: np.ndarray, rate: float, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray | None]:
    if rate == 0:
        return x, None
    if rng is None:
        raise ValueError(f"dropout: got rate {rate} but no rng; pass a numpy Generator")
    mask = (rng.random(x.shape[1:], F32) >= rate) / F32(1 - rate)
    return x * mask, mask


def _drop_back(d_x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return d_x if mask is None else d_x * mask
