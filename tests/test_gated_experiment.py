"""The script of gated blocks in experiments/: variants are trained once, counted and drawn."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from eventrnn.data.text import from_path

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def test_gated_word_models_are_trained_once_and_drawn(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    for each in ("dynamic_blocks", "gated_words", "gated_figures", "records"):
        monkeypatch.delitem(sys.modules, each, raising=False)
    module, rng = importlib.import_module("dynamic_blocks"), np.random.default_rng(0)
    for part in ("train", "valid", "test"):
        words = [f"w{n}" for n in rng.integers(0, 12, 300)]
        (tmp_path / f"ptb.{part}.txt").write_text("\n".join(" ".join(words[k : k + 20]) for k in range(0, 300, 20)))
    results, figure = tmp_path / "lines.jsonl", tmp_path / "figure.png"
    size = {"--hidden": 64, "--vocabulary": 10, "--epochs": 1, "--batch": 4, "--window": 10, "--seed": 0}
    paths = {"--text": tmp_path, "--runs": tmp_path / "runs", "--results": results}
    options = [str(each) for pair in (size | paths).items() for each in pair]
    names = ("gated", "gated-shared", "gated-gradual-50", "gradual-50", "diagonal-2", "smaller")
    asked = [each for name in names for each in ("--variant", name)]
    trained = CliRunner().invoke(module.app, ["quality", *options, *asked])
    assert trained.exit_code == 0, trained.output
    lines = {line["variant"]: line for line in map(json.loads, results.read_text().splitlines())}
    assert list(lines) == list(names)
    # Two matrices 64 x 192 in blocks of 16 x 16; the first token meets a silent state.
    dense, tokens = 2 * 64 * 192, len(from_path(tmp_path, kind="word", size=10).valid)
    assert all(line["dense"] == dense or name == "smaller" for name, line in lines.items())
    assert lines["gated"]["executed"] == dense / 2 * (1 - 1 / (2 * tokens)) == lines["gradual-50"]["executed"]
    assert lines["gated-gradual-50"]["executed"] < lines["gated"]["executed"] and lines["gated"]["selection"] > 0
    assert 0 < lines["smaller"]["units"] < 64
    shared = lines["gated-shared"]
    assert shared["period"] == 4 and shared["gate_cost"] < lines["gated"]["gate_cost"]
    assert shared["selection"] < lines["gated"]["selection"] and shared["executed"] == lines["gated"]["executed"]
    assert {len(shares) for shares in lines["gated"]["usage"].values()} == {48}
    monkeypatch.setattr(module, "measure_quality", None)  # nothing is trained again
    assert CliRunner().invoke(module.app, ["quality", *options, *asked]).exit_code == 0
    monkeypatch.undo()
    # The large word model, at a small size and on the CPU.
    large = ["--backend", "cpu", "--cell", "gru", "--layers", "2", "--block", "8", "--hidden", "32"]
    trained = CliRunner().invoke(module.app, ["ptb", *options, *large])
    assert trained.exit_code == 0, trained.output
    found = [json.loads(line) for line in results.read_text().splitlines()][len(lines) :]
    assert [(line["what"], line["variant"], line["layers"]) for line in found] == [
        ("ptb", "dense", 2),
        ("ptb", "gated", 2),
    ]
    dense = 2 * 2 * 32 * 96
    assert found[0]["dense"] == found[1]["dense"] == dense > 1.9 * found[1]["executed"]
    assert found[1]["block"] == [8, 8] and {len(shares) for shares in found[1]["usage"].values()} == {48}
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the plots extra")
    drawn = CliRunner().invoke(module.app, ["draw", "--results", str(results), "--out", str(figure)])
    assert drawn.exit_code == 0 and figure.exists()
    refused = CliRunner().invoke(module.app, ["draw", "--results", str(results), "--cell", "lstm"])
    assert refused.exit_code == 1


def test_one_product_is_timed_per_density_beside_dense_weights(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module, results = importlib.import_module("dynamic_blocks"), tmp_path / "lines.jsonl"
    options = [
        "product",
        "--block",
        "16x16",
        "--steps",
        "2",
        "--repeats",
        "3",
        "--rank",
        "4",
        "--results",
        str(results),
    ]
    sizes = [each for size in (64, 96) for each in ("--size", str(size))]
    shares = [each for share in (0.25, 1.0) for each in ("--density", str(share))]
    done = CliRunner().invoke(module.app, [*options, *sizes, *shares])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["size"], line["density"], line["products"]) for line in lines] == [
        (64, 0.25, 0.25),
        (64, 1.0, 1.0),
        (96, 0.25, 0.25),
        (96, 1.0, 1.0),
    ]
    # A factor of 4 columns, and one of 16 logits from them.
    assert lines[0]["gate_cost"] == (4 * 64 + 4 * 16) / 64**2
    assert all(min(line["us"].values()) > 0 and line["speedup"].keys() == {"dense", "blas"} for line in lines)
    refused = CliRunner().invoke(module.app, ["product", "--size", "66", "--results", str(results)])
    assert refused.exit_code and "multiple of 4" in str(refused.exception or refused.output)
