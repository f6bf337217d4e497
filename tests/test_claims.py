"""The table of claims of the papers: it is that of the committed lines, and its verdicts follow from them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

import eventrnn as er
from eventrnn.cells import Cell
from support.scripts import EXPERIMENTS, script


@pytest.fixture
def claims(monkeypatch):
    return script("claims", monkeypatch)


def test_the_page_is_what_the_command_writes_from_the_committed_lines(claims):
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(), "run python experiments/claims.py"
    assert len({claim.paper for claim in claims.CLAIMS}) == 5
    words = " ".join(claim.command for claim in claims.CLAIMS).replace(",", " ").split()
    assert all((EXPERIMENTS / name).is_file() for name in words if name.endswith(".py"))
    empty = [claim.text for claim in claims.CLAIMS if not claim.command and not claim.finding().figure]
    assert not empty, "a claim that nothing measures says why"


def test_verdicts_follow_from_the_lines(claims, monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    for module in (claims, sys.modules["claim_lines"], sys.modules["result_lines"]):
        monkeypatch.setattr(module, "HERE", tmp_path)
    assert {claim.finding().holds for claim in claims.CLAIMS} == {None}, "without lines nothing is measured"
    for perplexity, verdict in ((57.0, "reproduced"), (60.0, "not reproduced")):
        line = {"what": "evaluation", "name": "egru-ptb-818", "commit": "a1", "device": "one"}
        line["test"] = {"perplexity": perplexity, "activity": 0.1, "fewer_than_awd_lstm": 2.0}
        (tmp_path / "results" / "ptb.jsonl").write_text(json.dumps(line) + "\n")
        assert f"| {perplexity:.1f} at 90.0%; one seed | {verdict} | a1 |" in claims.row(claims.CLAIMS[0])


def test_a_model_that_was_trained_too_little_shows_nothing(claims, monkeypatch):
    common = {"what": "ptb", "commit": "a1", "gate_cost": 0.6}
    for epochs, ours, verdict in ((8, 90.0, None), (8, 110.0, False), (40, 90.0, True), (40, 110.0, False)):
        lines = [
            common | {"variant": name, "epochs": epochs, "perplexity_valid": value}
            for name, value in (("dense", 100.0), ("gated", ours))
        ]
        monkeypatch.setattr(claims, "lines_of", lambda name, lines=lines: lines)
        assert claims.large_gated().holds is verdict


def swept(method=None, perplexity=100.0, **more):
    """A line of the pruning sweep."""
    names = ("nm", "block", "sparsity", "scope", "since")
    line = {f"pruning.{name}": more.pop(name, None) for name in names} | {"pruning.method": method, "converted": None}
    line |= {"model.cell": "gru", "model.hidden": "[8, 4]", "training.epochs": 30, "training.seed": 0, "commit": "a1"}
    line["training.regularisers.dropconnect"] = 0.1
    line |= {"perplexity_valid": perplexity, "file_bytes": {"float32": 1000, "bfloat16": 500, "int8": 250}}
    return line | more


def test_a_pruned_network_is_compared_with_the_dense_one_of_its_epochs(claims, monkeypatch):
    """A ratio within the bound counts only where twice the training does not make the dense network much better."""
    blocks, rules = claims.pruning_claims, sys.modules["pruning_claims"]

    def verdict(*lines):
        monkeypatch.setattr(rules, "lines_of", lambda name: list(lines))
        return blocks.pruned_blocks("4x4", "gru")()

    pruned = {"block": "[4, 4]", "sparsity": 0.9}
    assert verdict() is None and verdict(swept()) is None
    good, bad = swept("lasso", 104.0, **pruned), swept("lasso", 106.0, **pruned)
    assert verdict(swept(), good).holds is None, "nothing shows that the dense network was trained for long enough"
    assert verdict(swept(), good).figure.endswith("one seed, dense one not trained for longer")
    assert verdict(swept(), bad).holds is False and verdict(swept(), bad).figure.endswith("one seed")
    for longer, holds in ((99.5, True), (98.5, None), (99.1, True)):
        found = verdict(swept(), good, swept(perplexity=longer, **{"training.epochs": 50}))
        assert found.holds is holds and f"30 epochs (50: {longer / 100 - 1:+.1%} for dense)" in found.figure
    found = verdict(swept(), swept(**{"training.seed": 1}), good, swept(**{"training.epochs": 50}))
    assert "(50: +0.0% for dense, one seed)" in found.figure, "fewer seeds were trained for longer"
    better, longer = swept("lasso", 102.0, **pruned), swept(perplexity=98.0, **{"training.epochs": 50})
    assert verdict(swept(), better, longer).holds, "it is no worse than the dense network of a long training either"
    other = swept("magnitude", 103.0, **pruned | {"training.epochs": 60})
    assert "+4.0% (lasso," in verdict(swept(), good, other).figure, "another number of epochs is no pair"
    seeds = [swept("lasso", value, **pruned | {"training.seed": k}) for k, value in enumerate((100.0, 106.0))]
    assert "+3.0% (lasso," in verdict(swept(), *seeds).figure and "two seeds" in verdict(swept(), *seeds).figure
    lucky = swept("threshold", 101.0, **pruned)
    assert "+3.0% (lasso," in verdict(swept(), lucky, *seeds).figure, "more seeds count more than one that is better"
    quieter = swept(perplexity=98.0, **{"training.regularisers.dropconnect": 0.05})
    assert "+6.1% (lasso" in verdict(swept(), quieter, good).figure, "the best dense network counts"
    larger = swept(perplexity=90.0, **{"model.hidden": "[12, 4]"})
    assert "+4.0% (lasso" in verdict(swept(), larger, good).figure, "a dense network of another size is no pair"
    letters = [line | {"data.kind": "character"} for line in (swept(perplexity=4.0), swept("lasso", 4.4, **pruned))]
    assert "+10.0% (lasso, DropConnect 0.1); GRU of 8 and 4 units, by characters" in verdict(*letters).figure
    letters = [line | {"symbols": 96} for line in letters]
    other = swept(perplexity=3.0, symbols=99, **{"data.kind": "character", "training.epochs": 50})
    assert "(50:" not in verdict(*letters, other).figure, "Python's documentation is another text in another version"
    worse = [swept(**{"model.cell": "egru"}), swept("lasso", 110.0, **pruned | {"model.cell": "egru"})]
    found = verdict(swept(), good, *worse)
    assert "+4.0%" in found.figure and "EGRU" not in found.figure, "each cell has a row of its own"
    found = blocks.pruned_blocks("4x4", "egru")()
    assert found.figure.startswith("+10.0% (lasso, DropConnect 0.1); EGRU") and found.holds is False


def test_converted_and_larger_networks_are_no_pruned_ones(claims, monkeypatch):
    rules = sys.modules["pruning_claims"]
    lines = [
        swept(),
        swept("magnitude", 101.0, sparsity=0.5),
        swept("adaprune", 102.0, nm="2:4", converted="half"),
        swept("magnitude", 109.0, nm="2:4", converted="half"),
        swept("magnitude", 99.0, block="[4, 4]", sparsity=0.4375, **{"model.hidden": "[12, 4]"}),
        swept("lasso", 105.0, block="[1, 16]", sparsity=0.9, file_bytes={"float32": 120, "bfloat16": 60, "int8": 30}),
        swept(
            "threshold", 106.0, block="[1, 16]", sparsity=0.9, file_bytes={"float32": 125, "bfloat16": 62, "int8": 31}
        ),
    ]
    monkeypatch.setattr(rules, "lines_of", lambda name: lines)
    assert rules.trained_masks("4:8:both", 1.01, "gru")() is None and rules.adaprune("dense")() is None
    half = rules.adaprune("half")()
    assert half.holds and half.figure.startswith("2:4: 102.0 beside 101.0 (+1.0%), without AdaPrune 109.0")
    larger = rules.larger_pruned("word")()
    assert "4x4 -1.0% beside 8 and 4 units with as many weights; GRU of 12 and 4" in larger.figure
    assert larger.holds is None, "nothing shows that the dense network was trained for long enough"
    assert rules.larger_pruned("character")() is None
    lines += [line | {"training.epochs": 40, "perplexity_valid": 101.0} for line in (lines[0], lines[4])]
    assert "4x4 +0.0% beside" in rules.larger_pruned("word")().figure, "the longest training counts"
    assert rules.lasso_helps().holds and "1x16 -0.9%" in rules.lasso_helps().figure
    sizes = rules.smaller_files()
    assert sizes.holds and "8.0 times with float32 values, 16.1 times with bfloat16" in sizes.figure


def test_masks_are_drawn_beside_the_dense_network_of_the_longest_training(monkeypatch):
    plots, longer = script("plots", monkeypatch), {"training.epochs": 60}
    lines = [swept(), *(swept("magnitude", 150.0, nm=nm) for nm in ("2:4", "4:8"))]
    assert plots.masked_networks(lines) == {"GRU of 8 and 4 units, by words": {"2:4": [1.5], "4:8": [1.5]}}
    lines += [swept(**longer), swept("magnitude", 101.0, nm="2:4", **longer)]
    assert plots.masked_networks(lines)["GRU of 8 and 4 units, by words"]["2:4"] == [1.5], "one pattern is none"
    lines += [swept("magnitude", 102.0, nm="4:8", **longer | {"training.seed": seed}) for seed in (0, 1)]
    found = plots.masked_networks(lines)["GRU of 8 and 4 units, by words"]
    assert found == {"2:4": [1.01], "4:8": [1.02, 1.02]}


def short(study, model, settings, **valid):
    """A line of a short training."""
    settings = {"training.epochs": 9, "training.seed": 0} | settings
    line = {"what": "training", "study": study, "model": model, "settings": settings, "units": [8, 4], "commit": "a1"}
    return line | {"valid": {"perplexity": 100.0, "activity": 0.1, "effective": 1e6} | valid}


def test_short_trainings_show_a_direction(claims, monkeypatch):
    rules = claims.activity_claims

    def read(*lines):
        monkeypatch.setattr(rules, "lines_of", lambda name: list(lines))
        return rules

    def sizes(*activities):
        lines = [short("sizes", "egru", {"n": k}, activity=each) for k, each in enumerate(activities)]
        return [line | {"units": [8 * (k + 1), 4]} for k, line in enumerate(lines)]

    assert read(*sizes(0.2)).larger_is_quieter() is None, "one size shows no direction"
    assert read(*sizes(0.3, 0.2, 0.1)[::-1]).larger_is_quieter().holds
    assert read(*sizes(0.3, 0.1, 0.2)).larger_is_quieter().holds is False

    decays = [short("decay", "egru", {"training.weight_decay": k}, activity=0.3 - k) for k in (0.0, 0.1, 0.2)]
    again = short("decay", "egru", {"training.weight_decay": 0.0, "training.seed": 1}, activity=0.1)
    assert read(*decays).decay_steers().figure.startswith("activity 30.0% at 0, 20.0% at 0.1, 10.0% at 0.2")
    assert read(*decays, again).decay_steers().holds, "the mean of both seeds is 0.2"
    assert read(*decays, again | {"valid": again["valid"] | {"activity": 0.0}}).decay_steers().holds is False

    learnt_less = sizes(0.3, 0.2)
    learnt_less[1]["valid"] = learnt_less[1]["valid"] | {"perplexity": 200.0}
    assert read(*learnt_less).larger_is_quieter().holds is None, "a network that has not learnt shows nothing"

    egru = short("connectivity", "egru", {"pruning.sparsity": 0.9}, effective=1e5)
    dense = short("connectivity", "lstm", {"k": 0}, perplexity=90.0, effective=1e6)
    for products, ratio, holds in ((1e5, "3.2", True), (1.1e4, "1.0", False)):
        pruned = short("connectivity", "lstm", {"pruning.sparsity": 0.8}, perplexity=110.0, effective=products)
        found = read(egru, dense, pruned).lstm_alone()
        assert found.holds is holds and found.figure.startswith(f"LSTM {ratio} times the products of an EGRU"), (
            "at perplexity 100 an LSTM needs the geometric mean of both"
        )
    assert read(egru, dense).lstm_alone() is None, "one LSTM has no curve"
    assert read(dense, pruned).lstm_alone() is None


def test_sparse_tensor_cores_count_at_their_best_batch(claims, monkeypatch):
    def found(*gains):
        lines = [
            {
                "inputs": 8,
                "outputs": 4,
                "batch": 16 * (k + 1),
                "speedup": {"sparse": 0.1, "searched": each},
                "commit": "a1",
            }
            for k, each in enumerate(gains)
        ]
        monkeypatch.setattr(claims.activity_claims, "lines_of", lambda name: lines)
        return claims.activity_claims.sparse_tensor_cores()

    assert found() is None
    assert found(0.5, 2.1, 1.9).holds and found(0.5, 1.9).holds is False
    assert "8x4 0.50 at batch 16, at most 1.90, at batch 32" in found(0.5, 1.9).figure


@pytest.mark.parametrize(("ours", "longer", "holds"), [(99.0, 100.0, True), (99.0, 90.0, None), (101.0, 90.0, False)])
def test_the_two_cells_are_compared_after_as_many_epochs(claims, monkeypatch, ours, longer, holds):
    gru = [swept(), swept(perplexity=longer, **{"training.epochs": 60})]
    lines = [*gru, swept(perplexity=ours, **{"model.cell": "egru"})]
    monkeypatch.setattr(sys.modules["pruning_claims"], "lines_of", lambda name: lines)
    found = claims.beats_gru()
    assert found.holds is holds and found.figure.startswith(
        f"EGRU {ours:.1f}, GRU 100.0 on the validation text; GRU of 8"
    )


def test_the_backward_pass_of_a_network_without_events_is_not_counted(monkeypatch, tmp_path):
    short_trainings = script("short_trainings", monkeypatch)
    sizes = {"symbols": 9, "embedding": 4, "readout": 9, "cell": Cell("gru")}
    er.save(er.Network.random([4], rng=np.random.default_rng(0), **sizes), tmp_path / "gru.safetensors")
    with pytest.raises(ValueError, match="model: .* has a layer of gru, whose units send no events; need an EGRU"):
        short_trainings.backward(str(tmp_path / "gru.safetensors"), results=tmp_path / "lines.jsonl")
