"""The specification: every rule as plain loops over NumPy, no Numba, written to be read. Slow on purpose.

A backend like the others (`backend="reference"`, float32 with emulated FMA: the exact tier), and functions over
bare arrays in any precision, forward and backward. Shapes: B samples, I inputs, N units, gate rows (u, r, g).
Every product walks *all* presynaptic units, zeros too: this is the dense network that event-driven, pruned runs
must equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from eventrnn import cells
from eventrnn.backend import HostInputs
from eventrnn.cells import Cell
from eventrnn.state import FireCounts, Inputs, State, Trace

if TYPE_CHECKING:
    from eventrnn.network import Network


def propagate(weights, values, bias):
    """Drive of all gate rows: `bias + sum over j of weights[j] * values[:, j]`, ascending j, one FMA a term.

    weights (J, P), values (B, J), bias (P,) -> (B, P)
    """
    drive = np.repeat(bias[None, :], len(values), axis=0)
    for j in range(len(weights)):
        drive = cells.fma(weights[j][None, :], values[:, j, None], drive)
    return drive


@dataclass
class Tape:
    """One step of one layer, all that the backward step needs; every array (B, N)."""

    u: np.ndarray
    r: np.ndarray
    g: np.ndarray
    rec_g: np.ndarray
    c_before: np.ndarray
    y_before: np.ndarray
    v: np.ndarray
    event: np.ndarray
    slope: np.ndarray
    y: np.ndarray
    c: np.ndarray


def step(cell: Cell, parameters: dict, x, c, y, *, smooth: bool = False) -> Tape:
    """One layer, one step. x (B, I); c, y (B, N); `parameters` as `layer_parameters` returns.

    `smooth` puts the surrogate's smooth step in place of the event, for finite differences.
    """
    threshold = parameters["threshold"]
    w_rec, bias_rec = parameters["w_rec"], parameters["bias_rec"]
    n = len(threshold)
    in_u, in_r, in_g = np.split(propagate(parameters["w_in"], x, parameters["bias_in"]), 3, axis=1)
    if cell.variant == "evnn":
        rec_u, rec_r, rec_g = np.split(propagate(w_rec, y, bias_rec), 3, axis=1)
        v, u, r, g = cells.egru_value(in_u, in_r, in_g, rec_u, rec_r, rec_g, c)
    else:
        rec_u, rec_r = np.split(propagate(w_rec[:, : 2 * n], y, bias_rec[: 2 * n]), 2, axis=1)
        r = cells.egru_reset_gate(in_r, rec_r)
        rec_g = propagate(w_rec[:, 2 * n :], r * y, bias_rec[2 * n :])
        v, u, g = cells.egru_paper_value(in_u, in_g, rec_u, rec_g, c, y)
    rule = cell.surrogate
    distance = v - threshold
    if smooth:
        event = cells.surrogate_step(rule.code, distance, rule.dampening, rule.support)
    else:
        event = (v > threshold).astype(v.dtype)
    slope = cells.surrogate_slope(rule.code, distance, v.dtype.type(rule.dampening), v.dtype.type(rule.support))
    c_after = v - event * threshold if cell.variant == "evnn" else v
    # A silent unit sends +0, whatever its cell.
    sent = event * v if smooth else cells.select(event > 0, v, v.dtype.type(0))
    return Tape(u, r, g, rec_g, c, y, v, event, slope, sent, c_after)


def forward(cell: Cell, parameters: dict, x, c, y, *, smooth: bool = False) -> list[Tape]:
    """One layer over x (T, B, I) from state c, y (B, N). Returns a tape a step."""
    tapes = []
    for t in range(len(x)):
        tapes.append(step(cell, parameters, x[t], c, y, smooth=smooth))
        c, y = tapes[-1].c, tapes[-1].y
    return tapes


def backward(cell: Cell, parameters: dict, x, tapes: list[Tape], d_y, d_c, d_cell=None) -> dict:
    """Gradients of one layer: d_y, d_c (T, B, N) are those of the loss in `y[t]` and `c[t]`, d_cell (zeros)
    in `v[t]`.

    Returns arrays named like the parameters, with `x` (T, B, I), and `c`, `y` (B, N) of the initial state.
    """
    w_rec, threshold = parameters["w_rec"], parameters["threshold"]
    n = len(threshold)
    gradients = {name: np.zeros_like(value) for name, value in parameters.items()}
    d_x = np.zeros_like(x)
    d_cell = np.zeros_like(d_y) if d_cell is None else d_cell
    d_y_later, d_c_later = np.zeros_like(d_y[0]), np.zeros_like(d_c[0])
    for t in reversed(range(len(x))):
        k = tapes[t]
        d_y_now, d_c_now = d_y[t] + d_y_later, d_c[t] + d_c_later
        if cell.variant == "evnn":
            d_u, d_r, d_g, d_rec_g, d_c_later, d_threshold = cells.egru_backward(
                k.u, k.r, k.g, k.rec_g, k.c_before, k.v, k.event, k.slope, threshold, d_y_now, d_c_now, d_cell[t]
            )
            d_drive_rec = np.concatenate([d_u, d_r, d_rec_g], axis=1)
            d_y_later = d_drive_rec @ w_rec.T
            gradients["w_rec"] += k.y_before.T @ d_drive_rec
        else:
            d_u, d_g, d_c_later, d_y_later, d_threshold = cells.egru_paper_backward(
                k.u, k.g, k.c_before, k.v, k.event, k.slope, d_y_now, d_c_now, d_cell[t]
            )
            d_r, d_y_sent = cells.egru_paper_reset_backward(k.r, k.y_before, d_g @ w_rec[:, 2 * n :].T)
            d_gates = np.concatenate([d_u, d_r], axis=1)
            d_drive_rec = np.concatenate([d_gates, d_g], axis=1)
            d_y_later = d_y_later + d_y_sent + d_gates @ w_rec[:, : 2 * n].T
            gradients["w_rec"][:, : 2 * n] += k.y_before.T @ d_gates
            gradients["w_rec"][:, 2 * n :] += (k.r * k.y_before).T @ d_g
        d_drive_in = np.concatenate([d_u, d_r, d_g], axis=1)
        gradients["w_in"] += x[t].T @ d_drive_in
        gradients["bias_in"] += d_drive_in.sum(axis=0)
        gradients["bias_rec"] += d_drive_rec.sum(axis=0)
        gradients["threshold"] += d_threshold.sum(axis=0)
        d_x[t] = d_drive_in @ parameters["w_in"].T
    return gradients | {"x": d_x, "c": d_c_later, "y": d_y_later}


def layer_parameters(layer, dtype: DTypeLike = np.float32) -> dict:
    """The arrays of a layer by name, weights dense: w_in (I, 3N), w_rec (N, 3N), biases (3N,), threshold (N,)."""
    return {
        "w_in": layer.w_in.to_dense().astype(dtype),
        "w_rec": layer.w_rec.to_dense().astype(dtype),
        "bias_in": layer.bias_in.astype(dtype),
        "bias_rec": layer.bias_rec.astype(dtype),
        "threshold": layer.threshold.astype(dtype),
    }


class ReferenceBackend:
    """`dtype=float32` is the exact tier; `float64` gives the bounds (its outputs are float64)."""

    name = "reference"
    exact = True

    def __init__(self, dtype: DTypeLike = np.float32):
        self.dtype = np.dtype(dtype)
        self.exact = self.dtype == np.float32

    def engine(self, network: Network, *, threads: int = 1) -> ReferenceEngine:
        """`threads` must be 1: the specification is one loop."""
        if threads != 1:
            raise ValueError(f"threads: got {threads}, but the reference backend runs on 1; use backend='cpu'")
        return ReferenceEngine(network, self.dtype)


class ReferenceEngine:
    """A network as dense arrays; see `backend.Engine`."""

    dense = False

    def __init__(self, network: Network, dtype: np.dtype):
        self.dtype, self.host_inputs = dtype, HostInputs(network, dense=True)
        self.cells = [layer.cell for layer in network.layers]
        self.parameters = [layer_parameters(layer, dtype) for layer in network.layers]
        self.readout = None
        if network.readout is not None:
            self.readout = (network.readout.weights.to_dense().astype(dtype), network.readout.bias.astype(dtype))

    def stepper(self, state: State) -> None:
        """None: single steps are runs of one step."""
        return

    def prepare(self, inputs: Any) -> Inputs:
        """See `backend.Engine`. Numbers stay dense arrays."""
        return self.host_inputs.prepare(inputs)

    def run(self, inputs: Inputs, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`."""
        steps, batch = inputs.steps, inputs.batch
        x = inputs.to_dense().astype(self.dtype)
        cells_after, outputs_after, fired, events, states = [], [], [], [], []
        with np.errstate(over="ignore", invalid="ignore"):
            for cell, parameters, c, y in zip(self.cells, self.parameters, state.cells, state.outputs, strict=True):
                c, y = c.astype(self.dtype), y.astype(self.dtype)
                tapes = forward(cell, parameters, x, c, y)
                x = np.array([tape.y for tape in tapes], self.dtype).reshape(steps, batch, y.shape[1])
                all_cells = np.array([tape.c for tape in tapes], self.dtype).reshape(x.shape)
                cells_after.append(all_cells[-1] if steps else c)
                outputs_after.append(x[-1] if steps else y)
                fired.append(FireCounts.of(x))
                events.append(x)
                states.append(all_cells)
            output = x
            if self.readout is not None:
                weights, bias = self.readout
                rows = x.reshape(steps * batch, x.shape[2])
                output = propagate(weights, rows, bias).reshape(steps, batch, len(bias))
        return Trace(
            output,
            State(tuple(cells_after), tuple(outputs_after)),
            tuple(fired),
            tuple(events) if record_events else (),
            tuple(states) if record_states else (),
        )
