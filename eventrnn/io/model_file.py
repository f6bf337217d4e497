"""Model files: one network with its metadata in one safetensors file, written atomically.

Every matrix is stored in its own format. The metadata in the header of the file are `format`, `version`, `network`
(JSON: cells, formats, shapes, metadata of the network) and `sha256`, a digest of the whole file with zeros in place of
the digest, which detects a change of any bit. Equal networks give equal bytes.

Version 2 added N:M matrices and narrow values: a matrix has `n`, `m` and `axis`, and its tensor `values` can be U16
(bfloat16) or I8 with a tensor `scales`. Version 3 stores indices and row pointers as the narrowest unsigned integers
that hold them. Files of versions 1 and 2 can still be read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from eventrnn._files import write_whole
from eventrnn.cells import Cell, Surrogate
from eventrnn.network import Layer, Network, Readout
from eventrnn.weights import FORMATS, Dense, Weights

FORMAT = "eventrnn"

VERSION = 3

READABLE = ("1", "2", "3")

# Types of index arrays in memory.
_INDEX = {"indices": np.int32, "indptr": np.int64}

# Placeholder for the digest while the digest is computed.
_UNSIGNED = "0" * 64

_VECTORS = ("bias_in", "bias_rec", "threshold")


class ModelFileError(ValueError):
    """The file is missing, is not a model file, is damaged, or holds no valid network; the message says which."""


def save(network: Network, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write a network to `path` atomically: after an error an old file is unchanged and no new file is left.

    overwrite : replace an existing file

    Raises `FileExistsError` if the path exists and `overwrite` is not set, `ModelFileError` for a path that is not a
    regular file, and `OSError` if the disk is full or not writable. A tied read-out is stored once. Cost: three copies
    of the weights in memory.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        if not target.is_file():
            raise ModelFileError(f"path: {path} exists and is not a regular file; choose another")
        if not overwrite:
            raise FileExistsError(f"path: {path} exists; pass overwrite=True to replace it")
    raw = _encode(*_to_tensors(network))
    try:
        write_whole(target, raw, overwrite=overwrite)
    except OSError as error:
        # The error names the temporary file; name the path that was given instead.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def load(path: str | os.PathLike) -> Network:
    """Read a network that `save` wrote, with the same formats and the same bits.

    Raises `ModelFileError` for a file that is missing, not a model file, truncated, changed in any bit, of a newer
    version, or inconsistent. All checks are made before the network is returned. Cost: two copies of the weights in
    memory.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file") from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return _from_tensors(*_decode(raw))
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from None
    except KeyError as error:
        raise ModelFileError(f"{path}: holds no valid network: lacks {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelFileError(f"{path}: holds no valid network: {error}") from error


# --- network <-> tensors and their description --------------------------------------------------------------


def _to_tensors(network: Network) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    for key, value in network.metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"metadata: got {key!r}: {value!r}, need text for both")
    tensors: dict[str, np.ndarray] = {}
    matrices = {}
    for name, weights in network.matrices().items():
        weights.check(full=True)
        if name == "readout" and _is_transposed_embedding(network):
            matrices[name] = {"format": weights.name, "from": "embedding"}
            continue
        arrays = weights.arrays()
        matrices[name] = {"format": weights.name, "arrays": sorted(arrays)} | weights.options()
        tensors |= {f"{name}.{key}": _narrowed(key, array) for key, array in arrays.items()}
    for k, layer in enumerate(network.layers):
        tensors |= {f"layers.{k}.{key}": getattr(layer, key) for key in _VECTORS}
    if network.embedding is not None:
        tensors["embedding"] = network.embedding
    if network.readout is not None:
        tensors["readout.bias"] = network.readout.bias
    description = {
        "cells": [asdict(layer.cell) for layer in network.layers],
        "matrices": matrices,
        "tied": network.readout is not None and network.readout.tied,
        "metadata": dict(network.metadata),
    }
    return tensors, description


def _narrowed(key: str, array: np.ndarray) -> np.ndarray:
    return array.astype(np.min_scalar_type(array.max())) if key in _INDEX and array.size else array


def _widened(key: str, array: np.ndarray) -> np.ndarray:
    return array.astype(_INDEX[key]) if key in _INDEX and array.dtype.kind == "u" else array


def _is_transposed_embedding(network: Network) -> bool:
    """Whether a tied read-out equals the transposed embedding bit for bit; pruning or the sign of a zero can differ."""
    readout, embedding = network.readout, network.embedding
    if readout is None or embedding is None or not readout.tied or not isinstance(readout.weights, Dense):
        return False
    values = readout.weights.values
    return values.dtype == np.float32 and values.tobytes() == embedding.T.tobytes()


def _from_tensors(tensors: dict[str, np.ndarray], description: Mapping[str, Any]) -> Network:
    embedding = tensors.pop("embedding", None)
    matrices: dict[str, Weights] = {}
    for name, spec in description["matrices"].items():
        if spec["format"] not in FORMATS:
            raise ModelFileError(f"{name}: unknown weight format {spec['format']!r}; have {', '.join(FORMATS)}")
        if spec.get("from") == "embedding":
            if embedding is None:
                raise ModelFileError(f"{name}: is the transposed embedding, but there is none")
            matrices[name] = Dense(np.ascontiguousarray(embedding.T))
            continue
        arrays = {key: _widened(key, tensors.pop(f"{name}.{key}")) for key in spec["arrays"]}
        options = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in spec.items()
            if key not in ("format", "arrays")
        }
        matrices[name] = FORMATS[spec["format"]](**arrays, **options)
        matrices[name].check(full=True)
    layers = []
    for k, cell in enumerate(description["cells"]):
        surrogate = Surrogate(**cell.pop("surrogate"))
        vectors = {key: tensors.pop(f"layers.{k}.{key}") for key in _VECTORS}
        w_in, w_rec = matrices.pop(f"layers.{k}.w_in"), matrices.pop(f"layers.{k}.w_rec")
        layers.append(Layer(w_in, w_rec, **vectors, cell=Cell(surrogate=surrogate, **cell)))
    readout = None
    if "readout" in matrices:
        readout = Readout(matrices.pop("readout"), tensors.pop("readout.bias"), tied=description["tied"])
    if tensors or matrices:
        raise ModelFileError(f"holds what no layer uses: {', '.join([*tensors, *matrices])}")
    return Network(tuple(layers), embedding, readout, description["metadata"])


# --- tensors <-> bytes --------------------------------------------------------------------------------------


def _encode(tensors: dict[str, np.ndarray], description: Mapping[str, Any], *, version: int = VERSION) -> bytes:
    metadata = {
        "format": FORMAT,
        "version": str(version),
        "network": json.dumps(description, sort_keys=True),
        "sha256": _UNSIGNED,
    }
    # safetensors writes the memory of an array without regard to its strides, so arrays must be contiguous.
    raw = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata)
    # The order of the metadata differs between runs; the header is sorted, so that equal networks give equal files.
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    raw = len(header).to_bytes(8, "little") + header + raw[end:]
    return raw.replace(_signature(_UNSIGNED), _signature(hashlib.sha256(raw).hexdigest()), 1)


def _signature(digest: str) -> bytes:
    # Quotes are escaped inside the JSON of the network, so these bytes occur once in the header.
    return b'"sha256":"' + digest.encode() + b'"'


def _decode(raw: bytes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    header, end = _header(raw)
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelFileError("not a model file: a safetensors file without eventrnn's metadata")
    version = metadata.get("version")
    if version not in READABLE:
        raise ModelFileError(
            f"format version {version}; this eventrnn reads versions {', '.join(READABLE)}: update eventrnn"
        )
    needed = end + _data_size(header)
    if len(raw) < needed:
        raise ModelFileError(f"truncated: {len(raw)} of {needed} bytes; copy the file again")
    digest = metadata.get("sha256", "")
    unsigned = raw[:end].replace(_signature(digest), _signature(_UNSIGNED), 1)
    checked = hashlib.sha256(unsigned)
    checked.update(memoryview(raw)[end:])
    if checked.hexdigest() != digest:
        raise ModelFileError("damaged: the content does not match its checksum; restore it from a copy")
    return safetensors.numpy.load(raw), json.loads(metadata["network"])


def _header(raw: bytes) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and the position at which it ends."""
    end = 8 + int.from_bytes(raw[:8], "little")
    if raw[8:9] != b"{":
        raise ModelFileError(f"not a model file, or cut off within its first bytes ({len(raw)} bytes)")
    if len(raw) < end:
        raise ModelFileError(f"truncated: {len(raw)} bytes, but the header alone has {end}; copy the file again")
    try:
        header = json.loads(raw[8:end])
    except (ValueError, RecursionError):
        raise ModelFileError("not a model file, or damaged: its header cannot be read") from None
    if not isinstance(header, dict):
        raise ModelFileError("not a model file: its header is not a JSON object")
    return header, end


def _data_size(header: Mapping[str, Any]) -> int:
    try:
        return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (KeyError, TypeError, IndexError):
        raise ModelFileError("damaged: its header does not say where the arrays are; restore it from a copy") from None
