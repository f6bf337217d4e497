"""Exact operation counts of a run: integers per matrix, layer, step and sample.

Counts are sums of row sizes over events. They are computed from how often each unit fired, outside the kernels, and so
are the same on every backend. Definitions (all int64):

| count          | definition                                                                                     |
| -------------- | ---------------------------------------------------------------------------------------------- |
| `dense`        | multiplications of a dense engine: every input x every weight. Of a one-hot input             |
|                | (`Network.one_hot`) one row of weights, which a dense engine looks up too                      |
| `effective`    | non-zero event x non-zero weight: the effective MACs and ACs of NeuroBench (Yik et al. 2025)   |
| `executed`     | multiplications of an event-driven engine in the format of the matrix: the stored entries of   |
|                | the rows of fired units (`Weights.executed_out`), with zeros inside blocks and padding columns  |
|                | of blocks at the edge, without spare vector lanes. Of a dense engine (`Simulation.dense`): all |
| `graded`       | effective multiplications by a graded value: multiply-accumulates (MAC)                        |
| `binary`       | effective multiplications by -1 or 1: accumulates (AC); decided per event                      |
| `gate_ops`     | element-wise multiplications of the cell: 3 per unit and step (EGRU and GRU: reset, keep,      |
|                | candidate; LSTM: input, forget, output). Where the reset gate comes before the product (EGRU   |
|                | "paper", GRU "before") 2 per unit and step, and 1 per event carried into the step              |
| `weight_bytes` | bytes of values, indices and scales of the rows of fired units, each time they are used        |
| `selection`, `chosen`, `blocks` | of gated blocks only: see `gated.py`, which also defines the other counts of such  |
|                | matrices                                                                                       |
| `state_bytes`  | bytes of cells read and written and of outputs written: 12 per unit and step. Where the reset  |
|                | gate comes before the product, outputs are read too: 16                                        |

Embedding look-ups are free, the read-out is counted, biases are not. A row of a table that `fold` made is counted: a
symbol is one event, times the weights of its row. `backward.py` defines the counts of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import numpy as np

from eventrnn._checks import need_kind
from eventrnn.cells import Cell
from eventrnn.counting.gated import counts_of_rows
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.simulation import Simulation
from eventrnn.state import FireCounts, State
from eventrnn.weights import Dense, GatedBlocks, MatrixId, Weights

NOTE = "embedding look-ups free, read-out counted, biases not counted"


@dataclass(frozen=True)
class Counts:
    """Operations of one matrix, or of several, over a run. Integers; the head of this file defines them."""

    dense: int = 0
    effective: int = 0
    executed: int = 0
    graded: int = 0
    binary: int = 0
    weight_bytes: int = 0
    selection: int = 0
    chosen: int = 0
    blocks: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class OpCounts:
    """Operations of a run.

    Attributes
    ----------
    matrices     : name of a matrix, as in `Network.matrices()` -> its counts
    gate_ops     : element-wise multiplications by layer
    state_bytes  : bytes of cells and outputs by layer
    steps, batch : size of the run
    sample_steps : steps of all samples together, without padding; divide by them for figures per step and sample
    """

    matrices: Mapping[str, Counts]
    gate_ops: tuple[int, ...]
    state_bytes: tuple[int, ...]
    steps: int
    batch: int
    sample_steps: int

    @property
    def total(self) -> Counts:
        """Sum over all matrices."""
        return sum(self.matrices.values(), Counts())

    def layer(self, k: int) -> Counts:
        """Sum of both matrices of layer k."""
        return self.matrices[f"layers.{k}.w_in"] + self.matrices[f"layers.{k}.w_rec"]

    @property
    def reduction(self) -> float:
        """dense / effective; infinite where there was no effective operation."""
        total = self.total
        return total.dense / total.effective if total.effective else float("inf")

    def __add__(self, other: OpCounts) -> OpCounts:
        """The counts of two consecutive runs. Raises ValueError where their matrices or batches differ."""
        if set(self.matrices) != set(other.matrices) or self.batch != other.batch:
            raise ValueError("counts: can only add runs of the same network and batch")
        return OpCounts(
            {name: self.matrices[name] + other.matrices[name] for name in self.matrices},
            tuple(a + b for a, b in zip(self.gate_ops, other.gate_ops, strict=True)),
            tuple(a + b for a, b in zip(self.state_bytes, other.state_bytes, strict=True)),
            self.steps + other.steps,
            self.batch,
            self.sample_steps + other.sample_steps,
        )

    def as_dict(self) -> dict:
        """The counts as JSON values: totals, by matrix, by layer, and the note on what is counted."""
        return {
            "steps": self.steps,
            "batch": self.batch,
            "sample_steps": self.sample_steps,
            "total": asdict(self.total),
            "gate_ops": sum(self.gate_ops),
            "state_bytes": sum(self.state_bytes),
            "matrices": {name: asdict(count) for name, count in self.matrices.items()},
            "gate_ops_by_layer": list(self.gate_ops),
            "state_bytes_by_layer": list(self.state_bytes),
            "note": NOTE,
        }


def count(network: Network, simulation: Simulation) -> OpCounts:
    """Operations of a run, from the number of events of each unit. Needs no recorded events. O(weights) time.

    A network with gated blocks needs them (`record="events"`), and `gated.counts_of_rows` says how long it takes. The
    recurrent product of a step uses the events of the step before. The events of the initial state are therefore
    counted, and those of the last step of each sample are not. Padding is not counted. Raises ValueError for the run of
    a network of another shape, and for gated blocks without recorded events.

    >>> network = eventrnn.Network.random([8], inputs=3, rng=np.random.default_rng(0), threshold=0.1)
    >>> counts = count(network, eventrnn.simulate(network, np.ones((5, 1, 3))))
    >>> counts.matrices["layers.0.w_in"].dense  # 5 steps, 3 inputs, 3 x 8 rows
    360
    """
    _need_same_network(network, simulation)
    rows = simulation.sample_steps
    matrices, gate_ops, state_bytes = {}, [], []
    below = simulation.input_fired
    for k, layer in enumerate(network.layers):
        carried = _carried_counts(simulation, k)
        inputs = dense_inputs(network, f"layers.{k}.w_in", layer.w_in)
        matrices[f"layers.{k}.w_in"] = _matrix_counts(layer.w_in, below, rows * inputs, simulation.dense)
        matrices[f"layers.{k}.w_rec"] = _matrix_counts(layer.w_rec, carried, rows * layer.units, simulation.dense)
        each, by_event, nbytes = _element_wise(layer.cell)
        gate_ops.append(rows * layer.units * each + by_event * int(carried.total.sum()))
        state_bytes.append(rows * layer.units * nbytes)
        below = simulation.fired[k]
    if network.readout is not None:
        readout = network.readout.weights
        matrices["readout"] = _matrix_counts(readout, below, rows * readout.shape[0], simulation.dense)
    matrices |= {
        name: Counts(**{count: int(values.sum()) for count, values in found.items()})
        for name, found in _gated_counts(network, simulation).items()
    }
    size = simulation.steps, simulation.batch, rows
    return OpCounts(matrices, tuple(gate_ops), tuple(state_bytes), *size)


def count_per_step(network: Network, simulation: Simulation) -> dict[str, dict[str, np.ndarray]]:
    """Counts per step and sample: arrays (steps, batch) int64, by matrix and count.

    Each `layers.k` has `gate_ops` and `state_bytes`; only gated blocks have `selection`, `chosen` and `blocks`. Counts
    of padding are 0. O(events + weights) time, and that of `gated.counts_of_rows` for gated blocks. Raises
    ValueError for a run without record="events", TypeError where the events are arrays on a GPU.
    """
    result, present = {}, _present(simulation)
    for name, (weights, events) in events_by_matrix(network, simulation).items():
        rows, graded = events.rows(), events.graded
        tables = (weights.fan_out(), weights.executed_out(), weights.row_bytes())
        fan_out, executed_out, row_bytes = (table[events.indices] for table in tables)
        whole = present * (dense_inputs(network, name, weights) * weights.shape[1])

        def per_row(amount, rows=rows, shape=events.shape[:2]):
            total = np.zeros(shape[0] * shape[1], np.int64)
            np.add.at(total, rows, amount)
            return total.reshape(shape)

        result[name] = (
            {}
            if isinstance(weights, GatedBlocks)
            else {
                "dense": whole,
                "effective": per_row(fan_out),
                "executed": whole.copy() if simulation.dense else per_row(executed_out),
                "graded": per_row(fan_out * graded),
                "binary": per_row(fan_out * ~graded),
                "weight_bytes": 4 * whole if simulation.dense else per_row(row_bytes),
            }
        )
        matrix = MatrixId(name)
        if matrix.layer is not None and matrix.recurrent:
            layer = network.layers[matrix.layer]
            each, by_event, nbytes = _element_wise(layer.cell)
            carried = np.diff(events.indptr).reshape(events.shape[:2])
            units = present * layer.units
            result[name.removesuffix(".w_rec")] = {
                "gate_ops": each * units + by_event * carried,
                "state_bytes": nbytes * units,
            }
    return result | _gated_counts(network, simulation)


def _present(simulation: Simulation) -> np.ndarray:
    """(steps, batch) int64, 0 for padding and else 1."""
    present = np.ones((simulation.steps, simulation.batch), np.int64)
    if simulation.lengths is not None:
        present *= np.arange(simulation.steps)[:, None] < simulation.lengths
    return present


def _gated_counts(network: Network, simulation: Simulation) -> dict[str, dict[str, np.ndarray]]:
    """The counts per step and sample of the matrices of gated blocks."""
    gated = {name: w for name, w in network.matrices().items() if isinstance(w, GatedBlocks)}
    if gated and simulation.inputs is None:
        raise ValueError(
            f'{next(iter(gated))}: which of its gated blocks are chosen depends on the events; run with record="events"'
        )
    received, present = events_by_matrix(network, simulation) if gated else {}, _present(simulation)
    held = simulation.initial.gates
    return {
        name: counts_of_rows(name, weights, received[name][1], present, held.get(name))
        for name, weights in gated.items()
    }


def _element_wise(cell: Cell) -> tuple[int, int, int]:
    """Multiplications per unit and step, multiplications per event carried into it, state bytes per unit and step."""
    return cell.equations.multiplications, int(cell.reset_first), 16 if cell.reset_first else 12


def dense_inputs(network: Network, name: str, weights: Weights) -> int:
    """How many inputs of a matrix a dense engine multiplies per step and sample: all, or the one of a one-hot input."""
    return 1 if network.one_hot and name == MatrixId.of(0, "w_in") else weights.shape[0]


def _matrix_counts(weights: Weights, fired: FireCounts, inputs: int, dense_engine: bool) -> Counts:
    """Counts of a matrix. inputs : the inputs that a dense engine multiplies in all steps and samples"""
    dense = inputs * weights.shape[1]
    sent = np.flatnonzero(fired.total)
    if isinstance(weights, Dense) and 4 * len(sent) < len(weights.values):
        # A short run reads few rows of a large table.
        weights, fired = rows_of(weights, sent), FireCounts(fired.graded[sent], fired.binary[sent])
    fan_out = weights.fan_out()
    graded, binary = int(fired.graded @ fan_out), int(fired.binary @ fan_out)
    executed, nbytes = int(fired.total @ weights.executed_out()), int(fired.total @ weights.row_bytes())
    if dense_engine:
        executed, nbytes = dense, 4 * dense
    return Counts(dense, graded + binary, executed, graded, binary, nbytes)


def rows_of(weights: Dense, units: np.ndarray) -> Dense:
    """The rows of some presynaptic units as a matrix of their own."""
    return Dense(weights.values[units], None if weights.scales is None else weights.scales[units])


def _carried_counts(simulation: Simulation, k: int) -> FireCounts:
    first = _state_counts(simulation.initial, k)
    last = _state_counts(simulation.state, k)
    sent = simulation.fired[k]
    return FireCounts(sent.graded + first.graded - last.graded, sent.binary + first.binary - last.binary)


def _state_counts(state: State, k: int) -> FireCounts:
    y = state.outputs[k]
    binary = np.abs(y) == 1
    return FireCounts(((y != 0) & ~binary).sum(axis=0), binary.sum(axis=0))


def events_by_matrix(network: Network, simulation: Simulation) -> dict[str, tuple[Weights, Events]]:
    """Name of a matrix -> (weights, the events that it multiplies, one step after another).

    Raises ValueError for a run without record="events", TypeError where the events are arrays on a GPU.
    """
    if simulation.inputs is None:
        raise ValueError('simulation: has no recorded events; run with record="events"')
    if not isinstance(simulation.inputs, Events):
        raise TypeError("simulation: its events are arrays on a GPU; run it with NumPy inputs to count per step")
    _need_same_network(network, simulation)
    pairs: dict[str, tuple[Weights, Events]] = {}
    below = simulation.inputs
    for k, layer in enumerate(network.layers):
        sent = simulation.events[k]
        first = Events.from_dense(simulation.initial.outputs[k][None].astype(np.float32))
        carried = _delayed(first, sent)
        if simulation.lengths is not None:
            # The events of the last step of a sample have no step after it.
            carried = carried.until(simulation.lengths)
        pairs[MatrixId.of(k, "w_in", layer.cell.gates)] = (layer.w_in, below)
        pairs[MatrixId.of(k, "w_rec", layer.cell.gates)] = (layer.w_rec, carried)
        below = sent
    if network.readout is not None:
        pairs[MatrixId("readout")] = (network.readout.weights, below)
    return pairs


def _need_same_network(network: Network, simulation: Simulation) -> None:
    """Raise TypeError for objects of other classes, and ValueError for the run of a network of another shape."""
    need_kind("network", network, Network, "a Network")
    need_kind("simulation", simulation, Simulation, "the result of simulate or Simulator.run")
    run = [len(simulation.input_fired.graded), *(len(fired.graded) for fired in simulation.fired)]
    own = [network.layers[0].inputs, *(layer.units for layer in network.layers)]
    if run != own:
        raise ValueError(
            f"simulation: the run of a network with {run[0]} inputs and layers of {run[1:]} units, but the network has "
            f"{own[0]} and {own[1:]}; give the network that was run"
        )


def _delayed(first: Events, events: Events) -> Events:
    """The events delayed by one step: `first`, then all steps but the last."""
    steps, batch, size = events.shape
    if steps == 0:
        return events
    rows = (steps - 1) * batch
    stop = events.indptr[rows]
    body = Events(events.indptr[: rows + 1], events.indices[:stop], events.values[:stop], (steps - 1, batch, size))
    return Events.concatenate([first, body])
