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
from eventrnn.training.noise import Noise
from eventrnn.weights import Dense

F32 = np.float32
BACKWARDS = ("auto", "dense", "sparse")


@dataclass
class LayerTape:
    """One layer over a window, all the backward pass needs. (T, B, N) arrays; `y` and `c` have T + 1 steps, the
    first being the state before the window. `w_rec` are the weights that were used, DropConnect included; `support`,
    known after the backward pass, is the share of units that fired or were within their surrogate's support."""

    x: np.ndarray
    w_rec: np.ndarray
    u: np.ndarray
    r: np.ndarray
    g: np.ndarray
    q: np.ndarray
    v: np.ndarray
    y: np.ndarray
    c: np.ndarray
    support: float = float("nan")


@dataclass
class Tape:
    """A window: the layers, the read-out's input, the symbols that were looked up, and the noise."""

    layers: list[LayerTape]
    symbols: np.ndarray | None
    top: np.ndarray
    noise: Noise

    @property
    def activity(self) -> float:
        """Events per unit, step and sample over all layers."""
        return sum(np.count_nonzero(k.y[1:]) for k in self.layers) / max(1, sum(k.v.size for k in self.layers))

    @property
    def support(self) -> float:
        """Share of units, steps and samples with a path through the threshold, over all layers; after `backward`."""
        return sum(k.support * k.v.size for k in self.layers) / max(1, sum(k.v.size for k in self.layers))


class Model:
    """A network's parameters, dense, by name; weights pruned by `masks` stay exactly zero.

    Attributes
    ----------
    parameters : `embedding` (V, E), `layers.k.w_in` (I, 3N), `.w_rec` (N, 3N), `.bias_in`, `.bias_rec` (3N,),
                 `.threshold` (N,), `readout` (N, V), `readout.bias` (V,); no `readout` when tied
    masks      : boolean arrays by parameter name, False where pruned; at first what CSR and block matrices do not store
    """

    def __init__(self, network: Network, *, backward: str = "auto", threads: int = 1):
        if backward not in BACKWARDS:
            raise ValueError(f"backward: got {backward!r}, need one of {', '.join(BACKWARDS)}")
        self.like, self.mode, self.threads = network, backward, threads
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

    def forward(self, inputs: np.ndarray, state: State, noise: Noise | None = None) -> tuple[np.ndarray, State, Tape]:
        """A window from a state on.

        inputs : (T, B) symbols or (T, B, I) numbers
        noise  : what is random about this window; none by default

        Returns output (T, B, V) (or the last layer's events), the state after the window, and the tape.
        """
        p, noise = self.parameters, noise or Noise()
        symbols = inputs if "embedding" in p else None
        noise.check(*inputs.shape[:2], *self._sizes())
        if symbols is None:
            x = np.ascontiguousarray(inputs, F32)
        else:
            x = p["embedding"][inputs]
            if noise.words is not None:
                x *= noise.words[inputs][:, :, None]
        x = _scaled(x, noise.inputs)
        layers, cells_after, outputs_after = [], [], []
        for k, cell in enumerate(self.cells):
            if k > 0:
                x = _scaled(x, noise.of("between", k - 1))
            tape = self._layer_forward(k, cell, x, state.cells[k], state.outputs[k], noise)
            layers.append(tape)
            cells_after.append(tape.c[-1].copy())
            outputs_after.append(tape.y[-1].copy())
            x = tape.y[1:]
        x = _scaled(x, noise.top)
        output = x
        if "readout.bias" in p:
            flat = x.reshape(-1, x.shape[2]) @ self.readout_weights()
            flat += p["readout.bias"]
            output = flat.reshape(*x.shape[:2], -1)
        return output, State(tuple(cells_after), tuple(outputs_after)), Tape(layers, symbols, x, noise)

    def _sizes(self) -> tuple[list[int], int, int | None]:
        """Units of each layer, inputs of the first, symbols of the embedding."""
        units = [len(self.parameters[f"layers.{k}.threshold"]) for k in range(len(self.cells))]
        symbols = len(self.parameters["embedding"]) if "embedding" in self.parameters else None
        return units, len(self.parameters["layers.0.w_in"]), symbols

    def _layer_forward(
        self, k: int, cell: Cell, x: np.ndarray, c: np.ndarray, y: np.ndarray, noise: Noise
    ) -> LayerTape:
        p = self.parameters
        w_rec, bias_rec, threshold = (p[f"layers.{k}.{name}"] for name in ("w_rec", "bias_rec", "threshold"))
        if (dropped := noise.of("recurrent", k)) is not None:
            w_rec = w_rec * dropped
        held = noise.of("zoneout", k)
        steps, batch, n = x.shape[0], x.shape[1], len(threshold)
        drive_in = np.ascontiguousarray(x).reshape(steps * batch, -1) @ p[f"layers.{k}.w_in"]
        drive_in += p[f"layers.{k}.bias_in"]
        drive_in = drive_in.reshape(steps, batch * 3 * n)
        u, r, g, q, v = (np.empty((steps, batch, n), F32) for _ in range(5))
        ys, cs = np.empty((steps + 1, batch, n), F32), np.empty((steps + 1, batch, n), F32)
        ys[0], cs[0] = y, c
        tape = LayerTape(x, w_rec, u, r, g, q, v, ys, cs)
        w_gates, w_candidate = _split_gates(cell, w_rec)

        def hold(t: int) -> None:
            if held is not None:
                kernels.hold(
                    n, batch, held[t].ravel(), cell.variant == "paper", threshold, cs[t].ravel(), ys[t].ravel(),
                    *(a[t].ravel() for a in (u, v)), ys[t + 1].ravel(), cs[t + 1].ravel(),
                )  # fmt: skip

        for t in range(steps):
            if cell.variant == "evnn":
                kernels.forward(
                    n, batch, drive_in[t], (ys[t] @ w_rec).ravel(), bias_rec, threshold, cs[t].ravel(),
                    *(a[t].ravel() for a in (u, r, g, q, v)), ys[t + 1].ravel(), cs[t + 1].ravel(),
                )  # fmt: skip
                hold(t)
                continue
            # q keeps r * y here, which the candidate's weight gradient needs.
            drive_rec = (ys[t] @ w_gates).ravel()
            kernels.reset_gate(n, batch, drive_in[t], drive_rec, bias_rec, ys[t].ravel(), r[t].ravel(), q[t].ravel())
            kernels.paper_forward(
                n, batch, drive_in[t], drive_rec, (q[t] @ w_candidate).ravel(), bias_rec, threshold, cs[t].ravel(),
                ys[t].ravel(), *(a[t].ravel() for a in (u, g, v)), ys[t + 1].ravel(), cs[t + 1].ravel(),
            )  # fmt: skip
            hold(t)
        return tape

    def backward(
        self,
        tape: Tape,
        d_output: np.ndarray,
        *,
        activity_cost: float = 0.0,
        d_events: tuple[np.ndarray | None, ...] = (),
        d_cells: tuple[np.ndarray | None, ...] = (),
    ) -> dict[str, np.ndarray]:
        """Gradients of all parameters from that of the output (T, B, V). The state before the window is a constant.

        activity_cost : adds that many times the mean output (values sent, over steps, samples and units of each layer)
                        to the loss
        d_events      : a layer's further gradient of what it sends, `y` (T, B, N), or None; one entry a layer
        d_cells       : likewise of the cell state before the event, `v`

        Pruned weights get a zero gradient.
        """
        p, gradients, noise = self.parameters, {}, tape.noise
        d_x = d_output
        if "readout.bias" in p:
            flat = d_output.reshape(-1, d_output.shape[2])
            top = np.ascontiguousarray(tape.top).reshape(len(flat), -1)
            d_weights = top.T @ flat
            gradients["readout.bias"] = flat.sum(axis=0)
            gradients["embedding" if self.tied else "readout"] = d_weights.T.copy() if self.tied else d_weights
            d_x = (flat @ self.readout_weights().T).reshape(tape.top.shape)
        d_x = _scaled(d_x, noise.top)
        for k in reversed(range(len(self.cells))):
            layer = tape.layers[k]
            if activity_cost:
                d_x = d_x + F32(activity_cost / layer.v.size) * (layer.y[1:] > 0)
            if d_events and (further := d_events[k]) is not None:
                d_x = d_x + further
            d_x = self._layer_backward(k, layer, d_x, d_cells[k] if d_cells else None, gradients)
            d_x = _scaled(d_x, noise.of("between", k - 1) if k else noise.inputs)
            if (dropped := noise.of("recurrent", k)) is not None:
                gradients[f"layers.{k}.w_rec"] *= dropped
        if tape.symbols is not None:
            if noise.words is not None:
                d_x = d_x * noise.words[tape.symbols][:, :, None]
            d_embedding = _sum_by_symbol(tape.symbols, d_x, len(p["embedding"]))
            gradients["embedding"] = gradients["embedding"] + d_embedding if self.tied else d_embedding
        for name, mask in self.masks.items():
            gradients[name] *= mask
        return gradients

    def _layer_backward(
        self, k: int, tape: LayerTape, d_top: np.ndarray, d_cell: np.ndarray | None, gradients: dict
    ) -> np.ndarray:
        p, cell, w_rec = self.parameters, self.cells[k], tape.w_rec
        w_in, threshold = (p[f"layers.{k}.{name}"] for name in ("w_in", "threshold"))
        steps, batch, n = tape.v.shape
        rule = cell.surrogate
        d_cell = np.zeros((steps, batch * n), F32) if d_cell is None else d_cell.reshape(steps, batch * n)
        tape.support = 0.0
        head = (n, batch, rule.code, F32(rule.dampening), F32(rule.support), threshold)
        d_in, d_rec = np.empty((steps, batch, 3 * n), F32), np.empty((steps, batch, 3 * n), F32)
        d_threshold, d_c = np.zeros(n, F32), np.zeros(batch * n, F32)
        d_later = np.zeros((batch, n), F32)
        w_gates, w_candidate = _split_gates(cell, w_rec)
        for t in reversed(range(steps)):
            d_y = (d_top[t] + d_later).ravel()
            if cell.variant == "evnn":
                tape.support += kernels.backward(
                    *head, *(a[t].ravel() for a in (tape.u, tape.r, tape.g, tape.q, tape.v, tape.c)), d_y, d_cell[t],
                    d_c, d_in[t].ravel(), d_rec[t].ravel(), d_threshold,
                )  # fmt: skip
                d_later = d_rec[t] @ w_rec.T
                continue
            d_before = np.empty(batch * n, F32)
            tape.support += kernels.paper_backward(
                *head, *(a[t].ravel() for a in (tape.u, tape.g, tape.v, tape.c)), d_y, d_cell[t],
                d_c, d_before, d_in[t].ravel(), d_threshold,
            )  # fmt: skip
            d_sent = (d_in[t, :, 2 * n :] @ w_candidate.T).ravel()
            kernels.reset_gate_backward(
                n, batch, tape.r[t].ravel(), tape.y[t].ravel(), d_sent, d_in[t].ravel(), d_before
            )
            d_later = d_before.reshape(batch, n) + d_in[t, :, : 2 * n] @ w_gates.T
        tape.support /= max(1, tape.v.size)
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


def _scaled(x: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return x if mask is None else x * mask
