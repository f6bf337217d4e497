"""The metrics of NeuroBench (Yik et al., Nature Communications 2025) of a run, as its package computes them.

    metrics = neurobench_metrics(network, simulate(network, inputs, record="events"))
    metrics.as_dict()                         # the names and units of `neurobench.benchmarks.Benchmark.run`

They are computed from the recorded events and need no other package. `audit_neurobench` compares them with what the
package `neurobench` computes, and `neurobench_model` makes a model of which its `Benchmark` measures them itself.

NeuroBench sees a network as calls of layers. Here a layer is a weight matrix, and a call is one step of one matrix with
all samples of the batch. A sample is a whole sequence: operations are sums over its steps. Where its definitions differ
from those of `count` is said in `NEUROBENCH_DIFFERENCES`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn._checks import need_kind, need_whole
from eventrnn.counting.counts import events_by_matrix
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.simulation import Simulation
from eventrnn.weights import Weights
from eventrnn.weights.gated import need_matrices

if TYPE_CHECKING:
    from neurobench.models import TorchModel

NEUROBENCH_DIFFERENCES = (
    "NeuroBench counts a whole layer call as MACs if one of its values is graded; here each event decides alone",
    "NeuroBench adds the element-wise work of recurrent cells to the synaptic operations; here it is gate_ops",
    "NeuroBench sums in the tensor's precision (float32 rounds above 2^24); here counts are integers",
    "NeuroBench does not define executed operations (with padding and zeros inside blocks)",
    "NeuroBench's operations are per sample, which is a whole sequence; here they are of the whole run",
    "NeuroBench's footprint has zero weights in it and neither indices nor the state; the bytes of a format here leave "
    "pruned weights out and have the indices in",
    "NeuroBench takes padding for inputs; here it is not counted",
    "NeuroBench's dense operations of a one-hot input are those of all its rows; here a dense engine looks up one",
)

#: Bytes of a stored value.
_WIDTH = {"float32": 4, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True)
class NeuroBenchMetrics:
    """The metrics of a run. The head of `neurobench.py` says what a call and a sample are.

    Attributes
    ----------
    footprint           : bytes of parameters: weights with their zeros in the type they are stored in, int8 scales,
                          biases, thresholds where the cell has them, and the embedding. A tied read-out counts once
    parameter_count     : number of these
    connection_sparsity : share of zeros among the weights of all matrices, without biases and embedding
    activation_sparsity : share of zeros among the outputs of all layers, steps and samples, without the inputs
    effective_macs      : products of non-zero values with non-zero weights, of the calls with a graded value
    effective_acs       : the same of the calls whose values are all -1, 0 or 1
    dense               : products of all values with all weights
    samples, steps      : samples of the run, and steps of all samples together. The three numbers of operations are of
                          all samples
    """

    footprint: int
    parameter_count: int
    connection_sparsity: float
    activation_sparsity: float
    effective_macs: int
    effective_acs: int
    dense: int
    samples: int
    steps: int

    def as_dict(self) -> dict[str, Any]:
        """The metrics with the names, units and rounding of `neurobench.benchmarks.Benchmark.run`: operations per
        sample."""
        return {
            "Footprint": self.footprint,
            "ParameterCount": self.parameter_count,
            # NeuroBench divides in float32.
            "ConnectionSparsity": round(float(np.float32(self.connection_sparsity)), 4),
            "ActivationSparsity": self.activation_sparsity,
            "SynapticOperations": {
                "Effective_MACs": self.effective_macs / self.samples,
                "Effective_ACs": self.effective_acs / self.samples,
                "Dense": self.dense / self.samples,
            },
        }


def neurobench_metrics(network: Network, simulation: Simulation) -> NeuroBenchMetrics:
    """The metrics of NeuroBench of a run with record="events". The batch of the run is one batch of NeuroBench.

    O(events + weights) time. Raises ValueError for a run without recorded events or without samples and steps, and
    TypeError for gated blocks, which NeuroBench has not, and for events that are arrays on a GPU.
    """
    need_kind("network", network, Network, "a Network")
    need_matrices(network.matrices(), "NeuroBench")
    received = events_by_matrix(network, simulation)
    if not simulation.sample_steps:
        raise ValueError("simulation: has no step of a sample, and NeuroBench's metrics are per sample")
    macs = acs = 0
    for weights, events in received.values():
        of_macs, of_acs = _by_call(weights, events)
        macs, acs = macs + of_macs, acs + of_acs
    entries = sum(weights.shape[0] * weights.shape[1] for weights in network.matrices().values())
    zeros = entries - sum(int(weights.fan_out().sum()) for weights in network.matrices().values())
    units = simulation.sample_steps * sum(layer.units for layer in network.layers)
    sent = sum(len(events.indices) for events in simulation.events)
    footprint, parameters = _parameters(network)
    return NeuroBenchMetrics(
        footprint,
        parameters,
        zeros / entries,
        (units - sent) / units,
        macs,
        acs,
        simulation.sample_steps * entries,
        simulation.batch,
        simulation.sample_steps,
    )


def neurobench_model(network: Network, *, backend: str = "cpu", threads: int = 1) -> TorchModel:
    """A model for `neurobench.benchmarks.Benchmark`, which runs the network with an engine of this library.

    network : of any cells, without gated blocks
    backend : the name of a backend
    threads : threads of the engine

    It takes batches (samples, steps, inputs), or (samples, steps) symbols for a network with an embedding, and returns
    the outputs (samples, steps, V). Metrics of correctness need a postprocessor that makes predictions of them, such as
    `lambda output: output[:, -1].argmax(-1)`. Every batch starts from the zero state.

    NeuroBench keeps the inputs of all calls in float64 until the end of a batch, and computes every count by dense
    products, so that it needs much memory and time.

    Needs the packages torch and neurobench. Raises ImportError without them, TypeError for gated blocks.
    """
    need_kind("network", network, Network, "a Network")
    need_whole("threads", threads, at_least=1)
    need_matrices(network.matrices(), "NeuroBench")
    for package in ("neurobench", "torch"):
        if find_spec(package) is None:
            raise ImportError(f"neurobench_model: needs {package}, which is not installed: pip install neurobench")
    from eventrnn.counting.neurobench_layers import wrapped

    return wrapped(network, backend, threads)


def _by_call(weights: Weights, events: Events) -> tuple[int, int]:
    """Effective products of a matrix, of calls with a graded value and of the others."""
    steps, batch, _ = events.shape
    step = events.rows() // max(1, batch)
    graded = np.zeros(steps, bool)
    graded[step[events.graded]] = True
    products = weights.fan_out()[events.indices]
    of_macs = int(products[graded[step]].sum())
    return of_macs, int(products.sum()) - of_macs


def _parameters(network: Network) -> tuple[int, int]:
    """Bytes and number of the parameters."""
    arrays, footprint, number = [], 0, 0
    for layer in network.layers:
        arrays += [layer.bias_in, layer.bias_rec]
        arrays += [layer.threshold] if layer.cell.thresholded else []
    arrays += [] if network.embedding is None else [network.embedding]
    if network.readout is not None:
        arrays.append(network.readout.bias)
    for name, weights in network.matrices().items():
        if name == "readout" and network.readout is not None and network.readout.tied:
            continue
        entries = weights.shape[0] * weights.shape[1]
        footprint, number = footprint + entries * _WIDTH[weights.storage], number + entries
        arrays += [] if weights.scales is None else [weights.scales]
    return footprint + sum(array.nbytes for array in arrays), number + sum(array.size for array in arrays)
