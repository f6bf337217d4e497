"""Sweeps: points, their results, what is refused, and workers and drivers that are killed."""

import errno
import json
import os
import shutil
import signal
import threading
import warnings
from concurrent.futures import BrokenExecutor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import eventrnn.sweeps.driver as driver_module
from eventrnn import BackendUnavailable, _files, load
from eventrnn._gpus import visible_gpus
from eventrnn.sweeps import Study, Sweep, SweepStopped, gpus, read_results, run_sweep
from eventrnn.sweeps.engines import Engine, Needs, cores, default_workers, engine_of
from eventrnn.sweeps.figure import sweep_figure
from eventrnn.sweeps.results import note_start, saved_sweep, write_result
from eventrnn.sweeps.study import Proposals
from eventrnn.sweeps.worker import RUN
from eventrnn.training import Stopped
from eventrnn.training.recipes.recipe import train
from support.sweeps import (
    PATIENCE,
    SETTINGS,
    Inline,
    gpu_beside_another,
    kill_and_wait,
    last_point_held,
    models_alone,
    models_of,
    results,
    runs,
    small_sweep,
    started,
    starts,
    wait_until,
)
from support.texts import TEXT


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A sweep of six points, and the model files of its points trained alone."""
    folder = tmp_path_factory.mktemp("six")
    (folder / "text.txt").write_text(TEXT)
    sweep = small_sweep(folder / "text.txt")
    return sweep, models_alone(sweep, folder)


def test_points_have_the_bits_of_runs_alone_whether_cut_off_or_not(tmp_path, six):
    (sweep, alone), folder = six, tmp_path / "out"

    def cut_off(job):
        """Let an earlier worker train a part of the point."""
        if job.recipe.training.seed == 1:
            updates = iter(range(7))
            with pytest.raises(Stopped):
                train(job.recipe, job.folder / RUN, stop=lambda: next(updates, None) is None)

    told = []
    lines = run_sweep(sweep, folder, executor=Inline(cut_off), report=lambda *state: told.append(state))
    assert models_of(folder) == alone
    assert lines == read_results(folder) and [line["point"] for line in lines] == list(range(6))
    assert all(line["state"] == "done" and line["steps"] == 20 and line["starts"] == 1 for line in lines)
    assert lines[5]["training.seed"] == 2 and lines[5]["training.learning_rate"] == 6e-3
    assert not any(isinstance(value, list | dict) for line in lines for value in line.values())
    assert told[-1][1] == 6 and [status.state for status in told[-1][0]] == ["done"] * 6
    # Nothing is done twice.
    executor = Inline()
    assert run_sweep(None, folder, executor=executor, resume=True) == lines and not executor.jobs


def test_a_point_that_fails_leaves_the_others_and_is_tried_again(tmp_path, text):
    sweep, folder = small_sweep(text, grid={"training.seed": [0, 1]}), tmp_path / "out"
    blocked = folder / "points" / "0000" / RUN

    def block(job):
        blocked.parent.mkdir(parents=True, exist_ok=True)
        if job.recipe.training.seed == 0:
            blocked.write_text("a file where the folder of the run should be")

    lines = run_sweep(sweep, folder, executor=Inline(block))
    assert [line["state"] for line in lines] == ["failed", "done"] and "FileExistsError" in lines[0]["error"]
    blocked.unlink()
    executor = Inline()
    lines = run_sweep(sweep, folder, executor=executor, resume=True)
    assert [line["state"] for line in lines] == ["done", "done"] and len(executor.jobs) == 1
    assert models_of(folder) == models_alone(sweep, tmp_path / "alone")


def test_a_sweep_goes_on_from_another_folder_of_the_shell_and_after_a_move(tmp_path, text, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep = small_sweep(text, grid={"training.seed": [0, 1], "data.text": [text.name]}, settings=SETTINGS)
    assert sweep.anchored().grid["data.text"] == [str(text)]
    lines = run_sweep(sweep, "out", executor=Inline())
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    # With a space, letters beyond ASCII, the end of a line and the character 127.
    moved = "m ü\n\x7f"
    (tmp_path / "out").rename(moved)
    for name in ("result.json", "model.safetensors"):
        (tmp_path / "else" / moved / "points" / "0001" / name).unlink()
    shutil.rmtree(Path(moved) / "points" / "0001" / RUN)
    again = run_sweep(None, moved, executor=Inline(), resume=True)
    assert [line["bits_per_symbol_valid"] for line in again] == [line["bits_per_symbol_valid"] for line in lines]
    assert [line["starts"] for line in again] == [1, 2] and len(models_of(moved)) == 2
    assert run_sweep(None, moved, executor=(executor := Inline()), resume=True) == again and not executor.jobs


def test_folders_of_sweeps_are_not_mixed_up(tmp_path, text):
    sweep, folder = small_sweep(text, grid={"training.seed": [0]}), tmp_path / "out"
    run_sweep(sweep, folder, executor=Inline())
    assert saved_sweep(folder) == sweep
    with pytest.raises(ValueError, match="holds a sweep; give --resume"):
        run_sweep(sweep, folder, executor=Inline())
    with pytest.raises(ValueError, match=r"holds another sweep: its grid training.seed is \[0\], not \[1\]"):
        run_sweep(small_sweep(text, grid={"training.seed": [1]}), folder, executor=Inline(), resume=True)
    with pytest.raises(ValueError, match="folder: .* holds no sweep"):
        run_sweep(None, tmp_path, executor=Inline(), resume=True)
    (tmp_path / "other" / "points").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds points, which is of no sweep"):
        run_sweep(sweep, tmp_path / "other", executor=Inline())
    own = tmp_path / "own" / "results.jsonl"
    own.parent.mkdir()
    own.write_text("the user's")
    with pytest.raises(ValueError, match="holds results.jsonl, which is of no sweep"):
        run_sweep(sweep, own.parent, executor=Inline())
    assert own.read_text() == "the user's"

    def again(job):
        with pytest.raises(ValueError, match="is in use by process"):
            run_sweep(None, folder, executor=Inline(), resume=True)

    (folder / "points" / "0000" / "result.json").unlink()
    assert run_sweep(None, folder, executor=Inline(again), resume=True)[0]["starts"] == 2
    # A run of other settings is not taken for that of the point.
    (folder / "points" / "0000" / "result.json").unlink()
    saved = (folder / "sweep.json").read_text()
    (folder / "sweep.json").write_text(saved.replace('"training.window": 8', '"training.window": 9'))
    with pytest.raises(ValueError, match=r"holds another run than point 0 .*: its training.window is 8, not 9"):
        run_sweep(None, folder, executor=Inline(), resume=True)


def test_a_driver_that_begins_during_the_checks_of_another_one_wins(tmp_path, text, monkeypatch):
    first = small_sweep(text, grid={"training.seed": [0]})
    second = small_sweep(text, grid={"training.seed": [1]})
    folder, check = tmp_path / "out", driver_module.known_points

    def slowly(sweep, folder):
        monkeypatch.setattr(driver_module, "known_points", check)
        run_sweep(first, folder, executor=Inline())
        return check(sweep, folder)

    monkeypatch.setattr(driver_module, "known_points", slowly)
    executor = Inline()
    with pytest.raises(ValueError, match="holds a sweep; give --resume"):
        run_sweep(second, folder, executor=executor)
    assert not executor.jobs and saved_sweep(folder) == first


def test_results_of_earlier_drivers_are_there_before_the_first_new_one(tmp_path, text):
    sweep, folder = small_sweep(text, grid={"training.seed": [0, 1, 2]}), tmp_path / "out"
    lines = run_sweep(sweep, folder, executor=Inline())
    (folder / "points" / "0000" / "result.json").unlink()

    def fail(job):
        raise SystemError("the executor is gone")

    with pytest.raises(SystemError):
        run_sweep(None, folder, executor=Inline(fail), resume=True)
    assert read_results(folder) == lines[1:]


def test_a_full_disk_ends_the_sweep_and_fails_no_point(tmp_path, text, monkeypatch):
    sweep, folder = small_sweep(text, grid={"training.seed": [0, 1]}), tmp_path / "my sweep"

    def full(recipe, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint")

    monkeypatch.setattr("eventrnn.sweeps.worker.train", full)
    with pytest.raises(OSError, match="make room, then go on with: eventrnn sweep --resume '.*my sweep'"):
        run_sweep(sweep, folder, executor=Later())
    assert results(folder) == 0 and read_results(folder) == []


def test_a_point_that_another_worker_trains_is_waited_for(tmp_path, text, monkeypatch):
    sweep, folder = small_sweep(text, grid={"training.seed": [0]}), tmp_path / "out"
    taken, waited, others = threading.Event(), threading.Event(), []

    @contextmanager
    def lock(path):
        with ExitStack() as stack:
            try:
                stack.enter_context(_files.locked(path))
            except ValueError:
                waited.set()
                raise
            yield

    def other(job):
        with _files.locked(job.folder):
            taken.set()
            assert waited.wait(PATIENCE)
            write_result(job.folder, {"state": "done", "by": "the other worker"})

    def begin(job):
        job.folder.mkdir(parents=True)
        others.append(threading.Thread(target=other, args=(job,)))
        others[0].start()
        assert taken.wait(PATIENCE)

    monkeypatch.setattr("eventrnn.sweeps.worker.locked", lock)
    lines = run_sweep(sweep, folder, executor=Inline(begin))
    others[0].join()
    assert [line["by"] for line in lines] == ["the other worker"] and not starts(folder)


def test_ctrl_c_saves_the_runs(tmp_path, text):
    sweep, folder = small_sweep(text, grid={"training.seed": [0, 1, 2]}), tmp_path / "out"

    def interrupt(job):
        if job.recipe.training.seed == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(SweepStopped, match="2 of 3 points ended"):
        run_sweep(sweep, folder, executor=Inline(interrupt))
    assert not (folder / "stop").exists() and len(read_results(folder)) == 2
    run_sweep(None, folder, executor=Inline(), resume=True)
    assert models_of(folder) == models_alone(sweep, tmp_path / "alone")


def test_pruning_and_presets_can_be_swept(tmp_path, text):
    settings = {"data.text": str(text)} | SETTINGS | {"pruning.method": "magnitude", "pruning.block": [1, 4]}
    grid = {"pruning.sparsity": [0.5, 0.75], "preset": ["characters"]}
    lines = run_sweep(Sweep(settings=settings, grid=grid), tmp_path / "out", executor=Inline())
    assert [line["state"] for line in lines] == ["done", "done"], lines
    for line in lines:
        network = load(tmp_path / "out" / line["folder"] / "model.safetensors")
        pruned = [w for w in network.matrices().values() if w.name == "block"]
        assert len(pruned) == 3 and all(w.block == (1, 4) for w in pruned)
        assert line["density"] == sum(w.nnz for w in pruned) / sum(w.shape[0] * w.shape[1] for w in pruned)
        assert line["effective_ops_per_step"] < line["dense_ops_per_step"] * (1 - line["pruning.sparsity"]) + 1
    figure = tmp_path / "picture.svg"
    sweep_figure(lines, ["pruning.sparsity", "preset"], y="density", path=figure)
    assert "pruning.sparsity" in figure.read_text()


# --- studies ------------------------------------------------------------------------------------------------

SPACE = {"training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}, "model.hidden": [[8], [12]]}


def test_proposals_depend_on_results_and_not_on_the_order_of_their_arrival():
    pytest.importorskip("optuna", reason="needs optuna")

    def proposed(order):
        proposals, found, open_trials = Proposals(Study(SPACE, trials=30, ahead=4)), [], []
        while len(found) < 30:
            while (trial := proposals.ask()) is not None:
                found.append(trial)
                open_trials.append(trial)
            number, chosen = open_trials.pop(order % len(open_trials))
            state = "failed" if number == 3 else "done"
            bits = abs(chosen["training.learning_rate"] - 0.02) + len(chosen["model.hidden"])
            proposals.tell(number, {"state": state, "bits_per_symbol_best": bits})
            assert number == len(found) - 1 or len(open_trials) < 4
        return found

    first = proposed(0)
    assert first == proposed(1) == proposed(3)
    assert [number for number, _ in first] == list(range(30))
    assert all(1e-3 <= chosen["training.learning_rate"] <= 1e-1 for _, chosen in first)
    assert {tuple(chosen["model.hidden"]) for _, chosen in first} == {(8,), (12,)}


def test_a_study_goes_on_with_the_same_proposals(tmp_path, text):
    pytest.importorskip("optuna", reason="needs optuna")
    settings = {key: value for key, value in SETTINGS.items() if key != "model.hidden"} | {"data.text": str(text)}
    sweep = Sweep(settings=settings, study=Study({**SPACE, "model.hidden": [[12]]}, trials=6, ahead=2))
    whole = run_sweep(sweep, tmp_path / "whole", executor=Inline())

    def fail(job):
        if job.folder.name == "0003":
            raise SystemError("the executor is gone")

    with pytest.raises(SystemError):
        run_sweep(sweep, tmp_path / "cut", executor=Inline(fail))
    assert 0 < results(tmp_path / "cut") < 6
    again = run_sweep(None, tmp_path / "cut", executor=Inline(), resume=True)
    assert [line["training.learning_rate"] for line in again] == [line["training.learning_rate"] for line in whole]
    assert models_of(tmp_path / "cut") == models_of(tmp_path / "whole")


# --- workers ------------------------------------------------------------------------------------------------


def test_workers_and_threads_fill_the_cores(tmp_path, monkeypatch):
    assert default_workers(Needs(points=100, threads=1, gpu=False, folder=tmp_path)) == cores()
    assert default_workers(Needs(points=100, threads=10 * cores(), gpu=False, folder=tmp_path)) == 1
    assert default_workers(Needs(points=1, threads=1, gpu=False, folder=tmp_path)) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert default_workers(Needs(points=100, threads=1, gpu=True, folder=tmp_path)) == 3


def test_gpus_are_those_of_the_driver_where_none_are_named(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU-a\necho GPU-b\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpus.visible_gpus() == ["GPU-a", "GPU-b"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpus.visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1, 3")
    assert gpus.visible_gpus() == ["1", "3"]


def claimed(monkeypatch) -> tuple[str, int]:
    """The GPU that another process chooses, and the descriptor that it holds to its end."""
    monkeypatch.setattr(gpus, "_held", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    told = [gpus.claim_gpu(), gpus.claim_gpu()]
    assert told == [os.environ["CUDA_VISIBLE_DEVICES"]] * 2, "a process keeps its GPU"
    return told[0], gpus._held


def test_every_process_chooses_the_gpu_that_fewest_use(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    processes = [claimed(monkeypatch) for _ in range(4)]
    assert [name for name, _ in processes] == ["GPU-a", "GPU-b", "GPU-a", "GPU-b"]
    for _, held in processes[1:]:
        os.close(held)
    assert claimed(monkeypatch)[0] == "GPU-b"
    assert len(list(tmp_path.glob("eventrnn-gpu-*"))) == 2, "those of processes that have ended are removed"


def test_workers_of_a_sweep_that_goes_on_use_all_gpus(tmp_path, monkeypatch):
    """The workers of the driver that was killed end while those of the next one choose."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = [claimed(monkeypatch) for _ in range(2)]
    first = claimed(monkeypatch)
    for _, held in before:
        os.close(held)
    assert {first[0], claimed(monkeypatch)[0]} == {"GPU-a", "GPU-b"}


def test_two_gpus_train_two_points_at_a_time(tmp_path, monkeypatch):
    """The sweep starts a process per GPU; each keeps its own for all of its points."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "begun").mkdir()
    with warnings.catch_warnings(action="ignore"):
        engine = engine_of("processes", Needs(points=6, threads=1, gpu=True, folder=tmp_path), None, None)
    assert engine.capacity == 2
    engine.task = gpu_beside_another
    try:
        futures = [engine.submit(tmp_path / "begun") for _ in range(6)]
        chosen = {future.result(PATIENCE) for future in futures}
    finally:
        engine.close()
    assert sorted(name for _, name in chosen) == ["GPU-a", "GPU-b"]


@pytest.mark.gpu
def test_points_on_two_gpus_have_the_bits_of_runs_alone(tmp_path):
    """Each GPU trains points, and the starts say which one."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    if len(visible_gpus()) != 2:
        pytest.skip("needs two GPUs")
    (tmp_path / "text.txt").write_text(TEXT)
    sweep = small_sweep(tmp_path / "text.txt")
    sweep = replace(sweep, settings={**sweep.settings, "training.backend": "cuda"})
    run_sweep(sweep, tmp_path / "out")
    assert models_of(tmp_path / "out") == models_alone(sweep, tmp_path / "alone")
    files = sorted((tmp_path / "out").glob("points/*/starts.jsonl"))
    assert {json.loads(file.read_text())["gpu"] for file in files} == set(visible_gpus())


class Later(Inline):
    """An executor whose futures hold the errors of their work, as those of processes do."""

    def submit(self, fn, /, job):
        future = Future()
        try:
            future.set_result(fn(job))
        except Exception as error:
            future.set_exception(error)
        return future


class Deadly(Inline):
    """An executor that breaks when it is given a certain point."""

    def __init__(self, number, begins, given):
        super().__init__()
        self.deadly, self.begins, self.given = f"{number:04d}", begins, given

    def submit(self, fn, /, job):
        self.given.append(int(job.folder.name))
        if job.folder.name != self.deadly:
            return super().submit(fn, job)
        if self.begins:
            job.folder.mkdir(parents=True, exist_ok=True)
            note_start(job.folder)
        future = Future()
        future.set_exception(BrokenExecutor("a worker died"))
        return future


def test_a_point_that_kills_its_workers_fails_after_all_others(tmp_path, text, monkeypatch):
    given, engine = [], lambda *_: Engine(lambda: Deadly(1, True, given), capacity=2, renews=True)
    monkeypatch.setattr("eventrnn.sweeps.engines._processes", engine)
    with pytest.warns(UserWarning, match="a worker died"):
        lines = run_sweep(small_sweep(text), tmp_path / "out")
    assert [line["state"] for line in lines] == ["done", "failed", *["done"] * 4]
    assert "its worker died 4 times" in lines[1]["error"]
    # From the second death on it is trained when nothing else is.
    assert given.count(1) == 4 and given[-2:] == [1, 1] and sorted(set(given)) == list(range(6))


def test_workers_that_cannot_begin_end_the_sweep(tmp_path, text, monkeypatch):
    given, engine = [], lambda *_: Engine(lambda: Deadly(0, False, given), capacity=1, renews=True)
    monkeypatch.setattr("eventrnn.sweeps.engines._processes", engine)
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(RuntimeError, match='workers die before they begin .* under `if __name__ == "__main__":`'),
    ):
        run_sweep(small_sweep(text), tmp_path / "out")
    assert given == [0, 0]


def test_an_executor_of_the_caller_that_breaks_ends_the_sweep(tmp_path, text):
    given = []
    with pytest.raises(RuntimeError, match="the executor is broken .* go on with: eventrnn sweep --resume"):
        run_sweep(small_sweep(text), tmp_path / "out", executor=Deadly(3, True, given))
    assert results(tmp_path / "out") == 5


def test_a_dead_worker_and_a_dead_driver_lose_no_point(tmp_path, six):
    (sweep, alone), folder = six, tmp_path / "out"
    plan = tmp_path / "my_sweep.toml"
    plan.write_text(
        "[grid]\ntraining.learning_rate = [3e-3, 6e-3]\ntraining.seed = [0, 1, 2]\n[settings]\n"
        + "".join(f"{key} = {json.dumps(value)}\n" for key, value in sweep.settings.items())
    )
    command = "eventrnn", "sweep", plan, "--out", folder, "--workers", 2
    with started(*command, log=tmp_path / "log") as driver, last_point_held(folder):
        wait_until(lambda: results(folder) >= 1, "a result")
        kill_and_wait(starts(folder)[0])
        wait_until(lambda: results(folder) >= 3, "results after the death of a worker")
        workers = set(starts(folder))
        driver.kill()
        driver.wait()
        # Workers end with their driver, so that none trains unseen.
        for worker in workers:
            wait_until(lambda worker=worker: not runs(worker), "the end of a worker")
    assert "its point goes on" in (tmp_path / "log").read_text()
    run_sweep(None, folder, executor=Inline(), resume=True)
    assert models_of(folder) == alone


def test_a_dead_worker_of_joblib_is_replaced(tmp_path, six):
    pytest.importorskip("joblib", reason="needs joblib")
    (sweep, alone), folder, killed = six, tmp_path / "out", []

    def kill_one(statuses, total):
        if not killed and results(folder):
            killed.append(starts(folder)[0])
            os.kill(killed[0], signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = run_sweep(sweep, folder, executor="loky", workers=1, report=kill_one)
    assert killed and [line["state"] for line in lines] == ["done"] * 6
    assert models_of(folder) == alone


def test_a_dead_worker_of_dask_loses_no_point(tmp_path, six):
    pytest.importorskip("distributed", reason="needs dask.distributed")
    (sweep, alone), folder, killed, scheduler = six, tmp_path / "out", [], tmp_path / "scheduler.json"
    serve = "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", 0, "--no-dashboard"
    work = "distributed.cli.dask_worker", "--scheduler-file", scheduler, "--nthreads", 1, "--no-nanny", "--no-dashboard"
    log = tmp_path / "log"

    def kill_one(statuses, total):
        if not killed and results(folder):
            killed.append(starts(folder)[0])
            os.kill(killed[0], signal.SIGKILL)

    with ExitStack() as stack:
        stack.enter_context(started(*serve, "--scheduler-file", scheduler, log=log))
        for _ in range(2):
            stack.enter_context(started(*work, log=log))
        address = json.loads(wait_until(lambda: scheduler.exists() and scheduler.read_text(), "a scheduler"))["address"]
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match="no scheduler answers at tcp://127.0.0.1:1 "):
            run_sweep(sweep, folder, executor="dask", address="tcp://127.0.0.1:1")
        lines = run_sweep(sweep, folder, executor="dask", address=address, report=kill_one)
    assert killed and [line["state"] for line in lines] == ["done"] * 6
    assert models_of(folder) == alone


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_lists_trains_and_goes_on(cli, tmp_path, text, monkeypatch):
    monkeypatch.setattr("eventrnn.sweeps.engines._processes", lambda workers, needs: Engine(Inline))
    plan, folder = tmp_path / "my_sweep.toml", tmp_path / "out"
    plan.write_text(f"[grid]\ntraining.seed = [0, 1]\n[settings]\ndata.text = {json.dumps(str(text))}\n")
    small = [f"--set={key}={json.dumps(value)}" for key, value in SETTINGS.items()]
    code, out, _ = cli("sweep", plan, "--dry-run", "--json", *small)
    assert code == 0 and json.loads(out) == {"points": [{"training.seed": 0}, {"training.seed": 1}]}
    assert cli("sweep", plan)[0] == 2 and cli("sweep")[0] == 2
    for wrong in (("--workers", 0), ("--executor", "ray"), ("--out", plan)):
        assert cli("sweep", plan, "--dry-run", *small, *wrong)[0] == 2
    code, out, err = cli("sweep", plan, "--out", folder, "--json", *small)
    assert code == 0 and "point 1 done, 2/2: training.seed=1" in err
    figures = json.loads(out)
    assert (figures["points"], figures["done"], figures["failed"]) == (2, 2, 0)
    code, out, err = cli("sweep", plan, "--out", folder, *small)
    assert code == 2 and "holds a sweep; give --resume" in err
    assert cli("sweep", "--resume", folder, "--json")[:2] == (0, json.dumps(figures) + "\n")
    assert cli("sweep", "--resume", folder, "--set=training.steps=3")[0] == 2
    picture = tmp_path / "picture.png"
    assert cli("plot", folder, "sweep", "--out", picture, "--y", "perplexity_valid")[0] == 0 and picture.stat().st_size
    for wrong, words in (
        (("--x", "training.sed"), "x: got 'training.sed', need one of training.seed"),
        (("--layer", 1), "layer: the figure sweep does not take it"),
        (("--y", "state"), "y: no point has a finite state"),
    ):
        code, _, err = cli("plot", folder, "sweep", "--out", tmp_path / "other.png", *wrong)
        assert code == 2 and words in err, err
    code, _, err = cli("plot", tmp_path, "sweep", "--out", tmp_path / "other.png")
    assert code == 2 and "holds no results of a sweep" in err
