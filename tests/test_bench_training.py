"""The training benchmark: refusals, figures of the timed window, and baselines that compute the same."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from eventrnn.bench import TRAINING_BASELINES, TrainingCase, training
from eventrnn.bench.training import SAME_GRADIENT
from eventrnn.cli import app
from eventrnn.training.bptt.model import Model

SMALL = {"hidden": 96, "batch": 8, "steps": 12, "repeats": 3, "activity": 0.2, "support": 0.2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 0}, "hidden"),
        ({"repeats": 2}, "repeats"),
        ({"activity": 1.0}, "activity"),
        ({"support": 0.0}, "support"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"block": (1, 16)}, "without a sparsity"),
        ({"nm": (2, 4, "post"), "sparsity": 0.9}, "masks fix the share"),
        ({"nm": (5, 4, "post")}, "need n of each m"),
        ({"backward": "fast"}, "backward"),
        ({"against": "jax"}, "against"),
        ({"input_gradient": "some"}, "input_gradient"),
        (
            {"input_gradient": "open", "against": "torch,torch-bridge"},
            "torch-bridge computes the gradient of all inputs",
        ),
    ],
)
def test_bench_training_refuses_invalid_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        TrainingCase(**change)


def test_beside_the_bridge_both_sides_compute_the_whole_input_gradient():
    assert TrainingCase().input_gradient == TrainingCase(against="none").input_gradient == "open"
    assert TrainingCase(against="torch-loop,torch-bridge").input_gradient == "all"
    assert TrainingCase(against="torch-bridge", input_gradient="none").input_gradient == "none"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sparsity": 0.8, "block": (1, 32)},
        {"nm": (1, 4, "pre")},
        {"backward": "dense"},
        {"input_gradient": "all", "backward": "sparse"},
    ],
)
def test_reported_counts_belong_to_the_timed_window(changes):
    result = training(against="none", **(SMALL | changes))
    assert result["speedup"] is None and result["ms_per_iteration"] > 0
    # Within the command's own tolerance of the request. A unit that fired or has a non-zero slope has a path.
    assert 0.18 <= result["activity"] <= 0.22 and 0.18 <= result["support"] <= 0.22
    assert max(result["activity"], result["support"]) <= result["open"] <= result["activity"] + result["support"]
    assert result["effective_per_iteration"] <= result["executed_per_iteration"] <= result["dense_per_iteration"]
    # Forward, weight gradient and gradient of the inputs of both matrices; no layer reads the events of the last step.
    rows = 96 * 3 * 96 * 8
    assert result["dense_per_iteration"] == rows * (12 * 5 + 11)
    if changes.get("sparsity") or changes.get("nm"):
        assert (0.74 if changes.get("nm") else 0.79) <= result["sparsity"] <= 0.81
        assert result["executed_per_iteration"] < 0.3 * result["dense_per_iteration"]


def test_pruned_weights_are_timed_beside_the_same_weights_stored_dense(monkeypatch):
    """The dense side computes the gradients of the kept weights with the same values, within rounding."""
    made, found = [], Model.backward

    def backward(model, *given, **options):
        made.append(found(model, *given, **options))
        return made[-1]

    monkeypatch.setattr(Model, "backward", backward)
    result = training(against="dense", nm=(1, 4, "post"), **SMALL)
    assert result["against_each"].keys() == {"dense"} and result["nm"] == "1:4:post"
    # A quarter of the weights has a gradient on one side, and all of them on the other.
    ours, dense = ({each["layers.0.w_rec"].size: each for each in made}[size] for size in (96 * 72, 96 * 288))
    apart = np.abs(ours["layers.0.bias_in"] - dense["layers.0.bias_in"]).max()
    assert apart <= SAME_GRADIENT * np.abs(dense["layers.0.bias_in"]).max()


@pytest.mark.torch
def test_baselines_run_and_loops_agree_on_gradients():
    pytest.importorskip("torch")
    result = training(against=",".join(TRAINING_BASELINES), **SMALL)
    assert tuple(result["against_each"]) == TRAINING_BASELINES
    assert result["speedup"] == result["against_ms_per_iteration"] / result["ms_per_iteration"]


def test_the_command_prints_one_object_and_refuses():
    sizes = [
        "--hidden",
        "96",
        "--batch",
        "8",
        "--steps",
        "12",
        "--repeats",
        "3",
        "--activity",
        "0.2",
        "--support",
        "0.2",
    ]
    done = CliRunner().invoke(app, ["bench", "training", *sizes, "--against", "none", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["threads"] == 1
    for arguments, named in ((["--backend", "gpu"], "backend"), (["--activity", "2"], "activity")):
        with pytest.raises(ValueError, match=named):
            CliRunner().invoke(app, ["bench", "training", *arguments], catch_exceptions=False)
