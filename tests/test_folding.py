"""Folding: a folded network has the bits of the network before, reads one row per symbol, and is counted exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eventrnn import audit, count, fold, load, reference, save
from eventrnn.backend import BackendUnavailable
from eventrnn.cells import Cell
from eventrnn.counting import count_per_step
from eventrnn.cpu.engine import CpuEngine
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.events import Events
from eventrnn.io import ModelFileError, model_file
from eventrnn.io.exported import ExportRefused
from eventrnn.io.to_onnx import to_onnx
from eventrnn.io.vocabulary import with_vocabulary
from eventrnn.network import Network
from eventrnn.pruning import Blocks, prune, with_masks
from eventrnn.simulation import RECORDABLE, Simulator, simulate
from eventrnn.testing import ALL_CELLS, assert_equivalent
from eventrnn.training import Model, Settings, Trainer
from eventrnn.weights import CSR, STORAGES, Dense, GatedBlocks, convert
from support import emulated_gpu
from support.conformance import Case, assert_same, assert_same_state, cases, same_bits, unmodified
from support.model_files import crafted
from support.texts import reader_of_text


def said(cell: Cell) -> str:
    return f"{cell.name}-{cell.variant}"


def word_network(units=40, cell=None, **options):
    """A network of 23 symbols in which units fire; 3 x 40 gate rows are no whole number of vectors."""
    cell = cell or Cell()
    rng = np.random.default_rng(0)
    threshold = 0.05 if cell.thresholded else 0.0
    network = Network.random(
        [units, 9], rng=rng, symbols=23, embedding=7, readout=23, threshold=threshold, cell=cell, **options
    )
    biases = rng.normal(size=(2, network.layers[0].w_in.shape[1])).astype(np.float32)
    first = replace(network.layers[0], bias_in=biases[0], bias_rec=biases[1])
    return replace(network, layers=(first, *network.layers[1:]), embedding=network.embedding * np.float32(15))


TEXT = np.random.default_rng(1).integers(0, 23, (30, 4))


# --- the same bits ------------------------------------------------------------------------------------------


@given(case=cases(cells=ALL_CELLS, embedding=True), threads=st.integers(1, 3), data=st.data())
@settings(max_examples=25)
def test_folded_network_has_the_bits_of_the_network_before(case, threads, data):
    backend = data.draw(st.sampled_from(("cpu", "reference", "auto")))
    with unmodified(case):
        folded = Case(fold(case.network), case.inputs, case.state)
        theirs = folded.simulator(backend, threads=1 if backend == "reference" else threads)
        assert_equivalent(case.simulator("cpu"), theirs, case.inputs)
    own, other = folded.simulator("cpu").run(case.inputs), folded.simulator("reference").run(case.inputs)
    assert np.array_equal(own.input_fired.binary, np.bincount(case.inputs.ravel(), minlength=folded.network.symbols))
    assert np.array_equal(own.input_fired.binary, other.input_fired.binary) and not own.input_fired.graded.any()


@given(case=cases(cells=ALL_CELLS, embedding=True), threads=st.integers(1, 2), cut=st.integers(0, 8))
@settings(max_examples=10)
def test_folded_network_in_chunks_and_single_steps_has_the_bits_of_one_run(case, threads, cut):
    whole = case.simulator("cpu").run(case.inputs)
    folded = Case(fold(case.network), case.inputs, case.state)
    chunked, stepped = (folded.simulator("cpu", threads=threads) for _ in range(2))
    parts = [chunked.run(each).output for each in (case.inputs[:cut], case.inputs[cut:])]
    assert np.array_equal(np.concatenate(parts), whole.output)
    for step, output in zip(case.inputs, whole.output, strict=True):
        assert np.array_equal(stepped.step(step), output)
    for simulator in (chunked, stepped):
        assert_same_state(simulator.state, whole.state)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("units", [1, 40, 200])
def test_folded_rows_that_are_no_whole_vectors_have_the_bits_of_the_specification(units, threads):
    network = word_network(units)
    expected = simulate(network, TEXT, record=RECORDABLE)
    folded = simulate(fold(network), TEXT, threads=threads, record=RECORDABLE)
    assert folded.paths["layers.0.w_in"] == "look-up"
    for found, wanted in zip((*folded.states, folded.output), (*expected.states, expected.output), strict=True):
        assert same_bits(found, wanted)


def test_table_is_the_drive_of_the_specification_and_its_zeros_are_positive():
    network = word_network()
    bias = network.layers[0].bias_in.copy()
    bias[:5] = -0.0
    first, embedding = replace(network.layers[0], bias_in=bias), network.embedding.copy()
    embedding[3] = 0
    network = replace(network, layers=(first, *network.layers[1:]), embedding=embedding)
    folded = fold(network)
    table = folded.layers[0].w_in.values
    assert np.array_equal(table, reference.propagate(first.w_in.to_dense(), embedding, bias))
    assert not np.signbit(table[3, :5]).any() and not folded.layers[0].bias_in.any()
    assert_equivalent(Simulator(network, batch=4), Simulator(folded, batch=4), TEXT)


@pytest.mark.parametrize("variant", ["evnn", "paper"])
def test_gated_blocks_of_the_first_layer_are_folded_with_the_choice_of_each_symbol(variant):
    network = word_network(cell=Cell("egru", variant=variant))
    blocks = GatedBlocks.from_weights(network.layers[0].w_in, block=(2, 8), density=0.4, rng=np.random.default_rng(2))
    gated = network.with_matrices({"layers.0.w_in": blocks})
    folded = fold(gated)
    assert isinstance(folded.layers[0].w_in, Dense)
    assert_equivalent(Simulator(gated, batch=4), Simulator(folded, batch=4), TEXT)


@pytest.mark.parametrize("storage", STORAGES[1:])
def test_table_in_a_narrow_storage_has_the_bits_of_the_specification(storage):
    folded = fold(word_network())
    narrow = folded.with_matrices({"layers.0.w_in": folded.layers[0].w_in.stored_as(storage)})
    by_specification = simulate(narrow, TEXT, backend="reference", record=RECORDABLE)
    assert_same(simulate(narrow, TEXT, record=RECORDABLE), by_specification)


def test_table_in_another_format_has_the_bits_of_the_dense_one():
    folded = fold(word_network())
    sparse = folded.with_matrices({"layers.0.w_in": convert(folded.layers[0].w_in, "csr")})
    assert isinstance(sparse.layers[0].w_in, CSR)
    assert_same(simulate(sparse, TEXT, record=RECORDABLE), simulate(folded, TEXT, record=RECORDABLE))


def test_blas_looks_a_symbol_up_and_multiplies_the_rest():
    network = word_network(cell=Cell("gru"))
    folded = fold(network)
    found, wanted = (simulate(each, TEXT, backend="blas") for each in (folded, network))
    # Of the first product only the order of the terms differs, and of a row that is looked up there is one.
    assert found.dense and not found.exact and found.output.shape == wanted.output.shape
    first = folded.layers[0]
    assert count(folded, found).matrices["layers.0.w_in"].executed == TEXT.size * first.w_in.shape[1]


def test_folding_cuts_the_tie_and_folds_once():
    network = Network.random([6, 5], rng=np.random.default_rng(0), symbols=8, embedding=5, tied=True, threshold=0.1)
    folded = fold(network)
    assert folded.embedding is None and folded.one_hot and folded.symbols == network.symbols == 8
    assert not folded.readout.tied and np.array_equal(folded.readout.weights.values, network.embedding.T)
    assert fold(folded) is folded and "one-hot" in repr(folded) and dict(folded.metadata) == dict(network.metadata)


# --- one row per symbol -------------------------------------------------------------------------------------


def test_engine_reads_the_table_where_it_is():
    folded = fold(word_network(200))
    table = folded.layers[0].w_in.values
    for threads in (1, 2):
        engine = CpuEngine(folded, threads)
        for steps, batch in ((1, 1), (64, 64)):
            plan = engine.plan(steps, batch)
            assert plan.kernel_by_matrix["layers.0.w_in"] == "look-up"
            others = sum(w.nbytes for name, w in folded.matrices().items() if name != "layers.0.w_in")
            assert plan.pools.values.nbytes < 2 * others and table.nbytes > 0.05 * others


def test_table_is_read_only_while_a_simulator_reads_it():
    folded = fold(word_network())
    simulator = Simulator(folded)
    with pytest.raises(ValueError, match="read-only"):
        folded.layers[0].w_in.values[0, 0] = 1
    del simulator
    folded.layers[0].w_in.values[TEXT[0]] += 1
    changed = simulate(folded, TEXT, record=RECORDABLE)
    assert_same(changed, simulate(folded, TEXT, backend="reference", record=RECORDABLE))


# --- on a GPU -----------------------------------------------------------------------------------------------


def emulated_case(cell):
    """A folded network for the emulated GPU, which is slow, and symbols."""
    rng = np.random.default_rng(3)
    options = {"threshold": 0.05} if cell.thresholded else {}
    network = Network.random([6, 4], rng=rng, symbols=9, embedding=5, readout=9, cell=cell, **options)
    return fold(replace(network, embedding=network.embedding * np.float32(15))), rng.integers(0, 9, (4, 2))


@pytest.fixture
def emulated(monkeypatch):
    """A fake GPU on which the kernels of layers and of look-ups run as they are, in plain Python."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    from eventrnn.cuda import look_up

    monkeypatch.setattr(look_up, "THREADS", 8)
    # Fewer blocks than rows, so that a thread has several.
    monkeypatch.setattr(look_up, "MOST_ROW_BLOCKS", 3)
    return emulated_gpu.install(monkeypatch)


@pytest.mark.parametrize("cell", [Cell(), Cell("lstm")], ids=said)
def test_emulated_gpu_looks_symbols_up_with_the_bits_of_the_specification(emulated, cell):
    folded, text = emulated_case(cell)
    expected = simulate(folded, text, backend="reference", record=RECORDABLE)
    got = simulate(folded, text, backend="cuda", record=RECORDABLE)
    assert "look_up" in emulated.launched and got.paths["layers.0.w_in"] == "look-up float32 in L2"
    assert_same(expected, got)
    simulator = Simulator(folded, batch=2, backend="cuda")
    for step, output in zip(text, expected.output, strict=True):
        assert np.array_equal(simulator.step(step), output)
    with pytest.raises(ValueError, match="got symbol 9"):
        simulator.step(np.array([0, 9]))


def test_table_does_not_go_through_tensor_cores(emulated):
    from eventrnn.cuda.device_network import DeviceNetwork

    packed = DeviceNetwork(fold(word_network()), emulated, "bfloat16")
    assert packed.exact_because[0] == "its symbols are looked up" and packed.exact_because[1] is None


@pytest.mark.gpu
@pytest.mark.parametrize("cell", ALL_CELLS, ids=said)
def test_gpu_has_the_bits_of_the_cpu(cell):
    folded = fold(word_network(200, cell))
    assert_same(simulate(folded, TEXT, record=RECORDABLE), simulate(folded, TEXT, backend="cuda", record=RECORDABLE))
    simulators = [Simulator(folded, batch=4, backend=backend) for backend in ("cpu", "cuda")]
    for step in TEXT:
        assert np.array_equal(*(simulator.step(step) for simulator in simulators))


# --- counts -------------------------------------------------------------------------------------------------


def test_counts_of_a_folded_network_are_one_row_per_symbol():
    network = word_network()
    folded = fold(network)
    # A zero of the table is stored, and is no effective weight.
    folded.layers[0].w_in.values[:, 7] = 0
    run = simulate(folded, TEXT, record="events")
    counts = count(folded, run)
    found, rows = counts.matrices["layers.0.w_in"], folded.layers[0].w_in.shape[1]
    assert (found.dense, found.executed, found.effective) == (
        TEXT.size * rows,
        TEXT.size * rows,
        TEXT.size * (rows - 1),
    )
    assert (found.binary, found.graded, found.weight_bytes) == (found.effective, 0, 4 * found.executed)
    assert audit(folded, run, counts).agrees
    per_step = count_per_step(folded, run)["layers.0.w_in"]
    for quantity, values in per_step.items():
        assert values.shape == TEXT.shape and values.sum() == getattr(found, quantity), quantity


def test_counts_of_a_short_run_and_of_all_symbols_add_up():
    folded = fold(word_network())
    # The first run reads few rows of the table, and the second one all.
    few, every = np.full((3, 1), 5), np.arange(23)[:, None]
    for text in (few, every):
        run = simulate(folded, text, record="events")
        assert audit(folded, run).agrees
    first, second = (count(folded, simulate(folded, text)).matrices["layers.0.w_in"] for text in (few, every))
    assert first.dense == 3 * 120 and second.dense == 23 * 120 and second.effective == folded.layers[0].w_in.nnz


# --- files --------------------------------------------------------------------------------------------------


def test_folded_network_is_saved_and_loaded(tmp_path):
    folded, path = fold(word_network()), tmp_path / "folded.safetensors"
    save(folded, path)
    again = load(path)
    assert again.one_hot and same_bits(again.layers[0].w_in.values, folded.layers[0].w_in.values)
    assert_same(simulate(again, TEXT, record=RECORDABLE), simulate(folded, TEXT, record=RECORDABLE))
    crafted(path, lambda tensors, description: None, version=5, network=folded)
    with pytest.raises(ModelFileError, match="format version 5, but it holds a one-hot input, which version 6 added"):
        load(path)
    crafted(path, lambda tensors, description: description.update(one_hot=1), network=folded)
    with pytest.raises(ModelFileError, match="one_hot: got 1, need true or false"):
        load(path)


def test_network_that_is_not_folded_is_written_as_before(tmp_path):
    network = word_network()
    _, description = model_file._to_tensors(network)
    assert "one_hot" not in description
    save(network, tmp_path / "m.safetensors")
    assert not load(tmp_path / "m.safetensors").one_hot


# --- refusals -----------------------------------------------------------------------------------------------


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(TypeError, match="network: got 'network'"):
        fold("network")
    with pytest.raises(ValueError, match="fold: the network has no embedding"):
        fold(Network.random([4], inputs=3, rng=np.random.default_rng(0)))
    network = word_network()
    huge = network.embedding.copy()
    huge[4] = 3e38
    large = network.with_matrices({"layers.0.w_in": Dense(10 * network.layers[0].w_in.values)})
    with pytest.raises(FloatingPointError, match="the input drive of symbol 4 is not finite"):
        fold(replace(large, embedding=huge))
    with pytest.raises(ValueError, match="one_hot: the input is a symbol, and the embedding reads it too"):
        replace(network, one_hot=True)


def test_folded_network_is_for_inference():
    folded = fold(word_network())
    with pytest.raises(ValueError, match="train the network with its embedding, and fold it afterwards"):
        Model(folded)
    with pytest.raises(ValueError, match="train the network with its embedding, and fold it afterwards"):
        Trainer(folded, np.tile(np.arange(23), 100), Settings(steps=1))
    with pytest.raises(ValueError, match=r"prune the network before it is folded, or .*exempt=\('layers.0.w_in',\)"):
        prune(folded, 0.5)
    pruned = prune(folded, 0.5, exempt=("layers.0.w_in",))
    assert pruned.one_hot and pruned.layers[0].w_in is folded.layers[0].w_in
    with pytest.raises(ValueError, match="prune the network before it is folded$"):
        with_masks(folded, {"layers.0.w_in": np.ones(folded.layers[0].w_in.shape, bool)}, Blocks(0.5))
    with pytest.raises(ExportRefused, match="export the network before it is folded"):
        to_onnx(folded)


@pytest.mark.torch
def test_module_of_torch_refuses_a_folded_network():
    pytest.importorskip("torch", reason="the module of PyTorch")
    from eventrnn.torch import EGRU

    network = Network.random([6, 6], rng=np.random.default_rng(0), symbols=5, embedding=4, threshold=0.1)
    with pytest.raises(ValueError, match="give the network before it is folded"):
        EGRU.from_network(fold(network))


def test_vocabulary_of_a_folded_network_is_that_of_its_symbols():
    folded = fold(word_network())
    named = with_vocabulary(folded, Vocabulary(tuple(f"word{k}" for k in range(23)), kind="word"))
    assert named.one_hot and named.embedding is None and "vocabulary" in named.metadata


@pytest.mark.parametrize(
    ("given_inputs", "words"),
    [
        (np.zeros((3, 1, 23), np.float32), r"need whole numbers \(steps, batch\), the symbols"),
        (Events.from_dense(np.zeros((3, 1, 23))), "got Events, but the network reads symbols"),
        (np.array([[0], [23]]), r"got symbol 23 at \(1, 0\); need 0..22"),
        (np.array([[-1]]), r"got symbol -1 at \(0, 0\); need 0..22"),
    ],
)
def test_inputs_that_are_no_symbols_are_refused(given_inputs, words):
    with pytest.raises((ValueError, TypeError), match=words):
        simulate(fold(word_network()), given_inputs)
    with pytest.raises(ValueError, match="got symbol 23"):
        Simulator(fold(word_network())).step(np.array([23]))


# --- commands -----------------------------------------------------------------------------------------------


def test_commands_fold(cli, tmp_path, text):
    import json

    model, large = tmp_path / "m.safetensors", tmp_path / "folded.safetensors"
    save(reader_of_text(), model)
    network = load(model)
    code, out, _ = cli("convert", model, "--fold", "--out", large)
    assert code == 0 and load(large).one_hot
    assert "folded into layers.0.w_in" in json.loads(cli("info", large, "--json")[1])["embedding"]
    found = {}
    for name, arguments in (("factors", (model,)), ("folded", (model, "--fold")), ("file", (large, "--fold"))):
        code, out, err = cli("run", *arguments, "--text", text, "--json")
        assert code == 0, err
        found[name] = json.loads(out)
    rows = network.layers[0].w_in.shape[1]
    assert found["folded"] == found["file"]
    assert found["folded"]["bits_per_symbol"] == found["factors"]["bits_per_symbol"]
    assert found["folded"]["executed_ops_by_matrix"]["layers.0.w_in"] == rows
    code, out, err = cli("count", model, "--fold", "--text", text, "--symbols", 50, "--json")
    assert code == 0, err
    counted = json.loads(out)
    assert counted["audit_agrees"] and counted["matrices"]["layers.0.w_in"]["dense"] == 50 * rows
    code, _, err = cli("convert", model, "--fold", "--embedding", "int8", "--out", tmp_path / "x")
    assert code and "embedding: got int8 with --fold" in err
    code, _, err = cli("demo", "--fold", "--out", tmp_path / "demo")
    assert code and "fold: a model that is trained here is not folded" in err
