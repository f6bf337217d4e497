"""Digests of the results of fixed sets of networks. As a script, it prints them and whether AVX-512 was used.

The networks of `digest` have every format, storage and variant of the EGRU. They run with one drive and many, on one
thread and two, with every kind of kernel, and in windows of training. `digest_of_cells_and_gates` adds GRU and LSTM
cells, and blocks that every input chooses; `digest_of_integers` has products that are not exact. Processes with kernels
for different processors must print the same digests.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np

from eventrnn.cells import CELLS, Cell
from eventrnn.cpu import packing
from eventrnn.cpu.kernels import simd
from eventrnn.network import Network
from eventrnn.simulation import Simulation, simulate
from eventrnn.state import State
from eventrnn.training import Model
from eventrnn.weights import FORMATS, STORAGES, GatedBlocks, convert

#: Format -> options of `convert`. Blocks are wide, narrow and of odd sizes.
OPTIONS = {
    "dense": ({},),
    "csr": ({},),
    "block": ({"block": (1, 64)}, {"block": (2, 16)}, {"block": (1, 4)}, {"block": (3, 5)}),
    "nm": ({"nm": (2, 4)},),
}
# Weights by mask and by index; products over the active units and over all. Masks work without AVX-512, but slowly.
CHOICES = (
    {"AVX512": True, "MASKED_FROM": 0, "DENSE_ACTIVITY_THRESHOLD": 0},
    {"MASKED_FROM": 2, "DENSE_ACTIVITY_THRESHOLD": 2},
)


def network(variant: str, name: str, storage: str, options: dict) -> Network:
    rng = np.random.default_rng(20)
    drawn = Network.random([37, 24], inputs=21, readout=75, rng=rng, threshold=0.05, cell=Cell(variant=variant))
    matrices = {}
    for key, weights in drawn.matrices().items():
        kept = rng.random(weights.shape) < 0.4
        values = (3 * weights.to_dense() * kept).astype(np.float32)
        if name == "nm":
            # At most two of each four weights are non-zero.
            values[:, 1::2] = 0
        matrices[key] = convert(values, name, storage=storage, **options)
    return drawn.with_matrices(matrices)


def digest() -> str:
    """SHA-256 of outputs, cells, events, final states and gradients, in a fixed order."""
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
                                add(total, run)
    for gradients in windows():
        for name in sorted(gradients):
            total.update(np.ascontiguousarray(gradients[name]).tobytes())
    return total.hexdigest()


def add(total: Any, run: Simulation) -> None:
    """Add outputs, cells, events and final states of a run to a hash."""
    parts = [run.output, *run.states, *(each.to_dense() for each in run.events)]
    for array in (*parts, *run.state.cells, *run.state.outputs):
        total.update(np.ascontiguousarray(array).tobytes())


def digest_of_cells_and_gates() -> str:
    """SHA-256 of outputs, cells, events and final states of cells without thresholds, and of gated blocks."""
    total, rng = hashlib.sha256(), np.random.default_rng(23)
    inputs = [rng.standard_normal((6, batch, 21), dtype=np.float32) for batch in (1, 14)]
    for drawn in (*plain_networks(), *gated_networks()):
        for x in inputs:
            for threads in (1, 2):
                add(total, simulate(drawn, x, threads=threads, record=("events", "states")))
    return total.hexdigest()


def digest_of_integers() -> str:
    """SHA-256 of outputs, cells, events and final states of int8 blocks that are multiplied in integers."""
    total, rng = hashlib.sha256(), np.random.default_rng(26)
    for variant in CELLS["egru"]:
        drawn = network(variant, "block", "int8", {"block": (1, 64)})
        x = rng.standard_normal((6, 3, 21), dtype=np.float32)
        for threads in (1, 2):
            add(total, simulate(drawn, x, threads=threads, exact=False, record=("events", "states")))
    return total.hexdigest()


def plain_networks() -> Iterator[Network]:
    """Networks of GRU and LSTM cells, dense and pruned, of units that are and are not whole vectors."""
    rng = np.random.default_rng(24)
    for cell in (Cell(name, variant) for name in CELLS if name != "egru" for variant in CELLS[name]):
        for name, options in (("dense", {}), ("csr", {}), ("block", {"block": (1, 64)})):
            drawn = Network.random([37, 32], inputs=21, readout=75, rng=rng, cell=cell)
            matrices = {
                key: convert(
                    (weights.to_dense() * (rng.random(weights.shape) < 0.4)).astype(np.float32), name, **options
                )
                for key, weights in drawn.matrices().items()
            }
            yield drawn.with_matrices(matrices)


def gated_networks() -> Iterator[Network]:
    """Networks of gated blocks of several sizes, storages and rules, with gates of one factor and of two."""
    rng = np.random.default_rng(25)
    for cell, threshold in ((Cell(), 0.05), (Cell("lstm"), 0.0)):
        for block, density, rule, rank in (((5, 8), 0.5, "linear", None), ((21, 40), 0.3, "softmax", 3)):
            for storage in ("float32", "int8"):
                drawn = Network.random([37], inputs=21, readout=75, rng=rng, threshold=threshold, cell=cell)
                options = {"block": block, "density": density, "gate_rule": rule, "rank": rank, "rng": rng}
                with warnings.catch_warnings():
                    # Gates of matrices this small cost more than they save.
                    warnings.simplefilter("ignore", UserWarning)
                    yield drawn.with_matrices(
                        {
                            key: GatedBlocks.from_weights(weights.stored_as(storage), **options)
                            for key, weights in drawn.matrices().items()
                        }
                    )


def windows() -> Iterator[dict[str, np.ndarray]]:
    """Gradients of windows with more rows than a tile, with dense, blocked and single weights."""
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
    digests = {"digest": digest(), "cells_and_gates": digest_of_cells_and_gates(), "integers": digest_of_integers()}
    sys.stdout.write(json.dumps(digests | {"avx512": simd.AVX512}))
