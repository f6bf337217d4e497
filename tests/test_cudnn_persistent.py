"""The baseline `cudnn-persistent`, on a fake cuDNN in host memory: what runs, what it must equal, what fails."""

import ctypes
import ctypes.util

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.bench import cudnn_library
from eventrnn.bench.case import Case
from eventrnn.bench.cudnn_library import ALGORITHMS, CELLS, PRECISIONS, Cudnn, CudnnError, find_cudnn
from eventrnn.bench.networks import random_events, random_network
from support.fake_cudnn import FakeCudnn
from support.fake_gpu import FakeDevice, install

pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")

from eventrnn.bench.cudnn_persistent import CHECKED_STEPS, check_of, cudnn_runs

UNITS, STEPS, BATCH = 19, 3, 3


@pytest.fixture(scope="module")
def case():
    """A network of two layers, and its inputs."""
    rng = np.random.default_rng(3)
    options = {"sparsity": 0.5, "format": "block", "block": (1, 8), "variant": "evnn", "rng": rng}
    return random_network(UNITS, 2, **options), random_events(STEPS, BATCH, UNITS, 0.3, rng)


def found_in(library, case):
    return cudnn_runs(Cudnn(library, FakeDevice()), *case, lambda stage: None)


def test_every_algorithm_and_precision_of_both_cells_is_tried_and_answers_as_the_reference_does(case):
    library = FakeCudnn()
    found = found_in(library, case)
    tried = {name.removesuffix(way) for name in found.first for way in (", graph", ", training mode")}
    for cell in CELLS:
        for algorithm in ALGORITHMS:
            for precision in PRECISIONS:
                name = f"cudnn-persistent {cell.upper()} {algorithm} {precision} padded to 24"
                assert any(each.startswith(name) for each in tried), name
            assert any(f"{cell.upper()} {algorithm} float16 padded to 64" in each for each in tried)
    assert not found.left_out and found.version == "9.19.0" and set(found.runs) <= set(found.first)
    assert library.calls.count("cudnnBuildRNNDynamic") == len(CELLS) * (len(PRECISIONS) + 1)
    made = [name for name in library.calls if name.startswith("cudnnCreate") and name.endswith("Descriptor")]
    freed = [name for name in library.calls if name.startswith("cudnnDestroy")]
    # Only the descriptors of the variants that are timed on are still there.
    assert len(made) - len(freed) == len(made) // len(found.first) * len(found.runs)


def test_slow_variants_are_timed_once_and_freed(case, monkeypatch):
    seconds = iter([9.0] * 12 + [1.0] * 10_000)
    monkeypatch.setattr(FakeDevice, "seconds", lambda self, enqueue: (enqueue(), next(seconds))[1])
    found = found_in(FakeCudnn(), case)
    slow = {name for name, first in found.first.items() if first == 9}
    assert len(slow) == 1 and set(found.runs) == set(found.first) - slow


def test_what_cudnn_refuses_is_left_out_with_its_reason(case):
    found = found_in(FakeCudnn(refused={(1, 3), (3, 3), (3, 2)}), case)
    reason = "cudnnSetRNNDescriptor_v8: CUDNN_STATUS_NOT_SUPPORTED (no such kernel)"
    assert set(found.left_out.values()) == {reason}
    assert all("persist-static" in name for name in found.left_out)
    assert any("LSTM persist-static float16" in name for name in found.first)
    everything = {(algorithm, cell) for algorithm in range(4) for cell in (2, 3)}
    with pytest.raises(CudnnError, match=r"cuDNN 9\.19\.0 ran no variant; .*NOT_SUPPORTED"):
        found_in(FakeCudnn(refused=everything), case)


@pytest.mark.parametrize("planted", ["gates", "bias", "state"])
def test_a_wrong_answer_is_found_before_anything_is_timed(case, planted, monkeypatch):
    monkeypatch.setattr(FakeDevice, "seconds", lambda self, enqueue: pytest.fail("timed before it was checked"))
    with pytest.raises(RuntimeError, match=r"against cudnn-persistent LSTM standard float16.*but reference\.py has"):
        found_in(FakeCudnn(planted=planted), case)


def test_the_bound_of_a_float16_network_is_below_what_a_wrong_network_changes(case):
    network, inputs = case
    for cell in CELLS:
        check = check_of(cell, network, inputs.shape)
        assert check.expected.shape == (CHECKED_STEPS, 2, UNITS) and check.samples == [0, BATCH - 1]
        bound, narrow = (check.bound(PRECISIONS[name].unit) for name in ("float16", "float32"))
        assert bound.shape == check.expected.shape and (narrow < bound).all()
        assert bound[0].max() < np.abs(check.expected[0]).max() / 2
        for layer in check.weights:
            for array in (layer.w_in, layer.w_rec, layer.bias_in, layer.bias_rec):
                assert (array.astype(np.float16) == array).all()


def test_a_library_that_is_not_there_is_refused_by_name(monkeypatch):
    def none(path):
        raise OSError(f"{path}: cannot open shared object file")

    monkeypatch.setattr(cudnn_library.ctypes, "CDLL", none)
    device = FakeDevice()
    device.load_library = none
    with pytest.raises(ValueError, match=r"against: cudnn-persistent needs cuDNN, .*libcudnn\.so\.9: cannot open"):
        find_cudnn(device)


def test_the_library_that_is_installed_names_its_error_without_a_gpu():
    device = FakeDevice()
    device.load_library = lambda name: None
    try:
        library = find_cudnn(device)
    except ValueError:
        pytest.skip("cuDNN is not installed")
    count = ctypes.c_int()
    driver = ctypes.util.find_library("cuda")
    if driver and ctypes.CDLL(driver).cuInit(0) == 0:
        ctypes.CDLL(driver).cuDeviceGetCount(ctypes.byref(count))
    if count.value:
        pytest.skip("there is a GPU")
    with pytest.raises(CudnnError, match="cudnnCreate: CUDNN_STATUS_NOT_INITIALIZED"):
        Cudnn(library, device)


def test_baselines_of_a_gpu_are_named_one_or_several():
    assert Case(backend="cuda", against="cudnn-persistent,cudnn").baselines == ("cudnn-persistent", "cudnn")
    with pytest.raises(ValueError, match="against: got 'torch' on a GPU, need one of cudnn-persistent, cudnn, "):
        Case(backend="cuda", against="cudnn,torch")


def test_an_inference_benchmark_of_a_gpu_reports_every_figure(monkeypatch):
    from eventrnn import bench
    from eventrnn.bench import gpu_baselines, gpu_inference
    from eventrnn.cuda import device

    gpu = install(monkeypatch)
    gpu.timed = lambda launched: 1e-3 + 1e-6 * len(launched)
    monkeypatch.setattr(device, "current_device", lambda: gpu)
    monkeypatch.setattr(gpu_baselines, "find_cudnn", lambda device: FakeCudnn(refused={(1, 3)}))
    monkeypatch.setattr(gpu_inference, "CHUNK", 3)
    case = {"hidden": 32, "batch": 1, "steps": 4, "repeats": 3, "activity": 0.3, "block": (1, 16)}
    line = bench.inference(backend="cuda", against="cudnn-persistent", **case)
    for name in ("us_per_step", "against_us_per_step", "run", "chunk", "call", "host_call"):
        assert line[name if "us" in name else f"{name}_us_per_step"] > 0
    assert line["against_variant"] in line["against_variants_us_per_step"]
    assert set(line["against_variants_us_per_step"]) <= set(line["against_first_us_per_step"])
    assert all("GRU persist-static" in name for name in line["against_left_out"])
    assert line["versions"]["cudnn"] == "9.19.0" and line["against"] == "cudnn-persistent"


@pytest.mark.gpu
def test_the_algorithms_of_the_gpu_answer_as_the_reference_does(case):
    from eventrnn.cuda.device import current_device

    device = current_device()
    with device.on_stream():
        found = cudnn_runs(Cudnn(find_cudnn(device), device), *case, lambda stage: None)
    for cell in CELLS:
        for precision in PRECISIONS:
            assert any(f"{cell.upper()} standard {precision}" in name for name in found.first)
    assert found.runs and all(seconds > 0 for seconds in found.first.values())
