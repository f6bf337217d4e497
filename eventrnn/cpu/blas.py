"""The dense engine: every product goes through BLAS, and all steps run inside one compiled loop. Not exact.

It shows what a good dense implementation costs, and it is the faster path where many units are active or batches are
large. BLAS sums in its own order. Events may therefore differ where a cell is as near to its threshold as rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.backend import HostInputs
from eventrnn.cpu.kernels.blas_loop import loop_of
from eventrnn.cpu.plan import BLAS_PRODUCT, LOOK_UP
from eventrnn.state import FireCounts, Inputs, State, Trace
from eventrnn.weights import Dense, MatrixId

if TYPE_CHECKING:
    from eventrnn.network import Layer, Network
    from eventrnn.weights import Weights

# Rows (steps times samples) whose input drives are computed by one product. This bounds the memory, and is enough rows
# for a product at full speed.
CHUNK_ROWS = 4096


class BlasBackend:
    """The backend "blas". It never returns the bits of the exact tier, so `exact` is False."""

    name = "blas"
    exact = False

    def engine(self, network: Network, *, threads: int = 1) -> BlasEngine:
        """An engine with dense copies of the weights.

        Raises ValueError unless `threads` is 1, because BLAS has its own setting (OMP_NUM_THREADS, or the package
        threadpoolctl).
        """
        if threads != 1:
            raise ValueError(
                f"threads: got {threads}, but backend 'blas' leaves threads to BLAS; set OMP_NUM_THREADS, or use "
                "backend='cpu'"
            )
        return BlasEngine(network)


class BlasEngine:
    """A network whose weights are dense arrays for BLAS; see `backend.Engine`."""

    dense = True

    def __init__(self, network: Network):
        self.layers, self.host_inputs = network.layers, HostInputs(network, dense=True)
        self.one_hot = network.one_hot
        self.paths = dict.fromkeys(network.matrices(), BLAS_PRODUCT)
        if self.one_hot:
            self.paths[MatrixId.of(0, "w_in")] = LOOK_UP
        # Of its own: for a network's arrays that are read-only, Numba would compile the kernels again.
        self.vectors = [(layer.bias_rec.copy(), layer.threshold.copy()) for layer in network.layers]
        self.w_in = [_floats(layer.w_in) for layer in network.layers]
        self.w_rec = []
        for layer in network.layers:
            dense, n = layer.w_rec.to_dense(), layer.units
            parts = (dense[:, : 2 * n], dense[:, 2 * n :]) if layer.cell.reset_first else (dense,)
            self.w_rec.append(tuple(np.ascontiguousarray(part) for part in parts))
        self.readout = None
        if network.readout is not None:
            self.readout = (np.ascontiguousarray(network.readout.weights.to_dense()), network.readout.bias)

    def stepper(self, state: State) -> None:
        """None: a single step is a run of one step."""
        return

    def prepare(self, inputs: Any) -> Inputs:
        """See `backend.Engine`. Numbers stay a dense array."""
        return self.host_inputs.prepare(inputs)

    def run(self, inputs: Inputs, state: State, *, record_events: bool = False, record_states: bool = False) -> Trace:
        """See `backend.Engine`."""
        c = [np.array(x, np.float32) for x in state.cells]
        y = [np.array(x, np.float32) for x in state.outputs]
        length = max(1, CHUNK_ROWS // max(1, inputs.batch))
        outputs, events, states = [], [[] for _ in c], [[] for _ in c]
        fired = [FireCounts.zeros(layer.units) for layer in self.layers]
        for start in range(0, inputs.steps, length):
            chunk = inputs.chunk(start, min(start + length, inputs.steps))
            # Of a one-hot input the product is a row of the weights, which every dense engine looks up.
            x = None if self.one_hot else chunk.to_dense()
            for k, layer in enumerate(self.layers):
                product = self.w_in[k][chunk.rows] if x is None else x.reshape(-1, x.shape[2]) @ self.w_in[k]
                drive = product + layer.bias_in
                ys, cs = (np.empty((chunk.steps, inputs.batch * layer.units), np.float32) for _ in range(2))
                loop = loop_of(layer.cell.name, layer.cell.variant)
                weights = (*self.w_rec[k], *self.vectors[k])
                before = (c[k].reshape(-1), y[k].reshape(-1))
                loop(layer.units, inputs.batch, chunk.steps, drive.ravel(), *weights, *before, ys, cs)
                x = ys.reshape(chunk.steps, inputs.batch, layer.units)
                fired[k] = fired[k] + FireCounts.of(x)
                if record_events:
                    events[k].append(x)
                if record_states:
                    states[k].append(cs.reshape(x.shape))
            assert x is not None
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
            self.paths,
        )


def _floats(weights: Weights) -> np.ndarray:
    """The matrix as dense float32, not copied where it is that already."""
    return weights.values if isinstance(weights, Dense) and weights.storage == "float32" else weights.to_dense()


def _joined(layers: tuple[Layer, ...], batch: int, chunks: list[list[np.ndarray]]) -> tuple[np.ndarray, ...]:
    """Per layer, the records (steps, batch, N) of all chunks one after the other in time."""
    empty = [np.zeros((0, batch, layer.units), np.float32) for layer in layers]
    return tuple(np.concatenate([none, *each]) for none, each in zip(empty, chunks, strict=True))
