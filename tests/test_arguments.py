"""Every argument of the public functions of networks, runs, weights, texts and figures is checked, by name.

A value that is taken without a word gives a wrong answer, or an error later that names something else. Each row of the
table is a call that is valid, its arguments, and values that an argument must not take.
"""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
from scipy import sparse

import eventrnn as er
from eventrnn import _checks, bench, data, plots
from eventrnn.cells import Cell, Surrogate
from eventrnn.counting import count_backward
from eventrnn.data import Corpus, TrigramModel, Vocabulary
from eventrnn.weights import gate_cost
from support.wrong_arguments import (
    ABOVE_ZERO,
    BLOCK,
    FLAG,
    FROM_ZERO,
    LAYER,
    MATRIX,
    NAME,
    NATURAL,
    NETWORK,
    OTHERS,
    POSITIVE,
    READER,
    RNG,
    RUN,
    SHARE,
    SIGNAL,
    TEXT,
    check_refused,
    check_valid,
    instead_of,
    row,
    wrong_arguments,
)

ROWS = {
    # --- networks and runs ---
    "Network.random": row(
        er.Network.random,
        {
            "units": (3, "12", (), (0,), (2.5,), (True,), None),
            "rng": (0, None, np.random.RandomState),
            "inputs": (0, -1, 2.5, nan, inf, "three", [1, 2], True),
            "readout": (0, -1, 2.5, True, "3"),
            "threshold": (1.0, *(value for value in SHARE if value is not None)),
            "tied": FLAG,
            "cell": ("egru", 3),
            "metadata": (3, {"a": 1}, {1: "a"}, "text"),
        },
        units=[4],
        inputs=3,
        rng=RNG,
    ),
    "Network": row(
        er.Network,
        {
            "layers": (None, 3, (), LAYER, (3,)),
            "embedding": ("text", 3, np.ones((3, 5)), np.ma.masked_array(np.ones((3, 5), np.float32), mask=True)),
            "readout": (3, "text"),
            "metadata": (3, {"a": 1}),
        },
        layers=NETWORK.layers,
        readout=NETWORK.readout,
        words={"layers": "layer"},
    ),
    "Network.with_matrices": row(
        NETWORK.with_matrices,
        {"matrices": (3, {"nothing": er.Dense(MATRIX)}, {"readout": MATRIX})},
        matrices={},
        words={"matrices": "matrices|readout"},
    ),
    "Layer": row(
        er.Layer,
        {
            "w_in": (MATRIX, None, er.Dense(MATRIX)),
            "w_rec": (MATRIX, None, er.Dense(MATRIX)),
            "bias_in": instead_of(LAYER.bias_in)[:-3],
            "threshold": (*instead_of(LAYER.threshold)[:-3], -LAYER.threshold),
            "cell": ("egru", None),
        },
        w_in=LAYER.w_in,
        w_rec=LAYER.w_rec,
        bias_in=LAYER.bias_in,
        bias_rec=LAYER.bias_rec,
        threshold=LAYER.threshold,
    ),
    "Readout": row(
        er.Readout,
        {"weights": (MATRIX, None), "bias": (None, np.ones(6), np.ones(5, np.float32)), "tied": FLAG},
        weights=er.Dense(MATRIX),
        bias=np.zeros(6, np.float32),
    ),
    "Cell": row(
        Cell,
        {"name": NAME, "variant": NAME, "surrogate": (None, "triangle", 3)},
        words={"name": "cell"},
    ),
    "Surrogate": row(Surrogate, {"kind": NAME, "dampening": ABOVE_ZERO, "support": ABOVE_ZERO}),
    "simulate": row(
        er.simulate,
        {
            "network": (None, "model", LAYER),
            "inputs": instead_of(SIGNAL),
            "lengths": (3, "12", [1], [1, 9], [1, -1], [1.5, 2], [True, True], np.ma.masked_array([1, 2], mask=True)),
            "state": (3, SIGNAL, er.State.zeros(NETWORK, 3), er.State.zeros(READER, 2)),
            "backend": (*NAME[:3], np.ones(2)),
            "exact": FLAG,
            "threads": POSITIVE,
            "record": ("spikes", 3, None, (3,)),
            "carry": NAME,
        },
        network=NETWORK,
        inputs=SIGNAL,
        backend="reference",
    ),
    "Simulator": row(
        er.Simulator,
        {"batch": POSITIVE, "window": POSITIVE[:6]},
        network=NETWORK,
        backend="reference",
    ),
    "State": row(
        lambda **arrays: er.simulate(NETWORK, SIGNAL, state=er.State(**arrays), backend="reference"),
        {
            "cells": (
                (),
                tuple(c[:1] for c in RUN.state.cells),
                tuple(c.astype(int) for c in RUN.state.cells),
                tuple(c * nan for c in RUN.state.cells),
                tuple(map(np.ma.masked_array, RUN.state.cells)),
            ),
        },
        cells=RUN.state.cells,
        outputs=RUN.state.outputs,
        words={"cells": "state"},
    ),
    "step": row(
        er.Simulator(NETWORK, batch=2, backend="reference").step, {"inputs": instead_of(SIGNAL[0])}, inputs=SIGNAL[0]
    ),
    "count": row(
        er.count,
        {"network": (None, READER), "simulation": (None, SIGNAL)},
        network=NETWORK,
        simulation=RUN,
        words={"network": "network"},
    ),
    "audit": row(
        er.audit,
        {"network": (None, READER), "simulation": (None, 3), "counts": (3,)},
        network=NETWORK,
        simulation=RUN,
        words={"network": "network"},
    ),
    "energy": row(
        er.energy, {"counts": (None, 3), "process": NAME, "memory": NAME, "engine": NAME}, counts=er.count(NETWORK, RUN)
    ),
    "count_backward": row(count_backward, {"work": (3, {"a": 3})}, work={}),
    # --- events ---
    "encode_threshold": row(
        er.encode_threshold, {"signal": instead_of(SIGNAL), "threshold": FROM_ZERO}, signal=SIGNAL, threshold=0.1
    ),
    "encode_delta": row(
        er.encode_delta,
        {
            "signal": instead_of(SIGNAL),
            "threshold": FROM_ZERO,
            "sent": (*instead_of(SIGNAL[0])[:7], "text"),
            "return_sent": FLAG,
        },
        signal=SIGNAL,
        threshold=0.1,
        sent=SIGNAL[0],
    ),
    "Events": row(
        er.Events,
        {
            "indptr": (None, [0, 0]),
            "indices": (None, [0], np.ma.masked_array(np.zeros(0, np.int32))),
            "values": (None, [0]),
            "shape": (3, (1, 2), (1, 1, -1), (1, 1, 2.5), (1, 1, True), None),
        },
        indptr=np.zeros(2, np.int64),
        indices=np.zeros(0, np.int32),
        values=np.zeros(0, np.float32),
        shape=(1, 1, 3),
        words={"indptr": "events", "indices": "events", "values": "events", "shape": "events shape"},
    ),
    "Events.from_dense": row(
        er.Events.from_dense, {"dense": instead_of(SIGNAL)}, dense=SIGNAL, words={"dense": "dense events"}
    ),
    "Events.concatenate": row(
        er.Events.concatenate,
        {"parts": ([], [3], [RUN.events[0], RUN.events[1]])},
        parts=[RUN.events[0]],
        words={"parts": "events"},
    ),
    # --- weights ---
    "convert": row(
        er.convert,
        {
            "weights": instead_of(MATRIX),
            "to": NAME,
            "block": BLOCK,
            "nm": ((2, 4, "post"), 3),
            "storage": NAME[:1] + NAME[2:],
        },
        weights=MATRIX,
        to="block",
        block=(1, 2),
        words={"to": "format"},
    ),
    "GatedBlocks.from_weights": row(
        er.GatedBlocks.from_weights,
        {
            "weights": instead_of(MATRIX),
            "block": BLOCK,
            "density": (0.0, -0.1, 1.5, nan, inf, *OTHERS),
            "rng": (0, None, np.random.RandomState),
            "gate": (MATRIX,),
            "gate_rule": NAME,
            "gate_period": POSITIVE,
        },
        weights=MATRIX,
        block=(4, 3),
        density=0.5,
        rng=RNG,
        words={"rng": "rng|gate"},
    ),
    "gate_cost": row(
        gate_cost,
        {
            "shape": (3, (4,), (4, -1), None),
            "block": BLOCK,
            "density": (0.0, -0.1, 1.5, nan, inf, *OTHERS),
            "period": POSITIVE,
        },
        shape=(4, 6),
        block=(1, 2),
        density=0.5,
        words={"shape": "shape"},
    ),
    "Dense": row(er.Dense, {"values": (None, [1], MATRIX.astype(float), np.ma.masked_array(MATRIX))}, values=MATRIX),
    "Dense.from_dense": row(
        er.Dense.from_dense, {"dense": instead_of(MATRIX)}, dense=MATRIX, words={"dense": "weights"}
    ),
    "CSR.from_scipy": row(
        er.CSR.from_scipy,
        {"matrix": (None, MATRIX, sparse.csr_array(MATRIX * 1j))},
        matrix=sparse.csr_array(MATRIX),
        words={"matrix": "matrix|weights"},
    ),
    "NM.from_dense": row(
        er.NM.from_dense,
        {"n": (0, 3, 1.5, True, "1"), "m": (1, 33, 2.5, None), "axis": NAME},
        dense=np.zeros((4, 6), np.float32),
        n=1,
        m=2,
        words={"n": "nm", "m": "nm"},
    ),
    "from_evnn": row(
        er.from_evnn,
        {
            "arrays": (
                None,
                3,
                {},
                er.to_evnn(LAYER) | {"kernel": np.full((5, 18), "x")},
                er.to_evnn(LAYER) | {"kernel": np.full((5, 18), 1j)},
                er.to_evnn(LAYER) | {"dampening_factor": np.zeros(0)},
                er.to_evnn(LAYER) | {"dampening_factor": np.array(["x"])},
            ),
            "threshold": (nan, "x", 1j, np.ones(3)),
            "dampening": (0.0, -1.0, nan, "x", 1j, np.ones(2)),
            "support": (0.0, nan, np.zeros(0)),
        },
        arrays=er.to_evnn(LAYER),
        words={"arrays": "arrays|kernel|dampening"},
    ),
    "to_evnn": row(er.to_evnn, {"layer": (None, NETWORK)}, layer=LAYER),
    # --- text ---
    "Vocabulary": row(
        Vocabulary,
        {"symbols": (None, 3, (), ("a", "a"), (1,), ("ab",)), "kind": NAME, "unknown": ("z", 3)},
        symbols=("a", "b"),
        words={"symbols": "vocabulary"},
    ),
    "Vocabulary.of": row(
        Vocabulary.of, {"text": (None, b"ab", 3), "kind": NAME, "size": (1, 2.5, True, "3")}, text="ab"
    ),
    "Vocabulary.encode": row(Vocabulary(("a", "b")).encode, {"text": (None, b"ab", 3, "c")}, text="ab"),
    "Vocabulary.decode": row(
        Vocabulary(("a", "b")).decode,
        {"numbers": ([2], [-1], [0.5], [True], 3, "a")},
        numbers=[0],
        words={"numbers": "symbols"},
    ),
    "Corpus.of": row(
        Corpus.of,
        {"train": (None, b"ab", " "), "kind": NAME, "size": (1, 0, 2.5, True)},
        train="ab",
        valid="ab",
        test="ab",
    ),
    "from_text": row(data.from_text, {"text": (None, b"ab", "a"), "kind": NAME}, text="ab " * 40),
    "read_parts": row(
        data.read_parts, {"path": (None, 3, "no/such/file")}, path=".", runs=False, words={"path": "text"}
    ),
    "words": row(data.words, {"text": (None, b"ab", 3)}, text="ab"),
    "python_documentation": row(data.python_documentation, {"rare": NATURAL, "test_size": POSITIVE}, runs=False),
    "TrigramModel": row(
        TrigramModel,
        {"train": (*instead_of(TEXT, symbols=True), TEXT[:2], TEXT + 1), "size": POSITIVE},
        train=TEXT,
        heldout=TEXT,
        size=7,
        words={"size": "size|train"},
    ),
    # --- recordings ---
    "Recording": row(
        data.Recording,
        {
            "times": (None, "three", [2.5, 3.0], [[1, 2]], [5, 1], [1]),
            "units": (None, [0.5, 1.0], [0, 2], [-1, 0]),
            "size": POSITIVE,
        },
        times=[1, 5],
        units=[0, 1],
        size=2,
        words={"times": "times", "units": "units"},
    ),
    "bin_events": row(
        data.bin_events,
        {"recordings": (None, 3, [], [RUN]), "window": POSITIVE, "t0": (1.5, "three", 3), "steps": (1, -1, 2.5, True)},
        recordings=[data.Recording([1, 5], [0, 1], 2)],
        window=3,
    ),
    "moving_bars": row(
        data.moving_bars,
        {"n": POSITIVE, "seed": NATURAL, "sensor": (3, (2,), (0, 4)), "noise": FROM_ZERO, "duration": POSITIVE},
        n=1,
        seed=0,
    ),
    "chirps": row(
        data.chirps,
        {"n": POSITIVE, "seed": NATURAL, "channels": (7, *POSITIVE), "noise": FROM_ZERO, "duration": POSITIVE},
        n=1,
        seed=0,
    ),
    # --- figures and measurements ---
    "raster": row(
        plots.raster,
        {"events": (None, SIGNAL), "sample": (2, *NATURAL), "start": (4, *NATURAL), "steps": POSITIVE},
        events=RUN.events[0],
        runs=False,
    ),
    "bars": row(
        plots.bars,
        {"operations": (None, {}, {"a": nan}, {"a": -1.0}, {"a": "x"}, {"a": None})},
        operations={"a": 1.0},
        microseconds={"a": 1.0},
        runs=False,
    ),
    "mask_map": row(
        plots.mask_map, {"matrices": (None, {}, 3, {"a": MATRIX})}, matrices={"a": er.Dense(MATRIX)}, runs=False
    ),
    "learning_curves": row(
        plots.learning_curves,
        {"curves": (None, {}, {"a": []}, {"a": [(1, nan, 1)]}, {"a": [(1, 2)]}, {"a": 3})},
        curves={"a": [(1, 2, 3)]},
        runs=False,
    ),
    "bench.Case": row(
        bench.Case,
        {
            **dict.fromkeys(("hidden", "layers", "batch", "threads", "steps"), POSITIVE),
            "repeats": (2, *POSITIVE),
            "seed": NATURAL,
            "activity": (0.0, *SHARE),
            "sparsity": (1.0, -0.1, nan, "x", True),
            "format": NAME,
            "block": BLOCK[:-1],
            "dtype": NAME,
            "variant": NAME,
            "backend": NAME,
            "exact": FLAG,
            "against": NAME[:3],
        },
    ),
    "bench.random_events": row(
        bench.random_events,
        {"steps": NATURAL, "batch": NATURAL, "size": NATURAL, "activity": SHARE},
        steps=3,
        batch=2,
        size=4,
        activity=0.5,
        rng=RNG,
    ),
    "bench.random_weights": row(
        bench.random_weights,
        {"shape": (3, (1,), (0, 4), (2.5, 4)), "sparsity": (1.0, *SHARE), "format": NAME, "dtype": NAME},
        shape=(4, 6),
        sparsity=0.5,
        format="csr",
        rng=RNG,
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_call_of_a_row_is_valid(name):
    check_valid(ROWS[name])


@pytest.mark.parametrize(("name", "argument"), wrong_arguments(ROWS))
def test_a_wrong_argument_is_refused_by_name(name, argument):
    check_refused(ROWS[name], argument)


def test_long_values_are_shortened_in_messages():
    with pytest.raises(ValueError, match=r"size: got '(x{78})…, need a whole number >= 1"):
        _checks.need_whole("size", "x" * 500, at_least=1)


@pytest.mark.parametrize("digits", [400, 10_000])
def test_whole_numbers_beyond_every_float_are_refused_in_words(digits):
    with pytest.raises(ValueError, match="^rate: got .*, need a finite number"):
        _checks.need_number("rate", 10**digits)
    with pytest.raises(ValueError, match="^size: got .*, need a whole number 1 to 5"):
        _checks.need_whole("size", 10**digits, at_least=1, at_most=5)
