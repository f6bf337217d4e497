"""Signed model files that hold no network: refused by name, in bounded time and memory, with their text escaped."""

import os
import tracemalloc

import numpy as np
import pytest

from eventrnn.io import model_file as io
from eventrnn.network import Network
from eventrnn.weights import BlockCSR, convert
from support.model_files import crafted, describe, narrow_network, signed


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h["layers.0.bias_in"].update(dtype="F33"), "layers.0.bias_in: got type F33, need one of F16"),
        (lambda h: h["layers.0.bias_in"].update(dtype="BF16"), "layers.0.bias_in: got type BF16"),
        (lambda h: h["layers.0.bias_in"].update(dtype="F64"), "holds no valid tensors"),
        (lambda h: h["layers.0.bias_in"].update(shape=[3, 5]), "holds no valid tensors"),
        (lambda h: h["layers.0.bias_in"].update(shape=["12"]), "holds no valid tensors"),
        (lambda h: h["layers.0.bias_in"].update(data_offsets=[48, 0]), "holds no valid tensors"),
        (lambda h: h["layers.0.bias_in"].update(data_offsets=[0]), "does not say where the arrays are"),
        (lambda h: h["__metadata__"].update(network="[" * 100_000), "nested too deeply"),
        (lambda h: h["__metadata__"].update(network="[]"), "description: got list, need cells, matrices"),
        (lambda h: h["__metadata__"].update(network="{"), "holds no valid network"),
        (lambda h: h["__metadata__"].pop("network"), "network: got None, need text"),
    ],
)
def test_load_refuses_signed_headers_that_hold_no_network(path, change, message):
    signed(path, change)
    with pytest.raises(io.ModelFileError, match=message):
        io.load(path)


def in_matrix(**options):
    return describe(lambda d: d["matrices"]["layers.0.w_in"].update(options))


def in_cell(**options):
    return describe(lambda d: d["cells"][0].update(options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_matrix(shape=[3]), r"layers.0.w_in shape: got \[3\], need two whole numbers"),
        (in_matrix(shape=[3, 12, 1]), "layers.0.w_in shape: got"),
        (in_matrix(shape=[3.0, 12.0]), "layers.0.w_in shape: got"),
        (in_matrix(shape=[True, 12]), "layers.0.w_in shape: got"),
        (in_matrix(shape=[3, -12]), "layers.0.w_in shape: got"),
        (in_matrix(n=True), "layers.0.w_in n: got True, need a whole number"),
        (in_matrix(m=4.0), "layers.0.w_in m: got 4.0, need a whole number"),
        (in_matrix(axis=["pre"]), "layers.0.w_in axis: got"),
        (in_matrix(format=["nm"]), "unknown weight format"),
        (in_matrix(arrays="codes"), "layers.0.w_in arrays: got 'codes', need a list"),
        (in_matrix(arrays=["codes"]), "layers.0.w_in arrays: got"),
        (in_matrix(colour="red"), "layers.0.w_in: got arrays, axis, colour"),
        (
            describe(lambda d: d["matrices"].update(readout={"format": "csr", "from": "embedding"})),
            "only a dense readout",
        ),
        (describe(lambda d: d["matrices"].update({"layers.0.w_in": 3})), "layers.0.w_in: got 3, need an object"),
        (describe(lambda d: d.update(metadata=["x"])), "metadata: need text by name"),
        (describe(lambda d: d.update(metadata={"vocabulary": 3})), "metadata: need text by name"),
        (describe(lambda d: d.update(tied=1)), "tied: got 1, need true or false"),
        (describe(lambda d: d.update(more={})), "description: got cells, matrices, metadata, more, tied"),
        (in_cell(name=["egru"]), "cells.0 name: got"),
        (in_cell(variant=None), "cells.0 variant: got None, need text"),
        (in_cell(gates=3), "cells.0: got gates, name"),
        (in_cell(variant=""), "variant: got '', need one of evnn, paper"),
        (in_cell(name="gru", variant="evnn"), "variant: got 'evnn', need one of after, before"),
        (in_cell(name="lstm", variant="standard"), "w_rec: got shape"),
        (in_cell(surrogate="triangle"), "cells.0 surrogate: got str"),
        (describe(lambda d: d["cells"][0]["surrogate"].update(support=True)), "cells.0 support: got True"),
        (describe(lambda d: d["cells"][0]["surrogate"].update(support=10**400)), "holds no valid network"),
        (describe(lambda d: d["cells"][0]["surrogate"].update(support=float("nan"))), "surrogate support: got nan"),
    ],
)
def test_load_refuses_descriptions_of_other_types(path, change, message):
    crafted(path, change, network=narrow_network())
    with pytest.raises(io.ModelFileError, match=message):
        io.load(path)


BLOCKS = Network.random([6], inputs=4, rng=np.random.default_rng(0))
BLOCKS = BLOCKS.with_matrices({"layers.0.w_in": convert(BLOCKS.layers[0].w_in, "block", block=(1, 1))})


@pytest.mark.parametrize(
    ("network", "options"),
    [
        (narrow_network(), {"shape": [2**29, 12]}),
        (narrow_network(), {"shape": [3, 2**29]}),
        (narrow_network(), {"shape": [2**31 - 1, 0]}),
        (narrow_network(), {"shape": [0, 2**31 - 1], "axis": "post"}),
        (BLOCKS, {"shape": [4, 2**27]}),
        (BLOCKS, {"shape": [2**31 - 1, 18], "block": [2**31 - 1, 1]}),
    ],
)
def test_load_refuses_huge_shapes_before_it_allocates(path, network, options):
    crafted(path, in_matrix(**options), network=network)
    tracemalloc.start()
    try:
        with pytest.raises(io.ModelFileError, match=r"layers\.0\.w_in|holds no valid network"):
            io.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_save_refuses_what_load_would(path):
    empty = BlockCSR(
        np.zeros(2, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), (2**24 + 1, 18), (2**24 + 1, 1)
    )
    network = BLOCKS.with_matrices({"layers.0.w_in": empty})
    with pytest.raises(ValueError, match=r"layers.0.w_in: 16777217 x 18 units with .* holds at most"):
        io.save(network, path)
    assert not path.exists()


def test_text_of_a_file_is_escaped_and_cut_in_messages(path):
    crafted(path, in_matrix(format="\x1b[2J[red]\u202e" + "x" * 9999), network=narrow_network())
    with pytest.raises(io.ModelFileError, match=r"unknown weight format") as caught:
        io.load(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 3000
    signed(path, lambda h: h.update({"\x1b]0;x\x07": h.pop("layers.0.bias_in")}))
    with pytest.raises(io.ModelFileError, match=r"lacks 'layers.0.bias_in'") as caught:
        io.load(path)
    crafted(path, _foreign_tensor)
    with pytest.raises(io.ModelFileError, match=r"no layer uses: \\x1b\]0;x\\x07") as caught:
        io.load(path)
    assert caught.value.__cause__ is None


def _foreign_tensor(tensors, description):
    tensors["\x1b]0;x\x07"] = np.zeros(1, np.float32)


def test_load_refuses_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(io.ModelFileError, match="not a regular file"):
            io.load(path)
