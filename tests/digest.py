"""One number for everything that a fixed set of networks does; run as a script, it tells which kernels computed it.

Every format, storage and variant, one drive and many, one thread and two, and every kind of traversal, and windows of
training: two processes with other kernels, for another processor, must print the same.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np

from eventrnn.cells import CELLS, Cell
from eventrnn.cpu import packing
from eventrnn.cpu.kernels import simd
from eventrnn.network import Network
from eventrnn.simulation import simulate
from eventrnn.state import State
from eventrnn.training import Model
from eventrnn.weights import FORMATS, STORAGES, convert

#: What `convert` needs, by format: wide, narrow and odd blocks among them.
OPTIONS = {
    "dense": ({},),
    "csr": ({},),
    "block": ({"block": (1, 64)}, {"block": (2, 16)}, {"block": (1, 4)}, {"block": (3, 5)}),
    "nm": ({"nm": (2, 4)},),
}
# By mask and by index; walking the active units and all of them. Processors with no use for masks can read them.
CHOICES = (
    {"AVX512": True, "MASKED_FROM": 0, "EVERY_FROM_SHARE": 0},
    {"MASKED_FROM": 2, "EVERY_FROM_SHARE": 2},
)


def network(variant: str, name: str, storage: str, options: dict) -> Network:
    rng = np.random.default_rng(20)
    drawn = Network.random([37, 24], inputs=21, readout=75, rng=rng, threshold=0.05, cell=Cell(variant=variant))
    matrices = {}
    for key, weights in drawn.matrices().items():
        kept = rng.random(weights.shape) < 0.4
        values = (3 * weights.to_dense() * kept).astype(np.float32)
        if name == "nm":
            # Two of each four, by place.
            values[:, 1::2] = 0
        matrices[key] = convert(values, name, storage=storage, **options)
    return drawn.with_matrices(matrices)


def digest() -> str:
    """sha256 of outputs, cells, events and final states, in a fixed order."""
    total = hashlib.sha256()
    rng = np.random.default_rng(21)
    inputs = [
        (rng.standard_normal((9, batch, 21)) * (rng.random((9, batch, 21)) < 0.5)).astype(np.float32)
        for batch in (1, 14)
    ]
    assert set(OPTIONS) == set(FORMATS)
    for name, ways in OPTIONS.items():
        for options in ways:
            for storage in STORAGES:
                for variant in CELLS["egru"]:
                    drawn = network(variant, name, storage, options)
                    for x in inputs:
                        for threads in (1, 2):
                            for choice in CHOICES:
                                with patch.multiple(packing, **choice):
                                    run = simulate(drawn, x, threads=threads, record=("events", "states"))
                                assert all(0.02 < activity < 0.98 for activity in run.activity)
                                parts = [run.output, *run.states, *(each.to_dense() for each in run.events)]
                                for array in (*parts, *run.state.cells, *run.state.outputs):
                                    total.update(np.ascontiguousarray(array).tobytes())
    for gradients in windows():
        for name in sorted(gradients):
            total.update(np.ascontiguousarray(gradients[name]).tobytes())
    return total.hexdigest()


def windows() -> Iterator[dict[str, np.ndarray]]:
    """Gradients of windows with more rows than go together, all weights, pieces of them and single ones."""
    rng = np.random.default_rng(22)
    for variant in CELLS["egru"]:
        for name, options, density in (("dense", {}, 1), ("block", {"block": (1, 64)}, 0.4), ("csr", {}, 0.1)):
            drawn = Network.random([72], inputs=21, rng=rng, threshold=0.05, cell=Cell(variant=variant))
            matrices = {}
            for key, weights in drawn.matrices().items():
                width = options.get("block", (1, 1))[1]
                kept = np.repeat(rng.random((weights.shape[0], -(-weights.shape[1] // width))) < density, width, axis=1)
                values = 2 * weights.to_dense() * kept[:, : weights.shape[1]]
                matrices[key] = convert(values.astype(np.float32), name, **options)
            drawn = drawn.with_matrices(matrices)
            x = (rng.standard_normal((3, 85, 21)) * (rng.random((3, 85, 21)) < 0.4)).astype(np.float32)
            upstream = rng.standard_normal((3, 85, 72), dtype=np.float32)
            for threads in (1, 2):
                model = Model(drawn, backward="sparse", threads=threads)
                for _ in range(2):
                    _, _, tape = model.forward(x, State.zeros(drawn, 85))
                    yield model.backward(tape, upstream, d_inputs=True)


if __name__ == "__main__":
    sys.stdout.write(json.dumps({"digest": digest(), "avx512": simd.AVX512}))
