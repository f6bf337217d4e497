"""The training benchmark on a GPU: one layer, forward and backward, GPU time by CUDA events, medians of interleaved
rounds.

An iteration goes from the inputs of a window and the gradient of its outputs, both on the GPU, to the gradients of all
parameters and of the inputs; there is no optimiser. Our iteration is one CUDA graph. Rivals:

`cudnn`        : torch.nn.GRU and torch.nn.LSTM as PyTorch calls them, in bfloat16, float16, TF32 and float32, padded to
                 multiples of 8
`evnn-style`   : the method of EvNN: one product for the inputs of all steps, then per step a dense product in TF32 and
                 a kernel for the cells, forward and backward. It is our own engine with that precision, in one CUDA
                 graph, so that it has no launch latency, and padded; EvNN itself is slower
`torch-bridge` : our engine as `eventrnn.torch.EGRU`, with PyTorch's tensors and autograd around it
`torch-loop`   : the same cell as a loop in PyTorch, with one input product for all steps; in TF32, or in float32 if
                 that is our precision

Those of PyTorch are timed from before the host enqueues their first kernel to the end of their last one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eventrnn.bench.baselines import import_torch
from eventrnn.bench.machine import versions
from eventrnn.bench.training import CHECKED_STEPS, compare_loop, torch_loop
from eventrnn.network import Network
from eventrnn.training import Batch, Settings, Task, Trainer
from eventrnn.training.settings import PRECISIONS

GPU_TRAINING_BASELINES = ("cudnn", "evnn-style", "torch-bridge", "torch-loop")

# cuDNN is fastest where every dimension is a multiple of this number.
PADDED_TO = 8

Seconds = Callable[[], float]


@dataclass(frozen=True)
class GpuTrainingCase:
    """One case to measure. Raises ValueError for a value out of range, before any work.

    Attributes
    ----------
    hidden    : units, and inputs, of the layer
    batch     : samples
    steps     : steps of the window
    precision : type of the factors of our products
    against   : rivals, separated by commas, or "none"; `speedup` refers to the fastest GRU of the first
    repeats   : interleaved rounds
    seed      : seed of everything random
    """

    hidden: int = 1350
    batch: int = 64
    steps: int = 70
    precision: str = "bfloat16"
    against: str = "cudnn"
    repeats: int = 15
    seed: int = 0

    def __post_init__(self):
        for name in ("hidden", "batch", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, need a whole number >= 1")
        if self.repeats < 3:
            raise ValueError(f"repeats: got {self.repeats}, need at least 3 for a median")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, need one of {', '.join(PRECISIONS)}")
        for baseline in self.baselines:
            if baseline not in GPU_TRAINING_BASELINES:
                raise ValueError(f"against: got {baseline!r}, need {', '.join(GPU_TRAINING_BASELINES)} or none")

    @property
    def baselines(self) -> tuple[str, ...]:
        """The names in `against`; empty for "none"."""
        return () if self.against == "none" else tuple(self.against.split(","))


class _Window(Task):
    """One window, with the gradient of its outputs."""

    def __init__(self, inputs: np.ndarray, d_output: np.ndarray):
        self.inputs, self.d_output = inputs, d_output

    def check(self, network: Network, batch: int, window: int) -> None:
        return None

    def length(self, batch: int) -> int:
        return 1

    def batch(self, at: int, epoch: int, batch: int, window: int) -> Batch:
        return Batch(self.inputs, self.inputs, taken=1)

    def loss(self, output: np.ndarray, batch: Batch) -> tuple[float, np.ndarray]:
        return float(np.vdot(output, self.d_output)), self.d_output


def training(*, report: Callable[[str], None] = lambda stage: None, **case: Any) -> dict[str, Any]:
    """The figures of `eventrnn bench training --backend cuda --json`; parameters are the fields of `GpuTrainingCase`.

    Raises ValueError for an impossible case, and BackendUnavailable where there is no GPU.
    """
    from eventrnn.cuda.device import current_device

    asked, device = GpuTrainingCase(**case), current_device()
    rng = np.random.default_rng(asked.seed)
    network = Network.random([asked.hidden], inputs=asked.hidden, threshold=0.1, rng=rng)
    x = rng.standard_normal((asked.steps, asked.batch, asked.hidden), dtype=np.float32)
    x *= rng.random(x.shape) < 0.1
    d_output = rng.standard_normal(x.shape, dtype=np.float32) / np.float32(x.size)
    report("compiling")
    runs: dict[str, Seconds] = {"ours": _ours(network, x, d_output, asked.precision)}
    if "evnn-style" in asked.baselines:
        runs["evnn-style"] = _ours(network, x, d_output, "tf32")
    if "cudnn" in asked.baselines:
        runs |= _cudnn(x, d_output)
    if "torch-bridge" in asked.baselines:
        runs["torch-bridge"] = _bridge(network, x, d_output, asked.precision)
    if "torch-loop" in asked.baselines:
        report("comparing gradients with torch-loop")
        runs["torch-loop"] = _loop(network, x, d_output, tf32=asked.precision != "float32")
    report(f"timing {asked.repeats} rounds")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(asked.repeats):
        for name, measure in runs.items():
            # An untimed call first raises the clock rate and fills the caches.
            measure()
            seconds[name].append(measure())
    each = {name: float(np.median(times)) * 1e3 for name, times in seconds.items()}
    ours = each.pop("ours")
    rivals = {name: ms for name, ms in each.items() if "LSTM" not in name}
    if asked.baselines:
        rivals = {name: ms for name, ms in rivals.items() if name.startswith(asked.baselines[0])}
    best = min(rivals, key=lambda name: rivals[name]) if rivals else None
    result = {
        "ms_per_iteration": ours,
        "against_ms_per_iteration": each[best] if best else None,
        "speedup": each[best] / ours if best else None,
        "against_variant": best,
        "against_each": {name: {"ms_per_iteration": ms, "speedup": ms / ours} for name, ms in each.items()},
    }
    return result | {"backend": "cuda"} | asdict(asked) | {"device": device.name, "versions": versions()}


def _ours(network: Network, x: np.ndarray, d_output: np.ndarray, precision: str) -> Seconds:
    """GPU seconds of an iteration of our engine. Raises RuntimeError if a gradient is not finite."""
    steps, batch = x.shape[:2]
    settings = Settings(steps=1, batch=batch, window=steps, backend="cuda", precision=precision)
    trainer = Trainer(network, _Window(x, d_output), settings)
    engine: Any = trainer.engine
    engine.keep_input_gradient()
    trainer.step()
    program = engine.program(steps, batch)
    program.passes()
    return lambda: engine.device.seconds(program.passes)


def _import_torch() -> Any:
    """PyTorch. Raises ValueError where it has no CUDA."""
    torch = import_torch()
    if not torch.cuda.is_available():
        raise ValueError("against: this torch has no CUDA; install one that has, or use --against evnn-style or none")
    return torch


def _timed(torch: Any, run: Callable[[], object], tf32: bool) -> Seconds:
    """GPU seconds of what a function puts on PyTorch's stream. tf32 : whether its products may be of TF32"""

    def measure() -> float:
        kinds = torch.backends.cudnn, torch.backends.cuda.matmul
        before = [kind.allow_tf32 for kind in kinds]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            for kind in kinds:
                kind.allow_tf32 = tf32
            begin.record()
            run()
            end.record()
            end.synchronize()
        finally:
            for kind, allowed in zip(kinds, before, strict=True):
                kind.allow_tf32 = allowed
        return begin.elapsed_time(end) / 1e3

    return measure


def _bridge(network: Network, x: np.ndarray, d_output: np.ndarray, precision: str) -> Seconds:
    """GPU seconds of an iteration of `eventrnn.torch.EGRU`."""
    torch = _import_torch()
    from eventrnn.torch import EGRU

    module = EGRU.from_network(network).cuda()
    module.precision = precision
    given, upstream = torch.tensor(x, device="cuda").requires_grad_(), torch.tensor(d_output, device="cuda")

    def run() -> None:
        for parameter in (*module.parameters(), given):
            parameter.grad = None
        module(given)[0].backward(upstream)

    # The second call captures the graphs.
    for _ in range(2):
        run()
    return _timed(torch, run, tf32=False)


def _loop(network: Network, x: np.ndarray, d_output: np.ndarray, *, tf32: bool) -> Seconds:
    """GPU seconds of an iteration of the loop in PyTorch. Raises RuntimeError where its gradients differ from ours."""
    torch = _import_torch()
    compare_loop("torch-loop", network, x[:CHECKED_STEPS], d_output[:CHECKED_STEPS], "cuda")
    return _timed(torch, torch_loop(network, x, d_output, True, False, "cuda")[0], tf32)


def _cudnn(x: np.ndarray, d_output: np.ndarray) -> dict[str, Seconds]:
    """Name -> GPU seconds of an iteration of PyTorch's layers. Raises ValueError where torch has no CUDA."""
    torch = _import_torch()
    hidden = x.shape[2] + -x.shape[2] % PADDED_TO
    wide = ((0, 0), (0, 0), (0, hidden - x.shape[2]))
    given, upstream = (torch.from_numpy(np.pad(array, wide)).cuda() for array in (x, d_output))
    types = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}

    def timed(kind: str, name: str) -> Seconds:
        dtype = types[name]
        layer = getattr(torch.nn, kind)(hidden, hidden, device="cuda", dtype=dtype)
        layer.flatten_parameters()
        inputs, d_out = given.to(dtype).requires_grad_(), upstream.to(dtype)

        def run() -> None:
            for parameter in (*layer.parameters(), inputs):
                parameter.grad = None
            layer(inputs)[0].backward(d_out)

        return _timed(torch, run, tf32=name != "float32")

    return {f"cudnn {kind} {name}": timed(kind, name) for kind in ("GRU", "LSTM") for name in types}
