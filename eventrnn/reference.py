"""The specification: every rule as plain loops over NumPy arrays, without Numba. Written to be read, and slow.

`step`, `forward` and `backward` work on bare arrays of any precision; their products are in `reference_products.py`.
`ReferenceBackend` makes them a backend like the others. In float32 it emulates the FMA instruction, and the exact
backends return its bits.

Shapes: T steps, B samples, I inputs, N units; gate rows are packed (u, r, g), in an LSTM (i, f, g, o). Every product
visits *all* presynaptic units, silent ones as well. This is therefore the dense network that an event-driven run of a
pruned network must equal.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from eventrnn import cells
from eventrnn.backend import IN_FLOAT64, INTEGERS, SPECIFICATION, HostInputs, integer_matrices
from eventrnn.cells import Cell
from eventrnn.reference_products import (
    SharedGradients,
    StepGates,
    arrays_of,
    propagate,
    propagate_back,
    propagate_steps,
    shares_gates,
    weight_arrays,
)
from eventrnn.state import FireCounts, HeldGates, Inputs, State, Trace

if TYPE_CHECKING:
    from eventrnn.network import Network


@dataclass
class Tape:
    """One step of one layer of EGRU or GRU cells: everything that its backward step needs. All arrays are (B, N).

    In a GRU the event is 1 and its derivative 0 at every step: a unit sends its cell, and nothing is subtracted.

    Attributes
    ----------
    u, r, g            : gates and candidate
    rec_g              : recurrent drive of the candidate
    c_before, y_before : cell and output of the step before
    v                  : cell before the event
    event, slope       : event (1 or 0), and its surrogate derivative
    y, c               : output, and cell after the event
    gates              : `w_in`, `w_rec` -> the gates of the step, of matrices whose choices some steps share
    """

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
    gates: dict[str, StepGates] = field(default_factory=dict)


@dataclass
class LSTMTape:
    """One step of one layer of LSTM cells. Every array has the shape (B, N).

    Attributes
    ----------
    i, f, g, o         : gates and candidate
    c_before, y_before : cell and output of the step before
    y, c               : output and cell
    gates              : see `Tape`
    """

    i: np.ndarray
    f: np.ndarray
    g: np.ndarray
    o: np.ndarray
    c_before: np.ndarray
    y_before: np.ndarray
    y: np.ndarray
    c: np.ndarray
    gates: dict[str, StepGates] = field(default_factory=dict)


def step(
    cell: Cell, parameters: dict, x, c, y, *, held: Mapping[str, HeldGates] | None = None, smooth: bool = False
) -> Tape | LSTMTape:
    """One step of one layer: a `Tape`, or an `LSTMTape` for LSTM cells.

    parameters : arrays by name, as `layer_parameters` returns them
    x          : (B, I) input
    c, y       : (B, N) cells and outputs of the step before
    held       : `w_in`, `w_rec` -> what the step before left, of matrices whose choices some steps share; None for a
                 stream that begins here
    smooth     : replace the event by the smooth step whose derivative is the surrogate, for finite differences
    """
    gates: dict[str, StepGates] = {}

    def drives(name: str, values) -> list[np.ndarray]:
        """The drives of a matrix, gate row by gate row."""
        before = (held or {}).get(f"w_{name}")
        found, shared = propagate_steps(parameters[f"w_{name}"], values[None], parameters[f"bias_{name}"], before)
        gates.update({f"w_{name}": each for each in shared})
        return np.split(found[0], cell.gates, axis=1)

    if cell.name == "lstm":
        (in_i, in_f, in_g, in_o), (rec_i, rec_f, rec_g, rec_o) = drives("in", x), drives("rec", y)
        h, c_after, i, f, g, o = cells.lstm_value(in_i, in_f, in_g, in_o, rec_i, rec_f, rec_g, rec_o, c)
        return LSTMTape(i, f, g, o, c, y, h, c_after, gates)
    threshold = parameters["threshold"]
    n, plain = len(threshold), not cell.thresholded
    in_u, in_r, in_g = drives("in", x)
    if not cell.reset_first:
        rec_u, rec_r, rec_g = drives("rec", y)
        value = cells.gru_value if plain else cells.egru_value
        v, u, r, g = value(in_u, in_r, in_g, rec_u, rec_r, rec_g, c)
    else:
        w_rec, bias_rec = parameters["w_rec"], parameters["bias_rec"]
        rec_u, rec_r = np.split(propagate(w_rec[:, : 2 * n], y, bias_rec[: 2 * n]), 2, axis=1)
        r = cells.egru_reset_gate(in_r, rec_r)
        rec_g = propagate(w_rec[:, 2 * n :], r * y, bias_rec[2 * n :])
        if plain:
            v, u, g = cells.gru_before_value(in_u, in_g, rec_u, rec_g, c)
        else:
            v, u, g = cells.egru_paper_value(in_u, in_g, rec_u, rec_g, c, y)
    if plain:
        return Tape(u, r, g, rec_g, c, y, v, np.ones_like(v), np.zeros_like(v), v, v, gates)
    rule = cell.surrogate
    distance = v - threshold
    if smooth:
        event = cells.surrogate_step(rule.code, distance, rule.dampening, rule.support)
    else:
        event = (v > threshold).astype(v.dtype)
    slope = cells.surrogate_slope(rule.code, distance, v.dtype.type(rule.dampening), v.dtype.type(rule.support))
    c_after = v - event * threshold if cell.variant == "evnn" else v
    # A silent unit sends +0, whatever the sign of its cell.
    sent = event * v if smooth else cells.select(event > 0, v, v.dtype.type(0))
    return Tape(u, r, g, rec_g, c, y, v, event, slope, sent, c_after, gates)


def forward(
    cell: Cell, parameters: dict, x, c, y, *, held: Mapping[str, HeldGates] | None = None, smooth: bool = False
) -> list[Tape | LSTMTape]:
    """One layer over inputs x (T, B, I), from the state c, y (B, N) and held gates as for `step`. Returns the tape of
    each step."""
    tapes: list[Tape | LSTMTape] = []
    for t in range(len(x)):
        tapes.append(step(cell, parameters, x[t], c, y, held=held, smooth=smooth))
        c, y, held = tapes[-1].c, tapes[-1].y, tapes[-1].gates
    return tapes


def backward(
    cell: Cell,
    parameters: dict,
    x,
    tapes: Sequence[Tape | LSTMTape],
    d_y,
    d_c,
    d_cell=None,
    *,
    straight_through: bool = False,
) -> dict:
    """Backpropagation through time of one layer.

    x      : (T, B, I) inputs
    tapes  : what `forward` returned for them
    d_y    : (T, B, N) gradient of the loss with respect to the outputs y[t]
    d_c    : (T, B, N) gradient with respect to the cells c[t] after the event
    d_cell : (T, B, N) gradient with respect to the cells v[t] before the event, which are the cells c[t] where there is
             no event; None for zeros
    straight_through : of gated blocks, see `propagate_back`

    Returns gradients by name: those of the parameters (of gated blocks also `w_in.gate` and the like), `x` (T, B, I),
    and `c`, `y` (B, N) of the initial state. Cells and outputs of a GRU count as two arrays there. The thresholds of a
    cell that has none have the gradient zero.
    """
    w_rec, n = parameters["w_rec"], len(parameters["threshold"])
    gradients = {
        name + end: np.zeros_like(array)
        for name, value in parameters.items()
        for end, array in arrays_of(value).items()
    }

    waiting = {name: SharedGradients(each, d_y.shape[1]) for name, each in parameters.items() if shares_gates(each)}

    def back(name: str, t: int, values, d_drive):
        if name in waiting:
            return waiting[name].back(values, d_drive, tapes[t].gates[name], straight_through)
        d_values, found = propagate_back(parameters[name], values, d_drive, straight_through=straight_through)
        for end, gradient in found.items():
            gradients[name + end] += gradient
        return d_values

    d_x = np.zeros_like(x)
    d_cell = np.zeros_like(d_y) if d_cell is None else d_cell
    d_y_later, d_c_later = np.zeros_like(d_y[0]), np.zeros_like(d_c[0])
    for t in reversed(range(len(x))):
        k = tapes[t]
        into, rec, d_c_later, d_y_later, d_threshold = _adjoint(
            cell, k, parameters, d_y[t] + d_y_later, d_c[t] + d_c_later, d_cell[t]
        )
        d_drive_in, d_drive_rec = np.concatenate(into, axis=1), np.concatenate(rec, axis=1)
        if isinstance(k, Tape) and cell.reset_first:
            # The rows of the candidate, the last ones, take r * y; the others take y.
            d_y_later = d_y_later + d_drive_rec[:, : 2 * n] @ w_rec[:, : 2 * n].T
            gradients["w_rec"][:, : 2 * n] += k.y_before.T @ d_drive_rec[:, : 2 * n]
            gradients["w_rec"][:, 2 * n :] += (k.r * k.y_before).T @ d_drive_rec[:, 2 * n :]
        else:
            d_y_later = d_y_later + back("w_rec", t, k.y_before, d_drive_rec)
        gradients["bias_in"] += d_drive_in.sum(axis=0)
        gradients["bias_rec"] += d_drive_rec.sum(axis=0)
        gradients["threshold"] += d_threshold.sum(axis=0)
        d_x[t] = back("w_in", t, x[t], d_drive_in)
    for name, each in waiting.items():
        gradients |= {name + end: gradient for end, gradient in each.gradients.items()}
    return gradients | {"x": d_x, "c": d_c_later, "y": d_y_later}


def _adjoint(cell: Cell, k: Tape | LSTMTape, parameters: dict, d_y, d_c, d_cell) -> tuple[list, list, Any, Any, Any]:
    """Adjoint of one step, without its products with `y_before`; gradients are (B, N).

    Returns those of the input drives and of the recurrent drives, gate by gate, of the cell of the step before, of its
    output as far as that does not go through the products, and of the thresholds.
    """
    nothing = np.zeros_like(d_y)
    if isinstance(k, LSTMTape):
        *rows, d_c_before = cells.lstm_backward(k.i, k.f, k.g, k.o, k.c_before, k.c, d_y, d_c + d_cell)
        return rows, rows, d_c_before, nothing, nothing
    threshold, d_y_before, d_threshold = parameters["threshold"], nothing, nothing
    if not cell.reset_first:
        if cell.thresholded:
            d_u, d_r, d_g, d_rec_g, d_c_before, d_threshold = cells.egru_backward(
                k.u, k.r, k.g, k.rec_g, k.c_before, k.v, k.event, k.slope, threshold, d_y, d_c, d_cell
            )
        else:
            d_u, d_r, d_g, d_rec_g, d_c_before = cells.gru_backward(
                k.u, k.r, k.g, k.rec_g, k.c_before, d_y + d_c + d_cell
            )
        return [d_u, d_r, d_g], [d_u, d_r, d_rec_g], d_c_before, d_y_before, d_threshold
    if cell.thresholded:
        d_u, d_g, d_c_before, d_y_before, d_threshold = cells.egru_paper_backward(
            k.u, k.g, k.c_before, k.v, k.event, k.slope, d_y, d_c, d_cell
        )
    else:
        d_u, d_g, d_c_before = cells.gru_before_backward(k.u, k.g, k.c_before, d_y + d_c + d_cell)
    d_sent = d_g @ parameters["w_rec"][:, 2 * len(threshold) :].T
    d_r, d_y_sent = cells.egru_paper_reset_backward(k.r, k.y_before, d_sent)
    return [d_u, d_r, d_g], [d_u, d_r, d_g], d_c_before, d_y_before + d_y_sent, d_threshold


def layer_parameters(layer, dtype: DTypeLike = np.float32, name: str = "", integers: Collection[str] = ()) -> dict:
    """The arrays of a layer by name, with dense weights: `w_in` (I, 3N), `w_rec` (N, 3N), `bias_in` and `bias_rec`
    (3N,), `threshold` (N,). An LSTM has 4N in place of 3N. `name` is what stands before the names of its matrices in
    messages; `integers` is that of `weight_arrays`."""
    return {
        "w_in": weight_arrays(f"{name}w_in", layer.w_in, dtype, integers),
        "w_rec": weight_arrays(f"{name}w_rec", layer.w_rec, dtype, integers),
        "bias_in": layer.bias_in.astype(dtype),
        "bias_rec": layer.bias_rec.astype(dtype),
        "threshold": layer.threshold.astype(dtype),
    }


class ReferenceBackend:
    """The backend "reference".

    dtype : float32 returns the bits that all exact backends return. float64 is not exact; its outputs are float64, and
            tests derive bounds from them
    exact : False multiplies int8 blocks in integers, as "cpu" does, with the same bits; in float32 only
    """

    name = "reference"
    exact = True

    def __init__(self, dtype: DTypeLike = np.float32, exact: bool = True):
        self.dtype, self.integers = np.dtype(dtype), not exact
        if self.integers and self.dtype != np.float32:
            raise ValueError(
                f"exact: got False for {self.dtype}, but integer sums are defined for float32; leave it out"
            )
        self.exact = exact and self.dtype == np.float32

    def engine(self, network: Network, *, threads: int = 1) -> ReferenceEngine:
        """An engine with dense copies of the weights.

        Raises ValueError unless `threads` is 1, and for `exact=False` where no matrix is multiplied in integers.
        """
        if threads != 1:
            raise ValueError(f"threads: got {threads}, but the reference backend runs on 1; use backend='cpu'")
        return ReferenceEngine(network, self.dtype, exact=not self.integers)


class ReferenceEngine:
    """A network as dense arrays of one dtype; see `backend.Engine`."""

    dense = False

    def __init__(self, network: Network, dtype: np.dtype, exact: bool = True):
        self.dtype, self.host_inputs = dtype, HostInputs(network, dense=True)
        integers = [] if exact else integer_matrices(network)
        others = SPECIFICATION if dtype == np.float32 else IN_FLOAT64
        self.paths = dict.fromkeys(network.matrices(), others) | dict.fromkeys(integers, INTEGERS)
        self.cells = [layer.cell for layer in network.layers]
        self.parameters = [
            layer_parameters(layer, dtype, f"layers.{k}.", integers) for k, layer in enumerate(network.layers)
        ]
        self.readout = None
        if network.readout is not None:
            weights = weight_arrays("readout", network.readout.weights, dtype, integers)
            self.readout = (weights, network.readout.bias.astype(dtype))

    def stepper(self, state: State) -> None:
        """None: a single step is a run of one step."""
        return

    def prepare(self, inputs: Any) -> Inputs:
        """See `backend.Engine`. Numbers stay a dense array."""
        return self.host_inputs.prepare(inputs)

    def run(self, inputs: Inputs, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`."""
        steps, batch = inputs.steps, inputs.batch
        x = inputs.to_dense().astype(self.dtype)
        cells_after, outputs_after, fired, events, states = [], [], [], [], []
        gates = dict(state.gates)
        with np.errstate(over="ignore", invalid="ignore"):
            parts = zip(self.cells, self.parameters, state.cells, state.outputs, strict=True)
            for k, (cell, parameters, c, y) in enumerate(parts):
                c, y = c.astype(self.dtype), y.astype(self.dtype)
                held = {name: gates[f"layers.{k}.{name}"] for name in parameters if f"layers.{k}.{name}" in gates}
                tapes = forward(cell, parameters, x, c, y, held=held)
                for name, each in tapes[-1].gates.items() if steps else ():
                    gates[f"layers.{k}.{name}"] = HeldGates(each.gates, each.left)
                x = np.array([tape.y for tape in tapes], self.dtype).reshape(steps, batch, y.shape[1])
                all_cells = np.array([tape.c for tape in tapes], self.dtype).reshape(x.shape)
                cells_after.append(all_cells[-1] if steps else c)
                outputs_after.append(x[-1] if steps else y)
                fired.append(FireCounts.of(x))
                events.append(x)
                states.append(all_cells)
            output = x
            if self.readout is not None:
                output, shared = propagate_steps(self.readout[0], x, self.readout[1], gates.get("readout"))
                if shared:
                    gates["readout"] = HeldGates(shared[-1].gates, shared[-1].left)
        return Trace(
            output,
            State(tuple(cells_after), tuple(outputs_after), gates),
            tuple(fired),
            tuple(events) if record_events else (),
            tuple(states) if record_states else (),
            self.paths,
        )
