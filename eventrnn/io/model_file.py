"""Model files: one network with its metadata in one safetensors file, written atomically.

Every matrix is stored in its own format. The metadata in the header of the file are `format`, `version`, `network`
(JSON: cells, formats, shapes, metadata of the network) and `sha256`, a digest of the whole file with zeros in place of
the digest, which detects a change of any bit. Equal networks give equal bytes.

Version 2 added N:M matrices and narrow values: a matrix has `n`, `m` and `axis`, and its tensor `values` can be U16
(bfloat16) or I8 with a tensor `scales`. Version 3 stores indices and row pointers as the narrowest unsigned integers
that hold them. Version 4 stores an embedding whose values bfloat16 or int8 can hold as U16, or as I8 with a tensor
`embedding.scales`. Version 5 added the cells "gru" and "lstm", and gated blocks: a matrix has `density` and
`gate_rule`, and tensors `gate`, `gate_bias` and, for a gate of two factors, `gate_out`. Version 6 added networks whose
input is a one-hot symbol (`Network.one_hot`): the description has `one_hot`; and the steps that share a choice of gated
blocks: a matrix has `gate_period`, unless every step chooses. Files of versions 1 to 5 can still be read, and a network
is written as the lowest version, from 4 on, that has all it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from eventrnn._checks import need_choice
from eventrnn._files import printable, write_whole
from eventrnn.cells import CELLS, Cell, Surrogate
from eventrnn.network import Layer, Network, Readout
from eventrnn.weights import NM, RECORDS, Dense, GatedBlocks, Weights
from eventrnn.weights.storage import check_scales, from_bfloat16, from_int8, narrowest

FORMAT = "eventrnn"

VERSION = 6

READABLE = ("1", "2", "3", "4", "5", "6")

# The version that added a cell or a format; others are those of version 1.
_CELL_SINCE = {"gru": 5, "lstm": 5}
_FORMAT_SINCE = {NM.name: 2, GatedBlocks.name: 5}

# The lowest version that is written.
_WRITTEN = 4

# Types of index arrays in memory.
_INDEX = {"indices": np.int32, "indptr": np.int64}

# Placeholder for the digest while the digest is computed.
_UNSIGNED = "0" * 64

# Arrays that a record may have or lack.
_MAY_LACK = ("scales", "gate_out")

# Options that a description may lack, with the value that is then meant, and the version that added them.
_MAY_BE_LEFT_OUT, _OPTION_SINCE = {"gate_period": 1}, {"gate_period": 6}

# Types of the options of a format that are not whole numbers, and what they are called.
_OPTIONS: dict[str, tuple[Any, str]] = {
    "axis": (str, "text"),
    "gate_rule": (str, "text"),
    "density": ((int, float), "a number"),
}

_VECTORS = ("bias_in", "bias_rec", "threshold")

# Types of tensors that NumPy has.
_TYPES = ("F16", "F32", "F64", "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64")

# Kernels index with 32 bits.
_MOST = 2**31 - 1

# Rows or columns of a matrix: so many, or so many per byte of all tensors. Some formats need no byte for a unit without
# weights, so that a file of a few bytes could ask for any amount of memory.
_UNITS, _UNITS_PER_BYTE = 2**24, 64

# Longest header that the safetensors library reads.
_LONGEST_HEADER = 100_000_000


class ModelFileError(ValueError):
    """The file is missing, is not a model file, is damaged, or holds no valid network; the message says which."""


def save(network: Network, path: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write a network to `path` atomically: after an error an old file is unchanged and no new file is left.

    overwrite : replace an existing file; the new file has its permissions

    Raises `FileExistsError` if the path exists and `overwrite` is not set, `ModelFileError` for a path that is not a
    regular file, and `OSError` if the disk is full or not writable. A tied read-out is stored once. Cost: three copies
    of the weights in memory.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        if not target.is_file():
            raise ModelFileError(f"path: {printable(path)} exists and is not a regular file; choose another")
        if not overwrite:
            raise _exists(path)
    try:
        write_whole(target, encoded(network), overwrite=overwrite)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        # The path that was given, which may be a link to the target.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def encoded(network: Network) -> bytes:
    """The bytes that `save` writes. Equal networks give equal bytes. Raises as `save` does."""
    tensors, description = _to_tensors(network)
    # The lowest version that can hold the network, so that earlier releases can read what they know.
    return _encode(tensors, description, version=max(_WRITTEN, *_since(tensors, description)))


def _since(tensors: Mapping[str, np.ndarray], description: Mapping[str, Any]) -> dict[int, str]:
    """The versions that added something that a file holds, each with one such thing in words."""
    found = {1: "a network"}
    # The order of the tensors of a file differs between runs.
    for key, array in sorted(tensors.items(), key=lambda item: item[0]):
        name = key.rpartition(".")[2]
        if name == "values" and array.dtype in (np.uint16, np.int8):
            found[2] = f"{key} of type {array.dtype}"
        if name in _INDEX and array.dtype.kind == "u":
            found[3] = f"{key} of type {array.dtype}"
        if key == "embedding" and array.dtype in (np.uint16, np.int8):
            found[4] = f"an embedding of type {array.dtype}"
    for spec in description["matrices"].values():
        found[_FORMAT_SINCE.get(spec["format"], 1)] = f"the format {spec['format']!r}"
        found |= {since: f"the option {option!r}" for option, since in _OPTION_SINCE.items() if option in spec}
    for cell in description["cells"]:
        found[_CELL_SINCE.get(cell["name"], 1)] = f"the cell {cell['name']!r}"
    if description.get("one_hot"):
        found[6] = "a one-hot input"
    return found


def _exists(path: str | os.PathLike) -> FileExistsError:
    return FileExistsError(f"path: {printable(path)} exists; pass overwrite=True to replace it")


def load(path: str | os.PathLike) -> Network:
    """Read a network that `save` wrote, with the same formats and the same bits.

    Raises `ModelFileError` for a file that is missing, not a model file, truncated, changed in any bit, of a newer
    version, or inconsistent, whoever signed it. All checks are made before the network is returned, and sizes are
    checked before anything is allocated. Text of the file is escaped in the message. Cost: two copies of the weights
    in memory.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ModelFileError("cannot be read: not a regular file")
        with open(path, "rb") as file:
            raw, header, end = _read(file)
        tensors, description = _decode(raw, header, end)
        # What a file holds is taken out of the tensors below.
        held = dict(tensors)
        network = _from_tensors(tensors, description)
        _check_version(int(header["__metadata__"]["version"]), _since(held, description))
        return network
    except FileNotFoundError:
        words = "no such file"
    except OSError as error:
        words = f"cannot be read: {error.strerror}"
    except ModelFileError as error:
        words = str(error)
    except KeyError as error:
        words = f"holds no valid network: lacks {error}"
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        words = f"holds no valid network: {error}"
    except RecursionError:
        words = "holds no valid network: its description is nested too deeply"
    raise ModelFileError(f"{printable(path)}: {printable(words)}")


def _check_version(version: int, since: Mapping[int, str]) -> None:
    """Refuse a file that holds what its version did not have: a reader of that version would not know it."""
    needed = max(since)
    if needed > version:
        raise ModelFileError(f"format version {version}, but it holds {since[needed]}, which version {needed} added")


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
        tensors["embedding"], scales = narrowest(network.embedding)
        if scales is not None:
            tensors["embedding.scales"] = scales
    if network.readout is not None:
        tensors["readout.bias"] = network.readout.bias
    stored = _stored_bytes(tensors)
    for name, weights in network.matrices().items():
        _check_sizes(name, weights.shape, stored)
    description = {
        "cells": [asdict(layer.cell) for layer in network.layers],
        "matrices": matrices,
        "tied": network.readout is not None and network.readout.tied,
        "metadata": dict(network.metadata),
    }
    if network.one_hot:
        description["one_hot"] = True
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


def _from_tensors(tensors: dict[str, np.ndarray], description: Any) -> Network:
    # A file says that its input is one-hot only if it is.
    one_hot = isinstance(description, dict) and "one_hot" in description
    _need_keys("description", description, {"cells", "matrices", "tied", "metadata", *(["one_hot"] * one_hot)})
    description = {"one_hot": False} | description
    flags = ((name, bool, "true or false") for name in ("tied", "one_hot"))
    for name, kind, words in (("cells", list, "a list"), ("matrices", dict, "names"), *flags):
        _need_type(name, description[name], kind, words)
    metadata = description["metadata"]
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata: need text by name")
    stored, embedding = _stored_bytes(tensors), _embedding(tensors)
    matrices: dict[str, Weights] = {}
    for name, spec in description["matrices"].items():
        if "from" in _need_type(name, spec, dict, "an object"):
            matrices[name] = _transposed_embedding(name, spec, embedding)
            continue
        with _named(name):
            matrices[name] = _matrix(name, spec, tensors, stored)
            matrices[name].check(full=True)
    layers = []
    for k, described in enumerate(description["cells"]):
        cell = _cell(f"cells.{k}", described)
        vectors = {key: tensors.pop(f"layers.{k}.{key}") for key in _VECTORS}
        w_in, w_rec = matrices.pop(f"layers.{k}.w_in"), matrices.pop(f"layers.{k}.w_rec")
        with _named(f"layers.{k}"):
            layers.append(Layer(w_in, w_rec, **vectors, cell=cell))
    readout = None
    if "readout" in matrices:
        with _named("readout"):
            readout = Readout(matrices.pop("readout"), tensors.pop("readout.bias"), tied=description["tied"])
    elif description["tied"]:
        raise ValueError("tied: true, but there is no readout")
    if tensors or matrices:
        raise ModelFileError(f"holds what no layer uses: {', '.join([*tensors, *matrices])}")
    return Network(tuple(layers), embedding, readout, metadata, description["one_hot"])


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Let what is said about an invalid part of a network begin with its name."""
    try:
        yield
    except ModelFileError:
        raise
    except (TypeError, ValueError) as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {error}") from None


def _matrix(name: str, spec: dict[str, Any], tensors: dict[str, np.ndarray], stored: int) -> Weights:
    """A matrix from its description, its tensors removed. The constructor checks sizes, without reading the index."""
    kind = _format(name, spec)
    named = {field.name: str(field.type).startswith("np.ndarray") for field in fields(kind)}  # type: ignore[arg-type]
    options = {field for field, is_array in named.items() if not is_array}
    options -= {option for option in _MAY_BE_LEFT_OUT if isinstance(spec, dict) and option not in spec}
    _need_keys(name, spec, {"format", "arrays", *options})
    keys = _need_type(f"{name} arrays", spec["arrays"], list, "a list")
    needed = [field for field, is_array in named.items() if is_array and (field not in _MAY_LACK or field in keys)]
    if sorted(map(str, keys)) != sorted(needed):
        raise ValueError(f"{name} arrays: got {keys}, need {needed}")
    values: dict[str, Any] = {key: _widened(key, tensors.pop(f"{name}.{key}")) for key in needed}
    for option in ("shape", "block"):
        if option in options:
            values[option] = _two_sizes(f"{name} {option}", spec[option])
    for option in options - {"shape", "block"}:
        kinds, words = _OPTIONS.get(option, (int, "a whole number"))
        values[option] = _need_type(f"{name} {option}", spec[option], kinds, words)
    _check_sizes(name, values.get("shape", values["values"].shape), stored)
    return kind(**values)


def _format(name: str, spec: Mapping[str, Any]) -> type[Weights]:
    found = spec["format"]
    if not isinstance(found, str) or found not in RECORDS:
        raise ModelFileError(f"{name}: unknown weight format {found!r}; have {', '.join(RECORDS)}")
    return RECORDS[found]


def _embedding(tensors: dict[str, np.ndarray]) -> np.ndarray | None:
    """The embedding as float32, its tensors removed; None where there is none."""
    values, scales = tensors.pop("embedding", None), tensors.pop("embedding.scales", None)
    if values is None:
        if scales is not None:
            raise ModelFileError("embedding.scales: there is no embedding")
        return None
    if values.dtype in (np.int8, np.uint16) or scales is not None:
        if values.ndim != 2:
            raise ValueError(f"embedding: got shape {values.shape}, need (symbols, inputs)")
        check_scales(values, scales, len(values), full=True)
    if scales is not None:
        return from_int8(values, scales[:, None])
    return from_bfloat16(values) if values.dtype == np.uint16 else values


def _transposed_embedding(name: str, spec: Mapping[str, Any], embedding: np.ndarray | None) -> Dense:
    _need_keys(name, spec, {"format", "from"})
    if _format(name, spec) is not Dense or spec["from"] != "embedding" or name != "readout":
        raise ValueError(f"{name}: only a dense readout can be the transposed embedding")
    if embedding is None:
        raise ModelFileError(f"{name}: is the transposed embedding, but there is none")
    return Dense(np.ascontiguousarray(embedding.T))


def _cell(name: str, described: Any) -> Cell:
    _need_keys(name, described, {field.name for field in fields(Cell)})
    surrogate = described["surrogate"]
    _need_keys(f"{name} surrogate", surrogate, {field.name for field in fields(Surrogate)})
    for key, value in (("name", described["name"]), ("variant", described["variant"]), ("kind", surrogate["kind"])):
        _need_type(f"{name} {key}", value, str, "text")
    for key in ("dampening", "support"):
        surrogate[key] = float(_need_type(f"{name} {key}", surrogate[key], (int, float), "a number"))
    cell = Cell(described["name"], surrogate=Surrogate(**surrogate))
    # `Cell` takes an empty variant for the first one; a file names it.
    variant = need_choice(f"{name} variant", described["variant"], CELLS[cell.name])
    return replace(cell, variant=variant)


def _need_keys(name: str, value: Any, keys: set[str]) -> None:
    if not isinstance(value, dict) or value.keys() != keys:
        got = ", ".join(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{name}: got {got or 'nothing'}, need {', '.join(sorted(keys))}")


def _need_type(name: str, value: Any, kind: type | tuple[type, ...], words: str) -> Any:
    # A truth value is a whole number to Python, not to a model file.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}: got {value!r}, need {words}")
    return value


def _two_sizes(name: str, value: Any) -> tuple[int, int]:
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(size) is int and 0 <= size <= _MOST for size in value)
    ):
        raise ValueError(f"{name}: got {value!r}, need two whole numbers from 0 to {_MOST}")
    return value[0], value[1]


def _stored_bytes(tensors: Mapping[str, np.ndarray]) -> int:
    return sum(array.nbytes for array in tensors.values())


def _check_sizes(name: str, shape: tuple[int, ...], stored: int) -> None:
    """Refuse a shape that is too large for a file with so many bytes of tensors."""
    if max(shape, default=0) > max(_UNITS, _UNITS_PER_BYTE * stored):
        raise ValueError(
            f"{name}: {' x '.join(map(str, shape))} units with {stored} bytes of tensors; a model file holds at most "
            f"{_UNITS} units on a side, or {_UNITS_PER_BYTE} per byte"
        )


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


def _read(file: BinaryIO) -> tuple[bytes, dict[str, Any], int]:
    """The bytes of a model file, its header, and where the header ends. The rest is read if the header is right."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(9)
    end = 8 + int.from_bytes(start[:8], "little")
    if start[8:] != b"{":
        raise ModelFileError(f"not a model file, or cut off within its first bytes ({size} bytes)")
    if size < end:
        raise ModelFileError(f"truncated: {size} bytes, but the header alone has {end}; copy the file again")
    if end > _LONGEST_HEADER:
        raise ModelFileError(f"not a model file: its header has {end} bytes, more than {_LONGEST_HEADER}")
    head = start + file.read(end - len(start))
    header = _header(head[8:])
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelFileError("not a model file: a safetensors file without eventrnn's metadata")
    version = metadata.get("version")
    if version not in READABLE:
        raise ModelFileError(
            f"format version {version}; this eventrnn reads versions {', '.join(READABLE)}: update eventrnn"
        )
    needed = end + _data_size(header)
    if size < needed:
        raise ModelFileError(f"truncated: {size} of {needed} bytes; copy the file again")
    return head + file.read(), header, end


def _decode(raw: bytes, header: Mapping[str, Any], end: int) -> tuple[dict[str, np.ndarray], Any]:
    """The tensors and their description. Raises `ModelFileError` where the signature does not fit."""
    metadata = header["__metadata__"]
    digest = str(metadata.get("sha256"))
    unsigned = raw[:end].replace(_signature(digest), _signature(_UNSIGNED), 1)
    checked = hashlib.sha256(unsigned)
    checked.update(memoryview(raw)[end:])
    if checked.hexdigest() != digest:
        raise ModelFileError("damaged: the content does not match its checksum; restore it from a copy")
    try:
        tensors = safetensors.numpy.load(raw)
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"holds no valid tensors: {error}") from None
    return tensors, json.loads(_need_type("network", metadata.get("network"), str, "text"))


def _header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise ModelFileError("not a model file, or damaged: its header cannot be read") from None
    if not isinstance(header, dict):
        raise ModelFileError("not a model file: its header is not a JSON object")
    return header


def _data_size(header: Mapping[str, Any]) -> int:
    """The number of bytes of the tensors. Raises `ModelFileError` for a tensor of another type, or without a place."""
    most = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            kind, (start, stop) = entry["dtype"], entry["data_offsets"]
            most = max(most, start, stop)
        except (KeyError, TypeError, ValueError):
            raise ModelFileError(
                "damaged: its header does not say where the arrays are; restore it from a copy"
            ) from None
        if kind not in _TYPES:
            raise ModelFileError(f"{name}: got type {kind}, need one of {', '.join(_TYPES)}")
    return most
