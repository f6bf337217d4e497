"""The command line: every command runs, --json prints one object, bad input gives one line and exit code 2."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from eventrnn import Cell, Dense, Network, __version__, load, save
from eventrnn.bench import timing
from eventrnn.cli.imports import _arrays
from eventrnn.cli.options import PARTS
from eventrnn.cli.plot import WHAT
from eventrnn.cli.terminal import progress
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.pruning import prune
from support.texts import TEXT, reader_of_text


@pytest.fixture
def model(tmp_path):
    network = reader_of_text()
    path = tmp_path / "model.safetensors"
    save(network, path)
    return path


def _json(result):
    code, out, err = result
    assert code == 0, err
    assert len(out.splitlines()) == 1
    return json.loads(out)


def test_train_prune_run_count_info_convert(cli, tmp_path, text):
    trained, pruned, dense = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    sizes = ("--hidden", 32, "--embedding", 8, "--batch", 4, "--window", 16, "--steps", 60)
    first = _json(cli("train", "--out", trained, "--text", text, *sizes, "--json"))
    assert first["bits_per_symbol_valid"] < np.log2(first["symbols"]) and first["steps"] == 60
    result = _json(cli("prune", trained, "--out", pruned, "--sparsity", 0.75, "--block", "2x8", "--json"))
    assert result["weights_after"] < 0.3 * result["weights_before"]
    tuning = ("--steps", 4, "--batch", 4, "--window", 16)
    tuned = _json(
        cli(
            "prune",
            trained,
            "--out",
            dense,
            "--text",
            text,
            "--sparsity",
            0.75,
            "--block",
            "2x8",
            *tuning,
            "--json",
        )
    )
    assert tuned["weights_after"] < 0.3 * tuned["weights_before"] and tuned["bits_after"] > 0
    read = [_json(cli("run", pruned, "--text", text, "--backend", b, "--json")) for b in ("cpu", "reference")]
    assert read[0]["bits_per_symbol"] == read[1]["bits_per_symbol"] and read[0]["reduction"] > 1
    assert (
        _json(cli("run", pruned, "--text", text, "--threads", 2, "--json"))["bits_per_symbol"]
        == read[0]["bits_per_symbol"]
    )
    parts = {p: _json(cli("run", pruned, "--text", text, "--part", p, "--json"))["symbols"] for p in PARTS}
    assert parts["all"] == parts["train"] + parts["valid"] + parts["test"] and min(parts.values()) > 0
    counted = _json(cli("count", pruned, "--text", text, "--json"))
    assert counted["audit_agrees"] and counted["total"]["executed"] >= counted["total"]["effective"] > 0
    assert "block 32x96" in _json(cli("info", pruned, "--json"))["layers.0.w_rec"]
    assert _json(cli("convert", pruned, "--out", dense, "--to", "csr", "--force", "--json"))["format"] == "csr"
    assert np.array_equal(load(dense).layers[0].w_rec.to_dense(), load(pruned).layers[0].w_rec.to_dense())


def _prune_2_of_4(path, out):
    """The model with only the two largest of each four weights along the outputs."""
    network = load(path)
    matrices = {}
    for name, weights in network.matrices().items():
        dense = weights.to_dense()
        groups = dense.reshape(len(dense), -1, 4) if dense.shape[1] % 4 == 0 else dense[:, :, None]
        rank = np.abs(groups).argsort(axis=2).argsort(axis=2)
        matrices[name] = Dense(np.where(rank >= groups.shape[2] - 2, groups, 0).reshape(dense.shape))
    save(network.with_matrices({k: w for k, w in matrices.items() if k != "readout"}), out)


def test_convert_to_groups_and_narrow_storage(cli, tmp_path, model, text):
    pruned, narrow = tmp_path / "pruned.safetensors", tmp_path / "narrow.safetensors"
    network = load(model)
    save(replace(network, readout=None), pruned)
    _prune_2_of_4(pruned, pruned.with_name("groups.safetensors"))
    groups = pruned.with_name("groups.safetensors")
    result = _json(cli("convert", groups, "--out", narrow, "--to", "nm", "--nm", "2:4", "--storage", "int8", "--json"))
    assert (result["format"], result["storage"]) == ("nm", "int8")
    matrix = load(narrow).layers[0].w_rec
    assert (matrix.name, matrix.n, matrix.m, matrix.axis, matrix.storage) == ("nm", 2, 4, "post", "int8")
    assert "nm 24x72, int8" in _json(cli("info", narrow, "--json"))["layers.0.w_rec"]
    # Without --storage, the storage and its scales stay.
    back = tmp_path / "back.safetensors"
    assert _json(cli("convert", narrow, "--out", back, "--to", "csr", "--json"))["storage"] == "int8"
    assert np.array_equal(load(back).layers[0].w_rec.to_dense(), matrix.to_dense())
    result = _json(cli("convert", narrow, "--out", back, "--to", "nm", "--nm", "32:32:pre", "--force", "--json"))
    assert load(back).layers[0].w_in.axis == "pre"


def test_convert_makes_a_tied_readout_dense(cli, tmp_path):
    pruned, dense = tmp_path / "pruned.safetensors", tmp_path / "dense.safetensors"
    network = Network.random([5], symbols=6, embedding=5, tied=True, rng=np.random.default_rng(0))
    save(prune(network, 0.5, names=("embedding", "layers.0.w_rec")), pruned)
    assert load(pruned).readout.weights.name == "csr"
    assert _json(cli("convert", pruned, "--to", "dense", "--out", dense, "--json"))["format"] == "dense"
    made = load(dense)
    assert made.readout.tied and made.readout.weights.name == "dense"
    assert made.readout.weights.to_dense().tobytes() == made.embedding.T.tobytes()
    # Narrow weights would differ from the embedding.
    cli("convert", pruned, "--to", "dense", "--storage", "int8", "--out", dense, "--force")
    assert load(dense).readout.weights.name == "csr"


def test_convert_to_codes_of_fewer_bits(cli, tmp_path):
    tied, narrow = tmp_path / "tied.safetensors", tmp_path / "narrow.safetensors"
    network = Network.random([5], symbols=6, embedding=5, tied=True, rng=np.random.default_rng(0))
    save(network, tied)
    narrowed = ("--storage", "int8", "--embedding", "int8", "--exempt", "layers.0.w_in")
    bits = ("--bits", "layers.0.w_rec=3", "--bits", "6", "--bits", "embedding=5")
    _json(cli("convert", tied, "--untie", "--out", narrow, *narrowed, *bits, "--json"))
    made = load(narrow)
    largest = {name: int(np.abs(w.values).max()) for name, w in made.matrices().items() if w.storage == "int8"}
    assert largest == {"layers.0.w_rec": 3, "readout": 31}
    assert made.matrices()["layers.0.w_in"].storage == "float32"
    assert made.embedding.tobytes() == network.untied().with_rounded_embedding("int8", bits=5).embedding.tobytes()


def test_weights_of_another_format_are_rounded_once(cli, tmp_path, model):
    as_dense, as_csr = tmp_path / "dense.safetensors", tmp_path / "csr.safetensors"
    for out, form in ((as_dense, ()), (as_csr, ("--to", "csr"))):
        _json(cli("convert", model, "--out", out, *form, "--storage", "int8", "--bits", "6", "--json"))
    dense, csr = load(as_dense).matrices(), load(as_csr).matrices()
    assert all(np.array_equal(w.to_dense(), csr[name].to_dense()) for name, w in dense.items())
    assert {w.name for w in csr.values()} == {"csr"}


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_run_reports_the_effect_of_narrow_storage(cli, tmp_path, model, text, storage):
    plain = _json(cli("run", model, "--text", text, "--json"))
    told = _json(cli("run", model, "--text", text, "--storage", storage, "--json"))
    assert told["storage"] == storage
    assert told["bits_per_symbol_float32"] == plain["bits_per_symbol"]
    assert told["bits_per_symbol_added"] == told["bits_per_symbol"] - plain["bits_per_symbol"] != 0
    matrices = load(model).matrices().values()
    assert told["weight_bytes_float32"] == sum(4 * w.stored for w in matrices)
    expected = {
        "bfloat16": sum(2 * w.stored for w in matrices),
        "int8": sum(w.stored + 4 * w.shape[0] for w in matrices),
    }
    assert told["weight_bytes"] == expected[storage]
    # The figures equal those of the converted model, and narrow weights are not rounded again.
    narrow = tmp_path / "narrow.safetensors"
    cli("convert", model, "--out", narrow, "--storage", storage)
    assert _json(cli("run", narrow, "--text", text, "--json"))["bits_per_symbol"] == told["bits_per_symbol"]
    code, out, err = cli("run", narrow, "--text", text, "--storage", "int8")
    assert code == 2 and not out and f"stored as {storage} already" in err


def test_tables_are_printed_without_json(cli, model, text):
    for arguments in (("run", model, "--text", text), ("count", model, "--text", text), ("info", model), ("info",)):
        code, out, _ = cli(*arguments)
        assert code == 0 and len(out.splitlines()) > 3 and not out.startswith("{")
    assert "layers.0.w_rec" in cli("info", model)[1], "the names that --exempt takes"


@pytest.mark.parametrize(
    ("cell", "pruned", "expected"),
    [
        ("egru", True, "Activity-sparse, pruned, event by event"),
        ("egru", False, "Activity-sparse, event by event"),
        ("lstm", True, "Pruned, event by event"),
        ("gru", False, "Event by event"),
    ],
)
def test_title_of_a_demo_says_what_the_model_is(cell, pruned, expected):
    from eventrnn.cli.demo import title

    network = Network.random([4], inputs=3, rng=np.random.default_rng(0), cell=Cell(cell))
    assert title(prune(network, 0.5) if pruned else network) == expected


def test_demo_small_model_runs(cli, tmp_path):
    folder = tmp_path / "demo"
    sizes = ("--hidden", 32, "--steps", 6, "--pruning-steps", 6, "--block", "1x8")
    result = _json(cli("demo", "--out", folder, *sizes, "--json"))
    keys = """bits_per_char bits_per_char_before_pruning bits_per_char_trigrams activity sparsity block
    dense_ops_per_step effective_ops_per_step executed_ops_per_step reduction events_compared events_identical
    us_per_step dense_us_per_step seconds"""
    assert set(keys.split()) <= set(result)
    assert result["events_identical"] is True and result["events_compared"] > 100_000 and result["sparsity"] > 0.79
    counts = json.loads((folder / "counts.json").read_text())
    assert counts["total"]["dense"] // counts["steps"] == result["dense_ops_per_step"]
    assert load(folder / "model.safetensors").metadata["vocabulary"]
    code, out, err = cli("demo", "--out", folder, *sizes)
    assert code == 2 and "--force" in err and not out


@pytest.fixture
def clock(monkeypatch):
    """Replace the timing: every side of a benchmark is called once and reported to take a fixed time."""

    def set_to(**seconds):
        def interleaved(contestants, repeats):
            for run in contestants.values():
                run()
            return {name: [seconds.get(name.partition(" ")[0], seconds["against"])] * repeats for name in contestants}

        monkeypatch.setattr(timing, "interleaved", interleaved)

    return set_to


BENCH = ("--hidden", 64, "--steps", 64, "--against", "blas", "--activity", 0.2, "--sparsity", 0.5, "--block", "1x16")


def test_bench_inference(cli, clock):
    clock(ours=2.0, probe=1.0, against=8.0)
    result = _json(cli("bench", "inference", *BENCH, "--json"))
    keys = """us_per_step against_us_per_step speedup activity sparsity executed_per_step dense_per_step bytes_per_step
    bandwidth_fraction device"""
    assert set(keys.split()) <= set(result)
    assert result["us_per_step"] == 31_250 and result["speedup"] == 4
    assert result["dense_per_step"] == 6 * 64 * 64
    assert 0 < result["bandwidth_fraction"] < 1
    assert result["effective_per_step"] <= result["executed_per_step"] < result["dense_per_step"]


def test_bench_of_one_product(cli, clock):
    clock(ours=2.0, probe=1.0, against=8.0)
    product = ("--hidden", 64, "--steps", 8, "--against", "scipy,numpy", "--format", "csr", "--batch", 2)
    result = _json(cli("bench", "inference", *product, "--json"))
    assert result["measures"] == "product" and result["speedup"] == 4 and result["sparsity_asked"] == 0.9
    assert result["dense_per_step"] == 2 * 3 * 64 * 64


def test_bench_rate_above_the_probe_is_an_error(cli, clock):
    clock(ours=1.0, probe=2.0, against=8.0)
    code, out, err = cli("bench", "inference", *BENCH, "--json")
    assert code == 1 and out == "" and "GB/s" in err.splitlines()[-1]


def _model_files(folder, model):
    """Files that are not valid models, with the error message of each."""
    raw = model.read_bytes()
    (folder / "random").write_bytes(b"no model at all, just words")
    (folder / "cut").write_bytes(raw[: len(raw) // 2])
    flipped = bytearray(raw)
    flipped[len(raw) - 100] ^= 4
    (folder / "flipped").write_bytes(bytes(flipped))
    save_file({"a": np.zeros(3, np.float32)}, folder / "foreign")
    return {"missing": "no such file", "random": "", "cut": "", "flipped": "", "foreign": "", ".": ""}


def test_bad_model_files(cli, tmp_path, model, text):
    seen = set()
    for name, words in _model_files(tmp_path, model).items():
        code, out, err = cli("run", tmp_path / name, "--text", text)
        assert code == 2 and not out and err.startswith("eventrnn: error: ") and err.count("\n") == 1, name
        assert words in err
        seen.add(err)
    assert len(seen) == 6, "each fault has a message of its own"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--out", "{new}", "--text", "{empty}"), "empty"),
        (("train", "--out", "{new}", "--text", "{nowhere}"), "nowhere"),
        (("train", "--out", "{model}", "--text", "{text}"), "--force"),
        (("train", "--out", "{nowhere}/x", "--text", "{text}"), "no folder"),
        (("train", "--out", "{new}", "--text", "{text}", "--hidden", "-3"), "hidden: got -3, need a whole number >= 1"),
        (("train", "--out", "{new}", "--text", "{text}", "--batch", "0"), "batch"),
        (("train", "--out", "{new}", "--text", "{text}", "--variant", "lstm"), "variant"),
        (("train", "--out", "{new}", "--text", "{text}", "--window", "5000"), "too few"),
        (("prune", "{model}", "--out", "{new}", "--sparsity", "1.0"), "sparsity"),
        (("prune", "{model}", "--out", "{new}", "--sparsity", "-1"), "sparsity"),
        (("prune", "{model}", "--out", "{new}", "--block", "1x999"), "larger than the matrix"),
        (("prune", "{model}", "--out", "{new}", "--block", "4by4"), "block"),
        (("prune", "{model}", "--out", "{model}"), "--force"),
        (("run", "{model}", "--text", "{greek}"), "(part test of {greek})"),
        (("run", "{model}", "--text", "{text}", "--backend", "tpu"), "backend"),
        (("run", "{model}", "--text", "{text}", "--threads", "0"), "threads"),
        (("run", "{model}", "--text", "{text}", "--part", "dev"), "part"),
        (("plot", "{model}", "poster", "--out", "{new}.png"), "what: got 'poster'"),
        (("plot", "{model}", "weights", "--out", "{new}.gif"), "ends in .png"),
        (("plot", "{model}", "raster", "--out", "{new}.png", "--text", "{text}", "--layer", "7"), "layer: got 7"),
        (("plot", "{model}", "raster", "--out", "{new}.png", "--steps", "0"), "steps: got 0"),
        (("plot", "{model}", "training", "--out", "{new}.png"), "is not the folder of a run"),
        (("convert", "{model}", "--out", "{new}", "--to", "block"), "block"),
        (("convert", "{model}", "--out", "{new}", "--to", "nm"), "nm: got None"),
        (("convert", "{model}", "--out", "{new}", "--to", "dense", "--nm", "2:4"), "nm: got (2, 4, 'post') for format"),
        (("convert", "{model}", "--out", "{new}", "--nm", "2:4"), "has 4 non-zero weights"),
        (("convert", "{model}", "--out", "{new}", "--to", "nm", "--nm", "2:4"), "has 4 non-zero weights"),
        (
            ("convert", "{model}", "--out", "{new}", "--to", "nm", "--nm", "2of4"),
            "nm: got '2of4', need N:M or N:M:AXIS",
        ),
        (("convert", "{model}", "--out", "{new}", "--to", "nm", "--nm", "2:4:both"), "nm axis: got 'both'"),
        (("convert", "{model}", "--out", "{new}", "--storage", "int4"), "storage: got 'int4'"),
        (
            ("convert", "{model}", "--out", "{new}", "--storage", "bfloat16", "--bits", "7"),
            "bits: got 7, but only int8",
        ),
        (("convert", "{model}", "--out", "{new}", "--untie"), "untie: the read-out of {model} is not tied"),
        (("convert", "{model}", "--out", "{new}", "--storage", "int8", "--bits", "9"), "bits: got '9', need a number"),
        (
            ("convert", "{model}", "--out", "{new}", "--storage", "int8", "--bits", "embedding=7"),
            "bits: got 'embedding=7', need a number from 2 to 8, as 7 or MATRIX=7 with one of layers.0.w_in",
        ),
        (
            ("convert", "{model}", "--out", "{new}", "--storage", "int8", "--bits", "6", "--bits", "7"),
            "bits: got '7', but the bits for all are 6 already; give them once",
        ),
        (("run", "{model}", "--text", "{text}", "--storage", "float32"), "need one of bfloat16, int8"),
        (("import", "{text}.npz", "--out", "{new}"), "no file"),
        (("bench", "inference", "--activity", "0"), "activity"),
        (("bench", "inference", "--format", "dense", "--sparsity", "0.5"), "sparsity"),
        (("bench", "inference", "--against", "nobody"), "against"),
        (("bench", "inference", "--backend", "tpu"), "backend"),
        (("bench", "inference", "--against", "torch,scipy"), "one kind at a time"),
        (("bench", "inference", "--dtype", "float8"), "dtype"),
        (("bench", "inference", "--nm", "2of4"), "nm"),
        (("bench", "inference", "--nm", "2:4:up"), "nm"),
        (("bench", "inference", "--format", "nm", "--nm", "2:99"), "2:99"),
        (("bench", "inference", "--nm", "2:4:pre"), "nm"),
        (("bench", "inference", "--format", "csr", "--block", "1x8"), "takes none"),
        (("bench", "inference", "--hidden", "3000000"), "give fewer units"),
        (("import", "{cut}", "--out", "{new}"), "not an .npz archive"),
        (("convert", "{cut}", "--out", "{new}"), "eventrnn import takes files of other libraries"),
        (("run", "{cut}", "--text", "{text}"), "eventrnn import takes files of other libraries"),
        (("info", "{cut}"), "eventrnn import takes files of other libraries"),
        (("import", "{cut}.bin", "--out", "{new}"), "give --from evnn|keras|onnx|torch"),
        (
            ("prune", "{model}", "--out", "{new}", "--text", "{text}", "--batch", "2"),
            "--batch: only with training; give --steps",
        ),
        (
            ("prune", "{model}", "--out", "{new}", "--text", "{text}", "--steps", "1", "--batch", "2"),
            "steps: got 1, but masks change between the shares 0 and 0.5 of the training; give at least 2",
        ),
        (("run", "{small}", "--text", "{text}"), "read-out predicts 5"),
        (("demo", "--out", "{new}", "--block", "300x8"), "larger than the matrix"),
        (("demo", "--out", "{new}", "--sparsity", "1.5"), "sparsity"),
        (("demo", "--out", "{model}"), "not a folder"),
        (("demo", "--out", "{nowhere}/deep"), "no folder"),
        (("train", "--out", "{new}" + "x" * 300, "--text", "{text}"), "File name too long; give another name"),
        (("convert", "{model}", "--out", "{new}" + "x" * 300), "File name too long; give another name"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(cli, tmp_path, model, text, arguments, message):
    empty, greek = tmp_path / "empty.txt", tmp_path / "greek.txt"
    empty.write_text("")
    greek.write_text("αβγ\n" * 500)
    vocabulary = Vocabulary.of(TEXT)
    meta, rng = {"vocabulary": vocabulary.to_json()}, np.random.default_rng(0)
    small = Network.random([6], symbols=len(vocabulary), embedding=4, readout=5, rng=rng, metadata=meta)
    save(small, tmp_path / "small.safetensors")
    np.savez(tmp_path / "cut.npz", a=np.zeros(1000))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:500])
    names = {
        "small": tmp_path / "small.safetensors",
        "cut": tmp_path / "cut.npz",
        "new": tmp_path / "new",
        "model": model,
        "text": text,
        "empty": empty,
        "greek": greek,
        "nowhere": tmp_path / "nowhere",
    }
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = cli(*(argument.format(**names) for argument in arguments))
    assert code == 2 and out == ""
    assert err.startswith("eventrnn: error: ") and err.count("\n") == 1 and message.format(**names) in err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("save_arrays", [np.savez, np.savez_compressed])
def test_damaged_archives_are_refused_in_words(tmp_path, save_arrays):
    path, rng = tmp_path / "layer.npz", np.random.default_rng(0)
    save_arrays(path, a=rng.normal(size=(8, 8)), b=rng.integers(0, 9, 50))
    whole, messages = path.read_bytes(), []
    for _ in range(150):
        raw = bytearray(whole)
        for at in rng.integers(0, len(raw), 4):
            raw[at] ^= 1 << rng.integers(8)
        path.write_bytes(raw)
        try:
            _arrays(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 100 and all(words.startswith(f"source: {path}") for words in messages)


def test_text_of_files_cannot_steer_the_terminal(cli, tmp_path, model, text):
    name = tmp_path / "[bold]\x1b[2J:smile:$x$.safetensors"
    name.write_bytes(model.read_bytes())
    for arguments in (("info", name), ("run", name, "--text", text), ("count", name, "--text", text, "--symbols", 50)):
        code, out, err = cli(*arguments)
        assert code == 0, err
        assert "\x1b[2J" not in out + err
    out = cli("info", name)[1]
    assert "[bold]" in "".join(out.split()) and ":smile:" in "".join(out.split())
    raw = model.read_bytes()
    name.write_bytes(raw.replace(b'"format":"eventrnn"', b'"format":"event\x1bnn"'))
    code, out, err = cli("info", name)
    assert code == 2 and not out and err.count("\n") == 1 and err[:-1].isprintable()


def test_file_that_appears_while_a_command_works_is_left(cli, tmp_path, model, monkeypatch):
    from eventrnn.cli import commands

    out = tmp_path / "new.safetensors"
    stored = commands.convert

    def appearing(*arguments, **options):
        out.write_bytes(b"of another program")
        return stored(*arguments, **options)

    monkeypatch.setattr(commands, "convert", appearing)
    for k in (1, 2):
        out.unlink(missing_ok=True)
        code, _, err = cli("convert", model, "--out", out, "--to", "csr")
        assert code == 2 and f"the model is in {tmp_path}/{k}-new.safetensors" in err
        assert out.read_bytes() == b"of another program"
        assert load(tmp_path / f"{k}-new.safetensors").layers[0].w_in.name == "csr"


def test_plot_draws_the_requested_figure(cli, tmp_path, text):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the plots extra")
    model = tmp_path / "m.safetensors"
    sizes = ("--hidden", 12, "--embedding", 4, "--batch", 4, "--window", 16, "--steps", 6)
    _json(cli("train", "--out", model, "--text", text, *sizes, "--json"))
    code, out, err = cli("plot", model, "sweep", "--out", tmp_path / "sweep.png")
    assert code == 2 and not out and "holds no results of a sweep" in err and "eventrnn sweep" in err
    for what in (each for each in WHAT if each != "sweep"):
        source = f"{model}.run" if what == "training" else model
        picture = tmp_path / f"{what}.{'gif' if what == 'animation' else 'png'}"
        given = ("plot", source, what, "--out", picture, *(("--text", text) if "text" in WHAT[what] else ()))
        given += ("--steps", 3) if "steps" in WHAT[what] else ()
        assert _json(cli(*given, "--json")) == {"wrote": str(picture)}
        assert picture.read_bytes().startswith((b"\x89PNG", b"GIF89a"))
        code, _, err = cli(*given)
        assert code == 2 and "use --force" in err, "nothing is overwritten"
        if "layer" not in WHAT[what]:
            code, _, err = cli(*given, "--layer", 0, "--force", "--symbols", 5, "--steps", 7)
            assert code == 2 and f"the figure {what} does not take it; leave it out" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_full_disk_behind_stdout_is_one_line_and_exit_code_2(model):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "eventrnn", "info", str(model), "--json"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1 and "No space left on device" in ended.stderr
    assert "standard output: " in ended.stderr and "make room there, or name a place on another disk" in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_progress_that_cannot_be_written_stops_nothing(monkeypatch):
    with open("/dev/full", "w") as full, progress() as report:
        monkeypatch.setattr(sys, "stderr", full)
        report("reading", 1, 2, "")
        report("reading", 2, 2, "")
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_streams_that_were_closed_before_the_start_change_no_exit_code(tmp_path):
    for arguments, code in ((["--help"], 0), (["info", tmp_path / "none"], 2)):
        for closed in (">&-", "2>&-", ">&- 2>&-"):
            command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "eventrnn", *arguments]
            ended = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ended.returncode == code, (arguments, closed, ended.stderr)
            assert "Traceback" not in ended.stdout + ended.stderr


def test_program_runs_as_a_process_and_tells_its_story_in_one_screen():
    done = subprocess.run([sys.executable, "-m", "eventrnn"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and len(done.stdout.splitlines()) <= 45
    listed = done.stdout.partition("Commands:")[2]
    assert [line.split()[0] for line in listed.splitlines() if line.strip()][:4] == ["demo", "train", "sweep", "prune"]
    for command in re.findall(r"eventrnn ([a-z]+)", done.stdout.partition("Options:")[0]):
        assert f"  {command} " in listed, command


def test_version_and_short_help(cli):
    assert cli("--version") == (0, f"eventrnn {__version__}\n", "")
    for arguments in ((), ("prune",)):
        code, out, _ = cli(*arguments, "-h")
        assert code == 0 and out == cli(*arguments, "--help")[1] and "-h, --help" in out


@pytest.mark.parametrize("module", ["eventrnn", "eventrnn.cli"])
def test_both_modules_are_the_program(module):
    done = subprocess.run([sys.executable, "-m", module, "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Did you mean 'train'" in done.stderr


def test_shells_complete_the_names_of_commands():
    typed = {"_EVENTRNN_COMPLETE": "complete_bash", "COMP_WORDS": "eventrnn pr", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "eventrnn"], capture_output=True, text=True, check=False, env=os.environ | typed
    )
    assert done.stdout.split() == ["prune"]


@pytest.mark.parametrize("arguments", [["prune"], ["plot", "my.safetensors"], ["count", "--modle", "x"]], ids=" ".join)
def test_an_error_of_use_names_the_command_that_helps(cli, arguments):
    code, out, err = cli(*arguments)
    assert code == 2 and not out and f"(eventrnn {arguments[0]} --help lists" in err


def test_crossover_reports_the_kernels_of_auto(cli):
    code, out, _ = cli("bench", "crossover", "--hidden", "32", "--json")
    record = json.loads(out)
    assert code == 0
    assert {line["batch"] for line in record["picks"]} >= {1, 80}
    kernels = {"stored", "strips", "tiles", "dense", "dense tiles"}
    assert {name for line in record["picks"] for name in line["exact"]} <= kernels
    assert record["verified"] == []
    code, out, _ = cli("bench", "crossover", "--hidden", "32")
    assert code == 0 and "kernel that auto selects" in out
