"""`eventrnn prune` and `eventrnn bench pruning`: every method runs, figures are true, invalid options are refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from eventrnn import NM, Network, convert, load, save
from eventrnn.cli import options
from eventrnn.cli.options import load_symbols
from eventrnn.cli.prune import _calibration
from eventrnn.counting.counts import count
from eventrnn.data.vocabulary import Vocabulary
from eventrnn.pruning import legal
from eventrnn.pruning.methods import METHODS as KNOWN
from eventrnn.simulation import simulate
from support.texts import TEXT

TUNING = ("--steps", 6, "--batch", 4, "--window", 8)


@pytest.fixture
def prune(cli, text, tmp_path):
    """A function that runs `eventrnn prune MODEL` with more arguments; returns (exit code, stdout, stderr)."""
    vocabulary = Vocabulary.of(TEXT)
    network = Network.random(
        [24],
        symbols=len(vocabulary),
        embedding=8,
        readout=len(vocabulary),
        rng=np.random.default_rng(0),
        threshold=0.1,
        metadata={"vocabulary": vocabulary.to_json()},
    )
    save(network, tmp_path / "model.safetensors")

    def run(*arguments, verb="prune", model="model.safetensors"):
        words = [verb, tmp_path / model, *arguments] if verb == "prune" else [verb, *arguments]
        return cli(*(str(word).format(folder=tmp_path) for word in words))

    return run


def record(result):
    code, out, err = result
    assert code == 0, err
    assert len(out.splitlines()) == 1
    return json.loads(out)


METHODS = {
    "magnitude": (),
    "movement": ("--sparsity", 0.5),
    "threshold": ("--sparsity", 0.5, "--block", "2x4"),
    "lasso": ("--sparsity", 0.5, "--block", "2x4", "--strength", 0.1),
    "iterative": ("--sparsity", 0.5, "--rounds", 2),
    "dynamic": ("--nm", "4:8:both", "--every", 2, "--mask", "greedy"),
    "regrow": ("--sparsity", 0.5, "--every", 2),
    "adaprune": ("--nm", "2:4"),
    "operations": ("--ops-budget", 0.5, "--criterion", "activity"),
}


@pytest.mark.parametrize("method", KNOWN)
def test_every_method_prunes_and_reports_what_is_in_the_file(prune, tmp_path, method):
    out = tmp_path / "out.safetensors"
    tuning = TUNING if KNOWN[method].trains else ()
    text = ("--text", "{folder}/text.txt")
    result = record(prune("--out", out, "--method", method, *METHODS[method], *tuning, *text, "--json"))
    before, after = load(tmp_path / "model.safetensors"), load(out)
    for side, network in (("before", before), ("after", after)):
        assert result[f"weights_{side}"] == sum(w.nnz for w in network.matrices().values())
    assert result["file_bytes_after"] == out.stat().st_size
    assert result["weights_after"] < 0.9 * result["weights_before"]
    assert result["effective_ops_per_step_after"] < 0.9 * result["effective_ops_per_step_before"]
    assert result["executed_ops_per_step_after"] >= result["effective_ops_per_step_after"]
    assert result["bits_after"] > 0 and result["method"] == method and not result["dry_run"]
    read = record(prune("{folder}/out.safetensors", *text, "--part", "valid", "--json", verb="run"))
    assert read["bits_per_symbol"] == result["bits_after"]
    reference = record(
        prune("{folder}/out.safetensors", *text, "--part", "valid", "--backend", "reference", "--json", verb="run")
    )
    assert reference["bits_per_symbol"] == read["bits_per_symbol"]
    if "--nm" in METHODS[method]:
        axis = "both" if method == "dynamic" else "post"
        n, m = (4, 8) if method == "dynamic" else (2, 4)
        for weights in after.matrices().values():
            assert isinstance(weights, NM) and legal(weights.to_dense() != 0, n, m, axis)


def test_dry_run_writes_nothing_and_reports_the_size(prune, tmp_path):
    there = sorted(tmp_path.iterdir())
    asked = ("--sparsity", 0.75, "--block", "1x4", "--exempt", "readout", "--json")
    told = record(prune("--dry-run", *asked))
    assert sorted(tmp_path.iterdir()) == there and told["dry_run"] and told["steps"] == 0
    # A dry run of a method that trains prunes without the training.
    trained = record(
        prune("--dry-run", "--method", "regrow", "--every", 2, *TUNING, "--text", "{folder}/text.txt", *asked)
    )
    assert trained["weights_after"] == told["weights_after"] and trained["bits_after"] > 0
    done = record(prune("--out", tmp_path / "out.safetensors", *asked))
    assert {k: v for k, v in told.items() if k != "dry_run"} == {k: v for k, v in done.items() if k != "dry_run"}
    before, after = load(tmp_path / "model.safetensors"), load(tmp_path / "out.safetensors")
    assert np.array_equal(before.readout.weights.values, after.readout.weights.values)
    code, out, _ = prune("--dry-run")
    assert code == 0 and "nothing is written" in out and "before / after" in out and "give --text" in out


@pytest.mark.parametrize("tuning", [(), (*TUNING, "--text", "{folder}/text.txt")], ids=["at once", "trained"])
def test_a_diagonal_keeps_its_share_at_once_and_trained(prune, tmp_path, tuning):
    out = tmp_path / "out.safetensors"
    told = record(prune("--out", out, "--diagonal", 4, "--exempt", "readout", *tuning, "--json"))
    assert told["format"] == "block, dense"
    for name, weights in load(out).matrices().items():
        if name != "readout":
            assert weights.block == (weights.shape[0] // 4, 6) and 4 * weights.stored == weights.shape[0] * 72


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
@pytest.mark.parametrize("tuning", [(), (*TUNING, "--text", "{folder}/text.txt")], ids=["at once", "trained"])
def test_prune_keeps_narrow_storage(prune, tmp_path, storage, tuning):
    network = load(tmp_path / "model.safetensors")
    narrow = network.with_matrices({n: convert(w, "dense", storage=storage) for n, w in network.matrices().items()})
    save(narrow, tmp_path / "narrow.safetensors")
    out = tmp_path / "out.safetensors"
    told = record(prune("--out", out, "--nm", "2:4", *tuning, "--json", model="narrow.safetensors"))
    assert told["storage"] == storage
    assert {w.storage for w in load(out).matrices().values()} == {storage}


@pytest.mark.parametrize(("kept", "given", "fixed"), [("fixed", (), 1), ("", (), 0), ("", ("fixed",), 1)])
def test_thresholds_are_learned_as_before_or_as_asked(prune, tmp_path, kept, given, fixed):
    before = load(tmp_path / "model.safetensors")
    metadata = {**before.metadata, **({"thresholds": kept} if kept else {})}
    save(replace(before, metadata=metadata), tmp_path / "model.safetensors", overwrite=True)
    asked = ("--thresholds", *given) if given else ()
    record(prune("--out", tmp_path / "new", *asked, *TUNING, "--json", "--text", tmp_path / "text.txt"))
    after = load(tmp_path / "new")
    assert np.array_equal(before.layers[0].threshold, after.layers[0].threshold) == bool(fixed)
    assert after.metadata["thresholds"] == (given[0] if given else kept or "positive")


def test_invalid_threshold_rule_in_a_file_is_an_error_of_the_file(prune, tmp_path):
    before = load(tmp_path / "model.safetensors")
    save(
        replace(before, metadata={**before.metadata, "thresholds": "learned"}),
        tmp_path / "model.safetensors",
        overwrite=True,
    )
    code, _, err = prune("--out", tmp_path / "new", *TUNING, "--text", tmp_path / "text.txt")
    assert code == 2 and "the model file says 'learned'; give --thresholds" in err


def test_a_tied_readout_is_pruned_when_it_is_untied_and_its_embedding_can_be_stored_narrow(prune, tmp_path, cli, text):
    network = load(tmp_path / "model.safetensors")
    tied = replace(
        Network.random([24, 8], symbols=28, embedding=8, tied=True, rng=np.random.default_rng(1), threshold=0.1),
        metadata=network.metadata,
    )
    save(tied, tmp_path / "tied.safetensors")
    for untie in ((), ("--untie",)):
        out = tmp_path / f"out{len(untie)}.safetensors"
        tuning = ("--sparsity", 0.5, "--text", text, *TUNING)
        record(prune(*untie, "--out", out, *tuning, "--json", model="tied.safetensors"))
        made = load(out)
        assert made.readout.tied == (not untie) and made.readout.weights.name == ("csr" if untie else "dense")
        assert np.array_equal(made.readout.weights.to_dense(), made.embedding.T) == (not untie)
    code, out, err = prune("--untie", "--out", "{folder}/no", "--sparsity", 0.5)
    assert code == 2 and not out and "is not tied; leave out --untie" in err and not (tmp_path / "no").exists()

    small = tmp_path / "small.safetensors"
    narrow = ("--storage", "int8", "--embedding", "int8", "--json")
    record(cli("convert", tmp_path / "out1.safetensors", "--out", small, *narrow))
    before = (tmp_path / "out1.safetensors").stat().st_size
    assert small.stat().st_size < before - 2 * load(small).embedding.size
    for wrong, message in (
        (("tied.safetensors", "--embedding", "int8"), "untie it first"),
        (("out1.safetensors", "--embedding", "float32"), "need one of bfloat16, int8"),
    ):
        code, out, err = cli("convert", tmp_path / wrong[0], "--out", tmp_path / "no", *wrong[1:])
        assert code == 2 and not out and message in err and not (tmp_path / "no").exists()


def test_prune_draws_the_masks(prune, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib, the plots extra")
    code, _, err = prune("--out", tmp_path / "out.safetensors", "--picture", tmp_path / "masks.png")
    assert code == 0, err
    assert (tmp_path / "masks.png").read_bytes().startswith(b"\x89PNG")


def test_prune_figure_never_overwrites_a_model(prune, tmp_path, monkeypatch):
    out, link = tmp_path / "out.png", tmp_path / "link.png"
    link.symlink_to(tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    for picture, option in ((tmp_path / "." / out.name, "out"), (link, "model")):
        code, _, err = prune("--out", out, "--picture", picture, "--force")
        assert code == 2 and f"is the file of {option}" in err and not out.exists()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    code, _, err = prune("--out", out, "--picture", tmp_path / "a.png")
    assert code == 2 and "eventrnn[plots]" in err and not out.exists()


@pytest.mark.parametrize("steps", [0, 40])
def test_a_budget_is_measured_again_after_training(prune, tmp_path, steps):
    out, text = tmp_path / "out.safetensors", ("--text", "{folder}/text.txt")
    tuning = ("--steps", steps, "--batch", 4, "--window", 8, "--learning-rate", 0.1) if steps else ()
    asked = ("--out", out, "--ops-budget", 0.5, *text, *tuning)
    told = record(prune(*asked, "--json"))
    before, after = load(tmp_path / "model.safetensors"), load(out)
    valid = _calibration(load_symbols(before, str(tmp_path / "text.txt"), "valid"))
    counts = [count(each, simulate(each, valid, record="events")).total.effective for each in (before, after)]
    assert told["budget_share"] == counts[1] / counts[0] and told["budget"] == 0.5
    assert told["budget_held"] == (counts[1] <= counts[0] / 2)
    assert steps or told["budget_held"]
    code, words, _ = prune(*asked, "--force")
    assert code == 0 and f"budget held: {'yes' if told['budget_held'] else 'no'}" in words and "50.0% asked" in words


@pytest.mark.parametrize("method", [name for name, way in KNOWN.items() if way.trains and name != "regrow"])
def test_fewest_steps_named_by_the_message_suffice(prune, tmp_path, method):
    asked = ("--sparsity", 0.5, "--steps", 2, *TUNING[2:], "--text", "{folder}/text.txt")
    every = ("--every", 1) if method == "dynamic" else ()
    assert prune("--out", tmp_path / "out.safetensors", "--method", method, *asked, *every)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nm", "5:4"), "got 5:4, need n of each m"),
        (("--nm", "2:64"), "2 <= m <= 32"),
        (("--nm", "2:4:up"), "nm axis: got 'up', need one of post, pre, both"),
        (
            ("--nm", "4:8:pre:both"),
            "nm: got '4:8:pre:both', need N:M or N:M:AXIS, such as 2:4 or 2:4:pre, with one axis of",
        ),
        (("--nm", "4:8:post:both"), "nm: got '4:8:post:both', need N:M or N:M:AXIS"),
        (("--nm", "4:8::both"), "nm: got '4:8::both', need N:M or N:M:AXIS"),
        (("--nm", "2:4", "--sparsity", 0.5), "target: got --sparsity, --nm for magnitude"),
        (
            ("--nm", "2:4", "--method", "movement", "--steps", 4),
            "target: got --nm for movement, need one of --sparsity",
        ),
        (("--nm", "2:4", "--block", "1x4"), "--block: not an option of --method magnitude with --nm; it takes --mask"),
        (("--diagonal", 2, "--nm", "2:4"), "target: got --nm, --diagonal for magnitude"),
        (("--diagonal", 0), "parts: got 0"),
        (("--diagonal", 9, "--exempt", "readout"), "parts: got 9, but layers.0.w_in has 8 inputs and 24 outputs per"),
        (
            ("--diagonal", 2, "--block", "1x4"),
            "--block: not an option of --method magnitude with --diagonal; it takes no further option",
        ),
        (("--mask", "greedy"), "--mask: not an option of --method magnitude; it takes --block"),
        (("--nm", "2:4:both", "--mask", "guess"), "method: got 'guess'"),
        (("--criterion", "activity"), "--criterion: not an option of --method magnitude; it takes --block"),
        (("--method", "sieve"), "method: got 'sieve', need one of magnitude"),
        (("--method", "dynamic", "--nm", "2:4"), "give --steps"),
        (("--method", "adaprune", "--nm", "2:4", "--steps", 3), "adaprune does not train"),
        (("--method", "operations"), "needs --ops-budget"),
        (("--ops-budget", 0), "budget: got 0"),
        (("--ops-budget", "1e-9", "--text", "{folder}/text.txt"), "of the operations remain"),
        (("--exempt", "layers.7"), "no matrix 'layers.7'"),
        (("--sparsity", 0.999, "--block", "8x24"), "leaves nothing"),
        (("--scope", "layer"), "scope"),
        (("--gates", "some"), "gates"),
        (("--rounds", 3), "--rounds: not an option of --method magnitude; it takes --block"),
        (
            ("--picture", "{folder}/text.txt"),
            "picture: got {folder}/text.txt, need a name that ends in .png, .pdf or .svg",
        ),
        (("--picture", "{folder}/old.png"), "picture: {folder}/old.png exists; use --force"),
        (("--picture", "{folder}/nowhere/a.png"), "picture: there is no folder"),
        (("--picture", "{folder}/a.png", "--dry-run"), "picture: a dry run writes nothing"),
        (("--method", "regrow", "--sparsity", 0.5, *TUNING), "every: got 40, need less than 3"),
        (("--method", "dynamic", "--nm", "2:4", "--every", 4, *TUNING), "every: got 4, need less than 4"),
        (("--method", "movement", "--steps", 1), "steps: got 1"),
        (("--thresholds", "sigmoid"), "--thresholds: only with training; give --steps"),
        (("--thresholds", "free", *TUNING), "thresholds: got 'free', need one of positive"),
    ],
)
def test_bad_input_gives_one_line_and_writes_nothing(prune, tmp_path, arguments, message):
    (tmp_path / "old.png").write_bytes(b"dear")
    code, out, err = prune("--out", tmp_path / "new", *arguments)
    errors = [line for line in err.splitlines() if line.startswith("eventrnn: error: ")]
    assert code == 2 and out == "" and len(errors) == 1
    assert message.format(folder=tmp_path) in errors[0] and (tmp_path / "old.png").read_bytes() == b"dear"
    assert not (tmp_path / "new").exists()


def test_prune_without_output_is_refused(prune):
    code, _, err = prune("--sparsity", 0.5)
    assert code == 2 and "or --dry-run" in err


def test_bench_pruning_reports_the_magnitude_that_every_method_keeps(prune):
    sizes = ("--rows", 40, "--columns", 50, "--repeats", 1, "--threads", 2)
    told = record(prune("pruning", *sizes, "--json", verb="bench"))
    assert (told["matrix"], told["nm"], told["threads"]) == ("40x50", "4:8", 2)
    assert told["masks_of_a_tile"]["transposable"] == 116_963_796_250
    methods = told["methods"]
    assert list(methods) == ["one axis", "exact", "greedy"]
    assert methods["one axis"]["of_exact"] > methods["exact"]["of_exact"] == 1 > methods["greedy"]["of_exact"]
    assert all(line["seconds"] > 0 and 0.4 < line["kept_weights"] <= 0.55 for line in methods.values())
    code, out, _ = prune("pruning", *sizes, "--methods", "greedy", "--nm", "2:4", verb="bench")
    assert code == 0 and "Meng et al. 2025" in out and "this run" in out
    for arguments, message in (
        (("--methods", "greedy,best"), "methods: got greedy, best"),
        (("--nm", "2:4:pre"), "leave the axis out"),
        (("--rows", 0), "rows: got 0"),
        (("--nm", "9:8"), "got 9:8"),
    ):
        code, _, err = prune("pruning", *arguments, verb="bench")
        assert code == 2 and message in err
