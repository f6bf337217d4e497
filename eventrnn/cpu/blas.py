"""The dense engine: every product through BLAS, every step inside one compiled loop. Not exact.

What a good dense implementation costs, and the path for networks too active or too batched for events. BLAS sums in
its own order, so events may differ where a cell comes within rounding of its threshold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.backend import HostInputs
from eventrnn.state import FireCounts, Inputs, State, Trace

if TYPE_CHECKING:
    from eventrnn.network import Network
from eventrnn.cpu.kernels.blas_loop import paper_steps, steps

# Input drives of this many rows are made at once; bounds memory, and is long enough for a full-speed product.
CHUNK_ROWS = 4096


class BlasBackend:
    """Dense weights through BLAS, threads as BLAS is set; `exact` is False."""

    name = "blas"
    exact = False

    def engine(self, network: Network, *, threads: int = 1) -> BlasEngine:
        """`threads` must be 1: BLAS has its own setting (threadpoolctl, OMP_NUM_THREADS)."""
        if threads != 1:
            raise ValueError(f"threads: got {threads}, but BLAS sets its own; use OMP_NUM_THREADS or backend='cpu'")
        return BlasEngine(network)


class BlasEngine:
    """A network laid out for BLAS; see `backend.Engine`."""

    dense = True

    def __init__(self, network: Network):
        self.layers, self.host_inputs = network.layers, HostInputs(network, dense=True)
        self.w_in = [layer.w_in.to_dense() for layer in network.layers]
        self.w_rec = []
        for layer in network.layers:
            dense, n = layer.w_rec.to_dense(), layer.units
            parts = (dense,) if layer.cell.variant == "evnn" else (dense[:, : 2 * n], dense[:, 2 * n :])
            self.w_rec.append(tuple(np.ascontiguousarray(part) for part in parts))
        self.readout = None
        if network.readout is not None:
            self.readout = (np.ascontiguousarray(network.readout.weights.to_dense()), network.readout.bias)

    def stepper(self, state: State) -> None:
        """Single steps are runs."""
        return

    def prepare(self, inputs: Any) -> Inputs:
        """See `backend.Engine`. Numbers stay dense arrays."""
        return self.host_inputs.prepare(inputs)

    def run(self, inputs: Inputs, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`."""
        c = [np.array(x, np.float32) for x in state.cells]
        y = [np.array(x, np.float32) for x in state.outputs]
        length = max(1, CHUNK_ROWS // max(1, inputs.batch))
        outputs, events, states = [], [[] for _ in c], [[] for _ in c]
        fired = [FireCounts.zeros(layer.units) for layer in self.layers]
        for start in range(0, inputs.steps, length):
            x = inputs.chunk(start, min(start + length, inputs.steps)).to_dense()
            for k, layer in enumerate(self.layers):
                drive = x.reshape(-1, x.shape[2]) @ self.w_in[k] + layer.bias_in
                ys, cs = (np.empty((len(x), inputs.batch * layer.units), np.float32) for _ in range(2))
                loop = steps if layer.cell.variant == "evnn" else paper_steps
                loop(
                    layer.units, inputs.batch, len(x), drive.ravel(), *self.w_rec[k], layer.bias_rec, layer.threshold,
                    c[k].reshape(-1), y[k].reshape(-1), ys, cs,
                )  # fmt: skip
                x = ys.reshape(len(x), inputs.batch, layer.units)
                graded = np.count_nonzero((x != 0) & (x != 1), axis=(0, 1))
                fired[k] = fired[k] + FireCounts(graded, np.count_nonzero(x == 1, axis=(0, 1)))
                if record_events:
                    events[k].append(x)
                if record_states:
                    states[k].append(cs.reshape(x.shape))
            if self.readout is not None:
                weights, bias = self.readout
                x = (x.reshape(-1, x.shape[2]) @ weights + bias).reshape(*x.shape[:2], -1)
            outputs.append(x)
        size = self.layers[-1].units if self.readout is None else len(self.readout[1])
        empty = np.zeros((0, inputs.batch, size), np.float32)
        return Trace(
            np.concatenate([empty, *outputs]),
            State(tuple(c), tuple(y)),
            tuple(fired),
            _joined(self.layers, inputs.batch, events) if record_events else (),
            _joined(self.layers, inputs.batch, states) if record_states else (),
        )


def _joined(layers, batch: int, parts: list[list[np.ndarray]]) -> tuple[np.ndarray, ...]:
    empty = [np.zeros((0, batch, layer.units), np.float32) for layer in layers]
    return tuple(np.concatenate([none, *pieces]) for none, pieces in zip(empty, parts, strict=True))
