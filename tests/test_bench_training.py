"""The training benchmark: refusals, figures of the timed window, and baselines that compute the same."""

import json

import pytest
from typer.testing import CliRunner

from eventrnn.bench import TRAINING_BASELINES, TrainingCase, training
from eventrnn.cli import app

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
    [{}, {"sparsity": 0.8, "block": (1, 32)}, {"backward": "dense"}, {"input_gradient": "all", "backward": "sparse"}],
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
    if changes.get("sparsity"):
        assert 0.79 <= result["sparsity"] <= 0.81
        assert result["executed_per_iteration"] < 0.3 * result["dense_per_iteration"]


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
