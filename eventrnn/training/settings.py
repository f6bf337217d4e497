"""Settings of a training run: all that determines its result, except the network, the data and the pruning method."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from eventrnn._checks import need_choice, need_kind, need_number, need_whole
from eventrnn.backend import TRAINING_ENGINES
from eventrnn.training.bptt.model import BACKWARDS
from eventrnn.training.gates import GateSettings
from eventrnn.training.optim import Optimiser, Schedule
from eventrnn.training.regularisers import Regularisers
from eventrnn.training.thresholds import check_rule

# Types of the factors of products on a GPU.
PRECISIONS = ("bfloat16", "tf32", "float32")


@dataclass(frozen=True)
class Settings:
    """Settings of a training run.

    Attributes
    ----------
    steps          : number of parameter updates; not used when `epochs` is given
    epochs         : number of passes over the data, in place of `steps`; 0 to use `steps`
    batch          : number of streams (of a text) or of sequences per update
    window         : time steps per window of a text. The gradient stops at the edge of a window; the state is carried
    window_jitter  : standard deviation in steps of a random window length, 0 for windows of equal length. The length
                     is drawn around `window`, in 5 % of the windows around half of it, and is at least 5 (Merity et
                     al. 2017)
    learning_rate  : learning rate before its schedule; for a text it is scaled by the length of the window / `window`
    weight_decay   : decoupled weight decay with adamw, L2 regularisation with the other optimisers
    clip           : upper bound on the 2-norm of all gradients together
    clip_layers    : upper bound on the 2-norm of the gradients of each layer, applied before `clip`; 0 for none
    activity_cost  : weight of the mean output of the units in the loss; it lowers the activity
    validate_every : updates between two validations; 0 to validate after each epoch and at the end
    patience       : end the run after this many validations without a new best; 0 for never
    seed           : seed of the run, which is reproducible bit for bit on one machine with one number of BLAS threads
    thresholds     : rule for learning thresholds: positive, clamped (to [0, 1]), sigmoid or fixed, see `Model`
    backward       : kernels of the backward pass, see `Model`
    threads        : number of threads of the training kernels; a run may be resumed with another number, see
                     `load_checkpoint`
    backend        : "cpu", or "cuda" for one NVIDIA GPU
    devices        : with "cuda", number of GPUs of this machine that share every batch, which it must divide; see
                     `training.data_parallel`. A run may be resumed with another number, see `load_checkpoint`
    precision      : with "cuda", type of the factors of products: "bfloat16" (the default), "tf32" or "float32". Sums,
                     states and parameters are float32
    optimiser      : see `Optimiser`
    schedule       : see `Schedule`
    regularisers   : see `Regularisers`
    gates          : of networks with gated blocks, see `GateSettings`

    Raises ValueError for a value outside its range.
    """

    steps: int = 1000
    epochs: int = 0
    batch: int = 32
    window: int = 64
    window_jitter: float = 0.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.01
    clip: float = 1.0
    clip_layers: float = 0.0
    activity_cost: float = 0.0
    validate_every: int = 0
    patience: int = 0
    seed: int = 0
    thresholds: str = "positive"
    backward: str = "auto"
    threads: int = 1
    backend: str = "cpu"
    devices: int = 1
    precision: str = ""
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: Schedule = field(default_factory=Schedule)
    regularisers: Regularisers = field(default_factory=Regularisers)
    gates: GateSettings = field(default_factory=GateSettings)

    def __post_init__(self):
        for name in ("steps", "batch", "window", "threads", "devices"):
            need_whole(name, getattr(self, name), at_least=1)
        for name in ("epochs", "validate_every", "patience", "seed"):
            need_whole(name, getattr(self, name), at_least=0)
        for name in ("learning_rate", "clip"):
            need_number(name, getattr(self, name), above=0)
        for name in ("weight_decay", "activity_cost", "clip_layers", "window_jitter"):
            need_number(name, getattr(self, name), at_least=0)
        check_rule(self.thresholds)
        need_choice("backward", self.backward, BACKWARDS)
        records = ("optimiser", Optimiser), ("schedule", Schedule), ("regularisers", Regularisers)
        for name, kind in (*records, ("gates", GateSettings)):
            need_kind(name, getattr(self, name), kind, f"a record {kind.__name__}(...)")

        need_choice("backend", self.backend, TRAINING_ENGINES)
        self._check_devices()
        if self.precision and self.backend == "cpu":
            raise ValueError(
                f"precision: got {self.precision!r}, but the cpu backend computes in float32; leave it out"
            )
        if self.precision not in ("", *PRECISIONS):
            raise ValueError(f"precision: got {self.precision!r}, need one of {', '.join(PRECISIONS)}")

    def _check_devices(self) -> None:
        if self.devices == 1:
            return
        if self.backend == "cpu":
            raise ValueError(f"devices: got {self.devices}, but the cpu backend has threads; use backend='cuda'")
        if self.batch % self.devices:
            raise ValueError(f"batch: got {self.batch}, which {self.devices} devices cannot share; need a multiple")
        if self.regularisers.gate_balance:
            raise ValueError(
                f"devices: got {self.devices}, but the load balance of a batch is not the sum of those of its parts; "
                "use devices=1, or gate_balance=0"
            )

    def draw_window(self, rng: np.random.Generator) -> int:
        """Number of steps of the next window. Without jitter the generator is not used."""
        if not self.window_jitter:
            return self.window
        base = self.window if rng.random() < 0.95 else self.window / 2
        return max(5, int(rng.normal(base, self.window_jitter)))
