"""Small trainers for tests of runs in folders."""

import numpy as np

from eventrnn import Network
from eventrnn.training import LanguageModelling, Regularisers, Settings, Trainer

TEXT = np.random.default_rng(5).integers(0, 6, 900) // 2 * 2 + np.arange(900) % 2
NOISE = Regularisers(0.3, 0.1, 0.2, 0.1, 0.1, 0.1, activity_rate=0.5, temporal_activation=0.1)


def small_trainer(seed=0, text=TEXT, pruning=None, layers=(12, 9), **changes):
    """A trainer of a few milliseconds that uses every kind of noise; `changes` are settings."""
    network = Network.random(
        list(layers), symbols=8, embedding=5, readout=8, threshold=0.1, rng=np.random.default_rng(1)
    )
    options = {"steps": 30, "batch": 4, "window": 8, "window_jitter": 2.0, "learning_rate": 1e-2, "validate_every": 7}
    chosen = Settings(**(options | {"regularisers": NOISE, "seed": seed} | changes))
    return Trainer(network, LanguageModelling(text[:700], text[700:]), chosen, pruning=pruning)


def bits_of(trainer):
    """Everything that a checkpoint keeps of a trainer."""
    return {name: array.tobytes() for name, array in trainer.arrays().items()} | {"rest": trainer.numbers()}
