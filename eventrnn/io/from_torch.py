"""GRUs and LSTMs of PyTorch, and `eventrnn.torch.EGRU`: a `state_dict`, a module, or a file of one.

PyTorch packs the rows of a GRU (r, z, n) and those of an LSTM (i, f, g, o). Its z keeps the state, and its reset gate
acts after the matrix product.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn._checks import float32_array, need_text
from eventrnn.cells import Cell
from eventrnn.io.exported import cells_of
from eventrnn.io.imported import CellArrays, ImportRefused, listed, network_of, plain
from eventrnn.network import Layer, Network
from eventrnn.weights import CSR

_WEIGHT = re.compile(r"(?P<prefix>.*?)weight_hh(?:_l(?P<layer>\d+))?(?P<reverse>_reverse)?")

# The same of `eventrnn.torch.EGRU`.
_EVENT_WEIGHT = re.compile(r"(?P<prefix>(?:.*\.)?)w_rec_l(?P<layer>\d+)")

#: Cell -> for each gate its place in PyTorch.
ORDER = {"gru": (1, 0, 2), "lstm": (0, 1, 2, 3)}

# Gate rows of the recurrent weights, in units -> the cell.
_CELLS = {3: Cell("gru", "after"), 4: Cell("lstm")}


def from_torch(
    source: Any,
    *,
    name: str | None = None,
    embedding: str | None = None,
    readout: str | None = None,
    cell: Cell | None = None,
) -> Network:
    """A network with the weights of an `nn.GRU`, `nn.GRUCell`, `nn.LSTM`, `nn.LSTMCell` or `eventrnn.torch.EGRU`, of
    all its layers.

    Parameters
    ----------
    source    : a module, its `state_dict()` (tensors or arrays), or the path of a file of it: `.safetensors`, or what
                `torch.save` wrote, which needs torch and is read with `weights_only`
    name      : the name of the GRU or LSTM in `source` ("rnn" for the weights `rnn.weight_hh_l0`), where it has several
    embedding : the name of an `nn.Embedding` below it, or None
    readout   : the name of an `nn.Linear` above it, or None
    cell      : of an EGRU whose `source` does not say it, `Cell()` by default: a module says it, and so does a
                `.safetensors` file that `export` wrote. Of a mapping or another file, thresholds are taken as they are,
                which those of the rule "sigmoid" are not; give the module

    The network has the cell "gru" or "lstm" and computes the same function, apart from rounding. `io.as_egru` makes an
    event network of it, as a start for training. Dropout between layers acts in training only and is not imported.

    Raises `ImportRefused`, a ValueError, for what cannot be imported, with the remedy; OSError where a file cannot be
    read; ImportError where torch is needed and missing.
    """
    state = _state(source)
    _refuse_packed(state)
    if cell is not None and (not isinstance(cell, Cell) or not cell.thresholded):
        raise ImportRefused(f"cell: got {cell!r}, need a Cell with thresholds, or None; a GRU is known by its weights")
    found: dict[str, dict[int, str]] = {}
    for key in state:
        match = _WEIGHT.fullmatch(key) or _EVENT_WEIGHT.fullmatch(key)
        if match is None:
            continue
        if match.groupdict().get("reverse"):
            raise ImportRefused(
                f"{key}: of a bidirectional network, whose second half reads a sequence from its end, which a stream "
                "does not have; give a network of one direction"
            )
        found.setdefault(match["prefix"], {})[int(match["layer"] or 0)] = key
    if not found:
        pruned = any(_WEIGHT.fullmatch(key.removesuffix("_orig")) for key in state)
        remedy = "; they are pruned by torch.nn.utils.prune: call its remove() before" if pruned else ""
        raise ImportRefused(f"source: has no weights of a GRU or an LSTM (weight_hh_l0) among {listed(state)}{remedy}")
    prefix = _chosen(found, name)
    keys = found[prefix]
    if sorted(keys) != list(range(len(keys))):
        raise ImportRefused(
            f"source: has the layers {listed(sorted(map(str, keys)))} of {prefix or 'its network'}, need all from 0"
        )
    if _EVENT_WEIGHT.fullmatch(keys[0]):
        layers = _event_layers(source, state, prefix, len(keys), cell)
    elif cell is not None:
        raise ImportRefused(f"cell: got {cell!r}, but {keys[0]} is of a GRU or an LSTM, which is known by its weights")
    else:
        layers = [_cell(state, keys[k]).layer() for k in range(len(keys))]
    top = None if readout is None else (_weight(state, readout).T, state.get(f"{need_text('readout', readout)}.bias"))
    below = None if embedding is None else _weight(state, embedding)
    return network_of(
        layers, below, None if top is None else (top[0], None if top[1] is None else plain(top[1])), origin="PyTorch"
    )


def _state(source: Any) -> Mapping[str, Any]:
    """The named tensors of a module, a mapping or a file."""
    if isinstance(source, str | os.PathLike):
        return _read(Path(source))
    if hasattr(source, "state_dict") and not isinstance(source, type):
        source = source.state_dict()
    if not isinstance(source, Mapping) or not all(isinstance(key, str) for key in source):
        raise ImportRefused(
            f"source: got {type(source).__name__}, need a module, its state_dict(), or the path of a file of it"
        )
    return source


def _read(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except (SafetensorError, TypeError, KeyError) as error:
            raise ImportRefused(f"{path.name}: no file of tensors that NumPy has ({error})") from None
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path.name}: needs torch to read it: pip install 'eventrnn[torch]'; or save it as .safetensors"
        ) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Of bytes that no pickle begins with, the message may be a number, or empty.
        said = str(error).strip()
        why = "it is no file of torch.save" if not said or said.isdigit() else said.splitlines()[0][:200]
        raise ImportRefused(f"{path.name}: torch cannot read it as weights ({why}); save module.state_dict()") from None
    # A checkpoint often keeps the weights beside the optimiser.
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    return _state(found)


def _refuse_packed(state: Mapping[str, Any]) -> None:
    packed = [key for key in state if "_packed_params" in key or "_all_weight_values" in key]
    if packed:
        raise ImportRefused(
            f"{packed[0]}: of a quantised network, which keeps its weights packed; import the network before it was "
            "quantised, and store it with eventrnn convert --storage int8"
        )


def _chosen(found: Mapping[str, Any], name: str | None) -> str:
    """The prefix of the keys of the network that is asked for."""
    names = {prefix.rstrip("."): prefix for prefix in found}
    if name is None:
        if len(found) > 1:
            raise ImportRefused(f"source: has several networks, {listed(names)}; say which with name=")
        return next(iter(found))
    if need_text("name", name) not in names:
        raise ImportRefused(f"name: got {name!r}, need one of {listed([each or repr('') for each in names])}")
    return names[name]


def _cell(state: Mapping[str, Any], key: str) -> CellArrays:
    """The arrays of the layer with the recurrent weights `key`."""

    def named(what: str) -> Any:
        other = what.join(key.rsplit("weight_hh", 1))
        return plain(state[other]) if other in state else None

    for what in ("weight_ih", "bias_ih", "bias_hh"):
        stored = what.join(key.rsplit("weight_hh", 1))
        if f"{stored}_orig" in state:
            raise ImportRefused(f"{stored}: is pruned by torch.nn.utils.prune; call its remove() before")
    w_rec, w_in = named("weight_hh"), named("weight_ih")
    bias_in, bias_rec = named("bias_ih"), named("bias_hh")
    if (bias_in is None) != (bias_rec is None):
        raise ImportRefused(f"{key}: has only one of the biases bias_ih and bias_hh beside it, need both or none")
    if w_in is None:
        raise ImportRefused(f"{key}: has no weights of the inputs, weight_ih, beside it")
    if named("weight_hr") is not None:
        raise ImportRefused(f"{key}: of an LSTM with a projection (proj_size), which no cell here has")
    shape = np.shape(w_rec)
    rows = shape[0] / shape[1] if len(shape) == 2 and shape[1] else 0
    if rows not in _CELLS:
        kind = "a plain recurrent network (nn.RNN), which has no gates" if rows == 1 else f"weights of shape {shape}"
        raise ImportRefused(f"{key}: {kind}; need a GRU (3 N, N) or an LSTM (4 N, N)")
    cell = _CELLS[int(rows)]
    return CellArrays(key, cell, ORDER[cell.name], np.asarray(w_in).T, np.asarray(w_rec).T, bias_in, bias_rec)


def _event_layers(source: Any, state: Mapping[str, Any], prefix: str, count: int, cell: Cell | None) -> list[Layer]:
    """The layers of an `eventrnn.torch.EGRU` in a module, a mapping or a file."""
    if hasattr(source, "get_submodule"):
        # The module knows its cells and the rule of its thresholds.
        module = source.get_submodule(prefix.rstrip("."))
        if hasattr(module, "to_network"):
            if cell is not None:
                raise ImportRefused(f"cell: got {cell!r}, but the module knows its cells; leave it out")
            return list(module.to_network().layers)
    known = None
    if isinstance(source, str | os.PathLike) and Path(source).suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(Path(source), "np") as file:
            metadata = file.metadata() or {}
        try:
            known = cells_of(metadata)
        except ValueError as error:
            raise ImportRefused(f"{Path(source).name}: {error}") from None
    if known is not None and len(known) != count:
        raise ImportRefused(f"source: says the cells of {len(known)} layers, but has the weights of {count}")
    if known is not None and cell is not None and any(each != cell for each in known):
        raise ImportRefused(f"cell: got {cell!r}, but the file was written of {known[0]!r}")
    return [_event_layer(state, prefix, k, known[k] if known else cell or Cell()) for k in range(count)]


def _event_layer(state: Mapping[str, Any], prefix: str, k: int, cell: Cell) -> Layer:
    """A layer of `eventrnn.torch.EGRU`, whose gates are in our order. Pruned weights are not stored."""

    def named(what: str, *, optional: bool = False) -> Any:
        key = f"{prefix}{what}_l{k}"
        if key not in state and not optional:
            raise ImportRefused(f"{prefix}w_rec_l{k}: has no {key} beside it, as an EGRU has")
        return plain(state[key]) if key in state else None

    biases = (named("bias_in", optional=True), named("bias_rec", optional=True))
    where = f"{prefix}w_rec_l{k}"
    layer = CellArrays(where, cell, tuple(range(cell.gates)), named("w_in"), named("w_rec"), *biases).layer()
    try:
        threshold = np.array(float32_array(f"{prefix}threshold_l{k}", named("threshold"), "(N,)", ndim=1))
        kept = {name: named(f"kept_{name}", optional=True) for name in ("w_in", "w_rec")}
        matrices = {name: CSR.from_weights(getattr(layer, name)) for name, mask in kept.items() if mask is not None}
        return replace(layer, threshold=threshold, **matrices)
    except (ValueError, TypeError) as error:
        raise ImportRefused(f"{where}: {error}") from None


def _weight(state: Mapping[str, Any], name: str) -> np.ndarray:
    """The weights of a module by its name."""
    key = f"{need_text('name', name)}.weight"
    if key not in state:
        raise ImportRefused(f"{name}: has no {key} among {listed(state)}")
    return plain(state[key])
