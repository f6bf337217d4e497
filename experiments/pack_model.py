"""Compress a model file as an `.xz` file, smaller than `xz -9` does, for `experiments/models/`.

    eventrnn convert tuned.safetensors --storage int8 --embedding int8 --out small.safetensors
    python experiments/pack_model.py small.safetensors experiments/models/ptb.safetensors.xz

Each tensor is a stream of its own, with the filters that suit it: indices of two bytes ascend within a row, so that
their differences compress much better, while those of weights would compress worse. `xz`, Python and `located_model`
unpack the streams of a file one after another, to the bytes of the model file. A pruned word model of int8 weights
takes 14.4 MB in place of 16.0. Prints both sizes and the checksum for `MODELS` in `eventrnn/io/named.py`.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from typing import Annotated, Any

import typer
from command_line import command

import eventrnn as er
from eventrnn.cli.options import writable_file

# Numbers of the filter LZMA2: literal context bits, literal position bits, position bits. The last two are 1 where
# values have two bytes and 2 where they have four. Weights gain nothing from the byte before them.
ONE_BYTE, TWO_BYTES, FOUR_BYTES = (0, 0, 0), (0, 1, 1), (0, 2, 2)


def filters(name: str, dtype: str) -> list[dict[str, Any]]:
    """The chain of filters of a tensor, from its name and its type in the model file."""
    context, position, aligned = {"I8": ONE_BYTE, "U8": ONE_BYTE, "U16": TWO_BYTES}.get(dtype, FOUR_BYTES)
    last = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": context, "lp": position, "pb": aligned}
    ascending = name.endswith(".indices") and dtype == "U16"
    return [{"id": lzma.FILTER_DELTA, "dist": 2}, last] if ascending else [last]


def packed(raw: bytes) -> bytes:
    """The content of an `.xz` file that unpacks to the content of a model file."""
    head = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:head])
    tensors = sorted(
        (head + spec["data_offsets"][0], head + spec["data_offsets"][1], filters(name, spec["dtype"]))
        for name, spec in header.items()
        if name != "__metadata__"
    )
    streams = [(0, head, filters("", "U8")), *tensors]
    return b"".join(lzma.compress(raw[a:b], format=lzma.FORMAT_XZ, filters=chain) for a, b, chain in streams)


def main(
    model: Annotated[Path, typer.Argument(help="Model file.")],
    out: Annotated[Path, typer.Argument(help="Compressed file to write, whose name ends in .xz.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that exists.")] = False,
) -> None:
    """Compress a model file, one stream per tensor."""
    if out.suffix != ".xz":
        raise ValueError(f"out: got {out}, need a name that ends in .xz")
    writable_file(out, force)
    er.load(model)  # Refuses what is no model file.
    raw = model.read_bytes()
    content = packed(raw)
    if lzma.decompress(content) != raw:
        raise RuntimeError(f"{model}: the compressed content unpacks to something else")
    out.write_bytes(content)
    print(f"{out}: {len(raw):,} -> {len(content):,} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


app = command(main, __doc__)

if __name__ == "__main__":
    app.run()
