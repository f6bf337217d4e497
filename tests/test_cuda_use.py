"""The CUDA engine as users call it: streams, arrays on the GPU, faults; on a fake GPU and on real ones."""

from __future__ import annotations

import gc
import pickle
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from eventrnn.backend import BackendUnavailable
from eventrnn.cells import Cell
from eventrnn.counting.counts import count, count_per_step
from eventrnn.cuda import CudaBackend
from eventrnn.network import Network
from eventrnn.simulation import Simulator
from eventrnn.simulation import simulate as simulate_on
from eventrnn.state import State, on_gpu
from support.fake_gpu import Array, install


def simulate(*arguments, backend="reference", **options):
    """`simulation.simulate`, by default with the backend reference."""
    return simulate_on(*arguments, backend=backend, **options)


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU."""
    pytest.importorskip("eventrnn.cuda.device", exc_type=BackendUnavailable, reason="needs numba-cuda")
    return install(monkeypatch)


def same_bits(a, b) -> bool:
    a, b = (np.array(getattr(x, "get", lambda x=x: x)()) for x in (a, b))
    return a.dtype == b.dtype and np.array_equal(a.view(np.int32), b.view(np.int32))


def there(array) -> Array:
    """A copy on the fake GPU."""
    return np.array(array).view(Array)


def small(variant: str = "evnn", readout: int | None = 4, symbols: bool = False) -> tuple[Network, np.ndarray]:
    rng = np.random.default_rng(1)
    size = {"symbols": 9, "embedding": 6} if symbols else {"inputs": 6}
    network = Network.random([7, 5], readout=readout, rng=rng, threshold=0.1, cell=Cell(variant=variant), **size)
    x = rng.integers(0, 9, (11, 3)) if symbols else rng.standard_normal((11, 3, 6)) * (rng.random((11, 3, 6)) < 0.5)
    return network, x if symbols else x.astype(np.float32)


CASES = [("evnn", 4, False), ("paper", None, False), ("evnn", None, True), ("evnn", 4, True)]


@pytest.mark.parametrize("case", CASES)
def test_chunks_and_steps_on_the_gpu_equal_one_run_on_the_cpu(gpu, case):
    network, x = small(*case)
    expected = simulate(network, x, record=("events", "states"))
    simulator = Simulator(network, batch=3, backend="cuda")
    parts = [simulator.run(x[:4], record="events"), simulator.run(x[4:4]), simulator.run(x[4:5]), simulator.run(x[5:7])]
    steps = [simulator.step(each) for each in x[7:]]
    output = np.concatenate([*(part.output for part in parts), np.array(steps)])
    assert same_bits(expected.output, output)
    for name in ("cells", "outputs"):
        pairs = zip(getattr(expected.state, name), getattr(simulator.state, name), strict=True)
        assert all(same_bits(a, b) for a, b in pairs)
    assert np.array_equal(sum(p.fired[0].total for p in parts), simulate(network, x[:7]).fired[0].total)
    simulator.reset()
    assert same_bits(simulator.run(x).output, expected.output)


@pytest.mark.parametrize("case", CASES)
def test_arrays_on_the_gpu_stay_there_and_give_the_same(gpu, case):
    network, x = small(*case)
    expected = simulate(network, x, record=("events", "states"))
    got = simulate(network, there(x), backend="cuda", record=("events", "states"))
    assert on_gpu(got.output) and all(map(on_gpu, (*got.events, *got.states)))
    assert same_bits(got.output, expected.output)
    for n in range(2):
        assert same_bits(got.events[n], expected.events[n].to_dense())
        assert same_bits(got.states[n], expected.states[n])
    assert count(network, got) == count(network, expected)
    with pytest.raises(TypeError, match="events are arrays on a GPU; run it with NumPy inputs"):
        count_per_step(network, got)
    simulator = Simulator(network, batch=3, backend="cuda")
    steps = [simulator.step(there(each)) for each in x]
    assert all(map(on_gpu, steps))
    assert same_bits(np.array([each.get() for each in steps]), expected.output)


def test_run_in_parts_and_windows_equals_one_run(gpu, monkeypatch):
    from eventrnn.cuda import engine

    network, x = small()
    expected = simulate(network, x, record=("events", "states"), carry="events", window=4)
    monkeypatch.setattr(engine, "RECORD_BYTES", 1 << 13)
    for fed in (x, there(x)):
        got = simulate(network, fed, backend="cuda", record=("events", "states"), carry="events", window=4)
        assert same_bits(got.output, expected.output)
        assert same_bits(got.states[1], expected.states[1])
        assert count(network, got) == count(network, expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("record", [(), ("events", "states")])
def test_sequences_of_different_lengths_equal_those_of_the_specification(gpu, case, record):
    network, x = small(*case)
    lengths = np.array([4, 11, 7])
    expected = simulate(network, x, lengths=lengths, record=("events", "states"))
    padding = np.arange(11)[:, None] >= lengths
    x[padding] = -1 if x.dtype.kind == "i" else np.nan
    for fed in (x, there(x)):
        got = simulate(network, fed, lengths=lengths, backend="cuda", record=record)
        assert same_bits(got.output, expected.output) and on_gpu(got.output) == on_gpu(fed)
        assert count(network, got) == count(network, expected)
        for name in ("cells", "outputs"):
            pairs = zip(getattr(got.state, name), getattr(expected.state, name), strict=True)
            assert all(same_bits(a, b) for a, b in pairs)
        for k in range(2) if record else ():
            sent = got.events[k] if on_gpu(fed) else got.events[k].to_dense()
            assert same_bits(sent, expected.events[k].to_dense()) and same_bits(got.states[k], expected.states[k])
    simulator = Simulator(network, batch=3, backend="cuda")
    # The state goes on from step to run to step.
    for fed in (x[:3], there(x[:3])):
        simulator.run(fed, lengths=[3, 0, 2])
        simulator.step(fed[0])


@pytest.mark.parametrize("symbols", [False, True])
def test_bad_input_of_a_sample_is_named_by_its_own_number(gpu, symbols):
    network, x = small(symbols=symbols)
    x[(5, 2) if symbols else (5, 2, 1)] = 9 if symbols else np.nan
    for fed in (x, there(x)):
        with pytest.raises(ValueError, match=r"inputs: got .* at (position )?\(5, 2"):
            simulate(network, fed, lengths=[11, 2, 8], backend="cuda")
        simulate(network, fed, lengths=[11, 2, 5], backend="cuda")


def test_other_dtypes_are_converted_on_the_gpu(gpu):
    network, x = small()
    expected = simulate(network, x).output
    for fed in (x.astype(np.float64), np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
        assert same_bits(simulate(network, there(fed), backend="cuda").output, expected)
    signs = np.sign(x).astype(np.int8)
    expected = simulate(network, signs)
    got = simulate(network, there(signs), backend="cuda")
    assert same_bits(got.output, expected.output) and np.array_equal(
        got.input_fired.binary, expected.input_fired.binary
    )


def interrupt(patch, owner, name: str) -> None:
    """Raise KeyboardInterrupt at the next call of that method."""

    def interrupted(*arguments):
        patch.undo()
        raise KeyboardInterrupt

    patch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_an_interrupted_run_or_step_can_be_made_again(gpu, calls, size):
    from eventrnn.cuda.run import Run

    network, x = small()
    expected, at = simulate(network, x).output, calls * size
    simulator = Simulator(network, batch=3, backend="cuda")
    take = (lambda part: simulator.run(part).output) if size > 1 else (lambda part: simulator.step(part[0])[None])
    for begin in range(0, at, size):
        take(x[begin : begin + size])
    with pytest.MonkeyPatch.context() as patch:
        # The third call launches a graph, and then it is interrupted.
        late = (simulator.engine, "_trace") if size > 1 else (gpu.queue, "synchronize")
        interrupt(patch, *((Run, "read_out") if calls < 2 else late))
        with pytest.raises(KeyboardInterrupt):
            take(x[at : at + size])
    for begin in range(at, 10, size):
        assert same_bits(take(x[begin : begin + size]), expected[begin : begin + size])


def test_state_stays_on_the_gpu_until_it_is_read(gpu, monkeypatch):
    network, x = small()
    fetched = []
    monkeypatch.setattr(Array, "get", lambda self, get=Array.get: fetched.append(self.shape) or get(self))
    simulator = Simulator(network, batch=3, backend="cuda")
    simulator.run(there(x))
    flat = (2, 3 * 12)
    assert flat not in fetched
    before = simulator.run(there(x)).initial
    assert flat not in fetched and before.batch == 3
    assert same_bits(before.cells[1], simulate(network, x).state.cells[1]) and fetched.count(flat) == 1
    assert isinstance(pickle.loads(pickle.dumps(before)), State) and fetched.count(flat) == 1


def test_memory_is_kept_between_runs_and_steps(gpu):
    network, x = small(readout=None)
    simulator = Simulator(network, batch=3, backend="cuda")
    device_x = there(x)
    for _ in range(2):
        simulator.run(device_x)
        simulator.step(device_x[0])
    made = gpu.allocated
    simulator.run(device_x)
    assert gpu.allocated == made
    made = gpu.allocated
    simulator.step(x[0])
    simulator.step(x[0])
    assert gpu.allocated == made


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_by_position_and_change_nothing(gpu, bad):
    network, x = small()
    simulator = Simulator(network, batch=3, backend="cuda")
    simulator.run(x)
    before = simulator.state
    x[5, 2, 1] = bad
    with pytest.raises(ValueError, match=rf"inputs: got {bad} at position \(5, 2, 1\); need finite numbers"):
        simulator.run(there(x))
    for fed in (x[5], there(x[5])):
        with pytest.raises(ValueError, match=rf"inputs: got {bad} at position \(0, 2, 1\); need finite numbers"):
            simulator.step(fed)
    assert same_bits(simulator.state.cells[0], before.cells[0])
    assert same_bits(simulator.state.outputs[1], before.outputs[1])


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("window", [4, 6, None])
@pytest.mark.parametrize("symbols", [False, True])
def test_bad_input_in_a_later_part_of_a_run_is_named_as_the_reference_names_it(
    gpu, monkeypatch, pieces, window, symbols
):
    from eventrnn.cuda import engine

    if pieces:
        monkeypatch.setattr(engine, "RECORD_BYTES", 1 << 13)
    network, x = small(symbols=symbols)
    x[(9, 2) if symbols else (9, 2, 1)] = 9 if symbols else np.nan
    options = {"carry": "events", "window": window} if window else {}
    with pytest.raises(ValueError, match=r"at (position )?\(9, 2") as reference:
        simulate(network, x, **options)
    simulator = Simulator(network, batch=3, backend="cuda", **options)
    simulator.run(x[:4])
    before = simulator.state
    for fed in (x, there(x)):
        for record in ((), "events"):
            with pytest.raises(ValueError, match="inputs") as found:
                simulator.run(fed, record=record)
            assert str(found.value) == str(reference.value)
            assert same_bits(simulator.state.cells[0], before.cells[0])
            assert same_bits(simulator.state.outputs[1], before.outputs[1])


def test_symbols_out_of_range_are_refused_by_position(gpu):
    network, x = small(symbols=True)
    for bad in (9, -1):
        x[3, 1] = bad
        with pytest.raises(ValueError, match=rf"inputs: got symbol {bad} at \(3, 1\); need 0..8"):
            simulate(network, there(x), backend="cuda")


def test_refusal_names_the_input_before_its_conversion(gpu):
    reading, x = small(symbols=True)
    symbols = x.astype(np.uint64)
    symbols[9, 1] = 2**63 + 1
    numbers = np.zeros((11, 3, 6))
    numbers[9, 2, 1] = 1e300
    for network, fed in ((reading, symbols), (small()[0], numbers)):
        with pytest.raises(ValueError, match="inputs") as reference:
            simulate(network, fed)
        for options in ({}, {"carry": "events", "window": 4}):
            with pytest.raises(ValueError, match="inputs") as found:
                simulate(network, there(fed), backend="cuda", **options)
            assert str(found.value) == str(reference.value)
        with pytest.raises(ValueError, match="inputs as float32: got inf|got symbol 9223372036854775809"):
            Simulator(network, batch=3, backend="cuda").step(there(fed[9]))


def test_recorded_inputs_are_a_copy_of_the_same_kind(gpu):
    network, x = small()
    for kind in (np.float32, np.float64):
        fed = there(x.astype(kind))
        kept = simulate(network, fed, backend="cuda", record="events").inputs
        fed[...] = 0
        assert on_gpu(kept) and kept.dtype == kind and np.array_equal(kept.get(), x)


def test_cells_that_overflow_are_named(gpu):
    network, x = small()
    state = State.zeros(network, 3)
    state.cells[1][2, 4] = 3e38
    network.layers[1].bias_in[:5] = 1e9
    network.layers[1].threshold[4] = -3e38
    with pytest.raises(FloatingPointError, match="layer 1: the cell state of unit 4 is"):
        Simulator(network, batch=3, backend="cuda", state=state).run(x)


@pytest.mark.parametrize(
    ("fed", "message"),
    [
        (np.zeros((11, 3, 5), np.float32), r"inputs: got float32 \(11, 3, 5\), need numbers \(steps, batch, 6\)"),
        (np.zeros((11, 6), np.float32), r"inputs: got float32 \(11, 6\), need numbers"),
        (np.zeros((11, 3, 6), np.complex64), "inputs: got complex64"),
        (np.zeros((11, 2, 6), np.float32), "inputs: got a batch of 2, but the simulator was made for 3"),
    ],
)
def test_arrays_of_another_shape_or_kind_are_refused(gpu, fed, message):
    with pytest.raises(ValueError, match=message):
        Simulator(small()[0], batch=3, backend="cuda").run(there(fed))
    if fed.shape[1:] == (2, 6):
        with pytest.raises(ValueError, match=message):
            Simulator(small()[0], batch=3, backend="cuda").step(there(fed[0]))


def test_arrays_on_another_gpu_are_refused(gpu, monkeypatch):
    network, x = small()
    monkeypatch.setattr(gpu.core, "device_id", 1)
    with pytest.raises(ValueError, match="inputs: got an array on GPU 0, but the network is on GPU 1; copy it there"):
        simulate(network, there(x), backend="cuda")


def test_backends_of_the_host_refuse_arrays_of_a_gpu():
    class Elsewhere:
        shape, __cuda_array_interface__ = (11, 3, 6), {}

    class Managed:
        """CUDA's managed memory: an object with DLPack but without a shape."""

        def __dlpack_device__(self):
            return 13, 0

    for backend, kind in product(("cpu", "reference", "blas"), (Elsewhere, Managed)):
        with pytest.raises(TypeError, match="on a GPU, which only backend='cuda' takes; copy it to the host"):
            simulate(small()[0], kind(), backend=backend)
        with pytest.raises(TypeError, match="on a GPU, which only backend='cuda' takes"):
            Simulator(small()[0], batch=3, backend=backend).step(kind())


def test_arrays_without_a_shape_are_refused(gpu):
    class Shapeless:
        def __dlpack_device__(self):
            return 2, 0

    with pytest.raises(TypeError, match="inputs: got a Shapeless without a shape; give a CuPy array or a torch tensor"):
        simulate(small()[0], Shapeless(), backend="cuda")


def test_tensors_without_memory_are_refused(gpu):
    class Meta:
        """A tensor without memory, like torch's meta tensors."""

        shape = (11, 3, 6)

        def __dlpack_device__(self):
            raise ValueError("Unknown device type meta for Dlpack")

        def __array__(self, dtype=None, copy=None):
            raise TypeError("can't convert meta device type tensor to numpy")

    for backend in ("cpu", "reference", "cuda"):
        simulator = Simulator(small()[0], batch=3, backend=backend)
        for take in (simulator.run, simulator.step, partial(simulate_on, small()[0], backend=backend)):
            with pytest.raises(TypeError, match=r"inputs: NumPy cannot read this \w+.Meta \(can't convert meta"):
                take(Meta())


def test_out_of_memory_says_what_is_needed_and_leaves_the_engine_usable(gpu):
    network, x = small()
    simulator = Simulator(network, batch=3, backend="cuda")
    expected = simulator.run(x).output
    simulator.reset()
    gpu.room = 40_000
    with pytest.raises(MemoryError, match=r"cuda: [\d,]+ bytes are needed"):
        simulator.run(np.tile(x, (100, 1, 1)))
    assert same_bits(simulator.run(x).output, expected)


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision: got 'float8', need one of float16, bfloat16, tf32"):
        CudaBackend(exact=False, precision="float8")


@pytest.mark.parametrize("precision", ["float16", "tf32"])
def test_a_precision_that_an_exact_run_would_not_use_is_refused(precision):
    with pytest.raises(
        ValueError, match=f"precision: got '{precision}', but exact runs round nothing; give exact=False"
    ):
        CudaBackend(precision=precision)
    assert CudaBackend(exact=False).precision == "float16" and CudaBackend().precision is None


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.fixture
def cupy():
    """The package CuPy."""
    return pytest.importorskip("cupy", reason="needs CuPy")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_streams_of_any_mixture_equal_one_run_of_the_cpu(cupy, case):
    network, x = small(*case)
    x = np.tile(x, (9, *(1,) * (x.ndim - 1)))
    expected = simulate(network, x, backend="cpu")
    simulator, rng = Simulator(network, batch=3, backend="cuda"), np.random.default_rng(0)
    output, t = [], 0
    while t < len(x):
        steps = int(rng.choice([1, 3, 7]))
        fed = [x[t : t + steps], cupy.asarray(x[t : t + steps])][rng.integers(2)]
        if rng.random() < 0.5:
            output += [simulator.run(fed).output]
        else:
            output += [simulator.step(each)[None] for each in fed]
        if rng.random() < 0.2:
            # Reading the state and setting it again change nothing.
            simulator.state = simulator.state.copy()
        t += steps
    assert same_bits(np.concatenate([cupy.asnumpy(each) for each in output]), expected.output)
    assert all(same_bits(a, b) for a, b in zip(simulator.state.cells, expected.state.cells, strict=True))
    assert all(same_bits(a, b) for a, b in zip(simulator.state.outputs, expected.state.outputs, strict=True))


@pytest.mark.gpu
@pytest.mark.torch
@pytest.mark.parametrize("case", CASES)
def test_cupy_and_torch_arrays_are_taken_and_returned(cupy, case):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    network, x = small(*case)
    expected = simulate(network, x, backend="cpu", record=("events", "states"))
    for fed, kind in ((cupy.asarray(x), cupy.ndarray), (torch.from_numpy(x).cuda(), torch.Tensor)):
        got = simulate(network, fed, backend="cuda", record=("events", "states"))
        assert isinstance(got.output, kind) and isinstance(got.events[0], kind) and isinstance(got.states[1], kind)
        assert same_bits(cupy.asarray(got.output).get(), expected.output)
        assert same_bits(cupy.asarray(got.events[0]).get(), expected.events[0].to_dense())
        assert same_bits(cupy.asarray(got.states[1]).get(), expected.states[1])
        assert count(network, got) == count(network, expected)
        assert isinstance(Simulator(network, batch=3, backend="cuda").step(fed[0]), kind)
        with pytest.raises(TypeError, match="on a GPU, which only backend='cuda' takes"):
            simulate(network, fed, backend="cpu")


@pytest.mark.gpu
@pytest.mark.torch
def test_unsupported_torch_tensors_are_refused():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    network, x = small()
    tensor = torch.from_numpy(x).cuda()
    with pytest.raises(
        TypeError, match=r"inputs: got torch.bfloat16, .* give x.float\(\), which holds the same numbers"
    ):
        simulate(network, tensor.bfloat16(), backend="cuda")
    with pytest.raises(ValueError, match=r"inputs: got a tensor that requires a gradient.* give x.detach\(\)"):
        simulate(network, tensor.requires_grad_(), backend="cuda")


@pytest.mark.gpu
def test_out_of_memory_in_a_run_leaves_the_simulator_as_it_was(cupy):
    network, x = small()
    simulator, pool = Simulator(network, batch=3, backend="cuda"), cupy.get_default_memory_pool()
    simulator.run(x)
    before = simulator.state.copy()
    # What earlier tests have left does not count as used.
    gc.collect()
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + (1 << 20))
    try:
        for fed in (np.tile(x, (3000, 1, 1)), np.tile(x, (3000, 1, 1)).astype(np.float64)):
            with pytest.raises(MemoryError, match=r"cuda: [\d,]+ bytes are needed and [\d,]+ are free"):
                simulator.run(fed)
    finally:
        pool.set_limit(size=0)
    assert all(same_bits(a, b) for a, b in zip(simulator.state.cells, before.cells, strict=True))
    assert same_bits(simulator.run(x).output, simulate(network, x, state=before, backend="cpu").output)


@pytest.mark.parametrize("size", [0, 5, 64, 1000])
def test_large_copies_use_pinned_buffers(monkeypatch, size):
    from eventrnn.cuda import transfer

    events = []

    class Queue:
        def record(self):
            events.append(SimpleNamespace(synchronize=lambda: None))
            return events[-1]

    monkeypatch.setattr(transfer, "STAGING_BYTES", 64)
    pinned = SimpleNamespace(cuda=SimpleNamespace(alloc_pinned_memory=bytearray))
    copier = transfer.StagedCopier(pinned, Queue())
    source = np.arange(size, dtype=np.float32)
    there, back = np.zeros(size, np.float32).view(Array), np.zeros(size, np.float32)
    for _ in range(2):
        copier.send(source, there)
        copier.fetch(there, back)
        assert np.array_equal(back, source)
        source += 1
    assert len(events) == 4 * -(-4 * size // 64)
