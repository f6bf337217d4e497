"""Time of one layer of plain cells on a GPU at batch 1: gated blocks, the same weights without a gate, and cuDNN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import eventrnn as er
from eventrnn.bench.baselines import import_torch
from eventrnn.cells import Cell
from eventrnn.cuda import CudaBackend
from eventrnn.state import State

Seconds = Callable[[], float]


def ours(network: er.Network, x: np.ndarray) -> Seconds:
    """A function that returns the GPU seconds of one run, a replayed graph that counts nothing, as cuDNN."""
    engine = CudaBackend().engine(network)
    enqueue = engine.on_device(engine.prepare(x), State.zeros(network, x.shape[1]), counting=False)
    return lambda: engine.device.seconds(enqueue)


def cudnn(cell: str, x: np.ndarray) -> dict[str, Seconds]:
    """Variant -> function that returns the GPU seconds of one run of torch.nn.GRU or torch.nn.LSTM of this size."""
    torch, units = import_torch(), x.shape[2]
    layer = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell](units, units).cuda()
    half = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell](units, units).cuda().half()
    fed = torch.from_numpy(x).cuda()

    def timed(module, inputs, tf32: bool) -> Seconds:
        def measure() -> float:
            before = torch.backends.cudnn.allow_tf32
            torch.backends.cudnn.allow_tf32 = tf32
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            try:
                with torch.inference_mode():
                    begin.record()
                    module(inputs)
                    end.record()
                end.synchronize()
            finally:
                torch.backends.cudnn.allow_tf32 = before
            return begin.elapsed_time(end) / 1e3

        return measure

    return {
        "cudnn float32": timed(layer, fed, False),
        "cudnn tf32": timed(layer, fed, True),
        "cudnn float16": timed(half, fed.half(), True),
    }


def measure(
    cell: str, units: int, block: tuple[int, int], density: float, rank: int | None, steps: int, repeats: int
) -> dict:
    """The line of one cell: microseconds per step of each contestant, timed in turn, medians."""
    x = np.random.default_rng(0).standard_normal((steps, 1, units), dtype=np.float32)
    rng = np.random.default_rng(1)
    dense = er.Network.random([units], inputs=units, rng=rng, cell=Cell(cell))

    def gated(names) -> er.Network:
        options = {"block": block, "density": density, "rank": rank, "gate_rule": "softmax"}
        matrices = {name: w for name, w in dense.matrices().items() if name.role in names}
        return dense.with_matrices(
            {name: er.GatedBlocks.from_weights(w, rng=rng, **options) for name, w in matrices.items()}
        )

    both = gated(("w_in", "w_rec"))
    runs: dict[str, Seconds] = {
        "gated": ours(both, x),
        "gated, recurrent only": ours(gated(("w_rec",)), x),
        "dense": ours(dense, x),
    }
    runs |= cudnn(cell, x)
    # The same numbers as on the CPU, before anything is timed.
    some = x[: min(steps, 4)]
    if not np.array_equal(er.simulate(both, some).output, er.simulate(both, some, backend="cuda").output):
        raise RuntimeError("gated blocks: the GPU gives other numbers than the CPU")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            # An untimed call first raises the clock rate and fills the caches.
            run()
            seconds[name].append(run())
    each = {name: 1e6 * float(np.median(times)) / steps for name, times in seconds.items()}
    baseline = min(value for name, value in each.items() if name in ("cudnn float32", "cudnn tf32"))
    return {
        "what": "gpu",
        "cell": cell,
        "units": units,
        "block": list(block),
        "density": density,
        "rank": rank,
        "steps": steps,
        "repeats": repeats,
        "gpu": CudaBackend().engine(both).device.name,
        "us_per_step": each,
        "speedup": {"cudnn": baseline / each["gated"], "dense": each["dense"] / each["gated"]},
    }
