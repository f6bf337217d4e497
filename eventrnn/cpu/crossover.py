"""Where the ways of a product cross on this machine: measured once, kept in the user's cache, looked up by "auto".

A product can go as its format has it, through dense rows (one drive after the other, or shared by many), or through
BLAS. Which is fastest depends on how many drives there are, how active their senders are, and how much was pruned. The
map holds one thread's times on a grid of these; between its points times are interpolated, all in logarithms.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from eventrnn._files import cache_folder
from eventrnn.cpu.engine import CpuEngine
from eventrnn.cpu.kernels.jit import source_digest
from eventrnn.cpu.plan import AS_STORED, BLAS_PRODUCT, DENSE, DENSE_TILES, TILES, Choice
from eventrnn.cpu.single_product import Product
from eventrnn.events import Events
from eventrnn.weights import BlockCSR, Dense, Weights, convert

if TYPE_CHECKING:
    from eventrnn.network import Network


# The grid. Matrices are (units, 3 units): one that fits a core's own cache, and one that does not.
UNITS = (320, 1350)

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

# Ways that go one drive after the other need no more.
EACH_ROWS = (1, 16)

ACTIVITY = (0.01, 0.05, 0.1, 0.2, 0.5, 1.0)

DENSITY = (0.05, 0.1, 0.2, 0.5)

#: ways with dense weights, and which layout each measures: pick, share of active units from which every one is walked
DENSE_WAYS = {"rows": (AS_STORED, 2.0), "panels": (TILES, 2.0), "every": (TILES, 0.0), "blas": (BLAS_PRODUCT, 2.0)}

#: ways with pruned weights, by the widest piece of a block that is not wider; single weights have their own
BLOCK_WAYS = {4: "block4", 16: "block16", 64: "block64"}

# These take as long however many units are active.
ALWAYS_ALL = ("every", "blas")

# What drives share depends on how many there are; the other ways take them one by one.
SHARING = ("panels", "every", "blas")

# Another way than the stored one must promise to be so much faster: the map is no better.
WORTH_IT = 0.95

# A measured run is at least so long; the best of some, in rounds over the whole grid: what slows the machine for some
# seconds would otherwise be charged to one way.
RUN_SECONDS, REPEATS, ROUNDS = 2e-3, 2, 2

Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Crossover:
    """Seconds of one product on one thread.

    times : "way/units" or "way/units/density" -> ROWS (EACH_ROWS) x ACTIVITY
    """

    times: Mapping[str, list[list[float]]]

    def seconds(self, way: str, shape: tuple[int, int], rows: int, activity: float, density: float = 1.0) -> float:
        """Predicted time of a product of that shape, its weights of that density. O(1), some tens of microseconds."""
        size = math.log(max(1, shape[0] * shape[1]))
        sizes = [math.log(3 * n * n) for n in UNITS]
        measured = [self._at(way, n, rows, activity, density) for n in UNITS]
        share = min(1.0, max(0.0, (size - sizes[0]) / (sizes[1] - sizes[0])))
        per_weight = (1 - share) * (measured[0] - sizes[0]) + share * (measured[1] - sizes[1])
        return math.exp(per_weight + size)

    def _at(self, way: str, units: int, rows: int, activity: float, density: float) -> float:
        """Logarithm of the seconds at one size."""
        if way in DENSE_WAYS:
            return self._interpolated(f"{way}/{units}", rows, activity)
        logs = [self._interpolated(f"{way}/{units}/{d}", rows, activity) for d in DENSITY]
        return _line(math.log(max(density, 1e-6)), np.log(DENSITY), logs)

    def _interpolated(self, key: str, rows: int, activity: float) -> float:
        table = np.log(np.array(self.times[key]))
        x = math.log(max(activity, 1e-6))
        lines = [_line(x, np.log(ACTIVITY), line) for line in table]
        return _line(math.log(rows), np.log(_rows(key.partition("/")[0])), lines)

    def every_from(self, rows: int) -> float:
        """From which share of active units on, walking every unit is faster than looking for them."""
        shape = (UNITS[-1], 3 * UNITS[-1])
        every = self.seconds("every", shape, rows, 1.0)
        for share in np.geomspace(0.05, 1.0, 40):
            if self.seconds("panels", shape, rows, float(share)) > every:
                return round(float(share), 3)
        return 2.0


def _rows(way: str) -> tuple[int, ...]:
    return ROWS if way in SHARING else EACH_ROWS


def _line(x: float, at, values) -> float:
    """Linear between points, and beyond them along the outermost segment."""
    k = min(max(int(np.searchsorted(at, x)) - 1, 0), len(at) - 2)
    return float(values[k] + (values[k + 1] - values[k]) * (x - at[k]) / (at[k + 1] - at[k]))


class MeasuredChoice(Choice):
    """`Choice` by a map. `may_blas` lets it pick BLAS, which is not exact."""

    def __init__(self, crossover: Crossover, may_blas: bool):
        self.crossover, self.may_blas = crossover, may_blas

    def predicted(self, weights: Weights, rows: int, activity: float) -> dict[str, float]:
        """Seconds by pick. Narrow weights stay narrow: dense twins and BLAS are float32."""
        shape, seconds = weights.shape, self.crossover.seconds
        found: dict[str, float] = {}

        def tiles() -> float:
            return min(seconds(way, shape, rows, activity) for way in ("panels", "every"))

        if isinstance(weights, Dense):
            found = {AS_STORED: seconds("rows", shape, rows, activity), TILES: tiles()}
        else:
            density = weights.stored / max(1, shape[0] * shape[1])
            found[AS_STORED] = seconds(_way(weights), shape, rows, activity, density)
            if weights.storage == "float32":
                found |= {DENSE: seconds("rows", shape, rows, activity), DENSE_TILES: tiles()}
        if self.may_blas and weights.storage == "float32":
            found[BLAS_PRODUCT] = seconds("blas", shape, rows, activity)
        return found

    def pick(self, weights: Weights, rows: int, activity: float) -> str:
        found = self.predicted(weights, rows, activity)
        best = min(found, key=lambda name: found[name])
        return best if found[best] < WORTH_IT * found[AS_STORED] else AS_STORED

    def every_from(self, rows: int) -> float:
        return self.crossover.every_from(rows)


class AutoBackend:
    """The cpu engine with measured choices. `exact=False` lets it use BLAS.

    crossover : a map; else the one in the user's cache, which is measured first where there is none (a minute)
    """

    name = "auto"

    def __init__(self, exact: bool = True, crossover: Crossover | None = None):
        self.exact, self.crossover = exact, crossover

    def engine(self, network: Network, *, threads: int = 1) -> CpuEngine:
        """As of `CpuBackend`, and the map."""
        if self.crossover is None:
            self.crossover = load()
        return CpuEngine(network, threads, MeasuredChoice(self.crossover, may_blas=not self.exact))


def _way(weights: Weights) -> str:
    if not isinstance(weights, BlockCSR) or weights.block[1] % 4:
        return "single"
    return BLOCK_WAYS[max(width for width in BLOCK_WAYS if weights.block[1] % width == 0)]


# --- measuring ----------------------------------------------------------------------------------------------


def measure(report: Report = lambda done, total, what: None) -> Crossover:
    """Time every way on the whole grid. About a minute on one core; nothing else should run beside it."""
    from threadpoolctl import threadpool_limits

    jobs = _jobs()
    times: dict[str, np.ndarray] = {}
    with threadpool_limits(limits=1, user_api="blas"):
        for done, (way, units, density) in enumerate(jobs * ROUNDS):
            key = _key(way, units, density)
            report(done, len(jobs) * ROUNDS, key)
            measured = np.array(_measured(way, units, density))
            times[key] = np.minimum(times.get(key, np.inf), measured)
    report(len(jobs) * ROUNDS, len(jobs) * ROUNDS, "done")
    return Crossover({key: table.tolist() for key, table in times.items()})


def _jobs() -> list[tuple[str, int, float | None]]:
    pruned = ("single", *BLOCK_WAYS.values())
    each = [(way, None) for way in DENSE_WAYS] + [(way, density) for way in pruned for density in DENSITY]
    return [(way, units, density) for units in UNITS for way, density in each]


def _key(way: str, units: int, density: float | None) -> str:
    return f"{way}/{units}" + ("" if density is None else f"/{density}")


class Forced(Choice):
    """Always the same way."""

    may_blas = True

    def __init__(self, pick: str, every_from: float):
        self._pick, self._every_from = pick, every_from

    def pick(self, weights: Weights, rows: int, activity: float) -> str:
        return self._pick

    def every_from(self, rows: int) -> float:
        return self._every_from


def _measured(way: str, units: int, density: float | None) -> list[list[float]]:
    """Seconds at every point of the grid."""
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((units, 3 * units), dtype=np.float32)
    choice = Forced(*DENSE_WAYS.get(way, (AS_STORED, 2.0)))
    weights: Weights = Dense(dense)
    if density is not None:
        block = None if way == "single" else (1, int(way.removeprefix("block")))
        grid = rng.random((units, -(-3 * units // (block or (1, 1))[1]))) < density
        mask = np.repeat(grid, (block or (1, 1))[1], axis=1)[:, : 3 * units]
        weights = convert(dense * mask, "csr" if block is None else "block", block=block)
    plan, table = None, []
    for rows in _rows(way):
        line: list[float] = []
        for activity in ACTIVITY:
            if way in ALWAYS_ALL and line:
                line.append(line[0])
                continue
            # Enough steps that no two runs of them find the same weights in the cache.
            work = rows * units * 3 * units * (1.0 if way in ALWAYS_ALL else activity * (density or 1.0))
            steps = int(min(64, max(1, RUN_SECONDS * 1e10 // max(work, 1))))
            fired = rng.random((steps, rows, units), dtype=np.float32) < activity
            events = Events.from_dense(fired.astype(np.float32))
            product = Product(weights, events, choice=choice, plan=plan)
            plan = product.plan
            line.append(_best(product.run) / steps)
        table.append(line)
    return table


def _best(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return max(min(seconds), 1e-9)


# --- keeping ------------------------------------------------------------------------------------------------


def cache_path() -> Path:
    """Where this machine's map is kept: of this processor, these kernels. `EVENTRNN_CACHE` names another folder."""
    import platform

    machine = f"{platform.machine()} {platform.processor()} {_model()} {source_digest()}"
    return cache_folder() / f"crossover-{hashlib.sha256(machine.encode()).hexdigest()[:16]}.json"


def _model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith("model name")), "")


def load(report: Report = lambda done, total, what: None) -> Crossover:
    """The map in the cache, or a new one, which is then kept there."""
    path = cache_path()
    try:
        kept = Crossover(**json.loads(path.read_text()))
        if _is_whole(kept):
            return kept
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    return save(measure(report))


def _is_whole(crossover: Crossover) -> bool:
    """Whether a map from a file has every time that may be looked up."""
    tables = {_key(*job): (len(_rows(job[0])), len(ACTIVITY)) for job in _jobs()}
    return {key: np.shape(table) for key, table in crossover.times.items()} == tables


def save(crossover: Crossover) -> Crossover:
    """Keep a map; warns where the folder cannot be written."""
    path = cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(crossover)))
        partial.replace(path)
    except OSError as error:
        warnings.warn(
            f"crossover map not kept ({error}); set EVENTRNN_CACHE to a folder that can be written", stacklevel=2
        )
    return crossover
