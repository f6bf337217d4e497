"""Audit: recompute the operations of a run by independent means and compare.

`count` multiplies how often each unit fired by the number of weights in its row. The audit instead builds dense 0/1
matrices of the weights and walks over the recorded events. Where NeuroBench is installed, its `single_layer_MACs`
(Yik et al., NeuroBench, Nature Communications 2025: effective MACs and ACs are multiplications of a non-zero
activation by a non-zero weight) is compared as well, and `NEUROBENCH_DIFFERENCES` names where its definitions differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np

from eventrnn import cells
from eventrnn._checks import need_kind
from eventrnn.counting.counts import (
    Counts,
    OpCounts,
    count,
    count_per_step,
    dense_inputs,
    events_by_matrix,
    rows_of,
)
from eventrnn.counting.neurobench import (
    NEUROBENCH_DIFFERENCES,
    NeuroBenchMetrics,
    neurobench_metrics,
    neurobench_model,
)
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.reference_products import block_gates, gates_of_step, weight_arrays
from eventrnn.simulation import Simulation
from eventrnn.state import HeldGates
from eventrnn.weights import CSR, NM, BlockCSR, Dense, GatedBlocks, Weights

Number = int | float

# Rows of gated blocks whose gates the specification computes at once. Its loops over units cost as much for one row.
GATED_ROWS = 128


@dataclass(frozen=True)
class Audit:
    """The result of `audit`.

    Attributes
    ----------
    rows        : (matrix or layer, quantity, counted, recomputed, source). `source` is "formula" (dense masks times
                  events), "equations" (the rules of `cells.py`, evaluated with numbers that count their products),
                  "per step" (the sum of `count_per_step`) or "neurobench"
    differences : known differences of definition, in words; empty where NeuroBench was not used
    """

    rows: tuple[tuple[str, str, Number, Number, str], ...]
    differences: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether every recomputed number equals the counted one."""
        return all(counted == recomputed for _, _, counted, recomputed, _ in self.rows)

    def __str__(self) -> str:
        width = max([12, *(len(quantity) + 2 for _, quantity, *_ in self.rows)])
        lines = [f"{'matrix':<16}{'quantity':<{width}}{'counted':>16}{'recomputed':>16}  source"]
        lines += [
            f"{m:<16}{q:<{width}}{_shown(a):>16}{_shown(b):>16}  {s}{'' if a == b else '  DIFFERS'}"
            for m, q, a, b, s in self.rows
        ]
        return "\n".join([*lines, *(f"note: {text}" for text in self.differences)])


def _shown(number: Number) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,.10g}"


def audit(network: Network, simulation: Simulation, counts: OpCounts | None = None) -> Audit:
    """Recompute the operations of a run from its recorded events and the weight matrices, and compare.

    Parameters
    ----------
    network, simulation : the network and its run, recorded with record="events"
    counts : the counts to check; by default those of `count`

    The recomputation uses dense 0/1 matrices and the recorded events, neither fan-out tables nor fire counters. The
    element-wise work of the layers is that of the rules of `cells.py`, evaluated with numbers that count their
    products, and the state bytes are those of the arrays that a step reads and writes. Both are compared with the sums
    of `count_per_step` too. Bytes of weights are not audited. Where neurobench is installed, its `single_layer_MACs`
    is compared too. Cost: O(size of every matrix) memory and time. Raises ValueError where events were not recorded,
    TypeError where they are arrays on a GPU.
    """
    counts = count(network, simulation) if counts is None else counts
    need_kind("counts", counts, OpCounts, "the OpCounts of `count`, or None")
    differences: tuple[str, ...] = ()
    rows: list[tuple[str, str, Number, Number, str]] = []
    for name, (weights, events) in events_by_matrix(network, simulation).items():
        counted = counts.matrices[name]
        if isinstance(weights, GatedBlocks):
            rows += _gated_rows(name, weights, events, counted, simulation)
            continue
        inputs, columns = dense_inputs(network, name, weights), weights.shape[1]
        looked_up = inputs < weights.shape[0]
        if looked_up and isinstance(weights, Dense):
            # Of a table of symbols, the rows that the run reads: the whole table may be large.
            read, indices = np.unique(events.indices, return_inverse=True)
            weights, shape = rows_of(weights, read), (*events.shape[:2], len(read))
            events = Events(events.indptr, indices.astype(np.int32), events.values, shape)
        there = weights.to_dense() != 0
        executed = _executed_mask(weights)
        fired = np.bincount(events.indices, minlength=events.shape[2])
        graded = np.bincount(events.indices[events.graded], minlength=events.shape[2])
        formula = {
            "dense": simulation.sample_steps * inputs * columns,
            "effective": int((there * fired[:, None]).sum()),
            "executed": simulation.sample_steps * inputs * columns
            if simulation.dense
            else int((executed * fired[:, None]).sum()),
            "graded": int((there * graded[:, None]).sum()),
            "binary": int((there * (fired - graded)[:, None]).sum()),
        }
        rows += [(name, quantity, getattr(counted, quantity), value, "formula") for quantity, value in formula.items()]
        compared = _neurobench_rows(name, weights, events, counted, simulation.lengths)
        # Of a look-up NeuroBench has no dense count but that of all rows.
        compared = [row for row in compared if not (looked_up and row[1] == "dense")]
        differences = NEUROBENCH_DIFFERENCES if compared else differences
        rows += compared
    carried = {name: events for name, (_, events) in events_by_matrix(network, simulation).items()}
    for k, layer in enumerate(network.layers):
        rule = _RULES[layer.cell.name][layer.cell.variant]
        units, events = simulation.sample_steps * layer.units, len(carried[f"layers.{k}.w_rec"].indices)
        for quantity, value in (
            ("gate_ops", units * products_of(rule.value) + rule.products_per_event * events),
            # Bytes of float32 cells and outputs, which are both written.
            ("state_bytes", 4 * units * (rule.states_read + 2)),
        ):
            rows.append((f"layers.{k}", quantity, getattr(counts, quantity)[k], value, "equations"))
    per_layer = [value for key, value in count_per_step(network, simulation).items() if "gate_ops" in value]
    for quantity in ("gate_ops", "state_bytes"):
        for k, values in enumerate(per_layer):
            rows.append(
                (f"layers.{k}", quantity, getattr(counts, quantity)[k], int(values[quantity].sum()), "per step")
            )
    return Audit(tuple(rows), differences)


def audit_neurobench(network: Network, simulation: Simulation, metrics: NeuroBenchMetrics | None = None) -> Audit:
    """Compare the metrics of a run with those that the package `neurobench` computes by its own functions.

    network, simulation : the network and its run, recorded with record="events"
    metrics             : the metrics to check; by default those of `neurobench_metrics`

    The recorded values are shown to linear layers that hold the dense matrices, with NeuroBench's hooks on them. Needs
    torch and neurobench, and the memory of `neurobench_model`. Raises ImportError without them, and as
    `neurobench_metrics` does.
    """
    metrics = neurobench_metrics(network, simulation) if metrics is None else metrics
    need_kind("metrics", metrics, NeuroBenchMetrics, "those of `neurobench_metrics`, or None")
    model = neurobench_model(network)
    import torch
    from neurobench.metrics import static, workload

    # Of a batch of data, NeuroBench reads the number of samples only.
    operations, data = workload.SynapticOperations(), (torch.empty(simulation.batch, 0),)
    model.register_hooks()
    try:
        model.__net__().show(simulation)
        operations(model, None, data)
        found = {
            "Footprint": static.Footprint()(model),
            "ParameterCount": static.ParameterCount()(model),
            "ConnectionSparsity": static.ConnectionSparsity()(model),
            "ActivationSparsity": workload.ActivationSparsity()(model, None, data),
        }
    finally:
        model.cleanup_hooks()
    ours = metrics.as_dict()
    rows = [("network", name, ours[name], value, "neurobench") for name, value in found.items()]
    rows += [
        ("network", name, ours["SynapticOperations"][name], value, "neurobench")
        for name, value in operations.compute().items()
    ]
    return Audit(tuple(rows), NEUROBENCH_DIFFERENCES)


@dataclass(frozen=True)
class _Rule:
    """What a step of a cell does element by element.

    Attributes
    ----------
    value              : the rule of `cells.py`
    states_read        : arrays of cells and outputs that a step reads, apart from events
    products_per_event : products per event that is carried into the step: `r * y` where the reset gate is first
    """

    value: Callable[..., Any]
    states_read: int = 1
    products_per_event: int = 0


# Not from `EQUATIONS`, whose numbers `count` uses.
_RULES = {
    "egru": {"evnn": _Rule(cells.egru_value), "paper": _Rule(cells.egru_paper_value, 2, 1)},
    "gru": {"after": _Rule(cells.gru_value), "before": _Rule(cells.gru_before_value, 2, 1)},
    "lstm": {"standard": _Rule(cells.lstm_value)},
}


class _Counting:
    """A number that counts the products it takes part in."""

    def __init__(self, value: float, products: list[int]):
        self.value, self.products = value, products

    def _other(self, value: Any) -> _Counting:
        return _Counting(value, self.products)

    def __add__(self, other: Any) -> _Counting:
        return self._other(self.value + _plain(other))

    def __mul__(self, other: Any) -> _Counting:
        self.products[0] += 1
        return self._other(self.value * _plain(other))

    def __sub__(self, other: Any) -> _Counting:
        return self._other(self.value - _plain(other))

    def __rsub__(self, other: Any) -> _Counting:
        return self._other(_plain(other) - self.value)

    def __neg__(self) -> _Counting:
        return self._other(-self.value)

    def __rtruediv__(self, other: Any) -> _Counting:
        return self._other(_plain(other) / self.value)

    # NumPy calls these for its functions of objects.
    def exp(self) -> _Counting:
        return self._other(np.exp(self.value))

    def tanh(self) -> _Counting:
        return self._other(np.tanh(self.value))

    __radd__, __rmul__ = __add__, __mul__


def _plain(number: Any) -> Any:
    return number.value if isinstance(number, _Counting) else number


def products_of(rule: Callable[..., Any]) -> int:
    """The multiplications of a rule of `cells.py` for one unit, those within a sigmoid or a tanh left out: the rule is
    evaluated with numbers that count."""
    products = [0]
    numbers = [np.array([_Counting(0.5, products)], object) for _ in signature(rule).parameters]
    rule(*numbers)
    return products[0]


def _gated_rows(
    name: str, weights: GatedBlocks, events: Events, counted: Counts, simulation: Simulation
) -> list[tuple[str, str, Number, Number, str]]:
    """Rows of the audit for a matrix of gated blocks, from the gates of the specification and the rows of a dense 0/1
    matrix. NeuroBench has no such matrix."""
    there, executed = weights.blocks.to_dense() != 0, _executed_mask(weights.blocks) != 0
    (r, c), grid, rows = weights.block, weights.grid, simulation.sample_steps
    found = {"dense": rows * there.size, "effective": 0, "executed": 0, "chosen": rows * weights.kept_blocks}
    found["blocks"] = 0
    for part, gates in _rows_and_gates(name, weights, events.to_dense(), simulation):
        for row, chosen in zip(part, (gates != 0).reshape(-1, *grid), strict=True):
            fired = np.flatnonzero(row)
            columns = np.repeat(chosen[fired // r], c, axis=1)
            products = columns & executed[fired]
            used = np.zeros(grid, bool)
            np.logical_or.at(used, fired // r, products.reshape(-1, grid[1], c).any(axis=2))
            found["effective"] += np.count_nonzero(columns[:, : there.shape[1]] & there[fired])
            found["executed"] += np.count_nonzero(products)
            found["blocks"] += np.count_nonzero(used)
    return [(name, quantity, getattr(counted, quantity), value, "formula") for quantity, value in found.items()]


def _rows_and_gates(
    name: str, weights: GatedBlocks, x: np.ndarray, simulation: Simulation
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All inputs (rows, n_pre) of x (steps, batch, n_pre), without padding and some at a time, and their gates."""
    arrays = weight_arrays(name, weights, np.float32)
    steps = np.full(x.shape[1], len(x)) if simulation.lengths is None else simulation.lengths
    with np.errstate(over="ignore", invalid="ignore"):
        if weights.gate_period == 1:
            rows = np.concatenate([x[:end, b] for b, end in enumerate(steps)])
            for first in range(0, len(rows), GATED_ROWS):
                part = rows[first : first + GATED_ROWS]
                yield part, block_gates(arrays, part)
            return
        # The choices of a sample hold for several of its steps, one after the other.
        held = simulation.initial.gates[name]
        gates, left = held.gates.astype(np.float32), held.left.copy()
        for t, row in enumerate(x):
            there = np.flatnonzero(steps > t)
            step = gates_of_step(arrays, row[there], HeldGates(gates[there], left[there]))
            gates[there], left[there] = step.gates, step.left
            yield row[there], step.gates


def _neurobench_rows(name: str, weights: Weights, events: Events, counted: Counts, lengths: np.ndarray | None) -> list:
    """Rows of the audit by NeuroBench for one matrix; none where it is not installed."""
    try:
        import torch
        from neurobench.metrics.utils.layers import single_layer_MACs
    except ImportError:
        return []
    linear = torch.nn.Linear(*weights.shape, bias=False, dtype=torch.float64)
    linear.weight.data = torch.from_numpy(weights.to_dense().T.astype(np.float64))
    rows = events.to_dense().astype(np.float64)
    present = np.arange(events.shape[0])[:, None] < (events.shape[0] if lengths is None else lengths)
    dense = torch.from_numpy(rows[np.broadcast_to(present, events.shape[:2])])
    pairs = (("effective", counted.effective, False), ("dense", counted.dense, True))
    return [
        (name, quantity, ours, int(single_layer_MACs(dense, linear, total=total)[0]), "neurobench")
        for quantity, ours, total in pairs
    ]


def _executed_mask(weights: Weights) -> np.ndarray:
    """(n_pre, columns) 0/1: the entries that count as executed, which are the stored ones, padding columns included."""
    n_pre, n_post = weights.shape
    if isinstance(weights, CSR):
        mask = np.zeros((n_pre, n_post), np.int64)
        mask[np.repeat(np.arange(n_pre), np.diff(weights.indptr)), weights.indices] = 1
        return mask
    if isinstance(weights, BlockCSR):
        r, c = weights.block
        mask = np.zeros((-(-n_pre // r) * r, -(-n_post // c) * c), np.int64)
        for row in range(len(weights.indptr) - 1):
            for column in weights.indices[weights.indptr[row] : weights.indptr[row + 1]]:
                mask[row * r : (row + 1) * r, column * c : (column + 1) * c] = 1
        return mask[:n_pre]
    if isinstance(weights, NM):
        return weights.kept().astype(np.int64)
    return np.ones((n_pre, n_post), np.int64)
