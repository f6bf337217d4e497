"""Time of one layer of plain cells on a GPU at batch 1: gated blocks, the same weights without a gate, and cuDNN."""

from __future__ import annotations

import numpy as np

import eventrnn as er
from eventrnn.bench.baselines import import_torch
from eventrnn.bench.gpu_baselines import Seconds, timed
from eventrnn.cells import Cell
from eventrnn.cuda import CudaBackend, tables
from eventrnn.state import State
from eventrnn.weights import convert

# Steps whose outputs are compared with those of the CPU: enough for weights to stay in shared memory, and for input
# products in tiles.
STEPS_CHECKED = 96

# Steps that share a choice in one of the contestants.
SHARED_STEPS = 4


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
    return {
        "cudnn float32": timed(torch, layer, fed, False),
        "cudnn tf32": timed(torch, layer, fed, True),
        "cudnn float16": timed(torch, half, fed.half(), True),
    }


def need_equal(network: er.Network, x: np.ndarray) -> None:
    """Raise RuntimeError unless the GPU gives the numbers of the CPU."""
    if not np.array_equal(er.simulate(network, x).output, er.simulate(network, x, backend="cuda").output):
        raise RuntimeError("gated blocks: the GPU gives other numbers than the CPU")


def phases(network: er.Network, x: np.ndarray) -> dict:
    """Where the time of a step goes: cycles of each phase (`gated_loop.py`) of the only layer, and the input product.

    The layer is run with clocks, which cost some cycles themselves. Of each phase there is the median over the steps
    of the mean and of the largest over the blocks; the first eighth of the steps is left out.
    """
    need_equal(network, x[:STEPS_CHECKED])
    engine = CudaBackend().engine(network)
    layer, steps = engine.packed.loop(0, x.shape[1]), len(x)
    assert layer is not None
    plan = layer.plan(x.shape[1], steps)
    with engine.device.on_stream():
        layer.stamps = engine.device.empty((steps, plan.spread * plan.groups, tables.STAMPS), np.int64)
        layer.stamps.fill(0)
    enqueue = engine.on_device(engine.prepare(x), State.zeros(network, x.shape[1]), counting=False)
    for _ in range(2):
        # The second run is the one whose clocks are read.
        seconds = engine.device.seconds(enqueue)
    cycles = np.diff(layer.stamps.get()[steps // 8 :], axis=2)
    clocked = layer.stamps.get()[-1, 0, -1] - layer.stamps.get()[0, 0, 0]
    each = {
        name: {"mean": float(np.median(c.mean(axis=1))), "largest": float(np.median(c.max(axis=1)))}
        for name, c in zip(tables.PHASES, np.moveaxis(cycles, 2, 0), strict=True)
    }
    return {
        "cycles": each,
        "cycles_per_step": float(clocked) / steps,
        "us_per_step": 1e6 * seconds / steps,
        "resident_block_rows": int(plan.places.get()[tables.RESIDENT_ROWS]),
        "block_rows": layer.w_rec.weights.grid[0],
    }


def measure(
    cell: str,
    units: int,
    block: tuple[int, int],
    density: float,
    rank: int | None,
    steps: int,
    repeats: int,
    with_phases: bool = False,
) -> dict:
    """The line of one cell: microseconds per step of each contestant, timed in turn, medians; and phases of a step."""
    x = np.random.default_rng(0).standard_normal((steps, 1, units), dtype=np.float32)
    rng = np.random.default_rng(1)
    dense = er.Network.random([units], inputs=units, rng=rng, cell=Cell(cell))

    def gated(names, period: int = 1, storage: str = "float32") -> er.Network:
        options = {"block": block, "density": density, "rank": rank, "gate_rule": "softmax", "gate_period": period}
        matrices = {name: w for name, w in dense.matrices().items() if name.role in names}
        return dense.with_matrices(
            {
                name: er.GatedBlocks.from_weights(convert(w, "dense", storage=storage), rng=rng, **options)
                for name, w in matrices.items()
            }
        )

    both, shared = gated(("w_in", "w_rec")), gated(("w_in", "w_rec"), SHARED_STEPS)
    narrow = gated(("w_in", "w_rec"), storage="bfloat16")
    # The same numbers as on the CPU, before anything is timed.
    for network in (both, shared, narrow, dense):
        need_equal(network, x[:STEPS_CHECKED])
    runs: dict[str, Seconds] = {
        "gated": ours(both, x),
        "gated, recurrent only": ours(gated(("w_rec",)), x),
        f"gated, choices of {SHARED_STEPS} steps": ours(shared, x),
        "gated, bfloat16": ours(narrow, x),
        "dense": ours(dense, x),
    }
    runs |= cudnn(cell, x)
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
    } | ({"phases": phases(both, x), "dense_phases": phases(dense, x)} if with_phases else {})
