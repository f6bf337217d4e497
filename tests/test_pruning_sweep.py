"""The sweeps of pruned word models: their plan, the sizes of their files, conversions, and their table."""

import importlib
import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import eventrnn as er
from eventrnn.pruning import prune
from eventrnn.sweeps import check_sweep, load_sweep
from support.texts import TEXT

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    script = importlib.import_module("pruning_sweep")
    # The networks of these tests are too small for blocks of 32 x 32.
    small = replace(script.TASKS["words"], blocks=((1, 2), (2, 2)))
    monkeypatch.setitem(script.TASKS, "words", small)
    return script


def call(script, *arguments):
    return CliRunner().invoke(script.app, [str(argument) for argument in arguments], catch_exceptions=False)


def small_plan(script, folder, cell, *more):
    (folder / "text.txt").write_text(TEXT)
    options = ("--text", folder / "text.txt", "--epochs", 43, "--backend", "cpu", "--seed", 0, "--seed", 1)
    call(script, "plan", folder / "sweep.toml", "--cell", cell, *options, *more)
    return load_sweep(folder / "sweep.toml", settings={"data.valid_batch": 2, "training.batch": 2})


@pytest.mark.parametrize("cell", ["gru", "egru"])
def test_every_point_of_the_plan_can_be_trained(script, tmp_path, cell):
    """Each part has its points for every seed, and the larger network is pruned to the weights of the dense one."""
    sweep = small_plan(script, tmp_path, cell, "--hidden", 64, "--hidden", 32)
    points = check_sweep(sweep, tmp_path / "sweep")
    blocks, others, curve = 2, len(script.RULES) - 1, 1 + 2 * 3
    arms, masks = len(script.ARMS), len(script.MASKS) + 1
    assert len(points) == 2 * (1 + 3 + 1 + blocks + arms + blocks + others * blocks + masks + curve)
    recipes = [point.recipe for point in points]
    assert {recipe.model.cell for recipe in recipes} == {cell}
    assert {recipe.model.hidden for recipe in recipes} == {(64, 32), (128, 32)}
    assert recipes[0].pruning.method == "" and {recipe.training.epochs for recipe in recipes} == {43, 65}
    dense, large = 64 * (64 + 32) + 32 * (32 + 64), 128 * (128 + 32) + 32 * (32 + 128)
    wide = [recipe for recipe in recipes if recipe.model.hidden == (128, 32)]
    assert all(round((1 - recipe.pruning.sparsity) * large) == dense for recipe in wide) and len(wide) == 2 * blocks
    assert {recipe.pruning.nm for recipe in recipes} == {"", *script.MASKS}


def test_a_part_is_a_sweep_of_its_own(script, tmp_path):
    """Points of one part follow those of the part that was named before it, seed by seed."""
    sweep = small_plan(script, tmp_path, "gru", "--hidden", 64, "--hidden", 32, "--part", "blocks", "--part", "dense")
    recipes = [point.recipe for point in check_sweep(sweep, tmp_path / "sweep")]
    assert [recipe.training.seed for recipe in recipes] == [0, 0, 1, 1, 0, 1]
    assert [bool(recipe.pruning.method) for recipe in recipes] == [True] * 4 + [False] * 2
    # A tenth of the weights has the root of a tenth of the noise.
    assert [recipe.training.regularisers.dropconnect for recipe in recipes[3:5]] == [0.111, 0.35]


def test_characters_are_the_second_task(script, tmp_path):
    """Of small networks, by another preset, and marked in their lines; their blocks fit the matrices."""
    recipes = [
        point.recipe for point in check_sweep(small_plan(script, tmp_path, "gru", "--task", "characters"), tmp_path)
    ]
    assert {(recipe.data.kind, recipe.model.tied, recipe.training.optimiser.beta1) for recipe in recipes} == {
        ("character", False, 0.9)
    }
    assert {recipe.model.hidden for recipe in recipes} == {(128, 64), (256, 64)}
    assert {recipe.pruning.block for recipe in recipes} == {(1, 1), (1, 16), (4, 4)}
    assert {recipe.pruning.exempt for recipe in recipes if recipe.pruning.method} == {("readout",)}
    assert 'data.kind = "character"' in (tmp_path / "sweep.toml").read_text()


def test_every_part_has_a_name(script):
    assert all(callable(getattr(script.Plan, part)) for part in script.PARTS)


def test_a_plan_overwrites_no_file(script, tmp_path):
    small_plan(script, tmp_path, "gru", "--hidden", 64, "--hidden", 32)
    with pytest.raises(ValueError, match=r"out: .*sweep.toml exists"):
        call(script, "plan", tmp_path / "sweep.toml")
    with pytest.raises(ValueError, match="cell: got 'lstm', need one of egru, gru"):
        call(script, "plan", tmp_path / "other.toml", "--cell", "lstm")
    with pytest.raises(ValueError, match="part: got 'all', need one of dense, blocks"):
        call(script, "plan", tmp_path / "other.toml", "--part", "all")
    with pytest.raises(ValueError, match="task: got 'images', need one of words, characters"):
        call(script, "plan", tmp_path / "other.toml", "--task", "images")
    with pytest.raises(ValueError, match="backend: got 'tpu'"):
        call(script, "plan", tmp_path / "other.toml", "--backend", "tpu")
    with pytest.raises(ValueError, match=r"learning_rate: got 0\.0, need a positive number"):
        call(script, "plan", tmp_path / "other.toml", "--part", "dense", "--rate", 0)
    with pytest.raises(ValueError, match="larger: got inf, need a finite multiple"):
        call(script, "plan", tmp_path / "other.toml", "--larger", "inf")
    for options in (("--hidden", 64), ("--larger", 1)):
        with pytest.raises(ValueError, match="no network is larger.* or name parts without shrunk"):
            call(script, "plan", tmp_path / "other.toml", "--part", "shrunk", *options)
    assert not (tmp_path / "other.toml").exists()


def test_a_table_of_nothing_says_what_is_missing(script, tmp_path):
    with pytest.raises(
        ValueError, match=r"results: there is no line in .*none\.jsonl; the command collect writes them"
    ):
        call(script, "table", "--results", tmp_path / "none.jsonl")


def test_bytes_of_a_file_are_those_of_the_layers_in_each_storage(script):
    network = er.Network.random([64], rng=np.random.default_rng(0), symbols=100, embedding=32, readout=100)
    sizes = [script.sizes(each) for each in (network, prune(network, 0.9, block=(16, 16)))]
    assert [round(each["density_of_layers"], 1) for each in sizes] == [1.0, 0.1]
    whole, blocks = (each["file_bytes"] for each in sizes)
    weights = 3 * 64 * (64 + 32)
    assert 4 * weights < whole["float32"] < 4 * weights + 4096
    assert 2 * weights < whole["bfloat16"] < 2 * weights + 4096
    assert weights < whole["int8"] < weights + 8192
    assert blocks["float32"] < 0.1 * whole["float32"] + 4096


def test_a_trained_point_is_collected_once_per_text(script, tmp_path, monkeypatch):
    network = er.Network.random([4], rng=np.random.default_rng(0), symbols=9, embedding=4, readout=9)
    trained = {"state": "done", "folder": "points/0000", "point": 0, "training.seed": 0, "perplexity_valid": 90.0}
    lines = [trained, {"state": "failed", "folder": "points/0001"}]
    monkeypatch.setattr(script, "read_results", lambda folder: lines)
    monkeypatch.setattr(script.er, "load", lambda path: network)
    results = tmp_path / "lines.jsonl"
    for text in ("/here/ptb", "/there/ptb", "other"):
        shared = SimpleNamespace(settings={"data.text": text, "model.cell": "gru"})
        monkeypatch.setattr(script, "saved_sweep", lambda folder, shared=shared: shared)
        call(script, "collect", tmp_path, "--results", results)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["data.text"] for line in found] == ["ptb", "other"]
    assert all(line | script.sizes(network) == line and "folder" not in line for line in found)


def test_dense_and_half_networks_are_converted_once(script, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    # Units are settings of a point; the embedding alone would not fit those of the preset.
    settings = {"data.text": str(tmp_path / "text.txt"), "model.cell": "gru", "model.embedding": 8, "model.tied": True}
    shared = SimpleNamespace(settings=settings, preset="characters")
    half = {f"pruning.{name}": value for name, value in script.HALF.items()}
    rules = ({}, half, {"pruning.method": "lasso", "pruning.sparsity": 0.9}, {"training.epochs": 4})
    trained = {"state": "done", "training.epochs": 2, "training.seed": 0}
    lines = [trained | rule | {"folder": f"points/{k:04}"} for k, rule in enumerate(rules)]
    monkeypatch.setattr(script, "read_results", lambda folder: lines)
    monkeypatch.setattr(script, "saved_sweep", lambda folder: shared)
    symbols = 1 + int(
        script.load_recipe(settings=[("data.text", str(tmp_path / "text.txt"))]).data.corpus().train.max()
    )
    network = er.Network.random(
        [8], rng=np.random.default_rng(0), symbols=symbols, embedding=8, readout=symbols, cell=er.Cell("gru")
    )
    monkeypatch.setattr(script.er, "load", lambda path: network)
    monkeypatch.setattr(script, "CALIBRATION", (20, 2))
    results = tmp_path / "lines.jsonl"
    convert = ("convert", tmp_path, "--results", results, "--backend")
    refused = CliRunner().invoke(script.app, [str(each) for each in (*convert, "gpu")])
    assert "backend: got 'gpu'" in str(refused.exception) and not results.exists()
    for _ in range(2):
        call(script, *convert, "reference")
    found = [json.loads(line) for line in results.read_text().splitlines()]
    made = [(line["converted"], line["pruning.method"], line["pruning.nm"]) for line in found]
    assert sorted(made) == sorted(product(("dense", "half"), ("adaprune", "magnitude"), script.CONVERTED))
    assert all(0.4 < line["density_of_layers"] <= 0.5 for line in found)
    read = {line["pruning.method"]: line["perplexity_valid"] for line in found if line["pruning.nm"] == "2:4"}
    assert read["adaprune"] != read["magnitude"]


def test_the_table_compares_means_over_seeds_with_the_dense_network(script, tmp_path):
    common = dict.fromkeys(script.KEY) | {"model.cell": "gru", "model.hidden": "[64, 32]", "device": "here"}
    common |= {"training.epochs": 9, "density_of_layers": 0.1}
    rule = {"pruning.method": "lasso", "pruning.block": "[4, 4]", "pruning.sparsity": 0.9}
    figures = {"activity_valid": 1.0, "effective_ops_per_step": 1e6}
    lines = [
        common | figures | {"perplexity_valid": 100.0, "file_bytes": dict.fromkeys(script.STORAGES, 4000)},
        *(
            common | figures | rule | {"training.seed": seed, "perplexity_valid": read, "file_bytes": small}
            for seed, read, small in [(0, 102.0, {"float32": 800, "bfloat16": 400, "int8": 200}), (1, 106.0, {})]
        ),
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = call(script, "table", "--results", tmp_path / "lines.jsonl").stdout
    row = next(each for each in shown.splitlines() if "lasso" in each)
    for cell in ("[4, 4]", "10.0%", " 2 ", "104.00", "2.83", "+4.0%", "5.0x", "10.0x", "20.0x"):
        assert cell in row


@pytest.mark.torch
def test_steps_of_blocks_and_new_masks_are_timed(monkeypatch, tmp_path):
    """A line per case, with a time of every variant."""
    pytest.importorskip("torch", reason="the GRU of PyTorch is timed beside the layers")
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    blocks, masks = (importlib.import_module(name) for name in ("block_steps", "mask_refresh"))
    monkeypatch.setattr(blocks, "BATCHES", (2,))
    path = tmp_path / "steps.jsonl"
    blocks.main(hidden=32, steps=3, repeats=3, results=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["cell"] for line in lines] == ["gru", "egru"]
    assert all(set(line["us_per_step"]) == {*blocks.BLOCKS, "torch"} for line in lines)
    assert all(us > 0 for line in lines for us in line["us_per_step"].values())
    path = tmp_path / "masks.jsonl"
    masks.main(hidden=16, batch=2, window=4, rounds=3, results=path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["exact", "greedy"]
    for line in lines:
        more, dense = line["seconds"]["drawn"] - line["seconds"]["kept"], line["seconds"]["dense"]
        assert line["masks_share"] == {str(k): more / (k * dense) for k in masks.INTERVALS}
