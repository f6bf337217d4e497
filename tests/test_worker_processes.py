"""Objects that are sent to worker processes, used or not: their copies give the same bits there."""

import copy
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest

from eventrnn import Network, Simulator, simulate
from eventrnn._arrays import own_arrays
from eventrnn.pruning import GradualPruning
from eventrnn.training import LanguageModelling, Settings, Trainer

SYMBOLS = np.random.default_rng(1).integers(0, 7, (12, 2))


def drawn() -> Network:
    return Network.random([24], symbols=7, embedding=8, readout=7, rng=np.random.default_rng(0), threshold=0.05)


def outputs(network: Network) -> list[np.ndarray]:
    return [simulate(network, SYMBOLS, threads=2).output]


def steps(simulator: Simulator) -> list[np.ndarray]:
    return [simulator.step(symbols) for symbols in SYMBOLS]


def trained(trainer: Trainer) -> list[np.ndarray]:
    trainer.run()
    arrays = trainer.arrays()
    return [arrays[name].copy() for name in sorted(arrays)]


def jobs():
    """Each a function and its argument, which was used before."""
    simulator = Simulator(drawn(), batch=2)
    steps(simulator)
    task = LanguageModelling(SYMBOLS[:, 0].repeat(8), SYMBOLS[:, 1].repeat(3))
    pruning = GradualPruning(0.5, (1, 1), 0, 4, every=2)
    trainer = Trainer(drawn(), task, Settings(steps=6, batch=2, window=8, threads=2), pruning=pruning)
    trainer.step()
    return [(outputs, drawn()), (steps, simulator), (trained, trainer)]


def check(results, given):
    for (function, argument), result in zip(given, results, strict=True):
        expected = function(copy.deepcopy(argument))
        assert len(expected) == len(result)
        assert all(np.array_equal(a, b) for a, b in zip(expected, result, strict=True)), function.__name__


def call(job):
    function, argument = job
    return function(argument)


def test_spawned_processes_give_the_same_bits():
    given = jobs()
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        check(list(pool.map(call, given)), given)


def test_workers_of_joblib_give_the_same_bits():
    joblib = pytest.importorskip("joblib", reason="needs joblib")
    given = jobs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Arrays of more than 100 bytes are given as maps of files, which are read-only.
        check(joblib.Parallel(n_jobs=2, max_nbytes=100)(joblib.delayed(call)(job) for job in given), given)


@pytest.mark.torch
def test_workers_of_a_data_loader_give_the_same_bits():
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    given = jobs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the fork of a process with threads
        loader = torch.utils.data.DataLoader(Results(given), batch_size=None, num_workers=1)
        check([[array.numpy() for array in result] for result in loader], given)


class Results:
    """A data set whose elements are results of simulations and of a training."""

    def __init__(self, given):
        self.given = given

    def __len__(self):
        return len(self.given)

    def __getitem__(self, number):
        if number >= len(self.given):
            raise IndexError(number)
        return call(self.given[number])


def test_read_only_arrays_and_maps_of_files_are_replaced_by_copies(tmp_path):
    class Holder:
        """An object that writes to its arrays."""

    fixed, own = np.ones(3), np.zeros(2)
    fixed.flags.writeable = False
    mapped = np.memmap(tmp_path / "map", np.float32, "w+", shape=(4,))
    holder = Holder()
    holder.arrays, holder.again, holder.pair, holder.self = {"a": fixed, "b": own}, [fixed], (mapped, own), holder
    assert own_arrays(holder) is holder
    holder.arrays["a"][:] = 2
    holder.pair[0][:] = 3
    assert holder.arrays["b"] is own
    assert holder.pair[1] is own
    assert holder.again[0] is holder.arrays["a"]
    assert type(holder.pair[0]) is np.ndarray
    assert not mapped.any()
    assert fixed.tolist() == [1, 1, 1]
