"""MOVED."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eventrnn.counting.counts import Counts, OpCounts, count, count_per_step, senders
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.simulation import Simulation
from eventrnn.weights import CSR, NM, BlockCSR, Weights


@dataclass(frozen=True)
class Audit:
    """The outcome of `audit`: per matrix, the counts and the same by other means.

    Attributes
    ----------
    rows        : (matrix, quantity, counted, recomputed, source); `source` is "formula" (from dense masks and
                  events), "per step" (summed over steps) or "neurobench"
    differences : where NeuroBench was asked, the known differences of definition, in words
    """

    rows: tuple[tuple[str, str, int, int, str], ...]
    differences: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        return all(counted == recomputed for _, _, counted, recomputed, _ in self.rows)

    def __str__(self) -> str:
        lines = [f"{'matrix':<16}{'quantity':<12}{'counted':>16}{'recomputed':>16}  source"]
        lines += [f"{m:<16}{q:<12}{a:>16,}{b:>16,}  {s}{'' if a == b else '  DIFFERS'}" for m, q, a, b, s in self.rows]
        return "\n".join([*lines, *(f"note: {text}" for text in self.differences)])


def audit(network: Network, simulation: Simulation, counts: OpCounts | None = None) -> Audit:
    """Recompute the counts of a run from its recorded events and the bare weight matrices, and compare.

    Another route than `count`: dense 0/1 matrices and a walk over the events, no fan-out table, no fire counters.
    With neurobench installed, its `single_layer_MACs` is asked too. Needs record="events". O(events x fan-out).
    """
    counts = counts or count(network, simulation)
    differences: tuple[str, ...] = ()
    rows: list[tuple[str, str, int, int, str]] = []
    for name, (weights, events) in senders(network, simulation).items():
        counted = counts.matrices[name]
        there = weights.to_dense() != 0
        stored = _stored_mask(weights)
        fired = np.bincount(events.indices, minlength=events.shape[2])
        graded = np.bincount(events.indices[events.graded], minlength=events.shape[2])
        formula = {
            "dense": events.shape[0] * events.shape[1] * there.size,
            "effective": int((there * fired[:, None]).sum()),
            "executed": events.shape[0] * events.shape[1] * there.size
            if simulation.dense
            else int((stored * fired[:, None]).sum()),
            "graded": int((there * graded[:, None]).sum()),
            "binary": int((there * (fired - graded)[:, None]).sum()),
        }
        rows += [(name, quantity, getattr(counted, quantity), value, "formula") for quantity, value in formula.items()]
        compared = _neurobench_rows(name, weights, events, counted)
        differences = NEUROBENCH_DIFFERENCES if compared else differences
        rows += compared
    per_layer = [value for key, value in count_per_step(network, simulation).items() if "gate_ops" in value]
    for quantity in ("gate_ops", "state_bytes"):
        for k, values in enumerate(per_layer):
            rows.append(
                (f"layers.{k}", quantity, getattr(counts, quantity)[k], int(values[quantity].sum()), "per step")
            )
    return Audit(tuple(rows), differences)


NEUROBENCH_DIFFERENCES = (
    "NeuroBench calls a whole layer call MAC if one value in the batch is graded; here each event decides for itself",
    "NeuroBench adds the element-wise work of recurrent cells to the synaptic operations; here it is gate_ops",
    "NeuroBench sums in the tensor's precision (float32 rounds above 2^24); here counts are integers",
    "NeuroBench has no word for executed operations (padding and zeros inside blocks)",
)


def _neurobench_rows(name: str, weights: Weights, events: Events, counted: Counts) -> list:
    try:
        import torch
        from neurobench.metrics.utils.layers import single_layer_MACs
    except ImportError:
        return []
    linear = torch.nn.Linear(*weights.shape, bias=False, dtype=torch.float64)
    linear.weight.data = torch.from_numpy(weights.to_dense().T.astype(np.float64))
    dense = torch.from_numpy(events.to_dense().reshape(-1, events.shape[2]).astype(np.float64))
    pairs = (("effective", counted.effective, False), ("dense", counted.dense, True))
    return [
        (name, quantity, ours, int(single_layer_MACs(dense, linear, total=total)[0]), "neurobench")
        for quantity, ours, total in pairs
    ]


def _stored_mask(weights: Weights) -> np.ndarray:
    """(n_pre, columns) 0/1: what is stored, padding columns included."""
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
