"""Small networks of every format on the CUDA engine, to be run under NVIDIA's compute-sanitizer.

    compute-sanitizer --report-api-errors no --tool memcheck python experiments/sanitizer_cases.py
    compute-sanitizer --report-api-errors no --tool racecheck python experiments/sanitizer_cases.py

Each case is a run, single steps and a replayed graph. Events are compared with those of the CPU engine.
"""

from __future__ import annotations

import sys

import numpy as np

from eventrnn.cells import Cell
from eventrnn.cuda import PRECISIONS, CudaBackend
from eventrnn.network import Network
from eventrnn.simulation import Simulator, simulate
from eventrnn.weights import convert

UNITS, INPUTS, STEPS = [40, 100], 33, 5
STORED = [
    ("csr", {}, "bfloat16"),
    ("block", {"block": (1, 32)}, "bfloat16"),
    ("block", {"block": (1, 32)}, "float32"),
    ("dense", {}, "float32"),
    ("nm", {"nm": (8, 8, "post")}, "int8"),
]


def exact(network: Network, batch: int, rng: np.random.Generator, backend: str) -> bool:
    """Whether a run has the events of the CPU engine. Single steps and a replayed graph follow."""
    x = rng.standard_normal((STEPS, batch, INPUTS)).astype(np.float32)
    ours, theirs = (simulate(network, x, backend=name, record=("events", "states")) for name in (backend, "cpu"))
    stream = Simulator(network, batch=batch, backend=backend)
    for each in x[:3]:
        stream.step(each)
    for _ in range(2):
        stream.run(x)
    pairs = zip(ours.events, theirs.events, strict=True)
    return all(np.array_equal(a.to_dense(), b.to_dense()) for a, b in pairs)


def inexact(network: Network, precision: str, rng: np.random.Generator) -> bool:
    """Whether the layers went through tensor cores, which this function forces."""
    simulator = Simulator(network, batch=9, backend=CudaBackend(exact=False, precision=precision))
    simulator.engine.tensor_layers[9] = tuple(range(len(UNITS)))
    paths = simulator.run(rng.standard_normal((STEPS, 9, INPUTS)).astype(np.float32)).paths
    return paths["layers.0.w_rec"] == f"tensor {precision}"


def main(backend: str = "cuda") -> int:
    good, rng = [], np.random.default_rng(1)
    for variant in ("evnn", "paper"):
        network = Network.random(UNITS, inputs=INPUTS, readout=40, rng=rng, threshold=0.1, cell=Cell(variant=variant))
        for name, options, storage in STORED:
            kept = 1 if name == "dense" else 0.2
            thinned = {
                k: convert(2 * w.to_dense() * (rng.random(w.shape) < kept), name, storage=storage, **options)
                for k, w in network.matrices().items()
            }
            good += [exact(network.with_matrices(thinned), batch, rng, backend) for batch in (1, 7)]
        if variant == "evnn" and backend == "cuda":
            good += [inexact(network, precision, rng) for precision in PRECISIONS]
    print(f"{sum(good)} of {len(good)} cases passed")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
