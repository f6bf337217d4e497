"""GRU and LSTM nodes of an ONNX model. What stands around them is not imported.

ONNX packs the rows of a GRU (z, r, h), where z keeps the state, and those of an LSTM (i, o, f, c).
`linear_before_reset=1` means that the reset gate acts after the matrix product; 0, the default, before it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn._checks import need_text
from eventrnn.cells import Cell
from eventrnn.io.exported import CELLS_KEY, cells_of
from eventrnn.io.imported import CellArrays, ImportRefused, listed, network_of
from eventrnn.network import Network

# Operators that arrange numbers, and do not change one.
_ARRANGING = {"Cast", "Dropout", "Expand", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"}

_GATES = {"GRU": 3, "LSTM": 4}

_ACTIVATIONS = {"GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}

#: The place of each gate row of the cell among those of ONNX.
ORDER = {"GRU": (0, 1, 2), "LSTM": (0, 2, 3, 1)}


def from_onnx(source: Any, *, embedding: str | None = None, readout: str | None = None) -> Network:
    """A network with the weights of all GRU and LSTM nodes of an ONNX model, in their order, or the network of EGRUs
    that `to_onnx` wrote.

    source    : the path of a `.onnx` file, or an `onnx.ModelProto`. Needs onnx
    embedding : the name of a node `Gather` that the first of them reads, or None
    readout   : the name of a node `MatMul` or `Gemm` that reads the last of them, or None

    The network has the cell "gru" or "lstm" and computes the same function as these nodes, apart from rounding. Other
    nodes below and above them are not imported. Each node must read the one before it, with
    nothing between them that changes a value, and start from zeros or from an input of the model.
    `io.as_egru` makes an event network of it, as a start for training.

    Raises `ImportRefused`, a ValueError, for what cannot be imported, with the remedy; OSError where a file cannot be
    read; ImportError where onnx is missing.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise ImportError("from_onnx needs onnx: pip install 'eventrnn[imports]'") from None
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            source = onnx.load(path)
        except Exception as error:
            raise ImportRefused(f"{path.name}: onnx cannot read it ({str(error)[:200]})") from None
    if not isinstance(source, onnx.ModelProto):
        raise ImportRefused(f"source: got {type(source).__name__}, need an onnx.ModelProto or the path of a file")
    graph = source.graph
    constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
    cells = [
        _cell(node.name or f"{node.op_type} {k}", node, onnx, constants)
        for k, node in enumerate(graph.node)
        if node.op_type in _GATES
    ]
    if not cells and any(each.key == CELLS_KEY for each in source.metadata_props):
        for option, given in (("embedding", embedding), ("readout", readout)):
            if given is not None:
                raise ImportRefused(f"{option}: got {given!r}, but a model that to_onnx wrote of EGRUs says it itself")
        return _events(source, constants)
    if not cells:
        kinds = sorted({node.op_type for node in graph.node})
        raise ImportRefused(f"source: has no GRU or LSTM node among {listed(kinds)}")
    stack = [node for node in graph.node if node.op_type in _GATES]
    _check_stack(stack, graph, constants)
    below = None if embedding is None else _embedding(graph, need_text("embedding", embedding), stack[0], constants)
    top = None if readout is None else _readout(graph, need_text("readout", readout), stack[-1], constants)
    return network_of(cells, below, top, origin="ONNX")


def _events(model: Any, constants: Mapping[str, np.ndarray]) -> Network:
    """The network of EGRUs that `to_onnx` wrote, from its metadata and constants."""
    try:
        cells = cells_of({each.key: each.value for each in model.metadata_props})
    except ValueError as error:
        raise ImportRefused(f"source: {error}") from None
    assert cells is not None
    layers = []
    for k, cell in enumerate(cells):
        parts = ("",) if cell.variant == "evnn" else (".gates", ".candidate")
        needed = [f"layers.{k}.{name}" for name in ("w_in", "bias_in", "threshold")]
        needed += [f"layers.{k}.{name}{part}" for name in ("w_rec", "bias_rec") for part in parts]
        if missing := [name for name in needed if name not in constants]:
            raise ImportRefused(f"source: has no constant {missing[0]}, which to_onnx wrote; give the model as it was")
        w_rec, bias_rec = (
            np.concatenate([constants[f"layers.{k}.{name}{part}"] for part in parts], axis=-1)
            for name in ("w_rec", "bias_rec")
        )
        arrays = constants[f"layers.{k}.w_in"], w_rec, constants[f"layers.{k}.bias_in"], bias_rec
        layer = CellArrays(f"layers.{k}", cell, (0, 1, 2), *arrays).layer()
        try:
            layers.append(replace(layer, threshold=np.array(constants[f"layers.{k}.threshold"])))
        except (ValueError, TypeError) as error:
            raise ImportRefused(f"layers.{k}: {error}") from None
    top = None
    if "readout.weights" in constants:
        top = constants["readout.weights"], constants.get("readout.bias")
    return network_of(layers, constants.get("embedding"), top, origin="ONNX")


def _named(graph: Any, option: str, name: str, kinds: tuple[str, ...]) -> Any:
    """The node of a name. Raises `ImportRefused` where there is none of one of the kinds."""
    found = {node.name: node for node in graph.node if node.op_type in kinds and node.name}
    if name not in found:
        raise ImportRefused(f"{option}: got {name!r}, need the name of a node {' or '.join(kinds)}: {listed(found)}")
    return found[name]


def _embedding(graph: Any, name: str, first: Any, constants: Mapping[str, np.ndarray]) -> np.ndarray:
    """The table (V, E) of a node Gather that the first cell reads."""
    node = _named(graph, "embedding", name, ("Gather",))
    makers = {each: maker for maker in graph.node for each in maker.output if each}
    if node.input[0] not in constants or any(each.name == "axis" and each.i for each in node.attribute):
        raise ImportRefused(f"embedding: {name} selects no rows of a constant")
    if _source(first.input[0], makers) != node.output[0]:
        raise ImportRefused(f"embedding: {first.name or first.op_type} does not read {name}")
    return constants[node.input[0]]


def _readout(graph: Any, name: str, last: Any, constants: Mapping[str, np.ndarray]) -> tuple[Any, Any]:
    """Weights (N, V) and biases (V,), or None, of a node MatMul or Gemm that reads the last cell."""
    node = _named(graph, "readout", name, ("MatMul", "Gemm"))
    settings = {each.name: each.i if each.name.startswith("trans") else each.f for each in node.attribute}
    makers = {each: maker for maker in graph.node for each in maker.output if each}
    # The outputs of all steps, or the state after the last one.
    if _source(node.input[0], makers) not in last.output:
        raise ImportRefused(f"readout: {name} does not read {last.name or last.op_type}")
    scaled = [key for key in ("alpha", "beta") if settings.get(key, 1) != 1]
    if node.input[1] not in constants or settings.get("transA") or scaled:
        raise ImportRefused(f"readout: {name} is no product with constant weights alone")
    weights = constants[node.input[1]]
    bias = constants.get(node.input[2]) if len(node.input) > 2 else None
    for other in graph.node:
        if other.op_type == "Add" and node.output[0] in other.input:
            (rest,) = [each for each in other.input if each != node.output[0]] or [""]
            bias = constants.get(rest) if bias is None else bias
    return (weights.T if settings.get("transB") else weights), bias


def _check_stack(stack: list[Any], graph: Any, constants: Mapping[str, np.ndarray]) -> None:
    """Raise `ImportRefused` unless each node reads the outputs of the one before it, and none starts from a state that
    the graph computes."""
    makers = {name: node for node in graph.node for name in node.output if name}
    for k, node in enumerate(stack):
        where = node.name or f"{node.op_type} {k}"
        for name in node.input[5:7]:
            source = _source(name, makers)
            maker = makers.get(source)
            zeros = maker is not None and maker.op_type == "ConstantOfShape" and not _filled(maker)
            if source in constants and constants[source].any():
                raise ImportRefused(
                    f"{where}: starts from a state that is not zero; remove it, and give it to simulate(state=)"
                )
            if maker is not None and source not in constants and not zeros:
                raise ImportRefused(
                    f"{where}: starts from a state that {maker.op_type} computes; remove it, and give it to "
                    "simulate(state=)"
                )
        if k and (source := _source(node.input[0], makers)) != stack[k - 1].output[0]:
            maker = makers.get(source)
            what = "an input of the model" if maker is None else f"the output {source} of {maker.op_type}"
            raise ImportRefused(
                f"{where}: reads {what}, need the outputs of the {stack[k - 1].op_type} before it; a network here is a "
                "stack of layers with nothing between them: export a part that is one"
            )


def _source(name: str, makers: Mapping[str, Any]) -> str:
    """Where the numbers of a value come from, through the operators that only arrange them."""
    while name in makers and makers[name].op_type in _ARRANGING:
        name = makers[name].input[0]
    return name


def _filled(node: Any) -> bool:
    """Whether a ConstantOfShape fills in something else than zeros."""
    from onnx import numpy_helper

    return any(each.name == "value" and numpy_helper.to_array(each.t).any() for each in node.attribute)


def _cell(where: str, node: Any, onnx: Any, constants: Mapping[str, np.ndarray]) -> CellArrays:
    kind = node.op_type
    settings = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    _check(where, kind, {key: _text(value) for key, value in settings.items()})
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    arrays = []
    for place, words in ((1, "input weights (W)"), (2, "recurrent weights (R)"), (3, "biases (B)")):
        name = inputs[place]
        if not name and place == 3:
            arrays.append(None)
            continue
        if name not in constants:
            raise ImportRefused(
                f"{where}: its {words} are computed by the graph; fold constants before, as onnxsim does"
            )
        if not constants[name].ndim:
            raise ImportRefused(f"{where}: its {words} are a single number, need an array")
        arrays.append(constants[name][0])
    if kind == "LSTM" and inputs[7]:
        raise ImportRefused(f"{where}: has peepholes (P), which the cell here has not")
    w_in, w_rec, bias = arrays
    half = None if bias is None else len(bias) // 2
    cell = Cell("lstm")
    if kind == "GRU":
        cell = Cell("gru", "after" if settings.get("linear_before_reset", 0) else "before")
    return CellArrays(
        where,
        cell,
        ORDER[kind],
        w_in.T,
        w_rec.T,
        None if bias is None else bias[:half],
        None if bias is None else bias[half:],
    )


def _check(where: str, kind: str, settings: Mapping[str, Any]) -> None:
    """Raise `ImportRefused` for settings of a node that the cell has not."""
    if settings.get("direction", "forward") != "forward":
        raise ImportRefused(
            f"{where}: has the direction {settings['direction']!r}, which reads a sequence from its end; need 'forward'"
        )
    if settings.get("layout", 0):
        raise ImportRefused(f"{where}: has layout=1, with samples first; export it with layout=0, the default")
    if settings.get("clip"):
        raise ImportRefused(
            f"{where}: clips what goes into its gates at {settings['clip']:g}, which the cell here does not"
        )
    if settings.get("input_forget"):
        raise ImportRefused(f"{where}: couples its input and forget gates, which the cell here does not")
    found = settings.get("activations", _ACTIVATIONS[kind])
    if [each.lower() for each in found] != [each.lower() for each in _ACTIVATIONS[kind]]:
        raise ImportRefused(f"{where}: has the activations {', '.join(found)}, need {', '.join(_ACTIVATIONS[kind])}")


def _text(value: Any) -> Any:
    """An attribute whose bytes are text as text."""
    if isinstance(value, bytes):
        return value.decode()
    return [each.decode() if isinstance(each, bytes) else each for each in value] if isinstance(value, list) else value
