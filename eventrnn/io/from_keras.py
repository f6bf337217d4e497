"""GRUs and LSTMs of Keras 3: a model, or a file `.keras` or `.weights.h5`.

Keras packs the columns of a GRU (z, r, h), where z keeps the state, and those of an LSTM (i, f, c, o). `reset_after`
says where the reset gate acts.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from eventrnn._checks import need_text
from eventrnn.cells import Cell
from eventrnn.io.imported import CellArrays, ImportRefused, listed, network_of
from eventrnn.network import Network

_KINDS = {"GRU": 3, "LSTM": 4}

# What a layer must be set to, and what to do where it is not.
_NEEDED = {
    "activation": ("tanh", "cells here have tanh"),
    "recurrent_activation": ("sigmoid", "cells here have sigmoid"),
    "go_backwards": (False, "a stream has no end to begin at; reverse the inputs instead"),
}


def from_keras(source: Any, *, readout: str | None = None, reset_after: bool | None = None) -> Network:
    """A network with the weights of all GRU and LSTM layers of a Keras 3 model, in their order.

    Parameters
    ----------
    source      : a `keras.Model`, or the path of a `.keras` or a `.weights.h5` file; files need h5py
    readout     : the name of a `Dense` layer with linear activation above them, or None
    reset_after : of a GRU without biases in a `.weights.h5` file, which does not say where the reset gate acts

    The network has the cell "gru" or "lstm" and computes the same function, apart from rounding. `io.as_egru` makes an
    event network of it, as a start for training.

    Raises `ImportRefused`, a ValueError, for what cannot be imported, with the remedy; OSError where a file cannot be
    read; ImportError where h5py is missing.
    """
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        layers = _of_archive(path) if path.suffix == ".keras" else _of_weights(path, reset_after)
    elif hasattr(source, "layers") and hasattr(source, "get_config"):
        layers = [
            (layer.name, type(layer).__name__, layer.get_config(), layer.get_weights()) for layer in source.layers
        ]
    else:
        raise ImportRefused(f"source: got {type(source).__name__}, need a keras.Model or the path of a file of one")
    cells, dense = [], {}
    masks = [name for name, kind, config, _ in layers if kind == "Masking" or config.get("mask_zero")]
    for name, kind, config, arrays in layers:
        if kind == "Bidirectional":
            raise ImportRefused(
                f"{name}: reads a sequence from its end too, which a stream does not have; give it one direction"
            )
        if kind in ("RNN", "SimpleRNN", "ConvLSTM2D", "TimeDistributed"):
            raise ImportRefused(f"{name}: a layer {kind}, need GRU or LSTM layers")
        if kind in _KINDS:
            cells.append(_cell(name, kind, config, arrays))
        elif kind == "Dense":
            dense[name] = (config, arrays)
    if not cells:
        raise ImportRefused(f"source: has no GRU or LSTM layer among {listed([each[0] for each in layers])}")
    if masks:
        raise ImportRefused(
            f"{masks[0]}: makes Keras skip masked steps, while a network here steps on; leave it out, and give "
            "simulate the lengths of the sequences instead"
        )
    return network_of(cells, None, _top(dense, readout), origin="Keras")


def _top(dense: Mapping[str, tuple[Mapping[str, Any], list[Any]]], readout: str | None) -> tuple[Any, Any] | None:
    if readout is None:
        return None
    if need_text("readout", readout) not in dense:
        raise ImportRefused(f"readout: got {readout!r}, need one of the Dense layers, {listed(dense)}")
    config, arrays = dense[readout]
    if config.get("activation", "linear") != "linear":
        raise ImportRefused(
            f"{readout}: has the activation {config['activation']!r}, a read-out is linear; apply it to the output"
        )
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


Found = list[tuple[str, str, Mapping[str, Any], list[Any]]]


def _of_archive(path: Path) -> Found:
    """Name, kind, configuration and arrays of every layer of a `.keras` file, whose code is not run."""
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
    return found


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
    """The name that Keras gives to a layer of a class: GRU is gru, InputLayer is input_layer."""
    letters = [
        f"_{each}" if k and each.isupper() and not kind[k - 1].isupper() else each for k, each in enumerate(kind)
    ]
    return "".join(letters).lower()


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
        kinds = {name.rstrip("0123456789_") for name in groups} & {"gru", "lstm"}
        if len(kinds) > 1:
            raise ImportRefused(f"{path.name}: has GRU and LSTM layers, but not their order; give the .keras file")
        for name, arrays in groups.items():
            kind = name.rstrip("0123456789").rstrip("_")
            if kind not in ("gru", "lstm"):
                found.append((name, "Dense" if kind == "dense" else kind, {}, arrays))
                continue
            settings: dict[str, Any] = {}
            if kind == "gru":
                if len(arrays) < 3 and reset_after is None:
                    raise ImportRefused(
                        f"{name}: has no biases, and so does not say where its reset gate acts; give "
                        "the .keras file, or from_keras(reset_after=True), the default of Keras, or False"
                    )
                settings["reset_after"] = arrays[2].ndim == 2 if len(arrays) > 2 else reset_after
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
