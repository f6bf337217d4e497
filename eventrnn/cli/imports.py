"""The commands `import` and `export`: networks of files that another library wrote, and files for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from eventrnn import io
from eventrnn._checks import need_choice, need_number
from eventrnn._files import read_arrays
from eventrnn.cli.options import (
    Force,
    GivenModel,
    Json,
    NamedModel,
    Out,
    VocabularyOption,
    model_file,
    save_model,
    writable_file,
)
from eventrnn.cli.terminal import show
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.io.export import library_of
from eventrnn.network import Network
from eventrnn.weights import NotAMatrix

ORIGINS = ("evnn", "keras", "onnx", "torch")

# The ending of a file -> the library that wrote it. A file of PyTorch may end in .safetensors, as model files do.
_ENDINGS = {
    ".npz": "evnn",
    ".keras": "keras",
    ".h5": "keras",
    ".onnx": "onnx",
    ".pt": "torch",
    ".pth": "torch",
    ".safetensors": "torch",
}

_EXPORTED = ", ".join(ending for endings in io.EXPORTS.values() for ending in endings)


def import_command(
    source: Annotated[Path, typer.Argument(help=f"File of another library: {', '.join(_ENDINGS)}.")],
    out: Out,
    origin: Annotated[
        str | None, typer.Option("--from", help=f"Library of the file: {', '.join(ORIGINS)}. [by the ending]")
    ] = None,
    module: Annotated[
        str | None, typer.Option(help="Of PyTorch: name of the GRU or LSTM, where the file has several.")
    ] = None,
    readout: Annotated[
        str | None,
        typer.Option(
            help="Name of the linear layer to import as the read-out: a module, a Dense layer, or a node of ONNX."
        ),
    ] = None,
    embedding: Annotated[
        str | None,
        typer.Option(help="Name of the embedding to import: a module, an Embedding layer, or a node Gather of ONNX."),
    ] = None,
    vocabulary: VocabularyOption = None,
    text: Annotated[
        str | None, typer.Option(help="Text of the training, of which --vocabulary takes the symbols; as for train.")
    ] = None,
    as_egru: Annotated[
        float | None,
        typer.Option(metavar="THRESHOLD", help="Make EGRUs of GRUs, the start of a training and another function."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Import a GRU or an LSTM of PyTorch, Keras or ONNX, or a layer of EvNN, as a model file."""
    writable_file(out, force)
    if as_egru is not None:
        need_number("as-egru", as_egru, at_least=0)
    symbols = _symbols(vocabulary, text)
    network = _imported(source, _origin(source, origin), module, {"readout": readout, "embedding": embedding})
    if symbols is not None:
        network = io.with_vocabulary(network, symbols)
    if as_egru is not None:
        network = io.as_egru(network, threshold=as_egru)
    save_model(network, out, force)
    layers = [f"{layer.cell.name}, {layer.inputs} inputs, {layer.units} units" for layer in network.layers]
    show(
        f"wrote {out}",
        {f"layer {k}": words for k, words in enumerate(layers)}
        | {"read-out": "none" if network.readout is None else f"{network.readout.weights.shape[1]} outputs"}
        | {"vocabulary": "none" if symbols is None else f"{len(symbols):,} {symbols.kind}s"}
        | {"bytes": out.stat().st_size},
        as_json,
    )


def _symbols(vocabulary: str | None, text: str | None) -> Vocabulary | None:
    """The vocabulary that the options describe. Raises ValueError where they do not belong together."""
    if vocabulary is None or vocabulary not in io.OWN_VOCABULARIES:
        if text is not None:
            names = " or ".join(io.OWN_VOCABULARIES)
            raise ValueError(f"text: got {text}, but only --vocabulary {names} reads a text; leave --text out")
        return None if vocabulary is None else io.vocabulary_of(vocabulary)
    return io.vocabulary_of(vocabulary, text)


def export_command(
    model: GivenModel = None,
    named: NamedModel = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=f"File to write: {_EXPORTED}.")] = None,
    library: Annotated[
        str | None, typer.Option("--to", help=f"Library of the file: {', '.join(io.EXPORTS)}. [by the ending]")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a model as a file of PyTorch, Keras or ONNX."""
    if out is None:
        raise ValueError(f"out: give --out a file to write, with the ending {_EXPORTED}")
    library_of(out, library, name="out", option="to")
    writable_file(out, force)
    source = model_file(model, named)
    if out.exists() and out.samefile(source):
        raise ValueError(f"out: {out} is the model itself, of which an export is not the whole; give another name")
    network = own_model(source)
    try:
        found = io.export(network, out, library=library, overwrite=force)
    except (io.ExportRefused, NotAMatrix) as error:
        # The argument of the command is the model.
        raise ValueError(f"model: {str(error).removeprefix('network: ')}") from None
    show(f"wrote {out}", found | {"bytes": out.stat().st_size}, as_json)


def own_model(source: Path) -> Network:
    """The network of a model file. Raises `ModelFileError`, which begins with `model`; for a file of another library it
    names the command."""
    try:
        return io.load(source)
    except io.ModelFileError as error:
        words = f"model: {str(error).removeprefix('model: ')}"
        if source.exists() and (
            source.suffix.lower() in _ENDINGS.keys() - {".safetensors"} or "without eventrnn's metadata" in str(error)
        ):
            words = f"{words}; eventrnn import takes files of other libraries"
        raise io.ModelFileError(words) from None


def _origin(source: Path, origin: str | None) -> str:
    """The library that wrote a file. Raises ValueError where neither the option nor the ending says it."""
    if origin is not None:
        return need_choice("from", origin, ORIGINS)
    found = _ENDINGS.get(source.suffix.lower())
    if found is None:
        raise ValueError(
            f"from: the name {source.name} does not say which library wrote it; give --from {'|'.join(ORIGINS)}"
        )
    return found


def _imported(source: Path, origin: str, module: str | None, layers: Mapping[str, str | None]) -> Network:
    """The network of a file of a library. Raises ValueError for options that the library does not have, and as the
    importers do."""
    if module is not None and origin != "torch":
        raise ValueError(f"module: got {module!r} for {source.name}, but only files of PyTorch have named networks")
    for option, given in layers.items():
        if given is not None and origin == "evnn":
            raise ValueError(f"{option}: got {given!r} for {source.name}, but a file of EvNN has one layer")
    try:
        if origin == "torch":
            return io.from_torch(source, name=module, embedding=layers["embedding"], readout=layers["readout"])
        if origin == "keras":
            return io.from_keras(source, embedding=layers["embedding"], readout=layers["readout"])
        if origin == "onnx":
            return io.from_onnx(source, embedding=layers["embedding"], readout=layers["readout"])
    except io.ImportRefused as error:
        raise ValueError(_of_option(str(error), module, layers)) from None
    except FileNotFoundError:
        raise ValueError(f"source: there is no file {source}") from None
    except ImportError as error:
        raise ValueError(f"source: {error}") from None
    return Network((io.from_evnn(_arrays(source)),))


def _of_option(words: str, module: str | None, layers: Mapping[str, str | None]) -> str:
    """The words of `ImportRefused`, which begin with an argument of the importer or a name in the file, with the option
    of the command before them."""
    if module is not None and words.startswith("name: "):
        return f"module: {words.removeprefix('name: ')}"
    if words.startswith(("source: ", *(f"{option}: " for option in layers))):
        return words
    option = next((each for each, given in layers.items() if given and words.startswith(f"{given}: ")), "source")
    return f"{option}: {words}"


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    try:
        found = read_arrays(path)
    except FileNotFoundError:
        raise ValueError(f"source: there is no file {path}") from None
    except ValueError as error:
        raise ValueError(f"source: {path} is not an .npz archive of arrays: {error}") from None
    if isinstance(found, np.ndarray):
        raise ValueError(f"source: {path} is not an .npz archive of arrays: it holds a single array")
    return found
