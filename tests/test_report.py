"""The page of a training run: its figures and tables are those of the run, and it needs no other file."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="pages have figures, which need the plots extra")

from eventrnn import Network, count, load, save, simulate
from eventrnn.margins import threshold_margins
from eventrnn.report import Measured, read_run, run_report
from eventrnn.training.run import AVERAGED
from support.small_runs import drawn, inputs, of_kind
from support.texts import TEXT, reader_of_text

# Elements without an end.
VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """The tables of a page, and whatever would be loaded from elsewhere; fails where elements do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.loaded, self.figures = [], [], [], 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.figures += tag == "figure"
        self.loaded += [v for name, v in attrs if name in ("src", "href", "xlink:href") and v[:1] != "#"]
        self.loaded = [each for each in self.loaded if not each.startswith("data:")]
        if tag == "tr":
            self.rows.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def line(step, **validation):
    figures = dict.fromkeys(AVERAGED, 0.25) | {"loss": 2.0 - step / 100, "seconds": step * 2.0}
    return {"step": step, **figures, "validation": validation or None}


@pytest.fixture
def model(tmp_path):
    save(reader_of_text(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "<b>my & run.run"
    path.mkdir()
    lines = [line(10), line(20, perplexity=31.25, activity=0.125), line(30, perplexity=42.5, activity=0.5)]
    (path / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (path / "config.toml").write_text('[data]\ntext = "</pre><script>"\n')
    return path


def test_a_page_has_the_validations_of_the_log_and_loads_nothing(folder):
    text = run_report(folder)
    page = Page(text)
    assert page.loaded == [] and "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|"http://[^"]*"', "", text)
    assert page.rows[:3] == [
        ["update", "loss", "perplexity", "activity"],
        ["20", "1.8", "31.25", "12.5%"],
        ["30", "1.7", "42.5", "50.0%"],
    ]
    assert "<dd>31.25</dd>" in text and "<dd>20 of 30</dd>" in text and "<dd>1 min 0 s</dd>" in text
    assert page.figures == 2
    assert "<title>&lt;b&gt;my &amp; run.run</title>" in text
    assert "&lt;/pre&gt;&lt;script&gt;" in text and "<script" not in text


def test_figures_take_the_colour_of_the_text(folder):
    drawings = re.findall(r"<svg.*?</svg>", run_report(folder), re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        assert "currentColor" in drawing and "#000000" not in drawing
        assert "perplexity (validation)" in drawing or "loss (training)" in drawing


def test_a_model_adds_its_weights_and_the_operations_of_its_text(folder):
    network = drawn(symbols=True)
    symbols = inputs(30, symbols=True)[:, 0]
    page = Page(run_report(folder, model=Measured(network, symbols, "my text")))
    counts = count(network, simulate(network, symbols[:, None]))
    at = {row[0]: row for row in page.rows}
    for name, found in {**counts.matrices, "total": counts.total}.items():
        columns = ("dense", "effective", "executed", "weight_bytes")
        assert at[name] == [name, *(f"{getattr(found, column) / 30:,.0f}" for column in columns)]
    assert page.figures == 5


@pytest.mark.parametrize("kind", ["gru", "gated"])
def test_pages_of_other_networks(folder, kind):
    network = of_kind(kind, [9], readout=3, symbols=5, embedding=6)
    page = Page(run_report(folder, model=Measured(network, np.arange(20) % 5, "my text")))
    # Cells without thresholds have no margins.
    assert page.figures == (4 if kind == "gru" else 5)


def test_folders_without_a_validated_run_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a run; eventrnn train writes it"):
        run_report(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no log of a run"):
        run_report(tmp_path)
    (folder / "log.jsonl").write_text(json.dumps(line(10)) + "\n")
    with pytest.raises(ValueError, match="has not been validated yet"):
        run_report(folder)
    (folder / "log.jsonl").write_text(json.dumps(line(10, f1=1.0)) + "\n")
    with pytest.raises(ValueError, match="have no finite perplexity"):
        run_report(folder)


def test_validations_without_finite_figures_are_in_the_table_and_not_drawn(folder):
    figures = [{"loss": 3.0}, {"perplexity": 9.5, "activity": 0.5}, {"perplexity": math.inf, "activity": 0.5}]
    figures += [{"perplexity": "x", "activity": 0.5}, {"perplexity": 8.0}]
    lines = [line(k, **each) for k, each in enumerate(figures, start=1)]
    lines[2]["loss"] = math.nan
    (folder / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    log = read_run(folder)
    assert log.quality == "perplexity" and log.points() == [(2, 9.5, 0.5)] and log.best()["step"] == 5
    text = run_report(folder)
    assert Page(text).rows[:6] == [
        ["update", "loss", "loss", "perplexity", "activity"],
        ["1", "1.99", "3", "–", "–"],
        ["2", "1.98", "–", "9.5", "50.0%"],
        ["3", "nan", "–", "inf", "50.0%"],
        ["4", "1.96", "–", "–", "50.0%"],
        ["5", "1.95", "–", "8", "–"],
    ]
    assert "4 validations without a finite perplexity and activity not drawn." in text
    assert Page(text).figures == 2


def test_command_reports_the_run_beside_its_model(cli, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(model, "mine.safetensors")
    run, text = tmp_path / "mine.safetensors.run", tmp_path / "my_text.txt"
    text.write_text(TEXT)
    run.mkdir()
    (run / "log.jsonl").write_text(json.dumps(line(20, bits=3.0, activity=0.5)) + "\n")
    code, out, err = cli("report", "mine.safetensors.run", "--symbols", "50", "--text", text)
    assert code == 0, err
    page = Page((tmp_path / "mine.safetensors.run.html").read_text())
    assert out == "wrote mine.safetensors.run.html\n"
    assert "report 50% reading 50 symbols and counting" in err
    assert set(load(model).matrices()) <= {row[0] for row in page.rows}
    for options, words in [
        ((), "exists"),
        (("-o", "page.txt"), "ends in .html"),
        (("--symbols", "0", "-o", "a.html"), "symbols: got 0"),
    ]:
        code, _, err = cli("report", "mine.safetensors.run", *options)
        assert code == 2 and words in err, err
    monkeypatch.chdir(run)
    # Without a configuration, no text is guessed.
    code, _, err = cli("report", ".", "-o", "page.html")
    assert code == 2 and "does not say the text of the training; give --text" in err
    (run / "config.toml").write_text('[data]\ntext = "gone.txt"\n')
    code, _, err = cli("report", ".", "-o", "page.html")
    assert code == 2 and "gone.txt: no such file" in err and "--text names another" in err
    code, out, err = cli("report", ".", "--symbols", "5", "--text", text, "--force")
    assert code == 0 and "mine.safetensors.run.html" in out, err
    monkeypatch.chdir(tmp_path)
    run.rename("other.run")
    code, _, err = cli("report", "other.run", "--text", "builtin")
    assert code == 2 and "give --model" in err


def test_margins_are_the_distances_at_which_the_specification_sends():
    for network in (drawn(), Network.random([7], inputs=6, rng=np.random.default_rng(2), threshold=0.1)):
        result = simulate(network, inputs(12), record=("events", "states"), lengths=[12, 5])
        margins = threshold_margins(network, result)
        for k, events in enumerate(result.events):
            assert len(margins[f"layers.{k}"]) == 17 * network.layers[k].units
            assert np.sum(margins[f"layers.{k}"] > 0) == len(events.values)
    with pytest.raises(ValueError, match="no recorded events and states"):
        threshold_margins(network, simulate(network, inputs(3)))
    with pytest.raises(ValueError, match="units, but that of the network has|layers, but the network has"):
        threshold_margins(drawn(), result)
