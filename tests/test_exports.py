"""Exported networks compute in other libraries what they compute here, and are the same when they are imported again.

PyTorch and the reference evaluator of ONNX run in the tests, ONNX Runtime where it is installed. Keras 3.15.1 loaded
what `export` wrote, and its outputs are in `golden/libraries/`, with a model that it saved then.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from eventrnn import io, reference
from eventrnn.cells import Cell, Surrogate
from eventrnn.io import ExportRefused, ImportRefused
from eventrnn.network import Network
from eventrnn.pruning import prune
from eventrnn.simulation import simulate
from eventrnn.testing import ALL_CELLS
from eventrnn.weights import NotAMatrix
from support import gated, tolerance
from support.conformance import same_bits
from support.plain_cells import bounded, random_network, said

GOLDEN = Path(__file__).parent / "golden" / "libraries"

GRU, BEFORE, LSTM = Cell("gru"), Cell("gru", "before"), Cell("lstm")

PLAIN = [GRU, BEFORE, LSTM]

# Another surrogate than the default, which the files must keep.
EVENT = [Cell("egru", "evnn", Surrogate("arctan", 0.5, 2.0)), Cell("egru", "paper", Surrogate("triangle", 0.3, 1.5))]

NAMES = {"embedding": "embedding", "readout": "readout"}


def words(cell: Cell, units=(4, 5)) -> Network:
    """A network with an embedding, a read-out, and biases. Where another library has one bias, the second is zero."""
    rng = np.random.default_rng(7)
    drawn = Network.random(list(units), symbols=7, embedding=3, readout=2, rng=rng, cell=cell)
    layers = []
    for layer in drawn.layers:
        biases = rng.standard_normal((2, len(layer.bias_in))).astype(np.float32)
        layers.append(
            replace(layer, bias_in=biases[0], bias_rec=0 * np.abs(biases[1]) if cell in (BEFORE, LSTM) else biases[1])
        )
    return replace(drawn, layers=tuple(layers), readout=replace(drawn.readout, bias=np.float32([0.25, -1.5])))


SYMBOLS = np.random.default_rng(8).integers(0, 7, (6, 2))


def assert_the_same(one: Network, other: Network) -> None:
    assert [layer.cell for layer in one.layers] == [layer.cell for layer in other.layers]
    for name in ("embedding", "readout"):
        assert (getattr(one, name) is None) == (getattr(other, name) is None), name
    for array, again in zip(one.dense().arrays(), other.dense().arrays(), strict=True):
        assert same_bits(array, again)


# --- PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [GRU, LSTM, *EVENT], ids=said)
def test_to_torch_a_file_is_the_same_network_when_it_is_imported(tmp_path, cell):
    network, path = words(cell, (4, 4)), tmp_path / "a.safetensors"
    assert io.export(network, path)["library"] == "torch"
    assert_the_same(network, io.from_torch(path, **NAMES))
    assert_the_same(network, io.from_torch(io.to_torch(network), **NAMES, cell=cell if cell.thresholded else None))
    with pytest.raises(FileExistsError):
        io.export(network, path)


@pytest.mark.torch
@pytest.mark.parametrize("cell", [GRU, EVENT[0]], ids=said)
def test_to_torch_what_torch_saves_is_the_same_network_with_the_cell_that_is_given(tmp_path, cell):
    pytest.importorskip("torch", reason="needs PyTorch")
    network = words(cell, (4, 4))
    io.export(network, tmp_path / "a.pt")
    assert_the_same(network, io.from_torch(tmp_path / "a.pt", **NAMES, cell=cell if cell.thresholded else None))


@pytest.mark.torch
@pytest.mark.parametrize("cell", [GRU, LSTM], ids=said)
def test_to_torch_a_module_of_pytorch_takes_it_and_has_the_outputs(cell):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    network = random_network(cell, units=(9, 9))
    module = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell.name](5, 9, 2)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in io.to_torch(network).items()})
    x = np.random.default_rng(1).standard_normal((6, 2, 5)).astype(np.float32)
    with torch.no_grad():
        found = module(torch.from_numpy(x))[0].numpy()
    for t, bound in enumerate(bounded(network, x)):
        ours = simulate(network, x, backend="reference").output[t]
        assert (np.abs(found[t] - ours) <= tolerance.engine_and_library(bound.error)).all()
    assert_the_same(network, io.from_torch(module))


@pytest.mark.torch
@pytest.mark.parametrize("cell", ALL_CELLS, ids=said)
def test_to_torch_the_module_of_this_library_goes_through_its_state_dict(cell):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from eventrnn.torch import EGRU

    network = replace(words(cell, (4, 4)), embedding=None, readout=None)
    module = EGRU.from_network(network, thresholds="sigmoid" if cell.thresholded else "positive")
    assert_the_same(module.to_network(), io.from_torch(torch.nn.ModuleDict({"rnn": module})))
    if cell.thresholded:
        with pytest.raises(ImportRefused, match="leave it out"):
            io.from_torch(module, cell=cell)
        plain = EGRU(3, 4, 2, cell=cell)
        plain.load_state_dict({name: torch.from_numpy(array) for name, array in io.to_torch(network).items()})
        assert_the_same(network, io.from_torch(plain.state_dict(), cell=cell))
        pruned = prune(network, 0.5)
        found = io.from_torch(EGRU.from_network(pruned).state_dict(), cell=cell)
        assert_the_same(pruned, found)
        assert {name: w.nnz for name, w in found.matrices().items()} == {
            name: w.nnz for name, w in pruned.matrices().items()
        }


def test_from_torch_the_cell_of_an_egru_must_fit(tmp_path):
    network = words(EVENT[0], (4, 4))
    io.export(network, tmp_path / "a.safetensors")
    assert io.from_torch(io.to_torch(network)).layers[0].cell == Cell()
    with pytest.raises(ImportRefused, match="but the file was written of"):
        io.from_torch(tmp_path / "a.safetensors", cell=Cell())
    with pytest.raises(ImportRefused, match="cell: got 'egru', need a Cell with thresholds"):
        io.from_torch(io.to_torch(network), cell="egru")
    with pytest.raises(ImportRefused, match="of a GRU or an LSTM"):
        io.from_torch(io.to_torch(words(GRU, (4, 4))), cell=Cell())
    arrays = io.to_torch(network)
    del arrays["rnn.threshold_l1"]
    with pytest.raises(ImportRefused, match=r"has no rnn.threshold_l1 beside it"):
        io.from_torch(arrays)


# --- Keras --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", PLAIN, ids=said)
def test_to_keras_a_file_is_the_same_network_when_it_is_imported(tmp_path, cell):
    pytest.importorskip("h5py", reason="needs h5py")
    network = words(cell)
    assert io.export(network, tmp_path / "a.weights.h5")["library"] == "keras"
    assert_the_same(network, io.from_keras(tmp_path / "a.weights.h5", embedding="embedding", readout="dense"))
    with pytest.raises(ImportRefused, match="embedding: got 'table', need one of the Embedding layers, embedding"):
        io.from_keras(tmp_path / "a.weights.h5", embedding="table")


@pytest.mark.parametrize("cell", PLAIN, ids=said)
def test_to_keras_a_model_of_keras_has_the_outputs(cell):
    expected = np.load(GOLDEN / "exports.npz")[f"keras_{said(cell)}"]
    network = words(cell)
    x = network.embedding[SYMBOLS]
    weights, bias = network.readout.weights.to_dense().astype(np.float64), network.readout.bias.astype(np.float64)
    found = simulate(network, SYMBOLS, backend="reference").output
    for t, bound in enumerate(bounded(Network(network.layers), x)):
        of_hidden = tolerance.engine_and_library(bound.error) @ np.abs(weights)
        own = 2 * tolerance.drive_bound(weights, bound.value, bias)
        assert (np.abs(found[t] - expected[t]) <= of_hidden + own).all()


def test_from_keras_an_archive_has_its_embedding():
    pytest.importorskip("h5py", reason="needs h5py")
    path = GOLDEN / "keras_words.keras"
    assert_the_same(words(GRU), io.from_keras(path, embedding="embedding", readout="dense"))
    assert io.from_keras(path).embedding is None


def test_to_keras_the_two_biases_are_added_where_keras_has_one():
    network = random_network(BEFORE)
    assert same_bits(io.to_keras(network)["gru_1"][2], network.layers[1].bias_in + network.layers[1].bias_rec)


def test_from_keras_a_dense_layer_that_may_stand_between_two_cells_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    path = tmp_path / "a.weights.h5"
    io.export(random_network(GRU, units=(4, 3)), path)
    with h5py.File(path, "a") as file:
        file["layers/dense/vars/0"] = np.ones((4, 4), np.float32)
        file["layers/dense/vars/1"] = np.ones(4, np.float32)
    with pytest.raises(ImportRefused, match="dense: may stand between gru and gru_1"):
        io.from_keras(path)
    with h5py.File(path, "a") as file:
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = np.ones((3, 4), np.float32)
    assert len(io.from_keras(path).layers) == 2


# --- ONNX ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", [*PLAIN, *EVENT], ids=said)
def test_to_onnx_a_file_is_the_same_network_when_it_is_imported(tmp_path, cell):
    pytest.importorskip("onnx", reason="needs onnx")
    network = words(cell)
    assert io.export(network, tmp_path / "a.onnx")["library"] == "onnx"
    assert_the_same(network, io.from_onnx(tmp_path / "a.onnx", **({} if cell.thresholded else NAMES)))
    bare = replace(network, embedding=None, readout=None)
    assert_the_same(bare, io.from_onnx(io.to_onnx(bare)))


def runs(model):
    """Functions that run a model: the reference evaluator of ONNX, and ONNX Runtime where it is installed."""
    from onnx.reference import ReferenceEvaluator

    found = [ReferenceEvaluator(model).run]
    if find_spec("onnxruntime") is not None:
        import onnxruntime

        found.append(onnxruntime.InferenceSession(model.SerializeToString()).run)
    return found


@pytest.mark.parametrize("cell", PLAIN, ids=said)
def test_to_onnx_nodes_have_the_outputs_in_one_call_and_in_two(cell):
    pytest.importorskip("onnx", reason="needs onnx")
    network = random_network(cell, units=(6, 4))
    model = io.to_onnx(network)
    x = np.random.default_rng(1).standard_normal((5, 2, 5)).astype(np.float32)
    sizes = {f"{name}.{k}": (1, 2, n) for name in ("state", "cell") for k, n in enumerate((6, 4))}
    given = [each.name for each in model.graph.input if each.name != "inputs"]
    start = {name: np.zeros(sizes[name], np.float32) for name in given}
    names = [each.name for each in model.graph.output]
    for run in runs(model):
        whole = dict(zip(names, run(None, start | {"inputs": x}), strict=True))
        first = dict(zip(names, run(None, start | {"inputs": x[:2]}), strict=True))
        then = {name: first[f"new_{name}"] for name in given}
        second = run(None, then | {"inputs": x[2:]})[0]
        ours = simulate(network, x, backend="reference").output
        for t, bound in enumerate(bounded(network, x)):
            allowed = tolerance.engine_and_library(bound.error)
            assert (np.abs(whole["output"][t] - ours[t]) <= allowed).all()
            split = first["output"][t] if t < 2 else second[t - 2]
            assert (np.abs(split - ours[t]) <= allowed).all()


@pytest.mark.parametrize("cell", EVENT, ids=said)
def test_to_onnx_a_step_of_an_egru_is_that_of_the_engine_outside_the_margin(cell):
    pytest.importorskip("onnx", reason="needs onnx")
    rng = np.random.default_rng(2)
    network = replace(random_network(EVENT[0], units=(40,)), readout=None)
    network = Network((replace(network.layers[0], cell=cell),))
    (layer,), model = network.layers, io.to_onnx(network)
    parameters = reference.layer_parameters(layer, np.float64)
    x, y, c = (rng.standard_normal((8, n)).astype(np.float32) for n in (5, 40, 40))
    y = np.where(y > layer.threshold, y, np.float32(0))
    bound = tolerance.cell_bound(cell.variant, parameters, *(each.astype(np.float64) for each in (x, c, y)))
    distance = bound.value - layer.threshold
    sure, fired = np.abs(distance) > 2 * bound.error, distance > 0
    assert sure.mean() > 1 - tolerance.INSIDE_MARGIN and 0.1 < fired.mean() < 0.9
    for run in runs(model):
        sent, new_y, new_c = run(None, {"inputs": x, "state.0": y, "cell.0": c})
        assert same_bits(sent, new_y)
        assert ((sent != 0) == fired)[sure].all()
        allowed = tolerance.engine_and_library(bound.error)
        assert (np.abs(sent - np.where(fired, bound.value, 0)) <= allowed)[sure].all()
        # The paper's variant keeps v; the released code takes the threshold off, with one more rounding.
        kept = tolerance.Running(bound.value, 2 * bound.error)
        if cell.variant == "evnn":
            kept = kept - tolerance.Running(np.where(fired, layer.threshold.astype(np.float64), 0))
        assert (np.abs(new_c - kept.value) <= kept.error)[sure].all()


def test_from_onnx_names_of_embedding_and_read_out_are_checked():
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    model = io.to_onnx(words(GRU))
    for options, match in (
        ({"readout": "top"}, "readout: got 'top', need the name of a node MatMul or Gemm: readout"),
        ({"embedding": "readout"}, "embedding: got 'readout', need the name of a node Gather: embedding"),
    ):
        with pytest.raises(ImportRefused, match=match):
            io.from_onnx(model, **options)
    model.graph.node[0].input[1] = "elsewhere"
    other = onnx.helper.make_node("MatMul", ["elsewhere", "readout.weights"], ["x"], name="aside")
    model.graph.node.append(other)
    with pytest.raises(ImportRefused, match=r"readout: aside does not read layers\.1"):
        io.from_onnx(model, readout="aside")
    events = io.to_onnx(words(EVENT[0]))
    with pytest.raises(ImportRefused, match="a model that to_onnx wrote of EGRUs says it itself"):
        io.from_onnx(events, readout="readout")
    lost = next(each for each in events.graph.initializer if each.name == "layers.1.threshold")
    events.graph.initializer.remove(lost)
    with pytest.raises(ImportRefused, match=r"has no constant layers\.1\.threshold, which to_onnx wrote"):
        io.from_onnx(events)
    events.metadata_props[0].value = "[3]"
    with pytest.raises(ImportRefused, match="not what an export wrote"):
        io.from_onnx(events)


# --- refusals and the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "call", "match"),
    [
        (words(BEFORE), io.to_torch, "need the same in all for a module of PyTorch"),
        (words(BEFORE, (4, 4)), io.to_torch, "export it to Keras or ONNX"),
        (words(EVENT[0]), io.to_keras, "has EGRU cells, which Keras has not; export it to ONNX or PyTorch"),
        (
            Network((*words(GRU, (4,)).layers, *random_network(EVENT[0], units=(4,), inputs=4).layers)),
            io.to_onnx,
            "has the cells egru/evnn, gru/after, need one for all layers of an ONNX model",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused_by_name(network, call, match):
    with pytest.raises(ExportRefused, match=match):
        call(network)


@pytest.mark.parametrize("call", [io.to_torch, io.to_keras, io.to_onnx])
def test_gated_blocks_are_refused(call):
    with pytest.raises(NotAMatrix):
        call(gated.network_of())


def test_export_names_of_files_say_the_library(tmp_path):
    for options, match in (
        ({"path": tmp_path / "a.txt"}, "a.txt, need a name that ends in .safetensors, .pt, .pth, .weights.h5, .onnx"),
        ({"path": tmp_path / "a.onnx", "library": "keras"}, "a.onnx, need a name that ends in .weights.h5"),
        ({"path": tmp_path / "a.onnx", "library": "jax"}, "library: got 'jax', need one of torch, keras, onnx"),
    ):
        with pytest.raises(ValueError, match=match):
            io.export(words(GRU), **options)
    assert not list(tmp_path.iterdir())


def test_export_and_import_on_the_command_line(cli, tmp_path):
    pytest.importorskip("onnx", reason="needs onnx")
    network, model = words(GRU), tmp_path / "a.safetensors"
    io.save(network, model)
    code, out, err = cli("export", model, "--out", tmp_path / "b.onnx", "--json")
    assert code == 0, err
    returned = "output, new_state.0, new_state.1"
    assert json.loads(out)["holds"] == f"a graph that takes symbols, state.0, state.1 and returns {returned}"
    again = tmp_path / "c.safetensors"
    options = ("--readout", "readout", "--embedding", "embedding")
    assert cli("import", tmp_path / "b.onnx", "--out", again, *options)[0] == 0
    assert_the_same(network, io.load(again))
    for arguments, words_of in (
        (("--out", tmp_path / "b.onnx"), "use --force"),
        ((), "give --out a file to write, with the ending .safetensors"),
        (("--out", tmp_path / "d.pt"), "need the same in all"),
        (("--out", tmp_path / "d.txt"), "out: got d.txt, need a name that ends in"),
        (("--out", tmp_path / "d.pt", "--to", "keras"), "out: got d.pt, need a name that ends in .weights.h5"),
        (("--out", tmp_path / "d.pt", "--to", "jax"), "to: got 'jax'"),
        (("--out", model, "--force"), "is the model itself"),
    ):
        code, _, err = cli("export", model, *arguments)
        assert code == 2 and words_of in err, err
