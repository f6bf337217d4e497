"""The table of claims of the papers: it is that of the committed lines, and its verdicts follow from them."""

from __future__ import annotations

import json
import sys

import pytest

from support.scripts import EXPERIMENTS, script


@pytest.fixture
def claims(monkeypatch):
    return script("claims", monkeypatch)


def test_the_page_is_what_the_command_writes_from_the_committed_lines(claims):
    assert claims.PAGE.read_text(encoding="utf-8") == claims.page(), "run python experiments/claims.py"
    assert len({claim.paper for claim in claims.CLAIMS}) == 5
    words = " ".join(claim.command for claim in claims.CLAIMS).replace(",", " ").split()
    assert all((EXPERIMENTS / name).is_file() for name in words if name.endswith(".py"))


def test_verdicts_follow_from_the_lines(claims, monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    for module in (claims, sys.modules["result_lines"]):
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
        monkeypatch.setattr(claims, "_lines", lambda name, lines=lines: lines)
        assert claims.large_gated().holds is verdict
