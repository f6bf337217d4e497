"""Training on several GPUs: the updates of one on the joined batch, and what happens when a device fails. On fake GPUs
everywhere, one process each, and marked `gpu` on a machine that has two."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eventrnn import Network
from eventrnn._gpus import visible_gpus
from eventrnn.backend import BackendUnavailable
from eventrnn.pruning import GradualPruning
from eventrnn.training import (
    LanguageModelling,
    Optimiser,
    Regularisers,
    SoftTargets,
    Trainer,
    load_checkpoint,
    save_checkpoint,
)
from support import fake_devices
from support.cuda_runs import SYMBOLS, cuda_settings, symbol_text, updated
from support.gated import gate_matrices
from support.python_kernels import in_python
from support.training_specification import Specification

NOISE = Regularisers(
    dropconnect=0.3,
    dropout_input=0.2,
    dropout_between=0.2,
    dropout_top=0.3,
    dropout_words=0.1,
    zoneout=0.2,
    activity_rate=0.5,
    activity_target=0.2,
    state=0.1,
    activation=0.1,
    temporal_activation=0.1,
)

CUDA = "eventrnn.cuda.device"


@pytest.fixture(params=["fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpus(request, monkeypatch):
    """Fake GPUs, or two real ones."""
    pytest.importorskip(CUDA, exc_type=BackendUnavailable, reason="needs numba-cuda")
    if request.param == "fake":
        fake_devices.install(monkeypatch, devices=3)
    elif len(visible_gpus()) < 2:
        pytest.skip("needs two GPUs")
    return request.param


@pytest.fixture
def fakes(monkeypatch):
    """Two fake GPUs."""
    pytest.importorskip(CUDA, exc_type=BackendUnavailable, reason="needs numba-cuda")
    fake_devices.install(monkeypatch)


class Recorded(LanguageModelling):
    """The loss of a language model, computed by the host, which keeps its gradient."""

    def loss(self, output, batch):
        loss, self.d_output = super().loss(output, batch)
        return loss, self.d_output


def test_the_gradient_is_that_of_one_device_on_the_joined_batch(gpus):
    """Within the bound of the specification, which reads the forward pass of the joined batch, at the second update,
    so that states are carried; with all masks and penalties. The other figures are those of one device, and all copies
    of the parameters stay the same."""
    chosen = cuda_settings(batch=6, regularisers=NOISE, activity_cost=0.01, clip=100.0)
    one = Trainer(_network(), Recorded(symbol_text()), chosen)
    devices = 3 if gpus == "fake" else 2
    several = Trainer(_network(), LanguageModelling(symbol_text()), replace(chosen, devices=devices))
    assert f"on each of {devices} devices" in several.engine.memory_use
    for step in range(2):
        before = {name: array.copy() for name, array in one.model.parameters.items()}
        state = one.engine.state
        batch = one.task.batch(4 * step, 0, 6, 4)
        noise = chosen.regularisers.draw(one.model, 4, 6, seed=chosen.seed, step=step)
        got, found = updated(one.engine, batch, step)
        also, joined = updated(several.engine, batch, step)
        counted = ("activity", "support", "operations")
        assert [getattr(got, name) for name in counted] == [getattr(also, name) for name in counted]
        check = Specification(one.engine, before, batch.inputs, one.task.d_output, state, noise)
        check.check_gradients(found)
        check.check_gradients(joined)
        # The next update begins with the same parameters on both sides.
        for name, array in one.model.parameters.items():
            several.model.parameters[name][...] = array
    assert any(np.any(array) for array in several.engine.state.cells)


def test_a_run_on_two_devices_resumes_on_one_and_back_with_the_same_bits(gpus, tmp_path):
    """Masks of pruning, running means and states go along; two equal runs have the same bits at every place."""
    chosen = cuda_settings(
        batch=4,
        steps=6,
        clip=0.05,
        optimiser=Optimiser(kind="nt-asgd", patience=1),
        regularisers=Regularisers(dropconnect=0.3, zoneout=0.2),
    )
    path = tmp_path / "checkpoint.safetensors"

    def trainer(devices: int) -> Trainer:
        task = LanguageModelling(symbol_text(), symbol_text()[:12], valid_batch=2, soft=_soft_targets())
        pruning = GradualPruning(0.5, start=0, end=1, every=1)
        return Trainer(_network(), task, replace(chosen, devices=devices), pruning=pruning)

    runs = [trainer(2), trainer(2)]
    for run in runs:
        # The third loss is worse than the first, so that averaging starts.
        assert [run.optimiser.validated(loss, run.model.parameters) for loss in (1.0, 2.0, 3.0)][-1]
    progress = [[run.step(), run.validate(), run.step()] for run in runs]
    assert progress[0] == progress[1]
    _same(*runs)
    assert progress[0][-1].sparsity > 0 and runs[0].optimiser.averages
    assert progress[0][-1].norm > chosen.clip, "the gradients are clipped"
    save_checkpoint(runs[0], path)
    one = trainer(1)
    with pytest.warns(UserWarning, match="devices: 2 in the checkpoint, 1 now: the run goes on"):
        load_checkpoint(one, path)
    _same(runs[0], one)
    assert one.step().step == 3
    save_checkpoint(one, path)
    with pytest.warns(UserWarning, match="devices: 1 in the checkpoint, 2 now"):
        load_checkpoint(runs[1], path)
    _same(one, runs[1])
    assert runs[1].step().step == 4


def test_gated_blocks_train_on_two_devices_as_on_one(fakes):
    rng = np.random.default_rng(5)
    plain = Network.random([8], symbols=SYMBOLS, embedding=4, readout=SYMBOLS, threshold=0.1, rng=rng)
    network = gate_matrices(plain)
    one, two = (
        Trainer(network, LanguageModelling(symbol_text()), cuda_settings(batch=4, devices=devices))
        for devices in (1, 2)
    )
    got, also = one.step(), two.step()
    assert (got.activity, got.operations) == (also.activity, also.operations)


@pytest.mark.parametrize("kind", ["float32", "float64", "int64"])
def test_parts_are_added_in_the_order_of_ranks(kind):
    pytest.importorskip(CUDA, exc_type=BackendUnavailable, reason="needs numba-cuda")
    from eventrnn.cuda.training.kernels.joined_sums import add_parts_kernel

    rng, ranks, count, apart = np.random.default_rng(1), 4, 5, 8
    parts = (1e4 * rng.standard_normal((ranks, count))).astype(kind)
    expected = ((parts[0] + parts[1]) + parts[2]) + parts[3]
    add = in_python(add_parts_kernel(kind)[0], (2, 1))
    for rank in range(ranks):
        own, others = parts[rank].copy(), np.zeros((ranks - 1, apart), kind)
        others[:, :count] = np.delete(parts, rank, axis=0)
        add(own.ctypes.data, others.ctypes.data, apart, count, rank, ranks)
        assert np.array_equal(own, expected), rank


def test_every_part_of_a_mask_is_that_of_the_joined_batch():
    """Of any number of devices, steps, samples and units, also where a part begins within a block of numbers."""
    pytest.importorskip(CUDA, exc_type=BackendUnavailable, reason="needs numba-cuda")
    from eventrnn.cuda.training.kernels.noise import draw_kernel, part_of
    from eventrnn.training.bptt.noise import Mask

    draw = in_python(draw_kernel()[0], (2, 1))
    for shape in (("B", 5), ("T", "B", 3), ("T", 1, 3), (7, 2)):
        mask, steps, batch, ranks = Mask("top", 0, 0.5, 11, shape), 2, 3, 2
        joined = mask.draw(9, 4, steps, batch * ranks) != 0
        for rank in range(ranks):
            sizes, job = mask.sizes(steps, batch), np.array([4])
            found, part = np.zeros(sizes, np.uint8), part_of(mask, steps, batch, rank, ranks)
            rate = int(np.float32(0.5).view(np.int32))
            draw(job.ctypes.data, 9, 11, rate, found.size, sizes[-1], sizes[-1], found.ctypes.data, *part)
            axis = shape.index("B") if "B" in shape else 0
            own = range(rank * batch, (rank + 1) * batch) if "B" in shape else range(joined.shape[0])
            assert np.array_equal(found, joined.take(own, axis=axis)), (shape, rank)


# --- failures ---


def test_a_device_that_is_killed_ends_the_run_with_its_error(gpus):
    trainer = _pair()
    trainer.step()
    (process,) = trainer.engine.crew._processes.values()
    os.kill(process.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the process of device 1 has ended with signal SIGKILL|half-way"):
            trainer.step()
    trainer = _pair()
    (process,) = trainer.engine.crew._processes.values()
    trainer.engine.crew.end()
    assert process.poll() == 0, "a worker ends by itself when it is no longer needed"


def test_an_error_in_a_device_is_raised_by_the_trainer(fakes, monkeypatch):
    monkeypatch.setenv("EVENTRNN_TEST_ROOM", "1000")
    with pytest.raises(MemoryError, match=r"device 1: cuda: [\d,]+ bytes are needed and 1,000 are free"):
        _pair()


def test_a_device_that_hangs_ends_the_run(fakes, monkeypatch):
    from eventrnn.training.data_parallel import crew

    trainer = _pair()
    (process,) = trainer.engine.crew._processes.values()
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(crew, "PATIENCE", 0.5)
    with pytest.raises(RuntimeError, match="no answer within 0 s"):
        trainer.step()
    assert process.wait(10) == -signal.SIGKILL


def test_an_interrupted_update_ends_the_other_devices(fakes, monkeypatch):
    trainer = _pair()

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.engine, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"broken off \(KeyboardInterrupt: \); make a new trainer"):
        trainer.step()


LEADER = """
import os, sys, time
from eventrnn.training.data_parallel.crew import Crew
crew = Crew(["0", "1"], 2)
print(crew._processes[1].pid, flush=True)
time.sleep(60)
"""


def test_a_device_finds_modules_where_the_trainer_finds_them(tmp_path, monkeypatch, capfd):
    from eventrnn.training.data_parallel import crew

    (tmp_path / "only_here.py").write_text("import sys; print('found', file=sys.stderr)")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(crew, "PROGRAM", "import only_here")
    started = crew.Crew(["0", "1"], 2)
    assert started._processes[1].wait() == 0 and "found" in capfd.readouterr().err
    started.end()


def test_no_process_outlives_the_one_of_the_trainer():
    pytest.importorskip(CUDA, exc_type=BackendUnavailable, reason="needs numba-cuda")
    with subprocess.Popen([sys.executable, "-c", LEADER], stdout=subprocess.PIPE, text=True) as leader:
        worker = int(leader.stdout.readline())
        leader.kill()
    for _ in range(300):
        if not _runs(worker):
            return
        time.sleep(0.1)
    pytest.fail("the worker still runs")


def _runs(process: int) -> bool:
    """Whether a process exists and has not ended; its parent may not have collected it yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# --- refusals ---


def test_devices_that_do_not_fit_are_refused_before_any_work(fakes, monkeypatch):
    for options, words in (
        ({"backend": "cpu", "precision": ""}, "devices: got 2, but the cpu backend has threads"),
        ({"batch": 3}, "batch: got 3, which 2 devices cannot share; need a multiple"),
        ({"regularisers": Regularisers(gate_balance=0.1)}, "devices: got 2, but the load balance"),
        ({"devices": 0}, "devices: got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            cuda_settings(**({"batch": 4, "devices": 2} | options))
    with pytest.raises(ValueError, match="loss of Recorded is not the mean cross-entropy"):
        Trainer(_network(), Recorded(symbol_text()), cuda_settings(batch=4, devices=2))
    for visible, there in (("", "no GPU is"), ("1", "one GPU is"), ("0,1,2", "3 GPUs are")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ValueError, match=f"devices: got 4, but {there} here"):
            Trainer(_network(), LanguageModelling(symbol_text()), cuda_settings(batch=4, devices=4))


def test_the_command_refuses_more_devices_than_there_are(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from eventrnn.cli import app

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    out = tmp_path / "model.safetensors"
    ended = CliRunner().invoke(app, ["train", f"--out={out}", "--backend=cuda", "--devices=2"])
    assert "devices: got 2, but one GPU is here" in str(ended.exception)
    assert not list(tmp_path.iterdir())


def test_on_one_device_nothing_of_it_is_imported():
    pytest.importorskip(CUDA, exc_type=BackendUnavailable, reason="needs numba-cuda")
    code = (
        "import sys, eventrnn.training, eventrnn.cli, eventrnn.cuda.training.engine, eventrnn.training.recipes.recipe\n"
        "print([name for name in sys.modules if 'data_parallel' in name or 'nccl' in name or 'exchange' in name])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def _network() -> Network:
    rng = np.random.default_rng(5)
    return Network.random([4, 3], symbols=SYMBOLS, embedding=2, readout=SYMBOLS, threshold=0.1, rng=rng)


def _pair() -> Trainer:
    return Trainer(_network(), LanguageModelling(symbol_text()), cuda_settings(batch=4, devices=2))


def _soft_targets() -> SoftTargets:
    rng = np.random.default_rng(3)
    symbols = np.stack([rng.permutation(SYMBOLS)[:2] for _ in symbol_text()])
    return SoftTargets(symbols, np.full(symbols.shape, 0.4, np.float32), 0.5)


def _same(a: Trainer, b: Trainer) -> None:
    """Both trainers have the same state, bit for bit."""
    arrays = b.arrays()
    assert arrays.keys() == a.arrays().keys()
    for name, array in a.arrays().items():
        assert np.array_equal(array, arrays[name]), name
    assert json.dumps(a.numbers()) == json.dumps(b.numbers())
