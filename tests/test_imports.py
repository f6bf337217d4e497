"""GRUs and LSTMs of other libraries compute here what they compute there; what cannot be imported is refused by name.

Files and outputs in `golden/libraries/` were written by Keras 3.15.1, Flax 0.12.8, Equinox 0.13.8 and Haiku 0.0.17
themselves.
"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from eventrnn import io as er_io
from eventrnn.cells import Cell
from eventrnn.cli import app
from eventrnn.io import (
    ImportRefused,
    as_egru,
    from_equinox,
    from_flax,
    from_haiku,
    from_keras,
    from_onnx,
    from_torch,
)
from eventrnn.network import Network
from eventrnn.simulation import simulate
from support import tolerance
from support.plain_cells import bounded

GOLDEN = Path(__file__).parent / "golden" / "libraries"

RECORDED = np.load(GOLDEN / "imports.npz")

RNG = np.random.default_rng(3)


def check(network: Network, inputs: np.ndarray, expected: np.ndarray) -> None:
    """The outputs of a network without read-out on inputs (B, T, I) are those that a library computed, (B, T, N)."""
    steps_first = np.ascontiguousarray(np.moveaxis(inputs, 0, 1))
    bounds = bounded(network, steps_first)
    found = simulate(network, steps_first, backend="reference").output
    for t, bound in enumerate(bounds):
        assert (np.abs(found[t] - expected[:, t]) <= tolerance.engine_and_library(bound.error)).all()


def group(name: str) -> dict:
    """The recorded arrays of a library, as its nested mapping."""
    found: dict = {}
    for key in RECORDED.files:
        if key.startswith(f"{name}/"):
            *above, last = key.split("/")[1:]
            place = found
            for part in above:
                place = place.setdefault(part, {})
            place[last] = RECORDED[key]
    return found


# --- PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize(("inputs", "units", "layers", "bias"), [(3, 5, 1, True), (1, 1, 3, True), (4, 7, 2, False)])
def test_from_torch_every_source_has_the_outputs_of_the_module(tmp_path, kind, inputs, units, layers, bias):
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    torch.manual_seed(0)
    module = getattr(torch.nn, kind)(inputs, units, layers, bias=bias, batch_first=True)
    x = RNG.standard_normal((2, 6, inputs)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(x))[0].numpy()
    torch.save(module.state_dict(), tmp_path / "a.pt")
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "b.pth")
    from safetensors.torch import save_file

    save_file(module.state_dict(), tmp_path / "c.safetensors")
    arrays = {name: value.numpy() for name, value in module.state_dict().items()}
    for source in (
        module,
        module.state_dict(),
        arrays,
        tmp_path / "a.pt",
        tmp_path / "b.pth",
        tmp_path / "c.safetensors",
    ):
        network = from_torch(source)
        assert [layer.cell.name for layer in network.layers] == [kind.lower()] * layers
        check(network, x, expected)


@pytest.mark.torch
def test_from_torch_a_module_within_a_model_has_its_embedding_and_read_out():
    torch = pytest.importorskip("torch", reason="compares with PyTorch")
    torch.manual_seed(0)
    model = torch.nn.ModuleDict(
        {"words": torch.nn.Embedding(9, 3), "rnn": torch.nn.GRU(3, 4), "top": torch.nn.Linear(4, 2)}
    )
    network = from_torch(model, embedding="words", readout="top")
    symbols = RNG.integers(0, 9, (6, 2))
    with torch.no_grad():
        hidden = model["rnn"](model["words"](torch.from_numpy(symbols)))[0]
        expected = model["top"](hidden).numpy()
    found = simulate(network, symbols, backend="reference")
    assert found.output.shape == expected.shape
    readout = network.readout
    assert (readout.weights.to_dense() == model["top"].weight.detach().numpy().T).all()
    assert (readout.bias == model["top"].bias.detach().numpy()).all()
    assert (network.embedding == model["words"].weight.detach().numpy()).all()
    cell = torch.nn.GRUCell(3, 4)
    assert from_torch(cell).layers[0].units == 4


def state(rows: int, units: int = 2, inputs: int = 3, **more) -> dict[str, np.ndarray]:
    """The weights of a layer of PyTorch with `rows` gates, and more arrays."""
    return {
        "rnn.weight_ih_l0": np.ones((rows * units, inputs), np.float32),
        "rnn.weight_hh_l0": np.ones((rows * units, units), np.float32),
    } | {name.replace("__", "."): value for name, value in more.items()}


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        (3, {}, "source: got int, need a module"),
        ({}, {}, "has no weights of a GRU or an LSTM"),
        (state(1), {}, "a plain recurrent network (nn.RNN)"),
        (state(5), {}, "weights of shape (10, 2)"),
        (state(3, rnn__weight_hh_l0_reverse=np.ones((6, 2))), {}, "bidirectional"),
        (state(3, rnn__weight_hh_l2=np.ones((6, 2))), {}, "has the layers 0, 2 of rnn."),
        (state(4, rnn__weight_hr_l0=np.ones((1, 2))), {}, "proj_size"),
        ({"rnn._all_weight_values.0": 1}, {}, "quantised"),
        ({"rnn.weight_hh_l0": np.ones((6, 2))}, {}, "weight_ih, beside it"),
        (state(3, b__weight_hh_l0=np.ones((6, 2))), {}, "say which with name="),
        (state(3), {"name": "lstm"}, "name: got 'lstm', need one of rnn"),
        (state(3), {"readout": "top"}, "top: has no top.weight"),
        (
            state(3, rnn__bias_ih_l0=np.ones(5), rnn__bias_hh_l0=np.ones(6)),
            {},
            "rnn.weight_hh_l0: its input biases have the shape (5,), need (6,)",
        ),
        (state(3, rnn__bias_ih_l0=np.ones(6), rnn__bias_hh_l0=np.full(6, np.nan)), {}, "recurrent biases: got nan"),
        (state(3, rnn__bias_ih_l0=np.ones(6)), {}, "only one of the biases"),
        (
            state(3, rnn__bias_ih_l0=np.ones(6), rnn__bias_hh_l0_orig=np.ones(6)),
            {},
            "rnn.bias_hh_l0: is pruned by torch.nn.utils.prune; call its remove()",
        ),
        ({"rnn.weight_hh_l0_orig": np.ones((6, 2))}, {}, "call its remove() before"),
        (dict, {}, "source: got type"),
        (state(3, top__weight=np.ones((4, 5))), {"readout": "top"}, "readout: takes 5 units"),
    ],
)
def test_from_torch_what_cannot_be_imported_is_refused_by_name(source, options, words):
    with pytest.raises(ImportRefused) as refused:
        from_torch(source, **options)
    assert words in str(refused.value)


def test_from_torch_files_that_hold_no_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        from_torch(tmp_path / "none.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ImportRefused, match="a.safetensors: no file of tensors"):
        from_torch(tmp_path / "a.safetensors")


# --- Keras --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["after", "before"])
def test_from_keras_an_archive_has_the_outputs_of_its_model(place):
    pytest.importorskip("h5py", reason="needs h5py")
    network = from_keras(GOLDEN / f"keras_{place}.keras", readout="top")
    assert [layer.cell for layer in network.layers] == [Cell("gru", place)] * 2
    hidden = Network(network.layers)
    x = np.ascontiguousarray(np.moveaxis(RECORDED["inputs"], 0, 1))
    weights, bias = network.readout.weights.to_dense().astype(np.float64), network.readout.bias.astype(np.float64)
    bounds, found = bounded(hidden, x), simulate(network, x, backend="reference").output
    for t, bound in enumerate(bounds):
        of_hidden = tolerance.engine_and_library(bound.error) @ np.abs(weights)
        own = 2 * tolerance.drive_bound(weights, bound.value, bias)
        assert (np.abs(found[t] - RECORDED[f"keras_{place}"][:, t]) <= of_hidden + own).all()


def test_from_keras_a_file_of_weights_has_the_arrays_of_the_archive():
    pytest.importorskip("h5py", reason="needs h5py")
    whole = from_keras(GOLDEN / "keras_before.keras", readout="top")
    weights = from_keras(GOLDEN / "keras_before.weights.h5", readout="dense")
    for one, other in zip(whole.arrays(), weights.arrays(), strict=True):
        np.testing.assert_array_equal(one, other)


def edited(path: Path, change) -> Path:
    """A copy of a recorded archive with another configuration of its layers."""
    with zipfile.ZipFile(GOLDEN / "keras_after.keras") as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(parts["config.json"])
    change(config["config"]["layers"])
    parts["config.json"] = json.dumps(config).encode()
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    path.write_bytes(raw.getvalue())
    return path


def setting(name, value):
    def change(layers):
        layers[1]["config"][name] = value

    return change


def other(kind: str, name: str, **settings) -> dict:
    """Another layer of a model's configuration."""
    return {"class_name": kind, "config": {"name": name} | settings}


def wired(reads: list):
    """A model of the functional kind, whose layers `first`, `second` and `top` read the layers of these names."""

    def tensor(name):
        return {"class_name": "__keras_tensor__", "config": {"keras_history": [name, 0, 0]}}

    def change(layers):
        layers[0]["config"]["name"], layers[0]["inbound_nodes"] = "input", []
        for layer, below in zip(layers[1:], reads, strict=True):
            x, *state = below if isinstance(below, list) else [below]
            keywords = {"initial_state": [tensor(each) for each in state]} if state else {}
            layer["inbound_nodes"] = [{"args": [tensor(x)], "kwargs": keywords}]

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda layers: layers.insert(2, other("Dropout", "drop")),
        wired(["input", "first", "second"]),
        wired(["input", ["first", "input"], "second"]),
    ],
)
def test_from_keras_dropout_and_a_state_that_is_an_input_do_not_change_a_stack(tmp_path, change):
    pytest.importorskip("h5py", reason="needs h5py")
    expected = from_keras(GOLDEN / "keras_after.keras", readout="top")
    found = from_keras(edited(tmp_path / "a.keras", change), readout="top")
    for one, same in zip(expected.arrays(), found.arrays(), strict=True):
        np.testing.assert_array_equal(one, same)


def test_from_keras_a_file_of_weights_with_layers_of_unknown_place_is_refused(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    path = tmp_path / "a.weights.h5"
    path.write_bytes((GOLDEN / "keras_before.weights.h5").read_bytes())
    with pytest.raises(ImportRefused, match="reset_after: got True, but gru has the biases of False"):
        from_keras(path, reset_after=True)
    with pytest.raises(ValueError, match="reset_after: got 'no', need True or False"):
        from_keras(path, reset_after="no")
    with pytest.raises(ValueError, match="reset_after: got False, but the model says itself"):
        from_keras(GOLDEN / "keras_after.keras", reset_after=False)
    with h5py.File(path, "a") as file:
        file.create_group("layers/layer_normalization/vars")
    with pytest.raises(ImportRefused, match="has layers layer_normalization, but not their place"):
        from_keras(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (setting("activation", "relu"), "first: has activation 'relu', need 'tanh'"),
        (setting("recurrent_activation", "hard_sigmoid"), "first: has recurrent_activation 'hard_sigmoid'"),
        (setting("go_backwards", True), "first: has go_backwards True"),
        (lambda layers: layers[1].update(class_name="Bidirectional"), "first: reads a sequence from its end too"),
        (lambda layers: layers[1].update(class_name="SimpleRNN"), "first: a layer SimpleRNN"),
        (
            lambda layers: layers.insert(1, {"class_name": "Masking", "config": {"name": "mask"}}),
            "mask: makes Keras skip",
        ),
        (lambda layers: layers[1:3].clear() or layers.__delitem__(slice(1, 3)), "has no GRU or LSTM layer among"),
        (lambda layers: layers[3]["config"].update(activation="softmax"), "top: has the activation 'softmax'"),
        (lambda layers: layers.insert(2, other("LayerNormalization", "norm")), "reads norm (LayerNormalization), need"),
        (lambda layers: layers.insert(3, other("Flatten", "flat")), "top: reads flat (Flatten), need second below"),
        (lambda layers: layers.insert(1, other("Dense", "below")), "top: has no weights in the file"),
        (
            lambda layers: layers.insert(3, other("Sequential", "part", layers=[other("GRU", "third")])),
            "part: a model within the model",
        ),
        (wired(["input", "input", "first"]), "second: reads input (InputLayer), need first below it"),
        (wired(["input", ["input", "first"], "second"]), "second: reads first too, as its initial state"),
        (wired(["input", "first", "first"]), "top: reads first (GRU), need second below it"),
    ],
)
def test_from_keras_what_cannot_be_imported_is_refused_by_name(tmp_path, change, words):
    pytest.importorskip("h5py", reason="needs h5py")
    with pytest.raises(ImportRefused) as refused:
        from_keras(edited(tmp_path / "a.keras", change), readout="top")
    assert words in str(refused.value)


def test_from_keras_other_sources_are_refused(tmp_path):
    pytest.importorskip("h5py", reason="needs h5py")
    (tmp_path / "a.keras").write_bytes(b"no archive")
    (tmp_path / "a.h5").write_bytes(b"no weights")
    for source, words in (
        (3, "source: got int"),
        (tmp_path / "a.keras", "no file of Keras 3"),
        (tmp_path / "a.h5", "h5py"),
    ):
        with pytest.raises(ImportRefused, match=words):
            from_keras(source)
    with pytest.raises(ImportRefused, match="readout: got 'out', need one of the Dense layers, top"):
        from_keras(GOLDEN / "keras_after.keras", readout="out")
    with pytest.raises(FileNotFoundError):
        from_keras(tmp_path / "none.keras")


# --- JAX ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("linen", lambda: from_flax(group("linen"))),
        ("linen", lambda: from_flax({"params": group("linen")})),
        ("nnx", lambda: from_flax(group("nnx"))),
        ("equinox", lambda: from_equinox(SimpleNamespace(**group("equinox")))),
        ("haiku", lambda: from_haiku(group("haiku"))),
        ("haiku", lambda: from_haiku({"gru": group("haiku")})),
    ],
)
def test_from_jax_a_cell_has_the_outputs_of_its_library(name, made):
    layer = made()
    assert layer.cell == Cell("gru", "before" if name == "haiku" else "after")
    check(Network((layer,)), RECORDED["inputs"], RECORDED[name])


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (lambda: from_flax({"ir": {}}), ImportRefused, "iz is missing"),
        (lambda: from_flax({"hf": {}, "if": {}}), ImportRefused, "got an LSTM"),
        (lambda: from_flax(3), TypeError, "params: got 3"),
        (lambda: from_flax({"dense_i": {}, "dense_h": {}}), ImportRefused, "has no kernel"),
        (lambda: from_haiku({"w_i": np.ones((2, 3))}), ImportRefused, "w_h is missing"),
        (lambda: from_equinox(3), ImportRefused, "cell: got int"),
        (
            lambda: from_equinox(SimpleNamespace(weight_ih=1, weight_hh=1, bias=1)),
            ImportRefused,
            "an LSTM has no bias_n",
        ),
    ],
)
def test_from_jax_what_cannot_be_imported_is_refused_by_name(made, error, words):
    with pytest.raises(error, match=words):
        made()


# --- ONNX ---------------------------------------------------------------------------------------------------


def onnx_model(kind="GRU", inputs=3, units=4, bias=True, extra=(), absent=(), nodes=1, **attributes):
    """An ONNX model of GRU or LSTM nodes, one after the other, and its arrays by name."""
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    gates, helper = {"GRU": 3, "LSTM": 4}[kind], onnx.helper
    arrays, made, below, width = {}, [], "X", inputs
    for k in range(nodes):
        arrays[f"W{k}"] = RNG.standard_normal((1, gates * units, width)) / 2
        arrays[f"R{k}"] = RNG.standard_normal((1, gates * units, units)) / 4
        if bias:
            arrays[f"B{k}"] = RNG.standard_normal((1, 2 * gates * units)) / 2
        names = [below, f"W{k}", f"R{k}", f"B{k}" if bias else "", "", *(each for each in extra)]
        made.append(
            helper.make_node(
                kind, names, [f"Y{k}", f"Yh{k}"], name=f"{kind.lower()}{k}", hidden_size=units, **attributes
            )
        )
        made.append(helper.make_node("Squeeze", [f"Y{k}", "axis"], [f"H{k}"]))
        below, width = f"H{k}", units
    arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
    arrays |= {name: np.ones((1, 2, units), np.float32) for name in extra if name}
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items() if name not in absent]
    constants.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    real = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info("X", real, [None, None, inputs])]
        + [helper.make_tensor_value_info(name, real, None) for name in absent],
        [helper.make_tensor_value_info(below, real, None)],
        constants,
    )
    return helper.make_model(graph)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GRU", {"linear_before_reset": 1}),
        ("GRU", {"linear_before_reset": 0}),
        ("GRU", {}),
        ("GRU", {"linear_before_reset": 1, "bias": False, "inputs": 1, "units": 1}),
        ("LSTM", {}),
        ("LSTM", {"bias": False, "inputs": 5, "units": 3}),
    ],
)
@pytest.mark.parametrize("nodes", [1, 2])
def test_from_onnx_nodes_have_the_outputs_of_onnx(tmp_path, kind, options, nodes):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    from onnx.reference import ReferenceEvaluator

    model = onnx_model(kind, nodes=nodes, **options)
    x = RNG.standard_normal((6, 2, options.get("inputs", 3))).astype(np.float32)
    expected = ReferenceEvaluator(model).run(None, {"X": x})[0].reshape(6, 2, -1)
    onnx.save(model, tmp_path / "a.onnx")
    for source in (model, tmp_path / "a.onnx"):
        network = from_onnx(source)
        if kind == "GRU":
            assert network.layers[0].cell.variant == ("after" if options.get("linear_before_reset") else "before")
        check(network, np.moveaxis(x, 0, 1), np.moveaxis(expected, 0, 1))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"direction": "reverse"}, "gru0: has the direction 'reverse'"),
        ({"direction": "bidirectional"}, "gru0: has the direction 'bidirectional'"),
        ({"layout": 1}, "gru0: has layout=1"),
        ({"clip": 3.0}, "gru0: clips what goes into its gates at 3"),
        ({"activations": ["HardSigmoid", "Tanh"]}, "gru0: has the activations HardSigmoid, Tanh"),
        ({"absent": ("W0",)}, "gru0: its input weights (W) are computed by the graph"),
        ({"extra": ("start",)}, "gru0: starts from a state that is not zero"),
        ({"kind": "LSTM", "input_forget": 1}, "lstm0: couples its input and forget gates"),
        ({"kind": "LSTM", "extra": ("", "", "P")}, "lstm0: has peepholes"),
    ],
)
def test_from_onnx_what_cannot_be_imported_is_refused_by_name(options, words):
    with pytest.raises(ImportRefused) as refused:
        from_onnx(onnx_model(**options))
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda nodes, make: nodes[2].input.__setitem__(0, "X"), "gru1: reads an input of the model, need"),
        (lambda nodes, make: nodes[2].input.__setitem__(0, "Yh0"), "gru1: reads the output Yh0 of GRU"),
        (lambda nodes, make: nodes[2].input.extend(["Yh0"]), "gru1: starts from a state that GRU computes"),
        (lambda nodes, make: nodes[1].CopyFrom(make("Relu", ["Y0"], ["H0"])), "the output H0 of Relu, need"),
    ],
)
def test_from_onnx_nodes_that_are_no_stack_are_refused(change, words):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    model = onnx_model(nodes=2, inputs=4)
    change(model.graph.node, onnx.helper.make_node)
    with pytest.raises(ImportRefused) as refused:
        from_onnx(model)
    assert words in str(refused.value)


def test_from_onnx_other_sources_are_refused(tmp_path):
    onnx = pytest.importorskip("onnx", reason="needs onnx")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    for source, words in ((3, "source: got int"), (tmp_path / "a.onnx", "onnx cannot read it"), (empty, "has no GRU")):
        with pytest.raises(ImportRefused, match=words):
            from_onnx(source)
    with pytest.raises(FileNotFoundError):
        from_onnx(tmp_path / "none.onnx")


# --- event networks of them, and the command ------------------------------------------------------------------


@pytest.mark.parametrize(("variant", "event"), [("after", "evnn"), ("before", "paper")])
def test_as_egru_keeps_the_weights_and_the_place_of_the_reset_gate(variant, event):
    network = Network.random([4, 3], inputs=2, cell=Cell("gru", variant), rng=RNG, readout=2)
    made = as_egru(network, threshold=0.25)
    assert {layer.cell for layer in made.layers} == {Cell("egru", event)}
    assert {float(value) for layer in made.layers for value in layer.threshold} == {0.25}
    assert made.readout is network.readout
    for one, other in zip(made.layers, network.layers, strict=True):
        assert one.w_in is other.w_in and one.w_rec is other.w_rec and one.bias_in is other.bias_in
    run = simulate(made, RNG.standard_normal((9, 1, 2)).astype(np.float32), backend="reference", record="events")
    assert all((events.values > 0.25).all() for events in run.events)


def test_as_egru_other_cells_and_thresholds_are_refused():
    gru = Network.random([3], inputs=2, cell=Cell("gru"), rng=RNG)
    for network, threshold, words in ((gru, -0.1, "threshold: got -0.1"), (gru, None, "threshold: got None")):
        with pytest.raises(ValueError, match=words):
            as_egru(network, threshold=threshold)
    with pytest.raises(ValueError, match="layer 0 has the cell 'lstm'"):
        as_egru(Network.random([3], inputs=2, cell=Cell("lstm"), rng=RNG), threshold=0.1)


def test_import_writes_a_model_file_of_a_file_of_another_library(tmp_path):
    pytest.importorskip("h5py", reason="needs h5py")
    out = str(tmp_path / "a.safetensors")
    asked = ["import", str(GOLDEN / "keras_after.keras"), "--readout", "top", "--as-egru", "0.1", "--out", out]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    network = er_io.load(out)
    assert network.layers[0].cell.name == "egru" and network.readout is not None
    for wrong, words in (
        (["--module", "rnn"], "module: got 'rnn'"),
        (["--from", "tensorflow"], "from: got 'tensorflow'"),
        (["--as-egru", "-1"], "as-egru: got -1"),
    ):
        failed = CliRunner().invoke(app, ["import", *asked[1:2], "--out", str(tmp_path / "b.safetensors"), *wrong])
        assert failed.exit_code and words in str(failed.exception)
