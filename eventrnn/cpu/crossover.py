"""Measured kernel selection: the backend "auto", and the map of kernel times that it uses.

A product can use the format of its matrix, dense rows (one drive row after the other, or shared by many), or BLAS.
Which kernel is fastest depends on the number of drive rows, on the activity of the presynaptic units and on the density
of the matrix. The crossover map holds the times of every kernel on one thread of this machine, on a grid of these
numbers; it is kept in the user's cache folder. Between grid points the logarithms of the times are interpolated.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eventrnn._exclusive import Use
from eventrnn._files import cache_folder, write_whole
from eventrnn._kernel_files import SourceChanged, source_digest
from eventrnn.backend import INTEGERS
from eventrnn.cpu.engine import CpuEngine
from eventrnn.cpu.packing import is_single
from eventrnn.cpu.plan import BLAS_PRODUCT, DENSIFIED, DENSIFIED_TILED, FORMAT, TILED, KernelPolicy, block_kernel
from eventrnn.cpu.single_product import Product
from eventrnn.events import Events
from eventrnn.weights import BlockCSR, Dense, GatedBlocks, Weights, convert, takes_integers

if TYPE_CHECKING:
    from eventrnn.network import Network


# Grid of the map: units of matrices (units, 3 * units). One fits the L2 cache of a core and the other does not.
UNITS = (320, 1350)

# Grid of the map: drive rows.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

# Drive rows for kernels that compute one drive row after the other.
EACH_ROWS = (1, 16)

# Grid of the map: activity of the presynaptic units, in events per unit and drive row.
ACTIVITY = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)

# Grid of the map: stored share of the weights.
DENSITY = (0.05, 0.1, 0.2, 0.5)

# The logarithms of the grid.
LOG_ACTIVITY, LOG_DENSITY = np.log(ACTIVITY).tolist(), np.log(DENSITY).tolist()
LOG_ROWS: dict[tuple[int, ...], list[float]] = {rows: np.log(rows).tolist() for rows in (ROWS, EACH_ROWS)}

#: Kernels for dense weights: name in the map -> (kernel of `plan.KERNELS`, dense activity threshold) to measure it.
DENSE_KERNELS = {"rows": (FORMAT, 2.0), "panels": (TILED, 2.0), "every": (TILED, 0.0), "blas": (BLAS_PRODUCT, 2.0)}

#: Kernels for block-sparse weights: width of a block segment -> name in the map. Single weights have the names "single"
#: and, in column tiles that drive rows share, "single tiles".
BLOCK_KERNELS = {4: "block4", 16: "block16", 64: "block64"}

#: Kernels for single weights: name in the map -> kernel of `plan.KERNELS`.
SINGLE_KERNELS = {"single": FORMAT, "single tiles": TILED}

# Kernels whose time does not depend on the activity.
EVERY_UNIT = ("every", "blas")

# Kernels that share the weights they read between drive rows.
SHARED_ROWS = ("panels", "every", "single tiles", "blas")

# Another kernel than that of the format is selected only if its predicted time is below this share of the time of the
# format. The map is accurate to about 5 %.
MAX_RELATIVE_TIME = 0.95

# Shortest time of a measured run in seconds, runs per measurement (the fastest counts), and rounds over the whole grid.
# With several rounds, a disturbance of some seconds does not distort the time of one kernel alone.
RUN_SECONDS, REPEATS, ROUNDS = 2e-3, 2, 2

# Two threads that measured side by side would measure each other.
_LOADING = Use("crossover map")

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Crossover:
    """Times of one product on one thread.

    times : "kernel/units" or "kernel/units/density" -> seconds, ROWS (or EACH_ROWS) x ACTIVITY
    """

    times: Mapping[str, list[list[float]]]

    @cached_property
    def _logs(self) -> dict[str, list[list[float]]]:
        """The logarithms of `times`."""
        return {key: np.log(table).tolist() for key, table in self.times.items()}

    def seconds(self, kernel: str, shape: tuple[int, int], rows: int, activity: float, density: float = 1.0) -> float:
        """Predicted seconds of a product; a prediction costs some microseconds.

        kernel : name in the map
        shape  : of the matrix, of which a share `density` is stored
        rows   : drive rows
        """
        size = math.log(max(1, shape[0] * shape[1]))
        sizes = [math.log(3 * n * n) for n in UNITS]
        measured = [self._at(kernel, n, rows, activity, density) for n in UNITS]
        share = min(1.0, max(0.0, (size - sizes[0]) / (sizes[1] - sizes[0])))
        per_weight = (1 - share) * (measured[0] - sizes[0]) + share * (measured[1] - sizes[1])
        return math.exp(per_weight + size)

    def _at(self, kernel: str, units: int, rows: int, activity: float, density: float) -> float:
        """Logarithm of the predicted seconds at one grid size."""
        if kernel in DENSE_KERNELS:
            return self._interpolated(f"{kernel}/{units}", rows, activity)
        logs = [self._interpolated(f"{kernel}/{units}/{d}", rows, activity) for d in DENSITY]
        return _line(math.log(max(density, 1e-6)), LOG_DENSITY, logs)

    def _interpolated(self, key: str, rows: int, activity: float) -> float:
        x = math.log(max(activity, 1e-6))
        lines = [_line(x, LOG_ACTIVITY, line) for line in self._logs[key]]
        return _line(math.log(rows), LOG_ROWS[_rows(key.partition("/")[0])], lines)

    @cached_property
    def _thresholds(self) -> dict[int, float]:
        """What `dense_activity_threshold` has found: a search costs a millisecond, and every run asks."""
        return {}

    def dense_activity_threshold(self, rows: int) -> float:
        """Activity from which visiting every unit is faster than visiting the active ones; 2 if there is none."""
        if rows not in self._thresholds:
            self._thresholds[rows] = self._find_threshold(rows)
        return self._thresholds[rows]

    def _find_threshold(self, rows: int) -> float:
        shape = (UNITS[-1], 3 * UNITS[-1])
        every = self.seconds("every", shape, rows, 1.0)
        for share in np.geomspace(0.05, 1.0, 40):
            if self.seconds("panels", shape, rows, float(share)) > every:
                return round(float(share), 3)
        return 2.0


def _rows(kernel: str) -> tuple[int, ...]:
    """The drive rows of the grid for which a kernel is measured."""
    return ROWS if kernel in SHARED_ROWS else EACH_ROWS


def _line(x: float, at: Sequence[float], values: Sequence[float]) -> float:
    """Linear interpolation between points, and linear extrapolation beyond them."""
    k = min(max(bisect_left(at, x) - 1, 0), len(at) - 2)
    return values[k] + (values[k + 1] - values[k]) * (x - at[k]) / (at[k + 1] - at[k])


class MeasuredPolicy(KernelPolicy):
    """Selects the kernel with the lowest predicted time. `may_blas` admits BLAS, and selects INTEGERS where it can;
    both are not exact."""

    def __init__(self, crossover: Crossover, may_blas: bool):
        super().__init__(exact=not may_blas)
        self.crossover, self.may_blas = crossover, may_blas

    def predicted(self, weights: Weights, rows: int, activity: float) -> dict[str, float]:
        """Predicted seconds by kernel. Weights of narrow storage are not made dense, which would make them float32."""
        shape, seconds = weights.shape, self.crossover.seconds
        found: dict[str, float] = {}

        def tiles() -> float:
            return min(seconds(kernel, shape, rows, activity) for kernel in ("panels", "every"))

        if isinstance(weights, Dense):
            found = {FORMAT: seconds("rows", shape, rows, activity), TILED: tiles()}
        else:
            density = weights.stored / max(1, shape[0] * shape[1])
            found[FORMAT] = seconds(_format_kernel(weights), shape, rows, activity, density)
            if is_single(weights):
                found[TILED] = seconds("single tiles", shape, rows, activity, density)
            if weights.storage == "float32":
                found |= {DENSIFIED: seconds("rows", shape, rows, activity), DENSIFIED_TILED: tiles()}
        if self.may_blas and weights.storage == "float32":
            found[BLAS_PRODUCT] = seconds("blas", shape, rows, activity)
        return found

    def select_kernel(self, weights: Weights, rows: int, activity: float) -> str:
        if isinstance(weights, GatedBlocks):
            # There is one kernel for them.
            return FORMAT
        if not self.exact and takes_integers(weights):
            return INTEGERS
        found = self.predicted(weights, rows, activity)
        best = min(found, key=lambda name: found[name])
        if found[best] < MAX_RELATIVE_TIME * found[FORMAT]:
            return best
        # The map knows one kernel for block segments.
        return block_kernel(weights, rows, activity)

    def dense_activity_threshold(self, rows: int) -> float:
        return self.crossover.dense_activity_threshold(rows)


class AutoBackend:
    """The CPU engine with measured kernel selection. `exact=False` admits BLAS and, as for `CpuBackend`, integers.

    crossover : a map; by default the one in the user's cache, which is measured first if there is none (a minute)
    """

    name = "auto"

    def __init__(self, exact: bool = True, crossover: Crossover | None = None):
        self.exact, self.crossover = exact, crossover

    def engine(self, network: Network, *, threads: int = 1) -> CpuEngine:
        """An engine like that of `CpuBackend` that selects its kernels by the map."""
        if self.crossover is None:
            self.crossover = load()
        return CpuEngine(network, threads, MeasuredPolicy(self.crossover, may_blas=not self.exact))


def _format_kernel(weights: Weights) -> str:
    """The name in the map of the kernel for the format of sparse weights."""
    if not isinstance(weights, BlockCSR) or weights.block[1] % 4:
        return "single"
    return BLOCK_KERNELS[max(width for width in BLOCK_KERNELS if weights.block[1] % width == 0)]


# --- measuring ----------------------------------------------------------------------------------------------


def measure(report: Report = lambda done, total, what: None) -> Crossover:
    """Time every kernel on the whole grid. It takes about a minute on one core, which should be otherwise idle."""
    from threadpoolctl import threadpool_limits

    jobs = _jobs()
    times: dict[str, np.ndarray] = {}
    with threadpool_limits(limits=1, user_api="blas"):
        for done, (kernel, units, density) in enumerate(jobs * ROUNDS):
            key = _key(kernel, units, density)
            report(done, len(jobs) * ROUNDS, key)
            measured = np.array(_measured(kernel, units, density))
            times[key] = np.minimum(times.get(key, np.inf), measured)
    report(len(jobs) * ROUNDS, len(jobs) * ROUNDS, "done")
    return Crossover({key: table.tolist() for key, table in times.items()})


def _jobs() -> list[tuple[str, int, float | None]]:
    """Every (kernel, units, density) of the grid; the density is None for dense weights."""
    pruned = (*SINGLE_KERNELS, *BLOCK_KERNELS.values())
    each = [(kernel, None) for kernel in DENSE_KERNELS] + [
        (kernel, density) for kernel in pruned for density in DENSITY
    ]
    return [(kernel, units, density) for units in UNITS for kernel, density in each]


def _key(kernel: str, units: int, density: float | None) -> str:
    """The key of `Crossover.times`."""
    return f"{kernel}/{units}" + ("" if density is None else f"/{density}")


class ForcedPolicy(KernelPolicy):
    """Selects the same kernel for every product, so that it can be measured."""

    may_blas = True

    def __init__(self, kernel: str, dense_activity_threshold: float):
        self._kernel, self._threshold = kernel, dense_activity_threshold

    def select_kernel(self, weights: Weights, rows: int, activity: float) -> str:
        return self._kernel

    def dense_activity_threshold(self, rows: int) -> float:
        return self._threshold


def _measured(kernel: str, units: int, density: float | None) -> list[list[float]]:
    """Seconds per step of a kernel at every point of the grid, drive rows by activity."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((units, 3 * units), dtype=np.float32)
    policy = ForcedPolicy(*DENSE_KERNELS.get(kernel, (SINGLE_KERNELS.get(kernel, FORMAT), 2.0)))
    weights: Weights = Dense(dense)
    if density is not None:
        block = None if kernel in SINGLE_KERNELS else (1, int(kernel.removeprefix("block")))
        grid = rng.random((units, -(-3 * units // (block or (1, 1))[1]))) < density
        mask = np.repeat(grid, (block or (1, 1))[1], axis=1)[:, : 3 * units]
        weights = convert(dense * mask, "csr" if block is None else "block", block=block)
    plan, table = None, []
    for rows in _rows(kernel):
        line: list[float] = []
        for activity in ACTIVITY:
            if kernel in EVERY_UNIT and line:
                line.append(line[0])
                continue
            # So many steps that the weights of the run before are no longer in the cache.
            work = rows * units * 3 * units * (1.0 if kernel in EVERY_UNIT else activity * (density or 1.0))
            steps = int(min(64, max(1, RUN_SECONDS * 1e10 // max(work, 1))))
            fired = rng.random((steps, rows, units), dtype=np.float32) < activity
            events = Events.from_dense(fired.astype(np.float32))
            product = Product(weights, events, policy=policy, plan=plan)
            plan = product.plan
            line.append(_best(product.run) / steps)
        table.append(line)
    return table


def _best(run: Callable[[], object]) -> float:
    """The shortest time of several runs, in seconds, after one that is not measured."""
    run()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds), 1e-9)


# --- the cache ----------------------------------------------------------------------------------------------


def cache_path() -> Path:
    """File of the map for this processor and these kernels. `EVENTRNN_CACHE` names another folder."""
    import platform

    machine = f"{platform.machine()} {platform.processor()} {_model()} {source_digest(Product.__module__)}"
    return cache_folder() / f"crossover-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _model() -> str:
    """The name of the processor where Linux tells it, else an empty string."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def load(report: Report = lambda done, total, what: None) -> Crossover:
    """The map in the cache. Where there is none, or an incomplete one, a new map is measured and written there.

    Of several threads that ask, one measures, and the others wait for its map.
    """
    with _LOADING.lock:
        try:
            path = cache_path()
            kept = Crossover(**json.loads(path.read_text()))
            if _is_whole(kept):
                return kept
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            pass
        return save(measure(report))


def _is_whole(crossover: Crossover) -> bool:
    """Whether a map from a file has every entry of the grid."""
    tables = {_key(*job): (len(_rows(job[0])), len(ACTIVITY)) for job in _jobs()}
    return {key: np.shape(table) for key, table in crossover.times.items()} == tables


def save(crossover: Crossover) -> Crossover:
    """Write a map to the cache and return it. Warns if it cannot be kept."""
    try:
        path = cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(crossover)).encode(), overwrite=True)
    except SourceChanged as error:
        warnings.warn(f"crossover map not kept: {error}", stacklevel=2)
    except OSError as error:
        warnings.warn(
            f"crossover map not kept ({error}); set EVENTRNN_CACHE to a folder that can be written", stacklevel=2
        )
    return crossover
