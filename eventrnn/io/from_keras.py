"""GRUs and LSTMs of Keras 3: a model, or a file `.keras` or `.weights.h5`.

Keras packs the columns of a GRU (z, r, h), where z keeps the state, and those of an LSTM (i, f, c, o). `reset_after`
says where the reset gate acts.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn._checks import need_flag, need_text
from eventrnn.cells import Cell
from eventrnn.io.imported import CellArrays, ImportRefused, listed, network_of
from eventrnn.network import Network

_KINDS = ("GRU", "LSTM")

# Layers that do nothing but in training.
_TRANSPARENT = {
    "ActivityRegularization",
    "AlphaDropout",
    "Dropout",
    "GaussianDropout",
    "GaussianNoise",
    "Identity",
    "SpatialDropout1D",
}

# Kinds of layers, as a file of weights writes them, that may stand beside those that are imported.
_BESIDE = {"dense", "embedding", "gru", "input_layer", "lstm"}

# What a layer must be set to, and what to do where it is not.
_NEEDED = {
    "activation": ("tanh", "cells here have tanh"),
    "recurrent_activation": ("sigmoid", "cells here have sigmoid"),
    "go_backwards": (False, "a stream has no end to begin at; reverse the inputs instead"),
}


def from_keras(
    source: Any, *, readout: str | None = None, reset_after: bool | None = None, embedding: str | None = None
) -> Network:
    """A network with the weights of all GRU and LSTM layers of a Keras 3 model, in their order.

    Parameters
    ----------
    source      : a `keras.Model`, or the path of a `.keras` or a `.weights.h5` file; files need h5py
    readout     : the name of a `Dense` layer with linear activation above them, or None
    embedding   : the name of an `Embedding` layer that the first of them reads, or None
    reset_after : of a GRU without biases in a `.weights.h5` file, which does not say where the reset gate acts

    The network has the cell "gru" or "lstm" and computes the same function as these layers, apart from rounding. What
    else stands below the first of them is not imported; it makes the inputs. Between them nothing may stand but dropout
    and noise. A `.weights.h5` file says neither the activations of its layers nor what each reads: they count as a
    stack, with the activations of `GRU()` and `LSTM()`, and a Dense layer that could stand in it is refused.
    `io.as_egru` makes an event network of it, as a start for training.

    Raises `ImportRefused`, a ValueError, for what cannot be imported, with the remedy; OSError where a file cannot be
    read; ImportError where h5py is missing.
    """
    wiring, path = None, _path(source)
    if reset_after is not None:
        need_flag("reset_after", reset_after)
        if path is None or path.suffix == ".keras":
            raise ValueError(f"reset_after: got {reset_after}, but the model says itself where its reset gates act")
    if path is not None:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        if path.suffix == ".keras":
            layers, wiring = _of_archive(path)
        else:
            layers = _of_weights(path, reset_after)
    elif hasattr(source, "layers") and hasattr(source, "get_config"):
        layers = [
            (layer.name, type(layer).__name__, layer.get_config(), layer.get_weights()) for layer in source.layers
        ]
        try:
            wiring = _wiring(source.get_config())
        except RuntimeError:
            # A model of the caller's own class need not have a configuration. Keras says so by an error of this kind.
            wiring = {}
    else:
        raise ImportRefused(f"source: got {type(source).__name__}, need a keras.Model or the path of a file of one")
    cells, dense, tables = [], {}, {}
    for option, given in (("readout", readout), ("embedding", embedding)):
        if given is not None:
            need_text(option, given)
    masks = [name for name, kind, config, _ in layers if kind == "Masking" or config.get("mask_zero")]
    for name, kind, config, arrays in layers:
        if kind == "Bidirectional":
            raise ImportRefused(
                f"{name}: reads a sequence from its end too, which a stream does not have; give it one direction"
            )
        if kind in ("RNN", "SimpleRNN", "ConvLSTM2D", "TimeDistributed"):
            raise ImportRefused(f"{name}: a layer {kind}, need GRU or LSTM layers")
        if any(each["class_name"] in _KINDS for each in config.get("layers") or []):
            raise ImportRefused(f"{name}: a model within the model, with GRU or LSTM layers; give it by itself")
        if kind in _KINDS:
            cells.append(_cell(name, kind, config, arrays))
        elif kind == "Dense":
            dense[name] = (config, arrays)
        elif kind in ("Embedding", "embedding"):
            tables[name] = arrays
    if not cells:
        raise ImportRefused(f"source: has no GRU or LSTM layer among {listed([each[0] for each in layers])}")
    if masks:
        raise ImportRefused(
            f"{masks[0]}: makes Keras skip masked steps, while a network here steps on; leave it out, and give "
            "simulate the lengths of the sequences instead"
        )
    top = _top(dense, readout)
    if embedding is not None and not tables.get(embedding):
        raise ImportRefused(f"embedding: got {embedding!r}, need one of the Embedding layers, {listed(tables)}")
    below = None if embedding is None else tables[embedding][0]
    if wiring is not None:
        stack = [name for name, kind, *_ in layers if kind in _KINDS]
        _check_stack([*([] if embedding is None else [embedding]), *stack], readout, wiring)
    else:
        _refuse_between(cells, {name: arrays for name, (_, arrays) in dense.items() if name != readout})
    return network_of(cells, below, top, origin="Keras")


def _refuse_between(cells: Sequence[CellArrays], dense: Mapping[str, list[Any]]) -> None:
    """Raise `ImportRefused` for a Dense layer of a file of weights that may stand between two of the cells: it has
    their sizes, and the file does not say where it stands."""
    for below, above in pairwise(cells):
        for name, arrays in dense.items():
            if arrays and np.shape(arrays[0]) == (np.shape(below.w_rec)[0], np.shape(above.w_in)[0]):
                raise ImportRefused(
                    f"{name}: may stand between {below.where} and {above.where}, which the file does not say; give the "
                    ".keras file, or name it as the read-out if it is one"
                )


def _path(source: Any) -> Path | None:
    return Path(source) if isinstance(source, str | os.PathLike) else None


def _top(dense: Mapping[str, tuple[Mapping[str, Any], list[Any]]], readout: str | None) -> tuple[Any, Any] | None:
    if readout is None:
        return None
    if readout not in dense:
        raise ImportRefused(f"readout: got {readout!r}, need one of the Dense layers, {listed(dense)}")
    config, arrays = dense[readout]
    if config.get("activation", "linear") != "linear":
        raise ImportRefused(
            f"{readout}: has the activation {config['activation']!r}, a read-out is linear; apply it to the output"
        )
    if not arrays:
        raise ImportRefused(f"{readout}: has no weights in the file")
    return arrays[0], arrays[1] if len(arrays) > 1 else None


def _cell(name: str, kind: str, config: Mapping[str, Any], arrays: list[Any]) -> CellArrays:
    for key, (needed, remedy) in _NEEDED.items():
        if config.get(key, needed) != needed:
            raise ImportRefused(f"{name}: has {key} {config[key]!r}, need {needed!r}; {remedy}")
    if len(arrays) not in (2, 3):
        raise ImportRefused(f"{name}: has {len(arrays)} arrays, need its weights, and its biases if it has some")
    w_in, w_rec, bias = np.asarray(arrays[0]), np.asarray(arrays[1]), None
    if len(arrays) == 3:
        bias = np.asarray(arrays[2])
    if kind == "LSTM":
        return CellArrays(name, Cell("lstm"), (0, 1, 2, 3), w_in, w_rec, bias)
    after = bool(config.get("reset_after", True))
    bias_in, bias_rec = (bias[0], bias[1]) if bias is not None and bias.ndim == 2 else (bias, None)
    return CellArrays(name, Cell("gru", "after" if after else "before"), (0, 1, 2), w_in, w_rec, bias_in, bias_rec)


Wiring = Mapping[str, tuple[str, list[str]]]


def _wiring(config: Mapping[str, Any]) -> Wiring:
    """For each layer of a model's configuration its kind, and the names of the layers that it reads."""
    layers = config.get("layers") or []
    names = [str(layer.get("name") or layer["config"]["name"]) for layer in layers]
    if any("inbound_nodes" in layer for layer in layers):
        reads = [list(_histories(layer.get("inbound_nodes", []))) for layer in layers]
    else:
        reads = [[], *([name] for name in names[:-1])]
    return {name: (layer["class_name"], below) for name, layer, below in zip(names, layers, reads, strict=False)}


def _histories(part: Any) -> Iterator[str]:
    """The names of the layers whose outputs a part of a configuration refers to."""
    if isinstance(part, Mapping) and "keras_history" in part:
        yield str(part["keras_history"][0])
    elif isinstance(part, Mapping | list | tuple):
        for each in part.values() if isinstance(part, Mapping) else part:
            yield from _histories(each)


def _check_stack(cells: Sequence[str], readout: str | None, wiring: Wiring) -> None:
    """Raise `ImportRefused` unless each layer reads the one before it, and the read-out the last one."""
    remedy = "; a network here is a stack of layers with nothing between them: make a model of a part that is one"
    stack = [*cells, *([] if readout is None else [readout])]
    for name in stack:
        # An initial state that is an input of the model is given to `simulate`.
        others = [each for each in wiring.get(name, ("", []))[1][1:] if _kind(wiring, each) != "InputLayer"]
        if others:
            raise ImportRefused(f"{name}: reads {listed(others)} too, as its initial state or at another place{remedy}")
    for below, name in pairwise(stack):
        at = name
        while at != below:
            reads = wiring.get(at, ("", []))[1]
            if not reads or (len(reads) != 1 and at != name):
                raise ImportRefused(f"{name}: does not read {below}, as far as the model says{remedy}")
            at = reads[0]
            if at != below and (kind := _kind(wiring, at)) not in _TRANSPARENT:
                raise ImportRefused(f"{name}: reads {at} ({kind}), need {below} below it{remedy}")


def _kind(wiring: Wiring, name: str) -> str:
    return wiring.get(name, ("a layer of another model", []))[0]


Found = list[tuple[str, str, Mapping[str, Any], list[Any]]]


def _of_archive(path: Path) -> tuple[Found, Wiring]:
    """Name, kind, configuration and arrays of every layer of a `.keras` file, whose code is not run; and its wiring."""
    h5py = _h5py(path)
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            weights = archive.read("model.weights.h5")
        file = h5py.File(io.BytesIO(weights), "r")
    except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
        raise ImportRefused(
            f"{path.name}: no file of Keras 3 ({error}); Keras 2 wrote .h5, which Keras 3 can convert"
        ) from None
    found: Found = []
    with file:
        groups = _groups(file)
        for layer, key in _keyed(config["config"].get("layers", [])):
            settings = dict(layer["config"])
            for name in ("activation", "recurrent_activation"):
                if isinstance(settings.get(name), Mapping):
                    settings[name] = settings[name].get("class_name")
            found.append((str(settings.get("name", key)), layer["class_name"], settings, groups.get(key, [])))
    return found, _wiring(config["config"])


def _keyed(layers: list[Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The layers of a configuration, each with its name in the file of weights: its kind in small letters, and a number
    from the second of a kind on."""
    seen: dict[str, int] = {}
    for layer in layers:
        kind = _snake(layer["class_name"])
        number = seen.get(kind, 0)
        seen[kind] = number + 1
        yield layer, f"{kind}_{number}" if number else kind


def _snake(kind: str) -> str:
    """The name that Keras gives to a layer of a class: GRU is gru, InputLayer is input_layer, Conv1D is conv1d."""
    return re.sub("([a-z])([A-Z])", r"\1_\2", re.sub("(.)([A-Z][a-z]+)", r"\1_\2", kind)).lower()


def _of_weights(path: Path, reset_after: bool | None) -> Found:
    """The same of a `.weights.h5` file, which has no configuration."""
    h5py = _h5py(path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ImportRefused(
            f"{path.name}: h5py cannot read it ({error}), need a .keras or a .weights.h5 file"
        ) from None
    found: Found = []
    with file:
        groups = _groups(file)
        kinds = {name.rstrip("0123456789").rstrip("_") for name in groups}
        if others := sorted(kinds - _BESIDE - {_snake(each) for each in _TRANSPARENT}):
            raise ImportRefused(f"{path.name}: has layers {listed(others)}, but not their place; give the .keras file")
        if kinds >= {"gru", "lstm"}:
            raise ImportRefused(f"{path.name}: has GRU and LSTM layers, but not their order; give the .keras file")
        for name, arrays in groups.items():
            kind = name.rstrip("0123456789").rstrip("_")
            if kind not in ("gru", "lstm"):
                found.append((name, "Dense" if kind == "dense" else kind, {}, arrays))
                continue
            settings: dict[str, Any] = {}
            if kind == "gru":
                after = arrays[2].ndim == 2 if len(arrays) > 2 else reset_after
                if reset_after not in (None, after):
                    raise ImportRefused(f"reset_after: got {reset_after}, but {name} has the biases of {after}")
                if after is None:
                    raise ImportRefused(
                        f"{name}: has no biases, and so does not say where its reset gate acts; give "
                        "the .keras file, or from_keras(reset_after=True), the default of Keras, or False"
                    )
                settings["reset_after"] = after
            found.append((name, kind.upper(), settings, arrays))
    return found


def _groups(file: Any) -> dict[str, list[np.ndarray]]:
    """The arrays of every layer of a file of weights, by the name of the layer."""
    if "layers" not in file:
        raise ImportRefused("source: has no layers; need the weights of a whole Keras 3 model")
    found = {}
    for name, group in file["layers"].items():
        own = group["cell/vars"] if "cell/vars" in group else group.get("vars", {})
        found[name] = [np.asarray(own[key]) for key in sorted(own, key=int)]
    return dict(sorted(found.items(), key=lambda each: (each[0].rstrip("0123456789"), _number(each[0]))))


def _number(name: str) -> int:
    digits = name[len(name.rstrip("0123456789")) :]
    return int(digits) if digits else 0


def _h5py(path: Path) -> Any:
    try:
        import h5py
    except ImportError:
        raise ImportError(f"{path.name}: needs h5py to read it: pip install 'eventrnn[imports]'") from None
    return h5py
