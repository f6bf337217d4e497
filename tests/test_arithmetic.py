"""Settings of the whole process, of the processor and of NumPy, change no bit and are found as they were."""

import numba
import numpy as np
import pytest

from eventrnn import _arithmetic
from eventrnn.cpu.kernels.float_mode import MODE_BITS, STANDARD, read_mode, write_mode
from eventrnn.network import Network
from eventrnn.simulation import Simulator, simulate
from eventrnn.training import Settings, Trainer
from support.conformance import assert_same

# Flush-to-zero of results and operands, rounding upwards, and all of them, in the control register of x86 and of Arm.
MODES = (0x8040, 0x4000, 0xC040) if STANDARD else (1 << 24, 1 << 22, 1 << 24 | 1 << 22)

needs_mode = pytest.mark.skipif(not MODE_BITS, reason="the floating-point mode of this processor is not known")


@numba.njit
def mode():
    return read_mode()


@numba.njit
def set_mode(value):
    write_mode(value)


class in_mode:
    """A context in which another library has changed the floating-point mode; it demands that nobody changes it."""

    def __init__(self, bits):
        self.bits = bits

    def __enter__(self):
        self.before = mode()
        set_mode(self.before | self.bits)

    def __exit__(self, *error):
        found = mode()
        set_mode(self.before)
        assert found & MODE_BITS == (self.before | self.bits) & MODE_BITS


def fading(symbols: bool = False) -> tuple[Network, np.ndarray]:
    """A network whose cells fade away to numbers below the smallest normal one, and a short input."""
    fed = {"symbols": 4, "embedding": 5} if symbols else {"inputs": 5}
    network = Network.random([20], **fed, readout=3, rng=np.random.default_rng(0), threshold=0.0)
    layer = network.layers[0]
    layer.bias_in[:20] = -3.0
    layer.bias_in[40:] = 1e-39
    layer.bias_rec[40:] = 0.0
    rng = np.random.default_rng(1)
    if symbols:
        return network, rng.integers(0, 4, (60, 2))
    x = np.zeros((60, 2, 5))
    x[:2] = rng.normal(size=(2, 2, 5))
    x[2:] = rng.normal(size=(58, 2, 5)) * 1e-40
    return network, x


@needs_mode
@pytest.mark.parametrize("bits", MODES)
@pytest.mark.parametrize("symbols", [False, True])
def test_the_floating_point_mode_changes_no_bit(symbols, bits):
    network, x = fading(symbols)
    record = ("events", "states")
    expected = simulate(network, x, record=record)
    if not symbols:
        tiny = np.abs(expected.inputs.values)
        assert ((tiny > 0) & (tiny < np.finfo(np.float32).tiny)).any()
    narrow = x if symbols else x.astype(np.float32)
    with in_mode(bits):
        found = [simulate(network, x, record=record, threads=threads) for threads in (1, 2)]
        found.append(simulate(network, x, record=record, backend="reference"))
        stream = Simulator(network, batch=2)
        steps = np.stack([stream.step(each) for each in x])
        plain = Simulator(network, batch=2)
        unconverted = np.stack([plain.step(each) for each in narrow])
    for each in found:
        assert_same(expected, each, record)
    assert np.array_equal(steps, expected.output)
    assert np.array_equal(unconverted, expected.output)


@needs_mode
def test_an_exception_leaves_the_floating_point_mode_as_it_was():
    network, x = fading()
    with in_mode(MODES[0]):
        for bad in (np.full((1, 2, 5), np.nan), np.zeros((1, 2, 4))):
            with pytest.raises(ValueError, match="inputs: got"):
                simulate(network, bad)
            with pytest.raises(ValueError, match="inputs: got"):
                Simulator(network, batch=2).step(bad[0])


def losses(threads: int) -> list[float]:
    """Losses and parameters of a short training."""
    network = Network.random([12], symbols=5, embedding=4, readout=5, rng=np.random.default_rng(0), threshold=0.1)
    text = np.random.default_rng(2).integers(0, 5, 300)
    trainer = Trainer(network, text, Settings(steps=9, batch=2, window=5, threads=threads, backward="sparse"))
    found = [trainer.step().loss for _ in range(3)]
    return [*found, *trainer.arrays()["parameters.readout"].ravel().tolist()]


@needs_mode
def test_training_has_the_same_bits_in_every_floating_point_mode():
    for threads in (1, 2):
        expected = losses(threads)
        with in_mode(MODES[2]):
            assert losses(threads) == expected


def test_settings_of_numpy_change_nothing_and_are_kept():
    network, x = fading()
    expected, trained = simulate(network, x), losses(1)
    with np.errstate(all="raise"):
        assert np.array_equal(simulate(network, x).output, expected.output)
        assert np.array_equal(simulate(network, x, backend="reference").output, expected.output)
        stream = Simulator(network, batch=2)
        assert np.array_equal(np.stack([stream.step(each) for each in x]), expected.output)
        with pytest.raises(ValueError, match="inputs as float32: got inf"):
            stream.step(np.full((2, 5), 1e300))
        assert losses(1) == trained
        assert set(np.geterr().values()) == {"raise"}


def test_without_a_c_library_the_function_still_runs(monkeypatch):
    monkeypatch.setattr(_arithmetic, "_C", None)
    with np.errstate(all="raise"):
        assert _arithmetic.standard_arithmetic(lambda x: np.float32(x) * np.float32(x))(1e30) == np.inf
