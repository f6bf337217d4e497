"""Cases with long silence: few inputs, and units whose cells stay below their thresholds, reach them, or pass them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from eventrnn import cells
from eventrnn.cpu.silence import silent_steps
from eventrnn.events import Events
from eventrnn.network import Network
from eventrnn.simulation import Simulation, Simulator, simulate
from eventrnn.testing import EVENT_CELLS, networks, states
from support.conformance import Case, assert_same, part

#: More steps than a chunk of time has.
STEPS = 70


def fixed_points(network: Network) -> np.ndarray:
    """The cells of all layers, (units,) float32, after so much silence that they no longer change."""
    keep, pull = silent_steps(network)
    c = np.zeros_like(keep)
    for _ in range(2000):
        before, c = c, cells.egru_decay(keep, pull, c)
        if np.array_equal(before, c):
            return c
    raise AssertionError("the cells still change")


def with_thresholds(network: Network, threshold: np.ndarray) -> Network:
    """The network with these thresholds, (units of all layers,)."""
    ends = np.cumsum([layer.units for layer in network.layers])[:-1]
    pairs = zip(network.layers, np.split(threshold, ends), strict=True)
    return replace(network, layers=tuple(replace(layer, threshold=np.maximum(own, 0)) for layer, own in pairs))


@st.composite
def quiet_cases(draw) -> Case:
    """Of each network, some units have their threshold at the fixed point of silence, some one ulp from it."""
    options = {"formats": ("dense",), "storages": ("float32",), "cells": EVENT_CELLS, "embedding": False}
    network = draw(networks(layers=st.integers(1, 2), max_inputs=6, **options))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    ends, one = fixed_points(network), np.float32(1)
    limits = np.stack([ends, np.nextafter(ends, -one), np.nextafter(ends, 2 * one), np.abs(ends) + one / 4])
    # Mostly units that no silence brings to an event: one of the others ends each run of silent steps.
    kinds = rng.choice(4, len(ends), p=draw(st.sampled_from(((0.5, 0, 0, 0.5), (0.2, 0.02, 0.18, 0.6)))))
    network = with_thresholds(network, limits[kinds, np.arange(len(ends))])
    batch, size = draw(st.integers(1, 3)), network.layers[0].inputs
    busy = rng.random((STEPS, batch, 1)) < draw(st.sampled_from((0.03, 0.0, 0.2)))
    values = rng.standard_normal((STEPS, batch, size)) * busy * (rng.random((STEPS, batch, size)) < 0.7)
    fed = Events.from_dense(values.astype(np.float32))
    return Case(network, fed if draw(st.booleans()) else fed.to_dense(), draw(states(network, batch)))


def check_silence(backend, data, threads, record) -> None:
    """A quiet case has the bits of the specification: in one run, in chunks, and step by step."""
    case = data.draw(quiet_cases())
    fed = case.inputs
    expected = simulate(case.network, fed, state=case.state, backend="reference", record=("events", "states"))

    def simulator() -> Simulator:
        return case.simulator(backend, threads=threads)

    assert_same(expected, simulator().run(fed, record=record), record)
    cut, whole = data.draw(st.integers(0, STEPS)), simulator()
    outputs = [whole.run(part(fed, each)).output for each in (slice(cut), slice(cut, None))]
    assert_output(np.concatenate(outputs), expected)
    single, numbers = simulator(), fed.to_dense() if isinstance(fed, Events) else fed
    assert_output(np.stack([single.step(x) for x in numbers]), expected)
    for found in (whole.state, single.state):
        assert all(a.tobytes() == b.tobytes() for a, b in zip(found.cells, expected.state.cells, strict=True))


def assert_output(output: np.ndarray, expected: Simulation) -> None:
    assert output.tobytes() == expected.output.tobytes()
