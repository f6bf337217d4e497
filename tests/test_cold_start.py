"""What the first run on a machine compiles, and that nothing is compiled later. Counted with an empty cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CODE = """
import json
import numpy as np
import eventrnn as er
from numba.core import event

compiled = []

class Listener(event.Listener):
    def on_start(self, event):
        compiled.append(event.data["dispatcher"].py_func.__name__)
    def on_end(self, event):
        pass

event.register("numba:compile", Listener())
found = {}

def noting(name, call):
    call()
    found[name], compiled[:] = list(compiled), []

rng = np.random.default_rng(0)
network = er.Network.random([32], inputs=8, readout=4, rng=rng, threshold=0.1)
x = rng.standard_normal((20, 1, 8)).astype(np.float32)
noting("simulate", lambda: er.simulate(network, x))
simulator = er.Simulator(network)
noting("step", lambda: simulator.step(x[0]))

def odd(array):
    # The same numbers in every kind of array that is not the usual one.
    shifted = np.zeros(array.nbytes + 1, np.uint8)[1:]
    shifted[:] = np.frombuffer(array.tobytes(), np.uint8)
    yield np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)
    yield shifted.view(array.dtype).reshape(array.shape)
    yield np.asfortranarray(array)
    yield np.repeat(array, 2, axis=-1)[..., ::2]
    yield array[::-1][::-1]
    yield array.astype(array.dtype.newbyteorder())

def kinds(array):
    yield from odd(array)
    yield array.astype(np.float64)
    yield array.astype(np.float16)
    yield array.astype(np.int8)

events = er.Events.from_dense(x)
arrays = events.indptr, events.indices, events.values
def frozen(array):
    return np.frombuffer(array.tobytes(), array.dtype)
noting("odd steps", lambda: [simulator.step(each) for each in kinds(x[0])])
noting("odd runs", lambda: [simulator.run(each) for each in kinds(x)])
noting("odd events", lambda: simulator.run(er.Events(*map(frozen, arrays), events.shape)))
noting("strided events", lambda: simulator.run(er.Events(*(np.repeat(a, 2)[::2] for a in arrays), events.shape)))
noting("more samples", lambda: er.simulate(network, np.repeat(x, 3, axis=1)))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[str]]:
    """What each call compiled, by name of the kernel."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path_factory.mktemp("empty")), "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_first_run_compiles_only_what_this_network_needs(compiled):
    needed = set(compiled["simulate"])
    assert {"run", "update", "product_by_rows"} <= needed
    assert not needed & {"step", "product_by_blas", "update_paper", "compact_gated_events"}
    # One product per kind of column tile, of one storage: 16 functions when this was written, 114 before.
    assert len(compiled["simulate"]) <= 24


def test_first_step_compiles_no_second_time_loop(compiled):
    assert "step" in compiled["step"] and "run" not in compiled["step"]
    # 5 functions when this was written.
    assert len(compiled["step"]) <= 8


@pytest.mark.parametrize("what", ["odd steps", "odd runs", "odd events", "strided events", "more samples"])
def test_no_kind_of_array_compiles_anything_in_a_warm_stream(compiled, what):
    assert compiled[what] == []
