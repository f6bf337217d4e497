"""Every argument of the public functions that train and prune: what it cannot be is refused at once, by name.

A value that is taken without a word gives a wrong answer, or an error later that names something else. Each row of the
table is a call that is valid, its arguments, and values that an argument must not take.
"""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest

import eventrnn as er
from eventrnn import pruning, training
from eventrnn.pruning import patterns
from eventrnn.training import losses
from support.wrong_arguments import (
    ABOVE_ZERO,
    BLOCK,
    FLAG,
    FROM_ZERO,
    LAYER,
    MASK,
    MATRIX,
    NAME,
    NAMES,
    NATURAL,
    NETWORK,
    POSITIVE,
    READER,
    SHARE,
    SIGNAL,
    TEXT,
    check_refused,
    check_valid,
    instead_of,
    row,
    wrong_arguments,
)

SOFT = training.SoftTargets([[0]], [[0.5]])

ROWS = {
    # --- training ---
    "Settings": row(
        training.Settings,
        {
            **dict.fromkeys(("steps", "batch", "window", "threads"), POSITIVE),
            **dict.fromkeys(("epochs", "validate_every", "patience", "seed"), NATURAL),
            **dict.fromkeys(("learning_rate", "clip"), ABOVE_ZERO),
            **dict.fromkeys(("weight_decay", "activity_cost", "clip_layers", "window_jitter"), FROM_ZERO),
            **dict.fromkeys(("thresholds", "backward"), NAME),
            **dict.fromkeys(("optimiser", "schedule", "regularisers", "gates"), (None, "adam", 3)),
        },
    ),
    "Optimiser": row(
        training.Optimiser,
        {
            "kind": NAME,
            **dict.fromkeys(("beta1", "beta2", "momentum"), (1.0, *SHARE)),
            "epsilon": ABOVE_ZERO,
            "patience": POSITIVE,
            **dict.fromkeys(("threshold_rate", "bias_rate", "embedding_rate", "readout_rate"), FROM_ZERO),
            "decay_biases": FLAG,
        },
    ),
    "Schedule": row(
        training.Schedule,
        {
            "kind": NAME,
            **dict.fromkeys(("constant", "final", "factor"), SHARE),
            "every": (0.0, *SHARE),
            "warmup": NATURAL,
        },
    ),
    "Regularisers": row(
        training.Regularisers,
        {
            **dict.fromkeys(
                ("dropconnect", "dropout_input", "dropout_between", "dropout_top", "dropout_words", "zoneout"),
                (1.0, *SHARE),
            ),
            **dict.fromkeys(("activity_rate", "state", "activation", "temporal_activation", "state_margin"), FROM_ZERO),
            "gate_balance": FROM_ZERO,
            "activity_target": SHARE,
            "mask_sharing": NAME,
        },
    ),
    "GateSettings": row(
        training.GateSettings,
        {"straight_through": FLAG, "start_density": SHARE, "anneal_steps": NATURAL},
        start_density=0.5,
        anneal_steps=3,
    ),
    "Gating": row(
        training.Gating,
        {
            "straight_through": FLAG,
            "densities": (None, 3, ["readout"], *({"readout": share} for share in (0.0, *SHARE))),
        },
    ),
    "clip_by_norm": row(
        training.clip_by_norm,
        {"limit": ABOVE_ZERO, "gradients": (None, 3, {"a": [1.0]}, {"a": np.ones(2, int)})},
        gradients={"a": np.ones(3, np.float32)},
        limit=1.0,
    ),
    "clip_by_layer": row(
        training.clip_by_layer, {"limit": ABOVE_ZERO}, gradients={"layers.0.w_in": np.ones(3, np.float32)}, limit=1.0
    ),
    "cross_entropy": row(
        losses.cross_entropy,
        {
            "logits": (*instead_of(SIGNAL)[:5], None, "text", np.float32(3)),
            "targets": (np.full((4, 2), 5), np.full((4, 2), -1), np.ones((4, 2)), np.ones((4, 2), bool), None, 3),
            "soft": (3, "text", SIGNAL, SOFT, training.SoftTargets([[[9]]], [[[0.5]]])),
        },
        logits=SIGNAL,
        targets=np.zeros((4, 2), int),
        runs=False,
    ),
    "squared_error": row(
        losses.squared_error,
        {"output": instead_of(SIGNAL)[:6], "targets": instead_of(SIGNAL)[:7]},
        output=SIGNAL,
        targets=SIGNAL,
        words={"output": "output|targets"},
    ),
    "Model": row(
        training.Model,
        {"network": (None, LAYER), "backward": NAME, "threads": (65, *POSITIVE), "thresholds": NAME},
        network=NETWORK,
    ),
    "Model.forward": row(
        training.Model(NETWORK).forward,
        {
            "inputs": instead_of(SIGNAL),
            "state": (None, 3, er.State.zeros(NETWORK, 1), er.State.zeros(READER, 2)),
            "noise": (3, {}, training.Noise(inputs=[1]), training.Noise(top=np.ones((2, 9)))),
            "gating": (3, {}, training.Gating(densities={"readout": 0.5})),
        },
        inputs=SIGNAL,
        state=er.State.zeros(NETWORK, 2),
        runs=False,
    ),
    "Trainer": row(
        training.Trainer,
        {
            "network": (None, LAYER),
            "task": (None, *instead_of(TEXT, symbols=True)),
            "settings": (None, {}),
            "pruning": (3, "magnitude"),
            "model": (3,),
        },
        network=READER,
        task=TEXT,
        settings=training.Settings(batch=2, window=4),
        words={"task": "train"},
    ),
    "LanguageModelling": row(
        training.LanguageModelling,
        {
            "train": instead_of(TEXT, symbols=True),
            "valid": instead_of(TEXT, symbols=True)[:-3],
            "valid_batch": POSITIVE,
            "carry": NAME,
            "soft": (3, "text", TEXT, training.SoftTargets([[0]], [[0.5]])),
        },
        train=TEXT,
    ),
    "SoftTargets": row(
        training.SoftTargets,
        {
            "symbols": ([[0, 0]], [[0, -1]], [[0.0, 1.0]], [0], [[0]], None, "text", 3),
            "probabilities": ([[0.5, 0.6]], [[0.5, -0.1]], [[nan, 0.1]], [0.5], [[0.5]], None, "text", 3),
            "weight": SHARE,
        },
        symbols=[[0, 1]],
        probabilities=[[0.5, 0.25]],
        words={"symbols": "symbols|probabilities"},
    ),
    "soft_targets": row(
        training.soft_targets,
        {
            "teacher": (None, NETWORK),
            "symbols": instead_of(TEXT, symbols=True),
            "weight": SHARE,
            "top_k": (99, *POSITIVE),
            "backend": NAME,
            "threads": POSITIVE,
        },
        teacher=READER,
        symbols=TEXT,
        top_k=2,
        words={"teacher": "network"},
        runs=False,
    ),
    "Classification": row(
        training.Classification,
        {
            "inputs": instead_of(SIGNAL)[:6],
            "targets": instead_of(np.zeros(4, int))[:5],
            "valid": (3, (SIGNAL,), (SIGNAL, np.zeros(3, int))),
            "read": NAME,
            "lengths": ([1], [1, 2, 3, 9], [0, 1, 1, 1], [1.0, 1, 1, 1], 3),
            "seed": NATURAL,
        },
        inputs=SIGNAL,
        targets=np.zeros(4, int),
        words={"inputs": "train", "targets": "train", "lengths": "train|valid"},
    ),
    "evaluate": row(
        training.evaluate,
        {
            "network": (None, NETWORK),
            "symbols": instead_of(TEXT, symbols=True),
            "backend": NAME,
            "threads": POSITIVE,
            "chunk": POSITIVE,
        },
        network=READER,
        symbols=TEXT,
        runs=False,
    ),
    # --- pruning ---
    "prune": row(
        pruning.prune,
        {
            "network": (None, LAYER),
            "sparsity": (1.0, *SHARE),
            "block": BLOCK,
            "scope": NAME,
            "statistic": NAME,
            "gates": NAME,
            "names": (*NAMES, ("nothing",)),
            "exempt": (*NAMES, ("nothing",)),
        },
        network=NETWORK,
        sparsity=0.5,
        words={"names": "names|pruning", "exempt": "exempt|pruning"},
    ),
    "prune_to": row(pruning.prune_to, {"pattern": (None, 3, "1x1")}, network=NETWORK, pattern=pruning.Blocks(0.5)),
    "Blocks": row(
        pruning.Blocks, {"sparsity": (1.0, *SHARE), "block": BLOCK[:-1], "statistic": NAME, "gates": NAME}, sparsity=0.5
    ),
    "NofM": row(
        pruning.NofM,
        {"n": (0, 5, 1.5, True), "m": (1, 33, None), "axis": NAME, "method": NAME, "threads": POSITIVE},
        n=2,
        m=4,
        words={"n": "nm", "m": "nm"},
    ),
    "BlockDiagonal": row(pruning.BlockDiagonal, {"parts": POSITIVE}, parts=2),
    "magnitude_mask": row(
        pruning.magnitude_mask,
        {
            "dense": instead_of(MATRIX),
            "sparsity": (1.0, *SHARE),
            "block": BLOCK,
            "statistic": NAME,
            "within": (MATRIX, MASK[1:], 3),
            "allow_empty": FLAG,
        },
        dense=MATRIX,
        sparsity=0.5,
        words={"dense": "matrix"},
    ),
    "magnitude_masks": row(
        pruning.magnitude_masks,
        {"matrices": (None, 3, {}), "scope": NAME, "gates": NAME},
        matrices={"a": MATRIX},
        sparsity=0.5,
    ),
    "block_scores": row(
        pruning.block_scores,
        {"dense": instead_of(MATRIX), "block": BLOCK, "statistic": NAME},
        dense=MATRIX,
        block=(1, 2),
        words={"dense": "weights"},
    ),
    "nm_mask": row(
        pruning.nm_mask,
        {"dense": instead_of(MATRIX), "n": (0, 5, True), "m": (1, 99), "axis": NAME, "threads": POSITIVE},
        dense=MATRIX,
        n=1,
        m=2,
        runs=False,
        words={"dense": "weights", "n": "nm", "m": "nm"},
    ),
    "transposable_mask": row(
        pruning.transposable_mask, {"method": NAME, "threads": POSITIVE}, dense=MATRIX, n=1, m=2, runs=False
    ),
    "legal": row(pruning.legal, {"mask": (MATRIX, MASK[0], None), "axis": NAME}, mask=MASK, n=2, m=2, axis="post"),
    "mask_diversity": row(pruning.mask_diversity, {"side": (3, 0, 2.5, True, "4")}, n=1, m=2, side=4),
    "with_masks": row(
        pruning.with_masks,
        {"masks": (3, {"nothing": MASK}, {"readout": np.ones((4, 3))}), "pattern": (None, 3)},
        network=NETWORK,
        masks={"readout": np.ones((4, 3), bool)},
        pattern=pruning.Blocks(0.5),
        words={"masks": "mask"},
    ),
    "compress": row(pruning.compress, {"block": BLOCK}, weights=MATRIX, block=(1, 2)),
    "refit": row(
        pruning.refit,
        {
            "dense": instead_of(MATRIX),
            "mask": (MATRIX, MASK[1:], None),
            "sent": (*instead_of(MATRIX.T)[:6], MATRIX, None),
            "bias": FLAG,
            "tolerance": FROM_ZERO,
            "iterations": NATURAL,
        },
        dense=MATRIX,
        mask=MASK,
        sent=np.ascontiguousarray(MATRIX.T),
    ),
    "adaprune": row(
        pruning.adaprune,
        {"pattern": (None, 3), "tolerance": FROM_ZERO, "iterations": NATURAL, "bias": FLAG},
        network=NETWORK,
        inputs=SIGNAL,
        pattern=pruning.Blocks(0.5),
        runs=False,
    ),
    "prune_to_operations": row(
        pruning.prune_to_operations,
        {
            "budget": (0.0, 1.5, nan, True, "x", None),
            "criterion": NAME,
            "scope": NAME,
            "block": BLOCK,
            "allow_empty": FLAG,
        },
        network=NETWORK,
        inputs=SIGNAL,
        budget=0.5,
        runs=False,
    ),
    "GradualPruning": row(
        pruning.GradualPruning,
        {
            "sparsity": (1.0, *SHARE),
            "block": BLOCK[:-1],
            "start": NATURAL,
            "end": NATURAL,
            "every": POSITIVE,
            "scope": NAME,
            "statistic": NAME,
            "gates": NAME,
            "names": NAMES,
            "exempt": NAMES,
        },
        sparsity=0.5,
    ),
    "ThresholdPruning": row(
        pruning.ThresholdPruning,
        {
            "sparsity": (1.0, -0.1, nan, "x", True),
            "block": BLOCK[:-1],
            "ramp": (*NATURAL, 9),
            "percentile": (0.0, 101.0, *FROM_ZERO),
            "steep": (0.5, nan, inf, None),
            "growth": (nan, inf, None, "x"),
            "dense": FLAG,
            "trained": (3, None),
            "statistic": NAME,
        },
        words={"ramp": "ramp"},
    ),
    "GroupLasso": row(
        pruning.GroupLasso,
        {"strength": ABOVE_ZERO, "block": BLOCK[:-1], "scaled": FLAG, "every": POSITIVE},
        strength=0.1,
    ),
    "StaticMasks": row(pruning.StaticMasks, {"pattern": (None, 3), "start": NATURAL}, pattern=pruning.Blocks(0.5)),
    "DynamicMasks": row(
        pruning.DynamicMasks,
        {"pattern": (None, 3), "start": NATURAL, "every": POSITIVE, "decay": (1.0, *SHARE)},
        pattern=pruning.Blocks(0.5),
        end=90,
    ),
    "RegrownMasks": row(
        pruning.RegrownMasks,
        {"sparsity": (1.0, *SHARE), "share": (0.0, *SHARE), "every": POSITIVE, "block": BLOCK[:-1], "statistic": NAME},
        sparsity=0.5,
        end=90,
    ),
    "cubic_schedule": row(
        pruning.cubic_schedule,
        {"final": SHARE, "initial": SHARE, "start": NATURAL, "end": (0, *NATURAL)},
        final=0.5,
        start=0,
        end=5,
        words={"end": "end|schedule"},
    ),
    "parse_nm": row(patterns.parse_nm, {"text": ("2", "a:b", "2:4:x", None, 3)}, text="2:4", words={"text": "nm"}),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_call_of_a_row_is_valid(name):
    check_valid(ROWS[name])


@pytest.mark.parametrize(("name", "argument"), wrong_arguments(ROWS))
def test_a_wrong_argument_is_refused_by_name(name, argument):
    check_refused(ROWS[name], argument)
