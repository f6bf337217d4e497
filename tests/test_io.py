"""Model files: a saved network loads to the bit, and a changed, truncated or half-written file is refused."""

import errno
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from eventrnn import _files as files
from eventrnn.cells import SURROGATES, Cell, Surrogate
from eventrnn.io import model_file as io
from eventrnn.network import Network, Readout
from eventrnn.pruning import prune
from eventrnn.testing import ALL_CELLS
from eventrnn.weights import FORMATS, STORAGES, Dense, GatedBlocks, convert
from support.model_files import converted, crafted, describe, edit, narrow_network, small_network


@st.composite
def networks(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sizes = st.integers(1, 6)
    units = draw(st.lists(sizes, min_size=1, max_size=3))
    surrogate = Surrogate(draw(st.sampled_from(sorted(SURROGATES))), draw(st.floats(0.1, 4)), draw(st.floats(0.1, 4)))
    cell = draw(st.sampled_from(ALL_CELLS))
    tied = draw(st.booleans())
    symbols = draw(sizes) if tied else draw(st.none() | sizes)
    network = Network.random(
        units,
        rng=rng,
        inputs=draw(sizes) if symbols is None else None,
        symbols=symbols,
        embedding=None if symbols is None else units[-1] if tied else draw(sizes),
        readout=None if tied else draw(st.none() | sizes),
        tied=tied,
        threshold=draw(st.sampled_from([0.0, 0.3, 0.9])) if cell.thresholded else None,
        cell=replace(cell, surrogate=surrogate) if cell.thresholded else cell,
        metadata=draw(st.dictionaries(st.text(), st.text(), max_size=3)),
    )
    formats = {name: draw(st.sampled_from(sorted(FORMATS))) for name in network.matrices()}
    storages = {name: draw(st.sampled_from(STORAGES)) for name in network.matrices()}
    changed = {
        k: converted(w, formats[k], rng, storages[k])
        for k, w in network.matrices().items()
        if not tied or k != "readout"
    }
    if tied and (formats["readout"], storages["readout"]) != ("dense", "float32"):
        options = {"block": {"block": (1, 1)}, "nm": {"nm": (3, 3, "pre")}}.get(formats["readout"], {})
        readout = network.matrices()["readout"].stored_as(storages["readout"])
        network = replace(network, readout=None, embedding=np.ascontiguousarray(readout.to_dense().T))
        weights = convert(readout, formats["readout"], **options)
        network = replace(network, readout=Readout(weights, np.zeros(symbols, np.float32), tied=True))
    if network.embedding is not None and not tied:
        network = network.with_rounded_embedding(draw(st.sampled_from(STORAGES)))
    return network.with_matrices(changed)


def contents(network):
    """All fields of a network in comparable form: arrays as type, shape and bytes."""

    def bits(array):
        return None if array is None else (array.dtype.str, array.shape, array.tobytes())

    def matrix(w):
        return w.name, w.shape, w.options(), {key: bits(array) for key, array in w.arrays().items()}

    return (
        {name: matrix(w) for name, w in network.matrices().items()},
        [(bits(x.bias_in), bits(x.bias_rec), bits(x.threshold), x.cell) for x in network.layers],
        bits(network.embedding),
        None if network.readout is None else (bits(network.readout.bias), network.readout.tied),
        dict(network.metadata),
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def only_file_in(folder):
    (file,) = folder.iterdir()
    return file


# --- round trip ---------------------------------------------------------------------------------------------


@given(network=networks())
def test_load_gives_what_was_saved_to_the_bit(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    before = contents(network)
    io.save(network, path)
    assert contents(io.load(path)) == before == contents(network)
    first = path.read_bytes()
    io.save(io.load(path), path, overwrite=True)
    assert path.read_bytes() == first, "the same network must give the same file"


def test_a_tied_readout_is_stored_once(path):
    network = small_network()
    io.save(network, path)
    tensors = safetensors.numpy.load_file(path)
    assert "embedding" in tensors and "readout.values" not in tensors
    loaded = io.load(path)
    assert loaded.readout.tied and np.array_equal(loaded.readout.weights.values, network.embedding.T)


def test_a_tied_readout_whose_bits_differ_from_the_embedding_keeps_them(path):
    network = small_network()
    embedding = network.embedding.copy()
    embedding[0, 0] = 0
    values = np.ascontiguousarray(embedding.T)
    values[0, 0] = np.float32(-0.0)
    readout = replace(network.readout, weights=Dense(values))
    network = replace(network, embedding=embedding, readout=readout)
    io.save(network, path)
    assert np.signbit(io.load(path).readout.weights.values[0, 0])


@pytest.mark.parametrize(
    ("storage", "bits", "dtype"),
    [
        ("float32", 8, np.float32),
        ("bfloat16", 8, np.uint16),
        ("int8", 8, np.int8),
        ("int8", 7, np.int8),
        ("int8", 2, np.int8),
    ],
)
def test_an_embedding_is_stored_in_the_narrowest_type_that_holds_it(path, storage, bits, dtype):
    # Rows of many magnitudes: the scale that rounded numbers suggest can differ from theirs in the last place.
    rng = np.random.default_rng(0)
    network = Network.random([3], rng=rng, symbols=2000, embedding=4, readout=2000)
    rows = rng.normal(size=(2000, 4)) * 10.0 ** rng.uniform(-9, 9, (2000, 1))
    rows[:5] = 0
    network = replace(network, embedding=rows.astype(np.float32)).with_rounded_embedding(storage, bits)
    io.save(network, path)
    tensors = safetensors.numpy.load_file(path)
    assert tensors["embedding"].dtype == dtype and ("embedding.scales" in tensors) == (storage == "int8")
    assert io.load(path).embedding.tobytes() == network.embedding.tobytes()
    # One number of another kind, and the whole embedding is stored as it is.
    network.embedding[1999, 3] = np.float32(np.pi)
    io.save(network, path, overwrite=True)
    assert safetensors.numpy.load_file(path)["embedding"].dtype == np.float32
    assert io.load(path).embedding.tobytes() == network.embedding.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        edit("embedding", lambda a: a.astype(np.int8)),
        edit("embedding", lambda a: a.ravel().view(np.uint32).astype(np.uint16)),
        lambda tensors, description: tensors.update({"embedding.scales": np.ones(5, np.float32)}),
        lambda tensors, description: (tensors.pop("embedding"), tensors.update({"embedding.scales": np.ones(5, "f4")})),
    ],
)
def test_load_refuses_an_embedding_whose_parts_do_not_fit(path, change):
    crafted(path, change)
    with pytest.raises(io.ModelFileError, match=r"scales|embedding: got shape|embedding"):
        io.load(path)


def test_an_untied_readout_keeps_the_outputs_and_can_be_pruned_alone():
    network = small_network()
    apart = network.untied()
    assert not apart.readout.tied and apart.untied() is apart
    assert np.array_equal(apart.readout.weights.to_dense(), network.embedding.T)
    with pytest.raises(ValueError, match="the read-out is tied to the embedding; untie it first"):
        network.with_rounded_embedding("int8")
    pruned = prune(apart, 0.5, names=("readout",))
    assert pruned.readout.weights.nnz <= 8 and np.array_equal(pruned.embedding, network.embedding)
    with pytest.raises(ValueError, match="cannot be pruned; leave it out, or use network.untied"):
        prune(network, 0.5, names=("readout",))


def test_a_transposed_embedding_in_memory_is_saved_in_order(path):
    table = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(4, 3))
    network = Network.random([2], rng=np.random.default_rng(0), inputs=3)
    io.save(Network(network.layers, embedding=table), path)
    assert np.array_equal(io.load(path).embedding, table)


def test_metadata_must_be_text(path):
    with pytest.raises(TypeError, match="metadata: got 'epochs': 3, need text"):
        Network.random([2], rng=np.random.default_rng(0), inputs=3, metadata={"epochs": 3})
    network = Network.random([2], rng=np.random.default_rng(0), inputs=3)
    network.metadata["epochs"] = 3
    with pytest.raises(TypeError, match="metadata: got 'epochs': 3, need text"):
        io.save(network, path)
    assert not path.exists()


# --- files that are refused ---------------------------------------------------------------------------------


def test_load_refuses_a_missing_file(path):
    with pytest.raises(io.ModelFileError, match=r"model\.safetensors: no such file"):
        io.load(path)


def test_load_refuses_a_folder(tmp_path):
    with pytest.raises(io.ModelFileError, match="cannot be read"):
        io.load(tmp_path)
    with pytest.raises(io.ModelFileError, match="not a regular file"):
        io.save(small_network(), tmp_path, overwrite=True)


@given(st.binary(max_size=200))
def test_load_refuses_random_bytes(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(io.ModelFileError):
        io.load(path)


@pytest.mark.parametrize(
    "body", [b"{", b"[[" * 5000, b"{" + b'"a":[' * 100_000, b"{}", b'{"__metadata__":3}', b"\x80{"]
)
def test_load_refuses_invalid_headers(path, body):
    path.write_bytes(len(body).to_bytes(8, "little") + body)
    with pytest.raises(io.ModelFileError, match="not a model file"):
        io.load(path)


def test_a_foreign_safetensors_file(path):
    safetensors.numpy.save_file({"weight": np.ones(3, np.float32)}, path)
    with pytest.raises(io.ModelFileError, match="without eventrnn's metadata"):
        io.load(path)


def test_every_truncation_is_refused(path):
    io.save(small_network(), path)
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 9), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(io.ModelFileError, match="truncated" if size > 8 else "not a model file, or cut off"):
            io.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(io.ModelFileError, match="checksum"):
        io.load(path)


def test_every_flipped_bit_is_refused(path):
    io.save(small_network(), path)
    whole = path.read_bytes()
    # 5 and 8 have no common factor, so that every bit position within a byte occurs.
    for bit in range(0, 8 * len(whole), 5):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(io.ModelFileError):
            io.load(path)


def test_a_bit_flipped_in_the_weights_is_named_as_damage(path):
    io.save(small_network(), path)
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(io.ModelFileError, match="damaged: the content does not match its checksum"):
        io.load(path)


def test_load_refuses_a_newer_version(path):
    newer, known = io.VERSION + 1, ", ".join(io.READABLE)
    crafted(path, lambda tensors, description: None, version=newer)
    words = f"format version {newer}; this eventrnn reads versions {known}: update"
    with pytest.raises(io.ModelFileError, match=words):
        io.load(path)


def test_indices_are_narrow_in_the_file_and_wide_ones_are_read(path):
    network = small_network()
    io.save(network, path)
    tensors = safetensors.numpy.load(path.read_bytes())
    narrow = {name: array for name, array in tensors.items() if name.endswith(("indices", "indptr"))}
    assert narrow and all(array.dtype == np.min_scalar_type(array.max()) for array in narrow.values())

    def widen(tensors, description):
        tensors |= {name: array.astype(io._INDEX[name.rpartition(".")[2]]) for name, array in narrow.items()}

    crafted(path, widen, version=2)
    assert contents(io.load(path)) == contents(network)


def test_a_file_of_version_4_is_read(path):
    # Version 4 has EGRU cells only.
    crafted(path, lambda tensors, description: None, version=4)
    assert contents(io.load(path)) == contents(small_network())


@pytest.mark.parametrize(("cell", "period", "version"), [("egru", 0, 4), ("gru", 0, 5), ("egru", 1, 5), ("egru", 2, 6)])
def test_a_network_is_written_in_the_lowest_version_that_holds_it(path, cell, period, version):
    network = Network.random([8], inputs=4, rng=np.random.default_rng(0), cell=Cell(cell))
    if period:
        given, rng = network.layers[0].w_in, np.random.default_rng(1)
        with pytest.warns(UserWarning, match=r"costs (50|25)\.0% of the matrix"):
            blocks = GatedBlocks.from_weights(given, block=(2, 4), density=0.9, rng=rng, gate_period=period)
        network = network.with_matrices({"layers.0.w_in": blocks})
    io.save(network, path)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata()["version"] == str(version)
    assert contents(io.load(path)) == contents(network)


def plain_network(cell):
    return Network.random([8], inputs=4, rng=np.random.default_rng(0), cell=Cell(cell))


def gated_network(period=1):
    network, rng = plain_network("egru"), np.random.default_rng(1)
    options = {"block": (4, 8), "density": 0.1, "gate_period": period}
    blocks = GatedBlocks.from_weights(network.layers[0].w_in, rng=rng, **options)
    return network.with_matrices({"layers.0.w_in": blocks})


def rounded_network():
    network = Network.random([4], symbols=5, embedding=3, readout=5, rng=np.random.default_rng(0))
    return network.with_rounded_embedding("bfloat16")


@pytest.mark.parametrize(
    ("network", "version", "words"),
    [
        (lambda: plain_network("lstm"), 4, "the cell 'lstm', which version 5 added"),
        (gated_network, 4, "the format 'gated', which version 5 added"),
        (lambda: gated_network(3), 5, "the option 'gate_period', which version 6 added"),
        (rounded_network, 3, "an embedding of type uint16, which version 4 added"),
        (small_network, 2, "layers.1.w_rec.indptr of type uint8, which version 3 added"),
        (narrow_network, 1, "which version 3 added"),
    ],
)
def test_a_file_that_holds_more_than_its_version_had_is_refused(path, network, version, words):
    crafted(path, lambda tensors, description: None, version=version, network=network())
    with pytest.raises(io.ModelFileError, match=f"format version {version}, but it holds .*{words}"):
        io.load(path)


@pytest.mark.parametrize(
    ("tensor", "change", "words"),
    [
        ("gate", lambda array: array * np.nan, "layers.0.w_in: weight gate: got nan"),
        ("gate_bias", lambda array: array[:1], "layers.0.w_in: gate_bias: got float32 of shape"),
        ("indices", lambda array: array + 200, "layers.0.w_in: weight indices: outside"),
        ("values", lambda array: array * np.inf, "layers.0.w_in: weight: got"),
    ],
)
def test_an_invalid_part_of_a_matrix_is_refused_with_the_name_of_the_matrix(path, tensor, change, words):
    def damage(tensors, description):
        tensors[f"layers.0.w_in.{tensor}"] = change(tensors[f"layers.0.w_in.{tensor}"])

    crafted(path, damage, network=gated_network())
    with pytest.raises(io.ModelFileError, match=f"holds no valid network: {words}"):
        io.load(path)


def test_a_file_of_version_1_is_read(path):
    # Version 1 has no N:M weights and no narrow values.
    old = Path(__file__).parent / "golden" / "model_v1.eventrnn"
    assert b'"version":"1"' in old.read_bytes()
    network, tensors = io.load(old), safetensors.numpy.load(old.read_bytes())
    for name, weights in network.matrices().items():
        assert weights.storage == "float32"
        for key, array in weights.arrays().items():
            if name != "readout":
                assert np.array_equal(array, tensors[f"{name}.{key}"])
    assert {weights.name for weights in network.matrices().values()} == {"dense", "csr", "block"}
    assert network.readout.tied and np.array_equal(network.readout.weights.values, tensors["embedding"].T)
    assert network.metadata == {"text": "ab\n\x1f\u00e9"}
    io.save(network, path)
    assert contents(io.load(path)) == contents(network)


def test_narrow_weights_make_a_smaller_file_of_their_own_types(path):
    io.save(narrow_network(), path)
    tensors = safetensors.numpy.load_file(path)
    assert tensors["layers.0.w_in.values"].dtype == np.uint16 and tensors["layers.0.w_in.codes"].dtype == np.uint8
    assert tensors["layers.1.w_rec.values"].dtype == np.int8 and tensors["layers.1.w_rec.scales"].dtype == np.float32
    assert "layers.1.w_in.scales" not in tensors
    assert contents(io.load(path)) == contents(narrow_network())


@pytest.mark.parametrize("storage", STORAGES)
def test_an_empty_tied_readout_keeps_its_storage(path, storage):
    # An empty read-out can be compared with the embedding by its type only.
    network = Network.random([3], inputs=2, rng=np.random.default_rng(0))
    readout = convert(np.zeros((3, 0), np.float32), "dense", storage=storage)
    layer = replace(network.layers[0], w_in=Dense(np.zeros((3, 9), np.float32)))
    top = Readout(readout, np.zeros(0, np.float32), tied=True)
    io.save(Network((layer,), np.zeros((0, 3), np.float32), top), path)
    assert io.load(path).readout.weights.storage == storage


@pytest.mark.parametrize("name", ["layers.0.w_rec.values", "layers.1.threshold", "readout.bias", "embedding"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_are_refused_by_position(path, name, value):
    def change(tensors, description):
        tensors[name].flat[2] = value

    crafted(path, change)
    position = {1: r"\(2,\)", 2: r"\(0, 2\)"}[io._to_tensors(small_network())[0][name].ndim]
    with pytest.raises(io.ModelFileError, match=rf"got -?(nan|inf) at position {position}"):
        io.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("layers.0.threshold", lambda a: a[:-1]), r"w_rec: got shape \(4, 12\), need \(3, 9\)"),
        (edit("layers.0.w_rec.values", np.transpose), r"w_rec: got shape \(12, 4\), need \(4, 12\)"),
        (edit("layers.0.bias_in", np.float64), "bias_in: got float64"),
        (edit("layers.1.bias_rec", None), "lacks 'layers.1.bias_rec'"),
        (edit("layers.7.bias_rec", lambda _: np.zeros(3)), "no layer uses: layers.7.bias_rec"),
        (edit("layers.0.w_in.indices", np.zeros_like), "not strictly ascending"),
        (edit("embedding", None), "readout: is the transposed embedding, but there is none"),
        (describe(lambda d: d["matrices"]["layers.0.w_in"].update(format="coo")), "unknown weight format 'coo'; have "),
        (describe(lambda d: d["matrices"]["layers.1.w_rec"].update(shape=[3, 10])), r"w_rec: got shape \(3, 10\)"),
        (describe(lambda d: d["cells"][0]["surrogate"].update(kind="square")), "surrogate kind: got 'square'"),
        (describe(lambda d: d["cells"].pop()), "no layer uses: layers.1"),
        (describe(lambda d: d.update(cells=3)), "holds no valid network"),
    ],
)
def test_load_refuses_invalid_contents(path, change, message):
    crafted(path, change)
    with pytest.raises(io.ModelFileError, match=message):
        io.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("layers.0.w_rec.scales", lambda a: -a), r"weight scale: got -.* for unit 0, need > 0"),
        (edit("layers.0.w_rec.scales", lambda a: a[:-1]), r"float32 of shape \(3,\), need float32 of shape \(4,\)"),
        (edit("layers.0.w_rec.scales", None), "lacks 'layers.0.w_rec.scales'"),
        (edit("layers.0.w_rec.values", lambda a: a.view(np.uint8)), "weight values: got uint8 with 2 dimensions"),
        (edit("layers.0.w_in.values", lambda a: a | 0x7F80), r"weight: got (nan|inf|-inf) at position \(0,\)"),
        (edit("layers.0.w_in.codes", np.invert), "index|ascending|set bits"),
        (edit("layers.0.w_in.codes", lambda a: a[1:]), "bytes of codes for 4:4 along pre of 3x12"),
        (describe(lambda d: d["matrices"]["layers.0.w_in"].update(n=5)), "nm: got 5:4"),
        (describe(lambda d: d["matrices"]["layers.0.w_in"].update(axis="up")), "nm axis: got 'up'"),
        (describe(lambda d: d["matrices"]["layers.0.w_in"].pop("m")), "holds no valid network"),
    ],
)
def test_load_refuses_invalid_narrow_contents(path, change, message):
    crafted(path, change, network=narrow_network())
    with pytest.raises(io.ModelFileError, match=message):
        io.load(path)


# --- writing that fails -------------------------------------------------------------------------------------


def test_save_keeps_an_existing_file_by_default(path):
    io.save(small_network(0), path)
    old = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        io.save(small_network(1), path)
    assert path.read_bytes() == old
    io.save(small_network(1), path, overwrite=True)
    assert path.read_bytes() != old
    assert only_file_in(path.parent) == path


def test_save_keeps_the_permissions_of_the_file_it_replaces(path):
    io.save(small_network(0), path)
    path.chmod(0o600)
    io.save(small_network(1), path, overwrite=True)
    assert path.stat().st_mode & 0o777 == 0o600


def test_saving_through_a_link_replaces_its_target(path):
    link = path.with_name("latest")
    link.symlink_to(path.name)
    io.save(small_network(), link)
    assert link.is_symlink() and contents(io.load(path)) == contents(small_network())


@pytest.mark.parametrize(("call", "code"), [("fsync", errno.ENOSPC), ("replace", errno.EACCES)])
def test_a_failing_disk_leaves_the_old_file(path, monkeypatch, call, code):
    io.save(small_network(0), path)
    old = path.read_bytes()

    def fail(*_):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(io.os, call, fail)
        with pytest.raises(OSError, match=r"model\.safetensors") as caught:
            io.save(small_network(1), path, overwrite=True)
    assert caught.value.errno == code
    assert only_file_in(path.parent).read_bytes() == old


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_device_leaves_the_old_file(path, monkeypatch):
    io.save(small_network(0), path)
    old = path.read_bytes()
    monkeypatch.setattr(
        files, "open", lambda *_, **__: os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb"), raising=False
    )
    with pytest.raises(OSError, match="No space left") as caught:
        io.save(small_network(1), path, overwrite=True)
    assert caught.value.errno == errno.ENOSPC
    assert only_file_in(path.parent).read_bytes() == old


def run_python(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


SAVE_OVER = """
import os, signal, sys
import eventrnn.io.model_file as io
network = io.load(sys.argv[1])
{before}
io.save(network, sys.argv[2], overwrite=True)
"""


def test_a_write_that_stops_half_way_leaves_the_old_file(path, tmp_path_factory):
    big = tmp_path_factory.mktemp("big") / "model.safetensors"
    io.save(Network.random([64], rng=np.random.default_rng(0), inputs=64), big)
    io.save(small_network(), path)
    old = path.read_bytes()
    limit = 10_000
    assert big.stat().st_size > 2 * limit
    # The kernel itself refuses to let the file grow beyond the limit, after part of it was written.
    finished = run_python(
        SAVE_OVER.format(before=""),
        big,
        path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert finished.returncode == 1 and "File too large" in finished.stderr
    assert only_file_in(path.parent).read_bytes() == old


def test_killed_before_the_rename_leaves_the_old_file_and_blocks_nothing(path):
    io.save(small_network(0), path)
    old = path.read_bytes()
    newer = path.with_name("newer.safetensors")
    io.save(small_network(1), newer)
    kill = "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    finished = run_python(SAVE_OVER.format(before=kill), newer, path)
    assert finished.returncode < 0
    assert path.read_bytes() == old and contents(io.load(path)) == contents(small_network(0))
    io.save(small_network(1), path, overwrite=True)
    assert contents(io.load(path)) == contents(small_network(1))


def test_save_refuses_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/model\.safetensors"):
        io.save(small_network(), tmp_path / "nowhere" / "model.safetensors")


def test_save_refuses_an_unwritable_folder(tmp_path, monkeypatch):
    if os.geteuid() == 0:  # root may write everywhere, so the refusal is simulated

        def refuse(name, mode, **_):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(name))

        monkeypatch.setattr(files, "open", refuse, raising=False)
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"/model\.safetensors"):
        io.save(small_network(), tmp_path / "model.safetensors")
    tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())
