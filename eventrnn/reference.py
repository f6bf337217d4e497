"""The specification: every rule as plain loops over NumPy arrays, without Numba. Written to be read, and slow.

`step`, `forward` and `backward` work on bare arrays of any precision. `ReferenceBackend` makes them a backend like the
others. In float32 it emulates the FMA instruction, and the exact backends return its bits.

Shapes: T steps, B samples, I inputs, N units; gate rows are packed (u, r, g), in an LSTM (i, f, g, o). Every product
visits *all* presynaptic units, silent ones as well. This is therefore the dense network that an event-driven run of a
pruned network must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from eventrnn import cells
from eventrnn.backend import HostInputs
from eventrnn.cells import Cell
from eventrnn.state import FireCounts, Inputs, State, Trace, gates_not_finite
from eventrnn.weights import GatedBlocks, Weights

if TYPE_CHECKING:
    from eventrnn.network import Network

# Causes of gates that are not finite, in the order of `state.GATE_FAULTS`.
BAD_LOGIT, CANCELLED, TOO_LARGE = 1, 2, 3


def propagate(weights, values, bias):
    """The drive of all gate rows: `bias + sum over j of weights[j] * values[:, j]`, in ascending j, one FMA per term.

    weights : (J, P), by presynaptic unit; or blocks of which every input chooses some
    values  : (B, J), what the presynaptic units sent
    bias    : (P,)

    Returns (B, P).
    """
    if isinstance(weights, ChosenBlocks):
        return propagate_chosen(weights, values, bias)
    drive = np.repeat(bias[None, :], len(values), axis=0)
    for j in range(len(weights)):
        drive = cells.fma(weights[j][None, :], values[:, j, None], drive)
    return drive


@dataclass(frozen=True)
class ChosenBlocks:
    """The arrays of `GatedBlocks` in one precision; `weights/gated.py` defines the product.

    Attributes
    ----------
    name      : of the matrix, for messages
    weights   : (J, P), the matrix without gates
    gate      : (J, K), for K blocks; of two factors (J, rank)
    gate_bias : (K,)
    gate_out  : (rank, K), the second factor; None for one
    block     : (r, c)
    kept      : the number of blocks that an input chooses
    rule      : one of `GATE_RULES`
    """

    name: str
    weights: np.ndarray
    gate: np.ndarray
    gate_bias: np.ndarray
    gate_out: np.ndarray | None
    block: tuple[int, int]
    kept: int
    rule: str


def block_gates(blocks: ChosenBlocks, values) -> np.ndarray:
    """The gate of every block, 0 for those that are not chosen; values (B, J), returns (B, K).

    Raises FloatingPointError for gates that are not finite, by the name of the matrix.
    """
    if blocks.gate_out is None:
        logits = propagate(blocks.gate, values, blocks.gate_bias)
    else:
        inner = propagate(blocks.gate, values, np.zeros_like(blocks.gate_out[:, 0]))
        logits = propagate(blocks.gate_out, inner, blocks.gate_bias)
    gates = gates_of_logits(blocks, logits)
    largest = np.abs(gates).max(axis=1, initial=0) * np.abs(values).max(axis=1, initial=0)
    _need_finite(blocks.name, largest, TOO_LARGE)
    return gates


def gates_of_logits(blocks: ChosenBlocks, logits):
    """`block_gates` of the logits (B, K) of all blocks."""
    _need_finite(blocks.name, logits, BAD_LOGIT)
    gates = np.zeros_like(logits)
    for row, gate in zip(logits, gates, strict=True):
        # A stable sort leaves equal logits in the order of their blocks.
        chosen = np.sort(np.argsort(-row, kind="stable")[: blocks.kept])
        if not len(chosen):
            continue
        kept = row[chosen]
        if blocks.rule == "softmax":
            ratios = cells.exp(kept - kept.max())
        else:
            pivot = kept[np.argmax(np.abs(kept))]
            ratios = kept / pivot if pivot != 0 else np.ones_like(kept)
        total = row.dtype.type(0)
        for ratio in ratios:
            total = total + ratio
        factor = row.dtype.type(len(row)) / total
        _need_finite(blocks.name, factor, CANCELLED)
        gate[chosen] = ratios * factor
    return gates


def propagate_chosen(blocks: ChosenBlocks, values, bias):
    """`propagate` with blocks that every input chooses: each term is `fma(weight, gate * value, sum)`."""
    gates, (r, c) = block_gates(blocks, values), blocks.block
    n_post = blocks.weights.shape[1]
    columns = np.arange(n_post) // c
    drive = np.repeat(bias[None, :], len(values), axis=0)
    for j in range(len(blocks.weights)):
        # The number of the block of each output. A product of gate and value is rounded once.
        block = j // r * -(-n_post // c) + columns
        drive = cells.fma(blocks.weights[j][None, :], gates[:, block] * values[:, j, None], drive)
    return drive


def arrays_of(weights) -> dict[str, np.ndarray]:
    """The arrays of a matrix by the end of their names: "" for its weights, ".gate" and the like for gated blocks."""
    if not isinstance(weights, ChosenBlocks):
        return {"": weights}
    found = {"": weights.weights, ".gate": weights.gate, ".gate_bias": weights.gate_bias}
    return found if weights.gate_out is None else found | {".gate_out": weights.gate_out}


def propagate_back(weights, values, d_drive, *, straight_through: bool = False) -> tuple[np.ndarray, dict]:
    """Back through `propagate`: the gradient of the values (B, J), and of the arrays of the matrix as `arrays_of` names
    them, from the gradient of the drives (B, P).

    The choice of blocks counts as constant. With `straight_through` the gradient passes it as if it were the identity,
    so that blocks that were not chosen have one too. Chosen logits that are all 0 have a gradient of 0 with the rule
    "linear", whose gates have no derivative there.
    """
    if not isinstance(weights, ChosenBlocks):
        return d_drive @ weights.T, {"": values.T @ d_drive}
    blocks, (r, c), gates = weights, weights.block, block_gates(weights, values)
    inner = values if blocks.gate_out is None else values @ blocks.gate
    logits = inner @ (blocks.gate if blocks.gate_out is None else blocks.gate_out) + blocks.gate_bias
    (n_pre, n_post), n_blocks = blocks.weights.shape, gates.shape[1]
    columns = np.arange(n_post) // c
    d_values, d_gates, d_weights = np.zeros_like(values), np.zeros_like(gates), np.zeros_like(blocks.weights)
    for j in range(n_pre):
        block = j // r * -(-n_post // c) + columns
        terms = d_drive * blocks.weights[j]
        d_values[:, j] = (gates[:, block] * terms).sum(axis=1)
        d_weights[j] = (gates[:, block] * values[:, j, None] * d_drive).sum(axis=0)
        for i in range(n_post):
            d_gates[:, block[i]] += values[:, j] * terms[:, i]
    d_logits = np.zeros_like(logits)
    for row in range(len(values)):
        chosen = np.sort(np.argsort(-logits[row], kind="stable")[: blocks.kept])
        # The ratios, up to a common factor, and their derivatives; see `weights/gated.py`.
        ratios = logits[row] if blocks.rule == "linear" else np.exp(logits[row] - logits[row].max())
        slopes = np.ones_like(ratios) if blocks.rule == "linear" else ratios
        total = ratios[chosen].sum()
        if blocks.rule == "linear" and not logits[row][chosen].any():
            continue
        through_mean = (d_gates[row] * gates[row]).sum() / n_blocks
        passing = np.arange(n_blocks) if straight_through else chosen
        d_logits[row, passing] = (slopes * n_blocks / total * (d_gates[row] - through_mean))[passing]
    d_inner = d_logits if blocks.gate_out is None else d_logits @ blocks.gate_out.T
    d_values += d_inner @ blocks.gate.T
    gradients = {"": d_weights, ".gate": values.T @ d_inner, ".gate_bias": d_logits.sum(axis=0)}
    return d_values, gradients if blocks.gate_out is None else gradients | {".gate_out": inner.T @ d_logits}


def _need_finite(name: str, numbers: np.ndarray, fault: int) -> None:
    if not np.isfinite(numbers).all():
        raise gates_not_finite(name, fault)


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


@dataclass
class LSTMTape:
    """One step of one layer of LSTM cells. Every array has the shape (B, N).

    Attributes
    ----------
    i, f, g, o         : gates and candidate
    c_before, y_before : cell and output of the step before
    y, c               : output and cell
    """

    i: np.ndarray
    f: np.ndarray
    g: np.ndarray
    o: np.ndarray
    c_before: np.ndarray
    y_before: np.ndarray
    y: np.ndarray
    c: np.ndarray


def step(cell: Cell, parameters: dict, x, c, y, *, smooth: bool = False) -> Tape | LSTMTape:
    """One step of one layer: a `Tape`, or an `LSTMTape` for LSTM cells.

    parameters : arrays by name, as `layer_parameters` returns them
    x          : (B, I) input
    c, y       : (B, N) cells and outputs of the step before
    smooth     : replace the event by the smooth step whose derivative is the surrogate, for finite differences
    """
    if cell.name == "lstm":
        return _lstm_step(parameters, x, c, y)
    threshold = parameters["threshold"]
    w_rec, bias_rec = parameters["w_rec"], parameters["bias_rec"]
    n, plain = len(threshold), not cell.thresholded
    in_u, in_r, in_g = np.split(propagate(parameters["w_in"], x, parameters["bias_in"]), 3, axis=1)
    if not cell.reset_first:
        rec_u, rec_r, rec_g = np.split(propagate(w_rec, y, bias_rec), 3, axis=1)
        value = cells.gru_value if plain else cells.egru_value
        v, u, r, g = value(in_u, in_r, in_g, rec_u, rec_r, rec_g, c)
    else:
        rec_u, rec_r = np.split(propagate(w_rec[:, : 2 * n], y, bias_rec[: 2 * n]), 2, axis=1)
        r = cells.egru_reset_gate(in_r, rec_r)
        rec_g = propagate(w_rec[:, 2 * n :], r * y, bias_rec[2 * n :])
        if plain:
            v, u, g = cells.gru_before_value(in_u, in_g, rec_u, rec_g, c)
        else:
            v, u, g = cells.egru_paper_value(in_u, in_g, rec_u, rec_g, c, y)
    if plain:
        return Tape(u, r, g, rec_g, c, y, v, np.ones_like(v), np.zeros_like(v), v, v)
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
    return Tape(u, r, g, rec_g, c, y, v, event, slope, sent, c_after)


def _lstm_step(parameters: dict, x, c, y) -> LSTMTape:
    in_i, in_f, in_g, in_o = np.split(propagate(parameters["w_in"], x, parameters["bias_in"]), 4, axis=1)
    rec_i, rec_f, rec_g, rec_o = np.split(propagate(parameters["w_rec"], y, parameters["bias_rec"]), 4, axis=1)
    h, c_after, i, f, g, o = cells.lstm_value(in_i, in_f, in_g, in_o, rec_i, rec_f, rec_g, rec_o, c)
    return LSTMTape(i, f, g, o, c, y, h, c_after)


def forward(cell: Cell, parameters: dict, x, c, y, *, smooth: bool = False) -> list[Tape | LSTMTape]:
    """One layer over inputs x (T, B, I), from the state c, y (B, N). Returns the tape of each step."""
    tapes: list[Tape | LSTMTape] = []
    for t in range(len(x)):
        tapes.append(step(cell, parameters, x[t], c, y, smooth=smooth))
        c, y = tapes[-1].c, tapes[-1].y
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

    def back(name: str, values, d_drive):
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
            d_y_later = d_y_later + back("w_rec", k.y_before, d_drive_rec)
        gradients["bias_in"] += d_drive_in.sum(axis=0)
        gradients["bias_rec"] += d_drive_rec.sum(axis=0)
        gradients["threshold"] += d_threshold.sum(axis=0)
        d_x[t] = back("w_in", x[t], d_drive_in)
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


def weight_arrays(name: str, weights: Weights, dtype: DTypeLike) -> Any:
    """A matrix as a dense array, or the arrays of gated blocks, for `propagate`."""
    if not isinstance(weights, GatedBlocks):
        return weights.to_dense().astype(dtype)
    dense, gate, bias = (a.astype(dtype) for a in (weights.blocks.to_dense(), weights.gate, weights.gate_bias))
    out = None if weights.gate_out is None else weights.gate_out.astype(dtype)
    return ChosenBlocks(name, dense, gate, bias, out, weights.block, weights.kept_blocks, weights.gate_rule)


def layer_parameters(layer, dtype: DTypeLike = np.float32, name: str = "") -> dict:
    """The arrays of a layer by name, with dense weights: `w_in` (I, 3N), `w_rec` (N, 3N), `bias_in` and `bias_rec`
    (3N,), `threshold` (N,). An LSTM has 4N in place of 3N. `name` is what stands before the names of its matrices in
    messages."""
    return {
        "w_in": weight_arrays(f"{name}w_in", layer.w_in, dtype),
        "w_rec": weight_arrays(f"{name}w_rec", layer.w_rec, dtype),
        "bias_in": layer.bias_in.astype(dtype),
        "bias_rec": layer.bias_rec.astype(dtype),
        "threshold": layer.threshold.astype(dtype),
    }


class ReferenceBackend:
    """The backend "reference".

    dtype : float32 returns the bits that all exact backends return. float64 is not exact; its outputs are float64, and
            tests derive bounds from them
    """

    name = "reference"
    exact = True

    def __init__(self, dtype: DTypeLike = np.float32):
        self.dtype = np.dtype(dtype)
        self.exact = self.dtype == np.float32

    def engine(self, network: Network, *, threads: int = 1) -> ReferenceEngine:
        """An engine with dense copies of the weights. Raises ValueError unless `threads` is 1."""
        if threads != 1:
            raise ValueError(f"threads: got {threads}, but the reference backend runs on 1; use backend='cpu'")
        return ReferenceEngine(network, self.dtype)


class ReferenceEngine:
    """A network as dense arrays of one dtype; see `backend.Engine`."""

    dense = False

    def __init__(self, network: Network, dtype: np.dtype):
        self.dtype, self.host_inputs = dtype, HostInputs(network, dense=True)
        self.cells = [layer.cell for layer in network.layers]
        self.parameters = [layer_parameters(layer, dtype, f"layers.{k}.") for k, layer in enumerate(network.layers)]
        self.readout = None
        if network.readout is not None:
            weights = weight_arrays("readout", network.readout.weights, dtype)
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
