"""The scripts in experiments/: cases are valid, nothing is measured twice, figures need the lines only."""

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from eventrnn import bench, load
from eventrnn.data.text import from_path
from support.scripts import EXPERIMENTS, script


def line(case, **changes):
    """A line of the benchmark for a case, with invented figures."""
    times = {"us_per_step": 20.0, "against_us_per_step": 1000.0, "speedup": 50.0, "against_variant": "torch"}
    work = {"executed_per_step": 100_000.0, "bytes_per_step": 400_000.0, "gflop_s": 10.0, "fma_gflop_s": 180.0}
    rates = {"bandwidth_gb_s": 20.0, "probe_gb_s": 25.0, "bandwidth_fraction": 0.8}
    return times | work | rates | {"device": bench.device()} | bench.Case(**case).record() | changes


@pytest.fixture
def timing(monkeypatch):
    """The bench script on a clean commit, with a benchmark that only records the cases it is called with."""
    module, asked = script("bench", monkeypatch), []

    def inference(**case):
        asked.append(case)
        if case.get("batch") == 80:
            raise RuntimeError("too noisy")
        return line(case)

    monkeypatch.setattr(module.bench, "inference", inference)
    monkeypatch.setattr(module, "commit", lambda: "abc1234")

    def run(*arguments):
        asked.clear()
        result = CliRunner().invoke(module_app(module), [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, list(asked)

    return run, module, monkeypatch


def module_app(module):
    import typer

    app = typer.Typer()
    app.command()(module.main)
    return app


def test_every_case_is_valid_and_has_a_unique_name(monkeypatch):
    module = script("bench", monkeypatch)
    rows = module.acceptance() + module.readme() + module.grid()
    assert len({row.name for row in rows}) == len(rows)
    assert module.impossible(rows) == {}
    assert len(module.grid()) == 6 * 4 * 2
    assert module.impossible([module.Row("odd", {"format": "sieve"})])["odd"].startswith("format: got 'sieve'")


def test_lines_are_appended_as_they_are_measured_and_never_twice(timing, tmp_path):
    run, _, _ = timing
    path = tmp_path / "lines.jsonl"
    code, out, asked = run("--only", "layer, dense", "--results", path)
    # 1 and 2 threads, whole sequences and single steps. The share of the probe is in the lines of the sequences.
    assert code == 0 and len(asked) == 4 and len(path.read_text().splitlines()) == 4
    assert out.count("pass") == 4 and out.count("short by") == 2
    written = [json.loads(each) for each in path.read_text().splitlines()]
    assert all(each["commit"] == "abc1234" and each["time"] for each in written)
    assert run("--only", "layer, dense", "--results", path)[2] == []
    assert len(run("--only", "layer, dense", "--results", path, "--again")[2]) == 4
    code, out, asked = run("--only", "layer, dense", "--results", path, "--table")
    assert (code, asked, out.count("pass")) == (0, [], 4)


def test_another_commit_device_or_a_changed_tree_is_measured_again(timing, tmp_path):
    run, module, monkeypatch = timing
    path = tmp_path / "lines.jsonl"
    arguments = ("--only", "layer, 90 % of 1x16", "--results", path)
    assert len(run(*arguments)[2]) == 1
    assert len(run(*arguments)[2]) == 0
    monkeypatch.setattr(module.bench, "device", lambda: "another machine")
    assert len(run(*arguments)[2]) == 1
    monkeypatch.setattr(module, "commit", lambda: "def5678-changed")
    assert [len(run(*arguments)[2]) for _ in range(2)] == [1, 1]


def test_a_case_that_fails_is_named_and_the_others_go_on(timing, tmp_path):
    run, _, _ = timing
    code, out, asked = run("--only", "1 thread", "--results", tmp_path / "lines.jsonl")
    batches = [case.get("batch", 1) for case in asked]
    assert code == 1 and batches.count(80) == 3 and batches.count(20) == 3 and out.count("too noisy") >= 3
    assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == len(asked) - 3


def test_only_the_grid_fills_the_map(timing, tmp_path):
    run, module, _ = timing
    path = tmp_path / "lines.jsonl"
    _, _, asked = run("--grid", "--only", "grid: batch 1,", "--results", path)
    assert len(asked) == 24 and {case["repeats"] for case in asked} == {module.GRID_REPEATS}


def test_commit_is_of_the_package_not_of_the_results(monkeypatch):
    module, calls = script("records", monkeypatch), []

    class Done:
        stdout = "abc1234\n"

    def run(arguments, **options):
        calls.append(arguments)
        return Done()

    monkeypatch.setattr(module.subprocess, "run", run)
    assert module.commit() == "abc1234-changed"  # the status that git prints is not empty
    assert all(arguments[-1] == "eventrnn" for arguments in calls)


def test_figures_need_the_lines_only(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the plots extra")
    timed, drawn = script("bench", monkeypatch), script("plots", monkeypatch)
    rows = timed.readme() + timed.grid()
    old = {"commit": "0ld", "device": "another", "us_per_step": 1.0}
    lines = [old, *(line(row.case, commit="abc1234") for row in rows)]
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    drawn.main(path, tmp_path / "figures")
    out = capsys.readouterr().out
    assert "batch 1, 24 cells, batch 20, 24 cells" in out
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {"speedup.png", "roofline.png"}
    names = [point["name"] for point in drawn.points(drawn.latest(lines[1:])) if point["name"]]
    assert len(names) == len(set(names)) == len(timed.readme())
    assert {"layer 1350, 1x64 90% pruned, 10% active, paper", "layer 1350, 2:4 50% pruned, 10% active"} <= set(names)

    path.write_text("".join(json.dumps(each) + "\n" for each in lines[:4]))
    drawn.main(path, tmp_path / "figures")
    assert "speedup.png: not drawn" in capsys.readouterr().out
    path.write_text(json.dumps(old) + "\n")
    with pytest.raises(ValueError, match="no lines of this version"):
        drawn.main(path, tmp_path / "figures")


def test_lines_of_another_device_or_case_do_not_count(monkeypatch, tmp_path):
    module = script("records", monkeypatch)
    monkeypatch.setattr(module, "commit", lambda: "abc1234")
    records = module.Records(tmp_path / "deep" / "lines.jsonl", ("way", "share"))
    asked = {"way": "greedy", "share": 0.5}
    assert records.of(asked) is None
    records.add(asked | {"bits": float("inf"), "note": 1})
    line = records.of(asked)
    assert (line["commit"], line["bits"], line["device"]) == ("abc1234", None, bench.device())
    again = module.Records(tmp_path / "deep" / "lines.jsonl", ("way", "share"))
    assert again.of(asked) == line and again.of(asked | {"share": 0.6}) is None
    again.device = "another machine"
    assert again.of(asked) is None
    again.as_last()
    assert again.of(asked) == line


def test_every_training_case_gets_one_line_per_commit(monkeypatch, tmp_path):
    module, asked, path = script("bench_training", monkeypatch), [], tmp_path / "lines.jsonl"
    each = {"ms_per_iteration": 10.0, "speedup": 2.0}

    def training(*, sparsity, against, repeats, **case):
        asked.append(bench.TrainingCase(sparsity=sparsity, against=against, **case))
        nm = case["nm"] and ":".join(map(str, case["nm"]))
        line = case | {"nm": nm, "sparsity_asked": sparsity, "repeats": repeats, "open": 0.1}
        work = {"ms_per_iteration": 5.0, "executed_per_iteration": 1e6, "dense_per_iteration": 1e8}
        return line | work | {"against_each": dict.fromkeys(against.split(","), each)}

    monkeypatch.setattr(module.bench, "training", training)
    run = lambda *more: CliRunner().invoke(module_app(module), ["--results", str(path), *more])  # noqa: E731
    assert run().exit_code == 0 and len(asked) == len(module.CASES) == len(path.read_text().splitlines())
    assert run().stdout.count("1.0% of dense") == len(module.CASES) and len(asked) == len(module.CASES)
    assert run("--table").stdout.count("2.00") == sum(len(baselines) for *_, baselines in module.CASES)
    assert run("--again").exit_code == 0 and len(asked) == 2 * len(module.CASES)
    found = run("--again", "--only", "batch 80, 90% pruned, 1 threads", "--baselines", "torch-loop")
    assert found.exit_code == 0 and len(asked) == 2 * len(module.CASES) + 1
    assert (asked[-1].batch, asked[-1].threads, asked[-1].against) == (80, 1, "torch-loop")
    # That line has one baseline: it serves who asks for that one, and nobody else.
    assert run("--only", "batch 80, 90% pruned, 1 threads", "--baselines", "torch-loop").exit_code == 0
    assert len(asked) == 2 * len(module.CASES) + 1
    assert run().exit_code == 0 and len(asked) == 2 * len(module.CASES) + 2 and asked[-1].against == "torch"
    assert run("--only", "batch 81").exit_code == 2 and len(asked) == 2 * len(module.CASES) + 2


def test_only_the_layers_that_are_asked_for_are_timed_beside_cudnn(monkeypatch, tmp_path):
    module, asked = script("every_cudnn", monkeypatch), []
    timed = {"us_per_step": 1.0, "against_us_per_step": 2.0, "against_variant": "GRU", "speedup": 2.0}
    monkeypatch.setattr(module.bench, "inference", lambda **case: asked.append(case) or timed)
    run = lambda *more: CliRunner().invoke(module_app(module), ["--results", str(tmp_path / "lines"), *more])  # noqa: E731
    assert run("--hidden", "768", "--hidden", "1344", "--batch", "1", "--format", "block").exit_code == 0
    assert [(case["hidden"], case["batch"], case["format"]) for case in asked] == [
        (768, 1, "block"),
        (1344, 1, "block"),
    ]
    assert run("--format", "csr").exit_code == 2 and len(asked) == 2


def test_adding_marks_one_number_per_half_and_a_run_appends_its_line(monkeypatch, tmp_path):
    module = script("sequences", monkeypatch)
    part = module.Adding(10).batch(3, 1, 50, 0)
    assert part.inputs.shape == (10, 50, 2) and (part.inputs[:5, :, 1].sum(axis=0) == 1).all()
    assert (part.inputs[5:, :, 1].sum(axis=0) == 1).all()
    assert ((part.inputs[..., 0] * part.inputs[..., 1]).sum(axis=0)[:, None] == part.targets).all()
    assert (module.Adding(10).batch(3, 1, 50, 0).inputs == part.inputs).all()
    options = [
        "--hidden",
        "5",
        "--steps",
        "3",
        "--length",
        "8",
        "--runs",
        tmp_path,
        "--results",
        tmp_path / "lines.jsonl",
    ]
    for lines in (1, 2):
        result = CliRunner().invoke(module_app(module), [str(each) for each in ("adding", *options)])
        assert result.exit_code == 0, result.output
        assert len((tmp_path / "lines.jsonl").read_text().splitlines()) == lines
    first, again = map(json.loads, (tmp_path / "lines.jsonl").read_text().splitlines())
    assert first["loss"] == again["loss"] and first["steps"] == 3, "a finished run is not trained again"
    assert CliRunner().invoke(module_app(module), ["parity"]).exit_code


@pytest.mark.parametrize("data", ["bars", "chirps"])
def test_events_classifies_and_a_run_appends_its_line(monkeypatch, tmp_path, data):
    module = script("events", monkeypatch)
    monkeypatch.setattr(module, "SIZES", (8, 4, 4))
    options = ["--hidden", "4", "--epochs", "1", "--batch", "4", "--window", "50000", "--runs", tmp_path]
    asked = [str(each) for each in ("classify", data, *options, "--results", tmp_path / "lines.jsonl")]
    result = CliRunner().invoke(module.app, asked)
    assert result.exit_code == 0, result.output
    line = json.loads((tmp_path / "lines.jsonl").read_text())
    assert line["recordings"] == [8, 4, 4] and 0 <= line["test_accuracy"] <= 1 and line["fewer"] > 1
    assert CliRunner().invoke(module.app, ["classify", "no-such-data"]).exit_code


def test_events_decodes_step_by_step_as_in_one_run(monkeypatch, tmp_path):
    module = script("events", monkeypatch)
    monkeypatch.setattr(module, "DECODED", (2100, 50, 60))
    options = ["--hidden", "4", "--epochs", "1", "--runs", tmp_path, "--results", tmp_path / "lines.jsonl"]
    result = CliRunner().invoke(module.app, ["decode", *map(str, options)])
    assert result.exit_code == 0, result.output
    line = json.loads((tmp_path / "lines.jsonl").read_text())
    assert line["steps_equal_the_whole_run"] and line["fewer"] > 1
    assert -1 < line["explained"] < line["explained_by_linear_decoder"] < 1


def test_words_trains_the_egru_and_the_gru(monkeypatch, tmp_path):
    module = script("words", monkeypatch)
    for part in ("train", "valid", "test"):
        (tmp_path / f"{part}.txt").write_text("a b c d\nd c b a\n" * (200 if part == "train" else 5))
    options = ["--hidden", "6", "--epochs", "1", "--runs", tmp_path / "runs", "--results", tmp_path / "lines.jsonl"]
    result = CliRunner().invoke(module_app(module), [str(each) for each in (tmp_path, *options)])
    assert result.exit_code == 0, result.output
    lines = [json.loads(each) for each in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [each["model"] for each in lines] == ["egru", "gru"] and lines[1]["activity"] > 0.99
    assert all(each["perplexity_test"] > 1 and each["curve"] for each in lines)


def test_the_page_of_results_is_generated_from_the_lines(monkeypatch):
    module = script("tables", monkeypatch)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python experiments/tables.py"


def test_a_table_names_the_commit_of_every_row_and_the_machine_of_every_line(monkeypatch):
    module = script("tables", monkeypatch)
    lines = [{"commit": c, "device": d, "versions": {"numpy": "2.0"}} for c, d in (("a1", "one"), ("b2", "two"))]
    text = module.table(("case", "ms"), [(("first", "1.0"), lines[:1]), (("second", "2.0"), lines)])
    assert "| first | 1.0 | a1 |" in text and "| second | 2.0 | a1, b2 |" in text
    assert "Measured on one; numpy 2.0." in text and "Measured on two; numpy 2.0." in text
    found = module.last(
        [{"batch": 1, "id": 0}, {"batch": 1, "id": 1}, {"batch": 1, "exact": False}], batch=1, exact=True
    )
    assert found == {"batch": 1, "id": 1} and module.last([], batch=1) is None


@pytest.fixture
def drawing(monkeypatch):
    """The script that draws figures."""
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the plots extra")
    return script("plots", monkeypatch)


def labels(figure):
    """Every label of an axis."""
    return {text for axes in figure.axes for text in (axes.get_xlabel(), axes.get_ylabel())}


def test_speedup_map_writes_every_number_into_its_cell(drawing):
    panels = {"batch 1": {(0.1, 0.9): 41.2, (0.5, 0.9): 9.94, (0.1, 0.0): 5.5}, "batch 20": {(1.0, 0.0): 0.514}}
    figure = drawing.speedup_map(panels, title="Faster")
    first, second, bar = figure.axes
    assert [text.get_text() for text in first.texts] == ["5.5", "41", "9.9"]
    assert [text.get_text() for text in second.texts] == ["0.51"]
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["10", "50", "100"]
    assert [tick.get_text() for tick in first.get_yticklabels()] == ["0", "90"]
    (mesh,) = first.collections
    powers = np.ma.masked_array(np.log10([[5.5, 1, 1], [41.2, 9.94, 1]]), [[0, 1, 1], [0, 0, 1]])
    assert np.array_equal(mesh.get_array().mask, powers.mask) and (mesh.get_array() == powers).all()
    assert mesh.norm(0) == 0.5, "white is where both sides are equally fast"
    assert {"activity (%)", "sparsity (%)", "times faster"} <= labels(figure)
    assert (first.get_title(loc="left"), figure.get_suptitle()) == ("batch 1", "Faster")


@pytest.mark.parametrize("value", [0, -1, float("nan"), None])
def test_speedup_map_refuses_values_that_are_no_ratios(drawing, value):
    with pytest.raises(ValueError, match="panels: need at least one measured pair"):
        drawing.speedup_map({"batch 1": {} if value is None else {(0.1, 0.9): value}})


def case(**changes):
    figures = {"gflop_s": 12.0, "bandwidth_gb_s": 24.0, "probe_gb_s": 30.0, "fma_gflop_s": 180.0, "group": "dense"}
    return figures | changes


def test_roofline_places_cases_under_both_limits(drawing):
    cases = [case(name="one"), case(group="block", gflop_s=90.0, bandwidth_gb_s=10.0, name="two"), case(gflop_s=6.0)]
    figure = drawing.roofline(cases, title="Limits")
    left, right = figure.axes
    spots = np.concatenate([marks.get_offsets() for marks in left.collections[1:]])
    assert spots.tolist() == [[0.5, 12], [0.25, 6], [9, 90]]
    (roof,) = left.lines
    x, y = roof.get_data()
    assert np.array_equal(y, np.minimum(30 * x, 180))
    assert [bar.get_width() for bar in right.patches] == [100 * 10 / 30, 100 * 24 / 30]
    assert [tick.get_text() for tick in right.get_yticklabels()] == ["two", "one"]
    assert [text.get_text() for text in right.texts] == ["10 GB/s, 90 GFLOP/s", "24 GB/s, 12 GFLOP/s"]
    words = [text.get_text() for text in left.get_legend().get_texts()]
    assert words[-2:] == ["dense", "block"] and "180 GFLOP/s" in words[1]
    assert {"operations per byte of weights (FLOP/B)", "GFLOP/s", "share of the limit (%)"} <= labels(figure)


def test_roofline_without_names_has_one_panel_and_without_cases_none(drawing):
    assert len(drawing.roofline([case()]).axes) == 1
    with pytest.raises(ValueError, match="cases: got none"):
        drawing.roofline([])


def test_pruning_curves(drawing, tmp_path):
    panels = {"one": {"1x1": [(0.9, 80.0), (0.5, 60.0)], "4x4": [(0.5, 70.0)]}, "two": {"1x1": [(0.5, 65.0)]}}
    figure = drawing.pruning_curves(panels, 62.0, title="cost", path=tmp_path / "curves.png")
    left, right = figure.axes
    assert [line.get_xdata().tolist() for line in left.lines[1:]] == [[50, 90], [50]]
    assert [line.get_ydata().tolist() for line in left.lines[1:]] == [[60, 80], [70]]
    assert len(right.lines) == 2 and set(left.lines[0].get_ydata()) == {62.0}
    assert left.get_yscale() == "log" and (tmp_path / "curves.png").stat().st_size > 0
    for bad, dense in (({}, 1.0), ({"a": {"b": []}}, 1.0), (panels, float("nan"))):
        with pytest.raises(ValueError, match="panels"):
            drawing.pruning_curves(bad, dense)


def test_robustness_campaign_finds_faults_of_the_loader_and_no_others(monkeypatch, tmp_path):
    module = script("robustness", monkeypatch)
    files, path = module.originals(), str(tmp_path / "model")
    found = [module.tried(number, 0, files, path) for number in range(120)]
    assert {fault for _, fault in found} == {""}
    assert {outcome for outcome, _ in found} >= {"raw, refused", "signed, refused", "signed, loaded"}
    assert found == [module.tried(number, 0, files, path) for number in range(120)], "a number stands for one file"

    def careless(path):
        raise TypeError("'int' object is not iterable")

    monkeypatch.setattr(module, "load", careless)
    assert {fault for _, fault in (module.tried(number, 0, files, path) for number in range(4))} == {
        "TypeError: 'int' object is not iterable"
    }


TINY = ("--set", "model.hidden=[8, 6]", "--set", "model.embedding=6", "--set", "training.batch=4")

# Without the penalty of the preset, which may silence a layer of so few units.
UNPENALISED = ("--set", "training.regularisers.activity_rate=0", "--set", "training.thresholds=fixed")


@pytest.fixture
def words(tmp_path):
    """A folder with three short texts of words."""
    folder = tmp_path / "text"
    folder.mkdir()
    for part, repeats in (("train", 150), ("valid", 20), ("test", 20)):
        (folder / f"{part}.txt").write_text("a b c d e\nd c b a\ne e a\n" * repeats)
    return folder


def test_ptb_model_is_evaluated_pruned_tuned_compared_and_drawn(monkeypatch, tmp_path, words, cli):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the plots extra")
    module, results = script("ptb", monkeypatch), tmp_path / "lines.jsonl"
    monkeypatch.setattr(module, "CALIBRATION", (60, 4))
    monkeypatch.setattr(module, "ADDED", (0.0, 0.2))
    monkeypatch.setattr(module, "DENSITIES", (1.0, 0.4))
    dense, pruned, tuned = (tmp_path / f"{name}.safetensors" for name in ("dense", "pruned", "tuned"))
    train = ("train", "--preset", "egru-ptb", "--text", words, "--out", dense, "--epochs", 2, *TINY, *UNPENALISED)
    assert cli(*train)[0] == 0

    def run(*arguments):
        given = [str(each) for each in (*arguments, "--results", results)]
        outcome = CliRunner().invoke(module.app, given)
        assert outcome.exit_code == 0, outcome.output
        return json.loads(results.read_text().splitlines()[-1])

    text = ("--text", words)
    first, of_run = (run("evaluate", each, *text) for each in (dense, f"{dense}.run"))
    assert first["tied"] and first["valid"]["perplexity"] == of_run["valid"]["perplexity"] and "test" not in first
    assert first["valid"]["dense"] == 24 * 6 + 24 * 8 + 18 * 8 + 18 * 6 + 6 * 6
    assert first["parameters"] == first["weights"] + 2 * 24 + 8 + 2 * 18 + 6 + 6, "a tied embedding counts once"

    budget = 0.5 * first["valid"]["effective"]
    line = run("prune", dense, *text, "--operations", budget, "--block", "1x2", "--out", pruned)
    assert line["measured"] <= budget and line["pruned"] == "1x2" and not line["tied"]
    assert line["density_by_matrix"]["readout"] < 1 and line["density"] < 1
    refitted, kept = tmp_path / "refitted.safetensors", load(pruned)
    line = run("prune", dense, *text, "--operations", budget, "--block", "1x2", "--refit", 240, "--out", refitted)
    assert line["refit"] == 240 and line["measured"] > 0
    for matrix, w in load(refitted).matrices().items():
        old, new = kept.matrices()[matrix].to_dense(), w.to_dense()
        assert w.name == "block" and not new[old == 0].any() and not np.array_equal(old, new), matrix
    outcome = CliRunner().invoke(
        module.app, ["prune", str(dense), *text, "--operations", "9", "--refit", "3", "--out", str(tmp_path / "x")]
    )
    assert isinstance(outcome.exception, ValueError) and "refit" in str(outcome.exception)
    line = run("tune", pruned, f"{dense}.run", *text, "--epochs", 1, "--out", tuned)
    before, after = load(pruned), load(tuned)
    for name, w in after.matrices().items():
        kept = before.matrices()[name].to_dense() != 0
        assert w.name == "block" and not w.to_dense()[~kept].any(), name
    assert not np.array_equal(after.embedding, before.embedding)
    gradual = tmp_path / "gradual.safetensors"
    kept = ("--kept", "readout=0.75", "--kept", "layers.1.w_in=1", "--until", 0.4)
    block = ("--sparsity", 0.6, "--block", "1x2", *kept)
    line = run("tune", dense, f"{dense}.run", *text, "--epochs", 1, "--out", gradual, *block)
    densities = line["density_by_matrix"]
    assert not line["tied"] and line["pruned"] == "1x2" and densities.pop("layers.1.w_in") == 1
    assert 0.65 < densities.pop("readout") < 0.85
    assert 0.35 < sum(load(gradual).matrices()[name].nnz for name in densities) / (24 * 6 + 24 * 8 + 18 * 6) < 0.45
    for bad in (("--kept", "readout"), ("--kept", "w=0.5"), ("--kept", "readout=0"), ("--until", 1)):
        outcome = CliRunner().invoke(
            module.app, [str(each) for each in ("tune", dense, f"{dense}.run", *text, "--out", "x", *block, *bad)]
        )
        assert isinstance(outcome.exception, ValueError) and bad[0][2:] in str(outcome.exception)
    shares = ("--tied", "--sparsity", 0.5, "--until", 0.4, "--kept", "embedding=0.34", "--kept", "layers.0.w_in=0.8")
    options = (*text, "--epochs", 1, "--out", tmp_path / "tied.safetensors", *shares)
    line = run("tune", dense, f"{dense}.run", *options, "--teacher", dense, "--distillation", 0.5)
    both = load(tmp_path / "tied.safetensors")
    assert both.metadata["teacher"] == dense.name
    assert line["distillation"] == 0.5 and line["teacher"] == dense.name
    assert line["tied"] and line["kept"] == {"embedding": 0.34, "layers.0.w_in": 0.8} and both.readout.tied
    assert set((both.embedding != 0).sum(axis=1)) == {2} and both.readout.weights.name == "csr"
    assert line["parameters"] == line["weights"] + 2 * 24 + 8 + 2 * 18 + 6 + 6, "a pruned embedding counts what is left"
    found = run("evaluate", tmp_path / "tied.safetensors", *text, "--name", "tied")["valid"]
    assert found["effective_by_matrix"]["layers.0.w_in"] < 0.5 * 24 * 6, "an input has 2 of 6 values"
    line = run(
        "tune",
        tmp_path / "tied.safetensors",
        f"{dense}.run",
        *text,
        "--epochs",
        1,
        "--out",
        tmp_path / "on.safetensors",
    )
    again = load(tmp_path / "on.safetensors")
    assert line["tied"] and np.array_equal(again.embedding != 0, both.embedding != 0), "masks stay"
    for bad, words in (
        (("--tied",), "tied: got True, but only --sparsity"),
        (("--tied", "--sparsity", 0.5, "--kept", "readout=0.5"), "readout=0.5"),
        (("--distillation", 0.5), "distillation weight: got 0.5 without a teacher"),
        (("--teacher", tmp_path / "nowhere.safetensors", "--distillation", 0.5), "nowhere.safetensors"),
    ):
        outcome = CliRunner().invoke(
            module.app, [str(each) for each in ("tune", dense, f"{dense}.run", *text, "--out", "x", *bad)]
        )
        assert isinstance(outcome.exception, ValueError) and words in str(outcome.exception)
    names = ("embedding", *(f"layers.{k}.{kind}" for k in range(2) for kind in ("w_in", "w_rec")))
    every = [each for name in names for each in ("--kept", f"{name}=0.67")]
    line = run(
        "tune", dense, f"{dense}.run", *text, "--epochs", 1, "--out", tmp_path / "all.safetensors", *shares[:5], *every
    )
    assert all(0.6 < share < 0.75 for share in line["density_by_matrix"].values())
    line = run("evaluate", tuned, *text, "--test", "--name", "tuned")
    assert line["test"]["tokens"] == 20 * 15 and line["valid"]["perplexity"] > 1
    without = line["test"]["effective"] - line["test"]["effective_by_matrix"]["readout"]
    assert line["test"]["effective_without_decoder"] == without

    folded = run("evaluate", tuned, *text, "--test", "--fold")
    assert folded["name"] == f"{tuned.name}, folded" and folded["folded"] and not line["folded"]
    assert folded["test"]["perplexity"] == line["test"]["perplexity"] and folded["weights"] == line["weights"]
    assert folded["test"]["executed"] < line["test"]["executed"] and folded["folded_bytes"] > 4 * 6 * 24
    assert folded["test"]["dense"] == first["valid"]["dense"] - 24 * 6 + 24
    for key in ("readout", "layers.1.w_in"):
        assert folded["test"]["effective_by_matrix"][key] == line["test"]["effective_by_matrix"][key]
    for fold in ((), ("--fold",)):
        line = run("twin", tuned, *text, *fold)
        assert line["equal"] and line["compared"] == 14 * 300 and line["folded"] == bool(fold)
    line = run("grid", tuned, *text, "--limit", 100)
    points = [each for each in map(json.loads, results.read_text().splitlines()) if each["what"] == "grid"]
    grid = {(added, kept) for added in (0.0, 0.2) for kept in (1.0, 0.4)}
    assert len(points) == 4 and {(each["added"], each["kept"]) for each in points} == grid
    line = run("grid", tuned, *text, "--limit", 100, "--only", "--name", "pruned in training")
    assert (line["added"], line["kept"]) == (0.0, 1.0) and line["effective"] == points[0]["effective"]
    run("draw")
    assert {path.name for path in tmp_path.glob("*.png")} == {"ptb.png", "ptb_grid.png"}


def test_ptb_twin_reports_the_first_difference(monkeypatch, tmp_path, words):
    module = script("ptb", monkeypatch)
    network = module.er.Network.random(
        [5], rng=np.random.default_rng(0), symbols=6, embedding=4, readout=6, threshold=0.1
    )
    corpus = from_path(words, kind="word")
    network = module.replace(network, metadata={"vocabulary": corpus.vocabulary.to_json()})
    module.er.save(network, tmp_path / "m.safetensors")
    other = module.replace(network, embedding=network.embedding * np.float32(1.5))
    monkeypatch.setattr(module.er.Network, "dense", lambda self: other)
    arguments = ["twin", str(tmp_path / "m.safetensors"), "--text", str(words), "--results", str(tmp_path / "l.jsonl")]
    outcome = CliRunner().invoke(module.app, arguments)
    assert outcome.exit_code == 1 and "differ first at step 0, layer 0" in outcome.output
    assert not (tmp_path / "l.jsonl").exists()


def test_ptb_gru_is_pruned_and_its_operations_are_its_weights(monkeypatch, tmp_path, words, cli):
    module, results = script("ptb", monkeypatch), tmp_path / "lines.jsonl"
    folder = tmp_path / "gru"
    assert cli("train", "--preset", "awd-gru", "--text", words, "--run", folder, "--epochs", 1, *TINY)[0] == 0
    lines = []
    for share in (0.0, 0.5):
        given = ["evaluate", folder, "--text", words, "--sparsity", share, "--results", results]
        outcome = CliRunner().invoke(module.app, [str(each) for each in given])
        assert outcome.exit_code == 0, outcome.output
        lines.append(json.loads(results.read_text().splitlines()[-1]))
    dense, pruned = lines
    assert dense["weights"] == dense["valid"]["dense"] == dense["valid"]["effective"]
    assert pruned["weights"] == pruned["valid"]["effective"] == dense["weights"] // 2
    assert pruned["valid"]["perplexity"] != dense["valid"]["perplexity"] > 1


@pytest.fixture
def latency(monkeypatch, tmp_path):
    """The script of latencies with models of a few units, and a function that runs it and returns its line."""
    module, results = script("ptb_latency", monkeypatch), tmp_path / "lines.jsonl"
    monkeypatch.setattr(module, "WORDS", 30)
    monkeypatch.setattr(module, "EGRU", (8, (12, 12, 8)))
    monkeypatch.setattr(module, "AWD_LSTM", (8, (12, 12, 8)))

    def run(*arguments):
        options = ("--random", 0.5, "--tokens", 20, "--repeats", 1, "--results", results)
        outcome = CliRunner().invoke(module_app(module), [str(each) for each in (*options, *arguments)])
        assert outcome.exit_code == 0, outcome.output
        return json.loads(results.read_text().splitlines()[-1]), outcome.stdout

    return run


def test_latency_without_torch_names_what_is_missing(latency, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    line, shown = latency()
    assert list(line["ms_per_token"]) == ["ours", "ours, dense", "ours, BLAS"]
    assert set(line["missing"]) == {"LSTM", "GRU", "LSTM, int8", "GRU, int8"}
    assert "torch is not installed" in shown and "random weights" in line["weights"]
    assert 0 < line["effective"] <= line["executed"] < line["dense"] == 36 * (8 + 12) + 36 * 24 + 24 * 20 + 8 * 30
    folded, shown = latency("--fold")
    assert list(folded["ms_per_token"]) == ["ours", "ours, factors", "ours, dense", "ours, BLAS"]
    assert folded["folded"] and folded["name"].endswith(", folded") and "ours, factors" in shown
    assert folded["dense"] == line["dense"] - 36 * 8 + 36


@pytest.mark.torch
def test_latency_times_the_models_of_torch(latency):
    pytest.importorskip("torch", reason="compares with PyTorch")
    line, _ = latency()
    assert {"LSTM", "GRU"} <= set(line["ms_per_token"])
    names = set(line["ms_per_token"]) | set(line["missing"])
    assert names == {"ours", "ours, dense", "ours, BLAS", "LSTM", "GRU", "LSTM, int8", "GRU, int8"}
    assert list(line["ms_per_token"]["LSTM"]) == ["sequence", "token", "token, cells"]
    for way in ("sequence", "token"):
        for name, ratio in line["times_faster"][way].items():
            ways = line["ms_per_token"][name].items()
            fastest = min(each["ms"] for kind, each in ways if kind.startswith(way))
            assert ratio == fastest / line["ms_per_token"]["ours"][way]["ms"]


def test_the_help_of_a_script_is_its_docstring_and_keeps_the_lines_of_examples_and_lists(monkeypatch):
    module = script("command_line", monkeypatch)
    story = "Words.\n\n    python one.py  # one\n    python two.py\n\nProse of\ntwo lines.\n\n- one\n- two"

    def main() -> None:
        """A line that is not shown."""

    found = CliRunner().invoke(module.command(main, story), ["--help"]).stdout
    assert "    python one.py  # one\n      python two.py\n" in found
    assert "Prose of two lines." in found and "- one\n  - two\n" in found and "not shown" not in found
    scripts = [path for path in EXPERIMENTS.glob("*.py") if '__name__ == "__main__"' in path.read_text()]
    assert scripts and all("from command_line import command" in path.read_text() for path in scripts)
