"""Files of other libraries, from networks: the ending of a name says which."""

from __future__ import annotations

import io
import os
from pathlib import Path

import safetensors.numpy

from eventrnn._checks import need_choice
from eventrnn._files import write_whole
from eventrnn.io.exported import described
from eventrnn.io.to_keras import keras_file, to_keras
from eventrnn.io.to_onnx import to_onnx
from eventrnn.io.to_torch import to_torch
from eventrnn.network import Network

#: library -> the endings of its files
EXPORTS = {"torch": (".safetensors", ".pt", ".pth"), "keras": (".weights.h5",), "onnx": (".onnx",)}


def export(
    network: Network, path: str | os.PathLike, *, library: str | None = None, overwrite: bool = False
) -> dict[str, str]:
    """Write a network as a file of another library: PyTorch, Keras or ONNX.

    path      : `.safetensors` (see `to_torch`; the cell of an EGRU is in its metadata), `.pt` or `.pth` (the same, as
                `torch.save` writes it; needs torch), `.weights.h5` (see `to_keras`; needs h5py), or `.onnx` (see
                `to_onnx`; needs onnx)
    library   : "torch", "keras" or "onnx", which the ending must be one of; None for the library of the ending
    overwrite : replace an existing file

    Returns the library and the names of what was written, in words. Raises `ExportRefused`, a ValueError, for a network
    that the format cannot hold; ValueError for another ending; FileExistsError; ImportError for a missing package.
    """
    target = Path(path)
    found = library_of(target, library)
    raw, words = _content(network, target, found)
    write_whole(target, raw, overwrite=overwrite)
    return {"library": found, "holds": words}


def library_of(path: Path, library: str | None = None, *, name: str = "path", option: str = "library") -> str:
    """The library that a name says.

    name, option : what a message calls the path and the library

    Raises ValueError where the path says no library, or another than `library`.
    """
    endings = ", ".join(ending for each in EXPORTS.values() for ending in each)
    found = next((each for each, own in EXPORTS.items() if path.name.lower().endswith(own)), None)
    if library is not None:
        need_choice(option, library, EXPORTS)
        if found != library:
            raise ValueError(f"{name}: got {path.name}, need a name that ends in {', '.join(EXPORTS[library])}")
    if found is None:
        raise ValueError(f"{name}: got {path.name}, need a name that ends in {endings}")
    return found


def _content(network: Network, path: Path, library: str) -> tuple[bytes, str]:
    """The bytes of a file, and the names of what it holds."""
    if library == "keras":
        return keras_file(network), "layers " + ", ".join(to_keras(network))
    if library == "onnx":
        model = to_onnx(network)
        taken, returned = (", ".join(each.name for each in part) for part in (model.graph.input, model.graph.output))
        return model.SerializeToString(), f"a graph that takes {taken} and returns {returned}"
    arrays = to_torch(network)
    words = "parameters " + ", ".join(arrays)
    cell = network.layers[0].cell
    if path.suffix.lower() == ".safetensors":
        return safetensors.numpy.save(arrays, described(network) if cell.thresholded else None), words
    try:
        import torch
    except ImportError:
        raise ImportError(f"{path.name}: needs torch to write it; a .safetensors file needs it not") from None
    raw = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, raw)
    return raw.getvalue(), words
