"""Trained models by name, path or address: the registry of named models, and the way to their files.

A model is given as a file, as the name of an entry of `MODELS`, or as an address with the checksum of its content:

    model.safetensors
    ptb
    https://example.org/model.safetensors#sha256=<64 hexadecimal digits>

Files of addresses are downloaded once into the user's cache folder. A content with another checksum is refused. A file
whose name ends in `.xz` is one that `xz` has compressed, a third smaller where weights are pruned and narrow; it is
unpacked once into the same folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import urldefrag, urlsplit
from urllib.request import url2pathname

from eventrnn._files import cache_folder, file_sha256, printable, write_whole
from eventrnn.data.download import DownloadError, retrieve
from eventrnn.io.model_file import ModelFileError

# The folder that contains the package: in a checkout, locations in the repository are relative to it.
ROOT = Path(__file__).resolve().parents[2]

REMOTE = ("http", "https", "ftp")

# A compressed model file is at most so many times smaller; a file that unpacks to more holds something else.
MOST_TIMES_SMALLER = 64

CHUNK = 1 << 20

PACKED = ".xz"

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class NamedModel:
    """A trained model that commands and `located_model` know by name.

    Attributes
    ----------
    size      : bytes of the file
    sha256    : checksum of the file, as `sha256sum` prints it
    locations : where the file is, tried in this order: a path in the repository, which counts in a checkout only, or an
                address
    summary   : one line on what the model is
    """

    size: int
    sha256: str
    locations: tuple[str, ...]
    summary: str


#: name -> model
MODELS: dict[str, NamedModel] = {
    "ptb": NamedModel(
        size=15_317_920,
        sha256="fdae624c07a0da612fca671d53cf19bdde8e75666dfb54f54e18f109d79cae7b",
        locations=("experiments/models/ptb.safetensors.xz",),
        summary="words of the Penn Treebank: EGRU of 1344, 1344 and 736 units, 50 % of 1x16 blocks, int8, to be folded",
    ),
}


def located_model(given: str | os.PathLike, report: Report = lambda stage, done, total, note: None) -> Path:
    """The file of a model that is given as a path, as a name in `MODELS`, or as an address with a checksum.

    given  : a path that exists is taken as it is, whatever its name
    report : called with a stage, the bytes done, the bytes in all, and a note, while a file is downloaded

    Returns the path of a file whose content has the checksum; that of a plain path is not looked at. Raises
    `ModelFileError` for an unknown name, for an address without a checksum, and for a file that cannot be had, has
    another content or cannot be unpacked.
    """
    return _unpacked(_file(os.fspath(given), report))


def _file(text: str, report: Report) -> Path:
    """`located_model`, not unpacked."""
    if "://" in text:
        return _of_address(text, report)
    if Path(text).exists() or Path(text).name != text or Path(text).suffix:
        return Path(text)
    if text not in MODELS:
        known = f"named models: {', '.join(MODELS)}" if MODELS else "this version has no named models"
        raise ModelFileError(f"model: {printable(text)}: no such file, and no model of that name ({known})")
    model, reasons = MODELS[text], []
    for location in model.locations:
        if "://" not in location:
            path = ROOT / location
            if path.exists():
                return _checked(path, model.sha256)
            reasons.append(f"{location}: only in a checkout of the repository")
            continue
        try:
            return _fetched(location, model.sha256, report, text, model.size)
        except DownloadError as error:
            reasons.append(f"{location}: {error}")
    raise ModelFileError(
        f"model: {text} cannot be had ({'; '.join(reasons)}); try again, or give the path of a file that you have"
    )


def _of_address(given: str, report: Report) -> Path:
    """The file of an address that carries its checksum."""
    address, fragment = urldefrag(given)
    found = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if found is None:
        got = f"#{fragment}" if fragment else "none"
        raise ModelFileError(
            f"model: {printable(address)}: needs the checksum of the file, got {printable(got)}; add #sha256= and the "
            "64 digits that sha256sum prints"
        )
    sha256, parts = found[1].lower(), urlsplit(address)
    if parts.scheme == "file":
        return _checked(Path(url2pathname(parts.path)), sha256)
    if parts.scheme not in REMOTE:
        raise ModelFileError(
            f"model: {printable(address)}: need an address that begins with {', '.join(REMOTE)} or file"
        )
    try:
        return _fetched(address, sha256, report, Path(parts.path).name, 0)
    except DownloadError as error:
        raise ModelFileError(
            f"model: {printable(address)} cannot be downloaded ({error}); try again, or give the path of a file that "
            "you have"
        ) from None


def _fetched(address: str, sha256: str, report: Report, note: str, size: int) -> Path:
    # Two addresses can end in the same name, so that the checksum names the file in the cache.
    name = f"{sha256[:16]}.safetensors" + (PACKED if urlsplit(address).path.endswith(PACKED) else "")

    def each(done: int, total: int) -> None:
        report("downloading", done, max(total, 1), note)

    return retrieve(address, sha256, cache_folder() / "models", name=name, size=size, report=each)


def _unpacked(path: Path) -> Path:
    """The file itself, or the unpacked copy of a compressed one in the cache folder."""
    if path.suffix != PACKED or not path.is_file():
        return path
    # Not every Python was built with it.
    import lzma

    try:
        target = cache_folder() / "models" / f"{file_sha256(path)[:16]}.safetensors"
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with lzma.open(path) as file:
                raw = _content(cast(BinaryIO, file), path)
            write_whole(target, raw, overwrite=True)
    except (lzma.LZMAError, EOFError) as error:
        raise ModelFileError(f"model: {printable(path)}: cannot be unpacked: {error}; copy the file again") from None
    except OSError as error:
        raise ModelFileError(f"model: {printable(path)}: cannot be unpacked: {error.strerror}") from None
    return target


def _content(file: BinaryIO, path: Path) -> bytes:
    """What the compressed file at `path` holds. Raises `ModelFileError` for more than a model file can be."""
    most, parts, size = MOST_TIMES_SMALLER * path.stat().st_size, [], 0
    while part := file.read(CHUNK):
        size += len(part)
        if size > most:
            raise ModelFileError(f"model: {printable(path)}: holds more than {most} bytes, which is no model file")
        parts.append(part)
    return b"".join(parts)


def _checked(path: Path, sha256: str) -> Path:
    """The path, after its content was held against the checksum."""
    try:
        found = file_sha256(path)
    except OSError as error:
        raise ModelFileError(f"model: {printable(path)}: cannot be read: {error.strerror}") from None
    if found != sha256:
        raise ModelFileError(f"model: {printable(path)} has the checksum {found}, not {sha256}; it is another file")
    return path
