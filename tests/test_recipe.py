"""Recipes: presets, TOML round trips, refusals that name the key, and training from the command line."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

from eventrnn import Cell, load
from eventrnn._files import locked
from eventrnn.training import Stopped, read_log
from eventrnn.training.recipes.pruning import PruningRecipe
from eventrnn.training.recipes.recipe import Recipe, load_recipe, presets, train
from eventrnn.training.recipes.run_folder import RunSettings
from eventrnn.training.recipes.toml_config import from_table, merged, parse_setting, read_toml, to_toml
from support.texts import TEXT

SMALL = ("--hidden", 12, "--embedding", 5, "--batch", 4, "--window", 8, "--steps", 20)


@pytest.mark.parametrize("name", presets())
def test_presets_are_valid_and_survive_toml(name, tmp_path, text):
    words = {"characters": []}.get(name, [("data.text", str(text))])
    recipe = load_recipe(preset=name, settings=words)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(recipe))
    assert load_recipe(path) == recipe
    assert from_table(Recipe, read_toml(to_toml(recipe), path)) == recipe


def test_published_recipes_hold_the_published_settings():
    # With "clamped" and a rate of 0 thresholds stay as with "fixed", but their gradient is clipped with the others.
    for name, batch, epochs, rate, decay, late, thresholds in (
        ("egru-ptb", 64, 1000, 1.2e-3, 0.10, 0.7, "clamped"),
        ("egru-wt2", 128, 800, 1.0e-3, 0.12, 0.5, "fixed"),
    ):
        recipe = load_recipe(preset=name, settings=[("data.text", "anything")])
        training, noise = recipe.training, recipe.training.regularisers
        assert (training.batch, training.epochs, training.learning_rate) == (batch, epochs, rate)
        assert (training.weight_decay, training.schedule.constant, training.schedule.final) == (decay, late, 0)
        assert (training.optimiser.beta1, training.clip, training.clip_layers) == (0, 0.1, 0.1)
        assert (noise.dropconnect, noise.dropout_words, noise.dropout_top) == (0.7, 0.1, 0.5)
        assert recipe.model.hidden == (1350, 1350, 750) and training.thresholds == thresholds
        assert thresholds == "fixed" or training.optimiser.threshold_rate == 0


def test_the_seed_and_thresholds_determine_the_network(text):
    base = [("data.text", str(text)), ("model.hidden", [30, 20])]
    for start, value, expected in (
        ("constant", 0.25, [{0.25}, {0.25}]),
        ("constant", [0.25, 0.5], [{0.25}, {0.5}]),
        ("beta", 0.3, None),
    ):
        chosen = [*base, ("model.threshold", value), ("model.threshold_start", start)]
        one, two = (load_recipe(settings=chosen).trainer()[0].model.network() for _ in "ab")
        thresholds = [layer.threshold for layer in one.layers]
        assert all(np.array_equal(a.threshold, b.threshold) for a, b in zip(one.layers, two.layers, strict=True))
        if expected:
            assert [set(t.tolist()) for t in thresholds] == expected
        else:
            assert all(len(set(t.tolist())) > 15 and 0 < t.min() < t.max() < 1 for t in thresholds)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[training]\nlerning_rate = 1", "unknown key training.lerning_rate; did you mean training.learning_rate?"),
        ("[training.regulariser]\nzoneout = 0.1", "did you mean training.regularisers?"),
        ("[training]\nzoneout = 0.1", "did you mean training.regularisers.zoneout?"),
        ("hidden = [3]", "did you mean model.hidden?"),
        ("[training]\nbatch = 'many'", "training.batch: got 'many', need a whole number"),
        ("[training]\nbatch = true", "training.batch: got True, need a whole number"),
        ("[training]\nbatch = 2.5", "training.batch: got 2.5"),
        ("[training]\nbatch = 0", "training: batch: got 0"),
        ("[model]\nhidden = 3", "model.hidden: got 3, need a list"),
        ("[model]\nhidden = [3, 'x']", "hidden[1]: got 'x'"),
        ("[model]\nhidden = []", "model: hidden: got no layer"),
        ("[model]\nhidden = [3, 0]", "model: hidden: got 0, need a whole number >= 1"),
        ("[model]\nhidden = [3, 5]\nembedding = 3\ntied = true", "tied: got an embedding of 3 numbers and 5 units"),
        ("[model]\nthreshold = [0.1, 0.2]", "need one for each of 1 layers"),
        ("[model]\nsurrogate = 3", "need a table [model.surrogate]"),
        ("[model]\ncell = 'rnn'", "need one of egru, gru, lstm"),
        ("[model]\ncell = 'lstm'\nvariant = 'evnn'", "variant: got 'evnn', need one of standard"),
        ("[data]\nkind = 'word'", "give --text a file for words"),
        ("[training.optimiser]\nkind = 'lion'", "training.optimiser: optimiser kind: got 'lion'"),
        ("[pruning]\nsparsity = 0.5", "pruning: sparsity: got no method; give pruning.method"),
        ("[pruning]\nmethod = 'adaprune'\nsparsity = 0.5", "pruning: method: got 'adaprune', need one of magnitude"),
        ("[pruning]\nmethod = 'magnitude'", "pruning: target: got none for magnitude, need one of sparsity, nm"),
        ("[pruning]\nmethod = 'movement'\nnm = '2:4'", "target: got nm for movement, need one of sparsity"),
        ("[pruning]\nmethod = 'magnitude'\nnm = '2:4'\nblock = [1, 4]", "block: not an option of magnitude with nm"),
        ("[pruning]\nmethod = 'regrow'\nsparsity = 0.5\nscope = 'global'", "scope: not an option of regrow"),
        (
            "[pruning]\nmethod = 'regrow'\nsparsity = 0.5\nsince = 0.6",
            "since: got 0.6, need less than until, which is 0.5",
        ),
        ("[pruning]\nmethod = 'magnitude'\nnm = '2:4'\nuntil = 0.6", "until: magnitude draws the masks of nm once"),
        ("[pruning]\nsince = 0.2", "pruning: since: got no method; give pruning.method"),
        ("[pruning]\nmethod = 'magnitude'\nsparsity = 0.5\nuntil = 1.0", "pruning: until: got 1.0"),
        ("[pruning]\nmethod = 'magnitude'\nsparsity = 1.0", "pruning: sparsity: got 1.0"),
        ("[pruning]\nmethod = 'magnitude'\nnm = '3'", "pruning: nm: got '3'"),
        ("[pruning]\nmethod = 'magnitude'\nsparsity = 0.5\nblock = [4]", "pruning: block: got [4]"),
        (
            "[model]\nembedding = 256\ntied = true\n[pruning]\nmethod = 'regrow'\nsparsity = 0.5\nexempt = ['readout']",
            "pruning: no matrix 'readout'; have layers.0.w_in, layers.0.w_rec",
        ),
        ("training = ", "no valid TOML"),
        pytest.param("training = " + "9" * 5000, "no valid TOML", id="too many digits"),
        pytest.param("training = " + "[" * 5000, "nested too deeply", id="a deep array"),
    ],
)
def test_configurations_are_refused_by_key(tmp_path, toml, words):
    path = tmp_path / "recipe.toml"
    path.write_text(toml)
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["run.out", "data.text"])
def test_a_name_that_is_not_utf8_is_refused(name):
    with pytest.raises(ValueError, match=f"{name.split('.')[1]}: the name .*udcff is not UTF-8"):
        load_recipe(settings=[(name, "m\udcff")])


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "log.jsonl", "config.toml", ".lock"])
def test_a_model_file_that_would_be_a_file_of_the_run_is_refused_before_the_training(tmp_path, name):
    with pytest.raises(ValueError, match="out: .* is the name of a file of the run itself"):
        train(Recipe(run=RunSettings(out=str(tmp_path / "run" / name))), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.threshold", 0.2),
        ("model.threshold_start", "constant"),
        ("model.surrogate.kind", "arctan"),
        ("training.thresholds", "fixed"),
    ],
)
def test_a_plain_cell_refuses_settings_of_events(name, value):
    assert load_recipe(settings=[(name, value)])
    for cell in ("gru", "lstm"):
        with pytest.raises(ValueError, match=f"{name}: got .*{cell!r} have no thresholds; leave it out"):
            load_recipe(settings=iter([("model.cell", cell), (name, value)]))


def test_settings_of_the_command_line():
    assert parse_setting("a.b=3") == ("a.b", 3) and parse_setting("a=[1, 2]") == ("a", [1, 2])
    assert parse_setting("data.text=some/path") == ("data.text", "some/path")
    assert merged([{"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}]) == {"a": {"b": 3, "c": 2}}
    assert parse_setting("a=" + "[" * 5000) == ("a", "[" * 5000)
    with pytest.raises(ValueError, match="need key=value"):
        parse_setting("training.batch")
    with pytest.raises(ValueError, match="preset"):
        load_recipe(preset="gpt")


def test_a_run_has_its_configuration_its_log_and_the_best_model(cli, tmp_path, text):
    out = tmp_path / "m.safetensors"
    config = tmp_path / "mine.toml"
    config.write_text("[training]\nvalidate_every = 5\nlearning_rate = 0.5\n[run]\nlog_every = 3\n")
    setting = ("--set", "training.learning_rate=1e-2")
    code, stdout, err = cli("train", "--out", out, "--text", text, "--config", config, *setting, *SMALL, "--json")
    assert code == 0, err
    figures = json.loads(stdout)
    folder = tmp_path / "m.safetensors.run"
    recipe = load_recipe(folder / "config.toml")
    assert (recipe.training.learning_rate, recipe.training.validate_every, recipe.run.log_every) == (1e-2, 5, 3)
    assert recipe.model.hidden == (12,) and recipe.data.text == str(text)
    lines = read_log(folder)
    best = min(line["validation"]["bits"] for line in lines if line["validation"])
    assert figures["bits_per_symbol_best"] == best and lines[-1]["operations"] > 0
    network = load(out)
    assert network.layers[0].units == 12 and len(network.metadata["vocabulary"]) > 10
    for again in ((), ("--force",)):
        code, _, err = cli("train", "--out", out, "--text", text, *SMALL, *again, "--json")
        assert code == (0 if again else 2) and (again or "--force" in err)


def test_a_run_moves_to_another_machine_in_parts(cli, tmp_path, text):
    out, moved = tmp_path / "m.safetensors", tmp_path / "moved"
    assert cli("train", "--out", out, "--text", text, *SMALL, "--json")[0] == 0
    folder = tmp_path / "m.safetensors.run"
    size = (folder / "checkpoint.safetensors").stat().st_size
    code, stdout, err = cli("train", "--resume", folder, "--split", size / 2.5e6, "--json")
    assert code == 0, err
    assert json.loads(stdout) == {"folder": str(folder / "parts"), "parts": 3, "bytes": size}
    (folder / "parts").rename(moved)
    code, _, err = cli("train", "--resume", moved, "--out", tmp_path / "again.safetensors", "--json")
    assert code == 0, err
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    for arguments, words in (
        (("--split", 1), "split: only writes the checkpoint of a run in parts; give --resume"),
        (("--resume", moved, "--split", 1, "--seed", 3), "split: only writes"),
        (("--resume", moved, "--split", 0), "split: got 0"),
        (("--resume", tmp_path, "--split", 1), "holds no checkpoint.safetensors"),
    ):
        code, _, err = cli("train", *arguments)
        assert code == 2 and words in err, (arguments, err)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("magnitude", {"sparsity": 0.5, "block": (2, 4), "scope": "global"}),
        ("magnitude", {"nm": "2:4"}),
        ("magnitude", {"diagonal": 2, "exempt": ("layers.0.w_in", "readout")}),
        ("movement", {"sparsity": 0.5}),
        ("threshold", {"sparsity": 0.5}),
        ("lasso", {"sparsity": 0.5, "strength": 0.02}),
        ("dynamic", {"nm": "2:4", "every": 3}),
        ("regrow", {"sparsity": 0.5, "every": 3}),
    ],
)
def test_a_recipe_prunes_while_it_trains(tmp_path, text, method, target):
    settings = [("data.text", str(text)), ("model.hidden", [12]), ("model.embedding", 8), ("training.batch", 4)]
    settings += [("training.window", 8), ("training.steps", 12), ("data.valid_batch", 2)]
    pruning = PruningRecipe(method, **target)
    recipe = replace(load_recipe(settings=settings), pruning=pruning)
    assert from_table(Recipe, read_toml(to_toml(recipe), "a")) == recipe
    out, cut = (replace(recipe, run=RunSettings(out=str(tmp_path / name))) for name in ("whole", "cut"))
    figures = train(out, tmp_path / "whole.run")
    assert figures["density"] < 0.9
    chosen = [name for name in load(out.run.out).matrices() if name not in target.get("exempt", ())]
    for name in chosen:
        weights = load(out.run.out).matrices()[name]
        assert weights.name in ("csr", "block", "nm")
    updates = iter(range(5))
    with pytest.raises(Stopped):
        train(cut, tmp_path / "cut.run", stop=lambda: next(updates, None) is None)
    train(cut, tmp_path / "cut.run", resume=True)
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    with pytest.raises(ValueError, match="pruning"):
        train(replace(cut, pruning=PruningRecipe()), tmp_path / "cut.run", resume=True)


def test_interrupted_run_resumes(cli, tmp_path, text, monkeypatch):
    from eventrnn.training.recipes import recipe as recipes

    arguments = ("--text", text, *SMALL)
    _, _, err = cli("train", "--out", tmp_path / "whole.safetensors", *arguments)
    operations = read_log(tmp_path / "whole.safetensors.run")[-1]["operations"]
    assert f"{operations:.2e} operations" in err, "progress says what was done so far"
    note = recipes.note
    seen = []

    def interrupting(progress, kind, soft):
        if not seen and progress.step == 7:
            seen.append(os.kill(os.getpid(), signal.SIGINT))
        return note(progress, kind, soft)

    monkeypatch.setattr(recipes, "note", interrupting)
    out, folder = tmp_path / "part.safetensors", tmp_path / "run"
    code, stdout, err = cli("train", "--out", out, "--run", folder, *arguments, "--json")
    assert code == 130 and not stdout and not out.exists()
    assert f"stopped after step 7, saved in {folder}" in err and f"eventrnn train --resume {folder}" in err
    for changed, words in (
        (("--batch", 5), "settings.batch: 4 in the checkpoint, 5 now"),
        (("--force",), "resume"),
        (("--set", "training.seed=3"), "settings.seed"),
    ):
        code, _, err = cli("train", "--resume", folder, *changed)
        assert code == 2 and words in err
    text.write_text(TEXT.replace("fox", "cat"))
    code, _, err = cli("train", "--resume", folder)
    assert code == 2 and "in the checkpoint" in err
    text.write_text(TEXT)
    code, _, err = cli("train", "--resume", folder)
    assert code == 0, err
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    code, _, err = cli("train", "--resume", tmp_path)
    assert code == 2 and "holds no run" in err


def test_another_model_file_is_not_overwritten_by_a_resumed_run(cli, tmp_path, text):
    own, foreign, folder = tmp_path / "own.safetensors", tmp_path / "foreign", tmp_path / "run"
    assert cli("train", "--out", own, "--run", folder, "--text", text, *SMALL)[0] == 0
    foreign.write_bytes(b"dear")
    before = {path: path.read_bytes() for path in (own, foreign, *folder.iterdir())}
    for arguments, words in (
        (("--out", foreign), "--force"),
        (("--set", f"run.out={foreign}"), "--force"),
        (("--out", tmp_path / "nowhere" / "x"), "no folder"),
        (("--preset", "egru-ptb"), "leave out --run, --config, --preset"),
    ):
        code, stdout, err = cli("train", "--resume", folder, *arguments)
        assert code == 2 and not stdout and words in err, arguments
        assert {path: path.read_bytes() for path in before} == before
    assert cli("train", "--resume", folder)[0] == 0, "its own file may be written again"
    assert cli("train", "--resume", folder, "--out", tmp_path / "." / own.name)[0] == 0
    assert cli("train", "--resume", folder, "--out", foreign, "--force")[0] == 0
    assert foreign.read_bytes() == own.read_bytes() == before[own]


def test_a_model_file_that_appears_while_training_is_left(cli, tmp_path, text, monkeypatch):
    from eventrnn.training.recipes import recipe as recipes

    out, other = tmp_path / "m.safetensors", tmp_path / "other.safetensors"
    note = recipes.note

    def appearing(progress, kind, soft):
        out.write_bytes(b"of another program")
        return note(progress, kind, soft)

    monkeypatch.setattr(recipes, "note", appearing)
    code, stdout, err = cli("train", "--out", out, "--text", text, *SMALL, "--json")
    assert code == 2 and not stdout and "is left as it is" in err and "--force" in err
    assert out.read_bytes() == b"of another program"
    assert cli("train", "--resume", f"{out}.run", "--json")[0] == 2, "nor by a finished run that is resumed"
    assert out.read_bytes() == b"of another program"
    assert cli("train", "--resume", f"{out}.run", "--out", other, "--json")[0] == 0
    other.write_bytes(other.read_bytes() + b"changed since")
    assert cli("train", "--resume", f"{out}.run", "--out", other, "--json")[0] == 2
    assert other.read_bytes().endswith(b"changed since")
    assert cli("train", "--resume", f"{out}.run", "--out", other, "--force", "--json")[0] == 0
    assert load(other).layers[0].units == 12


def test_a_run_in_use_is_not_replaced_by_force(cli, tmp_path, text):
    folder = tmp_path / "run"
    assert cli("train", "--out", tmp_path / "a", "--run", folder, "--text", text, *SMALL)[0] == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with locked(folder):
        code, _, err = cli("train", "--out", tmp_path / "b", "--run", folder, "--text", text, *SMALL, "--force")
    assert code == 2 and "in use by process" in err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_dropout_acts_between_layers_of_a_stack(cli, tmp_path, text):
    stack = tmp_path / "stack.toml"
    stack.write_text("[model]\nhidden = [10, 8]\n")
    sizes = ("--embedding", 5, "--batch", 4, "--window", 8, "--steps", 1, "--text", text, "--dropout", 0.25)
    between = "training.regularisers.dropout_between"
    for name, arguments, expected in (
        ("file", ("--config", stack), 0.25),
        ("set", ("--set", "model.hidden=[10, 8]"), 0.25),
        ("flags", ("--hidden", 10, "--hidden", 8), 0.25),
        ("one", ("--hidden", 10), 0.0),
        ("said", ("--config", stack, "--set", f"{between}=0.125"), 0.125),
    ):
        code, _, err = cli("train", "--out", tmp_path / name, *sizes, *arguments)
        assert code == 0, err
        noise = load_recipe(tmp_path / f"{name}.run" / "config.toml").training.regularisers
        assert (noise.dropout_top, noise.dropout_between) == (0.25, expected), name


@pytest.mark.parametrize("cell", [Cell("gru"), Cell("gru", "before"), Cell("lstm")], ids=repr)
def test_a_plain_cell_may_go_without_a_model_file(cli, tmp_path, text, cell):
    plain = ("--cell", cell.name, "--variant", cell.variant, "--text", text, *SMALL)
    model = tmp_path / "model.safetensors"
    code, stdout, err = cli("train", *plain)
    assert code == 2 and not stdout and f"or --run a folder for a {cell.name}" in err
    assert sorted(tmp_path.iterdir()) == [text]
    code, stdout, err = cli("train", *plain, "--activity-cost", 0.1, "--run", tmp_path / "run")
    assert code == 2 and f"activity_cost: got 0.1, but layer 0 has the cell {cell.name!r}" in err
    code, stdout, err = cli("train", *plain, "--run", tmp_path / "run")
    assert code == 0 and "wrote" in stdout, err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "run", text]
    # The same run writes the file later, for the commands that read one.
    code, stdout, err = cli("train", "--resume", tmp_path / "run", "--out", model)
    assert code == 0, err
    assert {layer.cell for layer in load(model).layers} == {cell}
    code, stdout, err = cli("info", model)
    assert code == 0 and f"{cell.name}/{cell.variant}, 12 units" in stdout, err
    code, stdout, err = cli("run", model, "--text", text, "--json")
    assert code == 0 and json.loads(stdout)["activity"] == 1, err
    code, stdout, err = cli("count", model, "--text", text, "--symbols", 20, "--json")
    assert code == 0 and json.loads(stdout)["audit_agrees"], err
    tuned = ("prune", model, "--out", tmp_path / "pruned", "--text", text, "--steps", 4, "--batch", 4, "--window", 8)
    code, stdout, err = cli(*tuned, "--thresholds", "fixed")
    assert code == 2 and f"thresholds: got 'fixed', but layer 0 has the cell {cell.name!r}" in err
    code, stdout, err = cli(*tuned, "--sparsity", 0.5, "--gates", "each")
    assert code == 0, err
    for name, weights in load(tmp_path / "pruned").matrices().items():
        for part in np.split(weights.kept(), name.gates, axis=1):
            assert abs(part.mean() - 0.5) <= 0.5 / part.size
    with pytest.raises(ValueError, match="out: got none"):
        train(load_recipe(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_impossible_recipes_are_refused_before_writing(cli, tmp_path, text):
    (tmp_path / "short.txt").write_text("a b c\nd e f\n")
    (tmp_path / "empty.txt").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    out = ("--out", tmp_path / "x.safetensors")
    for arguments, words in (
        ((), "out"),
        ((*out, "--text", tmp_path / "short.txt"), "too short"),
        ((*out, "--text", tmp_path / "empty.txt"), "empty"),
        ((*out, "--text", text, "--window", 5000), "too few"),
        ((*out, "--text", text, "--set", "training.windwo=3"), "did you mean training.window?"),
        ((*out, "--text", text, "--preset", "egru"), "preset"),
        ((*out, "--text", text, "--steps", 5, "--epochs", 2), "steps: got 5 and 2 epochs; give one of them"),
        ((*out, "--text", text, "--steps", 5, "--set", "training.epochs=2"), "give one of them"),
        ((*out, "--text", text, "--config", tmp_path / "no.toml"), "cannot be read"),
        ((*out, "--kind", "word"), "built-in text"),
    ):
        code, _, err = cli("train", *arguments)
        assert code == 2 and words in err and err.count("\n") == 1, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_dense_twin_trains_by_the_same_recipe(tmp_path, text):
    recipe = load_recipe(preset="awd-gru", settings=[("data.text", str(text)), ("data.kind", "word")])
    small = replace(recipe.model, hidden=(10, 6), embedding=6)
    training = replace(recipe.training, epochs=2, batch=4, window=8, window_jitter=1.0)
    figures = train(replace(recipe, model=small, training=training), tmp_path / "run")
    assert np.isfinite(figures["bits_per_symbol_best"]) and "bits_per_symbol_valid" not in figures
