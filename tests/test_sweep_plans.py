"""Plans of sweeps: which points a file or a call gives, and what is refused before any work."""

from importlib.util import find_spec

import numpy as np
import pytest

from eventrnn.sweeps import Study, Sweep, check_sweep, load_sweep, run_sweep
from eventrnn.sweeps.plan import point
from eventrnn.sweeps.results import save_sweep, saved_sweep
from eventrnn.sweeps.study import Proposals
from support.sweeps import (
    SETTINGS,
    Inline,
    small_sweep,
)

TOML = """
preset = "characters"
[settings]
data.text = "text.txt"
training.steps = 20
[grid]
training.seed = [0, 1]
model.hidden = [[8], [8, 8]]
[[points]]
model.threshold = 0.3
[[points]]
model.threshold = 0.4
training.batch = 4
"""


# --- plans --------------------------------------------------------------------------------------------------


def test_a_file_gives_every_combination_in_order(tmp_path):
    path = tmp_path / "my_sweep.toml"
    path.write_text(TOML)
    sweep = load_sweep(path, settings={"training.steps": 30})
    assert sweep.axes == ("model.threshold", "training.batch", "training.seed", "model.hidden")
    found = sweep.combinations()
    assert len(found) == 8
    assert found[0] == {"model.threshold": 0.3, "training.seed": 0, "model.hidden": [8]}
    assert found[5] == {"model.threshold": 0.4, "training.batch": 4, "training.seed": 0, "model.hidden": [8, 8]}
    recipe = point(sweep, tmp_path, 5, found[5]).recipe
    assert (recipe.training.steps, recipe.training.batch, recipe.model.hidden) == (30, 4, (8, 8))
    assert recipe.data.text.endswith("/text.txt") and recipe.run.out == str(tmp_path / "points/0005/model.safetensors")


def test_a_preset_can_be_an_axis(tmp_path, text):
    sweep = Sweep(settings={"data.text": str(text)}, grid={"preset": ["characters", "egru-ptb"]})
    first, second = (point(sweep, tmp_path, k, chosen).recipe for k, chosen in enumerate(sweep.combinations()))
    assert (first.model.hidden, second.model.hidden) == ((256,), (1350, 1350, 750))


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("", "grid: got no key"),
        ("[grid]", "grid: is empty"),
        ("[grid]\ntraining.seed = []", "grid: training.seed: has no value"),
        ("[grid]\ntraining.seed = 3", "grid: training.seed: got 3, need a list"),
        ("[gird]\ntraining.seed = [1]", "unknown name gird; did you mean grid?"),
        ("points = 3", "points: need at least one table"),
        ("[grid]\ntraining.seed = [0]\n'training.seed' = [1]", "training.seed is given twice"),
        (
            "[settings]\nmodel.gates.bits = 3\n[grid]\nmodel.gates = [{bits = 2}, {bits = 4}]",
            "settings: model.gates.bits is given twice",
        ),
        ("[grid]\nrun = [{out = 'a'}]", "run.out: every point writes its own model file"),
        ("[grid]\nrun.out = ['a']", "run.out: every point writes its own model file"),
        ("[settings]\ntraining.seed = 1\n[grid]\ntraining.seed = [1]", "settings: training.seed is given twice"),
        ("[grid]\ntraining.seed = [1]\n[[points]]\ntraining.seed = 2", "grid: training.seed is given twice"),
        ("[settings]\npreset = 'awd-gru'\n[grid]\ntraining.seed = [1]", "settings: preset is no key of the recipe"),
        ("config = 'missing.toml'\n[grid]\ntraining.seed = [1]", "config: missing.toml cannot be read"),
        ("[grid]\ntraining.seed = [1]\n[study]\nspace = {training.seed = [1]}", "give a study or a grid"),
        ("[study]\ntrials = 3", "study: its space is empty"),
        ("[study]\ntrial = 3", "study: unknown name trial; did you mean trials?"),
        ("[study.space]\ntraining.batch = {low = 4}", "study: training.batch: the range has no high"),
        ("[study.space]\ntraining.batch = {low = 4, high = 2}", "study: training.batch: high: got 2"),
        ("[study.space]\ntraining.batch = {low = 0, high = 2, log = true}", "study: training.batch: low: got 0"),
        ("[study.space]\ntraining.batch = []", "study: training.batch: has no value"),
        ("[study]\nsampler = 'best'\nspace = {training.batch = [1]}", "study sampler: got 'best'"),
        ("[study]\ngoal = 'bits'\nspace = {training.batch = [1]}", "study goal: got 'bits', need one of bits_per"),
    ],
)
def test_plans_are_refused(tmp_path, monkeypatch, toml, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_sweep.toml"
    path.write_text(toml)
    with pytest.raises(ValueError) as caught:
        load_sweep(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ({"training.sed": [0]}, "point 0 (training.sed=0): config: unknown key training.sed; did you mean"),
        ({"training.batch": [4, 0]}, "point 1 (training.batch=0): config: training: batch: got 0"),
        ({"training.seed": [0, 1, 0]}, "points 0 and 2 are the same run (training.seed=0)"),
        ({"preset": ["characters", "words"]}, "point 1 (preset=words): preset: got 'words'"),
        ({"data.text": ["nowhere.txt"]}, "point 0 (data.text=nowhere.txt): text: "),
        (
            {"training.backend": ["cuda"], "training.batch": [4], "training.devices": [1, 2]},
            "point 1 (training.backend=cuda, training.batch=4, training.devices=2): devices: got 2, but a point of a",
        ),
        ({"training.window": [8, 100_000]}, "point 1 (training.window=100000): text: "),
        ({"pruning": [{"method": "magnitude"}]}, "target: got none for magnitude, need one of sparsity"),
        ({"pruning": [{"method": "magnitude", "sparsity": 0.5}], "training.steps": [1]}, "point 0 (pruning="),
        (
            {"pruning.method": ["threshold"], "pruning.sparsity": [0.5], "pruning.block": [[1, 4], [4, 64]]},
            "point 1 (pruning.method=threshold, pruning.sparsity=0.5, pruning.block=[4, 64]): block: 4x64 is larger "
            "than the matrix layers.0.w_in,",
        ),
        (
            {"pruning.method": ["magnitude"], "pruning.sparsity": [0.5, 0.99], "pruning.block": [[4, 8]]},
            "pruning.sparsity=0.99, pruning.block=[4, 8]): sparsity: 0.99 in blocks of 4x8 leaves nothing of layers.0",
        ),
    ],
)
def test_points_are_refused_before_any_work(tmp_path, text, grid, words):
    executor = Inline()
    settings = {key: value for key, value in SETTINGS.items() if key not in grid}
    if "data.text" not in grid:
        settings["data.text"] = str(text)
    with pytest.raises(ValueError) as caught:
        run_sweep(Sweep(settings=settings, grid=grid), tmp_path / "out", executor=executor)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists() and not executor.jobs


def test_a_range_of_whole_numbers_is_one_of_a_whole_setting(text):
    settings = {key: value for key, value in SETTINGS.items() if key != "training.batch"} | {"data.text": str(text)}
    pytest.importorskip("optuna", reason="needs optuna")

    def checked(key, **ends):
        return check_sweep(Sweep(settings=settings, study=Study({key: ends})), executor=Inline())

    assert len(checked("training.batch", low=1, high=4)) == len(checked("training.clip", low=1.0, high=4)) == 2
    with pytest.raises(ValueError, match="training.clip: low: got 1, so that only whole numbers would be proposed"):
        checked("training.clip", low=1, high=4)


def test_every_combination_of_the_ends_of_a_study_is_checked(text):
    settings = {"data.text": str(text)} | SETTINGS | {"pruning.method": "magnitude", "pruning.sparsity": 0.5}
    space = {"training.seed": {"low": 0, "high": 9}, "pruning.statistic": ["l1", "max"], "pruning.scope": ["layer", ""]}
    assert len(list(Study(space).corners())) == 8
    space = {"training.batch": [2, 40], "training.window": [8, 300], "training.seed": [0]}
    sweep = Sweep(settings={key: value for key, value in settings.items() if key not in space}, study=Study(space))
    with pytest.raises(ValueError, match="point 3 .training.batch=40, training.window=300, training.seed=0.: text"):
        check_sweep(sweep, executor=Inline())


def test_values_of_numpy_and_ranges_of_python_are_saved_as_plain_ones(tmp_path, text):
    sweep = small_sweep(text, grid={"training.seed": range(2), "training.learning_rate": np.array([3e-3, 6e-3])})
    save_sweep(sweep, tmp_path)
    assert saved_sweep(tmp_path).grid == {"training.seed": [0, 1], "training.learning_rate": [3e-3, 6e-3]}
    assert saved_sweep(tmp_path).combinations() == sweep.combinations()
    pytest.importorskip("optuna", reason="needs optuna")
    study = Study({"training.seed": [np.int64(3)], "training.batch": {"low": np.int64(4), "high": np.int64(4 + 1)}})
    _, chosen = Proposals(study).ask()
    assert chosen["training.seed"] == 3 and type(chosen["training.batch"]) is int


def test_engines_are_refused_before_any_work(tmp_path, text, monkeypatch):
    sweep, folder = small_sweep(text), tmp_path / "out"

    def refused(kind, words, **options):
        with pytest.raises(kind, match=words):
            run_sweep(sweep, folder, **options)
        assert not folder.exists()

    refused(ValueError, "executor: got 'ray', need one of processes, loky", executor="ray")
    refused(TypeError, "executor: got 3", executor=3)
    refused(ValueError, "workers: got 0", workers=0)
    refused(ValueError, "address: got 'tcp://127.0.0.1:1', but the executor processes", address="tcp://127.0.0.1:1")
    refused(ValueError, "workers: got 2, but an executor that is given", executor=Inline(), workers=2)
    refused(ValueError, "address: got none; dask needs", executor="dask") if find_spec("distributed") else None
    monkeypatch.setattr("eventrnn.sweeps.engines.find_spec", lambda name: None)
    refused(ImportError, r"executor: loky needs joblib: pip install 'eventrnn\[sweep\]'", executor="loky")
    refused(ImportError, r"executor: mpi needs mpi4py: pip install 'mpi4py'", executor="mpi")
    monkeypatch.setattr("eventrnn.sweeps.study.find_spec", lambda name: None)
    study = Sweep(settings={"data.text": str(text)}, study=Study({"training.seed": [0, 1]}))
    with pytest.raises(ImportError, match=r"study: needs optuna: pip install 'eventrnn\[sweep\]'"):
        run_sweep(study, folder)


# --- points -------------------------------------------------------------------------------------------------
