"""Networks as ONNX graphs: GRU and LSTM nodes, and one step of an EGRU from elementary operators.

The EGRU is no operator of ONNX. Its graph carries its cells in the metadata of the model, and `from_onnx` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eventrnn.io.exported import described, laid_out, one_cell
from eventrnn.io.from_onnx import ORDER
from eventrnn.network import Layer, Network

if TYPE_CHECKING:
    from onnx import ModelProto

# Versions that ONNX Runtime has read since 2022.
_OPSET, _IR = 17, 8


def to_onnx(network: Network) -> ModelProto:
    """A network as an `onnx.ModelProto` in float32. Needs onnx.

    Inputs and outputs of a network of GRU or LSTM cells, whose layers are nodes `GRU` and `LSTM` of ONNX:

    - `inputs` (steps, batch, I), or `symbols` (steps, batch) int64 where there is an embedding;
    - per layer k `state.k` (1, batch, N), and `cell.k` of an LSTM: where the run starts;
    - `output` (steps, batch, V or N), and `new_state.k` and `new_cell.k`: where the next call starts.

    A network of EGRU cells is one step, without the axis of steps: `inputs` (batch, I) or `symbols` (batch,), per layer
    `state.k` and `cell.k` (batch, N), which begin with zeros.

    A runtime sums in another order than the engines here, so that a value close to its threshold can decide otherwise.
    Pruned weights are zeros. `from_onnx` reads the network again, exactly; of GRU and LSTM cells with
    `embedding="embedding", readout="readout"`. Raises `ExportRefused`, a ValueError, for layers of different cells;
    TypeError for gated blocks; ImportError where onnx is missing.
    """
    cell = one_cell(network, "an ONNX model")
    try:
        import onnx
    except ImportError:
        raise ImportError("to_onnx needs onnx: pip install 'eventrnn[imports]'") from None
    graph = _Graph(onnx)
    steps = () if cell.thresholded else ("steps",)
    shape = (*steps, "batch")
    if network.embedding is None:
        x = graph.input("inputs", (*shape, network.layers[0].inputs))
    else:
        symbols = graph.input("symbols", shape, onnx.TensorProto.INT64)
        x = graph.node("Gather", [graph.constant("embedding", network.embedding), symbols], name="embedding")
    for k, layer in enumerate(network.layers):
        x = _event_step(graph, k, layer, x) if cell.thresholded else _recurrent(graph, k, layer, x)
    if network.readout is not None:
        weights = graph.constant("readout.weights", network.readout.weights.to_dense())
        scores = graph.node("MatMul", [x, weights], name="readout")
        x = graph.node("Add", [scores, graph.constant("readout.bias", network.readout.bias)], name="readout.add")
    width = network.layers[-1].units if network.readout is None else len(network.readout.bias)
    graph.output("output", graph.node("Identity", [x]), (*shape, width), first=True)
    return graph.model(described(network) if cell.thresholded else {})


def _recurrent(graph: _Graph, k: int, layer: Layer, x: str) -> str:
    """A node GRU or LSTM; returns the name of its outputs (steps, batch, N)."""
    cell, n = layer.cell, layer.units
    own = laid_out(layer, ORDER[cell.name.upper()])
    arrays = [
        graph.constant(f"layers.{k}.W", own["w_in"].T[None]),
        graph.constant(f"layers.{k}.R", own["w_rec"].T[None]),
        graph.constant(f"layers.{k}.B", np.concatenate([own["bias_in"], own["bias_rec"]])[None]),
    ]
    state = ("state", "cell") if cell.name == "lstm" else ("state",)
    before = [graph.input(f"{name}.{k}", (1, "batch", n)) for name in state]
    options: dict[str, Any] = {"hidden_size": n, "name": f"layers.{k}"}
    if cell.name == "gru":
        options["linear_before_reset"] = int(cell.variant == "after")
    after = [f"layers.{k}.new_{name}" for name in state]
    made = graph.node(cell.name.upper(), [x, *arrays, "", *before], further=after, **options)
    for name, value in zip(state, after, strict=True):
        graph.output(f"new_{name}.{k}", graph.node("Identity", [value]), (1, "batch", n))
    return graph.node("Squeeze", [made, graph.constant("first_axis", np.array([1]))])


def _event_step(graph: _Graph, k: int, layer: Layer, x: str) -> str:
    """One step of an EGRU; returns the name of its events (batch, N)."""
    n, variant = layer.units, layer.cell.variant
    own = laid_out(layer, range(3))
    y, c = (graph.input(f"{name}.{k}", ("batch", n)) for name in ("state", "cell"))

    def array(name: str, value: np.ndarray) -> str:
        return graph.constant(f"layers.{k}.{name}", value)

    def drive(value: str, weights: str, bias: str, parts: int) -> list[str]:
        total = graph.node("Add", [graph.node("MatMul", [value, weights]), bias])
        return graph.split(total, parts, n) if parts > 1 else [total]

    in_u, in_r, in_g = drive(x, array("w_in", own["w_in"]), array("bias_in", own["bias_in"]), 3)
    gates, bias = own["w_rec"], own["bias_rec"]
    if variant == "evnn":
        rec_u, rec_r, rec_g = drive(y, array("w_rec", gates), array("bias_rec", bias), 3)
    else:
        rec_u, rec_r = drive(y, array("w_rec.gates", gates[:, : 2 * n]), array("bias_rec.gates", bias[: 2 * n]), 2)
    u = graph.node("Sigmoid", [graph.node("Add", [in_u, rec_u])])
    r = graph.node("Sigmoid", [graph.node("Add", [in_r, rec_r])])
    if variant == "evnn":
        candidate = graph.node("Add", [graph.node("Mul", [r, rec_g]), in_g])
    else:
        sent = graph.node("Mul", [r, y])
        weights = array("w_rec.candidate", gates[:, 2 * n :])
        (rec_g,) = drive(sent, weights, array("bias_rec.candidate", bias[2 * n :]), 1)
        candidate = graph.node("Add", [in_g, rec_g])
    g = graph.node("Tanh", [candidate])
    one = graph.constant("one", np.float32(1))
    v = graph.node("Add", [graph.node("Mul", [u, c]), graph.node("Mul", [graph.node("Sub", [one, u]), g])])
    if variant == "paper":
        v = graph.node("Sub", [v, y])
    threshold, zero = array("threshold", layer.threshold), graph.constant("zero", np.float32(0))
    fired = graph.node("Greater", [v, threshold])
    events = graph.node("Where", [fired, v, zero])
    cell = v if variant == "paper" else graph.node("Sub", [v, graph.node("Where", [fired, threshold, zero])])
    graph.output(f"new_state.{k}", graph.node("Identity", [events]), ("batch", n))
    graph.output(f"new_cell.{k}", graph.node("Identity", [cell]), ("batch", n))
    return events


class _Graph:
    """An ONNX graph that is being made."""

    def __init__(self, onnx: Any):
        self.onnx, self.nodes, self.inputs, self.outputs = onnx, [], [], []
        self.constants: dict[str, Any] = {}

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        """An array; one of the same name is taken once."""
        if name not in self.constants:
            self.constants[name] = self.onnx.numpy_helper.from_array(np.array(value, order="C"), name)
        return name

    def input(self, name: str, shape: Sequence[int | str], kind: int | None = None) -> str:
        real = self.onnx.TensorProto.FLOAT
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, kind or real, list(shape)))
        return name

    def output(self, name: str, value: str, shape: Sequence[int | str], *, first: bool = False) -> None:
        """Give the output of the node that was added last another name, and make it one of the graph."""
        self.nodes[-1].output[0] = name
        made = self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, list(shape))
        self.outputs.insert(0 if first else len(self.outputs), made)

    def node(self, kind: str, inputs: Sequence[str], *, further: Sequence[str] = (), **options: Any) -> str:
        """Add a node; returns the name of its first output."""
        name = f"{kind.lower()}.{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), [name, *further], **options))
        return name

    def split(self, value: str, parts: int, size: int) -> list[str]:
        """The parts of the last axis, of `size` each."""
        names = [f"split.{len(self.nodes)}.{k}" for k in range(parts)]
        sizes = self.constant(f"sizes.{parts}.{size}", np.full(parts, size))
        self.nodes.append(self.onnx.helper.make_node("Split", [value, sizes], names, axis=-1))
        return names

    def model(self, metadata: dict[str, str]) -> ModelProto:
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "eventrnn", self.inputs, self.outputs, list(self.constants.values()))
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        made.producer_name = "eventrnn"
        helper.set_model_props(made, metadata)
        self.onnx.checker.check_model(made)
        return made
